"""The network on a GPU: outputs, gradients and steps in each number format, large batches, and torch.compile."""

import functools
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import GOLDEN, VARIANTS, golden_images, golden_shapes, golden_weights
from timm.scheduler import StepLRScheduler

import sepvit
from sepvit_lib.run.state import Precision, Training

pytestmark = pytest.mark.gpu

AMPS = {"float32": "off", "TF32": "off", "bfloat16": "bfloat16", "float16": "float16"}
# Largest error of outputs, relative to their standard deviation, and relative error of gradients.
OUTPUT_LIMITS = {"float32": 5e-5, "TF32": 0.01, "bfloat16": 0.15, "float16": 0.02}
GRADIENT_LIMITS = {"float32": 1e-5, "TF32": 0.02, "bfloat16": 0.05, "float16": 0.005}
MAX_WINDOWS = 65_535  # that a kernel numbers with 16 bits
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def convolutions_in_float32():
    """Turn off TF32, the matrix units' float32, which PyTorch allows for convolutions. It is tested by itself."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def precision_of(device, number_format):
    torch.backends.cudnn.allow_tf32 = number_format == "TF32"
    return Precision.of(device, AMPS[number_format])


def golden_network(name):
    """A network with the weights of the golden outputs, in evaluation mode."""
    variant = name.removesuffix("_dense")
    network = timm.create_model(variant) if name == variant else sepvit.create_dense(variant)
    network.load_state_dict(golden_weights(golden_shapes(name)))
    return network.eval()


def compared_values(name):
    """Yield images, and a function from outputs to lists of own values, golden ones and their standard deviation."""
    if not name.endswith("_dense"):
        golden = np.load(GOLDEN / f"{name}_224_seed0.npz")
        yield golden_images(2, 224, 224), lambda logits: [(logits, golden["logits"], golden["logits"].std())]
        return
    for batch, height, width in ((1, 224, 224), (2, 200, 304)):
        golden = np.load(GOLDEN / f"{name}_{height}x{width}_seed0.npz")
        yield (
            golden_images(batch, height, width),
            lambda maps, golden=golden: [
                (y.flatten()[golden[f"stage{i}_index"]], golden[f"stage{i}_value"], golden[f"stage{i}_std"])
                for i, y in enumerate(maps)
            ],
        )


def too_large(errors, limits):
    return {number_format: error for number_format, error in errors.items() if not error < limits[number_format]}


@pytest.mark.parametrize("name", [*VARIANTS, "SepViT_Tiny_dense"])
def test_outputs(name, device):
    network = golden_network(name).to(device)
    errors = dict.fromkeys(AMPS, 0.0)
    for number_format in AMPS:
        precision = precision_of(device, number_format)
        for images, values in compared_values(name):
            with torch.no_grad(), precision.autocast():
                outputs = network(precision.images(images))
            found = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            found = [y.float().cpu().numpy() for y in found]
            for own, expected, deviation in values(found if name.endswith("_dense") else found[0]):
                error = float(np.abs(own - expected).max() / deviation)
                errors[number_format] = max(errors[number_format], error)
    print(name, json.dumps(errors))
    assert too_large(errors, OUTPUT_LIMITS) == {}


def gradients(network, images, precision):
    """All gradients of a weighted sum of the outputs, as one vector in float64 on the CPU. float16 needs a scale."""
    scale = 1024.0 if precision.dtype == torch.float16 else 1.0
    network.zero_grad()
    with precision.autocast():
        outputs = network(precision.images(images))
    total = 0
    for y in [outputs] if isinstance(outputs, torch.Tensor) else outputs:
        factors = np.random.default_rng(1).standard_normal(tuple(y.shape)) / math.sqrt(y.numel())
        weights = torch.from_numpy(factors).to(y.device, torch.promote_types(y.dtype, torch.float32))
        total = total + (scale * (y.to(weights.dtype) * weights)).sum()
    total.backward()
    parts = [p.grad.flatten().double().cpu() / scale for p in network.parameters() if p.grad is not None]
    return torch.cat(parts)


def relative_error(values, expected):
    values, expected = values.double().cpu(), expected.double().cpu()
    return ((values - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", [*VARIANTS, "SepViT_Tiny_dense"])
def test_gradients(name, device):
    """They are compared with those in float64 on the CPU, in training mode without random numbers."""
    images = golden_images(2, 224, 224)
    network = golden_network(name)
    expected = gradients(network.double(), images.double(), Precision(CPU, None))
    network = network.float().to(device)
    errors = {
        number_format: relative_error(gradients(network, images, precision_of(device, number_format)), expected)
        for number_format in AMPS
    }
    print(name, json.dumps(errors))
    assert too_large(errors, GRADIENT_LIMITS) == {}


# ----------------------------------------------------------------------------------------------------- large batches


@functools.cache
def large_batch(device, count):
    """Random images, on the CPU a few of them, and how many are taken at once in parts of the batch."""
    images = count if device.type == "cuda" else 4
    batch = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert device.type == "cpu" or images * math.prod(sepvit.window_grid((224, 224), 0, 7)) > MAX_WINDOWS
    return batch.to(device), images // 5 + 1


@pytest.mark.parametrize(
    ("number_format", "count", "limit"),
    [("float32", 1100, 1e-3), ("bfloat16", 1100, 0.02), ("float16", 1100, 0.005), ("bfloat16", 2200, 0.02)],
)
def test_inference_on_a_large_batch(number_format, count, limit, device):
    """One pass over many images equals passes over parts of them. 2200 images have more than 2³¹ values in a tensor."""
    batch, part = large_batch(device, count)
    precision = precision_of(device, number_format)
    torch.manual_seed(0)
    network = timm.create_model("SepViT_Tiny").eval().to(device)
    with torch.no_grad(), precision.autocast():
        expected = torch.cat([network(chunk) for chunk in batch.split(part)])
        assert relative_error(network(batch), expected) < limit


@pytest.mark.parametrize(("number_format", "limit"), [("float32", 1e-3), ("bfloat16", 0.03), ("float16", 0.01)])
def test_training_on_a_large_batch(number_format, limit, device):
    """Gradients of one pass over many images are the sum of those over parts of them."""
    batch, part = large_batch(device, 1100)
    precision = precision_of(device, number_format)
    torch.manual_seed(0)
    network = timm.create_model("SepViT_Lite").to(device).train()
    factors = torch.randn(len(batch), 1000, device=device) / len(batch)
    scale = 1024.0 if number_format == "float16" else 1.0
    found = []
    for size in (part, len(batch)):
        network.zero_grad()
        for images, weights in zip(batch.split(size), factors.split(size)):
            with precision.autocast():
                logits = network(images)
            (scale * (logits.float() * weights).sum()).backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert relative_error(found[1], found[0]) < limit


# ------------------------------------------------------------------------------------------------- steps, and compiled


class Steps:
    """Forward passes and training steps on one random batch."""

    def __init__(self, variant, device, amp, is_compiled=False):
        images, size = (64, 224) if device.type == "cuda" else (2, 32)
        torch.manual_seed(0)
        self.precision = Precision.of(device, amp)
        network = timm.create_model(variant, img_size=size).to(device)
        if is_compiled:
            network.compile()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        scheduler = StepLRScheduler(optimizer, decay_t=1)
        self.training = Training(network, network, optimizer, scheduler, self.precision.scaler(), None)
        self.images = self.precision.images(torch.randn(images, 3, size, size))
        self.targets = torch.rand(images, 1000, device=device).softmax(dim=1)

    @torch.no_grad()
    def logits(self):
        with self.precision.autocast():
            return self.training.model.eval()(self.images).float()

    def losses(self, count):
        """Take training steps. Returns their losses."""
        losses = []
        for _ in range(count):
            with self.precision.autocast():
                loss = F.cross_entropy(self.training.model.train()(self.images), self.targets)
            self.training.backward(loss, 1)
            self.training.step(5.0, [])
            losses.append(loss.detach())
        return torch.stack(losses).tolist()


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
def test_training_steps(amp, device):
    losses = Steps("SepViT_Lite", device, amp).losses(20)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled(variant, device):
    expected = Steps(variant, device, "bfloat16").logits()
    compiled = Steps(variant, device, "bfloat16", is_compiled=True)
    assert relative_error(compiled.logits(), expected) < 0.03
    assert all(map(math.isfinite, compiled.losses(3)))
