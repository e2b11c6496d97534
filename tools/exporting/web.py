"""The export format "web": a folder with a page that classifies images in the browser, without a server.

The page is that of tools/app.py, with ONNX Runtime Web in place of the server. The network's ONNX file also computes
what the page shows of the attention.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from sepvit import exportable
from sepvit_lib.inference.attention import BlockAttention, record_attention
from sepvit_lib.inference.classifier import THRESHOLD
from sepvit_lib.pipeline.preprocessing import MAX_ASPECT
from tools.exporting.writers import Job, checked_preprocessing, export_onnx, save_onnx
from tools.page.predictors import MAX_PIXELS, TOP, ClassifierPredictor, shown_weights
from tools.page.samples import load_samples

NETWORK = "network.onnx"
OPSET = 18  # the first whose Resize is antialiased; its operators run on WebGPU, too
PAGE = Path(__file__).resolve().parent.parent / "page"
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# The browser loads the first two, or for WebGPU the last two.
RUNTIME_FILES = (
    "ort.wasm.bundle.min.mjs ort-wasm-simd-threaded.wasm ort.webgpu.bundle.min.mjs ort-wasm-simd-threaded.asyncify.wasm"
).split()


def write_web(job: Job, folder: Path) -> None:
    """Write the page's folder.

    Raises:
        ValueError: the preprocessing graph does not support the classifier's input.
        RuntimeError: the runtime cannot be downloaded.
    """
    import onnx

    job = replace(job, batch_size=None)  # the page's batches have one image, those of the comparison have more
    preprocessing = checked_preprocessing(job, "web", OPSET)
    preprocessing.ir_version = onnx.helper.find_min_ir_version_for(preprocessing.opset_import)
    size = [1, 3, *job.description.preprocessing.size]
    cropped = onnx.helper.make_tensor_value_info("cropped", onnx.TensorProto.UINT8, size)
    preprocessing.graph.output.append(cropped)  # the picture that the page shows
    shutil.copytree(PAGE / "static", folder)
    shutil.copytree(PAGE / "web", folder, dirs_exist_ok=True)
    fetch_runtime(job.folder, folder)
    save_onnx(preprocessing, job.description, folder / "preprocessing.onnx")
    about = describe(job)
    write_network(job, [block["label"] for block in about["blocks"]], folder / NETWORK)
    (folder / "samples").mkdir()
    for name, sample in load_samples(about["kind"], about["classes"]).items():
        (folder / "samples" / f"{name}.png").write_bytes(sample.content)
        about["samples"].append(dict(name=f"{name}.png", label=sample.label))
    (folder / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")


def describe(job: Job) -> dict[str, Any]:
    """Describe the network for the page: a `Description`, what Service.about returns, limits, and blocks to show."""
    predictor = ClassifierPredictor(job.classifier)
    answer = predictor.predict(Image.new("RGB", (64, 64)))
    blocks = [block.to_json() | {"weights": ""} for block in answer.blocks]  # the page fills the weights in
    about = {name: getattr(predictor, name) for name in ("kind", "facts")}
    limits = dict(top=TOP, threshold=THRESHOLD, max_pixels=MAX_PIXELS, max_aspect=MAX_ASPECT)
    rest = dict(note=answer.note, blocks=blocks, samples=[])
    return json.loads(job.description.to_json()) | about | limits | rest


def fetch_runtime(work: Path, folder: Path) -> None:
    """Download ONNX Runtime Web with npm, and copy the files that the page needs.

    Args:
        work: folder for temporary files.
        folder: the page's folder.

    Raises:
        RuntimeError: npm is missing or fails, or the package is not the expected one.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("needs npm, which is part of Node.js, to download ONNX Runtime Web")
    command = [npm, "pack", RUNTIME, "--loglevel=error", "--prefer-offline", "--pack-destination", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        problem = done.stderr.partition("\n")[0]
        raise RuntimeError(f"npm cannot download {RUNTIME} ({problem}); check the network connection")
    archive = work / done.stdout.split()[-1]
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != RUNTIME_SHA512:
        raise RuntimeError(f"npm's {RUNTIME} is not the expected package (SHA-512)")
    with tarfile.open(archive) as package:
        for name in RUNTIME_FILES:
            content: Any = package.extractfile(f"package/dist/{name}")
            (folder / name).write_bytes(content.read())


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """A function that keeps its last result."""

    function: Callable[[Tensor], Tensor]
    last: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        self.last = self.function(values)
        return self.last


class AttentiveNetwork(nn.Module):
    """A network that returns its logits, and the weights that the page shows for the first image of a batch.

    Args:
        network: the network, which is changed to record the weights.
        blocks: its recorded blocks that have attention among windows.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[BlockAttention]) -> None:
        super().__init__()
        self.network, self.blocks = network, blocks
        for block in blocks:
            attention: Any = self.network.get_submodule(f"{block.name}.attn")
            attention.pointwise_weights = Recorder(attention.pointwise_weights)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute logits, B × classes, and h × n × n weights of each block and of the rollout."""
        logits, recorded = self.network(images), []
        for block in self.blocks:
            attention: Any = self.network.get_submodule(f"{block.name}.attn")
            recorded.append(replace(block, among=attention.pointwise_weights.last))
        return logits, *(weights for _, _, weights, _ in shown_weights(recorded, torch.float32))


def write_network(job: Job, labels: Sequence[str], path: Path) -> None:
    """Write the network in ONNX. Its outputs are the logits, and the weights of the blocks with these labels."""
    import onnx

    blocks = record_attention(job.network, job.images()) if labels else []
    network = AttentiveNetwork(exportable(job.network), [block for block in blocks if block.among is not None])
    export_onnx(network, job.images(), path, ({0: Dim("batch")},), OPSET, ["logits", *labels])
    save_onnx(onnx.load(str(path)), job.description, path)
