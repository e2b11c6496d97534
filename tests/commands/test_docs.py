"""Every command of the README and the documentation is run as the page has it, in a short form.

Commands are read from the pages: the lines of indented blocks and of ``bash`` blocks, and texts in backticks that start
with a program or are a script with arguments. ``python`` blocks are run as programs or read as configs. Everything runs
in a folder that looks like that of a reader who has followed the page (`reader`), with little data.

What makes a command short is in two tables: `SMALL`, texts that are replaced, and `SCRIPTS`, arguments that are added.
A comment directly above a block adds arguments to its commands, too:

    <!-- short form: --epochs 1 -->

A command that no rule knows fails, so a page with a new script needs an entry in `SCRIPTS`, or in `ELSEWHERE` if
another test runs it. Of commands that have the script and the flags in common, the first runs in `make test`, the
others in `make test-long`.
"""

import json
import os
import re
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import processes
import pytest
from conftest import ROOT, free_port
from PIL import Image
from test_data import inat_folder
from torch.distributed import run as torchrun

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTERS = ("bash", "python", "python3", "sbatch", "srun", "torchrun")  # of a script
PROGRAMS = ("docker", "git", "make", "pip", "pytest")
SCRIPT = r"[\w/]+\.(py|sh)"

# ----------------------------------------------------------------------------------------------------------------------
# The rules
# ----------------------------------------------------------------------------------------------------------------------

# Patterns, and what takes their place. First the placeholders of the pages, then what is large.
SMALL = {
    r"\[(--[^]]+)\]": r"\1",  # optional flags are given
    r"\bIMAGE( …)?": "image.png",
    r"\bCHECKPOINT\b": "SepViT_T.pth",
    r"\bCONFIG N\b": "CONFIG 8",
    r"\bCONFIG\b|\bconfigs/\w+\.py": "configs/DEMO",
    r"segmentation/configs/DEMO": "configs/DEMO",
    r"\bregnety_160\b": "regnety_002",
    r"/data/shards": "shards",
    r"train-{000\.\.099}\.tar\|1200000": "train-{000..001}.tar|48",
    r"val-{00\.\.15}\.tar\|50000": "val-{00..01}.tar|21",
    r"\b500x375\b": "64x48",
    r" runs/\*": " demo/run",
    r"--window 2 5 --blocks 1\.0 2\.4": "--window 0 0 --blocks 0.0",  # the windows of a small image
    r"\b23 20 18\b": "23 18",
    r" (compiled|int8|openvino)(?= |$)": "",  # take long; test_compiled_forms and test_exported_networks run them
}
PROCESSES = 2  # in place of --nproc_per_node=8


@dataclass(frozen=True)
class Script:
    """How commands of a script are run.

    Attributes:
        short: arguments added to them, which make them short.
        rest: what … stands for.
        prints: a pattern that their output has.
    """

    short: str
    rest: str = ""
    prints: str = "."


MAIN = "--model SepViT_Lite --input-size 32 --batch-size 4 --num_workers 0 --epochs 1"
BENCHMARK = "--quick --device cpu --threads 1 --model SepViT_Lite --out record"
WORKERS = "train_dataloader.num_workers=0 val_dataloader.num_workers=0 test_dataloader.num_workers=0"
DENSE = f"--cfg-options {WORKERS} train_dataloader.batch_size=2 train_cfg.val_interval=1"
SCRIPTS = {
    "main.py": Script(MAIN, rest="--data-path imagenet", prints=r"top-1|Acc@1|throughput|usage"),
    "predict.py": Script("--num_workers 0", prints=r"\d %"),
    "benchmarks/benchmark.py": Script(f"{BENCHMARK} --peers none --input-size 32 --batch-size 1", prints="SepViT_Lite"),
    "benchmarks/openvino_profile.py": Script("--model SepViT_Lite --peers none --rounds 1", prints="linear layers"),
    "benchmarks/input_pipeline.py": Script("--images 8 --input-size 64 --batch-size 4 --workers 0 --rounds 1"),
    "tools/get_flops.py": Script("--model SepViT_Lite --input-size 32", prints="multiply-adds"),
    "tools/make_demo_data.py": Script("--out made"),
    "tools/compare.py": Script("", prints="best top-1"),
    "tools/visualize.py": Script("", prints=r"attention of \d+ blocks: rows sum to one"),
    # in the format that is written fastest; test_export.py has the others
    "tools/export.py": Script("--formats safetensors --images 8 --rounds 1", prints="largest difference"),
    "segmentation/train.py": Script(f"{DENSE} train_cfg.max_iters=1", rest="CONFIG", prints="mIoU"),
    "segmentation/test.py": Script(f"--cfg-options {WORKERS}", rest="CONFIG CHECKPOINT"),
    "detection/train.py": Script(f"{DENSE} train_cfg.max_epochs=1", rest="CONFIG", prints="bbox_mAP"),
    "detection/test.py": Script(f"--cfg-options {WORKERS}", rest="CONFIG CHECKPOINT"),
    **{f"{folder}/predict.py": Script("", prints="image.png: ") for folder in ("segmentation", "detection")},
    **{f"{folder}/get_flops.py": Script("--shape 64 64") for folder in ("segmentation", "detection")},
}
DEMOS = dict(segmentation="fpn_sepvit_lite_112x112_demo.py", detection="mask_rcnn_sepvit_lite_fpn_demo.py")

# Commands that another test runs, and blocks of Python that it reads from the page.
ELSEWHERE = {
    r"python tools/app\.py --resume CHECKPOINT --config": "test_app.py::test_segmentor",
    r"--formats web": "test_web.py::test_the_folder_has_a_row_in_the_table",
    r"python tools/app\.py": "test_app.py::test_an_image_goes_in_and_its_class_comes_out",
    r"\bcells/": "test_own_pictures.py::test_the_tutorial",
    r"^for recipe in recipes/ablations": "test_vary.py::test_the_recipes_of_the_ablations_train",
    r"pip install (-e )?\.$": "test_package.py::test_a_host_with_modules_of_the_same_names_imports_everything",
    r"--corruptions": "test_corruptions.py::test_the_files_agree_with_the_printed_table",  # 95 evaluations
    r"--data-set csv/": "test_table.py::test_a_split_is_written_and_given_back",
    r"--threshold 0\.4": "test_multi_label.py::test_predictions_are_independent_probabilities",
    r"--in-chans 8": "test_shapes.py::test_many_channels_through_every_command",
    r"--(distillation-type feature|finetune distilled)": "test_distillation.py::test_features_without_labels",
    r"--data-set CIFAR": "test_data.py::test_cifar",  # torchvision knows the checksums of the real files
    r"bash slurm_(train|test)\.sh": "test_dense_commands.py::test_slurm_scripts",
    r"registers the models with timm\n(import|from) ": "test_heads.py::test_program",
    r'^_base_ = "fpn_': "test_own_data.py::test_segmentation_config_of_the_page",
    r'^_base_ = "mask_rcnn_': "test_own_data.py::test_detection_config_of_the_page",
}
# Not run: they need a package index, make or enter an environment, serve files, or are tests. The files that they name
# are checked.
NOT_RUN = ("pip", "python3 -m venv", ". ", "python -m http.server", "pytest")
LISTINGS = ("DIR/train/<class>/*.jpg", "DIR/val/<class>/*.jpg")  # files in an indented block


# ----------------------------------------------------------------------------------------------------------------------
# The commands of the pages
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of a page, or a text in backticks.

    Attributes:
        page: the page's path in the repository.
        line: number of the first line.
        kind: its language; "indented" or "inline".
        text: its content.
        before: the text before it, from the last empty line or heading.
    """

    page: str
    line: int
    kind: str
    text: str
    before: str


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        place: page and line.
        text: the command as the page has it.
        folder: folder that it is run in, "" for the repository's.
        short: arguments that the page adds in its short form.
    """

    place: str
    text: str
    folder: str = ""
    short: str = ""


def blocks(path: Path) -> Iterator[Block]:
    """Yield the blocks of a page, and the texts in backticks between them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    page, before, number = path.relative_to(ROOT).as_posix(), "", 0
    while number < len(lines):
        line, start = lines[number], number + 1
        if line.startswith("```"):
            content = list(takewhile(lambda text: text != "```", lines[start:]))
            yield Block(page, start + 1, line[3:], "\n".join(content), before)
            number += len(content) + 2
        elif line.startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            content = list(takewhile(lambda text: text.startswith("    "), lines[number:]))
            yield Block(page, start, "indented", "\n".join(text[4:] for text in content), before)
            number += len(content)
        else:
            for text in re.findall(r"`([^`]+)`", line):
                yield Block(page, start, "inline", text.replace(r"\|", "|"), "")
            before = f"{before}\n{line}" if line.strip() else before if before.endswith("-->") else ""
            if not line.strip() and start < len(lines) and lines[start].startswith(("    ", "```")):
                before = _paragraph(lines, number)
            number += 1


def _paragraph(lines: list[str], end: int) -> str:
    """The paragraph that ends before an empty line."""
    paragraph = list(takewhile(str.strip, reversed(lines[:end])))
    return "\n".join(reversed(paragraph))


def commands_of(block: Block) -> Iterator[Command]:
    """Yield the commands of a block."""
    if block.kind == "inline":
        if is_command(block.text):
            yield Command(f"{block.page}:{block.line}", block.text, folder_of(block.text, block, ""))
    elif block.kind in ("indented", "bash", "sh", "console"):
        short = re.search(r"<!-- short form: (.*?) -->", block.before)
        named = re.search(r"from `(\w+)/`", block.before, re.IGNORECASE)
        for number, line in enumerate(block.text.replace("\\\n", " ").splitlines()):
            text = line.removeprefix("$ ").partition("  #")[0].strip()
            if text and not text.startswith("#") and text not in LISTINGS:
                folder = folder_of(text, block, named[1] if named else "")
                yield Command(f"{block.page}:{block.line + number}", text, folder, short[1] if short else "")


def is_command(text: str) -> bool:
    """Whether a text in backticks is a command: a program or script with an argument, or a script that is started."""
    first, *rest = [word for word in text.split() if not re.match(r"[A-Z_]+=", word)] or [""]
    if first in STARTERS:
        return any(re.fullmatch(SCRIPT, word) for word in rest)
    return bool(rest) and (first in PROGRAMS or bool(re.fullmatch(SCRIPT, first)))


def folder_of(text: str, block: Block, named: str) -> str:
    """The folder that a command is run in: the one that the text before it names, or the first that has the script.

    Pages named like a folder are about it.
    """
    script = next((word for word in text.split() if re.fullmatch(SCRIPT, word)), "")
    stem = Path(block.page).stem
    folders = [named] if named else [*(folder for folder in DEMOS if folder == stem), "", *DEMOS]
    return next((folder for folder in folders if script and (ROOT / folder / script).is_file()), named)


BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [command for block in BLOCKS for command in commands_of(block)]
PROGRAM_BLOCKS = [block for block in BLOCKS if block.kind == "python"]


# ----------------------------------------------------------------------------------------------------------------------
# From a command to what is run
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What is run in place of a command.

    Attributes:
        script: the script's path in the repository; "make" for a target of the Makefile.
        arguments: its arguments.
        processes: number of processes; 0 for one that no launcher starts.
        variables: environment variables.
    """

    script: str
    arguments: tuple[str, ...]
    processes: int = 0
    variables: tuple[str, ...] = ()

    def signature(self) -> tuple[str, ...]:
        """Script and flags. Of commands that share them, the short form of the tests runs one."""
        flags = {word.partition("=")[0] for word in self.arguments if word.startswith("--")} - {"--launcher"}
        return (self.script, *sorted(flags)) if self.script != "make" else (self.script, *self.arguments)


def is_elsewhere(text: str) -> str | None:
    """The test that runs a command; None if it is run here."""
    return next((test for pattern, test in ELSEWHERE.items() if re.search(pattern, text, re.MULTILINE)), None)


def not_run(text: str) -> bool:
    """Whether a command, or each part of it, is not run."""
    return all(part.strip().startswith(NOT_RUN) for part in text.split("&&"))


def run_of(command: Command) -> Run:
    """Translate a command into what is run in its place.

    Raises:
        LookupError: no rule knows the command.
    """
    text = command.text
    for pattern, small in SMALL.items():
        text = re.sub(pattern, small, text)
    text = text.replace("configs/DEMO", f"configs/{DEMOS.get(command.folder, DEMOS['segmentation'])}")
    words = shlex.split(text)
    variables = tuple(takewhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    run = _translate(words[len(variables) :], command.folder)
    if run.script == "make":
        return run
    if run.script not in SCRIPTS:
        raise LookupError(f"{command.place}: no rule for {run.script}; see SCRIPTS in tests/commands/test_docs.py")
    rule, arguments = SCRIPTS[run.script], list(run.arguments)
    if "…" in arguments:
        place = arguments.index("…")
        given = run_of(replace(command, text=f"python {run.script.rpartition('/')[2]} {rule.rest}", short=""))
        count = len(shlex.split(rule.rest))
        arguments[place : place + 1] = given.arguments[:count]
    arguments += shlex.split(rule.short) + shlex.split(command.short)
    return replace(run, arguments=tuple(arguments), variables=(*run.variables, *variables))


def _translate(words: list[str], folder: str) -> Run:
    """Find the script that a command runs, and its arguments.

    Raises:
        LookupError: no rule knows the program.
    """
    program, *rest = words
    at = f"{folder}/" if folder else ""
    if program == "make":
        return Run("make", tuple(rest))
    if program in ("python", "python3") and rest[:2] == ["-m", "torch.distributed.launch"]:
        return _translate(["torchrun", *rest[2:]], folder)
    if program in ("python", "python3") and rest[0] != "-m":
        return Run(at + rest[0], tuple(rest[1:]))
    if program == "torchrun":
        try:
            given = torchrun.get_args_parser().parse_args(rest)
        except SystemExit:
            raise LookupError(f"torchrun does not take {shlex.join(rest)}") from None
        return Run(at + given.training_script, tuple(given.training_script_args), PROCESSES)
    if program in ("srun", "sbatch"):
        rest = [word for number, word in enumerate(rest) if not all(w.startswith("--") for w in rest[: number + 1])]
        if rest[0] == "tools/slurm/train.sh":
            rest = ["python3", "main.py", "--auto-resume", *rest[1:]]
        run = _translate(rest, folder)
        return replace(run, variables=("SLURM_PROCID=0", "SLURM_NTASKS=1"))
    if program == "bash" and (match := re.fullmatch(r"dist_(train|test)\.sh", rest[0])):
        if rest[1:] in ([], ["…"]):
            rest = [rest[0], "…", "8"]
        count = next(number for number, word in enumerate(rest) if word.isdigit())
        arguments = rest[1:count] + rest[count + 1 :]
        return Run(f"{at}{match[1]}.py", (*arguments, "--launcher", "pytorch"), 1)
    if program == "bash":  # a script that starts a program of its name
        return Run(at + re.sub(r"\.sh$", ".py", rest[0]), tuple(rest[1:]))
    if re.fullmatch(r"[\w/]+\.py", program):
        return Run(at + program, tuple(rest))
    raise LookupError(f"no rule for the program {program}; add one in tests/commands/test_docs.py")


def cases() -> list:
    """The commands to run, each once. Those that differ from an earlier one in values only are slow."""
    seen: set[tuple[str, ...]] = set()
    texts: set[tuple[str, str]] = set()
    found = []
    for command in COMMANDS:
        if (command.text, command.folder) in texts or is_elsewhere(command.text) or not_run(command.text):
            continue
        texts.add((command.text, command.folder))
        try:
            signature = run_of(command).signature()
        except LookupError:  # reported by the test
            signature = (command.place,)
        found.append(pytest.param(command, id=command.place, marks=[pytest.mark.slow] if signature in seen else []))
        seen.add(signature)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The reader's folder
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(few_digits, demo_data, tmp_path_factory) -> Path:
    """A small part of what tools/make_demo_data.py writes, and what the demos train with it."""
    root = tmp_path_factory.mktemp("docs") / "demo"
    root.mkdir()
    (root / "imagenet").symlink_to(few_digits)
    for kind in ("images", "annotations"):
        for split, count in (("training", 2), ("validation", 1)):
            folder = Path("ade/ADEChallengeData2016", kind, split)
            (root / folder).mkdir(parents=True)
            for path in sorted((demo_data / folder).iterdir())[:count]:
                (root / folder / path.name).symlink_to(path)
    (root / "coco/annotations").mkdir(parents=True)
    for split, count in (("train2017", 2), ("val2017", 1)):
        (root / "coco" / split).symlink_to(demo_data / "coco" / split)
        content = json.loads((demo_data / f"coco/annotations/instances_{split}.json").read_text())
        content["images"] = content["images"][:count]
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] <= count]
        (root / f"coco/annotations/instances_{split}.json").write_text(json.dumps(content))
    run(Run("main.py", tuple(f"--data-path {few_digits} --output_dir {root / 'run'} {MAIN}".split())), root)
    return root


@pytest.fixture(scope="module")
def dense_checkpoints(demo, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the demos' segmentor and detector, made when they are asked for."""

    class Checkpoints(dict):
        def __missing__(self, folder: str) -> Path:
            root = link_repository(tmp_path_factory.mktemp(folder), demo)
            arguments = [f"configs/{DEMOS[folder]}", *shlex.split(SCRIPTS[f"{folder}/train.py"].short)]
            run(Run(f"{folder}/train.py", (*arguments[:1], "--work-dir", "work", *arguments[1:])), root / folder)
            self[folder] = next((root / folder / "work").glob("*_1.pth"))
            return self[folder]

    return Checkpoints()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Random weights of a teacher with three classes."""
    import timm
    import torch

    path = tmp_path_factory.mktemp("teacher") / "regnety_002.pth"
    torch.save({"model": timm.create_model("regnety_002", num_classes=3).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def exported(demo, tmp_path_factory) -> Path:
    """What export.py writes."""
    out = tmp_path_factory.mktemp("exported")
    arguments = ("--resume", str(demo / "run/checkpoint.pth"), "--out", str(out), "--formats", "onnx", "--rounds", "1")
    run(Run("tools/export.py", arguments), out)
    return out / "SepViT_Lite.onnx"


def link_repository(root: Path, demo: Path) -> Path:
    """Make a folder with links to all of the repository and to the demo's, in which commands may leave files."""
    folders = ("benchmarks", "packaging", "recipes", "sepvit_lib", "tests", "tools")
    for pattern in ("*.py", "*.txt", "*.toml", "Makefile", *folders):
        for path in ROOT.glob(pattern):
            (root / path.name).symlink_to(path)
    (root / "demo").symlink_to(demo)
    for folder in DEMOS:
        (root / folder).mkdir()
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".sh") or path.name == "configs":
                (root / folder / path.name).symlink_to(path)
    return root


@pytest.fixture(scope="module")
def photographs(few_digits, tmp_path_factory) -> Path:
    """The digits as JPEGs of 64 × 64 pixels, in class folders, as ImageNet is."""
    root = tmp_path_factory.mktemp("imagenet")
    for path in few_digits.glob("*/*/*.png"):
        target = root / path.relative_to(few_digits).with_suffix(".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").resize((64, 64)).save(target)
    return root


@pytest.fixture
def reader(demo, photographs, tmp_path) -> Path:
    """The folder of a reader who has the data and checkpoints that the pages name."""
    root = link_repository(tmp_path, demo)
    (root / "imagenet").symlink_to(photographs)
    (root / "DIR").mkdir()
    inat_folder(root / "DIR", with_kingdom=True)
    for split in ("train", "val"):
        (root / "DIR" / split).symlink_to(photographs / split)
    for name in ("SepViT_Tiny.pth", "checkpoint.pth"):
        (root / name).symlink_to(demo / "run/checkpoint.pth")
    (root / "photos").symlink_to(photographs / "val/1")
    (root / "run").mkdir()
    (root / "run/args.yaml").write_text((demo / "run/args.yaml").read_text())
    (root / "shards").mkdir()
    for split, name in (("train", "train-{:03}.tar"), ("val", "val-{:02}.tar")):
        paths = sorted((photographs / split).glob("*/*.jpg"))
        for shard in range(2):
            with tarfile.open(root / "shards" / name.format(shard), "w") as archive:
                for path in paths[shard::2]:
                    archive.add(path, f"{path.stem}.jpg")
                    label = root / "shards/label"
                    label.write_text(path.parent.name)
                    archive.add(label, f"{path.stem}.cls")
    for folder in ("", *DEMOS):
        Image.linear_gradient("L").convert("RGB").save(root / folder / "image.png")
    return root


def run(what: Run, folder: Path) -> str:
    """Run a script, and require that it succeeds. Return its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": free_port()}
    environment |= dict(variable.split("=", 1) for variable in what.variables)
    if what.script == "make":
        result = subprocess.run(["make", "-n", *what.arguments], cwd=folder, capture_output=True, text=True)
    else:
        arguments = list(what.arguments)
        result = processes.run(ROOT / what.script, arguments, folder, environment, 600, what.processes)
    assert result.returncode == 0, f"{what}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The tests
# ----------------------------------------------------------------------------------------------------------------------


def test_pages_are_read():
    assert {(command.text, command.folder) for command in COMMANDS} >= {
        ("make demo", ""),
        ("python3 main.py --data-set INAT --data-path DIR --model SepViT_Tiny", ""),
        ("python get_flops.py CONFIG [--shape 800 1280]", "detection"),
        ("bash dist_train.sh configs/fpn_sepvit_t_512x512_80k_ade20k.py 8", "segmentation"),
    }
    assert len(PROGRAM_BLOCKS) >= 5


def test_a_page_with_a_new_command_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "From `tests/`:\n\n    python new.py --flag\n\nText with `python3 tools/new.py X`, `new.py`, `torchrun -h`.\n\n"
        "<!-- short form: --epochs 1 -->\n\n```bash\ncurl x  # a comment\nmain.py \\\n--eval\n```\n"
    )
    found = [command for block in blocks(page) for command in commands_of(block)]
    assert [(command.place, command.text, command.short) for command in found] == [
        ("page.md:3", "python new.py --flag", ""),
        ("page.md:5", "python3 tools/new.py X", ""),
        ("page.md:10", "curl x", "--epochs 1"),
        ("page.md:11", "main.py  --eval", "--epochs 1"),
    ]
    for command in found[:3]:
        with pytest.raises(LookupError, match=r"no rule for .*tests/commands/test_docs\.py"):
            run_of(command)
    assert run_of(found[3]).arguments[-2:] == ("--epochs", "1")


def test_blocks_of_other_languages_hold_no_commands():
    for block in BLOCKS:
        assert block.kind in ("inline", "indented", "", "bash", "python", "bibtex"), f"{block}: no rule knows it"
        assert block.kind or not any(is_command(line) for line in block.text.splitlines()), block


@pytest.mark.parametrize("test", sorted({*ELSEWHERE.values()}))
def test_what_runs_elsewhere_is_tested_there(test):
    file, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", next(ROOT.glob(f"tests/*/{file}")).read_text(encoding="utf-8"), re.M)
    patterns = [pattern for pattern, other in ELSEWHERE.items() if other == test]
    texts = [command.text for command in COMMANDS] + [block.text for block in PROGRAM_BLOCKS]
    assert any(re.search(pattern, text, re.MULTILINE) for pattern in patterns for text in texts), "no longer on a page"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_files_of_the_repository_exist(command):
    """Those that a command names, also where a short form takes others."""
    folders = [ROOT / command.folder, ROOT]
    for word in shlex.split(command.text):
        name = word.removeprefix("'").partition("[")[0].removesuffix(".")
        is_own = re.match(r"(\./)?(tools|recipes|configs|tests|segmentation|detection|packaging|benchmarks)/\w", name)
        if is_own or name in ("requirements.txt", "constraints.txt"):
            assert any(any(folder.glob(name)) for folder in folders), f"{command.place}: {name}"
        if extras := re.fullmatch(r"\.\[([\w,]+)\]", word):
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert all(f"\n{extra} = [" in project for extra in extras[1].split(","))
    if command.text.startswith("pytest"):
        pattern = re.search(r"-k (\w+)", command.text)
        assert not pattern or pattern[1] in (ROOT / command.text.split()[1]).read_text(encoding="utf-8")


@pytest.mark.parametrize("command", cases())
def test_command(command, reader, request):
    what = run_of(command)
    if "SepViT_T.pth" in what.arguments:
        checkpoints = request.getfixturevalue("dense_checkpoints")
        (reader / command.folder / "SepViT_T.pth").symlink_to(checkpoints[command.folder or "segmentation"])
    if exported := next((word for word in what.arguments if word.startswith("exported/")), None):
        (reader / "exported").mkdir()
        (reader / exported).symlink_to(request.getfixturevalue("exported"))
    if "regnety_002.pth" in what.arguments:
        (reader / "regnety_002.pth").symlink_to(request.getfixturevalue("teacher"))
    printed = run(what, reader / command.folder)
    assert re.search(SCRIPTS[what.script].prints if what.script in SCRIPTS else ".", printed), printed


def test_flags_in_the_text_exist():
    """Those in backticks outside of commands are flags of this repository's scripts, or of torchrun."""
    scripts = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests"]
    sources = [*(path.read_text(encoding="utf-8") for path in scripts), torchrun.get_args_parser().format_help()]
    known = {flag.replace("_", "-") for source in sources for flag in re.findall(r"--[a-z][\w-]*", source)}
    known.add("--use-env")  # of torch.distributed.launch
    for block in BLOCKS:
        if block.kind == "inline" and block.page != "docs/coming_from.md":  # which names flags of other projects
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", block.text):
                spellings = {flag.replace("_", "-"), flag.replace("_", "-").replace("--no-", "--")}
                assert spellings & known, f"{block.page}:{block.line}: {flag}"


READ_CONFIG = """
import sys
from mmengine.config import Config
from mmengine.registry import MODELS
cfg = Config.fromfile(sys.argv[1])
if "model" in cfg and "_base_" not in open(sys.argv[1]).read():
    MODELS.build(cfg.model.backbone).init_weights()
"""


OWN_BLOCKS = [block for block in PROGRAM_BLOCKS if not is_elsewhere(block.text)]


@pytest.mark.parametrize("block", OWN_BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_python(block, reader):
    """Programs run. Configs are read, on top of the page's demo if they are a part of one."""
    folder = Path(block.page).stem
    if "import " in block.text:
        (reader / "program.py").write_text(block.text)
        run(Run(str(reader / "program.py"), ()), reader)
        return
    is_part = "custom_imports" not in block.text
    base = f"_base_ = {str(ROOT / folder / 'configs' / DEMOS[folder])!r}\n" if is_part else ""
    (reader / "own.py").write_text(base + block.text.replace('type="SepViT_Tiny"', 'type="SepViT_Lite"'))
    (reader / "read_config.py").write_text(READ_CONFIG)
    run(Run(str(reader / "read_config.py"), ("own.py",)), reader)
