"""Counts of correct predictions, kept on the device so that counting never waits for it."""

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
