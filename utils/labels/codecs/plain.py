"""The codecs that look at one label at a time: fp16, topk and quant."""

from typing import ClassVar

import numpy as np
import torch

from utils.cli import UserError, bounded
from utils.data.views import Mixture
from utils.labels.codecs.base import Codec, Codes, half


def _bytes(tensor: torch.Tensor) -> bytes:
    array = tensor.cpu().contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _from_bytes(data: memoryview, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    array = np.frombuffer(data, dtype="<" + kind).reshape(shape)
    return torch.from_numpy(array.astype(kind))


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Non-negative integers [M] of `bits` bits each as one bit stream, padded to a byte."""
    shifts = np.arange(bits - 1, -1, -1)
    parts = []
    for start in range(0, len(values), 1 << 16):
        chunk = values[start : start + (1 << 16), None].astype(np.int64)
        parts.append(np.packbits((chunk >> shifts & 1).astype(np.uint8)).tobytes())
    return b"".join(parts)


def unpack_bits(data: bytes, bits: int, count: int) -> np.ndarray:
    """int64 [count]: the inverse of pack_bits."""
    stream = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    return stream @ (1 << np.arange(bits - 1, -1, -1))


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
        return (half(logits, self.name),)

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
    flags: ClassVar = {"topk": {"type": bounded(int, 1), "metavar": "K", "help": "logits kept"}}

    def __init__(self, num_classes: int, topk: int):
        super().__init__(num_classes, topk=topk)
        if not 1 <= topk < num_classes:
            raise UserError(f"--topk {topk} must be between 1 and classes - 1 = {num_classes - 1}")
        self.topk = topk
        self.index_bits = (num_classes - 1).bit_length()

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        order = logits.sort(dim=1, descending=True, stable=True).indices
        index = order[:, : self.topk].sort(dim=1).values
        kept = half(logits.gather(1, index), self.name)
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
    flags: ClassVar = {
        "bits": {"type": bounded(int, 1, 8), "metavar": "N", "help": "bits per class"}
    }

    def __init__(self, num_classes: int, bits: int):
        super().__init__(num_classes, bits=bits)
        if not 1 <= bits <= 8:
            raise UserError(f"--bits {bits} must be between 1 and 8")
        self.bits = bits
        self.width = -(-num_classes * bits // 8)

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        levels = (1 << self.bits) - 1
        offset = half(logits.amin(1), self.name)
        step = half((logits.amax(1) - offset.float()) / levels, self.name)
        divisor = torch.where(step == 0, 1, step.float())[:, None]
        level = ((logits - offset.float()[:, None]) / divisor).round().clamp(0, levels)
        return offset, step, self._rows_of_bits(level.to(torch.uint8))

    def _rows_of_bits(self, level: torch.Tensor) -> torch.Tensor:
        """uint8 [N, width] from uint8 [N, C]."""
        shifts = torch.arange(self.bits - 1, -1, -1, device=level.device)
        bits = (level[:, :, None] >> shifts & 1).flatten(1)
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
        shifts = torch.arange(7, -1, -1, device=rows.device)
        bits = (rows[:, :, None] >> shifts & 1).flatten(1)[:, : self.num_classes * self.bits]
        worth = 2.0 ** torch.arange(self.bits - 1, -1, -1, device=rows.device)
        level = bits.unflatten(1, (self.num_classes, self.bits)).float() @ worth
        logits = offset.float()[:, None] + step.float()[:, None] * level
        return logits - logits.mean(1, keepdim=True)
