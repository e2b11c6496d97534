"""Visualise, on an image, what a SepViT attends to and has learned.

    python tools/visualize.py IMAGE --resume PATH --out DIR [--window ROW COLUMN | --window all] [--figures NAME …]

PATH is a checkpoint of main.py or of the published code, a folder in timm's layout, or a checkpoint of a segmentor or
detector (only its backbone is used; mmseg and mmdet are not needed). The figures are:

* among: the windows that the chosen window attends to, by block and head, and the attention rollout over all blocks;
* inside: the pixels that the window token and the central pixel of the chosen window attend to, by block and head;
* tokens: similarity of the learned window tokens;
* features: the stages' feature maps, as principal components;
* attribution: the pixels that support the predicted class.

Window indices start from 0 at the top left, on the grid of the finest block. The default is the central window.
The recorded attention is checked: rows sum to one, and block outputs recomputed from it match the network's.
"""

if not __package__:
    import _repository  # noqa: F401
import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sepvit import SepViT, SepViTStages
from sepvit_lib.common.command_line import Parser, path, positive_int, run_command
from sepvit_lib.common.errors import UserError, one_line
from sepvit_lib.common.storage import make_folder, write_output
from sepvit_lib.inference import exported
from sepvit_lib.inference.attention import BlockAttention, record_attention, rollout
from sepvit_lib.inference.backbones import load_backbone
from sepvit_lib.inference.classifier import load_classifier
from sepvit_lib.inference.images import PLACEHOLDER, read_image
from sepvit_lib.inference.maps import attribution, principal_components, token_similarity
from sepvit_lib.pipeline.image_files import as_picture
from sepvit_lib.pipeline.preprocessing import Preprocessing
from tools.visualizing import figures
from tools.visualizing.figures import Subject

ALL = "all"
DPI = {"png": 200, "pdf": 300}  # for PDF, the resolution of embedded images
MAX_WINDOWS = 400  # in a figure with one map per window
MAX_NAME = 40  # characters of a file or class name in titles
SHORTER_SIDE = 512  # default maximum for the dense form, in pixels, as in the configs for ADE20K


@dataclass(frozen=True)
class Loaded:
    """A trained network with its preprocessing.

    Attributes:
        network: the network, as a classifier or in the dense form.
        name: its name.
        preprocessing: turns images into the network's inputs.
        classes: names of the classes; none for the dense form.
        multi_label: whether an image may have several labels, or none.
    """

    network: SepViTStages
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()
    multi_label: bool = False


@dataclass(frozen=True)
class Scene:
    """A network's results on an image, from which the figures are drawn.

    Attributes:
        network: the network.
        inputs: the preprocessed image, 1 × 3 × H × W.
        blocks: the attention of its blocks.
        chosen: the blocks with separate figures for all heads.
        subject: image, title and chosen window of the figures.
        label: index and name of the class whose supporting pixels are shown; None for the dense form.
    """

    network: SepViTStages
    inputs: Tensor
    blocks: list[BlockAttention]
    chosen: list[BlockAttention]
    subject: Subject
    label: tuple[int, str] | None


# ----------------------------------------------------------------------------------------------------------------------
# Network and image
# ----------------------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[Loaded, Image.Image | Tensor]:
    """Load the network, and read the image in the orientation of its training images.

    Raises:
        UserError: the file contains no network with attention to show, or a setting does not apply to it.
    """
    what = f"--resume {args.resume}"
    if exported.kind_of(Path(args.resume)):
        raise UserError(f"{what}: an exported model, without attention; pass the checkpoint that it was exported from")
    if not Path(args.resume).is_dir() and (backbone := load_backbone(args.resume, what, args.averaged)):
        if args.label:
            raise UserError(f"--class {args.label}: {what} contains a backbone, which has no classes; omit it")
        image = read_image(args.image, f"{PLACEHOLDER} {args.image}", backbone.orientation)
        preprocessing = dense_preprocessing(as_picture(image), args.input_size)
        return Loaded(backbone.network, f"{backbone.variant}, dense form", preprocessing), image
    if args.input_size:
        size = " ".join(map(str, args.input_size))
        raise UserError(f"--input-size {size}: {what} contains a classifier, whose image size is fixed; omit it")
    classifier = load_classifier(args.resume, args.model, args.averaged)
    network, description = classifier.network, classifier.description
    if not isinstance(network, SepViT):
        raise UserError(f"{what}: contains {description.model}, not a SepViT; choose a SepViT checkpoint")
    made, what = description.preprocessing, f"{PLACEHOLDER} {args.image}"
    image = read_image(args.image, what, description.orientation, made.channels)
    return Loaded(network, description.model, made, description.classes, description.multi_label), image


def dense_preprocessing(image: Image.Image, size: Sequence[int] | None) -> Preprocessing:
    """Preprocessing for the dense form, which takes images of any size.

    Args:
        image: the image.
        size: height and width; None for the whole image, downscaled if its shorter side exceeds `SHORTER_SIDE`.
    """
    height, width = image.height, image.width
    if size is None:
        shorter = min(height, width, SHORTER_SIDE)
        factor = shorter / min(height, width)
        return Preprocessing((int(height * factor), int(width * factor)), shorter)
    factor = max(size[0] / height, size[1] / width)  # cover the size, then crop
    return Preprocessing((size[0], size[1]), max(1, -int(-min(height, width) * factor // 1)))


def find_label(name: str, loaded: Loaded, logits: Tensor) -> int:
    """Find the index of the class of `--class`, by name or number; by default, of the predicted class.

    Raises:
        UserError: there is no such class.
    """
    if not name:
        return int(logits.argmax())
    if name in loaded.classes:
        return loaded.classes.index(name)
    if name.isdecimal() and int(name) < len(loaded.classes):
        return int(name)
    some = ", ".join(loaded.classes[:3])
    raise UserError(f"--class {name}: unknown; choose one of {len(loaded.classes)} classes ({some}, …), or its number")


def shortened(text: str) -> str:
    """Shorten a name for a title."""
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"


def chosen_pixel(window: Sequence[str], network: SepViTStages, size: tuple[int, int]) -> tuple[float, float] | None:
    """Centre of the window that `--window` chooses, in image pixels; None for all windows.

    Args:
        window: arguments of `--window`.
        network: the network, whose finest grid of windows is used.
        size: height and width of the image.

    Raises:
        UserError: the window is not on the grid, or all windows are requested and there are too many.
    """
    named = network.named_blocks().items()
    sides = [4 * 2 ** int(name.split(".")[1]) * block.window_size for name, block in named]  # in image pixels
    side = min(sides)
    rows, columns = network.window_grids(size)[sides.index(side)]
    flag = f"--window {' '.join(window)}"
    if list(window) == [ALL]:
        if rows * columns > MAX_WINDOWS:
            raise UserError(f"{flag}: {rows} × {columns} windows are too many to draw a map for each; choose one")
        return None
    if not window:
        return (rows // 2 + 0.5) * side, (columns // 2 + 0.5) * side
    if len(window) != 2 or not all(part.isdecimal() for part in window):
        raise UserError(f"{flag}: takes ROW COLUMN, or {ALL}")
    row, column = map(int, window)
    if row >= rows or column >= columns:
        raise UserError(f"{flag}: out of range; rows are 0 to {rows - 1}, columns 0 to {columns - 1}")
    return (row + 0.5) * side, (column + 0.5) * side


def chosen_blocks(names: Sequence[str], blocks: list[BlockAttention]) -> list[BlockAttention]:
    """The blocks that `--blocks` chooses; by default, the last block of each stage and window size.

    Raises:
        UserError: there is no such block.
    """
    if list(names) == [ALL]:
        return blocks
    if not names:
        return list({(block.stage, block.window_size): block for block in blocks}.values())
    known = {short(block): block for block in blocks}
    for name in names:
        if name not in known:
            raise UserError(f"--blocks {name}: unknown; choose {ALL}, or from {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def short(block: BlockAttention) -> str:
    """A block's name on the command line and in file names: STAGE.BLOCK."""
    return block.name.removeprefix("blocks.")


def observe(args: argparse.Namespace, loaded: Loaded, image: Image.Image | Tensor) -> Scene:
    """Run the network on the image, and print its prediction.

    Raises:
        UserError: the command line names a class, window or block that does not exist.
    """
    inputs = loaded.preprocessing.transform()(image)[None]  # 1 × C × H × W
    height, width = inputs.shape[2:]
    pixel = chosen_pixel(args.window, loaded.network, (height, width))
    outputs: list[Any] = []
    blocks = record_attention(loaded.network, inputs, lambda images: outputs.append(loaded.network(images)))
    label, prediction = None, ""
    if loaded.classes:
        probabilities = outputs[0][0].sigmoid() if loaded.multi_label else outputs[0][0].softmax(dim=-1)
        best = int(probabilities.argmax())
        prediction = f": {shortened(loaded.classes[best])} ({100 * probabilities[best]:.1f} %)"
        index = find_label(args.label, loaded, probabilities)
        label = index, loaded.classes[index]
    print(f"{loaded.name}, {height} × {width} pixels{prediction}")
    difference = max(block.difference for block in blocks)
    print(f"attention of {len(blocks)} blocks: rows sum to one; recomputed outputs differ by {difference:.0e}")
    crop = np.asarray(as_picture(loaded.preprocessing.crop(image)))
    title = f"{shortened(one_line(Path(args.image).name))} · {loaded.name}{prediction}"
    subject = Subject(crop, title.replace("$", r"\$"), pixel)  # matplotlib would parse it as the start of a formula
    return Scene(loaded.network, inputs, blocks, chosen_blocks(args.blocks, blocks), subject, label)


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------

Drawings = Mapping[str, Callable[[], Figure]]  # drawing functions, by name of the figure


def among(scene: Scene) -> Drawings | str:
    """Figures of attention among windows, or the reason why there are none."""
    if not scene.network.variation.pointwise:
        return "the network has no window tokens, and so no attention among windows (pointwise=False)"
    several = [block for block in scene.blocks if block.among is not None]
    if not several:
        return "every block has a single window at this image size"
    draw = partial(figures.among_figure, scene.subject, several, rollout(scene.blocks))
    drawings: dict[str, Callable[[], Figure]] = {"among": draw}
    for block in scene.chosen:
        if block.among is not None:
            drawings[f"among-{short(block)}"] = partial(figures.among_heads_figure, scene.subject, block)
    return drawings


def inside(scene: Scene) -> Drawings | str:
    """Figures of attention inside a window, or the reason why there are none."""
    if scene.subject.pixel is None:
        return "it shows a single window; choose one with --window ROW COLUMN"
    return {f"inside-{short(block)}": partial(figures.inside_figure, scene.subject, block) for block in scene.chosen}


def tokens(scene: Scene) -> Drawings | str:
    """The figure of the window tokens, or the reason why there is none."""
    if scene.label is None:
        return "the dense form has no learned window tokens"
    if (kind := scene.network.variation.window_tokens) != "learned" or not scene.network.variation.pointwise:
        return f"the network has no learned window tokens (window_tokens={kind})"
    blocks = scene.network.named_blocks()
    found = [(block, token_similarity(blocks[block.name])) for block in scene.blocks]
    similarities = [(block, similarity) for block, similarity in found if similarity is not None]
    if not similarities:
        return "the window tokens are zeros, as before training, or every block has a single window"
    return {"tokens": partial(figures.tokens_figure, scene.subject.title, similarities)}


def features(scene: Scene) -> Drawings:
    """The figure of the feature maps."""

    def draw() -> Figure:
        with torch.inference_mode():
            maps = scene.network.forward_stages(scene.inputs)  # 1 × H' × W' × C each
        return figures.features_figure(scene.subject, [principal_components(values[0]) for values in maps])

    return {"features": draw}


def attributed(scene: Scene) -> Drawings | str:
    """The figure of the pixels that support a class, or the reason why there is none."""
    if scene.label is None or not isinstance(scene.network, SepViT):
        return "a backbone has no classes"
    index, name = scene.label
    network, title = scene.network, shortened(name).replace("$", r"\$")

    def draw() -> Figure:
        maps = attribution(network, scene.inputs, index)
        return figures.attribution_figure(scene.subject, title, [values[0].double().numpy() for values in maps])

    return {"attribution": draw}


KINDS: Mapping[str, Callable[[Scene], Drawings | str]] = dict(
    among=among, inside=inside, tokens=tokens, features=features, attribution=attributed
)


def plan(scene: Scene, args: argparse.Namespace) -> Iterator[tuple[Path, Callable[[], Figure]]]:
    """Yield the files to write, each with the function that draws its figure. Prints which kinds are skipped, and why.

    Raises:
        UserError: a file exists already.
    """
    for kind in args.figures:
        drawings = KINDS[kind](scene)
        if isinstance(drawings, str):
            print(f"{kind}: not drawn, {drawings}")
            continue
        for name, draw in drawings.items():
            file = Path(args.out) / f"{Path(args.image).stem}-{name}.{args.format}"
            if file.exists() and not args.overwrite:
                raise UserError(f"--out {args.out}: {file} exists; choose another folder, or pass --overwrite")
            yield file, draw


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Make the command's parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("image", type=path, metavar=PLACEHOLDER, help="an image")
    add("--resume", required=True, type=path, metavar="PATH", help="checkpoint of a classifier, segmentor or detector")
    add("--model", default="", metavar="NAME", help="timm's name of the network, if PATH does not specify it")
    add("--averaged", action="store_true", help="use the checkpoint's averaged weights")
    add("--out", required=True, type=path, metavar="DIR", help="folder for the figures")
    add("--overwrite", action="store_true", help="replace existing figures in DIR")
    add("--format", choices=tuple(DPI), default="png", help="png (200 dpi, the default), or pdf (vectors)")
    figures = f"figures to draw: {', '.join(KINDS)}; default all that apply to PATH"
    add("--figures", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME", help=figures)
    window = "the window to show, or all for every window; default: the central window"
    add("--window", nargs="+", default=[], metavar="ROW COLUMN", help=window)
    blocks = "blocks whose heads are drawn, or all; default: the last block of each stage and window size"
    add("--blocks", nargs="+", default=[], metavar="STAGE.BLOCK", help=blocks)
    label = "class whose supporting pixels are shown, by name or number; default: the predicted class"
    add("--class", dest="label", default="", metavar="CLASS", help=label)
    size = f"for backbones: resize and crop to H × W; default: the whole image, shorter side at most {SHORTER_SIDE}"
    add("--input-size", nargs=2, type=positive_int, metavar=("H", "W"), help=size)
    return parser


def main(args: argparse.Namespace) -> None:
    """Draw the figures.

    Raises:
        UserError: the image or the network cannot be read, a setting does not apply, or a file cannot be written.
    """
    loaded, image = load(args)
    make_folder(Path(args.out), f"--out {args.out}")
    scene = observe(args, loaded, image)
    metadata = {"Software": None} if args.format == "png" else {"CreationDate": None}
    style: dict[str, Any] = dict(format=args.format, dpi=DPI[args.format], metadata=metadata)
    for file, draw in list(plan(scene, args)):
        with matplotlib.rc_context(figures.FONT):
            write_output(file, partial(draw().savefig, **style), f"--out {args.out}")
        print(file)


def run(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    advice = "use a smaller --input-size"
    return run_command("visualize.py", lambda: main(parser.parse_args(arguments)), parser, advice)


if __name__ == "__main__":
    sys.exit(run())
