"""Adapters for timm's readers of streaming data sets.

This module relies on undocumented attributes of timm's readers (timm 1.0.31 and later 1.0 versions). They are tested in
tests/unit/test_private_parts.py.
"""

import math
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import timm
from timm.data.readers import reader_wds
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError

from sepvit_lib.common.errors import MachineError, UserError, setting
from sepvit_lib.common.storage import is_storage_error
from sepvit_lib.pipeline.data_sets.archive import CheckedTarInfo
from sepvit_lib.pipeline.unreadable import UnreadableImageError

BLANK = b"P5 1 1 255 \0"  # a one-pixel image, which PIL opens fast
METADATA = re.compile(r"__[^/]*__($|/)")  # by webdataset's convention, such members belong to no sample

# ----------------------------------------------------------------------------------------------------------------------
# Webdatasets
# ----------------------------------------------------------------------------------------------------------------------


def open_webdataset(
    reader: ReaderWds, skip: Callable[[UnreadableImageError], bool], seed: int, decode: Callable[[bytes], Any]
) -> None:
    """Restart timm's webdataset reader with the given seed, and make it report unreadable images and shards.

    timm's reader seeds its shuffle once per worker and continues it across epochs, so a resumed run would see different
    images. It also skips unreadable images silently, and treats a damaged shard as if it ended at the damage.

    Only this function relies on these internals of timm 1.0: `ReaderWds._lazy_init`, `reader_wds._decode`, and the
    order of the pipeline's stages.

    Args:
        reader: timm's reader.
        skip: called with each unreadable image or shard; returns whether to skip it.
        seed: seed of the shuffle.
        decode: decodes an image file.

    Raises:
        UserError: the installed version of timm builds a different pipeline.
    """
    from webdataset.tariterators import tarfile_samples  # other data sets do not need webdataset

    if reader.worker_info is None:
        reader._lazy_init()  # finds out in which worker it runs
    reader.worker_seed = seed
    reader._lazy_init()
    pipeline: list[Any] = reader.ds.pipeline  # type: ignore[attr-defined]
    expanding = [i for i, stage in enumerate(pipeline) if getattr(stage, "f", None) is tarfile_samples]
    decoding = [i for i, stage in enumerate(pipeline) if _function_of(stage) is reader_wds._decode]
    if not (len(expanding) == len(decoding) == 1 and expanding < decoding):
        raise UserError(
            f"{setting('data_set', 'wds/…')}: timm {timm.__version__} reads webdatasets differently from "
            "the supported versions; install the version in constraints.txt"
        )
    decoder = pipeline[decoding[0]]
    decoder.args = (partial(_decoded, decode, decoder.args[0]),)
    decoder.kw["handler"] = partial(_handle_unreadable, skip)
    pipeline[expanding[0]] = partial(_samples_of_shards, skip, reader.root)


def _function_of(stage: Any) -> Any:
    """The function wrapped by the `functools.partial` that a pipeline stage applies to samples; None without one."""
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
        except UserError:  # ambiguous names in the shard
            raise
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            unreadable = UnreadableImageError.of(shard["url"], error, is_storage_error(error, root), kind="shard")
            if unreadable.is_storage_error:
                raise MachineError(str(unreadable)) from None
            if not skip(unreadable):
                raise unreadable from None


def _samples_of_shard(url: str) -> Iterator[dict[str, Any]]:
    """Yield a shard's samples, each as a dict from extensions to contents.

    Members of the shard whose names differ only in their extension form a sample.
    As in webdataset, an extension begins at the first dot of a name, unless that would merge several samples; see
    `_split`.

    Raises:
        tarfile.TarError: the shard is damaged. Its last, incomplete sample is not yielded.
        ValueError: two members have the same name.
        UserError: dots in the members' names are ambiguous.
        OSError: the shard cannot be read.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import base_plus_ext

    sample: dict[str, Any] = {}
    with gopen(url) as stream, ExitStack() as stack:
        mode: Any = "r:*" if stream.seekable() else "r|*"  # mode r| reads through a buffer, which is slower
        archive = stack.enter_context(tarfile.open(fileobj=stream, mode=mode, tarinfo=CheckedTarInfo))
        for member in archive:
            key, extension = base_plus_ext(member.name)
            if key is None or not member.isreg() or (member.name[:2] == "__" and METADATA.match(member.name)):
                continue
            if key != sample.get("__key__"):
                yield from _split(sample)
                sample = dict(__key__=key, __url__=url)
            if extension.lower() in sample:
                raise ValueError(f"contains {member.name} twice")
            if content := archive.extractfile(member):
                sample[extension.lower()] = content.read()
            archive.members = []  # type: ignore[attr-defined] # tarfile would keep all members in memory
    yield from _split(sample)


def _split(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Split a sample whose members' names have dots before their extension: `a.v1.jpg`, `a.v1.cls`, `a.v2.jpg`, …

    `a.v1` and `a.v2` are separate samples if each has a label and no member is named without such a dot (`a.jpg`).

    Args:
        sample: dict from extensions to contents, with `__key__` and `__url__`; empty for no sample.

    Raises:
        UserError: there are labels with and without such a dot (`a.v1.cls`, `a.cls`).
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, content in sample.items():
        begin, _, extension = name.rpartition(".")
        parts.setdefault(begin, {})[extension] = content
    common = parts.pop("", {})
    labelled = [begin for begin, part in parts.items() if len(part) > 1 and ("cls" in part or "json" in part)]
    if labelled and common.keys() == {"__key__", "__url__"} and len(labelled) == len(parts):
        for begin, part in parts.items():
            yield {**common, "__key__": f"{sample['__key__']}.{begin}", **part}
        return
    for begin in labelled:
        for kind in {"cls", "json"} & common.keys() & parts[begin].keys():
            names = f"{sample['__key__']}.{kind} and {sample['__key__']}.{begin}.{kind}"
            raise UserError(
                f"shard {sample['__url__']}: {names} would belong to one sample, because names are "
                "split at their first dot; rename one"
            )
    if sample:
        yield sample


def first_images(reader: ReaderWds) -> Iterator[bytes]:
    """Yield the image files of a webdataset, starting with its first shard."""
    for shard in reader.split_info.filenames:
        for sample in _samples_of_shard(shard if ":" in shard else os.path.join(reader.root, shard)):
            yield from (sample[extension] for extension in reader.input_key.split(";") if extension in sample)


def _decoded(
    decode: Callable[[bytes], Any], decode_sample: partial[dict[str, Any] | None], sample: dict[str, Any]
) -> dict[str, Any] | None:
    """Decode a sample: the image with `decode`, and the label with timm's decoder.

    Args:
        decode: decodes an image file.
        decode_sample: timm's decoder. It receives a copy of the sample with a blank image.
        sample: the sample.

    Raises:
        UnreadableImageError: this fails.
    """
    keys = [key for key in decode_sample.keywords["image_key"].split(";") if key in sample]
    try:
        decoded = decode_sample({**sample, **dict.fromkeys(keys, BLANK)})
        return decoded and {**decoded, "jpg": decode(sample[keys[0]])}
    except (TypeError, WdsTargetKeyError):  # a wrong setting, not an unreadable image
        raise
    except Exception as error:  # the type depends on the image format and on the damage
        raise UnreadableImageError.of(f"{sample['__url__']}: {sample['__key__']}", error) from None


def open_hugging_face(reader: Any) -> None:
    """Make timm's streaming reader of Hugging Face data sets yield image files instead of decoded images."""
    if getattr(reader, "ds", None) is None:
        reader._lazy_init()
        image = sys.modules["datasets"].Image(decode=False)  # Hugging Face's; see `import_hugging_face`
        reader.ds = reader.ds.cast_column(reader.input_key, image)


def _handle_unreadable(skip: Callable[[UnreadableImageError], bool], error: Exception) -> bool:
    if isinstance(error, UnreadableImageError) and skip(error):
        return True
    raise error


# ----------------------------------------------------------------------------------------------------------------------
# Sharding of streaming data sets
# ----------------------------------------------------------------------------------------------------------------------


def shards_of(dataset: Any) -> Sequence[str] | None:
    """Names of the shards of a webdataset; None for other data sets."""
    info = getattr(getattr(dataset, "reader", dataset), "split_info", None)
    return getattr(info, "filenames", None)  # Hugging Face's split information differs


def read_exactly_once(dataset: Any, split_shards: bool) -> None:
    """Make a timm reader yield each validation sample exactly once.

    On several ranks, timm's readers repeat and drop samples so that all ranks read equally many. Here, each rank reads
    its own shards of a webdataset if `split_shards` is set, and all samples otherwise.
    """
    reader = dataset.reader
    if getattr(reader, "dist_num_replicas", 1) == 1:
        return
    all_shards = shards_of(dataset)
    if split_shards and all_shards is not None:
        shards = all_shards[reader.dist_rank :: reader.dist_num_replicas]
        reader.split_info = replace(reader.split_info, filenames=shards)
        reader.num_samples = math.ceil((reader.num_samples or 0) / reader.dist_num_replicas)
    reader.dist_rank, reader.dist_num_replicas = 0, 1
