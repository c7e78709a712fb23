"""DenseNet for 32 and 64 pixels."""

from torch import nn
from torchvision import models


def small_densenet121(num_classes: int) -> models.DenseNet:
    """Return DenseNet-121, growth 32, with the CIFAR stem: [B, 3, S, S] -> [B, num_classes].

    The stem is a bare 3x3 convolution of stride 1 (Huang et al. 2017, section 3): every dense
    layer normalises its own input.
    """
    net = models.densenet121(weights=None, num_classes=num_classes)
    net.features.conv0 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.features.conv0.weight)
    net.features.norm0 = nn.Identity()
    net.features.relu0 = nn.Identity()
    net.features.pool0 = nn.Identity()
    return net
