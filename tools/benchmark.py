"""Speed and memory of SepViT beside its peers, measured in the same rounds.

    python tools/benchmark.py [--model SepViT_Tiny] [--device cuda] [--formats float32 bfloat16] [--forms eager port]

Measures latency (one image), throughput in inference and in training, and peak memory. Prints one table for each
measure and number format, and writes them into the record of this machine in benchmarks/: JSON, a page, and pictures. A
table takes the place of an earlier one with the same settings.

    python tools/benchmark.py --data PATH …       the input pipeline alone; see tools/benchmark_data.py
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import gc
import hashlib
import importlib
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sepvit
from sepvit_lib.training.commands import Parser, path, positive_int, run_command, seconds
from sepvit_lib.training.devices import available_cores, best_device, check_device
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.resume import git_revision
from sepvit_lib.training.storage import make_folder
from tools import benchmark_networks, benchmark_runtimes
from tools.benchmark_accuracy import Validation, calibration_images
from tools.benchmark_machine import describe, device_name
from tools.benchmark_networks import CLASSES, COMPILED, DTYPES, FORMS, MEASURES, OF_SEPVIT, PEERS, Setting, Subject
from tools.benchmark_record import Record, as_text
from tools.benchmark_rounds import LEAST
from tools.benchmark_table import Method, Table, measure_table

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 9
MOST_OTHER_WORK = 0.1  # cores that other processes may use before a warning
MOST_COMPILERS = 4  # processes that compile side by side: each holds a network and its activations on the GPU


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="SepViT_Tiny", choices=list(sepvit.VARIANTS))
    add("--dense", action="store_true", help="the dense prediction form, without peers")
    add(
        "--peers",
        nargs="+",
        default=None,
        metavar="NAME",
        help="models of timm to measure beside it, class for those of its class (the default), or none",
    )
    add("--device", default=best_device(), help="cuda, mps or cpu; by default the best available")
    add("--formats", nargs="+", default=["float32"], choices=list(DTYPES), help="number formats")
    add("--forms", nargs="+", default=["eager", "port"], choices=list(FORMS), help="how the networks run")
    add(
        "--before",
        type=path,
        default=None,
        metavar="FILE",
        help="another revision's sepvit.py, measured as the form before",
    )
    add("--baseline", default="eager", choices=list(FORMS), help="SepViT's form that speeds are relative to")
    add("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    add(
        "--batch-size",
        type=positive_int,
        default=None,
        help="images per call, except for latency; by default 8 (CPU) or 128 (GPU), with --dense 2 or 8",
    )
    add("--input-size", type=positive_int, nargs="+", default=[224], metavar="PIXELS", help="one side, or H and W")
    add("--channels-last", action="store_true", help="keep images and weights channels last in memory")
    add("--rounds", type=positive_int, default=ROUNDS)
    add(
        "--limit",
        type=seconds,
        default=None,
        metavar="SECONDS",
        help="build no further network and begin no further round after this time; keep what was measured",
    )
    add("--threads", type=positive_int, default=available_cores(), help="CPU threads")
    add("--checkpoint", type=path, default=None, metavar="FILE", help="weights of the model")
    add(
        "--data-path",
        type=path,
        default=None,
        metavar="DIR",
        help="class folders, as for main.py, to measure each form's top-1 with the checkpoint",
    )
    add("--profile", action="store_true", help="list the operations that take most of the time")
    add("--out", type=path, default=str(ROOT / "benchmarks"), help="folder of the record")
    add("--revision", default=None, help="commit of the code, where git does not know it")
    add("--quick", action="store_true", help="short timings in a record of their own: to try the benchmark itself")
    add("--data", type=path, default=None, metavar="PATH", help="measure the input pipeline alone")
    return parser


def check_settings(args: argparse.Namespace) -> None:
    """Refuse settings that cannot work, before anything is built.

    Raises:
        UserError: the first one found.
    """
    check_device(args.device)
    if len(args.input_size) > 2:
        raise UserError(f"--input-size {' '.join(map(str, args.input_size))}: name one side, or H and W")
    if args.dense and args.peers not in (None, ["none"]):
        raise UserError(f"--dense --peers {' '.join(args.peers)}: the dense form is measured without peers")
    benchmark_networks.check_models([name for name in args.peers or [] if name not in ("class", "none")], "--peers")
    benchmark_runtimes.check_packages(args.forms, args.formats, "--forms")
    if ("before" in args.forms) != (args.before is not None):
        raise UserError("--forms before and --before FILE: name both, or neither")
    if args.before is not None:
        benchmark_networks.load_before(args.before)
    check_validation(args)
    if args.baseline != "eager" and args.baseline not in args.forms:
        raise UserError(f"--baseline {args.baseline}: it is not among --forms {' '.join(args.forms)}")


def check_validation(args: argparse.Namespace) -> None:
    """Refuse settings with which top-1 cannot be measured.

    Raises:
        UserError: the first one found.
    """
    if args.data_path is None:
        return
    if args.checkpoint is None:
        raise UserError(f"--data-path {args.data_path}: top-1 needs weights; name them with --checkpoint")
    if args.dense:
        raise UserError("--dense --data-path: the dense form has no classifier; leave out one of them")
    if len(set(args.input_size)) > 1:
        raise UserError(f"--input-size {' '.join(map(str, args.input_size))}: top-1 is measured on square images")


def fingerprint(file: str | None) -> str | None:
    """Start of a file's SHA-256, which tells it from others; None without a file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file and Path(file).is_file() else file


def chosen_peers(args: argparse.Namespace) -> list[str]:
    """Names of the models to measure beside SepViT."""
    names = ["none"] if args.dense else args.peers or ["class"]
    chosen = [peer for name in names for peer in (PEERS[args.model] if name == "class" else [name]) if peer != "none"]
    return list(dict.fromkeys(chosen))


def subjects_of(args: argparse.Namespace, number_format: str) -> list[Subject]:
    """The rows of a table: each model in each form, and SepViT in eager mode, also in float32, as baselines."""
    baselines = [] if number_format == "int8" else ["eager"]
    rows = [Subject(args.model, form, number_format) for form in dict.fromkeys([*baselines, *args.forms])]
    rows += [
        Subject(peer, form, number_format)
        for peer in chosen_peers(args)
        for form in args.forms
        if form not in OF_SEPVIT
    ]
    if number_format != "float32":
        rows += [Subject(args.model, form, "float32") for form in dict.fromkeys(["eager", args.baseline])]
    return rows


def setting_of(args: argparse.Namespace, measure: str, classes: int, calibration: Tensor | None) -> Setting:
    """What the rows of a table have in common."""
    device = torch.device(args.device)
    defaults = {False: (8, 128), True: (2, 8)}[args.dense]
    batch = 1 if measure == "latency" else args.batch_size or defaults[device.type == "cuda"]
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    size = (args.input_size[0], args.input_size[-1])
    return Setting(
        measure,
        device,
        batch,
        size,
        args.dense,
        args.threads,
        layout,
        args.checkpoint or "",
        args.before or "",
        classes,
        calibration,
    )


def empty_table(args: argparse.Namespace, setting: Setting, number_format: str, run: dict[str, Any]) -> Table:
    """A table without rows."""
    settings = dict(
        model=args.model,
        is_dense=args.dense,
        batch_size=setting.batch_size,
        size=list(setting.size),
        threads=args.threads,
        channels_last=args.channels_last,
        forms=args.forms,
        peers=chosen_peers(args),
        baseline=args.baseline,
        before=fingerprint(args.before),
        checkpoint=fingerprint(args.checkpoint),
    )
    return Table(setting.measure, number_format, settings, run)


# ----------------------------------------------------------------------------------------------------------------------
# Compiling ahead
# ----------------------------------------------------------------------------------------------------------------------


def compile_ahead(tasks: Sequence[tuple[Subject, Setting]], jobs: int) -> None:
    """Compile subjects in processes side by side. They fill torch's cache, from which this process takes them.

    One after the other takes minutes. A subject that fails here is compiled again, and then reported.
    """
    context = multiprocessing.get_context("spawn")  # a forked process could not use a GPU that this one has used
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        pool.starmap(_compile, tasks, chunksize=1)


def _compile(subject: Subject, setting: Setting) -> None:
    """Compile a subject by calling it."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, available_cores() // MOST_COMPILERS))
    try:
        ready = benchmark_networks.build(subject, setting, Path())
        ready.outputs(setting.images())
        ready.call()
    except Exception as error:
        print(f"compiling {subject}: {type(error).__name__}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def print_progress(text: str) -> None:
    """Print what happens now."""
    print(text, file=sys.stderr, flush=True)


def main(args: argparse.Namespace) -> None:
    """Measure the tables, print them, and add them to the record.

    Raises:
        UserError: a setting cannot work, or the record cannot be read or written.
    """
    start = time.monotonic()
    check_settings(args)
    validation = calibration = None
    if args.data_path is not None:
        validation = Validation.build(args.model, args.data_path, args.input_size[0], args.checkpoint)
        if "int8" in args.formats:
            calibration = calibration_images(args.model, args.data_path, args.input_size[0])
    out = Path(args.out)
    make_folder(out, f"--out {out}")
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as main.py
    gc.freeze()  # collecting garbage between timings need not look at the libraries
    classes = CLASSES if validation is None else validation.classes
    tables = [
        (setting_of(args, measure, classes, calibration), number_format, subjects_of(args, number_format))
        for number_format in dict.fromkeys(args.formats)
        for measure in dict.fromkeys(args.measures)
    ]
    tasks = [
        (subject, setting)
        for setting, _, subjects in tables
        for subject in subjects
        if subject.form in COMPILED and not benchmark_networks.not_offered(subject, setting)
    ]
    if device.type == "cuda" and len(tasks) > 1:
        print_progress(f"compiling {len(tasks)} networks")
        compile_ahead(tasks, min(MOST_COMPILERS, len(tasks)))
    record = Record.read(device_name(device), args.quick, out)
    deadline = start + (math.inf if args.limit is None else args.limit)
    method = Method(2 if args.quick else args.rounds, 0.0 if args.quick else LEAST, args.quick, args.profile, deadline)
    run = dict(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        revision=args.revision or git_revision(),
        rounds=method.rounds,
        machine=describe(device),
    )
    for setting, number_format, subjects in tables:
        table = empty_table(args, setting, number_format, run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measure_table(table, subjects, setting, method, print_progress, validation)
        print(as_text(table), end="\n\n", flush=True)
        if (table.other_cores or 0.0) > MOST_OTHER_WORK:
            print_progress(f"other processes kept {table.other_cores:.1f} cores busy: measure again on an idle machine")
        if any(row.seconds for row in table.rows):
            record.add(table)
            record.write(out)


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.partition("=")[0] == "--data" for argument in arguments):
        # imported only here, because nothing else needs its libraries
        return importlib.import_module("tools.benchmark_data").run(arguments)
    parser = build_parser()
    advice = "use a smaller --batch-size or --input-size"
    return run_command("benchmark.py", lambda: main(parser.parse_args(arguments)), parser, advice)


if __name__ == "__main__":
    sys.exit(run())
