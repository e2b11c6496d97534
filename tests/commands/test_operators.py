"""mmcv's operators are equal to slow implementations.

The operators under test are those that SEPVIT_OPERATORS names: torchvision's in the suite (tests/conftest.py), or
mmcv's compiled ones.
"""

from sepvit_lib.mm import operators  # mmcv.ops finds no operators before

# isort: split
import importlib
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmcv.ops import RoIAlign, RoIPool, nms, sigmoid_focal_loss, soft_nms
from mmcv.ops.deform_conv import deform_conv2d
from mmdet.models.losses import focal_loss
from mmengine.utils.dl_utils import mmcv_full_available

from sepvit_lib.common.errors import UserError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IS_COMPILED = os.environ.get(operators.CHOICE) == operators.COMPILED
torchvisions = pytest.mark.skipif(IS_COMPILED, reason="mmcv's compiled operators do not give this")
on_devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_the_operators_are_the_chosen_ones():
    loader = importlib.import_module(operators.MODULE).__spec__.loader
    assert isinstance(loader, operators.OperatorLoader) == (os.environ[operators.CHOICE] == operators.TORCHVISION)
    assert mmcv_full_available()


# ----------------------------------------------------------------------------------------------------------------------
# Non-maximum suppression
# ----------------------------------------------------------------------------------------------------------------------


def boxes_and_scores(count: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Random boxes in a small image. Whole numbers give equal scores and IoUs; otherwise, scores differ."""
    corners = torch.rand(count, 2, 2) * 60
    boxes, scores = torch.cat((corners.amin(1), corners.amax(1)), dim=1), torch.randperm(count) / count
    return (boxes.round(), (scores * 20).round() / 20) if whole else (boxes, scores)


def regions(count: int, size: int) -> torch.Tensor:
    """Random regions of two images, some beyond their edges."""
    corners = (torch.rand(count, 2, 2) * 1.5 - 0.25) * size
    image = torch.randint(2, (count, 1)).float()
    return torch.cat((image, corners.amin(1), corners.amax(1)), dim=1)


def slow_ious(box: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    """IoUs in float32 for edges, exactly for last pixels."""
    dtype = np.float64 if offset else np.float32
    box, others = box.astype(dtype), others.astype(dtype)
    left, top = np.maximum(box[0], others[:, 0]), np.maximum(box[1], others[:, 1])
    right, bottom = np.minimum(box[2], others[:, 2]), np.minimum(box[3], others[:, 3])
    shared = np.maximum(right - left + offset, 0) * np.maximum(bottom - top + offset, 0)
    areas = (others[:, 2] - others[:, 0] + offset) * (others[:, 3] - others[:, 1] + offset)
    with np.errstate(invalid="ignore"):  # empty boxes have 0/0, and suppress nothing
        return shared / ((box[2] - box[0] + offset) * (box[3] - box[1] + offset) + areas - shared)


def slow_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, offset: int = 0) -> list[int]:
    remaining = np.argsort(-scores.numpy(), kind="stable")
    corners, kept = boxes.numpy(), []
    while len(remaining):
        best, remaining = remaining[0], remaining[1:]
        kept.append(int(best))
        ious = slow_ious(corners[best], corners[remaining], offset)
        remaining = remaining[~(ious > ious.dtype.type(threshold))]
    return kept


@on_devices
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=torchvisions)], ids=["distinct", "ties"])
@pytest.mark.parametrize("count", [0, 1, 100, 5000])
def test_nms(count, whole, offset, device):
    boxes, scores = boxes_and_scores(count, whole)
    for threshold in (0.3, 0.5, 0.7):
        found, kept = nms(boxes.to(device), scores.to(device), threshold, offset)
        assert kept.dtype == torch.int64
        assert kept.tolist() == slow_nms(boxes, scores, threshold, offset)
        assert torch.equal(found.cpu(), torch.cat((boxes, scores[:, None]), dim=1)[kept.cpu()])


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_at_the_threshold(offset):
    """A box is dropped above the threshold, not at it. 0.3 has no exact form in binary."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 3], [0, 0, 10, 4]])
    boxes[:, 2:] -= offset
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.3, offset)[1].tolist() == [0, 1]


def test_nms_of_empty_boxes():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 9, 9]])
    scores = torch.tensor([0.1, 0.2, 0.3])
    assert nms(boxes, scores, 0.5)[1].tolist() == [2, 1, 0]
    assert nms(boxes, scores, 0.5, offset=1)[1].tolist() == [2, 1]


@torchvisions
@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nms_precision(dtype, device):
    boxes, scores = (x.to(dtype) for x in boxes_and_scores(100, whole=True))
    kept = nms(boxes.to(device), scores.to(device), 0.5)[1]
    assert kept.tolist() == slow_nms(boxes.float(), scores.float(), 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# RoIAlign
# ----------------------------------------------------------------------------------------------------------------------


def line_weights(position: float, size: int) -> list[tuple[int, float]]:
    """Pixels of a line between which a sample lies, and their weights. None far beyond the ends."""
    if position < -1 or position > size:
        return []
    position = max(position, 0.0)
    low = min(int(position), size - 1)
    share = position - low if low < size - 1 else 0.0
    return [(low, 1 - share), (min(low + 1, size - 1), share)]


def bin_weights(start: float, length: float, bins: int, ratio: int, size: int) -> np.ndarray:
    """Weights of a line's pixels in each bin along one side of a region, and as many samples."""
    samples = ratio or math.ceil(length / bins)
    weights = np.zeros((bins, size))
    for i in range(bins):
        for j in range(samples):
            for pixel, weight in line_weights(start + (i + (j + 0.5) / samples) * length / bins, size):
                weights[i, pixel] += weight / samples
    return weights


def slow_roi_align(maps: np.ndarray, rois: np.ndarray, gradient: np.ndarray, size, scale, ratio, aligned):
    """The pooled regions, and the gradient with respect to the maps, in float64."""
    pooled, backward = [], np.zeros_like(maps)
    for k, (image, x1, y1, x2, y2) in enumerate(rois):
        x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0) for value in (x1, y1, x2, y2))
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        rows = bin_weights(y1, height, size[0], ratio, maps.shape[2])
        columns = bin_weights(x1, width, size[1], ratio, maps.shape[3])
        pooled.append(np.einsum("iy,jx,cyx->cij", rows, columns, maps[int(image)]))
        backward[int(image)] += np.einsum("iy,jx,cij->cyx", rows, columns, gradient[k])
    return np.stack(pooled), backward


SPECIAL = [  # inside, the whole map, beyond each edge, far beyond, thinner than a pixel, empty, the wrong way round
    *([0, 10, 6, 30, 20], [1, 0, 0, 52, 36], [0, -20, 3, 9, 20], [1, 40, 3, 90, 20], [0, 5, -30, 30, 8]),
    *([1, 5, 30, 30, 80], [0, 200, 200, 300, 300], [1, 11.3, 7.9, 11.9, 30.1], [0, 12, 8, 12, 8], [1, 30, 20, 10, 6]),
]


@on_devices
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "corners"])
@pytest.mark.parametrize("ratio", [0, 1, 3], ids="ratio {}".format)
@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)], ids="{0[0]}x{0[1]}".format)
def test_roi_align(size, ratio, aligned, device):
    maps = torch.randn(2, 3, 9, 13, requires_grad=True, device=device)
    rois = torch.cat((torch.tensor(SPECIAL), regions(20, 50)))
    if ratio == 0 or IS_COMPILED:  # the compiled one refuses them
        rois = rois[(rois[:, 3] >= rois[:, 1])]
    pooled = RoIAlign(size, 0.25, ratio, aligned=aligned)(maps, rois.to(device))
    gradient = torch.randn_like(pooled)
    pooled.backward(gradient)
    arrays = (values.detach().double().cpu().numpy() for values in (maps, rois, gradient))
    expected = slow_roi_align(*arrays, size, 0.25, ratio, aligned)
    np.testing.assert_allclose(pooled.detach().cpu().numpy(), expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps.grad.cpu().numpy(), expected[1], rtol=1e-4, atol=1e-4)


@on_devices
def test_roi_align_of_no_regions(device):
    maps = torch.randn(2, 3, 9, 13, requires_grad=True, device=device)
    pooled = RoIAlign((7, 7))(maps, torch.zeros(0, 5, device=device))
    pooled.sum().backward()
    assert pooled.shape == (0, 3, 7, 7)
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@torchvisions
@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_precision(dtype, device):
    """Half precision is computed in float32, and given back in its own precision."""
    maps, rois = torch.randn(2, 3, 9, 13, device=device).to(dtype), regions(20, 50).to(dtype).to(device)
    half, full = maps.requires_grad_(), maps.detach().float().requires_grad_()
    pooled, expected = RoIAlign((7, 7), 0.25)(half, rois), RoIAlign((7, 7), 0.25)(full, rois.float())
    assert pooled.dtype == dtype
    assert torch.equal(pooled, expected.to(dtype))
    gradient = torch.randn_like(pooled)
    pooled.backward(gradient)
    expected.backward(gradient.float())
    torch.testing.assert_close(half.grad, full.grad.to(dtype))


@on_devices
def test_roi_align_with_deterministic_algorithms(device):
    maps, rois = torch.randn(2, 8, 40, 40, device=device), regions(200, 160).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [
            torch.autograd.functional.vjp(lambda x: RoIAlign((7, 7), 0.25)(x, rois).square().sum(), maps)[1]
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# ----------------------------------------------------------------------------------------------------------------------
# Focal loss
# ----------------------------------------------------------------------------------------------------------------------


def gradient_of(loss, logits):
    """A loss and its gradient, weighted by random numbers."""
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    (value * torch.linspace(0.5, 2, value.numel()).reshape(value.shape).to(value)).sum().backward()
    return value.detach(), logits.grad


@torchvisions  # for GPUs alone
@on_devices
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_focal_loss_equals_mmdets_own_form(reduction, device):
    """mmdet takes mmcv's operator on GPUs, and its own form on CPUs. Class 6 of 6 is the background."""
    logits = torch.cat((torch.randn(200, 6) * 3, torch.tensor([[-100.0, 100, -30, 30, 0, 1e-3]] * 7))).to(device)
    target = torch.cat((torch.randint(7, (200,)), torch.arange(7))).to(device)
    weight, one_hot = torch.rand(len(target), device=device), torch.nn.functional.one_hot(target, 7)[:, :6]
    settings = dict(gamma=2.0, alpha=0.25, reduction=reduction, avg_factor=None if reduction != "mean" else 11)
    by_operator = gradient_of(lambda x: focal_loss.sigmoid_focal_loss(x, target, weight, **settings), logits)
    own = gradient_of(lambda x: focal_loss.py_sigmoid_focal_loss(x, one_hot, weight, **settings), logits)
    for ours, theirs in zip(by_operator, own):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    layer = focal_loss.FocalLoss(reduction=reduction)  # on a CPU, its own form
    value = layer(logits, target, weight, settings["avg_factor"])
    torch.testing.assert_close(by_operator[0], value, rtol=1e-6, atol=1e-9)


@torchvisions
def test_focal_loss_precision():
    logits, target = torch.randn(50, 6), torch.randint(7, (50,))
    half = gradient_of(lambda x: sigmoid_focal_loss(x, target, 2.0, 0.25, None, "none"), logits.half())
    full = gradient_of(lambda x: sigmoid_focal_loss(x, target, 2.0, 0.25, None, "none"), logits.half().float())
    for ours, expected in zip(half, full):
        assert ours.dtype == torch.float16
        torch.testing.assert_close(ours, expected.half(), rtol=2e-3, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Operators that are missing
# ----------------------------------------------------------------------------------------------------------------------


@torchvisions
def test_missing_operators_are_named():
    maps, rois = torch.randn(1, 2, 9, 9), torch.tensor([[0.0, 0, 0, 5, 5]])
    focal = (torch.randn(2, 6), torch.tensor([0, 1]), 2.0, 0.25, torch.ones(6), "none")
    for name, function, *arguments in (
        ("roi_pool_forward", RoIPool((3, 3)), maps, rois),
        ("deform_conv_forward", deform_conv2d, maps, torch.zeros(1, 18, 7, 7), torch.randn(2, 2, 3, 3)),
        ("roi_align_forward with pool_mode='max'", RoIAlign((3, 3), pool_mode="max"), maps, rois),
        ("softnms", soft_nms, torch.rand(3, 4), torch.rand(3)),
        ("sigmoid_focal_loss_forward with weights of classes", sigmoid_focal_loss, *focal),
    ):
        with pytest.raises(UserError) as error:
            function(*arguments)
        assert str(error.value).startswith(f"mmcv's operator {name}: torchvision has no counterpart")
        assert str(error.value).endswith(operators.INSTALL)
    with pytest.raises(AttributeError):
        importlib.import_module(operators.MODULE).__path__  # noqa: B018


# ----------------------------------------------------------------------------------------------------------------------
# Choice
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Finds the module with a choice, in a folder that stands for mmcv's."""

    def find(choice: str | None):
        monkeypatch.delenv(operators.CHOICE, raising=False)
        if choice is not None:
            monkeypatch.setenv(operators.CHOICE, choice)
        return operators.OperatorFinder().find_spec(operators.MODULE, [str(tmp_path)])

    return find


def test_choice_of_operators(choose, tmp_path):
    for choice in (None, "", operators.TORCHVISION):
        assert isinstance(choose(choice).loader, operators.OperatorLoader)
    for choice, words in (("compiled", "mmcv has no compiled operators.*pip install"), ("cuda", "takes compiled or")):
        with pytest.raises(UserError, match=f"SEPVIT_OPERATORS={choice}: {words}"):
            choose(choice)
    (tmp_path / "_ext.py").touch()
    for choice in (None, operators.COMPILED):
        assert choose(choice).origin == str(tmp_path / "_ext.py")
    assert isinstance(choose(operators.TORCHVISION).loader, operators.OperatorLoader)
    assert operators.OperatorFinder().find_spec("mmcv.ops", None) is None


def test_operators_compiled_for_another_torch(choose, tmp_path):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_ext{suffix}").write_bytes(b"not a library")
    spec = choose(None)
    with pytest.raises(UserError, match=rf"cannot be loaded with torch {re.escape(torch.__version__)}.*=torchvision"):
        importlib.util.module_from_spec(spec)


TWICE = """
import sepvit_lib.mm.backbone
from sepvit_lib.mm import operators
operators.offer()
import mmdet.apis, mmdet.models, mmseg.apis
from mmdet.models.dense_heads import rpn_head
assert rpn_head.batched_nms.__module__ == "mmcv.ops.nms"
"""


@torchvisions
def test_libraries_imported_after_the_backbones(tmp_path):
    """mmdet's and mmseg's interfaces find the operators. One log line says which are used."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", TWICE]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("mmcv's operators: torchvision's") == 1
