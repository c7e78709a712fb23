"""Views: random crops, flips and mixes of images, drawn as integers and rendered in batches.

The same functions draw and render the views that a teacher labels, that a student trains on, and
that reports show, so what was labelled is what is replayed. docs/label-format.md says how they
follow from the seed, to the bit. Source of the distributions: torchvision's RandomResizedCrop;
CutMix (arXiv 1905.04899); MixUp (arXiv 1710.09412).
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from utils.runtime import send

MIXES = ("cutmix", "mixup", "none")
ATTEMPTS = 10
ORDER, CROP, MIX, POOL = range(4)
_RAWS_PER_VIEW = ATTEMPTS + 2
_RAWS_PER_MIX = 64
_CHUNK = 1 << 16
_BATCHED_PIXELS = 96 * 96  # on a CPU, larger images are faster one by one (measured)
_LOW = 0xFFFFFFFF  # lower 32 bits; beside an array of uint64, an int of Python's leaves it uint64

Images = torch.Tensor | list[torch.Tensor]  # uint8 or float [B, 3, H, W], or B of any sizes


@dataclasses.dataclass(frozen=True)
class ViewSpec:
    """What the views of a data set are drawn from."""

    input_size: int  # S, the side of a rendered view in pixels
    batch_size: int = 16  # views per batch; the last batch of a pass may be smaller
    min_scale: float = 0.08  # bounds of a crop's area as a share of the image's area
    max_scale: float = 1.0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # bounds of a crop's width / height
    mix: str = "cutmix"  # of MIXES: CutMix with alpha 1, MixUp with alpha 0.8


class Mixture(NamedTuple):
    """What views show: the hard labels in each of them, which their reader knows for free."""

    own: torch.Tensor  # int64 [N], class of the view's own image
    partner: torch.Tensor  # int64 [N], class of its partner's
    lam: torch.Tensor  # float32 [N], the share of the view that shows its own image

    def own_covers_most(self) -> torch.Tensor:
        """bool [N]: whether the own image covers at least half of the view."""
        return self.lam >= 0.5

    def main_class(self) -> torch.Tensor:
        """int64 [N]: the class that covers most of the view."""
        return torch.where(self.own_covers_most(), self.own, self.partner)

    def rows(self, rows) -> "Mixture":
        """Of some of the views (a slice, or indices)."""
        return Mixture(self.own[rows], self.partner[rows], self.lam[rows])


@dataclasses.dataclass
class Views:
    """Views of one or more batches; tensors, all on one device."""

    index: torch.Tensor  # int64 [N], which image each view shows
    box: torch.Tensor  # int32 [N, 4], the crop: top, left, height, width in source pixels
    flip: torch.Tensor  # bool [N], mirrored left to right
    batch_size: int  # views per batch; only the last batch may be smaller
    mix_index: torch.Tensor | None = None  # int64 [N], the partner's place within the batch
    mix_box: torch.Tensor | None = None  # CutMix: int32 [batches, 4], as box, in input pixels
    mix_lam: torch.Tensor | None = None  # MixUp: float32 [batches], the own image's weight

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self.index) / self.batch_size)

    def __getitem__(self, batch: int) -> "Views":
        """The views of one batch; the IndexError also ends a loop over batches."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        return self._batches(batch, batch + 1)

    def groups(self, batches: int) -> list["Views"]:
        """The same views, so many batches at a time; the last group may have fewer."""
        return [self._batches(start, start + batches) for start in range(0, len(self), batches)]

    def _batches(self, start: int, end: int) -> "Views":
        def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
            rows = 1 if name in ("mix_box", "mix_lam") else self.batch_size
            return tensor[start * rows : end * rows]

        return self._with_tensors(part)

    def _with_tensors(self, make: Callable[[str, torch.Tensor], torch.Tensor]) -> "Views":
        """These views with other tensors, each made from a field's name and its tensor."""
        tensors = {
            name: make(name, value)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **tensors)

    @classmethod
    def joined(cls, parts: Sequence["Views"]) -> "Views":
        """The views of several parts as one; all parts but the last are of whole batches."""
        if len(parts) == 1:
            return parts[0]
        return parts[0]._with_tensors(
            lambda name, _: torch.cat([getattr(part, name) for part in parts])
        )

    def to(self, device: torch.device) -> "Views":
        """The same views on another device."""
        return self._with_tensors(lambda _, tensor: send(tensor, device))

    def checksum(self) -> bytes:
        """SHA-256 over all fields (little-endian), to know that views were drawn again."""
        digest = hashlib.sha256(f"{self.batch_size}".encode())
        kinds = {torch.int64: "<i8", torch.int32: "<i4", torch.bool: "u1", torch.float32: "<f4"}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                digest.update(name.encode())
                digest.update(value.cpu().numpy().astype(kinds[value.dtype]).tobytes())
        return digest.digest()

    def partner(self) -> torch.Tensor | None:
        """int64 [N]: the position among these N views of each view's partner; None if unmixed."""
        if self.mix_index is None:
            return None
        position = torch.arange(len(self.index), device=self.index.device)
        return position - position % self.batch_size + self.mix_index

    def lam(self, input_size: int) -> torch.Tensor:
        """float32 [N]: the share of each view that shows its own image (CutMix: the true area)."""
        if self.mix_box is not None:
            area = (self.mix_box[:, 2] * self.mix_box[:, 3]).float()
            share = 1 - area / (input_size * input_size)
        elif self.mix_lam is not None:
            share = self.mix_lam
        else:
            return torch.ones(len(self.index), device=self.index.device)
        return share.repeat_interleave(self.batch_size)[: len(self.index)]

    def mixture(self, hard_labels: torch.Tensor, input_size: int) -> Mixture:
        """What these views show; hard_labels int64 [images], the class of every image."""
        own, partner = hard_labels[self.index], self.partner()
        return Mixture(own, own if partner is None else own[partner], self.lam(input_size))


def raws(seed: int, purpose: int, epoch: int, count: int) -> np.ndarray:
    """uint64 [count]: raw Philox output for a seed, a purpose (ORDER, ...) and an epoch."""
    key = np.array([seed, 256 * epoch + purpose], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def shuffle(seed: int, purpose: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count]: a random permutation of range(count), a pure function of its arguments."""
    return np.argsort(raws(seed, purpose, epoch, count), kind="stable")


def draw(spec: ViewSpec, sizes: np.ndarray, seed: int, epoch: int = 0) -> Views:
    """Draws one view of every image, in shuffled order, mixed batch by batch.

    `sizes` is int [images, 2], height and width in pixels. Label sets have seed + pass and epoch
    0; the hard-label epochs of a run have its seed, and 1 + the epoch.
    """
    order = shuffle(seed, ORDER, epoch, len(sizes))
    shuffled = np.asarray(sizes, dtype=np.uint64)[order]
    numbers = raws(seed, CROP, epoch, _RAWS_PER_VIEW * len(order)).reshape(-1, _RAWS_PER_VIEW)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(order), _CHUNK)]
    boxes = [_crop_boxes(spec, shuffled[rows], numbers[rows]) for rows in chunks]
    views = Views(
        torch.from_numpy(order),
        torch.from_numpy(np.concatenate(boxes)),
        torch.from_numpy(numbers[:, -1] >> 63 == 1),
        spec.batch_size,
    )
    return views if spec.mix == "none" else _draw_mix(spec, views, seed, epoch)


def centre_views(sizes: np.ndarray, batch_size: int) -> Views:
    """One unmixed view of every image, in order: the largest central square."""
    sizes = np.asarray(sizes, dtype=np.int32)
    side = sizes.min(axis=1)
    top, left = (sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2
    box = torch.from_numpy(np.stack([top, left, side, side], axis=1))
    return Views(torch.arange(len(box)), box, torch.zeros(len(box), dtype=torch.bool), batch_size)


def _isqrt(values: np.ndarray) -> np.ndarray:
    """Floor of the square root of uint64 values below 2^62, exactly."""
    root = np.sqrt(values.astype(np.float64)).astype(np.uint64)
    root -= root * root > values
    root += (root + 1) * (root + 1) <= values
    return root


def _aspect_ratio(ratio: tuple[float, float], bits: np.ndarray) -> np.ndarray:
    """q0 * (q1 / q0)^(bits / 2^24) in Q16 as uint64, by one multiplication per set bit of 24."""
    one = 1 << 60
    factor = round(ratio[1] / ratio[0] * 2**40) << 20
    value = np.full(bits.shape, round(ratio[0] * 2**30), dtype=np.uint64)
    for place in range(23, -1, -1):
        factor = math.isqrt(factor * one)
        value = np.where(bits >> place & 1, value * (factor >> 30) >> 30, value)
    return value >> 14


def _crop_boxes(spec: ViewSpec, sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """int32 [N, 4] crop boxes from uint64 [N, 12] raw numbers; sizes uint64 [N, 2]."""
    height, width = sizes.T
    attempts, place = numbers[:, :ATTEMPTS], numbers[:, ATTEMPTS]
    low, high = (round(scale * 2**32) for scale in (spec.min_scale, spec.max_scale))
    scale = low + ((high - low) * (attempts >> 32) >> 32)
    area = (height * width)[:, None] * scale >> 16
    ratio = _aspect_ratio(spec.ratio, (attempts & _LOW) >> 8)
    crop_w = _isqrt(area * ratio >> 16) + (1 << 7) >> 8
    crop_h = _isqrt((area << 16) // ratio) + (1 << 7) >> 8
    fits = (crop_w >= 1) & (crop_w <= width[:, None]) & (crop_h >= 1) & (crop_h <= height[:, None])
    rows, first = np.arange(len(sizes)), fits.argmax(axis=1)
    # Where no attempt fits, the largest central crop whose aspect ratio lies within bounds.
    narrowest, widest = (round(bound * 2**16) for bound in spec.ratio)
    central_h = np.minimum(height, ((width << 16) + (narrowest >> 1)) // narrowest).clip(1)
    central_w = np.minimum(width, (height * widest + (1 << 15)) >> 16).clip(1)
    found = fits.any(axis=1)
    crop_h = np.where(found, crop_h[rows, first], central_h)
    crop_w = np.where(found, crop_w[rows, first], central_w)
    room_h, room_w = height - crop_h, width - crop_w
    top = np.where(found, (place >> 32) * (room_h + 1) >> 32, room_h // 2)
    left = np.where(found, (place & _LOW) * (room_w + 1) >> 32, room_w // 2)
    return np.stack([top, left, crop_h, crop_w], axis=1).astype(np.int32)


def _draw_mix(spec: ViewSpec, views: Views, seed: int, epoch: int) -> Views:
    """The same views with partners and CutMix boxes or MixUp weights."""
    size, per_batch = spec.input_size, spec.batch_size + _RAWS_PER_MIX
    numbers = raws(seed, MIX, epoch, per_batch * len(views)).reshape(len(views), per_batch)
    order, rest = numbers[:, : spec.batch_size], numbers[:, spec.batch_size :]
    if epoch > 0:  # as in the published code, students mix a batch with itself in reverse order
        order[:] = np.arange(spec.batch_size)[::-1]
    # Places that a smaller last batch lacks are sorted to the end, and cut off.
    order[-1, len(views.index) - (len(views) - 1) * spec.batch_size :] = 2**64 - 1
    mix_index = np.argsort(order, axis=1, kind="stable").reshape(-1)[: len(views.index)]
    if epoch > 0:  # the middle view of an odd batch, not with itself
        mix_index -= (mix_index == np.arange(len(mix_index)) % spec.batch_size) & (mix_index > 0)
    mixed = dataclasses.replace(views, mix_index=torch.from_numpy(mix_index))
    if spec.mix == "mixup":
        return dataclasses.replace(mixed, mix_lam=torch.from_numpy(_mixup_lam(rest)))
    side = _isqrt(size * size * ((1 << 32) - (rest[:, 0] >> 32)) >> 32).astype(np.int64)
    centre = np.stack([rest[:, 1] >> 32, rest[:, 1] & _LOW], axis=1) * size >> 32
    start = centre.astype(np.int64) - side[:, None] // 2
    start, end = start.clip(0, size), (start + side[:, None] // 2 * 2).clip(0, size)
    box = np.concatenate([start, end - start], axis=1).astype(np.int32)
    return dataclasses.replace(mixed, mix_box=torch.from_numpy(box))


def _mixup_lam(numbers: np.ndarray) -> np.ndarray:
    """float32 [batches]: Beta(0.8, 0.8) by Joehnk's method in Q31, from uint64 [batches, 64]."""

    def power(value: np.ndarray) -> np.ndarray:
        fourth_root = _isqrt(_isqrt(value << 31) << 31)
        return value * fourth_root >> 31

    x, y = power(numbers >> 33), power((numbers & _LOW) >> 1)
    accepted = (x + y > 0) & (x + y <= 1 << 31)
    rows, first = np.arange(len(x)), accepted.argmax(axis=1)
    x, y = x[rows, first].astype(np.float64), y[rows, first].astype(np.float64)
    return np.where(accepted.any(axis=1), x / np.maximum(x + y, 1), 0.5).astype(np.float32)


def resize_weights(
    start: torch.Tensor, length: torch.Tensor, source: int, size: int
) -> torch.Tensor:
    """Antialiased bilinear resampling as matrices, float32 [B, size, source], rows summing to 1.

    The triangle filter of PIL and torchvision (antialias=True), widened when shrinking and cut
    off at the ends of the interval [start, start + length) of `source` pixels, int [B] each.
    """
    output = torch.arange(size, device=start.device)[None, :, None]
    pixel = torch.arange(source, device=start.device)[None, None, :] - start[:, None, None]
    length = length[:, None, None]
    centre = ((2 * output + 1) * length) / (2 * size)
    support = (length / size).clamp(min=1)
    weights = (1 - (pixel + 0.5 - centre).abs() / support).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length))
    return weights / weights.sum(dim=2, keepdim=True)


def crop_resize(images: Images, box: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts out the views' boxes, resizes them (bilinear, antialiased) and mirrors some.

    Gives float32 [B, 3, S, S] in grey levels 0..255, torchvision's resized_crop(antialias=True) to
    1e-2. Whole batches at once are two matrix products, rows @ image @ columns^T; on a CPU, large
    images are resampled one by one by torch, which touches only the pixels inside a box and is
    faster there.
    """
    if not isinstance(images, list):
        height, width = images.shape[2:]
        if images.device.type != "cpu" or height * width <= _BATCHED_PIXELS:
            rows = resize_weights(box[:, 0], box[:, 2], height, size)
            columns = resize_weights(box[:, 1], box[:, 3], width, size)
            columns = torch.where(flip[:, None, None], columns.flip(1), columns)
            wide = torch.matmul(images.float(), columns.transpose(1, 2)[:, None])
            return torch.matmul(rows[:, None], wide)
    result = torch.empty(len(images), 3, size, size, device=box.device)
    boxes, flips = box.tolist(), flip.tolist()
    for view, ((top, left, height, width), mirrored) in enumerate(zip(boxes, flips, strict=True)):
        crop = images[view][None, :, top : top + height, left : left + width].float()
        resized = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        result[view] = resized.flip(2) if mirrored else resized
    return result


def normalise(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(pixels / 255 - mean) / std for grey levels 0..255; mean and std float32 [3]."""
    scale = 1 / (255 * std)
    return (pixels * scale[:, None, None]).sub_((mean / std)[:, None, None])


def mix(pixels: torch.Tensor, views: Views) -> torch.Tensor:
    """Applies the views' CutMix or MixUp to rendered crops, float [N, 3, S, S]."""
    partner = views.partner()
    if partner is None:
        return pixels
    if views.mix_box is None:
        lam = views.lam(pixels.shape[-1])[:, None, None, None]
        return lam * pixels + (1 - lam) * pixels[partner]
    if pixels.device.type == "cpu":  # touching only what is pasted takes a third of the time
        mixed = pixels.clone()
        for batch, (top, left, height, width) in enumerate(views.mix_box.tolist()):
            rows = slice(batch * views.batch_size, (batch + 1) * views.batch_size)
            box = (..., slice(top, top + height), slice(left, left + width))
            mixed[rows][box] = pixels[box][partner[rows]]
        return mixed
    # All boxes at once, as reading one from a GPU would wait for it.
    boxes = views.mix_box.repeat_interleave(views.batch_size, dim=0)[: len(pixels), :, None]
    start, length = boxes[:, :2], boxes[:, 2:]
    place = torch.arange(pixels.shape[-1], device=pixels.device)
    inside = (place >= start) & (place < start + length)  # [N, rows or columns, S]
    pasted = inside[:, None, 0, :, None] & inside[:, None, 1, None, :]
    return torch.where(pasted, pixels[partner], pixels)


def render(
    images: Images, views: Views, size: int, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Crops, resizes, flips, normalises and mixes: the network's input, float32 [N, 3, S, S].

    `images[k]`, on the views' device, is the source of view k; `mean` and `std` are float32 [3].
    """
    return mix(normalise(crop_resize(images, views.box, views.flip, size), mean, std), views)
