"""Measuring one table of a benchmark: subjects are built, checked, and timed in rounds."""

if not __package__:
    import _repository  # noqa: F401
import functools
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepvit_lib.training.devices import synchronize
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.measure import count_activations, count_multiply_adds, peak_memory
from tools import benchmark_machine, benchmark_networks
from tools.benchmark_accuracy import Validation
from tools.benchmark_networks import DTYPES, TOP1, Ready, Setting, Subject
from tools.benchmark_profile import Operation, profile_call
from tools.benchmark_rounds import LEAST, Spread, interleave, ratio, reason

# Largest ‖outputs − expected‖ / ‖expected‖, expected: float32 in eager mode. float32 admits the matrix units' TF32.
TOLERANCES = {"float32": 5e-3, "bfloat16": 0.05, "bfloat16-whole": 0.1, "float16": 0.02, "int8": 0.5}
LISTED = 10  # operations of a profile
# A training step multiplies in the forward pass, and twice in the backward pass: gradients of inputs and weights.
PASSES = {True: 3, False: 1}
# 4-byte values per parameter that a training step has to move: the gradient is written and read; weight and both
# moments of AdamW are read and written.
TRAINING_VALUES = 8
MATRIX_PRODUCT, COPY = "matrix product", "copy"


@dataclass(frozen=True)
class Method:
    """How to measure.

    Attributes:
        rounds: rounds of timing.
        least: seconds of one timing at least.
        is_quick: use small matrices and copies: to try the benchmark itself.
        profiles: also profile each subject.
        deadline: when to build no further subject and to begin no further round, by `time.monotonic`.
    """

    rounds: int
    least: float = LEAST
    is_quick: bool = False
    profiles: bool = False
    deadline: float = math.inf


SPREADS = ("speed", "speed_float32", "share")  # the fields of a row that are spreads


@dataclass
class Row:
    """What was measured of a subject.

    Attributes:
        model: the model.
        form: its form.
        number_format: its number format.
        failure: why nothing was measured; "" if it was.
        parameters: number of parameters.
        multiply_adds: of one image's forward pass.
        activations: of one image's forward pass: outputs of convolutions, linear layers and matrix products.
        top1_published: top-1 (%) that its authors published.
        top1: top-1 (%) measured with a checkpoint.
        top1_ratio: relative to SepViT in eager mode in float32.
        output_error: relative error of the outputs, compared with float32 in eager mode.
        output_values: numbers in the outputs of a call.
        seconds: of a call, by round.
        speed: relative to SepViT in eager mode, in the same number format (median, smallest, largest of the rounds).
        speed_float32: relative to SepViT in eager mode in float32.
        share: of the limit that the machine's rates set (median, smallest, largest of the rounds).
        bytes_held: of weights and of the optimiser's state.
        bytes_peak: most bytes allocated at once during a call, beyond those.
        profile: operations that take most of the time.
    """

    model: str
    form: str
    number_format: str
    failure: str = ""
    parameters: int = 0
    multiply_adds: int = 0
    activations: int = 0
    top1_published: float | None = None
    top1: float | None = None
    top1_ratio: float | None = None
    output_error: float | None = None
    output_values: int = 0
    seconds: list[float] = field(default_factory=list)
    speed: Spread | None = None
    speed_float32: Spread | None = None
    share: Spread | None = None
    bytes_held: int | None = None
    bytes_peak: int | None = None
    profile: dict[str, Operation] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Row":
        """Read a row that was stored with `dataclasses.asdict`."""
        spreads = {name: Spread(**stored[name]) for name in SPREADS if stored[name]}
        profile = {name: Operation(**operation) for name, operation in stored["profile"].items()}
        return cls(**{**stored, **spreads, "profile": profile})

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
        """Most bytes in use at once."""
        return None if self.bytes_peak is None or self.bytes_held is None else self.bytes_peak + self.bytes_held


@dataclass
class Table:
    """Rows that were measured in the same rounds.

    Attributes:
        measure: one of `MEASURES`.
        number_format: number format of the rows. A row in float32 may stand beside, as a baseline.
        settings: what else was the same for all: model, device, batch, image size, …
        run: date, revision, rounds and versions.
        rates: rates of the machine by round: multiply-adds and bytes per second.
        other_cores: cores that other processes kept busy meanwhile; None if unknown.
        rows: the rows.
    """

    measure: str
    number_format: str
    settings: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    other_cores: float | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What a later table of the same kind has in common with this one."""
        return json.dumps([self.measure, self.number_format, self.settings], sort_keys=True)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Table":
        """Read a table that was stored with `dataclasses.asdict`."""
        rows = [Row.from_dict(row) for row in stored["rows"]]
        return cls(**{**stored, "rows": rows})


def measure_table(
    table: Table,
    subjects: Sequence[Subject],
    setting: Setting,
    method: Method,
    report: Callable[[str], None],
    validation: Validation | None = None,
) -> None:
    """Build, check and time subjects, and fill a table's rows.

    A subject that fails is reported in its row; the others go on.

    Args:
        table: the table. Its rows follow the order of the subjects.
        subjects: the subjects, the baselines among them.
        setting: what they have in common.
        method: how to measure.
        report: told about progress.
        validation: images to measure SepViT's top-1 with, where inference is measured; None without them.
    """
    published = {} if setting.is_dense else TOP1
    table.rows = [Row(**asdict(subject), top1_published=published.get(subject.model)) for subject in subjects]
    references: dict[str, Tensor] = {}
    ready: dict[Subject, Ready] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in table.rows:
            is_late = time.monotonic() > method.deadline
            row.failure = benchmark_networks.not_offered(row.subject, setting) or ("no time left" if is_late else "")
            if row.failure:
                continue
            report(f"building {row.subject}")
            try:
                _count(row, setting)
                if row.model not in references:
                    references[row.model] = _reference(row.model, setting)
                ready[row.subject] = _checked(row, references[row.model], setting, Path(folder))
                if validation is not None and table.measure == "inference" and row.model == table.settings["model"]:
                    row.top1 = validation.top1(ready[row.subject].outputs, setting.batch_size)
                if method.profiles:
                    operations = profile_call(ready[row.subject].call, setting.device)
                    row.profile = {name[:160]: operations[name] for name in list(operations)[:LISTED]}
            except UserError:
                raise
            except Exception as error:
                row.failure = reason(error)
                ready.pop(row.subject, None)
            _release(setting.device)
        report(f"timing {len(ready)} subjects, {method.rounds} rounds")
        _time(table, ready, setting, method)
    ready.clear()
    torch.compiler.reset()  # it compiles only so many networks of a class, and runs further ones in eager mode
    _release(setting.device)


def _release(device: torch.device) -> None:
    """Free what the last subject has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _count(row: Row, setting: Setting) -> None:
    """Fill in what is counted of a row's model."""
    row.parameters, row.multiply_adds, row.activations = counts(
        row.model, setting.size, setting.is_dense, setting.classes
    )


@functools.cache
def counts(model: str, size: tuple[int, int], is_dense: bool, classes: int) -> tuple[int, int, int]:
    """Count parameters, and multiply-adds and activations of one image, on the CPU."""
    setting = Setting("latency", torch.device("cpu"), 1, size, is_dense, classes=classes)
    network = benchmark_networks.create_network(model, setting).eval()
    image = torch.zeros(1, 3, *size)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, count_multiply_adds(network, image), count_activations(network, image)


def _reference(model: str, setting: Setting) -> Tensor:
    """Outputs of a model in float32 and eager mode."""
    network = benchmark_networks.create_network(model, setting).eval().to(setting.device)
    with torch.inference_mode():
        return benchmark_networks.flattened(network(setting.images().to(setting.device)))


def _checked(row: Row, expected: Tensor, setting: Setting, folder: Path) -> Ready:
    """Build a row's subject, and measure its outputs' error and its memory.

    Raises:
        ValueError: the outputs are wrong.
    """
    ready = benchmark_networks.build(row.subject, setting, folder)
    first: list[Tensor] = []
    resident = benchmark_machine.peak_resident(lambda: first.append(ready.outputs(setting.images())))
    row.output_values = expected.numel()
    row.output_error = ((first[0] - expected).norm() / expected.norm()).item()
    if not row.output_error <= TOLERANCES[row.number_format]:
        raise ValueError(f"outputs differ from those in float32 by {row.output_error:.2g} of their norm")
    result = ready.call()
    if setting.is_training and not torch.isfinite(result).all():  # type: ignore[arg-type]
        raise ValueError(f"the loss of a training step is {result}")
    row.bytes_held = ready.held()
    row.bytes_peak = resident if ready.is_runtime else peak_memory(ready.call, setting.device)
    return ready


def _time(table: Table, ready: dict[Subject, Ready], setting: Setting, method: Method) -> None:
    """Time what is ready, and the machine's rates beside it, and fill the rows."""
    calls: dict[Subject | str, Callable[[], object]] = {}
    for subject, entry in ready.items():
        calls[subject] = partial(_waited, entry.call, setting.device) if table.measure == "latency" else entry.call
    amounts: dict[str, int] = {}
    dtype = DTYPES[table.number_format]
    if dtype is not None:
        side = 64 if method.is_quick else None
        calls[MATRIX_PRODUCT], amounts[MATRIX_PRODUCT] = benchmark_machine.matrix_product(dtype, setting.device, side)
    size = 2**16 if method.is_quick else None
    calls[COPY], amounts[COPY] = benchmark_machine.large_copy(dtype or torch.float32, setting.device, size)
    other = benchmark_machine.OtherWork()
    times = interleave(calls, setting.device, method.rounds, method.least, method.deadline)
    table.other_cores = other.cores()
    table.rates = {
        name: [amount / seconds for seconds in times.seconds[name]]
        for name, amount in amounts.items()
        if name in times.seconds
    }
    for row in table.rows:
        if row.subject in ready:
            row.failure = times.errors.get(row.subject, "")
            row.seconds = times.seconds.get(row.subject, [])
    _compare(table, setting)


def _waited(call: Callable[[], object], device: torch.device) -> None:
    """Make a call and wait for it: the next one must not start before the device has finished it."""
    call()
    synchronize(device)


def _compare(table: Table, setting: Setting) -> None:
    """Fill in speeds and shares, round by round."""
    baselines = {
        row.number_format: row.seconds
        for row in table.rows
        if row.seconds and row.model == table.settings["model"] and row.form == table.settings["baseline"]
    }
    accuracies = {row.number_format: row.top1 for row in table.rows if row.form == "eager" and row.top1}
    for row in table.rows:
        if row.top1 is not None and "float32" in accuracies:
            row.top1_ratio = row.top1 / accuracies["float32"]
        if not row.seconds:
            continue
        if row.number_format in baselines:
            row.speed = ratio(baselines[row.number_format], row.seconds)
        if "float32" in baselines:
            row.speed_float32 = ratio(baselines["float32"], row.seconds)
        if row.number_format == table.number_format and {MATRIX_PRODUCT, COPY} <= table.rates.keys():
            multiply_adds = PASSES[setting.is_training] * setting.batch_size * row.multiply_adds
            compulsory = compulsory_bytes(row, setting)
            limits = [
                max(multiply_adds / rate, compulsory / bandwidth)
                for rate, bandwidth in zip(table.rates[MATRIX_PRODUCT], table.rates[COPY])
            ]
            row.share = ratio(limits, row.seconds)


def compulsory_bytes(row: Row, setting: Setting) -> int:
    """Bytes that a call has to move: weights and images are read, outputs are written.

    Weights count in their own number format, images and outputs as float32. In training, the weights' gradients and the
    optimiser's state are moved too, see `TRAINING_VALUES`, and outputs need not be written.
    """
    images = 4 * setting.batch_size * 3 * math.prod(setting.size)
    if setting.is_training:
        return 4 * TRAINING_VALUES * row.parameters + images
    width = {"bfloat16-whole": 2, "int8": 1}.get(row.number_format, 4)
    return width * row.parameters + images + 4 * row.output_values
