"""The codecs that look at one label at a time: fp16, topk and quant."""

from typing import ClassVar

import numpy as np
import torch

from utils.cli import UserError, bounded
from utils.data.views import Mixture
from utils.labels.codecs.base import Codec, Codes


def _half(values: torch.Tensor, name: str) -> torch.Tensor:
    """float16 values; raises UserError when one is too large for it."""
    if values.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"a teacher's logit exceeds the range of codec {name} (65504)")
    return values.half()


def _split(payload: bytes, bits_per_label: int, *widths: int) -> list[torch.Tensor]:
    """A payload's float16 [N, width], one after the other, and uint8 [...], the bytes after them.

    Raises UserError when a whole number of labels, padded to a byte, does not fill it.
    """
    labels = len(payload) * 8 // bits_per_label
    if -(-labels * bits_per_label // 8) != len(payload):
        raise UserError("a pass of the label set is damaged: its length is impossible")
    ends = 2 * labels * np.cumsum(widths)
    *halves, rest = np.split(np.frombuffer(payload, np.uint8).copy(), ends)
    tensors = [torch.from_numpy(half.view("<f2").astype("f2")) for half in halves]
    shaped = [half.view(labels, width) for half, width in zip(tensors, widths, strict=True)]
    return [*shaped, torch.from_numpy(rest)]


def _to_bits(values: torch.Tensor, bits: int) -> np.ndarray:
    """uint8 [..., M x bits]: the lowest bits of integers [..., M], most significant bit first."""
    shifts = torch.arange(bits - 1, -1, -1, dtype=values.dtype, device=values.device)
    return (values[..., None] >> shifts & 1).flatten(-2).to(torch.uint8).cpu().numpy()


def _from_bits(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 [N, M]: the numbers, below 2^24, whose bits are a stream [N, M x bits]."""
    worth = 2.0 ** torch.arange(bits - 1, -1, -1, device=stream.device)
    return stream.unflatten(1, (-1, bits)).float() @ worth


class Fp16(Codec):
    """Every centred logit as half precision. Payload: float16 [N, C]."""

    name = "fp16"

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        return (_half(logits, self.name),)

    def unpack(self, payload: bytes) -> Codes:
        return (_split(payload, 16 * self.num_classes, self.num_classes)[0],)

    def expand(self, codes: Codes, mixture: Mixture) -> torch.Tensor:
        return codes[0].float()


class TopK(Codec):
    """The k largest logits; all others get one value, the mean of what remains.

    That value follows from the kept ones because logits are centred, so it costs nothing and the
    decoded label is exactly centred. Payload: float16 [N, k] logits in the order of their classes,
    then N x k class indices of ceil(log2 C) bits.
    """

    name = "topk"
    flags: ClassVar = {"topk": {"type": bounded(int, 1), "metavar": "K", "help": "logits kept"}}

    def __init__(self, num_classes: int, topk: int):
        super().__init__(num_classes, topk=topk)
        if not 1 <= topk < num_classes:
            raise UserError(f"--topk {topk} must be between 1 and classes - 1 = {num_classes - 1}")
        self.topk = topk
        self.index_bits = (num_classes - 1).bit_length()
        self.index_type = torch.int16 if num_classes <= 1 << 15 else torch.int32

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        order = logits.sort(dim=1, descending=True, stable=True).indices
        index = order[:, : self.topk].sort(dim=1).values
        return _half(logits.gather(1, index), self.name), index.to(self.index_type)

    def pack_codes(self, codes: Codes) -> bytes:
        kept, index = codes
        bits = np.packbits(_to_bits(index.flatten(), self.index_bits))
        return super().pack_codes((kept,)) + bits.tobytes()

    def unpack(self, payload: bytes) -> Codes:
        kept, packed = _split(payload, self.topk * (16 + self.index_bits), self.topk)
        bits = np.unpackbits(packed, count=kept.numel() * self.index_bits)
        stream = torch.from_numpy(bits).view(len(kept), self.topk * self.index_bits)
        return kept, _from_bits(stream, self.index_bits).to(self.index_type)

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
        self.bits = bits

    def encode(self, logits: torch.Tensor, mixture: Mixture) -> Codes:
        levels = (1 << self.bits) - 1
        offset = _half(logits.amin(1, keepdim=True), self.name)
        step = _half((logits.amax(1, keepdim=True) - offset.float()) / levels, self.name)
        divisor = torch.where(step == 0, 1, step.float())
        level = ((logits - offset.float()) / divisor).round().clamp(0, levels)
        rows = np.packbits(_to_bits(level.to(torch.uint8), self.bits), axis=1)
        return offset, step, torch.from_numpy(rows)

    def unpack(self, payload: bytes) -> Codes:
        row = -(-self.num_classes * self.bits // 8)
        offset, step, levels = _split(payload, 8 * (4 + row), 1, 1)
        return offset, step, levels.view(-1, row)

    def expand(self, codes: Codes, mixture: Mixture) -> torch.Tensor:
        offset, step, rows = codes
        shifts = torch.arange(7, -1, -1, device=rows.device)
        stream = (rows[:, :, None] >> shifts & 1).flatten(1)[:, : self.num_classes * self.bits]
        logits = offset.float() + step.float() * _from_bits(stream, self.bits)
        return logits - logits.mean(1, keepdim=True)
