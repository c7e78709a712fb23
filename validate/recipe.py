"""Recipes: what schedule, loss, T and label smoothing are where no flag says so."""

import argparse
import math

from utils.cli import UserError

RECIPES = ("published", "auto")
_MOST_MEASURED = 200  # classes
_PUBLISHED = {
    "schedule": "hald",
    "soft_loss_scale": "none",
    "temperature": 20.0,
    "label_smoothing": 0.8,
}


def advise(labels_per_image: int, classes: int, teacher_top1: float) -> dict[str, object]:
    """The flags of the recipe "auto", by name. Source: analysis/study.md.

    Args:
        labels_per_image, classes: of the run.
        teacher_top1: in how many of the stored views the teacher names the class that covers most
            of the view, in percent; the rest drifts.
    """
    if labels_per_image * math.log10(classes) >= 2:
        schedule = "soft"
    else:
        schedule = "moved" if teacher_top1 >= 80 else "turns"
    return {
        "schedule": schedule,
        "soft_loss_scale": "T2" if schedule == "turns" else "none",
        "temperature": 4.0,
        "label_smoothing": 0.1 if classes < 100 else 0.8,
    }


def apply(
    args: argparse.Namespace, labels_per_image: int, classes: int, teacher_top1: float
) -> argparse.Namespace:
    """The flags of validate/train.py, those not given as --recipe says; prints what auto chose.

    Raises:
        UserError: auto without labels.
    """
    if args.recipe == "published":
        return argparse.Namespace(**vars(args) | _missing(args, _PUBLISHED))
    if not labels_per_image:
        raise UserError("--recipe auto needs --label-dir: it looks at the labels")
    chosen = _missing(args, advise(labels_per_image, classes, teacher_top1))
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in chosen.items()]
    print(
        f"--recipe auto: {' '.join(flags)}; {labels_per_image} labels per image of {classes} "
        f"classes, the teacher right on {teacher_top1:.1f} % of the views"
        + (f"; not measured above {_MOST_MEASURED} classes" if classes > _MOST_MEASURED else "")
    )
    return argparse.Namespace(**vars(args) | chosen)


def _missing(args: argparse.Namespace, advised: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in advised.items() if getattr(args, name) is None}
