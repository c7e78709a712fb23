"""Bad input: one line, exit code 2, and nothing written or changed."""

import errno
import os
import pickle
import shutil
import socket

import numpy as np
import pytest
import torch
from conftest import generate_arguments, train_arguments, tree, write_images
from PIL import Image

from relabel import generate, teacher
from utils import files
from utils.cli import UserError
from utils.data import folders, images
from validate import evaluate, kinds, train


class Code:
    """Something whose pickle would run code when loaded."""

    def __reduce__(self):
        return (print, ("executed",))


def rename_classes(w, *names):
    for folder, new in zip(sorted(w.data.iterdir()), names, strict=True):
        folder.rename(w.data / f"x{new}")
    for folder in list(w.data.iterdir()):
        folder.rename(w.data / folder.name[1:])


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def other_images(w):
    shutil.rmtree(w.data)
    write_images(w.data, 3, seed=9)


def break_manifest(w, **changes):
    path = w.labels / "manifest.json"
    path.write_bytes(files.seal({**files.read_sealed(path), **changes}))


def save(w, content):
    w.weights = w.data.parent / "other.pt"
    torch.save(content, w.weights)


def wrong_class_count(w):
    state = torch.load(w.weights, weights_only=True)
    save(
        w,
        {name: torch.cat([v, v]) if v.ndim and v.shape[0] == 4 else v for name, v in state.items()},
    )


def swap_outputs(w):
    state = torch.load(w.weights, weights_only=True)
    turned = {name: v.roll(1, 0) if 4 in v.shape[:1] else v for name, v in state.items()}
    save(w, turned)


def nan_weights(w):
    state = torch.load(w.weights, weights_only=True)
    save(w, {name: v * float("nan") if v.ndim == 4 else v for name, v in state.items()})


# name: (what happens to a copy of the world, further arguments, part of the message)
GENERATE = {
    "missing folder": (lambda w: shutil.rmtree(w.data), [], "image folder not found"),
    "empty folder": (
        lambda w: [shutil.rmtree(folder) for folder in w.data.iterdir()],
        [],
        "must hold one sub-folder per class",
    ),
    "class without images": (
        lambda w: [file.unlink() for file in (w.data / "00001").iterdir()],
        [],
        "00001 has no images",
    ),
    "scrambled by text order": (
        lambda w: rename_classes(w, "0", "1", "10", "2"),
        [],
        "class order would be scrambled",
    ),
    "scrambled behind a prefix": (
        lambda w: rename_classes(w, "class_0", "class_1", "class_10", "class_2"),
        [],
        "class order would be scrambled",
    ),
    "wrong number of classes": (None, ["--num-classes", 5], "has 4 class folders"),
    "truncated image": (lambda w: truncate(w.data / "00002" / "1.png"), [], "00002/1.png"),
    "zero-byte image": (
        lambda w: (w.data / "00002" / "1.png").write_bytes(b""),
        [],
        "00002/1.png: it is an empty file",
    ),
    "image of floats": (
        lambda w: [
            (w.data / "00002" / "1.png").unlink(),
            Image.new("F", (32, 32)).save(w.data / "00002" / "1.tiff"),
        ],
        [],
        "00002/1.tiff has floating-point, signed or 32-bit pixels",
    ),
    "image of 32 bits": (
        lambda w: [
            (w.data / "00002" / "1.png").unlink(),
            Image.new("I", (32, 32), 70_000).save(w.data / "00002" / "1.tif"),
        ],
        [],
        "00002/1.tif has floating-point, signed or 32-bit pixels",
    ),
    "links in a circle": (
        lambda w: [
            (w.data / "00002" / "1.png").unlink(),
            (w.data / "00002" / "1.png").symlink_to("1.png"),
        ],
        [],
        "00002/1.png is a broken link",
    ),
    "class folder is a broken link": (
        lambda w: (w.data / "00004").symlink_to("nowhere"),
        [],
        "00004 is a broken link",
    ),
    "label folder below a file": (
        None,
        ["--label-dir", "/dev/null/labels"],
        "/dev/null/labels: Not a directory",
    ),
    "uneven classes": (
        lambda w: (w.data / "00003" / "0.png").unlink(),
        [],
        "00003 has 2 images where other classes have 3",
    ),
    "SLC not a multiple of IPC": (None, ["--slc", 4], "not a multiple of IPC, which is 3"),
    "batch of one under BSSL": (
        None,
        ["--batch-size", 11],
        "IPC 3 x 4 classes = 12 images in batches of 11 leave a last batch of one image",
    ),
    "batches of one under BSSL": (None, ["--batch-size", 1], "a last batch of one image"),
    "teacher of other classes": (wrong_class_count, [], "in current model is torch.Size([4,"),
    "weights of another network": (None, ["--teacher", "ResNet18"], "do not fit ResNet18"),
    "weights with code": (lambda w: save(w, {"a": Code()}), [], "nothing in it was executed"),
    "damaged weights": (lambda w: truncate(w.weights), [], "is damaged"),
    "missing weights": (
        None,
        ["--teacher-weights", "no/such.pt"],
        "teacher weights not found: no/such.pt",
    ),
    "no state dict": (lambda w: save(w, [1, 2]), [], "holds no state dict"),
    "too many weights": (None, ["--teacher-weights", "a", "b"], "2 given for 1 teachers"),
    "unknown teacher": (None, ["--teacher", "ResNet19"], "ResNet18"),
    "unknown data set": (None, ["--dataset", "cifar1000"], "did you mean cifar100"),
    "facts of a known data set": (
        None,
        ["--dataset", "cifar10"],
        "goes with --dataset custom; cifar10 has its own",
    ),
    "unknown flag": (None, ["--slcc", 3], "unknown argument --slcc; did you mean --slc"),
    "zero batch size": (None, ["--batch-size", 0], "must be at least 1"),
    "no soft labels": (None, ["--slc", 0], "must be at least 1"),
    "no pixels": (None, ["--input-size", 0], "must be at least"),
    "views of nothing": (None, ["--min-scale", 0], "must be between"),
    "negative workers": (None, ["--workers", -1], "must be at least 0"),
    "unknown precision": (None, ["--amp", "fp8"], "invalid choice: 'fp8'"),
    "unknown codec": (None, ["--codec", "zip"], "invalid choice: 'zip'"),
    "bits of no byte": (None, ["--codec", "quant", "--bits", 0], "--bits"),
    "no teacher counts": (None, ["--teacher-shares", 0], "at least one must be above 0"),
    "a bare pickle with code": (
        lambda w: w.weights.write_bytes(pickle.dumps(Code(), protocol=2)),
        [],
        "nothing in it was executed",
    ),
    "negative seed": (None, ["--seed", -1], "must be between 0 and"),
    "no CUDA": (None, ["--device", "cuda:99"], "CUDA devices here; use --device cpu"),
    "not a device": (None, ["--device", "gpu"], "not a device"),
    "fp16 on a CPU": (None, ["--amp", "fp16"], "needs a GPU"),
    "class order alarm": (swap_outputs, [], "class order is probably scrambled"),
    "NaN teacher": (nan_weights, ["--force"], "NaN or infinite logits in pass 0"),
}

TRAIN = {
    "missing validation": (None, ["--val-dir", "no/such"], "image folder not found: no/such"),
    "other images": (other_images, [], "are those of 12 other images"),
    "other data set": (
        lambda w: break_manifest(w, dataset="cifar10"),
        [],
        "dataset: expected 'custom', found 'cifar10'",
    ),
    "other input size": (None, ["--input-size", 64], "input_size: expected 64, found 32"),
    "other batch size": (None, ["--batch-size", 16], "were made in batches of 5"),
    "other version": (lambda w: break_manifest(w, version=9), [], "reads version 2"),
    "no label set": (None, ["--label-dir", "no/such"], "label folder not found"),
    "damaged manifest": (
        lambda w: (w.labels / "manifest.json").write_text("{"),
        [],
        "is damaged: not JSON",
    ),
    "damaged pass": (
        lambda w: truncate(w.labels / "pass_0000.npz"),
        [],
        "pass_0000.npz is damaged",
    ),
    "incomplete": (lambda w: (w.labels / "pass_0000.npz").unlink(), [], "pass_0000.npz is missing"),
    "SLC too large": (None, ["--slc", 9], "use a multiple of 3 up to 6"),
    "validation of other classes": (
        lambda w: (w.data / "00003").rename(w.data / "00009"),
        [],
        "has 4; the class lists must be the same (in one of",
    ),
    "other normalisation": (None, ["--mean", 0, 0, 0], "mean: expected [0.0, 0.0, 0.0]"),
    "student for larger images": (None, ["--model", "vit_b_16"], "does not take 32-pixel images"),
    "unknown student": (None, ["--model", "ConvNett"], "ConvNet"),
    "unknown schedule": (None, ["--schedule", "hadl"], "unknown schedule 'hadl'"),
    "schedule does not parse": (None, ["--schedule", "soft:x"], "not of the form"),
    "no epochs": (None, ["--soft-epochs", 0, "--hard-epochs", 0], "has no epochs"),
    "soft epochs twice": (
        None,
        ["--schedule", "soft:1,hard:1", "--soft-epochs", 2],
        "--soft-epochs 2: schedule soft:1,hard:1 names its epochs itself",
    ),
    "hard epochs twice": (None, ["--schedule", "hard:1", "--hard-epochs", 0], "--hard-epochs 0: "),
    "schedule with a negative number": (None, ["--schedule", "soft:-1"], "not of the form"),
    "negative rate": (None, ["--lr", -1], "must be at least 0"),
    "no temperature": (None, ["--temperature", 0], "must be at least 0.01"),
    "no batches per step": (None, ["--grad-accum", 0], "must be at least 1"),
    "never evaluated": (None, ["--eval-every", 0], "must be at least 1"),
    "negative epochs": (None, ["--hard-epochs", -5], "must be at least 0"),
    "not a number": (None, ["--lr", "fast"], "'fast' is not a number"),
    "soft labels without labels": (None, ["--slc", 4], "use a multiple of 3 up to 6"),
    "a flag of joint epochs": (None, ["--hard-share", 0.2], "--hard-share is for joint epochs"),
    "a flag of soft epochs": (
        None,
        ["--schedule", "hard:1", "--temperature-end", 4],
        "--temperature-end is for joint or moved or soft or static epochs",
    ),
    "negative smoothing": (None, ["--label-smoothing", -1], "must be between 0 and 1"),
}


def check_refused(done, message, world, before):
    assert done.code == 2, done.err
    lines = [line for line in done.err.splitlines() if line and not line.startswith("relabel:")]
    assert len(lines) == 1 and message in lines[0], done.err
    assert "Traceback" not in done.err and "executed\n" not in done.out
    assert tree(world.data.parent) == before


@pytest.mark.parametrize("case", GENERATE)
def test_generate_refuses(case, copied, tmp_path, command, monkeypatch):
    spoil, more, message = GENERATE[case]
    shutil.copy(copied.weights, tmp_path / "teacher.pt")
    copied.weights = tmp_path / "teacher.pt"
    if spoil:
        spoil(copied)
    before = tree(tmp_path)
    arguments = generate_arguments(copied.data, tmp_path / "new", copied.weights, "--slc", 3)
    done = command(generate.main, *arguments, *more)
    if case == "NaN teacher":  # found while the first pass is made: its folder is there by then
        shutil.rmtree(tmp_path / "new")
    else:
        assert not (tmp_path / "new").exists()
    check_refused(done, message, copied, before)


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses(case, copied, tmp_path, command):
    spoil, more, message = TRAIN[case]
    if spoil:
        spoil(copied)
    before = tree(tmp_path)
    done = command(train.main, *train_arguments(copied, tmp_path / "new", *more))
    assert not (tmp_path / "new").exists()
    check_refused(done, message, copied, before)


def test_a_label_folder_of_other_settings_is_left_alone(copied, tmp_path, command):
    before = tree(tmp_path)
    arguments = generate_arguments(copied.data, copied.labels, copied.weights, "--slc", 3)
    done = command(generate.main, *arguments)
    check_refused(done, "made with other settings (slc: expected 3, found 6)", copied, before)


def test_a_folder_of_something_else_is_left_alone(copied, tmp_path, command):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    before = tree(tmp_path)
    arguments = generate_arguments(copied.data, tmp_path / "thesis", copied.weights, "--slc", 3)
    done = command(generate.main, *arguments)
    check_refused(done, "is not empty and not a label set", copied, before)
    done = command(train.main, *train_arguments(copied, tmp_path / "thesis"))
    check_refused(done, "is not empty and not a run", copied, before)


def test_a_second_writer_is_told_who_is_writing(copied, tmp_path, command):
    arguments = generate_arguments(copied.data, tmp_path / "new", copied.weights, "--slc", 3)
    owner = f"another process (process {os.getpid()} on {socket.gethostname()}) is"
    with files.lock(tmp_path / "new", "testing"):
        before = tree(tmp_path)
        done = command(generate.main, *arguments)
        check_refused(done, f"{owner} writing labels to {tmp_path}/new", copied, before)
        done = command(train.main, *train_arguments(copied, tmp_path / "new"))
        check_refused(done, f"{owner} training in {tmp_path}/new", copied, before)
    assert not (tmp_path / "new").exists()


def test_what_a_killed_process_left_is_in_nobodys_way(copied, tmp_path, command):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / files.LOCK).write_text("process 1 on nowhere")
    (tmp_path / "new" / ".pass_0000.npz.x.hald-temporary").write_text("half")
    arguments = generate_arguments(copied.data, tmp_path / "new", copied.weights, "--slc", 6)
    assert command(generate.main, *arguments).code == 0
    assert tree(tmp_path / "new") == tree(copied.labels)


def test_several_processes_without_torchrun_are_refused(copied, tmp_path, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = tree(tmp_path)
    done = command(train.main, *train_arguments(copied, tmp_path / "new"))
    check_refused(done, "WORLD_SIZE is 2 but RANK is not set", copied, before)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError(2, "No such file or directory", "g++"), "directory: 'g++'); it needs"),
        (
            RuntimeError("C++ compile error\n\nfatal error: Python.h: none\n1 error"),
            "Python.h: none 1 error); it needs",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory"),
    ],
)
def test_what_keeps_the_student_from_being_compiled_is_named(
    copied, tmp_path, command, monkeypatch, error, told
):
    def backend(graph, inputs):
        raise error

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: original(model, backend=backend))
    done = command(train.main, *train_arguments(copied, tmp_path / "run"), "--compile")
    assert done.code == 2 and told in done.err
    assert "Traceback" not in done.err
    done = command(train.main, *train_arguments(copied, tmp_path / "run"))
    assert done.code == 0, done.err


def test_arguments_of_a_run_with_tags_are_not_executed(copied, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_text("settings: !!python/object/apply:print [executed]")
    before = tree(tmp_path)
    done = command(train.main, *train_arguments(copied, tmp_path / "run"))
    check_refused(done, "args.yaml is damaged", copied, before)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("args.yaml", lambda text: text.replace("lr: 0.001", "lr: fast"), "found 'fast'"),
        ("args.yaml", lambda text: text.replace("  seed: 0\n", ""), "damaged or of another"),
        ("result.json", lambda text: '{"best": 1}', "result.json is not what training wrote"),
        ("log.jsonl", lambda text: "5\n", "log.jsonl is damaged (a line is no epoch)"),
        ("checkpoint.pt", None, "checkpoint.pt is not what training wrote: it has no 'optimizer'"),
    ],
)
def test_a_damaged_run_folder_is_told_in_one_line(copied, tmp_path, command, file, change, told):
    run = tmp_path / "run"
    arguments = train_arguments(copied, run, "--schedule", "hard:2")
    assert command(train.main, *arguments).code == 0
    if change:
        (run / file).write_text(change((run / file).read_text()))
    else:
        shutil.copy(run / "best.pt", run / file)
    if file in ("log.jsonl", "checkpoint.pt"):
        (run / "result.json").unlink()
    before = tree(tmp_path)
    check_refused(command(train.main, *arguments), told, copied, before)


def test_a_run_with_other_settings_is_left_alone(copied, tmp_path, command):
    run = tmp_path / "run"
    assert command(train.main, *train_arguments(copied, run, "--schedule", "hard:1")).code == 0
    before = tree(tmp_path)
    for more, field in (
        (("--lr", 0.5), "lr: expected 0.5, found 0.001"),
        (("--schedule", "hard:2"), "schedule: expected 'hard:2', found 'hard:1'"),
        (("--model", "ConvNet"), "model: expected 'ConvNet', found 'ConvNetW32'"),
    ):
        changed = train_arguments(copied, run, "--schedule", "hard:1", *more)
        check_refused(command(train.main, *changed), field, copied, before)


def test_a_damaged_finished_pass_is_named_when_continuing(copied, command):
    (copied.labels / "manifest.json").rename(copied.labels / "manifest.partial.json")
    truncate(copied.labels / "pass_0001.npz")
    before = tree(copied.labels)
    arguments = generate_arguments(copied.data, copied.labels, copied.weights, "--slc", 6)
    done = command(generate.main, *arguments)
    assert done.code == 2 and "pass_0001.npz is damaged" in done.err
    assert tree(copied.labels) == before


def test_nan_loss_stops_and_keeps_the_checkpoint(world, tmp_path, command, monkeypatch):
    monkeypatch.setattr(kinds.Hard, "loss", lambda kind, logits, batch: logits.sum() * torch.nan)
    arguments = train_arguments(world, tmp_path / "run", "--eval-every", 1)
    done = command(train.main, *arguments)
    assert done.code == 2 and "the loss became nan in epoch 2 (hard labels)" in done.err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["reached"]["epochs"] == 1


def test_a_checkpoint_with_code_is_refused(world, tmp_path, command):
    torch.save({"format": "hald-student", "model": Code()}, tmp_path / "c.pt")
    done = command(evaluate.main, "--checkpoint", tmp_path / "c.pt", "--val-dir", world.val)
    assert done.code == 2 and "nothing in it was executed" in done.err


def test_a_checkpoint_that_names_code_needs_confirmation(world, tmp_path, command):
    state = {"format": "hald-student", "network": "os:system", "precision": "off"}
    facts = {"name": "c", "num_classes": 4, "input_size": 32, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    state |= {"dataset": facts, "classes": [*"abcd"], "model": {"weight": torch.zeros(1)}}
    torch.save(state, tmp_path / "c.pt")
    arguments = ("--checkpoint", tmp_path / "c.pt", "--val-dir", world.val)
    done = command(evaluate.main, *arguments)
    assert done.code == 2 and "confirm with --model os:system" in done.err
    done = command(evaluate.main, *arguments, "--model", "os:system")
    assert done.code == 2 and "--model: os:system(num_classes=4) failed: TypeError" in done.err
    # Any of its fields may be missing or of another kind.
    for field, value in {
        "dataset": {**facts, "mean": 0.5},
        "network": 5,
        "classes": ["a"],
        "precision": None,
        "model": {"weight": [1.0]},
    }.items():
        for damaged in ({**state, field: value}, {k: v for k, v in state.items() if k != field}):
            torch.save(damaged, tmp_path / "c.pt")
            done = command(evaluate.main, *arguments)
            told = "not what that writes" if field in damaged else "missing"
            assert done.code == 2 and f"validate/train.py: {field} is {told}" in done.err


def test_unusual_image_files_are_converted(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"):
        ending = "jpg" if mode == "CMYK" else "png"
        path = tmp_path / f"{mode[0]}{len(mode)}.{ending}"
        Image.new(mode, (8, 6), 0).save(path)
        assert images.pixels_of(images.decode(path)).shape == (3, 6, 8)


def test_16_bits_become_8_by_leaving_out_the_lower_ones(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "wide.png")
    pixels = images.pixels_of(images.decode(tmp_path / "wide.png"))
    assert pixels[:, 0].tolist() == [[0, 0, 1, 128, 255]] * 3


def test_implausibly_large_images_are_named(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"big\.png: Image size"):
        images.decode(tmp_path / "big.png")


def test_files_that_are_not_images_are_ignored_and_counted(copied, capsys):
    (copied.data / "00000" / "notes.txt").write_text("x")
    assert len(folders.scan(copied.data).files) == 12
    assert "1 files that are not images are ignored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("distilled", "validation", "fits"),
    [
        (["00000", "00001"], ["n01440764", "n01443537"], True),
        (["cat", "dog"], ["cat", "dog"], True),
        (["00000", "00001"], ["0", "1"], True),
        (["00000", "00001"], ["cat", "dog"], False),
        (["cat", "dog"], ["cat", "cow"], False),
        (["00000", "00001"], ["00000", "00002"], False),
        (["00000", "00001"], ["00000"], False),
    ],
)
def test_class_lists(tmp_path, distilled, validation, fits):
    for name in validation:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    folder = folders.scan(tmp_path)
    if fits:
        folders.check_same_classes(folder, distilled, "labels")
    else:
        with pytest.raises(UserError):
            folders.check_same_classes(folder, distilled, "labels")


def test_a_full_disk_leaves_nothing_half_written(world, tmp_path, command, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    arguments = generate_arguments(world.data, tmp_path / "new", world.weights, "--slc", 3)
    done = command(generate.main, *arguments)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert f"the disk is full at {tmp_path}/new/manifest.partial.json; free some space" in done.err
    assert tree(tmp_path / "new") == {}


def test_running_out_of_gpu_memory_says_which_flag_helps(world, tmp_path, command, monkeypatch):
    def exhausted(self, views):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(teacher.Ensemble, "logits", exhausted)
    arguments = generate_arguments(world.data, tmp_path / "new", world.weights, "--slc", 3)
    done = command(generate.main, *arguments)
    assert (
        done.code == 2
        and "out of GPU memory; relabel with a smaller --views-per-forward" in done.err
    )


def test_a_folder_of_splits_is_not_taken_for_one_of_classes(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split, 1, seed=0)
    with pytest.raises(UserError, match=rf"{tmp_path} holds train, val: give one of these folders"):
        folders.scan(tmp_path)
