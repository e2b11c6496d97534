"""Pictures that show an image and its likeliest classes."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from sepvit_lib.inference.fonts import font_file

MIN_WIDTH = 320  # pixels; smaller images are enlarged, to keep the classes legible
MAX_SIDE = 4096  # pixels; longer images are not enlarged, and their text does not grow
ROWS = 5


def with_classes(image: Image.Image, classes: Sequence[tuple[str, float]]) -> Image.Image:
    """Draw an image's likeliest classes as bars below it.

    Args:
        image: the image, RGB.
        classes: names and probabilities (0 to 1), the likeliest first.
    """
    factor = max(1, min(-(-MIN_WIDTH // image.width), MAX_SIDE // image.height))
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    width = max(image.width, MIN_WIDTH)
    line = max(18, min(width, MAX_SIDE) // 24)  # height of a row in pixels
    margin, rows = line // 3, classes[:ROWS]
    font = ImageFont.truetype(font_file([*(name for name, _ in rows), " %.…0123456789"]), int(0.62 * line))
    picture = Image.new("RGB", (width, image.height + line * len(rows) + 2 * margin), "white")
    picture.paste(image)
    canvas = ImageDraw.Draw(picture)
    for number, (name, probability) in enumerate(rows):
        top = image.height + margin + number * line
        length = round((width - 2 * margin) * probability)
        canvas.rectangle((margin, top + 1, margin + max(1, length), top + line - 2), fill="#a9c7e8")
        text = _shortened(f"{100 * probability:.1f} %  {name}", font, width - 3 * margin)
        canvas.text((margin + line // 4, top + line // 2), text, fill="black", font=font, anchor="lm")
    return picture


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
