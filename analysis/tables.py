"""Results of runs: read from CSV files, as a table, and as a plot."""

import csv
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from utils.files import save_png


def mean_std(values: list[float]) -> str:
    """ "81.2 ± 0.4": mean and sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def this_command() -> str:
    """The command line of the running entry script."""
    return shlex.join(["python", f"analysis/{Path(sys.argv[0]).name}", *sys.argv[1:]])


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


def grouped(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by (student, ipc, method, slc): what differs within a group is the seed."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["student"], row["ipc"], row["method"], row["slc"])
        groups.setdefault(key, []).append(row)
    return groups


def markdown(rows: list[dict]) -> str:
    """The table: mean ± sample standard deviation over seeds of best and last top-1."""
    lines = [
        "| student | IPC | method | SLC | label bytes | best top-1 (%) | last top-1 (%) | seeds |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for (student, ipc, method, slc), group in grouped(rows).items():
        best, last = (mean_std([row[name] for row in group]) for name in ("best_top1", "last_top1"))
        size = round(statistics.mean(row["label_bytes"] for row in group))
        lines.append(
            f"| {student} | {ipc} | {method} | {slc or '–'} | {size:,} | {best} | {last} "
            f"| {len(group)} |"
        )
    return "\n".join(lines) + "\n"


def _point(group: list[dict]) -> tuple[float, float]:
    """Mean and sample standard deviation of a group's last top-1."""
    values = [row["last_top1"] for row in group]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plot(rows: list[dict], against: str, path: Path) -> None:
    """Last top-1 against "slc" or "label_bytes": a panel per student and IPC, a line per method.

    Methods whose labels do not depend on the SLC are level lines with their spread shaded when
    drawn against SLC; so is, against bytes, what needs none.
    """
    groups = grouped(rows)
    panels = list(dict.fromkeys(key[:2] for key in groups))
    methods = list(dict.fromkeys(key[2] for key in groups))
    figure = Figure(figsize=(max(7.5, 6.2 * len(panels)), 5.2), layout="constrained")
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for place, method in enumerate(methods):
            style = {"color": f"C{place % 10}", "marker": "osD^vP*X<>"[place % 10]}
            points = [
                (group[0][against] or 0, *_point(group))
                for key, group in groups.items()
                if key[:2] == panel and key[2] == method
            ]
            if not points:
                continue
            if all(x == 0 for x, _, _ in points):
                _, mean, spread = points[0]
                stores = any(row["label_bytes"] for row in rows if row["method"] == method)
                note = "one label per image" if stores else "no soft label"
                axes.axhline(mean, color=style["color"], ls="--", label=f"{method} ({note})")
                axes.axhspan(mean - spread, mean + spread, color=style["color"], alpha=0.1, lw=0)
                continue
            # Side by side, so that error bars of neighbours can be told apart.
            shift = 1.012 ** (place - len(methods) / 2)
            xs, means, spreads = zip(*sorted(points), strict=True)
            shifted = [x * shift for x in xs]
            axes.errorbar(shifted, means, spreads, capsize=3, lw=1.2, ms=5, label=method, **style)
        axes.set_xscale("log", base=2 if against == "slc" else 10)
        amounts = sorted({row[against] for row in rows if row[against]})
        if against == "slc":
            axes.set_xticks(amounts, [str(amount) for amount in amounts])
            axes.set_xlabel("soft labels per class (SLC; storage of so many fp16 labels)")
        else:
            low, high = min(amounts, default=1), max(amounts, default=1)
            axes.set_xlim(low / 1.3, high * 1.3)
            ticks = _round_ticks(low, high)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xlabel("soft labels on disk (bytes)")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(f"{panel[0]}, {panel[1]} images per class", fontsize=10)
    seeds = max(len(group) for group in groups.values())
    figure.axes[0].set_ylabel("last validation top-1 (%)")
    note = "points at the same place are drawn side by side"
    figure.suptitle(f"mean ± standard deviation over {seeds} seeds; {note}", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    save_png(figure, path)


def _round_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, around the range."""
    ticks = [digit * 10**power for power in range(16) for digit in (1, 2, 5)]
    return [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3] or [low]
