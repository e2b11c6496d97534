"""Images of all kinds as predict.py and the other tools read them; files found by name; pictures with classes."""

import io

import numpy as np
import pytest
from conftest import encoded
from PIL import Image

from sepvit_lib.common.errors import UserError
from sepvit_lib.inference.images import find_images, read_image
from sepvit_lib.inference.pictures import with_classes

RED, WHITE = (254, 0, 0), (255, 255, 255)


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to the right
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    upright = read_image(encoded(image, "JPEG", exif=exif, quality=100), "IMAGE")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[1] < 60  # red is at the top
    assert upright.getpixel((10, 35))[1] > 200


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_files_have_the_pixels_of_validation(mode):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = encoded(Image.fromarray(noise).convert(mode), "JPEG")
    assert read_image(file, "IMAGE") == Image.open(io.BytesIO(file)).convert("RGB")


def test_palette_transparency_and_bilevel():
    palette = Image.new("RGB", (4, 4), RED).quantize()
    assert read_image(encoded(palette, "GIF"), "IMAGE").getpixel((0, 0)) == RED
    clear = Image.new("RGBA", (4, 4), (*RED, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    image = read_image(encoded(clear, "PNG"), "IMAGE")
    assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == (WHITE, RED)
    assert read_image(encoded(Image.new("1", (4, 4), 1), "PNG"), "IMAGE").getpixel((0, 0)) == WHITE


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
    image = read_image(encoded(Image.fromarray(values), kind), "IMAGE")
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), WHITE]


def test_cmyk_is_read_as_in_training():
    """By Pillow's formula, as in the published runs, whatever the profile."""
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert read_image(encoded(cyan, "TIFF"), "IMAGE").getpixel((4, 4)) == (0, 255, 255)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        red, _, blue = read_image(file, "IMAGE").getpixel((4, 4))
        assert (red > 200, blue < 60) == (True, True)


def test_formats_for_which_programs_are_started_are_refused():
    file = encoded(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(UserError, match=r"^IMAGE x: cannot be read \(not an image, or damaged\)$"):
        read_image(file, "IMAGE x")


def test_an_image_too_large_to_decode_is_refused(monkeypatch):
    file = encoded(Image.new("1", (400, 400)), "PNG")
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
    picture = with_classes(image, [("a very long name of a class " * 9, 0.75), ("b", 0.25)])
    assert picture.width >= 320  # enlarged, so that the names can be read
    assert picture.getpixel((0, 0)) == RED
    bars = np.asarray(picture)[picture.width * 30 // 50 :]
    assert (bars < 128).any()  # there is text
    assert (bars[:, -1] == 255).all()  # which does not run over the edge
