"""Top-1 of whatever the benchmarks measure, on validation images; training images to quantise it with."""

if not __package__:
    import _repository  # noqa: F401
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import main
from datasets import LoaderSettings, build_train_loader, build_val_loader
from sepvit_lib.training.checkpoints import read_checkpoint
from tools.benchmark_networks import main_settings
from tools.benchmark_runtimes import CALIBRATION_IMAGES


def calibration_images(model: str, data_path: str, size: int) -> Tensor:
    """Training images, prepared as for validation, to quantise a network with: N × 3 × H × W.

    Augmentation would widen the range of values: random erasing fills regions with noise.

    Raises:
        UserError: there are none.
    """
    flags = ("--data-path", data_path, "--input-size", str(size), "--num-workers", "0")
    args = main_settings(model, torch.device("cpu"), CALIBRATION_IMAGES, *flags)
    data, val = (main.build_data(args, is_train) for is_train in (True, False))
    data = replace(data, transform=val.transform)
    args.batch_size = min(CALIBRATION_IMAGES, len(data))
    return next(iter(build_train_loader(data, main.settings_from(args, LoaderSettings))))[0]


@dataclass(frozen=True)
class Validation:
    """Validation images of a data set.

    Attributes:
        loader: its batches.
        classes: number of its classes.
    """

    loader: DataLoader
    classes: int

    @classmethod
    def build(cls, model: str, data_path: str, size: int, checkpoint: str) -> "Validation":
        """Find the images, and read them, as main.py does to evaluate a checkpoint.

        Raises:
            UserError: there are none, or the checkpoint is of other classes.
        """
        flags, what = ("--data-path", data_path, "--input-size", str(size), "--eval"), f"--checkpoint {checkpoint}"
        held = read_checkpoint(checkpoint, what)
        args, preprocessing = main.adopt_reading(main_settings(model, torch.device("cpu"), 64, *flags), held, what)
        data = main.build_data(args, False, preprocessing).matched(held.get("classes"), what)
        return cls(build_val_loader(data, main.settings_from(args, LoaderSettings)), data.num_classes)

    def top1(self, outputs: Callable[[Tensor], Tensor], batch_size: int) -> float:
        """Top-1 (%) of a function from batches of images to logits.

        Args:
            outputs: the function. It may take batches of `batch_size` images only: the last one is filled up.
            batch_size: images per batch.
        """
        correct = total = 0
        for images, targets in self.loader:
            for batch, labels in zip(images.split(batch_size), targets.split(batch_size)):
                filled = F.pad(batch, (0, 0, 0, 0, 0, 0, 0, batch_size - len(batch)))
                correct += int((outputs(filled)[: len(batch)].argmax(dim=1) == labels).sum())
                total += len(batch)
        return 100 * correct / total
