"""Tiny random decoders, their tokenizer and data for the tests: nothing is downloaded."""

import json
import random
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint as C
import model as M

BOS, EOS = "<s>", "</s>"
TINY = dict(vocab_size=258, hidden_size=32, intermediate_size=80, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
            max_position_embeddings=1024, bos_token_id=256, eos_token_ids=(257,))

ROPE3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16}
GQA3 = dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=24)
# Windows shorter than the tests' sequences, caps that bite, head widths unlike d / heads.
MISTRAL = dict(model_type="mistral", sliding_window=7)
GEMMA2 = dict(GQA3, model_type="gemma2", head_dim=12, hidden_act="gelu_pytorch_tanh",
              tie_word_embeddings=True, sliding_window=9, query_pre_attn_scalar=20,
              attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
KINDS = {
    "one-to-one heads": dict(num_key_value_heads=4),
    "two-to-one heads": dict(),
    "three-to-one heads": GQA3,
    "tied": dict(tie_word_embeddings=True),
    "attention bias": dict(attention_bias=True),
    "mlp bias": dict(mlp_bias=True),
    "wide heads": dict(head_dim=20),  # 4 x 20 != hidden_size 32
    "eps and theta": dict(rms_norm_eps=0.1, rope_theta=50.0),
    "llama3 rope": dict(rope_scaling=ROPE3),
    "everything": dict(GQA3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
                       head_dim=12, rope_scaling=ROPE3),
    "mistral": dict(model_type="mistral"),
    "mistral with a window": MISTRAL,
    "gemma2": GEMMA2,
    "gemma2, no caps, no tie": GEMMA2 | dict(
        attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False),
}


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> M.CausalLM:
    """A random Llama, or what model_type says; the weights are large enough for logits that are
    not all alike."""
    torch.manual_seed(seed)
    model = M.CausalLM(M.Config(**(TINY | settings)))
    family = M.FAMILIES[model.config.model_type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
                if family.norm_behind and "post_" in name:
                    parameter.mul_(3)  # with branches below a tied embedding tokens repeat
                if family.one_plus_norm:
                    parameter.sub_(1)
            else:
                parameter.normal_(0, 0.5 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


# Wide enough for what narrow models never reach: adapted layers as one function, batches without
# padding, decompositions by way of the smaller side; and heads of no power of 2.
WIDE = dict(hidden_size=1088, intermediate_size=1152, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=8, head_dim=136)


def wide_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> M.CausalLM:
    """A random Llama 1088 wide, every weight a bf16 number. Singular values fall as 1, 1/2, 1/3,
    ..., so that most are small: those of Gaussian weights are too alike for a second
    decomposition to have much to do."""
    model = tiny_llama(seed, **(WIDE | settings))
    orthogonal = cache(lambda n: torch.linalg.qr(torch.randn(n, n))[0])
    with torch.no_grad():
        for name, W in model.named_parameters():
            if "proj" in name:
                fall = 1 / torch.arange(1, min(W.shape) + 1)
                U, V = (orthogonal(n)[torch.randperm(n), : len(fall)] for n in W.shape)
                W.copy_((U * fall) @ V.T * (len(W) ** 0.5 / fall.norm()))
    return model.to(torch.bfloat16).to(dtype)


def tiny_batch(rows: list[tuple[int, int]], seed: int = 0, vocab: int = 256,
               length: int | None = None) -> dict[str, torch.Tensor]:
    """A right-padded batch of random tokens; one (prompt tokens, response tokens) per row."""
    draw = torch.Generator().manual_seed(seed)
    length = length or max(p + r for p, r in rows)
    ids = torch.randint(vocab, (len(rows), length), generator=draw)
    labels = torch.full_like(ids, M.IGNORE)
    mask = torch.zeros_like(ids)
    for i, (p, r) in enumerate(rows):
        labels[i, p : p + r] = ids[i, p : p + r]
        mask[i, : p + r] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def retained(model, texts, names):
    """{name: (h of each text, δ of each)} of linear layers, (tokens, width) each, the plain way:
    text by text, every output's gradient kept by autograd. `texts` are unpadded batches of one."""
    model.requires_grad_(True)
    h, y, handles = {n: [] for n in names}, {n: [] for n in names}, []
    for name in names:
        def keep(module, args, output, name=name):
            output.retain_grad()
            h[name].append(args[0].detach()[0])
            y[name].append(output)

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    for text in texts:
        model.loss(**text)[0].backward()
    for handle in handles:
        handle.remove()
    return {n: (h[n], [out.grad[0] for out in y[n]]) for n in names}


def padded(side: str, lengths=(48, 31, 1), seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (len(lengths), max(lengths)), generator=draw)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, slice(0, n) if side == "right" else slice(max(lengths) - n, None)] = 1
    return ids, mask


def oracle(folder, **options):
    """transformers' model of a folder."""
    import transformers

    if C.read_config(folder).attn_logit_softcapping:  # transformers 5.17's sdpa ignores it
        options["attn_implementation"] = "eager"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens, <s> = 256 put in front of every text, </s> = 257."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    return tokenizer


def write_checkpoint(folder: str | Path, seed: int = 0, model: M.CausalLM | None = None,
                     **settings) -> Path:
    """A folder that load() and transformers both read: config, weights, tokenizer. Of the given
    model, or a tiny_llama."""
    folder = Path(folder)
    C.save(model or tiny_llama(seed, **settings), folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}))
    return folder


def write_data(folder: str | Path, seed: int = 0) -> Path:
    """Sums in GSM8K's format, and a few questions in those of NQ-Open and WebQuestions."""
    folder, draw = Path(folder), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", 96), ("test", 8)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(n):
                a, b = draw.randint(1, 9), draw.randint(1, 9)
                row = {"question": f"{a}+{b}?",
                       "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
                file.write(json.dumps(row) + "\n")
    with open(folder / "nq.jsonl", "w") as file:
        for q, a in (("capital of france", ["Paris"]), ("who wrote faust", ["Goethe"])):
            file.write(json.dumps({"question": q, "answer": a}) + "\n")
    (folder / "webqs.json").write_text(json.dumps(
        [{"qText": "what do jamaicans speak?", "answers": ["Jamaican English", "Patois"]}]))
    return folder


# ----------------------------------------------------------------------------------------- RoBERTa

# <s> <pad> </s> <unk> = 0 .. 3, as in roberta-base, then 256 bytes; at most 32 tokens a text.
TINY_ROBERTA = dict(
    model_type="roberta", vocab_size=260, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
    hidden_act="gelu", layer_norm_eps=1e-5, max_position_embeddings=34, bos_token_id=0,
    eos_token_ids=(2,), pad_token_id=1, labels=("no", "maybe", "yes"))
ROBERTAS = {
    "three classes": dict(),
    "a number": dict(labels=("score",)),
    "two token types": dict(type_vocab_size=2),
    "eps": dict(layer_norm_eps=0.1),
    "another pad id": dict(pad_token_id=7),
    "one wide head": dict(num_attention_heads=1, num_key_value_heads=1, head_dim=32),
}


def tiny_roberta(seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> M.Roberta:
    """A random RoBERTa; biases and norms are as large as all else, so that none goes unseen."""
    torch.manual_seed(seed)
    model = M.Roberta(M.Config(**(TINY_ROBERTA | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias") or "embeddings" in name:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def tiny_texts(lengths=(20, 9, 2, 13), config: M.Config | None = None, seed: int = 0,
               longest: int | None = None) -> dict[str, torch.Tensor]:
    """A right-padded batch of random texts <s> ... </s>, as many tokens each, and their labels."""
    draw, config = torch.Generator().manual_seed(seed), config or M.Config(**TINY_ROBERTA)
    n, t = len(lengths), longest or max(lengths)
    ids = torch.randint(8, 260, (n, t), generator=draw)
    mask = (torch.arange(t) < torch.tensor(lengths)[:, None]).long()
    ids[:, 0] = 0
    ids[torch.arange(n), torch.tensor(lengths) - 1] = 2
    labels = torch.randint(len(config.labels), (n,), generator=draw)
    if len(config.labels) == 1:
        labels = torch.randn(n, generator=draw)
    return {"input_ids": ids.where(mask.bool(), config.pad_token_id), "attention_mask": mask,
            "labels": labels}


def classifier_oracle(folder, **options):
    """transformers' classifier of a folder."""
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, **options).eval()


def roberta_tokenizer() -> Tokenizer:
    """Byte tokens from 4 on; <s> in front of every text and </s> behind it, as RoBERTa has it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [BOS, "<pad>", EOS, "<unk>"]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(special + letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.RobertaProcessing((EOS, 2), (BOS, 0),
                                                            add_prefix_space=False)
    return tokenizer


class PeakBytes(TorchDispatchMode):
    """The largest total of CPU storages alive at once among those made inside; views of the
    weights of `model`, which is there before, do not count."""

    def __init__(self, model=None):
        super().__init__()
        self.alive, self.peak = {}, 0
        weights = model.parameters() if model is not None else ()
        self.there = {p.untyped_storage()._cdata for p in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage._cdata not in self.there:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out
