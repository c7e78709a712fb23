"""The house rules of the code: who imports whom, no star imports, one guard per entry file."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("models", "utils", "relabel", "validate", "scripts", "analysis", "benchmarks")
FORBIDDEN = {
    "models": {"utils", "relabel", "validate", "scripts", "analysis", "benchmarks", "tests"},
    "utils": {"models", "relabel", "validate", "scripts", "analysis", "benchmarks", "tests"},
    "relabel": {"validate", "scripts", "analysis", "benchmarks", "tests"},
    "validate": {"relabel", "scripts", "analysis", "benchmarks", "tests"},
    "scripts": {"analysis", "benchmarks", "tests"},
    "analysis": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
}
IMPORT_PATH = "sys" + "." + "path"  # in parts, so that a search finds the guards alone
GUARD = (
    "if not __package__:  # run as a plain script: imports start at the repository root\n"
    f"    {IMPORT_PATH}[0] = str(Path(__file__).resolve().parents[1])\n"
)
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> list[tuple[str, bool]]:
    """(module, is a star import) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: imports must be absolute"
            found.append((node.module, any(alias.name == "*" for alias in node.names)))
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way_and_name_what_they_take(path):
    room = path.relative_to(ROOT).parts[0]
    for module, star in imported(path):
        assert not star, f"star import of {module}"
        assert module.split(".")[0] not in FORBIDDEN[room]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_entry_files_touch_the_import_path_and_only_by_the_guard(path):
    text = path.read_text()
    is_entry = "cli.run(main)" in text
    assert text.count(IMPORT_PATH) == text.count(GUARD) == int(is_entry)


def test_no_file_beside_an_entry_file_hides_a_module_of_the_standard_library():
    beside = {path.stem for path in FILES if path.parent.name not in ("utils", "models")}
    assert not beside & set(sys.stdlib_module_names)
