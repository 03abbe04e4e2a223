"""The house: which file may import which, and that tables take the place of branches on names."""

import ast
from pathlib import Path

import pytest

from baselines import METHODS
from benchmarks import BENCHMARKS
from data import TASKS
from model import FAMILIES

REPO = Path(__file__).resolve().parent.parent
FILES = sorted(REPO.glob("*.py"))
OURS = {file.stem for file in FILES}
# What a file may import of this project; those above them import what they start.
ALLOWED = {
    "onednn": set(),
    "model": {"onednn"},
    "farss": {"model"},  # two helpers: precision and train mode
    "baselines": {"farss", "model"},  # the split that PiSSA, MiLoRA, CorDA and FARSS share
    "checkpoint": {"model"},
    "data": {"checkpoint", "model"},
    "parallel": {"checkpoint"},
    "sandbox": set(),  # it runs by itself, isolated
    "benchmarks": {"checkpoint", "data"},
    "settings": {"baselines", "checkpoint", "data", "farss", "model"},
    "plan": {"checkpoint", "farss", "model", "parallel", "settings"},
    "figures": {"checkpoint", "data", "farss", "settings"},
    "results": {"baselines", "benchmarks", "checkpoint", "data", "figures", "settings"},  # no model
    "export": {"checkpoint", "data", "model", "results", "settings"},
    "measuring": {"checkpoint", "data", "model", "plan"},
    "bench_machine": {"farss", "measuring"},
    "bench_start": {"farss", "measuring", "model", "settings", "train"},
    "bench_run": {"data", "measuring", "model", "settings", "train"},
    "bench_real": {"benchmarks", "checkpoint", "data", "measuring", "model"},
    "bench_gpu": {"checkpoint", "measuring", "settings"},  # inside a part's process alone
}


def imported(file):
    """Top-level names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", ALLOWED)
def test_arrows_point_one_way(name):
    assert imported(REPO / f"{name}.py") & OURS <= ALLOWED[name]


def test_eval_never_imports_train_and_model_imports_torch_alone():
    assert "train" not in imported(REPO / "eval.py")
    assert imported(REPO / "model.py") == {"math", "re", "collections", "contextlib",
                                           "dataclasses", "functools", "typing", "torch", "onednn"}


def test_torch_distributed_is_only_in_parallel():
    assert [f.name for f in FILES if "torch.distributed" in f.read_text()] == ["parallel.py"]


def test_only_demo_sweep_and_measurements_stand_above_train():
    assert {f.stem for f in FILES if "train" in imported(f)} == {
        "bench", "bench_run", "bench_start", "sweep"}
    assert not any((REPO / "tests" / f"{name}.py").exists() and name in imported(file)
                   for file in FILES for name in ("tiny", "conftest", "real_model"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_no_comparison_with_a_name_of_a_table(file):
    """`== "lora"` or `in ("farss", "full")` is a branch that belongs into the row."""
    names = {*METHODS, *FAMILIES, *BENCHMARKS, *TASKS}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Compare):
            said = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)
                    and isinstance(c.value, str)}
            assert not said & names, f"{file.name}:{node.lineno} compares with {said & names}"
