"""Compares finished runs: a table of best and last top-1 over seeds, and a picture of the curves.

python analysis/compare.py --out comparison.png "hard only=runs/hard_*" "HALD=runs/hald_*"
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import statistics

from matplotlib.figure import Figure

from analysis.tables import mean_std
from utils import cli, runlog
from utils.cli import UserError
from utils.files import read_json, save_png
from validate.kinds import KINDS


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Compare finished runs: a table and a picture of the curves.")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    add_groups(parser)
    return parser.parse_args()


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Adds the runs to be compared, as pairs of a name and a pattern for `finished_runs`."""
    parser.add_argument(
        "groups",
        nargs="+",
        type=cli.named("NAME=PATTERN"),
        metavar="NAME=PATTERN",
        help="run folders that differ in seed only",
    )


def finished_runs(pattern: str) -> list[Path]:
    """The run folders that fit a pattern; raises UserError for none, or an unfinished one."""
    folders = sorted(Path(pattern).parent.glob(Path(pattern).name))
    if not folders:
        raise UserError(f"no run folder fits {pattern}")
    for folder in folders:
        if not (folder / runlog.RESULT).exists():
            raise UserError(f"{folder} has no {runlog.RESULT}: the run is not finished")
    return folders


def load_group(name: str, pattern: str) -> tuple[str, list[dict], list[list[dict]]]:
    """Name, results and epoch lines of the runs that fit a pattern."""
    results, curves = [], []
    for folder in finished_runs(pattern):
        results.append(read_json(folder / runlog.RESULT))
        lines = (folder / runlog.LOG).read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
    return name, results, curves


def table(groups: list[tuple[str, list[dict], list[list[dict]]]]) -> str:
    """One line per group: best and last top-1 (%), label bytes, seconds per run."""
    width = max(len(name) for name, _, _ in groups)
    lines = [
        f"{'student':{width}}  {'best top-1 (%)':>14}  {'last top-1 (%)':>14}  "
        f"{'label bytes':>12}  {'seconds':>7}  {'seeds':>5}"
    ]
    for name, results, _ in groups:
        best = mean_std([result["best"]["top1"] for result in results])
        last = mean_std([result["last"]["top1"] for result in results])
        seconds = statistics.mean(result["seconds"] for result in results)
        size = results[0]["label_bytes"]
        lines.append(
            f"{name:{width}}  {best:>14}  {last:>14}  {size:>12,}  {seconds:>7.0f}  "
            f"{len(results):>5}"
        )
    return "\n".join(lines)


def draw_curves(groups: list[tuple[str, list[dict], list[list[dict]]]], path: Path) -> None:
    """One panel per group: validation top-1 over epochs, a line per seed, phases shaded."""
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, results, curves) in zip(panels.flat, groups, strict=False):
        for seed, lines in enumerate(curves):
            evaluated = [line for line in lines if "val_top1" in line]
            axes.plot(
                [line["epoch"] for line in evaluated],
                [line["val_top1"] for line in evaluated],
                f"C{seed}.-",
                lw=1,
                label=f"seed {results[seed]['seed']}",
            )
        axes.set_title(f"{name}: last {mean_std([run['last']['top1'] for run in results])} %")
        colours = {kind.name: kind.colour for kind in KINDS.values()}
        runlog.shade_phases(axes, [line["kind"] for line in curves[0]], colours)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    for axes in panels[:, 0]:
        axes.set_ylabel("validation top-1 (%)")
    save_png(figure, path)


def main() -> None:
    args = parse_arguments()
    groups = [load_group(*group) for group in args.groups]
    draw_curves(groups, args.out)
    print(table(groups))
    print(f"curves: {args.out}")


if __name__ == "__main__":
    cli.run(main)
