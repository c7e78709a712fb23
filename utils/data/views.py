"""Views: random crops, flips and mixes of images, drawn as integers and rendered in batches.

The same functions draw and render the views that a teacher labels, that a student trains on, and
that reports show, so what was labelled is what is replayed.

docs/label-format.md says how they follow from the seed, to the bit, as part of the label format.
Source of the distributions: torchvision's RandomResizedCrop; CutMix (arXiv 1905.04899); MixUp
(arXiv 1710.09412).
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from utils.runtime import send

MIXES = ("cutmix", "mixup", "none")
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
ORDER, CROP, MIX, POOL = range(4)
_RAWS_PER_VIEW = ATTEMPTS + 2
_RAWS_PER_MIX = 64
_CHUNK = 1 << 16
_BATCHED_PIXELS = 96 * 96  # on a CPU, larger images are faster one by one (measured)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class ViewSpec:
    """What the views of a data set are drawn from.

    Attributes:
        input_size: S, the side of a rendered view in pixels.
        batch_size: views per batch (the last batch of a pass may be smaller).
        min_scale, max_scale: bounds of a crop's area as a share of the image's area.
        ratio: bounds of a crop's aspect ratio, width / height.
        mix: "cutmix" (alpha 1), "mixup" (alpha 0.8) or "none".
    """

    input_size: int
    batch_size: int = 16
    min_scale: float = 0.08
    max_scale: float = 1.0
    ratio: tuple[float, float] = RATIO
    mix: str = "cutmix"


class Mixture(NamedTuple):
    """What views show: the hard labels in each of them, which their reader knows for free.

    Attributes:
        own, partner: int64 [N], class of the view's own image and of its partner's.
        lam: float32 [N], the share of the view that shows its own image.
    """

    own: torch.Tensor
    partner: torch.Tensor
    lam: torch.Tensor

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
    """Views of one or more batches; tensors, all on one device.

    Attributes:
        index: int64 [N], which image each view shows.
        box: int32 [N, 4], the crop as (top, left, height, width) in source pixels.
        flip: bool [N], mirrored left to right.
        batch_size: views per batch; only the last batch may be smaller.
        mix_index: int64 [N] position within the batch of the partner, or None when unmixed.
        mix_box: int32 [batches, 4], CutMix: (top, left, height, width) in input pixels, or None.
        mix_lam: float32 [batches], MixUp: the own image's weight, or None.
    """

    index: torch.Tensor
    box: torch.Tensor
    flip: torch.Tensor
    batch_size: int
    mix_index: torch.Tensor | None = None
    mix_box: torch.Tensor | None = None
    mix_lam: torch.Tensor | None = None

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self.index) / self.batch_size)

    def __getitem__(self, batch: int) -> "Views":
        """The views of one batch."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        return self._batches(batch, batch + 1)

    def groups(self, batches: int) -> list["Views"]:
        """The same views, so many batches at a time; the last group may have fewer."""
        return [self._batches(start, start + batches) for start in range(0, len(self), batches)]

    def _batches(self, start: int, end: int) -> "Views":
        rows = slice(start * self.batch_size, end * self.batch_size)
        return Views(
            self.index[rows],
            self.box[rows],
            self.flip[rows],
            self.batch_size,
            None if self.mix_index is None else self.mix_index[rows],
            None if self.mix_box is None else self.mix_box[start:end],
            None if self.mix_lam is None else self.mix_lam[start:end],
        )

    @classmethod
    def joined(cls, parts: Sequence["Views"]) -> "Views":
        """The views of several parts as one; all parts but the last are of whole batches."""
        first = parts[0]
        if len(parts) == 1:
            return first
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name, value in vars(first).items()
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(first, **tensors)

    def __iter__(self) -> Iterator["Views"]:
        return (self[batch] for batch in range(len(self)))

    def to(self, device: torch.device) -> "Views":
        """The same views on another device."""
        moved = {
            name: send(value, device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    def checksum(self) -> bytes:
        """SHA-256 over all fields (little-endian), to know that views were drawn again."""
        digest = hashlib.sha256(f"{self.batch_size}".encode())
        kinds = {torch.int64: "<i8", torch.int32: "<i4", torch.bool: "u1", torch.float32: "<f4"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                digest.update(field.name.encode())
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

    Args:
        spec: what to draw.
        sizes: int [images, 2], height and width of every image in pixels.
        seed: for label sets seed + pass (epoch 0); for hard-label epochs the run's seed.
        epoch: for hard-label epochs 1 + the epoch.
    """
    order = shuffle(seed, ORDER, epoch, len(sizes))
    shuffled = np.asarray(sizes, dtype=np.int64)[order]
    numbers = raws(seed, CROP, epoch, _RAWS_PER_VIEW * len(order)).reshape(-1, _RAWS_PER_VIEW)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(order), _CHUNK)]
    boxes = [_crop_boxes(spec, shuffled[rows], numbers[rows]) for rows in chunks]
    views = Views(
        torch.from_numpy(order),
        torch.from_numpy(np.concatenate(boxes)),
        torch.from_numpy(numbers[:, -1] >> np.uint64(63) == 1),
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
        multiplied = value * np.uint64(factor >> 30) >> np.uint64(30)
        value = np.where(bits >> np.uint64(place) & np.uint64(1), multiplied, value)
    return value >> np.uint64(14)


def _crop_boxes(spec: ViewSpec, sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """int32 [N, 4] crop boxes from uint64 [N, 12] raw numbers; sizes int64 [N, 2]."""
    height, width = sizes[:, 0].astype(np.uint64), sizes[:, 1].astype(np.uint64)
    attempts = numbers[:, :ATTEMPTS]
    low, high = (np.uint64(round(scale * 2**32)) for scale in (spec.min_scale, spec.max_scale))
    scale = low + ((high - low) * (attempts >> _HALF) >> _HALF)
    area = (height * width)[:, None] * scale >> np.uint64(16)
    ratio = _aspect_ratio(spec.ratio, (attempts & _LOW) >> np.uint64(8))
    half, eight = np.uint64(1 << 7), np.uint64(8)
    crop_w = _isqrt(area * ratio >> np.uint64(16)) + half >> eight
    crop_h = _isqrt((area << np.uint64(16)) // ratio) + half >> eight
    fits = (crop_w >= 1) & (crop_w <= width[:, None]) & (crop_h >= 1) & (crop_h <= height[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(sizes))
    crop_h, crop_w = crop_h[rows, first], crop_w[rows, first]
    place = numbers[:, ATTEMPTS]
    # Where nothing fits, these differences wrap around; the central crop below replaces them.
    top = (place >> _HALF) * (height - crop_h + np.uint64(1)) >> _HALF
    left = (place & _LOW) * (width - crop_w + np.uint64(1)) >> _HALF
    boxes = np.stack([top, left, crop_h, crop_w], axis=1)
    if not (fits_any := fits.any(axis=1)).all():
        boxes[~fits_any] = _central_boxes(spec, height[~fits_any], width[~fits_any])
    return boxes.astype(np.int32)


def _central_boxes(spec: ViewSpec, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """uint64 [N, 4]: the largest central crops whose aspect ratio lies within spec.ratio."""
    narrowest, widest = (np.uint64(round(ratio * 2**16)) for ratio in spec.ratio)
    one, half = np.uint64(1 << 16), np.uint64(1 << 15)
    crop_h = np.minimum(height, ((width << np.uint64(16)) + (narrowest >> 1)) // narrowest)
    crop_w = np.minimum(width, (height * widest + half) // one)
    crop_h, crop_w = np.maximum(crop_h, np.uint64(1)), np.maximum(crop_w, np.uint64(1))
    return np.stack([(height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w], axis=1)


def _draw_mix(spec: ViewSpec, views: Views, seed: int, epoch: int) -> Views:
    """The same views with partners and CutMix boxes or MixUp weights."""
    size, per_batch = spec.input_size, spec.batch_size + _RAWS_PER_MIX
    numbers = raws(seed, MIX, epoch, per_batch * len(views)).reshape(len(views), per_batch)
    order, rest = numbers[:, : spec.batch_size], numbers[:, spec.batch_size :]
    if epoch > 0:  # as in the published code, students mix a batch with itself in reverse order
        order = np.broadcast_to(np.arange(spec.batch_size)[::-1], order.shape)
    mix_index = np.argsort(order, axis=1, kind="stable").reshape(-1)
    last = len(views.index) - (len(views) - 1) * spec.batch_size
    if last < spec.batch_size:
        tail = np.argsort(order[-1, :last], kind="stable")
        mix_index = np.concatenate([mix_index[: -spec.batch_size], tail])
    if epoch > 0:  # the middle view of an odd batch, not with itself
        mix_index -= (mix_index == np.arange(len(mix_index)) % spec.batch_size) & (mix_index > 0)
    mixed = dataclasses.replace(views, mix_index=torch.from_numpy(mix_index))
    if spec.mix == "mixup":
        return dataclasses.replace(mixed, mix_lam=torch.from_numpy(_mixup_lam(rest)))
    area = np.uint64(size * size) * (np.uint64(1 << 32) - (rest[:, 0] >> _HALF)) >> _HALF
    side = _isqrt(area).astype(np.int64)
    centre = np.stack([rest[:, 1] >> _HALF, rest[:, 1] & _LOW], axis=1) * np.uint64(size) >> _HALF
    start = centre.astype(np.int64) - side[:, None] // 2
    start, end = start.clip(0, size), (start + side[:, None] // 2 * 2).clip(0, size)
    box = np.concatenate([start, end - start], axis=1).astype(np.int32)
    return dataclasses.replace(mixed, mix_box=torch.from_numpy(box))


def _mixup_lam(numbers: np.ndarray) -> np.ndarray:
    """float32 [batches]: Beta(0.8, 0.8) by Joehnk's method in Q31, from uint64 [batches, 64]."""
    one, q31 = np.uint64(1), np.uint64(31)

    def power(value: np.ndarray) -> np.ndarray:
        fourth_root = _isqrt(_isqrt(value << q31) << q31)
        return value * fourth_root >> q31

    x, y = power(numbers >> _HALF >> one), power((numbers & _LOW) >> one)
    accepted = (x + y > 0) & (x + y <= np.uint64(1 << 31))
    rows, first = np.arange(len(x)), accepted.argmax(axis=1)
    x, y = x[rows, first].astype(np.float64), y[rows, first].astype(np.float64)
    return np.where(accepted.any(axis=1), x / np.maximum(x + y, 1), 0.5).astype(np.float32)


def resize_weights(
    start: torch.Tensor, length: torch.Tensor, reverse: torch.Tensor | None, source: int, size: int
) -> torch.Tensor:
    """Antialiased bilinear resampling as matrices: one row per output pixel, rows summing to 1.

    The triangle filter of PIL and torchvision (antialias=True), widened when shrinking and cut
    off at the ends of the interval.

    Args:
        start, length: int [B], the interval [start, start + length) of source pixels.
        reverse: bool [B], output in reverse order (a mirror), or None.
        source: number of source pixels.
        size: number of output pixels.

    Returns:
        float32 [B, size, source].
    """
    device = start.device
    output = torch.arange(size, device=device)[None, :, None]
    if reverse is not None:
        output = torch.where(reverse[:, None, None], size - 1 - output, output)
    pixel = torch.arange(source, device=device)[None, None, :] - start[:, None, None]
    length = length[:, None, None]
    centre = ((2 * output + 1) * length) / (2 * size)
    support = (length / size).clamp(min=1)
    weights = (1 - (pixel + 0.5 - centre).abs() / support).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length))
    return weights / weights.sum(dim=2, keepdim=True)


def crop_resize(
    images: torch.Tensor | list[torch.Tensor], box: torch.Tensor, flip: torch.Tensor, size: int
) -> torch.Tensor:
    """Cuts boxes out of images, resizes them (bilinear, antialiased) and mirrors some.

    rows @ image @ columns^T: two matrix products per image, whole batches at once; large images on
    a CPU one by one with torch's own resampling, which is faster there.

    Args:
        images: uint8 or float [B, 3, H, W], or a list of B tensors [3, H, W] of any sizes.
        box: int [B, 4], (top, left, height, width) in source pixels.
        flip: bool [B].
        size: S, the side of the result in pixels.

    Returns:
        float32 [B, 3, S, S] in grey levels 0..255; equals torchvision's
        resized_crop(antialias=True) and hflip to 1e-2.
    """
    if isinstance(images, list) or (
        images.device.type == "cpu" and images.shape[2] * images.shape[3] > _BATCHED_PIXELS
    ):
        return _crop_resize_each(images, box, flip, size)
    height, width = images.shape[2:]
    rows = resize_weights(box[:, 0], box[:, 2], None, height, size)
    columns = resize_weights(box[:, 1], box[:, 3], flip, width, size)
    wide = torch.matmul(images.float(), columns.transpose(1, 2)[:, None])
    return torch.matmul(rows[:, None], wide)


def _crop_resize_each(images, box: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """crop_resize image by image: touches only the pixels inside each box."""
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
    """Applies the views' CutMix or MixUp to rendered crops, float [N, 3, S, S].

    CutMix pastes the box of the partner's crop into each crop of the batch; MixUp averages. A GPU
    pastes all boxes at once, as reading them from there would wait for it.
    """
    partner = views.partner()
    if partner is None:
        return pixels
    if views.mix_box is not None and pixels.device.type == "cpu":
        mixed = pixels.clone()
        for batch, (top, left, height, width) in enumerate(views.mix_box.tolist()):
            rows = slice(batch * views.batch_size, (batch + 1) * views.batch_size)
            box = (..., slice(top, top + height), slice(left, left + width))
            mixed[rows][box] = pixels[box][partner[rows]]
        return mixed
    if views.mix_box is not None:
        box = views.mix_box.repeat_interleave(views.batch_size, dim=0)[: len(pixels)]
        place = torch.arange(pixels.shape[-1], device=pixels.device)
        inside = [
            (place >= box[:, axis, None]) & (place < (box[:, axis] + box[:, axis + 2])[:, None])
            for axis in (0, 1)
        ]
        pasted = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return torch.where(pasted, pixels[partner], pixels)
    lam = views.lam(pixels.shape[-1])[:, None, None, None]
    return lam * pixels + (1 - lam) * pixels[partner]


def render(
    images: torch.Tensor | list[torch.Tensor],
    views: Views,
    size: int,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> torch.Tensor:
    """The network's input for these views: crop, resize, flip, normalise, mix.

    Args:
        images: each view's source, `images[k]` for `views.index[k]` (see crop_resize).
        views: the views of one or more batches, on the images' device.
        size: S, the side of a view in pixels.
        mean, std: float32 [3], of the data set, on the same device.

    Returns:
        float32 [N, 3, S, S].
    """
    return mix(normalise(crop_resize(images, views.box, views.flip, size), mean, std), views)
