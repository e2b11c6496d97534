"""torchvision's operators in place of mmcv's, if mmcv is installed without its compiled operators.

mmcv's operators are compiled from C++ into the module `mmcv._ext`. Of these, SepViT's segmentors and detectors use
non-maximum suppression and RoIAlign, which torchvision contains for every device, and the sigmoid focal loss, which
mmdet has in PyTorch. If the compiled module is missing, `offer` makes Python find a module of the same name with these
replacements. It must be called before mmdet's or mmseg's models are imported; importing `sepvit_lib.mm` does so.
Operators without a counterpart raise an error when called.

The environment variable SEPVIT_OPERATORS forces a choice: `torchvision`, or `compiled`, which must then be installed.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision
from mmengine.logging import print_log
from torch import Tensor

from sepvit_lib.common.errors import UserError
from sepvit_lib.common.processes import is_main_process

MODULE = "mmcv._ext"
CHOICE = "SEPVIT_OPERATORS"
COMPILED, TORCHVISION = "compiled", "torchvision"
INSTALL = (
    "pip install setuptools wheel ninja packaging && pip install --force-reinstall --no-deps --no-build-isolation "
    "--no-cache-dir --no-binary onedl-mmcv onedl-mmcv==2.3.6"
)

# ----------------------------------------------------------------------------------------------------------------------
# Operators, with the signatures that mmcv.ops expects. All except `nms` write their results into a tensor argument.
# ----------------------------------------------------------------------------------------------------------------------


def at_least_float32(values: Tensor) -> Tensor:
    """Convert values of lower precision to float32, which torchvision's CPU operators require."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes: (N, 4): x1, y1, x2, y2.
        scores: (N).
        iou_threshold: a box is dropped if its IoU with a box of higher score exceeds this.
        offset: 1 if x2 and y2 are the indices of a box's last pixels, 0 if they are the coordinates of its edges.

    Returns:
        indices of the boxes kept, by descending score.
    """
    boxes, scores = at_least_float32(boxes), at_least_float32(scores)
    if offset:
        if boxes.device.type != "mps":  # MPS has no float64
            boxes = boxes.double()  # adding 1 to large coordinates would round them
        boxes = boxes + boxes.new_tensor((0, 0, offset, offset))
    threshold = torch.tensor(iou_threshold, dtype=boxes.dtype).item()  # rounded to the precision of the IoUs
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), threshold)


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **settings: Any
) -> None:
    """RoIAlign by average pooling.

    Args:
        input: maps, (B, C, H, W).
        rois: (N, 5): index of the image in the batch, x1, y1, x2, y2.
        output: (N, C, aligned_height, aligned_width), to which the result is written.
        argmax_y: unused; for maximum pooling only.
        argmax_x: unused; for maximum pooling only.
        **settings: see `region_settings`.

    Raises:
        UserError: maximum pooling is requested.
    """
    scale_and_size, sampling = region_settings("roi_align_forward", **settings)
    maps, rois = at_least_float32(input), at_least_float32(rois)
    output.copy_(torch.ops.torchvision.roi_align(maps, rois, *scale_and_size, *sampling))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **settings: Any
) -> None:
    """Gradient of RoIAlign by average pooling.

    Args:
        grad_output: gradient with respect to the output.
        rois: as for `roi_align_forward`.
        argmax_y: unused.
        argmax_x: unused.
        grad_input: (B, C, H, W), to which the gradient with respect to the maps is written.
        **settings: see `region_settings`.

    Raises:
        UserError: maximum pooling is requested.
    """
    scale_and_size, sampling = region_settings("roi_align_backward", **settings)
    gradient, rois = at_least_float32(grad_output), at_least_float32(rois)
    if torch.are_deterministic_algorithms_enabled():
        gradient, rois = gradient.cpu(), rois.cpu()  # only the CPU's order of summation is deterministic
    backward = torch.ops.torchvision._roi_align_backward
    grad_input.copy_(backward(gradient, rois, *scale_and_size, *grad_input.shape, *sampling))


def region_settings(
    name: str,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> tuple[tuple[float, int, int], tuple[int, bool]]:
    """Settings of RoIAlign in torchvision's order: scale and size, and sampling.

    Args:
        name: the operator.
        aligned_height: number of bins per region, vertically.
        aligned_width: number of bins per region, horizontally.
        spatial_scale: factor that converts the boxes' coordinates to the feature map's.
        sampling_ratio: samples per bin in each direction, 0 for one per pixel.
        pool_mode: 1 for average pooling.
        aligned: whether integer coordinates are pixel corners instead of pixel centres.

    Raises:
        UserError: maximum pooling is requested.
    """
    if pool_mode != 1:
        raise_missing(f"{name} with pool_mode='max'")
    return (spatial_scale, aligned_height, aligned_width), (sampling_ratio, aligned)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Sigmoid focal loss by mmdet's PyTorch implementation, which mmdet itself uses only on CPUs.

    Args:
        input: logits, (N, C).
        target: class indices, (N). C is the background.
        weight: class weights, which are not supported; must be empty.
        output: (N, C), to which the losses are written.
        gamma: focusing exponent.
        alpha: weight of positive targets; negative targets have the weight 1 - alpha.

    Raises:
        UserError: classes are weighted.
    """
    output.copy_(_focal_loss("sigmoid_focal_loss_forward", input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient of the sigmoid focal loss.

    Args:
        input: logits, (N, C).
        target: see `sigmoid_focal_loss_forward`.
        weight: must be empty.
        grad_input: (N, C), to which the gradient of each loss with respect to its logit is written.
        gamma: focusing exponent.
        alpha: weight of positive targets.

    Raises:
        UserError: classes are weighted.
    """
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss("sigmoid_focal_loss_backward", logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(name: str, input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss  # imports mmcv.ops, which imports these operators

    if weight.numel():
        raise_missing(f"{name} with weights of classes")
    is_class = target[:, None] == torch.arange(input.size(1), device=target.device)
    return py_sigmoid_focal_loss(at_least_float32(input), is_class, gamma=gamma, alpha=alpha, reduction="none")


OPERATORS: tuple[Callable, ...]
OPERATORS = (nms, roi_align_forward, roi_align_backward, sigmoid_focal_loss_forward, sigmoid_focal_loss_backward)


def find_operator(name: str) -> Callable:
    """Return torchvision's counterpart of an operator, or a function that reports its absence.

    Args:
        name: the operator.

    Raises:
        AttributeError: the name starts with an underscore. Python itself looks up such names in modules.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {MODULE} has no attribute {name}")
    found = [operator for operator in OPERATORS if operator.__name__ == name]
    return found[0] if found else partial(raise_missing, name)


def raise_missing(name: str, *args: object, **kwargs: object) -> NoReturn:
    """Report that an operator is missing.

    Args:
        name: the operator.
        *args: the operator's arguments, unused.
        **kwargs: the operator's keyword arguments, unused.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"mmcv's operator {name}: torchvision has no counterpart; install a C++ compiler, then mmcv's "
        f"compiled operators: {INSTALL}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# The module
# ----------------------------------------------------------------------------------------------------------------------


class OperatorLoader(Loader):
    """Create the module with torchvision's operators."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the new module."""
        vars(module)["__getattr__"] = find_operator


class CompiledLoader(ExtensionFileLoader):
    """Load mmcv's compiled operators."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Load the module.

        Raises:
            UserError: the operators were compiled for a different torch version.
        """
        try:
            return super().create_module(spec)
        except ImportError as error:
            raise UserError(
                f"mmcv's compiled operators: cannot be loaded with torch {torch.__version__} ({error}); "
                f"set {CHOICE}={TORCHVISION}, or compile them again: {INSTALL}"
            ) from None


class OperatorFinder(MetaPathFinder):
    """Find the module of mmcv's operators: the compiled one or torchvision's. Logs the choice once."""

    is_logged = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the module of mmcv's operators; None for other modules.

        Raises:
            UserError: SEPVIT_OPERATORS is invalid, or requests compiled operators that are not installed.
        """
        if name != MODULE:
            return None
        choice = os.environ.get(CHOICE, "")
        if choice not in ("", COMPILED, TORCHVISION):
            raise UserError(
                f"environment variable {CHOICE}={choice}: takes {COMPILED} or {TORCHVISION}; unset it or correct it"
            )
        others = [finder for finder in sys.meta_path if finder is not self]
        compiled = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if choice == COMPILED and compiled is None:
            raise UserError(
                f"environment variable {CHOICE}={choice}: mmcv has no compiled operators; unset it, or "
                f"install them: {INSTALL}"
            )
        if choice == TORCHVISION or compiled is None:
            self._log("torchvision's, set by SEPVIT_OPERATORS" if compiled else "torchvision's, no compiled ones found")
            return ModuleSpec(name, OperatorLoader(), origin=torchvision.__file__)
        self._log(COMPILED)
        if isinstance(compiled.loader, ExtensionFileLoader):
            compiled.loader = CompiledLoader(name, compiled.loader.path)
        return compiled

    def _log(self, choice: str) -> None:
        is_worker = multiprocessing.parent_process() is not None
        if not self.is_logged and not is_worker and is_main_process():
            print_log(f"mmcv's operators: {choice}", logger="current")
        self.is_logged = True


def offer() -> None:
    """Make imports of mmcv's operators find torchvision's, unless compiled ones are to be used. Idempotent."""
    if not any(isinstance(finder, OperatorFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, OperatorFinder())
