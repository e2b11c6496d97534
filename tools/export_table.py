"""What export.py tells of each form: size, difference, top-1 and speed, in one table."""

if not __package__:
    import _repository  # noqa: F401
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sepvit_lib.inference.classifier import Classifier, Description
from sepvit_lib.inference.machine import describe
from sepvit_lib.inference.rounds import Spread, interleave, ratio
from tools.export_data import BATCH_SIZE, Images

CHECKPOINT = "checkpoint"  # the form that the others are compared with: PyTorch, eager, float32
CPU = torch.device("cpu")
LEAST = 0.3  # seconds of one timing: threads of the runtime before it spin for some milliseconds


@dataclass(frozen=True)
class Form:
    """A form of the classifier.

    Attributes:
        classifier: the form, opened.
        file: its file or folder; None for the checkpoint.
    """

    classifier: Classifier
    file: Path | None = None

    def megabytes(self) -> float:
        """Size of its files, in 10⁶ bytes."""
        if self.file is None:
            network = self.classifier.network
            assert network is not None
            return sum(value.nbytes for value in network.state_dict().values()) / 1e6
        parts = self.file.rglob("*") if self.file.is_dir() else parts_of(self.file)
        return sum(part.stat().st_size for part in parts if part.is_file()) / 1e6


def parts_of(file: Path) -> list[Path]:
    """A file with those that belong to it: OpenVINO keeps the weights beside the network."""
    return [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]


@dataclass
class Measured:
    """What was measured of a form.

    Attributes:
        form: the form.
        difference: largest difference of its logits from the checkpoint's.
        top1: its top-1 (%); None without labels.
        latency: seconds for one image, round by round.
        seconds: seconds for a batch, round by round.
    """

    form: Form
    difference: float = 0.0
    top1: float | None = None
    latency: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measure(classifier: Classifier, forms: Mapping[str, Form], images: Images) -> dict[str, Measured]:
    """Compare all forms with the checkpoint, image by image."""
    measured = {CHECKPOINT: Measured(Form(classifier))} | {name: Measured(form) for name, form in forms.items()}
    correct = dict.fromkeys(measured, 0)
    for batch, labels in images.batches():
        reference = classifier.logits([classifier.prepare(image) for image in batch])
        for name, one in measured.items():
            form = one.form.classifier
            logits = reference if name == CHECKPOINT else form.logits([form.prepare(image) for image in batch])
            difference = float((logits - reference).abs().max())
            one.difference = max(one.difference, difference) if math.isfinite(difference) else math.nan
            if labels:
                correct[name] += int((logits.argmax(dim=1) == torch.tensor(labels)).sum())
    if images.labels:
        for name, one in measured.items():
            one.top1 = 100 * correct[name] / len(images.images)
    return measured


def time_forms(measured: Mapping[str, Measured], images: Images, rounds: int) -> None:
    """Time all forms, interleaved round by round: one image, and a batch. The preprocessing counts if it is inside."""
    for batch_size in (1, BATCH_SIZE):
        inputs = {name: _inputs(one.form.classifier, images, batch_size) for name, one in measured.items()}
        calls = {name: partial(one.form.classifier.logits, inputs[name]) for name, one in measured.items()}
        times = interleave(calls, CPU, rounds, LEAST)
        for name, seconds in times.seconds.items():
            if batch_size == 1:
                measured[name].latency = seconds
            else:
                measured[name].seconds = seconds


def _inputs(classifier: Classifier, images: Images, count: int) -> list[Tensor]:
    return [classifier.prepare(images.images[number % len(images.images)]) for number in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------

HEADER = ("form", "file", "MB", "largest difference", "top-1, %", "latency, ms", "ratio", "images/s", "ratio")


def report(
    description: Description,
    measured: Mapping[str, Measured],
    failures: Mapping[str, str],
    images: Images,
    notes: Sequence[str] = (),
) -> str:
    """Write the table, and below it how it was measured, remarks, and why some forms were not made."""
    height, width = description.preprocessing.size
    rows = [HEADER, *(_row(name, one, measured[CHECKPOINT]) for name, one in measured.items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    machine = describe(CPU)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "onnxruntime", "openvino") if name in machine)
    lines_below = [
        f"{description.model}, {len(description.classes)} classes, {height} × {width} pixels, {machine['device']}, "
        f"{versions}.",
        f"Differences of the logits{' and top-1' if images.labels else ''}: on {images.source}. Speed: medians of "
        f"{len(measured[CHECKPOINT].latency)} interleaved rounds, one image and batches of {BATCH_SIZE}; ratios to the "
        "checkpoint in eager mode.",
        *notes,
        *(f"Not made: {name}: {why}" for name, why in failures.items()),
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(lines_below) + "\n"


def _row(name: str, one: Measured, reference: Measured) -> tuple[str, ...]:
    latency, seconds = Spread.of(one.latency).median, Spread.of(one.seconds).median
    return (
        name,
        one.form.file.name if one.form.file else "",
        f"{one.form.megabytes():.1f}",
        "" if name == CHECKPOINT else f"{one.difference:.1e}",
        "" if one.top1 is None else f"{one.top1:.2f}",
        f"{1000 * latency:.1f}",
        f"{ratio(reference.latency, one.latency).median:.2f}",
        f"{BATCH_SIZE / seconds:.1f}",
        f"{ratio(reference.seconds, one.seconds).median:.2f}",
    )
