"""The registry of networks: which name means which network at which resolution."""

import difflib
import hashlib
import importlib
import re
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, hub, nn
from torchvision import models as torchvision_models

from models.convnet import convnet
from models.mobilenet import small_mobilenet_v2
from models.published import under_our_names as under_our_names
from models.small import small_densenet, small_resnet, small_shufflenet_v2
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
_CONVNETS = {  # "ConvNetW128" is the name of the published code
    "ConvNet": partial(convnet, width=128),
    "ConvNetW32": partial(convnet, width=32),
    "ConvNetW128": partial(convnet, width=128, instance_norm=True),
}
# What torchvision calls them, where that is not the same in lower case.
_IN_TORCHVISION = {
    "MobileNetV2": "mobilenet_v2",
    "ShuffleNetV2": "shufflenet_v2_x1_0",
    "EfficientNet": "efficientnet_b0",  # a name of the published code
}
# Without these two, training mode would return a tuple with the auxiliary heads. Their pretrained
# weights expect inputs in [-1, 1]; transform_input maps ImageNet-normalised inputs to that.
_TORCHVISION_ARGUMENTS = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
}


def names() -> list[str]:
    """Return the house names, the ones with a meaning of their own in `build`."""
    return [*_SMALL, *_CONVNETS]


_TORCHVISION_NAMES = torchvision_models.list_models(module=torchvision_models)
# Every name that needs no colon, by its lower case; ours come before torchvision's.
_KNOWN = {name.lower(): name for name in [*_TORCHVISION_NAMES, *_IN_TORCHVISION, *names()]}


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
    if colon:
        make = _build_timm if source == "timm" else partial(_build_from_factory, source)
        return make(attribute, num_classes)
    known = _spelling(name)
    if known in _CONVNETS:
        return _CONVNETS[known](num_classes, input_size)
    if known in _SMALL and input_size < LARGE_INPUT:
        net = _SMALL[known](num_classes)
        for module in net.modules():  # published: PyTorch's default, not torchvision's
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return net
    if (theirs := _torchvision_name(known)) is None:
        fitting = ", ".join(house for house in names() if house != known)
        raise ValueError(f"{known} is for 32 and 64 pixels; at {input_size} take one of {fitting}")
    arguments = _TORCHVISION_ARGUMENTS.get(theirs, {})
    return torchvision_models.get_model(theirs, weights=None, num_classes=num_classes, **arguments)


def without_suffix(name: str) -> str:
    """Return the network in a teacher's name like "ResNet18_best"; other names as they are."""
    network = name.partition("_")[0]
    return network if name.lower() not in _KNOWN and network.lower() in _KNOWN else name


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """Return the pretrained ImageNet state dict that fits `build(name, 1000, 224)`.

    Takes the IMAGENET1K_V1 weights, the teachers of this field, and torchvision's default only for
    the few networks without them. Downloads once and checks the hash; whatever the download raises
    passes through. Raises ValueError when torchvision has no network of that name.
    """
    known = _spelling(name)
    if (theirs := _torchvision_name(known)) is None:
        raise ValueError(f"torchvision has no pretrained weights for {known}")
    choices = torchvision_models.get_model_weights(theirs)
    weights = choices.__members__.get("IMAGENET1K_V1", choices.DEFAULT)
    _check_cached_file(weights.url)
    # The builder, not weights.get_state_dict(): it renames the keys of the old DenseNet files. It
    # insists on the auxiliary head of Inception, which `build` leaves out.
    state = torchvision_models.get_model(theirs, weights=weights).state_dict()
    return {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}


def _check_cached_file(url: str) -> None:
    """Raise ValueError when an earlier download is not the file its name's hash promises.

    torchvision checks the hash only while downloading, and unpickles the file without restrictions.
    """
    path = Path(hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    promised = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if path.exists() and promised:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(promised[1]):
            raise ValueError(f"{path} is damaged or not torchvision's; delete it to download again")


def _torchvision_name(known: str) -> str | None:
    theirs = _IN_TORCHVISION.get(known, known.lower())
    return theirs if theirs in _TORCHVISION_NAMES else None


def _spelling(name: str) -> str:
    if name.lower() not in _KNOWN:
        raise ValueError(_unknown(name, _KNOWN))
    return _KNOWN[name.lower()]


def _unknown(name: str, spellings: dict[str, str]) -> str:
    close = difflib.get_close_matches(name.lower(), spellings, n=5, cutoff=0.5)
    if close:
        return f"unknown model {name!r}; close names: {', '.join(map(spellings.get, close))}"
    return f"unknown model {name!r}; known are {', '.join(names())} and torchvision's classifiers"


def _build_timm(name: str, num_classes: int) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(f"timm:{name} needs timm, which is not installed: {error}") from error
    if not timm.is_model(name):
        theirs = [f"timm:{known}" for known in timm.list_models()]
        raise ValueError(_unknown(f"timm:{name}", {known.lower(): known for known in theirs}))
    return timm.create_model(name, pretrained=False, num_classes=num_classes)


def _build_from_factory(module_name: str, attribute: str, num_classes: int) -> nn.Module:
    doing = f"cannot import the model's module {module_name!r}"
    call = f"{module_name}:{attribute}(num_classes={num_classes})"
    try:
        module = importlib.import_module(module_name)
        factory = getattr(module, attribute, None)
        doing = f"{call} failed"
        model = factory(num_classes=num_classes) if callable(factory) else None
    except Exception as error:  # whatever somebody else's code raises
        raise ValueError(f"{doing}: {_of_their_code(error)}") from error
    if not callable(factory):
        raise ValueError(f"module {module_name!r} has no function {attribute!r} to build a model")
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
