"""Shared fixtures: a tiny data set, a teacher that knows it, and commands run in this process."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from utils import cli
from utils.data import datasets, folders
from utils.data.datasets import Dataset
from utils.runtime import Runtime
from validate.kinds import KINDS
from validate.settings import Materials, Settings, parse_arguments, resolve
from validate.step import Step

ROOT = Path(__file__).resolve().parents[1]
CPU = Runtime(torch.device("cpu"), None)
TINY = Dataset("custom", 4, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CUSTOM = (
    *("--dataset", "custom", "--input-size", "32"),
    *("--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"),
)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="per command, in test_faults.py")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """Prints what tests recorded by `record_property`: counts worth seeing."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


def write_images(root: Path, per_class: int, seed: int, classes: int = 4, size: int = 32) -> Path:
    """One folder per class; class c is noise around its own grey level and a bright stripe."""
    numbers = np.random.default_rng(seed)
    for label in range(classes):
        folder = root / f"{label:05d}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            pixels = numbers.normal(60 + 40 * label, 20, (size, size, 3))
            pixels[:, label * size // classes : (label + 1) * size // classes] += 60
            array = pixels.clip(0, 255).astype(np.uint8)
            Image.fromarray(array).save(folder / f"{number}.png")
    return root


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def command(monkeypatch, capsys) -> Callable:
    """command(main, *arguments) -> exit code and output of an entry script's main."""

    def call(main: Callable, *arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.run(main)
        output = capsys.readouterr()
        return SimpleNamespace(code=stopped.value.code, out=output.out, err=output.err)

    return call


def script(*arguments: object, cwd: Path = Path("/"), **options) -> subprocess.CompletedProcess:
    """Runs python with these arguments, from another working directory than the repository."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, **options
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """Distilled images (4 classes, IPC 3), validation images, teacher weights, a label set."""
    root = tmp_path_factory.mktemp("world")
    data = write_images(root / "data", 3, seed=0)
    validation = write_images(root / "val", 5, seed=1)
    weights = root / "teacher.pt"
    _train_teacher(data, weights)
    labels = root / "labels"
    arguments = generate_arguments(data, labels, weights, "--slc", 6)
    assert script(ROOT / "relabel/generate.py", *arguments).returncode == 0
    return SimpleNamespace(root=root, data=data, val=validation, weights=weights, labels=labels)


def generate_arguments(data: Path, labels: Path, weights: Path, *more: object) -> list[object]:
    """Arguments of relabel/generate.py for the tiny data set."""
    return [
        *("--data-dir", data, "--label-dir", labels, "--teacher", "ConvNetW32"),
        *("--teacher-weights", weights, "--batch-size", 5, "--device", "cpu", "--workers", 0),
        *(*CUSTOM, *more),
    ]


def train_arguments(world: SimpleNamespace, output: Path, *more: object) -> list[object]:
    """Arguments of validate/train.py for the tiny data set and its label set.

    Two soft and two hard epochs, unless a schedule among the arguments names its epochs itself.
    """
    named = any(re.match(f"({'|'.join(KINDS)}):", str(word)) for word in more)
    return [
        *("--data-dir", world.data, "--label-dir", world.labels, "--val-dir", world.val),
        *("--output-dir", output, "--model", "ConvNetW32"),
        *(() if named else ("--soft-epochs", 2, "--hard-epochs", 2)),
        *("--eval-every", 2, "--device", "cpu", "--workers", 0),
        *(*CUSTOM, *more),
    ]


def _train_teacher(data: Path, path: Path) -> None:
    from utils.data import images
    from utils.data.views import normalise

    folder = folders.scan(data)
    pixels = images.load_evaluation(folder, TINY).float()
    inputs = normalise(pixels, torch.tensor(TINY.mean), torch.tensor(TINY.std))
    torch.manual_seed(0)
    model = models.build("ConvNetW32", 4, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), folder.labels).backward()
        optimizer.step()
    torch.save(model.state_dict(), path)


@pytest.fixture(scope="session")
def whole_labels(world):
    """One unmixed label of each whole image."""
    path = world.root / "whole"
    arguments = generate_arguments(world.data, path, world.weights, "--slc", 3, "--no-bssl")
    done = script(ROOT / "relabel/generate.py", *arguments, "--mix", "none", "--min-scale", 1)
    assert done.returncode == 0, done.stderr
    return path


class Linear(nn.Module):
    """A linear student: its gradient is easily worked out, and batches do not interact in it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 32 * 32, 4)

    def forward(self, pixels):
        return self.layer(pixels.flatten(1))


def sgd(model: nn.Module) -> Step:
    """Plain gradient steps at rate 0.01."""
    return Step(model, torch.optim.SGD(model.parameters(), lr=0.01), CPU, graphs=False)


def open_run(world: SimpleNamespace, output: Path, *more: object) -> tuple[Settings, Materials]:
    """What validate/train.py makes of `train_arguments`, before it trains."""
    args = parse_arguments([*map(str, train_arguments(world, output, *more))])
    dataset = datasets.from_arguments(args)
    materials = Materials.open(dataset, args.data_dir, args.val_dir, args.label_dir)
    return resolve(args, materials, CPU), materials


@pytest.fixture
def copied(world, tmp_path) -> SimpleNamespace:
    """A copy of the world's label set and images that a test may damage."""
    shutil.copytree(world.data, tmp_path / "data")
    shutil.copytree(world.labels, tmp_path / "labels")
    return SimpleNamespace(
        **{**vars(world), "data": tmp_path / "data", "labels": tmp_path / "labels"}
    )
