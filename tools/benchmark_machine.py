"""What the benchmarks know of a machine: description, rates, resident memory, other work on it."""

if not __package__:
    import _repository  # noqa: F401
import ctypes
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sepvit_lib.training.devices import available_cores
from sepvit_lib.training.measure import median_time

SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices: a GPU multiplies 2048 × 2048 faster than one call starts
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes, more than caches hold
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "bf16", "i8mm")
PACKAGES = ("torch", "torchvision", "timm", "triton", "onnxruntime", "openvino", "numpy", "pillow", "pytest")

# ----------------------------------------------------------------------------------------------------------------------
# Description
# ----------------------------------------------------------------------------------------------------------------------


def describe(device: torch.device) -> dict[str, Any]:
    """Describe the device, the processor and the versions of what runs on them."""
    described: dict[str, Any] = {"device": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["memory, GiB"] = round(properties.total_memory / 2**30, 1)
        described["multiprocessors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.CalledProcessError):
            found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            described["driver"] = found.splitlines()[0].strip()
        described["CUDA"] = torch.version.cuda
        described["cuDNN"] = torch.backends.cudnn.version()
        described["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    described["processor"] = processor_name()
    described["processor features"] = " ".join(processor_features()) or "unknown"
    described["cores"] = available_cores()
    described["system"] = platform.system()
    described["python"] = platform.python_version()
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            described[package] = version(package)
    return described


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor and how many cores of it there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = available_cores()
    return f"{processor_name()}, {cores} core{'s' if cores > 1 else ''}" + (", MPS" if device.type == "mps" else "")


def processor_name() -> str:
    """The processor's model, without the marks of its name."""
    name = _processor_info(r"model name|Model Name|Processor")
    if not name and platform.system() == "Darwin":
        with suppress(OSError, subprocess.CalledProcessError):
            query = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\((R|TM|tm)\)|\bCPU\b", "", name or platform.processor() or platform.machine())
    return " ".join(name.split())


def processor_features() -> list[str]:
    """The processor's instructions for vectors and matrices, as Linux names them; empty elsewhere."""
    known = _processor_info(r"flags|Features").split()
    return [feature for feature in FEATURES if feature in known]


def _processor_info(names: str) -> str:
    """A value of /proc/cpuinfo; "" if there is none."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        if match := re.search(rf"^(?:{names})\s*:\s*(.*)$", text, re.MULTILINE):
            return match[1]
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# Rates
# ----------------------------------------------------------------------------------------------------------------------


def matrix_product(
    dtype: torch.dtype, device: torch.device, side: int | None = None
) -> tuple[Callable[[], object], int]:
    """A matrix product as a call, and its multiply-adds; a large one unless `side` is given."""
    side = side or SIDES.get(device.type, SIDES["cpu"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return partial(torch.matmul, a, b, out=torch.empty_like(a)), side**3


def large_copy(dtype: torch.dtype, device: torch.device, size: int | None = None) -> tuple[Callable[[], object], int]:
    """The copy of a tensor as a call, and the bytes that it reads and writes; a large one unless `size` is given."""
    count = (size or COPIED.get(device.type, COPIED["cpu"])) // dtype.itemsize
    source, target = (torch.ones(count, device=device, dtype=dtype) for _ in range(2))
    return partial(target.copy_, source), 2 * count * dtype.itemsize


def matrix_product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the multiply-adds per second of a large matrix product."""
    call, multiply_adds = matrix_product(dtype, device)
    return multiply_adds / median_time(call, device)


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def peak_resident(function: Callable[[], object]) -> int | None:
    """Most bytes of memory that the process has gained at once during a call. None if the system does not tell."""
    if not _reset_peak():
        return None
    before = _resident("VmHWM")
    function()
    return max(0, _resident("VmHWM") - before)


def _reset_peak() -> bool:
    """Return unused memory to the system, and reset the process's peak to what it uses now. False if it cannot."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident(name: str) -> int:
    """A size in bytes from /proc/self/status."""
    match = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])


# ----------------------------------------------------------------------------------------------------------------------
# Other work on the machine
# ----------------------------------------------------------------------------------------------------------------------


class OtherWork:
    """How many cores other processes keep busy, from the moment this is made. Known under Linux only."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def cores(self) -> float | None:
        """Cores that were busy with something else, on average; None where the system does not tell."""
        end = self._seconds()
        if self._start is None or end is None:
            return None
        wall, busy, own = (after - before for before, after in zip(self._start, end))
        return max(0.0, busy - own) / wall if wall > 0 else None

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Seconds of wall time, of all cores' work, and of this process's."""
        with suppress(OSError, ValueError):
            times = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
            user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, times)
            busy = (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
            return time.monotonic(), busy, sum(os.times()[:4])  # its own and those of its ended children
        return None
