"""tools/export.py as a command: every format is written, agrees, and works in predict.py; the rest is refused."""

import itertools
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, refusal, save_shallow, succeed, tiny_network
from PIL import Image

import sepvit
from sepvit_lib.common.errors import UserError
from sepvit_lib.inference.classifier import Description, load_classifier
from sepvit_lib.inference.exported import Kind, kind_of
from sepvit_lib.inference.images import find_images, read_image
from sepvit_lib.pipeline.preprocessing import Preprocessing
from tools import export
from tools.exporting import comparison, dense_backbone, writers
from tools.exporting.data import Images, photographs

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
    formats = [name for name in FILES if name != SLOW]
    arguments = ["--data-path", few_digits, "--rounds", 1, "--formats", *formats]
    printed = succeed("--resume", checkpoint, "--out", out, *arguments, script=SCRIPT)
    return SimpleNamespace(out=out, printed=printed)


@pytest.fixture(scope="module")
def opened(exported, few_digits, tmp_path_factory):
    """Descriptions and logits of the files, opened in a process of their own; see open_exported.py."""
    out = tmp_path_factory.mktemp("opened") / "opened.pt"
    files = [exported.out / file for name, file in FILES.items() if name != SLOW]
    succeed(out, few_digits / "val", *files, script="tests/fixtures/open_exported.py")
    return torch.load(out, weights_only=True)


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


@pytest.mark.parametrize("name", [name for name in FILES if name != SLOW])
def test_files_do_not_tell_where_they_were_made(name, exported):
    file = exported.out / FILES[name]
    for part in file.rglob("*") if file.is_dir() else comparison.parts_of(file):
        contents = [part.read_bytes()]
        if zipfile.is_zipfile(part):
            with zipfile.ZipFile(part) as archive:
                contents += map(archive.read, archive.namelist())
        assert not any(str(ROOT).encode() in content for content in contents)


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
            parts = file.rglob("*") if file.is_dir() else comparison.parts_of(file)
            size = sum(part.stat().st_size for part in parts)
            assert float(row["MB"]) == pytest.approx(size / 1e6, abs=0.051)
            bound = writers.MAX_DIFFERENCE if export.FORMATS[name].is_exact else 1.0
            assert float(row["largest difference"]) < bound
    pixels = r"\nonnx-preprocessing: pixels differ from Pillow's by at most [01]\.\d\d of 255\.\n"
    assert re.search(pixels, exported.printed)


@pytest.mark.parametrize("name", [name for name in FILES if name != SLOW])
def test_the_file_tells_all_and_agrees(name, exported, opened, checkpoint, few_digits):
    """Classes, size and normalisation are read from the file, which takes batches of any size."""
    source, found = load_classifier(str(checkpoint)), opened[str(exported.out / FILES[name])]
    assert Description.from_json(found["description"]) == source.description
    images = [read_image(task.path, "IMAGE") for task in find_images([str(few_digits / "val")])]
    expected = source.logits([source.prepare(image) for image in images])
    assert [len(logits) for logits in found["logits"]] == [1, 2, len(images)]
    for logits in found["logits"]:
        tolerance = writers.MAX_DIFFERENCE if export.FORMATS[name].is_exact else 1.0
        assert torch.allclose(logits, expected[: len(logits)], atol=tolerance)


def test_no_tensor_has_more_than_four_dimensions(exported):
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(str(exported.out / FILES["onnx"])), strict_mode=True).graph
    named = {value.name: value.type.tensor_type.shape for value in graph.value_info}
    assert {output for node in graph.node for output in node.output if output} - {"logits"} <= named.keys()
    assert max(len(shape.dim) for shape in named.values()) == 4


def test_batch_size(few_digits, tmp_path):
    """Files with a fixed batch size take other numbers of images in predict.py, and are compared like the others."""
    checkpoint = save_shallow(tmp_path / "checkpoint.pth", ["0", "1", "2"])
    arguments = ["--resume", checkpoint, "--out", tmp_path / "out", "--rounds", "1", "--data-path", few_digits]
    formats = ["onnx", "onnx-int8", "openvino", "openvino-int8"]
    succeed(*arguments, "--batch-size", "3", "--formats", *formats, "onnx-preprocessing", script=SCRIPT)
    source = load_classifier(str(checkpoint))
    images = [read_image(task.path, "IMAGE") for task in find_images([str(few_digits / "val")])][::6]
    for name in formats:
        opened = load_classifier(str(tmp_path / "out" / FILES[name]))
        assert opened.description.batch_size == 3
        for count in (1, 3, 4):
            inputs = [opened.prepare(image) for image in images[:count]]
            tolerance = writers.MAX_DIFFERENCE if export.FORMATS[name].is_exact else 0.1
            torch.testing.assert_close(opened.logits(inputs), source.logits(inputs), rtol=0, atol=tolerance)


def test_predict_takes_the_file(exported, checkpoint, few_digits):
    arguments = [next((few_digits / "val/1").iterdir()), "--json", "-", "--resume"]
    files = (checkpoint, exported.out / FILES["onnx"])
    (one,), (other,) = (json.loads(succeed(*arguments, file, script="predict.py")) for file in files)
    for a, b in zip(one["predictions"], other["predictions"], strict=True):
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
        torch.testing.assert_close(network(images), load_classifier(str(checkpoint)).run(images))
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
    share = writers.crop_share(preprocessing)
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
    made = [Image.fromarray(noise.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in SHAPES]
    images = [*photographs().images, *made]
    for opset in (18, writers.OPSET, 23):
        graph = writers.preprocessing_graph(preprocessing, opset)
        assert writers.pixel_difference(graph, preprocessing, images) <= writers.MAX_PIXEL_DIFFERENCE


def test_a_network_that_differs_is_noticed(exported, checkpoint):
    classifier = load_classifier(str(checkpoint))
    job = writers.Job(classifier, exported.out, samples=photographs().images)
    graph = writers.preprocessing_graph(classifier.description.preprocessing)
    writers.check_joined(graph, exported.out / FILES["onnx-preprocessing"], job)
    with torch.no_grad():
        classifier.network.head.bias += 0.01
    with pytest.raises(ValueError, match=r"its logits differ by 0\.01 for the same prepared image"):
        writers.check_joined(graph, exported.out / FILES["onnx-preprocessing"], job)


def test_pixels_that_differ_are_noticed():
    wrong = writers.preprocessing_graph(Preprocessing((32, 32), 40))
    difference = writers.pixel_difference(wrong, Preprocessing((32, 32), 36), photographs().images)
    assert difference > 10 * writers.MAX_PIXEL_DIFFERENCE


# ----------------------------------------------------------------------------------------------------------------------
# int8
# ----------------------------------------------------------------------------------------------------------------------


def products(checkpoint):
    """Number of matrix products of attention, inside windows and among them."""
    blocks = load_classifier(str(checkpoint)).network.named_blocks().values()
    return 2 * sum(1 + (block.attn.PSA_qk is not None) for block in blocks)


def test_int8_of_openvino_keeps_attention_in_float(exported, checkpoint):
    import openvino

    operations = openvino.Core().read_model(str(exported.out / FILES["openvino-int8"])).get_ops()
    inputs = [[one.get_node() for one in operation.input_values()] for operation in operations if is_product(operation)]
    assert len(inputs) == products(checkpoint)
    assert not any(map(is_quantised, itertools.chain(*inputs)))
    layers = [operation.input_value(0).get_node() for operation in operations if operation.get_type_name() == "MatMul"]
    assert sum(map(is_quantised, layers)) > len(layers) / 2


def is_product(operation) -> bool:
    """Whether it multiplies two activations. Weights are constants, in int8 multiplied by their scales."""
    weights = ("Constant", "Multiply")
    return operation.get_type_name() == "MatMul" and operation.input_value(1).get_node().get_type_name() not in weights


def is_quantised(node) -> bool:
    """Whether an operation's output is quantised."""
    while node.get_type_name() in ("Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "FakeQuantize"


def test_int8_of_onnx_runtime_keeps_attention_in_float(exported, checkpoint):
    import onnx

    model = onnx.load(str(exported.out / FILES["onnx-int8"]))
    nodes = model.graph.node
    dequantised = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
    in_float = [node.op_type for node in nodes if not dequantised & set(node.input)]
    assert in_float.count("MatMul") == products(checkpoint)
    weights = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(set(node.input[:2]) <= dequantised for node in weights)
    scales = (onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer if "scale" in entry.name)
    assert max(scale.size for scale in scales) >= 256  # a scale for each channel


# ----------------------------------------------------------------------------------------------------------------------
# Backbones
# ----------------------------------------------------------------------------------------------------------------------


def test_backbone_of_any_size(tmp_path, capsys):
    network = tiny_network(sepvit.SepViTDense, out_indices=(0, 1)).eval()
    backbone = dense_backbone.Backbone("tiny", network)
    dense_backbone.write(backbone, tmp_path / "tiny.onnx", writers.OPSET)
    dense_backbone.compare(backbone, tmp_path / "tiny.onnx", rounds=1)  # raises if they differ
    assert capsys.readouterr().out.count("largest difference") == len(dense_backbone.COMPARED)
    with torch.no_grad():
        backbone.network.norm_list[1].bias += 0.01
    with pytest.raises(UserError, match=r"its maps differ by 1\.0e-02, more than 0\.001"):
        dense_backbone.compare(backbone, tmp_path / "tiny.onnx", rounds=1)


def test_backbone_of_a_fixed_size(tmp_path, capsys):
    import onnx

    backbone = dense_backbone.Backbone("tiny", tiny_network(sepvit.SepViTDense, out_indices=(0, 1)).eval())
    file = tmp_path / "tiny.onnx"
    dense_backbone.write(backbone, file, writers.OPSET, 2, (75, 110))
    dense_backbone.compare(backbone, file, 1, 2, (75, 110))  # raises if they differ
    assert capsys.readouterr().out.count("largest difference") == 1
    graph = onnx.load(str(file)).graph
    assert [dimension.dim_value for dimension in graph.input[0].type.tensor_type.shape.dim] == [2, 3, 75, 110]
    assert not {"Shape", "Range", "Mod"} & {node.op_type for node in graph.node}  # folded into constants


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    """A segmentor's checkpoint, of its backbone alone."""
    torch.manual_seed(0)
    weights = {f"backbone.{name}": value for name, value in sepvit.create_dense("SepViT_Lite").state_dict().items()}
    path = tmp_path_factory.mktemp("segmentor") / "iter_1.pth"
    torch.save({"state_dict": weights, "meta": {}}, path)
    return path


@pytest.mark.slow
def test_backbone_of_a_segmentor(segmentor, tmp_path):
    """A segmentor's backbone in ONNX: any size divisible by 32, any batch."""
    printed = succeed("--resume", segmentor, "--out", tmp_path / "out", "--rounds", "1", script=SCRIPT)
    differences = [float(number) for number in re.findall(r"largest difference (\S+)", printed)]
    assert len(differences) == len(dense_backbone.COMPARED)
    assert max(differences) < 1e-3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["SepViT_Lite-backbone.onnx"]
    fixed = ["--static", "64x96", "--batch-size", "2", "--overwrite"]
    printed = succeed("--resume", segmentor, "--out", tmp_path / "out", "--rounds", "1", *fixed, script=SCRIPT)
    assert re.findall(r"(\d+ × \d+ × \d+): largest", printed) == ["2 × 64 × 96"]


def test_another_format_of_a_backbone(segmentor, tmp_path, capsys):
    arguments = ["--resume", segmentor, "--out", tmp_path / "out", "--formats", "openvino"]
    assert "--formats openvino: " in refusal(export.run, "export", arguments, capsys)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------------------


NAN = float("nan")
FORMS = {
    "checkpoint": (0, 90.0, ""),
    "onnx": (2e-3, 90.0, "refused: its logits differ by 0.002, more than 0.001"),
    "openvino": (1e-4, 90.0, ""),
    "torchscript": (NAN, 90.0, "refused: its logits are not finite"),
    "openvino-bfloat16": (0.1, 89.5, ""),
    "openvino-int8": (0.1, 88.5, "refused: its top-1 is 88.50 %, the checkpoint's 90.00 %"),
    "onnx-int8": (NAN, 90.0, "refused: its logits are not finite"),
}


def test_what_is_refused():
    forms = {name: comparison.Form(None, None, difference, top1) for name, (difference, top1, _) in FORMS.items()}
    reasons = export.refused(forms, export.FORMATS, Images("", range(1000)))
    assert reasons == {name: reason for name, (_, _, reason) in FORMS.items() if reason}
    forms["openvino-int8"].top1 = 85.0
    assert "openvino-int8" not in export.refused(forms, export.FORMATS, Images("", range(20)))  # a single image of 20
    forms["checkpoint"].difference = NAN
    with pytest.raises(UserError, match="not finite"):
        export.refused(forms, export.FORMATS, Images("", range(1000)))


def test_a_form_that_is_wrong_or_fails_is_reported_and_not_kept(checkpoint, tmp_path, monkeypatch, capsys):
    """One writer spoils the network, another one fails: both are reported, the third one's files are kept."""

    def spoiled(job, path):
        with torch.no_grad():
            job.network.head.bias += 0.01
            writers.write_torchscript(job, path)
            job.network.head.bias -= 0.01

    def failing(job, path):
        raise RuntimeError("could not execute a primitive")

    monkeypatch.setitem(export.FORMATS, "torchscript", export.Format(spoiled, "-torchscript.pt"))
    monkeypatch.setitem(export.FORMATS, "onnx", export.Format(failing, ".onnx"))
    formats = ["torchscript", "onnx", "safetensors"]
    arguments = ["--resume", checkpoint, "--out", tmp_path / "out", "--formats", *formats, "--rounds", "1"]
    assert export.run(list(map(str, arguments))) == 1
    printed = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [FILES["safetensors"], "exports.md"]
    assert "Not made: torchscript: refused: its logits differ by 0.01, more than 0.001" in printed
    assert "Not made: onnx: RuntimeError: could not execute a primitive" in printed
    assert set(rows(printed)) == {"checkpoint", "safetensors"}


MISTAKES = {
    "no checkpoint": ("--resume {root}/nothing.pth", "--resume {root}/nothing.pth: no such file"),
    "old opset": ("--opset 11", "argument --opset: invalid choice: 11"),
    "size of a classifier": ("--static 64", "--static: only for a backbone"),
    "unknown format": ("--formats tflite", "invalid choice: 'tflite'"),
    "unwritable folder": ("--out {root}/a_file/x", "--out {root}/a_file/x: cannot be written"),
    "no data": ("--data-path {root}/nothing", "--data-path {root}/nothing: no such folder"),
    "other classes": ("--data-path {other}", "different classes than --data-path {other}/val: 7 names "),
    "exported file": ("--resume {root}/a.onnx", "--resume {root}/a.onnx: "),
    "file is there": (
        "--out {root}/full --formats torchscript",
        "--out {root}/full: SepViT_Lite-torchscript.pt exists",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, checkpoint, digits, tmp_path, capsys):
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a.onnx").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/SepViT_Lite-torchscript.pt").write_text("mine")
    arguments, expected = (part.format(root=tmp_path, other=digits) for part in MISTAKES[mistake])
    arguments = arguments.split()
    for flag, value in (("--resume", checkpoint), ("--out", tmp_path / "out")):
        if flag not in arguments:
            arguments += [flag, str(value)]
    assert expected in refusal(export.run, "export", arguments, capsys)
    assert [path.read_text() for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_the_record_keeps_earlier_exports(checkpoint, tmp_path):
    for name in ("safetensors", "torchscript"):
        assert (
            export.run(["--resume", str(checkpoint), "--out", str(tmp_path), "--formats", name, "--rounds", "1"]) == 0
        )
    record = (tmp_path / "exports.md").read_text()
    assert record.count("| checkpoint ") == 2
    assert 0 < record.index("| torchscript ") < record.index("| safetensors ")


def test_a_push_that_the_hub_refuses(checkpoint, tmp_path, capsys):
    """The files are kept."""
    arguments = ["--formats", "torchscript", "--rounds", "1", "--push", "a/b/c"]
    assert export.run(["--resume", str(checkpoint), "--out", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.startswith("export.py: --push a/b/c: ")
    assert {path.name for path in tmp_path.iterdir()} == {FILES["torchscript"], "exports.md"}


ALL = SimpleNamespace(formats=None, opset=[18])


@pytest.mark.parametrize("missing", ["onnxscript", "openvino", "nncf"])
def test_missing_packages(missing, monkeypatch, tmp_path, checkpoint, capsys):
    """A format that was asked for names its package. Without being asked for, it is skipped, with the reason."""
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = ["--resume", checkpoint, "--out", tmp_path / "out", "--formats", "openvino-int8"]
    advice = f"needs {missing}: pip install '.[tools]'"
    assert refusal(export.run, "export", arguments, capsys) == f"export.py: --formats openvino-int8: {advice}"
    chosen, skipped = export.choose_formats(ALL)
    assert skipped["openvino-int8"] == advice
    assert {"safetensors", "torch-export"} <= set(chosen) <= set(export.FORMATS) - {"openvino-int8"}


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(writers, "has_compiler", lambda: False)
    with pytest.raises(UserError, match="--formats aotinductor: needs a C\\+\\+ compiler"):
        export.choose_formats(SimpleNamespace(formats=["aotinductor"], opset=[18]))
    chosen, skipped = export.choose_formats(ALL)
    assert (SLOW in chosen, SLOW in skipped) == (False, True)


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
