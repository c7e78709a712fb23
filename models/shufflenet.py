"""ShuffleNetV2 for 32 and 64 pixels."""

from torch import nn
from torchvision import models


def small_shufflenet_v2(num_classes: int) -> models.ShuffleNetV2:
    """Return ShuffleNetV2 x0.5 with a stride-1 stem: [B, 3, S, S] -> [B, num_classes].

    The width is that of HALD's published code for small images (Ma et al. 2018, table 5); without
    the stem's two reductions 32 pixels end in a 4x4 map.
    """
    net = models.shufflenet_v2_x0_5(weights=None, num_classes=num_classes)
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()
    return net
