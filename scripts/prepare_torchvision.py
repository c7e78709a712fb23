"""Writes CIFAR-10, CIFAR-100 or Fashion-MNIST as image folders: train/ and val/, RGB PNG.

Class folders are 00000, 00001, ... in the data set's label order, files are named after their
position in the published split, and the pixels are the published ones. A copy that is there already
is used with --source-dir: for CIFAR the archive, the extracted folder, or the folder that holds
either; for Fashion-MNIST the folder with the four idx files, gzipped or not. Without it torchvision
downloads to <out-dir>.download.

CIFAR comes as pickles, and unpickling a file can execute what is in it. So every file must have
the MD5 that torchvision holds for the published one before anything is unpickled; other files are
refused unread. Fashion-MNIST's files are plain arrays; theirs are compared too, because MNIST and
its other relatives use the same file names.

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


def find_cifar(kind: type[CIFAR10], source: Path) -> Path:
    """The folder of verified CIFAR files, or the verified archive, at or in `source`.

    Raises:
        UserError: neither is there, or a file is not the published one.
    """
    published = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    for folder in (source, source / kind.base_folder):
        if any((folder / name).is_file() for name, _ in published):
            for name, md5 in published:
                _check_file(folder / name, md5)
            return folder
    archive = source if source.is_file() else source / kind.filename
    if not archive.is_file():
        raise UserError(
            f"{source} holds neither {kind.base_folder} nor {kind.filename}; --source-dir is the "
            "folder that holds one of them"
        )
    _check_file(archive, kind.tgz_md5)
    return archive


def _check_file(path: Path, md5: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; the copy in --source-dir is incomplete")
    if not check_integrity(path, md5):
        raise UserError(
            f"{path} is damaged or not the published file (its MD5 is not {md5}); nothing in it "
            "was read: get it again"
        )


def read_cifar(kind: type[CIFAR10], source: Path) -> Splits:
    """The splits, uint8 [N, 32, 32, 3] and labels, of what find_cifar finds at or in `source`.

    An archive is extracted for the time of reading. torchvision's reader checks every MD5 again.
    """
    verified = find_cifar(kind, source)
    reader = type(kind.__name__, (kind,), {"base_folder": ""})  # whatever the folder's name is
    splits = {}
    with tempfile.TemporaryDirectory() as scratch:
        if verified.is_file():
            extract_archive(verified, scratch)
            verified = Path(scratch) / kind.base_folder
        for split in ("train", "val"):
            data = reader(verified, train=split == "train")
            splits[split] = data.data, np.array(data.targets)
    return splits


def find_fashion_mnist(source: Path) -> Path:
    """The folder of the idx files: `source` or where torchvision puts them in it."""
    first = next(iter(_IDX_MD5))
    for folder in (source, source / "raw", source / "FashionMNIST" / "raw"):
        if (folder / first).is_file() or (folder / f"{first}.gz").is_file():
            return folder
    raise UserError(
        f"{source} has no {first} or {first}.gz; --source-dir is the folder with the four idx files"
    )


def read_idx(folder: Path, name: str) -> np.ndarray:
    """uint8 array of an idx file or its .gz; raises UserError unless it is the published one."""
    path = folder / name
    if not path.is_file():
        path = folder / f"{name}.gz"
    if not path.is_file():
        raise UserError(f"{folder / name} is missing, and so is {path.name}")
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != _IDX_MD5[name]:
        raise UserError(f"{path} is damaged, or not Fashion-MNIST's (MNIST's is named the same)")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_fashion_mnist(source: Path, size: int | None) -> Splits:
    """The splits, uint8 [N, S, S] and labels; black borders make S = `size` (None: 28)."""
    folder, splits = find_fashion_mnist(source), {}
    for split, prefix in (("train", "train"), ("val", "t10k")):
        pixels = read_idx(folder, f"{prefix}-images-idx3-ubyte")
        border = 0 if size is None else (size - pixels.shape[1]) // 2
        pixels = np.pad(pixels, ((0, 0), (border, border), (border, border)))
        splits[split] = pixels, read_idx(folder, f"{prefix}-labels-idx1-ubyte")
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
        "--source-dir", type=Path, metavar="S", help="a copy that is there already; else download"
    )
    parser.add_argument(
        "--size",
        type=bounded(int, 28, 512),
        metavar="N",
        help="fashion_mnist only: enlarge 28x28 to NxN by black borders (32 is usual)",
    )
    args = parser.parse_args()
    kind = _SOURCES[args.dataset]
    if args.size is not None and kind is not FashionMNIST:
        raise UserError(f"--size goes with --dataset fashion_mnist; {args.dataset} is 32x32")
    if args.size is not None and args.size % 2:
        raise UserError(f"--size {args.size} is odd: the borders of 28x28 cannot be equally wide")
    record = {"dataset": args.dataset, "size": args.size}
    if args.out_dir.exists():
        made = args.out_dir / _RECORD
        if made.is_file() and read_json(made) == record:
            print(f"{args.out_dir} is there already: nothing to do")
            return
        raise UserError(f"{args.out_dir} exists already and is left as it is; choose another")
    source = args.source_dir
    if source is None:
        source = args.out_dir.with_name(args.out_dir.name + ".download")
        download(args.dataset, source)
    elif not source.exists():
        raise UserError(f"--source-dir not found: {source}")
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
