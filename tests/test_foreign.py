"""What people really have: other codes' checkpoints, untidy folders, their shells and machines."""

import argparse
import datetime
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, CUSTOM, ROOT, TINY, script, train_arguments, write_images
from PIL import Image, features

import models
from relabel.teacher import load_teacher
from utils import cli, runtime
from utils.cli import UserError
from utils.data import datasets, evaluation, folders, images
from utils.data.images import StreamingImages
from utils.data.views import ViewSpec, draw
from utils.files import content_name, load_tensors
from utils.weights import unwrap_state
from validate import train
from validate.evaluate import load_student


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return models.build("ConvNetW32", 4, 32).state_dict()


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state().items()}


@pytest.mark.parametrize(
    "content",
    [
        {"network": state(), "epoch": 3},
        {"weights": state(), "classes": ["a", "b"]},
        {"state": {"model": state()}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        {"model": state(), "optim": {"m": torch.ones(2)}, "lr_scheduler": {"t": torch.ones(1)}},
        {"state_dict": state(), "state_dict_ema": state(1)},
        {"model_state_dict": state(), "centre": {"mean": torch.ones(3)}},
        {"state_dict": prefixed("module._orig_mod.module.")},
        {"model": prefixed("_orig_mod.module.")},
        prefixed("_orig_mod."),
        {"schema": state(), "epoch": 3},
        {"n_averaged": torch.tensor(5), **prefixed("module.")},
        {
            "net": state(),
            "args": argparse.Namespace(lr=0.1, out=Path("runs")),
            "acc": np.float32(9),
        },
    ],
)
def test_the_one_network_in_a_checkpoint_is_taken(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    loaded = unwrap_state(load_tensors(tmp_path / "c.pth", "weights"), tmp_path / "c.pth")
    assert loaded.keys() == state().keys()
    assert all(torch.equal(loaded[key], value) for key, value in state().items())


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema", "EMA_model", "net-ema"])
def test_averaged_weights_are_taken_when_asked_for(tmp_path, key):
    torch.save({"state_dict": state(), key: state(1)}, tmp_path / "c.pth")
    teacher = load_teacher("ConvNetW32", tmp_path / "c.pth", TINY, CPU, ema=True)
    weights = teacher.model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in state(1).items())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"generator": state(), "critic": state()}, "several networks (generator, critic)"),
        ({"epoch": 3, "lr": 0.1}, "no state dict; its top-level keys: 'epoch', 'lr'"),
        ({"model_ema": state(), "epoch": 3}, "'model_ema', 'epoch'; what the caller says"),
        ([1, 2], "no dict at all"),
    ],
)
def test_a_checkpoint_without_exactly_one_network_says_what_it_holds(content, told):
    with pytest.raises(UserError) as refused:
        unwrap_state(content, Path("c.pth"), hint="what the caller says")
    assert told in str(refused.value)


def test_the_way_to_averaged_weights_is_one_that_the_command_has(tmp_path):
    torch.save({"model_ema": state(), "epoch": 3}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="--teacher-ema takes the averaged weights"):
        load_teacher("ConvNetW32", tmp_path / "c.pth", TINY, CPU)
    with pytest.raises(UserError, match="save the averaged weights alone"):
        load_student(tmp_path / "c.pth", "ConvNetW32", TINY)


def test_torchvisions_averaged_weights_are_taken(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(models.build("ConvNetW32", 4, 32))
    torch.save({"model": state(), "model_ema": averaged.state_dict()}, tmp_path / "c.pth")
    teacher = load_teacher("ConvNetW32", tmp_path / "c.pth", TINY, CPU, ema=True)
    expected = averaged.module.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in teacher.model.state_dict().items())


def test_averaged_weights_need_a_file():
    with pytest.raises(UserError, match="there is none for teacher fixed_teacher:factory"):
        load_teacher("fixed_teacher:factory", None, TINY, CPU, ema=True)


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.pth", b"")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: path.write_bytes(b"%PDF-1.7 ..."), "a PDF document"),
        (lambda path: path.write_bytes(b"\n <html><body>Sign in</body>"), "a web page"),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08"), "a gzip archive"),
        (zipped, "a zip archive"),
        (torchscript, "a TorchScript program"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, make, told):
    make(tmp_path / "c.pth")
    with pytest.raises(UserError) as refused:
        load_tensors(tmp_path / "c.pth", "weights")
    assert told in str(refused.value) and "weights_only" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.55, 0.9])
def test_a_checkpoint_that_was_cut_off_is_damaged(tmp_path, share):
    torch.save(state(), tmp_path / "c.pth")
    content = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="is damaged"):
        load_tensors(tmp_path / "c.pth", "weights")


@pytest.mark.parametrize(
    "left_behind",
    [
        *(".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png", "#recycle/0.png"),
        *("._0.png", ".Trash-1000/files/0.png", "@eaDir/0.png/THUMB.jpg"),
    ],
)
def test_what_other_programs_leave_beside_images_is_no_image(tmp_path, left_behind):
    data = write_images(tmp_path / "data", 1, seed=0)
    before = folders.scan(data).files
    path = data / "00001" / left_behind
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(data / "00000" / "0.png", path)
    shutil.copytree(path.parent, data / "@eaDir", dirs_exist_ok=True)
    assert folders.scan(data).files == before


def test_linked_folders_and_files_count_as_what_they_lead_to(tmp_path):
    data = write_images(tmp_path / "data", 1, seed=0)
    more = write_images(tmp_path / "more", 2, seed=1)
    (data / "00002" / "more").symlink_to(more / "00002")
    (data / "00004").symlink_to(more / "00003")
    (data / "00000" / "one.png").symlink_to(more / "00000" / "1.png")
    (data / "00001" / "again").symlink_to(data / "00001")
    (data / "00001" / "all").symlink_to(data)
    names = [path.relative_to(data).as_posix() for path in folders.scan(data).files]
    within = [name for name in names if not name.startswith("00001/all")]
    assert within == [
        *("00000/0.png", "00000/one.png", "00001/0.png", "00002/0.png"),
        *("00002/more/0.png", "00002/more/1.png", "00003/0.png", "00004/0.png", "00004/1.png"),
    ]


def test_a_pipe_among_images_is_refused_and_not_waited_for(tmp_path):
    data = write_images(tmp_path / "data", 1, seed=0)
    os.mkfifo(data / "00001" / "1.png")
    with pytest.raises(UserError, match=r"1\.png is neither a file nor a folder"):
        folders.scan(data)


@pytest.mark.parametrize("name", [b"\xff.png", b"caf\xe9.png", b"\xc3(.png"])
def test_names_that_are_no_text_are_refused_readably(tmp_path, name):
    data = write_images(tmp_path / "data", 1, seed=0)
    Path(os.fsdecode(bytes(data / "00001") + b"/" + name)).touch()
    with pytest.raises(UserError) as refused:
        folders.scan(data)
    assert repr(name)[2:-1] in str(refused.value) and str(refused.value).encode()


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "WEBP"])
def test_the_first_of_several_frames_is_read(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    path = tmp_path / f"x.{kind.lower()}"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    red, _, blue = images.pixels_of(images.decode(path)).float().mean((1, 2))
    assert red > 200 and blue < 60


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (b"\x00\x00\x00\x18ftypheic", "an AVIF or HEIC image"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<svg xmlns=''/>", "an SVG drawing"),
        (b"hello", "not an image"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(tmp_path, head, told):
    (tmp_path / "x.jpg").write_bytes(head)
    with pytest.raises(UserError, match=told):
        images.decode(tmp_path / "x.jpg")


def test_a_format_that_is_not_read_is_named_when_a_class_has_no_other(tmp_path):
    data = write_images(tmp_path / "data", 1, seed=0)
    (data / "00001" / "0.png").rename(data / "00001" / "0.HEIC")
    with pytest.raises(UserError, match=r"00001 has no images, only files .* \(\.heic\)"):
        folders.scan(data)
    assert content_name(data / "00000" / "0.png") is None


def test_the_warnings_of_decoders_are_silenced_once(tmp_path, recwarn):
    image = Image.new("P", (8, 8))
    image.info["transparency"] = bytes(range(4))
    image.save(tmp_path / "x.png", transparency=bytes(range(4)))
    images.decode(tmp_path / "x.png")
    assert not recwarn.list


@pytest.mark.parametrize("room", [0, 100_000, 400_000, 10**9])
def test_no_more_processes_decode_than_can_hand_over_their_crops(tmp_path, monkeypatch, room):
    """Batches of 5 views at 32 pixels take 61,440 bytes; each process keeps up to three."""
    source = StreamingImages([], TINY, CPU.device, 4)
    views = draw(ViewSpec(32, 5), np.full((12, 2), 32), 0)
    usage = shutil.disk_usage("/")._replace(free=room)
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(images, "_SHARED_MEMORY", tmp_path)
    assert source._workers_with_room(list(views)) == room // (3 * 61_440)


@pytest.mark.parametrize("writable", [True, False])
def test_no_process_decodes_without_shared_memory_to_write_to(tmp_path, monkeypatch, writable):
    monkeypatch.setattr(images, "_SHARED_MEMORY", tmp_path if writable else tmp_path / "missing")
    views = draw(ViewSpec(32, 5), np.full((12, 2), 32), 0)
    allowed = StreamingImages([], TINY, CPU.device, 4)._workers_with_room(list(views))
    assert (allowed > 0) == writable


@pytest.mark.parametrize("trouble", ["dies", "hangs"])
def test_a_decoding_process_that_gives_nothing_ends_in_one_line(
    world, monkeypatch, command, trouble
):
    def decode(path):
        if trouble == "dies":
            os._exit(1)
        time.sleep(60)

    monkeypatch.setattr(images, "decode", decode)
    monkeypatch.setattr(images, "_PATIENCE", 2)
    views = draw(ViewSpec(32, 5), np.full((12, 2), 32), 0)
    source = StreamingImages(folders.scan(world.data).files, TINY, CPU.device, 1)
    done = command(lambda: list(source.render([views])))
    assert done.code == 2 and "could not be decoded by 1 processes" in done.err
    assert "--workers 0" in done.err and done.err.count("\n") == 1
    for child in multiprocessing.active_children():
        child.join(5)
    assert not multiprocessing.active_children()


def test_an_epoch_whose_last_batch_cannot_be_trained_on_is_refused_at_once(
    tmp_path, world, command, monkeypatch
):
    """ResNet18 at 32 pixels ends in one pixel, of which BatchNorm wants more than one value."""

    def build(*_):
        layers = (torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4), torch.nn.BatchNorm1d(4))
        return torch.nn.Sequential(*layers)

    monkeypatch.setattr(models, "build", build)
    arguments = train_arguments(world, tmp_path / "run", "--schedule", "hard:1")
    place = arguments.index("--label-dir")
    del arguments[place : place + 2]
    done = command(train.main, *arguments, "--batch-size", 11)
    assert done.code == 2 and "last batch of an epoch, which has 1 views" in done.err
    assert not (tmp_path / "run" / "args.yaml").exists()
    assert command(train.main, *arguments, "--batch-size", 10).code == 0


@pytest.mark.parametrize("value", ["", "auto", "0", "-1", " "])
def test_a_world_size_that_is_no_number_is_one_process(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    monkeypatch.setenv("RANK", value)
    assert cli.world_size() == 1 and cli._rank() == 0


@pytest.mark.parametrize("rank", ["5", "a"])
def test_a_rank_that_is_none_of_the_processes_is_refused(monkeypatch, rank):
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=f"WORLD_SIZE is 2 but RANK is {rank}: start"):
        runtime.start(device="cpu", amp="off")


def test_without_a_home_folder_validation_images_are_cached_elsewhere(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "Main_Data_Path"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user without an entry
    assert Path(evaluation._default_folder()).is_absolute()


def test_home_is_expanded_in_every_path_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = cli.Parser()
    parser.add_argument("--one", type=Path)
    parser.add_argument("--many", nargs="+", type=Path)
    datasets.add_arguments(parser)
    args = parser.parse_args(["--one=~/x", "--many", "~/a b", "/c", *map(str, CUSTOM)])
    assert args.one == tmp_path / "x" and args.many == [tmp_path / "a b", Path("/c")]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the scripts, under a name with a blank."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copy(ROOT / "config.sh", root)
    return root


@pytest.mark.parametrize(
    "config",
    [
        "Main_Data_Path='{home}/d a'\nval_dir='{home}/v'",
        "Main_Data_Path='~/d a'\r\nval_dir=\"~/v\"\r\n# IPC=50\r\n",
        'export Main_Data_Path="$HOME/d a" val_dir=~/v\nMETHOD=fadrm\n',
        "# only a comment\n",
        "\ufeffMain_Data_Path='{home}/d a'\nval_dir='{home}/v'\n[[ -d /nowhere ]] && IPC=50\n",
        "readonly IPC=50 val_dir='{home}/v'; declare -x Main_Data_Path='{home}/d a'\n",
    ],
)
@pytest.mark.parametrize("shell", ["bash", "sh", "posix"])
def test_any_config_that_sets_the_two_paths_works(clone, tmp_path, config, shell):
    (clone / "config.sh").write_bytes(config.format(home=tmp_path).encode())
    environment = {**os.environ, "HOME": str(tmp_path), "CDPATH": f"{clone}:/", "IPC": "7"}
    if shell == "posix":
        environment["POSIXLY_CORRECT"] = "1"
    if "Main_Data_Path" not in config:
        environment |= {"Main_Data_Path": f"{tmp_path}/d a", "val_dir": f"{tmp_path}/v"}
    for folder in ("d a", "v"):
        (tmp_path / folder).mkdir()
    done = subprocess.run(
        ["bash" if shell == "posix" else shell, "scripts/run_cifar100.sh"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        f"no distilled images at {tmp_path}/d a/generated_data/syn_data/cifar100/fadrm_ipc7: "
        in (done.stderr)
    )
    assert f"no class folders of validation images in {tmp_path}/v/cifar100: " in done.stderr
    assert "\r" not in done.stderr and "unbound" not in done.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("IPC=10\nval_dir = /v\n", "line 2: val_dir: command not found"),
        ("val_dir= /nowhere/v\n", "/nowhere/v: No such file or directory"),
        ("val_dir=/v\ncd /nowhere\n", "line 2: cd: /nowhere"),
        ("val_dir=/v\nfalse\n", "a command in it failed"),
        ("val_dir='/v\n", "unexpected EOF"),
        ("val_dir=$NO_SUCH/v\n", "NO_SUCH: unbound variable"),
    ],
)
def test_a_config_that_fails_is_told_in_one_line(clone, config, message):
    (clone / "config.sh").write_text(config)
    command = ["bash", "scripts/run_cifar10.sh"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("config.sh: ") and message in line and "NAME=value" in line


def test_scripts_may_be_called_through_links(clone, tmp_path):
    link = tmp_path / "hald"
    link.symlink_to(clone / "scripts" / "run_imagewoof.sh")
    done = subprocess.run([str(link)], cwd="/", capture_output=True, text=True)
    assert done.returncode == 2 and f"in {clone}/config.sh" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP"])
def test_schedulers_and_closed_terminals_end_any_program_as_sigterm_does(name):
    program = "import os, signal\nfrom utils import cli\n"
    program += f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # nohup may have run the tests
    program += f"cli.run(lambda: os.kill(os.getpid(), signal.{name}))"
    done = script("-c", program, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 128 + {"SIGUSR1": 10, "SIGHUP": 1}[name]
    assert f"ended by {name}; the same command again continues" in done.stderr


def test_names_with_line_breaks_leave_an_error_one_line(tmp_path, command):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a\nb.png").write_bytes(b"")
    done = command(lambda: images.inspect(folders.scan(tmp_path)))
    assert done.code == 2 and "a\\nb.png: it is an empty file" in done.err
    assert done.err.count("\n") == 1


def test_a_second_signal_while_a_program_ends_says_nothing_more(command):
    kill = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731

    def main():
        try:
            with cli.delayed_signals():
                kill()
                kill()
            kill()
        finally:
            kill()

    done = command(main)
    assert done.code == 128 + signal.SIGTERM
    assert done.err == (
        "\nfinishing the step; again: ending at once\n"
        "\ncommand: terminated; the same command again continues\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("lambda: [print(n) for n in range(100_000)]", 128 + 13, ""),
        ('lambda: print(exec("raise cli.UserError(str(7))"))', 2, "-c: 7\n"),
        ('lambda: cli.Parser().parse_args(["--help"])', 0, ""),
    ],
)
def test_output_that_nobody_reads_ends_a_program_quietly(body, code, error):
    program = f"import time; from utils import cli; print(1); time.sleep(.5); cli.run({body})"
    command = f"{sys.executable} -c '{program}' | head -0; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", error)


def test_processes_that_never_come_are_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(runtime, "_MEETING", datetime.timedelta(seconds=1))
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="2 processes of this job did not meet"):
        runtime.start(device="cpu", amp="off")
