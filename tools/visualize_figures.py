"""The figures of visualize.py, as matplotlib draws them: each has labels and one colour scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from inference.attention import BlockAttention, Rollout

PANEL = 1.25  # inches
COLUMNS = 5
HEADS = 8  # per row, beside the image and the mean
FONT = {"font.size": 7, "axes.titlesize": 7, "pdf.fonttype": 42}  # 42: text in PDF stays text
OPACITY = 0.7  # of heat maps over images
GREY = 0.5  # the mean of the grey images below heat maps, whose contrast is reduced
CONTRAST = 0.7

# Perceptually uniform, and in grey as ordered as in colour.
COLOUR_MAP = matplotlib.colormaps["viridis"]
# Attention relative to even attention, at which each of n windows or pixels has the weight 1 / n: one scale for all.
RELATIVE = LogNorm(0.1, 10, clip=True)
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True)
class Subject:
    """What all figures are about.

    Attributes:
        image: what the network saw, H × W × 3, RGB, 0 to 255.
        title: names network and image.
        pixel: row and column of the image pixel in the middle of the chosen window; None if all windows are shown.
    """

    image: np.ndarray
    title: str
    pixel: tuple[float, float] | None


# ----------------------------------------------------------------------------------------------------------------------
# Panels
# ----------------------------------------------------------------------------------------------------------------------


def panels(rows: int, columns: int, shape: Sequence[float], title: str) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of equal panels for content of a shape (height, width). Panels are blank until they are drawn."""
    height, width = shape[:2]
    longer = max(height, width)
    size = (PANEL * columns * width / longer + 0.9, (PANEL * height / longer + 0.2) * rows + 0.4)
    figure = Figure(figsize=(max(size[0], 3.2), size[1]), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    figure.suptitle(title, fontsize=8)
    return figure, grid.tolist()


def chunks(count: int, most: int = COLUMNS) -> tuple[int, int]:
    """Rows and columns for a number of panels, as even as possible."""
    rows = -(-count // most)
    return rows, -(-count // rows)


def show_image(axes: Axes, image: np.ndarray, title: str = "") -> None:
    """Draw an image so that positions on the axes are its pixels, from 0 at the top and left."""
    height, width = image.shape[:2]
    axes.axis("on")
    axes.imshow(image, extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[], title=title)


def show_cells(
    axes: Axes, values: np.ndarray, cell: float, norm: Normalize, colours: Colormap, opacity: float = 1.0
) -> None:
    """Draw the cells of a grid, the first at the top and left of the image, `cell` image pixels wide.

    Cells that reach beyond the image are cut where it ends, if it was drawn before.
    """
    rows, columns = values.shape[:2]
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(values, extent=(0, columns * cell, rows * cell, 0), norm=norm, cmap=colours, alpha=opacity,
                interpolation="nearest")  # fmt: skip
    if axes.images[1:]:
        axes.set(xlim=limits[0], ylim=limits[1])


def faint(image: np.ndarray) -> np.ndarray:
    """An image in grey with little contrast, to be seen through a heat map: H × W, 0 to 1."""
    grey = image.astype(float) @ (0.299, 0.587, 0.114) / 255
    return GREY + CONTRAST * (grey - 0.5)


def over_grey(colours: Colormap = COLOUR_MAP) -> Colormap:
    """A colour map as it looks over a faint image."""
    return ListedColormap(OPACITY * colours(np.linspace(0, 1, 256))[:, :3] + (1 - OPACITY) * GREY)


def mark(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    """Outline a part of a panel, visibly on any ground."""
    stroke = withStroke(linewidth=2.4, foreground="black")
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="white", linewidth=1.1, clip_on=False,
                             zorder=5, path_effects=[stroke]))  # fmt: skip


def mark_window(axes: Axes, block: BlockAttention, subject: Subject, row: int, column: int) -> None:
    """Outline a window's part of the image."""
    height, width = subject.image.shape[:2]
    top, left = row * block.stride, column * block.stride
    mark(axes, left, top, min(block.stride, width - left), min(block.stride, height - top))


def colour_bar(figure: Figure, grid: list[list[Axes]], norm: Normalize, colours: Colormap, label: str) -> None:
    """Add the colour scale."""
    relative = isinstance(norm, LogNorm)
    bar = figure.colorbar(
        ScalarMappable(norm, colours),
        ax=[axes for row in grid for axes in row],
        label=label,
        extend="both" if relative else "neither",
        fraction=0.05,
        aspect=24,
        pad=0.02,
        shrink=0.9 if len(grid) < 4 else 0.5,
    )
    if relative:
        bar.set_ticks(list(TICKS), labels=[f"{tick:g}" for tick in TICKS], minor=False)
        bar.ax.minorticks_off()


def place(block: BlockAttention) -> str:
    """Name a block as people read it."""
    index = block.name.rpartition(".")[2]
    rows, columns = block.grid
    return f"stage {block.stage}, block {index}: {rows} × {columns} windows"


# ----------------------------------------------------------------------------------------------------------------------
# Attention among windows
# ----------------------------------------------------------------------------------------------------------------------

RELATIVE_LABEL = "weight, relative to even attention"


def mosaic(weights: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Arrange the rows of n × n weights as one map each, at the place of the row's window, with gaps (NaN) between."""
    rows, columns = grid
    tiles = np.full((rows, rows + 1, columns, columns + 1), np.nan)
    tiles[:, :rows, :, :columns] = weights.reshape(rows, columns, rows, columns).transpose(0, 2, 1, 3)
    return tiles.reshape(rows * (rows + 1), columns * (columns + 1))[:-1, :-1]


def show_mosaic(axes: Axes, weights: np.ndarray, grid: tuple[int, int], norm: Normalize, title: str) -> None:
    """Draw one map per window, at the window's place: what it listens to."""
    axes.axis("on")
    axes.imshow(mosaic(weights, grid), norm=norm, cmap=COLOUR_MAP, interpolation="nearest", aspect="equal")
    axes.set(xticks=[], yticks=[], title=title)
    rows, columns = grid
    for row in range(rows):
        for column in range(columns):
            left, top = column * (columns + 1) + column - 0.5, row * (rows + 1) + row - 0.5
            axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor="white",
                                     linewidth=0.8 if rows * columns <= 16 else 0.4))  # fmt: skip


def show_among(
    axes: Axes, weights: Tensor, grid: tuple[int, int], stride: int, subject: Subject, block: BlockAttention, title: str
) -> None:
    """Draw attention among the windows of a grid: of the chosen window over the image, or of all as a mosaic.

    Args:
        axes: where to draw.
        weights: n × n, rows sum to one.
        grid: rows and columns of windows.
        stride: image pixels per window side.
        subject: see the class.
        block: the block, whose window is marked.
        title: the panel's title.
    """
    relative = weights.double().cpu().numpy() * weights.shape[-1]
    if subject.pixel is None:
        show_mosaic(axes, relative, grid, RELATIVE, title)
        return
    row, column = block.window_at(*subject.pixel)
    show_image(axes, faint(subject.image), title)
    show_cells(axes, relative[row * grid[1] + column].reshape(grid), stride, RELATIVE, COLOUR_MAP, OPACITY)
    mark_window(axes, block, subject, row, column)


def among_bar(figure: Figure, grid: list[list[Axes]], subject: Subject) -> None:
    """Add the colour scale of attention."""
    colour_bar(figure, grid, RELATIVE, COLOUR_MAP if subject.pixel is None else over_grey(), RELATIVE_LABEL)


def show_input(axes: Axes, subject: Subject, block: BlockAttention, title: str = "input") -> None:
    """Draw the image, with the chosen window outlined."""
    show_image(axes, subject.image, title)
    if subject.pixel is not None:
        mark_window(axes, block, subject, *block.window_at(*subject.pixel))


def listening(subject: Subject) -> str:
    """What the figures of attention among windows show."""
    return "each window listens to" if subject.pixel is None else "the outlined window listens to"


def among_figure(subject: Subject, blocks: Sequence[BlockAttention], through: Rollout) -> Figure:
    """Attention among windows of all blocks that have it, mean over heads, and its rollout through all blocks."""
    figure, grid = panels(*chunks(len(blocks) + 2), subject.image.shape,
                          f"{subject.title}\nwindows that {listening(subject)}, mean over heads")  # fmt: skip
    axes = [axes for row in grid for axes in row]
    finest = min(blocks, key=lambda block: block.stride)
    show_input(axes[0], subject, finest)
    for block, panel in zip(blocks, axes[1:]):
        show_among(panel, block.among_mean()[0], block.grid, block.stride, subject, block, titled(block))
    show_among(axes[len(blocks) + 1], through.weights[0], through.grid, through.stride, subject, finest,
               f"all blocks: rollout\n{through.grid[0]} × {through.grid[1]} windows")  # fmt: skip
    among_bar(figure, grid, subject)
    return figure


def titled(block: BlockAttention) -> str:
    """A block's title above its panel, in two lines."""
    return place(block).replace(": ", "\n")


def heads_figure(
    subject: Subject, count: int, title: str, show: Callable[[Axes, int | None], None], first: Callable[[Axes], None]
) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure with an image, the mean over heads, and each head.

    Args:
        subject: see the class.
        count: number of heads.
        title: the figure's title.
        show: draws a head, or the mean for None.
        first: draws the first panel.
    """
    columns = min(count, HEADS)
    rows = -(-count // columns)
    figure, grid = panels(rows, columns + (2 if count > 1 else 1), subject.image.shape, title)
    first(grid[0][0])
    if count > 1:
        show(grid[0][1], None)
    for head in range(count):
        show(grid[head // columns][head % columns + (2 if count > 1 else 1)], head)
    return figure, grid


def named(head: int | None) -> str:
    """Title of a head's panel."""
    return "mean over heads" if head is None else f"head {head}"


def among_heads_figure(subject: Subject, block: BlockAttention) -> Figure:
    """Attention among the windows of one block, by head."""
    among = block.among
    assert among is not None  # only such blocks are drawn

    def show(axes: Axes, head: int | None) -> None:
        weights = block.among_mean()[0] if head is None else among[0, head]
        show_among(axes, weights, block.grid, block.stride, subject, block, named(head))

    figure, grid = heads_figure(subject, among.shape[1], f"{subject.title}\n{place(block)} that {listening(subject)}",
                                show, lambda axes: show_input(axes, subject, block))  # fmt: skip
    among_bar(figure, grid, subject)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Attention inside a window
# ----------------------------------------------------------------------------------------------------------------------


def inside_figure(subject: Subject, block: BlockAttention) -> Figure:
    """Attention inside the chosen window of one block, by head: of its window token, and of its central pixel."""
    assert subject.pixel is not None
    row, column = block.window_at(*subject.pixel)
    w, tokens = block.window_size, int(block.has_token)
    weights = block.inside[0, row * block.grid[1] + column].double().cpu().numpy()  # h × T × T
    queries = {"window token": 0} if block.has_token else {}
    queries["central pixel"] = tokens + w * (w // 2) + w // 2
    heads = [None, *range(len(weights))] if len(weights) > 1 else [0]
    columns = min(len(heads), HEADS + 1)
    rows = -(-len(heads) // columns)
    title = f"{subject.title}\n{place(block)}, inside one of them"
    figure, grid = panels(rows * len(queries), columns + 1, (1, 1), title)
    for number, (name, query) in enumerate(queries.items()):
        show_window(grid[rows * number][0], subject, block, row, column, name)
        for order, head in enumerate(heads):
            axes = grid[rows * number + order // columns][order % columns + 1]
            values = weights.mean(axis=0) if head is None else weights[head]  # T × T
            relative = values[query] * len(values)
            show_window_weights(axes, relative[tokens:].reshape(w, w), named(head))
            if name == "central pixel":
                mark(axes, w // 2 - 0.5, w // 2 - 0.5, 1, 1)
    colour_bar(figure, grid, RELATIVE, COLOUR_MAP, RELATIVE_LABEL)
    return figure


def show_window(axes: Axes, subject: Subject, block: BlockAttention, row: int, column: int, query: str) -> None:
    """Draw the part of the image that a window covers. Padding is white."""
    show_image(axes, subject.image, f"window ({row}, {column})")
    top, left = row * block.stride, column * block.stride
    axes.set(xlim=(left, left + block.stride), ylim=(top + block.stride, top), ylabel=f"{query}\nlistens to")


def show_window_weights(axes: Axes, weights: np.ndarray, title: str) -> None:
    """Draw the weights of a window's pixels, w × w."""
    axes.axis("on")
    axes.imshow(weights, norm=RELATIVE, cmap=COLOUR_MAP, interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=title)


# ----------------------------------------------------------------------------------------------------------------------
# Window tokens, feature maps, attribution
# ----------------------------------------------------------------------------------------------------------------------


def tokens_figure(title: str, similarities: Sequence[tuple[BlockAttention, Tensor]]) -> Figure:
    """Cosine similarity of each block's learned window tokens, n × n: one map per window, at the window's place."""
    rows, columns = similarities[0][0].grid
    figure, grid = panels(*chunks(len(similarities)), (rows, columns),
                          f"{title}\nsimilarity of each window's token to the others'")  # fmt: skip
    norm = Normalize(-1, 1)
    for (block, similarity), axes in zip(similarities, [axes for row in grid for axes in row]):
        show_mosaic(axes, similarity.cpu().numpy(), block.grid, norm, titled(block))
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
    """Pixels of each stage's map that speak for a class, relative to the largest in the map."""
    title = f"{subject.title}\nwhat speaks for the class {label}: gradient × activation of each stage's map"
    figure, grid = panels(1, len(maps) + 1, subject.image.shape, title)
    norm = Normalize(0, 1)
    show_image(grid[0][0], subject.image, "input\n")
    for stage, (values, axes) in enumerate(zip(maps, grid[0][1:])):
        after = ", after the norm" if stage == len(maps) - 1 else ""
        show_image(axes, faint(subject.image), f"stage {stage}{after}\n{values.shape[0]} × {values.shape[1]}")
        positive = values.clip(min=0)
        relative = positive / max(float(positive.max()), 1e-30)
        show_cells(axes, relative, 4 * 2**stage, norm, COLOUR_MAP, OPACITY)
    colour_bar(figure, grid, norm, over_grey(), "share of the largest")
    return figure


def settings() -> Any:
    """Matplotlib's settings for these figures, as a context."""
    return matplotlib.rc_context(FONT)
