"""eval.py: the protocols, references, tables, and bad input."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_benchmarks import ROWS
from tiny import byte_tokenizer, oracle, tiny_llama, write_checkpoint, write_data

import benchmarks as B
import checkpoint as C
import data
import eval as E
import model as M
import results as R
import settings as S
import train
from checkpoint import UserError


def test_cut():
    assert E.cut("Paris, France. Yes\nNo", ("\n", ".", ",")) == "Paris"
    assert E.cut("\nParis", ("\n",)) == ""


@pytest.fixture
def evaluator(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = tiny_llama(seed=3)
    return E.Evaluator(model, C.Tokenizer(tmp_path, model.config), batch_size=3)


def rows(*fields):
    return [data.Row(f, f"{i}") for i, f in enumerate(fields)]


def ask(evaluator, name, *fields):
    return evaluator.ask(name, B.questions(name, rows(*fields)))


def test_prompts_of_the_three_benchmarks(evaluator):
    gsm = ask(evaluator, "gsm8k", {"question": "2+2?", "answer": "4\n#### 4"})
    assert gsm[0]["prompt"].endswith("### Instruction:\n2+2?\n\n### Response: "
                                     "Let's think step by step.")
    nq = ask(evaluator, "nq_open", {"question": "who", "answer": ["a"]})
    assert nq[0]["prompt"] == "Answer these questions:\n\nQ: who?\nA:"
    web = ask(evaluator, "webqs", {"qText": "who?", "answers": ["a"]})
    assert web[0]["prompt"] == "Question: who?\nAnswer:"
    hub = ask(evaluator, "webqs", {"question": "who?", "answers": ["a"]})
    assert hub[0]["prompt"] == web[0]["prompt"]


def test_bos_rule(evaluator, monkeypatch):
    seen = []
    monkeypatch.setattr(M, "generate", lambda model, ids, *a: seen.extend(ids) or [[] for _ in ids])
    question = {"question": "who", "answer": ["a"]}
    for bos in ("harness", "always", "never"):
        evaluator.bos = bos
        ask(evaluator, "nq_open", question)
    assert [ids[0] == 256 for ids in seen] == [False, True, False]
    seen.clear()
    ask(evaluator, "gsm8k", {"question": "who", "answer": "1\n#### 1"})
    assert seen[0][0] == 256  # always, as in training


def test_completions_are_in_order_and_do_not_depend_on_the_batch(evaluator):
    prompts = [f"{'long ' * (i % 4)}question {i}" for i in range(10)]
    args = (12, ("z", "\n"), False, "x")
    batched = evaluator.completions(prompts, *args)
    evaluator.batch_size = 1
    assert batched == evaluator.completions(prompts, *args)
    assert len(set(batched)) > 3  # not all alike


@pytest.mark.parametrize("name", [n for n, b in E.BENCHMARKS.items() if b.protocol == "complete"
                                  and not b.columns])
def test_a_benchmark_batched_is_the_same_as_one_by_one(evaluator, name):
    row = ROWS[name]
    longer = {k: f"{v} {'and more ' * 3}" if k in (*data.QUESTION, "prompt") else v
              for k, v in row.items()}
    evaluator.max_new_tokens = 6
    batched = ask(evaluator, name, row, longer, row)
    evaluator.batch_size = 1
    assert batched == ask(evaluator, name, row, longer, row)
    assert batched[0] == batched[2] != batched[1]


def test_commonsense_scores_a_scripted_answer(evaluator, monkeypatch):
    said = evaluator.tokenizer.encode("the correct answer is answer3\n\nanswer1", False)
    monkeypatch.setattr(M, "generate", lambda model, ids, *_: [said for _ in ids])
    records = ask(evaluator, "siqa", ROWS["siqa"], ROWS["siqa"] | {"answer": "answer1"})
    assert [r["correct"] for r in records] == [True, False]
    assert {r["extracted"] for r in records} == {"answer3"}
    assert evaluator.with_bos(E.BENCHMARKS["siqa"]) and not evaluator.with_bos(
        E.BENCHMARKS["ifeval"])


def test_math_is_scored_by_either_rule(evaluator, monkeypatch):
    said = evaluator.tokenizer.encode("8/2 is 4.\nThe answer is: x/2.\nInstruction: more", False)
    monkeypatch.setattr(M, "generate", lambda model, ids, *_: [said for _ in ids])
    verdicts = []
    for evaluator.scoring in ("strict", "official"):
        (record,) = ask(evaluator, "math", ROWS["math"])
        assert (record["extracted"], record["gold"]) == ("x/2", "\\frac82")
        verdicts.append(record["correct"])
    assert verdicts == [False, True]


def test_nq_open_scores_a_scripted_answer(evaluator, monkeypatch):
    text = {"first": " Paris, of course", "second": " Rome"}

    def answer(model, ids, *_):
        prompts = [evaluator.tokenizer.decode(p) for p in ids]
        return [evaluator.tokenizer.encode(text["first" if "first" in p else "second"], False)
                for p in prompts]

    monkeypatch.setattr(M, "generate", answer)
    records = ask(evaluator, "nq_open", {"question": "second question", "answer": ["Milan"]},
                  {"question": "first", "answer": ["x", "PARIS"]})
    assert [r["correct"] for r in records] == [False, True]
    assert records[1]["output"] == " Paris"


def test_webqs_is_the_argmax_at_every_token_of_some_answer(evaluator):
    """Against a loop over full logits; the answers are built so that both verdicts occur."""
    model, tokenizer = evaluator.model, evaluator.tokenizer
    model.lm_head.weight.data[128:] = 0  # so that what it says decodes to ASCII
    model.lm_head.weight.data[32] = 1.0
    asked, wanted = [], []
    for i in range(6):
        prompt = f"Question: q{i}?\nAnswer:"
        ids = tokenizer.encode(prompt, False)
        said = tokenizer.decode(M.generate(model, [ids], 4)[0])
        answers = [f"nonsense {i}", *([said[1:]] if said.startswith(" ") and said[1:] else [])]
        asked.append({"qText": f"q{i}?", "answers": answers})
        hit = []
        for a in sorted(answers):
            whole = tokenizer.encode(f"{prompt} {a}", False)
            with torch.no_grad():
                best = model(torch.tensor([whole]))[0].argmax(-1).tolist()
            hit.append(best[len(ids) - 1 : -1] == whole[len(ids) :])
        wanted.append(any(hit))
    records = ask(evaluator, "webqs", *asked)
    assert [r["correct"] for r in records] == wanted


def test_webqs_right_answers_occur(evaluator, monkeypatch):
    """A model that always continues with the next byte of "ab..." finds " abc" but not " abd"."""
    table = torch.full((258, 258), -1.0)
    for here, there in zip(": abc", " abc!", strict=True):
        a, b = (evaluator.tokenizer.encode(c, False)[0] for c in (here, there))
        table[a, b] = 1.0
    monkeypatch.setattr(evaluator.model, "labelled", lambda ids, labels: (
        table[ids[:, :-1][labels[:, 1:] != M.IGNORE]], labels[:, 1:][labels[:, 1:] != M.IGNORE]))
    evaluator.model.lm_head = torch.nn.Identity()
    evaluator.model.lm_head.weight = table
    records = ask(evaluator, "webqs", {"qText": "1", "answers": ["abd", "abc"]},
                  {"qText": "2", "answers": ["abd"]}, {"qText": "3", "answers": ["ab", "abx"]})
    assert [r["correct"] for r in records] == [True, False, True]
    assert records[0]["matched"] == ["abc"]


def test_answer_loss_is_transformers_loss(evaluator, tmp_path):
    transformers = pytest.importorskip("transformers")
    C.save(evaluator.model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    asked = rows(*({"question": f"{i}+1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(3)))
    total, count = 0.0, 0
    for row in asked:
        batch = data.collate([data.tokenise(evaluator.tokenizer,
                                            *data.question_and_response(row), 512)])
        n = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += theirs(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item() * n
        count += n
    assert evaluator.answer_loss(asked, "math") == pytest.approx(total / count, rel=1e-5)


def test_text_loss_is_transformers_loss(evaluator, tmp_path):
    """A text in pieces of 512 tokens, the BOS in front of each among them; every token counts."""
    text = "to know and to forget " * 40  # 880 byte tokens
    C.save(evaluator.model, tmp_path / "m")
    theirs, tokenizer, total, count = oracle(tmp_path / "m"), evaluator.tokenizer, 0.0, 0
    ids = tokenizer.encode(text, bos=False)
    for piece in (ids[:511], ids[511:]):
        inputs = torch.tensor([[256, *piece]])
        total += theirs(inputs, labels=inputs).loss.item() * len(piece)
        count += len(piece)
    assert len(data.pieces(text, tokenizer, 512)) == 2
    assert evaluator.text_loss(text) == pytest.approx(total / count, rel=1e-5)


def test_a_text_is_scored_beside_the_benchmarks(tmp_path, monkeypatch, capsys, checkpoint):
    monkeypatch.chdir(tmp_path)
    write_data("d")
    Path("known.txt").write_text("to know and to forget")
    E.main([str(checkpoint), "--benchmarks", "nq_open", "--data", "nq_open=d/nq.jsonl", "--out",
            "out", "--text", "known.txt", "--max-new-tokens", "2", "--device", "cpu"])
    stored = R.read_results("out")["text"]
    assert f"known.txt: {stored['loss']:.4f} nats a token" in capsys.readouterr().out
    for content, words in ((b"", "is empty"), (b"\xff\xfe", "not readable as text")):
        Path("known.txt").write_bytes(content)
        with pytest.raises(UserError, match=words):
            E.main([str(checkpoint), "--benchmarks", "nq_open", "--text", "known.txt"])
    with pytest.raises(UserError, match=r"nowhere\.txt: not readable"):
        E.main([str(checkpoint), "--benchmarks", "nq_open", "--text", "nowhere.txt"])


def test_what_is_known_is_asked_with_its_answer(checkpoint):
    """For the boundary's search: the first questions of each knowledge benchmark."""
    tokenizer = C.Tokenizer(C.MICROCOSM, C.read_config(C.MICROCOSM))
    known = E.known_examples("microcosm", tokenizer, 2)
    row = data.read_rows("city")[0]
    asked = f"Q: {row.fields['question']}\nA:"
    assert len(known) == 6
    assert tokenizer.decode(known[0].ids) == f"{asked} {row.fields['answer'][0]}"
    assert tokenizer.decode(known[0].ids[: known[0].prompt_length]) == asked


def test_answer_loss_is_none_where_there_is_none(evaluator):
    long = rows({"question": "q " * 600, "answer": "a\n#### 3"})
    assert evaluator.answer_loss(long, "math") is None
    short = rows({"question": "q", "answer": "a\n#### 3"})
    assert evaluator.answer_loss(short + long, "math") == evaluator.answer_loss(short, "math")
    evaluator.model.model.norm.weight.data[0] = float("nan")
    assert evaluator.answer_loss(short, "math") is None


# ------------------------------------------------------------------------- references and tables


def result(score, benchmark="gsm8k", **more):
    return {"score": score, "n": 10, "limit": None, "scoring": None, "bos": "harness",
            "max_new_tokens": None} | more


def test_summary_against_files_and_paper(tmp_path, monkeypatch):
    mine = {"model": "llama2-7b", "task": "math", "benchmarks": {
        "gsm8k": result(50.94), "nq_open": result(5.01), "webqs": result(8.37)}}
    summary = E.summarise(mine, "paper", "paper")
    assert summary["K"] == pytest.approx((5.01 / 14.99 + 8.37 / 5.86) / 2)
    assert summary["T"] == pytest.approx(50.94 / 50.19)
    assert summary["KT"] == pytest.approx(2 / (1 / summary["K"] + 1 / summary["T"]))
    assert summary["Avg"] == pytest.approx((50.94 + 5.01 + 8.37) / 3)
    base = tmp_path / "results.json"
    C.save_json(base, {"benchmarks": {"nq_open": result(0.0), "webqs": result(4.0)}})
    assert E.summarise(mine, str(base), None)["K"] is None  # undefined: a reference of 0
    C.save_json(base, {"benchmarks": {"nq_open": result(10.0), "webqs": result(4.0, n=9)}})
    with pytest.raises(C.UserError, match="its webqs has n 9, this one 10"):
        E.summarise(mine, str(base), None)
    with pytest.raises(C.UserError, match="has no gsm8k"):
        E.summarise(mine, None, str(base))
    with pytest.raises(C.UserError, match="the paper prints no scores of tiny"):
        E.summarise(mine | {"model": "tiny"}, "paper", None)
    with pytest.raises(C.UserError, match="the paper prints no gsm8k of tiny"):
        monkeypatch.setattr(R, "paper_references", lambda *_: ({"nq_open": "1.0"}, {"gsm8k": ""}))
        E.summarise(mine | {"model": "tiny"}, None, "paper")
    shown = "\n".join(R.table([mine | {"method": "farss", "trainable": 271e6, "summary": {
        "Avg": 21.0, "K": None, "T": 1.01}}]))
    assert "undefined" in shown and "271.00M" in shown and "50.94" in shown


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A checkpoint, data, and two finished runs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    write_data("d")
    for method in ("farss", "full"):
        train.main(["--model", "tiny", "--data", "d/train.jsonl", "--method", method, "--rank",
                    "4", "--r-avg", "2", "--r-max", "4", "--calibration-examples", "4", "--steps",
                    "2", "--batch-size", "4", "--lr", "1e-3"])
    return tmp_path


FILES = ["--benchmarks", "gsm8k,nq_open,webqs",
         "--data", "gsm8k=d/test.jsonl", "nq_open=d/nq.jsonl", "webqs=d/webqs.json"]


def test_a_run_is_scored_like_the_model_in_memory_and_results_say_all(world, capsys):
    E.main(["tiny", *FILES, "--max-new-tokens", "8"])
    E.main(["runs/tiny-math-full-s0", *FILES, "--max-new-tokens", "8"])
    E.main(["runs/tiny-math-farss-s0", *FILES, "--max-new-tokens", "8", "--full-results",
            "runs/tiny-math-full-s0"])
    results = json.loads((world / "runs/tiny-math-farss-s0/results.json").read_text())
    assert results["summary"]["T"] is None  # full fine-tuning of random weights scores 0
    for key in ("commit", "torch", "python", "settings", "trainable", "dtype", "batch_size"):
        assert key in results
    lines = (world / "runs/tiny-math-farss-s0/eval/gsm8k.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 8 and {"prompt", "output", "gold", "correct"} <= set(records[0])
    model = C.load("tiny")
    C.load_adapter(model, "runs/tiny-math-farss-s0/adapter.safetensors")
    loss = E.Evaluator(model, C.Tokenizer("tiny", model.config)).answer_loss(
        data.read_rows("d/test.jsonl"), "math")
    assert results["benchmarks"]["gsm8k"]["answer_loss"] == pytest.approx(loss, rel=1e-5)
    capsys.readouterr()
    E.main(["--table", "runs/tiny-base", "runs/tiny-math-farss-s0"])
    assert capsys.readouterr().out.count("\n") == 3


def test_references_that_do_not_fit_cost_no_result(world, capsys):
    E.main(["tiny", *FILES, "--max-new-tokens", "8", "--limit", "1"])
    run = ["runs/tiny-math-farss-s0", *FILES, "--max-new-tokens", "8"]
    for early in ("paper", "none.json"):  # seen at once
        with pytest.raises(C.UserError):
            E.main([*run, "--full-results", early])
        assert not (world / "runs/tiny-math-farss-s0/results.json").exists()
    with pytest.raises(C.UserError, match="cannot be compared"):  # of 1 question, not 8
        E.main([*run, "--base-results", "runs/tiny-base"])
    E.main(run)
    assert "no K and T: runs/tiny-base" in capsys.readouterr().out
    results = json.loads((world / "runs/tiny-math-farss-s0/results.json").read_text())
    assert results["benchmarks"]["gsm8k"]["n"] == 8 and set(results["summary"]) == {"Avg"}


def test_evaluation_is_reproducible(world):
    for out in ("one", "two"):
        E.main(["runs/tiny-math-farss-s0", *FILES, "--max-new-tokens", "8", "--out", out])
    for name in ("gsm8k", "nq_open", "webqs"):
        one, two = ((world / o / "eval" / f"{name}.jsonl").read_bytes() for o in ("one", "two"))
        assert one == two


@pytest.mark.parametrize("argv, says", [
    ([], "give one run or model"),
    (["nowhere"], "no such folder"),
    (["tiny", "--benchmarks", "gsm8k,mmlu"], "--benchmarks mmlu"),
    (["tiny", "--data", "gsm8k"], "write NAME=FILE"),
    (["tiny", "--data", "gsm8k=none.jsonl", "--benchmarks", "gsm8k"], "none.jsonl: no such file"),
    (["tiny", "--limit", "0"], "--limit must be at least 1"),
    (["--table", "tiny"], "results.json: no such file"),
    (["tiny", "--unknown"], "unrecognized arguments"),
    (["runs/stopped"], "not finished"),
    (["runs/typo"], "no such folder"),  # not taken for a hub id where runs/ exists
    (["tiny", "--benchmarks", "gsm8k", "--data", "gsm8k=d/nq.jsonl"], "cannot be used"),
])
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    write_data("d")
    settings = asdict(S.Settings(model="tiny"))
    (tmp_path / "runs/stopped").mkdir(parents=True)
    C.save_json("runs/stopped/run.json", {"settings": settings})
    with pytest.raises(SystemExit) as stop:
        S.run_main(lambda: E.main(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err


def test_mean_ratio_is_nan_not_an_error_for_a_zero_reference():
    assert math.isnan(E.knowledge_score({"a": 1.0}, {"a": 0.0}))
    assert math.isnan(E.harmonic_mean(math.nan, 1.0))
    assert E.harmonic_mean(0.0, 0.0) == 0.0


# --------------------------------------------------------- what may be compared, and what is kept

NQ = ["--benchmarks", "nq_open", "--data", "nq_open=d/nq.jsonl", "--max-new-tokens", "4"]


def test_a_base_of_the_same_name_but_other_weights_is_refused(tmp_path, monkeypatch, capsys):
    """A/model and B/model share runs/model-base: K against the wrong one is never printed."""
    monkeypatch.chdir(tmp_path)
    write_data("d")
    for name, seed in (("A", 0), ("B", 7)):
        write_checkpoint(tmp_path / name / "model", seed=seed)
    train.main(["--model", "A/model", "--data", "d/train.jsonl", "--method", "lora", "--rank", "2",
                "--steps", "1", "--batch-size", "4"])
    for base, says in (("A", "undefined"), ("B", "no K and T: runs/model-base/results.json: its "
                                            "base model has base_fingerprint")):
        E.main([f"{base}/model", *NQ])
        capsys.readouterr()
        E.main(["runs/model-math-lora-s0", *NQ])
        assert says in capsys.readouterr().out
    with pytest.raises(C.UserError, match="two cannot be compared"):
        E.main(["runs/model-math-lora-s0", *NQ, "--base-results", "runs/model-base"])


def test_what_the_paper_did_otherwise_is_said(capsys):
    mine = {"model": "x", "known_as": "llama2-7b", "task": "math", "benchmarks": {
        "gsm8k": result(50.94, limit=5, scoring="strict", max_new_tokens=8), "nq_open": result(5.0),
        "webqs": result(8.37)}}
    E.summarise(mine, "paper", "paper")
    out = capsys.readouterr().out
    assert "gsm8k was scored otherwise than here: limit 5, max new tokens 8, scoring strict" in out
    assert "nq_open" not in out


def test_a_stop_string_of_many_tokens_is_found_late_in_a_text(evaluator, monkeypatch):
    """The check looks at a tail; here at byte tokens, one a letter."""
    text, seen = "x" * 60 + " Instruction: y", []

    def generate(model, ids, limit, eos, stop, *_):
        new = []
        for token in evaluator.tokenizer.encode(text, False):
            new.append(token)
            seen.append(stop(new))
        return [new]

    monkeypatch.setattr(M, "generate", generate)
    out = evaluator.completions(["q"], 99, ("Instruction:",), False, "x")
    assert out == ["x" * 60 + " "] and seen.index(True) == text.index(":")


def test_generation_beyond_the_context_is_said(evaluator, capsys):
    evaluator.completions(["a" * 10], 1013, ("\n",), True, "x")
    assert not capsys.readouterr().out
    evaluator.max_new_tokens = 2
    evaluator.completions(["a" * 1022], 9, ("\n",), True, "x")  # with BOS 1,023 tokens
    assert "x may take 1025 tokens, and the model was made for 1024" in capsys.readouterr().out


def test_t_divides_by_full_fine_tuning_only(world):
    run = ["runs/tiny-math-farss-s0", *FILES, "--max-new-tokens", "4"]
    E.main(run)
    with pytest.raises(C.UserError, match="T divides by full fine-tuning, and this is farss"):
        E.main([*run, "--full-results", "runs/tiny-math-farss-s0"])


def test_other_questions_are_refused(world):
    E.main(["tiny", *NQ])
    lines = (world / "d/nq.jsonl").read_text().splitlines()
    (world / "d/nq.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(C.UserError, match="its nq_open has questions"):
        E.main(["runs/tiny-math-farss-s0", *NQ, "--base-results", "runs/tiny-base"])


def test_a_second_evaluation_keeps_the_other_benchmarks(world, monkeypatch, capsys):
    """Of the same weights; Ctrl-C keeps what is done; other weights begin anew."""
    all_three = ["tiny", *FILES, "--max-new-tokens", "4"]

    def counts():
        results = json.loads((world / "runs/tiny-base/results.json").read_text())
        return {name: b["n"] for name, b in results["benchmarks"].items()}

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(E.PROTOCOLS, "greedy_match",
                      E.PROTOCOLS["greedy_match"]._replace(answer=interrupt))
        with pytest.raises(KeyboardInterrupt):
            E.main(all_three)
    assert counts() == {"gsm8k": 8, "nq_open": 2}
    E.main([*all_three, "--benchmarks", "webqs"])
    E.main([*all_three, "--benchmarks", "gsm8k", "--limit", "1"])
    assert counts() == {"gsm8k": 1, "nq_open": 2, "webqs": 1}
    path = world / "runs/tiny-base/results.json"
    results = json.loads(path.read_text())
    results["benchmarks"]["squad"] = results["benchmarks"]["nq_open"]  # in no table any more
    path.write_text(json.dumps(results))
    E.main([*all_three, "--benchmarks", "webqs"])
    assert counts() == {"gsm8k": 1, "nq_open": 2, "webqs": 1}
    write_checkpoint("tiny", seed=5)
    E.main(["tiny", *NQ])
    assert counts() == {"nq_open": 2} and "is replaced" in capsys.readouterr().out


def test_a_runs_own_folder_is_asked_for_what_it_holds(tmp_path):
    """GSM8K's test file is by convention the split's; MATH's has a name of its own, and is taken
    from the hub where it is not there."""
    s = S.Settings(model="x", task="math", data=str(tmp_path))
    assert E.own_source(s, "gsm8k") == str(tmp_path) and E.own_source(s, "math") == "math-test"
    (tmp_path / "MATH_test.jsonl").touch()
    assert E.own_source(s, "math") == str(tmp_path) and E.own_source(s, "nq_open") == "nq_open"


# ------------------------------------------------------------------- benchmarks of several scores


IFEVAL = ["--benchmarks", "ifeval,nq_open", "--data", "ifeval=ifeval.jsonl", "nq_open=d/nq.jsonl",
          "--max-new-tokens", "4"]


def test_several_scores_of_a_benchmark_are_columns_everywhere(world, monkeypatch, capsys):
    """Stored, printed, in the table, in Avg, and in T against full fine-tuning by column; without
    the checkers the outputs are there and the scores undefined."""
    (world / "ifeval.jsonl").write_text("".join(
        json.dumps(ROWS["ifeval"] | {"key": i}) + "\n" for i in range(4)))
    for folder in (world / "runs").iterdir():  # as if they had been trained on instructions
        run = json.loads((folder / "run.json").read_text())
        run["settings"]["task"] = "instruction"
        (folder / "run.json").write_text(json.dumps(run))

    def judge(output, gold):
        return {"P-S": [gold["key"] < 1], "P-L": [gold["key"] < 2], "I-S": [True, gold["key"] < 2],
                "I-L": [True, True, gold["key"] < 2]}

    row = E.BENCHMARKS["ifeval"]._replace(prepare=None)
    monkeypatch.setitem(E.BENCHMARKS, "ifeval", row._replace(judge=lambda *_: None))
    E.main(["tiny", "--task", "instruction", *IFEVAL])
    out = capsys.readouterr().out
    assert "ifeval   P-S undefined, P-L undefined, I-S undefined, I-L undefined over 4" in out
    records = [json.loads(r) for r in (world / "runs/tiny-base/eval/ifeval.jsonl").open()]
    assert len(records) == 4 and all(r["correct"] is None and r["prompt"] for r in records)
    monkeypatch.setitem(E.BENCHMARKS, "ifeval", row._replace(judge=judge))
    for name in ("full", "farss"):
        E.main([f"runs/tiny-math-{name}-s0", *IFEVAL, *(["--full-results", "runs/tiny-math-full-s0"]
                                                         if name == "farss" else [])])
    results = json.loads((world / "runs/tiny-math-farss-s0/results.json").read_text())
    four = {"P-S": 25.0, "P-L": 50.0, "I-S": 75.0, "I-L": pytest.approx(250 / 3)}
    assert results["benchmarks"]["ifeval"]["scores"] == four
    assert "score" not in results["benchmarks"]["ifeval"]
    known = results["benchmarks"]["nq_open"]["score"]
    assert results["summary"]["T"] == 1
    assert results["summary"]["Avg"] == pytest.approx((150 + 250 / 3 + known) / 5)
    assert R.scores_in(results) == four | {"nq_open": known}
    assert R.scores_in(results, "instruction") == four
    out = capsys.readouterr().out
    assert "P-S 25.00, P-L 50.00, I-S 75.00, I-L 83.33 over 4" in out
    assert out.splitlines()[-2].split()[2:7] == ["P-S", "P-L", "I-S", "I-L", "nq_open"]


def test_the_papers_instruction_row_is_compared_by_column():
    """Table 2c's full fine-tuning, and twice its scores: T = 2."""
    full = {"P-S": 17.93, "P-L": 19.59, "I-S": 30.70, "I-L": 29.14}
    mine = {"model": "llama2-7b", "task": "instruction", "benchmarks": {"ifeval": {
        "scores": {c: 2 * v for c, v in full.items()}, "n": 541, "scoring": None}}}
    assert E.summarise(mine, "paper", "paper") == {"T": pytest.approx(2), "Avg": pytest.approx(
        2 * sum(full.values()) / 4)}


def test_a_base_is_known_by_its_weights_wherever_it_lies(world, monkeypatch):
    run = world / "runs/tiny-math-farss-s0"
    argv = ["--benchmarks", "nq_open", "--data", f"nq_open={world}/d/nq.jsonl", "--max-new-tokens",
            "4"]
    (world / "elsewhere").mkdir()
    monkeypatch.chdir(world / "elsewhere")
    E.main([str(run), *argv])  # recorded by its whole path
    monkeypatch.chdir(world)
    (world / "tiny").rename(world / "moved")
    with pytest.raises(C.UserError, match="no longer there; say with --base"):
        E.main([str(run), *argv])
    E.main([str(run), *argv, "--base", "moved"])
    write_checkpoint("tiny", seed=3)
    with pytest.raises(C.UserError, match="holds other weights"):
        E.main([str(run), *argv])
