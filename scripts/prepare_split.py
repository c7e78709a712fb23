"""Splits training images in two, by links, so that settings can be chosen without the test set.

OUT/held_out gets the same number of images of every class, chosen at random; OUT/rest the others.
Train the teacher and distil from `rest`, compare settings on `held_out`, and look at the test
images once.

python scripts/prepare_split.py --data-dir TRAIN --out-dir OUT --held-out 500
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.prepare_distilled import choose_candidates
from utils import cli
from utils.cli import UserError, bounded
from utils.data import folders
from utils.files import atomic_write, read_json, to_json, whole_folder

_RECORD = "split.json"


def split(folder: folders.ImageFolder, count: int, seed: int) -> dict[str, list[Path]]:
    """Files of "held_out" (`count` of every class) and "rest", each in the folder's order.

    Raises:
        UserError: a class would have no image left in `rest`.
    """
    for name, images_of_class in zip(folder.classes, folder.counts(), strict=True):
        if count >= images_of_class:
            raise UserError(f"--held-out {count}: class {name} has only {images_of_class} images")
    held_out = set(choose_candidates(folder.labels, count, seed).tolist())
    rows = list(enumerate(folder.files))
    return {
        "held_out": [path for row, path in rows if row in held_out],
        "rest": [path for row, path in rows if row not in held_out],
    }


def main() -> None:
    parser = cli.Parser(description="Split training images in two, by links.")
    parser.add_argument("--data-dir", type=Path, required=True, help="training images")
    parser.add_argument("--out-dir", type=Path, required=True, help="gets held_out/ and rest/")
    parser.add_argument(
        "--held-out", type=bounded(int, 1), required=True, metavar="N", help="images per class"
    )
    parser.add_argument(
        "--seed", type=bounded(int, 0, 2**62), default=0, metavar="N", help="of the choice"
    )
    args = parser.parse_args()
    folder = folders.scan(args.data_dir)
    record = {"source": folder.listing_sha256(), "held_out": args.held_out, "seed": args.seed}
    if (args.out_dir / _RECORD).is_file() and read_json(args.out_dir / _RECORD) == record:
        print(f"{args.out_dir} is there already: nothing to do")
        return
    parts = split(folder, args.held_out, args.seed)
    with whole_folder(args.out_dir) as out:
        for part, files in parts.items():
            for path in files:
                link = out / part / path.relative_to(folder.root)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        atomic_write(out / _RECORD, to_json(record))
    print(f"{args.out_dir}: " + ", ".join(f"{len(files)} {part}" for part, files in parts.items()))


if __name__ == "__main__":
    cli.run(main)
