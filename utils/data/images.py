"""Images: fingerprint, and pixels as uint8 tensors ready to be rendered.

Two sources with one method, `render(batches) -> network inputs`: `ResidentImages` keeps a folder
of equally large images decoded in memory (on the GPU where it fits), `StreamingImages` decodes in
DataLoader workers what differs in size or does not fit.
"""

import collections
import contextlib
import hashlib
import io
import os
import re
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

from utils.cli import ENDING_SIGNALS, UserError, ending_at_once, kill_children, progress
from utils.data.datasets import Dataset
from utils.data.folders import ImageFolder
from utils.data.views import Views, crop_resize, mix, normalise, render
from utils.files import content_name
from utils.runtime import send, usable_cores

# Never formats like EPS, which PIL hands to an interpreter. Of several frames the first is read.
_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"]
if features.check("avif"):
    _FORMATS.append("AVIF")
_SHARED_MEMORY = Path("/dev/shm")
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_LIMITS = (  # of versions 2 and 1: limit and use
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
_PATIENCE = 300  # seconds until a batch that has not been decoded is given up
# What PIL says of palettes, broken metadata and large images, for every one of them.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(path: Path, data: bytes | None = None) -> Image.Image:
    """Returns an image as RGB; raises UserError that names an unreadable or truncated file."""
    try:
        source = path if data is None else io.BytesIO(data)
        image = Image.open(source, formats=_FORMATS)
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise UserError(
                f"image {path} has floating-point, signed or 32-bit pixels, whose white is not "
                "known; save it with 8 bits"
            )
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            wide = np.asarray(image).clip(0, 65535)
            image = Image.fromarray((wide // 256).astype(np.uint8))
        return image.convert("RGB")
    except Image.DecompressionBombError:
        raise UserError(f"image {path} is implausibly large; it was not decoded") from None
    except Image.UnidentifiedImageError:
        what = content_name(path) or "not an image"
        raise UserError(
            f"cannot read image {path}: it is {what}; save it as PNG or JPEG, or remove it"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read image {path}: {error}") from None


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
        waiting: collections.deque = collections.deque()
        try:
            for file in files:
                waiting.append(pool.submit(work, file))
                if len(waiting) > 8 * threads:
                    yield waiting.popleft().result()
                    bar.update()
            while waiting:
                yield waiting.popleft().result()
                bar.update()
        finally:
            for future in waiting:
                future.cancel()


def inspect(folder: ImageFolder) -> tuple[np.ndarray, str]:
    """Reads every file once.

    Returns:
        int32 [images, 2], height and width; and the fingerprint: the hex SHA-256 over names and
        contents of all files.
    """

    def read(path: Path) -> tuple[tuple[int, int], str]:
        data = path.read_bytes()
        try:
            width, height = Image.open(io.BytesIO(data), formats=_FORMATS).size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            decode(path, data)
            raise
        return (height, width), hashlib.sha256(data).hexdigest()

    digest = hashlib.sha256()
    sizes = []
    results = map_files(read, folder.files, "reading images")
    for path, (size, content) in zip(folder.files, results, strict=True):
        digest.update(f"{path.relative_to(folder.root).as_posix()} {content}\n".encode())
        sizes.append(size)
    return np.array(sizes, dtype=np.int32), digest.hexdigest()


def fits(tensor: torch.Tensor, device: torch.device, share: float) -> bool:
    """Whether a tensor takes less than this share of a GPU's free memory; never on a CPU."""
    if device.type != "cuda":
        return False
    return tensor.nbytes < share * torch.cuda.mem_get_info(device)[0]


class ResidentImages:
    """All images decoded in memory as one uint8 tensor [images, 3, H, W].

    Attributes:
        together: views that are best rendered at once: on a GPU the launches of some seventy
            kernels would take longer than rendering a single batch of 16.
    """

    def __init__(self, pixels: torch.Tensor, dataset: Dataset, device: torch.device):
        if fits(pixels, device, 1 / 2):
            pixels = pixels.to(device)
        self.pixels, self.device, self.size = pixels, device, dataset.input_size
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
    """Images of any sizes, decoded and cropped by DataLoader workers when they are asked for.

    Attributes:
        together: 1, as batches are decoded one by one, see ResidentImages.
    """

    together = 1

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
        with _no_signals():
            received = iter(loader)
        for views in batches:
            crops = []
            for _ in range(len(views)):
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
        if not parts:
            return self.workers
        if not os.access(_SHARED_MEMORY, os.W_OK):
            return 0
        largest = max(len(part.index) for part in parts) * 3 * self.size**2 * 4
        return shutil.disk_usage(_SHARED_MEMORY).free // (3 * largest)

    def _next(self, received: Iterator[torch.Tensor | str], workers: int) -> torch.Tensor:
        """The crops of the next batch; a signal ends the program while it waits for them."""
        try:
            with ending_at_once():
                part = next(received)
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            # Of the loader: a worker died or ran out of memory, or nothing came in time.
            kill_children()
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise UserError(
                f"images of {self.files[0].parent.parent} could not be decoded by {workers} "
                f"processes ({reason}): is there memory, room in "
                f"{_SHARED_MEMORY}, and the disk? --workers 0 does without processes"
            ) from None
        if isinstance(part, str):
            raise UserError(part)
        return part


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    """Keeps signals that end the program for good from workers started in it.

    They are left to the main process, which ends its workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def open_images(
    folder: ImageFolder,
    sizes: np.ndarray,
    dataset: Dataset,
    device: torch.device,
    workers: int,
) -> ResidentImages | StreamingImages:
    """The faster source that is possible: resident when all sizes agree and memory allows."""
    height, width = sizes[0].tolist()
    needed = 3 * height * width * len(sizes)
    if not (sizes == sizes[0]).all() or needed > available_memory() // 2:
        return StreamingImages(folder.files, dataset, device, workers)
    pixels = torch.empty(len(sizes), 3, height, width, dtype=torch.uint8)
    decoded = map_files(lambda path: pixels_of(decode(path)), folder.files, "decoding images")
    for row, image in zip(pixels, decoded, strict=True):
        row.copy_(image)
    return ResidentImages(pixels, dataset, device)


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping, nor above a container's limit."""
    line = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    available = int(line[1]) * 1024
    for limit_name, used_name in _MEMORY_LIMITS:
        # Version 2 says "max" and version 1 a huge number where there is no limit.
        with contextlib.suppress(OSError, ValueError):
            limit = int((_CGROUP / limit_name).read_text())
            used = int((_CGROUP / used_name).read_text())
            statistics = (_CGROUP / used_name).with_name("memory.stat").read_text()
            # Cached pages of files count as used, and are given up when memory is wanted. With
            # the groups below this one, where version 1 counts those apart.
            total = "total_" if "total_inactive_file" in statistics else ""
            cached = re.findall(rf"^{total}(?:in)?active_file (\d+)", statistics, re.MULTILINE)
            available = min(available, limit - used + sum(map(int, cached)))
    return max(available, 0)


def decode_evaluation(folder: ImageFolder, dataset: Dataset) -> Iterator[torch.Tensor]:
    """Decodes images as the field evaluates: 224: Resize(256), CenterCrop(224).

    Yields:
        uint8 [3, S, S] of every image; small inputs (below 128) are resized only where sizes
        differ.
    """
    size, resize = dataset.input_size, dataset.evaluation_resize

    def prepare(path: Path) -> torch.Tensor:
        image = decode(path)
        if image.size != (size, size) or resize != size:
            image = transforms.center_crop(transforms.resize(image, resize), [size, size])
        return pixels_of(image)

    yield from map_files(prepare, folder.files, "decoding validation images")


def load_evaluation(folder: ImageFolder, dataset: Dataset) -> torch.Tensor:
    """The images of decode_evaluation in memory: uint8 [images, 3, S, S].

    Raises:
        UserError: an unreadable image, or more pixels than there is memory.
    """
    size = dataset.input_size
    needed, available = 3 * size * size * len(folder.files), available_memory()
    if needed > available:
        raise UserError(
            f"{folder.root}: {len(folder.files)} decoded images take {needed / 1e9:.1f} GB, but "
            f"only {available / 1e9:.1f} GB of memory are free; give --val-cache a folder on a "
            "disk with room for them"
        )
    pixels = torch.empty(len(folder.files), 3, size, size, dtype=torch.uint8)
    for row, image in zip(pixels, decode_evaluation(folder, dataset), strict=True):
        row.copy_(image)
    return pixels
