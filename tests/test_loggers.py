"""Optional loggers, with stand-ins for their packages."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from conftest import train_arguments

from validate import train


@pytest.fixture
def packages(monkeypatch) -> SimpleNamespace:
    """Stand-ins for tensorboard's writer and wandb that note what they are told."""
    told = SimpleNamespace(scalars=[], runs=[], lines=[], folder=None)

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.folder, told.purged_from = folder, purge_step

        def add_scalar(self, name, value, step):
            told.scalars.append((name, value, step))

        def flush(self):
            pass

    def init(**options):
        told.runs.append(options)
        return SimpleNamespace(log=lambda values, step: told.lines.append((values, step)))

    tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    tensorboard.SummaryWriter, wandb.init = SummaryWriter, init
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return told


def test_both_loggers_are_told_every_epoch(world, tmp_path, command, packages):
    more = ("--schedule", "soft:2", "--tensorboard", "--wandb-project", "mine")
    done = command(train.main, *train_arguments(world, tmp_path / "run", *more))
    assert done.code == 0, done.err
    assert packages.folder == str(tmp_path / "run" / "tensorboard")
    assert packages.purged_from == 1
    assert [step for name, _, step in packages.scalars if name == "loss"] == [1, 2]
    assert [step for name, _, step in packages.scalars if name == "val_top1"] == [2]
    (run,) = packages.runs
    assert (run["project"], run["name"], run["resume"]) == ("mine", "run", "allow")
    assert run["config"]["temperature"] == 20
    assert [step for _, step in packages.lines] == [1, 2]
    assert "kind" not in packages.lines[0][0] and "loss" in packages.lines[0][0]


def test_loggers_are_neither_made_nor_imported_unless_asked_for(
    world, tmp_path, command, packages, monkeypatch
):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = train_arguments(world, tmp_path / "run", "--schedule", "soft:1")
    assert command(train.main, *arguments).code == 0
    assert packages.runs == [] and packages.folder is None


@pytest.mark.parametrize(
    ("flags", "package", "module"),
    [
        (("--tensorboard",), "tensorboard", "torch.utils.tensorboard"),
        (("--wandb-project", "p"), "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_one_line(
    world, tmp_path, command, monkeypatch, flags, package, module
):
    monkeypatch.setitem(sys.modules, module, None)
    refused = command(train.main, *train_arguments(world, tmp_path / "run", *flags))
    assert refused.code == 2
    assert refused.err == f"command: {flags[0]} needs the package: pip install {package}\n"
    assert not (tmp_path / "run").exists()
