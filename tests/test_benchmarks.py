"""benchmarks.py: the judges, and that every row can be asked and judged."""

import sys
from pathlib import Path

import pytest

import benchmarks as B
import data
import eval as E
import results as R
from checkpoint import UserError
from sandbox import run

# Verdicts of the official grader were taken by running it; see the rules in benchmarks.py.
GSM8K = [
    # answer, gold, official, strict
    ("18", "18", True, True),
    (" 18.", "18", True, True),
    ("$18", "18", True, True),
    ("18 dollars.", "18", True, True),
    ("18.0", "18", True, True),
    ("-3", "-3", True, True),
    ("3", "-3", False, False),
    ("1,234", "1234", True, True),
    ("1,234,567", "1234567", False, True),  # official: one separator only
    ("1234567", "1,234,567", True, True),
    ("17.6", "18", True, False),  # official rounds
    ("2.5", "2", True, False),  # half to even
    ("3.5", "4", True, False),
    ("1/2", "0", True, False),
    ("6/3", "2", True, True),
    ("3 / 4", "3", True, False),  # official reads the 3 only
    ("3/0", "3", True, False),
    ("2/00", "2", True, False),  # official: ZeroDivisionError; here its numerator
    ("x/2", "3", False, False),  # official: no number, for nothing stands before the /
    ("-/0", "0", False, True),
    ("7000", "70", True, False),  # official: 100 times too large is right
    ("1", "100", True, False),
    ("70001", "70000", True, False),  # official: 0.01 % off is right
    ("none", "5", False, False),
    ("", "5", False, False),
    (None, "5", False, False),
    ("1" * 400, "5", False, False),  # neither float nor int() takes every length
    ("1" * 400 + "/3", "5", False, False),
    ("1" * 5000, "5", False, False),
]


@pytest.mark.parametrize("answer, gold, official, strict", GSM8K)
def test_gsm8k_verdicts(answer, gold, official, strict):
    assert B.gsm8k_official(answer, gold) is official
    assert B.gsm8k_strict(answer, gold) is strict


@pytest.mark.parametrize("text, answer", [
    ("so\nThe answer is: 18", "18"),
    ("The answer is: 3. No. The answer is: 4 .", "4 ."),  # the last one
    ("The answer is:18", None),  # space-sensitive
    ("the answer is: 18", None),  # case-sensitive
    ("#### 18", None),
])
def test_gsm8k_marker(text, answer):
    assert B.number_after_marker(text) == answer


# What follows the marker, and gold; the official verdict as its code's rules are (benchmarks.py),
# without sympy. MetaMath's rule, ours, is equality of the normal forms.
MATH = [
    # answer, gold, official, strict
    ("18", "18", True, True),
    ("$18$", "18", False, False),  # a bare $ is none of the dollar signs that go
    ("\\$18", "18", True, True),
    ("18.0", "18", True, False),
    ("18 dollars", "18", False, False),
    ("18\\text{ dollars}", "18", True, True),
    ("18\\text{dollars}", "18", False, False),  # units begin with a space
    ("50\\%", "50", True, True),
    ("90^\\circ", "90", True, True),
    ("90^{\\circ}", "90", True, True),
    ("1,234", "1234", True, False),
    ("1234", "123,4", True, False),  # commas count for nothing
    ("10,\\!000", "10,000", True, True),
    ("-3", "-3", True, True),
    ("\u22123", "-3", False, False),  # another minus
    ("1/2", "\\frac{1}{2}", True, True),
    ("0.5", "\\frac{1}{2}", True, True),
    (".5", "\\frac12", True, True),
    ("0.25", "\\frac{1}{4}", False, False),  # official: with sympy and antlr4 perhaps
    ("\\frac12", "\\frac{1}{2}", True, True),
    ("\\frac1{2}", "\\frac{1}{2}", True, True),
    ("\\dfrac{3}{4}", "\\tfrac34", True, True),
    ("\\frac{3}4", "\\frac{3}{4}", True, False),  # braces count for nothing
    ("\\sqrt3", "\\sqrt{3}", True, True),
    ("2\\sqrt 5", "2\\sqrt{5}", True, False),  # its argument is the space
    ("\\left( 1, 2 \\right)", "(1,2)", True, True),
    ("[1,2)", "[1,2)", True, True),
    ("(1,2)", "[1,2)", False, False),
    ("(1,2]", "(1,2)", False, False),
    ("(12)", "12", True, False),
    ("(0.50, 3)", "(0.5,3)", True, False),  # part by part
    ("(1,2,3)", "(1,2)", False, False),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True,
     True),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1&3\\end{pmatrix}", False, False),
    ("\\text{even}", "\\text{even}", True, True),
    ("even", "\\text{even}", False, False),
    ("k = 5", "5", True, True),
    ("area=5", "5", False, False),
    ("x+1", "1+x", False, False),  # official: True with sympy
    ("7000", "70", True, False),  # 100 times too large
    ("0.7", "70", True, False),
    ("70001", "70000", True, False),
    ("x/2", "7", True, False),  # from here on: no normal form, compared with itself
    ("x/2", "x/2", True, True),
    ("5/6 pounds", "7", True, False),
    ("2/00", "2", False, False),  # text: neither a number nor a whole-number fraction
    ("\\frac", "7", True, False),
    ("\\sqrt", "7", True, False),
    ("1\\text{ a}\\text{ b}", "7", True, False),
    ("\\frac1", "7", False, False),
    ("1" * 400, "5", False, False),
    ("1" * 400, "1" * 400, True, True),
    ("1" * 5000 + "/3", "5", True, False),  # more digits than int() takes
    ("", "5", False, False),
    (None, "5", False, False),
]


@pytest.mark.parametrize("answer, gold, official, strict", MATH)
def test_math_verdicts(answer, gold, official, strict):
    assert B.math_official(answer, gold) is official
    assert B.math_strict(answer, gold) is strict


@pytest.mark.parametrize("text, answer", [
    ("so\nThe answer is: $\\frac12$.", "$\\frac12$"),
    ("The answer is: 3. No. The answer is: 4 .", "4"),  # the last one
    ("The answer is: 5.\nOr 6.\n", "5"),
    ("The answer is: 5\n### Next", "5\n### Next"),  # only a full stop ends it
    ("The answer is: 0.5.", "0.5"),
    ("The answer is: ..", "."),
    ("The answer is:18", None), ("the answer is: 18", None), ("\\boxed{18}", None),
])
def test_math_marker(text, answer):
    assert B.math_answer(text) == answer


@pytest.mark.parametrize("solution, gold", [
    ("so $x=\\boxed{5}$, then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("\\boxed{\\begin{matrix}1 \\\\ {2}\\end{matrix}} }", "\\begin{matrix}1 \\\\ {2}\\end{matrix}"),
    ("so it is $\\boxed 5$.", "5"), ("\\boxed{}", ""),
    ("\\boxed{5", None), ("\\fbox{5}", None), ("\\boxed5", None), ("it is 5", None),
    ("\\boxed", None),
])
def test_math_gold_is_in_the_last_box(solution, gold):
    for row in ({"problem": "p", "solution": solution, "level": "Level 5"},
                {"instruction": "p", "output": solution}):
        if gold is None:
            with pytest.raises(UserError, match=r"x:4: the solution has no \\boxed answer"):
                B.math_gold(data.Row(row, "x:4"))
        else:
            assert B.math_gold(data.Row(row, "x:4")) == gold
            assert B.math_prompt(data.Row(row, "x:4")).endswith(
                "Instruction:\np\n\n### Response: Let's think step by step.")


@pytest.mark.parametrize("text, name, answer", [
    ("the correct answer is answer3", "arc_c", "answer3"),
    ("answer: answer3 or answer1", "siqa", "answer3"),  # the first
    ("Answer3", "obqa", None), ("answer 3", "arc_e", None), ("", "piqa", None),
    ("the correct answer is false", "boolq", "false"), ("untrue", "boolq", "true"),
    ("solution10", "piqa", "solution1"), ("option3", "winogrande", None),
    ("ending4", "hellaswag", "ending4"),
])
def test_the_first_choice_word_counts(text, name, answer):
    assert B.BENCHMARKS[name].extract(text) == answer


SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "commonsense"


@pytest.mark.parametrize("name", B.of_group(B.BENCHMARKS, "commonsense"))
def test_every_row_of_the_commonsense_test_sets_is_right_with_its_own_answer(name):
    """And with another choice it is wrong. Where the published files are at hand."""
    b = B.BENCHMARKS[name]
    file = SHARED / f"{b.source.removeprefix('commonsense:')}.test.json"
    if not file.exists():
        pytest.skip(f"no {file.name}")
    rows = data.read_rows(str(file))
    assert len(rows) == data.SOURCES[b.source].rows
    for row in rows:
        gold = b.gold(row)
        assert b.judge(b.extract(row.fields["output"]), gold)
        other = {"true": "false", "false": "true"}.get(gold) or (
            f"{gold[:-1]}{2 if gold[-1] == '1' else 1}")
        said = b.extract(f"the correct answer is {other}")
        assert said == other and not b.judge(said, gold)
        assert b.prompt(row).count(row.fields["instruction"]) == 1


def test_ifeval_without_lm_eval_has_no_verdict_and_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # an import of it fails
    B.lm_eval_checkers.cache_clear()
    gold = B.ifeval_gold(data.Row(ROWS["ifeval"], "x"))
    assert B.ifeval_verdicts("hello", gold) is None is B.ifeval_verdicts("again", gold)
    out = capsys.readouterr().out
    assert out.count("pip install \"lm_eval[ifeval]") == 1 and "is missing)" in out
    B.lm_eval_checkers.cache_clear()


def test_ifeval_verdicts_are_lm_evals_by_column(monkeypatch):
    """Two prompts, of one instruction and of two: 50 % of the prompts, two thirds of the
    instructions."""
    def process_results(doc, results):
        assert set(doc) == {"key", "prompt", "instruction_id_list", "kwargs"}
        kept = [word in results[0] for word in doc["instruction_id_list"]]
        return {"prompt_level_strict_acc": all(kept), "inst_level_strict_acc": kept,
                "prompt_level_loose_acc": True, "inst_level_loose_acc": [True] * len(kept)}

    monkeypatch.setattr(B, "lm_eval_checkers", lambda: process_results)
    golds = [B.ifeval_gold(data.Row(ROWS["ifeval"] | {"instruction_id_list": words,
                                                      "kwargs": [{}] * len(words)}, "x"))
             for words in (["a"], ["a", "b"])]
    records = [{"correct": B.ifeval_verdicts("a", gold)} for gold in golds]
    assert R.column_scores("ifeval", records) == pytest.approx(
        {"P-S": 50, "P-L": 100, "I-S": 200 / 3, "I-L": 100})
    assert set(R.column_scores("ifeval", [{"correct": None}]).values()) == {None}


def test_ifeval_against_lm_eval_itself(monkeypatch):
    """Verdicts by hand, and those of its own code where it is installed; two instructions that take
    no sentence splitter."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("nltk.data.find", lambda name: name)
    B.lm_eval_checkers.cache_clear()
    row = {"key": 1, "prompt": "p", "instruction_id_list": [
        "punctuation:no_comma", "change_case:english_lowercase"], "kwargs": [{}, {"x": None}]}
    for text, strict, loose in (("all is well here", [True, True], [True, True]),
                                ("Sure, here it is\nall is well", [False, False], [True, True]),
                                ("", [False, False], [False, False])):
        found = B.ifeval_verdicts(text, B.ifeval_gold(data.Row(row, "x")))
        assert found == {"P-S": [all(strict)], "P-L": [all(loose)], "I-S": strict, "I-L": loose}


def test_triviaqa_takes_any_alias_as_it_is():
    b = B.BENCHMARKS["triviaqa"]
    hub = {"question": "Q?", "answer": {"aliases": ["The Beatles", "Fab Four"],
                                        "normalized_aliases": ["beatles"], "value": "x"}}
    gold = b.gold(data.Row(hub, "x"))
    assert gold == ["The Beatles", "Fab Four"] == b.gold(
        data.Row({"question": "Q?", "answer": ["The Beatles", "Fab Four"]}, "x"))
    assert b.judge(" the beatles", gold) and b.judge("FAB-FOUR".replace("-", " "), gold)
    assert not b.judge("beatles", gold)  # articles stay, unlike nq_open's
    assert not b.judge("the beatles ", gold)


@pytest.mark.parametrize("text, answers, right", [
    (" sinclair lewis", ["Sinclair Lewis"], True),
    ("St", ["St. Louis"], False),  # what a stop at "." leaves
    ("the beatles", ["Beatles"], True),
    ("THE Beatles", ["Beatles"], False),  # articles go before lower-casing
    ("man of the year", ["man of year"], True),  # articles go anywhere
    ("Saint Louis ", ["Saint Louis"], False),  # trailing space stays
    ("U.S.A", ["USA"], True),
    ("", ["x"], False),
    ("b", ["a", "B!"], True),
])
def test_exact_match(text, answers, right):
    assert B.exact_match(text, answers) is right


def test_exact_match_can_keep_articles():
    assert not B.exact_match("the beatles", ["Beatles"], articles=False)


def test_answers_that_begin_with_another_answer_go():
    assert B.without_extensions(["Al Gore", "Bo", "Al", "Alabama"]) == ["Al", "Bo"]


# ------------------------------------------------------------------------------------- the table

# Byte for byte what pissa-dataset's python/test.json has before its instructions.
CODE = ("Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n\n### Instruction:\n")

ROWS = {  # a row of each benchmark's own dataset
    "gsm8k": {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    "math": {"problem": "2+2?", "solution": "It is $\\boxed{\\frac82}$."},
    "ifeval": {"key": 1000, "prompt": "Write, without commas.", "instruction_id_list": [
        "punctuation:no_comma"], "kwargs": [{}]},
    "triviaqa": {"question": "Who wrote Faust?", "answer": {"aliases": ["Goethe", "J. W. Goethe"]}},
    "nq_open": {"question": "who wrote faust", "answer": ["Goethe"]},
    "webqs": {"qText": "what do jamaicans speak?", "answers": ["Patois", "Jamaican English"]},
    "humaneval": {"task_id": "HumanEval/9", "prompt": 'def two():\n    """2"""\n',
                  "test": "def check(candidate):\n    assert candidate() == 2",
                  "entry_point": "two", "canonical_solution": "    return 2\n"},
    "mbpp": {"task_id": 2, "prompt": "Write two.", "code": "def two(): return 2",
             "test_imports": ["import math"], "test_list": ["assert two() == 2",
                                                            "assert math.sqrt(two()) > 1"]},
    "word_problems": {"question": " 2 bags?", "answer": " 2 times 3 is 6. The answer is: 6"},
} | {name: {"question": "where does rozi buspu live?", "answer": ["vedomi"], "frequent": True}
     for name in ("city", "job", "year")} | {
    name: {"instruction": "Which?\n\nAnswer format: this/that", "input": "",
           "output": f"the correct answer is {answer}", "answer": answer}
    for name, answer in (("boolq", "true"), ("piqa", "solution2"), ("siqa", "answer3"),
                         ("hellaswag", "ending4"), ("winogrande", "option1"), ("arc_e", "answer5"),
                         ("arc_c", "answer1"), ("obqa", "answer4"))} | {
    "cola": {"sentence": "It rains.", "label": 1},
    "sst2": {"sentence": "dull", "label": 0},
    "mrpc": {"sentence1": "a", "sentence2": "b", "label": 1},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 2.5},
    "qqp": {"question1": "a", "question2": "b", "label": 1},
    "mnli": {"premise": "a", "hypothesis": "b", "label": 2},
    "mnli-mm": {"premise": "a", "hypothesis": "b", "label": 2},
    "qnli": {"question": "a", "sentence": "b", "label": 0},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 0},
}
PROMPTS = {
    "gsm8k": data.PROMPT.format(instruction="2+2?") + " Let's think step by step.",
    "math": data.PROMPT.format(instruction="2+2?") + " Let's think step by step.",
    "ifeval": "Write, without commas.",
    "triviaqa": "Question: Who wrote Faust??\nAnswer:",
    "nq_open": "Answer these questions:\n\nQ: who wrote faust?\nA:",
    "webqs": "Question: what do jamaicans speak?\nAnswer:",
    "humaneval": CODE + "Create a Python script for this problem:\ndef two():\n\t\"\"\"2\"\"\"\n"
                 "\n\n### Response:",
    "mbpp": CODE + "Write two. Your code should satisfy the following assertion:\n```python\n"
            "assert two() == 2\n```\n\n### Response:",
    "word_problems": "Q: 2 bags?\nA:",
} | dict.fromkeys(("city", "job", "year"), "Q: where does rozi buspu live?\nA:") | dict.fromkeys(
    B.of_group(B.BENCHMARKS, "commonsense"), data.COMMONSENSE_TEST_PROMPT.format(
        instruction="Which?\n\nAnswer format: this/that")) | {
    "cola": ["It rains."], "sst2": ["dull"]} | {
    name: ["a", "b"] for name in ("mrpc", "stsb", "qqp", "mnli", "mnli-mm", "qnli", "rte")}


@pytest.mark.parametrize("name", B.BENCHMARKS)
def test_every_row_of_the_table_is_complete(name):
    """What a new row must bring: a source, a group of some task, a protocol, a prompt, a gold
    answer that its own judge accepts, and a refusal of a row without one."""
    b = B.BENCHMARKS[name]
    assert b.source in data.SOURCES and b.protocol in E.PROTOCOLS
    assert b.group in {g for t in data.TASKS.values() for g in (t.group, t.knowledge)}
    row = data.Row(ROWS[name], "x:1")
    assert b.prompt(row) == PROMPTS[name]
    gold = b.gold(row)
    assert b.protocol != "classify" or gold == ROWS[name]["label"]
    if b.protocol == "complete":
        assert b.new_tokens > 0
    if b.program:
        right = B.python_code(ROWS[name].get("code", "def two():\n    return 2"))
        assert run(b.program(right, gold)).passed
        assert not run(b.program("nonsense", gold)).passed and not run(b.program("", gold)).passed
    elif b.protocol == "complete":
        said = gold[0] if isinstance(gold, list) else gold
        for judge in filter(None, () if b.columns else (b.judge, b.official)):
            assert judge(said, gold) and not judge("nonsense", gold)
    for broken in ({}, {"question": "q", "answer": None}, {"question": "q", "answer": "no gold"},
                   {"question": "q", "answer": [None]}):
        with pytest.raises(UserError, match="x:2"):
            b.gold(data.Row(broken, "x:2"))


def test_rows_that_json_lets_through_and_nothing_can_use():
    """Half of a UTF-16 pair in a test, and a label that is more than any float."""
    for name, change in (
            ("mbpp", {"test_list": ["assert '\ud800'"]}), ("stsb", {"label": 10**400})):
        with pytest.raises(UserError, match="x:2"):
            B.BENCHMARKS[name].gold(data.Row(ROWS[name] | change, "x:2"))


def test_a_number_in_a_list_of_answers_is_its_text():
    row = data.Row({"question": "q", "answer": [5, "five"]}, "x")
    assert B.BENCHMARKS["nq_open"].gold(row) == ["5", "five"] and B.exact_match("5", ["5", "five"])


def test_a_task_is_measured_by_its_own_benchmarks_and_by_what_the_model_knew():
    knowledge = ["triviaqa", "nq_open", "webqs"]
    assert B.of_task("math") == ["gsm8k", "math", *knowledge]
    assert B.of_task("instruction") == ["ifeval", *knowledge]
    assert B.of_task("code") == ["humaneval", "mbpp", *knowledge]
    assert B.of_task("commonsense") == ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e",
                                        "arc_c", "obqa"]
    assert B.of_task("microcosm") == ["word_problems", "city", "job", "year"]
    for task in data.TASKS:
        assert B.of_task(task)


def test_readme_lists_every_task_and_benchmark():
    """With where the rows come from, their licence and number, as the tables have it."""
    text = (Path(B.__file__).parent / "README.md").read_text()
    section = text.partition("## Tasks and benchmarks")[2].partition("\n## ")[0]
    tasks, benchmarks = section.partition("| benchmark |")[::2]
    benchmarks = benchmarks.partition("\n\n")[0]

    def line_of(name, table):
        (found,) = [line for line in table.splitlines()
                    if line.startswith("| ") and f"`{name}`" in line.split("|")[1]]
        return found

    for name, task in data.TASKS.items():
        if not task.classes:
            source, line = data.SOURCES[task.source], line_of(name, tasks)
            place = source.file if isinstance(source.place, Path) else source.place
            assert place in line and source.licence in line, name
    for name, b in B.BENCHMARKS.items():
        source = data.SOURCES[b.source]
        if b.protocol != "classify" and not isinstance(source.place, Path):
            line = line_of(name, benchmarks)
            assert source.place.removeprefix("https://github.com/AGI-Edgerunners/") in line, name
            assert source.rows is None or f"{source.rows:,}" in line, name
