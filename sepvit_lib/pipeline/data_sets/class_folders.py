"""A folder with one folder of images per class."""

import os
from collections import Counter

from sepvit_lib.common.class_names import canonical, listed
from sepvit_lib.common.errors import UserError, setting
from sepvit_lib.pipeline.data_sets.base import ImageFiles
from sepvit_lib.pipeline.image_files import ARRAY_SUFFIX, IMAGE_SUFFIXES, images_in, is_hidden

UNLABELLED = "unlabelled"  # name of the class of images without labels


class ClassFolders(ImageFiles):
    """Images in class folders. Folders whose names differ only in Unicode form are one class.

    Args:
        root: the folder.
        arrays: whether NumPy files are images, too.
        is_labelled: whether the folders are classes. If not, all images are of one class.

    Raises:
        UserError: the folder has no class folder, or a class folder has no images.
        OSError: a folder cannot be read.
    """

    def __init__(self, root: str, arrays: bool = False, is_labelled: bool = True) -> None:
        self.root = root
        self.samples = []
        self.skipped = Counter()
        folders: dict[str, list[str]] = {}
        for entry in sorted(os.scandir(root), key=lambda entry: canonical(entry.name)):
            if is_labelled and entry.is_dir() and not is_hidden(entry.name):
                folders.setdefault(canonical(entry.name), []).append(entry.path)
        if not is_labelled:
            folders[UNLABELLED] = [root]
        self.classes = list(folders)
        if not folders:
            raise UserError(
                f"{setting('data_path', root)}: contains no class folders (expected one folder of images per class)"
            )
        for label, paths in enumerate(folders.values()):
            for images, skipped in (images_in(path, arrays) for path in paths):
                self.samples += [(image, label) for image in images]
                self.skipped += skipped
        if empty := [self.classes[label] for label in sorted(set(range(len(folders))) - {n for _, n in self.samples})]:
            raise UserError(
                f"{setting('data_path', root)}: no images in the class folders {listed(empty)} (images end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}; with {setting('in_chans')}, also {ARRAY_SUFFIX})"
            )
