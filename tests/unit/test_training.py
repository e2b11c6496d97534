"""Parts of main.py's training: defaults, schedule, precision, losses, resuming, and the files of a run."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import GOLDEN, PLAIN, SMALLEST
from torch.utils.data import DataLoader

import main
from engine import DistillationLoss, LoopSettings, train_one_epoch
from sepvit_lib.common.devices import available_cores
from sepvit_lib.common.errors import UserError
from sepvit_lib.run import output, resume
from sepvit_lib.run.checkpoint_names import StepNames
from sepvit_lib.run.checkpoints import load_optimizer, read_checkpoint
from sepvit_lib.run.monitor import DelayedFlags, MonitorSettings, StepMonitor
from sepvit_lib.run.watchdog import Preemption, Watchdog

# The published recipe's settings.
DEFAULTS = (
    "batch_size=64 epochs=300 seed=0 pin_mem=True output_dir= resume= start_epoch=0 eval=False dist_eval=False "
    "throughput=False finetune= world_size=1 dist_url=env:// model=SepViT_Tiny input_size=224 drop=0.0 drop_path=0.2 "
    "opt=adamw opt_eps=1e-08 opt_betas=None clip_grad=5.0 momentum=0.9 weight_decay=0.05 sched=cosine lr=0.0005 "
    "lr_noise=None lr_noise_pct=0.67 lr_noise_std=1.0 warmup_lr=1e-06 min_lr=1e-05 decay_epochs=30 warmup_epochs=5 "
    "cooldown_epochs=10 patience_epochs=10 decay_rate=0.1 color_jitter=0.4 aa=rand-m9-mstd0.5-inc1 smoothing=0.1 "
    "train_interpolation=bicubic repeated_aug=False reprob=0.25 remode=pixel recount=1 resplit=False mixup=0.8 "
    "cutmix=1.0 cutmix_minmax=None mixup_prob=1.0 mixup_switch_prob=0.5 mixup_mode=batch data_path=imagenet "
    "data_set=IMNET inat_category=name"
)


def test_defaults_are_the_reference_recipe():
    args = vars(main.build_parser().parse_args([]))
    expected = dict(word.split("=") for word in DEFAULTS.split())
    assert {name: str(args[name]) for name in expected} == expected
    assert args["num_workers"] == min(10, available_cores())


def prepared(*arguments, model=None):
    """Build the settings, precision and training state of a small run as main.py does."""
    args = main.build_parser().parse_args([*map(str, SMALLEST), "--device", "cpu", *map(str, arguments)])
    precision = main.build_precision(args, torch.device("cpu"))
    model = model or main.build_model(args, 3, precision)
    return args, precision, main.build_training(args, model, precision, args.accum_steps)


def one_epoch(args, precision, training, criterion=None, batches=1):
    torch.manual_seed(0)
    batch = (torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), [""] * 4)
    loader = DataLoader([batch] * batches, batch_size=None, collate_fn=lambda batch: batch)
    criterion = criterion or DistillationLoss(torch.nn.CrossEntropyLoss())
    watchdog = Watchdog(600, "env://", Preemption("main.py"), main.RERUN, {})
    limits = main.settings_from(args, MonitorSettings, dataset_size=100, advice="a lower --lr")
    monitor = StepMonitor(limits, watchdog, DelayedFlags(precision.device, 0), Path(), print, lambda: None)
    return train_one_epoch(
        training, loader, criterion, precision, main.settings_from(args, LoopSettings), None, monitor
    )


def create_groups(model):
    return main.create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05).param_groups


def test_throughput_is_measured_in_float32_as_published():
    """Unless --amp names a format. Training on GPUs defaults to mixed precision."""
    for flags, dtype in (([], None), (["--amp", "bfloat16"], torch.bfloat16)):
        args = main.build_parser().parse_args(["--throughput", *flags])
        assert main.build_precision(args, torch.device("cuda")).dtype == dtype


def test_learning_rates_match_the_reference_run(monkeypatch):
    monkeypatch.setattr(main, "get_world_size", lambda: 8)
    args = main.build_parser().parse_args(["--batch-size", "128", "--device", "cpu"])
    model = torch.nn.Linear(2, 2)
    training = main.build_training(args, model, main.build_precision(args, torch.device("cpu")), args.accum_steps)
    rates = []
    for epoch in range(300):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.lr_scheduler.step(epoch)
    golden = json.loads((GOLDEN / "lr_schedule_tiny_8gpu_300ep.json").read_text())["lr_per_epoch"]
    assert rates == pytest.approx(golden, rel=1e-9)


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precision_and_memory_format_reach_the_network(amp, channels_last):
    flags = ["--channels-last"] if channels_last else []
    args, precision, training = prepared("--amp", amp, "--epochs", 2, *flags)  # float16 may skip an epoch
    seen = []
    training.model.patch_embeds[0].proj.register_forward_hook(lambda _, inputs, y: seen.append((inputs[0], y)))
    one_epoch(args, precision, training)
    images, outputs = seen[0]
    assert outputs.dtype == {"off": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[amp]
    assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert training.scaler.is_enabled() == (amp == "float16")


def test_convolutions_and_optimiser_are_of_the_fast_kind():
    """Maps are channels last, so the weights of convolutions are, too. AdamW takes one pass over the weights."""
    _, _, training = prepared()
    for embed in training.model.patch_embeds:
        assert embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    assert training.optimizer.defaults["fused"]


@pytest.mark.parametrize("flags", [[], ["--deterministic"]])
def test_deterministic_runs_compile_deterministically(flags, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: seen.append(kwargs["options"]))
    prepared("--compile", *flags)
    assert seen == [{"deterministic": True} if flags else None]
    assert "deterministic" in torch._inductor.list_options()


def test_grad_checkpointing_computes_blocks_twice():
    counts = []
    for flags in ([], ["--grad-checkpointing"]):
        args, precision, training = prepared(*flags)
        calls = []
        training.model.blocks[2][0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        one_epoch(args, precision, training)
        counts.append(len(calls))
    assert counts == [1, 2]


def test_clip_grad_bounds_the_step():
    """With plain SGD at a learning rate of 1, the step is the clipped gradient."""
    norms = []
    for clip in (0, 1e-3):
        torch.manual_seed(0)
        arguments = [*PLAIN, "--opt", "momentum", "--momentum", 0, "--weight-decay", 0, "--clip-grad", clip]
        arguments += ["--batch-size", 512]
        args, precision, training = prepared(*arguments)
        before = [p.detach().clone() for p in training.model.parameters()]
        one_epoch(args, precision, training)
        steps = [(p - q).detach().flatten() for p, q in zip(training.model.parameters(), before)]
        norms.append(torch.cat(steps).norm().item())
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_a_skipped_step_restores_running_statistics():
    """SepViT has none, but other timm networks do."""
    images = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    args, precision, training = prepared("--model-ema", model=images)
    before = {name: value.clone() for name, value in images.state_dict().items()}
    with pytest.raises(UserError, match="loss or gradients were non-finite"):
        one_epoch(args, precision, training, criterion=lambda images, outputs, targets: outputs.sum() * torch.inf)
    assert training.bad_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in images.state_dict().items())
    training.end_epoch()
    one_epoch(args, precision, training)
    assert not torch.equal(images[0].running_mean, before["0.running_mean"])


def test_distillation_losses():
    torch.manual_seed(0)
    images, student, targets = torch.randn(4, 6), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    teacher = torch.nn.Linear(6, 3)
    with torch.no_grad():
        theirs = teacher(images)
    base = F.cross_entropy(student, targets)
    hard = F.cross_entropy(student, theirs.argmax(1))
    p, q = (theirs / 2).softmax(1), (student / 2).softmax(1)
    soft = (p * (p.log() - q.log())).sum() * 2**2 / student.numel()
    for kind, expected in (("none", base), ("hard", 0.7 * base + 0.3 * hard), ("soft", 0.7 * base + 0.3 * soft)):
        criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), teacher, kind, alpha=0.3, tau=2.0)
        torch.testing.assert_close(criterion(images, student, targets), expected)


def test_compile_flag_compiles():
    _, _, training = prepared("--compile")
    assert training.model._compiled_call_impl is not None
    assert prepared()[2].model._compiled_call_impl is None


def test_window_tokens_have_no_weight_decay():
    _, _, training = prepared()
    names = {id(p): name for name, p in training.model.named_parameters()}
    spared = [names[id(p)] for g in training.optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]]
    assert "blocks.0.0.win_tokens" in spared


def test_resume_restores_the_training_state(tmp_path):
    args, precision, training = prepared("--model-ema", "--epochs", 5)
    one_epoch(args, precision, training)
    training.best_accuracy, training.epoch, training.epoch_step = 55.5, 3, 0
    args, _, resumed = prepared("--model-ema", "--epochs", 5)
    resume.restore(resumed, resume.Source("c.pth", False, training.checkpoint() | dict(args=vars(args))), vars(args))
    assert (resumed.epoch, resumed.best_accuracy, resumed.global_step) == (3, 55.5, 1)
    for mine, theirs in ((resumed.model, training.model), (resumed.ema.module, training.ema.module)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))
    ours, others = (t.optimizer.state_dict()["state"] for t in (resumed, training))
    assert all(torch.equal(ours[i]["exp_avg"], others[i]["exp_avg"]) for i in others)


def test_resume_keeps_the_optimiser_fused(tmp_path):
    """A checkpoint written with unfused AdamW leaves this run's AdamW fused."""
    args, precision, training = prepared("--amp", "float16", "--epochs", 2)
    one_epoch(args, precision, training)
    state = training.optimizer.state_dict()
    model = prepared()[2].model
    fused = torch.optim.AdamW([{"params": g["params"]} for g in create_groups(model)], fused=True)
    load_optimizer(fused, model, state)
    assert all(group["fused"] for group in fused.param_groups)


def test_resume_uses_the_settings_of_the_new_command(tmp_path):
    """Also within the first epoch, before the schedule's first step. The moments come from the checkpoint."""
    args, precision, training = prepared("--lr", "1e-3", "--warmup-epochs", 0)
    one_epoch(args, precision, training)
    checkpoint = training.checkpoint() | dict(args=vars(args))
    args, _, resumed = prepared("--lr", "1e-4", "--warmup-epochs", 0, "--weight-decay", 0.3, "--opt-betas", 0.8, 0.9)
    resume.restore(resumed, resume.Source("c.pth", False, checkpoint), vars(args))
    groups, others = resumed.optimizer.param_groups, training.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([group["lr"] / 10 for group in others])
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}
    ours, theirs = (each.optimizer.state_dict()["state"] for each in (resumed, training))
    assert all(torch.equal(ours[i]["exp_avg"], theirs[i]["exp_avg"]) for i in theirs)


@pytest.mark.parametrize(
    ("files", "source", "taken"),
    [
        ([], None, False),
        (["checkpoint_best.pth"], None, True),
        (["log.txt"], None, True),
        (["checkpoint.pth"], ("--resume", "elsewhere/checkpoint.pth"), True),
        (["checkpoint.pth"], ("--resume", "checkpoint.pth"), False),  # as the published code resumes
        (["checkpoint.pth", "weights.pth"], ("--resume", "weights.pth"), True),
        (["checkpoint.pth", "checkpoint-00000004.pth"], ("--resume", "checkpoint-00000004.pth"), False),
        (["checkpoint-00000004.pth", "checkpoint-00000008.pth"], ("--resume", "checkpoint-00000004.pth"), True),
        (["checkpoint-00000004.pth", "checkpoint-00000008.pth"], ("--auto-resume", "checkpoint-00000004.pth"), False),
    ],
)
def test_which_output_folders_are_taken(files, source, taken, tmp_path):
    for name in files:
        (tmp_path / name).write_text('{"epoch": 0, "train_loss": 1.0}\n')
    if source:
        steps = {"steps": int(source[1][11:19])} if "checkpoint-" in source[1] else {}
        source = resume.Source(str(tmp_path / source[1]), source[0] == "--auto-resume", steps)
    resumes = source is not None and source.is_automatic
    assert output.is_taken(tmp_path, StepNames(2), source, resumes) == taken


def write_to_full_disk(*_) -> None:
    Path("/dev/full").write_text("x")


def test_failed_tensorboard_writes_are_retried(tmp_path, monkeypatch, capsys):
    """A failed write loses none of the values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    scalars = output.Scalars(tmp_path)
    for epoch in range(5):
        with monkeypatch.context() as full_disk:
            if epoch == 2:
                full_disk.setattr(SummaryWriter, "flush", write_to_full_disk)
            scalars.add({"test_acc1": float(epoch)}, epoch)
    assert "TensorBoard's files" in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("test/acc1")] == [0, 1, 2, 3, 4]


def test_failed_log_writes_are_retried(tmp_path, monkeypatch, capsys):
    log = output.Log(tmp_path / "log.txt", lambda entry: False)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(output.os, "fsync", write_to_full_disk)
        log.add({"epoch": 0})
        assert log.failure == "No space left on device"
    assert "could not be written (No space left on device); training continues" in capsys.readouterr().out
    log.flush()
    assert log.failure is None
    assert output.read_log(tmp_path / "log.txt") == [{"epoch": 0}]


def test_published_training_state_is_resumed(tmp_path):
    """The published code decays window tokens, so its optimiser numbers the parameters differently. Its settings are a
    Namespace."""
    model = timm.create_model("SepViT_Lite", img_size=32, num_classes=3)
    named = list(model.named_parameters())
    groups = [[(n, p) for n, p in named if p.ndim <= 1], [(n, p) for n, p in named if p.ndim > 1]]
    optimizer = torch.optim.AdamW([{"params": [p for _, p in group]} for group in groups], lr=1e-3)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for group in groups for n, p in group}
    published = dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        lr_scheduler={"t_initial": 300},
        epoch=4,
        scaler={
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 0,
        },
        args=argparse.Namespace(model="SepViT_Lite", lr=5e-4),
    )
    path = tmp_path / "published.pth"
    torch.save(published, path)
    args, _, training = prepared("--model", "SepViT_Lite", "--epochs", 300)
    source = resume.Source(str(path), False, read_checkpoint(str(path), f"--resume {path}"))
    resume.restore(training, source, vars(args))
    assert training.epoch == 5
    for name, p in training.model.named_parameters():
        assert torch.equal(training.optimizer.state[p]["exp_avg"], moments[name]), name


def test_tensorboard_and_matplotlib_may_be_missing(tmp_path, monkeypatch, capsys):
    for name in ("torch.utils.tensorboard", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    output.Scalars(tmp_path).add({"train_loss": 1.0}, 0)
    output.plot_curves(tmp_path / "log.txt", tmp_path / "curves.png")
    assert capsys.readouterr().out.count("WARNING: no ") == 2
    assert not any(tmp_path.iterdir())
