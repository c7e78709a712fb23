"""ConvNet, the plain network of dataset condensation."""

from torch import nn

LARGEST_FINAL_MAP = 4


def convnet(
    num_classes: int, input_size: int, width: int, instance_norm: bool = False
) -> nn.Sequential:
    """Return the ConvNet: [B, 3, input_size, input_size] -> [B, num_classes].

    Blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling, as many as bring the map to at
    most 4 pixels (3 at 32, 4 at 64, 6 at 224), then one linear layer. The norm is BatchNorm, or
    InstanceNorm as in Zhao et al. 2021.
    """
    layers: list[nn.Module] = []
    channels, size = 3, input_size
    while size > LARGEST_FINAL_MAP:
        layers += [
            nn.Conv2d(channels, width, kernel_size=3, padding=1),
            nn.GroupNorm(width, width) if instance_norm else nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        ]
        channels, size = width, size // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size**2, num_classes))
