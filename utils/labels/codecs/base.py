"""What all codecs share: their verbs, what the reader of a label knows, and distortion."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch

from utils.cli import UserError
from utils.data.views import Mixture

Codes = tuple[torch.Tensor, ...]

TEMPERATURE = 20.0  # at which distortion is measured
BLOCK = 4096  # labels encoded at once


def distortion(
    teacher: torch.Tensor, decoded: torch.Tensor, temperature: float = TEMPERATURE
) -> float:
    """KL(teacher || decoded) / KL(teacher || uniform) of logits [N, C] at a temperature.

    0: the labels are intact; 1: decoded labels say as much as none.
    """
    lost, told = information(teacher, decoded, temperature)
    return lost / told if told > 0 else 0.0


def information(
    teacher: torch.Tensor, decoded: torch.Tensor, temperature: float
) -> tuple[float, float]:
    """KL(teacher || decoded) and KL(teacher || uniform) of logits [N, C], summed over labels."""
    expected = (teacher.double() / temperature).log_softmax(1)
    found = (decoded.double() / temperature).log_softmax(1)
    lost = (expected.exp() * (expected - found)).sum()
    told = (expected.exp() * (expected + math.log(teacher.shape[1]))).sum()
    return float(lost), float(told)


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
        parts = [self.encode(block, mixture.rows(rows)) for rows, block in blocks([logits])]
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
        rows, waiting = rows[:BLOCK], [rows[BLOCK:]]
        start += len(rows)
        return slice(start - len(rows), start), rows

    for chunk in chunks:
        waiting.append(chunk)
        while sum(map(len, waiting)) >= BLOCK:
            yield block()
    if sum(map(len, waiting)):
        yield block()


def join(chunks: list[Codes]) -> Codes:
    """The codes of several blocks of labels as one."""
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def half(values: torch.Tensor, name: str) -> torch.Tensor:
    """float16 values; raises UserError when one is too large for it."""
    if values.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"a teacher's logit exceeds the range of codec {name} (65504)")
    return values.half()
