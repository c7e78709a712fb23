"""Weights of the small networks of the published code, under the names of ours.

Its networks have the layers of ours, in the same order, under other names; only its DenseNets
concatenate the channels of a block in another order.
"""

import re

import torch
from torch import Tensor, nn
from torchvision import models

_TOP_LEVEL_NAMES = {
    models.ResNet: "conv1 bn1 layer1 layer2 layer3 layer4 linear",
    models.MobileNetV2: "conv1 bn1 layers conv2 bn2 linear",
    models.ShuffleNetV2: "conv1 bn1 layer1 layer2 layer3 conv2 bn2 linear",
    models.DenseNet: "conv1 dense1 trans1 dense2 trans2 dense3 trans3 dense4 bn linear",
    nn.Sequential: "features classifier",  # ConvNets
}


def under_our_names(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under the names of `net` if it has the published ones, else as it is."""
    published = {*_TOP_LEVEL_NAMES.get(type(net), "").split()}
    if {key.split(".")[0] for key in state} != published:
        return state
    counter = "num_batches_tracked"  # which old files lack
    ours, theirs = (
        {key: value for key, value in each.items() if not key.endswith(counter)}
        for each in (net.state_dict(), state)
    )
    if [key.split(".")[-1] for key in ours] != [key.split(".")[-1] for key in theirs]:
        return state
    renamed = dict(zip(ours, theirs.values(), strict=True))
    fits = all(renamed[key].shape == value.shape for key, value in ours.items())
    return _oldest_first(net, renamed) if fits and isinstance(net, models.DenseNet) else renamed


def _oldest_first(net: models.DenseNet, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights for dense blocks that put new channels last, as those of `net` do.

    The published network puts them first: the channels of a block are those of its last layer, ...,
    of its first layer, and then its input.
    """
    growth = net.features.denseblock1.denselayer1.conv2.out_channels
    reordered, layers = {}, 0
    for key, value in state.items():
        if layer := re.match(r"features\.denseblock\d\.denselayer(\d+)\.(\w+)", key):
            layers = int(layer[1])
            earlier = layers - 1 if layer[2] in ("norm1", "conv1") else 0
        else:  # the stem before all blocks, or what takes all channels of the block before it
            earlier = 0 if key == "classifier.bias" else layers
        channels = min(value.ndim - 1, 1)  # the dimension that the concatenated channels are in
        block_input = value.shape[channels] - earlier * growth
        parts = value.split([growth] * earlier + [block_input], channels)
        reordered[key] = torch.cat(parts[::-1], channels)
    return reordered
