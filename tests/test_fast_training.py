"""Fast paths of training and of the machine: the same results as the plain ones."""

import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, script
from torch import nn

from utils import runtime
from utils.data import images
from utils.data.images import ResidentImages
from utils.data.views import ViewSpec, draw
from utils.runtime import Runtime
from validate import step
from validate.kinds import Batch, hard_loss
from validate.step import Step, parameter_groups

GPU = pytest.mark.gpu


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


def loss_curve(machine: Runtime, compiled: bool) -> torch.Tensor:
    """The losses of 50 steps on batches of 4, the last one of 2; AdamW, CutMix, hard labels."""
    model, sums = small_network().to(machine.device), [0.0]
    network = step.compiled(model, machine, 1) if compiled else model
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3, fused=True)
    take_step = Step(network, optimizer, machine.scaler(), machine)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (198, 3, 32, 32), dtype=torch.uint8, generator=generator)
    views = list(draw(ViewSpec(32, 4), np.full((198, 2), 32), 0).to(machine.device))
    labels = (torch.arange(198) % 4).to(machine.device)
    rendered = ResidentImages(pixels, TINY, machine.device).render(views)
    for batch_views, batch_pixels in zip(views, rendered, strict=True):
        batch = Batch(batch_pixels, *batch_views.mixture(labels, 32))
        take_step([batch], lambda logits, batch: hard_loss(logits, batch.mixture, 0.1))
        sums.append(take_step.loss_sum.item())
    return torch.tensor(sums).diff()


def test_fifty_compiled_steps_are_those_of_the_plain_network(monkeypatch):
    """Traced and differentiated as in earnest, but run without making C++ of it, for time."""
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, dynamic: original(model, backend="aot_eager")
    )
    compiled, plain = loss_curve(CPU, True), loss_curve(CPU, False)
    assert len(plain) == 50 and torch.allclose(compiled, plain, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-3), (torch.float16, 3e-2)])
def test_fifty_steps_of_cuda_graphs_are_those_of_single_kernels(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    machine = Runtime(torch.device("cuda"), dtype)
    compiled, plain = loss_curve(machine, True), loss_curve(machine, False)
    assert torch.allclose(compiled, plain, rtol=tolerance)


def test_cuda_graphs_only_where_gradients_end_with_each_batch(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: modes.append(mode))
    gpu = Runtime(torch.device("cuda"), None)
    step.compiled(None, gpu, 1)
    step.compiled(None, gpu, 2)
    step.compiled(None, Runtime(torch.device("cuda"), None, rank=0, world=2), 1)
    step.compiled(None, CPU, 1)
    assert modes == ["reduce-overhead", None, None, None]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_batches_rendered_together_are_those_rendered_alone(monkeypatch, mix, device):
    """Two passes of ten views in batches of 4, 4 and 2, at most 8 views at once."""
    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    spec, sizes = ViewSpec(32, 4, mix=mix), np.full((10, 2), 32)
    drawn = [draw(spec, sizes, seed).to(torch.device(device)) for seed in (0, 1)]
    batches = [batch for views in drawn for batch in views]
    source = ResidentImages(pixels, TINY, torch.device(device))
    source.together = 1
    alone = list(source.render(batches))
    calls, original = [], images.render
    monkeypatch.setattr(
        images, "render", lambda *facts: calls.append(len(facts[0])) or original(*facts)
    )
    source.together = 8
    together = list(source.render(batches))
    assert calls == [8, 2, 8, 2]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


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
    (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(runtime, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda process: range(8))
    assert runtime.usable_cores() == cores
    monkeypatch.setattr(runtime, "_QUOTA", tmp_path / "missing")
    assert runtime.usable_cores() == 8


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
    runtime.from_arguments(Namespace(device=device, amp="off"))
    assert len(called) == calls
