"""Small networks with the names and the arithmetic of the published code's, written for the tests.

Its ResNet, MobileNetV2, ShuffleNetV2 x0.5 and DenseNet are the usual ones for CIFAR, with `linear`
and `shortcut`; its ConvNet is that of dataset condensation.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = kernel // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


class Block(nn.Module):
    """conv1, bn1, conv2, bn2, ...: the convolutions given, each with its BatchNorm."""

    def __init__(self, *convolutions: nn.Conv2d, shortcut: nn.Module | None = None):
        super().__init__()
        for number, convolution in enumerate(convolutions, start=1):
            setattr(self, f"conv{number}", convolution)
            setattr(self, f"bn{number}", nn.BatchNorm2d(convolution.out_channels))
        if shortcut is not None:
            self.shortcut = shortcut

    def normed(self, number: int, features: Tensor) -> Tensor:
        return getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(features))


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))


class BasicBlock(Block):
    def __init__(self, inputs: int, outputs: int, stride: int):
        plain = stride == 1 and inputs == outputs
        shortcut = nn.Sequential() if plain else projection(inputs, outputs, stride)
        convolutions = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)
        super().__init__(*convolutions, shortcut=shortcut)

    def forward(self, features):
        out = self.normed(2, F.relu(self.normed(1, features)))
        return F.relu(out + self.shortcut(features))


class ResNet18(Block):
    def __init__(self):
        super().__init__(conv(3, 64, 3))
        widths = [64, 64, 128, 256, 512]
        for number in range(1, 5):
            before, width, stride = widths[number - 1], widths[number], 1 if number == 1 else 2
            blocks = BasicBlock(before, width, stride), BasicBlock(width, width, 1)
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(512, 10)

    def forward(self, images):
        out = F.relu(self.normed(1, images))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = layer(out)
        return self.linear(out.mean((2, 3)))


class InvertedResidual(Block):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        wide = expansion * inputs
        projected = stride == 1 and inputs != outputs
        super().__init__(
            conv(inputs, wide),
            conv(wide, wide, 3, stride, groups=wide),
            conv(wide, outputs),
            shortcut=projection(inputs, outputs, 1) if projected else nn.Sequential(),
        )
        self.stride = stride

    def forward(self, features):
        out = self.normed(3, F.relu(self.normed(2, F.relu(self.normed(1, features)))))
        return out + self.shortcut(features) if self.stride == 1 else out


class MobileNetV2(Block):
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))

    def __init__(self):
        super().__init__(conv(3, 32, 3))
        blocks, inputs = [], 32
        for expansion, outputs, count, stride in (*self.STAGES, (6, 160, 3, 2), (6, 320, 1, 1)):
            for number in range(count):
                blocks.append(InvertedResidual(inputs, outputs, expansion, 1 if number else stride))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2, self.bn2 = conv(320, 1280), nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, 10)

    def forward(self, images):
        out = F.relu(self.normed(2, self.layers(F.relu(self.normed(1, images)))))
        return self.linear(out.mean((2, 3)))


def shuffled(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([left, right], dim=2).flatten(1, 2)


class Unit(Block):
    """ShuffleNetV2's unit of stride 1."""

    def __init__(self, channels: int):
        half = channels // 2
        super().__init__(conv(half, half), conv(half, half, 3, groups=half), conv(half, half))

    def forward(self, features):
        left, right = features.chunk(2, dim=1)
        right = F.relu(self.normed(3, self.normed(2, F.relu(self.normed(1, right)))))
        return shuffled(left, right)


class DownUnit(Block):
    """ShuffleNetV2's unit of stride 2: convolutions 1 and 2 on the left, 3 to 5 on the right."""

    def __init__(self, inputs: int, outputs: int):
        half = outputs // 2
        left = conv(inputs, inputs, 3, 2, groups=inputs), conv(inputs, half)
        super().__init__(
            *left, conv(inputs, half), conv(half, half, 3, 2, groups=half), conv(half, half)
        )

    def forward(self, features):
        left = F.relu(self.normed(2, self.normed(1, features)))
        right = F.relu(self.normed(5, self.normed(4, F.relu(self.normed(3, features)))))
        return shuffled(left, right)


class ShuffleNetV2(Block):
    def __init__(self):
        super().__init__(conv(3, 24, 3))
        widths = [24, 48, 96, 192]
        for number, units in enumerate((3, 7, 3), start=1):
            before, width = widths[number - 1], widths[number]
            stage = [DownUnit(before, width), *(Unit(width) for _ in range(units))]
            setattr(self, f"layer{number}", nn.Sequential(*stage))
        self.conv2, self.bn2 = conv(192, 1024), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, 10)

    def forward(self, images):
        out = self.layer3(self.layer2(self.layer1(F.relu(self.normed(1, images)))))
        return self.linear(F.relu(self.normed(2, out)).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 128)
        self.bn2, self.conv2 = nn.BatchNorm2d(128), conv(128, 32, 3)

    def forward(self, features):
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(features))))))
        return torch.cat([new, features], dim=1)


class Transition(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inputs), conv(inputs, inputs // 2)

    def forward(self, features):
        return F.avg_pool2d(self.conv(F.relu(self.bn(features))), 2)


class DenseNet121(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, channels = conv(3, 64, 3), 64
        for number, layers in enumerate((6, 12, 24, 16), start=1):
            block = [DenseLayer(channels + 32 * layer) for layer in range(layers)]
            setattr(self, f"dense{number}", nn.Sequential(*block))
            channels += 32 * layers
            if number < 4:
                setattr(self, f"trans{number}", Transition(channels))
                channels //= 2
        self.bn, self.linear = nn.BatchNorm2d(channels), nn.Linear(channels, 10)

    def forward(self, images):
        out = self.trans1(self.dense1(self.conv1(images)))
        out = self.dense4(self.trans3(self.dense3(self.trans2(self.dense2(out)))))
        return self.linear(F.relu(self.bn(out)).mean((2, 3)))


class ConvNetW128(nn.Module):
    def __init__(self):
        super().__init__()
        layers = []
        for inputs in (3, 128, 128):
            norm = nn.InstanceNorm2d(128, affine=True)
            layers += [nn.Conv2d(inputs, 128, 3, padding=1), norm, nn.ReLU(), nn.AvgPool2d(2)]
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(2048, 10)

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))
