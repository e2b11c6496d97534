"""Find fonts that have all characters of the class names drawn on pictures and figures."""

import sys
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from tqdm import tqdm

INVISIBLE = ("Cc", "Cf", "Cs")  # Unicode categories of characters without a glyph


def font_file(texts: Iterable[str]) -> str:
    """Find the file of a font that has all characters of the given texts: DejaVu Sans, or a system font.

    If no font has all of them, warn once per writing system, and use DejaVu Sans.
    """
    return _font_file("".join(sorted(set("".join(texts)))))


@cache
def _font_file(characters: str) -> str:
    default = font_manager.findfont("DejaVu Sans")
    wanted = {ord(character) for character in characters if unicodedata.category(character) not in INVISIBLE}
    if wanted <= _characters_of(default):
        return default
    fonts = sorted(font_manager.findSystemFonts(), key=lambda path: ("Sans" not in Path(path).name, path))
    found = next((path for path in fonts if wanted <= _characters_of(path)), None)
    for code in wanted - _characters_of(default) if found is None else ():
        _report(unicodedata.name(chr(code), "UNKNOWN").split()[0])
    return found or default


@cache
def _characters_of(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a font that matplotlib cannot read
        return frozenset()


@cache
def _report(script: str) -> None:
    tqdm.write(f"WARNING: no installed font has all characters of the class names ({script})", file=sys.stderr)


def use_in_figures(texts: Iterable[str]) -> None:
    """Make matplotlib use a font that has all characters of the given texts."""
    path = font_file(texts)
    name = font_manager.FontProperties(fname=path).get_name()
    if name not in matplotlib.rcParams["font.sans-serif"]:
        font_manager.fontManager.addfont(path)
    others = [other for other in matplotlib.rcParams["font.sans-serif"] if other != name]
    matplotlib.rcParams["font.sans-serif"] = [name, *others]
