"""Top-1 under the corruptions of ImageNet-C (Hendrycks and Dietterich, https://arxiv.org/abs/1903.12261)."""

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

MIN_CORRUPTED = 32  # pixels of an image's side


@np.errstate(invalid="ignore")
def corrupt(image: Image.Image, name: str, severity: int) -> Image.Image:
    """Corrupt an image.

    Random numbers depend on the image, the corruption and its severity alone, and so not on processes, workers or the
    order of the images.

    Args:
        image: an image in RGB, with sides of at least `MIN_CORRUPTED` pixels.
        name: a corruption of the package `imagecorruptions`.
        severity: from 1 to 5.
    """
    from imagecorruptions import corruption_dict  # optional, and slow to import

    np.random.seed(seed := zlib.crc32(image.tobytes(), zlib.crc32(f"{name} {severity}".encode())))
    own = [seed] if name in ("impulse_noise", "glass_blur") else []  # do not use NumPy's global generator
    corrupted = np.asarray(corruption_dict[name](image, severity, *own))
    # Spatter without any drop, which occurs in small images, is 0 / 0.
    return Image.fromarray(np.where(np.isnan(corrupted), np.asarray(image), corrupted).astype(np.uint8))


def top1_by_corruption(top1_of: Callable[[str, int], float]) -> dict[str, list[float]]:
    """Evaluate under each corruption at each severity.

    Args:
        top1_of: evaluates under a corruption, by name and severity. Returns top-1 (%).

    Returns:
        for each corruption, top-1 (%) at severities 1 to 5. ImageNet-C's 15 common corruptions come first.
    """
    from imagecorruptions import get_corruption_names  # before loader workers are forked, so that they share it

    return {name: [top1_of(name, severity) for severity in range(1, 6)] for name in get_corruption_names("all")}


def corruption_table(top1: Mapping[str, Sequence[float]], clean: float) -> list[list[str]]:
    """Tabulate top-1 (%) by corruption and severity, with means over the common corruptions and over all.

    Args:
        top1: result of `top1_by_corruption`.
        clean: top-1 of uncorrupted images.
    """
    rows = {**top1, **{f"mean of {n}": [*np.mean([*top1.values()][:n], axis=0)] for n in (15, len(top1))}}
    lines = [[name, *(f"{value:.3f}" for value in (*row, np.mean(row)))] for name, row in rows.items()]
    return [["top-1 %", *"12345", "mean"], ["clean", *[""] * 5, f"{clean:.3f}"], *lines]
