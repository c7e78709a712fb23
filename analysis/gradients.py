"""Do hard and soft labels pull the same way? The angle between their gradients along a run.

Trains a finished run again and, every few epochs, takes the gradients of the hard-label loss and of
the soft-label loss on the same stored views: their cosine, and their sizes. Writes OUT.png and
OUT.csv.

python analysis/gradients.py --run RUN --out gradients [--every 10]
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import copy

import torch
from matplotlib.figure import Figure
from torch import nn

from analysis.replay import CONFIRMING, Replay
from analysis.tables import add_out, column, label_round, mean_and_std, write_study
from utils import cli, runlog
from utils.cli import UserError, bounded
from validate.kinds import Batch, colours, hard_loss, soft_loss

_BATCHES = 8  # stored batches whose gradients are taken


def stored_batches(replay: Replay, count: int) -> list[Batch]:
    """The first label batches of the run; raises UserError for one without a label set."""
    labels = replay.materials.labels
    if labels is None:
        raise UserError("the run was trained without a label set: it has no soft gradient")
    indices = replay.settings.label_batches(labels)[:count]
    return list(replay.training.data.render_stored(indices))


def gradient(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """float32 [parameters]: the gradient of a loss, whose graph stays, for all parameters."""
    parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def measure(replay: Replay, batches: int) -> dict[str, float]:
    """Cosine (mean and standard deviation over batches) and norms of the two gradients."""
    settings = replay.settings
    # A copy, whose running statistics may move, without dropout, which would draw numbers.
    probe = copy.deepcopy(replay.training.student).train()
    for module in probe.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    rows = []
    for batch in stored_batches(replay, batches):
        logits = probe(batch.pixels).float()
        hard = gradient(hard_loss(logits, batch.mixture, settings.label_smoothing), probe)
        soft = gradient(soft_loss(logits, batch.teacher, settings.temperature), probe)
        cosine = nn.functional.cosine_similarity(hard, soft, dim=0).item()
        rows.append({"cosine": cosine, "hard": hard.norm().item(), "soft": soft.norm().item()})
    cosine, spread = mean_and_std(column(rows, "cosine"))
    hard, _ = mean_and_std(column(rows, "hard"))
    soft, _ = mean_and_std(column(rows, "soft"))
    return {"cosine": cosine, "cosine_std": spread, "hard_norm": hard, "soft_norm": soft}


def draw(rows: list[dict], kinds: list[str], temperature: float) -> Figure:
    """Upper panel: the cosine; lower panel: sizes of the gradients."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    epochs, soft_norms = column(rows, "epoch"), column(rows, "soft_norm")
    cosines, spreads = column(rows, "cosine"), column(rows, "cosine_std")
    label = "mean ± std over batches"
    upper.errorbar(epochs, cosines, spreads, fmt="k.-", capsize=3, lw=1, label=label)
    upper.axhline(0, color="k", lw=0.6)
    upper.set_ylabel("cosine of hard-label and\nsoft-label gradient")
    lower.plot(epochs, column(rows, "hard_norm"), "C1.-", label="hard loss")
    lower.plot(epochs, soft_norms, "C0.-", label="soft loss")
    scaled = [temperature**2 * norm for norm in soft_norms]
    lower.plot(epochs, scaled, "C0.--", label=f"soft loss x T² (T = {temperature:g})")
    lower.set_yscale("log")
    label_round(lower.yaxis, "{x:g}")
    lower.set_ylabel("norm of the gradient")
    lower.set_xlabel("epoch")
    for axes in (upper, lower):
        runlog.shade_phases(axes, kinds, colours())
        axes.legend(fontsize=8, ncols=2)
        axes.set_xlim(-0.02 * len(kinds), 1.02 * len(kinds))  # room for the outer error bars
    return figure


def main() -> None:
    parser = cli.Parser(description="Cosine of hard-label and soft-label gradients along a run.")
    parser.add_argument("--run", type=Path, required=True, help="run folder with a label set")
    add_out(parser)
    parser.add_argument("--every", type=bounded(int, 1), default=10, metavar="N", help="epochs")
    parser.add_argument("--model", help=CONFIRMING)
    args = parser.parse_args()
    replay = Replay(args.run, "gradients", args.model)
    kinds, rows = replay.settings.kinds, []
    for epoch, kind in enumerate(kinds):
        if epoch % args.every == 0:
            rows.append({"epoch": epoch, "kind": kind, **measure(replay, _BATCHES)})
        replay.train_epoch(epoch)
    rows.append({"epoch": len(kinds), "kind": kinds[-1], **measure(replay, _BATCHES)})
    replay.bar.close()
    write_study(rows, draw(rows, kinds, replay.settings.temperature), args.out)
    cosines = column(rows, "cosine")
    print(
        f"cosine of hard-label and soft-label gradient: first {cosines[0]:.3f}, last "
        f"{cosines[-1]:.3f}, lowest {min(cosines):.3f}; {args.out}.png"
    )


if __name__ == "__main__":
    cli.run(main)
