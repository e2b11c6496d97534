"""Data sets, transforms, loaders and samplers."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import timm
import torch
import torchvision.transforms as T
from conftest import ROOT, SMALL, SMALLEST, command, read_log, refusal, succeed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.readers import reader_wds
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR100

import main
from datasets import (
    INAT_CATEGORIES,
    LoaderSettings,
    build_train_loader,
    build_transform,
    build_val_loader,
    epoch_batches,
)
from samplers import DistributedEvalSampler, TrainBatchSampler
from sepvit_lib.training import readers, samples
from sepvit_lib.training.commands import run_command
from sepvit_lib.training.errors import UserError
from sepvit_lib.training.output import read_log as read_whole_log
from sepvit_lib.training.samples import INaturalist, fingerprint, read_sample

hypothesis_settings = hypothesis.settings(max_examples=200, deadline=None)


def settings(*arguments):
    return main.build_parser().parse_args([str(argument) for argument in arguments])


def transform(is_train, args):
    """The transform for a command's settings."""
    return build_transform(is_train, main.transform_settings(args))


def train_loader(args):
    """The training loader for a command's settings."""
    return build_train_loader(main.build_data(args, is_train=True), main.settings_from(args, LoaderSettings))


def val_loader(args):
    """The validation loader for a command's settings."""
    return build_val_loader(main.build_data(args, is_train=False), main.settings_from(args, LoaderSettings))


# ------------------------------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize("size", [1, 2, 5, 7, 64, 101])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_eval_sampler_yields_every_index_once(size, processes):
    shares = [list(DistributedEvalSampler(range(size), processes, rank)) for rank in range(processes)]
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert [len(share) for share in shares] == [
        len(DistributedEvalSampler(range(size), processes, rank)) for rank in range(processes)
    ]


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
    assert sorted(draw.place for draw in draws) == list(range(size // per_step * per_step))
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
    order = [draw.index for draw in sorted(draws, key=lambda draw: draw.place)]
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


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_only_on_seed_epoch_and_place(few_digits, workers):
    """Not on the loader workers, nor on the step at which the epoch starts."""
    args = settings(*SMALLEST, "--data-path", few_digits, "--num_workers", 0, "--epochs", 2)
    images = {}
    for epoch in (0, 1):
        loader = train_loader(args)
        images[epoch] = [batch[0] for batch in epoch_batches(loader, epoch, 0, 1, print)]
    args.num_workers = workers
    loader = train_loader(args)
    for epoch, step in ((1, 2), (0, 0), (1, 1)):
        again = [batch[0] for batch in epoch_batches(loader, epoch, step, 1, print)]
        assert len(again) == 3 - step
        assert all(torch.equal(a, b) for a, b in zip(again, images[epoch][step:]))
    assert not torch.equal(images[0][0], images[1][0])


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


# ----------------------------------------------------------------------------------------------------------- data sets


def test_imagenet_folder(few_digits, tmp_path):
    args = settings("--data-path", few_digits)
    data = main.build_data(args, is_train=True)
    assert (len(data.dataset), data.num_classes, data.classes) == (48, 3, ["0", "1", "2"])
    (tmp_path / "ILSVRC2012_img_train").symlink_to(few_digits / "train")
    (tmp_path / "ILSVRC2012_img_val").symlink_to(few_digits / "val")
    args = settings("--data-path", tmp_path)
    assert len(main.build_data(args, is_train=True).dataset) == 48
    assert len(main.build_data(args, is_train=False).dataset) == 21


def test_validation_batches_are_half_as_large_again(few_digits):
    args = settings(*SMALLEST, "--data-path", few_digits)
    loader = val_loader(args)
    assert [len(targets) for _, targets in loader] == [21]
    assert loader.batch_size == 24


def test_tar_archives(few_digits, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w", dereference=True) as archive:
            archive.add(few_digits / split, arcname=".")
    succeed(*SMALLEST, "--data-path", tmp_path, "--output_dir", tmp_path / "run")
    assert np.isfinite(read_log(tmp_path / "run")[0]["train_loss"])


def write_archive(folder: Path, path: Path) -> None:
    with tarfile.open(path, "w", dereference=True) as archive:
        archive.add(folder, arcname=".")


def members_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as archive:
        return archive.getmembers()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "how",
    ["truncated in an image", "truncated between images", "truncated in a header", "without its end", "junk inside"],
)
def test_damaged_archives_are_named(how, split, few_digits, tmp_path, capsys):
    """Python and timm take a damaged or missing header for the end of the archive."""
    for name in ("train", "val"):
        write_archive(few_digits / name, tmp_path / f"{name}.tar")
    path = tmp_path / f"{split}.tar"
    content, members = path.read_bytes(), members_of(path)
    middle = [member for member in members if member.isfile()][len(members) // 2]
    end = max(member.offset_data + -(-member.size // 512) * 512 for member in members)
    cuts = {
        "truncated in an image": middle.offset_data + 10,
        "truncated between images": middle.offset,
        "truncated in a header": middle.offset + 99,
        "without its end": end,
    }
    if how in cuts:
        path.write_bytes(content[: cuts[how]])
    else:
        path.write_bytes(content[: middle.offset] + b"junk" * 128 + content[middle.offset + 512 :])
    arguments = [*map(str, SMALLEST), "--data-path", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    assert main.run(arguments + (["--eval"] if split == "val" else [])) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"main.py: --data-path {path}: ")
    assert "damaged" in error
    assert error.count("\n") == 1
    assert not list((tmp_path).glob("run/*"))


def test_nested_archives_are_checked(few_digits, tmp_path):
    for label in "012":
        write_archive(few_digits / "val" / label, tmp_path / f"{label}.tar")
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        inner = tmp_path / "1.tar"
        if name == "broken":
            inner.write_bytes(inner.read_bytes()[: members_of(inner)[-2].offset])
        with tarfile.open(tmp_path / name / "val.tar", "w") as archive:
            for label in "012":
                archive.add(tmp_path / f"{label}.tar", arcname=f"{label}.tar")
    args = settings("--data-path", tmp_path / "whole", "--input-size", 32)
    data = main.build_data(args, is_train=False)
    assert (len(data.dataset), data.classes) == (21, ["0", "1", "2"])
    for index, (name, label) in enumerate(data.dataset.samples):
        assert data.dataset.read(index) == (few_digits / "val" / str(label) / name).read_bytes()
    with pytest.raises(UserError, match=r"broken/val\.tar: .*damaged"):
        main.build_data(settings("--data-path", tmp_path / "broken", "--input-size", 32), is_train=False)


def test_archives_number_classes_as_folders_do(tmp_path):
    for label in ("10", "2", "1"):
        (tmp_path / "x" / label).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "x" / label / "a.png")
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(tmp_path / "x", arcname=".")
    data = main.build_data(settings("--data-path", tmp_path, "--input-size", 32), is_train=False)
    assert data.classes == ["1", "10", "2"]
    assert [target for _, target in data.dataset.samples] == [0, 2, 1]  # in natural order
    assert [read_sample(data.dataset, index, ())[1] for index in range(3)] == [0, 2, 1]


def test_fingerprints_tell_archives_apart(tmp_path, monkeypatch):
    found = []
    for name in ("a", "a", "b"):
        folder = tmp_path / str(len(found))
        for label in "01":
            (folder / "x" / label).mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "x" / label / f"{name}.png")
        with tarfile.open(folder / "val.tar", "w") as archive:
            archive.add(folder / "x", arcname=".")
        found.append(fingerprint(main.build_data(settings("--data-path", folder), is_train=False)))
    assert found[0] == found[1] != found[2]
    monkeypatch.chdir(tmp_path / "0")
    assert fingerprint(main.build_data(settings("--data-path", "."), is_train=False)) == found[0]


def test_hugging_face_data_set(few_digits, tmp_path):
    """Hugging Face's library and a module of this repository are both called `datasets`. Both are found."""
    printed = succeed(
        *SMALLEST,
        "--data-set",
        f"hfds/{few_digits}",
        "--data-path",
        tmp_path / "cache",
        "--num-classes",
        3,
        "--output_dir",
        tmp_path / "run",
        environment={"HF_HUB_OFFLINE": "1"},
    )
    assert "21 images" in printed


@pytest.mark.parametrize("reader", ["hfds", *(pytest.param(name, marks=pytest.mark.slow) for name in ("imnet", "wds"))])
def test_spawned_workers(reader, few_digits, webdataset, tmp_path):
    """As on macOS and Windows, workers unpickle what they are sent, even where `datasets` is Hugging Face's library."""
    script = tmp_path / "spawned.py"
    script.write_text(
        "import multiprocessing, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import main\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn', force=True)\n"
        "    sys.exit(main.run())\n"
    )
    data = dict(
        hfds=["--data-set", f"hfds/{few_digits}", "--data-path", tmp_path / "cache", "--num-classes", 3],
        imnet=["--data-path", few_digits],
        wds=[*WEBDATASET, "--data-path", webdataset],
    )[reader]
    result = subprocess.run(
        [sys.executable, script, *map(str, [*SMALL, *data]), "--num_workers", "1", "--eval"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert f"{31 if reader == 'wds' else 21} images" in result.stdout


def inat_folder(root, with_kingdom: bool):
    categories = [
        dict(zip(INAT_CATEGORIES, (k, p, "c", "o", s, f, "g", n)))
        for k, p, f, s, n in (
            ("Plantae", "P1", "F1", "S1", "b"),
            ("Plantae", "P1", "F2", "S1", "a"),
            ("Animalia", "P2", "F3", "S2", "c"),
        )
    ]
    (root / "categories.json").write_text(json.dumps(categories))
    for split, labels in (("train", [2, 0, 1, 0]), ("val", [1, 2])):
        images, annotations = [], []
        for i, label in enumerate(labels):
            kingdom = categories[label]["kingdom"]
            name = f"{split}_val2018/{kingdom}/{label}/{i}.jpg"
            images.append({"id": i, "file_name": name})
            annotations.append({"image_id": i, "category_id": label})
            path = root / (name if with_kingdom else f"{split}_val2018/{label}/{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        (root / f"{split}2018.json").write_text(json.dumps({"images": images, "annotations": annotations}))


@pytest.mark.parametrize("with_kingdom", [True, False])
def test_inaturalist(with_kingdom, tmp_path):
    inat_folder(tmp_path, with_kingdom)
    train, val = (INaturalist(tmp_path, is_train, 2018, "name") for is_train in (True, False))
    assert train.classes == val.classes == ["c", "b", "a"]  # in order of appearance in the training annotations
    assert [target for _, target in train.samples] == [0, 1, 2, 1]
    assert [target for _, target in val.samples] == [2, 0]
    assert read_sample(train, 3, ())[0].size == (8, 8)
    assert INaturalist(tmp_path, True, 2018, "kingdom").classes == ["Animalia", "Plantae"]
    data = main.build_data(
        settings("--data-path", tmp_path, "--data-set", "INAT", "--inat-category", "family"), is_train=True
    )
    assert data.num_classes == 3
    printed = succeed(*SMALLEST, "--data-set", "INAT", "--data-path", tmp_path, "--throughput", "--batch-size", 1)
    assert "batch size 1" in printed


def test_inaturalist_without_its_files(tmp_path):
    with pytest.raises(UserError, match=r"categories\.json"):
        INaturalist(tmp_path, True, 2019, "name")


def test_cifar(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (6, 3072), dtype=np.uint8)
    files = {
        "train": {"data": pixels, "fine_labels": [0, 1, 99, 3, 4, 5]},
        "test": {"data": pixels[:2], "fine_labels": [7, 8]},
        "meta": {"fine_label_names": [str(i) for i in range(100)]},
    }
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    args = settings("--data-path", tmp_path, "--data-set", "CIFAR", "--input-size", 32)
    train, val = main.build_data(args, is_train=True), main.build_data(args, is_train=False)
    assert (len(train.dataset), train.num_classes, len(val.dataset)) == (6, 100, 2)
    image, target = train.dataset[2]
    assert (train.transform(image).shape, target) == ((3, 32, 32), 99)


@pytest.fixture(scope="module")
def webdataset(digits, tmp_path_factory):
    """The digits as webdataset shards: 4 for training with 48 images, 3 for validation with 31."""
    root = tmp_path_factory.mktemp("wds")
    for split, shards, count in (("train", 4, 48), ("val", 3, 31)):
        paths = sorted((digits / split).glob("[012]/*.png"), key=lambda path: path.name)[:count]
        for shard in range(shards):
            with tarfile.open(root / f"digits-{split}-{shard}.tar", "w") as archive:
                for path in paths[shard::shards]:
                    for name, content in (
                        (f"{path.stem}.png", path.read_bytes()),
                        (f"{path.stem}.cls", path.parent.name.encode()),
                    ):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
    return root


WEBDATASET = [
    "--data-set",
    "wds/digits",
    "--train-split",
    "digits-train-{0..3}.tar|48",
    "--val-split",
    "digits-val-{0..2}.tar|31",
    "--num-classes",
    3,
]


@pytest.mark.parametrize("processes", [0, 2])
def test_webdataset_trains_and_counts_every_image_once(webdataset, tmp_path, processes):
    printed = succeed(
        *SMALLEST,
        *WEBDATASET,
        "--data-path",
        webdataset,
        "--output_dir",
        tmp_path / "run",
        "--batch-size",
        8,
        "--num_workers",
        2,
        "--dist-eval",
        "--device",
        "cpu",
        processes=processes,
    )
    assert "31 images" in printed
    assert np.isfinite(read_log(tmp_path / "run")[0]["train_loss"])


def test_webdataset_complete_epoch_has_no_batches_left(webdataset):
    """The last step is smaller: it takes the remaining batches."""
    args = settings(*SMALLEST, *WEBDATASET, "--data-path", webdataset, "--batch-size", 8, "--accum-steps", 4)
    loader = train_loader(args)
    assert len(loader) == 6
    assert list(epoch_batches(loader, 0, 2, 4, print)) == []


def test_webdataset_resumes_bit_for_bit(webdataset, tmp_path):
    """From the middle of the second epoch, with readers that never read the first one."""
    arguments = [
        *SMALLEST,
        *WEBDATASET,
        "--data-path",
        webdataset,
        "--batch-size",
        8,
        "--epochs",
        2,
        "--num_workers",
        2,
        "--auto-resume",
        "--checkpoint-every",
        4,
        "--keep-checkpoints",
        9,
    ]
    succeed(*arguments, "--output_dir", tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert names == [f"checkpoint-{steps:08}.pth" for steps in (4, 6, 8, 12)]
    other = tmp_path / "continued"
    other.mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-00000008.pth", other)
    result = command(*arguments, "--num_workers", 1, "--output_dir", other)
    assert result.returncode == 2
    assert "which 1 processes read with 2 workers each, not 1 with 1; use as many" in result.stderr
    succeed(*arguments, "--output_dir", other)
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (tmp_path / "whole", other))
    assert a["epoch"] == b["epoch"] == 1
    assert all(torch.equal(a["model"][name], value) for name, value in b["model"].items())


def test_webdataset_accuracy_is_the_same_on_any_number_of_processes(webdataset, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("SepViT_Lite", img_size=32, num_classes=3).state_dict(), weights)
    arguments = [*SMALL, *WEBDATASET, "--data-path", webdataset, "--eval", "--resume", weights, "--dist-eval"]
    lines = [succeed(*arguments, processes=n).splitlines()[-1] for n in (0, 2, 3)]
    assert len({line.split(", loss")[0] for line in lines}) == 1
    assert all(line.endswith("31 images") for line in lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_outage_in_validation(workers, few_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samples, "PAUSES", ())
    shutil.copytree(few_digits, tmp_path / "data")
    args = settings("--data-path", tmp_path / "data", "--input-size", 32, "--num_workers", workers)
    loader = val_loader(args)
    (tmp_path / "data").rename(tmp_path / "away")
    assert run_command("main.py", lambda: list(loader)) == 75
    message = capsys.readouterr().err
    assert re.fullmatch(
        r"main\.py: process 0: image \S+: cannot be read \(FileNotFoundError: .*\); run the same "
        r"command again\n",
        message,
    )


def test_webdataset_with_an_unreadable_image(webdataset, tmp_path):
    for shard in webdataset.iterdir():
        content = shard.read_bytes()
        broken = "train-2" in shard.name or "val-1" in shard.name
        first = content.index(b"\x89PNG")
        (tmp_path / shard.name).write_bytes(content[:first] + b"no image" + content[first + 8 :] if broken else content)
    name = f"{tmp_path}/digits-train-2.tar: "
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", tmp_path, "--batch-size", 8, "--num_workers", 2]
    whole_val = ["--val-split", "digits-val-{0..0}.tar|11"]
    for policy, status in (("skip", 0), ("fail", 2)):
        result = command(*arguments, *whole_val, "--on-bad-image", policy, "--output_dir", tmp_path / policy)
        assert result.returncode == status, result.stderr
        events = [entry for entry in read_whole_log(tmp_path / policy / "log.txt") if "unreadable_image" in entry]
        assert len(events) == 1
        assert events[0]["unreadable_image"].startswith(name)
    assert read_log(tmp_path / "skip")[0]["unreadable_images"] == 1
    assert "UnidentifiedImageError" in events[0]["reason"]
    assert "--on-bad-image fail: 1 of 48 training images are unreadable" in result.stderr
    assert f"{events[0]['unreadable_image']} ({events[0]['reason']})" in result.stderr
    result = command(*arguments, "--eval")
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(f"main.py: image {tmp_path}/digits-val-1.tar: ")
    assert "cannot be read (UnidentifiedImageError" in line


@pytest.mark.parametrize(("label", "reason"), [(b"9", "labelled 9"), (b"cat", "invalid literal")])
@pytest.mark.parametrize("loader", ["faithful", "fast"])
def test_webdataset_with_labels_that_are_no_classes(label, reason, loader, webdataset, tmp_path, capsys):
    """The line that ends the run says what is wrong with them."""
    for shard in webdataset.glob("*train*"):
        with tarfile.open(shard) as archive, tarfile.open(tmp_path / shard.name, "w") as copy:
            for member in archive:
                content = label if member.name.endswith(".cls") else archive.extractfile(member).read()
                member.size = len(content)
                copy.addfile(member, io.BytesIO(content))
    for shard in webdataset.glob("*val*"):
        shutil.copy(shard, tmp_path)
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", tmp_path, "--loader", loader, "--output_dir", tmp_path / "run"]
    assert reason in refusal(main.run, "main", arguments, capsys)


def write_shard(path: Path, names: list[str]) -> None:
    """Write a shard of blank images, and labels that count from 0."""
    blank = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blank, "PNG")
    with tarfile.open(path, "w") as archive:
        for name in names:
            content = b"0" if name.endswith(".cls") else blank.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a.png", "a.cls", "b.png", "b.cls"], ["a", "b"]),
        (["a.v1.cls", "a.v1.png", "a.v2.cls", "a.v2.png", "b.png", "b.cls"], ["a.v1", "a.v2", "b"]),
        (["IMG.1.png", "IMG.2.png", "IMG.1.cls", "IMG.2.cls"], ["IMG.1", "IMG.2"]),
        (["x.y/a.png", "x.y/a.cls"], ["x.y/a"]),
        (["a.png", "a.cls", "a.seg.png", "a.meta.json"], ["a"]),  # parts of one sample, by webdataset's convention
    ],
)
def test_dots_in_names_of_a_webdataset(names, keys, tmp_path):
    write_shard(tmp_path / "x.tar", names)
    samples = list(readers._samples_of_shard(str(tmp_path / "x.tar")))
    assert [sample["__key__"] for sample in samples] == keys
    assert all({"png", "cls"} <= sample.keys() for sample in samples)


def test_ambiguous_dots_in_names_of_a_webdataset_are_named(tmp_path, capsys):
    """The second image would not be read."""
    write_shard(tmp_path / "x.tar", ["a.png", "a.cls", "a.v2.png", "a.v2.cls"])
    arguments = [
        *SMALLEST,
        "--data-set",
        "wds/x",
        "--data-path",
        tmp_path,
        "--num-classes",
        2,
        "--val-split",
        "x.tar|2",
    ]
    assert "a.v2.cls" in refusal(main.run, "main", [*arguments, "--eval"], capsys)


def damaged_shard(webdataset: Path, folder: Path, name: str, how: str) -> Path:
    """Copy the shards and damage one of them. Return its path."""
    shutil.copytree(webdataset, folder)
    path = folder / name
    content, members = path.read_bytes(), members_of(path)
    damaged = {
        "junk": b"junk" * 2000,
        "empty": b"",
        "truncated in an image": content[: members[4].offset_data + 9],
        "truncated between images": content[: members[4].offset],
        "truncated within a sample": content[: members[5].offset],
        "without its end": content[: members[-1].offset_data + 512],
    }
    path.write_bytes(damaged[how])
    return path


SHARD_DAMAGES = [
    "junk",
    "empty",
    "truncated in an image",
    "truncated between images",
    "truncated within a sample",
    "without its end",
]


@pytest.mark.parametrize("how", SHARD_DAMAGES)
def test_damaged_shards_are_named_in_evaluation(how, webdataset, tmp_path, capsys):
    path = damaged_shard(webdataset, tmp_path / "data", "digits-val-1.tar", how)
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", tmp_path / "data", "--eval"]
    assert main.run([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"main.py: shard {path}: cannot be read (ReadError: ")
    assert captured.err.count("\n") == 1
    assert "images" not in captured.out  # no accuracy on some of the images


@pytest.mark.parametrize("how", ["junk", "truncated within a sample"])
@pytest.mark.parametrize(("policy", "status"), [("skip", 0), ("fail", 2)])
def test_damaged_shards_count_in_training(how, policy, status, webdataset, tmp_path, capsys):
    """Each counts as one unreadable image. A partial sample at its end is not counted."""
    path = damaged_shard(webdataset, tmp_path / "data", "digits-train-2.tar", how)
    arguments = [
        *SMALLEST,
        *WEBDATASET,
        "--data-path",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "run",
        "--on-bad-image",
        policy,
        "--batch-size",
        8,
    ]
    assert main.run([str(argument) for argument in arguments]) == status
    log = read_whole_log(tmp_path / "run/log.txt")
    assert [entry["unreadable_image"] for entry in log if "unreadable_image" in entry] == [str(path)]
    if policy == "skip":
        assert read_log(tmp_path / "run")[0]["unreadable_images"] == 1
    else:
        assert (
            f"--on-bad-image fail: 1 of 48 training images are unreadable (limit 0), e.g. {path}"
            in capsys.readouterr().err
        )


def test_a_damaged_shard_as_a_command(webdataset, tmp_path):
    path = damaged_shard(webdataset, tmp_path / "data", "digits-val-1.tar", "truncated between images")
    result = command(*SMALLEST, *WEBDATASET, "--data-path", tmp_path / "data", "--eval", "--num_workers", 2)
    assert result.returncode == 2
    assert result.stderr.startswith(f"main.py: shard {path}: ")
    assert result.stderr.count("\n") == 1


def test_unknown_timm_pipelines_are_refused(webdataset, monkeypatch):
    """timm's own stages skip unreadable samples, so a pipeline whose stages cannot be replaced is refused."""
    args = settings(*SMALLEST, *WEBDATASET, "--data-path", webdataset)
    loader = val_loader(args)
    assert sum(len(targets) for _, targets in loader) == 31
    for other in ("_decode", "wds"):
        with monkeypatch.context() as another_version:
            if other == "wds":
                another_version.setattr(reader_wds.wds, "tarfile_to_samples", lambda **_: lambda stream: iter(()))
            else:
                another_version.setattr(reader_wds, "partial", lambda function, **_: lambda sample: function(sample))
            with pytest.raises(UserError, match="reads webdatasets differently from the versions supported"):
                list(val_loader(args))


def test_webdataset_mistakes(webdataset):
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", webdataset]
    assert "4 training shards" in command(*arguments, "--num_workers", 5).stderr
    unnumbered = [argument for argument in arguments if argument not in ("--num-classes", 3)]
    assert "--num-classes" in command(*unnumbered).stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_out_of_range_are_refused(webdataset, workers):
    arguments = [2 if argument == 3 else argument for argument in WEBDATASET]
    result = command(*SMALLEST, *arguments, "--data-path", webdataset, "--eval", "--num_workers", workers)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("main.py: ")]
    assert lines == ["main.py: --num-classes 2: an image is labelled 2; labels start at 0"]
    assert "Traceback" not in result.stderr


def test_loader_settings(few_digits):
    args = settings(*SMALLEST, "--data-path", few_digits, "--num_workers", 2)
    loader = train_loader(args)
    assert isinstance(loader, DataLoader)
    assert loader.num_workers == 2
    args = settings(*SMALLEST, "--data-path", few_digits, "--num_workers", 0, "--batch-size", 20, "--mixup", 0)
    assert len(train_loader(args)) == 2  # 48 = 2 · 20 + 8
