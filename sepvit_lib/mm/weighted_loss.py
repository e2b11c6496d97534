"""Cross entropy of segmentation with class weights."""

from mmseg.models.losses import CrossEntropyLoss
from torch import Tensor


class WeightedCrossEntropyLoss(CrossEntropyLoss):
    """mmseg's `CrossEntropyLoss`, divided by the number of pixels as without class weights, not by their weights."""

    def forward(self, cls_score: Tensor, label: Tensor, *, ignore_index: int = -100, **kwargs: object) -> Tensor:
        """Compute the loss from logits, B × classes × H × W, and labels, B × H × W."""
        pixels = (label != ignore_index).sum().item() if self.avg_non_ignore else label.numel()
        # float: mmseg converts the weights to the logits' type, and weights of rare classes can exceed float16
        return super().forward(cls_score.float(), label, avg_factor=pixels, ignore_index=ignore_index, **kwargs)
