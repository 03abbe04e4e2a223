"""RoBERTa with a classification head, beside transformers: its function, dropout, files, adapters,
and the Fisher factors of its layers."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from test_farss import listen
from tiny import (
    ROBERTAS,
    TINY_ROBERTA,
    classifier_oracle,
    retained,
    roberta_tokenizer,
    tiny_llama,
    tiny_roberta,
    tiny_texts,
)

import checkpoint as C
import farss
import model as M

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)  # of fp64
near = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # of fp32
equal = partial(torch.testing.assert_close, rtol=0, atol=0)
load = partial(C.load, device="cpu")  # equalities below are of CPU tensors, also on a GPU machine
SIX, FOUR = M.ENCODER_TARGETS["six"], M.ENCODER_TARGETS["four"]
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


@pytest.fixture(scope="module", params=ROBERTAS)
def twins(request, tmp_path_factory):
    """(our model, transformers' model of the same weights) in fp64, which tells GELU from its
    tanh form, and a batch of unlike lengths."""
    ours = tiny_roberta(dtype=torch.float64, **ROBERTAS[request.param])
    folder = tmp_path_factory.mktemp("twins")
    C.save(ours, folder)
    return SimpleNamespace(ours=ours, theirs=classifier_oracle(folder, dtype=torch.float64),
                           folder=folder, batch=tiny_texts(config=ours.config))


# ---------------------------------------------------------------------- the function it computes


@torch.no_grad()
@pytest.mark.parametrize("padded", [True, False])
def test_hidden_states_and_scores(twins, padded):
    """At padding, too: it has the position of the pad id, whatever its neighbours."""
    if not padded:
        ids, mask = tiny_texts([13, 13], twins.ours.config)["input_ids"], None
    else:
        ids, mask = twins.batch["input_ids"], twins.batch["attention_mask"]
    theirs = twins.theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    close(twins.ours.roberta(ids, mask), theirs.hidden_states[-1])
    close(twins.ours(ids, mask), theirs.logits)
    assert theirs.logits.shape == (len(ids), len(twins.ours.config.labels))
    assert theirs.logits.std(0).min() > 0.02


def test_loss_and_gradients(twins):
    """The loss is a sum and transformers' a mean; cross entropy of classes, and of a single label
    the squared error."""
    ours, theirs, n = twins.ours, twins.theirs, len(twins.batch["labels"])
    batch = dict(twins.batch)
    batch["labels"] = batch["labels"].double() if batch["labels"].is_floating_point() else (
        batch["labels"])
    ours.requires_grad_(True).zero_grad()
    theirs.zero_grad()
    total, count = ours.loss(**batch)
    out = theirs(**batch)
    assert count == n
    close(total / n, out.loss)
    total.backward()
    (n * out.loss).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        close(p.grad, grads.pop(name), msg=lambda m, name=name: f"{name}: {m}")
    assert not grads


@torch.no_grad()
def test_a_padded_text_is_what_it_is_alone(twins):
    ids, mask = twins.batch["input_ids"], twins.batch["attention_mask"].bool()
    together = twins.ours.roberta(ids, twins.batch["attention_mask"])
    for row, real in enumerate(mask):
        close(together[row, real], twins.ours.roberta(ids[row, real][None])[0])


@torch.no_grad()
def test_the_longest_text(twins):
    """The positions before `first` are nobody's: a text has that many tokens fewer."""
    config = twins.ours.config
    assert config.longest == config.max_position_embeddings - config.pad_token_id - 1
    ids = tiny_texts([config.longest, 5], config)["input_ids"][:1]
    close(twins.ours(ids), twins.theirs(input_ids=ids).logits)
    with pytest.raises(IndexError):
        twins.ours(F.pad(ids, (0, 1), value=9))


@torch.no_grad()
@pytest.mark.parametrize("setting", [dict(layer_norm_eps=0.1), dict(pad_token_id=7),
                                     dict(hidden_act="gelu_pytorch_tanh")],
                         ids=lambda s: next(iter(s)))
def test_settings_matter(setting):
    """Each changes the scores by more than the equalities above forgive."""
    ids = tiny_texts([13])["input_ids"]
    plain, changed = (tiny_roberta(dtype=torch.float64, **s)(ids) for s in ({}, setting))
    assert (plain - changed).abs().max() > 1e-4


@torch.no_grad()
def test_bf16(tmp_path):
    """The yardstick is transformers' own bf16 error, as in test_model.py."""
    C.save(tiny_roberta(), tmp_path)
    batch = {k: v for k, v in tiny_texts([20, 9, 2, 13] * 8).items() if k != "labels"}
    exact = classifier_oracle(tmp_path, dtype=torch.float32)(**batch).logits
    theirs = classifier_oracle(tmp_path, dtype=torch.bfloat16)(**batch).logits
    ours = load(tmp_path, torch.bfloat16)(**batch)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    error, allowed = ((x.float() - exact).norm() / exact.norm() for x in (ours, theirs))
    assert 0 < error < 1.25 * allowed < 0.2


@torch.no_grad()
def test_real_width():
    """roberta-base as it is but for depth and vocabulary."""
    config = replace(C.MODELS["roberta-base"][1], num_hidden_layers=2, vocab_size=300)
    torch.manual_seed(0)
    theirs = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**C.config_json(config))).eval()
    for p in theirs.parameters():
        p.add_(0.05 * torch.randn_like(p))  # transformers starts with biases of 0
    ours = M.empty(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    batch = tiny_texts([config.longest, 40], config)
    near(ours.eval()(batch["input_ids"], batch["attention_mask"]), theirs(**batch).logits)


def test_an_encoder_does_not_generate():
    with pytest.raises(ValueError, match="a roberta model does not generate text"):
        M.generate(tiny_roberta(), [[0, 9]], 3)


# ----------------------------------------------------------------------------------------- dropout


def drawn(model, batch, seed=0):
    torch.manual_seed(seed)
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return out if isinstance(out, torch.Tensor) else out.logits


@torch.no_grad()
@pytest.mark.parametrize("settings", [
    *({name: 0.4 if name == on else 0.0 for name in DROPOUTS} for on in DROPOUTS),
    dict(hidden_dropout_prob=0.4),  # the classifier's is None: it has the hidden one, too
    dict(zip(DROPOUTS, (0.1, 0.2, 0.3), strict=True)),
], ids=[*DROPOUTS, "None", "all"])
def test_dropout_is_where_transformers_has_it(settings, tmp_path):
    """Both draw the same numbers in the same order, if the places and the shapes are the same."""
    ours, batch = tiny_roberta(**settings), tiny_texts()
    C.save(ours, tmp_path)
    theirs = classifier_oracle(tmp_path)
    plain = drawn(tiny_roberta(), batch)
    equal(drawn(ours, batch), plain)  # none in eval mode
    ours.train()
    theirs.train()
    near(drawn(ours, batch), drawn(theirs, batch))
    equal(drawn(ours, batch), drawn(ours, batch))
    for other in (plain, drawn(ours, batch, seed=1)):
        assert (drawn(ours, batch) - other).abs().max() > 0.1


def test_gradient_checkpointing():
    """With dropout on, which the second run must repeat."""
    model, batch = tiny_roberta(**dict.fromkeys(DROPOUTS, 0.3)).train(), tiny_texts()
    grads, calls = [], []
    model.blocks[0].output.register_forward_pre_hook(lambda *_: calls.append(1))
    for on, expected in ((False, 1), (True, 2)):
        model.body.gradient_checkpointing = on
        model.zero_grad()
        calls.clear()
        torch.manual_seed(0)
        model.loss(**batch)[0].backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        assert len(calls) == expected, "a checkpointed block runs again in the backward pass"
    for name in grads[0]:
        equal(grads[1][name], grads[0][name])


# ------------------------------------------------------------------------------------------- files


def tensors_equal(ours, theirs):
    theirs = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        equal(tensor, theirs.pop(name).to(tensor.dtype))
    assert not theirs


def edit(folder, tensors=lambda t: None, **fields):
    """Change config.json, and by `tensors` what model.safetensors holds, in place."""
    stored = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    tensors(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def test_transformers_loads_what_we_save(twins, capsys):
    labels = twins.ours.config.labels
    tensors_equal(twins.ours, twins.theirs)
    said = twins.theirs.config
    assert said.id2label == dict(enumerate(labels)) and said.num_labels == len(labels)
    assert said.label2id == {name: i for i, name in enumerate(labels)}
    assert json.loads((twins.folder / "config.json").read_text()).get("problem_type") == (
        "regression" if len(labels) == 1 else None)
    again = load(twins.folder, torch.float64)
    assert again.config == twins.ours.config and capsys.readouterr().out == ""
    tensors_equal(again, twins.ours)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@torch.no_grad()
@pytest.mark.parametrize("stored, shard_size", [
    (torch.float64, "1GB"), (torch.float16, "1GB"), (torch.bfloat16, 20_000)])
def test_we_load_what_transformers_saves(twins, stored, shard_size, tmp_path):
    theirs = classifier_oracle(twins.folder, dtype=stored)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size != "1GB")
    ours, batch = load(tmp_path, torch.float64), twins.batch
    assert ours.config == twins.ours.config
    tensors_equal(ours, theirs.double())
    close(ours(batch["input_ids"], batch["attention_mask"]), theirs(**{
        k: v.double() if k == "labels" and v.is_floating_point() else v
        for k, v in batch.items()}).logits)


@pytest.mark.parametrize("setting", [{}, dict(zip(DROPOUTS, (0.2, 0.3, 0.4), strict=True)),
                                     dict(classifier_dropout=0.0)], ids=["0", "three", "null or 0"])
def test_dropouts_of_the_config(setting, tmp_path):
    """A classifier's dropout of 0 is not null, which would be the hidden one."""
    config = M.Config(**(TINY_ROBERTA | setting))
    (tmp_path / "config.json").write_text(json.dumps(C.config_json(config)))
    assert C.read_config(tmp_path) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert [getattr(theirs, d) for d in DROPOUTS] == [getattr(config, d) for d in DROPOUTS]


def test_absent_fields_are_what_transformers_has(tmp_path):
    """roberta-base's own config.json leaves out the classifier's dropout and the classes."""
    bare = {k: v for k, v in TINY_ROBERTA.items() if k in C.REQUIRED} | {"model_type": "roberta"}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    ours, theirs = C.read_config(tmp_path), transformers.RobertaConfig(**bare)
    for name in ("layer_norm_eps", "hidden_act", "max_position_embeddings", "type_vocab_size",
                 "pad_token_id", "bos_token_id", *DROPOUTS):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.labels == tuple(theirs.id2label.values())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder as roberta-base is on the hub: a masked language model, with a pooler and a
    buffer of positions that transformers no longer writes; and without any classes."""
    folder, config = tmp_path_factory.mktemp("hub"), M.Config(**TINY_ROBERTA)
    words = {k: v for k, v in C.config_json(config).items() if "label" not in k}
    torch.manual_seed(0)
    masked = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**words))
    masked.roberta.load_state_dict(tiny_roberta().roberta.state_dict())
    masked.save_pretrained(folder)
    edit(folder, lambda t: t.update({
        "roberta.pooler.dense.weight": torch.ones(32, 32),
        "roberta.pooler.dense.bias": torch.ones(32),
        "roberta.embeddings.position_ids": torch.arange(34)[None]}))
    return folder


def test_a_pretrained_model_gets_a_new_head(pretrained, capsys):
    model = load(pretrained, labels=("no", "maybe", "yes"), seed=3)
    assert sorted(capsys.readouterr().out.splitlines()) == sorted([
        f"{pretrained}: has no head for no, maybe, yes; a new one, of seed 3",
        "model.safetensors: ignoring lm_head.bias and 4 more (the head of the masked language "
        "model)",
        "model.safetensors: ignoring roberta.embeddings.position_ids (the model computes it)",
        "model.safetensors: ignoring roberta.pooler.dense.bias and 1 more (the head has its own "
        "dense layer)"])
    tensors_equal(model.roberta, tiny_roberta().roberta)
    assert model.config == M.Config(**TINY_ROBERTA)
    assert model.classifier.out_proj.weight.shape == (3, 32)
    assert load(pretrained).config.labels == ("LABEL_0", "LABEL_1")


def test_a_new_head_is_drawn_with_the_seed(pretrained):
    heads = [load(pretrained, seed=seed).classifier for seed in (0, 0, 1)]
    tensors_equal(heads[0], heads[1])
    for layer in ("dense", "out_proj"):
        first, other = (heads[i].get_submodule(layer) for i in (0, 2))
        assert not first.bias.any() and (first.weight != other.weight).all()
    wide = M.new_head(replace(M.Config(**TINY_ROBERTA), hidden_size=1000), seed=0)
    assert {n: tuple(t.shape) for n, t in wide.items()} == {
        "classifier.dense.weight": (1000, 1000), "classifier.dense.bias": (1000,),
        "classifier.out_proj.weight": (3, 1000), "classifier.out_proj.bias": (3,)}
    for weight in (t for t in wide.values() if t.dim() == 2):
        assert weight.mean().abs() < 1e-3 and weight.std().item() == pytest.approx(0.02, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("own, labels, order", [
    (("no", "maybe", "yes"), None, [0, 1, 2]),
    (("no", "maybe", "yes"), ("yes", "no", "maybe"), [2, 0, 1]),
    (("ENTAILMENT", "Neutral", "contradiction"), ("neutral", "Contradiction", "entailment"),
     [1, 2, 0]),
    (("LABEL_0", "LABEL_1", "LABEL_2"), ("yes", "no", "maybe"), [0, 1, 2]),
    (("LABEL_0", "LABEL_1", "LABEL_2"), ("LABEL_2", "LABEL_0", "LABEL_1"), [2, 0, 1]),
    (("a", "A", "b"), None, [0, 1, 2]),
    (("same", "same", "other"), None, [0, 1, 2]),
])
def test_a_stored_head_of_the_same_classes_is_put_in_order(own, labels, order, tmp_path, capsys):
    C.save(tiny_roberta(labels=own), tmp_path)
    model, batch = load(tmp_path, labels=labels), tiny_texts()
    near(drawn(model, batch), drawn(classifier_oracle(tmp_path), batch)[:, order])
    assert model.config.labels == (labels or own) and capsys.readouterr().out == ""
    C.save(model, tmp_path)  # names and rows together
    tensors_equal(load(tmp_path, labels=model.config.labels), model)


@pytest.mark.parametrize("own, labels", [
    *((TINY_ROBERTA["labels"], x) for x in (("no", "yes"), ("no", "maybe", "perhaps"), ("score",),
                                            ("no", "maybe", "yes", "never"))),
    (("a", "A", "b"), ("b", "a", "A")), (("LABEL_0", "LABEL_2"), ("no", "yes")),
    (("LABEL_0", "LABEL_1", "LABEL_2"), ("no", "yes"))], ids=str)
def test_a_stored_head_of_other_classes_gives_way(own, labels, tmp_path, capsys):
    """And one whose classes differ in case alone, wanted in another order."""
    C.save(tiny_roberta(labels=own), tmp_path)
    model = load(tmp_path, labels=labels, seed=5)
    assert capsys.readouterr().out == (
        f"{tmp_path}: has no head for {', '.join(labels)}; a new one, of seed 5\n")
    for name, tensor in M.new_head(model.config, 5).items():
        equal(model.get_parameter(name).detach(), tensor)
    tensors_equal(model.roberta, tiny_roberta(labels=own).roberta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, None])
def test_load_dtype(pretrained, dtype):
    """A new head has the dtype of all else; None is fp32 on CPU."""
    assert {p.dtype for p in load(pretrained, dtype).parameters()} == {dtype or torch.float32}


@pytest.mark.parametrize("fields, match", [
    (dict(id2label={"0": "no", "2": "yes"}), "id2label must name the classes 0, 1"),
    (dict(id2label={"0": "no", "1": 7}), "id2label must name the classes 0, 1"),
    (dict(id2label=["no", "yes"]), "id2label must name the classes 0, 1"),
    (dict(position_embedding_type="relative_key"), "'relative_key' is not supported"),
    (dict(hidden_act="relu"), "hidden_act 'relu' is not supported"),
    (dict(hidden_dropout_prob=1.0), r"hidden_dropout_prob must be a number in \[0, 1\)"),
    (dict(classifier_dropout=-0.1), r"classifier_dropout must be a number in \[0, 1\) or null"),
    (dict(layer_norm_eps=0), "layer_norm_eps must be a positive number"),
    (dict(hidden_size=64), "has shape"),
    (dict(num_hidden_layers=3), r"tensor roberta\.encoder\.layer\.2.* and 15 more is missing"),
    (dict(num_hidden_layers=1), r"unexpected tensor roberta\.encoder\.layer\.1"),
])
def test_broken_config_is_refused(fields, match, tmp_path):
    C.save(tiny_roberta(), tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(C.UserError, match=match):
        load(tmp_path)


def test_half_a_head_is_refused(tmp_path):
    C.save(tiny_roberta(), tmp_path)
    edit(tmp_path, lambda t: t.pop("classifier.dense.bias"))
    with pytest.raises(C.UserError, match=r"classifier\.dense\.bias is missing"):
        load(tmp_path)


def test_pickled_weights_are_refused(pretrained, tmp_path):
    (tmp_path / "config.json").write_text((pretrained / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(C.UserError, match=r"save_pretrained\(safe_serialization=True\)"):
        load(tmp_path)


def test_tokenizer(tmp_path):
    """What stands behind a text, too, is left out: only BOS goes in front."""
    roberta_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = C.Tokenizer(tmp_path, M.Config(**TINY_ROBERTA))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert [*tokenizer.encode("it is"), tokenizer.eos_id] == theirs("it is")["input_ids"]
    assert tokenizer.prefix == [0] and tokenizer.eos_ids == (2,)
    assert tokenizer.decode(theirs("it is, no?")["input_ids"]) == "it is, no?"


# ---------------------------------------------------------------------- linear layers and adapters


def layer_names(*places, blocks=2):
    return [f"roberta.encoder.layer.{i}.{p}" for i in range(blocks) for p in places]


PLACES = ("attention.self.query", "attention.self.key", "attention.self.value",
          "attention.output.dense", "intermediate.dense", "output.dense")


@pytest.mark.parametrize("targets, places", [
    (SIX, PLACES), (FOUR, [PLACES[i] for i in (0, 2, 3, 4)]), (["output.dense"], PLACES[5:]),
    (["dense"], PLACES[3:]), (["attention.self.key"], PLACES[1:2]),
    (iter(["value", "query"]), PLACES[:3:2])],
    ids=["six", "four", "output.dense", "dense", "a key", "an iterator"])
def test_linear_names(targets, places):
    """output.dense is the MLP's alone, though attention's ends alike; the head never has one."""
    assert M.linear_names(tiny_roberta(), targets) == layer_names(*places)


@pytest.mark.parametrize("target", ["classifier.dense", "out_proj", "q_proj", "self.query"])
def test_linear_names_refuses_what_no_block_has(target):
    with pytest.raises(ValueError) as error:
        M.linear_names(tiny_roberta(), ["query", target])
    assert str(error.value) == (
        f"no linear layer is called {target}; there are: attention.output.dense, "
        "intermediate.dense, key, output.dense, query, value")
    with pytest.raises(ValueError, match=r"no linear layer is called intermediate\.dense"):
        M.linear_names(tiny_llama(num_hidden_layers=1), ["intermediate.dense"])


def test_linear_shapes():
    shapes = M.linear_shapes(tiny_roberta(), SIX)
    assert list(shapes) == layer_names(*PLACES)
    assert list(shapes.values())[:6] == [(32, 32)] * 4 + [(48, 32), (32, 48)]


@pytest.mark.parametrize("targets, millions", [(SIX, 21.23), (FOUR, 12.98)])
def test_adapter_sizes_of_the_paper(targets, millions):
    """At rank 128 on roberta-base; the model's own size is the one that its card names."""
    model = M.empty(C.MODELS["roberta-base"][1])
    size = sum(128 * (m + n) for m, n in M.linear_shapes(model, targets).values()) / 1e6
    assert size == pytest.approx(millions, abs=0.005)
    assert sum(p.numel() for p in model.roberta.parameters()) / 1e6 == pytest.approx(124, abs=1)


def random_adapters(model, targets=SIX, r=3, size=0.3):
    draw = torch.Generator().manual_seed(0)
    return {name: (size * torch.randn(r, n, generator=draw), size * torch.randn(m, r,
                                                                              generator=draw))
            for name, (m, n) in M.linear_shapes(model, targets).items()}


@torch.no_grad()
def moved(model):
    """The model after a step of training in all that trains."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p += 0.1 * torch.randn_like(p)
    return model


@torch.no_grad()
@pytest.mark.parametrize("residual", ["split", "exact"])
@pytest.mark.parametrize("targets", [SIX, FOUR], ids=["six", "four"])
def test_attach_keeps_the_function(targets, residual):
    """What trains: A, B of the named layers, and the head in full."""
    model, batch = tiny_roberta(), tiny_texts()
    names = M.linear_names(model, targets)
    M.attach(model, random_adapters(model, targets), scaling=2.0, residual=residual)
    near(drawn(model, batch), drawn(tiny_roberta(), batch))
    assert list(M.adapted_layers(model)) == names == M.linear_names(model, targets)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *(f"{n}.{x}" for n in names for x in "AB"),
        *(f"classifier.{n}" for n in ("dense.weight", "dense.bias", "out_proj.weight",
                                      "out_proj.bias"))}


@torch.no_grad()
@pytest.mark.parametrize("residual", ["split", "exact"])
def test_merge(residual, tmp_path):
    """A trained adapter goes into the weights, and the folder into transformers."""
    model, batch = tiny_roberta(), tiny_texts()
    M.attach(model, random_adapters(model), scaling=2.0, residual=residual)
    trained = drawn(moved(model), batch)
    assert (trained - drawn(tiny_roberta(), batch)).abs().max() > 0.5
    M.merge(model)
    assert not M.adapted_layers(model) and M.linear_names(model, SIX) == layer_names(*PLACES)
    near(drawn(model, batch), trained, rtol=1e-3, atol=1e-3)
    C.save(model, tmp_path)
    near(drawn(classifier_oracle(tmp_path), batch), trained, rtol=1e-3, atol=1e-3)


def test_the_head_of_a_bf16_base_is_in_fp32(tmp_path):
    """Its steps would round away in bf16; and so it takes the scores from fp32, and merged the
    folder holds both dtypes."""
    model, batch = tiny_roberta(dtype=torch.bfloat16), tiny_texts()
    head = {n: p.detach().float() for n, p in M.whole_parameters(model).items()}
    M.attach(model, random_adapters(model), residual="exact")
    assert {n: p.dtype for n, p in model.named_parameters() if p.requires_grad} == (
        dict.fromkeys([*head, *(f"{n}.{x}" for n in layer_names(*PLACES) for x in "AB")],
                      torch.float32))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    scores, body = drawn(model, batch), model.body(batch["input_ids"], batch["attention_mask"])
    assert scores.dtype == torch.float32 and body.dtype == torch.bfloat16
    W1, b1, W2, b2 = head.values()
    near(scores, torch.tanh(body[:, 0].float() @ W1.T + b1) @ W2.T + b2)
    model.loss(**batch)[0].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters()
               if p.requires_grad)
    M.merge(model)
    C.save(model, tmp_path)
    again = load(tmp_path, torch.float32)
    for name, tensor in head.items():
        equal(again.get_parameter(name).detach(), tensor)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["split", "exact"])
def test_a_saved_adapter_includes_the_head(residual, dtype, pretrained, tmp_path):
    """On a fresh base, whose new head is of another seed, the scores have the same bits."""
    labels, batch = TINY_ROBERTA["labels"], tiny_texts()
    model = load(pretrained, dtype, labels=labels, seed=1)
    given = random_adapters(model, FOUR)
    M.attach(model, given, 2.0, residual=residual)
    C.save_adapter(tmp_path / "a.safetensors", moved(model), given, residual)
    again = load(pretrained, dtype, labels=labels, seed=2)
    assert (drawn(again, batch) - drawn(model, batch)).abs().max() > 0.1
    initial = C.load_adapter(again, tmp_path / "a.safetensors")
    equal(drawn(again, batch), drawn(model, batch))
    assert initial.keys() == given.keys()
    assert {n: p.dtype for n, p in again.named_parameters() if p.requires_grad} == {
        n: p.dtype for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("labels", [("no", "yes"), ("score",)])
def test_an_adapter_of_another_task_is_refused(labels, tmp_path):
    model = tiny_roberta()
    M.attach(model, random_adapters(model))
    C.save_adapter(tmp_path / "a.safetensors", model, {}, "split")
    other = tiny_roberta(labels=labels)
    with pytest.raises(C.UserError, match=r"classifier\.out_proj\.weight.*another task"):
        C.load_adapter(other, tmp_path / "a.safetensors")
    assert not M.adapted_layers(other)


# ---------------------------------------------------------------------------------- Fisher factors


def roberta64(**settings):
    return tiny_roberta(dtype=torch.float64, **settings)


def rows_of(data, rows):
    return {key: value[rows] for key, value in data.items()}


def trimmed(data, row):
    """One text without any padding."""
    n = int(data["attention_mask"][row].sum())
    return {k: v[[row]][:, :n] if k != "labels" else v[[row]] for k, v in data.items()}


def wider(data, more=6):
    """The same texts with more padding."""
    return data | {"input_ids": F.pad(data["input_ids"], (0, more), value=1),
                   "attention_mask": F.pad(data["attention_mask"], (0, more))}


def same_factors(mine, theirs, **tolerance):
    assert mine.keys() == theirs.keys()
    for name in mine:
        for which, a, b in zip("hδ", mine[name], theirs[name], strict=True):
            close(a, b, msg=lambda m, n=name, w=which: f"Σ_{w} of {n}: {m}", **tolerance)


def by_retain_grad(model, data, names):
    """{name: (Σ_h, Σ_δ)} the plain way: text by text without padding, h and δ of every token
    kept."""
    texts, factors = [trimmed(data, row) for row in range(len(data["labels"]))], {}
    for name, (h, delta) in retained(model, texts, names).items():
        H, D = torch.cat(h), torch.cat(delta)
        close(D.T @ H, model.get_submodule(name).weight.grad)  # Σ_t δ hᵀ is the weight's gradient
        factors[name] = (H.T @ H / len(H), D.T @ D / len(D))
    return factors


@pytest.mark.parametrize("labels", [("no", "maybe", "yes"), ("score",)], ids=["classes", "number"])
def test_factors_equal_an_explicit_loop_over_unpadded_texts(labels):
    """Whatever the batches and their padding; and without dropout, though the model trains."""
    settings = dict(labels=labels, **dict.fromkeys(DROPOUTS, 0.3))
    model = roberta64(**settings).train()
    data, names = tiny_texts(config=model.config), M.linear_names(model, SIX)
    expected = by_retain_grad(roberta64(**settings), data, names)
    for batches in ([data], [wider(data)], [trimmed(data, i) for i in range(4)],
                    [wider(rows_of(data, [3])), rows_of(data, [2, 0, 1])]):
        same_factors(farss.kfac_factors(model, batches, names), expected)
    delta = expected["roberta.encoder.layer.1.output.dense"][1]
    assert delta.trace() > 1e-3


def two_batches(config):
    """Unlike in number and length, one of them with more padding than it needs."""
    data = tiny_texts(config=config)
    return [wider(rows_of(data, [1])), rows_of(data, [0, 2, 3])]


@pytest.mark.parametrize("labels", [("no", "maybe", "yes"), ("score",)], ids=["classes", "number"])
@pytest.mark.parametrize("targets", [SIX, FOUR, ["output.dense"]], ids=["six", "four", "one"])
def test_block_by_block_gives_the_factors_of_the_whole_model(targets, labels):
    model = roberta64(num_hidden_layers=3, labels=labels)
    names, batches, found = M.linear_names(model, targets), two_batches(model.config), {}
    for factors in farss.factors_by_block(model, batches, names):
        found |= factors
    tight = dict(rtol=1e-10, atol=1e-14)
    same_factors(found, farss.kfac_factors(model, batches, names), **tight)
    sample = [farss.sampled_loss(torch.Generator().manual_seed(3)) for _ in range(2)]
    found = {n: f for block in farss.factors_by_block(model, batches, names, sample[0])
             for n, f in block.items()}
    same_factors(found, farss.kfac_factors(model, batches, names, sample[1]), **tight)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_restore_requires_grad_and_train_mode(training):
    model = tiny_roberta().train(training)
    M.attach(model, random_adapters(model, ["key"]))
    wanted = [p.requires_grad for p in model.parameters()]
    assert len(set(wanted)) == 2
    with farss.kfac_hooks(model, M.linear_names(model, ["query"])) as sums:
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
        listen(sums, model, [tiny_texts()])
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(m.training is training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("labels", [("no", "maybe", "yes"), ("score",)], ids=["classes", "number"])
def test_farss_on_an_encoder_keeps_its_function(labels):
    """Block 0 shares a budget, block 1 has R; the adapters are parts of W."""
    model, batch = roberta64(labels=labels), tiny_texts(config=M.Config(
        **(TINY_ROBERTA | dict(labels=labels))))
    names, budget = M.linear_names(model, SIX), farss.Budget(1, R=9, r_avg=5, r_min=2, r_max=8)
    before = drawn(model, batch)
    layers = farss.build_adapters(farss.measure(model, [batch], names, budget), budget, 2.0)
    assert list(layers) == names
    assert [x.shallow for x in layers.values()] == [True] * 6 + [False] * 6
    assert all(2 <= len(x.A) <= 8 for x in layers.values() if x.shallow)
    assert all(len(x.A) == 9 for x in layers.values() if not x.shallow)
    assert sum(x.r_raw for x in layers.values() if x.shallow) == pytest.approx(5 * 6)
    weights = {n: model.get_submodule(n).weight.clone() for n in names}
    M.attach(model, {n: (x.A, x.B) for n, x in layers.items()}, 2.0)
    close(drawn(model, batch), before)
    for name, layer in M.adapted_layers(model).items():
        assert (layer.weight - weights[name]).norm() > 0.01 * weights[name].norm()
        close(layer.merged_weight(), weights[name])


# ----------------------------------------------------------- labels drawn from the model's own view


def test_drawn_classes_give_the_exact_fisher():
    """Many draws of δ δᵀ for one text, against their mean under softmax, class by class."""
    model, draws = roberta64(), 8000
    name = "roberta.encoder.layer.1.output.dense"
    text = trimmed(tiny_texts(), 1)
    p = model(text["input_ids"]).softmax(-1)[0].detach()
    assert p.min() > 0.02 and p.max() < 0.9
    exact = sum(p[k] * farss.kfac_factors(model, [text | {"labels": torch.tensor([k])}], [name])
                [name][1] for k in range(3))
    many = {key: value.expand(draws, *value.shape[1:]) for key, value in text.items()}
    sampled = farss.kfac_factors(model, [many], [name],
                                 farss.sampled_loss(torch.Generator().manual_seed(0)))[name][1]
    assert (sampled - exact).norm() < 0.07 * exact.norm()
    labelled = farss.kfac_factors(model, [text], [name])[name][1]
    assert (labelled - exact).norm() > 0.2 * exact.norm()


@pytest.mark.parametrize("labels", [("no", "maybe", "yes"), ("score",)], ids=["classes", "number"])
def test_labels_are_drawn_by_the_generator_alone(labels):
    model, untouched = tiny_roberta(labels=labels), torch.get_rng_state()
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).expand(500, -1)
    first, again, other = (model.draw(hidden, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    equal(torch.get_rng_state(), untouched)


def test_drawn_numbers_have_the_score_as_mean_and_variance_a_half():
    """exp(-(y - s)²) is that normal distribution. Its Fisher is 2 ∇s ∇sᵀ, which many draws of
    δ δᵀ approach."""
    model, draws = roberta64(labels=("score",)), 4000
    name = "roberta.encoder.layer.1.output.dense"
    text = trimmed(tiny_texts(config=model.config), 1)
    hidden = model.roberta(text["input_ids"])[:, 0].detach()
    y = model.draw(hidden.expand(100_000, -1), torch.Generator().manual_seed(0))
    assert (y.mean() - model(text["input_ids"])).abs() < 0.01
    assert y.var().item() == pytest.approx(0.5, rel=0.02)
    slope = farss.kfac_factors(model, [text], [name],
                               lambda m, b: m(b["input_ids"], b["attention_mask"]).sum())[name][1]
    many = {key: value.expand(draws, *value.shape[1:]) for key, value in text.items()}
    sampled = farss.kfac_factors(model, [many], [name],
                                 farss.sampled_loss(torch.Generator().manual_seed(0)))[name][1]
    assert (sampled - 2 * slope).norm() < 0.05 * slope.norm()
