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


def _to_bits(values: torch.Tensor, bits: int) -> np.ndarray:
    """uint8 [..., M x bits]: the lowest bits of integers [..., M], most significant bit first."""
    shifts = torch.arange(bits - 1, -1, -1, dtype=values.dtype, device=values.device)
    return (values[..., None] >> shifts & 1).flatten(-2).to(torch.uint8).cpu().numpy()


def _count_labels(payload: bytes, bits_per_label: int) -> int:
    """How many labels a payload holds; raises UserError when it is no whole number.

    `bits_per_label`, at least 8, does not include the padding of the payload to a byte.
    """
    labels = len(payload) * 8 // bits_per_label
    if -(-labels * bits_per_label // 8) != len(payload):
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
        labels = _count_labels(payload, 16 * self.num_classes)
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
        bits = _to_bits(index.flatten(), self.index_bits)
        return _bytes(kept) + np.packbits(bits).tobytes()

    def unpack(self, payload: bytes) -> Codes:
        k, bits = self.topk, self.index_bits
        labels = _count_labels(payload, k * (16 + bits))
        kept = _from_bytes(payload[: 2 * labels * k], "f2", (labels, k))
        stream = np.frombuffer(payload[2 * labels * k :], np.uint8)
        rows = np.unpackbits(stream, count=labels * k * bits).reshape(labels, k, bits)
        index = rows @ (1 << np.arange(bits - 1, -1, -1))
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
        rows = np.packbits(_to_bits(level.to(torch.uint8), self.bits), axis=1)
        return offset, step, torch.from_numpy(rows)

    def pack_codes(self, codes: Codes) -> bytes:
        return b"".join(_bytes(code) for code in codes)

    def unpack(self, payload: bytes) -> Codes:
        size = 4 + self.width
        labels = _count_labels(payload, 8 * size)
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
