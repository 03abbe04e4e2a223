"""The paper's tables as data: against the paper's text, and against their own arithmetic."""

import random
import re
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest

import results as R
from notebooks.tables import check

REPO = Path(__file__).resolve().parent.parent
PAPER = REPO.parent / "shared" / "paper.md"
TABLES = R.paper_tables()
# A number that stands alone or before M: not the digits of a name (GSM8K, SST-2) nor 1/3.
NUMBER = re.compile(r"(?<![\w/.-])\d+(?:\.\d+)?(?:e-\d+)?M?(?![\w/])")

CODE = "LoRA, PiSSA, MiLoRA, LoRA-Null, CorDA(KPM), KaSA, FARSS (R=128), FARSS (R=144)"
GEMMA = "CorDA, PiSSA, MiLoRA, LoRA, LoRA-Null, KaSA, FARSS (R=128), FARSS (R=155)"
# (table, model, metric): the rows whose printed metric contradicts the row. Each was looked at.
ERRATA = {
    ("02a", "llama2-7b", "KT"): "LoRA, PiSSA, MiLoRA, CorDA(KPM), FARSS (R=153)",
    ("02b", "llama2-7b", "Avg"): "Full fine-tuning, LoRA-Null",
    ("02b", "llama2-7b", "K"): "FARSS (R=128)",
    ("02b", "llama2-7b", "T"): CODE,
    ("02b", "llama2-7b", "KT"): CODE,
    ("06b", "llama2-7b", "T"): "All-high, FARSS (R=128)",
    ("06b", "llama2-7b", "KT"): "All-high, FARSS (R=128)",
    ("08", "llama2-7b", "Avg"): "(1, 50, 64)",
    ("11", "llama3-8b", "Avg"): "FARSS (R=155)",
    ("11", "llama3-8b", "KT"): "FARSS (R=155)",
    ("11", "gemma2-9b", "K"): GEMMA,
    ("11", "gemma2-9b", "KT"): GEMMA.replace("KaSA, ", ""),
    ("12", "mistral-7b-v0.3", "T"): "LoRA, LoRA-Null, FARSS (R=128)",
}


def labels(text):
    """A list of rows; (1, 50, 64) is one."""
    return re.split(r", (?![^(]*\))", text)


def numbers(cells):
    return [n for cell in cells for n in NUMBER.findall(cell)]


def numbers_and_dashes(cells):
    return [n for c in cells for n in ("-" if c in ("", "-", "—") else NUMBER.findall(c))]


def tables_of_paper():
    """{table: (headings, [cells of each row that has numbers])}: lines with tabs, before their
    caption."""
    tables, rows, heads, part = {}, defaultdict(list), defaultdict(list), ""
    for line in PAPER.read_text(encoding="utf-8").splitlines():
        caption = re.match(r"Table (\d+):", line)
        if caption:
            tables |= {f"{int(caption[1]):02}{part}": (heads[part], rows[part]) for part in rows}
            rows, heads, part = defaultdict(list), defaultdict(list), ""
        elif heading := re.match(r"\**\(([abc])\) (?:Math|Code|Instruction Following)", line):
            part = heading[1]
        elif "\t" in line:
            cells = [re.sub(r"</?b>|\$|†", "", c).strip() for c in line.split("\t")]
            if numbers(cells):
                rows[part].append(cells)
            else:
                heads[part] += cells
    return tables


def plain(name):
    """Trivia QA, TriviaQA and triviaqa are one; so are NQ-Open and nq_open."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not here")
def test_every_column_and_number_of_the_paper_in_order():
    paper = tables_of_paper()
    assert list(paper) == list(TABLES) and len(TABLES) == 16
    for name, (heads, printed) in paper.items():
        columns = [plain(c) for c in TABLES[name][0] if c not in check.LABELS + check.METRICS]
        headed = [h for h in map(plain, heads) if h in columns]
        if name == "12":  # whose heading exchanges two
            headed[:2] = headed[1::-1]
        assert headed == columns or name in ("07", "09")
        ours = [[cell for column, cell in row.items() if column not in ("model", "task")]
                for row in TABLES[name]]
        if name in ("04", "09"):  # #Params apart from the method; cells that span two columns
            assert list(map(numbers, printed)) == [n for n in map(numbers, ours) if n]
        else:  # an empty cell is one that spans rows: a missing number is printed as a dash
            theirs = [[cell for cell in row if cell] for row in printed]
            assert list(map(numbers_and_dashes, theirs)) == list(map(numbers_and_dashes, ours))


def test_the_same_run_has_the_same_scores_wherever_it_is_printed():
    """Of one model untouched, and of FARSS in Tables 2, 5, 6 and 8; metrics apart."""
    seen = defaultdict(dict)
    for table in TABLES.values():
        for row in table:
            run = (row.get("method") or row.get("samples") or row.get("(r_min, r_avg, r_max)"))
            run = {"256": "FARSS (R=128)", "(1, 50, 64)": "FARSS (R=128)",
                   "Baseline (original)": "origin"}.get(run, run)
            if "task" not in row or run not in ("origin", "FARSS (R=128)"):
                continue
            key = (row["model"], run, "" if run == "origin" else row["task"])
            for column, value in row.items():
                if value and column not in check.LABELS + check.METRICS:
                    assert seen[key].setdefault(column, value) == value, (key, column)
    assert len(seen) == 5 + 3 + 3 + 4 + 3


def test_one_row_by_hand():
    row = next(r for r in TABLES["02a"] if r["method"] == "LoRA")
    found = check.recompute(row)
    K = (Fraction(4811, 5251) + Fraction(116, 1499) + Fraction(714, 586)) / 3
    T = (Fraction(4261, 5019) + Fraction(572, 782)) / 2
    assert found == pytest.approx({"Avg": (48.11 + 1.16 + 7.14 + 42.61 + 5.72) / 5, "K": float(K),
                                   "T": float(T), "KT": float(2 * K * T / (K + T))}, rel=1e-12)


def test_bounds_hold_what_rounds_to_the_printed_scores_and_no_more():
    """Random values that round to the scores stay within; those at the ends come close to them."""
    row = next(r for r in TABLES["10"] if r["method"] == "PiSSA")
    low, high = check.recompute(row, -1), check.recompute(row, 1)
    origin, full = R.paper_references(row["model"], row["task"])
    known, task = ("triviaqa", "nq_open", "webqs"), ("gsm8k", "math")
    rng, found = random.Random(0), defaultdict(list)
    for _ in range(4000):
        after, before, whole = ({b: float(r[b]) + rng.choice((-1, 1)) * 0.005 * rng.random() ** 0.1
                                 for b in known + task if r[b]} for r in (row, origin, full))
        K = sum(after[b] / before[b] for b in known) / 3
        T = sum(after[b] / whole[b] for b in task) / 2
        for metric, value in (("Avg", sum(after.values()) / 5), ("K", K), ("T", T),
                              ("KT", 2 / (1 / K + 1 / T))):
            assert low[metric] <= value <= high[metric]
            found[metric].append(value)
    for metric, values in found.items():
        assert max(values) - min(values) > 0.8 * (high[metric] - low[metric])


def test_half_a_unit_and_what_contradicts():
    assert [check.half_unit(t) for t in ("25.4", "0.93", "7")] == pytest.approx([.05, .005, .5])
    cell = check.Cell("", "", "", "K", "0.93", 0.0, 0.9, 0.9249)
    assert cell.contradicts and not cell._replace(low=0.9, high=0.9251).contradicts
    assert cell._replace(low=0.9351, high=1.0).contradicts
    assert not cell._replace(low=0.9349, high=1.0).contradicts
    # A tie rounds to either side, whatever its last bit.
    assert not cell._replace(printed="1.08", low=1.075, high=1.075).contradicts


def test_exactly_these_cells_contradict_their_row():
    assert len(list(check.cells())) == sum(bool(row.get(m)) for table in TABLES.values()
                                           for row in table for m in check.METRICS) > 400
    found = defaultdict(list)
    for cell in check.errata():
        found[cell.table, cell.model, cell.metric].append(cell.label)
    assert found == {where: labels(rows) for where, rows in ERRATA.items()}


def test_the_readme_lists_them():
    """| Table 2a, KT | LoRA 0.87, ... | 0.76, ... | remark |, in the order of the tables."""
    section = (REPO / "README.md").read_text().split("## Errata of the paper")[1].split("\n## ")[0]
    stated = []
    for where, printed, computed in re.findall(r"^\| Table (.*?) \| (.*?) \| (.*?) \|", section,
                                               re.MULTILINE):
        table, *model, metric = where.split(", ")
        stated += [(table, *model, metric, *cell.rsplit(" ", 1), value)
                   for cell, value in zip(labels(printed), computed.split(", "), strict=True)]
    found = [(cell.table.lstrip("0"), *([cell.model] if cell.table in ("11", "12") else []),
              cell.metric, cell.label, cell.printed, f"{cell.computed:.3f}")
             for cell in check.errata()]
    assert sorted(stated) == sorted(found)
    assert f" {len(list(check.cells()))} printed Avg, K, T" in " ".join(section.split())


def test_references_of_eval():
    origin, full = R.paper_references("gemma2-9b", "code")
    assert (origin["webqs"], full["humaneval"], full["Avg"]) == ("18.95", "53.05", "42.78")
    assert R.paper_references("gemma2-9b", "math") is None
    before, whole = R.paper_row({"model": "mistral-7b-v0.3", "task": "math"})
    assert before.items() >= {"nq_open": 20.53, "webqs": 8.46}.items()
    assert whole["gsm8k"] == 67.55 and "nq_open" not in whole
