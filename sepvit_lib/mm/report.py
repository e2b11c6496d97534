"""Report of test.py: shared by segmentation and detection."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from PIL import Image

from sepvit_lib.common.errors import setting
from sepvit_lib.mm.drawing import FileHook, path_inside
from sepvit_lib.mm.training_run import PACKAGES
from sepvit_lib.report.html import Page
from sepvit_lib.run.resume import describe_run

WORST, WIDTH, MAX_SIDE = 8, 54, 2048  # the worst images: number of pictures, rem in the page, largest side in pixels
LIBRARIES = dict(mmseg="onedl-mmsegmentation", mmdet="onedl-mmdetection")


class ReportHook(Hook):
    """Write the report of a test.

    Args:
        folder: folder of the report.
        drawing: draws images with their labels and predictions.
    """

    def __init__(self, folder: Path, drawing: FileHook) -> None:
        self.folder, self.drawing = folder, drawing

    def add_results(self, page: Page, runner: Any, metrics: dict[str, float]) -> None:
        """Add the results of the test to a page. `metrics` are the figures that mmengine prints."""
        raise NotImplementedError

    def write(self, runner: Any, metrics: dict[str, float]) -> None:
        """Write the report.

        Raises:
            UserError: a file cannot be written.
        """
        cfg, data = runner.cfg, runner.test_dataloader.dataset
        path, config = self.folder / "report.html", Path(cfg.filename)
        page = Page(f"{config.stem} on {len(data)} images", f"{cfg.load_from}, {date.today()}")
        self.add_results(page, runner, metrics)
        device = next(runner.model.parameters()).device
        run = describe_run({}, {}, device, (*PACKAGES, LIBRARIES[cfg.default_scope]))
        facts = {
            "config": f"{config}; with all options: {Path(runner.log_dir) / config.name}",
            "checkpoint": str(cfg.load_from),
            "data": f"{len(data)} images of {len(data.metainfo['classes'])} classes in {cfg.get('data_root', '')}",
            "test-time augmentation": "yes" if "module" in cfg.model else "no",
            "versions": ", ".join(map(" ".join, run["versions"].items())),
            "device": f"{run['device']}, code {run['revision']}",
        }
        page.text("Data and settings", "h2")
        page.table("facts", [("", ""), *facts.items()])
        values = json.dumps({**metrics, **facts}, indent=1, default=lambda value: round(float(value), 4))
        page.files["report.json"] = f"{values}\n".encode()
        page.write(path, setting("work_dir", cfg.work_dir))
        runner.logger.info(f"report: {path}")

    def add_images(
        self, page: Page, runner: Any, columns: Mapping[str, Sequence[Any]], errors: np.ndarray, note: str
    ) -> None:
        """Add the file of all images, and pictures of the worst ones, which are predicted once more.

        Args:
            page: the page.
            runner: the runner of the test.
            columns: figures of the images by name, in the order of the data set.
            errors: how bad each image is. Those with 0 or NaN are not shown.
            note: meaning of the pictures.
        """
        loader, self.drawing.loader = runner.test_dataloader, runner.cfg.test_dataloader
        data, pictures = loader.dataset, []
        names = [str(path_inside(data, data.get_data_info(index)["img_path"])) for index in range(len(data))]
        page.table("images", [("image", *columns), *zip(names, *columns.values())], [])
        worst = [index for index in np.argsort(-errors, kind="stable").tolist() if errors[index] > 0]
        with torch.no_grad(), TemporaryDirectory() as folder:
            for index in worst[:WORST]:
                sample = runner.model.test_step(loader.collate_fn([data[index]]))[0]
                self.drawing.write(sample, data.metainfo, file := Path(folder, f"{index}.png"))
                picture = Image.open(file).convert("RGB")
                picture.thumbnail((MAX_SIDE, MAX_SIDE))
                figures = ", ".join(f"{name} {values[index]:.4g}" for name, values in columns.items())
                pictures.append((picture, [names[index], figures]))
        if pictures:
            page.text("Worst images", "h2")
            page.text(note)
            page.pictures("worst_images", pictures, WIDTH)
