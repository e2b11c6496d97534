"""tools/export.py for phones: the files agree with the checkpoint, and work in predict.py; the ranks of the graphs.

A format whose packages are missing is skipped: docs/using.md has the commands that install them.
"""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import refusal, save_shallow, succeed
from test_export import rows

import predict
import sepvit
from sepvit_lib.inference.classifier import load_classifier
from tools import export
from tools.exporting import dense_backbone, phones, writers
from tools.exporting.data import photographs

MAX_RANK = 4  # ncnn's limit; Core ML takes five dimensions, and XNNPACK six


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_shallow(tmp_path_factory.mktemp("trained") / "checkpoint.pth", ["0", "Ärger", "犬"])


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photograph") / "one.png"
    photographs().images[0].save(path)
    return path


def exported(checkpoint, out, *formats):
    """Export to some formats. Returns what the command printed."""
    return succeed("--resume", checkpoint, "--out", out, "--rounds", 1, "--formats", *formats, script="tools/export.py")


def check(file, checkpoint, photograph, tolerance):
    """Require the checkpoint's description, logits of any number of images, and predictions."""
    source, found = load_classifier(str(checkpoint)), load_classifier(str(file))
    assert found.description == phones.fixed(writers.Job(source, file.parent)).description
    images = [source.prepare(image) for image in photographs().images[:3]]
    for count in (1, 3):
        assert torch.allclose(found.logits(images[:count]), source.logits(images[:count]), atol=tolerance)
    arguments = [photograph, "--json", "-", "--num_workers", 0, "--resume", file]
    (predicted,) = json.loads(succeed(*arguments, script="predict.py"))
    shares = {entry["class"]: entry["probability"] for entry in predicted["predictions"]}
    assert shares == pytest.approx(dict(source(str(photograph))), abs=tolerance)


def test_executorch(checkpoint, photograph, tmp_path):
    pytest.importorskip("executorch", reason="needs the extra phones")
    table = rows(exported(checkpoint, tmp_path / "out", "executorch"))
    assert float(table["executorch"]["largest difference"]) < 1e-5
    check(tmp_path / "out/SepViT_Lite.pte", checkpoint, photograph, 1e-5)


@pytest.mark.slow
def test_executorch_in_int8(checkpoint, photograph, tmp_path):
    pytest.importorskip("executorch", reason="needs the extra phones")
    table = rows(exported(checkpoint, tmp_path / "out", "executorch-int8"))
    assert 1e-4 < float(table["executorch-int8"]["largest difference"]) < 0.1
    check(tmp_path / "out/SepViT_Lite-int8.pte", checkpoint, photograph, 0.1)


def test_litert(checkpoint, photograph, tmp_path):
    pytest.importorskip("litert_torch", reason="needs the extra litert, in an environment of its own")
    table = rows(exported(checkpoint, tmp_path / "out", "litert"))
    assert float(table["litert"]["largest difference"]) < 1e-5
    check(tmp_path / "out/SepViT_Lite.tflite", checkpoint, photograph, 1e-5)


def test_ncnn(checkpoint, photograph, tmp_path):
    pytest.importorskip("ncnn", reason="needs the extra phones")
    table = rows(exported(checkpoint, tmp_path / "out", "ncnn", "--batch-size", 8))  # takes one image all the same
    assert float(table["ncnn"]["largest difference"]) < 1e-3
    check(tmp_path / "out/SepViT_Lite-ncnn.param", checkpoint, photograph, 1e-3)


@pytest.fixture(scope="module")
def package(checkpoint, tmp_path_factory):
    """A file for Core ML, and what the command printed."""
    pytest.importorskip("coremltools", reason="needs the extra phones")
    out = tmp_path_factory.mktemp("core_ml") / "out"
    return out / "SepViT_Lite.mlpackage", exported(checkpoint, out, "coreml")


def test_core_ml_is_made(package, checkpoint):
    """Its metadata is complete, and no tensor has more dimensions than Core ML takes."""
    import coremltools

    file, printed = package
    assert {path.name for path in file.parent.iterdir()} == {file.name, "exports.md"}
    assert sys.platform == "darwin" or f"coreml: {file.name} was made, but not run here: only macOS runs it." in printed
    found = load_classifier(str(file))
    assert found.description.classes == load_classifier(str(checkpoint)).description.classes
    model = coremltools.models.MLModel(str(file), skip_model_load=True).get_spec()
    ends = [*model.description.input, *model.description.output]
    float32 = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32
    assert {end.name: end.type.multiArrayType.dataType for end in ends} == {"images": float32, "logits": float32}
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    outputs = [output.type.tensorType for operation in block.operations for output in operation.outputs]
    assert 4 <= max(output.rank for output in outputs) <= MAX_RANK


@pytest.mark.skipif(sys.platform != "darwin", reason="only macOS runs Core ML files")
def test_core_ml_runs(package, checkpoint, photograph):
    check(package[0], checkpoint, photograph, 0.05)  # computed in float16


@pytest.mark.slow
def test_ranks_of_the_onnx_graphs(tmp_path):
    """Of a classifier at its published size, and of a backbone."""
    onnx = pytest.importorskip("onnx")
    classifier, backbone = sepvit.SepViT_Lite().eval(), sepvit.create_dense("SepViT_Lite").eval()
    for network, shape in (classifier, (1, 3, 224, 224)), (backbone, dense_backbone.TRACED):
        writers.export_onnx(sepvit.exportable(network), torch.randn(shape), tmp_path / "a.onnx")
        graph = onnx.shape_inference.infer_shapes(onnx.load(str(tmp_path / "a.onnx"))).graph
        ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
        outputs = {output for node in graph.node for output in node.output}
        assert outputs <= ranks.keys() | {value.name for value in graph.output}
        assert 4 <= max(ranks.values()) <= MAX_RANK


def test_a_damaged_file(tmp_path, photograph, capfd):
    pytest.importorskip("executorch", reason="needs the extra phones")
    (tmp_path / "a.pte").write_bytes(bytes(np.arange(200, dtype=np.uint8)))
    message = refusal(predict.run, "predict", [photograph, "--resume", tmp_path / "a.pte"], capfd)
    assert message.startswith(f"predict.py: --resume {tmp_path}/a.pte: ExecuTorch cannot open it")


PACKAGES = {"executorch": "executorch", "coreml": "coremltools", "litert": "litert_torch", "ncnn": "pnnx"}


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_packages(name, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    arguments = ["--resume", checkpoint, "--out", tmp_path / "out", "--formats", name]
    where = ", in an environment of its own" if name == "litert" else ""
    advice = f"needs {PACKAGES[name]}: pip install '.[{export.FORMATS[name].extra}]'{where}"
    assert refusal(export.run, "export", arguments, capsys) == f"export.py: --formats {name}: {advice}"
