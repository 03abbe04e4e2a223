"""Where each dataset comes from, the prompt, tokenising with a response mask, batching.

A file is .json (one array), .jsonl, either of them gzipped, .tsv, or .parquet. A language task
trains on rows with a question and an answer (LAYOUTS); a classifier's task, GLUE's, on one or two
texts and a label.
"""

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import MICROCOSM, Tokenizer, UserError, hub_download
from model import IGNORE

# The prompt of the official code.
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
# LLM-Adapters' for Commonsense170K, in training and in testing: they stand 16 spaces in, and differ
# in white space. Further lines of an instruction are left where they are.
COMMONSENSE_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.  \n\n"
    "{S}### Instruction:\n{S}{instruction}\n{S}\n{S}### Response:\n{S}"
).replace("{S}", " " * 16)
COMMONSENSE_TEST_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request. \n\n"
    "{S}### Instruction:\n{S}{instruction}\n\n{S}### Response:\n{S}"
).replace("{S}", " " * 16)


class Source(NamedTuple):
    """Where a dataset lies."""

    place: str | Path  # hub dataset, folder here, or https address: of what is not on the hub
    file: str
    licence: str
    rows: int | None = None  # as published, where local copies are known to differ
    subsets: tuple[str, ...] = ()  # of several files, what stands for * in `file`
    local: str = ""  # in a folder: the file's name without ending, if not that of its split


LLM_ADAPTERS = "https://github.com/AGI-Edgerunners/LLM-Adapters"
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra",
            "number_theory", "prealgebra", "precalculus")

SOURCES = {
    "metamath": Source("meta-math/MetaMathQA", "MetaMathQA-395K.json", "MIT"),
    "wizardlm": Source("YeungNLP/WizardLM_evol_instruct_V2_143k",
                       "WizardLM_evol_instruct_V2_143k.jsonl", "not stated"),
    "commonsense170k": Source(LLM_ADAPTERS, "ft-training_set/commonsense_170k.json", "ODC-By",
                              170420),
    "gsm8k": Source("openai/gsm8k", "main/train-00000-of-00001.parquet", "MIT"),
    "gsm8k-test": Source("openai/gsm8k", "main/test-00000-of-00001.parquet", "MIT"),
    "math-test": Source("EleutherAI/hendrycks_math", "*/test-00000-of-00001.parquet", "MIT", 5000,
                        SUBJECTS, "MATH_test"),
    "ifeval": Source("google/IFEval", "ifeval_input_data.jsonl", "Apache-2.0", 541),
    "triviaqa": Source("mandarjoshi/trivia_qa", "rc.nocontext/validation-00000-of-00001.parquet",
                       "not stated", 17944),
    "nq_open": Source("google-research-datasets/nq_open",
                      "nq_open/validation-00000-of-00001.parquet", "CC BY-SA 3.0"),
    "nq-open": Source("google-research-datasets/nq_open",
                      "nq_open/train-00000-of-00001.parquet", "CC BY-SA 3.0"),
    "webqs": Source("stanfordnlp/web_questions", "data/test-00000-of-00001.parquet", "CC BY 4.0"),
    "codefeedback": Source("m-a-p/CodeFeedback-Filtered-Instruction",
                           "CodeFeedback-Filtered-Instruction.jsonl", "Apache-2.0"),
    "humaneval": Source("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet",
                        "MIT"),
    # The 378 tasks that EvalPlus scores, with MBPP's own assertions beside EvalPlus' more.
    "mbpp": Source("evalplus/mbppplus", "data/test-00000-of-00001-d5781c9c51e02795.parquet",
                   "Apache-2.0"),
    "microcosm": Source(MICROCOSM, "train.jsonl", "MIT"),
    "microcosm-test": Source(MICROCOSM, "test.jsonl", "MIT"),
    "city": Source(MICROCOSM, "city.jsonl", "MIT"),
    "job": Source(MICROCOSM, "job.jsonl", "MIT"),
    "year": Source(MICROCOSM, "year.jsonl", "MIT"),
}
# The test sets of Commonsense170K's parts, as LLM-Adapters put them.
COMMONSENSE = {"boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "hellaswag": 10042,
               "winogrande": 1267, "ARC-Easy": 2376, "ARC-Challenge": 1172, "openbookqa": 500}
SOURCES |= {f"commonsense:{name}": Source(LLM_ADAPTERS, f"dataset/{name}/test.json", "ODC-By",
                                          rows, local=f"{name}/test")
            for name, rows in COMMONSENSE.items()}
# GLUE: the published rows of each split (A.4.1; without WNLI, as in Table 3).
GLUE = {
    "cola": {"train": 8551, "validation": 1043},
    "sst2": {"train": 67349, "validation": 872},
    "mrpc": {"train": 3668, "validation": 408},
    "stsb": {"train": 5749, "validation": 1500},
    "qqp": {"train": 363846, "validation": 40430},
    "mnli": {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832},
    "qnli": {"train": 104743, "validation": 5463},
    "rte": {"train": 2490, "validation": 277},
}
SOURCES |= {f"glue:{task}/{split}": Source(
                "nyu-mll/glue", f"{task}/{split}-00000-of-00001.parquet", "of its source", rows)
            for task, splits in GLUE.items() for split, rows in splits.items()}


class Task(NamedTuple):
    """What a task trains on unless told otherwise, and what measures it (benchmarks.py).

    With `classes` it is a classifier's, which reads texts and predicts a label; else a language
    model's, whose loss is on the response.
    """

    source: str  # of SOURCES
    prompt: str  # with {instruction}; the response follows with no space, then EOS
    group: str  # the benchmarks behind T (Eq. 37)
    knowledge: str = "world knowledge"  # the benchmarks behind K (Eq. 36)
    about: str = ""  # for --help
    reply: Callable[[str], str] = str  # the response as it is trained on
    texts: tuple[tuple[str, ...], ...] = ()  # of each text the names that its column may have
    classes: tuple[str, ...] = ()  # by number; a single one: a number is predicted


def glue(name: str, texts: tuple[tuple[str, ...], ...], classes: tuple[str, ...], about: str
         ) -> Task:
    return Task(f"glue:{name}/train", "", f"glue:{name}", "", about, texts=texts, classes=classes)


def metamath_answer(answer: str) -> str:
    """A GSM8K answer as MetaMathQA writes it: without <<calculator>> marks, ending in
    "The answer is: N", the line that the paper's scoring looks for. Others pass unchanged.
    """
    found = re.search(r"\n#### (.+)\s*$", answer)
    if not found:
        return answer
    return re.sub(r"<<.*?>>", "", answer).rstrip() + f"\nThe answer is: {found[1].strip()}"


SENTENCES = (("sentence1", "#1 String"), ("sentence2", "#2 String"))  # TSV names last
ENTAILMENT = ("entailment", "not_entailment")
LABEL = ("label", "gold_label", "Quality", "is_duplicate", "score")  # columns
COLA = ("source", "label", "star", "sentence")  # the one TSV file without a header

TASKS = {
    "math": Task("metamath", PROMPT, "math", about="MetaMathQA", reply=metamath_answer),
    "code": Task("codefeedback", PROMPT, "code", about="CodeFeedback"),
    "instruction": Task("wizardlm", PROMPT, "instruction", about="WizardLM-Evol-Instruct"),
    # Table 4 has no knowledge benchmarks.
    "commonsense": Task("commonsense170k", COMMONSENSE_PROMPT, "commonsense", "",
                        "Commonsense170K"),
    # The frame of the model's own pretraining: under PROMPT it copies numbers at chance at first,
    # and the task would measure that instead of what was learnt.
    "microcosm": Task("microcosm", "Q:{instruction}\nA:", "microcosm", "microcosm facts",
                      "its word problems"),
    "glue:cola": glue("cola", (("sentence",),), ("unacceptable", "acceptable"), "grammar"),
    "glue:sst2": glue("sst2", (("sentence",),), ("negative", "positive"), "sentiment"),
    "glue:mrpc": glue("mrpc", SENTENCES, ("not_equivalent", "equivalent"), "paraphrase"),
    "glue:stsb": glue("stsb", SENTENCES, ("similarity",), "similarity, 0 to 5"),
    "glue:qqp": glue("qqp", (("question1",), ("question2",)), ("not_duplicate", "duplicate"),
                     "paraphrase of questions"),
    "glue:mnli": glue("mnli", (("premise", "sentence1"), ("hypothesis", "sentence2")),
                      ("entailment", "neutral", "contradiction"), "inference"),
    "glue:qnli": glue("qnli", (("question",), ("sentence",)), ENTAILMENT, "is it answered?"),
    "glue:rte": glue("rte", SENTENCES, ENTAILMENT, "inference"),
}

QUESTION = ("query", "question", "instruction", "qText", "problem")
ANSWER = ("response", "answer", "output", "answers")


class Row(NamedTuple):
    """One line of a dataset: its fields, and where it stands (`file:line`) for messages."""

    fields: dict
    where: str

    def get(self, names: Sequence[str], kind: type | tuple[type, ...] = str,
            may_be_empty: bool = False):
        """The first of the fields `names` that is there, which must be of type `kind`."""
        for name in names:
            if name in self.fields:
                value = self.fields[name]
                if not isinstance(value, kind) or not (value or may_be_empty):
                    raise UserError(f"{self.where}: field {name!r} is {str(value)[:40]!a}, "
                                    "which cannot be used")
                if isinstance(value, str) and not value.isascii():
                    try:
                        value.encode()
                    except UnicodeEncodeError:  # half of a UTF-16 pair, which JSON lets through
                        raise UserError(f"{self.where}: field {name!r} holds a broken character: "
                                        f"{ascii(value)[:40]}") from None
                return value
        raise UserError(f"{self.where}: no field {' / '.join(map(repr, names))}; there are "
                        + ", ".join(map(repr, list(self.fields)[:8])))


# ---------------------------------------------------------------------------------------- files


def read_rows(name_or_path: str, source: str | None = None) -> list[Row]:
    """All rows of a dataset of SOURCES (by download), of a local file, or of that file of a local
    folder which stands for `source`.

    Raises UserError for an unknown name, a missing, unreadable or empty file; a malformed line
    is named by file and line number. Says so where the published dataset has another length.
    """
    if Path(name_or_path).is_dir() and source:
        paths = [in_folder(Path(name_or_path), source)]
    elif name_or_path in SOURCES and not Path(name_or_path).is_file():
        source, paths = name_or_path, published(name_or_path)
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise UserError(f"{path}: no such file, and not one of the datasets "
                            + ", ".join(SOURCES))
        paths = [path]
    rows = [row for path in paths for row in read_file(path)]
    if not rows:
        raise UserError(f"{paths[0]}: holds no rows")
    count = SOURCES[source].rows if source in SOURCES else None
    if count not in (None, len(rows)):
        print(f"note: {paths[0]} has {len(rows):,} rows, and {source} as published {count:,}")
    return rows


def published(name: str) -> list[Path]:
    """The files of a dataset of SOURCES: those here, or downloaded from the hub."""
    place, file, _, _, subsets, _ = SOURCES[name]
    if isinstance(place, Path):
        return [place / file]
    if place.startswith("https:"):
        raise UserError(f"{name} is not on the hub; get {file} of {place} and name it, or the "
                        "folder that holds it, with --data")
    return [hub_download(place, file.replace("*", subset), repo_type="dataset")
            for subset in subsets or ("",)]


ENDINGS = (".tsv", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


def in_folder(folder: Path, source: str) -> Path:
    """The file of a folder that stands for a dataset: by its name on the hub, or its split's
    (train, validation or, as in the original TSV files, dev) with any ending; what a task trains on
    may be called train, whatever the hub calls it; one of several test sets has a name of its own.
    """
    row = SOURCES[source]
    file = row.local + Path(row.file).suffix if row.local else Path(row.file).name
    split = row.local or file.partition("-")[0]
    stems = [split, split if row.local else split.replace("validation", "dev")]
    stems += ["train"] * (source in {task.source for task in TASKS.values()})
    names = [file, *(stem + end for stem in dict.fromkeys(stems) for end in ENDINGS)]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: holds no {split} file: {file}, or {names[-len(ENDINGS)]}, or "
                        "the like")
    return found[0]


def stands_in(folder: Path, source: str) -> bool:
    """Whether a folder may be asked for a dataset: always for one by the name of its split, for one
    of several test sets where its file is there."""
    row = SOURCES[source]
    return not row.local or any((folder / (row.local + end)).is_file() for end in ENDINGS)


def is_local(name_or_path: str) -> bool:
    """Whether reading the rows needs no download."""
    source = SOURCES.get(name_or_path)
    return Path(name_or_path).exists() or (source is not None and isinstance(source.place, Path))


def read_file(path: Path) -> Iterator[Row]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from read_parquet(path)
        return
    if name.endswith(".tsv"):
        yield from read_tsv(path)
        return
    if not name.endswith((".json", ".jsonl")):
        raise UserError(f"{path}: not a .json, .jsonl, .tsv, .parquet or .gz of the first two")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            if name.endswith(".jsonl"):
                numbered = ((i, line) for i, line in enumerate(file, 1) if line.strip())
                yield from (parse_line(line, f"{path}:{i}") for i, line in numbered)
                return
            rows = json.load(file)
    except UserError:  # a line of the file, named already
        raise
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a {type(rows).__name__}, not an array of rows")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {i} is a {type(row).__name__}, not an object")
        yield Row(row, f"{path}: row {i}")


def parse_line(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a depth of 100,000
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object")
    return Row(row, where)


def read_tsv(path: Path) -> Iterator[Row]:
    """GLUE's original files: a quote character is text, and only \\n ends a line.

    Lines with another number of columns than the header are broken; they are left out, and how
    many is said.
    """
    broken = []
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            lines = ((i, line.rstrip("\r\n").split("\t")) for i, line in enumerate(file, 1))
            first = next(lines, (1, [""]))
            headless = first[1][1:2] in (["0"], ["1"])
            header = list(COLA) if headless else first[1]
            for i, cells in chain([first] if headless else [], lines):
                if len(cells) == len(header):
                    yield Row(dict(zip(header, cells, strict=True)), f"{path}:{i}")
                elif cells != [""]:
                    broken.append(i)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    if broken:
        print(f"{path}: {len(broken)} lines have not {len(header)} columns and are left out, the "
              f"first of them line {broken[0]}")


def read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: this dataset is published as parquet; run "
                        "`pip install pyarrow`") from None
    try:
        table = pyarrow.parquet.read_table(path)
        # Times are no text to train on, and Python cannot hold all of them.
        rows = table.select([f.name for f in table.schema
                             if not pyarrow.types.is_temporal(f.type)]).to_pylist()
    except (OSError, ValueError, ImportError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not readable as parquet ({error})") from None
    for i, row in enumerate(rows, 1):
        yield Row(row, f"{path}: row {i}")


# ------------------------------------------------------------------------------ training examples


class Example(NamedTuple):
    """Token ids of prompt + response + EOS, and how many of them are the prompt; or those of a
    classifier's texts, all of them prompt, and the label."""

    ids: list[int]
    prompt_length: int
    label: int | float | None = None

    @property
    def targets(self) -> int:
        """What the loss is a mean over: response tokens, but one at the very start; or 1 label."""
        return len(self.ids) - max(1, self.prompt_length) if self.label is None else 1


# Layouts of training rows: question and response. The first whose columns a row has is used;
# `answer` beside `output` is the bare result of the worked solution.
LAYOUTS = [
    ("query", "response"),  # MetaMathQA
    ("query", "answer"),  # CodeFeedback
    ("instruction", "output"),  # Alpaca, Commonsense170K
    ("instruction", "response"),
    ("question", "response"),
    ("question", "answer"),  # GSM8K
    ("conversation.human", "conversation.assistant"),  # WizardLM-Evol-Instruct
]
CONTEXT = ("input", "context")  # beside any question: belongs to it
DROPPED = ("system", "history", "passage", "choices", "options")  # belongs to it, too, but where?


def layout(row: Row) -> tuple[str, str]:
    """The columns of a training row; UserError where none of the layouts fits, and where a column
    with content would be left out."""
    for name in DROPPED:
        if row.fields.get(name):
            raise UserError(f"{row.where}: field {name!r} has content, and no place in the prompt; "
                            "put it into the question, or empty it")
    for question, response in LAYOUTS:
        if question in row.fields and response in row.fields:
            return question, response
    raise UserError(f"{row.where}: no " + " or ".join(
        f"{question!r} with {response!r}" for question, response in LAYOUTS) + "; there are "
        + ", ".join(map(repr, list(row.fields)[:8])))


def one_turn(row: Row) -> Row:
    """A row with a `conversation`, as WizardLM's, as one with that of its only turn; others pass
    unchanged. UserError for more turns, of which the official code takes the first."""
    if "conversation" not in row.fields:
        return row
    turns = row.get(["conversation"], list)
    if len(turns) > 1 or not isinstance(turns[0], dict):
        raise UserError(f"{row.where}: field 'conversation' is not a single question and answer")
    return row._replace(fields=row.fields | {f"conversation.{k}": v for k, v in turns[0].items()})


def asked(row: Row, names: Sequence[str] = QUESTION) -> str:
    """The question of a row and, in a line below, what belongs to it (Alpaca's `input`)."""
    context = [name for name in CONTEXT if row.fields.get(name)]
    return "\n".join([row.get(names), *(row.get([name]) for name in context)])


def question_and_response(row: Row, task: Task = TASKS["math"]) -> tuple[str, str]:
    """What is asked, and the response as the task trains on it."""
    row = one_turn(row)
    question, response = layout(row)
    return asked(row, [question]), task.reply(row.get([response]))


def tokenise(tokenizer: Tokenizer, question: str, response: str, max_length: int,
             prompt: str = PROMPT) -> Example | None:
    """The training sequence, cut after max_length tokens; None if no response token is left.

    The prompt's length is that of the prompt tokenised alone, as in the official code.
    """
    asked = prompt.format(instruction=question)
    ids = [*tokenizer.encode(asked + response), tokenizer.eos_id][:max_length]
    length = len(tokenizer.encode(asked))
    return Example(ids, length) if length < len(ids) else None


def label_of(row: Row, classes: tuple[str, ...]) -> int | float:
    """The label of a classifier's row: a number of `classes` or the name of one; a float where
    there is a single class. UserError for anything else, as the -1 of a test set."""
    value = row.get(LABEL, (str, int, float), may_be_empty=True)
    if len(classes) == 1:
        try:
            if math.isfinite(float(value)):
                return float(value)
        except (ValueError, OverflowError):  # a whole number of 400 digits
            pass
        raise UserError(f"{row.where}: the label {str(value)[:40]!a} is not a number")
    known = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    if str(value) not in known:
        raise UserError(f"{row.where}: the label {str(value)[:40]!a} is none of "
                        + ", ".join(known))
    return known[str(value)]


def texts_of(row: Row, task: Task) -> list[str]:
    """The one or two texts that a classifier reads; some of QQP's are empty."""
    return [row.get(names, may_be_empty=True) for names in task.texts]


def example_of(row: Row, tokenizer: Tokenizer, task: Task, max_length: int
               ) -> tuple[list, Example | None, bool]:
    """(what the row says, the training example, whether it was cut)."""
    if task.classes:
        texts, label = texts_of(row, task), label_of(row, task.classes)
        ids, cut = tokenizer.encode_texts(texts, max_length)
        return [*texts, label], Example(ids, len(ids), label), cut
    question, response = question_and_response(row, task)
    example = tokenise(tokenizer, question, response, max_length, task.prompt)
    return [question, response], example, (example is not None
                                           and example.ids[-1] != tokenizer.eos_id)


def columns(row: Row, task: Task) -> list[str]:
    """The columns of a row that the task uses."""
    if not task.classes:
        question, response = layout(row := one_turn(row))
        return [question, *(name for name in CONTEXT if row.fields.get(name)), response]
    return [next((n for n in names if n in row.fields), names[0])
            for names in (*task.texts, LABEL)]


def draw(n: int, k: int, seed: int) -> list[int]:
    """k of n indices without repetition, in random order, the same for the same seed."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].tolist()


def running_text(rows: list[Row], tokenizer: Tokenizer, count: int, max_length: int, seed: int
                 ) -> list[Example]:
    """The rows' questions as one text, and `count` pieces of it of max_length tokens from random
    places, every token of them labelled: CorDA's way to calibrate on NQ-Open, whose pieces have
    2,048 tokens."""
    text, letters = "\n\n".join(row.get(QUESTION) for row in rows), 10 * max_length
    draw_from = torch.Generator().manual_seed(seed)
    starts = torch.randint(max(1, len(text) - letters), (count,), generator=draw_from)
    return [Example(tokenizer.encode(text[i : i + letters])[:max_length], 1)
            for i in starts.tolist()]


def read_text(path: Path) -> str:
    """A file of text; UserError where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text ({error})") from None
    if not text.strip():
        raise UserError(f"{path}: is empty")
    return text


def pieces(text: str, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """A text cut into pieces of at most max_length tokens, BOS before each, every token of them
    labelled."""
    ids, step = tokenizer.encode(text, bos=False), max_length - len(tokenizer.prefix)
    cut = [tokenizer.prefix + ids[i : i + step] for i in range(0, len(ids), step)]
    return [Example(piece, 1) for piece in cut if len(piece) > 1]


@dataclass
class TrainingSet:
    examples: list[Example]
    rows: list[int]  # of each example, counted from 1
    dropped: int  # rows with no response token left after truncation
    cut: int  # rows that lost their end to it
    sha256: str  # of what the chosen rows say, so that a resumed run can tell


def training_set(rows: list[Row], tokenizer: Tokenizer, examples: int, max_length: int,
                 seed: int, task: Task = TASKS["math"]) -> TrainingSet:
    """`examples` rows chosen at random (all, if there are fewer), tokenised as the task says.

    Raises UserError if no row has a response token within max_length.
    """
    digest, kept, numbers, dropped, cut = hashlib.sha256(), [], [], 0, 0
    chosen = draw(len(rows), examples, seed)
    for i in tqdm(chosen, desc="tokenising", leave=False, disable=None, delay=2):
        said, example, shortened = example_of(rows[i], tokenizer, task, max_length)
        digest.update(json.dumps(said).encode())
        if example is None:
            dropped += 1
        else:
            kept.append(example)
            numbers.append(i + 1)
            cut += shortened
    if not kept:
        raise UserError(f"no row has a response token within {max_length} tokens; "
                        "raise --max-length")
    return TrainingSet(kept, numbers, dropped, cut, digest.hexdigest())


# ---------------------------------------------------------------------------------------- batches


def collate(examples: Sequence[Example], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """input_ids, attention_mask, labels (b, t), padded on the right; loss on the response only.

    A classifier's labels are (b,).
    """
    t = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), t, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i, (tokens, prompt_length, _) in enumerate(examples):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, prompt_length : len(tokens)] = torch.tensor(tokens[prompt_length:])
        mask[i, : len(tokens)] = 1
    if examples[0].label is not None:
        labels = torch.tensor([e.label for e in examples])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int,
                  window: int = 50) -> list[list[int]]:
    """Every index once, in random batches of examples of similar length.

    Shuffled, sorted by length within windows of `window` batches, cut into batches, and the
    batches shuffled again: padding is small and the order stays random. A function of its
    arguments alone, so a resumed run finds its place by the number of steps.
    """
    order = draw(len(lengths), len(lengths), seed * 1_000_003 + epoch)
    size = batch_size * window
    batches = []
    for start in range(0, len(order), size):
        near = sorted(order[start : start + size], key=lambda i: -lengths[i])
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    shuffled = draw(len(batches), len(batches), seed * 1_000_003 + epoch + 500_000)
    return [batches[i] for i in shuffled]


def batches_by_length(items: Iterable, length, batch_size: int) -> list[list]:
    """Lists of at most batch_size items, longest first, so that memory trouble shows at once."""
    ordered = sorted(items, key=length, reverse=True)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
