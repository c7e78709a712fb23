"""Recipes: which views get a label where no flag says so."""

import argparse

from relabel.teacher import Ensemble
from utils.data import images
from utils.data.datasets import Dataset
from utils.data.folders import ImageFolder
from utils.data.views import ViewSpec, draw

RECIPES = ("published", "auto")
_PUBLISHED = {"mix": "cutmix", "min_scale": 0.08}
_LARGE = {"mix": "none", "min_scale": 0.9}
_SURE = 93  # percent
_PROBED = 1024  # views, and images at most


def advise(small_crops_top1: float) -> dict[str, object]:
    """The flags of the recipe "auto", by name. Source: analysis/study.md.

    Args:
        small_crops_top1: what `probe` measures, in percent.
    """
    return _PUBLISHED if small_crops_top1 >= _SURE else _LARGE


def probe(
    args: argparse.Namespace, teachers: Ensemble, folder: ImageFolder, dataset: Dataset
) -> float:
    """In how many unmixed crops of 8 % and more the teacher names the class, in percent.

    Of a thousand views, with BatchNorm's running statistics.
    """
    few, device = folder.sample(_PROBED), teachers.runtime.device
    sizes, _ = images.inspect(few)
    source = images.open_images(few, sizes, dataset, device, args.workers)
    spec = ViewSpec(dataset.input_size, args.batch_size, mix="none")
    labels, passes, hits = few.labels.to(device), -(-_PROBED // len(sizes)), 0
    for seed in range(passes):
        batches = [*draw(spec, sizes, seed).to(device)]
        for views, pixels in zip(batches, source.render(batches), strict=True):
            hits += int((teachers.logits(pixels).argmax(1) == labels[views.index]).sum())
    return round(100 * hits / (passes * len(sizes)), 1)


def apply(
    args: argparse.Namespace, teachers: Ensemble, folder: ImageFolder, dataset: Dataset
) -> dict[str, float]:
    """Sets --mix and --min-scale in `args` where they are not given; prints what auto chose.

    Returns:
        What auto measured for that, for the manifest.
    """
    advised, measured = _PUBLISHED, {}
    if args.recipe == "auto" and None in (args.mix, args.min_scale):
        top1 = teachers.runtime.from_first(probe(args, teachers, folder, dataset))
        advised, measured = advise(top1), {"small_crops_top1": top1}
    missing = {name: value for name, value in advised.items() if getattr(args, name) is None}
    vars(args).update(missing)
    if measured:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in missing.items())
        print(f"--recipe auto: {flags}; the teacher is right on {top1} % of small unmixed crops")
    return measured
