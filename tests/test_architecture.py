"""The house rules that a script can check: direction of imports, where heavy libraries may be imported, no unsafe loading."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "maple").rglob("*.py")) + sorted((ROOT / "jobs").glob("*.py"))

#: Lowest first; a module may import from its own layer and from lower ones.
LAYERS = [
    {"clock", "errors", "hashing", "schema", "config", "cluster_ray"},
    {"artifacts", "page"},
    {"data"},
    {"features"},
    {"index"},
    {"models"},
    {"evaluate"},
    {"recommend"},
    {"train"},
    {"experiment", "monitor"},
    {"serve"},
    {"run", "learn", "operate", "steps", "demo", "doctor", "cli", "jobs"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def layer(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "jobs" if parts[0] == "jobs" else parts[1].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: use absolute imports"
            yield node.module, node
            if node.module == "maple":
                for alias in node.names:
                    yield f"maple.{alias.name}", node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    if path.name == "__init__.py" and path.parent.name == "maple":
        return
    own = RANK[layer(path)]
    for name, node in imports(path):
        if name.startswith("maple."):
            other = name.split(".")[1]
            if other.startswith("__"):
                continue
            assert other in RANK, f"{path}: {name} is on no layer"
            assert RANK[other] <= own, f"{path}:{node.lineno} imports upwards: {name}"


def _ray_allowed(path: Path) -> bool:
    return path.name.endswith("_ray.py") or layer(path) in {"serve", "cli", "jobs", "demo", "doctor", "steps", "learn", "operate"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    for name, node in imports(path):
        top = name.split(".")[0]
        where = f"{path}:{node.lineno}"
        if top == "ray":
            assert _ray_allowed(path), f"{where}: Ray only in *_ray.py, serve, cli and jobs"
        if top == "mlflow":
            assert path.name in {"registry.py", "tune_ray.py"}, f"{where}: MLflow only in train/registry and train/tune_ray"
        if top == "torch":
            assert layer(path) in {"models", "train"}, f"{where}: torch only in models and train"


BANNED = {("pickle", "load"), ("pickle", "loads"), ("joblib", "load"), ("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            assert (node.func.value.id, node.func.attr) not in BANNED, f"{path}:{node.lineno}: {node.func.value.id}.{node.func.attr}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert getattr(node.value, "value", None) is False, f"{path}: allow_pickle"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
