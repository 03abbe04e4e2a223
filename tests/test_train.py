"""train.py: initialisation, the step, exact resume, and bad input."""

import ast
import errno
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import (
    retained,
    tiny_batch,
    tiny_llama,
    tiny_roberta,
    write_checkpoint,
    write_data,
)

import checkpoint as C
import data
import eval as E
import farss
import model as M
import plan
import settings as S
import train
from methods import METHODS, covariances

REPO = Path(__file__).resolve().parent.parent
SMALL = ["--model", "tiny", "--data", "d/train.jsonl", "--rank", "6", "--r-avg", "3", "--r-max",
         "5", "--calibration-examples", "8", "--batch-size", "4", "--micro-batch", "4",
         "--no-checkpointing",  # not as memory has room, which decides the draws of dropout
         "--lr", "1e-3", "--steps", "6"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    write_data("d")
    return tmp_path


# ---------------------------------------------------------------------------------------- steps


def test_schedule_is_transformers_linear_schedule():
    transformers = pytest.importorskip("transformers")
    for steps, warmup in ((10, 0.0), (25, 0.03), (100, 0.1)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = transformers.get_linear_schedule_with_warmup(
            optimizer, math.ceil(warmup * steps), steps)
        for step in range(steps):
            assert train.schedule(step, steps, warmup) == pytest.approx(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()


def test_a_single_step_trains(here):
    train.main([*SMALL[:-2], "--steps", "1"])
    tensors, _ = C.load_tensors("runs/tiny-math-farss-s0/adapter.safetensors")
    name = "model.layers.3.mlp.up_proj"
    assert (tensors[f"{name}.A"] != tensors[f"{name}.A0"]).any()


def examples(n=6):
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(4, 20, (n, 2), generator=draw).tolist()
    return [data.Example(torch.randint(256, (p + r,), generator=draw).tolist(), p)
            for p, r in lengths]


def settings(**more):
    return S.Settings(**{"model": "tiny", "device": "cpu", "dtype": "float32", "lr": 1e-2,
                             "rank": 4, "alpha": 4.0, "dropout": 0.0, "micro_batch": 6,
                             "shallow": 1, "calibration_examples": 6, "r_avg": 2, "r_max": 3,
                             "checkpointing": False} | more)


def one_step(s, dtype=torch.float64, optimizer=torch.optim.SGD):
    model = tiny_llama(1, dtype)
    train.initialise(model, s, examples())
    model.train().model.gradient_checkpointing = s.checkpointing
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, train.train_step(model, examples(), s, optimizer(trained, lr=s.lr), trained)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_keeps_no_graph(method, monkeypatch):
    """Which would hold U and V of every layer until the last is done."""
    seen, attach = [], M.attach

    def watched(model, starts, *args):
        seen.extend(t for start in starts.values() for t in start if t is not None)
        return attach(model, starts, *args)

    monkeypatch.setattr(M, "attach", watched)
    model = tiny_llama(1)
    assert any(p.requires_grad for p in model.parameters())
    train.initialise(model, settings(method=method), examples())
    assert all(t.grad_fn is None for t in seen)
    assert bool(seen) == (METHODS[method].trains == "adapters")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [dict(micro_batch=1), dict(micro_batch=4),
                                  dict(checkpointing=True)])
def test_a_step_does_not_depend_on_micro_batches_or_checkpointing(method, more):
    one, (loss, norm, tokens) = one_step(settings(method=method))
    two, (loss2, norm2, tokens2) = one_step(settings(method=method, **more))
    exact = all(p.dtype == torch.float64 for p in one.parameters() if p.requires_grad)
    assert loss == pytest.approx(loss2, rel=1e-9)
    assert norm == pytest.approx(norm2, rel=1e-9 if exact else 1e-6)
    assert tokens == tokens2
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        # SGD, whose step is the gradient; LoRA's A and B are fp32 even here.
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9 if p.dtype == torch.float64 else
                                   1e-7, msg=name)


def test_one_lora_step_is_pefts(tmp_path):
    """Same start, same batch, AdamW: the same A and B afterwards as peft on transformers."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    s = settings(method="lora", alpha=8.0, micro_batch=6)
    model = tiny_llama(1)
    C.save(model, tmp_path / "hf")
    train.initialise(model, s, examples())
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0,
                        target_modules=list(M.DECODER_TARGETS["seven"])))
    layers = M.adapted_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            other = theirs.get_submodule(f"base_model.model.{name}")
            other.lora_A.default.weight.copy_(layer.A)
            assert not other.lora_B.default.weight.any()
    ordered = sorted(examples(), key=lambda e: -len(e.ids))
    for _ in range(3):  # B = 0 at first, so A moves from the second step on
        trained = [p for p in model.parameters() if p.requires_grad]
        mine = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        train.train_step(model, examples(), s, mine, trained)
        other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2,
                                  weight_decay=0.0)
        batch = data.collate(ordered)
        theirs(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        other.step()
        theirs.zero_grad()
    for name, layer in layers.items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        assert layer.B.abs().max() > 0
        torch.testing.assert_close(layer.A, other.lora_A.default.weight, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(layer.B, other.lora_B.default.weight, rtol=1e-3, atol=2e-5)


def test_full_fine_tuning_keeps_fp32_masters_under_bf16():
    """A step of 1e-5 is below bf16's resolution at 1; the fp32 masters keep it."""
    model, _ = one_step(settings(method="full", dtype="bfloat16", lr=1e-5), torch.float32,
                        torch.optim.AdamW)
    before = tiny_llama(1)
    moved = [(p - q).abs().max().item() for p, q in
             zip(model.parameters(), before.parameters(), strict=True)]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert sum(0 < m < 2e-5 for m in moved) > len(moved) * 0.9


# ------------------------------------------------------------------------- dropout, frozen thirds


@pytest.mark.parametrize("method", ["pissa", "farss"])
def test_with_exact_residual_the_first_loss_is_the_base_models_in_spite_of_dropout(method):
    """Dropout of one half on the difference, which is 0; in split mode on a part of W itself."""
    losses = [one_step(settings(method=method, dropout=0.5, residual=residual))[1][0]
              for residual in ("exact", "split")]
    base = tiny_llama(1, torch.float64).loss(**data.collate(examples()))
    loss = base[0].item() / base[1]
    assert losses[0] == pytest.approx(loss, rel=1e-9)
    assert abs(losses[1] - loss) > 0.01 * loss


@pytest.mark.parametrize("method", ["pissa", "farss", "lora-null-v2", "full"])
@pytest.mark.parametrize("freeze, frozen", [("shallow-third", {0}), ("deep-third", {3})])
def test_nothing_in_the_frozen_third_changes_and_all_else_does(method, freeze, frozen):
    """round(4 / 3) = 1 block; two steps of AdamW."""
    s, before = settings(method=method, freeze=freeze, shallow=2), tiny_llama(1)
    model = tiny_llama(1)
    train.initialise(model, s, examples())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        train.train_step(model, examples(), s, optimizer, list(trained.values()))
    assert all((p != start[n]).any() for n, p in trained.items())
    if method == "full":
        assert {n for n, _ in model.named_parameters()} - set(trained) == {
            n for n, _ in before.named_parameters() if "layers" in n
            and farss.block_index(n) in frozen}
    else:
        layers = M.adapted_layers(model)
        assert {farss.block_index(n) for n in layers} == set(range(4)) - frozen
        assert len(layers) == 21 and set(trained) == {
            f"{n}.{x}" for n in layers for x in ("B" if method == "lora-null-v2" else "AB")}
    for i in frozen:
        for name, p in before.model.layers[i].named_parameters():
            assert torch.equal(p, model.model.layers[i].get_parameter(name)), name


# -------------------------------------------------------------------- FARSS, its variants, the data


def started(**more):
    """(report, adapted layers, model) of a start on the tiny model."""
    model = tiny_llama(1)
    _, report = train.initialise(model, settings(shallow=2, **more), examples())
    return report["layers"], M.adapted_layers(model), model


def by_score(model, s):
    """{layer: (U, σ, Vᵀ) with the highest-scoring direction first}, from the plain factors."""
    def loss(model, batch):
        total, labelled = model.loss(**batch)
        return total / labelled if s.official else total

    factors = farss.kfac_factors(model, train.calibration_batches(s, examples()), s.layers(model),
                                 loss)
    found = {}
    for name, (h, delta) in factors.items():
        U, S_, Vh = torch.linalg.svd(model.get_parameter(f"{name}.weight").detach(), False)
        order = (S_**2 * (Vh @ h @ Vh.T).diag() * (U.T @ delta @ U).diag()).argsort().flip(0)
        found[name] = U[:, order], S_[order], Vh[order]
    return found


@pytest.mark.parametrize("method, ranks, low", [
    ("farss", "adaptive", (True, False)), ("farss-init", "R", (True, True)),
    ("farss-top", "R", (False, False)), ("all-high", "adaptive", (False, False))])
def test_a_variant_differs_from_farss_in_exactly_what_it_says(method, ranks, low):
    """By rank and by end of the one order; (shallow, deep)."""
    plain, _, _ = started(method="farss")
    report, layers, _ = started(method=method)
    scored = by_score(tiny_llama(1), settings())
    assert list(report) == list(layers) and set(report) == set(scored)
    for name, (U, S_, Vh) in scored.items():
        shallow = farss.block_index(name) < 2
        r = plain[name]["r"] if ranks == "adaptive" else 4
        assert report[name]["r"] == len(layers[name].A) == r
        assert report[name]["I"] == (plain[name]["I"] if report[name]["shallow"] else None)
        assert report[name]["shallow"] == (shallow and ranks == "adaptive")
        at = slice(-r, None) if low[not shallow] else slice(r)
        torch.testing.assert_close(layers[name].B @ layers[name].A, U[:, at] * S_[at] @ Vh[at],
                                   rtol=1e-3, atol=1e-4)
    assert len({x["r"] for n, x in plain.items() if farss.block_index(n) < 2}) > 1


def test_what_the_first_tokens_have_of_sigma_h():
    """Counted while the loss runs, beside every h of unpadded sequences; the loss is what it
    was, and no hook is left."""
    model, rows = tiny_llama(1, torch.float64), [(5, 6), (3, 9), (7, 2)]
    batch, names, found = tiny_batch(rows), settings().layers(model), {}
    counting = train.counting_first_tokens(farss.summed_loss, names, found)
    for part in ([0, 2], [1]):
        some = {key: value[part] for key, value in batch.items()}
        assert counting(model, some) == farss.summed_loss(model, some)
    assert not any(m._forward_pre_hooks for m in model.modules())
    texts = [{k: v[[i], : sum(rows[i])] for k, v in batch.items()} for i in range(3)]
    for name, (h, _) in retained(tiny_llama(1, torch.float64), texts, names).items():
        first, every = found[name]
        torch.testing.assert_close(first, sum(x[0].pow(2).sum() for x in h))
        torch.testing.assert_close(every, sum(x.pow(2).sum() for x in h))


def test_equal_bounds_fix_the_shallow_ranks():
    report, _, _ = started(r_min=3, r_avg=3, r_max=3)
    assert {(farss.block_index(n) < 2, x["r"]) for n, x in report.items()} == {(True, 3),
                                                                                (False, 4)}


@pytest.mark.parametrize("method", ["farss", "corda-kpm"])
def test_so_many_calibration_examples_are_drawn(method):
    """Table 5 varies their number; fewer are another start, all of them the same as more."""
    s = [settings(method=method, calibration_examples=n) for n in (2, 6, 99)]
    drawn = [sum(len(b["input_ids"]) for b in train.calibration_batches(x, examples())) for x in s]
    assert drawn == [2, 6, 6]
    two, six, many = (started(method=method, calibration_examples=n)[1] for n in (2, 6, 99))
    name = "model.layers.3.mlp.up_proj"
    assert torch.equal(six[name].A, many[name].A)
    assert not torch.allclose(two[name].A, six[name].A, atol=1e-3)


def test_calibration_on_running_text(here, monkeypatch):
    """NQ-Open's training questions, or a file's; of the training examples only where it is asked
    for, or a method needs none."""
    tokenizer = C.Tokenizer("tiny", C.config_of("tiny"))
    asked = []
    monkeypatch.setattr(data, "hub_download", lambda repo, file, **_: asked.append((repo, file))
                        or Path("d/nq.jsonl"))
    text = "capital of france\n\nwho wrote faust"
    for where in ("nq-open", "d/nq.jsonl"):
        found = train.calibration_set(settings(method="corda-kpm", task="math", calibration=where,
                                               calibration_examples=5), examples(), tokenizer)
        assert [tokenizer.decode(e.ids) for e in found] == [text] * 5
        assert all(e.targets == len(e.ids) - 1 for e in found)
    assert asked == [("google-research-datasets/nq_open",
                      "nq_open/train-00000-of-00001.parquet")]
    for more in (dict(method="corda-kpm"), dict(method="pissa", calibration="d/nq.jsonl")):
        assert train.calibration_set(settings(task="math", **more), examples(), tokenizer
                                     ) == examples()
    with pytest.raises(C.UserError, match="a classifier has no loss on running text"):
        train.calibration_set(settings(task="glue:sst2", calibration="nq-open"), [], tokenizer)


def test_a_run_calibrates_on_the_file_it_is_told(here):
    """Σ_h of FARSS and C of CorDA are other ones, while the training is on the same examples."""
    for method in ("farss", "corda-kpm"):
        for out, more in ((f"{method}-task", []), (f"{method}-text", ["--calibration",
                                                                      "d/nq.jsonl"])):
            train.main([*SMALL[:-1], "1", "--method", method, "--out", out, *more])
        one, two = (C.load_tensors(f"{method}-{x}/adapter.safetensors")[0]
                    for x in ("task", "text"))
        name = "model.layers.3.mlp.up_proj.A0"
        assert one[name].shape == two[name].shape and not torch.allclose(one[name], two[name])
        told = [S.read_run(here / f"{method}-{x}")[1]["data_sha256"] for x in ("task", "text")]
        assert told[0] == told[1]
    with pytest.raises(C.UserError, match=r"none\.jsonl: no such file"):
        train.main([*SMALL, "--out", "c", "--calibration", "none.jsonl"])


# -------------------------------------------------------------------------- the official code


def test_official_padding_is_counted():
    """Every row is padded to --max-length and all of it real, in Σ_h and in C; no loss there."""
    plain, official = settings(), settings(official=True, max_length=50)
    batches = [train.calibration_batches(s, examples()) for s in (plain, official)]
    for b in batches[1]:
        assert b["input_ids"].shape[1] == 50 and b["attention_mask"].all()
        assert b["attention_mask"].shape == b["labels"].shape == b["input_ids"].shape
    ids, padded = (torch.cat([b["input_ids"].sum(1) for b in x]) for x in batches)
    assert torch.equal(ids, padded)  # the same sequences and zeros
    targets = [sum((b["labels"] != M.IGNORE).sum() for b in x) for x in batches]
    assert targets[0] == targets[1] == sum(e.targets for e in examples())
    model = tiny_llama(1, torch.float64)
    name = "model.layers.0.mlp.up_proj"
    found = [(farss.kfac_factors(model, x, [name])[name],
              next(covariances(model, x, [name], train.run_body)))
             for x in batches]
    (h, delta), (h2, delta2) = found[0][0], found[1][0]
    tokens = sum(len(e.ids) for e in examples())
    torch.testing.assert_close(delta2, delta * tokens / 300)  # δ is 0 there, N is 6 x 50
    assert h2.trace() - h.trace() * tokens / 300 > 0.1 * h.trace()
    assert found[1][1][name].trace() > 1.1 * found[0][1][name].trace()


@pytest.mark.parametrize("method", ["farss", "corda-kpm"])
def test_official_padding_of_a_classifier(method):
    """Whose labels are one a text."""
    s = settings(official=True, method=method, task="glue:mnli", max_length=24,
                 targets="query,output.dense")
    texts = [data.Example([0, 5, 6, 7, 2][: 5 - i] + [2] * i, 5, i) for i in range(3)]
    batches = train.calibration_batches(s, texts)
    assert [len(b["labels"]) for b in batches] == [2, 1]
    assert sorted(label for b in batches for label in b["labels"].tolist()) == [0, 1, 2]
    for b in batches:
        assert b["input_ids"].shape == (len(b["labels"]), 24) and b["attention_mask"].all()
    train.initialise(tiny_roberta(), s, texts)


def test_official_gradients_are_those_of_the_mean_over_batches_of_two():
    """So a pair of short answers weighs more: Σ_δ is the sum over pairs of that of the summed
    loss, divided by the square of the pair's response tokens."""
    model, s = tiny_llama(1, torch.float64), settings(official=True, max_length=50)
    names = s.layers(model)[:1]
    batches = train.calibration_batches(s, examples())
    assert [len(b["input_ids"]) for b in batches] == [2, 2, 2]
    _, found = farss.kfac_factors(model, batches, names, train.calibration_loss(s))[names[0]]
    expected = sum(farss.kfac_factors(model, [b], names)[names[0]][1]
                   / (b["labels"] != M.IGNORE).sum() ** 2 for b in batches) / len(batches)
    torch.testing.assert_close(found, expected)


def test_the_official_residual_keeps_minus_1_56_sigma_of_the_chosen_directions():
    """α / r of each layer's own rank and no compensation: at r = 50, α = 128 W_res has
    (1 - 128 / 50) σ in the shallow layers, and the function is still W's. R = 60 is below 128, so
    deep layers have the lowest directions, too."""
    wide = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
                num_hidden_layers=2)
    s = settings(official=True, rank=60, alpha=128.0, r_min=50, r_avg=50, r_max=50, max_length=60)
    model, plain = tiny_llama(1, **wide), tiny_llama(1, **wide)
    train.initialise(model, s, examples())
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-3, atol=1e-3)
    scored = by_score(plain, s)
    for name, layer in M.adapted_layers(model).items():
        r, left_over = (50, -1.56) if farss.block_index(name) == 0 else (60, 1 - 128 / 60)
        assert layer.scaling == 128 / r and len(layer.A) == r
        U, S_, Vh = scored[name][0][:, -r:], scored[name][1][-r:], scored[name][2][-r:]
        left = (U.T @ layer.weight @ Vh.T).diag()
        torch.testing.assert_close(left, left_over * S_, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.B @ layer.A, U * S_ @ Vh, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------- runs


def test_a_run_leaves_what_it_says(here, capsys):
    train.main(SMALL)
    run = here / "runs/tiny-math-farss-s0"
    assert sorted(p.name for p in run.iterdir()) == [
        "adapter.safetensors", "log.jsonl", "loss.png", "ranks.json", "ranks.png", "run.json",
        "spectra.png", "spectra.safetensors"]
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["settings"]["lr"] == 1e-3 and recorded["settings"]["shallow"] == 1
    assert {"commit", "torch", "python", "data_sha256"} <= set(recorded)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[0]["loss"]
    report = json.loads((run / "ranks.json").read_text())
    shallow = {n: x["I"] for n, x in report["layers"].items() if x["shallow"]}
    assert len(shallow) == 7 and all(".0." in n for n in shallow)
    ranks = farss.allocate_ranks(shallow, 3, 1, 5)
    raw = farss.raw_ranks(shallow, 3)
    for name, x in report["layers"].items():
        assert x["r"] == ranks.get(name, 6) and x["r_raw"] == pytest.approx(raw.get(name))
    assert report["shallow_rank_asked"] == 21
    assert report["shallow_rank_obtained"] == sum(ranks.values())
    assert "asked 21 in all" in capsys.readouterr().out


def test_inputs_are_kept_where_there_is_room(here, monkeypatch):
    """What goes into the blocks is 0.7 MB, and the start takes 3.8 MB in all. Where that is not
    free, room for the first must be, beside the weights, or it is said before anything is done."""
    seen, measure = [], farss.measure
    monkeypatch.setattr(farss, "measure", lambda *a: seen.append(a[-1]) or measure(*a))
    weights = sum(p.nbytes for p in C.load("tiny", device="cpu").parameters())
    for free in (1e10, weights + 1e6):
        monkeypatch.setattr(plan, "device_memory", lambda device, free=free: free)
        train.main([*SMALL, "--out", f"{free:g}"])
    assert seen == [None, "cpu"]
    monkeypatch.setattr(plan, "device_memory", lambda device: weights + 5e5)
    monkeypatch.setattr(C, "load", lambda *_: 1 / 0)
    with pytest.raises(C.UserError, match=r"free: give fewer --calibration-examples"):
        train.main([*SMALL, "--out", "none"])
    assert not Path("none").exists()


def test_the_peak_of_the_start_is_the_starts_and_that_of_training_the_trainings(
        here, monkeypatch, capsys):
    """A peak that grows by 1 GB whenever something is measured or stepped, as on a GPU, from the 7
    GB that a trial of boundaries took."""
    peak = [7e9]

    def growing(call, *args, **options):
        peak[0] += 1e9
        return call(*args, **options)

    monkeypatch.setattr(farss, "measure", partial(growing, farss.measure))
    monkeypatch.setattr(train, "train_step", partial(growing, train.train_step))
    monkeypatch.setattr(plan, "memory_used", lambda device: peak[0])
    monkeypatch.setattr(plan, "forget_peak", lambda device: peak.__setitem__(0, 0.0))
    train.main([*SMALL, "--out", "run"])
    assert C.read_json("run/ranks.json")["peak_memory_gb"] == 1
    assert " s and 1.0 GB; --micro-batch" in capsys.readouterr().out
    log = [json.loads(line)["memory_gb"] for line in Path("run/log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 3, 4, 5, 6]


def test_training_and_evaluating_set_up_their_device(here, monkeypatch):
    seen = []
    for module in (train, E):
        monkeypatch.setattr(module, "use_device", lambda *args: seen.append(args))
    train.main([*SMALL, "--device", "cpu", "--out", "a"])
    train.main([*SMALL, "--device", "cpu", "--cudnn-attention", "--out", "b"])
    asked = ["--benchmarks", "gsm8k", "--data", "gsm8k=d/test.jsonl", "--limit", "1",
             "--max-new-tokens", "1", "--device", "cpu"]
    E.main(["a", *asked])
    E.main(["a", *asked, "--cudnn-attention"])
    cpu = torch.device("cpu")
    assert seen == [("cpu", False), ("cpu", True), (cpu, False), (cpu, True)]


def test_the_micro_batch_is_chosen_before_the_model_is_loaded(here, monkeypatch):
    def not_yet(*_):
        recorded.append(True)
        raise C.UserError("loaded")

    recorded, make = [], plan.make
    monkeypatch.setattr(plan, "make", lambda *a, **k: recorded.append(False) or make(*a, **k))
    monkeypatch.setattr(C, "load", not_yet)
    with pytest.raises(C.UserError, match="loaded"):
        train.main(SMALL)
    assert recorded == [False, True]


def test_a_run_killed_before_its_first_file_but_run_json_can_be_resumed(here):
    train.main([*SMALL, "--out", "whole"])
    s, recorded = S.read_run(here / "whole")
    (here / "cut").mkdir()
    S.write_run(here / "cut", s, {"data_sha256": recorded["data_sha256"]})
    train.main(["--resume", "cut"])
    one, two = ((here / d / "adapter.safetensors").read_bytes() for d in ("cut", "whole"))
    assert one == two


@pytest.mark.parametrize("method, more", [("farss", []), ("farss", ["--residual", "exact"]),
                                          ("farss", ["--fisher", "sampled"]), ("lora", [])])
def test_a_saved_adapter_is_the_trained_model(here, monkeypatch, method, more):
    kept = {}
    inner = train.train

    def spy(model, *args):
        kept["model"] = model
        return inner(model, *args)

    monkeypatch.setattr(train, "train", spy)
    train.main([*SMALL, "--method", method, *more])
    ids = torch.arange(40)[None] % 256
    model = C.load("tiny")
    C.load_adapter(model, f"runs/tiny-math-{method}-s0/adapter.safetensors")
    with torch.no_grad():
        trained = kept["model"].eval()(ids)
        assert torch.equal(model(ids), trained)  # the same bits, W_res recomputed
        assert not torch.equal(C.load("tiny")(ids), trained)
        M.merge(model)
        torch.testing.assert_close(model(ids), trained, rtol=1e-4, atol=1e-4)


def interrupt_at(monkeypatch, step, act):
    """Call `act` when the given step begins."""
    inner, count = train.train_step, [0]

    def counted(*args):
        count[0] += 1
        if count[0] == step:
            act()
        return inner(*args)

    monkeypatch.setattr(train, "train_step", counted)


@pytest.mark.parametrize("method, fused", [*((name, False) for name in METHODS), ("farss", True),
                                           ("full", True)])
@pytest.mark.parametrize("killed_in_step", [1, 3, 5])
def test_killed_and_resumed_equals_undisturbed_to_the_bit(here, monkeypatch, method, fused,
                                                          killed_in_step):
    """Also with AdamW as it is on a GPU."""
    made, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **how: (
        made.append(adamw(*args, **how)), made[-1])[1])
    monkeypatch.setattr(train, "FUSED", ("cuda", "cpu") if fused else ("cuda",))
    argv = [*SMALL, "--method", method, "--save-every", "2", "--examples", "10", "--dropout",
            "0.1"]
    train.main([*argv, "--out", "whole"])

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        interrupt_at(patch, killed_in_step, kill)
        with pytest.raises(Killed):
            train.main([*argv, "--out", "cut"])
    torch.rand(7)  # whatever else the process drew meanwhile
    with monkeypatch.context() as patch:  # the start is never computed again
        patch.setattr(farss, "measure", None)
        train.main(["--resume", "cut"])
    for file in (["model/model.safetensors"] if method == "full" else ["adapter.safetensors"]):
        assert (here / "cut" / file).read_bytes() == (here / "whole" / file).read_bytes()
    losses = [[json.loads(line)["loss"] for line in (here / d / "log.jsonl").open()]
              for d in ("cut", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert {bool(optimizer.defaults["fused"]) for optimizer in made} == {fused}
    assert not (here / "cut/checkpoint").exists()


@pytest.mark.parametrize("fused, device", [(True, "meta"), (None, "cpu")])
def test_a_fused_adamw_resumes_with_its_step_where_the_parameter_is(tmp_path, fused, device):
    """As a GPU's must have it; the meta device stands for one. Else it stays on the CPU."""
    belongs = {"start": None, "settings": {}}
    there = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([there])
    there.sum().backward()
    optimizer.step()
    train.save_checkpoint(tmp_path / "x.safetensors", 5, {"x": there}, optimizer, belongs)
    here = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([here])
    optimizer.defaults["fused"] = fused
    assert train.load_checkpoint(tmp_path / "x.safetensors", {"x": here}, optimizer, belongs) == 5
    state = optimizer.state[here]
    assert state["step"].device.type == device and state["exp_avg"].device.type == "meta"


def test_resume_refuses_another_base_and_takes_a_moved_one(here, monkeypatch):
    train.main([*SMALL, "--out", "whole"])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train.main([*SMALL, "--out", "cut"])
    (here / "tiny").rename(here / "moved")
    write_checkpoint("tiny", seed=9)
    with pytest.raises(C.UserError, match="holds other weights"):
        train.main(["--resume", "cut"])
    train.main(["--resume", "cut", "--base", "moved"])
    one, two = ((here / d / "adapter.safetensors").read_bytes() for d in ("cut", "whole"))
    assert one == two


def test_a_resumed_run_may_change_what_the_machine_can_do(here, monkeypatch):
    """An out-of-memory run goes on with a smaller micro-batch; anything else is refused."""
    argv = [*SMALL, "--dropout", "0"]
    train.main([*argv, "--out", "whole"])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train.main([*argv, "--out", "cut"])
    train.main(["--resume", "cut", "--micro-batch", "1", "--checkpointing"])
    one, two = (C.load_tensors(here / d / "adapter.safetensors")[0] for d in ("cut", "whole"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_a_run_of_an_older_version_has_the_default_of_a_newer_setting(here, capsys):
    train.main(SMALL)
    run = here / "runs/tiny-math-farss-s0"
    recorded = C.read_json(run / "run.json")
    del recorded["settings"]["residual"]
    C.save_json(run / "run.json", recorded)
    assert S.read_run(run)[0].residual == "split"
    assert "default taken for residual" in capsys.readouterr().out


def test_what_does_not_fit_is_said(here, capsys):
    """Rows cut at --max-length, rows longer than the model's context, too few for calibration."""
    write_checkpoint("short", max_position_embeddings=150)
    rows = [{"question": "q?", "answer": "step. " * k + "\n#### 3"} for k in (1, 90, 90)]
    Path("long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["--model", "short", "--data", "long.jsonl", "--max-length", "300", *SMALL[4:]]
    train.main(argv)
    out = capsys.readouterr().out
    assert "(question + answer); 2 cut after 300 tokens, so without their end" in out
    assert "short was made for 150 tokens" in out and "calibration on 3 examples, not 8" in out
    assert S.read_run(Path("runs/short-math-farss-s0"))[1]["cut_rows"] == 2


def test_full_memory_is_one_line_with_what_to_try(here, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't "
                           "allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(SystemExit) as stop:
        S.run_main(lambda: train.main(SMALL), "try less")
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and err.endswith("; try less\n")
    with pytest.raises(RuntimeError, match="invalid for input of size"):  # a bug stays one
        S.run_main(lambda: torch.ones(2, 3).view(7))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(here, monkeypatch, capsys, number):
    train.main([*SMALL, "--out", "whole"])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            train.main([*SMALL, "--out", "cut"])
    assert stop.value.code == 130
    assert "python train.py --resume cut" in capsys.readouterr().out
    assert (here / "cut/checkpoint/step-000003.safetensors").exists()
    train.main(["--resume", "cut"])
    one, two = ((here / d / "adapter.safetensors").read_bytes() for d in ("cut", "whole"))
    assert one == two


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place, name, says, next_argv", [
    ("data", "training_set", "nothing was kept; the same command starts again", None),
    ("train", "initialise", "only the settings are kept, and no start; go on with: "
     "python train.py --resume cut", ["--resume", "cut"]),
    ("train", "show_start", "cut/checkpoint/init.safetensors is kept; go on with: "
     "python train.py --resume cut", ["--resume", "cut"]),
    ("train", "resume", "cut/checkpoint/init.safetensors is kept; go on with: "
     "python train.py --resume cut", ["--resume", "cut"]),
    ("figures", "plotting", "cut is finished; evaluate it with: python eval.py cut", []),
])
def test_a_signal_before_or_after_the_steps_says_what_is_kept(
        here, monkeypatch, capsys, number, place, name, says, next_argv):
    train.main([*SMALL, "--out", "whole"])
    capsys.readouterr()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(f"{place}.{name}", lambda *_: os.kill(os.getpid(), number))
        S.run_main(lambda: train.main([*SMALL, "--out", "cut"]))
    err = capsys.readouterr().err
    assert stop.value.code == 130 and err.endswith(f": interrupted; {says}\n")
    assert err.count("\n") == 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    if next_argv != []:
        train.main(next_argv or [*SMALL, "--out", "cut"])
    one, two = ((here / d / "adapter.safetensors").read_bytes() for d in ("cut", "whole"))
    assert one == two


def test_a_signal_after_a_checkpoint_names_it(here, monkeypatch, capsys):
    """Here while a run is resumed, before its first step."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train.main([*SMALL, "--out", "cut"])
    with monkeypatch.context() as patch, pytest.raises(
            KeyboardInterrupt, match=r"step-000003\.safetensors is kept; .* --resume cut$"):
        patch.setattr(train, "resume", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        train.main(["--resume", "cut"])


def test_runs_are_reproducible_and_seeds_differ(here):
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train.main([*SMALL, "--seed", seed, "--out", out])
    a, b, c = ((here / d / "adapter.safetensors").read_bytes() for d in "abc")
    assert a == b != c


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(here, monkeypatch, capsys):
    inner, count = M.CausalLM.loss, [0]

    def poisoned(self, *args, **kwargs):
        loss, n = inner(self, *args, **kwargs)
        count[0] += self.training
        return (loss * float("nan") if self.training and count[0] == 5 else loss), n

    monkeypatch.setattr(M.CausalLM, "loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, "--save-every", "2"])
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert "step 5: loss nan" in err and "step-000004.safetensors" in err
    monkeypatch.setattr(M.CausalLM, "loss", inner)
    train.main(["--resume", "runs/tiny-math-farss-s0"])


def rows_named(err):
    return [int(n) for n in re.search(r"on rows ([\d, ]+) of d/train.jsonl", err)[1].split(", ")]


def test_rows_of_a_bad_step_are_lines_of_the_file(here, monkeypatch, capsys):
    """One row's tokens make the loss NaN: it is among those named, whatever was drawn or dropped
    before it."""
    lines = Path("d/train.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"question": "x " * 200, "answer": "dropped"})  # no room for its answer
    lines[41] = json.dumps({"question": "~~~?", "answer": "1\n#### 1"})
    Path("d/train.jsonl").write_text("\n".join(lines))
    inner, step = M.CausalLM.loss, train.train_step

    def poisoned(self, input_ids, labels, *args, **kwargs):
        loss, n = inner(self, input_ids, labels, *args, **kwargs)
        bad = self.training and (input_ids == ord("~") - 33).sum() > 2  # its byte's token
        return (loss * float("nan") if bad else loss), n

    seen = []
    monkeypatch.setattr(train, "train_step", lambda model, batch, *a: (
        seen.append(batch), step(model, batch, *a))[1])
    monkeypatch.setattr(M.CausalLM, "loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL[:-2], "--epochs", "1", "--max-length", "200"])
    assert stop.value.code == 1
    named, tokenizer = rows_named(capsys.readouterr().err), C.Tokenizer("tiny", C.config_of("tiny"))
    assert 42 in named and len(named) == len(seen[-1]) >= 3 and 1 not in named
    texts = [tokenizer.decode(e.ids) for e in seen[-1]]
    questions = [json.loads(lines[n - 1])["question"] for n in named]
    assert all(any(q in text for text in texts) for q in questions)


@pytest.mark.parametrize("method", ["farss", "full"])
@pytest.mark.parametrize("diverges_in, kept", [(4, "step-000002"), (6, "step-000004")])
def test_weights_that_are_not_finite_are_never_saved(here, monkeypatch, capsys, method,
                                                     diverges_in, kept):
    """The loss and gradient of that step are finite; it would be saved, or is the last."""
    step, count = train.train_step, [0]

    def infinite(model, batch, s, optimizer, trained):
        found = step(model, batch, s, optimizer, trained)
        count[0] += 1
        if count[0] == diverges_in:
            with torch.no_grad():
                trained[-1].view(-1)[-1] = math.inf
        return found

    argv = [*SMALL, "--save-every", "2", "--method", method]
    train.main([*argv, "--out", "whole"])
    monkeypatch.setattr(train, "train_step", infinite)
    with pytest.raises(SystemExit) as stop:
        train.main([*argv, "--out", "cut"])
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 + err.count("\r")
    assert f"step {diverges_in}: weights that are not finite after loss " in err
    assert f"Last checkpoint: cut/checkpoint/{kept}.safetensors" in err and rows_named(err)
    assert not list(here.glob("cut/adapter*")) and not list(here.glob("cut/model"))
    train.main(["--resume", "cut"])  # by then it is finite
    file = "model/model.safetensors" if method == "full" else "adapter.safetensors"
    assert (here / "cut" / file).read_bytes() == (here / "whole" / file).read_bytes()


# --------------------------------------------------------------------------- the same once more


@pytest.mark.parametrize("more", [["--method", "farss", "--dropout", "0.1", "--micro-batch", "2"],
                                  ["--method", "lora", "--threads", "1"], ["--method", "full"]])
def test_from_run_is_the_same_to_the_bit(here, capsys, more):
    train.main([*SMALL, *more, "--alpha", "9", "--out", "one"])
    capsys.readouterr()
    train.main(["--from-run", "one", "--out", "two"])
    out = capsys.readouterr().out
    assert "\n  the run one: " in out and "command line" not in out and "lr 0.001" in out
    file = "model/model.safetensors" if "full" in more else "adapter.safetensors"
    assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    one, two = (C.read_json(f"{run}/run.json") for run in ("one", "two"))
    assert two.pop("from_run") == "one" and one.pop("from_run") is None
    assert two["settings"].pop("threads") == int(one["threads"])
    one["settings"].pop("threads")
    assert one | {"commit": ""} == two | {"commit": ""}  # someone may be at work here
    assert one["rows"] == 96 and one["calibration_batch"] == 2  # of 512 tokens
    assert {"commit", "torch", "tokenizers", "safetensors", "python", "threads"} <= set(one)
    assert one["settings"]["micro_batch"] > 0


def test_flags_go_on_top_of_a_run(here, capsys):
    train.main([*SMALL, "--alpha", "12", "--out", "one"])
    capsys.readouterr()
    train.main(["--from-run", "one", "--seed", "5", "--rank", "3", "--out", "two"])
    assert "the command line: rank 3, seed 5" in capsys.readouterr().out
    one, two = (vars(S.read_run(Path(run))[0]) for run in ("one", "two"))
    unlike = {name: two[name] for name in one if one[name] != two[name]}
    assert unlike == {"seed": 5, "rank": 3, "alpha": 6.0, "threads": torch.get_num_threads()}
    assert one["alpha"] == 12
    train.main([*SMALL, "--seed", "5", "--rank", "3", "--alpha", "6", "--out", "three"])
    a, b = (Path(run, "adapter.safetensors").read_bytes() for run in ("two", "three"))
    assert a == b


def test_from_run_needs_the_same_base_and_data(here):
    train.main([*SMALL, "--out", "one"])
    Path("tiny").rename("moved")
    with pytest.raises(C.UserError, match="no longer there; say with --base"):
        train.main(["--from-run", "one", "--out", "two"])
    train.main(["--from-run", "one", "--out", "two", "--base", "moved"])
    assert Path("one/adapter.safetensors").read_bytes() == Path(
        "two/adapter.safetensors").read_bytes()
    write_data("d", seed=1)
    with pytest.raises(C.UserError, match="not the data that one was started with"):
        train.main(["--from-run", "one", "--out", "three", "--base", "moved"])
    train.main(["--from-run", "one", "--out", "three", "--base", "moved", "--seed", "3"])
    assert C.read_json("three/run.json")["base"] == str(here / "moved")


# ------------------------------------------------------------------------- damaged, other, stale


@pytest.fixture
def stopped(here, monkeypatch):
    """A run that was undisturbed, and one that was stopped behind step 5."""
    train.main([*SMALL, "--out", "whole", "--save-every", "2"])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train.main([*SMALL, "--out", "cut", "--save-every", "2"])
    assert sorted(p.name for p in (here / "cut/checkpoint").iterdir()) == [
        "init.safetensors", "step-000004.safetensors", "step-000005.safetensors"]
    return here / "cut"


def damage(path, how):
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:  # one bit of the numbers, or of what the header says
        at = len(whole) - 7 if how == "flipped" else whole.index(b"lr") + 1
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "header"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped, capsys, how):
    damage(stopped / "checkpoint/step-000005.safetensors", how)
    capsys.readouterr()
    train.main(["--resume", "cut"])
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(said) == 1 and "cut/checkpoint/step-000005.safetensors: damaged" in said[0]
    assert said[0].endswith("going on from step-000004.safetensors")
    same(stopped)


def same(run):
    one, two = ((run.parent / d / "adapter.safetensors").read_bytes() for d in ("cut", "whole"))
    assert one == two
    losses = [[json.loads(line)["loss"] for line in (run.parent / d / "log.jsonl").open()]
              for d in ("cut", "whole")]
    assert losses[0] == losses[1]


def test_all_checkpoints_and_the_start_damaged_is_a_run_from_the_start(stopped, capsys):
    for path in (stopped / "checkpoint").iterdir():
        damage(path, "flipped")
    train.main(["--resume", "cut"])
    out = capsys.readouterr().out
    assert "init.safetensors: damaged" in out and "the start is computed again" in out
    assert out.count("damaged") == 3 and "going on from the first step" in out
    same(stopped)


def test_a_damaged_start_comes_out_the_same_or_the_run_ends(stopped, monkeypatch):
    """Checkpoints go on from one W_res only."""
    damage(stopped / "checkpoint/init.safetensors", "flipped")
    start = train.start_from_fisher

    def other(*args):
        starts, report = start(*args)
        return {n: x._replace(A0=x.A0 * 1.5) for n, x in starts.items()}, report

    with monkeypatch.context() as patch:
        patch.setitem(train.STARTS, "fisher", other)
        with pytest.raises(C.UserError, match="goes on from another start"):
            train.main(["--resume", "cut"])
    (stopped / "checkpoint/init.safetensors").unlink()
    train.main(["--resume", "cut"])
    same(stopped)


def test_resume_refuses_settings_that_were_changed_and_says_which(stopped):
    recorded = C.read_json(stopped / "run.json")
    changed = recorded["settings"] | {"lr": 0.5, "clip": 9.0, "save_every": 1}
    C.save_json(stopped / "run.json", recorded | {"settings": changed})
    with pytest.raises(C.UserError, match=r"was made with lr 0.001, not 0.5; clip 1.0, not 9.0"):
        train.main(["--resume", "cut"])
    C.save_json(stopped / "run.json", recorded | {"settings": changed | {"lr": 1e-3, "clip": 1.0}})
    train.main(["--resume", "cut"])
    same(stopped)


def test_a_checkpoint_of_another_seed_is_refused(stopped):
    train.main([*SMALL, "--seed", "1", "--out", "other"])
    (stopped / "checkpoint/init.safetensors").write_bytes(
        Path("other/adapter.safetensors").read_bytes())
    with pytest.raises(C.UserError, match="goes on from another start"):
        train.main(["--resume", "cut"])


def test_a_kill_before_the_first_file_leaves_a_folder_to_start_in(here):
    Path("cut").mkdir()
    Path("cut/run.json.tmp").write_text("{")
    train.main([*SMALL, "--out", "cut"])
    assert C.read_json("cut/run.json")


def test_a_kill_while_the_checkpoints_go_leaves_a_finished_run(here, monkeypatch):
    class Killed(BaseException):
        pass

    remove = train.shutil.rmtree

    def kill(folder, **options):
        if "checkpoint" not in Path(folder).name:
            return remove(folder, **options)
        next(iter(Path(folder).iterdir())).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            train.main([*SMALL, "--out", "cut"])
    assert S.finished(Path("cut")) and Path("cut/checkpoint.tmp").exists()
    with pytest.raises(C.UserError, match="is finished"):
        train.main(["--resume", "cut"])
    assert not Path("cut/checkpoint.tmp").exists()


def test_compiling_is_for_training_and_evaluation_and_may_change_on_resume(stopped, monkeypatch):
    seen = []
    monkeypatch.setattr(M, "compile_parts", lambda model: seen.append(bool(
        M.adapted_layers(model))))
    train.main(["--resume", "cut", "--compile"])
    E.main(["cut", "--benchmarks", "gsm8k", "--data", "gsm8k=d/test.jsonl", "--limit", "1",
            "--max-new-tokens", "1", "--compile"])
    assert seen == [True, False]  # eval.py merges adapters first
    assert json.loads(Path("cut/results.json").read_text())["compiled"] is True


def test_every_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """fsync of the file, the new name, fsync of the folder: in this order, for texts, tensors,
    streamed tensors and copies."""
    done = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (done.append(
        Path(os.readlink(f"/proc/self/fd/{d}")).name), sync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("->"), rename(a, b)))
    C.save_text(tmp_path / "a", "text")
    C.save_sealed(tmp_path / "b", {"x": torch.ones(2)}, "adapter", {})
    C.stream_tensors(tmp_path / "c", {"x": ((2,), torch.float32)}, {}, lambda _: torch.ones(2))
    assert done == [word for name in "abc" for word in (f"{name}.tmp", "->", tmp_path.name)]


def test_no_file_is_written_but_by_atomic():
    """But logs and kept answers, whose lines are added, and what a sandbox and bench_gpu.py have of
    their own."""
    left = {}
    for file in [*REPO.glob("*.py"), *REPO.glob("fast/*.py"), *REPO.glob("methods/*.py")]:
        tree = ast.parse(file.read_text())
        inside = {id(n) for node in ast.walk(tree) if isinstance(node, ast.With)
                  for item in node.items if "atomic(" in ast.unparse(item.context_expr)
                  for n in ast.walk(node)}
        for node in ast.walk(tree):
            said = ast.unparse(node) if isinstance(node, ast.Call) else ""
            writes = re.search(r"\.write_(text|bytes)\(|copyfile\(|savefig\(", said) or (
                said.startswith("open(") and re.search(r", '[wax]b?'", said))
            if writes and id(node) not in inside:
                left.setdefault(file.stem, []).append(said)
    assert left.pop("sandbox") and left.pop("bench_gpu")
    assert left == {"train": ["open(log if parallel.first() else os.devnull, 'a')"],
                    "export": ["open(temporary / MARK, 'a')"],
                    "results": ["open(path, 'ab')"], "sweep": ["open(f'{job.run}.log', 'a')"]}


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(here, monkeypatch, capsys):
    real = C.stream_tensors
    calls = [0]

    def full(path, layout, metadata, tensor_of):
        calls[0] += 1
        if calls[0] == 4:  # spectra, init, step 2, then step 4
            def tensor_of(name):  # the header is written then
                raise OSError(errno.ENOSPC, "No space left on device")
        real(path, layout, metadata, tensor_of)

    monkeypatch.setattr(C, "stream_tensors", full)
    with pytest.raises(SystemExit) as stop:
        S.run_main(lambda: train.main([*SMALL, "--save-every", "2"]))
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and "No space left" in err
    left = sorted(p.name for p in (here / "runs/tiny-math-farss-s0/checkpoint").iterdir())
    assert left == ["init.safetensors", "step-000002.safetensors"]


def refused_by_the_system(capsys, argv, says):
    """One line, exit status 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        S.run_main(lambda: train.main(argv))
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(err) == 1 and says in err[0]


def left(run):
    return sorted(p.name for p in (run / "checkpoint").iterdir())


def test_a_file_larger_than_may_be_written(stopped, monkeypatch, capsys):
    """The system's own limit, in the fourth step: the checkpoint of the second is whole."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = (stopped / "checkpoint/step-000005.safetensors").stat().st_size - 1
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE,
                                                          (most, before[1])))
        try:
            refused_by_the_system(capsys, [*SMALL, "--out", "full", "--save-every", "2"],
                                  "File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(Path("full")) == ["init.safetensors", "step-000002.safetensors"]
    train.main(["--resume", "full"])
    assert Path("full/adapter.safetensors").read_bytes() == Path(
        "whole/adapter.safetensors").read_bytes()


def test_a_disk_that_is_full(stopped, capsys):
    """A file system of its own, with room for the start and two checkpoints."""
    files = [*stopped.glob("*.*"), *stopped.glob("checkpoint/*")]
    step = (stopped / "checkpoint/step-000005.safetensors").stat().st_size
    disk, most = Path("disk").resolve(), step // 2 + sum(
        4096 * (2 + p.stat().st_size // 4096) for p in files)
    disk.mkdir()

    def mount(*options):
        done = subprocess.run(["mount", *options, "tmpfs", disk], capture_output=True)
        return done.returncode == 0

    try:
        mounted = mount("-t", "tmpfs", "-o", f"size={most}")
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    try:
        argv = [*SMALL, "--out", str(disk / "run"), "--save-every", "1"]
        refused_by_the_system(capsys, argv, "No space left on device")
        assert left(disk / "run") == ["init.safetensors", "step-000001.safetensors",
                                      "step-000002.safetensors"]
        assert mount("-o", "remount,size=100m")
        train.main(["--resume", str(disk / "run")])
        assert (disk / "run/adapter.safetensors").read_bytes() == Path(
            "whole/adapter.safetensors").read_bytes()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written(here, capsys):
    """What binds root, too: a file where a folder should be."""
    Path("runs").write_text("")
    refused_by_the_system(capsys, SMALL, "runs")
    refused_by_the_system(capsys, [*SMALL, "--out", "runs/x"], "runs")
    assert Path("runs").read_text() == ""


def test_data_that_went_between_stop_and_resume(stopped, capsys):
    Path("d").rename("elsewhere")
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    with pytest.raises(C.UserError, match=r"d/train\.jsonl: no such file"):
        train.main(["--resume", "cut"])
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before
    Path("elsewhere").rename("d")
    train.main(["--resume", "cut"])
    same(stopped)


def test_a_finished_or_unfinished_run_is_never_overwritten(here, capsys):
    train.main(SMALL)
    before = (here / "runs/tiny-math-farss-s0/adapter.safetensors").read_bytes()
    with pytest.raises(C.UserError, match="finished run"):
        train.main(SMALL)
    with pytest.raises(C.UserError, match="is finished; evaluate it"):
        train.main(["--resume", "runs/tiny-math-farss-s0"])
    (here / "runs/tiny-math-farss-s0/adapter.safetensors").rename(here / "gone")
    with pytest.raises(C.UserError, match="unfinished run; go on with --resume"):
        train.main(SMALL)
    assert (here / "gone").read_bytes() == before


def test_resume_refuses_changed_data(here, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train.main(SMALL)
    write_data("d", seed=1)
    with pytest.raises(C.UserError, match="not the data that"):
        train.main(["--resume", "runs/tiny-math-farss-s0"])


@pytest.mark.parametrize("argv, says", [
    (["--data", "none.jsonl"], "none.jsonl: no such file"),
    (["--model", "nowhere"], "no such folder"),
    (["--model", "d"], "config.json: no such file"),
    (["--model", "tiny", "--data", "none.jsonl"], "none.jsonl: no such file"),
    (["--model", "tiny", "--data", "empty.jsonl"], "holds no rows"),
    (["--model", "tiny", "--data", "broken.jsonl"], "broken.jsonl:2: not valid JSON"),
    (["--model", "tiny", "--data", "columns.jsonl"], "columns.jsonl:1: no 'query' with"),
    (["--model", "tiny", "--data", "d/train.jsonl", "--max-length", "20"], "raise --max-length"),
    ([*SMALL, "--r-avg", "70"], "r_avg 70"),
    ([*SMALL, "--r-min", "0"], "r_min 0"),
    ([*SMALL, "--shallow", "5"], "--shallow 5: tiny has 4 blocks"),
    ([*SMALL, "--shallow", "-1"], "--shallow -1"),
    ([*SMALL, "--targets", "q_proj,wq"], "no linear layer is called wq"),
    ([*SMALL, "--targets", "q_proj,lm_head"], "lm_head does not stand in a numbered block"),
    ([*SMALL, "--threads", "0"], "--threads must be above 0"),
    ([*SMALL, "--weight-decay", "-1"], "--weight-decay must be 0 or a number above it"),
    ([*SMALL, "--weight-decay", "nan"], "--weight-decay must be 0 or a number above it"),
    ([*SMALL, "--clip", "inf"], "--clip must be above 0"),
    ([*SMALL, "--seed", "-1"], "--seed must be a whole number from 0"),
    ([*SMALL, "--rank", "0"], "--rank must be above 0"),
    ([*SMALL, "--lr", "nan"], "--lr must be above 0"),
    ([*SMALL, "--dropout", "1"], "--dropout must be in [0, 1)"),
    ([*SMALL, "--method", "dora"], "invalid choice"),
    ([*SMALL, "--mehtod", "lora"], "unrecognized arguments"),
    ([*SMALL, "--device", "cuda:99"], "not usable here"),
    (["--resume", "nowhere"], "no such folder"),
    (["--resume", "tiny"], "has no run.json"),
    (["--resume", "old"], "not written by this version"),
    (["--resume", "x", "--lr", "1"], "give no other option"),
    (["--resume", "x", "--from-run", "y"], "--from-run: --resume takes its settings from"),
    (["--from-run", "nowhere"], "no such folder"),
    (["--from-run", "x", "--model", "tiny"], "--model decides other settings"),
    ([*SMALL, "--base", "tiny"], "--base goes with --resume"),
])
def test_bad_input_is_one_line_exit_2_and_writes_nothing(here, capsys, argv, says):
    (here / "empty.jsonl").write_text("")
    (here / "broken.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question\n')
    (here / "columns.jsonl").write_text('{"prompt": "q", "text": "a"}\n')
    (here / "old").mkdir()
    C.save_json(here / "old" / "run.json", {"settings": {"model": "tiny"}})
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        S.run_main(lambda: train.main(argv))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err
    assert "Traceback" not in out + err and sorted(here.rglob("*")) == before


def test_the_script_itself_exits_with_2_and_no_traceback(here):
    done = subprocess.run([sys.executable, REPO / "train.py", "--model", "nowhere"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train.py: error: --model nowhere")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_a_console_without_greek_letters_and_a_python_without_resource(here):
    """cp1252 as on an old Windows console, where there is no module resource either."""
    code = ("import sys; sys.modules['resource'] = None; sys.path.insert(0, sys.argv.pop(1)); "
            "import settings, train; settings.run_main(train.main)")
    done = subprocess.run([sys.executable, "-c", code, str(REPO), *SMALL], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert b"of Tr ?_h" in done.stdout and (here / "runs/tiny-math-farss-s0").exists()


def test_help_names_equations_sources_and_defaults(capsys):
    for call, words in ((train.main, ("of the text; default 256 (A.2.1)", "Eq. 5", "--dry-run")),
                        (E.main, ("Eq. 36-38", "--full-results", "lm_eval"))):
        with pytest.raises(SystemExit) as stop:
            call(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0 and all(word in text for word in words)


# --------------------------------------------------------------------------- the boundary's search


def test_the_boundary_with_the_best_of_both_is_taken(tmp_path, monkeypatch, capsys):
    """Section 3.1: 1/8 to 1/4 of 16 blocks; the run is then the one with that --shallow."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny", num_hidden_layers=16, hidden_size=16, intermediate_size=32,
                     num_attention_heads=2, num_key_value_heads=1)
    write_data("d")
    known = [data.Example([256, 5, 6, 7, 8], 2), data.Example([256, 9, 6, 3], 1)]
    monkeypatch.setattr(E, "known_examples", lambda *_: known)
    monkeypatch.setattr(train, "TRIAL_STEPS", 3)
    train.main([*SMALL, "--shallow", "auto", "--out", "auto"])
    tried, out = C.read_json("auto/run.json")["boundary"], capsys.readouterr().out
    assert [x["shallow"] for x in tried] == [2, 3, 4] and out.count("\nboundary ") == 3
    assert max(x["T"] for x in tried) == 1 and all(0 < x["K"] <= 1 for x in tried)
    for x in tried:
        assert x["KT"] == pytest.approx(2 * x["K"] * x["T"] / (x["K"] + x["T"]))
    best = max(tried, key=lambda x: x["KT"])["shallow"]
    assert S.read_run(Path("auto"))[0].shallow == best
    train.main([*SMALL, "--shallow", str(best), "--out", "given"])
    one, two = (Path(run) / "adapter.safetensors" for run in ("auto", "given"))
    assert one.read_bytes() == two.read_bytes()


def test_no_candidate_is_loaded_while_another_lives(tmp_path, monkeypatch):
    """A card that has room for less than two models has room for the search, and for the run after
    it; without the garbage collector, which frees when it likes."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny", num_hidden_layers=16, hidden_size=16, intermediate_size=32,
                     num_attention_heads=2, num_key_value_heads=1)
    write_data("d")
    monkeypatch.setattr(E, "known_examples", lambda *_: [data.Example([256, 5, 6, 7, 8], 2)])
    monkeypatch.setattr(train, "TRIAL_STEPS", 1)
    load, weights, alive = C.load, [], []

    def watched(*args):
        alive.append(sum(W() is not None for W in weights))
        model = load(*args)
        weights.extend(weakref.ref(p) for p in model.parameters())
        return model

    monkeypatch.setattr(C, "load", watched)
    gc.disable()
    try:
        train.main([*SMALL, "--shallow", "auto"])
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]


def test_a_boundary_that_cannot_be_tried_is_one_line(here, monkeypatch):
    monkeypatch.setattr(E, "known_examples", lambda *_: [])
    with pytest.raises(C.UserError, match=r"--shallow auto: .* nothing to ask; give a number"):
        train.main([*SMALL, "--shallow", "auto"])
    assert not Path("runs").exists()
    train.main([*SMALL, "--shallow", "auto", "--dry-run"])
    with pytest.raises(SystemExit):
        train.main([*SMALL, "--shallow", "some"])


def test_candidates_are_an_eighth_to_a_quarter():
    assert [list(S.candidates(n)) for n in (32, 12, 40, 1)] == [
        [4, 5, 6, 7, 8], [2, 3], [5, 6, 7, 8, 9, 10], [1]]
