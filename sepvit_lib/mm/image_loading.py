"""Load images and labels; name files that are unreadable or inconsistent.

`use_checked_loading` inserts these transforms into the pipelines of a config. They raise `UnreadableImageError`, which
the training loop counts and which aborts validation and tests.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import cv2
import mmcv
import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine import fileio
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, METRICS, TRANSFORMS, Registry
from PIL import Image, UnidentifiedImageError

from sepvit_lib.common.errors import MachineError, UserError
from sepvit_lib.common.storage import is_storage_error, with_retries
from sepvit_lib.mm.config_lookup import LOADERS, class_name, classes_of, data_sets, dicts, resolve
from sepvit_lib.pipeline.image_files import EXIF, ORIENTATIONS, STORED, decode, open_image, orientation_of
from sepvit_lib.pipeline.unreadable import UnreadableImageError

T = TypeVar("T")

NO_IMAGE = "not an image, or damaged"
MAX_LABEL = 255  # mmseg's label maps are 8-bit
DEFAULT_BACKENDS = ("cv2", "pillow")  # mmcv's defaults, which would apply the EXIF orientation
TURNING = range(5, 9)  # EXIF orientations that swap height and width


def read_or_name(path: str, kind: str, read: Callable[[], T]) -> T:
    """Read a file, retrying while the storage does not respond.

    Args:
        path: the file.
        kind: 'image' or 'label', for messages.
        read: function that reads the file.

    Raises:
        UnreadableImageError: the file cannot be read. The message names the file.
    """
    folder = Path(path).parent
    try:
        return with_retries(read, folder)
    except Exception as error:  # the type depends on the image format and on the damage
        plain = ValueError(NO_IMAGE) if isinstance(error, (AssertionError, UnidentifiedImageError)) else error
        raise UnreadableImageError.of(path, plain, is_storage_error(error, folder), kind) from None


@TRANSFORMS.register_module()
class LoadReadableImage(LoadImageFromFile):
    """Load an image with `sepvit_lib.pipeline.image_files.decode`, as all commands do. Errors name the file.

    Ordinary images get the same pixels as from mmcv's `LoadImageFromFile`. mmcv itself loads images that Pillow cannot
    open, and all images if the settings request a different colour type or backend. If the annotations state the
    image's size, the image must have that size.

    Args:
        orientation: 'stored' to ignore the EXIF orientation, 'exif' to turn images upright as annotation tools do.
        **kwargs: arguments of `LoadImageFromFile`.

    Raises:
        UserError: the orientation is unknown.
    """

    def __init__(self, orientation: str = STORED, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if orientation not in ORIENTATIONS:
            raise UserError(f"LoadImageFromFile orientation={orientation!r}: choose {' or '.join(ORIENTATIONS)}")
        self.orientation = orientation
        is_usual = self.imdecode_backend in DEFAULT_BACKENDS and self.file_client_args is None
        self.is_common = is_usual and self.color_type == "color"
        if is_usual and orientation == STORED and self.color_type in ("color", "grayscale"):
            self.color_type += "_ignore_orientation"

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load an image into `results`.

        Raises:
            UnreadableImageError: the image is unreadable, or its annotations state a different size.
        """
        path, load = results["img_path"], self._load if self.is_common else super().transform
        loaded = read_or_name(path, "image", lambda: load(results))
        if loaded is None:  # mmcv's option `ignore_empty`
            raise UnreadableImageError.of(path, ValueError(NO_IMAGE))
        height, width = loaded["img_shape"]
        stated = results.get("height", height), results.get("width", width)
        if stated != (height, width):
            words = f"it has {height} × {width} pixels, its annotations are for {stated[0]} × {stated[1]}"
            hint = orientation_hint(path, (height, width), stated)
            raise UnreadableImageError.of(path, ValueError(words + hint))
        return loaded

    def _load(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load an image into `results`, H × W × 3, BGR."""
        content = fileio.get(results["img_path"], backend_args=self.backend_args)
        try:
            pixels = np.ascontiguousarray(np.asarray(decode(content, self.orientation))[..., ::-1])
        except (UnidentifiedImageError, Image.DecompressionBombError):  # such as JPEG 2000, or very large images
            return super().transform(results)
        results["img"] = pixels.astype(np.float32) if self.to_float32 else pixels
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


def orientation_hint(path: str, found: tuple[int, ...], stated: tuple[int, ...]) -> str:
    """Return a hint if an image's EXIF orientation explains why its size differs from its annotations'; otherwise "".

    Args:
        path: the image.
        found: height and width as loaded.
        stated: height and width in the annotations.
    """
    with suppress(Exception), open_image(path) as image:
        if orientation_of(image) in TURNING and stated == found[::-1]:
            other = EXIF if image.size[::-1] == found else STORED
            return f"; it has an EXIF orientation: set orientation={other!r} at the top of the config"
    return ""


@TRANSFORMS.register_module()
class LoadReadableLabels(BaseTransform):
    """Load a label map like mmseg's `LoadAnnotations`. Errors name the file if it is unreadable or inconsistent.

    Args:
        num_classes: number of classes, None if unknown.
        ignore_index: label of pixels that belong to no class.
        reduce_zero_label: see mmseg's transform; None follows the data set.
        imdecode_backend: see mmseg's transform.
        backend_args: see mmseg's transform.
        label_map: new label for each stored label, in the order of the stored labels; None keeps the stored labels.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        ignore_index: int = 255,
        reduce_zero_label: bool | None = None,
        imdecode_backend: str = "pillow",
        backend_args: dict[str, Any] | None = None,
        label_map: Sequence[int] | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.reduce_zero_label = reduce_zero_label
        self.imdecode_backend = imdecode_backend
        self.backend_args = backend_args
        self.label_map = None if label_map is None else dict(enumerate(label_map))

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load a label map into `results`.

        Raises:
            UnreadableImageError: the label map is unreadable, differs in size from its image, or has values that
                belong to no class.
        """
        path = results["seg_map_path"]
        stored = read_or_name(path, "label", lambda: self._read(path))
        size = tuple(results.get("ori_shape", stored.shape))
        if stored.shape != size:
            rows, columns = stored.shape
            words = f"it has {rows} × {columns} pixels, its image {size[0]} × {size[1]}"
            hint = orientation_hint(results.get("img_path", ""), size, stored.shape)
            raise UnreadableImageError.of(path, ValueError(words + hint), kind="label")
        labels = self._numbering(results)[np.clip(stored, 0, MAX_LABEL)]
        self._check_values(path, stored, labels)
        results["gt_seg_map"] = labels
        results.setdefault("seg_fields", []).append("gt_seg_map")
        return results

    def _read(self, path: str) -> np.ndarray:
        """Read a label map, H × W, with the values stored in the file."""
        content = fileio.get(path, backend_args=self.backend_args)
        if content.startswith(b"\xff\xd8"):
            raise ValueError("a JPEG, whose compression changes labels; use PNG")
        stored = mmcv.imfrombytes(content, flag="unchanged", backend=self.imdecode_backend)
        if stored is None:
            raise ValueError(NO_IMAGE)
        if stored.ndim == 3 and stored.shape[2] == 1:
            stored = stored[..., 0]
        if stored.ndim != 2:
            raise ValueError(f"it has {stored.shape[2]} channels; a label map has one, the class index")
        if stored.dtype.kind == "f":
            raise ValueError("its values are not integers")
        return stored.astype(np.uint8) if stored.dtype == bool else stored

    def _numbering(self, results: dict[str, Any]) -> np.ndarray:
        """Return the lookup table from stored values to labels in mmseg's numbering."""
        table: np.ndarray = np.arange(MAX_LABEL + 1, dtype=np.uint8)
        reduced = results.get("reduce_zero_label", False)
        if self.reduce_zero_label not in (None, reduced):
            raise UserError(
                f"LoadAnnotations reduce_zero_label={self.reduce_zero_label}: the data set has {reduced}; "
                "remove it from the transform"
            )
        if reduced:
            table[1:-1] -= 1
            table[0] = MAX_LABEL
        if (mapping := self.label_map or results.get("label_map")) is not None:
            chosen = np.arange(MAX_LABEL + 1, dtype=np.uint8)
            chosen[list(mapping.keys())] = list(mapping.values())
            table = chosen[table]
        return table

    def _check_values(self, path: str, stored: np.ndarray, labels: np.ndarray) -> None:
        """Refuse values that belong to no class."""
        wrong = (stored < 0) | (stored > MAX_LABEL)
        if self.num_classes is not None:
            wrong |= (labels >= self.num_classes) & (labels != self.ignore_index)
        if wrong.any():
            values, counts = np.unique(stored[wrong], return_counts=True)
            found = ", ".join(map(str, values[:5].tolist())) + (", …" if len(values) > 5 else "")
            classes = f"the {self.num_classes} classes" if self.num_classes is not None else f"{MAX_LABEL}, the largest"
            words = f"it has the value {found} in {counts.sum()} pixels, beyond {classes}"
            raise UnreadableImageError.of(path, ValueError(words), kind="label")


@TRANSFORMS.register_module()
class NamedSteps(BaseTransform):
    """Run a pipeline. If OpenCV fails, as it does on images one pixel high, the error names the image.

    Args:
        transforms: the pipeline.
        is_training: whether the pipeline is for training, which replaces unreadable images. Otherwise, an unreadable
            image ends the command, with a `MachineError` if the storage did not respond, since a rerun may succeed.
    """

    def __init__(self, transforms: list[dict[str, Any]], is_training: bool = False) -> None:
        self.steps = Compose(transforms)
        self.is_training = is_training

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Run the pipeline on an image.

        Raises:
            UnreadableImageError: the image is unreadable, or a transform cannot process it.
            MachineError: the storage does not respond. Not raised in training, where `SeededSamples` handles it.
        """
        path = results.get("img_path")
        try:
            return self.steps(results)
        except UnreadableImageError as error:
            if error.is_storage_error and not self.is_training:
                raise MachineError(str(error)) from None
            raise
        except cv2.error as error:
            if not isinstance(path, str):
                raise
            size = " × ".join(map(str, results.get("ori_shape", ())))
            reason = ValueError(f"a transform fails on its {size} pixels: {error}")
            raise UnreadableImageError.of(path, reason) from None


# ----------------------------------------------------------------------------------------------------------------------
# Configs
# ----------------------------------------------------------------------------------------------------------------------

# Registered names of the checked versions, by the library class that each replaces. `coco_data_sets` has mmdet's.
REPLACED = {
    "mmcv.transforms.loading.LoadImageFromFile": "LoadReadableImage",
    "mmseg.datasets.transforms.loading.LoadAnnotations": "LoadReadableLabels",
    "mmdet.datasets.transforms.loading.LoadAnnotations": "LoadReadableInstances",
    "mmdet.datasets.coco.CocoDataset": "CompleteCocoDataset",
    "mmdet.evaluation.metrics.coco_metric.CocoMetric": "CompleteCocoMetric",
}


def use_checked_loading(cfg: Config) -> None:
    """Make a config's data sets load images, labels and annotations with the checked transforms and classes.

    This includes the pipelines of test-time augmentation, and of mmdet's hooks that switch pipelines during training.
    Other transforms and data sets are unchanged. Idempotent.

    Args:
        cfg: the config.
    """
    switching = [hook for hook in dicts(cfg.get("custom_hooks")) if hook.get("switch_pipeline")]
    for node in dicts([*(cfg.get(loader) for loader in LOADERS), cfg.get("tta_pipeline"), *switching]):
        for registry in (TRANSFORMS, DATASETS):
            _replace(node, registry)
    for node in dicts([cfg.get("val_evaluator"), cfg.get("test_evaluator")]):
        _replace(node, METRICS)
    head = cfg.model.get("module", cfg.model).get("decode_head") or {}
    ignored = (head[0] if isinstance(head, (list, tuple)) else head).get("ignore_index", 255)
    names: tuple[str, ...] | None = None
    for loader in LOADERS:
        found = [*data_sets(cfg, loader)]
        names = next((classes_of(node, kind) for node, kind in found), names)
        parts = [cfg[loader].dataset] if found else []
        if loader == "test_dataloader" and cfg.get("tta_pipeline"):
            parts.append(cfg.tta_pipeline)
        if loader == "train_dataloader":
            parts += [hook.switch_pipeline for hook in switching]
        for node in dicts(parts):
            if node.get("type") == "LoadReadableLabels":
                node.setdefault("num_classes", len(names) if names else None)
                node.setdefault("ignore_index", ignored)
        for node, _ in found:
            node.pipeline = _named(node.get("pipeline", []), loader == "train_dataloader")
    for hook in switching:
        hook.switch_pipeline = _named(hook.switch_pipeline, True)


def _named(steps: Any, is_training: bool) -> list[Any]:
    """Wrap a pipeline, so that errors in its transforms name the image. Idempotent."""
    if any(step.get("type") == "NamedSteps" for step in steps):
        return list(steps)
    return [dict(type="NamedSteps", transforms=steps, is_training=is_training)]


def _replace(node: Any, registry: Registry) -> None:
    """Replace a transform, data set or metric with its checked version."""
    if kind := resolve(registry, node):
        node["type"] = REPLACED.get(class_name(kind), node["type"])
