"""Compare the speed and memory of SepViT with those of its peers, measured in the same rounds.

    python benchmarks/benchmark.py [--model SepViT_Tiny] [--device cuda] [--formats float32 bfloat16] [--forms eager]

Measures latency (one image), throughput in inference and in training, and peak memory. Prints one table for each
image size, batch size, measure and number format, and adds it to this machine's record in benchmarks/: JSON, Markdown
and a picture. A table replaces an earlier table with the same settings.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import gc
import hashlib
import itertools
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

import sepvit
from benchmarks import subjects
from benchmarks.record import Record, as_text
from benchmarks.subjects import DTYPES, FORMS, MEASURES, OF_SEPVIT, PEERS, RUNTIMES, Setting, Subject
from benchmarks.tables import Table, measure_table
from sepvit_lib.common.command_line import Parser, image_size, path, positive_int, run_command
from sepvit_lib.common.devices import available_cores, best_device, check_device
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.machine import describe, device_name
from sepvit_lib.common.storage import make_folder
from sepvit_lib.run.resume import git_revision


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="SepViT_Tiny", choices=list(sepvit.VARIANTS))
    add("--dense", action="store_true", help="the dense prediction form, without peers")
    peers = "timm models to compare with; class: models of the same class (the default); none: no peers"
    add("--peers", nargs="+", default=["class"], metavar="NAME", help=peers)
    add("--device", default=best_device(), help="cuda, mps or cpu; by default the best available")
    add("--formats", nargs="+", default=["float32"], choices=list(DTYPES), help="number formats")
    add("--forms", nargs="+", default=["eager", "port"], choices=list(FORMS), help="how to run the networks")
    add("--before", type=path, default=None, metavar="FILE", help="also measure a different revision of sepvit.py")
    add("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    batch = "images per call, except for latency; by default 8 (CPU) or 128 (GPU), with --dense 2 or 8"
    add("--batch-size", type=positive_int, nargs="+", default=None, metavar="N", help=batch)
    size = "image sizes in pixels: SIDE or HEIGHTxWIDTH"
    add("--input-size", type=image_size, nargs="+", default=[(224, 224)], metavar="SIZE", help=size)
    add("--rounds", type=positive_int, default=9)
    add("--threads", type=positive_int, default=available_cores(), help="CPU threads")
    add("--out", type=path, default=str(Path(__file__).resolve().parent), help="folder of the record")
    add("--revision", default=None, help="commit of the code, if git cannot determine it")
    add("--quick", action="store_true", help="short timings in a separate record, to try the benchmark itself")
    return parser


def check_settings(args: argparse.Namespace) -> None:
    """Refuse settings that cannot work, before anything is built.

    Raises:
        UserError: a setting cannot work. The message names the first one found.
    """
    check_device(args.device)
    if args.dense and args.peers not in (["class"], ["none"]):
        raise UserError(f"--dense --peers {' '.join(args.peers)}: the dense form is measured without peers")
    chosen_peers(args)  # raises an error for a model that timm does not have
    subjects.check_packages(args.forms, args.formats)
    if args.before is not None:
        subjects.load_before(args.before)


def chosen_peers(args: argparse.Namespace) -> list[str]:
    """Names of the models to compare SepViT with.

    Raises:
        UserError: timm does not have one of the models.
    """
    names = ["none"] if args.dense else args.peers
    for name in names:
        if name not in ("class", "none") and not timm.is_model(name):
            raise UserError(f"--peers {name}: timm has no such model; timm.list_models() lists all")
    chosen = [peer for name in names for peer in (PEERS[args.model] if name == "class" else [name]) if peer != "none"]
    return list(dict.fromkeys(chosen))


def subjects_of(args: argparse.Namespace, number_format: str) -> list[Subject]:
    """The rows of a table: each model in each form. SepViT in eager mode, also in float32, serves as the baseline."""
    baseline = [] if number_format == "int8" else ["eager"]
    runtimes = [f"{form}-before" for form in args.forms if form in RUNTIMES]
    before = [] if args.before is None else ["before", *runtimes]
    rows = [Subject(args.model, form, number_format) for form in dict.fromkeys([*baseline, *args.forms, *before])]
    forms = [form for form in args.forms if form not in OF_SEPVIT]
    rows += [Subject(peer, form, number_format) for peer in chosen_peers(args) for form in forms]
    return rows if number_format == "float32" else [*rows, Subject(args.model, "eager", "float32")]


def tables_of(args: argparse.Namespace, run: dict[str, Any]) -> Iterator[tuple[Table, Setting]]:
    """Yield each table to measure, still without rows, and the setting that its rows share."""
    device = torch.device(args.device)
    defaults = {False: (8, 128), True: (2, 8)}[args.dense]
    batches = args.batch_size or [defaults[device.type == "cuda"]]
    before = hashlib.sha256(Path(args.before).read_bytes()).hexdigest()[:12] if args.before else None
    chosen = (args.formats, args.input_size, args.measures)
    for number_format, size, measure in itertools.product(*map(dict.fromkeys, chosen)):
        for batch in [1] if measure == "latency" else dict.fromkeys(batches):
            settings = dict(model=args.model, is_dense=args.dense, batch_size=batch, size=list(size), before=before)
            settings |= dict(threads=args.threads, forms=args.forms, peers=chosen_peers(args))
            setting = Setting(measure, device, batch, size, args.dense, args.threads, args.before or "")
            yield Table(measure, number_format, settings, run), setting


def main(args: argparse.Namespace) -> None:
    """Measure the tables, print them, and add them to the record.

    Raises:
        UserError: a setting cannot work, or the record cannot be read or written.
    """
    check_settings(args)
    out, device = Path(args.out), torch.device(args.device)
    make_folder(out, f"--out {out}")
    record = Record.read(device_name(device), args.quick, out)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as in main.py
    gc.freeze()  # garbage collection between timings skips the objects of imported libraries
    rounds = 2 if args.quick else args.rounds
    run = dict(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        revision=args.revision or git_revision(),
        rounds=rounds,
        machine=describe(device),
    )
    for table, setting in tables_of(args, run):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measure_table(table, subjects_of(args, table.number_format), setting, rounds, args.quick)
        print(as_text(table), end="\n\n", flush=True)
        if any(row.seconds for row in table.rows):
            record.add(table)
            record.write(out)


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    advice = "use a smaller --batch-size or --input-size"
    return run_command("benchmark.py", lambda: main(parser.parse_args(arguments)), parser, advice)


if __name__ == "__main__":
    sys.exit(run())
