"""Validation images, decoded once: a NumPy file of pixels that later runs map into memory.

The file holds uint8 [images, 3, S, S]. Its name ends in a hash over name, size and modification
time of every image file, the input size and the versions of the decoders. When one of them changes,
a new file is made, and the old one stays until somebody deletes it. An image whose content changes
while its size and time do not is not noticed: the old pixels are evaluated until the file is gone.
"""

import argparse
import contextlib
import hashlib
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np
import PIL
import torch
import torchvision

from utils.data.datasets import Dataset
from utils.data.folders import ImageFolder
from utils.data.images import decode_evaluation, fits, load_evaluation
from utils.files import LockedError, atomic_write, lock

_SMALLEST = 1 << 26  # bytes of pixels; fewer are decoded in a second or two
_POLL = 1.0  # seconds between looks at another process's lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --val-cache."""
    meant = "where decoded validation images are kept; auto: $Main_Data_Path/cache or, without "
    meant += "that, the user's cache folder, for 64 MiB and more; off: nowhere"
    parser.add_argument("--val-cache", default="auto", metavar="DIR", help=meant)


def load(
    folder: ImageFolder, dataset: Dataset, device: torch.device, cache: str = "off"
) -> torch.Tensor:
    """Decoded validation images: uint8 [images, 3, S, S], not to be written to.

    They come from the cache (a folder, "auto" or "off"), which is made where it lacks them. Where
    it cannot be used, one line says why, and `load_evaluation` decodes them into memory. A GPU with
    room for them gets the pixels.
    """
    shape = (len(folder.files), 3, dataset.input_size, dataset.input_size)
    if cache == "auto":
        cache = "off" if math.prod(shape) < _SMALLEST else _default_folder()
    cache = os.path.expanduser(cache)  # noqa: PTH111 - Path's own fails for unknown users
    pixels = None if cache == "off" else _cached(Path(cache), shape, folder, dataset)
    if pixels is None:
        pixels = load_evaluation(folder, dataset)
    return pixels.to(device) if fits(pixels, device) else pixels


def _default_folder() -> str:
    if data_path := os.environ.get("Main_Data_Path"):  # noqa: SIM112 - config.sh's published name
        return f"{data_path}/cache"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    if not caches.is_absolute():  # a user without a home folder, as in containers
        caches = Path(tempfile.gettempdir())
    return str(caches / "hald")


def _cached(
    cache: Path, shape: tuple[int, ...], folder: ImageFolder, dataset: Dataset
) -> torch.Tensor | None:
    """Pixels mapped from the cache file, which is made if need be; None where that fails."""
    digest = hashlib.sha256(f"{PIL.__version__} {torchvision.__version__} {shape}".encode())
    for file in folder.files:
        facts, name = file.stat(), file.relative_to(folder.root).as_posix()
        digest.update(f"{name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    path = cache / f"{dataset.name}_{digest.hexdigest()[:32]}.npy"

    def write(output: BinaryIO) -> None:
        # Not through a writable map: on a full disk that would kill the process.
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(output, header)
        for image in decode_evaluation(folder, dataset):
            output.write(image.contiguous().numpy())

    waiting = False
    while True:
        try:
            # Copy on write, because torch warns of arrays that cannot be written to.
            with contextlib.suppress(FileNotFoundError, ValueError, TokenError):  # or damaged
                return torch.from_numpy(np.lib.format.open_memmap(path, mode="c").reshape(shape))
            # Renaming keeps the file whole; the lock spares other processes the decoding.
            with lock(cache, "decoding images to"):
                free = shutil.disk_usage(cache).free
                if free < 1.1 * math.prod(shape):
                    raise OSError(f"only {free / 1e9:.1f} GB are left")
                atomic_write(path, write)
                print(f"{folder.root}: the decoded images are kept in {path}")
        except LockedError as error:
            if not waiting:
                print(f"waiting: {error}", flush=True)
            waiting = True
            time.sleep(_POLL)
        except OSError as error:
            reason = f"{error.filename or cache}: {error.strerror or error}"
            print(f"decoded validation images are not cached: {reason}")
            return None
