"""Image folders: one sub-folder per class, in text order, and which files in them are images."""

import collections
import dataclasses
import hashlib
import itertools
import os
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from utils.cli import UserError
from utils.data.views import ORDER, shuffle
from utils.files import read_json

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".avif"}
IMAGE_ENDINGS |= {".tif", ".tiff", ".ppm", ".pgm"}
# Beside class folders whose images are selected ones, not synthesised; a field of it says of which.
SELECTION, SOURCE = "selection.json", "source_listing_sha256"
# What macOS, network storage, archives and notebooks leave beside images; names with a dot, too.
_LEFT_BEHIND = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information"}


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The images below a folder with one sub-folder per class."""

    root: Path
    classes: list[str]  # names of the class folders, sorted as text: a class is its position
    files: list[Path]  # all image files, class by class, sorted by name within a class
    labels: torch.Tensor  # int64 [images], the class of every file

    def counts(self) -> list[int]:
        """Images per class."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def sample(self, count: int) -> "ImageFolder":
        """The folder with at most `count` of its images, chosen at random but always the same."""
        rows = np.sort(shuffle(0, ORDER, 0, len(self.files))[:count])
        files = [self.files[row] for row in rows]
        return dataclasses.replace(self, files=files, labels=self.labels[rows])

    def listing_sha256(self) -> str:
        """Hex SHA-256 over names and sizes of all files: cheap, and other images differ in it."""
        digest = hashlib.sha256()
        for path in self.files:
            name = path.relative_to(self.root).as_posix()
            digest.update(f"{name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def ipc(self) -> int:
        """Images per class; raises UserError when the classes differ."""
        counts = self.counts()
        usual = max(set(counts), key=counts.count)
        for name, count in zip(self.classes, counts, strict=True):
            if count != usual:
                raise UserError(
                    f"{self.root / name} has {count} images where other classes have {usual}; "
                    "distilled images need the same number in every class"
                )
        return usual


def scan(root: Path, num_classes: int | None = None) -> ImageFolder:
    """Lists an image folder; links to files and folders count as what they lead to.

    Raises UserError for whatever would give other images or classes than are meant: no folder, a
    broken link, a pipe or socket, a name that is no text, other than `num_classes` classes (None:
    any number), a class without images, or class folders whose numbers are not in text order.
    """
    if not root.is_dir():
        raise UserError(f"image folder not found: {root}")
    classes = sorted(entry.name for entry in _entries(root) if entry.is_dir())
    if not classes or classes == ["images"]:
        raise UserError(
            f"{root} has no class folders: it must hold one sub-folder per class "
            "(scripts/prepare_val.py sorts validation images that come side by side)"
        )
    if {*classes} <= {"train", "val", "test"}:
        raise UserError(f"{root} holds {', '.join(classes)}: give one of these folders")
    _check_order(root, classes)
    if num_classes is not None and len(classes) != num_classes:
        raise UserError(f"{root} has {len(classes)} class folders, the data set {num_classes}")
    files, labels, ignored = [], [], collections.Counter()
    for label, name in enumerate(classes):
        images, others = [], collections.Counter()
        for path in sorted(_files_below(root / name, ancestors=())):
            if (ending := path.suffix.lower()) in IMAGE_ENDINGS:
                images.append(path)
            else:
                others[ending or "without ending"] += 1
        if not images:
            only = f", only files that are not read ({', '.join(others)})" if others else ""
            raise UserError(f"class folder {root / name} has no images{only}")
        ignored += others
        files += images
        labels += [label] * len(images)
    if ignored:
        kinds = ", ".join(f"{count} {ending}" for ending, count in ignored.items())
        print(f"{root}: {ignored.total()} files that are not images are ignored ({kinds})")
    return ImageFolder(root, classes, files, torch.tensor(labels))


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    """What in a folder is data: neither hidden nor left behind by other programs, nor unusable."""
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name in _LEFT_BEHIND:
            continue
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            name = repr(os.fsencode(entry.path))
            raise UserError(f"the name {name} is no valid text; convmv renames such") from None
        if entry.is_symlink() and not os.path.exists(entry):  # noqa: PTH110 - as for loops, False
            raise UserError(f"{entry.path} is a broken link; mend or remove it")
        yield entry


def _files_below(folder: Path, ancestors: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """The files below a folder; a link to one of the folders that it lies in is not followed."""
    facts = folder.stat()
    here = (facts.st_dev, facts.st_ino)
    if here in ancestors:
        return
    for entry in _entries(folder):
        path = folder / entry.name
        if entry.is_dir():
            yield from _files_below(path, (*ancestors, here))
        elif entry.is_file():
            yield path
        else:  # a named pipe would keep its reader waiting for ever
            raise UserError(f"{path} is neither a file nor a folder; remove it")


def _check_order(root: Path, classes: list[str]) -> None:
    """Stops when folders are numbered ("7", "class_7") and text order is not number order."""
    numbered = [re.fullmatch(r"(\D*)(\d+)", name) for name in classes]
    if not all(numbered) or len({found[1] for found in numbered}) > 1:
        return
    for before, after in itertools.pairwise(numbered):
        if int(before[2]) >= int(after[2]):
            prefix = shlex.quote(before[1]) if before[1] else ""
            raise UserError(
                f"{root}: as text, folder {before[0]!r} sorts before {after[0]!r}, so the class "
                f"order would be scrambled; name the folders with equally many digits: "
                f"(cd {shlex.quote(str(root))} && for i in {prefix}[0-9]*; do mv -nT -- "
                f'"$i" {prefix}"$(printf %05d "$((10#${{i#{prefix}}}))")"; done)'
            )


def same_classes(first: list[str], second: list[str]) -> bool:
    """Whether two lists of class folders can name the same classes in the same order.

    Index folders (00000 ..., 0 ... or new000 ...) and WordNet ids (n01440764 ...) do; any other
    difference in names is a difference of class lists.
    """
    kinds = {_kind(first), _kind(second)}
    if kinds == {"index", "WordNet"}:
        return len(first) == len(second)
    as_named = (lambda name: int(name.removeprefix("new"))) if kinds == {"index"} else str
    return [*map(as_named, first)] == [*map(as_named, second)]


def check_same_classes(folder: ImageFolder, classes: list[str], owner: str) -> None:
    """Raises UserError unless the folder's classes can be those of `owner`, see same_classes."""
    if same_classes(folder.classes, classes):
        return
    names = ", ".join(sorted({*folder.classes} ^ {*classes}))
    differ = textwrap.shorten(names, 100, placeholder=" ...")
    how = f"in one of them alone: {differ}" if differ else "they differ in order"
    raise UserError(
        f"{folder.root} has {len(folder.classes)} class folders, {owner} has {len(classes)}; the "
        f"class lists must be the same ({how})"
    )


def _kind(classes: list[str]) -> str:
    """ "index" for numbers (SRe2L has new000, ...), "WordNet" for n01440764, ..., else "names"."""
    for kind, pattern in (("index", r"(new)?\d+"), ("WordNet", r"n\d{8}")):
        if all(re.fullmatch(pattern, name) for name in classes):
            return kind
    return "names"


def published_names(classes: list[str]) -> list[str]:
    """Folder names of distilled images: 00000 ... for numbers and WordNet ids, else the same."""
    if _kind(classes) == "names":
        return classes
    return [f"{label:05d}" for label in range(len(classes))]


def are_selected(root: Path) -> bool:
    """Whether scripts/prepare_distilled.py selected the images of a folder."""
    return (root / SELECTION).is_file()


def selection_source(root: Path) -> str | None:
    """`listing_sha256` of the folder that it selected them from; None where it did not."""
    selection = read_json(root / SELECTION) if are_selected(root) else None
    return selection.get(SOURCE) if isinstance(selection, dict) else None
