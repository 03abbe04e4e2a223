"""Llama in plain PyTorch: the model that FARSS is applied to, and nothing else.

    Config       the settings of a checkpoint, read from its config.json or from the table MODELS
    Llama        embed -> [RMSNorm -> attention -> RMSNorm -> SwiGLU] x L -> RMSNorm -> lm_head
    LoRALinear   y = W_res x + scaling * B A x          (Eq. 1; W_res = W for plain LoRA)
    generate     batched greedy decoding with a key-value cache
    load         Hugging Face safetensors -> Llama, every name and shape checked

Module names are Hugging Face's (`model.layers.0.self_attn.q_proj`), so loading is a checked
`load_state_dict` and an adapter needs no renaming on its way out.

Shapes: b sequences, t tokens, d = hidden_size, V = vocab_size; a linear layer is W (m, n).
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

IGNORE = -100  # label of a position that carries no loss, as in torch's cross_entropy
SUPPORTED = ("llama", "mistral")  # config.json's model_type


class UserError(ValueError):
    """Bad input that the user can mend: the scripts print it as one line and exit with 2."""


# ------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the model reads; names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or Llama 3.1's {"rope_type": "llama3", ...}
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    model_type: str = "llama"


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192.0,
}
LLAMA3_TOKENS = {"bos_token_id": 128000, "eos_token_ids": (128001,)}
SMOLLM2_TOKENS = {"bos_token_id": 0, "eos_token_ids": (0,)}

# short name: (hub id, settings), so that a plan needs no download.
#         V, d, MLP width, blocks, heads, key-value heads, head width
MODELS = {
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", Config(32000, 4096, 11008, 32, 32, 32, 128)),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", Config(32000, 5120, 13824, 40, 40, 40, 128)),
    "llama3-8b": (
        "meta-llama/Meta-Llama-3-8B",
        Config(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5, **LLAMA3_TOKENS,
               max_position_embeddings=8192),
    ),
    "llama3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        Config(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5, **LLAMA3_TOKENS,
               rope_scaling=LLAMA3_ROPE | {"factor": 8.0}, max_position_embeddings=131072),
    ),
    "llama3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        Config(128256, 2048, 8192, 16, 32, 8, 64, rope_theta=5e5, **LLAMA3_TOKENS,
               rope_scaling=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True,
               max_position_embeddings=131072),
    ),
    "llama3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        Config(128256, 3072, 8192, 28, 24, 8, 128, rope_theta=5e5, **LLAMA3_TOKENS,
               rope_scaling=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True,
               max_position_embeddings=131072),
    ),
    "mistral-7b-v0.3": (
        "mistralai/Mistral-7B-v0.3",
        Config(32768, 4096, 14336, 32, 32, 8, 128, rope_theta=1e6, model_type="mistral",
               max_position_embeddings=32768),
    ),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        Config(49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, **SMOLLM2_TOKENS,
               tie_word_embeddings=True, max_position_embeddings=8192),
    ),
    "smollm2-135m-instruct": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Config(49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, bos_token_id=1, eos_token_ids=(2,),
               tie_word_embeddings=True, max_position_embeddings=8192),
    ),
    "smollm2-360m": (
        "HuggingFaceTB/SmolLM2-360M",
        Config(49152, 960, 2560, 32, 15, 5, 64, rope_theta=1e5, **SMOLLM2_TOKENS,
               tie_word_embeddings=True, max_position_embeddings=8192),
    ),
    "smollm2-1.7b": (
        "HuggingFaceTB/SmolLM2-1.7B",
        Config(49152, 2048, 8192, 24, 32, 32, 64, rope_theta=130000.0, **SMOLLM2_TOKENS,
               tie_word_embeddings=True, max_position_embeddings=8192),
    ),
}


def read_config(folder: str | Path) -> Config:
    """Config from `folder`/config.json, as written before transformers 5 (rope_theta beside
    rope_scaling) or since (both inside rope_parameters). Absent fields have transformers' defaults.

    Raises UserError naming the file and the field for anything missing, wrong or unsupported.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    mistral = kind == "mistral"
    if kind not in SUPPORTED:
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported: "
                        + ", ".join(SUPPORTED))
    window = raw.get("sliding_window", 4096 if mistral else None)
    if mistral and window:
        raise UserError(f"{path}: sliding-window attention (sliding_window = {window}) is not "
                        "supported; Mistral v0.3 has none")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; only 'silu'")

    def checked(name: str, value, good: bool, what: str):
        if not good:
            raise UserError(f"{path}: {name} must be {what}, not {value!r}")
        return value

    def whole(name: str, default: int | None = None) -> int:
        value = default if raw.get(name) is None else raw[name]
        return checked(name, value, type(value) is int and value > 0, "a positive whole number")

    def positive(name: str, value) -> float:
        good = type(value) in (int, float) and 0 < value < math.inf
        return float(checked(name, value, good, "a positive number"))

    def flag(name: str) -> bool:
        value = raw.get(name) or False
        return checked(name, value, type(value) is bool, "true or false")

    heads, width = whole("num_attention_heads"), whole("hidden_size")
    kv_heads = whole("num_key_value_heads", default=8 if mistral else heads)
    if heads % kv_heads or (raw.get("head_dim") is None and width % heads):
        raise UserError(f"{path}: {heads} attention heads fit neither {kv_heads} key-value heads "
                        f"nor hidden_size {width}")
    head_dim = whole("head_dim", default=width // heads)
    checked("head_dim", head_dim, head_dim % 2 == 0, "even, for rotary pairs")
    which = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(which) or {}
    checked(which, rope, isinstance(rope, dict), "an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{path}: rope type {rope_type!r} is not supported; "
                        "supported: default, llama3")
    scaling = None
    if rope_type == "llama3":
        scaling = {key: positive(f"{which}.{key}", rope.get(key))
                   for key in ("factor", *LLAMA3_ROPE) if key != "rope_type"}
    eos = raw.get("eos_token_id", 2)
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return Config(
        vocab_size=whole("vocab_size"),
        hidden_size=width,
        intermediate_size=whole("intermediate_size"),
        num_hidden_layers=whole("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        rope_theta=positive("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rope_scaling=scaling and {"rope_type": "llama3"} | scaling,
        tie_word_embeddings=flag("tie_word_embeddings"),
        attention_bias=flag("attention_bias"),
        mlp_bias=flag("mlp_bias"),
        max_position_embeddings=whole("max_position_embeddings", default=2048),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=tuple(checked("eos_token_id", t, type(t) is int and t >= 0,
                                    "a token id or a list of them") for t in eos),
        model_type=kind,
    )


def read_json(path: str | Path) -> dict:
    """The object in a JSON file; UserError when it is missing, broken or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


# --------------------------------------------------------------------------------------- model


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in fp32 whatever the model's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float() if x.dtype != torch.float64 else x
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Angle per position of each rotated pair, (head_dim / 2,), fp32.

    Llama 3.1's scaling: wavelengths beyond the original context are slowed by `factor`, short
    ones are kept, and those between are interpolated.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    freq = 1.0 / config.rope_theta ** (steps / config.head_dim)
    if config.rope_scaling is None:
        return freq
    scaling = config.rope_scaling
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, 0: long
    return keep * freq + (1 - keep) * freq / scaling["factor"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (b, heads, t, head_dim): pair i is (x_i, x_{i + head_dim/2})."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class KVCache:
    """Keys and values of all blocks, allocated once: (b, kv_heads, capacity, head_dim) each."""

    def __init__(self, config: Config, batch: int, capacity: int, like: Tensor):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [like.new_empty(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_empty(shape) for _ in range(config.num_hidden_layers)]
        self.length = 0  # positions filled; moved on by Decoder.forward after the last block

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (b, kv_heads, t, head_dim) behind what is there; return all so far."""
        end = self.length + k.shape[2]
        self.keys[block][:, :, self.length : end] = k
        self.values[block][:, :, self.length : end] = v
        return self.keys[block][:, :, :end], self.values[block][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop the sequences that `rows` (bool, (b,)) does not mark, block by block."""
        for store in (self.keys, self.values):
            for i, tensor in enumerate(store):
                store[i] = tensor[rows]


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: Config, block: int):
        super().__init__()
        d, width, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.block, self.head_dim = block, width
        self.q_proj = nn.Linear(d, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, d, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
                cache: KVCache | None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)  # (b, heads, t, head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.block, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and t > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: Config):
        super().__init__()
        d, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, width, bias=bias)
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config: Config, block: int):
        super().__init__()
        self.self_attn = Attention(config, block)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
                cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the head; holds the names `embed_tokens`, `layers`, `norm`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Hidden states (b, t, d) of input_ids (b, t).

        attention_mask (b, cached + t) marks real tokens with 1; it may pad on either side.
        None means no padding on the left: then causality alone keeps right padding away from
        every real token, and no mask tensor is built.
        """
        b, t = input_ids.shape
        start = cache.length if cache is not None else 0
        if attention_mask is None and start and t > 1:
            # is_causal lines queries up with the first keys; here they are the last.
            attention_mask = input_ids.new_ones(b, start + t)
        x = self.embed_tokens(input_ids)
        if attention_mask is None:
            position = torch.arange(start, start + t, device=x.device)[None]
        else:
            position = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
        angle = position[..., None].float() * rope_frequencies(self.config, x.device)
        angle = torch.cat((angle, angle), dim=-1)[:, None]  # (b or 1, 1, t, head_dim)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = None if attention_mask is None else causal_mask(attention_mask, t)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += t
        return self.norm(x)


def causal_mask(attention_mask: Tensor, t: int) -> Tensor:
    """(b, 1, t, T) bool: which of T keys each of the last t positions may attend to.

    A padded position sees itself, since a softmax over nothing is NaN.
    """
    total = attention_mask.shape[1]
    key = torch.arange(total, device=attention_mask.device)
    query = key[total - t :, None]
    return (key <= query) & (attention_mask[:, None, None].bool() | (key == query))


class Llama(nn.Module):
    """Causal language model; `model(input_ids, attention_mask=None)` gives logits (b, t, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.lm_head(self.model(input_ids, attention_mask))

    def loss(self, input_ids: Tensor, labels: Tensor,
             attention_mask: Tensor | None = None) -> tuple[Tensor, int]:
        """(summed negative log-likelihood in nats, number of labelled tokens).

        input_ids, labels (b, t), labels IGNORE where no loss falls. Batches must be padded on the
        right (ValueError otherwise), and then attention_mask has no further use (see
        Decoder.forward). Logits exist only at the labelled positions and in chunks of at most
        256 MB in fp32; with more than one chunk, each is computed again in the backward pass
        rather than kept.
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("the loss takes batches padded on the right")
        hidden, target = self.labelled(input_ids, labels)
        rows = max(1, 2**26 // self.config.vocab_size)
        if len(target) <= rows:
            return self.nll(hidden, target), len(target)
        chunks = zip(hidden.split(rows), target.split(rows), strict=True)
        return sum(checkpoint(self.nll, h, y, use_reentrant=False) for h, y in chunks), len(target)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, target, reduction="sum")

    def labelled(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (P, d) that predict the P labelled tokens, and those tokens (P,)."""
        target = labels[:, 1:]
        keep = target != IGNORE
        return self.model(input_ids)[:, :-1][keep], target[keep]


def linear_names(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Names of the linear layers whose last part is in `targets`, in the model's order.

    Raises UserError for a target that no block has.
    """
    targets = list(targets)
    named = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear))]
    missing = [t for t in targets if not any(n.rsplit(".", 1)[-1] == t for n in named)]
    if missing:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in named} - {"lm_head"})
        raise UserError(f"no linear layer is called {', '.join(missing)}; there are: "
                        + ", ".join(leaves))
    return [n for n in named if n.rsplit(".", 1)[-1] in targets]


# -------------------------------------------------------------------------------------- adapter


class LoRALinear(nn.Module):
    """y = W_res x + scaling * B A dropout(x) (+ bias)                                    Eq. 1

    weight (m, n) is frozen, in the model's dtype; A (r, n) and B (m, r) train, in fp32 even on a
    bf16 base, where AdamW's steps would round away. With `exact=(A0, B0)` the weight is W itself
    and the initial adapter is subtracted in the forward pass instead of from the weight:
    y = W x + scaling * (B A dropout(x) - B0 A0 x).
    """

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0,
                 dropout: float = 0.0, bias: Tensor | None = None,
                 exact: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.A = nn.Parameter(A.detach().clone(memory_format=torch.contiguous_format))
        self.B = nn.Parameter(B.detach().clone(memory_format=torch.contiguous_format))
        self.scaling, self.dropout = scaling, dropout
        self.register_buffer("A0", None if exact is None else exact[0].detach().clone())
        self.register_buffer("B0", None if exact is None else exact[1].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        xa = F.dropout(x, self.dropout, self.training).to(self.A.dtype)
        update = F.linear(F.linear(xa, self.A), self.B)
        if self.A0 is not None:
            update = update - F.linear(F.linear(x.to(self.A0.dtype), self.A0), self.B0)
        if update.dtype == y.dtype:
            return torch.add(y, update, alpha=self.scaling)
        return y + (self.scaling * update).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one matrix (m, n) that acts as this layer, in the adapter's dtype (fp32)."""
        W = self.weight.to(self.A.dtype)
        if self.A0 is not None:
            W = W - self.scaling * (self.B0 @ self.A0)
        return W + self.scaling * (self.B @ self.A)


@torch.no_grad()
def attach(model: nn.Module, adapters: dict[str, tuple[Tensor, Tensor]], scaling: float = 1.0,
           dropout: float = 0.0, residual: str = "split") -> dict[str, float]:
    """Put an adapter {name: (A, B)} on each named nn.Linear; the model's function is unchanged.

    residual="split" stores W_res = W - scaling * B A in W's dtype (the paper), "exact" keeps W
    (see LoRALinear). All other parameters are frozen. Returns for each layer the part of the
    adapter that rounding W_res lost: ||W_res + scaling * B A - W|| / ||scaling * B A||, 0 where
    B A = 0. In bf16 a split-off bottom direction can be smaller than W's last bit, so this is
    printed for every run.
    """
    model.requires_grad_(False)
    lost = {}
    for name, (A, B) in adapters.items():
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is a {type(linear).__name__}, not an nn.Linear without "
                             "adapter; merge() first")
        W = linear.weight
        A, B = A.to(W.device), B.to(W.device)
        delta = scaling * (B @ A)
        if residual == "exact":
            weight, exact = W, (A, B)
        else:
            weight, exact = (W.to(delta.dtype) - delta).to(W.dtype), None
        size = delta.norm().item()
        kept = W if exact else weight.to(delta.dtype) + delta
        lost[name] = ((kept - W.to(kept.dtype)).norm().item() / size) if size else 0.0
        parent, _, leaf = name.rpartition(".")
        adapted = LoRALinear(weight, A, B, scaling, dropout, linear.bias, exact)
        setattr(model.get_submodule(parent), leaf, adapted.train(linear.training))
    return lost


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def save_adapter(path: str | Path, model: nn.Module, initial: dict[str, tuple[Tensor, Tensor]],
                 residual: str) -> None:
    """A, B of every adapted layer and the A0, B0 that were taken out of W at the start.

    `initial` {name: (A0, B0)} is empty for methods that leave W as it is.
    """
    tensors = {}
    for name, layer in adapters(model).items():
        tensors |= {f"{name}.A": layer.A, f"{name}.B": layer.B}
        if name in initial:
            tensors |= {f"{name}.A0": initial[name][0], f"{name}.B0": initial[name][1]}
        scaling = layer.scaling
    save_tensors(path, tensors, {"adapter": json.dumps({"scaling": scaling,
                                                        "residual": residual})})


def load_adapter(model: nn.Module, path: str | Path, dropout: float = 0.0
                 ) -> dict[str, tuple[Tensor, Tensor]]:
    """Put a saved adapter on an untouched base model; returns `initial` as save_adapter takes it.

    W_res is computed from W, A0 and B0 just as at the start of training, so it has the same bits.
    Raises UserError if the file is damaged or does not fit the model.
    """
    tensors, meta = load_tensors(path)
    names = [key[:-2] for key in tensors if key.endswith(".A")]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in names:
        A, B = tensors[f"{name}.A"], tensors.get(f"{name}.B")
        if name not in linears or B is None:
            raise UserError(f"{path}: adapts {name}, which the base model does not have")
        if (B.shape[0], A.shape[1]) != tuple(linears[name].weight.shape):
            raise UserError(f"{path}: {name} is {B.shape[0]} x {A.shape[1]}, the base model's "
                            f"is {tuple(linears[name].weight.shape)}; wrong base model?")
    if not names or "adapter" not in meta:
        raise UserError(f"{path}: not an adapter written by train.py")
    how = json.loads(meta["adapter"])
    initial = {n: (tensors[f"{n}.A0"], tensors[f"{n}.B0"]) for n in names if f"{n}.A0" in tensors}
    untouched = {n: (tensors[f"{n}.A"], torch.zeros_like(tensors[f"{n}.B"])) for n in names}
    attach(model, untouched | initial, how["scaling"], dropout, how["residual"])
    with torch.no_grad():
        for name, layer in adapters(model).items():
            layer.A.copy_(tensors[f"{name}.A"])
            layer.B.copy_(tensors[f"{name}.B"])
    return initial


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace every LoRALinear by the one nn.Linear that acts as it does (rounded once)."""
    for name, layer in adapters(model).items():
        m, n = layer.weight.shape
        linear = nn.Linear(n, m, bias=layer.bias is not None, device="meta")
        weight = layer.merged_weight().to(layer.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)


# ------------------------------------------------------------------------------------- decoding


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own mode again, whatever happened."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def generate(model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int,
             eos_ids: Iterable[int] = (), stop: Callable[[list[int]], bool] | None = None,
             ) -> list[list[int]]:
    """Greedy continuation of each prompt: a list of new token ids, at most max_new_tokens.

    Prompts are padded on the left, so that all rows end together. A row is finished by a token
    of `eos_ids` (which is not returned) or when `stop(new_ids)` is true; finished rows leave
    the batch. Apart from ties in the last bit of a logit, each row is what it would be alone.
    """
    if not all(prompts):
        raise ValueError("an empty prompt cannot be continued; give it at least a BOS token")
    if not prompts:
        return []
    device, eos_ids = model.lm_head.weight.device, set(eos_ids)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    # One mask for the whole run: a column for each new token is real from the start.
    mask = torch.ones(len(prompts), longest + max_new_tokens, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        mask[row, : longest - len(prompt)] = 0
    padded = any(len(p) < longest for p in prompts)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens,
                    like=model.model.norm.weight)
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # row i of the batch continues prompt rows[i]
    with evaluating(model):
        for _ in range(max_new_tokens):
            seen = mask[:, : cache.length + ids.shape[1]] if padded else None
            token = model.lm_head(model.model(ids, seen, cache)[:, -1]).argmax(-1)
            going = []
            for row, t in zip(rows, token.tolist(), strict=True):
                if t not in eos_ids:
                    new[row].append(t)
                going.append(t not in eos_ids and not (stop and stop(new[row])))
            if not any(going):
                break
            if not all(going):
                still = torch.tensor(going, device=device)
                rows = [row for row, go in zip(rows, going, strict=True) if go]
                token, mask = token[still], mask[still]
                cache.keep(still)
            ids = token[:, None]
    return new


# -------------------------------------------------------------------------------------- loading


def is_hub_id(text: str) -> bool:
    """Whether a text that is no folder can be the id of a hub repository, owner/name.

    runs/typo is none where there is a folder runs.
    """
    looks = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.git)", text)
    return looks is not None and not Path(text).parent.is_dir()


def fetch(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: a folder as it is, a short name of MODELS or a hub id by
    download (config, tokenizer, and only those weight files that the index names).

    Raises UserError saying what to do when it cannot be had.
    """
    text = str(name_or_path)
    if Path(text).is_dir():
        return Path(text)
    if text in MODELS:
        repo = MODELS[text][0]
    elif is_hub_id(text):
        repo = text
    else:
        raise UserError(f"--model {text}: no such folder, and not one of the short names "
                        + ", ".join(MODELS) + "; a hub id has the form owner/name")
    config = hub_download(repo, "config.json")
    hub_download(repo, "tokenizer.json")
    hub_download(repo, "tokenizer_config.json", optional=True)
    index = hub_download(repo, "model.safetensors.index.json", optional=True)
    for shard in weight_files(index.parent) if index else ["model.safetensors"]:
        hub_download(repo, shard)
    return config.parent


def hub_download(repo: str, filename: str, repo_type: str = "model",
                 optional: bool = False) -> Path | None:
    """One file of a hub repository, from the cache or the network; None if optional and absent."""
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries; the error below says it once
    where = f"{repo}/{filename}"
    try:
        return Path(hf_hub_download(repo, filename, repo_type=repo_type))
    except errors.GatedRepoError:
        raise UserError(
            f"{where}: the repository is gated. Accept its licence on huggingface.co/{repo} and "
            "run `hf auth login`, or pass --model an open copy's id or a local folder") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{where}: no such repository on the hub (or it is private: run "
                        "`hf auth login`); a local folder works too") from None
    except errors.RemoteEntryNotFoundError:
        if optional:
            return None
        raise UserError(f"{where}: the repository has no such file; only checkpoints with "
                        "config.json, tokenizer.json and *.safetensors can be read") from None
    except (OSError, errors.HfHubHTTPError) as error:
        if optional and isinstance(error, errors.LocalEntryNotFoundError):
            return None  # offline: the files that are needed speak for themselves
        line = str(error).strip().split("\n")[0]
        raise UserError(f"{where}: could not be downloaded ({line}). Without the hub, pass a "
                        "local file or folder instead") from None


def weight_files(folder: str | Path) -> list[str]:
    """Names of the safetensors files of a checkpoint folder, in the index's order."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map")
        for name in weight_map.values():
            inside = isinstance(name, str) and Path(name).name == name and "\\" not in name
            if not inside or name in ("", ".", ".."):
                raise UserError(f"{index}: shard {name!r} points outside the folder")
        return list(dict.fromkeys(weight_map.values()))
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise UserError(f"{folder}: holds only pickled weights, which can run code when opened; "
                        "convert it with save_pretrained(safe_serialization=True)")
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def read_tensors(folder: str | Path, expected: dict[str, tuple[int, ...]],
                 dtype: torch.dtype | None, device: str | torch.device) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, converted one at a time on the way in.

    All names and shapes are checked against `expected` before the first byte of data is read.
    Raises UserError naming file and tensor.
    """
    folder, found, head = Path(folder), {}, None
    files = weight_files(folder)
    for file in files:
        path = folder / file
        if not path.exists():
            raise UserError(f"{path}: named by the index, but not there")
        try:
            with safe_open(path, "pt") as shard:
                shapes = {n: tuple(shard.get_slice(n).get_shape()) for n in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or incomplete ({error}); fetch it again") from None
        for name, shape in shapes.items():
            if name.endswith("rotary_emb.inv_freq"):
                print(f"{file}: ignoring {name} (the model computes it)")
            elif name == "lm_head.weight" and name not in expected:
                head = path  # a tied head that was stored a second time
            elif name not in expected:
                raise UserError(f"{path}: unexpected tensor {name}")
            elif shape != expected[name]:
                raise UserError(f"{path}: {name} has shape {shape}, config.json implies "
                                f"{expected[name]}")
            elif name in found:
                raise UserError(f"{path}: {name} also stands in {found[name].name}")
            else:
                found[name] = path
    missing = sorted(set(expected) - set(found))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: tensor {missing[0]}{more} is missing")
    if head is not None:
        embedding = "model.embed_tokens.weight"
        with safe_open(head, "pt") as one, safe_open(found[embedding], "pt") as two:
            if not torch.equal(one.get_tensor("lm_head.weight"), two.get_tensor(embedding)):
                raise UserError(f"{head}: lm_head.weight is not the embedding, though config.json "
                                "says tie_word_embeddings")
    tensors = {}
    total = sum(math.prod(s) for s in expected.values())
    bar = tqdm(total=total, unit="p", unit_scale=True, desc="loading", leave=False,
               disable=None, delay=2)
    for file in files:
        with safe_open(folder / file, "pt") as shard:
            for name in [n for n, path in found.items() if path == folder / file]:
                tensor = shard.get_tensor(name)
                if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                    raise UserError(f"{folder / file}: {name} is {tensor.dtype}; quantised "
                                    "checkpoints are not supported, use the fp16/bf16/fp32 one")
                # copy=True: never keep a view of the file, which may change under us.
                tensors[name] = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
                bar.update(tensor.numel())
    bar.close()
    return tensors


def pick_device(device: str | None = None) -> torch.device:
    """The named device, by default cuda, then mps, then cpu; UserError if it is not there."""
    if device is None:
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).split("\n")[0]
        raise UserError(f"--device {device}: not usable here ({line})") from None
    return torch.device(device)


def load(name_or_path: str | Path, dtype: torch.dtype | None = None,
         device: str | torch.device | None = None) -> Llama:
    """A pretrained model from a folder, a hub id or a short name, in eval mode.

    dtype None is fp32 on CPU, where bf16 products are many times slower, and bf16 elsewhere.
    Peak memory is the model plus one tensor. Raises UserError for anything wrong with the files.
    """
    device = pick_device(None if device is None else str(device))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    folder = fetch(name_or_path)
    model = empty(read_config(folder))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}  # a tied head counts once
    tensors = read_tensors(folder, expected, dtype, device)
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True, strict=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def empty(config: Config) -> Llama:
    """The model on the meta device: every name and shape, no memory."""
    with torch.device("meta"):
        return Llama(config)


def config_of(name_or_path: str | Path) -> Config:
    """The Config of a short name without any download, otherwise of the fetched config.json."""
    text = str(name_or_path)
    if text in MODELS and not Path(text).is_dir():
        return MODELS[text][1]
    if not Path(text).is_dir() and is_hub_id(text):
        return read_config(hub_download(text, "config.json").parent)
    return read_config(fetch(text))


@torch.no_grad()
def save(model: Llama, folder: str | Path) -> None:
    """Write config.json and model.safetensors as Hugging Face does (a tied head is not stored)."""
    if adapters(model):
        raise ValueError("merge() the adapters before saving the model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {f.name: getattr(model.config, f.name) for f in fields(Config)}
    config["eos_token_id"] = list(config.pop("eos_token_ids"))
    config |= {"architectures": ["LlamaForCausalLM" if config["model_type"] == "llama"
                                 else "MistralForCausalLM"],
               "hidden_act": "silu", "sliding_window": None,
               "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
    save_json(folder / "config.json", config)
    save_tensors(folder / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` on success and vanishes on failure, so
    that a killed process never leaves half a file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | Path, value: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file. Give one metadata entry: several are written in random order, and
    then equal runs do not leave equal files."""
    with atomic(path) as temporary:
        flat = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        try:
            save_file(flat, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from None


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata."""
    try:
        with safe_open(path, "pt") as file:
            # clone: never keep a view of the file, which may change under us.
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete ({error})") from None


class Tokenizer:
    """tokenizer.json of a checkpoint, with the BOS rule made explicit.

    BOS is whatever tokenizer.json's own post-processor puts in front of a text: <s> for Llama
    and Mistral, nothing for SmolLM2. EOS is tokenizer_config.json's eos_token where it is given.
    """

    def __init__(self, folder: str | Path, config: Config):
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{path}: no such file; sentencepiece-only checkpoints need a "
                            "tokenizer.json (transformers' AutoTokenizer writes one)")
        try:
            self.hf = HFTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for every parse error
            raise UserError(f"{path}: not a readable tokenizer ({error})") from None
        self.hf.no_truncation()
        self.hf.no_padding()
        top = max(self.hf.get_vocab().values(), default=-1)
        if top >= config.vocab_size:
            raise UserError(f"{path}: holds token id {top}, but the embedding has only "
                            f"{config.vocab_size} rows; tokenizer and model do not match")
        # What stands before the text, [bos] or []; some templates add EOS behind it, too.
        plain, whole = (self.hf.encode("a", add_special_tokens=special).ids
                        for special in (False, True))
        self.prefix = next(whole[:i] for i in range(len(whole) + 1)
                           if whole[i : i + len(plain)] == plain)
        self.eos_ids = tuple(config.eos_token_ids)
        named = Path(folder) / "tokenizer_config.json"
        eos = read_json(named).get("eos_token") if named.exists() else None
        eos = eos.get("content") if isinstance(eos, dict) else eos
        eos_id = self.hf.token_to_id(eos) if isinstance(eos, str) else None
        if eos is not None and eos_id is None:
            raise UserError(f"{named}: eos_token {eos!r} is not a token of tokenizer.json")
        if eos_id is None and not self.eos_ids:
            raise UserError(f"{named}: names no eos_token, nor does config.json")
        self.eos_id = self.eos_ids[0] if eos_id is None else eos_id
        self.eos_ids = tuple(dict.fromkeys((self.eos_id, *self.eos_ids)))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = self.hf.encode(text, add_special_tokens=False).ids
        return self.prefix + ids if bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.hf.decode(list(ids), skip_special_tokens=True)
