"""Find images that occur both in training and in validation, which make the accuracy too high."""

import hashlib
from collections.abc import Iterable
from contextlib import suppress

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sepvit_lib.pipeline.data_sets.base import Images
from sepvit_lib.pipeline.image_files import decode

MAX_IMAGES = 100_000  # checked by default
FEW = 1000  # images that are read without loader workers
SIDE = 32  # of the pixels that are compared


class Digests(Dataset):
    """Digests of each image: of its file, and of its pixels at 32 × 32; those that cannot be computed are missing."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[str]:
        digests = []
        with suppress(Exception):  # of any type; training and validation report unreadable images
            encoded = self.images.encoded(index)[0]
            if isinstance(encoded, bytes):
                digests.append(hashlib.sha256(encoded).hexdigest())
            pixels = decode(encoded).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            digests.append(hashlib.sha256(pixels.tobytes()).hexdigest())
        return digests


def find_duplicates(train: Images, val: Images, num_workers: int) -> list[tuple[str, str]]:
    """Names of the validation images that equal a training image in their bytes or pixels, each with that image's.

    Args:
        train: training images.
        val: validation images.
        num_workers: loader workers, for more than a few images.
    """
    known: dict[str, int] = {}
    for index, digests in enumerate(_digests(train, num_workers)):
        for digest in digests:
            known.setdefault(digest, index)
    pairs = []
    for index, digests in enumerate(_digests(val, num_workers)):
        if found := [known[digest] for digest in digests if digest in known]:
            pairs.append((val.name(index), train.name(found[0])))
    return pairs


def _digests(images: Images, num_workers: int) -> Iterable[list[str]]:
    return DataLoader(Digests(images), batch_size=None, num_workers=num_workers if len(images) > FEW else 0)
