"""mmengine's runner with support for several CPU processes, and safe reading and strict loading of checkpoints."""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from sepvit_lib.mm.console import console, quiet, without_noise
from sepvit_lib.mm.image_loading import use_checked_loading
from sepvit_lib.mm.mmengine_private import read_checkpoint
from sepvit_lib.run.checkpoints import load_weights, weights_of

VARIANT_HINT = "use that variant's config, or a different checkpoint"


def has_half_precision() -> bool:
    """Whether mmengine can compute in half precision here. It needs a GPU other than Apple's (mps).

    On CPUs, mmengine would evaluate in bfloat16, and could not train.
    """
    return get_device() not in ("cpu", "mps")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the segmentor or detector inside the wrappers of data parallelism and test-time augmentation."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def uses_half_precision(cfg: Config) -> bool:
    """Whether a config trains or evaluates in half precision."""
    loops = [cfg.get(name) or {} for name in ("val_cfg", "test_cfg")]
    is_mixed = (cfg.get("optim_wrapper") or {}).get("type") == "AmpOptimWrapper"
    return is_mixed or any(loop.get("fp16") for loop in loops)


def in_float32(cfg: Config) -> Config:
    """Return a copy of a config that computes in float32."""
    cfg = copy.deepcopy(cfg)
    for settings in (cfg.get("val_cfg"), cfg.get("test_cfg")):
        (settings or {}).pop("fp16", None)
    if (cfg.get("optim_wrapper") or {}).get("type") == "AmpOptimWrapper":
        for name in ("loss_scale", "dtype", "use_fsdp"):
            cfg.optim_wrapper.pop(name, None)
        cfg.optim_wrapper.type = "OptimWrapper"
    return cfg


class DenseRunner(Runner):
    """Train and test a segmentor or detector, on GPUs, or in several processes on CPUs.

    Attributes:
        checkpoints: checkpoints that were already read, by path.
    """

    checkpoints: dict[str, dict[str, Any]]

    @classmethod
    def from_config(cls, cfg: Config, checkpoints: dict[str, dict[str, Any]] | None = None) -> "DenseRunner":
        """Build the runner of a config.

        Args:
            cfg: the config.
            checkpoints: checkpoints that were already read, by path.
        """
        use_checked_loading(cfg)
        is_impossible = uses_half_precision(cfg) and not has_half_precision()
        runner = cls.from_cfg(in_float32(cfg) if is_impossible else cfg)
        runner.checkpoints = checkpoints or {}
        if cfg.get("load_from"):  # else it would warn of random weights, although the checkpoint replaces them
            unwrapped(runner.model).backbone.is_init = True  # type: ignore[union-attr]
        console.level = logging.NOTSET
        if is_impossible:
            runner.logger.warning("half precision: no GPU here, computing in float32")
        runner.logger.info(f"versions, config and hooks are in {runner.logger.log_file}")
        return runner

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build the logger. Building the runner logs hundreds of lines, which go to the log file only."""
        logger = super().build_logger(*args, **kwargs)
        console.attach(logger)
        console.level = logging.WARNING
        return logger

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """Build the visualizer under this run's name, so that it is not shared with an earlier run in this process."""
        named = {**visualizer, "name": self.experiment_name} if isinstance(visualizer, dict) else visualizer
        return super().build_visualizer(named)

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> DataLoader:
        """Build a data loader."""
        with without_noise():
            return Runner.build_dataloader(*args, **kwargs)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """Build an evaluator. Processes exchange results through the log's folder, not through the current one."""
        with without_noise():
            built = super().build_evaluator(evaluator)
        for i, metric in enumerate(built.metrics):
            if metric.collect_device == "cpu" and metric.collect_dir is None:
                metric.collect_dir = str(Path(self.log_dir) / f"collected_{i}")
        return built

    def set_randomness(self, seed: int | None, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """Seed everything. GPU operations that have no deterministic implementation warn instead of ending the run."""
        super().set_randomness(seed, diff_rank_seed, deterministic)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Move the model to its device and wrap it for data parallelism. On CPUs, batch norm is not synchronised."""
        if get_device() != "cpu" or not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        unused = (model_wrapper_cfg or {}).get("find_unused_parameters", self.cfg.get("find_unused_parameters", False))
        return MMDistributedDataParallel(
            revert_sync_batchnorm(model), broadcast_buffers=False, find_unused_parameters=unused
        )

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimiser wrapper."""
        with quiet():  # it logs every parameter
            return super().build_optim_wrapper(optim_wrapper)

    def load_or_resume(self) -> None:
        """Load the weights that the config names, if any."""
        if self.cfg.get("load_from"):
            self.load_checkpoint(self.cfg.load_from)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load the weights of a whole segmentor or detector, without running any code in the file.

        All entries must match, unless a new run starts from the weights (`load_from` without `resume`). In this case,
        mismatched entries outside the backbone stay randomly initialised, with a warning.

        Args:
            filename: path or https URL.
            *args: unused; mmengine passes them.
            **kwargs: unused. Weights are always loaded on the CPU, and prefixes of model wrappers are always removed.

        Returns:
            the checkpoint.

        Raises:
            UserError: the file is missing, would run code, or does not match.
        """
        what = f"checkpoint {filename}"
        checkpoint = self.checkpoints.pop(filename, None) or read_checkpoint(filename, what)
        is_new_training = self.cfg.get("train_cfg") is not None and not self.cfg.get("resume")
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        report = load_weights(
            unwrapped(self.model),
            weights_of(checkpoint, what),
            what,
            variant_hint=VARIANT_HINT,
            network="backbone",
            partly=is_new_training,
        )
        self.logger.log(logging.WARNING if report.is_partial else logging.INFO, f"{what}: {report}")
        return checkpoint
