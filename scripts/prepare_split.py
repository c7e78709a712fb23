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

from scripts.prepare_distilled import choose_at_random
from utils import cli
from utils.cli import UserError, bounded
from utils.data import folders
from utils.files import atomic_write, read_json, to_json, whole_folder

_RECORD = "split.json"


def main() -> None:
    parser = cli.Parser(description="Split training images in two, by links.")
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="training images")
    add("--out-dir", type=Path, required=True, help="gets held_out/ and rest/")
    add("--held-out", type=bounded(int, 1), required=True, metavar="N", help="images per class")
    add("--seed", type=bounded(int, 0, 2**62), default=0, metavar="N", help="of the choice")
    args = parser.parse_args()
    folder = folders.scan(args.data_dir)
    record = {"source": folder.listing_sha256(), "held_out": args.held_out, "seed": args.seed}
    if (args.out_dir / _RECORD).is_file() and read_json(args.out_dir / _RECORD) == record:
        print(f"{args.out_dir} is there already: nothing to do")
        return
    for name, images in zip(folder.classes, folder.counts(), strict=True):
        if images <= args.held_out:  # none would be left in rest/
            raise UserError(f"--held-out {args.held_out}: class {name} has only {images} images")
    held_out = {*choose_at_random(folder.labels, args.held_out, args.seed).tolist()}
    with whole_folder(args.out_dir) as out:
        for row, path in enumerate(folder.files):
            part = out / ("held_out" if row in held_out else "rest")
            link = part / path.relative_to(folder.root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        atomic_write(out / _RECORD, to_json(record))
    rest = len(folder.files) - len(held_out)
    print(f"{args.out_dir}: {len(held_out)} held_out, {rest} rest")


if __name__ == "__main__":
    cli.run(main)
