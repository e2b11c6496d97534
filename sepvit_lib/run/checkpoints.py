"""Download, read, check, load and write checkpoints. A failed write never destroys the previous checkpoint."""

import argparse
import copy
import hashlib
import http.client
import os
import re
import shutil
import socket
import sys
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from timm.models import adapt_input_conv
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from sepvit import (
    Adaptation,
    SepViTStages,
    adapt_state_dict,
    default_settings,
    entries_under,
    keep_settings,
    mark_adapted,
    settings_of,
    variant_of,
)
from sepvit_lib.common.class_names import canonical
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.common.processes import is_main_process, on_processes, print_line
from sepvit_lib.common.saved_settings import settings_in
from sepvit_lib.common.storage import flush_folder, write_file
from sepvit_lib.run.checkpoint_names import CheckpointNames

MODEL_KEYS, EMA_KEYS = ("model", "state_dict"), ("model_ema", "state_dict_ema")  # the second of each pair is timm's
CHUNK_SIZE = 1 << 20  # bytes read at a time
NETWORK_TIMEOUT = 30.0  # seconds that a server may take to respond
DIRECTORY = 0x10  # attribute of a zip file's entry
HEADER_SIZE = 512  # bytes at the start of a file that identify its format

# `data_classes` of `read_checkpoint` for NumPy arrays and scalars. The functions that unpickle arrays and scalars are
# private in NumPy 2, so `__reduce__` is used to get them. None of the entries can run arbitrary code.
NUMPY_CLASSES: tuple[Any, ...] = (
    np.empty(0).__reduce__()[0],
    np.float64(0).__reduce__()[0],
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"),
)

# Files often mistaken for checkpoints: a pattern for their first bytes, and the end of the error message.
FOREIGN_FILES = {
    rb"\s*<(!doctype|html|head|body|\?xml|!--)": "an HTML page; download the file from its direct URL",
    rb"version https://git-lfs": "a git-lfs pointer; fetch the file with `git lfs pull`",
}

# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str, what: str, data_classes: Sequence[Any] = ()) -> dict[str, Any]:
    """Read a checkpoint from a path or an https address, without running any code it contains.

    Args:
        path: path or https address.
        what: flag and path, for messages.
        data_classes: classes allowed besides tensors and Python's containers, as for
            `torch.serialization.safe_globals`. `argparse.Namespace`, which contains the settings of published
            checkpoints, is always allowed.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or contains code.
    """
    is_download, file = path.startswith("https://"), Path(path)
    try:
        if is_download:
            file = _downloaded(path)
        # Pass the allow-list on every read: timm and mmengine reset the global one.
        with torch.serialization.safe_globals([argparse.Namespace, *data_classes]):
            checkpoint = _load(file)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{what}: no such file") from None
    except PermissionError:
        raise UserError(f"{what}: cannot be read (permission denied)") from None
    except Exception as error:  # torch.load does not document what it raises for files that are not checkpoints
        if is_download:
            file.unlink(missing_ok=True)  # to download it again
        if refused := refused_class(error):
            raise UserError(
                f"{what}: refused, it contains {refused}, which could run code; save only tensors"
            ) from None
        raise UserError(f"{what}: not a checkpoint, or a truncated one") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{what}: not a checkpoint, but a {type(checkpoint).__name__}")
    return checkpoint


def refused_class(error: Exception) -> str | None:
    """Find the name of the class that unpickling refused in the error's text. Returns None for other errors."""
    match = re.search(r"nsupported (?:global|class)\W+(?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
    return match[1] if match else None


def _check(path: Path) -> None:
    """Refuse a file that is damaged or not a checkpoint, judging by its first bytes and its checksums."""
    header = _header(path)
    for pattern, kind in FOREIGN_FILES.items():
        if re.match(pattern, header, re.IGNORECASE):
            raise UserError(f"not a checkpoint, but {kind}")
    if problem := damage(path) if has_checks(path) else None:
        raise UserError(f"not a checkpoint, or a damaged one ({problem}); use another copy")


def _load(path: Path) -> Any:
    _check(path)
    if _is_safetensors(path):
        return safetensors.torch.load(path.read_bytes())
    with path.open("rb") as content:  # torch.load cannot open a path that is not UTF-8
        return torch.load(content, map_location="cpu", weights_only=True)


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_SIZE)


def _is_safetensors(path: Path) -> bool:
    """Whether a file is in safetensors format, by its suffix or its header: a length and a JSON object."""
    return path.suffix == ".safetensors" or re.match(rb".{6}\0\0\{\s*[\"}]", _header(path), re.DOTALL) is not None


def has_checks(path: Path) -> bool:
    """Whether a checkpoint's format makes damage detectable: a zip archive (torch.save since 1.6) or safetensors."""
    return _header(path).startswith(b"PK") or _is_safetensors(path)


def damage(path: Path) -> str | None:
    """Describe the damage to a checkpoint's file; None if there is none.

    torch.save writes checksums (CRC-32); safetensors records the lengths of its entries.
    """
    try:
        if _is_safetensors(path):
            with safetensors.safe_open(path, framework="pt"):
                return None
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():  # testzip() would look entries up by name, and miss duplicates
                if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & DIRECTORY:
                    return f"{entry.filename} was not written by torch.save"
                with archive.open(entry) as file:  # reading verifies the checksum
                    while file.read(CHUNK_SIZE):
                        pass
        # torch.load's own reader checks the zip directory more strictly. It is private: torch 2.x may drop it.
        if reader := getattr(torch._C, "PyTorchFileReader", None):
            with path.open("rb") as file:
                reader(file)
    # OSError also occurs if another process has deleted the file.
    except (OSError, EOFError, RuntimeError, ValueError, safetensors.SafetensorError, zipfile.BadZipFile) as error:
        return " ".join(str(error).split())[:100]
    return None


def _downloaded(url: str) -> Path:
    """Download a file to torch.hub's folder, once per URL, by one process per node. Returns the file's path.

    Raises:
        UserError: the download fails, the file is not an intact checkpoint, or it does not match the hash in its name.
    """
    address = hashlib.sha256(url.encode()).hexdigest()[:16]  # many files are named checkpoint.pth
    path = Path(torch.hub.get_dir()) / "checkpoints" / address / Path(urllib.parse.urlparse(url).path).name

    def fetch() -> None:
        if path.exists():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                part = Path(folder, path.name)
                with _network_timeout():
                    torch.hub.download_url_to_file(url, str(part), _hash_in(path.name), is_main_process())
                _check(part)
                os.replace(part, path)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(f"download failed ({error}); try again") from None

    on_processes(fetch, os.environ.get("LOCAL_RANK", "0") == "0")
    return path


@contextmanager
def _network_timeout() -> Iterator[None]:
    """Fail a download whose server stops responding. torch.hub does not set a timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _hash_in(name: str) -> str | None:
    """Prefix of the SHA-256 in a file's name, as in weights-0a1b2c3d.pth; None if there is none."""
    match = re.search(r"-([0-9a-f]{8,})\.\w+$", name)
    # The number in checkpoint-00000018.pth is the global step.
    return match[1] if match and not re.fullmatch(r"checkpoint-\d{8}\.pth", name) else None


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class LoadReport:
    """Result of `load_weights`.

    Attributes:
        total: number of entries in the model's state dict.
        adaptation: entries adapted to a different image size or form.
        channels: entries adapted to a different number of image channels.
        classifier: classifier entries that stay randomly initialised because the number of classes differs.
        reinitialised: entries outside the SepViT that stay randomly initialised.
        dropped: entries of the checkpoint that the model does not have.
        settings: settings of the SepViT that differ, with the checkpoint's values.
    """

    total: int
    adaptation: Adaptation = field(default_factory=Adaptation)
    channels: list[str] = field(default_factory=list)
    classifier: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)

    @property
    def loaded(self) -> int:
        """Number of entries loaded unchanged."""
        adapted = len(self.adaptation.resampled) + len(self.adaptation.fresh) + len(self.channels)
        return self.total - adapted - len(self.classifier) - len(self.reinitialised)

    @property
    def is_partial(self) -> bool:
        """Whether any entry keeps its random initialisation."""
        return bool(self.adaptation.fresh or self.classifier or self.reinitialised)

    def __str__(self) -> str:
        parts = [f"loaded {self.loaded} of {self.total} entries"]
        if self.settings:
            parts.append(f"trained with {' '.join(self.settings)}")
        if self.adaptation:
            parts.append(f"different image size or form: {self.adaptation}")
        listed = (
            ("different number of channels: adapted", self.channels),
            ("different number of classes: randomly initialised", self.classifier),
            ("randomly initialised", self.reinitialised),
            ("dropped", self.dropped),
        )
        parts += [f"{what} {len(names)}: {', '.join(names)}" for what, names in listed if names]
        return "; ".join(parts)


def weights_of(checkpoint: dict[str, Any], what: str, prefer_ema: bool = False) -> dict[str, Tensor]:
    """Return the model's state dict from a checkpoint or a bare state dict, without the prefixes of wrappers.

    Args:
        checkpoint: returned by `read_checkpoint`.
        what: flag and path, for messages.
        prefer_ema: return the averaged weights if the checkpoint has them.

    Raises:
        UserError: the checkpoint contains no weights.
    """
    keys = (*EMA_KEYS, *MODEL_KEYS) if prefer_ema else (*MODEL_KEYS, *EMA_KEYS)
    found = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), checkpoint)
    weights = _without_wrappers(found)
    if all(name.startswith("model.") for name in weights):  # Lightning modules
        weights = _without_wrappers({name.removeprefix("model."): value for name, value in weights.items()})
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{what}: contains no model weights (expected a state dict, or one under 'model')")
    return keep_settings(weights.items(), found)


RECORD = "save the state dict of the network with torch.save, which records them"


def model_kwargs_of(checkpoint: dict[str, Any], what: str, way_out: str = RECORD) -> dict[str, Any]:
    """Return the arguments that a checkpoint's network was built with, besides its name, size and classes.

    They are in the settings of its run, or recorded in its state dict.

    Args:
        checkpoint: returned by `read_checkpoint`.
        what: flag and path, for messages.
        way_out: what to do if the arguments are unknown, for messages.

    Raises:
        UserError: the checkpoint has neither, and its entries fit windows of any size.
    """
    settings, weights = settings_in(checkpoint), weights_of(checkpoint, what)
    recorded, variant = settings_of(weights), variant_of(weights)
    if settings.get("model_kwargs") or variant is None:
        return dict(settings.get("model_kwargs") or {})
    shows_sizes = any(re.match(r"blocks\.[1-3].*\.win_tokens", name) for name in weights)
    if recorded is None and not settings and not shows_sizes:
        raise UserError(f"{what}: has no settings, and its entries fit windows of any size; {way_out}")
    channels = weights["patch_embeds.0.proj.weight"].shape[1]
    kwargs = recorded if recorded and recorded != default_settings(variant) else {}
    return kwargs if channels == 3 else {**kwargs, "in_chans": channels}


def _without_wrappers(weights: Mapping[Any, Any]) -> dict[str, Any]:
    """Remove the prefixes of data-parallel and compiled networks from the names."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in weights.items()}


def wrong_variant(what: str, held: str | None, wanted: str, way_out: str) -> UserError:
    """Make the error for weights of the wrong variant; `held` is None if they contain no SepViT."""
    if held is None:
        return UserError(f"{what}: contains no SepViT weights (expected {wanted})")
    return UserError(f"{what}: contains {held}, not {wanted}; {way_out}")


def has_averaged_weights(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint contains averaged weights."""
    return any(isinstance(checkpoint.get(key), dict) for key in EMA_KEYS)


def has_both_weights(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint contains both averaged and ordinary weights."""
    return has_averaged_weights(checkpoint) and any(isinstance(checkpoint.get(key), dict) for key in MODEL_KEYS)


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    what: str,
    variant_hint: str,
    classes_hint: str = "use a data set with the same classes",
    *,
    network: str = "",
    new_classifier: bool = False,
    partly: bool = False,
    img_size: tuple[int, int] | None = None,
    settings_hint: str = f"omit {setting('model_kwargs')}",
) -> LoadReport:
    """Adapt a state dict to the model's image size and form (classification or dense), then load it strictly.

    Args:
        model: a SepViT, a model that contains one, or any other model.
        weights: the state dict.
        what: flag and path, for messages.
        variant_hint: the way out if the variant differs, for messages.
        classes_hint: the way out if the number of classes differs, for messages.
        network: name of the SepViT inside `model`; "" if it is `model` itself.
        new_classifier: keep the classifier randomly initialised if the number of classes differs. The SepViT's settings
            may differ from those that the weights record, too, and the number of channels from that of the weights.
        partly: outside the SepViT, keep the random initialisation of entries that the weights lack or have in a
            different shape, and drop entries that the model lacks.
        img_size: image size (H, W) of the weights, None if unknown.
        settings_hint: the way out if settings differ, for messages.

    Raises:
        UserError: the weights differ in settings, variant, number of classes or architecture, or are not finite.
    """
    prefix, recorded = f"{network}." if network else "", settings_of(weights) or {}
    expected = model.state_dict()
    report = LoadReport(len(expected))
    inner = model.get_submodule(network)
    weights = dict(weights)
    if isinstance(inner, SepViTStages):
        own = entries_under(weights, network)
        held, wanted = variant_of(own), variant_of(inner.state_dict())
        if held != wanted:
            raise wrong_variant(what, held, str(wanted), variant_hint)
        if inner.is_dense and recorded.get("window_tokens") == "learned":
            recorded = {**recorded, "window_tokens": "zeros"}  # as published
        report.settings = _differing(recorded, inner.settings())
        if report.settings and not new_classifier:
            raise UserError(f"{what}: was trained with {' '.join(report.settings)}; {settings_hint}")
        report.adaptation = adaptation = adapt_state_dict(own, inner, img_size)
        for names in (adaptation.resampled, adaptation.fresh, adaptation.dropped):
            names[:] = [prefix + name for name in names]
        weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        weights |= {prefix + name: value for name, value in own.items()}
    elif _shapes(weights) != _shapes(expected):
        weights, report.adaptation.resampled = _resized_by_timm(weights, model)
    own_cfg = getattr(model, "default_cfg", {})
    classifier = classifier_of(expected, own_cfg.get("classifier"))
    if new_classifier:
        report.channels = _adapt_channels(weights, expected, own_cfg.get("first_conv"))
        report.classifier = _replace_classifier(weights, expected, classifier)
    if partly:
        _fill_up(weights, expected, prefix, report)
    _check_finite(weights, model, what)
    _check_entries(weights, expected, what, classifier, classes_hint)
    model.load_state_dict(mark_adapted(weights, network))
    return report


def _adapt_channels(
    weights: dict[str, Tensor], expected: Mapping[str, Tensor], layers: str | Sequence[str] | None
) -> list[str]:
    """Adapt first layers for three channels to the model's channels, as timm does. Returns the entries' names."""
    names = [f"{layer}.weight" for layer in ([layers] if isinstance(layers, str) else layers or ())]
    adapted = [name for name in names if name in weights and weights[name].shape[1] == 3 != expected[name].shape[1]]
    for name in adapted:
        weights[name] = adapt_input_conv(expected[name].shape[1], weights[name])
    return adapted


def _differing(recorded: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Recorded settings that differ from a network's, which may have fewer stages."""
    return [
        f"{name}={value}"
        for name, value in recorded.items()
        if (value[: len(own[name])] if isinstance(value, list) else value) != own[name]
    ]


def match_classifier(weights: dict[str, Tensor], model: Any, held: Sequence[str], names: Sequence[str]) -> list[str]:
    """Reorder a classifier's rows so that its class names match those of a model.

    Args:
        weights: the state dict, whose classifier entries are replaced in place.
        model: the model.
        held: names of the classes that the weights were trained on.
        names: names of the model's classes.

    Returns:
        names of the classes that the weights lack. Their rows keep the model's initialisation.
    """
    rows = {canonical(name): index for index, name in enumerate(held)}
    shared = [(index, rows[canonical(name)]) for index, name in enumerate(names) if canonical(name) in rows]
    own, of_held = [list(indices) for indices in zip(*shared)] or ([], [])
    expected = model.state_dict()
    for name in classifier_of(expected, getattr(model, "default_cfg", {}).get("classifier")):
        value = expected[name]
        if name in weights and weights[name].shape == (len(held), *value.shape[1:]):
            matched = value.detach().cpu().clone()
            matched[own] = weights[name][of_held].to(matched)
            weights[name] = matched
    return [name for name in names if canonical(name) not in rows]


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


def _resized_by_timm(weights: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Resize the weights of a timm model other than SepViT (ViT, Swin, …) to the model's image size, if timm can.

    Returns:
        the weights, and the names of the resized entries.
    """
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return weights, []
    try:
        adapted = adapt(dict(weights), model)
    except Exception:  # any type, for weights of a different network, which `_check_entries` reports
        return weights, []
    return adapted, [name for name, value in adapted.items() if name in weights and value.shape != weights[name].shape]


def classifier_of(weights: Mapping[str, Tensor], heads: str | Sequence[str] | None) -> list[str]:
    """Names of the entries of a classifier.

    Args:
        weights: a state dict.
        heads: timm's name of the classifier, or two names for a distilled network, which has two heads.
    """
    prefixes = [heads] if isinstance(heads, str) else heads or []
    return [name for name in weights if name.startswith(tuple(f"{prefix}." for prefix in prefixes))]


def _replace_classifier(
    weights: dict[str, Tensor], expected: dict[str, Tensor], classifier: Sequence[str]
) -> list[str]:
    """Keep the model's classifier if the checkpoint's does not fit. Returns the names of the entries kept."""
    if all(name in weights and weights[name].shape == expected[name].shape for name in classifier):
        return []
    weights |= {name: expected[name] for name in classifier}
    return list(classifier)


def _fill_up(weights: dict[str, Tensor], expected: dict[str, Tensor], prefix: str, report: LoadReport) -> None:
    """Take missing and mismatched entries outside the SepViT from the model, and drop surplus entries."""
    outside = [name for name in expected if not name.startswith(prefix)]
    report.reinitialised = [
        name for name in outside if name not in weights or weights[name].shape != expected[name].shape
    ]
    report.dropped = [name for name in weights if not name.startswith(prefix) and name not in expected]
    for name in report.dropped:
        del weights[name]
    weights |= {name: expected[name] for name in report.reinitialised}


def _check_finite(weights: dict[str, Tensor], model: nn.Module, what: str) -> None:
    """Refuse non-finite parameters. Buffers may contain infinities, as attention masks do."""
    for name, parameter in model.named_parameters():
        value = weights.get(name, parameter)
        if value is not parameter and not value.float().isfinite().all():
            count = int((~value.float().isfinite()).sum())
            raise UserError(
                f"{what}: {name} has non-finite values ({count} of {value.numel()}); use a checkpoint from "
                "before training diverged"
            )


def _check_entries(
    weights: dict[str, Tensor], expected: dict[str, Tensor], what: str, classifier: Sequence[str], classes_hint: str
) -> None:
    """Refuse missing and unexpected entries, and mismatched shapes."""
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} ({names[0]}, …)"
            for kind, names in (("entries are missing", missing), ("are unexpected", unexpected))
            if names
        ]
        raise UserError(f"{what}: different architecture: {', '.join(parts)}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            shapes = f"{name} is {tuple(value.shape)}, the model's {tuple(expected[name].shape)}"
            if name in classifier:
                classes = f"{len(value)} classes instead of {len(expected[name])}"
                raise UserError(f"{what}: {classes} ({shapes}); {classes_hint}")
            raise UserError(f"{what}: does not match this model: {shapes}")


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any], with_lr: bool = False
) -> None:
    """Load an optimiser's state, even if it was saved with a different grouping of the parameters.

    The grouping depends on the weight decay, and on whether window tokens decay, as in the published code. The
    optimiser keeps its own settings (weight decay, betas, …).

    Args:
        optimizer: the optimiser.
        model: the model that it optimises.
        state: the state dict to load.
        with_lr: also load the learning rate.

    Raises:
        ValueError: the state's parameter groups match no known grouping of the model's parameters.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    number = {parameter: i for i, parameter in enumerate(parameters)}
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    groupings = (
        optimizer.param_groups,
        param_groups_weight_decay(model, weight_decay=1.0, no_weight_decay_list=spared),
        param_groups_weight_decay(model, weight_decay=1.0),  # as in the published code
        [{"params": list(model.parameters())}],  # without weight decay
    )
    saved = state["param_groups"]
    sizes = [len(group["params"]) for group in saved]
    grouping = next((groups for groups in groupings if [len(group["params"]) for group in groups] == sizes), None)
    if grouping is None:
        raise ValueError(f"its optimiser has {sum(sizes)} parameters, in groups of {sizes}, not {len(number)}")
    # A state dict numbers the parameters across its groups. Translate to this optimiser's numbering.
    numbers = [number[parameter] for group in grouping for parameter in group["params"]]
    state = {**state, "state": {numbers[i]: value for i, value in state["state"].items()}}
    own_keys = (optimizer.defaults.keys() | {"lr_scale", "params"}) - ({"lr"} if with_lr else set())
    groups = []
    for i, group in enumerate(optimizer.state_dict()["param_groups"]):
        kept = {key: group[key] for key in own_keys & group.keys()}
        others = {key: value for key, value in saved[min(i, len(saved) - 1)].items() if key != "lr_scale"}
        groups.append({**others, **kept})
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():  # fused optimisers need the memory format of the parameter
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and name != "step":
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def hard_link(path: Path, name: str) -> None:
    """Hard-link a file under a second name, replacing any file of that name. Copies where links are unsupported."""
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # the file system has no hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, path.with_name(name))
    temporary.unlink(missing_ok=True)  # os.replace does nothing if both names already link to the file


class CheckpointWriter:
    """Write a run's checkpoints in the background. Training waits only for a copy in memory and for the previous write.

    A checkpoint with several names (numbered, newest, best) is written once and hard-linked. If writing fails, a
    warning is printed and training continues.

    Args:
        folder: the output folder.
        names: names of the checkpoints.

    Attributes:
        failure: why the last checkpoint could not be written; None if it was written.
    """

    def __init__(self, folder: Path, names: CheckpointNames) -> None:
        self.folder = folder
        self.names = names
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._best: dict[str, Any] | None = None  # the best checkpoint, until it is written
        self.failure: str | None = None

    def save(self, checkpoint: dict[str, Any], is_best: bool = False) -> None:
        """Copy a checkpoint, and write it in the background after the previous one."""
        self.wait()
        self._pending = self._executor.submit(self._write, copied(checkpoint), is_best)

    def wait(self) -> None:
        """Wait until everything is written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, checkpoint: dict[str, Any], is_best: bool) -> None:
        names = self.names
        path = self.folder / names.name(checkpoint)
        # The best checkpoint is written first. If the run is killed before the numbered checkpoint exists, the resumed
        # run repeats the epoch and writes both.
        first, *others = [names.best] * is_best + [path.name] + [names.newest] * bool(names.newest)
        self._best = checkpoint if is_best else self._best
        try:
            write_file(self.folder / first, lambda file: torch.save(checkpoint, file))
            for name in others:
                hard_link(self.folder / first, name)
            if not is_best and self._best is not None:
                write_file(self.folder / names.best, lambda file: torch.save(self._best, file))
            self._best = None
            if names.pointer:
                write_file(self.folder / names.pointer, lambda file: file.write(str(path).encode()))
            flush_folder(self.folder)
            for old in names.outdated(names.numbered(self.folder)):
                old.unlink()
            self.failure = None
        except OSError as error:
            self.failure = error.strerror
            print_line(
                f"WARNING: {path} could not be written ({error.strerror}): "
                "the previous checkpoint is kept, training continues"
            )
        else:
            print_line(f"saved {path} (before {names.position_text(checkpoint)})")


def copied(value: Any) -> Any:
    """Copy nested containers and the tensors in them, so that later training steps do not change the copies.

    Tensors are copied to the CPU. The copied tensors are contiguous, as safetensors requires.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        twin = copy.copy(value)  # keeps the class, such as Counter, and its attributes
        for key, entry in value.items():
            twin[key] = copied(entry)
        return twin
    if isinstance(value, (list, tuple)):
        return type(value)(copied(entry) for entry in value)
    return value


def newest_good(folder: Path, names: CheckpointNames) -> Path | None:
    """Return the newest intact checkpoint of a run; None if the run has no checkpoint. Warns of damaged checkpoints.

    Raises:
        UserError: all checkpoints are damaged.
    """
    others = [folder / name for name in (names.newest, names.best) if name]
    candidates = names.numbered(folder) + [path for path in others if path.exists()]
    for path in candidates:
        problem = damage(path)
        if problem is None:
            return path
        print_line(f"WARNING: {path} is damaged ({problem}); using the previous one")
    if candidates:
        raise UserError(f"no checkpoint in {folder} is intact; empty the folder to start a fresh run")
    return None
