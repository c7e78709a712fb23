"""Accuracy per class and the confusion matrix, as CSV files and a picture."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from utils.files import save_figure
from utils.results import write_csv

TABLE, MATRIX, PICTURE = "per_class.csv", "confusion.csv", "confusion.png"
_MOST_NAMES = 40  # beside the axes


def confusion(targets: torch.Tensor, predicted: torch.Tensor, classes: list[str]) -> torch.Tensor:
    """int64 [C, C]: how many images of a row's class were taken for a column's.

    Args:
        targets, predicted: int64 [N].
        classes: their C names.
    """
    count = len(classes)
    return torch.bincount(targets * count + predicted, minlength=count**2).view(count, count)


def accuracies(matrix: torch.Tensor) -> list[float]:
    """Top-1 of each class in percent."""
    shares = matrix.diagonal().double() / matrix.sum(1).clamp(min=1)
    return [round(100 * share, 4) for share in shares.tolist()]


def write(matrix: torch.Tensor, classes: list[str], out: Path) -> None:
    """Writes TABLE, MATRIX and PICTURE to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    counts = matrix.sum(1).tolist()
    columns = zip(classes, counts, matrix.diagonal().tolist(), accuracies(matrix), strict=True)
    names = ("class", "images", "correct", "top1")
    write_csv([dict(zip(names, row, strict=True)) for row in columns], out / TABLE)
    rows = zip(classes, matrix.tolist(), strict=True)
    taken_for = [{"class": name, **dict(zip(classes, row, strict=True))} for name, row in rows]
    write_csv(taken_for, out / MATRIX)
    save_figure(draw(matrix, classes), out / PICTURE)


def draw(matrix: torch.Tensor, classes: list[str]) -> Figure:
    """The matrix as shares of each class's images, in percent."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    shares = 100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="of the class's images (%)")
    axes.set(xlabel="predicted class", ylabel="class")
    if len(classes) <= _MOST_NAMES:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    return figure
