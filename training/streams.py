"""Streaming data sets, above all webdatasets: what adapts timm's readers, and the samples they give."""

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

from training.samples import NAMES_END, REPLACEMENTS, CheckedTarInfo, ImageData, Samples, UnreadableImageError
from utils import MachineError, Stream, UserError, derived_seed, get_rank, is_of_storage, seed_everything

METADATA = re.compile(r"__[^/]*__($|/)")  # members of a shard that are no samples', by webdataset's convention

# ----------------------------------------------------------------------------------------------------------------------
# Webdatasets
# ----------------------------------------------------------------------------------------------------------------------


def open_webdataset(reader: ReaderWds, skip: Callable[[UnreadableImageError], bool], seed: int) -> None:
    """Make the reader of a webdataset begin anew, by a seed, and name what it cannot read.

    By itself it draws its worker's only seed from how many random numbers were drawn before, and shuffles on through
    the epochs: in a resumed run, other images. It skips what it cannot read, and takes a broken shard for a short one.

    Args:
        reader: timm's.
        skip: told of an image or shard that cannot be read; whether it is skipped.
        seed: of the shuffle.

    Raises:
        UserError: this version of timm builds its pipeline in another way than this function knows.
    """
    if reader.worker_info is None:
        reader._lazy_init()  # learns which worker it is
    reader.worker_seed = seed
    reader._lazy_init()
    pipeline = reader.ds.pipeline
    expanding = [i for i, stage in enumerate(pipeline) if getattr(stage, "f", None) is tarfile_samples]
    decoding = [i for i, stage in enumerate(pipeline) if _function_of(stage) is reader_wds._decode]
    if not (len(expanding) == len(decoding) == 1 and expanding < decoding):
        raise UserError(f"--data-set wds/…: timm {timm.__version__} reads webdatasets in a way unknown here; install "
                        "the version that requirements.txt names")  # fmt: skip
    decoder = pipeline[decoding[0]]
    decoder.args = (partial(_decoded, decoder.args[0]),)
    decoder.kw["handler"] = partial(_handle_unreadable, skip)
    pipeline[expanding[0]] = partial(_samples_of_shards, skip, reader.root)


def _function_of(stage: Any) -> Any:
    """What a stage applies to each sample, where it is a function with some arguments given."""
    arguments = getattr(stage, "args", ())
    return arguments[0].func if arguments and isinstance(arguments[0], partial) else None


def _samples_of_shards(
    skip: Callable[[UnreadableImageError], bool], root: str, shards: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The samples of shards, as they lie there, in their order.

    Raises:
        UnreadableImageError: a shard is damaged, and not to be skipped.
        MachineError: the storage does not answer.
    """
    for shard in shards:
        try:
            yield from _samples_of_shard(shard["url"])
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            unreadable = UnreadableImageError.of(shard["url"], error, is_of_storage(error, root), kind="shard")
            if unreadable.is_of_storage:
                raise MachineError(str(unreadable)) from None
            if not skip(unreadable):
                raise unreadable from None


def _samples_of_shard(url: str) -> Iterator[dict[str, Any]]:
    """The samples of a shard: the contents of its members by the endings of their names, grouped by the rest of these.

    Raises:
        tarfile.TarError: the shard is damaged. Its last, incomplete sample was not given.
        ValueError: two members have one name.
        OSError: it cannot be read.
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
            sample[ending.lower()] = archive.extractfile(member).read()
            archive.members = []  # or they would all be kept
    if sample:
        yield sample


def _decoded(decode: Callable[[dict], dict], sample: dict[str, Any]) -> dict[str, Any]:
    """A webdataset's sample, decoded."""
    try:
        return decode(sample)
    except (TypeError, WdsTargetKeyError):  # not the image's fault
        raise
    except Exception as error:  # what broken images raise depends on their format, and how they are broken
        raise UnreadableImageError.of(f"{sample['__url__']}: {sample['__key__']}", error) from None


def _handle_unreadable(skip: Callable[[UnreadableImageError], bool], error: Exception) -> bool:
    if isinstance(error, UnreadableImageError) and skip(error):
        return True
    raise error


# ----------------------------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------------------------


class ValStream(Samples, IterableDataset):
    """Validation samples of a streaming data set; one that cannot be read is named."""

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, target in self._images(lambda error: False):
            yield self.transform(image), target

    def _images(self, skip: Callable[[UnreadableImageError], bool], seed: int = 0) -> Iterator[tuple[Any, int]]:
        """Images as they are, and their labels.

        Args:
            skip: told of an image or shard that cannot be read; whether it is skipped, which webdatasets alone can.
            seed: of a webdataset's shuffle.

        Raises:
            UnreadableImageError: an image cannot be read, and is not to be skipped.
        """
        if isinstance(self.dataset.reader, ReaderWds):
            open_webdataset(self.dataset.reader, skip, seed)
        number = 0
        try:
            for sample in self.dataset:
                yield sample
                number += 1
        except (OSError, SyntaxError) as error:  # as broken images raise
            raise UnreadableImageError.of(f"number {number} of a worker's", error) from None


class TrainStream(ValStream):
    """Training samples of a streaming data set, augmented by random numbers that follow from the seed, the epoch, and
    which sample of which worker and process it is.

    Args:
        data: the images and their transform.
        seed: the run's.
    """

    def __init__(self, data: ImageData, seed: int) -> None:
        super().__init__(data)
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers live longer than an epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose an epoch's shuffle."""
        self.epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        """Image, label, and the names of images and shards before it that could not be read.

        Raises:
            UserError: none of several images can be read.
        """
        worker = get_worker_info()
        place = (self.epoch.item(), get_rank(), worker.id if worker else 0)
        unreadable: list[str] = []

        def skip(error: UnreadableImageError) -> bool:
            unreadable.append(error.name)
            if len(unreadable) > REPLACEMENTS:
                raise UserError(f"image {unreadable[0]}: cannot be read, nor can {REPLACEMENTS} others after it")
            return True

        images = self._images(skip, derived_seed(Stream.SHUFFLE, self.seed, *place))
        for number, (image, target) in enumerate(images):
            seed_everything(Stream.AUGMENTATION, self.seed, *place, number)
            yield self.transform(image), target, NAMES_END.join(unreadable)
            unreadable.clear()
