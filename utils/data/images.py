"""Images: fingerprint, and pixels as uint8 tensors ready to be rendered.

Two sources with one method, `render(batches) -> network inputs`: `ResidentImages` keeps a folder
of equally large images decoded in memory (on the GPU where it fits), `StreamingImages` decodes in
DataLoader workers what differs in size or does not fit.
"""

import collections
import contextlib
import hashlib
import io
import itertools
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from torchvision.transforms import functional as transforms

from utils.cli import ENDING_SIGNALS, UserError, progress
from utils.data.datasets import Dataset
from utils.data.folders import ImageFolder
from utils.data.views import Views, crop_resize, mix, normalise, render
from utils.files import content_name
from utils.runtime import available_memory, send, usable_cores

# Never formats like EPS, which PIL hands to an interpreter. Of several frames the first is read.
_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"]
if features.check("avif"):
    _FORMATS.append("AVIF")
_SHARED_MEMORY = Path("/dev/shm")
_PATIENCE = 300  # seconds until a batch that has not been decoded is given up
# What PIL says of palettes, broken metadata and large images, for every one of them.
warnings.filterwarnings("ignore", module=r"PIL\.")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what PIL raises of an unreadable or truncated image into one line that names it."""
    try:
        yield
    except Image.UnidentifiedImageError:
        what = content_name(path) or "not an image"
        advice = "save it as PNG or JPEG, or remove it"
        raise UserError(f"cannot read image {path}: it is {what}; {advice}") from None
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {error}") from None


def decode(path: Path) -> Image.Image:
    """Returns an image as RGB; raises UserError that names an unreadable or truncated file."""
    with _naming(path):
        image = Image.open(path, formats=_FORMATS)
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            kinds = "floating-point, signed or 32-bit pixels, whose white is not known"
            raise UserError(f"image {path} has {kinds}; save it with 8 bits")
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            wide = np.asarray(image).clip(0, 65535)
            image = Image.fromarray((wide // 256).astype(np.uint8))
        return image.convert("RGB")


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def map_files(work: Callable, files: Sequence[Path], what: str) -> Iterator:
    """work(file) for all files in order, in threads (decoding releases the GIL), with a bar.

    The threads run ahead by a few files only, however slowly the results are taken.
    """
    threads = usable_cores()
    bar = progress(desc=what, total=len(files), unit="img", leave=False, delay=1)
    with bar, ThreadPoolExecutor(threads) as pool:
        futures = (pool.submit(work, file) for file in files)
        waiting = collections.deque(itertools.islice(futures, 8 * threads))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(itertools.islice(futures, 1))
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)


def inspect(folder: ImageFolder) -> tuple[np.ndarray, str]:
    """Heights and widths, int32 [images, 2], and the hex SHA-256 over names and contents."""

    def read(path: Path) -> tuple[tuple[int, int], str]:
        data = path.read_bytes()
        with _naming(path):
            width, height = Image.open(io.BytesIO(data), formats=_FORMATS).size
        return (height, width), hashlib.sha256(data).hexdigest()

    digest, sizes = hashlib.sha256(), []
    results = map_files(read, folder.files, "reading images")
    for path, (size, content) in zip(folder.files, results, strict=True):
        digest.update(f"{path.relative_to(folder.root).as_posix()} {content}\n".encode())
        sizes.append(size)
    return np.array(sizes, dtype=np.int32), digest.hexdigest()


def fits(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor takes less than half of a GPU's free memory; never on a CPU."""
    return device.type == "cuda" and 2 * tensor.nbytes < torch.cuda.mem_get_info(device)[0]


class ResidentImages:
    """All images decoded in memory as one uint8 tensor [images, 3, H, W].

    `together` is the number of views that are best rendered at once: on a GPU the launches of some
    seventy kernels would take longer than rendering a single batch of 16.
    """

    def __init__(self, pixels: torch.Tensor, dataset: Dataset, device: torch.device):
        self.pixels = pixels.to(device) if fits(pixels, device) else pixels
        self.device, self.size = device, dataset.input_size
        room = 2**29 // (12 * pixels.shape[2] * pixels.shape[3])  # half a GiB in float32
        self.together = min(128, room) if device.type == "cuda" else 1
        self.mean = torch.tensor(dataset.mean, device=device)
        self.std = torch.tensor(dataset.std, device=device)

    def render(self, batches: Iterable[Views]) -> Iterator[torch.Tensor]:
        """Yields the network's input, float32 [N, 3, S, S], for each batch (or more) of views."""
        batches = list(batches)
        # Copying an index from the GPU waits for it, so all are copied before the first batch.
        indices = [views.index.to(self.pixels.device) for views in batches]
        for views, index in zip(batches, indices, strict=True):
            images = send(self.pixels[index], self.device)
            yield render(images, views, self.size, self.mean, self.std)


class StreamingImages:
    """Images of any sizes, decoded and cropped by DataLoader workers when they are asked for."""

    together = 1  # see ResidentImages

    def __init__(self, files: list[Path], dataset: Dataset, device: torch.device, workers: int):
        self.files, self.device, self.size = files, device, dataset.input_size
        self.workers = workers
        self.mean = torch.tensor(dataset.mean, device=device)
        self.std = torch.tensor(dataset.std, device=device)

    def render(self, batches: Iterable[Views]) -> Iterator[torch.Tensor]:
        """Yields the network's input, float32 [N, 3, S, S], for each batch (or more) of views."""
        batches = list(batches)
        parts = [part for views in batches for part in views.to(torch.device("cpu"))]
        room = self._workers_with_room(parts)
        workers = min(self.workers, len(parts), room, usable_cores())
        loader = torch.utils.data.DataLoader(
            parts,
            collate_fn=self._crops,
            batch_size=None,
            num_workers=workers,
            # A forked worker inherits which signals are blocked.
            multiprocessing_context="fork" if workers else None,
            # Its own, as each loader draws a number: the global one belongs to the training.
            generator=torch.Generator().manual_seed(0),
            pin_memory=self.device.type == "cuda",
            timeout=_PATIENCE if workers else 0,
        )
        # Signals that end the program are left to the main process, which ends its workers.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            received = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for views in batches:
            crops = []
            for _ in range(len(views)):  # each is sent while the next is decoded
                part = self._next(received, workers)
                crops.append(part.to(self.device, non_blocking=True))
            yield mix(normalise(torch.cat(crops), self.mean, self.std), views)

    def _crops(self, views: Views) -> torch.Tensor | str:
        """The crops of a batch, or the text of the error that its images raised."""
        try:
            images = [pixels_of(decode(self.files[index])) for index in views.index.tolist()]
        except UserError as error:
            return str(error)
        return crop_resize(images, views.box, views.flip, self.size)

    def _workers_with_room(self, parts: list[Views]) -> int:
        """How many processes can hand over their crops: each keeps up to three batches in /dev/shm.

        Containers often have 64 MB there, and a process that finds it full dies; without it, or
        where it is read-only, none can be started.
        """
        if not os.access(_SHARED_MEMORY, os.W_OK):
            return 0
        largest = max((len(part.index) for part in parts), default=1) * 3 * self.size**2 * 4
        return shutil.disk_usage(_SHARED_MEMORY).free // (3 * largest)

    def _next(self, received: Iterator[torch.Tensor | str], workers: int) -> torch.Tensor:
        """The crops of the next batch."""
        try:
            part = next(received)
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            # Of the loader: a worker died or ran out of memory, or nothing came in time.
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise UserError(
                f"images of {self.files[0].parent.parent} could not be decoded by {workers} "
                f"processes ({reason}): is there memory, room in {_SHARED_MEMORY}, and the disk? "
                "--workers 0 does without processes"
            ) from None
        if isinstance(part, str):
            raise UserError(part)
        return part


def open_images(
    folder: ImageFolder, sizes: np.ndarray, dataset: Dataset, device: torch.device, workers: int
) -> ResidentImages | StreamingImages:
    """The faster source that is possible: resident when all sizes agree and memory allows."""
    height, width = sizes[0].tolist()
    needed = 3 * height * width * len(sizes)
    if not (sizes == sizes[0]).all() or needed > available_memory() // 2:
        return StreamingImages(folder.files, dataset, device, workers)
    decoded = map_files(lambda path: pixels_of(decode(path)), folder.files, "decoding images")
    return ResidentImages(_collected(decoded, len(sizes), height, width), dataset, device)


def _collected(images: Iterator[torch.Tensor], count: int, height: int, width: int) -> torch.Tensor:
    """The images in one tensor, uint8 [count, 3, H, W]."""
    pixels = torch.empty(count, 3, height, width, dtype=torch.uint8)
    for row, image in zip(pixels, images, strict=True):
        row.copy_(image)
    return pixels


def decode_evaluation(folder: ImageFolder, dataset: Dataset) -> Iterator[torch.Tensor]:
    """Decodes images as the field evaluates, 224: Resize(256), CenterCrop(224); uint8 [3, S, S]."""
    size = dataset.input_size
    resize = size * 256 // 224 if size >= 128 else size

    def prepare(path: Path) -> torch.Tensor:
        image = decode(path)
        if image.size != (size, size) or resize != size:  # small inputs are taken as they are
            image = transforms.center_crop(transforms.resize(image, resize), [size, size])
        return pixels_of(image)

    return map_files(prepare, folder.files, "decoding validation images")


def load_evaluation(folder: ImageFolder, dataset: Dataset) -> torch.Tensor:
    """The images of decode_evaluation in memory, uint8 [images, 3, S, S], if it has room."""
    count, size = len(folder.files), dataset.input_size
    needed, available = 3 * size * size * count, available_memory()
    if needed > available:
        raise UserError(
            f"{folder.root}: {count} decoded images take {needed / 1e9:.1f} GB, but only "
            f"{available / 1e9:.1f} GB of memory are free; give --val-cache a folder on a disk "
            "with room for them"
        )
    return _collected(decode_evaluation(folder, dataset), count, size, size)
