"""How SepViT's cost grows: with image size, batch, threads and processes, and by communication on many GPUs.

    python tools/benchmark_growth.py [--model SepViT_Tiny] [--curves size batch threads processes communication]

* size: multiply-adds, those of pointwise self-attention by stage, time and memory of the forward pass;
* batch: time of the forward pass;
* threads: time of the forward pass;
* processes: training steps of data-parallel processes, which share the CPU threads, or have a GPU each;
* communication: 8 to 64 GPUs on paper: gradients of this network, published rates of links, and the backward pass,
  measured here or taken from a record of tools/benchmark.py.

The points of a curve are measured in the same rounds. Writes growth-DEVICE.json, a page and a picture into benchmarks/.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import io
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import sepvit
from sepvit_lib.training.commands import Parser, path, positive_int, run_command
from sepvit_lib.training.devices import available_cores, best_device, check_device
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.resume import git_revision
from sepvit_lib.training.storage import make_folder
from tools import benchmark_curves
from tools.benchmark_curves import Figures, Method
from tools.benchmark_machine import OtherWork, describe, device_name
from tools.benchmark_networks import AMPS
from tools.benchmark_record import can_draw, scaled
from tools.benchmark_rounds import LEAST, Spread
from tools.gpu_record import file_name, write_files

ROOT = Path(__file__).resolve().parent.parent
CURVES = ("size", "batch", "threads", "processes", "communication")
SIZES = [224, 320, 448, 512, 672, 800, 896, 1024]
BATCHES = {"cpu": [1, 2, 4, 8, 16, 32], "cuda": [1, 4, 16, 64, 256]}
BATCH = {"cpu": 8, "cuda": 128}


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="SepViT_Tiny", choices=list(sepvit.VARIANTS))
    add("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    add("--device", default=best_device(), help="cuda, mps or cpu; by default the best available")
    add("--format", default="float32", choices=list(AMPS), help="number format")
    add("--sizes", type=positive_int, nargs="+", default=SIZES, metavar="PIXELS", help="image sides")
    add("--batches", type=positive_int, nargs="+", default=None, metavar="N", help="batch sizes")
    add("--processes", type=positive_int, nargs="+", default=[1, 2], metavar="N", help="numbers of processes")
    add(
        "--batch-size",
        type=positive_int,
        default=None,
        help="images per call, of the other curves; by default 8 on a CPU and 128 on a GPU",
    )
    add("--input-size", type=positive_int, default=224, metavar="PIXELS", help="image side of the other curves")
    add("--rounds", type=positive_int, default=5)
    add("--threads", type=positive_int, default=available_cores(), help="most CPU threads")
    add(
        "--record",
        type=path,
        default=None,
        metavar="FILE",
        help="record (JSON) of tools/benchmark.py, whose training step communication is compared with",
    )
    add("--out", type=path, default=str(ROOT / "benchmarks"), help="folder of the record")
    add("--revision", default=None, help="commit of the code, where git does not know it")
    add("--quick", action="store_true", help="short timings in a record of their own: to try the command itself")
    return parser


def recorded_backward(file: str, model: str, number_format: str) -> tuple[float, int, str]:
    """Find a model's training step in a record of benchmark.py.

    Returns:
        seconds of its backward pass (two thirds of the step: it multiplies twice as often as the forward pass), its
        batch size, and the device.

    Raises:
        UserError: the record cannot be read, or has no such step.
    """
    try:
        stored = json.loads(Path(file).read_text(encoding="utf-8"))
        for table in stored["tables"]:
            settings = table["settings"]
            for row in table["rows"]:
                wanted = (table["measure"], row["model"], row["form"], row["number_format"], settings["is_dense"])
                if wanted == ("training", model, "eager", number_format, False) and row["seconds"]:
                    step = Spread.of(row["seconds"]).median
                    return 2 * step / 3, settings["batch_size"], stored["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--record {file}: no record of tools/benchmark.py ({error})") from None
    raise UserError(
        f"--record {file}: no training of {model} in {number_format}; measure it with tools/benchmark.py "
        f"--measures training --formats {number_format}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Record
# ----------------------------------------------------------------------------------------------------------------------


def rows_of(title: str, points: Sequence[Figures], columns: dict[str, Any]) -> list[str]:
    """A table of a curve's points as lines of a page."""
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for point in points:
        cells = [
            point["failure"] if point.get("failure") and name.startswith("ms") else cell(point)
            for name, cell in columns.items()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def milliseconds(point: Figures, per: float = 1.0) -> str:
    """Median time of a point in milliseconds, with the smallest and the largest."""
    if not point.get("seconds"):
        return "–"
    found = Spread.of([1e3 * seconds / per for seconds in point["seconds"]])
    return f"{found.median:.1f} ({found.low:.1f} to {found.high:.1f})"


def size_page(curve: Figures) -> list[str]:
    """The curve over image size as lines of a page."""
    columns = {
        "side": lambda point: str(point["size"]),
        "windows in stage 1": lambda point: str(point["windows"]),
        "multiply-adds, G": lambda point: scaled(point["multiply_adds"], 1e9, 2),
        "pointwise, %": lambda point: scaled(sum(point["pointwise_by_stage"]) / point["multiply_adds"], 0.01, 1),
        "by stage, %": lambda point: " · ".join(
            scaled(part / point["multiply_adds"], 0.01, 2) for part in point["pointwise_by_stage"]
        ),
        "ms": milliseconds,
        "GiB beyond weights": lambda point: scaled(point["bytes_peak"], 2**30, 2),
    }
    reached = [
        f"{100 * float(share):g} % from {f'{size} × {size} pixels' if size else 'no size tried'} on"
        for share, size in curve["reached"].items()
    ]
    note = f"Pointwise self-attention has a share of all multiply-adds of {', and of '.join(reached)}."
    return [*rows_of("Image size, one image", curve["points"], columns), note, ""]


def batch_page(curve: Figures) -> list[str]:
    """The curve over the batch size as lines of a page."""
    columns = {
        "batch": lambda point: str(point["batch_size"]),
        "ms/image": lambda point: milliseconds(point, point["batch_size"]),
    }
    return rows_of(f"Batch, {curve['size']} × {curve['size']}", curve["points"], columns)


def threads_page(curve: Figures) -> list[str]:
    """The curve over CPU threads as lines of a page."""
    columns = {
        "threads": lambda point: str(point["threads"]),
        "ms/image": lambda point: milliseconds(point, curve["batch_size"]),
    }
    title = f"CPU threads, {curve['size']} × {curve['size']}, batch {curve['batch_size']}"
    return rows_of(title, curve["points"], columns)


def processes_page(curve: Figures) -> list[str]:
    """The curve over data-parallel processes as lines of a page."""
    columns = {
        "processes": lambda point: str(point["processes"]),
        "threads of each": lambda point: str(point["threads"]),
        "ms/step": milliseconds,
        "ms/image": lambda point: milliseconds(point, curve["batch_size"] * point["processes"]),
    }
    title = f"Processes, training steps, {curve['size']} × {curve['size']}, batch {curve['batch_size']} each"
    return rows_of(title, curve["points"], columns)


def communication_page(curve: Figures) -> list[str]:
    """The model of communication as lines of a page."""
    columns = {
        "link": lambda point: f"[{point['link']}]({point['source']})",
        "GPUs": lambda point: str(point["gpus"]),
        "all-reduce, ms": lambda point: scaled(point["all_reduce"], 1e-3, 2),
        "of the backward pass": lambda point: f"{100 * point['share_of_backward']:.1f} %",
        "not hidden, ms": lambda point: scaled(point["exposed"], 1e-3, 2),
    }
    return [*rows_of("Communication on paper", curve["points"], columns), communication_note(curve), ""]


PAGES = {
    "size": size_page,
    "batch": batch_page,
    "threads": threads_page,
    "processes": processes_page,
    "communication": communication_page,
}


def page_of(curves: Figures) -> list[str]:
    """All curves as lines of a page."""
    return [line for name, make in PAGES.items() if name in curves for line in make(curves[name])]


def communication_note(curve: Figures) -> str:
    """What the model of communication assumes."""
    return (
        f"The gradients take {curve['gradient_bytes'] / 2**20:.1f} MiB. A ring all-reduce is assumed to run at the "
        f"link's published rate, without latency. The backward pass takes {1e3 * curve['backward_seconds']:.1f} ms "
        f"(batch {curve['batch_size']}, {curve['backward_from']}). Gradients are reduced bucket by bucket during the "
        "backward pass. Two things stay exposed: the last bucket, and any time by which the reduction outlasts the "
        "backward pass."
    )


def picture(curves: Figures, title: str) -> bytes:
    """Draw the measured curves. Empty if there are none, or nothing to draw them with."""
    from matplotlib.figure import Figure

    panels = [name for name in ("size", "batch", "threads", "processes") if name in curves]
    if not panels or not can_draw():
        return b""
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        curve = curves[name]
        key = {"batch": "batch_size"}.get(name, name)
        points = [point for point in curve["points"] if point["seconds"]]
        images = {
            "size": lambda point: 1,
            "batch": lambda point: point["batch_size"],
            "threads": lambda point: curve["batch_size"],  # noqa: B023 used in this turn of the loop
            "processes": lambda point: curve["batch_size"] * point["processes"],  # noqa: B023
        }[name]
        x = [point[key] for point in points]
        axes.plot(x, [1e3 * Spread.of(point["seconds"]).median / images(point) for point in points], "o-", label="ms")
        axes.set(
            xlabel={"size": "image side in pixels", "batch": "images per batch"}.get(name, name),
            ylabel="ms/image",
            ylim=(0, None),
        )
        if name == "size":
            shares = [100 * sum(point["pointwise_by_stage"]) / point["multiply_adds"] for point in points]
            other = axes.twinx()
            other.plot(x, shares, "s--", color="C1")
            other.set(ylabel="pointwise part of multiply-adds, % (dashed)", ylim=(0, None))
        if name in ("threads", "processes"):
            axes.set_xticks(x)
        axes.grid(True, alpha=0.3)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def write_record(record: Figures, folder: Path) -> None:
    """Write the JSON file, the page and the picture, named after the device.

    Raises:
        UserError: the folder cannot be written.
    """
    device = record["machine"]["device"]
    name = f"growth-{file_name(device)}{'-quick' if record['is_quick'] else ''}"
    title = f"{record['model']} in {record['format']} on {device}"
    when = f"{record['date']}, revision {record['revision']}, {record['rounds']} rounds"
    lines = [f"# Growth of the cost of {title}", ""]
    lines += ["The quick form: its figures mean nothing.", ""] if record["is_quick"] else []
    lines += [
        f"`tools/benchmark_growth.py` on {when}. Times are medians, with the smallest and largest in brackets.",
        "",
    ]
    if record["other_cores"] is not None:
        lines += [f"Other processes kept {record['other_cores']:.2f} cores busy.", ""]
    lines += [", ".join(f"{key} {value}" for key, value in record["machine"].items()), ""]
    contents = {".json": (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()}
    if drawn := picture(record["curves"], title):
        contents[".png"] = drawn
        lines += [f"![{title}]({name}.png)", ""]
    page = "\n".join([*lines, *page_of(record["curves"])]).rstrip() + "\n"
    write_files(folder, name, {**contents, ".md": page.encode()})


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def print_progress(text: str) -> None:
    """Print what happens now."""
    print(text, file=sys.stderr, flush=True)


def measure(args: argparse.Namespace, method: Method) -> Figures:
    """Measure the curves."""
    kind = "cuda" if method.device.type == "cuda" else "cpu"
    batch, size = args.batch_size or BATCH[kind], args.input_size
    curves: Figures = {}
    for name in dict.fromkeys(args.curves):
        if name == "size":
            curves[name] = benchmark_curves.size_curve(method, args.sizes, print_progress)
        elif name == "batch":
            batches = args.batches or BATCHES[kind]
            curves[name] = benchmark_curves.batch_curve(method, batches, size, print_progress)
        elif name == "threads":
            curves[name] = benchmark_curves.threads_curve(method, batch, size, print_progress)
        elif name == "processes":
            curves[name] = benchmark_curves.processes_curve(method, args.processes, batch, size, print_progress)
        else:
            curves[name] = measure_communication(args, method, batch, size)
    return curves


def measure_communication(args: argparse.Namespace, method: Method, batch: int, size: int) -> Figures:
    """The model of communication, beside a backward pass that is measured here or taken from a record."""
    backward, where = None, "measured here"
    if args.record is not None:
        backward, batch, device = recorded_backward(args.record, args.model, args.format)
        where = f"two thirds of the training step recorded on {device}"
    model = benchmark_curves.communication_model(method, batch, size, backward, print_progress)
    return {**model, "backward_from": where}


def main(args: argparse.Namespace) -> None:
    """Measure the curves, and write and print their record.

    Raises:
        UserError: a setting cannot work, or the record cannot be written.
    """
    check_device(args.device)
    device = torch.device(args.device)
    if device.type == "cuda" and "processes" in args.curves and max(args.processes) > torch.cuda.device_count():
        raise UserError(f"--processes {max(args.processes)}: there are {torch.cuda.device_count()} GPUs, one for each")
    if args.record is not None:
        recorded_backward(args.record, args.model, args.format)
    out = Path(args.out)
    make_folder(out, f"--out {out}")
    torch.set_num_threads(args.threads)
    rounds, least = (2, 0.0) if args.quick else (args.rounds, LEAST)
    method = Method(args.model, device, args.format, rounds, least, args.threads)
    other = OtherWork()
    curves = measure(args, method)
    record = dict(
        machine=describe(device) | {"device": device_name(device)},
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        revision=args.revision or git_revision(),
        is_quick=args.quick,
        model=args.model,
        format=args.format,
        rounds=rounds,
        other_cores=other.cores(),
        curves=curves,
    )
    write_record(record, out)
    print("\n".join(page_of(record["curves"])))


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    advice = "use smaller --sizes or --batches"
    return run_command("benchmark_growth.py", lambda: main(parser.parse_args(arguments)), parser, advice)


if __name__ == "__main__":
    sys.exit(run())
