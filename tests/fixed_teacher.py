"""A teacher for --teacher that needs no weights: it reads the class off an image's redness."""

import torch
from torch import nn

_MEAN, _STD = 0.5071, 0.2675  # CIFAR-100's red channel


class ByRedness(nn.Module):
    """Class c of C is the image whose mean red is nearest to c / C of the full range."""

    def __init__(self, num_classes: int):
        super().__init__()
        red = torch.arange(num_classes) / num_classes
        self.expected = nn.Parameter((red - _MEAN) / _STD)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] -> [B, C]."""
        return -10 * (pixels[:, 0].mean((1, 2))[:, None] - self.expected).abs()


def factory(num_classes: int) -> nn.Module:
    """For package.module:factory."""
    return ByRedness(num_classes)
