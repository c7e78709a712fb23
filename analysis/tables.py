"""Results of runs as CSV files, tables and plots."""

import csv
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from utils import runlog
from utils.cli import UserError
from utils.files import atomic_write, save_figure
from utils.results import write_csv

FACTS = ("student", "ipc", "method", "codec", "slc")
MEASURES = ("best_top1", "best_top5", "last_top1", "last_top5", "label_bytes", "seconds")
MARKERS = "osD^vP*X<>"
_LEFT = ("student", "method", "codec")  # columns of words
_HEADINGS = {"ipc": "IPC", "slc": "SLC", "labels_per_image": "labels per image"}
_MOST_TICKS = 11  # of an axis of labels per class
# Names in print; of the others, words of letters alone begin with a capital.
_PRINTED = {"hald": "HALD", "lpld": "LPLD", "lpqld": "LPQLD", "klt": "KLT"}
_TO_LATEX = {"±": r"$\pm$", "–": "--", "²": "$^2$", "\\": r"\textbackslash{}"}
_TO_LATEX |= {"^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
_TO_LATEX |= {letter: f"\\{letter}" for letter in "&%_#${}"}
_TO_LATEX |= {letter: f"${letter}$" for letter in "<>|"}


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def mean_std(values: list[float]) -> str:
    """ "81.2 ± 0.4": mean and sample standard deviation; of a single value itself."""
    mean, spread = mean_and_std(values)
    return f"{mean:.1f} ± {spread:.1f}" if len(values) > 1 else f"{mean:.1f}"


def read_csv(path: Path) -> list[dict]:
    """Rows that `report` wrote; numbers as numbers, an empty SLC as None."""
    kinds: dict[str, Callable] = dict.fromkeys(MEASURES, float)
    kinds |= dict.fromkeys(("ipc", "seed", "best_epoch", "label_bytes", "epochs"), int)
    kinds["slc"] = lambda text: int(text) if text else None
    with path.open(newline="") as file:
        try:
            return [
                {name: kinds.get(name, str)(value) for name, value in row.items()}
                for row in csv.DictReader(file)
            ]
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; move it away to go on") from None


def grouped(rows: list[dict], *columns: str) -> dict[tuple, list[dict]]:
    """Rows by their values in these columns ("" where there is none), in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") for name in columns), []).append(row)
    return groups


def column(rows: list[dict], name: str) -> list[Any]:
    """The rows' values in one column."""
    return [row[name] for row in rows]


def markdown_table(rows: list[dict[str, object]]) -> str:
    """Rows as Markdown under their keys; columns of numbers are aligned right."""
    rule = "".join("---|" if heading in _LEFT else "---:|" for heading in rows[0])
    cells = [list(rows[0]), *(row.values() for row in rows)]
    heading, *lines = (f"| {' | '.join(map(str, line))} |" for line in cells)
    return "\n".join([heading, f"|{rule}", *lines]) + "\n"


def printed(text: str) -> str:
    """A cell with the capitals that names, of methods, codecs and columns, have in print."""
    words = [_PRINTED.get(word, word) for word in text.split(" ")]
    if words[0].isalpha() and words[0].islower():
        words[0] = words[0].capitalize()
    return " ".join(words)


def latex_table(rows: list[dict[str, object]], seeds: str) -> str:
    """The same as LaTeX, with the rules of the package booktabs; a comment tells the seeds."""

    def line(cells: Iterable[object]) -> str:
        escaped = (printed(str(cell)).translate(str.maketrans(_TO_LATEX)) for cell in cells)
        return " & ".join(escaped) + r" \\"

    return "\n".join(
        [
            r"% in the preamble: \usepackage{booktabs}",
            f"% top-1: mean and sample standard deviation over n = {seeds} seeds",
            r"\begin{tabular}{" + "".join("l" if each in _LEFT else "r" for each in rows[0]) + "}",
            *(r"\toprule", line(rows[0]), r"\midrule"),
            *(line(row.values()) for row in rows),
            *(r"\bottomrule", r"\end{tabular}", ""),
        ]
    )


def summary(rows: list[dict]) -> list[dict]:
    """For runs that differ in seed only their number n, means and sample standard deviations."""
    result = []
    for facts, group in grouped(rows, *FACTS).items():
        line = {**dict(zip(FACTS, facts, strict=True)), "n": len(group)}
        for name in MEASURES:
            mean, spread = mean_and_std(column(group, name))
            line[f"{name}_mean"] = round(mean, 4)
            line[f"{name}_std"] = round(spread, 4) if len(group) > 1 else None
        result.append(line)
    return result


def lines(rows: list[dict]) -> list[dict[str, object]]:
    """Lines of the table: mean ± sample standard deviation over seeds of best and last top-1."""
    result = []
    for (student, ipc, method, codec, slc), group in grouped(rows, *FACTS).items():
        line = {"student": student, "IPC": ipc, "method": method}
        if any(row.get("codec") for row in rows):
            line["codec"] = codec or "–"
        line["SLC"] = slc or "–"
        line["label bytes"] = f"{round(statistics.mean(column(group, 'label_bytes'))):,}"
        line["best top-1 (%)"] = mean_std(column(group, "best_top1"))
        line["last top-1 (%)"] = mean_std(column(group, "last_top1"))
        result.append({**line, "seeds": len(group)})
    return result


def with_labels_per_image(facts: dict) -> dict:
    """Facts of a run and its soft labels per image; None where it has no SLC."""
    return {**facts, "labels_per_image": facts["slc"] and facts["slc"] // facts["ipc"]}


def in_layout(
    results: list[dict], rows: Sequence[str], columns: Sequence[str]
) -> list[dict[str, object]]:
    """Lines of a table in the layout of a paper: last top-1, mean ± deviation as in `lines`.

    `rows` and `columns` name the facts whose values begin the lines and head the columns. A method
    whose labels do not depend on the SLC, or the codec, has the same value at each. Facts that
    differ and are not named begin the lines, too: no cell is a mean over them.
    """
    known = [with_labels_per_image(row) for row in results]
    counted = [row for row in known if row["slc"]] or known
    amount = "slc" if "slc" in (*rows, *columns) else "labels_per_image"
    for name in (*FACTS[:-1], amount):
        values = grouped(known if name == "method" else counted, name)
        if len(values) > 1 and name not in (*rows, *columns):
            rows = [*rows, name]
    result = []
    for begins in grouped(counted, *rows):
        line = {_HEADINGS.get(name, name): value for name, value in zip(rows, begins, strict=True)}
        for heads in grouped(known, *columns):
            wanted = list(zip((*rows, *columns), begins + heads, strict=True))
            cell = [
                row["last_top1"]
                for row in known
                if all(row.get(name, "") in (None, "", value) for name, value in wanted)
            ]
            heading = " ".join(str(value) for value in heads if value not in ("", None))
            line[heading] = mean_std(cell) if cell else "–"
        result.append(line)
    return result


def plot(rows: list[dict], against: str) -> Figure:
    """Last top-1 against "slc" or "label_bytes": a row of panels per student, one per IPC.

    Each method and codec is a line. It is level, its spread shaded, where it does not depend on
    that: against SLC for labels that are not counted, against bytes where none are needed.
    """
    students, ipcs = (list(dict.fromkeys(column(rows, name))) for name in ("student", "ipc"))
    lines = list(grouped(rows, "method", "codec"))
    size = (max(7.5, 6.2 * len(ipcs)), 0.6 + 4.6 * len(students))
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(len(students), len(ipcs), sharey=True, squeeze=False)
    for (student, ipc), in_panel in grouped(rows, "student", "ipc").items():
        axes = all_axes[students.index(student), ipcs.index(ipc)]
        for line, of_line in grouped(in_panel, "method", "codec").items():
            position, name = lines.index(line), ", ".join(filter(None, line))
            style = {"color": f"C{position % 10}", "marker": MARKERS[position % 10]}
            points = sorted(
                (group[0][against] or 0, *mean_and_std(column(group, "last_top1")))
                for group in grouped(of_line, "slc").values()
            )
            xs, means, spreads = zip(*points, strict=True)
            if any(xs):
                # Side by side, so that error bars of neighbours can be told apart.
                shifted = [x * 1.012 ** (position - len(lines) / 2) for x in xs]
                axes.errorbar(shifted, means, spreads, capsize=3, lw=1.2, ms=5, label=name, **style)
            else:
                needs_labels, colour = any(column(of_line, "label_bytes")), style["color"]
                note = "one label per image" if needs_labels else "no soft label"
                axes.axhline(means[0], color=colour, ls="--", label=f"{name} ({note})")
                low, high = means[0] - spreads[0], means[0] + spreads[0]
                axes.axhspan(low, high, color=colour, alpha=0.1, lw=0)
        amounts = sorted({row[against] for row in in_panel if row[against]})
        least, most = min(amounts, default=1), max(amounts, default=1)
        axes.set_xscale("log")
        axes.set_xlim(least / 1.3, most * 1.3)
        if against == "slc":
            ticks = far_apart(amounts, math.log(1.3**2 * most / least) / _MOST_TICKS)
            axes.set_xticks(ticks, [str(amount) for amount in ticks])
            axes.set_xlabel("soft labels per class (SLC), or as many bytes")
        else:
            short = most < 4 * least  # for more than one round number
            axes.xaxis.set_major_locator(MaxNLocator(5) if short else LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter("B"))
            axes.set_xlabel("soft labels on disk")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(f"{student}, IPC {ipc}", fontsize=10)
    for axes in all_axes[:, 0]:
        axes.set_ylabel("last validation top-1 (%)")
    about = f"mean ± standard deviation over {len(grouped(rows, 'seed'))} seeds"
    figure.suptitle(f"{about}; points that coincide are drawn side by side", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    return figure


def far_apart(amounts: list[int], distance: float) -> list[int]:
    """Of growing amounts the largest, and those before it whose logarithms differ enough."""
    kept: list[int] = []
    for amount in reversed(amounts):
        if not kept or math.log(kept[-1] / amount) > distance:
            kept.append(amount)
    return kept


def report(rows: list[dict], out: Path, layout: dict[str, list[str]]) -> None:
    """Writes results.csv, summary.csv, the tables and both plots to a folder; prints the table.

    Before these rows come those of other runs in the folder that earlier plans collected, unless
    their result is gone. `layout` has the "rows" and "columns" of the tables; empty: a line for all
    that differs. Raises UserError when results.csv is damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.csv"
    earlier = read_csv(results) if results.exists() else []
    runs = out / "runs"
    kept = [row for row in earlier if (runs / str(row.get("run")) / runlog.RESULT).exists()]
    rows = list({row["run"]: row for row in (*kept, *rows)}.values())
    write_csv(rows, results, columns=list(dict.fromkeys(itertools.chain(*rows))))
    write_csv(summary(rows), out / "summary.csv")
    table = in_layout(rows, **layout) if layout else lines(rows)
    text = markdown_table(table)
    atomic_write(out / "table.md", text.encode())
    counts = sorted({len(group) for group in grouped(rows, *FACTS).values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    atomic_write(out / "table.tex", latex_table(table, seeds).encode())
    save_figure(plot(rows, "slc"), out / "top1_slc.png")
    save_figure(plot(rows, "label_bytes"), out / "top1_bytes.png")
    written = "results.csv, summary.csv, table.md, table.tex, top1_slc.png, top1_bytes.png"
    print(f"{text}{len(rows)} runs in {out}: {written}")
