"""Two processes of torchrun give what one gives."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, generate_arguments, tree

from relabel import generate


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    """Runs an entry script in two processes on the CPU, one thread each."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", *map(str, arguments)),
        ],
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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
