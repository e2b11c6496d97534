"""A self-contained HTML page of text, tables, charts and pictures, and the same content as files."""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from operator import methodcaller
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from sepvit_lib.common.errors import one_line
from sepvit_lib.common.storage import write_output
from sepvit_lib.common.tables import as_csv
from sepvit_lib.report.figures import confusion_matrix

HEAD = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
INK = "#010203"  # of text and axes in charts; replaced by the page's text colour, which depends on the reader's theme
STYLE: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "legend.frameon": False}
STYLE |= dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor"), INK)
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
REM_PER_INCH = 7.8  # size of charts
MAX_CLASSES = 30  # in the page's table and in the picture of the confusion matrix
SHOWN = 20  # classes and confusions in the page, if there are more classes
PICTURE_WIDTH, MIN_SIDE = 20, 160  # rem of a picture in the page; pixels up to which small pictures are enlarged

Cell = str | int | float | None
Lines = Sequence[Sequence[Cell]]  # a table; the first line is the header
Tiles = Sequence[tuple[str, str, str]]  # headline figures: name, value, and a detail such as its interval


class Page:
    """A page. Its parts appear in the order in which they are added. All texts are escaped.

    The page refers to no other file: charts are inline SVG, and pictures are data URIs.

    Args:
        title: title of the page.
        subtitle: line below the title.

    Attributes:
        files: content of each file that is written beside the page, by name. Others may be added.
    """

    def __init__(self, title: str, subtitle: str) -> None:
        self.files: dict[str, bytes] = {}
        self._parts = [f"<title>{_escaped(title)}</title>"]
        self.text(title, "h1")
        self.text(subtitle)

    def text(self, text: str, tag: str = "p") -> None:
        """Add a paragraph, or a heading that starts a section ('h2'), a warning, or a command to copy ('pre')."""
        tag, attributes = ("p", ' class="warning"') if tag == "warning" else (tag, "")
        self._parts.append(f"<{tag}{attributes}>{_escaped(text)}</{tag}>")

    def tiles(self, tiles: Tiles) -> None:
        """Add headline figures."""
        shown = '<div class="tile">{}<b>{}</b><span>{}</span></div>'
        self._parts += ['<div class="tiles">', *(shown.format(*map(_escaped, tile)) for tile in tiles), "</div>"]

    def table(self, name: str, lines: Lines, shown: Lines | None = None) -> None:
        """Add a table, and its file `name`.csv.

        Args:
            name: name of the file.
            lines: the header and the rows. The page shows floats with one decimal, the file with six significant
                digits. None and NaN are missing values.
            shown: header and rows in the page, by default all; none if it is empty.
        """
        texts = [[_text(cell, ".6g") for cell in line] for line in lines]
        self.files[f"{name}.csv"] = f"{as_csv(texts)}\n".encode("utf-8", "surrogateescape")
        numeric = {n for line in lines for n, cell in enumerate(line) if isinstance(cell, (int, float))}
        rows: list[str] = []
        for line in lines if shown is None else shown:
            tags = (("td" if rows else "th") + ' class="number"' * (n in numeric) for n in range(len(line)))
            rows.append("".join(f"<{tag}>{_escaped(_text(cell, '.1f'))}" for tag, cell in zip(tags, line)))
        if rows:
            body = "<tr>".join(rows[1:])
            self._parts.append(f'<div class="scroll"><table><thead><tr>{rows[0]}<tbody><tr>{body}</table></div>')

    def figure(self, name: str, draw: Callable[[], Any], caption: str) -> None:
        """Add a chart, and its file `name`.png. Charts stand side by side if there is room.

        Args:
            name: name of the file.
            draw: draws a matplotlib figure, in the page's style. Colours should be legible on black and on white.
            caption: text below the chart.
        """
        with matplotlib.rc_context(STYLE):
            figure, png, svg = draw(), io.BytesIO(), io.StringIO()
            figure.savefig(png, format="png", dpi=150, facecolor="white")
            figure.savefig(svg, format="svg", dpi=150, transparent=True, metadata=NO_METADATA)
        self.files[f"{name}.png"] = png.getvalue()
        text = svg.getvalue().replace(INK, "currentColor")
        text = re.sub(r' (id="[\w.]+_\d+"|xmlns(:\w+)?="[^"]*")', "", text[text.index("<svg") :])
        self._figure(text, [caption], REM_PER_INCH * figure.get_figwidth())

    def pictures(
        self, name: str, pictures: Sequence[tuple[Image.Image, Sequence[str]]], width: float = PICTURE_WIDTH
    ) -> None:
        """Add a sheet of pictures, each with lines of text below it, and their files `name`/01.jpg and so on.

        Args:
            name: name of the folder.
            pictures: the pictures and their lines of text.
            width: of each picture in the page, in rem.
        """
        for number, (picture, lines) in enumerate(pictures, start=1):
            factor, jpeg = -(-MIN_SIDE // min(picture.size)), io.BytesIO()
            enlarged = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
            enlarged.save(jpeg, "JPEG", quality=90, subsampling=0)
            self.files[f"{name}/{number:02}.jpg"] = jpeg.getvalue()
            data = base64.b64encode(jpeg.getvalue()).decode()
            self._figure(f'<img alt="" src="data:image/jpeg;base64,{data}">', lines, width)

    def write(self, path: Path, what: str) -> None:
        """Write the files, each atomically, and the page last.

        Args:
            path: file of the page. The others are written beside it; their folder is made.
            what: setting and value that name the folder, for messages.

        Raises:
            UserError: a file cannot be written.
        """
        style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
        page = "\n".join([HEAD, f"<style>{style}</style>", *self._parts, "</html>\n"])
        for old in (path, *path.parent.glob("*/[0-9][0-9].jpg")):  # of an earlier report
            old.unlink(missing_ok=True)
        for name, content in {**self.files, path.name: page.encode()}.items():
            write_output(path.parent / name, methodcaller("write", content), what)

    def _figure(self, content: str, lines: Sequence[str], width: float) -> None:
        caption = f"<figcaption>{'<br>'.join(map(_escaped, lines))}</figcaption>"
        self._parts.append(f'<figure style="--width: {width:.1f}rem">{content}{caption}</figure>')


def add_classes(page: Page, columns: Mapping[str, Sequence[Any]], metric: str) -> None:
    """Add the table of the classes. If there are more than `MAX_CLASSES`, the page shows only the worst.

    Args:
        page: the page.
        columns: the columns by name.
        metric: name of the column whose lowest values are the worst.
    """
    rows = [*zip(*columns.values())]
    is_large, order = len(rows) > MAX_CLASSES, np.argsort(np.array(columns[metric], dtype=float), kind="stable")
    page.text(f"Classes with the lowest {metric}" if is_large else "Classes", "h2")
    page.table("classes", [[*columns], *rows], [[*columns], *([rows[n] for n in order[:SHOWN]] if is_large else rows)])


def add_confusions(page: Page, matrix: np.ndarray, classes: Sequence[str], unit: str) -> None:
    """Add a confusion matrix: as a picture, or for more than `MAX_CLASSES`, as the most frequent confusions.

    Args:
        page: the page.
        matrix: numbers of images or pixels, C × C. Rows are labels.
        classes: names of the classes.
        unit: 'images', or 'pixels', of which the picture shows the percentages of each label.
    """
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    pairs = sorted(np.argwhere(matrix).tolist(), key=lambda pair: -matrix[*pair])
    found = [(classes[a], classes[b], int(matrix[a, b]), float(shares[a, b])) for a, b in pairs if a != b]
    lines: list[Sequence[Cell]] = [("label", "prediction", unit, f"of the label's {unit} (%)"), *found]
    is_large = len(classes) > MAX_CLASSES
    page.text("Most frequent confusions" if is_large else "Confusions", "h2")
    page.table("confusions", lines, lines[: SHOWN + 1] if is_large else [])
    if not is_large:
        shown = shares.round().astype(int) if unit == "pixels" else matrix
        scale = "percent of the pixels of each label" if unit == "pixels" else unit
        page.figure("confusion_matrix", lambda: confusion_matrix(shown, classes), f"Confusion matrix, in {scale}")


def _escaped(text: str) -> str:
    return escape(one_line(text))


def _text(cell: Cell, number_format: str) -> str:
    """A cell as text; "" for a missing value."""
    if isinstance(cell, float):
        return format(cell, number_format) if cell == cell else ""
    return "" if cell is None else str(cell)
