"""Compare and time a classifier's checkpoint and its exported files: the rows of export.py's table."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from sepvit_lib.common.errors import UserError
from sepvit_lib.common.machine import describe
from sepvit_lib.inference.classifier import Classifier
from sepvit_lib.rounds import interleave, ratio
from tools.exporting.data import BATCH_SIZE, Images, correct

CHECKPOINT = "checkpoint"  # the form with which others are compared: PyTorch in eager mode, float32
MIN_SECONDS = 0.3  # per timing: at first, the previous runtime's threads still occupy cores
CPU = torch.device("cpu")
HEADER = ("form", "file", "MB", "largest difference", "{}, %", "latency, ms", "ratio", "images/s", "ratio")


@dataclass
class Form:
    """A form of the classifier (the checkpoint or an exported file), and its measurements.

    Attributes:
        classifier: the form, loaded for inference.
        file: its file or folder; None for the checkpoint.
        difference: largest difference of its logits from the checkpoint's.
        top1: its top-1, or for several labels per image the mean F1 of the images (%); None without labels.
        seconds: seconds per batch in each round, by batch size.
    """

    classifier: Classifier
    file: Path | None = None
    difference: float = 0.0
    top1: float | None = None
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def megabytes(self) -> float:
        """Size of its files, in 10⁶ bytes."""
        if self.file is None:
            assert self.classifier.network is not None
            return sum(value.nbytes for value in self.classifier.network.state_dict().values()) / 1e6
        parts = self.file.rglob("*") if self.file.is_dir() else parts_of(self.file)
        return sum(part.stat().st_size for part in parts if part.is_file()) / 1e6


def parts_of(file: Path) -> list[Path]:
    """A file and its companions: OpenVINO and ncnn store the weights in a second file."""
    return [file, file.with_suffix(".bin")] if file.suffix in (".xml", ".param") else [file]


def compare(forms: Mapping[str, Form], images: Images) -> None:
    """Compare all forms with the checkpoint, image by image."""
    reference, hits = forms[CHECKPOINT].classifier, dict.fromkeys(forms, 0.0)
    for batch, labels in images.batches():
        expected = reference.logits([reference.prepare(image) for image in batch])
        for name, form in forms.items():
            one = form.classifier
            logits = expected if one is reference else one.logits([one.prepare(image) for image in batch])
            difference = float((logits - expected).abs().max())
            form.difference = max(form.difference, difference) if math.isfinite(difference) else math.nan
            if labels:
                hits[name] += correct(logits, labels)
    if images.labels:
        for name, form in forms.items():
            form.top1 = 100 * hits[name] / len(images.images)


def time_forms(forms: Mapping[str, Form], images: Images, rounds: int) -> None:
    """Time all forms on one image and on a batch. Built-in preprocessing is included."""
    for size in (1, BATCH_SIZE):
        chosen = [images.images[number % len(images.images)] for number in range(size)]
        calls = {
            name: partial(form.classifier.logits, [form.classifier.prepare(image) for image in chosen])
            for name, form in forms.items()
        }
        for name, seconds in time_calls(calls, rounds).items():
            forms[name].seconds[size] = seconds


def time_calls(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    Raises:
        UserError: a call fails.
    """
    seconds, errors = interleave(calls, CPU, rounds, MIN_SECONDS)
    if errors:
        raise UserError("; ".join(f"{name}: {error}" for name, error in errors.items()))
    return seconds


def report(forms: Mapping[str, Form], failures: Mapping[str, str], images: Images, notes: Sequence[str]) -> str:
    """Format the table, followed by the method of measurement, remarks, and the reasons why forms are missing."""
    description = forms[CHECKPOINT].classifier.description
    height, width = description.preprocessing.size
    header = [cell.format(images.metric) for cell in HEADER]
    rows = [header, *(_row(name, form, forms[CHECKPOINT]) for name, form in forms.items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    machine = ", ".join(f"{name} {value}" for name, value in describe(CPU).items())
    compared = f" and {images.metric}" if images.labels else ""
    paragraphs = [
        f"{description.model}, {len(description.classes)} classes, {height} × {width} pixels. Machine: {machine}.",
        f"Differences of the logits{compared}: on {images.source}. Speed: medians of "
        f"{len(forms[CHECKPOINT].seconds[1])} interleaved rounds, one image and batches of {BATCH_SIZE}; ratios to the "
        "checkpoint in eager mode.",
        *notes,
        *(
            f"{name}: takes batches of {form.classifier.description.batch_size}; other batches are split or padded."
            for name, form in forms.items()
            if form.classifier.description.batch_size
        ),
        *(f"Not made: {name}: {why}" for name, why in failures.items()),
    ]
    return "\n\n".join(["\n".join(lines), *paragraphs]) + "\n"


def _row(name: str, form: Form, reference: Form) -> tuple[str, ...]:
    one, batch = form.seconds[1], form.seconds[BATCH_SIZE]
    return (
        name,
        form.file.name if form.file else "",
        f"{form.megabytes():.1f}",
        "" if name == CHECKPOINT else f"{form.difference:.1e}",
        "" if form.top1 is None else f"{form.top1:.2f}",
        f"{1000 * statistics.median(one):.1f}",
        f"{ratio(reference.seconds[1], one).median:.2f}",
        f"{BATCH_SIZE / statistics.median(batch):.1f}",
        f"{ratio(reference.seconds[BATCH_SIZE], batch).median:.2f}",
    )
