"""What the pixels of an image file are, and how they become a network's input."""

import io

import numpy as np
import pytest
import torch
from conftest import TURNED, encoded, exif
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

import main
from sepvit_lib.pipeline.image_files import decode, orientation_for
from sepvit_lib.pipeline.preprocessing import MAX_ASPECT, Preprocessing


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


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_pixel_that_is_not_finite_spoils_no_other(value):
    pixels = np.array([[0, 0.5, 1, value]], np.float32)
    read = np.asarray(decode(encoded(Image.fromarray(pixels), "TIFF")))
    assert read[0, :3, 0].tolist() == [0, 128, 255]


def test_orientation_of_predictions():
    assert orientation_for(None) == orientation_for(dict(orientation="stored", turned=0)) == "exif"
    assert orientation_for(dict(orientation="stored", turned=1)) == "stored"


@pytest.mark.parametrize("orientation", ["stored", "exif"])
@pytest.mark.parametrize("name", FILES)
def test_both_loaders_train_on_the_same_pixels(name, orientation):
    """Crops of the whole image differ by resizing alone, of which the mean knows nothing."""
    gradient = Image.linear_gradient("L").convert("RGB")
    content = FILES[name] if name != "turned" else encoded(gradient, "JPEG", exif=exif(TURNED), quality=95)
    means = []
    for loader in ("faithful", "fast"):
        flags = f"--orientation {orientation} --loader {loader} --scale 1 1 --ratio 1 1 --input-size 48".split()
        args = main.build_parser().parse_args(flags)
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


@pytest.mark.parametrize("loader", ["faithful", "fast"])
def test_training_images_are_normalised_as_validation_images(loader):
    flags = ["--loader", loader, *"--input-size 32 --aa= --color-jitter 0 --reprob 0".split()]
    args = main.build_parser().parse_args(flags)
    own = Preprocessing((32, 32), 34, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    data = main.prepared(main.ImageData(None, 2), True, main.transform_settings(args, own))
    grey = encoded(Image.new("RGB", (40, 40), (51, 102, 204)), "PNG")
    prepare = main.build_preparation(args, own, main.build_precision(args, torch.device("cpu")))
    batch = prepare(data.transform(data.decode(grey))[None])
    expected = (torch.tensor([51, 102, 204]) / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch[0, :, 16, 16], expected)


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


@pytest.mark.parametrize("trained_at", [32, 160, 192, 224, 384])
def test_networks_are_evaluated_at_other_sizes_as_published(trained_at):
    saved = dict(preprocessing=Preprocessing.for_size(trained_at).to_json())
    for size in (32, 160, 224, 288):
        assert Preprocessing.of_weights(saved, "SepViT_Tiny", size) == Preprocessing.for_size(size)
