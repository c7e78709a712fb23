"""What all codecs share: their verbs, what the reader of a label knows, and distortion."""

import abc
import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError
from utils.data.views import Mixture

Codes = tuple[Tensor, ...]

TEMPERATURE = 20.0  # at which distortion is measured
BLOCK = 4096  # labels encoded at once
_FIT_LABELS = 20_000
_FIT_VALUES = 1 << 28  # logits kept for fitting: 1 GiB


def labels_to_fit(num_classes: int) -> int:
    """How many labels of a set a codec is fitted to, where it holds so many."""
    return min(_FIT_LABELS, _FIT_VALUES // num_classes)


def distortion(teacher: Tensor, decoded: Tensor, temperature: float = TEMPERATURE) -> float:
    """KL(teacher || decoded) / KL(teacher || uniform) of logits [N, C] at a temperature.

    0: the labels are intact; 1: decoded labels say as much as none.
    """
    lost, told = information(teacher, decoded, temperature)
    return lost / told if told > 0 else 0.0


def information(teacher: Tensor, decoded: Tensor, temperature: float) -> tuple[float, float]:
    """KL(teacher || decoded) and KL(teacher || uniform) of logits [N, C], summed over labels."""
    expected = (teacher.double() / temperature).log_softmax(1)
    stored = (decoded.double() / temperature).log_softmax(1)
    lost = (expected.exp() * (expected - stored)).sum()
    told = (expected.exp() * (expected + math.log(teacher.shape[1]))).sum()
    return float(lost), float(told)


CODECS: dict[str, type["Codec"]] = {}  # by name; a class adds itself when it is defined


class Codec(abc.ABC):
    """What all codecs share. A subclass with a name is a codec that --codec knows.

    Attributes:
        name: of the codec, in the manifest and for --codec.
        flags: the options by name, each with the keywords of argparse's add_argument. The flag of
            `bytes_per_label` is --bytes-per-label; the manifest holds the values by name, and the
            constructor takes them as keywords.
        default: None where all flags are needed; else one at most is given, and these are the
            options without any.
        fitted: whether codec.npz holds a part fitted to the labels: then there is a class method
            `fit` (see Klt), and the constructor takes the keyword `arrays`, too.
    """

    name: ClassVar[str]
    flags: ClassVar[dict[str, dict[str, Any]]] = {}
    default: ClassVar[dict[str, Any] | None] = None
    fitted: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        if cls.name in CODECS:
            raise UserError(f"{cls.__module__}: there is a codec {cls.name} already")
        CODECS[cls.name] = cls

    def __init__(self, num_classes: int, **options: Any):
        """A codec of labels with so many classes; `options` are what the manifest holds by name."""
        self.num_classes, self.options = num_classes, options

    def arrays(self) -> dict[str, np.ndarray]:
        """The fitted part, for codec.npz; empty when nothing is fitted."""
        return {}

    def fitted_bytes(self) -> int:
        """Bytes of the fitted part."""
        return sum(array.nbytes for array in self.arrays().values())

    @abc.abstractmethod
    def encode(self, logits: Tensor, mixture: Mixture) -> Codes:
        """Codes of float32 [N, C] centred logits, each tensor with one row per label."""

    def pack_codes(self, codes: Codes) -> bytes:
        """Bytes of the codes of one pass: the tensors one after the other, unless overridden."""
        arrays = (code.cpu().numpy() for code in codes)
        little = (array.astype(array.dtype.newbyteorder("<"), copy=False) for array in arrays)
        return b"".join(array.tobytes() for array in little)

    @abc.abstractmethod
    def unpack(self, payload: bytes) -> Codes:
        """Codes of all labels of a payload, on the CPU; raises UserError when it is damaged."""

    @abc.abstractmethod
    def expand(self, codes: Codes, mixture: Mixture) -> Tensor:
        """float32 [B, C] centred logits from the codes of B labels, on the codes' device."""

    def pack(self, logits: Tensor, mixture: Mixture) -> bytes:
        """Bytes of float32 [N, C] centred logits."""
        # In blocks of a fixed size, whatever the whole: the same labels then always go through the
        # same matrix products, and become the same bytes.
        blocks = [slice(start, start + BLOCK) for start in range(0, len(logits), BLOCK)]
        codes = [self.encode(logits[rows], mixture.rows(rows)) for rows in blocks]
        return self.pack_codes(tuple(map(torch.cat, zip(*codes, strict=True))))


def flag(option: str) -> str:
    """The flag of an option."""
    return "--" + option.replace("_", "-")
