"""Where a reported evaluation comes from: its network, images and settings, and what they mean for the figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepvit_lib.common.class_names import listed
from sepvit_lib.common.errors import setting, with_flags
from sepvit_lib.common.saved_settings import settings_in
from sepvit_lib.pipeline.preprocessing import Preprocessing
from sepvit_lib.pipeline.samples import ImageData, fingerprint
from sepvit_lib.report.html import Page
from sepvit_lib.run.checkpoint_names import StepNames
from sepvit_lib.run.checkpoints import has_both_weights
from sepvit_lib.run.resume import PACKAGES, describe_run


@dataclass(frozen=True)
class Subject:
    """An evaluation of a network.

    Attributes:
        settings: settings of the command that evaluates, by name.
        defaults: settings of a command without flags.
        flags: flag of each setting.
        checkpoint: the evaluated checkpoint, empty for random weights.
        val: the evaluated images.
        train: images that the network was trained on; None if they are not at hand.
        duplicates: evaluated images that are also training images, each with that image; None if not looked for.
        network: the network, in evaluation mode.
        preprocessing: preprocessing of the images.
    """

    settings: Mapping[str, Any]
    defaults: Mapping[str, Any]
    flags: Mapping[str, str]
    checkpoint: dict[str, Any]
    val: ImageData
    train: ImageData | None
    duplicates: Sequence[tuple[str, str]] | None
    network: nn.Module
    preprocessing: Preprocessing

    def notes(self) -> list[str]:
        """Caveats on the metrics."""
        notes, seen = [], self.checkpoint.get("data", {}).get("val", {}).get("fingerprint")
        if seen == fingerprint(self.val):
            watch = setting("watch", settings_in(self.checkpoint).get("watch", "top1"))
            is_best = Path(self.settings["resume"]).name == StepNames.best
            what = f"The epoch ({watch}) was" if is_best else "Settings may have been"
            notes += [f"{what} chosen on these images, so expect lower metrics on others."]
            test = " ".join((setting("eval"), setting("report"), setting("val_split", "test")))
            notes += [f"A separate test split gives unbiased metrics: for a table of images, {test}."]
        elif self.settings["val_fraction"] or settings_in(self.checkpoint).get("val_fraction"):
            notes += ["These images were not split as in the training run, so some may be training images."]
        if self.duplicates:
            notes += [f"{len(self.duplicates)} of the images are also training images, so the metrics are too high."]
        if has_both_weights(self.checkpoint):
            notes += ["The metrics are those of the network's own weights, not of its averaged weights."]
        return [with_flags(note, self.flags) for note in notes]

    def add_facts(self, page: Page) -> dict[str, str]:
        """Add the facts on data, settings and versions to a page. Returns them by name."""
        now, before = self.settings, settings_in(self.checkpoint)
        run = describe_run(now, {}, torch.device(now["device"]), (*PACKAGES, "scikit-learn"))
        pairs = None if self.duplicates is None else listed([" = ".join(pair) for pair in self.duplicates]) or "none"
        split = setting("val_split", now["val_split"]) if "/" in now["data_set"] else "as given by the data set"
        if now["val_fraction"]:
            chosen = " ".join(setting(name, now[name]) for name in ("val_fraction", "split_seed"))
            split = f"{chosen}, stratified by class; groups kept together"
        trained = str(len(self.train)) if self.train else "unknown: the training run's images were not found"
        facts = {
            "data": f"{now['data_set']}, images in {self.val.dataset.root}",
            "split": with_flags(split, self.flags),
            "training images": trained,
            "duplicates of training images": pairs or "not checked",
            "preprocessing": str(self.preprocessing),
            "checkpoint": f"{now['resume'] or 'none'}, epoch {self.checkpoint.get('epoch', 'unknown')}",
            "versions": ", ".join(map(" ".join, run["versions"].items())),
            "revision": run["revision"],
            "device": run["device"],
        }
        page.text("Data and settings", "h2")
        page.table("facts", [("", ""), *facts.items()])
        page.text("Settings that differ from the defaults (an empty cell is the default):")
        lines: list[tuple[str, ...]] = [("setting", "training", "evaluation")]
        for name, value in self.defaults.items():
            default, *used = (json.dumps(one.get(name, value)) for one in ({}, before, now))
            if {*used} != {default}:
                lines.append((self.flags[name], *("" if text == default else text for text in used)))
        page.table("settings", lines)
        return facts
