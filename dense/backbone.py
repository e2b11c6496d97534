"""SepViT's dense form as a backbone of mmsegmentation and mmdetection.

Importing this module registers `SepViT_Lite`, `SepViT_Tiny`, `SepViT_Small` and `SepViT_Base` with mmengine's root
registry, which those of mmseg and mmdet look into; configs name it under `custom_imports`. It also lets configs inherit
those that mmseg and mmdet bring along, and makes torch refuse, in this process and the ones it starts, every checkpoint
that would run code: mmengine's own loader falls back to running it.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import print_log
from mmengine.model import initialize
from mmengine.registry import MODELS
from mmengine.utils import is_installed

import checkpoints
from dense.runner import read_checkpoint
from sepvit import VARIANTS, SepViTDense

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # asked by torch.load; goes before the caller's weights_only=False

# mmengine looks the configs of `mmseg::…` and `mmdet::…` up by distribution, under names they no longer have.
for module, distribution in (("mmseg", "onedl-mmsegmentation"), ("mmdet", "onedl-mmdetection")):
    if is_installed(distribution):
        MODULE2PACKAGE[module] = distribution


class SepViTBackbone(SepViTDense):
    """SepViT's dense form with the arguments that mmsegmentation's and mmdetection's backbones have.

    Args:
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first one.
        out_indices: stages (0 to 3) whose maps are given.
        with_cp: compute activations again in the backward pass instead of keeping them (gradient checkpointing).
        frozen_stages: parts that are not trained: none (-1), the first patch embedding (0), that and the first n
            stages (n).
        init_cfg: `dict(type='Pretrained', checkpoint=PATH)`, or another of mmengine's initialisations; None keeps the
            random weights.
        pretrained: short for the former, `PATH`.
        **kwargs: as for `sepvit.SepViTStages`.

    Raises:
        ValueError: a stage there is not; both `init_cfg` and `pretrained`.
    """

    variant: str

    def __init__(
        self,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        with_cp: bool = False,
        frozen_stages: int = -1,
        init_cfg: dict[str, Any] | None = None,
        pretrained: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(out_indices, drop_path_rate=drop_path_rate, **{**VARIANTS[self.variant], **kwargs})
        if not -1 <= frozen_stages <= len(self.blocks):
            raise ValueError(f"frozen_stages={frozen_stages}: choose from -1 (none) to {len(self.blocks)} (all)")
        if init_cfg and pretrained:
            raise ValueError(f"pretrained={pretrained!r} and init_cfg={init_cfg}: give one of them")
        self.init_cfg = dict(type="Pretrained", checkpoint=pretrained) if pretrained else init_cfg
        self.frozen_stages = frozen_stages
        self.set_grad_checkpointing(with_cp)
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def _frozen_parts(self) -> list[Any]:
        parts = [self.patch_embeds[0]] if self.frozen_stages >= 0 else []
        for layers in (self.patch_embeds, self.pos_block, self.blocks, self.norm_list):
            parts += layers[: max(0, self.frozen_stages)]
        return parts

    def train(self, mode: bool = True) -> "SepViTBackbone":
        """Training or evaluation mode; the frozen parts stay in evaluation mode (no stochastic depth)."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def init_weights(self) -> None:
        """Load the pretrained weights and log what was loaded and what is fresh; mmengine's runner calls this.

        Raises:
            UserError: the file is missing, would run code, or holds another variant.
        """
        if not self.init_cfg:
            print_log(f"{self.variant}: random weights, nothing pretrained", "current", logging.WARNING)
        elif self.init_cfg["type"] == "Pretrained":
            self._load_pretrained(self.init_cfg["checkpoint"], self.init_cfg.get("prefix", ""))
        else:
            initialize(self, self.init_cfg)

    def _load_pretrained(self, path: str, prefix: str) -> None:
        what = f"pretrained {path}"
        checkpoint = read_checkpoint(path, "pretrained")
        weights = checkpoints.weights_of(checkpoint, what, prefer_ema=True)
        if prefix:
            prefix = prefix.rstrip(".") + "."
            weights = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        hint = "take the config of that variant, or the weights of this one"
        adaptation = checkpoints.load_weights(self, weights, what, hint)
        own = len(self.state_dict())
        which = "averaged weights, " if "model_ema" in checkpoint else ""
        report = f"{what}: {which}loaded {own - len(adaptation.fresh)} of {self.variant}'s {own} entries"
        print_log(f"{report}; {adaptation}" if adaptation else report, "current")


@MODELS.register_module()
class SepViT_Lite(SepViTBackbone):
    """SepViT-Lite; channels 32, 64, 128 and 256."""

    variant = "SepViT_Lite"


@MODELS.register_module()
class SepViT_Tiny(SepViTBackbone):
    """SepViT-T; channels 96, 192, 384 and 768."""

    variant = "SepViT_Tiny"


@MODELS.register_module()
class SepViT_Small(SepViTBackbone):
    """SepViT-S; channels 96, 192, 384 and 768."""

    variant = "SepViT_Small"


@MODELS.register_module()
class SepViT_Base(SepViTBackbone):
    """SepViT-B; channels 128, 256, 512 and 1024."""

    variant = "SepViT_Base"
