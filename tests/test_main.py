"""main.py as users run it: training, resuming, evaluating, finetuning, distillation, on one process and on several."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import GOLDEN, ROOT, SMALL, command, read_log, succeed
from PIL import Image

import main
import utils

CHECKPOINT_KEYS = {"model", "optimizer", "lr_scheduler", "epoch", "scaler", "args"}


def accuracy(printed: str) -> str:
    return re.findall(r"top-1 (\d+\.\d+) %", printed)[-1]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A short real training: SepViT_Lite on all digits, 64 × 64 pixels, two epochs, with averaged weights."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    printed = succeed(
        "--model", "SepViT_Lite", "--data-path", digits, "--output_dir", folder, "--input-size", 64, "--epochs", 4,
        "--batch-size", 16, "--lr", 0.032, "--warmup-epochs", 0, "--drop-path", 0, "--mixup", 0, "--cutmix", 0,
        "--smoothing", 0, "--aa=", "--reprob", 0, "--color-jitter", 0, "--scale", 0.8, 1, "--hflip", 0,
        "--num_workers", 1, "--model-ema", "--model-ema-warmup",
    )  # fmt: skip
    return folder, printed


# ------------------------------------------------------------------------------------------------------------ training


def test_training_learns(trained):
    folder, _ = trained
    log = read_log(folder)
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3]
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
    assert checkpoint["epoch"] == 3
    best = torch.load(folder / "checkpoint_best.pth", weights_only=True)
    accuracies = [entry["test_acc1"] for entry in read_log(folder)]
    assert best["epoch"] == int(np.argmax(accuracies))
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # curves, not an empty sheet
    assert "\r" not in printed  # plain lines in a file
    assert re.search(r"epoch 1 \[20/89\] loss \d\.\d+, lr 0\.001000, images/s [\d.]+, left \d", printed)
    assert "run left" in printed


def test_tensorboard_has_the_figures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "train/lr", "test/acc1", "test/loss"} <= set(events.Tags()["scalars"])
    values = [event.value for event in events.Scalars("test/acc1")]
    assert values == pytest.approx([entry["test_acc1"] for entry in read_log(folder)])


def test_eval_gives_the_accuracy_of_training(trained, digits, tmp_path):
    folder, _ = trained
    printed = succeed(
        "--eval",
        "--resume",
        folder / "checkpoint.pth",
        "--model",
        "SepViT_Lite",
        "--input-size",
        64,
        "--batch-size",
        16,
        "--data-path",
        digits,
        "--num_workers",
        1,
        "--output_dir",
        tmp_path,
    )
    last = read_log(folder)[-1]
    assert json.loads((tmp_path / "eval.json").read_text())["test_acc1"] == last["test_acc1"]
    assert f"validation: top-1 {last['test_acc1']:.3f} %" in printed
    assert f"averaged weights: top-1 {last['test_ema_acc1']:.3f} %" in printed


def test_eval_and_throughput_need_only_validation_images(trained, digits, tmp_path):
    (tmp_path / "val").symlink_to(digits / "val")
    settings = ["--model", "SepViT_Lite", "--input-size", 64, "--data-path", tmp_path, "--num_workers", 0]
    printed = succeed("--eval", "--resume", trained[0] / "checkpoint.pth", *settings)
    assert "364 images" in printed
    printed = succeed("--throughput", "--batch-size", 2, *settings)
    assert re.search(r"batch size 3: \d+\.\d images/s", printed)


def test_dist_eval_is_exact_on_any_number_of_processes(trained, digits):
    settings = ["--eval", "--resume", trained[0] / "checkpoint.pth", "--model", "SepViT_Lite", "--input-size", 64,
                "--batch-size", 8, "--data-path", digits, "--num_workers", 0, "--dist-eval"]  # fmt: skip
    outputs = [succeed(*settings, processes=n) for n in (0, 2, 3)]
    assert len({accuracy(printed) for printed in outputs}) == 1
    assert all(printed.count("364 images") == 2 for printed in outputs)  # once for each kind of weights


def test_input_of_another_size_evaluates_with_resampled_tokens(trained, digits):
    printed = succeed("--eval", "--resume", trained[0] / "checkpoint.pth", "--model", "SepViT_Lite",
                      "--input-size", 96, "--data-path", digits, "--num_workers", 1)  # fmt: skip
    assert "another image size" in printed
    assert "blocks.0.0.win_tokens" in printed
    assert float(accuracy(printed)) > 40


def test_defaults_are_the_reference_recipe():
    args = vars(main.build_parser().parse_args([]))
    expected = dict(
        batch_size=64, epochs=300, seed=0, num_workers=10, pin_mem=True, output_dir="", resume="", start_epoch=0,
        eval=False, dist_eval=False, throughput=False, finetune="", world_size=1, dist_url="env://",
        model="SepViT_Tiny", input_size=224, drop=0.0, drop_path=0.2,
        opt="adamw", opt_eps=1e-8, opt_betas=None, clip_grad=5, momentum=0.9, weight_decay=0.05,
        sched="cosine", lr=5e-4, lr_noise=None, lr_noise_pct=0.67, lr_noise_std=1.0, warmup_lr=1e-6, min_lr=1e-5,
        decay_epochs=30, warmup_epochs=5, cooldown_epochs=10, patience_epochs=10, decay_rate=0.1,
        color_jitter=0.4, aa="rand-m9-mstd0.5-inc1", smoothing=0.1, train_interpolation="bicubic",
        repeated_aug=False, reprob=0.25, remode="pixel", recount=1, resplit=False,
        mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode="batch",
        data_path="imagenet", data_set="IMNET", inat_category="name",
    )  # fmt: skip
    assert {name: args[name] for name in expected} == expected


def test_help_lists_every_setting():
    printed = succeed("--help")
    assert all(flag in printed for flag in ("--repeated-aug", "--no-repeated-aug", "--pin-mem", "--opt-betas"))


def test_learning_rates_are_those_of_the_reference_run(monkeypatch):
    monkeypatch.setattr(utils, "get_world_size", lambda: 8)
    args = main.build_parser().parse_args(["--batch-size", "128", "--device", "cpu"])
    model = torch.nn.Linear(2, 2)
    training = main.build_training(args, model, main.build_precision(args, torch.device("cpu")))
    rates = []
    for epoch in range(300):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.lr_scheduler.step(epoch)
    golden = json.loads((GOLDEN / "lr_schedule_tiny_8gpu_300ep.json").read_text())["lr_per_epoch"]
    assert rates == pytest.approx(golden, rel=1e-9)


# ------------------------------------------------------------------------------------------------- settings as commands

VARIATIONS = {
    "recipe": [],
    "plain loss": ["--mixup", 0, "--cutmix", 0, "--smoothing", 0],
    "smoothed loss": ["--mixup", 0, "--cutmix", 0],
    "cutmix by element": ["--mixup-mode", "elem", "--cutmix-minmax", 0.2, 0.5, "--mixup-prob", 0.9],
    "repeated augmentation, averaged weights": ["--repeated-aug", "--model-ema", "--input-size", 32],
    "bfloat16, channels last, accumulation": ["--amp", "bfloat16", "--channels-last", "--accum-steps", 2],
    "float16, recomputed activations": ["--amp", "float16", "--grad-checkpointing", "--no-pin-mem"],
    "sgd, step schedule, dropout": ["--opt", "sgd", "--sched", "step", "--drop", 0.1, "--clip-grad", 0],
    "noisy plateau": ["--sched", "plateau", "--lr-noise", 0.1, 0.9, "--warmup-epochs", 0, "--opt-betas", 0.9, 0.95],
    "augmentation": ["--aa", "augmix-m3-w2", "--remode", "const", "--recount", 2, "--train-interpolation", "random",
                     "--resplit", "--color-jitter", 0.2],
    "workers": ["--num_workers", 2],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_train(name, few_digits, digits, tmp_path):
    data = digits if "repeated" in name else few_digits  # repeated augmentation counts in 256s
    arguments = [*SMALL, "--data-path", data, "--output_dir", tmp_path / "run", "--device", "cpu", *VARIATIONS[name]]
    assert main.run([str(argument) for argument in arguments]) == 0
    entry = read_log(tmp_path / "run")[-1]
    assert np.isfinite(entry["train_loss"])
    if "averaged" in name:
        checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
        assert not torch.equal(checkpoint["model_ema"]["head.weight"], checkpoint["model"]["head.weight"])
    if "float16," in name and "bfloat16" not in name:
        assert torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["scaler"]["scale"] > 0


@pytest.mark.slow
def test_compiled_training(few_digits, tmp_path):
    succeed(*SMALL, "--data-path", few_digits, "--output_dir", tmp_path / "run", "--compile", "--model-ema")
    assert np.isfinite(read_log(tmp_path / "run")[0]["test_ema_loss"])


def test_compiled_throughput(few_digits):
    printed = succeed(*SMALL, "--data-path", few_digits, "--compile", "--throughput", "--batch-size", 2)
    assert "batch size 3" in printed


def test_accumulation_equals_a_larger_batch(few_digits, tmp_path):
    """Two batches of 8 make the step of one batch of 16: the same weights, but for the order of additions."""
    plain = ["--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--drop-path", "0", "--aa=", "--reprob", "0",
             "--color-jitter", "0", "--hflip", "0", "--scale", "1", "1", "--opt", "sgd", "--lr", "1",
             "--sched", "constant", "--warmup-epochs", "0"]  # fmt: skip
    weights = []
    for name, batch in (("whole", ["--batch-size", "16"]), ("parts", ["--batch-size", "8", "--accum-steps", "2"])):
        arguments = [*SMALL, "--data-path", few_digits, "--output_dir", tmp_path / name, "--device", "cpu", *plain]
        assert main.run([*map(str, arguments), *batch]) == 0
        weights.append(torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_loop_does_not_wait_for_the_device(few_digits, tmp_path, monkeypatch):
    """This code reads as many numbers off the device in an epoch of 24 steps as in one of 3: none a step."""
    reads = []

    def watched(original, name):
        def read(tensor, *arguments, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if Path(caller).parent == ROOT:  # an optimiser's own step counters live on the CPU: no wait there
                reads.append((Path(caller).name, name))
            return original(tensor, *arguments, **kwargs)

        return read

    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__format__"):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name), name))
    counts = []
    for batch_size in (16, 2):
        reads.clear()
        arguments = [*SMALL, "--data-path", few_digits, "--output_dir", tmp_path / str(batch_size), "--device", "cpu",
                     "--batch-size", batch_size, "--print-freq", 1000, "--model-ema"]  # fmt: skip
        assert main.run([str(argument) for argument in arguments]) == 0
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0, reads


# -------------------------------------------------------------------------------------------------- resume and finetune


def test_resume_goes_on(few_digits, tmp_path):
    settings = [*SMALL, "--data-path", few_digits, "--output_dir", tmp_path / "run", "--model-ema"]
    succeed(*settings)
    first = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    printed = succeed(*settings, "--epochs", 2, "--resume", tmp_path / "run/checkpoint.pth")
    assert "going on with epoch 1" in printed
    assert [entry["epoch"] for entry in read_log(tmp_path / "run")] == [0, 1]
    second = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert second["epoch"] == 1
    assert second["steps"] == 2 * first["steps"]
    assert second["optimizer"]["state"][0]["step"] == 2 * first["optimizer"]["state"][0]["step"]


def test_resume_takes_the_published_format_and_bare_weights(few_digits, tmp_path):
    """Checkpoints of the published code: settings in a Namespace, no best accuracy; and data-parallel prefixes."""
    model = timm.create_model("SepViT_Lite", img_size=32, num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters())
    published = dict(
        model=model.state_dict(), optimizer=optimizer.state_dict(), lr_scheduler={}, epoch=4, scaler={},
        args=argparse.Namespace(model="SepViT_Lite", lr=5e-4),
    )  # fmt: skip
    torch.save(published, tmp_path / "published.pth")
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "bare.pth")
    settings = [*map(str, SMALL), "--data-path", str(few_digits), "--device", "cpu"]
    for name in ("published", "bare"):
        assert main.run([*settings, "--eval", "--resume", str(tmp_path / f"{name}.pth")]) == 0
    assert main.run([*settings, "--resume", str(tmp_path / "bare.pth"), "--output_dir", str(tmp_path / "run")]) == 0


def test_finetune_says_what_it_did(trained, few_digits, tmp_path):
    printed = succeed(*SMALL, "--data-path", few_digits, "--output_dir", tmp_path / "run", "--input-size", 96,
                      "--finetune", trained[0] / "checkpoint.pth", "--lr", 0)  # fmt: skip
    assert re.search(r"loaded \d+ of \d+ entries", printed)
    assert "resampled" in printed
    assert "another number of classes; left out and fresh 2: head.weight, head.bias" in printed
    source = torch.load(trained[0] / "checkpoint.pth", weights_only=True)["model_ema"]
    tuned = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    assert torch.allclose(tuned["blocks.2.0.mlp.fc1.weight"], source["blocks.2.0.mlp.fc1.weight"], atol=1e-3)
    assert tuned["head.weight"].shape == (3, 256)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(kind, trained, digits, tmp_path):
    arguments = [*SMALL, "--data-path", digits, "--output_dir", tmp_path / "run", "--input-size", 64,
                 "--batch-size", 64, "--distillation-type", kind, "--teacher-model", "SepViT_Lite", "--device", "cpu",
                 "--teacher-path", trained[0] / "checkpoint.pth", "--distillation-tau", 2]  # fmt: skip
    assert main.run([str(argument) for argument in arguments]) == 0
    assert np.isfinite(read_log(tmp_path / "run")[0]["train_loss"])


# ----------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_train(accumulate, few_digits, tmp_path):
    printed = succeed(
        *SMALL,
        "--batch-size",
        8,
        "--data-path",
        few_digits,
        "--output_dir",
        tmp_path / "run",
        "--dist-eval",
        "--accum-steps",
        accumulate,
        "--model-ema",
        "--device",
        "cpu",
        processes=2,
    )
    assert printed.count("trained in") == 1  # the main process alone prints
    assert printed.count("epoch 0 validation: top-1") == 1
    assert len(read_log(tmp_path / "run")) == 1
    assert torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["steps"] == 3 // accumulate


def test_torch_distributed_launch(few_digits, tmp_path):
    """The paper's command, on two processes."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", "--use_env", "--master_port=29611",
         ROOT / "main.py", *map(str, SMALL), "--data-path", few_digits, "--dist-eval", "--drop-path", "0.2",
         "--device", "cpu", "--batch-size", "8"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "SepViT_Lite/checkpoint.pth").exists()  # the output folder is the model's name by default


def test_two_nodes_by_torchruns_own_flags(few_digits, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def node(rank: int):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}",
                    "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]  # fmt: skip
        settings = [*SMALL, "--data-path", few_digits, "--output_dir", tmp_path / "run", "--device", "cpu"]
        return subprocess.run(
            [*launcher, ROOT / "main.py", *map(str, settings), "--batch-size", "8"],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(node, range(2)))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert "trained in" in results[0].stdout
    assert "epoch" not in results[1].stdout


def test_slurm_variables(few_digits, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [
        *SMALL,
        "--data-path",
        few_digits,
        "--output_dir",
        tmp_path / "run",
        "--device",
        "cpu",
        "--batch-size",
        8,
    ]

    def task(rank: int):
        environment = dict(SLURM_PROCID=str(rank), SLURM_NTASKS="2", SLURM_LOCALID=str(rank), MASTER_PORT=str(port),
                           SLURM_JOB_NODELIST="127.0.0.1", OMP_NUM_THREADS="1")  # fmt: skip
        return command(*settings, environment=environment)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(task, range(2)))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert "trained in" in results[0].stdout
    assert results[1].stdout == ""


def test_processes_keep_the_same_weights(few_digits, tmp_path):
    """Two processes with half the batch each take the step of one process with the whole batch."""
    plain = [
        "--mixup",
        0,
        "--cutmix",
        0,
        "--smoothing",
        0,
        "--drop-path",
        0,
        "--aa=",
        "--reprob",
        0,
        "--color-jitter",
        0,
        "--hflip",
        0,
        "--scale",
        1,
        1,
        "--opt",
        "sgd",
        "--lr",
        1,
        "--sched",
        "constant",
        "--warmup-epochs",
        0,
        "--data-path",
        few_digits,
        "--device",
        "cpu",
    ]
    succeed(*SMALL, *plain, "--output_dir", tmp_path / "one")
    succeed(*SMALL, *plain, "--output_dir", tmp_path / "two", "--batch-size", 8, processes=2)
    one, two = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True)["model"] for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ terminal


def test_progress_bar_on_a_terminal(few_digits, tmp_path):
    """Where the output is a terminal there is a bar, with loss, learning rate, speed and time left."""
    import pty

    leader, follower = pty.openpty()
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
        env={**os.environ, "COLUMNS": "150", "TERM": "xterm"},
    )
    os.close(follower)
    output = b""
    try:
        while chunk := os.read(leader, 65536):
            output += chunk
    except OSError:  # the terminal is gone with the process
        pass
    assert process.wait() == 0
    text = output.decode()
    assert re.search(r"epoch 0 100%\|█+\| 3/3 \[\d+:\d+<\d+:\d+, loss \d\.\d+, lr 0\.\d+, images/s [\d.]+\]", text)
