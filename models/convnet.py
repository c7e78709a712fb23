"""ConvNet, the plain network of dataset condensation."""

from torch import nn

LARGEST_FINAL_MAP = 4


def convnet_depth(input_size: int) -> int:
    """Return how many halvings bring `input_size` pixels to at most 4: 3 at 32, 4 at 64, 6 at 224.

    Raises ValueError when there is nothing to halve.
    """
    if input_size <= LARGEST_FINAL_MAP:
        raise ValueError(f"ConvNet needs an input size above {LARGEST_FINAL_MAP}, got {input_size}")
    depth = 0
    while input_size >> depth > LARGEST_FINAL_MAP:
        depth += 1
    return depth


def convnet(
    num_classes: int, input_size: int, width: int, instance_norm: bool = False
) -> nn.Sequential:
    """Return the ConvNet: [B, 3, input_size, input_size] -> [B, num_classes].

    Blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling, then one linear layer. The norm
    is BatchNorm, or InstanceNorm as in Zhao et al. 2021. Raises ValueError on `input_size` <= 4.
    """
    depth = convnet_depth(input_size)
    layers: list[nn.Module] = []
    for block in range(depth):
        layers += [
            nn.Conv2d(width if block else 3, width, kernel_size=3, padding=1),
            nn.GroupNorm(width, width) if instance_norm else nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        ]
    final_map = input_size >> depth
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * final_map**2, num_classes))
