"""What the time of a call goes to: operations, and how fast they multiply and move bytes."""

if not __package__:
    import _repository  # noqa: F401
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepvit_lib.training.devices import synchronize
from sepvit_lib.training.measure import multiply_adds


@dataclass
class Operation:
    """What a call spends on one kind of operation.

    Attributes:
        seconds: its time.
        share: share of the time of all operations.
        multiply_adds: its multiply-adds; 0 if unknown.
        moved: bytes of its inputs and outputs; 0 if unknown.
    """

    seconds: float = 0.0
    share: float = 0.0
    multiply_adds: int = 0
    moved: int = 0


class Work(TorchDispatchMode):
    """Count the multiply-adds and bytes of operations while active, views aside.

    Attributes:
        operations: the operations by name. Their times are 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, Operation] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten.dropout:  # without gradients: nothing, which would become a copy below
            return func(*args, **kwargs)
        with self:  # without gradients, an operation may come with what it is made of not yet called
            outputs = func.decompose(*args, **kwargs)
        if outputs is not NotImplemented:
            return outputs
        outputs = func(*args, **kwargs)
        if not func.is_view:
            operation = self.operations.setdefault(func.overloadpacket._qualified_op_name, Operation())
            tensors = [leaf for leaf in tree_leaves((args, kwargs, outputs)) if isinstance(leaf, Tensor)]
            operation.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            operation.multiply_adds += multiply_adds(func, args, kwargs, outputs)
        return outputs


def profile_call(function: Callable[[], object], device: torch.device) -> dict[str, Operation]:
    """Find the operations on a CPU, or the kernels on a GPU, that a call spends its time in.

    Args:
        function: the call.
        device: the device it works on.

    Returns:
        the operations by name, the longest first. Products and bytes are known on a CPU only.
    """
    operations = _kernels(function, device) if device.type == "cuda" else _operations(function)
    total = sum(operation.seconds for operation in operations.values())
    longest = sorted(operations.items(), key=lambda entry: -entry[1].seconds)
    return {
        name: replace(operation, share=operation.seconds / total) for name, operation in longest if operation.seconds
    }


def _kernels(function: Callable[[], object], device: torch.device) -> dict[str, Operation]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        function()
        synchronize(device)
    operations: dict[str, Operation] = {}
    for event in profiler.key_averages():
        # Operations have times too: those of their kernels, which would count twice.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            operations.setdefault(event.key, Operation()).seconds += event.self_device_time_total / 1e6
    return operations


def _operations(function: Callable[[], object]) -> dict[str, Operation]:
    """Operations of a CPU. The time of one that is counted includes those that it is made of."""
    with Work() as work:
        function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        function()
    operations = dict(work.operations)
    for event in profiler.events():
        parent = event.cpu_parent
        while parent is not None and parent.name not in work.operations:
            parent = parent.cpu_parent
        if parent is None:
            is_counted = event.name in work.operations
            microseconds = event.cpu_time_total if is_counted else event.self_cpu_time_total
            operations.setdefault(event.name, Operation()).seconds += microseconds / 1e6
    return operations
