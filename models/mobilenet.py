"""MobileNetV2 for 32 and 64 pixels."""

from collections.abc import Callable

from torch import Tensor, nn
from torchvision import models
from torchvision.ops import Conv2dNormActivation

# Expansion, output channels, blocks, stride of the first block (Sandler et al. 2018, table 2, with
# the stride of the second row reduced to 1 for small images).
STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


class ProjectedResidual(nn.Module):
    """An inverted residual with a shortcut in every stride-1 block, as the CIFAR form has it.

    The paper's block drops the shortcut where the channels change; here a 1x1 convolution projects
    them. The 1x1 expansion is kept at ratio 1 too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expand_ratio: int,
        norm_layer: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        relu = {"norm_layer": norm_layer, "activation_layer": nn.ReLU}
        linear = {"norm_layer": norm_layer, "activation_layer": None}
        self.branch = nn.Sequential(
            Conv2dNormActivation(in_channels, hidden, 1, **relu),
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden, **relu),
            Conv2dNormActivation(hidden, out_channels, 1, **linear),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1:
            self.shortcut = Conv2dNormActivation(in_channels, out_channels, 1, **linear)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        branch = self.branch(features)
        return branch if self.shortcut is None else branch + self.shortcut(features)


def small_mobilenet_v2(num_classes: int) -> models.MobileNetV2:
    """Return MobileNetV2 in its CIFAR form: [B, 3, S, S] -> [B, num_classes].

    Stride-1 stem and second stage, so 32 pixels end in a 4x4 map; projected shortcuts; no dropout;
    ReLU, as in HALD's published code, where the paper has ReLU6.
    """
    net = models.MobileNetV2(
        num_classes, inverted_residual_setting=STAGES, block=ProjectedResidual, dropout=0.0
    )
    net.features[0][0].stride = (1, 1)
    for ends in (net.features[0], net.features[-1]):
        ends[2] = nn.ReLU(inplace=True)
    return net
