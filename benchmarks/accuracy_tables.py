"""The numbers of accuracy_per_byte.py as tables and as a picture."""

import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

COLOURS = {"fp16": "C7", "klt": "C0", "quant": "C1", "topk": "C2"}
NOTES = {"fp16": (3, -12), "klt": (-10, 6), "quant": (6, -3), "topk": (-12, -12)}  # in points
SCHEDULES = {"soft": "soft only", "hald": "HALD (T2)"}


def mean_std(rows: list[dict]) -> tuple[float, float]:
    """Mean and sample standard deviation of top-1 over seeds."""
    values = [float(row["top1"]) for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy(rows: list[dict]) -> str:
    """ "81.2 ± 0.4 (3)": mean, standard deviation and number of seeds; "81.2 (1)" of one seed."""
    mean, std = mean_std(rows)
    return f"{mean:.1f} ± {std:.1f} ({len(rows)})" if len(rows) > 1 else f"{mean:.1f} (1)"


def groups(rows: list[dict], *keys: str) -> dict[tuple[str, ...], list[dict]]:
    """Rows by the values of some columns, in the order of their first appearance."""
    found: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    return found


def asking(rows: list[dict], *questions: str) -> list[dict]:
    """The rows of some questions."""
    return [row for row in rows if row["question"] in questions]


def short(codec: str) -> str:
    """ "klt 0.01" for "klt --distortion 0.01"."""
    words = codec.split()
    return f"{words[0]} {words[-1]}" if len(words) > 1 else codec


def size(rows: list[dict]) -> str:
    """Bytes on disk of the labels, such as "404,402"."""
    return f"{int(rows[0]['label_bytes']):,}"


def tables(rows: list[dict]) -> str:
    """The README's tables, in Markdown."""
    parts = [near_lossless(asking(rows, "near-lossless"))]
    for (_,), chosen in groups(asking(rows, "equal bytes"), "data").items():
        parts.append(
            side_by_side(
                chosen,
                ("schedule", "budget"),
                ("schedule", "bytes"),
                lambda found: (found[0]["schedule"], size(groups(found, "codec")["fp16",])),
                lambda found: f"{accuracy(found)}, {found[0]['passes']}",
            )
        )
    for (_,), chosen in groups(asking(rows, "equal labels"), "data").items():
        parts.append(
            side_by_side(
                chosen,
                ("passes",),
                ("labels per image",),
                lambda found: (str(found[0]["passes"]),),
                lambda found: f"{accuracy(found)}, {size(found)}",
            )
        )
    return "\n\n".join(parts)


def near_lossless(rows: list[dict]) -> str:
    """What distortion costs at one label per image."""
    lines = [
        "| data | labels | bytes per label | factor | distortion at T = 20 | top-1 (%), seeds |",
        "|---|---|---|---|---|---|",
    ]
    near, within = groups(rows, "data", "codec"), {}
    for (data, codec), found in near.items():
        whole = near[data, "fp16"]
        per_label = float(found[0]["bytes_per_label"])
        factor = float(whole[0]["bytes_per_label"]) / per_label
        if mean_std(found)[0] >= mean_std(whole)[0] - mean_std(whole)[1]:
            within[data] = max(factor, within.get(data, 1))
        lines.append(
            f"| {data} | {codec.split()[0]} | {per_label:.1f} | {factor:.1f} | "
            f"{float(found[0]['distortion_t20']):.4f} | {accuracy(found)} |"
        )
    return "\n".join(lines) + "".join(
        f"\n\n{data}: no more than one standard deviation below fp16: {factor:.1f} times"
        for data, factor in within.items()
    )


def side_by_side(
    rows: list[dict],
    keys: tuple[str, ...],
    names: tuple[str, ...],
    head: Callable[[list[dict]], tuple[str, ...]],
    cell: Callable[[list[dict]], str],
) -> str:
    """Codecs as columns; a line for each combination of the values of `keys`.

    Args:
        rows: of one data set.
        keys: columns that tell lines apart.
        names: heads of the first columns.
        head: their content in a line, from its rows.
        cell: the content of a codec's column, from its rows.
    """
    codecs = sorted(groups(rows, "codec"))
    columns = ["data", *names, *(short(codec) for (codec,) in codecs)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for found in groups(rows, *keys).values():
        by_codec = groups(found, "codec")
        cells = [cell(by_codec[codec]) if codec in by_codec else "–" for codec in codecs]
        lines.append("| " + " | ".join([found[0]["data"], *head(found), *cells]) + " |")
    return "\n".join(lines)


def plot(path: Path, rows: list[dict]) -> None:
    """Per data set: accuracy against distortion at one label per image, and against bytes."""
    data = list(groups(rows, "data"))
    figure = Figure(figsize=(14, 4.4 * len(data)), layout="constrained")
    panels = figure.subplots(len(data), 1 + len(SCHEDULES), squeeze=False)
    for (left, *others), (name,) in zip(panels, data, strict=True):
        chosen = [row for row in rows if row["data"] == name]
        left.set_title(f"{name}: one label per image, soft only")
        plot_near_lossless(left, asking(chosen, "near-lossless"))
        long = asking(chosen, "equal bytes", "equal labels")
        for axes, kind in zip(others, SCHEDULES, strict=True):
            axes.set_title(f"{name}: {SCHEDULES[kind]}")
            plot_codecs(axes, [row for row in long if row["schedule"] == kind])
    figure.savefig(path, dpi=120)


def plot_near_lossless(axes: Axes, rows: list[dict]) -> None:
    """klt at several distortions, against the band of fp16."""
    near = groups(rows, "codec")
    axes.set(xlabel="bytes on disk per label", ylabel="top-1 (%)")
    axes.grid(alpha=0.3)
    if not near:
        return
    points = [(float(f[0]["bytes_per_label"]), *mean_std(f)) for f in near.values()]
    (whole, mean, std), *lossy = points
    sizes, means, stds = zip(*lossy, strict=True)
    axes.errorbar(sizes, means, stds, color=COLOURS["klt"], marker="o", capsize=3, label="klt")
    axes.axhspan(mean - std, mean + std, color="grey", alpha=0.3)
    axes.axhline(mean, color="grey", label=f"fp16, {whole:.0f} bytes: mean, std")
    for codec, (place, height, _) in zip([*near][1:], lossy, strict=True):
        distortion = codec[0].split()[-1]
        axes.annotate(distortion, (place, height), (4, -12), textcoords="offset points", fontsize=8)
    axes.set_xlim(0, 1.12 * max(sizes))
    axes.legend(title="numbers: distortion at T = 20", title_fontsize=8)


def plot_codecs(axes: Axes, rows: list[dict]) -> None:
    """A curve for each codec over bytes on disk; its points differ in labels per image.

    Further settings of a codec are dashed lines of its colour, without numbers.
    """
    axes.set(xlabel="labels on disk (kB)", ylabel="top-1 (%)", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    whole = max((int(row["ipc"]) for row in rows), default=0)
    drawn: list[str] = []
    for (codec,), found in groups(rows, "codec").items():
        kind = codec.split()[0]
        line = ("-", "--", ":")[drawn.count(kind)]
        drawn.append(kind)
        # A run may answer both questions, or serve two budgets: it counts once.
        runs = {(int(row["label_bytes"]), row["seed"]): row for row in found}
        points = groups([runs[key] for key in sorted(runs)], "label_bytes").values()
        kilobytes = [int(point[0]["label_bytes"]) / 1000 for point in points]
        means, stds = zip(*map(mean_std, points), strict=True)
        style = {"color": COLOURS[kind], "marker": "o", "ms": 4, "capsize": 3, "ls": line}
        axes.errorbar(kilobytes, means, stds, label=short(codec), **style)
        noted = 0.0
        for place, height, point in zip(kilobytes, means, points, strict=True):
            if line == "-" and place > 1.25 * noted:  # else the numbers would overlap
                noted = place
                ipc, passes = point[0]["ipc"], point[0]["passes"]
                text = f"{ipc} im." if int(ipc) < whole else str(passes)
                style = {"textcoords": "offset points", "fontsize": 8, "color": COLOURS[kind]}
                axes.annotate(text, (place, height), NOTES[kind], **style)
    if rows:
        axes.legend(title="numbers: labels per image", title_fontsize=8)
