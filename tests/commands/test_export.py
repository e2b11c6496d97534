"""tools/export.py as a command: every format is written, agrees, and works in predict.py; the rest is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import refusal, succeed, tiny_network
from PIL import Image

import sepvit
from sepvit_lib.inference.classifier import Description, load_classifier
from sepvit_lib.inference.exported import Kind, kind_of
from sepvit_lib.inference.images import find_images, read_image
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.preprocessing import Preprocessing
from tools import export, export_backbone, export_formats, export_table
from tools.export_data import Images, photographs

SCRIPT = "tools/export.py"
SLOW = "aotinductor"  # compiles for a minute
FILES = {
    "safetensors": "SepViT_Lite-timm",
    "onnx": "SepViT_Lite.onnx",
    "onnx-preprocessing": "SepViT_Lite-preprocessing.onnx",
    "onnx-int8": "SepViT_Lite-int8.onnx",
    "openvino": "SepViT_Lite.xml",
    "openvino-bfloat16": "SepViT_Lite-bfloat16.xml",
    "openvino-int8": "SepViT_Lite-int8.xml",
    "torch-export": "SepViT_Lite.pt2",
    "aotinductor": "SepViT_Lite-aotinductor.pt2",
    "torchscript": "SepViT_Lite-torchscript.pt",
}
PARTS = {"SepViT_Lite.bin", "SepViT_Lite-bfloat16.bin", "SepViT_Lite-int8.bin", "exports.md"}


@pytest.fixture(scope="module")
def checkpoint(trained_digits):
    return trained_digits / "checkpoint.pth"


@pytest.fixture(scope="module")
def exported(checkpoint, few_digits, tmp_path_factory):
    """A classifier in every format but the slow one: the folder, and what the command printed."""
    out = tmp_path_factory.mktemp("exported") / "out"
    formats = [name for name in export.FORMATS if name != SLOW]
    printed = succeed(
        "--resume",
        checkpoint,
        "--out",
        out,
        "--data-path",
        few_digits,
        "--formats",
        *formats,
        "--rounds",
        "1",
        script=SCRIPT,
    )
    return SimpleNamespace(out=out, printed=printed)


def rows(printed: str) -> dict[str, dict[str, str]]:
    """The table's rows by form."""
    lines = [line.strip("| ").split("|") for line in printed.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0]]
    return {line[0].strip(): dict(zip(header, map(str.strip, line))) for line in lines[2:]}


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def test_every_file_is_written_and_nothing_else(exported):
    expected = {file for name, file in FILES.items() if name != SLOW} | PARTS
    assert {path.name for path in exported.out.iterdir()} == expected
    assert (exported.out / "exports.md").read_text().strip() == exported.printed.strip()


def test_table(exported, trained_digits):
    """Each form has a row. The checkpoint's top-1 is that of `--eval`; forms in float32 agree."""
    table = rows(exported.printed)
    assert set(table) == {"checkpoint", *FILES} - {SLOW}
    top1 = json.loads((trained_digits / "eval.json").read_text())["test_acc1"]
    assert float(table["checkpoint"]["top-1, %"]) == pytest.approx(top1, abs=0.005)
    for name, row in table.items():
        assert float(row["latency, ms"]) > 0
        assert float(row["images/s"]) > 0
        if name != "checkpoint":
            file = exported.out / FILES[name]
            parts = file.rglob("*") if file.is_dir() else export_table.parts_of(file)
            size = sum(part.stat().st_size for part in parts)
            assert float(row["MB"]) == pytest.approx(size / 1e6, abs=0.051)
            bound = export_formats.LARGEST_DIFFERENCE if export.FORMATS[name].is_exact else 1.0
            assert float(row["largest difference"]) < bound
    assert re.search(
        r"^onnx-preprocessing: pixels differ from Pillow's by at most [01]\.\d\d of 255\.$",
        exported.printed,
        re.MULTILINE,
    )


@pytest.mark.parametrize("name", [name for name in FILES if name != SLOW])
def test_predict_takes_the_file(name, exported, checkpoint, few_digits, tmp_path):
    """predict.py reads classes, size and normalisation from the file, and takes batches of any size."""
    source = load_classifier(str(checkpoint))
    paths = [task.path for task in find_images([str(few_digits / "val")])[:5]]
    succeed(exported.out / FILES[name], tmp_path / "opened.pt", *paths, script="tests/fixtures/open_exported.py")
    opened = torch.load(tmp_path / "opened.pt", weights_only=True)
    assert Description.from_json(opened["description"]) == source.description
    expected = source.logits([source.prepare(read_image(path, "IMAGE")) for path in paths])
    exact = export.FORMATS[name].is_exact
    assert [len(logits) for logits in opened["logits"]] == [1, 2, 5]
    for logits in opened["logits"]:
        assert torch.allclose(logits, expected[: len(logits)], atol=1e-3 if exact else 1.0)
    if exact:
        file = next((few_digits / "val/1").iterdir())
        printed = [
            succeed(file, "--resume", path, "--json", "-", script="predict.py")
            for path in (checkpoint, exported.out / FILES[name])
        ]
        (one,), (other,) = map(json.loads, printed)
        for a, b in zip(one["predictions"], other["predictions"]):
            assert (a["class"], a["probability"]) == (b["class"], pytest.approx(b["probability"], abs=1e-3))


WITHOUT_REPOSITORY = """
import json, sys
import torch
path, images = sys.argv[1], torch.load(sys.argv[2])
if path.endswith("aotinductor.pt2"):
    network = torch._inductor.aoti_load_package(path)
elif path.endswith(".pt2"):
    network = torch.export.load(path).module()
else:
    network = torch.jit.load(path)
assert not {"sepvit", "timm", "sepvit_lib"} & set(sys.modules)
with torch.inference_mode():
    torch.save(network(images), sys.argv[3])
"""


def without_repository(file: Path, checkpoint: Path, folder: Path) -> None:
    """Require that a file computes the checkpoint's logits in a process that knows neither timm nor this project."""
    images = torch.randn(3, 3, 32, 32)
    torch.save(images, folder / "images.pt")
    arguments = [str(file), str(folder / "images.pt"), str(folder / "logits.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_REPOSITORY, *arguments], cwd=folder, check=True)
    expected = load_classifier(str(checkpoint)).run(images)
    assert torch.allclose(torch.load(folder / "logits.pt"), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["torch-export", "torchscript"])
def test_pytorchs_files_need_no_code_of_this_project(name, exported, checkpoint, tmp_path):
    without_repository(exported.out / FILES[name], checkpoint, tmp_path)


@pytest.mark.slow
def test_aotinductor(checkpoint, few_digits, tmp_path):
    succeed("--resume", checkpoint, "--out", tmp_path / "out", "--formats", SLOW, "--rounds", "1", script=SCRIPT)
    file = tmp_path / "out" / FILES[SLOW]
    assert kind_of(file) is Kind.AOTINDUCTOR
    assert load_classifier(str(file)).description == load_classifier(str(checkpoint)).description
    without_repository(file, checkpoint, tmp_path)


def test_timm_loads_the_folder_offline(exported, checkpoint):
    folder = exported.out / FILES["safetensors"]
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), load_classifier(str(checkpoint)).run(images))
    assert network.pretrained_cfg["label_names"] == ["0", "1", "2"]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    photograph = photographs().images[0]
    assert torch.equal(transform(photograph), Preprocessing.for_size(32).transform()(photograph))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\ntags:\n- image-classification\n- timm\n")
    assert "# Model card for SepViT_Lite" in card


@pytest.mark.parametrize("size", [32, 96, 112, 160, 192, 224, 256, 288, 320, 384, 448, 512, 518])
def test_timm_resizes_to_the_same_length(size):
    """timm stores the share of the crop, and rounds when it computes the length again."""
    preprocessing = Preprocessing.for_size(size)
    share = export_formats.crop_share(preprocessing)
    transform = timm.data.create_transform((3, size, size), crop_pct=share, interpolation="bicubic")
    assert transform.transforms[0].size == preprocessing.resize


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing inside the graph
# ----------------------------------------------------------------------------------------------------------------------

SHAPES = [(300, 451), (77, 133), (133, 77), (64, 64), (8, 9), (37, 36), (500, 37)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_inside_the_graph_has_pillows_pixels(interpolation):
    """Photographs, and noise of many shapes: larger and smaller than the crop, odd and even."""
    preprocessing = Preprocessing((32, 32), 36, interpolation=interpolation)
    noise = np.random.default_rng(0)
    images = [
        *photographs().images,
        *(Image.fromarray(noise.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in SHAPES),
    ]
    for opset in (18, export_formats.OPSET, 23):
        graph = export_formats.preprocessing_graph(preprocessing, opset)
        assert export_formats.pixel_difference(graph, preprocessing, images) <= export_formats.LARGEST_PIXEL_DIFFERENCE


def test_a_network_that_differs_is_noticed(exported, checkpoint):
    classifier = load_classifier(str(checkpoint))
    job = export_formats.Job(classifier, exported.out, samples=photographs().images)
    graph = export_formats.preprocessing_graph(classifier.description.preprocessing)
    export_formats.check_joined(graph, exported.out / FILES["onnx-preprocessing"], job)
    with torch.no_grad():
        classifier.network.head.bias += 0.01
    with pytest.raises(ValueError, match=r"its logits differ by 0\.01 for the same prepared image"):
        export_formats.check_joined(graph, exported.out / FILES["onnx-preprocessing"], job)


def test_pixels_that_differ_are_noticed():
    wrong = export_formats.preprocessing_graph(Preprocessing((32, 32), 40))
    difference = export_formats.pixel_difference(wrong, Preprocessing((32, 32), 36), photographs().images)
    assert difference > 10 * export_formats.LARGEST_PIXEL_DIFFERENCE


# ----------------------------------------------------------------------------------------------------------------------
# int8
# ----------------------------------------------------------------------------------------------------------------------


def test_int8_keeps_attention_in_float(exported, checkpoint):
    import onnx

    model = onnx.load(str(exported.out / FILES["onnx-int8"]))
    nodes = model.graph.node
    dequantised = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
    in_float = [node.op_type for node in nodes if not dequantised & set(node.input)]
    blocks = load_classifier(str(checkpoint)).network.named_blocks().values()
    assert in_float.count("Attention") == len(blocks)
    assert in_float.count("MatMul") == 2 * sum(block.attn.PSA_qk is not None for block in blocks)  # among windows
    weights = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(set(node.input[:2]) <= dequantised for node in weights)
    scales = {
        entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer if "scale" in entry.name
    }
    assert max(scale.size for scale in scales.values()) >= 256  # a scale for each channel


# ----------------------------------------------------------------------------------------------------------------------
# Backbones
# ----------------------------------------------------------------------------------------------------------------------


def test_backbone_of_any_size(tmp_path, capsys):
    backbone = export_backbone.Backbone(
        "tiny", tiny_network(sepvit.SepViTDense, depths=(1, 2, 1, 1), out_indices=(1, 3)).eval()
    )
    export_backbone.write(backbone, tmp_path / "tiny.onnx", export_formats.OPSET)
    export_backbone.compare(backbone, tmp_path / "tiny.onnx", rounds=1)  # raises if they differ
    assert capsys.readouterr().out.count("largest difference") == len(export_backbone.COMPARED)
    with torch.no_grad():
        backbone.network.norm_list[3].bias += 0.01
    with pytest.raises(UserError, match=r"--formats onnx: refused, its maps differ by 1\.0e-02, more than 0\.001"):
        export_backbone.compare(backbone, tmp_path / "tiny.onnx", rounds=1)


@pytest.mark.slow
def test_backbone_of_a_segmentor(tmp_path):
    """A segmentor's backbone in ONNX: any size divisible by 32, any batch."""
    torch.manual_seed(0)
    backbone = sepvit.create_dense("SepViT_Lite")
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "iter_1.pth")
    out = tmp_path / "out"
    printed = succeed("--resume", tmp_path / "iter_1.pth", "--out", out, "--rounds", "1", script=SCRIPT)
    differences = [float(number) for number in re.findall(r"largest difference (\S+)", printed)]
    assert len(differences) == len(export_backbone.COMPARED)
    assert max(differences) < 1e-3
    assert [path.name for path in out.iterdir()] == ["SepViT_Lite-backbone.onnx"]


def test_another_format_of_a_backbone(tmp_path, capsys):
    weights = {f"backbone.{name}": value for name, value in sepvit.create_dense("SepViT_Lite").state_dict().items()}
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "iter_1.pth")
    arguments = ["--resume", tmp_path / "iter_1.pth", "--out", tmp_path / "out", "--formats", "openvino"]
    line = refusal(export.run, "export", arguments, capsys)
    assert line.endswith("iter_1.pth holds a backbone, SepViT_Lite, which is exported to onnx only")


# ----------------------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------------------


def measured(**forms):
    """Forms with a largest difference and a top-1 each."""
    return {
        name: export_table.Measured(SimpleNamespace(), difference, top1) for name, (difference, top1) in forms.items()
    }


def test_what_is_refused():
    nan = float("nan")
    forms = {
        "checkpoint": (0, 90.0),
        "onnx": (2e-3, 90.0),
        "openvino": (1e-4, 90.0),
        "torchscript": (nan, 90.0),
        "openvino-bfloat16": (0.1, 89.5),
        "openvino-int8": (0.1, 88.5),
        "onnx-int8": (nan, 90.0),
    }
    reasons = export.refused(measured(**forms), export.FORMATS, 1000)
    assert reasons == {
        "onnx": "refused: its logits differ by 0.002, more than 0.001",
        "torchscript": "refused: its logits are not finite",
        "openvino-int8": "refused: its top-1 is 88.50 %, the checkpoint's 90.00 %",
        "onnx-int8": "refused: its logits are not finite",
    }
    single = measured(checkpoint=(0, 90.0), **{"openvino-int8": (0.1, 85.0)})
    assert export.refused(single, export.FORMATS, 20) == {}  # a single image of 20


def test_a_form_that_is_wrong_or_fails_is_reported_and_not_kept(checkpoint, tmp_path, monkeypatch, capsys):
    """One writer spoils the network, another one fails: both are reported, the third file is kept."""

    def spoiled(job, path):
        with torch.no_grad():
            job.network.head.bias += 0.01
            export_formats.write_torch_export(job, path)
            job.network.head.bias -= 0.01

    def failing(job, path):
        raise RuntimeError("could not execute a primitive")

    monkeypatch.setitem(export.FORMATS, "torch-export", export.Format(spoiled, ".pt2"))
    monkeypatch.setitem(export.FORMATS, "onnx", export.Format(failing, ".onnx"))
    formats = ["torch-export", "onnx", "torchscript"]
    arguments = ["--resume", checkpoint, "--out", tmp_path / "out", "--formats", *formats, "--rounds", "1"]
    assert export.run(list(map(str, arguments))) == 1
    printed = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["SepViT_Lite-torchscript.pt", "exports.md"]
    assert "Not made: torch-export: refused: its logits differ by 0.01, more than 0.001" in printed
    assert "Not made: onnx: RuntimeError: could not execute a primitive" in printed
    assert set(rows(printed)) == {"checkpoint", "torchscript"}


MISTAKES = {
    "no checkpoint": (["--resume", "{root}/nothing.pth"], "--resume {root}/nothing.pth: no such file"),
    "old opset": (["--opset", "11"], "argument --opset: invalid choice: 11 (choose from 18, 19, 20, 21, 22, 23)"),
    "unknown format": (["--formats", "tflite"], "invalid choice: 'tflite'"),
    "unwritable folder": (["--out", "{root}/a_file/x"], "--out {root}/a_file/x: cannot be written"),
    "no data": (["--data-path", "{root}/nothing"], "--data-path {root}/nothing: no such folder"),
    "other classes": (["--data-path", "{other}"], "different classes than --data-path {other}/val: 7 names "),
    "exported file": (["--resume", "{root}/a.onnx"], "--resume {root}/a.onnx: "),
    "file is there": (
        ["--out", "{root}/full", "--formats", "torchscript"],
        "--out {root}/full: SepViT_Lite-torchscript.pt exists; name another folder, or replace ",
    ),
    "no such repository": (["--formats", "safetensors", "--push", "a/b/c"], "--push a/b/c: Repo id must be "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, checkpoint, digits, tmp_path, capsys):
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a.onnx").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/SepViT_Lite-torchscript.pt").write_text("mine")
    arguments, expected = MISTAKES[mistake]
    arguments = [argument.format(root=tmp_path, other=digits) for argument in arguments]
    for flag, value in (("--resume", checkpoint), ("--out", tmp_path / "out")):
        if flag not in arguments:
            arguments += [flag, str(value)]
    line = refusal(export.run, "export", arguments, capsys)
    assert expected.format(root=tmp_path, other=digits) in line
    assert (tmp_path / "full/SepViT_Lite-torchscript.pt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["SepViT_Lite-torchscript.pt"]


@pytest.mark.parametrize("missing", ["onnxscript", "openvino", "nncf"])
def test_missing_packages(missing, monkeypatch, tmp_path, checkpoint, capsys):
    """A format that was asked for names its package. Without being asked for, it is left out, with the reason."""
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    arguments = ["--resume", checkpoint, "--out", tmp_path / "out", "--formats", "openvino-int8"]
    line = refusal(export.run, "export", arguments, capsys)
    assert re.search(rf"--formats openvino-int8: needs the package {missing}: pip install {missing}==[\d.]+$", line)
    chosen, left_out = export.choose_formats(SimpleNamespace(formats=None))
    assert "openvino-int8" not in chosen
    assert left_out["openvino-int8"].startswith(f"needs the package {missing}: pip install {missing}==")
    assert {"safetensors", "torch-export"} <= set(chosen)


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(export_formats, "has_compiler", lambda: False)
    with pytest.raises(UserError, match="--formats aotinductor: needs a C\\+\\+ compiler"):
        export.choose_formats(SimpleNamespace(formats=["aotinductor"]))
    chosen, left_out = export.choose_formats(SimpleNamespace(formats=None))
    assert (SLOW in chosen, SLOW in left_out) == (False, True)


def test_accuracy_of_a_function():
    classifier = SimpleNamespace(prepare=lambda image: torch.tensor(float(image.getpixel((0, 0))[0])))
    images = [Image.new("RGB", (2, 2), (value, 0, 0)) for value in (0, 1, 2)] * 4
    data = Images("test", images, [0, 1, 0] * 4)
    assert data.accuracy(classifier, lambda inputs: torch.eye(3)[inputs.long()]) == pytest.approx(2 / 3)


def test_description_survives():
    description = Description("SepViT_Lite", ("Ärger", "犬", 'a "b"'), Preprocessing((32, 48), 40, (0.1, 0.2, 0.3)))
    assert Description.from_json(description.to_json()) == description
    with pytest.raises(ValueError, match="not a classifier's description"):
        Description.from_json("{}")
