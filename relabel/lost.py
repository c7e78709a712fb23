"""What a codec lost: the labels of a set beside the same labels in another codec."""

from collections.abc import Iterable, Sequence

import torch

from utils.cli import UserError
from utils.labels import LabelSet
from utils.labels.codecs.base import information

_ROWS = 1024  # labels compared at once, in double precision


def compare(
    labels: LabelSet, reference: LabelSet, passes: Iterable[int], temperatures: Sequence[float]
) -> tuple[list[float], float]:
    """Distortion at each temperature, and the share of labels with the same first class.

    See utils.labels.codecs.base.distortion. Two passes are in memory at a time.

    Args:
        labels: the set.
        reference: the labels that it was made from.
        passes: which to compare.
        temperatures: those of the distortions.

    Raises:
        UserError: the sets label different views.
    """
    sums = torch.zeros(len(temperatures), 2, dtype=torch.float64)
    agree = count = 0
    for pass_index in passes:
        stored, expected = labels.whole_pass(pass_index), reference.whole_pass(pass_index)
        if stored.views.checksum() != expected.views.checksum():
            raise UserError(
                f"views of pass {pass_index} in {labels.path} differ from those in {reference.path}"
            )
        agree += int((stored.logits.argmax(1) == expected.logits.argmax(1)).sum())
        count += len(stored.logits)
        pairs = zip(stored.logits.split(_ROWS), expected.logits.split(_ROWS), strict=True)
        for decoded, teacher in pairs:
            told = [information(teacher, decoded, t) for t in temperatures]
            sums += torch.tensor(told, dtype=torch.float64)
    missing, told = sums.unbind(1)
    # As in `distortion`, labels that say nothing have nothing to lose.
    return torch.where(told > 0, missing / told, 0).tolist(), agree / count
