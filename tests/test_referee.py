"""benchmarks.py and eval.py against lm_eval itself, question by question: prompts, what is cut at a
stop, scores. `make test-referee` sets up the environment that this takes; skipped elsewhere.

lm_eval's own tasks are asked, of rows put in place of its downloads, through its own HFLM. The rows
are real ones, and the model a real one, too, where FARSS_REAL_DATA and FARSS_REAL_MODEL name them.
"""

import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")
import datasets
import lm_eval
import nltk
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import byte_tokenizer, write_checkpoint

import benchmarks as B
import checkpoint as C
import data
import eval as E
import model as M
import results as R

REAL = os.environ.get("FARSS_REAL_MODEL")
DATA = Path(os.environ.get("FARSS_REAL_DATA")
            or Path(__file__).resolve().parent.parent.parent / "shared" / "data")
FILES = {"nq_open": "nq_open_dev.jsonl", "webqs": "webqs_test.json", "ifeval": "ifeval.jsonl"}
SPLITS = {"ifeval": "train", "webqs": "test", "nq_open": "validation", "triviaqa": "validation"}

OWN = {
    "triviaqa": [{"question": "Which band sang Help!?", "answer": {"aliases": [
                     "The Beatles", "Fab Four"], "value": "The Beatles"}},
                 {"question": "Where does the Arch stand?", "answer": {"aliases": [
                     "St. Louis", "Saint Louis", "a"], "value": "St. Louis"}},
                 {"question": "Who wrote “Straße”?", "answer": {"aliases": [
                     "Ærøskøbing", "O'Neill", "THE END"], "value": "x"}}],
    "nq_open": [{"question": "who sang help", "answer": ["The Beatles", "a band"]},
                {"question": "where is the arch", "answer": ["St. Louis", "the city of St Louis"]},
                {"question": "what ends it", "answer": ["THE END", "an end", "Ærøskøbing"]}],
    "webqs": [{"question": "what do jamaicans speak?", "answers": [
                  "Patois", "Jamaican English", "Jamaican"]},
              {"question": "who was in office?", "answers": ["Al Gore", "Al", "Alabama", "é"]}],
    "ifeval": [{"key": i, "prompt": f"Write {i} lines.", "instruction_id_list": names,
                "kwargs": [{} for _ in names]}
               for i, names in enumerate((
                   ["punctuation:no_comma"], ["change_case:english_lowercase"],
                   ["punctuation:no_comma", "startend:quotation"],
                   ["detectable_format:title", "detectable_format:json_format"]))],
}
# What a model may say; most are right for some row under some rule.
AWKWARD = [
    "", " ", "\n", "\nThe Beatles", ".St. Louis", ", The Beatles", " The Beatles", "the beatles",
    " THE beatles", " beatles ", " The Beatles ", " a Beatles", "Beatles, The", " An end",
    " the THE END", " THE END", "the end", " St. Louis", " Saint Louis!", " saint-louis",
    " city of St Louis", " ÆRØSKØBING", "ærøskøbing\n", " O'Neill", " oneill", " O’Neill", "a",
    " a", " the ", "The The Beatles", "\tThe Beatles", "\u3000The Beatles", '"no comma"',
    '<<Title>>\n{"a": 1}', '{"a": 1}', "* all lower *", "First\nall lower\nLAST", "one, two",
    "日本語", "🙂 The Beatles"]


@pytest.fixture(autouse=True, scope="module")
def no_download():
    """lm_eval fetches the sentence splitter anew when it is imported; the environment has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_: True)
        import lm_eval.tasks.ifeval.utils
        B.lm_eval_checkers.cache_clear()
        assert B.lm_eval_checkers() is lm_eval.tasks.ifeval.utils.process_results  # and seeded
        yield


def rows_of(name, count):
    """count rows (None: all) of a benchmark's real file as the hub has them, else our own."""
    file = DATA / FILES.get(name, "none")
    if not file.exists():
        return OWN[name]
    rows = [row.fields for row in data.read_rows(str(file))]
    if name == "webqs":
        rows = [{"question": r.get("question") or r["qText"], "answers": r["answers"]}
                for r in rows]
    return rows[:: len(rows) // count][:count] if count else rows


TASKS = TaskManager()


def refereed(lm, name, rows, limit):
    """lm_eval's samples: one a row, in order."""
    config = lm_eval.utils.load_yaml_config(TASKS.task_index[name]["yaml_path"])
    if name == "ifeval":  # its kwargs differ by row, and a table would fill them all up with None
        rows = [r | {"kwargs": [{k: v for k, v in kw.items() if v} for kw in r["kwargs"]]}
                for r in rows]
    table = datasets.DatasetDict({split: datasets.Dataset.from_list(json.loads(json.dumps(rows)))
                                  for split in ("train", "validation", "test")})
    task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: table,
                                             "dataset_path": "here"})
    found = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, verbosity="ERROR",
                                    gen_kwargs=f"max_gen_toks={limit}" if limit else None)
    samples = sorted(found["samples"][name], key=lambda s: s["doc_id"])
    assert len(samples) == len(rows)
    return samples, found["results"][name]


def compare(evaluator, name, rows, samples, totals):
    """Prompt, output and score of every question, and the scores of the benchmark."""
    asked = B.questions(name, [data.Row(r, f"row {i}") for i, r in enumerate(rows)])
    records = evaluator.ask(name, asked)
    for q, record, sample in zip(asked, records, samples, strict=True):
        arguments = sample["arguments"]
        if name == "webqs":
            assert [a[0] for a in arguments] == [q.prompt] * len(q.gold)
            assert [a[1] for a in arguments] == [f" {gold}" for gold in q.gold]
            greedy = [answer for answer, (resp,) in zip(q.gold, sample["resps"], strict=True)
                      if resp[1]]
            assert sorted(record["matched"]) == greedy
        else:
            assert [a[0] for a in arguments] == [record["prompt"]]
            assert sample["resps"] == [[record["output"]]]
        if B.BENCHMARKS[name].columns:
            assert record["correct"] == {
                "P-S": [sample["prompt_level_strict_acc"]],
                "P-L": [sample["prompt_level_loose_acc"]],
                "I-S": sample["inst_level_strict_acc"], "I-L": sample["inst_level_loose_acc"]}
        else:
            assert record["correct"] == bool(sample["exact_match"]), (record, sample["target"])
    if B.BENCHMARKS[name].columns:
        theirs = [totals[f"{level}_level_{how}_acc,none"] for level in ("prompt", "inst")
                  for how in ("strict", "loose")]
        ours = list(R.column_scores(name, records).values())
    else:
        (theirs,) = ([v] for k, v in totals.items() if k.startswith("exact_match,"))
        ours = [R.score_of(name, records)]
    assert ours == pytest.approx([100 * score for score in theirs])
    return records


def beside(folder, batch_size=4):
    """Our evaluator and lm_eval's model of one folder."""
    model = C.load(folder, torch.float32, "cpu")
    return SimpleNamespace(
        ours=E.Evaluator(model, C.Tokenizer(folder, model.config), batch_size),
        theirs=HFLM(str(folder), dtype="float32", device="cpu", batch_size=batch_size))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama whose favourite tokens are letters."""
    folder = write_checkpoint(tmp_path_factory.mktemp("referee") / "m", seed=3)
    return beside(folder)


@pytest.mark.parametrize("name", SPLITS)
def test_a_random_model_scores_the_same(tiny, name):
    """WebQuestions gets what the model says as an answer in every second row, so that both verdicts
    occur."""
    rows = rows_of(name, 24)
    if name == "webqs":
        tokenizer = tiny.ours.tokenizer
        for row in rows[::2]:
            ids = tokenizer.encode(f"Question: {row['question']}\nAnswer: ", False)
            said = tokenizer.decode(M.generate(tiny.ours.model, [ids], 3)[0])
            row["answers"] = [*row["answers"], said.encode(errors="ignore").decode() or "x"]
    tiny.ours.max_new_tokens = 12
    records = compare(tiny.ours, name, rows, *refereed(
        tiny.theirs, name, rows, None if name == "webqs" else 12))
    if name == "ifeval":
        assert len({str(r["correct"]) for r in records}) > 1


@pytest.mark.parametrize("name", [n for n in SPLITS if n != "webqs"])
def test_awkward_outputs_score_the_same(tiny, name, monkeypatch):
    """Both models say what a script says, to every row of our own; HFLM cuts, lm_eval filters and
    judges."""
    rows = [row for row in OWN[name] for _ in AWKWARD]
    if name == "ifeval":
        rows = [row | {"key": i} for i, row in enumerate(rows)]
    script = AWKWARD * len(OWN[name])
    hf, encode = tiny.theirs, byte_tokenizer().encode
    said = [encode(text).ids[1:] for text in script]
    monkeypatch.setattr(M, "generate", lambda *_: said)
    turns = {}

    def generate(context, max_length, stop, **_):
        """In the order of the requests with this prompt, which HFLM sorts stably by length."""
        out = []
        for ids in context.tolist():
            turn = turns[tuple(ids)] = turns.get(tuple(ids), -1) + 1
            prompt = hf.tokenizer.decode(ids, skip_special_tokens=True)
            mine = [s for s, r in zip(said, rows, strict=True)
                    if prompt == B.questions(name, [data.Row(r, "x")])[0].prompt]
            out.append([*ids, *mine[turn]])
        longest = max(map(len, out))
        return torch.tensor([o + [257] * (longest - len(o)) for o in out])

    monkeypatch.setattr(hf, "_model_generate", generate)
    monkeypatch.setattr(hf, "batch_size_per_gpu", 1)
    records = compare(tiny.ours, name, rows, *refereed(hf, name, rows, 12))
    verdicts = [str(r["correct"]) for r in records]
    assert len(set(verdicts)) > 1 and sum(map(bool, (r["output"] for r in records))) > 20


def test_each_prompt_of_ifeval_is_judged_by_lm_evals_checkers():
    """Four canned answers to each of them, through our row and through lm_eval's own document."""
    from lm_eval.tasks.ifeval.utils import process_results

    verdicts = set()
    rows = rows_of("ifeval", None)
    for row in rows:
        (q,) = B.questions("ifeval", [data.Row(row, "x")])
        doc = row | {"kwargs": [{k: v for k, v in kw.items() if v} for kw in row["kwargs"]]}
        for output in ("", row["prompt"], '"ONE TWO THREE FOUR"', "* <<Title>> lower.\n\n" * 9):
            random.seed(0)
            theirs = process_results(doc, [output])
            ours = B.ifeval_verdicts(output, q.gold)
            assert ours == {"P-S": [theirs["prompt_level_strict_acc"]],
                            "P-L": [theirs["prompt_level_loose_acc"]],
                            "I-S": theirs["inst_level_strict_acc"],
                            "I-L": theirs["inst_level_loose_acc"]}
            verdicts |= {(name, passed) for name, passed in zip(
                row["instruction_id_list"], ours["I-S"], strict=True)}
    if len(rows) > len(OWN["ifeval"]):
        assert len(rows) == 541 and len({name for name, _ in verdicts}) == 25


@pytest.mark.skipif(not REAL, reason="FARSS_REAL_MODEL names no folder")
@pytest.mark.parametrize("name", SPLITS)
def test_a_real_model_scores_the_same(real, name):
    rows = rows_of(name, 24)
    real.ours.max_new_tokens = 12
    compare(real.ours, name, rows, *refereed(real.theirs, name, rows,
                                             None if name == "webqs" else 12))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Written as transformers 4 reads it: the folder may be of transformers 5."""
    folder, config = tmp_path_factory.mktemp("real"), C.read_config(REAL)
    C.save(C.load(REAL, torch.float32, "cpu"), folder)
    tokenizer = C.Tokenizer(REAL, config)
    shutil.copy(Path(REAL) / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.hf.id_to_token(tokenizer.eos_id)}))
    return beside(folder, 8)
