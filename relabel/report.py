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

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchvision.models import ResNet18_Weights

from relabel import drift
from relabel.compress import compare
from utils import cli
from utils.cli import UserError
from utils.data import folders, images
from utils.data.views import crop_resize, mix
from utils.files import atomic_write, save_figure, to_json
from utils.labels import LabelSet, first_difference
from utils.labels.arrays import read_npz
from utils.results import write_csv

TEMPERATURES = (20.0, 4.0, 1.0)
_RANKS = ("top1", "top2", "top3")
_CLASSES_SHOWN = 20  # of drift.png
_VIEW_COLUMNS = ("pass", "row", "image", "file", "crop_area", "class", "lam", "partner")
_VIEW_COLUMNS += ("probability", *_RANKS)
_VIEW_ARRAYS = ("index", "box", "flip", "mix_index", "mix_box", "mix_lam")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Report sizes and drift of a label set.")
    parser.add_argument("--label-dir", type=Path, required=True, help="a finished label set")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="L2",
        help="the same labels in fp16, to measure what the codec lost",
    )
    parser.add_argument("--data-dir", type=Path, help="the labelled images, for pictures")
    parser.add_argument(
        "--out-dir",
        type=Path,
        help="where tables and pictures go (default with --data-dir: LABEL_DIR_report; else none)",
    )
    parser.add_argument(
        "--samples", type=cli.bounded(int, 1, 100), default=16, metavar="N", help="views to show"
    )
    return parser.parse_args()


def sizes(labels: LabelSet) -> dict[str, int]:
    """Bytes on disk by purpose; they add up to `labels.bytes_on_disk()`."""
    payload = views = 0
    for path in labels.path.glob("pass_*.npz"):
        stored = read_npz(path)
        payload += stored["payload"].nbytes
        views += sum(stored[name].nbytes for name in _VIEW_ARRAYS if name in stored)
    files = {path.name: path.stat().st_size for path in labels.path.iterdir()}
    parts = {
        "logits": payload,
        "codec, fitted part": files.get("codec.npz", 0),
        "views": views,
        "image sizes": files.get("sizes.npz", 0),
        "manifest": files["manifest.json"],
    }
    return {**parts, "checksums, headers": labels.bytes_on_disk() - sum(parts.values())}


def size_table(labels: LabelSet, parts: dict[str, int]) -> tuple[str, dict]:
    """Bytes by purpose, and the factor against fp16."""
    count = labels.passes * labels.manifest["images"]["count"]
    total = sum(parts.values())
    whole = total - parts["logits"] - parts["codec, fitted part"]
    whole += 2 * labels.manifest["num_classes"] * count
    lines = [f"{'':36}{'bytes':>15}{'per label':>12}"]
    for name, size in {**parts, "total": total, "the same in codec fp16": whole}.items():
        lines.append(f"{name:36}{size:>15,}{size / count:>12.2f}")
    factor = round(whole / total, 3)
    lines.append(f"{'factor against fp16':36}{factor:>15.1f}")
    return "\n".join(lines), {
        "labels": count,
        "bytes": {**parts, "total": total},
        "factor against fp16": factor,
    }


def check_reference(labels: LabelSet, reference: LabelSet) -> None:
    """Raises UserError unless `reference` holds the same labels in fp16."""
    if reference.manifest["codec"]["name"] != "fp16":
        raise UserError(f"--reference {reference.path} is not in codec fp16")
    decisive = ("images", "teachers", "bssl", "seed", "batch_size", "mix", "input_size")
    facts = [{key: of.manifest.get(key) for key in decisive} for of in (labels, reference)]
    if difference := first_difference(*facts):
        raise UserError(f"--reference {reference.path} holds other labels ({difference})")


def loss_table(labels: LabelSet, reference: LabelSet | None) -> tuple[str, dict]:
    """What the codec lost, or why that is not known."""
    codec = labels.manifest["codec"]
    if reference is not None:
        check_reference(labels, reference)
        passes = cli.progress(range(labels.passes), desc="compare", unit="pass")
        distortions, same = compare(labels, reference, passes, TEMPERATURES)
        names = [f"distortion at T = {t:g}" for t in TEMPERATURES]
        measured = {**dict(zip(names, distortions, strict=True)), "same top-1 class": same}
        lines = [f"{name:36}{value:>15.5f}" for name, value in measured.items()]
        return "\n".join([f"against {reference.path} (fp16)", *lines]), measured
    if codec["name"] == "fp16":
        return "codec fp16: nothing is lost beyond half precision", {}
    options = ", ".join(f"{key} {value}" for key, value in codec.items() if key != "name")
    return (
        f"codec {codec['name']} ({options}): what it lost is not known without --reference, the "
        "same labels in fp16"
    ), {}


def class_names(labels: LabelSet) -> list[str]:
    """Folder names, or what ImageNet-1K calls its classes."""
    if labels.manifest["dataset"] == "imagenet1k":
        return ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return labels.manifest["classes"]


def drift_table(measured: drift.Drift) -> tuple[str, dict]:
    """Tr(Sigma) and views that drift, overall and by the crop's area."""
    several = not np.isnan(measured.spread).any()
    spread = float(measured.spread.mean()) if several else None
    views, share = len(measured.drifts), float(measured.drifts.mean())
    lines = [
        "Tr(Sigma) of an image's soft labels, mean over images: "
        + (f"{spread:.4f}" if several else "needs two passes"),
        f"views that drift: {100 * share:.1f} % of {views:,} (the teacher's top-1 class is none of "
        "the classes in the view)",
        f"{'crop area':>12}{'views':>10}{'drift (%)':>12}{'p(view classes)':>17}",
    ]
    for row in area_rows(measured):
        if row["views"] == 0:
            continue
        lines.append(
            f"{row['from']:>6.1f}-{row['to']:>4.1f} {row['views']:>10,}"
            f"{100 * row['drifting'] / row['views']:>12.1f}"
            f"{row['mean_probability_of_view_classes']:>17.3f}"
        )
    return "\n".join(lines), {"mean Tr(Sigma)": spread, "views": views, "drifting": share}


def lines_of(**columns: np.ndarray | list) -> list[dict]:
    """Lines of a table, each a dict of its cells by column."""
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def area_rows(measured: drift.Drift) -> list[dict]:
    """Lines of crop_area.csv: what drifts by the crop's share of the image."""
    views = measured.by_area()
    known = measured.by_area(measured.known) / np.maximum(views, 1)
    return lines_of(
        **{"from": np.arange(10) / 10, "to": np.arange(1, 11) / 10},
        views=views,
        drifting=measured.by_area(measured.drifts).astype(int),
        mean_probability_of_view_classes=known,
    )


def class_rows(labels: LabelSet, measured: drift.Drift) -> list[dict]:
    """Lines of classes.csv: each class that views count for, those that drift most first.

    Of classes with equal shares that with more views comes first.
    """
    names, classes = class_names(labels), labels.manifest["num_classes"]
    views = np.bincount(measured.label, minlength=classes)
    drifting = np.bincount(measured.label, measured.drifts, classes) / np.maximum(views, 1)
    images_of = np.bincount(labels.hard_labels, minlength=classes)
    spread = np.bincount(labels.hard_labels, measured.spread, classes) / np.maximum(images_of, 1)
    order = [label for label in np.lexsort((-views, -drifting)) if views[label]]
    return lines_of(
        **{"class": order, "name": [names[label] for label in order]},
        views=views[order],
        drifting_share=drifting[order].round(4),
        mean_tr_sigma=spread[order].round(5),
    )


def image_rows(labels: LabelSet, measured: drift.Drift, files: list[str]) -> list[dict]:
    """Lines of images.csv; `files` names every image."""
    return lines_of(
        **{"image": range(len(files)), "file": files, "class": labels.hard_labels.tolist()},
        views=measured.by_image(),
        drifting=measured.by_image(measured.drifts).astype(int),
        tr_sigma=measured.spread.round(6),
    )


def view_rows(
    labels: LabelSet, measured: drift.Drift, worst: np.ndarray, files: list[str]
) -> list[dict]:
    """Lines of views.csv: the views that drift most, `worst` by position among all views."""
    names, rows = class_names(labels), []
    for position in worst.tolist():
        pass_index, row = divmod(position, len(files))
        batch, row_of_batch = divmod(row, labels.spec.batch_size)
        stored = labels[pass_index * labels.batches_per_pass + batch]
        soft = stored.logits[row_of_batch].softmax(0)
        image = int(measured.image[position])
        top = [f"{names[label]} {soft[label]:.4f}" for label in soft.argsort(descending=True)[:3]]
        rows.append(
            {
                "pass": pass_index,
                "row": row,
                "image": image,
                "file": files[image],
                "crop_area": round(float(measured.area[position]), 4),
                "class": names[measured.label[position]],
                "lam": round(float(measured.share[position]), 3),
                "partner": names[measured.partner[position]],
                "probability": round(float(measured.known[position]), 5),
                **dict(zip(_RANKS, top, strict=False)),
            }
        )
    return rows


def shortened(name: str, length: int = 24) -> str:
    """A class's name in at most so many characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def draw_drift(labels: LabelSet, measured: drift.Drift) -> Figure:
    """Panels: drift by crop area and by class, the worst on top; Tr(Sigma) of images if known."""
    spread_known = not np.isnan(measured.spread).any()
    figure = Figure(figsize=(15 if spread_known else 10.5, 5), layout="constrained")
    by_area, by_class, *others = figure.subplots(1, 3 if spread_known else 2)

    areas = [row for row in area_rows(measured) if row["views"]]
    shares = [100 * row["drifting"] / row["views"] for row in areas]
    bars = by_area.bar([100 * row["from"] + 5 for row in areas], shares, 9, color="C1")
    counts = [
        f"{share:.0f} %\nof {row['views']:,}" for share, row in zip(shares, areas, strict=True)
    ]
    by_area.bar_label(bars, counts, padding=2, fontsize=8)
    by_area.set(xlabel="area of the crop (% of its image)", xlim=(0, 100), xticks=range(0, 101, 10))
    by_area.set(ylabel="views that drift (%)", ylim=(0, 115), yticks=range(0, 101, 20))
    by_area.set(title="by crop area")

    classes = class_rows(labels, measured)
    worst = classes[:_CLASSES_SHOWN]
    shares = [100 * row["drifting_share"] for row in worst]
    bars = by_class.barh(range(len(worst)), shares, color="C1")
    by_class.set_yticks(range(len(worst)), [shortened(row["name"]) for row in worst], fontsize=8)
    counts = [
        f"{share:.0f} % of {row['views']:,}" for share, row in zip(shares, worst, strict=True)
    ]
    by_class.bar_label(bars, counts, padding=2, fontsize=8)
    by_class.invert_yaxis()
    by_class.set(xlabel="views that drift (%)", xlim=(0, 125), xticks=range(0, 101, 20))
    shown = "the worst first" if worst == classes else f"worst {len(worst)} of {len(classes):,}"
    by_class.set(title=f"by class, {shown}")

    for axes in others:
        axes.hist(measured.spread, bins=30, color="C0")
        axes.set(xlabel="Tr(Σ) of an image's soft labels", ylabel="images", xlim=(0, None))
        axes.set(title="how much an image's labels differ")
    figure.suptitle(
        f"{100 * measured.drifts.mean():.1f} % of {len(measured.drifts):,} views drift: the "
        "teacher's top-1 class is none of the classes in the view"
    )
    return figure


def draw_views(labels: LabelSet, rows: list[dict], folder: folders.ImageFolder) -> Figure:
    """The views of views.csv: image with the crop's box, the view as rendered, and its label."""
    columns = min(4, len(rows))
    size = (-(-len(rows) // columns), 2 * columns)
    figure = Figure(figsize=(2.1 * size[1], 2.9 * size[0]), layout="constrained")
    panels = figure.subplots(*size, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    bar = cli.progress(rows, desc="contact sheet", unit="view")
    for view, (left, right) in zip(bar, panels.reshape(-1, 2), strict=False):
        batch, row = divmod(view["row"], labels.spec.batch_size)
        views = labels.views(view["pass"] * labels.batches_per_pass + batch)
        sources = [
            images.pixels_of(images.decode(folder.files[index])) for index in views.index.tolist()
        ]
        crops = crop_resize(sources, views.box, views.flip, labels.spec.input_size)
        rendered = mix(crops, views)[row]
        if int(views.index[row]) != view["image"]:
            row = int(views.partner()[row])
        top, left_edge, height, width = views.box[row].tolist()
        left.imshow(sources[row].permute(1, 2, 0).numpy())
        corner = (left_edge - 0.5, top - 0.5)  # pixel 0 is drawn from -0.5 to 0.5
        box = Rectangle(corner, width, height, fill=False, edgecolor="yellow", linewidth=2)
        left.add_patch(box)
        shares = [f"{shortened(view['class'])}, λ = {view['lam']:.2f}"]
        if view["lam"] < 1:
            shares.append(f"partner {shortened(view['partner'])}, {1 - view['lam']:.2f}")
        title = [*shares, f"p(these) = {view['probability']:.2f}"]
        left.set_title("\n".join(title), fontsize=8)
        right.imshow(rendered.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
        top = [view[rank].rpartition(" ") for rank in _RANKS if rank in view]
        lines = [f"{shortened(name)} {probability}" for name, _, probability in top]
        right.set_title("\n".join(lines), fontsize=8, color="firebrick")
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
    text, size_report = size_table(labels, sizes(labels))
    print(f"\n{text}")
    text, loss_report = loss_table(labels, reference)
    print(f"\n{text}", flush=True)
    measured = drift.measure(labels)
    text, drift_report = drift_table(measured)
    print(f"\n{text}")
    if folder and out is None:
        out = labels.path.with_name(labels.path.name + "_report")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "teacher_top1": manifest["teacher_top1"],
        "sizes": size_report,
        "lost": loss_report,
        "drift": drift_report,
        "codec": manifest["codec"],
    }
    atomic_write(out / "report.json", to_json(report))
    if folder:
        files = [path.relative_to(folder.root).as_posix() for path in folder.files]
    else:
        files = [str(image) for image in range(len(measured.spread))]
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
