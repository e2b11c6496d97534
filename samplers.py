"""Sampler that distributes a data set's indices across processes."""

from collections import Counter
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from sepvit_lib.common.randomness import SampleIndex, Stream, derived_seed

REPEATS = 3  # views of each image with repeated augmentation


@dataclass(eq=False)
class TrainBatchSampler(Sampler[list[SampleIndex]]):
    """Sampler of one process's batches. A step uses the same samples on any number of processes.

    An epoch is a shuffle of the data set. Each step takes the next `batch_size × batches_per_step` samples, where
    `batches_per_step = accum_steps × num_replicas`; an incomplete last step is dropped. Batch k takes every
    `batches_per_step`-th of the step's samples, starting from the k-th. Process r computes batches r,
    r + num_replicas, …, so four processes compute the same batches as two processes that accumulate two batches each.

    Repeated augmentation repeats each sample three times in a row in the shuffled order. Each repetition is augmented
    differently, and one step averages over these views (Hoffer et al., https://arxiv.org/abs/1901.09335; Touvron et
    al., https://arxiv.org/abs/2012.12877). From a data set of N images, an epoch takes ⌊N / 256⌋ · 256 samples, about
    as many as without repetition, so it uses only a third of the images.

    With labels, an epoch has as many samples as the data set, equally many of each class. The samples of a class are
    all drawn before any of them is drawn again.

    Args:
        dataset: anything with a length.
        batch_size: samples per batch.
        accum_steps: batches per process and step.
        num_replicas: number of processes.
        rank: index of this process.
        seed: seed of the shuffles, the same on all processes.
        repeated_augmentation: repeat each sample three times, and use a third of the images per epoch.
        labels: label of each sample, to draw all classes equally often; empty to draw every sample once.
    """

    dataset: Sized
    batch_size: int
    accum_steps: int = 1
    num_replicas: int = 1
    rank: int = 0
    seed: int = 0
    repeated_augmentation: bool = False
    labels: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.repeats = REPEATS if self.repeated_augmentation else 1
        self.set_epoch(0)

    @property
    def steps(self) -> int:
        """Number of steps in a whole epoch."""
        size = len(self.dataset) if self.repeats == 1 else len(self.dataset) // 256 * 256
        return size // (self.batch_size * self.accum_steps * self.num_replicas)

    def __len__(self) -> int:
        """Number of this process's batches in a whole epoch."""
        return self.steps * self.accum_steps

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        order = self.order()
        batches_per_step = self.accum_steps * self.num_replicas
        for step in range(self.start_step, self.steps):
            start = step * batches_per_step * self.batch_size
            for batch in range(self.rank, batches_per_step, self.num_replicas):
                positions = start + batch + batches_per_step * torch.arange(self.batch_size)
                indices = order[positions // self.repeats]
                yield [SampleIndex(self.epoch, *pair) for pair in zip(positions.tolist(), indices.tolist())]

    def order(self) -> Tensor:
        """Indices of the epoch's samples, shuffled."""
        generator = torch.Generator().manual_seed(derived_seed(Stream.SHUFFLE, self.seed, self.epoch))
        if len(self.labels) == 0:
            return torch.randperm(len(self.dataset), generator=generator)
        labels, parts = torch.as_tensor(self.labels), []
        sizes = labels.unique(return_counts=True)[1].tolist()
        for number, members in enumerate(labels.argsort(stable=True).split(sizes)):  # the indices of each class
            count = (len(self.dataset) + number) // len(sizes)  # sums to the size of the data set
            cycles = [members[torch.randperm(len(members), generator=generator)] for _ in range(0, count, len(members))]
            parts.append(torch.cat([*cycles, members[:0]])[:count])
        order = torch.cat(parts)
        return order[torch.randperm(len(order), generator=generator)]

    def label_counts(self) -> Counter[int]:
        """Number of samples of each label in a whole epoch, if there are labels."""
        size = self.steps * self.batch_size * self.accum_steps * self.num_replicas
        indices = self.order()[torch.arange(size) // self.repeats]
        return Counter(self.labels[index] for index in indices.tolist())

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Set the epoch, which determines the shuffle, and the step in the epoch to start from."""
        self.epoch = epoch
        self.start_step = start_step
