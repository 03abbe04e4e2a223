"""Code that a model wrote: prompts, what is cut out of an answer, its execution, and EvalPlus."""

import json
import sys
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_llama, write_checkpoint

import benchmarks as B
import checkpoint as C
import data
import eval as E
import model as M
import results as R
import sandbox
from checkpoint import UserError

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
linux = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")

HUMANEVAL = {  # HumanEval/53 of openai/human-eval, MIT licence
    "task_id": "HumanEval/53",
    "prompt": '\n\ndef add(x: int, y: int):\n    """Add two numbers x and y\n    >>> add(2, 3)\n'
              '    5\n    >>> add(5, 7)\n    12\n    """\n',
    "entry_point": "add", "canonical_solution": "    return x + y\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    import random\n\n"
            "    assert candidate(0, 1) == 1\n    assert candidate(2, 3) == 5\n\n"
            "    for i in range(100):\n        x, y = random.randint(0, 10), i\n"
            "        assert candidate(x, y) == x + y\n\n"}
MBPP = {  # in the format of sanitized-mbpp.json
    "source_file": "x.ipynb", "task_id": 19, "prompt": "Write a function to double a number",
    "code": "def double(n):\r\n    return 2 * n", "test_imports": ["import math"],
    "test_list": ["assert double(1) == 2", "assert double(math.inf)    == math.inf"]}


def asked(name, *fields):
    return B.questions(name, [data.Row(f, f"x:{i}") for i, f in enumerate(fields, 1)])


def test_prompts_byte_for_byte():
    """Three new lines before the instruction; a tab for four spaces; one assertion; a full stop."""
    head = ("Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n\n### Instruction:\n")
    assert asked("humaneval", HUMANEVAL)[0].prompt == (
        head + "Create a Python script for this problem:\n\n\ndef add(x: int, y: int):\n"
        '\t"""Add two numbers x and y\n\t>>> add(2, 3)\n\t5\n\t>>> add(5, 7)\n\t12\n\t"""\n'
        "\n\n### Response:")
    end = (" Your code should satisfy the following assertion:\n```python\nassert double(1) == 2\n"
           "```\n\n### Response:")
    for said, shown in (("Double it.", "Double it."), ("Double it", "Double it."),
                        ("Double (all times.)", "Double (all times.)."), ("a    b", "a\tb.")):
        assert asked("mbpp", MBPP | {"prompt": said})[0].prompt == head + shown + end


@pytest.mark.parametrize("text, code", [
    ("def f(): pass", "def f(): pass"),
    (" Sure:\n```python\ndef f():\n    pass\n```\nIt passes.", "def f():\n    pass"),
    ("```python\na = 1\n```\nor\n```python\na = 2\n```", "a = 1"),  # the first block
    ("```python\na = 1", "a = 1"),  # cut off by the token limit
    ("```python\r\na = 1\r\n```", "a = 1"),
    ("```\na = 1\n```", "```\na = 1\n```"),  # this fence the official code does not know
    ("a = 1\n\n# Example usage\nprint(a)", "a = 1"),
    ('a = 1\nif __name__ == "__main__":\n    main()', "a = 1"),
    ("a = 1\nif __name__ == '__main__':\n    b", "a = 1\nif __name__ == '__main__':\n    b"),
    ("def f(x):\n    assert x\n    return 1", "def f(x):"),  # wherever it stands
    ("def test_assertions(): pass", "def test_"),
    ("    return 1\n    # or\n", "return 1\n    # or"),
    ("", ""),
])
def test_python_code(text, code):
    assert B.python_code(text) == code


def test_of_mbpp_those_of_evalplus_are_asked():
    rows = [data.Row({"task_id": i}, f"x:{i}") for i in (1, 2, 83, 802, 803)]
    assert [r.fields["task_id"] for r in B.kept("mbpp", rows)] == [1, 2, 803]
    assert len(B.MBPP_DROPPED) == 49
    with pytest.raises(UserError, match="none of the 1 rows"):
        B.kept("mbpp", rows[2:3])
    with pytest.raises(UserError, match="x:1: field 'task_id' is 'HumanEval/0'"):
        B.kept("mbpp", [data.Row({"task_id": "HumanEval/0"}, "x:1")])


@pytest.mark.parametrize("name, broken, says", [
    ("mbpp", {"test_list": []}, "field 'test_list'"),
    ("mbpp", {"test_list": [3]}, "are not all texts"),
    ("mbpp", {"prompt": None}, "field 'prompt'"),
    ("humaneval", {"test": ""}, "field 'test'"),
    ("humaneval", {"entry_point": 3}, "field 'entry_point'"),
])
def test_broken_rows_are_named(name, broken, says):
    with pytest.raises(UserError, match=f"x:1.*{says}"):
        asked(name, (HUMANEVAL if name == "humaneval" else MBPP) | broken)


# ------------------------------------------------------------------------------ the published data


@linux
@pytest.mark.parametrize("name, file, solution, n", [
    ("humaneval", "HumanEval.jsonl.gz", "canonical_solution", 164),
    ("mbpp", "sanitized-mbpp.json", "code", 378)])
def test_published_solutions_pass_and_none_passes_without(name, file, solution, n):
    if not (REAL / file).exists():
        pytest.skip(f"{file} is not at hand")
    rows = B.kept(name, data.read_rows(str(REAL / file)))
    golds = [q.gold for q in B.questions(name, rows)]
    assert len(rows) == len({g["task_id"] for g in golds}) == n
    program = B.BENCHMARKS[name].program
    solved = sandbox.run_all([program(r.fields[solution], g)
                              for r, g in zip(rows, golds, strict=True)],
                             sandbox.Limits(seconds=60, cpu_seconds=60))  # on a busy machine, too
    assert [(g["task_id"], o.why) for g, o in zip(golds, solved, strict=True) if not o.passed] == []
    empty = sandbox.run_all([program("", g) for g in golds])
    assert not any(o.passed for o in empty)


@linux
def test_solutions_of_the_fixtures_pass_and_none_passes_without():
    for name, row, code in (("humaneval", HUMANEVAL, HUMANEVAL["canonical_solution"]),
                            ("humaneval", HUMANEVAL, "def add(x, y):\n    return x + y"),
                            ("mbpp", MBPP, B.python_code(MBPP["code"]))):
        program, gold = B.BENCHMARKS[name].program, asked(name, row)[0].gold
        assert sandbox.run(program(code, gold)).passed
        wrong = ("", code.replace("+", "-").replace("*", "-"), "import sys; sys.exit(0)",
                 'x = """', "if False:", "def check(candidate): pass\nraise SystemExit",
                 code + "\nexit()", "try:\n    pass\nexcept:")
        assert not any(sandbox.run(program(text, gold)).passed for text in wrong)


# ------------------------------------------------------------------------------ a scripted model

RIGHT = "def add(x, y):\n    return x + y"
OUTPUTS = {  # what the model says, and whether it is right
    f" Here it is:\n```python\n{RIGHT}\n```\nIt adds.": True,
    RIGHT: True,
    f"```python\n{RIGHT}\n```\nor\n```python\ndef add(x, y):\n    return 0\n```": True,
    f"```python\ndef add(x, y):\n    return 0\n```\nor\n```python\n{RIGHT}\n```": False,
    f"{RIGHT}\n\n# Example usage\nprint(add(input(), 2))": True,
    f"{RIGHT}\nassert add(1, 1) == 3": True,  # its own tests are cut
    f"```\n{RIGHT}\n```": False,
    f"{RIGHT}\nThis function adds two numbers.": False,
    "    return x + y": False,  # the indent goes
    "while True: pass": False,
    "import os; os._exit(0)": False,
    "": False,
}


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A model that gives OUTPUTS, one after the other, in the order of the questions."""
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = tiny_llama(max_position_embeddings=4096)
    tokenizer = C.Tokenizer(tmp_path, model.config)
    prompts = []

    def number(ids):  # the questions are numbered in their text
        return int(tokenizer.decode(ids).partition("number ")[2].partition("!")[0])

    def generate(model, ids, *_):
        prompts.extend(ids)
        return [tokenizer.encode(list(OUTPUTS)[number(i)], False) for i in ids]

    monkeypatch.setattr(M, "generate", generate)
    rows = [HUMANEVAL | {"task_id": f"HumanEval/{i}",
                         "prompt": HUMANEVAL["prompt"].replace("Add", f"number {i}! Add")}
            for i in range(len(OUTPUTS))]
    return E.Evaluator(model, tokenizer), B.questions("humaneval", [
        data.Row(r, "x") for r in rows]), prompts


@linux
def test_awkward_outputs_are_judged(scripted, monkeypatch):
    evaluator, questions, prompts = scripted
    fast = sandbox.Limits(seconds=5)
    run_all = sandbox.run_all
    monkeypatch.setattr(sandbox, "run_all", lambda programs, **kw: run_all(programs, fast, **kw))
    evaluator.execute = True
    records = evaluator.ask("humaneval", questions)
    assert [r["correct"] for r in records] == list(OUTPUTS.values())
    assert records[9]["why"] == "timed out after 5 s" and records[0]["why"] == "passed"
    assert all(ids[0] == 256 for ids in prompts)  # BOS, as in training
    assert B.accuracy(records) == pytest.approx(100 * 5 / 12)


def test_nothing_is_executed_without_leave(scripted, monkeypatch, capsys):
    evaluator, questions, _ = scripted
    monkeypatch.setattr(sandbox, "run_all", None)
    records = evaluator.ask("humaneval", questions)
    assert {r["correct"] for r in records} == {None}
    lines = [json.loads(line) for line in R.samples(records).splitlines()]
    assert [line["task_id"] for line in lines] == [f"HumanEval/{i}" for i in range(len(OUTPUTS))]
    assert lines[0] == {"task_id": "HumanEval/0", "completion": RIGHT}


@linux
def test_eval_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Without the flag outputs and samples and no score; with it a score; K and T stay undefined
    where there is none."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    Path("he.jsonl").write_text(json.dumps(HUMANEVAL) + "\n")
    Path("mbpp.json").write_text(json.dumps([MBPP | {"task_id": 83}, MBPP]))
    said = byte_tokenizer().encode(RIGHT, add_special_tokens=False).ids
    monkeypatch.setattr(M, "generate", lambda model, ids, *_: [said for _ in ids])
    argv = ["tiny", "--benchmarks", "humaneval,mbpp", "--data", "humaneval=he.jsonl",
            "mbpp=mbpp.json", "--limit", "1"]
    E.main(argv)
    out = capsys.readouterr().out
    assert out.count("1 programs, not executed") == 2 and "--allow-code-execution" in out
    results = R.read_results("runs/tiny-base")
    assert [(b["score"], b["n"], "correct" in b) for b in results["benchmarks"].values()] == [
        (None, 1, False)] * 2
    assert results["summary"] == {"Avg": None}
    for name, task in (("humaneval", "HumanEval/53"), ("mbpp", "Mbpp/19")):  # 83 is not asked
        sample = Path(f"runs/tiny-base/eval/{name}-samples.jsonl").read_text()
        assert json.loads(sample) == {"task_id": task, "completion": RIGHT}
        record = json.loads(Path(f"runs/tiny-base/eval/{name}.jsonl").read_text())
        assert record["output"] == RIGHT and record["correct"] is None
    E.main([*argv, "--allow-code-execution"])
    assert "humaneval 1 of 1 right" in capsys.readouterr().out
    results = R.read_results("runs/tiny-base")
    assert [b["score"] for b in results["benchmarks"].values()] == [100, 0]


def test_where_nothing_can_be_run_it_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    Path("he.jsonl").write_text(json.dumps(HUMANEVAL) + "\n")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(E, "load_target", None)
    with pytest.raises(UserError, match="on Linux only"):
        E.main(["tiny", "--benchmarks", "humaneval", "--data", "humaneval=he.jsonl",
                "--allow-code-execution"])


def test_a_sandbox_that_fails_late_costs_no_output(scripted, monkeypatch, capsys):
    evaluator, questions, _ = scripted
    evaluator.execute = True

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(sandbox, "run_all", fail)
    found, records = E.run_benchmark(evaluator, "humaneval", [], questions)
    assert found["score"] is None and records[1]["output"] == RIGHT
    assert "humaneval: no space left" in capsys.readouterr().out
