"""Writes scikit-learn's handwritten digits as image folders: train/ and test/, 32x32 RGB PNG.

python scripts/prepare_digits.py --out-dir D
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from utils import cli
from utils.data.views import ORDER, shuffle
from utils.files import whole_folder

_SEED = 0
_TEST_IMAGES = 898


def main() -> None:
    parser = cli.Parser(description="Write scikit-learn's digits as train/ and test/ folders.")
    parser.add_argument("--out-dir", type=Path, required=True, help="gets train/ and test/")
    args = parser.parse_args()
    if args.out_dir.exists():
        print(f"{args.out_dir} is there already: nothing to do")
        return
    from sklearn.datasets import load_digits  # imported late: only this script needs it

    digits = load_digits()
    order = shuffle(_SEED, ORDER, 0, len(digits.images))
    with whole_folder(args.out_dir) as out:
        for position, index in enumerate(cli.progress(order, desc="digits", unit="img")):
            split = "test" if position < _TEST_IMAGES else "train"
            folder = out / split / f"{digits.target[index]:05d}"
            folder.mkdir(parents=True, exist_ok=True)
            grey = np.round(digits.images[index] / 16 * 255).astype(np.uint8)
            image = Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR)
            image.convert("RGB").save(folder / f"{index:04d}.png")


if __name__ == "__main__":
    cli.run(main)
