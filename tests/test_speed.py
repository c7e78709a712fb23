"""The speed benchmark and the GPU check, in miniature: both pipelines do the same work."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, script

from analysis.tables import grouped
from benchmarks import gpu_check, measuring, speed, straightforward
from benchmarks.bench import Bench
from utils import runtime
from utils.cli import UserError
from utils.labels import LabelSet, centre

SMALL = ("--model", "ConvNetW32", "--size", 32, "--classes", 2, "--batch-size", 4)


@pytest.fixture
def bench(monkeypatch, tmp_path) -> Bench:
    words = ["speed.py", "--out", tmp_path, *SMALL, "--ipc", 5, "--repeats", 1, "--workers", 0]
    words += ["--seconds", 0.1]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--device", "cpu"])
    return Bench(speed.parse_arguments(), tmp_path)


def test_both_pipelines_give_the_same_labels(bench, monkeypatch):
    monkeypatch.setattr(speed, "MOST_PASSES", 2)
    ours = speed.Relabelling(bench)
    ours.run(range(2))
    with ours.writer.begun():
        ours.writer.finish()
    stored = LabelSet.open(ours.writer.path)
    labels = torch.cat([stored[batch].logits for batch in range(stored.batches_per_pass)])
    expected = centre(straightforward.Relabelling(bench).label())
    # PIL resizes in whole grey levels, ours in floats: that is all the difference in fp32.
    assert 0 < (labels - expected).norm() / expected.norm() < 0.02


def test_every_timing_is_kept_and_a_training_projected(tmp_path, command):
    arguments = ("--out", tmp_path / "speed_1.5", "--ipc", 2, "--repeats", 2, "--workers", 0)
    arguments += ("--seconds", 0.1)
    done = command(speed.main, *SMALL, *arguments, "--device", "cpu", "--codec", "klt")
    assert done.code == 0, done.err
    lines = (tmp_path / "speed_1.5.csv").read_text().splitlines()
    assert torch.__version__ in lines[0]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    timings = {key: len(group) for key, group in grouped(rows, "stage", "pipeline").items()}
    assert timings == {
        ("relabel", "straightforward"): 2,
        ("relabel", "ours"): 2,
        ("train", "straightforward"): 2,
        ("train", "ours"): 2,
        ("evaluate", "ours"): 2,
    }
    report = (tmp_path / "speed_1.5.txt").read_text()
    assert report.strip() in done.out and "evaluations of 50,000, projected" in report


def test_a_projection_takes_the_faster_student_and_a_table_the_ratio_of_each_turn():
    def timing(stage: str, pipeline: str, rate: float) -> dict:
        facts = {"images_per_second": rate, "peak_mb": 1, "gpu_percent": None}
        return {"stage": stage, "pipeline": pipeline, **facts}

    rows = [timing("train", speed.PLAIN, rate) for rate in (10, 20)]
    rows += [timing("train", speed.OURS, rate) for rate in (40, 60)]
    assert speed.projection(rows) == []
    rows += [timing("train", speed.COMPILED, 1000), timing("evaluate", speed.OURS, 5000)]
    rows.append(timing("train", speed.COMPILED, 1000))
    # 3,000,000 / 1000 and 1,500,000 / 5000 seconds.
    (line,) = speed.projection(rows)
    assert line.endswith("projected: 55.0 min")
    ours = speed.table(rows).splitlines()[2].split()
    assert ours == ["train", "ours", "50.0", "3.50", "(3.00", "to", "4.00)", "1", "-"]


def test_an_error_in_a_pipelines_own_process_is_told_in_one_line(tmp_path):
    arguments = ("--out", tmp_path / "speed", *SMALL, "--model", "nosuch", "--device", "cpu")
    done = script(ROOT / "benchmarks/speed.py", *arguments, "--stages", "train")
    assert done.returncode == 2 and "--model: unknown model 'nosuch'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not [*tmp_path.iterdir()]


def test_a_timing_goes_over_as_many_passes_as_take_so_long(bench):
    (row,) = measuring.by_turns({"steady": Steady}, bench)
    # One to warm up, two and four to find the pace: passes of 40 ms, and 100 ms are asked for.
    assert row["images"] == 4 and row["seconds"] >= 0.1


class Steady:
    """A pipeline whose passes are of one image, and of no work."""

    next = 0

    def run(self, passes: range) -> int:
        assert passes.start == self.next
        self.next = passes.stop
        time.sleep(0.04 * len(passes))
        return len(passes)


class Ending:
    """A pipeline whose process the system ends."""

    def run(self, passes: range) -> int:
        os.kill(os.getpid(), signal.SIGKILL)


class Failing:
    """A pipeline that cannot be made."""

    def __init__(self):
        raise FileExistsError


def test_a_process_that_ends_or_fails_ends_the_others(bench):
    with pytest.raises(UserError, match="ended from outside"):
        list(measuring.by_turns({"ending": Ending}, bench))
    with pytest.raises(FileExistsError):
        list(measuring.by_turns({"steady": Steady, "failing": Failing}, bench))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("pipeline", "keeps"),
    [
        (speed.Relabelling, True),
        (speed.Training, True),
        (speed.Evaluation, True),
        (straightforward.Relabelling, False),
        (straightforward.Training, False),
    ],
)
def test_only_ours_keeps_memory(bench, monkeypatch, pipeline, keeps):
    kept = []
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: kept.append(True))
    pipeline(bench)
    assert bool(kept) == keeps


def test_the_gpu_check_compares_labels_views_and_training(tmp_path, command, monkeypatch):
    monkeypatch.setattr(gpu_check, "STEPS", 3)
    words = ("--out", tmp_path, "--checks", "labels", "views", "training")
    done = command(gpu_check.main, *words, *SMALL, "--device", "cpu")
    assert done.code == 0, done.out + done.err
    for name in ("labels", "views", "training"):
        lines = (tmp_path / f"{name}.csv").read_text().splitlines()
        checks = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        assert checks and all(check["name"].startswith(name) for check in checks)
        assert all(check["passed"] == "True" for check in checks)
    assert "ok     0.00e+00 (limit 0e+00)  labels: the same forward passes again" in done.out


def test_a_check_that_fails_is_written_and_fails_the_command(tmp_path, command, monkeypatch):
    failing = {"views": lambda bench: iter([gpu_check.Check("views: moved", 2.0, 1.0)])}
    monkeypatch.setattr(gpu_check, "CHECKS", failing)
    done = command(gpu_check.main, "--out", tmp_path, "--checks", "views", *SMALL)
    assert done.code == 1 and "FAILED 2.00e+00 (limit 1e+00)  views: moved" in done.out
    assert (tmp_path / "views.csv").read_text().endswith("views: moved,2.0,1.0,False\n")


def test_a_gpu_check_that_is_stopped_keeps_what_is_done(tmp_path):
    """With a stand-in for Python whose speed benchmarks never end."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/sh\ncase "$*" in *is_available*) exit 1 ;; *speed.py*) exec sleep 9 ;; '
        "*gpu_check.py*) echo a result ;; esac\n"
    )
    stand_in.chmod(0o755)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "scripts").mkdir()
    for file in ("benchmarks/gpu_check.sh", "scripts/setup.sh"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    environment = {**os.environ, "PYTHON": str(stand_in), "GPU_CHECK_SMALL": "1"}
    words = ["bash", str(tmp_path / "benchmarks/gpu_check.sh")]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(6)][1:]
    process.kill()
    assert [line.split()[1:3] for line in lines] == [
        *(["pipeline", "ok"], ["views", "ok"], ["labels", "ok"], ["training", "ok"]),
        ["launches", "needs"],
    ]
    report = (tmp_path / "runs/gpu_check/gpu_check.txt").read_text()
    assert report.count("a result") == 4 and report.count(" ok ") == 5


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


def test_the_gpu_checks_help_says_what_it_does_and_does_nothing():
    words = ["bash", ROOT / "benchmarks/gpu_check.sh", "--help"]
    environment = {**os.environ, "PYTHON": "false"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Everything that needs a GPU")
