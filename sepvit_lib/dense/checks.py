"""Checks of a config before anything is written: its parts are built without their data, and discarded."""

import copy
import difflib
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    VISBACKENDS,
    VISUALIZERS,
    Registry,
)
from mmengine.runner import Runner
from torch import nn

from sepvit_lib.dense.backbone import SepViTBackbone
from sepvit_lib.dense.console import quiet, without_noise
from sepvit_lib.dense.loading import use_checked_types
from sepvit_lib.dense.mmengine_adapter import innermost_build
from sepvit_lib.dense.options import (
    OF_TYPED,
    SIMILAR,
    accepted_arguments,
    registered,
    registered_names,
    text_for_number,
)
from sepvit_lib.dense.parts import heads_of, resolve
from sepvit_lib.dense.runner import VARIANT_HINT, unwrapped, without_mixed_precision
from sepvit_lib.training.checkpoints import load_weights, weights_of
from sepvit_lib.training.errors import OneLineError, UserError, out_of_memory

LOOP_TYPES = ("IterBasedTrainLoop", "EpochBasedTrainLoop")  # of `train_cfg`, by its key `by_epoch`
COCO_CLASSES = 80  # number of classes of mmdet's heads by default
PLAIN_SAMPLERS = ("DefaultSampler", "InfiniteSampler")  # they need nothing of the data but its length

# ----------------------------------------------------------------------------------------------------------------------
# Parts that a config has to have
# ----------------------------------------------------------------------------------------------------------------------


def check_training_parts(cfg: Config, where: str) -> None:
    """Refuse configs that cannot train. Sets parts that are not used to None.

    A config without validation trains without it.

    Args:
        cfg: the config.
        where: names the config in messages.

    Raises:
        UserError: a part is missing.
    """
    needed = ("train_dataloader", "train_cfg", "optim_wrapper")
    if missing := [name for name in needed if not cfg.get(name)]:
        raise UserError(f"{where}: has no {missing[0]}, which training needs; set it, or inherit a config of configs/")
    lengths = {"EpochBasedTrainLoop": "max_epochs", "IterBasedTrainLoop": "max_iters"}
    length = lengths.get(cfg.train_cfg.get("type") or LOOP_TYPES[bool(cfg.train_cfg.get("by_epoch"))])
    if length and length not in cfg.train_cfg:
        raise UserError(f"{where}: train_cfg has no {length}, the length of the training")
    validation = ("val_dataloader", "val_cfg", "val_evaluator")
    given = [name for name in validation if cfg.get(name) is not None]
    if given and len(given) < len(validation):
        missing = [name for name in validation if name not in given]
        problem = f"has {' and '.join(given)}, but no {' and no '.join(missing)}"
        raise UserError(f"{where}: {problem}; set all three, or none to train without validation")
    test = ("test_dataloader", "test_cfg", "test_evaluator")
    is_whole = all(cfg.get(name) is not None for name in test)
    for name in (*(() if given else validation), *(() if is_whole else test)):
        cfg[name] = None


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
# Errors of parts
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def config_errors(cfg: Config, where: str, place: str) -> Iterator[None]:
    """Report an error of building a part of a config in one line, which names the innermost part.

    Args:
        cfg: the config.
        where: names the config in messages.
        place: the part's dotted key.

    Raises:
        UserError: the part cannot be built.
    """
    try:
        yield
    except OneLineError:
        raise
    except Exception as error:  # classes of users and libraries may raise anything for arguments they do not expect
        if out_of_memory(error):
            raise
        build = innermost_build(error)
        if build is not None:
            place = place_of(cfg.to_dict(), build[0]) or place
        raise UserError(f"{where}: {place}: {_described(error, build)}") from error


def _described(error: Exception, build: tuple[Mapping[str, Any], Registry] | None) -> str:
    """An error of building a part, in one line: what it says, what might be meant, and where it was raised."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if build is not None:
        part, registry = build
        if match := re.match(r"(\S+) is not in the .* registry", text):
            return f"unknown type {match[1]}{did_you_mean(match[1], registered_names(registry))}"
        if 'must contain the key "type"' in text:
            return f"has no type, the class to build with {', '.join(map(str, part)) or 'nothing'}"
        built = registered(registry, part["type"]) if isinstance(part.get("type"), str) else part.get("type")
        if built is not None and (match := re.search(r"got an unexpected keyword argument '(\w+)'", text)):
            return f"{part['type']} takes no {match[1]}{did_you_mean(match[1], accepted_arguments(built) or ())}"
        if built is not None and isinstance(error, TypeError) and (name := text_for_number(built, part)):
            return f"{name}={part[name]}: takes a number"
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = text or f"`{place.line}` does not hold" if isinstance(error, AssertionError) else text
    return f"{text or 'failed'} ({type(error).__name__} in {Path(place.filename).name}, line {place.lineno})"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Known names similar to an unknown one, as the end of a message; "" if there are none."""
    similar = difflib.get_close_matches(name, sorted(known), 2, SIMILAR)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def place_of(whole: Mapping[str, Any], part: Mapping[str, Any]) -> str | None:
    """Find a part of a config. Returns its dotted key; None if the config does not have it.

    Args:
        whole: the config, of plain dicts and lists.
        part: the part, perhaps with more keys than the config has.
    """
    found = [
        (len(node), place)
        for place, node in _typed(whole)
        if node["type"] == part.get("type")
        and all(key in part and _equal(part[key], value) for key, value in node.items())
    ]
    return max(found, key=lambda entry: entry[0])[1] if found else None  # of equal ones, the first


def _typed(node: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the dicts of a config that have a `type`, after their dotted keys."""
    if isinstance(node, Mapping):
        if "type" in node:
            yield place, node
        children = list(node.items())
    else:
        children = list(enumerate(node)) if isinstance(node, (list, tuple)) else []
    for key, child in children:
        yield from _typed(child, f"{place}.{key}".lstrip("."))


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # arrays
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Rehearsal
# ----------------------------------------------------------------------------------------------------------------------


def rehearse(cfg: Config, where: str, *loaders: str) -> nn.Module:
    """Build the parts of a config without their data and discard them, so that mistakes are found before a run starts.

    Args:
        cfg: the config. Its loading becomes checked.
        where: names the config in messages.
        *loaders: names of the data loaders that will be used: 'train_dataloader', …. With that one, the optimiser and
            the schedules are built too.

    Returns:
        the model, for `check_weights`.

    Raises:
        UserError: a part cannot be built, or pretrained weights do not fit.
    """
    use_checked_types(cfg)
    with warnings.catch_warnings(), quiet(), without_noise():
        warnings.simplefilter("ignore")
        for place, part, registry in _later_parts(cfg, loaders):
            check_arguments(part, registry, where, place)
        with config_errors(cfg, where, "model"):
            model = build_model(cfg)
        check_shapes(model, where)
        for name in loaders:
            with config_errors(cfg, where, name):
                _build_loader(cfg[name])
        if "train_dataloader" in loaders:
            with config_errors(cfg, where, "optim_wrapper"):
                optimiser = build_optim_wrapper(model, without_mixed_precision(copy.deepcopy(cfg.optim_wrapper)))
            with config_errors(cfg, where, "param_scheduler"):
                _build_schedules(cfg, optimiser)
        backbone = unwrapped(model).backbone
        if isinstance(backbone, SepViTBackbone):
            backbone.load_pretrained()
    return model


def check_weights(model: nn.Module, checkpoint: dict[str, Any], what: str, partly: bool = False) -> None:
    """Refuse a checkpoint that does not fit a model.

    Args:
        model: the model, whose weights are replaced.
        checkpoint: the checkpoint.
        what: flag and path, for messages.
        partly: whether entries outside the backbone may differ.

    Raises:
        UserError: the checkpoint does not fit.
    """
    load_weights(
        unwrapped(model),
        weights_of(checkpoint, what),
        what,
        variant_hint=VARIANT_HINT,
        network="backbone",
        partly=partly,
    )


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


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model, as mmengine's runner does."""
    model = copy.deepcopy(cfg.model)
    if cfg.get("data_preprocessor") is not None:
        model.setdefault("data_preprocessor", cfg.data_preprocessor)
    return MODELS.build(model)


def check_shapes(model: nn.Module, where: str) -> None:
    """Pass an image through a model with a SepViT: its parts may expect other numbers of channels from each other.

    Raises:
        UserError: they do.
    """
    inner = unwrapped(model)
    backbone = getattr(inner, "backbone", None)
    if not isinstance(backbone, SepViTBackbone):
        return
    inner = revert_sync_batchnorm(copy.deepcopy(inner)).eval()  # synchronised ones need GPUs
    entered = ["backbone"]
    for name, part in inner.named_children():
        part.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
    images = torch.zeros(1, 3, 64, 64)
    try:
        with torch.no_grad():
            inner.extract_feat(images)
            if hasattr(inner, "decode_head"):  # the heads of detectors need more than images
                inner(images, mode="predict")
    except Exception as error:  # whatever the parts raise for shapes that they do not expect
        channels = ", ".join(str(backbone.embed_dims[stage]) for stage in backbone.out_indices)
        maps = f"the backbone returns {len(backbone.out_indices)} maps, of {channels} channels"
        raise UserError(f"{where}: model.{entered[-1]}: {_described(error, None)}; {maps}") from error


def _build_loader(loader: Any) -> None:
    """Build a data loader over a data set that does not read its annotations."""
    loader = copy.deepcopy(loader)
    if isinstance(loader.get("dataset"), dict):
        DATASETS.build(_lazy(loader["dataset"]))
    if loader.get("sampler", {}).get("type") in PLAIN_SAMPLERS:
        Runner.build_dataloader({**loader, "dataset": [0] * 100}, seed=0)


def _lazy(dataset: Any) -> Any:
    """Set `lazy_init` in a data set and those inside it, so that they do not read their annotations."""
    if isinstance(dataset, (list, tuple)):
        return [_lazy(entry) for entry in dataset]
    if not isinstance(dataset, dict):
        return dataset
    dataset = {key: _lazy(value) if key in ("dataset", "datasets") else value for key, value in dataset.items()}
    kind = resolve(DATASETS, dataset)
    accepted = accepted_arguments(kind) if kind is not None else None
    return {**dataset, "lazy_init": True} if accepted is not None and "lazy_init" in accepted else dataset


def _build_schedules(cfg: Config, optimiser: Any) -> None:
    schedules = cfg.get("param_scheduler") or []
    for schedule in [schedules] if isinstance(schedules, dict) and "type" in schedules else schedules:
        if isinstance(schedule, dict):  # and not the name of one of several optimisers
            plain = {key: value for key, value in schedule.items() if key != "convert_to_iter_based"}
            PARAM_SCHEDULERS.build(plain, default_args=dict(optimizer=optimiser))


def _later_parts(cfg: Config, loaders: Sequence[str]) -> Iterator[tuple[str, Any, Registry]]:
    """Yield parts that the rehearsal does not build, or late: their dotted keys, the parts and their registries."""
    for loader in loaders:
        stage = loader.removesuffix("_dataloader")
        loop = dict(cfg.get(f"{stage}_cfg") or {})
        if "by_epoch" in loop:
            loop["type"] = LOOP_TYPES[bool(loop.pop("by_epoch"))]
        yield f"{stage}_cfg", loop, LOOPS
        yield f"{loader}.sampler", cfg[loader].get("sampler"), DATA_SAMPLERS
        evaluators = cfg.get(f"{stage}_evaluator") or []
        if isinstance(evaluators, dict) and "metrics" in evaluators:  # such as mmdet's for several data sets
            yield f"{stage}_evaluator", {"type": "Evaluator", **evaluators}, EVALUATOR
            evaluators = evaluators["metrics"]
        for metric in [evaluators] if isinstance(evaluators, dict) else evaluators:
            yield f"{stage}_evaluator", metric, METRICS
    if "train_dataloader" in loaders:
        yield "optim_wrapper.optimizer", cfg.optim_wrapper.get("optimizer"), OPTIMIZERS
    for name, hook in (cfg.get("default_hooks") or {}).items():
        yield f"default_hooks.{name}", hook, HOOKS
    for i, hook in enumerate(cfg.get("custom_hooks") or []):
        yield f"custom_hooks.{i}", hook, HOOKS
    yield "log_processor", {"type": "LogProcessor", **(cfg.get("log_processor") or {})}, LOG_PROCESSORS
    visualizer = cfg.get("visualizer") or {}
    yield "visualizer", visualizer, VISUALIZERS
    for i, backend in enumerate(visualizer.get("vis_backends") or []):
        yield f"visualizer.vis_backends.{i}", backend, VISBACKENDS


def check_arguments(part: Any, registry: Registry, where: str, place: str) -> None:
    """Check the type and the names of the arguments of a part of a config that is not built yet.

    Args:
        part: the part.
        registry: the registry that builds it.
        where: names the config in messages.
        place: the part's dotted key.

    Raises:
        UserError: the type is unknown, or takes no such argument.
    """
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return  # an object, or a class: building it tells
    built = registered(registry, part["type"])
    if built is None:
        hint = did_you_mean(part["type"], registered_names(registry))
        raise UserError(f"{where}: {place}: unknown type {part['type']}{hint}")
    accepted = accepted_arguments(built)
    if accepted is None:
        return
    for key in part:
        if key not in accepted | OF_TYPED:
            raise UserError(f"{where}: {place}: {part['type']} takes no {key}{did_you_mean(key, accepted)}")
    if name := text_for_number(built, part):
        raise UserError(f"{where}: {place}.{name}={part[name]}: takes a number")
