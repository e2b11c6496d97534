"""Open classifiers exported by tools/export.py, each in the runtime for its format."""

import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepvit_lib.common.devices import available_cores
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.packages import require

DESCRIPTION = "description.json"  # in PyTorch's archives
METADATA = "sepvit"  # name of the description in the metadata of ONNX, OpenVINO and AOTInductor
NUMBER_FORMAT = "number_format"
MAX_SHAPES = 4  # batch shapes with a cached compiled model


class Kind(Enum):
    """Kind of an exported file. Each value is the name of the runtime."""

    ONNX = "ONNX Runtime"
    OPENVINO = "OpenVINO"
    TORCH_EXPORT = "torch.export"
    AOTINDUCTOR = "AOTInductor"
    TORCHSCRIPT = "TorchScript"
    EXECUTORCH = "ExecuTorch"
    CORE_ML = "Core ML"
    LITERT = "LiteRT"
    NCNN = "ncnn"


SUFFIXES = {
    ".onnx": Kind.ONNX,
    ".xml": Kind.OPENVINO,
    ".pte": Kind.EXECUTORCH,
    ".mlpackage": Kind.CORE_ML,
    ".tflite": Kind.LITERT,
    ".param": Kind.NCNN,
}
PACKAGES = {  # needed besides requirements.txt, and the extra that installs them
    Kind.ONNX: ("onnxruntime", "tools"),
    Kind.OPENVINO: ("openvino", "tools"),
    Kind.EXECUTORCH: ("executorch", "phones"),
    Kind.CORE_ML: ("coremltools", "phones"),
    Kind.LITERT: ("ai_edge_litert", "litert"),
    Kind.NCNN: ("ncnn", "phones"),
}

Session = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Opened:
    """An exported file that has been opened.

    Attributes:
        run: computes logits from the file's input.
        description: a `sepvit_lib.inference.classifier.Description` as JSON, "" if there is none.
        takes_pixels: whether the input is the pixels of one image, H × W × 3, 0 to 255, instead of normalised images.
    """

    run: Callable[[Tensor], Tensor]
    description: str
    takes_pixels: bool = False


def kind_of(path: Path) -> Kind | None:
    """Kind of an exported file; None for anything else, such as a checkpoint."""
    if path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return None
    if any(name.endswith("constants.pkl") for name in names):
        return Kind.TORCHSCRIPT
    if path.suffix == ".pt2":
        return Kind.AOTINDUCTOR if any("aotinductor" in name for name in names) else Kind.TORCH_EXPORT
    return None


def open_file(path: Path, kind: Kind, what: str, device: torch.device) -> Opened:
    """Open an exported file.

    Args:
        path: the file.
        kind: returned by `kind_of`.
        what: flag and path, for messages.
        device: device for torch.export and TorchScript. AOTInductor uses the device for which the file was compiled;
            Core ML chooses a device. The other runtimes use the CPU.

    Raises:
        UserError: the file is missing or damaged, or its runtime is not installed.
    """
    if not (path.is_dir() if kind is Kind.CORE_ML else path.is_file()):
        raise UserError(f"{what}: no such file")
    if kind in PACKAGES:
        package, extra = PACKAGES[kind]
        require(what, package, extra=extra)
    try:
        return OPENERS[kind](path, device)
    except Exception as error:  # each runtime raises its own types
        raise UserError(f"{what}: {kind.value} cannot open it ({' '.join(str(error).split())[:200]})") from None


# ----------------------------------------------------------------------------------------------------------------------
# ONNX Runtime and OpenVINO
# ----------------------------------------------------------------------------------------------------------------------


def onnxruntime_session(model: Path | bytes, threads: int) -> Any:
    """Open an ONNX file, or its content, in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_onnxruntime(session: Any) -> Session:
    """Make a function that computes a session's outputs for a batch."""
    name = session.get_inputs()[0].name
    return lambda batch: [torch.from_numpy(output) for output in session.run(None, {name: batch.numpy()})]


def open_onnx(model: Path | bytes) -> Session:
    """Open an ONNX file, or its content, as a function that computes the outputs for a batch, on all cores."""
    return run_onnxruntime(onnxruntime_session(model, available_cores()))


def compile_openvino(model: Any, number_format: str, threads: int, profile: bool = False) -> Any:
    """Compile an OpenVINO model for the CPU.

    Args:
        model: the model.
        number_format: number format of matrix products and convolutions: 'float32', 'bfloat16', or 'int8' for a
            quantised model. OpenVINO chooses the number formats of the other operations of a quantised model.
        threads: CPU threads.
        profile: whether to record the time of each operator.
    """
    import openvino

    hints: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    hints["PERF_COUNT"] = profile
    if number_format != "int8":
        hints["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[number_format]
    return openvino.Core().compile_model(model, "CPU", hints)


def run_openvino(compiled: Any) -> Session:
    """Make a function that computes a compiled model's outputs for a batch. A call overwrites the previous outputs."""

    def run(batch: Tensor) -> list[Tensor]:
        outputs = compiled(batch.numpy(), share_inputs=True, share_outputs=True)
        return [torch.from_numpy(outputs[port]) for port in compiled.outputs]

    return run


def _open_onnx(path: Path, device: torch.device) -> Opened:
    session = onnxruntime_session(path, available_cores())
    run = run_onnxruntime(session)
    takes_pixels = session.get_inputs()[0].type == "tensor(uint8)"
    description = session.get_modelmeta().custom_metadata_map.get(METADATA, "")
    return Opened(lambda batch: run(batch)[0], description, takes_pixels)


def _open_openvino(path: Path, device: torch.device) -> Opened:
    import openvino

    model: Any = openvino.Core().read_model(str(path))

    def stored(name: str, default: str) -> str:
        return str(model.get_rt_info([METADATA, name]).value) if model.has_rt_info([METADATA, name]) else default

    @lru_cache(MAX_SHAPES)
    def session(shape: torch.Size) -> Session:
        """Compile the model for a fixed shape. In int8, this is up to twice as fast as a model with dynamic shapes."""
        model.reshape(list(shape))
        return run_openvino(compile_openvino(model, stored(NUMBER_FORMAT, "float32"), available_cores()))

    return Opened(lambda batch: session(batch.shape)(batch)[0].clone(), stored("description", ""))


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch
# ----------------------------------------------------------------------------------------------------------------------


def _on(device: torch.device | str, network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function that runs a network in inference mode, on images moved to its device."""
    return torch.inference_mode()(lambda images: network(images.to(device)))


def _open_exported_program(path: Path, device: torch.device) -> Opened:
    texts = {DESCRIPTION: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about read-only buffers, which are never written to
        program = torch.export.load(path, extra_files=texts)
    return Opened(_on(device, program.module().to(device)), texts[DESCRIPTION])


def _open_aotinductor(path: Path, device: torch.device) -> Opened:
    # A module imported below warns if there is no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch._inductor import aoti_load_package

    compiled = aoti_load_package(str(path))
    metadata = compiled.get_metadata()
    return Opened(_on(metadata.get("AOTI_DEVICE_KEY", "cpu"), compiled), metadata.get(METADATA, ""))


def _open_torchscript(path: Path, device: torch.device) -> Opened:
    texts = {DESCRIPTION: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export is recommended instead
        network = torch.jit.load(str(path), map_location=device, _extra_files=texts)
    description = texts[DESCRIPTION]
    return Opened(_on(device, network), description.decode() if isinstance(description, bytes) else description)


# ----------------------------------------------------------------------------------------------------------------------
# Phones
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def silenced() -> Iterator[None]:
    """Hide what native code and other processes write to standard output and error, directly or through Python."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            for stream, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, stream)
                os.close(descriptor)


def _open_executorch(path: Path, device: torch.device) -> Opened:
    with warnings.catch_warnings(), silenced():
        warnings.simplefilter("ignore")  # that the interface may change
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(path)
        network = program.load_method("forward")
        has_description = METADATA in program.method_names
        description = program.load_method(METADATA).execute([])[0] if has_description else ""
    return Opened(lambda images: network.execute([images])[0], description)


def _open_core_ml(path: Path, device: torch.device) -> Opened:
    import coremltools

    model = coremltools.models.MLModel(str(path))
    description = model.user_defined_metadata.get(METADATA, "")

    def run(images: Tensor) -> Tensor:
        if sys.platform != "darwin":
            raise UserError(f"{path}: only macOS runs Core ML files; choose the checkpoint or another format")
        return torch.from_numpy(model.predict({"images": images.numpy()})["logits"])

    return Opened(run, description)


def _open_litert(path: Path, device: torch.device) -> Opened:
    from ai_edge_litert.interpreter import Interpreter

    with zipfile.ZipFile(path) as archive:
        description = archive.read(DESCRIPTION).decode()
    with silenced():
        network = Interpreter(str(path), num_threads=available_cores()).get_signature_runner()
    (images,), (logits,) = network.get_input_details(), network.get_output_details()
    return Opened(lambda batch: torch.from_numpy(network(**{images: batch.numpy()})[logits]), description)


def _open_ncnn(path: Path, device: torch.device) -> Opened:
    import ncnn

    network = ncnn.Net()
    network.opt.num_threads = available_cores()
    network.opt.use_fp16_packed = network.opt.use_fp16_storage = network.opt.use_fp16_arithmetic = False
    if network.load_param(str(path)) or network.load_model(str(path.with_suffix(".bin"))):
        raise ValueError("the .param or .bin file is missing or damaged")
    description = path.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")[2]  # ncnn reads only the lines before

    def run(images: Tensor) -> Tensor:
        extractor = network.create_extractor()
        extractor.input("in0", ncnn.Mat(images[0].numpy()).clone())
        return torch.from_numpy(np.array(extractor.extract("out0")[1]))[None]

    return Opened(run, description)


OPENERS = {
    Kind.ONNX: _open_onnx,
    Kind.OPENVINO: _open_openvino,
    Kind.TORCH_EXPORT: _open_exported_program,
    Kind.AOTINDUCTOR: _open_aotinductor,
    Kind.TORCHSCRIPT: _open_torchscript,
    Kind.EXECUTORCH: _open_executorch,
    Kind.CORE_ML: _open_core_ml,
    Kind.LITERT: _open_litert,
    Kind.NCNN: _open_ncnn,
}
