"""The tools as commands: what they print, and users' mistakes, each with one line and exit status 2."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, succeed

from sepvit_lib.training.devices import check_device
from sepvit_lib.training.errors import UserError
from tools import benchmark, benchmark_checkpoint, gpu_check, gpu_rows, make_demo_data

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
    "no GPU": ("benchmark", ["--device", "cuda"], ["--device cuda: not available; choose"]),
    "fewer GPUs": ("benchmark", ["--device", "cuda:99"], ["--device cuda:99: not available; choose"]),
    "unknown device": ("benchmark", ["--device", "foo"], ["--device foo: unknown; choose cuda, mps or cpu"]),
    "no batch": ("benchmark", ["--batch-size", "0"], ["--batch-size", "0", "at least 1"]),
    "text for a batch": ("benchmark", ["--batch-size", "many"], ["--batch-size", "many"]),
    "no pixels": ("benchmark", ["--input-size", "0"], ["--input-size", "0", "at least 1"]),
    "unknown model": ("benchmark", ["--model", "SepViT_Huge"], ["--model", "SepViT_Huge", "SepViT_Tiny"]),
    "unknown setting": ("benchmark", ["--sped"], ["--sped"]),
    "no times": ("benchmark_checkpoint", ["--times", "0"], ["--times", "0", "at least 1"]),
    "no GPU for checkpoints": ("benchmark_checkpoint", ["--device", "cuda"], ["--device cuda: not available; choose"]),
    "missing disk": ("benchmark_checkpoint", ["--out", "{root}/nope"], ["--out {root}/nope: no such folder; name one"]),
    "file for a disk": ("benchmark_checkpoint", ["--out", "{root}/a_file"], ["--out {root}/a_file: no such folder"]),
    "unwritable disk": ("benchmark_checkpoint", ["--out", "/proc"], ["--out /proc: cannot be written", "another"]),
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
    "no GPU to check": ("gpu_check", ["--out", "{root}/gpu"], ["--device cuda: not available; choose cpu"]),
    "unknown row": (
        "gpu_check",
        ["--only", "spede"],
        ["--only spede: no row's name starts so; the rows are", "speed-"],
    ),
    "unwritable record": (
        "gpu_check",
        ["--device", "cpu", "--quick", "--only", "outputs", "--out", "{root}/a_file"],
        ["--out {root}/a_file: cannot be written"],
    ),
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


# --------------------------------------------------------------------------------------------------------- benchmarks


def test_benchmark_of_checkpoints(tmp_path):
    arguments = ["--model", "SepViT_Lite", "--times", "1", "--out", tmp_path]
    *saved, last = succeed(*arguments, script="tools/benchmark_checkpoint.py").splitlines()
    assert [line.partition(" ")[0] for line in saved] == ["saved", "saved"]
    assert re.match(r"SepViT_Lite, \d+ MB: training stops for [\d.]+ s if .+, for [\d.]+ s if .+; ratio [\d.]+$", last)
    assert os.listdir(tmp_path) == []


def test_disk_that_fills_up(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    assert benchmark_checkpoint.run(["--model", "SepViT_Lite", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmark_checkpoint.py: --out {tmp_path}: cannot be written (No space left on device)")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- GPU check


@pytest.mark.slow
def test_gpu_check_in_its_quick_form_has_every_row(tmp_path):
    succeed("--device", "cpu", "--quick", "--out", tmp_path, script="tools/gpu_check.py", environment=WITHOUT_GPU)
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    rows = {row["name"]: row for row in record["rows"]}
    assert set(rows) == {row.name for row in gpu_check.chosen_rows([])}
    passed = {name for name, row in rows.items() if row["status"] == "passed"}
    assert passed == {row.name for row in gpu_check.chosen_rows([]) if row.quick}
    assert all(row["status"] in ("passed", "skipped") for row in rows.values())
    (page,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert all(f"\n| {name} | {row['status']} |" in page for name, row in rows.items())
    assert "| SepViT_Lite |" in page  # in the table of speeds


def test_rows_that_fail_do_not_stop_others(tmp_path):
    def fail(setup, figures):
        figures["measured"] = 1.5
        os.write(1, b"what the row prints\n")
        raise gpu_rows.CheckError("too large")

    def crash(setup, figures):
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(setup, figures):
        time.sleep(600)

    def leave(setup, figures):
        sys.exit(3)

    def measure(setup, figures):
        figures["measured"] = 2.5

    checks = dict(fail=fail, crash=crash, hang=hang, leave=leave, measure=measure)
    rows = [gpu_rows.Row(name, check, limit=2, alone=name == "measure") for name, check in checks.items()]
    rows.append(gpu_rows.Row("gpu", measure, gpu=True))
    setup = gpu_rows.Setup(torch.device("cpu"), False, tmp_path / "digits", tmp_path)
    reported = []
    results = gpu_check.run_rows(rows, setup, 2, time.monotonic() + 600, reported.append)
    found = {result.name: result for result in results}
    assert reported == results
    assert {name: result.status for name, result in found.items()} == dict(
        fail="failed", crash="crashed", hang="timed out", leave="failed", measure="passed", gpu="skipped"
    )
    assert results[-2].name == "measure"  # it waits for all before it
    assert found["fail"].figures == {"measured": 1.5}
    assert found["fail"].message == "CheckError: too large"
    assert "what the row prints" in found["fail"].log
    assert found["measure"].figures == {"measured": 2.5}
    late = gpu_check.run_rows(rows[-2:-1], setup, 2, time.monotonic() - 1, reported.append)
    assert [(result.status, result.message) for result in late] == [("skipped", "no time left")]


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


@pytest.mark.slow
def test_interrupted_while_a_checkpoint_is_written(tmp_path):
    arguments = ["--model", "SepViT_Lite", "--times", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools/benchmark_checkpoint.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the shell ignores it for background jobs
    )
    try:
        assert process.stdout.readline().startswith("saved ")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == []
