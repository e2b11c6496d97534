"""`--loader fast`: the faithful loader's crops and augmentation; JPEGs decoded at the size that the crop needs, and the
end of the transform on the device."""

import io
import pickle
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, differences, refusal
from PIL import Image, ImageFilter
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms

import datasets
import main
from datasets import DeviceTransform, LoaderSettings, build_train_loader, epoch_batches
from sepvit_lib.common.errors import UserError
from sepvit_lib.pipeline.data_sets.base import Images
from sepvit_lib.pipeline.image_files import decode
from sepvit_lib.pipeline.scaled_decoding import CropDecoder
from sepvit_lib.pipeline.unreadable import unreadable_images
from sepvit_lib.run.state import Precision
from utils import seed_everything

CPU = Precision(torch.device("cpu"), None)
PLAIN = "--aa= --color-jitter 0 --reprob 0".split()


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image with smooth areas, edges and some noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray((pixels + rng.integers(-6, 7, pixels.shape)).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, kind: str = "JPEG", **how) -> bytes:
    """The content of a JPEG, or of another file."""
    content = io.BytesIO()
    image.save(content, kind, **{"quality": 92, **how})
    return content.getvalue()


def levels(a, b) -> np.ndarray:
    """Differences in grey levels."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))


# --------------------------------------------------------------------------------------------------------------- crops


def crop_pair(content, size, seed, interpolation="bicubic"):
    """The crop of the faithful loader and that of the fast one, for the same random numbers."""
    crop = RandomResizedCropAndInterpolation(size, interpolation=interpolation)
    seed_everything(seed)
    faithful = crop(decode(content))
    state = random.getstate()
    seed_everything(seed)
    fast = CropDecoder(crop)(content)
    assert random.getstate() == state, "both draw the same numbers"
    assert fast.size == (size, size)
    return faithful, fast


EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotated by 90°
JPEGS = {
    "4:2:0": jpeg(photograph(300, 210), subsampling="4:2:0"),
    "4:2:2": jpeg(photograph(211, 300), subsampling="4:2:2"),
    "4:4:4": jpeg(photograph(300, 210), subsampling="4:4:4"),
    "grey": jpeg(photograph(300, 210).convert("L")),
    "progressive": jpeg(photograph(300, 210), progressive=True),
    "EXIF": jpeg(photograph(300, 210), exif=EXIF),
    "MPO": jpeg(photograph(300, 210), "MPO"),
}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("kind", JPEGS)
def test_crops_equal_pils(kind, interpolation):
    """Boxes less than twice as large as the crop are decoded and resized to the same pixels, to a level or two."""
    for seed in range(8):
        faithful, fast = crop_pair(JPEGS[kind], 112, seed, interpolation)
        assert levels(faithful, fast).max() <= 2
        assert levels(faithful, fast).mean() < 0.3


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scaled_decoding_keeps_the_box(scale):
    """Its corner moves to the nearest pixel, by half a pixel at most. A quarter of a pixel more would be seen."""
    size, shares = 48, (0.8, 0.9)
    content = jpeg(photograph(scale * 77, scale * 71).filter(ImageFilter.GaussianBlur(scale)))
    image = Image.open(io.BytesIO(content))
    crop = RandomResizedCropAndInterpolation(size, shares, interpolation="bicubic")
    for seed in range(4):
        seed_everything(seed)
        top, left, rows, columns = crop.get_params(image, shares, crop.ratio)
        x, y = (
            scale * min(round(corner / scale), int((limit - side) / scale))
            for corner, side, limit in ((left, columns, image.width), (top, rows, image.height))
        )
        assert max(abs(x - left), abs(y - top)) <= scale / 2
        seed_everything(seed)
        fast = CropDecoder(crop)(content)
        distances = {}
        quarter = columns / size / 4
        for across, down in ((0, 0), (quarter, 0), (-quarter, 0), (0, quarter), (0, -quarter)):
            box = [x + across, y + down, x + columns + across, y + rows + down]
            box = [min(max(edge, 0), limit) for edge, limit in zip(box, 2 * image.size)]
            pils = image.resize((size, size), Image.Resampling.BICUBIC, box)
            distances[across, down] = levels(pils, fast).mean()
        assert distances[0, 0] < 1.5
        assert min(distances, key=distances.get) == (0, 0)


def test_boxes_are_decoded_at_a_fraction_where_that_is_enough():
    content = jpeg(photograph(1003, 801))
    cases = ((401, 801, 801), (400, 401, 400.5), (200, 201, 200.25), (100, 101, 100.125), (50, 101, 100.125))
    for size, side, height in cases:
        decoder = CropDecoder(RandomResizedCropAndInterpolation(size, (1, 1), (1.0, 1.0)))
        part = decoder.decode(content)  # the box is 801 × 801
        assert part.pixels.shape[:2] == (side, side)
        assert part.height == part.width == height
        assert decoder.resize(part).size == (size, size)


def test_crops_of_any_size():
    """Rounding makes no crop too small or too large."""
    content = jpeg(photograph(331, 257))
    for size in range(33, 140, 3):
        crop_pair(content, size, size)


def test_other_images_are_decoded_by_pil():
    rgb = photograph(120, 90)
    for kind, image in (("PNG", rgb), ("PNG", rgb.convert("P")), ("WEBP", rgb), ("JPEG", rgb.convert("CMYK"))):
        assert np.array_equal(*crop_pair(jpeg(image, kind), 40, 3)), kind
    assert np.array_equal(*crop_pair(rgb, 40, 3))  # from data sets that keep images


def test_damaged_and_large_jpegs_are_refused_as_by_pil(monkeypatch):
    content, decoder = jpeg(photograph(300, 210)), CropDecoder(RandomResizedCropAndInterpolation(64))
    for damaged in (content[: len(content) // 2], content[:40], b"\xff\xd8no image"):
        with pytest.raises(OSError) as refused:  # noqa: PT011 the type is what PIL raises
            Image.open(io.BytesIO(damaged)).convert("RGB")
        with pytest.raises(type(refused.value)):
            decoder(damaged)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        decoder(content)


def test_decoders_reach_spawned_workers():
    decoder = CropDecoder(RandomResizedCropAndInterpolation(64, interpolation="random"))
    crops = []
    for one in (decoder, pickle.loads(pickle.dumps(decoder))):
        seed_everything(3)
        crops.append(one(JPEGS["4:2:0"]))
    assert np.array_equal(*crops)


# -------------------------------------------------------------------------------------------------------------- device


def training_transform(*flags):
    args = main.build_parser().parse_args(["--input-size", "64", *flags])
    return datasets.build_transform(True, main.transform_settings(args))


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
def test_the_device_ends_the_transform_as_timm_does(remode):
    """It normalises as in the workers, and erases by the recipe's random erasing, image by image."""
    flags = ["--reprob", "0.5", "--recount", "3", "--remode", remode]
    *_, to_tensor, normalise, _ = training_transform(*flags).transforms
    images = [photograph(64, 64, seed) for seed in range(20)]
    expected = torch.stack([normalise(to_tensor(image)) for image in images])
    pixels = torch.stack([transforms.functional.pil_to_tensor(image) for image in images])
    plain = DeviceTransform(training_transform("--reprob", "0"), CPU)(pixels)
    torch.testing.assert_close(plain, expected)
    seed_everything(1)
    erased = DeviceTransform(training_transform(*flags), CPU)(pixels)
    seed_everything(1)
    torch.testing.assert_close(erased, RandomErasing(0.5, mode=remode, max_count=3, device="cpu")(expected.clone()))
    assert sum(not torch.equal(*pair) for pair in zip(erased, plain)) > 4


@pytest.mark.parametrize("flags", [(), ("--reprob", "0")])
def test_a_step_may_be_added_after_normalize(flags, monkeypatch):
    """The device applies it image by image, as workers of the faithful loader do. Between the two steps that the device
    takes over, workers would apply it to bytes: it is refused."""
    transform = training_transform(*flags)
    position = 2 + next(i for i, step in enumerate(transform.transforms) if isinstance(step, MaybeToTensor))
    transform.transforms.insert(position, transforms.RandomErasing(1))
    images = [photograph(64, 64, seed) for seed in range(4)]
    seed_everything(1)
    expected = torch.stack([transforms.Compose(transform.transforms[position - 2 : position + 1])(x) for x in images])
    seed_everything(1)
    transform.transforms = transform.transforms[: position + 1]
    pixels = torch.stack([transforms.functional.pil_to_tensor(image) for image in images])
    torch.testing.assert_close(DeviceTransform(transform, CPU)(pixels), expected)
    transform.transforms.insert(position - 1, transforms.Grayscale(3))
    monkeypatch.setattr(datasets, "build_transform", lambda is_train, settings: transform)
    args = main.build_parser().parse_args(["--loader", "fast"])
    with pytest.raises(UserError, match=r"`loader` fast: .*use faithful"):
        main.prepared(main.ImageData(Images(), 2), True, main.transform_settings(args))


# -------------------------------------------------------------------------------------------------------------- loader


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Class folders of JPEGs, some larger than twice the crop, and a PNG. One JPEG is damaged."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 16), ("val", 5)):
        for label in range(3):
            (root / split / str(label)).mkdir(parents=True)
            for number in range(count):
                width, height = (260, 200) if number % 2 else (101, 83)
                image = photograph(width, height, 100 * label + number)
                image.save(root / split / str(label) / (f"{number}.jpg" if number else "0.png"), quality=90)
    return root


def arguments_of(root, *flags):
    size = "--input-size 64 --batch-size 16 --num_workers 0 --no-pin-mem --device cpu --data-path".split()
    return main.build_parser().parse_args(list(map(str, [*size, root, *flags])))


def loader_of(root, *flags):
    args = arguments_of(root, *flags)
    return build_train_loader(main.build_data(args, is_train=True), main.settings_from(args, LoaderSettings))


def batches_of(loader):
    return list(epoch_batches(loader, 0, 0, 1, print))


def pairs_of(root, *flags):
    """Batches of both loaders, normalised."""
    plain, fast = (batches_of(loader_of(root, *flags, "--loader", name)) for name in ("faithful", "fast"))
    prepare = DeviceTransform(training_transform("--reprob", "0"), CPU)
    assert fast[0][0].dtype == torch.uint8
    return plain, [[prepare(batch), *rest] for batch, *rest in fast]


@pytest.mark.parametrize(
    ("flags", "close"),
    [
        (["--reprob", "0"], 0.9),  # equalize, solarize and the like amplify differences
        (PLAIN, 0.95),  # scaled decoding moves some by half a pixel
        ([*PLAIN, "--input-size", 32], 1),  # crops up to 32 pixels are not resized: PIL's are the same
    ],
)
def test_the_fast_loader_draws_the_same_images_as_the_faithful_one(flags, close, photographs):
    plain, fast = pairs_of(photographs, *flags)
    assert len(plain) == len(fast) == 3
    for (expected, targets, _), (images, same_targets, _) in zip(plain, fast):
        assert torch.equal(targets, same_targets)
        assert ((expected - images).abs() < 12 / 255 / 0.224).float().mean() >= close
        assert (expected - images).abs().mean() < 0.1


def test_evaluation_is_untouched(photographs):
    def val_batches(name):
        args = arguments_of(photographs, "--loader", name)
        return list(datasets.build_val_loader(main.build_data(args, False), main.settings_from(args, LoaderSettings)))

    assert not differences(val_batches("faithful"), val_batches("fast"))


def test_unreadable_images_are_named_and_replaced_alike(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "data")
    damaged, text = tmp_path / "data/train/1/3.jpg", tmp_path / "data/train/2/5.jpg"
    damaged.write_bytes(damaged.read_bytes()[:700])
    text.write_text("no image")
    found = {}
    for name in ("faithful", "fast"):
        loader = loader_of(tmp_path / "data", "--loader", name)
        samples = [loader.dataset[index] for batch in loader.batch_sampler for index in batch]
        found[name] = [(target, unreadable_images(text)) for _, target, text in samples]
    assert found["fast"] == found["faithful"]
    assert {name for _, images in found["fast"] for name, _ in images} == {str(damaged), str(text)}


def test_mistakes(photographs, tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "--data-path", photographs, "--output_dir", tmp_path / "run", "--input-size", 64]
    assert "'faithful', 'fast'" in refusal(main.run, "main", [*arguments, "--loader", "quick"], capsys)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert "pip install '.[fast]'" in refusal(main.run, "main", [*arguments, "--loader", "fast"], capsys)
    assert not (tmp_path / "run").exists()
    assert batches_of(loader_of(photographs))  # needs no simplejpeg


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_ends_the_transform_as_the_cpu_does_and_is_not_waited_for():
    pixels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    transform = training_transform("--remode", "const", "--reprob", "1")
    seed_everything(1)
    expected = DeviceTransform(transform, CPU)(pixels)
    on_gpu = DeviceTransform(transform, Precision(torch.device("cuda"), None))
    seed_everything(1)
    pinned = pixels.pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = on_gpu(pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(images.cpu(), expected)
