"""The networks that the benchmarks measure: SepViT in its forms, its peers, and training steps of all of them."""

if not __package__:
    import _repository  # noqa: F401
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg_value, register_model
from torch import Tensor, nn

import main
import sepvit
from sepvit_lib.training.checkpoints import read_checkpoint
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.measure import bytes_of
from sepvit_lib.training.networks import place
from sepvit_lib.training.recipes import parse_with_recipe
from sepvit_lib.training.state import Precision, Training
from tools import benchmark_runtimes
from tools.benchmark_rounds import reason
from tools.export_formats import export_onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from port import Port

# Models of the same class: about as many multiply-adds and parameters as the variant.
PEERS: dict[str, tuple[str, ...]] = {
    "SepViT_Lite": ("pvt_v2_b0",),
    "SepViT_Tiny": ("swin_tiny_patch4_window7_224", "twins_svt_small", "pvt_v2_b2", "nextvit_small", "convnext_tiny"),
    "SepViT_Small": ("swin_small_patch4_window7_224", "twins_svt_base", "pvt_v2_b3", "nextvit_base", "convnext_small"),
    "SepViT_Base": ("swin_base_patch4_window7_224", "twins_svt_large", "pvt_v2_b5", "nextvit_large", "convnext_base"),
}

# Top-1 (%) on ImageNet-1K at 224 × 224, trained on ImageNet-1K alone, as the authors published it.
TOP1: dict[str, float] = {
    # https://arxiv.org/abs/2203.15380; Lite from a summary of the paper
    "SepViT_Lite": 72.3,
    "SepViT_Tiny": 82.7,
    "SepViT_Small": 83.6,
    "SepViT_Base": 84.2,
    # https://arxiv.org/abs/2103.14030
    "swin_tiny_patch4_window7_224": 81.3,
    "swin_small_patch4_window7_224": 83.0,
    "swin_base_patch4_window7_224": 83.5,
    # https://arxiv.org/abs/2104.13840
    "twins_svt_small": 81.7,
    "twins_svt_base": 83.2,
    "twins_svt_large": 83.7,
    # https://github.com/whai362/PVT
    "pvt_v2_b0": 70.5,
    "pvt_v2_b2": 82.0,
    "pvt_v2_b3": 83.1,
    "pvt_v2_b5": 83.8,
    # https://arxiv.org/abs/2207.05501
    "nextvit_small": 82.5,
    "nextvit_base": 83.2,
    "nextvit_large": 83.6,
    # https://arxiv.org/abs/2201.03545
    "convnext_tiny": 82.1,
    "convnext_small": 83.1,
    "convnext_base": 83.8,
}

# Options of torch.compile by form. `frozen` folds the weights into the program; `graphs` replays CUDA graphs.
COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {},
    "frozen": {"freezing": True},
    "graphs": {"triton.cudagraphs": True},
}
FORMS = ("eager", "port", "before", *COMPILED, *benchmark_runtimes.RUNTIMES)
OF_SEPVIT = ("port", "before")  # forms that peers do not have
MEASURES = ("latency", "inference", "training")

# Number formats: main.py's --amp in training, and the element type of matrix products. `bfloat16` and `float16` are
# mixed precision (autocast); `bfloat16-whole` converts the whole network.
AMPS = {"float32": "off", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bfloat16-whole": torch.bfloat16,
    "float16": torch.float16,
    "int8": None,  # no rate of matrix products to compare with
}

CLASSES = 1000
CLIPPING = 5.0  # largest norm of the gradients, main.py's default


@dataclass(frozen=True)
class Subject:
    """What a row of a table measures.

    Attributes:
        model: a variant of SepViT or a model of timm's.
        form: how it runs, one of `FORMS`.
        number_format: number format, one of `DTYPES`.
    """

    model: str
    form: str
    number_format: str

    def __str__(self) -> str:
        return f"{self.model}, {self.form}, {self.number_format}"


@dataclass(frozen=True)
class Setting:
    """What the subjects of a table have in common.

    Attributes:
        measure: one of `MEASURES`; latency is inference with a single image.
        device: the device.
        batch_size: images per call.
        size: image size (H, W).
        is_dense: the dense prediction form.
        threads: CPU threads.
        memory_format: memory format of images and weights.
        checkpoint: weights of the variants of SepViT; "" for random ones.
        before: another revision's sepvit.py, for the form `before`; "" without it.
        classes: classes of the classifier.
        calibration: normalised images to quantise networks with, N × 3 × H × W; None for random ones.
    """

    measure: str
    device: torch.device
    batch_size: int
    size: tuple[int, int]
    is_dense: bool = False
    threads: int = 1
    memory_format: torch.memory_format = torch.contiguous_format
    checkpoint: str = ""
    before: str = ""
    classes: int = CLASSES
    calibration: Tensor | None = field(default=None, compare=False)

    @property
    def is_training(self) -> bool:
        """Whether training steps are measured."""
        return self.measure == "training"

    def precision(self, number_format: str) -> Precision:
        """Device, number format and memory format of a network."""
        mixed = DTYPES[number_format] if number_format in ("bfloat16", "float16") else None
        return Precision(self.device, mixed, self.memory_format)

    def images(self) -> Tensor:
        """Random images on the CPU."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch_size, 3, *self.size, generator=generator)

    def calibration_batches(self) -> list[Tensor]:
        """Images to quantise a network with, in batches of its size, on the CPU. The first ones fill the last batch."""
        images = self.calibration
        if images is None:
            generator = torch.Generator().manual_seed(1)
            images = torch.randn(benchmark_runtimes.CALIBRATION_IMAGES, 3, *self.size, generator=generator)
        count = math.ceil(len(images) / self.batch_size) * self.batch_size
        return list(images[torch.arange(count) % len(images)].split(self.batch_size))


def not_offered(subject: Subject, setting: Setting) -> str:
    """Why a form does not exist in a number format or for a measure; "" if it does."""
    form, number_format = subject.form, subject.number_format
    if form in OF_SEPVIT and subject.model not in sepvit.VARIANTS:
        return "a form of SepViT alone"
    if form in benchmark_runtimes.RUNTIMES:
        if setting.is_training:
            return "runtimes do not train"
        if setting.device.type != "cpu":
            return "runtimes are measured on the CPU"
        if number_format not in benchmark_runtimes.NUMBER_FORMATS[form]:
            return f"{form} is measured in {' and '.join(benchmark_runtimes.NUMBER_FORMATS[form])}"
    elif number_format == "int8":
        return "only runtimes have int8"
    elif setting.is_training and number_format not in AMPS:
        return "training keeps its weights in float32"
    if form == "frozen" and setting.is_training:
        return "frozen weights do not train"
    if form == "graphs" and setting.device.type != "cuda":
        return "CUDA graphs need CUDA"
    return ""


def check_models(names: Sequence[str], what: str) -> None:
    """Refuse names of models that timm does not have.

    Raises:
        UserError: one is unknown.
    """
    for name in names:
        if not timm.is_model(name):
            raise UserError(f"{what} {name}: timm has no such model; timm.list_models() lists all")


def load_before(file: str) -> ModuleType:
    """Load another revision's sepvit.py. The models registered with timm stay those of this one.

    Raises:
        UserError: the file cannot be loaded.
    """
    spec = importlib.util.spec_from_file_location("sepvit_before", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise UserError(f"--before {file}: no Python file; name a copy of sepvit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # timm's registry looks there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about models that are registered again
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"--before {file}: cannot be loaded ({reason(error)})") from None
        for variant in sepvit.VARIANTS:
            register_model(getattr(sepvit, variant))
    return module


def create_network(model: str, setting: Setting, code: ModuleType = sepvit, **kwargs: Any) -> Any:
    """Build a network on the CPU, with the same weights each time.

    Args:
        model: a variant of SepViT or a model of timm's.
        setting: form, image size, and checkpoint.
        code: the module with SepViT.
        **kwargs: stochastic depth and dropout.
    """
    torch.manual_seed(0)
    network: Any
    if setting.is_dense:
        network = code.create_dense(model, **kwargs)
    elif code is not sepvit:
        network = code.SepViT(setting.size, setting.classes, **code.VARIANTS[model], **kwargs)
    else:
        if get_pretrained_cfg_value(model, "fixed_input_size"):
            kwargs["img_size"] = setting.size
        network = timm.create_model(model, num_classes=setting.classes, **kwargs)
    if code is not sepvit:
        network.load_state_dict(create_network(model, setting).state_dict())
    elif model in sepvit.VARIANTS and setting.checkpoint:
        what = f"--checkpoint {setting.checkpoint}"
        main.load_from(network, read_checkpoint(setting.checkpoint, what), what)
    else:
        for name, parameter in network.named_parameters():
            if name.endswith("win_tokens"):  # zeros would give all windows the same attention
                nn.init.normal_(parameter, std=0.5)
    return network


@dataclass
class Ready:
    """A subject that can be measured.

    Attributes:
        call: what is timed: a forward pass, or a training step.
        outputs: network outputs for images on the CPU, in evaluation mode.
        held: bytes of weights and of the optimiser's state; None if unknown.
        is_runtime: whether a runtime calls it, whose memory PyTorch does not know, and which keeps what the first call
            has allocated.
    """

    call: Callable[[], object]
    outputs: Callable[[Tensor], Tensor]
    held: Callable[[], int | None]
    is_runtime: bool = False


def code_of(subject: Subject, setting: Setting) -> ModuleType:
    """The module with a subject's SepViT."""
    return load_before(setting.before) if subject.form == "before" else sepvit


def build(subject: Subject, setting: Setting, folder: Path) -> Ready:
    """Build a subject.

    Args:
        subject: the subject.
        setting: what it is measured on.
        folder: folder for exported networks.
    """
    if subject.form in benchmark_runtimes.RUNTIMES:
        return _exported(subject, setting, folder)
    return _trained(subject, setting) if setting.is_training else _inferred(subject, setting)


def flattened(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Outputs of a network, or of its dense form, as one float32 tensor on the CPU."""
    parts = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.cat([part.detach().float().cpu().flatten(1) for part in parts], dim=1)


def _inferred(subject: Subject, setting: Setting) -> Ready:
    """A network in evaluation mode, and its forward pass."""
    network = create_network(subject.model, setting, code_of(subject, setting)).eval()
    if subject.number_format == "bfloat16-whole":
        network.bfloat16()
    precision = setting.precision(subject.number_format)
    place(network, precision.device)
    if subject.form == "port":
        network = Port(network)
    dtype = next(network.parameters()).dtype
    if subject.form in COMPILED:
        network.compile(dynamic=False, options=COMPILED[subject.form])
    images = precision.images(setting.images()).to(dtype)

    @torch.inference_mode()
    def predict(images: Tensor) -> Any:
        with precision.autocast():
            return network(images)

    return Ready(
        lambda: predict(images),
        lambda images: flattened(predict(precision.images(images).to(dtype))),
        lambda: bytes_of(network),
    )


def _exported(subject: Subject, setting: Setting, folder: Path) -> Ready:
    """A network exported to ONNX, in a runtime."""
    images = setting.images()
    path = folder / f"{subject.model}-{'x'.join(map(str, images.shape))}.onnx"
    if not path.exists():
        export_onnx(create_network(subject.model, setting).eval(), images, path)
    calibration = setting.calibration_batches() if subject.number_format == "int8" else []
    session = benchmark_runtimes.open_session(subject.form, path, subject.number_format, setting.threads, calibration)
    return Ready(
        lambda: session(images),
        lambda images: flattened(session(images)),
        lambda: benchmark_runtimes.size_of(path),
        is_runtime=True,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Training steps
# ----------------------------------------------------------------------------------------------------------------------


def feature_loss(maps: Sequence[Tensor], targets: Tensor) -> Tensor:
    """A loss for the dense form, in place of a segmentation or detection head: the mean square of each map."""
    return torch.stack([y.float().square().mean() for y in maps]).sum()


def main_settings(model: str, device: torch.device, batch_size: int, *flags: str) -> Any:
    """Settings of main.py for a model, as it parses them."""
    arguments = ["--model", model, "--batch-size", str(batch_size), "--device", str(device), *flags]
    return parse_with_recipe(main.build_parser(), arguments)


@dataclass
class Steps:
    """Training steps and forward passes on one random batch, with the optimiser that main.py builds.

    Attributes:
        training: the run's state.
        precision: device and number format.
        images: the batch.
        targets: its soft targets.
        loss: loss of outputs and targets.
    """

    training: Training
    precision: Precision
    images: Tensor
    targets: Tensor
    loss: Callable[[Any, Tensor], Tensor] = field(default_factory=SoftTargetCrossEntropy)

    @classmethod
    def build(cls, model: str, device: torch.device, batch_size: int, size: int, *flags: str) -> "Steps":
        """Build everything as main.py does, with settings of main.py."""
        args = main_settings(model, device, batch_size, "--input-size", str(size), *flags)
        torch.manual_seed(0)
        precision = main.build_precision(args, device)
        network = main.build_model(args, CLASSES, precision)
        return cls.around(network, args, precision, torch.randn(batch_size, 3, size, size))

    @classmethod
    def around(cls, network: Any, args: Any, precision: Precision, images: Tensor, classes: int = CLASSES) -> "Steps":
        """Build the optimiser and what else a step needs around a network on its device."""
        torch.backends.cudnn.benchmark = True  # as main.py
        training = main.build_training(args, network, precision, 1)
        targets = torch.rand(len(images), classes, device=precision.device).softmax(dim=1)
        return cls(training, precision, precision.images(images), targets)

    def train(self) -> Tensor:
        """Take one training step. Returns its loss."""
        with self.precision.autocast():
            loss = self.loss(self.training.wrapped(self.images), self.targets)
        self.training.backward(loss, 1)
        self.training.step(CLIPPING, [])
        return loss.detach()

    @torch.no_grad()
    def predict(self) -> Tensor:
        """Run one forward pass. Returns the logits."""
        with self.precision.autocast():
            return self.training.model(self.images)


def _trained(subject: Subject, setting: Setting) -> Ready:
    """A network in training mode, and its training step. Its outputs are those of evaluation mode, not compiled."""
    flags = ["--channels-last"] if setting.memory_format == torch.channels_last else []
    amp = AMPS[subject.number_format]
    args = main_settings(subject.model, setting.device, setting.batch_size, "--amp", amp, *flags)
    precision = main.build_precision(args, setting.device)
    network = create_network(subject.model, setting, code_of(subject, setting), drop_path_rate=args.drop_path)
    place(network, precision.device)
    if subject.form == "port":
        network = Port(network)
    steps = Steps.around(network, args, precision, setting.images(), setting.classes)
    if setting.is_dense:
        steps.loss = feature_loss

    @torch.no_grad()
    def outputs(images: Tensor) -> Tensor:
        network.eval()
        with precision.autocast():
            result = flattened(network(precision.images(images)))
        network.train()
        if subject.form in COMPILED:  # from now on
            network.compile(dynamic=False, options=COMPILED[subject.form])
        return result

    network.train()
    return Ready(steps.train, outputs, lambda: bytes_of(network, steps.training.optimizer))
