"""A label set of real photos whose ImageNet class is known, by a real teacher, for report.py.

python benchmarks/drift_photos.py --photos photos --data-dir D --label-dir L   (see label_size.py)
python relabel/report.py --label-dir L --data-dir D --out-dir R

The photos become an image folder with one sub-folder per class that has a photo; labels have all
1000 classes. Views are not mixed, so that whatever drifts does so because of the crop.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

import numpy as np
import torch
from PIL import Image

from benchmarks.efficientnet_lite0 import factory
from benchmarks.label_size import find_photos, load
from utils import cli, runtime
from utils.data import datasets, images
from utils.data.views import RATIO, render
from utils.labels import LabelWriter

PASSES = 25
# A word of the file's path: its class in ImageNet-1K, as a person sees it.
CLASSES = {
    "LadyBird": 301,  # ladybug
    "chelsea": 285,  # Egyptian cat
    "EveningGlow": 472,  # canoe
    "motorcycle_left": 665,  # moped
    "rocket": 657,  # missile
    "Picture_1A": 696,  # paintbrush
    "Kite": 701,  # parachute
    "ColdRipple": 718,  # pier
    "camera": 872,  # tripod
    "greentock": 892,  # wall clock
    "Picture_0B": 952,  # fig
    "coffee": 967,  # espresso
    "aitzgorri": 970,  # alp
    "picosdeeuropa": 970,
    "YellowFlower": 985,  # daisy
    "FreshFlower": 985,
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder, searched recursively")
    parser.add_argument("--data-dir", type=Path, required=True, help="image folder to make")
    parser.add_argument("--label-dir", type=Path, required=True, help="label set to make")
    return parser.parse_args()


def write_images(photos: list[Path], folder: Path) -> None:
    """The chosen photos, one sub-folder per class, the longer side at most 512."""
    for photo in photos:
        for word, label in CLASSES.items():
            if word in photo.as_posix():
                (folder / f"{label:05d}").mkdir(parents=True, exist_ok=True)
                pixels = load(photo).permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / f"{label:05d}" / f"{word}.png")


@torch.inference_mode()
def main() -> None:
    args = parse_arguments()
    if not args.data_dir.exists():
        write_images(find_photos(args.photos), args.data_dir)
    folder = images.scan(args.data_dir)
    sizes, fingerprint = images.inspect(folder)
    hard_labels = torch.tensor([int(path.parent.name) for path in folder.files])
    imagenet = datasets.named("imagenet1k")
    settings = {
        "dataset": imagenet.name,
        "num_classes": imagenet.num_classes,
        "classes": [f"{label:05d}" for label in range(imagenet.num_classes)],
        "ipc": None,
        "slc": None,
        "passes": PASSES,
        "batch_size": 16,
        "image_size": None,
        "input_size": imagenet.input_size,
        "mean": list(imagenet.mean),
        "std": list(imagenet.std),
        "seed": 42,
        "crop_scale": [0.08, 1.0],
        "crop_ratio": list(RATIO),
        "mix": "none",
        "teachers": [{"name": "benchmarks.efficientnet_lite0:factory"}],
        "bssl": False,
        "codec": {"name": "fp16"},
        "images": {
            "count": len(folder.files),
            "per_class": torch.bincount(hard_labels, minlength=imagenet.num_classes).tolist(),
            "sha256": fingerprint,
        },
        "versions": runtime.versions(),
    }
    writer = LabelWriter(args.label_dir, settings, np.asarray(sizes))
    network = factory().eval().to(memory_format=torch.channels_last)
    pixels = [images.pixels_of(images.decode(path)) for path in folder.files]
    mean, std = torch.tensor(imagenet.mean), torch.tensor(imagenet.std)
    with writer.begun():
        for number in cli.progress(range(PASSES), desc="relabel", unit="pass"):
            views = writer.draw(number)
            sources = [pixels[index] for index in views.index]
            logits = network(render(sources, views, imagenet.input_size, mean, std))
            writer.write_pass(number, logits, views, hard_labels)
        writer.finish()


if __name__ == "__main__":
    cli.run(main)
