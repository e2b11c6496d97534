"""The matplotlib figures of visualize.py. The panels of a figure share one colour scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from sepvit_lib.inference.attention import BlockAttention, Rollout
from sepvit_lib.inference.fonts import use_in_figures
from sepvit_lib.inference.maps import COLOUR_MAP, GREY, OPACITY, RELATIVE, faint

PANEL, LARGE_PANEL = 1.25, 2.2  # inches; a large panel contains one map per window
COLUMNS, LARGE_COLUMNS = 5, 3
MIN_WIDTH = 3.6  # inches, for the titles
MAX_BAR = 3.0  # inches
SUBCELLS = 4  # per side of a mosaic's cell; the gaps between the maps are whole subcells
HEADS, LARGE_HEADS = 8, 4  # per row, besides the image and the mean
FONT = {"font.size": 7, "axes.titlesize": 7, "pdf.fonttype": 42}  # 42: embed fonts, to keep text in PDF files as text
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)
PERCENTILE = 99  # of an attribution map, the end of the colour scale: a few pixels may have far larger values


Grid = list[list[Axes]]  # panels, by row and column
Extension = Literal["neither", "max", "both"]


@dataclass(frozen=True)
class Subject:
    """Image, title and chosen window, shared by all figures.

    Attributes:
        image: the network's input, H × W × 3, RGB, 0 to 255.
        title: names of the network and the image.
        pixel: row and column of the image pixel in the middle of the chosen window; None if all windows are shown.
    """

    image: np.ndarray
    title: str
    pixel: tuple[float, float] | None


# ----------------------------------------------------------------------------------------------------------------------
# Panels
# ----------------------------------------------------------------------------------------------------------------------


def panels(rows: int, columns: int, shape: Sequence[float], title: str, side: float = PANEL) -> tuple[Figure, Grid]:
    """Make a figure of equal panels, blank until they are drawn.

    Args:
        rows: rows of panels.
        columns: columns of panels.
        shape: height and width of the content, in any unit.
        title: the figure's title.
        side: length of a panel's longer side in inches.
    """
    height, width = (side * length / max(shape[:2]) for length in shape[:2])
    size = (max(width * columns + 0.9, MIN_WIDTH), (height + 0.3) * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(h_pad=0.05, w_pad=0.04)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    use_in_figures([title])
    figure.suptitle(title, fontsize=8)
    return figure, grid.tolist()


def chunks(count: int, max_columns: int = COLUMNS) -> tuple[int, int]:
    """Rows and columns for a number of panels, with rows as equally filled as possible."""
    rows = -(-count // max_columns)
    return rows, -(-count // rows)


def show_image(axes: Axes, image: np.ndarray, title: str = "") -> None:
    """Draw an image in pixel coordinates, from 0 at the top left."""
    height, width = image.shape[:2]
    axes.axis("on")
    axes.imshow(image, extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[], title=title)


def show_cells(
    axes: Axes, values: np.ndarray, cell: float, norm: Normalize, colours: Colormap, opacity: float = 1.0
) -> None:
    """Draw a grid of square cells, each `cell` image pixels wide, from the top left of the image.

    If the image is already drawn, the cells are clipped to the image.
    """
    rows, columns = values.shape[:2]
    limits = dict(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    extent = (0, columns * cell, rows * cell, 0)
    axes.imshow(values, extent=extent, norm=norm, cmap=colours, alpha=opacity, interpolation="nearest")
    if axes.images[1:]:
        axes.set(**limits)


def over_grey() -> Colormap:
    """The colour map as it looks over a faint image."""
    return ListedColormap(OPACITY * COLOUR_MAP(np.linspace(0, 1, 256))[:, :3] + (1 - OPACITY) * GREY)


def mark(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    """Outline a rectangle in a panel, visible on any background."""
    line: dict[str, Any] = dict(fill=False, edgecolor="white", linewidth=0.8, clip_on=False, zorder=5)
    stroke = [withStroke(linewidth=1.9, foreground="black")]
    axes.add_patch(Rectangle((left, top), width, height, path_effects=stroke, **line))


def mark_window(axes: Axes, block: BlockAttention, subject: Subject, row: int, column: int) -> None:
    """Outline a window's part of the image."""
    height, width = subject.image.shape[:2]
    top, left = row * block.stride, column * block.stride
    mark(axes, left, top, min(block.stride, width - left), min(block.stride, height - top))


def colour_bar(
    figure: Figure, grid: Grid, norm: Normalize, colours: Colormap, label: str, extend: Extension = "neither"
) -> None:
    """Add the colour bar.

    Args:
        figure: the figure.
        grid: its panels.
        norm: the scale.
        colours: the colours, as they look in the panels.
        label: label of the scale.
        extend: ends of the scale that values may exceed.
    """
    shape: dict[str, Any] = dict(fraction=0.05, aspect=24, pad=0.02)
    shape["shrink"] = min(0.9, MAX_BAR / figure.get_figheight())
    panels = [axes for row in grid for axes in row]
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, label=label, extend=extend, **shape)
    if norm is RELATIVE:
        bar.set_ticks(list(TICKS), labels=[f"{tick:g}" for tick in TICKS], minor=False)
        bar.ax.minorticks_off()


def block_name(block: BlockAttention) -> str:
    """A block's name for display."""
    return f"stage {block.stage}, block {block.name.rpartition('.')[2]}"


def windows(grid: tuple[int, int]) -> str:
    """Describe a grid of windows."""
    return "a single window" if grid == (1, 1) else f"{grid[0]} × {grid[1]} windows"


def titled(block: BlockAttention) -> str:
    """A block's title above its panel."""
    return f"{block_name(block)}\n{windows(block.grid)}"


# ----------------------------------------------------------------------------------------------------------------------
# Attention among windows
# ----------------------------------------------------------------------------------------------------------------------

RELATIVE_LABEL = "weight, relative\nto uniform attention"


def show_mosaic(
    axes: Axes, weights: np.ndarray, grid: tuple[int, int], shape: Sequence[int], norm: Normalize, title: str
) -> None:
    """Draw a small map at each window's position: the window's row of the weights, with the window itself outlined.

    Args:
        axes: panel to draw in.
        weights: n × n.
        grid: rows and columns of windows.
        shape: height and width of the panel, in any unit. The maps are scaled to fit.
        norm: the scale of the colours.
        title: the panel's title.
    """
    rows, columns = grid
    gap = max(1, round(0.08 * max(grid) * SUBCELLS))
    high, wide = rows * SUBCELLS, columns * SUBCELLS  # a map
    maps = np.full((rows, high + gap, columns, wide + gap), np.nan)
    fine = weights.reshape(*grid, *grid).repeat(SUBCELLS, 2).repeat(SUBCELLS, 3)  # rows × columns × high × wide
    maps[:, :high, :, :wide] = fine.transpose(0, 2, 1, 3)
    axes.axis("on")
    extent = (0, columns * (wide + gap), rows * (high + gap), 0)
    style: dict[str, Any] = dict(norm=norm, cmap=COLOUR_MAP, interpolation="nearest", aspect="auto")
    axes.imshow(maps.reshape(extent[2], extent[1]), extent=extent, **style)
    axes.set_box_aspect(shape[0] / shape[1])
    outlines = [
        Rectangle((column * (wide + gap + SUBCELLS), row * (high + gap + SUBCELLS)), SUBCELLS, SUBCELLS)
        for row, column in np.ndindex(grid)
    ]
    width = 0.8 if max(grid) <= 4 else 0.4
    axes.add_collection(PatchCollection(outlines, facecolor="none", edgecolor="white", linewidth=width))
    axes.set(xlim=(-gap, extent[1]), ylim=(extent[2], -gap), xticks=[], yticks=[], title=title)


def show_among(
    axes: Axes, weights: Tensor, part: BlockAttention | Rollout, subject: Subject, block: BlockAttention, title: str
) -> None:
    """Draw attention among windows: the chosen window's as a heat map over the image, or all windows' as a mosaic.

    Args:
        axes: panel to draw in.
        weights: n × n, rows sum to one.
        part: the block or rollout that the weights belong to.
        subject: see `Subject`.
        block: the block whose window is outlined.
        title: the panel's title.
    """
    relative = weights.double().cpu().numpy() * weights.shape[-1]
    if subject.pixel is None:
        show_mosaic(axes, relative, part.grid, subject.image.shape, RELATIVE, title)
        return
    row, column = block.window_at(*subject.pixel)
    show_image(axes, faint(subject.image), title)
    cells = relative[row * part.grid[1] + column].reshape(part.grid)
    show_cells(axes, cells, part.stride, RELATIVE, COLOUR_MAP, OPACITY)
    mark_window(axes, block, subject, row, column)


def among_bar(figure: Figure, grid: Grid, subject: Subject) -> None:
    """Add the colour bar of attention among windows."""
    colour_bar(figure, grid, RELATIVE, COLOUR_MAP if subject.pixel is None else over_grey(), RELATIVE_LABEL, "both")


def show_input(axes: Axes, subject: Subject, block: BlockAttention) -> None:
    """Draw the image, with the chosen window outlined."""
    show_image(axes, subject.image, "input")
    if subject.pixel is not None:
        mark_window(axes, block, subject, *block.window_at(*subject.pixel))


def attending(subject: Subject) -> str:
    """Phrase for the titles of among-window attention figures."""
    return "each window attends to" if subject.pixel is None else "the outlined window attends to"


def among_figure(subject: Subject, blocks: Sequence[BlockAttention], through: Rollout) -> Figure:
    """Attention among windows of each block with several windows, averaged over heads, and the attention rollout."""
    columns, side = (LARGE_COLUMNS, LARGE_PANEL) if subject.pixel is None else (COLUMNS, PANEL)
    title = f"{subject.title}\nwindows that {attending(subject)}, mean over heads"
    figure, grid = panels(*chunks(len(blocks) + 2, columns), subject.image.shape, title, side)
    axes = [axes for row in grid for axes in row]
    finest = min(blocks, key=lambda block: block.stride)
    show_input(axes[0], subject, finest)
    for block, panel in zip(blocks, axes[1:]):
        show_among(panel, block.among_mean()[0], block, subject, block, titled(block))
    name = f"all blocks: rollout\n{windows(through.grid)}"
    show_among(axes[len(blocks) + 1], through.weights[0], through, subject, finest, name)
    among_bar(figure, grid, subject)
    return figure


def named(head: int | None) -> str:
    """Title of a head's panel."""
    return "mean over heads" if head is None else f"head {head}"


def among_heads_figure(subject: Subject, block: BlockAttention) -> Figure:
    """Attention among the windows of one block: the mean over heads, and each head."""
    among = block.among
    assert among is not None  # only blocks with several windows are drawn
    columns, side = (LARGE_HEADS, LARGE_PANEL) if subject.pixel is None else (HEADS, PANEL)
    count = among.shape[1]
    heads = [None, *range(count)] if count > 1 else [0]
    title = f"{subject.title}\n{block_name(block)}: windows that {attending(subject)}"
    figure, grid = panels(*chunks(len(heads) + 1, columns + 2), subject.image.shape, title, side)
    axes = [axes for row in grid for axes in row]
    show_input(axes[0], subject, block)
    for head, panel in zip(heads, axes[1:]):
        weights = block.among_mean()[0] if head is None else among[0, head]
        show_among(panel, weights, block, subject, block, named(head))
    among_bar(figure, grid, subject)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Attention inside a window
# ----------------------------------------------------------------------------------------------------------------------


def inside_figure(subject: Subject, block: BlockAttention) -> Figure:
    """Attention of the window token and of the central pixel inside the chosen window of one block, by head."""
    assert subject.pixel is not None  # otherwise this figure is not drawn
    row, column = block.window_at(*subject.pixel)
    w, first = block.window_size, int(block.has_token)
    weights = block.inside[0, row * block.grid[1] + column].double().cpu().numpy()  # h × T × T
    seen = min(w, block.map_size[0] - row * w), min(w, block.map_size[1] - column * w)  # without padding
    centre = seen[0] // 2, seen[1] // 2
    queries = {"window token": 0} if block.has_token else {}
    queries["central pixel"] = first + w * centre[0] + centre[1]
    heads = [None, *range(len(weights))] if len(weights) > 1 else [0]
    rows, columns = chunks(len(heads), HEADS + 1)
    of = "" if block.grid == (1, 1) else f", window ({row}, {column}) of {block.grid[0]} × {block.grid[1]}"
    title = f"{subject.title}\n{block_name(block)}{of}: pixels that are attended to inside the window"
    figure, grid = panels(rows * len(queries), columns + 1, (1, 1), title)
    for number, (name, query) in enumerate(queries.items()):
        show_window(grid[rows * number][0], subject, block, (row, column), name)
        for order, head in enumerate(heads):
            axes = grid[rows * number + order // columns][order % columns + 1]
            values = weights.mean(axis=0) if head is None else weights[head]  # T × T
            relative = values[query] * len(values)
            show_window_weights(axes, relative[first:].reshape(w, w), seen, named(head))
            if name == "central pixel":
                mark(axes, centre[1], centre[0], 1, 1)
    colour_bar(figure, grid, RELATIVE, COLOUR_MAP, RELATIVE_LABEL, "both")
    return figure


def show_window(axes: Axes, subject: Subject, block: BlockAttention, window: tuple[int, int], query: str) -> None:
    """Draw the part of the image in a window. Padding is white."""
    show_image(axes, subject.image, "the window")
    top, left = window[0] * block.stride, window[1] * block.stride
    axes.set(xlim=(left, left + block.stride), ylim=(top + block.stride, top), ylabel=f"{query}\nattends to")


def show_window_weights(axes: Axes, weights: np.ndarray, seen: tuple[int, int], title: str) -> None:
    """Draw the weights of a window's pixels, w × w. Rows and columns with indices of `seen` or more are padding."""
    w = len(weights)
    axes.axis("on")
    axes.imshow(weights, norm=RELATIVE, cmap=COLOUR_MAP, interpolation="nearest", extent=(0, w, w, 0))
    for draw, end in zip((axes.axhline, axes.axvline), seen):
        if end < w:
            draw(end, color="white", linestyle="--", linewidth=0.8)
    axes.set(xticks=[], yticks=[], title=title)


# ----------------------------------------------------------------------------------------------------------------------
# Window tokens, feature maps, attribution
# ----------------------------------------------------------------------------------------------------------------------


def tokens_figure(title: str, similarities: Sequence[tuple[BlockAttention, Tensor]]) -> Figure:
    """Cosine similarity of each block's learned window tokens, n × n: one map per window, at the window's position."""
    shape, title = similarities[0][0].grid, f"{title}\nsimilarity of each window's token to the others'"
    figure, grid = panels(*chunks(len(similarities), LARGE_COLUMNS), shape, title, LARGE_PANEL)
    norm = Normalize(-1, 1)
    for (block, similarity), axes in zip(similarities, [axes for row in grid for axes in row]):
        show_mosaic(axes, similarity.cpu().numpy(), block.grid, block.grid, norm, titled(block))
    colour_bar(figure, grid, norm, COLOUR_MAP, "cosine similarity")
    return figure


def features_figure(subject: Subject, maps: Sequence[tuple[np.ndarray, float]]) -> Figure:
    """The stages' feature maps: their first three principal components as red, green and blue."""
    title = f"{subject.title}\nfirst three principal components of each stage's map, as red, green and blue"
    figure, grid = panels(1, len(maps) + 1, subject.image.shape, title)
    show_image(grid[0][0], subject.image, "input\n")
    for stage, ((colours, share), axes) in enumerate(zip(maps, grid[0][1:])):
        rows, columns = colours.shape[:2]
        show_image(axes, subject.image, f"stage {stage}: {rows} × {columns}\n{100 * share:.0f} % of the variance")
        show_cells(axes, colours, 4 * 2**stage, Normalize(), COLOUR_MAP)
    return figure


def attribution_figure(subject: Subject, label: str, maps: Sequence[np.ndarray]) -> Figure:
    """Evidence for a class at each pixel of the stages' maps, relative to a high percentile of each map."""
    title = f"{subject.title}\nevidence for class {label}: gradient × activation of each stage's map"
    figure, grid = panels(1, len(maps) + 1, subject.image.shape, title)
    norm = Normalize(0, 1, clip=True)
    show_image(grid[0][0], subject.image, "input\n")
    for stage, (values, axes) in enumerate(zip(maps, grid[0][1:])):
        after = ", after the norm" if stage == len(maps) - 1 else ""
        show_image(axes, faint(subject.image), f"stage {stage}{after}\n{values.shape[0]} × {values.shape[1]}")
        positive = values.clip(min=0)
        relative = positive / max(float(np.percentile(positive, PERCENTILE)), 1e-30)
        show_cells(axes, relative, 4 * 2**stage, norm, COLOUR_MAP, OPACITY)
    colour_bar(figure, grid, norm, over_grey(), f"relative to the\n{PERCENTILE}th percentile", "max")
    return figure
