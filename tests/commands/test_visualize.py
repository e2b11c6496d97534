"""tools/visualize.py as a command: the figures of classifiers and backbones, and users' mistakes."""

import subprocess
import sys

import numpy as np
import pytest
import skimage
import small_model
import timm
import torch
from conftest import ROOT, refusal
from PIL import Image

import sepvit
from sepvit_lib.inference.backbones import load_backbone
from tools import visualize


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A photograph; a classifier, a segmentor's checkpoint, an exported file and another network."""
    root = tmp_path_factory.mktemp("visualize")
    Image.fromarray(skimage.data.chelsea()[:200, :300]).save(root / "cat.png")
    (root / "broken.png").write_bytes(b"not an image")
    for name, model in (("cat", small_model.MODEL), ("lite", "SepViT_Lite")):
        torch.manual_seed(0)
        classifier = timm.create_model(model, num_classes=3, img_size=64)
        with torch.no_grad():
            for parameter in classifier.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        settings = dict(model=model, input_size=64)
        content = dict(model=classifier.state_dict(), classes=["cat $x", "dog", "bird"], args=settings)
        torch.save(content, root / f"{name}.pth")
    backbone = sepvit.create_dense("SepViT_Lite").state_dict()
    weights = {f"backbone.{name}": value for name, value in backbone.items()} | {"decode_head.weight": torch.ones(3)}
    torch.save(dict(meta={}, state_dict=weights, **mmengine_log()), root / "segmentor.pth")
    torch.save(backbone, root / "backbone.pth")
    (root / "cat.onnx").write_bytes(b"")
    other = timm.create_model("test_vit", num_classes=3)
    torch.save(dict(model=other.state_dict(), args=dict(model="test_vit", input_size=64)), root / "other.pth")
    (root / "a_file").write_text("")
    (root / "cat-features.png").write_text("an earlier figure")
    return root


def mmengine_log() -> dict:
    """What mmengine adds to its checkpoints; nothing if it is not installed."""
    try:
        from mmengine.logging import HistoryBuffer
    except ImportError:
        return {}
    return dict(message_hub=dict(log_scalars={"train/loss": HistoryBuffer([1.0, 0.5], [1, 1])}, runtime_info={}))


def written(folder) -> dict[str, tuple[int, int]]:
    """The pictures in a folder, with their width and height."""
    sizes = {}
    for file in sorted(folder.iterdir()):
        with Image.open(file) as image:
            image.load()
            sizes[file.stem] = image.size
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    return sizes


def run(*arguments) -> int:
    """Run the command in this process."""
    return visualize.run(list(map(str, arguments)))


def test_figures_of_a_classifier(root, tmp_path, capsys):
    settings = "--window 0 2 --blocks 1.0 3.1".split()
    assert run(root / "cat.png", "--resume", root / "lite.pth", "--out", tmp_path, *settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("SepViT_Lite, 64 × 64 pixels: ")
    assert lines[1].startswith("attention of 11 blocks: rows sum to one")
    names = ("among", "among-1.0", "inside-1.0", "inside-3.1", "tokens", "features", "attribution")
    assert set(written(tmp_path)) == {f"cat-{name}" for name in names}
    assert sorted(lines[2:]) == sorted(str(tmp_path / f"cat-{name}.png") for name in names)


def test_figures_of_a_segmentor_without_its_libraries(root, tmp_path):
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['mmengine', 'mmcv', 'mmseg', 'skimage', 'sklearn'])); "
        "from tools import visualize; sys.exit(visualize.run(sys.argv[1:]))"
    )
    arguments = [root / "cat.png", "--resume", root / "segmentor.pth", "--out", tmp_path, "--blocks", "2.5"]
    result = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(written(tmp_path)) == {f"cat-{name}" for name in ("among", "among-2.5", "inside-2.5", "features")}
    lines = result.stdout.splitlines()
    assert lines[0] == "SepViT_Lite, dense form, 200 × 300 pixels"
    assert "tokens: not drawn, the dense form has no learned window tokens" in lines
    assert "attribution: not drawn, a backbone has no classes" in lines


def test_all_windows(root, tmp_path, capsys):
    settings = "--window all --figures among inside --blocks 0.0 --format pdf".split()
    assert run(root / "cat.png", "--resume", root / "cat.pth", "--out", tmp_path, *settings) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cat-among-0.0.pdf", "cat-among.pdf"]
    assert all(file.read_bytes().startswith(b"%PDF") for file in tmp_path.iterdir())
    assert "inside: not drawn" in capsys.readouterr().out


def test_backbones_take_any_size(root, tmp_path, capsys):
    settings = "--input-size 56 90 --figures features --overwrite".split()
    for _ in range(2):
        assert run(root / "cat.png", "--resume", root / "backbone.pth", "--out", tmp_path, *settings) == 0
    assert "56 × 90 pixels" in capsys.readouterr().out
    image = Image.new("RGB", (3000, 1501))
    assert visualize.dense_preprocessing(image, None).size == (512, 1023)
    assert visualize.dense_preprocessing(image, (100, 300)).crop(image).size == (300, 100)
    assert visualize.dense_preprocessing(Image.new("RGB", (90, 70)), None).size == (70, 90)


def test_classifiers_are_not_backbones(root):
    assert load_backbone(str(root / "cat.pth"), "--resume") is None
    assert load_backbone(str(root / "segmentor.pth"), "--resume").variant == "SepViT_Lite"


def test_other_classes(root, tmp_path):
    settings = ["--figures", "attribution", "--class", "dog"]
    assert run(root / "cat.png", "--resume", root / "cat.pth", "--out", tmp_path, *settings) == 0
    assert written(tmp_path).keys() == {"cat-attribution"}
    loaded = visualize.Loaded(None, "", None, ("cat", "dog", "1"))
    logits = torch.tensor([0.2, 0.1, 0.7])
    assert [visualize.find_label(name, loaded, logits) for name in ("", "dog", "1", "0")] == [2, 1, 2, 0]


MISTAKES = {
    "missing image": ("{root}/nope.png --resume {root}/cat.pth", "IMAGE {root}/nope.png: "),
    "broken image": ("{root}/broken.png --resume {root}/cat.pth", "not an image"),
    "missing checkpoint": ("{cat} --resume {root}/no.pth", "--resume {root}/no.pth: no such file"),
    "exported": ("{cat} --resume {root}/cat.onnx", "cat.onnx: an exported model"),
    "another network": ("{cat} --resume {root}/other.pth", "contains test_vit, not a SepViT"),
    "no averaged weights": ("{cat} --resume {root}/cat.pth --averaged", "omit --averaged"),
    "no averaged backbone": ("{cat} --resume {root}/backbone.pth --averaged", "backbone.pth: has no averaged weights"),
    "window out of range": ("{cat} --resume {root}/cat.pth --window 3 0", "--window 3 0: out of range; rows are"),
    "half a window": ("{cat} --resume {root}/cat.pth --window 3", "--window 3: "),
    "too many windows": (
        "{cat} --resume {root}/backbone.pth --window all --input-size 600 600",
        "--window all: 22 × 22 windows",
    ),
    "unknown block": ("{cat} --resume {root}/cat.pth --blocks 2.6", "choose all, or from 0.0, 1.0"),
    "unknown class": ("{cat} --resume {root}/cat.pth --class cow", "--class cow: "),
    "class of a backbone": ("{cat} --resume {root}/backbone.pth --class dog", "--class dog: "),
    "size of a classifier": ("{cat} --resume {root}/cat.pth --input-size 64 96", "--input-size 64 96: "),
    "unknown figure": ("{cat} --resume {root}/cat.pth --figures maps", "--figures"),
    "unwritable folder": (
        "{cat} --resume {root}/cat.pth --out {root}/a_file",
        "--out {root}/a_file: cannot be written",
    ),
    "figure exists": ("{cat} --resume {root}/cat.pth --figures features", "{root}/cat-features.png exists"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake, root, capsys):
    arguments, expected = (part.format(root=root, cat=root / "cat.png") for part in MISTAKES[mistake])
    out = "" if "--out" in arguments else f"--out {root}"
    assert expected in refusal(visualize.run, "visualize", f"{arguments} {out}".split(), capsys)
