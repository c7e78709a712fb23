"""Names and files of the field: data sets, teachers, checkpoints of the published code."""

import dataclasses

import published_networks
import pytest
import torch
from conftest import CPU, write_images

import models
from relabel.teacher import load_teacher
from utils.cli import UserError
from utils.data import datasets
from validate import evaluate


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        *(("imagenet-nette", "imagenette"), ("imagenet_nette", "imagenette")),
        *(("ImageNette", "imagenette"), ("ImageNet-1K", "imagenet1k"), ("imagenet", "imagenet1k")),
        *(("Tiny-ImageNet", "tiny_imagenet"), ("tiny-imagenet-200", "tiny_imagenet")),
        *(("CIFAR-100", "cifar100"), ("Fashion-MNIST", "fashion_mnist"), ("digits", "digits")),
    ],
)
def test_spellings_of_data_sets(spelling, name):
    assert datasets.named(spelling).name == name


def test_another_data_set_is_still_unknown():
    with pytest.raises(UserError, match="unknown data set 'imagenet21k'"):
        datasets.named("imagenet21k")


@pytest.fixture
def nette(monkeypatch, tmp_path):
    """$Main_Data_Path with a published ResNet18 of imagenette, and that data set at 32 pixels."""
    monkeypatch.setenv("Main_Data_Path", str(tmp_path))
    torch.manual_seed(0)
    published = published_networks.ResNet18()
    (tmp_path / "imagenet-nette").mkdir()
    torch.save(published.state_dict(), tmp_path / "imagenet-nette" / "ResNet18.pth")
    return published, dataclasses.replace(datasets.named("imagenette"), input_size=32)


def test_a_teacher_is_looked_for_in_the_folder_of_its_data_set_first(nette, tmp_path):
    published, dataset = nette
    other = models.build("ResNet18", 10, 32).state_dict()
    torch.save(other, tmp_path / "ResNet18.pth")
    loaded = load_teacher("ResNet18", None, dataset, CPU).model.state_dict()
    assert torch.equal(loaded["fc.weight"], published.linear.weight)
    (tmp_path / "imagenette").mkdir()
    torch.save(other, tmp_path / "imagenette" / "ResNet18.pth")
    loaded = load_teacher("ResNet18", None, dataset, CPU).model.state_dict()
    assert torch.equal(loaded["fc.weight"], other["fc.weight"])
    elsewhere = dataclasses.replace(dataset, name="cifar10")
    assert torch.equal(
        load_teacher("ResNet18", None, elsewhere, CPU).model.fc.weight, other["fc.weight"]
    )


def test_a_teachers_name_may_have_a_suffix_where_its_file_is_there(nette, tmp_path):
    published, dataset = nette
    folder = tmp_path / "imagenet-nette"
    (folder / "ResNet18.pth").rename(folder / "ResNet18_epoch200.pth")
    teacher = load_teacher("ResNet18_epoch200", None, dataset, CPU)
    assert torch.equal(teacher.model.fc.weight, published.linear.weight)
    with pytest.raises(UserError, match="unknown model 'ResNet18_epoch300'"):
        load_teacher("ResNet18_epoch300", None, dataset, CPU)
    wrong = folder / "ResNet50_epoch200.pth"
    (folder / "ResNet18_epoch200.pth").rename(wrong)
    with pytest.raises(UserError, match="do not fit ResNet50"):
        load_teacher("ResNet50_epoch200", None, dataset, CPU)


def test_a_published_checkpoint_is_evaluated_once_it_is_named(tmp_path, command):
    """Ten classes of one grey level each; a ConvNet that says class 3 whatever it sees."""
    network = published_networks.ConvNetW128()
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.copy_(torch.eye(10)[3])
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    checkpoint = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 300, "state_dict": state, "best_acc1": 1.0, "optimizer": {}}, checkpoint)
    images = write_images(tmp_path / "val", 2, seed=0, classes=10)
    arguments = ("--checkpoint", checkpoint, "--val-dir", images, "--device", "cpu")
    unnamed = command(evaluate.main, *arguments)
    assert unnamed.code == 2 and "say with --model and --dataset" in unnamed.err
    named = ("--model", "ConvNetW128", "--dataset", "CIFAR-10")
    done = command(evaluate.main, *arguments, *named)
    assert done.code == 0 and "top-1 10.0000 %" in done.out
    other = command(evaluate.main, *arguments, "--model", "ConvNetW128", "--dataset", "cifar100")
    assert other.code == 2 and "do not fit ConvNetW128" in other.err
