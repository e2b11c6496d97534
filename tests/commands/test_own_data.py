"""Data sets of one's own: the top of a config, checks before training, and images and labels that do not fit."""

import copy
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import mmdet.registry
import mmseg.registry
import numpy as np
import pytest
from conftest import ROOT, command, refusal, succeed
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from sepvit_lib.dense.classes import check_classes
from sepvit_lib.dense.coco import CompleteCOCO, CompleteCocoMetric
from sepvit_lib.dense.data import check_data
from sepvit_lib.dense.drawing import read_pixels
from sepvit_lib.dense.loading import LoadReadableImage, LoadReadableLabels, use_checked_loading
from sepvit_lib.dense.own_data import move, palette_of
from sepvit_lib.dense.parts import dicts
from sepvit_lib.dense.samples import describe_samples, sampled_files
from sepvit_lib.dense.settings import read_config
from sepvit_lib.dense.train import build_train_parser, run_training
from sepvit_lib.training.errors import MachineError, UserError
from sepvit_lib.training.images import count_turned, decode
from sepvit_lib.training.unreadable import UnreadableImageError

SEGMENTATION, DETECTION = ROOT / "segmentation/configs", ROOT / "detection/configs"
LABELLED = SEGMENTATION / "fpn_sepvit_lite_112x112_demo.py"
BOXED = DETECTION / "mask_rcnn_sepvit_lite_fpn_demo.py"
HEIGHT, WIDTH, SIDE = 80, 96, 30  # of the scenes and of the squares in them, in pixels

# ----------------------------------------------------------------------------------------------------------------------
# Small data sets: dark noise with bright squares
# ----------------------------------------------------------------------------------------------------------------------


def scene(rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """Make an image (H × W × 3), and the top left corner of its square."""
    image = rng.integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    top, left = (int(value) for value in rng.integers(0, 40, 2))
    image[top : top + SIDE, left : left + SIDE] += 150
    return image, top, left


def write_labelled(root: Path) -> Path:
    """Write six training and two validation scenes with labels in ADE20K's layout: 1 is the ground, 2 the square."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            image, top, left = scene(rng)
            labels = np.ones((HEIGHT, WIDTH), np.uint8)
            labels[top : top + SIDE, left : left + SIDE] = 2
            Image.fromarray(image).save(root / f"images/{split}/{number}.jpg", quality=95)
            Image.fromarray(labels).save(root / f"annotations/{split}/{number}.png")
    return root


def write_boxed(root: Path) -> Path:
    """Write six training and two validation scenes with squares that are cats (3) and dogs (7) in COCO's layout."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 6), ("val2017", 2)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            image, top, left = scene(rng)
            Image.fromarray(image).save(root / f"{split}/{number}.jpg", quality=95)
            images.append(dict(id=number, file_name=f"{number}.jpg", height=HEIGHT, width=WIDTH))
            corners = [left, top, left + SIDE, top, left + SIDE, top + SIDE, left, top + SIDE]
            annotations.append(
                dict(
                    id=number,
                    image_id=number,
                    category_id=(3, 7)[number % 2],
                    iscrowd=0,
                    bbox=[left, top, SIDE, SIDE],
                    area=SIDE**2,
                    segmentation=[corners],
                )
            )
        content = dict(
            images=images, annotations=annotations, categories=[dict(id=3, name="cat"), dict(id=7, name="dog")]
        )
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "with space")


@pytest.fixture(scope="module")
def boxed(tmp_path_factory) -> Path:
    return write_boxed(tmp_path_factory.mktemp("boxed") / "with space")


def read(path: Path, **options: Any) -> Config:
    """Read a config as the commands do."""
    return read_config(Namespace(config=str(path), cfg_options=options))


@pytest.fixture(scope="module")
def of_labelled(labelled, tmp_path_factory) -> Config:
    """The config of the segmentation data set, a child of the demo's."""
    path = tmp_path_factory.mktemp("configs") / "labelled.py"
    path.write_text(
        f"_base_ = {str(LABELLED)!r}\ndata_root = {str(labelled)!r}\nmetainfo = dict(classes=('ground', 'square'))\n"
    )
    return read(path)


@pytest.fixture(scope="module")
def of_boxed(boxed, tmp_path_factory) -> Config:
    """The config of the detection data set, a child of the demo's."""
    path = tmp_path_factory.mktemp("configs") / "boxed.py"
    path.write_text(f"_base_ = {str(BOXED)!r}\ndata_root = {str(boxed)!r}\nmetainfo = dict(classes=('cat', 'dog'))\n")
    return read(path)


@pytest.fixture
def segmentation(of_labelled, labelled, tmp_path) -> tuple[Config, Path]:
    """A copy of the segmentation data set that a test may damage, and its config."""
    return copied(of_labelled, labelled, tmp_path)


@pytest.fixture
def detection(of_boxed, boxed, tmp_path) -> tuple[Config, Path]:
    """A copy of the detection data set that a test may damage, and its config."""
    return copied(of_boxed, boxed, tmp_path)


def copied(cfg: Config, root: Path, folder: Path) -> tuple[Config, Path]:
    shutil.copytree(root, folder / "data")
    init_default_scope(cfg.default_scope)
    cfg = copy.deepcopy(cfg)
    move(cfg, str(root), str(folder / "data"))
    return cfg, folder / "data"


def built(cfg: Config, loader: str = "train_dataloader") -> Any:
    """Build a loader's data set as the commands do."""
    use_checked_loading(cfg)
    library = dict(mmseg=mmseg, mmdet=mmdet)[cfg.default_scope]
    return library.registry.DATASETS.build(cfg[loader].dataset)


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def save_as(kind: str, path: Path, pixels: np.ndarray) -> Path:
    """Save an image (H × W × 3) in a format. Returns its path."""
    image = Image.fromarray(pixels)
    if kind == "16-bit":
        path = path.with_suffix(".png")
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
    elif kind == "CMYK":
        image.convert("CMYK").save(path.with_suffix(".jpg"))
    elif kind in ("RGBA", "LA", "L", "P", "1"):
        path = path.with_suffix(".png")
        image.convert("L" if kind == "1" else "RGB").convert(kind).save(path)
    else:
        path = path.with_suffix(kind)
        image.save(path)
    return path if path.exists() else path.with_suffix(".jpg")


KINDS = ["16-bit", "CMYK", "RGBA", "LA", "L", "P", "1", ".jpg", ".bmp", ".tif", ".webp"]


@pytest.mark.parametrize("backend", ["cv2", "pillow"])
@pytest.mark.parametrize("color_type", ["color", "grayscale", "unchanged"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_mmcv(kind, color_type, backend, tmp_path):
    """Ordinary images'. What mmcv's backends read differently, all commands read alike."""
    path = save_as(kind, tmp_path / "a", scene(np.random.default_rng(1))[0])
    settings = dict(color_type=color_type, imdecode_backend=backend)
    theirs = LoadImageFromFile(**settings).transform(dict(img_path=str(path)))
    ours = LoadReadableImage(**settings).transform(dict(img_path=str(path)))
    differs = {("16-bit", "pillow"), ("CMYK", "cv2"), ("LA", "cv2"), ("LA", "pillow")}
    if color_type != "color" or (kind, backend) not in differs:
        np.testing.assert_array_equal(ours["img"], theirs["img"])
    if color_type == "color":
        np.testing.assert_array_equal(ours["img"][..., ::-1], np.asarray(decode(path.read_bytes())))
    assert ours["img"].dtype == theirs["img"].dtype
    assert (ours["img_shape"], ours["ori_shape"]) == (theirs["img_shape"], theirs["ori_shape"])


@pytest.mark.parametrize(
    "settings", [dict(subsampling=2), dict(subsampling=0), dict(progressive=True), dict(quality=20)]
)
@pytest.mark.parametrize("size", [(61, 97), (1, 7), (480, 641)])
def test_jpegs_have_the_pixels_of_opencv(settings, size, tmp_path):
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 255, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8))
    for mode in ("RGB", "L"):
        coarse.resize(size[::-1]).convert(mode).save(tmp_path / "a.jpg", **settings)
        theirs, ours = (
            load().transform(dict(img_path=str(tmp_path / "a.jpg")))["img"]
            for load in (LoadImageFromFile, LoadReadableImage)
        )
        np.testing.assert_array_equal(ours, theirs)


def test_images_of_more_than_8_bits_and_transparent_ones(tmp_path):
    """Values are scaled, and transparent parts are white, as in all commands."""
    values = np.linspace(0, 1, 20 * 30, dtype=np.float32).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "float.tif")
    Image.fromarray((values * 65535).astype(np.uint16)).save(tmp_path / "deep.png")
    layers = Image.new("RGBA", (30, 20), (200, 0, 0, 255))
    layers.putpixel((0, 0), (0, 0, 0, 0))
    layers.save(tmp_path / "transparent.png")
    for name in ("float.tif", "deep.png"):
        image = LoadReadableImage(to_float32=True).transform(dict(img_path=str(tmp_path / name)))["img"]
        np.testing.assert_allclose(image[..., 0], values * 255, atol=1)
    image = LoadReadableImage().transform(dict(img_path=str(tmp_path / "transparent.png")))["img"]
    assert [image[0, 0].tolist(), image[0, 1].tolist()] == [[255, 255, 255], [0, 0, 200]]


def test_formats_that_pillow_does_not_open_are_left_to_mmcv(tmp_path):
    image = scene(np.random.default_rng(1))[0]
    assert cv2.imwrite(str(tmp_path / "a.jp2"), image)
    loaded = LoadReadableImage().transform(dict(img_path=str(tmp_path / "a.jp2")))["img"]
    assert loaded.shape == image.shape


def test_pictures_have_the_colours_of_the_image(tmp_path):
    """Those of `--show-dir`, in the orientation of the labels."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 20), (250, 10, 10)).save(path)
    turn(path, 6)
    assert read_pixels(str(path), {})[0, 0].argmax() == 0
    assert read_pixels(str(path), {}).shape == (20, 40, 3)
    loader = dict(dataset=dict(pipeline=[dict(type="LoadImageFromFile", orientation="exif")]))
    assert read_pixels(str(path), loader).shape == (40, 20, 3)


def turn(path: Path, orientation: int) -> None:
    """Give an image file an EXIF orientation. Its pixels stay as stored."""
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)


@pytest.mark.parametrize("backend", ["cv2", "pillow"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_is_ignored(orientation, backend, tmp_path):
    pixels = scene(np.random.default_rng(1))[0]
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).save(path)
    turn(path, orientation)
    loaded = LoadReadableImage(imdecode_backend=backend).transform(dict(img_path=str(path)))["img"]
    stored = np.asarray(Image.open(path))[..., ::-1]
    np.testing.assert_allclose(loaded.astype(int), stored.astype(int), atol=2)
    turned = LoadImageFromFile(imdecode_backend=backend).transform(dict(img_path=str(path)))["img"]
    assert turned.shape != loaded.shape or not np.array_equal(turned, loaded)


@pytest.mark.parametrize("orientation", [3, 6])
def test_image_with_exif_and_its_labels(orientation, segmentation):
    """The bright pixels are those labelled as the square, in training and validation."""
    cfg, root = segmentation
    for path in (*root.glob("images/*/*.jpg"), *root.glob("annotations/*/*.png")):
        turn(path, orientation)
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline = [step for step in dataset.pipeline if step.type != "RandomCrop"]  # may lose the square
    for loader in ("train_dataloader", "val_dataloader"):
        dataset = built(cfg, loader)
        for index in range(len(dataset)):
            sample = dataset[index]
            labels, image = sample["data_samples"].gt_sem_seg.data[0], sample["inputs"].float().mean(0)
            if image.shape != labels.shape:  # in validation, labels keep their size
                labels = labels[None, None].float()
                labels = mmseg.models.utils.resize(labels, size=image.shape, mode="nearest")[0, 0]
            assert image[labels == 1].mean() > 150 > 60 > image[labels == 0].mean()


@pytest.mark.parametrize("orientation", [3, 6])
def test_image_with_exif_and_its_boxes(orientation, detection):
    """The bright pixels are those in the box and the mask, in training and validation."""
    cfg, root = detection
    for path in root.glob("*2017/*.jpg"):
        turn(path, orientation)
    for loader in ("train_dataloader", "val_dataloader"):
        for sample in built(cfg, loader):
            image, truth = sample["inputs"].float().mean(0), sample["data_samples"].gt_instances
            if loader == "val_dataloader":  # annotations keep the size of the file
                truth.bboxes.rescale_(sample["data_samples"].scale_factor)
            left, top, right, bottom = truth.bboxes.tensor[0].round().int().tolist()
            assert image[top + 2 : bottom - 2, left + 2 : right - 2].min() > 100
            assert image[: max(0, top - 2)].mean() < 70 or top < 3


def test_annotations_of_the_turned_image(detection):
    """Annotations that were drawn on the upright image are of another size: it is named."""
    cfg, root = detection
    turn(root / "train2017/2.jpg", 6)
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"][1] |= dict(height=WIDTH, width=HEIGHT)
    path.write_text(json.dumps(content))
    words = (
        f"2.jpg: cannot be read .*it has {HEIGHT} × {WIDTH} pixels, its annotations are for {WIDTH} × {HEIGHT}; "
        "it has an EXIF orientation: set orientation='exif'"
    )
    with pytest.raises(UnreadableImageError, match=words):
        built(cfg)[1]


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("backend", ["cv2", "pillow"])
def test_images_are_turned_upright_on_request(orientation, backend, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(scene(np.random.default_rng(1))[0]).save(path)
    turn(path, orientation)
    loaded = LoadReadableImage(orientation="exif", imdecode_backend=backend).transform(dict(img_path=str(path)))
    upright = LoadImageFromFile(imdecode_backend=backend).transform(dict(img_path=str(path)))
    np.testing.assert_array_equal(loaded["img"], upright["img"])
    assert loaded["ori_shape"] == upright["ori_shape"]
    with pytest.raises(UserError, match="orientation='up'"):
        LoadReadableImage(orientation="up")


def test_labels_of_upright_images(segmentation):
    """Labels that were drawn on upright images differ in size from the images as stored. The line says why."""
    cfg, root = segmentation
    for name in ("training/2", "validation/1"):
        turn(root / f"images/{name}.jpg", 6)
        path = root / f"annotations/{name}.png"
        Image.open(path).rotate(-90, expand=True).save(path)
    upright = copy.deepcopy(cfg)
    with pytest.raises(UnreadableImageError, match=r"2\.png: .*set orientation='exif'"):
        built(cfg)[2]
    for step in dicts(upright):
        if step.get("type") == "LoadImageFromFile":
            step["orientation"] = "exif"
    check_data(upright, "train_dataloader", "val_dataloader")
    sample = built(upright, "val_dataloader")[1]
    assert sample["data_samples"].gt_sem_seg.data.shape[1:] == (WIDTH, HEIGHT)
    assert count_turned(sampled_files(built(upright))) == dict(turned=1, sampled=6)


def test_loaders_agree_on_the_orientation(segmentation):
    cfg, _ = segmentation
    cfg.train_dataloader.dataset.pipeline[0].orientation = "exif"
    with pytest.raises(UserError, match=r"orientation .*train_dataloader exif.*val_dataloader stored"):
        check_data(cfg, "train_dataloader", "val_dataloader")


def damage(kind: str, path: Path) -> None:
    """Damage a file in a way."""
    content = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no image\n")
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)


DAMAGES = {
    "missing": "No such file",
    "empty": "not an image|OpenCV",
    "text": "not an image",
    "truncated": "not an image|truncated",
    "folder": "not a regular file",
    "pipe": "not a regular file",
}


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
@pytest.mark.parametrize("what", ["image", "label"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_unreadable_files_are_named(kind, what, loader, segmentation):
    """In one line, which keeps the name whatever the library raises."""
    cfg, root = segmentation
    split = "training" if loader == "train_dataloader" else "validation"
    path = root / (f"images/{split}/1.jpg" if what == "image" else f"annotations/{split}/1.png")
    dataset = built(cfg, loader)
    damage(kind, path)
    with pytest.raises(UnreadableImageError) as raised:
        dataset[1]
    error = raised.value
    assert (error.name, error.is_storage_error) == (str(path), False)
    line = rf"{what} {re.escape(str(path))}: cannot be read \(.*({DAMAGES[kind]}).*\); repair or remove it"
    assert re.fullmatch(line, str(error))


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_storage_that_does_not_respond(loader, segmentation, monkeypatch):
    """It is retried. Then training takes another image, and validation ends with "run me again"."""
    cfg, root = segmentation
    dataset = built(cfg, loader)
    pauses = []
    monkeypatch.setattr("sepvit_lib.training.storage.time.sleep", pauses.append)
    images = Path(dataset.data_prefix["img_path"])
    images.rename(tmp := root / "unmounted")
    with pytest.raises(UnreadableImageError if loader == "train_dataloader" else MachineError) as raised:
        dataset[1]
    assert f"image {images}/1.jpg: cannot be read (FileNotFoundError" in str(raised.value)
    assert getattr(raised.value, "is_storage_error", True)
    assert sum(pauses) == 60
    monkeypatch.setattr("sepvit_lib.training.storage.time.sleep", lambda _: images.exists() or tmp.rename(images))
    assert dataset[1] is not None


def test_unreadable_image_of_detection(detection):
    cfg, root = detection
    dataset = built(cfg)
    damage("empty", root / "train2017/3.jpg")
    with pytest.raises(UnreadableImageError, match=f"image {root}/train2017/3.jpg: cannot be read"):
        dataset[2]


def test_an_image_that_is_empty_for_mmcv_is_named(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UnreadableImageError, match=r"a\.jpg: cannot be read"):
        LoadReadableImage(ignore_empty=True).transform(dict(img_path=str(tmp_path / "a.jpg")))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "test_dataloader"])
def test_images_of_one_pixel_work_or_are_named(loader, size, segmentation):
    """A side of 3000 pixels, reduced to 160, leaves less than one of the other."""
    cfg, root = segmentation
    for path in root.glob("*/*/*"):
        Image.fromarray(np.ones((*size, 3) if path.suffix == ".jpg" else size, np.uint8)).save(path)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    dataset = built(cfg, loader)
    if size == (1, 1):
        assert all(image.numel() for image in dataset[0]["inputs"])
        return
    with pytest.raises(UnreadableImageError, match=rf"a transform fails on its {size[0]} × {size[1]} pixels") as raised:
        dataset[0]
    assert raised.value.name == dataset.get_data_info(0)["img_path"]
    for node in dicts(cfg[loader].dataset.pipeline):
        if "scale" in node:
            node["scale"] = (3000, 3000)
    assert mmseg.registry.DATASETS.build(cfg[loader].dataset)[0]["inputs"] is not None


@pytest.mark.parametrize("size", [(1, 1), (1, 3000)])
def test_boxes_of_one_pixel_work_or_are_named(size, detection):
    cfg, root = detection
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for image, annotation in zip(content["images"], content["annotations"]):
        image |= dict(height=size[0], width=size[1])
        annotation |= dict(bbox=[0, 0, size[1], size[0]], segmentation=dict(size=size, counts=[0, size[0] * size[1]]))
        Image.fromarray(np.ones((*size, 3), np.uint8)).save(root / "train2017" / image["file_name"])
    path.write_text(json.dumps(content))
    cfg.train_dataloader.dataset.filter_cfg.min_size = 0
    dataset = built(cfg)
    if max(size) == 1:
        assert dataset[0]["inputs"].numel()
    else:
        with pytest.raises(UnreadableImageError, match=r"1\.jpg: cannot be read .*its 1 × 3000 pixels"):
            dataset[0]


# ----------------------------------------------------------------------------------------------------------------------
# Labels
# ----------------------------------------------------------------------------------------------------------------------


def labels_of(path: Path, **kwargs: Any) -> np.ndarray:
    """Load a label map."""
    settings = {key: kwargs.pop(key) for key in ("num_classes", "ignore_index", "imdecode_backend") if key in kwargs}
    return LoadReadableLabels(**settings).transform(dict(seg_map_path=str(path), **kwargs))["gt_seg_map"]


@pytest.mark.parametrize("backend", ["cv2", "pillow"])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("mapping", [None, {0: 1, 1: 0, 2: 255, 3: 2}])
def test_labels_are_those_of_mmseg(mapping, reduced, backend, tmp_path):
    stored = np.random.default_rng(0).integers(0, 6, (20, 30)).astype(np.uint8)
    stored[0, :3] = 255
    Image.fromarray(stored).save(tmp_path / "a.png")
    results = dict(seg_map_path=str(tmp_path / "a.png"), reduce_zero_label=reduced, label_map=mapping, seg_fields=[])
    theirs = LoadAnnotations(imdecode_backend=backend).transform(copy.deepcopy(results))
    ours = LoadReadableLabels(imdecode_backend=backend).transform(copy.deepcopy(results))
    np.testing.assert_array_equal(ours["gt_seg_map"], theirs["gt_seg_map"])
    assert ours["gt_seg_map"].dtype == theirs["gt_seg_map"].dtype == np.uint8
    assert ours["seg_fields"] == theirs["seg_fields"] == ["gt_seg_map"]


def test_forms_of_labels(tmp_path):
    """16 bits, palettes, one bit and one row hold labels too."""
    stored = np.random.default_rng(0).integers(0, 2, (20, 30)).astype(np.uint8)
    palette = Image.fromarray(stored)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    images = dict(deep=Image.fromarray(stored.astype(np.uint16)), palette=palette, bit=Image.fromarray(stored > 0))
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(labels_of(tmp_path / f"{name}.png", num_classes=2), stored)
    Image.fromarray(stored[:1]).save(tmp_path / "row.png")
    assert labels_of(tmp_path / "row.png", ori_shape=(1, 30)).shape == (1, 30)


def write_wrong_label(kind: str, path: Path, stored: np.ndarray) -> None:
    """Replace a label map by one that does not fit."""
    image = Image.fromarray(stored)
    if kind == "RGB":
        image = image.convert("RGB")
    elif kind == "RGBA":
        image = image.convert("RGBA")
    elif kind == "another size":
        image = image.resize((48, 40), Image.Resampling.NEAREST)
    elif kind == "beyond the classes":
        image = Image.fromarray(np.where(stored == 2, 7, stored))
    elif kind == "beyond 8 bits":
        image = Image.fromarray(np.where(stored == 2, 258, stored.astype(np.uint16)))
    elif kind == "fractions":
        image = Image.fromarray(stored.astype(np.float32))
    image.save(path, format={"JPEG": "JPEG", "fractions": "TIFF"}.get(kind, "PNG"))


WRONG_LABELS = {
    "RGB": "it has 3 channels; a label map has one",
    "RGBA": "it has 4 channels",
    "JPEG": "a JPEG, which changes values",
    "another size": f"it has 40 × 48 pixels, its image {HEIGHT} × {WIDTH}",
    "beyond the classes": f"it has the value 7 in {SIDE**2} pixels, beyond the 2 classes",
    "beyond 8 bits": f"it has the value 258 in {SIDE**2} pixels, beyond the 2 classes",  # 258 is 2 in 8 bits
    "fractions": "its values are no whole numbers",
}


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_labels_that_do_not_fit_are_named(kind, loader, segmentation):
    cfg, root = segmentation
    path = root / f"annotations/{'training' if loader == 'train_dataloader' else 'validation'}/1.png"
    write_wrong_label(kind, path, np.asarray(Image.open(path)))
    with pytest.raises(UnreadableImageError, match=re.escape(WRONG_LABELS[kind])) as raised:
        built(cfg, loader)[1]
    assert raised.value.name == str(path)
    assert str(raised.value).startswith(f"label {path}: cannot be read")


def test_ignored_pixels_are_no_classes(tmp_path):
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(tmp_path / "a.png")
    assert labels_of(tmp_path / "a.png", num_classes=2).tolist() == [[0, 1, 255]]
    assert labels_of(tmp_path / "a.png", num_classes=1, reduce_zero_label=True).tolist() == [[255, 0, 255]]
    with pytest.raises(UnreadableImageError, match="the value 255 in 1 pixels, beyond the 2 classes"):
        labels_of(tmp_path / "a.png", num_classes=2, ignore_index=254)
    with pytest.raises(UnreadableImageError, match="the value 1 in 1 pixels, beyond the 1 classes"):
        labels_of(tmp_path / "a.png", num_classes=1)


def test_transform_and_data_set_that_number_differently(tmp_path):
    Image.fromarray(np.ones((2, 2), np.uint8)).save(tmp_path / "a.png")
    transform = LoadReadableLabels(reduce_zero_label=True)
    with pytest.raises(UserError, match="reduce_zero_label=True: the data set has False; remove it"):
        transform.transform(dict(seg_map_path=str(tmp_path / "a.png"), reduce_zero_label=False))


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
@pytest.mark.parametrize(
    "segmentation_of_object", [dict(size=[9, 9], counts="abc"), dict(size=[HEIGHT, WIDTH], counts=[-5, 9]), [["a"] * 6]]
)
def test_damaged_masks_are_named(segmentation_of_object, loader, detection):
    cfg, root = detection
    split = "train2017" if loader == "train_dataloader" else "val2017"
    path = root / f"annotations/instances_{split}.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["segmentation"] = segmentation_of_object
    path.write_text(json.dumps(content))
    with pytest.raises(UnreadableImageError, match=f"annotations of image {root}/{split}/2.jpg: cannot be read"):
        built(cfg, loader)[1]


# ----------------------------------------------------------------------------------------------------------------------
# Configs with checked loading
# ----------------------------------------------------------------------------------------------------------------------

PAPER = sorted(path for folder in (SEGMENTATION, DETECTION) for path in folder.glob("*_sepvit_[tl]*.py"))


@pytest.mark.parametrize("path", PAPER, ids=[path.stem for path in PAPER])
def test_every_pipeline_is_checked(path):
    """Nested ones too, and nothing else changes. A second call changes nothing."""
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    plain = cfg.to_dict()
    use_checked_loading(cfg)
    checked = cfg.to_dict()
    use_checked_loading(cfg)
    assert cfg.to_dict() == checked
    names = {
        "LoadReadableImage": "LoadImageFromFile",
        "LoadReadableLabels": "LoadAnnotations",
        "LoadReadableInstances": "LoadAnnotations",
        "CompleteCocoDataset": "CocoDataset",
        "CompleteCocoMetric": "CocoMetric",
    }
    pipelines = ["tta_pipeline"] if "tta_pipeline" in cfg else []
    for place in (*pipelines, "train_dataloader", "val_dataloader", "test_dataloader", "val_evaluator"):
        loaded = {node["type"] for node in dicts([checked[place]]) if isinstance(node.get("type"), str)}
        assert not loaded & {"LoadImageFromFile", "LoadAnnotations", "CocoDataset", "CocoMetric"}
    for node in dicts(checked):
        if node.get("type") == "LoadReadableLabels":
            count = len(checked["metainfo"]["classes"]) if "metainfo" in checked else 150
            assert (node.pop("num_classes"), node.pop("ignore_index")) == (count, 255)
        node["type"] = names.get(node.get("type"), node.get("type"))
        if node["type"] is None:
            del node["type"]
        if node.get("pipeline") and node["pipeline"][0]["type"] == "NamedSteps":
            node["pipeline"] = node["pipeline"][0]["transforms"]
    checked["custom_imports"]["imports"] = [
        name for name in checked["custom_imports"]["imports"] if name != "sepvit_lib.dense.coco"
    ]
    assert checked == plain


def test_nested_pipelines_are_checked(of_boxed):
    """Those of transforms that choose, and of data sets that wrap others."""
    cfg = copy.deepcopy(of_boxed)
    init_default_scope("mmdet")
    inner = cfg.train_dataloader.dataset
    load, boxes = inner.pipeline[:2]
    inner.pipeline = [dict(type="RandomChoice", transforms=[[load, boxes], [dict(load), dict(boxes)]])]
    outer = dict(
        type="MultiImageMixDataset",
        dataset=dict(type="RepeatDataset", times=2, dataset=inner),
        pipeline=[dict(type="Resize", scale=(64, 64))],
    )
    cfg.train_dataloader.dataset = outer
    use_checked_loading(cfg)
    types = [node.get("type") for node in dicts(cfg.train_dataloader.dataset)]
    assert types.count("LoadReadableImage") == types.count("LoadReadableInstances") == 2
    assert "LoadImageFromFile" not in types
    assert cfg.train_dataloader.dataset.pipeline[0].type == "Resize"
    assert cfg.train_dataloader.dataset.dataset.dataset.pipeline[0].type == "NamedSteps"


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_fingerprints_do_not_depend_on_the_place_of_the_data(kind, of_labelled, of_boxed, tmp_path, monkeypatch):
    """Also of data sets that consist of others."""
    cfg = of_labelled if kind == "segmentation" else of_boxed
    init_default_scope(cfg.default_scope)
    found = []
    for place in ("first", "second/inner"):
        shutil.copytree(cfg.data_root, tmp_path / place)
        moved = copy.deepcopy(cfg)
        move(moved, cfg.data_root, str(tmp_path / place))
        inner = moved.train_dataloader.dataset
        moved.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[inner, copy.deepcopy(inner)])
        monkeypatch.chdir(tmp_path / place)
        found.append(describe_samples(built(moved)))
    assert found[0] == found[1]
    assert found[0]["images"] == 12


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_config_that_a_run_writes_is_read_again(kind, of_labelled, of_boxed, tmp_path):
    cfg = copy.deepcopy(of_labelled if kind == "segmentation" else of_boxed)
    init_default_scope(cfg.default_scope)
    use_checked_loading(cfg)
    cfg.dump(tmp_path / "written.py")
    again = read(tmp_path / "written.py")
    check_data(again, "train_dataloader", "val_dataloader")
    assert len(built(again)) == 6
    assert again.to_dict() == cfg.to_dict()


def test_former_setting_of_the_image_loader(of_labelled):
    cfg = copy.deepcopy(of_labelled)
    init_default_scope("mmseg")
    cfg.train_dataloader.dataset.pipeline[0] = dict(type="LoadReadableImage", max_unreadable=3)
    with pytest.raises(UserError, match=r"LoadReadableImage max_unreadable=3: no longer a setting; remove it"):
        use_checked_loading(cfg)


def test_classes_of_the_data_set_limit_its_labels(of_labelled):
    """A choice of ADE20K's classes keeps its numbering."""
    cfg = copy.deepcopy(of_labelled)
    init_default_scope("mmseg")
    cfg.train_dataloader.dataset |= dict(type="ADE20KDataset", metainfo=dict(classes=("sky", "wall")))
    cfg.model.decode_head.ignore_index = 254
    use_checked_loading(cfg)
    step = next(node for node in dicts(cfg.train_dataloader) if node.get("type") == "LoadReadableLabels")
    assert (step.num_classes, step.ignore_index) == (2, 254)
    dataset = mmseg.registry.DATASETS.build(cfg.train_dataloader.dataset)
    assert {0: 1, 2: 0, 1: 255}.items() <= dataset.label_map.items()


# ----------------------------------------------------------------------------------------------------------------------
# Checks before training: segmentation
# ----------------------------------------------------------------------------------------------------------------------


Spoil = Callable[[Config, Path], Any]  # damages a copy of a data set, or its config


def remove(*names: str) -> Spoil:
    def spoil(cfg: Config, root: Path) -> None:
        for name in names:
            (root / name).unlink()

    return spoil


def rename(pattern: str, suffix: str) -> Spoil:
    return lambda cfg, root: [path.rename(path.with_suffix(suffix)) for path in root.glob(pattern)]


def empty(folder: str, is_kept: bool = True) -> Spoil:
    def spoil(cfg: Config, root: Path) -> None:
        shutil.rmtree(root / folder)
        if is_kept:
            (root / folder).mkdir()

    return spoil


def list_images(text: str) -> Spoil:
    put_list = put("train_dataloader.dataset", ann_file="list.txt")
    return lambda cfg, root: ((root / "list.txt").write_text(text), put_list(cfg, root))


def put(place: str, **values: Any) -> Spoil:
    """Change a dict of the config."""

    def spoil(cfg: Config, root: Path) -> None:
        node: Any = cfg
        for key in place.split("."):
            node = node[key]
        for key, value in values.items():
            node[key] = value.format(root=root) if isinstance(value, str) else value

    return spoil


TRAIN, VAL = "train_dataloader.dataset", "val_dataloader.dataset"
ADE20K = "wall, building, sky, floor, tree, ceiling, road, bed , windowpane, grass, cabinet, sidewalk, … (150 in all)"
UNFIT_LABELLED: dict[str, tuple[Spoil, str]] = {
    "no folder": (empty(".", is_kept=False), "train data {root}: no such folder; put the data set there"),
    "no images' folder": (
        empty("images/validation", is_kept=False),
        "val data {root}/images/validation: no such folder",
    ),
    "empty folder": (empty("images/training"), "train data {root}/images/training: an empty folder"),
    "empty validation": (empty("images/validation"), "val data {root}/images/validation: an empty folder"),
    "another suffix": (
        rename("images/*/*", ".PNG"),
        "train data {root}/images/training: no image ends in .jpg, 6 in .PNG; set img_suffix='.PNG' in the config",
    ),
    "no image at all": (
        rename("images/validation/*", ".txt"),
        "val data {root}/images/validation: no image ends in .jpg; set img_suffix",
    ),
    "no label": (
        remove("annotations/training/3.png", "annotations/training/4.png"),
        "train labels {root}/annotations/training: 2 of 6 are missing, the first is 3.png, of "
        "{root}/images/training/3.jpg; labels have their image's name with seg_map_suffix='.png'",
    ),
    "labels of another suffix": (
        rename("annotations/validation/*", ".tif"),
        "val labels {root}/annotations/validation: 2 of 2 are missing, the first is 0.png",
    ),
    "no list": (put(TRAIN, ann_file="list.txt"), "train data {root}/list.txt: no such file"),
    "list with suffixes": (
        list_images("0.jpg\n1.jpg\n"),
        "{root}/list.txt: 2 of its 2 images are missing, the first is {root}/images/training/0.jpg.jpg; its lines are "
        "names of images below {root}/images/training, without .jpg",
    ),
    "empty list": (list_images(""), "train data {root}/list.txt: names no image"),
    "argument that is none": (put(VAL, image_suffix=".png"), "val_dataloader.dataset: "),
    "type that is none": (put(VAL, type="Streets"), "val_dataloader.dataset.type=Streets: no such data set"),
    "no classes": (put(TRAIN, metainfo={}), "train_dataloader.dataset: BaseSegDataset has no classes; set metainfo"),
    "a text": (
        put(f"{TRAIN}.metainfo", classes="ground"),
        "train_dataloader.dataset.metainfo classes='ground': a text, neither names nor a file of names; a tuple of one "
        "name has a comma: classes=('ground',)",
    ),
    "numbers": (put(f"{TRAIN}.metainfo", classes=(0, 1)), "metainfo classes=(0, 1): takes the names of the classes"),
    "twice": (put(f"{TRAIN}.metainfo", classes=("a", "b", "a")), "metainfo classes: has a several times"),
    "twice, in two forms": (put(f"{TRAIN}.metainfo", classes=("\u00e9", "e\u0301")), "several times"),
    "none of ADE20K's": (
        put(TRAIN, type="ADE20KDataset"),
        f"train_dataloader.dataset.metainfo: ground, square are none of the classes of ADE20KDataset, {ADE20K}",
    ),
    "classes that differ": (
        put(f"{VAL}.metainfo", classes=("ground", "disc")),
        "val_dataloader.dataset has the classes ground, disc, train_dataloader.dataset ground, square",
    ),
    "number of classes": (
        put("model.decode_head", num_classes=5),
        "model.decode_head.num_classes=5: the data set has 2 classes, ground, square; state as many",
    ),
    "auxiliary heads": (
        put("model", auxiliary_head=[dict(num_classes=2), dict(num_classes=3)]),
        "model.auxiliary_head.1.num_classes=3: the data set has 2 classes, ground, square",
    ),
    "a softmax over one channel": (
        put("model.decode_head", out_channels=1),
        "model.decode_head.out_channels=1: a softmax over one channel learns nothing; set",
    ),
    "one class": (put(f"{TRAIN}.metainfo", classes=("square",)), "train_dataloader.dataset: a single class (square) "),
    "several suffixes": (put(TRAIN, img_suffix=(".jpg", ".png")), "img_suffix=('.jpg', '.png'): takes one suffix"),
    "several suffixes of labels": (put(VAL, seg_map_suffix=[".png"]), "seg_map_suffix=['.png']: takes one suffix"),
    "class weights": (
        put("model.decode_head.loss_decode", class_weight=[1, 1, 1]),
        "model.decode_head.loss_decode.class_weight has 3 weights for the 2 classes ground, square",
    ),
    "palette": (
        put(f"{TRAIN}.metainfo", palette=[[0, 0, 0]]),
        "train_dataloader.dataset.metainfo: palette has 1 colours for the 2 classes ground, square",
    ),
}


def refuse(cfg: Config, root: Path, spoil: Callable[[Config, Path], None], words: str) -> None:
    """Spoil a data set, and require that it is refused with these words."""
    spoil(cfg, root)
    with pytest.raises(UserError) as raised:
        check_data(cfg, "train_dataloader", "val_dataloader")
    assert words.format(root=root) in str(raised.value)


@pytest.mark.parametrize("mistake", UNFIT_LABELLED)
def test_unfit_segmentation_data(mistake, segmentation):
    refuse(*segmentation, *UNFIT_LABELLED[mistake])


def test_images_of_another_suffix_are_mentioned(segmentation, capsys):
    cfg, root = segmentation
    check_data(cfg, "train_dataloader", "val_dataloader")
    assert capsys.readouterr().out == ""
    (root / "images/training/3.jpg").rename(root / "images/training/3.png")
    (root / "images/training/notes.txt").touch()
    check_data(cfg, "train_dataloader", "val_dataloader")
    words = "images/training: 5 images end in .jpg; others are left out: 1 in .png\n"
    assert capsys.readouterr().out == f"WARNING: train data {root}/{words}"


def test_hidden_files_and_blank_lines_name_no_image(segmentation, capsys):
    """Those of Macs and notebooks, in folders; and the last lines of lists."""
    cfg, root = segmentation
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        (root / f"{kind}/training/.ipynb_checkpoints").mkdir()
        shutil.copy(root / f"{kind}/training/0.{suffix}", root / f"{kind}/training/.ipynb_checkpoints/0.{suffix}")
        (root / f"{kind}/training/._0.{suffix}").touch()
    (root / "images/training/._1.png").touch()
    check_data(cfg, "train_dataloader")
    assert capsys.readouterr().out == ""
    assert len(built(cfg)) == 6
    list_images("0\n\n5\n  \n")(cfg, root)
    check_data(cfg, "train_dataloader")
    assert [Path(built(cfg).get_data_info(index)["img_path"]).name for index in (0, 1)] == ["0.jpg", "5.jpg"]


@pytest.mark.parametrize("values", [(0, 255), (1, 2), (0, 1)])
def test_classes_that_no_label_has_are_named(values, segmentation, capsys):
    """Masks of 0 and 255 have one class, since 255 is none; labels that count from 1 lack the first."""
    cfg, root = segmentation
    for loader in ("train_dataloader", "val_dataloader"):
        cfg[loader].dataset.reduce_zero_label = False
        cfg[loader].dataset.metainfo = dict(classes=("ground", "square", "sky"))
    cfg.model.decode_head.num_classes = 3
    cfg.model.decode_head.loss_decode.pop("class_weight", None)
    for path in root.glob("annotations/*/*.png"):
        Image.fromarray(np.array([0, *values], np.uint8)[np.asarray(Image.open(path))]).save(path)
    check_data(cfg, "train_dataloader", "val_dataloader")
    lines = capsys.readouterr().out.splitlines()
    unmet = [name for number, name in enumerate(("ground", "square", "sky")) if number not in values]
    assert [line.partition("no pixel of the classes ")[2].partition(" in ")[0] for line in lines] == [", ".join(unmet)]
    assert f"train labels {root}/annotations/training: " in lines[0]
    assert ("255 is ignored" in lines[0]) == (255 in values)


def test_of_many_labels_a_sample_is_read(segmentation, capsys, monkeypatch):
    """It says nothing about classes that are too many for it."""
    cfg, root = segmentation
    for path in root.glob("annotations/training/*.png"):
        Image.fromarray(np.ones((HEIGHT, WIDTH), np.uint8)).save(path)
    monkeypatch.setattr("sepvit_lib.dense.data.MAX_LABELS", 3)
    check_data(cfg, "train_dataloader")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sepvit_lib.dense.data.LABELS_PER_CLASS", 1)
    check_data(cfg, "train_dataloader")
    assert "no pixel of the classes square in 3 of its 6 label maps" in capsys.readouterr().out


def test_batches_of_images_of_different_sizes(segmentation):
    """mmseg evaluates them one by one only. Batches whose images the pipeline resizes to one size are fine."""
    cfg, root = segmentation
    for loader in ("val_dataloader", "test_dataloader"):
        cfg[loader].batch_size = 2
    check_data(cfg, "val_dataloader", "test_dataloader")
    for path in (root / "images/validation/1.jpg", root / "annotations/validation/1.png"):
        Image.open(path).resize((WIDTH, WIDTH), Image.Resampling.NEAREST).save(path)
    for loader in ("val_dataloader", "test_dataloader"):
        with pytest.raises(UserError, match=rf"{loader}\.batch_size=2: .*/images/validation/0\.jpg"):
            check_data(cfg, loader)
    cfg.test_dataloader.dataset.pipeline = copy.deepcopy(cfg.tta_pipeline)
    with pytest.raises(UserError, match=r"test_dataloader\.batch_size=2"):
        check_data(cfg, "test_dataloader")
    for node in dicts([cfg.val_dataloader, cfg.test_dataloader]):
        if "keep_ratio" in node:
            node["keep_ratio"] = False
    check_data(cfg, "val_dataloader", "test_dataloader")


def test_lists_and_images_without_labels(segmentation):
    """Lists name images without suffixes. Predictions for a test set need no labels."""
    cfg, root = segmentation
    (root / "images/training/inner").mkdir()
    (root / "annotations/training/inner").mkdir()
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        (root / f"{kind}/training/5.{suffix}").rename(root / f"{kind}/training/inner/5.{suffix}")
    list_images("0\ninner/5\n")(cfg, root)
    check_data(cfg, "train_dataloader")
    shutil.rmtree(root / "annotations/validation")
    del cfg.test_dataloader.dataset.data_prefix.seg_map_path
    pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.test_dataloader.dataset.pipeline = [step for step in pipeline if step.type != "LoadAnnotations"]
    check_data(cfg, "test_dataloader")


def test_data_elsewhere_are_not_listed(segmentation):
    cfg, root = segmentation
    move(cfg, str(root), "s3://bucket/data")
    check_data(cfg, "train_dataloader", "val_dataloader")


# ----------------------------------------------------------------------------------------------------------------------
# Checks before training: COCO
# ----------------------------------------------------------------------------------------------------------------------


def change(function: Callable[[dict[str, Any]], Any], split: str = "train2017") -> Spoil:
    """Change the content of an annotation file."""

    def spoil(cfg: Config | None, root: Path) -> None:
        path = root / f"annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))

    return spoil


def each(key: str, function: Callable[[dict[str, Any]], Any], split: str = "train2017") -> Spoil:
    """Change all entries of a list in an annotation file."""
    return change(lambda content: [function(entry) for entry in content[key]], split)


def rewrite(function: Callable[[bytes], bytes]) -> Spoil:
    """Change the bytes of the training annotations."""

    def spoil(cfg: Config, root: Path) -> None:
        path = root / "annotations/instances_train2017.json"
        path.write_bytes(function(path.read_bytes()))

    return spoil


def evaluate_by_other_images(cfg: Config, root: Path) -> None:
    """Let the evaluator read annotations of other images than the data set's."""
    shutil.copy(root / "annotations/instances_val2017.json", root / "other.json")
    each("images", lambda one: one.update(id=one["id"] + 1), "val2017")(cfg, root)
    each("annotations", lambda one: one.update(image_id=2), "val2017")(cfg, root)
    cfg.val_evaluator.ann_file = f"{root}/other.json"


FILE = "train annotations {root}/annotations/instances_train2017.json: "
BOTH = "the classes are cat, dog; the file's categories are "
UNFIT_BOXED: dict[str, tuple[Spoil, str]] = {
    "no file": (
        remove("annotations/instances_val2017.json"),
        "val data {root}/annotations/instances_val2017.json: no such file",
    ),
    "truncated": (rewrite(lambda content: content[:500]), FILE + "not JSON, or truncated ("),
    "no text": (rewrite(lambda content: b"\xff\xfe\x00\x80"), FILE + "not JSON, or truncated ("),
    "a list": (rewrite(lambda content: b"[1, 2]"), FILE + "a list, not COCO's format, an object with images"),
    "no categories": (
        change(lambda content: content.pop("categories")),
        FILE + "has no categories; COCO's format is an object with images, annotations, categories",
    ),
    "no images": (change(lambda content: content.update(images=[])), FILE + "has no images"),
    "no annotations": (change(lambda content: content.update(annotations=[])), FILE + "has no annotations"),
    "no annotations in validation": (
        change(lambda content: content.pop("annotations"), "val2017"),
        "val annotations {root}/annotations/instances_val2017.json: has no annotations",
    ),
    "annotations that are no list": (
        change(lambda content: content.update(annotations={})),
        FILE + "has, but not as a list, annotations",
    ),
    "an entry of another kind": (
        change(lambda content: content["images"].append(7)),
        FILE + "images[6] is 7, not an object with id, file_name, height, width",
    ),
    "no size": (change(lambda content: content["images"][2].pop("height")), FILE + "images[2] has no height"),
    "no box": (change(lambda content: content["annotations"][1].pop("bbox")), FILE + "annotations[1] has no bbox"),
    "half a box": (
        change(lambda content: content["annotations"][1].update(bbox=[1, 2])),
        FILE + "annotation 2 has bbox [1, 2], not four numbers",
    ),
    "the same id": (
        each("annotations", lambda one: one.update(id=1)),
        FILE + "several of its annotations have the id 1; ids are unique",
    ),
    "another name": (
        change(lambda content: content["categories"][1].update(name="Dog")),
        FILE + f"no category is named dog: {BOTH}cat, Dog; set metainfo",
    ),
    "other names": (
        each("categories", lambda one: one.update(name=f"class {one['id']}")),
        FILE + f"no category is named cat, dog: {BOTH}class 3, class 7",
    ),
    "the same name": (
        each("categories", lambda one: one.update(name="cat")),
        FILE + "has several categories named cat",
    ),
    "ids as texts": (
        each("categories", lambda one: one.update(id=str(one["id"]))),
        FILE + "categories have ids such as '3'; ids are whole numbers",
    ),
    "categories as texts": (
        each("annotations", lambda one: one.update(category_id=str(one["category_id"]))),
        FILE + "6 annotations are of category '7', which its categories have not: 3, 7",
    ),
    "other ids": (
        each("annotations", lambda one: one.update(category_id=1)),
        FILE + "6 annotations are of category 1, which its categories have not: 3, 7",
    ),
    "other images": (
        each("annotations", lambda one: one.update(image_id=str(one["id"]))),
        FILE + "no annotation is of its images, the first is of image_id '1'",
    ),
    "no masks": (
        each("annotations", lambda one: one.pop("segmentation")),
        FILE + "6 of 6 annotations have no segmentation, the first is 1; a model with masks needs it",
    ),
    "images without a size": (each("images", lambda one: one.update(height=None)), FILE + "images[0] has no height"),
    "images without a name": (
        each("images", lambda one: one.update(file_name=7)),
        FILE + "images[0] has file_name 7, not a text",
    ),
    "small images": (
        each("images", lambda one: one.update(height=31)),
        FILE + "all 6 images are smaller than 32 pixels, and filter_cfg leaves them out",
    ),
    "no files of images": (
        remove(*(f"train2017/{number}.jpg" for number in range(2, 7))),
        FILE + "5 of its 6 images are missing, the first is {root}/train2017/2.jpg",
    ),
    "no file of a validation image": (
        remove("val2017/2.jpg"),
        "instances_val2017.json: 1 of its 2 images are missing, the first is {root}/val2017/2.jpg",
    ),
    "a text": (
        put(f"{TRAIN}.metainfo", classes="cat"),
        "train_dataloader.dataset.metainfo classes='cat': a text, neither names nor a file of names",
    ),
    "number of classes of boxes": (
        put("model.roi_head.bbox_head", num_classes=80),
        "model.roi_head.bbox_head.num_classes=80: the data set has 2 classes, cat, dog",
    ),
    "number of classes of masks": (
        put("model.roi_head.mask_head", num_classes=3),
        "model.roi_head.mask_head.num_classes=3: the data set has 2 classes, cat, dog",
    ),
    "class weights": (
        put("model.roi_head.bbox_head.loss_cls", class_weight=[1, 1]),
        "roi_head.bbox_head.loss_cls.class_weight has 2 weights for the 2 classes cat, dog and the background",
    ),
    "palette": (
        put(f"{VAL}.metainfo", palette=[[0, 0, 0]] * 3),
        "val_dataloader.dataset.metainfo: palette has 3 colours for the 2 classes",
    ),
    "evaluator without a file": (
        put("val_evaluator", ann_file="none.json"),
        "val_evaluator.ann_file=none.json: no such file; the data set's is {root}/annotations/instances_val2017.json",
    ),
    "evaluator of other images": (
        evaluate_by_other_images,
        "val_evaluator.ann_file={root}/other.json: has not all images of {root}/annotations/instances_val2017.json",
    ),
}


@pytest.mark.parametrize("mistake", UNFIT_BOXED)
def test_unfit_detection_data(mistake, detection):
    refuse(*detection, *UNFIT_BOXED[mistake])


def add_cow(content: dict[str, Any]) -> None:
    """Add a category that is no class, and let an annotation be of it."""
    content["categories"].append(dict(id=9, name="cow"))
    content["annotations"][0]["category_id"] = 9


WARNINGS: dict[str, tuple[Spoil, str]] = {
    "crowds": (
        each("annotations", lambda one: one.update(iscrowd=1)),
        "all 6 annotations are crowds or empty boxes, from which nothing is learned",
    ),
    "empty boxes": (
        each("annotations", lambda one: one.update(bbox=[5, 5, 0, 9])),
        "all 6 annotations are crowds or empty boxes",
    ),
    "empty boxes without an area": (
        each("annotations", lambda one: one.update(bbox=[5, 5, 0, 9], area=None)),
        "all 6 annotations are crowds or empty boxes",
    ),
    "a class without objects": (
        each("annotations", lambda one: one.update(category_id=3)),
        "no annotation is of the classes dog",
    ),
    "a category that is not listed": (
        each("annotations", lambda one: one.update(category_id=5) if one["id"] == 1 else None),
        "1 annotations are left out, of categories that it does not list, such as 5",
    ),
    "another category": (change(add_cow), "1 annotations are left out, of categories that are not classes: cow"),
    "no image of an annotation": (
        change(lambda content: content["annotations"][0].update(image_id=99)),
        "1 annotations are of no image, the first of image_id 99",
    ),
    "a small image": (
        change(lambda content: content["images"][0].update(width=9)),
        "1 of its 6 images are smaller than 32 pixels, and left out by filter_cfg",
    ),
    "one missing image, which training replaces": (
        remove("train2017/2.jpg"),
        "1 of its 6 images are missing, the first is {root}/train2017/2.jpg",
    ),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_warnings_of_detection_data(case, detection, capsys):
    cfg, root = detection
    spoil, words = WARNINGS[case]
    spoil(cfg, root)
    check_data(cfg, "train_dataloader", "val_dataloader")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"WARNING: train annotations {root}/annotations/instances_train2017.json: ")
    assert words.format(root=root) in lines[0]


def test_leftovers_of_annotation_tools_and_empty_lists(detection, capsys):
    """Empty boxes without a mask, which mmdet skips; and no annotations where nothing is evaluated."""
    cfg, root = detection
    change(lambda content: content["annotations"][0].update(bbox=[5, 5, 0, 0], segmentation=[]))(cfg, root)
    check_data(cfg, "train_dataloader")
    change(lambda content: content.update(annotations=[]), "val2017")(cfg, root)
    cfg.test_evaluator = []
    check_data(cfg, "test_dataloader")
    assert capsys.readouterr().out == ""


def test_sound_detection_data(detection, capsys):
    """Boxes are enough without a mask head. A test set needs no annotations if nothing is evaluated."""
    cfg, root = detection
    check_data(cfg, "train_dataloader", "val_dataloader", "test_dataloader")
    assert capsys.readouterr().out == ""
    for split in ("train2017", "val2017"):
        each("annotations", lambda one: one.pop("segmentation"), split)(cfg, root)
    for node in dicts(cfg):
        node.pop("with_mask", None)
    cfg.val_evaluator.metric = cfg.test_evaluator.metric = "bbox"
    check_data(cfg, "train_dataloader", "val_dataloader", "test_dataloader")
    change(lambda content: content.pop("annotations"), "val2017")(cfg, root)
    cfg.test_evaluator = [dict(**cfg.test_evaluator, outfile_prefix="out")]
    cfg.test_evaluator[0].format_only = True
    check_data(cfg, "test_dataloader")
    cfg.test_evaluator = []
    check_data(cfg, "test_dataloader")


@pytest.mark.parametrize("missing", [("iscrowd",), ("area",), ("iscrowd", "area"), ("iscrowd", "area", "segmentation")])
def test_missing_iscrowd_and_area_are_filled_in(missing, detection):
    """Training samples, and the metrics of perfect detections, are those of complete annotations."""
    cfg, root = detection
    masks = "segmentation" not in missing
    if not masks:
        for node in dicts(cfg):
            node.pop("with_mask", None)
        cfg.val_evaluator.metric = "bbox"
    complete = [[one["instances"] for one in map(built(cfg).get_data_info, range(6))]]
    for split in ("train2017", "val2017"):
        each("annotations", lambda one: [one.pop(key) for key in missing], split)(cfg, root)
    check_data(cfg, "train_dataloader", "val_dataloader")
    complete.append([one["instances"] for one in map(built(cfg).get_data_info, range(6))])
    if masks:
        assert complete[0] == complete[1]
    assert [len(instances) for instances in complete[1]] == [1] * 6
    figures = perfect_figures(cfg, root)
    assert figures["coco/bbox_mAP"] == 1
    assert figures.get("coco/segm_mAP", 1) == 1


def mask_of(mark: dict[str, Any]) -> np.ndarray:
    """Mask of a square object, which its box gives, too."""
    left, top, width, height = (round(value) for value in mark["bbox"])
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def test_annotations_may_count_from_0(detection):
    """pycocotools takes a match with annotation 0 for none."""
    cfg, root = detection
    each("annotations", lambda one: one.update(id=one["id"] - 1), "val2017")(cfg, root)
    check_data(cfg, "val_dataloader")
    figures = perfect_figures(cfg, root)
    assert (figures["coco/bbox_mAP"], figures["coco/segm_mAP"]) == (1, 1)
    cfg.val_evaluator.sort_categories = True
    assert perfect_figures(cfg, root)["coco/bbox_mAP"] == 1


def test_classes_in_another_order_than_the_categories(detection):
    """Labels follow the classes, and so do the figures of each class, also where ids are in no order."""
    cfg, root = detection
    for split in ("train2017", "val2017"):
        change(lambda content: content["categories"].reverse(), split)(cfg, root)
    labels = [{one["bbox_label"] for one in info["instances"]} for info in map(built(cfg).get_data_info, range(6))]
    assert labels == [{1}, {0}] * 3
    for names in (("cat", "dog"), ("dog", "cat")):
        for loader in ("train_dataloader", "val_dataloader"):
            cfg[loader].dataset.metainfo = dict(classes=names)
        check_data(cfg, "train_dataloader", "val_dataloader")
        cfg.val_evaluator.classwise = True
        figures = perfect_figures(cfg, root, missed=7)
        assert (figures["coco/cat_precision"], figures["coco/dog_precision"]) == (1, 0)
        objects = built(cfg, "val_dataloader").get_data_info(0)["instances"]
        assert [names[one["bbox_label"]] for one in objects] == ["dog"]


def test_names_in_either_form_of_unicode(detection):
    """Names that were typed on a Mac may be decomposed."""
    cfg, root = detection
    names = {"cat": "b\u00e9b\u00e9", "dog": "dog"}
    for split in ("train2017", "val2017"):
        each("categories", lambda one: one.update(name=names[one["name"]]), split)(cfg, root)
    decomposed = ("be\u0301be\u0301", "dog")
    for loader in ("train_dataloader", "val_dataloader"):
        cfg[loader].dataset.metainfo = dict(classes=decomposed)
    check_data(cfg, "train_dataloader", "val_dataloader")
    assert len(built(cfg).get_data_info(1)["instances"]) == 1
    assert perfect_figures(cfg, root)["coco/bbox_mAP"] == 1


SQUARE = [10, 10, 10, 40, 40, 40, 40, 10]
NOTHING = {
    "an empty polygon": dict(segmentation=[[]]),
    "four numbers": dict(segmentation=[[10, 10, 40, 40]]),
    "an odd number": dict(segmentation=[SQUARE[:7]]),
    "a corner that is not finite": dict(segmentation=[[*SQUARE[:7], float("nan")]]),
    "run lengths without counts": dict(segmentation=dict(size=[HEIGHT, WIDTH])),
    "a box that is none": dict(bbox=[float("nan"), 10, 30, 30]),
    "an endless box": dict(bbox=[10, 10, float("inf"), 30]),
}


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("has_masks", [True, False])
def test_objects_without_extent_are_ignored(kind, has_masks, detection, capsys):
    """In training and evaluation alike, with a warning. A box without a mask counts where masks are not used."""
    cfg, root = detection
    if not has_masks:
        for node in dicts(cfg):
            node.pop("with_mask", None)
        cfg.val_evaluator.metric = "bbox"
    usual = dict(image_id=1, category_id=3, iscrowd=0, bbox=[10, 10, 30, 30], area=900, segmentation=[SQUARE])
    add = change(lambda content: content["annotations"].append(dict(usual, id=50, **NOTHING[kind])), "train2017")
    add(cfg, root)
    change(lambda content: content["annotations"].insert(0, dict(usual, id=50, **NOTHING[kind])), "val2017")(cfg, root)
    check_data(cfg, "train_dataloader", "val_dataloader")
    is_skipped = has_masks or "bbox" in NOTHING[kind]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("annotations/")[2].partition(":")[0] for line in lines] == (
        ["instances_train2017.json", "instances_val2017.json"] if is_skipped else []
    )
    truth = built(cfg)[0]["data_samples"]
    assert len(truth.gt_instances) == (1 if is_skipped else 2)
    figures = perfect_figures(cfg, root)  # without the object
    assert (figures["coco/bbox_mAP"] == 1) == is_skipped
    assert figures.get("coco/segm_mAP", 1) == 1


def test_a_sound_polygon_beside_an_empty_one(detection, capsys):
    cfg, root = detection
    plain = perfect_figures(cfg, root)
    capsys.readouterr()
    for split in ("train2017", "val2017"):
        each("annotations", lambda one: one["segmentation"].insert(0, [1, 2]), split)(cfg, root)
    check_data(cfg, "train_dataloader", "val_dataloader")
    assert capsys.readouterr().out == ""
    assert built(cfg)[0]["data_samples"].gt_instances.masks.areas.item() > 0
    assert perfect_figures(cfg, root) == plain


def perfect_figures(cfg: Config, root: Path, missed: int | None = None) -> dict[str, float]:
    """Evaluate detections that are the validation set's truth, but for the objects of a category."""
    import torch

    use_checked_loading(cfg)
    settings = {key: value for key, value in cfg.val_evaluator.items() if key != "_scope_"}
    metric = mmdet.registry.METRICS.build(settings)
    assert isinstance(metric, CompleteCocoMetric)
    metric.dataset_meta = dict(classes=tuple(cfg.val_dataloader.dataset.metainfo.classes))
    api = CompleteCOCO(str(root / "annotations/instances_val2017.json"))
    categories = api.get_cat_ids(cat_names=metric.dataset_meta["classes"])
    for image in api.load_imgs(api.get_img_ids()):
        objects = [one for one in api.load_anns(api.get_ann_ids([image["id"]])) if one["category_id"] != missed]
        objects = [one for one in objects if one["bbox"] != [10, 10, 30, 30]]  # which is to be ignored
        boxes = torch.tensor(
            [[x, y, x + width, y + height] for x, y, width, height in (one["bbox"] for one in objects)]
        ).reshape(-1, 4)
        found = dict(
            bboxes=boxes.float(),
            scores=torch.ones(len(objects)),
            labels=torch.tensor([categories.index(one["category_id"]) for one in objects]),
        )
        if "segm" in metric.metrics:
            found["masks"] = torch.from_numpy(
                np.array([mask_of(one) for one in objects]).reshape(-1, HEIGHT, WIDTH)
            ).bool()
        metric.process({}, [dict(pred_instances=found, img_id=image["id"], ori_shape=(HEIGHT, WIDTH))])
    return metric.evaluate(len(api.imgs))


def test_filled_in_areas(tmp_path):
    """Of the mask, else of the box."""
    corners = [0, 0, 10, 0, 10, 10]  # a triangle
    marks = [
        dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 10, 10], segmentation=[corners]),
        dict(id=2, image_id=1, category_id=1, bbox=[0, 0, 4, 5]),
        dict(id=3, image_id=1, category_id=1, bbox=[0, 0, 4, 5], segmentation=[["a"] * 6]),
        dict(id=4, image_id=1, category_id=1, bbox=[0, 0, 4, 5], area=7, iscrowd=1),
    ]
    path = tmp_path / "a.json"
    images = [dict(id=1, file_name="a.jpg", height=20, width=20)]
    path.write_text(json.dumps(dict(images=images, annotations=marks, categories=[dict(id=1, name="a")])))
    filled = CompleteCOCO(str(path)).load_anns([1, 2, 3, 4])
    assert 40 <= filled[0]["area"] <= 60
    assert [one["area"] for one in filled[1:]] == [20, 20, 7]
    assert [one["iscrowd"] for one in filled] == [0, 0, 0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# The top of a config
# ----------------------------------------------------------------------------------------------------------------------

# A base as small as can be, with all that follows the top of a child. Reading the demo's configs takes seconds.
LABELLED_BASE = """
default_scope = 'mmseg'
data_root = 'base/data'
metainfo = dict(classes=('a', 'b', 'c'), palette=[[1, 1, 1], [2, 2, 2], [3, 3, 3]])
kind = dict(type='BaseSegDataset', data_root=data_root, metainfo=metainfo, reduce_zero_label=True,
            pipeline=[dict(type='LoadAnnotations', reduce_zero_label=True)])
train_dataloader = dict(dataset=dict(**kind, data_prefix=dict(img_path='train')))
val_dataloader = dict(dataset=dict(**kind, data_prefix=dict(img_path='val')))
test_dataloader = val_dataloader
model = dict(type='EncoderDecoder', backbone=dict(type='SepViT_Lite'),
             decode_head=dict(num_classes=3, loss_decode=[dict(class_weight=[1, 1, 0.1]), dict(type='DiceLoss')]),
             auxiliary_head=[dict(num_classes=3), dict(num_classes=3)])
"""
ADE20K_BASE = """
default_scope = 'mmseg'
data_root = 'base/ade'
kind = dict(type='ADE20KDataset', data_root=data_root, pipeline=[dict(type='LoadAnnotations', reduce_zero_label=True)])
train_dataloader = dict(dataset=dict(**kind, data_prefix=dict(img_path='train')))
val_dataloader = test_dataloader = dict(dataset=dict(**kind, data_prefix=dict(img_path='val')))
model = dict(type='EncoderDecoder', backbone=dict(type='SepViT_Lite'), decode_head=dict(num_classes=150))
"""
BOXED_BASE = """
default_scope = 'mmdet'
data_root = 'base/coco/'
train_dataloader = dict(dataset=dict(type='CocoDataset', data_root=data_root, ann_file='train.json'))
val_dataloader = dict(dataset=dict(type='CocoDataset', data_root=data_root, ann_file='val.json'))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file=data_root + 'val.json')
test_evaluator = val_evaluator
model = dict(type='MaskRCNN', backbone=dict(type='SepViT_Lite'), rpn_head=dict(num_classes=1),
             roi_head=dict(bbox_head=dict(num_classes=80), mask_head=dict(num_classes=80)))
"""


@pytest.fixture
def child(tmp_path):
    """Write configs, each the child of the one before, and read the last one."""

    def write(*texts: str, **options: Any) -> Config:
        base = ""
        for number, text in enumerate(texts):
            path = tmp_path / f"config{number}.py"
            path.write_text((f"_base_ = {base!r}\n" if base else "") + text)
            base = path.name
        return read(path, **options)

    return write


def roots(cfg: Config) -> list[str]:
    return [cfg[f"{part}_dataloader"].dataset.data_root for part in ("train", "val", "test")]


def classes(cfg: Config) -> set[tuple[str, ...]]:
    return {tuple(cfg[f"{part}_dataloader"].dataset.metainfo.classes) for part in ("train", "val", "test")}


OWN = "data_root = '/own'\nmetainfo = dict(classes=('x', 'y'))\n"


@pytest.mark.parametrize("top", [OWN, "data_root = '/own/'\nclasses = ['x', 'y']\n", OWN + "num_classes = 2\n"])
def test_top_level_reaches_the_parts_of_a_segmentor(top, child):
    cfg = child(LABELLED_BASE, top)
    assert roots(cfg) == ["/own"] * 3
    assert classes(cfg) == {("x", "y")}
    heads = [cfg.model.decode_head, *cfg.model.auxiliary_head]
    assert [head.num_classes for head in heads] == [2, 2, 2]
    assert cfg.model.decode_head.loss_decode == [dict(), dict(type="DiceLoss")]
    assert cfg.train_dataloader.dataset.metainfo.palette == palette_of(2)
    assert cfg.train_dataloader.dataset.data_prefix.img_path == "train"
    check_classes(cfg, ["train_dataloader", "val_dataloader"])


def test_top_level_reaches_the_parts_of_a_detector(child):
    cfg = child(BOXED_BASE, OWN)
    assert roots(cfg) == ["/own/"] * 3
    assert classes(cfg) == {("x", "y")}
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == "/own/val.json"
    assert (cfg.model.roi_head.bbox_head.num_classes, cfg.model.roi_head.mask_head.num_classes) == (2, 2)
    assert cfg.model.rpn_head.num_classes == 1  # object or not
    check_classes(cfg, ["train_dataloader", "val_dataloader"])


def test_evaluators_follow_their_data_set(child):
    other = "val_dataloader = dict(dataset=dict(ann_file='other.json'))\ntest_dataloader = val_dataloader\n"
    cfg = child(BOXED_BASE, OWN, other)
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == "/own/other.json"
    cfg = child(BOXED_BASE, OWN, other, **{"val_dataloader.dataset.ann_file": "third.json"})
    assert (cfg.val_evaluator.ann_file, cfg.test_evaluator.ann_file) == ("/own/third.json", "/own/other.json")
    cfg = child(BOXED_BASE, OWN, other + "val_evaluator = dict(ann_file='/elsewhere.json')\n")
    assert (cfg.val_evaluator.ann_file, cfg.test_evaluator.ann_file) == ("/elsewhere.json", "/own/other.json")


def test_own_classes_on_ade20k_need_no_type(child):
    """The numbering stays ADE20K's, unless the child says otherwise."""
    cfg = child(ADE20K_BASE, OWN)
    for part in ("train", "val", "test"):
        dataset = cfg[f"{part}_dataloader"].dataset
        assert dataset.type == "BaseSegDataset"
        assert (dataset.reduce_zero_label, dataset.img_suffix, dataset.seg_map_suffix) == (True, ".jpg", ".png")
    assert cfg.model.decode_head.num_classes == 2
    cfg = child(ADE20K_BASE, OWN + "reduce_zero_label = False\nimg_suffix = '.png'\n")
    dataset = cfg.train_dataloader.dataset
    assert (dataset.reduce_zero_label, dataset.img_suffix, dataset.seg_map_suffix) == (False, ".png", ".png")
    assert dataset.pipeline[0].reduce_zero_label is False
    # some of ADE20K's names at the top are own classes, too; in the data sets, they choose among ADE20K's
    cfg = child(ADE20K_BASE, "metainfo = dict(classes=('sky', 'tree'))\n")
    assert cfg.train_dataloader.dataset.type == "BaseSegDataset"
    chosen = "chosen = dict(dataset=dict(metainfo=dict(classes=('sky', 'tree'))))\n"
    cfg = child(ADE20K_BASE, chosen + "train_dataloader = val_dataloader = test_dataloader = chosen\n")
    assert cfg.train_dataloader.dataset.type == "ADE20KDataset"
    assert cfg.model.decode_head.num_classes == 2


def test_what_a_child_sets_itself_stays(child):
    own = OWN + (
        "val_dataloader = dict(dataset=dict(data_root='/val', metainfo=dict(classes=('x', 'z'))))\n"
        "model = dict(decode_head=dict(num_classes=7, loss_decode=[dict(class_weight=[1, 2])]))\n"
        "metainfo['palette'] = [[9, 9, 9], [8, 8, 8]]\n"
    )
    cfg = child(LABELLED_BASE, own)
    assert roots(cfg) == ["/own", "/val", "/own"]
    assert classes(cfg) == {("x", "y"), ("x", "z")}
    assert cfg.model.decode_head.num_classes == 7
    assert cfg.model.decode_head.loss_decode[0].class_weight == [1, 2]
    assert cfg.train_dataloader.dataset.metainfo.palette == [(9, 9, 9), (8, 8, 8)]
    with pytest.raises(UserError, match=r"val_dataloader\.dataset has the classes x, z, train\w+\.dataset x, y"):
        check_classes(cfg, ["train_dataloader", "val_dataloader"])
    with pytest.raises(UserError, match=r"model\.decode_head\.num_classes=7: the data set has 2 classes, x, y"):
        check_classes(cfg, ["train_dataloader"])


def test_class_weights_of_as_many_other_classes_are_dropped(child):
    """A weight belongs to a name. A palette of as many colours may stay."""
    cfg = child(LABELLED_BASE, "metainfo = dict(classes=('x', 'y', 'z'))\n")
    assert "class_weight" not in cfg.model.decode_head.loss_decode[0]
    assert cfg.train_dataloader.dataset.metainfo.palette == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert child(LABELLED_BASE, "data_root = '/own'\n").model.decode_head.loss_decode[0].class_weight == [1, 1, 0.1]


def test_data_sets_that_the_config_places_itself_stay(child):
    """One of two is at `data_root`, the other beside it on purpose."""
    top = """
data_root = "/own/"
images = dict(type="BaseSegDataset", metainfo=dict(classes=("a", "b")), pipeline=[])
parts = [dict(images, data_root="/base/"), dict(images, data_root="/own/")]
train_dataloader = dict(dataset=dict(_delete_=True, type="ConcatDataset", datasets=parts))
"""
    cfg = child(LABELLED_BASE, top)
    assert [one.data_root for one in cfg.train_dataloader.dataset.datasets] == ["/base/", "/own/"]


def test_grandchildren_follow_too(child):
    """mmengine's copies hold what the grandparent said."""
    cfg = child(LABELLED_BASE, OWN, "model = dict(decode_head=dict(channels=8))\n")
    assert roots(cfg) == ["/own"] * 3
    assert classes(cfg) == {("x", "y")}
    assert cfg.model.decode_head.num_classes == 2
    cfg = child(LABELLED_BASE, OWN, "data_root = '/third'\nmetainfo = dict(classes=('u', 'v', 'w', 'x'))\n")
    assert roots(cfg) == ["/third"] * 3
    assert classes(cfg) == {("u", "v", "w", "x")}
    assert cfg.model.auxiliary_head[1].num_classes == 4


def test_options_reach_the_parts(child):
    cfg = child(LABELLED_BASE, OWN, data_root="/option/")
    assert roots(cfg) == ["/option"] * 3
    cfg = child(BOXED_BASE, "", data_root="base/coco/inner")  # below the old one
    assert roots(cfg) == ["base/coco/inner/"] * 3
    assert cfg.val_evaluator.ann_file == "base/coco/inner/val.json"
    cfg = child(LABELLED_BASE, "", data_root="base")  # above it
    assert roots(cfg) == ["base"] * 3
    cfg = child(LABELLED_BASE, "", **{"train_dataloader.dataset.data_root": "/train"})
    assert roots(cfg) == ["/train", "base/data", "base/data"]
    cfg = child(LABELLED_BASE, "", **{"metainfo.classes": ["x", "y"]})
    assert classes(cfg) == {("x", "y")}
    assert cfg.model.decode_head.num_classes == 2


def test_bases_that_do_not_name_their_folder(child):
    text = ADE20K_BASE.replace("data_root = 'base/ade'\n", "").replace("data_root=data_root", "data_root='base/ade'")
    assert roots(child(text, OWN)) == ["/own"] * 3
    several = text + "test_dataloader['dataset'] = dict(type='ADE20KDataset', data_root='base/test')\n"
    with pytest.raises(
        UserError, match=r"data_root=/own: the data sets of its base have several folders, base/ade, base/t"
    ):
        child(several, OWN)


def test_a_file_of_names(child, tmp_path):
    (tmp_path / "names.txt").write_text("x\ny\n\n")
    cfg = child(LABELLED_BASE, f"metainfo = dict(classes={str(tmp_path / 'names.txt')!r})\n")
    assert classes(cfg) == {("x", "y")}


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ("data_root = 7", "data_root=7: takes the path of a folder"),
        ("metainfo = ('x', 'y')", "metainfo=('x', 'y'): takes a dict"),
        (
            "metainfo = dict(_delete_=True, classes=('even'))",
            "metainfo classes='even': a text, neither names nor a file of names; a tuple of one name has a comma: "
            "classes=('even',)",
        ),
        ("metainfo = dict(classes=(1, 2))", "metainfo classes=(1, 2): takes the names of the classes, texts"),
        ("metainfo = dict(classes=())", "metainfo classes=(): takes the names of the classes, texts"),
        ("metainfo = dict(palette=[[1, 2, 3], 'red', [4, 5, 6]])", "metainfo palette: has 'red'; a colour is three"),
        ("metainfo = dict(palette=[[1, 2, 3], [0, 0, 256], [4, 5, 6]])", "metainfo palette: has [0, 0, 256]; a colour"),
        (
            "num_classes = 5",
            "num_classes=5: the data set has 3 classes, a, b, c; set metainfo = dict(classes=…) to the "
            "names of its classes, or remove num_classes",
        ),
        (OWN + "num_classes = '2'", "num_classes='2': the data set has 2 classes, x, y"),
        (OWN + "classes = ('x', 'z')", "classes=('x', 'z') and metainfo.classes=('x', 'y') disagree; set one"),
    ],
)
def test_wrong_values_at_the_top(top, words, child):
    base = LABELLED_BASE if "_delete_" in top or not top.startswith("metainfo = (") else ADE20K_BASE
    with pytest.raises(UserError, match=re.escape(words)):
        child(base, top)


def test_more_classes_than_colours(child):
    """mmdet has 80 colours for COCO."""
    names = tuple(f"class {number}" for number in range(81))
    own = f"own = dict(dataset=dict(metainfo=dict(classes={names})))\n"
    cfg = child(BOXED_BASE, own + "train_dataloader = val_dataloader = test_dataloader = own\n")
    assert cfg.train_dataloader.dataset.metainfo.palette == palette_of(81)
    assert cfg.model.roi_head.bbox_head.num_classes == 81
    cfg = child(BOXED_BASE, own.replace("'class 80'", "").replace(", )", ")") + "train_dataloader = own\n")
    assert "palette" not in cfg.train_dataloader.dataset.metainfo


def test_colours_differ():
    assert palette_of(3) == palette_of(5)[:3]
    colours = {tuple(colour) for colour in palette_of(150)}
    assert len(colours) == 150
    assert all(0 <= part <= 255 for colour in colours for part in colour)


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------


def config_of_the_page(page: str, folder: Path, root: Path) -> Path:
    """Write the config of a page's section on own data, with its base and its data root."""
    text = (ROOT / f"docs/{page}.md").read_text().partition("## Your own data set")[2]
    name = re.search(r"`configs/(\w+\.py)`", text)
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert name
    assert block
    content = re.sub(r'_base_ = "', f'_base_ = "{ROOT}/{page}/configs/', block[1])
    content = re.sub(r'data_root = "[^"]+"', f"data_root = {str(root)!r}", content)
    path = folder / name[1]
    path.write_text(content)
    return path


SMALL = [
    "model.backbone.type=SepViT_Lite",
    "model.neck.in_channels=[32,64,128,256]",
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "test_dataloader.num_workers=0",
]


def test_segmentation_config_of_the_page(tmp_path):
    root = tmp_path / "streets"
    rng = np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(scene(rng)[0]).save(root / f"images/{split}/{number}.png")
            labels = rng.integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8)
            Image.fromarray(labels).save(root / f"annotations/{split}/{number}.png")
    path = config_of_the_page("segmentation", tmp_path, root)
    scale = "dataset.pipeline.1.scale=(160,128)"
    options = [
        "--cfg-options",
        *SMALL,
        "train_cfg.max_iters=2",
        "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=2",
        "train_dataloader.dataset.pipeline.2.scale=(160,128)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "model.data_preprocessor.size=(64,64)",
        f"val_dataloader.{scale}",
        f"test_dataloader.{scale}",
    ]
    common = dict(cwd=ROOT / "segmentation")
    text = succeed(
        path, "--from-scratch", "--work-dir", tmp_path / "run", *options, script="segmentation/train.py", **common
    )
    assert "mIoU" in text
    text = succeed(
        path,
        tmp_path / "run/iter_2.pth",
        "--eval",
        "mIoU",
        "--show-dir",
        tmp_path / "pictures",
        "--work-dir",
        tmp_path / "test",
        *options,
        script="segmentation/test.py",
        **common,
    )
    assert all(re.search(rf"\| +{name} +\| +[\d.]+", text) for name in ("ground", "road", "house"))
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 2


def test_detection_config_of_the_page(boxed, tmp_path):
    root = tmp_path / "animals"
    (root / "images").mkdir(parents=True)
    for split, name in (("train2017", "train"), ("val2017", "val")):
        content = json.loads((boxed / f"annotations/instances_{split}.json").read_text())
        for image in content["images"]:
            shutil.copy(boxed / split / image["file_name"], root / f"images/{name}{image['file_name']}")
            image["file_name"] = name + image["file_name"]
        for annotation in content["annotations"]:
            del annotation["iscrowd"], annotation["area"]
        (root / f"{name}.json").write_text(json.dumps(content))
    path = config_of_the_page("detection", tmp_path, root)
    scale = "dataset.pipeline.1.scale=(160,128)"
    options = [
        "--cfg-options",
        *SMALL,
        "train_cfg.max_epochs=1",
        f"val_dataloader.{scale}",
        f"test_dataloader.{scale}",
        "train_dataloader.dataset.pipeline.2.scale=(160,128)",
        "model.train_cfg.rpn_proposal.max_per_img=50",
        "model.test_cfg.rpn.max_per_img=50",
        "model.test_cfg.rcnn.max_per_img=10",
    ]
    common = dict(cwd=ROOT / "detection")
    text = succeed(
        path, "--from-scratch", "--work-dir", tmp_path / "run", *options, script="detection/train.py", **common
    )
    assert "coco/bbox_mAP" in text
    text = succeed(
        path,
        tmp_path / "run/epoch_1.pth",
        "--eval",
        "mAP",
        "--show-dir",
        tmp_path / "pictures",
        "--work-dir",
        tmp_path / "test",
        *options,
        script="detection/test.py",
        **common,
    )
    assert "coco/segm_mAP" in text
    assert len(list((tmp_path / "pictures").rglob("*.jpg"))) == 2


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_unfit_data_end_the_command(kind, labelled, boxed, tmp_path, capsys, monkeypatch):
    """In one line, with status 2, and without a work dir."""
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(labelled if kind == "segmentation" else boxed, tmp_path / "data")
    path = tmp_path / "own.py"
    if kind == "segmentation":
        (root / "annotations/validation/1.png").unlink()
        path.write_text(f"_base_ = {str(LABELLED)!r}\nmetainfo = dict(classes=('ground', 'square'))\n")
        words = f"val labels {root}/annotations/validation: 1 of 2 are missing, the first is 1.png"
    else:
        path.write_text(f"_base_ = {str(BOXED)!r}\nmetainfo = dict(classes=('cat', 'mouse'))\n")
        words = "no category is named mouse: the classes are cat, mouse; the file's categories are cat, dog"
    before = sorted(tmp_path.rglob("*"))
    line = refusal(
        lambda arguments: run_training(build_train_parser(""), arguments),
        "train",
        [path, "--work-dir", tmp_path / "run", "--cfg-options", f"data_root={root}"],
        capsys,
    )
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("split", ["training", "validation"])
def test_labels_beyond_the_classes_end_the_command(split, labelled, tmp_path):
    """In training they count as unreadable; validation, which mmseg would score silently, ends."""
    root = shutil.copytree(labelled, tmp_path / "data")
    for path in (root / "annotations" / split).iterdir():
        write_wrong_label("beyond the classes", path, np.asarray(Image.open(path)))
    config = tmp_path / "own.py"
    config.write_text(
        f"_base_ = {str(LABELLED)!r}\nmetainfo = dict(classes=('ground', 'square'))\ndata_root = {str(root)!r}\n"
    )
    options = ["--cfg-options", *SMALL[2:], "train_cfg.max_iters=1", "train_cfg.val_interval=1"]
    arguments = [config, "--work-dir", tmp_path / "run", *options]
    result = command(*arguments, script="segmentation/train.py", cwd=tmp_path)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2, result.stderr
    assert last.startswith("train.py: ")
    assert f"{root}/annotations/{split}/" in last
    assert "Traceback" not in result.stderr
    if split == "validation":
        assert f"it has the value 7 in {SIDE**2} pixels, beyond the 2 classes" in last
