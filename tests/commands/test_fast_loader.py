"""`--loader fast`: the same augmentation as the faithful loader's, decoded in another way and partly on the device."""

import io
import json
import math
import pickle
import random
import shutil
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import SMALL, SMALLEST, command, differences, refusal, succeed
from PIL import Image, ImageFilter
from scipy import stats
from test_data import WEBDATASET, val_loader
from timm.data import auto_augment
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

import datasets
import main
from datasets import LoaderSettings, TransformSettings, build_train_loader, epoch_batches
from sepvit_lib.training.augmentation import Crop, CropAugmentation, CropBatch, collate_crops, recording, without_pixels
from sepvit_lib.training.decoding import CropDecoder
from sepvit_lib.training.device_augmentation import OPERATIONS, DeviceAugmentation
from sepvit_lib.training.images import decode
from sepvit_lib.training.output import read_log
from sepvit_lib.training.preprocessing import Preprocessing
from sepvit_lib.training.samples import TrainSamples
from sepvit_lib.training.shifts import with_shifts
from sepvit_lib.training.state import Precision
from sepvit_lib.training.unreadable import unreadable_images
from utils import seed_everything

PUBLISHED = Preprocessing.for_size(224)
CPU = Precision(torch.device("cpu"), None)
FILL = (124, 116, 104)
SURE = 1e-4  # a test of equal distributions fails if they would differ as much with this probability


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image with smooth areas, edges and some noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray((pixels + rng.integers(-6, 7, pixels.shape)).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **how) -> bytes:
    """A JPEG's content."""
    content = io.BytesIO()
    image.save(content, "JPEG", **{"quality": 92, **how})
    return content.getvalue()


def levels(a, b) -> np.ndarray:
    """Differences in grey levels."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))


# ---------------------------------------------------------------------------------------------------- device operations


STRENGTHS = [
    ("shear_x", 0.27),
    ("shear_x", -0.3),
    ("shear_y", 0.2),
    ("translate_x_rel", 0.213),
    ("translate_x_rel", -0.45),
    ("translate_y_rel", 0.4),
    ("rotate", 27.3),
    ("rotate", -11),
    ("auto_contrast",),
    ("equalize",),
    ("invert",),
    ("posterize", -1),
    ("posterize", 0),
    ("posterize", 1),
    ("posterize", 4),
    ("posterize", 8),
    ("solarize", 0),
    ("solarize", 26),
    ("solarize", 256),
    ("solarize_add", 0),
    ("solarize_add", 99),
    ("color", 0.19),
    ("color", 1.81),
    ("contrast", 0.19),
    ("contrast", 1.81),
    ("brightness", 0.19),
    ("brightness", 1.81),
    ("sharpness", 0.19),
    ("sharpness", 1.0),
    ("sharpness", 1.81),
]


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("case", STRENGTHS, ids=lambda case: "-".join(map(str, case)))
def test_device_operations_equal_timms(case, resample):
    """On three images at once, one of them grey and of low contrast. Affine transforms may differ by one level."""
    name, *level = case
    how = dict(fillcolor=FILL, resample=resample)
    images = [
        photograph(96, 96, 1),
        photograph(96, 96, 2),
        photograph(96, 96).convert("L").convert("RGB").point([100 + value // 8 for value in range(256)] * 3),
    ]
    function = getattr(auto_augment, name)
    ((operation,),) = {tuple(record([], function, level, how)) for _ in images}
    crops = [Crop(torch.from_numpy(np.array(image)), False, [operation], []) for image in images]
    batch = collate_crops(crops)
    assert batch.groups == [(operation.kind, 0, 3)]
    augmented = OPERATIONS[operation.kind](batch.pixels.permute(0, 3, 1, 2).contiguous(), batch.values)
    assert augmented.dtype == torch.uint8
    for image, result in zip(images, augmented):
        difference = levels(result.permute(1, 2, 0), function(image, *level, **how))
        assert difference.max() <= operation.kind.startswith("affine")
        assert difference.mean() < 0.1


@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x_rel", "translate_y_rel"])
@pytest.mark.parametrize("strength", [0.3, -0.3, 0.127, -0.45, 1.1, 0.0])
def test_shifts_of_workers_equal_timms(name, strength):
    """To a level. With several interpolations, both draw the same."""
    image = photograph(96, 96)
    augmentation = rand_augment_transform("rand-n1-p1.0-inc1", dict(img_mean=FILL))
    augmentation.ops = [one for one in augmentation.ops if one.aug_fn is getattr(auto_augment, name)]
    augmentation.ops[0].level_fn = lambda magnitude, settings: (strength,)
    for seed in range(3):
        seed_everything(seed)
        expected = augmentation(image)
        seed_everything(seed)
        assert levels(with_shifts(augmentation)(image), expected).max() <= 1


def record(operations, function, level, how):
    """What RandAugment with this function alone would record."""
    augmentation = rand_augment_transform("rand-n1-p1.0", dict(img_mean=FILL, interpolation=how["resample"]))
    one = next(operation for operation in augmentation.ops if operation.aug_fn is function)
    one.level_fn = lambda magnitude, settings: tuple(level)
    augmentation.ops = [one]
    return recording(augmentation, 96)(operations)


NAMES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m9-n3-mstd0.5",
    "rand-m7-p0.8-inc1",
    "rand-mstd101-inc1",
    "rand-m5-mstd1-tweights",
    "rand-m15-mmax20-mstd3-inc1",
]


def transform_settings(*arguments, device="cpu"):
    args = main.build_parser().parse_args(list(map(str, arguments)))
    args.device = device
    return main.transform_settings(args)


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("name", NAMES)
def test_the_device_augments_as_timm_does(name, interpolation):
    """With the same random numbers: flips, operations, levels, erased regions. Constant fill, so that it compares."""
    flags = [
        "--aa",
        name,
        "--train-interpolation",
        interpolation,
        "--remode",
        "const",
        "--reprob",
        0.6,
        "--recount",
        2,
        "--input-size",
        96,
    ]
    faithful = datasets.build_transform(True, transform_settings(*flags))
    fast = transform_settings(*flags, "--loader", "fast", device="cuda")
    _, recorded = datasets.build_fast_transform(datasets.build_transform(True, fast), fast)
    image = photograph(96, 96)
    expected, crops = [], []
    for seed in range(60):
        seed_everything(seed)
        result = image
        for step in faithful.transforms[1:]:
            result = step(result)
        expected.append(result)
        seed_everything(seed)
        crops.append(recorded(np.array(image)))
    images = DeviceAugmentation(CPU, "const", PUBLISHED)(collate_crops(crops))
    close = (images - torch.stack(expected)).abs().amax(1) < 2.5 / 255 / 0.224
    # Where one operation differs by a level, another one after it (equalize, solarize) may amplify that.
    assert close.float().mean((1, 2)).min() > 0.97
    assert close.float().mean() > 0.999
    assert len({operation.kind for crop in crops for operation in crop.operations}) > (4 if "weights" in name else 8)


def test_what_the_device_cannot_do_is_done_by_the_worker():
    for flags in (["--aa", "augmix-m3"], ["--aa", "original"], ["--aa", "3a"], ["--aa="], ["--aa", "rand-m9-t3a"]):
        settings = transform_settings("--loader", "fast", "--input-size", 64, *flags, device="cuda")
        _, augmentation = datasets.build_fast_transform(datasets.build_transform(True, settings), settings)
        pixels = np.array(photograph(64, 64))
        seed_everything(1)
        crop = augmentation(pixels)
        assert (crop.is_flipped, crop.operations) == (False, [])
        assert levels(crop.pixels, pixels).max() > 0


def test_operations_of_an_image_keep_their_order():
    invert, dark = (
        next(iter(record([], getattr(auto_augment, name), level, dict(resample=2))))
        for name, level in (("invert", ()), ("brightness", (0.5,)))
    )
    pixels = torch.full((1, 1, 3), 100, dtype=torch.uint8)
    crops = [Crop(pixels, False, order, []) for order in ([invert, dark], [dark, invert], [], [dark, dark], [invert])]
    images = DeviceAugmentation(CPU, "const", PUBLISHED)(collate_crops(crops))
    red = (images[:, 0, 0, 0] * 0.229 + 0.485) * 255
    assert red.round().tolist() == [77, 205, 100, 25, 155]


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erased_regions_are_filled_as_timm_does(mode):
    images = torch.full((400, 3, 16, 16), 7.0)
    regions = [(index, region) for index in range(0, 400, 2) for region in ((2, 3, 10, 9), (8, 1, 14, 6))]
    torch.manual_seed(0)
    erased = DeviceAugmentation(CPU, mode, PUBLISHED).erase(images, regions)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[2:10, 3:9] = inside[8:14, 1:6] = True
    assert (erased[1::2] == 7).all()
    assert (erased[0::2, :, ~inside] == 7).all()
    fill = erased[0::2]
    if mode == "const":
        assert (fill[:, :, inside] == 0).all()
        return
    draws = fill[:, :, 2, 3] if mode == "rand" else fill[:, :, inside]
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > SURE
    if mode == "rand":  # one colour a region; the second region covers the first
        assert (fill[:, :, 2:8, 3:9] == fill[:, :, 2:3, 3:4]).all()
        assert (fill[:, :, 8:14, 1:6] == fill[:, :, 13:14, 1:2]).all()
        assert (fill[:, :, 2, 3] != fill[:, :, 13, 1]).all()
    assert not torch.equal(fill[0], fill[1])


# --------------------------------------------------------------------------------------------------------------- crops


def crop_pair(content, size, seed, interpolation="bicubic", scale=(0.08, 1.0)):
    """The crop of the faithful loader and that of the fast one, for the same random numbers."""
    crop = RandomResizedCropAndInterpolation(size, scale, interpolation=interpolation)
    seed_everything(seed)
    faithful = crop(Image.open(io.BytesIO(content)).convert("RGB"))
    state = random.getstate()
    seed_everything(seed)
    fast = CropDecoder(crop)(content)
    assert random.getstate() == state, "both draw the same numbers"
    assert fast.shape == (size, size, 3)
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
        differences = {}
        quarter = columns / size / 4
        for across, down in ((0, 0), (quarter, 0), (-quarter, 0), (0, quarter), (0, -quarter)):
            box = [x + across, y + down, x + columns + across, y + rows + down]
            box = [min(max(edge, 0), limit) for edge, limit in zip(box, 2 * image.size)]
            pils = image.resize((size, size), Image.Resampling.BICUBIC, box)
            differences[across, down] = levels(pils, fast).mean()
        assert differences[0, 0] < 1.5
        assert min(differences, key=differences.get) == (0, 0)


def test_boxes_are_decoded_at_a_fraction_where_that_is_enough():
    content = jpeg(photograph(1003, 801))
    cases = ((401, 801, 801), (400, 401, 400.5), (200, 201, 200.25), (100, 101, 100.125), (50, 101, 100.125))
    for size, side, height in cases:
        decoder = CropDecoder(RandomResizedCropAndInterpolation(size, (1, 1), (1.0, 1.0)))
        part = decoder.decode(content)  # the box is 801 × 801
        assert part.pixels.shape[:2] == (side, side)
        assert part.height == part.width == height
        assert decoder.resize(part).shape == (size, size, 3)


def test_crops_of_any_size():
    """Rounding makes no crop too small or too large."""
    content = jpeg(photograph(331, 257))
    for size in range(33, 140):
        crop = RandomResizedCropAndInterpolation(size)
        for seed in range(4):
            seed_everything(size, seed)
            assert CropDecoder(crop)(content).shape == (size, size, 3)


def test_other_images_are_decoded_by_pil():
    rgb = photograph(120, 90)
    others = {
        "png": rgb,
        "palette.png": rgb.convert("P"),
        "gif": rgb.convert("P"),
        "webp": rgb,
        "cmyk.jpg": rgb.convert("CMYK"),
    }
    for name, image in others.items():
        content = io.BytesIO()
        image.save(content, "JPEG" if name.endswith("jpg") else name.rpartition(".")[2])
        faithful, fast = crop_pair(content.getvalue(), 40, 3)
        assert np.array_equal(faithful, fast), name
    seed_everything(1)
    crop = RandomResizedCropAndInterpolation(40, interpolation="bicubic")
    expected = crop(rgb)
    seed_everything(1)
    assert np.array_equal(CropDecoder(crop)(rgb), expected)  # from data sets that keep images


def test_damaged_jpegs_are_refused_as_by_pil():
    content = jpeg(photograph(300, 210))
    for damaged in (content[: len(content) // 2], content[:40], b"\xff\xd8no image"):
        with pytest.raises(OSError) as refused:  # noqa: PT011 the type is what PIL raises
            Image.open(io.BytesIO(damaged)).convert("RGB")
        with pytest.raises(type(refused.value)):
            CropDecoder(RandomResizedCropAndInterpolation(64))(damaged)


def test_large_jpegs_are_refused_as_by_pil(monkeypatch):
    content = jpeg(photograph(300, 210))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        CropDecoder(RandomResizedCropAndInterpolation(64))(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert CropDecoder(RandomResizedCropAndInterpolation(64))(content).shape == (64, 64, 3)


def test_decoders_reach_spawned_workers():
    decoder = CropDecoder(RandomResizedCropAndInterpolation(64, interpolation="random"))
    augmentation = rand_augment_transform("rand-m9-p1.0", dict(img_mean=FILL))
    recorded = CropAugmentation([augmentation], RandomErasing(device="cpu"), 64, on_device=True)
    crops = []
    for parts in ((decoder, recorded), pickle.loads(pickle.dumps((decoder, recorded)))):
        seed_everything(3)
        crops.append(parts[1](parts[0](JPEGS["4:2:0"])))
    assert not differences(*crops)
    assert crops[0].operations


# ------------------------------------------------------------------------------------------------------- distributions


def test_distribution_of_boxes():
    """Area, aspect ratio and whether scaled decoding is used, with other random numbers than timm's transform."""
    crop = RandomResizedCropAndInterpolation(33)
    content, decoder = jpeg(photograph(64, 48)), CropDecoder(crop)
    seed_everything(1)
    fast = np.array([decoder.decode(content).pixels.shape[:2] for _ in range(3000)])
    seed_everything(2)
    image = Image.open(io.BytesIO(content))
    faithful = np.array([crop.get_params(image, crop.scale, crop.ratio)[2:] for _ in range(3000)])
    for value in (lambda sides: sides.prod(1), lambda sides: sides[:, 0] / sides[:, 1]):
        assert stats.ks_2samp(value(fast), value(faithful)).pvalue > SURE


def recorded_crops(number, seed, *flags):
    settings = transform_settings("--loader", "fast", "--input-size", 64, *flags, device="cuda")
    _, augmentation = datasets.build_fast_transform(datasets.build_transform(True, settings), settings)
    pixels = np.array(photograph(64, 64))
    seed_everything(seed)
    return [augmentation(pixels) for _ in range(number)]


def test_distribution_of_flips_and_operations():
    """Against what the published recipe says: half flipped; two of 15 operations, each applied with probability 0.5."""
    crops = recorded_crops(4000, 3)
    assert stats.binomtest(sum(crop.is_flipped for crop in crops), 4000, 0.5).pvalue > SURE
    lengths = Counter(len(crop.operations) for crop in crops)
    assert stats.chisquare([lengths[0], lengths[1], lengths[2]], [1000, 2000, 1000]).pvalue > SURE
    kinds = Counter(operation.kind for crop in crops for operation in crop.operations)
    total = kinds.total()
    expected = {kind: total / 15 for kind in kinds} | {"affine_bicubic": total / 3}
    assert kinds.keys() == OPERATIONS.keys() - {"flip", "affine_bilinear"}
    assert stats.chisquare(list(kinds.values()), [expected[kind] for kind in kinds]).pvalue > SURE
    pairs = Counter(
        tuple(operation.kind for operation in crop.operations) for crop in crops if len(crop.operations) == 2
    )
    assert stats.binomtest(pairs["affine_bicubic", "affine_bicubic"], pairs.total(), 1 / 9).pvalue > SURE


def test_distribution_of_strengths():
    """Magnitude 9 with a standard deviation of 0.5, at most 10; signs are drawn."""
    operations = [operation for crop in recorded_crops(9000, 4) for operation in crop.operations]
    rng = np.random.default_rng(0)
    magnitudes = np.clip(rng.normal(9, 0.5, 20000), 0, 10) / 10
    signed = magnitudes * rng.choice([-1, 1], magnitudes.size)
    color = [operation.values[0] for operation in operations if operation.kind == "color"]
    assert stats.ks_2samp(color, 1 + 0.9 * signed).pvalue > SURE
    matrices = [operation.values[:6] for operation in operations if operation.kind == "affine_bicubic"]
    rotated = [math.degrees(math.asin(matrix[3])) for matrix in matrices if matrix[0] != 1]
    sheared = [matrix[1] for matrix in matrices if matrix[0] == 1 and matrix[1]]
    moved = [matrix[5] / 64 for matrix in matrices if matrix[0] == 1 and matrix[5]]
    for values, largest in ((rotated, 30), (sheared, 0.3), (moved, 0.45)):
        assert stats.ks_2samp(values, largest * signed).pvalue > SURE
    solarize = [operation.values[0] for operation in operations if operation.kind == "solarize"]
    assert stats.ks_2samp(solarize, 256 - np.floor(magnitudes * 256)).pvalue > SURE


def test_distribution_of_erased_areas():
    regions = [region for crop in recorded_crops(4000, 5) for region in crop.regions]
    areas = [(bottom - top) * (right - left) for top, left, bottom, right in regions]
    assert stats.binomtest(len(areas), 4000, 0.25).pvalue > SURE
    erasing = RandomErasing(0.25, mode="const", device="cpu")
    seed_everything(6)
    timms = np.array([(erasing(torch.ones(3, 64, 64))[0] == 0).sum().item() for _ in range(4000)])
    assert stats.ks_2samp(areas, timms[timms > 0]).pvalue > SURE
    drawn = without_pixels(RandomErasing(1.0, mode="pixel", max_count=3, device="cpu"))
    assert (drawn.per_pixel, drawn.rand_color) == (False, False)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Class folders of JPEGs, some larger than twice the crop, and a PNG."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 16), ("val", 5)):
        for label in range(3):
            (root / split / str(label)).mkdir(parents=True)
            for number in range(count):
                width, height = (260, 200) if number % 2 else (101, 83)
                image = photograph(width, height, 100 * label + number)
                image.save(root / split / str(label) / (f"{number}.jpg" if number else "0.png"), quality=90)
    return root


SIZE = ["--input-size", 64, "--batch-size", 16, "--num_workers", 0, "--no-pin-mem"]


def loader_of(photographs, *flags, device="cpu"):
    args = main.build_parser().parse_args(list(map(str, [*SIZE, "--data-path", photographs, *flags])))
    args.device = device
    return build_train_loader(main.build_data(args, is_train=True), main.settings_from(args, LoaderSettings))


def batches_of(loader, epoch=0, step=0):
    return list(epoch_batches(loader, epoch, step, 1, print))


def test_distribution_of_pixels(photographs):
    """Means and standard deviations of whole images, augmented by both loaders with different random numbers."""
    figures = {}
    for name, flags, device in (
        ("faithful", [], "cpu"),
        ("fast", ["--loader", "fast"], "cpu"),
        ("device", ["--loader", "fast"], "cuda"),
    ):
        loader = loader_of(photographs, *flags, "--seed", len(figures), device=device)
        images = [batch[0] for epoch in range(8) for batch in batches_of(loader, epoch)]
        torch.manual_seed(0)
        whole = torch.cat([DeviceAugmentation(CPU, "pixel", PUBLISHED)(batch) if flags else batch for batch in images])
        figures[name] = whole.mean((1, 2, 3)).numpy(), whole.std((1, 2, 3)).numpy()
    for name in ("fast", "device"):
        for ours, faithful in zip(figures[name], figures["faithful"]):
            assert stats.ks_2samp(ours, faithful).pvalue > SURE
            assert stats.ttest_ind(ours, faithful).pvalue > SURE


# -------------------------------------------------------------------------------------------------------------- loaders


def test_the_fast_loader_draws_the_same_images_as_the_faithful_one(photographs):
    plain, fast = pairs_of(photographs, "--remode", "const")
    for (expected, targets, _), (images, same, _) in zip(plain, fast):
        assert torch.equal(targets, same)
        # Scaled decoding moves some by half a pixel. Equalize, solarize and the like amplify differences.
        close = (expected - images).abs() < 12 / 255 / 0.224
        assert close.float().mean() > 0.9
        assert (expected - images).abs().mean() < 0.1


def pairs_of(root, *flags):
    """Batches of both loaders, as images."""
    plain, fast = (batches_of(loader_of(root, *flags, "--loader", name)) for name in ("faithful", "fast"))
    prepare = DeviceAugmentation(CPU, "const", PUBLISHED)
    return plain, [[prepare(batch), *rest] for batch, *rest in fast]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_only_on_seed_epoch_and_place(photographs, device, workers):
    flags = ["--loader", "fast"]
    expected = [batches_of(loader_of(photographs, *flags, device=device), epoch) for epoch in (0, 1)]
    loader = loader_of(photographs, *flags, "--num_workers", workers, device=device)
    for epoch, step in ((1, 2), (0, 0), (1, 1)):
        again = batches_of(loader, epoch, step)
        assert len(again) == 3 - step
        for batch, other in zip(again, expected[epoch][step:]):
            assert same(batch[0], other[0])
    assert not same(expected[0][0][0], expected[1][0][0])


def same(a, b) -> bool:
    """Whether two batches of images are equal bit by bit."""
    if isinstance(a, CropBatch):
        return not differences(vars(a), vars(b))
    return torch.equal(a, b)


def test_batches_for_the_device_are_small_and_few(photographs):
    """Three tensors a batch, as workers pass each through a file descriptor; pixels take a byte each."""
    batch = batches_of(loader_of(photographs, "--loader", "fast", "--num_workers", 1, device="cuda"))[0][0]
    assert isinstance(batch, CropBatch)
    assert sum(isinstance(value, torch.Tensor) for value in vars(batch).values()) == 3
    assert (batch.pixels.dtype, batch.pixels.shape) == (torch.uint8, (16, 64, 64, 3))
    assert all(value.is_shared() for value in vars(batch).values() if isinstance(value, torch.Tensor))
    ends = [end for _, _, end in batch.groups]
    assert [0, *ends[:-1]] == [first for _, first, _ in batch.groups]
    assert ends[-1] == len(batch.indices) == len(batch.values)


def test_evaluation_is_untouched(photographs):
    for split_is_train in (False,):
        batches = []
        for name in ("faithful", "fast"):
            args = main.build_parser().parse_args(list(map(str, [*SIZE, "--data-path", photographs, "--loader", name])))
            data = main.build_data(args, split_is_train)
            assert (data.decode.func, data.decode.keywords) == (decode, {"orientation": "stored"})
            batches.append(list(val_loader(args)))
        assert not differences(*batches)


@pytest.fixture(scope="module")
def shards(photographs, tmp_path_factory):
    """The JPEGs as webdataset shards, and as archives: train.tar and val.tar."""
    root = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 4), ("val", 3)):
        paths = sorted((photographs / split).glob("*/*.*"), key=lambda path: (path.stem, path.parent.name))
        for shard in range(count):
            with tarfile.open(root / f"digits-{split}-{shard}.tar", "w") as archive:
                for number, path in list(enumerate(paths))[shard::count]:
                    for ending, content in ((path.suffix, path.read_bytes()), (".cls", path.parent.name.encode())):
                        member = tarfile.TarInfo(f"{number:04}{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(photographs / split, arcname=".")
    return root


@pytest.mark.parametrize("source", [[], WEBDATASET], ids=["archive", "webdataset"])
def test_other_sources_show_the_same_images(source, shards):
    plain, fast = pairs_of(shards, *source, "--aa=", "--color-jitter", 0, "--reprob", 0)
    assert len(plain) == len(fast) == 3
    for (expected, targets, _), (images, same_targets, _) in zip(plain, fast):
        assert torch.equal(targets, same_targets)
        assert ((expected - images).abs() < 12 / 255 / 0.224).float().mean() > 0.95  # scaled decoding moves some
        assert (expected - images).abs().mean() < 2.5 / 255 / 0.224


def test_small_crops_and_arrays_take_pils_way(photographs):
    """Up to 32 pixels, crops are not resized; they are padded and cut out, from the whole image."""
    flags = ["--input-size", 32, "--aa=", "--color-jitter", 0, "--reprob", 0]
    plain, fast = pairs_of(photographs, *flags)
    for (expected, *_), (images, *_) in zip(plain, fast):
        assert torch.allclose(expected, images, atol=1e-5)


def damage(photographs, folder):
    """Copy the images; damage one, and put text in place of another."""
    shutil.copytree(photographs, folder)
    path = folder / "train/1/3.jpg"
    path.write_bytes(path.read_bytes()[:700])
    (folder / "train/2/5.jpg").write_text("no image")
    return folder


def test_unreadable_images_are_named_and_replaced_as_before(photographs, tmp_path):
    root = damage(photographs, tmp_path / "data")
    found = {}
    for name in ("faithful", "fast"):
        loader = loader_of(root, "--loader", name)
        samples = loader.dataset
        assert isinstance(samples, TrainSamples)
        found[name] = [
            (target, unreadable_images(text))
            for draws in loader.batch_sampler
            for _, target, text in map(samples.__getitem__, draws)
        ]
    assert found["fast"] == found["faithful"]
    names = {name for _, images in found["fast"] for name, _ in images}
    assert names == {str(root / "train/1/3.jpg"), str(root / "train/2/5.jpg")}


@pytest.mark.parametrize("place", ["first", "last"])
def test_unreadable_images_of_webdatasets_are_skipped_as_before(shards, place, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    path = tmp_path / "data/digits-train-1.tar"
    content = path.read_bytes()
    starts = [index for index in range(len(content)) if content.startswith(b"\xff\xd8\xff", index)]
    start = starts[0 if place == "first" else -1]
    path.write_bytes(content[:start] + b"no image" + content[start + 8 :])
    plain, fast = pairs_of(tmp_path / "data", *WEBDATASET, "--aa=", "--color-jitter", 0, "--reprob", 0)
    for (expected, *rest), (images, *same_rest) in zip(plain, fast):
        assert not differences(rest, same_rest)
        assert (expected - images).abs().mean() < 2.5 / 255 / 0.224
    names = [name for *_, batch in fast for name in batch if name]
    assert len(names) == 1
    assert names[0].startswith(f"{path}: 00")


# ----------------------------------------------------------------------------------------------------------------- runs


RUN = [
    *SMALLEST,
    "--loader",
    "fast",
    "--input-size",
    64,
    "--auto-resume",
    "--checkpoint-every",
    1,
    "--keep-checkpoints",
    9,
    "--device",
    "cpu",
]


def resumed_equals_whole(run, data, folder) -> None:
    """Train; then train again from the middle of the epoch. Compare what the last checkpoints hold."""
    arguments = [*RUN, "--data-path", data]
    run(*arguments, "--output_dir", folder / "whole")
    (folder / "resumed").mkdir()
    shutil.copy(folder / "whole/checkpoint-00000001.pth", folder / "resumed")
    run(*arguments, "--output_dir", folder / "resumed", "--num_workers", 2)
    whole, resumed = (torch.load(folder / name / "checkpoint.pth", weights_only=True) for name in ("whole", "resumed"))
    assert whole["steps"] == 3
    keys = ("model", "optimizer", "steps", "epoch", "best_accuracy")
    assert not differences({key: whole[key] for key in keys}, {key: resumed[key] for key in keys})


def test_resume_is_bit_for_bit(photographs, tmp_path):
    resumed_equals_whole(succeed, photographs, tmp_path)


def test_resume_is_bit_for_bit_with_augmentation_on_the_device(photographs, tmp_path, monkeypatch):
    """The device is a CPU here, which augments as a GPU would."""
    monkeypatch.setattr(TransformSettings, "augments_on_device", property(lambda settings: settings.loader == "fast"))
    seen = []
    augment = DeviceAugmentation.__call__
    monkeypatch.setattr(
        DeviceAugmentation, "__call__", lambda self, batch: seen.append(len(batch)) or augment(self, batch)
    )

    def run(*arguments):
        assert main.run([str(argument) for argument in arguments]) == 0

    resumed_equals_whole(run, photographs, tmp_path)
    assert seen == [16] * 5


def test_evaluation_as_a_command_is_untouched(photographs, tmp_path):
    figures = []
    torch.manual_seed(0)
    for name in ("faithful", "fast"):
        succeed(
            *SMALL,
            "--input-size",
            64,
            "--data-path",
            photographs,
            "--eval",
            "--loader",
            name,
            "--output_dir",
            tmp_path / name,
        )
        figures.append(json.loads((tmp_path / name / "eval.json").read_text()))
    assert figures[0] == figures[1]


def test_unreadable_images_as_a_command(photographs, tmp_path):
    root = damage(photographs, tmp_path / "data")
    (root / "train/2/5.jpg").unlink()
    result = command(*RUN, "--data-path", root, "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    events = [entry["unreadable_image"] for entry in read_log(tmp_path / "run/log.txt") if "unreadable_image" in entry]
    assert events == [str(root / "train/1/3.jpg")]


def test_a_recipe_may_set_the_loader(tmp_path):
    (tmp_path / "recipe.yaml").write_text("loader: fast\n")
    for arguments, loader in ((["--config", str(tmp_path / "recipe.yaml")], "fast"), ([], "faithful")):
        assert main.parse_with_recipe(main.build_parser(), arguments).loader == loader


def test_mistakes(photographs, tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "--data-path", photographs, "--output_dir", tmp_path / "run", "--input-size", 64]
    line = refusal(main.run, "main", [*arguments, "--loader", "quick"], capsys)
    assert "--loader" in line
    assert "'faithful', 'fast'" in line
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    line = refusal(main.run, "main", [*arguments, "--loader", "fast"], capsys)
    assert line.startswith("main.py: --loader fast: needs simplejpeg (")
    assert line.endswith("pip install simplejpeg, or use faithful")
    assert not (tmp_path / "run").exists()
    assert batches_of(loader_of(photographs, "--loader", "faithful"))  # needs no simplejpeg


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_augments_as_the_cpu_does_and_is_not_waited_for(photographs):
    args = ["--loader", "fast", "--remode", "const"]
    batches = [batch[0] for batch in batches_of(loader_of(photographs, *args, device="cuda"))]
    on_cpu = [DeviceAugmentation(CPU, "const", PUBLISHED)(batch) for batch in batches]
    augment = DeviceAugmentation(Precision(torch.device("cuda"), None), "const", PUBLISHED)
    pinned = [batch.pin_memory() for batch in batches]
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = [augment(batch) for batch in pinned]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for expected, images in zip(on_cpu, on_gpu):
        close = (images.cpu() - expected).abs() < 2.5 / 255 / 0.224
        assert close.float().mean() > 0.999
