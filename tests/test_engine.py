"""Losses, parameter groups, epochs and evaluation, against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import CPU, TINY, Linear, sgd
from torch import nn

from utils.data.images import ResidentImages
from utils.data.views import ViewSpec, draw
from utils.metrics import correct_top1_top5
from validate import engine


def test_soft_loss_is_kl_from_teacher_to_student():
    """T = 2; teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)."""
    teacher = torch.tensor([[2 * math.log(3), 0.0], [0.0, 0.0]])
    student = torch.tensor([[5.0, 5.0], [1.0, 1.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert engine.soft_loss(student, teacher, 2, "none").item() == pytest.approx(kl / 2, rel=1e-5)
    assert engine.soft_loss(student, teacher, 2, "T2").item() == pytest.approx(2 * kl, rel=1e-5)


def test_hard_loss_smooths_and_mixes():
    """C = 2, s = 0.8: targets 0.6 and 0.4; lambda 0.75 makes them 0.55 and 0.45."""
    logits = torch.tensor([[math.log(3), 0.0]])
    own, partner = torch.tensor([0]), torch.tensor([1])
    expected = -(0.55 * math.log(0.75) + 0.45 * math.log(0.25))
    found = engine.hard_loss(logits, own, partner, torch.tensor([0.75]), 0.8)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_thousand_classes_smoothed_by_eight_tenths():
    """On-value 1 - 0.8 + 0.8 / 1000 = 0.2008, off-value 0.0008: the published targets."""
    logits = torch.randn(1, 1000)
    target = torch.full((1000,), 0.0008)
    target[7] = 0.2008
    label = torch.tensor([7])
    found = engine.hard_loss(logits, label, label, torch.ones(1), 0.8)
    assert found.item() == pytest.approx(
        -(target * logits[0].log_softmax(0)).sum().item(), rel=1e-5
    )


def test_weight_decay_only_on_tensors_with_more_than_one_dimension():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decayed, free = engine.parameter_groups(model, 0.01)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in free["params"]] == [1, 1, 1, 1]


def test_top1_and_top5():
    logits = torch.arange(6.0).repeat(3, 1)
    assert correct_top1_top5(logits, torch.tensor([5, 1, 0])).tolist() == [1, 2]
    assert correct_top1_top5(logits[:, :3], torch.tensor([0, 1, 2])).tolist() == [1, 3]


def hard_epoch(batch_size: int, grad_accum: int) -> tuple[Linear, engine.EpochResult, list[int]]:
    model, seen = Linear(), []
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=numbers)
    views = draw(ViewSpec(32, batch_size, mix="none"), np.full((8, 2), 32), 0)
    labels = torch.arange(8) // 2
    source = ResidentImages(pixels, TINY, CPU.device)
    trainer = sgd(model, grad_accum, seen.append)
    return model, engine.train_hard_epoch(trainer, source, list(views), labels, 0.1), seen


def test_accumulated_small_batches_step_as_one_large_batch():
    large, _, _ = hard_epoch(batch_size=8, grad_accum=1)
    small, _, seen = hard_epoch(batch_size=2, grad_accum=4)
    assert seen == [2, 2, 2, 2]
    assert torch.allclose(large.layer.weight, small.layer.weight, atol=1e-6)


def test_a_last_smaller_group_is_averaged_over_its_own_batches():
    grouped, _, _ = hard_epoch(batch_size=8, grad_accum=3)
    plain, _, _ = hard_epoch(batch_size=8, grad_accum=1)
    assert torch.allclose(grouped.layer.weight, plain.layer.weight)


def test_an_epoch_reports_means_over_all_views():
    before = Linear()
    _, result, _ = hard_epoch(batch_size=8, grad_accum=1)
    views = draw(ViewSpec(32, 8, mix="none"), np.full((8, 2), 32), 0)
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=numbers)
    inputs = next(ResidentImages(pixels, TINY, CPU.device).render([views]))
    logits, target = before(inputs), (torch.arange(8) // 2)[views.index]
    expected = nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == target).float().mean().item())
    assert result.top5 == 100


def test_evaluation_counts_every_image_once():
    class ByBrightness(nn.Module):
        def forward(self, pixels):
            level = pixels.mean((1, 2, 3))[:, None]
            return torch.cat([-level, level], 1)

    count = engine.EVALUATION_BATCH + 3
    pixels = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    pixels[: count // 2] = 255
    targets = torch.ones(count, dtype=torch.int64)
    centre = torch.tensor([0.5, 0.5, 0.5])
    top1, top5 = engine.evaluate(ByBrightness(), pixels, targets, centre, centre, CPU)
    assert top1 == pytest.approx(100 * (count // 2) / count, rel=1e-6) and top5 == 100
