"""Writes CIFAR-10, CIFAR-100 or Fashion-MNIST as image folders: train/ and val/, RGB PNG.

Class folders are 00000, 00001, ... in the data set's label order, files are named after their
position in the published split, and the pixels are the published ones. A copy that is there already
is used with --source-dir: for CIFAR the archive, the extracted folder, or the folder that holds
either; for Fashion-MNIST the folder with the four idx files, gzipped or not. Without it torchvision
downloads to <out-dir>.download.

Every file must have the MD5 of the published one: CIFAR comes as pickles, and unpickling a file can
execute what is in it; MNIST's files have the names of Fashion-MNIST's.

python scripts/prepare_torchvision.py --dataset cifar100 --out-dir D [--source-dir S]
python scripts/prepare_torchvision.py --dataset fashion_mnist --size 32 --out-dir D [--source-dir S]
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import errno
import gzip
import hashlib
import http.client
import socket
import tempfile
import zlib

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.utils import check_integrity, extract_archive

from utils import cli
from utils.cli import UserError, bounded
from utils.data import datasets
from utils.files import atomic_write, read_json, to_json, whole_folder

_RECORD = "dataset.json"
_SOURCES = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashion_mnist": FashionMNIST}
_TIMEOUT = 60  # seconds without a byte before a download counts as failed
# MD5 of the files without gzip: torchvision's are of one particular compression.
_IDX_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def download(dataset: str, folder: Path) -> None:
    """Downloads a data set with torchvision; raises UserError with one line when it fails."""
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


def read_cifar(kind: type[CIFAR10], source: Path) -> Splits:
    """The splits, uint8 [N, 32, 32, 3] and labels, of an archive, or a folder of it or its files.

    An archive is extracted for the time of reading. torchvision's reader checks the MD5 of every
    file before it unpickles any. Raises UserError unless all are the published ones.
    """
    reader = type(kind.__name__, (kind,), {"base_folder": ""})  # whatever the folder's name is
    archive, folder, splits = source / kind.filename, source / kind.base_folder, {}
    with tempfile.TemporaryDirectory() as scratch:
        if source.is_file() or archive.is_file():
            archive = source if source.is_file() else archive
            if not check_integrity(archive, kind.tgz_md5):
                raise UserError(f"{archive} is damaged or not the published file: get it again")
            extract_archive(archive, scratch)
            folder = Path(scratch) / kind.base_folder
        folder = folder if folder.is_dir() else source
        try:
            for split in ("train", "val"):
                data = reader(folder, train=split == "train")
                splits[split] = data.data, np.array(data.targets)
        except RuntimeError:
            raise UserError(
                f"{folder} does not hold {kind.__name__}'s files, or not as published (their MD5 "
                "differs): get them again"
            ) from None
    return splits


def read_idx(path: Path, md5: str) -> np.ndarray:
    """uint8 array of an idx file or of its .gz; raises UserError unless it is the published one."""
    if not path.is_file():
        path = path.with_name(f"{path.name}.gz")
    if not path.is_file():
        raise UserError(
            f"{path} is missing, also without .gz (--help says what --source-dir holds)"
        )
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error):
        content = b""
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UserError(f"{path} is damaged, or not Fashion-MNIST's (MNIST's is named the same)")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_fashion_mnist(source: Path, size: int | None) -> Splits:
    """The splits, uint8 [N, S, S] and labels; black borders make S = `size` (None: 28)."""
    arrays = {name: read_idx(source / name, md5) for name, md5 in _IDX_MD5.items()}
    splits = {}
    for split, prefix in (("train", "train"), ("val", "t10k")):
        border = 0 if size is None else (size - 28) // 2
        pixels = arrays[f"{prefix}-images-idx3-ubyte"]
        pixels = np.pad(pixels, ((0, 0), (border, border), (border, border)))
        splits[split] = pixels, arrays[f"{prefix}-labels-idx1-ubyte"]
    return splits


def write_images(out: Path, splits: Splits, classes: int) -> None:
    """Writes out/<split>/<class>/<position in the split>.png."""
    total = sum(len(labels) for _, labels in splits.values())
    bar = cli.progress(desc="writing images", unit="img", total=total)
    for split, (pixels, labels) in splits.items():
        for label in range(classes):
            (out / split / f"{label:05d}").mkdir(parents=True)
        for position, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            path = out / split / f"{label:05d}" / f"{position:05d}.png"
            Image.fromarray(image).convert("RGB").save(path)
            bar.update()
    bar.close()


def main() -> None:
    parser = cli.Parser(description="Write CIFAR or Fashion-MNIST as train/ and val/ folders.")
    names = {"type": datasets.canonical, "choices": list(_SOURCES)}
    parser.add_argument("--dataset", **names, required=True, help="to write")
    parser.add_argument("--out-dir", type=Path, required=True, help="gets train/ and val/")
    parser.add_argument(
        "--source-dir",
        type=Path,
        metavar="S",
        help="a copy that is there already (else download): CIFAR's archive or folder, the folder "
        "with Fashion-MNIST's four idx files",
    )
    parser.add_argument(
        "--size",
        type=bounded(int, 28, 512),
        metavar="N",
        help="fashion_mnist only: enlarge 28x28 to NxN by black borders (32 is usual)",
    )
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
        source = args.out_dir.with_name(args.out_dir.name + ".download")
        download(args.dataset, source)
        if kind is FashionMNIST:
            source = source / "FashionMNIST" / "raw"
    if kind is FashionMNIST:
        splits = read_fashion_mnist(source, args.size)
    else:
        splits = read_cifar(kind, source)
    classes = 1 + int(splits["train"][1].max())
    with whole_folder(args.out_dir) as out:
        write_images(out, splits, classes)
        atomic_write(out / _RECORD, to_json(record))
    counts = " and ".join(f"{len(labels)} in {split}/" for split, (_, labels) in splits.items())
    print(f"{args.out_dir}: {classes} classes, images: {counts}")


if __name__ == "__main__":
    cli.run(main)
