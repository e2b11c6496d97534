"""`pip install .` and `pip install -e .`: using the network and the backbones in another project; requirements.

That project, the host, has modules of the same names as this repository's, first on its path.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from tools import check_setup

# Works offline: builds with this environment's setuptools, and the dependencies are already installed.
PIP = [sys.executable, *"-m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation".split()]
OWN = ("utils", "datasets", "samplers", "training", "dense", "inference")  # of the host
HOST = f"""
import site, sys
site.addsitedir(sys.argv[1])  # processes .pth files, as Python does for its own site-packages
import {", ".join(OWN)}
import pkgutil, timm, torch
import sepvit, sepvit_lib
assert sepvit.__file__.startswith(sys.argv[2]), sepvit.__file__
names = [module.name for module in pkgutil.walk_packages(sepvit_lib.__path__, "sepvit_lib.")]
assert len(names) > 30, names
for name in names:
    __import__(name)
assert timm.create_model("SepViT_Lite", num_classes=10, img_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 10)
from mmengine.registry import MODELS
backbone = MODELS.build(dict(type="SepViT_Lite"))
backbone.init_weights()
assert [tuple(y.shape[1:]) for y in backbone(torch.randn(1, 3, 64, 96))][0] == (32, 16, 24)
from mmcv.ops import batched_nms
_, kept = batched_nms(torch.tensor([[0.0, 0, 9, 9]] * 2), torch.rand(2), torch.tensor([0, 1]), dict(iou_threshold=0.5))
assert len(kept) == 2
assert {{sys.modules[name].OWNER for name in {OWN}}} == {{"host"}}
"""
HUGGING_FACE = """
import site, sys
site.addsitedir(sys.argv[1])
import timm, sepvit
timm.create_model("SepViT_Lite")
import datasets
assert hasattr(datasets, "load_dataset"), datasets.__file__
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the project, as building leaves files in its folder."""
    folder = tmp_path_factory.mktemp("source") / "sepvit"
    skipped = shutil.ignore_patterns(".*", "demo", "work_dirs", "runs", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, folder, ignore=skipped)
    return folder


@pytest.fixture(scope="module", params=["regular", pytest.param("editable", marks=pytest.mark.slow)])
def site(request, source, tmp_path_factory) -> tuple[Path, Path]:
    """A site folder with the package installed, and the folder that holds its modules."""
    prefix = tmp_path_factory.mktemp(request.param)
    editable = ["-e"] if request.param == "editable" else []
    subprocess.run([*PIP, "--prefix", str(prefix), *editable, str(source)], check=True, cwd=prefix)
    folder = next(prefix.glob("lib*/python*/site-packages"))
    return folder, source if editable else folder


def run(code: str, folder: Path, *arguments: Path) -> subprocess.CompletedProcess:
    """Run a program as users do, without this repository on the path."""
    (folder / "program.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "program.py", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
    )


def test_a_host_with_modules_of_the_same_names_imports_everything(site, tmp_path):
    for name in OWN:
        (tmp_path / f"{name}.py").write_text("OWNER = 'host'\n")
    result = run(HOST, tmp_path, *site)
    assert result.returncode == 0, result.stderr


def test_hugging_face_datasets_is_imported(site, tmp_path):
    result = run(HUGGING_FACE, tmp_path, *site)
    assert result.returncode == 0, result.stderr


def test_two_names_are_installed(site):
    folder, modules = site
    if folder == modules:
        names = {path.stem for path in folder.iterdir() if path.suffix != ".dist-info"}
        assert names - {"__pycache__"} == {"sepvit", "sepvit_lib"}


# ----------------------------------------------------------------------------------------------------------------------
# Requirements
# ----------------------------------------------------------------------------------------------------------------------


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "litert"}  # not pinned
RANGES = [Requirement(text) for text in (*PROJECT["dependencies"], *chain(*EXTRAS.values()))]
LINES = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
REQUIREMENTS = [Requirement(line) for line in LINES if line]


def pins(python: str) -> dict[str, str]:
    """The versions that constraints.txt pins on a version of Python."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [
        line
        for line in map(Requirement, filter(None, lines))
        if not line.marker or line.marker.evaluate({"python_version": python})
    ]
    assert len({line.name for line in found}) == len(found)
    return {line.name.lower(): str(line.specifier).removeprefix("==") for line in found}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_tested_versions_are_in_the_ranges(python):
    pinned = pins(python)
    for line in RANGES + REQUIREMENTS:
        assert line.specifier.contains(pinned[line.name.lower()]), line


def test_installed_versions_are_in_the_ranges():
    for line in RANGES + REQUIREMENTS:
        assert line.specifier.contains(importlib.metadata.version(line.name)), line


def test_the_package_and_the_commands_take_the_same_ranges():
    ranges = {line.name: line.specifier for line in REQUIREMENTS}
    for line in map(Requirement, PROJECT["dependencies"]):
        assert ranges[line.name] == line.specifier, line


@pytest.mark.parametrize("version", [(2, 7), (3, 10)])
def test_older_pythons_are_named(version, monkeypatch):
    monkeypatch.setattr(check_setup.sys, "version_info", (*version, 1))
    assert f"Python {version[0]}.{version[1]}" in check_setup.problem()


def test_newer_pythons_are_admitted(monkeypatch):
    monkeypatch.setattr(check_setup.sys, "version_info", (4, 0, 0))
    assert check_setup.problem() is None


def test_make_refuses_an_unsupported_python_before_installing(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'Python 3.9 does not suit' >&2; exit 2\n")
    fake.chmod(0o755)
    arguments = ["make", "install", f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "does not suit" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_the_stand_in_for_opencv_is_empty(tmp_path):
    """It requires the headless build. Nothing of it is in the folder that both would share."""
    skipped = shutil.ignore_patterns("build", "*info")
    shutil.copytree(ROOT / "packaging/opencv-python", tmp_path / "source", ignore=skipped)
    subprocess.run([*PIP, "--target", str(tmp_path / "site"), str(tmp_path / "source")], check=True)
    assert [path.suffix for path in (tmp_path / "site").iterdir()] == [".dist-info"]
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "site")])
    assert [Requirement(line).name for line in found.requires or []] == ["opencv-python-headless"]


def test_opencv_is_the_headless_build():
    for name, has_files in (("opencv-python", False), ("opencv-python-headless", True)):
        files = importlib.metadata.files(name) or []
        assert any(file.parts[0] == "cv2" for file in files) == has_files, name
