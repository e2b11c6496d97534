"""The demo's tools and names of devices: what is printed, and users' mistakes, each with one line and exit status 2."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refusal

from benchmarks import input_pipeline
from sepvit_lib.common.devices import check_device
from sepvit_lib.common.errors import UserError
from tools import make_demo_data

MISTAKES = {
    "no folder named": (make_demo_data, "", "--out"),
    "unwritable folder": (make_demo_data, "--out {root}/a_file", "--out {root}/a_file: cannot be written"),
}


@pytest.fixture
def root(tmp_path):
    """A folder with a file."""
    (tmp_path / "a_file").write_text("")
    return tmp_path


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
