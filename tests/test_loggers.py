"""Optional loggers, with stand-ins for their packages."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from conftest import train_arguments

from utils import hardware
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


def test_a_result_names_machine_code_hours_and_energy(world, tmp_path, command, monkeypatch):
    """With a stand-in for the driver's library: 36 kJ between any two looks are 10 Wh an epoch."""
    used = iter(range(10**6, 10**9, 36_000_000))

    class Library:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, name, handle):
            assert name == b"GPU-abc"
            handle._obj.value = 7
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
            value._obj.value = next(used)
            return 0

        def nvmlSystemGetDriverVersion(self, text, length):
            text.value = b"570.1"
            return 0

    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        current_device=lambda: 0,
        get_device_name=lambda: "H100",
        get_device_properties=lambda index: SimpleNamespace(uuid="abc"),
    )
    monkeypatch.setattr(hardware, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: Library())
    done = command(train.main, *train_arguments(world, tmp_path / "run", "--schedule", "hard:3"))
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["energy_kwh"] == 0.03 and result["hours"] == round(result["seconds"] / 3600, 4)
    facts = {"processor": hardware.processor(), "gpu": "H100", "driver": "570.1"}
    assert result["machine"] == facts
    assert len(result["git_commit"]) == 40 and result["git_dirty"] in (True, False)


def test_without_a_gpu_a_result_has_no_energy(world, tmp_path, command):
    done = command(train.main, *train_arguments(world, tmp_path / "run", "--schedule", "hard:1"))
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "energy_kwh" not in result and result["machine"]["gpu"] is None


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
