"""Mutation testing of the pure cores: changes the code in small ways and runs its unit tests.

    python -m tools.mutants                          every module, with a floor
    python -m tools.mutants page ranking             some modules

A mutant is the module with one operator, constant or statement changed. It is *killed* if a test
fails, hangs or cannot be collected. Each mutant runs in a forked child whose import system hands
out the changed module, so nothing is written to disk. Survivors that behave like the original are
listed in ``tests/mutants.md``, each with the reason, and are not counted.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.util
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "tests" / "mutants.md"

#: The share of mutants, in percent, that the tests of each module must kill.
FLOOR = 90
#: Seconds that the tests of the original may take. A mutant counts as hanging after ten times what
#: those of the original took, and a minute.
PATIENCE = 900.0

#: The modules, and the unit tests that must kill their mutants.
TARGETS: Dict[str, Tuple[str, ...]] = {
    "options": ("test_options",),
    "protocol/clock": ("test_meta",),
    "protocol/codec": ("test_meta", "test_decompression"),
    "protocol/compression": ("test_decompression", "test_meta"),
    "protocol/expiry": ("test_meta",),
    "protocol/ids": ("test_topology",),
    "protocol/message": ("test_messages", "test_meta"),
    "protocol/names": ("test_topology",),
    "protocol/page": ("test_page",),
    "protocol/ranking": ("test_meta",),
}

_SWAPS: Dict[type, Any] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or,
    ast.Or: ast.And, ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip


class Mutant(NamedTuple):
    """One change of a module."""

    line: int
    text: str
    tree: ast.Module


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield replacements for a single node."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[place] = _SWAPS[type(operator)]()
            yield changed
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in _SWAPS:
        binary = copy.deepcopy(node)
        binary.op = _SWAPS[type(node.op)]()
        yield binary
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield _SWAPS[type(node)]()
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        conditional = copy.deepcopy(node)
        conditional.test = ast.UnaryOp(ast.Not(), node.test)
        yield conditional
    elif isinstance(node, ast.Return) and not (
        node.value is None or (isinstance(node.value, ast.Constant) and node.value.value is None)
    ):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, (int, float)):
            yield ast.Constant(node.value + 1)
        elif isinstance(node.value, (str, bytes)):
            yield ast.Constant(node.value[:0])


def _places(tree: ast.AST, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Tuple[Any, ...], ast.AST]]:
    """Yield the nodes that may change: no annotations, docstrings, messages, or names exported."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "type_comment", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Raise, ast.JoinedStr)):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.Assign) and "__all__" in ast.unparse(child.targets[0]):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if "TypeVar(" in (ast.unparse(child) if isinstance(child, ast.Assign) else ""):
                continue
            here = (*path, (field, index))
            yield here, child
            yield from _places(child, here)


def _replaced(tree: ast.Module, path: Tuple[Any, ...], node: ast.AST) -> ast.Module:
    changed = copy.deepcopy(tree)
    parent: Any = changed
    for field, index in path[:-1]:
        parent = getattr(parent, field) if index is None else getattr(parent, field)[index]
    field, index = path[-1]
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node
    return ast.fix_missing_locations(changed)


def mutants(source: str) -> Iterator[Mutant]:
    """Yield all mutants of a module."""
    tree = ast.parse(source)
    for path, node in _places(tree):
        for changed in _changes(node):
            line = getattr(node, "lineno", 0)
            before = ast.unparse(node).split("\n")[0]
            after = ast.unparse(ast.fix_missing_locations(changed)).split("\n")[0]
            if before != after:
                yield Mutant(line, f"{before} -> {after}", _replaced(tree, path, changed))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Hands out the changed module in place of the one on disk."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Return a spec for the changed module only."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: Any) -> None:
        """Run the changed code."""
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


class Child(NamedTuple):
    """A forked process that runs the tests on a mutant."""

    pid: int
    mutant: Optional[Mutant]
    deadline: float


def _start(
    name: str, path: Path, mutant: Optional[Mutant], tests: Sequence[str], timeout: float
) -> Child:
    """Run the tests on a mutant, or on the original, in a forked child."""
    pid = os.fork()
    if pid:
        return Child(pid, mutant, time.monotonic() + timeout)
    code = 98
    try:
        with open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 1)
            os.dup2(silence.fileno(), 2)
        if mutant is not None:
            sys.meta_path.insert(0, _Finder(name, path, mutant.tree))
        files = [str(ROOT / "tests" / "unit" / f"{test}.py") for test in tests]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov",
                   "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # fmt: skip
        code = int(importlib.import_module("pytest").main([*options, *files]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def _passed(child: Child) -> Optional[bool]:
    """Return whether the tests have passed, or ``None`` while they run."""
    done, status = os.waitpid(child.pid, os.WNOHANG)
    if done:
        return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    if time.monotonic() > child.deadline:
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        return False
    return None


def survivors(target: str, jobs: int) -> Tuple[int, List[Mutant]]:
    """Return the number of mutants of a module, and those that the tests did not kill."""
    path = ROOT / "celery_amqp_results" / f"{target}.py"
    name = f"celery_amqp_results.{target.replace('/', '.')}"
    began = time.monotonic()
    running = [_start(name, path, None, TARGETS[target], PATIENCE)]
    while (passed := _passed(running[0])) is None:
        time.sleep(0.01)
    if not passed:
        raise SystemExit(f"the tests of {target} fail on the original: {TARGETS[target]}")
    timeout = 60 + 10 * (time.monotonic() - began)
    waiting = list(mutants(path.read_text(encoding="utf-8")))
    count, alive, running = len(waiting), [], []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(name, path, waiting.pop(), TARGETS[target], timeout))
        time.sleep(0.01)
        for child in list(running):
            passed = _passed(child)
            if passed is not None:
                running.remove(child)
                if passed and child.mutant is not None:
                    alive.append(child.mutant)
    return count, sorted(alive)


def explained() -> Set[str]:
    """Return the equivalent mutants that the page lists, as ``module: before -> after``."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return set(re.findall(r"^\| `+ ?(\S+: .*? -> .*?) ?`+ \|", text, re.M))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Change the pure cores and run their tests.")
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="tests that run at once")
    options = parser.parse_args(arguments)
    chosen = [t for t in TARGETS if not options.modules or t.rpartition("/")[2] in options.modules]
    # The children inherit these imports; the package itself each of them imports anew.
    for module in ("pytest", "hypothesis.stateful", "celery.contrib.abortable", "kombu", "amqp"):
        importlib.import_module(module)
    os.environ.update(CI="true", EXAMPLES="25")
    sys.dont_write_bytecode = True
    known, worst = explained(), 100.0
    for target in chosen:
        count, alive = survivors(target, options.jobs)
        unexplained = [m for m in alive if f"{target}: {m.text}" not in known]
        share = 100.0 * (count - len(unexplained)) / max(1, count)
        worst = min(worst, share)
        print(
            f"{target}: {count} mutants, {len(alive) - len(unexplained)} equivalent, "
            f"{len(unexplained)} survived: {share:.1f} % killed",
            flush=True,
        )
        for mutant in unexplained:
            print(f"    line {mutant.line}: {mutant.text}", flush=True)
    return 0 if worst >= FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
