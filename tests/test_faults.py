"""Killed at random moments and continued, or with bits flipped: the same result, or a clear error.

pytest tests/test_faults.py --kills 30 -s kills relabel and train thirty times each, and half as
often recoding and the preparation of images.
"""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, generate_arguments, train_arguments, tree, write_images

from relabel import generate
from utils.cli import UserError
from utils.files import LOCK, load_tensors, seal, sha256_state
from utils.labels import LabelSet
from validate import train

_KILLS_IN_A_ROW = 3  # before a run may end
_ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(command: list[object]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=_ONE_THREAD,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def wait_for_lock(process: subprocess.Popen, folder: Path) -> None:
    """Until the process writes to the folder, or ends."""
    owner = f"process {process.pid} "
    while process.poll() is None:
        if (folder / LOCK).exists() and (folder / LOCK).read_text().startswith(owner):
            return
        time.sleep(0.005)


def kill_and_continue(
    command: Callable[[Path], list[object]],
    root: Path,
    kills: int,
    result: Callable[[Path], object] = tree,
    partial: str = "",
) -> None:
    """Runs a command, kills it at `kills` random moments of its work, and checks each result.

    Args:
        command: the command line that writes to a folder.
        root: where the folders are made; `root/whole` comes from an undisturbed run.
        kills: how often a process is killed.
        result: what of a folder must be the same as after an undisturbed run.
        partial: what the folder's name ends in while the command works.
    """
    whole = start(command(root / "whole"))
    wait_for_lock(whole, root / f"whole{partial}")
    began = time.monotonic()
    finish(whole)
    duration = time.monotonic() - began
    moments, killed, runs = random.Random(0), 0, 0
    while killed < kills:
        folder = root / f"killed_{runs}"
        runs += 1
        for _ in range(min(_KILLS_IN_A_ROW, kills - killed)):
            process = start(command(folder))
            wait_for_lock(process, root / f"{folder.name}{partial}")
            time.sleep(moments.uniform(0, duration / _KILLS_IN_A_ROW))
            process.kill()
            process.wait()
            killed += process.returncode == -signal.SIGKILL
        finish(start(command(folder)))
        assert result(folder) == result(root / "whole")
        shutil.rmtree(folder)
    print(f"{killed} kills in {runs} runs of {duration:.1f} s each: all results identical")


def test_killed_relabelling_continues_to_equal_bytes(tmp_path, world, request):
    """Images of two sizes, so that these are stored; klt, so that a codec is fitted."""
    data = write_images(tmp_path / "data", 2, seed=0)
    write_images(tmp_path / "other", 1, seed=1, size=40)
    for image in (tmp_path / "other").rglob("*.png"):
        shutil.copy(image, data / image.parent.name / "large.png")

    def command(folder: Path) -> list[object]:
        more = ("--slc", 300, "--codec", "klt", "--distortion", 0.01, "--force")
        return [
            ROOT / "relabel/generate.py",
            *generate_arguments(data, folder, world.weights, *more),
        ]

    kill_and_continue(command, tmp_path, request.config.getoption("--kills"))


def test_killed_recoding_continues_to_equal_bytes(tmp_path, world, request, command):
    long = generate_arguments(world.data, tmp_path / "long", world.weights, "--slc", 300)
    assert command(generate.main, *long).code == 0

    def recode(folder: Path) -> list[object]:
        more = ("--codec", "klt", "--bytes-per-label", 8)
        return [
            *(ROOT / "relabel/compress.py", "--label-dir", tmp_path / "long"),
            *("--out-dir", folder, *more),
        ]

    kill_and_continue(recode, tmp_path, request.config.getoption("--kills") // 2)


def test_killed_preparation_starts_over_to_equal_bytes(tmp_path, request):
    def prepare(folder: Path) -> list[object]:
        return [ROOT / "scripts/prepare_digits.py", "--out-dir", folder]

    kills = request.config.getoption("--kills") // 2
    kill_and_continue(prepare, tmp_path, kills, partial=".partial")


def run_results(folder: Path) -> tuple:
    """All of a run folder that must not depend on interruptions."""
    saved = {
        name: {k: v for k, v in load_tensors(folder / name, name).items() if k != "reached"}
        for name in ("checkpoint.pt", "best.pt")
    }
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if "second" not in k} for line in log]
    result = json.loads((folder / "result.json").read_text())
    for name in ("seconds", "hours", "git_commit", "git_dirty"):
        del result[name]
    return sorted(tree(folder)), sha256_state(saved), lines, result


def test_killed_training_continues_to_equal_weights_and_accuracies(tmp_path, world, request):
    def command(folder: Path) -> list[object]:
        more = ("--soft-epochs", 20, "--hard-epochs", 20, "--eval-every", 2)
        return [ROOT / "validate/train.py", *train_arguments(world, folder, *more)]

    kill_and_continue(command, tmp_path, request.config.getoption("--kills"), run_results)


def flip(path: Path, bits: random.Random) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    bit = bits.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_flipped_bits_are_found_or_change_nothing(tmp_path, world, command):
    """Two hundred, over the files of a klt label set of images of two sizes, and a checkpoint."""
    data = write_images(tmp_path / "data", 2, seed=0)
    next(data.rglob("*.png")).write_bytes(
        next(write_images(tmp_path / "other", 1, seed=1, size=40).rglob("*.png")).read_bytes()
    )
    labels, run = tmp_path / "labels", tmp_path / "run"
    more = ("--slc", 6, "--codec", "klt", "--distortion", 0.1, "--force")
    assert command(generate.main, *generate_arguments(data, labels, world.weights, *more)).code == 0
    assert command(train.main, *train_arguments(world, run, "--schedule", "hard:1")).code == 0

    def content(path: Path) -> str:
        if path.parent == run:
            return sha256_state(load_tensors(path, "checkpoint"))
        stored = LabelSet.open(labels)
        views, codes = zip(*map(stored.load_pass, range(stored.passes)), strict=True)
        return sha256_state([stored.manifest, *(vars(v) for v in views), *map(list, codes)])

    paths = [*sorted(labels.iterdir()), run / "checkpoint.pt", run / "best.pt"]
    assert {"manifest.json", "codec.npz", "sizes.npz"} <= {path.name for path in paths}
    bits, found = random.Random(0), 0
    for path in itertools.islice(itertools.cycle(paths), 200):
        intact, before = path.read_bytes(), content(path)
        flip(path, bits)
        try:
            assert content(path) == before, path
        except UserError as error:
            assert str(path.name) in str(error)
            found += 1
        path.write_bytes(intact)
    assert found > 150  # the others were in places of an archive that nobody reads
    print(f"200 flipped bits: {found} found, {200 - found} without any effect")


def test_flipped_bits_in_an_unfinished_set_are_found_or_change_nothing(world, tmp_path, command):
    labels = tmp_path / "labels"
    arguments = generate_arguments(world.data, labels, world.weights, "--slc", 6)
    assert command(generate.main, *arguments).code == 0
    stored = LabelSet.open(labels)
    unfinished = {k: v for k, v in stored.manifest.items() if k not in ("files", "teacher_top1")}
    logits = [stored[batch].logits for batch in range(len(stored))]
    passes = {name: data for name, data in tree(labels).items() if name.startswith("pass")}
    bits, found = random.Random(0), 0
    for name in ["pass_0001.npz", "manifest.partial.json"] * 6:
        shutil.rmtree(labels)
        labels.mkdir()
        (labels / "manifest.partial.json").write_bytes(seal(unfinished))
        for file, data in passes.items():
            (labels / file).write_bytes(data)
        flip(labels / name, bits)
        done = command(generate.main, *arguments)
        if done.code == 0:
            again = LabelSet.open(labels)
            assert again.manifest["teacher_top1"] == stored.manifest["teacher_top1"]
            assert all(torch.equal(again[b].logits, one) for b, one in enumerate(logits))
        else:
            assert done.code == 2 and f"{name} is " in done.err, done.err
            found += 1
    assert found > 6


@pytest.mark.parametrize("file", ["manifest.partial.json", "manifest.json"])
def test_a_file_size_limit_stops_and_loses_nothing(world, tmp_path, command, file):
    """The operating system's own, met in the middle of the first or of the last file."""
    arguments = generate_arguments(world.data, tmp_path / "labels", world.weights, "--slc", 6)
    size = (world.labels / "manifest.json").stat().st_size
    limit = size // 2 if "partial" in file else size - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        done = command(generate.main, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 2 and f"labels/{file}: File too large" in done.err
    done = command(generate.main, *arguments)
    assert done.code == 0 and ("2 of 2 passes are there" in done.out) == (file == "manifest.json")
    assert tree(tmp_path / "labels") == tree(world.labels)
