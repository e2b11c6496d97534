"""Subjects of the benchmark: the forms of SepViT, its peers, and the forward passes and training steps of both."""

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from benchmarks.port import Port
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.packages import require
from sepvit_lib.count import bytes_of
from sepvit_lib.inference.exported import compile_openvino, onnxruntime_session, run_onnxruntime, run_openvino
from sepvit_lib.networks import to_device
from sepvit_lib.rounds import reason
from sepvit_lib.run.state import Precision
from tools.exporting.int8 import quantised_by_nncf
from tools.exporting.writers import export_onnx

# Peers of each variant, by its name. They have about as many multiply-adds and parameters as the variant.
PEERS: dict[str, tuple[str, ...]] = {
    "SepViT_Lite": ("pvt_v2_b0",),
    "SepViT_Tiny": ("swin_tiny_patch4_window7_224", "twins_svt_small", "pvt_v2_b2", "nextvit_small", "convnext_tiny"),
    "SepViT_Small": ("swin_small_patch4_window7_224", "twins_svt_base", "pvt_v2_b3", "nextvit_base", "convnext_small"),
    "SepViT_Base": ("swin_base_patch4_window7_224", "twins_svt_large", "pvt_v2_b5", "nextvit_large", "convnext_base"),
}

# Top-1 (%) on ImageNet-1K at 224 × 224, trained on ImageNet-1K alone, as the authors published it, by family.
PUBLISHED: tuple[dict[str, float], ...] = (
    # https://arxiv.org/abs/2203.15380; Lite from a third-party summary
    {"SepViT_Lite": 72.3, "SepViT_Tiny": 82.7, "SepViT_Small": 83.6, "SepViT_Base": 84.2},
    # https://arxiv.org/abs/2103.14030
    {"swin_tiny_patch4_window7_224": 81.3, "swin_small_patch4_window7_224": 83.0, "swin_base_patch4_window7_224": 83.5},
    # https://arxiv.org/abs/2104.13840
    {"twins_svt_small": 81.7, "twins_svt_base": 83.2, "twins_svt_large": 83.7},
    # https://github.com/whai362/PVT
    {"pvt_v2_b0": 70.5, "pvt_v2_b2": 82.0, "pvt_v2_b3": 83.1, "pvt_v2_b5": 83.8},
    # https://arxiv.org/abs/2207.05501
    {"nextvit_small": 82.5, "nextvit_base": 83.2, "nextvit_large": 83.6},
    # https://arxiv.org/abs/2201.03545
    {"convnext_tiny": 82.1, "convnext_small": 83.1, "convnext_base": 83.8},
)
TOP1 = {model: top1 for family in PUBLISHED for model, top1 in family.items()}

MEASURES = ("latency", "inference", "training")
FORMS = ("eager", "port", "compiled", "onnxruntime", "openvino")
OF_SEPVIT = ("port", "before")  # forms that peers do not have
# Number formats and required packages of the forms that use a runtime. ONNX Runtime has no bfloat16 on CPUs.
RUNTIMES = {"onnxruntime": ("float32", "int8"), "openvino": ("float32", "bfloat16", "int8")}
PACKAGES = {name: ("onnx", "onnxscript", name) for name in RUNTIMES}
# By number format: the value of main.py's --amp, for formats in which training is measured; and the dtype of the large
# matrix product to compare with, None for int8. `bfloat16` and `float16` are mixed precision (autocast);
# `bfloat16-whole` converts the network.
AMPS = {"float32": "off", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bfloat16-whole": torch.bfloat16,
    "float16": torch.float16,
    "int8": None,
}

CLASSES = 1000
CLIPPING = 5.0  # maximum norm of the gradients, main.py's default
CALIBRATION_BATCHES = 8  # of random images, to quantise a network with


@dataclass(frozen=True)
class Subject:
    """The model, form and number format that a table row measures.

    Attributes:
        model: a variant of SepViT, or a timm model.
        form: how the model runs, one of `FORMS`; or for a different revision of sepvit.py, 'before' (in eager mode) or
            a runtime's name with '-before'.
        number_format: number format, one of `DTYPES`.
    """

    model: str
    form: str
    number_format: str

    @property
    def is_before(self) -> bool:
        """Whether the code is that of the different revision."""
        return self.form.endswith("before")

    @property
    def runtime(self) -> str:
        """One of `RUNTIMES`, for a form that uses one."""
        return self.form.removesuffix("-before")

    def __str__(self) -> str:
        return f"{self.model}, {self.form}, {self.number_format}"


@dataclass(frozen=True)
class Setting:
    """The setting that the subjects of a table share.

    Attributes:
        measure: one of `MEASURES`; latency is inference with a single image.
        device: the device.
        batch_size: images per call.
        size: image size (H, W).
        is_dense: whether SepViT is in its dense prediction form.
        threads: CPU threads.
        before: a different revision of sepvit.py, for the form 'before'; "" without it.
    """

    measure: str
    device: torch.device
    batch_size: int
    size: tuple[int, int]
    is_dense: bool = False
    threads: int = 1
    before: str = ""

    @property
    def is_training(self) -> bool:
        """Whether training steps are measured."""
        return self.measure == "training"

    def images(self, seed: int = 0) -> Tensor:
        """Random images on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.batch_size, 3, *self.size, generator=generator)


def not_offered(subject: Subject, setting: Setting) -> str:
    """Why a form is not available in a number format or for a measure; "" if it is."""
    form, number_format = subject.runtime, subject.number_format
    if form in OF_SEPVIT and subject.model not in sepvit.VARIANTS:
        return "only SepViT has this form"
    if form in RUNTIMES:
        if setting.is_training:
            return "runtimes do not train"
        if setting.device.type != "cpu":
            return "runtimes are measured on the CPU"
        return "" if number_format in RUNTIMES[form] else f"{form} is measured in {' and '.join(RUNTIMES[form])}"
    if number_format == "int8":
        return "only runtimes have int8"
    return "training keeps its weights in float32" if setting.is_training and number_format not in AMPS else ""


def check_packages(forms: Sequence[str], formats: Sequence[str], what: str = "") -> None:
    """Refuse runtimes whose packages are not installed. `what` needs them; by default, the flag of the form.

    Raises:
        UserError: a package is missing.
    """
    for form in forms:
        quantization = ("nncf",) if form == "openvino" and "int8" in formats else ()
        require(what or f"--forms {form}", *PACKAGES.get(form, ()), *quantization)


def load_before(file: str) -> ModuleType:
    """Load a different revision of sepvit.py. timm's registry keeps the models of this revision.

    Raises:
        UserError: the file cannot be loaded.
    """
    spec = importlib.util.spec_from_file_location("sepvit_before", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise UserError(f"--before {file}: not a Python file; pass a copy of sepvit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where timm's registry looks it up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm warns of models that are registered again
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"--before {file}: cannot be loaded ({reason(error)})") from None
        for variant in sepvit.VARIANTS:
            register_model(getattr(sepvit, variant))
    return module


def create_network(subject: Subject, setting: Setting, **kwargs: Any) -> Any:
    """Build a subject's network on the CPU, always with the same weights; 'before' uses the code of the other revision.

    Args:
        subject: the subject.
        setting: dense form or not, image size, and the file of the other revision.
        **kwargs: further arguments of the network, such as `drop_path_rate`.
    """
    code: Any = load_before(setting.before) if subject.is_before else sepvit
    torch.manual_seed(0)
    network: Any
    if setting.is_dense:
        network = code.create_dense(subject.model, **kwargs)
    elif subject.is_before:
        network = code.SepViT(setting.size, CLASSES, **code.VARIANTS[subject.model], **kwargs)
    else:
        if get_pretrained_cfg_value(subject.model, "fixed_input_size"):
            kwargs["img_size"] = setting.size
        network = timm.create_model(subject.model, num_classes=CLASSES, **kwargs)
    if subject.is_before:
        network.load_state_dict(create_network(Subject(subject.model, "eager", "float32"), setting).state_dict())
    for name, parameter in network.named_parameters():
        if name.endswith("win_tokens") and not subject.is_before:
            nn.init.normal_(parameter, std=0.5)  # a token of zeros would attend to all pixels equally
    return network


@dataclass
class Ready:
    """A subject that is built and can be measured.

    Attributes:
        call: the timed call: a forward pass, or a training step.
        outputs: computes the network's outputs, in evaluation mode, from images on the CPU.
        held: returns the bytes of weights and optimiser state; None in a runtime, whose memory PyTorch cannot measure.
    """

    call: Callable[[], object]
    outputs: Callable[[Tensor], Tensor]
    held: Callable[[], int | None]


def build(subject: Subject, setting: Setting, folder: Path) -> Ready:
    """Build a subject.

    Args:
        subject: the subject.
        setting: how it is measured.
        folder: folder for exported networks.
    """
    if subject.runtime in RUNTIMES:
        return _exported(subject, setting, folder)
    return _trained(subject, setting) if setting.is_training else _inferred(subject, setting)


def flattened(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Outputs of a network, or of its dense form, as one float32 tensor on the CPU."""
    parts = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.cat([part.detach().float().cpu().flatten(1) for part in parts], dim=1)


def _inferred(subject: Subject, setting: Setting) -> Ready:
    """Build a network in evaluation mode, and its forward pass."""
    network = create_network(subject, setting).eval()
    if subject.number_format == "bfloat16-whole":
        network.bfloat16()
    precision = Precision.of(setting.device, AMPS.get(subject.number_format, "off"))
    to_device(network, setting.device)
    if subject.form == "port":
        network = Port(network)
    dtype = next(network.parameters()).dtype
    if subject.form == "compiled":
        network.compile(dynamic=False)
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


def feature_loss(maps: Sequence[Tensor], targets: Tensor) -> Tensor:
    """A loss for the dense form, in place of a segmentation or detection head: the sum of the maps' mean squares."""
    return torch.stack([y.float().square().mean() for y in maps]).sum()


def _trained(subject: Subject, setting: Setting) -> Ready:
    """Build a network and the training step of main.py. Outputs are computed before the network is compiled."""
    arguments = f"--model {subject.model} --batch-size {setting.batch_size} --amp {AMPS[subject.number_format]}"
    args = main.build_parser().parse_args(arguments.split())
    precision = main.build_precision(args, setting.device)
    network = create_network(subject, setting, drop_path_rate=args.drop_path)
    to_device(network, setting.device)
    if subject.form == "port":
        network = Port(network)
    training = main.build_training(args, network, precision, 1)
    images = precision.images(setting.images())
    targets = torch.rand(len(images), CLASSES, device=setting.device).softmax(dim=1)
    criterion: Callable[[Any, Tensor], Tensor] = feature_loss if setting.is_dense else SoftTargetCrossEntropy()

    def step() -> Tensor:
        with precision.autocast():
            loss = criterion(network(images), targets)
        training.backward(loss, 1)
        training.step(CLIPPING, [])
        return loss.detach()

    @torch.no_grad()
    def outputs(images: Tensor) -> Tensor:
        network.eval()
        with precision.autocast():
            result = flattened(network(precision.images(images)))
        network.train()
        if subject.form == "compiled":  # for the training steps, which follow
            network.compile(dynamic=False)
        return result

    network.train()
    return Ready(step, outputs, lambda: bytes_of(network, training.optimizer))


def _exported(subject: Subject, setting: Setting, folder: Path) -> Ready:
    """Export a network to ONNX, and load it in a runtime."""
    images, path = setting.images(), export(subject, setting, folder)
    if subject.runtime == "onnxruntime":
        path = _with_int8_weights(path) if subject.number_format == "int8" else path
        session = run_onnxruntime(onnxruntime_session(path, setting.threads))
    else:
        model = openvino_model(path, subject, setting)
        session = run_openvino(compile_openvino(model, subject.number_format, setting.threads))
    return Ready(lambda: session(images), lambda images: flattened(session(images)), lambda: None)


def export(subject: Subject, setting: Setting, folder: Path) -> Path:
    """Export a subject's network to ONNX, unless its file exists. Returns the file."""
    images = setting.images()
    path = folder / f"{subject.model}-{subject.is_before}-{'x'.join(map(str, images.shape))}.onnx"
    if not path.exists():
        code: Any = load_before(setting.before) if subject.is_before else sepvit
        form = getattr(code, "exportable", lambda network: network)  # earlier revisions do not have it
        export_onnx(form(create_network(subject, setting).eval()), images, path)
    return path


def openvino_model(path: Path, subject: Subject, setting: Setting) -> Any:
    """Read an ONNX file as OpenVINO's model. In int8, it is quantised."""
    import openvino

    model = openvino.Core().read_model(str(path))
    if subject.number_format == "int8":
        model = quantised_by_nncf(model, [setting.images(seed) for seed in range(1, CALIBRATION_BATCHES + 1)])
    return model


def _with_int8_weights(path: Path) -> Path:
    """Quantise the weights of an exported network to int8; activations are quantised dynamically."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime logs advice to preprocess the model
    # Attention is not listed: ONNX Runtime's rule is for its own operator of that name.
    quantize_dynamic(path, target, weight_type=QuantType.QInt8, op_types_to_quantize=["Conv", "MatMul"])
    return target
