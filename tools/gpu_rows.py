"""The rows of gpu_check.py that use the network: outputs, gradients, compilation, large batches, speed.

A row is a function that runs in a process of its own. It fills `figures`, and raises `CheckError` if one of them is
outside its limit.
"""

if not __package__:
    import _repository  # noqa: F401
import contextlib
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

import main
import sepvit
from sepvit_lib.training.measure import bytes_of, count_multiply_adds, median_time, peak_memory, timed
from sepvit_lib.training.state import Precision
from tools import benchmark, benchmark_checkpoint, benchmark_machine
from tools.benchmark_networks import Steps
from tools.benchmark_profile import profile_call
from tools.gpu_record import Figures

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from conftest import GOLDEN, golden_images, golden_shapes, golden_weights

AMPS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest error, relative to the standard deviation of what is compared. The matrix units' float32 mode (TF32) is off.
TOLERANCES = {"float32": 5e-5, "bfloat16": 0.15, "float16": 0.02}
MOST_WINDOWS = 65_535  # of a batch, for kernels that number their blocks with 16 bits


class CheckError(Exception):
    """A figure is outside its limit, or a command did not do what it should."""


@dataclass(frozen=True)
class Setup:
    """Where a row runs.

    Attributes:
        device: the device.
        quick: run the short form.
        digits: the demo's digits in ImageNet layout.
        folder: an empty folder for the row alone.
    """

    device: torch.device
    quick: bool
    digits: Path
    folder: Path

    @property
    def variants(self) -> Sequence[str]:
        """The variants to compare."""
        return ["SepViT_Lite"] if self.quick else list(sepvit.VARIANTS)


@dataclass(frozen=True)
class Row:
    """One row of the check.

    Attributes:
        name: its name.
        check: what it runs; fills the figures.
        limit: seconds it may take.
        alone: whether it runs alone, because it measures time or needs most of the memory.
        quick: whether it has a quick form.
        gpu: whether it needs a GPU.
    """

    name: str
    check: Callable[[Setup, Figures], None]
    limit: float = field(default=150, kw_only=True)
    alone: bool = field(default=False, kw_only=True)
    quick: bool = field(default=False, kw_only=True)
    gpu: bool = field(default=False, kw_only=True)


def require(condition: bool, message: str) -> None:
    """Fail the row unless a condition holds.

    Raises:
        CheckError: it does not.
    """
    if not condition:
        raise CheckError(message)


# ----------------------------------------------------------------------------------------------------------------------
# Outputs and gradients
# ----------------------------------------------------------------------------------------------------------------------


def relative_error(values: Tensor, expected: Tensor) -> float:
    """‖values − expected‖ / ‖expected‖, in float64 on the CPU."""
    values, expected = values.detach().double().cpu(), expected.detach().double().cpu()
    return ((values - expected).norm() / expected.norm()).item()


def golden_model(variant: str, shapes: str, device: torch.device, is_dense: bool = False) -> nn.Module:
    """Build a network with the weights of the golden outputs."""
    model = sepvit.create_dense(variant) if is_dense else timm.create_model(variant)
    model.load_state_dict(golden_weights(golden_shapes(shapes)))
    return model.eval().to(device)


def golden_errors(setup: Setup, amp: str) -> Figures:
    """Largest difference from the published outputs, relative to their standard deviation, by network."""
    precision = Precision(setup.device, AMPS[amp])
    errors: Figures = {}
    for variant in setup.variants:
        model = golden_model(variant, variant, setup.device)
        with torch.no_grad(), precision.autocast():
            logits = model(precision.images(golden_images(2, 224, 224))).float().cpu().numpy()
        expected = np.load(GOLDEN / f"{variant}_224_seed0.npz")["logits"]
        errors[variant] = float(np.abs(logits - expected).max() / expected.std())
    if setup.quick:
        return errors
    dense = golden_model("SepViT_Tiny", "SepViT_Tiny_dense", setup.device, is_dense=True)
    for batch, height, width in ((1, 224, 224), (2, 200, 304)):
        golden = np.load(GOLDEN / f"SepViT_Tiny_dense_{height}x{width}_seed0.npz")
        with torch.no_grad(), precision.autocast():
            maps = dense(precision.images(golden_images(batch, height, width)))
        values = [y.float().cpu().flatten().numpy()[golden[f"stage{i}_index"]] for i, y in enumerate(maps)]
        errors[f"SepViT_Tiny, dense, {height} × {width}"] = max(
            float(np.abs(own - golden[f"stage{i}_value"]).max() / golden[f"stage{i}_std"])
            for i, own in enumerate(values)
        )
    return errors


def check_outputs(setup: Setup, figures: Figures, amp: str) -> None:
    """Compare with the published code's outputs, the golden ones."""
    if amp == "float32" and setup.device.type == "cuda":
        figures |= {f"{name}, TF32 convolutions": error for name, error in golden_errors(setup, amp).items()}
    torch.backends.cudnn.allow_tf32 = False
    errors = golden_errors(setup, amp)
    figures |= errors
    require(max(errors.values()) < TOLERANCES[amp], f"outputs differ from the published ones: {errors}")


def gradients(model: nn.Module, images: Tensor, factors: Tensor, precision: Precision) -> list[Tensor]:
    """Gradients of a weighted sum of the logits. float16 needs a scale, which is taken out again."""
    scale = 1024.0 if precision.dtype == torch.float16 else 1.0
    model.zero_grad()
    with precision.autocast():
        logits = model(images)
    (scale * (logits.to(factors.dtype) * factors).sum()).backward()
    return [p.grad.double() / scale for p in model.parameters() if p.grad is not None]


def check_gradients(setup: Setup, figures: Figures, amp: str, compiled: bool = False) -> None:
    """Compare SepViT_Lite's gradients with those in float64 on the CPU."""
    torch.backends.cudnn.allow_tf32 = False
    images = golden_images(1 if setup.quick else 4, 224, 224)
    factors = torch.from_numpy(np.random.default_rng(1).standard_normal((len(images), 1000)))
    model = golden_model("SepViT_Lite", "SepViT_Lite", setup.device).train()
    if compiled:
        model.compile(fullgraph=True)
    precision = Precision(setup.device, AMPS[amp])
    own = gradients(model, precision.images(images), factors.float().to(setup.device), precision)
    reference = golden_model("SepViT_Lite", "SepViT_Lite", torch.device("cpu")).train().double()
    expected = gradients(reference, images.double(), factors, Precision(torch.device("cpu"), None))
    figures["relative error"] = relative_error(
        *(torch.cat([g.flatten().cpu() for g in all]) for all in (own, expected))
    )
    errors = {name: relative_error(a, b) for (name, _), a, b in zip(reference.named_parameters(), own, expected)}
    figures["worst parameter"], figures["its error"] = max(errors.items(), key=lambda error: error[1])
    limit = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.005}[amp]
    require(figures["relative error"] < limit, f"gradients differ from those in float64: {figures}")


# ----------------------------------------------------------------------------------------------------------------------
# Training steps outside the command: sizes, compilation, speed
# ----------------------------------------------------------------------------------------------------------------------


def build_steps(setup: Setup, variant: str, *flags: str) -> Steps:
    """Build training steps of a variant with settings of main.py."""
    batch, size = (2, 32) if setup.quick else (128, 224)
    return Steps.build(variant, setup.device, batch, size, *flags)


def check_compiled(setup: Setup, figures: Figures, variant: str) -> None:
    """Compare the compiled network with the eager one, and take compiled training steps."""
    eager, compiled = (build_steps(setup, variant, "--amp", "bfloat16", *flags) for flags in ((), ("--compile",)))
    for steps in (eager, compiled):
        steps.training.model.eval()
    expected, logits = eager.predict(), compiled.predict()
    figures["relative error"] = relative_error(logits, expected)
    del eager
    compiled.training.model.train()
    losses = torch.stack([compiled.train() for _ in range(3)]).tolist()
    figures["losses"] = losses
    require(figures["relative error"] < 0.03, f"compiled and eager outputs differ: {figures}")
    require(all(map(math.isfinite, losses)), f"losses are not finite: {losses}")


def memory_of(steps: Steps, function: Callable[[], object], device: torch.device) -> float | None:
    """Most memory (GiB) in use at once during a call: weights, the optimiser's state, and what the call allocates."""
    peak = peak_memory(function, device)
    return None if peak is None else (bytes_of(steps.training.model, steps.training.optimizer) + peak) / 2**30


def check_speed(setup: Setup, figures: Figures, variant: str, flags: Sequence[str]) -> None:
    """Measure images per second and memory of the forward pass and of the training step."""
    steps = build_steps(setup, variant, *flags)
    images, size = len(steps.images), steps.images.shape[-1]
    model = timm.create_model(variant, img_size=size).eval().to(setup.device)
    multiply_adds = count_multiply_adds(model, torch.zeros(1, 3, size, size, device=setup.device))
    rate = benchmark_machine.matrix_product_rate(steps.precision.dtype or torch.float32, setup.device)
    figures["matrix products, T multiply-adds/s"] = rate / 1e12
    for name, function, passes in (("inference", steps.predict, 1), ("training", steps.train, 3)):
        steps.training.model.train(name == "training")
        figures[f"{name}, first call, s"] = timed(function, setup.device)
        repeat = 1 if setup.quick else 10
        least = 0.0 if setup.quick else 1.0
        seconds = median_time(lambda: [function() for _ in range(repeat)], setup.device, least) / repeat  # noqa: B023
        figures[f"{name}, images/s"] = images / seconds
        figures[f"{name}, share of matrix products"] = passes * images * multiply_adds / seconds / rate
        figures[f"{name}, GiB"] = memory_of(steps, function, setup.device)
    loss = steps.train().item()
    require(math.isfinite(loss), f"the loss is {loss}")


KERNELS = {
    "attention": r"flash|fmha|attention|cudnn.*sdpa",
    "convolution": r"conv|dgrad|wgrad|implicit_gemm|depthwise|nchw|nhwc",
    "matrix product": r"gemm|nvjet|cutlass|cublas|splitK|xmma",
    "LayerNorm": r"layer_norm|LayerNorm|GammaBeta",
    "optimiser and gradient norm": r"multi_tensor|adam|lpnorm",
    "GELU": r"[Gg]elu",
    "softmax": r"[Ss]oft[Mm]ax",
    "copy, concatenation, padding": r"copy|Memcpy|Memset|CatArray|pad|FillFunctor",
    "reduction": r"reduce",
    "compiled by torch.compile": r"triton_",
    "other elementwise": r"elementwise",
}


def kind_of_kernel(name: str) -> str:
    """Kind of work that a GPU kernel does, by its name."""
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name)), "other")


def check_profile(setup: Setup, figures: Figures, variant: str, flags: Sequence[str]) -> None:
    """Record what a training step spends its time in, and how much of the time the GPU works."""
    steps = build_steps(setup, variant, *flags)
    count = 1 if setup.quick else 3
    steps.training.model.train()
    for _ in range(count):
        steps.train()
    seconds = median_time(lambda: [steps.train() for _ in range(count)], setup.device, 0.0)
    operations = profile_call(lambda: [steps.train() for _ in range(count)], setup.device)
    times = {name: operation.seconds for name, operation in operations.items()}
    total = sum(times.values())
    kinds = dict.fromkeys([*KERNELS, "other"], 0.0)  # seconds
    for name, duration in times.items():
        kinds[kind_of_kernel(name)] += duration
    figures["ms/step"] = 1e3 * seconds / count
    figures["share of it in which the device works"] = total / seconds
    for title, durations in (("kinds", kinds), ("kernels", times)):
        most = sorted(durations.items(), key=lambda entry: -entry[1])[:20]
        figures[title] = {name[:160]: duration / total for name, duration in most if duration}


# ----------------------------------------------------------------------------------------------------------------------
# Large batches
# ----------------------------------------------------------------------------------------------------------------------


def check_large_inference(setup: Setup, figures: Figures, amp: str, images: int) -> None:
    """Compare one forward pass on many images with passes on parts of them."""
    precision = Precision(setup.device, AMPS[amp])
    variant, size, part = ("SepViT_Lite", 64, 4) if setup.quick else ("SepViT_Tiny", 224, 256)
    images = 8 if setup.quick else images
    torch.manual_seed(0)
    model = timm.create_model(variant, img_size=size).eval().to(setup.device)
    batch = torch.randn(images, 3, size, size, device=setup.device)
    windows = images * math.prod(sepvit.window_grid((size, size), 0, 7))
    figures["windows in the first block"] = windows
    require(setup.quick or windows > MOST_WINDOWS, f"{windows} windows are no large batch")
    with torch.no_grad(), precision.autocast():
        expected = torch.cat([model(chunk) for chunk in batch.split(part)])
        outputs = model(batch)
    figures["relative error"] = relative_error(outputs, expected)
    limit = {"float32": 1e-3, "bfloat16": 0.02, "float16": 0.005}[amp]
    require(figures["relative error"] < limit, f"one pass and passes on parts differ: {figures}")


def check_large_training(setup: Setup, figures: Figures, amp: str, images: int) -> None:
    """Compare the gradients of one pass on many images with those accumulated over parts of them."""
    precision = Precision(setup.device, AMPS[amp])
    size, part, images = (64, 4, 8) if setup.quick else (224, 220, images)
    torch.manual_seed(0)
    model = timm.create_model("SepViT_Lite", img_size=size).to(setup.device).train()
    batch = torch.randn(images, 3, size, size, device=setup.device)
    # A mean over the images: a sum of this many gradients is beyond float16's range.
    factors = torch.randn(images, 1000, device=setup.device) / images
    found = []
    for chunk in (part, images):
        parts = zip(batch.split(chunk), factors.split(chunk))
        gradients_of_parts = [gradients(model, *both, precision) for both in parts]
        found.append(torch.cat([sum(grads[1:], grads[0]).flatten() for grads in zip(*gradients_of_parts)]))
    figures["relative error"] = relative_error(found[1], found[0])
    limit = {"float32": 1e-3, "bfloat16": 0.03, "float16": 0.01}[amp]
    require(figures["relative error"] < limit, f"gradients of one pass and of passes on parts differ: {figures}")


# ----------------------------------------------------------------------------------------------------------------------
# Other commands
# ----------------------------------------------------------------------------------------------------------------------


def check_printed(
    setup: Setup, figures: Figures, run: Callable[[list[str]], int], arguments: Sequence[str], lines: int = 2
) -> None:
    """Run a command in this process, and record the last lines that it prints."""
    printed = io.StringIO()
    names = dict(digits=setup.digits, device=setup.device.type, folder=setup.folder)
    with contextlib.redirect_stdout(printed):
        status = run([argument.format(**names) for argument in arguments])
    figures["printed"] = [line for line in printed.getvalue().splitlines() if not line.startswith("saved ")][-lines:]
    require(status == 0, f"the command ended with status {status}")


# ----------------------------------------------------------------------------------------------------------------------
# All rows, in order: first what may run side by side, then what runs alone
# ----------------------------------------------------------------------------------------------------------------------


def comparison_rows() -> list[Row]:
    """Rows that compare one pass with a reference. The compiled ones come first: they take longest, and they fill
    torch's cache for the compiled speeds."""
    rows = [
        Row(f"compiled-{variant}", partial(check_compiled, variant=variant), limit=300)
        for variant in reversed(sepvit.VARIANTS)
    ]
    for amp in AMPS:
        rows.append(Row(f"outputs-{amp}", partial(check_outputs, amp=amp), quick=amp == "float32"))
        rows.append(Row(f"gradients-{amp}", partial(check_gradients, amp=amp)))
    rows.append(Row("gradients-compiled", partial(check_gradients, amp="float32", compiled=True)))
    return rows


def large_rows() -> list[Row]:
    """Rows with more windows in a batch than a kernel may have blocks, and with more than 2³¹ values in a tensor."""
    rows = []
    for amp in AMPS:
        inference = partial(check_large_inference, amp=amp, images=1100)
        rows.append(Row(f"large-inference-{amp}", inference, alone=True, quick=amp == "float32"))
        rows.append(Row(f"large-training-{amp}", partial(check_large_training, amp=amp, images=1100), alone=True))
    inference = partial(check_large_inference, amp="bfloat16", images=2200)
    return [*rows, Row("large-inference-2200", inference, alone=True)]


def speed_row(variant: str, *flags: str) -> Row:
    """A row that measures the speed of a variant with settings of main.py."""
    settings = flags if "--amp" in flags else ("--amp", "bfloat16", *flags)
    name = "-".join(["speed", variant, *(flag.removeprefix("--") for flag in flags)])
    check = partial(check_speed, variant=variant, flags=settings)
    return Row(name, check, alone=True, quick=variant == "SepViT_Lite" and not flags)


def profile_row(name: str, *flags: str) -> Row:
    """A row that profiles training steps of SepViT_Tiny with settings of main.py."""
    check = partial(check_profile, variant="SepViT_Tiny", flags=("--amp", "bfloat16", *flags))
    return Row(f"profile-{name}", check, alone=True)


def printing_row(name: str, run: Callable[[list[str]], int], *arguments: str, lines: int = 2) -> Row:
    """A row that runs a command that measures something."""
    check = partial(check_printed, run=run, arguments=(*arguments, "--device", "{device}"), lines=lines)
    return Row(name, check, alone=True)


def speed_rows() -> list[Row]:
    """Rows that measure speed, the more important first."""
    tiny = "SepViT_Tiny"
    throughput = ["--throughput", "--model", tiny, "--data-path", "{digits}", "--batch-size", "128"]
    return [
        *(speed_row(variant) for variant in sepvit.VARIANTS),
        profile_row("eager"),
        *(speed_row(variant, "--compile") for variant in sepvit.VARIANTS),
        profile_row("compile", "--compile"),
        speed_row(tiny, "--channels-last"),
        speed_row(tiny, "--grad-checkpointing"),
        speed_row(tiny, "--amp", "off"),
        speed_row(tiny, "--amp", "float16"),
        printing_row("saving", benchmark_checkpoint.run, "--times", "3"),
        printing_row(
            "benchmark", benchmark.run, "--formats", "bfloat16", "--rounds", "5", "--out", "{folder}", lines=30
        ),
        printing_row("throughput", main.run, *throughput),
    ]
