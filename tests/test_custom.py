"""Custom data sets, whose facts come from their images, and teachers of more classes than one's."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU, TINY, generate_arguments, train_arguments, write_images
from PIL import Image

import models
from relabel import generate
from relabel.teacher import find_subset, load_teacher, training_facts
from scripts import prepare_distilled
from utils.cli import UserError
from utils.data import datasets
from utils.data.datasets import Dataset
from utils.labels import LabelSet
from validate import train


def bare(arguments: list) -> list:
    """Without --input-size, --mean and --std, which come together."""
    arguments = list(map(str, arguments))
    start = arguments.index("--input-size")
    return arguments[:start] + arguments[start + 10 :]


def test_facts_come_from_the_images_and_labels_pass_them_on(world, tmp_path, command, monkeypatch):
    arguments = generate_arguments(world.data, tmp_path / "labels", world.weights, "--slc", 3)
    done = command(generate.main, *bare(arguments), "--force")
    assert done.code == 0, done.err
    files = sorted(world.data.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]).astype(np.float64) / 255
    manifest = LabelSet.open(tmp_path / "labels").manifest
    assert manifest["input_size"] == 32
    assert manifest["mean"] == pytest.approx(pixels.mean((0, 1, 2)), rel=1e-12)
    assert manifest["std"] == pytest.approx(pixels.std((0, 1, 2)), rel=1e-9)
    told = " ".join(f"{value:.4g}" for value in manifest["mean"])
    assert f"4 classes, input size 32, mean {told}" in done.out
    assert f"input size, mean, std from the images in {world.data}" in done.out
    own, world.labels = world.labels, tmp_path / "labels"
    done = command(train.main, *bare(train_arguments(world, tmp_path / "run")))
    world.labels = own
    assert done.code == 0 and "std from the labels in" in done.out, done.err
    # A teacher is shown what it was trained with, whatever it labels.
    write_images(tmp_path / "darker", 3, seed=5, size=40)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    arguments = generate_arguments(tmp_path / "darker", tmp_path / "l", checkpoint, "--slc", 3)
    done = command(generate.main, *bare(arguments), "--force")
    assert done.code == 0 and "from the teacher's checkpoint" in done.out, done.err
    made = LabelSet.open(tmp_path / "l").manifest
    assert (made["input_size"], made["mean"]) == (32, manifest["mean"])
    # From the place where it is looked for, too.
    (tmp_path / "models" / "custom").mkdir(parents=True)
    shutil.copy(checkpoint, tmp_path / "models" / "custom" / "ConvNetW32.pth")
    monkeypatch.setenv("Main_Data_Path", str(tmp_path / "models"))
    place = arguments.index("--teacher-weights")
    del arguments[place : place + 2]
    arguments[arguments.index("--label-dir") + 1] = tmp_path / "same"
    done = command(generate.main, *bare(arguments), "--force")
    assert done.code == 0 and "from the teacher's checkpoint" in done.out, done.err
    assert LabelSet.open(tmp_path / "same").manifest["mean"] == manifest["mean"]


def checkpoint(path, classes=("a", "b", "c", "d"), mean=(0.5, 0.5, 0.5)):
    """A teacher as validate/train.py saves it."""
    facts = Dataset("custom", len(classes), 32, mean, (0.25, 0.25, 0.25))
    state = {"format": "hald-student", "network": "ConvNetW32", "precision": "off"}
    state |= {"dataset": vars(facts), "classes": [*classes]}
    torch.save({**state, "model": models.build("ConvNetW32", len(classes), 32).state_dict()}, path)
    return path


def test_teachers_that_were_trained_with_different_facts_are_refused(tmp_path):
    means = [(0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (0.4, 0.5, 0.5)]
    files = [checkpoint(tmp_path / f"{number}.pth", mean=mean) for number, mean in enumerate(means)]
    open_facts = Dataset("custom", None, None, None, None)
    assert training_facts([], files[:2], open_facts)["mean"] == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match=r"0.pth with mean 0.5 0.5 0.5, not 0.4 0.5 0.5 in .*2.pth"):
        training_facts([], files, open_facts)
    assert training_facts([], files, TINY) is None


def test_facts_that_contradict_the_teachers_own_are_said(tmp_path, capsys):
    load_teacher("ConvNetW32", checkpoint(tmp_path / "t.pth"), TINY, CPU)
    assert capsys.readouterr().out == ""
    shown = dataclasses.replace(TINY, mean=(0.4, 0.5, 0.5))
    load_teacher("ConvNetW32", tmp_path / "t.pth", shown, CPU)
    told = "teacher ConvNetW32 was trained with mean 0.5 0.5 0.5, not 0.4 0.5 0.5\n"
    assert capsys.readouterr().out == told


WORDNET = ("n00000001", "n00000002", "n00000003", "n00000004")


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        ("abcd", "abcd", ""),
        ("abcd", "bacd", "class 0 is 'a' there, 'b' among the images"),
        ("abcd", "abce", "class 3 is 'd' there, 'e' among the images"),
        ("abcd", "wxyz", ""),
        ("abcde", "abcd", "5 classes, not 4"),
        ("0123", WORDNET, ""),
        (WORDNET, ("00000", "00001", "00002", "00003"), ""),
        (WORDNET, (*WORDNET[:3], "n00000009"), "class 3 is 'n00000004' there"),
    ],
)
def test_a_teachers_class_list_is_compared_with_the_images(tmp_path, theirs, ours, told):
    path = checkpoint(tmp_path / "t.pth", theirs)
    load = lambda: load_teacher("ConvNetW32", path, TINY, CPU, classes=[*ours])  # noqa: E731
    if not told:
        assert load().model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
        return
    with pytest.raises(UserError, match=re.escape(f"class list than the images ({told}")):
        load()


def test_a_part_of_a_teachers_classes_is_compared_with_its_own_list(tmp_path):
    listing = tmp_path / "classes.txt"
    listing.write_text("a\nb\nc\nd\ne\n")
    given = {"classes": ["a", "b", "d", "e"], "listing": listing}
    load_teacher("ConvNetW32", checkpoint(tmp_path / "t.pth", "abcde"), TINY, CPU, **given)
    path = checkpoint(tmp_path / "t.pth", "abced")
    with pytest.raises(UserError, match="class 2 is 'e' there, 'd' among the images"):
        load_teacher("ConvNetW32", path, TINY, CPU, **given)


def test_selecting_images_takes_facts_from_the_teacher_or_the_images(tmp_path, world, command):
    flags = ["--data-dir", world.data, "--dataset", "custom", "--teacher", "ConvNetW32", "--ipc", 1]
    flags += ["--crops", 1, "--device", "cpu", "--workers", 0]
    teacher = checkpoint(tmp_path / "t.pth", ("0", "1", "2", "3"), mean=(0.4, 0.5, 0.5))
    for weights, told in (
        (teacher, "mean 0.4 0.5 0.5, std 0.25 0.25 0.25; input size, mean, std from the teacher's"),
        (world.weights, f"input size, mean, std from the images in {world.data}"),
    ):
        out = tmp_path / weights.stem
        done = command(
            prepare_distilled.main, *flags, "--out-dir", out, "--teacher-weights", weights
        )
        assert done.code == 0 and told in done.out, done.err
        assert Image.open(out / "00000" / "00000.png").size == (32, 32)


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (Image.new("RGB", (40, 32)), "needs --input-size: the images in"),
        (Image.new("RGB", (40, 40)), "(heights 32 to 40, widths 32 to 40)"),
    ],
)
def test_images_of_several_sizes_need_an_input_size(copied, tmp_path, command, picture, told):
    picture.save(copied.data / "00000" / "0.png")
    arguments = generate_arguments(copied.data, tmp_path / "new", copied.weights, "--slc", 3)
    done = command(generate.main, *bare(arguments))
    assert done.code == 2 and told in done.err and not (tmp_path / "new").exists()


def test_images_of_one_colour_need_a_standard_deviation(tmp_path, world, command):
    for label in range(4):
        (tmp_path / "d" / str(label)).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "d" / str(label) / "0.png")
    arguments = generate_arguments(tmp_path / "d", tmp_path / "new", world.weights, "--slc", 1)
    done = command(generate.main, *bare(arguments))
    assert done.code == 2 and "give --mean and --std" in done.err


DOGS = [155, 159, 162, 167, 182, 193, 207, 229, 258, 273]  # torchvision's order of ImageNet


@pytest.mark.parametrize("named", ["numbers", "WordNet ids"])
def test_an_imagenet_teacher_labels_imagewoof_by_its_ten_rows(tmp_path, named, capsys):
    torch.manual_seed(0)
    teacher = models.build("ConvNetW32", 1000, 224).eval()
    torch.save(teacher.state_dict(), tmp_path / "t.pth")
    classes = [f"{number:05d}" for number in range(10)]
    if named == "WordNet ids":
        text = "n02086240 n02087394 n02088364 n02089973 n02093754 n02096294 n02099601 n02105641"
        classes = [*text.split(), "n02111889", "n02115641"]
    woof = datasets.named("imagewoof")
    loaded = load_teacher("ConvNetW32", tmp_path / "t.pth", woof, CPU, classes=classes)
    pixels = torch.randn(2, 3, 224, 224)
    assert torch.allclose(loaded.model(pixels), teacher(pixels)[:, DOGS], atol=1e-5)
    assert "10 of its 1000 classes" in capsys.readouterr().out
    # One of ten classes labels by all of them.
    torch.save(models.build("ConvNetW32", 10, 224).state_dict(), tmp_path / "ten.pth")
    ten = load_teacher("ConvNetW32", tmp_path / "ten.pth", woof, CPU, classes=classes)
    assert ten.model(pixels).shape == (2, 10) and "rows" not in ten.model.state_dict()


def test_a_list_of_the_teachers_classes_gives_the_rows(tmp_path):
    listing = tmp_path / "classes.txt"
    listing.write_text("n03 cup\nn01 dog, hound\n\nn07 tree\nn02 car\n")
    data = Dataset("custom", 2, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    subset = find_subset(data, ["n01", "n02"], listing)
    assert (subset.total, subset.rows) == (4, [1, 3])
    teacher = models.build("ConvNetW32", 4, 32).eval()
    torch.save(teacher.state_dict(), tmp_path / "t.pth")
    given = {"classes": ["n01", "n02"], "listing": listing}
    loaded = load_teacher("ConvNetW32", tmp_path / "t.pth", data, CPU, **given)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.allclose(loaded.model(pixels), teacher(pixels)[:, [1, 3]], atol=1e-6)
    with pytest.raises(UserError, match="class folder n05 is none of the classes of --teacher-cl"):
        find_subset(data, ["n01", "n05"], listing)
    listing.write_text("n03\nn01\nn01\nn02\n")
    with pytest.raises(UserError, match="lists n01 more than once"):
        find_subset(data, ["n02", "n03"], listing)
    assert find_subset(data, ["n01", "n02"], None) is None


def test_the_class_order_check_looks_at_as_many_images_as_decide_it(world, tmp_path, command):
    """Of 700 labels to be made: 64 images of all classes, or a tenth where none are recognised."""
    data = write_images(tmp_path / "data", 175, seed=6)
    arguments = generate_arguments(data, tmp_path / "labels", world.weights, "--passes", 1)
    done = command(generate.main, *arguments)
    assert done.code == 0 and "central views of 65 images" in done.out, done.out + done.err
    state = torch.load(world.weights, weights_only=True)
    turned = {name: v.roll(1, 0) if 4 in v.shape[:1] else v for name, v in state.items()}
    torch.save(turned, tmp_path / "turned.pt")
    arguments = generate_arguments(data, tmp_path / "other", tmp_path / "turned.pt", "--passes", 1)
    done = command(generate.main, *arguments)
    assert done.code == 2 and "central views of 70 images" in done.out
    assert "class order is probably scrambled" in done.err
