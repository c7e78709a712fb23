"""Sorts the validation images of Tiny-ImageNet or ImageNet-1K into class folders, by links.

Both come as one flat folder of images and a list of labels. The images stay where they are, under
their names: the class folders hold symbolic links to them (cp -rL copies them). Everything is
checked before the first link is made. --labels is

* a text in which an image's name and a WordNet id stand on one line: LOC_val_solution.csv, the
  script valprep.sh (which is read and not run), Tiny-ImageNet's val_annotations.txt; or
* the devkit's ILSVRC2012_validation_ground_truth.txt, with its meta.mat as --synsets: its numbers
  count from 1 in an order of the devkit's own.

Of ImageNet-1K the classes of the first three images are public knowledge, so a list in another
order is noticed.

python scripts/prepare_val.py --data-dir ILSVRC2012_img_val --labels LOC_val_solution.csv
    --out-dir V
python scripts/prepare_val.py --data-dir tiny-imagenet-200/val/images
    --labels tiny-imagenet-200/val/val_annotations.txt --out-dir V
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hashlib
import re

from utils import cli
from utils.cli import UserError
from utils.data import folders
from utils.files import atomic_write, read_json, to_json, whole_folder

_RECORD = "validation.json"
_WORDNET_ID = re.compile(r"\bn\d{8}\b")
_IMAGE = re.compile(r"\b(ILSVRC2012_)?val_\d+\b")
_CLASSES = 1000
_FORMS = (
    "--labels must be lines with an image's name and its WordNet id (ILSVRC2012_val_00000001 "
    "n01751748), or the devkit's ground truth together with --synsets, its meta.mat"
)
_KNOWN = {
    "ILSVRC2012_val_00000001": "n01751748",
    "ILSVRC2012_val_00000002": "n09193705",
    "ILSVRC2012_val_00000003": "n02105855",
}


def list_images(folder: Path) -> dict[str, Path]:
    """Image files side by side in a folder, by name without ending; raises UserError for none."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    images = {
        path.stem: path
        for path in files
        if path.suffix.lower() in folders.IMAGE_ENDINGS and not path.name.startswith(".")
    }
    if not images:
        raise UserError(
            f"{folder} has no images side by side; if they are in class folders already, use those"
        )
    return images


def labels_beside_names(path: Path) -> dict[str, str]:
    """WordNet id by image, of the lines that hold both; other lines are passed over."""
    classes: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        image, ids = _IMAGE.search(line), set(_WORDNET_ID.findall(line))
        if image is None or not ids:
            continue
        if image[0] in classes or len(ids) > 1:
            raise UserError(f"{path} gives {image[0]} twice")
        classes[image[0]] = ids.pop()
    return classes


def ground_truth(path: Path, synsets: list[str]) -> dict[str, str]:
    """WordNet id by image, of the devkit's numbers, one per line in the order of the images."""
    lines = path.read_text(errors="replace").split()
    for position, number in enumerate(lines, start=1):
        if not number.isdecimal() or not 1 <= int(number) <= _CLASSES:
            raise UserError(
                f"{path}: number {position}, {number[:80]!r}, is none from 1 to 1000; {_FORMS}"
            )
    return {
        f"ILSVRC2012_val_{position:08d}": synsets[int(number) - 1]
        for position, number in enumerate(lines, start=1)
    }


def read_synsets(path: Path) -> list[str]:
    """The 1000 WordNet ids in the order in which the devkit's meta.mat counts them."""
    from scipy.io import loadmat, matlab  # imported late: only meta.mat needs it

    try:
        with path.open("rb") as file:
            synsets = loadmat(file, squeeze_me=True, variable_names="synsets")["synsets"]
        by_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [by_id[position] for position in range(1, _CLASSES + 1)]
    except (matlab.MatReadError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged or not the devkit's meta.mat ({error})") from None


def read_labels(path: Path, synsets: Path | None) -> dict[str, str]:
    """WordNet id by image, of either form; raises UserError for anything else."""
    classes = ground_truth(path, read_synsets(synsets)) if synsets else labels_beside_names(path)
    if not classes:
        raise UserError(f"{path} does not say which classes are meant: {_FORMS}")
    for image, expected in _KNOWN.items():
        if classes.get(image, expected) != expected:
            raise UserError(
                f"{path} makes {image} class {classes[image]}, but it is {expected}: its lines, or "
                "--synsets, are in another order"
            )
    return classes


def check_complete(images: dict[str, Path], classes: dict[str, str], path: Path) -> None:
    """Raises UserError unless every image has a label, and every label an image."""
    if unlabelled := [images[image] for image in images if image not in classes]:
        count = len(unlabelled)
        raise UserError(f"{path} has no label for {count} images, the first: {unlabelled[0]}")
    if absent := [image for image in classes if image not in images]:
        raise UserError(
            f"{len(absent)} images of {path} are not there, the first: {absent[0]}; is everything "
            "unpacked?"
        )


def main() -> None:
    parser = cli.Parser(description="Sort flat validation images into class folders, by links.")
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="the folder with the images")
    add("--out-dir", type=Path, required=True, help="class folders to make")
    add("--labels", type=Path, required=True, metavar="FILE", help="names and WordNet ids")
    add("--synsets", type=Path, metavar="FILE", help="meta.mat, where the labels are the devkit's")
    args = parser.parse_args()
    folder = args.data_dir.resolve()
    images, classes = list_images(folder), read_labels(args.labels, args.synsets)
    check_complete(images, classes, args.labels)
    assigned = "".join(f"{image} {classes[image]}\n" for image in sorted(classes))
    record = {
        "source": str(folder),
        "images": len(images),
        "labels_sha256": hashlib.sha256(assigned.encode()).hexdigest(),
    }
    if (args.out_dir / _RECORD).is_file() and read_json(args.out_dir / _RECORD) == record:
        print(f"{args.out_dir} is there already: nothing to do")
        return
    with whole_folder(args.out_dir) as out:
        for name in set(classes.values()):
            (out / name).mkdir()
        for image, path in cli.progress(images.items(), desc="validation images", unit="img"):
            (out / classes[image] / path.name).symlink_to(path)
        atomic_write(out / _RECORD, to_json(record))
    print(f"{args.out_dir}: {len(images)} images linked into {len(set(classes.values()))} classes")


if __name__ == "__main__":
    cli.run(main)
