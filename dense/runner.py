"""mmengine's runner, with what it lacks: several CPU processes, checkpoints read safely and strictly."""

import logging
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.logging import HistoryBuffer
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn

import checkpoints

VARIANT_HINT = "take the config of that variant, or another checkpoint"


def log_statistic(owner: type, name: str) -> Callable:
    """Stands for `getattr` in checkpoints, where mmengine's log refers to the ways it is averaged; gives those alone.

    Raises:
        pickle.UnpicklingError: anything else is asked for.
    """
    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr of {name}")


# What checkpoints of mmengine hold beside tensors: the log, made of NumPy's arrays. None of it can run code.
LOG_CLASSES = (
    HistoryBuffer,
    (log_statistic, "builtins.getattr"),
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "int64", "uint32", "int32", "bool")),
)


def read_checkpoint(path: str, flag: str) -> dict[str, Any]:
    """Read a checkpoint of mmengine's or of main.py's, without running anything; see `checkpoints.read_checkpoint`.

    Raises:
        UserError: it is missing, truncated, no checkpoint, or would run code.
    """
    return checkpoints.read_checkpoint(path, flag, LOG_CLASSES)


def has_half_precision() -> bool:
    """Whether mmengine can compute in half precision here: it needs a GPU that is not a Mac's.

    On CPUs it would evaluate in bfloat16 and not train at all.
    """
    return get_device() not in ("cpu", "mps")


def unwrapped(model: nn.Module) -> nn.Module:
    """The segmentor or detector inside the wrappers of data parallelism and test-time augmentation."""
    while hasattr(model, "module"):
        model = model.module
    return model


class DenseRunner(Runner):
    """Trains and tests a segmentor or detector; several CPU processes work like several GPUs.

    Attributes:
        checkpoints: those read already, by path, so that none is read twice.
    """

    checkpoints: dict[str, dict[str, Any]]

    @classmethod
    def from_config(cls, cfg: Any, checkpoints: dict[str, dict[str, Any]] | None = None) -> "DenseRunner":
        """Build the runner a config describes, with the checkpoints that were read for it, by path."""
        runner = cls.from_cfg(cfg)
        runner.checkpoints = checkpoints or {}
        return runner

    def set_randomness(self, seed: int | None, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """Seed everything. Operations that have no deterministic form on GPUs warn instead of ending the run."""
        super().set_randomness(seed, diff_rank_seed, deterministic)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Put the model on its device and wrap it for data parallelism; on CPUs without synchronised batch norm."""
        if get_device() != "cpu" or not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        return MMDistributedDataParallel(revert_sync_batchnorm(model), broadcast_buffers=False)

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimiser; without a GPU in full precision, as mmengine's mixed precision needs one."""
        is_mixed = isinstance(optim_wrapper, dict) and optim_wrapper.get("type") == "AmpOptimWrapper"
        if is_mixed and not has_half_precision():
            self.logger.warning("mixed precision: no GPU here, training in float32")
            scaling = ("loss_scale", "dtype", "use_fsdp")
            optim_wrapper = {key: value for key, value in optim_wrapper.items() if key not in scaling}
            optim_wrapper["type"] = "OptimWrapper"
        return super().build_optim_wrapper(optim_wrapper)

    def build_val_loop(self, loop: Any) -> BaseLoop:
        """Build the loop of validation; without a GPU in full precision."""
        return super().build_val_loop(self._in_possible_precision(loop))

    def build_test_loop(self, loop: Any) -> BaseLoop:
        """Build the loop of testing; without a GPU in full precision."""
        return super().build_test_loop(self._in_possible_precision(loop))

    def _in_possible_precision(self, loop: Any) -> Any:
        if not (isinstance(loop, dict) and loop.get("fp16")) or has_half_precision():
            return loop
        self.logger.warning("half precision: no GPU here, evaluating in float32")
        return {**loop, "fp16": False}

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = "cpu",
        strict: bool = False,
        revise_keys: list[tuple[str, str]] | None = None,
    ) -> dict[str, Any]:
        """Load the weights of a whole segmentor or detector, without running anything the file holds.

        All entries have to fit, but for those outside the backbone when training starts from another data set's weights
        (`load_from` without `resume`): what does not fit starts fresh, and that is logged.

        Args:
            filename: path or https address.
            map_location: for mmengine's own calls; weights are always read to the CPU.
            strict: likewise.
            revise_keys: likewise; prefixes of wrappers are always taken off.

        Returns:
            the checkpoint.

        Raises:
            UserError: the file is missing, would run code, or does not fit.
        """
        checkpoint = self.checkpoints.pop(filename, None) or read_checkpoint(filename, "checkpoint")
        what = f"checkpoint {filename}"
        partly = self._train_loop is not None and not self._resume  # testing has no training loop
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model = unwrapped(self.model)
        weights = checkpoints.weights_of(checkpoint, what)
        adaptation = checkpoints.load_weights(model, weights, what, VARIANT_HINT, network="backbone", partly=partly)
        report = (
            f"{what}: loaded {len(model.state_dict()) - len(adaptation.fresh)} of {len(model.state_dict())} entries"
        )
        self.logger.log(logging.WARNING if adaptation.fresh else logging.INFO,
                        f"{report}; {adaptation}" if adaptation else report)  # fmt: skip
        self._has_loaded = True
        return checkpoint
