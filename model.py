"""The decoder that FARSS is applied to, in plain PyTorch, from embedding to greedy decoding.

    Config       the numbers that a decoder is built from
    FAMILIES     what its config.json may leave out, by model_type
    Llama        embed -> [RMSNorm -> attention -> RMSNorm -> SwiGLU] x L -> RMSNorm -> lm_head
    LoRALinear   y = W_res x + scaling * B A x          (Eq. 1; W_res = W for plain LoRA)
    attach       adapters onto a model, whose function stays what it was; merge folds them in
    generate     batched greedy decoding with a key-value cache

Tensors in, tensors out: what reads and writes files is checkpoint.py. Module names are Hugging
Face's (`model.layers.0.self_attn.q_proj`), so loading is a checked `load_state_dict` and an adapter
needs no renaming on its way out.

Shapes: b sequences, t tokens, d = hidden_size, V = vocab_size; a linear layer is W (m, n).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # label of a position that carries no loss, as in torch's cross_entropy
Context = tuple[Tensor, Tensor, Tensor | None]  # cos, sin, mask: what every block takes beside x

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


class Family(NamedTuple):
    """A model_type: its class in transformers, and what config.json may leave out."""

    architecture: str
    defaults: dict[str, Any]  # transformers' own; None where other fields decide
    harness_bos: bool = False  # whether lm_eval puts BOS before a question (on Gemma alone)


LLAMA = dict(num_key_value_heads=None, head_dim=None, hidden_act="silu", rms_norm_eps=1e-6,
             rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=False,
             attention_bias=False, mlp_bias=False, max_position_embeddings=2048,
             bos_token_id=None, eos_token_id=2)
FAMILIES = {
    "llama": Family("LlamaForCausalLM", LLAMA),
    "mistral": Family("MistralForCausalLM", LLAMA | dict(
        num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)),
}

# ------------------------------------------------------------------- precision and train mode


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it already is: bf16 carries 8 bits, too few to sum or divide."""
    return x if x.dtype == torch.float64 else x.float()


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


# --------------------------------------------------------------------------------------- model


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in fp32 whatever the model's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = at_least_fp32(x)
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

    def enter(self, input_ids: Tensor, attention_mask: Tensor | None = None,
              cache: KVCache | None = None) -> tuple[Tensor, Context]:
        """The hidden state (b, t, d) before the first block, and the context of all blocks.

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
        return x, (cos, sin, mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Hidden states (b, t, d) of input_ids (b, t) after the last block and its norm."""
        x, context = self.enter(input_ids, attention_mask, cache)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(layer, x, *context, use_reentrant=False)
            else:
                x = layer(x, *context, cache)
        if cache is not None:
            cache.length += input_ids.shape[1]
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
    """Causal language model; `model(input_ids, attention_mask=None)` gives logits (b, t, V).

    Besides, it lets itself be run block by block (farss.sweep): `enter` gives what goes into
    the first block, `blocks` are run one after the other, `loss(..., hidden=)` takes what comes
    out of the last one.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.lm_head(self.model(input_ids, attention_mask))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def enter(self, batch: dict[str, Tensor]) -> tuple[Tensor, Context]:
        """Hidden state before the first block, and context, of a batch padded on the right."""
        return self.model.enter(batch["input_ids"])

    def loss(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None,
             hidden: Tensor | None = None) -> tuple[Tensor, int]:
        """(summed negative log-likelihood in nats, number of labelled tokens).

        input_ids, labels (b, t), labels IGNORE where no loss falls. Batches must be padded on the
        right (ValueError otherwise), and then attention_mask has no further use (see
        Decoder.enter). `hidden` (b, t, d), if given, is what the last block made of the batch,
        and no block is run. Logits exist only at the labelled positions and in chunks of at most
        256 MB in fp32; with more than one chunk, each is computed again in the backward pass
        rather than kept.
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("the loss takes batches padded on the right")
        predicting, target = self.labelled(input_ids, labels, hidden)
        rows = max(1, 2**26 // self.config.vocab_size)
        if len(target) <= rows:
            return self.nll(predicting, target), len(target)
        chunks = zip(predicting.split(rows), target.split(rows), strict=True)
        return sum(checkpoint(self.nll, h, y, use_reentrant=False) for h, y in chunks), len(target)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        logits = at_least_fp32(self.lm_head(hidden))
        return F.cross_entropy(logits, target, reduction="sum")

    def labelled(self, input_ids: Tensor, labels: Tensor,
                 hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states (P, d) that predict the P labelled tokens, and those tokens (P,)."""
        target = labels[:, 1:]
        keep = target != IGNORE
        x = self.model(input_ids) if hidden is None else self.model.norm(hidden)
        return x[:, :-1][keep], target[keep]


def empty(config: Config) -> Llama:
    """The model on the meta device: every name and shape, no memory."""
    with torch.device("meta"):
        return Llama(config)


def linear_names(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Names of the linear layers whose last part is in `targets`, in the model's order.

    Raises ValueError for a target that no block has.
    """
    targets = list(targets)
    named = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, LoRALinear))]
    missing = [t for t in targets if not any(n.rsplit(".", 1)[-1] == t for n in named)]
    if missing:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in named} - {"lm_head"})
        raise ValueError(f"no linear layer is called {', '.join(missing)}; there are: "
                         + ", ".join(leaves))
    return [n for n in named if n.rsplit(".", 1)[-1] in targets]


def linear_shapes(model: nn.Module, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(m, n) of every linear layer of linear_names."""
    weights = {n: model.get_submodule(n).get_parameter("weight")
               for n in linear_names(model, targets)}
    return {n: (W.shape[0], W.shape[1]) for n, W in weights.items()}


# ------------------------------------------------------------------------------------- adapters


class LoRALinear(nn.Module):
    """y = W_res x + scaling * B A dropout(x) (+ bias)                                    Eq. 1

    weight (m, n) is frozen, in the model's dtype; A (r, n) and B (m, r) train, in fp32 even on a
    bf16 base, where AdamW's steps would round away. With `exact=(A0, B0)` the weight is W itself
    and the initial adapter is subtracted in the forward pass instead of from the weight:
    y = W x + scaling * (B A dropout(x) - B0 A0 x).
    """

    A0: Tensor | None
    B0: Tensor | None

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
        if self.A0 is not None and self.B0 is not None:
            update = update - F.linear(F.linear(x.to(self.A0.dtype), self.A0), self.B0)
        if update.dtype == y.dtype:
            return torch.add(y, update, alpha=self.scaling)
        return y + (self.scaling * update).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one matrix (m, n) that acts as this layer, in the adapter's dtype (fp32)."""
        W = self.weight.to(self.A.dtype)
        if self.A0 is not None and self.B0 is not None:
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


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace every LoRALinear by the one nn.Linear that acts as it does (rounded once)."""
    for name, layer in adapted_layers(model).items():
        m, n = layer.weight.shape
        linear = nn.Linear(n, m, bias=layer.bias is not None, device="meta")
        weight = layer.merged_weight().to(layer.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)


# ------------------------------------------------------------------------------------- decoding


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
