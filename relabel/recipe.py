"""Which views the recipe "auto" labels: by what the teacher says of small crops."""

import argparse

import torch

from relabel.teacher import Ensemble, label_views
from utils import recipe
from utils.data import images
from utils.data.datasets import Dataset
from utils.data.folders import ImageFolder
from utils.data.views import ViewSpec, draw
from utils.labels import manifest

_PROBED = 1024  # views at least, and images at most


def probe(
    args: argparse.Namespace, teachers: Ensemble, folder: ImageFolder, dataset: Dataset
) -> float:
    """In how many unmixed crops of the published size the teacher names the class, in percent.

    Of one to two thousand views, with BatchNorm's running statistics.
    """
    few, device = folder.sample(_PROBED), teachers.runtime.device
    sizes, _ = images.inspect(few)
    source = images.open_images(few, sizes, dataset, device, args.workers)
    scale = recipe.PUBLISHED_VIEWS["min_scale"]
    spec = ViewSpec(dataset.input_size, args.batch_size, scale, mix="none")
    passes = [draw(spec, sizes, seed) for seed in range(-(-_PROBED // len(sizes)))]
    labels, labelled = few.labels.to(device), label_views(teachers, source, passes)
    right = torch.cat([logits.argmax(1) == labels[views.index] for views, logits in labelled])
    return round(100 * int(right.sum()) / len(right), 1)


def choose_views(
    args: argparse.Namespace, teachers: Ensemble, folder: ImageFolder, dataset: Dataset
) -> dict[str, float]:
    """Sets --mix and --min-scale in `args` where they are not given; prints what auto chose.

    Returns what auto measured, for the manifest, or nothing where the views are not its choice. A
    label set that is to be continued keeps what was measured when it was begun.
    """
    if args.recipe == "published":
        recipe.fill(args, recipe.PUBLISHED_VIEWS)
        return {}
    begun = manifest.begun(args.label_dir) or {}
    top1, machine = begun.get("small_crops_top1"), teachers.runtime
    if top1 is None and None in (args.mix, args.min_scale):
        first = machine.rank == 0
        top1 = machine.from_first(probe(args, teachers, folder, dataset) if first else None)
    chosen = recipe.fill(args, {} if top1 is None else recipe.auto_views(top1))
    why = ""
    if chosen:
        why = f"; the teacher is right on {top1} % of small unmixed crops, which get labels from "
        why += f"{recipe.SURE} % on"
    recipe.tell(chosen, why, dataset.num_classes)
    return {"small_crops_top1": top1} if len(chosen) == 2 else {}
