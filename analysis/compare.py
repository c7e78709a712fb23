"""Compares finished runs: a table of best and last top-1 over seeds, and a picture of the curves.

python analysis/compare.py --out comparison.png "hard only=runs/hard_*" "HALD=runs/hald_*"
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import textwrap

from matplotlib.figure import Figure

from analysis.tables import MARKERS, column, mean_and_std, mean_std
from utils import cli, runlog
from utils.cli import UserError
from utils.files import save_figure
from utils.labels import first_difference
from validate.kinds import colours
from validate.settings import FREE

Group = tuple[str, list[runlog.RunFolder]]  # a name, and runs that differ in seed only


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Adds the runs to be compared, as pairs of a name and a pattern for `finished_runs`."""
    about = {"metavar": "NAME=PATTERN", "help": "run folders that differ in seed only"}
    parser.add_argument("groups", nargs="+", type=_named, **about)


def _named(text: str) -> tuple[str, str]:
    name, separator, pattern = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATTERN")
    return name, pattern


def finished_runs(pattern: str) -> list[runlog.RunFolder]:
    """The runs that fit a pattern; raises UserError unless they are one method's, and finished."""
    folders = sorted(Path(pattern).parent.glob(Path(pattern).name))
    if not folders:
        raise UserError(f"no run folder fits {pattern}")
    runs = [runlog.RunFolder(folder) for folder in folders]
    first = runs[0]
    for run in runs:
        if run.result() is None:
            raise UserError(f"{run.path} has no {runlog.RESULT}: the run is not finished")
        if difference := first_difference(first.settings(), run.settings(), {*FREE, "seed"}):
            raise UserError(
                f"{pattern}: {run.path} and {first.path} differ in more than the seed "
                f"({difference}); give each method a name of its own"
            )
    if len({run.result()["seed"] for run in runs}) < len(runs):
        raise UserError(f"{pattern}: a seed occurs twice among its runs")
    return runs


def top1(runs: list[runlog.RunFolder], which: str) -> str:
    """The "best" or "last" top-1 (%) of runs: mean ± standard deviation."""
    return mean_std([run.result()[which]["top1"] for run in runs])


def table(groups: list[Group]) -> str:
    """One line per group: best and last top-1 (%), label bytes, epochs and seconds per run."""
    form = "{:{width}}  {:>14}  {:>14}  {:>12}  {:>7}  {:>7}  {:>5}".format
    width = max(len(name) for name, _ in groups)
    headings = ("best top-1 (%)", "last top-1 (%)", "label bytes", "epochs", "seconds", "seeds")
    lines = [form("student", *headings, width=width)]
    for name, runs in groups:
        results = [run.result() for run in runs]
        seconds, _ = mean_and_std(column(results, "seconds"))
        epochs = "-".join(map(str, sorted({*column(results, "epochs")})))
        size = f"{results[0]['label_bytes']:,}"
        cells = (top1(runs, "best"), top1(runs, "last"), size, epochs, f"{seconds:.0f}", len(runs))
        lines.append(form(name, *cells, width=width))
    return "\n".join(lines)


def draw_curves(groups: list[Group]) -> Figure:
    """One panel per group, as long as its runs: top-1 over epochs, seed by seed, phases shaded."""
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (name, runs) in zip(panels.flat, groups, strict=False):
        for position, run in enumerate(runs):
            evaluated = [line for line in run.log_lines() if "val_top1" in line]
            xs, ys = column(evaluated, "epoch"), column(evaluated, "val_top1")
            # Greys, as the colours are those of the phases.
            style = {"color": str(0.6 * position / len(runs)), "marker": MARKERS[position % 10]}
            axes.plot(xs, ys, lw=1, ms=4, label=f"seed {run.result()['seed']}", **style)
        title = textwrap.fill(f"{name}: last {top1(runs, 'last')} %", 50)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        longest = max((run.log_lines() for run in runs), key=len)
        runlog.shade_phases(axes, column(longest, "kind"), colours())
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("validation top-1 (%)")
    return figure


def main() -> None:
    parser = cli.Parser(description="Compare finished runs: a table and a picture of the curves.")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    add_groups(parser)
    args = parser.parse_args()
    groups = [(name, finished_runs(pattern)) for name, pattern in args.groups]
    save_figure(draw_curves(groups), args.out)
    print(table(groups))
    print(f"curves: {args.out}")


if __name__ == "__main__":
    cli.run(main)
