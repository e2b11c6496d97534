"""Classes are compared by name: a network's, from its checkpoint, with a data set's."""

import io
import json
import os
import shutil
import tarfile
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import SMALL, command, refusal, succeed
from PIL import Image

import datasets
import main
import sepvit
from sepvit_lib.common.class_names import order_of
from sepvit_lib.common.errors import UserError
from sepvit_lib.pipeline.data_sets.base import Images
from sepvit_lib.pipeline.preprocessing import Preprocessing
from sepvit_lib.pipeline.samples import fingerprint
from sepvit_lib.run.checkpoints import read_checkpoint
from sepvit_lib.run.state import Precision

CPU = Precision(torch.device("cpu"), None)


def renamed(few_digits: Path, root: Path, **names: str) -> Path:
    """The three digits in folders with other names, such as _0="9"."""
    for split in ("train", "val"):
        for label in "012":
            shutil.copytree(few_digits / split / label, root / split / names.get(f"_{label}", label))
    return root


@pytest.fixture(scope="module")
def shifted(few_digits, tmp_path_factory) -> Path:
    """The digits with 0 renamed to 9, so that every class has another number."""
    return renamed(few_digits, tmp_path_factory.mktemp("shifted"), _0="9")


@pytest.fixture(scope="module")
def permuted(trained_digits, tmp_path_factory) -> Path:
    """The classifier of three digits with its outputs, and their names, in another order."""
    checkpoint, order = torch.load(trained_digits / "checkpoint.pth", weights_only=True), [2, 0, 1]
    for weights in (checkpoint["model"], checkpoint["model_ema"]):
        weights |= {name: weights[name][order] for name in ("head.weight", "head.bias")}
    path = tmp_path_factory.mktemp("permuted") / "checkpoint.pth"
    torch.save({**checkpoint, "classes": ["2", "0", "1"]}, path)
    return path


def figures(folder: Path) -> dict:
    return json.loads((folder / "eval.json").read_text())


def scored(printed: str) -> float:
    """Top-1 of the checkpoint in export.py's table."""
    row = next(line for line in printed.splitlines() if line.startswith("| checkpoint"))
    return float(row.split("|")[5])


def settings(data: Path, out: Path, flags: str = "", *others: object) -> list[str]:
    """Arguments of a small run of main.py."""
    return list(map(str, [*SMALL, "--data-path", data, "--output_dir", out, *flags.split(), *others]))


EVAL, TEACHER = "--eval --resume", "--distillation-type soft --teacher-model SepViT_Lite --teacher-path"


@pytest.mark.parametrize("flags", [EVAL, "--resume", TEACHER], ids=["evaluated", "resumed", "a teacher"])
def test_other_names_are_refused(flags, trained_digits, shifted, tmp_path, capsys):
    """With as many classes: numbers alone would not tell."""
    path = trained_digits / "checkpoint.pth"
    line = refusal(main.run, "main", settings(shifted, tmp_path, flags, path), capsys)
    for part in (str(path), "2 names differ (9, 0)", "--class-map FILE", str(shifted)):
        assert part in line


def test_an_export_is_not_scored_on_other_names(trained_digits, shifted, tmp_path):
    arguments = ["--resume", trained_digits / "checkpoint.pth", "--out", tmp_path / "out", "--formats", "torchscript"]
    arguments += ["--data-path", shifted]
    result = command(*arguments, script="tools/export.py")
    assert (result.returncode, "2 names differ (9, 0)" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "map.txt").write_text("9\n1\n2\n")
    printed = succeed(*arguments, "--class-map", tmp_path / "map.txt", "--rounds", 1, script="tools/export.py")
    assert scored(printed) == 100


def test_renamed_folders_are_numbered_by_a_class_map(trained_digits, shifted, tmp_path):
    (tmp_path / "map.txt").write_text("9\n1\n2\n")
    flags = ("--class-map", tmp_path / "map.txt", "--resume", trained_digits / "checkpoint.pth")
    assert main.run(settings(shifted, tmp_path, "--eval", *flags)) == 0
    assert figures(tmp_path) == pytest.approx(figures(trained_digits), rel=1e-5)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("9\n2\n1\n", "assigns number 1 to 2, but"),
        ("1\n2\n", "lacks 1 classes"),
        ("9\n\n1\n\n2\n", "does not number its classes from 0 on"),
        (None, "not a class map"),
    ],
    ids=["contradicts the names", "lacks a class", "blank lines", "missing"],
)
def test_class_maps_that_do_not_fit_are_refused(lines, problem, trained_digits, shifted, tmp_path, capsys):
    if lines is not None:
        (tmp_path / "map.txt").write_text(lines)
    flags = ("--class-map", tmp_path / "map.txt", "--resume", trained_digits / "checkpoint.pth")
    line = refusal(main.run, "main", settings(shifted, tmp_path, "--eval", *flags), capsys)
    assert f"--class-map {tmp_path / 'map.txt'}: {problem}" in line


def test_another_order_is_matched_by_name(permuted, trained_digits, few_digits, tmp_path, capsys):
    assert main.run(settings(few_digits, tmp_path, EVAL, permuted)) == 0
    assert "matched by name" in capsys.readouterr().out
    assert figures(tmp_path) == pytest.approx(figures(trained_digits), rel=1e-5)
    export = "--formats torchscript --rounds 1 --data-path".split()
    printed = succeed("--resume", permuted, "--out", tmp_path / "out", *export, few_digits, script="tools/export.py")
    assert scored(printed) == 100


def test_a_resumed_run_keeps_the_order_of_its_checkpoint(permuted, trained_digits, few_digits, tmp_path, capsys):
    flags = "--lr 0 --mixup 0 --cutmix 0 --warmup-epochs 0 --resume"
    assert main.run(settings(few_digits, tmp_path, flags, permuted)) == 0
    assert "matched by name" in capsys.readouterr().out
    after = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert after["classes"] == ["2", "0", "1"]
    top1 = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])["test_acc1"]
    assert top1 == pytest.approx(figures(trained_digits)["test_acc1"])


def test_a_teachers_outputs_are_matched_by_name(permuted, trained_digits, few_digits, tmp_path):
    """The losses of a teacher are the same, whatever the order of its outputs."""
    losses = []
    for path in (permuted, trained_digits / "checkpoint.pth"):
        args = main.build_parser().parse_args(settings(few_digits, tmp_path, TEACHER, path))
        train = main.build_data(args, is_train=True)
        criterion = main.build_criterion(args, torch.nn.Linear(1, 1), train, Preprocessing.for_size(32), False)
        torch.manual_seed(0)
        images, outputs = torch.randn(4, 3, 32, 32), torch.randn(4, 3)
        losses.append(criterion(images, outputs, torch.tensor([0, 1, 2, 0])).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] != criterion.base(outputs, torch.tensor([0, 1, 2, 0])).item()


@pytest.mark.parametrize("labels", [("1", "2", "7"), ("7", "8", "9")], ids=["two of three", "none"])
def test_finetuning_carries_the_rows_of_shared_names_over(labels, trained_digits, capsys):
    what, path = "--finetune x", str(trained_digits / "checkpoint.pth")
    torch.manual_seed(0)
    model = sepvit.SepViT_Lite(img_size=32, num_classes=3)
    fresh, source = model.head.weight.detach().clone(), read_checkpoint(path, what)["model"]["head.weight"]
    data = main.ImageData(None, 3, list(labels))
    main.load_from(model, read_checkpoint(path, what), what, new_classifier=True, data=data)
    expected = [source[int(label)] if label in "012" else fresh[row] for row, label in enumerate(labels)]
    assert torch.equal(model.head.weight, torch.stack(expected))
    shared = sum(label in "012" for label in labels)
    assert f"{shared} of 3 classes of the classifier are carried over by name" in capsys.readouterr().out


def test_finetuning_with_a_class_map_keeps_its_numbers(trained_digits, tmp_path, capsys):
    what, path = "--finetune x", str(trained_digits / "checkpoint.pth")
    checkpoint = read_checkpoint(path, what)
    for names, problem in ((["9", "1", "2"], ""), (["1", "0", "2"], "assigns number 0 to 1")):
        model = sepvit.SepViT_Lite(img_size=32, num_classes=3)
        data = main.ImageData(None, 3, names, class_map="map.txt")
        if problem:
            with pytest.raises(UserError, match=problem):
                main.load_from(model, checkpoint, what, new_classifier=True, data=data)
        else:
            main.load_from(model, checkpoint, what, new_classifier=True, data=data)
            assert torch.equal(model.head.weight, checkpoint["model"]["head.weight"])
            assert "class map" in capsys.readouterr().out


def test_two_processes_match_classes(permuted, trained_digits, few_digits, tmp_path):
    printed = succeed(*settings(few_digits, tmp_path, "--dist-eval --eval --resume", permuted), processes=2)
    assert printed.count("matched by name") == 1
    assert figures(tmp_path) == pytest.approx(figures(trained_digits), rel=1e-5)


def test_the_published_command_without_names(few_digits, tmp_path):
    """Published checkpoints have no names. Their classes are compared by number, and one line says so."""
    torch.manual_seed(0)
    network = sepvit.SepViT_Tiny(num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "SepViT_Tiny.pth")
    for label in "012":
        (tmp_path / "imagenet/val" / label).mkdir(parents=True)
        shutil.copy(next((few_digits / "val" / label).iterdir()), tmp_path / "imagenet/val" / label)
    literal = ["--eval", "--resume", "SepViT_Tiny.pth", "--model", "SepViT_Tiny", "--data-path", "imagenet"]
    printed = succeed(*literal, "--num_workers", 0, "--device", "cpu", cwd=tmp_path).splitlines()
    assert [line for line in printed if "number" in line] == [
        "--resume SepViT_Tiny.pth: class names unknown; classes are matched by number"
    ]
    assert not [line for line in printed if "SepViT_Tiny.pth" in line][1:]
    images = [next((tmp_path / "imagenet/val" / label).iterdir()) for label in "012"]
    transform = Preprocessing.for_size(224).transform()
    inputs = torch.stack([transform(Image.open(image).convert("RGB")) for image in images])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(network(inputs), torch.arange(3)).item()
    assert f"loss {loss:.4f}, 3 images" in printed[-1]


def decomposed(folder: Path) -> None:
    """Rename a folder as a Mac unpacks it."""
    folder.rename(folder.with_name(unicodedata.normalize("NFD", folder.name)))


def test_forms_of_unicode_are_the_same_name(trained_digits, few_digits, tmp_path):
    """é sorts after z in one form and before f in the other."""
    names = dict(_0="z", _1="é", _2="f")
    composed, mac = (renamed(few_digits, tmp_path / name, **names) for name in ("composed", "mac"))
    for split in ("train", "val"):
        decomposed(mac / split / "é")
    assert os.listdir(composed / "val") != os.listdir(mac / "val")
    found = [
        main.build_data(main.build_parser().parse_args(["--data-path", str(root)]), True) for root in (composed, mac)
    ]
    assert found[0].classes == found[1].classes == ["f", "z", "é"]
    assert fingerprint(found[0]) == fingerprint(found[1])
    checkpoint = torch.load(trained_digits / "checkpoint.pth", weights_only=True)
    torch.save({**checkpoint, "classes": ["z", unicodedata.normalize("NFD", "é"), "f"]}, tmp_path / "checkpoint.pth")
    assert main.run(settings(mac, tmp_path, EVAL, tmp_path / "checkpoint.pth")) == 0
    assert figures(tmp_path) == pytest.approx(figures(trained_digits), rel=1e-5)


def test_renumbering_twice():
    """A validation set in another order than the training set, which is in another order than the checkpoint."""
    names = ["c", "a", "b"]
    val = datasets.match_splits(*(main.ImageData(Images(), 3, classes) for classes in (["a", "b", "c"], names)))
    val = val.matched(["b", "c", "a"], "x")
    assert val.classes == ["b", "c", "a"]
    assert [val.classes[output] for output in val.outputs] == names


def test_order():
    assert order_of("abc", "abc", "x", "y", "z") is None
    assert order_of("abc", "cab", "x", "y", "z") == [2, 0, 1]
    for names in ("ab", "abcd", "abd"):
        with pytest.raises(UserError):
            order_of("abc", names, "x", "y", "z")


# ----------------------------------------------------------------------------------------------------------------------
# Too few classes, and classes without images
# ----------------------------------------------------------------------------------------------------------------------


def test_a_single_class_is_refused(few_digits, tmp_path, capsys):
    """One level too many: train/photos/<class>."""
    for split in ("train", "val"):
        shutil.copytree(few_digits / split, tmp_path / "deep" / split / "photos")
        shutil.copytree(few_digits / split / "0", tmp_path / "flat" / split / "0")
    for name, parts in (("deep", ("photos", "0, 1, 2", "one level up")), ("flat", ("a single class, 0",))):
        line = refusal(main.run, "main", settings(tmp_path / name, tmp_path / "run"), capsys)
        assert all(part in line for part in parts)


def test_a_class_without_images_is_named(few_digits, tmp_path, capsys):
    (tmp_path / "map.txt").write_text("0\n1\n2\ncat\n")
    assert main.run(settings(few_digits, tmp_path / "run", "--eval --class-map", tmp_path / "map.txt")) == 0
    assert "validation images for 1 of 4 classes: cat" in capsys.readouterr().out


def test_hidden_folders_and_files_of_archives_are_nobodys(few_digits, tmp_path):
    pixels = io.BytesIO()
    Image.new("L", (8, 8)).save(pixels, "PNG")
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        for name in ("./a/1.png", "./a/._1.png", "./.ipynb_checkpoints/1.png", "./b/1.PNG", "./b/x.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(pixels.getvalue())
            archive.addfile(member, io.BytesIO(pixels.getvalue()))
    data = main.build_data(main.build_parser().parse_args(["--data-path", str(tmp_path)]), is_train=False)
    assert (data.classes, len(data)) == (["a", "b"], 2)
    assert data.dataset.skipped == {".txt": 1}
