"""The README's map of the paper and its table of silences: nothing in them may rot.

Links are [`module.name`], [text][test_name] and [nb 1]; where they lead stands once, at the end of
the README, with the line. When lines have moved: python tests/test_map.py --fix
"""

import ast
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"
PAPER = REPO.parent / "shared" / "paper.md"
NOTE = "<!-- Where the links above lead; python tests/test_map.py --fix writes it anew. -->\n"
NOTEBOOKS = {f"nb {i}": f"notebooks/{i}_{name}.ipynb" for i, name in enumerate((
    "kfac_on_one_layer", "importance_and_ranks", "directions", "official_code", "microcosm",
    "tables"), start=1)}
# What the paper numbers.
PRINTED = {"Eq.": range(1, 39), "Table": range(1, 13), "Figure": range(1, 7)}


def definitions(file):
    """{dotted name: (file, line, docstring)} of functions, classes, methods and constants."""
    path = file.relative_to(REPO)
    found = {}

    def visit(body, above):
        for node in body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            names = ([node.name] if named else
                     [x.id for x in ast.walk(node) if isinstance(x, ast.Name)
                      and isinstance(x.ctx, ast.Store)]
                     if isinstance(node, ast.Assign | ast.AnnAssign) else [])
            for name in names:
                text = ast.get_docstring(node) or "" if named else ""
                found.setdefault(above + name, (path, node.lineno, text))
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{above}{node.name}.")

    visit(ast.parse(file.read_text()).body, "")
    return found


CODE = {file.stem: definitions(file) for file in REPO.glob("*.py")}
for package in ("methods", "fast"):  # `methods.pissa` stands in one of its files
    CODE[package] = {name: found for file in sorted((REPO / package).glob("*.py"))
                     for name, found in definitions(file).items()}
TESTS = {file.stem: definitions(file) for file in (REPO / "tests").glob("test_*.py")}


def target(label):
    """The file and line that a label names; KeyError for what is not there, or not there once."""
    if label in NOTEBOOKS:
        return NOTEBOOKS[label]
    name = label.strip("`")
    if name.startswith("test_"):  # test_model.test_name where two files have that name
        module, _, inner = name.rpartition(".")
        places = [found[inner][:2] for file, found in TESTS.items()
                  if inner in found and module in ("", file)]
    else:
        module, _, inner = name.partition(".")
        places = [CODE[module][inner][:2]]
    if len(places) != 1:
        raise KeyError(f"{name} is defined {len(places)} times in tests/")
    return "{}#L{}".format(*places[0])


def labels(text):
    """What a text links as [`name`], [nb 1] or [text][label]."""
    return (re.findall(r"\[(`[^`\]]+`|nb \d)\](?![\[(])", text)
            + re.findall(r"\[[^\]]+\]\[([^\]]+)\]", text))


def parts():
    """The README before its links, and the links."""
    text, _, links = README.read_text().partition(NOTE)
    return text, dict(re.findall(r"^\[(.+)\]: (\S+)$", links, re.M))


def rows_under(heading):
    """Cells of the rows of the first table under a heading."""
    section = parts()[0].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def numbers(text):
    """{2, 9, 10, 11, 12} of "2, 9-12"."""
    return {n for a, b in re.findall(r"(\d+)(?:-(\d+))?", text)
            for n in range(int(a), int(b or a) + 1)}


def equations(docstring):
    """The numbers of all equations that a docstring names."""
    listed = r"Eq\.\s+(\d+(?:-\d+)?(?:\s\([a-z]+\))?(?:(?:,|\sand|\s/)\s\d+(?:-\d+)?)*)"
    return set().union(*(numbers(found) for found in re.findall(listed, docstring)))


def place(row):
    """("Eq.", {2, 24, 25}) of a row that begins "Eq. 2, 24, 25, F ≈"."""
    kind, listed = re.match(r"(Eq\.|Table|Figure)s? ((?:\d+(?:-\d+)?(?:, )?)+)", row[0]).groups()
    return kind, numbers(listed)


MAP = rows_under("Map of the paper")
SILENT = rows_under("Where the paper is silent")
each_row = pytest.mark.parametrize("row", MAP, ids=[row[0].replace(" ", "_") for row in MAP])


def link_lines():
    return {label: target(label) for label in sorted(set(labels(parts()[0])))}


def test_links_lead_to_the_line():
    assert parts()[1] == link_lines(), "python tests/test_map.py --fix"


LINKED = {*re.findall(r"\]\((?!https?:)([^)#:]+)", parts()[0]),
          *(NOTEBOOKS[x] for x in labels(parts()[0]) if x in NOTEBOOKS)}


@pytest.mark.parametrize("path", sorted(LINKED))
def test_linked_files_exist(path):
    assert (REPO / path).exists()


@pytest.mark.parametrize("kind", PRINTED)
def test_every_equation_table_and_figure_has_one_row(kind):
    mapped = [n for row in MAP for n in place(row)[1] if place(row)[0] == kind]
    assert sorted(mapped) == list(PRINTED[kind])


@pytest.mark.skipif(not PAPER.exists(), reason="needs the paper's text")
@pytest.mark.parametrize("kind, pattern", [
    ("Eq.", r"\\quad \((\d+)\)"), ("Table", r"^Table (\d+):"), ("Figure", r"^Figure (\d+):")])
def test_the_paper_numbers_just_these(kind, pattern):
    found = re.findall(pattern, PAPER.read_text(), re.M)
    assert sorted(map(int, found)) == list(PRINTED[kind])


@each_row
def test_a_row_names_code_test_and_example(row):
    _, here, checked, shown = row
    code, tests = ([x.strip("`") for x in labels(cell)] for cell in (here, checked))
    assert "*background*" in here or code
    assert all(x.startswith("test_") for x in tests)
    assert tests or checked == "measured, not tested"
    assert labels(shown) or re.search(r"`(--|python )|^as Table \d", shown)


@each_row
def test_the_function_of_an_equation_carries_its_number_and_so_does_the_test(row):
    kind, wanted = place(row)
    if kind != "Eq.":
        return
    names = [x.strip("`").split(".", 1) for x in labels(row[1])]
    carried = set().union(*(equations(CODE[module][name][2]) for module, name in names))
    assert wanted <= carried or "*background*" in row[1]
    tested = set().union(*(map(int, re.findall(r"(?<=[q_])\d\d(?=_)", x)) for x in labels(row[2])))
    assert wanted <= tested


def test_every_function_of_an_equation_is_in_the_map():
    linked = set(labels(" ".join(cell for row in MAP for cell in row)))
    assert not {f"`{module}.{name}`" for module, found in CODE.items()
                for name, (*_, docstring) in found.items()
                if docstring.startswith("Eq.")} - linked


def test_every_commands_flags_exist():
    import eval as E
    import settings as S

    commands = [x for row in MAP for x in re.findall(r"`((?:--|python )[^`]+)`", row[3])]
    assert len(commands) > 20
    for command in commands:
        words = command.split()
        if words[0] != "python":  # flags of train.py
            theirs = [] if "--model" in words else ["--model", "llama2-7b"]
            S.settle(S.training_arguments(None, [*theirs, *words, "--dry-run"]))
        elif words[1] == "eval.py":
            E.evaluation_arguments(words[2:])
        else:
            script = (REPO / words[1]).read_text()
            assert all(f'"{flag}"' in script for flag in words[2:])


@pytest.mark.parametrize("row", SILENT, ids=[row[0].replace(" ", "_") for row in SILENT])
def test_a_silence_says_why_and_links_its_line(row):
    assert len(row) == 6 and all(row)
    assert labels(row[5]) and not any(x.startswith("test_") for x in labels(row[5]))


if __name__ == "__main__" and sys.argv[1:] == ["--fix"]:
    README.write_text(parts()[0] + NOTE + "".join(
        f"[{label}]: {where}\n" for label, where in link_lines().items()))
