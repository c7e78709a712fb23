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

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.cli import UserError
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
    """Where a batch is: its file, its pass (in LPQLD's layout, its order), its position there."""

    file: Path
    pass_index: int
    position: int


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
        kind: "probabilities", "logits" or "k logits".
        topk: k, or None.
        mix: "cutmix", "mixup" or "none".
    """

    def __init__(
        self, folder: Path, sizes: np.ndarray, num_classes: int, input_size: int, boxes: str
    ):
        """Finds out what a folder holds.

        Args:
            folder: the published one.
            sizes: int [images, 2], heights and widths.
            num_classes, input_size: of the data set.
            boxes: "rounded" to whole pixels, or "published": truncated.

        Raises:
            UserError: no such folder or layout, or files missing.
        """
        if not folder.is_dir():
            raise UserError(f"published label folder not found: {folder}")
        self.folder, self.sizes, self.boxes = folder, sizes, boxes
        self.num_classes, self.input_size = num_classes, input_size
        self._last_file: tuple[Path, list] | None = None
        self._find()
        coords, _, mix_index, _, bbox, labels = self._entries(self.stored[0])
        self.batch_size, self.mix = len(coords), _mix(mix_index, bbox)
        self.kind, self.topk = _kind(labels)
        self.per_pass = math.ceil(len(sizes) / self.batch_size)
        self.passes = math.ceil(len(self.stored) / self.per_pass)
        whole = self.per_pass * (1 + self.stored[-1].pass_index)
        if (self.layout == "HALD" or self.derived) and len(self.stored) != whole:
            raise UserError(
                f"{folder} has {len(self.stored)} batches of {self.batch_size} views where "
                f"{len(sizes)} images fill {whole}; are files missing, or are these other images?"
            )

    def _find(self) -> None:
        """Sets layout, order_file, derived, orders, and where all batches are stored."""
        folder, self.derived, self.orders = self.folder, False, []
        if (folder / HALD_ORDER).exists():
            self.layout, self.order_file = "HALD", folder / HALD_ORDER
            self.orders = self._listed(load_tensors(self.order_file, _FILE))
            files = _numbered(folder, "epoch_*.tar")
            if len(files) != len(self.orders):
                raise UserError(
                    f"{folder} has {len(files)} files epoch_*.tar, but {HALD_ORDER} the image "
                    f"orders of {len(self.orders)} passes; are files missing?"
                )
            positions = range(len(self._batches(files[0])))
            self.stored = [
                _StoredBatch(file, pass_index, position)
                for pass_index, file in enumerate(files)
                for position in positions
            ]
        elif files := _numbered(folder, "batch_*.tar"):
            self.layout, self.order_file = "LPQLD", folder / "sampler_indices_batch.json"
            self.orders = self._listed(read_json(self.order_file))
            self.stored = [_StoredBatch(file, order, 0) for order, file in enumerate(files)]
        elif passes := _numbered(folder, "epoch_*"):
            self.layout, self.order_file = "LPLD", folder / "sampler_indices_epoch.json"
            if self.order_file.exists():
                self.orders = self._listed(read_json(self.order_file))
            else:
                self.layout, self.derived = "SRe2L, FADRM or CV-DD", True
            self.stored = [
                _StoredBatch(file, pass_index, position)
                for pass_index, path in enumerate(passes)
                for position, file in enumerate(_numbered(path, "batch_*.tar"))
            ]
            counts = np.bincount([batch.pass_index for batch in self.stored])
            if len(counts) < len(passes) or (counts[:-1] != counts[0]).any():
                raise UserError(f"{folder}: batches are missing; there are {counts.tolist()}")
        else:
            inside = [str(path.parent) for path in folder.glob("*/epoch_0*")]
            raise UserError(
                f"{folder} has none of the field's layouts: epoch_0.tar with {HALD_ORDER}, "
                "epoch_0/batch_0.tar, or batch_0.tar; "
                + (f"is it {inside[0]}?" if inside else "relabel/generate.py labels images anew")
            )
        if not self.derived and self.stored[-1].pass_index >= len(self.orders):
            raise UserError(
                f"{self.order_file} ends with entry {len(self.orders) - 1}, before that of "
                f"{self.stored[-1].file}"
            )

    def _listed(self, content: Any) -> list[np.ndarray]:
        """Image indices by pass or batch; raises UserError unless they are those of images.

        Once each, except in HALD's layout: there a pass of a pruned set, exported, has some twice,
        though as many as there are at least, and `read` looks at each batch.
        """
        if not isinstance(content, dict) or not content:
            raise UserError(f"{self.order_file} is not a dictionary of image indices")
        count, orders = len(self.sizes), []
        for number in range(len(content)):
            try:
                order = np.asarray(content.get(str(number), content.get(number)))
            except (TypeError, ValueError, RuntimeError):  # lists of lists, tensors of other kinds
                order = np.empty(0, dtype=object)
            if order.ndim != 1 or order.dtype.kind not in "iu":
                raise UserError(f"{self.order_file} has no list of image indices for {number}")
            hald = self.layout == "HALD"
            enough = len(order) >= count if hald else len(np.unique(order)) == len(order)
            if not enough or order.min(initial=0) < 0 or order.max(initial=0) >= count:
                raise UserError(
                    f"{self.order_file}: entry {number} lists {len(order)} images, which are not "
                    f"those of the {count} in the image folder"
                )
            orders.append(order.astype(np.int32))
        return orders

    def derived_orders(self, seed: int) -> Iterator[list[np.ndarray]]:
        """The orders that torch's sampler draws for SRe2L: that of today, and that of old versions.

        Newer ones draw a second permutation in every pass, of which they use nothing.
        """
        pass_indices = range(1 + self.stored[-1].pass_index)
        images = range(len(self.sizes))
        sampler = torch.utils.data.RandomSampler(
            images, generator=torch.Generator().manual_seed(seed)
        )
        yield [np.array(list(sampler), dtype=np.int32) for _ in pass_indices]
        generator = torch.Generator().manual_seed(seed)
        yield [torch.randperm(len(images), generator=generator).int().numpy() for _ in pass_indices]

    def fingerprint(self) -> str:
        """The hex SHA-256 over names and sizes of all files, and contents of the first and last.

        The files of two teachers' labels often agree in names and sizes, never in contents.
        """
        files = [*dict.fromkeys(batch.file for batch in self.stored)]
        digest = hashlib.sha256()
        for file in files:
            name = file.relative_to(self.folder).as_posix()
            digest.update(f"{name} {file.stat().st_size}\n".encode())
        for file in (files[0], files[-1]):
            digest.update(f"{sha256_file(file)}\n".encode())
        return digest.hexdigest()

    def read_pass(
        self, pass_index: int, labels: torch.Tensor
    ) -> tuple[Views, torch.Tensor, Mixture]:
        """The views of a pass, their float32 [N, C] centred logits, and the classes in them.

        Args:
            pass_index: from 0.
            labels: int64 [images], the hard ones.

        Raises:
            UserError: damaged files, or what fits neither the images nor the other batches.
        """
        start = pass_index * self.per_pass
        batches = itertools.islice(itertools.cycle(self.stored), start, start + self.per_pass)
        parts, logits = zip(*map(self.read, batches), strict=True)
        if any(len(part.index) != self.batch_size for part in parts[:-1]):
            raise UserError(
                f"{self.folder}: a smaller batch within pass {pass_index}: are files missing?"
            )
        views = Views.joined(parts)
        return views, torch.cat(logits), views.mixture(labels, self.input_size)

    def _batches(self, file: Path) -> list:
        """The batches of a file of HALD's; those of the last one asked for are kept."""
        if self._last_file is None or self._last_file[0] != file:
            batches = load_tensors(file, _FILE)
            if not isinstance(batches, list) or not batches:
                raise UserError(f"{file} is not a list of label batches")
            self._last_file = file, batches
        return self._last_file[1]

    def _where(self, batch: _StoredBatch) -> str:
        """Names a batch in messages."""
        inside = f", batch {batch.position}" if self.layout == "HALD" else ""
        return f"{batch.file}{inside}"

    def _entries(self, batch: _StoredBatch) -> tuple:
        """The entries of a batch, checked to be some."""
        if self.layout != "HALD":
            return _entries(load_tensors(batch.file, _FILE), self._where(batch))
        batches, belong = self._batches(batch.file), self.stored[-1].position + 1
        if len(batches) != belong:
            raise UserError(f"{batch.file} has {len(batches)} batches where {belong} belong")
        return _entries(batches[batch.position], self._where(batch))

    def read(self, batch: _StoredBatch) -> tuple[Views, torch.Tensor]:
        """Views and centred logits of one batch, checked; raises UserError."""
        coords, flips, mix_index, lam, bbox, labels = self._entries(batch)
        where = self._where(batch)
        start = batch.position * self.batch_size
        index = torch.arange(min(len(coords), len(self.sizes)))
        if self.orders:
            order = self.orders[batch.pass_index][start : start + self.batch_size]
            index = torch.from_numpy(order.astype(np.int64))
        if len(index) != len(coords):
            raise UserError(f"{where}: {len(coords)} views where {len(index)} belong")
        if len(index.unique()) != len(index):
            raise UserError(f"{where}: its images, in {self.order_file}, are not there once each")
        views = Views(index, self._pixels(coords, index, where), flips, self.batch_size)
        self._mixed(views, mix_index, lam, bbox, where)
        if (mix := _mix(mix_index, bbox)) != self.mix:
            raise UserError(f"{where}: mixed otherwise ({mix}) than the first batch")
        return views, self._logits(labels, where)

    def _pixels(self, coords: torch.Tensor, index: torch.Tensor, where: str) -> torch.Tensor:
        """int32 [B, 4] pixels (top, left, height, width) of fractional crops."""
        size = torch.from_numpy(self.sizes[index.numpy()].astype(np.float64))
        box = coords.double() * size.repeat(1, 2)
        box = box.round() if self.boxes == "rounded" else box.trunc()
        box[:, 2:].clamp_(min=1)
        outside = box[:, :2] + box[:, 2:] - size
        # Of half-precision fractions, both ends of a crop can be rounded away from each other.
        if not (box >= 0).all() or (outside > 1 + size / 1024).any():
            raise UserError(f"{where}: a crop lies outside its image; are these the right images?")
        box[:, 2:] -= outside.clamp(min=0)
        return box.int()

    def _mixed(self, views: Views, mix_index, lam, bbox, where: str) -> None:
        """Sets partner and box, or weight, of a batch's views."""
        if mix_index is None and (bbox is not None or (lam is not None and lam < 1)):
            raise UserError(f"{where} is mixed, but has no mix_index")
        if mix_index is None:
            return
        count = len(views.index)
        if mix_index.shape != (count,) or not ((mix_index >= 0) & (mix_index < count)).all():
            raise UserError(f"{where}: mix_index does not name views of the batch")
        views.mix_index = mix_index
        if lam is not None and not 0 <= lam <= 1:
            raise UserError(f"{where}: lambda is {lam}, not between 0 and 1")
        if bbox is None:
            views.mix_lam = torch.tensor([1.0 if lam is None else lam])
        elif len(bbox) != 4 or not ((bbox >= 0) & (bbox <= self.input_size)).all():
            raise UserError(
                f"{where}: CutMix box {bbox.tolist()} does not fit {self.input_size} pixels"
            )
        else:
            views.mix_box = torch.cat([bbox[:2], (bbox[2:] - bbox[:2]).clamp(min=0)])[None]

    def _logits(self, labels: list[torch.Tensor], where: str) -> torch.Tensor:
        """float32 [B, C] centred logits of labels as stored."""
        values, (kind, topk) = labels[0], _kind(labels)
        if topk:
            if values.shape != labels[1].shape or not 0 <= labels[1].min() <= labels[1].max() < (
                self.num_classes
            ):
                raise UserError(f"{where}: class indices do not fit {self.num_classes} classes")
        elif values.shape[1:] != (self.num_classes,):
            raise UserError(
                f"{where}: soft labels are {tuple(values.shape)}, expected "
                f"({len(values)}, {self.num_classes})"
            )
        if not values.isfinite().all():
            raise UserError(f"{where}: soft labels are not finite")
        if (kind, topk) != (self.kind, self.topk):
            raise UserError(
                f"{where}: soft labels are no {self.kind}, as in the first batch, but {kind}"
            )
        if topk:
            return centre(_fill_up(values, labels[1], self.num_classes))
        return to_logits(values) if kind == "probabilities" else centre(values)


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """What a pattern finds, by the numbers in the names; raises UserError where one is missing."""
    name = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    found = {
        int(match[1]): path for path in folder.glob(pattern) if (match := name.fullmatch(path.name))
    }
    for number in range(len(found)):
        if number not in found:
            raise UserError(f"{folder} is incomplete: no {pattern.replace('*', str(number))}")
    return [found[number] for number in range(len(found))]


def _mix(mix_index: torch.Tensor | None, bbox: torch.Tensor | None) -> str:
    """How a batch with these entries was mixed."""
    if mix_index is None:
        return "none"
    return "mixup" if bbox is None else "cutmix"


def _kind(labels: list[torch.Tensor]) -> tuple[str, int | None]:
    """What labels as stored are, and how many of each label's logits, where not all of them."""
    values = labels[0]
    if len(labels) == 2:
        return "k logits", values.shape[1]
    whole = (values >= 0).all() and (values.sum(dim=1) - 1).abs().max() <= _ROUNDING
    return "probabilities" if whole else "logits", None


def _entries(record: Any, where: str) -> tuple:
    """The entries of a batch as tensors; the sixth is a list of one or two."""
    foreign = UserError(
        f"{where} is no batch of [coords, flips, mix_index, lam, bbox, labels]; the ImageNet-21K "
        "variants, with cutout boxes or the parameters of RandAugment, cannot be imported"
    )

    def whole(values: Any) -> torch.Tensor:
        tensor = _plain(values)
        if (tensor != tensor.long()).any():
            raise UserError(f"{where}: a flip, mix_index, box or class index is no whole number")
        return tensor.long()

    if not isinstance(record, list | tuple) or len(record) not in (6, 7):
        raise foreign
    coords, flips, mix_index, lam, bbox, *labels = record
    try:
        coords, flips = _plain(coords), whole(flips)
        mix_index = None if mix_index is None else whole(mix_index)
        lam = None if lam is None else float(lam)
        bbox = None if bbox is None else whole([float(side) for side in bbox]).int()
        labels = [_plain(values).float() for values in labels[:1]] + [*map(whole, labels[1:])]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise foreign from None
    count = len(coords) if coords.ndim == 2 else 0
    fits = count and coords.shape[1] == 4 and flips.shape == (count,)
    fits = fits and ((flips == 0) | (flips == 1)).all()
    if not fits or any(
        values.ndim != 2 or len(values) != count or not values.shape[1] for values in labels
    ):
        raise foreign
    return coords, flips.bool(), mix_index, lam, bbox, labels


def _plain(values: Any) -> torch.Tensor:
    """Values as an ordinary tensor of real numbers; raises ValueError for the other kinds."""
    tensor = torch.as_tensor(values).detach()
    usual = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not usual or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"a tensor that is {tensor.layout}, {tensor.dtype}, on {tensor.device}")
    return tensor


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
