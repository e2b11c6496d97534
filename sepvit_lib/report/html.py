"""A self-contained HTML page of text, tables, charts and pictures, and the same content as files."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from operator import methodcaller
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from sepvit_lib.common.errors import one_line
from sepvit_lib.common.storage import write_output
from sepvit_lib.common.tables import as_csv

PAGE = "report.html"
Cell = str | int | float | None
Lines = Sequence[Sequence[Cell]]  # a table; the first line is the header
INK = "#010203"  # text and axes of charts; replaced by the page's own text colour, which depends on the reader's theme
STYLE: dict[str, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "legend.frameon": False},
    **{"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False},
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")},
    **{"axes.edgecolor": INK, "axes.labelcolor": INK},
}
REM_PER_INCH, MIN_REM_PER_INCH = 7.8, 4.4  # width of a chart in the page; a wide one scrolls on a phone


class Page:
    """A page. Its parts appear in the order in which they are added; `section` starts a section.

    All texts are escaped. The page refers to no other file: charts are inline SVG, and pictures are data URIs.

    Args:
        title: title of the page.
        subtitle: line below the title.

    Attributes:
        files: content of each file that is written beside the page, by name. Others may be added.
    """

    def __init__(self, title: str, subtitle: str) -> None:
        self.files: dict[str, bytes] = {}
        self._title = escape(one_line(title))
        self._parts = [f"<header><h1>{self._title}</h1><p>{escape(one_line(subtitle))}</p></header>"]

    def section(self, title: str) -> None:
        """Start a section."""
        self._add("h2", title)

    def text(self, text: str, is_warning: bool = False) -> None:
        """Add a paragraph; a warning is marked."""
        self._add('p class="warning"' if is_warning else "p", text)

    def code(self, text: str) -> None:
        """Add a command to copy."""
        self._add("pre", text)

    def tiles(self, tiles: Sequence[tuple[str, str, str]]) -> None:
        """Add headline figures: of each, its name, its value, and a detail such as its interval."""
        cells = (tuple(escape(one_line(text)) for text in tile) for tile in tiles)
        shown = (f'<div class="tile">{name}<b>{value}</b><span>{detail}</span></div>' for name, value, detail in cells)
        self._parts.append(f'<div class="tiles">{"".join(shown)}</div>')

    def table(self, name: str, lines: Lines, shown: Lines | None = None) -> None:
        """Add a table, and its file `name`.csv.

        Args:
            name: name of the file.
            lines: the header and the rows. The page shows floats with one decimal, the file with six significant
                digits. None and NaN are missing values.
            shown: header and rows in the page, by default all; none if it is empty.
        """
        shown = lines if shown is None else shown
        texts = [[_text(cell, ".6g") for cell in line] for line in lines]
        self.files[f"{name}.csv"] = f"{as_csv(texts)}\n".encode("utf-8", "surrogateescape")
        numeric = {n for line in lines[1:] for n, cell in enumerate(line) if isinstance(cell, (int, float))}

        def row(tag: str, line: Sequence[Cell]) -> str:
            kinds = (f'{tag} class="number"' if n in numeric else tag for n in range(len(line)))
            texts = (escape(one_line(_text(cell, ".1f"))) for cell in line)
            return f"<tr>{''.join(f'<{kind}>{text}</{tag}>' for kind, text in zip(kinds, texts))}</tr>"

        if shown:
            body = "".join(row("td", line) for line in shown[1:])
            table = f"<table><thead>{row('th', shown[0])}</thead><tbody>{body}</tbody></table>"
            self._parts.append(f'<div class="scroll">{table}</div>')

    def figure(self, name: str, draw: Callable[[], Any], caption: str) -> None:
        """Add a chart, and its file `name`.png. Charts stand side by side if there is room.

        Args:
            name: name of the file.
            draw: draws a matplotlib figure, in the page's style. Colours should be legible on black and on white.
            caption: text below the chart.
        """
        with matplotlib.rc_context(STYLE):
            figure = draw()
            FigureCanvasAgg(figure)
            png, svg = io.BytesIO(), io.StringIO()
            figure.savefig(png, format="png", dpi=150, facecolor="white")
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(svg, format="svg", dpi=150, transparent=True, metadata=nothing)
        self.files[f"{name}.png"] = png.getvalue()
        text, width = svg.getvalue(), figure.get_figwidth()
        text = re.sub(r' (id="[\w.]+_\d+"|xmlns(:\w+)?="[^"]*")', "", text[text.index("<svg") :])
        label = escape(one_line(caption))
        size = f'<svg role="img" aria-label="{label}" style="min-width: {MIN_REM_PER_INCH * width:.1f}rem"'
        text = re.sub(r'^<svg width="[^"]*" height="[^"]*"|^<svg height="[^"]*" width="[^"]*"', size, text)
        self._figure(text.replace(INK, "currentColor"), label, f'style="width: {REM_PER_INCH * width:.1f}rem"')

    def pictures(self, name: str, pictures: Sequence[tuple[Image.Image, Sequence[str]]]) -> None:
        """Add a sheet of pictures, each with lines of text below it, and their files `name`/01.png and so on."""
        for number, (picture, lines) in enumerate(pictures, start=1):
            png, jpeg = io.BytesIO(), io.BytesIO()
            picture.save(png, "PNG")
            picture.save(jpeg, "JPEG", quality=90, subsampling=0)
            self.files[f"{name}/{number:02}.png"] = png.getvalue()
            texts = [escape(one_line(line)) for line in lines]
            image = f'<img alt="{texts[0]}" src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
            self._figure(image, "<br>".join(texts), 'class="picture"')

    def write(self, folder: Path, what: str) -> None:
        """Write the files, each atomically, and the page last.

        Args:
            folder: their folder, which is made.
            what: setting and value that name the folder, for messages.

        Raises:
            UserError: a file cannot be written.
        """
        style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{self._title}</title>'
        page = f'<!DOCTYPE html><html lang="en"><head>{head}<style>{style}</style></head><body>'
        page += "\n".join([*self._parts, "</body></html>\n"])
        for name, content in {**self.files, PAGE: page.encode()}.items():
            write_output(folder / name, methodcaller("write", content), what)

    def _add(self, tag: str, text: str) -> None:
        self._parts.append(f"<{tag}>{escape(one_line(text))}</{tag.split()[0]}>")

    def _figure(self, content: str, caption: str, attributes: str) -> None:
        self._parts.append(f"<figure {attributes}>{content}<figcaption>{caption}</figcaption></figure>")


def _text(cell: Cell, number_format: str) -> str:
    """A cell as text; "" for a missing value."""
    if isinstance(cell, float):
        return format(cell, number_format) if cell == cell else ""
    return "" if cell is None else str(cell)
