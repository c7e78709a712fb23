"""The cache of decoded validation images: the same pixels, never out of date, never in the way."""

import csv
import errno
import io
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, train_arguments, tree, write_images
from PIL import Image

from utils import files
from utils.cli import UserError
from utils.data import evaluation, folders, images
from utils.data.views import normalise
from utils.metrics import near_chance
from validate import evaluate, train

CPU = torch.device("cpu")


@pytest.fixture
def val(tmp_path) -> Path:
    return write_images(tmp_path / "val", 2, seed=3)


def load(root: Path, cache: Path | str) -> torch.Tensor:
    return evaluation.load(folders.scan(root), TINY, CPU, str(cache))


def decoded(root: Path) -> torch.Tensor:
    return images.load_evaluation(folders.scan(root), TINY)


def forbid_decoding(patch: pytest.MonkeyPatch) -> None:
    def decode(path):
        raise AssertionError(f"{path} is decoded again")

    patch.setattr(images, "decode", decode)


@pytest.mark.filterwarnings("error")
def test_the_cache_gives_the_decoded_pixels_without_decoding_again(
    val, tmp_path, monkeypatch, capsys
):
    expected, before = decoded(val), tree(val)
    assert torch.equal(load(val, tmp_path / "new" / "cache"), expected)
    assert "decoded images are kept in" in capsys.readouterr().out
    forbid_decoding(monkeypatch)
    again = load(val, tmp_path / "new" / "cache")
    assert torch.equal(again, expected) and again.dtype == torch.uint8
    assert tree(val) == before  # nothing is written beside the images


def test_a_cache_file_is_an_ordinary_array(val, tmp_path):
    expected = decoded(val).numpy()
    load(val, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    stored = np.load(path)
    assert stored.dtype == np.uint8 and np.array_equal(stored, expected)


def test_writing_to_the_pixels_does_not_reach_the_file(val, tmp_path):
    for _ in range(2):
        pixels = load(val, tmp_path / "cache")
        assert torch.equal(pixels, decoded(val))
        pixels.zero_()


@pytest.mark.parametrize("changed", ["time", "size"])
def test_another_time_or_size_of_an_image_is_noticed(val, tmp_path, changed):
    load(val, tmp_path / "cache")
    path = val / "00001" / "0.png"
    facts = path.stat()
    Image.new("RGB", (32, 32), "white").save(path)
    size, moved = (facts.st_size, 1) if changed == "time" else (facts.st_size + 1, 0)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + moved))
    again = load(val, tmp_path / "cache")
    assert torch.equal(again, decoded(val)) and (again[2] == 255).all()


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_another_list_of_files_is_noticed(val, tmp_path, change):
    load(val, tmp_path / "cache")
    one = val / "00002" / "0.png"
    if change == "removed":
        one.unlink()
    else:
        (one.rename if change == "renamed" else lambda to: shutil.copy(one, to))(
            one.with_name("7.png")
        )
    assert torch.equal(load(val, tmp_path / "cache"), decoded(val))


def test_another_decoder_is_noticed(val, tmp_path, monkeypatch):
    load(val, tmp_path / "cache")
    monkeypatch.setattr(evaluation.PIL, "__version__", "0")
    forbid_decoding(monkeypatch)
    with pytest.raises(AssertionError, match="decoded again"):
        load(val, tmp_path / "cache")


def test_a_file_that_is_not_whole_is_made_again(val, tmp_path):
    load(val, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    good = path.read_bytes()
    damaged = [b"[]" + good[2:], good.replace(b"}", b" ", 1), np_file(3, 4)]
    for content in (good[:-1], good[:40], b"", good[128:], *damaged):
        path.write_bytes(content)
        assert torch.equal(load(val, tmp_path / "cache"), decoded(val))
        assert path.read_bytes() == good


def np_file(*shape: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype=np.uint8))
    return file.getvalue()


def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(path, *_, **__):
    raise OSError(errno.EROFS, "Read-only file system", str(path))


def test_the_folder_of_a_user_who_is_unknown_is_one_of_that_name(val, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(val, "~nobody-of-that-name/cache")
    assert len(list((tmp_path / "~nobody-of-that-name" / "cache").iterdir())) == 1


@pytest.mark.parametrize("obstacle", ["file in the way", "full", "fills up", "read-only"])
def test_whatever_keeps_the_cache_from_being_written_costs_only_time(
    val, tmp_path, monkeypatch, capsys, obstacle
):
    cache = tmp_path / "cache"
    if obstacle == "file in the way":
        cache.write_text("not a folder")
    elif obstacle == "full":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    elif obstacle == "fills up":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        monkeypatch.setattr(Path, "mkdir", read_only)
    assert torch.equal(load(val, cache), decoded(val))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("decoded validation images are not cached: ")
    assert not cache.is_dir()


def test_pixels_of_images_that_change_while_they_are_decoded_are_not_used_again(
    val, tmp_path, monkeypatch
):
    changing = val / "00000" / "0.png"
    original = images.decode

    def decode(path):
        image = original(path)
        if path == changing:
            Image.new("RGB", (32, 32), "white").save(path)
        return image

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", decode)
        load(val, tmp_path / "cache")
    assert torch.equal(load(val, tmp_path / "cache"), decoded(val))


def test_a_second_process_waits_for_the_first(val, tmp_path, monkeypatch, capsys):
    cache, loaded, waits = tmp_path / "cache", [], threading.Event()
    monkeypatch.setattr(evaluation.time, "sleep", lambda _: waits.set())
    with files.lock(cache, "decoding"):
        second = threading.Thread(target=lambda: loaded.append(load(val, cache)))
        second.start()
        assert waits.wait(60)
    second.join()
    assert capsys.readouterr().out.count("waiting: another process") == 1
    assert torch.equal(loaded[0], decoded(val))


def test_accuracies_per_class_agree_with_top1_where_logits_are_equal(
    world, tmp_path, command, monkeypatch
):
    """In half precision many are: here each is 0 or 1."""

    class Undecided(torch.nn.Module):
        def forward(self, images):
            shape, generator = (len(images), 4), torch.Generator().manual_seed(0)
            return torch.randint(2, shape, generator=generator).half()

    saved = {"precision": "off", "dataset": vars(TINY), "classes": None}
    monkeypatch.setattr(evaluate, "load_student", lambda *_: (Undecided(), saved))
    arguments = ["--checkpoint", tmp_path / "c.pt", "--val-dir", world.val, "--device", "cpu"]
    done = command(evaluate.main, *arguments, "--json", "--per-class")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert np.mean([*result["per_class"].values()]) == pytest.approx(result["top1"])


def test_a_custom_data_set_is_not_evaluated_by_name(tmp_path, command):
    done = command(evaluate.main, "--checkpoint", "c", "--val-dir", "v", "--dataset", "custom")
    assert done.code == 2 and "name a data set that has them" in done.err


def test_evaluate_reports_the_same_from_the_cache(world, tmp_path, command):
    assert command(train.main, *train_arguments(world, tmp_path / "run")).code == 0
    arguments = ["--checkpoint", tmp_path / "run" / "best.pt", "--val-dir", world.val]
    arguments += ["--device", "cpu", "--val-cache"]
    plain = command(evaluate.main, *arguments, "off")
    for _ in range(2):
        cached = command(evaluate.main, *arguments, tmp_path / "cache")
        assert cached.code == 0 and plain.out in cached.out
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_accuracy_per_class_and_the_confusion_matrix(world, tmp_path, command, monkeypatch):
    """Against predictions made image by image."""
    drawn, save = [], evaluate.save_figure
    monkeypatch.setattr(evaluate, "save_figure", lambda *it: drawn.append(it[0]) or save(*it))
    assert command(train.main, *train_arguments(world, tmp_path / "run")).code == 0
    checkpoint = tmp_path / "run" / "best.pt"
    arguments = ["--checkpoint", checkpoint, "--val-dir", world.val, "--device", "cpu"]
    done = command(evaluate.main, *arguments, "--json", "--per-class", tmp_path / "classes")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    model, _ = evaluate.load_student(checkpoint)
    folder, expected = folders.scan(world.val), np.zeros((4, 4), dtype=int)
    for pixels, label in zip(decoded(world.val), folder.labels.tolist(), strict=True):
        inputs = normalise(pixels[None].float(), torch.tensor(TINY.mean), torch.tensor(TINY.std))
        expected[label, int(model.eval()(inputs).argmax())] += 1
    with (tmp_path / "classes" / "confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [[int(row[name]) for name in folder.classes] for row in rows] == expected.tolist()
    assert result["images"] == 20 and result["top1"] == pytest.approx(5 * expected.trace())
    assert [*result["per_class"].values()] == pytest.approx((20 * expected.diagonal()).tolist())
    assert {"per_class.csv", "confusion.png", "confusion.pdf"} <= set(tree(tmp_path / "classes"))
    axes, _ = drawn[0].axes
    assert np.allclose(axes.get_images()[0].get_array(), 20 * expected)


@pytest.mark.parametrize(
    ("correct", "count", "classes", "doubtful"),
    [
        (9, 12, 3, False),  # 75 % of three classes
        (4, 12, 3, True),
        (7, 12, 3, True),
        (29, 40, 2, True),
        (31, 40, 2, False),
        (20, 1000, 1000, False),
        (4, 1000, 1000, True),
        (240, 1000, 10, True),
        (260, 1000, 10, False),
        (3, 3, 3, False),
    ],
)
def test_when_accuracy_is_near_that_of_guessing(correct, count, classes, doubtful):
    assert near_chance(correct, count, classes) == doubtful


def test_small_sets_are_not_cached_unless_asked(val, tmp_path, monkeypatch):
    monkeypatch.delenv("Main_Data_Path", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert torch.equal(load(val, "auto"), load(val, "off"))
    assert not (tmp_path / "user").exists()
    monkeypatch.setattr(evaluation, "_SMALLEST", 1)
    load(val, "auto")
    assert len(list((tmp_path / "user" / "hald").iterdir())) == 1
    monkeypatch.setenv("Main_Data_Path", str(tmp_path / "data"))
    load(val, "auto")
    assert len(list((tmp_path / "data" / "cache").iterdir())) == 1


def test_more_images_than_memory_are_refused_in_one_line(val, monkeypatch):
    monkeypatch.setattr(images, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="--val-cache"):
        load(val, "off")


def test_an_unreadable_image_is_named(val, tmp_path):
    (val / "00000" / "0.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"00000/0\.png"):
        load(val, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_files_are_mapped_ahead_by_a_few_only(monkeypatch):
    started = []
    monkeypatch.setattr(images, "usable_cores", lambda: 2)
    results = images.map_files(lambda item: started.append(item) or item, range(1000), "")
    assert next(results) == 0 and len(started) <= 8 * 2 + 1
    assert list(results) == list(range(1, 1000))


@pytest.mark.gpu
def test_a_gpu_with_room_gets_the_pixels(val, tmp_path):
    folder, device = folders.scan(val), torch.device("cuda")
    pixels = evaluation.load(folder, TINY, device, str(tmp_path / "cache"))
    assert pixels.is_cuda and torch.equal(pixels.cpu(), decoded(val))
