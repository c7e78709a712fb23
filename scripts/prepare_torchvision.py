"""Writes CIFAR-10, CIFAR-100 or Fashion-MNIST as image folders: train/ and val/, RGB PNG.

Class folders are 00000, 00001, ... in the data set's label order, files are named after their
position in the published split, and the pixels are the published ones. What torchvision downloads
lies in <out-dir>.download; --source-dir takes a copy that is there already. Every file must have
the MD5 of the published one: CIFAR comes as pickles, and unpickling a file can execute what is in
it; MNIST's files have the names of Fashion-MNIST's.

python scripts/prepare_torchvision.py --dataset cifar100 --out-dir D [--source-dir S]
python scripts/prepare_torchvision.py --dataset fashion_mnist --size 32 --out-dir D [--source-dir S]
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import errno
import http.client
import socket
import tempfile

from PIL import ImageOps
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, VisionDataset
from torchvision.datasets.utils import check_integrity, extract_archive

from utils import cli
from utils.cli import UserError, bounded
from utils.data import datasets
from utils.files import atomic_write, read_json, to_json, whole_folder

_RECORD = "dataset.json"
_SOURCES = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashion_mnist": FashionMNIST}
_FASHION_FOLDER = "FashionMNIST/raw"  # torchvision's
_TIMEOUT = 60  # seconds without a byte before a download counts as failed


def download(dataset: str, folder: Path) -> Path:
    """Downloads a data set with torchvision; returns the folder that its archives are in."""
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        _SOURCES[dataset](folder, download=True)
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{dataset} could not be downloaded ({reason}); run again, or give a copy that is "
            "there already with --source-dir"
        ) from None
    return folder / _FASHION_FOLDER if _SOURCES[dataset] is FashionMNIST else folder


def extract(archive: Path, md5: str, folder: Path) -> None:
    """Extracts an archive, unless it is missing or another than the published one."""
    if not check_integrity(archive, md5):
        raise UserError(f"{archive} is missing, damaged or not the published file: get it again")
    extract_archive(archive, folder)


def read(kind: type[VisionDataset], source: Path) -> dict[str, VisionDataset]:
    """The splits "train" and "val", of images and labels.

    Archives are extracted for the time of reading. torchvision's reader checks the MD5 of CIFAR's
    files before it unpickles any. Raises UserError unless all are the published ones.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if kind is FashionMNIST:
            (root / _FASHION_FOLDER).mkdir(parents=True)
            for name, md5 in kind.resources:
                extract(source / name, md5, root / _FASHION_FOLDER)
        elif source.is_file() or (source / kind.filename).is_file():
            extract(source if source.is_file() else source / kind.filename, kind.tgz_md5, root)
        else:
            folder = source / kind.base_folder
            folder = folder if folder.is_dir() else source  # whatever its name is
            (root / kind.base_folder).symlink_to(folder.resolve())
        try:
            return {"train": kind(root, train=True), "val": kind(root, train=False)}
        except RuntimeError:
            raise UserError(
                f"{source} does not hold {kind.__name__}'s files, or not as published (their MD5 "
                "differs): get them again"
            ) from None


def write_images(folder: Path, data: VisionDataset, border: int) -> None:
    """Writes folder/<class>/<position in the split>.png within a black border, in pixels."""
    for label in range(len(data.classes)):
        (folder / f"{label:05d}").mkdir(parents=True)
    bar = cli.progress(data, desc=f"writing {folder.name}", unit="img")
    for position, (image, label) in enumerate(bar):
        path = folder / f"{label:05d}" / f"{position:05d}.png"
        ImageOps.expand(image.convert("RGB"), border).save(path)


def main() -> None:
    parser = cli.Parser(description="Write CIFAR or Fashion-MNIST as train/ and val/ folders.")
    add = parser.add_argument
    add("--dataset", type=datasets.canonical, choices=[*_SOURCES], required=True, help="to write")
    add("--out-dir", type=Path, required=True, help="gets train/ and val/")
    copy = "a copy that is there already (else download): CIFAR's archive or extracted folder, or "
    copy += "what either lies in; the folder of Fashion-MNIST's four .gz files"
    add("--source-dir", type=Path, metavar="S", help=copy)
    size = "fashion_mnist only: enlarge 28x28 to NxN by black borders (32 is usual)"
    add("--size", type=bounded(int, 28, 512), metavar="N", help=size)
    args = parser.parse_args()
    kind = _SOURCES[args.dataset]
    if args.size is not None and (kind is not FashionMNIST or args.size % 2):
        raise UserError("--size goes with --dataset fashion_mnist, and must be even")
    record = {"dataset": args.dataset, "size": args.size}
    if (args.out_dir / _RECORD).is_file() and read_json(args.out_dir / _RECORD) == record:
        print(f"{args.out_dir} is there already: nothing to do")
        return
    source = args.source_dir
    if source is None:
        source = download(args.dataset, args.out_dir.with_name(f"{args.out_dir.name}.download"))
    splits = read(kind, source)
    with whole_folder(args.out_dir) as out:
        for name, data in splits.items():
            write_images(out / name, data, border=(args.size - 28) // 2 if args.size else 0)
        atomic_write(out / _RECORD, to_json(record))
    counts = " and ".join(f"{len(data)} in {name}/" for name, data in splits.items())
    print(f"{args.out_dir}: {len(splits['train'].classes)} classes, images: {counts}")


if __name__ == "__main__":
    cli.run(main)
