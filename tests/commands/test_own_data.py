"""Data sets of one's own: images and labels that do not fit, checks before training, and the configs of the pages."""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import mmdet.registry
import mmseg.registry
import numpy as np
import pytest
import torch
from conftest import ROOT
from dense_data import BOXED, HEIGHT, LABELLED, SIDE, WIDTH, own_config, read, scene, write_boxed, write_labelled
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from detection import test as detection_test
from segmentation import test as segmentation_test
from sepvit_lib.common.errors import MachineError, UserError
from sepvit_lib.mm.cfg_options import move_root
from sepvit_lib.mm.check_data import check_data
from sepvit_lib.mm.coco_data_sets import CompleteCOCO, CompleteCocoMetric
from sepvit_lib.mm.commands.train import build_train_parser, run_training
from sepvit_lib.mm.config_lookup import dicts
from sepvit_lib.mm.drawing import read_pixels
from sepvit_lib.mm.image_loading import LoadReadableImage, LoadReadableLabels, use_checked_loading
from sepvit_lib.mm.seeded_samples import describe_samples, sampled_files
from sepvit_lib.pipeline.image_files import count_turned, decode
from sepvit_lib.pipeline.unreadable import UnreadableImageError

WRITERS = {LABELLED: write_labelled, BOXED: write_boxed}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[Path, tuple[Config, Path]]:
    """Both data sets, with their configs, children of the demos'."""
    found = {}
    for base, write in WRITERS.items():
        folder = tmp_path_factory.mktemp("own data")  # with a space
        root = write(folder / "data")
        found[base] = read(own_config(folder / "own.py", base, root)), root
    return found


def copied(original: tuple[Config, Path], folder: Path) -> tuple[Config, Path]:
    cfg, root = original
    shutil.copytree(root, folder / "data")
    init_default_scope(cfg.default_scope)
    cfg = copy.deepcopy(cfg)
    move_root(cfg, str(folder / "data"))
    return cfg, folder / "data"


@pytest.fixture
def segmentation(originals, tmp_path) -> tuple[Config, Path]:
    """A copy of the segmentation data set that a test may damage, and its config."""
    return copied(originals[LABELLED], tmp_path)


@pytest.fixture
def detection(originals, tmp_path) -> tuple[Config, Path]:
    """A copy of the detection data set that a test may damage, and its config."""
    return copied(originals[BOXED], tmp_path)


def built(cfg: Config, loader: str = "train_dataloader") -> Any:
    """Build a loader's data set as the commands do."""
    use_checked_loading(cfg)
    library = dict(mmseg=mmseg, mmdet=mmdet)[cfg.default_scope]
    return library.registry.DATASETS.build(cfg[loader].dataset)


TRAIN, VAL = "train_dataloader", "val_dataloader"

# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def save_as(kind: str, path: Path, pixels: np.ndarray) -> Path:
    """Save an image (H × W × 3) in a format. Returns its path."""
    image = Image.fromarray(pixels)
    if kind == "16-bit":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif not kind.startswith("."):
        image = image.convert("L" if kind == "1" else "RGB").convert(kind)
    path = path.with_suffix(kind if kind.startswith(".") else {"CMYK": ".jpg"}.get(kind, ".png"))
    image.save(path, progressive=kind == ".jpeg", subsampling=0 if kind == ".jpeg" else -1)  # options of JPEGs
    return path


KINDS = ["16-bit", "CMYK", "RGBA", "LA", "L", "P", "1", ".jpg", ".jpeg", ".bmp", ".tif", ".webp"]


@pytest.mark.parametrize("backend", ["cv2", "pillow"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_mmcv(kind, backend, tmp_path):
    """Ordinary images'. What mmcv's backends read differently, all commands read alike."""
    path = save_as(kind, tmp_path / "a", scene(np.random.default_rng(1))[0])
    for color_type in ("color", "grayscale", "unchanged"):
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


def test_images_that_pillow_does_not_open_or_that_are_empty(tmp_path):
    """The former are left to mmcv."""
    image = scene(np.random.default_rng(1))[0]
    assert cv2.imwrite(str(tmp_path / "a.jp2"), image)
    loaded = LoadReadableImage().transform(dict(img_path=str(tmp_path / "a.jp2")))["img"]
    assert loaded.shape == image.shape
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UnreadableImageError, match=r"a\.jpg: cannot be read"):
        LoadReadableImage(ignore_empty=True).transform(dict(img_path=str(tmp_path / "a.jpg")))


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
def test_exif_orientation_is_ignored_or_followed(orientation, backend, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(scene(np.random.default_rng(1))[0]).save(path)
    turn(path, orientation)
    stored, upright = (
        LoadReadableImage(orientation=name, imdecode_backend=backend).transform(dict(img_path=str(path)))
        for name in ("stored", "exif")
    )
    theirs = LoadImageFromFile(imdecode_backend=backend).transform(dict(img_path=str(path)))
    np.testing.assert_array_equal(stored["img"], np.asarray(Image.open(path))[..., ::-1])
    np.testing.assert_array_equal(upright["img"], theirs["img"])
    assert upright["ori_shape"] == theirs["ori_shape"]
    with pytest.raises(UserError, match="orientation='up'"):
        LoadReadableImage(orientation="up")


def test_images_with_exif_and_their_labels(segmentation):
    """The bright pixels are those labelled as the square, in training and validation."""
    cfg, root = segmentation
    for path in (*root.glob("images/*/*.jpg"), *root.glob("annotations/*/*.png")):
        turn(path, 6)
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline = [step for step in dataset.pipeline if step.type != "RandomCrop"]  # may lose the square
    for sample in (*built(cfg), *built(cfg, VAL)):
        labels, image = sample["data_samples"].gt_sem_seg.data[0], sample["inputs"].float().mean(0)
        if image.shape != labels.shape:  # in validation, labels keep their size
            labels = labels[None, None].float()
            labels = mmseg.models.utils.resize(labels, size=image.shape, mode="nearest")[0, 0]
        assert image[labels == 1].mean() > 150 > 60 > image[labels == 0].mean()


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


DAMAGES: dict[str, tuple[Callable[[Path, bytes], Any], str]] = {
    "missing": (lambda path, content: None, "No such file"),
    "empty": (lambda path, content: path.touch(), "not an image|OpenCV"),
    "truncated": (lambda path, content: path.write_bytes(content[: len(content) // 2]), "not an image|truncated"),
    "folder": (lambda path, content: path.mkdir(), "Is a directory"),
}


@pytest.mark.parametrize("what", ["image", "label"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_unreadable_files_are_named(kind, what, segmentation):
    """In one line, which keeps the name whatever the library raises."""
    cfg, root = segmentation
    damage, words = DAMAGES[kind]
    for loader, split in ((TRAIN, "training"), (VAL, "validation")):
        path = root / (f"images/{split}/1.jpg" if what == "image" else f"annotations/{split}/1.png")
        dataset, content = built(cfg, loader), path.read_bytes()
        path.unlink()
        damage(path, content)
        with pytest.raises(UnreadableImageError) as raised:
            dataset[1]
        assert (raised.value.name, raised.value.is_storage_error) == (str(path), False)
        line = rf"{what} {re.escape(str(path))}: cannot be read \(.*({words}).*\); repair or remove it"
        assert re.fullmatch(line, str(raised.value))


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_storage_that_does_not_respond(loader, segmentation, monkeypatch):
    """It is retried. Then training takes another image, and validation ends with "run me again"."""
    cfg, root = segmentation
    dataset = built(cfg, loader)
    pauses = []
    monkeypatch.setattr("sepvit_lib.common.storage.time.sleep", pauses.append)
    images = Path(dataset.data_prefix["img_path"])
    images.rename(tmp := root / "unmounted")
    with pytest.raises(UnreadableImageError if loader == "train_dataloader" else MachineError) as raised:
        dataset[1]
    assert f"image {images}/1.jpg: cannot be read (FileNotFoundError" in str(raised.value)
    assert getattr(raised.value, "is_storage_error", True)
    assert sum(pauses) == 60
    monkeypatch.setattr("sepvit_lib.common.storage.time.sleep", lambda _: images.exists() or tmp.rename(images))
    assert dataset[1] is not None


@pytest.mark.parametrize("loader", [TRAIN, VAL, "test_dataloader"])
def test_images_of_one_pixel_work_or_are_named(loader, segmentation):
    """A side of 3000 pixels, reduced to 160, leaves less than one of the other."""
    cfg, root = segmentation
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    dataset = built(cfg, loader)
    for size in ((1, 1), (1, 3000)):
        for path in root.glob("*/*/*"):
            Image.fromarray(np.ones((*size, 3) if path.suffix == ".jpg" else size, np.uint8)).save(path)
        if size == (1, 1):
            assert all(image.numel() for image in dataset[0]["inputs"])
    with pytest.raises(UnreadableImageError, match="a transform fails on its 1 × 3000 pixels") as raised:
        dataset[0]
    assert raised.value.name == dataset.get_data_info(0)["img_path"]


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


WRONG_LABELS: dict[str, tuple[Callable[[np.ndarray], Any], str, str]] = {
    "RGB": (lambda x: np.stack([x] * 3, -1), "PNG", "it has 3 channels; a label map has one"),
    "JPEG": (lambda x: x, "JPEG", "a JPEG, whose compression changes labels"),
    "size": (lambda x: x[::2, ::2].copy(), "PNG", f"it has 40 × 48 pixels, its image {HEIGHT} × {WIDTH}"),
    "beyond": (lambda x: np.where(x == 2, 7, x), "PNG", f"it has the value 7 in {SIDE**2} pixels, beyond the 2 class"),
    "16 bits": (  # 258 is 2 in 8 bits
        lambda x: np.where(x == 2, 258, x.astype(np.uint16)),
        "PNG",
        f"it has the value 258 in {SIDE**2} pixels, beyond the 2 classes",
    ),
    "fractions": (lambda x: x.astype(np.float32), "TIFF", "its values are not integers"),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_labels_that_do_not_fit_are_named(kind, segmentation):
    cfg, root = segmentation
    change, form, words = WRONG_LABELS[kind]
    for loader, split in ((TRAIN, "training"), (VAL, "validation")):
        path = root / f"annotations/{split}/1.png"
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path, format=form)
        with pytest.raises(UnreadableImageError, match=re.escape(words)) as raised:
            built(cfg, loader)[1]
        assert raised.value.name == str(path)


def test_ignored_pixels_are_no_classes(tmp_path):
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(tmp_path / "a.png")
    assert labels_of(tmp_path / "a.png", num_classes=2).tolist() == [[0, 1, 255]]
    assert labels_of(tmp_path / "a.png", num_classes=1, reduce_zero_label=True).tolist() == [[255, 0, 255]]
    with pytest.raises(UnreadableImageError, match="the value 255 in 1 pixels, beyond the 2 classes"):
        labels_of(tmp_path / "a.png", num_classes=2, ignore_index=254)
    with pytest.raises(UnreadableImageError, match="the value 1 in 1 pixels, beyond the 1 classes"):
        labels_of(tmp_path / "a.png", num_classes=1)
    with pytest.raises(UserError, match="reduce_zero_label=True: the data set has False; remove it"):
        LoadReadableLabels(reduce_zero_label=True).transform(dict(seg_map_path=str(tmp_path / "a.png")))


@pytest.mark.parametrize("mask", [dict(size=[9, 9], counts="abc"), dict(size=[80, 96], counts=[-5, 9]), [["a"] * 6]])
def test_damaged_masks_are_named(mask, detection):
    cfg, root = detection
    for loader, split in ((TRAIN, "train2017"), (VAL, "val2017")):
        change(lambda content: content["annotations"][1].update(segmentation=mask), split)(cfg, root)
        with pytest.raises(UnreadableImageError, match=f"annotations of image {root}/{split}/2.jpg: cannot be read"):
            built(cfg, loader)[1]


# ----------------------------------------------------------------------------------------------------------------------
# Configs with checked loading
# ----------------------------------------------------------------------------------------------------------------------

FOLDERS = (LABELLED.parent, BOXED.parent)
PAPER = sorted(path for folder in FOLDERS for path in folder.glob("*_sepvit_[tl]*.py"))
UNCHECKED = {"LoadImageFromFile", "LoadAnnotations", "CocoDataset", "CocoMetric"}


@pytest.mark.parametrize("path", PAPER, ids=[path.stem for path in PAPER])
def test_every_pipeline_is_checked(path):
    """A second call changes nothing."""
    cfg = read(path)
    use_checked_loading(cfg)
    checked = cfg.to_dict()
    use_checked_loading(cfg)
    assert cfg.to_dict() == checked
    for part in ("tta_pipeline", TRAIN, VAL, "test_dataloader", "val_evaluator"):
        assert not UNCHECKED & {node.get("type") for node in dicts(checked.get(part)) if part in checked}
    for node in dicts(checked):
        if node.get("type") == "LoadReadableLabels":
            count = len(checked["metainfo"]["classes"]) if "metainfo" in checked else 150
            assert (node["num_classes"], node["ignore_index"]) == (count, 255)


def test_annotations_of_the_turned_image(detection):
    """Annotations that were drawn on the upright image are of another size: it is named."""
    cfg, root = detection
    turn(root / "train2017/2.jpg", 6)
    change(lambda content: content["images"][1].update(height=WIDTH, width=HEIGHT))(cfg, root)
    words = f"it has {HEIGHT} × {WIDTH} pixels, its annotations are for {WIDTH} × {HEIGHT}; it has an EXIF orientation"
    with pytest.raises(UnreadableImageError, match=f"2.jpg: cannot be read .*{words}: set orientation='exif'"):
        built(cfg)[1]


def test_nested_pipelines_are_checked(detection):
    """Those of transforms that choose, and of data sets that wrap others."""
    cfg, _ = detection
    inner = cfg.train_dataloader.dataset
    inner.pipeline = [dict(type="RandomChoice", transforms=[inner.pipeline[:2], copy.deepcopy(inner.pipeline[:2])])]
    repeated = dict(type="RepeatDataset", times=2, dataset=inner)
    cfg.train_dataloader.dataset = dict(type="MultiImageMixDataset", dataset=repeated, pipeline=[dict(type="Resize")])
    use_checked_loading(cfg)
    types = [node.get("type") for node in dicts(cfg.train_dataloader.dataset)]
    assert types.count("LoadReadableImage") == types.count("LoadReadableInstances") == 2
    assert "LoadImageFromFile" not in types
    assert cfg.train_dataloader.dataset.pipeline[0].type == "Resize"
    assert cfg.train_dataloader.dataset.dataset.dataset.pipeline[0].type == "NamedSteps"


@pytest.mark.parametrize("base", [LABELLED, BOXED], ids=["segmentation", "detection"])
def test_fingerprints_do_not_depend_on_the_place_of_the_data(base, originals, tmp_path, monkeypatch):
    """Also of data sets that consist of others."""
    found = []
    for place in ("first", "second/inner"):
        moved, _ = copied(originals[base], tmp_path / place)
        inner = moved.train_dataloader.dataset
        moved.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[inner, copy.deepcopy(inner)])
        monkeypatch.chdir(tmp_path / place)
        found.append(describe_samples(built(moved)))
    assert found[0] == found[1]
    assert found[0]["images"] == 12


@pytest.mark.parametrize("base", [LABELLED, BOXED], ids=["segmentation", "detection"])
def test_config_that_a_run_writes_is_read_again(base, originals, tmp_path):
    cfg, _ = copied(originals[base], tmp_path)
    use_checked_loading(cfg)
    (tmp_path / "written.py").write_text(cfg.dump())
    again = read(tmp_path / "written.py")
    check_data(again, TRAIN, VAL)
    assert built(again)[0]["inputs"].shape[0] == 3
    assert again.to_dict() == cfg.to_dict()


def test_classes_of_the_data_set_limit_its_labels(segmentation):
    """A choice of ADE20K's classes keeps its numbering."""
    cfg, _ = segmentation
    cfg.train_dataloader.dataset |= dict(type="ADE20KDataset", metainfo=dict(classes=("sky", "wall")))
    cfg.model.decode_head.ignore_index = 254
    dataset = built(cfg)
    step = next(node for node in dicts(cfg.train_dataloader) if node.get("type") == "LoadReadableLabels")
    assert (step.num_classes, step.ignore_index) == (2, 254)
    assert {0: 1, 2: 0, 1: 255}.items() <= dataset.label_map.items()


# ----------------------------------------------------------------------------------------------------------------------
# Checks before training
# ----------------------------------------------------------------------------------------------------------------------

Spoil = Callable[[Config, Path], Any]  # damages a copy of a data set, or its config


def remove(*names: str) -> Spoil:
    """Delete files or folders."""
    return lambda cfg, root: [(shutil.rmtree if (root / name).is_dir() else os.unlink)(root / name) for name in names]


def list_images(text: str) -> Spoil:
    def spoil(cfg: Config, root: Path) -> None:
        (root / "list.txt").write_text(text)
        cfg.train_dataloader.dataset.ann_file = "list.txt"

    return spoil


def put(key: str, value: Any) -> Spoil:
    """Change a value of the config."""
    return lambda cfg, root: cfg.merge_from_dict({key: value})


def change(function: Callable[[dict[str, Any]], Any], split: str = "train2017") -> Spoil:
    """Change the content of an annotation file."""

    def spoil(cfg: Config, root: Path) -> None:
        path = root / f"annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))

    return spoil


def each(key: str, function: Callable[[dict[str, Any]], Any], split: str = "train2017") -> Spoil:
    """Change all entries of a list in an annotation file."""
    return change(lambda content: [function(entry) for entry in content[key]], split)


SET = "train_dataloader.dataset"
NAN, INFINITE = float("nan"), float("inf")  # which JSON files may hold
UNFIT_LABELLED: list[tuple[Spoil, str]] = [
    (remove("."), "train data {root}: no such folder; put the data set there"),
    (remove("images/validation"), "val data {root}/images/validation: no such folder"),
    (
        lambda cfg, root: [path.rename(path.with_suffix(".PNG")) for path in root.glob("images/*/*")],
        "train data {root}/images/training: no image ends in .jpg; set img_suffix",
    ),
    (
        remove("annotations/training/3.png", "annotations/training/4.png"),
        "train labels {root}/annotations/training: 2 of 6 are missing, the first is {root}/annotations/training/3.png",
    ),
    (put(f"{SET}.ann_file", "list.txt"), "train data {root}/list.txt: no such file"),
    (list_images("0.jpg\n1.jpg\n"), "{root}/list.txt: 2 of its 2 images are missing, the first is {root}/images/train"),
    (put(f"{SET}.image_suffix", ".png"), "train_dataloader.dataset: cannot be built: TypeError: "),
    (put(f"{SET}.metainfo.classes", "ground"), "classes='ground': takes a tuple, or a file of names; a single name"),
    (put(f"{SET}.metainfo.classes", ("square",)), "train_dataloader.dataset: a single class (square) leaves nothing"),
    (put("val_dataloader.dataset.metainfo.classes", ("ground", "disc")), "val_dataloader.dataset has the classes gro"),
    (put("model.decode_head.num_classes", 5), "model.decode_head.num_classes=5: the data set has 2 classes"),
    (put("model.decode_head.out_channels", 1), "model.decode_head.out_channels=1: a softmax over one channel"),
    (put("model.auxiliary_head", [dict(num_classes=2), dict(num_classes=3)]), "model.auxiliary_head.1.num_classes=3"),
    (
        put("data_root", "/own"),
        "data_root at the top of the config is '/own', but train_dataloader.dataset has '{root}'",
    ),
    (put("metainfo.classes", ("x", "y")), "metainfo at the top of the config is ('x', 'y'), but train_dataloader"),
    (put("classes", ("x", "y")), "classes at the top of the config is ('x', 'y'), but "),
    (put(f"{SET}.pipeline.0.orientation", "exif"), "train_dataloader exif, val_dataloader stored"),
]
FILE = "train annotations {root}/annotations/instances_train2017.json: "
UNFIT_BOXED: list[tuple[Spoil, str]] = [
    (remove("annotations/instances_val2017.json"), "val data {root}/annotations/instances_val2017.json: no such file"),
    (lambda cfg, root: os.truncate(root / "annotations/instances_train2017.json", 500), FILE + "cannot be"),
    (change(lambda content: content.pop("categories")), FILE + "has no categories; COCO's format is an object with"),
    (change(lambda content: content.pop("annotations"), "val2017"), "instances_val2017.json: has no annotations"),
    (each("images", lambda one: one.update(id=1)), FILE + "several of its images have the same id"),
    (change(lambda one: one["categories"].append(dict(id=9, name="cat"))), FILE + "several categories are named cat"),
    (each("annotations", lambda one: one.update(bbox=[1, NAN, 9, 9])), FILE + "none of its 6 annotations is"),
    (
        change(lambda content: content["categories"][1].update(name="Dog")),
        "no category is named dog: the classes are cat, dog; the file's categories are cat, Dog",
    ),
    (each("annotations", lambda one: one.update(category_id=str(one["category_id"]))), FILE + "none of its 6 annotat"),
    (each("annotations", lambda one: one.pop("segmentation")), FILE + "no annotation has a segmentation; a model with"),
    (remove(*(f"train2017/{number}.jpg" for number in range(2, 7))), FILE + "5 of its 6 images are missing, the first"),
    (remove("val2017/2.jpg"), "1 of its 2 images are missing, the first is {root}/val2017/2.jpg"),
    (put("model.roi_head.bbox_head.num_classes", 80), "model.roi_head.bbox_head.num_classes=80: the data set has 2"),
    (put("model.roi_head.mask_head.num_classes", 3), "model.roi_head.mask_head.num_classes=3: the data set has 2"),
    (put("val_evaluator.ann_file", "other.json"), "ann_file=other.json: the data set's ann_file is {root}/annot"),
]
UNFIT = [*(("segmentation", *case) for case in UNFIT_LABELLED), *(("detection", *case) for case in UNFIT_BOXED)]


@pytest.mark.parametrize(("task", "spoil", "words"), UNFIT, ids=range(len(UNFIT)))
def test_unfit_data(task, spoil, words, request):
    cfg, root = request.getfixturevalue(task)
    spoil(cfg, root)
    with pytest.raises(UserError) as raised:
        check_data(cfg, TRAIN, VAL)
    assert words.format(root=root) in str(raised.value)


def test_what_the_data_sets_share_may_stand_at_the_top(segmentation):
    """ADE20K's class has its own defaults."""
    cfg, _ = segmentation
    for place in (cfg, cfg[TRAIN].dataset, cfg[VAL].dataset):
        place.metainfo = dict(classes=("wall", "sky"))
    for node in (cfg[TRAIN].dataset, cfg[VAL].dataset):
        node.type = "ADE20KDataset"
        del node["reduce_zero_label"]
    check_data(cfg, TRAIN, VAL)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_classes_in_a_file(task, tmp_path, request):
    """mmengine reads one name per line."""
    cfg, _ = request.getfixturevalue(task)
    names = tuple(cfg.metainfo.classes)
    (tmp_path / "names.txt").write_text("\n".join(names))
    for place in (cfg, cfg[TRAIN].dataset, cfg[VAL].dataset):
        place.metainfo = dict(classes=str(tmp_path / "names.txt"))
    check_data(cfg, TRAIN, VAL)
    assert tuple(built(cfg).metainfo["classes"]) == names
    (tmp_path / "names.txt").write_text("\n".join((*names, "third")))
    with pytest.raises(UserError, match="num_classes=2: the data set has 3 classes"):
        check_data(cfg, TRAIN, VAL)


def test_images_of_another_suffix_are_mentioned(segmentation, capsys):
    """Hidden files, and blank lines of lists, name no image."""
    cfg, root = segmentation
    for folder, suffix in ((root / "images/training", ".jpg"), (root / "annotations/training", ".png")):
        shutil.copytree(folder, folder / ".ipynb_checkpoints")
        (folder / f"._0{suffix}").touch()
    check_data(cfg, TRAIN, VAL)
    assert capsys.readouterr().out == ""
    assert len(built(cfg)) == 6
    (root / "images/training/3.jpg").rename(root / "images/training/3.png")
    check_data(cfg, TRAIN, VAL)
    words = "images/training: 5 images end in .jpg; others are skipped: 1 in .png\n"
    assert capsys.readouterr().out == f"WARNING: train data {root}/{words}"
    list_images("0\n\n5\n  \n")(cfg, root)
    check_data(cfg, TRAIN)
    assert [Path(one["img_path"]).name for one in map(built(cfg).get_data_info, (0, 1))] == ["0.jpg", "5.jpg"]


@pytest.mark.parametrize(
    ("values", "words"), [((0, 255), "square in 6 of its 6 label maps; 255 is ignored"), ((1, 2), "ground in 6 of")]
)
def test_classes_that_no_label_has_are_named(values, words, segmentation, capsys, monkeypatch):
    """Masks of 0 and 255 have one class, since 255 is none; labels that count from 1 lack the first."""
    cfg, root = segmentation
    for loader in (TRAIN, VAL):
        cfg[loader].dataset.reduce_zero_label = False
    for path in root.glob("annotations/training/*.png"):
        Image.fromarray(np.array([0, *values], np.uint8)[np.asarray(Image.open(path))]).save(path)
    check_data(cfg, TRAIN, VAL)
    start = f"WARNING: train labels {root}/annotations/training: no pixel of the classes {words}"
    assert capsys.readouterr().out.startswith(start)
    monkeypatch.setattr("sepvit_lib.mm.check_data.MAX_LABELS", 3)  # too few for two classes
    check_data(cfg, TRAIN)
    assert capsys.readouterr().out == ""


def test_lists_images_without_labels_and_data_elsewhere(segmentation):
    """Predictions for a test set need no labels. Data elsewhere are not listed."""
    cfg, root = segmentation
    (root / "images/training/inner").mkdir()
    (root / "annotations/training/inner").mkdir()
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        (root / f"{kind}/training/5.{suffix}").rename(root / f"{kind}/training/inner/5.{suffix}")
    list_images("0\ninner/5\n")(cfg, root)
    check_data(cfg, TRAIN)
    shutil.rmtree(root / "annotations/validation")
    del cfg.test_dataloader.dataset.data_prefix.seg_map_path
    pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.test_dataloader.dataset.pipeline = [step for step in pipeline if step.type != "LoadAnnotations"]
    check_data(cfg, "test_dataloader")
    move_root(cfg, "s3://bucket/data")
    check_data(cfg, TRAIN, VAL)


# ----------------------------------------------------------------------------------------------------------------------
# COCO's annotations
# ----------------------------------------------------------------------------------------------------------------------


def without_masks(cfg: Config) -> None:
    for node in dicts(cfg):
        node.pop("with_mask", None)
    cfg.val_evaluator.metric = cfg.test_evaluator.metric = "bbox"


def test_sound_detection_data(detection, capsys):
    """Boxes are enough without a mask head. A test set needs no annotations if nothing is evaluated."""
    cfg, root = detection
    remove("train2017/2.jpg")(cfg, root)  # training replaces it
    check_data(cfg, TRAIN, VAL, "test_dataloader")
    for split in ("train2017", "val2017"):
        each("annotations", lambda one: one.pop("segmentation"), split)(cfg, root)
    without_masks(cfg)
    change(lambda content: content["annotations"][0].update(bbox=[5, 5, 0, 0], segmentation=[]))(cfg, root)
    check_data(cfg, TRAIN, VAL, "test_dataloader")
    change(lambda content: content.pop("annotations"), "val2017")(cfg, root)
    cfg.test_evaluator.format_only = True
    check_data(cfg, "test_dataloader")
    cfg.test_evaluator = []
    check_data(cfg, "test_dataloader")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", [("iscrowd",), ("iscrowd", "area"), ("iscrowd", "area", "segmentation")])
def test_missing_iscrowd_and_area_are_filled_in(missing, detection):
    """Training samples, and the metrics of perfect detections, are those of complete annotations.

    Annotations may count from 0: pycocotools takes a match with annotation 0 for none.
    """
    cfg, root = detection
    if "segmentation" in missing:
        without_masks(cfg)
    complete = [[one["instances"] for one in map(built(cfg).get_data_info, range(6))]]
    for split in ("train2017", "val2017"):
        each("annotations", lambda one: [one.pop(key) for key in missing], split)(cfg, root)
        each("annotations", lambda one: one.update(id=one["id"] - 1), split)(cfg, root)
    check_data(cfg, TRAIN, VAL)
    complete.append([one["instances"] for one in map(built(cfg).get_data_info, range(6))])
    assert complete[0] == complete[1] or "segmentation" in missing
    assert [len(instances) for instances in complete[1]] == [1] * 6
    for cfg.val_evaluator.sort_categories in (False, True):
        figures = perfect_figures(cfg, root)
        assert (figures["coco/bbox_mAP"], figures.get("coco/segm_mAP", 1)) == (1, 1)


def test_classes_in_another_order_than_the_categories(detection):
    """Labels follow the classes, and so do the figures of each class, also where ids are in no order.

    Names that were typed on a Mac may be decomposed.
    """
    cfg, root = detection
    cat = "be\u0301be\u0301"
    for split in ("train2017", "val2017"):
        each("categories", lambda one: one.update(name="b\u00e9b\u00e9") if one["id"] == 3 else 0, split)(cfg, root)
        change(lambda content: content["categories"].reverse(), split)(cfg, root)
    cfg.val_evaluator.classwise = True
    for names in ((cat, "dog"), ("dog", cat)):
        for node in (cfg, cfg.train_dataloader.dataset, cfg.val_dataloader.dataset):
            node.metainfo = dict(classes=names)
        check_data(cfg, TRAIN, VAL)
        figures = perfect_figures(cfg, root, missed=7)
        assert (figures["coco/b\u00e9b\u00e9_precision"], figures["coco/dog_precision"]) == (1, 0)
        objects = [built(cfg, TRAIN).get_data_info(index)["instances"][0] for index in range(6)]
        assert [names[one["bbox_label"]] for one in objects] == ["dog", cat] * 3
        objects = built(cfg, VAL).get_data_info(0)["instances"]
        assert [names[one["bbox_label"]] for one in objects] == ["dog"]


SQUARE = [10, 10, 10, 40, 40, 40, 40, 10]
MASKS = [[[]], [[10, 10, 40, 40]], [SQUARE[:7]], [[*SQUARE[:7], NAN]], dict(size=[HEIGHT, WIDTH])]
NOTHING = [*(dict(segmentation=mask) for mask in MASKS), dict(bbox=[NAN, 1, 9, 9]), dict(bbox=[1, 1, INFINITE, 9])]


@pytest.mark.parametrize("nothing", NOTHING, ids=range(len(NOTHING)))
@pytest.mark.parametrize("has_masks", [True, False])
def test_objects_without_extent_are_ignored(nothing, has_masks, detection, capsys):
    """In training and evaluation alike. A box without a mask counts where masks are not used."""
    cfg, root = detection
    if not has_masks:
        without_masks(cfg)
    mark = dict(id=50, image_id=1, category_id=3, iscrowd=0, bbox=[10, 10, 30, 30], area=900, segmentation=[SQUARE])
    for split in ("train2017", "val2017"):
        change(lambda content: content["annotations"].append(mark | nothing), split)(cfg, root)
    check_data(cfg, TRAIN, VAL)
    assert capsys.readouterr().out.count("1 of its ") == 2 * ("bbox" in nothing)
    is_skipped = has_masks or "bbox" in nothing
    assert len(built(cfg)[0]["data_samples"].gt_instances) == (1 if is_skipped else 2)
    figures = perfect_figures(cfg, root)  # without the object
    assert (figures["coco/bbox_mAP"] == 1) == is_skipped
    assert figures.get("coco/segm_mAP", 1) == 1


def test_a_sound_polygon_beside_an_empty_one(detection):
    cfg, root = detection
    plain = perfect_figures(cfg, root)
    for split in ("train2017", "val2017"):
        each("annotations", lambda one: one["segmentation"].insert(0, [1, 2]), split)(cfg, root)
    assert built(cfg)[0]["data_samples"].gt_instances.masks.areas.item() > 0
    assert perfect_figures(cfg, root) == plain


def perfect_figures(cfg: Config, root: Path, missed: int | None = None) -> dict[str, float]:
    """Evaluate detections that are the validation set's truth, but for the objects of a category."""
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
        boxes = torch.tensor([one["bbox"] for one in objects]).reshape(-1, 4).float()
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([categories.index(one["category_id"]) for one in objects])
        found = dict(bboxes=boxes, scores=torch.ones(len(objects)), labels=labels)
        if "segm" in metric.metrics:
            found["masks"] = torch.zeros(len(objects), HEIGHT, WIDTH, dtype=torch.bool)
            for mask, (left, top, right, bottom) in zip(found["masks"], boxes.round().int()):
                mask[top:bottom, left:right] = True
        metric.process({}, [dict(pred_instances=found, img_id=image["id"], ori_shape=(HEIGHT, WIDTH))])
    return metric.evaluate(len(api.imgs))


# ----------------------------------------------------------------------------------------------------------------------
# The configs of the pages
# ----------------------------------------------------------------------------------------------------------------------


def config_of_the_page(page: str, folder: Path, root: Path) -> Path:
    """Write the config of a page's section on own data, with its base and its data root."""
    text = (ROOT / f"docs/{page}.md").read_text().partition("## Your own data set")[2]
    name = re.search(r"`configs/(\w+\.py)`", text)
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert name
    assert block
    content = re.sub(r'_base_ = "', f'_base_ = "{ROOT}/{page}/configs/', block[1])
    path = folder / name[1]
    path.write_text(re.sub(r'data_root = "[^"]+"', f'data_root = "{root}/"', content))
    return path


SMALL = (
    "--cfg-options model.backbone.type=SepViT_Lite model.neck.in_channels=[32,64,128,256] "
    "train_dataloader.batch_size=2 train_dataloader.num_workers=0 val_dataloader.num_workers=0 "
    "test_dataloader.num_workers=0 train_dataloader.dataset.pipeline.2.scale=(160,128) "
    "val_dataloader.dataset.pipeline.1.scale=(160,128) test_dataloader.dataset.pipeline.1.scale=(160,128) "
)
SHORT = {
    "segmentation": "train_cfg.max_iters=2 train_cfg.val_interval=2 default_hooks.checkpoint.interval=2 "
    "train_dataloader.dataset.pipeline.3.crop_size=(64,64) model.data_preprocessor.size=(64,64)",
    "detection": "train_cfg.max_epochs=1 model.train_cfg.rpn_proposal.max_per_img=50 "
    "model.test_cfg.rpn.max_per_img=50 model.test_cfg.rcnn.max_per_img=10",
}


def train_and_test(page: str, path: Path, metric: str, capsys) -> str:
    """Train and test a config briefly. Returns what test.py printed."""
    options, run = (SMALL + SHORT[page]).split(), path.parent / "run"
    train = [path, "--from-scratch", "--work-dir", run, *options]
    assert run_training(build_train_parser(""), list(map(str, train))) == 0
    checkpoint = run / dict(segmentation="iter_2.pth", detection="epoch_1.pth")[page]
    flags = ["--eval", metric, "--show-dir", path.parent / "shown", "--work-dir", path.parent / "test"]
    capsys.readouterr()
    test = dict(segmentation=segmentation_test, detection=detection_test)[page]
    assert test.main(list(map(str, [path, checkpoint, *flags, *options]))) == 0
    assert len(list((path.parent / "shown").iterdir())) == 2
    return capsys.readouterr().out


def test_segmentation_config_of_the_page(segmentation, tmp_path, capsys):
    """mmseg itself builds the same data set and head from it."""
    _, root = segmentation
    for image in root.glob("images/*/*.jpg"):
        Image.open(image).save(image.with_suffix(".png"))
    path = config_of_the_page("segmentation", tmp_path, root)
    plain = Config.fromfile(path)
    for loader, count in ((TRAIN, 6), (VAL, 2), ("test_dataloader", 2)):
        dataset = mmseg.registry.DATASETS.build(plain[loader].dataset)
        names = dataset.metainfo["classes"]
        assert (len(dataset), names, plain.model.decode_head.num_classes) == (count, ("ground", "road", "house"), 3)
        assert set(dataset[0]["data_samples"].gt_sem_seg.data.unique().tolist()) <= {0, 1, 2, 255}
    text = train_and_test("segmentation", path, "mIoU", capsys)
    assert all(re.search(rf"\| +{name} +\| +(nan|[\d.]+)", text) for name in ("ground", "road", "house"))


def test_detection_config_of_the_page(originals, tmp_path, capsys):
    """mmdet itself builds the same data set and heads from it."""
    root, (_, boxed) = tmp_path / "animals", originals[BOXED]
    (root / "images").mkdir(parents=True)
    for split, name in (("train2017", "train"), ("val2017", "val")):
        content = json.loads((boxed / f"annotations/instances_{split}.json").read_text())
        for image in content["images"]:
            shutil.copy(boxed / split / image["file_name"], root / f"images/{name}{image['file_name']}")
            image["file_name"] = name + image["file_name"]
        (root / f"{name}.json").write_text(json.dumps(content))
    path = config_of_the_page("detection", tmp_path, root)
    init_default_scope("mmdet")
    plain = Config.fromfile(path)
    for loader, count in ((TRAIN, 6), (VAL, 2), ("test_dataloader", 2)):
        dataset = mmdet.registry.DATASETS.build(plain[loader].dataset)
        assert (len(dataset), dataset.metainfo["classes"]) == (count, ("cat", "dog"))
    assert plain.model.roi_head.bbox_head.num_classes == plain.model.roi_head.mask_head.num_classes == 2
    assert plain.val_evaluator.ann_file == plain.test_evaluator.ann_file == f"{root}/val.json"
    assert "coco/segm_mAP" in train_and_test("detection", path, "mAP", capsys)


def test_labels_beyond_the_classes_end_validation(originals, tmp_path, capsys):
    """mmseg would score them silently. In training they count as unreadable."""
    _, root = copied(originals[LABELLED], tmp_path)
    for path in root.glob("annotations/validation/*"):
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 2, 7, labels)).save(path)
    config = own_config(tmp_path / "own.py", LABELLED, root)
    options = [*SMALL.split()[3:6], "train_cfg.max_iters=1", "train_cfg.val_interval=1"]
    arguments = [config, "--from-scratch", "--work-dir", tmp_path / "run", "--cfg-options", *options]
    assert run_training(build_train_parser(""), list(map(str, arguments))) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"train.py: label {root}/annotations/validation/")
    assert f"it has the value 7 in {SIDE**2} pixels, beyond the 2 classes" in last
