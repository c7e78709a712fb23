"""Torchvision's networks with a stem for 32 and 64 pixels: [B, 3, S, S] -> [B, num_classes]."""

from torch import nn
from torchvision import models


def small_resnet(name: str, num_classes: int) -> models.ResNet:
    """Return torchvision's ResNet `name` with the CIFAR stem.

    The stem is one 3x3 convolution of stride 1 without max-pooling, so the first stage keeps the
    input's resolution (He et al. 2016, section 4.2, with the ImageNet stages).
    """
    net = models.get_model(name, weights=None, num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def small_densenet(name: str, num_classes: int) -> models.DenseNet:
    """Return torchvision's DenseNet `name` with the CIFAR stem.

    The stem is a bare 3x3 convolution of stride 1 (Huang et al. 2017, section 3): every dense
    layer normalises its own input.
    """
    net = models.get_model(name, weights=None, num_classes=num_classes)
    width = net.features.conv0.out_channels
    net.features.conv0 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
    for unused in ("norm0", "relu0", "pool0"):
        setattr(net.features, unused, nn.Identity())
    return net


def small_shufflenet_v2(num_classes: int) -> models.ShuffleNetV2:
    """Return ShuffleNetV2 x0.5 with a stride-1 stem.

    The width is that of HALD's published code for small images (Ma et al. 2018, table 5); without
    the stem's two reductions 32 pixels end in a 4x4 map.
    """
    net = models.shufflenet_v2_x0_5(weights=None, num_classes=num_classes)
    net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()
    return net
