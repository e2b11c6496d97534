"""main.py on a GPU: bit-for-bit resuming, a loop that never waits, and no memory left."""

import itertools
import math
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, differences, refusal
from PIL import Image
from processes import Command, free_port

import main
from gpu.conftest import TEST_LIMIT
from sepvit_lib.run.output import epoch_entries, read_log

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four classes of noise in four colours, 24 training and 4 validation images each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 4)):
        for label, number in itertools.product(range(4), range(count)):
            pixels = rng.integers(0, 128, (40, 40, 3)) + 40 * np.array([label & 1, label & 2, 0])
            file = root / split / str(label) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


def side(device):
    """Side of the images that runs train on, in pixels."""
    return 64 if device.type == "cuda" else 32


# --------------------------------------------------------------------------------------------------------- resuming

# Everything random or stateful: shuffle, augmentation, mixup, drop path, averaged weights, a best checkpoint.
RESUMABLE = (
    "--model SepViT_Lite --batch-size 8 --epochs 2 --model-ema --model-ema-warmup --warmup-epochs 1 --lr 5e-3 "
    "--output_dir run --auto-resume --print-freq 5 --deterministic --checkpoint-every 3 --keep-checkpoints 20 "
    "--num_workers 2 --timeout 600"
).split()


class Run:
    """A run of main.py in a folder of its own, restarted with the same command."""

    def __init__(self, folder, arguments, distributed):
        self.folder, self.arguments, self.distributed = folder, list(map(str, arguments)), distributed
        self.printed = folder / "printed.txt"
        folder.mkdir()
        self.printed.touch()

    def start(self):
        environment = dict(os.environ)
        if self.distributed:  # as torchrun starts one process
            environment |= dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0")
            environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        return Command(ROOT / "main.py", self.arguments, self.folder, environment, self.printed, self.printed)

    def wait(self, process):
        try:
            return process.wait(TEST_LIMIT)
        finally:
            process.kill()

    def finish(self):
        assert self.wait(self.start()) == 0, self.printed.read_text()[-3000:]

    def interrupt(self, number):
        """Send a signal after the first checkpoint. Returns the exit status."""
        process, end = self.start(), time.monotonic() + TEST_LIMIT
        while "saved " not in self.printed.read_text() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        assert process.poll() is None, self.printed.read_text()[-3000:]
        process.send_signal(number)
        return self.wait(process)

    def results(self):
        """Everything in the newest checkpoint, and the epochs in log.txt."""
        checkpoint = torch.load(self.folder / "run" / "checkpoint.pth", weights_only=True, map_location="cpu")
        return dict(checkpoint=checkpoint, log=epoch_entries(read_log(self.folder / "run" / "log.txt")))


def compare_resumed(folder, images, device, flags, number, distributed=False):
    """Compare a run that a signal ended and that resumed with an undisturbed one, bit for bit."""
    arguments = [*RESUMABLE, "--data-path", images, "--device", device.type, "--input-size", side(device), *flags]
    whole, disturbed = (Run(folder / name, arguments, distributed) for name in ("whole", "disturbed"))
    whole.finish()
    assert disturbed.interrupt(number) == (75 if number == signal.SIGTERM else -number)
    disturbed.finish()
    assert differences(whole.results(), disturbed.results()) == []


@pytest.mark.parametrize(
    ("amp", "number", "distributed"),
    [("bfloat16", signal.SIGKILL, True), ("float16", signal.SIGTERM, False), ("off", signal.SIGKILL, False)],
    ids=["bfloat16-killed-nccl", "float16-stopped", "float32-killed"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(amp, number, distributed, device, images, tmp_path):
    flags = ["--amp", amp, *["--dist-eval"] * distributed]
    compare_resumed(tmp_path, images, device, flags, number, distributed)


def test_a_compiled_run_resumes_bit_for_bit(device, images, tmp_path):
    compare_resumed(tmp_path, images, device, ["--compile"], signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------ the loop

MIXING = "--mixup 0.8 --cutmix 1 --drop-path 0.1 --reprob 0.25 --smoothing 0.1".split()


def set_sync_debug_mode(device, mode):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
def test_no_step_waits_for_the_device(amp, device, images, tmp_path, monkeypatch):
    """Each call that would wait raises an error, but in the first steps and after the last one of an epoch."""
    first = 12 if amp == "float16" else 3  # steps that the search for float16's loss scale skips do wait
    guarded = []
    train = main.train_one_epoch

    def watched(training, loader, criterion, *rest):
        numbers = itertools.count(1)

        def observed(*batch):
            is_guarded = first <= next(numbers) < len(loader)
            set_sync_debug_mode(device, "error" if is_guarded else "default")
            guarded.append(is_guarded)
            return criterion(*batch)

        try:
            return train(training, loader, observed, *rest)
        finally:
            set_sync_debug_mode(device, "default")

    monkeypatch.setattr(main, "train_one_epoch", watched)
    arguments = "--model SepViT_Lite --batch-size 4 --epochs 2 --lr 5e-3 --warmup-epochs 0 --model-ema".split()
    arguments += ["--print-freq", "1000", "--num_workers", "2", "--amp", amp, *MIXING, "--data-path", str(images)]
    arguments += ["--input-size", str(side(device)), "--device", device.type, "--output_dir", str(tmp_path)]
    assert main.run(arguments) == 0
    assert sum(guarded) > 4
    entries = epoch_entries(read_log(tmp_path / "log.txt"))
    assert all(math.isfinite(entry["train_loss"]) for entry in entries)


def test_the_debug_mode_notices_waiting(device):
    if device.type != "cuda":
        pytest.skip("only CUDA has this mode")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device=device).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_memory_is_one_line(device, images, tmp_path, capsys):
    if device.type != "cuda":
        pytest.skip("only CUDA limits a process's memory")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    arguments = ["--data-path", images, "--output_dir", tmp_path, "--batch-size", "128", "--device", "cuda"]
    try:
        line = refusal(main.run, "main", [*arguments, "--num_workers", "2"], capsys)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in line
    assert "--batch-size" in line
