"""Settings saved in a checkpoint."""

import argparse
from typing import Any


def settings_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The settings saved in a checkpoint. Published checkpoints store them as a Namespace."""
    settings = checkpoint.get("args", {})
    if isinstance(settings, argparse.Namespace):
        return dict(vars(settings))
    return settings if isinstance(settings, dict) else {}


def img_size_of(checkpoint: dict[str, Any]) -> tuple[int, int] | None:
    """Image size (H, W) in a checkpoint's settings; None if the settings do not contain an image size."""
    size = settings_in(checkpoint).get("input_size")
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None  # timm has three
