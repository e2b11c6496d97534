"""Policy for unreadable images: how they are reported and replaced, and how many are allowed."""

import re

from sepvit_lib.common.errors import MachineError, UserError

REPLACEMENTS = 10  # images tried in place of an unreadable one
SEPARATOR = "\0"  # between the names of unreadable images and the reasons; a name may contain any other character
UNREADABLE_SHARE = 0.001  # share of the training images that may be skipped


class UnreadableImageError(UserError):
    """An image, or a shard of images, is missing or damaged.

    Attributes:
        name: path of the image or shard, or a different name if it has no path.
        reason: the error raised by reading it.
        is_storage_error: whether the storage does not respond; the image may then be intact.
    """

    name: str
    reason: str
    is_storage_error: bool

    @classmethod
    def of(
        cls, name: str, error: Exception, is_storage_error: bool = False, kind: str = "image"
    ) -> "UnreadableImageError":
        """Make the error from the exception raised by reading an image.

        Args:
            name: the image.
            error: the exception.
            is_storage_error: whether the storage does not respond.
            kind: 'image' or 'shard'.
        """
        reason = re.sub(
            r" <_io\..*>|\0", "", " ".join(f"{type(error).__name__}: {error}".split())
        )  # without memory addresses, which vary
        way_out = "" if is_storage_error else "; repair or remove it"
        unreadable = cls(f"{kind} {name}: cannot be read ({reason}){way_out}")
        unreadable.name = name
        unreadable.reason = reason
        unreadable.is_storage_error = is_storage_error
        return unreadable


class Replacements:
    """Consecutive unreadable images, replaced by the next readable one; at most `REPLACEMENTS`.

    Attributes:
        errors: one error per unreadable image.
    """

    def __init__(self) -> None:
        self.errors: list[UnreadableImageError] = []

    def add(self, error: UnreadableImageError) -> None:
        """Add an unreadable image.

        Raises:
            UserError: too many consecutive images are unreadable.
            MachineError: too many consecutive images are unreadable because the storage does not respond.
        """
        self.errors.append(error)
        if len(self.errors) > REPLACEMENTS:
            kind = MachineError if error.is_storage_error else UserError
            first = self.errors[0]
            raise kind(f"image {first.name}: cannot be read ({first.reason}), nor can its {REPLACEMENTS} replacements")

    def take(self) -> str:
        """Return all names and reasons as one string, for `unreadable_images` to parse, and clear the list."""
        text = SEPARATOR.join(part for error in self.errors for part in (error.name, error.reason))
        self.errors.clear()
        return text


def unreadable_images(text: str) -> list[tuple[str, str]]:
    """Parse names and reasons from a string returned by `Replacements.take`."""
    parts = text.split(SEPARATOR)
    return list(zip(parts[::2], parts[1::2]))


def unreadable_limit(policy: str, dataset_size: int) -> int:
    """Maximum number of unreadable training images in a run.

    Args:
        policy: 'skip' or 'fail'.
        dataset_size: number of training images.
    """
    return max(1, int(UNREADABLE_SHARE * dataset_size)) if policy == "skip" else 0
