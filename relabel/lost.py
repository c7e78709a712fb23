"""What a codec lost: the labels of a set beside the same labels in another codec."""

from collections.abc import Iterable, Sequence

import torch

from utils.cli import UserError
from utils.labels import LabelSet
from utils.labels.codecs.base import information


def compare(
    labels: LabelSet, reference: LabelSet, passes: Iterable[int], temperatures: Sequence[float]
) -> tuple[list[float], float]:
    """Distortion at each temperature, and the share of labels with the same first class.

    See utils.labels.codecs.base.distortion. A chunk of labels is expanded at a time.

    Args:
        labels: the set.
        reference: the labels that it was made from.
        passes: numbers of the passes to compare.
        temperatures: those of the distortions.

    Raises:
        UserError: the sets label different views.
    """
    sums = torch.zeros(len(temperatures), 2, dtype=torch.float64)
    agree = count = 0
    for number in passes:
        (views, codes), (other_views, other_codes) = (
            each.load_pass(number) for each in (labels, reference)
        )
        if views.checksum() != other_views.checksum():
            raise UserError(
                f"views of pass {number} in {labels.path} differ from those in {reference.path}"
            )
        pairs = zip(
            labels.expanded(views, codes), reference.expanded(views, other_codes), strict=True
        )
        for (found, _), (expected, _) in pairs:
            agree += int((found.argmax(1) == expected.argmax(1)).sum())
            count += len(found)
            told = [information(expected, found, t) for t in temperatures]
            sums += torch.tensor(told, dtype=torch.float64)
    missing, told = sums.unbind(1)
    # As in `distortion`, labels that say nothing have nothing to lose.
    return torch.where(told > 0, missing / told, 0).tolist(), agree / count
