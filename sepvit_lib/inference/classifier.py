"""A trained classifier with its preprocessing and class names."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg_value
from torch import Tensor, nn

from sepvit import VARIANTS, entries_under, variant_of
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.common.saved_settings import img_size_of, settings_in
from sepvit_lib.inference.exported import Kind, kind_of, open_file
from sepvit_lib.inference.images import read_image
from sepvit_lib.networks import create_network, to_device
from sepvit_lib.pipeline.image_files import EXIF, orientation_for
from sepvit_lib.pipeline.preprocessing import Preprocessing
from sepvit_lib.run import checkpoints
from sepvit_lib.run.state import Precision

CONFIG = "config.json"  # file in a model folder with timm's layout
THRESHOLD = 0.5  # probability from which an image has a label


@dataclass(frozen=True)
class Description:
    """Description of a classifier's inputs and outputs. Exported files contain this description as JSON.

    Attributes:
        model: timm's name of the network.
        classes: names of the classes, in the order of the outputs.
        preprocessing: transform from an image to the network's input.
        orientation: 'exif' to turn images upright, or 'stored' to keep them as stored.
        model_kwargs: other arguments of the network's constructor.
        multi_label: whether an image may have several labels, or none.
        batch_size: images per call of an exported file; None for any number.
    """

    model: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    orientation: str = EXIF
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    multi_label: bool = False
    batch_size: int | None = None

    def to_json(self) -> str:
        """Return the description as JSON."""
        return json.dumps({**vars(self), "preprocessing": self.preprocessing.to_json()}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Description":
        """Read the output of `to_json`.

        Raises:
            ValueError: the text is not a description.
        """
        try:
            fields = json.loads(text)
            preprocessing = Preprocessing.from_json(fields["preprocessing"])
            names = ("orientation", "model_kwargs", "multi_label", "batch_size")
            others = {name: fields[name] for name in names if name in fields}
            return cls(fields["model"], tuple(fields["classes"]), preprocessing, **others)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a classifier's description ({error!r})") from None


@dataclass(frozen=True)
class Preparation:
    """Function object that turns an image into a classifier's input. It is pickled for loader workers.

    Attributes:
        preprocessing: see `Description`.
        takes_pixels: whether the classifier takes raw pixels and preprocesses them itself.
    """

    preprocessing: Preprocessing
    takes_pixels: bool = False

    def __call__(self, image: Image.Image | Tensor) -> Any:
        """Return an image, RGB or C × H × W, as a normalised tensor, C × H × W, or as pixels, H × W × 3, 0 to 255."""
        if self.takes_pixels:
            return torch.from_numpy(np.array(self.preprocessing.bounded(image)))
        return self.preprocessing.transform()(image)


@dataclass(frozen=True)
class Classifier:
    """A trained classifier. Called with an image, it returns the classes and their probabilities.

    Attributes:
        description: description of the classifier's inputs and outputs.
        prepare: turns an RGB image into the classifier's input.
        run: computes logits, B × classes, from inputs, B × 3 × H × W, or from the pixels of one image, as returned by
            `prepare`.
        network: the network itself; None for an exported file.
        is_named: whether the class names are known. If not, they are class indices or assumed to be ImageNet's names.
        embed: computes logits, and the pooled features before the classifier, B × C; None for an exported file.
    """

    description: Description
    prepare: Preparation
    run: Callable[[Tensor], Tensor]
    network: nn.Module | None = None
    is_named: bool = True
    embed: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def __call__(self, image: str | Path | Image.Image) -> list[tuple[str, float]]:
        """Classify an image: a file or a decoded image. It is turned upright if the training images were.

        Returns:
            name and probability (0 to 1) of each class, the likeliest first.

        Raises:
            UserError: the file cannot be read.
        """
        return self.ranked(self.probabilities(self.logits(self.inputs([image])))[0])

    def features(self, images: Sequence[str | Path | Image.Image], batch_size: int = 32) -> Tensor:
        """Compute the features of images before the classifier, images × C, in float32 on the CPU. See `__call__`.

        Args:
            images: files or decoded images.
            batch_size: images per forward pass.

        Raises:
            ValueError: the classifier is an exported file.
            UserError: a file cannot be read.
        """
        batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        return torch.cat([self.logits_and_features(self.inputs(batch))[1] for batch in batches])

    def inputs(self, images: Sequence[str | Path | Image.Image]) -> list[Tensor]:
        """Prepare images, given as files or as images, for `logits`.

        Raises:
            UserError: a file cannot be read.
        """
        made, channels = self.description, self.description.preprocessing.channels
        return [self.prepare(read_image(image, f"{image}", made.orientation, channels)) for image in images]

    def ranked(self, probabilities: Tensor) -> list[tuple[str, float]]:
        """Name and probability of each class, the likeliest first, from the probabilities of the classes."""
        values, order = probabilities.sort(descending=True, stable=True)
        return [(self.description.classes[i], value) for i, value in zip(order.tolist(), values.tolist())]

    def logits_and_features(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute logits and the features before the classifier, images × C, in float32 on the CPU. See `logits`.

        Raises:
            ValueError: the classifier is an exported file.
        """
        if self.embed is None:
            raise ValueError("an exported file computes only logits; load the checkpoint")
        logits, features = self.embed(torch.stack(list(inputs)))
        return logits.float().cpu(), features.float().cpu()

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Compute logits, images × classes, in float32 on the CPU.

        Args:
            inputs: the output of `prepare` for each image.
        """
        if self.prepare.takes_pixels:
            return torch.cat([self.run(pixels).float().cpu() for pixels in inputs])
        return self.run(torch.stack(list(inputs))).float().cpu()

    def probabilities(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Compute the probabilities of the classes, images × C, from logits divided by a temperature.

        If an image may have several labels, the probability of each class is independent of the others.
        """
        logits = logits / temperature
        return logits.sigmoid() if self.description.multi_label else logits.softmax(dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


def load_classifier(
    path: str | Path, model: str = "", averaged: bool = False, precision: Precision | None = None, what: str = ""
) -> Classifier:
    """Load a classifier from a checkpoint, a folder or an exported file.

    Args:
        path: a checkpoint of main.py, a published one or bare weights (a path or an https address), a folder in timm's
            layout, or an exported file.
        model: timm's name of the network, for files that do not specify it.
        averaged: use the averaged weights.
        precision: device and number format; None for float32 on the CPU.
        what: description of the file for messages; by default, the setting `resume` and the path.

    Raises:
        UserError: the file is missing or damaged, contains no classifier or a network other than `model`, or needs a
            missing package.
    """
    path, precision = str(path), precision or Precision(torch.device("cpu"), None)
    what = what or setting("resume", path)
    kind, is_folder = kind_of(Path(path)), Path(path).is_dir()
    if averaged and (kind or is_folder):
        raise UserError(f"{what}: has no averaged weights; omit {setting('averaged')}")
    if kind:
        classifier = _exported(path, kind, what, precision)
    else:
        loaded = _from_folder(Path(path), what) if is_folder else _from_checkpoint(path, model, averaged, what)
        classifier = _classifier(*loaded, precision)
    held = classifier.description.model
    if model and held.split(".")[0] != model.split(".")[0]:
        raise UserError(f"{what}: contains {held}, not {model}; omit {setting('model')}")
    return classifier


def _classifier(
    network: nn.Module, description: Description, names: Sequence[str] | None, precision: Precision
) -> Classifier:
    to_device(network, precision.device).eval()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode(), precision.autocast():
            return network(precision.images(images))

    def embed(images: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = network  # with timm's interface
        with torch.no_grad(), precision.autocast():
            maps = model.forward_features(precision.images(images))
            return model.forward_head(maps), model.forward_head(maps, pre_logits=True)

    prepare = Preparation(description.preprocessing)
    return Classifier(description, prepare, run, network, is_named=names is not None, embed=embed)


def _exported(path: str, kind: Kind, what: str, precision: Precision) -> Classifier:
    opened = open_file(Path(path), kind, what, precision.device)
    try:
        description = Description.from_json(opened.description)
    except ValueError:
        raise UserError(f"{what}: lacks its classes and preprocessing; export it with tools/export.py") from None
    run = partial(in_batches, opened.run, description.batch_size)
    return Classifier(description, Preparation(description.preprocessing, opened.takes_pixels), run)


def in_batches(run: Callable[[Tensor], Tensor], size: int | None, images: Tensor) -> Tensor:
    """Compute logits in batches of `size` images, the last padded with its last image; None for a single batch."""
    if size is None:
        return run(images)
    order = torch.arange(-(-len(images) // size) * size).clamp(max=len(images) - 1)
    return torch.cat([run(images[batch]) for batch in order.split(size)])[: len(images)]


def _from_folder(folder: Path, what: str) -> tuple[nn.Module, Description, Sequence[str] | None]:
    """Load a folder in timm's layout. Also returns the class names; None if the folder does not contain them."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{what}: a folder without {CONFIG}; choose a checkpoint in it, or a folder in timm's layout")
    try:
        network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # of any type, for damaged files and unsupported networks
        raise UserError(f"{what}: timm cannot load it ({' '.join(str(error).split())[:200]})") from None
    fields = network.pretrained_cfg
    config, names = json.loads((folder / CONFIG).read_text(encoding="utf-8")), fields.get("label_names")
    description = Description(
        fields["architecture"],
        class_names(names, network.num_classes),
        Preprocessing.from_timm(fields),
        config.get("orientation", EXIF),
        multi_label=config.get("multi_label", False),
    )
    return network, description, names


def _from_checkpoint(
    path: str, model: str, averaged: bool, what: str
) -> tuple[nn.Module, Description, Sequence[str] | None]:
    """Load a checkpoint. Also returns the class names; None if the checkpoint does not contain them."""
    checkpoint = checkpoints.read_checkpoint(path, what)
    if averaged and not checkpoints.has_averaged_weights(checkpoint):
        raise UserError(f"{what}: has no averaged weights; omit {setting('averaged')}")
    weights = checkpoints.weights_of(checkpoint, what, prefer_ema=averaged)
    name = _model_name(model, checkpoint, weights, what)
    num_classes = _count_classes(name, weights, what)
    default: Any = get_pretrained_cfg_value(name, "input_size")
    size = img_size_of(checkpoint) or default[1:]
    kwargs = checkpoints.model_kwargs_of(checkpoint, what)
    network = create_network(f"{what}, model {name}", name, num_classes, size, model_kwargs=kwargs)
    hint, img_size = f"name it with {setting('model')}", img_size_of(checkpoint)
    checkpoints.load_weights(network, weights, what, variant_hint=hint, img_size=img_size)
    names = checkpoint.get("classes")
    preprocessing = Preprocessing.of_weights(checkpoint, name, size).varied(kwargs.get("in_chans", 3))
    classes, orientation = class_names(names, num_classes), orientation_for(checkpoint.get("reading"))
    multi_label = settings_in(checkpoint).get("multi_label", False)
    description = Description(name, classes, preprocessing, orientation, kwargs, multi_label)
    return network, description, names


def _model_name(model: str, checkpoint: Mapping[str, Any], weights: dict[str, Tensor], what: str) -> str:
    """Find the network's name: the given name, the name in the checkpoint's settings, or the variant of the weights."""
    name = model or settings_in(dict(checkpoint)).get("model") or variant_of(weights)
    if not name:
        if variant := variant_of(entries_under(weights, "backbone")):
            advice = "use segmentation/predict.py or detection/predict.py"
            raise UserError(f"{what}: contains a segmentor or detector with {variant}, not a classifier; {advice}")
        raise UserError(f"{what}: does not specify its model; name it with {setting('model')}")
    if not timm.is_model(name):
        raise UserError(f"{setting('model', name)}: unknown; choose {', '.join(VARIANTS)}, or a timm model")
    return name


def _count_classes(name: str, weights: Mapping[str, Tensor], what: str) -> int:
    heads = get_pretrained_cfg_value(name, "classifier")
    found = checkpoints.classifier_of(weights, heads)
    if not found:
        raise UserError(f"{what}: contains no classifier ({name} has it in {heads}); fine-tune it with main.py first")
    return len(weights[found[0]])


def class_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return readable class names: words for ImageNet's WordNet IDs (n01440764), class indices if names are unknown.

    Duplicate names are followed by the WordNet ID or the index of the class.

    Args:
        names: class names in the data set; None if unknown. 1000 classes without names are assumed to be ImageNet's.
        num_classes: number of classes.
    """
    if names is None or len(names) != num_classes:
        names = ImageNetInfo().label_names() if num_classes == 1000 else [str(index) for index in range(num_classes)]
    described: Any = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)  # by WordNet ID
    words = [described.get(name, name) for name in names]
    count = Counter(words)  # two of ImageNet's classes are called crane
    return tuple(
        word if count[word] == 1 else f"{word} ({name if name != word else index})"
        for index, (word, name) in enumerate(zip(words, names))
    )
