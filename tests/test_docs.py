"""The pages of docs/ and the README: their examples run, and what they name exists."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from string import Template

import numpy as np
import pytest
from conftest import ROOT, generate_arguments, script, train_arguments, write_images
from PIL import Image

from analysis import checks, estimate, sweep
from utils.labels import LabelSet

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("analysis", "benchmarks", "models", "relabel", "scripts", "utils", "validate")
CODE = {
    path: path.read_text()
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.*"))
    if path.suffix in (".py", ".sh")
}
FOREIGN_FLAGS = {
    "--logit-range",  # of the codec that docs/extending.md adds
    "--nproc_per_node",  # of torchrun
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def block(page: str, marker: str) -> str:
    """The code block of a page that follows the comment <!-- marker -->."""
    pattern = rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)```\n"
    (code,) = re.findall(pattern, (ROOT / page).read_text(), re.DOTALL)
    return code


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the code, without the user's own extensions."""
    root = tmp_path / "clone"
    for folder in ("models", "relabel", "utils", "validate"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.pyc"))
    (root / "extensions").mkdir()
    return root


def add(clone: Path, file: str) -> None:
    """Writes the example of docs/extending.md for a file that is not there yet."""
    assert not (clone / file).exists()
    (clone / file).write_text(block("docs/extending.md", f"file: {file}"))


def run(clone: Path, entry: str, arguments: list[object]) -> str:
    """What an entry script of the copy prints; it must succeed."""
    done = script(clone / entry, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kinds_logged(run_folder: Path) -> list[str]:
    lines = (run_folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["kind"] for line in lines]


def test_a_kind_and_a_loss_are_one_class_in_one_new_file(world, clone, tmp_path):
    add(clone, "extensions/mixed.py")
    add(clone, "extensions/squared.py")
    schedule = ("--schedule", "soft:1,mixed:2,squared:1")
    run(clone, "validate/train.py", train_arguments(world, tmp_path / "run", *schedule))
    assert kinds_logged(tmp_path / "run") == ["soft", "mixed", "mixed", "squared"]
    assert (tmp_path / "run/curves.png").exists()


def test_a_codec_with_its_flag_is_one_class_in_one_new_file(world, clone, tmp_path):
    add(clone, "extensions/byte.py")
    labels, decoded = tmp_path / "labels", tmp_path / "decoded"
    byte = ("--slc", 6, "--codec", "byte", "--logit-range", 40)
    run(clone, "relabel/generate.py", generate_arguments(world.data, labels, world.weights, *byte))
    recode = ["--label-dir", labels, "--out-dir", decoded, "--codec", "fp16"]
    run(clone, "relabel/compress.py", recode)
    for expected, found in zip(LabelSet.open(world.labels), LabelSet.open(decoded), strict=True):
        assert (expected.views.index == found.views.index).all()
        half_precision = 2**-10 * float(expected.logits.abs().max())
        error = float((expected.logits - found.logits).abs().max())
        assert 0 < error < 40 / 127 + half_precision
    arguments = train_arguments(world, tmp_path / "run", "--label-dir", labels)
    run(clone, "validate/train.py", [*arguments, "--schedule", "soft"])
    assert kinds_logged(tmp_path / "run") == ["soft"] * 4


def test_a_data_set_is_a_line_and_a_network_a_function(world, clone, tmp_path):
    add(clone, "extensions/plain.py")
    with (clone / "utils/data/datasets.yaml").open("a") as file:
        file.write(block("docs/extending.md", "file: utils/data/datasets.yaml, appended"))
    arguments = [
        *("--data-dir", world.data, "--val-dir", world.val, "--output-dir", tmp_path / "run"),
        *("--dataset", "stripes", "--model", "extensions.plain:plain", "--schedule", "hard:1"),
        *("--device", "cpu", "--workers", 0),
    ]
    run(clone, "validate/train.py", arguments)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["dataset"], result["model"]) == ("stripes", "extensions.plain:plain")


def test_the_reader_of_the_page_reads_what_the_label_set_says(world):
    page: dict = {}
    exec(block("docs/label-format.md", "example: reader of an fp16 set"), page)
    labels = LabelSet.open(world.labels)
    for pass_index in range(labels.passes):
        image, logits = page["read_pass"](world.labels, pass_index)
        whole = labels.whole_pass(pass_index)
        assert np.array_equal(image, whole.views.index.numpy())
        assert np.array_equal(logits, whole.logits.numpy())


def test_the_page_names_every_field_and_array_of_a_label_set(world):
    text = (ROOT / "docs/label-format.md").read_text()
    manifest = json.loads((world.labels / "manifest.json").read_text())
    with np.load(world.labels / "pass_0000.npz") as archive:
        names = [*manifest, *manifest["images"], *manifest["teachers"][0], *archive.files]
    assert [field for field in names if f"`{field}`" not in text] == []


def test_the_sweep_and_the_plan_of_the_page_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("Main_Data_Path", "/data")
    command = shlex.split(block("docs/analysis.md", "example: sweep").replace("\\\n", ""))
    given = sweep.read_settings(command[2:])
    images = tmp_path / "IMAGES_ipc10" / "00000"
    images.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert len(sweep.run_tasks(given)) == 3 * (1 + 3 * 2)
    (tmp_path / "plan.yaml").write_text(block("docs/analysis.md", "example: plan"))
    plan = sweep.read_settings(["--plan", "plan.yaml"])
    tasks = sweep.run_tasks(plan)
    assert len(tasks) == 3 * 2 * (1 + 2 * 2 * 2)
    assert plan.images_dir(50) == Path("/data/generated_data/syn_data/cifar100/fadrm_ipc50")
    assert [checks.parse(task).soft_epochs for task in tasks[:3]] == [None, 100, 100]
    assert "runs: 54, 54 to do" in estimate.estimate(plan, sweep.label_tasks(plan), tasks)


QUICK = {  # what makes a command of docs/own-images.md short
    "scripts/train_teacher.sh": "--schedule hard:2 --lr 0.01 --device cpu --workers 0",
    "scripts/prepare_distilled.py": "--device cpu --workers 0",
    "relabel/generate.py": "--device cpu --workers 0 --force",  # the teacher has learnt nothing yet
    "relabel/report.py": "",
    "validate/train.py": "--soft-epochs 1 --hard-epochs 1 --device cpu --workers 0",
    "validate/evaluate.py": "--device cpu",
    "scripts/run_sweep.sh": "--soft-epochs 1 --hard-epochs 1 --device cpu --workers 0",
}


@pytest.mark.slow
def test_the_commands_for_own_images_run_one_after_the_other(tmp_path, command, monkeypatch):
    """As they stand, but on tiny images, with a small network and few epochs."""
    training = write_images(tmp_path / "photos/train", 12, seed=0, size=40)
    write_images(tmp_path / "photos/val", 3, seed=1, size=40)
    (training / "00000/0.png").unlink()  # classes of different sizes
    Image.new("RGB", (60, 44)).save(training / "00001/0.png")  # decoded when needed
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/own-images.md").read_text()
    text = "".join(re.findall(r"<!-- run: own images -->\n```\n(.*?)```\n", page, re.DOTALL))
    for given, small in (("/data", f"{tmp_path}"), ("ResNet18", "ConvNetW32"), (" 64 ", " 32 ")):
        text = text.replace(given, small)
    variables: dict[str, str] = {}
    ran = []
    for line in text.replace("\\\n", "").splitlines():
        words = shlex.split(Template(line).substitute(variables), comments=True)
        while words and "=" in words[0]:
            variable, _, variables[variable] = words.pop(0).partition("=")
        if not words:
            continue
        program, entry, *flags = words
        flags += QUICK[entry].split()
        if program == "bash":
            environment = {**os.environ, **variables}
            done = subprocess.run([program, entry, *flags], env=environment, capture_output=True)
            assert done.returncode == 0, done.stderr
        else:
            module = importlib.import_module(entry.removesuffix(".py").replace("/", "."))
            done = command(module.main, *flags)
            assert done.code == 0, done.err
        ran.append(entry)
    assert {*ran} == {*QUICK} and len(ran) == 9
    assert (tmp_path / "hald/comparison/table.tex").exists()
    assert kinds_logged(tmp_path / "hald/student") == ["hard", "soft"]
    labels = LabelSet.open(tmp_path / "hald/labels")
    assert labels.manifest["bssl"] is False and labels.passes == 3
    full = LabelSet.open(tmp_path / "hald/labels_full")
    assert full.manifest["images"]["count"] == 47 and full.passes == 2


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_files_of_a_page_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [page.parent / link for link in links if "://" not in link]
    rooms = "|".join([*ROOMS, "docs", "tests"])
    named = re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w./-]*\.(?:py|sh|md|yaml|txt|csv|png)\b", text)
    missing = [path for path in [*local, *(ROOT / file for file in named)] if not path.exists()]
    assert missing == []


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def test_every_flag_of_the_pages_is_one_of_a_parser(command):
    known = set(FOREIGN_FLAGS)
    for path in [path for path, code in CODE.items() if "cli.run(main)" in code]:
        module = importlib.import_module(name(path).removesuffix(".py").replace("/", "."))
        known |= flags_in(command(module.main, "--help").out)
    known |= flags_in((ROOT / "scripts/sweep_slurm.sh").read_text())  # those of sbatch
    for page in PAGES:
        assert flags_in(page.read_text()) - known == set(), name(page)


def test_the_refusals_of_the_page_are_those_of_the_code():
    page = (ROOT / "docs/imagenet.md").read_text().partition("## When something is refused")[2]
    code = re.sub(r'"(?: \\)?\n\s+f?"', "", "".join(CODE.values()))  # strings over several lines
    for line in re.findall(r"^\| (?!the line says)([^|-][^|]*) \|", page, re.MULTILINE):
        shown = re.split(r"\.\.\.|'[^']*'|--[\w-]+|\([^)]*\)|nan|\d[\d.]*", line)
        assert max(shown, key=len).strip() in code, line
