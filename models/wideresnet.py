"""WideResNet-28-10 for 32 and 64 pixels (Zagoruyko and Komodakis 2016)."""

from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS_PER_STAGE = 4
STAGE_CHANNELS = (160, 320, 640)


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice; a 1x1 shortcut only where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.projection: nn.Module | None = None
        if in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        active = F.relu(self.norm1(features))
        residual = self.conv2(F.relu(self.norm2(self.conv1(active))))
        shortcut = features if self.projection is None else self.projection(active)
        return residual + shortcut


def wide_resnet_28_10(num_classes: int) -> nn.Sequential:
    """Return WideResNet-28-10 without dropout: [B, 3, S, S] -> [B, num_classes]."""
    in_channels = 16
    layers: list[nn.Module] = [nn.Conv2d(3, in_channels, kernel_size=3, padding=1, bias=False)]
    for stage, channels in enumerate(STAGE_CHANNELS):
        for block in range(BLOCKS_PER_STAGE):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(PreActivationBlock(in_channels, channels, stride))
            in_channels = channels
    layers += [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(in_channels, num_classes))
