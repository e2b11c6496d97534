"""The tools as commands: what they print, and users' mistakes, each with one line and exit status 2."""

import json

import pytest
import torch
from conftest import command, succeed

from benchmarks import benchmark
from sepvit_lib.training.devices import check_device
from sepvit_lib.training.errors import UserError
from tools import make_demo_data

WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
RUN = {"settings": {"model": "SepViT_Lite", "epochs": 2}, "versions": {"torch": "2.0"}}


def epoch(number: int, top1: float) -> dict:
    """Make an epoch's entry of log.txt."""
    return {
        "train_loss": 0.5,
        "train_lr": 1e-3,
        "test_loss": 0.25,
        "test_acc1": top1,
        "test_acc5": 100.0,
        "epoch": number,
        "n_parameters": 3_600_000,
        "bad_steps": 0,
        "unreadable_images": 0,
    }


def lines(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


EVALUATION = lines({"test_loss": 0.25, "test_acc1": 96.25, "test_acc5": 100.0})
LOG = lines(RUN, epoch(0, 40.5), epoch(1, 96.25), {"not_printed": ["epoch 1 [89/89] loss 0.5"]})

# Run folders, most of them faulty: content of log.txt and eval.json, None for a missing file.
RUNS = {
    "good": (LOG, EVALUATION),
    "unevaluated": (LOG, None),
    "untrained": (None, EVALUATION),
    "unfinished": (lines(RUN), EVALUATION),
    "empty": ("", EVALUATION),
    "text": ("epoch 1: loss 0.5\n", EVALUATION),
    "list": ("[96.25]\n", EVALUATION),
    "bytes": (b"\xff\xfe\n", EVALUATION),
    "nothing": (lines({**epoch(0, 40.5), "test_acc1": None}), EVALUATION),
    "cut": (LOG, EVALUATION[:20]),
    "worse": (lines(RUN, epoch(0, 97.0)), EVALUATION),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write the run folders, and a file."""
    root = tmp_path_factory.mktemp("tools")
    (root / "a_file").write_text("")
    for run, contents in RUNS.items():
        (root / run).mkdir()
        for name, content in zip(("log.txt", "eval.json"), contents):
            if content is not None:
                (root / run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


MISTAKES = {
    "no run named": ("show_demo", [], ["--run"]),
    "missing run": ("show_demo", ["--run", "{root}/nope"], ["--run {root}/nope: log.txt", "No such file", "train"]),
    "file for a run": ("show_demo", ["--run", "{root}/a_file"], ["--run {root}/a_file: log.txt", "Not a directory"]),
    "no log": ("show_demo", ["--run", "{root}/untrained"], ["{root}/untrained: log.txt", "main.py --output_dir"]),
    "no evaluation": ("show_demo", ["--run", "{root}/unevaluated"], ["eval.json", "main.py --eval --output_dir"]),
    "unfinished run": ("show_demo", ["--run", "{root}/unfinished"], ["log.txt has no top-1"]),
    "empty log": ("show_demo", ["--run", "{root}/empty"], ["log.txt has no top-1"]),
    "text for a log": ("show_demo", ["--run", "{root}/text"], ["log.txt has no top-1"]),
    "list for a log": ("show_demo", ["--run", "{root}/list"], ["log.txt has no top-1"]),
    "bytes for a log": ("show_demo", ["--run", "{root}/bytes"], ["log.txt has no top-1"]),
    "no figure": ("show_demo", ["--run", "{root}/nothing"], ["log.txt has no top-1"]),
    "evaluation cut short": ("show_demo", ["--run", "{root}/cut"], ["eval.json has no top-1"]),
    "top-1 above 100": ("show_demo", ["--run", "{root}/good", "--least", "101"], ["--least", "101", "at most 100"]),
    "no folder named": ("make_demo_data", [], ["--out"]),
    "unwritable folder": ("make_demo_data", ["--out", "{root}/a_file"], ["--out {root}/a_file: cannot be written"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, root):
    tool, arguments, expected = MISTAKES[mistake]
    arguments = [argument.format(root=root) for argument in arguments]
    result = command(*arguments, script=f"tools/{tool}.py", environment=WITHOUT_GPU)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"{tool}.py: ")
    assert result.stderr.count("\n") == 1
    for text in expected:
        assert text.format(root=root) in result.stderr
    assert result.stdout == ""


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for device in ("cuda", "cuda:0", "cuda:1", "mps", "mps:0", "cpu", "cpu:0"):
        check_device(device)
    for device in ("cuda:2", "mps:1", "cpu:1"):
        with pytest.raises(UserError, match=f"`device` {device}: not available"):
            check_device(device)
    for device in ("", "cuda:", "cuda:-1", "cuda:01", "cuda 0", "gpu"):
        with pytest.raises(UserError, match=f"`device` {device}: unknown"):
            check_device(device)


# -------------------------------------------------------------------------------------------------------------- demos


def test_show_demo(root):
    printed = succeed("--run", root / "good", script="tools/show_demo.py")
    assert printed.splitlines() == [
        "top-1 at the end of training:          96.25 %",
        "top-1 of the checkpoint, by --eval:    96.25 %",
        f"loss, accuracy and learning rate:      {root / 'good/curves.png'}",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--run", "{root}/worse"], "the two figures differ"),
        (["--run", "{root}/good", "--least", "96.5"], "below the 96.5 % that the demo has to reach"),
    ],
    ids=["differ", "below"],
)
def test_demo_that_failed(arguments, expected, root):
    result = command(*(argument.format(root=root) for argument in arguments), script="tools/show_demo.py")
    assert result.returncode == 1
    assert result.stderr == expected + "\n"
    assert result.stdout.count("\n") == 3


# ------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize(
    ("tool", "step", "arguments"),
    [
        (benchmark, "measure_table", ["--device", "cpu", "--out", "{folder}"]),
        (make_demo_data, "compose_scenes", ["--out", "{folder}"]),
    ],
    ids=["benchmark", "make_demo_data"],
)
def test_interrupted(tool, step, arguments, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, step, interrupt)
    assert tool.run([argument.format(folder=tmp_path) for argument in arguments]) == 130
    assert "Traceback" not in capsys.readouterr().err
