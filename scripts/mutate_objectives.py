"""Change the objectives one small fault at a time, and see whether the tests notice.

    python scripts/mutate_objectives.py --out mutants.json                      # every module, half an hour
    python scripts/mutate_objectives.py --module margin --jobs 1 --out margin.json
    python scripts/mutate_objectives.py --again mutants.json --out again.json   # only what survived the last run
    python scripts/mutate_objectives.py --module margin --check import --out nothing.json   # no test: all survive

A mutant is one module of ``mlxpref/objectives`` with one edit. Each gets a process of its own, forked from one that
has collected all tests, where the functions of the module take the edited code; an edit outside of functions is
imported afresh instead. It has to pass, in this order,

1. values against the oracle in NumPy and gradients in PyTorch, float64 and float32, of the objectives that the edited
   line is a part of;
2. the files of tests in ``OF_FORMULAS`` or ``OF_THE_REST``, up to the first failure; of the tests that are about one
   objective, those about these objectives. Left out are tests that train a model.

It is *killed* if anything fails or takes too long, and *survived* if nothing does. *Stillborn* is one with which
``mlxpref.objectives`` cannot be imported at all; no share counts it. ``docs/mutation.md`` has the last result.

Not edited: docstrings, texts of messages, annotations of parameters (options' ranges are named types, whose own
limits are edited), decorators, and ``strict=`` of ``zip``. Tests that fail without any edit are left out, and named.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import select
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "mlxpref" / "objectives"
FAMILIES = ("margin", "ratios", "batchwise", "policy_only", "scored", "listwise", "tokenwise", "texts")
MODULES = (*FAMILIES, "logratios", "weighting", "lift", "columns", "mixture", "resolve", "registry")
OF_FORMULAS = ("survivors", "identities", "objectives", "coupled")
OF_THE_REST = (
    "lists", "registry", "weighting", "coupled", "survivors", "objectives_command", "objectives", "identities",
)  # fmt: skip
CPU_SECONDS, WALL_SECONDS = 60, 180
"""Of one mutant: an edit may well loop for ever. Without an edit all tests take 25 of the first."""

Variants = Iterator[tuple[str, str]]
"""(kind of edit, new text) for one node."""

# --- the edits ---------------------------------------------------------------------------------

ARITHMETIC: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.Pow: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,), ast.Mod: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
}  # fmt: skip
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
OPS = "mlxpref.ops"
RATIOS = "mlxpref.objectives.logratios"
SIBLINGS = {
    "log_sigmoid": (OPS, "sigmoid"), "sigmoid": (OPS, "log_sigmoid"), "exp": (OPS, "expm1"), "expm1": (OPS, "exp"),
    "log": (OPS, "log1p"), "log1p": (OPS, "log"), "amax": (OPS, "amin"), "amin": (OPS, "amax"),
    "softplus": (OPS, "relu"), "logsumexp": (OPS, "amax"), "margin": (RATIOS, "mean_margin"),
    "mean_margin": (RATIOS, "margin"), "log_ratios": (RATIOS, "mean_log_ratios"),
    "mean_log_ratios": (RATIOS, "log_ratios"), "sums": (RATIOS, "means"), "means": (RATIOS, "sums"),
    "dpo": ("mlxpref.objectives.margin", "ipo"), "ipo": ("mlxpref.objectives.margin", "dpo"),
    "min": ("builtins", "max"), "max": ("builtins", "min"), "any": ("builtins", "all"), "all": ("builtins", "any"),
}  # fmt: skip
"""Functions with the same parameters that are easily mistaken for each other."""
REPRESENTATIVES = frozenset({
    "dpo", "simpo", "sft", "lipo", "bco", "group_robust", "kto", "dove", "modpo", "experimental_mapo", "triple_po",
})  # fmt: skip
"""Of every kind of column and option, for edits that no one formula is made of; ``--again`` asks all."""
TRANSPARENT = {"stop_gradient", "relu", "absolute", "clip", "sort", "sorted"}
"""Functions without which their first argument is left as it is."""
ATTRIBUTES = {"sums": "means", "means": "sums", "sum": "mean", "mean": "sum"}


def of_binary(node: ast.BinOp) -> Variants:
    for other in ARITHMETIC.get(type(node.op), ()):
        yield "operator", ast.unparse(ast.BinOp(node.left, other(), node.right))
    if isinstance(node.op, ast.Sub | ast.Div | ast.Pow):
        yield "operands swapped", ast.unparse(ast.BinOp(node.right, node.op, node.left))
    yield "operand dropped", ast.unparse(node.left)
    yield "operand dropped", ast.unparse(node.right)


def of_compare(node: ast.Compare) -> Variants:
    for other in COMPARISONS[type(node.ops[0])]:
        yield "comparison", ast.unparse(ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators))


def of_constant(node: ast.Constant) -> Variants:
    value = node.value
    if isinstance(value, bool):
        yield "constant", str(not value)
    elif isinstance(value, int):
        yield from (("constant", str(value + by)) for by in (1, -1))
    elif isinstance(value, float):
        yield from (("constant", repr(other)) for other in ([1.0, -1.0] if value == 0 else [2 * value, -value, 0.0]))
        if value == 0.5:
            yield "constant", "1.0"


def of_unary(node: ast.UnaryOp) -> Variants:
    yield "sign or not dropped", ast.unparse(node.operand)


def of_bool(node: ast.BoolOp) -> Variants:
    yield "and / or", ast.unparse(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    for i in range(len(node.values)):
        yield "operand dropped", ast.unparse(ast.BoolOp(node.op, node.values[:i] + node.values[i + 1 :]))


def of_call(node: ast.Call) -> Variants:
    function = node.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    on_module = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "ops"
    if not any(isinstance(a, ast.Starred) for a in node.args):
        for i in range(len(node.args) - 1):
            a = node.args
            swapped = [*a[:i], a[i + 1], a[i], *a[i + 2 :]]
            yield "arguments swapped", ast.unparse(ast.Call(function, swapped, node.keywords))
    for i, keyword in enumerate(node.keywords):
        if keyword.arg not in (None, "strict"):
            kept = node.keywords[:i] + node.keywords[i + 1 :]
            yield "keyword dropped", ast.unparse(ast.Call(function, node.args, kept))
    if (isinstance(function, ast.Name) or on_module) and node.args:
        if name in TRANSPARENT:
            yield "call dropped", ast.unparse(node.args[0])
        if name in SIBLINGS:
            module, other = SIBLINGS[name]
            # Taken from its own module, since the edited one may not have imported it.
            found = ast.parse(f"__import__({module!r}, fromlist='x').{other}", mode="eval").body
            yield "function", ast.unparse(ast.Call(found, node.args, node.keywords))


def of_attribute(node: ast.Attribute) -> Variants:
    if node.attr in ATTRIBUTES and isinstance(node.ctx, ast.Load):
        yield "attribute", ast.unparse(ast.Attribute(node.value, ATTRIBUTES[node.attr], node.ctx))


def of_choice(node: ast.IfExp) -> Variants:
    yield "choice negated", ast.unparse(ast.IfExp(node.test, node.orelse, node.body))


def of_slice(node: ast.Slice) -> Variants:
    if node.lower is not None:
        yield "slice", f":{ast.unparse(node.upper) if node.upper else ''}"
    if node.upper is not None:
        yield "slice", f"{ast.unparse(node.lower) if node.lower else ''}:"


def of_tuple(node: ast.Tuple) -> Variants:
    if isinstance(node.ctx, ast.Store) and len(node.elts) == 2:
        yield "targets swapped", f"{ast.unparse(node.elts[1])}, {ast.unparse(node.elts[0])}"


EDITS: dict[type, Callable[[Any], Variants]] = {
    ast.BinOp: of_binary, ast.Compare: of_compare, ast.Constant: of_constant, ast.UnaryOp: of_unary,
    ast.BoolOp: of_bool, ast.Call: of_call, ast.Attribute: of_attribute, ast.IfExp: of_choice, ast.Slice: of_slice,
    ast.Tuple: of_tuple,
}  # fmt: skip
RAW = (ast.Slice, ast.Tuple, ast.stmt)
"""Nodes whose new text stands without brackets around it."""


def of_statement(node: ast.stmt, known: set[str]) -> Iterator[tuple[ast.AST, str, str]]:
    """(node to replace, kind of edit, new text). ``known``: names that exist without this statement."""
    if isinstance(node, ast.If):
        yield node.test, "condition negated", f"not ({ast.unparse(node.test)})"
        if not node.orelse:
            yield node, "statement removed", "pass"
    elif isinstance(node, ast.For):
        yield node.iter, "loop emptied", "()"
    elif isinstance(node, ast.Raise | ast.AugAssign | ast.Expr):
        yield node, "statement removed", "pass"
    elif isinstance(node, ast.Assign):
        targets = {name.id for t in node.targets for name in ast.walk(t) if isinstance(name, ast.Name)}
        if targets <= known or not isinstance(node.targets[0], ast.Name | ast.Tuple):
            yield node, "statement removed", "pass"
    elif isinstance(node, ast.FunctionDef):
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            hint = argument.annotation
            if isinstance(default, ast.Constant) and isinstance(default.value, str) and isinstance(hint, ast.Subscript):
                for value in ast.literal_eval(hint.slice):
                    if value != default.value:
                        yield default, "default", repr(value)


# --- from a module to its mutants --------------------------------------------------------------


@dataclass
class Mutant:
    """One edit: bytes ``begin`` to ``end`` of the module become ``new``."""

    module: str
    line: int
    home: str
    kind: str
    old: str
    new: str
    begin: int
    end: int
    status: str = ""
    by: str = ""
    seconds: float = 0.0

    def key(self) -> tuple[str, ...]:
        return self.module, self.home, self.kind, self.old, self.new

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line} [{self.kind}] {self.old} → {self.new}"


class Editor:
    """Walks one module and collects its mutants."""

    def __init__(self, module: str) -> None:
        self.module, self.source = module, (FOLDER / f"{module}.py").read_bytes()
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.home = ""

    def mutants(self) -> list[Mutant]:
        tree = ast.parse(self.source)
        original, kept, seen = ast.dump(tree), [], set()
        for node in tree.body:
            self.home = _home(node)
            self._visit(node, set())
        for mutant in self.found:
            try:
                shape = ast.dump(ast.parse(self.edited(mutant)))
            except SyntaxError:
                continue
            if shape != original and shape not in seen:
                seen.add(shape)
                kept.append(mutant)
        return kept

    def edited(self, mutant: Mutant) -> bytes:
        return self.source[: mutant.begin] + mutant.new.encode() + self.source[mutant.end :]

    def _add(self, node: Any, kind: str, new: str) -> None:
        begin = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        text = new if isinstance(node, RAW) else f"({new})"
        old = " ".join(self.source[begin:end].decode().split())
        self.found.append(Mutant(self.module, node.lineno, self.home, kind, old, text, begin, end))

    def _visit(self, node: ast.AST, known: set[str]) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr | ast.arg):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.stmt):
            for place, kind, new in of_statement(node, known):
                self._add(place, kind, new)
        if isinstance(node, ast.Raise):
            return
        for kind, new in EDITS.get(type(node), lambda _: iter(()))(node):
            self._add(node, kind, new)
        if isinstance(node, ast.comprehension):
            for condition in node.ifs:
                self._add(condition, "condition dropped", "True")
                self._add(condition, "condition negated", f"not ({ast.unparse(condition)})")
        if isinstance(node, ast.FunctionDef):
            known = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self._visit(child, known)
        if isinstance(node, ast.Assign):
            known |= {name.id for t in node.targets for name in ast.walk(t) if isinstance(name, ast.Name)}


def _home(node: ast.AST) -> str:
    """The name that a statement of the module gives."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if isinstance(targets[0], ast.Name) else ""


def affected_objectives() -> dict[tuple[str, str], set[str]]:
    """(module, name in it) → the objectives that are made of it."""
    uses: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    formulas = []
    for module in (*FAMILIES, "logratios"):
        tree = ast.parse((FOLDER / f"{module}.py").read_text())
        names = {_home(node): (module, _home(node)) for node in tree.body}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlxpref.objectives."):
                origin = (node.module or "").rpartition(".")[2]
                names |= {a.asname or a.name: (origin, a.name) for a in node.names}
        for node in tree.body:
            own = (module, _home(node))
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and name.id in names:
                    uses[names[name.id]].add(own)
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "objective" for d in node.decorator_list):
                formulas.append(own)
    reached: dict[tuple[str, str], set[str]] = {}
    for start in [*uses, *formulas]:
        seen, rest = {start}, [start]
        while rest:
            new = uses[rest.pop()] - seen
            seen |= new
            rest += new
        reached[start] = {own[1] for own in formulas if own in seen}
    return reached


# --- one mutant in a process of its own --------------------------------------------------------


class Edited(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module from other bytes than its file's."""

    def __init__(self, module: str, source: bytes) -> None:
        super().__init__(f"mlxpref.objectives.{module}", str(FOLDER / f"{module}.py"))
        self.code = compile(source, self.path, "exec")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def get_code(self, fullname: str) -> Any:
        return self.code


def preload() -> None:
    """What every mutant needs and none can change, so that a fork has it already."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import conftest  # noqa: F401 - settings that must come first

    for name in ("mlx.core", "torch", "numpy", "pydantic", "pytest", "click", "rich.console", "yaml",
                 "rich.table", "oracle", "mlxpref.ops", "mlxpref.records"):  # fmt: skip
        importlib.import_module(name)
    early = [name for name in sys.modules if name.startswith("mlxpref.objectives")]
    assert not early, f"imported before the fork: {early}"


def direct(names: Collection[str]) -> str:
    """Values and gradients of these objectives; what failed, or nothing."""
    import test_objectives as tests

    for test, library in (
        (tests.test_values_are_those_of_the_oracle, tests.NUMPY),
        (tests.test_gradients_are_those_of_the_oracle, tests.TORCH),
        (tests.test_gradients_are_those_of_the_oracle, tests.TORCH32),
    ):
        for name in sorted(names):
            for options in ({}, *tests.ORACLE[name].points):
                try:
                    test(library, name, options)
                except Exception as error:  # however a mutant fails, it is noticed
                    return f"{test.__name__}[{name}-{library.name}] {type(error).__name__}"
    return ""


PARTS = ("__code__", "__defaults__", "__kwdefaults__")


def plain_functions(space: Mapping[str, Any], module: str) -> Iterator[tuple[str, Any]]:
    """(name, function) of the functions of a module and of the methods and properties of its classes."""
    for name, value in space.items():
        if getattr(value, "__module__", None) != module:
            continue
        if isinstance(value, type):
            for key, method in vars(value).items():
                inner = getattr(method, "fget", None) or getattr(method, "func", None) or method
                if hasattr(inner, "__code__"):
                    yield f"{name}.{key}", inner
        elif hasattr(value, "__code__"):
            yield name, getattr(value, "__wrapped__", value)


def edit_in_place(module: str, source: bytes) -> None:
    """The functions of an imported module get the edited code, so that everything that holds them has it.

    Options and their defaults are read anew. What a module computes at its own level stays: see ``needs_import``.
    """
    mod = sys.modules[f"mlxpref.objectives.{module}"]
    table = sys.modules["mlxpref.objectives.registry"].TABLE
    order = list(table)
    for name in [name for name, entry in table.items() if entry.family == module]:
        del table[name]
    new: dict[str, Any] = {"__name__": mod.__name__, "__file__": mod.__file__}
    exec(compile(source, str(mod.__file__), "exec"), new)
    old = dict(plain_functions(vars(mod), mod.__name__))
    for name, function in plain_functions(new, mod.__name__):
        for part in PARTS:
            setattr(old[name], part, getattr(function, part))
        if name in table and table[name].function is function:
            table[name] = replace(table[name], function=old[name])
    read = sys.modules["mlxpref.objectives.registry"].read_declaration
    kept = {name: read(table[name].function) if module == "registry" else table[name] for name in order}
    table.clear()
    table.update(kept)


def needs_import(mutant: Mutant, editor: Editor) -> bool:
    """Whether an edit stands outside of functions, so that the module has to be imported with it."""
    return not any(
        isinstance(node, ast.FunctionDef) and node.lineno <= mutant.line <= (node.end_lineno or 0)
        for node in ast.walk(ast.parse(editor.source))
    )


class Session:
    """For pytest: collects the tests once, and hands its loop to ``work``, which forks it for every mutant."""

    def __init__(self, work: Callable[[Session], None]) -> None:
        self.work, self.items, self.failed = work, [], []  # type: ignore[var-annotated]  # work of any kind
        self.without: set[str] = set()
        self.general: Collection[str] | None = REPRESENTATIVES

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if "tiny_model_dir" not in item.fixturenames]  # whole runs: seconds each
        self.items = items

    def pytest_runtestloop(self) -> bool:
        self.work(self)
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def run(self, names: Collection[str] | None, kinds: Collection[str], first: bool = True) -> list[str]:
        """The tests of these files that fail; ``names``: without those about other objectives."""
        files = [f"test_{kind}.py" for kind in kinds]
        order = [item for file in files for item in self.items if item.path.name == file and self._asked(item, names)]
        order.sort(key=lambda item: "mlx" in item.name)  # a graph of MLX's is compiled first, for about a second
        for item, after in zip(order, [*order[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if first and self.failed:
                break
        return self.failed

    def _asked(self, item: Any, names: Collection[str] | None) -> bool:
        given = getattr(getattr(item, "callspec", None), "params", {})
        name = given.get("name", getattr(given.get("value"), "name", None))
        return item.nodeid not in self.without and (names is None or not isinstance(name, str) or name in names)


def in_session(work: Callable[[Session], None]) -> None:
    """Does ``work`` with all tests collected."""
    import pytest

    kinds = dict.fromkeys(OF_THE_REST + OF_FORMULAS)
    files = [str(path) for kind in kinds if (path := ROOT / "tests" / f"test_{kind}.py").exists()]
    session = Session(work)
    given = ["-s", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *files]
    code = pytest.main(given, plugins=[session])
    assert code in (0, 1) and session.items, f"pytest ended with {code}"


def judge(session: Session, mutant: Mutant, source: bytes, names: set[str]) -> tuple[str, str]:
    """(status, by what)."""
    said = direct(names or {"dpo", "bco", "dove"})
    kinds = OF_FORMULAS if mutant.module in FAMILIES else OF_THE_REST
    failed = [said] if said else session.run(names or session.general, kinds)
    return ("killed", failed[0].removeprefix("tests/")) if failed else ("survived", "")


def judge_in_place(session: Session, mutant: Mutant, source: bytes, names: set[str]) -> tuple[str, str]:
    """In a child of the session, whose modules are all there."""
    try:
        edit_in_place(mutant.module, source)
    except Exception as error:  # a mutant may break in any way when it is put in place
        return "stillborn", f"{type(error).__name__}: {error}"[:200]
    return judge(session, mutant, source, names)


def judge_imported(mutant: Mutant, source: bytes, names: set[str], without: set[str], check: str) -> tuple[str, str]:
    """In a process that has imported nothing of the package's formulas yet."""
    sys.meta_path.insert(0, Edited(mutant.module, source))
    try:
        import mlxpref.objectives  # noqa: F401 - does it import at all?
    except BaseException as error:  # a mutant may end in any way, by SystemExit too
        return "stillborn", f"{type(error).__name__}: {error}"[:200]
    if check == "import":
        return "survived", ""
    found: list[tuple[str, str]] = []

    def work(session: Session) -> None:
        session.without = without
        found.append(judge(session, mutant, source, names))

    try:
        in_session(work)
    except AssertionError as error:  # the tests themselves cannot be imported
        return "killed", str(error)
    return found[0]


def quiet() -> None:
    """Settings of every process that judges."""
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True


def forked(work: Callable[[], Any], limited: bool = True) -> tuple[int, int]:
    """(process, pipe to read its answer from). ``limited``: it says nothing and has its time."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    code = 1
    try:
        if limited:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            quiet()
        os.write(into, json.dumps(work()).encode())
        code = 0
    finally:
        os._exit(code)
    raise AssertionError


def answer_of(pid: int, out: int) -> Any:
    """What a process wrote, once it has ended; None if it ended without."""
    said = b""
    while chunk := os.read(out, 1 << 16):
        said += chunk
    os.close(out)
    os.waitpid(pid, 0)
    return json.loads(said) if said else None


def in_own_session(work: Callable[[Session], None], mutants: list[Mutant], without: set[str]) -> Any:
    in_session(work)
    return [asdict(m) for m in mutants], sorted(without)


Judge = Callable[[Mutant, bytes, set[str]], Any]


def run_all(mutants: list[Mutant], editors: dict[str, Editor], judge_one: Judge, jobs: int) -> None:
    """Fills in ``status``, ``by`` and ``seconds``; ``jobs`` processes at a time."""
    reached, waiting = affected_objectives(), list(reversed(mutants))
    running: dict[int, tuple[int, Mutant, float]] = {}
    done, began = 0, time.monotonic()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            source, names = editors[mutant.module].edited(mutant), reached.get((mutant.module, mutant.home), set())
            pid, out = forked(lambda m=mutant, s=source, n=names: judge_one(m, s, n))
            running[out] = (pid, mutant, time.monotonic())
        ready = select.select(list(running), [], [], 1.0)[0]
        for out, (pid, mutant, started) in list(running.items()):
            late = time.monotonic() - started > WALL_SECONDS
            if late:
                os.kill(pid, signal.SIGKILL)
            if out in ready or late:
                del running[out]
                mutant.status, mutant.by = answer_of(pid, out) or ("killed", "out of time, or the interpreter died")
                mutant.seconds = round(time.monotonic() - started, 2)
                done += 1
                if mutant.status == "survived" or done % 100 == 0:
                    print(f"{done} {time.monotonic() - began:.0f} s: {mutant.status} {mutant}", flush=True)


# --- the whole ---------------------------------------------------------------------------------


def table(mutants: list[Mutant]) -> list[dict[str, Any]]:
    """Module by module and in all: mutants that could be imported, killed, survived, share; stillborn."""
    rows = []
    for module in [*dict.fromkeys(m.module for m in mutants), "all"]:
        counts = Counter(m.status for m in mutants if module in (m.module, "all"))
        alive = counts["killed"] + counts["survived"]
        rows.append({
            "module": module, "mutants": alive, "killed": counts["killed"], "survived": counts["survived"],
            "percent": round(100 * counts["killed"] / alive, 2) if alive else None, "stillborn": counts["stillborn"],
        })  # fmt: skip
    return rows


def chosen_mutants(editors: dict[str, Editor], args: Any) -> list[Mutant]:
    found = [mutant for editor in editors.values() for mutant in editor.mutants()]
    if args.again:
        told = json.loads(Path(args.again).read_text())["mutants"]
        left = {(m["module"], m["home"], m["kind"], m["old"], m["new"]) for m in told if m["status"] == "survived"}
        found = [mutant for mutant in found if mutant.key() in left]
    if args.sample and args.sample < len(found):
        drawn = random.Random(args.seed).sample(range(len(found)), args.sample)
        found = [found[i] for i in sorted(drawn)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--module", action="append", choices=MODULES, help="only this one; may be repeated")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn evenly")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--check", choices=("tests", "import"), default="tests", help="import: no test at all")
    parser.add_argument("--again", help="file of an earlier run: only what survived it")
    parser.add_argument("--out", required=True, help="file for the result, JSON")
    args = parser.parse_args()

    editors = {module: Editor(module) for module in args.module or MODULES}
    mutants = chosen_mutants(editors, args)
    print(f"{len(mutants)} mutants of {', '.join(editors)}", flush=True)
    preload()
    began = time.monotonic()
    without: set[str] = set()
    outside = [m for m in mutants if args.check == "import" or needs_import(m, editors[m.module])]

    def without_an_edit(session: Session) -> None:
        kinds = dict.fromkeys(OF_THE_REST + OF_FORMULAS)
        failed = answer_of(*forked(lambda: session.run(None, kinds, first=False)))
        assert failed is not None, "the tests do not come to their end without an edit"
        without.update(failed)
        spent, told = time.monotonic() - began, ", ".join(failed) or "nothing"
        print(f"without an edit: {spent:.0f} s; left out: {told}", flush=True)

    def work(session: Session) -> None:
        without_an_edit(session)
        session.without, session.general = without, None if args.again else REPRESENTATIVES
        inside = [m for m in mutants if m not in outside]
        run_all(inside, editors, lambda m, s, n: judge_in_place(session, m, s, n), args.jobs)

    try:
        if args.check == "tests":
            # In a process of its own: the rest have to begin without the formulas.
            told = answer_of(*forked(lambda: in_own_session(work, mutants, without), limited=False))
            assert told, "the session ended without a result"
            for mutant, now in zip(mutants, told[0], strict=True):
                mutant.status, mutant.by, mutant.seconds = now["status"], now["by"], now["seconds"]
            without.update(told[1])
        run_all(outside, editors, lambda m, s, n: judge_imported(m, s, n, without, args.check), args.jobs)
    finally:  # a run that is stopped keeps what it has found
        write(mutants, without, time.monotonic() - began, Path(args.out))
    for row in table(mutants):
        print(" ".join(f"{key} {value}" for key, value in row.items()))


def write(mutants: list[Mutant], without: set[str], spent: float, out: Path) -> None:
    judged = [m for m in mutants if m.status]
    result = {
        "table": table(judged), "left_out": sorted(without), "seconds": round(spent),
        "mutants": [asdict(m) for m in judged],
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
