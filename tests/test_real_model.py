"""A real SmolLM2-135M against transformers: FARSS_REAL_MODEL=FOLDER pytest tests/test_real_model.py

Random weights hide what a trained model shows (large activations, merges, special tokens), so
this is worth a minute where the folder is at hand. Skipped elsewhere.
"""

import os

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from test_checkpoint import AWKWARD, same_tokens
from tiny import write_data

import checkpoint as C
import data
import eval as evaluation
import export
import farss
import fast
import model as M
import train
from fast import start, sums

FOLDER = os.environ.get("FARSS_REAL_MODEL")
pytestmark = pytest.mark.skipif(not FOLDER, reason="FARSS_REAL_MODEL names no folder")

PROMPTS = [
    "The capital of France is",
    "Question: Natalia sold 48 clips in April and half as many in May. How many in all?\nAnswer:",
    "def fibonacci(n):\n",
]
MORE = [
    "The quick brown fox jumps over the lazy dog.", "   leading", "trailing   ", "\n\n\n### x",
    "don't can't I'll", "HELLO hello HeLLo", "$\\frac{1}{2}$ + \\boxed{42}", "a\tb\t\tc", "0x7fFF",
    "https://example.org/a?b=c&d=%20", "<|im_start|>user\nhi<|im_end|>\n",
    "\u0645\u0631\u062d\u0628", "\u043f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\U0001f1eb\U0001f1f7\U0001f600",
    "1,000,000.00 and 12345678901234567890",
]


@pytest.fixture(scope="module")
def ours():
    return C.load(FOLDER, torch.float32, "cpu")


@pytest.fixture(scope="module")
def theirs():
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return C.Tokenizer(FOLDER, C.read_config(FOLDER))


@pytest.mark.parametrize("text", (AWKWARD + MORE)[:50], ids=ascii)
def test_tokenizer(tokenizer, hf_tokenizer, text):
    same_tokens(tokenizer, hf_tokenizer, text)


@pytest.fixture(scope="module")
def hf_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


def test_fifty_strings():
    assert len(set(AWKWARD + MORE)) >= 50


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_logits_and_loss(ours, theirs, tokenizer, prompt):
    ids = torch.tensor([tokenizer.encode(prompt)])
    logits, out = ours(ids), theirs(input_ids=ids, labels=ids)
    # fp32 through 30 blocks: 1e-5 of the logits' size, and the same ranking at every position
    assert (logits - out.logits).abs().max() < 1e-4 * out.logits.abs().max()
    assert logits.argmax(-1).equal(out.logits.argmax(-1))
    total, n = ours.loss(ids, ids)
    assert n == ids.shape[1] - 1
    torch.testing.assert_close(total / n, out.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        total, F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="sum"), rtol=1e-5, atol=0)
    assert total / n < 6, "a trained model knows English; a random one is at ln 49152 = 10.8"


def greedy(theirs, tokenizer, prompts):
    """24 new tokens of transformers' for each prompt, padded on the left, cut at EOS."""
    longest, pad = max(map(len, prompts)), tokenizer.eos_id
    out = theirs.generate(
        input_ids=torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        do_sample=False, max_new_tokens=24, eos_token_id=list(tokenizer.eos_ids), pad_token_id=pad)
    rows = out[:, longest:].tolist()
    return [row[: next((i for i, t in enumerate(row) if t in tokenizer.eos_ids), None)]
            for row in rows]


def test_greedy_tokens(ours, theirs, tokenizer):
    """One batch of unequal lengths."""
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    assert len(set(map(len, prompts))) == 3
    new = M.generate(ours, prompts, 24, tokenizer.eos_ids)
    assert new == greedy(theirs, tokenizer, prompts)
    assert "Paris" in tokenizer.decode(new[0])


def test_exports_go_on_with_the_same_text(tmp_path, monkeypatch, tokenizer, ours):
    """A short FARSS run in every format: transformers, with peft where that is, and this project
    generate the run's own tokens, which are no longer the base's."""
    monkeypatch.chdir(tmp_path)
    write_data("d")
    train.main(["--model", FOLDER, "--data", "d/train.jsonl", "--rank", "8", "--r-avg", "3",
                "--r-max", "4", "--calibration-examples", "4", "--batch-size", "2", "--steps", "4",
                "--lr", "2e-2", "--max-length", "128", "--targets", "q_proj,v_proj", "--dropout",
                "0", "--dtype", "float32", "--out", "run"])
    for form in export.FORMATS:
        export.main(["run", "--to", form, "--format", form])
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    run = C.load(FOLDER, torch.float32, "cpu")
    C.load_adapter(run, "run/adapter.safetensors")
    expected = M.generate(run.eval(), prompts, 24, tokenizer.eos_ids)
    assert expected != M.generate(ours, prompts, 24, tokenizer.eos_ids)

    def transformers_model(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def peft_model(base, adapter):
        return peft.PeftModel.from_pretrained(transformers_model(base), adapter)

    def back(adapter, base):
        return evaluation.load_target(evaluation.find_target(adapter, base), "float32", "cpu")

    for theirs in (lambda: peft_model(FOLDER, "peft"), lambda: transformers_model("merged"),
                   lambda: peft_model("residual", "residual/adapter")):
        assert greedy(theirs().eval(), tokenizer, prompts) == expected
    for mine in (lambda: back("peft", FOLDER), lambda: C.load("merged", torch.float32, "cpu"),
                 lambda: back("residual/adapter", "residual")):
        assert M.generate(mine(), prompts, 24, tokenizer.eos_ids) == expected


def test_tokens_summed_first_choose_the_same_directions(monkeypatch, ours, tokenizer):
    """The 64 highest-scoring of each layer, beside those of fp32 tokens along the directions: all
    where the model is fp32; where it is bf16, as many as of bf16 tokens along the directions."""
    monkeypatch.setattr(sums, "STRIPE", 100)  # of a width of 576
    examples = [data.Example(ids := tokenizer.encode(text), len(ids) // 2)
                for text in (*PROMPTS, *MORE) if len(text) > 20]
    batch, budget = data.collate(examples, "cpu"), farss.Budget(0, 64, 1, 1, 1)
    names = M.linear_names(ours, M.DECODER_TARGETS["seven"])

    def chosen(model, first):
        monkeypatch.setattr(start, "sums_first", lambda *_: first)
        return {n: set(x.index.tolist())
                for n, x in fast.measure(model, [batch], names, budget).items()}

    expected = chosen(ours, False)
    assert chosen(ours, True) == expected
    rounded, shared = C.load(FOLDER, torch.bfloat16, "cpu"), []
    for first in (False, True):
        found = chosen(rounded, first)
        shared.append(sum(len(found[name] & expected[name]) for name in names) / 64 / len(names))
    assert shared[1] == pytest.approx(shared[0], abs=1e-3) and shared[1] > 0.97


def test_farss_end_to_end(tmp_path, monkeypatch, tokenizer):
    """Initialise, fine-tune for a few steps, save, load, evaluate: the held-out loss falls."""
    monkeypatch.chdir(tmp_path)
    real = os.environ.get("FARSS_REAL_DATA")
    if real:
        files = [f"{real}/gsm8k_{part}.jsonl" for part in ("train", "test")]
        names = [f"nq_open={real}/nq_open_dev.jsonl", f"webqs={real}/webqs_test.json"]
    else:
        write_data("d")
        files, names = ["d/train.jsonl", "d/test.jsonl"], ["nq_open=d/nq.jsonl",
                                                           "webqs=d/webqs.json"]
    ids = torch.tensor([tokenizer.encode(PROMPTS[1])])
    seen = {}
    attach = M.attach

    def spy(model, *args):
        with torch.no_grad():
            before = model(ids)
            lost = attach(model, *args)
            seen["difference"] = (model(ids) - before).abs().max() / before.abs().max()
        return lost

    monkeypatch.setattr(M, "attach", spy)
    train.main(["--model", FOLDER, "--data", files[0], "--rank", "32", "--r-avg", "12", "--r-max",
                "16", "--calibration-examples", "4", "--batch-size", "4", "--steps", "5", "--lr",
                "5e-4", "--examples", "200", "--max-length", "256", "--out", "run"])
    assert seen["difference"] < 1e-5  # fp32: the start leaves the function as it was
    report = C.read_json("run/ranks.json")
    shallow = {n: x["I"] for n, x in report["layers"].items() if x["shallow"]}
    assert len(shallow) == 7 * 7 and len(report["layers"]) == 7 * 30
    expected = farss.allocate_ranks(shallow, 12, 1, 16)
    assert all(x["r"] == expected.get(n, 32) for n, x in report["layers"].items())
    assert min(expected.values()) < max(expected.values())
    ask = ["--data", f"gsm8k={files[1]}", *names, "--limit", "4", "--max-new-tokens", "16",
           "--benchmarks", "gsm8k,nq_open,webqs"]
    evaluation.main([FOLDER, *ask, "--out", "base"])
    evaluation.main(["run", *ask, "--base-results", "base"])
    base, run = (C.read_json(f"{d}/results.json")["benchmarks"] for d in ("base", "run"))
    assert run["gsm8k"]["answer_loss"] < base["gsm8k"]["answer_loss"] - 0.01
