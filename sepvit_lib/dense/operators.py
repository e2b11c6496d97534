"""mmcv's operators by torchvision, where mmcv is installed without its compiled ones.

mmcv's operators are compiled from C++ into the module `mmcv._ext`. Of these, SepViT's segmentors and detectors use
non-maximum suppression and RoIAlign, which torchvision contains for every device. `offer` lets Python find a module
of that name, made of torchvision's operators, if the compiled one is missing. It is not imported before mmcv needs it.
Operators without a counterpart raise an error when they are called.

Environment variable SEPVIT_OPERATORS chooses explicitly: `torchvision`, or `compiled`, which must then be there.
"""

import ast
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
import torchvision
from mmengine.logging import print_log
from torch import Tensor

from sepvit_lib.training.errors import UserError
from sepvit_lib.training.processes import is_main_process

MODULE = "mmcv._ext"
CHOICE = "SEPVIT_OPERATORS"
COMPILED, TORCHVISION = "compiled", "torchvision"
INSTALL = (
    "pip install setuptools wheel ninja packaging && pip install --force-reinstall --no-deps --no-build-isolation "
    "--no-cache-dir --no-binary onedl-mmcv onedl-mmcv==2.3.6"
)

# ----------------------------------------------------------------------------------------------------------------------
# Operators. The signatures are those that mmcv.ops calls; results are written into the tensors it passes.
# ----------------------------------------------------------------------------------------------------------------------


def at_least_float32(values: Tensor) -> Tensor:
    """Convert values of lower precision to float32. torchvision's operators for CPUs take no others."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes: (N, 4), as x1, y1, x2, y2.
        scores: (N).
        iou_threshold: a box is dropped if its IoU with a better one exceeds this.
        offset: 1 if x2 and y2 are the last pixels of a box, 0 if they are its edges.

    Returns:
        indices of the boxes kept, by descending score.
    """
    boxes, scores = at_least_float32(boxes), at_least_float32(scores)
    if offset:
        if boxes.device.type != "mps":  # has no float64
            boxes = boxes.double()  # adding 1 to large coordinates would round them
        boxes = boxes + boxes.new_tensor((0, 0, offset, offset))
    threshold = torch.tensor(iou_threshold, dtype=boxes.dtype).item()  # compared with IoUs of this precision
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft non-maximum suppression, on the CPU. Boxes lose score by their overlap with better ones.

    Args:
        boxes: (N, 4), as x1, y1, x2, y2.
        scores: (N).
        dets: (N, 5), where the boxes kept and their new scores are written.
        iou_threshold: overlap from which on methods 0 and 1 reduce the score.
        sigma: width of method 2.
        min_score: boxes below this are dropped.
        method: factor of a score at overlap u: 0 is 0, 1 is 1 - u, 2 is exp(-u²/sigma).
        offset: as for `nms`.

    Returns:
        indices of the boxes kept, by descending new score.
    """
    boxes, scores, indices = boxes.clone(), scores.clone(), torch.arange(len(boxes))
    i, count = 0, len(boxes)
    while i < count:
        best = i + int(scores[i:count].argmax())
        for values in (boxes, scores, indices):
            values[[i, best]] = values[[best, i]]
        dets[i, :4], dets[i, 4] = boxes[i], scores[i]
        overlaps = _overlaps(boxes[i], boxes[i + 1 : count], offset)
        scores[i + 1 : count] *= _soft_factors(overlaps, iou_threshold, sigma, method)
        order = _fill_holes(scores[i + 1 : count] >= min_score)
        for values in (boxes, scores, indices):
            values[i + 1 : i + 1 + len(order)] = values[i + 1 : count][order]
        i, count = i + 1, i + 1 + len(order)
    return indices[:count]


def _overlaps(box: Tensor, others: Tensor, offset: int) -> Tensor:
    """IoUs of a box with others."""
    extent = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2]) + offset).clamp(min=0)
    area, areas = ((b[..., 2:] - b[..., :2] + offset).prod(-1) for b in (box, others))
    intersection = extent.prod(-1)
    return intersection / (area + areas - intersection)


def _soft_factors(overlaps: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    """What scores are multiplied with, see `softnms`."""
    if method == 2:
        return torch.exp(-overlaps.square() / sigma)
    reduced = 1 - overlaps if method == 1 else torch.zeros_like(overlaps)
    return torch.where(overlaps >= iou_threshold, reduced, 1.0)


def _fill_holes(kept: Tensor) -> Tensor:
    """Order in which the compiled operator holds the boxes kept: the last ones take the places of dropped ones.

    It decides which of several boxes of equal scores comes first.
    """
    count = int(kept.sum())
    order = torch.arange(count)
    order[~kept[:count]] = count + kept[count:].nonzero().flatten().flip(0)
    return order


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign by average pooling.

    Args:
        input: maps, (B, C, H, W).
        rois: (N, 5), as index in the batch, x1, y1, x2, y2.
        output: (N, C, aligned_height, aligned_width), where the result is written.
        argmax_y: unused, belongs to maximum pooling.
        argmax_x: unused, likewise.
        aligned_height: bins of a region vertically.
        aligned_width: bins of a region horizontally.
        spatial_scale: factor from the boxes' coordinates to the map's.
        sampling_ratio: samples of a bin in each direction, 0 for as many as pixels.
        pool_mode: 1, average pooling.
        aligned: whether the centre of a pixel, not its corner, has its integer coordinates.

    Raises:
        UserError: maximum pooling is requested.
    """
    _check_pool_mode("roi_align_forward", pool_mode)
    size = (aligned_height, aligned_width)
    maps, rois = at_least_float32(input), at_least_float32(rois)
    output.copy_(torch.ops.torchvision.roi_align(maps, rois, spatial_scale, *size, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of RoIAlign by average pooling.

    Args:
        grad_output: gradient with respect to the output.
        rois: as for `roi_align_forward`, like all that follow.
        argmax_y: unused.
        argmax_x: unused.
        grad_input: (B, C, H, W), where the gradient with respect to the maps is written.
        aligned_height: bins of a region vertically.
        aligned_width: bins of a region horizontally.
        spatial_scale: factor from the boxes' coordinates to the map's.
        sampling_ratio: samples of a bin in each direction.
        pool_mode: 1, average pooling.
        aligned: whether the centre of a pixel has its integer coordinates.

    Raises:
        UserError: maximum pooling is requested.
    """
    _check_pool_mode("roi_align_backward", pool_mode)
    gradient, rois = at_least_float32(grad_output), at_least_float32(rois)
    if torch.are_deterministic_algorithms_enabled():
        gradient, rois = gradient.cpu(), rois.cpu()  # only the CPU's order of summation is deterministic
    size = (aligned_height, aligned_width)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            gradient, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


def _check_pool_mode(name: str, pool_mode: int) -> None:
    if pool_mode != 1:
        raise_missing(f"{name} with pool_mode='max'")


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Sigmoid focal loss by mmdet's form in PyTorch, which mmdet itself uses on CPUs alone.

    Args:
        input: logits, (N, C).
        target: classes, (N). C stands for the background.
        weight: empty.
        output: (N, C), where the losses are written.
        gamma: exponent of the focus.
        alpha: weight of positive targets; negative ones have 1 - alpha.

    Raises:
        UserError: classes have weights.
    """
    output.copy_(_focal_loss("sigmoid_focal_loss_forward", input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient of the sigmoid focal loss.

    Args:
        input: as for `sigmoid_focal_loss_forward`, like all other arguments but one.
        target: classes.
        weight: empty.
        grad_input: (N, C), where the gradient of each loss with respect to its logit is written.
        gamma: exponent of the focus.
        alpha: weight of positive targets.

    Raises:
        UserError: classes have weights.
    """
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss("sigmoid_focal_loss_backward", logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(name: str, input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss  # imports mmcv.ops, hence this module

    if weight.numel():
        raise_missing(f"{name} with weights of classes")
    is_class = target[:, None] == torch.arange(input.size(1), device=target.device)
    return py_sigmoid_focal_loss(at_least_float32(input), is_class, gamma=gamma, alpha=alpha, reduction="none")


def get_compiler_version() -> str:
    """What mmcv reports as the compiler of its operators."""
    return "none, operators of torchvision"


get_compiling_cuda_version = get_compiler_version

OPERATORS: dict[str, Callable] = dict(
    nms=nms,
    softnms=softnms,
    roi_align_forward=roi_align_forward,
    roi_align_backward=roi_align_backward,
    sigmoid_focal_loss_forward=sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward=sigmoid_focal_loss_backward,
    get_compiler_version=get_compiler_version,
    get_compiling_cuda_version=get_compiling_cuda_version,
)


def raise_missing(name: str) -> NoReturn:
    """Report that an operator is missing.

    Args:
        name: the operator.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"mmcv's operator {name}: torchvision has none, it needs mmcv's compiled ones; install a C++ "
        f"compiler, then: {INSTALL}"
    )


def missing_operator(name: str) -> Callable[..., NoReturn]:
    """Operator without a counterpart in torchvision. It raises an error when it is called.

    Args:
        name: the operator.

    Raises:
        AttributeError: the name is not an operator's, but one that Python looks up in modules.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {MODULE} has no attribute {name}")

    def operator(*args: object, **kwargs: object) -> NoReturn:
        raise_missing(name)

    return operator


# ----------------------------------------------------------------------------------------------------------------------
# The module
# ----------------------------------------------------------------------------------------------------------------------


class OperatorLoader(Loader):
    """Makes the module of torchvision's operators."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the new module."""
        vars(module).update(OPERATORS, __getattr__=missing_operator)


class CompiledLoader(ExtensionFileLoader):
    """Loads mmcv's compiled operators."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Load the module.

        Raises:
            UserError: it was compiled for another torch.
        """
        try:
            return super().create_module(spec)
        except ImportError as error:
            raise UserError(
                f"mmcv's compiled operators: do not load with torch {torch.__version__} ({error}); "
                f"set {CHOICE}={TORCHVISION}, or compile them again: {INSTALL}"
            ) from None


class OperatorFinder(MetaPathFinder):
    """Finds the module of mmcv's operators: the compiled one or torchvision's. Logs which, once."""

    is_logged = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the module when it is imported.

        Raises:
            UserError: SEPVIT_OPERATORS is invalid, or asks for compiled operators that are not there.
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
            self._log("torchvision's, as SEPVIT_OPERATORS asks" if compiled else "torchvision's, none are compiled")
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
    """Let Python find torchvision's operators when it imports mmcv's. Does nothing if called again."""
    if not any(isinstance(finder, OperatorFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, OperatorFinder())
        _repeat_failed_imports()


def in_use() -> str:
    """Which operators mmcv uses, 'compiled' or 'torchvision'. Imports them."""
    spec = importlib.import_module(MODULE).__spec__
    return TORCHVISION if spec is not None and isinstance(spec.loader, OperatorLoader) else COMPILED


def _repeat_failed_imports() -> None:
    """Give mmdet's and mmseg's modules the operators, if they were imported before and found none.

    These modules then define placeholders, which raise errors.
    """
    if "mmcv.ops" in sys.modules:
        return
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in ("mmdet", "mmseg"):
            for statement in _imports_of_operators(module):
                operators = importlib.import_module(statement.module or "")
                for name in statement.names:
                    setattr(module, name.asname or name.name, getattr(operators, name.name))


def _imports_of_operators(module: ModuleType) -> list[ast.ImportFrom]:
    """The statements by which a module tries to import operators of mmcv."""
    path = Path(getattr(module, "__file__", None) or "")
    source = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
    if "mmcv.ops" not in source:
        return []
    tries = [node for node in ast.parse(source).body if isinstance(node, ast.Try)]
    statements = [node for attempt in tries for node in attempt.body if isinstance(node, ast.ImportFrom)]
    return [node for node in statements if f"{node.module}.".startswith("mmcv.ops.")]
