"""Codecs: how the logits of a label set become bytes and come back.

A codec packs the centred logits of one pass to bytes, unpacks the bytes to compact codes that stay
in memory, and expands the codes of single batches to logits, so that the expanded labels of a
whole set never need to be in memory at once.
"""

import dataclasses

import numpy as np
import torch

from utils.cli import UserError

Codes = tuple[torch.Tensor, ...]


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


class Fp16:
    """Every centred logit as half precision: 2 bytes x classes per label."""

    name = "fp16"

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def parameters(self) -> dict:
        """What the manifest says of this codec."""
        return {"name": self.name}

    def arrays(self) -> dict[str, np.ndarray]:
        """The fitted part, for codec.npz; empty when nothing is fitted."""
        return {}

    def pack(self, logits: torch.Tensor, mixture: Mixture) -> bytes:
        """Bytes of float32 [N, C] centred logits."""
        if logits.abs().max() > torch.finfo(torch.float16).max:
            raise UserError("a teacher's logit exceeds the range of codec fp16 (65504)")
        return logits.numpy().astype("<f2").tobytes()

    def unpack(self, payload: bytes) -> Codes:
        """Codes of all labels of a payload, each tensor with one row per label."""
        values = np.frombuffer(payload, dtype="<f2").reshape(-1, self.num_classes)
        return (torch.from_numpy(values.astype(np.float16)),)

    def expand(self, codes: Codes, mixture: Mixture) -> torch.Tensor:
        """float32 [B, C] centred logits from the codes of B labels, on the codes' device."""
        return codes[0].float()


CODECS = {codec.name: codec for codec in (Fp16,)}


def from_manifest(parameters: dict, num_classes: int, arrays: dict[str, np.ndarray]) -> Fp16:
    """The codec that a manifest's "codec" entry and the arrays of codec.npz describe."""
    name = parameters.get("name")
    if name not in CODECS:
        raise UserError(f"codec {name!r} is unknown to this version (known: {', '.join(CODECS)})")
    return CODECS[name](num_classes)
