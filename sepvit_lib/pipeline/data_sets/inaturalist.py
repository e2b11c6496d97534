"""iNaturalist 2018 and 2019."""

import json
from pathlib import Path
from typing import Any

from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.pipeline.data_sets.base import ImageFiles


class INaturalist(ImageFiles):
    """iNaturalist 2018 and 2019 at one level of the taxonomy.

    Classes are numbered in the order of their first appearance in the training annotations. Images are at the paths
    given in the JSON files, `<split>/<kingdom>/<category id>/<file>`, or at the same paths without the kingdom folder.

    Args:
        root: folder with train<year>.json, val<year>.json, categories.json and the images.
        train: read the training images; otherwise, the validation images.
        year: 2018 or 2019.
        category: level of the taxonomy, one of `datasets.INAT_CATEGORIES`.

    Raises:
        UserError: a file is missing or is not JSON, or the images are missing.
    """

    def __init__(self, root: Path, train: bool, year: int, category: str) -> None:
        self.root = str(root)
        try:
            self._read_annotations(root, train, year, category)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{setting('data_path', root)}: annotations are not iNaturalist's ({error!r})") from None
        if not self.samples or not Path(self.samples[0][0]).is_file():
            path = self.samples[0][0] if self.samples else "all"
            raise UserError(f"{setting('data_path', root)}: no image at {path}")

    def _read_annotations(self, root: Path, train: bool, year: int, category: str) -> None:
        taxonomy = {entry.get("id", i): entry for i, entry in enumerate(_read_json(root / "categories.json"))}
        training = _read_json(root / f"train{year}.json")
        names = (str(taxonomy[annotation["category_id"]][category]) for annotation in training["annotations"])
        self.classes = list(dict.fromkeys(names))
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        images = (training if train else _read_json(root / f"val{year}.json"))["images"]
        with_kingdom: dict[Path, bool] = {}
        self.samples = []
        for image in images:
            split, kingdom, category_id, file = image["file_name"].split("/")[-4:]
            folder = root / split / kingdom
            if folder not in with_kingdom:
                with_kingdom[folder] = folder.is_dir()
            path = (folder if with_kingdom[folder] else root / split) / category_id / file
            self.samples.append((str(path), self.class_to_idx[str(taxonomy[int(category_id)][category])]))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{setting('data_path', path.parent)}: {path.name} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{setting('data_path', path.parent)}: {path.name} is not JSON ({error})") from None
