"""The arrows between rooms, read from the source.

Finds: an import that turns an arrow round (a formula that sees a model, a backend that sees another,
a spine module that loads an array framework), whether at the top of a file or inside a function.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "mlxpref"

VALUES = {"records", "errors"}
FILED = VALUES | {"files", "locks", "hub"}
NAMED = {"names", "folders", "workers", "optimizer_options", "steps"}
SPINE = FILED | {"blas", "backends", "ops", "objectives", "metrics", "rewards", "data", "config", "config_layers"}
LOOP = SPINE | {"runs", "facts", "reference", "momentum", "schedules", "callbacks", "loop", "prepare", "assembly"}
LOOP |= {"workers", "together", "planning"}
AFTER = NAMED | {"adapters", "merging", "tensors", "conversion"}
RUNS = LOOP | AFTER | {"report", "train", "evaluate", "generate", "parity", "sandbox", "doctor", "columns", "ablate"}
RUNS |= {"bench", "diagnosis"}

MAY_IMPORT: dict[str, set[str]] = {
    "records": set(),
    "errors": set(),
    "blas": set(),
    "files": VALUES,
    "locks": VALUES,
    "hub": VALUES,
    "schedules": VALUES,
    "ops": VALUES,
    "objectives": VALUES | {"ops"},
    "metrics": VALUES | {"ops"},
    "rewards": VALUES,
    "data": FILED | {"rewards"},
    "backends": VALUES | {"blas"},
    "config": FILED | {"data", "objectives", "optimizer_options"},
    "config_layers": FILED | {"config", "data", "objectives"},
    "runs": FILED | {"data", "config", "config_layers", "metrics"},
    "reference": FILED | {"data", "workers"},
    "report": FILED | {"metrics", "runs", "config", "config_layers", "diagnosis"},
    "names": VALUES,
    "optimizer_options": VALUES,
    "folders": VALUES,
    "workers": VALUES,
    "steps": VALUES | {"workers"},
    "together": FILED | {"config", "config_layers", "data", "runs", "workers"},
    "mlx_backend": FILED | NAMED | {"ops", "objectives", "data", "callbacks", "blas"},
    "torch_backend": FILED | NAMED | {"ops", "objectives", "data", "callbacks"},
    "momentum": set(),
    "tensors": VALUES | {"files"},
    "adapters": FILED | {"facts", "folders", "tensors"},
    "conversion": FILED | {"adapters", "data", "facts", "names", "reference", "tensors"},
    "merging": FILED | {"adapters", "conversion", "facts", "tensors"},
    "callbacks": VALUES | {"loop"},  # loop: the type of its result
    "prepare": SPINE,
    "facts": SPINE | {"prepare", "reference"},
    "loop": SPINE | {"callbacks", "runs", "schedules", "workers"},
    "assembly": LOOP,
    "diagnosis": SPINE | {"runs", "schedules"},
    "planning": SPINE | {"folders", "prepare", "reference", "steps"},
    "bench": RUNS,
    "train": RUNS,
    "evaluate": RUNS,
    "generate": RUNS,
    "parity": RUNS,
    "sandbox": RUNS,
    "columns": RUNS,
    "ablate": RUNS,
    "doctor": RUNS,
    "cli": RUNS,
    "__main__": {"cli"},
    "__init__": set(),
}
"""Room -> rooms of ours it may import, itself aside. A backend is nobody's import: it is got by name."""

FRAMEWORKS: dict[str, set[str]] = {
    "mlx": {"mlx_backend"},
    "mlx_lm": {"mlx_backend"},
    "torch": {"torch_backend"},
    "peft": {"torch_backend"},
    "accelerate": {"torch_backend"},
    "transformers": {"torch_backend", "data.tokenization", "data.render"},
    "trl": set(),
    "jax": set(),
}
"""Library -> the rooms (or single modules) that may import it."""

STAGES = ("sources", "relabel", "tokenization", "batching")
"""The way of the data: a stage reaches no later one."""


@dataclass(frozen=True)
class Import:
    importer: str
    """Module inside mlxpref, e.g. ``data.sources``; ``__init__`` for the package itself."""
    target: str
    """Full dotted name."""
    line: int
    in_function: bool
    for_types: bool

    @property
    def room(self) -> str:
        return self.importer.split(".")[0]

    @property
    def target_room(self) -> str | None:
        """Room of ours that is imported; None for a library, "__init__" for the bare package."""
        parts = self.target.split(".")
        if parts[0] != "mlxpref":
            return None
        return parts[1] if len(parts) > 1 else "__init__"

    def __str__(self) -> str:
        return f"mlxpref/{self.importer.replace('.', '/')}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def is_module(dotted: str) -> bool:
    path = ROOT.parent.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file: statements at any depth, and ``import_module("literal")``."""
    name = module_name(path)

    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        for target in named(node):
            yield Import(name, target, node.lineno, in_function, for_types)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside, types)

    def named(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            return [dotted if is_module(dotted) else str(node.module) for dotted in whole]
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            return [str(first.value)] if isinstance(first, ast.Constant) else []
        return []

    return walk(ast.parse(path.read_text(encoding="utf-8")), False, False)


FILES = sorted(ROOT.rglob("*.py"))
IMPORTS = [found for path in FILES for found in imports_of(path)]


def test_the_reader_sees_imports_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Witness of the reader itself: blind to one of these, the tests below would pass on anything."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "room.py"
    file.write_text(
        "import torch\n"
        "def f():\n"
        "    from mlx import core\n"
        "    import_module('peft')\n"
        "if TYPE_CHECKING:\n"
        "    import transformers\n"
    )
    found = [(i.target, i.in_function, i.for_types) for i in imports_of(file)]
    assert found == [
        ("torch", False, False),
        ("mlx", True, False),
        ("peft", True, False),
        ("transformers", False, True),
    ]


def test_every_room_has_a_row() -> None:
    """A new room needs its arrows written down."""
    rooms = {module_name(path).split(".")[0] for path in FILES}
    assert rooms <= MAY_IMPORT.keys(), f"no row for {sorted(rooms - MAY_IMPORT.keys())}"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_arrows_point_forward(room: str) -> None:
    # ``mlxpref`` alone is the table of public names: it loads nothing by itself.
    allowed = MAY_IMPORT[room] | {room, "__init__", None}
    turned = [i for i in IMPORTS if i.room == room and i.target_room not in allowed]
    assert not turned, "\n".join(map(str, turned))


def test_nothing_imports_the_public_names() -> None:
    """Inside the package a name is imported from where it lives; the lazy table would hide an arrow."""
    through = [
        i for i in IMPORTS if i.target_room == "__init__" and i.room not in ("__init__", "cli", "__main__")
    ]
    assert not through, "\n".join(map(str, through))


@pytest.mark.parametrize("library", sorted(FRAMEWORKS))
def test_frameworks_stay_in_their_machine_room(library: str) -> None:
    allowed = FRAMEWORKS[library]
    strays = [
        i
        for i in IMPORTS
        if i.target.split(".")[0] == library and i.room not in allowed and i.importer not in allowed
    ]
    assert not strays, "\n".join(map(str, strays))


def test_the_spine_loads_transformers_only_when_used() -> None:
    early = [
        i
        for i in IMPORTS
        if i.target.split(".")[0] == "transformers"
        and i.room != "torch_backend"
        and not (i.in_function or i.for_types)
    ]
    assert not early, "\n".join(map(str, early))


def test_the_data_only_go_forward() -> None:
    """A stage, with the helpers it imports inside ``data``, reaches no later stage."""
    reach: dict[str, set[str]] = {}
    for i in IMPORTS:
        if i.room == "data" and i.target.startswith("mlxpref.data."):
            reach.setdefault(i.importer, set()).add(i.target.removeprefix("mlxpref."))

    def reached(module: str, seen: set[str]) -> set[str]:
        for target in reach.get(module, set()) - seen:
            seen.add(target)
            reached(target, seen)
        return seen

    for at, stage in enumerate(STAGES):
        later = {f"data.{name}" for name in STAGES[at + 1 :]}
        assert not reached(f"data.{stage}", set()) & later, f"data.{stage} reaches a later stage"


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = {"mlx", "mlx_lm", "torch", "peft", "transformers", "jax"} & {m.split(".")[0] for m in sys.modules}
sys.exit(f"loaded {sorted(heavy)}" if heavy else 0)
"""


def test_the_spine_loads_no_array_framework() -> None:
    """Import every module but the machine rooms, then look what came along (through libraries, too)."""
    names = [
        f"mlxpref.{module_name(path)}".removesuffix(".__init__")
        for path in FILES
        if not module_name(path).split(".")[0].endswith("_backend") and path.name != "__main__.py"
    ]
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
