"""The recipe: what the rule says, that flags win over it, and the moved views that it trains on."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, TINY, generate_arguments, open_run, train_arguments
from PIL import Image

from analysis import checks, sweep
from relabel import generate
from relabel.recipe import probe
from utils import recipe, runlog
from utils.data import folders, images
from utils.files import seal
from utils.labels import LabelSet
from utils.labels.manifest import read_manifest
from validate import train
from validate.kinds import KINDS, TrainingData, move
from validate.settings import parse_arguments

LARGE = {"mix": "none", "min_scale": 0.9}


@pytest.mark.parametrize(
    ("top1", "views"),
    [(0, LARGE), (92.9, LARGE), (93, {"mix": "cutmix", "min_scale": 0.08})],
)
def test_labels_go_to_small_crops_only_where_the_teacher_knows_them(top1, views):
    assert recipe.auto_views(top1) == views


class ByBrightness:
    """A teacher of two classes that names the second one for bright views."""

    runtime = CPU

    def logits(self, pixels):
        bright = pixels.mean((1, 2, 3))
        return torch.stack([-bright, bright], dim=1)


def test_the_probe_counts_in_how_many_small_unmixed_crops_the_teacher_is_right(tmp_path):
    """The second class is half white, half black: its crops are as often dark as bright."""
    for name, left, right in (("0", 0, 0), ("1", 0, 255)):
        image = np.full((32, 32, 3), left, dtype=np.uint8)
        image[:, 16:] = right
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "0.png")
    args = SimpleNamespace(batch_size=2, workers=0)
    dataset = dataclasses.replace(TINY, num_classes=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    top1 = probe(args, ByBrightness(), folders.scan(tmp_path), dataset)
    assert 70 < top1 < 80


def test_auto_labels_are_printed_recorded_and_overridden_by_flags(world, tmp_path, command):
    def label(name, *flags):
        arguments = generate_arguments(world.data, tmp_path / name, world.weights, "--slc", 3)
        done = command(generate.main, *arguments, "--recipe", "auto", *flags)
        assert done.code == 0, done.err
        return done.out, LabelSet.open(tmp_path / name).manifest

    said, manifest = label("auto")
    measured = manifest["small_crops_top1"]
    assert measured < 93 and (manifest["mix"], manifest["crop_scale"]) == ("none", [0.9, 1.0])
    assert f"--mix none --min-scale 0.9; the teacher is right on {measured} % of small" in said
    run = train_arguments(world, tmp_path / "run", "--label-dir", tmp_path / "auto")
    told = command(train.main, *run).out
    assert f"{tmp_path / 'auto'} labels views that --recipe auto chose, to train on by" in told
    said, manifest = label("mixed", "--mix", "cutmix")
    assert (manifest["mix"], manifest["crop_scale"]) == ("cutmix", [0.9, 1.0])
    assert "--recipe auto: --min-scale 0.9; " in said
    assert "small_crops_top1" not in manifest  # as these views are not its choice
    said, manifest = label("own", "--mix", "cutmix", "--min-scale", 0.08)
    assert manifest["crop_scale"] == [0.08, 1.0] and "small_crops_top1" not in manifest
    assert "--recipe auto: nothing, as all flags are given\n" in said


def test_a_set_that_is_continued_keeps_what_was_measured(world, tmp_path, command, monkeypatch):
    """Another machine may measure a little more or less; then all files are what they were."""
    arguments = generate_arguments(world.data, tmp_path / "set", world.weights, "--slc", 6)
    arguments += ["--recipe", "auto"]
    monkeypatch.setattr("relabel.recipe.probe", lambda *_: 92.9)
    assert command(generate.main, *arguments).code == 0
    files = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    monkeypatch.setattr("relabel.recipe.probe", lambda *_: 93.1)
    done = command(generate.main, *arguments)
    assert done.code == 0 and "nothing to do" in done.out and "right on 92.9 %" in done.out
    results = {"teacher_top1", "files"}
    begun = read_manifest(tmp_path / "set/manifest.json")
    begun = {key: value for key, value in begun.items() if key not in results}
    (tmp_path / "set/manifest.partial.json").write_bytes(seal(begun))
    (tmp_path / "set/manifest.json").unlink()
    (tmp_path / "set/pass_0001.npz").unlink()
    assert command(generate.main, *arguments).code == 0
    assert files == {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}


def settings_of(world, folder, *more):
    return open_run(world, folder, *more)[0]


def test_published_is_what_was_published_and_the_default(world, tmp_path):
    default = settings_of(world, tmp_path)
    assert default == settings_of(world, tmp_path, "--recipe", "published")
    assert default.schedule == "soft:1,hard:2,soft:1"
    assert (default.temperature, default.label_smoothing) == (20, 0.8)
    assert default.soft_loss_scale == "none"


def test_auto_is_printed_recorded_and_continued(world, tmp_path, command):
    run = tmp_path / "run"
    done = command(train.main, *train_arguments(world, run, "--recipe", "auto"))
    assert done.code == 0, done.err
    assert (
        f"--recipe auto: --schedule moved --temperature 4.0\n{world.labels} labels other views "
        "than --recipe auto: give it to labelling, too\n"
    ) in done.out
    recorded = runlog.RunFolder(run).settings()
    assert (recorded["schedule"], recorded["temperature"]) == ("moved:4", 4.0)
    given = ("--schedule", "moved", "--temperature", 4)
    again = command(train.main, *train_arguments(world, run, *given))
    assert again.code == 0 and "is done" in again.out


def test_a_flag_given_by_hand_wins_even_at_the_published_value(world, tmp_path, capsys):
    settings = settings_of(world, tmp_path, "--recipe", "auto", "--temperature", 20)
    assert (settings.schedule, settings.temperature) == ("moved:4", 20)
    assert (settings.label_smoothing, settings.soft_loss_scale) == (0.8, "none")
    assert "--recipe auto: --schedule moved\n" in capsys.readouterr().out


def test_a_sweep_leaves_everything_to_the_rule(tmp_path):
    flags = ["--dataset", "digits", "--data-dir", "D", "--val-dir", "V", "--out-dir", str(tmp_path)]
    flags += ["--methods", "auto", "--slc", "5", "--ipc", "5", "--students", "ConvNetW32"]
    task = sweep.run_tasks(sweep.read_settings(flags))[0]
    args = parse_arguments(task.command[1:])
    assert args.recipe == "auto" and args.schedule is None
    assert checks.phases_of(args, 5, 100) == [("moved", 300)]


def test_auto_without_labels_is_refused(world, tmp_path, command):
    flags = ["--data-dir", world.data, "--val-dir", world.val, "--output-dir", tmp_path / "run"]
    flags += ["--model", "ConvNetW32", "--dataset", "custom", "--input-size", 32]
    done = command(train.main, *flags, "--recipe", "auto")
    assert done.code == 2 and "schedule moved has moved epochs, which read labels: give" in done.err


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
