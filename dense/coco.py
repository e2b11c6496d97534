"""COCO data sets whose files may lack `info`, `iscrowd` and `area`, and may have damaged masks. Registered in mmdet."""

from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.fileio import get_local_path
from pycocotools import mask as masks

from training.errors import UserError
from training.unreadable import UnreadableImageError


class CompleteCOCO(COCO):
    """COCO's annotations, completed: without `iscrowd` an object is none, and `area` is that of its mask or box."""

    def createIndex(self) -> None:
        """Index the annotations, and complete them."""
        super().createIndex()
        self.dataset.setdefault("info", {})  # copied into results
        self.dataset.setdefault("licenses", [])
        for annotation in self.dataset.get("annotations", ()):
            annotation.setdefault("iscrowd", 0)
            if annotation.get("area") is None:
                annotation["area"] = self._area(annotation)

    def _area(self, annotation: dict[str, Any]) -> float:
        _, _, width, height = annotation["bbox"]
        if not annotation.get("segmentation"):
            return width * height
        try:
            return float(masks.area(self.annToRLE(annotation)))
        except Exception:  # a damaged mask, which is named when its image is loaded
            return width * height


@DATASETS.register_module()
class CompleteCocoDataset(CocoDataset):
    """mmdet's `CocoDataset`, with completed annotations."""

    COCOAPI = CompleteCOCO


@METRICS.register_module()
class CompleteCocoMetric(CocoMetric):
    """mmdet's `CocoMetric`, with completed annotations.

    Args:
        ann_file: the annotations, see `CocoMetric`.
        **kwargs: other arguments of `CocoMetric`.
    """

    def __init__(self, ann_file: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=self.backend_args) as path:
                self._coco_api = CompleteCOCO(path)


@TRANSFORMS.register_module()
class LoadReadableInstances(LoadAnnotations):
    """mmdet's `LoadAnnotations`, which names the image whose boxes or masks are damaged."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load boxes and masks into `results`.

        Raises:
            UnreadableImageError: they are damaged.
        """
        try:
            return super().transform(results)
        except UserError:
            raise
        except Exception as error:  # the type depends on the damage
            raise UnreadableImageError.of(results["img_path"], error, kind="annotations of image") from None
