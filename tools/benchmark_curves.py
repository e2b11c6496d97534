"""Curves of SepViT's cost over image size, batch, threads and processes, and a model of communication on many GPUs.

The points of a curve are measured in the same rounds.
"""

if not __package__:
    import _repository  # noqa: F401
import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import main as training_command
import sepvit
from sepvit_lib.training.devices import synchronize
from sepvit_lib.training.measure import peak_memory
from tools.benchmark_networks import Port, Setting, Steps, create_network, main_settings
from tools.benchmark_rounds import Spread, interleave

STEP = 32  # pixels between two sizes when searching for a share
PERIOD = 224  # pixels after which windows fit without padding again, in every stage
LARGEST = 4096  # pixels where the search ends
SHARES = (0.05, 0.2)  # of all multiply-adds: where the pointwise part begins to count

Figures = dict[str, Any]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Method:
    """What is measured, and how.

    Attributes:
        model: the variant.
        device: the device.
        number_format: number format of main.py's --amp: float32, bfloat16 or float16.
        rounds: rounds of timing.
        least: seconds of one timing at least.
        threads: CPU threads.
    """

    model: str
    device: torch.device
    number_format: str
    rounds: int
    least: float
    threads: int


# ----------------------------------------------------------------------------------------------------------------------
# Image size
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def multiply_adds_by_part(model: str, size: int) -> tuple[int, tuple[int, ...]]:
    """Count the multiply-adds of one image in matrix products and convolutions.

    Counted on the port, which has the same ones, without computing them.

    Returns:
        all of them, and those of pointwise self-attention by stage.
    """
    widths: dict[str, Any] = {**sepvit.VARIANTS[model]}
    with torch.device("meta"):
        network = sepvit.SepViT(img_size=size, **widths)
        image = torch.zeros(1, 3, size, size)
    port = Port(network.eval())
    by_stage = [0] * len(port.blocks)
    for stage, blocks in enumerate(port.blocks):
        for block in blocks:
            block.attn.pointwise = _counted(block.attn.pointwise, by_stage, stage)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        port(image)
    return counter.get_total_flops() // 2, tuple(by_stage)


def _counted(function: Callable[..., Any], counts: list[int], place: int) -> Callable[..., Any]:
    """A function that also adds its multiply-adds to a count."""

    def run(*args: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = function(*args)
        counts[place] += counter.get_total_flops() // 2
        return result

    return run


def first_size(model: str, share: float, largest: int = LARGEST) -> int | None:
    """The smallest image side, in steps of `STEP`, from which on pointwise self-attention has a share of all work.

    The share rises and falls a little with the padding of the windows: it has to hold for a whole `PERIOD`. None if it
    is not reached up to `largest`.
    """
    first = None
    for size in range(STEP, largest + 1, STEP):
        total, by_stage = multiply_adds_by_part(model, size)
        if sum(by_stage) < share * total:
            first = None
        elif first is None:
            first = size
        elif size - first >= PERIOD:
            break
    return first


def size_curve(method: Method, sizes: Sequence[int], report: Report) -> Figures:
    """Multiply-adds, time and memory of one image by image size."""
    points: list[Figures] = []
    calls: dict[int, Callable[[], object]] = {}
    for size in sizes:
        report(f"size {size}")
        total, by_stage = multiply_adds_by_part(method.model, size)
        calls[size] = forward_pass(method, 1, size)
        calls[size]()
        points.append(
            dict(
                size=size,
                windows=sepvit.window_grid((size, size), 0, 7)[0] ** 2,
                multiply_adds=total,
                pointwise_by_stage=by_stage,
                bytes_peak=peak_memory(calls[size], method.device),
            )
        )
    times = interleave(calls, method.device, method.rounds, method.least)
    for point in points:
        point["seconds"] = times.seconds.get(point["size"])
        point["failure"] = times.errors.get(point["size"], "")
    return dict(points=points, reached={str(share): first_size(method.model, share) for share in SHARES})


def forward_pass(method: Method, batch_size: int, size: int) -> Callable[[], object]:
    """A forward pass as a call."""
    setting = Setting("inference", method.device, batch_size, (size, size))
    network = create_network(method.model, setting).eval().to(method.device)
    precision = setting.precision(method.number_format)
    images = precision.images(setting.images())

    @torch.inference_mode()
    def predict() -> object:
        with precision.autocast():
            return network(images)

    return predict


# ----------------------------------------------------------------------------------------------------------------------
# Batch and threads
# ----------------------------------------------------------------------------------------------------------------------


def batch_curve(method: Method, batches: Sequence[int], size: int, report: Report) -> Figures:
    """Time of the forward pass by batch size."""
    report(f"batches of {', '.join(map(str, batches))}")
    calls = {batch: forward_pass(method, batch, size) for batch in batches}
    times = interleave(calls, method.device, method.rounds, method.least)
    return dict(
        size=size,
        points=[
            dict(batch_size=batch, seconds=times.seconds.get(batch), failure=times.errors.get(batch, ""))
            for batch in batches
        ],
    )


def threads_curve(method: Method, batch_size: int, size: int, report: Report) -> Figures:
    """Time of the forward pass by number of CPU threads."""
    numbers = sorted({1, *(2**i for i in range(1, 10) if 2**i < method.threads), method.threads})
    report(f"{', '.join(map(str, numbers))} threads")
    predict = forward_pass(method, batch_size, size)

    def with_threads(threads: int) -> object:
        torch.set_num_threads(threads)
        return predict()

    calls = {threads: partial(with_threads, threads) for threads in numbers}
    times = interleave(calls, method.device, method.rounds, method.least)
    torch.set_num_threads(method.threads)
    return dict(
        size=size,
        batch_size=batch_size,
        points=[dict(threads=threads, seconds=times.seconds.get(threads)) for threads in numbers],
    )


# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------


def processes_curve(method: Method, numbers: Sequence[int], batch_size: int, size: int, report: Report) -> Figures:
    """Time of a training step by number of data-parallel processes, each with a batch of its own."""
    report(f"{', '.join(map(str, numbers))} processes")
    with tempfile.TemporaryDirectory() as folder:
        groups = {number: Group(method, number, batch_size, size, Path(folder)) for number in numbers}
        try:
            calls = {number: group.step for number, group in groups.items()}
            times = interleave(calls, torch.device("cpu"), method.rounds, method.least)
        finally:
            for group in groups.values():
                group.end()
    points = [
        dict(
            processes=number,
            threads=groups[number].threads,
            seconds=times.seconds.get(number),
            failure=times.errors.get(number, ""),
        )
        for number in numbers
    ]
    return dict(size=size, batch_size=batch_size, points=points)


class Group:
    """Data-parallel processes that take training steps when they are told to. They share the CPU threads.

    Args:
        method: variant, device and number format.
        number: number of processes.
        batch_size: images per process.
        size: image side.
        folder: folder for the processes' meeting place.

    Attributes:
        threads: CPU threads of each process.
    """

    def __init__(self, method: Method, number: int, batch_size: int, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.threads = max(1, method.threads // number)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(number):
            own, theirs = context.Pipe()
            arguments = (theirs, method, rank, number, self.threads, batch_size, size, f"file://{folder}/{number}")
            process = context.Process(target=_train, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(own)
            self._processes.append(process)

    def step(self) -> None:
        """Let all processes take one step, and wait for them.

        Raises:
            RuntimeError: a process has ended.
        """
        try:
            for pipe in self._pipes:
                pipe.send(True)
            for pipe in self._pipes:
                pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("a process has ended") from None

    def end(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()


def _train(
    pipe: Connection, method: Method, rank: int, number: int, threads: int, batch_size: int, size: int, meeting: str
) -> None:
    """Take training steps until the other end of the pipe is closed."""
    torch.set_num_threads(threads)
    device = method.device
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if number > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=number)
    steps = training_steps(method, device, batch_size, size)
    try:
        while True:
            pipe.recv()
            steps.train()
            synchronize(device)
            pipe.send(True)
    except (EOFError, OSError):
        if number > 1:
            dist.destroy_process_group()


def training_steps(method: Method, device: torch.device, batch_size: int, size: int) -> Steps:
    """Training steps of the network, data-parallel if there is a process group."""
    amp = {"float32": "off"}.get(method.number_format, method.number_format)
    args = main_settings(method.model, device, batch_size, "--amp", amp, "--input-size", str(size))
    setting = Setting("training", device, batch_size, (size, size))
    precision = training_command.build_precision(args, device)
    network = create_network(method.model, setting, drop_path_rate=args.drop_path)
    return Steps.around(network.to(device).train(), args, precision, setting.images())


# ----------------------------------------------------------------------------------------------------------------------
# Communication
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """What connects GPUs.

    Attributes:
        name: its name.
        rate: bytes per second in each direction, of a GPU, or of a machine of eight.
        machines: whether it connects machines of eight GPUs, rather than the GPUs of one.
        source: where the rate is published.
    """

    name: str
    rate: float
    machines: bool
    source: str


GPUS_OF_A_MACHINE = 8
LINKS = [
    Link("NVLink of an A100, 600 GB/s both ways", 300e9, False, "https://www.nvidia.com/en-us/data-center/a100/"),
    Link("NVLink of an H100, 900 GB/s both ways", 450e9, False, "https://www.nvidia.com/en-us/data-center/h100/"),
    Link(
        "InfiniBand, 8 × 400 Gb/s a machine (DGX H100)",
        400e9,
        True,
        "https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html",
    ),
    Link("Ethernet, 100 Gb/s a machine", 12.5e9, True, "https://standards.ieee.org/ieee/802.3ba/4071/"),
    Link("Ethernet, 25 Gb/s a machine", 3.125e9, True, "https://standards.ieee.org/ieee/802.3by/6094/"),
]
GPU_COUNTS = (8, 16, 32, 64)
BUCKET = 25 * 2**20  # bytes of gradients that data parallelism reduces at a time, its default


def all_reduce_seconds(size: float, number: int, rate: float) -> float:
    """Seconds of a ring all-reduce: each GPU sends, and receives, 2 (p - 1) / p times the data.

    Args:
        size: bytes of the data.
        number: GPUs p.
        rate: bytes per second of the slowest link of the ring, in each direction.
    """
    return 2 * (number - 1) / number * size / rate


def backward_seconds(steps: Steps, method: Method) -> float:
    """Median seconds of the backward pass: the difference of training steps' parts with and without it."""
    device = method.device

    def loss() -> torch.Tensor:
        with steps.precision.autocast():
            return steps.loss(steps.training.wrapped(steps.images), steps.targets)

    def forward_and_backward() -> None:
        loss().backward()
        steps.training.optimizer.zero_grad(set_to_none=True)

    times = interleave({"forward": loss, "both": forward_and_backward}, device, method.rounds, method.least)
    if times.errors:
        raise RuntimeError(next(iter(times.errors.values())))
    return Spread.of([both - forward for forward, both in zip(*times.seconds.values())]).median


def gradient_bytes(network: nn.Module) -> int:
    """Bytes of the gradients after a backward pass, as data parallelism reduces them."""
    return sum(p.grad.numel() * p.grad.element_size() for p in network.parameters() if p.grad is not None)


def communication_model(method: Method, batch_size: int, size: int, backward: float | None, report: Report) -> Figures:
    """Time of the all-reduce on many GPUs, beside the backward pass that hides it.

    Data parallelism reduces a bucket of gradients as soon as it is complete, while the backward pass goes on. What
    cannot be hidden is the last bucket, and whatever takes longer than the backward pass.

    Args:
        method: variant, device and number format.
        batch_size: images per GPU.
        size: image side.
        backward: seconds of the backward pass on a GPU; None to measure it on the device.
        report: told about progress.
    """
    report("communication")
    steps = training_steps(method, method.device, batch_size, size)
    with steps.precision.autocast():
        steps.loss(steps.training.wrapped(steps.images), steps.targets).backward()
    gradients = gradient_bytes(steps.training.model)
    steps.training.optimizer.zero_grad(set_to_none=True)
    seconds = backward_seconds(steps, method) if backward is None else backward
    last = gradients % BUCKET or BUCKET
    points = []
    for link in LINKS:
        for number in GPU_COUNTS:
            if link.machines != (number > GPUS_OF_A_MACHINE):
                continue
            reduce = all_reduce_seconds(gradients, number, link.rate)
            exposed = max(all_reduce_seconds(last, number, link.rate), reduce - seconds)
            points.append(
                dict(
                    link=link.name,
                    source=link.source,
                    gpus=number,
                    all_reduce=reduce,
                    exposed=exposed,
                    share_of_backward=reduce / seconds,
                )
            )
    return dict(
        gradient_bytes=gradients,
        batch_size=batch_size,
        backward_seconds=seconds,
        backward_is_measured=backward is None,
        points=points,
    )
