"""Counts of correct predictions, kept on the device so that counting never waits for it."""

import math

import torch


def correct_top1_top5(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How many targets are the highest, and among the five highest, logits.

    Args:
        logits: float [B, C]; with fewer than five classes, top-5 counts among all of them.
        targets: int64 [B].

    Returns:
        int64 [2] on the logits' device.
    """
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    return torch.stack([ranked[:, 0].sum(), ranked.sum()])


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
