"""Networks exported to ONNX, and the runtimes that run them on a CPU: ONNX Runtime and OpenVINO.

Both are optional packages.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:
    import _repository  # noqa: F401
from training.errors import UserError

RUNTIMES = ("onnxruntime", "openvino")
# ONNX Runtime's kernels for CPUs have no bfloat16. OpenVINO multiplies in bfloat16 where it is told to.
NUMBER_FORMATS = {"onnxruntime": ("float32", "int8"), "openvino": ("float32", "bfloat16")}
# What each needs, as pip installs it.
EXPORT = {"onnx": "onnx==1.23.2", "onnxscript": "onnxscript==0.7.2"}
PACKAGES = {
    "onnxruntime": {**EXPORT, "onnxruntime": "onnxruntime==1.32.0"},
    "openvino": {**EXPORT, "openvino": "openvino==2026.4.1"},
}

Session = Callable[[Tensor], list[Tensor]]


def check_packages(forms: Sequence[str], flag: str) -> None:
    """Refuse runtimes whose packages are not installed.

    Raises:
        UserError: a package is missing.
    """
    for form in forms:
        for package, requirement in PACKAGES.get(form, {}).items():
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{flag} {form}: needs the package {package}: pip install {requirement}")


def export(network: nn.Module, images: Tensor, path: Path) -> None:
    """Export a network in evaluation mode to ONNX, for images of this shape."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's own use of deprecated functions
        torch.onnx.export(
            network, (images,), str(path), input_names=["images"], dynamo=True, external_data=False, verbose=False
        )


def size_of(path: Path) -> int:
    """Bytes of an exported network."""
    return path.stat().st_size


def open_session(form: str, path: Path, number_format: str, threads: int) -> Session:
    """Load an exported network into a runtime.

    Args:
        form: the runtime, one of `RUNTIMES`.
        path: the exported network, in float32.
        number_format: what to multiply in, one of its `NUMBER_FORMATS`.
        threads: CPU threads.

    Returns:
        a function from images to outputs.
    """
    if form == "openvino":
        return _openvino(path, number_format, threads)
    return _onnxruntime(quantized(path) if number_format == "int8" else path, threads)


def quantized(path: Path) -> Path:
    """Quantise the weights of an exported network to int8; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    if not target.exists():
        logging.getLogger().setLevel(logging.ERROR)  # it advises to preprocess
        quantize_dynamic(path, target, weight_type=QuantType.QInt8)
    return target


def _onnxruntime(path: Path, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def _openvino(path: Path, number_format: str, threads: int) -> Session:
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
             "INFERENCE_PRECISION_HINT": "bf16" if number_format == "bfloat16" else "f32"}  # fmt: skip
    core = openvino.Core()
    compiled: Any = core.compile_model(core.read_model(str(path)), "CPU", hints)

    def run(images: Tensor) -> list[Tensor]:
        outputs = compiled(images.numpy(), share_inputs=True, share_outputs=True)
        return [torch.from_numpy(outputs[port]) for port in compiled.outputs]

    return run
