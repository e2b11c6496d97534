"""What the pictures of predictions share: small images are enlarged, so that names can be read in them."""

LEAST_HEIGHT = 256  # in pixels


def enlargement(height: int) -> int:
    """How many times larger an image of some height is drawn."""
    return max(1, -(-LEAST_HEIGHT // height))
