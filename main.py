"""Train and evaluate SepViT as an image classifier. `python main.py --help` lists the settings."""

import signal

import sepvit_lib.common.environment  # noqa: F401 before timm

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import to_2tuple
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg_value
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    optimizer_kwargs,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import DistillationTeacher, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from datasets import (
    DATA_SETS,
    INAT_CATEGORIES,
    READERS,
    SMALL_INPUT,
    STREAMS,
    TABLE,
    DataSettings,
    DeviceTransform,
    LoaderSettings,
    TransformSettings,
    build_train_loader,
    build_transform,
    build_val_loader,
    find_dataset,
    match_splits,
    prepared,
)
from engine import (
    DistillationLoss,
    EvaluationSettings,
    LoopSettings,
    Renormalised,
    TaskLoss,
    WeightedLoss,
    evaluate,
    measure_throughput,
    train_one_epoch,
)
from samplers import TrainBatchSampler
from sepvit import VARIANTS, WINDOW_SIZES, SepViT
from sepvit_lib.common.class_names import canonical, check_map, listed
from sepvit_lib.common.class_weights import BALANCED, class_weights
from sepvit_lib.common.command_line import (
    KeyValues,
    Parser,
    Size,
    fraction,
    natural,
    non_negative,
    path,
    positive,
    positive_fraction,
    positive_int,
    run_command,
    seconds,
)
from sepvit_lib.common.devices import available_cores, best_device, check_device
from sepvit_lib.common.errors import Preempted, UserError, setting, with_flags
from sepvit_lib.common.packages import require
from sepvit_lib.common.processes import get_world_size, init_distributed, is_main_process, on_main_process, print_main
from sepvit_lib.common.recipes import ARGS, parse_with_recipe, write_recipe
from sepvit_lib.common.saved_settings import img_size_of, settings_in
from sepvit_lib.common.storage import make_folder, write_output
from sepvit_lib.common.tables import as_csv, as_text
from sepvit_lib.count import LARGE_PADDING, padding_as_text, padding_of, with_less_padding
from sepvit_lib.networks import create_network, to_device
from sepvit_lib.pipeline.corruptions import MIN_CORRUPTED, corrupt, corruption_table, top1_by_corruption
from sepvit_lib.pipeline.data_sets.base import classes_of
from sepvit_lib.pipeline.data_sets.table import SEPARATOR
from sepvit_lib.pipeline.duplicates import MAX_IMAGES, find_duplicates
from sepvit_lib.pipeline.image_files import ORIENTATIONS, STORED, count_turned
from sepvit_lib.pipeline.preprocessing import Preprocessing
from sepvit_lib.pipeline.samples import BY_CLASS_MAP, NO_NAMES, ImageData, fingerprint
from sepvit_lib.run.checkpoint_names import StepNames
from sepvit_lib.run.checkpoints import (
    classifier_of,
    has_both_weights,
    load_weights,
    match_classifier,
    model_kwargs_of,
    read_checkpoint,
    weights_of,
)
from sepvit_lib.run.features import MAX_BYTES, compute_features
from sepvit_lib.run.monitor import DelayedFlags, MonitorSettings, StepMonitor
from sepvit_lib.run.output import Output, draw_corruptions, stopped
from sepvit_lib.run.resume import PACKAGES, Source, check_source, describe_data, describe_run, find_checkpoint, restore
from sepvit_lib.run.state import DIVERGENCE_ADVICE, Precision, Training
from sepvit_lib.run.watchdog import Preemption, Watchdog, heartbeat_timeout, ignore_preemption, startup_timeout
from utils import Stream, seed_everything

RERUN = "run the same command again"
RESUME = "run the same command with --auto-resume to resume from the last checkpoint"
MEMORY_ADVICE = (
    "lower --batch-size (raise --accum-steps to keep the images per step), use --grad-checkpointing, or lower "
    "--input-size"
)

T = TypeVar("T")
SPLIT, REPORT = "split.csv", "report/report.html"
# Metrics of `evaluate`, by --watch.
WATCHED = {"top1": "acc1", "loss": "loss", "balanced-accuracy": "balanced_accuracy", "f1": "f1", "map": "map"}
SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "constant", "wsd")
DEPTHWISE = ("*pos_block.*.weight",)  # names of the depthwise convolutions


def main(args: argparse.Namespace) -> None:
    """Train, evaluate, or measure throughput, depending on the settings."""
    check_settings(args)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic
    device = init_distributed(args.device, args.world_size, args.dist_url, 2 * startup_timeout(args.timeout))
    seed_everything(Stream.WEIGHTS, args.seed)
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    precision = build_precision(args, device)
    is_training = not (args.throughput or args.eval)
    warn_of_settings(args)
    advice = RESUME if is_training else RERUN
    names = StepNames(args.keep_checkpoints)
    with (
        Output(Path(args.output_dir or args.model), heartbeat_timeout(args.timeout), names) as output,
        Preemption("main.py", saves=is_training) as preemption,
        Watchdog(args.timeout, args.dist_url, preemption, advice, build_parser().flags()) as watchdog,
    ):
        if args.throughput:
            run_throughput(args, watchdog, precision)
        elif args.eval:
            run_evaluation(args, watchdog, precision)
        else:
            run_training(args, output, watchdog, precision)
            if args.report and (path := output.unreported(REPORT)):
                chosen = dict(eval=True, resume=path, finetune="", output_dir=str(output.folder))
                run_evaluation(argparse.Namespace(**vars(args) | chosen), watchdog, precision)


def run_throughput(args: argparse.Namespace, watchdog: Watchdog, precision: Precision) -> None:
    """Measure the network's throughput in images per second (`--throughput`)."""
    args, preprocessing = adopt_settings(args, None, "")
    val = build_data(args, False, preprocessing)
    model = build_model(args, val.num_classes, precision)
    loader = build_val_loader(val, settings_from(args, LoaderSettings))
    batch_size, images_per_second = measure_throughput(model, loader, precision, args.print_freq, watchdog)
    number_format = "float32" if precision.dtype is None else str(precision.dtype).removeprefix("torch.")
    print_main(
        f"batch size {batch_size} (validation batches are 1.5 × --batch-size {args.batch_size}), "
        f"{number_format}: {images_per_second:.1f} images/s"
    )


def run_evaluation(args: argparse.Namespace, watchdog: Watchdog, precision: Precision) -> None:
    """Validate the weights of the `--resume` checkpoint, and its averaged weights if it has any (`--eval`)."""
    what = f"--resume {args.resume}"
    checkpoint = read_checkpoint(args.resume, what) if args.resume else None
    is_multi_label = settings_in(checkpoint or {}).get("multi_label", args.multi_label)
    if args.multi_label and not is_multi_label:
        raise UserError(f"--multi-label: {what} was trained with one label per image; omit it")
    args.multi_label = is_multi_label
    args, preprocessing = adopt_settings(args, checkpoint, what)
    check_evaluation(args)
    val = build_data(args, False, preprocessing)
    if checkpoint is not None:
        val = val.matched(checkpoint.get("classes"), what)
    model = build_model(args, val.num_classes, precision)
    folder = Path(args.output_dir) if args.output_dir else None
    if folder is not None:
        on_main_process(lambda: make_folder(folder, f"--output_dir {folder}"))
    if checkpoint is not None:
        load_from(model, checkpoint, what, "evaluate it on images of its own classes")
    else:
        print_main("--eval without --resume: evaluating random weights")
    rows: list[Any] | None = [] if args.report else None

    def measure(data: ImageData, title: str, *others: Any) -> dict[str, float]:
        loader = build_val_loader(data, settings_from(args, LoaderSettings))
        return evaluate(model, loader, precision, title, settings_from(args, EvaluationSettings), watchdog, *others)

    def top1_of(name: str, severity: int) -> float:
        data = replace(val, transform=preprocessing.transform(partial(corrupt, name=name, severity=severity)))
        return measure(data, f"{name}, severity {severity}", None, True)["acc1"]

    stats: dict[str, Any] = prefixed("test", measure(val, "validation", rows))
    check_outputs(stats, "validation")
    if args.corruptions:
        stats["corruptions"] = top1_by_corruption(top1_of)
        on_main_process(lambda: print(as_text(corruption_table(stats["corruptions"], stats["test_acc1"]))))
    if checkpoint is not None and has_both_weights(checkpoint):
        load_from(model, checkpoint, what, prefer_ema=True)
        stats |= prefixed("test_ema", measure(val, "validation, averaged weights"))
        load_from(model, checkpoint, what)
    if folder is not None:
        on_main_process(lambda: write_metrics(stats, folder))
    if args.report:  # last: with a page, a run is complete
        watchdog.is_evaluating = True  # writing the report may take longer than the hang timeout
        on_main_process(partial(write_report, args, checkpoint or {}, val, model, preprocessing, rows, stats))


def check_outputs(stats: dict[str, float], title: str) -> None:
    """Refuse a network whose outputs are not finite.

    Raises:
        UserError: the validation loss is not finite.
    """
    if not math.isfinite(stats["test_loss"]):
        raise UserError(
            f"{title}: the loss is {stats['test_loss']} because the network's outputs are not finite; try "
            "--amp off, or train with a lower --lr"
        )


def write_metrics(stats: dict[str, Any], folder: Path) -> None:
    """Write metrics as JSON, and those under corruptions also as a table and a plot.

    Raises:
        UserError: a file cannot be written. A previous version is kept.
    """
    what = f"--output_dir {folder}"
    write_output(folder / "eval.json", lambda file: file.write(json.dumps(stats).encode() + b"\n"), what)
    if top1 := stats.get("corruptions"):
        table, figure = corruption_table(top1, stats["test_acc1"]), draw_corruptions(top1, stats["test_acc1"])
        write_output(folder / "corruptions.csv", lambda file: file.write(as_csv(table).encode() + b"\n"), what)
        write_output(folder / "corruptions.png", lambda file: figure.savefig(file, format="png", dpi=100), what)


def write_report(
    args: argparse.Namespace,
    checkpoint: dict[str, Any],
    val: ImageData,
    model: Any,
    made: Preprocessing,
    rows: Any,
    stats: dict[str, Any],
) -> None:
    """Write the report on an evaluation (`--report`).

    Args:
        args: the command's settings.
        checkpoint: the evaluated checkpoint, empty for random weights.
        val: the evaluated images.
        model: the network, in evaluation mode.
        made: preprocessing of the images.
        rows: logits and label of each image, in the order of the data set.
        stats: metrics of the evaluation.

    Raises:
        UserError: a file cannot be written.
    """
    from sepvit_lib.report import classification, multi_label  # need scikit-learn

    train = find_training_images(args, checkpoint)
    pairs, flags = duplicates_of(train, val, args) if train else None, build_parser().flags()
    subject = classification.Subject(vars(args), default_settings(), flags, checkpoint, val, train, pairs, model, made)
    page = (multi_label if args.multi_label else classification).report(subject, rows)
    if top1 := stats.get("corruptions"):
        classification.add_corruptions(page, top1, stats["test_acc1"])
    page.write(Path(args.output_dir, REPORT), f"--output_dir {args.output_dir}")
    print_main(f"report: {Path(args.output_dir, REPORT)}")


def find_training_images(args: argparse.Namespace, checkpoint: dict[str, Any]) -> ImageData | None:
    """Find the images that a checkpoint was trained on; None if it does not record them, or if those at hand differ."""
    if known := checkpoint.get("data", {}).get("train"):
        with suppress(UserError):
            train = find_images(args, is_train=True)
            if fingerprint(train) == known["fingerprint"]:
                return train.matched(checkpoint.get("classes"), "", quietly=True)
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """The parts of a training run.

    Attributes:
        training: the run's state.
        train_loader: training batches.
        val_loader: validation batches; not used if `val_interval` is 0.
        val_interval: epochs from one validation to the next; 0 for no validation.
        criterion: the loss.
        mixup: mixup and CutMix, or None.
        prepare: turns a loaded batch into normalised images on the device.
        precision: device, number format and memory format.
        loop: settings of the training loop.
        evaluation: settings of validation.
    """

    training: Training
    train_loader: DataLoader
    val_loader: DataLoader
    val_interval: int
    criterion: nn.Module
    mixup: Mixup | None
    prepare: Callable[[Any], torch.Tensor]
    precision: Precision
    loop: LoopSettings
    evaluation: EvaluationSettings


def run_training(args: argparse.Namespace, output: Output, watchdog: Watchdog, precision: Precision) -> None:
    """Train epoch by epoch. Write checkpoints, log.txt, TensorBoard event files and curves.png."""
    val = find_images(args, is_train=False) if uses_labels(args) else None
    train = find_images(args, is_train=True)
    val = train if val is None else match_splits(train, val)  # without labels, there is nothing to validate
    data = describe_data(train, val)
    on_main_process(output.lock)
    source = find_checkpoint(args.resume, args.auto_resume, output.folder, output.names)
    checkpoint, what = find_start(args, source)
    keeps = source is not None and source.is_automatic
    args, preprocessing = adopt_settings(args, checkpoint, what, keeps)
    check_evaluation(args)
    if args.in_chans:
        print_main(f"--in-chans {args.in_chans}: automatic augmentation and colour jitter, which need RGB, are off")
    if source is None:
        on_main_process(partial(warn_of_duplicates, train, val, args))
    if args.freeze_stages and checkpoint is None:
        print_main(f"WARNING: --freeze-stages {args.freeze_stages} without --finetune: the frozen weights are random")
    model = build_model(args, train.num_classes, precision)
    # With the weights of a file, which may change while the run is interrupted.
    is_file = args.class_weights not in ("", BALANCED)
    pairs = weights_of_classes(args, train) if is_file else []
    weights = {f"class_weights.{canonical(name)}": weight for name, weight in pairs}
    settings = vars(args) | weights
    train, val = (prepared(one, one is train, transform_settings(args, preprocessing)) for one in (train, val))
    accum_steps = args.accum_steps
    if source:
        train, val = match_resumed(train, val, source.checkpoint, what)
        is_stream = isinstance(train.dataset, IterableDataset)
        accum_steps = check_source(source, settings, data, is_stream, default_settings())
    elif checkpoint is not None:
        load_from(model, checkpoint, what, prefer_ema=True, new_classifier=True, data=train)
    parts = build_parts(args, model, train, val, preprocessing, precision, accum_steps)
    training = parts.training
    if source:
        restore(training, source, settings)
    if training.epoch >= args.epochs or training.has_stalled(args.early_stop):
        end_finished_run(output, source, training, args)
        return
    if keeps_features(args, model, train):
        parts = on_features(parts, args, train, watchdog.tick)
    packages = (*PACKAGES, "simplejpeg") if args.loader == "fast" else PACKAGES
    run = describe_run(settings, data, precision.device, packages)
    on_main_process(lambda: open_output(output, run, training, source, args))
    if args.val_fraction:
        on_main_process(partial(write_split, output.folder / SPLIT, train, val, output.what))
    kept = dict(args=settings, data=data, classes=train.classes, preprocessing=preprocessing.to_json())
    kept["reading"] = describe_reading(args, train)
    save = partial(save_checkpoint, training, output, kept, accum_steps)
    flags = DelayedFlags(precision.device, flag_delay(args, precision))
    limits = settings_from(args, MonitorSettings, dataset_size=len(train), advice=DIVERGENCE_ADVICE)
    monitor = StepMonitor(limits, watchdog, flags, output.folder, output.log_event, save)
    with profiled(training, args.profile, output.folder):
        train_epochs(parts, output, monitor, save, args.watch, args.early_stop)


def find_start(args: argparse.Namespace, source: Source | None) -> tuple[dict[str, Any] | None, str]:
    """Read the checkpoint that a run starts from.

    Args:
        args: the command's settings.
        source: checkpoint that the run resumes from, None for a fresh run.

    Returns:
        the checkpoint that the run resumes from or fine-tunes, None for random weights; and its flag and path, for
        messages.

    Raises:
        UserError: the checkpoint to fine-tune cannot be read.
    """
    if source:
        return source.checkpoint, f"{'--auto-resume' if source.is_automatic else '--resume'} {source.path}"
    what = f"--finetune {args.finetune}"
    return read_checkpoint(args.finetune, what) if args.finetune else None, what


def adopt_settings(
    args: argparse.Namespace, checkpoint: dict[str, Any] | None, what: str, keeps: bool = False
) -> tuple[argparse.Namespace, Preprocessing]:
    """Adopt the orientation, preprocessing, channels and network arguments that a checkpoint was trained with.

    Args:
        args: the command's settings.
        checkpoint: the checkpoint, None for random weights.
        what: flag and path, for messages.
        keeps: whether the run is resumed automatically. A run that predates `--orientation` then keeps STORED.

    Returns:
        the settings, with those of the checkpoint unless the user has set them; and the preprocessing.

    Raises:
        UserError: a setting does not fit the number of channels, or the arguments of the network are unknown.
    """
    before = settings_in(checkpoint or {})
    orientation = args.orientation or before.get("orientation") or STORED
    if keeps and "orientation" not in before:
        orientation = STORED  # the run predates this setting, even if its recipe sets it now
    kwargs = args.model_kwargs or (
        model_kwargs_of(checkpoint, what, kwargs_advice("--model-kwargs")) if checkpoint else {}
    )
    channels = args.in_chans or kwargs.get("in_chans", 3)
    if channels != kwargs.get("in_chans", 3):
        kwargs = {**kwargs, "in_chans": channels}
    adopted = dict(orientation=orientation, model_kwargs=kwargs, in_chans=None if channels == 3 else channels)
    adopted["watch"] = args.watch or ("map" if args.multi_label else "top1")
    args = argparse.Namespace(**{**vars(args), **adopted})
    published = preprocessing_from(args)
    if checkpoint is None:
        return args, published
    preprocessing = preprocessing_from(args, Preprocessing.of_weights(checkpoint, args.model, args.input_size))
    if preprocessing != published:
        print_main(f"{what}: {preprocessing}")
    return args, preprocessing


def preprocessing_from(args: argparse.Namespace, base: Preprocessing | None = None) -> Preprocessing:
    """Apply the command's settings to a preprocessing, by default the published one.

    Raises:
        UserError: there are not as many values as channels.
    """
    base = base or Preprocessing.for_size(args.input_size)
    return base.varied(args.in_chans or 3, args.mean, args.std, args.crop_pct, args.interpolation)


def default_settings() -> dict[str, Any]:
    """Settings of a run with no flags."""
    return vars(adopt_settings(build_parser().parse_args([]), None, "")[0])


def kwargs_advice(flag: str) -> str:
    """Advice for weights that do not show how their network was built."""
    published = str([list(sides) for sides in WINDOW_SIZES]).replace(" ", "")
    return f"pass the sizes that it was trained with, as published: {flag} window_sizes={published}"


def match_resumed(
    train: ImageData, val: ImageData, checkpoint: dict[str, Any], what: str
) -> tuple[ImageData, ImageData]:
    """Match the classes of the two data sets with those of a resumed run. The classes of the two sets already agree.

    Args:
        train: training images.
        val: validation images.
        checkpoint: the run's checkpoint.
        what: flag and path, for messages.

    Raises:
        UserError: the names of the classes differ.
    """
    if img_size_of(checkpoint) and "reading" not in checkpoint:
        print_main(
            f"{what}: this run clipped 16-bit values and dropped transparency; from now on, values are scaled "
            "and transparent pixels are blended with white"
        )
    held = checkpoint.get("classes")
    return train.matched(held, what), val.matched(held, what, quietly=True)


def describe_reading(args: argparse.Namespace, train: ImageData) -> dict[str, Any]:
    """Describe how training images are read: the orientation and, if 'stored', how many sampled images are rotated."""
    if args.orientation != STORED or not is_main_process():  # only rank 0 writes checkpoints
        return dict(orientation=args.orientation)
    counts = count_turned(train.dataset.files())
    if counts["turned"]:
        print_main(
            f"WARNING: --orientation stored: {counts['turned']} of {counts['sampled']} sampled training images "
            "have an EXIF orientation, which is ignored; --orientation exif turns them upright"
        )
    return dict(orientation=STORED, **counts)


def open_output(
    output: Output, run: dict[str, Any], training: Training, source: Source | None, args: argparse.Namespace
) -> None:
    """Prepare the output folder, and write the settings there as a recipe. See `Output.open`.

    Raises:
        UserError: the folder cannot be written, or contains another run.
    """
    output.open(run, training.covers, source, args.auto_resume)
    write_recipe(output.folder / ARGS, vars(args), output.what)


def write_split(path: Path, train: ImageData, val: ImageData, what: str) -> None:
    """Write the split of the images as a table, which `--data-set csv/FILE` reads."""
    lines = [["path", "label", "split", *(["weight"] if train.has_weights else [])]]
    for split, images in (("train", train.dataset), ("val", val.dataset)):
        for index, label in enumerate(images.labels()):
            texts = SEPARATOR.join(images.classes[number] for number in classes_of(label))
            weight = [str(images.weights[index]) if images.weights else ""] if train.has_weights else []
            lines.append([images.inner_name(index), texts, split, *weight])
    write_output(path, lambda file: file.write(as_csv(lines).encode(errors="surrogateescape")), what)


def duplicates_of(train: ImageData, val: ImageData, args: argparse.Namespace) -> list[tuple[str, str]] | None:
    """Find duplicates (`find_duplicates`); None if not looked for. Above `MAX_IMAGES`, only if asked for."""
    is_few = len(train) + len(val) <= MAX_IMAGES
    is_checked = is_few if args.check_duplicates is None else args.check_duplicates
    if not is_checked or not uses_labels(args) or isinstance(train.dataset, IterableDataset):
        return None
    return find_duplicates(train.dataset, val.dataset, args.num_workers)


def warn_of_duplicates(train: ImageData, val: ImageData, args: argparse.Namespace) -> None:
    """Warn of validation images that are also training images."""
    if pairs := duplicates_of(train, val, args):
        examples = listed([f"{held_out} = {trained}" for held_out, trained in pairs])
        print_main(
            f"WARNING: {len(pairs)} of {len(val)} validation images are also training images, so accuracy will be too "
            f"high: {examples}"
        )


@contextmanager
def profiled(training: Training, steps: int, folder: Path) -> Iterator[None]:
    """Skip two training steps, trace the next `steps` on rank 0, and write the trace to `folder`/trace.json."""
    if steps == 0 or not is_main_process():
        yield
        return
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    write = methodcaller("export_chrome_trace", str(folder / "trace.json"))
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        handle = training.optimizer.register_step_post_hook(lambda *_: profiler.step())
        try:
            yield
        finally:
            handle.remove()


def train_epochs(
    parts: Parts, output: Output, monitor: StepMonitor, save: Callable[..., None], watch: str, early_stop: int
) -> None:
    """Train from the current step to the end of the run.

    Args:
        parts: the parts of the run.
        output: its output folder.
        monitor: called after each batch and step.
        save: writes a checkpoint.
        watch: metric that chooses the best checkpoint.
        early_stop: epochs without improvement after which the run ends; 0 for none.

    Raises:
        Preempted: the run was asked to stop, and has saved a checkpoint.
    """
    training, watchdog, start = parts.training, monitor.watchdog, time.perf_counter()
    stats: dict[str, float] = {}
    try:
        while training.epoch < parts.loop.epochs and not training.has_stalled(early_stop):
            if parts.mixup is not None:  # targets stay soft
                parts.mixup.mixup_enabled = training.epoch < (parts.loop.mixup_off_epoch or math.inf)
            settings = parts.precision, parts.loop, parts.mixup
            loss = train_one_epoch(training, parts.train_loader, parts.criterion, *settings, monitor, parts.prepare)
            stats = prefixed("train", loss)
            done = training.epoch + 1
            ends = done == parts.loop.epochs or 0 < early_stop < done - training.best_epoch
            if parts.val_interval and (done % parts.val_interval == 0 or ends):
                stats |= validate(parts, watchdog)
            sampler: Any = parts.train_loader.batch_sampler
            balance = class_counts(sampler, parts.train_loader.dataset) if len(getattr(sampler, "labels", ())) else {}
            finish_epoch(training, output, save, stats, watch, balance)
    except Preempted:
        save()
        position = f"before epoch {training.epoch}, step {training.epoch_step}"
        raise stopped(output, position, watchdog.preemption.status, watchdog.flags) from None
    on_main_process(output.close)
    on_main_process(lambda: complete_output(output))
    if parts.val_interval:
        check_outputs(stats, f"epoch {training.epoch - 1} validation")
    if training.has_stalled(early_stop):
        print_main(f"--early-stop {early_stop}: {watch} has not improved since epoch {training.best_epoch}")
    if is_main_process():
        duration = timedelta(seconds=round(time.perf_counter() - start))
        metric = "mAP" if "test_map" in stats else "top-1"
        best = f", best {metric} {training.best_accuracy:.3f} %" if parts.val_interval else ""
        print(f"trained in {duration}{best}: checkpoints, log.txt and curves.png are in {output.folder}")


def class_counts(sampler: TrainBatchSampler, samples: Any) -> dict[str, list[int]]:
    """Number of samples of each class that an epoch draws, in the order of the network's outputs."""
    counts = [0] * samples.num_classes
    for label, count in sampler.label_counts().items():
        counts[samples.output_of(label)] = count
    return dict(class_counts=counts)


def validate(parts: Parts, watchdog: Watchdog) -> dict[str, float]:
    """Validate the network and its averaged weights. Metrics are named as in log.txt."""
    training, precision = parts.training, parts.precision
    title = f"epoch {training.epoch} validation"
    stats = prefixed("test", evaluate(training.model, parts.val_loader, precision, title, parts.evaluation, watchdog))
    if training.ema is not None:
        title += ", averaged weights"
        model: nn.Module = training.ema.module
        if training.ema.device is not None:  # the averaged weights are kept in CPU memory
            model = copy.deepcopy(model).to(precision.device)
        averaged = evaluate(model, parts.val_loader, precision, title, parts.evaluation, watchdog)
        stats |= prefixed("test_ema", averaged)
    return stats


def prefixed(prefix: str, stats: dict[str, float]) -> dict[str, float]:
    """Add a prefix to the names of metrics, as in log.txt."""
    return {f"{prefix}_{name}": value for name, value in stats.items()}


def finish_epoch(
    training: Training,
    output: Output,
    save: Callable[..., None],
    stats: dict[str, float],
    watch: str,
    others: dict[str, Any],
) -> None:
    """Write the epoch's logs, then its checkpoint, so that log.txt is never behind the newest checkpoint.

    Args:
        training: the run's state.
        output: the run's output folder.
        save: writes a checkpoint.
        stats: the epoch's metrics.
        watch: metric that chooses the best checkpoint.
        others: other values for log.txt.
    """
    accuracy = stats.get("test_acc1", stats.get("test_map"))  # None if the epoch was not validated
    is_best = False
    if accuracy is not None and math.isfinite(stats["test_loss"]):
        is_best = training.see_value(-stats["test_loss"] if watch == "loss" else stats[f"test_{WATCHED[watch]}"])
        training.best_accuracy = max(training.best_accuracy, accuracy)
    n_parameters = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    counts = dict(bad_steps=training.bad_steps, unreadable_images=len(training.unreadable_images))
    entry = stats | dict(epoch=training.epoch, n_parameters=n_parameters) | counts | others
    output.log_epoch(entry, stats, training.epoch)
    training.lr_scheduler.step(training.epoch, accuracy)
    training.end_epoch()
    save(is_best=is_best)


def end_finished_run(output: Output, source: Source | None, training: Training, args: argparse.Namespace) -> None:
    """Complete the output folder of a finished run.

    Raises:
        UserError: the run was not resumed automatically, so the user expects more epochs.
    """
    if source is None or not source.is_automatic:
        reason = f"--epochs {args.epochs}" if training.epoch >= args.epochs else f"--early-stop {args.early_stop}"
        raise UserError(f"{reason}: the run is complete after {training.epoch} epochs; nothing left to train")
    on_main_process(lambda: complete_output(output))
    print_main(f"--auto-resume: the run in {output.folder} is complete: {training.epoch} epochs are done")


def complete_output(output: Output) -> None:
    """Write the final files of a run. On failure, only warn: the run itself is complete."""
    try:
        output.complete()
    except OSError as error:
        print_main(
            f"WARNING: {output.folder}: checkpoint.pth or curves.png could not be written ({error.strerror}); "
            "free some disk space and run the command again with --auto-resume"
        )


def save_checkpoint(
    training: Training, output: Output, run: dict[str, Any], accum_steps: int, is_best: bool = False
) -> None:
    """Write a checkpoint. A collective call.

    Args:
        training: the run's state.
        output: the run's output folder.
        run: further entries (settings, description of the data, class names, and how images are read).
        accum_steps: batches that each rank accumulates per step.
        is_best: whether the last epoch has the highest top-1 so far.

    Raises:
        UserError: the weights are not finite.
    """
    training.check_finite()
    output.save(training.checkpoint() | run | dict(batches_per_step=accum_steps * get_world_size()), is_best)


# ----------------------------------------------------------------------------------------------------------------------
# Builders
# ----------------------------------------------------------------------------------------------------------------------


def settings_from(args: argparse.Namespace, kind: type[T], **values: Any) -> T:
    """Build a dataclass of settings. Each field has the value of the command's setting of the same name.

    Args:
        args: the command's settings.
        kind: the dataclass.
        **values: values of the fields that are not settings of the command.
    """
    taken = {field.name: getattr(args, field.name) for field in fields(kind) if field.name not in values}  # type: ignore[arg-type]
    return kind(**taken, **values)


def build_data(args: argparse.Namespace, is_train: bool, preprocessing: Preprocessing | None = None) -> ImageData:
    """Find the training or validation images, and build their transform. Default: the published preprocessing."""
    return prepared(find_images(args, is_train), is_train, transform_settings(args, preprocessing))


def find_images(args: argparse.Namespace, is_train: bool) -> ImageData:
    """Find the training or validation images."""
    return find_dataset(is_train, settings_from(args, DataSettings, is_labelled=uses_labels(args)))


def transform_settings(args: argparse.Namespace, preprocessing: Preprocessing | None = None) -> TransformSettings:
    """Collect the settings of the transforms. Default: the published preprocessing."""
    preprocessing = preprocessing or preprocessing_from(args)
    orientation = args.orientation or STORED
    return settings_from(args, TransformSettings, preprocessing=preprocessing, orientation=orientation)


def build_parts(
    args: argparse.Namespace,
    model: Any,
    train: ImageData,
    val: ImageData,
    preprocessing: Preprocessing,
    precision: Precision,
    accum_steps: int,
) -> Parts:
    """Build the parts of a training run, given its network."""
    loaders = settings_from(args, LoaderSettings, accum_steps=accum_steps)
    train_loader = build_train_loader(train, loaders)
    val_loader = build_val_loader(val, loaders) if uses_labels(args) else train_loader
    mixup = build_mixup(args, train)
    criterion = build_criterion(args, model, train, preprocessing, mixup is not None)
    trainable = criterion.task.trainable_module if isinstance(criterion, TaskLoss) else model
    trainable = model.get_classifier() if keeps_features(args, model, train) else trainable
    training = build_training(args, model, precision, accum_steps, trainable)
    prepare = build_preparation(args, preprocessing, precision)
    loop = settings_from(args, LoopSettings, accum_steps=accum_steps)
    evaluation = settings_from(args, EvaluationSettings)
    loading = train_loader, val_loader, args.val_interval if uses_labels(args) else 0
    return Parts(training, *loading, criterion, mixup, prepare, precision, loop, evaluation)


def build_preparation(
    args: argparse.Namespace, preprocessing: Preprocessing, precision: Precision
) -> Callable[[Any], torch.Tensor]:
    """Build the function that turns a loaded training batch into normalised images on the device."""
    if args.loader != "fast":
        return precision.images
    return DeviceTransform(build_transform(True, transform_settings(args, preprocessing)), precision)


def build_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    """Choose the number format and the memory format.

    With `--amp auto`, `--throughput` measures in float32, as published.
    """
    amp = "off" if args.amp == "auto" and args.throughput else args.amp
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    return Precision.of(device, amp, memory_format=memory_format)


def build_model(args: argparse.Namespace, num_classes: int, precision: Precision) -> Any:
    """Build the network on its device."""
    rates, parser = dict(drop=args.drop, drop_path=args.drop_path), build_parser()
    asked_for = [name for name, rate in rates.items() if rate != parser.get_default(name)]
    what = setting("model", args.model) + (
        " " + setting("model_kwargs", args.model_kwargs) if args.model_kwargs else ""
    )
    model = create_network(what, args.model, num_classes, args.input_size, rates, asked_for, args.model_kwargs)
    if isinstance(model, SepViT) and padding_of(model, model.img_size).extra > LARGE_PADDING:
        ways = with_flags(with_less_padding(model, model.img_size), parser.flags())
        print_main(f"WARNING: {padding_as_text(model, model.img_size)}{ways and f'; less with {ways}'}")
    if args.freeze_stages:
        if not isinstance(model, SepViT) or args.freeze_stages > len(model.blocks):
            raise UserError(f"--freeze-stages {args.freeze_stages}: needs a SepViT, and at most its 4 stages")
        model.freeze_stages(args.freeze_stages)
    to_device(model, precision.device)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError):
            raise UserError(f"--grad-checkpointing: --model {args.model} does not support it; omit it") from None
    if args.compile:
        # Without `deterministic`, the compiler autotunes kernels on the GPU, and results differ from run to run.
        model.compile(options=dict(deterministic=True) if args.deterministic else None)
    return model


def build_training(
    args: argparse.Namespace, model: Any, precision: Precision, accum_steps: int, trainable: Any = None
) -> Training:
    """Build a network's optimiser, schedule, gradient scaler, averaged weights and data-parallel wrapper.

    Args:
        args: the command's settings.
        model: the network.
        precision: device and number format.
        accum_steps: batches that each rank accumulates per step.
        trainable: module that the training loop calls, with all parameters to train; by default the network.

    Raises:
        UserError: the optimiser or the schedule does not accept its settings.
    """
    trainable = trainable or model
    # The learning rate is specified for 512 images per step, as in the published recipe.
    images_per_step = args.batch_size * accum_steps * get_world_size()
    kwargs = optimizer_kwargs(cfg=args) | {"lr": args.lr * images_per_step / 512}
    kwargs |= args.opt_kwargs
    if args.decay_window_tokens:
        kwargs["param_group_fn"] = decaying_window_tokens(args)
    elif "muon" in args.opt:
        kwargs |= dict(fallback_list=DEPTHWISE, fallback_no_weight_decay=True)  # AdamW trains these
    if precision.device.type in ("cuda", "cpu") and args.opt in ("adam", "adamw"):
        kwargs["fused"] = True  # one pass over the weights, and skipped steps do not synchronise with the GPU
    try:
        optimizer = create_optimizer_v2(trainable, **kwargs)
    except (TypeError, ValueError, AssertionError, IndexError) as error:
        raise UserError(f"--opt {args.opt}: does not accept these settings ({error})") from None
    if args.head_lr_scale != 1:
        scale_lr(optimizer, head_of(model), args.head_lr_scale)
    try:
        with warnings.catch_warnings():  # timm deprecates the plateau schedule, which the published code offers
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"timm\.scheduler")
            patience = max(1, args.patience_epochs // args.val_interval)  # in validations
            lr_scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args) | dict(patience_epochs=patience))
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"--sched {args.sched}: does not accept these settings ({error})") from None
    if args.start_epoch and args.sched != "plateau":
        lr_scheduler.step(args.start_epoch - 1)
    ema = None
    if args.model_ema:
        device = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)
    wrapped: nn.Module = trainable
    if dist.is_initialized():
        device_ids = [precision.device.index] if precision.device.type == "cuda" else None
        wrapped = DistributedDataParallel(trainable, device_ids=device_ids, gradient_as_bucket_view=True)
        images = torch.zeros(args.batch_size, args.in_chans or 3, *to_2tuple(args.input_size))
        is_head = isinstance(trainable, nn.Linear)
        inputs = torch.zeros(args.batch_size, trainable.in_features) if is_head else precision.images(images)
        settle_buckets(wrapped, inputs.to(precision.device), precision)
    projection = None if trainable is model else getattr(trainable, "projection", None)
    parts = (model, wrapped, optimizer, lr_scheduler, precision.scaler(), ema, projection, args.start_epoch)
    return Training(*parts, best_epoch=args.start_epoch - 1, losses=torch.zeros(2, device=precision.device))


def head_of(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of a timm network's classifier."""
    named: dict[str, Any] = dict(model.named_parameters())
    return [named[name] for name in classifier_of(named, getattr(model, "default_cfg", {}).get("classifier"))]


def scale_lr(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], scale: float) -> None:
    """Put parameters into groups of their own, with `scale` times the learning rate."""
    chosen, groups = set(parameters), []
    for group in optimizer.param_groups:
        lr_scale = group.get("lr_scale", 1.0)
        for is_chosen, factor in ((False, lr_scale), (True, scale * lr_scale)):
            if part := [parameter for parameter in group["params"] if (parameter in chosen) == is_chosen]:
                groups.append({**group, "params": part, "lr_scale": factor})
    optimizer.param_groups[:] = groups


def decaying_window_tokens(args: argparse.Namespace) -> Callable[[nn.Module], Any]:
    """Build the function that groups parameters with weight decay for window tokens too, as in the published runs."""
    if args.layer_decay is None:
        return partial(param_groups_weight_decay, weight_decay=args.weight_decay)
    scales = dict(layer_decay=args.layer_decay, min_scale=args.layer_decay_min_scale)
    return partial(param_groups_layer_decay, weight_decay=args.weight_decay, **scales)


def settle_buckets(wrapped: DistributedDataParallel, inputs: torch.Tensor, precision: Precision) -> None:
    """Run one backward pass on blank inputs, and discard its gradients.

    After the first backward pass, DistributedDataParallel rebuilds its buckets, which changes the order of summation in
    the all-reduce and hence the gradients' last bits. A resumed run must sum in the same order as an uninterrupted run.
    """
    buffers = [buffer.clone() for buffer in wrapped.buffers()]
    with precision.autocast(), warnings.catch_warnings():
        # Gradients of transposed weights differ from their buckets in strides. The copy is unavoidable.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        outputs = wrapped(inputs)
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.cat([part.float().flatten() for part in parts]).sum().backward()
    wrapped.zero_grad(set_to_none=True)
    for buffer, value in zip(wrapped.buffers(), buffers):
        buffer.copy_(value)


def flag_delay(args: argparse.Namespace, precision: Precision) -> int:
    """Number of steps after which `StepFlags` are read: 1 on CUDA, to avoid synchronising with the GPU; otherwise 0.

    With `--dump-bad-batch`, it is always 0, because the batch must still be in memory when its flags are read.
    """
    return 1 if precision.device.type == "cuda" and not args.dump_bad_batch else 0


def build_mixup(args: argparse.Namespace, train: ImageData) -> Mixup | None:
    """Build mixup and CutMix; None if both are off."""
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    is_dense = train.multi_label or train.has_weights  # the loss smooths these targets
    settings = dict(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax)
    settings |= dict(prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode)
    settings |= dict(label_smoothing=0 if is_dense else args.smoothing, multi_label=is_dense)
    return Mixup(**settings, num_classes=train.num_classes + train.has_weights)


def keeps_features(args: argparse.Namespace, model: nn.Module, train: ImageData) -> bool:
    """Whether to train only the classifier, on features computed once.

    This requires that the rest of the network is frozen, that there is no augmentation, mixing or distillation, that
    the data set is not a stream, and that the features take at most `MAX_BYTES`.
    """
    if not isinstance(model, SepViT) or args.freeze_stages < len(model.blocks) or not args.no_aug:
        return False
    is_kept = 4 * model.num_features * len(train) <= MAX_BYTES and not isinstance(train.dataset, IterableDataset)
    return is_kept and args.distillation_type == "none" and build_mixup(args, train) is None


def on_features(parts: Parts, args: argparse.Namespace, train: ImageData, tick: Callable[[str], None]) -> Parts:
    """Train on the features of the frozen network in place of images."""
    loading = dict(batch_size=args.batch_size, num_workers=args.num_workers, worker_init_fn=ignore_preemption)
    model: Any = parts.training.model.eval()

    def features_of(batch: torch.Tensor) -> Any:
        with torch.no_grad(), parts.precision.autocast():
            return model.forward_head(model.forward_features(parts.prepare(batch)), pre_logits=True)

    samples = compute_features(train, args.seed, features_of, tick, **loading)
    print_main(f"--freeze-stages {args.freeze_stages}: features of {len(train)} images computed; training on them")
    loaders = settings_from(args, LoaderSettings, accum_steps=parts.loop.accum_steps, num_workers=0)
    move = methodcaller("to", parts.precision.device, non_blocking=True)
    return replace(parts, train_loader=build_train_loader(train, loaders, samples), prepare=move)


def uses_labels(args: argparse.Namespace) -> bool:
    """Whether a run uses labels. Distillation of features alone does not, and has nothing to validate."""
    return args.eval or args.distillation_type != "feature" or args.distillation_alpha < 1


def build_criterion(
    args: argparse.Namespace, model: nn.Module, train: ImageData, preprocessing: Preprocessing, soft_targets: bool
) -> nn.Module:
    """Build the training loss: cross entropy, or binary cross entropy of each class, and distillation.

    Args:
        args: the command's settings.
        model: the network.
        train: training images.
        preprocessing: preprocessing of the images.
        soft_targets: whether targets are B × classes.

    Raises:
        UserError: the teacher cannot be loaded, or network and teacher do not support this distillation.
    """
    base: nn.Module
    device = next(model.parameters()).device
    if args.class_weights or train.multi_label or train.has_weights:
        base = build_weighted_loss(args, train, soft_targets, device)
    elif args.bce_loss:
        base = BinaryCrossEntropy(smoothing=args.smoothing, target_threshold=args.bce_target_thresh)
    elif soft_targets:
        base = SoftTargetCrossEntropy()
    elif args.smoothing > 0:
        base = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        base = nn.CrossEntropyLoss()
    kind, alpha, tau = args.distillation_type, args.distillation_alpha, args.distillation_tau
    if kind == "none":
        return DistillationLoss(base)
    teacher = build_teacher(args, train, preprocessing).to(device)
    if kind not in TASKS:
        return DistillationLoss(base, teacher, kind, alpha, tau)
    settings = dict(criterion=base, task_loss_weight=1 - alpha, device=device, verbose=False)
    settings |= {} if kind == "feature" else dict(temperature=tau)
    try:
        task: Any = TASKS[kind](model, teacher, **settings)
    except ValueError as error:
        raise UserError(f"--distillation-type {kind}: {error}") from None
    task.student_mean = task.student_std = None  # the teacher itself changes the normalisation
    if args.compile and kind == "feature":
        task.trainable_module.compile(options=dict(deterministic=True) if args.deterministic else None)
    return TaskLoss(task)


def weights_of_classes(args: argparse.Namespace, train: ImageData) -> list[tuple[str, float]]:
    """Name and weight of each class in the loss, in the order of the outputs; [] without `--class-weights`.

    Raises:
        UserError: there is no weight for each class.
    """
    names = train.classes or list(map(str, range(train.num_classes)))
    return list(zip(names, class_weights(args.class_weights, train.label_counts, names) if args.class_weights else []))


def build_weighted_loss(
    args: argparse.Namespace, train: ImageData, soft_targets: bool, device: torch.device
) -> nn.Module:
    """Build the loss on several labels per image, or with weights of the images or of the classes.

    With several labels per image, the weight of a class only multiplies the loss of images that have this label.

    Raises:
        UserError: there is no weight for each class.
    """
    weights = [weight for _, weight in weights_of_classes(args, train)]
    smoothing, is_smooth = args.smoothing, soft_targets and not train.has_weights  # Mixup has smoothed the targets
    extra = torch.tensor(weights, device=device) - 1 if train.multi_label and weights else None
    bce = BinaryCrossEntropy(smoothing, args.bce_target_thresh, reduction="none", smooth_dense=train.multi_label)

    def binary(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if train.has_weights and not train.multi_label:
            targets = targets * (1 - smoothing) + smoothing / train.num_classes
        losses = bce(outputs, targets)  # B × classes
        return (losses if extra is None else losses * (1 + extra * targets)).mean(dim=1)

    if train.multi_label or args.bce_loss:
        losses: Callable[..., torch.Tensor] = binary
    else:
        losses = partial(F.cross_entropy, reduction="none", label_smoothing=0.0 if is_smooth else smoothing)
    weights = [] if train.multi_label else weights
    return WeightedLoss(losses, weights, smoothing if is_smooth else 0.0, train.has_weights).to(device)


# timm's distillation tasks, by --distillation-type.
TASKS: dict[str, Callable[..., Any]] = {
    "logit": LogitDistillationTask,
    "feature": FeatureDistillationTask,
    "token-soft": partial(TokenDistillationTask, distill_type="soft"),
    "token-hard": partial(TokenDistillationTask, distill_type="hard"),
}


def build_teacher(args: argparse.Namespace, train: ImageData, preprocessing: Preprocessing) -> nn.Module:
    """Build and load the teacher, for images in a given normalisation.

    For the distillation of features, the teacher keeps its own classes, if it has any.

    Raises:
        UserError: the teacher cannot be loaded, or does not fit the training images.
    """
    what = f"--teacher-path {args.teacher_path}"
    checkpoint = read_checkpoint(args.teacher_path, what)
    num_classes, data = train.num_classes, train if args.distillation_type != "feature" else None
    if data is None:
        weights, heads = weights_of(checkpoint, what), get_pretrained_cfg_value(args.teacher_model, "classifier")
        num_classes = next((len(weights[name]) for name in classifier_of(weights, heads)), 0)
    else:
        train.matched(checkpoint.get("classes"), what)
    kwargs = args.teacher_kwargs or model_kwargs_of(checkpoint, what, kwargs_advice("--teacher-kwargs"))
    named, size = f"--teacher-model {args.teacher_model}", args.input_size
    teacher = create_network(named, args.teacher_model, num_classes, size, model_kwargs=kwargs)
    hints = "use a teacher trained on the data set's classes", "name it with --teacher-model"
    load_from(teacher, checkpoint, what, *hints, data=data)
    to_device(teacher, torch.device("cpu")).eval().requires_grad_(False)
    own = Preprocessing.of_weights(checkpoint, args.teacher_model, size).varied(kwargs.get("in_chans", 3))
    if own.channels != preprocessing.channels:
        raise UserError(f"{what}: for {own.channels} channels, not {preprocessing.channels}; use another teacher")
    if (own.mean, own.std) == (preprocessing.mean, preprocessing.std):
        return DistillationTeacher(teacher)
    print_main(f"{what}: {own}")
    return Renormalised(teacher, preprocessing, own)


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


def load_from(
    model: nn.Module,
    checkpoint: dict[str, Any],
    what: str,
    classes_hint: str = "use the data set that it was trained on",
    variant_hint: str = "name it with --model",
    prefer_ema: bool = False,
    new_classifier: bool = False,
    data: ImageData | None = None,
) -> None:
    """Load a checkpoint's weights, and print what was adapted or reinitialised.

    Args:
        model: the model.
        checkpoint: the checkpoint.
        what: flag and path, for messages.
        classes_hint: advice if the number of classes differs.
        variant_hint: advice if the weights belong to a different variant.
        prefer_ema: load the averaged weights if the checkpoint has them.
        new_classifier: keep a randomly initialised classifier if the number of classes differs.
        data: data set whose classes the outputs must match; None to keep the outputs as they are. Classes are matched
            by name if their names are known. Classes that the checkpoint lacks stay randomly initialised.

    Raises:
        UserError: the checkpoint does not fit.
    """
    weights, held = weights_of(checkpoint, what, prefer_ema), checkpoint.get("classes")
    names = data.classes if data is not None else None
    if data is not None and data.class_map and held and names and len(held) == len(names):
        check_map(data.class_map, names, held, what)
        held = None  # the class map sets the order
    if held and names:
        fresh = match_classifier(weights, model, held, names)
        if list(held) != names:
            rest = f"; randomly initialised: {listed(fresh)}" if fresh else ""
            shared = len(names) - len(fresh)
            print_main(f"{what}: {shared} of {len(names)} classes of the classifier are carried over by name{rest}")
    hints, size = (variant_hint, classes_hint), img_size_of(checkpoint)
    report = load_weights(model, weights, what, *hints, new_classifier=new_classifier, img_size=size)
    if frozen := [name for name in report.adaptation.fresh if not model.get_parameter(name).requires_grad]:
        print_main(f"WARNING: {what}: frozen, but randomly initialised for this image size: {listed(frozen)}")
    if new_classifier and data is not None and not (held and names) and not report.classifier:
        print_main(f"{what}: {BY_CLASS_MAP if data.class_map else NO_NAMES}")
    if new_classifier or report.adaptation:
        averaged = "averaged weights, " if prefer_ema and has_both_weights(checkpoint) else ""
        print_main(f"{what}: {averaged}{report}")


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


SWITCH = dict(action=argparse.BooleanOptionalAction, default=False)  # --no-… turns off what a recipe turns on


def build_parser() -> Parser:
    """Build the command's parser. Defaults are those of the published recipe."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add_run_settings(parser.add_argument_group("run"))
    add_device_settings(parser.add_argument_group("devices and processes"))
    add_model_settings(parser.add_argument_group("model"))
    add_optimizer_settings(parser.add_argument_group("optimiser"))
    add_schedule_settings(parser.add_argument_group("schedule"))
    add_augmentation_settings(parser.add_argument_group("augmentation"))
    add_mixing_settings(parser.add_argument_group("mixing"))
    add_distillation_settings(parser.add_argument_group("distillation"))
    add_data_settings(parser.add_argument_group("data"))
    return parser


def add_run_settings(group: Any) -> None:
    add = group.add_argument
    add("--batch-size", type=positive_int, default=64, help="images per process and forward pass")
    add("--accum-steps", type=positive_int, default=1, help="forward passes per step (gradient accumulation)")
    add("--epochs", type=positive_int, default=300)
    add("--start_epoch", type=natural, default=0)
    add("--seed", type=natural, default=0)
    add("--config", type=path, metavar="FILE.yaml", help="a recipe, as in recipes/; the command line takes precedence")
    add("--output_dir", type=path, default="", help="folder for checkpoints and logs; by default the model's name")
    add("--resume", type=path, default="", help="checkpoint to resume from or to evaluate: a path or an https address")
    add("--auto-resume", **SWITCH, help="resume from the output folder's newest checkpoint, if there is one")
    about = "also save within epochs, every STEPS steps; 0: only at the end of each epoch"
    add("--checkpoint-every", type=natural, default=0, metavar="STEPS", help=about)
    add("--keep-checkpoints", type=positive_int, default=2, metavar="N", help="number of checkpoints to keep")
    add("--finetune", type=path, default="", help="checkpoint to start from; classes and image shape may differ")
    add("--eval", **SWITCH, help="only evaluate")
    add(
        "--report",
        **SWITCH,
        help="write report/ to --output_dir: at the end of training, on the best checkpoint; or with --eval",
    )
    add("--corruptions", **SWITCH, help="with --eval or --report, also evaluate under ImageNet-C's corruptions")
    add("--dist-eval", **SWITCH, help="split the validation images across processes")
    add("--val-interval", type=positive_int, default=1, metavar="N", help="validate every N epochs, and after the last")
    about = "metric that chooses checkpoint_best.pth; default: top1, or with --multi-label map (mean average precision)"
    add("--watch", choices=list(WATCHED), help=about)
    about = "end the run after EPOCHS epochs without improvement of --watch; 0: never"
    add("--early-stop", type=natural, default=0, metavar="EPOCHS", help=about)
    add("--throughput", **SWITCH, help="only measure images per second")
    add("--print-freq", type=positive_int, default=20, help="batches between progress reports")
    about = "write a trace of STEPS training steps to trace.json in the output folder (chrome://tracing)"
    add("--profile", type=natural, default=0, metavar="STEPS", help=about)
    add("--deterministic", **SWITCH, help="reproduce weights bit for bit; slower on GPUs")
    about = "end the run after N consecutive steps that were skipped because of a non-finite loss or gradients"
    add("--max-bad-steps", type=positive_int, default=10, metavar="N", help=about)
    add("--dump-bad-batch", **SWITCH, help="save the batches of the steps that --max-bad-steps counts")


def add_device_settings(group: Any) -> None:
    add = group.add_argument
    add("--device", default=best_device(), help="cuda, mps or cpu; by default the best available")
    about = "mixed precision; auto: bfloat16 or float16 on CUDA, off elsewhere"
    add("--amp", choices=("auto", "bfloat16", "float16", "off"), default="auto", help=about)
    add("--compile", **SWITCH, help="compile the network with torch.compile")
    add("--channels-last", **SWITCH, help="store images in channels-last memory format")
    add("--grad-checkpointing", **SWITCH, help="recompute activations to save memory")
    about = "hang timeout, after which all processes exit; a dead process is detected after a tenth of this time"
    add("--timeout", type=seconds, default=600.0, metavar="SECONDS", help=about)
    about = "loader workers per process; by default the number of cores, at most 10"
    add("--num_workers", type=natural, default=min(10, available_cores()), help=about)
    add("--pin-mem", action=argparse.BooleanOptionalAction, default=True, help="load images into pinned memory")
    add("--world_size", type=positive_int, default=1, help="number of processes, if the environment does not set it")
    add("--dist_url", default="env://", help="rendezvous address of the processes")
    # From torch.distributed.launch, which also sets LOCAL_RANK.
    add("--local-rank", type=natural, help=argparse.SUPPRESS)


def add_model_settings(group: Any) -> None:
    add = group.add_argument
    add("--model", default="SepViT_Tiny", help=f"{', '.join(VARIANTS)}, or any timm model")
    about = "other arguments of the network's constructor; by default those that its checkpoint was trained with"
    add("--model-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help=about)
    add("--input-size", type=positive_int, nargs="+", action=Size, default=224, metavar="PIXELS", help="side, or H W")
    add("--in-chans", type=positive_int, metavar="N", help="image channels; by default as in the checkpoint, else 3")
    add("--drop", type=fraction, default=0.0, help="dropout rate")
    add("--drop-path", type=fraction, default=0.2, help="stochastic depth rate of the last block")
    add("--model-ema", **SWITCH, help="keep a moving average of the weights; validate and save it too")
    add("--model-ema-force-cpu", **SWITCH, help="keep the averaged weights in CPU memory")
    add("--model-ema-decay", type=fraction, default=0.9999)
    add("--model-ema-warmup", **SWITCH, help="ramp up the decay over the steps, for short runs")


def add_optimizer_settings(group: Any) -> None:
    add = group.add_argument
    add("--freeze-stages", type=natural, default=0, metavar="N", help="freeze the first N stages; 4: linear probe")
    add("--opt", type=str.lower, default="adamw", help="a timm optimiser")
    about = "other arguments of the optimiser"
    add("--opt-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help=about)
    add("--opt-eps", type=positive, default=1e-8)
    add("--opt-betas", type=fraction, nargs="+", help="by default the optimiser's own")
    add("--clip-grad", type=non_negative, default=5.0, help="maximum norm of the gradients; 0: no clipping")
    about = "norm: of all gradients; value: each element; agc: relative to the weights' norms (0.01 to 0.1)"
    add("--clip-mode", choices=("norm", "value", "agc"), default="norm", help=about)
    about = "factor of the learning rate from each block to the one before it, such as 0.65"
    add("--layer-decay", type=positive_fraction, help=about)
    add("--layer-decay-min-scale", type=fraction, default=0.0, help="smallest factor of --layer-decay")
    about = "multiply the classifier's learning rate by FACTOR"
    add("--head-lr-scale", type=positive, default=1.0, metavar="FACTOR", help=about)
    add("--momentum", type=fraction, default=0.9)
    add("--weight-decay", type=non_negative, default=0.05)
    add("--decay-window-tokens", **SWITCH, help="apply weight decay to the window tokens, as in the published runs")


def add_schedule_settings(group: Any) -> None:
    add = group.add_argument
    add("--sched", choices=SCHEDULES, default="cosine")
    add("--lr", type=non_negative, default=5e-4, help="learning rate for 512 images per step, scaled linearly")
    about = "start (and optionally end) of learning rate noise, as fractions of all epochs"
    add("--lr-noise", type=fraction, nargs="+", help=about)
    add("--lr-noise-pct", type=positive, default=0.67)
    add("--lr-noise-std", type=positive, default=1.0)
    add("--warmup-lr", type=non_negative, default=1e-6)
    add("--min-lr", type=non_negative, default=1e-5)
    add("--decay-epochs", type=positive, default=30, help="epochs between decays of --sched step, or of wsd's decay")
    about = "--sched multistep decays the learning rate at the start of these epochs"
    add("--decay-milestones", type=positive_int, nargs="+", default=[30, 60], metavar="EPOCH", help=about)
    add("--lr-decay-fn", choices=("linear", "1-sqrt", "cosine", "power", "exp"), help="decay of wsd; default 1-sqrt")
    add("--warmup-epochs", type=natural, default=5)
    add("--cooldown-epochs", type=natural, default=10, help="accepted for compatibility with DeiT; has no effect")
    add("--patience-epochs", type=natural, default=10)
    add("--decay-rate", "--dr", type=positive, default=0.1)


def add_augmentation_settings(group: Any) -> None:
    add = group.add_argument
    add("--no-aug", action="store_true", help="transform training images like validation images; mixing stays on")
    about = "smallest and largest area of the random crop, as shares of the image"
    add("--scale", type=positive_fraction, nargs=2, default=(0.08, 1.0), help=about)
    add("--ratio", type=positive, nargs=2, default=(3 / 4, 4 / 3), help="smallest and largest aspect ratio of the crop")
    add("--hflip", type=fraction, default=0.5, help="probability of a horizontal flip")
    add("--color-jitter", type=non_negative, default=0.4)
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of an automatic augmentation; '' for none")
    add("--smoothing", type=fraction, default=0.1, help="label smoothing")
    add("--bce-loss", **SWITCH, help="binary cross entropy of each class, in place of cross entropy")
    about = "make targets above this value 1, and others 0"
    add("--bce-target-thresh", type=fraction, metavar="VALUE", help=about)
    about = (
        "weights of the classes in the loss: balanced, by their numbers of images, or a JSON file of names and weights"
    )
    add("--class-weights", default="", metavar="balanced|FILE", help=about)
    add("--sampler", choices=("random", BALANCED), default="random", help="balanced: draw all classes equally often")
    add("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic")
    known = "by default as in the checkpoint, else"
    add("--interpolation", choices=("bilinear", "bicubic"), help=f"resizing filter of validation; {known} bicubic")
    add("--crop-pct", type=positive_fraction, metavar="SHARE", help=f"validation crop / resized side; {known} 0.875")
    add("--mean", type=float, nargs="+", help=f"one for all channels, or one per channel; {known} ImageNet's")
    add("--std", type=positive, nargs="+", help=f"standard deviations, likewise; {known} ImageNet's")
    add("--repeated-aug", **SWITCH)
    add("--reprob", type=fraction, default=0.25, help="probability of random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="fill of the erased regions")
    add("--recount", type=positive_int, default=1, help="erased regions per image")
    add("--resplit", **SWITCH, help="accepted for compatibility with DeiT; has no effect")


def add_mixing_settings(group: Any) -> None:
    add = group.add_argument
    add("--mixup", type=non_negative, default=0.8, help="alpha of mixup; 0: no mixup")
    add("--cutmix", type=non_negative, default=1.0, help="alpha of CutMix; 0: no CutMix")
    about = "smallest and largest cut, as fractions of the image's sides, instead of --cutmix"
    add("--cutmix-minmax", type=fraction, nargs=2, help=about)
    add("--mixup-prob", type=fraction, default=1.0, help="probability that a batch is mixed")
    add("--mixup-switch-prob", type=fraction, default=0.5, help="probability of CutMix if both are on")
    add("--mixup-off-epoch", type=natural, default=0, metavar="EPOCH", help="turn mixing off from EPOCH on; 0: never")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")


def add_distillation_settings(group: Any) -> None:
    add = group.add_argument
    about = "soft, hard: as in DeiT, without a token; logit, feature, token-soft, token-hard: timm's tasks"
    add("--distillation-type", choices=("none", "soft", "hard", *TASKS), default="none", help=about)
    add("--teacher-model", default="regnety_160", help="any timm model")
    about = "other arguments of the teacher's constructor; by default those that its checkpoint was trained with"
    add("--teacher-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help=about)
    add("--teacher-path", type=path, default="", help="the teacher's checkpoint: a path or an https address")
    add("--distillation-alpha", type=fraction, default=0.5, help="weight of the distillation loss")
    add("--distillation-tau", type=positive, default=1.0, help="temperature of soft, logit and token-soft")


def add_data_settings(group: Any) -> None:
    add = group.add_argument
    add("--data-path", type=path, default="imagenet")
    about = "stored: ignore EXIF orientations; exif: turn images upright; by default as in the checkpoint, else stored"
    add("--orientation", choices=ORIENTATIONS, help=about)
    about = "text file with the order of the classes, one name per line, for renamed folders"
    add("--class-map", type=path, default="", metavar="FILE", help=about)
    add(
        "--loader",
        choices=("faithful", "fast"),
        default="faithful",
        help="training loader; faithful: PIL, as published; fast: scaled JPEG decoding, with normalisation and random "
        "erasing on the device",
    )
    about = "IMNET (a folder of class folders), CIFAR, INAT, INAT19, csv/FILE, or a timm reader: wds/…, hfds/…"
    add("--data-set", default="IMNET", help=about)
    about = "share of each class for validation, if the data set has no validation images"
    add("--val-fraction", type=positive_fraction, metavar="SHARE", help=about)
    add("--split-seed", type=natural, default=0, help="seed of --val-fraction")
    add("--path-column", default="path", metavar="NAME", help="column of csv/FILE with the images' paths")
    add("--label-column", default="label", metavar="NAME", help="column with their labels")
    add("--split-column", default="split", metavar="NAME", help="column with the splits that they belong to")
    add("--group-column", default="group", metavar="NAME", help="column with groups that --val-fraction keeps together")
    add("--weight-column", default="weight", metavar="NAME", help="column with weights of the images in the loss")
    add("--multi-label", **SWITCH, help="any number of labels per image, in csv/FILE: a|b, or one row per label")
    about = "find validation images among the training images, by file and by pixels; by default up to 100,000 images"
    add("--check-duplicates", action=argparse.BooleanOptionalAction, help=about)
    add("--ignore-classes", nargs="*", default=[], metavar="NAME", help="classes whose images are not used")
    add("--inat-category", choices=INAT_CATEGORIES, default="name")
    unknown = "for timm readers that do not report this number"
    add("--num-classes", type=positive_int, help=f"number of classes, {unknown}")
    about = "skip: replace unreadable training images, up to 0.1 %% of the set; fail: end the run at the first one"
    add("--on-bad-image", choices=("skip", "fail"), default="skip", help=about)
    about = "training split, for timm readers; with wds/… also SHARDS{00..99}.tar|SAMPLES"
    add("--train-split", default="train", help=about)
    add("--val-split", default="validation", help="validation split, in the form of --train-split")
    add("--train-num-samples", type=positive_int, help=f"number of training images, {unknown}")
    add("--val-num-samples", type=positive_int, help=f"number of validation images, {unknown}")


def check_settings(args: argparse.Namespace) -> None:
    """Refuse settings that cannot work, before anything is built or written.

    Raises:
        UserError: a setting cannot work. The message names the first such setting.
    """
    check_names(args)
    check_device(args.device)
    check_ranges(args)
    check_combinations(args)


def check_names(args: argparse.Namespace) -> None:
    """Refuse unknown names of models, optimisers and data sets.

    Raises:
        UserError: a name is unknown.
    """
    for flag, name in (("--model", args.model), ("--teacher-model", args.teacher_model)):
        if not timm.is_model(name):
            raise UserError(f"{flag} {name}: unknown; choose {', '.join(VARIANTS)}, or a timm model")
    if args.opt not in list_optimizers():
        raise UserError(f"--opt {args.opt}: unknown; choose a timm optimiser, such as adamw, sgd or lamb")
    if args.data_set.split("/")[0] not in (DATA_SETS if "/" not in args.data_set else (*READERS, "csv")):
        readers = ", ".join(f"{name}/…" for name in ("csv", *READERS))
        raise UserError(f"--data-set {args.data_set}: unknown; choose {', '.join(DATA_SETS)}, {readers}")


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse numbers in the wrong order.

    Raises:
        UserError: numbers are in the wrong order.
    """
    for flag, pair in (("--scale", args.scale), ("--ratio", args.ratio), ("--cutmix-minmax", args.cutmix_minmax)):
        if pair and pair[0] > pair[1]:
            raise UserError(f"{flag} {pair[0]:g} {pair[1]:g}: the smaller number must come first")
    if args.decay_milestones != sorted(set(args.decay_milestones)):
        milestones = " ".join(map(str, args.decay_milestones))
        raise UserError(f"--decay-milestones {milestones}: the epochs must be in ascending order")


def check_combinations(args: argparse.Namespace) -> None:
    """Refuse combinations of settings that cannot work.

    Raises:
        UserError: two settings exclude each other, or one requires another.
    """
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size % 2 and not (args.eval or args.throughput):
        raise UserError(
            f"--batch-size {args.batch_size}: must be even for mixup and CutMix; change it or use --mixup 0 --cutmix 0"
        )
    if args.distillation_type != "none" and not args.teacher_path:
        raise UserError(f"--distillation-type {args.distillation_type}: needs --teacher-path")
    if args.distillation_type == "none" and args.teacher_path:
        raise UserError(
            f"--teacher-path {args.teacher_path}: needs --distillation-type; set it, for example to hard, or omit both"
        )
    if args.sched == "plateau" and not uses_labels(args):
        raise UserError("--sched plateau: needs validation, and so labels; use cosine, or --distillation-alpha below 1")
    if args.early_stop and not uses_labels(args):
        raise UserError(f"--early-stop {args.early_stop}: needs validation, and so labels; omit it")
    is_table = args.data_set.startswith(TABLE)
    if args.val_fraction is not None and not is_table and args.data_set != "IMNET":
        raise UserError(
            f"--val-fraction {args.val_fraction}: --data-set {args.data_set} has validation images; omit it"
        )
    if args.ignore_classes and not is_table and args.data_set not in ("IMNET", "INAT", "INAT19"):
        raise UserError(f"--ignore-classes: not supported with --data-set {args.data_set}; omit it")
    if not args.multi_label and args.watch == "map":
        raise UserError("--watch map: needs --multi-label; choose another metric")
    check_evaluation(args)
    if args.resume and args.finetune:
        raise UserError("--resume and --finetune: mutually exclusive; resume a run, or start one from its weights")
    if args.eval and args.finetune:
        raise UserError(f"--eval --finetune {args.finetune}: mutually exclusive; pass the weights with --resume")


def check_multi_label(args: argparse.Namespace) -> None:
    """Refuse settings that `--multi-label` excludes.

    Raises:
        UserError: a setting needs a single label per image.
    """
    if not args.data_set.startswith(TABLE):
        raise UserError(f"--multi-label: needs a table, not --data-set {args.data_set}; set --data-set csv/FILE")
    distillation = args.distillation_type
    for flag, is_given in (
        (f"--watch {args.watch}", args.watch in ("top1", "balanced-accuracy")),
        (f"--sampler {args.sampler}", args.sampler == BALANCED),
        (f"--distillation-type {distillation}", distillation not in ("none", "feature")),
    ):
        if is_given:
            raise UserError(f"--multi-label: not supported with {flag}; change one of them")


def check_evaluation(args: argparse.Namespace) -> None:
    """Refuse a report that cannot be written, and images that cannot be corrupted.

    Raises:
        UserError: a package is not installed, there is no folder for the report, nothing to report, or images without
            known corruptions.
    """
    if args.multi_label:
        check_multi_label(args)
    if args.corruptions:
        require("--corruptions", "imagecorruptions", "matplotlib", extra="corruptions")
        if args.multi_label or args.in_chans not in (None, 3) or min(to_2tuple(args.input_size)) < MIN_CORRUPTED:
            size = f"{MIN_CORRUPTED} × {MIN_CORRUPTED}"
            raise UserError(
                f"--corruptions: only for RGB images of at least {size} pixels, with one label each; omit it"
            )
    if not args.report:
        return
    require("--report", "sklearn", extra="report")
    if args.eval and not args.output_dir:
        raise UserError("--eval --report: needs a folder for the report; set --output_dir")
    if not uses_labels(args):
        raise UserError("--report: needs labelled validation images; omit it")


def without_effect(args: argparse.Namespace) -> list[tuple[str, bool, str]]:
    """List groups of settings: for each, the settings' names, whether they have no effect, and which settings cause it.

    Names are separated by spaces.
    """
    optimizer, is_small = get_optimizer_info(args.opt), max(to_2tuple(args.input_size)) <= SMALL_INPUT
    is_stream = args.data_set.split("/")[0] in STREAMS
    mixes, cuts = args.mixup > 0, args.cutmix > 0 or args.cutmix_minmax is not None
    return [
        ("cooldown_epochs resplit", True, ""),
        ("decay_epochs", args.sched not in ("step", "wsd"), "sched"),
        ("decay_milestones", args.sched != "multistep", "sched"),
        ("patience_epochs", args.sched != "plateau", "sched"),
        ("decay_rate", args.sched in ("cosine", "tanh", "constant", "wsd"), "sched"),
        ("min_lr", args.sched in ("step", "multistep", "constant"), "sched"),
        ("warmup_lr", not args.warmup_epochs, "warmup_epochs"),
        ("lr_noise_pct lr_noise_std", not args.lr_noise, "lr_noise"),
        ("start_epoch", bool(args.resume), "resume"),
        ("layer_decay_min_scale", args.layer_decay is None, "layer_decay"),
        ("clip_mode", not args.clip_grad, "clip_grad"),
        ("bce_target_thresh", not (args.bce_loss or args.multi_label), "bce_loss"),
        ("bce_loss", args.multi_label, "multi_label"),
        ("momentum", not optimizer.has_momentum, "opt"),
        ("opt_eps", not optimizer.has_eps, "opt"),
        ("opt_betas", not optimizer.has_betas, "opt"),
        ("decay_window_tokens", not args.weight_decay, "weight_decay"),
        ("model_ema_decay model_ema_force_cpu model_ema_warmup", not args.model_ema, "model_ema"),
        ("color_jitter", args.color_jitter > 0 and args.aa != "" and "3a" not in args.aa, "aa"),
        ("aa color_jitter", args.in_chans not in (None, 3), "in_chans"),
        ("scale ratio", is_small, "input_size"),
        ("train_interpolation", is_small and not args.aa, "input_size aa"),
        ("remode recount", not args.reprob, "reprob"),
        ("repeated_aug", is_stream, "data_set"),
        ("cutmix", args.cutmix_minmax is not None, "cutmix_minmax"),
        ("mixup_prob mixup_mode mixup_off_epoch", not (mixes or cuts), "mixup cutmix"),
        ("mixup_switch_prob", not (mixes and cuts), "mixup cutmix"),
        ("teacher_model teacher_kwargs distillation_alpha", args.distillation_type == "none", "distillation_type"),
        ("distillation_tau", args.distillation_type not in ("soft", "logit", "token-soft"), "distillation_type"),
        ("lr_decay_fn", args.sched != "wsd", "sched"),
        ("scale ratio hflip color_jitter aa train_interpolation reprob remode recount", args.no_aug, "no_aug"),
        ("val_interval val_split watch", not uses_labels(args), "distillation_type distillation_alpha"),
        ("inat_category", not args.data_set.startswith("INAT"), "data_set"),
        ("train_split val_split", "/" not in args.data_set, "data_set"),
        (
            "path_column label_column split_column group_column weight_column",
            not args.data_set.startswith(TABLE),
            "data_set",
        ),
        ("split_seed", args.val_fraction is None, "val_fraction"),
        ("train_num_samples val_num_samples", not is_stream, "data_set"),
        ("corruptions", not (args.eval or args.report), "eval report"),
        ("eval corruptions resume finetune report", args.throughput, "throughput"),
    ]


def warn_of_settings(args: argparse.Namespace) -> None:
    """Warn of changed settings that have no effect, of a warm-up that never ends, and of a decay that never begins."""
    parser = build_parser()
    flags = parser.flags()

    def written(name: str) -> str:
        value = getattr(args, name)
        if isinstance(value, bool) or value is None:
            return flags[name] if value else f"no {flags[name]}"
        return " ".join([flags[name], *map(str, value if isinstance(value, (list, tuple)) else [value])])

    for names, is_ignored, reasons in without_effect(args):
        changed = [name for name in names.split() if getattr(args, name) != parser.get_default(name)]
        if changed and is_ignored:
            given = f" with {', '.join(map(written, reasons.split()))}" if reasons else ""
            print_main(f"WARNING: {', '.join(map(written, changed))}: no effect{given}")
    if args.eval or args.throughput:
        return
    if args.warmup_epochs >= args.epochs:
        print_main(
            f"WARNING: --warmup-epochs {args.warmup_epochs}: not shorter than --epochs {args.epochs}; the learning "
            "rate never reaches its full value"
        )
    first_decay = dict(step=args.decay_epochs, multistep=args.decay_milestones[0]).get(args.sched, 0)
    if first_decay >= args.epochs:
        print_main(
            f"WARNING: --sched {args.sched}: the first decay, at {first_decay:g} epochs, is not reached within "
            f"--epochs {args.epochs}"
        )


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 75 for "run again", 130 after Ctrl-C."""
    parser = build_parser()
    return run_command("main.py", lambda: main(parse_with_recipe(parser, arguments)), parser, MEMORY_ADVICE)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run())
