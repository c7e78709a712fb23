"""Two processes of torchrun give what one gives."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, generate_arguments, script, train_arguments, tree, write_images

from relabel import generate
from validate import evaluate, train


def torchrun(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs an entry script in two processes on the CPU, one thread each."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", *map(str, arguments)),
        ],
        cwd="/",
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "tests"),
            **environment,
        },
        capture_output=True,
        text=True,
    )


@pytest.fixture
def one_thread():
    """As many threads as each of the two processes has: sums are rounded in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_label_as_one_does(world, tmp_path, command, one_thread):
    def arguments(name):
        return generate_arguments(world.data, tmp_path / name, world.weights, "--slc", 9)

    assert command(generate.main, *arguments("one")).code == 0
    done = torchrun(ROOT / "relabel/generate.py", *arguments("two"))
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(re.findall("36 soft labels in", done.stdout)) == 1


def test_two_processes_train_as_one_that_accumulates(world, tmp_path, command, one_thread):
    """With a rank that fails on the way; and 260 validation images, 256 and 4 of them a batch."""
    labels = generate_arguments(world.data, tmp_path / "labels", world.weights, "--slc", 6)
    assert command(generate.main, *labels, "--batch-size", 3).code == 0
    settings = SimpleNamespace(
        data=world.data, labels=tmp_path / "labels", val=write_images(tmp_path / "val", 65, seed=1)
    )
    more = ("--model", "breaking_student:build", "--soft-epochs", 3, "--eval-every", 3)

    def arguments(name, *others):
        return train_arguments(settings, tmp_path / name, *more, *others)

    broken = torchrun(ROOT / "validate/train.py", *arguments("two"), BREAK_RANK="1")
    assert broken.returncode != 0 and "broken on purpose" in broken.stderr
    done = torchrun(ROOT / "validate/train.py", *arguments("two"))
    assert done.returncode == 0, done.stderr
    assert "continuing after epoch 3 of 5" in done.stdout
    assert "2 processes: an optimiser step takes 2 batches of 3 = 6 views" in done.stdout
    assert command(train.main, *arguments("one", "--grad-accum", 2)).code == 0
    one, two = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("one", "two"))
    parameters = [k for k in one if not k.endswith(("running_mean", "running_var", "tracked"))]
    assert all(torch.equal(one[k], two[k]) for k in parameters)
    assert any(not torch.equal(one[k], two[k]) for k in one if "running_mean" in k)

    last = json.loads((tmp_path / "two" / "result.json").read_text())["last"]
    evaluated = command(
        evaluate.main,
        *("--checkpoint", tmp_path / "two" / "checkpoint.pt", "--val-dir", settings.val),
        *("--model", "breaking_student:build", "--device", "cpu"),
    )
    assert f"top-1 {last['top1']:.4f} %, top-5 {last['top5']:.4f} % of 260" in evaluated.out


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        ("return", 0, "^$"),
        ('raise cli.UserError("as told")', 2, "^-c: as told\n$"),
        ('raise ValueError("a mistake")', 1, "^Traceback(.|\n)*ValueError: a mistake\n$"),
    ],
)
def test_a_process_beside_others_skips_finalisation_and_keeps_its_code(
    tmp_path, ending, code, told
):
    """In finalisation a gloo thread that outlives the process group can abort the process."""
    program = f"""
import atexit, torch.distributed as dist
from utils import cli
class Told:
    def __del__(self):
        print("finalised")
object_of_the_module = Told()
def main():
    dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
    {ending}
atexit.register(print, "exit functions ran")
cli.run(main)
"""
    done = script("-c", program, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == code and re.match(told, done.stderr)
    assert done.stdout == "exit functions ran\n"
