"""The registry of networks: published sizes, shapes, gradients, and what each name may mean."""

import sys
from functools import cache
from types import SimpleNamespace
from urllib.error import URLError

import published_networks
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision.models import WeightsEnum, get_model

import models

# The deeper DenseNets take long and differ from DenseNet121 in numbers alone.
NAMES = [name for name in models.names() if name not in {f"DenseNet{n}" for n in (161, 169, 201)}]


@cache
def build_meta(name: str, num_classes: int, input_size: int) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, num_classes, input_size)


def output_shape(name: str, num_classes: int, input_size: int) -> tuple[int, ...]:
    images = torch.empty(2, 3, input_size, input_size, device="meta")
    return tuple(build_meta(name, num_classes, input_size)(images).shape)


@pytest.mark.parametrize(
    ("name", "num_classes", "input_size", "published"),
    [
        ("ResNet18", 10, 32, 11_173_962),
        ("ResNet50", 10, 32, 23_520_842),
        ("ResNet101", 10, 32, 42_512_970),
        ("MobileNetV2", 10, 32, 2_296_922),
        ("ShuffleNetV2", 10, 32, 352_042),
        ("DenseNet121", 10, 32, 6_956_298),
        ("DenseNet161", 10, 32, 26_482_378),
        ("ConvNet", 10, 32, 320_010),
        ("ConvNetW128", 10, 32, 320_010),
        ("WideResNet", 10, 32, 36_479_194),
        ("ResNet18", 1000, 224, 11_689_512),
        ("ResNet50", 1000, 224, 25_557_032),
        ("ResNet101", 1000, 224, 44_549_160),
        ("MobileNetV2", 1000, 224, 3_504_872),
        ("ShuffleNetV2", 1000, 224, 2_278_604),
        ("DenseNet121", 1000, 224, 7_978_856),
        ("efficientnet_b0", 1000, 224, 5_288_548),
    ],
)
def test_parameter_count_is_the_published_one(name, num_classes, input_size, published):
    net = build_meta(name, num_classes, input_size)
    assert sum(parameter.numel() for parameter in net.parameters()) == published


@pytest.mark.parametrize("input_size", [32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_small_images_give_one_logit_per_class(name, input_size):
    assert output_shape(name, 7, input_size) == (2, 7)


@pytest.mark.parametrize("name", ["ResNet18", "ConvNet", "googlenet"])
def test_large_images_give_one_logit_per_class_in_training_mode(name):
    assert output_shape(name, 7, 224) == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_finite_and_backward_reaches_every_parameter(name):
    torch.manual_seed(0)
    net = models.build(name, num_classes=5, input_size=32)
    logits = net(torch.randn(2, 3, 32, 32))
    logits.square().sum().backward()
    assert torch.isfinite(logits).all()
    unreached = [key for key, parameter in net.named_parameters() if parameter.grad is None]
    assert unreached == []


@pytest.mark.parametrize("name", sorted({*NAMES} - {"ConvNetW128"}))
def test_house_networks_are_fp32_and_have_batchnorm_for_bssl(name):
    net = build_meta(name, 10, 32)
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "final_map"),
    [
        ("ResNet18", 4),
        ("ResNet50", 4),
        ("MobileNetV2", 4),
        ("ShuffleNetV2", 4),
        ("DenseNet121", 4),
        ("WideResNet", 8),
    ],
)
def test_small_networks_start_at_full_resolution_and_end_in_the_cifar_map(name, final_map):
    sizes = []

    def record_map(module, _inputs, output):
        if isinstance(module, nn.Conv2d):
            sizes.append(output.shape[-1])

    with register_module_forward_hook(record_map):
        output_shape(name, 10, 32)
    assert (sizes[0], sizes[-1]) == (32, final_map)


@pytest.mark.parametrize(("input_size", "depth"), [(32, 3), (64, 4), (128, 5), (224, 6)])
def test_convnet_depth_follows_the_resolution(input_size, depth):
    net = build_meta("ConvNet", 10, input_size)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == depth


def test_wide_resnet_refuses_large_images_and_names_what_fits():
    with pytest.raises(ValueError, match=r"WideResNet is for 32 and 64.* 224 .*ResNet18.*ConvNet"):
        models.build("WideResNet", 10, 224)


def test_registry_lists_the_house_names():
    assert sorted(models.names()) == [
        "ConvNet",
        "ConvNetW128",
        "ConvNetW32",
        "DenseNet121",
        "DenseNet161",
        "DenseNet169",
        "DenseNet201",
        "MobileNetV2",
        "ResNet101",
        "ResNet18",
        "ResNet50",
        "ShuffleNetV2",
        "WideResNet",
    ]


def test_case_of_a_name_does_not_matter():
    house, torchvision_net = build_meta("resnet18", 10, 32), build_meta("VGG11_BN", 10, 32)
    assert isinstance(house.maxpool, nn.Identity)
    assert type(torchvision_net).__name__ == "VGG"


def test_efficientnet_is_b0_as_in_the_published_code():
    expected = build_meta("efficientnet_b0", 10, 224).state_dict()
    assert build_meta("EfficientNet", 10, 224).state_dict().keys() == expected.keys()


@pytest.mark.parametrize("name", ["ResNet18", "MobileNetV2", "ShuffleNetV2", "DenseNet121"])
def test_small_networks_start_from_pytorchs_default(name):
    """Of a convolution: uniform up to 1 / sqrt(fan_in), whose mean square is a third of that."""
    torch.manual_seed(0)
    for layer in models.build(name, 10, 32).modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000:
            bound = layer.weight[0].numel() ** -0.5
            assert layer.weight.abs().max() <= bound * 1.0001
            assert layer.weight.square().mean().sqrt().item() == pytest.approx(
                bound / 3**0.5, rel=0.05
            )


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("ResNet18", published_networks.ResNet18),
        ("MobileNetV2", published_networks.MobileNetV2),
        ("ShuffleNetV2", published_networks.ShuffleNetV2),
        ("DenseNet121", published_networks.DenseNet121),
        ("ConvNetW128", published_networks.ConvNetW128),
    ],
)
def test_weights_of_the_published_small_networks_load_and_give_the_same_logits(name, network):
    torch.manual_seed(0)
    published, images = network().train(), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        published(images)  # running statistics other than the first ones
        ours = models.build(name, 10, 32).eval()
        renamed = models.under_our_names(ours, published.state_dict())
        missing, unexpected = ours.load_state_dict(renamed, strict=False)
        assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
        expected = published.eval()(images)
        assert torch.allclose(ours(images), expected, rtol=1e-4, atol=1e-5)
        assert models.under_our_names(ours, ours.state_dict()).keys() == ours.state_dict().keys()


def test_weights_in_another_order_keep_their_names():
    state = published_networks.ResNet18().state_dict()
    by_name = {key: state[key] for key in sorted(state)}
    assert models.under_our_names(build_meta("ResNet18", 10, 32), by_name) is by_name


@pytest.mark.parametrize(
    ("typo", "meant"), [("ResNet-18", "ResNet18"), ("efficientnetb0", "efficientnet_b0")]
)
def test_unknown_name_lists_the_close_ones(typo, meant):
    with pytest.raises(ValueError, match=f"unknown model '{typo}'; close names:.* {meant}"):
        models.build(typo, 10, 32)


def test_name_like_no_other_lists_the_house_names():
    with pytest.raises(ValueError, match=r"known are ResNet18, .*ConvNetW128 and torchvision"):
        models.build("@@@", 10, 32)


def test_timm_absent_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm:vit_tiny needs timm, which is not installed"):
        models.build("timm:vit_tiny", 10, 224)


def test_timm_builds_its_own_names_and_lists_close_ones(monkeypatch):
    stand_in = SimpleNamespace(
        is_model=lambda name: name == "tiny",
        list_models=lambda: ["tiny"],
        create_model=lambda name, pretrained, num_classes: nn.Linear(1, num_classes),
    )
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    assert models.build("timm:tiny", 6, 32).out_features == 6
    with pytest.raises(ValueError, match="close names: timm:tiny"):
        models.build("timm:tinny", 6, 32)


def test_factory_of_any_module_is_called_with_the_classes(monkeypatch):
    module = SimpleNamespace(factory=lambda num_classes: nn.Linear(1, num_classes))
    monkeypatch.setitem(sys.modules, "someones_nets", module)
    assert models.build("someones_nets:factory", 6, 32).out_features == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:factory", "cannot import .*'no_such_module'"),
        ("torch.nn:no_such_factory", "'torch.nn' has no function 'no_such_factory'"),
        (":factory", "cannot import the model's module '': ValueError"),
        ("os:system", r"os:system\(num_classes=10\) failed: TypeError: .*'command'"),
        ("os:getcwd", r"failed: TypeError: .* takes no keyword arguments$"),
        ("builtins:dict", "gives a dict, not a torch.nn.Module"),
    ],
)
def test_missing_module_or_factory_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, 10, 32)


@pytest.mark.parametrize("line", ["raise KeyError(1)", "def make(num_classes): {}[num_classes]"])
def test_code_that_fails_is_told_with_its_line(tmp_path, monkeypatch, line):
    (tmp_path / "failing_net.py").write_text(f"\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_net", raising=False)
    with pytest.raises(ValueError, match=r"KeyError: \d+ \(.*failing_net.py, line 2\)$"):
        models.build("failing_net:make", 10, 32)


def test_weights_are_the_v1_ones_and_fit_the_network(monkeypatch):
    asked = []
    stored = models.build("ResNet50", 1000, 224).state_dict()

    def get_state_dict(self, progress, check_hash):
        asked.append((str(self), check_hash))
        return stored

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    weights = models.torchvision_weights("ResNet50")
    assert asked == [("ResNet50_Weights.IMAGENET1K_V1", True)]
    assert torch.equal(weights["fc.weight"], stored["fc.weight"])


def test_densenet_weights_with_the_old_key_names_fit_the_network(monkeypatch):
    expected = build_meta("DenseNet121", 1000, 224).state_dict()
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
        for key, value in expected.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: old)
    with torch.device("meta"):
        assert models.torchvision_weights("DenseNet121").keys() == expected.keys()


def test_inception_weights_come_without_the_auxiliary_head(monkeypatch):
    with torch.device("meta"):
        stored = get_model("inception_v3", weights=None, init_weights=False).state_dict()
        assert "AuxLogits.fc.weight" in stored
        monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: stored)
        weights = models.torchvision_weights("inception_v3")
    assert weights.keys() == build_meta("inception_v3", 1000, 299).state_dict().keys()


def test_failed_download_passes_through(monkeypatch):
    def offline(self, **_):
        raise URLError("offline")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(URLError, match="offline"):
        models.torchvision_weights("squeezenet1_1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ConvNet", "torchvision has no pretrained weights for ConvNet"),
        ("resnet19", "unknown model 'resnet19'; close names: .*ResNet18"),
    ],
)
def test_weights_of_a_network_torchvision_lacks_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        models.torchvision_weights(name)
