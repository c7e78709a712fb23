"""Image folders: class order, fingerprint, and pixels as uint8 tensors ready to be rendered.

Two sources with one method, `render(batches) -> network inputs`: `ResidentImages` keeps a folder
of equally large images decoded in memory (on the GPU where it fits), `StreamingImages` decodes in
DataLoader workers what differs in size or does not fit.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import re
import shlex
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as transforms

from utils.cli import ENDING_SIGNALS, UserError, progress
from utils.data.datasets import Dataset
from utils.data.views import ORDER, Views, crop_resize, mix, normalise, render, shuffle
from utils.runtime import usable_cores

# What IMG_EXTENSIONS can hold; never formats like EPS, which PIL hands to an interpreter.
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The images below a folder with one sub-folder per class, in text order.

    Attributes:
        root: the folder.
        classes: names of the class folders, sorted as text; the position is the class index.
        files: all image files, class by class, sorted by name within a class.
        labels: int64 [images], the class index of every file.
    """

    root: Path
    classes: list[str]
    files: list[Path]
    labels: torch.Tensor

    def counts(self) -> list[int]:
        """Images per class."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def sample(self, count: int) -> "ImageFolder":
        """The folder with at most `count` of its images, chosen at random but always the same."""
        rows = np.sort(shuffle(0, ORDER, 0, len(self.files))[:count])
        return dataclasses.replace(
            self, files=[self.files[row] for row in rows], labels=self.labels[rows]
        )

    def listing_sha256(self) -> str:
        """Hex SHA-256 over names and sizes of all files: cheap, and other images differ in it."""
        digest = hashlib.sha256()
        for path in self.files:
            name = path.relative_to(self.root).as_posix()
            digest.update(f"{name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def ipc(self) -> int:
        """Images per class; raises UserError when the classes differ."""
        counts = self.counts()
        usual = max(set(counts), key=counts.count)
        for name, count in zip(self.classes, counts, strict=True):
            if count != usual:
                raise UserError(
                    f"{self.root / name} has {count} images where other classes have {usual}; "
                    "distilled images need the same number in every class"
                )
        return usual


def scan(root: Path, num_classes: int | None = None) -> ImageFolder:
    """Lists an image folder.

    Args:
        root: a folder with one sub-folder per class.
        num_classes: how many classes there must be; None accepts any number.

    Raises:
        UserError: missing or empty folder, wrong number of classes, a class without images, or
            class folders whose numbers are not in text order.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"image folder not found: {root}")
    for entry in root.iterdir():
        if entry.is_symlink() and not os.path.exists(entry):  # noqa: PTH110 - as for loops, False
            raise UserError(f"{entry} is a broken link; mend or remove it")
    classes = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    if not classes:
        raise UserError(f"{root} has no class folders: it must hold one sub-folder per class")
    _check_order(root, classes)
    if num_classes is not None and len(classes) != num_classes:
        raise UserError(f"{root} has {len(classes)} class folders, the data set {num_classes}")
    files, labels, ignored = [], [], 0
    for label, name in enumerate(classes):
        found = sorted(
            Path(folder) / file for folder, _, names in os.walk(root / name) for file in names
        )
        images = [path for path in found if path.suffix.lower() in IMG_EXTENSIONS]
        if not images:
            raise UserError(f"class folder {root / name} has no images")
        ignored += len(found) - len(images)
        files += images
        labels += [label] * len(images)
    if ignored:
        print(f"{root}: {ignored} files that are not images are ignored")
    return ImageFolder(root, classes, files, torch.tensor(labels))


def _check_order(root: Path, classes: list[str]) -> None:
    """Stops when folders are numbered ("7", "class_7") and text order is not number order."""
    numbered = [re.fullmatch(r"(\D*)(\d+)", name) for name in classes]
    if not all(numbered) or len({found[1] for found in numbered}) > 1:
        return
    for before, after in itertools.pairwise(numbered):
        if int(before[2]) >= int(after[2]):
            prefix = shlex.quote(before[1]) if before[1] else ""
            raise UserError(
                f"{root}: as text, folder {before[0]!r} sorts before {after[0]!r}, so the class "
                f"order would be scrambled; name the folders with equally many digits: "
                f"(cd {shlex.quote(str(root))} && for i in {prefix}[0-9]*; do mv -nT -- "
                f'"$i" {prefix}"$(printf %05d "$((10#${{i#{prefix}}}))")"; done)'
            )


def check_same_classes(folder: ImageFolder, classes: list[str], owner: str) -> None:
    """Raises UserError unless the folder's classes can be those of `owner`.

    Index folders (00000 ..., or 0 ...) and WordNet ids (n01440764 ...) name the same classes in
    the same order; any other difference in names is a difference of class lists.
    """
    if len(folder.classes) != len(classes):
        raise UserError(
            f"{folder.root} has {len(folder.classes)} class folders, {owner} has {len(classes)}"
        )
    sides = (folder.classes, classes)
    if folder.classes == classes or {_kind(side) for side in sides} == {"index", "WordNet"}:
        return
    if {_kind(side) for side in sides} == {"index"} and [*map(int, sides[0])] == [
        *map(int, classes)
    ]:
        return
    for position, (found, expected) in enumerate(zip(folder.classes, classes, strict=True)):
        if found != expected:
            raise UserError(
                f"class {position} is {found!r} in {folder.root} but {expected!r} in {owner}; "
                "the class lists must be the same"
            )


def _kind(classes: list[str]) -> str:
    """ "index" for numbers, "WordNet" for ids like n01440764, else "names"."""
    for kind, pattern in (("index", r"\d+"), ("WordNet", r"n\d{8}")):
        if all(re.fullmatch(pattern, name) for name in classes):
            return kind
    return "names"


def published_names(classes: list[str]) -> list[str]:
    """Folder names of distilled images: 00000 ... for numbers and WordNet ids, else the same."""
    if _kind(classes) == "names":
        return classes
    return [f"{label:05d}" for label in range(len(classes))]


def decode(path: Path, data: bytes | None = None) -> Image.Image:
    """Returns an image as RGB; raises UserError that names an unreadable or truncated file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            source = path if data is None else io.BytesIO(data)
            image = Image.open(source, formats=_FORMATS)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                wide = np.asarray(image).clip(0, 65535)
                image = Image.fromarray((wide // 256).astype(np.uint8))
            elif image.mode == "F":
                raise UserError(f"image {path} has floating-point pixels; save it with 8 bits")
            return image.convert("RGB")
    except Image.DecompressionBombError:
        raise UserError(f"image {path} is implausibly large; it was not decoded") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"cannot read image {path}: {reason}") from None


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _map_files(work: Callable, files: Sequence[Path], what: str) -> Iterator:
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
    results = _map_files(read, folder.files, "reading images")
    for path, (size, content) in zip(folder.files, results, strict=True):
        digest.update(f"{path.relative_to(folder.root).as_posix()} {content}\n".encode())
        sizes.append(size)
    return np.array(sizes, dtype=np.int32), digest.hexdigest()


def fits(tensor: torch.Tensor, device: torch.device, share: float) -> bool:
    """Whether a tensor takes less than this share of a GPU's free memory; never on a CPU."""
    if device.type != "cuda":
        return False
    return tensor.nbytes < share * torch.cuda.mem_get_info(device)[0]


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; nothing waits for a copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class ResidentImages:
    """All images decoded in memory as one uint8 tensor [images, 3, H, W].

    Attributes:
        together: views rendered at once, in whole batches: on a GPU the launches of some seventy
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
        groups = _grouped(batches, self.together)
        joined = [Views.joined(group) for group in groups]
        if self.pixels.device.type == self.device.type:
            sources = (self.pixels[views.index] for views in joined)
        else:
            # Copying an index from the GPU waits for it, so all are copied before the first batch.
            indices = [views.index.cpu() for views in joined]
            sources = (send(self.pixels[index], self.device) for index in indices)
        for group, views, images in zip(groups, joined, sources, strict=True):
            pixels = render(images, views, self.size, self.mean, self.std)
            yield from pixels.split([len(batch.index) for batch in group])


def _grouped(batches: Iterable[Views], most: int) -> list[list[Views]]:
    """Neighbouring batches in lists of at most `most` views; a batch that is not whole ends one."""
    groups: list[list[Views]] = []
    room = 0
    for views in batches:
        count = len(views.index)
        if count > room:
            groups.append([])
            room = max(most, count)
        groups[-1].append(views)
        room = 0 if count % views.batch_size else room - count
    return groups


class StreamingImages:
    """Images of any sizes, decoded and cropped by DataLoader workers when they are asked for."""

    def __init__(self, files: list[Path], dataset: Dataset, device: torch.device, workers: int):
        self.files, self.device, self.size = files, device, dataset.input_size
        self.workers = workers
        self.mean = torch.tensor(dataset.mean, device=device)
        self.std = torch.tensor(dataset.std, device=device)

    def render(self, batches: Iterable[Views]) -> Iterator[torch.Tensor]:
        """Yields the network's input, float32 [N, 3, S, S], for each batch (or more) of views."""
        batches = list(batches)
        parts = [part for views in batches for part in views.to("cpu")]
        loader = torch.utils.data.DataLoader(
            _Crops(self.files, parts, self.size),
            batch_size=None,
            num_workers=min(self.workers, len(parts)),
            # A forked worker inherits which signals are blocked.
            multiprocessing_context="fork" if self.workers and parts else None,
            # Its own, as each loader draws a number: the global one belongs to the training.
            generator=torch.Generator().manual_seed(0),
            pin_memory=self.device.type == "cuda",
        )
        with _no_signals():
            received = iter(loader)
        for views in batches:
            crops = []
            for part in itertools.islice(received, len(views)):
                if isinstance(part, str):
                    raise UserError(part)
                crops.append(part.to(self.device, non_blocking=True))
            yield mix(normalise(torch.cat(crops), self.mean, self.std), views)


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


class _Crops(torch.utils.data.Dataset):
    """Item k: the crops of batch k, or the text of the error that its images raised."""

    def __init__(self, files: list[Path], batches: list[Views], size: int):
        self.files, self.batches, self.size = files, batches, size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> torch.Tensor | str:
        views = self.batches[batch]
        try:
            images = [pixels_of(decode(self.files[index])) for index in views.index.tolist()]
        except UserError as error:
            return str(error)
        return crop_resize(images, views.box, views.flip, self.size)


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
    decoded = _map_files(lambda path: pixels_of(decode(path)), folder.files, "decoding images")
    for place, image in zip(pixels, decoded, strict=True):
        place.copy_(image)
    return ResidentImages(pixels, dataset, device)


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024


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

    yield from _map_files(prepare, folder.files, "decoding validation images")


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
    for place, image in zip(pixels, decode_evaluation(folder, dataset), strict=True):
        place.copy_(image)
    return pixels
