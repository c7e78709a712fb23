"""Facts of the data sets: classes, input size, normalisation."""

import argparse
import dataclasses
import re
from pathlib import Path

import yaml

from utils.cli import UserError, bounded, did_you_mean

# Spellings of the field, without "-" and "_"; those of datasets.yaml are known in the same way.
_SPELLINGS = {
    "imagenet": "imagenet1k",
    "imagenetnette": "imagenette",
    "imagenetwoof": "imagewoof",
    "tinyimagenet200": "tiny_imagenet",
}
_PUBLISHED_FOLDERS = {"imagenette": "imagenet-nette"}
_FACTS = yaml.safe_load(Path(__file__).with_name("datasets.yaml").read_text())


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known of a data set.

    Attributes:
        name: a name of datasets.yaml, or "custom".
        num_classes: number of classes; None for a custom data set until its folders are counted.
        input_size: side of the network's input in pixels.
        mean, std: three floats each, of pixel values in 0..1. Like the input size, None for a
            custom data set whose flags leave it out, until utils.data.custom completes it.
    """

    name: str
    num_classes: int | None
    input_size: int | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    @property
    def evaluation_resize(self) -> int:
        """Shorter side before the central crop: 256 for 224; small inputs are not cropped."""
        return self.input_size * 256 // 224 if self.input_size >= 128 else self.input_size


def names() -> list[str]:
    """All data sets that are known by name."""
    return list(_FACTS)


def canonical(name: str) -> str:
    """The name of datasets.yaml that a spelling means, whatever its case; others as they are."""
    plain = re.sub("[-_]", "", name.lower())
    known = {re.sub("[-_]", "", each): each for each in _FACTS}
    return known.get(plain) or _SPELLINGS.get(plain, name)


def folder_names(name: str) -> list[str]:
    """Names of folders for a data set's files: its own, and the published one if that differs."""
    return [name, *filter(None, [_PUBLISHED_FOLDERS.get(name)])]


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --dataset, which may be `required`, and the flags that describe a custom one."""
    group = parser.add_argument_group("data set")
    group.add_argument("--dataset", required=required, help=f"{', '.join(names())}, or custom")
    group.add_argument(
        "--num-classes",
        type=bounded(int, 2),
        metavar="N",
        help="custom only; counted from the class folders when left out",
    )
    group.add_argument(
        "--input-size",
        type=bounded(int, 8),
        metavar="S",
        help="custom only: pixels a side; left out, the images' own where all are equal squares",
    )
    for flag in ("--mean", "--std"):
        group.add_argument(
            flag,
            type=bounded(float),
            nargs=3,
            metavar=("R", "G", "B"),
            help="custom only: of pixel values between 0 and 1; left out, of all pixels",
        )


def from_arguments(args: argparse.Namespace, inferred: bool = False) -> Dataset:
    """The data set that the flags of add_arguments name.

    Args:
        args: the flags.
        inferred: whether what a custom data set leaves out is inferred from its images later.

    Raises:
        UserError: flags that clash, or are missing.
    """
    given = {name: getattr(args, name) for name in ("num_classes", "input_size", "mean", "std")}
    if args.dataset == "custom":
        missing = [name for name in ("input_size", "mean", "std") if given[name] is None]
        if missing and not inferred:
            flags = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise UserError(f"--dataset custom also needs {flags}")
        if args.std and min(args.std) <= 0:
            raise UserError(f"--std must be positive, not {' '.join(map(str, args.std))}")
        mean, std = (tuple(each) if each else None for each in (args.mean, args.std))
        return Dataset("custom", args.num_classes, args.input_size, mean, std)
    dataset = named(args.dataset)
    for name, value in given.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} goes with --dataset custom; {args.dataset} has its own")
    return dataset


def named(name: str) -> Dataset:
    """The data set of that name or spelling; raises UserError for an unknown one."""
    name = canonical(name)
    if name not in _FACTS:
        close = did_you_mean(name, names())
        raise UserError(f"unknown data set {name!r}{close} (known: {', '.join(names())}, custom)")
    facts = _FACTS[name]
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    return Dataset(name, facts["classes"], facts["input"], mean, std)
