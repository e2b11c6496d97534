"""`pip install .` and `pip install -e .`: using the network and the backbones in another project.

That project, the host, has its own `utils` and `datasets`, first on its path.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

# Works offline: builds with this environment's setuptools, and the dependencies are already installed.
PIP = [
    sys.executable,
    "-m",
    "pip",
    "--disable-pip-version-check",
    "install",
    "--quiet",
    "--no-deps",
    "--no-build-isolation",
]
HOST = """
import site, sys
site.addsitedir(sys.argv[1])  # processes .pth files, as Python does for its own site-packages
import datasets, utils
assert (datasets.OWNER, utils.OWNER) == ("host", "host")
import timm, torch
import sepvit
assert sepvit.__file__.startswith(sys.argv[2]), sepvit.__file__
assert timm.create_model("SepViT_Lite", num_classes=10, img_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 10)
from mmengine.registry import MODELS
import sepvit_lib.dense.backbone, sepvit_lib.dense.loading
backbone = MODELS.build(dict(type="SepViT_Lite"))
backbone.init_weights()
assert [tuple(y.shape[1:]) for y in backbone(torch.randn(1, 3, 64, 96))][0] == (32, 16, 24)
from mmcv.ops import batched_nms
_, kept = batched_nms(torch.tensor([[0.0, 0, 9, 9]] * 2), torch.rand(2), torch.tensor([0, 1]), dict(iou_threshold=0.5))
assert len(kept) == 2
assert sys.modules["utils"].OWNER == sys.modules["datasets"].OWNER == "host"
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


@pytest.fixture(scope="module", params=["regular", "editable"])
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


def test_a_host_with_its_own_utils_and_datasets(site, tmp_path):
    for name in ("utils", "datasets"):
        (tmp_path / f"{name}.py").write_text("OWNER = 'host'\n")
    result = run(HOST, tmp_path, *site)
    assert result.returncode == 0, result.stderr


def test_hugging_face_datasets_is_imported(site, tmp_path):
    result = run(HUGGING_FACE, tmp_path, *site)
    assert result.returncode == 0, result.stderr


def test_top_level_modules_and_tests_are_not_installed(site):
    folder, _ = site
    assert not {"utils.py", "datasets.py", "main.py", "tests"} & {path.name for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------------------
# Requirements
# ----------------------------------------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, str]:
    """The versions that a file of requirements pins. It contains nothing else but the stand-in for opencv-python."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line not in ("", "./tools/opencv-python")]
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+", line) for line in lines), lines
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}


def test_the_package_admits_the_pinned_versions():
    tables = (ROOT / "pyproject.toml").read_text()
    ranges = [Requirement(text) for text in re.findall(r'^    "([\w-]+>=[\d.]+[^"]*)",$', tables, re.MULTILINE)]
    assert {"torch", "torchvision", "timm", "onedl-mmcv", "onedl-mmdetection"} <= {line.name for line in ranges}
    pinned = pins("requirements.txt") | pins("requirements-mm.txt")
    for line in ranges:
        assert line.specifier.contains(pinned[line.name]), line


def test_the_stand_in_for_opencv_is_empty(tmp_path):
    """It requires the headless build, of its own version. Nothing of it is in the folder that both would share."""
    shutil.copytree(ROOT / "tools/opencv-python", tmp_path / "source", ignore=shutil.ignore_patterns("build", "*info"))
    subprocess.run([*PIP, "--target", str(tmp_path / "site"), str(tmp_path / "source")], check=True)
    (metadata,) = (tmp_path / "site").iterdir()
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "site")])
    version = pins("requirements-mm.txt")["opencv-python-headless"]
    assert metadata.name == f"opencv_python-{version}.dist-info"
    assert found.requires == [f"opencv-python-headless=={version}"]


def test_opencv_is_the_headless_build():
    for name, has_files in (("opencv-python", False), ("opencv-python-headless", True)):
        files = importlib.metadata.files(name) or []
        assert any(file.parts[0] == "cv2" for file in files) == has_files, name
