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
    """What is known of a data set; utils.data.custom completes what is None in a custom one."""

    name: str  # of datasets.yaml, or "custom"
    num_classes: int | None
    input_size: int | None  # side of the network's input in pixels
    mean: tuple[float, float, float] | None  # of pixel values in 0..1
    std: tuple[float, float, float] | None


def canonical(name: str) -> str:
    """The name of datasets.yaml that a spelling means, whatever its case; others as they are."""
    plain = re.sub("[-_]", "", name.lower())
    known = {re.sub("[-_]", "", each): each for each in _FACTS} | _SPELLINGS
    return known.get(plain, name)


def folder_names(name: str) -> list[str]:
    """Names of folders for a data set's files: its own, and the published one if that differs."""
    return [name, *filter(None, [_PUBLISHED_FOLDERS.get(name)])]


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --dataset, which may be `required`, and the flags that describe a custom one."""
    add = parser.add_argument_group("data set").add_argument
    add("--dataset", required=required, help=f"{', '.join(_FACTS)}, or custom")
    meant = "custom only; counted from the class folders when left out"
    add("--num-classes", type=bounded(int, 2), metavar="N", help=meant)
    meant = "custom only: pixels a side; left out, the images' own where all are equal squares"
    add("--input-size", type=bounded(int, 8), metavar="S", help=meant)
    meant = "custom only: of pixel values between 0 and 1; left out, of all pixels"
    for flag in ("--mean", "--std"):
        add(flag, type=bounded(float), nargs=3, metavar=("R", "G", "B"), help=meant)


def from_arguments(args: argparse.Namespace, inferred: bool = False) -> Dataset:
    """The data set that flags name, whose facts may be left out if they are `inferred` later."""
    names = ("num_classes", "input_size", "mean", "std")
    values = {"--" + name.replace("_", "-"): getattr(args, name) for name in names}
    given = [flag for flag, value in values.items() if value is not None]
    if args.dataset != "custom":
        dataset = named(args.dataset)
        if given:
            raise UserError(f"{given[0]} goes with --dataset custom; {args.dataset} has its own")
        return dataset
    missing = [flag for flag in values if flag not in ("--num-classes", *given)]
    if missing and not inferred:
        raise UserError(f"--dataset custom also needs {', '.join(missing)}")
    if args.std and min(args.std) <= 0:
        raise UserError(f"--std must be positive, not {' '.join(map(str, args.std))}")
    mean, std = (tuple(each) if each else None for each in (args.mean, args.std))
    return Dataset("custom", args.num_classes, args.input_size, mean, std)


def named(name: str) -> Dataset:
    """The data set of that name or spelling; raises UserError for an unknown one."""
    name = canonical(name)
    if name not in _FACTS:
        close = did_you_mean(name, _FACTS)
        raise UserError(f"unknown data set {name!r}{close} (known: {', '.join(_FACTS)}, custom)")
    facts = _FACTS[name]
    return Dataset(
        name, facts["classes"], facts["input"], tuple(facts["mean"]), tuple(facts["std"])
    )
