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
import csv
import io

import numpy as np
from matplotlib.figure import Figure
from torchvision.models import ResNet18_Weights

from relabel import drift
from relabel.lost import compare
from utils import cli
from utils.cli import UserError
from utils.data import images
from utils.data.views import crop_resize, mix
from utils.files import atomic_write, to_json
from utils.labels import LabelSet, pass_name

TEMPERATURES = (20.0, 4.0, 1.0)
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
    for number in range(labels.passes):
        with np.load(labels.path / pass_name(number), allow_pickle=False) as stored:
            payload += stored["payload"].nbytes
            views += sum(stored[name].nbytes for name in _VIEW_ARRAYS if name in stored)

    def file(name: str) -> int:
        path = labels.path / name
        return path.stat().st_size if path.exists() else 0

    found = {
        "logits": payload,
        "codec, fitted part": file("codec.npz"),
        "views": views,
        "image sizes": file("sizes.npz"),
        "manifest": file("manifest.json"),
    }
    return {**found, "checksums, headers": labels.bytes_on_disk() - sum(found.values())}


def published(classes: int) -> dict[str, float]:
    """Bytes per label of other formats, views included, for this number of classes."""
    pruned = {
        f"LPQLD, top {k}": 4.0 * k + 10  # k x (fp16 + int16), 4 fp16 coordinates, flip, mix, box
        for k in (100, 50, 10)
        if k < classes
    }
    return {
        "SRe2L, LPLD (raw logits fp16)": 2.0 * classes + 25,
        "HALD, published code (softmax fp16)": 2.0 * classes + 17,
        **pruned,
        **({"FKD, top 5": 40.0} if classes > 5 else {}),
    }


def size_table(labels: LabelSet, parts: dict[str, int]) -> tuple[str, dict]:
    """Bytes by purpose, and factors against fp16 and the published formats."""
    classes = labels.manifest["num_classes"]
    count = labels.passes * labels.manifest["images"]["count"]
    total = sum(parts.values())
    whole = total - parts["logits"] - parts["codec, fitted part"] + 2 * classes * count
    lines = [f"{'':36}{'bytes':>15}{'per label':>12}"]
    for name, size in [*parts.items(), ("total", total)]:
        lines.append(f"{name:36}{size:>15,}{size / count:>12.2f}")
    lines += ["", f"{'against':36}{'bytes/label':>15}{'factor':>12}"]
    others = {"fp16 logits in this format": whole / count, **published(classes)}
    for name, size in others.items():
        lines.append(f"{name:36}{size:>15,.1f}{size * count / total:>12.1f}")
    factors = {name: round(size * count / total, 3) for name, size in others.items()}
    return "\n".join(lines), {"labels": count, "bytes": {**parts, "total": total}, **factors}


def check_reference(labels: LabelSet, reference: LabelSet) -> None:
    """Raises UserError unless `reference` holds labels of the same views by the same teacher."""
    for key in ("images", "teachers", "bssl", "seed", "batch_size", "mix", "input_size"):
        if labels.manifest.get(key) != reference.manifest.get(key):
            raise UserError(
                f"--reference {reference.path} does not hold the same labels: {key} differs from "
                f"that of {labels.path}"
            )
    if reference.passes < labels.passes:
        raise UserError(
            f"--reference {reference.path} has {reference.passes} passes, {labels.path} has "
            f"{labels.passes}"
        )
    if reference.manifest["codec"]["name"] != "fp16":
        raise UserError(f"--reference {reference.path} is not in codec fp16")


def loss_table(labels: LabelSet, reference: LabelSet | None) -> tuple[str, dict]:
    """What the codec lost, or why that is not known."""
    codec = labels.manifest["codec"]
    if reference is not None:
        check_reference(labels, reference)
        passes = cli.progress(range(labels.passes), desc="compare", unit="pass")
        distortions, same = compare(labels, reference, passes, TEMPERATURES)
        measured = {
            f"distortion at T = {t:g}": value
            for t, value in zip(TEMPERATURES, distortions, strict=True)
        } | {"same first class": same}
        lines = [f"{name:36}{value:>15.5f}" for name, value in measured.items()]
        return f"against {reference.path} (fp16)\n" + "\n".join(lines), measured
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


def drift_table(labels: LabelSet, found: drift.Drift) -> tuple[str, dict]:
    """Tr(Sigma) and views astray, overall and by the crop's area."""
    total, astray = int(found.views.sum()), int(found.astray.sum())
    numbers = {
        "mean Tr(Sigma)": float(np.nanmean(found.spread)) if labels.passes > 1 else None,
        "views": total,
        "astray": astray / total,
        "none of the view's classes": found.none / total,
    }
    spread = f"{numbers['mean Tr(Sigma)']:.4f}" if labels.passes > 1 else "needs two passes"
    lines = [
        f"Tr(Sigma) of an image's soft labels, mean over images: {spread}",
        f"first class not the mainly shown image's: {100 * astray / total:.1f} % of {total:,} "
        f"views; none of the view's classes: {100 * found.none / total:.1f} %",
        f"{'crop area':>12}{'views':>10}{'astray (%)':>12}{'p(own class)':>14}",
    ]
    for low, high, (views, wrong), own in zip(
        drift.AREA_EDGES, drift.AREA_EDGES[1:], found.by_area, found.own_by_area, strict=False
    ):
        share = f"{100 * wrong / views:>12.1f}{own:>14.3f}" if views else f"{'-':>12}{'-':>14}"
        lines.append(f"{low:>6.1f}-{high:>4.1f} {views:>10,}{share}")
    return "\n".join(lines), numbers


def write_rows(path: Path, header: list[str], rows: list[list]) -> None:
    """A CSV file."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write(path, buffer.getvalue().encode())


def class_rows(labels: LabelSet, found: drift.Drift) -> list[list]:
    """class, name, views, share astray, mean Tr(Sigma); the classes that drift most first."""
    own, names = labels.hard_labels.numpy(), class_names(labels)
    classes = labels.manifest["num_classes"]
    views = np.bincount(own, found.views, classes)
    astray = np.bincount(own, found.astray, classes) / np.maximum(views, 1)
    spread = np.bincount(own, found.spread, classes) / np.maximum(
        np.bincount(own, minlength=classes), 1
    )
    order = np.argsort(-astray, kind="stable")
    return [
        [c, names[c], int(views[c]), round(astray[c], 4), round(spread[c], 5)]
        for c in order.tolist()
        if views[c]
    ]


def write_tables(out: Path, labels: LabelSet, found: drift.Drift, names: list[str]) -> None:
    """images.csv, classes.csv, crop_area.csv, views.csv."""
    own = labels.hard_labels.tolist()
    classes = class_names(labels)
    write_rows(
        out / "images.csv",
        ["image", "file", "class", "views", "astray", "tr_sigma"],
        [
            [i, names[i], own[i], found.views[i], found.astray[i], round(found.spread[i], 6)]
            for i in range(len(own))
        ],
    )
    header = ["class", "name", "views", "astray_share", "mean_tr_sigma"]
    write_rows(out / "classes.csv", header, class_rows(labels, found))
    write_rows(
        out / "crop_area.csv",
        ["from", "to", "views", "astray", "mean_probability_of_own_class"],
        [
            [drift.AREA_EDGES[k], drift.AREA_EDGES[k + 1], *found.by_area[k], found.own_by_area[k]]
            for k in range(10)
        ],
    )
    header = ["pass", "row", "image", "file", "crop_area", "class", "probability"]
    rows = []
    for view in found.worst:
        top = [f"{classes[label]} {value:.4f}" for label, value in view.top]
        place = [view.pass_index, view.row, view.image, names[view.image], round(view.area, 4)]
        rows.append([*place, classes[view.expected], round(view.own, 5), *top])
    write_rows(out / "views.csv", [*header, "first", "second", "third"], rows)


def draw_drift(path: Path, labels: LabelSet, found: drift.Drift) -> None:
    """Three panels: drift against crop area, over classes, and Tr(Sigma) over images."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    centres = np.arange(10) / 10 + 0.05
    views, astray = found.by_area.T
    there = views > 0
    shares = 100 * astray[there] / views[there]
    left.bar(centres[there], shares, 0.09, color="C1", label="first class is another")
    left.plot(centres[there], 100 * found.own_by_area[there], "C0o-", label="mean p(own class)")
    left.set(xlabel="crop area / image area", ylabel="views (%)", xlim=(0, 1), ylim=(0, 100))
    left.legend()
    shares = 100 * np.array([row[3] for row in class_rows(labels, found)])
    middle.bar(np.arange(len(shares)), shares, 1.0, color="C1")
    middle.set(xlabel="class, sorted", ylabel="views with another first class (%)", ylim=(0, 100))
    if labels.passes > 1:
        right.hist(found.spread, bins=30, color="C0")
    right.set(xlabel="Tr(Σ) of an image's soft labels", ylabel="images", xlim=(0, None))
    figure.suptitle(f"Drift of {len(found.views):,} images, {found.views.sum():,} views")
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_views(
    path: Path, labels: LabelSet, found: drift.Drift, folder: images.ImageFolder
) -> None:
    """The views that drift most: image with the crop's box, the view as rendered, and its label."""
    columns = min(4, len(found.worst))
    rows = -(-len(found.worst) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.75 * rows), layout="constrained")
    panels = figure.subplots(rows, 2 * columns, squeeze=False)
    names = class_names(labels)
    for axes in panels.flat:
        axes.set_axis_off()
    pairs = panels.reshape(-1, 2)
    for (left, right), view in zip(
        pairs, cli.progress(found.worst, desc="contact sheet", unit="view"), strict=False
    ):
        batch, place = divmod(view.row, labels.spec.batch_size)
        views = labels.views(view.pass_index * labels.batches_per_pass + batch)
        sources = [
            images.pixels_of(images.decode(folder.files[index])) for index in views.index.tolist()
        ]
        crops = crop_resize(sources, views.box, views.flip, labels.spec.input_size)
        shown = mix(crops, views)[place]
        partner = views.partner()
        if int(views.index[place]) != view.image:
            place = int(partner[place])
        top, left_edge, height, width = views.box[place].tolist()
        left.imshow(sources[place].permute(1, 2, 0).numpy())
        corners = [left_edge, left_edge + width], [top, top + height]
        left.plot(
            [corners[0][k] for k in (0, 1, 1, 0, 0)],
            [corners[1][k] for k in (0, 0, 1, 1, 0)],
            color="yellow",
            lw=2,
        )
        left.set_title(f"{shorten(names[view.expected])}\np = {view.own:.2f}", fontsize=8)
        right.imshow(shown.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
        lines = [f"{shorten(names[c])} {p:.2f}" for c, p in view.top]
        right.set_title("\n".join(lines), fontsize=8, color="firebrick")
    figure.suptitle(
        "Views that drift most. Left: image, its class, the crop's box; right: the view and the "
        "teacher's top 3"
    )
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))


def shorten(name: str) -> str:
    return name if len(name) <= 22 else name[:20] + "…"


def open_folder(labels: LabelSet, path: Path) -> images.ImageFolder:
    """The labelled images; raises UserError when they are others."""
    folder = images.scan(path)
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
    text, report = size_table(labels, sizes(labels))
    print(f"\n{text}")
    text, measured = loss_table(labels, reference)
    print(f"\n{text}", flush=True)
    found = drift.measure(labels, args.samples)
    text, numbers = drift_table(labels, found)
    print(f"\n{text}")
    if folder and out is None:
        out = labels.path.with_name(labels.path.name + "_report")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    names = [str(number) for number in range(len(found.views))]
    if folder:
        names = [path.relative_to(folder.root).as_posix() for path in folder.files]
    report = {"sizes": report, "lost": measured, "drift": numbers, "codec": manifest["codec"]}
    atomic_write(out / "report.json", to_json(report))
    write_tables(out, labels, found, names)
    draw_drift(out / "drift.png", labels, found)
    if folder and found.worst:
        draw_views(out / "views.png", labels, found, folder)
    print(f"\ntables and pictures: {out}")


if __name__ == "__main__":
    cli.run(main)
