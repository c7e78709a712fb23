"""Recipes: what decides which views get a label, and how a student trains, where no flag says so.

Source: arXiv 2512.15647 for "published", analysis/study.md for "auto".
"""

import argparse

from utils.labels import LabelSet

RECIPES = ("published", "auto")
_MOST_MEASURED = 200  # classes
SURE = 93  # percent
PUBLISHED_VIEWS = {"mix": "cutmix", "min_scale": 0.08}
_LARGE_VIEWS = {"mix": "none", "min_scale": 0.9}
_PUBLISHED_TRAINING = {
    "schedule": "hald",
    "soft_loss_scale": "none",
    "temperature": 20.0,
    "label_smoothing": 0.8,
}
_AUTO_TRAINING = {"schedule": "moved", "temperature": 4.0}


def auto_views(small_crops_top1: float) -> dict[str, object]:
    """What views "auto" labels: large ones, unless the teacher knows unmixed small ones (%)."""
    return PUBLISHED_VIEWS if small_crops_top1 >= SURE else _LARGE_VIEWS


def training_flags(
    args: argparse.Namespace, labels: LabelSet | None, classes: int
) -> argparse.Namespace:
    """The flags of train.py, with --recipe's; tells what auto chose, or that labels are auto's."""
    args = argparse.Namespace(**vars(args))
    if args.recipe == "auto":
        tell(fill(args, _AUTO_TRAINING), "", classes)
        if labels is not None and "small_crops_top1" not in labels.manifest:
            print(f"{labels.path} labels other views than --recipe auto: give it to labelling, too")
    elif labels is not None and labels.manifest.get("small_crops_top1", SURE) < SURE:
        # Else the views are published ones, too.
        print(f"{labels.path} labels views that --recipe auto chose, to train on by that recipe")
    fill(args, _PUBLISHED_TRAINING)
    return args


def fill(args: argparse.Namespace, advised: dict[str, object]) -> dict[str, object]:
    """Those of the advised flags that are not given; sets them in `args`."""
    missing = {name: value for name, value in advised.items() if getattr(args, name) is None}
    vars(args).update(missing)
    return missing


def tell(chosen: dict[str, object], why: str, classes: int) -> None:
    """Prints what "auto" chose, and why."""
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    if classes > _MOST_MEASURED:
        why += f"; not measured above {_MOST_MEASURED} classes"
    print(f"--recipe auto: {flags or 'nothing, as all flags are given'}{why}")
