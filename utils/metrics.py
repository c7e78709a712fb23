"""Counts of correct predictions, kept on the device so that counting never waits for it."""

import math

import torch
import torch.nn.functional as F


def top_classes(logits: torch.Tensor) -> torch.Tensor:
    """The classes with the highest logits, int64 [B, 5], of float [B, C]; all where C is less.

    Accuracies go by this order: which of equal logits comes first is not the same for argmax.
    """
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def hits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How many targets have the highest of float [B, C] logits, the second highest, ...: int64 [5].

    The first is what top-1 counts, all together what top-5 counts.
    """
    counts = (top_classes(logits) == targets[:, None]).sum(0)
    missing = 5 - len(counts)  # with fewer classes
    return F.pad(counts, (0, missing)) if missing else counts


def near_chance(correct: int, count: int, num_classes: int) -> bool:
    """Whether so few of `count` predictions are correct that the class order must be in doubt.

    Below four standard deviations above the expected hits of guessing, or below five times those
    where that is more and still at most a quarter; never halfway from guessing to all: with few
    classes or images that is sooner.
    """
    chance = 1 / num_classes
    spread = 4 * math.sqrt(count * chance * (1 - chance))
    limit = max(count * chance + spread, count * min(5 * chance, 0.25))
    return correct < min(limit, count * (1 + chance) / 2)
