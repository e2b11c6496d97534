"""Data sets and samples, as read by loader workers.

All classes that are pickled for the workers are in `sepvit_lib.pipeline`, and not in datasets.py: in a spawned worker
(macOS, Windows), the module name `datasets` may refer to Hugging Face's library (`import_hugging_face`).
"""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from sepvit_lib.common.class_names import canonical, check_map, order_of
from sepvit_lib.common.errors import MachineError, UserError, setting
from sepvit_lib.common.processes import print_main
from sepvit_lib.common.randomness import SampleIndex, Stream, derived_seed, seed_cpu
from sepvit_lib.common.storage import PAUSES, is_storage_error, with_retries
from sepvit_lib.pipeline.data_sets.base import Images, Label, classes_of
from sepvit_lib.pipeline.data_sets.libraries import import_hugging_face
from sepvit_lib.pipeline.image_files import Encoded, decode
from sepvit_lib.pipeline.unreadable import Replacements, UnreadableImageError

BY_CLASS_MAP = "the class map numbers the classes; they are matched by number"
NO_NAMES = "class names unknown; classes are matched by number"


@dataclass(frozen=True)
class ImageData:
    """A data set of images, its classes, and the transform of its images.

    Attributes:
        dataset: the images and their labels: an `Images` or an `ImageStream` (`sepvit_lib.pipeline.data_sets`).
        num_classes: number of classes.
        classes: names of the classes, None if the data set has none.
        decode: decodes an image file, before the transform; may draw random numbers.
        transform: transform of the decoded images.
        outputs: the network's output index for each label of the data set; None if it equals the label.
        class_map: file that numbers the classes; "" if they are numbered in the order of their names.
        is_hugging_face: whether Hugging Face's library reads the images.
        multi_label: whether an image may have several labels, or none.
    """

    dataset: Any
    num_classes: int
    classes: list[str] | None = None
    decode: Callable[[Encoded], Any] = decode
    transform: Any = None
    outputs: Sequence[int] | None = None
    class_map: str = ""
    is_hugging_face: bool = False
    multi_label: bool = False

    @property
    def has_weights(self) -> bool:
        """Whether images have weights in the training loss."""
        return bool(getattr(self.dataset, "weights", ()))

    def __len__(self) -> int:
        return len(self.dataset)

    def matched(self, held: Sequence[str] | None, what: str, quietly: bool = False) -> "ImageData":
        """Match the class names with a network's, to map labels to the network's outputs.

        If the names are unknown, or a class map numbers the classes, classes are matched by number.

        Args:
            held: names of the network's classes, in the order of its outputs; None if they are unknown.
            what: the network, for messages.
            quietly: do not print how the classes were matched.

        Raises:
            UserError: the names differ, or the class map numbers them differently.
        """
        if held is None or self.classes is None:
            if not quietly:
                print_main(f"{what}: {NO_NAMES}")
            return self
        if self.class_map:
            check_map(self.class_map, self.classes, held, what)
            return self
        way_out = f"use a data set with the same classes, or {setting('class_map', 'FILE')} for renamed folders"
        data = setting("data_path", self.dataset.root)
        outputs = order_of(held, self.classes, what, data, way_out)
        if outputs is None:
            return self
        if not quietly:
            print_main(f"{what}: the data set has the same classes in a different order; they are matched by name")
        return self.renumbered(outputs, held)

    def label_counts(self) -> Counter[int] | None:
        """Number of images of each class, by output index; None if finding it would require reading all images."""
        labels = self.dataset.labels()
        if labels is None:
            return None
        numbers = (number for label in labels for number in classes_of(label))
        return Counter(self.outputs[number] if self.outputs else number for number in numbers)

    def renumbered(self, order: Sequence[int], classes: Sequence[str]) -> "ImageData":
        """Renumber the classes.

        Args:
            order: the new number of each class.
            classes: names of the classes in the new order.
        """
        outputs = range(len(order)) if self.outputs is None else self.outputs
        return replace(self, num_classes=len(classes), classes=list(classes), outputs=[order[n] for n in outputs])


def fingerprint(data: ImageData) -> str:
    """Hash the names of the classes and the identity of the data set's images (`Images.identity`)."""
    digest = hashlib.sha256(json.dumps(data.classes and [canonical(name) for name in data.classes]).encode())
    for part in data.dataset.identity():
        digest.update(part)
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------------------------


def read_sample(
    dataset: Images, index: int, pauses: Sequence[int], decode: Callable[[Encoded], Any] = decode
) -> tuple[Any, Label]:
    """Read an untransformed image and its label. Retries while the storage does not respond.

    Args:
        dataset: the data set.
        index: the image's index in the data set.
        pauses: seconds between the attempts.
        decode: decodes an image file.

    Raises:
        UnreadableImageError: the image is unreadable.
    """

    def read() -> tuple[Any, Label]:
        encoded, target = dataset.encoded(index)
        return decode(encoded), target

    try:
        return with_retries(read, dataset.root, pauses)
    except UserError:
        raise
    except Exception as error:  # the type depends on the image format and on the damage
        is_storage = is_storage_error(error, dataset.root)
        raise UnreadableImageError.of(dataset.name(index), error, is_storage) from None


class Samples(Dataset):
    """Base class for training and validation samples.

    Args:
        data: images and transform.
        seed: the run's seed, from which augmentation is derived.
    """

    def __init__(self, data: ImageData, seed: int = 0) -> None:
        self.dataset: Any = data.dataset
        self.transform = data.transform
        self.decode: Any = data.decode
        self.outputs = data.outputs
        self.num_classes = data.num_classes
        self.multi_label = data.multi_label
        self.is_hugging_face = data.is_hugging_face
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def output_of(self, label: int) -> int:
        """The network's output index for a class."""
        return label if self.outputs is None else self.outputs[label]

    def target_of(self, label: Label, weight: float | None = None) -> int | Tensor:
        """Target of an image.

        Args:
            label: its class or classes.
            weight: its weight in the loss, None for none.

        Returns:
            the network's output index for its class. For multi-label or weighted images, 1 for each of its classes and
            0 for the others, followed by the weight, if there is one.
        """
        outputs = [self.output_of(number) for number in classes_of(label)]
        if not self.multi_label and weight is None:
            return outputs[0]
        target = torch.zeros(self.num_classes)
        target[outputs] = 1
        return target if weight is None else torch.cat([target, torch.tensor([weight])])

    def __getstate__(self) -> dict[str, Any]:
        """State for a spawned worker, which must import Hugging Face's library before unpickling its objects."""
        state = dict(self.__dict__)
        if self.is_hugging_face:
            state["dataset"] = bytes(ForkingPickler.dumps(self.dataset))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["is_hugging_face"]:
            import_hugging_face()
            state["dataset"] = pickle.loads(state["dataset"])
        self.__dict__.update(state)


class ValSamples(Samples):
    """Validation samples. An unreadable image is an error."""

    def __getitem__(self, index: int) -> tuple[Any, int | Tensor]:
        """Return image and target.

        Raises:
            UnreadableImageError: the image is unreadable.
            MachineError: the storage does not respond.
        """
        try:
            image, label = read_sample(self.dataset, index, PAUSES, self.decode)
        except UnreadableImageError as error:
            raise (MachineError(str(error)) if error.is_storage_error else error) from None
        return self.transform(image), self.target_of(label)


class TrainSamples(Samples):
    """Training samples. Augmentation is determined by the seed and the sample's position in the epoch."""

    def __getitem__(self, sample: SampleIndex) -> tuple[Any, int | Tensor, str]:
        """Return image, target, and the unreadable images that the image replaces, as text (`Replacements.take`).

        Raises:
            UserError: too many images are unreadable.
            MachineError: too many images are unreadable because the storage does not respond.
        """
        replacements, index, attempt = Replacements(), sample.index, 0
        pauses: Sequence[int] = PAUSES
        while True:
            seed_cpu(Stream.AUGMENTATION, self.seed, sample.epoch, sample.position)
            try:
                image, label = read_sample(self.dataset, index, pauses, self.decode)
                break
            except UnreadableImageError as error:
                replacements.add(error)
                pauses = () if error.is_storage_error else pauses  # reading has already been retried
                index = derived_seed(Stream.REPLACEMENT, self.seed, sample.epoch, sample.position, attempt) % len(self)
                attempt += 1
        weights = self.dataset.weights
        target = self.target_of(label, weights[index] if weights else None)
        return self.transform(image), target, replacements.take()


def collate(samples: list[Any]) -> list[Any]:
    """Collate samples into a batch.

    A loader worker moves the batch to shared memory here. If shared memory runs out, this raises an error. In the
    thread that sends the batch, the error would only be printed, and the batch would be lost.
    """
    batch: list[Any] = default_collate(samples)
    if get_worker_info() is not None:
        for part in batch:
            if isinstance(part, Tensor):
                part.share_memory_()
    return batch
