"""Description of a machine, recorded with the measurements made on it."""

import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sepvit_lib.common.devices import available_cores

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "bf16", "i8mm")
PACKAGES = ("torch", "torchvision", "timm", "triton", "onnxruntime", "openvino", "numpy", "pillow", "pytest")


def describe(device: torch.device) -> dict[str, Any]:
    """Describe the device, the processor and the software versions."""
    described: dict[str, Any] = {"device": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["memory, GiB"] = round(properties.total_memory / 2**30, 1)
        described["driver"] = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        described["CUDA"] = torch.version.cuda
        described["cuDNN"] = torch.backends.cudnn.version()
        described["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    known = _processor_info(r"flags|Features").split()
    described["processor"] = processor_name()
    described["processor features"] = " ".join(name for name in FEATURES if name in known) or "unknown"
    described["cores"] = available_cores()
    described["system"] = platform.system()
    described["python"] = platform.python_version()
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            described[package] = version(package)
    return described


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor with its number of available cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = available_cores()
    return f"{processor_name()}, {cores} core{'s' if cores > 1 else ''}" + (", MPS" if device.type == "mps" else "")


def processor_name() -> str:
    """Processor model, without trademark signs."""
    name = _processor_info(r"model name|Model Name|Processor")
    if not name and platform.system() == "Darwin":
        name = _printed("sysctl", "-n", "machdep.cpu.brand_string")
    name = re.sub(r"\((R|TM|tm)\)|\bCPU\b", "", name or platform.processor() or platform.machine())
    return " ".join(name.split())


def _processor_info(names: str) -> str:
    """First value in /proc/cpuinfo whose name matches the pattern `names`; "" if there is none."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        if match := re.search(rf"^(?:{names})\s*:\s*(.*)$", text, re.MULTILINE):
            return match[1]
    return ""


def _printed(*command: str) -> str:
    """First line that a command prints; "" if it cannot run."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0].strip()
    return ""
