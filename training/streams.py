"""Streaming data sets: adapters for timm's readers (webdatasets above all), and the samples they yield."""

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from timm.data.readers import reader_wds
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext, tarfile_samples

from training.errors import MachineError, UserError, setting
from training.processes import get_rank
from training.samples import CheckedTarInfo, ImageData, Samples
from training.storage import is_storage_error
from training.unreadable import Replacements, UnreadableImageError
from utils import Stream, derived_seed, seed_everything

METADATA = re.compile(r"__[^/]*__($|/)")  # by webdataset's convention, members with these names belong to no sample

# ----------------------------------------------------------------------------------------------------------------------
# Webdatasets
# ----------------------------------------------------------------------------------------------------------------------


def open_webdataset(reader: ReaderWds, skip: Callable[[UnreadableImageError], bool], seed: int) -> None:
    """Restart timm's reader of a webdataset with a seed, and make it report unreadable images and shards.

    timm's reader seeds its shuffle once per worker and continues it through the epochs, so a resumed run would see
    other images. It also skips unreadable images silently, and takes a damaged shard for a short one.

    This uses private parts of timm 1.0 (`ReaderWds._lazy_init`, `reader_wds._decode`, and the order of the pipeline's
    stages), and no other function does.

    Args:
        reader: timm's reader.
        skip: called with each unreadable image or shard; returns whether to skip it.
        seed: seed of the shuffle.

    Raises:
        UserError: this version of timm builds another pipeline.
    """
    if reader.worker_info is None:
        reader._lazy_init()  # finds out which worker it is
    reader.worker_seed = seed
    reader._lazy_init()
    pipeline: list[Any] = reader.ds.pipeline  # type: ignore[attr-defined]
    expanding = [i for i, stage in enumerate(pipeline) if getattr(stage, "f", None) is tarfile_samples]
    decoding = [i for i, stage in enumerate(pipeline) if _function_of(stage) is reader_wds._decode]
    if not (len(expanding) == len(decoding) == 1 and expanding < decoding):
        raise UserError(f"{setting('data_set', 'wds/…')}: timm {timm.__version__} reads webdatasets differently from "
                        "the versions supported; install the version in requirements.txt")  # fmt: skip
    decoder = pipeline[decoding[0]]
    decoder.args = (partial(_decoded, decoder.args[0]),)
    decoder.kw["handler"] = partial(_handle_unreadable, skip)
    pipeline[expanding[0]] = partial(_samples_of_shards, skip, reader.root)


def _function_of(stage: Any) -> Any:
    """The function that a pipeline stage applies to each sample, if it is a `functools.partial`."""
    arguments = getattr(stage, "args", ())
    return arguments[0].func if arguments and isinstance(arguments[0], partial) else None


def _samples_of_shards(
    skip: Callable[[UnreadableImageError], bool], root: str, shards: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the samples of shards, undecoded, in order.

    Raises:
        UnreadableImageError: a shard is damaged and must not be skipped.
        MachineError: the storage does not respond.
    """
    for shard in shards:
        try:
            yield from _samples_of_shard(shard["url"])
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            unreadable = UnreadableImageError.of(shard["url"], error, is_storage_error(error, root), kind="shard")
            if unreadable.is_storage_error:
                raise MachineError(str(unreadable)) from None
            if not skip(unreadable):
                raise unreadable from None


def _samples_of_shard(url: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard. Members that share a name up to its extension form a sample: contents by extension.

    Raises:
        tarfile.TarError: the shard is damaged. Its last, incomplete sample is not yielded.
        ValueError: two members have the same name.
        OSError: the shard cannot be read.
    """
    sample: dict[str, Any] = {}
    with gopen(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=CheckedTarInfo) as archive:
        for member in archive:
            key, ending = base_plus_ext(member.name)
            if key is None or not member.isreg() or METADATA.match(member.name):
                continue
            if key != sample.get("__key__"):
                if sample:
                    yield sample
                sample = dict(__key__=key, __url__=url)
            if ending.lower() in sample:
                raise ValueError(f"it holds {member.name} twice")
            if content := archive.extractfile(member):
                sample[ending.lower()] = content.read()
            archive.members = []  # type: ignore[attr-defined] # tarfile would keep all of them in memory
    if sample:
        yield sample


def _decoded(decode: Callable[[dict], dict], sample: dict[str, Any]) -> dict[str, Any]:
    """Decode a sample."""
    try:
        return decode(sample)
    except (TypeError, WdsTargetKeyError):  # a wrong setting, not an unreadable image
        raise
    except Exception as error:  # the type depends on the image format and on the damage
        raise UnreadableImageError.of(f"{sample['__url__']}: {sample['__key__']}", error) from None


def _handle_unreadable(skip: Callable[[UnreadableImageError], bool], error: Exception) -> bool:
    if isinstance(error, UnreadableImageError) and skip(error):
        return True
    raise error


# ----------------------------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------------------------


class ValStream(Samples, IterableDataset):
    """Validation samples of a streaming data set. An unreadable image is an error."""

    def __iter__(self) -> Iterator[Any]:
        """Yield image and label."""
        for image, target in self._images(lambda error: False):
            yield self.transform(image), target

    def _images(self, skip: Callable[[UnreadableImageError], bool], seed: int = 0) -> Iterator[tuple[Any, int]]:
        """Yield images without transform, and their labels.

        Args:
            skip: called with each unreadable image or shard; returns whether to skip it. Only webdatasets can.
            seed: seed of a webdataset's shuffle.

        Raises:
            UnreadableImageError: an image is unreadable and must not be skipped.
        """
        if isinstance(self.dataset.reader, ReaderWds):
            open_webdataset(self.dataset.reader, skip, seed)
        number = 0
        try:
            for sample in self.dataset:
                yield sample
                number += 1
        except (OSError, SyntaxError) as error:  # which PIL raises for broken images
            raise UnreadableImageError.of(f"number {number} of a worker's", error) from None


class TrainStream(ValStream):
    """Training samples of a streaming data set. Augmentation follows from the seed, the epoch, and the sample's rank,
    worker and number."""

    def __init__(self, data: ImageData, seed: int = 0) -> None:
        super().__init__(data, seed)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with workers, which outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, whose shuffle follows from it."""
        self.epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        """Yield image, label, and the names of unreadable images and shards before the image.

        Raises:
            UserError: too many images in a row are unreadable.
        """
        worker = get_worker_info()
        place = (self.epoch.item(), get_rank(), worker.id if worker else 0)
        replacements = Replacements()

        def skip(error: UnreadableImageError) -> bool:
            replacements.add(error)
            return True

        images = self._images(skip, derived_seed(Stream.SHUFFLE, self.seed, *place))
        for number, (image, target) in enumerate(images):
            seed_everything(Stream.AUGMENTATION, self.seed, *place, number)
            yield self.transform(image), target, replacements.take()
