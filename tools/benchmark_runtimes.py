"""Networks exported to ONNX, and the runtimes that run them on a CPU: ONNX Runtime and OpenVINO.

Both are optional packages.
"""

import contextlib
import importlib.util
import io
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
NUMBER_FORMATS = {"onnxruntime": ("float32", "int8"), "openvino": ("float32", "bfloat16", "int8")}
# What each needs, as pip installs it.
EXPORT = {"onnx": "onnx==1.23.2", "onnxscript": "onnxscript==0.7.2"}
PACKAGES = {
    "onnxruntime": {**EXPORT, "onnxruntime": "onnxruntime==1.32.0"},
    "openvino": {**EXPORT, "openvino": "openvino==2026.4.1"},
}
QUANTIZATION = {"openvino": {"nncf": "nncf==3.4.0"}}  # in addition, for int8
CALIBRATION_IMAGES = 64

Session = Callable[[Tensor], list[Tensor]]


def check_packages(forms: Sequence[str], formats: Sequence[str], flag: str) -> None:
    """Refuse runtimes whose packages are not installed.

    Args:
        forms: the runtimes, among other forms.
        formats: number formats.
        flag: the flag that named the forms.

    Raises:
        UserError: a package is missing.
    """
    for form in forms:
        quantization = QUANTIZATION.get(form, {}) if "int8" in formats else {}
        for package, requirement in {**PACKAGES.get(form, {}), **quantization}.items():
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


def open_session(
    form: str, path: Path, number_format: str, threads: int, calibration: Sequence[Tensor] = ()
) -> Session:
    """Load an exported network into a runtime.

    Args:
        form: the runtime, one of `RUNTIMES`.
        path: the exported network, in float32.
        number_format: what to multiply in, one of its `NUMBER_FORMATS`.
        threads: CPU threads.
        calibration: batches of images that tell OpenVINO the range of each activation in int8.

    Returns:
        a function from images to outputs.
    """
    if form == "openvino":
        return _openvino(path, number_format, threads, calibration)
    return _onnxruntime(with_int8_weights(path) if number_format == "int8" else path, threads)


def with_int8_weights(path: Path) -> Path:
    """Quantise the weights of an exported network to int8; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    if not target.exists():
        logging.getLogger().setLevel(logging.ERROR)  # it advises to preprocess
        quantize_dynamic(path, target, weight_type=QuantType.QInt8)
    return target


def calibrated(model: Any, calibration: Sequence[Tensor]) -> Any:
    """Quantise weights and activations of an OpenVINO model to int8, by their range on some images."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    # SmoothQuant, on by default for transformers, ruins the outputs of this network.
    no_smoothing = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
    )
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(
            model,
            nncf.Dataset([images.numpy() for images in calibration]),
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=no_smoothing,
        )


def _onnxruntime(path: Path, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def _openvino(path: Path, number_format: str, threads: int, calibration: Sequence[Tensor]) -> Session:
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if number_format != "int8":  # there, OpenVINO chooses what the rest is computed in
        hints["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[number_format]
    core = openvino.Core()
    model: Any = core.read_model(str(path))
    if number_format == "int8":
        model = calibrated(model, calibration)
    compiled: Any = core.compile_model(model, "CPU", hints)

    def run(images: Tensor) -> list[Tensor]:
        outputs = compiled(images.numpy(), share_inputs=True, share_outputs=True)
        return [torch.from_numpy(outputs[port]) for port in compiled.outputs]

    return run
