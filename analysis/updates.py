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

import argparse

import torch
from matplotlib.figure import Figure

from analysis.replay import Replay, plan_of
from analysis.tables import this_command
from utils import cli
from utils.cli import UserError, bounded
from utils.files import save_png
from utils.results import provenance, write_csv


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Length of each update around the switches of phase.")
    parser.add_argument("--out", type=Path, required=True, help="PNG and CSV, without the ending")
    parser.add_argument(
        "runs",
        nargs="+",
        type=cli.named("NAME=RUN"),
        metavar="NAME=RUN",
        help="runs of the same schedule",
    )
    parser.add_argument(
        "--before", type=bounded(int, 1), default=100, metavar="N", help="steps before a switch"
    )
    parser.add_argument(
        "--after", type=bounded(int, 1), default=400, metavar="N", help="steps after a switch"
    )
    return parser.parse_args()


def update_lengths(replay: Replay) -> tuple[list[float], list[int]]:
    """|change of all weights| / |weights| of every step, and the first step of every epoch."""
    parameters = [p for group in replay.optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    lengths, starts = [], []

    def record(*_) -> None:
        with torch.no_grad():
            moved = sum((p - old).square().sum() for p, old in zip(parameters, before, strict=True))
            length = sum(p.square().sum() for p in parameters)
            lengths.append((moved / length).sqrt().item())
            for p, old in zip(parameters, before, strict=True):
                old.copy_(p)

    handle = replay.optimizer.register_step_post_hook(record)
    for epoch in range(len(replay.plan.kinds)):
        starts.append(len(lengths))
        replay.epochs.run(epoch)
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


def draw(rows: list[dict], names: list[str], titles: list[str], path: Path) -> None:
    """A panel per switch, a line per run: every step thin, its running mean thick."""
    figure = Figure(figsize=(5.5 * len(titles) + 1, 4.2), layout="constrained")
    for number, axes in enumerate(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]):
        for place, name in enumerate(names):
            chosen = [row for row in rows if row["run"] == name and row["switch"] == number]
            for side in (
                [row for row in chosen if row["step"] < 0],
                [row for row in chosen if row["step"] >= 0],
            ):
                steps = [row["step"] for row in side]
                lengths = [row["relative_update"] for row in side]
                axes.plot(steps, lengths, f"C{place}", lw=0.4, alpha=0.4)
                label = name if side and side[0]["step"] >= 0 else None
                axes.plot(steps, smoothed(lengths), f"C{place}", lw=1.8, label=label)
        axes.axvline(0, color="k", lw=0.8, ls=":")
        axes.set_yscale("log")
        axes.set_title(titles[number], fontsize=10)
        axes.set_xlabel("optimiser steps from the switch")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("length of one update /\nlength of the weights")
    figure.axes[-1].legend(fontsize=9, title="thick: mean of 15 steps", title_fontsize=8)
    save_png(figure, path)


def main() -> None:
    args = parse_arguments()
    rows, names, schedules = [], [], set()
    for name, folder in args.runs:
        plan = plan_of(Path(folder))
        schedules.add(tuple(plan.kinds))
        if len(schedules) > 1:
            raise UserError(f"{folder} has another schedule than the runs before it")
        if not switches(plan.kinds):
            raise UserError(f"{folder} has a single phase: there is no switch to look at")
        names.append(name)
        lengths, starts = update_lengths(Replay(plan, name))
        for number, epoch in enumerate(switches(plan.kinds)):
            first = starts[epoch]
            window = range(max(0, first - args.before), min(len(lengths), first + args.after))
            rows += [
                {"run": name, "switch": number, "step": step - first}
                | {"relative_update": lengths[step]}
                for step in window
            ]
    titles = [
        f"epoch {epoch}: from {plan.kinds[epoch - 1]} to {plan.kinds[epoch]} labels"
        for epoch in switches(plan.kinds)
    ]
    for row in rows:
        row["relative_update"] = float(f"{row['relative_update']:.4g}")
    write_csv(rows, args.out.with_suffix(".csv"), provenance(this_command()))
    draw(rows, names, titles, args.out.with_suffix(".png"))
    last = len(titles) - 1
    for name in names:
        means = [
            torch.tensor(
                [
                    row["relative_update"]
                    for row in rows
                    if (row["run"], row["switch"]) == (name, last) and low <= row["step"] < high
                ]
            )
            .mean()
            .item()
            for low, high in ((-50, 0), (50, 100))
        ]
        print(
            f"{name}: mean relative update {means[0]:.2e} in the 50 steps before the last switch, "
            f"{means[1]:.2e} in steps 50 to 100 after it"
        )


if __name__ == "__main__":
    cli.run(main)
