"""Makes a miniature of ImageNet-1K's layout from a folder of real photos, and a teacher for it.

1000 class folders with one 224-pixel JPEG each, cut at random from the photos; a validation folder
with another cut next to each; and a ResNet18 with random features whose last layer is fitted to the
images by ridge regression, so that it passes the class-order check. Then:

python benchmarks/miniature_imagenet.py --photos PHOTOS --out-dir M
METHOD=miniature IPC=1 SLC=2 SOFT_EPOCHS=2 HARD_EPOCHS=1 Main_Data_Path=M val_dir=M/val_dir \\
    bash scripts/run_imagenet.sh
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

import models
from utils import cli
from utils.cli import UserError
from utils.data import datasets, images
from utils.data.views import normalise
from utils.files import whole_folder

_CLASSES, _SIDE, _SHIFT = 1000, 224, 12


def cut_images(photos: Path, out: Path) -> None:
    """Writes the distilled image and the validation image of every class."""
    endings = (".png", ".jpg", ".jpeg")
    pictures = [images.decode(f) for f in sorted(photos.rglob("*")) if f.suffix.lower() in endings]
    pictures = [picture for picture in pictures if min(picture.size) >= _SIDE + _SHIFT]
    if not pictures:
        raise UserError(f"{photos} has no photo of at least {_SIDE + _SHIFT} pixels")
    numbers = np.random.default_rng(0)
    for label in cli.progress(range(_CLASSES), desc="cutting", unit="class"):
        picture = pictures[label % len(pictures)]
        left, top = (int(numbers.integers(0, side - _SIDE - _SHIFT + 1)) for side in picture.size)
        folder = f"generated_data/syn_data/imagenet1k/miniature_ipc1/{label:05d}"
        for name, shift in ((folder, 0), (f"val_dir/imagenet1k/{label:05d}", _SHIFT)):
            (out / name).mkdir(parents=True)
            box = (left + shift, top + shift, left + shift + _SIDE, top + shift + _SIDE)
            picture.crop(box).save(out / name / "00000.jpg", quality=90)


def fit_teacher(out: Path) -> None:
    """Writes ResNet18.pth: random features, last layer by ridge regression on the images."""
    facts = datasets.named("imagenet1k")
    folder = images.scan(out / "generated_data/syn_data/imagenet1k/miniature_ipc1")
    pixels = images.load_evaluation(folder, facts)
    torch.manual_seed(0)
    model = models.build("ResNet18", _CLASSES, _SIDE).eval()
    head, model.fc = model.fc, torch.nn.Identity()
    mean, std = torch.tensor(facts.mean), torch.tensor(facts.std)
    with torch.inference_mode():
        parts = cli.progress(pixels.split(50), desc="features", unit="batch")
        features = torch.cat([model(normalise(part.float(), mean, std)) for part in parts]).double()
    centred = features - features.mean(0)
    scale = centred.std()
    kernel = centred @ centred.T / scale**2
    targets = 10 * torch.eye(_CLASSES, dtype=torch.double)
    solved = torch.linalg.solve(kernel + 1e-3 * torch.eye(_CLASSES, dtype=torch.double), targets)
    weight = (centred.T @ solved / scale**2).T
    head.weight.data = weight.float()
    head.bias.data = (-weight @ features.mean(0)).float()
    model.fc = head
    torch.save(model.state_dict(), out / "ResNet18.pth")


def main() -> None:
    parser = cli.Parser(description="Make a miniature of ImageNet-1K's layout from real photos.")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photos")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder to make")
    args = parser.parse_args()
    with whole_folder(args.out_dir) as out:
        cut_images(args.photos, out)
        fit_teacher(out)


if __name__ == "__main__":
    cli.run(main)
