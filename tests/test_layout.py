"""The house: which file may import which, how long a thing may be, and that tables stand in place
of branches on names. Over all files of the project but its tests."""

import ast
import sys
from pathlib import Path

import pytest

from benchmarks import BENCHMARKS
from data import TASKS
from methods import METHODS
from model import FAMILIES

REPO = Path(__file__).resolve().parent.parent
OUTSIDE = {"tests", "runs", "notebooks"}
FILES = {}  # module: file
for file in sorted(REPO.rglob("*.py")):
    parts = file.relative_to(REPO).with_suffix("").parts
    if not any(part.startswith(".") or part in OUTSIDE for part in parts):
        FILES[".".join(parts).removesuffix(".__init__")] = file

# Each file imports from its own floor and those below; a folder's files stand on its floor.
FLOORS = {
    1: {"farss", "model", "onednn"},
    3: {"alone", "benchmarks", "checkpoint", "data", "fast", "methods", "sandbox"},
    4: {"export", "figures", "plan", "results", "settings"},
    5: {"bench", "bench_gpu", "bench_machine", "bench_real", "bench_run", "bench_start", "demo",
        "eval", "measuring", "microcosm", "sweep", "train"},
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
# The inner ring's lines. Functions have 60 at most, a main that is read from top to bottom 90.
LINES = {"farss": 520}
MAINS = {"main", "one_run"}
ARGUMENTS = 8


def imports(module):
    """Names of all modules that a file imports, wherever in it; relative ones made absolute."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


EDGES = {module: {name for name in imports(module) if name in FILES} - {module}
         for module in FILES}


def functions(file):
    """(name, lines, arguments) of every function of a file, methods and inner ones, too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            count = sum(x.arg not in ("self", "cls") for x in every)
            yield node.name, node.end_lineno - node.lineno + 1, count


def test_every_file_has_its_floor():
    assert {module.split(".")[0] for module in FILES} == set(FLOOR)


@pytest.mark.parametrize("module", FILES)
def test_arrows_point_down(module):
    mine = FLOOR[module.split(".")[0]]
    assert not {name for name in EDGES[module] if FLOOR[name.split(".")[0]] > mine}


def test_there_is_no_circle():
    """By taking away, again and again, every file that imports none of those that are left."""
    left = {module: set(edges) for module, edges in EDGES.items()}
    for package in [m for m in left if m in {n.split(".")[0] for n in left if "." in n}]:
        left[package] -= {package}  # a door names what stands behind it
    while free := [module for module, edges in left.items() if not edges & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_the_method_and_the_models_import_torch_alone():
    for module, more in (("farss", set()), ("model", {"onednn"})):
        tops = {name.split(".")[0] for name in imports(module)}
        assert tops - sys.stdlib_module_names == {"torch"} | more, module


def test_fast_knows_the_method_and_the_models_and_only_commands_know_fast():
    inside = {m for m in FILES if m.split(".")[0] == "fast"}
    below = {name for m in inside for name in EDGES[m]} - inside
    assert below <= {"farss", "model", "checkpoint"}  # the last for UserError
    above = {m for m in FILES if m not in inside and EDGES[m] & inside}
    assert above <= {"train", "eval", "bench", "bench_machine", "bench_start"}


def test_eval_never_imports_train():
    reached, new = set(), {"eval"}
    while new:
        reached |= new
        new = set().union(*(EDGES[m] for m in new)) - reached
    assert "train" not in reached


def test_the_equations_are_tested_with_the_method_and_the_models_alone():
    tree = ast.parse((REPO / "tests/test_equations.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names} | {node.module for node in ast.walk(tree)
                                         if isinstance(node, ast.ImportFrom)}
    assert names & FILES.keys() == {"farss", "model"} and not names & {"tiny", "conftest"}


def test_torch_distributed_is_only_in_one_file():
    assert [m for m, f in FILES.items() if "torch.distributed" in f.read_text()] == [
        "fast.distributed"]


def test_no_file_imports_a_test():
    tests = {file.stem for file in (REPO / "tests").glob("*.py")}
    assert not {m for m in FILES if imports(m) & tests}


@pytest.mark.parametrize("module, most", LINES.items())
def test_what_is_read_stays_short(module, most):
    assert len(FILES[module].read_text().splitlines()) <= most


@pytest.mark.parametrize("module", FILES)
def test_functions_are_short_and_take_few_arguments(module):
    for name, lines, arguments in functions(FILES[module]):
        most = 90 if name in MAINS else 60
        assert lines <= most, f"{name} has {lines} lines"
        assert arguments <= ARGUMENTS, f"{name} takes {arguments} arguments"


@pytest.mark.parametrize("module", FILES)
def test_no_comparison_with_a_name_of_a_table(module):
    """`== "lora"` or `in ("farss", "full")` is a branch that belongs into the row."""
    names = {*METHODS, *FAMILIES, *BENCHMARKS, *TASKS}
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Compare):
            said = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)
                    and isinstance(c.value, str)}
            assert not said & names, f"{module}:{node.lineno} compares with {said & names}"
