"""Recipes: what decides which views get a label, and how a student trains, where no flag says so.

Source: arXiv 2512.15647 for "published", analysis/study.md for "auto".
"""

import argparse

RECIPES = ("published", "auto")
_MOST_MEASURED = 200  # classes
_SURE = 93  # percent
PUBLISHED_VIEWS = {"mix": "cutmix", "min_scale": 0.08}
_LARGE_VIEWS = {"mix": "none", "min_scale": 0.9}
PUBLISHED_TRAINING = {
    "schedule": "hald",
    "soft_loss_scale": "none",
    "temperature": 20.0,
    "label_smoothing": 0.8,
}
AUTO_TRAINING = {"schedule": "moved", "temperature": 4.0}


def auto_views(small_crops_top1: float) -> dict[str, object]:
    """What views "auto" labels: large ones, unless the teacher knows small ones.

    Args:
        small_crops_top1: in how many unmixed crops of the published size the teacher names the
            class, in percent.
    """
    return PUBLISHED_VIEWS if small_crops_top1 >= _SURE else _LARGE_VIEWS


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
