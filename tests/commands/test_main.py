"""The main.py command: training, resuming, evaluation, finetuning and distillation, in one process and in several."""

import argparse
import fcntl
import json
import os
import platform
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import (
    GOLDEN,
    PLAIN,
    ROOT,
    SMALL,
    SMALLEST,
    command,
    differences,
    free_port,
    link_digits,
    read_log,
    succeed,
)
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import main
from engine import DistillationLoss, LoopSettings, train_one_epoch
from sepvit_lib.training import output, resume
from sepvit_lib.training.checkpoints import load_optimizer, read_checkpoint
from sepvit_lib.training.devices import available_cores
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.monitor import DelayedFlags, MonitorSettings, StepMonitor
from sepvit_lib.training.naming import StepNames
from sepvit_lib.training.state import Precision
from sepvit_lib.training.watchdog import Preemption, Watchdog

CHECKPOINT_KEYS = {"model", "optimizer", "lr_scheduler", "epoch", "scaler", "args"}


def accuracy(printed: str) -> list[str]:
    return re.findall(r"top-1 (\d+\.\d+) %, top-5 (\d+\.\d+) %", printed)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A short real training run: SepViT_Lite on all digits at 64 × 64 pixels, two epochs, with averaged weights."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    printed = succeed(
        *"--model SepViT_Lite --data-path".split(),
        digits,
        "--output_dir",
        folder,
        *"--input-size 64 --epochs 2 --batch-size 32 --lr 0.032 --warmup-epochs 0 --drop-path 0 --mixup 0".split(),
        *"--cutmix 0 --smoothing 0 --aa= --reprob 0 --color-jitter 0 --scale 0.8 1 --hflip 0 --num_workers 1".split(),
        *"--model-ema --model-ema-warmup".split(),
    )
    return folder, printed


# ------------------------------------------------------------------------------------------------------------- training


def test_training_learns(trained):
    folder, _ = trained
    log = read_log(folder)
    assert [entry["epoch"] for entry in log] == [0, 1]
    assert log[-1]["train_loss"] < 0.6 * log[0]["train_loss"]
    assert log[-1]["test_acc1"] > 70
    assert log[-1]["test_acc1"] > log[0]["test_acc1"]
    assert log[0]["n_parameters"] == sum(
        p.numel() for p in timm.create_model("SepViT_Lite", img_size=64, num_classes=10).parameters()
    )
    assert {"train_lr", "test_loss", "test_acc5", "test_ema_acc1"} <= log[0].keys()


def test_output_folder(trained):
    folder, printed = trained
    assert {"checkpoint.pth", "checkpoint_best.pth", "log.txt", "curves.png"} <= {p.name for p in folder.iterdir()}
    assert list(folder.glob("events.out.tfevents.*"))
    assert not list(folder.glob("*.tmp"))
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert checkpoint.keys() >= CHECKPOINT_KEYS
    assert checkpoint["epoch"] == 1
    assert checkpoint["classes"] == list("0123456789")
    best = torch.load(folder / "checkpoint_best.pth", weights_only=True)
    accuracies = [entry["test_acc1"] for entry in read_log(folder)]
    assert best["epoch"] == int(np.argmax(accuracies))
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # curves, not a blank image
    assert "\r" not in printed  # plain lines unless on a terminal
    assert re.search(r"epoch 1 \[20/44\] loss \d\.\d+, lr 0\.002000, images/s [\d.]+, left \d", printed)
    assert "run left" in printed


def test_tensorboard_scalars_match_the_log(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "train/lr", "test/acc1", "test/loss"} <= set(events.Tags()["scalars"])
    values = [event.value for event in events.Scalars("test/acc1")]
    assert values == pytest.approx([entry["test_acc1"] for entry in read_log(folder)])


def test_eval_reproduces_the_accuracy_of_training(trained, digits, tmp_path):
    folder, _ = trained
    printed = succeed(
        "--eval",
        "--resume",
        folder / "checkpoint.pth",
        *"--model SepViT_Lite --input-size 64 --batch-size 16 --data-path".split(),
        digits,
        *"--num_workers 1 --output_dir".split(),
        tmp_path,
    )
    last = read_log(folder)[-1]
    assert json.loads((tmp_path / "eval.json").read_text())["test_acc1"] == last["test_acc1"]
    assert f"validation: top-1 {last['test_acc1']:.3f} %" in printed
    assert f"averaged weights: top-1 {last['test_ema_acc1']:.3f} %" in printed


def test_eval_and_throughput_need_only_validation_images(trained, some_digits, tmp_path):
    (tmp_path / "val").symlink_to(some_digits / "val")
    settings = ["--model", "SepViT_Lite", "--input-size", 64, "--data-path", tmp_path, "--num_workers", 0]
    printed = succeed("--eval", "--resume", trained[0] / "checkpoint.pth", *settings)
    assert "100 images" in printed
    printed = succeed("--throughput", "--batch-size", 2, *settings)
    assert re.search(
        r"batch size 3 \(validation batches are 1.5 × --batch-size 2\), float32: \d+\.\d images/s", printed
    )
    assert "throughput, warm-up [20/50]" in printed


def test_dist_eval_is_exact_on_any_number_of_processes(trained, some_digits):
    settings = [
        "--eval",
        "--resume",
        trained[0] / "checkpoint.pth",
        *"--model SepViT_Lite --input-size 64 --batch-size 8 --data-path".split(),
        some_digits,
        *"--num_workers 0 --dist-eval".split(),
    ]
    outputs = [succeed(*settings, processes=n) for n in (0, 2, 3)]
    assert accuracy(outputs[0]) == accuracy(outputs[1]) == accuracy(outputs[2])
    assert all(printed.count("100 images") == 2 for printed in outputs)  # once each for trained and averaged weights


def test_eval_at_another_input_size_resamples_window_tokens(trained, some_digits):
    printed = succeed(
        "--eval",
        "--resume",
        trained[0] / "checkpoint.pth",
        *"--model SepViT_Lite --input-size 96 --data-path".split(),
        some_digits,
        "--num_workers",
        1,
    )
    assert "of another image size or form: resampled" in printed
    assert "blocks.0.0.win_tokens" in printed
    assert "100 images" in printed


def test_defaults_are_the_reference_recipe():
    args = vars(main.build_parser().parse_args([]))
    expected = dict(
        batch_size=64,
        epochs=300,
        seed=0,
        num_workers=min(10, available_cores()),
        pin_mem=True,
        output_dir="",
        resume="",
        start_epoch=0,
        eval=False,
        dist_eval=False,
        throughput=False,
        finetune="",
        world_size=1,
        dist_url="env://",
        model="SepViT_Tiny",
        input_size=224,
        drop=0.0,
        drop_path=0.2,
        opt="adamw",
        opt_eps=1e-8,
        opt_betas=None,
        clip_grad=5,
        momentum=0.9,
        weight_decay=0.05,
        sched="cosine",
        lr=5e-4,
        lr_noise=None,
        lr_noise_pct=0.67,
        lr_noise_std=1.0,
        warmup_lr=1e-6,
        min_lr=1e-5,
        decay_epochs=30,
        warmup_epochs=5,
        cooldown_epochs=10,
        patience_epochs=10,
        decay_rate=0.1,
        color_jitter=0.4,
        aa="rand-m9-mstd0.5-inc1",
        smoothing=0.1,
        train_interpolation="bicubic",
        repeated_aug=False,
        reprob=0.25,
        remode="pixel",
        recount=1,
        resplit=False,
        mixup=0.8,
        cutmix=1.0,
        cutmix_minmax=None,
        mixup_prob=1.0,
        mixup_switch_prob=0.5,
        mixup_mode="batch",
        data_path="imagenet",
        data_set="IMNET",
        inat_category="name",
    )
    assert {name: args[name] for name in expected} == expected


def test_throughput_is_measured_in_float32_as_published():
    """Unless --amp names a format. Training on GPUs defaults to mixed precision."""
    for flags, dtype in (([], None), (["--amp", "bfloat16"], torch.bfloat16)):
        args = main.build_parser().parse_args(["--throughput", *flags])
        assert main.build_precision(args, torch.device("cuda")).dtype == dtype


def test_help_lists_every_setting():
    printed = succeed("--help")
    assert all(flag in printed for flag in ("--repeated-aug", "--no-repeated-aug", "--pin-mem", "--opt-betas"))


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


# ---------------------------------------------------------------------------------------------- settings of the command

VARIATIONS = {
    "recipe": [],
    "plain loss": ["--mixup", 0, "--cutmix", 0, "--smoothing", 0],
    "smoothed loss": ["--mixup", 0, "--cutmix", 0],
    "elementwise cutmix": ["--mixup-mode", "elem", "--cutmix-minmax", 0.2, 0.5, "--mixup-prob", 0.9],
    "repeated augmentation, averaged weights": ["--repeated-aug", "--model-ema", "--input-size", 32],
    "bfloat16, channels last, accumulation": ["--amp", "bfloat16", "--channels-last", "--accum-steps", 2],
    "float16, activation checkpointing": ["--amp", "float16", "--grad-checkpointing", "--no-pin-mem"],
    "sgd, step schedule, dropout": ["--opt", "sgd", "--sched", "step", "--drop", 0.1, "--clip-grad", 0],
    "noisy plateau": ["--sched", "plateau", "--lr-noise", 0.1, 0.9, "--warmup-epochs", 0, "--opt-betas", 0.9, 0.95],
    "augmentation": [
        *"--aa augmix-m3-w2 --remode const --recount 2 --train-interpolation random --resplit --color-jitter".split(),
        *"0.2".split(),
    ],
    "workers": ["--num_workers", 2],
    "averaged weights in CPU memory": ["--model-ema", "--model-ema-force-cpu", "--input-size", 32],
}


# Half precision is slow on CPUs.
SLOW_VARIATIONS = ["float16, activation checkpointing"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_VARIATIONS else ()) for name in VARIATIONS]
)
def test_variations_train(name, few_digits, some_digits, tmp_path):
    data = some_digits if "repeated" in name else few_digits  # repeated augmentation needs 256 images
    arguments = [*SMALLEST, "--data-path", data, "--output_dir", tmp_path / "run", "--device", "cpu", *VARIATIONS[name]]
    assert main.run([str(argument) for argument in arguments]) == 0
    assert np.isfinite(read_log(tmp_path / "run")[-1]["train_loss"])
    checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())
    group = checkpoint["optimizer"]["param_groups"][1]
    if "repeated" in name:
        assert not torch.equal(checkpoint["model_ema"]["head.weight"], checkpoint["model"]["head.weight"])
        assert checkpoint["steps"] == 300 // 256 * 256 // 16
    if name.startswith("float16"):
        assert checkpoint["scaler"]["scale"] > 0
    if "accumulation" in name:
        assert checkpoint["steps"] == 1  # of three batches, a step takes two and the last is dropped
    if name == "noisy plateau":
        assert group["betas"] == (0.9, 0.95)
    if name.startswith("sgd"):
        assert group["momentum"] == 0.9
        assert "betas" not in group


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


FAULTS = """
import resource, sys, torch
from sepvit_lib.training.devices import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for number in range(40):
    if number == 30:  # the first aligned blocks are a little too large for what was freed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns large blocks to the system")
def test_freed_memory_is_kept():
    """The system does not clear pages again for a tensor as large as one that was freed."""
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", FAULTS, name], cwd=ROOT, check=True, capture_output=True).stdout)
        for name in ("kept", "returned")
    )
    assert kept < returned / 4


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
    with pytest.raises(UserError, match="loss or gradients were not finite in any step"):
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


@pytest.mark.slow
def test_compiled_training(few_digits, tmp_path):
    """Training, validation and validation of the averaged weights with compiled code."""
    succeed(*SMALLEST, "--data-path", few_digits, "--output_dir", tmp_path / "run", "--compile", "--model-ema")
    assert np.isfinite(read_log(tmp_path / "run")[0]["test_ema_loss"])


@pytest.mark.slow
def test_compiled_throughput(few_digits):
    printed = succeed(*SMALLEST, "--data-path", few_digits, "--compile", "--throughput", "--batch-size", 2)
    assert "batch size 3" in printed


def test_accumulation_equals_a_larger_batch(few_digits, tmp_path):
    """Two accumulated batches of 8 give the same weights as one batch of 16, up to rounding."""
    weights = []
    for name, batch in (("whole", ["--batch-size", "16"]), ("parts", ["--batch-size", "8", "--accum-steps", "2"])):
        arguments = [*SMALLEST, "--data-path", few_digits, "--output_dir", tmp_path / name, "--device", "cpu", *PLAIN]
        assert main.run([*map(str, arguments), *batch]) == 0
        weights.append(torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


# These modules read only CPU tensors, which never blocks: indices, flags of the previous step, loaded samples.
CPU_ONLY = ("samplers.py", "monitor.py", "samples.py")


def test_training_steps_do_not_wait_for_the_device(few_digits, tmp_path, monkeypatch):
    """An epoch of 6 steps reads as many values from the device as an epoch of 3 steps, so none per step.

    AdamW is fused, as on GPUs. Indices and the copies of the previous step's flags are on the CPU.
    """
    cuda = Precision(torch.device("cuda"), torch.bfloat16)
    assert main.flag_delay(main.build_parser().parse_args([]), cuda) == 1
    monkeypatch.setattr(main, "create_optimizer_v2", partial(main.create_optimizer_v2, fused=True))
    reads = []

    def watched(original, name):
        def read(tensor, *arguments, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            own = Path(caller).parent in (ROOT, ROOT / "sepvit_lib/training") and Path(caller).name not in CPU_ONLY
            if own:  # not the optimiser's step counters, which are on the CPU
                reads.append((Path(caller).name, name))
            return original(tensor, *arguments, **kwargs)

        return read

    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__format__"):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name), name))
    counts = []
    for batch_size in (16, 8):
        reads.clear()
        arguments = [
            *SMALLEST,
            "--data-path",
            few_digits,
            "--output_dir",
            tmp_path / str(batch_size),
            *"--device cpu --batch-size".split(),
            batch_size,
            *"--print-freq 1000 --model-ema".split(),
        ]
        assert main.run([str(argument) for argument in arguments]) == 0
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0, reads


# -------------------------------------------------------------------------------------------------- resume and finetune


def test_resume_continues_training(few_digits, tmp_path):
    settings = [
        *SMALLEST,
        "--data-path",
        few_digits,
        "--output_dir",
        tmp_path / "run",
        *"--model-ema --warmup-epochs 1".split(),
    ]
    succeed(*settings, "--epochs", 2)
    path = tmp_path / "run/checkpoint.pth"
    first = torch.load(path, weights_only=True)
    printed = succeed(*settings, "--epochs", 4, "--resume", path, "--lr", 1e-3)
    assert "resuming at epoch 2" in printed
    log = read_log(tmp_path / "run")
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3]
    base = 1e-3 * 16 / 512  # the second command's rates: cosine over 4 epochs, stepped after epochs 1 and 2
    rates = [1e-5 + (base - 1e-5) * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in (1, 2)]
    assert [entry["train_lr"] for entry in log[2:]] == pytest.approx(rates)
    second = torch.load(path, weights_only=True)
    assert second["epoch"] == 3
    assert second["steps"] == 2 * first["steps"]
    assert second["optimizer"]["state"][0]["step"] == 2 * first["optimizer"]["state"][0]["step"]
    assert second["best_accuracy"] == max(entry["test_acc1"] for entry in log)
    succeed(*settings, "--epochs", 4, "--resume", path, "--start_epoch", 0, "--eval")


def test_checkpoints_are_contiguous_and_resume_bit_for_bit(few_digits, tmp_path):
    """Convolutions train channels last. safetensors takes contiguous weights only."""
    settings = [
        *SMALLEST,
        "--data-path",
        few_digits,
        *"--device cpu --model-ema --checkpoint-every 1 --keep-checkpoints 9 --auto-resume --warmup-epochs 0".split(),
        *"--output_dir".split(),
    ]
    assert main.run(list(map(str, [*settings, tmp_path / "whole"]))) == 0
    checkpoint = torch.load(tmp_path / "whole/checkpoint.pth", weights_only=True)
    for name in ("model", "model_ema"):
        save_file(checkpoint[name], tmp_path / "weights.safetensors")
    moments = checkpoint["optimizer"]["state"].values()
    assert all(value.is_contiguous() for state in moments for value in state.values())
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-00000001.pth", tmp_path / "resumed")
    assert main.run(list(map(str, [*settings, tmp_path / "resumed"]))) == 0
    resumed = torch.load(tmp_path / "resumed/checkpoint.pth", weights_only=True)
    for part in ("model", "model_ema", "optimizer"):
        assert differences(checkpoint[part], resumed[part]) == []


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

    scalars = output.Scalars(tmp_path)
    for epoch in range(5):
        with monkeypatch.context() as full_disk:
            if epoch == 2:
                full_disk.setattr(output.SummaryWriter, "flush", write_to_full_disk)
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


def create_groups(model):
    return main.create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05).param_groups


def test_published_training_state_is_resumed(few_digits, tmp_path):
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
    printed = succeed(
        *SMALL, "--data-path", few_digits, "--epochs", 6, "--resume", path, "--output_dir", tmp_path / "run"
    )
    assert "resuming at epoch 5" in printed


@pytest.mark.parametrize("prefix", ["module.", "model.", "model._orig_mod."])
def test_bare_weights_and_prefixes(prefix, few_digits, tmp_path):
    model = timm.create_model("SepViT_Lite", img_size=32, num_classes=3)
    path = tmp_path / "bare.pth"
    weights = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "global_step": 3} if "model" in prefix else weights, path)
    settings = [*map(str, SMALL), "--data-path", str(few_digits), "--device", "cpu", "--resume", str(path)]
    assert main.run([*settings, "--eval"]) == 0
    assert main.run([*settings, "--output_dir", str(tmp_path / "run")]) == 0


def test_finetune_reports_what_it_loaded(trained, few_digits, tmp_path):
    printed = succeed(
        *SMALL,
        "--data-path",
        few_digits,
        "--output_dir",
        tmp_path / "run",
        *"--input-size 96 --finetune".split(),
        trained[0] / "checkpoint.pth",
        "--lr",
        0,
    )
    assert re.search(r"loaded \d+ of \d+ entries", printed)
    assert "resampled" in printed
    assert "3 of 3 classes of the classifier are carried over by name" in printed
    source = torch.load(trained[0] / "checkpoint.pth", weights_only=True)["model_ema"]
    tuned = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    assert torch.allclose(tuned["blocks.2.0.mlp.fc1.weight"], source["blocks.2.0.mlp.fc1.weight"], atol=1e-3)
    assert tuned["head.weight"].shape == (3, 256)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_trains(kind, trained, digits, tmp_path):
    images = link_digits(digits, tmp_path / "images", "0123456789", train=4, val=2)
    arguments = [
        *SMALLEST,
        "--data-path",
        images,
        "--output_dir",
        tmp_path / "run",
        *"--input-size 64 --batch-size 32 --distillation-type".split(),
        kind,
        *"--teacher-model SepViT_Lite --device cpu --teacher-path".split(),
        trained[0] / "checkpoint.pth",
        "--distillation-tau",
        2,
    ]
    assert main.run([str(argument) for argument in arguments]) == 0
    assert np.isfinite(read_log(tmp_path / "run")[0]["train_loss"])


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_train(accumulate, few_digits, tmp_path):
    printed = succeed(
        *SMALLEST,
        *"--batch-size 8 --data-path".split(),
        few_digits,
        "--output_dir",
        tmp_path / "run",
        "--dist-eval",
        "--accum-steps",
        accumulate,
        *"--model-ema --device cpu".split(),
        processes=2,
    )
    assert printed.count("trained in") == 1  # only the main process prints
    assert printed.count("epoch 0 validation: top-1") == 1
    assert len(read_log(tmp_path / "run")) == 1
    assert torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["steps"] == 3 // accumulate


@pytest.mark.parametrize("flags", [["--use_env"], pytest.param([], marks=pytest.mark.slow)])
def test_torch_distributed_launch(flags, few_digits, tmp_path):
    """The paper's command, with two processes. Without --use_env, each process gets a --local-rank argument."""
    result = subprocess.run(
        [
            sys.executable,
            *"-m torch.distributed.launch --nproc_per_node=2".split(),
            *flags,
            f"--master_port={free_port()}",
            ROOT / "main.py",
            *map(str, SMALL),
            "--data-path",
            few_digits,
            *"--dist-eval --drop-path 0.2 --device cpu --batch-size 8".split(),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "SepViT_Lite/checkpoint.pth").exists()  # the output folder is the model's name by default


def test_torchrun_on_two_nodes(few_digits, tmp_path):
    port = free_port()

    def node(rank: int):
        launcher = [
            sys.executable,
            *"-m torch.distributed.run --nnodes=2".split(),
            f"--node_rank={rank}",
            "--nproc_per_node=1",
            "--master_addr=127.0.0.1",
            f"--master_port={port}",
        ]
        settings = [*SMALL, "--data-path", few_digits, "--output_dir", tmp_path / "run", "--device", "cpu"]
        return subprocess.run(
            [*launcher, ROOT / "main.py", *map(str, settings), "--batch-size", "8"],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(node, range(2)))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert "trained in" in results[0].stdout
    assert "epoch" not in results[1].stdout


@pytest.mark.parametrize("address", ["env://", "tcp://127.0.0.1:{port}"])
def test_slurm_variables(address, few_digits, tmp_path):
    port = free_port()
    settings = [
        *SMALLEST,
        "--data-path",
        few_digits,
        "--output_dir",
        tmp_path / "run",
        *"--device cpu --batch-size 8".split(),
    ]

    def task(rank: int):
        environment = dict(
            SLURM_PROCID=str(rank),
            SLURM_NTASKS="2",
            SLURM_LOCALID=str(rank),
            MASTER_PORT=str(port),
            SLURM_JOB_NODELIST="127.0.0.1",
            OMP_NUM_THREADS="1",
        )
        return command(*settings, "--dist_url", address.format(port=port), environment=environment)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(task, range(2)))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert "trained in" in results[0].stdout
    assert results[1].stdout == ""


def test_two_processes_match_one_with_the_whole_batch(few_digits, tmp_path):
    """Two processes with half the batch each take the same steps as one process with the whole batch."""
    data = ["--data-path", few_digits, "--device", "cpu", "--input-size", 40]  # crops are random up to 32
    succeed(*SMALLEST, *PLAIN, *data, "--output_dir", tmp_path / "one")
    succeed(*SMALLEST, *PLAIN, *data, "--output_dir", tmp_path / "two", "--batch-size", 8, processes=2)
    one, two = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True)["model"] for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- terminal


def test_progress_bar_on_a_terminal(few_digits, tmp_path):
    """A bar with loss, learning rate, speed and time left."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))  # rows and columns
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "main.py",
            *map(str, SMALL),
            "--data-path",
            few_digits,
            "--output_dir",
            tmp_path / "run",
        ],
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(follower)
    output = b""
    try:
        while chunk := os.read(leader, 65536):
            output += chunk
    except OSError:  # the process has ended and closed the terminal
        pass
    assert process.wait() == 0
    text = output.decode()
    assert re.search(r"epoch 0 100%\|█+\| 3/3 \[\d+:\d+<\d+:\d+, loss \d\.\d+, lr 0\.\d+, images/s [\d.]+\]", text)
