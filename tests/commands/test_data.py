"""Data sets: folders, archives, CIFAR-100, iNaturalist, webdatasets and Hugging Face's."""

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

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SMALL, SMALLEST, command, differences, read_log, refusal, succeed
from PIL import Image
from timm.data.readers import reader_wds
from torchvision.datasets import CIFAR100

import main
from datasets import INAT_CATEGORIES, LoaderSettings, build_train_loader, build_val_loader, epoch_batches
from sepvit_lib.common.command_line import run_command
from sepvit_lib.common.errors import UserError
from sepvit_lib.pipeline import readers, samples
from sepvit_lib.pipeline.data_sets.inaturalist import INaturalist
from sepvit_lib.pipeline.samples import fingerprint, read_sample
from sepvit_lib.run.output import read_log as read_whole_log


def settings(*arguments):
    return main.build_parser().parse_args([str(argument) for argument in arguments])


def data_of(folder, *arguments, is_train=False):
    return main.build_data(settings("--data-path", folder, "--input-size", 32, *arguments), is_train)


def val_loader(args):
    """The validation loader for a command's settings."""
    return build_val_loader(main.build_data(args, is_train=False), main.settings_from(args, LoaderSettings))


def run(*arguments) -> int:
    """Run main.py in this process."""
    return main.run([str(argument) for argument in arguments])


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def members_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as archive:
        return archive.getmembers()


def blank() -> bytes:
    """A PNG."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ folders and archives


def test_imagenet_folder(few_digits, tmp_path):
    data = data_of(few_digits, is_train=True)
    assert (len(data.dataset), data.num_classes, data.classes) == (48, 3, ["0", "1", "2"])
    (tmp_path / "ILSVRC2012_img_train").symlink_to(few_digits / "train")
    (tmp_path / "ILSVRC2012_img_val").symlink_to(few_digits / "val")
    assert [len(data_of(tmp_path, is_train=is_train)) for is_train in (True, False)] == [48, 21]


def test_tar_archives(few_digits, tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}.tar", files_in(few_digits / split))
    assert run(*SMALLEST, "--data-path", tmp_path, "--output_dir", tmp_path / "run") == 0
    assert np.isfinite(read_log(tmp_path / "run")[0]["train_loss"])


DAMAGES = ["truncated in an image", "truncated between images", "truncated in a header", "no end", "junk inside"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_archives_are_named(how, few_digits, tmp_path, capsys):
    """Python and timm take a damaged or missing header for the end of the archive."""
    for name in ("train", "val"):
        write_tar(tmp_path / f"{name}.tar", files_in(few_digits / name))
    split = "train" if DAMAGES.index(how) < 2 else "val"
    path = tmp_path / f"{split}.tar"
    content, members = path.read_bytes(), members_of(path)
    middle, last = members[len(members) // 2], members[-1]
    damaged = {
        "truncated in an image": content[: middle.offset_data + 10],
        "truncated between images": content[: middle.offset],
        "truncated in a header": content[: middle.offset + 99],
        "no end": content[: last.offset_data + -(-last.size // 512) * 512],
        "junk inside": content[: middle.offset] + b"junk" * 128 + content[middle.offset + 512 :],
    }
    path.write_bytes(damaged[how])
    arguments = [*SMALLEST, "--data-path", tmp_path, "--output_dir", tmp_path / "run"]
    line = refusal(main.run, "main", arguments + (["--eval"] if split == "val" else []), capsys)
    assert line.startswith(f"main.py: --data-path {path}: ")
    assert "damaged" in line
    assert not list(tmp_path.glob("run/*"))


def test_nested_archives_are_checked(few_digits, tmp_path):
    """An archive for each class, inside val.tar."""
    inner = {}
    for label in "012":
        write_tar(tmp_path / "x.tar", files_in(few_digits / "val" / label))
        inner[f"{label}.tar"] = (tmp_path / "x.tar").read_bytes()
    write_tar(tmp_path / "val.tar", inner)
    data = data_of(tmp_path)
    assert (len(data.dataset), data.classes) == (21, ["0", "1", "2"])
    for index, (name, label) in enumerate(data.dataset.samples):
        assert data.dataset.encoded(index)[0] == (few_digits / "val" / str(label) / name).read_bytes()
    write_tar(tmp_path / "val.tar", inner | {"1.tar": inner["1.tar"][: members_of(tmp_path / "x.tar")[-2].offset]})
    with pytest.raises(UserError, match=r"val\.tar: .*damaged"):
        data_of(tmp_path)


def test_archives_number_classes_as_folders_do(tmp_path):
    write_tar(tmp_path / "val.tar", {f"{label}/a.png": blank() for label in ("10", "2", "1")})
    data = data_of(tmp_path)
    assert data.classes == ["1", "10", "2"]
    assert [target for _, target in data.dataset.samples] == [0, 2, 1]  # in natural order
    assert [read_sample(data.dataset, index, ())[1] for index in range(3)] == [0, 2, 1]


def test_fingerprints_differ_by_the_names_in_archives(tmp_path, monkeypatch):
    found = []
    for number, name in enumerate("aab"):
        (tmp_path / str(number)).mkdir()
        write_tar(tmp_path / str(number) / "val.tar", {f"{label}/{name}.png": blank() for label in "01"})
        found.append(fingerprint(data_of(tmp_path / str(number))))
    assert found[0] == found[1] != found[2]
    monkeypatch.chdir(tmp_path / "0")
    assert fingerprint(data_of(".")) == found[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_outage_in_validation(workers, few_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samples, "PAUSES", ())
    shutil.copytree(few_digits, tmp_path / "data")
    loader = val_loader(settings("--data-path", tmp_path / "data", "--input-size", 32, "--num_workers", workers))
    (tmp_path / "data").rename(tmp_path / "away")
    assert run_command("main.py", lambda: list(loader)) == 75
    expected = r"main\.py: process 0: image \S+: cannot be read \(FileNotFoundError: .*\); run the same command again\n"
    assert re.fullmatch(expected, capsys.readouterr().err)


# --------------------------------------------------------------------------------------------- iNaturalist and CIFAR


def inat_folder(root, with_kingdom: bool):
    rows = ("Plantae P1 c o S1 F1 g b", "Plantae P1 c o S1 F2 g a", "Animalia P2 c o S2 F3 g c")
    categories = [dict(zip(INAT_CATEGORIES, row.split())) for row in rows]
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
    assert data_of(tmp_path, "--data-set", "INAT", "--inat-category", "family").num_classes == 3
    with pytest.raises(UserError, match=r"train2019\.json"):
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
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        if name == "meta":
            monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5})
        else:
            monkeypatch.setattr(CIFAR100, f"{name}_list", [[name, md5]])
    train, val = (data_of(tmp_path, "--data-set", "CIFAR", is_train=is_train) for is_train in (True, False))
    assert (len(train.dataset), train.num_classes, len(val.dataset)) == (6, 100, 2)
    image, target = train.dataset.encoded(2)
    assert (train.transform(image).shape, target) == ((3, 32, 32), 99)


# --------------------------------------------------------------------------------------------------------- webdatasets

SHARDS = "--train-split digits-train-{0..3}.tar|48 --val-split digits-val-{0..2}.tar|31"
WEBDATASET = f"--data-set wds/digits {SHARDS} --num-classes 3".split()


@pytest.fixture(scope="module")
def webdataset(digits, tmp_path_factory):
    """The digits as webdataset shards: 4 for training with 48 images, 3 for validation with 31."""
    root = tmp_path_factory.mktemp("wds")
    for split, shards, count in (("train", 4, 48), ("val", 3, 31)):
        paths = sorted((digits / split).glob("[012]/*.png"), key=lambda path: path.name)[:count]
        for shard in range(shards):
            files: dict[str, bytes] = {}
            for path in paths[shard::shards]:
                files |= {f"{path.stem}.png": path.read_bytes(), f"{path.stem}.cls": path.parent.name.encode()}
            write_tar(root / f"digits-{split}-{shard}.tar", files)
    return root


def test_webdataset_trains_and_counts_every_image_once(webdataset, tmp_path):
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", webdataset, "--output_dir", tmp_path / "run"]
    more = "--batch-size 8 --num_workers 2 --dist-eval --device cpu".split()
    assert "31 images" in succeed(*arguments, *more, processes=2)
    assert np.isfinite(read_log(tmp_path / "run")[0]["train_loss"])


def test_webdataset_accuracy_is_the_same_on_any_number_of_processes(webdataset, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model(SMALLEST[1], img_size=32, num_classes=3).state_dict(), weights)
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", webdataset, "--eval", "--resume", weights, "--dist-eval"]
    lines = [succeed(*arguments, processes=n).splitlines()[-1] for n in (0, 2)]
    assert len({line.split(", loss")[0] for line in lines}) == 1
    assert all(line.endswith("31 images") for line in lines)


def test_webdataset_complete_epoch_has_no_batches_left(webdataset):
    """The last step is smaller: it takes the remaining batches."""
    args = settings(*SMALLEST, *WEBDATASET, "--data-path", webdataset, "--batch-size", 8, "--accum-steps", 4)
    loader = build_train_loader(main.build_data(args, is_train=True), main.settings_from(args, LoaderSettings))
    assert len(loader) == 6
    assert list(epoch_batches(loader, 0, 2, 4, print)) == []


def test_webdataset_resumes_bit_for_bit(webdataset, tmp_path, capsys):
    """From the middle of the second epoch, with readers that never read the first one."""
    flags = "--batch-size 8 --epochs 2 --num_workers 2 --auto-resume --checkpoint-every 4 --keep-checkpoints 9"
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", webdataset, *flags.split()]
    assert run(*arguments, "--output_dir", tmp_path / "whole") == 0
    names = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert names == [f"checkpoint-{steps:08}.pth" for steps in (4, 6, 8, 12)]
    other = tmp_path / "continued"
    other.mkdir()
    shutil.copy(tmp_path / "whole/checkpoint-00000008.pth", other)
    line = refusal(main.run, "main", [*arguments, "--num_workers", 1, "--output_dir", other], capsys)
    assert "which 1 processes with 2 workers each were reading; this run has 1 with 1" in line
    assert run(*arguments, "--output_dir", other) == 0
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (tmp_path / "whole", other))
    assert a["epoch"] == b["epoch"] == 1
    assert not differences(a["model"], b["model"])


def test_webdataset_with_an_unreadable_image(webdataset, tmp_path, capsys):
    for shard in webdataset.iterdir():
        content = shard.read_bytes()
        broken = "train-2" in shard.name or "val-1" in shard.name
        first = content.index(b"\x89PNG")
        (tmp_path / shard.name).write_bytes(content[:first] + b"no image" + content[first + 8 :] if broken else content)
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", tmp_path, "--batch-size", 8, "--num_workers", 2]
    whole_val = ["--val-split", "digits-val-{0..0}.tar|11"]
    for policy, status in (("skip", 0), ("fail", 2)):
        result = command(*arguments, *whole_val, "--on-bad-image", policy, "--output_dir", tmp_path / policy)
        assert result.returncode == status, result.stderr
        events = [entry for entry in read_whole_log(tmp_path / policy / "log.txt") if "unreadable_image" in entry]
        assert len(events) == 1
        assert events[0]["unreadable_image"].startswith(f"{tmp_path}/digits-train-2.tar: ")
        assert "UnidentifiedImageError" in events[0]["reason"]
    assert read_log(tmp_path / "skip")[0]["unreadable_images"] == 1
    assert "--on-bad-image fail: 1 of 48 training images are unreadable" in result.stderr
    line = refusal(main.run, "main", [*arguments, "--eval"], capsys)
    assert line.startswith(f"main.py: image {tmp_path}/digits-val-1.tar: ")


@pytest.mark.parametrize(
    ("label", "loader", "reason"), [(b"9", "faithful", "labelled 9"), (b"cat", "fast", "invalid literal")]
)
def test_webdataset_with_labels_that_are_no_classes(label, loader, reason, webdataset, tmp_path, capsys):
    """The line that ends the run says what is wrong with them."""
    for shard in webdataset.iterdir():
        files = read_tar(shard)
        labels = {name: label for name in files if name.endswith(".cls") and "train" in shard.name}
        write_tar(tmp_path / shard.name, files | labels)
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", tmp_path, "--loader", loader, "--output_dir", tmp_path / "run"]
    assert reason in refusal(main.run, "main", arguments, capsys)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        ("a.png a.cls b.png b.cls", ["a", "b"]),
        ("a.v1.cls a.v1.png a.v2.cls a.v2.png b.png b.cls", ["a.v1", "a.v2", "b"]),
        ("IMG.1.png IMG.2.png IMG.1.cls IMG.2.cls", ["IMG.1", "IMG.2"]),
        ("x.y/a.png x.y/a.cls", ["x.y/a"]),
        ("a.png a.cls a.seg.png a.meta.json", ["a"]),  # parts of one sample, by webdataset's convention
        ("a.png a.cls a.v2.png a.v2.cls", None),  # the second image would not be read
    ],
)
def test_dots_in_names_of_a_webdataset(names, keys, tmp_path):
    write_tar(tmp_path / "x.tar", {name: b"0" if name.endswith(".cls") else blank() for name in names.split()})
    shard = readers._samples_of_shard(str(tmp_path / "x.tar"))
    if keys is None:
        with pytest.raises(UserError, match=r"a\.v2\.cls"):
            list(shard)
    else:
        found = [(sample["__key__"], {"png", "cls"} <= sample.keys()) for sample in shard]
        assert found == [(key, True) for key in keys]


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
        "no end": content[: members[-1].offset_data + 512],
    }
    path.write_bytes(damaged[how])
    return path


WAYS = ["truncated in an image", "truncated between images", "truncated within a sample", "no end", "junk", "empty"]


@pytest.mark.parametrize("how", WAYS)
def test_damaged_shards_are_named_in_evaluation(how, webdataset, tmp_path, capfd):
    """There is no accuracy on some of the images."""
    path = damaged_shard(webdataset, tmp_path / "data", "digits-val-1.tar", how)
    workers = 2 if how == "truncated between images" else 0
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", tmp_path / "data", "--eval", "--num_workers", workers]
    line = refusal(main.run, "main", arguments, capfd)
    assert line.startswith(f"main.py: shard {path}: cannot be read (ReadError: ")


@pytest.mark.parametrize(
    ("how", "policy", "status"), [("junk", "skip", 0), ("truncated within a sample", "skip", 0), ("junk", "fail", 2)]
)
def test_damaged_shards_count_in_training(how, policy, status, webdataset, tmp_path, capsys):
    """Each counts as one unreadable image. A partial sample at its end is not counted."""
    path = damaged_shard(webdataset, tmp_path / "data", "digits-train-2.tar", how)
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", tmp_path / "data", "--output_dir", tmp_path / "run"]
    assert run(*arguments, "--batch-size", 8, "--on-bad-image", policy) == status
    log = read_whole_log(tmp_path / "run/log.txt")
    assert [entry["unreadable_image"] for entry in log if "unreadable_image" in entry] == [str(path)]
    if policy == "skip":
        assert read_log(tmp_path / "run")[0]["unreadable_images"] == 1
    else:
        assert f"1 of 48 training images are unreadable (limit 0), e.g. {path}" in capsys.readouterr().err


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
            with pytest.raises(UserError, match="reads webdatasets differently from the supported versions"):
                list(val_loader(args))


def test_webdataset_mistakes(webdataset, capsys):
    arguments = [*SMALLEST, *WEBDATASET, "--data-path", webdataset]
    for flags, words in (
        ([*arguments, "--num_workers", 5], "4 training shards"),
        ([argument for argument in arguments if argument not in ("--num-classes", "3")], "--num-classes"),
        ([*arguments, "--eval", "--num-classes", 2], "--num-classes 2: an image is labelled 2"),
        ([*arguments, "--eval", "--num-classes", 2, "--num_workers", 2], "--num-classes 2: an image is labelled 2"),
    ):
        assert words in refusal(main.run, "main", flags, capsys)


# ------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("reader", ["imnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hfds", "wds"))])
def test_spawned_workers(reader, few_digits, webdataset, tmp_path):
    """As on macOS and Windows, workers unpickle what they are sent, even where `datasets` is Hugging Face's library."""
    script = tmp_path / "spawned.py"
    script.write_text(
        f"import multiprocessing, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport main\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn', force=True)\n    sys.exit(main.run())\n"
    )
    data = dict(
        hfds=["--data-set", f"hfds/{few_digits}", "--data-path", tmp_path / "cache", "--num-classes", 3],
        imnet=["--data-path", few_digits],
        wds=[*WEBDATASET, "--data-path", webdataset],
    )[reader]
    arguments = [*SMALL, *data, "--num_workers", "1", "--output_dir", "run"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    printed = subprocess.check_output([sys.executable, script, *map(str, arguments)], cwd=tmp_path, env=environment)
    assert f"{31 if reader == 'wds' else 21} images" in printed.decode()


def test_the_fast_loader_resumes_bit_for_bit(few_digits, tmp_path):
    """From the middle of an epoch, on other numbers of processes and workers. All images are erased."""
    arguments = [*SMALLEST, "--data-path", few_digits, "--loader", "fast", "--input-size", 64, "--device", "cpu"]
    arguments += "--reprob 1 --recount 2 --batch-size 8 --auto-resume --checkpoint-every 1 --keep-checkpoints 9".split()
    whole, resumed, shared = (tmp_path / name for name in ("whole", "resumed", "shared"))
    assert run(*arguments, "--accum-steps", 2, "--output_dir", whole) == 0
    for folder in (resumed, shared):
        folder.mkdir()
        shutil.copy(whole / "checkpoint-00000001.pth", folder)
    assert run(*arguments, "--accum-steps", 2, "--output_dir", resumed, "--num_workers", 2) == 0
    succeed(*arguments, "--accum-steps", 2, "--output_dir", shared, processes=2)
    a, b, c = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (whole, resumed, shared))
    keys = ("model", "optimizer", "steps", "epoch", "best_accuracy")
    assert a["steps"] == 3
    assert not differences({key: a[key] for key in keys}, {key: b[key] for key in keys})
    for name, value in a["model"].items():  # but for the order of additions in the all-reduce
        torch.testing.assert_close(c["model"][name], value, rtol=1e-3, atol=1e-6)
