"""Fast paths of training and of the machine: the same results as the plain ones."""

import dataclasses
import os
from contextlib import nullcontext
from unittest import mock
from unittest.mock import DEFAULT

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, open_run, script
from fake_gpu import fake_gpu, machine

from utils import runtime
from utils.cli import UserError
from utils.data import images
from utils.data.images import ResidentImages
from utils.data.views import ViewSpec, draw
from utils.graphs import Graphs
from utils.runtime import Runtime
from validate.kinds import in_groups
from validate.settings import Materials, Settings
from validate.train import Training

GPU = pytest.mark.gpu


def trained(
    settings: Settings, materials: Materials, machine: Runtime, graphs: bool
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Means of every epoch and the final weights; continued from a checkpoint halfway."""
    means, epochs, state = [], len(settings.kinds), {}
    for first, end in ((0, epochs // 2), (epochs // 2, epochs)):
        training = Training(settings, materials, machine)
        training.step.graphs = Graphs(machine.device, "a step") if graphs else None
        if first:
            training.restore(state)
        rates = [group["lr"] for group in training.optimizer.param_groups]
        assert all(rate is training.lr for rate in rates)  # which is what a graph reads
        for epoch in range(first, end):
            kind = training.begin_epoch(epoch)
            for batches in training.batches(kind, epoch):
                training.step(batches, kind.loss)
            means.append(training.step.means())
        state = training.state()
    return means, state["model"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("schedule", ["hard:2,soft:2,joint:2,moved:2,soft:1", "static:2"])
def test_steps_as_graphs_are_those_of_single_kernels(
    world, whole_labels, tmp_path, schedule, device, monkeypatch
):
    """Kinds that alternate, last batches of 2 among 5, rates and temperatures of every epoch."""
    # Else gradients of weights are summed in any order, and steps of Adam enlarge the difference.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    machine = Runtime(torch.device(device), None)
    labels = ["--label-dir", whole_labels] if "static" in schedule else []
    flags = ["--temperature-end", "2", "--soft-loss-scale", "T2", "--lr", "0.01"]
    settings, materials = open_run(world, tmp_path, "--schedule", schedule, *flags, *labels)
    eager, expected = trained(settings, materials, machine, graphs=False)
    graphed, weights = trained(settings, materials, machine, graphs=True)
    for one, other in zip(graphed, eager, strict=True):
        assert one == pytest.approx(other, rel=0 if device == "cpu" else 1e-3)
    for name, weight in weights.items():
        # Biases before BatchNorm have gradients of rounding noise, of which Adam makes whole steps.
        if device == "cpu" or weight.ndim > 1:
            assert torch.allclose(
                weight, expected[name], rtol=0, atol=0 if device == "cpu" else 1e-2
            )


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
def test_most_steps_are_replayed(world, tmp_path, amp, monkeypatch):
    """In 8 epochs of 3 batches of two sizes: 2 x 3 to warm up, and none after the captures."""
    settings, materials = open_run(world, tmp_path, "--schedule", "hard:8")
    training = Training(settings, materials, Runtime(torch.device("cuda"), amp))
    original, calls = training.step._update, []
    monkeypatch.setattr(
        training.step, "_update", lambda *given: calls.append(given) or original(*given)
    )
    for epoch in range(8):
        kind = training.begin_epoch(epoch)
        for batches in training.batches(kind, epoch):
            training.step(batches, kind.loss)
    assert len(calls) == 2 * (3 + 1) and training.step.steps == 8 * 3


def test_a_compiled_student_trains_as_the_plain_one(world, tmp_path, monkeypatch):
    """Traced and differentiated as in earnest, but run without making C++ of it, for time."""
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, dynamic: original(model, backend="aot_eager")
    )
    settings, materials = open_run(world, tmp_path, "--schedule", "hard:4,soft:4", "--compile")
    plain = dataclasses.replace(settings, compile=False)
    compiled, _ = trained(settings, materials, CPU, graphs=True)
    expected, _ = trained(plain, materials, CPU, graphs=False)
    for one, other in zip(compiled, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "processes", "graphs"),
    [
        ([], 1, True),
        ([], 2, False),
        (["--no-graph"], 1, False),
        (["--grad-accum", "2"], 1, False),
    ],
)
def test_graphs_where_gradients_end_with_each_batch(world, tmp_path, flags, processes, graphs):
    settings, materials = open_run(world, tmp_path, "--schedule", "hard:1", *flags)
    several = dataclasses.replace(machine(), world=processes)
    with (
        fake_gpu(),
        mock.patch.multiple(runtime, check_outputs=DEFAULT, check_trains=DEFAULT),
        mock.patch.object(Runtime, "shared", lambda _, model: model),
    ):
        assert (Training(settings, materials, several).step.graphs is not None) == graphs
    assert Training(settings, materials, CPU).step.graphs is None


class Capture:
    """In place of torch.cuda.graph: what an exception within a capture meets on its way out."""

    def __init__(self, graph, **_):
        assert isinstance(graph, Capture | mock.Mock)

    def __enter__(self): ...

    def __exit__(self, kind, error, trace):
        if error:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def pretended(monkeypatch):
    """Graphs on the CPU that believe in a GPU, and what they do in order."""
    done = []
    graph = mock.Mock()
    graph.replay = lambda: done.append("replay")
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    graphs = Graphs(CPU.device, "a training step")
    graphs.real, graphs.side_stream, graphs.memory_pool = True, mock.Mock(), None
    return graphs, done


def test_a_step_warms_up_is_captured_and_replayed_for_each_kind_and_shape(pretended):
    graphs, done = pretended
    for kind, views in [("hard", 4)] * 5 + [("hard", 2)] * 4 + [("soft", 4)]:
        graphs.run(kind, lambda pixels: done.append(len(pixels)), torch.zeros(views))
    assert done == [4, 4, 4, 4, "replay", "replay", 2, 2, 2, 2, "replay", 4]


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (RuntimeError("operation not permitted\n..."), UserError, "not permitted.*--no-graph"),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "full"),
        (SystemExit(143), SystemExit, "143"),
    ],
)
def test_what_ends_a_capture_is_told_as_what_it_is(pretended, error, kind, told):
    graphs, done = pretended

    def body(_):
        done.append("called")
        if len(done) > 3:
            raise error

    with pytest.raises(kind, match=told):
        for _ in range(4):
            graphs.run("hard", body, torch.zeros(4))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_batches_rendered_together_are_those_rendered_alone(mix, device):
    """Two passes of ten views in batches of 4, 4 and 2, at most 8 views at once."""
    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    spec, sizes = ViewSpec(32, 4, mix=mix), np.full((10, 2), 32)
    drawn = [draw(spec, sizes, seed).to(torch.device(device)) for seed in (0, 1)]
    batches = [batch for views in drawn for batch in views]
    source = ResidentImages(pixels, TINY, torch.device(device))
    alone = torch.cat(list(source.render(batches)))
    groups = in_groups(batches, 8)
    assert [len(views.index) for views in groups] == [8, 2, 8, 2]
    assert torch.allclose(torch.cat(list(source.render(groups))), alone, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32, 128])
def test_images_left_in_main_memory_render_as_those_on_the_gpu(size, monkeypatch):
    device = torch.device("cuda")
    pixels = torch.randint(0, 256, (20, 3, size, size), dtype=torch.uint8)
    views = draw(ViewSpec(size, 8), np.full((20, 2), size), 1).to(device)
    near, far = (ResidentImages(pixels, TINY, device) for _ in range(2))
    far.pixels, sent = pixels, []
    original = images.send
    monkeypatch.setattr(images, "send", lambda *facts: sent.append(True) or original(*facts))
    rendered = list(near.render(list(views)))
    assert not sent
    for one, other in zip(rendered, far.render(list(views)), strict=True):
        assert torch.equal(one, other)
    assert sent


@pytest.mark.parametrize(
    ("content", "cores"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("", 8)]
)
def test_a_containers_quota_limits_the_cores(tmp_path, monkeypatch, content, cores):
    monkeypatch.setattr(runtime, "_CGROUP", tmp_path)
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda process: range(8))
    assert runtime.usable_cores() == 8
    (tmp_path / "cpu.max").write_text(content)
    assert runtime.usable_cores() == cores
    (tmp_path / "cpu.max").unlink()
    quota, _, period = content.replace("max", "-1").partition(" ")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text(f"{period}\n")
    assert runtime.usable_cores() == cores


def test_freed_memory_stays_with_the_process():
    code = """
import re, torch
from utils import runtime
def held():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
runtime.keep_freed_memory()
tensor = torch.empty(10_000_000).fill_(1)
before = held()
del tensor
print(before - held())
"""
    done = script("-c", code, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4_000  # kB, of 40,000


@pytest.mark.parametrize(("device", "calls"), [("cpu", 1), pytest.param("cuda", 0, marks=GPU)])
def test_memory_is_kept_on_a_cpu(monkeypatch, device, calls):
    called = []
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: called.append(True))
    runtime.start(device, "off")
    assert len(called) == calls
