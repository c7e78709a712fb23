"""Whole training runs: repeatable, resumable, recorded; evaluation repeats them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, script, train_arguments, tree
from PIL import Image

import models
from utils import cli, runlog
from utils.data import folders, images
from utils.data.images import StreamingImages
from utils.data.views import ViewSpec, draw
from validate import evaluate, kinds, step, train
from validate.settings import phases_of, published_hyper


def weights(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)["model"]


def accuracies(output):
    result = json.loads((output / "result.json").read_text())
    return result["best"], result["last"]


def same_weights(one, other):
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(world, tmp_path, command):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        done = command(train.main, *train_arguments(world, tmp_path / name, "--seed", seed))
        assert done.code == 0, done.err
    assert accuracies(tmp_path / "a") == accuracies(tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_a_stopped_run_continues_to_the_same_weights(world, tmp_path, command, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(train.main, *train_arguments(world, whole)).code == 0

    original = kinds.draw

    def stop_in_the_fourth_epoch(spec, sizes, seed, epoch=0):
        if epoch == 3:
            raise KeyboardInterrupt
        return original(spec, sizes, seed, epoch)

    monkeypatch.setattr(kinds, "draw", stop_in_the_fourth_epoch)
    stopped = command(train.main, *train_arguments(world, parts))
    assert stopped.code == 130 and "the same command again continues" in stopped.err
    assert [line["epoch"] for line in log(parts)] == [1, 2]
    monkeypatch.setattr(kinds, "draw", original)
    done = command(train.main, *train_arguments(world, parts))
    assert done.code == 0 and "continuing after epoch 2 of 4" in done.out
    assert accuracies(whole) == accuracies(parts) and same_weights(whole, parts)
    assert [line["epoch"] for line in log(parts)] == [1, 2, 3, 4]


def test_a_run_stopped_between_two_refills_draws_the_rest_of_the_pool(
    world, tmp_path, command, monkeypatch
):
    """Two passes of three batches: after three epochs of three, half the second shuffle is left."""
    more = ("--schedule", "soft:4", "--eval-every", 1)
    assert command(train.main, *train_arguments(world, tmp_path / "whole", *more)).code == 0
    original = kinds.TrainingData.stored_batches

    def stop_at_the_fourth(data, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return original(data, epoch)

    monkeypatch.setattr(kinds.TrainingData, "stored_batches", stop_at_the_fourth)
    parts = train_arguments(world, tmp_path / "parts", *more)
    assert command(train.main, *parts).code == 130
    monkeypatch.setattr(kinds.TrainingData, "stored_batches", original)
    done = command(train.main, *parts)
    assert done.code == 0 and "continuing after epoch 3 of 4" in done.out
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def heeded():
    """Signals as in a terminal: what a shell starts in the background, or nohup, ignores some."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, earlier)
    signal.signal(signal.SIGHUP, hangup)


def strike(monkeypatch, module, name: str, call: int) -> None:
    """Sends this process a signal at the `call`-th batch that a module counts as correct or not."""
    original, calls = module.hits, []

    def struck(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), getattr(signal, name))
        return original(*arguments)

    monkeypatch.setattr(module, "hits", struck)


def without_times(lines: list[dict]) -> list[dict]:
    return [{key: line[key] for key in line if "second" not in key} for line in lines]


@pytest.fixture
def with_dropout(monkeypatch):
    """A student with dropout, so that the random state counts."""
    build = models.build
    monkeypatch.setattr(
        models, "build", lambda *facts: torch.nn.Sequential(torch.nn.Dropout(0.1), build(*facts))
    )


@pytest.mark.usefixtures("heeded", "with_dropout")
@pytest.mark.parametrize(
    ("name", "batch", "checkpointed", "more"),
    [
        ("SIGTERM", 2, 0, ()),
        ("SIGHUP", 5, 1, ()),
        ("SIGINT", 8, 2, ("--grad-accum", 2)),
        ("SIGUSR1", 11, 2, ("--reset-optimizer",)),
    ],
)
def test_a_signal_ends_after_the_step_and_the_run_continues_from_its_checkpoint(
    world, tmp_path, command, monkeypatch, name, batch, checkpointed, more
):
    """Three batches an epoch; checkpoints after the first epoch and the evaluations at 2 and 4."""
    assert command(train.main, *train_arguments(world, tmp_path / "whole", *more)).code == 0
    parts = train_arguments(world, tmp_path / "parts", *more)
    with monkeypatch.context() as patched:
        strike(patched, step, name, batch)
        stopped = command(train.main, *parts)
    assert stopped.code == 128 + getattr(signal, name)
    assert f"again continues from epoch {checkpointed + 1} of 4" in stopped.err
    done = command(train.main, *parts)
    told = f"continuing after epoch {checkpointed} of 4" if checkpointed else "starting over"
    assert done.code == 0 and told in done.out
    assert accuracies(tmp_path / "whole") == accuracies(tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert without_times(log(tmp_path / "parts")) == without_times(log(tmp_path / "whole"))


def test_a_signal_in_an_evaluation_ends_it(world, tmp_path, command, monkeypatch):
    whole, parts = (train_arguments(world, tmp_path / name) for name in ("whole", "parts"))
    assert command(train.main, *whole).code == 0
    with monkeypatch.context() as patched:
        strike(patched, evaluate, "SIGTERM", 1)
        stopped = command(train.main, *parts)
    assert stopped.code == 143 and "again continues from epoch 2 of 4" in stopped.err
    assert not (tmp_path / "parts" / "best.pt").exists()
    assert command(train.main, *parts).code == 0
    assert accuracies(tmp_path / "whole") == accuracies(tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert [line["epoch"] for line in log(tmp_path / "parts")] == [1, 2, 3, 4]


def test_epochs_are_checkpointed_when_a_minute_has_passed(world, tmp_path, command, monkeypatch):
    """The first one always, so that a run that ends soon has something to continue from."""
    saved, original = [], train.save_tensors

    def save(path, state):
        if path.name == runlog.CHECKPOINT:
            saved.append(state["reached"]["epochs"])
        original(path, state)

    monkeypatch.setattr(train, "save_tensors", save)
    more = ("--schedule", "hard:5", "--eval-every", 4)
    assert command(train.main, *train_arguments(world, tmp_path / "a", *more)).code == 0
    assert saved == [1, 4, 5]
    monkeypatch.setattr(train, "_CHECKPOINT_SECONDS", -1)
    assert command(train.main, *train_arguments(world, tmp_path / "b", *more)).code == 0
    assert saved[3:] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("with_dropout")
def test_streamed_images_leave_the_random_state_alone(world, tmp_path, command, monkeypatch):
    """Stopped within an epoch, with dropout, and images that DataLoaders decode."""
    monkeypatch.setattr(
        images, "open_images", lambda f, _, *facts: StreamingImages(f.files, *facts)
    )
    whole, parts = (train_arguments(world, tmp_path / name) for name in ("whole", "parts"))
    assert command(train.main, *whole).code == 0
    with monkeypatch.context() as patched:
        strike(patched, step, "SIGTERM", 5)
        assert command(train.main, *parts).code == 143
    assert "continuing after epoch 1" in command(train.main, *parts).out
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_to_the_whole_group_leaves_decoding_workers_alive(world, tmp_path):
    """As a job scheduler sends it."""
    shutil.copytree(world.data, tmp_path / "data")
    image = tmp_path / "data" / "00000" / "0.png"
    Image.open(image).resize((40, 40)).save(image)  # images of several sizes are streamed
    streamed = SimpleNamespace(data=tmp_path / "data", labels=world.labels, val=world.val)
    arguments = train_arguments(streamed, tmp_path / "run", "--schedule", "hard:1000")
    arguments[arguments.index("--workers") + 1] = 2
    place = arguments.index("--label-dir")
    del arguments[place : place + 2]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "validate/train.py"), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.01)
    while process.poll() is None and not log(tmp_path / "run"):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143 and "Traceback" not in errors, errors
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_decoding_worker_cannot_be_ended_by_a_signal(world, monkeypatch):
    before, decode = signal.pthread_sigmask(signal.SIG_BLOCK, []), images.decode

    def struck(path):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return decode(path)

    monkeypatch.setattr(images, "decode", struck)
    views = draw(ViewSpec(32, 5), np.full((12, 2), 32), 0)
    streamed = StreamingImages(folders.scan(world.data).files, TINY, torch.device("cpu"), 1)
    assert len(list(streamed.render([views]))) == 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.usefixtures("heeded")
def test_the_same_signal_again_ends_at_once_but_not_within_a_second(
    world, tmp_path, command, monkeypatch
):
    def interrupting_twice(*_):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):  # as wrappers pass them on
            os.kill(os.getpid(), number)
        monkeypatch.setattr(cli, "_REPEAT_SECONDS", -1)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    monkeypatch.setattr(step, "hits", interrupting_twice)
    assert command(train.main, *train_arguments(world, tmp_path / "run")).code == 143
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_the_run_folder_records_everything(world, tmp_path, command):
    output = tmp_path / "run"
    assert command(train.main, *train_arguments(world, output, "--slc", 3)).code == 0
    assert set(tree(output)) == {
        *(
            "args.yaml",
            "log.jsonl",
            "checkpoint.pt",
            "best.pt",
            "curves.png",
            "curves.pdf",
            "result.json",
        )
    }
    recorded = yaml.safe_load((output / "args.yaml").read_text())
    assert recorded["settings"]["passes"] == 1 and recorded["settings"]["lr"] == 0.001
    assert [line["kind"] for line in log(output)] == ["soft", "hard", "hard", "soft"]
    assert [line["epoch"] for line in log(output) if "val_top1" in line] == [2, 4]
    result = json.loads((output / "result.json").read_text())
    assert result["last"]["epoch"] == 4 and result["best"]["top1"] >= result["last"]["top1"]
    names = ("manifest.json", "pass_0000.npz")
    assert result["label_bytes"] == sum((world.labels / name).stat().st_size for name in names)


def test_a_finished_run_says_so_and_changes_nothing(world, tmp_path, command):
    output = tmp_path / "run"
    command(train.main, *train_arguments(world, output))
    before = tree(output)
    again = command(train.main, *train_arguments(world, output))
    assert again.code == 0 and "is done: top-1 best" in again.out
    refused = command(train.main, *train_arguments(world, output, "--temperature", 4))
    assert refused.code == 2 and "temperature: expected 4.0, found 20.0" in refused.err
    off = command(train.main, *train_arguments(world, output, "--resume", "off"))
    assert off.code == 2 and "holds a run already" in off.err
    assert tree(output) == before


def test_evaluate_repeats_the_last_accuracy(world, tmp_path, command):
    output = tmp_path / "run"
    command(train.main, *train_arguments(world, output))
    arguments = ("--checkpoint", output / "checkpoint.pt", "--val-dir", world.val)
    found = command(evaluate.main, *arguments, "--device", "cpu")
    last = json.loads((output / "result.json").read_text())["last"]
    expected = f"top-1 {last['top1']:.4f} %, top-5 {last['top5']:.4f} % of 20 images"
    assert found.code == 0 and expected in found.out


def test_the_balanced_loss_trains_otherwise(world, tmp_path, command):
    command(train.main, *train_arguments(world, tmp_path / "none"))
    scaled = train_arguments(world, tmp_path / "T2", "--soft-loss-scale", "T2")
    assert command(train.main, *scaled).code == 0
    first, second = (log(tmp_path / name)[0]["loss"] for name in ("none", "T2"))
    assert 100 < second / first < 400 * 1.01


def test_hard_labels_alone_need_no_label_set(world, tmp_path, command):
    arguments = [
        *("--data-dir", world.data, "--val-dir", world.val, "--output-dir", tmp_path / "run"),
        *("--model", "ConvNetW32", "--schedule", "hard:1", "--device", "cpu"),
        *("--dataset", "custom", "--input-size", 32, "--mean", 0, 0, 0, "--std", 1, 1, 1),
    ]
    done = command(train.main, *arguments)
    assert done.code == 0, done.err
    assert "; 0 label bytes" in done.out


@pytest.mark.parametrize(
    ("dataset", "model", "ipc", "expected"),
    [
        ("imagenet1k", "ResNet18", 10, (0.001, 2)),
        ("imagenet1k", "resnet18", 50, (0.001, 1)),
        ("imagenet1k", "ResNet50", 30, (0.001, 2)),
        ("imagewoof", "ResNet50", 10, (0.005, 1)),
        ("imagenet1k", "ResNet101", 1, (0.0035, 2)),
        ("imagenet1k", "vit_b_16", 10, (0.001, 2)),
        ("digits", "ConvNet", 10, (0.001, 2)),
    ],
)
def test_published_hyperparameters(dataset, model, ipc, expected):
    assert published_hyper(dataset, model, [ipc] * 3)[:2] == expected


def test_the_entry_that_was_taken_is_named():
    assert "IPC 10 (nearest to IPC 20)" in published_hyper("imagenet1k", "ResNet50", [20, 20])[2]
    assert "default, no entry" in published_hyper("digits", "ConvNet", [5, 5])[2]
    assert "default, no entry" in published_hyper("imagenet1k", "ResNet18", [10, 9])[2]


def test_a_log_line_cut_off_by_a_kill_is_dropped(tmp_path):
    run = runlog.RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.begin({"lr": 1}, 0)
    run.log({"epoch": 1})
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')
    run.begin({"lr": 1}, 1)
    assert run.log_lines() == [{"epoch": 1}]


def test_a_result_is_there_before_anything_is_drawn(world, tmp_path, command, monkeypatch):
    def failing(*_):
        raise ValueError("no picture")

    arguments = train_arguments(world, tmp_path / "run", "--schedule", "hard:1")
    with monkeypatch.context() as patched:
        patched.setattr(runlog, "plot_curves", failing)
        with pytest.raises(ValueError, match="no picture"):
            command(train.main, *arguments)
    assert (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "curves.png").exists()
    again = command(train.main, *arguments)
    assert again.code == 0 and "is done" in again.out
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_kind_without_a_colour_is_drawn_grey():
    score = {"epoch": 1, "top1": 1.0, "top5": 2.0}
    line = {"epoch": 1, "kind": "unheard", "loss": 1.0, "train_top1": 0.0, "val_top1": 1.0}
    result = {"model": "m", "dataset": "d", "best": score, "last": score}
    _, lower = runlog.plot_curves([line], result, {}).axes
    assert [drawn.get_color() for drawn in lower.get_lines()] == ["tab:gray"]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["validate/train", "relabel/generate"])
def test_scripts_and_modules_start_from_anywhere(entry):
    plain = script(ROOT / f"{entry}.py", "--help", cwd=ROOT.parents[-1])
    module = script("-m", entry.replace("/", "."), "--help", cwd=ROOT)
    assert plain.returncode == module.returncode == 0
    assert plain.stdout == module.stdout


def test_soft_epochs_by_themselves(world, tmp_path, command):
    """Two labels per image of four classes tell 2 x log10(4) = 1.2: half of 2 x 2 epochs."""
    arguments = train_arguments(world, tmp_path / "run", "--soft-epochs", "auto")
    done = command(train.main, *arguments)
    assert done.code == 0 and "--soft-epochs auto: 2 soft and 2 hard epochs, for 2" in done.out
    assert [line["kind"] for line in log(tmp_path / "run")] == ["soft", "hard", "hard", "soft"]
    refused = command(train.main, *arguments, "--schedule", "soft:1")
    assert refused.code == 2 and "--soft-epochs auto: schedule soft:1 names its" in refused.err
    refused = command(train.main, *arguments, "--soft-epochs", "many")
    assert refused.code == 2 and "'many' is not a number" in refused.err


def test_one_kind_of_label_takes_all_epochs_however_they_would_be_shared():
    args = SimpleNamespace(schedule="hard", soft_epochs="auto", hard_epochs=3)
    assert phases_of(args, passes=0, classes=4) == [("hard", 6)]
