"""Plans before and at their first run: what is checked, what they will take, the paper's plans."""

import argparse
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import CUSTOM, ROOT, open_run, tree

from analysis import checks, estimate, sweep
from analysis.plan import Method
from utils import runlog
from utils.cli import UserError
from utils.data import datasets
from utils.files import lock


def tiny_plan(world, tmp_path, *flags: object) -> argparse.Namespace:
    """A plan for the tiny data set, its data-set flags given once."""
    arguments = [*CUSTOM, "--data-dir", world.data, "--val-dir", world.val, "--out-dir", tmp_path]
    arguments += ["--label-dir", world.labels, "--methods", "hard", "soft", "--slc", 3, "--ipc", 3]
    arguments += ["--students", "ConvNetW32", "--seeds", 0, *flags]
    return sweep.read_settings([*map(str, arguments)])


def test_what_would_stop_a_run_is_said_before_the_first_starts(world, tmp_path):
    def refused(match: str, *flags: object) -> None:
        with pytest.raises(UserError, match=match):
            checks.check(sweep.run_tasks(tiny_plan(world, tmp_path, *flags)))

    checks.check(sweep.run_tasks(tiny_plan(world, tmp_path)))
    refused(r"hard_ipc3_ConvNetW32_seed0: unknown argument --smooth", "--", "--smooth", 1)
    refused(r"hard_ipc3_ConvNetW32_seed0: argument --lr: 'x' is not", "--", "--lr", "x")
    refused("soft_slc9_ipc3_ConvNetW32_seed0: --slc 9: .* holds 6", "--slc", 9)
    refused("hard_ipc3_ConvNetW23_seed0: unknown model 'ConvNetW23'", "--students", "ConvNetW23")
    refused("the labels in .* were made for something else: mean", "--mean", 0.1, 0.5, 0.5)
    refused("nowhere", "--val-dir", tmp_path / "nowhere")
    refused("--hard-share is for joint epochs", "--", "--hard-share", "0.3")
    plan = tiny_plan(world, tmp_path, "--methods", "hard")
    plan.methods["hard"] = Method("--schedule soft", labels="")
    with pytest.raises(UserError, match="hard_ipc3_ConvNetW32_seed0: schedule soft has"):
        checks.check(sweep.run_tasks(plan))
    refused(
        "hard_ipc2_ConvNetW32_seed0: --ipc 2: .* has 3 images per class", "--ipc", 2, "--slc", 2
    )
    for flag, value in (("--seed", 5), ("--model", "MobileNetV2"), ("--output-dir", "elsewhere")):
        refused("are the sweep's own", "--", flag, value)
    unmade = ("--label-dir", tmp_path / "labels", "--relabel", "--teacher ConvNetW32")
    assert len(checks.check(sweep.run_tasks(tiny_plan(world, tmp_path, *unmade)))) == 1
    with pytest.raises(UserError, match="soft_slc3_ipc3_ConvNetW32_seed0: label folder not found"):
        checks.check(sweep.run_tasks(tiny_plan(world, tmp_path, *unmade)), label_sets_made=True)
    no_epochs = ("--methods", "soft", "--", "--soft-epochs", 0, "--hard-epochs", 0)
    refused("soft_slc3_ipc3_ConvNetW32_seed0: .*no epoch", *unmade, *no_epochs)
    plan = tiny_plan(world, tmp_path, *unmade[:3], "--teacher ConvNetW32 --teacher-weights W")
    with pytest.raises(UserError, match="goes with --estimate"):
        tiny_plan(world, tmp_path, "--images-per-second", 5)
    with pytest.raises(UserError, match="labels_views_ipc3: --teacher-weights: no file W"):
        checks.check(sweep.label_tasks(plan))
    plan = tiny_plan(world, tmp_path, *unmade[:3], "--teacher ConvNetW23")
    with pytest.raises(UserError, match="labels_views_ipc3: unknown model 'ConvNetW23'"):
        checks.check(sweep.label_tasks(plan))


def test_a_run_with_other_settings_in_the_folder_of_the_plan_is_refused_early(world, tmp_path):
    settings, _ = open_run(world, tmp_path / "run", "--schedule", "soft:1", "--slc", 3)
    folder = tmp_path / "runs" / "soft_slc3_ipc3_ConvNetW32_seed0"
    folder.mkdir(parents=True)
    runlog.RunFolder(folder).begin(vars(settings), 0)
    flags = ("--methods", "soft", "--", "--soft-epochs", 1, "--hard-epochs", 0, "--eval-every", 2)
    checks.check(sweep.run_tasks(tiny_plan(world, tmp_path, *flags)))
    flags += ("--label-smoothing", 0.1)
    other = r"\(--label-smoothing: expected 0\.1, found 0\.8\); choose another"
    with pytest.raises(UserError, match=other):
        checks.check(sweep.run_tasks(tiny_plan(world, tmp_path, *flags)))
    (folder / "args.yaml").write_text("damaged")
    with pytest.raises(UserError, match=r"soft_slc3_.* damaged; choose another"):
        checks.check(sweep.run_tasks(tiny_plan(world, tmp_path)))


def test_what_runs_would_say_of_their_settings_is_printed_once(world, tmp_path, capsys):
    flags = ("--methods", "soft", "auto", "--seeds", 0, 1, "--slc", 6, "--relabel=--teacher T")
    checks.check(sweep.run_tasks(tiny_plan(world, tmp_path, *flags, "--", "--soft-epochs", "auto")))
    lines = capsys.readouterr().out.splitlines()
    assert sorted({*lines}) == sorted(lines)
    assert any(line.startswith("learning rate: ") for line in lines)


def test_bssl_of_selected_images_is_said_before_the_start(copied, tmp_path, capsys):
    (copied.data / "selection.json").write_text("{}")
    for more, said in (("", "it is off"), (" --bssl", "it is on")):
        flags = ("--label-dir", tmp_path / "unmade", f"--relabel=--teacher ConvNetW32{more}")
        checks.check(sweep.label_tasks(tiny_plan(copied, tmp_path, *flags)))
        assert said in capsys.readouterr().out


def test_a_second_sweep_in_a_folder_is_told_of_the_first(world, tmp_path, command, monkeypatch):
    """But not the tasks of a job array, and not a look at what is finished."""
    plan = [*CUSTOM, "--data-dir", world.data, "--val-dir", world.val, "--out-dir", tmp_path]
    plan += ["--methods", "hard", "--slc", 3, "--ipc", 3, "--students", "ConvNetW32"]
    monkeypatch.setattr(sweep, "run_all", lambda tasks, slots, what: [])
    with lock(tmp_path, "testing"):
        done = command(sweep.main, *plan)
        assert done.code == 2 and f"is running a sweep in {tmp_path}; wait for it" in done.err
        assert "failed" not in done.err
        assert command(sweep.main, *plan, "--task", 0).code == 0
        assert (
            "no run of the plan is finished" in command(sweep.main, *plan, "--only", "collect").err
        )


def test_data_set_flags_are_given_once(world, tmp_path):
    plan = tiny_plan(world, tmp_path, "--relabel", "--teacher ConvNetW32")
    labels, *_, run = sweep.label_tasks(plan) + sweep.run_tasks(plan)
    for task in (labels, run):
        facts = datasets.from_arguments(checks.parse(task))
        assert (facts.input_size, facts.mean) == (32, (0.5, 0.5, 0.5))


def test_a_path_with_a_variable_that_is_not_set_is_refused(world, tmp_path, monkeypatch, command):
    monkeypatch.delenv("Main_Data_Path", raising=False)
    flags = ["--plan", str(ROOT / "analysis/plans/paper/cifar100.yaml"), "--only", "list"]
    refused = command(sweep.main, *flags)
    assert refused.code == 2 and "fadrm_ipc{ipc}: set the variable in config.sh" in refused.err
    monkeypatch.setenv("Main_Data_Path", "/m")
    plan = tiny_plan(world, tmp_path, "--data-dir", "$Main_Data_Path/d{ipc}")
    assert plan.images_dir(3) == Path("/m/d3")
    monkeypatch.setenv("HOME", "/home/me")
    assert tiny_plan(world, tmp_path, "--out-dir=~/o").out_dir == "/home/me/o"


PAPER = sorted((ROOT / "analysis/plans/paper").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_run_of_the_plans_of_the_paper_has_flags_that_training_takes(path):
    plan = sweep.read_settings(["--plan", str(path)])
    tasks = sweep.run_tasks(plan)
    assert all(estimate.count_views(task, plan.facts.num_classes) for task in tasks)
    assert {task.facts["ipc"] for task in tasks} == {*plan.ipc}


def test_what_the_plan_of_imagenet_will_take(command):
    """3 seeds, 3 students, 3 IPC, 3 methods x 5 + hard; 10 labels of 2,000 bytes per image."""
    arguments = ("--plan", ROOT / "analysis/plans/paper/imagenet1k.yaml", "--estimate")
    done = command(sweep.main, *arguments, "--images-per-second", 1000, 500, 250, "--jobs", 2)
    assert done.code == 0, done.err
    views = 3 * 16 * 300 * (1 + 10 + 50) * 1000
    days = [(views / rate + 144) / 86400 for rate in (1000, 500, 250)]
    assert "runs: 432, 432 to do\nlabel sets: 3, 3 to make\n" in done.out
    assert "label sets 1.22 GB and headers, runs 188" in done.out
    time = f"ResNet50 {views:,} views at 500 images/s, 144 starts = {days[1]:.1f} days\n"
    assert time in done.out
    in_all = f"time in all: {sum(days):.1f} days; 2 at a time: {sum(days) / 2:.1f} days\n"
    assert in_all in done.out
    done = command(sweep.main, *arguments)
    assert done.code == 0 and "as in log.jsonl of any run of this network" in done.out


def test_an_estimate_on_label_sets_that_are_there_needs_no_teacher(world, tmp_path, monkeypatch):
    """world's set has 2 labels for each of 12 images; half a byte for each of 4 classes."""
    plan = tiny_plan(world, tmp_path, "--estimate", "--images-per-second", 0.01)
    plan.codecs = {"fp16": "", "quant": "--codec quant --bits 4"}
    plan.label_dir = str(tmp_path / "labels")
    (tmp_path / "labels").symlink_to(world.labels)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    labels, runs = sweep.label_tasks(plan), sweep.run_tasks(plan)
    text = estimate.estimate(plan, labels, runs)
    assert "label sets: 1, 1 to make\ndisk: label sets 48.00 B and" in text
    views = sum(estimate.count_views(task, 4) for task in runs)
    days = (views / 0.01 + 3) / 86400
    assert f"; 4 at a time: {days / 4:.1f} days\n" in text  # a run on each of the GPUs


def test_durations_are_in_units_that_people_use():
    seconds = (0, 119.4, 120, 7199, 7200, 172_800)
    told = ["0 s", "119 s", "2.0 min", "120.0 min", "2.0 h", "2.0 days"]
    assert [estimate.duration(each) for each in seconds] == told


@pytest.mark.slow
def test_a_cell_of_the_paper_runs_from_labels_to_its_table(world, tmp_path, command):
    """In miniature, through the script; then one method more, measured speed, nothing to do."""
    relabel = f"--teacher ConvNetW32 --teacher-weights {world.weights} --workers 0 --batch-size 5"
    plan = ["--plan", ROOT / "analysis/plans/paper/imagenet1k.yaml", *CUSTOM]
    plan += ["--data-dir", world.data, "--val-dir", world.val, "--out-dir", tmp_path]
    plan += ["--ipc", 3, "--labels-per-image", 1, "--students", "ConvNetW32", "--seeds", 0]
    plan += ["--relabel", relabel, "--methods", "soft"]
    flags = ["--", "--soft-epochs", 1, "--hard-epochs", 1, "--workers", 0]
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/run_sweep.sh"), *map(str, plan + flags)],
        cwd="/",
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    heading, _, line = (tmp_path / "table.md").read_text().splitlines()
    assert heading == "| IPC | labels per image | ConvNetW32 soft |"
    assert line.startswith("| 3 | 1 | ") and r"\toprule" in (tmp_path / "table.tex").read_text()
    done = command(sweep.main, *plan, "hard", *flags)
    assert done.code == 0, done.err
    heading, _, line = (tmp_path / "table.md").read_text().splitlines()
    assert heading == "| IPC | labels per image | ConvNetW32 soft | ConvNetW32 hard |"
    logs = tree(tmp_path / "logs")
    assert command(sweep.main, *plan, "hard", *flags).code == 0
    assert tree(tmp_path / "logs") == logs
    done = command(sweep.main, *plan, "hard", "hald", "--estimate", *flags)
    assert "runs: 3, 1 to do" in done.out and "time in all: 1 s" in done.out
