"""Networks exported to ONNX, and the runtimes that run them on a CPU: ONNX Runtime and OpenVINO.

Both are optional packages.
"""

if not __package__:
    import _repository  # noqa: F401
import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from sepvit_lib.inference.exported import Session, compile_openvino, onnxruntime_session, run_onnxruntime, run_openvino
from sepvit_lib.inference.packages import require
from tools.export_int8 import quantised_by_nncf

RUNTIMES = ("onnxruntime", "openvino")
# ONNX Runtime's kernels for CPUs have no bfloat16. OpenVINO multiplies in bfloat16 where it is told to.
NUMBER_FORMATS = {"onnxruntime": ("float32", "int8"), "openvino": ("float32", "bfloat16", "int8")}
EXPORT = ("onnx", "onnxscript")
PACKAGES = {"onnxruntime": (*EXPORT, "onnxruntime"), "openvino": (*EXPORT, "openvino")}
QUANTIZATION = {"openvino": ("nncf",)}  # in addition, for int8
CALIBRATION_IMAGES = 64


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
        quantization = QUANTIZATION.get(form, ()) if "int8" in formats else ()
        require(f"{flag} {form}", *PACKAGES.get(form, ()), *quantization)


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
    if form == "onnxruntime":
        file = with_int8_weights(path) if number_format == "int8" else path
        return run_onnxruntime(onnxruntime_session(file, threads))
    import openvino

    model = openvino.Core().read_model(str(path))
    if number_format == "int8":
        model = quantised_by_nncf(model, calibration)
    return run_openvino(compile_openvino(model, number_format, threads))


def with_int8_weights(path: Path) -> Path:
    """Quantise the weights of an exported network to int8; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    if not target.exists():
        logging.getLogger().setLevel(logging.ERROR)  # it advises to preprocess
        # Its rule for Attention is for an operator of ONNX Runtime of the same name.
        quantize_dynamic(path, target, weight_type=QuantType.QInt8, op_types_to_quantize=["Conv", "MatMul"])
    return target
