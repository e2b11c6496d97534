"""Samples of streaming data sets, read by timm's readers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import IterableDataset, get_worker_info

from sepvit_lib.common.processes import get_rank
from sepvit_lib.common.randomness import Stream, derived_seed, seed_cpu
from sepvit_lib.pipeline.image_files import Encoded, read_file
from sepvit_lib.pipeline.readers import open_hugging_face, open_webdataset
from sepvit_lib.pipeline.samples import ImageData, Samples
from sepvit_lib.pipeline.unreadable import Replacements, UnreadableImageError


class ValStream(Samples, IterableDataset):
    """Validation samples of a streaming data set. An unreadable image is an error."""

    def __iter__(self) -> Iterator[Any]:
        """Yield image and label."""
        for image, target in self._images(lambda error: False, self.decode):
            yield self.transform(image), self.output_of(target)

    def _images(
        self, skip: Callable[[UnreadableImageError], bool], decode: Callable[[Encoded], Any], seed: int = 0
    ) -> Iterator[tuple[Any, int]]:
        """Yield untransformed images and their labels.

        Args:
            skip: called with each unreadable image or shard; returns whether to skip it. Only for webdatasets.
            decode: decodes an image file.
            seed: seed of a webdataset's shuffle.

        Raises:
            UnreadableImageError: an image is unreadable and must not be skipped.
        """
        in_reader = isinstance(self.dataset.reader, ReaderWds)
        if in_reader:
            open_webdataset(self.dataset.reader, skip, seed, decode)
        if type(self.dataset.reader).__name__ == "ReaderHfids":  # importing the class needs the library
            open_hugging_face(self.dataset.reader)
        number = 0
        try:
            for image, target in self.dataset:
                if isinstance(image, dict):  # an image file from Hugging Face's library
                    image = image["bytes"] or read_file(image["path"])
                yield (image if in_reader else decode(image)), target
                number += 1
        except (OSError, SyntaxError) as error:  # PIL raises these for damaged images
            raise UnreadableImageError.of(f"number {number} of this worker", error) from None


class TrainStream(ValStream):
    """Training samples of a streaming data set.

    Augmentation is determined by the seed, the epoch, the rank, the worker, and the sample's number in the worker.
    """

    def __init__(self, data: ImageData, seed: int = 0) -> None:
        super().__init__(data, seed)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with workers, which outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the shuffle."""
        self.epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        """Yield image, label, and the unreadable images and shards skipped before it, as text (`Replacements.take`).

        Raises:
            UserError: too many consecutive images of a webdataset, or any image of other streams, are unreadable.
        """
        worker = get_worker_info()
        origin = (self.epoch.item(), get_rank(), worker.id if worker else 0)
        replacements = Replacements()

        def skip(error: UnreadableImageError) -> bool:
            replacements.add(error)
            return True

        number = 0

        def decode(encoded: Encoded) -> Any:
            seed_cpu(Stream.AUGMENTATION, self.seed, *origin, number)
            return self.decode(encoded)

        seed = derived_seed(Stream.SHUFFLE, self.seed, *origin)
        for image, target in self._images(skip, decode, seed):
            yield self.transform(image), self.output_of(target), replacements.take()
            number += 1
