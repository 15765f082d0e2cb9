"""The order of imports by folder, the absence of cycles, and the length of files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = "maskformer_fast"
FORBIDDEN = {"torchvision", "timm", "detectron2"}
MAX_LINES = 420

# Every folder below the package, and every file at its top, from the ground up: it may import what stands before it or
# in its own row. `interop.verification` has a place of its own, as it compares training too.
ORDER: tuple[tuple[str, ...], ...] = (
    ("core", "_C"),
    ("config", "backbone_config", "inference_config", "solver_config"),
    ("recipes", "structures", "distributed", "kernels"),
    ("ops",),
    ("data", "modeling", "output"),
    ("interop",),
    ("deploy",),
    ("inference", "drop_in"),
    ("video",),
    ("evaluation",),
    ("training",),
    ("interop.verification",),
    ("cli", "train", "evaluate", "predict", "convert", "convert_labels", "export", "inspect_data", "benchmark", "demo"),
)
COMMANDS_BELOW = {"maskformer_fast.deploy.triton_server.__main__"}
"""Commands that stand inside another folder; nobody imports them."""
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}
SELF_CONTAINED = {"data", "modeling", "output", "kernels"}
"""Folders that do not import their neighbours in the same row."""
WITHOUT_TORCH = ("maskformer_fast.core.", "maskformer_fast.deploy.bundle.", "maskformer_fast.deploy.runtime.")


def source_files() -> dict[str, Path]:
    """Module name -> file, kernels under the name they are installed as."""
    modules = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return modules


MODULES = source_files()


def imports(module: str, tree: ast.AST, is_package: bool, known: set[str]) -> set[str]:
    """Absolute names of the modules that this one imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in known else base)
    return found - {module}


def group(module: str) -> str:
    """The folder or file directly below the package, or one of `LEVELS` below it; '' for the package itself."""
    parts = module.split(".")[1:]
    nested = ".".join(parts[:2])
    return nested if nested in LEVELS else "".join(parts[:1])


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports against the order, as sentences."""
    wrong = []
    for module, targets in graph.items():
        own = group(module)
        for target in sorted(targets):
            if target.split(".")[0] in FORBIDDEN:
                wrong.append(f"{module} imports {target}, which this project does without")
            if target.split(".")[0] == "torch" and module.startswith(WITHOUT_TORCH):
                wrong.append(f"{module} imports torch, which a machine that runs a bundle need not have")
            if target.split(".")[0] != PACKAGE or module == PACKAGE or module in COMMANDS_BELOW:
                continue
            other = group(target)
            if own == other or not other:
                continue
            if own == "kernels":
                wrong.append(f"{module} imports {target}: kernels know nothing of {PACKAGE}")
            elif other not in LEVELS:
                wrong.append(f"{module} imports {target}, which is no module")
            elif LEVELS[other] > LEVELS[own]:
                wrong.append(f"{module} imports {target}: {own} stands before {other}")
            elif LEVELS[other] == LEVELS[own] and own in SELF_CONTAINED:
                wrong.append(f"{module} imports {target}: {own} and {other} stand side by side")
    return wrong


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules along one cycle of imports, or nothing."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in graph:
            return []
        path.append(module)
        for target in sorted(graph[module]):
            if cycle := visit(target):
                return cycle
        path.pop()
        done.add(module)
        return []

    for module in graph:
        if cycle := visit(module):
            return cycle
    return []


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = set(MODULES)
    return {
        module: imports(module, ast.parse(path.read_text()), path.name == "__init__.py", known)
        for module, path in MODULES.items()
    }


def test_every_folder_has_a_place() -> None:
    unknown = sorted({group(module) for module in MODULES} - {""} - set(LEVELS))
    assert not unknown, f"give these a place in ORDER: {unknown}"


def test_direction(graph: dict[str, set[str]]) -> None:
    assert len(graph) > 20, "the package's files were not found"
    assert not violations(graph)


def test_no_cycles(graph: dict[str, set[str]]) -> None:
    assert not find_cycle(graph)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_file_is_short_and_in_a_package(module: str) -> None:
    path = MODULES[module]
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines: cut it by what its parts do"
    assert (path.parent / "__init__.py").exists(), f"{path.parent.relative_to(ROOT)} would be left out of wheels"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from ..training.trainer import Trainer", "imports maskformer_fast.training.trainer"),
        ("from ..training import trainer", "imports maskformer_fast.training.trainer"),
        ("from maskformer_fast.training.matcher import match", "imports maskformer_fast.training.matcher"),
        ("def f():\n    import maskformer_fast.train", "imports maskformer_fast.train"),
        ("import torchvision.ops", "does without"),
        ("from . import mask_loss\nfrom ..config import check\nimport torch", ""),
    ],
)
def test_the_rules_bite(code: str, expected: str) -> None:
    module = f"{PACKAGE}.ops.example"
    found = violations({module: imports(module, ast.parse(code), False, set(MODULES) | {f"{PACKAGE}.trainer"})})
    assert len(found) == bool(expected) and all(expected in sentence for sentence in found)


def test_a_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
