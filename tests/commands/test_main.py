"""The main.py command: training, resuming, evaluation, finetuning and distillation, in one process and in several."""

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import PLAIN, ROOT, SMALL, SMALLEST, command, differences, free_port, link_digits, read_log, succeed
from PIL import Image
from safetensors.torch import save_file

import main
from sepvit_lib.run.state import Precision


def run(*arguments: object) -> int:
    """Run main.py in this process."""
    return main.run(list(map(str, arguments)))


def settings(data: Path, folder: Path, flags: str = "") -> list:
    """Arguments of a run of the smallest network in `run`, a folder of the given one."""
    return [*SMALLEST, "--data-path", data, "--output_dir", folder / "run", "--device", "cpu", *flags.split()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a run."""
    return torch.load(folder / "run/checkpoint.pth", weights_only=True)["model"]


def accuracy(printed: str) -> list[str]:
    return re.findall(r"top-1 (\d+\.\d+) %, top-5 (\d+\.\d+) %", printed)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A short real training run: SepViT_Lite on all digits at 64 × 64 pixels, two epochs, with averaged weights."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = (
        "--model SepViT_Lite --input-size 64 --epochs 2 --batch-size 32 --lr 0.032 --warmup-epochs 0 --drop-path 0 "
        "--mixup 0 --cutmix 0 --smoothing 0 --aa= --reprob 0 --color-jitter 0 --scale 0.8 1 --hflip 0 --num_workers 1 "
        "--model-ema --model-ema-warmup"
    )
    printed = succeed("--data-path", digits, "--output_dir", folder, *flags.split())
    return folder, printed


# ------------------------------------------------------------------------------------------------------------- training


def test_training_learns(trained):
    folder, _ = trained
    log = read_log(folder)
    assert [entry["epoch"] for entry in log] == [0, 1]
    assert log[-1]["train_loss"] < 0.6 * log[0]["train_loss"]
    assert log[-1]["test_acc1"] > max(70, log[0]["test_acc1"])
    model = timm.create_model("SepViT_Lite", img_size=64, num_classes=10)
    assert log[0]["n_parameters"] == sum(p.numel() for p in model.parameters())
    assert {"train_lr", "test_loss", "test_acc5", "test_ema_acc1"} <= log[0].keys()


def test_output_folder(trained):
    folder, printed = trained
    assert {"checkpoint.pth", "checkpoint_best.pth", "log.txt", "curves.png"} <= {p.name for p in folder.iterdir()}
    assert list(folder.glob("events.out.tfevents.*"))
    assert not list(folder.glob("*.tmp"))
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert checkpoint.keys() >= {"model", "optimizer", "lr_scheduler", "scaler", "args"}
    assert (checkpoint["epoch"], checkpoint["classes"]) == (1, list("0123456789"))
    best = torch.load(folder / "checkpoint_best.pth", weights_only=True)
    accuracies = [entry["test_acc1"] for entry in read_log(folder)]
    assert best["epoch"] == int(np.argmax(accuracies))
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # curves, not a blank image
    assert "\r" not in printed  # plain lines unless on a terminal
    assert re.search(r"epoch 1 \[20/44\] loss \d\.\d+, lr 0\.002000, images/s [\d.]+, left \d", printed)
    assert "run left" in printed


def test_profile_traces_the_steps_asked_for(few_digits, tmp_path):
    assert run(*settings(few_digits, tmp_path, "--batch-size 8 --profile 2")) == 0
    names = [event["name"] for event in json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 2
    assert "aten::convolution" in names


def test_tensorboard_scalars_match_the_log(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "train/lr", "test/acc1", "test/loss"} <= set(events.Tags()["scalars"])
    values = [event.value for event in events.Scalars("test/acc1")]
    assert values == pytest.approx([entry["test_acc1"] for entry in read_log(folder)])


def evaluation(folder: Path, data: Path, flags: str, *others: object) -> list:
    """Arguments that evaluate the checkpoint of `trained`."""
    common = "--eval --model SepViT_Lite --input-size 64 --num_workers 0"
    return [*common.split(), "--resume", folder / "checkpoint.pth", "--data-path", data, *flags.split(), *others]


def test_eval_reproduces_the_accuracy_of_training(trained, digits, tmp_path, capsys):
    folder, _ = trained
    assert run(*evaluation(folder, digits, "--batch-size 16 --num_workers 1 --output_dir", tmp_path)) == 0
    printed, last = capsys.readouterr().out, read_log(folder)[-1]
    assert json.loads((tmp_path / "eval.json").read_text())["test_acc1"] == last["test_acc1"]
    assert f"validation: top-1 {last['test_acc1']:.3f} %" in printed
    assert f"averaged weights: top-1 {last['test_ema_acc1']:.3f} %" in printed


def test_eval_and_throughput_need_only_validation_images(trained, some_digits, tmp_path, capsys):
    (tmp_path / "val").symlink_to(some_digits / "val")
    assert run(*evaluation(trained[0], tmp_path, "")) == 0
    assert "100 images" in capsys.readouterr().out
    assert run(*SMALLEST, "--data-path", tmp_path, "--throughput", "--batch-size", 2) == 0
    printed = capsys.readouterr().out
    assert re.search(r"batch size 3 \(.*1.5 × --batch-size 2\), float32: \d+\.\d images/s", printed)
    assert "throughput, warm-up [20/50]" in printed


def test_dist_eval_is_exact_on_any_number_of_processes(trained, some_digits):
    settings = evaluation(trained[0], some_digits, "--batch-size 8 --dist-eval")
    outputs = [succeed(*settings, processes=n) for n in (0, 2, 3)]
    assert accuracy(outputs[0]) == accuracy(outputs[1]) == accuracy(outputs[2])
    assert all(printed.count("100 images") == 2 for printed in outputs)  # once each for trained and averaged weights


def test_eval_at_another_input_size_resamples_window_tokens(trained, some_digits, capsys):
    assert run(*evaluation(trained[0], some_digits, "--input-size 96")) == 0
    printed = capsys.readouterr().out
    assert "different image size or form: resampled" in printed
    assert "blocks.0.0.win_tokens" in printed
    assert "100 images" in printed


# ---------------------------------------------------------------------------------------------- settings of the command

VARIATIONS = {
    "recipe": "",
    "plain loss": "--mixup 0 --cutmix 0 --smoothing 0",
    "smoothed loss": "--mixup 0 --cutmix 0",
    "elementwise cutmix": "--mixup-mode elem --cutmix-minmax 0.2 0.5 --mixup-prob 0.9",
    "repeated augmentation, averaged weights": "--repeated-aug --model-ema --input-size 32",
    "bfloat16, channels last, accumulation": "--amp bfloat16 --channels-last --accum-steps 2",
    "float16, activation checkpointing": "--amp float16 --grad-checkpointing --no-pin-mem",
    "sgd, step schedule, dropout": "--opt sgd --sched step --drop 0.1 --clip-grad 0",
    "noisy plateau": "--sched plateau --lr-noise 0.1 0.9 --warmup-epochs 0 --opt-betas 0.9 0.95",
    "augmentation": "--aa augmix-m3-w2 --remode const --recount 2 --train-interpolation random --color-jitter 0.2",
    "workers": "--num_workers 2",
    "averaged weights in CPU memory": "--model-ema --model-ema-force-cpu --input-size 32",
}
# half precision is slow on CPUs
NAMES = [pytest.param(name, marks=pytest.mark.slow if name.startswith("float16") else ()) for name in VARIATIONS]


@pytest.mark.parametrize("name", NAMES)
def test_variations_train(name, few_digits, some_digits, tmp_path):
    data = some_digits if "repeated" in name else few_digits  # repeated augmentation needs 256 images
    assert run(*settings(data, tmp_path, VARIATIONS[name])) == 0
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


FAULTS = """
import resource, torch
from sepvit_lib.common.devices import keep_freed_memory

def faults():
    for number in range(40):
        if number == 30:  # the first aligned blocks are a little too large for what was freed
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
keep_freed_memory()
print(faults() / returned)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns large blocks to the system")
def test_freed_memory_is_kept():
    """The system does not clear pages again for a tensor as large as one that was freed."""
    result = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, check=True, capture_output=True)
    assert float(result.stdout) < 1 / 4


@pytest.mark.slow
def test_compiled_code(few_digits, tmp_path):
    """Training, validation, validation of the averaged weights, and throughput."""
    succeed(*settings(few_digits, tmp_path, "--compile --model-ema"))
    assert np.isfinite(read_log(tmp_path / "run")[0]["test_ema_loss"])
    assert "batch size 3" in succeed(*settings(few_digits, tmp_path, "--compile --throughput --batch-size 2"))


def test_parts_of_a_batch_equal_the_whole(few_digits, tmp_path):
    """Two batches of 8, accumulated or on two processes, give the same weights as one batch of 16, up to rounding."""
    flags = " ".join([*PLAIN, "--input-size 40"])  # crops are random up to 32
    parts = f"{flags} --batch-size 8"
    assert run(*settings(few_digits, tmp_path / "whole", flags)) == 0
    assert run(*settings(few_digits, tmp_path / "accumulated", f"{parts} --accum-steps 2")) == 0
    succeed(*settings(few_digits, tmp_path / "shared", parts), processes=2)
    whole = weights(tmp_path / "whole")
    for form in ("accumulated", "shared"):
        found = weights(tmp_path / form)
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


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
            is_own = Path(caller).is_relative_to(ROOT / "sepvit_lib") or Path(caller).parent == ROOT
            if is_own and Path(caller).name not in CPU_ONLY:  # not the optimiser's step counters, which are on the CPU
                reads.append((Path(caller).name, name))
            return original(tensor, *arguments, **kwargs)

        return read

    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__format__"):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name), name))
    counts = []
    for batch_size in (16, 8):
        reads.clear()
        flags = f"--batch-size {batch_size} --print-freq 1000 --model-ema"
        assert run(*settings(few_digits, tmp_path / str(batch_size), flags)) == 0
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0, reads


# -------------------------------------------------------------------------------------------------- resume and finetune


def test_resume_continues_training(few_digits, tmp_path, capsys):
    common = settings(few_digits, tmp_path, "--model-ema --warmup-epochs 1")
    assert run(*common, "--epochs", 2) == 0
    path = tmp_path / "run/checkpoint.pth"
    first = torch.load(path, weights_only=True)
    capsys.readouterr()
    assert run(*common, "--epochs", 4, "--resume", path, "--lr", 1e-3) == 0
    assert "resuming at epoch 2" in capsys.readouterr().out
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
    assert run(*common, "--resume", path, "--eval") == 0


def test_checkpoints_are_contiguous_and_resume_bit_for_bit(few_digits, tmp_path):
    """Convolutions train channels last. safetensors takes contiguous weights only."""
    flags = "--model-ema --checkpoint-every 1 --keep-checkpoints 9 --auto-resume --warmup-epochs 0"
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(*settings(few_digits, whole, flags)) == 0
    checkpoint = torch.load(whole / "run/checkpoint.pth", weights_only=True)
    for name in ("model", "model_ema"):
        save_file(checkpoint[name], tmp_path / "weights.safetensors")
    moments = checkpoint["optimizer"]["state"].values()
    assert all(value.is_contiguous() for state in moments for value in state.values())
    (resumed / "run").mkdir(parents=True)
    shutil.copy(whole / "run/checkpoint-00000001.pth", resumed / "run")
    assert run(*settings(few_digits, resumed, flags)) == 0
    again = torch.load(resumed / "run/checkpoint.pth", weights_only=True)
    for part in ("model", "model_ema", "optimizer"):
        assert differences(checkpoint[part], again[part]) == []


@pytest.mark.parametrize("prefix", ["module.", "model.", "model._orig_mod."])
def test_bare_weights_and_prefixes(prefix, few_digits, tmp_path):
    model = timm.create_model(SMALLEST[1], img_size=32, num_classes=3)
    path = tmp_path / "bare.pth"
    bare = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": bare, "global_step": 3} if "model" in prefix else bare, path)
    assert run(*settings(few_digits, tmp_path, "--eval"), "--resume", path) == 0
    assert run(*settings(few_digits, tmp_path), "--resume", path) == 0


def test_finetune_reports_what_it_loaded(trained, few_digits, tmp_path, capsys):
    flags = "--model SepViT_Lite --input-size 96 --lr 0 --finetune"
    assert run(*settings(few_digits, tmp_path, flags), trained[0] / "checkpoint.pth") == 0
    printed = capsys.readouterr().out
    assert re.search(r"loaded \d+ of \d+ entries", printed)
    assert "resampled" in printed
    assert "3 of 3 classes of the classifier are carried over by name" in printed
    source = torch.load(trained[0] / "checkpoint.pth", weights_only=True)["model_ema"]
    tuned = weights(tmp_path)
    assert torch.allclose(tuned["blocks.2.0.mlp.fc1.weight"], source["blocks.2.0.mlp.fc1.weight"], atol=1e-3)
    assert tuned["head.weight"].shape == (3, 256)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_trains(kind, trained, digits, tmp_path):
    images = link_digits(digits, tmp_path / "images", "0123456789", train=4, val=2)
    flags = f"--input-size 64 --batch-size 32 --distillation-type {kind} --distillation-tau 2"
    teacher = ["--teacher-model", "SepViT_Lite", "--teacher-path", trained[0] / "checkpoint.pth"]
    assert run(*settings(images, tmp_path, flags), *teacher) == 0
    assert np.isfinite(read_log(tmp_path / "run")[0]["train_loss"])


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_train(accumulate, few_digits, tmp_path):
    flags = f"--batch-size 8 --dist-eval --accum-steps {accumulate} --model-ema"
    printed = succeed(*settings(few_digits, tmp_path, flags), processes=2)
    assert printed.count("trained in") == 1  # only the main process prints
    assert printed.count("epoch 0 validation: top-1") == 1
    assert len(read_log(tmp_path / "run")) == 1
    assert torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["steps"] == 3 // accumulate


def launched(launcher: str, arguments: list, folder: Path) -> subprocess.CompletedProcess:
    """Run main.py by one of torch's launchers."""
    return subprocess.run(
        [sys.executable, "-m", *launcher.split(), ROOT / "main.py", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("flag", ["--use_env", pytest.param("", marks=pytest.mark.slow)])
def test_torch_distributed_launch(flag, few_digits, tmp_path):
    """The paper's command, with two processes. Without --use_env, each process gets a --local-rank argument."""
    launcher = f"torch.distributed.launch --nproc_per_node=2 {flag} --master_port={free_port()}"
    flags = "--dist-eval --drop-path 0.2 --device cpu --batch-size 8"
    result = launched(launcher, [*SMALL, "--data-path", few_digits, *flags.split()], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "SepViT_Lite/checkpoint.pth").exists()  # the output folder is the model's name by default


def side_by_side(task: Callable[[int], Any]) -> None:
    """Run two ranks. Both have to succeed, and the first one alone prints."""
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(task, range(2)))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert "trained in" in results[0].stdout
    assert "epoch" not in results[1].stdout


@pytest.mark.slow
def test_torchrun_on_two_nodes(few_digits, tmp_path):
    common = f"torch.distributed.run --nnodes=2 --nproc_per_node=1 --master_addr=127.0.0.1 --master_port={free_port()}"
    arguments = settings(few_digits, tmp_path, "--model SepViT_Lite --batch-size 8")
    side_by_side(lambda rank: launched(f"{common} --node_rank={rank}", arguments, tmp_path))


@pytest.mark.parametrize("address", ["env://", "tcp://127.0.0.1:{port}"])
def test_slurm_variables(address, few_digits, tmp_path):
    port = free_port()
    arguments = [*settings(few_digits, tmp_path, "--batch-size 8"), "--dist_url", address.format(port=port)]
    common = dict(SLURM_NTASKS="2", MASTER_PORT=str(port), SLURM_JOB_NODELIST="127.0.0.1", OMP_NUM_THREADS="1")
    side_by_side(lambda i: command(*arguments, environment={**common, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}))


# ------------------------------------------------------------------------------------------------------------- terminal


def test_progress_bar_on_a_terminal(few_digits, tmp_path):
    """A bar with loss, learning rate, speed and time left."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))  # rows and columns
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/fixtures/small_main.py", *map(str, settings(few_digits, tmp_path))],
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
