"""The recipe: what the rule says, that flags win over it, and the moved views that it trains on."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, open_run, train_arguments

from analysis import checks, sweep
from utils import runlog
from utils.data import images
from utils.labels import LabelSet
from validate import recipe, train
from validate.kinds import KINDS, TrainingData, move
from validate.settings import parse_arguments


@pytest.mark.parametrize(
    ("labels_per_image", "classes", "teacher_top1", "schedule", "smoothing"),
    [
        (1, 10, 79.9, "turns", 0.1),
        (1, 10, 80.0, "moved", 0.1),
        (1, 57, 47.8, "turns", 0.1),
        (1, 99, 100.0, "moved", 0.1),
        (1, 100, 0.0, "soft", 0.8),  # log10(100) = 2
        (2, 10, 0.0, "soft", 0.1),
        (2, 9, 100.0, "moved", 0.1),
        (10, 1000, 50.0, "soft", 0.8),
    ],
)
def test_the_rule(labels_per_image, classes, teacher_top1, schedule, smoothing):
    assert recipe.advise(labels_per_image, classes, teacher_top1) == {
        "schedule": schedule,
        "soft_loss_scale": "T2" if schedule == "turns" else "none",
        "temperature": 4.0,
        "label_smoothing": smoothing,
    }


def settings_of(world, folder, *more):
    return open_run(world, folder, *more)[0]


def test_published_is_what_was_published_and_the_default(world, tmp_path):
    default = settings_of(world, tmp_path)
    assert default == settings_of(world, tmp_path, "--recipe", "published")
    assert default.schedule == "soft:1,hard:2,soft:1"
    assert (default.temperature, default.label_smoothing) == (20, 0.8)
    assert default.soft_loss_scale == "none"


def test_auto_is_printed_recorded_and_continued(world, tmp_path, command):
    """Two labels per image of four classes tell 2 x log10(4) = 1.2, and this teacher drifts."""
    top1 = LabelSet.open(world.labels).manifest["teacher_top1"]
    assert top1 < 80
    run = tmp_path / "run"
    done = command(train.main, *train_arguments(world, run, "--recipe", "auto"))
    assert done.code == 0, done.err
    assert (
        "--recipe auto: --schedule turns --soft-loss-scale T2 --temperature 4.0 --label-smoothing "
        f"0.1; 2 labels per image of 4 classes, the teacher right on {top1:.1f} % of the views"
    ) in done.out
    recorded = runlog.RunFolder(run).settings()
    assert recorded["schedule"] == "hard:1,moved:1,hard:1,moved:1"
    assert (recorded["soft_loss_scale"], recorded["temperature"]) == ("T2", 4.0)
    given = ("--schedule", "turns", "--temperature", 4, "--soft-loss-scale", "T2")
    again = command(train.main, *train_arguments(world, run, *given, "--label-smoothing", 0.1))
    assert again.code == 0 and "is done" in again.out


def test_a_flag_given_by_hand_wins_even_at_the_published_value(world, tmp_path, capsys):
    given = ("--schedule", "soft", "--temperature", 20, "--label-smoothing", 0.8)
    settings = settings_of(world, tmp_path, "--recipe", "auto", *given)
    assert (settings.schedule, settings.temperature) == ("soft:4", 20)
    assert (settings.label_smoothing, settings.soft_loss_scale) == (0.8, "T2")
    assert "--recipe auto: --soft-loss-scale T2; 2 labels" in capsys.readouterr().out


def test_a_sweep_leaves_everything_to_the_rule(tmp_path):
    flags = ["--dataset", "digits", "--data-dir", "D", "--val-dir", "V", "--out-dir", str(tmp_path)]
    flags += ["--methods", "auto", "--slc", "5", "--ipc", "5", "--students", "ConvNetW32"]
    task = sweep.run_tasks(sweep.read_settings(flags))[0]
    args = parse_arguments(task.command[1:])
    assert args.recipe == "auto" and args.schedule is None
    assert checks.phases_of(args, passes=1, classes=100) == [("soft", 300)]


def test_auto_without_labels_is_refused(world, tmp_path, command):
    flags = ["--data-dir", world.data, "--val-dir", world.val, "--output-dir", tmp_path / "run"]
    flags += ["--model", "ConvNetW32", "--dataset", "custom", "--input-size", 32]
    done = command(train.main, *flags, "--recipe", "auto")
    assert done.code == 2 and "--recipe auto needs --label-dir" in done.err


def test_an_image_is_moved_down_and_right_with_its_border_repeated_then_mirrored():
    pixels = torch.arange(9.0).view(1, 1, 3, 3).expand(2, 3, 3, 3)
    moved = move(pixels, torch.tensor([[1, -1, 0], [0, 0, 1]]))
    assert moved[0, 0].tolist() == [[1, 2, 2], [1, 2, 2], [4, 5, 5]]
    assert torch.equal(moved[1], pixels[1].flip(2))


def test_a_moved_epoch_has_the_labels_of_the_stored_views_and_their_pixels_moved(world, tmp_path):
    settings, materials = open_run(world, tmp_path, "--schedule", "moved")
    source = images.open_images(
        materials.folder, materials.sizes, settings.facts, CPU.device, workers=0
    )
    data = TrainingData(settings, materials, source, CPU)
    moved, still = [*KINDS["moved"](data).batches(1)], [*KINDS["soft"](data).batches(1)]
    moves = data.moves(1, 15)  # three batches of up to five views
    assert moves[:, :2].abs().max() <= 2 and {*moves[:, 2].tolist()} == {0, 1}
    assert not torch.equal(moves, data.moves(2, 15))
    position = 0
    for one, other in zip(moved, still, strict=True):
        assert torch.equal(one.teacher, other.teacher) and torch.equal(one.own, other.own)
        of_batch = moves[position : position + len(one.pixels)]
        assert torch.equal(one.pixels, move(other.pixels, of_batch))
        position += len(one.pixels)


def test_ranks_move_their_views_differently():
    world = [SimpleNamespace(world=2, rank=rank, device=CPU.device) for rank in range(2)]
    settings, source = SimpleNamespace(seed=0), SimpleNamespace(size=32)
    first, second = (
        TrainingData.moves(SimpleNamespace(machine=machine, settings=settings, source=source), 0, 8)
        for machine in world
    )
    assert first.shape == second.shape == (8, 3) and not torch.equal(first, second)
