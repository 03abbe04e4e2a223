"""benchmarks.py: the judges, and that every row can be asked and judged."""

import pytest

import benchmarks as B
import data
import eval as E
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
    "nq_open": "Answer these questions:\n\nQ: who wrote faust?\nA:",
    "webqs": "Question: what do jamaicans speak?\nAnswer:",
    "humaneval": CODE + "Create a Python script for this problem:\ndef two():\n\t\"\"\"2\"\"\"\n"
                 "\n\n### Response:",
    "mbpp": CODE + "Write two. Your code should satisfy the following assertion:\n```python\n"
            "assert two() == 2\n```\n\n### Response:",
    "word_problems": "Q: 2 bags?\nA:",
} | dict.fromkeys(("city", "job", "year"), "Q: where does rozi buspu live?\nA:") | {
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
        said = gold if isinstance(gold, str) else gold[0]
        for judge in filter(None, (b.judge, b.official)):
            assert judge(said, gold) and not judge("nonsense", gold)
    for broken in ({}, {"question": "q", "answer": None}, {"question": "q", "answer": "no gold"},
                   {"question": "q", "answer": [None]}):
        with pytest.raises(UserError, match="x:2"):
            b.gold(data.Row(broken, "x:2"))


def test_a_number_in_a_list_of_answers_is_its_text():
    row = data.Row({"question": "q", "answer": [5, "five"]}, "x")
    assert B.BENCHMARKS["nq_open"].gold(row) == ["5", "five"] and B.exact_match("5", ["5", "five"])


def test_a_task_is_measured_by_its_own_benchmarks_and_by_what_the_model_knew():
    assert B.of_task("math") == ["gsm8k", "nq_open", "webqs"]
    assert B.of_task("microcosm") == ["word_problems", "city", "job", "year"]
    for task in data.TASKS:
        assert B.of_task(task)
