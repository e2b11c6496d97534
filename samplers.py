"""Samplers that deal the indices of a data set out to the processes."""

import math
from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class RepeatedAugmentationSampler(Sampler[int]):
    """Repeated augmentation: each sample several times in a row of the shuffled order, dealt out in turn.

    So different processes augment the same image differently, and average over these views in one step (Hoffer et al.,
    https://arxiv.org/abs/1901.09335; Touvron et al., https://arxiv.org/abs/2012.12877). An epoch is as long as one
    without repetition: ⌊N / 256⌋ · 256 / processes samples a process, so it sees a third of the data set.

    Args:
        dataset: anything with a length.
        num_replicas: number of processes.
        rank: this process.
        seed: of the shuffles; the same on all processes.
        repeats: how many times each sample comes.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int, seed: int = 0, repeats: int = 3) -> None:
        self.dataset_size = len(dataset)
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0

    def __len__(self) -> int:
        return self.dataset_size // 256 * 256 // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        indices = torch.randperm(self.dataset_size, generator=generator)
        # every process takes each num_replicas-th of the repeated order: no more of it than len(self) is ever used
        positions = torch.arange(self.rank, self.dataset_size * self.repeats, self.num_replicas)[: len(self)]
        return iter(indices[positions // self.repeats].tolist())

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of an epoch."""
        self.epoch = epoch


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
