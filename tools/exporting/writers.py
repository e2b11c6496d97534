"""The formats of export.py. For each format, one function writes a classifier to a file or folder."""

import copy
import io
import json
import logging
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

# isort: split
# Private in timm, and without a public counterpart. Tested with timm 1.0.31.
from timm.models._hub import generate_readme

from sepvit import exportable
from sepvit_lib.inference.classifier import CONFIG, Classifier, Description
from sepvit_lib.inference.exported import DESCRIPTION, METADATA, NUMBER_FORMAT, open_onnx
from sepvit_lib.pipeline.preprocessing import Preprocessing

OPSET = 20  # of ONNX; the first with GELU
OPSETS = range(18, 24)  # those that torch.onnx.export writes
MAX_DIFFERENCE = 1e-3  # of the logits, in float32
MAX_PIXEL_DIFFERENCE = 1.01  # on a scale of 255: one level, since sums near a half may be rounded differently
CITATION = """@article{li2022sepvit, title={SepViT: Separable Vision Transformer}, year={2022},
  author={Li, Wei and Wang, Xing and Xia, Xin and Wu, Jie and Li, Jiashi and Xiao, Xuefeng and Zheng, Min and
  Wen, Shiping}, journal={arXiv preprint arXiv:2203.15380}}"""
EXAMPLES = 2  # images in the traced batch: the exporter would treat a batch of one as static


@dataclass
class Job:
    """A classifier to export.

    Attributes:
        classifier: the classifier.
        folder: folder for temporary files.
        calibration: batches that determine the range of each activation for int8.
        opset: version of ONNX's operators.
        score: returns the accuracy (0 to 1) of a function from inputs to logits; None without labelled images.
        samples: some images, RGB, for checking the preprocessing.
        batch_size: batch size of the files; None for any.
        notes: remarks on the files, for the report.
    """

    classifier: Classifier
    folder: Path
    calibration: Sequence[Tensor] = ()
    opset: int = OPSET
    score: Callable[[Callable[[Tensor], Tensor]], float] | None = None
    samples: Sequence[Image.Image | Tensor] = ()
    batch_size: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def description(self) -> Description:
        """The classifier's description, with the batch size of the files."""
        return replace(self.classifier.description, batch_size=self.batch_size)

    @property
    def network(self) -> nn.Module:
        """The classifier's network."""
        assert self.classifier.network is not None
        return self.classifier.network

    def images(self) -> Tensor:
        """Random inputs for tracing."""
        preprocessing = self.description.preprocessing
        return torch.randn(self.batch_size or EXAMPLES, preprocessing.channels, *preprocessing.size)

    def onnx(self, opset: int | None = None) -> Path:
        """Export the network to ONNX, without metadata, to convert to other formats. `opset` overrides the job's."""
        path = self.folder / f"opset-{opset or self.opset}-batch-{self.batch_size}.network"
        if not path.exists():
            program = self.trace(exportable(self.network))
            export_onnx(program, self.images(), path, opset=opset or self.opset, outputs=["logits"])
        return path

    def trace(self, network: nn.Module) -> ExportedProgram:
        """Trace a network with torch.export, for batches of any size unless `batch_size` fixes it."""
        shapes = None if self.batch_size else ({0: Dim("batch")},)
        with quiet(), torch.no_grad():
            return torch.export.export(network, (self.images(),), dynamic_shapes=shapes)

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as PyTorch runs it, traced with torch.export."""
        return self.trace(self.network)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and log messages of exporters and quantisers."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    # The last two warn of torchao, which ExecuTorch imports, and of a missing GPU.
    for name in ("torch.onnx", "torch.utils._pytree", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ----------------------------------------------------------------------------------------------------------------------
# timm's layout
# ----------------------------------------------------------------------------------------------------------------------


def hub_settings(description: Description) -> dict[str, Any]:
    """Arguments of timm's `save_for_hf` that describe a classifier."""
    preprocessing = description.preprocessing
    data = {name: getattr(preprocessing, name) for name in ("mean", "std", "interpolation")}
    data |= dict(input_size=(preprocessing.channels, *preprocessing.size), crop_pct=crop_share(preprocessing))
    data["crop_mode"] = "squash" if preprocessing.squash else "center"
    config: dict[str, Any] = dict(label_names=list(description.classes), orientation=description.orientation)
    if description.multi_label:
        config |= dict(multi_label=True, problem_type="multi_label_classification")  # the latter for transformers
    arguments = dict(description.model_kwargs)
    return dict(model_config=config, data_config=data, model_args=arguments or None, safe_serialization=True)


def crop_share(preprocessing: Preprocessing) -> float:
    """timm's `crop_pct`: crop length / resized length, slightly lowered, since timm rounds the resized length down."""
    side = min(preprocessing.size)
    share = side / preprocessing.resize
    while math.floor(side / share) < preprocessing.resize:
        share = math.nextafter(share, 0)
    return share


def model_card(description: Description) -> dict[str, Any]:
    """The contents of a model card, as timm's `generate_readme` takes them."""
    (height, width), count = description.preprocessing.size, len(description.classes)
    return dict(
        tags=["image-classification", "timm", "sepvit"],
        description=f"{description.model}, an image classifier for {count} classes: SepViT, the Separable Vision "
        "Transformer (https://arxiv.org/abs/2203.15380).",
        details={"Model type": "image classification", "Image size": f"{height} × {width}", "Classes": count},
        usage="```python\nimport sepvit  # registers the models\nimport timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```",
        citation=CITATION,
    )


def contiguous(network: nn.Module) -> nn.Module:
    """Copy a network and make all its weights contiguous, as safetensors requires."""
    copied: Any = copy.deepcopy(network)  # `to` has different type annotations in different torch versions
    return copied.to(memory_format=torch.contiguous_format)


def write_safetensors(job: Job, folder: Path) -> None:
    """Write a folder that timm and transformers load: weights in safetensors, configuration and model card."""
    save_for_hf(contiguous(job.network), str(folder), **hub_settings(job.description))
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["model_args"].pop("num_classes", None)  # also at the top; transformers 5.24 refuses to load it twice
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(generate_readme(model_card(job.description), job.description.model))


# ----------------------------------------------------------------------------------------------------------------------
# ONNX
# ----------------------------------------------------------------------------------------------------------------------


def export_onnx(
    network: nn.Module | ExportedProgram,
    images: Tensor,
    path: Path,
    dynamic_shapes: Any = None,
    opset: int = OPSET,
    outputs: Any = None,
) -> None:
    """Export a network in evaluation mode to ONNX.

    Args:
        network: the network, or a program that torch.export traced.
        images: inputs for tracing.
        path: the file.
        dynamic_shapes: dimensions that may differ from the traced ones, as for torch.export; None if there are
            none, or if they are the program's.
        opset: version of the operators.
        outputs: names of the network's outputs; None for the exporter's.
    """
    settings: dict[str, Any] = dict(dynamo=True, external_data=False, verbose=False, opset_version=opset)
    settings |= dict(input_names=["images"], output_names=outputs, dynamic_shapes=dynamic_shapes)
    with quiet(), torch.no_grad():
        exported: Any = torch.onnx.export(network, (images,), **settings)
    for graph in (exported.model.graph, *exported.model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()  # stack traces with paths of this machine
    exported.save(str(path), external_data=False)


def save_onnx(model: Any, description: Description, path: Path) -> None:
    """Write an ONNX model with the classifier's description in its metadata."""
    import onnx

    onnx.helper.set_model_props(model, {METADATA: description.to_json()})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def write_onnx(job: Job, path: Path, opset: int | None = None) -> None:
    """Write the network in ONNX, from normalised images to logits, for any batch size. `opset` overrides the job's."""
    import onnx

    save_onnx(onnx.load(str(job.onnx(opset))), job.description, path)


def write_onnx_preprocessing(job: Job, path: Path) -> None:
    """Write the network with its preprocessing in ONNX, from the pixels of one image, H × W × 3, to logits."""
    import onnx

    job = replace(job, batch_size=None)  # the file always takes one image
    network, pixels = onnx.load(str(job.onnx())), checked_preprocessing(job, "onnx-preprocessing", job.opset)
    pixels.ir_version = network.ir_version
    joined = onnx.compose.merge_models(pixels, network, io_map=[("prepared", "images")])
    save_onnx(joined, job.description, path)
    check_joined(pixels, path, job)


def checked_preprocessing(job: Job, name: str, opset: int) -> Any:
    """Make the preprocessing graph for a format, and note by how much its pixels differ from Pillow's.

    Raises:
        ValueError: the difference is too large, or the graph does not support the preprocessing.
    """
    graph = preprocessing_graph(job.description.preprocessing, opset)
    difference = pixel_difference(graph, job.description.preprocessing, job.samples)
    if difference > MAX_PIXEL_DIFFERENCE:
        raise ValueError(f"its pixels differ from Pillow's by {difference:.2f} of 255")
    job.notes.append(f"{name}: pixels differ from Pillow's by at most {difference:.2f} of 255.")
    return graph


def check_joined(preprocessing: Any, path: Path, job: Job) -> None:
    """Refuse a file whose logits differ from the network's on the same preprocessed images.

    On images that Pillow preprocessed, logits may differ more: one level in a pixel already changes the logits.

    Raises:
        ValueError: the logits differ.
    """
    prepare, run = open_onnx(preprocessing.SerializeToString()), open_onnx(path)
    for image in job.samples:
        pixels = torch.from_numpy(np.array(image))
        difference = float((run(pixels)[0] - job.classifier.run(prepare(pixels)[0])).abs().max())
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(f"its logits differ by {difference:.2g} for the same prepared image")


def pixel_difference(graph: Any, preprocessing: Preprocessing, images: Sequence[Image.Image | Tensor]) -> float:
    """Largest difference between the pixels from the graph and from validation preprocessing, on a scale of 255."""
    prepare = open_onnx(graph.SerializeToString())
    std, transform, largest = torch.tensor(preprocessing.std).view(3, 1, 1), preprocessing.transform(), 0.0
    for image in images:
        prepared = prepare(torch.from_numpy(np.array(image)))[0][0]
        largest = max(largest, float(((prepared - transform(image)) * std).abs().max()))
    return 255 * largest


def preprocessing_graph(preprocessing: Preprocessing, opset: int = OPSET) -> Any:
    """Make an ONNX model that resizes, crops and normalises: H × W × 3, 0 to 255, to 1 × 3 × H × W.

    ONNX Runtime resizes 8-bit pixels with Pillow's arithmetic.
    """
    import onnx

    if preprocessing.squash or preprocessing.size[0] != preprocessing.size[1] or preprocessing.channels != 3:
        raise ValueError("the preprocessing graph supports only RGB, square inputs and a centre crop")
    make, cubic = onnx.helper.make_node, preprocessing.interpolation == "bicubic"
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    constants = {
        "resize": np.int64(preprocessing.resize),
        "crop": np.array(preprocessing.size, np.int64),
        "two": np.int64(2),
        "spatial": np.array([2, 3], np.int64),
        "batch": np.array([0], np.int64),
        "scale": 1 / (255 * std),
        "offset": -mean / std,
    }
    resize: dict[str, Any] = dict(mode="cubic", cubic_coeff_a=-0.5) if cubic else dict(mode="linear")
    resize |= dict(antialias=1, exclude_outside=1, coordinate_transformation_mode="half_pixel", axes=[2, 3])
    nodes = [
        # The longer side is resize × longer // shorter, as in torchvision.
        make("Shape", ["pixels"], ["shape"], start=0, end=2),
        make("ReduceMin", ["shape"], ["shorter"], keepdims=0),
        make("Mul", ["shape", "resize"], ["scaled"]),
        make("Div", ["scaled", "shorter"], ["resized_shape"]),
        make("Transpose", ["pixels"], ["channels_first"], perm=[2, 0, 1]),
        make("Unsqueeze", ["channels_first", "batch"], ["pixels_batch"]),
        make("Resize", ["pixels_batch", "", "", "resized_shape"], ["resized"], **resize),
        # The crop starts at half of the margin, rounded to even.
        make("Sub", ["resized_shape", "crop"], ["spare"]),
        make("Div", ["spare", "two"], ["half"]),
        make("Mod", ["spare", "two"], ["is_odd"]),
        make("Mod", ["half", "two"], ["is_half_odd"]),
        make("Mul", ["is_odd", "is_half_odd"], ["rounding"]),
        make("Add", ["half", "rounding"], ["start"]),
        make("Add", ["start", "crop"], ["end"]),
        make("Slice", ["resized", "start", "end", "spatial"], ["cropped"]),
        make("Cast", ["cropped"], ["cropped_float"], to=onnx.TensorProto.FLOAT),
        make("Mul", ["cropped_float", "scale"], ["scaled_float"]),
        make("Add", ["scaled_float", "offset"], ["prepared"]),
    ]
    image = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["height", "width", 3])
    size = [1, 3, *preprocessing.size]
    prepared = onnx.helper.make_tensor_value_info("prepared", onnx.TensorProto.FLOAT, size)
    stored = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "preprocessing", [image], [prepared], stored)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


# ----------------------------------------------------------------------------------------------------------------------
# OpenVINO
# ----------------------------------------------------------------------------------------------------------------------


def read_openvino(path: Path) -> Any:
    """Read an ONNX file as an OpenVINO model."""
    import openvino

    # Passed as bytes, because OpenVINO does not recognise the suffix of the file.
    return openvino.Core().read_model(path.read_bytes(), b"")


def save_openvino(model: Any, description: Description, number_format: str, path: Path) -> None:
    """Write an OpenVINO model, .xml and .bin, with the classifier's description and the number format to compute in."""
    import openvino

    model.set_rt_info(description.to_json(), [METADATA, "description"])
    model.set_rt_info(number_format, [METADATA, NUMBER_FORMAT])
    openvino.save_model(model, str(path), compress_to_fp16=number_format == "bfloat16")


def write_openvino(job: Job, path: Path) -> None:
    """Write the network for OpenVINO, computed in float32."""
    save_openvino(read_openvino(job.onnx()), job.description, "float32", path)


def write_openvino_bfloat16(job: Job, path: Path) -> None:
    """Write the network for OpenVINO, computed in bfloat16, with 16-bit weights."""
    save_openvino(read_openvino(job.onnx()), job.description, "bfloat16", path)


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch
# ----------------------------------------------------------------------------------------------------------------------


def write_torch_export(job: Job, path: Path) -> None:
    """Write the network as a program of torch.export, which PyTorch runs without this project's code."""
    for node in job.program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with paths of this machine
    with quiet():
        torch.export.save(job.program, path, extra_files={DESCRIPTION: job.description.to_json()})


def write_aotinductor(job: Job, path: Path) -> None:
    """Compile the network to machine code for this kind of processor. PyTorch can load the file."""
    metadata = {"aot_inductor.metadata": {METADATA: job.description.to_json()}}
    with quiet():
        from torch._inductor import aoti_compile_and_package

        aoti_compile_and_package(job.program, package_path=str(path), inductor_configs=metadata)


def write_torchscript(job: Job, path: Path) -> None:
    """Write the network in TorchScript, which PyTorch runs without this project's code, also from C++."""
    with quiet():
        script = torch.jit.freeze(torch.jit.script(job.network))
        description = replace(job.description, batch_size=None)  # it takes any
        content = io.BytesIO()
        torch.jit.save(script, content, _extra_files={DESCRIPTION: description.to_json()})
    with zipfile.ZipFile(content) as archive, zipfile.ZipFile(path, "w") as copied:
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # source code, with paths of this machine
                copied.writestr(entry, archive.read(entry))


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which AOTInductor needs."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
