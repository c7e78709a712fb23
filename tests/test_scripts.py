"""The shell scripts: what they check before any work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tree
from PIL import Image

from analysis import sweep
from analysis.plan import known_methods
from utils.files import read_json


def bash(script: str, *arguments: str, **settings: object) -> subprocess.CompletedProcess:
    ours = {"TEACHER_WEIGHTS", "RELABEL_FLAGS", "RUN_NAME"}
    cleared = {name: value for name, value in os.environ.items() if name not in ours}
    environment = {**cleared, **{name: str(value) for name, value in settings.items()}}
    command = ["bash", str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


PIPELINES = ["imagenet", "tiny_imagenet", "cifar100", "cifar10", "imagenette", "imagewoof"]


@pytest.mark.parametrize("script", [f"run_{name}.sh" for name in PIPELINES])
def test_an_untouched_configuration_is_explained(script):
    done = bash(script, Main_Data_Path="", val_dir="")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "set Main_Data_Path" in done.stderr and "scripts/run_demo.sh" in done.stderr


def test_the_defaults_that_config_names_are_those_of_the_pipeline():
    named = re.findall(r"^# ([A-Z_]+)=(\S*)", (ROOT / "config.sh").read_text(), re.MULTILINE)
    pipeline = (ROOT / "scripts" / "pipeline.sh").read_text()
    given = re.search(r"read_config((?:.*\\\n)*.*)", pipeline)[1]
    used = re.findall(r"\b([A-Z_]+)=(\S+)", given)
    assert len(named) > 10 and dict(named) == {name: value.strip('"') for name, value in used}


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    done = bash("run_cifar100.sh", Main_Data_Path=tmp_path / "a", val_dir=tmp_path / "b", IPC=7)
    assert done.returncode == 2 and not done.stdout
    images, validation, teacher = done.stderr.splitlines()
    assert f"{tmp_path}/a/generated_data/syn_data/cifar100/fadrm_ipc7" in images
    assert "prepare_distilled.py" in images
    assert f"{tmp_path}/b/cifar100" in validation and "prepare_torchvision.py" in validation
    assert f"{tmp_path}/a/cifar100/ResNet18.pth" in teacher and "train_teacher.sh" in teacher
    assert tree(tmp_path) == {}
    done = bash("run_cifar100.sh", Main_Data_Path=tmp_path / "c", val_dir=tmp_path / "b")
    told = f"Main_Data_Path={tmp_path}/c, in config.sh or the environment, is no folder"
    assert done.returncode == 2 and done.stderr.strip() == told


@pytest.mark.parametrize("wrong", [{"GPUS": "two"}, {"TRAIN_GPUS": 0}])
def test_numbers_of_gpus_are_checked(tmp_path, wrong):
    done = bash("run_imagenet.sh", Main_Data_Path=tmp_path, val_dir=tmp_path, **wrong)
    assert done.returncode == 2 and "must be numbers from 1 on" in done.stderr


def test_an_unknown_recipe_is_refused_before_any_work(tmp_path):
    done = bash("run_imagenet.sh", RECIPE="best", Main_Data_Path=tmp_path, val_dir=tmp_path)
    assert done.returncode == 2 and "RECIPE=best: must be published or auto" in done.stderr


def test_epochs_beside_a_schedule_that_names_its_own_are_refused_before_any_work(tmp_path):
    paths = {"Main_Data_Path": tmp_path, "val_dir": tmp_path}
    done = bash("run_imagenet.sh", SCHEDULE="soft:1,hard:2", SOFT_EPOCHS=150, **paths)
    assert done.returncode == 2 and "unset SOFT_EPOCHS and HARD_EPOCHS" in done.stderr


PROGRAMS = sorted(
    path.name
    for path in (ROOT / "scripts").glob("*.sh")
    if path.read_text().startswith("#!")  # the others are sourced
)


@pytest.fixture
def bare(tmp_path) -> Path:
    """A clone beside a `bin` whose Python has nothing and leaves a trace when it is started."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("config.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "readlink", "sed"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    fake = tmp_path / "bin" / "python3"
    fake.write_text(f"#!/bin/sh\ntouch {tmp_path / 'python was started'}\nexit 1\n")
    fake.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("flags", [["--help"], ["-h"], ["--plan", "x.yaml", "--help"]], ids=str)
@pytest.mark.parametrize("script", PROGRAMS)
def test_help_is_the_head_of_the_script_and_nothing_runs(bare, script, flags):
    before = tree(bare)
    done = subprocess.run(
        ["bash", f"scripts/{script}", *flags],
        cwd=bare,
        env={"PATH": str(bare / "bin")},
        capture_output=True,
        text=True,
    )
    lines = (ROOT / "scripts" / script).read_text().splitlines()
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(lines[1].removeprefix("# ") + "\n")
    assert "set -euo" not in done.stdout and "SBATCH" not in done.stdout
    assert tree(bare) == before


def test_help_after_two_dashes_is_for_the_program_behind(tmp_path):
    done = bash("run_imagenet.sh", "--", "--help", Main_Data_Path=tmp_path, val_dir=tmp_path)
    assert done.returncode == 2 and "no distilled images at" in done.stderr


def test_help_of_the_sweep_names_every_setting_and_method(command):
    shown = bash("run_sweep.sh", "--help").stdout
    flags = set(re.findall(r"--[a-z-]+", command(sweep.main, "--help").out)) - {"--help"}
    assert flags <= set(re.findall(r"--[a-z-]+", shown))
    for method in known_methods():
        assert re.search(rf"\b{method}\b", shown) or re.fullmatch("S[2-7]", method)


@pytest.mark.parametrize(("plan", "task"), [([], "0"), (["plan.yaml"], "")])
def test_a_task_of_a_sweep_wants_plan_and_number(plan, task):
    done = bash("sweep_slurm.sh", *plan, SLURM_ARRAY_TASK_ID=task)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "takes a PLAN.yaml" in done.stderr


def test_imagenette_is_found_under_its_published_name(tmp_path):
    (tmp_path / "generated_data/syn_data/imagenet-nette/fadrm_ipc10").mkdir(parents=True)
    (tmp_path / "imagenet-nette").mkdir()
    (tmp_path / "imagenet-nette" / "ResNet18.pth").touch()
    validation = tmp_path / "v" / "imagenette"
    validation.mkdir(parents=True)  # without class folders
    done = bash("run_imagenette.sh", Main_Data_Path=tmp_path, val_dir=tmp_path / "v")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"no class folders of validation images in {validation}: ")


@pytest.mark.parametrize("wrong", [[], ["--lr", "1"], ["custom", "/train"], ["a", "b", "c", "d"]])
def test_what_trains_a_teacher_wants_a_data_set_and_two_folders_or_none(tmp_path, wrong):
    done = bash("train_teacher.sh", *wrong, Main_Data_Path=tmp_path)
    assert done.returncode == 2 and "takes DATASET [TRAIN VAL]" in done.stderr


def test_a_teacher_without_validation_images_or_with_two_gpus_in_words_is_refused(tmp_path):
    done = bash("train_teacher.sh", "CIFAR-10", Main_Data_Path=tmp_path)
    assert done.returncode == 2 and "set val_dir" in done.stderr
    done = bash("train_teacher.sh", "CIFAR-10", Main_Data_Path=tmp_path, TRAIN_GPUS="two")
    assert done.returncode == 2 and "TRAIN_GPUS=two: must be numbers" in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lr", "1", "--output-dir", "X"], "--output-dir is the script's own: Main_Data_Path"),
        (["--model=Y"], "--model=Y is the script's own: set MODEL"),
        (["--dataset", "cifar100"], "--dataset is the script's own: the script is for cifar10"),
        (["--dataset", "cifar10", "--dataset=custom"], "--dataset=custom is the script's own"),
    ],
)
def test_flags_that_contradict_a_scripts_own_are_refused(tmp_path, flags, told):
    settings = {"Main_Data_Path": tmp_path, "val_dir": tmp_path}
    for done in (
        bash("train_teacher.sh", "CIFAR-10", "--", *flags, **settings),
        bash("run_cifar10.sh", "--", *flags, **settings),
        bash("run_cifar10.sh", RELABEL_FLAGS=" ".join(flags), **settings),
    ):
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and told in line
    assert tree(tmp_path) == {}


def test_weights_of_another_teacher_are_left_as_they_are(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "ResNet18.pth").write_text("mine")
    done = bash("train_teacher.sh", "CIFAR-10", Main_Data_Path=tmp_path)
    assert done.returncode == 2 and "is there already and is left as it is" in done.stderr
    assert tree(tmp_path) == {"cifar10/ResNet18.pth": b"mine"}


def test_a_signal_to_a_script_reaches_its_program_and_is_waited_for(tmp_path):
    """As a scheduler sends it, or `timeout`: to the shell alone."""
    (tmp_path / "program.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    time.sleep(0.3); pathlib.Path('ended').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('ready', flush=True)\ntime.sleep(30)\n"
    )
    text = f". {ROOT}/scripts/pipeline.sh; PYTHON={sys.executable}; in_processes 1 program.py"
    process = subprocess.Popen(
        ["bash", "-c", text, ROOT / "scripts/run_imagenet.sh"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(10) == 143 and (tmp_path / "ended").exists()


def test_flags_for_training_follow_two_dashes(tmp_path):
    done = bash("run_imagenet.sh", "--lr", "1", Main_Data_Path=tmp_path, val_dir=tmp_path)
    assert done.returncode == 2 and "flags for validate/train.py follow --" in done.stderr


def test_published_labels_of_any_layout_are_imported_not_made(tmp_path):
    images, labels = (
        tmp_path / "generated_data" / kind / "cifar10" / name
        for kind, name in (("syn_data", "rded_ipc1"), ("new_labels", "rded_bs16_slc1_ipc1"))
    )
    for label in range(10):
        (images / str(label)).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(images / str(label) / "0.png")
    (labels / "epoch_0").mkdir(parents=True)
    (labels / "epoch_0" / "batch_0.tar").write_bytes(b"damaged")
    (tmp_path / "cifar10" / "0").mkdir(parents=True)
    settings = {"Main_Data_Path": tmp_path, "val_dir": tmp_path, "METHOD": "rded"}
    done = bash("run_cifar10.sh", **settings, IPC=1, SLC=1)
    assert done.returncode == 2 and "importing the published ones" in done.stdout
    assert f"{labels}/epoch_0/batch_0.tar is damaged" in done.stderr


@pytest.mark.slow
def test_the_pipeline_runs_and_passes_flags_on(tmp_path):
    """CIFAR-100's layout with its 100 classes; the student's epochs and flags from outside.

    In two processes each, as on two GPUs.
    """
    main, validation = tmp_path / "main", tmp_path / "val"
    images = main / "generated_data/syn_data/cifar100/rded_ipc1"
    for label in range(100):
        for root in (images, validation / "cifar100"):
            (root / f"{label:05d}").mkdir(parents=True)
            colour = (round(255 * label / 100), 90, 90)
            Image.new("RGB", (32, 32), colour).save(root / f"{label:05d}" / "0.png")
    settings = {
        **{"Main_Data_Path": main, "val_dir": validation, "METHOD": "rded", "IPC": 1, "SLC": 1},
        **{"SOFT_EPOCHS": 1, "HARD_EPOCHS": 0, "MODEL": "ConvNetW32", "WORKERS": 0},
        **{"TEACHER": "tests.fixed_teacher:factory", "GPUS": 2, "TRAIN_GPUS": 2},
        "RELABEL_FLAGS": "--min-scale 0.2",
    }
    flags = ("--", "--temperature", "4", "--device", "cpu")
    done = bash("run_cifar100.sh", *flags, **settings)
    assert done.returncode == 0, done.stderr
    labels = "rded_bs16_slc1_ipc1_klt_tests.fixed_teacher-factory_min-scale-0.2"
    flags = "hald_soft1_hard0_gpus2_seed0_temperature-4"
    run = main / f"runs/cifar100/{labels}_ConvNetW32_{flags}"
    recorded = (run / "args.yaml").read_text()
    assert "temperature: 4.0" in recorded and "processes: 2" in recorded
    manifest = read_json(main / "generated_data/new_labels/cifar100" / labels / "manifest.json")
    assert manifest["bssl"] is False and manifest["crop_scale"] == [0.2, 1.0]
    refused = bash("run_cifar100.sh", **{**settings, "SLC": 2, "BATCH_SIZE": 0})
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "--batch-size: 0 is out of range" in line
    again = bash("run_cifar100.sh", "--", "--temperature", "4", "--workers", "0", **settings)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout and "is done" in again.stdout


def test_requirements_are_compared_by_version(tmp_path):
    checker = ROOT / "scripts" / "check_requirements.py"
    for text, expected in (
        ("numpy>=1.0\n", 0),
        ("numpy>=99\n", 1),
        ("no-such-package\n", 1),
        ("-r other.txt\n", 1),
    ):
        (tmp_path / "requirements.txt").write_text(text)
        (tmp_path / "other.txt").write_text("numpy>=99\n")
        done = subprocess.run(
            [shutil.which("python3"), checker, tmp_path / "requirements.txt"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(site_packages())},
        )
        assert done.returncode == expected


def site_packages() -> list[str]:
    import numpy

    return [str(Path(numpy.__file__).parents[1])]
