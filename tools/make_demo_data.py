"""Write small real data sets in the layouts of the big ones, to try everything without a download.

    python tools/make_demo_data.py --out DIR

DIR/imagenet/{train,val}/<class>/*.png: scikit-learn's 1,797 handwritten digits (the test part of the UCI set of
Alpaydin and Kaynak) in ImageNet's layout, a fifth of each class in val/.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_imagenet(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write the digits as an ImageNet-style folder, every fifth image of a class held back for validation.

    Args:
        folder: gets train/<class>/*.png and val/<class>/*.png; images that are there already are written again.
        seed: of the choice of the held-back images.

    Returns:
        number of images of each split.
    """
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    counts = {"train": 0, "val": 0}
    for label in range(10):
        for position, index in enumerate(i for i in order if digits.target[i] == label):
            split = "val" if position % 5 == 0 else "train"
            path = folder / split / str(label) / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * (255 / 16)).round().astype(np.uint8)  # 8 × 8, values 0 to 16
            Image.fromarray(pixels).save(path)
            counts[split] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    args = parser.parse_args()
    try:
        counts = write_imagenet(args.out / "imagenet")
    except OSError as error:
        print(f"make_demo_data.py: --out {args.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(f"{args.out / 'imagenet'}: {counts['train']} training and {counts['val']} validation images of 10 classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
