"""plan.py: the numbers of a run before it starts, and how they are shown."""

import re
from dataclasses import replace

import pytest
import torch
from tiny import PeakBytes, tiny_batch, tiny_llama, write_checkpoint, write_data

import checkpoint as C
import data
import farss
import fast
import model as M
import plan as P
import settings as S
import train
from fast import decompositions, memory, start, sums
from methods import METHODS, covariances


def planned(*argv):
    s, config = S.settle(S.training_arguments("", [*argv, "--dry-run"]))
    return P.make(s, config)


# ------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("model, millions", [
    ("llama2-7b", 319.8), ("mistral-7b-v0.3", 335.5), ("llama3-8b", 335.5),
    ("llama2-13b", 500.7)])
def test_uniform_ranks_have_the_papers_parameters(model, millions):
    plan = planned("--model", model, "--method", "lora")
    assert round(plan.trainable / 1e6, 1) == millions
    assert plan.bounds == (plan.trainable, plan.trainable) and plan.uniform == plan.trainable


@pytest.mark.parametrize("model, millions, alone", [
    ("llama2-7b", 319.8, 174.1), ("mistral-7b-v0.3", 335.5, 176.2), ("llama3-8b", 335.5, 176.2),
    ("llama2-13b", 500.7, 272.6), ("gemma2-9b", 432.1, 236.7)])
def test_every_method_of_one_rank_has_the_papers_parameters(model, millions, alone):
    """But for KaSA's 128 numbers more a layer, and B alone of LoRA-Null v2 (128 Σ m by hand)."""
    s, config = S.settle(S.training_arguments("", ["--model", model, "--task", "math",
                                                   "--dry-run"]))
    shapes = s.shapes(M.empty(config))
    assert len(shapes) == 7 * config.num_hidden_layers
    for method, row in METHODS.items():
        if row.trains == "adapters" and not row.adaptive:
            count = P.adapter_parameters(S.replace(s, method=method), shapes, 1)
            more = 128 * len(shapes) if method == "kasa" else 0
            assert round((count - more) / 1e6, 1) == (alone if row.frozen else millions)
            assert row.frozen or count - more == 128 * sum(m + n for m, n in shapes.values())


@pytest.mark.parametrize("mean", [50, 38.7])
def test_adaptive_ranks_lie_between_their_bounds(mean):
    """Table 2 prints 271M; at r_avg = 50 before clipping it is 277.2M."""
    plan = planned("--model", "llama2-7b", "--r-avg", str(mean))
    low, high = plan.bounds
    assert round(low / 1e6, 1) == 250.4 and round(high / 1e6, 1) == 284.8
    assert low < plan.trainable < high < plan.uniform
    if mean == 50:
        assert round(plan.trainable / 1e6, 1) == 277.2
    assert [sum(g.parameters[k] for g in plan.groups) for k in (0, 1)] == [low, high]


def test_matched_ranks_give_loras_parameters_at_the_papers_mean_shallow_rank():
    """R = 153 with 7 shallow blocks reproduces LoRA's 320M at a mean of 38.7."""
    plan = planned("--model", "llama2-7b", "--rank", "153", "--r-avg", "38.7")
    assert round(plan.trainable / 1e6) == 320
    assert S.preset("llama2-7b", "math").matched_rank == 153


@pytest.mark.parametrize("model, shallow", [("llama2-7b", 7), ("mistral-7b-v0.3", 5),
                                            ("llama3-8b", 9), ("llama2-13b", 11)])
def test_shallow_blocks_are_the_papers(model, shallow):
    plan = planned("--model", model)
    assert {g.count for g in plan.groups if g.depth == "shallow"} == {shallow}
    assert {g.count for g in plan.groups if g.depth == "deep"} == {plan.blocks - shallow}


def test_the_steps_of_a_small_file_are_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data("d")
    train.main(["--model", "llama2-7b", "--data", "d/train.jsonl", "--dry-run"])
    assert "6 of 16 examples (1 epoch of 96)" in capsys.readouterr().out


def test_lora_may_adapt_the_head():
    plan = planned("--model", "llama2-7b", "--method", "lora", "--targets", "q_proj,lm_head")
    assert {g.leaf: g.count for g in plan.groups} == {"q_proj": 32, "lm_head": 1}


def test_steps():
    plan = planned("--model", "llama2-7b")
    assert (plan.steps, plan.warmup_steps) == (6250, 188)
    assert planned("--model", "llama2-7b", "--steps", "7").steps == 7


def test_the_table_of_the_papers_models_is_the_papers_where_ranks_can_give_its_numbers():
    """LoRA's column at R = 128 is exact; "!" marks the #Params that no shallow ranks give."""
    header, _, *lines = (line[2:-2].split(" | ") for line in P.paper_table())
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    own = [r for r in rows if r["model"] != "roberta-base" and r["task"] != "commonsense"]
    assert {r["model"]: r["LoRA"] for r in own} == {
        "llama2-7b": "319.82", "mistral-7b-v0.3": "335.54", "llama3-8b": "335.54",
        "llama2-13b": "500.70", "gemma2-9b": "432.14"}
    assert {r["model"]: r["LoRA"] for r in rows if r["task"] == "commonsense"} == {
        "llama2-7b": "56.10", "llama3-8b": "56.62"}  # at R = 32, of five linears
    assert {r["task"]: r["LoRA"] for r in rows if r["model"] == "roberta-base"} == {
        "GLUE, six linears": "21.23", "GLUE, four linears": "12.98"}
    assert {(r["model"], r["task"], column, r[column].rpartition("; ")[2]) for r in rows
            for column in ("FARSS", "FARSS at it") if "!" in r[column]} == {
        ("mistral-7b-v0.3", "math", "FARSS at it", "336!)"),
        ("mistral-7b-v0.3", "code", "FARSS at it", "336!)"),
        ("mistral-7b-v0.3", "instruction", "FARSS", "300!)"),
        ("mistral-7b-v0.3", "instruction", "FARSS at it", "336!)"),
        ("roberta-base", "GLUE, six linears", "FARSS", "10!)")}
    assert len(rows) == 17 and rows[0] == {
        "model": "llama2-7b", "parameters": "6,738M", "task": "math",
        "shallow of blocks": "7 of 32", "LoRA": "319.82", "matched R": "153",
        "FARSS": "277.2 (250.4..284.8; 271)", "FARSS at it": "326.0 (299.2..333.6; 320)"}
    assert rows[-1]["shallow of blocks"] == "6 of 12" and rows[-1]["FARSS at it"] == "-"


def test_the_plan_of_a_classifier(capsys):
    """The head trains besides, in full; layers called dense are told apart; no logits of words."""
    train.main(["--model", "roberta-base", "--task", "glue:rte", "--dry-run"])
    out = capsys.readouterr().out
    assert "and the classification head, 0.6M, in full" in out and "logits" not in out
    assert "shallow attention.output.dense" in out and "deep output.dense" in out
    flags = ["--model", "roberta-base", "--task", "glue:rte", "--dry-run"]
    plan = P.make(*S.settle(S.training_arguments("", flags)), fast=fast)
    assert plan.head == 768 * 768 + 768 + 2 * 768 + 2
    assert plan.training["trained, with AdamW"] == 16 * (plan.bounds[1] + plan.head)
    assert planned("--model", "roberta-base", "--task", "glue:mnli").head == plan.head + 769
    assert plan.initialisation["moments of a block"] == 4 * 6 * 2 * 768**2  # F and B of six
    assert plan.initialisation["directions of a block"] == 4 * 768 * (6 * 768 + 4 * 768 + 2 * 3072)
    full = planned("--model", "roberta-base", "--task", "glue:rte", "--method", "full")
    assert full.head == 0 and full.training["trained, with AdamW"] == 16 * full.parameters


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_what_the_run_then_trains(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    flags = ["--model", "tiny", "--method", method, "--rank", "9", "--r-avg", "3", "--r-min", "3",
             "--r-max", "3", "--device", "cpu"]
    s, config = S.settle(S.training_arguments("", flags))
    plan = P.make(s, config)
    model = C.load("tiny", device="cpu")
    examples = [data.Example([1, 2, 3, 4], 2)] * 3
    train.initialise(model, s, examples)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.trainable == plan.bounds[0] == plan.bounds[1] == count


@pytest.mark.parametrize("freeze", ["shallow-third", "deep-third"])
@pytest.mark.parametrize("method", ["farss", "lora", "full"])
def test_the_plan_leaves_out_what_is_frozen(tmp_path, monkeypatch, method, freeze):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    s, config = S.settle(S.training_arguments("", [
        "--model", "tiny", "--method", method, "--rank", "5", "--r-avg", "3", "--r-min", "3",
        "--r-max", "3", "--shallow", "2", "--device", "cpu", "--freeze", freeze]))
    model = C.load("tiny", device="cpu")
    train.initialise(model, s, [data.Example([1, 2, 3, 4], 2)] * 3)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert P.make(s, config).trainable == count
    assert P.make(S.replace(s, freeze=None), config).trainable > count


# ------------------------------------------------------------------------------------------ memory


def test_micro_batch_shrinks_then_checkpoints_as_memory_does():
    s = S.Settings(model="llama2-7b", dtype="bfloat16", shallow=7, alpha=128.0)
    config = C.MODELS["llama2-7b"][1]
    plans = [P.make(s, config, g * 1e9) for g in (400, 141, 80, 40, 24)]
    sizes = [(p.micro_batch, p.checkpointing) for p in plans]
    assert sizes[0] == (16, False) and sizes == sorted(sizes, key=lambda x: (x[1], -x[0]))
    assert sizes[-1][1] is True
    assert all(sum(p.training.values()) <= 0.9 * p.memory for p in plans if p.micro_batch > 1)


def test_what_the_user_fixes_stays():
    plan = planned("--model", "llama2-7b", "--micro-batch", "3", "--checkpointing")
    assert (plan.micro_batch, plan.checkpointing) == (3, True)


@pytest.mark.parametrize("small", [64, 4096], ids=["one side", "both sides"])
@pytest.mark.parametrize("shallow", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", [False, True], ids=["by token", "summed first"])
def test_the_peak_of_the_fast_start_is_predicted(monkeypatch, dtype, shallow, small, first):
    """At Llama's proportions, weights apart, which are there before: at most a fifth too high and
    a twentieth too low."""
    monkeypatch.setattr(start, "sums_first", lambda budget, name, *_: first and
                        not budget.is_shallow(name))
    monkeypatch.setattr(memory, "sums_first", start.sums_first)
    monkeypatch.setattr(decompositions, "SMALL", small)
    monkeypatch.setattr(memory, "SMALL", small)
    monkeypatch.setattr(sums, "STRIPE", 64)
    torch.manual_seed(0)
    config = M.Config(512, 256, 688, 3, 4, 2, 64)
    model = M.CausalLM(config).to(S.DTYPES[dtype])
    s = S.Settings(model="x", dtype=dtype, rank=4, alpha=4.0, shallow=shallow, r_avg=2.0, r_max=3,
                   calibration_examples=16, max_length=128, device="cpu")
    examples = [data.Example(torch.randint(3, 512, (128,)).tolist(), 64) for _ in range(16)]
    with PeakBytes(model) as watch:
        fast.measure(model, train.calibration_batches(s, examples), s.layers(model), s.budget)
    predicted = sum(P.initialisation_memory(s, config, 0, fast).values())
    assert 0.95 * watch.peak <= predicted <= 1.2 * watch.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_the_plain_start_is_predicted_within_a_fifth(dtype):
    torch.manual_seed(0)
    config = M.Config(512, 256, 688, 3, 4, 2, 64)
    model = M.CausalLM(config).to(S.DTYPES[dtype])
    s = S.Settings(model="x", dtype=dtype, rank=4, alpha=4.0, shallow=1, r_avg=2.0, r_max=3,
                   calibration_examples=16, max_length=128, device="cpu")
    examples = [data.Example(torch.randint(3, 512, (128,)).tolist(), 64) for _ in range(16)]
    with PeakBytes(model) as watch:
        farss.measure(model, train.calibration_batches(s, examples), s.layers(model), s.budget)
    parts = P.initialisation_memory(s, config, 0)
    assert sum(parts.values()) == pytest.approx(watch.peak, rel=0.2)


def test_minutes_of_the_plain_start_are_said_of_wide_models(capsys, monkeypatch):
    """By a count that a small model's shapes give by hand, and what the CPU does in a second."""
    assert P.products_a_second(256) > 1e8
    monkeypatch.setattr(P, "products_a_second", lambda: 1e12)
    argv = ["--model", "llama2-7b", "--device", "cpu"]
    assert "PFLOP" not in shown(capsys, *argv)
    found = shown(capsys, *argv, "--plain")
    peta, minutes = (float(x.replace(",", "")) for x in re.search(
        r"([\d.,]+) PFLOP.* about ([\d,]+) minutes at this CPU's 1,000 GFLOP/s", found).groups())
    assert minutes == pytest.approx(peta * 1e3 / 60, rel=0.05)
    s = S.Settings(model="x", method="farss", calibration_examples=2, max_length=5)
    config = M.Config(100, 8, 16, 3, 2, 2, 4)
    shapes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "gate": (16, 8), "up": (16, 8),
              "down": (8, 16)}
    weights = 3 * (sum(m * n for m, n in shapes.values()) + 2 * 8)  # norms are counted, too
    by_hand = 3 * 10 * weights + 3 * sum(
        10 * (m * m + n * n) + 2 * 8 * (m * m + n * n) + P.SVD_COST * m * n * 8
        for m, n in shapes.values())
    assert P.plain_products(s, config) == 2 * by_hand


def test_covariances_of_a_block_are_counted_once_where_they_are_shared():
    """Against what covariances yields."""
    model, batch = tiny_llama(), tiny_batch([(3, 4)] * 2)
    s = S.Settings(model="x", method="corda-kpm", dtype="float32", calibration_examples=2,
                   max_length=7)
    names = s.layers(model)
    held = {t.data_ptr(): t.numel() * t.element_size()
            for t in next(covariances(model, [batch], names, train.run_body, 1)).values()}
    parts = P.initialisation_memory(s, model.config, 0)
    assert parts["covariances of a block"] == sum(held.values())


@pytest.mark.parametrize("memory, blocks", [(80e9, 32), (24e9, 11), (1e9, 1)])
def test_so_many_blocks_of_covariances_as_there_is_room_for(memory, blocks):
    s, config = S.settle(S.training_arguments("", ["--model", "llama2-7b", "--method", "corda-kpm",
                                                   "--dry-run"]))
    parameters = sum(p.numel() for p in M.empty(config).parameters())
    need = P.initialisation_memory(s, config, parameters)
    found = P.blocks_at_once(s, config, parameters, memory)
    assert found == blocks
    used = sum(need.values()) + (found - 1) * need["covariances of a block"]
    assert used <= 0.9 * memory or found == 1


@pytest.mark.parametrize("method, dtype, wide", [
    ("full", "float32", 512), ("full", "bfloat16", 512), ("lora", "float32", 512),
    ("lora", "bfloat16", 512), ("lora", "float32", 64), ("lora", "bfloat16", 64)])
def test_what_a_block_keeps_is_estimated_within_a_tenth(method, dtype, wide, monkeypatch):
    """Against the tensors that autograd saves, counted by storage: what two blocks more save."""
    monkeypatch.setattr(M, "WIDE", wide)
    monkeypatch.setattr(P, "WIDE", wide)
    s = S.Settings(model="x", method=method, dtype=dtype, rank=8, alpha=8.0, device="cpu")
    saved, config = [], None
    for blocks in (2, 4):
        torch.manual_seed(0)
        config = M.Config(64, 256, 688, blocks, 4, 4, 64)
        model = M.CausalLM(config).to(s.master_dtype)
        train.initialise(model, s, [])
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {}

        def keep(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
            return t

        ids = torch.randint(64, (2, 128))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), \
                torch.autocast("cpu", torch.bfloat16, enabled=P.is_mixed(s)):
            model.train().loss(ids, ids)
        copies = 2 * sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2
                         and "layers" in n) if P.is_mixed(s) else 0
        saved.append(sum(n for at, (n, _) in sizes.items() if at not in known) - copies)
    assert P.block_activations(s, config) == pytest.approx((saved[1] - saved[0]) / 2 / 256, rel=0.1)


def test_free_memory_counts_caches_and_a_containers_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(C, "CGROUP", tmp_path)
    assert P.device_memory("cpu") == 8e9  # a system that does not say
    C.MEMINFO.write_text("MemTotal: 100 kB\nMemFree:  1 kB\nMemAvailable:   60 kB\n")
    assert P.device_memory("cpu") == 60 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert P.device_memory("cpu") == 60 * 1024
    (tmp_path / "memory.max").write_text("50000\n")
    (tmp_path / "memory.current").write_text("10000\n")
    assert P.device_memory("cpu") == 40000


def test_free_memory_of_the_cpu_is_positive_and_used_memory_grows():
    assert P.device_memory("cpu") > 0 and P.device_memory(None) == 80e9
    before = P.memory_used("cpu")
    block = torch.ones(int(before * 1.5) // 4)
    assert P.memory_used("cpu") > before and len(block)


@pytest.mark.parametrize("device, free, cpu, where", [
    ("cuda", 80e9, 1e9, None), ("cuda", 24e9, 40e9, "cpu"), ("cuda", 24e9, 38e9, "keeps 34.4 GB"),
    ("cuda:1", 24e9, 30e9, "of which 30.0 GB are free"), ("cpu", 0, 80e9, None),
    ("cpu", 0, 53e9, "cpu"), ("cpu", 0, 50e9, "of which 36.5 GB are free")])
def test_what_a_gpu_has_no_room_for_must_have_room_beside_it(monkeypatch, device, free, cpu, where):
    """Llama-2-7B, of which 13.5 GB of weights are yet to be loaded; 256 x 512 tokens into 32 blocks
    of width 4096 are 34.4 GB."""
    s, config = S.settle(S.training_arguments("", [
        "--model", "llama2-7b", "--dry-run", "--dtype", "bfloat16"]))
    s, kept = replace(s, device=device), P.kept_inputs(s, config, P.calibration_tokens(s))
    monkeypatch.setattr(P, "device_memory", lambda name: cpu if name == "cpu" else free)
    if where in (None, "cpu"):
        assert P.inputs_on(s, config, kept, 13.5e9) == where
    else:
        with pytest.raises(C.UserError, match=f"{where}.*fewer --calibration-examples"):
            P.inputs_on(s, config, kept, 13.5e9)


def test_a_gpus_peak_can_be_forgotten_and_a_processs_cannot(monkeypatch):
    peak = {"cuda": 9.0, "cuda:1": 5.0}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak.get)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.pop(device))
    P.forget_peak("cuda")
    assert P.memory_used("cuda") is None and P.memory_used("cuda:1") == 5
    before = P.memory_used("cpu")
    P.forget_peak("cpu")
    assert P.memory_used("cpu") >= before


# -------------------------------------------------------------------------------------------- text


def shown(capsys, *argv):
    train.main([*argv, "--dry-run"])
    return capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan_of_the_papers_run(capsys, method):
    out = shown(capsys, "--model", "llama2-7b", "--task", "math", "--method", method)
    assert f"plan: llama2-7b, math, {method}\n" in out and "6,250 of 16 examples" in out
    row = METHODS[method]
    assert ("shallow       7 of 32 blocks" in out) == row.adaptive
    assert ("  initialisation" in out) == (row.needs != "nothing")
    trainable = {"lora-null-v2": "174.1M", "full": "all 6,738.4M"}.get(method, "319.8M")
    assert f"trainable     {trainable}" in out or row.adaptive  # KaSA's 28,672 are 0.03M more
    assert ("dropout       0.05 falls on a part of W itself" in out) == row.splits


@pytest.mark.parametrize("argv", [["--residual", "exact"], ["--dropout", "0"]])
def test_dropout_on_w_is_said_where_it_falls_on_it(capsys, argv):
    assert "falls on a part of W" not in shown(capsys, "--model", "llama2-7b", *argv)


def test_ends_and_frozen_thirds_are_said(capsys):
    out = shown(capsys, "--model", "llama2-7b", "--freeze", "deep-third")
    assert "(1, 50, 64), lowest-scoring" in out and "R = 128, highest-scoring" in out
    assert "frozen        the deep third of the blocks" in out
    out = shown(capsys, "--model", "llama2-7b", "--method", "all-high")
    assert "(1, 50, 64), highest-scoring" in out and "R = 128, highest-scoring" in out
    out = shown(capsys, "--model", "llama2-7b", "--official", "--rank", "64")
    assert "(1, 50, 64), lowest-scoring" in out and "R = 64, lowest-scoring" in out


def test_plan_of_the_papers_run_needs_no_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = shown(capsys, "--model", "llama2-7b", "--task", "math")
    assert "7 of 32 blocks, r (r_min, r_avg, r_max) = (1, 50, 64)" in out
    assert "R = 128" in out and "6,250 of 16" in out and "188 of them warm-up" in out
    assert "277.2M if every shallow rank were r_avg" in out and "the paper prints 271M" in out
    assert "LoRA of rank 128: 319.8M" in out and not list(tmp_path.iterdir())


def test_what_is_summed_first_is_said_of_deep_blocks_alone(capsys):
    argv = "--model", "llama2-7b", "--shallow"
    assert "tokens summed first" in shown(capsys, *argv, "31")
    assert "tokens summed first" not in shown(capsys, *argv, "32")
    assert "tokens summed first" not in shown(capsys, *argv, "7", "--method", "lora")


@pytest.mark.parametrize("model", ["roberta-large", "llama3.2-1b"])
def test_what_the_paper_prints_of_one_model_is_not_said_of_another(capsys, model):
    task = "math" if model == "llama3.2-1b" else "glue:rte"
    assert "paper prints" not in shown(capsys, "--model", model, "--task", task)


@pytest.mark.parametrize("argv, says", [
    (["--model", "llama2-7b", "--method", "lora"], "trainable     319.8M"),
    (["--model", "llama2-7b", "--method", "full"], "THIS DOES NOT FIT"),
    (["--model", "llama2-7b", "--rank", "32", "--r-max", "16", "--r-avg", "12",
      "--targets", "q_proj,v_proj"], "deep v_proj"),
    (["--model", "llama2-7b", "--alpha", "256"], "= 256 / 128 = 2"),
    (["--model", "llama2-7b"], "moments of a block 0.6"),
    (["--model", "llama2-7b", "--dtype", "float32"], "moments of a block 0.7"),
    (["--model", "llama3.2-1b"], "deep q_proj, o_proj, gate_proj, up_proj, down_proj: tokens"),
    (["--model", "llama2-7b", "--memory", "24"], "kept inputs, 34.4 GB, in CPU memory"),
    (["--model", "llama2-7b", "--memory", "24"], "micro-batch 8, checkpointing"),
])
def test_plans(capsys, argv, says):
    assert says in shown(capsys, *argv)


@pytest.mark.parametrize("method, said", [("farss", True), ("corda-kpm", False)])
def test_the_plan_says_where_kept_inputs_have_no_room(capsys, monkeypatch, method, said):
    """34.4 GB of FARSS's; a method that needs covariances keeps what goes into one block."""
    argv = ["--model", "llama2-7b", "--memory", "16", "--method", method]
    monkeypatch.setattr(C, "free_memory", lambda device: 39e9)
    out = shown(capsys, *argv)
    assert "FIT INTO THIS MACHINE" not in out and ("in CPU memory" in out) == said
    monkeypatch.setattr(C, "free_memory", lambda device: 30e9)
    assert ("THIS DOES NOT FIT INTO THIS MACHINE, if examples have --max-length tokens: the start "
            "keeps 34.4 GB of block inputs in the CPU's memory, of which 30.0 GB are free: give "
            "fewer --calibration-examples or a smaller --max-length\n"
            in shown(capsys, *argv)) == said
