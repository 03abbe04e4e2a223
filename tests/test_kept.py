"""results.py, and eval.py with it: interruptions, memory that runs out, verdicts anew."""

import json
import multiprocessing
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import random_roberta
import torch
from test_benchmarks import ROWS
from test_code import HUMANEVAL
from tiny import byte_tokenizer, oracle, tiny_llama, write_checkpoint, write_data

import benchmarks as B
import checkpoint as C
import data
import eval as E
import model as M
import plan
import results as R
from checkpoint import UserError

UNITS = "The answer is: x/2."  # right by the official rule alone, and for every question
SAID = [UNITS, "```python\ndef add(x, y):\n    return x + y\n```", " Paris, of course", UNITS, "",
        "The answer is: 8"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A checkpoint and questions of every kind of judge, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    write_data("d")
    for name, rows in (("math", [ROWS["math"]] * 3), ("humaneval", [HUMANEVAL] * 3),
                       ("ifeval", [ROWS["ifeval"] | {"key": i} for i in range(3)])):
        Path(f"d/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(E, "check_sandbox", lambda: None)
    monkeypatch.setattr(E, "execute", passes_with_a_sum)
    monkeypatch.setitem(E.BENCHMARKS, "ifeval", E.BENCHMARKS["ifeval"]._replace(
        prepare=None, judge=by_length))
    return tmp_path


def passes_with_a_sum(program, records, desc):
    for r in records:
        r |= {"correct": "return x + y" in program(r["extracted"], r["gold"]), "why": "said"}


def by_length(output, gold):
    return {"P-S": [len(output) > 20], "P-L": [len(output) > 9], "I-S": [len(output) > 20, True],
            "I-L": [True]}


def scripted(tokenizer):
    def generate(model, prompts, *_):
        return [tokenizer.encode(SAID[(len(p) + i) % len(SAID)]).ids[1:]
                for i, p in enumerate(prompts)]
    return generate


EVERYTHING = ["--benchmarks", "gsm8k,math,ifeval,humaneval,nq_open,webqs,city", "--limit", "3",
              "--device", "cpu", "--data", "gsm8k=d/test.jsonl", "math=d/math.jsonl",
              "ifeval=d/ifeval.jsonl", "humaneval=d/humaneval.jsonl", "nq_open=d/nq.jsonl",
              "webqs=d/webqs.json"]
ONLY_THEN = ("seconds", "rescored")


def results_of(folder):
    """results.json without what only the clock or the way there decides."""
    def strip(value):
        return ({k: strip(v) for k, v in value.items() if k not in ONLY_THEN}
                if isinstance(value, dict) else value)
    return strip(R.read_results(folder))


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted((Path(folder) / "eval").iterdir())}


# ------------------------------------------------------------------------------------- --rescore


def test_rescoring_is_a_fresh_evaluation_without_the_model(world, monkeypatch, capsys):
    """Of strict verdicts official ones; every protocol and judge but the classifier's, programs and
    parts among them; what the model alone knows is kept."""
    monkeypatch.setattr(M, "generate", scripted(byte_tokenizer()))
    for out, scoring in (("strict", "strict"), ("official", "official")):
        E.main(["tiny", *EVERYTHING, "--out", out, "--scoring", scoring, "--allow-code-execution"])
    strict, official = results_of("strict"), results_of("official")
    assert strict != official and strict["summary"] != official["summary"]
    assert {b: r.get("scoring") for b, r in official["benchmarks"].items() if r["scoring"]} == {
        "gsm8k": "official", "math": "official"}
    before = files_of("strict")
    shutil.rmtree("tiny")
    monkeypatch.setattr(C, "load", None)
    capsys.readouterr()
    E.main(["--rescore", "strict", "--scoring", "official", "--allow-code-execution", "--out",
            "anew"])
    assert results_of("anew") == official
    assert list(results_of("anew")["benchmarks"]) == list(official["benchmarks"])
    assert files_of("anew") == files_of("official")
    assert files_of("strict") == before and results_of("strict") == strict
    assert "; verdicts changed: 1\n" in capsys.readouterr().out
    E.main(["--rescore", "official", "--allow-code-execution"])  # by the rule of before
    assert results_of("official") == official
    E.main(["--rescore", "official", "--benchmarks", "math", "--scoring", "strict"])
    assert {b: r["scoring"] for b, r in results_of("official")["benchmarks"].items()
            if r["scoring"]} == {"gsm8k": "official", "math": "strict"}


def test_rescoring_keeps_a_verdict_that_it_cannot_give(world, monkeypatch):
    """Programs that are not run again and a checker that is gone; not those of another answer."""
    monkeypatch.setattr(M, "generate", scripted(byte_tokenizer()))
    E.main(["tiny", *EVERYTHING, "--out", "one", "--allow-code-execution"])
    before, files = results_of("one"), files_of("one")
    row = E.BENCHMARKS["ifeval"]
    monkeypatch.setitem(E.BENCHMARKS, "ifeval", row._replace(judge=lambda *_: None))
    E.main(["--rescore", "one"])
    assert results_of("one") == before and files_of("one") == files
    monkeypatch.setitem(E.BENCHMARKS, "humaneval", E.BENCHMARKS["humaneval"]._replace(
        extract=lambda text: text + "#"))
    E.main(["--rescore", "one"])
    assert results_of("one")["benchmarks"]["humaneval"]["score"] is None


def test_a_runs_k_and_t_are_there_again(world, monkeypatch):
    """Against the results of its base, which lie where they did."""
    monkeypatch.setattr(M, "generate", scripted(byte_tokenizer()))
    nq = ["--benchmarks", "nq_open", "--data", "nq_open=d/nq.jsonl"]
    E.main(["tiny", *nq])
    shutil.copytree("runs/tiny-base", "runs/run")
    results = R.read_results("runs/run") | {"method": "lora", "weights": "other"}
    C.save_json("runs/run/results.json", results)
    E.main(["--rescore", "runs/run"])
    assert R.read_results("runs/run")["summary"].keys() == {"Avg", "K"}
    E.main(["--rescore", "runs/tiny-base"])
    assert R.read_results("runs/tiny-base")["summary"].keys() == {"Avg"}


@pytest.mark.parametrize("break_it, says", [
    (lambda text: text[:-20], r"gsm8k\.jsonl:3: not valid JSON"),
    (lambda text: "".join(text.splitlines(keepends=True)[:2]), "holds 2 records, and not the 3"),
    (lambda text: "".join(text.splitlines(keepends=True)[::-1]), "in their order"),
    (lambda text: text.replace("+", "-"), "holds other questions than results.json"),
    (lambda text: text.replace('"output"', '"out"'), r"gsm8k\.jsonl:1: no field 'output'"),
    (lambda text: text.replace('"prompt"', '"asked"'), r"gsm8k\.jsonl:1: no 'prompt'"),
    (lambda text: "", "holds no rows"),
    (None, r"gsm8k\.jsonl: no such file"),
])
def test_broken_records_are_one_line_and_nothing_is_written(world, break_it, says):
    both = ["--benchmarks", "nq_open,gsm8k", "--data", "gsm8k=d/test.jsonl", "nq_open=d/nq.jsonl"]
    E.main(["tiny", *both, "--limit", "3", "--max-new-tokens", "2", "--out", "one"])
    file, results = Path("one/eval/gsm8k.jsonl"), Path("one/results.json")
    stored = results.read_bytes()
    if break_it:
        file.write_text(break_it(file.read_text()))
    else:
        file.unlink()
    with pytest.raises(UserError, match=says) as error:
        E.main(["--rescore", "one"])
    assert "\n" not in str(error.value) and results.read_bytes() == stored


@pytest.mark.parametrize("argv, says", [
    (["--rescore", "one", "--limit", "3"], "--limit asks the model"),
    (["--rescore", "one", "--batch-size", "3"], "--batch-size asks the model"),
    (["--rescore", "one", "tiny"], "give one run or model"),
    (["tiny", "--suite", "maths"], "--suite maths: there are math, instruction, knowledge"),
    (["tiny", "--batch-size", "0"], "must be auto or at least 1"),
    (["tiny", "--batch-size", "many"], "must be auto or at least 1"),
])
def test_bad_arguments(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        E.evaluation_arguments(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("torn", ["humaneval.jsonl", "humaneval-samples.jsonl"])
def test_records_are_replaced_as_a_whole(tmp_path, monkeypatch, torn):
    (tmp_path / "eval").mkdir()
    before, after = ([{"gold": {"task_id": "t"}, "extracted": said}] for said in ("old", "new"))
    R.write_records(tmp_path, "humaneval", before)
    stored, real = files_of(tmp_path), Path.write_text

    def write_text(path, text):
        real(path, text if torn not in path.name else text[:9])
        if torn in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(KeyboardInterrupt):
        R.write_records(tmp_path, "humaneval", after)
    assert files_of(tmp_path)[torn] == stored[torn] and files_of(tmp_path).keys() == stored.keys()


def test_no_results_no_rescoring(world):
    with pytest.raises(UserError, match=r"tiny/results\.json: no such file"):
        E.main(["--rescore", "tiny"])
    C.save_json("results.json", {"method": "base", "model": "tiny", "task": None,
                                 "benchmarks": {}})
    with pytest.raises(UserError, match=r"results\.json has no webqs"):
        E.main(["--rescore", ".", "--suite", "knowledge", "--benchmarks", "webqs"])


def test_a_class_is_the_highest_score():
    """As torch's argmax has it; of one class it is the score."""
    draw = torch.Generator().manual_seed(0)
    for scores in (*torch.randn(20, 3, generator=draw), torch.tensor([1.0, 2.0, 2.0])):
        q = B.Question(["x"], int(scores.argmax()))
        record = E.judge_class(E.BENCHMARKS["mnli"], q, {"scores": scores.tolist()}, "strict")
        assert record["predicted"] == q.gold and record["correct"]
    record = E.judge_class(E.BENCHMARKS["stsb"], B.Question(["x"], 2.0), {"scores": [1.5]}, "")
    assert record["predicted"] == 1.5 and not record["correct"]


# ---------------------------------------------------------------------------------- interruptions

ASKED = ["--benchmarks", "gsm8k,nq_open,webqs", "--max-new-tokens", "7", "--device", "cpu",
         "--data", "gsm8k=d/test.jsonl", "nq_open=d/nq.jsonl", "webqs=d/webqs.json"]


def dying(after, how):
    """Evaluator.answers' `finished`, which ends the process once it has been told so often."""
    real, told = R.kept_answers, []

    @contextmanager
    def kept_answers(*args):
        with real(*args) as (known, finished, size):
            def then(i, said):
                finished(i, said)
                told.append(i)
                if len(told) == after:
                    how()
            yield known, then, size
    return kept_answers


def in_a_process(after, number, argv):
    """The exit status of an evaluation that is sent a signal after so many answers."""
    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
        E.kept_answers = dying(after, lambda: os.kill(os.getpid(), number))
        E.main(argv)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture
def counted(monkeypatch):
    """How many prompts each call of generate was given."""
    calls, real = [], M.generate

    def generate(model, prompts, *args):
        calls.append(len(prompts))
        return real(model, prompts, *args)

    monkeypatch.setattr(M, "generate", generate)
    return calls


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_bytes(world, number, counted, capsys):
    """Answers come in another order than the questions stand in; one line is torn."""
    argv = ["tiny", *ASKED, "--batch-size", "3", "--out"]
    E.main([*argv, "undisturbed"])
    assert counted == [8, 2]
    assert in_a_process(5, number, [*argv, "out"]) != 0
    partial = Path("out/eval/gsm8k.partial.jsonl")
    header, *lines = partial.read_text().splitlines()
    order = [json.loads(line)["id"] for line in lines]
    assert len(order) == 5 and order != sorted(order)
    assert json.loads(header)["max_new_tokens"] == 7
    partial.write_text("\n".join([header, *lines])[:-3])
    counted.clear()
    capsys.readouterr()
    E.main([*argv, "out"])
    assert counted == [4, 2]
    assert "gsm8k: 4 of 8 answered before" in capsys.readouterr().out
    assert files_of("out") == files_of("undisturbed")  # and the partial files are gone
    assert results_of("out") == results_of("undisturbed")


def test_what_was_finished_before_the_interruption_is_not_asked_again(world, counted):
    assert in_a_process(9, signal.SIGKILL, ["tiny", *ASKED, "--out", "out"]) == -signal.SIGKILL
    E.main(["tiny", *ASKED, "--out", "out", "--batch-size", "2"])
    assert counted == [0, 1]
    E.main(["tiny", *ASKED, "--out", "out"])  # but a new command asks anew
    assert counted == [0, 1, 8, 2]


def test_answers_cut_at_any_byte_go_on_and_are_whole_the_next_time(tmp_path):
    """What is known are the lines that came to their end; the batch is that of the first start."""
    path, order = tmp_path / "x", (2, 0, 1)
    answers = {0: {"output": "two\nlines"}, 1: {"output": ""}, 2: {"output": "é"}}
    with R.kept_answers(path, {"a": 1}, 3) as (_, keep, _):
        for i in order:
            keep(i, answers[i])
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        ends = whole[:cut].count(b"\n")
        done = order[: max(0, ends - 1)]
        with R.kept_answers(path, {"a": 1}, 7) as (known, keep, size):
            assert known == {i: answers[i] for i in done} and size == (3 if ends else 7)
            for i in order[len(done):]:
                keep(i, answers[i])
        assert path.read_bytes() == (whole if ends else whole.replace(b"3", b"7", 1))


@pytest.mark.parametrize("more", [
    ["--max-new-tokens", "3"], ["--bos", "always"], ["--limit", "1"], ["--dtype", "bfloat16"],
    "weights", "tokenizer", "stops", "questions"])
def test_other_settings_start_anew(world, counted, monkeypatch, more):
    """But a judge changes no answer."""
    nq = ["tiny", "--benchmarks", "nq_open", "--data", "nq_open=d/nq.jsonl", "--max-new-tokens",
          "4", "--device", "cpu", "--out", "out"]
    assert in_a_process(1, signal.SIGKILL, nq) == -signal.SIGKILL
    if more == "weights":
        write_checkpoint("tiny", seed=1)
    elif more == "tokenizer":
        with open("tiny/tokenizer.json", "a") as file:
            file.write("\n")
    elif more == "questions":
        rows = [json.loads(line) for line in Path("d/nq.jsonl").read_text().splitlines()]
        Path("d/nq.jsonl").write_text("".join(json.dumps(
            row | {"question": row["question"] + " today"}) + "\n" for row in rows))
    elif more == "stops":
        row = E.BENCHMARKS["nq_open"]
        monkeypatch.setitem(E.BENCHMARKS, "nq_open", row._replace(stops=(*row.stops, "never said")))
    E.main([*nq, *(more if isinstance(more, list) else [])])
    assert counted == [1 if "--limit" in more else 2]
    assert in_a_process(1, signal.SIGKILL, nq) == -signal.SIGKILL
    counted.clear()
    E.main([*nq, "--scoring", "official"])
    assert counted == [1]


def test_a_classifiers_scores_go_on_to_the_bit(tmp_path, monkeypatch):
    """Half a batch is scored again with its other half; the batch is that of the first start."""
    monkeypatch.chdir(tmp_path)
    random_roberta.write(tmp_path)
    model = C.load("model", device="cpu", labels=("negative", "positive"), seed=3)
    asked = [B.Question([f"text {'and more ' * (i % 5)}"], i % 2) for i in range(11)]

    def ask(path, size, batch_size=1):
        evaluator = E.Evaluator(model, C.Tokenizer("model", model.config), size)
        with R.kept_answers(path, {"a": 1}, size) as (known, finished, stored):
            evaluator.batch_size = stored
            return evaluator.ask("sst2", asked, known, finished)

    undisturbed = ask(Path("one"), 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(R, "kept_answers", dying(6, lambda: (_ for _ in ()).throw(KeyboardInterrupt)))
        ask(Path("two"), 1)
    assert len(Path("two").read_text().splitlines()) == 1 + 6
    assert ask(Path("two"), 2) == undisturbed


@pytest.mark.parametrize("name", ["nq_open", "webqs"])
def test_each_new_answer_is_told_once_and_no_known_one_is_asked(evaluator, name):
    told = []
    whole = evaluator.answers(name, QUESTIONS, {}, lambda i, said: told.append((i, said)))
    assert sorted(i for i, _ in told) == list(range(9)) and all(whole[i] == s for i, s in told)
    told.clear()
    known = {i: {"said before": i} for i in (0, 3, 4)}
    found = evaluator.answers(name, QUESTIONS, known, lambda i, said: told.append((i, said)))
    assert found == [known.get(i, said) for i, said in enumerate(whole)]
    assert sorted(i for i, _ in told) == [1, 2, 5, 6, 7, 8]


# ------------------------------------------------------------------------------------ batch sizes


@pytest.fixture
def evaluator(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = tiny_llama(seed=3)
    return E.Evaluator(model, C.Tokenizer(tmp_path, model.config), batch_size=8, max_new_tokens=6)


QUESTIONS = [B.Question(f"{'long ' * (i % 4)}question {i}", ["a", "bc"]) for i in range(9)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_out_of_memory_halves_the_batch_and_asks_the_rest(evaluator, error, monkeypatch, capsys):
    whole = evaluator.ask("nq_open", QUESTIONS)
    real, left = M.next_tokens, [4]

    def next_tokens(model, rows, cache):
        left[0] -= cache.lengths.numel() == 0 or len(rows) > 2
        if left[0] < 0 and len(rows) > 2:
            raise error
        return real(model, rows, cache)

    monkeypatch.setattr(M, "next_tokens", next_tokens)
    told = []
    assert evaluator.ask("nq_open", QUESTIONS, None, lambda i, said: told.append(i)) == whole
    assert sorted(told) == list(range(9)) and evaluator.batch_size == 2
    said = capsys.readouterr().out
    assert said.count("nq_open: out of memory") == 2 and "2 at a time" in said


def test_what_was_answered_before_memory_ran_out_is_not_asked_again(evaluator, monkeypatch):
    asked = []

    def answer(evaluator, name, questions, known, finished):
        for i in [i for i in range(9) if i not in known]:
            asked.append(i)
            finished(i, {"output": str(i)})
            if evaluator.batch_size > 1:
                raise torch.OutOfMemoryError("full")
        return {}

    monkeypatch.setitem(E.PROTOCOLS, "complete", E.PROTOCOLS["complete"]._replace(answer=answer))
    assert evaluator.answers("nq_open", QUESTIONS, {}, E.nobody) == [
        {"output": str(i)} for i in range(9)]
    assert asked == list(range(9)) and evaluator.batch_size == 1


def test_out_of_memory_with_one_question_and_other_errors_are_raised(evaluator, monkeypatch):
    def fail(error):
        def generate(*_):
            raise error
        return generate

    for error, sizes in ((RuntimeError("a bug"), 8), (torch.OutOfMemoryError("full"), 1)):
        evaluator.batch_size = 8
        monkeypatch.setattr(M, "generate", fail(error))
        with pytest.raises(RuntimeError, match=str(error)):
            evaluator.ask("nq_open", QUESTIONS)
        assert evaluator.batch_size == sizes


def test_room_is_what_the_cache_takes(evaluator, monkeypatch):
    """Of a long generation nearly all is keys and values, which are allocated as estimated."""
    allocated, real = [], M.KVCache.allocate

    def allocate(*args, **more):
        cache = real(*args, **more)
        allocated.append(cache.store.nbytes)
        return cache

    monkeypatch.setattr(M.KVCache, "allocate", allocate)
    monkeypatch.setattr(E, "MOST", 10**6)
    evaluator.max_new_tokens = 900
    monkeypatch.setattr(plan, "device_memory", lambda device: 1e8)
    size = evaluator.room("nq_open", QUESTIONS)
    monkeypatch.setattr(evaluator, "batch_size", size)
    monkeypatch.setattr(M, "next_tokens", lambda model, rows, cache: [257] * len(rows))
    evaluator.answers("nq_open", QUESTIONS * 100, {}, E.nobody)
    assert 0.4e8 < max(allocated) <= 0.8e8 and size < 900
    monkeypatch.setattr(plan, "device_memory", lambda device: 0.0)
    assert evaluator.room("nq_open", QUESTIONS) == evaluator.room("webqs", QUESTIONS) == 1
    monkeypatch.setattr(E, "MOST", 5)
    monkeypatch.setattr(plan, "device_memory", lambda device: 1e15)
    assert evaluator.room("nq_open", QUESTIONS) == 5


def test_the_batch_is_chosen_said_and_recorded(world, monkeypatch, capsys):
    """And changes no answer."""
    monkeypatch.setattr(E, "MOST", 3)
    E.main(["tiny", *ASKED, "--out", "auto"])
    assert "3 at a time)" in capsys.readouterr().out
    E.main(["tiny", *ASKED, "--out", "one", "--batch-size", "1"])
    assert files_of("auto") == files_of("one")
    auto, one = R.read_results("auto"), R.read_results("one")
    assert (auto["batch_size"], one["batch_size"]) == ("auto", 1)
    assert {b["batch_size"] for b in auto["benchmarks"].values()} == {3}


# --------------------------------------------------------------- suites; what right answers cost


def test_a_suite_is_the_benchmarks_of_a_group():
    def named(*argv):
        return E.evaluation_arguments(["x", *argv]).benchmarks

    assert named("--suite", "math") == ["gsm8k", "math"]
    assert named("--suite", "knowledge") == ["triviaqa", "nq_open", "webqs"]
    assert named("--suite", "facts,code") == ["city", "job", "year", "humaneval", "mbpp"]
    assert named("--benchmarks", "math", "--suite", "math") == ["math", "gsm8k"]
    assert len(named("--suite", "commonsense")) == 8 and named() == []
    assert sorted(b for found in E.SUITES.values() for b in found) == sorted(E.BENCHMARKS)
    for found in E.SUITES.values():
        assert len({E.BENCHMARKS[b].group for b in found}) == 1


def test_the_loss_of_right_answers_is_transformers(evaluator, tmp_path):
    """Of the first answer of each question, without BOS as the questions are asked."""
    C.save(evaluator.model, tmp_path / "m")
    theirs, total, count = oracle(tmp_path / "m"), 0.0, 0
    for q in QUESTIONS:
        prompt, answer = (evaluator.tokenizer.encode(t, False) for t in (q.prompt, " a"))
        inputs = torch.tensor([prompt + answer])
        labels = inputs.clone()
        labels[:, : len(prompt)] = -100
        total += theirs(inputs, labels=labels).loss.item() * len(answer)
        count += len(answer)
    assert evaluator.known_loss("nq_open", QUESTIONS) == pytest.approx(total / count, rel=1e-5)
    assert evaluator.known_loss("city", QUESTIONS) != pytest.approx(total / count, rel=1e-3)  # BOS


def test_forgetting_is_shown_beside_k(world, capsys):
    E.main(["tiny", *ASKED])
    shutil.copytree("runs/tiny-base", "runs/run")
    base, run = R.read_results("runs/tiny-base"), R.read_results("runs/run")
    assert {b for b, r in base["benchmarks"].items() if "known_loss" in r} == {"nq_open", "webqs"}
    run |= {"method": "lora", "weights": "other"}
    for b, loss in (("nq_open", 2.0), ("webqs", 3.0)):
        run["benchmarks"][b]["known_loss"] = loss
    C.save_json("runs/run/results.json", run)
    capsys.readouterr()
    E.main(["--rescore", "runs/run"])
    out = capsys.readouterr().out
    before = sum(base["benchmarks"][b]["known_loss"] for b in ("nq_open", "webqs")) / 2
    assert (f"right answers to nq_open, webqs: {before:.4f} nats a token before fine-tuning, "
            "2.5000 after") in out
    header, row = out.splitlines()[-2:]
    assert "known loss" in header and "2.5000" in row
    assert data.TASKS["math"].knowledge in E.KNOWLEDGE and "" not in E.KNOWLEDGE


def test_results_that_a_link_names(tmp_path):
    """The file that a user names may be a link to anywhere, one in a run's folder may not."""
    (tmp_path / "results.json").write_text('{"benchmarks": {}}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").symlink_to(tmp_path / "results.json")
    assert R.read_results(tmp_path / "run" / "results.json")["benchmarks"] == {}
    with pytest.raises(UserError, match="leads out of its folder"):
        R.read_results(tmp_path / "run")
