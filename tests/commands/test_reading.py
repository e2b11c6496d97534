"""One file has one reading: in training by every loader, in evaluation, prediction and export."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SMALL, SMALLEST, TURNED, encoded, exif, link_digits, refusal, succeed
from PIL import Image
from test_data import run, val_loader, write_tar
from timm.models import save_for_hf
from torchvision import transforms

import main
import predict
from datasets import LoaderSettings, build_train_loader, epoch_batches
from engine import Renormalised
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.inference.images import find_images, read_image
from sepvit_lib.pipeline.image_files import count_turned, decode, images_in
from sepvit_lib.pipeline.preprocessing import Preprocessing
from sepvit_lib.pipeline.samples import read_sample
from tools.exporting.writers import hub_settings

# Files of all kinds. What everything reads of them is tested by tests/unit/test_images.py.
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 4), np.uint8)
PHOTO = Image.fromarray(PIXELS[..., :3])
FILES = {
    "16 bits": encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "transparent": encoded(Image.fromarray(PIXELS), "PNG"),
    "turned": encoded(PHOTO, "JPEG", exif=exif(TURNED), quality=95),
    "CMYK": encoded(PHOTO.convert("CMYK"), "JPEG"),
}


def written_as(source: str, root: Path) -> list[str]:
    """Write a data set of the files, one class for each and validation alike. Returns main.py's arguments."""
    numbered = list(enumerate(FILES.values()))
    root.mkdir(exist_ok=True)
    for split, folder in (("train", "train"), ("val", "validation" if source.startswith("hf") else "val")):
        if source == "archive":
            write_tar(root / f"{split}.tar", {f"{number}/0.png": content for number, content in numbered})
        elif source == "webdataset":
            files = {f"{number}.png": content for number, content in numbered}
            files |= {f"{number}.cls": str(number).encode() for number, _ in numbered}
            write_tar(root / f"x-{split}-0.tar", dict(sorted(files.items())))
        else:
            for number, content in numbered:
                path = root / "data" / folder / str(number) / "0.png"
                path.parent.mkdir(parents=True)
                path.write_bytes(content)
    if source == "webdataset":
        splits = "--train-split x-train-{0..0}.tar|4 --val-split x-val-{0..0}.tar|4"
        return f"--data-set wds/x --data-path {root} --num-classes 4 {splits}".split()
    if source.startswith("hf"):
        extra = "--train-num-samples 4 --val-num-samples 4" if source == "hfids" else ""
        return f"--data-set {source}/{root}/data --data-path {root}/cache --num-classes 4 {extra}".split()
    return ["--data-path", str(root if source == "archive" else root / "data")]


CHECK = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/commands"]
import test_reading
test_reading.check({arguments!r})
"""


def check(arguments: list[str]) -> None:
    """Compare what training and validation read with `decode`, in both orientations."""
    for orientation in ("stored", "exif"):
        flags = f"--input-size 32 --num_workers 0 --orientation {orientation} --batch-size 4".split()
        args = main.build_parser().parse_args([*arguments, *flags])
        transform = Preprocessing.for_size(32).transform()
        images, targets = next(iter(val_loader(args)))
        assert sorted(targets.tolist()) == [0, 1, 2, 3]
        for image, target in zip(images, targets.tolist()):
            assert torch.equal(image, transform(decode(list(FILES.values())[target], orientation)))
        args.batch_size = 1
        data = replace(main.build_data(args, is_train=True), transform=np.asarray)
        loader = build_train_loader(data, main.settings_from(args, LoaderSettings))
        seen = [(image[0].numpy(), target.item()) for image, target, _ in epoch_batches(loader, 0, 0, 1, print)]
        assert sorted(target for _, target in seen) == [0, 1, 2, 3]
        for image, target in seen:
            assert np.array_equal(image, np.asarray(decode(list(FILES.values())[target], orientation)))


@pytest.mark.parametrize("source", ["folder", "archive", "webdataset", "hfds", "hfids"])
def test_every_source_reads_alike(source, tmp_path):
    arguments = written_as(source, tmp_path)
    if not source.startswith("hf"):
        check(arguments)
        data = main.build_data(main.build_parser().parse_args(arguments), is_train=True)
        assert count_turned(data.dataset.files()) == dict(turned=1, sampled=4)
        return
    script = tmp_path / "check.py"  # Hugging Face's library takes the name of datasets.py
    script.write_text(CHECK.format(root=str(ROOT), arguments=arguments))
    succeed(script=script, cwd=tmp_path, environment={"HF_HUB_OFFLINE": "1"})


# ----------------------------------------------------------------------------------------------------------------------
# Orientation
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(few_digits, tmp_path_factory) -> dict[str, Path]:
    """The digits as a phone stores them, upside down by their tag: 'stored' is right as it is, 'exif' when turned."""
    roots = {}
    for name in ("stored", "exif"):
        roots[name] = root = tmp_path_factory.mktemp(name)
        for path in few_digits.glob("*/*/*.png"):
            image = Image.open(path).convert("RGB")
            image = image.rotate(180) if name == "exif" else image
            target = root / path.relative_to(few_digits).with_suffix(".jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target, quality=100, subsampling=0, exif=exif(TURNED))
    return roots


@pytest.mark.parametrize("orientation", ["stored", "exif"])
def test_evaluation_and_prediction_read_as_training_did(orientation, photographs, trained_digits, tmp_path):
    checkpoint = torch.load(trained_digits / "checkpoint.pth", weights_only=True)
    reading = dict(orientation=orientation, turned=48, sampled=48)
    args = {**checkpoint["args"], "orientation": orientation}
    torch.save({**checkpoint, "reading": reading, "args": args}, tmp_path / "checkpoint.pth")
    resume, images = tmp_path / "checkpoint.pth", photographs[orientation]
    arguments = [*SMALL, "--data-path", images, "--output_dir", tmp_path, "--eval", "--resume", resume]
    assert run(*arguments) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["test_acc1"] == 100
    prediction = [images / "val", "--resume", resume, "--topk", 1, "--json", tmp_path / "found.json"]
    assert predict.run(list(map(str, prediction))) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 21
    assert all(Path(one["image"]).parent.name == one["predictions"][0]["class"] for one in found)
    description = load_classifier(str(resume)).description
    assert type(description).from_json(description.to_json()).orientation == description.orientation == orientation
    assert run(*arguments, "--orientation", "exif" if orientation == "stored" else "stored") == 0
    assert json.loads((tmp_path / "eval.json").read_text())["test_acc1"] < 100


def test_exported_folders_keep_the_orientation(trained_digits, tmp_path):
    checkpoint = torch.load(trained_digits / "checkpoint.pth", weights_only=True)
    torch.save({**checkpoint, "reading": dict(orientation="stored", turned=1, sampled=9)}, tmp_path / "turned.pth")
    formats = "--formats safetensors torchscript --rounds 1".split()
    succeed("--resume", tmp_path / "turned.pth", "--out", tmp_path / "out", *formats, script="tools/export.py")
    for name in ("SepViT_Lite-timm", "SepViT_Lite-torchscript.pt"):
        assert load_classifier(str(tmp_path / "out" / name)).description.orientation == "stored"


def test_ignored_orientations_are_counted_said_and_kept(photographs, tmp_path, capsys):
    """What predict.py reads follows what the network was trained on last."""
    arguments = [*SMALLEST, "--data-path", photographs["stored"], "--output_dir", tmp_path]
    resume = ["--resume", tmp_path / "checkpoint.pth"]

    def kept() -> tuple[dict, str]:
        checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        return checkpoint["reading"], checkpoint["args"]["orientation"]

    assert run(*arguments) == 0
    assert "WARNING: --orientation stored: 48 of 48 sampled training images" in capsys.readouterr().out
    assert kept() == (dict(orientation="stored", turned=48, sampled=48), "stored")
    assert run(*arguments, *resume, "--epochs", 2, "--orientation", "exif") == 0
    assert "EXIF" not in capsys.readouterr().out
    assert kept() == (dict(orientation="exif"), "exif")
    line = refusal(main.run, "main", [*arguments, "--epochs", 2, "--auto-resume", "--orientation", "stored"], capsys)
    assert "--orientation stored (was exif)" in line
    assert run(*arguments, *resume, "--epochs", 3) == 0
    assert kept() == (dict(orientation="exif"), "exif")


def test_a_run_that_may_resume_reads_as_it_is_told(trained_digits, few_digits, tmp_path):
    """The weights that it starts from are of an older version, without orientations; the run is not."""
    arguments = [*SMALL, "--data-path", few_digits, "--output_dir", tmp_path, "--auto-resume", "--orientation", "exif"]
    assert run(*arguments, "--finetune", trained_digits / "checkpoint.pth") == 0
    kept = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert kept["args"]["orientation"] == kept["reading"]["orientation"] == "exif"


THIN = """
import resource, sys
sys.path[:0] = [{root!r}]
import predict
resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
sys.exit(predict.run(sys.argv[1:]))
"""


def test_thin_images_take_little_memory(trained_digits, few_digits, tmp_path):
    """14 GB otherwise, for a file of some hundred bytes."""
    Image.new("L", (50_000, 1)).save(tmp_path / "thin.png")
    Image.new("L", (1, 12_000)).save(tmp_path / "tall.png")
    shutil.copy(next((few_digits / "val/1").iterdir()), tmp_path / "one.png")
    (tmp_path / "thin.py").write_text(THIN.format(root=str(ROOT)))
    arguments = [tmp_path, "--resume", trained_digits / "checkpoint.pth", "--topk", 1, "--json", "-"]
    printed = json.loads(succeed(*arguments, "--out", tmp_path / "pictures", script=tmp_path / "thin.py"))
    assert printed[0]["predictions"][0]["class"] == "1"
    assert len(printed) == 3
    with Image.open(tmp_path / "pictures/tall.png") as picture:
        assert picture.width == 320


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------

KINDS = {".avif": "AVIF", ".gif": "GIF", ".jfif": "JPEG", ".mpo": "MPO", ".JPG": "JPEG", ".webp": "WEBP", ".ppm": "PPM"}


@pytest.fixture
def mixed(few_digits, tmp_path) -> Path:
    """Images of many suffixes, and what is no image: hidden files and folders, notes."""
    root = tmp_path / "mixed"
    link_digits(few_digits, root, "01", train=2, val=2)
    for split in ("train", "val"):
        folder = root / split / "0"
        for number, (suffix, kind) in enumerate(KINDS.items()):
            PHOTO.save(folder / f"{number}{suffix}", kind)
        for name in ("._1.png", ".DS_Store", "notes.txt", "more.txt", "x.psd"):
            (folder / name).write_text("no image")
        (folder / ".ipynb_checkpoints").mkdir()
        PHOTO.save(folder / ".ipynb_checkpoints/1-checkpoint.png")
        (root / split / ".ipynb_checkpoints").mkdir()
        PHOTO.save(root / split / ".ipynb_checkpoints/2-checkpoint.png")
    return root


def test_all_images_of_a_class_folder_are_read(mixed, capsys):
    """By this project, and by the reader of timm that takes class folders too."""
    (mixed / "val/1/deep.png").write_bytes(FILES["16 bits"])
    flags = ["--data-path", str(mixed), "--val-split", "val"]
    for more in ([], ["--data-set", "torch/image_folder", "--num-classes", "2"]):
        data = main.build_data(main.build_parser().parse_args([*flags, *more]), is_train=False)
        printed = capsys.readouterr().out
        assert f"WARNING: {mixed}, validation images: skipped 3 files" in printed
        assert "2 .txt, 1 .psd" in printed
        assert (data.classes, len(data)) == (["0", "1"], 2 + 2 + len(KINDS) + 1)
        names = [Path(path).name for path, _ in data.dataset.samples]
        read = read_sample(data.dataset, names.index("deep.png"), (), data.decode)[0]
        assert np.array_equal(np.asarray(read), np.asarray(decode(FILES["16 bits"])))


def test_predict_finds_the_images_that_training_does(mixed, trained_digits, tmp_path, capsys):
    os.symlink(mixed, tmp_path / "linked")
    os.symlink(mixed / "val", mixed / "val/0/cycle")
    (tmp_path / "outer").mkdir()
    os.symlink(mixed / "val", tmp_path / "outer/inner")
    found = {task.inner for task in find_images([str(tmp_path / "outer")])}
    assert found == {Path(path).relative_to(tmp_path / "outer") for path in images_in(tmp_path / "outer")[0]}
    assert len(found) == 2 + 2 + len(KINDS)
    assert "skipped 3 files" in capsys.readouterr().err
    arguments = [tmp_path / "outer", "--resume", trained_digits / "checkpoint.pth", "--json", tmp_path / "x.json"]
    assert predict.run(list(map(str, arguments))) == 0
    assert len(json.loads((tmp_path / "x.json").read_text())) == len(found)


# ----------------------------------------------------------------------------------------------------------------------
# Weights of timm's networks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """Bare weights of one of timm's networks with a mean of 0.5, and the folder that `save_for_hf` makes of them."""
    root = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3)
    torch.save(network.state_dict(), root / "bare.pth")
    save_for_hf(network, str(root / "folder"), model_config=dict(label_names=["0", "1", "2"]))
    return root


def timms_inputs(size: int, folder: Path) -> torch.Tensor:
    """The digits as timm prepares them for the network."""
    settings_of_timm: Any = timm.models.get_pretrained_cfg("test_vit")
    config = timm.data.resolve_data_config(pretrained_cfg=settings_of_timm.to_dict())
    transform = timm.data.create_transform(**{**config, "input_size": (3, size, size)})
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*/*.png"))])


def test_bare_weights_see_the_pixels_that_timm_says(foreign, few_digits, capsys):
    """In prediction, evaluation and exported files."""
    bare, folder = load_classifier(str(foreign / "bare.pth"), "test_vit"), load_classifier(str(foreign / "folder"))
    assert bare.description.preprocessing == folder.description.preprocessing
    expected = timms_inputs(160, few_digits / "val")
    paths = sorted((few_digits / "val").glob("*/*.png"))
    images = [read_image(path, "IMAGE") for path in paths]
    assert torch.equal(torch.stack([bare.prepare(image) for image in images]), expected)
    written = hub_settings(bare.description)["data_config"]
    assert (written["mean"], written["std"]) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert Preprocessing.from_timm(written) == bare.description.preprocessing
    assert run(*FOREIGN, "--data-path", few_digits, "--eval", "--resume", foreign / "bare.pth") == 0
    printed = capsys.readouterr().out
    assert "mean 0.5 0.5 0.5" in printed
    labels = torch.tensor([int(path.parent.name) for path in paths])
    loss = torch.nn.functional.cross_entropy(bare.run(expected), labels).item()
    assert f"loss {loss:.4f}, 21 images" in printed


FOREIGN = "--model test_vit --input-size 160 --batch-size 16 --epochs 1 --num_workers 0 --device cpu".split()


def test_finetuned_foreign_weights_keep_their_normalisation(foreign, few_digits, tmp_path, capsys):
    arguments = [*FOREIGN, "--data-path", few_digits, "--output_dir", tmp_path]
    assert run(*arguments, "--finetune", foreign / "bare.pth") == 0
    assert "mean 0.5 0.5 0.5" in capsys.readouterr().out
    classifier = load_classifier(str(tmp_path / "checkpoint.pth"))
    assert classifier.description.preprocessing == load_classifier(str(foreign / "folder")).description.preprocessing
    loss = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])["test_loss"]
    assert run(*arguments, "--eval", "--resume", tmp_path / "checkpoint.pth") == 0
    assert f"loss {loss:.4f}, 21 images" in capsys.readouterr().out
    assert run(*arguments, "--finetune", foreign / "bare.pth", "--auto-resume") == 0
    assert "the run in" in capsys.readouterr().out


def test_a_teacher_sees_its_own_normalisation(foreign, few_digits):
    teacher = ["--distillation-type", "hard", "--teacher-model", "test_vit", "--teacher-path", foreign / "bare.pth"]
    arguments = ["--data-path", few_digits, "--input-size", 160, *teacher, "--device", "cpu"]
    args = main.build_parser().parse_args(list(map(str, arguments)))
    train, published = main.build_data(args, is_train=True), Preprocessing.for_size(160)
    criterion = main.build_criterion(args, torch.nn.Linear(1, 1), train, published, False)
    assert isinstance(criterion.teacher, Renormalised)
    pixels = torch.rand(2, 3, 160, 160)
    student = transforms.Normalize(published.mean, published.std)(pixels)
    network = load_classifier(str(foreign / "folder"))
    torch.testing.assert_close(criterion.teacher(student), network.run((pixels - 0.5) / 0.5), rtol=1e-4, atol=1e-5)
