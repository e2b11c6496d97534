"""Shared by the pictures of segmentation and detection: small images are enlarged, so that class names are legible."""

MIN_HEIGHT = 256  # in pixels


def enlargement(height: int) -> int:
    """Return the factor by which an image of some height (in pixels) is enlarged for drawing."""
    return max(1, -(-MIN_HEIGHT // height))
