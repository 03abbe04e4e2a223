"""GLUE from its files to its scores: rows, labels, pairs, metrics, whole runs of train and eval."""

import json
import math
import random
from pathlib import Path

import pytest
import random_roberta
import scipy.stats
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmarks as B
import checkpoint as C
import data
import eval as E
import model as M
import results as R
import settings as S
import train
from checkpoint import UserError

SMALL = dict(hidden_size=96, intermediate_size=192, num_attention_heads=4, num_key_value_heads=4,
             head_dim=24)
FLAGS = ["--device", "cpu", "--rank", "32", "--r-avg", "12", "--r-max", "16",
         "--calibration-examples", "32", "--batch-size", "16", "--max-length", "64"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small random RoBERTa in model/, the separable set in SST-2/."""
    folder = tmp_path_factory.mktemp("glue")
    random_roberta.write(folder, **SMALL)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------ files


def tsv(folder, name, *lines):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes("".join(line + "\n" for line in lines).encode())
    return folder


def test_quotes_and_carriage_returns_are_text_and_broken_lines_are_counted(tmp_path, capsys):
    """csv's own rules would swallow everything between two stray quotes."""
    tsv(tmp_path, "train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        '0\t1\t2\tWhat is "x?\tWhy\rnot?\t1', "1\t3\t4\tlost its end", '2\t5\t6\t"a" b\tc"\t0\r',
        "3\t7\t8\t\tan empty question\t0", "4\t9\t9\ttoo\tmany\tcells\t1", "")
    rows = data.read_rows(str(tmp_path), "glue:qqp/train")
    said = capsys.readouterr().out
    assert "2 lines have not 6 columns and are left out, the first of them line 3" in said
    assert "has 3 rows, and glue:qqp/train as published 363,846" in said
    task = data.TASKS["glue:qqp"]
    assert [data.texts_of(r, task) for r in rows] == [
        ['What is "x?', "Why\rnot?"], ['"a" b', 'c"'], ["", "an empty question"]]
    assert [data.label_of(r, task.classes) for r in rows] == [1, 0, 0]
    assert rows[1].where.endswith("train.tsv:4")


TSV = {  # the header of each original file, a line of it, and what is in it
    "cola": (None, 'gj04\t1\t\tOur friends\' "x".', ['Our friends\' "x".'], 1),
    "sst2": ("sentence\tlabel", "a gem \t1", ["a gem "], 1),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t7\t8\ta\tb", ["a", "b"], 0),
    "stsb": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\t"
             "score", "0\tg\tf\ty\t1\tn\tn\ta\tb\t4.750", ["a", "b"], 4.75),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ta\tb\t1",
            ["a", "b"], 1),
    "mnli": ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
             "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
             "0\t1\t1n\tg\t(\t(\t(\t(\ta\tb\tentailment\tneutral", ["a", "b"], 1),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\ta\tb\tnot_entailment", ["a", "b"], 1),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", ["a", "b"], 0),
}
HUB = {"cola": {"sentence": 'Our friends\' "x".', "label": 1}, "sst2": {"sentence": "a gem ",
       "label": 1}, "mrpc": {"sentence1": "a", "sentence2": "b", "label": 0},
       "stsb": {"sentence1": "a", "sentence2": "b", "label": 4.75},
       "qqp": {"question1": "a", "question2": "b", "label": 1},
       "mnli": {"premise": "a", "hypothesis": "b", "label": 1},
       "qnli": {"question": "a", "sentence": "b", "label": 1},
       "rte": {"sentence1": "a", "sentence2": "b", "label": 0}}


@pytest.mark.parametrize("form", ["tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", TSV)
def test_every_task_in_every_form(tmp_path, name, form):
    header, line, texts, label = TSV[name]
    task, split = data.TASKS[f"glue:{name}"], next(iter(data.GLUE[name]))
    if form == "tsv":
        tsv(tmp_path, "train.tsv", *filter(None, [header]), line, line)
    elif form == "jsonl":
        (tmp_path / "train.jsonl").write_text(2 * (json.dumps(HUB[name]) + "\n"))
    else:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([HUB[name]] * 2),
                                    tmp_path / "train-00000-of-00001.parquet")
    rows = data.read_rows(str(tmp_path), f"glue:{name}/{split}")
    assert len(rows) == 2
    assert data.texts_of(rows[0], task) == texts
    found = data.label_of(rows[0], task.classes)
    assert found == label and type(found) is type(label)


def test_which_file_of_a_folder_stands_for_a_split(tmp_path):
    tsv(tmp_path, "dev_matched.tsv", "x"), tsv(tmp_path, "dev_mismatched.tsv", "x")
    matched, other = (f"glue:mnli/validation_{x}" for x in ("matched", "mismatched"))
    assert data.in_folder(tmp_path, matched).name == "dev_matched.tsv"
    assert data.in_folder(tmp_path, other).name == "dev_mismatched.tsv"
    tsv(tmp_path, "validation_matched.tsv", "x")
    assert data.in_folder(tmp_path, matched).name == "validation_matched.tsv"
    hub = "validation_matched-00000-of-00001.parquet"
    (tmp_path / hub).touch()
    assert data.in_folder(tmp_path, matched).name == hub
    with pytest.raises(UserError, match=r"holds no train file: .*train\.tsv"):
        data.in_folder(tmp_path, "glue:mnli/train")
    assert data.is_local(str(tmp_path)) and not data.is_local("glue:mnli/train")
    with pytest.raises(UserError, match="no such file"):
        data.read_rows(str(tmp_path))  # for which split?


@pytest.mark.parametrize("value, classes", [
    (-1, ("a", "b")), ("-", ("a", "b")), (2, ("a", "b")), ("A", ("a", "b")), (0.5, ("a", "b")),
    (None, ("a", "b")), (["0"], ("a", "b")), ("high", ("score",)), ("nan", ("score",)),
    (math.inf, ("score",))])
def test_what_is_no_label_is_refused(value, classes):
    with pytest.raises(UserError, match="file:7"):
        data.label_of(data.Row({"label": value}, "file:7"), classes)


def test_classes_have_the_names_and_numbers_of_the_hub():
    """Which a saved head carries into its config.json."""
    assert {name: data.TASKS[f"glue:{name}"].classes for name in data.GLUE} == {
        "cola": ("unacceptable", "acceptable"), "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"), "stsb": ("similarity",),
        "qqp": ("not_duplicate", "duplicate"), "qnli": ("entailment", "not_entailment"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "rte": ("entailment", "not_entailment")}


def test_a_mark_of_byte_order_and_spaces_of_the_first_cell(tmp_path):
    (tmp_path / "dev.tsv").write_bytes(b"\xef\xbb\xbfsentence\tlabel\n a gem\t1\n\t0\n")
    rows = data.read_rows(str(tmp_path), "glue:sst2/validation")
    assert [r.fields for r in rows] == [{"sentence": " a gem", "label": "1"},
                                        {"sentence": "", "label": "0"}]


@pytest.mark.parametrize("content, words", [
    (b"", "holds no rows"), (b"sentence\tlabel\n", "holds no rows"),
    (b"a\xff\n", "train.tsv: not readable")])
def test_a_bad_tsv_is_one_line_that_names_it(tmp_path, content, words):
    (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(UserError, match=words):
        data.read_rows(str(tmp_path), "glue:sst2/train")


def test_published_rows_are_glues_own():
    """Wang et al., Table 1, and the GLUE site; the eight of Table 3."""
    assert {name: sum(rows.values()) for name, rows in data.GLUE.items()} == {
        "cola": 9594, "sst2": 68221, "mrpc": 4076, "stsb": 7249, "qqp": 404276, "mnli": 412349,
        "qnli": 110206, "rte": 2767}


# ---------------------------------------------------------------------------------- pairs of texts


@pytest.fixture(scope="module")
def tokenizers(home):
    folder = home / "model"
    return (C.Tokenizer(folder, C.read_config(folder)),
            transformers.AutoTokenizer.from_pretrained(folder))


@settings(max_examples=60, deadline=None, database=None)
@given(st.text(max_size=30), st.none() | st.text(max_size=30), st.integers(5, 40))
def test_texts_and_pairs_are_cut_as_transformers_cuts_them(tokenizers, a, b, length):
    ours, theirs = tokenizers
    ids, cut = ours.encode_texts([a] if b is None else [a, b], length)
    pair = [[a]] if b is None else [[a], [b]]  # in lists: a bare "" is no second text to it
    assert ids == theirs(*pair, truncation=True, max_length=length)["input_ids"][0]
    assert ids[0] == 0 and ids[-1] == 2 and len(ids) <= length
    assert cut == (len(theirs(*pair)["input_ids"][0]) > length)


def test_a_training_set_is_cut_counted_and_known_by_texts_and_labels(tokenizers):
    """A resumed run must tell other labels from its own."""
    task = data.TASKS["glue:sst2"]

    def made(last, length=64):
        rows = [data.Row({"sentence": "the plot is dull", "label": 0}, ""),
                data.Row({"sentence": "dull " * 30, "label": last}, "")]
        return data.training_set(rows, tokenizers[0], 9, length, 0, task)

    short = made(1, 8)
    assert short.cut == 1 and max(len(e.ids) for e in short.examples) == 8 and short.dropped == 0
    assert made(1).cut == 0 and {e.label for e in made(1).examples} == {0, 1}
    assert made(1).sha256 == short.sha256 != made(0).sha256


def test_columns_that_a_task_uses():
    def used(task, *names):
        return data.columns(data.Row(dict.fromkeys(names, "x"), ""), data.TASKS[task])
    assert used("glue:mnli", "index", "sentence1", "sentence2", "gold_label") == [
        "sentence1", "sentence2", "gold_label"]
    assert used("math", "instruction", "input", "output") == ["instruction", "input", "output"]
    assert used("math", "question", "answer") == ["question", "answer"]
    assert used("code", "query", "answer", "resource", "lang") == ["query", "answer"]


@pytest.mark.parametrize("texts, least", [(["abc d"], 2), (["abc d", "ef g"], 4)])
def test_no_room_for_the_marks_is_refused(tokenizers, texts, least):
    """The tokenizers library would hand back the whole text, uncut."""
    ids, cut = tokenizers[0].encode_texts(texts, least)
    assert len(ids) == least and cut
    with pytest.raises(UserError, match=f"--max-length {least - 1}: .* needs {least} tokens"):
        tokenizers[0].encode_texts(texts, least - 1)


def test_a_tokenizer_without_a_first_token_is_refused(home, tmp_path):
    """The class is read off it."""
    folder = tmp_path / "m"
    folder.mkdir()
    for file in (home / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    with pytest.raises(UserError, match="no token in front"):
        C.Tokenizer(folder, C.read_config(folder))


def test_labels_of_a_batch_are_classes_or_numbers():
    batch = data.collate([data.Example([0, 5, 2], 3, 1), data.Example([0, 2], 2, 0)])
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.long
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert data.collate([data.Example([0, 2], 2, 2.5)])["labels"].dtype == torch.float32
    assert data.Example([0, 5, 2], 3, 1).targets == 1
    assert data.Example([0, 5, 2], 1).targets == 2 and data.Example([0, 5, 2], 0).targets == 2


# ---------------------------------------------------------------------------------------- metrics


def records(predicted, gold):
    return [{"predicted": p, "gold": g, "correct": p == g}
            for p, g in zip(predicted, gold, strict=True)]


def test_metrics_by_hand_and_by_scipy():
    draw = random.Random(0)
    gold = [draw.randint(0, 1) for _ in range(200)]
    predicted = [g if draw.random() < 0.7 else 1 - g for g in gold]
    pairs = list(zip(predicted, gold, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert B.matthews(records(predicted, gold)) == pytest.approx(100 * by_hand, abs=1e-10)
    assert B.accuracy(records(predicted, gold)) == (tp + tn) / 2
    x, y = ([draw.gauss(0, 1) for _ in range(50)] for _ in range(2))
    assert B.pearson(records(x, y)) == pytest.approx(100 * scipy.stats.pearsonr(x, y)[0])
    assert B.pearson(records(x, [3 * v - 1 for v in x])) == pytest.approx(100)
    rows = {n: b for n, b in B.BENCHMARKS.items() if b.protocol == "classify"}
    assert {n: b.metric for n, b in rows.items() if b.metric is not B.accuracy} == {
        "cola": B.matthews, "stsb": B.pearson}
    assert len(rows) == 9 and rows["mnli"].source == "glue:mnli/validation_matched"
    assert rows["mnli-mm"].source == "glue:mnli/validation_mismatched"


def test_constant_predictions(capsys):
    """Matthews' correlation is then 0 by convention; Pearson's has no value, which is said."""
    assert B.matthews(records([1, 1, 1], [0, 1, 1])) == 0
    assert math.isnan(B.pearson(records([2.0, 2.0], [1.0, 3.0])))
    assert R.score_of("stsb", records([2.0, 2.0], [1.0, 3.0])) is None
    assert R.score_of("stsb", records([2.0, 3.0], [1.0, 1.0])) is None  # as where --limit is small
    assert capsys.readouterr().out.count("stsb: all predictions or all labels are equal") == 2
    result = {"model": "x", "task": "glue:stsb", "method": "lora",
              "benchmarks": {"stsb": {"score": None, "n": 2}}}
    result["summary"] = E.summarise(result, None, None)
    assert result["summary"] == {"Avg": None}
    assert list(R.table([result]))[-1].count("undefined") == 2  # the score and Avg


def test_best_and_last_epoch():
    epochs = [{"a": 50.0, "b": None}, {"a": 70.0, "b": None}, {"a": 60.0, "b": None}]
    assert list(R.best_and_last(epochs)) == [
        "a: last epoch 60.00, best epoch 70.00 (number 2 of 3, chosen on the set it is scored on)"]
    assert list(R.best_and_last([])) == []
    assert list(R.best_and_last([{"a": -1.0}, {"a": None}])) == [
        "a: last epoch undefined, best epoch -1.00 (number 1 of 2, chosen on the set it is scored "
        "on)"]
    assert R.epoch_scores(Path("nowhere")) == []


def test_scores_of_a_text_do_not_depend_on_its_batch(home):
    """Nor on the dropout of a model in training; a text beyond the positions is cut."""
    for classes in (("negative", "positive"), ("similarity",)):
        model = C.load(home / "model", device="cpu", labels=classes, seed=3)
        asked = [B.Question([text], 1) for text in ("a dull plot", "vivid", "moving " * 600)]
        evaluator = E.Evaluator(model.train(), C.Tokenizer(home / "model", model.config))
        together = evaluator.ask("sst2", asked)
        assert model.training
        for q, record in zip(asked, together, strict=True):
            alone = evaluator.ask("sst2", [q])[0]
            assert record["scores"] == pytest.approx(alone["scores"], abs=1e-6)
            assert len(record["scores"]) == len(classes) and record["prompt"] == q.prompt
            best = max(range(len(classes)), key=lambda i, s=record["scores"]: s[i])
            assert record["predicted"] == (record["scores"][0] if len(classes) == 1 else best)
    gold = [B.Question(["vivid"], label) for label in (0.0, 5.0, -5.0)]
    assert not any(r["correct"] for r in evaluator.ask("stsb", gold))


def test_questions_are_beside_the_training_data_of_the_same_task_alone(tmp_path):
    def where(task, data_place, benchmark):
        s = S.Settings(model="x", task=task, data=str(data_place))
        return E.own_source(s, benchmark)
    (tmp_path / "train.tsv").touch()
    assert where("glue:sst2", tmp_path, "sst2") == str(tmp_path)
    assert where("glue:sst2", tmp_path / "train.tsv", "sst2") == "glue:sst2/validation"
    assert where("math", tmp_path, "nq_open") == "nq_open"
    assert E.own_source(None, "rte") == "glue:rte/validation"


@pytest.mark.parametrize("name, predicted, gold, words", [
    ("sst2", [0, 1, 1], [0, 0, 1], "sst2     2 of 3 right ("),
    ("cola", [0, 1, 1], [0, 1, 0], "cola     Matthews' correlation 50.00 over 3 ("),
    ("stsb", [1.0, 1.0], [0.0, 5.0], "stsb     undefined over 2 (")])
def test_a_benchmark_is_one_line(name, predicted, gold, words, monkeypatch, capsys):
    monkeypatch.setattr(E.Evaluator, "ask", lambda *_: records(predicted, gold))
    asked = [B.Question(["x"], g) for g in gold]
    found, _ = E.run_benchmark(E.Evaluator(None, None), name, [], asked)
    assert words in capsys.readouterr().out
    assert ("correct" in found) == (name == "sst2")


# ------------------------------------------------------------------------------------- whole runs


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["farss", "lora", "full"])
def test_a_separable_set_is_learnt_and_scored(home, method, capsys):
    """96 numbers wide it is not perfect as at RoBERTa's own width (README), but far from chance."""
    train.main(["--model", str(home / "model"), "--task", "glue:sst2", "--data",
                str(home / "SST-2"), "--method", method, "--lr", "2e-3", "--epochs", "6", *FLAGS])
    out = capsys.readouterr().out
    run = Path("runs") / f"model-glue-sst2-{method}-s0"
    assert "has no head for negative, positive; a new one, of seed 0" in out
    assert "384 of 384 rows" in out and "sst2: last epoch " in out
    lines = log_of(run)
    assert len(lines) == 6 * 24  # 384 rows in batches of 16
    assert [i + 1 for i, line in enumerate(lines) if "validation" in line] == [
        24 * epoch for epoch in range(1, 7)]
    E.main([str(run), "--device", "cpu"])
    results = R.read_results(run)
    assert results["benchmarks"]["sst2"]["score"] >= 95 and len(results["epochs"]) == 6
    assert results["epochs"][-1] == {"sst2": results["benchmarks"]["sst2"]["score"]}
    first = json.loads((run / "eval" / "sst2.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == [random_roberta.reviews(100, 1)[0][0]]
    if method != "full":
        head = C.load_tensors(run / "adapter.safetensors")[0]["classifier.out_proj.weight"]
        assert head.shape == (2, 96)


@pytest.mark.parametrize("name, line, columns", [
    ("cola", "gj\t{label}\t\tword {i}", None),
    ("stsb", "{i}\t1.{i}\tword\tother {i}", "index\tscore\tsentence1\tsentence2"),
    ("mnli", "word {i}\tother\t{name}", "sentence1\tsentence2\tgold_label")])
def test_a_task_of_each_kind(home, tmp_path, name, line, columns):
    """Two classes and Matthews, a number and Pearson, three classes on two sets."""
    classes = data.TASKS[f"glue:{name}"].classes
    lines = [line.format(i=i, label=i % 2, name=classes[i % len(classes)]) for i in range(9)]
    for file in ("train", "dev", "dev_matched", "dev_mismatched"):
        tsv(tmp_path / "set", f"{file}.tsv", *filter(None, [columns]), *lines)
    train.main(["--model", str(home / "model"), "--task", f"glue:{name}", "--data",
                str(tmp_path / "set"), "--method", "lora", "--out", "run", "--epochs", "2", *FLAGS])
    E.main(["run", "--device", "cpu"])
    results = R.read_results("run")
    expected = ["mnli", "mnli-mm"] if name == "mnli" else [name]
    assert list(results["benchmarks"]) == expected == list(log_of(Path("run"))[-1]["validation"])
    last = {b: r["score"] for b, r in results["benchmarks"].items()}
    # merged weights round a little differently
    assert last == pytest.approx(log_of(Path("run"))[-1]["validation"], abs=0.1)


def test_a_resumed_run_is_the_same_run(home, monkeypatch):
    flags = ["--model", str(home / "model"), "--task", "glue:sst2", "--data",
             str(home / "SST-2"), "--epochs", "2", "--save-every", "5", *FLAGS]
    train.main([*flags, "--out", "whole"])
    real, calls = train.train_step, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 30:  # in the second epoch
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--out", "cut"])
    monkeypatch.setattr(train, "train_step", real)
    train.main(["--resume", "cut"])
    one, two = (Path(run) / "adapter.safetensors" for run in ("whole", "cut"))
    assert one.read_bytes() == two.read_bytes()
    assert R.epoch_scores(Path("cut")) == R.epoch_scores(Path("whole")) != []


def test_a_run_on_a_file_that_ends_within_an_epoch(home, monkeypatch, capsys):
    """It is validated after its last step, on the published set and never on what it trains on;
    what does not go with its task is refused."""
    asked = []

    def hub(repo, file, repo_type):
        asked.append(file)
        return home / "SST-2" / "dev.tsv"

    monkeypatch.setattr(data, "hub_download", hub)
    train.main(["--model", str(home / "model"), "--task", "glue:sst2", "--data",
                str(home / "SST-2" / "train.tsv"), "--method", "lora", "--steps", "3", "--seed",
                "5", "--out", "run", *FLAGS])
    assert "a new one, of seed 5" in capsys.readouterr().out
    assert asked == ["sst2/validation-00000-of-00001.parquet"]
    assert ["validation" in line for line in log_of(Path("run"))] == [False, False, True]
    E.main(["run", "--device", "cpu"])
    assert "sst2: last epoch " in capsys.readouterr().out
    with pytest.raises(UserError, match="--task goes with an untouched model; run has its own"):
        E.main(["run", "--task", "glue:sst2"])
    with pytest.raises(UserError, match="--benchmarks gsm8k: run is for glue:sst2, whose are sst2"):
        E.main(["run", "--benchmarks", "gsm8k"])


def test_full_fine_tuning_is_a_checkpoint_of_its_own(home):
    """Its model folder is read by transformers, and scored as it is."""
    train.main(["--model", str(home / "model"), "--task", "glue:sst2", "--data",
                str(home / "SST-2"), "--method", "full", "--out", "run", "--steps", "3", *FLAGS])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained("run/model").eval()
    assert theirs.config.id2label == {0: "negative", 1: "positive"}
    ids = torch.tensor([[0, 9, 8, 2]])
    with torch.no_grad():
        torch.testing.assert_close(C.load("run/model", device="cpu")(ids), theirs(ids).logits,
                                   rtol=1e-4, atol=1e-5)
    E.main(["run/model", "--task", "glue:sst2", "--data", f"sst2={home / 'SST-2'}", "--out",
            "as-it-is", "--device", "cpu"])
    E.main(["run", "--device", "cpu"])
    assert R.read_results("as-it-is")["benchmarks"]["sst2"]["score"] == (
        R.read_results("run")["benchmarks"]["sst2"]["score"])


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, words", [
    (["--task", "math"], "math is no task for a roberta model; give --task, one of glue:cola"),
    (["--task", "glue:sst2", "--max-length", "513"], "positions for 512 tokens"),
    (["--task", "glue:sst2", "--targets", "q_proj"], "no linear layer is called q_proj; there are"),
    (["--task", "glue:sst2", "--targets", "classifier.dense"], "no linear layer"),
    (["--task", "glue:sst2", "--data", "nowhere"], "nowhere: no such file"),
])
def test_bad_input_of_a_classifier(home, flags, words):
    with pytest.raises(UserError, match=words):
        train.main(["--model", str(home / "model"), "--device", "cpu", *flags])
    assert not Path("runs").exists()


def test_a_bad_label_of_the_validation_set_is_found_before_a_run_begins(home, tmp_path):
    folder = tsv(tmp_path / "set", "train.tsv", "sentence\tlabel", "a\t1", "b\t0")
    tsv(folder, "dev.tsv", "sentence\tlabel", "a\t1", "b\t7")
    with pytest.raises(UserError, match=r"dev\.tsv:3: the label '7' is none of 0, 1, negative"):
        train.main(["--model", str(home / "model"), "--task", "glue:sst2", "--data", str(folder),
                    "--method", "lora", *FLAGS])
    assert not Path("runs").exists()


def test_a_decoder_has_no_glue_task():
    with pytest.raises(UserError, match="glue:rte is no task for a llama model"):
        train.main(["--model", "microcosm", "--task", "glue:rte"])
    with pytest.raises(UserError, match="glue:rte is no task for a llama model"):
        E.main(["microcosm", "--task", "glue:rte"])
    with pytest.raises(UserError, match="--benchmarks rte: microcosm is for microcosm, whose are"):
        E.main(["microcosm", "--benchmarks", "rte"])


def test_an_untrained_head_is_not_scored(home):
    with pytest.raises(UserError, match="no classification head for negative, positive; train"):
        E.main([str(home / "model"), "--task", "glue:sst2"])


def test_the_papers_settings_of_glue():
    """A.4.1 and section 4.2; both target sets by name."""
    def settled(*flags):
        return S.settle(S.training_arguments("", ["--model", "roberta-base", "--task", "glue:rte",
                                                  "--dry-run", *flags]))[0]
    s = settled()
    assert (s.shallow, s.rank, s.r_min, s.r_avg, s.r_max) == (6, 128, 1, 50, 64)
    assert (s.lr, s.batch_size, s.epochs, s.max_length, s.scaling) == (4e-4, 64, 10, 512, 1)
    assert s.target_names == list(M.ENCODER_TARGETS["six"])
    assert settled("--targets", "four").target_names == list(M.ENCODER_TARGETS["four"])
    assert settled("--targets", "query, output.dense").target_names == ["query", "output.dense"]
    assert S.run_folder(s).name == "roberta-base-glue-rte-farss-s0"  # no colon: not on Windows
