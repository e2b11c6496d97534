"""Formats for phones: ExecuTorch, LiteRT, ncnn, and Core ML of Apple's devices. Files have a fixed batch size."""

import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from sepvit import exportable
from sepvit_lib.inference.exported import DESCRIPTION, METADATA, silenced
from tools.exporting.writers import Job, quiet


def fixed(job: Job) -> Job:
    """The job with a fixed batch size, by default of one image: a phone would reserve memory for the largest batch."""
    return replace(job, batch_size=job.batch_size or 1)


def exportable_of(job: Job) -> nn.Module:
    """The network in its export form. ExecuTorch refuses weights in PyTorch's layout for images."""
    return exportable(job.network).to(memory_format=torch.contiguous_format)


def write_executorch(job: Job, path: Path) -> None:
    """Write the network for ExecuTorch with XNNPACK, in float32."""
    job = fixed(job)
    save_executorch(job.trace(exportable_of(job)), job, path)


def write_executorch_int8(job: Job, path: Path) -> None:
    """Write the network for ExecuTorch with XNNPACK, with convolutions and linear layers in int8.

    Weights have one scale per channel. The ranges of activations are those of the calibration images.
    """
    with quiet():
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    job, layers = fixed(job), (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer()
    quantizer.set_global(xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(lambda node: node.target in layers)
    with quiet(), torch.no_grad():
        observed = prepare_pt2e(job.trace(exportable_of(job)).module(), quantizer)
        for batch in job.calibration:
            observed(batch)
        quantised = job.trace(convert_pt2e(observed))
    save_executorch(quantised, job, path)


def save_executorch(program: ExportedProgram, job: Job, path: Path) -> None:
    """Lower a program to XNNPACK, and write it with the classifier's description, which a method returns."""
    with quiet():
        from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        settings: dict[str, Any] = dict(partitioner=[XnnpackPartitioner()])
        settings["transform_passes"] = [RemoveNoopExpandCopyPass()]  # halves the number of parts that XNNPACK runs
        settings["constant_methods"] = {METADATA: job.description.to_json()}
        lowered = to_edge_transform_and_lower(program, **settings)
        path.write_bytes(lowered.to_executorch().buffer)


def write_core_ml(job: Job, path: Path) -> None:
    """Write the network for Core ML, computed in float16 from and to float32. Only macOS and iOS run it."""
    job = fixed(job)
    with quiet(), silenced(), torch.no_grad():
        import coremltools

        images = job.images()
        traced = torch.jit.trace(exportable_of(job), images, check_trace=False)
        tensor = partial(coremltools.TensorType, dtype=np.float32)
        settings: dict[str, Any] = dict(inputs=[tensor("images", images.shape)], outputs=[tensor("logits")])
        settings |= dict(minimum_deployment_target=coremltools.target.iOS16)
        settings |= dict(package_dir=str(job.folder / "converted.mlpackage"))  # deleted with the job's other files
        model = coremltools.convert(traced, **settings)
        model.user_defined_metadata[METADATA] = job.description.to_json()
        model.save(str(path))


def write_litert(job: Job, path: Path) -> None:
    """Write the network for LiteRT, in float32, with the description in an archive at the end of the file."""
    job = fixed(job)
    with quiet(), silenced(), torch.no_grad():
        import litert_torch

        litert_torch.convert(exportable_of(job), (job.images(),)).export(str(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(DESCRIPTION, job.description.to_json())


def write_ncnn(job: Job, path: Path) -> None:
    """Write the network for ncnn, in float32, with the description in the last line, always for one image per call.

    Raises:
        ValueError: pnnx fails.
    """
    job = replace(job, batch_size=1)
    with quiet(), silenced(), torch.no_grad():
        import pnnx

        files: dict[str, Any] = dict(
            ncnnparam=str(path), ncnnbin=str(path.with_suffix(".bin")), fp16=False, check_trace=False
        )
        pnnx.export(exportable_of(job), str(job.folder / "network.pt"), job.images(), **files)
    if not (path.is_file() and path.with_suffix(".bin").is_file()):
        raise ValueError("pnnx wrote no files for ncnn")
    with open(path, "a", encoding="utf-8") as file:
        file.write(job.description.to_json() + "\n")
