"""The demo's tools and names of devices: what is printed, and users' mistakes, each with one line and exit status 2."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refusal

from benchmarks import input_pipeline
from sepvit_lib.common.devices import check_device
from sepvit_lib.common.errors import UserError
from tools import make_demo_data, show_demo

RUN = {"settings": {"model": "SepViT_Lite", "epochs": 2}, "versions": {"torch": "2.0"}}


def lines(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def epoch(number: int, top1: float | None) -> dict:
    """Part of an epoch's entry of log.txt."""
    return {"train_loss": 0.5, "test_acc1": top1, "test_acc5": 100.0, "epoch": number}


EVALUATION = lines({"test_loss": 0.25, "test_acc1": 96.25, "test_acc5": 100.0})
LOG = lines(RUN, epoch(0, 40.5), epoch(1, 96.25), {"not_printed": ["epoch 1 [89/89] loss 0.5"]})

# Run folders, most of them faulty: content of log.txt and eval.json, None for a missing file.
RUNS = {
    "good": (LOG, EVALUATION),
    "unevaluated": (LOG, None),
    "untrained": (None, EVALUATION),
    "unfinished": (lines(RUN), EVALUATION),
    "text": ("epoch 1: loss 0.5\n", EVALUATION),
    "list": ("[96.25]\n", EVALUATION),
    "nothing": (lines(epoch(0, None)), EVALUATION),
    "cut": (LOG, EVALUATION[:20]),
    "worse": (lines(RUN, epoch(0, 97.0)), EVALUATION),
}
NO_LOG = "log.txt has no top-1"
MISTAKES = {
    "no run named": (show_demo, "", "--run"),
    "missing run": (show_demo, "--run {root}/nope", f"--run {{root}}/nope: {NO_LOG}"),
    "file for a run": (show_demo, "--run {root}/a_file", NO_LOG),
    "no log": (show_demo, "--run {root}/untrained", "main.py --output_dir"),
    "no evaluation": (show_demo, "--run {root}/unevaluated", "main.py --eval --output_dir"),
    "unfinished run": (show_demo, "--run {root}/unfinished", NO_LOG),
    "text for a log": (show_demo, "--run {root}/text", NO_LOG),
    "list for a log": (show_demo, "--run {root}/list", NO_LOG),
    "no figure": (show_demo, "--run {root}/nothing", NO_LOG),
    "evaluation cut short": (show_demo, "--run {root}/cut", "eval.json has no top-1"),
    "top-1 above 100": (show_demo, "--run {root}/good --least 101", "--least"),
    "no folder named": (make_demo_data, "", "--out"),
    "unwritable folder": (make_demo_data, "--out {root}/a_file", "--out {root}/a_file: cannot be written"),
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
                (root / run / name).write_text(content)
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, root, capsys):
    tool, arguments, expected = MISTAKES[mistake]
    name = tool.__name__.rpartition(".")[2]
    assert expected.format(root=root) in refusal(tool.run, name, arguments.format(root=root).split(), capsys)


def test_a_missing_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    line = refusal(make_demo_data.run, "make_demo_data", ["--out", tmp_path / "demo"], capsys)
    assert line.endswith("needs sklearn: pip install '.[demo]'")
    assert not (tmp_path / "demo").exists()


def test_missing_photographs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage", None)
    line = refusal(input_pipeline.run, "input_pipeline", ["--synthetic", "90x70"], capsys)
    assert line == "input_pipeline.py: --synthetic: needs skimage: pip install '.[demo]'"


@pytest.mark.parametrize("script", ["segmentation/train.py", "detection/predict.py"])
def test_missing_libraries_of_segmentation_and_detection(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend((ROOT / script).parent)
    for name in ("mmengine", "mmcv"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "_repository", raising=False)
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    line = capsys.readouterr().err
    assert line.startswith(f"{Path(script).name}: needs mmengine, mmcv")
    assert line.endswith(": pip install '.[mm]'\n")


def test_show_demo(root, capsys):
    assert show_demo.run(["--run", str(root / "good")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("96.25 %") == 2
    assert str(root / "good/curves.png") in printed


@pytest.mark.parametrize(("arguments", "expected"), [("worse", "differ"), ("good --least 96.5", "below the 96.5 %")])
def test_demo_that_failed(arguments, expected, root):
    with pytest.raises(SystemExit, match=expected):  # with status 1
        show_demo.run(["--run", *f"{root}/{arguments}".split()])


def test_interrupted(tmp_path, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(make_demo_data, "compose_scenes", interrupt)
    assert make_demo_data.run(["--out", str(tmp_path)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_devices(monkeypatch):
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
