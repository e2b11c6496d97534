"""The policy for unreadable images: how they are reported and replaced, and how many a run may have."""

from training.errors import MachineError, UserError

REPLACEMENTS = 10  # images tried in place of an unreadable one
NAMES_END = "\0"  # separates names of unreadable images; names may contain any other character
UNREADABLE_SHARE = 0.001  # share of the training images that may be skipped


class UnreadableImageError(UserError):
    """An image, or a shard of images, is missing or damaged.

    Attributes:
        name: the image, by its path if it has one.
        is_storage_error: whether the storage does not respond, so that the image may be intact.
    """

    name: str
    is_storage_error: bool

    @classmethod
    def of(
        cls, name: str, error: Exception, is_storage_error: bool = False, kind: str = "image"
    ) -> "UnreadableImageError":
        """Make the error from what reading an image raised.

        Args:
            name: the image.
            error: the exception.
            is_storage_error: whether the storage does not respond.
            kind: 'image' or 'shard'.
        """
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        way_out = "" if is_storage_error else "; repair or remove it"
        unreadable = cls(f"{kind} {name}: cannot be read ({reason}){way_out}")
        unreadable.name = name
        unreadable.is_storage_error = is_storage_error
        return unreadable


class Replacements:
    """Unreadable images in a row, which the next readable one replaces. Their number is limited.

    Attributes:
        names: the images.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def add(self, error: UnreadableImageError) -> None:
        """Add an image.

        Raises:
            UserError: there are too many in a row.
            MachineError: there are too many, because the storage does not respond.
        """
        self.names.append(error.name)
        if len(self.names) > REPLACEMENTS:
            kind = MachineError if error.is_storage_error else UserError
            raise kind(f"image {self.names[0]}: cannot be read, nor can the {REPLACEMENTS} tried in its place")

    def take(self) -> str:
        """Return all names, separated by `NAMES_END`, and forget them."""
        names = NAMES_END.join(self.names)
        self.names.clear()
        return names


def unreadable_limit(policy: str, dataset_size: int) -> int:
    """How many of a run's training images may be unreadable.

    Args:
        policy: 'skip' or 'fail'.
        dataset_size: number of training images.
    """
    return max(1, int(UNREADABLE_SHARE * dataset_size)) if policy == "skip" else 0


def check_unreadable(
    count: int, limit: int, example: str, what: str, dataset_size: int | None = None, hint: str = ""
) -> None:
    """Refuse more unreadable images than the limit allows.

    Args:
        count: unreadable images so far.
        limit: how many there may be.
        example: one of them.
        what: the setting of the limit, for messages.
        dataset_size: number of training images, None if unknown.
        hint: the way out or where to look, for messages.

    Raises:
        UserError: there are more.
    """
    if count > limit:
        of_all = f" of {dataset_size}" if dataset_size is not None else ""
        images = f"{count}{of_all} training images are unreadable"
        raise UserError(f"{what}: {images} (limit {limit}), e.g. {example}; {hint}")
