"""Building from a config: what it has to have, errors of libraries in one line, and the weights that fit its model."""

import copy
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from torch import nn

from sepvit_lib.dense.console import quiet, without_noise
from sepvit_lib.dense.parts import heads_of
from sepvit_lib.dense.runner import VARIANT_HINT, unwrapped
from sepvit_lib.training import errors
from sepvit_lib.training.checkpoints import load_weights, weights_of
from sepvit_lib.training.errors import OneLineError, Preempted, UserError

COCO_CLASSES = 80  # number of classes of mmdet's heads by default


def check_training_parts(cfg: Config, where: str) -> None:
    """Refuse configs that cannot train. Sets the test's parts to None if they are incomplete: they are not used.

    Args:
        cfg: the config.
        where: names the config in messages.

    Raises:
        UserError: a part is missing.
    """
    needed = ("train_dataloader", "train_cfg", "optim_wrapper")
    if missing := [name for name in needed if not cfg.get(name)]:
        raise UserError(f"{where}: has no {missing[0]}, which training needs; set it, or inherit a config of configs/")
    test = ("test_dataloader", "test_cfg", "test_evaluator")
    if any(cfg.get(name) is None for name in test):  # mmengine takes all of them or none
        cfg.update(dict.fromkeys(test))


def check_test_parts(cfg: Config, where: str) -> None:
    """Refuse configs that name no data to test on.

    Args:
        cfg: the config.
        where: names the config in messages.

    Raises:
        UserError: the part is missing.
    """
    if not cfg.get("test_dataloader"):
        hint = "; set it: test_dataloader = val_dataloader" if cfg.get("val_dataloader") else ", the data to test on"
        raise UserError(f"{where}: has no test_dataloader{hint}")
    cfg.test_cfg = cfg.get("test_cfg") or {}
    cfg.test_evaluator = cfg.get("test_evaluator") or []


# ----------------------------------------------------------------------------------------------------------------------
# Building
# ----------------------------------------------------------------------------------------------------------------------


class BuildError(UserError):
    """A config's parts cannot be built. The log file of the run has the traceback."""


@contextmanager
def build_errors(where: str, is_built: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Report whatever libraries raise while they build the parts of a config, in one line.

    Args:
        where: names the config in messages.
        is_built: whether everything is built, after which errors are not the config's.

    Raises:
        BuildError: a part cannot be built.
    """
    try:
        yield
    except (OneLineError, Preempted):
        raise
    except Exception as error:
        others = (errors.is_transient, errors.is_communication_error, errors.out_of_files, errors.out_of_memory)
        if is_built() or any(is_other(error) for is_other in others):
            raise
        last, found = traceback.extract_tb(error.__traceback__)[-1], ""
        text = f"{type(error).__name__}: {' '.join(str(error).split()) or last.line}"
        handlers = MMLogger.get_current_instance().handlers
        logs = [Path(one.baseFilename) for one in handlers if isinstance(one, logging.FileHandler)]
        for log in filter(Path.is_file, logs):
            with log.open("a", encoding="utf-8") as file:
                file.write("".join(traceback.format_exception(error)))
            found = f"; the traceback is in {log}"
        raise BuildError(
            f"{where}: cannot be built: {text} ({Path(last.filename).name}, line {last.lineno}){found}"
        ) from error


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model, as mmengine's runner does."""
    model = copy.deepcopy(cfg.model)
    if cfg.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", cfg.data_preprocessor)
    return MODELS.build(model)


def check_weights(model: nn.Module, checkpoint: dict[str, Any], what: str) -> None:
    """Load a checkpoint into a model. Refuse one that does not fit.

    Args:
        model: the model, whose weights are replaced.
        checkpoint: the checkpoint.
        what: flag and path, for messages.

    Raises:
        UserError: the checkpoint does not fit.
    """
    load_weights(unwrapped(model), weights_of(checkpoint, what), what, variant_hint=VARIANT_HINT, network="backbone")


def entries_of_classes(cfg: Config) -> set[str]:
    """Names of the entries of a model's state dict that depend on the classes: whose shape depends on their number."""
    other = copy.deepcopy(cfg)
    for _, head in heads_of(other):
        head["num_classes"] = head.get("num_classes", COCO_CLASSES) + 1
        if head.get("out_channels") is not None:
            head["out_channels"] = head["num_classes"]
    with warnings.catch_warnings(), quiet(), without_noise():
        warnings.simplefilter("ignore")
        usual, changed = (build_model(one).state_dict() for one in (cfg, other))
    return {name for name, value in usual.items() if name not in changed or value.shape != changed[name].shape}
