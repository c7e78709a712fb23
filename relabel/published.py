"""Label folders of the field's codes, in any of their layouts, read batch by batch.

| code | files | image order |
|---|---|---|
| HALD | `epoch_<p>.tar`, a list of batches | `sampler_indices_dict.pt`, of each pass |
| SRe2L, FADRM, CV-DD | `epoch_<p>/batch_<b>.tar` | not stored: torch's sampler, seeded |
| LPLD | `epoch_<p>/batch_<b>.tar` | `sampler_indices_epoch.json`, of each pass |
| LPQLD | `batch_<n>.tar`, n counts over all passes | `sampler_indices_batch.json`, of each batch |

A batch is [coords, flips, mix_index, lam, bbox, labels]: crops as fractions (top / H, left / W,
height / H, width / W), and labels that are softmax(logits / 20) or logits. LPQLD may store the
values and the indices of the k largest logits instead, whose softmax it takes over these k alone.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.cli import UserError
from utils.data.datasets import Dataset
from utils.data.folders import ImageFolder
from utils.data.views import Mixture, Views
from utils.files import load_tensors, read_json, sha256_file
from utils.labels import centre

TEMPERATURE = 20.0
HALD_ORDER = "sampler_indices_dict.pt"
_FILE = "published label file"
_ROUNDING = 0.01  # of a sum of half-precision probabilities
# What k logits leave to all other classes at T = 20. Less would take these further down, and in
# half precision centred logits of 256 and more are rounded to quarters.
_REST = 1 / 1024


class _StoredBatch(NamedTuple):
    """Where a batch is: its file, the entry of `orders` with its images, its position there."""

    file: Path
    order: int
    position: int


class _Record(NamedTuple):
    """A batch as published, in tensors."""

    where: str  # in messages
    coords: torch.Tensor
    flips: torch.Tensor
    mix_index: torch.Tensor | None
    lam: float | None
    bbox: torch.Tensor | None
    values: torch.Tensor  # the labels
    indices: torch.Tensor | None  # their classes, where these are not all

    def kind(self) -> tuple[str, str, int | None]:
        """How it was mixed, what its labels are, and k where these are the k largest logits."""
        mix = "mixup" if self.bbox is None else "cutmix"
        if self.mix_index is None:
            mix = "none"
        if self.indices is not None:
            return mix, "k logits", self.values.shape[1]
        missing = (self.values.sum(dim=1) - 1).abs().max()
        shares = (self.values >= 0).all() and missing <= _ROUNDING
        return mix, "probabilities" if shares else "logits", None


class PublishedLabels:
    """The batches of a published label folder, and how they make up passes.

    A pass of a label set has as many batches as the images fill. Those of pruned folders lack
    some, so theirs are counted off in the order in which they are stored, the last pass being
    filled up with the first batches.

    Attributes:
        layout: which codes have it.
        stored: where the batches are, in order.
        passes, per_pass: how many a label set of them has, and batches in each.
        derived: whether the image order is not stored: `orders` is to be set to a derived one.
        orders: images of each pass, or of each batch in LPQLD's layout; `order_file` holds them.
        batch_size: views of a batch.
        mix, kind, topk: what `_Record.kind` says of the first batch, and of all.
    """

    def __init__(
        self, folder: Path, images: ImageFolder, sizes: np.ndarray, dataset: Dataset, boxes: str
    ):
        """Finds out what a folder holds for images of `sizes`, int [images, 2]; or UserError.

        `boxes` are "rounded" to whole pixels, or as "published", truncated.
        """
        _check(folder.is_dir(), f"published label folder not found: {folder}")
        self.folder, self.sizes, self.boxes = folder, sizes, boxes
        self.dataset, self.hard_labels = dataset, images.labels
        self._contents = functools.lru_cache(maxsize=1)(self._read_file)
        self._find()
        first = self._record(self.stored[0])
        self.batch_size, (self.mix, self.kind, self.topk) = len(first.coords), first.kind()
        self.per_pass = math.ceil(len(sizes) / self.batch_size)
        self.passes = math.ceil(len(self.stored) / self.per_pass)
        found, filled = len(self.stored), self.per_pass * (1 + self.stored[-1].order)
        if found != filled and (self.layout == "HALD" or self.derived):
            raise UserError(
                f"{folder} has {found} batches of {self.batch_size} views where {len(sizes)} "
                f"images fill {filled}; are files missing, or are these other images?"
            )

    def _find(self) -> None:
        """Sets layout, order_file, derived, orders, and where all batches are stored."""
        folder, self.derived, self.orders, self.per_file = self.folder, False, [], 1
        if (folder / HALD_ORDER).exists():
            self.layout, self.order_file = "HALD", folder / HALD_ORDER
            parts = [[file] for file in _numbered(folder, "epoch_*.tar")]
            self.per_file = len(self._contents(parts[0][0])) if parts else 1
        elif files := _numbered(folder, "batch_*.tar"):
            self.layout, self.order_file = "LPQLD", folder / "sampler_indices_batch.json"
            parts = [[file] for file in files]
        else:
            self.layout, self.order_file = "LPLD", folder / "sampler_indices_epoch.json"
            parts = [_numbered(path, "batch_*.tar") for path in _numbered(folder, "epoch_*")]
            if not self.order_file.exists():
                self.layout, self.derived = "SRe2L, FADRM or CV-DD", True
        if not parts:
            inside = [str(path.parent) for path in folder.glob("*/epoch_0*")]
            hint = f"is it {inside[0]}?" if inside else "relabel/generate.py labels images anew"
            raise UserError(
                f"{folder} has none of the field's layouts: epoch_0.tar with {HALD_ORDER}, "
                f"epoch_0/batch_0.tar, or batch_0.tar; {hint}"
            )
        counts = [len(files) for files in parts]
        equal = 0 not in counts and {*counts[:-1]} <= {counts[0]}
        _check(equal, f"{folder}: batches are missing; there are {counts}")
        self.stored = [
            _StoredBatch(file, order, position)
            for order, files in enumerate(parts)
            for position, file in enumerate(files * self.per_file)
        ]
        if not self.derived:
            hald = self.layout == "HALD"
            content = load_tensors(self.order_file, _FILE) if hald else read_json(self.order_file)
            self.orders = self._listed(content)
            listed, stored, name = len(self.orders), len(parts), self.order_file.name
            told = f"{folder} has {stored} passes or batches, {name} the images of {listed}"
            fits = listed == stored if hald else listed >= stored
            _check(fits, f"{told}; are files missing?")

    def _listed(self, content: Any) -> list[np.ndarray]:
        """int32 image indices by pass or batch; raises UserError unless they are those of images.

        `read` sees whether a batch has each once: a pass of a pruned set, exported, has some twice.
        """
        count, orders = len(self.sizes), []
        for number in range(len(content)) if isinstance(content, dict) else ():
            try:
                order = np.asarray(content.get(str(number), content.get(number)))
            except (TypeError, ValueError, RuntimeError):  # lists of lists, tensors of other kinds
                order = np.empty(0, dtype=object)
            fits = order.ndim == 1 and order.dtype.kind in "iu"
            fits = fits and order.min(initial=0) >= 0 and order.max(initial=0) < count
            told = f"entry {number} does not list images of the {count} in the image folder"
            _check(fits, f"{self.order_file}: {told}")
            orders.append(order.astype(np.int32))
        return orders

    def derived_orders(self, seed: int) -> Iterator[list[np.ndarray]]:
        """The orders that torch's sampler draws for SRe2L: that of today, and that of old versions.

        Newer ones draw a second permutation in every pass, of which they use nothing.
        """
        passes, images = range(1 + self.stored[-1].order), range(len(self.sizes))
        generator = torch.Generator().manual_seed(seed)
        sampler = torch.utils.data.RandomSampler(images, generator=generator)
        yield [np.array(list(sampler), dtype=np.int32) for _ in passes]
        generator.manual_seed(seed)
        yield [torch.randperm(len(images), generator=generator).int().numpy() for _ in passes]

    def fingerprint(self) -> str:
        """The hex SHA-256 over names and sizes of all files, and contents of the first and last.

        The files of two teachers' labels often agree in names and sizes, never in contents.
        """
        files = [*dict.fromkeys(batch.file for batch in self.stored)]
        lines = [
            f"{file.relative_to(self.folder).as_posix()} {file.stat().st_size}\n" for file in files
        ]
        lines += [f"{sha256_file(file)}\n" for file in (files[0], files[-1])]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def read_pass(self, pass_index: int) -> tuple[Views, torch.Tensor, Mixture]:
        """The views of a pass, their float32 [N, C] centred logits, and the classes they show.

        Raises UserError for damaged files, and what does not fit images or other batches.
        """
        start = pass_index * self.per_pass
        batches = itertools.islice(itertools.cycle(self.stored), start, start + self.per_pass)
        parts, logits = zip(*map(self.read, batches), strict=True)
        whole = all(len(part.index) == self.batch_size for part in parts[:-1])
        told = f"{self.folder}: a smaller batch within pass {pass_index}: are files missing?"
        _check(whole, told)
        views = Views.joined(parts)
        return views, torch.cat(logits), views.mixture(self.hard_labels, self.dataset.input_size)

    def _read_file(self, file: Path) -> list:
        """The batches of a file, in HALD's layout several."""
        content = load_tensors(file, _FILE)
        batches = content if self.layout == "HALD" else [content]
        _check(isinstance(batches, list) and batches, f"{file} is not a list of label batches")
        return batches

    def _record(self, batch: _StoredBatch) -> _Record:
        """A batch as published, checked to be one; raises UserError."""
        batches, where, belong = self._contents(batch.file), str(batch.file), self.per_file
        _check(len(batches) == belong, f"{where} has {len(batches)} batches where {belong} belong")
        if self.layout == "HALD":
            where += f", batch {batch.position}"
        try:
            return _parsed(where, *batches[batch.position % belong])
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(
                f"{where} is no batch of [coords, flips, mix_index, lam, bbox, labels]; the "
                "ImageNet-21K variants, with cutout boxes or the parameters of RandAugment, cannot "
                "be imported"
            ) from None

    def read(self, batch: _StoredBatch) -> tuple[Views, torch.Tensor]:
        """Views and centred logits of one batch, checked; raises UserError."""
        record = self._record(batch)
        where, coords, flips, mix_index, lam, bbox, values, indices = record
        count, classes, size = len(coords), self.dataset.num_classes, self.dataset.input_size
        start = batch.position * self.batch_size
        order = self.orders[batch.order][start : start + self.batch_size]
        index, shape = torch.from_numpy(order).long(), tuple(values.shape)
        kind, first, k = record.kind(), (self.mix, self.kind, self.topk), self.topk
        named = indices is None or _within(indices, classes - 1)
        for otherwise, right in {
            f"{count} views where {len(index)} belong": len(index) == count,
            f"its images, in {self.order_file}, are not there once each": len({*order}) == count,
            f"its CutMix box does not fit {size} pixels": bbox is None or _within(bbox, size),
            f"soft labels are {shape}, expected {count, classes}": k or shape[1] == classes,
            f"{kind} labels, in the first batch {first}": kind == first,
            f"class indices do not fit {classes} classes": named,
        }.items():
            _check(right, f"{where}: {otherwise}")
        box, inside = self._pixels(coords, index)
        _check(inside, f"{where}: a crop lies outside its image; are these the right images?")
        views = Views(index, box, flips, self.batch_size, mix_index)
        if self.mix == "cutmix":
            box = torch.cat([bbox[:2], (bbox[2:] - bbox[:2]).clamp(min=0)])
            views.mix_box = box.int()[None]
        elif self.mix == "mixup":
            views.mix_lam = torch.tensor([1.0 if lam is None else lam])
        if k:
            return views, centre(_fill_up(values, indices, classes))
        return views, to_logits(values) if self.kind == "probabilities" else centre(values)

    def _pixels(self, coords: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """int32 [B, 4] pixels of fractional crops, and whether all lie in their images."""
        size = torch.from_numpy(self.sizes[index.numpy()].astype(np.float64))
        box = coords.double() * size.repeat(1, 2)
        box = box.round() if self.boxes == "rounded" else box.trunc()
        box[:, 2:].clamp_(min=1)
        beyond = box[:, :2] + box[:, 2:] - size
        # Of half-precision fractions, both ends of a crop can be rounded away from each other.
        inside = bool((box >= 0).all() and (beyond <= 1 + size / 1024).all())
        box[:, 2:] -= beyond.clamp(min=0)
        return box.int(), inside


def _check(right: bool, otherwise: str) -> None:
    """Raises UserError with that text unless something is right."""
    if not right:
        raise UserError(otherwise)


def _within(values: torch.Tensor, largest: int) -> bool:
    """Whether all values are from 0 to the largest."""
    return bool(((values >= 0) & (values <= largest)).all())


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """What a pattern finds, by the numbers in the names; raises UserError where one is missing."""
    start, end = pattern.split("*")
    texts = [path.name.removeprefix(start).removesuffix(end) for path in folder.glob(pattern)]
    count = sum(text.isdecimal() and text == str(int(text)) for text in texts)
    paths = [folder / f"{start}{number}{end}" for number in range(count)]
    missing = next((path.name for path in paths if not path.exists()), None)
    _check(missing is None, f"{folder} is incomplete: no {missing}")
    return paths


def _parsed(where: str, coords, flips, mix_index, lam, bbox, values, indices=None) -> _Record:
    """A batch in tensors; raises ValueError, or what torch does, where it is none."""
    coords, values = _real(coords), _real(values).float()
    lam = None if lam is None else float(lam)
    bbox = None if bbox is None else [float(side) for side in bbox]
    flips, mix_index, bbox, indices = map(_whole, (flips, mix_index, bbox, indices))
    count, shape = len(coords), values.shape
    right = [
        coords.shape == (count, 4) and count > 0,
        flips is not None and flips.shape == (count,) and _within(flips, 1),
        mix_index is not None or (bbox is None and lam in (None, 1)),
        mix_index is None or (mix_index.shape == (count,) and _within(mix_index, count - 1)),
        lam is None or 0 <= lam <= 1,
        bbox is None or bbox.shape == (4,),
        values.ndim == 2 and len(values) == count and shape[1] > 0 and values.isfinite().all(),
        indices is None or indices.shape == shape,
    ]
    if not all(right):
        raise ValueError("entries do not fit each other")
    return _Record(where, coords, flips.bool(), mix_index, lam, bbox, values, indices)


def _real(values: Any) -> torch.Tensor:
    """Real numbers as an ordinary tensor; raises ValueError for other kinds."""
    tensor = torch.as_tensor(values).detach()
    usual = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not usual or tensor.is_quantized or tensor.is_complex():
        raise ValueError("sparse, quantised, complex or without content")
    return tensor


def _whole(values: Any) -> torch.Tensor | None:
    """Whole numbers as an int64 tensor, and None as it is; raises ValueError for others."""
    if values is None:
        return None
    tensor = _real(values)
    if (tensor != tensor.long()).any():
        raise ValueError("no whole numbers")
    return tensor.long()


def to_logits(probabilities: torch.Tensor) -> torch.Tensor:
    """Centred logits 20 log p; a probability that half precision lost becomes its smallest one."""
    smallest = torch.finfo(torch.float16).smallest_normal / 1024
    return centre(TEMPERATURE * probabilities.clamp(min=smallest).log())


def _fill_up(values: torch.Tensor, indices: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Logits [B, C] whose softmax at T = 20 is that over the k values, but for _REST of it."""
    others = max(num_classes - values.shape[1], 1)
    total = TEMPERATURE * torch.logsumexp(values / TEMPERATURE, dim=1, keepdim=True)
    rest = total + TEMPERATURE * math.log(_REST / others)
    return rest.repeat(1, num_classes).scatter_(1, indices, values)
