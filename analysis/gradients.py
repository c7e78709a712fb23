"""Do hard and soft labels pull the same way? The angle between their gradients along a run.

Trains a finished run again and, every few epochs, takes the gradients of the hard-label loss and of
the soft-label loss on the same stored views: their cosine, and their sizes. Writes OUT.png and
OUT.csv.

python analysis/gradients.py --run RUN --out gradients [--every 10] [--batches 8]
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import copy
import statistics

import torch
from matplotlib.figure import Figure

from analysis.replay import Replay, add_arguments, gradient
from analysis.tables import this_command
from utils import cli, runlog
from utils.cli import bounded
from utils.files import save_png
from utils.results import provenance, write_csv
from validate.kinds import KINDS


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Cosine of hard-label and soft-label gradients along a run.")
    add_arguments(parser)
    parser.add_argument("--every", type=bounded(int, 1), default=10, metavar="N", help="epochs")
    parser.add_argument(
        "--batches", type=bounded(int, 2), default=8, metavar="N", help="stored batches to look at"
    )
    return parser.parse_args()


def measure(replay: Replay, batches: int) -> dict[str, float]:
    """Cosine (mean and standard deviation over batches) and norms of the two gradients."""
    # A copy, whose running statistics may move, without dropout, which would draw numbers.
    probe = copy.deepcopy(replay.training.student).train()
    for module in probe.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.eval()
    cosines, hard_norms, soft_norms = [], [], []
    for batch in replay.stored_batches(batches):
        hard_loss, soft_loss = replay.two_losses(batch, probe(batch.pixels).float())
        hard = gradient(hard_loss, probe, keep_graph=True)
        soft = gradient(soft_loss, probe, keep_graph=False)
        cosines.append(torch.nn.functional.cosine_similarity(hard, soft, dim=0).item())
        hard_norms.append(hard.norm().item())
        soft_norms.append(soft.norm().item())
    return {
        "cosine": statistics.mean(cosines),
        "cosine_std": statistics.stdev(cosines),
        "hard_norm": statistics.mean(hard_norms),
        "soft_norm": statistics.mean(soft_norms),
    }


def draw(rows: list[dict], kinds: list[str], temperature: float, path: Path) -> None:
    """Upper panel: the cosine; lower panel: sizes of the gradients."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    epochs = [row["epoch"] for row in rows]
    upper.errorbar(
        epochs,
        [row["cosine"] for row in rows],
        [row["cosine_std"] for row in rows],
        fmt="k.-",
        capsize=3,
        lw=1,
        label="mean ± std over batches",
    )
    upper.axhline(0, color="k", lw=0.6)
    upper.set_ylabel("cosine of hard-label and\nsoft-label gradient")
    scaled = [temperature**2 * row["soft_norm"] for row in rows]
    lower.plot(epochs, [row["hard_norm"] for row in rows], "C1.-", label="hard loss")
    lower.plot(epochs, [row["soft_norm"] for row in rows], "C0.-", label="soft loss")
    lower.plot(epochs, scaled, "C0.--", label=f"soft loss x T² (T = {temperature:g})")
    lower.set_yscale("log")
    lower.set_ylabel("norm of the gradient")
    lower.set_xlabel("epoch")
    for axes in (upper, lower):
        runlog.shade_phases(axes, kinds, {name: kind.colour for name, kind in KINDS.items()})
        axes.legend(fontsize=8, ncols=2)
    save_png(figure, path)


def main() -> None:
    args = parse_arguments()
    replay = Replay(args.run, "gradients")
    kinds, rows = replay.settings.kinds, []
    for epoch, kind in enumerate(kinds):
        if epoch % args.every == 0:
            rows.append({"epoch": epoch, "kind": kind, **measure(replay, args.batches)})
        replay.train_epoch(epoch)
    rows.append({"epoch": len(kinds), "kind": kinds[-1], **measure(replay, args.batches)})
    replay.bar.close()
    write_csv(rows, args.out.with_suffix(".csv"), provenance(this_command()))
    draw(rows, kinds, replay.settings.temperature, args.out.with_suffix(".png"))
    cosines = [row["cosine"] for row in rows]
    print(
        f"cosine of hard-label and soft-label gradient: first {cosines[0]:.3f}, last "
        f"{cosines[-1]:.3f}, lowest {min(cosines):.3f}; {args.out.with_suffix('.png')}"
    )


if __name__ == "__main__":
    cli.run(main)
