"""docs/own_pictures.md, then docs/results.md: every command, in a short form, on a few images in the same layout."""

import csv
import glob
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from conftest import ROOT
from PIL import Image
from test_docs import BLOCKS, commands_of, is_elsewhere, link_repository

PAGES = {"docs/own_pictures.md": "01", "docs/results.md": "0"}  # and the seeds of their loops
# Arguments added to the commands, which make them short.
SHORT = {
    "main.py": "--epochs 1 --batch-size 8 --input-size 64 --num_workers 0",
    "predict.py": "--num_workers 0",
    "tools/export.py": "--images 4 --rounds 1 --formats safetensors",  # the format that is written fastest
}


@pytest.fixture
def package(tmp_path, few_digits) -> Path:
    """A package with images like elpv-dataset's: grey images in a folder, and a table without a header."""
    data = tmp_path / "packages/elpv_dataset/data"
    (data / "images").mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    lines = []
    for number, path in enumerate(sorted(few_digits.glob("train/*/*"))[:32]):
        Image.open(path).convert("L").resize((300, 300)).save(data / f"images/cell{number:04}.png")
        lines.append(f"images/cell{number:04}.png  {(0.0, 0.3333, 0.6667, 1.0)[number % 4]}  {'mp'[number % 2]}ono\n")
    (data / "labels.csv").write_text("".join(lines))
    return data.parent.parent


def repeated(text: str, seeds: str) -> list[str]:
    """The commands of a loop over seeds, of which one or two are enough, or the command itself."""
    loop = re.fullmatch(r"for seed in [\d ]+; do (.*); done", text)
    return [loop[1].replace("$seed", seed) for seed in seeds] if loop else [text]


def test_the_tutorial(package, tmp_path):
    """From the package to predictions and exported files. The web page is skipped; other tests run it."""
    (tmp_path / "reader").mkdir()
    root = link_repository(tmp_path / "reader", tmp_path)
    environment = os.environ | dict(PYTHONPATH=str(package), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    ran = []
    for block in (block for page in PAGES for block in BLOCKS if block.page == page):
        if block.kind == "python":
            subprocess.run([sys.executable, "-c", block.text], cwd=root, env=environment, check=True)
        for command in commands_of(block):
            if "test_own_pictures" not in (is_elsewhere(command.text) or ""):
                continue
            for text in repeated(command.text, PAGES[block.page]):
                script, *given = shlex.split(text)[1:]
                arguments = [match for one in given for match in sorted(glob.glob(one, root_dir=root)) or [one]]
                arguments += shlex.split(SHORT.get(script, ""))
                result = processes.run(ROOT / script, arguments, root, environment, 600, 0)
                assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
                ran.append(script)
    assert ran.count("main.py") == 9
    assert {"predict.py", "tools/export.py", "tools/compare.py"} <= set(ran)
    rows = list(csv.DictReader((root / "cells/table.csv").open()))
    assert [row["label"] for row in rows[:4]] == ["functional", "functional", "defective", "defective"]
    report = json.loads((root / "cells/run/report/report.json").read_text())
    assert report["images"] == 8
    assert (root / "cells/run/report/report.html").is_file()
    assert len((root / "cells/predictions.csv").read_text().splitlines()) == 1 + 2 * len(rows)
