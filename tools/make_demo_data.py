"""Write small data sets in the layouts of ImageNet, ADE20K and COCO, to try every command without a download.

    python tools/make_demo_data.py --out DIR

DIR/imagenet/{train,val}/<class>/*.png: scikit-learn's 1,797 handwritten digits (the test part of the UCI set of
Alpaydin and Kaynak) in ImageNet's layout, with a fifth of each class in val/.

DIR/ade/ADEChallengeData2016/{images,annotations}/{training,validation}: scenes of these digits on photographs
from scikit-image and scikit-learn, in ADE20K's layout and numbering: 1 to 10 are the digits 0 to 9, 11 is the
background, and 0 ("other", not evaluated) marks the digits' soft edges. Training and validation share no digit image
and no photograph.

DIR/coco/{train2017,val2017,annotations}: the same scenes in COCO's layout, with a box and a mask for each digit.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sepvit_lib.common.command_line import Parser, path, run_command
from sepvit_lib.common.errors import UserError
from sepvit_lib.common.packages import require

DIGITS = 10
SCENE_SIZE = (128, 160)  # rows and columns, in pixels
SCENES = {"training": 600, "validation": 100}
PHOTOGRAPHS = {
    "training": ("china.jpg", "astronaut", "brick", "camera", "chelsea", "gravel", "hubble_deep_field", "rocket"),
    "validation": ("flower.jpg", "coffee", "grass"),
}


class Instance(NamedTuple):
    """A digit in a scene: its value, and its opacity at each pixel (H × W, 0 to 1, soft at the edges)."""

    digit: int
    opacity: np.ndarray


class Scene(NamedTuple):
    """An image (H × W × 3, RGB, 0 to 255) and the digits in it, which do not overlap."""

    image: np.ndarray
    instances: list[Instance]


def load_digits() -> Any:
    """Load scikit-learn's handwritten digits."""
    from sklearn import datasets

    return datasets.load_digits()


def split_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the digits for training, and for validation (every fifth of each class, shuffled)."""
    targets = load_digits().target
    order = np.random.default_rng(0).permutation(len(targets))
    is_validation = np.zeros(len(targets), dtype=bool)
    for label in range(DIGITS):
        is_validation[[index for index in order if targets[index] == label][::5]] = True
    return np.flatnonzero(~is_validation), np.flatnonzero(is_validation)


def digit_pixels(image: np.ndarray) -> np.ndarray:
    """Scale scikit-learn's image of a digit, 8 × 8, from the range 0 to 16 to the range 0 to 255."""
    return (image * (255 / 16)).round().astype(np.uint8)


def write_imagenet(folder: Path) -> dict[str, int]:
    """Write the digits as an ImageNet-style folder.

    Args:
        folder: folder for train/<class>/*.png and val/<class>/*.png. Existing images are overwritten.

    Returns:
        number of images by split.
    """
    digits = load_digits()
    splits = dict(zip(("train", "val"), split_digits()))
    for split, indices in splits.items():
        for index in indices:
            image = folder / split / str(digits.target[index]) / f"{index:04}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digit_pixels(digits.images[index])).save(image)
    return {split: len(indices) for split, indices in splits.items()}


def photographs(split: str) -> list[np.ndarray]:
    """Load the photographs of a split, H × W × 3, RGB, 0 to 255."""
    import skimage
    from sklearn.datasets import load_sample_image

    images = []
    for name in PHOTOGRAPHS[split]:
        image = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
        images.append(np.asarray(Image.fromarray(image).convert("RGB")))
    return images


def compose_scenes(counts: dict[str, int] = SCENES) -> dict[str, list[Scene]]:
    """Compose a number of scenes for each split. Every call returns the same scenes."""
    digits, scenes = load_digits(), {}
    for seed, ((split, count), indices) in enumerate(zip(counts.items(), split_digits())):
        rng, backgrounds = np.random.default_rng(seed), photographs(split)
        images, labels = digits.images[indices], digits.target[indices]
        scenes[split] = [compose_scene(rng, images, labels, backgrounds) for _ in range(count)]
    return scenes


def compose_scene(
    rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray, backgrounds: list[np.ndarray]
) -> Scene:
    """Put one to four bright digits on a random part of a darkened photograph, at random positions, sizes and colours.

    Args:
        rng: the random number generator.
        digits: images of digits, N × 8 × 8, 0 to 16.
        labels: values of the digits, N.
        backgrounds: photographs, H × W × 3, RGB, 0 to 255.
    """
    height, width = SCENE_SIZE
    photograph = backgrounds[rng.integers(len(backgrounds))]
    min_zoom = max(height / photograph.shape[0], width / photograph.shape[1])
    zoom = rng.uniform(min_zoom, max(min_zoom, 1.0))
    rows, columns = int(height / zoom), int(width / zoom)
    top, left = rng.integers(photograph.shape[0] - rows + 1), rng.integers(photograph.shape[1] - columns + 1)
    part = Image.fromarray(photograph[top : top + rows, left : left + columns])
    image = 0.6 * np.asarray(part.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    max_digits = rng.integers(1, 5)
    instances: list[Instance] = []
    taken = np.zeros(SCENE_SIZE, dtype=bool)
    for _ in range(2 * DIGITS):  # attempts
        index, side = rng.integers(len(digits)), int(rng.integers(56, 97))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        if taken[top : top + side, left : left + side].any():
            continue
        if len(instances) == max_digits:
            break
        taken[top : top + side, left : left + side] = True
        strokes = Image.fromarray(np.pad(digits[index] / 16, 1).astype(np.float32))  # 10 × 10
        opacity = np.zeros(SCENE_SIZE, dtype=np.float32)
        enlarged = np.asarray(strokes.resize((side, side), Image.Resampling.BICUBIC))
        opacity[top : top + side, left : left + side] = np.clip(2 * enlarged - 0.5, 0, 1)
        instances.append(Instance(int(labels[index]), opacity))
        image += opacity[..., None] * (rng.uniform(190, 255, 3) - image)
    return Scene(image.round().clip(0, 255).astype(np.uint8), instances)


def write_ade(folder: Path, scenes: dict[str, list[Scene]]) -> None:
    """Write scenes in ADE20K's layout.

    Args:
        folder: folder for images/<split>/*.jpg and annotations/<split>/*.png. Existing files are overwritten.
        scenes: scenes by split.
    """
    for split in scenes:
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes[split], start=1):
            labels = np.full(SCENE_SIZE, DIGITS + 1, dtype=np.uint8)
            for instance in scene.instances:
                labels[instance.opacity > 0] = 0
                labels[instance.opacity > 0.5] = instance.digit + 1
            name = f"ADE_{split.removesuffix('ing').removesuffix('idation')}_{number:08}"
            Image.fromarray(scene.image).save(folder / "images" / split / f"{name}.jpg", quality=95)
            Image.fromarray(labels).save(folder / "annotations" / split / f"{name}.png")


def write_coco(folder: Path, scenes: dict[str, list[Scene]]) -> dict[str, int]:
    """Write scenes in COCO's layout.

    Args:
        folder: folder for train2017/*.jpg, val2017/*.jpg and annotations/instances_*2017.json. Existing files are
            overwritten.
        scenes: scenes by split.

    Returns:
        number of digits by split.
    """
    counts = {}
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, name in (("training", "train2017"), ("validation", "val2017")):
        (folder / name).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, scene in enumerate(scenes[split], start=1):
            images.append(dict(id=number, file_name=f"{number:012}.jpg", height=SCENE_SIZE[0], width=SCENE_SIZE[1]))
            Image.fromarray(scene.image).save(folder / name / images[-1]["file_name"], quality=95)
            for instance in scene.instances:
                mark = annotation(instance.opacity > 0.5)
                mark |= dict(id=len(annotations) + 1, image_id=number, category_id=instance.digit + 1, iscrowd=0)
                annotations.append(mark)
        categories = [dict(id=digit + 1, name=str(digit), supercategory="digit") for digit in range(DIGITS)]
        content = dict(info={}, licenses=[], images=images, annotations=annotations, categories=categories)
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        counts[split] = len(annotations)
    return counts


def annotation(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's annotation of a mask (H × W): box (x, y, width, height), area, run lengths in column order."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff([0, *changes, pixels.size]).tolist()
    if pixels[0]:
        counts.insert(0, 0)  # the first run counts background pixels
    segmentation = dict(size=list(mask.shape), counts=counts)
    return dict(bbox=[int(value) for value in box], area=int(mask.sum()), segmentation=segmentation)


def build_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder to write to")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the data sets, and print a summary of each.

    Raises:
        UserError: the folder is not writable.
    """
    require("the demo's data", "sklearn", "skimage", extra="demo")
    imagenet, ade, coco = (Path(args.out) / name for name in ("imagenet", "ade/ADEChallengeData2016", "coco"))
    try:
        counts = write_imagenet(imagenet)
        print(f"{imagenet}: {counts['train']} training and {counts['val']} validation images of 10 classes")
        scenes = compose_scenes()
        write_ade(ade, scenes)
        print(f"{ade}: {SCENES['training']} training and {SCENES['validation']} validation scenes of digits")
        counts = write_coco(coco, scenes)
        print(f"{coco}: the same scenes, {counts['training']} and {counts['validation']} digits with boxes and masks")
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}); choose another folder") from None


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    return run_command("make_demo_data.py", lambda: main(parser.parse_args(arguments)), parser)


if __name__ == "__main__":
    sys.exit(run())
