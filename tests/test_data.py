"""data.py: files, prompts, response masks, batches."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tiny import byte_tokenizer

import checkpoint as C
import data
import model as M

ROWS = [{"question": f"{i}+1?", "answer": f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
        for i in range(30)]


@pytest.fixture
def tokenizer(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return C.Tokenizer(tmp_path, M.Config(258, 8, 8, 1, 1, 1, 8, eos_token_ids=(257,)))


def write(path, rows):
    text = (json.dumps(rows) if ".json" in path.suffixes
            else "".join(json.dumps(r) + "\n\n" for r in rows))  # blank lines are no rows
    if path.name.endswith("parquet"):
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith("gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    rows = data.read_rows(write(tmp_path / name, ROWS))
    assert [r.fields for r in rows] == ROWS


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", '{"question": "q", "answer": "a"}\n{"question": \n', "a.jsonl:2: not valid JSON"),
    ("a.jsonl", '{"question": "q"}\n[1]\n', "a.jsonl:2: a list"),
    ("a.json", '[{"question": "q"}, 3]', "row 2 is a int"),
    ("a.json", '{"question": "q"}', "not an array"),
    ("a.json", '[{"question": "q"', "not readable"),
    ("a.json", "[]", "holds no rows"),
    ("a.jsonl", "", "holds no rows"),
    ("a.csv", "question,answer", "not a .json"),
    ("a.parquet", "PAR1 nonsense", "not readable as parquet"),
    ("a.jsonl.gz", "not gzip", "not readable"),
    ("a.jsonl", b"\xff\xfe", "not readable"),
])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(C.UserError, match=r"^[^\n]*$") as error:
        data.read_rows(str(tmp_path / name))
    assert says in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("line", [
    '{"question": "x?", "answer": "1", "id": ' + "9" * 5000 + "}",
    '{"question": "x?", "answer": "1", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_and_depths_that_python_refuses_are_one_line(tmp_path, name, line):
    (tmp_path / name).write_text(f"[{line}]" if name == "a.json" else line)
    with pytest.raises(C.UserError, match=rf"{name}.*: not (valid JSON|readable)"):
        data.read_rows(str(tmp_path / name))


def test_a_damaged_gzip_stream_is_one_line(tmp_path):
    draw = random.Random(0)
    rows = [{"question": str(draw.random()), "answer": str(draw.random())} for _ in range(900)]
    path = tmp_path / "a.jsonl.gz"
    write(path, rows)
    content = bytearray(path.read_bytes())
    content[5000:5040] = bytes(b ^ 0xA5 for b in content[5000:5040])
    path.write_bytes(content)
    with pytest.raises(C.UserError, match=r"a\.jsonl\.gz"):
        data.read_rows(str(path))


@pytest.mark.parametrize("column", [pa.timestamp("ns"), pa.duration("ns")])
def test_columns_of_times_that_python_cannot_hold_are_left_out(tmp_path, column):
    values = pa.array([1700000000123456789], pa.int64()).cast(column)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"question": ["a?"], "answer": ["x"], "t": values}), path)
    assert data.question_and_response(data.read_rows(str(path))[0]) == ("a?", "x")


def test_half_a_character_is_refused_and_named(tokenizer):
    row = data.Row({"question": "q \ud800", "answer": "a"}, "a.jsonl:7")
    with pytest.raises(C.UserError, match=r"a.jsonl:7: field 'question' holds a broken character"):
        data.training_set([row], tokenizer, 1, 512, 0)


def test_a_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write(path, ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(C.UserError, match="not readable"):
        data.read_rows(str(path))


def test_missing_file_and_unknown_name():
    with pytest.raises(C.UserError, match="no such file, and not one of the datasets metamath"):
        data.read_rows("gsm9k")


@pytest.mark.parametrize("fields, says", [
    ({"question": "q"}, "a.jsonl:7: no 'query' with 'response' or"),
    ({"question": "q", "answer": 3}, "'answer' is '3'"),
    ({"question": "", "answer": "a"}, "'question' is ''"),
])
def test_a_row_without_question_or_answer_is_named(fields, says):
    with pytest.raises(C.UserError, match=says.replace("/", ".")):
        data.question_and_response(data.Row(fields, "a.jsonl:7"))


def test_metamath_and_gsm8k_columns():
    row = data.Row({"query": "Q", "response": "R", "original_question": "O"}, "x")
    assert data.question_and_response(row) == ("Q", "R")
    gsm = "Half is <<48/2=24>>24.\nAll 48+24 = <<48+24=72>>72.\n#### 72"
    assert data.metamath_answer(gsm) == "Half is 24.\nAll 48+24 = 72.\n#### 72\nThe answer is: 72"
    assert data.metamath_answer("so it is 3\nThe answer is: 3") == "so it is 3\nThe answer is: 3"


@pytest.mark.parametrize("fields, expected", [
    ({"instruction": "How many?", "input": "", "output": "3+4=7. The answer is: 7",
      "answer": "7.0"}, ("How many?", "3+4=7. The answer is: 7")),
    ({"instruction": "Translate.", "input": "Good morning", "output": "Bonjour"},
     ("Translate.\nGood morning", "Bonjour")),
    ({"instruction": "I", "output": "O"}, ("I", "O")),
    ({"question": "Q", "answer": "A", "source": "x"}, ("Q", "A")),
    ({"question": "Q", "response": "R", "answer": "bare"}, ("Q", "R")),
    ({"query": "Q", "response": "R", "original_question": "O"}, ("Q", "R")),
    ({"query": "Q", "answer": "R", "resource": "x", "lang": "python"}, ("Q", "R")),
    ({"query": "Q", "response": "R", "input": "I", "context": "C"}, ("Q\nI\nC", "R")),
    ({"conversation_id": 1, "category": "x", "dataset": "y",
      "conversation": [{"human": "Q", "assistant": "R"}]}, ("Q", "R")),
    ({"instruction": "Q", "output": "R", "history": [], "system": ""}, ("Q", "R")),
])
def test_known_layouts_are_used_rightly(fields, expected):
    assert data.question_and_response(data.Row(fields, "x")) == expected


@pytest.mark.parametrize("fields, says", [
    ({"instruction": "Q", "output": "R", "history": [["a", "b"]]}, "'history' has content"),
    ({"question": "Q", "answer": "R", "choices": {"text": ["a"]}}, "'choices' has content"),
    ({"question": "Q", "answer": "R", "input": ["a"]}, "'input' is"),
    ({"conversation": [{"human": "Q", "assistant": "R"}] * 2}, "not a single question"),
    ({"conversation": ["Q", "R"]}, "not a single question"),
    ({"conversation": [{"human": "Q", "assistant": "R"}], "system": "S"}, "'system' has content"),
    ({"conversation": [{"human": "Q"}]}, "no 'query' with 'response'"),
])
def test_content_that_would_be_left_out_is_refused(fields, says):
    with pytest.raises(C.UserError, match=f"x:3: .*{says}"):
        data.question_and_response(data.Row(fields, "x:3"))


def test_only_the_math_task_rewrites_a_response():
    """A heading at the end of an answer is no result, and << >> may be code."""
    row = data.Row({"query": "Q", "answer": "a <<b>>\n\n#### See also"}, "x")
    for task in ("code", "instruction", "commonsense"):
        assert data.question_and_response(row, data.TASKS[task])[1] == "a <<b>>\n\n#### See also"
    gsm = data.Row({"question": "Q", "answer": "<<1+1=2>>2\n#### 2"}, "x")
    assert data.question_and_response(gsm, data.TASKS["math"])[1] == "2\n#### 2\nThe answer is: 2"


def test_commonsense_prompts_byte_for_byte(tokenizer):
    """LLM-Adapters' in training and in testing: indented, and unlike in white space. A second line
    of the instruction is not indented."""
    S = "                "
    trained = ("Below is an instruction that describes a task. Write a response that appropriately "
               f"completes the request.  \n\n{S}### Instruction:\n{S}Is it?\n\nAnswer format: "
               f"true/false\n{S}\n{S}### Response:\n{S}")
    row = data.Row({"instruction": "Is it?\n\nAnswer format: true/false", "input": "",
                    "output": "the correct answer is true", "answer": "true"}, "x")
    task = data.TASKS["commonsense"]
    _, example, _ = data.example_of(row, tokenizer, task, 512)
    assert tokenizer.decode(example.ids) == trained + "the correct answer is true"
    assert tokenizer.decode(example.ids[example.prompt_length :]) == "the correct answer is true"
    tested = data.COMMONSENSE_TEST_PROMPT.format(instruction=row.fields["instruction"])
    assert tested == trained.replace("  \n\n", " \n\n").replace(f"\n{S}\n", "\n\n")
    assert data.columns(row, task) == ["instruction", "output"]


@pytest.mark.parametrize("task", ["math", "code", "instruction"])
def test_language_tasks_have_the_official_prompt(task):
    assert data.TASKS[task].prompt == data.PROMPT


def test_one_folder_holds_several_test_sets(tmp_path):
    """LLM-Adapters' `dataset` folder, and MATH beside GSM8K as in the official repository."""
    row = {"instruction": "Q", "input": "", "output": "O", "answer": "true"}
    for name in ("boolq/test.json", "piqa/test.json", "MATH_test.jsonl", "test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [row | {"instruction": name}])
    for source, name in (("commonsense:boolq", "boolq/test.json"), ("math-test", "MATH_test.jsonl"),
                         ("commonsense:piqa", "piqa/test.json"), ("gsm8k-test", "test.jsonl")):
        found = data.read_rows(str(tmp_path), source)
        assert found[0].fields["instruction"] == name and data.stands_in(tmp_path, source)
    assert not data.stands_in(tmp_path, "commonsense:winogrande")
    with pytest.raises(C.UserError, match="holds no winogrande/test file"):
        data.read_rows(str(tmp_path), "commonsense:winogrande")


def test_the_official_prompt_byte_for_byte():
    assert data.PROMPT.format(instruction="2+2?") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n2+2?\n\n### Response:")


def test_sequence_is_bos_prompt_response_eos_with_loss_on_the_response(tokenizer):
    example = data.tokenise(tokenizer, "2+2?", "It is 4", 512)
    prompt = data.PROMPT.format(instruction="2+2?")
    assert example.ids[0] == 256 and example.ids[-1] == 257
    assert tokenizer.decode(example.ids) == prompt + "It is 4"  # no space between
    batch = data.collate([example, data.tokenise(tokenizer, "1?", "x" * 40, 512)])
    labelled = batch["labels"][0] != M.IGNORE
    assert tokenizer.decode(batch["input_ids"][0][labelled].tolist()) == "It is 4"
    assert batch["labels"][0][labelled][-1] == 257
    assert batch["attention_mask"][0].sum() == len(example.ids)
    assert not labelled[batch["attention_mask"][0] == 0].any()


def test_truncation_keeps_what_fits_and_drops_rows_without_response(tokenizer):
    length = 1 + len(data.PROMPT.format(instruction="q"))  # BOS and one token a byte
    assert len(data.tokenise(tokenizer, "q", "abc", length + 2).ids) == length + 2
    assert data.tokenise(tokenizer, "q", "abc", length + 1).ids[-1] != 257
    assert data.tokenise(tokenizer, "q", "abc", length) is None
    rows = [data.Row({"question": "q" * (1 + 50 * (i % 3 == 0)), "answer": "abc"}, f"{i}")
            for i in range(9)]
    chosen = data.training_set(rows, tokenizer, 100, length + 2, seed=0)
    assert len(chosen.examples) == 6 and chosen.dropped == 3 and chosen.cut == 6
    assert data.training_set(rows, tokenizer, 100, 512, seed=0).cut == 0
    with pytest.raises(C.UserError, match="no row has a response token within 5 tokens"):
        data.training_set(rows, tokenizer, 100, 5, seed=0)


def test_examples_are_a_seeded_draw_without_repetition(tokenizer):
    rows = [data.Row(r, f"{i}") for i, r in enumerate(ROWS)]

    def texts(seed):
        chosen = data.training_set(rows, tokenizer, 10, 512, seed).examples
        return [tokenizer.decode(e.ids) for e in chosen]

    assert texts(0) == texts(0) and len(set(texts(0))) == 10
    assert texts(0) != texts(1)
    same, other = (data.training_set(rows, tokenizer, 10, 512, s).sha256 for s in (0, 1))
    assert same == data.training_set(rows, tokenizer, 10, 512, 0).sha256 != other


@pytest.mark.parametrize("n, size", [(1, 16), (16, 16), (1000, 16), (1003, 16), (7, 1)])
def test_an_epoch_visits_every_example_once_in_batches_of_similar_length(n, size):
    lengths = torch.randint(10, 500, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = data.epoch_batches(lengths, size, seed=3, epoch=0)
    assert sorted(i for b in batches for i in b) == list(range(n))
    assert len(batches) == -(-n // size) and max(map(len, batches)) <= size
    assert batches == data.epoch_batches(lengths, size, seed=3, epoch=0)
    if n == 1000:
        assert batches != data.epoch_batches(lengths, size, seed=3, epoch=1)
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        assert padded < 1.05 * sum(lengths)
        firsts = [lengths[b[0]] for b in batches]
        assert firsts != sorted(firsts, reverse=True)  # lengths come mixed, not as a curriculum


def test_hub_datasets_are_asked_for_by_repository_and_file(monkeypatch, tmp_path, capsys):
    asked = []

    def hub(repo, filename, repo_type="model"):
        asked.append((repo, filename, repo_type))
        return tmp_path / "x.json"

    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    monkeypatch.setattr(data, "hub_download", hub)
    for name, row in data.SOURCES.items():
        if str(row.place).startswith("https:"):  # not on the hub: what to do is said
            with pytest.raises(C.UserError, match=f"{name} is not on the hub; get {row.file} of"):
                data.read_rows(name)
        elif not isinstance(row.place, Path):
            assert len(data.read_rows(name)) == len(ROWS) * len(row.subsets or "1")
    assert f"has {len(ROWS)} rows, and glue:rte/train as published 2,490" in capsys.readouterr().out
    assert ("meta-math/MetaMathQA", "MetaMathQA-395K.json", "dataset") in asked
    assert [file for repo, file, _ in asked if repo == "EleutherAI/hendrycks_math"] == [
        f"{subject}/test-00000-of-00001.parquet" for subject in data.SUBJECTS]
    assert ("nyu-mll/glue", "mnli/validation_mismatched-00000-of-00001.parquet", "dataset") in asked


def test_running_text_is_pieces_of_the_questions_from_random_places(tokenizer):
    """Byte tokens: every piece is BOS and so many letters of the one text, all of them labelled
    but BOS, and which ones the seed decides."""
    rows = [data.Row({"question": f"who was number {i}?", "answer": "secret"}, f"{i}")
            for i in range(90)]
    whole = "\n\n".join(f"who was number {i}?" for i in range(90))
    pieces = data.running_text(rows, tokenizer, 20, 33, seed=4)
    assert len(pieces) == 20 and {len(e.ids) for e in pieces} == {33}
    texts = [tokenizer.decode(e.ids) for e in pieces]
    assert all(text in whole and len(text) == 32 for text in texts) and len(set(texts)) > 10
    labels = data.collate(pieces)["labels"]
    assert (labels[:, 0] == M.IGNORE).all() and (labels[:, 1:] != M.IGNORE).all()
    assert all(e.targets == 32 for e in pieces)
    assert pieces == data.running_text(rows, tokenizer, 20, 33, seed=4)
    assert pieces != data.running_text(rows, tokenizer, 20, 33, seed=5)


def test_a_running_text_too_short_for_a_piece_is_its_own_piece(tokenizer):
    rows = [data.Row({"question": q, "answer": "x"}, q) for q in ("who?", "when?")]
    for piece in data.running_text(rows, tokenizer, 3, 50, seed=0):
        assert tokenizer.decode(piece.ids) == "who?\n\nwhen?" and piece.ids[0] == 256
