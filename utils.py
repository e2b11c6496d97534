"""What training and evaluation share: users' errors, processes, checkpoints, progress, log files and curves."""

import argparse
import gc
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from sepvit import Adaptation, SepViTStages, adapt_state_dict, variant_of


class UserError(Exception):
    """A mistake of the user's: one line that names the thing, the value and the way out. The exit status is 2."""


def run_command(name: str, command: Callable[[], None]) -> int:
    """Run a command; a user's mistake is one line, of one process.

    Args:
        name: of the script, in front of the line.
        command: what to run.

    Returns:
        the exit status: 0, 2 for a user's mistake, 130 when interrupted.
    """
    try:
        command()
    except UserError as error:
        # a loader's worker hands it on below its own traceback
        message = str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")
        if is_main_process():
            print(f"{name}: {message}", file=sys.stderr, flush=True)
        elif dist.is_initialized():
            time.sleep(5)  # where all processes refuse, the main one's line is enough, and ends the others meanwhile
            print(f"{name}: process {get_rank()}: {message}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            gc.collect()  # what refers to the group in circles would outlive it, and end the process by an abort
            dist.destroy_process_group()
    return 0


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse's own pattern knows no exponents: it would take the -1e-3 of `--lr -1e-3` for a setting
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Any:
    """Type of a setting that lies in [low, high], or (`open_low`) in (low, high]."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or (open_low and value == low):
            bound = f"above {low}" if open_low else f"at least {low}"
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: {bound}" + ("" if high == math.inf else f" and at most {high}")
            )
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int, natural = number(int, 1), number(int, 0)
positive, non_negative, fraction = number(float, 0, open_low=True), number(float, 0), number(float, 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------


def best_device() -> str:
    """The best kind of device there is: 'cuda', 'mps' or 'cpu'."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _launcher_variables() -> dict[str, str]:
    """The variables that torchrun would set, from those of OpenMPI or of a SLURM job step of several tasks."""
    if "RANK" in os.environ:
        return {}
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        names = dict(RANK="RANK", WORLD_SIZE="SIZE", LOCAL_RANK="LOCAL_RANK")
        variables = {name: os.environ[f"OMPI_COMM_WORLD_{theirs}"] for name, theirs in names.items()}
        places = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # processes on one machine, unless set otherwise
        return variables | {name: value for name, value in places.items() if name not in os.environ}
    if int(os.environ.get("SLURM_NTASKS", 1)) < 2 or "SLURM_PROCID" not in os.environ:
        return {}
    variables = dict(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"),
    )
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "localhost")
        variables["MASTER_ADDR"] = _first_node(nodes)
    if "MASTER_PORT" not in os.environ:
        # the same on all tasks of a job, another one for another job on the node
        variables["MASTER_PORT"] = str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000)
    return variables


def _first_node(nodes: str) -> str:
    """The first host of a SLURM node list such as 'gpu[03-05,9],cpu1'."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"SLURM node list {nodes}: `{' '.join(command)}` failed ({error}); set MASTER_ADDR") from None


def init_distributed(device: str, world_size: int, dist_url: str) -> torch.device:
    """Join the process group if torchrun, torch.distributed.launch, SLURM or OpenMPI started several processes.

    Args:
        device: 'cuda', 'mps' or 'cpu', or one with an index. nccl joins CUDA processes, gloo all others.
        world_size: number of processes where the environment does not tell it.
        dist_url: where the processes meet (`env://`: MASTER_ADDR and MASTER_PORT).

    Returns:
        this process's device.

    Raises:
        UserError: the environment does not tell this process's number.
    """
    os.environ.update(_launcher_variables())
    if "RANK" not in os.environ:
        if world_size > 1:
            raise UserError(f"--world_size {world_size}: RANK is not set; start the processes by torchrun or srun")
        return torch.device(device)
    rank = int(os.environ["RANK"])
    world_size = int(os.environ.get("WORLD_SIZE", world_size))
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(
        backend, init_method=dist_url, rank=rank, world_size=world_size, timeout=timedelta(minutes=30)
    )
    return torch.device(device)


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that prints and writes; also told before the group is joined."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def print_main(*parts: Any) -> None:
    """Print on the main process alone."""
    if is_main_process():
        print(*parts, flush=True)


def on_main_process(function: Callable[[], None]) -> None:
    """Run a function on the main process; what it refuses is refused on all of them, so that none waits for it.

    Raises:
        UserError: the function's.
    """
    refusal: list[UserError | None] = [None]
    if is_main_process():
        try:
            function()
        except UserError as error:
            refusal = [error]
    if get_world_size() > 1:
        dist.broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise refusal[0]


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of the processes' tensors, on all of them."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
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
    try:
        # named at each reading: timm and mmengine also allow classes, and take them back for all behind their own
        with torch.serialization.safe_globals([argparse.Namespace, *data_classes]):
            checkpoint = _fetch(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{what}: no such file") from None
    except PermissionError:
        raise UserError(f"{what}: cannot be read (permission denied)") from None
    except Exception as error:  # what torch.load raises on files that are no checkpoints is not documented, and varied
        if "invalid hash value" in str(error):
            raise UserError(f"{what}: the file that came does not have the hash in its name; try again") from None
        if isinstance(error, OSError) and path.startswith("https://"):
            raise UserError(f"{what}: download failed ({error})") from None
        if match := re.search(r"nsupported (?:global|class|operand)\W+(?:GLOBAL )?([\w.]+)", str(error), re.I):
            raise UserError(f"{what}: refused, it holds {match[1]}, which could run code; save tensors only") from None
        raise UserError(f"{what}: not a checkpoint, or a truncated one") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{what}: not a checkpoint, it holds a {type(checkpoint).__name__}")
    return checkpoint


def _fetch(path: str) -> Any:
    if not path.startswith("https://"):
        return torch.load(path, map_location="cpu", weights_only=True)
    return torch.hub.load_state_dict_from_url(
        path,
        map_location="cpu",
        check_hash=re.search(r"-[0-9a-f]{8,}\.\w+$", path) is not None,
        weights_only=True,
        progress=is_main_process(),
    )


def weights_of(checkpoint: dict[str, Any], what: str, prefer_ema: bool = False) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint, which may be one itself; prefixes of wrappers are taken off.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        what: flag and path, for messages.
        prefer_ema: take the averaged weights where the checkpoint has them.

    Raises:
        UserError: there are no weights in it.
    """
    keys = ("model_ema", "model", "state_dict") if prefer_ema else ("model", "state_dict")
    weights = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), checkpoint)
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in weights.items()}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{what}: holds no model weights (expected a state dict, or one under 'model')")
    return weights


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    what: str,
    variant_hint: str = "name it with --model",
    network: str = "",
    partly: bool = False,
) -> Adaptation:
    """Load a state dict, strictly but for what another image size or form needs; says what was adapted.

    Args:
        model: the model, a SepViT, one with a SepViT inside, or another.
        weights: the state dict.
        what: flag and path, for messages.
        variant_hint: the way out when the weights are of another variant, for messages.
        network: name of the SepViT inside `model`; "" where it is the model itself.
        partly: outside the SepViT, leave fresh what the weights do not have or have in another shape.

    Raises:
        UserError: it is of another variant, another number of classes, or another architecture.
    """
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
    _check_entries(weights, expected, what)
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


def _check_entries(weights: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        parts = [f"{len(names)} {kind} ({names[0]}, …)" for kind, names in
                 (("entries are missing", missing), ("are unexpected", unexpected)) if names]  # fmt: skip
        raise UserError(f"{what}: another architecture: {', '.join(parts)}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            shapes = f"{name} is {tuple(value.shape)}, the model's {tuple(expected[name].shape)}"
            finetune = what.startswith("--resume") and name.startswith("head.")
            way_out = "; --finetune gives the model a new head" if finetune else ""
            raise UserError(f"{what}: does not fit this model: {shapes}{way_out}")


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Load an optimiser's state; also one of the published code, which decays the window tokens like matrices.

    Raises:
        ValueError: the state is of other parameters.
    """
    own = [[name for p in group["params"] for name, q in model.named_parameters() if q is p]
           for group in optimizer.param_groups]  # fmt: skip
    is_vector = {name: p.ndim <= 1 for name, p in model.named_parameters()}
    published = [[name for name in is_vector if is_vector[name]], [name for name in is_vector if not is_vector[name]]]
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes != [len(names) for names in own] and sizes == [len(names) for names in published]:
        # parameters are numbered through the groups; give each its number in this optimiser's groups
        number = {name: i for i, name in enumerate(name for names in own for name in names)}
        numbers = [number[name] for names in published for name in names]
        groups, start = [], 0
        for group, names in zip(state["param_groups"], own):
            groups.append({**group, "params": list(range(start, start + len(names)))})
            start += len(names)
        state = {"state": {numbers[i]: value for i, value in state["state"].items()}, "param_groups": groups}
    # how a step is computed is this run's own matter: the checkpoint may come from another device
    kept = [{key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, kept):
        group.update(settings)


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a reader sees the previous file or the whole of the next one."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


# ----------------------------------------------------------------------------------------------------------------------
# Progress
# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """Iterates over batches and shows how it goes: a bar on a terminal, a line every so often in a file.

    Args:
        batches: the batches; their number is their `len`, 0 where they do not know it.
        title: in front of each line.
        every: batches between two reports. Numbers that live on a GPU are waited for only then.
        later: how many more such rounds the run has, for its time left.
    """

    def __init__(self, batches: Iterable[Any], title: str, every: int, later: int = 0) -> None:
        self.batches = batches
        self.title = title
        self.every = every
        self.later = later
        self.total = len(batches)
        self.images = 0
        self.done = 0
        self.start = time.perf_counter()
        self.bar = None
        if is_main_process() and sys.stdout.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(
                total=self.total or None, desc=title, bar_format=layout, file=sys.stdout, dynamic_ncols=True
            )

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self.batches:
                yield batch
                if self.bar is not None:
                    self.bar.update()
        finally:
            if self.bar is not None:
                self.bar.close()

    def advance(self, images: int) -> bool:
        """Count a batch of `images` images (of all processes); tells whether it is time to report."""
        self.done += 1
        self.images += images
        return self.done % self.every == 0 or self.done == self.total

    def report(self, **values: str) -> None:
        """Show values, the speed so far and the time left."""
        seconds = time.perf_counter() - self.start
        left = max(0.0, seconds / self.done * (self.total - self.done))
        values["images/s"] = f"{self.images / seconds:.1f}"
        if self.bar is None and self.total:
            values["left"] = str(timedelta(seconds=round(left)))
        if self.later:
            values["run left"] = str(timedelta(seconds=round(left + self.later * seconds / self.done * self.total)))
        text = ", ".join(f"{name} {value}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            place = f"{self.done:{len(str(self.total))}}/{self.total}" if self.total else str(self.done)
            print_main(f"{self.title} [{place}] {text}")


# ----------------------------------------------------------------------------------------------------------------------
# The output folder
# ----------------------------------------------------------------------------------------------------------------------


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder and check that files can be written there.

    Raises:
        UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror}); name another folder") from None


def append_log(path: Path, entry: dict[str, Any]) -> None:
    """Add a line, one JSON object, to log.txt."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of log.txt; none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cut_log(path: Path, epoch: int) -> None:
    """Take the lines of `epoch` and later off log.txt: a run goes on before them."""
    entries = [entry for entry in read_log(path) if entry["epoch"] < epoch]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def plot_curves(log: Path, picture: Path) -> None:
    """Draw loss, accuracy and learning rate of log.txt over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import: only when there is a run to draw
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    entries = read_log(log)
    panels = {
        "loss": {"train_loss": "training", "test_loss": "validation", "test_ema_loss": "validation, averaged weights"},
        "accuracy (%)": {"test_acc1": "top-1", "test_acc5": "top-5", "test_ema_acc1": "top-1, averaged weights"},
        "learning rate": {"train_lr": "learning rate"},
    }
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items()):
        for name, label in curves.items():
            points = [(entry["epoch"], entry[name]) for entry in entries if name in entry]
            if points:
                axes.plot(*zip(*points), marker="o" if len(points) < 30 else "", label=label)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=100)
