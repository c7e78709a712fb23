"""Reports what a label set holds: its size, what a codec lost, and how far labels drift.

python relabel/report.py --label-dir L [--reference FP16_LABELS] [--data-dir D] [--out-dir R]

Everything is computed from the labels as they are stored. What a lossy codec lost can only be
known beside the labels it was made from: --reference. Pictures of drifting views need the images:
--data-dir.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import collections
import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchvision.models import ResNet18_Weights

from relabel import drift
from relabel.compress import compare
from utils import cli
from utils.cli import UserError
from utils.data import folders, images
from utils.data.views import Views, crop_resize, mix
from utils.files import atomic_write, save_figure, to_json
from utils.labels import LabelSet, first_difference
from utils.labels.arrays import read_npz
from utils.results import write_csv

TEMPERATURES = (20.0, 4.0, 1.0)
_RANKS = ("top1", "top2", "top3")
_CLASSES_SHOWN = 20  # of drift.png
_DRIFTS = "the teacher's top-1 class is none of the classes in the view"
_VIEW_COLUMNS = ("pass", "row", "image", "file", "crop_area", "class", "lam", "partner")
_VIEW_COLUMNS += ("probability", *_RANKS)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Report sizes and drift of a label set.")
    add = parser.add_argument
    add("--label-dir", type=Path, required=True, help="a finished label set")
    reference = "the same labels in fp16, to measure what the codec lost"
    add("--reference", type=Path, metavar="L2", help=reference)
    add("--data-dir", type=Path, help="the labelled images, for pictures")
    out = "where tables and pictures go (default with --data-dir: LABEL_DIR_report; else none)"
    add("--out-dir", type=Path, help=out)
    add("--samples", type=cli.bounded(int, 1, 100), default=16, metavar="N", help="views to show")
    return parser.parse_args()


def report_sizes(labels: LabelSet) -> dict:
    """Prints and returns bytes on disk by purpose, and the factor against fp16."""
    stored = collections.Counter()
    for path in labels.path.glob("pass_*.npz"):
        stored.update({name: array.nbytes for name, array in read_npz(path).items()})
    files = {path.name: path.stat().st_size for path in labels.path.iterdir()}
    parts = {
        "logits": stored["payload"],
        "codec, fitted part": files.get("codec.npz", 0),
        "views": sum(stored[field.name] for field in dataclasses.fields(Views)),
        "image sizes": files.get("sizes.npz", 0),
        "manifest": files["manifest.json"],
    }
    total = labels.bytes_on_disk()
    parts |= {"checksums, headers": total - sum(parts.values()), "total": total}
    count = labels.passes * labels.manifest["images"]["count"]
    in_fp16 = total - parts["logits"] - parts["codec, fitted part"]
    in_fp16 += 2 * labels.manifest["num_classes"] * count
    print(f"\n{'':36}{'bytes':>15}{'per label':>12}")
    for name, size in {**parts, "the same in codec fp16": in_fp16}.items():
        print(f"{name:36}{size:>15,}{size / count:>12.2f}")
    factor = round(in_fp16 / total, 3)
    print(f"{'factor against fp16':36}{factor:>15.1f}")
    return {"labels": count, "bytes": parts, "factor against fp16": factor}


def report_loss(labels: LabelSet, reference: LabelSet | None) -> dict[str, float]:
    """Prints and returns what the codec lost of the same labels in fp16; UserError for others."""
    codec = labels.manifest["codec"]
    if reference is None:
        options = ", ".join(f"{key} {value}" for key, value in codec.items() if key != "name")
        told = "what it lost is not known without --reference, the same labels in fp16"
        if codec["name"] == "fp16":
            told = "nothing is lost beyond half precision"
        print(f"\ncodec {codec['name']}{options and f' ({options})'}: {told}", flush=True)
        return {}
    if reference.manifest["codec"]["name"] != "fp16":
        raise UserError(f"--reference {reference.path} is not in codec fp16")
    decisive = ("images", "teachers", "bssl", "seed", "batch_size", "mix", "input_size")
    facts = [{key: of.manifest.get(key) for key in decisive} for of in (labels, reference)]
    if difference := first_difference(*facts):
        raise UserError(f"--reference {reference.path} holds other labels ({difference})")
    passes = cli.progress(range(labels.passes), desc="compare", unit="pass")
    distortions, same = compare(labels, reference, passes, TEMPERATURES)
    by_temperature = zip(TEMPERATURES, distortions, strict=True)
    lost = {f"distortion at T = {t:g}": distortion for t, distortion in by_temperature}
    lost["same top-1 class"] = same
    print(f"\nagainst {reference.path} (fp16)")
    for name, value in lost.items():
        print(f"{name:36}{value:>15.5f}", flush=True)
    return lost


def report_drift(measured: drift.Drift) -> dict:
    """Prints and returns Tr(Sigma) and the share of views that drift; prints it by crop area."""
    spread = None if np.isnan(measured.spread).any() else float(measured.spread.mean())
    views, share = len(measured.drifts), float(measured.drifts.mean())
    told = "needs two passes" if spread is None else f"{spread:.4f}"
    print(f"\nTr(Sigma) of an image's soft labels, mean over images: {told}")
    print(f"views that drift: {100 * share:.1f} % of {views:,} ({_DRIFTS})")
    print(f"{'crop area':>12}{'views':>10}{'drift (%)':>12}{'p(view classes)':>17}")
    for row in area_rows(measured):
        start, end, count, drifting, known = row.values()
        if count:
            print(f"{start:>6.1f}-{end:>4.1f} {count:>10,}", end="")
            print(f"{100 * drifting / count:>12.1f}{known:>17.3f}")
    return {"mean Tr(Sigma)": spread, "views": views, "drifting": share}


def class_names(labels: LabelSet) -> list[str]:
    """Folder names, or what ImageNet-1K calls its classes."""
    if labels.manifest["dataset"] == "imagenet1k":
        return ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return labels.manifest["classes"]


def rows_of(columns: dict[str, Iterable]) -> list[dict]:
    """The rows of a table, each a dict of its cells by column."""
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def area_rows(measured: drift.Drift) -> list[dict]:
    """Those of crop_area.csv: what drifts by the crop's share of the image."""
    tenth = (measured.area * 10).astype(int).clip(0, 9)
    counts = measured.counts(tenth, 10)
    known = np.bincount(tenth, measured.known, 10) / counts["views"].clip(1)
    columns = {"from": np.arange(10) / 10, "to": np.arange(1, 11) / 10, **counts}
    return rows_of({**columns, "mean_probability_of_view_classes": known})


def class_rows(labels: LabelSet, measured: drift.Drift) -> list[dict]:
    """Those of classes.csv: classes with views, first those that drift most, then by views."""
    names, classes = class_names(labels), labels.manifest["num_classes"]
    views, drifting = measured.counts(measured.label, classes).values()
    shares = drifting / views.clip(1)
    of_class = np.bincount(labels.hard_labels, minlength=classes).clip(1)
    spread = np.bincount(labels.hard_labels, measured.spread, classes) / of_class
    order = [label for label in np.lexsort((-views, -shares)) if views[label]]
    columns = {
        "class": order,
        "name": [names[label] for label in order],
        "views": views[order],
        "drifting_share": shares[order].round(4),
        "mean_tr_sigma": spread[order].round(5),
    }
    return rows_of(columns)


def image_rows(labels: LabelSet, measured: drift.Drift, files: list[str]) -> list[dict]:
    """Those of images.csv; `files` names every image."""
    columns = {
        "image": range(len(files)),
        "file": files,
        "class": labels.hard_labels.tolist(),
        **measured.counts(measured.image, len(files)),
        "tr_sigma": measured.spread.round(6),
    }
    return rows_of(columns)


def view_rows(
    labels: LabelSet, measured: drift.Drift, worst: np.ndarray, files: list[str]
) -> list[dict]:
    """Those of views.csv: the views that drift most, `worst` by position among all views."""
    names, rows = class_names(labels), []
    for position in worst.tolist():
        pass_index, row = measured.place[position].tolist()
        batch, row_of_batch = divmod(row, labels.spec.batch_size)
        stored = labels[pass_index * labels.batches_per_pass + batch]
        soft = stored.logits[row_of_batch].softmax(0)
        best = soft.argsort(descending=True)[: len(_RANKS)]
        image = int(measured.image[position])
        cells = {
            "pass": pass_index,
            "row": row,
            "image": image,
            "file": files[image],
            "crop_area": round(float(measured.area[position]), 4),
            "class": names[measured.label[position]],
            "lam": round(float(measured.share[position]), 3),
            "partner": names[measured.partner[position]],
            "probability": round(float(measured.known[position]), 5),
        }
        top = [f"{names[label]} {soft[label]:.4f}" for label in best]
        rows.append(cells | dict(zip(_RANKS, top, strict=False)))
    return rows


def shortened(name: str, length: int = 24) -> str:
    """A class's name in at most so many characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def draw_drift(labels: LabelSet, measured: drift.Drift) -> Figure:
    """Panels: drift by crop area and by class, the worst on top; Tr(Sigma) of images if known."""
    panels = 2 if np.isnan(measured.spread).any() else 3
    figure = Figure(figsize=(1.5 + 4.5 * panels, 5), layout="constrained")
    by_area, by_class, *others = figure.subplots(1, panels)

    areas = [row for row in area_rows(measured) if row["views"]]
    shares = [100 * row["drifting"] / row["views"] for row in areas]
    bars = by_area.bar([100 * row["from"] + 5 for row in areas], shares, 9, color="C1")
    told = [f"{share:.0f} %\nof {row['views']:,}" for share, row in zip(shares, areas, strict=True)]
    by_area.bar_label(bars, told, padding=2, fontsize=8)
    by_area.set(title="by crop area", ylabel="views that drift (%)", ylim=(0, 115), xlim=(0, 100))
    by_area.set(xlabel="area of the crop (% of its image)", xticks=range(0, 101, 10))
    by_area.set_yticks(range(0, 101, 20))

    classes = class_rows(labels, measured)
    worst = classes[:_CLASSES_SHOWN]
    shares = [100 * row["drifting_share"] for row in worst]
    bars = by_class.barh(range(len(worst)), shares, color="C1")
    told = [f"{share:.0f} % of {row['views']:,}" for share, row in zip(shares, worst, strict=True)]
    by_class.bar_label(bars, told, padding=2, fontsize=8)
    by_class.set_yticks(range(len(worst)), [shortened(row["name"]) for row in worst], fontsize=8)
    by_class.invert_yaxis()
    shown = "the worst first" if worst == classes else f"worst {len(worst)} of {len(classes):,}"
    by_class.set(title=f"by class, {shown}", xlabel="views that drift (%)", xlim=(0, 125))
    by_class.set_xticks(range(0, 101, 20))

    for axes in others:
        axes.hist(measured.spread, bins=30, color="C0")
        axes.set(xlabel="Tr(Σ) of an image's soft labels", ylabel="images", xlim=(0, None))
        axes.set_title("how much an image's labels differ")
    share, views = measured.drifts.mean(), len(measured.drifts)
    figure.suptitle(f"{100 * share:.1f} % of {views:,} views drift: {_DRIFTS}")
    return figure


def draw_views(labels: LabelSet, rows: list[dict], folder: folders.ImageFolder) -> Figure:
    """The views of views.csv: image with the crop's box, the view as rendered, and its label."""
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, 2 * columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    bar = cli.progress(rows, desc="contact sheet", unit="view")
    for view, (left, right) in zip(bar, panels.reshape(-1, 2), strict=False):
        batch, row = divmod(view["row"], labels.spec.batch_size)
        views = labels.views(view["pass"] * labels.batches_per_pass + batch)
        sources = [images.pixels_of(images.decode(folder.files[index])) for index in views.index]
        crops = crop_resize(sources, views.box, views.flip, labels.spec.input_size)
        rendered = mix(crops, views)[row].round().clamp(0, 255).byte()
        if views.index[row] != view["image"]:
            row = int(views.partner()[row])
        y, x, height, width = views.box[row].tolist()
        corner = (x - 0.5, y - 0.5)  # pixel 0 is drawn from -0.5 to 0.5
        left.imshow(sources[row].permute(1, 2, 0).numpy())
        left.add_patch(
            Rectangle(corner, width, height, fill=False, edgecolor="yellow", linewidth=2)
        )
        title = [f"{shortened(view['class'])}, λ = {view['lam']:.2f}"]
        if view["lam"] < 1:
            title.append(f"partner {shortened(view['partner'])}, {1 - view['lam']:.2f}")
        title.append(f"p(these) = {view['probability']:.2f}")
        left.set_title("\n".join(title), fontsize=8)
        right.imshow(rendered.permute(1, 2, 0).numpy())
        top = [view[rank].rpartition(" ") for rank in _RANKS if rank in view]
        title = [f"{shortened(name)} {probability}" for name, _, probability in top]
        right.set_title("\n".join(title), fontsize=8, color="firebrick")
    figure.suptitle(
        "Views that drift most. Left: the image that covers most of the view, the crop's box, "
        "its class and\nthe partner's with their shares; right: the view and the teacher's top 3"
    )
    return figure


def open_folder(labels: LabelSet, path: Path) -> folders.ImageFolder:
    """The labelled images; raises UserError when they are others."""
    folder = folders.scan(path)
    _, fingerprint = images.inspect(folder)
    if fingerprint != labels.manifest["images"]["sha256"]:
        raise UserError(f"{path} does not hold the images that {labels.path} was made from")
    return folder


def main() -> None:
    args = parse_arguments()
    labels = LabelSet.open(args.label_dir)
    reference = LabelSet.open(args.reference) if args.reference else None
    folder = open_folder(labels, args.data_dir) if args.data_dir else None
    manifest, out = labels.manifest, args.out_dir
    print(
        f"{args.label_dir}: {manifest['dataset']}, {manifest['num_classes']} classes, "
        f"{manifest['images']['count']} images x {labels.passes} passes, codec "
        f"{manifest['codec']['name']}; teacher top-1 on the views {manifest['teacher_top1']:.1f} %"
    )
    report = {
        "teacher_top1": manifest["teacher_top1"],
        "sizes": report_sizes(labels),
        "lost": report_loss(labels, reference),
    }
    measured = drift.measure(labels)
    report |= {"drift": report_drift(measured), "codec": manifest["codec"]}
    if folder and out is None:
        out = labels.path.with_name(labels.path.name + "_report")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "report.json", to_json(report))
    files = [str(image) for image in range(len(measured.spread))]
    if folder:
        files = [path.relative_to(folder.root).as_posix() for path in folder.files]
    write_csv(image_rows(labels, measured, files), out / "images.csv")
    write_csv(class_rows(labels, measured), out / "classes.csv")
    write_csv(area_rows(measured), out / "crop_area.csv")
    views = view_rows(labels, measured, measured.worst(args.samples), files)
    write_csv(views, out / "views.csv", columns=_VIEW_COLUMNS)
    save_figure(draw_drift(labels, measured), out / "drift.png")
    if folder and views:
        save_figure(draw_views(labels, views, folder), out / "views.png")
    print(f"\ntables and pictures: {out}" + ("" if views else " (no view drifts: no views.png)"))


if __name__ == "__main__":
    cli.run(main)
