"""Checkpoints and run folders of version 0.1.0 still work.

`fixtures/run.tar.xz` was written by the last commit before `training/` was added. It holds a run of
`fixtures/small_main.py` on `few_digits` that SIGTERM stopped in the second of three epochs (`run`), and the same run
completed without interruption (`undisturbed`).
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command

from sepvit_lib.run.output import epoch_entries, read_log

FIXTURES = ROOT / "tests/fixtures"
SETTINGS = [
    *"--model sepvit_fixture --input-size 64 --batch-size 8 --epochs 3 --model-ema --model-ema-warmup".split(),
    *"--warmup-epochs 1 --lr 5e-3 --device cpu --checkpoint-every 2 --print-freq 1 --keep-checkpoints 1".split(),
    *"--num_workers 0 --data-path few".split(),
]


@pytest.fixture
def old(tmp_path) -> Path:
    """The unpacked fixture."""
    with tarfile.open(FIXTURES / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run(old: Path, few_digits: Path, flags: str):
    """Run small_main.py in the fixture's folder with one thread, as when the fixture was written."""
    (old / "few").symlink_to(few_digits)
    script = FIXTURES / "small_main.py"
    result = command(*SETTINGS, *flags.split(), script=script, cwd=old, environment=dict(OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stderr
    return result


def epochs(folder: Path) -> list[dict]:
    """The lines of log.txt that sum up an epoch."""
    return epoch_entries(read_log(folder / "log.txt"))


def test_an_old_run_resumes(old, few_digits):
    result = run(old, few_digits, "--output_dir run --auto-resume")
    assert "checkpoint run/checkpoint-00000009.pth: resuming at epoch 1, step 3" in result.stdout
    name = "checkpoint-00000018.pth"
    resumed, undisturbed = (torch.load(old / folder / name, weights_only=True) for folder in ("run", "undisturbed"))
    # What the old run did not keep.
    assert resumed.keys() == undisturbed.keys() | {"classes", "preprocessing", "reading", "best_value", "best_epoch"}
    assert "from now on, values are scaled" in result.stdout
    for weights in ("model", "model_ema"):
        for entry, value in undisturbed[weights].items():
            torch.testing.assert_close(resumed[weights][entry], value, rtol=1e-3, atol=1e-5)
    before, after = (epochs(old / folder) for folder in ("undisturbed", "run"))
    assert [entry["epoch"] for entry in after] == [0, 1, 2]
    assert all(new.keys() >= old_one.keys() for new, old_one in zip(after, before))


LAST = "undisturbed/checkpoint-00000018.pth"


def test_an_old_checkpoint_is_evaluated(old, few_digits):
    run(old, few_digits, f"--eval --resume {LAST} --output_dir figures")
    last = read_log(old / "undisturbed/log.txt")[-1]
    figures = json.loads((old / "figures/eval.json").read_text())
    assert {name: figures[name] for name in last.keys() & figures} == {
        name: pytest.approx(last[name], rel=1e-4) for name in last if name.startswith("test_")
    }
    assert {"test_acc1", "test_ema_acc1"} <= figures.keys()


def test_an_old_checkpoint_is_finetuned_at_another_size(old, few_digits):
    result = run(old, few_digits, f"--finetune {LAST} --input-size 96 --epochs 1 --output_dir tuned")
    assert "averaged weights, loaded " in result.stdout
    assert "different image size or form: resampled " in result.stdout


def test_an_old_run_is_repeated_from_its_args(old, few_digits):
    run(old, few_digits, "--config run/args.yaml --output_dir again --no-auto-resume --epochs 1")
    assert [entry["epoch"] for entry in epochs(old / "again")] == [0]


def test_an_old_run_keeps_its_orientation(old, few_digits):
    """Whatever the recipe says now."""
    (old / "recipe.yaml").write_text("orientation: exif\n")
    run(old, few_digits, "--output_dir run --auto-resume --config recipe.yaml")
    kept = torch.load(old / "run/checkpoint-00000018.pth", weights_only=True)
    assert kept["args"]["orientation"] == kept["reading"]["orientation"] == "stored"
