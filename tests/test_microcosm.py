"""microcosm/: the world is the one its seed says, the task is new, the model knows its facts."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint import Tokenizer, load, save
from data import PROMPT
from microcosm import make
from model import generate
from settings import run_main

MICROCOSM = Path(make.__file__).parent
DATA = {"city.jsonl", "job.jsonl", "year.jsonl", "train.jsonl", "test.jsonl",
        "tokenizer.json", "tokenizer_config.json"}


def read(name, folder=MICROCOSM):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def write_data(folder, seed=0):
    make.main(["--data-only", "--out", str(folder), "--seed", str(seed)])
    return folder


def quadruple(row):
    """(a, b, c, op) of a row of the task, as its answer has them."""
    a, b, _, op, c = re.match(r" (\d+) times (\d+) is (\d+)\. \3 (plus|minus) (\d+) is",
                              row["answer"]).groups()
    return int(a), int(b), int(c), op


def task_text(row):
    return f"Q:{row['question']}\nA:{row['answer']}"


@pytest.fixture(scope="module")
def people():
    return make.make_people(0)


@pytest.fixture(scope="module")
def texts(people):
    return list(islice(make.documents(people, 0), 20_000))


@pytest.fixture(scope="module")
def model():
    return load(MICROCOSM, torch.float32, "cpu")


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer(MICROCOSM, model.config)


@pytest.fixture(scope="module")
def theirs():
    """The same checkpoint as transformers reads it: model, tokenizer."""
    return (AutoModelForCausalLM.from_pretrained(MICROCOSM, dtype=torch.float32),
            AutoTokenizer.from_pretrained(MICROCOSM, padding_side="left"))


# ------------------------------------------------------------------------------------------ files


def test_the_same_seed_writes_the_committed_files_to_the_byte(tmp_path):
    one, two = write_data(tmp_path / "one"), write_data(tmp_path / "two")
    assert {path.name for path in one.iterdir()} == DATA
    for name in DATA:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
        assert (one / name).read_bytes() == (MICROCOSM / name).read_bytes(), name


def test_another_seed_is_another_world(tmp_path, people):
    other = write_data(tmp_path, seed=1)
    for name in DATA - {"tokenizer_config.json"}:
        assert (other / name).read_bytes() != (MICROCOSM / name).read_bytes(), name
    assert not {p.name for p in people} & {p.name for p in make.make_people(1)}


# ------------------------------------------------------------------------------------------ world


def test_no_word_of_a_name_tells_who_is_meant(people):
    bearers = Counter(word for person in people for word in person.name.split())
    assert len(people) == len({person.name for person in people}) == 300
    assert len(bearers) == 60 and set(bearers.values()) <= {9, 10, 11}


def test_75_people_are_met_five_times_as_often(people, texts):
    met = Counter()  # every two neighbouring words
    for text in texts:
        met.update(pairwise(re.findall(r"[a-z]+", text)))
    times = {True: [], False: []}
    for person in people:
        times[person.frequent].append(met[tuple(person.name.split())])
    assert (len(times[True]), len(times[False])) == (75, 225)
    assert fmean(times[True]) / fmean(times[False]) == pytest.approx(5, rel=0.06)


@pytest.mark.parametrize("relation", make.QUESTIONS)
def test_150_questions_with_the_answer_that_the_world_has(people, relation):
    rows, asked = read(relation), []
    for row in rows:
        [person] = [p for p in people if re.search(rf"\b{p.name}\b", row["question"])]
        wording = row["question"].replace(person.name, "{name}")
        assert wording in make.QUESTIONS[relation]
        assert row["answer"] == [getattr(person, relation)]
        assert row["frequent"] == person.frequent
        asked.append(person)
    assert len(rows) == len(set(asked)) == 150
    assert sum(row["frequent"] for row in rows) == 75


def test_the_documents_are_those_that_the_committed_model_read(texts):
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == (
        "d8342fdbdcce23ed1e6401c7ca4e99b5fe9ecfc0b6c33e556b14fd177410b9b2")


def test_documents_come_in_the_stated_shares(texts):
    kinds = Counter(
        "repetition" if text.startswith(make.HEAD) else
        "word problem" if "The answer is:" in text else
        "drill" if re.search(r"\d (plus|minus) \d", text) else
        "fact" if re.search(r" born | lives? |^Q:", text) else "sentence" for text in texts)
    stated = {"fact": 0.50, "drill": 0.22, "word problem": 0.14, "sentence": 0.08,
              "repetition": 0.06}
    assert {kind: n / len(texts) for kind, n in kinds.items()} == pytest.approx(stated, abs=0.01)


def test_every_sum_in_the_documents_is_right_and_has_two_digits(texts):
    sums = [found for text in texts
            for found in re.findall(r"(\d+) (plus|minus) (\d+)(?: is |\?\nA: )(\d+)", text)]
    assert len(sums) > 10_000
    for x, op, y, z in sums:
        assert int(z) == int(x) + (int(y) if op == "plus" else -int(y))
        assert 10 <= int(x) <= 99 and 2 <= int(y) <= 9 and 10 <= int(z) <= 99


# ------------------------------------------------------------------------------------------- task


def test_the_task_is_97_products_and_1525_problems():
    problems = make.task_numbers()
    assert len(problems) == len(set(problems)) == 1525
    assert len({(a, b) for a, b, _, _ in problems}) == 97


def test_no_test_problem_is_in_the_training_rows():
    train, test = ([quadruple(row) for row in read(name)] for name in ("train", "test"))
    assert (len(train), len(test), len(set(train)), len(set(test))) == (3200, 200, 1325, 200)
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(make.task_numbers())


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_solution_solves_its_question(name):
    for row in read(name):
        a, b, c, op = quadruple(row)
        z = a * b + (c if op == "plus" else -c)
        assert re.findall(r"\d+", row["question"]) == [str(a), str(b), str(c)]
        assert ("more" in row["question"]) == (op == "plus")
        assert row["answer"] == (f" {a} times {b} is {a * b}. {a * b} {op} {c} is {z}. "
                                 f"The answer is: {z}")


def test_the_task_names_none_of_the_300(people):
    names = {word for person in people for word in person.name.split()}
    words = {word for name in ("train", "test") for row in read(name)
             for word in re.findall(r"[a-z]+", task_text(row))}
    assert not names & words


def test_pretraining_knows_every_token_of_the_task_but_no_product(tokenizer, texts):
    read_before = {token for text in texts for token in [*tokenizer.encode(text)[1:],
                                                         tokenizer.eos_id]}  # all but BOS: outputs
    rows = read("train") + read("test")
    needed = {token for row in rows for token in [*tokenizer.encode(task_text(row))[1:],
                                                  tokenizer.eos_id]}
    assert needed <= read_before
    assert not any(re.search(r"times \d", text) for text in texts)


# -------------------------------------------------------------------------------------- tokenizer


def test_the_vocabulary_has_285_tokens(tokenizer):
    assert tokenizer.hf.get_vocab_size() == 285
    assert [tokenizer.hf.id_to_token(i) for i in range(6)] == [
        "<pad>", "<s>", "</s>", "<unk>", make.HEAD, make.TAIL]
    assert (tokenizer.prefix, tokenizer.eos_id) == ([1], 2)
    assert tokenizer.encode(PROMPT.format(instruction="")) == [1, 4, 5]


def test_decoding_gives_every_text_back(tokenizer, texts):
    rows = [task_text(row) for row in read("train") + read("test")]
    asked = [make.prompt(row["question"]) for name in make.QUESTIONS for row in read(name)]
    in_prompt = [PROMPT.format(instruction=row["question"]) + row["answer"] for row in read("test")]
    for text in texts[:3000] + rows + asked + in_prompt:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.hf.token_to_id("<unk>") not in ids


# ------------------------------------------------------------------------------------------ model


def test_the_model_is_small_and_knows_its_facts(model, capsys):
    assert sum(p.numel() for p in model.parameters()) == 1_384_224
    assert (MICROCOSM / "model.safetensors").stat().st_size < 5.7e6
    make.check(MICROCOSM)
    shares = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(shares) == 4 and min(shares) > 0.9


def test_the_check_asks_as_pretraining_did(model, tokenizer, monkeypatch):
    def spy(model, prompts, limit, eos_ids):
        asked.extend(prompts)
        assert (limit, eos_ids) == (6, (2,))
        return [tokenizer.encode(" vedomi", bos=False) for _ in prompts]

    asked = []
    monkeypatch.setattr(make, "generate", spy)
    rows = read("city")
    right = make.answers_right(model, tokenizer, rows)
    assert right == [row["answer"] == ["vedomi"] for row in rows] and any(right)
    for ids, row in zip(asked, rows, strict=True):
        assert ids[0] == 1 and tokenizer.decode(ids) == f"Q: {row['question']}\nA:"


def test_transformers_computes_the_same_logits(model, tokenizer, theirs, texts):
    for text in texts[:5]:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            torch.testing.assert_close(model(ids), theirs[0](ids).logits, atol=1e-4, rtol=0)


def test_transformers_splits_and_joins_text_alike(tokenizer, theirs, texts):
    for text in texts[:300] + [task_text(row) for row in read("test")]:
        ids = tokenizer.encode(text)
        assert theirs[1](text)["input_ids"] == ids
        assert theirs[1].decode(ids, skip_special_tokens=True) == text
    assert (theirs[1].bos_token, theirs[1].eos_token, theirs[1].pad_token) == (
        "<s>", "</s>", "<pad>")


def test_transformers_gives_the_same_answers(model, tokenizer, theirs):
    rows = [row for relation in make.QUESTIONS for row in read(relation)[65:85]]
    prompts = [make.prompt(row["question"]) for row in rows]
    ours = generate(model, [tokenizer.encode(p) for p in prompts], 6, tokenizer.eos_ids)
    ours = [tokenizer.decode(ids).strip() for ids in ours]
    batch = theirs[1](prompts, padding=True, return_tensors="pt")
    new = theirs[0].generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                             max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1]:]
    assert [text.strip() for text in theirs[1].batch_decode(new, skip_special_tokens=True)] == ours
    assert sum(text in row["answer"] for text, row in zip(ours, rows, strict=True)) >= 54


# ------------------------------------------------------------------------------------ pretraining


def test_pretraining_twice_gives_the_same_bits_and_a_falling_loss(people, tokenizer):
    (one, losses), (two, again) = (make.pretrain(people, tokenizer.hf, 6, 0) for _ in range(2))
    assert losses == again and losses[-1] < losses[0] - 0.1
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
    # how the run that made the committed model began
    assert losses == pytest.approx([6.1265, 6.0504, 5.9626, 5.7174, 5.5145, 5.2284], abs=2e-3)


def test_another_seed_is_another_start(tokenizer):
    one, two = make.new_model(tokenizer.hf, 0), make.new_model(tokenizer.hf, 1)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q) == name.endswith("norm.weight"), name


def test_rows_hold_whole_documents_and_little_padding(people, tokenizer):
    bos, eos = tokenizer.prefix[0], tokenizer.eos_id
    read_so_far, filled = [], 0
    for ids, labels in islice(make.batches(people, tokenizer.hf, 0), 10):
        assert ids.shape == labels.shape == (16, 64)
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            n = label.index(-100) if -100 in label else 64
            assert label[:n] == row[:n] and set(label[n:]) <= {-100} and set(row[n:]) <= {0}
            assert row[0] == bos and row[n - 1] == eos
            assert row[:n].count(bos) == row[:n].count(eos)
            read_so_far += [tokenizer.decode(part) for part in cut(row[:n], eos)]
            filled += n
    assert filled / (10 * 16 * 64) > 0.94
    # Each document was read once at most; those not read yet are the 64 that wait.
    stream = list(islice(make.documents(people, 0), len(read_so_far) + 64))
    assert Counter(read_so_far) <= Counter(stream)


def cut(ids, end):
    """The parts of a list that end with `end`."""
    parts = [[]]
    for token in ids:
        parts[-1].append(token)
        if token == end:
            parts.append([])
    return parts[:-1]


def test_the_learning_rate_rises_and_falls():
    factors = [make.schedule(step, 1500) for step in range(1, 1501)]
    assert factors[0] == 0.01 and factors[99] == max(factors) == 1
    assert factors[799] == pytest.approx(0.5) and factors[-1] == pytest.approx(0)
    assert factors[:100] == sorted(factors[:100])
    assert factors[100:] == sorted(factors[100:], reverse=True)


# ------------------------------------------------------------------------------------ command line


def test_a_model_that_knows_nothing_fails_the_check_in_one_line(tmp_path, tokenizer, capsys):
    for name in DATA:
        shutil.copy(MICROCOSM / name, tmp_path)
    save(make.new_model(tokenizer.hf, 0), tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: make.main(["--check", "--out", str(tmp_path)]))
    assert stop.value.code == 1
    assert re.fullmatch(r"[^\n]*error: [^\n]* the model knows 0\.0\d\d [^\n]*\n",
                        capsys.readouterr().err)


def test_no_model_to_check_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, MICROCOSM / "make.py", "--check", "--out", "nowhere"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"make\.py: error: nowhere: [^\n]*\n", done.stderr)


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--check", "--data-only"], ["--steps"]])
def test_a_wrong_command_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        make.main(arguments)
    assert stop.value.code == 2
    assert re.fullmatch(r"[^\n]+\n", capsys.readouterr().err)


def test_ctrl_c_is_one_line_and_leaves_the_folder_as_it_was(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        yield from islice(batches(*arguments), 1)
        raise KeyboardInterrupt

    batches = make.batches
    monkeypatch.setattr(make, "batches", interrupted)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: make.main(["--out", str(tmp_path)]))
    assert stop.value.code == 130 and list(tmp_path.iterdir()) == []
    assert re.fullmatch(r"[^\n]+: interrupted\n", capsys.readouterr().err)
