"""hubconf.py: what torch.hub finds there, in a process that has nothing but torch and timm."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Code

import hubconf
import sepvit

ENTRIES = ["SepViT_Base", "SepViT_Lite", "SepViT_Small", "SepViT_Tiny", "sepvit_dense"]
SMALL = dict(num_classes=3, img_size=64)

NEEDED = """
import json, sys
import torch, timm
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

# torch.hub's user: `utils`, `datasets` and `training` are the program's own.
PROGRAM = """
import json, pathlib, sys
directory, allowed = sys.argv[1], {*json.loads(sys.argv[2]), *sys.stdlib_module_names, "sepvit", "hubconf"}

class Finder:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return self.finder.find_spec(name, path, target) if name.partition(".")[0] in allowed else None

sys.meta_path[:] = map(Finder, sys.meta_path)
import torch
network = torch.hub.load(directory, "SepViT_Tiny", source="local")
with torch.no_grad():
    assert network.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    small = torch.hub.load(directory, "SepViT_Lite", source="local", num_classes=3, img_size=(64, 96))
    assert small(torch.randn(2, 3, 64, 96)).shape == (2, 3)
    dense = torch.hub.load(directory, "sepvit_dense", source="local", variant="SepViT_Lite", out_indices=(1, 3))
    assert [tuple(y.shape) for y in dense(torch.randn(1, 3, 64, 96))] == [(1, 64, 8, 12), (1, 256, 2, 3)]
own = {path.relative_to(directory).with_suffix("").parts[0] for path in pathlib.Path(directory).glob("[!.]*/*.py")}
own |= {path.stem for path in pathlib.Path(directory).glob("*.py")}
assert own & sys.modules.keys() == {"sepvit"}
assert directory not in sys.path
allowed |= {"utils", "datasets", "sepvit_lib"}
import datasets, sepvit_lib, utils
assert utils.OWNER == datasets.OWNER == sepvit_lib.OWNER == "host"
"""


def run(code: str, folder: Path, *arguments: object) -> str:
    """Run a program in a folder of its own, without this repository on the path. Return what it prints."""
    (folder / "program.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "program.py", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_needs_torch_and_timm_alone(tmp_path):
    """And of this repository sepvit.py, so that the program's own modules stay its own."""
    for name in ("utils", "datasets", "sepvit_lib"):
        (tmp_path / f"{name}.py").write_text("OWNER = 'host'\n")
    needed = json.loads(run(NEEDED, tmp_path))
    assert "mmengine" not in needed
    run(PROGRAM, tmp_path, ROOT, json.dumps(needed))


def test_entries_are_listed():
    """torch.hub lists what is callable and has no underscore in front."""
    assert hubconf.dependencies == ["torch", "timm"]
    assert sorted(name for name, value in vars(hubconf).items() if callable(value) and name[0] != "_") == ENTRIES


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_are_documented_and_built(entry):
    assert getattr(hubconf, entry).__doc__
    with torch.device("meta"):
        network = torch.hub.load(str(ROOT), entry, source="local")
    variant = "SepViT_Tiny" if entry == "sepvit_dense" else entry
    assert isinstance(network, sepvit.SepViTDense if entry == "sepvit_dense" else sepvit.SepViT)
    assert network.embed_dims == sepvit.VARIANTS[variant]["embed_dims"]
    assert tuple(map(len, network.blocks)) == sepvit.VARIANTS[variant]["depths"]


def test_checkpoint(tmp_path):
    """In the published form: the averaged weights are used, a namespace is read, and other sizes are adapted."""
    weights = torch.hub.load(str(ROOT), "SepViT_Lite", source="local", **SMALL).state_dict()
    averaged = {name: value + 1 for name, value in weights.items()}
    torch.save(dict(model=weights, model_ema=averaged, args=argparse.Namespace(lr=1)), tmp_path / "published.pth")
    torch.save(weights, tmp_path / "bare.pth")
    for name, expected in (("published", averaged), ("bare", weights)):
        path = str(tmp_path / f"{name}.pth")
        loaded = torch.hub.load(str(ROOT), "SepViT_Lite", source="local", checkpoint=path, **SMALL).state_dict()
        assert all(torch.equal(loaded[entry], value) for entry, value in expected.items())
    path = str(tmp_path / "bare.pth")
    larger = torch.hub.load(str(ROOT), "SepViT_Lite", source="local", checkpoint=path, num_classes=3, img_size=96)
    assert torch.equal(larger.head.weight, weights["head.weight"])
    dense = torch.hub.load(str(ROOT), "sepvit_dense", source="local", variant="SepViT_Lite", checkpoint=path)
    name = "blocks.2.1.attn.DSA_qkv.weight"
    assert torch.equal(dense.state_dict()[name], weights[name])


def test_checkpoints_that_are_refused(tmp_path):
    torch.save(dict(model={}, args=Code(tmp_path / "ran")), tmp_path / "code.pth")
    torch.save({"head.bias": torch.zeros(3)}, tmp_path / "incomplete.pth")
    errors = dict(code="weights_only", incomplete="Missing key")
    for name, words in errors.items():
        path = str(tmp_path / f"{name}.pth")
        with pytest.raises(RuntimeError, match=words):
            torch.hub.load(str(ROOT), "SepViT_Lite", source="local", checkpoint=path)
    with pytest.raises(FileNotFoundError):
        torch.hub.load(str(ROOT), "SepViT_Lite", source="local", checkpoint=str(tmp_path / "missing.pth"))
    assert not (tmp_path / "ran").exists()
