"""The speed benchmark and the GPU check, in miniature: both pipelines do the same work."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script

from benchmarks import gpu_check, measuring, speed
from utils import runtime
from utils.cli import UserError

SMALL = ("--model", "ConvNetW32", "--size", 32, "--classes", 2, "--batch-size", 4)


def test_both_pipelines_give_the_same_labels_and_every_timing_is_kept(tmp_path, command):
    arguments = ("--out", tmp_path / "speed_1.5", "--ipc", 5, "--repeats", 2, "--workers", 0)
    stages = ("--stages", "relabel", "--device", "cpu")
    done = command(speed.main, *SMALL, *arguments, *stages)
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "speed_1.5.json").read_text())
    notes = results["results"]
    # PIL resizes in whole grey levels, ours in floats: that is all the difference in fp32.
    (difference,) = (float(value) for name, value in notes.items() if "relative difference" in name)
    assert difference < 0.02
    assert "convolutions in bf16, times as fast as in fp32" in notes
    rows = list(csv.DictReader((tmp_path / "speed_1.5.csv").open()))
    counts = {}
    for row in rows:
        assert row["stage"] == "relabel" and row["torch"] == torch.__version__
        counts[row["pipeline"]] = counts.get(row["pipeline"], 0) + 1
    names = ["straightforward", "ours", "forward alone"]
    names += ["ours, a process per core"] * (runtime.usable_cores() > 1)
    assert counts == dict.fromkeys(names, 2)
    assert (tmp_path / "speed_1.5.txt").read_text().strip() in done.out


def test_an_error_in_a_pipelines_own_process_is_told_in_one_line(tmp_path):
    arguments = ("--out", tmp_path / "speed", *SMALL, "--model", "nosuch", "--device", "cpu")
    done = script(ROOT / "benchmarks/speed.py", *arguments, "--stages", "train")
    assert done.returncode == 2 and "--model: unknown model 'nosuch'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not [*tmp_path.iterdir()]


class Ending:
    """A pipeline whose process the system ends."""

    keeps_memory = False

    def __init__(self, root: Path):
        pass

    def run(self, passes: range) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Failing(Ending):
    """A pipeline that cannot be made in one of two processes."""

    def __init__(self, root: Path):
        (root / "first").mkdir()


def test_a_process_that_ends_or_fails_ends_the_others(tmp_path):
    device = torch.device("cpu")
    ending = measuring.Elsewhere(device, Ending, tmp_path, processes=2)
    with pytest.raises(UserError, match="ended from outside"), ending:
        ending.run(range(2))
    failing = measuring.Elsewhere(device, Failing, tmp_path, processes=2)
    with pytest.raises(FileExistsError), failing:
        pass
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "pipeline",
    [speed.OurRelabelling, speed.OurTraining, speed.PlainRelabelling, speed.PlainTraining],
)
def test_only_ours_keeps_memory(monkeypatch, pipeline):
    kept = []
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(pipeline, "__init__", lambda self: None)
    measuring._begin(torch.get_num_threads(), torch.device("cpu"), pipeline, ())
    assert len(kept) == pipeline.__name__.startswith("Our")


def test_the_gpu_check_compares_and_sums_up(tmp_path, command, monkeypatch):
    monkeypatch.setattr(gpu_check, "STEPS", 3)
    done = command(gpu_check.main, "--out", tmp_path, *SMALL, "--device", "cpu")
    assert done.code == 0, done.out + done.err
    checks = json.loads((tmp_path / "agreement.json").read_text())["checks"]
    assert {name.split(":")[0] for name in (check["name"] for check in checks)} == {
        "labels",
        "views",
        "training",
    }
    assert all(check["passed"] for check in checks)
    (tmp_path / "steps.tsv").write_text("agreement\tok\t3\ndemo\tskipped: no pytest\t0\n")
    assert command(gpu_check.main, "--out", tmp_path, "--summary").code == 0
    summed = json.loads((tmp_path / "gpu_check.json").read_text())
    assert summed["steps"][1] == {"step": "demo", "result": "skipped: no pytest", "seconds": 0}
    assert "views: replayed" in (tmp_path / "gpu_check.txt").read_text()


def test_a_difference_above_its_limit_or_not_a_number_fails():
    passed = [gpu_check.Check("", value, 0.1).passed for value in (0.1, 0.2, float("nan"))]
    assert passed == [True, False, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
@pytest.mark.parametrize(
    ("python", "told"), [(sys.executable, "no CUDA device"), ("false", "false has no torch")]
)
def test_the_gpu_check_says_what_it_needs(python, told):
    environment = {**os.environ, "PYTHON": python, "GPU_CHECK_SMALL": ""}
    words = ["bash", ROOT / "benchmarks/gpu_check.sh"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
