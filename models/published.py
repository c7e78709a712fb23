"""Weights of the small networks of the published code, under the names of ours.

Its networks have the layers of ours, in the same order, under other names; only its DenseNets
concatenate the channels of a block in another order.
"""

from torch import Tensor, nn
from torchvision import models

from models.densenet import oldest_first

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
    ours = {key: value.shape for key, value in net.state_dict().items() if _decides(key)}
    theirs = {key: value for key, value in state.items() if _decides(key)}
    if [key.split(".")[-1] for key in ours] != [key.split(".")[-1] for key in theirs]:
        return state
    renamed = dict(zip(ours, theirs.values(), strict=True))
    fits = all(renamed[key].shape == shape for key, shape in ours.items())
    return oldest_first(net, renamed) if fits and isinstance(net, models.DenseNet) else renamed


def _decides(key: str) -> bool:
    return not key.endswith("num_batches_tracked")  # which old files lack
