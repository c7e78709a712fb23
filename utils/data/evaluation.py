"""Validation images, decoded once: a memory-mapped file of pixels, verified when it is opened.

A cache file is a header of 4096 bytes (JSON, padded with spaces) and then uint8 pixels
[images, 3, S, S]. The header's key is a hash over name, size, modification and change time of
every image file (any write to a file changes the last, and nobody can set it), over the input
size, and over the versions of the decoders; its checksum is the SHA-256 of the pixels. A file whose
key or checksum does not agree is made again, so what is evaluated is never out of date.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

import PIL
import torch
import torchvision

from utils.data.datasets import Dataset
from utils.data.images import ImageFolder, decode_evaluation, fits, load_evaluation
from utils.files import LockedError, atomic_write, lock

_HEADER = 4096
_SMALLEST = 1 << 26  # bytes of pixels; fewer are decoded in a second or two
_SETTLED = 1.0  # seconds since the last change of an image, within which clocks may not show one
_POLL = 1.0  # seconds between looks at another process's lock
_SHARE_OF_GPU = 1 / 4  # of its free memory; training needs the rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --val-cache."""
    parser.add_argument(
        "--val-cache",
        default="auto",
        metavar="DIR",
        help="where decoded validation images are kept; auto: $Main_Data_Path/cache or, without "
        "that, the user's cache folder, for 64 MiB and more; off: nowhere",
    )


def load(
    folder: ImageFolder, dataset: Dataset, device: torch.device, cache: str = "off"
) -> torch.Tensor:
    """Decoded validation images, from the cache where it has them, else made and cached.

    Where the cache cannot be written, one line says why, and the images are decoded into memory.

    Args:
        folder: the images.
        dataset: gives the input size S.
        device: of the evaluation; a GPU with room for them gets the pixels.
        cache: a folder, "auto" or "off", see `add_arguments`.

    Returns:
        uint8 [images, 3, S, S], on the device or on the CPU; not to be written to.

    Raises:
        UserError: see utils.data.images.load_evaluation.
    """
    needed = _pixel_bytes(folder, dataset)
    if cache == "off" or (cache == "auto" and needed < _SMALLEST):
        pixels = load_evaluation(folder, dataset)
    else:
        pixels = _cached(folder, dataset, _default_folder() if cache == "auto" else Path(cache))
    return pixels.to(device) if fits(pixels, device, _SHARE_OF_GPU) else pixels


def _default_folder() -> Path:
    if data_path := os.environ.get("Main_Data_Path"):  # noqa: SIM112 - config.sh's published name
        return Path(data_path) / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hald"


def _pixel_bytes(folder: ImageFolder, dataset: Dataset) -> int:
    return 3 * dataset.input_size**2 * len(folder.files)


def _cached(folder: ImageFolder, dataset: Dataset, cache: Path) -> torch.Tensor:
    """Pixels from the cache file, which is made where it is missing or does not agree."""
    parts = (folder.root.resolve(), dataset.input_size, dataset.evaluation_resize)
    name = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]
    path = cache / f"{name}.pixels"
    key, changed = _key(folder, dataset)
    if (pixels := _open(path, key, folder, dataset)) is not None:
        return pixels
    if time.time() - changed < _SETTLED:
        reason = f"{folder.root} is being changed"
    else:
        reason = _make(path, key, folder, dataset)
    if not reason:
        if (pixels := _open(path, key, folder, dataset)) is not None:
            return pixels
        reason = f"{path} does not hold what was written"
    print(f"decoded validation images are not cached: {reason}")
    return load_evaluation(folder, dataset)


def _make(path: Path, key: str, folder: ImageFolder, dataset: Dataset) -> str:
    """Writes a cache file, unless another process does; returns "", or why there is none."""
    told = False
    while True:
        try:
            with lock(path.parent, "decoding images to"):
                if _open(path, key, folder, dataset) is not None:
                    return ""
                free = shutil.disk_usage(path.parent).free
                if free < 1.1 * _pixel_bytes(folder, dataset):
                    return f"{path.parent} has only {free / 1e9:.1f} GB left"
                atomic_write(path, lambda file: _write(file, key, folder, dataset))
                if _key(folder, dataset)[0] == key:
                    print(f"{folder.root}: the decoded images are kept in {path}")
                    return ""
                path.unlink()
                return f"{folder.root} was changed meanwhile"
        except LockedError as error:
            if not told:
                print(f"waiting: {error}", flush=True)
            told = True
            time.sleep(_POLL)
        except OSError as error:
            return f"{error.filename or path.parent}: {error.strerror or error}"


def _key(folder: ImageFolder, dataset: Dataset) -> tuple[str, float]:
    """What decides the pixels, as a hash; and when a file last changed, in seconds since 1970."""
    versions = (PIL.__version__, torchvision.__version__, torch.__version__)
    sizes = (dataset.input_size, dataset.evaluation_resize)
    digest = hashlib.sha256(json.dumps([1, *versions, *sizes]).encode())
    changed = 0.0
    for path in folder.files:
        facts = path.stat()
        name = path.relative_to(folder.root).as_posix()
        times = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
        digest.update(f"{name} {times}\n".encode())
        changed = max(changed, facts.st_ctime)
    return digest.hexdigest(), changed


def _write(file: BinaryIO, key: str, folder: ImageFolder, dataset: Dataset) -> None:
    digest = hashlib.sha256()
    file.write(b" " * _HEADER)
    for image in decode_evaluation(folder, dataset):
        data = image.contiguous().numpy().tobytes()
        digest.update(data)
        file.write(data)
    header = {"key": key, "sha256": digest.hexdigest(), "folder": str(folder.root)[-1000:]}
    file.seek(0)
    file.write(json.dumps(header).encode())


def _open(path: Path, key: str, folder: ImageFolder, dataset: Dataset) -> torch.Tensor | None:
    """The pixels of a cache file, mapped and verified; None when they are not those of `key`."""
    size, length = dataset.input_size, _HEADER + _pixel_bytes(folder, dataset)
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER))
        if header["key"] != key or path.stat().st_size != length:
            return None
        mapped = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    pixels = mapped[_HEADER:].view(len(folder.files), 3, size, size)
    return pixels if hashlib.sha256(pixels.numpy()).hexdigest() == header["sha256"] else None
