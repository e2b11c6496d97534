"""Shared by the tests: golden weights and images, the demo data, scripts as commands, and the table of faults."""

import gc
import io
import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import processes as scripts
import pytest
import small_model
import torch
from browsing import browser as browser
from browsing import four_classes as four_classes
from browsing import launch as launch
from browsing import open_page as open_page
from browsing import photographs as photographs
from PIL import Image
from processes import free_port as free_port
from torchvision.datasets import ImageFolder

import sepvit
from sepvit_lib.pipeline.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
VARIANTS = list(sepvit.VARIANTS)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
os.environ.setdefault("SEPVIT_OPERATORS", "torchvision")  # compiled ones may be installed, too


def golden_weights(shapes: dict) -> dict[str, torch.Tensor]:
    """Weights the golden outputs were computed with: normal values seeded by entry name, scaled by entry type."""
    weights = {}
    for name, shape in shapes.items():
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
        if name.endswith("win_tokens"):
            z *= 0.5
        elif len(shape) >= 2:
            z /= np.sqrt(np.prod(shape[1:]))
        elif name.endswith("weight"):
            z = 1 + 0.1 * z
        else:
            z *= 0.1
        weights[name] = torch.from_numpy(z.astype(np.float32))
    return weights


def golden_images(batch: int, height: int, width: int) -> torch.Tensor:
    """Images the golden outputs were computed on."""
    images = np.random.default_rng(0).standard_normal((batch, 3, height, width)).astype(np.float32)
    return torch.from_numpy(images)


def golden_shapes(name: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / f"state_dict_{name}.json").read_text())


TURNED = 3  # EXIF orientation: upside down


def exif(orientation: int) -> Image.Exif:
    """Metadata with an orientation."""
    metadata = Image.Exif()
    metadata[0x0112] = orientation
    return metadata


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiny_network(form: type, seed: int = 0, **kwargs) -> torch.nn.Module:
    """A network small enough for slow comparisons, with noise added to every parameter."""
    sizes = dict(embed_dims=(32, 64, 64, 96), num_heads=(1, 2, 2, 3), depths=(1, 2, 2, 1))
    torch.manual_seed(seed)
    model = form(**{**sizes, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(autouse=True)
def forgotten_runs() -> Iterator[None]:
    """Drop what mmengine keeps of runs in this process by config and second: the next may begin in the same one."""
    yield
    if "mmengine.runner" in sys.modules:
        from mmengine.logging import MMLogger
        from mmengine.visualization import Visualizer

        for kind in (MMLogger, *Visualizer.__subclasses__()):
            kind._instance_dict.clear()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    """The demo data, written by tools/make_demo_data.py."""
    out = tmp_path_factory.mktemp("demo")
    succeed("--out", out, script="tools/make_demo_data.py")
    return out


@pytest.fixture(scope="session")
def digits(demo_data) -> Path:
    """The demo's digits in ImageNet layout."""
    return demo_data / "imagenet"


@pytest.fixture(scope="session")
def few_digits(digits, tmp_path_factory) -> Path:
    """Three classes of digits, with 16 training and 7 validation images each (48 and 21 in total)."""
    return link_digits(digits, tmp_path_factory.mktemp("few"), "012", train=16, val=7)


@pytest.fixture(scope="session")
def some_digits(digits, tmp_path_factory) -> Path:
    """All ten classes of digits, with 300 training and 100 validation images in total."""
    return link_digits(digits, tmp_path_factory.mktemp("some"), "0123456789", train=30, val=10)


def link_digits(digits: Path, root: Path, labels: str, train: int, val: int) -> Path:
    """Link the first training and validation images of some classes into a new folder."""
    for split, count in (("train", train), ("val", val)):
        for label in labels:
            (root / split / label).mkdir(parents=True)
            for path in sorted((digits / split / label).iterdir())[:count]:
                os.symlink(path, root / split / label / path.name)
    return root


def command(
    *arguments, script: str | Path = "main.py", processes: int = 0, environment: dict | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run a script in one process, or in several (`processes`). Return the finished process."""
    if script == "main.py" and small_model.MODEL in arguments:
        script = "tests/fixtures/small_main.py"  # main.py, which does not know that model
    variables = {**os.environ, **(environment or {})}
    return scripts.run(ROOT / script, list(map(str, arguments)), Path(cwd), variables, 600, processes)


def succeed(*arguments, **kwargs) -> str:
    """Run a script and require that it succeeds. Return its standard output."""
    result = command(*arguments, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# A small run: with `few_digits`, three steps per epoch of 16 images of 32 × 32 pixels. The smallest trains 4,000
# parameters instead of SepViT_Lite's 3.7 million, for tests that do not need a published network.
SIZES = ["--input-size", "32", "--batch-size", "16", "--num_workers", "0", "--epochs", "1"]
SMALL = ["--model", "SepViT_Lite", *SIZES]
SMALLEST = ["--model", small_model.MODEL, *SIZES]


def prepared_images(folder: Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a folder of class folders, prepared as for validation, and their labels."""
    data = ImageFolder(str(folder), transform=Preprocessing.for_size(size).transform())
    images, labels = zip(*data)
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture(scope="session")
def trained_digits(few_digits, tmp_path_factory) -> Path:
    """A folder with a checkpoint like main.py's, of a classifier that knows three digits, and with its eval.json.

    Most of its weights are pseudo-random. The classifier's are the least-squares solution for the training images, of
    all in the checkpoint's weights, of one in four in its averaged weights.
    """
    out = tmp_path_factory.mktemp("trained")
    network = sepvit.SepViT_Lite(img_size=32, num_classes=3).eval()
    weights = golden_weights({name: value.shape for name, value in network.state_dict().items()})
    network.load_state_dict(weights)
    images, labels = prepared_images(few_digits / "train", 32)
    with torch.no_grad():
        features = network.forward_head(network.forward_features(images), pre_logits=True)
    targets = 9 * torch.eye(3)[labels]

    def solved(part: slice) -> dict[str, torch.Tensor]:
        head = torch.linalg.pinv(features[part], rtol=0.02) @ targets[part]  # cut off: rounding is not amplified
        return {**weights, "head.weight": head.T.contiguous(), "head.bias": torch.zeros(3)}

    checkpoint = dict(
        model=solved(slice(None)),
        model_ema=solved(slice(None, None, 4)),
        classes=["0", "1", "2"],
        args=dict(model="SepViT_Lite", input_size=32),
    )
    torch.save(checkpoint, out / "checkpoint.pth")
    succeed(*SMALL, "--data-path", few_digits, "--output_dir", out, "--eval", "--resume", out / "checkpoint.pth")
    return out


def save_shallow(path: Path, classes: list[str]) -> Path:
    """Save a checkpoint for images of 32 × 32 pixels whose logits depend on the image.

    Its network has two blocks, with several windows and with one: exporters take seconds per block.
    """
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(embed_dims=[8, 16], num_heads=[1, 2], depths=[1, 1])
    network = sepvit.SepViT_Lite(img_size=32, num_classes=len(classes), **settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    args = dict(model="SepViT_Lite", input_size=32, model_kwargs=settings)
    torch.save(dict(model=network.state_dict(), classes=classes, args=args), path)
    return path


# Nothing random except the shuffle, and a step size that depends on the gradients alone.
PLAIN = [
    *"--mixup 0 --cutmix 0 --smoothing 0 --drop-path 0 --aa= --reprob 0 --color-jitter 0 --hflip 0 --scale 1 1".split(),
    *"--opt sgd --lr 1 --sched constant --warmup-epochs 0".split(),
]


def read_log(folder: Path) -> list[dict]:
    """Read the epoch entries of log.txt."""
    from sepvit_lib.run import output  # needs TensorBoard, which a machine for the GPU tests may lack

    return output.epoch_entries(output.read_log(folder / "log.txt"))


def refusal(run: Callable[[list[str]], int], name: str, arguments: Sequence[object], capsys) -> str:
    """Run a command with a user's mistake in this process. Return the one line that it prints.

    Args:
        run: the command.
        name: its script's name, without `.py`.
        arguments: its arguments.
        capsys: pytest's fixture.
    """
    status = run(list(map(str, arguments)))
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if "Warning" not in line and not line.startswith(" ")]
    assert status == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{name}.py: ")
    return lines[0]


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """List where two nested structures differ. Tensors are compared bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{place}/{key} in one alone" for key in a.keys() ^ b.keys()]
        return found + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b)) for line in differences(x, y, f"{place}/{i}")]
    return [] if a == b else [f"{place}: {a} and {b}"]


class Code:
    """An object that creates a file when unpickled, like malicious code in a checkpoint."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# ----------------------------------------------------------------------------------------------------------------------
# The table of faults
# ----------------------------------------------------------------------------------------------------------------------

TRIED = pytest.StashKey[Counter]()


class Table:
    """Count of the faults that runs survived. A test adds a fault after its last comparison."""

    def __init__(self, tried: Counter) -> None:
        self.tried = tried

    def add(self, fault: str, times: int = 1) -> None:
        """Count a fault that was tried and lost nothing."""
        self.tried[fault] += times


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(TRIED, Counter())


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collection, which mmengine starts for each data set: a second each."""
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the table over, if this is one of several processes that run tests (`pytest -n`)."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = dict(session.config.stash[TRIED])  # type: ignore[index]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the table of a process that ran tests."""
    node.config.stash[TRIED].update(getattr(node, "workeroutput", {}).get("tried", {}))


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """The session's table of faults."""
    return Table(request.config.stash[TRIED])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table. Each failed fault test counts as a loss."""
    tried = config.stash[TRIED]
    if not tried:
        return
    terminalreporter.section("faults")
    width = max(map(len, tried))
    for fault, times in tried.items():
        terminalreporter.write_line(f"{fault:{width}}  {times:4} times tried")
    lost = [report.nodeid for report in terminalreporter.stats.get("failed", []) if "faults" in report.nodeid]
    terminalreporter.write_line(f"{'losses':{width}}  {len(lost):4} {' '.join(lost)}")
