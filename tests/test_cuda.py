"""The whole path on a GPU beside the CPU, in bf16 and fp32. Skipped without one.

A first run on new hardware: `python -m pytest tests/test_cuda.py`.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from baselines import METHODS
from tiny import KINDS, tiny_batch, tiny_llama, write_checkpoint, write_data

import checkpoint as C
import eval as E
import farss
import model as M
import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = ["--model", "tiny", "--data", "d/train.jsonl", "--rank", "6", "--r-avg", "3", "--r-max",
         "5", "--calibration-examples", "8", "--batch-size", "4", "--lr", "1e-3", "--steps", "6"]


def on_both(make, dtype):
    """make() on the CPU in fp32, and on the GPU in `dtype`."""
    return make(), make().to("cuda", dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, dtype, bound):
    cpu, gpu = on_both(lambda: tiny_llama(**KINDS[kind]), dtype)
    batch = tiny_batch([(5, 6), (3, 9), (7, 2)])
    mask = batch["attention_mask"].flip(1)  # padded on the left
    expected = cpu(batch["input_ids"], mask)
    logits = gpu(batch["input_ids"].cuda(), mask.cuda()).float().cpu()
    assert (logits - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("keep_on", [None, "cpu"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
def test_factors_of_the_sweep(dtype, bound, keep_on):
    cpu, gpu = on_both(tiny_llama, dtype)
    batch = tiny_batch([(5, 6), (3, 9), (7, 2)])
    names = M.linear_names(cpu, SEVEN)
    expected = farss.kfac_factors(cpu, [batch], names)
    there = {k: v.cuda() for k, v in batch.items()}
    for factors, _ in farss.sweep(gpu, [there], names, keep_on=keep_on):
        for name, pair in factors.items():
            for mine, theirs in zip(pair, expected[name], strict=True):
                assert (mine.cpu() - theirs).norm() <= bound * theirs.norm(), name


def test_moments_of_bf16_by_tensor_cores_are_those_of_fp64():
    """Products of bf16 numbers are exact in TF32, and their sums fp32."""
    rows, sums = torch.randn(700, 2100, dtype=torch.bfloat16, device="cuda"), {}
    for part in rows.split(100):
        farss.add_outer(sums, "x", part)
    farss.mirror(sums["x"])
    expected = rows.double().T @ rows.double()
    assert (sums["x"] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
def test_scores(monkeypatch, dtype, bound, first):
    monkeypatch.setattr(farss, "sums_first", lambda *_: first)
    cpu, gpu = on_both(tiny_llama, dtype)
    batch = tiny_batch([(5, 6), (3, 9), (7, 2)])
    names, budget = M.linear_names(cpu, SEVEN), farss.Budget(0, 4, 1, 1, 1)
    expected = farss.measure(cpu, [batch], names, budget)
    found = farss.measure(gpu, [{k: v.cuda() for k, v in batch.items()}], names, budget)
    for name in names:
        assert (found[name].s - expected[name].s).norm() <= bound * expected[name].s.norm(), name


@torch.no_grad()
def test_greedy_tokens():
    cpu, gpu = on_both(tiny_llama, torch.float32)
    prompts = [[256, 5, 9], [256, 7, 8, 9, 10, 11], [256]]
    assert M.generate(gpu, prompts, 20, (257,)) == M.generate(cpu, prompts, 20, (257,))


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-2), ("bfloat16", 1e-1)])
@pytest.mark.parametrize("method", METHODS)
def test_train_resume_evaluate(tmp_path, monkeypatch, method, dtype, bound):
    """Stopped in the middle and resumed, the GPU's losses are those of an undisturbed run on the
    CPU, and its adapter is evaluated."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    write_data("d")
    argv = [*SMALL, "--method", method, "--dropout", "0"]
    train.main([*argv, "--device", "cpu", "--out", "cpu"])
    inner, count = train.train_step, [0]

    def counted(*args):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args)

    monkeypatch.setattr(train, "train_step", counted)
    with pytest.raises(SystemExit):
        train.main([*argv, "--device", "cuda", "--dtype", dtype, "--out", "gpu"])
    train.main(["--resume", "gpu"])
    cpu, gpu = ([json.loads(line)["loss"] for line in Path(d, "log.jsonl").read_text().splitlines()]
                for d in ("cpu", "gpu"))
    assert gpu == pytest.approx(cpu, rel=bound)
    E.main(["gpu", "--device", "cuda", "--max-new-tokens", "4", "--data", "gsm8k=d/test.jsonl",
            "nq_open=d/nq.jsonl", "webqs=d/webqs.json"])
    results = C.read_json("gpu/results.json")["benchmarks"]
    assert set(results) == {"gsm8k", "nq_open", "webqs"}
    assert results["gsm8k"]["answer_loss"] > 0
