"""Build models from a config. Check its required parts and the weights, and report library errors in one line."""

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from sepvit_lib.common import errors
from sepvit_lib.common.errors import OneLineError, Preempted, UserError
from sepvit_lib.mm.config_lookup import heads_of
from sepvit_lib.mm.console import log_files, quiet, without_noise
from sepvit_lib.mm.runner import VARIANT_HINT, unwrapped
from sepvit_lib.run.checkpoints import load_weights, weights_of

COCO_CLASSES = 80  # mmdet's heads default to this num_classes


def check_training_parts(cfg: Config, where: str) -> None:
    """Refuse configs that cannot train. If any test setting is missing, all of them become None: training needs none.

    Args:
        cfg: the config.
        where: name of the config in messages.

    Raises:
        UserError: a part is missing.
    """
    needed = ("train_dataloader", "train_cfg", "optim_wrapper")
    if missing := [name for name in needed if not cfg.get(name)]:
        raise UserError(f"{where}: has no {missing[0]}, which training needs; set it, or inherit from configs/")
    test = ("test_dataloader", "test_cfg", "test_evaluator")
    if any(cfg.get(name) is None for name in test):  # mmengine requires all of them or none
        cfg.update(dict.fromkeys(test))


def check_test_parts(cfg: Config, where: str) -> None:
    """Refuse configs without test data. `test_cfg` and `test_evaluator` default to empty.

    Args:
        cfg: the config.
        where: name of the config in messages.

    Raises:
        UserError: there is no `test_dataloader`.
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
    """Part of a config cannot be built. The run's log file contains the traceback."""


@contextmanager
def build_errors(where: str, is_built: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Report errors that libraries raise while building the parts of a config, in one line.

    Args:
        where: name of the config in messages.
        is_built: returns whether building is complete. Later errors, not due to the config, are raised unchanged.

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
        for log in filter(Path.is_file, log_files()):
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
    """Load a checkpoint into a model. Refuse a checkpoint that does not fit.

    Args:
        model: the model, whose weights are replaced.
        checkpoint: the checkpoint.
        what: flag and path of the checkpoint, for messages.

    Raises:
        UserError: the checkpoint does not fit.
    """
    load_weights(unwrapped(model), weights_of(checkpoint, what), what, variant_hint=VARIANT_HINT, network="backbone")


def entries_of_classes(cfg: Config) -> set[str]:
    """Names of the state dict entries whose shape depends on the number of classes."""
    other = copy.deepcopy(cfg)
    for _, head in heads_of(other):
        head["num_classes"] = head.get("num_classes", COCO_CLASSES) + 1
        if head.get("out_channels") is not None:
            head["out_channels"] = head["num_classes"]
    with warnings.catch_warnings(), quiet(), without_noise():
        warnings.simplefilter("ignore")
        usual, changed = (build_model(one).state_dict() for one in (cfg, other))
    return {name for name, value in usual.items() if name not in changed or value.shape != changed[name].shape}
