"""checkpoint.py beside transformers: weights, config, tokenizer, hub; and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import (
    GEMMA2,
    KINDS,
    MISTRAL,
    ROPE3,
    PeakBytes,
    byte_tokenizer,
    oracle,
    padded,
    tiny_llama,
    tiny_roberta,
    tiny_texts,
    write_checkpoint,
)
from tokenizers import AddedToken, processors

import checkpoint as C
import model as M

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)
load = partial(C.load, device="cpu")  # equalities below are of CPU tensors, also on a GPU machine


# ----------------------------------------------------------------------------- saving and loading


def weights_equal(ours, theirs):
    theirs = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        equal(tensor, theirs.pop(name).to(tensor.dtype))
    assert not theirs


def test_save_and_load(pair):
    weights_equal(pair.ours, pair.theirs)
    again = load(pair.folder)
    assert again.config == pair.ours.config
    weights_equal(again, pair.ours)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (
        again.config.tie_word_embeddings)
    assert ("lm_head.weight" in load_file(pair.folder / "model.safetensors")) != (
        again.config.tie_word_embeddings)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("stored, shard_size", [
    (torch.float32, "1GB"), (torch.float16, "1GB"), (torch.bfloat16, "1GB"),
    (torch.float32, 50_000), (torch.bfloat16, 20_000)])
def test_load_what_transformers_saved(pair, tmp_path, stored, shard_size):
    theirs = oracle(pair.folder, dtype=stored)  # a fresh one: .float() below would change pair's
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size != "1GB")
    ours = load(tmp_path, torch.float32)
    weights_equal(ours, theirs.float())
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ids, _ = padded("right")
    again = oracle(tmp_path, dtype=torch.float32)  # .float() leaves Gemma's √d as bf16 rounds it
    with torch.no_grad():
        close(ours(ids), again(input_ids=ids).logits)
    # rope_scaling has a test of its own, test_both_generations_of_config
    assert replace(ours.config, rope_scaling=None) == replace(pair.ours.config, rope_scaling=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_load_dtype(folder, dtype):
    """dtype None is fp32 on CPU, whatever the file holds."""
    C.save(tiny_llama(dtype=torch.bfloat16, num_hidden_layers=1), folder)
    model = load(folder, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    equal(model.lm_head.weight, stored.to(dtype or torch.float32))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t.clone() for n, t in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("setting", [dict(tie_word_embeddings=True), GEMMA2],
                         ids=["llama", "gemma2"])
def test_tied_head_stored_twice(setting, tmp_path):
    model = tiny_llama(num_hidden_layers=1, **setting)
    C.save(model, tmp_path)
    edit_weights(tmp_path, lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    again = load(tmp_path)
    weights_equal(again, model)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    split_into_shards(tmp_path, 7)  # head and embedding in two files
    weights_equal(load(tmp_path), model)
    head = next(tmp_path.glob("model-00001-of*"))
    assert "lm_head.weight" in load_file(head)
    save_file({n: t + (n == "lm_head.weight") for n, t in load_file(head).items()}, head)
    refused(lambda: load(tmp_path), head, "lm_head.weight is not the embedding")


def test_old_inv_freq_is_ignored_aloud(folder, capsys):
    """One line, however many blocks have it."""
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in (0, 1)]
    before = load(folder).state_dict()
    assert capsys.readouterr().out == ""
    for some, more in ((names[:1], ""), (names, " and 1 more")):
        edit_weights(folder, lambda t, some=some: t.update(
            {n: torch.ones(4) for n in some}))
        after = load(folder).state_dict()
        assert capsys.readouterr().out.splitlines() == [
            f"model.safetensors: ignoring {names[0]}{more} (the model computes it)"]
        assert all(after[n].equal(before[n]) for n in before) and len(after) == len(before)


def test_a_tensor_in_two_shards_is_refused(folder):
    """Which one counts would hang on the order of the files."""
    first, second, _ = split_into_shards(folder)
    save_file(load_file(folder / second) | {"lm_head.weight": torch.ones(258, 32)},
              folder / second)
    assert "lm_head.weight" in load_file(folder / first)
    refused(lambda: load(folder), folder / second, f"lm_head.weight also stands in {first}")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value, stored, loaded", [
    (1e5, torch.float32, torch.float16), (-1e5, torch.bfloat16, torch.float16),
    (3.4e38, torch.float32, torch.bfloat16),  # rounds up, beyond the largest
])
def test_values_that_the_dtype_cannot_hold_are_refused(folder, value, stored, loaded):
    edit_weights(folder, lambda t: t.update({UP: t[UP].to(stored)}))
    edit_weights(folder, lambda t: t[UP].__setitem__((3, 4), value))
    refused(lambda: load(folder, loaded), folder / "model.safetensors",
            f"{UP} holds .*, more than {loaded} can; load it as float32")
    assert load(folder, torch.float32).get_parameter(UP)[3, 4] == torch.tensor(value).to(stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(folder, value, dtype):
    edit_weights(folder, lambda t: t[UP].__setitem__((3, 4), value))
    refused(lambda: load(folder, dtype), folder / "model.safetensors",
            f"{UP} holds a number that is not finite")


def test_the_largest_number_of_a_dtype_is_no_overflow(folder):
    edit_weights(folder, lambda t: t[UP].__setitem__((3, 4), 65504.0))
    assert load(folder, torch.float16).get_parameter(UP)[3, 4] == 65504


@pytest.mark.parametrize("share, dtype, words", [
    (3.9, torch.float32, r"take 0\.0 GB as float32, and cpu has .* free; as bfloat16 \(--dtype "
                         r"bfloat16\) they take"),
    (2.0, torch.float32, "as bfloat16"),
    (1.9, torch.float32, "free; take a smaller model or another --device"),
    (1.9, torch.bfloat16, "as bfloat16, .* free; take a smaller model"),
    (4.0, torch.float32, None), (2.0, torch.float16, None)])
def test_no_room_for_the_weights(folder, monkeypatch, share, dtype, words):
    """`share` bytes are free for each weight; nothing is read before that is known."""
    weights = sum(p.numel() for p in load(folder).parameters())
    monkeypatch.setattr(C, "free_memory", lambda device: share * weights)
    if words is None:
        load(folder, dtype)
        return
    monkeypatch.setattr(C, "read_tensors", lambda *_: 1 / 0)
    refused(lambda: load(folder, dtype), folder, words)


@pytest.mark.parametrize("limit, used, free", [
    (None, None, 3e6 * 1024), ("max", "5", 3e6 * 1024), ("2000000000", "500000000", 1.5e9),
    ("9000000000", "500000000", 3e6 * 1024)])
def test_free_memory_is_the_least_of_machine_and_container(tmp_path, monkeypatch, limit, used,
                                                           free):
    (tmp_path / "meminfo").write_text("MemTotal:  9000000 kB\nMemFree:  1000 kB\n"
                                      "MemAvailable:  3000000 kB\nHugePages_Total:  0\n")
    for name, text in (("memory.max", limit), ("memory.current", used)):
        if text:
            (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(C, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(C, "CGROUP", tmp_path)
    assert C.free_memory("cpu") == free


def test_free_memory_of_a_gpu_has_what_torch_holds_for_later_use(monkeypatch):
    """10 of 80 are free for all, and of 70 that torch has taken 30 are in use."""
    for name, value in (("mem_get_info", (10, 80)), ("memory_reserved", 70),
                        ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert C.free_memory("cuda") == C.free_memory(torch.device("cuda", 1)) == 50


def split_into_shards(folder, n=3):
    """model.safetensors as n shards and their index, as a hub repository has them."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: f"model-{i % n + 1:05}-of-{n:05}.safetensors"
             for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({k: v for k, v in tensors.items() if where[k] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sorted(set(where.values()))


def test_loaded_weights_outlive_their_file(folder):
    """They are copies: a file that is overwritten later must not change the model."""
    model = load(folder, torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_model_plus_one_tensor(folder, monkeypatch, stored):
    source = {n: t.to(stored) for n, t in load_file(folder / "model.safetensors").items()}

    class Shard:  # stands in for the file; reading a tensor costs its size, as from a disk
        def __init__(self, *_): ...
        def __enter__(self): return self
        def __exit__(self, *_): ...
        def keys(self): return source.keys()
        def get_slice(self, n): return SimpleNamespace(get_shape=lambda: list(source[n].shape),
                                                       get_dtype=lambda: "any")
        def get_tensor(self, n): return source[n].clone()

    monkeypatch.setattr(C, "safe_open", Shard)
    with PeakBytes() as watch:
        model = load(folder, torch.float32)
    size = sum(4 * p.numel() for p in model.parameters())
    largest = max(4 * p.numel() for p in model.parameters())
    assert size <= watch.peak <= size + largest + 64
    assert largest < size / 4  # so that holding the file's tensors as well could not pass


# ---------------------------------------------------------------------------------------- config


def edit_json(path, drop=(), **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    for name in drop:
        value.pop(name, None)
    path.write_text(json.dumps(value))


OLD = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=258, hidden_size=32,
    intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-5, hidden_act="silu", max_position_embeddings=512, bos_token_id=256,
    eos_token_id=257, rope_theta=5000.0, rope_scaling=None, torch_dtype="bfloat16",
    pretraining_tp=1, use_cache=True, attention_bias=False, initializer_range=0.02)


@pytest.mark.parametrize("scaling", [
    None, ROPE3])
def test_both_generations_of_config(tmp_path, scaling):
    (tmp_path / "config.json").write_text(json.dumps(OLD | {"rope_scaling": scaling}))
    old = C.read_config(tmp_path)
    transformers.LlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw and "rope_theta" not in raw and "dtype" in raw
    new = C.read_config(tmp_path)
    assert replace(old, rope_scaling=None) == replace(new, rope_scaling=None) == M.Config(
        258, 32, 80, 2, 4, 2, 8, rope_theta=5000.0, max_position_embeddings=512,
        bos_token_id=256, eos_token_ids=(257,))
    equal(M.rope_frequencies(old, "cpu"), M.rope_frequencies(new, "cpu"))
    assert old == new


@pytest.mark.parametrize("kind", ["tied", "wide heads", "eps and theta", "llama3 rope",
                                  "everything"])
def test_rope_frequencies_are_those_of_transformers(kind):
    config = tiny_llama(num_hidden_layers=1, **KINDS[kind]).config
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim, rope_theta=config.rope_theta,
            rope_parameters=(config.rope_scaling or {"rope_type": "default"})
            | {"rope_theta": config.rope_theta}))
    torch.testing.assert_close(M.rope_frequencies(config, "cpu"), theirs.inv_freq, rtol=1e-6,
                               atol=0)


def test_rope_scaling_by_its_old_name(folder):
    """Llama 3.1's first files said "type" where later ones say "rope_type"."""
    old = {"type" if k == "rope_type" else k: v for k, v in ROPE3.items()}
    edit_json(folder / "config.json", rope_scaling=old)
    close(M.rope_frequencies(C.read_config(folder), "cpu"),
          M.rope_frequencies(replace(C.read_config(folder), rope_scaling=ROPE3), "cpu"))


@pytest.mark.parametrize("eos, ids", [(7, (7,)), ([7, 9], (7, 9)), (None, ()), ([], ()), (0, (0,))])
def test_eos_token_id(folder, eos, ids):
    edit_json(folder / "config.json", eos_token_id=eos)
    assert C.read_config(folder).eos_token_ids == ids


def test_config_defaults(folder):
    """What old files leave out, as transformers fills it in."""
    edit_json(folder / "config.json", drop=[
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "max_position_embeddings",
        "hidden_act", "eos_token_id"])
    ours, theirs = C.read_config(folder), transformers.AutoConfig.from_pretrained(folder)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
                 "attention_bias", "mlp_bias", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_token_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize("name, default", [
    ("sliding_window", 4096),
    ("num_key_value_heads", 8),
])
def test_mistral_defaults(folder, name, default):
    """A mistral config without these keys has transformers' defaults."""
    edit_json(folder / "config.json", drop=[name], model_type="mistral", num_attention_heads=16)
    assert getattr(transformers.AutoConfig.from_pretrained(folder), name) == default
    assert getattr(C.read_config(folder), name) == default


@pytest.mark.parametrize("name", C.MODELS)
def test_short_names_need_no_download(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: 1 / 0)
    config = C.config_of(name)
    assert config == C.MODELS[name][1]
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert max(config.eos_token_ids) < config.vocab_size


DECODERS = [name for name, (_, config) in C.MODELS.items()
            if not M.FAMILIES[config.model_type].encoder]


@pytest.mark.parametrize("name", DECODERS)
def test_config_to_transformers_and_back(name, tmp_path):
    """Every field that a model depends on; and transformers' own file is read as the same."""
    ours = C.MODELS[name][1]
    raw = C.config_json(ours)
    C.save_json(tmp_path / "config.json", raw)
    assert C.read_config(tmp_path) == ours
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    defaults = M.FAMILIES[ours.model_type].defaults
    for field in (*C.REQUIRED, *set(defaults) - {"rope_theta", "rope_scaling", "eos_token_id",
                                                 "hidden_act", "hidden_activation"}):
        assert getattr(theirs, field) == getattr(ours, field), field
    assert theirs.eos_token_id == list(ours.eos_token_ids)
    assert getattr(theirs, "hidden_activation", theirs.hidden_act) == ours.hidden_act
    assert theirs.rope_parameters == {"rope_theta": ours.rope_theta} | (
        ours.rope_scaling or {"rope_type": "default"})
    if ours.model_type == "gemma2":
        assert theirs.layer_types == ["sliding_attention", "full_attention"] * (
            ours.num_hidden_layers // 2)
    theirs.save_pretrained(tmp_path / "back")
    assert "rope_theta" not in C.read_json(tmp_path / "back" / "config.json")
    assert C.read_config(tmp_path / "back") == ours


@pytest.mark.parametrize("kind", ["llama3 rope", "eps and theta", "gemma2"])
def test_written_configs_have_rope_in_both_places(kind):
    """transformers 4 looks at the top alone: there is no other sign that it read 10000."""
    config = tiny_llama(num_hidden_layers=1, **KINDS[kind]).config
    raw = C.config_json(config)
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == config.rope_theta
    assert raw["rope_scaling"] == config.rope_scaling
    assert raw["rope_parameters"].items() >= (config.rope_scaling or {}).items()


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_two_places_that_contradict_each_other_are_refused(folder, place):
    edit_json(folder / "config.json", {"rope_parameters", "rope_scaling"} - {place},
              **{place: {"rope_type": "default", "rope_theta": 5.0}})
    refused(lambda: load(folder), folder / "config.json",
            f"rope_theta is 10000.0, and in {place} 5.0")
    edit_json(folder / "config.json", rope_theta=5.0)
    assert load(folder).config.rope_theta == 5.0
    edit_json(folder / "config.json", ["rope_theta"])
    assert load(folder).config.rope_theta == 5.0


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("base, good, bad", [
    (GEMMA2, [SLIDING, FULL, SLIDING], [[FULL, SLIDING, FULL], [SLIDING] * 3, [SLIDING, FULL],
                                        [], "sliding_attention", 3]),
    (MISTRAL, [SLIDING] * 3, [[SLIDING, FULL, SLIDING], [FULL] * 3]),
], ids=["gemma2", "mistral"])
def test_layer_types(tmp_path, base, good, bad):
    C.save(tiny_llama(num_hidden_layers=3, **base), tmp_path)
    before = C.read_config(tmp_path)
    edit_json(tmp_path / "config.json", layer_types=good)
    assert C.read_config(tmp_path) == before
    for kinds in bad:
        edit_json(tmp_path / "config.json", layer_types=kinds)
        refused(lambda: C.read_config(tmp_path), tmp_path / "config.json",
                "layer_types .* is not supported")


@pytest.mark.parametrize("missing", ["sliding_window", "query_pre_attn_scalar", "head_dim",
                                     "attn_logit_softcapping", "final_logit_softcapping",
                                     "tie_word_embeddings", "num_key_value_heads",
                                     "hidden_activation", "pad_token_id"])
def test_gemma2_defaults(tmp_path, missing):
    """A gemma2 config without these keys has transformers' defaults, and may say hidden_act."""
    C.save(tiny_llama(num_hidden_layers=2, **GEMMA2 | dict(num_attention_heads=12)), tmp_path)
    edit_json(tmp_path / "config.json", [missing], hidden_act="silu")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    name = "hidden_act" if missing == "hidden_activation" else missing
    assert getattr(C.read_config(tmp_path), name) == getattr(theirs, missing)


def test_no_scalar_means_the_head_width(tmp_path):
    """transformers wants the number, and would take 256 where it is missing."""
    model = tiny_llama(num_hidden_layers=2, **GEMMA2 | dict(query_pre_attn_scalar=None))
    C.save(model, tmp_path)
    ids, _ = padded("right")
    with torch.no_grad():
        close(model(ids), oracle(tmp_path)(input_ids=ids).logits)
        equal(model(ids), load(tmp_path)(ids))


@pytest.mark.parametrize("field", ["attn_logit_softcapping", "final_logit_softcapping",
                                   "pad_token_id", "bos_token_id"])
def test_null_is_none_where_that_can_be(tmp_path, field):
    C.save(tiny_llama(num_hidden_layers=2, **GEMMA2), tmp_path)
    edit_json(tmp_path / "config.json", **{field: None})
    assert getattr(transformers.AutoConfig.from_pretrained(tmp_path), field) is None
    assert getattr(C.read_config(tmp_path), field) is None


@pytest.mark.parametrize("field, value", [
    ("attn_logit_softcapping", 0), ("attn_logit_softcapping", "50"),
    ("final_logit_softcapping", -1.0), ("query_pre_attn_scalar", 0),
    ("query_pre_attn_scalar", 20.5), ("sliding_window", -1), ("sliding_window", True),
    ("hidden_activation", "relu"), ("hidden_activation", None)])
def test_bad_fields_of_gemma2(tmp_path, field, value):
    C.save(tiny_llama(num_hidden_layers=2, **GEMMA2), tmp_path)
    edit_json(tmp_path / "config.json", **{field: value})
    refused(lambda: C.read_config(tmp_path), tmp_path / "config.json",
            field.replace("hidden_activation", "hidden_act"))


# -------------------------------------------------------------------------------------- tokenizer


AWKWARD = [
    "", " ", "  ", "\n", "\r\n\t", "a", " a", "a ", "\u00e9", "e\u0301", "\u4f60\u597d",
    "\U0001f469\u200d\U0001f52c", "\x00", "\x7f\x1b[0m", "\ufeffx", "\u202eabc", "\u00a0", "\u2028",
    "</s>", "a</s>b", "<s>", "<s><s> x</s>", "< /s>", "<|endoftext|>", "[INST] hi [/INST]",
    "1234567890", "3.14159e-10", "    def f():\n\treturn 1\n", "\\n\\\\", "'\"`", "a" * 500,
    "### Response:", "\U0010ffff", "\u0130\u0131\ufb01", "x\u0300\u0301\u0302",
]


@pytest.fixture(scope="module")
def tokenizers(checkpoint):
    return (C.Tokenizer(checkpoint, C.read_config(checkpoint)),
            transformers.AutoTokenizer.from_pretrained(checkpoint))


def same_tokens(ours, theirs, text):
    plain = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, bos=False) == plain
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(plain) == theirs.decode(plain, skip_special_tokens=True,
                                               clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_tokens(tokenizers, text):
    same_tokens(*tokenizers, text)


@settings(max_examples=60, deadline=None, database=None)
@given(st.text(max_size=40))
def test_tokens_of_any_text(tokenizers, text):
    same_tokens(*tokenizers, text)
    ours = tokenizers[0]
    assert ours.encode(text) == [256, *ours.encode(text, bos=False)]
    if "<s>" not in text and "</s>" not in text:
        assert ours.decode(ours.encode(text)) == text


def rewrite_tokenizer(folder, post_processor=None):
    tokenizer = byte_tokenizer()
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    edit_json(path, post_processor=None)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
        tokenizer.save(str(path))
    return C.Tokenizer(folder, C.read_config(folder))


def test_no_post_processor_no_bos(folder):
    tokenizer = rewrite_tokenizer(folder)
    assert tokenizer.prefix == [] and tokenizer.encode("a") == tokenizer.encode("a", bos=False)


def test_bos_is_only_what_stands_in_front(folder):
    tokenizer = rewrite_tokenizer(folder, processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]))
    assert tokenizer.encode("a") == [256, *tokenizer.encode("a", bos=False)]


def test_stored_truncation_and_padding_are_off(folder):
    """Some tokenizer.json carry the settings of whoever saved them last."""
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = C.Tokenizer(folder, C.read_config(folder))
    assert len(ours.encode("a")) == 2 and len(ours.encode("a" * 50)) == 51


@pytest.mark.parametrize("named, config, expected", [
    ("</s>", 257, (257,)),
    ("</s>", None, (257,)),
    ("</s>", [5, 257, 6], (257, 5, 6)),  # the tokenizer's own comes first, and once
    ("<s>", 257, (256, 257)),
    ({"content": "</s>", "lstrip": False}, 5, (257, 5)),  # an AddedToken
    (None, [5, 6], (5, 6)),
])
def test_eos(folder, named, config, expected):
    edit_json(folder / "config.json", eos_token_id=config)
    edit_json(folder / "tokenizer_config.json", eos_token=named)
    tokenizer = C.Tokenizer(folder, C.read_config(folder))
    assert tokenizer.eos_ids == expected and tokenizer.eos_id == expected[0]


def test_eos_without_tokenizer_config(folder):
    (folder / "tokenizer_config.json").unlink()
    assert C.Tokenizer(folder, C.read_config(folder)).eos_ids == (257,)


# -------------------------------------------------------------------------------------------- hub


def hub_error(kind, message="first line\nsecond line"):
    if issubclass(kind, errors.HfHubHTTPError):
        return kind(message, response=SimpleNamespace(headers={}, request=None))
    return kind(message)


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """A repository "owner/name" of three shards, downloaded file by file into a cache folder;
    hub.asked are the files asked for. What a download must not touch lies beside them."""
    remote, cache = shutil.copytree(checkpoint, tmp_path / "remote"), tmp_path / "cache"
    shards = split_into_shards(remote)
    for extra in ("consolidated.safetensors", "pytorch_model.bin", "README.md",
                  "model-00009-of-00009.safetensors"):
        (remote / extra).write_bytes(b"junk")
    cache.mkdir()
    asked = []

    def download(repo, filename, repo_type="model", **_):
        assert (repo, repo_type) == ("owner/name", "model")
        asked.append(filename)
        if not (remote / filename).exists():
            raise hub_error(errors.RemoteEntryNotFoundError)
        return str(shutil.copy(remote / filename, cache / filename))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(remote=remote, cache=cache, shards=shards, asked=asked)


INDEX = "model.safetensors.index.json"
SMALL = ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_fetch_takes_only_what_the_index_names(hub, checkpoint):
    assert C.fetch("owner/name") == hub.cache
    assert sorted(hub.asked) == sorted([*SMALL, INDEX, *hub.shards])
    weights_equal(load("owner/name"), load(checkpoint))


def test_fetch_without_index(hub, checkpoint):
    (hub.remote / INDEX).unlink()
    shutil.copy(checkpoint / "model.safetensors", hub.remote)
    (hub.remote / "tokenizer_config.json").unlink()  # optional as well
    C.fetch("owner/name")
    assert sorted(hub.asked) == sorted([*SMALL, INDEX, "model.safetensors"])


def test_config_of_asks_for_the_config_alone(hub, checkpoint):
    assert C.config_of("owner/name") == C.config_of(checkpoint) == C.read_config(checkpoint)
    assert hub.asked == ["config.json"]


def test_short_names_are_downloaded_from_their_repository(hub, monkeypatch, checkpoint):
    monkeypatch.setitem(C.MODELS, "short", ("owner/name", None))
    assert C.fetch("short") == hub.cache


@pytest.mark.parametrize("name", ["short", "owner/name"])
def test_a_folder_goes_before_the_hub(hub, monkeypatch, checkpoint, tmp_path, name):
    monkeypatch.setitem(C.MODELS, "short", ("owner/name", None))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / name)
    assert str(C.fetch(name)) == name and C.config_of(name) == C.read_config(checkpoint)
    assert hub.asked == []


HUB_ERRORS = [
    (errors.GatedRepoError, "gated.*licence.*hf auth login.*open copy.*local folder"),
    (errors.RepositoryNotFoundError, "no such repository.*hf auth login.*local folder"),
    (errors.RemoteEntryNotFoundError, "no such file; only checkpoints with .*safetensors"),
    (errors.LocalEntryNotFoundError, r"could not be downloaded \(first line\).*local file"),
    (errors.HfHubHTTPError, r"could not be downloaded \(first line\).*local file"),
    (errors.OfflineModeIsEnabled, r"could not be downloaded \(first line\).*local file"),
    (OSError, r"could not be downloaded \(first line\).*local file"),
]


@pytest.mark.parametrize("kind, words", HUB_ERRORS, ids=lambda x: getattr(x, "__name__", ""))
def test_hub_errors(monkeypatch, kind, words):
    def fail(*_, **__):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    refused(lambda: C.fetch("owner/name"), "owner/name/config.json", words)
    absent = kind in (errors.RemoteEntryNotFoundError, errors.LocalEntryNotFoundError)
    if absent:
        assert C.hub_optional("owner/name", "x") is None
    else:  # an optional file is absent only where the hub, or an offline cache, says so
        refused(lambda: C.hub_optional("owner/name", "x"), "owner/name/x", words)


@pytest.mark.parametrize("installed, good", [
    ("1.32.9", False), ("0.36.2", False), ("1.33.0", True), ("1.33rc1", True), ("2.4.0", True)])
def test_a_hub_library_that_is_too_old_is_said_before_it_is_asked(
        hub, checkpoint, monkeypatch, installed, good):
    monkeypatch.setattr(huggingface_hub, "__version__", installed)
    if good:
        C.config_of("owner/name")
    else:
        with pytest.raises(C.UserError, match=r"^huggingface_hub .* too old; install 1.33"):
            C.config_of("owner/name")


def test_the_pinned_versions_are_among_those_that_are_said_to_do():
    """pyproject.toml asks for no newer version than the code, and `make` installs one of these."""
    root = Path(C.__file__).parent
    asked = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = dict(line.split("==") for line in (root / "requirements.txt").read_text().split())
    for package, least in C.LEAST.items():
        assert f"{package}>={least}" in asked
        C.check_version(package, pins[package])


@pytest.mark.parametrize("name", ["a/b c", "a/", "a/b.git"])
def test_impossible_hub_names(name):
    """hf_hub_download itself refuses them, before any network."""
    refused(lambda: C.fetch(name), name)


def test_index_from_the_hub_stays_in_its_folder(hub):
    (hub.remote / INDEX).write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    refused(lambda: C.fetch("owner/name"), INDEX, "outside")
    assert not any("/" in name for name in hub.asked)


# -------------------------------------------------------------------------------------- bad input


def refused(call, names: str, words: str = "."):
    """call() ends in a UserError of one line that names the file and matches `words`."""
    with pytest.raises(C.UserError, match=words) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and str(names) in message, message


@pytest.mark.parametrize("name", ["no-such", "/no/such", "./no/such", "a/b/c", "~/x", "../x/y"])
def test_unknown_model(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: 1 / 0)
    refused(lambda: load(name), name, "no such folder.*llama2-7b.*owner/name")


@pytest.mark.parametrize("name", ["no-such", "/no/such", "./no/such", "a/b/c", "../x/y",
                                  "~/x"])
def test_unknown_model_has_no_config(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: 1 / 0)
    refused(lambda: C.config_of(name), name, "no such folder.*llama2-7b.*owner/name")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unknown_device(folder, device):
    refused(lambda: C.load(folder, device=device), f"--device {device}", "not usable here")


CONFIG = {  # field: values that must be refused
    "model_type": ["gpt2", "gemma", None, 3, []],
    "hidden_act": ["relu", None, ["silu"]],
    "rope_scaling": [{"rope_type": "yarn", "factor": 2.0}, {"type": "linear", "factor": 2.0},
                     {"type": "dynamic"}, {"rope_type": None}],
    "rope_parameters": [{"rope_type": "longrope", "rope_theta": 1e4}],
    "vocab_size": [0, -1, "258", 258.0, None, True, [258]],
    "hidden_size": [0, -32, "32", None, 33],
    "intermediate_size": [0, -1, "80", None],
    "num_hidden_layers": [0, -2, "2", None, 2.5],
    "num_attention_heads": [0, -4, "4", None, 3],
    "num_key_value_heads": [0, -2, "2", 3, 8],
    "head_dim": [0, -8, "8", 8.0],
    "max_position_embeddings": [0, "1024"],
}
MORE_CONFIG = {
    "rope_theta": ["x", None, 0],
    "rope_scaling": [[1], "llama3", {"rope_type": "llama3"},
                     {"rope_type": "llama3", "factor": 8.0}, ROPE3 | {"factor": "8"}],
    "rope_parameters": [{"rope_type": "default", "rope_theta": None}],
    "eos_token_id": ["</s>", [1, "x"], True, -1, {}],
    "tie_word_embeddings": ["false"],
    "num_hidden_layers": [1001, 10**9, 10**400],  # which would be built one by one
    "vocab_size": [2**25, 2**62],  # whose bytes do not fit into 64 bits
    "rms_norm_eps": ["x", None, -1.0, 10**400],  # the last is no float
    "head_dim": [7],  # odd: rotary pairs need an even width
}
BAD_CONFIG = [(name, value) for table in (CONFIG, MORE_CONFIG) for name, values in table.items()
              for value in values]


@pytest.mark.parametrize("name, value", BAD_CONFIG, ids=repr)
def test_bad_config_field(folder, name, value):
    misfit = (name, value) in [("hidden_size", 33), ("num_attention_heads", 3),
                               ("num_key_value_heads", 3), ("num_key_value_heads", 8)]
    edit_json(folder / "config.json", ["head_dim"] * misfit, **{name: value})
    words = "heads fit neither" if misfit else "rope" if "rope" in name else name
    refused(lambda: load(folder), folder / "config.json", words)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size",
                                  "num_hidden_layers", "num_attention_heads", "model_type"])
def test_missing_config_field(folder, name):
    edit_json(folder / "config.json", drop=[name])
    refused(lambda: load(folder), folder / "config.json", name)


def test_an_unsupported_model_type_is_told_the_supported_ones(folder):
    edit_json(folder / "config.json", model_type="bert")
    refused(lambda: load(folder), folder / "config.json",
            "model_type 'bert' is not supported; supported: llama, mistral, gemma2, roberta$")


@pytest.mark.parametrize("name, value", [
    ("is_decoder", True), ("problem_type", "multi_label_classification")])
def test_what_an_encoder_may_not_say(tmp_path, name, value):
    """It would be another function: a causal mask, a score of its own for each class."""
    C.save(tiny_roberta(), tmp_path)
    edit_json(tmp_path / "config.json", **{name: value})
    refused(lambda: load(tmp_path), tmp_path / "config.json", f"{name} {value!r} is not supported")


def test_what_is_supported_is_listed_with_its_size():
    """`python checkpoint.py --list`; published sizes, in millions."""
    process = subprocess.run([sys.executable, C.__file__, "--list"], capture_output=True, text=True)
    lines = process.stdout.split("\n\n")[0].splitlines()[1:]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert process.returncode == 0 and list(rows) == list(C.MODELS)
    assert rows["gemma2-9b"] == ["google/gemma-2-9b", "gemma2", "9,241.7M", "42"]
    assert {name: row[-2] for name, row in rows.items()} == {
        "microcosm": "1.4M", "llama2-7b": "6,738.4M", "llama2-13b": "13,015.9M",
        "llama3-8b": "8,030.3M", "llama3.1-8b": "8,030.3M", "llama3.2-1b": "1,235.8M",
        "llama3.2-3b": "3,212.7M", "mistral-7b-v0.1": "7,241.7M", "mistral-7b-v0.3": "7,248.0M",
        "gemma2-2b": "2,614.3M", "gemma2-9b": "9,241.7M", "roberta-base": "124.6M",
        "roberta-large": "355.4M", "smollm2-135m": "134.5M", "smollm2-135m-instruct": "134.5M",
        "smollm2-360m": "361.8M", "smollm2-1.7b": "1,711.4M"}
    assert process.stdout.rstrip().endswith("model_type llama, mistral, gemma2, roberta")


def test_a_classifier_refuses_texts_padded_on_the_left():
    """Its class is read off the first token, which is padding there."""
    model = tiny_roberta()
    batch = tiny_texts((9, 5), model.config)
    model.loss(**batch)
    flipped = {"input_ids": batch["input_ids"].flip(1), "labels": batch["labels"],
               "attention_mask": batch["attention_mask"].flip(1)}
    with pytest.raises(ValueError, match="padded on the right"):
        model.loss(**flipped)


def test_sliding_window(folder):
    """Read where the family has one, and nowhere else."""
    edit_json(folder / "config.json", model_type="mistral", sliding_window=7)
    assert C.read_config(folder).sliding_window == 7
    edit_json(folder / "config.json", sliding_window=None)
    assert C.read_config(folder).sliding_window is None
    edit_json(folder / "config.json", sliding_window=0)
    refused(lambda: load(folder), folder / "config.json", "sliding_window must be .*, not 0")
    edit_json(folder / "config.json", model_type="llama")
    assert load(folder).config.sliding_window is None


BROKEN_JSON = [b"", b"{", b"[1, 2]", b"null", b"3", b'"text"', b"\xff\xfe{}", b'{"a": 1,}',
               b"\x80abc", b"{}{}"]


@pytest.mark.parametrize("content", BROKEN_JSON, ids=repr)
@pytest.mark.parametrize("file", ["config.json", INDEX, "tokenizer_config.json"])
def test_broken_json(folder, file, content):
    (folder / file).write_bytes(content)
    if file == INDEX:  # which is read only where there is no single file
        (folder / "model.safetensors").unlink()

    def call():
        load(folder)
        C.Tokenizer(folder, C.read_config(folder))

    refused(call, folder / file, "not readable as JSON|not a JSON object")


def test_config_is_a_folder_or_missing(folder):
    (folder / "config.json").unlink()
    refused(lambda: load(folder), folder / "config.json", "no such file")
    (folder / "config.json").mkdir()
    refused(lambda: load(folder), folder / "config.json", "not readable")


NORM = "model.norm.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
    (lambda t: (t.pop(NORM), t.pop("lm_head.weight")), "lm_head.weight and 1 more is missing"),
    (lambda t: t.clear() or t.update(x=torch.ones(1)), "unexpected tensor x"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(80)}),
     "unexpected tensor model.layers.0.mlp.up_proj.bias"),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(80, 32)}), "unexpected"),
    (lambda t: t.update({NORM: torch.ones(33)}), r"shape \(33,\), config.json implies \(32,\)"),
    (lambda t: t.update({NORM: torch.ones(1, 32)}), r"shape \(1, 32\)"),
    (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(32, 80)}),
     r"up_proj.weight has shape \(32, 80\), config.json implies \(80, 32\)"),
    *[(lambda t, d=d: t.update({NORM: torch.ones(32).to(d)}), f"{NORM} is {d}.*quantised")
      for d in (torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)],
])
def test_wrong_tensors(folder, change, words):
    edit_weights(folder, change)
    refused(lambda: load(folder),
            folder if "missing" in words else folder / "model.safetensors", words)


def test_everything_is_checked_before_the_first_byte(folder, monkeypatch):
    """A fault in the last shard is found before any tensor of the first is read."""
    shards = split_into_shards(folder)
    save_file({"x": torch.ones(1)}, folder / shards[-1])
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: 1 / 0)
    refused(lambda: load(folder), folder / shards[-1], "unexpected tensor x")


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_missing_shard(folder, shard):
    name = split_into_shards(folder)[shard]
    (folder / name).unlink()
    refused(lambda: load(folder), folder / name, "named by the index")


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, "half header", "header", "header + 1", -4, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_weights(folder, cut, sharded):
    path = folder / (split_into_shards(folder)[1] if sharded else "model.safetensors")
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    cut = {"half header": header // 2, "header": header, "header + 1": header + 1}.get(cut, cut)
    path.write_bytes(content[:cut])
    refused(lambda: load(folder), path, "damaged or incomplete")


@pytest.mark.parametrize("content", [
    b"\xff" * 64, b"\x00" * 64, b"\x02" + b"\x00" * 7 + b"{}" + b"extra", b"PK\x03\x04" * 20,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n",
], ids=["ff", "00", "extra bytes", "a zip", "a git-lfs pointer"])
def test_not_safetensors(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(lambda: load(folder), folder / "model.safetensors", "damaged or incomplete")


@pytest.mark.parametrize("shard", [
    "../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors", "..\\x.safetensors", ".", None, 3,
    ["x"],
    {},
    "..",
    "",
])
def test_index_points_outside(folder, shard):
    # A sound checkpoint lies where the index points: following it would work.
    shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: shard}}))
    refused(lambda: load(folder), folder / INDEX, "points outside")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": None},
                                   {"weight_map": ["x"]}, {"weight_map": "x"}])
def test_index_without_weight_map(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps(index))
    refused(lambda: load(folder), folder / INDEX, "weight_map")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_never_opened(folder, name, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: 1 / 0)
    (folder / "model.safetensors").rename(folder / name)
    refused(lambda: load(folder), folder, "pickled.*safe_serialization=True")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(lambda: load(folder), folder, "no model.safetensors")


def test_a_post_processor_that_leaves_the_text_out(folder):
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["post_processor"]["single"] = raw["post_processor"]["single"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    refused(lambda: C.Tokenizer(folder, C.read_config(folder)), folder / "tokenizer.json",
            "changes the text")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_what_never_ends_is_not_read(folder, name, kind):
    (folder / name).unlink()
    if kind == "a pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    config = C.MODELS["microcosm"][1]
    refused(lambda: C.Tokenizer(folder, config) if "tok" in name else load(folder),
            folder / name, "a pipe or device")


def moved(file, place):
    """A file at another place, and a link to it where it was."""
    place.parent.mkdir(parents=True, exist_ok=True)
    file.rename(place)
    file.symlink_to(os.path.relpath(place, file.parent))


def read_all(folder, tmp_path):
    """As the scripts read a model folder, and as an export copies it."""
    load(folder)
    C.fingerprint(folder)
    C.Tokenizer(folder, C.read_config(folder))
    target = tmp_path / "target"
    target.mkdir()
    C.save_json(target / "config.json", {})
    C.copy_companions(folder, target)
    return sorted(p.name for p in target.iterdir())


@pytest.mark.parametrize("name, reads", [
    ("config.json", load),
    ("config.json", C.read_config),
    ("model.safetensors", load),
    ("model.safetensors", C.fingerprint),
    ("model-1.safetensors", load),
    (INDEX, load),
    ("tokenizer.json", load),
    ("tokenizer.json", lambda folder: C.Tokenizer(folder, C.MODELS["microcosm"][1])),
    ("tokenizer_config.json", lambda folder: C.Tokenizer(folder, C.read_config(folder))),
    ("tokenizer.model", load),
    ("tokenizer.model", lambda folder: C.copy_companions(folder, folder.parent / "target")),
    ("chat_template.jinja", load),
])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, name, reads):
    """A good file behind it would do, so the link alone is what is refused."""
    if name in (INDEX, "model-1.safetensors"):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        names = load_file(folder / "model-1.safetensors")
        (folder / INDEX).write_text(
            json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    moved(folder / name, tmp_path / "secret")
    refused(lambda: reads(folder), folder / name,
            f"a link that leads out of its folder, to {tmp_path / 'secret'}; copy that file here")
    assert not (tmp_path / "target").exists()


def test_an_adapter_that_is_a_link_out_of_its_folder(folder, tmp_path):
    path = tmp_path / "run" / "adapter.safetensors"
    path.parent.mkdir()
    model = spoilt_adapter(folder, path, lambda *_: None)
    moved(path, tmp_path / "secret")
    refused(lambda: C.load_adapter(model, path), path, "leads out of its folder")


def test_links_that_stay_within_the_folder(folder, tmp_path):
    for file in list(folder.iterdir()):
        moved(file, folder / "files" / file.name)
    (tmp_path / "link").symlink_to(folder)  # and the folder itself is one
    assert "tokenizer.json" in read_all(tmp_path / "link", tmp_path)


def test_the_links_of_the_hubs_cache(folder, tmp_path):
    """snapshots/REVISION/FILE -> ../../blobs/HASH, but not to another repository's blobs, nor
    through blobs that are a link themselves."""
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        moved(file, repo / "blobs" / f"{i:040x}")
    assert "tokenizer.json" in read_all(snapshot, tmp_path)
    (tmp_path / "link").symlink_to(repo)
    load(tmp_path / "link" / "snapshots" / "0123")

    config = snapshot / "config.json"
    kept = config.readlink()
    for place in (tmp_path / "models--owner--other" / "blobs" / "1", repo / "refs" / "main",
                  tmp_path / "blobs" / "1"):
        place.parent.mkdir(parents=True)
        shutil.copyfile(repo / "blobs" / kept.name, place)
        config.unlink()
        config.symlink_to(place)
        refused(lambda: load(snapshot), config, "leads out of its folder")
    config.unlink()
    config.symlink_to(kept)
    (repo / "blobs").rename(tmp_path / "elsewhere")
    (repo / "blobs").symlink_to(tmp_path / "elsewhere")
    refused(lambda: load(snapshot), snapshot, "leads out of its folder")


def test_a_hub_folder_by_another_name_is_none(folder, tmp_path):
    (tmp_path / "snapshots").mkdir()
    folder.rename(tmp_path / "snapshots" / "0123")
    folder = tmp_path / "snapshots" / "0123"
    moved(folder / "config.json", tmp_path / "blobs" / "1")
    refused(lambda: load(folder), folder / "config.json", "leads out of its folder")


def spoilt_adapter(folder, path, change):
    """A file like an adapter's, without a seal; returns the model that it is for."""
    model = load(folder, torch.float32)
    W = model.model.layers[0].self_attn.q_proj.weight
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.A": torch.ones(2, W.shape[1]), f"{name}.B": torch.ones(W.shape[0], 2)}
    about = {"scaling": 1.0, "residual": "split"}
    change(tensors, about, name)
    C.save_tensors(path, tensors, {"adapter": json.dumps(about)})
    return model


@pytest.mark.parametrize("change, words", [
    (lambda t, a, n: t.update({f"{n}.A": torch.ones(3)}), "does not fit"),
    (lambda t, a, n: t.update({f"{n}.A": torch.ones(3, t[f"{n}.A"].shape[1])}), "does not fit"),
    (lambda t, a, n: t.update({f"{n}.A0": t[f"{n}.A"].clone()}), "does not fit"),
    (lambda t, a, n: t.update({f"{n}.d": torch.ones(5)}), "does not fit"),
    (lambda t, a, n: t.update({f"{n}.a0": torch.ones(5)}), "a0, which is no part of an adapter"),
    (lambda t, a, n: t[f"{n}.B"].fill_(torch.nan), "no finite number"),
    (lambda t, a, n: t.update({f"{n}.B": t[f"{n}.B"].long()}), "no finite number"),
    (lambda t, a, n: a.update(scaling="1"), "cannot be"),
    (lambda t, a, n: a.update(scaling={}), "cannot be"),
    (lambda t, a, n: a.update(residual="none"), "cannot be"),
    (lambda t, a, n: a.clear(), "cannot be"),
    (lambda t, a, n: a.update(sha256="0"), "bytes are not those that were written"),
])
def test_an_adapter_that_cannot_be(folder, tmp_path, change, words):
    path = tmp_path / "a.safetensors"
    C.load_adapter(spoilt_adapter(folder, path, lambda *_: None), path)  # of an older version
    refused(lambda: C.load_adapter(spoilt_adapter(folder, path, change), path), path, words)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"not json", b"\xff\xfe",
                                     b'{"model": {"type": "Nonsense"}}'], ids=repr)
def test_broken_tokenizer(folder, content):
    path = folder / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(lambda: C.Tokenizer(folder, C.read_config(folder)), path,
            "no such file.*AutoTokenizer" if content is None else "not a readable tokenizer")


def test_truncated_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-50])
    refused(lambda: C.Tokenizer(folder, C.read_config(folder)), path, "not a readable tokenizer")


def test_tokenizer_larger_than_the_embedding(folder):
    config = C.read_config(folder)
    C.Tokenizer(folder, replace(config, vocab_size=258))
    C.Tokenizer(folder, replace(config, vocab_size=300))  # a padded embedding is common
    refused(lambda: C.Tokenizer(folder, replace(config, vocab_size=257)),
            folder / "tokenizer.json", "token id 257.*257 rows")


def test_no_eos_anywhere(folder):
    edit_json(folder / "config.json", eos_token_id=None)
    edit_json(folder / "tokenizer_config.json", drop=["eos_token"])
    refused(lambda: C.Tokenizer(folder, C.read_config(folder)), folder / "tokenizer_config.json",
            "no eos_token")


@pytest.mark.parametrize("eos", [
    5,
    ["</s>"],
    "no such token",
])
def test_bad_eos_token(folder, eos):
    edit_json(folder / "tokenizer_config.json", eos_token=eos)
    refused(lambda: C.Tokenizer(folder, C.read_config(folder)), folder / "tokenizer_config.json")


def test_a_head_that_is_not_the_embedding_is_refused_where_config_ties_them(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    refused(lambda: load(tmp_path), tmp_path / "model.safetensors", "is not the embedding")


# ------------------------------------------------------- what transformers and older models leave


def test_one_file_goes_before_a_stale_index(folder):
    """save_pretrained removes old shards, but not their index; old shards may still be there."""
    theirs = oracle(folder)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="40KB")
    old = {p.name: p.read_bytes() for p in folder.glob("model-0*")}
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.5)
    theirs.save_pretrained(folder)
    for shards in ({}, old):
        for name, content in shards.items():
            (folder / name).write_bytes(content)
        equal(load(folder).lm_head.weight, theirs.lm_head.weight)
        equal(oracle(folder).lm_head.weight, theirs.lm_head.weight)


def test_a_special_token_above_the_embedding_is_refused_only_in_a_text(folder):
    """As the first Llama 2's <pad>: plain text never gives it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = C.Tokenizer(folder, C.read_config(folder))
    assert ours.prefix == [256] and ours.encode("pad")[0] == 256
    refused(lambda: ours.encode("a <pad>"), "'<pad>'", "no row")
    tokenizer.add_tokens(["plain"])
    tokenizer.save(str(folder / "tokenizer.json"))
    refused(lambda: C.Tokenizer(folder, C.read_config(folder)), folder, "token id 259")


def test_companions_of_a_checkpoint_are_copied(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("x")
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 10]}')
    edit_json(folder / "config.json", pad_token_id=3)
    model = load(folder)
    C.save(model, tmp_path / "new")
    C.copy_companions(folder, tmp_path / "new")
    names = {p.name for p in (tmp_path / "new").iterdir()}
    assert names == {p.name for p in folder.iterdir()}
    assert C.read_json(tmp_path / "new" / "config.json")["pad_token_id"] == 3
    assert C.read_config(tmp_path / "new") == C.read_config(folder)


def test_a_fingerprint_is_of_names_and_values_not_of_files(folder, tmp_path):
    first = C.fingerprint(folder)
    oracle(folder).save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert C.fingerprint(tmp_path / "sharded") == first
    write_checkpoint(tmp_path / "other", seed=1, num_hidden_layers=2)
    assert C.fingerprint(tmp_path / "other") != first
    for name, place in ((NORM, 0), ("model.layers.1.mlp.up_proj.weight", (-1, -1))):
        edit_weights(folder, lambda t, n=name, p=place: t[n].__setitem__(p, 7.0))
        changed = C.fingerprint(folder)
        assert changed != first
        first = changed
    large = {"model.embed_tokens.weight": torch.zeros(70_000, 2)}
    for row in (0, 35_000, 69_999):
        large["model.embed_tokens.weight"][row] = 1.0
        save_file(large, folder / "model.safetensors")
        assert C.fingerprint(folder) != first
        first = C.fingerprint(folder)


def test_save_tensors_writes_what_safetensors_does(tmp_path):
    """Byte for byte: order, alignment, names, empty and scalar tensors, views, shared memory."""
    base = torch.arange(12.0).view(3, 4)
    tensors = {"b": base, "a.weight": base.t(), "half": base[1:, ::2].half(),
               "é\"": base.bfloat16(), "flag": base > 5, "one": torch.tensor(3),
               "int": base.int(), "none": base[:0], "wide": base.double(), "byte": base.byte(),
               "same": base}
    own = {n: t.clone().contiguous() for n, t in tensors.items()}
    for metadata in ({"format": "pt"}, {"adapter": json.dumps({"é": "\n\"", "x": 1e-3})}, {}):
        C.save_tensors(tmp_path / "ours", tensors, metadata)
        save_file(own, tmp_path / "theirs", metadata or None)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        C.save_tensors(tmp_path / "ours", dict(reversed(tensors.items())), metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_a_kill_leaves_of_a_write_goes_with_the_next(tmp_path, monkeypatch):
    file, temporary = tmp_path / "a.safetensors", tmp_path / "a.safetensors.tmp"

    def killed(name):
        raise SystemExit

    with monkeypatch.context() as m:
        m.setattr(C.Path, "unlink", lambda *_, **__: None)  # a process that was killed does nothing
        with pytest.raises(SystemExit):
            C.stream_tensors(file, {"x": ((2,), torch.float32)}, {}, killed)
    assert list(tmp_path.iterdir()) == [temporary]
    C.save_tensors(file, {"x": torch.ones(2)}, {"a": "b"})
    assert list(tmp_path.iterdir()) == [file]


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path):
    """A folder from elsewhere must not have a file of this machine overwritten."""
    other = tmp_path / "other"
    other.write_text("mine")
    for name, save in (("a", lambda path: C.save_text(path, "text")),
                       ("b", lambda path: C.save_tensors(path, {"x": torch.ones(2)}, {}))):
        (tmp_path / f"{name}.tmp").symlink_to(other)
        (tmp_path / name).symlink_to(other)
        save(tmp_path / name)
        assert other.read_text() == "mine" and not (tmp_path / name).is_symlink()


def test_loading_and_a_pass_leave_torchs_compiler_alone(tmp_path):
    """Its import takes a second and 70 MB; torch does it for a random number on the meta device."""
    code = ("import sys, torch, checkpoint\n"
            "checkpoint.load(sys.argv[1])(torch.arange(5)[None])\n"
            "assert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, write_checkpoint(tmp_path / "tiny")],
                   cwd=Path(C.__file__).parent, check=True)
