"""Joint and static epochs, pruning, annealing, optimiser reset: against independent numbers."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    TINY,
    Linear,
    open_run,
    sgd,
    train_arguments,
)
from torch import nn

from relabel.teacher import load_teacher
from utils.cli import UserError
from utils.data import folders, images
from utils.data.views import normalise
from utils.labels import LabelSet
from validate import schedule, step, train
from validate.kinds import KINDS, TrainingData, mixed_logits


def probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits / temperature).exp() / (logits / temperature).exp().sum(1, keepdim=True)


def one_hot_smoothed(classes: torch.Tensor, smoothing: float) -> torch.Tensor:
    return F.one_hot(classes, 4).float() * (1 - smoothing) + smoothing / 4


def one_step(world, tmp_path, *more):
    """A gradient step of a Linear on the first batch of the run's first epoch, and that batch."""
    settings, materials = open_run(world, tmp_path / "run", *more)
    facts = (materials.folder, materials.sizes, settings.facts, CPU.device, 0)
    data = TrainingData(settings, materials, images.open_images(*facts), CPU)
    kind = KINDS[settings.kinds[0]](data)
    data.begin_epoch(0)
    batch, stepped = next(kind.batches(0)), Linear()
    sgd(stepped)([batch], kind.loss)
    return stepped, batch, kind


def test_a_joint_epoch_descends_both_losses_on_the_same_stored_views(world, tmp_path):
    more = ("--schedule", "joint", "--temperature", 3, "--soft-loss-scale", "T2")
    more += ("--label-smoothing", 0.2, "--hard-share", 0.7)
    stepped, batch, kind = one_step(world, tmp_path, *more)

    labels = LabelSet.open(world.labels)
    stored = labels[kind.data.stored_batches(0)[0]]
    assert torch.equal(batch.teacher, stored.logits)
    expected = Linear()
    log_student = expected(next(kind.data.source.render([stored.views]))).log_softmax(1)
    own, partner, lam = stored.views.mixture(labels.hard_labels, 32)
    lam = lam[:, None]
    target = lam * one_hot_smoothed(own, 0.2) + (1 - lam) * one_hot_smoothed(partner, 0.2)
    hard = -(target * log_student).sum(1).mean()
    teacher = probabilities(stored.logits, 3.0)
    student = probabilities(log_student, 3.0)
    soft = 9 * (teacher * (teacher.log() - student.log())).sum(1).mean()
    (0.7 * hard + 0.3 * soft).backward()
    gradient = expected.layer.weight.grad
    assert torch.allclose(stepped.layer.weight, expected.layer.weight - 0.01 * gradient, atol=1e-7)


def test_a_static_epoch_mixes_the_labels_of_the_two_images(world, tmp_path, whole_labels):
    more = ("--schedule", "static", "--label-dir", whole_labels, "--temperature", 2)
    stepped, batch, kind = one_step(world, tmp_path, *more, "--seed", 3)

    of_image = LabelSet.open(whole_labels).image_logits(passes=1)
    expected, views = Linear(), kind.data.fresh_views(0)[0]
    assert torch.equal(batch.pixels, next(kind.data.source.render([views])))
    student = probabilities(expected(batch.pixels), 2.0)
    lam = 1 - (views.mix_box[0, 2] * views.mix_box[0, 3]).item() / 32**2
    teacher = lam * probabilities(of_image[views.index], 2.0)
    teacher += (1 - lam) * probabilities(of_image[views.index[views.mix_index]], 2.0)
    (teacher * (teacher.log() - student.log())).sum(1).mean().backward()
    gradient = expected.layer.weight.grad
    assert torch.allclose(stepped.layer.weight, expected.layer.weight - 0.01 * gradient, atol=1e-7)


def test_static_labels_belong_to_whole_images_in_folder_order(world, whole_labels):
    labels = LabelSet.open(whole_labels)
    folder = folders.scan(world.data)
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
    assert torch.allclose(labels.image_logits(passes=1), expected, atol=2e-2)


@pytest.mark.parametrize("lam", [1.0, 0.25, 0.0])
def test_mixed_logits_are_the_mixture_of_probabilities(lam):
    own, partner = torch.randn(2, 3, 5).mul(10)
    mixed = mixed_logits(own, partner, torch.full((3,), lam), 4.0)
    expected = lam * (own / 4).softmax(1) + (1 - lam) * (partner / 4).softmax(1)
    assert torch.allclose((mixed / 4).softmax(1), expected, atol=1e-6)


def test_a_forgetful_adam_steps_like_a_new_one():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    used, new = (torch.optim.AdamW([weight], lr=0.1, fused=True) for weight in weights)
    weights[0].grad = torch.tensor([100.0, -5.0, 0.0])
    used.step()
    step.forget(used)
    weights[0].data.fill_(1)
    for weight, optimizer in zip(weights, (used, new), strict=True):
        weight.grad = torch.tensor([1e-4, 2e-4, 3e-4])
        optimizer.step()
    assert torch.equal(*weights)


def test_the_temperature_falls_by_equal_factors():
    found = [schedule.temperature(epoch, 3, 16, 4) for epoch in range(3)]
    assert found == pytest.approx([16, 8, 4])
    assert schedule.temperature(0, 1, 16, 4) == 16


def test_random_choice_takes_as_many_batches_from_all_passes(world, tmp_path):
    """Two passes of three batches; --slc 3 is one pass."""
    labels = LabelSet.open(world.labels)

    def pool(settings):
        keep = settings.passes * labels.batches_per_pass
        return schedule.label_batches(len(labels), keep, settings.slc_from, settings.seed)

    chosen = [
        open_run(world, tmp_path, "--slc", 3, "--slc-from", "random", "--seed", seed)[0]
        for seed in range(8)
    ]
    pools = [pool(settings) for settings in chosen]
    assert {len(pool) for pool in pools} == {3} and {one.passes for one in chosen} == {1}
    assert set().union(*pools) == set(range(6))
    first, _ = open_run(world, tmp_path, "--slc", 3)
    assert pool(first) == [0, 1, 2] and first.slc_from == "first"


def test_an_optimiser_step_takes_its_batches_and_the_last_what_is_left(world, tmp_path):
    settings, materials = open_run(world, tmp_path, "--schedule", "hard:1", "--grad-accum", 2)
    training = train.Training(settings, materials, CPU)
    kind = training.begin_epoch(0)
    assert [len(together) for together in training.batches(kind, 0)] == [2, 1]


def test_hard_epochs_have_a_batch_size_of_their_own(world, tmp_path):
    """Of 12 images: stored batches of 5, 5, 2; fresh ones of 7 and 5."""
    more = ("--schedule", "soft:1,hard:1", "--hard-batch-size", 7)
    settings, materials = open_run(world, tmp_path, *more)
    training = train.Training(settings, materials, CPU)
    sizes = []
    for epoch in (0, 1):
        batches = training.begin_epoch(epoch).batches(epoch)
        sizes.append([len(batch.pixels) for batch in batches])
    assert sorted(sizes[0]) in ([2, 5, 5], [5, 5, 5], [2, 2, 5]) and sizes[1] == [7, 5]
    with pytest.raises(UserError, match="--hard-batch-size is for hard or static epochs"):
        open_run(world, tmp_path, "--schedule", "soft:1", "--hard-batch-size", 7)


def test_sgd_is_a_step_with_momentum_and_decay_of_matrices_alone():
    """Two steps at rate 0.1 on a gradient of 1, by hand: v = 0.9 v + g + wd w."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    optimizer = step.make_optimizer("sgd", model, lr=0.1, weight_decay=0.5)
    for _ in range(2):
        model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
        optimizer.step()
    assert model.weight.item() == pytest.approx(2 - 0.2 - 0.1 * (0.9 * 2 + 1 + 0.5 * 1.8))
    assert model.bias.item() == pytest.approx(2 - 0.1 - 0.1 * (0.9 + 1))


def test_sgd_wants_a_rate_of_its_own(world, tmp_path):
    with pytest.raises(UserError, match="--optimizer sgd needs --lr"):
        open_run(world, tmp_path, "--optimizer", "sgd")


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
    settings, _ = open_run(world, tmp_path / "run", *static)
    assert settings.view_spec.min_scale == 0.08 and settings.view_spec.mix == "cutmix"
    assert {*settings.kinds} == {"static"}
    done = command(train.main, *train_arguments(world, tmp_path / "run", *static))
    assert done.code == 0, done.err
    refused = command(train.main, *train_arguments(world, tmp_path / "no", "--schedule", "static"))
    assert refused.code == 2 and "--mix none --min-scale 1" in refused.err
    both = (*static, "--schedule", "static:1,soft:1", "--slc", 3, "--slc-from", "random")
    refused = command(train.main, *train_arguments(world, tmp_path / "no", *both))
    assert refused.code == 2 and "without a label" in refused.err


def test_choosing_batches_at_random_needs_a_number(world, tmp_path, command):
    refused = command(train.main, *train_arguments(world, tmp_path / "no", "--slc-from", "random"))
    assert refused.code == 2 and "--slc-from random needs --slc" in refused.err


def test_generate_labels_whole_images_at_min_scale_one(whole_labels):
    views = LabelSet.open(whole_labels).views(0)
    assert views.box.tolist() == [[0, 0, 32, 32]] * len(views.box) and views.mix_index is None


def test_the_optimiser_is_reset_at_each_switch(world, tmp_path, command, monkeypatch):
    resets = []
    monkeypatch.setattr(step, "forget", resets.append)
    more = ("--schedule", "soft:2,hard:1,soft:1", "--reset-optimizer")
    assert command(train.main, *train_arguments(world, tmp_path / "run", *more)).code == 0
    assert len(resets) == 2
