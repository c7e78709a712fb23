"""Codecs: how the logits of a label set become bytes and come back.

A codec encodes centred logits to compact codes, a row of small integers per label; packs the
codes of a pass to bytes and unpacks them again; and expands the codes of single batches to logits.
Codes are what stays in memory, so the expanded labels of a whole set never need to. The payloads
are described in the docstrings of the four codecs; all numbers are little-endian.

  fp16   every logit as half precision: 2 bytes x classes per label
  topk   the largest logits only
  quant  a few bits per logit between the smallest and the largest of its label
  klt    the difference from the class mean in a fitted basis, rounded, entropy coded
"""

import argparse
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch

from utils.cli import UserError, bounded
from utils.packing import LARGEST, pack_bits, pack_integers, unpack_bits, unpack_integers

Codes = tuple[torch.Tensor, ...]

TEMPERATURE = 20.0  # at which distortion is measured
# What klt aims at without a target: near-lossless. Settled by the study of accuracy per byte.
DEFAULT_DISTORTION = 0.01
FIT_LABELS = 20_000
_FIT_VALUES = 1 << 28  # logits kept for fitting: 1 GiB
_BLOCK = 4096  # labels encoded at once


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What the reader of a label knows for free: the hard labels in its view.

    Attributes:
        own, partner: int64 [N], class of the view's own image and of its partner's.
        lam: float32 [N], the share of the view that shows its own image.
    """

    own: torch.Tensor
    partner: torch.Tensor
    lam: torch.Tensor

    def __getitem__(self, rows) -> "Mixture":
        """The hard labels of some of the views."""
        return Mixture(self.own[rows], self.partner[rows], self.lam[rows])


def distortion(
    teacher: torch.Tensor, decoded: torch.Tensor, temperature: float = TEMPERATURE
) -> float:
    """KL(teacher || decoded) / KL(teacher || uniform) of logits [N, C] at a temperature.

    0: the labels are intact; 1: decoded labels say as much as none.
    """
    expected = (teacher.double() / temperature).log_softmax(1)
    found = (decoded.double() / temperature).log_softmax(1)
    lost = (expected.exp() * (expected - found)).sum()
    told = (expected.exp() * (expected + math.log(teacher.shape[1]))).sum()
    return float(lost / told) if told > 0 else 0.0


class Codec:
    """What all codecs share. `options` are the parameters that the manifest holds by name."""

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    fitted: ClassVar[bool] = False  # whether codec.npz holds a part fitted on the labels

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def parameters(self) -> dict[str, Any]:
        """What the manifest says of this codec."""
        return {"name": self.name, **{option: getattr(self, option) for option in self.options}}

    def arrays(self) -> dict[str, np.ndarray]:
        """The fitted part, for codec.npz; empty when nothing is fitted."""
        return {}

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        """Codes of float32 [N, C] centred logits, each tensor with one row per label."""
        raise NotImplementedError

    def pack_codes(self, codes: Codes) -> bytes:
        """Bytes of the codes of one pass; the same codes give the same bytes."""
        raise NotImplementedError

    def unpack(self, payload: bytes) -> Codes:
        """Codes of all labels of a payload, on the CPU; raises UserError when it is damaged."""
        raise NotImplementedError

    def expand(self, codes: Codes, mixture: Mixture) -> torch.Tensor:
        """float32 [B, C] centred logits from the codes of B labels, on the codes' device."""
        raise NotImplementedError

    def pack(self, logits: torch.Tensor, mixture: Mixture) -> bytes:
        """Bytes of float32 [N, C] centred logits."""
        parts = [self.encode(block, mixture[rows]) for rows, block in blocks([logits])]
        return self.pack_codes(join(parts))


def blocks(chunks: Iterable[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a stream [n, C], [m, C], ... in blocks of 4096, whatever sizes they come in.

    The same labels then always go through the same matrix products, and become the same bytes.

    Yields:
        the place of each block in the stream, and the block.
    """
    start, waiting = 0, []

    def block() -> tuple[slice, torch.Tensor]:
        nonlocal start, waiting
        rows = torch.cat(waiting)
        rows, waiting = rows[:_BLOCK], [rows[_BLOCK:]]
        start += len(rows)
        return slice(start - len(rows), start), rows

    for chunk in chunks:
        waiting.append(chunk)
        while sum(map(len, waiting)) >= _BLOCK:
            yield block()
    if sum(map(len, waiting)):
        yield block()


def join(chunks: list[Codes]) -> Codes:
    """The codes of several blocks of labels as one."""
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def _half(values: torch.Tensor, name: str) -> torch.Tensor:
    """float16 values; raises UserError when one is too large for it."""
    if values.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"a teacher's logit exceeds the range of codec {name} (65504)")
    return values.half()


def _bytes(tensor: torch.Tensor) -> bytes:
    array = tensor.cpu().contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _from_bytes(data: memoryview, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    array = np.frombuffer(data, dtype="<" + kind).reshape(shape)
    return torch.from_numpy(array.astype(kind))


def _count_labels(payload: bytes, bits_per_label: int, size_of) -> int:
    """How many labels of equal size a payload holds; raises UserError when it is no whole number.

    Args:
        bits_per_label: before rounding to whole bytes, at least 8.
        size_of: labels -> bytes.
    """
    labels = len(payload) * 8 // bits_per_label
    if size_of(labels) != len(payload):
        raise UserError("a pass of the label set is damaged: its length is impossible")
    return labels


class Fp16(Codec):
    """Every centred logit as half precision. Payload: float16 [N, C]."""

    name = "fp16"

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        return (_half(logits, self.name),)

    def pack_codes(self, codes: Codes) -> bytes:
        return _bytes(codes[0])

    def unpack(self, payload: bytes) -> Codes:
        labels = _count_labels(payload, 16 * self.num_classes, lambda n: 2 * n * self.num_classes)
        return (_from_bytes(payload, "f2", (labels, self.num_classes)),)

    def expand(self, codes: Codes, mixture: Mixture) -> torch.Tensor:
        return codes[0].float()


class TopK(Codec):
    """The k largest logits; all others get one value, the mean of what remains.

    That value follows from the kept ones because logits are centred, so it costs nothing and the
    decoded label is exactly centred. Payload: float16 [N, k] logits in the order of their classes,
    then N x k class indices of ceil(log2 C) bits, most significant bit first, padded to a byte.
    """

    name = "topk"
    options = ("topk",)

    def __init__(self, num_classes: int, topk: int):
        super().__init__(num_classes)
        if not 1 <= topk < num_classes:
            raise UserError(f"--topk {topk} must be between 1 and classes - 1 = {num_classes - 1}")
        self.topk = topk
        self.index_bits = (num_classes - 1).bit_length()

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        order = logits.sort(dim=1, descending=True, stable=True).indices
        index = order[:, : self.topk].sort(dim=1).values
        kept = _half(logits.gather(1, index), self.name)
        return kept, index.to(torch.int16 if self.num_classes <= 1 << 15 else torch.int32)

    def pack_codes(self, codes: Codes) -> bytes:
        kept, index = codes
        return _bytes(kept) + pack_bits(index.cpu().numpy().reshape(-1), self.index_bits)

    def unpack(self, payload: bytes) -> Codes:
        k, bits = self.topk, self.index_bits
        labels = _count_labels(
            payload, k * (16 + bits), lambda n: 2 * n * k + -(-n * k * bits // 8)
        )
        kept = _from_bytes(payload[: 2 * labels * k], "f2", (labels, k))
        index = unpack_bits(payload[2 * labels * k :], bits, labels * k).reshape(labels, k)
        kind = np.int16 if self.num_classes <= 1 << 15 else np.int32
        return kept, torch.from_numpy(index.astype(kind))

    def expand(self, codes: Codes, mixture: Mixture) -> torch.Tensor:
        kept = codes[0].float()
        rest = -kept.sum(1, keepdim=True) / (self.num_classes - self.topk)
        return rest.repeat(1, self.num_classes).scatter_(1, codes[1].long(), kept)


class Quant(Codec):
    """n bits per logit: equal steps from the smallest to the largest logit of each label.

    Payload: float16 [N] smallest logits, float16 [N] steps, then N rows of C x n bits, most
    significant bit first, each row padded to a byte.
    """

    name = "quant"
    options = ("bits",)

    def __init__(self, num_classes: int, bits: int):
        super().__init__(num_classes)
        if not 1 <= bits <= 8:
            raise UserError(f"--bits {bits} must be between 1 and 8")
        self.bits = bits
        self.width = -(-num_classes * bits // 8)

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        levels = (1 << self.bits) - 1
        offset = _half(logits.amin(1), self.name)
        step = _half((logits.amax(1) - offset.float()) / levels, self.name)
        divisor = torch.where(step == 0, 1, step.float())[:, None]
        level = ((logits - offset.float()[:, None]) / divisor).round().clamp(0, levels)
        return offset, step, self._rows_of_bits(level.to(torch.uint8))

    def _rows_of_bits(self, level: torch.Tensor) -> torch.Tensor:
        """uint8 [N, width] from uint8 [N, C]."""
        place = torch.arange(self.bits - 1, -1, -1, device=level.device)
        bits = (level[:, :, None] >> place & 1).flatten(1)
        return torch.from_numpy(np.packbits(bits.cpu().numpy().astype(np.uint8), axis=1))

    def pack_codes(self, codes: Codes) -> bytes:
        return b"".join(_bytes(code) for code in codes)

    def unpack(self, payload: bytes) -> Codes:
        size = 4 + self.width
        labels = _count_labels(payload, 8 * size, lambda n: n * size)
        return (
            _from_bytes(payload[: 2 * labels], "f2", (labels,)),
            _from_bytes(payload[2 * labels : 4 * labels], "f2", (labels,)),
            _from_bytes(payload[4 * labels :], "u1", (labels, self.width)),
        )

    def expand(self, codes: Codes, mixture: Mixture) -> torch.Tensor:
        offset, step, rows = codes
        place = torch.arange(7, -1, -1, device=rows.device)
        bits = (rows[:, :, None] >> place & 1).flatten(1)[:, : self.num_classes * self.bits]
        worth = 2.0 ** torch.arange(self.bits - 1, -1, -1, device=rows.device)
        level = bits.unflatten(1, (self.num_classes, self.bits)).float() @ worth
        logits = offset.float()[:, None] + step.float()[:, None] * level
        return logits - logits.mean(1, keepdim=True)


def _entropy_bits(values: torch.Tensor) -> torch.Tensor:
    """float64 [K]: bits that each column of whole numbers [N, K] needs at its own frequencies."""
    clipped = values.clamp(-2048, 2047).long()
    low = clipped.min()
    width = int(clipped.max() - low) + 1
    columns = torch.arange(clipped.shape[1], device=values.device) * width
    counts = torch.bincount((clipped - low + columns).flatten(), minlength=clipped.shape[1] * width)
    counts = counts.view(-1, width).double()
    return len(values) * math.log2(max(len(values), 1)) - torch.xlogy(counts, counts).sum(
        1
    ) / math.log(2)


def _principal(centred: torch.Tensor, rank: int = 1024) -> torch.Tensor:
    """float32 [K, C]: orthonormal directions of [N, C], the largest variance first.

    All of them up to 4096 classes, by the eigenvectors of the covariance; above that the `rank`
    leading ones by subspace iteration (arXiv 0909.4061, algorithm 4.4).
    """
    classes = centred.shape[1]
    if classes <= 4 * rank:
        scatter = torch.zeros(classes, classes, dtype=torch.float64)
        for chunk in centred.split(_BLOCK):
            scatter += chunk.double().T @ chunk.double()
        return torch.linalg.eigh(scatter).eigenvectors.flip(1).T.float().contiguous()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(classes, min(rank, len(centred)), generator=generator)
    for _ in range(4):
        start = torch.linalg.qr(centred.T @ (centred @ start)).Q
    _, _, directions = torch.linalg.svd(centred @ start, full_matrices=False)
    return (directions @ start.T).contiguous()


def _blend(class_means: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """[N, K]: lambda-weighted rows of class_means [classes, K]."""
    lam = mixture.lam[:, None]
    return lam * class_means[mixture.own] + (1 - lam) * class_means[mixture.partner]


def _class_means(values: torch.Tensor, mixture: Mixture, num_classes: int) -> torch.Tensor:
    """float32 [num_classes, K]: class means whose blends fit values [N, K] best.

    Least squares, shrunk as if every class had one label more, a label of the overall mean;
    by conjugate gradients, preconditioned with the diagonal.
    """

    def gather(rows: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(num_classes, rows.shape[1])
        total.index_add_(0, mixture.own, rows * mixture.lam[:, None])
        return total.index_add_(0, mixture.partner, rows * (1 - mixture.lam)[:, None])

    weight = torch.ones(num_classes).index_add_(0, mixture.own, mixture.lam**2)
    weight = weight.index_add_(0, mixture.partner, (1 - mixture.lam) ** 2)[:, None]
    means = torch.zeros(num_classes, values.shape[1])
    residual = gather(values)
    direction = residual / weight
    energy = start = (residual * direction).sum()
    for _ in range(20):
        if energy <= 1e-8 * start:
            break
        image = gather(_blend(direction, mixture)) + direction
        stride = energy / (direction * image).sum().clamp(min=1e-30)
        means += stride * direction
        residual -= stride * image
        scaled = residual / weight
        before, energy = energy, (residual * scaled).sum()
        direction = scaled + energy / before.clamp(min=1e-30) * direction
    return means


_PARTS = {
    "step": "<f8",
    "basis_step": "<f8",
    "mean": "<f2",
    "deviation": "<f4",
    "basis": "u1",
    "class_means": "u1",
}


def join_fitted(parts: dict[str, np.ndarray]) -> np.ndarray:
    """uint8: the parts of `_PARTS` in that order, after their lengths in bytes as six uint32.

    One array, because each takes some 250 bytes more in an .npz archive.
    """
    content = [parts[name].astype(kind).tobytes() for name, kind in _PARTS.items()]
    lengths = np.array([len(part) for part in content], dtype="<u4").tobytes()
    return np.frombuffer(b"".join([lengths, *content]), dtype=np.uint8)


def split_fitted(joined: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of join_fitted."""
    lengths = joined[: 4 * len(_PARTS)].view("<u4").tolist()
    ends = 4 * len(_PARTS) + np.cumsum(lengths)
    return {
        name: joined[end - length : end].copy().view(kind)
        for (name, kind), length, end in zip(_PARTS.items(), lengths, ends.tolist(), strict=True)
    }


class Klt(Codec):
    """The label minus what its class mean predicts, in the basis where logits decorrelate.

    Karhunen-Loeve transform: the basis are the principal directions of centred logits, and one
    quantiser step for all components spends bits where they reduce squared error most, which at
    high temperature is KL. A coefficient is coded as round((coefficient - prediction) / step);
    the prediction is the lambda-weighted mean of the classes in the view, in the components where
    that pays. Payload: `pack_integers` of the codes [N, K].

    codec.npz holds one array of bytes, `fitted`, with the parts of `_PARTS` one after the other:
    step; basis_step; mean [C]; deviation [K]; basis, pack_integers of [C, K], times basis_step /
    deviation the directions; class_means, pack_integers of [classes, K], times step / 4 the
    coefficients of the class means.
    """

    name = "klt"
    fitted = True

    def __init__(self, num_classes: int, target: dict[str, float], arrays: dict[str, np.ndarray]):
        """A fitted codec.

        Args:
            num_classes: C.
            target: what it was fitted to, {"bytes_per_label": N} or {"distortion": X}.
            arrays: the content of codec.npz.
        """
        super().__init__(num_classes)
        self.target, self._arrays = target, arrays
        parts = split_fitted(arrays["fitted"])
        self.step = parts["step"].item()
        deviation = torch.from_numpy(parts["deviation"].astype(np.float32))
        components = len(deviation)
        rows = unpack_integers(parts["basis"].tobytes(), components)
        basis = torch.from_numpy(rows.T.astype(np.float32)) * parts["basis_step"].item()
        basis = basis / deviation[:, None]
        self.basis = basis - basis.mean(1, keepdim=True)
        mean = torch.from_numpy(parts["mean"].astype(np.float32))
        self.mean = mean - mean.mean()
        whole = unpack_integers(parts["class_means"].tobytes(), components)
        self.class_means = torch.from_numpy(whole.astype(np.float32)) * (self.step / 4)
        # The rounded basis is not quite orthonormal: least squares, not the transpose, inverts it.
        rows = self.basis.double()
        gram = rows @ rows.T
        gram += 1e-9 * gram.trace() * torch.eye(components)
        self.projection = torch.linalg.solve(gram, rows).T.float().contiguous()
        self._device = torch.device("cpu")

    def parameters(self) -> dict[str, Any]:
        return {"name": self.name, **self.target}

    def arrays(self) -> dict[str, np.ndarray]:
        return self._arrays

    def to(self, device: torch.device) -> "Klt":
        """Moves the fitted part to a device."""
        if device != self._device:
            for name in ("basis", "mean", "class_means", "projection"):
                setattr(self, name, getattr(self, name).to(device))
            self._device = device
        return self

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        self.to(logits.device)
        coefficients = (logits - self.mean) @ self.projection
        codes = ((coefficients - _blend(self.class_means, mixture)) / self.step).round()
        if codes.numel() and codes.abs().max() > LARGEST:
            raise UserError(
                "a teacher's logits are thousands of times larger than those that codec klt was "
                "fitted on; a coarser --distortion or --codec fp16 can store them"
            )
        return (codes.short(),)

    def pack_codes(self, codes: Codes) -> bytes:
        return pack_integers(torch.cat(codes, 1).cpu().numpy())

    def unpack(self, payload: bytes) -> Codes:
        codes = torch.from_numpy(unpack_integers(payload, len(self.basis)))
        wide = (codes.abs().amax(0) > 127).nonzero() if len(codes) else codes.new_zeros(0, 1)
        split = int(wide.max()) + 1 if len(wide) else 0
        return codes[:, :split].contiguous(), codes[:, split:].to(torch.int8).contiguous()

    def expand(self, codes: Codes, mixture: Mixture) -> torch.Tensor:
        self.to(codes[0].device)
        coefficients = torch.cat([code.float() for code in codes], 1) * self.step
        return torch.addmm(self.mean, coefficients + _blend(self.class_means, mixture), self.basis)

    @classmethod
    def fit(
        cls,
        chunks: Iterable[tuple[torch.Tensor, Mixture]],
        num_classes: int,
        labels: int,
        bytes_per_label: float | None = None,
        distortion: float | None = None,
        pass_labels: int | None = None,
    ) -> "Klt":
        """Fits basis, class means and step to the first labels of a stream.

        Of a sample of at most 20,000 labels, four fifths give the basis and the means and the
        fifth label each is held back, to find the step that meets the target on labels that were
        not fitted. Where the sample is the whole set, all of it serves both ends.

        Args:
            chunks: centred logits float32 [n, C] and their mixtures; read as far as needed.
            num_classes: C.
            labels: how many labels the fitted part will serve; its bytes count pro rata.
            bytes_per_label: budget, fitted part included.
            distortion: target at temperature 20; by default DEFAULT_DISTORTION.
            pass_labels: labels packed together (default: as many as there are).

        Raises:
            UserError: no step is coarse enough for the budget.
        """
        target = {"bytes_per_label": bytes_per_label}
        if bytes_per_label is None:
            target = {"distortion": DEFAULT_DISTORTION if distortion is None else distortion}
        logits, mixture = _sample(chunks, min(labels, FIT_LABELS, _FIT_VALUES // num_classes))
        return _Fit(logits, mixture, num_classes, labels, pass_labels).search(target)


def _sample(chunks: Iterable, count: int) -> tuple[torch.Tensor, Mixture]:
    """The first `count` labels of a stream, or all when there are fewer."""
    parts, found = [], 0
    for logits, mixture in chunks:
        parts.append((logits.cpu(), mixture.own.cpu(), mixture.partner.cpu(), mixture.lam.cpu()))
        found += len(logits)
        if found >= count:
            break
    logits, own, partner, lam = (torch.cat(part)[:count] for part in zip(*parts, strict=True))
    return logits, Mixture(own, partner, lam)


class _Fit:
    """The statistics of a sample of labels, and the klt codec for any step."""

    def __init__(self, logits, mixture, num_classes, labels, pass_labels):
        self.num_classes, self.labels = num_classes, labels
        rows = torch.arange(len(logits))
        train, probe = rows, rows[:: -(-len(rows) // 8192)]
        if len(logits) < labels and len(logits) >= 5:
            train, probe = rows[rows % 5 != 4], rows[rows % 5 == 4]
        self.pass_labels = min(pass_labels or labels, len(probe))
        self.probe, self.probe_mixture = logits[probe], mixture[probe]
        self.mean = _half(logits[train].mean(0), Klt.name)
        centred = logits[train] - self.mean.float()
        self.directions = _principal(centred)
        values = centred @ self.directions.T
        self.deviation = values.square().mean(0).sqrt().clamp(min=1e-6)
        self.class_means = _class_means(values, mixture[train], num_classes)
        self.values = (self.probe - self.mean.float()) @ self.directions.T

    def search(self, target: dict[str, float]) -> Klt:
        """The codec whose step meets the target, with a percent to spare at most.

        Size and distortion are close to powers of the step: secants in logarithms, kept inside the
        bracket found so far.
        """
        (name, wanted), *_ = target.items()
        measure = {"bytes_per_label": self.bytes_per_label, "distortion": self.distortion}[name]
        # Labels that are all the same need no components: any step will do.
        finest = max(float(self.values.abs().max()), 1e-3) * 4 / LARGEST
        low, high = math.log(finest), math.log(max(float(self.deviation.max()) * 16, 2 * finest))
        energy = float(self.probe.square().mean())
        place = min(max(math.log(energy + 1e-30) / 2, low), high)
        slope = -1.5 if name == "bytes_per_label" else 1.5
        best = before = None
        for _ in range(40):
            codec = self.codec(math.exp(place), target)
            excess = math.log(max(measure(codec), 1e-12) / wanted)
            if excess <= 0:
                best = codec
            if -0.012 < excess <= 0 or high - low < 0.005:
                break
            low, high = (low, place) if excess * slope > 0 else (place, high)
            if before and 0.3 < (excess - before[1]) / (place - before[0]) / slope < 3:
                slope = (excess - before[1]) / (place - before[0])
            before = place, excess
            place -= (excess + 0.006) / slope
            if not low < place < high:
                place = (low + high) / 2
        if best is None:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {wanted:g} cannot be met by codec klt for {self.labels} labels"
            )
        return best

    def bytes_per_label(self, codec: Klt) -> float:
        """Bytes per label of the held-back labels, the fitted part included pro rata."""
        parts = zip(
            self.probe.split(self.pass_labels),
            *(part.split(self.pass_labels) for part in vars(self.probe_mixture).values()),
            strict=True,
        )
        used = sum(len(codec.pack(logits, Mixture(*mixed))) for logits, *mixed in parts)
        return used / len(self.probe) + fitted_bytes(codec) / self.labels

    def distortion(self, codec: Klt) -> float:
        """Distortion of the held-back labels."""
        decoded = codec.expand(codec.encode(self.probe, self.probe_mixture), self.probe_mixture)
        return distortion(self.probe, decoded)

    def codec(self, step: float, target: dict[str, float]) -> Klt:
        """The codec of one step; components, and class means in them, only where they pay.

        Squared error is weighed against bits at the slope of a uniform quantiser at high rate,
        d(error) / d(bit) = 2 ln 2 step^2 / 12. The same slope gives the precision of the basis,
        whose bits serve all labels: with rows scaled to a label's deviation, step / sqrt(labels).
        """
        price = 2 * math.log(2) * step**2 / 12
        share = self.labels / len(self.probe)
        scaled = self.directions * self.deviation[:, None]
        basis_step = max(step / math.sqrt(self.labels), float(scaled.abs().max()) / LARGEST)
        basis = (scaled / basis_step).round()
        means = (self.class_means / (step / 4)).round().clamp(-LARGEST, LARGEST)
        predicted = _blend(means * (step / 4), self.probe_mixture)

        def cost(values: torch.Tensor) -> torch.Tensor:
            codes = (values / step).round()
            error = (values - codes * step).double().square().sum(0)
            return share * (error + price * _entropy_bits(codes))

        plain = cost(self.values)
        helped = cost(self.values - predicted) + price * _entropy_bits(means)
        means = means * (helped < plain)
        coded = torch.minimum(plain, helped) + price * _entropy_bits(basis.T)
        dropped = share * self.values.double().square().sum(0)
        kept = (coded < dropped) & basis.any(1)
        parts = {
            "step": np.array([step]),
            "basis_step": np.array([basis_step]),
            "mean": self.mean.numpy(),
            "deviation": self.deviation[kept].numpy(),
            "basis": packed(basis[kept].T),
            "class_means": packed(means[:, kept]),
        }
        return Klt(self.num_classes, target, {"fitted": join_fitted(parts)})


def packed(whole: torch.Tensor) -> np.ndarray:
    """uint8: pack_integers of whole numbers [N, K]."""
    return np.frombuffer(pack_integers(whole.numpy().astype(np.int16)), dtype=np.uint8)


def fitted_bytes(codec: Codec) -> int:
    """Bytes of codec.npz: its arrays and some 256 bytes of naming for each."""
    return sum(array.nbytes + 256 for array in codec.arrays().values())


CODECS = {codec.name: codec for codec in (Fp16, TopK, Quant, Klt)}


def from_manifest(parameters: dict, num_classes: int, arrays: dict[str, np.ndarray]) -> Codec:
    """The codec that a manifest's "codec" entry and the arrays of codec.npz describe."""
    name = parameters.get("name")
    if name not in CODECS:
        raise UserError(f"codec {name!r} is unknown to this version (known: {', '.join(CODECS)})")
    options = {key: value for key, value in parameters.items() if key != "name"}
    if not CODECS[name].fitted:
        return CODECS[name](num_classes, **options)
    if not arrays:
        raise UserError(f"codec.npz, the fitted part of codec {name}, is missing")
    return CODECS[name](num_classes, options, arrays)


def needs_fit(parameters: dict) -> bool:
    """Whether the codec of a manifest's "codec" entry has a part that is fitted to the labels."""
    return parameters["name"] in CODECS and CODECS[parameters["name"]].fitted


def fit(
    parameters: dict,
    chunks: Iterable[tuple[torch.Tensor, Mixture]],
    num_classes: int,
    labels: int,
    pass_labels: int,
) -> Codec:
    """The codec of a manifest's "codec" entry, fitted to the first labels of a stream (Klt.fit)."""
    options = {key: value for key, value in parameters.items() if key != "name"}
    return CODECS[parameters["name"]].fit(
        chunks, num_classes, labels, pass_labels=pass_labels, **options
    )


def add_arguments(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Adds --codec and the flags that belong to one codec each."""
    required = {"required": True} if default is None else {"default": default}
    parser.add_argument("--codec", choices=sorted(CODECS), help="how labels are stored", **required)
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--bytes-per-label",
        type=bounded(float, 0.1),
        metavar="N",
        help="klt: budget for the logits, basis and class means included",
    )
    target.add_argument(
        "--distortion",
        type=bounded(float, 1e-6, 1),
        metavar="X",
        help="klt: share of the label's information lost at temperature 20 "
        f"(default without a budget: {DEFAULT_DISTORTION})",
    )
    parser.add_argument("--topk", type=bounded(int, 1), metavar="K", help="topk: logits kept")
    parser.add_argument(
        "--bits", type=bounded(int, 1, 8), metavar="N", help="quant: bits per class"
    )


def from_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The manifest's "codec" entry that the flags ask for; raises UserError when they clash."""
    owners = {"topk": "topk", "bits": "quant", "bytes_per_label": "klt", "distortion": "klt"}
    given = {name: getattr(args, name) for name in owners if getattr(args, name) is not None}
    for name in given:
        if owners[name] != args.codec:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} belongs to codec {owners[name]}, not to {args.codec}")
    for name in CODECS[args.codec].options:
        if name not in given:
            raise UserError(f"--codec {args.codec} needs --{name}")
    if args.codec == "klt" and not given:
        given = {"distortion": DEFAULT_DISTORTION}
    return {"name": args.codec, **given}
