"""Losses, parameter groups, steps and evaluation, against numbers worked by hand."""

import math

import pytest
import torch
from conftest import CPU, TINY, Linear, sgd
from torch import nn

from utils.data.views import Mixture
from utils.metrics import hits
from validate import evaluate
from validate.kinds import Batch, hard_loss, soft_loss
from validate.step import make_optimizer


def test_soft_loss_is_kl_from_teacher_to_student():
    """T = 2; teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)."""
    teacher = torch.tensor([[2 * math.log(3), 0.0], [0.0, 0.0]])
    student = torch.tensor([[5.0, 5.0], [1.0, 1.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert soft_loss(student, teacher, 2.0).item() == pytest.approx(kl / 2, rel=1e-5)


def test_hard_loss_smooths_and_mixes():
    """C = 2, s = 0.8: targets 0.6 and 0.4; lambda 0.75 makes them 0.55 and 0.45."""
    logits = torch.tensor([[math.log(3), 0.0]])
    mixture = Mixture(own=torch.tensor([0]), partner=torch.tensor([1]), lam=torch.tensor([0.75]))
    expected = -(0.55 * math.log(0.75) + 0.45 * math.log(0.25))
    assert hard_loss(logits, mixture, 0.8).item() == pytest.approx(expected, rel=1e-5)


def test_thousand_classes_smoothed_by_eight_tenths():
    """On-value 1 - 0.8 + 0.8 / 1000 = 0.2008, off-value 0.0008: the published targets."""
    logits = torch.randn(1, 1000)
    target = torch.full((1000,), 0.0008)
    target[7] = 0.2008
    label = torch.tensor([7])
    loss = hard_loss(logits, Mixture(own=label, partner=label, lam=torch.ones(1)), 0.8)
    assert loss.item() == pytest.approx(-(target * logits[0].log_softmax(0)).sum().item(), rel=1e-5)


def test_weight_decay_only_on_tensors_with_more_than_one_dimension():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decayed, free = make_optimizer("sgd", model, torch.zeros(()), 0.01).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in free["params"]] == [1, 1, 1, 1]


def test_hits_by_rank():
    logits = torch.arange(6.0).repeat(3, 1)
    assert hits(logits, torch.tensor([5, 1, 0])).tolist() == [1, 0, 0, 0, 1]
    assert hits(logits[:, :3], torch.tensor([0, 2, 2])).tolist() == [2, 0, 1, 0, 0]


def batches_of(size: int) -> list[Batch]:
    """Eight unmixed views of random pixels, two of each class, in batches of one size."""
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) // 2
    parts = zip(pixels.split(size), labels.split(size), strict=True)
    return [Batch(pixels=x, own=y, partner=y, lam=torch.ones(len(y))) for x, y in parts]


def smoothed(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return hard_loss(logits, batch.mixture, 0.1)


def test_accumulated_small_batches_step_as_one_large_batch():
    large, small = Linear(), Linear()
    sgd(large)(batches_of(8), smoothed)
    step = sgd(small)
    step(batches_of(2), smoothed)
    assert step.steps == 1 and step.views == 8
    assert torch.allclose(large.layer.weight, small.layer.weight, atol=1e-6)


def test_an_epoch_reports_means_over_all_views():
    step = sgd(Linear())
    step.optimizer.param_groups[0]["lr"] = 0.0
    for batch in batches_of(3):
        step([batch], smoothed)
    (whole,) = batches_of(8)
    logits = Linear()(whole.pixels)
    expected = nn.functional.cross_entropy(logits, whole.own, label_smoothing=0.1)
    means = step.means()
    assert step.views == 8 and means["train_top5"] == 100
    assert means["loss"] == pytest.approx(expected.item(), rel=1e-5)
    hits = (logits.argmax(1) == whole.own).float().mean().item()
    assert means["train_top1"] == pytest.approx(100 * hits)
    step.begin_epoch()
    assert step.views == 0 and step.loss_sum == 0


def test_evaluation_counts_every_image_once():
    class ByBrightness(nn.Module):
        def forward(self, pixels):
            level = pixels.mean((1, 2, 3))[:, None]
            return torch.cat([-level, level], 1)

    count = evaluate._BATCH_SIZE + 3
    pixels = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    pixels[: count // 2] = 255
    targets = torch.ones(count, dtype=torch.int64)
    top1, top5 = evaluate.accuracy(
        ByBrightness(), pixels=pixels, targets=targets, dataset=TINY, machine=CPU
    )
    assert top1 == pytest.approx(100 * (count // 2) / count, rel=1e-6) and top5 == 100
