"""Data preparation: published files to class folders, by links, checked before anything is made."""

import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import CIFAR10, FashionMNIST

from scripts import prepare_torchvision, prepare_val
from utils import cli
from utils.cli import UserError
from utils.data import folders
from utils.files import whole_folder


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def error_of(monkeypatch, script, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        run(monkeypatch, script, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(root):
    """Every name below a folder: bytes of files, targets of links, None for folders."""
    entries = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            entries[str(path.relative_to(root))] = str(path.readlink())
        else:
            entries[str(path.relative_to(root))] = path.read_bytes() if path.is_file() else None
    return entries


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# CIFAR


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10's format with three training and two validation images; MD5s as published ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    folder = tmp_path / "source" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {
        "data_batch_1": {"data": pixels[:2], "labels": [1, 0]},
        "data_batch_2": {"data": pixels[2:3], "labels": [1]},
        "test_batch": {"data": pixels[3:], "labels": [0, 1]},
        "batches.meta": {"label_names": ["airplane", "automobile"]},
    }
    for name, batch in batches.items():
        (folder / name).write_bytes(pickle.dumps(batch))
    sums = {name: md5(folder / name) for name in batches}
    train = [[name, sums[name]] for name in ("data_batch_1", "data_batch_2")]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return folder.parent, pixels.reshape(5, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_cifar_pixels_labels_and_names_are_the_published_ones(cifar, tmp_path, monkeypatch, inside):
    source, pixels = cifar
    out, before = tmp_path / "out", contents(source)
    arguments = ("--dataset", "cifar10", "--out-dir", out, "--source-dir", source / inside)
    run(monkeypatch, prepare_torchvision, *arguments)
    expected = {
        "train/00000/00001.png": 1,
        "train/00001/00000.png": 0,
        "train/00001/00002.png": 2,
        "val/00000/00000.png": 3,
        "val/00001/00001.png": 4,
    }
    assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == set(expected)
    for name, row in expected.items():
        np.testing.assert_array_equal(np.array(Image.open(out / name)), pixels[row])
    assert folders.scan(out / "train", 2).labels.tolist() == [0, 1, 1]
    assert contents(source) == before


def test_cifar_archive_is_extracted_for_the_run_only(cifar, tmp_path, monkeypatch):
    source, pixels = cifar
    alone, out = tmp_path / "alone", tmp_path / "out"
    alone.mkdir()
    archive = alone / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    run(
        monkeypatch, prepare_torchvision, "--dataset=cifar10", f"--out-dir={out}",
        f"--source-dir={archive}",
    )  # fmt: skip
    np.testing.assert_array_equal(np.array(Image.open(out / "val/00000/00000.png")), pixels[3])
    assert sorted(entry.name for entry in out.iterdir()) == ["dataset.json", "train", "val"]
    assert [entry.name for entry in alone.iterdir()] == [CIFAR10.filename]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["data_batch_2", "batches.meta"])
def test_cifar_file_that_is_not_the_published_one_is_never_unpickled(
    cifar, tmp_path, monkeypatch, name
):
    source, _ = cifar
    bad = source / CIFAR10.base_folder / name
    bad.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    arguments = ("--dataset=cifar10", f"--out-dir={tmp_path / 'out'}", f"--source-dir={source}")
    message = error_of(monkeypatch, prepare_torchvision, *arguments)
    assert str(source) in message and "not as published" in message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]


def test_cifar_archive_with_another_md5_is_not_extracted(tmp_path, monkeypatch):
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(b"not an archive")
    arguments = ("--dataset=cifar10", f"--out-dir={tmp_path / 'out'}", f"--source-dir={tmp_path}")
    message = error_of(monkeypatch, prepare_torchvision, *arguments)
    assert f"{archive} is missing, damaged or not the published file" in message


def test_incomplete_cifar_is_refused(cifar, tmp_path, monkeypatch):
    source, _ = cifar
    (source / CIFAR10.base_folder / "test_batch").unlink()
    arguments = ("--dataset=cifar10", f"--out-dir={tmp_path / 'out'}", f"--source-dir={source}")
    assert "does not hold CIFAR10's" in error_of(monkeypatch, prepare_torchvision, *arguments)


def test_source_folder_without_cifar_is_refused(tmp_path, monkeypatch):
    arguments = ("--dataset=cifar100", f"--out-dir={tmp_path / 'out'}", f"--source-dir={tmp_path}")
    message = error_of(monkeypatch, prepare_torchvision, *arguments)
    assert f"{tmp_path} does not hold CIFAR100's files" in message


def test_failed_download_is_one_line_that_names_the_way_out(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("no\nroute")

    monkeypatch.setitem(prepare_torchvision._SOURCES, "cifar10", offline)
    arguments = ("--dataset=cifar10", f"--out-dir={tmp_path / 'out'}")
    message = error_of(monkeypatch, prepare_torchvision, *arguments)
    assert "(no route)" in message and "--source-dir" in message


# Fashion-MNIST


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Fashion-MNIST's files with two training images and one validation image, and their MD5s."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    folder = tmp_path / "source"
    folder.mkdir()
    for name, rows, labels in (("train", pixels[:2], [1, 0]), ("t10k", pixels[2:], [1])):
        images = struct.pack(">BBBBiii", 0, 0, 8, 3, len(rows), 28, 28) + rows.tobytes()
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        of_images = struct.pack(">BBBBi", 0, 0, 8, 1, len(rows)) + bytes(labels)
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(of_images))
    sums = [(name, md5(folder / name)) for name, _ in FashionMNIST.resources]
    monkeypatch.setattr(FashionMNIST, "resources", sums)
    return folder, pixels


def fashion_arguments(source, out, *more):
    return ("--dataset=fashion_mnist", f"--out-dir={out}", f"--source-dir={source}", *more)


def test_fashion_mnist_keeps_its_pixels_as_rgb(fashion, tmp_path, monkeypatch):
    source, pixels = fashion
    out, before = tmp_path / "out", contents(source)
    run(monkeypatch, prepare_torchvision, *fashion_arguments(source, out))
    expected = {"train/00000/00001.png": 1, "train/00001/00000.png": 0, "val/00001/00000.png": 2}
    assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == set(expected)
    for name, row in expected.items():
        written = np.array(Image.open(out / name))
        np.testing.assert_array_equal(written, np.repeat(pixels[row][..., None], 3, axis=2))
    assert contents(source) == before


def test_fashion_mnist_is_padded_equally_on_all_sides(fashion, tmp_path, monkeypatch):
    source, pixels = fashion
    out = tmp_path / "out"
    run(monkeypatch, prepare_torchvision, *fashion_arguments(source, out, "--size=32"))
    written = np.array(Image.open(out / "val/00001/00000.png"))
    assert written.shape == (32, 32, 3)
    np.testing.assert_array_equal(written[2:30, 2:30, 1], pixels[2])
    assert written.sum() == 3 * pixels[2].sum(dtype=np.int64)


def test_mnist_in_place_of_fashion_mnist_is_refused(fashion, tmp_path, monkeypatch):
    source, _ = fashion
    labels = source / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes())[:-1] + b"\5"))
    message = error_of(monkeypatch, prepare_torchvision, *fashion_arguments(source, tmp_path / "o"))
    assert f"{labels} is missing, damaged or not the published file" in message


def test_missing_file_of_fashion_mnist_is_named(fashion, tmp_path, monkeypatch):
    source, _ = fashion
    (source / "t10k-labels-idx1-ubyte.gz").unlink()
    message = error_of(monkeypatch, prepare_torchvision, *fashion_arguments(source, tmp_path / "o"))
    assert f"{source / 't10k-labels-idx1-ubyte.gz'} is missing" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset=cifar10", "--size=32"), "goes with --dataset fashion_mnist"),
        (("--dataset=fashion_mnist", "--size=31"), "must be even"),
    ],
)
def test_size_that_makes_no_sense_is_refused(tmp_path, monkeypatch, arguments, message):
    out = f"--out-dir={tmp_path / 'out'}"
    assert message in error_of(monkeypatch, prepare_torchvision, *arguments, out)


def test_second_run_says_done_and_changes_nothing(fashion, tmp_path, monkeypatch, capsys):
    source, _ = fashion
    out = tmp_path / "out"
    run(monkeypatch, prepare_torchvision, *fashion_arguments(source, out))
    before = contents(out)
    run(monkeypatch, prepare_torchvision, *fashion_arguments(source, out))
    assert "nothing to do" in capsys.readouterr().out
    assert contents(out) == before


def test_folder_made_with_another_size_is_left_as_it_is(fashion, tmp_path, monkeypatch):
    source, _ = fashion
    out = tmp_path / "out"
    run(monkeypatch, prepare_torchvision, *fashion_arguments(source, out))
    before = contents(out)
    message = error_of(
        monkeypatch, prepare_torchvision, *fashion_arguments(source, out, "--size=32")
    )
    assert "exists already" in message
    assert contents(out) == before


def test_interrupted_writing_starts_over(fashion, tmp_path, monkeypatch):
    source, _ = fashion
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as interrupted:
        interrupted.setattr(prepare_torchvision, "atomic_write", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(interrupted, prepare_torchvision, *fashion_arguments(source, out))
    assert partial.is_dir() and not out.exists()
    (partial / "left").write_bytes(b"over")
    run(monkeypatch, prepare_torchvision, *fashion_arguments(source, out))
    assert not partial.exists() and not (out / "left").exists()
    assert (out / "val/00001/00000.png").is_file()


def test_a_folder_stopped_just_before_it_gets_its_name_is_made_again(tmp_path, monkeypatch):
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(Path, "rename", raise_interrupt)
        with whole_folder(tmp_path / "out") as folder:
            (folder / "a").write_bytes(b"1")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "b").write_bytes(b"2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    assert not (tmp_path / "out.partial").exists()


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_user_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    arguments = fashion_arguments(tmp_path / "no", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["scripts/prepare_torchvision.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(prepare_torchvision.main)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    missing = tmp_path / "no" / "train-images-idx3-ubyte.gz"
    assert error.startswith(f"prepare_torchvision.py: {missing} is missing, damaged or ")
    assert error.count("\n") == 1


# Validation folders: Tiny-ImageNet


def wordnet_ids(count: int) -> list[str]:
    return [f"n{10_000_000 + 7 * number}" for number in range(count)]


@pytest.fixture
def tiny(tmp_path):
    """tiny-imagenet-200 with one validation image per class, the classes in reverse order."""
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for number, name in enumerate(reversed(wordnet_ids(200))):
        (root / "val" / "images" / f"val_{number}.JPEG").write_bytes(f"{number}".encode())
        lines.append(f"val_{number}.JPEG\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def tiny_arguments(root, out, *more):
    labels = root / "val" / "val_annotations.txt"
    return (f"--data-dir={root}/val/images", f"--labels={labels}", f"--out-dir={out}", *more)


def test_tiny_imagenet_is_linked_into_its_classes(tiny, tmp_path, monkeypatch):
    out, before = tmp_path / "out", contents(tiny)
    run(monkeypatch, prepare_val, *tiny_arguments(tiny, out))
    folder = folders.scan(out, 200)
    assert folder.classes == wordnet_ids(200)
    assert [path.name for path in folder.files] == [f"val_{199 - k}.JPEG" for k in range(200)]
    assert folder.files[0].readlink() == tiny / "val" / "images" / "val_199.JPEG"
    assert folder.files[0].read_bytes() == b"199"
    assert contents(tiny) == before


def test_relative_source_gives_absolute_links(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    run(monkeypatch, prepare_val, *tiny_arguments(Path(), tmp_path / "out"))
    link = next((tmp_path / "out").rglob("*.JPEG"))
    assert link.readlink().is_absolute() and link.is_file()


def test_image_without_label_is_named(tiny, tmp_path, monkeypatch):
    extra = tiny / "val" / "images" / "val_200.JPEG"
    extra.write_bytes(b"")
    message = error_of(monkeypatch, prepare_val, *tiny_arguments(tiny, tmp_path / "out"))
    assert f"no label for 1 images, the first: {extra}" in message
    assert not list(tmp_path.glob("out*"))


def test_label_without_image_is_named(tiny, tmp_path, monkeypatch):
    (tiny / "val" / "images" / "val_7.JPEG").unlink()
    message = error_of(monkeypatch, prepare_val, *tiny_arguments(tiny, tmp_path / "out"))
    assert "1 images of" in message and "the first: val_7;" in message


def test_label_that_is_no_wordnet_id_counts_as_none(tiny, tmp_path, monkeypatch):
    annotations = tiny / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace(wordnet_ids(1)[0], "../goldfish"))
    message = error_of(monkeypatch, prepare_val, *tiny_arguments(tiny, tmp_path / "out"))
    assert "no label for 1 images, the first: " in message and "val_199.JPEG" in message


def test_image_listed_twice_is_named(tiny, tmp_path, monkeypatch):
    annotations = tiny / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text() + "val_3.JPEG\tn10000007\n")
    message = error_of(monkeypatch, prepare_val, *tiny_arguments(tiny, tmp_path / "out"))
    assert "gives val_3 twice" in message


def test_folder_that_is_sorted_already_is_refused(tiny, tmp_path, monkeypatch):
    images = tiny / "val" / "images"
    images.rename(tiny / "n10000000")
    images.mkdir()
    (tiny / "n10000000").rename(images / "n10000000")
    message = error_of(monkeypatch, prepare_val, *tiny_arguments(tiny, tmp_path / "out"))
    assert "has no images side by side; if they are in class folders already, use those" in message


def test_missing_folder_and_missing_annotations_are_named(tiny, tmp_path, command):
    arguments = list(tiny_arguments(tiny, tmp_path / "out"))
    done = command(prepare_val.main, f"--data-dir={tmp_path / 'no'}", *arguments[1:])
    assert done.code == 2 and f"{tmp_path / 'no'} has no images" in done.err
    (tiny / "val" / "val_annotations.txt").unlink()
    done = command(prepare_val.main, *arguments)
    assert done.code == 2 and "val_annotations.txt: No such file" in done.err


def test_second_validation_run_says_done(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(monkeypatch, prepare_val, *tiny_arguments(tiny, out))
    before = contents(out)
    run(monkeypatch, prepare_val, *tiny_arguments(tiny, out))
    assert "nothing to do" in capsys.readouterr().out
    assert contents(out) == before


def test_validation_folder_made_otherwise_is_left_as_it_is(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(monkeypatch, prepare_val, *tiny_arguments(tiny, out))
    before = contents(out)
    for listed in tiny.rglob("val_0.*"):
        listed.unlink()
    annotations = tiny / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("val_0.", "val_900."))
    (tiny / "val" / "images" / "val_900.JPEG").write_bytes(b"")
    message = error_of(monkeypatch, prepare_val, *tiny_arguments(tiny, out))
    assert "exists already" in message
    assert contents(out) == before


def test_interrupted_links_start_over(tiny, tmp_path, monkeypatch):
    out, before = tmp_path / "out", contents(tiny)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(prepare_val, "atomic_write", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(interrupted, prepare_val, *tiny_arguments(tiny, out))
    assert (tmp_path / "out.partial").is_dir() and not out.exists()
    run(monkeypatch, prepare_val, *tiny_arguments(tiny, out))
    assert len(folders.scan(out, 200).files) == 200
    assert not (tmp_path / "out.partial").exists()
    assert contents(tiny) == before


# Validation folders: ImageNet-1K

KNOWN = {65: "n01751748", 970: "n09193705", 230: "n02105855", 809: "n04263257", 516: "n03125729"}


def imagenet_ids() -> list[str]:
    """1000 sorted WordNet ids with the published ones of the first five images in their places."""
    ids = []
    for index in range(1000):
        if index in KNOWN:
            ids.append(KNOWN[index])
        else:
            before = max((known for known in KNOWN if known < index), default=None)
            start = 1_440_764 if before is None else int(KNOWN[before][1:]) - before
            ids.append(f"n{start + index:08d}")
    assert ids == sorted(set(ids))
    return ids


IDS = imagenet_ids()
# Sorted index of each image's class: the first five as published, the others once each.
INDEX = [*KNOWN, *(index for index in range(1000) if index not in KNOWN)]
DEVKIT = [IDS[(index * 489 + 3) % 1000] for index in range(1000)]  # an order that is not sorted


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """1000 validation images, one per class."""
    folder = tmp_path_factory.mktemp("flat")
    for number in range(1, 1001):
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(f"{number}".encode())
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def imagenet_arguments(flat, tmp_path, labels: str, name="labels.txt", devkit=None):
    """Arguments with a list of labels and, from the ids in the devkit's order, a meta.mat."""
    (tmp_path / name).write_text(labels)
    arguments = [f"--data-dir={flat}", f"--out-dir={tmp_path / 'out'}"]
    arguments.append(f"--labels={tmp_path / name}")
    if devkit is not None:
        ids = ["n00000000", *devkit]  # number 1001, not a leaf, stands there too
        synsets = np.zeros(len(ids), dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
        for row, number in enumerate(reversed(range(1, len(ids) + 1))):
            synsets[row] = (number, ids[number % len(ids)])
        scipy.io.savemat(tmp_path / "meta.mat", {"synsets": synsets})
        arguments.append(f"--synsets={tmp_path / 'meta.mat'}")
    return arguments


def file_lines(label_of, template="{image}.JPEG {label}\n") -> str:
    return "".join(
        template.format(image=f"ILSVRC2012_val_{number:08d}", label=label_of(index))
        for number, index in enumerate(INDEX, start=1)
    )


def assert_sorted_into(out, classes):
    folder = folders.scan(out, 1000)
    assert folder.classes == classes
    numbers = [INDEX.index(label) + 1 for label in range(1000)]
    expected = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in numbers]
    assert [path.name for path in folder.files] == expected


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("val.txt", file_lines(lambda index: IDS[index])),
        ("paths.txt", file_lines(lambda index: IDS[index], "val/{label}/{image}.JPEG\n")),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\n"
            + file_lines(lambda index: IDS[index], "{image},{label} 1 2 3 4 {label} 5 6 7 8 \n"),
        ),
        (
            "valprep.sh",
            "#!/bin/bash\nmkdir -p n01440764\n"
            + file_lines(lambda index: IDS[index], "mv {image}.JPEG {label}/\n"),
        ),
    ],
)
def test_lists_of_wordnet_ids_are_understood(flat, tmp_path, monkeypatch, name, labels):
    run(monkeypatch, prepare_val, *imagenet_arguments(flat, tmp_path, labels, name))
    assert_sorted_into(tmp_path / "out", IDS)


def devkit_labels() -> str:
    return file_lines(lambda index: DEVKIT.index(IDS[index]) + 1, "{label}\n")


def test_devkit_numbers_with_meta_mat_are_understood(flat, tmp_path, monkeypatch):
    arguments = imagenet_arguments(flat, tmp_path, devkit_labels(), devkit=DEVKIT)
    run(monkeypatch, prepare_val, *arguments)
    assert_sorted_into(tmp_path / "out", IDS)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(devkit_labels(), id="devkit's numbers alone"),
        pytest.param(file_lines(lambda index: index), id="file and number"),
        pytest.param("".join(f"{IDS[index]}\n" for index in INDEX), id="ids alone"),
        pytest.param("", id="empty"),
    ],
)
def test_other_lists_are_refused_by_naming_the_two_forms(flat, tmp_path, monkeypatch, labels):
    message = error_of(monkeypatch, prepare_val, *imagenet_arguments(flat, tmp_path, labels))
    assert "its WordNet id (ILSVRC2012_val_00000001 n01751748)" in message
    assert "the devkit's ground truth together with --synsets" in message


@pytest.mark.parametrize("line", ["0", "1001", "n01440764"])
def test_ground_truth_with_other_lines_names_the_line_and_the_two_forms(
    flat, tmp_path, monkeypatch, line
):
    labels = devkit_labels().splitlines()
    labels[7] = line
    arguments = imagenet_arguments(flat, tmp_path, "\n".join(labels), devkit=DEVKIT)
    message = error_of(monkeypatch, prepare_val, *arguments)
    assert f"number 8, {line!r}, is none" in message and "--labels must be lines" in message


def test_devkit_numbers_in_sorted_order_are_noticed(flat, tmp_path, monkeypatch):
    arguments = imagenet_arguments(flat, tmp_path, devkit_labels(), devkit=IDS)
    message = error_of(monkeypatch, prepare_val, *arguments)
    assert "ILSVRC2012_val_00000001" in message and "it is n01751748" in message
    assert "in another order" in message


def test_ids_beside_the_wrong_images_are_noticed(flat, tmp_path, monkeypatch):
    labels = file_lines(lambda index: IDS[(index + 1) % 1000])
    message = error_of(monkeypatch, prepare_val, *imagenet_arguments(flat, tmp_path, labels))
    assert "it is n01751748" in message


def test_image_with_two_wordnet_ids_is_named(flat, tmp_path, monkeypatch):
    labels = file_lines(lambda index: f"{IDS[index]} {IDS[9]}")
    message = error_of(monkeypatch, prepare_val, *imagenet_arguments(flat, tmp_path, labels))
    assert "gives ILSVRC2012_val_00000001 twice" in message


def test_ground_truth_for_fewer_images_is_refused(flat, tmp_path, monkeypatch):
    labels = "".join(devkit_labels().splitlines(keepends=True)[:-1])
    arguments = imagenet_arguments(flat, tmp_path, labels, devkit=DEVKIT)
    message = error_of(monkeypatch, prepare_val, *arguments)
    assert "no label for 1 images, the first: " in message


def test_damaged_lists_are_named(flat, tmp_path, monkeypatch):
    arguments = imagenet_arguments(flat, tmp_path, devkit_labels())
    synsets = f"--synsets={tmp_path / 'meta.mat'}"
    (tmp_path / "meta.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(300))
    assert "not the devkit's meta.mat" in error_of(monkeypatch, prepare_val, *arguments, synsets)
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\xfa")
    assert "does not say which classes" in error_of(monkeypatch, prepare_val, *arguments)


def test_missing_meta_mat_is_one_line(flat, tmp_path, command):
    arguments = imagenet_arguments(flat, tmp_path, devkit_labels())
    done = command(prepare_val.main, *arguments, f"--synsets={tmp_path / 'no.mat'}")
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert f"{tmp_path / 'no.mat'}: No such file" in done.err


# Numbered class folders


@pytest.mark.parametrize("prefix", ["", "class_", "it's $x "])
def test_the_line_that_refuses_unpadded_folders_renames_them(tmp_path, prefix):
    root = tmp_path / "my images"
    names = [f"{prefix}{label}" for label in range(11)]
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "image.png").write_bytes(name.encode())
    with pytest.raises(UserError, match="scrambled") as refused:
        folders.scan(root)
    command = str(refused.value).partition("equally many digits: ")[2]
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert not done.stdout + done.stderr
    folder = folders.scan(root, 11)
    assert folder.classes == [f"{prefix}{label:05d}" for label in range(11)]
    assert [path.read_bytes().decode() for path in folder.files] == names
