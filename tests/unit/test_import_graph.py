"""Imports of the package point one way: no cycles, and no lower layer that imports a higher one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vlmtrain

PACKAGE = Path(vlmtrain.__file__).parent
# from the lowest layer to the highest; packages of one layer may import each other's modules
LAYERS = (
    {"errors", "files", "registry", "time_limit", "distributed", "frames", "tiling", "visual", "batch"},
    {"connectors"},
    {"model"},
    {"data", "settings"},
    {"objectives", "reporting", "runs", "evaluation"},
    {"training"},
    {"planning", "interop"},
    {"ablation"},
    {"train", "cli"},
)


def modules() -> dict[str, Path]:
    """Dotted name, without the package's, to file."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, known: dict[str, Path], everywhere: bool) -> Iterator[str]:
    """Modules of the package that a module imports, at its top level or (`everywhere`) also in its functions."""
    file = known[name]
    home = [part for part in name.split(".") if part]
    home = home if file.name == "__init__.py" else home[:-1]
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if everywhere else _read_at_once(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*home[: len(home) - node.level + 1], *(node.module or "").split(".")]
            target = ".".join(part for part in base if part)
            for alias in node.names:
                inner = f"{target}.{alias.name}" if target else alias.name
                yield inner if inner in known else target


def _read_at_once(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module that run when it is imported, except those for type checking only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _read_at_once(child)


@pytest.mark.parametrize("everywhere", [False, True])
def test_there_is_no_cycle(everywhere):
    known = modules()
    graph = {name: set(imports(name, known, everywhere)) - {name} for name in known}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(name or "vlmtrain" for name in error.args[1]))


UPWARD = {
    "training.init_from imports interop.importing": "init_from may be a published model, which is converted first",
    "evaluation.lmms_eval imports interop.lmms": "the adapter of lmms-eval, which may not be installed",
    "runs.reproduction imports train": "a program of its own, which trains",
}
"""Imports of a higher layer within functions, and why."""


def test_no_layer_imports_a_higher_one():
    known = modules()
    height = {top: i for i, layer in enumerate(LAYERS) for top in layer}
    for everywhere, allowed in ((False, set()), (True, set(UPWARD))):
        wrong = {
            f"{name} imports {target}"
            for name in known
            for target in imports(name, known, everywhere)
            if name and target and height[target.partition(".")[0]] > height[name.partition(".")[0]]
        }
        assert wrong == allowed


def test_only_the_engine_imports_deepspeed():
    others = [file for name, file in modules().items() if not name.startswith("training.engine")]
    assert not [file for file in others if re.search(r"^\s*(import|from) deepspeed", file.read_text(), re.MULTILINE)]


def test_only_the_engine_uses_private_attributes_of_deepspeed():
    others = [file for name, file in modules().items() if not name.startswith("training.engine")]
    assert not [file for file in others if re.search(r"\b(ds_\w+|_hp_mapping|_dp_group)\b", file.read_text())]


def test_hydras_objects_stay_in_the_settings():
    """No other module receives a DictConfig, except the entry point, which gets one from Hydra."""
    using = {name for name, file in modules().items() if "DictConfig" in file.read_text()}
    assert {name for name in using if not name.startswith("settings.")} == {"train"}
