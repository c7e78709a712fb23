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

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from analysis.tables import this_command
from utils import cli, runlog
from utils.cli import UserError, bounded
from utils.data import folders, images
from utils.data.datasets import Dataset
from utils.data.views import normalise
from utils.files import save_png
from utils.results import provenance, write_csv
from validate.evaluate import load_student

_MARGIN = 0.25  # of the plane around the three students, as a share of their extent


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Loss on the plane through three students.")
    parser.add_argument("--out", type=Path, required=True, help="PNG and CSV, without the ending")
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
    return parser.parse_args()


def flat(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def plane(
    vectors: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[float, float]]]:
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
    places = [(0.0, 0.0)]
    places += [(float(v @ across), float(v @ up)) for v in (first, second)]
    return across, up, places


@torch.inference_mode()
def loss_at(
    model: torch.nn.Module, vector: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[float, float]:
    """Cross-entropy (nats) and top-1 (%) of the model with these weights.

    BatchNorm normalises with the statistics of `inputs`.
    """
    torch.nn.utils.vector_to_parameters(vector.float(), model.parameters())
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train()
    logits = model(inputs)
    top1 = 100 * (logits.argmax(1) == targets).float().mean().item()
    return F.cross_entropy(logits, targets).item(), top1


def draw(
    rows: list[dict], names: list[str], places: list[tuple[float, float]], points: int, path: Path
) -> None:
    """Filled contours of the loss, the three students marked."""
    across = np.array([row["across"] for row in rows]).reshape(points, points)
    up = np.array([row["up"] for row in rows]).reshape(points, points)
    loss = np.array([row["loss"] for row in rows]).reshape(points, points)
    shape = np.ptp(up) / np.ptp(across)
    figure = Figure(figsize=(8, max(3.0, 6.2 * shape + 1)), layout="constrained")
    axes = figure.subplots()
    filled = axes.contourf(across, up, loss, levels=20, cmap="viridis_r")
    axes.contour(across, up, loss, levels=20, colors="k", linewidths=0.3, alpha=0.5)
    figure.colorbar(filled, ax=axes, label="validation cross-entropy (nats)")
    for name, (x, y) in zip(names, places, strict=True):
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
    save_png(figure, path)


def main() -> None:
    args = parse_arguments()
    names, vectors, students = [], [], []
    for name, folder in args.runs:
        model, saved = load_student(Path(folder) / runlog.CHECKPOINT)
        if students and saved["network"] != students[0][1]["network"]:
            raise UserError(f"{folder} is another network than the runs before it")
        names.append(name)
        students.append((model, saved))
        vectors.append(flat(model))
    model, saved = students[0]
    dataset = Dataset(**saved["dataset"])
    folder = folders.scan(args.val_dir)
    folders.check_same_classes(folder, saved["classes"], args.runs[0][1])
    picked = folder.sample(args.images)
    pixels = images.load_evaluation(picked, dataset).float()
    inputs = normalise(pixels, torch.tensor(dataset.mean), torch.tensor(dataset.std))
    across, up, places = plane(vectors)
    extent = max(max(x for x, _ in places), max(y for _, y in places))
    margin = _MARGIN * extent
    grid = [
        np.linspace(
            min(p[axis] for p in places) - margin,
            max(p[axis] for p in places) + margin,
            args.points,
        )
        for axis in (0, 1)
    ]
    rows = []
    for y in cli.progress(grid[1], desc="landscape", unit="row"):
        for x in grid[0]:
            loss, top1 = loss_at(model, vectors[0] + x * across + y * up, inputs, picked.labels)
            rows.append({"across": x, "up": y, "loss": loss, "top1": top1})
    for name, vector in zip(names, vectors, strict=True):
        loss, top1 = loss_at(model, vector, inputs, picked.labels)
        print(f"{name}: cross-entropy {loss:.3f} nats, top-1 {top1:.1f} % (batch statistics)")
    write_csv(rows, args.out.with_suffix(".csv"), provenance(this_command()))
    draw(rows, names, places, args.points, args.out.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
