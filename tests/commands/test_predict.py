"""predict.py as a command: classes and probabilities, results in files and pictures, images of all kinds, mistakes."""

import argparse
import csv
import json
import os
import pty
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, Code, command, refusal, succeed
from PIL import Image
from timm.models import save_for_hf

import predict
import sepvit
from sepvit_lib.common.errors import UserError
from sepvit_lib.inference import load
from sepvit_lib.inference.classifier import class_names, load_classifier
from sepvit_lib.pipeline.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def checkpoint(trained_digits):
    return trained_digits / "checkpoint.pth"


def predicted(*arguments, **kwargs) -> list[dict]:
    return json.loads(succeed(*arguments, "--json", "-", script="predict.py", **kwargs))


# ----------------------------------------------------------------------------------------------------------------------
# Predictions
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaged", [False, True])
def test_top1_is_that_of_evaluation(averaged, trained_digits, checkpoint, few_digits):
    """Same pixels, same network: of the validation images, predict.py gets those right that `--eval` gets right."""
    flags = ["--averaged"] if averaged else []
    entries = predicted(few_digits / "val", "--resume", checkpoint, "--batch-size", "4", "--num-workers", "1", *flags)
    files = sorted((few_digits / "val").rglob("*.png"))
    assert [entry["image"] for entry in entries] == [str(file) for file in files]  # in order
    right = sum(entry["predictions"][0]["class"] == file.parent.name for entry, file in zip(entries, files))
    figures = json.loads((trained_digits / "eval.json").read_text())
    assert 100 * right / len(files) == pytest.approx(figures["test_ema_acc1" if averaged else "test_acc1"])


def test_probabilities_are_the_networks(checkpoint, few_digits):
    file = next((few_digits / "val/1").iterdir())
    weights = torch.load(checkpoint, weights_only=True)["model"]
    network = timm.create_model("SepViT_Lite", num_classes=3, img_size=32).eval()
    network.load_state_dict(weights)
    image = Preprocessing.for_size(32).transform()(Image.open(file).convert("RGB"))
    with torch.no_grad():
        expected = network(image[None]).softmax(-1)[0]
    (entry,) = predicted(file, "--resume", checkpoint, "--topk", "9")
    found = {prediction["class"]: prediction["probability"] for prediction in entry["predictions"]}
    assert found == {str(label): pytest.approx(float(expected[label]), abs=2e-6) for label in range(3)}
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_python_call_and_features(checkpoint, few_digits, tmp_path, capsys):
    files = sorted((few_digits / "val/1").iterdir())[:3]
    classifier = load(checkpoint)
    arguments = [*files, "--resume", checkpoint, "--num_workers", 0, "--features", tmp_path / "x.npz", "--json", "-"]
    assert predict.run(list(map(str, arguments))) == 0
    entries = json.loads(capsys.readouterr().out)
    for file, entry in zip(files, entries):
        found = [(prediction["class"], prediction["probability"]) for prediction in entry["predictions"]]
        assert [(name, pytest.approx(value, abs=2e-6)) for name, value in classifier(file)] == found
    assert classifier(Image.open(files[0])) == classifier(str(files[0]))
    features = classifier.features(files, batch_size=2)
    with np.load(tmp_path / "x.npz") as written:
        assert [str(path) for path in written["images"]] == list(map(str, files))
        np.testing.assert_allclose(written["features"], features, atol=1e-5)
    head = classifier.network.get_classifier()
    logits = head(features)
    logits.sum().backward()  # features serve to train on
    torch.testing.assert_close(logits.detach(), classifier.logits(classifier.inputs(files)))


def test_images_are_turned_upright_from_python(checkpoint, few_digits, tmp_path):
    """An image is turned like the file that it was read from."""
    upright, turned = Image.open(next((few_digits / "val/1").iterdir())), tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    classifier = load(checkpoint)
    classifier = replace(classifier, description=replace(classifier.description, orientation="exif"))
    assert classifier(turned) == classifier(Image.open(turned)) == classifier(upright)


@pytest.mark.parametrize("name", ["-", "folder"])
def test_features_are_refused(name, checkpoint, few_digits, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    name = name if name == "-" else tmp_path / name
    arguments = [few_digits / "val", "--resume", checkpoint, "--features", name]
    assert f"--features {name}: must be a file" in refusal(predict.run, "predict", arguments, capsys)


def test_text_csv_and_pictures(checkpoint, few_digits, tmp_path, capsys):
    """A folder's images, each once, though they are named twice; pictures keep the folder's structure."""
    names = [few_digits / "val", str(few_digits / "val/0/*.png")]
    outputs = ("--csv", tmp_path / "results.csv", "--out", tmp_path / "pictures")
    arguments = [*names, "--resume", checkpoint, "--num_workers", 0, *outputs]
    assert predict.run([*map(str, arguments), "--topk", "2"]) == 0
    blocks = capsys.readouterr().out.splitlines()
    assert len(blocks) == 3 * 21
    assert blocks[0].startswith(f"{few_digits}/val/0/")
    probability, sign, name = blocks[1].split()
    assert (sign, name in "012", 0 < float(probability) <= 100) == ("%", True, True)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2"] * 21
    assert f"{100 * float(rows[0]['probability']):.2f}" == probability
    pictures = sorted((tmp_path / "pictures").rglob("*.png"))
    assert [str(file.relative_to(tmp_path / "pictures")) for file in pictures] == sorted(
        str(file.relative_to(few_digits / "val")) for file in (few_digits / "val").rglob("*.png")
    )
    assert "exists; choose another folder" in refusal(predict.run, "predict", arguments, capsys)


def test_unreadable_images_are_reported_and_the_rest_go_on(checkpoint, few_digits, tmp_path):
    shutil.copytree(few_digits / "val/0", tmp_path / "images")
    files = sorted((tmp_path / "images").iterdir())
    files[1].write_bytes(files[1].read_bytes()[:60])
    files[3].write_text("no image")
    result = command(tmp_path / "images", "--resume", checkpoint, "--json", "-", script="predict.py")
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert [line.partition(": cannot be read (")[0] for line in lines] == [
        f"predict.py: IMAGE {files[1]}",
        f"predict.py: IMAGE {files[3]}",
    ]
    readable = [file for number, file in enumerate(files) if number not in (1, 3)]
    assert [entry["image"] for entry in json.loads(result.stdout)] == [str(file) for file in readable]


def test_bar_on_a_terminal(checkpoint, few_digits):
    """A progress bar on the terminal, results in the file alone."""
    main, terminal = pty.openpty()
    arguments = [sys.executable, ROOT / "predict.py", few_digits / "val", "--resume", checkpoint, "--json", "-"]
    result = subprocess.run(list(map(str, arguments)), stdout=subprocess.PIPE, stderr=terminal, timeout=120)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(main, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert result.returncode == 0
    assert b"21/21" in shown
    assert len(json.loads(result.stdout)) == 21


# ----------------------------------------------------------------------------------------------------------------------
# What holds a classifier
# ----------------------------------------------------------------------------------------------------------------------


def test_names_of_classes(checkpoint):
    assert load_classifier(str(checkpoint)).description.classes == ("0", "1", "2")
    assert class_names(None, 1000)[281] == "tabby, tabby cat"  # ImageNet's
    assert class_names(["n01440764", "n99999999", "mine"], 3) == ("tench, Tinca tinca", "n99999999", "mine")
    assert class_names(None, 2) == ("0", "1")
    assert [class_names(None, 1000)[index] for index in (134, 517)] == ["crane (n02012849)", "crane (n03126707)"]
    assert len(set(class_names(None, 1000))) == 1000
    assert class_names(["a", "b", "a"], 3) == ("a (0)", "b", "a (2)")


def test_bare_weights_of_another_size(tmp_path):
    """Bare weights tell their variant and their classes. ImageNet's names are known."""
    torch.manual_seed(0)
    torch.save(sepvit.SepViT_Lite().state_dict(), tmp_path / "weights.pth")
    description = load_classifier(str(tmp_path / "weights.pth")).description
    assert (description.model, description.preprocessing) == ("SepViT_Lite", Preprocessing.for_size(224))
    assert description.classes[0] == "tench, Tinca tinca"


@pytest.mark.parametrize("input_size", [None, [3, 160, 160]])
def test_checkpoints_of_timms_training(input_size, tmp_path):
    checkpoint = dict(args=argparse.Namespace(model="test_vit", input_size=input_size))
    checkpoint["state_dict"] = timm.create_model("test_vit", num_classes=3).state_dict()
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    assert load_classifier(str(tmp_path / "last.pth.tar")).description.model == "test_vit"


@pytest.mark.parametrize("is_safe", [False, True])
def test_folders_of_timm(is_safe, tmp_path):
    """With the weights in safetensors, and as timm's `save_for_hf` writes them by default."""
    network = timm.create_model("test_vit", num_classes=3).eval()
    save_for_hf(network, tmp_path, model_config=dict(label_names=["a", "b", "c"]), safe_serialization=is_safe)
    classifier = load_classifier(str(tmp_path))
    assert classifier.description.classes == ("a", "b", "c")
    images = torch.randn(1, *network.default_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(classifier.logits(list(images)), network(images))


def test_a_folder_runs_no_code(tmp_path):
    save_for_hf(timm.create_model("test_vit"), tmp_path)
    torch.save({"weight": Code(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="timm cannot load it"):
        load_classifier(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_another_network_is_named(tmp_path, few_digits, capsys):
    """Bare weights of another of timm's networks need its name."""
    network = timm.create_model("test_vit", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    arguments = [next((few_digits / "val/1").iterdir()), "--resume", tmp_path / "weights.pth"]
    assert refusal(predict.run, "predict", arguments, capsys).endswith("name it with --model")
    assert load_classifier(str(tmp_path / "weights.pth"), "test_vit").description.classes == ("0", "1", "2")


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no image": ("{root}/nothing.png", "IMAGE {root}/nothing.png: no such file"),
    "no match": ("{root}/*.gif", "IMAGE {root}/*.gif: no image matches this pattern"),
    "empty folder": ("{root}/empty", "IMAGE {root}/empty: a folder without images ("),
    "no checkpoint": ("{image} --resume {root}/nothing.pth", "--resume {root}/nothing.pth: no such file"),
    "no exported file": ("{image} --resume {root}/nothing.onnx", "--resume {root}/nothing.onnx: no such file"),
    "damaged export": ("{image} --resume {root}/bad.onnx", "--resume {root}/bad.onnx: ONNX Runtime cannot "),
    "folder": ("{image} --resume {root}/empty", "{root}/empty: a folder without config.json; choose a checkpoint"),
    "segmentor": ("{image} --resume {root}/segmentor.pth", "use segmentation/predict.py or detection/"),
    "no averaged weights": ("{image} --resume {root}/plain.pth --averaged", "omit --averaged"),
    "unknown model": ("{image} --resume {root}/plain.pth --model vit", "--model vit: unknown; choose "),
    "another model": ("{image} --resume {root}/plain.pth --model SepViT_Tiny", "contains SepViT_Lite, not SepViT_Tiny"),
    "averaged weights of a folder": ("{image} --resume {root}/a/hf --averaged", "omit --averaged"),
    "another folder": ("{image} --resume {root}/a/hf --model SepViT_Tiny", "contains SepViT_Lite, not SepViT_Tiny"),
    "no classifier": ("{image} --resume {root}/headless.pth", "contains no classifier"),
    "no folder for results": (
        "{image} --json {root}/no/x.json",
        "--json {root}/no/x.json: must be a file in an existing folder",
    ),
    "both to standard output": ("{image} --json - --csv -", "--json - and --csv -: "),
    "unwritable pictures": ("{image} --out {root}/bad.onnx/x", "--out {root}/bad.onnx/x: cannot be written"),
    "picture over image": ("{image} --out {root}", "--out {root}: would overwrite IMAGE {root}/1.png"),
    "same picture": ("{image} {root}/a/1.png --out {root}/p", "would get the same picture as "),
    "device": ("{image} --device cuda:9", "--device cuda:9: not available"),
    "top 0": ("{image} --topk 0", "argument --topk: 0 is out of range"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory, few_digits):
    """A folder with an image and faulty files."""
    root = tmp_path_factory.mktemp("mistakes")
    (root / "empty").mkdir()
    (root / "a").mkdir()
    image = next((few_digits / "val/1").iterdir())
    for name in ("1.png", "a/1.png"):
        shutil.copy(image, root / name)
    (root / "bad.onnx").write_text("no model")
    network = timm.create_model("SepViT_Lite", img_size=32, num_classes=3)
    save_for_hf(network, root / "a/hf")
    weights = network.state_dict()
    torch.save(weights, root / "plain.pth")
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in weights.items()}}, root / "segmentor.pth")
    torch.save({name: value for name, value in weights.items() if "head" not in name}, root / "headless.pth")
    return root


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, root, checkpoint, capsys):
    before = sorted(path.name for path in root.iterdir())
    arguments, expected = (part.format(root=root, image=root / "1.png") for part in MISTAKES[mistake])
    resume = "" if "--resume" in arguments else f"--resume {checkpoint}"
    assert expected in refusal(predict.run, "predict", f"{arguments} {resume}".split(), capsys)
    assert sorted(path.name for path in root.iterdir()) == before
