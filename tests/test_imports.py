"""The rooms of the house: no module imports downstream of itself."""

import ast
from pathlib import Path

import pytest

from helpers import ROOT

# in the order in which data flows; what stands together is one room, or two that do not meet
ROOMS = [
    {"util", "model"},
    {"scegg.config", "scegg.processes", "scegg.speed"},
    {"scegg.datasets"},
    {"scegg.features"},
    {"scegg.method"},
    {"scegg.run"},
    {"scegg.report"},
]
COMMANDS = len(ROOMS)  # the root's scripts, scegg/doctor.py, benchmarks


def modules() -> list[Path]:
    """Every file of code, tests left out."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("scegg/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    return sorted(file for file in files if file.name != "__init__.py")


def name_of(file: Path) -> str:
    """The name by which a file is imported."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def imported(file: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & {name_of(other) for other in modules()}


def floor(name: str) -> int:
    """The room of a module, counted from the ground."""
    for number, rooms in enumerate(ROOMS):
        if any(name == room or name.startswith(f"{room}.") for room in rooms):
            return number
    return COMMANDS


def room(name: str) -> str:
    """The room of a module, by name: scegg.speed of scegg.speed.onednn."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("file", modules(), ids=name_of)
def test_imports_go_one_way(file):
    name = name_of(file)
    upstairs = {other for other in imported(file) if floor(other) > floor(name)}
    assert not upstairs

    if floor(name) == 1:  # these do not know each other
        beside = {other for other in imported(file) if floor(other) == 1}
        assert {room(other) for other in beside} <= {room(name)}


def test_no_two_modules_import_each_other():
    edges = {name_of(file): imported(file) for file in modules()}
    ordered = []
    while edges:
        free = [name for name, needs in edges.items() if needs <= set(ordered)]
        assert free, f"a circle among {sorted(edges)}"
        ordered += free
        for name in free:
            del edges[name]


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    words = [word.strip("`,.():;") for word in text.split()]
    paths = {word for word in words if word.startswith(("scegg/", "docs/", "tests/", "figs/"))}
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]
