"""The training command of segmentation and detection."""

import argparse
import copy
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config

from sepvit_lib.common.command_line import Parser, natural, number, path, positive_int, run_command, seconds
from sepvit_lib.common.errors import Preempted, UserError
from sepvit_lib.common.processes import get_world_size, is_main_process, on_main_process, print_main
from sepvit_lib.common.storage import make_folder, missing_folders, remove_empty
from sepvit_lib.mm.build import BuildError, build_errors, check_training_parts, entries_of_classes
from sepvit_lib.mm.check_classes import has_other_classes, match_classes
from sepvit_lib.mm.check_data import check_data
from sepvit_lib.mm.class_weights import weight_classes
from sepvit_lib.mm.config import (
    build_parser,
    drop_pretrained,
    join_processes,
    read_config,
    read_model_checkpoint,
    where_of,
)
from sepvit_lib.mm.config_lookup import dicts
from sepvit_lib.mm.console import log_files
from sepvit_lib.mm.loops import DenseState, Schedule
from sepvit_lib.mm.training_run import (
    ADVICE,
    DenseNames,
    Run,
    TrainingRunner,
    is_finished,
    read_schedule,
    saving_of,
    settings_of,
)
from sepvit_lib.run.checkpoints import weights_of
from sepvit_lib.run.monitor import MonitorSettings
from sepvit_lib.run.output import LOG, Output, stopped
from sepvit_lib.run.resume import Source, find_checkpoint
from sepvit_lib.run.watchdog import Preemption, Watchdog, heartbeat_timeout, startup_timeout

# Classes of mmengine and mmdet with state that checkpoints do not contain.
STATEFUL = re.compile(
    r"BatchSyncRandomResize|CachedMixUp|CachedMosaic|DynamicRoIHead|EarlyStoppingHook|GroupMultiSourceSampler|"
    r"SyncBuffersHook"
)
RESUME = "run the same command with --auto-resume to resume from the last checkpoint"


def build_train_parser(description: str | None) -> Parser:
    """Make the parser of train.py."""
    parser = build_parser(description)
    add = parser.add_argument
    add("--auto-resume", action="store_true", help="resume the work dir's run, which must have the same settings")
    resume = "resume from a checkpoint; without PATH, from the newest in the work dir, if there is one"
    add("--resume", nargs="?", const="", type=path, metavar="PATH", help=resume)
    add("--load-from", type=path, metavar="PATH", help="start from the weights of a whole segmentor or detector")
    add("--from-scratch", action="store_true", help="start from random weights, without a pretrained backbone")
    add("--amp", action="store_true", help="mixed precision (float16 with loss scaling)")
    add("--auto-scale-lr", action="store_true", help="scale the learning rate to the number of images per step")
    add("--class-weights", default="", metavar="balanced|FILE", help="class weights of the loss; FILE is JSON")
    add("--no-validate", action="store_true", help="do not validate during training")
    add("--seed", type=number(int, 0, 2**32 - 1), default=None, help="default 0")  # NumPy's limit
    add("--deterministic", action="store_true")
    every = "also save every ITERATIONS iterations; 0: save only at the config's interval and before validation"
    add("--checkpoint-every", type=natural, default=0, metavar="ITERATIONS", help=every)
    keep = "keep the newest N checkpoints, default 2, in addition to those at the config's interval"
    add("--keep-checkpoints", type=positive_int, default=2, metavar="N", help=keep)
    policy = "skip: replace unreadable training images and labels, up to 0.1 %% of all; fail: end at the first one"
    add("--on-bad-image", choices=("skip", "fail"), default="skip", help=policy)
    bad = "end the run after N consecutive steps skipped because the loss or gradients are not finite, default 10"
    add("--max-bad-steps", type=positive_int, default=10, metavar="N", help=bad)
    hanging = "seconds without progress after which a process is considered hung, default 600"
    add("--timeout", type=seconds, default=600.0, metavar="SECONDS", help=hanging)
    return parser


def train(args: argparse.Namespace, flags: Mapping[str, str]) -> None:
    """Train a segmentor or detector.

    Args:
        args: the command line.
        flags: the command's flags, by name of the setting.
    """
    cfg = read_config(args)
    join_processes(cfg, args, 2 * startup_timeout(args.timeout))
    apply_options(cfg, args)
    schedule = read_schedule(cfg)
    names = DenseNames(schedule.save_interval, args.keep_checkpoints, saving_of(cfg).get("max_keep_ckpts", -1))
    folder = Path(cfg.work_dir)
    with (
        Output(folder, heartbeat_timeout(args.timeout), names, "work_dir") as output,
        Preemption("train.py") as preemption,
        Watchdog(args.timeout, "env://", preemption, RESUME, flags) as watchdog,
        own_folder(output, Path(args.config).name, preemption),
    ):
        source = find_source(cfg, args, output)
        if source is not None and is_finished(schedule, source.checkpoint):
            end_finished_run(source, cfg, schedule)
            return
        on_main_process(lambda: output.check_free(source, resumes(args)))
        written = config_to_write(cfg, args)
        with build_errors(where_of(args)):
            checkpoints = set_starting_point(cfg, args, source)
            if args.class_weights:  # after `set_starting_point`, which may change the order of the classes
                weight_classes(args.class_weights, cfg, written)
            runner = TrainingRunner.from_config(cfg, checkpoints)
        settings = settings_of(cfg) | {"launcher.processes": get_world_size()}
        limits = MonitorSettings(args.max_bad_steps, False, args.checkpoint_every, args.on_bad_image, 0, ADVICE)
        files = output, watchdog, source
        runner.run = Run(written, schedule, *files, args.auto_resume, resumes(args), settings, limits)
        with build_errors(where_of(args), lambda: runner.is_open):
            run_to_the_end(runner)


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the options of a command line to a config, and check it.

    Raises:
        UserError: an option does not fit the config.
    """
    check_training_parts(cfg, where_of(args))
    args.deterministic |= bool(cfg.get("randomness", {}).get("deterministic"))
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    seed = args.seed if args.seed is not None else cfg.get("randomness", {}).get("seed") or 0
    cfg.randomness = dict(seed=seed, deterministic=args.deterministic)
    if cfg.get("resume") and not (args.auto_resume or args.resume is not None):  # as in mmengine
        args.resume = cfg.get("load_from") or ""
    if args.amp and cfg.optim_wrapper.get("type") != "AmpOptimWrapper":
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.loss_scale = "dynamic"
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr: CONFIG {args.config} has no auto_scale_lr.base_batch_size")
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    check_accumulation(cfg, args.checkpoint_every)
    if args.auto_resume:
        check_states(cfg)
    check_data(cfg, *used_loaders(cfg))


def check_states(cfg: Config) -> None:
    """Refuse classes of mmengine and mmdet with state that checkpoints do not contain.

    Raises:
        UserError: the config uses such a class. The message names it.
    """
    for node in dicts(cfg):
        if STATEFUL.fullmatch(name := str(node.get("type")).rpartition(".")[2]):
            problem = "has state that checkpoints do not contain, and a resumed run would differ"
            raise UserError(f"--auto-resume: {name} {problem}; use --resume, or replace {name}")


def check_accumulation(cfg: Config, checkpoint_every: int) -> None:
    """Refuse intervals at which a checkpoint or validation would interrupt gradient accumulation.

    `TrainLoop` checks the length of an epoch, which is known only after the data are read.

    Raises:
        UserError: an interval is not a multiple of `accumulative_counts`. The message names it.
    """
    accumulated, schedule = cfg.optim_wrapper.get("accumulative_counts", 1), read_schedule(cfg)
    intervals = [("--checkpoint-every ", checkpoint_every)]
    if not schedule.by_epoch:
        intervals.append(("default_hooks.checkpoint.interval=", max(0, schedule.save_interval)))
        if cfg.get("val_dataloader"):
            intervals += [("train_cfg.val_interval=", interval) for _, interval in schedule.val_intervals]
    for name, interval in intervals:
        if interval % accumulated:
            count = f"optim_wrapper.accumulative_counts={accumulated}"
            raise UserError(f"{name}{interval}: must be a multiple of {count}: checkpoints contain no gradients")


def used_loaders(cfg: Config) -> list[str]:
    """Names of the data loaders that training uses."""
    return ["train_dataloader", *(["val_dataloader"] if cfg.get("val_dataloader") else [])]


def resumes(args: argparse.Namespace) -> bool:
    """Whether a command line asks to resume from the work dir's newest checkpoint, if there is one."""
    return args.auto_resume or args.resume == ""


def find_source(cfg: Config, args: argparse.Namespace, output: Output) -> Source | None:
    """Find the checkpoint to resume from; None for a fresh run. `--seed` overrides the checkpoint's seed.

    Raises:
        UserError: the checkpoint cannot be read, or contains only weights, or settings exclude each other.
    """
    values = {"--resume": args.resume, "--load-from": args.load_from, "--from-scratch": args.from_scratch}
    chosen = [flag for flag, value in values.items() if value]
    if len(chosen) > 1 and chosen != ["--resume", "--from-scratch"]:
        raise UserError(f"{' and '.join(chosen)}: choose one")

    def read(path: str, what: str) -> dict[str, Any]:
        checkpoint = read_model_checkpoint(cfg, path, what.removesuffix(f" {path}"))
        if not {"meta", "optimizer", "message_hub"} <= checkpoint.keys():
            raise UserError(f"{what}: contains only weights and cannot be resumed; use --load-from to start from it")
        return checkpoint

    source = find_checkpoint(args.resume or "", resumes(args), output.folder, output.names, read)
    if source is not None and args.seed is None and source.checkpoint["meta"].get("seed") is not None:
        cfg.randomness.seed = source.checkpoint["meta"]["seed"]
    return source


def end_finished_run(source: Source, cfg: Config, schedule: Schedule) -> None:
    """End a run that has nothing left to train.

    Raises:
        UserError: the user named the checkpoint, and so expects more training.
    """
    done = f"all {schedule.length} {'epochs' if schedule.by_epoch else 'iterations'} are done"
    if not source.is_automatic:
        name = "train_cfg.max_epochs" if schedule.by_epoch else "train_cfg.max_iters"
        raise UserError(f"{source.what}: {done}; nothing left to train; raise {name} to train longer")
    print_main(f"{source.what}: the run in {cfg.work_dir} is complete: {done}")


def config_to_write(cfg: Config, args: argparse.Namespace) -> Config:
    """Copy a config for the work dir and checkpoints. The copy is the same however often the run is resumed."""
    written = copy.deepcopy(cfg)
    written.resume, written.load_from = False, starting_weights(cfg, args)
    if written.load_from or args.from_scratch:
        drop_pretrained(written)
    return written


def starting_weights(cfg: Config, args: argparse.Namespace) -> str | None:
    """Path of the segmentor's or detector's checkpoint whose weights a fresh run starts from; None if there is none."""
    return args.load_from or (None if args.from_scratch or cfg.get("resume") else cfg.get("load_from"))


def run_to_the_end(runner: TrainingRunner) -> None:
    """Train a run from its current iteration to its end.

    Raises:
        Preempted: the run was asked to stop, and has saved a checkpoint.
        UserError: the loss was not finite in any iteration.
    """
    output, watchdog, source = runner.output, runner.run.watchdog, runner.run.source
    start = DenseState.from_checkpoint(source.checkpoint) if source else DenseState()
    try:
        runner.train()
    except Preempted:
        runner.save()
        position = f"before iteration {runner.state.global_step + 1}"
        raise stopped(output, position, watchdog.preemption.status, watchdog.flags) from None
    except (UserError, ValueError):  # in the first step, such as a missing operator
        if watchdog.preemption.has_progress and runner.state.position() == start.position() and start.validated:
            watchdog.preemption.has_progress = False
        raise
    on_main_process(output.close)
    state = runner.state
    if state.bad_steps == state.global_step:
        problem = "the loss was not finite in any iteration, and nothing was learned"
        raise UserError(f"{output.folder}: {problem}; try {ADVICE}")
    best = f", best score {state.best:.4g}" if state.best is not None else ""
    skipped = f", {state.bad_steps} steps skipped" if state.bad_steps else ""
    print_main(f"trained{best}{skipped}: checkpoints and logs are in {output.folder}")


@contextmanager
def own_folder(output: Output, config: str, preemption: Preemption) -> Iterator[None]:
    """Make and lock the work dir. If the command fails before its first step, new files are removed.

    Args:
        output: the run's files.
        config: name of the config file that the run writes.
        preemption: records whether a step was done.

    Raises:
        UserError: the folder cannot be written, or another run writes to it.
    """
    missing = missing_folders(output.folder)
    on_main_process(lambda: make_folder(output.folder, output.what))
    on_main_process(output.lock)
    before = set(output.folder.iterdir()) if is_main_process() else set()  # after locking: no other run writes
    try:
        yield
    except Exception as error:
        if not preemption.has_progress and is_main_process():
            logs = [] if isinstance(error, BuildError) else log_folders(output.folder)  # a BuildError refers to them
            for path in {output.folder / LOG, output.folder / config, *logs} - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            remove_empty(missing)
        raise


def log_folders(folder: Path) -> list[Path]:
    """Folders directly in a work dir that contain this process's log files."""
    return [file.parent for file in log_files() if file.parent.parent == Path(os.path.abspath(folder))]


def set_starting_point(cfg: Config, args: argparse.Namespace, source: Source | None) -> dict[str, dict[str, Any]]:
    """Set what training starts from: a checkpoint, a pretrained backbone, or (only on request) random weights.

    Args:
        cfg: the config.
        args: the command line.
        source: checkpoint that the run resumes from, None for a fresh run.

    Returns:
        the checkpoint that was read, by its path; empty if none was read.

    Raises:
        UserError: the checkpoint is missing or contains a different variant.
    """
    cfg.load_from = source.path if source else starting_weights(cfg, args)
    cfg.resume = source is not None
    backbone = cfg.model.backbone
    if cfg.load_from or args.from_scratch:
        drop_pretrained(cfg)
    if source:
        match_classes(cfg, source.checkpoint, source.what, used_loaders(cfg))
        return {source.path: source.checkpoint}
    if cfg.load_from:
        return {cfg.load_from: read_starting_weights(cfg, "--load-from" if args.load_from else "load_from")}
    settings = backbone.get("init_cfg")
    pretrained = backbone.get("pretrained") or (settings.get("checkpoint") if isinstance(settings, dict) else None)
    if pretrained and "://" not in pretrained and not Path(pretrained).is_file():
        ways_out = "put a checkpoint of main.py there, name one with --cfg-options model.backbone.pretrained=PATH"
        raise UserError(f"pretrained {pretrained}: no such file; {ways_out}, or train without one: --from-scratch")
    return {}


def read_starting_weights(cfg: Config, flag: str) -> dict[str, Any]:
    """Read the checkpoint of `load_from`. If its classes differ from the data set's, drop class-dependent entries.

    Args:
        cfg: the config.
        flag: the flag or setting that names the checkpoint, for messages.

    Raises:
        UserError: the checkpoint is missing or contains a different variant.
    """
    checkpoint, what = read_model_checkpoint(cfg, cfg.load_from, flag), f"{flag} {cfg.load_from}"
    if not has_other_classes(cfg, checkpoint, "train_dataloader"):
        match_classes(cfg, checkpoint, what, used_loaders(cfg))
        return checkpoint
    weights, depending = weights_of(checkpoint, what), entries_of_classes(cfg)
    kept = {name: value for name, value in weights.items() if name not in depending}
    count = len(weights) - len(kept)
    problem = "was trained on classes with different names"
    print_main(f"{what}: {problem}; the {count} entries that depend on the classes stay randomly initialised")
    return {"meta": checkpoint.get("meta", {}), "state_dict": kept}


def run_training(parser: Parser, arguments: list[str] | None = None) -> int:
    """Run train.py. Returns its exit status."""
    return run_command("train.py", lambda: train(parser.parse_args(arguments), parser.flags()), parser)
