"""One file has one reading: in training by every loader, in evaluation, prediction and export."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SMALL, SMALLEST, command, link_digits, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import val_loader
from timm.models import save_for_hf
from torchvision import transforms

import main
import predict
from datasets import LoaderSettings, build_train_loader, epoch_batches
from engine import Renormalised
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.inference.images import find_images, read_image
from sepvit_lib.training.augmentation import collate_crops
from sepvit_lib.training.images import count_turned, decode, images_in, orientation_for
from sepvit_lib.training.preprocessing import MAX_ASPECT, Preprocessing
from sepvit_lib.training.samples import read_sample, sampled_files
from tools.export_formats import hub_settings

TURNED = 3  # EXIF orientation: upside down


def exif(orientation: int) -> Image.Exif:
    metadata = Image.Exif()
    metadata[0x0112] = orientation
    return metadata


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256 if mode == "uint8" else 65536, shape).astype(mode)


# Files of all kinds, with the pixels that everything reads.
DEEP = noise("uint16", 40, 40)
CLEAR = np.dstack([noise("uint8", 40, 40, 3), np.full((40, 40), 64, np.uint8)])
PHOTO = Image.fromarray(noise("uint8", 40, 40, 3)).resize((64, 48))
FILES = {
    "16 bits": encoded(Image.fromarray(DEEP), "PNG"),
    "float": encoded(Image.fromarray((DEEP / 65535).astype(np.float32)), "TIFF"),
    "transparent": encoded(Image.fromarray(CLEAR), "PNG"),
    "turned": encoded(PHOTO, "JPEG", exif=exif(TURNED), quality=95),
    "CMYK": encoded(PHOTO.convert("CMYK"), "JPEG"),
}


def test_pixels():
    """What `decode` does, by arithmetic of its own."""
    expected = np.repeat(np.round(DEEP / 65535 * 255).astype(np.uint8)[..., None], 3, 2)
    assert np.array_equal(np.asarray(decode(FILES["16 bits"])), expected)
    assert np.abs(np.asarray(decode(FILES["float"])).astype(int) - expected).max() <= 1
    on_white = CLEAR[..., :3] * (64 / 255) + 255 * (1 - 64 / 255)
    assert np.abs(np.asarray(decode(FILES["transparent"])) - on_white).max() <= 1
    stored = np.asarray(Image.open(io.BytesIO(FILES["turned"])).convert("RGB"))
    assert np.array_equal(np.asarray(decode(FILES["turned"])), stored)
    assert np.array_equal(np.asarray(decode(FILES["turned"], "exif")), stored[::-1, ::-1])


def written_as(source: str, root: Path) -> list[str]:
    """Write a data set of the files, one class for each and validation alike. Returns main.py's arguments."""
    names = {"train": "train", "val": "val" if source in ("folder", "archive") else "validation"}
    for split, folder in names.items():
        for number, content in enumerate(FILES.values()):
            path = root / "data" / folder / str(number) / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        if source == "archive":
            with tarfile.open(root / f"{split}.tar", "w") as archive:
                archive.add(root / "data" / folder, ".")
        if source == "webdataset":
            with tarfile.open(root / f"x-{split}-0.tar", "w") as archive:
                for number, content in enumerate(FILES.values()):
                    for name, bytes_of in ((f"{number}.png", content), (f"{number}.cls", str(number).encode())):
                        member = tarfile.TarInfo(name)
                        member.size = len(bytes_of)
                        archive.addfile(member, io.BytesIO(bytes_of))
    if source == "webdataset":
        return [
            "--data-set",
            "wds/x",
            "--data-path",
            str(root),
            "--num-classes",
            "5",
            "--train-split",
            "x-train-{0..0}.tar|5",
            "--val-split",
            "x-val-{0..0}.tar|5",
        ]
    if source in ("hfds", "hfids"):
        extra = ["--train-num-samples", "5", "--val-num-samples", "5"] if source == "hfids" else []
        return [
            "--data-set",
            f"{source}/{root / 'data'}",
            "--data-path",
            str(root / "cache"),
            "--num-classes",
            "5",
            *extra,
        ]
    return ["--data-path", str(root if source == "archive" else root / "data")]


CHECK = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_reading
test_reading.check({source!r}, {arguments!r})
"""


def check(source: str, arguments: list[str]) -> None:
    """Compare what training and validation read with `decode`, in both orientations."""
    size = ["--input-size", "32", "--num_workers", "0"]
    for orientation in ("stored", "exif"):
        args = main.build_parser().parse_args([*arguments, *size, "--orientation", orientation, "--batch-size", "5"])
        transform = Preprocessing.for_size(32).transform()
        images, targets = next(iter(val_loader(args)))
        assert sorted(targets.tolist()) == [0, 1, 2, 3, 4]
        for image, target in zip(images, targets.tolist()):
            assert torch.equal(image, transform(decode(list(FILES.values())[target], orientation)))
        args.batch_size = 1
        data = replace(main.build_data(args, is_train=True), transform=np.asarray)
        loader = build_train_loader(data, main.settings_from(args, LoaderSettings))
        seen = [(image[0].numpy(), target.item()) for image, target, _ in epoch_batches(loader, 0, 0, 1, print)]
        assert sorted(target for _, target in seen) == [0, 1, 2, 3, 4]
        for image, target in seen:
            assert np.array_equal(image, np.asarray(decode(list(FILES.values())[target], orientation)))


@pytest.mark.parametrize("source", ["folder", "archive", "webdataset", "hfds", "hfids"])
def test_every_source_reads_alike(source, tmp_path):
    script = tmp_path / "check.py"
    arguments = written_as(source, tmp_path)
    script.write_text(CHECK.format(root=str(ROOT), tests=str(ROOT / "tests"), source=source, arguments=arguments))
    succeed(script=script, cwd=tmp_path, environment={"HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("orientation", ["stored", "exif"])
@pytest.mark.parametrize("name", FILES)
def test_both_loaders_train_on_the_same_pixels(name, orientation, tmp_path):
    """Crops of the whole image differ by resizing alone, of which the mean knows nothing."""
    content = FILES[name] if name != "turned" else encoded(gradient(), "JPEG", exif=exif(TURNED), quality=95)
    means = []
    for loader in ("faithful", "fast"):
        args = main.build_parser().parse_args(
            [
                "--orientation",
                orientation,
                "--loader",
                loader,
                "--scale",
                "1",
                "1",
                "--ratio",
                "1",
                "1",
                "--input-size",
                "48",
            ]
        )
        data = main.prepared(main.ImageData(None, 2), True, main.transform_settings(args))
        decoded = data.decode(content)
        if loader == "faithful":
            decoded = data.transform.transforms[0](decoded)
        pixels = np.asarray(decoded, dtype=float)
        means.append([pixels[:24].mean(), pixels[24:].mean()])
    assert np.abs(np.subtract(*means)).max() < 4
    if name == "turned":
        dark, bright = means[0] if orientation == "stored" else means[0][::-1]
        assert bright - dark > 60


def gradient() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB")


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
    succeed(*SMALL, "--data-path", images, "--output_dir", tmp_path, "--eval", "--resume", resume)
    assert json.loads((tmp_path / "eval.json").read_text())["test_acc1"] == 100
    printed = succeed(images / "val", "--resume", resume, "--topk", 1, "--json", "-", script="predict.py")
    found = {entry["image"]: entry["predictions"][0]["class"] for entry in json.loads(printed)}
    assert len(found) == 21
    assert all(Path(image).parent.name == label for image, label in found.items())
    classifier = load_classifier(str(resume))
    copy = type(classifier.description).from_json(classifier.description.to_json())
    assert copy.orientation == classifier.description.orientation == orientation
    other = "exif" if orientation == "stored" else "stored"
    succeed(
        *SMALL, "--data-path", images, "--output_dir", tmp_path, "--eval", "--resume", resume, "--orientation", other
    )
    assert json.loads((tmp_path / "eval.json").read_text())["test_acc1"] < 100


def test_exported_folders_keep_the_orientation(trained_digits, tmp_path):
    checkpoint = torch.load(trained_digits / "checkpoint.pth", weights_only=True)
    torch.save({**checkpoint, "reading": dict(orientation="stored", turned=1, sampled=9)}, tmp_path / "turned.pth")
    succeed(
        "--resume",
        tmp_path / "turned.pth",
        "--out",
        tmp_path / "out",
        "--formats",
        "safetensors",
        "torchscript",
        "--rounds",
        1,
        script="tools/export.py",
    )
    for name in ("SepViT_Lite-timm", "SepViT_Lite-torchscript.pt"):
        assert load_classifier(str(tmp_path / "out" / name)).description.orientation == "stored"


def test_ignored_orientations_are_counted_said_and_kept(photographs, tmp_path):
    arguments = [*SMALLEST, "--data-path", photographs["stored"], "--output_dir", tmp_path / "run", "--epochs", 1]
    printed = succeed(*arguments)
    assert "WARNING: --orientation stored: 48 of 48 sampled training images" in printed
    kept = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    assert kept["reading"] == dict(orientation="stored", turned=48, sampled=48)
    assert kept["args"]["orientation"] == "stored"
    printed = succeed(*arguments, "--orientation", "exif", "--output_dir", tmp_path / "upright")
    assert "EXIF" not in printed
    assert torch.load(tmp_path / "upright/checkpoint.pth", weights_only=True)["reading"] == dict(orientation="exif")
    refused = command(*arguments, "--output_dir", tmp_path / "upright", "--auto-resume", "--orientation", "stored")
    assert (refused.returncode, "--orientation stored (was exif)" in refused.stderr) == (2, True)
    succeed(
        *arguments, "--output_dir", tmp_path / "upright", "--resume", tmp_path / "upright/checkpoint.pth", "--epochs", 2
    )
    assert torch.load(tmp_path / "upright/checkpoint.pth", weights_only=True)["args"]["orientation"] == "exif"


def test_orientations_are_counted_in_every_source(tmp_path):
    for source in ("folder", "archive", "webdataset"):
        arguments = written_as(source, tmp_path / source)
        data = main.build_data(main.build_parser().parse_args(arguments), is_train=True)
        assert count_turned(sampled_files(data.dataset)) == dict(turned=1, sampled=5)


def test_another_orientation_of_a_resumed_run_is_kept(photographs, tmp_path):
    """What predict.py reads follows what the network was trained on last."""
    arguments = [*SMALLEST, "--data-path", photographs["stored"], "--output_dir", tmp_path / "run"]
    succeed(*arguments)
    succeed(*arguments, "--resume", tmp_path / "run/checkpoint.pth", "--epochs", 2, "--orientation", "exif")
    assert torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["reading"] == dict(orientation="exif")


def test_a_run_that_may_resume_reads_as_it_is_told(trained_digits, few_digits, tmp_path):
    """The weights that it starts from are of an older version, without orientations; the run is not."""
    succeed(
        *SMALL,
        "--data-path",
        few_digits,
        "--output_dir",
        tmp_path,
        "--auto-resume",
        "--orientation",
        "exif",
        "--finetune",
        trained_digits / "checkpoint.pth",
    )
    kept = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert kept["args"]["orientation"] == kept["reading"]["orientation"] == "exif"


def test_folders_read_by_torchvision_are_read_alike(mixed, tmp_path):
    """`torch/image_folder` is a folder of class folders, hidden ones excepted."""
    (mixed / "val/1/deep.png").write_bytes(FILES["16 bits"])
    flags = ["--data-set", "torch/image_folder", "--data-path", str(mixed), "--val-split", "val", "--num-classes", "2"]
    data = main.build_data(main.build_parser().parse_args(flags), is_train=False)
    assert (data.classes, len(data)) == (["0", "1"], 2 + 2 + len(KINDS) + 1)
    names = [Path(path).name for path, _ in data.dataset.samples]
    read = read_sample(data.dataset, names.index("deep.png"), (), data.decode)[0]
    assert np.array_equal(np.asarray(read), np.asarray(decode(FILES["16 bits"])))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_pixel_that_is_not_finite_spoils_no_other(value):
    pixels = np.array([[0, 0.5, 1, value]], np.float32)
    read = np.asarray(decode(encoded(Image.fromarray(pixels), "TIFF")))
    assert read[0, :3, 0].tolist() == [0, 128, 255]


def test_orientation_of_predictions():
    assert orientation_for(None) == orientation_for(dict(orientation="stored", turned=0)) == "exif"
    assert orientation_for(dict(orientation="stored", turned=1)) == "stored"


# ----------------------------------------------------------------------------------------------------------------------
# Thin images
# ----------------------------------------------------------------------------------------------------------------------


@given(st.integers(8, 60), st.floats(1, MAX_ASPECT), st.booleans())
@settings(max_examples=50, deadline=None)
def test_ordinary_images_are_prepared_as_published(shorter, aspect, is_tall):
    size = (shorter, int(shorter * aspect))
    image = Image.fromarray(noise("uint8", *(size if is_tall else size[::-1]), 3))
    published = transforms.Compose(
        [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    assert np.array_equal(np.asarray(Preprocessing.for_size(224).crop(image)), np.asarray(published(image)))


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (2, 100), (3, 4001)])
def test_the_middle_of_thin_images_is_prepared(size):
    image = Image.new("RGB", size, "black")
    middle = (size[0] // 2, size[1] // 2)
    image.paste("white", (middle[0] - 1, middle[1] - 1, middle[0] + 2, middle[1] + 2))
    cropped = np.asarray(Preprocessing.for_size(224).crop(image), dtype=float)
    assert cropped.shape == (224, 224, 3)
    assert cropped[112, 112].mean() > 128


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
    printed = succeed(
        tmp_path,
        "--resume",
        trained_digits / "checkpoint.pth",
        "--topk",
        1,
        "--json",
        "-",
        "--out",
        tmp_path / "pictures",
        script=tmp_path / "thin.py",
    )
    assert [entry["predictions"][0]["class"] for entry in json.loads(printed)][:1] == ["1"]
    assert len(json.loads(printed)) == 3
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


def test_all_images_of_a_class_folder_are_read(mixed, tmp_path):
    printed = succeed(*SMALLEST, "--data-path", mixed, "--output_dir", tmp_path / "run", "--batch-size", 2)
    for split in ("training", "validation"):
        assert f"WARNING: {mixed}, {split} images: skipped 3 files" in printed
    assert "2 .txt, 1 .psd" in printed
    assert f"{2 + 2 + len(KINDS)} images" in printed
    assert torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["classes"] == ["0", "1"]


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


def test_bare_weights_see_the_pixels_that_timm_says(foreign, few_digits, tmp_path):
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
    printed = succeed(
        "--model",
        "test_vit",
        "--input-size",
        160,
        "--data-path",
        few_digits,
        "--eval",
        "--resume",
        foreign / "bare.pth",
        "--num_workers",
        0,
        "--device",
        "cpu",
    )
    assert "mean 0.5 0.5 0.5" in printed
    labels = torch.tensor([int(path.parent.name) for path in paths])
    loss = torch.nn.functional.cross_entropy(bare.run(expected), labels).item()
    assert f"loss {loss:.4f}, 21 images" in printed


@pytest.mark.parametrize("trained_at", [32, 160, 192, 224, 384])
def test_networks_are_evaluated_at_other_sizes_as_published(trained_at):
    saved = dict(preprocessing=Preprocessing.for_size(trained_at).to_json())
    for size in (32, 160, 224, 288):
        assert Preprocessing.of_weights(saved, "SepViT_Tiny", size) == Preprocessing.for_size(size)


def test_finetuned_foreign_weights_keep_their_normalisation(foreign, few_digits, tmp_path):
    arguments = [
        "--model",
        "test_vit",
        "--input-size",
        160,
        "--data-path",
        few_digits,
        "--batch-size",
        16,
        "--epochs",
        1,
        "--num_workers",
        0,
        "--device",
        "cpu",
        "--output_dir",
        tmp_path,
    ]
    printed = succeed(*arguments, "--finetune", foreign / "bare.pth")
    assert "mean 0.5 0.5 0.5" in printed
    classifier = load_classifier(str(tmp_path / "checkpoint.pth"))
    assert classifier.description.preprocessing == load_classifier(str(foreign / "folder")).description.preprocessing
    top1 = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])["test_loss"]
    printed = succeed(*arguments, "--eval", "--resume", tmp_path / "checkpoint.pth")
    assert f"loss {top1:.4f}, 21 images" in printed
    resumed = succeed(*arguments, "--finetune", foreign / "bare.pth", "--auto-resume")
    assert "the run in" in resumed


@pytest.mark.parametrize("loader", ["faithful", "fast"])
def test_training_images_are_normalised_as_validation_images(loader):
    args = main.build_parser().parse_args(
        ["--loader", loader, "--input-size", "32", "--aa=", "--color-jitter", "0", "--reprob", "0"]
    )
    own = Preprocessing((32, 32), 34, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    data = main.prepared(main.ImageData(None, 2), True, main.transform_settings(args, own))
    grey = encoded(Image.new("RGB", (40, 40), (51, 102, 204)), "PNG")
    sample = data.transform(data.decode(grey))
    prepare = main.build_preparation(args, own, main.build_precision(args, torch.device("cpu")))
    batch = prepare(collate_crops([sample])) if loader == "fast" else sample[None]
    expected = (torch.tensor([51, 102, 204]) / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch[0, :, 16, 16], expected)


def test_a_teacher_sees_its_own_normalisation(foreign, few_digits):
    arguments = [
        "--data-path",
        few_digits,
        "--input-size",
        160,
        "--distillation-type",
        "hard",
        "--teacher-model",
        "test_vit",
        "--teacher-path",
        foreign / "bare.pth",
        "--device",
        "cpu",
    ]
    args = main.build_parser().parse_args(list(map(str, arguments)))
    train, published = main.build_data(args, is_train=True), Preprocessing.for_size(160)
    precision = main.build_precision(args, torch.device("cpu"))
    criterion = main.build_criterion(args, train, published, precision, soft_targets=False)
    assert isinstance(criterion.teacher, Renormalised)
    pixels = torch.rand(2, 3, 160, 160)
    student = transforms.Normalize(published.mean, published.std)(pixels)
    network = load_classifier(str(foreign / "folder"))
    torch.testing.assert_close(criterion.teacher(student), network.run((pixels - 0.5) / 0.5), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The demo
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["16 bits", "turned"])
def test_the_demo_on_other_files(kind, demo_data, tmp_path):
    """The digits as PNGs of 16 bits, and as JPEGs upside down with a tag: predicted and evaluated alike."""
    for path in demo_data.glob("imagenet/*/*/*.png"):
        image, target = Image.open(path).convert("L"), tmp_path / path.relative_to(demo_data)
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind == "16 bits":
            Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(target)
        else:
            image.rotate(180).save(target.with_suffix(".jpg"), quality=95, exif=exif(TURNED))
    run = tmp_path / "run"
    recipe = ["--config", ROOT / "recipes/digits.yaml", "--data-path", tmp_path / "imagenet", "--output_dir", run]
    succeed(*recipe, timeout=1800)
    succeed(*recipe, "--eval", "--resume", run / "checkpoint.pth")
    evaluated = json.loads((run / "eval.json").read_text())["test_acc1"]
    output = ["--topk", 1, "--json", "-"]
    printed = succeed(tmp_path / "imagenet/val", "--resume", run / "checkpoint.pth", *output, script="predict.py")
    predictions = json.loads(printed)
    right = [Path(entry["image"]).parent.name == entry["predictions"][0]["class"] for entry in predictions]
    print(f"{kind}: evaluated {evaluated:.2f} %, predicted {100 * np.mean(right):.2f} % of {len(right)} images")
    assert evaluated >= 95
    assert 100 * np.mean(right) == pytest.approx(evaluated)
