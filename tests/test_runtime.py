"""The machine: what it lacks or what fails on it is said as what it is, and fp32 is fp32."""

import pytest
import torch
from conftest import CPU, TINY
from torch import nn

from utils import cli, runtime
from utils.cli import UserError


@pytest.fixture
def device_file(tmp_path, monkeypatch):
    """An NVIDIA device, as far as a file tells, without a driver that works."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(runtime, "_NVIDIA_DEVICES", (tmp_path, "nvidia[0-9]*"))
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01\n")
    monkeypatch.setattr(runtime, "_NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "nvidia0"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_whose_driver_does_not_start_is_no_reason_for_the_cpu(
    device_file, monkeypatch, device
):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(UserError) as stopped:
        runtime.start(device=device, amp="auto")
    for part in ("too old", "470.82.01", torch.__version__, "--device cpu"):
        assert part in str(stopped.value)


def test_who_asks_for_the_cpu_hides_the_gpu_or_may_not_open_it_gets_the_cpu(
    device_file, monkeypatch
):
    assert runtime.start(device="cpu", amp="off").device.type == "cpu"
    for hidden in ("", "-1", "NoDevFiles", "none", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert runtime.start(device="auto", amp="off").device.type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    device_file.unlink()
    device_file.mkdir()  # cannot be opened, as another job's device
    assert runtime.start(device="auto", amp="off").device.type == "cpu"


def test_a_named_gpu_becomes_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    machine = runtime.start(device="cuda:1", amp="auto")
    assert machine.device == torch.device("cuda", 1) and chosen == [1]
    assert machine.precision == "fp16"


def test_single_precision_is_not_shortened(monkeypatch):
    """As TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 of some containers would have it."""
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    runtime.start(device="cpu", amp="off")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


class Failing(nn.Module):
    """A network on which the GPU fails."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        raise self.error


FAILURES = {
    "CUDA error: no kernel image is available for execution on the device": "has no code for",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": "GPU memory",
    "CUDA error: out of memory": "GPU memory",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable": "another job",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED": "LD_LIBRARY_PATH",
    "CUDA driver error: device not ready": "CUDA_LAUNCH_BLOCKING=1",
    "CUDA error: an illegal memory access was encountered": "CUDA_LAUNCH_BLOCKING=1",
}


@pytest.mark.parametrize("text", FAILURES)
def test_a_failing_gpu_is_not_taken_for_a_network_that_does_not_fit(command, text):
    kind = torch.AcceleratorError if text.startswith("CUDA error: no kernel") else RuntimeError
    network = Failing(kind(f"{text}\nCompile with TORCH_USE_CUDA_DSA ..."))
    check = lambda: runtime.check_outputs(network, TINY, CPU.device, "teacher")  # noqa: E731
    done = command(check)
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1
    assert text in done.err and FAILURES[text] in done.err and "does not take" not in done.err


def test_other_errors_are_not_the_gpus():
    assert cli.gpu_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert cli.gpu_failure(ValueError("CUDA error")) is None


@pytest.mark.parametrize(
    ("limit_file", "use_file", "statistics"),
    [
        ("memory.max", "memory.current", "inactive_file 290\nactive_file 10"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "inactive_file 7\ntotal_inactive_file 290\ntotal_active_file 10",
        ),
    ],
)
def test_a_containers_memory_is_what_it_may_take(
    tmp_path, monkeypatch, limit_file, use_file, statistics
):
    monkeypatch.setattr(runtime, "_CGROUP", tmp_path)
    free = runtime.available_memory()
    assert free > 1_000_000
    (tmp_path / "memory").mkdir()
    (tmp_path / limit_file).write_text("100000\n")
    (tmp_path / use_file).write_text("60000\n")
    (tmp_path / use_file).with_name("memory.stat").write_text(f"anon 9\n{statistics}\n")
    assert runtime.available_memory() == 40_300
    (tmp_path / limit_file).write_text("max\n" if limit_file == "memory.max" else f"{2**62}\n")
    assert runtime.available_memory() > 1_000_000
