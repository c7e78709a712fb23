"""Makes an image data set from photographs: a class is one photograph, an image a patch of it.

apt-get download gnome-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 lxqt-themes \
    mate-backgrounds plasma-workspace-wallpapers ukui-wallpapers
for package in *.deb; do dpkg -x "$package" photos; done
cp -r SITE-PACKAGES/skimage/data SITE-PACKAGES/sklearn/datasets/images photos
python benchmarks/photos.py --photos photos --out-dir D

Training patches are from the left 40 % of a photograph, test patches from the right 40 %, and
val/ from the strip between them, so that no pixel is in two of the three. Pictures with little in
them, and those that look like an earlier one, are left out.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils import cli
from utils.cli import UserError
from utils.files import whole_folder

HEIGHT, PATCH, SIZE = 256, 64, 32  # of the scaled photograph, of a patch in it, of the image made
STRIPS = {"train": (0.0, 0.4), "val": (0.4, 0.6), "test": (0.6, 1.0)}
COUNTS = {"train": 60, "val": 15, "test": 40}
LEAST_DETAIL = 12  # grey levels: standard deviation within a patch, the median of a strip
LEAST_DIFFERENCE = 16  # grey levels: mean difference of two pictures of 12 x 8 pixels


def read(path: Path) -> Image.Image | None:
    """The picture in RGB, scaled to HEIGHT; None for what is no picture, or too small or narrow."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if height < HEIGHT or width < height * 1.3:
                return None
            image.draft("RGB", (2 * HEIGHT, 2 * HEIGHT))  # what JPEG scales while decoding
            image = image.convert("RGB")
    except (UnidentifiedImageError, OSError):
        return None
    return image.resize((round(width * HEIGHT / height), HEIGHT), Image.Resampling.LANCZOS)


def patches(picture: Image.Image, split: str) -> list[Image.Image]:
    """Patches of the split's strip at random places, the same ones each time."""
    first, last = (round(share * picture.width) for share in STRIPS[split])
    random = np.random.Philox([0, [*STRIPS].index(split)]).random_raw(2 * COUNTS[split])
    lefts = first + random[::2] % np.uint64(last - first - PATCH + 1)
    tops = random[1::2] % np.uint64(HEIGHT - PATCH + 1)
    boxes = [
        (x, y, x + PATCH, y + PATCH) for x, y in zip(lefts.tolist(), tops.tolist(), strict=True)
    ]
    return [picture.resize((SIZE, SIZE), Image.Resampling.BOX, box) for box in boxes]


def has_detail(made: dict[str, list[Image.Image]]) -> bool:
    """Whether there is something to see in most patches of every split."""
    spreads = [[np.std(patch.convert("L")) for patch in images] for images in made.values()]
    return all(np.median(of_split) >= LEAST_DETAIL for of_split in spreads)


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder, searched recursively")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder to make")
    args = parser.parse_args()
    seen: list[np.ndarray] = []
    with whole_folder(args.out_dir) as partial:
        for path in sorted(path for path in args.photos.rglob("*") if path.is_file()):
            if (picture := read(path)) is None:
                continue
            small = np.asarray(picture.resize((12, 8), Image.Resampling.BOX), dtype=np.float32)
            if any(np.abs(small - other).mean() < LEAST_DIFFERENCE for other in seen):
                continue
            made = {split: patches(picture, split) for split in STRIPS}
            if not has_detail(made):
                continue
            for split, images in made.items():
                folder = partial / split / f"{len(seen):05d}"
                folder.mkdir(parents=True)
                for position, image in enumerate(images):
                    image.save(folder / f"{position:03d}.png")
            seen.append(small)
            print(f"{len(seen) - 1:05d}: {path.name}")
        if len(seen) < 20:
            raise UserError(f"{args.photos} holds {len(seen)} usable photographs; 20 needed")


if __name__ == "__main__":
    cli.run(main)
