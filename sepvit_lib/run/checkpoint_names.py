"""File names of a run's checkpoints, and the selection of checkpoints to delete."""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any


class CheckpointNames(ABC):
    """File names of a run's checkpoints. Numbered checkpoints are ordered by their position in the run.

    Attributes:
        best: name of the checkpoint with the best score.
        newest: additional name of the newest numbered checkpoint; "" for none.
        pointer: text file with the path of the newest numbered checkpoint; "" for none.
    """

    best: str
    newest: str = ""
    pointer: str = ""

    @abstractmethod
    def position(self, name: str) -> tuple[int, ...] | None:
        """Position of a numbered checkpoint in the run, from its file name; None for other names."""

    @abstractmethod
    def name(self, checkpoint: dict[str, Any]) -> str:
        """File name of a checkpoint."""

    @abstractmethod
    def position_text(self, checkpoint: dict[str, Any]) -> str:
        """Position of a checkpoint in the run, for messages."""

    @abstractmethod
    def outdated(self, saved: list[Path]) -> list[Path]:
        """Select the checkpoints to delete.

        Args:
            saved: the numbered checkpoints, newest first.
        """

    def numbered(self, folder: Path) -> list[Path]:
        """List a folder's numbered checkpoints, newest first."""
        positions = {path: self.position(path.name) for path in folder.glob("*.pth")}
        found = {path: position for path, position in positions.items() if position is not None}
        return sorted(found, key=lambda path: found[path], reverse=True)

    def later(self, folder: Path, checkpoint: dict[str, Any]) -> list[Path]:
        """List the numbered checkpoints in a folder that come after a given checkpoint, newest first."""
        position = self.position(self.name(checkpoint)) or ()
        return [path for path in self.numbered(folder) if (self.position(path.name) or ()) > position]


class StepNames(CheckpointNames):
    """Names of main.py's checkpoints: `checkpoint-<global step>.pth`.

    Args:
        keep: number of numbered checkpoints to keep.
    """

    best = "checkpoint_best.pth"
    newest = "checkpoint.pth"
    FORMAT = "checkpoint-{:08}.pth"

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def position(self, name: str) -> tuple[int, ...] | None:
        """Global step in a file name."""
        match = re.fullmatch(r"checkpoint-(\d{8})\.pth", name)
        return (int(match[1]),) if match else None

    def name(self, checkpoint: dict[str, Any]) -> str:
        """File name of a checkpoint, from its global step."""
        return self.FORMAT.format(checkpoint.get("steps", 0))

    def position_text(self, checkpoint: dict[str, Any]) -> str:
        """Epoch and step at which a run resumes from a checkpoint."""
        return f"epoch {checkpoint['epoch'] + 1}, step {checkpoint['epoch_step']}"

    def outdated(self, saved: list[Path]) -> list[Path]:
        """Select all but the newest `keep` checkpoints."""
        return saved[self.keep :]
