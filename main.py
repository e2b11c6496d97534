"""Train and evaluate SepViT on ImageNet and its kind. `python main.py --help` lists the settings."""

import signal

if __name__ == "__main__":  # Ctrl-C while the libraries are imported, which takes seconds, ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg_value
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    optimizer_kwargs,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

import utils
from checkpoints import has_both_weights, load_weights, read_checkpoint, weights_of
from datasets import (
    DATA_SETS,
    INAT_CATEGORIES,
    READERS,
    build_dataset,
    build_train_loader,
    build_val_loader,
    check_same_classes,
)
from engine import DistillationLoss, Precision, Supervision, Training, evaluate, measure_throughput, train_one_epoch
from faults import Agreement, Preemption, Watch, longest_rest
from runs import Output, complete, describe_data, describe_run, find_checkpoint, open_output, restore
from sepvit import VARIANTS
from training.commands import (
    Parser,
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
from training.devices import check_device
from training.recipes import parse_with_recipe
from utils import Preempted, Stream, UserError, print_main, seed_everything

MEMORY_ADVICE = (
    "lower --batch-size (--accum-steps keeps the images a step), use --grad-checkpointing, or a smaller --input-size"
)


def main(args: argparse.Namespace) -> None:
    """Run what the settings ask for: training, evaluation, or throughput."""
    check_settings(args)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what makes cuBLAS deterministic
    device = utils.init_distributed(args.device, args.world_size, args.dist_url, 2 * longest_rest(args.timeout))
    seed_everything(Stream.WEIGHTS, args.seed)
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    precision = build_precision(args, device)
    if args.throughput or args.eval:
        advice = "run the same command again"
        with Preemption(saves=False) as end, Watch(args.timeout, args.dist_url, end, advice) as watch:
            run_throughput(args, watch, precision) if args.throughput else run_evaluation(args, watch, precision)
    else:
        with Output() as output, Preemption() as preemption, Watch(args.timeout, args.dist_url, preemption) as watch:
            run_training(args, output, watch, precision)


def run_throughput(args: argparse.Namespace, watch: Watch, precision: Precision) -> None:
    """`--throughput`: images a second of the network."""
    val = build_dataset(False, args)
    model = build_model(args, val.num_classes, precision)
    measure_throughput(model, build_val_loader(val, args), precision, args, watch)


def run_evaluation(args: argparse.Namespace, watch: Watch, precision: Precision) -> None:
    """`--eval`: accuracy of the weights of `--resume`, and of the averaged ones where there are any."""
    val = build_dataset(False, args)
    model = build_model(args, val.num_classes, precision)
    if args.output_dir:
        utils.on_main_process(lambda: utils.make_folder(Path(args.output_dir), "--output_dir"))
    loader = build_val_loader(val, args)
    checkpoint = {}
    if args.resume:
        checkpoint = load_from(args.resume, "--resume", model)
    else:
        print_main("--eval without --resume: evaluating fresh weights")
    stats = prefixed("test", evaluate(model, loader, precision, "validation", args, watch))
    check_outputs(stats, "validation")
    if has_both_weights(checkpoint):
        what = f"--resume {args.resume}"
        load_weights(model, weights_of(checkpoint, what, prefer_ema=True), what)
        stats |= prefixed("test_ema", evaluate(model, loader, precision, "validation, averaged weights", args, watch))
    if args.output_dir:
        utils.on_main_process(lambda: write_figures(stats, Path(args.output_dir) / "eval.json"))


def check_outputs(stats: dict[str, float], title: str) -> None:
    """Refuse to call it a success where the network's outputs are not finite.

    Raises:
        UserError: the validation loss is not.
    """
    if not math.isfinite(stats["test_loss"]):
        raise UserError(f"{title}: the loss is {stats['test_loss']}, the network's outputs are not finite; try "
                        "--amp off, or train with a lower --lr")  # fmt: skip


def write_figures(stats: dict[str, float], path: Path) -> None:
    """Write figures as JSON.

    Raises:
        UserError: they cannot be written; a file that was there is as it was.
    """
    try:
        utils.write_file(path, lambda file: file.write(json.dumps(stats).encode() + b"\n"))
    except OSError as error:
        raise UserError(f"--output_dir {path.parent}: {path.name} could not be written ({error.strerror}); make room, "
                        "or name another folder") from None  # fmt: skip


def run_training(args: argparse.Namespace, output: Output, watch: Watch, precision: Precision) -> None:
    """Train epoch by epoch; write checkpoints, log.txt, TensorBoard's files and curves.png."""
    folder, settings = Path(args.output_dir or args.model), dict(vars(args))
    val, train = build_dataset(False, args), build_dataset(True, args)
    check_same_classes(train, val)
    model = build_model(args, train.num_classes, precision)
    data = describe_data(train, val)
    utils.on_main_process(lambda: output.hold(folder, watch.patience))
    source = find_checkpoint(args, folder, data, isinstance(train.dataset, IterableDataset))
    train_loader, val_loader = build_train_loader(train, args), build_val_loader(val, args)
    if args.finetune and not source:
        finetune_from(args, model)
    training = build_training(args, model, precision)
    mixup = build_mixup(args, train.num_classes)
    criterion = build_criterion(args, train.num_classes, precision, mixup is not None)
    if source:
        restore(args, training, source)
    if training.epoch >= args.epochs:
        if source and source.flag == "--auto-resume":
            utils.on_main_process(lambda: complete(folder))
            print_main(f"--auto-resume: the run in {folder} is at its end, epoch {args.epochs - 1}")
            return
        raise UserError(f"--epochs {args.epochs}: all {training.epoch} epochs are done, there is none left to train")
    open_output(args, output, folder, source, training, describe_run(settings, data, precision))
    start = time.perf_counter()
    save = partial(save_checkpoint, args, dict(args=settings, data=data), training, output)
    agreement = Agreement(precision.device, reading_lag(args, precision))
    supervision = Supervision(args, watch, agreement, len(train.dataset), folder, output.note, save)
    try:
        while training.epoch < args.epochs:
            loss = train_one_epoch(training, train_loader, criterion, precision, args, mixup, supervision)
            stats = prefixed("train", loss) | evaluate_training(args, training, val_loader, precision, watch)
            end_epoch(training, output, save, stats)
    except Preempted:
        raise end_preempted(training, output, save, watch.preemption.status) from None
    utils.on_main_process(output.close)
    utils.on_main_process(lambda: complete(folder))
    check_outputs(stats, f"epoch {training.epoch - 1} validation")
    if utils.is_main_process():
        duration = timedelta(seconds=round(time.perf_counter() - start))
        print(f"trained in {duration}, best top-1 {training.best_accuracy:.3f} %: checkpoints, log.txt and curves.png "
              f"are in {folder}")  # fmt: skip


def evaluate_training(
    args: argparse.Namespace, training: Training, loader: Any, precision: Precision, watch: Watch
) -> dict[str, float]:
    """Validation of the network and of its averaged weights; names as in log.txt."""
    title = f"epoch {training.epoch} validation"
    stats = prefixed("test", evaluate(training.model, loader, precision, title, args, watch))
    if training.ema is not None:
        title += ", averaged weights"
        model = training.ema.module
        if args.model_ema_force_cpu:
            model = copy.deepcopy(model).to(precision.device)
        averaged = evaluate(model, loader, precision, title, args, watch)
        stats |= prefixed("test_ema", averaged)
    return stats


def prefixed(prefix: str, stats: dict[str, float]) -> dict[str, float]:
    """Figures under the names that log.txt gives them."""
    return {f"{prefix}_{name}": value for name, value in stats.items()}


def end_epoch(training: Training, output: Output, save: Callable[..., None], stats: dict[str, float]) -> None:
    """Write the epoch's logs and checkpoint, in this order: what a checkpoint is behind is in the logs."""
    is_best = stats["test_acc1"] > training.best_accuracy and math.isfinite(stats["test_loss"])
    training.best_accuracy = stats["test_acc1"] if is_best else training.best_accuracy
    n_parameters = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    output.note({**stats, "epoch": training.epoch, "n_parameters": n_parameters,
                 "bad_steps": training.bad_steps, "unreadable_images": len(training.unreadable)})  # fmt: skip
    output.draw(stats, training.epoch)
    training.lr_scheduler.step(training.epoch, stats["test_acc1"])
    training.end_epoch()
    save(is_best=is_best)


def end_preempted(training: Training, output: Output, save: Callable[..., None], status: int) -> Preempted:
    """Save where a run is that was asked to end; returns what there is to say of it."""
    save()
    place = f"before epoch {training.epoch}, step {training.step}; the same command with --auto-resume resumes"
    try:
        utils.on_main_process(output.close)
    except UserError as error:
        print_main(f"WARNING: {error}")
        return Preempted(f"{place} from the last checkpoint", status)
    return Preempted(f"{place} there", status)


def save_checkpoint(
    args: argparse.Namespace, run: dict[str, Any], training: Training, output: Output, is_best: bool = False
) -> None:
    """Write where the run is; all processes call it together.

    Raises:
        UserError: the weights are not finite.
    """
    training.check_finite()
    checkpoint = training.checkpoint() | run | dict(batches_per_step=args.accum_steps * utils.get_world_size())
    output.save(checkpoint, is_best)


# ----------------------------------------------------------------------------------------------------------------------
# What a run is built from
# ----------------------------------------------------------------------------------------------------------------------


def build_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    """Device, number format and memory format. CUDA defaults to bfloat16 where it has it; CPU, MPS and `--throughput`,
    as published, to float32."""
    amp = args.amp
    if amp == "auto":
        amp = "off"
        if device.type == "cuda" and not args.throughput:
            amp = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    dtype = None if amp == "off" else getattr(torch, amp)
    return Precision(device, dtype, torch.channels_last if args.channels_last else torch.contiguous_format)


def create_model(flag: str, name: str, num_classes: int, input_size: int, **kwargs: Any) -> nn.Module:
    """One of timm's models, built for the image size where it is for one size only."""
    if get_pretrained_cfg_value(name, "fixed_input_size"):
        kwargs["img_size"] = input_size
    try:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    except (TypeError, ValueError, AssertionError) as error:  # what timm's models say to settings they do not have
        raise UserError(f"{flag} {name}: timm cannot build it with these settings ({error})") from None


def build_model(args: argparse.Namespace, num_classes: int, precision: Precision) -> nn.Module:
    """The network on its device."""
    rates = dict(drop_rate=args.drop, drop_path_rate=args.drop_path)
    model = create_model("--model", args.model, num_classes, args.input_size, **rates)
    model.to(precision.device, memory_format=precision.memory_format)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.compile:
        model.compile()
    return model


def build_training(args: argparse.Namespace, model: nn.Module, precision: Precision) -> Training:
    """Optimiser, schedule, gradient scaling, averaged weights and the data-parallel wrapper around a network."""
    # The published recipe's learning rate is for 512 images a step.
    images_per_step = args.batch_size * args.accum_steps * utils.get_world_size()
    kwargs = optimizer_kwargs(cfg=args) | {"lr": args.lr * images_per_step / 512}
    if args.decay_window_tokens:
        kwargs["param_group_fn"] = partial(param_groups_weight_decay, weight_decay=args.weight_decay)
    if precision.device.type == "cuda" and args.opt in ("adam", "adamw"):
        kwargs["fused"] = True  # one kernel a step; and with float16 it needs no word from the GPU to skip a step
    try:
        optimizer = create_optimizer_v2(model, **kwargs)
    except (TypeError, ValueError, AssertionError, IndexError) as error:
        raise UserError(f"--opt {args.opt}: does not take these settings ({error})") from None
    try:
        with warnings.catch_warnings():  # plateau's schedule counts no warm-up into its patience, as published
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"timm\.scheduler")
            lr_scheduler, _ = create_scheduler(args, optimizer)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"--sched {args.sched}: does not take these settings ({error})") from None
    if args.start_epoch and args.sched != "plateau":
        lr_scheduler.step(args.start_epoch - 1)
    ema = None
    if args.model_ema:
        place = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=place)
    wrapped = model
    if dist.is_initialized():
        device_ids = [precision.device.index] if precision.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        settle_buckets(wrapped, args, precision)
    losses = torch.zeros(2, device=precision.device)
    return Training(model, wrapped, optimizer, lr_scheduler, precision.scaler(), ema, args.start_epoch, losses=losses)


def settle_buckets(wrapped: DistributedDataParallel, args: argparse.Namespace, precision: Precision) -> None:
    """Compute the gradients of empty images, and forget them.

    After its first backward pass data parallelism groups the gradients anew, which changes the order in which the
    processes' are added, and so their last bits. A run that goes on has to add as one that never stopped.
    """
    buffers = [buffer.clone() for buffer in wrapped.buffers()]
    images = precision.images(torch.zeros(args.batch_size, 3, args.input_size, args.input_size))
    with precision.autocast(), warnings.catch_warnings():
        # gradients of transposed weights have other strides than their buckets: a copy, and nothing to do about it
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        wrapped(images).float().sum().backward()
    wrapped.zero_grad(set_to_none=True)
    for buffer, value in zip(wrapped.buffers(), buffers):
        buffer.copy_(value)


def reading_lag(args: argparse.Namespace, precision: Precision) -> int:
    """Steps after which the facts of a step are read: one on GPUs, so that the loop does not wait for them."""
    return 1 if precision.device.type == "cuda" and not args.dump_bad_batch else 0


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Mixup and CutMix, or None where both are off."""
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_criterion(
    args: argparse.Namespace, num_classes: int, precision: Precision, soft_targets: bool
) -> DistillationLoss:
    """The training loss: cross entropy with soft, smoothed or plain targets, and the teacher's part."""
    if soft_targets:
        base = SoftTargetCrossEntropy()
    elif args.smoothing > 0:
        base = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        base = nn.CrossEntropyLoss()
    if args.distillation_type == "none":
        return DistillationLoss(base)
    teacher = create_model("--teacher-model", args.teacher_model, num_classes, args.input_size)
    load_from(args.teacher_path, "--teacher-path", teacher)
    teacher.to(precision.device, memory_format=precision.memory_format).eval().requires_grad_(False)
    return DistillationLoss(base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


def load_from(path: str, flag: str, model: nn.Module) -> dict[str, Any]:
    """Load a checkpoint's weights; says what another image size made necessary. Returns the checkpoint."""
    checkpoint = read_checkpoint(path, flag)
    what = f"{flag} {path}"
    hint = f"name it with {'--teacher-model' if flag == '--teacher-path' else '--model'}"
    classes_hint = "evaluate it" if flag == "--resume" else "take a teacher that was trained"
    classes_hint += " on images of its own classes"
    adaptation = load_weights(model, weights_of(checkpoint, what), what, hint, classes_hint=classes_hint)
    if adaptation:
        print_main(f"{what}: of another image size; {adaptation}")
    return checkpoint


def finetune_from(args: argparse.Namespace, model: nn.Module) -> None:
    """`--finetune`: start from weights of another number of classes or another image size; says what was done."""
    what = f"--finetune {args.finetune}"
    checkpoint = read_checkpoint(args.finetune, "--finetune")
    weights = weights_of(checkpoint, what, prefer_ema=True)
    own = model.state_dict()
    weights, reshaped = adapted_by_timm(weights, model)
    head = [name for name in own if name.startswith(f"{model.default_cfg['classifier']}.")]
    fits = all(name in weights and weights[name].shape == own[name].shape for name in head)
    fresh = [] if fits else head
    weights |= {name: own[name] for name in fresh}
    adaptation = load_weights(model, weights, what)
    adaptation.resampled += reshaped
    loaded = len(own) - len(fresh) - len(adaptation.fresh) - len(adaptation.resampled)
    which = "averaged weights, " if has_both_weights(checkpoint) else ""
    print_main(f"{what}: {which}loaded {loaded} of {len(own)} entries as they are")
    if adaptation:
        print_main(f"{what}: of another image size; {adaptation}")
    if fresh:
        print_main(f"{what}: another number of classes; left out and fresh {len(fresh)}: {', '.join(fresh)}")


def adapted_by_timm(weights: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of another of timm's models in the model's image size, where timm can resize them (ViT, Swin, …).

    Returns:
        the weights, and the names of those of another shape than before.
    """
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return weights, []
    try:
        adapted = adapt(dict(weights), model)
    except Exception:  # what it raises on another network's weights depends on the network: `load_weights` names them
        return weights, []
    changed = [name for name, value in adapted.items() if name in weights and value.shape != weights[name].shape]
    return adapted, changed


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


SWITCH = dict(action=argparse.BooleanOptionalAction, default=False)  # --no-… turns off what a recipe turns on


def build_parser() -> Parser:
    """All settings with the defaults of the published recipe."""
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
    add("--batch-size", type=positive_int, default=64, help="images a process and forward pass")
    add("--accum-steps", type=positive_int, default=1, help="forward passes whose gradients add up to one step")
    add("--epochs", type=positive_int, default=300)
    add("--start_epoch", type=natural, default=0)
    add("--seed", type=natural, default=0)
    add("--config", type=path, default=None, metavar="FILE.yaml",
        help="a recipe of settings, such as those in recipes/; the command line goes before it")  # fmt: skip
    add("--output_dir", type=path, default="", help="folder for checkpoints and logs; by default the model's name")
    add("--resume", type=path, default="", help="checkpoint to resume from or to evaluate, a path or an https address")
    add("--auto-resume", **SWITCH, help="resume from the output folder's newest checkpoint, if it has any")
    add(
        "--checkpoint-every", type=natural, default=0, metavar="STEPS", help="save within epochs, too; 0: at their ends"
    )
    add("--keep-checkpoints", type=positive_int, default=2, metavar="N", help="how many of the newest stay")
    add("--finetune", type=path, default="", help="checkpoint to start from, of any number of classes and image size")
    add("--eval", **SWITCH, help="evaluate only")
    add("--dist-eval", **SWITCH, help="share the validation images out to the processes")
    add("--throughput", **SWITCH, help="measure images a second only")
    add("--print-freq", type=positive_int, default=20, help="batches between two reports")
    add("--deterministic", **SWITCH, help="the same weights to the last bit in each run, slower on GPUs")
    add("--max-bad-steps", type=positive_int, default=10, metavar="N",
        help="end after so many steps in a row whose loss or gradients are not finite; each is left out")  # fmt: skip
    add("--dump-bad-batch", **SWITCH, help="keep the batches of such steps in the output folder")


def add_device_settings(group: Any) -> None:
    add = group.add_argument
    add("--device", default=utils.best_device(), help="cuda, mps or cpu; the best there is by default")
    add("--amp", choices=("auto", "bfloat16", "float16", "off"), default="auto",
        help="mixed precision; auto: bfloat16 or float16 on CUDA, off elsewhere")  # fmt: skip
    add("--compile", **SWITCH, help="compile the network with torch.compile")
    add("--channels-last", **SWITCH, help="keep images channels last in memory")
    add("--grad-checkpointing", **SWITCH, help="compute activations twice to save memory")
    add("--timeout", type=seconds, default=600.0, metavar="SECONDS",
        help="how long a process may hang before all end; one that dies is noticed in a tenth of it")  # fmt: skip
    add("--num_workers", type=natural, default=min(10, utils.available_cores()),
        help="processes that load images, a process; by default as many as there are cores, at most 10")  # fmt: skip
    add("--pin-mem", action=argparse.BooleanOptionalAction, default=True, help="load images into pinned memory")
    add("--world_size", type=positive_int, default=1, help="number of processes, where the environment tells none")
    add("--dist_url", default="env://", help="where the processes meet")
    add("--local-rank", type=natural, help=argparse.SUPPRESS)  # of torch.distributed.launch, which also sets LOCAL_RANK


def add_model_settings(group: Any) -> None:
    add = group.add_argument
    add("--model", default="SepViT_Tiny", help=f"{', '.join(VARIANTS)}, or any model of timm's")
    add("--input-size", type=positive_int, default=224, help="side of the images in pixels")
    add("--drop", type=fraction, default=0.0, help="dropout rate")
    add("--drop-path", type=fraction, default=0.2, help="stochastic depth rate of the last block")
    add("--model-ema", **SWITCH, help="average the weights, evaluate and save the average too")
    add("--model-ema-force-cpu", **SWITCH, help="keep the averaged weights in the CPU's memory")
    add("--model-ema-decay", type=fraction, default=0.9999)
    add("--model-ema-warmup", **SWITCH, help="let the decay rise with the steps, for short runs")


def add_optimizer_settings(group: Any) -> None:
    add = group.add_argument
    add("--opt", type=str.lower, default="adamw", help="an optimiser of timm's")
    add("--opt-eps", type=positive, default=1e-8)
    add("--opt-betas", type=fraction, nargs="+", default=None, help="the optimiser's own by default")
    add("--clip-grad", type=non_negative, default=5.0, help="largest norm of the gradients; 0: any")
    add("--momentum", type=fraction, default=0.9)
    add("--weight-decay", type=non_negative, default=0.05)
    add("--decay-window-tokens", **SWITCH, help="decay the window tokens, too, as the published runs did")


def add_schedule_settings(group: Any) -> None:
    add = group.add_argument
    add("--sched", choices=("cosine", "tanh", "step", "multistep", "plateau", "poly", "constant"), default="cosine")
    add("--lr", type=non_negative, default=5e-4, help="learning rate for 512 images a step; scaled to the run's")
    add("--lr-noise", type=fraction, nargs="+", default=None, help="parts of the schedule with noise")
    add("--lr-noise-pct", type=positive, default=0.67)
    add("--lr-noise-std", type=positive, default=1.0)
    add("--warmup-lr", type=non_negative, default=1e-6)
    add("--min-lr", type=non_negative, default=1e-5)
    add("--decay-epochs", type=positive, default=30)
    add("--warmup-epochs", type=natural, default=5)
    add("--cooldown-epochs", type=natural, default=10)
    add("--patience-epochs", type=natural, default=10)
    add("--decay-rate", "--dr", type=positive, default=0.1)


def add_augmentation_settings(group: Any) -> None:
    add = group.add_argument
    add("--scale", type=positive_fraction, nargs=2, default=(0.08, 1.0), help="area of the random crop, least and most")
    add("--ratio", type=positive, nargs=2, default=(3 / 4, 4 / 3), help="aspect of the random crop, least and most")
    add("--hflip", type=fraction, default=0.5, help="probability of a horizontal flip")
    add("--color-jitter", type=non_negative, default=0.4)
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of an automatic augmentation; '' for none")
    add("--smoothing", type=fraction, default=0.1, help="label smoothing")
    add("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="bicubic")
    add("--repeated-aug", **SWITCH)
    add("--reprob", type=fraction, default=0.25, help="probability of random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="what is put in place of the erased")
    add("--recount", type=positive_int, default=1, help="erased places an image")
    add("--resplit", **SWITCH, help="accepted for DeiT's commands; it acts on augmentation splits only")


def add_mixing_settings(group: Any) -> None:
    add = group.add_argument
    add("--mixup", type=non_negative, default=0.8, help="alpha; 0 turns it off")
    add("--cutmix", type=non_negative, default=1.0, help="alpha; 0 turns it off")
    add("--cutmix-minmax", type=fraction, nargs=2, default=None, help="share of the image cut, in place of alpha")
    add("--mixup-prob", type=fraction, default=1.0, help="probability that a batch is mixed")
    add("--mixup-switch-prob", type=fraction, default=0.5, help="probability of CutMix where both are on")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch")


def add_distillation_settings(group: Any) -> None:
    add = group.add_argument
    add("--distillation-type", choices=("none", "soft", "hard"), default="none")
    add("--teacher-model", default="regnety_160", help="any model of timm's")
    add("--teacher-path", type=path, default="", help="the teacher's checkpoint, a path or an https address")
    add("--distillation-alpha", type=fraction, default=0.5, help="share of the teacher's part of the loss")
    add("--distillation-tau", type=positive, default=1.0, help="temperature of soft distillation")


def add_data_settings(group: Any) -> None:
    add = group.add_argument
    add("--data-path", type=path, default="imagenet")
    add("--data-set", default="IMNET", help="IMNET (a folder of class folders), CIFAR, INAT, INAT19, or a name of "
        "timm's readers: wds/…, hfds/…, tfds/…, torch/…")  # fmt: skip
    add("--inat-category", choices=INAT_CATEGORIES, default="name")
    add("--num-classes", type=positive_int, default=None, help="for timm's readers that do not tell")
    add("--on-bad-image", choices=("skip", "fail"), default="skip", help="take another training image in place of one "
        "that cannot be read, for up to 0.1 %% of them; or end")  # fmt: skip
    add("--train-split", default="train", help="of timm's readers; webdatasets: shards{00..99}.tar|samples, too")
    add("--val-split", default="validation", help="likewise")
    add("--train-num-samples", type=positive_int, default=None, help="for timm's readers that do not tell")
    add("--val-num-samples", type=positive_int, default=None, help="likewise")


def check_settings(args: argparse.Namespace) -> None:
    """Refuse settings that cannot work, before anything is built or written.

    Raises:
        UserError: the first one found.
    """
    check_names(args)
    check_device(args.device)
    check_ranges(args)
    check_combinations(args)


def check_names(args: argparse.Namespace) -> None:
    """Refuse names of models, optimisers and data sets that there are not.

    Raises:
        UserError: the first one found.
    """
    for flag, name in (("--model", args.model), ("--teacher-model", args.teacher_model)):
        if not timm.is_model(name):
            raise UserError(f"{flag} {name}: unknown; choose {', '.join(VARIANTS)}, or a model of timm's")
    if args.opt not in list_optimizers():
        raise UserError(f"--opt {args.opt}: unknown; choose one of timm's, such as adamw, sgd, lamb")
    if get_optimizer_info(args.opt).second_order:
        raise UserError(f"--opt {args.opt}: takes second derivatives, which are not computed here; choose another one")
    if args.data_set.split("/")[0] not in (DATA_SETS if "/" not in args.data_set else READERS):
        readers = ", ".join(f"{name}/…" for name in READERS)
        raise UserError(f"--data-set {args.data_set}: unknown; choose {', '.join(DATA_SETS)}, {readers}")


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse pairs of numbers that are no pair.

    Raises:
        UserError: the first one found.
    """
    if args.opt_betas and (len(args.opt_betas) != 2 or max(args.opt_betas) == 1):
        raise UserError(f"--opt-betas {' '.join(map(str, args.opt_betas))}: takes two numbers from 0 to below 1")
    for flag, pair in (("--scale", args.scale), ("--ratio", args.ratio), ("--cutmix-minmax", args.cutmix_minmax)):
        if pair and pair[0] > pair[1]:
            raise UserError(f"{flag} {pair[0]:g} {pair[1]:g}: takes the least first, then the most")
    if args.cutmix_minmax and len({int(args.input_size * share) for share in args.cutmix_minmax}) == 1:
        raise UserError(f"--cutmix-minmax {' '.join(map(str, args.cutmix_minmax))}: the least and the most are the "
                        f"same number of pixels of --input-size {args.input_size}; move them apart")  # fmt: skip
    if args.sched == "plateau" and args.decay_rate >= 1:
        raise UserError(
            f"--decay-rate {args.decay_rate:g}: --sched plateau multiplies the rate by it; take less than 1"
        )


def check_combinations(args: argparse.Namespace) -> None:
    """Refuse settings that exclude or need each other.

    Raises:
        UserError: the first ones found.
    """
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size % 2 and not (args.eval or args.throughput):
        raise UserError(f"--batch-size {args.batch_size}: mixup and cutmix take an even one; or --mixup 0 --cutmix 0")
    if args.distillation_type != "none" and not args.teacher_path:
        raise UserError(f"--distillation-type {args.distillation_type}: needs the teacher's --teacher-path")
    if args.distillation_type == "none" and args.teacher_path:
        raise UserError(f"--teacher-path {args.teacher_path}: takes --distillation-type soft or hard, or leave it out")
    if args.resume and args.finetune:
        raise UserError("--resume and --finetune: choose one, to resume a run or to start another from its weights")
    if args.eval and args.finetune:
        raise UserError(f"--eval --finetune {args.finetune}: evaluation takes its weights from --resume")


def run(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 for a mistake, 75 for "run me again", 130 when interrupted."""
    return run_command("main.py", lambda: main(parse_with_recipe(build_parser(), arguments)), MEMORY_ADVICE)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run())
