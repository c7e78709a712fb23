"""Sorts the validation images of Tiny-ImageNet or ImageNet-1K into class folders, by links.

Both come as one flat folder of images and a list of labels. The images stay where they are: the
class folders hold symbolic links to them (cp -rL copies them). --labels is

* a text in which an image's name and a WordNet id stand on one line: LOC_val_solution.csv, the
  script valprep.sh (which is read and not run), Tiny-ImageNet's val_annotations.txt; or
* the devkit's ILSVRC2012_validation_ground_truth.txt, with its meta.mat as --synsets: its numbers
  count from 1 in an order of the devkit's own.

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
_FORMS = (
    "--labels must be lines with an image's name and its WordNet id (ILSVRC2012_val_00000001 "
    "n01751748), or the devkit's ground truth together with --synsets, its meta.mat"
)
_KNOWN = {  # public knowledge, by which a list in another order is noticed
    "ILSVRC2012_val_00000001": "n01751748",
    "ILSVRC2012_val_00000002": "n09193705",
    "ILSVRC2012_val_00000003": "n02105855",
}


def list_images(folder: Path) -> dict[str, Path]:
    """Image files side by side in a folder, by name without ending; raises UserError for none."""
    files = sorted(folder.glob("[!.]*"))
    images = {path.stem: path for path in files if path.suffix.lower() in folders.IMAGE_ENDINGS}
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
        if image and ids:
            if image[0] in classes or len(ids) > 1:
                raise UserError(f"{path} gives {image[0]} twice")
            classes[image[0]] = ids.pop()
    return classes


def ground_truth(path: Path, synsets: Path) -> dict[str, str]:
    """WordNet id by image, of the devkit's numbers, one per line in the order of the images."""
    from scipy.io import loadmat, matlab  # imported late: only meta.mat needs it

    try:
        with synsets.open("rb") as file:
            rows = loadmat(file, squeeze_me=True, variable_names="synsets")["synsets"]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
        leaves = {str(number): ids[number] for number in range(1, 1001)}
    except (matlab.MatReadError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{synsets} is damaged or not the devkit's meta.mat ({error})") from None
    classes = {}
    for position, number in enumerate(path.read_text(errors="replace").split(), start=1):
        if number not in leaves:
            what = f"number {position}, {number[:80]!r}, is none from 1 to 1000"
            raise UserError(f"{path}: {what}; {_FORMS}")
        classes[f"ILSVRC2012_val_{position:08d}"] = leaves[number]
    return classes


def check(images: dict[str, Path], classes: dict[str, str], path: Path) -> None:
    """Raises UserError for labels in another order, and unless images and labels are the same."""
    if not classes:
        raise UserError(f"{path} does not say which classes are meant: {_FORMS}")
    for image, expected in _KNOWN.items():
        if classes.get(image, expected) != expected:
            raise UserError(
                f"{path} makes {image} class {classes[image]}, but it is {expected}: its lines, or "
                "--synsets, are in another order"
            )
    if unlabelled := sorted(images.keys() - classes):
        first = images[unlabelled[0]]
        raise UserError(f"{path} has no label for {len(unlabelled)} images, the first: {first}")
    if absent := sorted(classes.keys() - images):
        first = f"{absent[0]}; is everything unpacked?"
        raise UserError(f"{len(absent)} images of {path} are not there, the first: {first}")


def main() -> None:
    parser = cli.Parser(description="Sort flat validation images into class folders, by links.")
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="the folder with the images")
    add("--out-dir", type=Path, required=True, help="class folders to make")
    add("--labels", type=Path, required=True, metavar="FILE", help="names and WordNet ids")
    add("--synsets", type=Path, metavar="FILE", help="meta.mat, where the labels are the devkit's")
    args = parser.parse_args()
    folder, synsets = args.data_dir.resolve(), args.synsets
    images = list_images(folder)
    classes = ground_truth(args.labels, synsets) if synsets else labels_beside_names(args.labels)
    check(images, classes, args.labels)
    assigned = "".join(f"{image} {classes[image]}\n" for image in sorted(classes))
    labels_sha256 = hashlib.sha256(assigned.encode()).hexdigest()
    record = {"source": str(folder), "images": len(images), "labels_sha256": labels_sha256}
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
