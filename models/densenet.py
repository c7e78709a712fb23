"""DenseNets for 32 and 64 pixels."""

import re

import torch
from torch import Tensor, nn
from torchvision import models


def small_densenet(name: str, num_classes: int) -> models.DenseNet:
    """Return torchvision's DenseNet `name` with the CIFAR stem: [B, 3, S, S] -> [B, num_classes].

    The stem is a bare 3x3 convolution of stride 1 (Huang et al. 2017, section 3): every dense
    layer normalises its own input.
    """
    net = models.get_model(name, weights=None, num_classes=num_classes)
    width = net.features.conv0.out_channels
    net.features.conv0 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
    net.features.norm0 = nn.Identity()
    net.features.relu0 = nn.Identity()
    net.features.pool0 = nn.Identity()
    return net


def oldest_first(net: models.DenseNet, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict whose dense blocks put new channels last, as `net` does, not first.

    `state` has the names and shapes of `net`; its network concatenates [new, old], so that the
    channels of a block are those of its last layer, ..., of its first layer, and then its input.
    """
    growth = net.features.denseblock1.denselayer1.conv2.out_channels
    layers = {str(n): len(getattr(net.features, f"denseblock{n}")) for n in range(1, 5)}
    reordered = {}
    for key, value in state.items():
        layer = re.match(r"features\.denseblock\d\.denselayer(\d+)\.(?:norm1|conv1)\.", key)
        transition = re.match(r"features\.transition(\d)\.", key)
        if layer:
            earlier = int(layer[1]) - 1
        elif transition:
            earlier = layers[transition[1]]
        else:
            earlier = layers["4"] if re.match(r"features\.norm5\.|classifier\.weight", key) else 0
        channels = min(value.ndim - 1, 1)  # the dimension that the concatenated channels are in
        block_input = value.shape[channels] - earlier * growth
        parts = value.split([growth] * earlier + [block_input], channels)
        reordered[key] = torch.cat(parts[::-1], channels)
    return reordered
