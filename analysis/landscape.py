"""The loss on the plane through three students: are they in one basin?

The plane is spanned by the weights of three checkpoints of the same network. At every grid point
the cross-entropy of the hard labels on validation images is taken, BatchNorm using the statistics
of the images themselves, because running statistics of two students cannot be mixed. Writes
OUT.png and OUT.csv.

python analysis/landscape.py --out landscape "hard=RUN" "soft=RUN" "HALD=RUN" --val-dir V
    [--images 500] [--points 15]
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from analysis.tables import add_out, write_study
from utils import cli, runlog
from utils.cli import UserError, bounded
from utils.data import folders, images
from utils.data.datasets import Dataset
from utils.data.views import normalise
from validate.evaluate import load_student

_MARGIN = 0.25  # of the plane around the three students, as a share of their extent
Point = tuple[float, float]


def plane(vectors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[Point]]:
    """Two orthonormal directions from vectors[0], and the coordinates of the three on them.

    Raises:
        UserError: the three are on one line.
    """
    first, second = vectors[1] - vectors[0], vectors[2] - vectors[0]
    if first.norm() == 0:
        raise UserError("the first two students are the same")
    across = first / first.norm()
    rest = second - (second @ across) * across
    if rest.norm() < 1e-9 * first.norm():
        raise UserError("the three students are on one line: they span no plane")
    up = rest / rest.norm()
    points = [(float(v @ across), float(v @ up)) for v in (first, second)]
    return across, up, [(0.0, 0.0), *points]


@torch.inference_mode()
def loss_at(
    model: nn.Module, vector: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[float, float]:
    """Cross-entropy (nats) and top-1 (%) of the model with these weights.

    BatchNorm normalises with the statistics of `inputs`.
    """
    nn.utils.vector_to_parameters(vector.float(), model.parameters())
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    logits = model(inputs)
    top1 = 100 * (logits.argmax(1) == targets).float().mean().item()
    return F.cross_entropy(logits, targets).item(), top1


def draw(rows: list[dict], names: list[str], points: list[Point]) -> Figure:
    """Filled contours of the loss over a square grid, the three students marked."""
    side = math.isqrt(len(rows))
    across, up, loss = (
        np.reshape([row[field] for row in rows], (side, side)) for field in ("across", "up", "loss")
    )
    shape = np.ptp(up) / np.ptp(across)
    figure = Figure(figsize=(8, max(3.0, 6.2 * shape + 1)), layout="constrained")
    axes = figure.subplots()
    filled = axes.contourf(across, up, loss, levels=20, cmap="viridis_r")
    axes.contour(across, up, loss, levels=20, colors="k", linewidths=0.3, alpha=0.5)
    figure.colorbar(filled, ax=axes, label="validation cross-entropy (nats)")
    for name, (x, y) in zip(names, points, strict=True):
        axes.plot(x, y, "wo", mec="k", ms=9)
        axes.annotate(
            name,
            (x, y),
            xytext=(8, 8),
            textcoords="offset points",
            fontsize=10,
            weight="bold",
            bbox={"boxstyle": "round", "fc": "white", "alpha": 0.8, "lw": 0},
        )
    axes.set_xlabel(f"distance of the weights from {names[0]} towards {names[1]} (L2 norm)")
    axes.set_ylabel("distance at right angles (L2 norm)")
    axes.set_aspect("equal")
    return figure


def main() -> None:
    parser = cli.Parser(description="Loss on the plane through three students.")
    add_out(parser)
    parser.add_argument(
        "runs",
        nargs=3,
        type=cli.named("NAME=RUN"),
        metavar="NAME=RUN",
        help="three runs of one network",
    )
    parser.add_argument("--val-dir", type=Path, required=True, help="images")
    parser.add_argument(
        "--images", type=bounded(int, 2), default=500, metavar="N", help="how many of them"
    )
    parser.add_argument("--points", type=bounded(int, 3), default=15, metavar="N", help="per side")
    args = parser.parse_args()
    names = [name for name, _ in args.runs]
    students = [load_student(Path(run) / runlog.CHECKPOINT) for _, run in args.runs]
    model, saved = students[0]
    for (_, run), (_, other) in zip(args.runs, students, strict=True):
        if other["network"] != saved["network"]:
            raise UserError(f"{run} is another network than the runs before it")
    vectors = [
        nn.utils.parameters_to_vector(student.parameters()).detach().double()
        for student, _ in students
    ]
    across, up, points = plane(vectors)
    dataset = Dataset(**saved["dataset"])
    folder = folders.scan(args.val_dir)
    folders.check_same_classes(folder, saved["classes"], args.runs[0][1])
    sample = folder.sample(args.images)
    pixels = images.load_evaluation(sample, dataset).float()
    inputs = normalise(pixels, torch.tensor(dataset.mean), torch.tensor(dataset.std))
    margin = _MARGIN * np.max(points)
    low, high = np.min(points, axis=0) - margin, np.max(points, axis=0) + margin
    columns, lines = np.linspace(low, high, args.points).T
    rows = []
    for y in cli.progress(lines, desc="landscape", unit="row"):
        for x in columns:
            loss, top1 = loss_at(model, vectors[0] + x * across + y * up, inputs, sample.labels)
            rows.append({"across": x, "up": y, "loss": loss, "top1": top1})
    for name, vector in zip(names, vectors, strict=True):
        loss, top1 = loss_at(model, vector, inputs, sample.labels)
        print(f"{name}: cross-entropy {loss:.3f} nats, top-1 {top1:.1f} % (batch statistics)")
    write_study(rows, draw(rows, names, points), args.out)


if __name__ == "__main__":
    cli.run(main)
