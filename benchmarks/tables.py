"""Measure one table of the benchmark: build, check and time the subjects of its rows."""

import functools
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.subjects import DTYPES, TOP1, Ready, Setting, Subject, build, create_network, flattened, not_offered
from sepvit_lib.common.devices import synchronize
from sepvit_lib.common.errors import UserError
from sepvit_lib.count import count_multiply_adds, peak_memory
from sepvit_lib.rounds import MIN_SECONDS, Spread, interleave, ratio, reason

# Maximum ‖outputs − expected‖ / ‖expected‖, with expected from float32 in eager mode. float32's value allows for TF32.
TOLERANCES = {"float32": 5e-3, "bfloat16": 0.05, "bfloat16-whole": 0.1, "float16": 0.02, "int8": 0.5}
PASSES = {True: 3, False: 1}  # forward passes per call in training and in inference: a backward pass counts as two
MATRIX_PRODUCT = "matrix product"
SIDES = {"cpu": 2048, "cuda": 8192}  # sides of matrices: on a GPU, 2048 × 2048 takes less time than launching the call


SPREADS = ("speed", "speed_float32", "share")  # the fields of a row that are spreads


@dataclass
class Row:
    """Measurements of a subject, which the first three fields specify.

    Attributes:
        failure: why nothing was measured; "" if it was.
        parameters: number of parameters.
        multiply_adds: multiply-adds of one image's forward pass.
        top1_published: top-1 (%) that the model's authors published at 224 × 224; None if there is none.
        output_error: relative error of the outputs, compared with float32 in eager mode.
        seconds: seconds of a call in each round.
        speed: speed relative to SepViT in eager mode in the same number format.
        speed_float32: speed relative to SepViT in eager mode in float32.
        share: fraction of the rate of large matrix products that the subject reaches.
        bytes_held: bytes of weights and of the optimiser's state.
        bytes_peak: peak bytes that a call allocates in addition to `bytes_held`.
    """

    model: str
    form: str
    number_format: str
    failure: str = ""
    parameters: int = 0
    multiply_adds: int = 0
    top1_published: float | None = None
    output_error: float | None = None
    seconds: list[float] = field(default_factory=list)
    speed: Spread | None = None
    speed_float32: Spread | None = None
    share: Spread | None = None
    bytes_held: int | None = None
    bytes_peak: int | None = None

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Row":
        """Read a row that was stored with `dataclasses.asdict`."""
        return cls(**{**stored, **{name: Spread(**stored[name]) for name in SPREADS if stored[name]}})

    @property
    def subject(self) -> Subject:
        """The row's subject."""
        return Subject(self.model, self.form, self.number_format)

    @property
    def median(self) -> float | None:
        """Median seconds of a call."""
        return Spread.of(self.seconds).median if self.seconds else None

    @property
    def bytes_all(self) -> int | None:
        """Peak bytes in use."""
        return None if self.bytes_peak is None or self.bytes_held is None else self.bytes_peak + self.bytes_held


@dataclass
class Table:
    """Rows that were measured in the same rounds.

    Attributes:
        measure: one of `MEASURES`.
        number_format: number format of the rows. A row in float32 may be added as a baseline.
        settings: further shared settings: model, batch, image size, …
        run: date, revision, rounds and machine.
        rates: multiply-adds per second of a large matrix product, by round.
        rows: the rows.
    """

    measure: str
    number_format: str
    settings: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Key that is equal for tables with the same settings."""
        return json.dumps([self.measure, self.number_format, self.settings], sort_keys=True)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Table":
        """Read a table that was stored with `dataclasses.asdict`."""
        return cls(**{**stored, "rows": [Row.from_dict(row) for row in stored["rows"]]})


def measure_table(table: Table, subjects: Sequence[Subject], setting: Setting, rounds: int, is_quick: bool) -> None:
    """Build, check and time subjects, and fill a table's rows. Prints each step to standard error.

    A subject that fails is reported in its row; the others continue.

    Args:
        table: the table. Its rows follow the order of the subjects.
        subjects: the subjects, including the baselines.
        setting: the setting that they share.
        rounds: rounds of timing.
        is_quick: time single calls and small matrices, to try the benchmark itself.
    """
    report = partial(print, file=sys.stderr, flush=True)
    published = TOP1 if setting.size == (224, 224) and not setting.is_dense else {}
    table.rows = [Row(**asdict(subject), top1_published=published.get(subject.model)) for subject in subjects]
    references: dict[str, Tensor] = {}
    ready: dict[Subject, Ready] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in table.rows:
            row.failure = not_offered(row.subject, setting)
            if row.failure:
                continue
            report(f"building {row.subject}")
            try:
                row.parameters, row.multiply_adds = counts(row.model, setting.size, setting.is_dense)
                if row.model not in references:
                    references[row.model] = _reference(row.model, setting)
                ready[row.subject] = _checked(row, references[row.model], setting, Path(folder))
            except UserError:
                raise
            except Exception as error:
                row.failure = reason(error)
            _release(setting.device)
        report(f"timing {len(ready)} subjects, {rounds} rounds")
        _time(table, ready, setting, rounds, is_quick)
    ready.clear()
    torch.compiler.reset()  # otherwise, only the first few networks of a class are compiled
    _release(setting.device)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@functools.cache
def counts(model: str, size: tuple[int, int], is_dense: bool) -> tuple[int, int]:
    """Count parameters, and multiply-adds of one image, on the CPU."""
    setting = Setting("latency", torch.device("cpu"), 1, size, is_dense)
    network = create_network(Subject(model, "eager", "float32"), setting).eval()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, count_multiply_adds(network, torch.zeros(1, 3, *size))


def _reference(model: str, setting: Setting) -> Tensor:
    """Outputs of a model in float32 and eager mode."""
    network = create_network(Subject(model, "eager", "float32"), setting).eval().to(setting.device)
    with torch.inference_mode():
        return flattened(network(setting.images().to(setting.device)))


def _checked(row: Row, expected: Tensor, setting: Setting, folder: Path) -> Ready:
    """Build a row's subject, compare its outputs with those in float32 and eager mode, and measure its memory.

    Raises:
        ValueError: the outputs differ, or the loss of a training step is not finite.
    """
    ready = build(row.subject, setting, folder)
    outputs = ready.outputs(setting.images())
    row.output_error = ((outputs - expected).norm() / expected.norm()).item()
    if not row.output_error <= TOLERANCES[row.number_format]:
        raise ValueError(f"outputs differ from those in float32 by {row.output_error:.2g} of their norm")
    result = ready.call()
    if setting.is_training and not torch.isfinite(result).all():  # type: ignore[arg-type]
        raise ValueError(f"the loss of a training step is {result}")
    row.bytes_held = ready.held()
    row.bytes_peak = None if row.bytes_held is None else peak_memory(ready.call, setting.device)
    return ready


def matrix_product(dtype: torch.dtype, device: torch.device, is_quick: bool) -> tuple[Callable[[], object], int]:
    """A large matrix product as a call (a small one if `is_quick`), and its multiply-adds."""
    side = 64 if is_quick else SIDES.get(device.type, SIDES["cpu"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return partial(torch.matmul, a, b, out=torch.empty_like(a)), side**3


def _time(table: Table, ready: dict[Subject, Ready], setting: Setting, rounds: int, is_quick: bool) -> None:
    """Time the ready subjects and a large matrix product, and fill the rows."""
    calls: dict[Subject | str, Callable[[], object]] = {}
    for subject, entry in ready.items():
        calls[subject] = partial(_waited, entry.call, setting.device) if table.measure == "latency" else entry.call
    dtype, products = DTYPES[table.number_format], 0
    if dtype is not None:
        calls[MATRIX_PRODUCT], products = matrix_product(dtype, setting.device, is_quick)
    seconds, errors = interleave(calls, setting.device, rounds, 0.0 if is_quick else MIN_SECONDS)
    table.rates = [products / value for value in seconds.get(MATRIX_PRODUCT, [])]
    for row in table.rows:
        if row.subject in ready:
            row.failure, row.seconds = errors.get(row.subject, ""), seconds.get(row.subject, [])
    compare(table)


def _waited(call: Callable[[], object], device: torch.device) -> None:
    call()
    synchronize(device)  # before the next call starts


def compare(table: Table) -> None:
    """Fill in speeds and shares, round by round."""
    model, batch = table.settings["model"], table.settings["batch_size"]
    measured = [row for row in table.rows if row.seconds]
    baselines = {row.number_format: row.seconds for row in measured if row.model == model and row.form == "eager"}
    for row in measured:
        if row.number_format in baselines:
            row.speed = ratio(baselines[row.number_format], row.seconds)
        if "float32" in baselines:
            row.speed_float32 = ratio(baselines["float32"], row.seconds)
        if row.number_format == table.number_format and table.rates:
            multiply_adds = PASSES[table.measure == "training"] * batch * row.multiply_adds
            row.share = ratio([multiply_adds / rate for rate in table.rates], row.seconds)
