"""How far does each optimiser step move the student around a switch of phase?

Trains finished runs again and records the length of every update, relative to the length of the
weights. After a hard phase, Adam's second moment remembers gradients far larger than those of an
unscaled soft loss: the steps all but stop. Writes OUT.png and OUT.csv (steps around the switches).

python analysis/updates.py --out updates "published=RUN" "x T2=RUN" "reset=RUN"
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math

import torch
from matplotlib.figure import Figure

from analysis.replay import CONFIRMING, Replay
from analysis.tables import add_out, column, mean_and_std, write_study
from utils import cli
from utils.cli import UserError

_BEFORE, _AFTER = 100, 400  # steps around a switch that are recorded


def update_lengths(replay: Replay) -> tuple[list[float], list[int]]:
    """|change of all weights| / |weights| of every step, and the first step of every epoch."""
    optimizer = replay.training.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    lengths, starts = [], []

    def record(*_) -> None:
        with torch.no_grad():
            moved = sum((p - old).square().sum() for p, old in zip(parameters, before, strict=True))
            length = sum(p.square().sum() for p in parameters)
            lengths.append((moved / length).sqrt().item())
            for p, old in zip(parameters, before, strict=True):
                old.copy_(p)

    handle = optimizer.register_step_post_hook(record)
    for epoch in range(len(replay.settings.kinds)):
        starts.append(len(lengths))
        replay.train_epoch(epoch)
    handle.remove()
    replay.bar.close()
    return lengths, starts


def switches(kinds: list[str]) -> list[int]:
    """The epochs, counted from 0, that start another phase than the first."""
    return [epoch for epoch in range(1, len(kinds)) if kinds[epoch] != kinds[epoch - 1]]


def smoothed(values: list[float], width: int = 15) -> list[float]:
    """Geometric mean over a window that ends at each value: single batches differ a lot."""
    logs = torch.tensor(values, dtype=torch.float64).clamp(min=1e-30).log()
    return [logs[max(0, end - width) : end].mean().exp().item() for end in range(1, len(logs) + 1)]


def steps_of(rows: list[dict], run: str, switch: int, low: float, high: float) -> list[dict]:
    """The rows of a run's steps from `low` up to `high`, counted from a switch."""
    return [
        row
        for row in rows
        if row["run"] == run and row["switch"] == switch and low <= row["step"] < high
    ]


def draw(rows: list[dict], names: list[str], titles: list[str]) -> Figure:
    """A panel per switch, a line per run: every step thin, its running mean thick."""
    figure = Figure(figsize=(5.5 * len(titles) + 1, 4.2), layout="constrained")
    for switch, axes in enumerate(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]):
        for position, name in enumerate(names):
            # The running mean begins anew at the switch, which it would smear.
            for low, high, label in ((-math.inf, 0, None), (0, math.inf, name)):
                side = steps_of(rows, name, switch, low, high)
                steps, lengths = column(side, "step"), column(side, "relative_update")
                axes.plot(steps, lengths, f"C{position}", lw=0.4, alpha=0.4)
                axes.plot(steps, smoothed(lengths), f"C{position}", lw=1.8, label=label)
        axes.axvline(0, color="k", lw=0.8, ls=":")
        axes.set_yscale("log")
        axes.set_title(titles[switch], fontsize=10)
        axes.set_xlabel("optimiser steps from the switch")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("length of one update /\nlength of the weights")
    figure.axes[-1].legend(fontsize=9, title="thick: mean of 15 steps", title_fontsize=8)
    return figure


def main() -> None:
    parser = cli.Parser(description="Length of each update around the switches of phase.")
    add_out(parser)
    parser.add_argument(
        "runs",
        nargs="+",
        type=cli.named("NAME=RUN"),
        metavar="NAME=RUN",
        help="runs of the same schedule",
    )
    parser.add_argument("--model", help=CONFIRMING)
    args = parser.parse_args()
    rows, kinds = [], []
    for name, folder in args.runs:
        replay = Replay(Path(folder), name, args.model)
        if kinds and replay.settings.kinds != kinds:
            raise UserError(f"{folder} has another schedule than the runs before it")
        kinds = replay.settings.kinds
        if not switches(kinds):
            raise UserError(f"{folder} has a single phase: there is no switch to look at")
        lengths, starts = update_lengths(replay)
        for switch, epoch in enumerate(switches(kinds)):
            first = starts[epoch]
            for step in range(max(0, first - _BEFORE), min(len(lengths), first + _AFTER)):
                length = float(f"{lengths[step]:.4g}")
                row = {"run": name, "switch": switch, "step": step - first}
                rows.append({**row, "relative_update": length})
    titles = [
        f"epoch {epoch}: from {kinds[epoch - 1]} to {kinds[epoch]} labels"
        for epoch in switches(kinds)
    ]
    names = [name for name, _ in args.runs]
    write_study(rows, draw(rows, names, titles), args.out)
    for name in names:
        before, after = (
            column(steps_of(rows, name, len(titles) - 1, low, high), "relative_update")
            for low, high in ((-50, 0), (50, 100))
        )
        print(
            f"{name}: mean relative update {_mean(before):.2e} in the 50 steps before the last "
            f"switch, {_mean(after):.2e} in steps 50 to 100 after it"
        )


def _mean(values: list[float]) -> float:
    return mean_and_std(values)[0] if values else math.nan


if __name__ == "__main__":
    cli.run(main)
