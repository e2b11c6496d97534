"""Train and evaluate on possibly incomplete COCO files, as annotation tools write them.

Registers a data set, a metric and a transform in mmdet.
"""

from collections.abc import Sequence
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.fileio import get_local_path
from pycocotools import mask as masks

from sepvit_lib.common.class_names import canonical
from sepvit_lib.common.errors import UserError
from sepvit_lib.mm.check_data import has_finite_box, has_usable_mask, is_finite, sound_polygons
from sepvit_lib.pipeline.unreadable import UnreadableImageError


class CompleteCOCO(COCO):
    """COCO's annotations, completed and cleaned.

    - `iscrowd` defaults to 0. `area` defaults to the mask's area, or to the box's if there is no mask.
    - Annotation ids are renumbered from 1: pycocotools treats a match with id 0 as no match.
    - Annotations with non-finite boxes are skipped, and invalid polygons are removed.
    """

    def createIndex(self) -> None:
        """Complete and clean the annotations, and index them."""
        self.dataset.setdefault("info", {})  # pycocotools copies it into results
        self.dataset.setdefault("licenses", [])
        annotations = [one for one in self.dataset.get("annotations") or () if has_finite_box(one)]
        self.dataset["annotations"] = annotations
        for number, annotation in enumerate(annotations, 1):
            annotation["id"] = number
            annotation.setdefault("iscrowd", 0)
            mask = annotation.get("segmentation")
            if mask and isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask):
                annotation["segmentation"] = sound_polygons(mask) or [[]]  # training ignores empty polygons
        super().createIndex()
        for annotation in annotations:
            if "bbox" in annotation and not is_finite(annotation.get("area")):
                annotation["area"] = self._area(annotation)

    def _area(self, annotation: dict[str, Any]) -> float:
        _, _, width, height = annotation["bbox"]
        if not annotation.get("segmentation"):
            return width * height
        try:
            return float(masks.area(self.annToRLE(annotation)))
        except Exception:  # a damaged mask, reported when its image is loaded
            return width * height

    def get_cat_ids(
        self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence[int] = ()
    ) -> list[int]:
        """Return the ids of categories in the order of the given names, which is the order of the labels."""
        if not cat_names:
            return super().get_cat_ids(cat_names, sup_names, cat_ids)
        ids = {canonical(category["name"]): category["id"] for category in self.dataset["categories"]}
        return [ids[canonical(name)] for name in cat_names]

    def ignore_objects_without_mask(self) -> None:
        """Mark objects with unusable masks as crowds. Evaluation then ignores these objects, as mask training does."""
        for annotation in self.dataset["annotations"]:
            if annotation.get("segmentation") and not has_usable_mask(annotation):
                x, y, width, height = annotation["bbox"]
                annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
                annotation["iscrowd"] = 1


CocoDataset.COCOAPI = CompleteCOCO  # also affects subclasses: they number labels in the same way


@DATASETS.register_module()
class CompleteCocoDataset(CocoDataset):
    """mmdet's `CocoDataset`, with the annotations of `CompleteCOCO`."""


@METRICS.register_module()
class CompleteCocoMetric(CocoMetric):
    """mmdet's `CocoMetric`, with the annotations of `CompleteCOCO`.

    Args:
        ann_file: the annotation file; see `CocoMetric`.
        **kwargs: other arguments of `CocoMetric`.
    """

    def __init__(self, ann_file: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=self.backend_args) as path:
                self._coco_api = CompleteCOCO(path)

    def results2json(self, results: Sequence[dict[str, Any]], outfile_prefix: str) -> dict[str, str]:
        """Write the detections with the category id of each label. See `CocoMetric`."""
        if isinstance(self._coco_api, CompleteCOCO) and "masks" in results[0]:
            self._coco_api.ignore_objects_without_mask()
        self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta["classes"])
        files = super().results2json(results, outfile_prefix)
        self.cat_ids = sorted(self.cat_ids)  # pycocotools' per-class metrics are in this order
        return files


@TRANSFORMS.register_module()
class LoadReadableInstances(LoadAnnotations):
    """mmdet's `LoadAnnotations`. Errors name the image with damaged boxes or masks."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load boxes and masks into `results`.

        Raises:
            UnreadableImageError: the boxes or masks are damaged.
        """
        try:
            return super().transform(results)
        except UserError:
            raise
        except Exception as error:  # the type depends on the damage
            raise UnreadableImageError.of(results["img_path"], error, kind="annotations of image") from None
