"""predict.py as a command: classes and probabilities, results in files and pictures, images of all kinds, mistakes."""

import csv
import io
import json
import os
import pty
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, Code, command, refusal, succeed
from PIL import Image
from timm.models import save_for_hf

import predict
import sepvit
from sepvit_lib.inference.classifier import class_names, load_classifier
from sepvit_lib.inference.images import find_images, read_image
from sepvit_lib.inference.pictures import with_classes
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.preprocessing import Preprocessing


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


def test_text_csv_and_pictures(checkpoint, few_digits, tmp_path):
    """A folder's images, each once, though they are named twice; pictures keep the folder's structure."""
    names = [few_digits / "val", str(few_digits / "val/0/*.png")]
    outputs = ("--csv", tmp_path / "results.csv", "--out", tmp_path / "pictures")
    text = succeed(*names, "--resume", checkpoint, "--topk", "2", *outputs, script="predict.py")
    blocks = text.splitlines()
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
    result = command(*names, "--resume", checkpoint, *outputs, script="predict.py")
    assert (result.returncode, "exists; name another folder, or replace it with --over" in result.stderr) == (2, True)


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


@pytest.mark.parametrize("is_safe", [False, True])
def test_folders_of_timm(is_safe, tmp_path):
    """With the weights in safetensors, and as timm's `save_for_hf` writes them by default."""
    network = timm.create_model("test_vit", num_classes=3).eval()
    save_for_hf(network, tmp_path, model_config=dict(label_names=["a", "b", "c"]), safe_serialization=is_safe)
    classifier = load_classifier(str(tmp_path))
    assert classifier.description.classes == ("a", "b", "c")
    images = torch.randn(1, *network.default_cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(classifier.logits(list(images)), network(images))


def test_a_folder_runs_no_code(tmp_path):
    save_for_hf(timm.create_model("test_vit"), tmp_path)
    torch.save({"weight": Code(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="timm cannot load it"):
        load_classifier(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_another_network_is_named(tmp_path, few_digits):
    """Bare weights of another of timm's networks need its name."""
    network = timm.create_model("test_vit", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    image, resume = next((few_digits / "val/1").iterdir()), ("--resume", tmp_path / "weights.pth")
    result = command(image, *resume, script="predict.py")
    assert (result.returncode, result.stderr.strip().rpartition("; ")[2]) == (2, "name it with --model")
    (entry,) = predicted(image, *resume, "--model", "test_vit")
    assert {prediction["class"] for prediction in entry["predictions"]} == {"0", "1", "2"}


# ----------------------------------------------------------------------------------------------------------------------
# Images of all kinds
# ----------------------------------------------------------------------------------------------------------------------

RED, WHITE = (254, 0, 0), (255, 255, 255)


def written(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to the right
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    upright = read_image(written(image, "JPEG", exif=exif, quality=100), "IMAGE")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[1] < 60  # red is at the top
    assert upright.getpixel((10, 35))[1] > 200


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_files_have_the_pixels_of_validation(mode, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(tmp_path / "image.jpg")
    read = read_image(tmp_path / "image.jpg", "IMAGE")
    assert np.array_equal(np.asarray(read), np.asarray(Image.open(tmp_path / "image.jpg").convert("RGB")))


def test_palette_transparency_and_bilevel():
    palette = Image.new("RGB", (4, 4), RED).quantize()
    assert read_image(written(palette, "GIF"), "IMAGE").getpixel((0, 0)) == RED
    clear = Image.new("RGBA", (4, 4), (*RED, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    image = read_image(written(clear, "PNG"), "IMAGE")
    assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == (WHITE, RED)
    assert read_image(written(Image.new("1", (4, 4), 1), "PNG"), "IMAGE").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([[0, 32896, 65535]], np.uint16), "PNG"),
        (np.array([[0, 32896, 65535]], np.uint16), "TIFF"),
        (np.array([[0.0, 128 / 255, 1.0]], np.float32), "TIFF"),
        (np.array([[-5.0, -5 + 10 * 128 / 255, 5.0]], np.float32), "TIFF"),
    ],
)
def test_more_than_8_bits(values, kind):
    image = read_image(written(Image.fromarray(values), kind), "IMAGE")
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), WHITE]


def test_cmyk_is_read_as_in_training():
    """By Pillow's formula, as in the published runs, whatever the profile."""
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert read_image(written(cyan, "TIFF"), "IMAGE").getpixel((4, 4)) == (0, 255, 255)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        file = written(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        red, _, blue = read_image(file, "IMAGE").getpixel((4, 4))
        assert (red > 200, blue < 60) == (True, True)


def test_formats_for_which_programs_are_started_are_refused():
    file = written(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(UserError, match=r"^IMAGE x: cannot be read \(not an image, or damaged\)$"):
        read_image(file, "IMAGE x")


def test_an_image_too_large_to_decode_is_refused(monkeypatch):
    file = written(Image.new("1", (400, 400)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 100)
    with pytest.raises(UserError, match=r"^IMAGE x: cannot be read \(more than \d+ megapixels\)$"):
        read_image(file, "IMAGE x")


def test_patterns_and_odd_names(tmp_path):
    for name in ("a/b/1.png", "a/2.JPG", "a/notes.txt", "x[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")

    def found(pattern):
        return [str(task.path.relative_to(tmp_path)) for task in find_images([str(tmp_path / pattern)])]

    assert found("**/*") == ["a/2.JPG", "a/b/1.png", "x[1].png"]
    assert found("x[1].png") == ["x[1].png"]  # a file of that name, not a pattern
    assert found("a") == ["a/2.JPG", "a/b/1.png"]


def test_picture_has_the_classes_below_the_image():
    image = Image.new("RGB", (50, 30), RED)
    picture = with_classes(image, ["a very long name of a class " * 9, "b"], [0.75, 0.25])
    assert picture.width >= 320  # enlarged, so that the names can be read
    assert picture.getpixel((0, 0)) == RED
    bars = np.asarray(picture)[picture.width * 30 // 50 :]
    assert (bars < 128).any()  # there is text
    assert (bars[:, -1] == 255).all()  # which does not run over the edge


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no image": (["{root}/nothing.png"], "IMAGE {root}/nothing.png: no such file"),
    "no match": (["{root}/*.gif"], "IMAGE {root}/*.gif: no image matches this pattern"),
    "empty folder": (["{root}/empty"], "IMAGE {root}/empty: a folder without images (files ending in "),
    "no checkpoint": (["{image}", "--resume", "{root}/nothing.pth"], "--resume {root}/nothing.pth: no such file"),
    "no exported file": (["{image}", "--resume", "{root}/nothing.onnx"], "--resume {root}/nothing.onnx: no such file"),
    "damaged export": (["{image}", "--resume", "{root}/bad.onnx"], "--resume {root}/bad.onnx: ONNX Runtime cannot "),
    "folder": (["{image}", "--resume", "{root}/empty"], "--resume {root}/empty: a folder without config.json; name a "),
    "segmentor": (["{image}", "--resume", "{root}/segmentor.pth"], "use segmentation/predict.py or detection/"),
    "no averaged weights": (["{image}", "--resume", "{root}/plain.pth", "--averaged"], "omit --averaged"),
    "unknown model": (["{image}", "--resume", "{root}/plain.pth", "--model", "vit"], "--model vit: unknown; choose "),
    "another model": (
        ["{image}", "--resume", "{root}/plain.pth", "--model", "SepViT_Tiny"],
        "contains SepViT_Lite, not SepViT_Tiny; name it with --model",
    ),
    "averaged weights of a folder": (["{image}", "--resume", "{root}/a/hf", "--averaged"], "omit --averaged"),
    "another model than a folder's": (
        ["{image}", "--resume", "{root}/a/hf", "--model", "SepViT_Tiny"],
        "contains SepViT_Lite, not SepViT_Tiny",
    ),
    "no classifier": (["{image}", "--resume", "{root}/headless.pth"], "holds no classifier"),
    "no folder for results": (
        ["{image}", "--json", "{root}/no/x.json"],
        "--json {root}/no/x.json: takes a file in a folder that exists, or - for ",
    ),
    "both to standard output": (["{image}", "--json", "-", "--csv", "-"], "only one of them"),
    "unwritable pictures": (["{image}", "--out", "{root}/bad.onnx/x"], "--out {root}/bad.onnx/x: cannot be written"),
    "picture over image": (["{root}/1.png", "--out", "{root}"], "--out {root}: would overwrite IMAGE {root}/1.png"),
    "same picture": (["{root}/1.png", "{root}/a/1.png", "--out", "{root}/p"], "would get the same picture as "),
    "device": (["{image}", "--device", "cuda:9"], "--device cuda:9: not available"),
    "top 0": (["{image}", "--topk", "0"], "argument --topk: 0 is out of range"),
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
    arguments, expected = MISTAKES[mistake]
    arguments = [argument.format(root=root, image=root / "1.png") for argument in arguments]
    if "--resume" not in arguments:
        arguments += ["--resume", str(checkpoint)]
    assert expected.format(root=root) in refusal(predict.run, "predict", arguments, capsys)
    assert sorted(path.name for path in root.iterdir()) == [
        "1.png",
        "a",
        "bad.onnx",
        "empty",
        "headless.pth",
        "plain.pth",
        "segmentor.pth",
    ]
