"""One row per benchmark, and the judges: text in, verdict out, no model.

A row says where the questions come from, how they are put, what the right answer is, by which
protocol of eval.py the model is asked, and who judges. Adding a benchmark is a row and at most
one judge.
"""

import math
import random
import re
import string
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cache, partial
from itertools import accumulate
from operator import eq
from statistics import StatisticsError, correlation
from typing import Any, NamedTuple

import data
from checkpoint import UserError

# -------------------------------------------------------------------------------------- judges


def number_after_marker(text: str) -> str | None:
    """What follows the last "The answer is: ", stripped; None without the marker."""
    _, marker, after = text.rpartition("The answer is: ")
    return after.strip() if marker else None


LONGEST = 300  # characters of a number: no answer has more, and no float and no int() takes all


def gsm8k_strict(answer: str | None, gold: str) -> bool:
    """The first number in the answer is exactly the gold number.

    Thousands separators and a leading $ are read; a fraction counts as its value.
    """
    found = re.search(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+(?:\.\d+)?)?", answer or "")
    if not found or len(found[0]) > LONGEST:
        return False
    over, _, under = found[0].replace(",", "").partition("/")
    denominator = Fraction(under.strip() or "1")
    return denominator != 0 and (Fraction(over.strip()) / denominator
                                 == Fraction(gold.replace(",", "")))


def gsm8k_official(answer: str | None, gold: str) -> bool:
    """The rule of the official code, which rounds to a whole number and takes answers that are
    100 times too large or too small, or off by 0.01 %, for right."""
    found = re.search(r"[\-+]?\d*[\.,/]?\d+", answer or "")
    if not found or len(found[0]) > LONGEST:
        return False
    text = found[0]
    if "/" in text:
        over, under = text.split("/")
        if not over.strip("+-"):  # "x/2", of which "/2" was taken: no number
            return False
        # A denominator "0" alone gives the numerator; "00" would crash the official script.
        value = float(over) if not float(under) else float(Fraction(over) / Fraction(under))
    else:
        value = float(text.replace(",", ""))
    predicted, right = round(value), round(float(gold.replace(",", "")))
    return any(math.isclose(predicted, right * factor, rel_tol=1e-4) for factor in (1, 0.01, 100))


def math_answer(text: str) -> str | None:
    """MetaMath's: after the last "The answer is: " up to a full stop at the end of a line."""
    _, marker, after = text.rpartition("The answer is: ")
    return after.split(".\n")[0].strip().removesuffix(".").strip() if marker else None


def in_braces(rest: str, count: int) -> str:
    """What follows a LaTeX command, its `count` arguments of one letter put into braces."""
    for i in range(0, 3 * count, 3):  # an argument in braces is taken for the last one
        if rest[i] == "{":
            break
        rest = f"{rest[:i]}{{{rest[i]}}}{rest[i + 1:]}"
    return rest


def math_normal(s: str) -> str:
    """The normal form of an answer to MATH by Hendrycks et al., as MetaMath has it.

    IndexError or ValueError for what their code fails at: a command without argument, units twice,
    a / between texts that are no whole numbers.
    """
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
                     ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""),
                     ("\\$", "")):
        s = s.replace(old, new)
    if s.count("\\text{ ") > 1:
        raise ValueError("units twice")
    s = s.partition("\\text{ ")[0].replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    s = "0" + s if s.startswith(".") else s
    name, equals, value = s.partition("=")
    s = value if equals and "=" not in value and len(name) <= 2 else s  # k = 5
    head, *rest = s.split("\\sqrt")
    s = head + "".join("\\sqrt" + in_braces(r, 1) for r in rest)
    head, *rest = s.replace(" ", "").split("\\frac")
    if not any(r[0] != "{" and len(r) < 2 for r in rest):
        s = head + "".join("\\frac" + in_braces(r, 2) for r in rest)
    s = s.replace(" ", "")
    s = "\\frac{1}{2}" if s == "0.5" else s
    over, slash, under = s.partition("/")
    if slash and "/" not in under and s == f"{int(over)}/{int(under)}":
        s = f"\\frac{{{over}}}{{{under}}}"
    return s


def math_strict(answer: str | None, gold: str) -> bool:
    """MetaMath's rule: the same normal form; where there is none, the same text."""
    if answer is None:
        return False
    try:
        return math_normal(answer) == math_normal(gold)
    except (IndexError, ValueError):
        return answer == gold


def as_number(s: str) -> float | None:
    """A number with its commas left out; None for anything else."""
    try:
        return float(s.replace(",", ""))
    except ValueError:
        return None


def math_equal(a: str, b: str) -> bool:
    """The official code's, without sympy, which there finds x+1 = 1+x, and evaluates what the model
    wrote: numbers 100 times too large or too small, or off by 0.01 %, are right, and braces and
    parentheses count for nothing."""
    x, y = as_number(a), as_number(b)
    if x is not None and y is not None:
        return any(math.isclose(x, right, rel_tol=1e-4) for right in (y / 100, y, y * 100))
    if not a:
        return False
    a, b = a.strip(), b.strip()
    plain_a, plain_b = a, b
    if (a[:1] + a[-1:] == "[]" and b[:1] != "(") or (a[:1] + a[-1:] == "()" and b[:1] != "["):
        plain_a, plain_b = a.strip("[]()"), b.strip("[]()")
    if re.sub(r"[{}()]", "", plain_a) == re.sub(r"[{}()]", "", plain_b):
        return True
    if a[:1] + a[-1:] == b[:1] + b[-1:] and a[:1] + a[-1:] in ("[]", "()"):
        parts = a[1:-1].split(","), b[1:-1].split(",")
        return len(parts[0]) == len(parts[1]) and all(map(math_equal, *parts))
    return False


def math_official(answer: str | None, gold: str) -> bool:
    """The rule of the official code, which compares an answer that has no normal form with itself,
    so that "x/2" and "5/6 pounds" are right whatever the question was."""
    if answer is None:
        return False
    try:
        a, b = math_normal(answer), math_normal(gold)
    except (IndexError, ValueError):
        return True
    return a == b or math_equal(a, b)


def first_of(choices: str) -> Callable[[str], str | None]:
    """The first of the words of a benchmark in an output, as "true|false"; None without any."""
    def extract(text: str) -> str | None:
        found = re.search(choices, text)
        return found[0] if found else None
    return extract


ARTICLES = re.compile(r"\b(?:The |the |An |A |The |a |an )")


def exact_match(text: str, answers: Iterable[str], articles: bool = True) -> bool:
    """lm_eval's exact_match with ignore_case and ignore_punctuation, against any answer.

    `articles` also deletes them first, wherever they stand (nq_open's rule); before lower-casing,
    so that "THE " stays. Leading white space of the output is ignored, trailing is not.
    """

    def normal(s: str) -> str:
        s = ARTICLES.sub("", s) if articles else s
        return s.lower().translate(str.maketrans("", "", string.punctuation))

    return normal(text.lstrip()) in {normal(a) for a in answers}


def one_of(answer: str, golds: Iterable[str]) -> bool:
    """The whole answer is one of the right ones, to the letter."""
    return answer in golds


def without_extensions(answers: Iterable[str]) -> list[str]:
    """Sorted answers without those that begin with the one kept before: lm_eval's webqs rule."""
    kept: list[str] = []
    for answer in sorted(answers):
        if not kept or not answer.startswith(kept[-1]):
            kept.append(answer)
    return kept


LM_EVAL = ('no scores of ifeval: run `pip install "lm_eval[ifeval]==0.4.9.1"` and '
           "`python -m nltk.downloader punkt_tab` (a download of 4 MB), and evaluate again; the "
           "outputs are written all the same")


@cache
def lm_eval_checkers() -> Callable | None:
    """lm_eval's checkers of IFEval's instructions; None, and a line that says what to install,
    where they or the sentence splitter that they need are not there."""
    try:
        import langdetect
        import nltk
        from lm_eval.tasks.ifeval.utils import process_results

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError) as error:
        print(f"{LM_EVAL} ({getattr(error, 'name', None) or 'punkt_tab'} is missing)")
        return None
    langdetect.DetectorFactory.seed = 0  # it guesses at random otherwise, which lm_eval leaves so
    return process_results


def ifeval_verdicts(output: str, gold: dict) -> dict[str, list[bool]] | None:
    """Whether the output follows all instructions of the prompt (P) and each of them (I), strictly
    (S) and loosely (L), where it may be without its first or last line or its asterisks.

    Of the prompt that asks for the letter "#" the checker draws a letter at random: here always the
    same, so that a verdict stands.
    """
    check = lm_eval_checkers()
    if check is None:
        return None
    state = random.getstate()
    random.seed(0)
    found = check(gold, [output])
    random.setstate(state)
    return {"P-S": [found["prompt_level_strict_acc"]], "P-L": [found["prompt_level_loose_acc"]],
            "I-S": found["inst_level_strict_acc"], "I-L": found["inst_level_loose_acc"]}


# ----------------------------------------------------------------------- code that a model wrote


def python_code(text: str) -> str:
    """The first fenced block of Python, or the whole text; without a test of the model's own.

    As the official code, quirks included: only "```python" opens a block; what follows the first
    "assert", "# Example usage" or test for __main__ is cut, wherever it stands; and stripping takes
    the indent of the first line, so that the mere body of a function is none.
    """
    text = text.replace("\r", "")
    if "```python" in text:
        text = text[text.index("```python"):].replace("```python", "").partition("\n```")[0]
    for end in ('if __name__ == "__main__":', "# Example usage", "assert"):
        text = text.partition(end)[0]
    return text.strip()


def with_tests(code: str, gold: dict) -> str:
    """The program that comes to its end if the code is right: run it with sandbox.py only."""
    return f"{gold['before']}{code}\n\n{gold['tests']}\n"


# --------------------------------------------------------------------------------------- metrics


def accuracy(records: list[dict]) -> float:
    """Part of the records that are right, in %."""
    return 100 * sum(r["correct"] for r in records) / len(records)


def column_accuracy(records: list[dict], column: str) -> float:
    """Part of one column's verdicts that are right, in %; NaN where nothing was judged."""
    verdicts = [v for r in records for v in (r["correct"] or {}).get(column, ())]
    return 100 * sum(verdicts) / len(verdicts) if verdicts else math.nan


def pearson(records: list[dict]) -> float:
    """100 times Pearson's correlation of `predicted` and `gold`; NaN where either is constant."""
    try:
        return 100 * correlation([r["predicted"] for r in records], [r["gold"] for r in records])
    except StatisticsError:
        return math.nan


def matthews(records: list[dict]) -> float:
    """100 times Matthews' correlation of two classes, which is Pearson's of their numbers; 0 where
    only one class is predicted, as scikit-learn has it."""
    value = pearson(records)
    return 0.0 if math.isnan(value) else value


# --------------------------------------------------------------------------------- the benchmarks


class Benchmark(NamedTuple):
    """How one benchmark is run and scored.

    Protocols: `complete` generates greedily up to a stop and judges the text; `greedy_match` asks
    whether every token of some right answer is the model's first choice, and generates nothing;
    `classify` takes the classifier's highest score.
    """

    about: str  # for --help
    source: str  # of data.SOURCES
    group: str  # what it measures: see data.TASKS
    protocol: str  # of eval.PROTOCOLS
    prompt: Callable[[data.Row], str | list[str]]  # a classifier's: its one or two texts
    gold: Callable[[data.Row], Any]  # the right answer; UserError for a row without one
    judge: Callable[[Any, Any], Any] = eq  # (extracted answer, gold) -> right? With `columns`: the
    # verdicts of each, {column: [right?, ...]}, or None where what it takes is not installed
    official: Callable[[Any, Any], bool] | None = None  # the official code's rule, if another
    extract: Callable[[str], str | None] | None = None  # the answer in the output
    new_tokens: int = 256  # at most
    stops: tuple[str, ...] = ()
    bos: str = "harness"  # harness: none, as lm_eval (but on Gemma); always: as in training
    loss_under: str | None = None  # a task: also the references' mean loss under its prompt
    part: Callable[[data.Row], str] | None = None  # also scored apart by this name
    keep: Callable[[data.Row], bool] | None = None  # which rows are asked
    # (extracted code, gold) -> a program that passes if the code is right, in place of a judge;
    # its gold has the task_id and the text before the code that EvalPlus knows it by.
    program: Callable[[str, dict], str] | None = None
    metric: Callable[[list[dict]], float] = accuracy  # of the records, in %
    columns: tuple[str, ...] = ()  # the names of its scores, if it has several
    prepare: Callable[[], Any] | None = None  # says, before anything is asked, what its judge lacks


def gsm8k_prompt(row: data.Row) -> str:
    question = row.get(data.QUESTION)
    return data.PROMPT.format(instruction=question) + " Let's think step by step."


def gsm8k_gold(row: data.Row) -> str:
    gold = row.get(data.ANSWER).rpartition("#### ")[2].strip()
    if not re.fullmatch(r"-?[\d,]*\d(\.\d+)?", gold):
        raise UserError(f"{row.where}: the answer does not end in '#### number'")
    return gold


def math_prompt(row: data.Row) -> str:
    return data.PROMPT.format(instruction=data.asked(row)) + " Let's think step by step."


def math_gold(row: data.Row) -> str:
    """What is in the last \\boxed{} of the solution; of "\\boxed 5" what follows, up to a $, where
    the official code finds nothing and no answer is right."""
    solution = row.get(("solution", "output"))
    _, boxed, rest = solution.rpartition("\\boxed")
    if rest[:1] == " ":
        return rest.partition("$")[0].strip()
    depths = list(accumulate((letter == "{") - (letter == "}") for letter in rest))
    if not boxed or rest[:1] != "{" or 0 not in depths:
        raise UserError(f"{row.where}: the solution has no \\boxed answer")
    return rest[1 : depths.index(0)]


def choice_prompt(row: data.Row) -> str:
    return data.COMMONSENSE_TEST_PROMPT.format(instruction=data.asked(row))


def choice_gold(row: data.Row, choices: str) -> str:
    gold = row.get(("answer",))
    if not re.fullmatch(choices, gold):
        raise UserError(f"{row.where}: the answer {gold[:40]!a} is none of {choices}")
    return gold


def ifeval_prompt(row: data.Row) -> str:
    return row.get(("prompt",))


def ifeval_gold(row: data.Row) -> dict:
    """What the checkers take: the row itself."""
    names, options = row.get(("instruction_id_list",), list), row.get(("kwargs",), list)
    if len(names) != len(options):
        raise UserError(f"{row.where}: {len(names)} instructions, and {len(options)} kwargs")
    return {"key": row.get(("key",), (int, str), may_be_empty=True), "prompt": row.get(("prompt",)),
            "instruction_id_list": names, "kwargs": options}


def triviaqa_prompt(row: data.Row) -> str:
    """lm_eval's: the questions end in a question mark already, so that two are asked."""
    return f"Question: {row.get(data.QUESTION)}?\nAnswer:"


def aliases(row: data.Row) -> list[str]:
    """TriviaQA's answers as they are, not its normalised ones; or a plain list of answers."""
    found = row.get(data.ANSWER, (dict, list))
    return answers(row if isinstance(found, list) else data.Row(
        {"answer": found.get("aliases")}, row.where))


def nq_prompt(row: data.Row) -> str:
    return f"Answer these questions:\n\nQ: {row.get(data.QUESTION)}?\nA:"


def webqs_prompt(row: data.Row) -> str:
    return f"Question: {row.get(data.QUESTION)}\nAnswer:"


def answers(row: data.Row) -> list[str]:
    found = [str(a) if type(a) in (int, float) else a for a in row.get(data.ANSWER, list)]
    if not all(isinstance(answer, str) for answer in found):
        raise UserError(f"{row.where}: the answers {str(found)[:60]} are not all texts")
    return found


def word_problem_prompt(row: data.Row) -> str:
    return data.TASKS["microcosm"].prompt.format(instruction=row.get(data.QUESTION))


def word_problem_gold(row: data.Row) -> str:
    gold = number_after_marker(row.get(data.ANSWER))
    if not gold:
        raise UserError(f"{row.where}: the answer does not end in 'The answer is: number'")
    return gold


def fact_prompt(row: data.Row) -> str:
    return f"Q: {row.get(data.QUESTION)}\nA:"


def fact_part(row: data.Row) -> str:
    """Whether the model met this person five times as often as others, or not."""
    return "frequent" if row.fields.get("frequent") else "rare"


FACT = Benchmark("greedy; the whole answer, to the letter; frequent and rare people apart", "",
                 "microcosm facts", "complete", fact_prompt, answers, one_of,
                 extract=str.strip, new_tokens=6, bos="always", part=fact_part)


def multiple_choice(name: str, choices: str) -> Benchmark:
    """A test set of LLM-Adapters. Their code takes a 4-beam search; this is greedy."""
    return Benchmark(f"greedy; the first of {choices.replace('|', ', ')}", f"commonsense:{name}",
                     "commonsense", "complete", choice_prompt,
                     partial(choice_gold, choices=choices), extract=first_of(choices),
                     new_tokens=32, bos="always")


ANSWERS = "answer1|answer2|answer3|answer4|answer5"


# Three new lines before "### Instruction:", and a tab for four spaces: the prompts of PiSSA's data,
# which the official code takes.
CODE_PROMPT = data.PROMPT.replace("\n\n###", "\n\n\n###", 1)


def humaneval_prompt(row: data.Row) -> str:
    asked = "Create a Python script for this problem:\n" + row.get(["prompt"])
    return CODE_PROMPT.format(instruction=asked.replace("    ", "\t"))


def humaneval_gold(row: data.Row) -> dict:
    return {"task_id": row.get(["task_id"]), "before": row.get(["prompt"]),
            "tests": f"{row.get(['test'])}\ncheck({row.get(['entry_point'])})"}


def assertions(row: data.Row) -> list[str]:
    found = row.get(["test_list"], list)
    if not all(isinstance(text, str) and text.encode(errors="replace").decode() == text
               for text in found):
        raise UserError(f"{row.where}: the tests {str(found)[:60]} are not all texts")
    return found


def mbpp_prompt(row: data.Row) -> str:
    """The first assertion is shown, for it names the function."""
    said = row.get(["prompt"])
    asked = (f"{said}{'' if said.endswith('.') else '.'} Your code should satisfy the following "
             f"assertion:\n```python\n{assertions(row)[0]}\n```")
    return CODE_PROMPT.format(instruction=asked.replace("    ", "\t"))


def mbpp_gold(row: data.Row) -> dict:
    imports = row.get(["test_imports"], list, may_be_empty=True)
    return {"task_id": f"Mbpp/{row.get(['task_id'], int)}", "before": "",
            "tests": "\n".join([*map(str, imports), *assertions(row)])}


# Of the 427 sanitized tasks those without a place in MBPP+ 0.2.0, whose 378 the paper's scores fit:
# broken or ambiguous by EvalPlus' reading.
MBPP_DROPPED = {
    83, 115, 117, 143, 163, 164, 228, 229, 246, 248, 249, 291, 295, 304, 307, 393, 396, 399, 400,
    401, 407, 408, 411, 417, 431, 434, 438, 442, 443, 444, 452, 461, 464, 574, 582, 584, 595, 617,
    625, 627, 640, 738, 746, 747, 756, 776, 779, 783, 802,
}


def in_mbpp_plus(row: data.Row) -> bool:
    return row.get(["task_id"], int) not in MBPP_DROPPED


CODE = Benchmark("", "", "code", "complete", humaneval_prompt, humaneval_gold,
                 extract=python_code, new_tokens=1024, bos="always", program=with_tests)


def glue(task: str, about: str, split: str = "validation",
         metric: Callable[[list[dict]], float] = accuracy) -> Benchmark:
    """A validation set of GLUE, for the test sets have no public labels."""
    row = data.TASKS[f"glue:{task}"]
    return Benchmark(about, f"glue:{task}/{split}", row.group, "classify",
                     partial(data.texts_of, task=row), partial(data.label_of, classes=row.classes),
                     metric=metric)


STOPS = ("Instruction:", "Instruction", "Response:", "Response")  # the official code's, for both

BENCHMARKS = {
    "gsm8k": Benchmark(
        "the training prompt, step by step; the number after the last \"The answer is: \"",
        "gsm8k-test", "math", "complete", gsm8k_prompt, gsm8k_gold, gsm8k_strict, gsm8k_official,
        number_after_marker, 1024, STOPS, bos="always", loss_under="math"),
    "math": Benchmark(
        "the same prompt; the normal form of what follows the last \"The answer is: \"",
        "math-test", "math", "complete", math_prompt, math_gold, math_strict, math_official,
        math_answer, 2048, STOPS, bos="always"),
    "ifeval": Benchmark(
        "greedy, the prompt as it is; prompts (P) and instructions (I) followed, strictly (S) and "
        "loosely (L)", "ifeval", "instruction", "complete", ifeval_prompt, ifeval_gold,
        ifeval_verdicts, new_tokens=1280, columns=("P-S", "P-L", "I-S", "I-L"),
        prepare=lm_eval_checkers),
    "triviaqa": Benchmark(
        "greedy up to a new line, full stop or comma; exact match with any alias (lm_eval)",
        "triviaqa", "world knowledge", "complete", triviaqa_prompt, aliases,
        partial(exact_match, articles=False), stops=("\n", ".", ",")),
    "nq_open": Benchmark(
        "greedy up to a new line, full stop or comma; exact match with any answer (lm_eval)",
        "nq_open", "world knowledge", "complete", nq_prompt, answers, exact_match,
        stops=("\n", ".", ",")),
    "webqs": Benchmark(
        "every token of some answer is the model's first choice (lm_eval)",
        "webqs", "world knowledge", "greedy_match", webqs_prompt,
        lambda row: without_extensions(answers(row))),
    "humaneval": CODE._replace(
        about="greedy; programs that pass the tests, by --allow-code-execution",
        source="humaneval"),
    "mbpp": CODE._replace(
        about="the 378 tasks of MBPP+ with MBPP's own tests, by --allow-code-execution",
        source="mbpp", prompt=mbpp_prompt, gold=mbpp_gold, keep=in_mbpp_plus),
    "word_problems": Benchmark(
        "greedy; what follows \"The answer is: \", to the letter",
        "microcosm-test", "microcosm", "complete", word_problem_prompt, word_problem_gold,
        extract=number_after_marker, new_tokens=28, bos="always", loss_under="microcosm"),
    "city": FACT._replace(source="city"),
    "job": FACT._replace(source="job"),
    "year": FACT._replace(source="year"),
    "boolq": multiple_choice("boolq", "true|false"),
    "piqa": multiple_choice("piqa", "solution1|solution2"),
    "siqa": multiple_choice("social_i_qa", ANSWERS),
    "hellaswag": multiple_choice("hellaswag", "ending1|ending2|ending3|ending4"),
    "winogrande": multiple_choice("winogrande", "option1|option2"),
    "arc_e": multiple_choice("ARC-Easy", ANSWERS),
    "arc_c": multiple_choice("ARC-Challenge", ANSWERS),
    "obqa": multiple_choice("openbookqa", ANSWERS),
    # Table 3: accuracy, but for CoLA and STS-B.
    "cola": glue("cola", "Matthews' correlation", metric=matthews),
    "sst2": glue("sst2", "accuracy"),
    "mrpc": glue("mrpc", "accuracy"),
    "stsb": glue("stsb", "Pearson's correlation", metric=pearson),
    "qqp": glue("qqp", "accuracy"),
    "mnli": glue("mnli", "accuracy, matched genres", "validation_matched"),
    "mnli-mm": glue("mnli", "accuracy, mismatched genres", "validation_mismatched"),
    "qnli": glue("qnli", "accuracy"),
    "rte": glue("rte", "accuracy"),
}


# By --suite: the benchmarks of a group, which is called by its last word.
SUITES: dict[str, list[str]] = {}
for _name, _row in BENCHMARKS.items():
    SUITES.setdefault(_row.group.rpartition(" ")[2], []).append(_name)


def kept(name: str, rows: list[data.Row]) -> list[data.Row]:
    """The rows of its source that a benchmark asks."""
    keep = BENCHMARKS[name].keep
    found = [row for row in rows if keep(row)] if keep else rows
    if not found:
        raise UserError(f"{name}: none of the {len(rows)} rows belongs to it")
    return found


class Question(NamedTuple):
    """One question of a benchmark, as the model is asked it."""

    prompt: Any  # a text; a classifier's: its one or two texts
    gold: Any
    part: str | None = None  # of the benchmark


def questions(name: str, rows: list[data.Row]) -> list[Question]:
    """The rows of a benchmark as questions; UserError for a row that cannot be one."""
    row = BENCHMARKS[name]
    return [Question(row.prompt(r), row.gold(r), row.part(r) if row.part else None) for r in rows]


def of_group(names: Iterable[str], group: str) -> list[str]:
    """Those of the named benchmarks that measure the same thing."""
    return [name for name in names if BENCHMARKS[name].group == group]


def columns_of(name: str) -> tuple[str, ...]:
    """The names of a benchmark's scores: of most its own alone."""
    return BENCHMARKS[name].columns or (name,)


def of_task(task: str) -> list[str]:
    """The benchmarks of a task: those behind T, then those behind K."""
    groups = data.TASKS[task].group, data.TASKS[task].knowledge
    return [name for group in groups for name in of_group(BENCHMARKS, group)]
