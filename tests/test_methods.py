"""Joint and static epochs, pruning, annealing, optimiser reset: against independent numbers."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, ROOT, TINY, Linear, generate_arguments, script, sgd, train_arguments
from torch import nn

from relabel.teacher import load_teacher
from utils.data import images
from utils.data.views import ViewSpec, draw, normalise
from utils.labels import LabelSet
from validate import engine, schedule, train
from validate.plan import make_plan, parse_arguments


@pytest.fixture(scope="module")
def resident(world):
    folder = images.scan(world.data)
    sizes, _ = images.inspect(folder)
    return images.open_images(folder, sizes, TINY, CPU.device, 0)


@pytest.fixture(scope="module")
def whole_labels(world):
    """One unmixed label of each whole image."""
    path = world.root / "whole"
    arguments = generate_arguments(world.data, path, world.weights, "--slc", 3, "--no-bssl")
    done = script(ROOT / "relabel/generate.py", *arguments, "--mix", "none", "--min-scale", 1)
    assert done.returncode == 0, done.stderr
    return path


def probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits / temperature).exp() / (logits / temperature).exp().sum(1, keepdim=True)


def one_hot_smoothed(classes: torch.Tensor, smoothing: float) -> torch.Tensor:
    return F.one_hot(classes, 4).float() * (1 - smoothing) + smoothing / 4


def test_a_joint_epoch_descends_both_losses_on_the_same_stored_views(world, resident):
    labels = LabelSet.open(world.labels)
    stepped = Linear()
    engine.train_joint_epoch(sgd(stepped), resident, labels, [4], 3.0, "T2", 0.2, 0.7)

    expected, batch = Linear(), labels[4]
    log_student = expected(next(resident.render([batch.views]))).log_softmax(1)
    own, partner, lam = batch.views.mixture(labels.hard_labels, 32)
    lam = lam[:, None]
    target = lam * one_hot_smoothed(own, 0.2) + (1 - lam) * one_hot_smoothed(partner, 0.2)
    hard = -(target * log_student).sum(1).mean()
    teacher = probabilities(batch.logits, 3.0)
    student = probabilities(log_student, 3.0)
    soft = 9 * (teacher * (teacher.log() - student.log())).sum(1).mean()
    (0.7 * hard + 0.3 * soft).backward()
    step = 0.01 * expected.layer.weight.grad
    assert torch.allclose(stepped.layer.weight, expected.layer.weight - step, atol=1e-7)


def test_a_static_epoch_mixes_the_labels_of_the_two_images(world, resident, whole_labels):
    labels = LabelSet.open(whole_labels)
    of_image = engine.static_labels(labels)
    views = draw(ViewSpec(32, 5), np.full((12, 2), 32), seed=3, epoch=1)
    stepped = Linear()
    engine.train_static_epoch(sgd(stepped), resident, [views[0]], labels, of_image, 2.0, "none")

    expected, one = Linear(), views[0]
    student = probabilities(expected(next(resident.render([one]))), 2.0)
    lam = 1 - (one.mix_box[0, 2] * one.mix_box[0, 3]).item() / 32**2
    teacher = lam * probabilities(of_image[one.index], 2.0)
    teacher += (1 - lam) * probabilities(of_image[one.index[one.mix_index]], 2.0)
    (teacher * (teacher.log() - student.log())).sum(1).mean().backward()
    step = 0.01 * expected.layer.weight.grad
    assert torch.allclose(stepped.layer.weight, expected.layer.weight - step, atol=1e-7)


def test_static_labels_belong_to_whole_images_in_folder_order(world, whole_labels):
    labels = LabelSet.open(whole_labels)
    folder = images.scan(world.data)
    pixels = images.load_evaluation(folder, TINY).float()
    teacher = load_teacher("ConvNetW32", world.weights, TINY, CPU).model.eval()
    flips = torch.zeros(12, dtype=torch.bool)
    for number in range(len(labels)):
        flips[labels.views(number).index] = labels.views(number).flip
    pixels[flips] = pixels[flips].flip(3)
    mean, std = torch.tensor(TINY.mean), torch.tensor(TINY.std)
    with torch.no_grad():
        logits = teacher(normalise(pixels, mean, std))
    expected = logits - logits.mean(1, keepdim=True)
    assert torch.allclose(engine.static_labels(labels), expected, atol=2e-2)


@pytest.mark.parametrize("lam", [1.0, 0.25, 0.0])
def test_mixed_logits_are_the_mixture_of_probabilities(lam):
    own, partner = torch.randn(2, 3, 5).mul(10)
    found = engine.mixed_logits(own, partner, torch.full((3,), lam), 4.0)
    expected = lam * (own / 4).softmax(1) + (1 - lam) * (partner / 4).softmax(1)
    assert torch.allclose((found / 4).softmax(1), expected, atol=1e-6)


def test_a_forgetful_adam_steps_like_a_new_one():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    used, new = (torch.optim.AdamW([weight], lr=0.1, fused=True) for weight in weights)
    weights[0].grad = torch.tensor([100.0, -5.0, 0.0])
    used.step()
    engine.forget(used)
    weights[0].data.fill_(1)
    for weight, optimizer in zip(weights, (used, new), strict=True):
        weight.grad = torch.tensor([1e-4, 2e-4, 3e-4])
        optimizer.step()
    assert torch.equal(*weights)


def test_the_temperature_falls_by_equal_factors():
    found = [schedule.temperature(epoch, 3, 16, 4) for epoch in range(3)]
    assert found == pytest.approx([16, 8, 4])
    assert schedule.temperature(0, 1, 16, 4) == 16


def test_pruning_keeps_so_many_different_batches():
    kept = schedule.pruned(40, 10, seed=1)
    assert len(set(kept)) == 10 and kept == sorted(kept) and set(kept) <= set(range(40))
    assert kept != schedule.pruned(40, 10, seed=2) and kept == schedule.pruned(40, 10, seed=1)


def plan_of(world, tmp_path, *more):
    arguments = train_arguments(world, tmp_path / "run", *more)
    return make_plan(parse_arguments([*map(str, arguments)]))


def test_random_choice_takes_as_many_batches_from_all_passes(world, tmp_path):
    """Two passes of three batches; --slc 3 is one pass."""
    chosen = [
        plan_of(world, tmp_path, "--slc", 3, "--slc-from", "random", "--seed", seed)
        for seed in range(8)
    ]
    assert all(len(plan.batch_numbers) == 3 and plan.settings["passes"] == 1 for plan in chosen)
    assert set().union(*(plan.batch_numbers for plan in chosen)) == set(range(6))
    first = plan_of(world, tmp_path, "--slc", 3)
    assert first.batch_numbers == [0, 1, 2]
    assert chosen[0].settings["slc_from"] == "random" and "slc_from" not in first.settings


def test_a_run_of_every_new_kind_records_what_it_used(world, tmp_path, command):
    more = ("--schedule", "joint:1,hard:1,soft:1", "--hard-share", 0.25, "--temperature-end", 2)
    arguments = train_arguments(world, tmp_path / "run", *more, "--reset-optimizer")
    done = command(train.main, *arguments, "--slc", 3, "--slc-from", "random")
    assert done.code == 0, done.err
    recorded = (tmp_path / "run" / "args.yaml").read_text()
    for line in (
        *("slc_from: random", "temperature_end: 2.0", "reset_optimizer: true"),
        "hard_share: 0.25",
    ):
        assert f"  {line}\n" in recorded
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    one_pass = ("manifest.json", "pass_0000.npz")
    assert result["label_bytes"] == sum((world.labels / name).stat().st_size for name in one_pass)


def test_the_static_method_trains_on_random_crops_of_labelled_whole_images(
    world, whole_labels, tmp_path, command
):
    static = ("--label-dir", whole_labels, "--schedule", "static", "--soft-loss-scale", "T2")
    plan = plan_of(world, tmp_path, *static)
    assert plan.spec.min_scale == 0.08 and plan.spec.mix == "cutmix"
    assert {*plan.kinds} == {"static"}
    done = command(train.main, *train_arguments(world, tmp_path / "run", *static))
    assert done.code == 0, done.err
    refused = command(train.main, *train_arguments(world, tmp_path / "no", "--schedule", "static"))
    assert refused.code == 2 and "--mix none --min-scale 1" in refused.err
    refused = command(
        train.main,
        *train_arguments(world, tmp_path / "no", *static, "--slc", 3, "--slc-from", "random"),
    )
    assert refused.code == 2 and "without a label" in refused.err


def test_choosing_batches_at_random_needs_a_number(world, tmp_path, command):
    refused = command(train.main, *train_arguments(world, tmp_path / "no", "--slc-from", "random"))
    assert refused.code == 2 and "--slc-from random needs --slc" in refused.err


def test_generate_labels_whole_images_at_min_scale_one(whole_labels):
    views = LabelSet.open(whole_labels).views(0)
    assert views.box.tolist() == [[0, 0, 32, 32]] * len(views.box) and views.mix_index is None


def test_the_optimiser_is_reset_at_each_switch(world, tmp_path, command, monkeypatch):
    resets = []
    monkeypatch.setattr(engine, "forget", resets.append)
    more = ("--schedule", "soft:2,hard:1,soft:1", "--reset-optimizer")
    assert command(train.main, *train_arguments(world, tmp_path / "run", *more)).code == 0
    assert len(resets) == 2
