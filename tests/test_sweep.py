"""The sweep: what it plans, that it can be stopped and repeated, and what it makes of results."""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, write_images
from PIL import Image

from analysis import checks, runner, sweep, tables
from analysis.plan import known_methods
from relabel import compress
from scripts import prepare_split
from utils.cli import UserError
from utils.data import folders
from validate import kinds
from validate.settings import parse_arguments


def settings(tmp_path, **more) -> argparse.Namespace:
    for label in range(4):
        (tmp_path / "d5" / f"{label:05d}").mkdir(parents=True, exist_ok=True)
    small = {
        "dataset": "digits",
        "data_dir": f"{tmp_path}/d{{ipc}}",
        "val_dir": "v",
        "out_dir": str(tmp_path / "out"),
        "slc": [5, 10],
        "ipc": [5],
        "students": ["ConvNetW32"],
        "seeds": [0, 1],
        "label_slc": 40,
        "methods": ["hard", "soft"],
        "relabel": "--teacher T",
        **more,
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(small, sort_keys=False))
    return sweep.read_settings(["--plan", str(tmp_path / "plan.yaml")])


def test_a_plan_is_the_grid_but_for_what_does_not_depend_on_the_slc(tmp_path):
    names = [task.name for task in sweep.run_tasks(settings(tmp_path))]
    assert names == [
        "hard_ipc5_ConvNetW32_seed0",
        "soft_slc5_ipc5_ConvNetW32_seed0",
        "soft_slc10_ipc5_ConvNetW32_seed0",
        "hard_ipc5_ConvNetW32_seed1",
        "soft_slc5_ipc5_ConvNetW32_seed1",
        "soft_slc10_ipc5_ConvNetW32_seed1",
    ]


def test_every_command_is_one_that_the_training_script_understands(tmp_path):
    every = {f"my {name}": {"like": name, "flags": "--lr 0.5"} for name in known_methods()}
    for task in sweep.run_tasks(settings(tmp_path, methods=every)):
        args = parse_arguments(task.command[1:])
        assert args.lr == 0.5 and str(args.output_dir).endswith(task.name)


def test_a_kind_of_epoch_added_elsewhere_can_be_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", {**kinds.KINDS})
    monkeypatch.setattr("analysis.plan.KINDS", kinds.KINDS)

    class Extra(kinds.Kind):
        name, colour = "extra", "tab:red"

    class Unlabelled(Extra):
        name, needs_labels = "unlabelled", False

    plan = settings(tmp_path, methods=["extra", "unlabelled"], seeds=[0], slc=[5])
    assert [task.name for task in sweep.label_tasks(plan)] == ["labels_views_ipc5"]
    labelled, unlabelled = sweep.run_tasks(plan)
    assert "--slc 5" in shlex.join(labelled.command)
    assert labelled.command[-2:] == ["--schedule", "extra"]
    assert unlabelled.name == "unlabelled_ipc5_ConvNetW32_seed0"
    assert "--label-dir" not in unlabelled.command


def test_top_k_labels_are_as_many_as_fit_in_the_bytes_of_fp16_labels():
    """10 classes: 20 bytes against 2 x (2 bytes + 4 bits) = 5; 1000: 2000 against 50 x 26 bits."""
    assert sweep.affordable_slc(10, classes=10, topk=2, stored=1000) == 40
    assert sweep.affordable_slc(10, classes=10, topk=2, stored=30) == 30
    assert sweep.affordable_slc(10, classes=1000, topk=50, stored=1000) == 120


def test_label_sets_are_made_once_per_ipc_for_what_the_methods_read(tmp_path):
    methods = ["soft", "hald", "static", "lpqld"]
    tasks = sweep.label_tasks(settings(tmp_path, methods=methods))
    assert [task.name for task in tasks] == [
        "labels_views_ipc5",
        "labels_static_ipc5",
        "labels_top2_ipc5",
    ]
    assert "--mix none --min-scale 1" in shlex.join(tasks[1].command)
    with pytest.raises(UserError, match=r"no label set at .*--relabel"):
        sweep.label_tasks(settings(tmp_path, relabel=""))


def test_auto_is_trained_on_a_label_set_of_its_own_views(tmp_path):
    plan = settings(tmp_path, methods=["soft", "auto"])
    views, auto = sweep.label_tasks(plan)
    folder = f"{tmp_path}/out/labels/ipc5"
    assert shlex.join(views.command).endswith(f"--label-dir {folder} --slc 40")
    assert shlex.join(auto.command).endswith(f"--label-dir {folder}_auto --slc 40 --recipe auto")
    soft, moved = sweep.run_tasks(plan)[:2]
    assert f"--slc 5 --label-dir {folder} " in shlex.join(soft.command)
    assert f"--slc 5 --label-dir {folder}_auto" in shlex.join(moved.command)


def test_methods_that_read_labels_of_views_are_trained_on_every_codec(tmp_path, monkeypatch):
    methods = ["hard", "soft", "lpqld"]
    codecs = {"fp16": "", "klt_01": "--codec klt --distortion 0.01"}
    plan = settings(tmp_path, methods=methods, codecs=codecs, seeds=[0], slc=[5, 10])
    views, klt, topk = sweep.label_tasks(plan)
    folder = f"{tmp_path}/out/labels/ipc5"
    folders = f"--label-dir {folder} --out-dir {folder}_"
    assert shlex.join(views.command).endswith(f"--label-dir {folder} --slc 40")
    assert shlex.join(topk.command).endswith(f"{folders}top2 --codec topk --topk 2")
    assert shlex.join(klt.command).endswith(f"{folders}klt-01 --codec klt --distortion 0.01")
    assert klt.done == Path(f"{folder}_klt-01/manifest.json")
    monkeypatch.setattr("sys.argv", klt.command)
    assert compress.parse_arguments().distortion == 0.01
    tasks = {task.name: task for task in sweep.run_tasks(plan)}
    assert list(tasks) == [
        "hard_ipc5_ConvNetW32_seed0",
        "soft_fp16_slc5_ipc5_ConvNetW32_seed0",
        "soft_klt-01_slc5_ipc5_ConvNetW32_seed0",
        "lpqld_top2_slc5_ipc5_ConvNetW32_seed0",
        "soft_fp16_slc10_ipc5_ConvNetW32_seed0",
        "soft_klt-01_slc10_ipc5_ConvNetW32_seed0",
        "lpqld_top2_slc10_ipc5_ConvNetW32_seed0",
    ]
    for name, suffix in (("soft_fp16", ""), ("soft_klt-01", "_klt-01"), ("lpqld_top2", "_top2")):
        args = parse_arguments(tasks[f"{name}_slc5_ipc5_ConvNetW32_seed0"].command[1:])
        assert str(args.label_dir) == folder + suffix
    assert [task.facts["codec"] for task in tasks.values()][:4] == ["", "fp16", "klt_01", "top2"]


def test_codecs_whose_folders_would_be_the_same_are_refused(tmp_path):
    codecs = {"klt_1": "--codec klt --distortion 0.1", "klt-1": "--codec klt --distortion 0.2"}
    with pytest.raises(UserError, match="two tasks would both be labels_klt-1_ipc5: rename"):
        sweep.label_tasks(settings(tmp_path, codecs=codecs))


def test_the_plan_of_codecs_is_read():
    plan = sweep.read_settings(["--plan", str(ROOT / "analysis/plans/codecs.yaml")])
    assert plan.codecs["fp16"] is None and plan.codecs["klt_01"] == "--codec klt --distortion 0.01"


def test_tables_and_plots_show_the_codec(tmp_path):
    plan = settings(tmp_path, codecs={"fp16": "", "quant_4": "--codec quant --bits 4"}, slc=[5])
    tasks = sweep.run_tasks(plan)
    for task in tasks:
        task.done.parent.mkdir(parents=True)
        size = {"fp16": 100, "quant_4": 30}.get(task.facts["codec"], 0)
        task.done.write_text(result(50.0, size))
    tables.report(sweep.collect(tasks), tmp_path / "out", {})
    assert tables.read_csv(tmp_path / "out" / "results.csv") == sweep.collect(tasks)
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[2:] == [
        "| ConvNetW32 | 5 | hard | – | – | 0 | 51.0 ± 0.0 | 50.0 ± 0.0 | 2 |",
        "| ConvNetW32 | 5 | soft | fp16 | 5 | 100 | 51.0 ± 0.0 | 50.0 ± 0.0 | 2 |",
        "| ConvNetW32 | 5 | soft | quant_4 | 5 | 30 | 51.0 ± 0.0 | 50.0 ± 0.0 | 2 |",
    ]


def test_a_plan_file_is_overridden_by_flags_and_checked(tmp_path):
    plan = tmp_path / "plan.yaml"
    text = (
        "dataset: digits\ndata_dir: D\nval_dir: V\nout_dir: O\nslc: [5]\nipc: [5]\n"
        "students: [ConvNetW32]\nrelabel: --teacher T\n"
        "methods: {mine: {like: balanced, flags: --lr 1}, lpld: }\n"
    )

    def read(text, *flags):
        plan.write_text(text)
        return sweep.read_settings(["--plan", str(plan), *flags])

    assert read(text, "--labels-per-image", "3").slc is None
    given = read(text, "--slc", "10", "--", "--lr", "2")
    assert given.slc == [10] and given.flags == "--lr 2" and given.stored_slc(5) == 40
    assert given.methods["mine"].flags == "--schedule hald --soft-loss-scale T2 --lr 1"
    assert read(text + "flags: --eta 1\nrelabel:\n").flags == "--eta 1"
    for wrong, message in (
        (text + "codecs: [klt]\n", "codecs must be names with flags"),
        (text.replace("like: balanced", "like: balance"), "unknown method 'balance'"),
        (text.replace("slc: [5]", "slc: [7]"), "--slc 7 is not a multiple of IPC 5"),
        (text.replace("val_dir: V\n", ""), "the plan lacks --val-dir"),
        (text.replace("ipc: [5]", "ipc: [1, 5]"), "must contain {ipc}"),
        (text + "labels_per_image: [1]\n", "give one of them"),
        (text + "cells: [{ipc: 5}]\n", "cells must be a list"),
        (text + "table: {rows: [ipc]}\n", "table must be {rows"),
        (text + "table: {rows: [ipc], columns: [sudent]}\n", "table must be {rows"),
        (text + "input_size: 32\n", "goes with --dataset custom"),
        (text.replace("digits", "custom"), "custom also needs --input-size, --mean, --std"),
        (text + "flags: [--lr, 1]\n", "flags must be text"),
        (text + "codecs: {klt: [--codec, klt]}\n", "codecs must be names with flags"),
        (text + "cells: 5\n", "cells must be a list"),
        (text + "cells: [{ipc: 5, flags: 1}]\n", "cells must be a list"),
        (text + "table: {rows: [[ipc]], columns: []}\n", "table must be {rows"),
        (text.replace("lpld: ", "lpld: --lr 1"), "methods must be names, each empty or with {like"),
        (text.replace("lpld: ", "lpld: 0"), "methods must be names, each empty or with {like"),
        (
            text.replace("flags:", "flag:"),
            "methods must be names, .* not {'mine': {.*'flag': '--lr 1'}}$",
        ),
        (text.replace("like: balanced", "like: [hald]"), "methods must be names, each empty"),
        (text.replace("like: balanced, ", ""), "unknown method 'mine' .* mine: {like: hald, flags"),
        (text + "flags: --lr '1\n", "--lr '1: no closing quotation"),
        (text + 'relabel: --teacher T"\n', '--teacher T": no closing quotation'),
        (text.replace("--lr 1", "--lr \\"), r" --lr \\: no escaped character"),
        (text + "codecs: {klt: --codec 'klt}\n", "--codec 'klt: no closing quotation"),
        (text + 'cells: [{ipc: 5, flags: "\'"}]\n', "': no closing quotation"),
        (
            text.replace("ipc: [5]", "ipc: [5, 10]").replace("D", "D{ipc}") + "label_dir: L\n",
            "L must contain {ipc}",
        ),
    ):
        with pytest.raises(UserError, match=message):
            wrong_plan = read(wrong)
            sweep.label_tasks(wrong_plan), sweep.run_tasks(wrong_plan)


def test_values_of_a_plan_are_checked_as_those_of_flags(tmp_path):
    plan = settings(tmp_path, students="ConvNetW32", ipc="5", seeds=3, methods="hard", slc=["5"])
    assert [task.name for task in sweep.run_tasks(plan)] == ["hard_ipc5_ConvNetW32_seed3"]
    assert plan.relabel == "--teacher T"
    for wrong, message in (
        ({"ipc": ["ten"]}, "argument --ipc: 'ten' is not a number"),
        ({"seeds": [[0]]}, "argument --seeds"),
        ({"slc": [5.5]}, "argument --slc"),
        ({"label_slc": [1, 2]}, "unknown argument 2"),
        ({"sic": None}, r"unknown 'sic'; did you mean slc"),
        ({"task": 0}, "unknown 'task'"),
        (
            {"cells": {"ipc": 5, "flags": "--lr 1"}},
            r"cells must be a list, \[{ipc: 5, flags: --lr 1}",
        ),
        ({"codecs": "--codec klt"}, "codecs must be names with .*, {klt: --codec klt}"),
    ):
        with pytest.raises(UserError, match=f"^{tmp_path}/plan.yaml: {message}"):
            settings(tmp_path, **wrong)


def test_only_ipc_is_filled_in_where_a_path_has_braces(tmp_path):
    plan = settings(tmp_path, data_dir="D{x}{ipc}{", label_dir="{}/L")
    assert str(plan.images_dir(5)) == "D{x}5{"
    (static,) = sweep.label_sets(plan, 5, "static")[""]
    assert str(static.done.parent) == "{}/L_static"


def test_a_plan_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "plan.yaml").write_bytes(b"dataset: d\xe9\n")
    with pytest.raises(UserError, match=r"plan\.yaml: not YAML: 'utf-8' codec can't"):
        sweep.read_settings(["--plan", str(tmp_path / "plan.yaml")])


def task(tmp_path, name, code) -> runner.Task:
    done, program = tmp_path / name, tmp_path / f"{name}.py"
    program.write_text(code.format(done=str(done)))
    return runner.Task(name, [str(program)], done, tmp_path / "logs", {})


WRITE = "open({done!r}, 'a').write('x')"


def test_finished_tasks_are_skipped_and_failures_do_not_stop_the_others(tmp_path):
    done = task(tmp_path, "done", WRITE)
    done.done.write_text("before")
    tasks = [done, task(tmp_path, "bad", "print('why'); raise SystemExit(2)")]
    tasks += [task(tmp_path, f"new{index}", WRITE) for index in range(3)]
    failed = runner.run_all(tasks, [{}, {}], "runs")
    assert failed == ["bad: why"]
    assert done.done.read_text() == "before"
    assert all(task.done.read_text() == "x" for task in tasks[2:])


def test_a_task_with_other_flags_is_not_done(tmp_path):
    """Its command is started again, and refuses what it finds; the result is not collected."""
    first = task(tmp_path, "a", WRITE)
    assert runner.run_all([first], [{}], "runs") == []
    other = task(tmp_path, "a", "print('other settings'); raise SystemExit(2)")
    other.command.append("--other")
    assert first.is_done() and not other.is_done()
    failed = runner.run_all([other], [{}], "runs")
    assert failed == ["a: other settings"]
    assert sweep.collect([other]) == []


def test_methods_whose_folders_would_be_the_same_are_refused(tmp_path):
    both = {
        "soft 1/4": {"like": "soft", "flags": "--temperature 4"},
        "soft 1-4": {"like": "soft", "flags": ""},
    }
    with pytest.raises(UserError, match="two tasks would both be soft-1-4_slc5_"):
        sweep.run_tasks(settings(tmp_path, methods=both))


def test_more_jobs_than_gpus_share_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    names = [slot["CUDA_VISIBLE_DEVICES"] for slot in runner.machine_slots(3)]
    assert names == ["3", "5", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_sweep_ends_its_run_by_sigterm_and_continues(tmp_path, by):
    """The run has time to save, and does not go on by itself, however the planner ends."""
    started, saved = tmp_path / "pid", tmp_path / "saved"
    (tmp_path / "forever.py").write_text(
        "import os, signal, sys, time\n"
        "def save(*_):\n"
        f"    time.sleep(0.5); open({str(saved)!r}, 'w'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)\n"
    )
    code = (
        "import sys; sys.path.insert(0, {root!r})\n"
        "from pathlib import Path\nfrom analysis import runner\n"
        "tasks = [runner.Task('a', [{program!r}], Path('/nowhere'), Path({logs!r}), {{}})]\n"
        "runner.run_all(tasks, [{{}}], 'runs')\n"
    ).format(root=str(ROOT), program=str(tmp_path / "forever.py"), logs=str(tmp_path / "logs"))
    planner = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (started.exists() and started.read_text()):
        time.sleep(0.05)
    child = int(started.read_text())
    planner.send_signal(by)
    assert planner.wait() == (-by if by == signal.SIGKILL else 128 + by)
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child) and saved.exists()
    again = task(tmp_path, "a", WRITE)
    assert runner.run_all([again], [{}], "runs") == []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def result(top1: float, size: int) -> str:
    best = {"epoch": 2, "top1": top1 + 1, "top5": 100}
    last = {"epoch": 4, "top1": top1, "top5": 100}
    facts = {"label_bytes": size, "epochs": 4, "seconds": 1.5, "device": "cpu"}
    return json.dumps({"best": best, "last": last, **facts})


def test_results_become_csv_table_and_plots(tmp_path):
    tasks = sweep.run_tasks(settings(tmp_path))
    for position, one in enumerate(tasks):
        one.done.parent.mkdir(parents=True)
        size = 0 if one.facts["method"] == "hard" else 100 * one.facts["slc"]
        one.done.write_text(result(50.0 + position, size))
    out = tmp_path / "out"
    tables.report(sweep.collect(tasks), out, {})
    rows = tables.read_csv(out / "results.csv")
    assert rows == sweep.collect(tasks)
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 5
    assert table[2] == "| ConvNetW32 | 5 | hard | – | 0 | 52.5 ± 2.1 | 51.5 ± 2.1 | 2 |"
    assert table[4] == "| ConvNetW32 | 5 | soft | 10 | 1,000 | 54.5 ± 2.1 | 53.5 ± 2.1 | 2 |"
    for name in ("top1_slc.png", "top1_bytes.png"):
        assert Image.open(out / name).size[0] > 800


def test_the_summary_counts_seeds_and_gives_no_deviation_of_a_single_one(tmp_path):
    tasks = sweep.run_tasks(settings(tmp_path, methods=["hard"]))
    for top1, one in zip((50.0, 53.0), tasks, strict=True):
        one.done.parent.mkdir(parents=True)
        one.done.write_text(result(top1, 0))
    (line,) = tables.summary(sweep.collect(tasks))
    assert (line["n"], line["last_top1_mean"], line["last_top1_std"]) == (2, 51.5, 2.1213)
    assert (line["best_top1_mean"], line["best_top5_mean"], line["seconds_mean"]) == (
        52.5,
        100,
        1.5,
    )
    (line,) = tables.summary(sweep.collect(tasks[:1]))
    assert (line["n"], line["last_top1_std"]) == (1, None)


def test_a_second_plan_adds_to_the_results_of_the_first(tmp_path):
    """A run whose result is gone is no longer counted."""
    out = tmp_path / "out"
    plans = [
        settings(tmp_path, methods=["hard"]),
        settings(tmp_path, methods=["soft"], codecs={"fp16": ""}, slc=[5]),
    ]
    for plan in plans:
        tasks = sweep.run_tasks(plan)
        for one in tasks:
            one.done.parent.mkdir(parents=True)
            one.done.write_text(result(50.0, 10))
        tables.report(sweep.collect(tasks), out, {})
    methods = ["hard", "hard", "soft", "soft"]
    assert [row["method"] for row in tables.read_csv(out / "results.csv")] == methods
    assert len((out / "table.md").read_text().splitlines()) == 4
    (out / "runs/hard_ipc5_ConvNetW32_seed0/result.json").unlink()
    tables.report(sweep.collect(tasks), out, {})
    assert [row["method"] for row in tables.read_csv(out / "results.csv")] == methods[1:]
    (out / "results.csv").write_text("run,ipc\na,b\n")
    with pytest.raises(UserError, match=r"results\.csv is damaged"):
        tables.report(sweep.collect(tasks), out, {})


def test_cells_have_flags_of_their_own(tmp_path):
    cells = [{"ipc": 5, "labels_per_image": 2, "flags": "--soft-epochs 3"}]
    tasks = sweep.run_tasks(settings(tmp_path, cells=cells, seeds=[0], methods=["soft"]))
    assert [checks.parse(task).soft_epochs for task in tasks] == [None, 3]


def test_a_split_holds_out_the_same_number_of_each_class(tmp_path, command):
    data = write_images(tmp_path / "data", 5, seed=0)
    arguments = ("--data-dir", data, "--out-dir", tmp_path / "split", "--held-out", 2)
    done = command(prepare_split.main, *arguments)
    assert done.code == 0 and "8 held_out, 12 rest" in done.out
    parts = [
        folders.scan(tmp_path / "split" / part, TINY.num_classes) for part in ("held_out", "rest")
    ]
    assert [part.counts() for part in parts] == [[2] * 4, [3] * 4]
    names = [{path.relative_to(part.root) for path in part.files} for part in parts]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 20
    assert "nothing to do" in command(prepare_split.main, *arguments).out
    refused = command(prepare_split.main, *arguments[:-1], 1)
    assert refused.code == 2 and "exists already" in refused.err
    refused = command(
        prepare_split.main, *arguments[:2], "--out-dir", tmp_path / "b", "--held-out", 5
    )
    assert refused.code == 2 and "has only 5 images" in refused.err
