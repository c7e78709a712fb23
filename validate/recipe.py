"""Recipes: what schedule, loss, T and label smoothing are where no flag says so."""

import argparse

RECIPES = ("published", "auto")
_MOST_MEASURED = 200  # classes
_PUBLISHED = {
    "schedule": "hald",
    "soft_loss_scale": "none",
    "temperature": 20.0,
    "label_smoothing": 0.8,
}


def advise(classes: int) -> dict[str, object]:
    """The flags of the recipe "auto", by name. Source: analysis/study.md."""
    return {
        "schedule": "moved",
        "soft_loss_scale": "none",
        "temperature": 4.0,
        "label_smoothing": 0.1 if classes < 100 else 0.8,
    }


def apply(args: argparse.Namespace, classes: int, made_by_auto: bool = True) -> argparse.Namespace:
    """The flags of validate/train.py, those not given as --recipe says; prints what auto chose.

    Args:
        made_by_auto: whether auto chose the views that have a label.
    """
    if args.recipe == "published":
        return argparse.Namespace(**vars(args) | _missing(args, _PUBLISHED))
    chosen = _missing(args, advise(classes))
    said = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    if not made_by_auto:
        said += "; meant for labels of relabel/generate.py --recipe auto, which these are not"
    if classes > _MOST_MEASURED:
        said += f"; not measured above {_MOST_MEASURED} classes"
    print(f"--recipe auto: {said}")
    return argparse.Namespace(**vars(args) | chosen)


def _missing(args: argparse.Namespace, advised: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in advised.items() if getattr(args, name) is None}
