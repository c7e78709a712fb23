"""Sorts the validation images of Tiny-ImageNet or ImageNet-1K into class folders, by links.

Both come as one flat folder of images and a list of labels. The images stay where they are, under
their names: the class folders hold symbolic links to them (--copy: copies). Everything is checked
before the first link is made.

  --kind tiny_imagenet: --data-dir is tiny-imagenet-200 or its val/ (images/, val_annotations.txt).
  --kind imagenet1k: --data-dir holds ILSVRC2012_val_00000001.JPEG, ...; --labels is any of
    * "file WordNet-id" lines: a text file, LOC_val_solution.csv, or the script valprep.sh, which
      is read and not run;
    * "file number" lines that count from 0 in the sorted order of WordNet ids (Caffe's val.txt);
    * WordNet ids or numbers alone, one per line, in the order of the images' numbers, or
      torchvision's meta.bin;
    * numbers that count from 1, as in the devkit's ILSVRC2012_validation_ground_truth.txt, together
      with --synsets: the devkit's meta.mat, or the WordNet ids in that order, one per line. The
      devkit's order is not the sorted one, so its numbers alone are refused.
    The classes of the first five images are public knowledge, so a list in another order is
    noticed.

python scripts/prepare_val.py --kind tiny_imagenet --data-dir tiny-imagenet-200 --out-dir V
python scripts/prepare_val.py --kind imagenet1k --data-dir ILSVRC2012_img_val --labels val.txt
    --out-dir V
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
import re
import shutil

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import cli
from utils.cli import UserError
from utils.data import datasets
from utils.files import atomic_write, load_tensors, read_json, to_json, whole_folder

_RECORD = "validation.json"
_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")
_CLASSES = 1000
# ILSVRC2012_val_00000001 and the next: WordNet id, position among the sorted WordNet ids.
_KNOWN = (
    ("n01751748", 65),
    ("n09193705", 970),
    ("n02105855", 230),
    ("n04263257", 809),
    ("n03125729", 516),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Sort flat validation images into class folders, by links.")
    parser.add_argument(
        "--kind", choices=("tiny_imagenet", "imagenet1k"), required=True, help="whose images"
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="the images as they came")
    parser.add_argument("--out-dir", type=Path, required=True, help="class folders to make")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="imagenet1k: list of labels")
    parser.add_argument(
        "--synsets",
        type=Path,
        metavar="FILE",
        help="imagenet1k: meta.mat, or the WordNet ids in the order that the numbers count",
    )
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking")
    args = parser.parse_args()
    if args.kind == "imagenet1k" and args.labels is None:
        parser.error("--kind imagenet1k also needs --labels, the list of labels")
    if args.kind == "tiny_imagenet" and (args.labels or args.synsets):
        parser.error("--labels and --synsets go with --kind imagenet1k")
    return args


def list_images(folder: Path) -> dict[str, Path]:
    """Image files by name without ending; raises UserError unless the folder is flat."""
    if not folder.is_dir():
        raise UserError(f"image folder not found: {folder}")
    images, others = {}, 0
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            raise UserError(
                f"{folder} has sub-folders ({path.name}), not all images side by side; if they are "
                "class folders already, use it as it is"
            )
        if path.suffix.lower() not in IMG_EXTENSIONS:
            others += 1
        elif path.stem in images:
            raise UserError(f"{folder} has both {images[path.stem].name} and {path.name}")
        else:
            images[path.stem] = path
    if not images:
        raise UserError(f"{folder} has no images")
    if others:
        print(f"{folder}: {others} files that are not images are ignored")
    return images


def read_rows(path: Path) -> list[list[str]]:
    """The words of every line that is not empty; commas separate like blanks."""
    if not path.is_file():
        raise UserError(f"list of labels not found: {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    rows = [re.split(r"[\s,]+", line.strip()) for line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def by_image(rows: list[list[str]], path: Path) -> dict[str, str]:
    """Labels by image name without ending, from rows that begin with file and label."""
    labels = {}
    for row in rows:
        if len(row) < 2:
            raise UserError(f"{path}: {row[0]!r} stands alone, other lines give file and label")
        image = Path(row[0]).stem
        if image in labels:
            raise UserError(f"{path} gives {image} twice")
        labels[image] = row[1].rstrip("/")
    return labels


def read_labels(path: Path, images: dict[str, Path]) -> dict[str, str]:
    """Labels (WordNet ids or numbers, as they are written) by image name, from any known list."""
    if path.suffix == ".bin":
        content = load_tensors(path, "meta.bin")
        if not isinstance(content, tuple) or not isinstance(content[-1], list):
            raise UserError(f"{path} is not a meta.bin of torchvision's ImageNet")
        return by_number([str(label) for label in content[-1]], path, images)
    rows = [
        row[row[0] == "mv" :]
        for row in read_rows(path)
        if row[0] not in ("mkdir", "ImageId") and not row[0].startswith("#")
    ]
    if all(len(row) == 1 for row in rows):
        return by_number([row[0] for row in rows], path, images)
    return by_image(rows, path)


def by_number(labels: list[str], path: Path, images: dict[str, Path]) -> dict[str, str]:
    """Labels by image name, from one label per image in the order of the images' numbers."""
    if len(labels) != len(images):
        raise UserError(f"{path} has {len(labels)} labels for {len(images)} images")
    for image in images:
        found = _NUMBERED.fullmatch(image)
        if found is None or not 1 <= int(found[1]) <= len(labels):
            raise UserError(
                f"{images[image]} is not one of ILSVRC2012_val_00000001 to {len(labels):08d}, so "
                f"{path} cannot say its label; use a list with file names"
            )
    return {image: labels[int(_NUMBERED.fullmatch(image)[1]) - 1] for image in images}


def read_synsets(path: Path) -> list[str]:
    """The 1000 WordNet ids in the order in which a devkit or a list counts them."""
    if path.suffix == ".mat" and path.is_file():
        synsets = _read_meta(path)
    else:
        synsets = [row[0] for row in read_rows(path)]
    for synset in synsets:
        if not _WORDNET_ID.fullmatch(synset):
            raise UserError(f"{path}: {synset!r} is not a WordNet id like n01440764")
    if len(synsets) != _CLASSES or len(set(synsets)) != _CLASSES:
        raise UserError(f"{path} has {len(set(synsets))} different WordNet ids, not {_CLASSES}")
    return synsets


def _read_meta(path: Path) -> list[str]:
    from scipy.io import loadmat, matlab  # imported late: only meta.mat needs it

    try:
        synsets = loadmat(path, squeeze_me=True, variable_names="synsets")["synsets"]
        by_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [by_id[number] for number in range(1, _CLASSES + 1)]
    except (matlab.MatReadError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged or not the devkit's meta.mat ({error})") from None


def to_classes(labels: dict[str, str], path: Path, synsets: Path | None) -> dict[str, str]:
    """Class folder by image name; raises UserError where numbers could mean several classes."""
    if all(_WORDNET_ID.fullmatch(label) for label in labels.values()):
        if synsets is not None:
            raise UserError(f"{path} gives WordNet ids: leave --synsets out")
        return labels
    for image, label in labels.items():
        if not re.fullmatch(r"[0-9]+", label):
            raise UserError(f"{path}: the label of {image} is {label!r}; not all are numbers")
    numbers = {image: int(label) for image, label in labels.items()}
    low, high = min(numbers.values()), max(numbers.values())
    if high - low != _CLASSES - 1 or low > 1:
        raise UserError(
            f"{path}: the numbers run from {low} to {high}; neither 0 to {_CLASSES - 1} nor 1 to "
            f"{_CLASSES}, so which classes they mean is unclear: use a list of WordNet ids"
        )
    if synsets is not None:
        order = read_synsets(synsets)
        return {image: order[number - low] for image, number in numbers.items()}
    if low == 1:
        raise UserError(
            f"{path}: numbers from 1 can count in the devkit's order or the sorted one, which "
            "differ; add --synsets with the devkit's meta.mat, or use a list of WordNet ids"
        )
    return {image: f"{number:05d}" for image, number in numbers.items()}


def check_known(classes: dict[str, str], path: Path) -> None:
    """Raises UserError when an image whose class is known has got another one."""
    for number, (wordnet_id, index) in enumerate(_KNOWN, start=1):
        image = f"ILSVRC2012_val_{number:08d}"
        found = classes.get(image, wordnet_id)
        if found not in (wordnet_id, f"{index:05d}"):
            raise UserError(
                f"{path} makes {image} class {found}, but it is {wordnet_id} ({index} of the "
                "sorted WordNet ids): its lines or numbers, or --synsets, are in another order"
            )


def check_complete(
    images: dict[str, Path], classes: dict[str, str], path: Path, num_classes: int
) -> None:
    """Raises UserError unless every image has a label, every label an image, no class lacks."""
    unlabelled = [image for image in images if image not in classes]
    if unlabelled:
        name = images[unlabelled[0]]
        raise UserError(f"{path} has no label for {len(unlabelled)} images, the first: {name}")
    absent = [image for image in classes if image not in images]
    if absent:
        folder = next(iter(images.values())).parent
        raise UserError(
            f"{len(absent)} images of {path} are not in {folder}, the first: {absent[0]}; is "
            "everything unpacked?"
        )
    for image, label in classes.items():
        if not re.fullmatch(r"n\d{8}|\d{5}", label):
            raise UserError(f"{path}: the label of {image} is {label!r}, not a WordNet id")
    found = len(set(classes.values()))
    if found != num_classes:
        raise UserError(f"{path} names {found} classes, there must be {num_classes}")


def main() -> None:
    args = parse_arguments()
    folder = args.data_dir.resolve()
    if args.kind == "tiny_imagenet":
        if (folder / "val" / "val_annotations.txt").is_file():
            folder = folder / "val"
        labels, folder = folder / "val_annotations.txt", folder / "images"
        images = list_images(folder)
        classes = by_image(read_rows(labels), labels)
    else:
        labels, images = args.labels, list_images(folder)
        classes = to_classes(read_labels(labels, images), labels, args.synsets)
        check_known(classes, labels)
    check_complete(images, classes, labels, datasets.named(args.kind).num_classes)
    if args.out_dir.resolve().is_relative_to(folder):
        raise UserError(f"--out-dir {args.out_dir} is inside the source {folder}; choose another")
    assigned = "".join(f"{image} {classes[image]}\n" for image in sorted(classes))
    record = {
        "kind": args.kind,
        "source": str(folder),
        "copy": args.copy,
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
            place = out / classes[image] / path.name
            if args.copy:
                shutil.copyfile(path, place)
            else:
                place.symlink_to(path)
        atomic_write(out / _RECORD, to_json(record))
    made = "copied" if args.copy else "linked"
    print(f"{args.out_dir}: {len(images)} images {made} into {len(set(classes.values()))} classes")


if __name__ == "__main__":
    cli.run(main)
