"""Training samples of segmentation and detection. A resumed run gets the same samples as an uninterrupted one."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any

from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from sepvit_lib.common.errors import MachineError, UserError
from sepvit_lib.common.randomness import SampleIndex, Stream, derived_seed, seed_everything
from sepvit_lib.mm.config_lookup import inner_data_sets
from sepvit_lib.pipeline.image_files import MAX_HEADERS, evenly_spaced
from sepvit_lib.pipeline.unreadable import Replacements, UnreadableImageError
from sepvit_lib.run.watchdog import ignore_preemption


class SeededSamples(Dataset):
    """A training data set whose randomness is derived from the seed and the position in the run.

    The seed and the position determine the augmentation, and the images that replace unreadable ones.

    Args:
        dataset: a data set of mmengine.
        seed: the run's seed.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet, while a worker unpickles this object
            raise AttributeError(name)
        return getattr(self.dataset, name)  # hooks read attributes such as `metainfo`

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = name in ("dataset", "seed")
        object.__setattr__(self if is_own else self.dataset, name, value)  # hooks set the wrapped data set's `pipeline`

    def __getitem__(self, sample: SampleIndex) -> tuple[Any, str]:
        """Load a sample. Returns it, and the names of unreadable images that it replaces.

        Raises:
            UserError: too many images in a row are unreadable.
            MachineError: the storage does not respond.
        """
        replacements, index = Replacements(), sample.index
        for attempt in count():
            # Also seeds the choice of a different image if a transform requests one, e.g. for a crop without objects.
            seed_everything(Stream.AUGMENTATION, self.seed, sample.epoch, sample.position, attempt)
            try:
                return self.dataset[index], replacements.take()
            except UnreadableImageError as error:
                if error.is_storage_error:  # retried already; other images would fail too
                    raise MachineError(str(error)) from None
                replacements.add(error)
                index = derived_seed(Stream.REPLACEMENT, self.seed, sample.epoch, sample.position, attempt) % len(self)
        raise AssertionError("count() does not end")


class SeededBatches(Sampler[list[SampleIndex]]):
    """Batches of a training loader, starting at any batch. Each sample comes with its position in the run.

    The order is that of mmengine's sampler, which depends only on the seed and the epoch.

    Args:
        loader: a training loader of mmengine.
        is_endless: whether the batches continue forever, as in iteration-based runs, instead of ending with the epoch.

    Attributes:
        sampler: mmengine's sampler, under the name that mmengine's hooks expect.

    Raises:
        UserError: the data set is a stream, which can start only at its first batch.
    """

    def __init__(self, loader: DataLoader, is_endless: bool) -> None:
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            what = f"train_dataloader.dataset {type(loader.dataset).__name__}"
            raise UserError(f"{what}: a stream, which cannot be resumed; use a data set with a length and batches")
        batches: Any = loader.batch_sampler
        self.batch_sampler = batches
        self.sampler = getattr(batches, "sampler", loader.sampler)
        self.batch_size: int = batches.batch_size
        self.is_endless = is_endless
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.batch_sampler)

    def start_at(self, epoch: int, batch: int) -> None:
        """Set the epoch and the batch to start from."""
        self.epoch = epoch
        self.first = batch

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        rank, world_size = get_dist_info()
        for number, indices in islice(enumerate(self._all()), self.first, None):
            start = (number * world_size + rank) * self.batch_size
            yield [SampleIndex(self.epoch, start + number, index) for number, index in enumerate(indices)]

    def _all(self) -> Iterator[list[int]]:
        """This rank's batches, from the start of the epoch or of the endless run."""
        if hasattr(self.sampler, "skip"):  # mmengine's infinite sampler, which would not restart
            self.sampler.skip(0)
        for epoch in count() if self.is_endless else (self.epoch,):
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            yield from self.batch_sampler


def seeded_loader(loader: DataLoader, batches: SeededBatches, seed: int) -> DataLoader:
    """Make a training loader that can start at any batch.

    Its batches are pairs of mmengine's batch and the names of the unreadable images that were replaced in the batch.

    Args:
        loader: a training loader of mmengine.
        batches: its batches.
        seed: the run's seed.
    """
    same = "num_workers pin_memory timeout worker_init_fn multiprocessing_context prefetch_factor persistent_workers"
    return DataLoader(
        SeededSamples(loader.dataset, seed),
        batch_sampler=batches,
        collate_fn=partial(collate_with_names, loader.collate_fn),
        **{name: getattr(loader, name) for name in same.split()},
    )


def collate_with_names(collate: Callable[[list[Any]], Any], samples: list[tuple[Any, str]]) -> tuple[Any, list[str]]:
    """Collate samples of `SeededSamples` into a batch, and list the names of unreadable images."""
    return collate([sample for sample, _ in samples]), [names for _, names in samples if names]


def shield_workers(loader: DataLoader) -> DataLoader:
    """Make a loader's workers ignore the signals that stop a run, so that the current step can finish."""
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
    return loader


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    ignore_preemption()
    if start is not None:
        start(worker)


def describe_samples(dataset: Any) -> dict[str, Any]:
    """Size and fingerprint of a data set. The fingerprint is a hash of file names, boxes and classes, not of pixels."""
    digest = hashlib.sha256()
    roots = [os.path.abspath(root) for root in data_roots(dataset)] or [os.getcwd()]
    root = os.path.commonpath(roots)
    for index in range(len(dataset) if hasattr(dataset, "get_data_info") else 0):
        info = dataset.get_data_info(index)
        names = [os.path.relpath(info[key], root) for key in ("img_path", "seg_map_path") if info.get(key)]
        objects = [(one.get("bbox"), one.get("bbox_label")) for one in info.get("instances", ())]
        digest.update(json.dumps([names, objects], default=str).encode())
    return dict(images=len(dataset), fingerprint=digest.hexdigest()[:16])


def sampled_files(dataset: Any) -> Iterator[Callable[[], str]]:
    """Yield functions that return the paths of evenly spaced images, for `image_files.count_turned`."""
    if hasattr(dataset, "get_data_info"):
        for index in evenly_spaced(range(len(dataset)), MAX_HEADERS):
            yield partial(_path, dataset, index)
    else:
        for inner in inner_data_sets(dataset):
            yield from sampled_files(inner)


def _path(dataset: Any, index: int) -> str:
    return dataset.get_data_info(index)["img_path"]


def data_roots(dataset: Any) -> list[str]:
    """Root folders of a data set and of the data sets that it wraps."""
    own = [dataset.data_root] if getattr(dataset, "data_root", None) else []
    return own + [root for part in inner_data_sets(dataset) for root in data_roots(part)]
