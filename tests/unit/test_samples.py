"""Samplers, transforms, and what a sample's augmentation depends on."""

from functools import partial

import hypothesis
import numpy as np
import pytest
import torch
import torchvision.transforms as T
from conftest import SMALLEST, differences
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

import datasets
import main
from datasets import LoaderSettings, build_train_loader, build_transform, build_val_loader, epoch_batches
from samplers import TrainBatchSampler

hypothesis_settings = hypothesis.settings(max_examples=200, deadline=None)


def settings(*arguments):
    return main.build_parser().parse_args([str(argument) for argument in arguments])


def transform(is_train, args):
    """The transform for a command's settings."""
    return build_transform(is_train, main.transform_settings(args))


def train_loader(args):
    """The training loader for a command's settings."""
    return build_train_loader(main.build_data(args, is_train=True), main.settings_from(args, LoaderSettings))


# ------------------------------------------------------------------------------------------------------------ samplers


def test_processes_share_the_validation_images(few_digits, monkeypatch):
    """Each image is loaded once, even by more processes than there are images."""
    args = settings(*SMALLEST, "--data-path", few_digits, "--dist-eval", "--num_workers", 0)
    data = main.build_data(args, is_train=False)
    for processes in (1, 2, 5, len(data) + 1):
        loaded = []
        for rank in range(processes):
            monkeypatch.setattr(datasets, "get_world_size", partial(int, processes))
            monkeypatch.setattr(datasets, "get_rank", partial(int, rank))
            batches = build_val_loader(data, main.settings_from(args, LoaderSettings)).batch_sampler
            loaded += [index for batch in batches for index in batch]
        assert sorted(loaded) == list(range(len(data)))


def epoch_of(size, batch_size, accum_steps, processes, epoch=0, start_step=0, **kwargs):
    """All ranks' draws in an epoch: a list of steps, each a list of its batches over all ranks."""
    samplers = [
        TrainBatchSampler(range(size), batch_size, accum_steps, processes, rank, seed=1, **kwargs)
        for rank in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch, start_step)
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0]) - start_step * accum_steps}
    steps = [range(first, first + accum_steps) for first in range(0, len(shares[0]), accum_steps)]
    return [[share[batch] for batch in step for share in shares] for step in steps]


@hypothesis_settings
@given(
    size=st.integers(1, 300),
    batch_size=st.integers(1, 9),
    processes=st.integers(1, 6),
    accum_steps=st.integers(1, 4),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_train_sampler_yields_every_index_once(size, batch_size, processes, accum_steps, epoch, data):
    """For any data-set size, number of processes and resume point. The last, incomplete step is dropped."""
    whole = epoch_of(size, batch_size, accum_steps, processes, epoch)
    draws = [draw for step in whole for batch in step for draw in batch]
    per_step = batch_size * accum_steps * processes
    assert sorted(draw.position for draw in draws) == list(range(size // per_step * per_step))
    assert len({draw.index for draw in draws}) == len(draws)
    if size % per_step == 0:
        assert {draw.index for draw in draws} == set(range(size))
    start = data.draw(st.integers(0, len(whole)))
    assert epoch_of(size, batch_size, accum_steps, processes, epoch, start) == whole[start:]
    # another number of processes with as many batches per step draws the same batches
    others = data.draw(st.sampled_from([n for n in range(1, 25) if accum_steps * processes % n == 0]))
    shared = epoch_of(size, batch_size, accum_steps * processes // others, others, epoch, start)
    assert shared == whole[start:]


@hypothesis_settings
@given(size=st.integers(256, 1500), batch_size=st.integers(1, 64), processes=st.integers(1, 4))
def test_repeated_augmentation(size, batch_size, processes):
    draws = [
        draw
        for step in epoch_of(size, batch_size, 1, processes, repeated_augmentation=True)
        for batch in step
        for draw in batch
    ]
    per_step = batch_size * processes
    assert len(draws) == size // 256 * 256 // per_step * per_step
    order = [draw.index for draw in sorted(draws, key=lambda draw: draw.position)]
    groups = [order[i : i + 3] for i in range(0, len(order) - 2, 3)]
    assert all(len(set(group)) == 1 for group in groups)  # each sample three times in a row,
    assert len({group[0] for group in groups}) == len(groups)  # and only there


def test_repeated_augmentation_shows_an_image_to_several_processes():
    (step, *_) = epoch_of(256, 4, 1, 4, repeated_augmentation=True)
    assert len({batch[0].index for batch in step[:3]}) == 1


def test_train_loader_shuffles_by_epoch(few_digits):
    args = settings(*SMALLEST, "--data-path", few_digits)
    loader = train_loader(args)
    orders = []
    for epoch in (0, 1, 0):
        epoch_batches(loader, epoch, 0, 1, print)
        orders.append([draw.index for batch in loader.batch_sampler for draw in batch])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(48))


@pytest.mark.parametrize("loader", ["faithful", "fast"])
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_only_on_seed_epoch_and_position(few_digits, workers, loader):
    """Not on the loader workers, nor on the step at which the epoch starts."""
    args = settings(*SMALLEST, "--data-path", few_digits, "--input-size", 40, "--loader", loader)
    expected = [[batch[0] for batch in epoch_batches(train_loader(args), epoch, 0, 1, print)] for epoch in (0, 1)]
    args.num_workers = workers
    again = train_loader(args)
    for epoch, step in ((1, 2), (0, 0), (1, 1)):
        images = [batch[0] for batch in epoch_batches(again, epoch, step, 1, print)]
        assert not differences(images, expected[epoch][step:])
    assert not torch.equal(expected[0][0], expected[1][0])


def test_batches(few_digits):
    """An incomplete training batch is dropped. Validation batches are half as large again."""
    args = settings(*SMALLEST, "--data-path", few_digits, "--batch-size", 20, "--mixup", 0, "--num_workers", 2)
    assert (len(train_loader(args)), train_loader(args).num_workers) == (2, 2)  # 48 = 2 · 20 + 8
    args = settings(*SMALLEST, "--data-path", few_digits)
    loader = build_val_loader(main.build_data(args, is_train=False), main.settings_from(args, LoaderSettings))
    assert [len(targets) for _, targets in loader] == [21]
    assert loader.batch_size == 24


# ---------------------------------------------------------------------------------------------------------- transforms


def test_training_transform():
    steps = transform(True, settings()).transforms
    assert isinstance(steps[0], RandomResizedCropAndInterpolation)
    assert [type(step).__name__ for step in steps[1:]] == [
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    assert steps[-1].probability == 0.25
    small = transform(True, settings("--input-size", 32)).transforms
    assert isinstance(small[0], T.RandomCrop)
    assert small[0].padding == 4


def test_evaluation_transform():
    published = T.Compose(
        [
            T.Resize(256, T.InterpolationMode.BICUBIC),
            T.CenterCrop(224),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 500, 3), np.uint8))
    assert torch.equal(transform(False, settings())(image), published(image))
    output = transform(False, settings("--input-size", 96))(image)
    assert output.shape == (3, 96, 96)
