"""The registry of networks: which name means which network at which resolution."""

import difflib
import hashlib
import importlib
import re
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from torch import Tensor, hub, nn
from torchvision import models as torchvision_models

from models.convnet import convnet
from models.densenet import small_densenet
from models.mobilenet import small_mobilenet_v2
from models.published import under_our_names as under_our_names
from models.resnet import small_resnet
from models.shufflenet import small_shufflenet_v2
from models.wideresnet import wide_resnet_28_10

LARGE_INPUT = 128

_SMALL: dict[str, Callable[[int], nn.Module]] = {
    "ResNet18": partial(small_resnet, "resnet18"),
    "ResNet50": partial(small_resnet, "resnet50"),
    "ResNet101": partial(small_resnet, "resnet101"),
    "MobileNetV2": small_mobilenet_v2,
    "ShuffleNetV2": small_shufflenet_v2,
    "DenseNet121": partial(small_densenet, "densenet121"),
    "DenseNet161": partial(small_densenet, "densenet161"),
    "DenseNet169": partial(small_densenet, "densenet169"),
    "DenseNet201": partial(small_densenet, "densenet201"),
    "WideResNet": wide_resnet_28_10,
}
_LARGE = {
    "ResNet18": "resnet18",
    "ResNet50": "resnet50",
    "ResNet101": "resnet101",
    "MobileNetV2": "mobilenet_v2",
    "ShuffleNetV2": "shufflenet_v2_x1_0",
    "DenseNet121": "densenet121",
    "DenseNet161": "densenet161",
    "DenseNet169": "densenet169",
    "DenseNet201": "densenet201",
}
_CONVNETS = {  # "ConvNetW128" is the name of the published code
    "ConvNet": partial(convnet, width=128),
    "ConvNetW32": partial(convnet, width=32),
    "ConvNetW128": partial(convnet, width=128, instance_norm=True),
}
_PUBLISHED_NAMES = {"EfficientNet": "efficientnet_b0"}

# Without these two, training mode would return a tuple with the auxiliary heads. Their pretrained
# weights expect inputs in [-1, 1]; transform_input maps ImageNet-normalised inputs to that.
_TORCHVISION_ARGUMENTS = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
}


def names() -> list[str]:
    """Return the house names, the ones with a meaning of their own in `build`."""
    return [*_SMALL, *_CONVNETS]


def build(name: str, num_classes: int, input_size: int) -> nn.Module:
    """Return a randomly initialised fp32 network: [B, 3, S, S] -> [B, num_classes].

    `name`, whatever its case, is one of `names()` (when S = `input_size` is below 128 our
    small-resolution variant, from there on torchvision's network; ConvNet's depth follows S), or
    else any torchvision classification name, the same network at every size (ViT,
    MaxViT and Inception refuse small images when called). `timm:NAME` asks timm, and
    `package.module:factory` calls `factory(num_classes=num_classes)`.
    Raises ValueError on an unknown name, a size a house network is not for, or a module or factory
    that fails.
    """
    source, colon, attribute = name.partition(":")
    if colon and source == "timm":
        return _build_timm(attribute, num_classes)
    if colon:
        return _build_from_factory(source, attribute, num_classes)
    if house := _same_name(name, names()):
        return _build_house(house, num_classes, input_size)
    if torchvision_name := _same_name(name, _torchvision_names()):
        return _build_torchvision(torchvision_name, num_classes)
    raise ValueError(_unknown(name, [*names(), *_torchvision_names()]))


def without_suffix(name: str) -> str:
    """Return the network in a teacher's name like "ResNet18_best"; other names as they are."""
    known = [*names(), *_torchvision_names()]
    network = name.partition("_")[0]
    return network if not _same_name(name, known) and _same_name(network, known) else name


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """Return the pretrained ImageNet state dict that fits `build(name, 1000, 224)`.

    Takes the IMAGENET1K_V1 weights, the teachers of this field, and torchvision's default only for
    the few networks without them. Downloads once and checks the hash; whatever the download raises
    passes through. Raises ValueError when torchvision has no network of that name.
    """
    house = _same_name(name, names())
    if house and house not in _LARGE:
        raise ValueError(f"torchvision has no pretrained weights for {house}")
    torchvision_name = _LARGE[house] if house else _same_name(name, _torchvision_names())
    if torchvision_name is None:
        raise ValueError(_unknown(name, [*_LARGE, *_torchvision_names()]))
    choices = torchvision_models.get_model_weights(torchvision_name)
    weights = choices.__members__.get("IMAGENET1K_V1", choices.DEFAULT)
    _check_cached_file(weights.url)
    # The builder, not weights.get_state_dict(): it renames the keys of the old DenseNet files. It
    # insists on the auxiliary head of Inception, which `build` leaves out.
    state = torchvision_models.get_model(torchvision_name, weights=weights).state_dict()
    return {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}


def _check_cached_file(url: str) -> None:
    """Raise ValueError when an earlier download is not the file its name's hash promises.

    torchvision checks that hash only while downloading, and unpickles the file without
    restrictions.
    """
    name = url.rpartition("/")[2]
    path = Path(hub.get_dir()) / "checkpoints" / name
    promised = re.search(r"-([0-9a-f]{8,})\.", name)
    if path.exists() and promised:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(promised[1]):
            raise ValueError(f"{path} is damaged or not torchvision's; delete it to download again")


def _torchvision_names() -> list[str]:
    return torchvision_models.list_models(module=torchvision_models)


def _same_name(name: str, candidates: Iterable[str]) -> str | None:
    published = {alias.lower(): known for alias, known in _PUBLISHED_NAMES.items()}
    name = published.get(name.lower(), name)
    return next((known for known in candidates if known.lower() == name.lower()), None)


def _unknown(name: str, candidates: Iterable[str]) -> str:
    spelling: dict[str, str] = {}
    for known in candidates:
        spelling.setdefault(known.lower(), known)
    close = difflib.get_close_matches(name.lower(), spelling, n=5, cutoff=0.5)
    if close:
        return f"unknown model {name!r}; close names: {', '.join(map(spelling.get, close))}"
    return f"unknown model {name!r}; known are {', '.join(names())} and torchvision's classifiers"


def _build_house(name: str, num_classes: int, input_size: int) -> nn.Module:
    if name in _CONVNETS:
        return _CONVNETS[name](num_classes, input_size)
    if input_size < LARGE_INPUT:
        net = _SMALL[name](num_classes)
        for module in net.modules():  # published: PyTorch's default, not torchvision's
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return net
    if name in _LARGE:
        return _build_torchvision(_LARGE[name], num_classes)
    fitting = ", ".join([*_LARGE, *_CONVNETS])
    raise ValueError(f"{name} is for 32 and 64 pixels; at {input_size} take one of {fitting}")


def _build_torchvision(name: str, num_classes: int) -> nn.Module:
    arguments = _TORCHVISION_ARGUMENTS.get(name, {})
    return torchvision_models.get_model(name, weights=None, num_classes=num_classes, **arguments)


def _build_timm(name: str, num_classes: int) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(f"timm:{name} needs timm, which is not installed: {error}") from error
    if not timm.is_model(name):
        raise ValueError(
            _unknown(f"timm:{name}", [f"timm:{known}" for known in timm.list_models()])
        )
    return timm.create_model(name, pretrained=False, num_classes=num_classes)


def _build_from_factory(module_name: str, attribute: str, num_classes: int) -> nn.Module:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever somebody else's code raises, as below
        raise ValueError(
            f"cannot import the model's module {module_name!r}: {_of_their_code(error)}"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"module {module_name!r} has no function {attribute!r} to build a model")
    call = f"{module_name}:{attribute}(num_classes={num_classes})"
    try:
        model = factory(num_classes=num_classes)
    except Exception as error:
        raise ValueError(f"{call} failed: {_of_their_code(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{call} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _of_their_code(error: Exception) -> str:
    """An error and, where it is theirs, the line that raised it: there will be no traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if last.filename in (__file__, importlib.__file__) or last.filename.startswith("<"):
        return reason
    return f"{reason} ({last.filename}, line {last.lineno})"
