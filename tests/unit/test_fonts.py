"""Fonts of pictures: class names in any script."""

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from segmentation.drawing import draw
from sepvit_lib.inference import fonts
from sepvit_lib.inference.fonts import font_file, use_in_figures
from sepvit_lib.inference.pictures import with_classes


def legend(name: str) -> np.ndarray:
    labels = np.zeros((8, 8), np.uint8)
    return np.asarray(draw(np.zeros((8, 8, 3), np.uint8), {"prediction": labels}, [name], [(255, 0, 0)]))


def test_a_legend_is_not_of_boxes():
    """Two letters that a font lacks would look alike."""
    assert not np.array_equal(legend("ß"), legend("æ"))
    assert not np.array_equal(legend("Ж"), legend("Щ"))


def write_font(path, characters):
    """Write a font of squares for some characters, and for those of all pictures."""
    codes = {ord(character) for character in f"{characters} %.…0123456789"}
    names = [".notdef", *(f"u{code:X}" for code in codes)]
    pen = TTGlyphPen(None)
    for corner in ((100, 0), (100, 700), (800, 700), (800, 0)):
        (pen.moveTo if corner == (100, 0) else pen.lineTo)(corner)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    font = FontBuilder(1000)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({code: f"u{code:X}" for code in codes})
    font.setupGlyf({name: empty if name == ".notdef" else square for name in names})
    font.setupHorizontalMetrics({name: (900, 100) for name in names})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable(dict(familyName="Squares", styleName="Regular"))
    font.setupOS2()
    font.setupPost()
    path.parent.mkdir(parents=True)
    font.save(path)


def test_a_font_of_the_system_is_used(tmp_path, monkeypatch, capsys):
    """One that has the characters. Without any, the picture is drawn, and a line says so."""
    name, file = "\U000f1234", tmp_path / "fonts/Squares.ttf"  # a private character, which no other font has
    write_font(file, name)
    printed, pictures = [], []
    for found in ([], [str(file)]):
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda found=found: found)
        fonts._font_file.cache_clear()
        pictures.append(with_classes(Image.new("RGB", (320, 8)), [(name, 0.5)]).tobytes())
        printed.append(capsys.readouterr().err.count("WARNING"))
    assert printed == [1, 0]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("text", ["tench", "Straße", "Ж"])
def test_the_default_font_has_most_alphabets(text):
    assert font_file([text]) == font_file(["a"])
    with matplotlib.rc_context():
        use_in_figures([text])
        assert matplotlib.rcParams["font.sans-serif"][0] == "DejaVu Sans"
