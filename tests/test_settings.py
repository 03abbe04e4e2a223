"""settings.py: where a setting comes from, the table of methods, the run's folder."""

import argparse
import os
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, write_checkpoint, write_data

import checkpoint as C
import data
import methods
import model as M
import plan as P
import results as R
import settings as S
import train


def origins(args):
    return S.origins(*S.settle(args), S.given(args))


def settled(*argv):
    return S.settle(S.training_arguments("", [*argv, "--dry-run"]))[0]


# ------------------------------------------------------------------------- default, preset, flag


def test_a_preset_refines_the_defaults_and_a_flag_has_the_last_word(monkeypatch):
    assert settled("--model", "llama2-7b").shallow == 7
    assert settled("--model", "llama2-7b", "--shallow", "3").shallow == 3
    assert settled("--model", "llama3.2-1b").shallow == round(16 * 7 / 32)
    row = S.Preset(dict(rank=9, lr=1e-3))
    monkeypatch.setitem(S.PRESETS, ("llama2-7b", "math"), row)
    s = settled("--model", "llama2-7b", "--lr", "2e-3")
    assert (s.rank, s.alpha, s.lr) == (9, 9.0, 2e-3)
    assert settled("--model", "llama2-7b", "--alpha", "18").scaling == 2


def test_a_model_of_the_paper_is_known_by_its_shape_whatever_its_name(tmp_path, capsys):
    """An open copy's id and a local folder get the paper's 9 shallow blocks of Llama-3-8B."""
    copy = tmp_path / "my-llama"
    copy.mkdir()
    C.save_json(copy / "config.json", dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0,
        rms_norm_eps=1e-5, max_position_embeddings=8192, hidden_act="silu"))
    args = S.training_arguments("", ["--model", str(copy), "--dry-run", "--lr", "1e-3"])
    assert S.settle(args)[0].shallow == 9
    said = origins(args)
    assert said[0] == (f"settings of {copy} (llama3-8b, as the shape of its config says), math, "
                       "farss:")
    assert "  the paper, A.6: shallow 9 of 32 blocks" in said
    assert "  the command line: lr 0.001" in said
    train.main(["--model", str(copy), "--dry-run"])
    assert "the paper prints 276M" in capsys.readouterr().out
    config = C.MODELS["llama3-8b"][1]
    assert S.known_as("meta-llama/Meta-Llama-3-8B", config) == "llama3-8b"
    assert S.known_as("x", S.replace(config, num_hidden_layers=31)) == "x"
    write_checkpoint(tmp_path / "tiny")
    args = S.training_arguments("", ["--model", str(tmp_path / "tiny"), "--dry-run"])
    assert "  chosen here, 7/32 of the blocks: shallow 1 of 4 blocks" in origins(args)


def test_where_each_setting_of_a_glue_run_comes_from():
    """The paper's sections first; nothing that the method does not look at."""
    def said(*flags):
        return origins(S.training_arguments("", ["--model", "roberta-base", "--task", "glue:rte",
                                                 "--dry-run", *flags]))
    linears = "query,key,value,attention.output.dense,intermediate.dense,output.dense"
    assert said("--seed", "3") == [
        "settings of roberta-base, glue:rte, farss:",
        "  the paper, 3.3: residual split",
        "  the paper, 4.2: shallow 6 of 12 blocks, r min 1, r avg 50, r max 64, targets " + linears,
        "  the paper, A.2.1: calibration task, calibration examples 256",
        "  the paper, A.4.1: rank 128, lr 0.0004, batch size 64, epochs 10, max length 512",
        "  chosen here, from a width of 512: form fast",
        "  chosen here: alpha 128, fisher empirical, examples 400000, warmup 0.03, weight decay 0, "
        "dropout 0, dtype float32",
        "  the command line: seed 3",
        "  transformers' default: clip 1"]
    assert said("--method", "lora")[1:] == [
        "  the paper, 4.2: targets " + linears,
        "  the paper, A.4.1: rank 128, lr 0.0004, batch size 64, epochs 10, max length 512",
        "  chosen here: alpha 128, examples 400000, warmup 0.03, weight decay 0, dropout 0, "
        "seed 0, dtype float32",
        "  transformers' default: clip 1"]
    assert said("--method", "full")[1:] == [
        "  the paper, A.4.1: lr 0.0004, batch size 64, epochs 10, max length 512",
        "  chosen here: examples 400000, warmup 0.03, weight decay 0, seed 0, dtype float32",
        "  transformers' default: clip 1"]


def test_a_row_of_the_model_goes_before_one_of_the_task_and_a_task_must_exist(monkeypatch):
    monkeypatch.setitem(S.PRESETS, ("roberta-large", "glue:rte"), S.Preset(dict(lr=1e-3)))
    assert S.preset("roberta-large", "glue:rte").settings == dict(lr=1e-3)
    assert S.preset("roberta-base", "glue:rte") is S.GLUE and not S.preset("x", "math").settings
    assert S.default_task("gemma2-9b") == "code"  # the paper has no math of it
    monkeypatch.setitem(S.PRESETS, ("new", "a task that is yet to come"), S.Preset({}))
    assert S.default_task("new") == "math"
    args = S.training_arguments("", ["--model", "llama2-7b", "--device", "cpu"])
    assert any(line.startswith("  chosen here: ") and line.endswith("dtype float32")
               for line in origins(args))  # not A.2.1's bfloat16


def test_presets_name_settings_and_models():
    names = {f.name for f in fields(S.Settings)}
    for (model, task), row in S.PRESETS.items():
        assert model in (None, *C.MODELS) and task in data.TASKS
        assert set(row.settings) <= names and set(row.sources) <= names


def test_table_9s_settings_by_model():
    """As printed, but for r_avg and r_max, whose rows it has exchanged."""
    table = {row["hyperparameter"]: row for row in R.paper_tables()["09"]}
    for model in ("llama2-7b", "llama3-8b"):
        s = settled("--model", model, "--task", "commonsense")
        printed = {name: row[model] or row["both"] for name, row in table.items()}
        assert {"shallow layers split": s.shallow, "r_min": s.r_min, "r_max": s.r_avg,
                "r_avg": s.r_max, "Rank r": s.rank, "alpha": s.alpha, "Dropout": s.dropout,
                "LR": s.lr, "Batch size": s.batch_size, "Warmup Steps": s.warmup,
                "Epochs": s.epochs} == {n: float(v) for n, v in printed.items()
                                        if n not in ("Optimizer", "LR Scheduler", "Where")}
        names = [n.lower() + "_proj" for n in printed["Where"].split(", ")]
        assert s.target_names == names and s.scaling == 2
        plan = P.make(s, C.MODELS[model][1], rows=170420)
        assert plan.warmup_steps == 100 and plan.steps == 3 * -(-170420 // 16)
        said = origins(S.training_arguments("", ["--model", model, "--task", "commonsense",
                                                 "--method", "kasa", "--dry-run"]))
        assert any(line.startswith("  the paper, A.5, Table 9: ") and "lr 0.0003" in line
                   for line in said)
        assert ("  the paper, A.4.2: kasa beta " + ("0.01, kasa gamma 0.0001" if model ==
                "llama2-7b" else "0.0001, kasa gamma 0.001")) in said
    assert settled("--model", "llama3.2-1b", "--task", "commonsense").r_max == 24


def test_every_setting_is_a_flag_with_a_help_text():
    flags = argparse.Namespace(**{f.name: None for f in fields(S.Settings)})
    assert S.given(flags) == {}
    for f in fields(S.Settings):
        assert len(f.metadata["help"]) > 10
        value = {"method": "lora", "task": "math", "dtype": "bfloat16", "fisher": "sampled",
                 "residual": "exact", "freeze": "deep-third", "official": None,
                 "checkpointing": None, "shard": None, "compile": None,
                 "cudnn_attention": None, "form": None}.get(f.name, "1")
        flag = "fast" if f.name == "form" else f.name.replace("_", "-")
        argv = ["--model", "tiny", "--" + flag, *([value] if value else [])]
        assert f.name in S.given(S.training_arguments("", argv))


def test_weights_that_are_trained_are_fp32():
    for method, row in methods.METHODS.items():
        s = S.Settings(model="x", method=method, dtype="bfloat16")
        assert s.master_dtype == (torch.float32 if row.trains == "weights" else torch.bfloat16)


# ------------------------------------------------------------------- flags that decide others


@pytest.mark.parametrize("argv, wanted", [
    (["--model", "llama2-7b", "--match-params", "lora:128"], 319815680),
    (["--model", "llama2-7b", "--match-params", "320M"], 320e6),
    (["--model", "llama2-7b", "--match-params", "300000000", "--method", "farss-init"], 3e8),
    (["--match-params", "500k", "--lr", "1e-3"], 5e5),
    (["--match-params", "400.5k", "--lr", "1e-3", "--method", "kasa"], 400.5e3),
    (["--model", "llama2-7b", "--match-params", "lora:128", "--method", "lora-null-v2"], 319815680),
])
def test_matched_parameters_are_the_nearest_that_a_rank_gives(argv, wanted):
    """A whole rank more or less is further away, by the plan's own count at r_avg."""
    s, config = S.settle(S.training_arguments("", [*argv, "--dry-run"]))
    shapes = s.shapes(M.empty(config))
    less, at, more = (abs(P.adapter_parameters(S.replace(s, rank=r), shapes, s.r_avg) - wanted)
                      for r in (s.rank - 1, s.rank, s.rank + 1))
    assert at < less and at < more and s.alpha == s.rank


def test_matching_lora_counts_the_same_layers_of_it():
    """Of the 21 of 32 blocks, all alike, that are not frozen: LoRA's R is its own rank, and that
    of FARSS, with 50 in the first 7, (64 · 21 - 50 · 7) / 14 = 71."""
    argv = ["--model", "llama2-7b", "--match-params", "lora:64", "--freeze", "deep-third"]
    assert settled(*argv, "--method", "lora").rank == 64
    assert settled(*argv).rank == 71 == settled(*argv).alpha
    assert settled(*argv, "--alpha", "7").alpha == 7


@pytest.mark.parametrize("argv, says", [
    (["--match-params", "320X"], "320X: write 320M, 500k, or lora:128"),
    (["--match-params", "lora:"], "lora:: write 320M"),
    (["--match-params=-3M"], "write 320M"),
    (["--match-params", "500k"], "500k: no rank R gives so few"),
    (["--match-params", "320M", "--shallow", "32"], "no rank R gives so few"),
    (["--match-params", "320M", "--rank", "128"], "chooses the rank; give no --rank"),
    (["--match-params", "320M", "--r-avg", "70"], "r_avg 70"),
    (["--match-params", "320M", "--targets", "wq"], "no linear layer is called wq"),
])
def test_what_cannot_be_matched_is_one_line(argv, says):
    with pytest.raises(C.UserError) as error:
        settled("--model", "llama2-7b", *argv)
    assert says in str(error.value)


def test_official_means_16_examples_10_warm_up_steps_and_batches_of_128_unless_given():
    argv = ["--model", "llama2-7b", "--official"]
    s, config = S.settle(S.training_arguments("", [*argv, "--dry-run"]))
    assert (s.calibration_examples, s.warmup, s.batch_size) == (16, 10, 128)
    plan = P.make(s, config)
    assert (plan.steps, plan.warmup_steps) == (782, 10)
    said = origins(S.training_arguments("", [*argv, "--batch-size", "16", "--dry-run"]))
    assert any(line.startswith("  the official code: ") and "calibration examples 16" in line
               and "warmup 10" in line and "batch size" not in line for line in said)
    s = settled(*argv, "--warmup", "0.03", "--batch-size", "16", "--calibration-examples", "256")
    assert (s.calibration_examples, s.warmup, s.batch_size) == (256, 0.03, 16)
    s = settled("--model", "llama2-7b")
    assert (s.calibration_examples, s.warmup, s.batch_size) == (256, 0.03, 16)


@pytest.mark.parametrize("method, official, rank, ends", [
    ("farss", False, 64, (True, False)), ("farss-init", False, 128, (True, True)),
    ("farss-top", False, 64, (False, False)), ("all-high", False, 64, (False, False)),
    ("farss", True, 127, (True, True)), ("farss", True, 128, (True, False)),
    ("farss-init", True, 128, (True, True)), ("farss-top", True, 64, (False, False)),
    ("all-high", True, 64, (False, False))])
def test_ends_of_the_order_by_method(method, official, rank, ends):
    """Lowest, in the first and last block: the official code decides FARSS's by r < 128, and a
    variant keeps the one end that it is named after."""
    s = S.Settings(model="x", method=method, official=official, rank=rank, shallow=3)
    assert tuple(s.budget.lowest(f"layers.{i}.x") for i in (0, 31)) == ends
    assert s.budget.shallow == (3 if method in ("farss", "all-high") else 0)


@pytest.mark.parametrize("blocks, third", [(32, 11), (12, 4), (40, 13), (26, 9), (4, 1), (1, 0)])
def test_a_third_of_the_blocks_is_frozen_and_nothing_outside_them(blocks, third):
    s = S.Settings(model="x", freeze="shallow-third"), S.Settings(model="x", freeze="deep-third")
    frozen = [[i for i in range(blocks) if x.is_frozen(f"model.layers.{i}.mlp.up_proj.A", blocks)]
              for x in s]
    assert frozen == [list(range(third)), list(range(blocks - third, blocks))]
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                 "classifier.dense.weight"):
        assert not any(x.is_frozen(name, blocks) for x in s)
    assert not S.Settings(model="x").is_frozen("model.layers.0.mlp.up_proj", blocks)


@pytest.mark.parametrize("method, shown", [
    ("lora", ()), ("pissa", ("residual",)), ("corda-kpm", ("residual", "calibration")),
    ("kasa", ("residual", "kasa beta", "kasa gamma")), ("full", ()),
    ("farss", ("residual", "calibration", "fisher", "r avg")),
    ("farss-top", ("residual", "calibration", "fisher"))])
def test_only_what_a_method_looks_at_is_listed(method, shown):
    said = ", " + ", ".join(line.partition(": ")[2] for line in origins(S.training_arguments(
        "", ["--model", "llama2-7b", "--method", method, "--dry-run"])))
    for name in ("residual", "calibration", "fisher", "r avg", "kasa beta", "kasa gamma"):
        assert (f", {name} " in said) == (name in shown), name


# --------------------------------------------------------------------------- a method is a row


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_row_of_methods_is_complete_and_starts_at_the_base_model(method, tmp_path):
    """What a new row must keep: known words in its fields, a start that changes no output, and a
    file from which that start comes back to the bit."""
    row = methods.METHODS[method]
    assert row.about and row.trains in ("adapters", "weights") and row.needs in train.STARTS
    assert (row.start is not None) == (row.trains == "adapters" and row.needs != "fisher")
    s = S.Settings(model="x", method=method, rank=4, alpha=8.0, shallow=1, r_avg=2, r_max=3,
                   device="cpu", dtype="float32", dropout=0.0)
    model, ids = tiny_llama(), torch.arange(20)[None]
    before = model(ids).detach()
    initial, report = train.initialise(model, s, [data.Example([256, 5, 6, 7, 8], 2)] * 3)
    kept = not row.diagonal  # KaSA alone is another model from the start
    assert torch.allclose(model(ids).detach(), before, rtol=1e-3, atol=1e-3) == kept
    if row.trains == "adapters":
        assert set(initial) == (set(M.adapted_layers(model)) if row.splits or row.diagonal
                                else set())
        C.save_adapter(tmp_path / "a.safetensors", model, initial, "split")
        again = tiny_llama()
        C.load_adapter(again, tmp_path / "a.safetensors")
        assert torch.equal(again(ids), model(ids))
        assert {x["r"] for x in report["layers"].values()} <= ({1, 2, 3, 4} if row.adaptive
                                                               else {4})


def test_a_new_method_is_one_row(tmp_path, monkeypatch, capsys):
    """A start taken out of W, and a penalty on the loss: flag, help, plan, start, training and
    files know the method from its row alone."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint("tiny")
    write_data("d")

    def first_rows(W, r, given):
        return methods.split(W[:r].clone(), torch.eye(W.shape[0], r))

    def all_adapters(model, beta, gamma):
        return 500 * gamma * sum(p.pow(2).sum() for p in model.parameters() if p.requires_grad)

    row = methods.Method("the first rows of W", first_rows, penalty=all_adapters)
    monkeypatch.setitem(methods.METHODS, "rows", row)
    argv = ["--model", "tiny", "--data", "d/train.jsonl", "--method", "rows", "--rank", "4",
            "--steps", "3", "--batch-size", "4", "--lr", "1e-2", "--dropout", "0"]
    train.main([*argv, "--dry-run"])
    s = settled(*argv)
    plan = P.make(s, C.config_of("tiny"))
    assert f"{plan.trainable / 1e6:,.1f}M" in capsys.readouterr().out
    train.main(argv)
    tensors, _ = C.load_tensors("runs/tiny-math-rows-s0/adapter.safetensors")
    before = sum(t.pow(2).sum() for n, t in tensors.items() if n.endswith(("A0", "B0")))
    after = sum(t.pow(2).sum() for n, t in tensors.items() if n.endswith((".A", ".B")))
    assert sum(t.numel() for n, t in tensors.items() if n.endswith((".A", ".B"))) == plan.trainable
    assert after < before  # the penalty pulled
    model = C.load("tiny", device="cpu")
    W = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    torch.testing.assert_close(tensors["model.layers.0.mlp.up_proj.A0"], W[:4].detach())
    assert settled("--method", "rows", "--lr", "1e-3").rank == 16  # where rates differ by method
    with pytest.raises(C.UserError, match="no --lr is known for rows on microcosm; give one"):
        settled("--method", "rows")


# ------------------------------------------------------------------------------ the run's folder


def test_a_run_and_a_model_are_told_apart_by_their_files(tmp_path):
    write_checkpoint(tmp_path / "model")
    s = S.Settings(model="tiny")
    (tmp_path / "run").mkdir()
    S.write_run(tmp_path / "run", s, {"data_sha256": "x"})
    assert S.is_run(tmp_path / "run") and not S.is_run(tmp_path / "model")
    again, recorded = S.read_run(tmp_path / "run")
    assert again == s and {"commit", "torch", "python", "threads", "data_sha256"} < set(recorded)


def test_files_are_as_readable_as_any(tmp_path):
    C.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"a": "b"})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_compiling_on_a_cpu_needs_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(S.shutil, "which", lambda name: None)
    S.check_compiler("cuda")
    S.check_compiler(None)  # a plan
    with pytest.raises(S.UserError, match="on a CPU torch"):
        S.check_compiler("cpu")
    monkeypatch.setenv("CXX", "c++-9")
    S.check_compiler("cpu")


@pytest.mark.parametrize("installed, good", [
    ("2.9.1", False), ("2.10.0+cu128", False), ("2.11.0a0+git", True), ("2.13.0+cpu", True),
    ("3.0", True)])
def test_every_command_says_in_a_line_that_torch_is_too_old(monkeypatch, capsys, installed, good):
    monkeypatch.setattr(torch, "__version__", installed)
    ran = []
    if good:
        S.run_main(lambda: ran.append(1))
    else:
        with pytest.raises(SystemExit) as stop:
            S.run_main(lambda: ran.append(1))
        assert stop.value.code == 2
    err = capsys.readouterr().err
    assert bool(ran) == good and err.count("\n") == (not good)
    assert good or f"torch {installed} is too old; install 2.11 or newer" in err


def test_a_warning_is_one_line(capsys):
    S.run_main(lambda: warnings.warn("two\n  lines", stacklevel=1))
    err = capsys.readouterr().err
    assert err.endswith(": warning: two lines\n") and err.count("\n") == 1


@pytest.fixture
def cudnn():
    """Whether cuDNN's attention is on, as torch leaves it and as a test does; restored."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_cudnns_attention_is_taken_on_cuda_where_it_is_asked_for(capsys, cudnn):
    assert cudnn()  # torch's own choice, which a CPU run leaves alone
    S.use_device("cpu")
    assert cudnn() and not capsys.readouterr().out
    S.use_device(torch.device("cuda", 1))
    said = capsys.readouterr().out
    assert not cudnn() and said.startswith("cuDNN's attention is off,") and said.count("\n") == 1
    S.use_device("cuda", True)
    said = capsys.readouterr().out
    assert cudnn() and said.startswith("cuDNN's attention is on:") and said.count("\n") == 1
    S.use_device("cpu", True)
    assert "--cudnn-attention has nothing to do on cpu\n" in capsys.readouterr().out


@pytest.mark.parametrize("variable, device, says", [
    ("1", "cuda", True), ("1", "cpu", False), ("0", "cuda", False), (None, "cuda", False)])
def test_fp32_products_stay_fp32_on_cuda_whatever_the_environment_asks_for(variable, device, says):
    """In a process of its own, as torch reads the variable when it is imported."""
    script = f"""
import torch, settings
cuda = torch.backends.cuda.matmul
print(cuda.allow_tf32)
settings.use_device({device!r})
print(cuda.allow_tf32, torch.get_float32_matmul_precision())
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"}
    if variable:
        environment["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = variable
    process = subprocess.run([sys.executable, "-c", script], env=environment, text=True,
                             capture_output=True, check=True, cwd=Path(S.__file__).parent)
    before, *said, after = process.stdout.splitlines()
    assert before == str(variable == "1")
    assert after == ("False highest" if device == "cuda" else "True high")
    assert any(line.startswith("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is not followed")
               for line in said) == says
