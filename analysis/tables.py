"""Results of runs as CSV files, tables and plots."""

import argparse
import csv
import shlex
import statistics
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, MaxNLocator, NullLocator

from utils.files import save_figure
from utils.results import provenance, write_csv


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds --out, see `write_study`."""
    parser.add_argument("--out", type=Path, required=True, help="PNG and CSV, without the ending")


def write_study(rows: list[dict], figure: Figure, out: Path) -> None:
    """Writes OUT.csv, which says when, where and by which command it was measured, and OUT.png."""
    command = shlex.join(["python", f"analysis/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    write_csv(rows, out.with_suffix(".csv"), provenance(command))
    save_figure(figure, out.with_suffix(".png"))


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean_std(values: list[float]) -> str:
    """ "81.2 ± 0.4": mean and sample standard deviation."""
    mean, spread = mean_and_std(values)
    return f"{mean:.1f} ± {spread:.1f}" if len(values) > 1 else f"{mean:.1f}"


def read_csv(path: Path) -> list[dict]:
    """Rows that utils.results.write_csv wrote; numbers as numbers, an empty SLC as None."""
    kinds: dict[str, Callable] = dict.fromkeys(("best_top1", "last_top1", "seconds"), float)
    kinds |= dict.fromkeys(("ipc", "seed", "best_epoch", "label_bytes", "epochs"), int)
    kinds["slc"] = lambda text: int(text) if text else None
    with path.open(newline="") as file:
        return [
            {name: kinds.get(name, str)(value) for name, value in row.items()}
            for row in csv.DictReader(line for line in file if not line.startswith("#"))
        ]


def grouped(rows: list[dict], *columns: str) -> dict[tuple, list[dict]]:
    """Rows by their values in these columns, in the order in which the values come first.

    A plan without codecs has no such column: its value is "".
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") for name in columns), []).append(row)
    return groups


def column(rows: list[dict], name: str) -> list[float]:
    """The rows' values in one column."""
    return [row[name] for row in rows]


def markdown_table(rows: list[dict[str, object]], left: Collection[str]) -> str:
    """Rows as Markdown under their keys; columns that are not in `left` are aligned right."""
    rule = "".join("---|" if heading in left else "---:|" for heading in rows[0])
    cells = [list(rows[0]), *(row.values() for row in rows)]
    heading, *lines = (f"| {' | '.join(map(str, line))} |" for line in cells)
    return "\n".join([heading, f"|{rule}", *lines]) + "\n"


def markdown(rows: list[dict]) -> str:
    """The table: mean ± sample standard deviation over seeds of best and last top-1."""
    lines = []
    groups = grouped(rows, "student", "ipc", "method", "codec", "slc")
    for (student, ipc, method, codec, slc), group in groups.items():
        line = {"student": student, "IPC": ipc, "method": method, "codec": codec or "–"}
        line["SLC"] = slc or "–"
        line["label bytes"] = f"{round(statistics.mean(column(group, 'label_bytes'))):,}"
        line["best top-1 (%)"] = mean_std(column(group, "best_top1"))
        line["last top-1 (%)"] = mean_std(column(group, "last_top1"))
        line["seeds"] = len(group)
        lines.append(line)
    if not any("codec" in row for row in rows):
        for line in lines:
            del line["codec"]
    return markdown_table(lines, left=("student", "method", "codec"))


def plot(rows: list[dict], against: str) -> Figure:
    """Last top-1 against "slc" or "label_bytes": a panel per student and IPC, a line per method.

    Where a method is trained on several codecs, each has a line of its own. Methods whose labels do
    not depend on the SLC are level lines with their spread shaded when drawn against SLC; so is,
    against bytes, what needs none.
    """
    panels = grouped(rows, "student", "ipc")
    lines = list(grouped(rows, "method", "codec"))
    figure = Figure(figsize=(max(7.5, 6.2 * len(panels)), 5.2), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, ((student, ipc), in_panel) in zip(all_axes, panels.items(), strict=True):
        for line, of_line in grouped(in_panel, "method", "codec").items():
            position, name = lines.index(line), ", ".join(filter(None, line))
            style = {"color": f"C{position % 10}", "marker": "osD^vP*X<>"[position % 10]}
            points = [
                (group[0][against] or 0, *mean_and_std(column(group, "last_top1")))
                for group in grouped(of_line, "slc").values()
            ]
            if all(x == 0 for x, _, _ in points):
                _, mean, spread = points[0]
                needs_labels = any(column(of_line, "label_bytes"))
                note = "one label per image" if needs_labels else "no soft label"
                axes.axhline(mean, color=style["color"], ls="--", label=f"{name} ({note})")
                axes.axhspan(mean - spread, mean + spread, color=style["color"], alpha=0.1, lw=0)
                continue
            # Side by side, so that error bars of neighbours can be told apart.
            shift = 1.012 ** (position - len(lines) / 2)
            xs, means, spreads = zip(*sorted(points), strict=True)
            shifted = [x * shift for x in xs]
            axes.errorbar(shifted, means, spreads, capsize=3, lw=1.2, ms=5, label=name, **style)
        amounts = sorted({row[against] for row in rows if row[against]})
        if against == "slc":
            axes.set_xscale("log", base=2)
            axes.set_xticks(amounts, [str(amount) for amount in amounts])
            axes.set_xlabel("soft labels per class (SLC; storage of so many fp16 labels)")
        else:
            axes.set_xscale("log")
            least, most = min(amounts, default=1), max(amounts, default=1)
            axes.set_xlim(least / 1.3, most * 1.3)
            label_round(axes.xaxis, EngFormatter("B"))
            if most < 4 * least:  # too short for more than one round number
                axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlabel("soft labels on disk")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(f"{student}, {ipc} images per class", fontsize=10)
    seeds = len(grouped(rows, "seed"))
    figure.axes[0].set_ylabel("last validation top-1 (%)")
    note = "points that coincide are drawn side by side"
    figure.suptitle(f"mean ± standard deviation over {seeds} seeds; {note}", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    return figure


def label_round(axis: Axis, formatter: Formatter | str) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(formatter)
    axis.set_minor_locator(NullLocator())
