"""The compiled hot path: is what runs, is of these sources, and is written as mypyc needs it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
WAITS = (ast.Await, ast.AsyncFor, ast.AsyncWith, ast.Yield, ast.YieldFrom)


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_script", ROOT / "scripts" / "compile.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


script = load_script()


@pytest.mark.parametrize("name", script.MODULES)
def test_what_runs_is_of_these_sources(name: str) -> None:
    module = importlib.import_module(f"serverlessllm.{name[:-3].replace('/', '.')}")
    ran = Path(str(module.__file__))
    if not any(map(Path.exists, script.made())) and "CI" not in os.environ:
        assert ran.suffix == ".py", "nothing was compiled here"
        return
    assert script.is_compiled(), "compiled from other sources: run scripts/compile.py"
    assert ran.name.endswith(script.SUFFIX)


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below it but other functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FUNCTIONS):
            yield child
            yield from inside(child)


def functions(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse((script.PACKAGE / name).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("name", script.MODULES)
def test_nothing_is_awaited_while_an_error_is_handled(name: str) -> None:
    # A compiled coroutine that waits there leaves its error behind as the one that everybody else
    # in the thread is handling: it becomes the context of theirs, and is never freed.
    for function in functions(name):
        for node in inside(function):
            if isinstance(node, ast.Try):
                for part in (*node.handlers, *node.finalbody):
                    waits = [n for n in (part, *inside(part)) if isinstance(n, WAITS)]
                    assert not waits, f"{name}:{waits[0].lineno}: {function.name} waits here"


@pytest.mark.parametrize("name", script.MODULES)
def test_a_name_is_given_to_one_kind_of_error(name: str) -> None:
    # The compiler gives a variable the type of its first use, and refuses another when it runs.
    for function in functions(name):
        kinds: dict[str, str] = {}
        for node in inside(function):
            if isinstance(node, ast.ExceptHandler) and node.name and node.type:
                kind = ast.unparse(node.type)
                known = kinds.setdefault(node.name, kind)
                assert known == kind, f"{name}:{node.lineno}: `{node.name}` was a {known}"


@pytest.mark.parametrize("name", script.MODULES)
def test_structs_are_left_to_the_interpreter(name: str) -> None:
    # The compiler drops what stands beside a class's bases: `frozen=True` would be lost.
    for node in ast.walk(ast.parse((script.PACKAGE / name).read_text())):
        if isinstance(node, ast.ClassDef):
            assert not node.keywords, f"{name}:{node.lineno}: {node.name} would lose its options"
