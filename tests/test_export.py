"""export.py: every method's run as peft, transformers and the run itself compute it, and back."""

import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_transformers4 import TRANSFORMERS4
from tiny import (
    GEMMA2,
    GQA3,
    MISTRAL,
    classifier_oracle,
    oracle,
    tiny_roberta,
    tiny_texts,
    write_checkpoint,
    write_data,
)

import checkpoint as C
import data
import eval as E
import export
import model as M
import settings as S
import train
from methods import METHODS
from model import ENCODER_TARGETS

FP32, BF16 = torch.float32, torch.bfloat16
ADAPTERS = [name for name, how in METHODS.items() if how.trains == "adapters"]
CLASSES = data.TASKS["glue:mnli"].classes
SMALL = dict(task="math", data="d.jsonl", device="cpu", rank=4, alpha=8.0, shallow=1, r_avg=2.0,
             r_max=3, calibration_examples=4, max_length=24, dropout=0.0, lr=1e-2, micro_batch=4,
             checkpointing=False)


# Of two ways to run in bf16, which round at other places; what must agree does so in fp32.
BF16_PART = 0.15


def close(mine, theirs, part=5e-6):
    """Within `part` of the largest number."""
    mine, theirs = mine.float(), theirs.float()
    assert mine.shape == theirs.shape and mine.std() > 0
    assert (mine - theirs).abs().max() <= part * theirs.abs().max()


def apart(mine, theirs, part=1e-3):
    assert (mine.float() - theirs.float()).abs().max() > part * theirs.float().abs().max()


def examples(encoder):
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(8, 250, (12,), generator=draw).tolist() for _ in range(4)]
    return [data.Example(ids, 12, i % 3) if encoder else data.Example(ids, 4 + i)
            for i, ids in enumerate(rows)]


def make_run(folder, base, method="farss", **more):
    """What train.py leaves after three real steps at a rate that moves B A far from B0 A0."""
    s = S.Settings(**(SMALL | {"model": str(base), "method": method} | more))
    classes = data.TASKS[s.task].classes
    model = C.load(base, s.master_dtype, "cpu", classes or None, s.seed)
    initial, report = train.initialise(model, s, examples(bool(classes)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lr)
    model.train()
    for _ in range(3):
        train.train_step(model, examples(bool(classes)), s, optimizer, trained)
    folder.mkdir(parents=True)
    S.write_run(folder, s, {"base": str(base), "base_fingerprint": C.fingerprint(base)})
    if s.how.trains == "weights":
        C.save(model.to(S.DTYPES[s.dtype]), folder / "model")
        C.copy_companions(base, folder / "model")
    else:
        report.pop("spectra", None)
        C.save_json(folder / "ranks.json", report)
        C.save_adapter(folder / "adapter.safetensors", model, initial, s.residual)
    return folder


def ours(run):
    """The run's own model, its adapter not merged."""
    s, recorded = S.read_run(run)
    if s.how.trains == "weights":
        return C.load(run / "model", S.DTYPES[s.dtype], "cpu")
    model = C.load(S.base_of(run, s, recorded), S.DTYPES[s.dtype], "cpu",
                   data.TASKS[s.task].classes or None)
    C.load_adapter(model, run / "adapter.safetensors")
    return model.eval()


def exported(run, form, *more):
    to = run.parent / f"{run.name}-{form}{''.join(more).replace('/', '')}"
    if not to.exists():
        export.main([str(run), "--to", str(to), "--format", form, *more])
    return to


def with_peft(base, adapter, dtype=FP32, **options):
    """transformers' model of the base with peft's adapter, every tensor of the file in its place
    and no other."""
    auto = classifier_oracle if options else oracle
    model = peft.PeftModel.from_pretrained(auto(base, dtype=dtype, **options), adapter).eval()
    stored, placed = C.load_tensors(adapter / export.WEIGHTS)[0], (
        peft.get_peft_model_state_dict(model))
    assert stored.keys() == placed.keys()
    assert all(torch.equal(t.to(placed[n].dtype), placed[n]) for n, t in stored.items())
    adapted = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert adapted and all(m.scaling == {"default": 1.0} for m in adapted)
    return model


@torch.no_grad()
def logits(model, length=24):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(250, (2, length), generator=draw)
    found = model(input_ids=ids)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of the same model in either dtype."""
    root = tmp_path_factory.mktemp("bases")
    for dtype in S.DTYPES:
        folder = write_checkpoint(root / dtype, num_hidden_layers=2, dtype=S.DTYPES[dtype])
        C.save_json(folder / "generation_config.json", {"eos_token_id": 257})
    return root


# ------------------------------------------------------------------------ every method, both ways


@pytest.fixture(scope="module", params=[
    (method, dtype, residual) for method in ADAPTERS for dtype in S.DTYPES
    for residual in ("split", "exact")], ids="-".join)
def made(request, bases, tmp_path_factory):
    """A run of each method, on either base, of either residual."""
    method, dtype, residual = request.param
    base = bases / dtype
    run = make_run(tmp_path_factory.mktemp("made") / "run", base, method, dtype=dtype,
                   residual=residual)
    model = ours(run)
    apart(logits(model), logits(C.load(base, S.DTYPES[dtype], "cpu")))
    return SimpleNamespace(run=run, base=base, dtype=S.DTYPES[dtype], residual=residual,
                           method=method, model=model)


def kept_whole(made):
    """The run's A, B, A0, B0 beside a W that was not rounded to W_res, all in fp32."""
    model = C.load(made.base, made.dtype, "cpu").float()
    adapter = C.read_adapter(model, made.run / "adapter.safetensors")
    C.put_adapter(model, adapter._replace(residual="exact"))
    return model.eval()


def test_peft_on_the_untouched_base(made):
    """In fp32 the run itself; of a bf16 run A, B, A0 and B0 on the unrounded W, which in bf16 are
    near the run, and whose distance from it in fp32 is the rounding of W_res alone."""
    adapter = exported(made.run, "peft")
    in_fp32 = with_peft(made.base, adapter, made.dtype).float()
    close(logits(kept_whole(made)), logits(in_fp32))
    if made.dtype == FP32:
        close(logits(made.model), logits(in_fp32))
    else:
        close(logits(made.model), logits(with_peft(made.base, adapter, BF16)), BF16_PART)
    merged = dict(in_fp32.merge_and_unload().named_parameters())
    for name, layer in M.adapted_layers(made.model).items():
        away = (merged[f"{name}.weight"] - layer.merged_weight()).abs()
        size = layer.weight.abs().float()
        rounding = 2.0**-8 if made.dtype == BF16 and made.residual == "split" else 0.0
        assert (away <= rounding * size + 1e-5 * size.max()).all(), name
    close(logits(kept_whole(made)), logits(peft.PeftModel.from_pretrained(
        oracle(made.base, dtype=made.dtype), adapter).float().merge_and_unload().eval()), 1e-5)


def test_merged(made):
    """transformers computes what the run does; the weights are merge()'s, bit for bit."""
    folder, in_fp32 = exported(made.run, "merged"), exported(made.run, "merged", "--dtype=float32")
    close(logits(made.model), logits(oracle(folder)), 5e-6 if made.dtype == FP32 else BF16_PART)
    close(logits(ours(made.run).float()), logits(oracle(in_fp32)), 1e-5)
    assert oracle(folder).dtype == made.dtype and oracle(in_fp32).dtype == FP32
    model = ours(made.run)
    M.merge(model)
    stored, _ = C.load_tensors(folder / "model.safetensors")
    mine = dict(model.named_parameters())
    assert list(stored) == sorted(mine) and all(torch.equal(mine[n], stored[n]) for n in mine)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (made.base / name).read_bytes()
    assert C.read_config(folder) == C.read_config(made.base)


def test_residual(made):
    """W_res in transformers with the adapter of rank r on it is the run; alone it is not."""
    folder = exported(made.run, "residual")
    assert not (folder / export.CONFIG).exists()
    both = logits(with_peft(folder, folder / "adapter", made.dtype))
    rounded = made.dtype == BF16
    close(logits(made.model), both, BF16_PART if rounded else 5e-6)
    if made.residual == "split":
        bare = dict(oracle(folder).named_parameters())
        for name, layer in M.adapted_layers(made.model).items():
            assert torch.equal(layer.weight, bare[f"{name}.weight"]), name
    ranks = {n: len(layer.A) for n, layer in M.adapted_layers(made.model).items()}
    assert ranks == ranks_of(folder / "adapter")
    if METHODS[made.method].splits:
        apart(logits(oracle(folder)), both)


def ranks_of(adapter):
    tensors, _ = C.load_tensors(adapter / export.WEIGHTS)
    return {n.removeprefix(export.PREFIX).removesuffix(".lora_A.weight"): len(t)
            for n, t in tensors.items() if "lora_A" in n}


def test_ranks_and_patterns(made):
    """2r where something was taken out; r for LoRA, and where A does not train."""
    adapter = exported(made.run, "peft")
    doubled = made.method not in ("lora", "lora-null-v2")
    ranks = {n: (1 + doubled) * len(layer.A) for n, layer in M.adapted_layers(made.model).items()}
    assert ranks_of(adapter) == ranks
    raw = C.read_json(adapter / export.CONFIG)
    assert raw["r"] == raw["lora_alpha"] == max(ranks.values())
    assert raw["rank_pattern"] == raw["alpha_pattern"] == {
        n: r for n, r in ranks.items() if r != raw["r"]}
    assert bool(raw["rank_pattern"]) == METHODS[made.method].adaptive
    assert raw["base_model_name_or_path"] == str(made.base.resolve())


def test_and_back(made):
    """Our own model with the adapter of peft on it, as eval.py loads it."""
    adapter = exported(made.run, "peft")
    target = E.find_target(str(adapter), str(made.base))
    assert target.folder == made.base and target.about["method"] == "peft"
    back = E.load_target(target, str(made.dtype).removeprefix("torch."), "cpu")
    assert bool(M.adapted_layers(back)) == (made.dtype == BF16)  # in fp32 merged
    close(logits(kept_whole(made)), logits(back.float()))
    assert target.about["trainable"] == sum(
        t.numel() for t in C.load_tensors(adapter / export.WEIGHTS)[0].values())


def test_unload_gives_the_base_back_and_the_adapter_can_return(made):
    model, base = ours(made.run), C.load(made.base, made.dtype, "cpu")
    C.unload(model, made.base)
    mine, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert torch.equal(logits(model), logits(base))
    C.load_adapter(model, made.run / "adapter.safetensors")
    assert torch.equal(logits(model), logits(made.model))


# ------------------------------------------------------------------------- families and settings

FAMILIES = {
    "gemma2": GEMMA2, "mistral": MISTRAL,
    "biases": dict(GQA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind, tmp_path):
    base = write_checkpoint(tmp_path / "base", num_hidden_layers=2, **FAMILIES[kind])
    run = make_run(tmp_path / "run", base, dtype="float32")
    mine = logits(ours(run))
    apart(mine, logits(oracle(base)))
    close(mine, logits(with_peft(base, exported(run, "peft"))))
    close(mine, logits(oracle(exported(run, "merged"))))
    residual = exported(run, "residual")
    close(mine, logits(with_peft(residual, residual / "adapter")))
    model = ours(run)
    C.unload(model, base)
    assert torch.equal(logits(model), logits(C.load(base, FP32, "cpu")))


@pytest.mark.parametrize("more", [
    dict(freeze="shallow-third"), dict(freeze="deep-third"), dict(official=True),
    dict(targets="q_proj,down_proj")], ids=str)
def test_settings(more, tmp_path):
    """Layers without adapter, and the official code's own scaling of each layer."""
    base = write_checkpoint(tmp_path / "base", num_hidden_layers=3)
    run = make_run(tmp_path / "run", base, dtype="float32", **more)
    mine, adapted = logits(ours(run)), M.adapted_layers(ours(run))
    assert len(adapted) < 21 or len({layer.scaling for layer in adapted.values()}) > 1
    assert ranks_of(exported(run, "peft")).keys() == adapted.keys()
    close(mine, logits(with_peft(base, exported(run, "peft"))))
    close(mine, logits(oracle(exported(run, "merged"))))
    residual = exported(run, "residual")
    close(mine, logits(with_peft(residual, residual / "adapter")))


@torch.no_grad()
def scores(model):
    """Of a few texts, a classifier's."""
    batch = tiny_texts()
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("dtype", S.DTYPES)
def test_roberta_takes_its_head_along(dtype, tmp_path):
    base = tmp_path / "base"
    C.save(tiny_roberta(), base)  # of other classes, so that the run has a head of its own
    run = make_run(tmp_path / "run", base, dtype=dtype, task="glue:mnli",
                   targets=",".join(ENCODER_TARGETS["six"]))
    mine, part = scores(ours(run)), 5e-6 if dtype == "float32" else 0.05
    wide = S.DTYPES[dtype]
    adapter, merged = exported(run, "peft"), exported(run, "merged")
    assert C.read_json(adapter / export.CONFIG)["modules_to_save"] == ["classifier"]
    theirs = with_peft(base, adapter, wide, num_labels=3)
    close(mine, scores(theirs), part)
    close(mine, scores(theirs.merge_and_unload()), part)
    close(mine, scores(classifier_oracle(merged)), part)
    assert C.read_config(merged).labels == CLASSES
    residual = exported(run, "residual")
    close(mine, scores(with_peft(residual, residual / "adapter", wide, num_labels=3)), part)
    back = E.find_target(str(adapter), str(base))
    back.about["task"] = "glue:mnli"
    E.check_task(back)
    close(mine, scores(E.load_target(back, dtype, "cpu")), part)
    back.about["task"] = "glue:stsb"
    with pytest.raises(C.UserError, match="another task"):
        E.load_target(back, dtype, "cpu")


def test_full_fine_tuning_is_exported_merged_alone(bases, tmp_path):
    run = make_run(tmp_path / "run", bases / "float32", "full", dtype="bfloat16", lr=1e-3)
    for form in ("peft", "residual"):
        with pytest.raises(C.UserError, match="no adapter; export it with --format merged"):
            exported(run, form)
    merged = C.load_tensors(exported(run, "merged") / "model.safetensors")[0]
    own = C.load_tensors(run / "model" / "model.safetensors")[0]
    assert merged.keys() == own.keys() and all(torch.equal(merged[n], own[n]) for n in own)


# --------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("one") / "run", bases / "float32", dtype="float32")


READER = """
import sys, torch, transformers
from safetensors.torch import save_file
assert transformers.__version__.startswith("4."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = torch.randint(250, (2, 24), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    save_file({"logits": model(ids).logits.float()}, sys.argv[2])
"""


def test_shards(run, tmp_path):
    """None larger than asked unless one tensor is; all in order; the same bits as in one file."""
    whole, shards = exported(run, "merged"), exported(run, "merged", "--shard-size=20KB")
    index = C.read_json(shards / "model.safetensors.index.json")
    files = C.weight_files(shards)
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert not (shards / "model.safetensors").exists()
    joined = {}
    for file in files:
        tensors, meta = C.load_tensors(shards / file)
        size = sum(t.nbytes for t in tensors.values())
        assert meta == {"format": "pt"} and (size <= 20_000 or len(tensors) == 1)
        assert all(index["weight_map"][n] == file for n in tensors)
        joined |= tensors
    one, _ = C.load_tensors(whole / "model.safetensors")
    assert one.keys() == joined.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[n], joined[n]) for n in one)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert C.fingerprint(whole) == C.fingerprint(shards)
    close(logits(ours(run)), logits(oracle(shards)))


@pytest.mark.skipif(not TRANSFORMERS4.exists(), reason="see test_transformers4.py")
def test_shards_in_transformers_4(run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", READER, exported(run, "merged", "--shard-size=20KB"),
         tmp_path / "logits.safetensors"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(TRANSFORMERS4), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    close(logits(ours(run)), C.load_tensors(tmp_path / "logits.safetensors")[0]["logits"])


def test_one_tensor_of_the_base_is_in_memory_at_a_time(run, tmp_path, monkeypatch):
    given, alive, read = [], [], C.read_tensors

    def counted(stored, dtype, device):
        alive.append(sum(tensor() is not None for tensor in given))
        tensors = read(stored, dtype, device)
        given.extend(weakref.ref(t) for t in tensors.values())
        return tensors

    monkeypatch.setattr(C, "read_tensors", counted)
    for form in ("merged", "residual"):
        export.main([str(run), "--to", str(tmp_path / form), "--format", form])
    stored = C.stored_tensors(S.base_of(run, *S.read_run(run)))
    assert len(given) == 2 * len(stored) and not any(alive)


def test_a_card_says_what_it_is_and_how_to_load_it(run, bases):
    four = {"P.S. acc": 50.0, "P.L. acc": None}
    C.save_json(run / "results.json", {"summary": {"K": 0.5, "T": None}, "benchmarks": {
        "gsm8k": {"score": 12.5}, "ifeval": {"n": 2, "scores": four}}})
    (bases / "float32" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for form, says in (("peft", "PeftModel.from_pretrained(base, "), ("merged", "vllm serve"),
                       ("residual", "/adapter\")")):
        folder = exported(run, form, "--dtype=float32")
        card = (folder / "README.md").read_text()
        for text in (says, folder.name, "float32", "farss", "d.jsonl", "license: apache-2.0",
                     "| gsm8k | P.S. acc | P.L. acc | K | T |", '"rank": 4',
                     "| 12.50 | 50.00 | undefined | 0.50 | undefined |"):
            assert text in card, text
        assert str(run.parent) not in card and str(bases) not in card
    (run / "results.json").unlink()


def test_the_rounding_of_a_bf16_run_is_said(bases, tmp_path, capsys):
    run = make_run(tmp_path / "run", bases / "bfloat16", dtype="bfloat16")
    card = (exported(run, "peft") / "README.md").read_text()
    assert "W_res rounded to bfloat16" in capsys.readouterr().out and "W_res rounded" in card
    run = make_run(tmp_path / "exact", bases / "bfloat16", dtype="bfloat16", residual="exact")
    exported(run, "peft")
    assert "note" not in capsys.readouterr().out
    exported(run, "residual")
    assert "rounding W_res to bfloat16 lost" in capsys.readouterr().out


@pytest.mark.parametrize("argv, says", [
    (["nowhere", "--to", "x", "--format", "peft"], "nowhere: no such folder"),
    (["base", "--to", "x", "--format", "peft"], "no run.json"),
    (["stopped", "--to", "x", "--format", "peft"], "not finished"),
    (["run", "--to", "full", "--format", "peft"], "--to full: is there already"),
    (["run", "--to", "file", "--format", "peft"], "--to file: is there already"),
    (["run", "--to", "cut", "--format", "peft"], "cut.tmp: is in the way, and not what"),
    (["run", "--to", "own", "--format", "peft"], "own.tmp: is in the way, and not what"),
    (["run", "--to", "x", "--format", "gguf"], "invalid choice: 'gguf'"),
    (["run", "--format", "peft"], "required: --to"),
    (["run", "--to", "x", "--format", "merged", "--shard-size", "5"], "write 5GB or 500MB"),
    (["run", "--to", "x", "--format", "merged", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["run", "--to", "x", "--format", "merged", "--base", "other"], "holds other weights"),
    (["damaged", "--to", "x", "--format", "peft"], "damaged or incomplete"),
    (["run", "--t", "x", "--format", "peft"], "required: --to"),
])
def test_bad_input_is_one_line_exit_2_and_no_folder(run, bases, tmp_path, monkeypatch, capsys,
                                                    argv, says):
    monkeypatch.chdir(tmp_path)
    for name, place in (("run", run), ("base", bases / "float32")):
        (tmp_path / name).symlink_to(place)
    for name in ("full", "cut.tmp", "own.tmp", "stopped", "damaged"):
        (tmp_path / name).mkdir()
    for folder, files in (("full", "mine"), ("cut.tmp", "files"), ("own.tmp", "mine")):
        (tmp_path / folder / files).touch()
    (tmp_path / "own.tmp" / export.MARK).touch()
    (tmp_path / "file").touch()
    for name in ("stopped", "damaged"):
        (tmp_path / name / "run.json").write_bytes((run / "run.json").read_bytes())
    (tmp_path / "damaged" / "adapter.safetensors").write_bytes(
        (run / "adapter.safetensors").read_bytes()[:-9])
    write_checkpoint("other", seed=3, num_hidden_layers=2)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        S.run_main(lambda: export.main(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_nothing_is_left_of_an_export_that_failed(run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(export, "model_card", fail)
    with pytest.raises(OSError):
        export.main([str(run), "--to", str(tmp_path / "x"), "--format", "merged"])
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
sys.path.insert(0, {repo!r})
import export

def card(*_):
    print("written", flush=True)
    sys.stdin.read()

export.model_card = card
export.main(sys.argv[1:])
"""


def test_what_a_killed_export_left_goes_with_the_next(run, tmp_path):
    """While the process lives, another one must not touch its files; after kill -9 they go."""
    argv = [str(run), "--to", str(tmp_path / "x"), "--format", "merged"]
    script = KILLED.format(repo=os.path.dirname(export.__file__))
    with subprocess.Popen([sys.executable, "-c", script, *argv], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "written\n"
        files = sorted(p.name for p in (tmp_path / "x.tmp" / "files").iterdir())
        assert "model.safetensors" in files
        with pytest.raises(C.UserError, match="another export is writing there"):
            export.main(argv)
        assert sorted(p.name for p in (tmp_path / "x.tmp" / "files").iterdir()) == files
        child.kill()
    assert [p.name for p in tmp_path.iterdir()] == ["x.tmp"]
    (tmp_path / "x.tmp" / "files" / "of-another-format").touch()
    export.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == sorted([*files, "README.md"])


def test_a_kill_behind_the_renaming_leaves_nothing_for_long(tmp_path):
    """The folder is whole, and what stood beside it goes with the next command that names it."""
    for name, file in (("x", "mine"), ("x.tmp", export.MARK)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    with pytest.raises(C.UserError, match="x: is there already"), export.new_folder(tmp_path / "x"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "mine").exists()


@pytest.mark.parametrize("left", [[], [export.MARK]])
def test_an_export_that_was_killed_at_once(run, tmp_path, left):
    (tmp_path / "x.tmp").mkdir()
    for name in left:
        (tmp_path / "x.tmp" / name).touch()
    export.main([str(run), "--to", str(tmp_path / "x"), "--format", "peft"])
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kind", ["a link", "a file"])
def test_what_no_export_left_stays(run, tmp_path, kind):
    (tmp_path / "mine" / "files").mkdir(parents=True)
    (tmp_path / "mine" / "files" / "dear").touch()
    (tmp_path / "mine" / export.MARK).touch()
    if kind == "a link":
        (tmp_path / "x.tmp").symlink_to(tmp_path / "mine")
    else:
        (tmp_path / "x.tmp").write_text("dear")
    with pytest.raises(C.UserError, match="is in the way"):
        export.main([str(run), "--to", str(tmp_path / "x"), "--format", "peft"])
    assert (tmp_path / "mine" / "files" / "dear").exists() and (tmp_path / "x.tmp").exists()


def test_where_there_are_no_locks_a_remainder_stays(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    argv = [str(run), "--to", str(tmp_path / "x"), "--format", "peft"]
    (tmp_path / "x.tmp").mkdir()
    with pytest.raises(C.UserError, match="was killed, or is still at work"):
        export.main(argv)
    (tmp_path / "x.tmp" / export.MARK).unlink()
    (tmp_path / "x.tmp").rmdir()
    export.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["README.md", "special_tokens_map.json"])
def test_a_base_whose_links_lead_out_of_it(bases, tmp_path, name):
    base = write_checkpoint(tmp_path / "base", num_hidden_layers=2)
    run = make_run(tmp_path / "run", base, "lora", dtype="float32")
    (tmp_path / "secret").write_text("---\nlicense: secret\n---")
    (base / name).symlink_to(tmp_path / "secret")
    with pytest.raises(C.UserError, match=f"{name}: a link that leads out of its folder"):
        exported(run, "merged")
    assert not list(tmp_path.glob("run-*"))


def test_a_base_that_was_moved(bases, tmp_path):
    base = write_checkpoint(tmp_path / "base", num_hidden_layers=2)
    run = make_run(tmp_path / "run", base, "lora", dtype="float32")
    base.rename(tmp_path / "moved")
    with pytest.raises(C.UserError, match="no longer there; say with --base"):
        exported(run, "peft")
    adapter = exported(run, "peft", f"--base={tmp_path / 'moved'}")
    assert C.read_json(adapter / export.CONFIG)["base_model_name_or_path"] == str(
        tmp_path / "moved")


def test_a_base_of_the_hub_is_named_by_its_id(run):
    source = export.open_run(run)
    for model, name in (("llama2-7b", "meta-llama/Llama-2-7b-hf"), ("some/model", "some/model")):
        there = replace(source, settings=replace(source.settings, model=model), recorded={})
        assert there.base_name == there.base_title == name
    assert export.open_run(run).base_title == "float32"


# ------------------------------------------------------------------------- other people's adapters


def foreign(base, folder, **config):
    """A LoRA that peft made, its B no longer zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(oracle(base), peft.LoraConfig(
        task_type="CAUSAL_LM", lora_dropout=0.1, **config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("config", [
    dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    dict(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear"),
    dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"],
         rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 5, r"^.*layers\.0.*up_proj": 3},
         alpha_pattern={"v_proj": 3, "layers.0.self_attn.q_proj": 1}),
], ids=["plain", "rslora", "patterns"])
def test_adapters_of_peft(config, bases, tmp_path):
    base = bases / "float32"
    theirs = foreign(base, tmp_path / "a", **config)
    target = E.find_target(str(tmp_path / "a"))  # its own base_model_name_or_path
    assert target.folder == base
    mine = logits(E.load_target(target, "float32", "cpu"))
    close(mine, logits(theirs))
    apart(mine, logits(oracle(base)))


@pytest.mark.parametrize("config, says", [
    (dict(use_dora=True), "use_dora True is not supported"),
    (dict(bias="all"), "bias 'all' is not supported"),
    (dict(lora_bias=True), "lora_bias True is not supported"),
    (dict(init_lora_weights="pissa"), "init_lora_weights 'pissa' is not supported"),
    (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens.base_layer.weight is no part"),
    (dict(modules_to_save=["lm_head"]), "lm_head.weight is no part of a plain LoRA"),
], ids=str)
def test_what_is_no_plain_lora_is_refused(config, says, bases, tmp_path):
    base = bases / "float32"
    foreign(base, tmp_path / "a", **(dict(r=2, target_modules=["q_proj"]) | config))
    with pytest.raises(C.UserError) as error:
        export.read_peft(C.load(base, FP32, "cpu"), tmp_path / "a")
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, says", [
    (dict(fan_in_fan_out=True), "fan_in_fan_out True is not supported"),
    (dict(peft_type="IA3"), "peft_type 'IA3' is not supported"),
    (dict(kasa_config={"beta": 1}), "kasa_config"),
    (dict(r=5), r"holds [('A', 4, 32), ('B', 32, 4)], not A (5, 32) and B (32, 5)"),
    (dict(r="5"), "has rank '5' and alpha 6"),
    (dict(rank_pattern={"(": 4}), "rank_pattern is not readable"),
    (dict(rank_pattern=[4]), "rank_pattern is not readable"),
    (dict(rank_pattern={r"(\w+.)+x": 4}), "more than a layer's name"),  # not in a lifetime
    (dict(rank_pattern={".*.*.*.*.*.*.*.*x": 4}), "more than a layer's name"),
    (dict(lora_alpha=math.nan), "alpha nan"),
], ids=str)
def test_a_config_that_does_not_fit_is_refused(change, says, bases, tmp_path):
    base, folder = bases / "float32", tmp_path / "a"
    foreign(base, folder, r=4, lora_alpha=6, target_modules=["q_proj"])
    (folder / export.CONFIG).write_text(json.dumps(C.read_json(folder / export.CONFIG) | change))
    with pytest.raises(C.UserError) as error:
        export.read_peft(C.load(base, FP32, "cpu"), folder)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_pickles_other_models_and_wrong_prefixes_are_refused(bases, tmp_path):
    base, folder = bases / "float32", tmp_path / "a"
    foreign(base, folder, r=4, target_modules=["q_proj"])
    tensors, meta = C.load_tensors(folder / export.WEIGHTS)
    C.save_tensors(folder / export.WEIGHTS, {n[5:]: t for n, t in tensors.items()}, meta)
    with pytest.raises(C.UserError, match="is no part of a plain LoRA of this model"):
        export.read_peft(C.load(base, FP32, "cpu"), folder)
    C.save_tensors(folder / export.WEIGHTS, dict(list(tensors.items())[:-1]), meta)
    with pytest.raises(C.UserError, match="holds"):  # one B is missing
        export.read_peft(C.load(base, FP32, "cpu"), folder)
    C.save_tensors(folder / export.WEIGHTS, tensors, meta)
    other = write_checkpoint(tmp_path / "other", hidden_size=40, num_hidden_layers=2)
    with pytest.raises(C.UserError, match="wrong base model"):
        export.read_peft(C.load(other, FP32, "cpu"), folder)
    (folder / export.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(C.UserError, match="pickled"):
        export.read_peft(C.load(base, FP32, "cpu"), folder)
    with pytest.raises(C.UserError, match="pickled"):
        E.find_target(str(folder))


def test_eval_scores_an_adapter_as_it_does_the_run(run, bases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data("d")
    adapter = exported(run, "peft")
    files = ["--benchmarks", "nq_open", "--data", "nq_open=d/nq.jsonl", "--max-new-tokens", "4"]
    E.main([str(run), *files, "--out", "run"])
    E.main([str(adapter), "--base", str(bases / "float32"), *files])
    one, two = (C.read_json(p / "results.json") for p in (
        tmp_path / "run", tmp_path / "runs" / f"{adapter.name}-peft"))
    assert one["base_fingerprint"] == two["base_fingerprint"]
    assert two["method"] == "peft" and two["trainable"] > one["trainable"]
    records = [(tmp_path / p / "eval" / "nq_open.jsonl").read_text()
               for p in ("run", f"runs/{adapter.name}-peft")]
    assert records[0] == records[1] and json.loads(records[0].splitlines()[0])["output"]


@pytest.mark.parametrize("method", ["lora", "farss"])
def test_other_weights_of_the_same_shape_are_refused(method, bases, tmp_path):
    """By unload, by load_adapter, and by export, where run.json does not know the base."""
    run = make_run(tmp_path / "run", bases / "float32", method, dtype="float32")
    other = write_checkpoint(tmp_path / "other", seed=7, num_hidden_layers=2)
    model, both = ours(run), f"{C.fingerprint(bases / 'float32')}.*{C.fingerprint(other)}"
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(C.UserError, match=f"{other}: is of the base model {C.fingerprint(other)}"):
        C.unload(model, other)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    with pytest.raises(C.UserError, match=f"adapter.safetensors: is of the base model {both}"):
        C.load_adapter(C.load(other), run / "adapter.safetensors")
    argv = [str(run), "--to", str(tmp_path / "x"), "--format", "peft", "--base", str(other)]
    with pytest.raises(C.UserError, match=f"{C.fingerprint(other)}.*{model.fingerprint}"):
        export.main(argv)
    recorded = C.read_json(run / "run.json")
    del recorded["base_fingerprint"]
    C.save_json(run / "run.json", recorded)
    with pytest.raises(C.UserError, match=both):
        export.main(argv)
    assert not (tmp_path / "x").exists()
    moved = write_checkpoint(tmp_path / "moved", num_hidden_layers=2)  # the same, elsewhere
    C.unload(model, moved)
    assert not M.adapted_layers(model)


def test_unload_of_another_model_changes_nothing(run, tmp_path):
    model = ours(run)
    other = write_checkpoint(tmp_path / "other", hidden_size=40, num_hidden_layers=2)
    with pytest.raises(C.UserError, match="wrong base model"):
        C.unload(model, other)
    assert len(M.adapted_layers(model)) == 14
