"""Checkpoints: fetching, reading and checking them, loading what they hold, writing them so that none is ever lost."""

import argparse
import glob
import hashlib
import http.client
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from tqdm import tqdm

from sepvit import Adaptation, SepViTStages, adapt_state_dict, variant_of
from utils import UserError, flush_folder, is_main_process, on_processes, print_line, write_file

NEWEST, BEST = "checkpoint.pth", "checkpoint_best.pth"
MODEL_KEYS, EMA_KEYS = ("model", "state_dict"), ("model_ema", "state_dict_ema")  # the latter ones are timm's
NUMBERED = "checkpoint-{:08}.pth"  # by the steps taken
STALL = 30  # seconds without a byte, after which a download begins again
ATTEMPTS = 5
PART = 1 << 20  # bytes read at a time
DIRECTORY = 0x10  # attribute of a zip file's entry
BEGINNING = 512  # bytes of a file by which it is told what it is

# Files that are taken for checkpoints, by how they begin, and what to do about each.
FOREIGN_FILES = {
    rb"\s*<(!doctype|html|head|body|\?xml|!--)": "an HTML page, not the file; download that by its direct address",
    rb"version https://git-lfs": "a pointer of git-lfs, not the file; fetch that by `git lfs pull`",
    rb"\x1f\x8b": "compressed by gzip; unpack it",
    rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": "compressed; unpack it",
    rb"\x89HDF": "an HDF5 file, as of Keras; convert it to a state dict of PyTorch",
    rb"\x93NUMPY": "a NumPy array; convert it to a state dict of PyTorch",
    rb"\x89PNG|\xff\xd8\xff": "an image",
    rb".{257}ustar": "a tar archive; unpack it",
    rb"$": "an empty file",
}

# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str, flag: str, data_classes: Sequence[Any] = ()) -> dict[str, Any]:
    """Read a checkpoint from a path or an https address, without running anything it holds.

    Args:
        path: path or https address.
        flag: the command's flag that named it, for messages.
        data_classes: what it may hold beside tensors and Python's own containers, as for
            `torch.serialization.safe_globals`. Checkpoints of the published code hold their settings as a Namespace,
            which is always taken.

    Raises:
        UserError: it is missing, truncated, no checkpoint, or would run code.
    """
    what = f"{flag} {path}"
    if re.match(r"[a-z][a-z0-9+.-]*://", path) and not path.startswith("https://"):
        raise UserError(f"{what}: takes a path or an https address; download it, or name its https address")
    try:
        # named at each reading: timm and mmengine also allow classes, and take them back for all behind their own
        with torch.serialization.safe_globals([argparse.Namespace, *data_classes]):
            checkpoint = _fetch(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{what}: no such file") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{what}: damaged, {error}; take another one") from None
    except PermissionError:
        raise UserError(f"{what}: cannot be read (permission denied)") from None
    except Exception as error:  # what torch.load raises on files that are no checkpoints is not documented, and varied
        if match := re.search(r"nsupported (?:global|class)\W+(?:GLOBAL )?([\w.]+)", str(error), re.I):
            raise UserError(f"{what}: refused, it holds {match[1]}, which could run code; save tensors only") from None
        raise UserError(f"{what}: not a checkpoint, or a truncated one") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{what}: not a checkpoint, it holds a {type(checkpoint).__name__}")
    return checkpoint


def _fetch(path: str) -> Any:
    is_download = path.startswith("https://")
    file = _downloaded(path) if is_download else Path(path)
    if file.exists() and not file.is_file() and not file.is_dir():
        raise UserError(f"{path}: a pipe or a device, no file; name a file")
    if kind := foreign_kind(file):
        raise UserError(f"{path}: no checkpoint, but {kind}")
    if not is_download and has_checks(file) and (problem := damage(file)):
        raise zipfile.BadZipFile(problem)
    if _is_safetensors(file):
        return safetensors.torch.load(file.read_bytes())
    with file.open("rb") as content:  # PyTorch opens no file whose name is not UTF-8
        return torch.load(content, map_location="cpu", weights_only=True)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(BEGINNING)


def _is_archive(path: Path) -> bool:
    """Whether a file begins as torch.save's do, and not as those of its first years, which have no checksums."""
    return _beginning(path).startswith(b"PK")


def _is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors, by its name, or as it begins with the length of a JSON object, and that."""
    return path.suffix == ".safetensors" or re.match(rb".{6}\0\0\{\s*[\"}]", _beginning(path), re.DOTALL) is not None


def foreign_kind(path: Path) -> str | None:
    """What a file is that is no checkpoint, and what to do about it; None where it may be one."""
    beginning = _beginning(path)
    for pattern, kind in FOREIGN_FILES.items():
        if re.match(pattern, beginning, re.DOTALL | re.IGNORECASE):
            return kind
    if not beginning.startswith(b"PK"):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError):
        return None  # a truncated checkpoint, most likely
    if "constants.pkl" in names:
        return "a TorchScript model; save its weights: torch.save(torch.jit.load(PATH).state_dict(), OTHER_PATH)"
    if "data.pkl" not in names:
        arrays = names and all(name.endswith(".npy") for name in names)
        return "NumPy's arrays; convert them to a state dict of PyTorch" if arrays else "a zip archive; unpack it"
    return None


def has_checks(path: Path) -> bool:
    """Whether a checkpoint's file tells if it is whole. Those of PyTorch's first years do not."""
    return _is_archive(path) or _is_safetensors(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, by the checksums (CRC-32) that torch.save's hold, or the lengths of the
    entries of safetensors' file; None where it is whole."""
    if _is_safetensors(path):
        try:
            with safetensors.safe_open(path, framework="pt"):
                return None
        except (safetensors.SafetensorError, OSError) as error:
            return " ".join(str(error).split())[:100]
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():  # not testzip(), which takes entries by names, and of two alike the last
                if not _is_whole(archive, entry):
                    return f"wrong checksum of {entry.filename.partition('/')[2]}"
        if reader := getattr(torch._C, "PyTorchFileReader", None):  # PyTorch's own, of whatever version
            with path.open("rb") as file:
                reader(file)  # what torch.load opens it by; its demands on a directory are higher
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        return "truncated" if "not a zip file" in str(error) else " ".join(str(error).split())[:100]
    return None


def _is_whole(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is of the kind that torch writes, with the content its checksum is of."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & DIRECTORY:
        return False
    try:
        with archive.open(entry) as file:
            while file.read(PART):
                pass
    except (zipfile.BadZipFile, EOFError):
        return False
    return True


def _downloaded(url: str) -> Path:
    """The path of a file from the web, kept among torch.hub's, by its address; one process of a node downloads it.

    Raises:
        UserError: it cannot be downloaded, or does not have the hash in its name.
    """
    address = hashlib.sha256(url.encode()).hexdigest()[:16]  # many files have the name checkpoint.pth
    path = Path(torch.hub.get_dir()) / "checkpoints" / address / Path(urllib.parse.urlparse(url).path).name

    def fetch() -> None:
        if not path.exists() or _has_wrong_hash(path, path.name):
            download(url, path)

    on_processes(fetch, os.environ.get("LOCAL_RANK", "0") == "0")
    return path


def _has_wrong_hash(path: Path, name: str) -> bool:
    """Whether a name carries a hash, as in weights-0a1b2c3d.pth, that does not begin the file's SHA-256."""
    match = re.search(r"-([0-9a-f]{8,})\.\w+$", name)
    if match is None or re.fullmatch(r"checkpoint-\d{8}\.pth", name):  # the number of steps
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(PART):
            digest.update(part)
    return not digest.hexdigest().startswith(match[1])


def download(url: str, path: Path, stall: float = STALL, attempts: int = ATTEMPTS) -> None:
    """Download a file. A connection that breaks or stalls is taken up where it ended; no part of a file is left.

    Args:
        url: https address.
        path: of the file; its folder is made.
        stall: seconds without a byte after which a connection is given up.
        attempts: connections in a row that may bring nothing.

    Raises:
        UserError: it cannot be downloaded, is damaged, or does not have the hash in its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    _delete_abandoned(path)
    try:
        in_vain = 0
        while True:
            before = _size(partial)
            try:
                _fetch_rest(url, partial, stall)
                break
            except urllib.error.HTTPError as error:
                problem, is_final = error, error.code < 500
            except (OSError, http.client.HTTPException) as error:
                problem, is_final = error, False
            in_vain = 0 if _size(partial) > before else in_vain + 1
            if is_final or in_vain == attempts:
                raise UserError(f"{url}: download failed ({problem}), tried {in_vain} times in vain")
            time.sleep((in_vain + 1) / 2)
        if _has_wrong_hash(partial, path.name):
            raise UserError(f"{url}: the file that came does not have the hash in its name; try again")
        if has_checks(partial) and (problem := damage(partial)):
            raise UserError(f"{url}: the file that came is damaged ({problem}); try again")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _delete_abandoned(path: Path) -> None:
    """Delete what processes of this host that were killed have left of a file."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.{socket.gethostname()}-*.partial"):
        try:
            os.kill(int(partial.stem.rpartition("-")[2]), 0)
        except ProcessLookupError:
            partial.unlink(missing_ok=True)
        except PermissionError:  # another user's that lives
            continue


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch_rest(url: str, partial: Path, stall: float) -> None:
    """Append to a part of a file what is missing.

    Raises:
        OSError: the connection breaks or stalls.
    """
    have = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=stall) as response:
        if not response.geturl().startswith("https://"):
            raise UserError(f"{url}: leads to {response.geturl()}, which is not https")
        if response.status != 206:
            have = 0  # a server that does not send parts
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=partial.name.split(".")[0],
                   disable=not is_main_process())  # fmt: skip
        with partial.open("ab" if have else "wb") as file, bar:
            while part := response.read(PART):
                bar.update(file.write(part))
            if total is not None and file.tell() != total:
                raise OSError(f"the connection ended after {file.tell()} of {total} bytes")


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


def weights_of(checkpoint: dict[str, Any], what: str, prefer_ema: bool = False) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint, which may be one itself; prefixes of wrappers are taken off.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        what: flag and path, for messages.
        prefer_ema: take the averaged weights where the checkpoint has them.

    Raises:
        UserError: there are no weights in it.
    """
    keys = (*EMA_KEYS, *MODEL_KEYS) if prefer_ema else (*MODEL_KEYS, *EMA_KEYS)
    weights = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), checkpoint)
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in weights.items()}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{what}: holds no model weights (expected a state dict, or one under 'model')")
    for name, value in weights.items():
        if value.is_meta or value.is_quantized or value.layout != torch.strided:
            kind = "has no values" if value.is_meta else "is quantized" if value.is_quantized else "is sparse"
            raise UserError(f"{what}: {name} {kind}; save it as an ordinary tensor")
    return weights


def has_both_weights(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint holds averaged weights beside the network's."""
    return all(any(isinstance(checkpoint.get(key), dict) for key in keys) for keys in (MODEL_KEYS, EMA_KEYS))


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    what: str,
    variant_hint: str = "name it with --model",
    network: str = "",
    partly: bool = False,
    classes_hint: str = "take the data set of its classes",
) -> Adaptation:
    """Load a state dict, strictly but for what another image size or form needs; says what was adapted.

    Args:
        model: the model, a SepViT, one with a SepViT inside, or another.
        weights: the state dict.
        what: flag and path, for messages.
        variant_hint: the way out when the weights are of another variant, for messages.
        network: name of the SepViT inside `model`; "" where it is the model itself.
        partly: outside the SepViT, leave fresh what the weights do not have or have in another shape.
        classes_hint: the way out when the weights are of another number of classes, for messages.

    Raises:
        UserError: it is of another variant, another number of classes, or another architecture, or not finite.
    """
    _check_finite(weights, model, what)
    prefix = f"{network}." if network else ""
    expected = model.state_dict()
    adaptation = Adaptation()
    inner = model.get_submodule(network)
    if isinstance(inner, SepViTStages):
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        held, wanted = variant_of(own), variant_of(inner.state_dict())
        if held != wanted:
            raise UserError(f"{what}: holds {held or 'no SepViT'}, not {wanted}; {variant_hint}")
        adaptation = adapt_state_dict(own, inner)
        for names in (adaptation.resampled, adaptation.fresh, adaptation.dropped):
            names[:] = [prefix + name for name in names]
        weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        weights |= {prefix + name: value for name, value in own.items()}
    weights = dict(weights)
    if partly:
        _fill_up(weights, expected, prefix, adaptation)
    _check_entries(weights, expected, what, getattr(model, "default_cfg", {}).get("classifier"), classes_hint)
    model.load_state_dict(weights)
    return adaptation


def _fill_up(weights: dict[str, Tensor], expected: dict[str, Tensor], prefix: str, adaptation: Adaptation) -> None:
    """Outside the SepViT, take the model's entries where the weights have none that fits, and drop the surplus."""
    outside = [name for name in expected if not name.startswith(prefix)]
    fresh = [name for name in outside if name not in weights or weights[name].shape != expected[name].shape]
    dropped = [name for name in weights if not name.startswith(prefix) and name not in expected]
    for name in dropped:
        del weights[name]
    weights |= {name: expected[name] for name in fresh}
    adaptation.fresh += fresh
    adaptation.dropped += dropped


def _check_finite(weights: dict[str, Tensor], model: nn.Module, what: str) -> None:
    """Refuse parameters that are not finite. Buffers may be infinite: masks are."""
    for name, parameter in model.named_parameters():
        value = weights.get(name, parameter)
        if value is not parameter and not value.float().isfinite().all():
            count = int((~value.float().isfinite()).sum())
            raise UserError(f"{what}: {name} is not finite ({count} of {value.numel()} values); take a checkpoint from "
                            "before the training broke")  # fmt: skip


def _check_entries(
    weights: dict[str, Tensor], expected: dict[str, Tensor], what: str, classifier: str | None, classes_hint: str
) -> None:
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        parts = [f"{len(names)} {kind} ({names[0]}, …)" for kind, names in
                 (("entries are missing", missing), ("are unexpected", unexpected)) if names]  # fmt: skip
        raise UserError(f"{what}: another architecture: {', '.join(parts)}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            shapes = f"{name} is {tuple(value.shape)}, the model's {tuple(expected[name].shape)}"
            if classifier and name.startswith(f"{classifier}."):
                classes = f"{len(value)} classes instead of {len(expected[name])}"
                raise UserError(f"{what}: {classes} ({shapes}); {classes_hint}")
            raise UserError(f"{what}: does not fit this model: {shapes}")


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any], with_lr: bool = False
) -> None:
    """Load an optimiser's state, however its parameters were grouped: by other weight decay, or by the published code,
    which decays the window tokens like matrices.

    Its settings (weight decay, betas, …) stay as they are.

    Args:
        optimizer: the optimiser.
        model: whose parameters it steps.
        state: its state dict.
        with_lr: take the learning rate from the state, too.

    Raises:
        ValueError: the state is of other parameters.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    number = {parameter: i for i, parameter in enumerate(parameters)}
    spared = getattr(model, "no_weight_decay", set)()
    groupings = (
        optimizer.param_groups,
        param_groups_weight_decay(model, weight_decay=1.0, no_weight_decay_list=spared),
        param_groups_weight_decay(model, weight_decay=1.0),  # the published code's
        [{"params": list(model.parameters())}],  # without weight decay
    )
    saved = state["param_groups"]
    sizes = [len(group["params"]) for group in saved]
    grouping = next((groups for groups in groupings if [len(group["params"]) for group in groups] == sizes), None)
    if grouping is None:
        raise ValueError(f"its optimiser has {sum(sizes)} parameters, in groups of {sizes}, not {len(number)}")
    # parameters are numbered through the groups; give each its number in this optimiser's
    numbers = [number[parameter] for group in grouping for parameter in group["params"]]
    state = {**state, "state": {numbers[i]: value for i, value in state["state"].items()}}
    own_keys = optimizer.defaults.keys() - ({"lr"} if with_lr else set())
    groups, start = [], 0
    for i, group in enumerate(optimizer.param_groups):
        kept = {key: group[key] for key in own_keys & group.keys()}
        indices = list(range(start, start + len(group["params"])))
        groups.append({**saved[min(i, len(saved) - 1)], **kept, "params": indices})
        start += len(indices)
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():  # in the parameters' memory format, which fused steps ask for
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and name != "step":
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def name_also(path: Path, name: str) -> None:
    """Give a file a second name in its folder, in place of the file that has it; a copy where there are no links."""
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, path.with_name(name))
    temporary.unlink(missing_ok=True)  # where it had the name already, that moved nothing


class CheckpointWriter:
    """Writes a run's checkpoints beside the training: the loop waits for a copy in memory, not for the disk.

    Each is a file `checkpoint-<steps>.pth`; the newest is also `checkpoint.pth`, the one of the highest top-1
    `checkpoint_best.pth` (the same files, no copies). What cannot be written is said, and training goes on.

    Args:
        folder: the output folder.
        keep: how many of the numbered ones stay.

    Attributes:
        failure: why the last one could not be written, None where it was.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._best: dict[str, Any] | None = None  # that could not be written yet
        self.failure: str | None = None

    def save(self, checkpoint: dict[str, Any], is_best: bool = False) -> None:
        """Copy a checkpoint and write it in the background, once the one before it is written."""
        self.wait()
        self._pending = self._executor.submit(self._write, copied(checkpoint), is_best)

    def wait(self) -> None:
        """Wait until all is written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, checkpoint: dict[str, Any], is_best: bool) -> None:
        path = self.folder / NUMBERED.format(checkpoint["steps"])
        # the best first: killed before the numbered one is there, the run does that epoch again, and finds it again
        first, *others = [BEST] * is_best + [path.name, NEWEST]
        place = f"epoch {checkpoint['epoch'] + 1}, step {checkpoint['epoch_step']}"
        self._best = checkpoint if is_best else self._best
        try:
            write_file(self.folder / first, lambda file: torch.save(checkpoint, file))
            for name in others:
                name_also(self.folder / first, name)
            if not is_best and self._best is not None:
                write_file(self.folder / BEST, lambda file: torch.save(self._best, file))
            self._best = None
            flush_folder(self.folder)
            for old in numbered(self.folder)[self.keep :]:
                old.unlink()
            self.failure = None
        except OSError as error:
            self.failure = error.strerror
            print_line(f"WARNING: {path} could not be written ({error.strerror}): "
                     "the checkpoint before it is kept, training goes on")  # fmt: skip
        else:
            print_line(f"saved {path} (before {place})")


def copied(value: Any) -> Any:
    """A copy of nested containers with their tensors on the CPU, which later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, copied(entry)) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(copied(entry) for entry in value)
    return value


def numbered(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    return sorted(folder.glob(NUMBERED.format(0).replace("0" * 8, "[0-9]" * 8)), reverse=True)


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is whole, None where there is none at all; names those that are not.

    Raises:
        UserError: there are some, and none is whole.
    """
    candidates = numbered(folder) + [path for path in (folder / NEWEST, folder / BEST) if path.exists()]
    for path in candidates:
        problem = damage(path)
        if problem is None:
            return path
        print_line(f"WARNING: {path} is damaged ({problem}): going back to the one before it")
    if candidates:
        raise UserError(f"--auto-resume: no checkpoint in {folder} is whole; empty the folder to start afresh")
    return None
