"""Samplers that deal the indices of a data set out to the processes."""

import math
from collections.abc import Iterator, Sized
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from utils import Stream, derived_seed

REPEATS = 3  # of repeated augmentation


class Draw(NamedTuple):
    """A sample to be drawn: its index in the data set, and the epoch and the place in it, which decide how it is
    augmented, whichever process and worker does so."""

    epoch: int
    place: int
    index: int


class TrainBatchSampler(Sampler[list[Draw]]):
    """Batches of one process, cut so that a step takes the same samples on any number of processes.

    An epoch is a shuffle of the data set. Each step of all processes together takes the next
    `batch_size × batches_per_step` samples of it; an incomplete last step is left out. Batch k of a step is every
    `batches_per_step`-th of its samples, from the k-th on; process r computes the batches r, r + processes, …. So four
    processes, and two that accumulate two batches, compute the same batches.

    With repeated augmentation each sample comes three times in a row of the shuffled order: different processes augment
    the same image differently, and average over these views in one step (Hoffer et al.,
    https://arxiv.org/abs/1901.09335; Touvron et al., https://arxiv.org/abs/2012.12877). An epoch is as long as one
    without repetition, ⌊N / 256⌋ · 256 samples, so it sees a third of the data set.

    Args:
        dataset: anything with a length.
        batch_size: samples a batch.
        accum_steps: batches of a process a step.
        num_replicas: number of processes.
        rank: this process.
        seed: of the shuffles; the same on all processes.
        repeated_augmentation: each sample three times, a third of the data set an epoch.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        accum_steps: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        repeated_augmentation: bool = False,
    ) -> None:
        self.dataset_size = len(dataset)
        self.batch_size = batch_size
        self.accum_steps = accum_steps
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.repeats = REPEATS if repeated_augmentation else 1
        self.epoch = 0
        self.start_step = 0

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        size = self.dataset_size if self.repeats == 1 else self.dataset_size // 256 * 256
        return size // (self.batch_size * self.accum_steps * self.num_replicas)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.steps * self.accum_steps

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(derived_seed(Stream.SHUFFLE, self.seed, self.epoch))
        order = torch.randperm(self.dataset_size, generator=generator)
        batches_per_step = self.accum_steps * self.num_replicas
        for step in range(self.start_step, self.steps):
            start = step * batches_per_step * self.batch_size
            for batch in range(self.rank, batches_per_step, self.num_replicas):
                places = start + batch + batches_per_step * torch.arange(self.batch_size)
                indices = order[places // self.repeats]
                yield [Draw(self.epoch, *draw) for draw in zip(places.tolist(), indices.tolist())]

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose an epoch's shuffle, and the step of it to begin with."""
        self.epoch = epoch
        self.start_step = start_step


class DistributedEvalSampler(Sampler[int]):
    """Every index once, on one process or another: unlike torch's DistributedSampler, none is repeated to fill up.

    The processes' shares differ by one sample at most; a share is empty where there are more processes than samples.

    Args:
        dataset: anything with a length.
        num_replicas: number of processes.
        rank: this process.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        self.dataset_size = len(dataset)
        self.num_replicas = num_replicas
        self.rank = rank

    def __len__(self) -> int:
        return max(0, math.ceil((self.dataset_size - self.rank) / self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.dataset_size, self.num_replicas))
