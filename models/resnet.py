"""ResNets for 32 and 64 pixels."""

from torch import nn
from torchvision import models


def small_resnet(name: str, num_classes: int) -> models.ResNet:
    """Return torchvision's ResNet `name` with the CIFAR stem: [B, 3, S, S] -> [B, num_classes].

    The stem is one 3x3 convolution of stride 1 without max-pooling, so the first stage keeps the
    input's resolution (He et al. 2016, section 4.2, with the ImageNet stages).
    """
    net = models.get_model(name, weights=None, num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net
