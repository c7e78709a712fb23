"""The facts of a custom data set that no flag gives, from its images."""

import dataclasses
import math

import numpy as np

from utils.cli import UserError
from utils.data.datasets import Dataset
from utils.data.folders import ImageFolder
from utils.data.images import decode, inspect, map_files

_GREY_LEVELS = 256


def complete(
    dataset: Dataset,
    folder: ImageFolder,
    sizes: np.ndarray | None,
    recorded: dict | None = None,
    recorded_by: str = "",
) -> Dataset:
    """A data set with nothing left open; says what was taken for facts that no flag gives.

    Facts `recorded` by its label set, or by what the teacher was trained with, count more than
    those of its images, whose heights and widths are `sizes`, int [images, 2] (None: read where
    they are needed). Raises UserError where the images are no squares of one size and no input
    size is given, or a channel is the same in all pixels.
    """
    dataset = dataclasses.replace(dataset, num_classes=len(folder.classes))
    missing = [name for name in ("input_size", "mean", "std") if getattr(dataset, name) is None]
    if not missing:
        return dataset
    if not recorded:
        recorded, recorded_by = {}, f"the images in {folder.root}"
        if "input_size" in missing:
            recorded["input_size"] = _common_size(folder, sizes)
        if {"mean", "std"} & {*missing}:
            recorded["mean"], recorded["std"] = _mean_and_std(folder)
    facts = {name: recorded[name] for name in missing}
    facts |= {name: tuple(facts[name]) for name in ("mean", "std") if name in facts}
    dataset = dataclasses.replace(dataset, **facts)
    mean, std = (" ".join(f"{value:.4g}" for value in each) for each in (dataset.mean, dataset.std))
    print(
        f"custom data set: {dataset.num_classes} classes, input size {dataset.input_size}, mean "
        f"{mean}, std {std}; {', '.join(missing).replace('_', ' ')} from {recorded_by}"
    )
    return dataset


def _common_size(folder: ImageFolder, sizes: np.ndarray | None) -> int:
    """The side of all images."""
    if sizes is None:
        sizes, _ = inspect(folder)
    if sizes.min() != sizes.max():
        heights, widths = (f"{each.min()} to {each.max()}" for each in sizes.T)
        raise UserError(
            f"--dataset custom also needs --input-size: the images in {folder.root} are not all "
            f"squares of one size (heights {heights}, widths {widths})"
        )
    return int(sizes.max())


def _mean_and_std(folder: ImageFolder) -> tuple[list[float], list[float]]:
    """Exact mean and standard deviation of each channel over all pixels, of values in 0..1."""
    counts = np.zeros(3 * _GREY_LEVELS, dtype=np.int64)
    for histogram in map_files(lambda path: decode(path).histogram(), folder.files, "mean and std"):
        counts += histogram
    means, stds = [], []
    for channel in counts.reshape(3, _GREY_LEVELS).tolist():
        total, first, second = (
            sum(count * level**power for level, count in enumerate(channel)) for power in range(3)
        )
        means.append(first / total / 255)
        # In whole numbers, which lose nothing however many pixels there are.
        stds.append(math.sqrt(total * second - first**2) / total / 255)
    if min(stds) == 0:
        raise UserError(f"all pixels in {folder.root} have a channel alike: give --mean and --std")
    return means, stds
