"""Several batches in one forward pass: the labels stay the same."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, generate_arguments, tree
from torch import nn

import models
from relabel import generate, teacher
from utils.graphs import Graphs
from utils.labels import LabelSet
from utils.runtime import Runtime


class Functional(nn.Module):
    """BatchNorm called as functions, as custom layers do, on images and on features."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.weight = nn.Parameter(torch.rand(8))
        self.features = nn.BatchNorm1d(8)

    def forward(self, pixels):
        maps = self.convolution(pixels)
        maps = F.batch_norm(maps, None, None, self.weight, training=True).relu()
        return self.features(maps.mean((2, 3)))


class Folded(nn.Module):
    """BatchNorm over rows that are not the views: quarters of images, quarter by quarter."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, pixels):
        rows = torch.cat(pixels.mean(1).flatten(1).chunk(4, dim=1))[:, :4]
        return torch.stack(self.norm(rows).chunk(4)).sum(0)


def ensemble(model: nn.Module) -> teacher.Ensemble:
    model.requires_grad_(False).eval()
    teacher.use_batch_statistics(model)
    return teacher.Ensemble([teacher.Teacher("", model, "")], None, CPU)


def shuffle_net() -> nn.Module:
    return models.build("ShuffleNetV2", 10, 32)


def residual_net() -> nn.Module:
    return models.build("ResNet18", 10, 32)


@pytest.mark.parametrize("build", [residual_net, shuffle_net, Functional, Folded])
def test_grouped_labels_are_those_of_one_batch_at_a_time(build):
    torch.manual_seed(0)
    grouped = ensemble(build())
    before = {name: value.clone() for name, value in grouped.teachers[0].model.state_dict().items()}
    views = torch.randn(2 * 4 + 3, 3, 32, 32)
    views[:4] *= 2
    views[4:8] += 1
    alone = torch.cat([grouped.logits(batch) for batch in views.split(4)])
    found = grouped.logits(views, 4)
    assert (found - alone).abs().max() <= 1e-4
    # Statistics of all views at once would be something else.
    assert (grouped.logits(views) - alone).abs().max() > 1e-2
    after = grouped.teachers[0].model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_labels_by_graphs_are_those_without(device):
    """Groups of 8 and of 5 views by turns: warmed up, captured, replayed, none overwritten."""
    torch.manual_seed(0)
    plain = ensemble(residual_net().to(device))
    plain.runtime = Runtime(torch.device(device), None)
    graphed = teacher.Ensemble(plain.teachers, None, plain.runtime)
    graphed.graphs = Graphs(plain.runtime.device, "")
    groups = [torch.randn(size, 3, 32, 32, device=device) for size in [8, 5] * 6]
    labels = [graphed.logits(views, 4) for views in groups]
    for views, found in zip(groups, labels, strict=True):
        assert torch.allclose(found, plain.logits(views, 4), rtol=0, atol=1e-5)


def test_without_bssl_batches_do_not_meet():
    torch.manual_seed(0)
    model = shuffle_net().requires_grad_(False).eval()
    plain = teacher.Ensemble([teacher.Teacher("", model, "")], None, CPU)
    views = torch.randn(7, 3, 32, 32)
    alone = torch.cat([plain.logits(batch) for batch in views.split(4)])
    assert (plain.logits(views, 4) - alone).abs().max() <= 1e-4


def test_a_grouped_label_set_holds_the_same_labels_and_survives_interruption(
    world, tmp_path, command
):
    """12 images in batches of 5 (5, 5, 2), two batches per forward pass."""
    arguments = generate_arguments(world.data, tmp_path / "l", world.weights, "--slc", 6)
    arguments += ["--views-per-forward", 13]
    assert command(generate.main, *arguments).code == 0
    whole, plain = LabelSet.open(tmp_path / "l"), LabelSet.open(world.labels)
    assert whole.manifest["views_per_forward"] == 10
    for number in range(len(plain)):
        expected, found = plain[number], whole[number]
        assert torch.equal(expected.views.box, found.views.box)
        assert torch.allclose(expected.logits, found.logits, atol=1e-4, rtol=1e-3)  # fp16's step
    files = tree(tmp_path / "l")

    interrupted = generate_arguments(world.data, tmp_path / "i", world.weights, "--slc", 6)
    interrupted += ["--views-per-forward", 13]
    original, calls = teacher.Ensemble.logits, []

    def stop(self, views, batch_size=None):
        calls.append(batch_size)
        if calls.count(5) == 4:  # the second pass, after its first group
            raise KeyboardInterrupt
        return original(self, views, batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher.Ensemble, "logits", stop)
        assert command(generate.main, *interrupted).code == 130
    assert (tmp_path / "i" / "pass_0000.npz").exists()
    done = command(generate.main, *interrupted)
    assert done.code == 0 and "1 of 2 passes are there and verified: skipped" in done.out
    assert tree(tmp_path / "i") == files
