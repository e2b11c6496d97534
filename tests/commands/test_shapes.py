"""Image shapes, channels and normalisation: from the command line to checkpoints, and from there to every command."""

import io
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import timm
import torch
from conftest import ROOT, SMALLEST, differences, refusal
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from timm.models import adapt_input_conv

import main
import predict
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.pipeline.image_files import as_picture, decode_channels
from sepvit_lib.pipeline.preprocessing import Preprocessing
from tools import export, visualize

CHANNELS = 5


def run(*arguments: object) -> int:
    return main.run(list(map(str, arguments)))


def photograph(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


# ----------------------------------------------------------------------------------------------------------------------
# Preprocessing
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
@pytest.mark.parametrize("image", [(100, 100), (120, 80), (80, 300), (50, 40)])
def test_preprocessing_is_that_of_timm(size, image):
    """Also for images that are smaller than the input in one side: nothing is padded."""
    own = Preprocessing.for_size(size).varied(mean=[0.4], std=[0.3, 0.2, 0.1], crop_pct=0.8, interpolation="bilinear")
    theirs = create_transform(
        size, mean=(0.4, 0.4, 0.4), std=(0.3, 0.2, 0.1), crop_pct=0.8, interpolation="bilinear", crop_mode="center"
    )
    assert own.size == size
    assert own.resize == 80
    picture = photograph(*image)
    torch.testing.assert_close(own.transform()(picture), theirs(picture), atol=0, rtol=0)


def test_tensors_are_resized_like_pictures():
    picture, own = photograph(120, 90), Preprocessing.for_size((64, 96))
    tensor = decode_channels(picture, 3, "stored")
    difference = (own.transform()(tensor) - own.transform()(picture)).abs() * torch.tensor(own.std)[:, None, None]
    assert difference.mean() * 255 < 1
    long = torch.rand(CHANNELS, 2, 5000)
    assert own.bounded(long).shape[2] < 5000


@pytest.mark.parametrize(("flags", "words"), [("--mean 0.1 0.2", "--mean 0.1 0.2"), ("--input-size 1 2 3", "1 2 3")])
def test_mistakes(flags, words, few_digits, tmp_path, capsys):
    arguments = [*SMALLEST, "--data-path", few_digits, "--output_dir", tmp_path / "run", *flags.split()]
    assert words in refusal(main.run, "main", arguments, capsys)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Rectangles
# ----------------------------------------------------------------------------------------------------------------------


def test_rectangles_through_every_command(few_digits, tmp_path, capsys):
    """The checkpoint's size and preprocessing are used everywhere, and a run is resumed with them only."""
    folder, image = tmp_path / "run", next(few_digits.glob("val/0/*"))
    shared = [*SMALLEST, "--data-path", few_digits, "--device", "cpu", "--input-size", 32, 48]
    flags = ["--mean", 0.5, "--std", 0.2, 0.3, 0.4, "--crop-pct", 1, "--interpolation", "bilinear"]
    assert run(*shared, *flags, "--output_dir", folder) == 0
    path = folder / "checkpoint.pth"
    expected = Preprocessing((32, 48), 32, (0.5, 0.5, 0.5), (0.2, 0.3, 0.4), "bilinear")
    classifier = load_classifier(str(path))
    assert classifier.description.preprocessing == expected
    assert run(*shared, "--eval", "--resume", path) == 0
    losses = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    assert losses[-1] == losses[-2]
    assert predict.run([str(image), "--resume", str(path), "--device", "cpu"]) == 0
    assert visualize.run([str(image), "--resume", str(path), "--out", str(tmp_path / "figures")]) == 0
    formats = ["--formats", "safetensors", "torchscript", "--rounds", "1"]
    assert export.run(["--resume", str(path), "--out", str(tmp_path / "exported"), *formats]) == 0
    for exported in (next((tmp_path / "exported").glob("*-timm")), next((tmp_path / "exported").glob("*.pt"))):
        again = load_classifier(str(exported))
        assert again.description.preprocessing == expected
        torch.testing.assert_close(
            again.logits([again.prepare(photograph(70, 90))]),
            classifier.logits([classifier.prepare(photograph(70, 90))]),
        )
    resumed = [*shared, *flags, "--output_dir", folder, "--auto-resume"]
    assert run(*resumed) == 0
    for changed in (["--input-size", 48, 32], ["--mean", 0.4], ["--crop-pct", 0.9], ["--interpolation", "bicubic"]):
        capsys.readouterr()
        assert changed[0] in refusal(main.run, "main", [*resumed, *changed], capsys)


def test_a_square_is_one_number(few_digits):
    parse = main.build_parser().parse_args
    assert parse(["--input-size", "64"]).input_size == parse(["--input-size", "64", "64"]).input_size == 64
    args = parse([*map(str, SMALLEST), "--data-path", str(few_digits), "--input-size", "32", "48", "--loader", "fast"])
    data = main.build_data(args, is_train=True)
    encoded = photograph(90, 70)
    assert data.transform(data.decode(encoded)).shape == (3, 32, 48)


# ----------------------------------------------------------------------------------------------------------------------
# Channels
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spectral(tmp_path_factory) -> Path:
    """Class folders of images with five channels: TIFF files of 16 bits and NumPy arrays of floats."""
    root, generator = tmp_path_factory.mktemp("spectral"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                values = generator.random((CHANNELS, 40, 48), dtype=np.float32)
                values[label] += 1
                if number % 2:
                    np.save(folder / f"{number}.npy", values)
                else:
                    pixels = (values / 2 * 65535).astype(np.uint16)
                    tifffile.imwrite(folder / f"{number}.tif", pixels, photometric="minisblack")
    return root


def test_many_channels_through_every_command(spectral, tmp_path, capsys):
    folder, images = tmp_path / "run", spectral / "val/class0"
    shared = [*SMALLEST, "--data-path", spectral, "--device", "cpu", "--batch-size", 4, "--num_workers", 0]
    assert run(*shared, "--in-chans", CHANNELS, "--mixup", 0.8, "--output_dir", folder) == 0
    printed = capsys.readouterr().out
    assert "--in-chans" in printed
    assert "jitter" in printed
    path = folder / "checkpoint.pth"
    classifier = load_classifier(str(path))
    assert classifier.network is not None
    assert classifier.network.get_submodule("patch_embeds.0.proj").in_channels == CHANNELS
    assert classifier.description.preprocessing.mean == (0.5,) * CHANNELS
    assert run(*shared, "--eval", "--resume", path, "--in-chans", CHANNELS) == 0
    out = tmp_path / "pictures"
    arguments = [str(images), "--resume", str(path), "--device", "cpu", "--out", str(out)]
    assert predict.run(arguments) == 0
    assert len(list(out.iterdir())) == 4
    image = str(images / "1.npy")
    assert visualize.run([image, "--resume", str(path), "--out", str(tmp_path / "figures")]) == 0
    exported = tmp_path / "exported"
    formats = ["--formats", "safetensors", "onnx", "onnx-preprocessing", "--rounds", "1"]
    assert export.run(["--resume", str(path), "--out", str(exported), *formats]) == 1  # the last one needs RGB
    values = decode_channels(Path(image).read_bytes(), CHANNELS, "stored")
    for file in (next(exported.glob("*-timm")), next(exported.glob("*.onnx"))):
        again = load_classifier(str(file))
        torch.testing.assert_close(
            again.logits([again.prepare(values)]), classifier.logits([classifier.prepare(values)])
        )
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(path, weights_only=True)["model"], bare)
    assert run(*shared, "--eval", "--resume", bare, "--in-chans", CHANNELS) == 0
    assert "--loader" in refusal(main.run, "main", [*shared, "--in-chans", CHANNELS, "--loader", "fast"], capsys)
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(spectral / "val", "val")
    (tmp_path / "train.tar").symlink_to(tmp_path / "val.tar")
    packed = [*shared, "--data-path", tmp_path, "--in-chans", CHANNELS]
    capsys.readouterr()
    assert run(*packed, "--eval", "--resume", path) == 0
    assert "8 images" in capsys.readouterr().out
    for split in ("train", "val"):
        (tmp_path / "arrays" / split).mkdir(parents=True)
        shutil.copytree(images, tmp_path / "arrays" / split / "a", ignore=shutil.ignore_patterns("*.tif"))
    arrays = [*shared, "--data-path", tmp_path / "arrays", "--output_dir", tmp_path / "none"]
    assert ".npy" in refusal(main.run, "main", arrays, capsys)


def test_first_layers_are_adapted_by_timm(spectral, few_digits, tmp_path, capsys):
    """From three channels to five, and to one; the weights of other layers are kept."""
    plain = tmp_path / "plain"
    digits = [*SMALLEST, "--data-path", few_digits, "--device", "cpu", "--num_workers", 0]
    assert run(*digits, "--output_dir", plain) == 0
    tune = ["--finetune", plain / "checkpoint.pth", "--lr", 0, "--min-lr", 0, "--warmup-lr", 0, "--weight-decay", 0]
    several = [*SMALLEST, "--data-path", spectral, "--device", "cpu", "--batch-size", 4, "--num_workers", 0]
    before = torch.load(plain / "checkpoint.pth", weights_only=True)["model"]
    name = "patch_embeds.0.proj.weight"
    for channels, command in ((CHANNELS, several), (1, digits)):
        folder = tmp_path / str(channels)
        assert run(*command, *tune, "--in-chans", channels, "--output_dir", folder) == 0
        assert f"channels: adapted 1: {name}" in capsys.readouterr().out
        after = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
        torch.testing.assert_close(after[name], adapt_input_conv(channels, before[name]))
        assert {key for key in differences(before, after) if not key.startswith("/head")} == {f"/{name}"}
    assert run(*digits, "--eval", "--resume", folder / "checkpoint.pth") == 0  # in one channel, as the checkpoint says
    mistaken = [*digits, "--eval", "--resume", plain / "checkpoint.pth", "--in-chans", 1]
    assert name in refusal(main.run, "main", mistaken, capsys)


def test_resumed_runs_compute_the_same(spectral, tmp_path):
    shared = [*SMALLEST, "--data-path", spectral, "--device", "cpu", "--batch-size", 4, "--num_workers", 0]
    shared += [
        "--in-chans",
        CHANNELS,
        "--checkpoint-every",
        1,
        "--keep-checkpoints",
        9,
        "--auto-resume",
        "--output_dir",
    ]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(*shared, whole) == 0
    resumed.mkdir()
    first = min(whole.glob("checkpoint-*.pth"))
    (resumed / first.name).write_bytes(first.read_bytes())
    assert run(*shared, resumed) == 0
    one, two = (torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (whole, resumed))
    assert differences(one, two) == []


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_other_modes(channels, tmp_path):
    """Greyscale pictures keep their 16 bits; transparency is a channel."""
    generator = np.random.default_rng(0)
    if channels == 1:
        pixels = generator.integers(0, 65536, (20, 30), dtype=np.uint16)
    else:
        pixels = generator.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = decode_channels((tmp_path / "x.png").read_bytes(), channels, "stored")
    expected = torch.from_numpy(pixels.astype(np.float32) / np.iinfo(pixels.dtype).max)
    torch.testing.assert_close(image, expected[None] if channels == 1 else expected.permute(2, 0, 1))
    assert as_picture(image).size == (30, 20)
    with pytest.raises(ValueError, match="channels"):
        decode_channels((tmp_path / "x.png").read_bytes(), 7, "stored")


def test_damaged_arrays_are_unreadable():
    values: Any = np.full((CHANNELS, 4, 4), np.nan, dtype=np.float32)
    file = ROOT / "README.md"
    stream = io.BytesIO()
    np.save(stream, values)
    with pytest.raises(ValueError, match="non-finite"):
        decode_channels(stream.getvalue(), CHANNELS, "stored")
    with pytest.raises(UnidentifiedImageError):
        decode_channels(file.read_bytes(), CHANNELS, "stored")


def test_bare_weights_show_their_channels(tmp_path):
    network, path = timm.create_model("SepViT_Lite", in_chans=CHANNELS).eval(), str(tmp_path / "bare.pth")
    torch.save(network.state_dict(), path)
    images = torch.randn(1, CHANNELS, 224, 224)
    hub = torch.hub.load(str(ROOT), "SepViT_Lite", source="local", checkpoint=path).eval()
    classifier = load_classifier(path)
    assert classifier.description.preprocessing.channels == CHANNELS
    with torch.no_grad():
        torch.testing.assert_close(hub(images), network(images))
        torch.testing.assert_close(classifier.logits([images[0]]), network(images))
