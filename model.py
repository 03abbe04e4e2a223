"""The models that FARSS is applied to, in plain PyTorch, from embedding to greedy decoding.

    Config       the numbers that a model is built from
    FAMILIES     by model_type: what its config.json may leave out, and the flags of the decoder
    CausalLM     embed -> [norm -> attention -> norm -> gated MLP] x L -> norm -> lm_head
    Roberta      embed -> [attention -> norm -> MLP -> norm] x L -> first token -> classifier
    LoRALinear   y = W_res x + scaling * B A x          (Eq. 1; W_res = W for plain LoRA)
    attach       adapters onto a model, whose function stays what it was; merge folds them in
    generate     batched greedy decoding with a key-value cache

One decoder computes llama (Llama 2 and 3, SmolLM2), mistral and gemma2; what sets them apart:

    model_type   norm            MLP           attention, causal            besides
    llama        w x             SiLU gated    grouped queries, rotary      Llama 3.1: scaled rotary
    mistral      w x             SiLU gated    v0.1: the last 4096 keys     -
    gemma2       (1 + w) x, and  GELU (tanh)   every other block the last   embedding * √d; logits
                 behind each     gated         4096 keys; scores soft-      soft-capped
                 branch, too                   capped, / √query_pre_attn_scalar
    roberta      LayerNorm       GELU, not     both ways, biases            learnt positions; a head
                 behind a branch gated                                      of dense -> tanh -> out

Tensors in, tensors out: what reads and writes files is checkpoint.py. Module names are Hugging
Face's (`model.layers.0.self_attn.q_proj`), so loading is a checked `load_state_dict` and an adapter
needs no renaming on its way out.

Shapes: b sequences, t tokens, d = hidden_size, V = vocab_size; a linear layer is W (m, n).
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import onednn

IGNORE = -100  # label of a position that carries no loss, as in torch's cross_entropy
WIDE = 512  # width from which training takes the ways of Adapted and Decoder.unpadded: below it
# they save little, and sums keep the order, so the last bit, that stored results were made with
PACKED = 2e9  # bytes of weights up to which generation makes a second copy for oneDNN, on a CPU
CHUNK = 2**24  # logits that exist at a time in a loss, 64 MB in fp32
# Which keys a query sees: a mask, None for all up to its own, or the lengths of sequences that
# stand one behind the other in one row.
Seen = Tensor | list[int] | None
# What every block takes beside x: cos, sin, what is seen, and what in blocks with a window.
Context = tuple[Tensor, Tensor, Seen, Seen]

# ------------------------------------------------------------------------------- configuration


Probability = Annotated[float, "in [0, 1)"]
Count = Annotated[int | None, "a positive whole number or null"]


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the models read; names are Hugging Face's."""

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
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    model_type: str = "llama"
    # Mistral v0.1 and Gemma 2
    sliding_window: Count = None  # keys that a query sees, its own among them; None: all
    # Gemma 2
    query_pre_attn_scalar: Count = None  # scores are divided by its root; None: head_dim
    attn_logit_softcapping: float | None = None  # c: x -> c tanh(x / c)
    final_logit_softcapping: float | None = None
    # RoBERTa
    layer_norm_eps: float = 1e-5
    type_vocab_size: int = 1
    pad_token_id: int | None = None  # positions count from the one behind it
    hidden_dropout_prob: Probability = 0.0
    attention_probs_dropout_prob: Probability = 0.0
    classifier_dropout: Probability | None = None  # None: hidden_dropout_prob
    labels: tuple[str, ...] = ()  # names of the classes; a single one: a number is predicted

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: with learnt positions a limit, else what it was made
        for."""
        if FAMILIES[self.model_type].encoder:
            return self.max_position_embeddings - first_position(self)
        return self.max_position_embeddings


class Family(NamedTuple):
    """A model_type: its class in transformers, what config.json may leave out, its flags."""

    architecture: str
    defaults: dict[str, Any]  # transformers' own; None where other fields decide
    targets: dict[str, tuple[str, ...]]  # named sets of linear layers to adapt; the first is usual
    needless: dict[str, str]  # patterns of stored tensors that the model does without, and why
    fixed: dict[str, tuple]  # fields that may only be absent or have one of these values
    encoder: bool = False  # Roberta, not CausalLM
    one_plus_norm: bool = False  # RMSNorm multiplies by 1 + w, in fp32
    norm_behind: bool = False  # a norm behind attention and MLP, too, before the residual sum
    scaled_embedding: bool = False  # by √d, rounded to the model's dtype
    window_every: int = 1  # of so many blocks the first has the sliding window
    harness_bos: bool = False  # whether lm_eval puts BOS before a question (on Gemma alone)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
# A.2.1 adapts all seven, Table 9 (commonsense) five.
DECODER_TARGETS = {
    "seven": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "five": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")}
# Section 4.2 adapts "all linear modules except the classification head", six; A.4.1 names four.
# The baselines' 21M of Table 3 are six, FARSS's 10M only fit four.
ENCODER_TARGETS = {
    "six": ("query", "key", "value", "attention.output.dense", "intermediate.dense",
            "output.dense"),
    "four": ("query", "value", "attention.output.dense", "intermediate.dense")}
# Linear layers that read the same tensor: by last part of the name, a name for what it reads.
READS = dict(q_proj="attention", k_proj="attention", v_proj="attention", gate_proj="mlp",
             up_proj="mlp", query="attention", key="attention", value="attention")

DECODER_NEEDLESS = {r".*rotary_emb\.inv_freq": "the model computes it"}
ENCODER_NEEDLESS = {r"roberta\.embeddings\.position_ids": "the model computes it",
                    r"lm_head\..*": "the head of the masked language model",
                    r"roberta\.pooler\..*": "the head has its own dense layer"}

LLAMA = dict(num_key_value_heads=None, head_dim=None, hidden_act="silu", rms_norm_eps=1e-6,
             rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=False,
             attention_bias=False, mlp_bias=False, max_position_embeddings=2048,
             bos_token_id=None, eos_token_id=2)
FAMILIES = {
    "llama": Family("LlamaForCausalLM", LLAMA, DECODER_TARGETS, DECODER_NEEDLESS, {}),
    "mistral": Family("MistralForCausalLM", {k: v for k, v in LLAMA.items() if "bias" not in k}
                      | dict(num_key_value_heads=8, max_position_embeddings=131072,
                             sliding_window=4096), DECODER_TARGETS, DECODER_NEEDLESS, {}),
    "gemma2": Family("Gemma2ForCausalLM", dict(
        num_key_value_heads=4, head_dim=256, hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=True,
        attention_bias=False, max_position_embeddings=8192, bos_token_id=2, eos_token_id=1,
        pad_token_id=0, sliding_window=4096, query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0), DECODER_TARGETS,
        DECODER_NEEDLESS, {"use_bidirectional_attention": (None, False)},
        one_plus_norm=True, norm_behind=True, scaled_embedding=True, window_every=2,
        harness_bos=True),
    "roberta": Family("RobertaForSequenceClassification", dict(
        hidden_act="gelu", layer_norm_eps=1e-12, max_position_embeddings=512, type_vocab_size=2,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1, classifier_dropout=None), ENCODER_TARGETS,
        ENCODER_NEEDLESS, {
            "position_embedding_type": (None, "absolute"), "is_decoder": (None, False),
            "problem_type": (None, "regression", "single_label_classification")}, encoder=True),
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
    """x / rms(x) * weight, the mean square in fp32 whatever the model's dtype.

    With one_plus (Gemma) x / rms(x) * (1 + weight), all of it in fp32.
    """

    def __init__(self, width: int, eps: float, one_plus: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if one_plus else torch.ones(width))
        self.eps, self.one_plus = eps, one_plus

    def forward(self, x: Tensor) -> Tensor:
        x32 = at_least_fp32(x)
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.one_plus:
            return (normed * (1 + at_least_fp32(self.weight))).to(x.dtype)
        return self.weight * normed.to(x.dtype)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap), which stays below cap; x itself without one."""
    return x if cap is None else cap * torch.tanh(x / cap)


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
    """Rotary embedding of x (b, heads, t, head_dim): pair i is (x_i, x_{i + head_dim/2}).

    The first half of sin is negative already, which spares a pass over x."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((right, left), dim=-1) * sin


class KVCache:
    """Keys and values of all blocks, allocated once, for sequences that begin and end each on its
    own. A slot holds one sequence, its first token in column 0."""

    def __init__(self, store: Tensor, lengths: Tensor):
        self.store = store  # (blocks, 2, slots, kv_heads, capacity, head_dim): keys, values
        self.lengths = lengths  # (slots,), on the CPU: tokens held; whoever fills slots moves it on

    @classmethod
    def allocate(cls, config: Config, slots: int, capacity: int, like: Tensor) -> "KVCache":
        """Empty slots; zeros, since what is masked is multiplied by 0, which must not meet NaN."""
        store = like.new_zeros(config.num_hidden_layers, 2, slots, config.num_key_value_heads,
                               capacity, config.head_dim)
        return cls(store, torch.zeros(slots, dtype=torch.long))

    def part(self, first: int, last: int) -> "KVCache":
        """The slots first .. last - 1, in the same memory."""
        return KVCache(self.store[:, :, first:last], self.lengths[first:last])

    def move(self, source: int, target: int) -> None:
        """The sequence of slot `source` goes on in `target`; `source` is empty, as at first."""
        self.store[:, :, target] = self.store[:, :, source]
        self.lengths[target] = self.lengths[source]
        self.store[:, :, source] = self.lengths[source] = 0

    def reserve(self, t: int) -> Tensor:
        """Positions (slots, t) of the next t tokens of each sequence, where `extend` writes."""
        self.position = (self.lengths[:, None] + torch.arange(t)).to(self.store.device)
        self.end = int(self.lengths.max()) + t
        return self.position

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (slots, kv_heads, t, head_dim) where they were reserved. Returns all keys and
        values (slots, kv_heads, end, head_dim); what they hold behind a sequence means nothing."""
        slot = torch.arange(len(k), device=k.device)[:, None]
        keys, values = self.store[block]
        keys[slot, :, self.position] = k.transpose(1, 2)
        values[slot, :, self.position] = v.transpose(1, 2)
        return keys[:, :, : self.end], values[:, :, : self.end]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Seen, scale: float,
           cap: float | None) -> Tensor:
    """softmax(soft_cap(scale q kᵀ)) v, causal: (b, heads, t, head_dim), as q is.

    mask (b, 1, t, T) bool says which keys a query sees; None: all up to its own position; of
    sequences one behind the other their lengths, each of which sees itself alone. No fused kernel
    knows the soft cap, so with one the scores (b, heads, t, T) are formed.
    """
    if isinstance(mask, list):
        each = zip(q.split(mask, 2), k.split(mask, 2), v.split(mask, 2), strict=True)
        return torch.cat([attend(*qkv, None, scale, cap) for qkv in each], dim=2)
    b, heads, t, width = q.shape
    groups = heads // k.shape[1]
    if t == 1:  # a group's heads become its queries, so that no key is repeated for them
        q, groups = q.reshape(b, -1, groups, width), 1
    if cap is None:
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and t > 1, scale=scale,
            enable_gqa=groups > 1)
        return y.reshape(b, heads, t, width)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = soft_cap(q @ k.transpose(2, 3) * scale, cap)
    if mask is None:
        mask = torch.ones(t, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - t)
    probabilities = at_least_fp32(scores.masked_fill(~mask, -math.inf)).softmax(-1).to(q.dtype)
    return (probabilities @ v).reshape(b, heads, t, width)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: Config, block: int):
        super().__init__()
        d, width, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.block, self.head_dim = block, width
        self.scale = (config.query_pre_attn_scalar or width) ** -0.5
        self.cap = config.attn_logit_softcapping
        self.q_proj = nn.Linear(d, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, d, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Seen,
                cache: KVCache | None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)  # (b, heads, t, head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.block, k, v)
        y = attend(q, k, v, mask, self.scale, self.cap)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """down(act(gate x) * up x): SwiGLU, or GeGLU in Gemma."""

    def __init__(self, config: Config):
        super().__init__()
        d, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(d, width, bias=bias)
        self.up_proj = nn.Linear(d, width, bias=bias)
        self.down_proj = nn.Linear(width, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer, pre-norm; in Gemma 2 with a norm behind each branch, too."""

    def __init__(self, config: Config, block: int):
        super().__init__()
        family = FAMILIES[config.model_type]
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, family.one_plus_norm)
        self.windowed = block % family.window_every == 0
        self.norm_behind = family.norm_behind
        self.self_attn = Attention(config, block)
        self.mlp = MLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()  # before the MLP, or in Gemma 2 behind attention
        if self.norm_behind:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Seen,
                window_mask: Seen, cache: KVCache | None = None) -> Tensor:
        mask = window_mask if self.windowed else mask
        y = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        if self.norm_behind:
            x = x + self.post_attention_layernorm(y)
            y = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(y)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


def lookup_table(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding, drawn from N(0, 1) as always, but not on the meta device: to draw nothing,
    torch would there import all of its compiler, which takes a second."""
    weight = torch.empty(rows, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(),
                                        freeze=False)


class Decoder(nn.Module):
    """Everything below the head; holds the names `embed_tokens`, `layers`, `norm`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = lookup_table(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        family = FAMILIES[config.model_type]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, family.one_plus_norm)
        self.embedding_scale = config.hidden_size**0.5 if family.scaled_embedding else None

    def embed(self, input_ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (b, t, d), and cos and sin (b or 1, 1, t, head_dim) of position (b or 1, t)
        as `rotate` takes them."""
        x = self.embed_tokens(input_ids)
        if self.embedding_scale is not None:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype, device=x.device)
        angle = position[:, None, :, None].float() * rope_frequencies(self.config, x.device)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return x, torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def unpadded(self, input_ids: Tensor, real: Tensor) -> Tensor:
        """Hidden states (tokens, d) of the real tokens alone of a batch padded on the right.

        They stand one behind the other in one row, so that no product is made of padding;
        attention takes the sequences apart."""
        lengths = real.sum(dim=1).tolist()
        position = torch.arange(input_ids.shape[1], device=real.device).expand_as(real)[real]
        x, cos, sin = self.embed(input_ids[real][None], position[None])
        return self.norm(run_blocks(self, self.layers, x, (cos, sin, lengths, lengths)))[0]

    def enter(self, input_ids: Tensor, attention_mask: Tensor | None = None,
              cache: KVCache | None = None) -> tuple[Tensor, Context]:
        """The hidden state (b, t, d) before the first block, and the context of all blocks.

        attention_mask (b, t) marks real tokens with 1; it may pad on either side. None means no
        padding on the left: then causality alone keeps right padding away from every real token,
        and no mask tensor is built. With a cache the tokens go on in its slots, none padded on the
        left; ValueError for a mask beside it.
        """
        if attention_mask is not None and cache is not None:
            raise ValueError("the slots of a cache are not padded, and take no attention mask")
        t, device = input_ids.shape[1], input_ids.device
        query = torch.arange(t, device=device)[None] if cache is None else cache.reserve(t)
        total = t if cache is None else cache.end
        position = query if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
        x, cos, sin = self.embed(input_ids, position)
        window = self.config.sliding_window
        narrow = window is not None and total > window  # the window leaves keys out
        if attention_mask is None and total == t and not narrow:
            return x, (cos, sin, None, None)  # is_causal says it all
        mask = causal_mask(query, total, attention_mask)
        if not narrow:
            return x, (cos, sin, mask, mask)
        return x, (cos, sin, mask, causal_mask(query, total, attention_mask, window))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Hidden states (b, t, d) of input_ids (b, t) after the last block and its norm."""
        x, context = self.enter(input_ids, attention_mask, cache)
        if cache is None:
            return self.norm(run_blocks(self, self.layers, x, context))
        for layer in self.layers:
            x = layer(x, *context, cache)
        return self.norm(x)


def run_blocks(stack: Any, blocks: Iterable[nn.Module], x: Tensor, context: Sequence) -> Tensor:
    """x through all blocks; where the stack says so, what is inside them is computed again in the
    backward pass."""
    for block in blocks:
        if stack.gradient_checkpointing and stack.training:
            x = checkpoint(block, x, *context, use_reentrant=False)
        else:
            x = block(x, *context)
    return x


def causal_mask(query: Tensor, total: int, attention_mask: Tensor | None,
                window: int | None = None) -> Tensor:
    """(b or 1, 1, t, total) bool: which keys the queries in columns `query` (b or 1, t) see.

    With a window only the last so many, their own among them. A padded position sees itself, since
    a softmax over nothing is NaN.
    """
    key, query = torch.arange(total, device=query.device), query[:, None, :, None]
    seen = key <= query if window is None else (key <= query) & (key > query - window)
    if attention_mask is None:
        return seen
    return seen & (attention_mask[:, None, None].bool() | (key == query))


class CausalLM(nn.Module):
    """Causal language model; `model(input_ids, attention_mask=None)` gives logits (b, t, V)."""

    fingerprint: str | None = None  # of the checkpoint whose weights it has

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.logits(self.model(input_ids, attention_mask))

    @property
    def body(self) -> Decoder:
        """Everything below the head."""
        return self.model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states (..., d) behind the last norm."""
        return soft_cap(self.lm_head(hidden), self.config.final_logit_softcapping)

    def loss(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
             ) -> tuple[Tensor, int]:
        """(summed negative log-likelihood in nats, number of labelled tokens).

        input_ids, labels (b, t), labels IGNORE where no loss falls. Batches must be padded on the
        right (ValueError otherwise). Logits exist only at the labelled positions, and where they
        are more than CHUNK a chunk at a time: for a frozen head its gradient is taken at once (see
        ChunkedLoss), else the chunk is computed again in the backward pass.
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("the loss takes batches padded on the right")
        predicting, target = self.labelled(input_ids, labels, attention_mask)
        rows = max(1, CHUNK // self.config.vocab_size)
        if len(target) <= rows:
            return self.nll(predicting, target), len(target)
        if not any(p.requires_grad for p in self.lm_head.parameters()):
            return ChunkedLoss.apply(predicting, target, self.nll, rows), len(target)
        chunks = zip(predicting.split(rows), target.split(rows), strict=True)
        return sum(checkpoint(self.nll, h, y, use_reentrant=False) for h, y in chunks), len(target)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Summed -log p of the tokens `target` (P,) after hidden states (P, d), a scalar."""
        return F.cross_entropy(at_least_fp32(self.logits(hidden)), target, reduction="sum")

    def draw(self, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A token (P,) from the model's own distribution after each hidden state (P, d)."""
        p = at_least_fp32(self.logits(hidden)).softmax(-1)
        return torch.multinomial(p, 1, generator=generator).squeeze(1)

    def labelled(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
                 ) -> tuple[Tensor, Tensor]:
        """Hidden states (P, d) that predict the P labelled tokens, and those tokens (P,).

        attention_mask, of a batch padded on the right, only says what need not be computed.
        """
        keep = F.pad(labels[:, 1:] != IGNORE, (0, 1))  # where the next token is labelled
        target = labels[:, 1:][keep[:, :-1]]
        if (attention_mask is not None and self.training
                and self.skips_padding(attention_mask)):
            real = attention_mask.bool()
            return self.model.unpadded(input_ids, real)[keep[real]], target
        return self.model(input_ids)[keep], target

    def skips_padding(self, attention_mask: Tensor) -> bool:
        """Whether a batch is trained on without its padding: where that is an eighth or more."""
        window, (b, t) = self.config.sliding_window, attention_mask.shape
        return (self.config.hidden_size >= WIDE and (window is None or t <= window)
                and int(attention_mask.sum()) <= b * t * 7 // 8)


class ChunkedLoss(torch.autograd.Function):
    """Σ nll(hidden, target) of hidden (P, d), `rows` at a time, with its gradient at hidden beside
    it: the logits of one chunk exist at a time, and are computed once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, nll: Callable[[Tensor, Tensor], Tensor],
                rows: int) -> Tensor:
        total, ctx.gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        for h, y, g in zip(*(x.split(rows) for x in (hidden, target, ctx.gradient)), strict=True):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                loss = nll(h, y)
            if ctx.needs_input_grad[0]:
                g.copy_(torch.autograd.grad(loss, h)[0])
            total = total + loss.detach()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient * gradient.to(ctx.gradient.dtype), None, None, None


# --------------------------------------------------------------------------------------- RoBERTa


def first_position(config: Config) -> int:
    """RoBERTa counts positions from the one behind the padding's."""
    return (config.pad_token_id or 0) + 1


class Embeddings(nn.Module):
    """Word + position + token type, then LayerNorm."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.hidden_size
        self.first, self.dropout = first_position(config), config.hidden_dropout_prob
        self.word_embeddings = lookup_table(config.vocab_size, d)
        self.position_embeddings = lookup_table(config.max_position_embeddings, d)
        self.token_type_embeddings = lookup_table(config.type_vocab_size, d)
        self.LayerNorm = nn.LayerNorm(d, config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(b, t, d). Real tokens are counted from `first` on, padding has the position before.

        The mask says which are real, not the id, as everywhere here; transformers looks for the
        padding's id, which is the same unless a text holds it.
        """
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position = real.cumsum(-1) * real + self.first - 1
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        x = self.LayerNorm(x + self.position_embeddings(position))
        return F.dropout(x, self.dropout, self.training)


class SelfAttention(nn.Module):
    """Attention in both directions."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.hidden_size
        self.head_dim, self.dropout = config.head_dim, config.attention_probs_dropout_prob
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, d = x.shape
        q, k, v = (proj(x).view(b, t, -1, self.head_dim).transpose(1, 2)
                   for proj in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return y.transpose(1, 2).reshape(b, t, d)


class AddAndNorm(nn.Module):
    """The end of a branch: LayerNorm(x + dropout(dense(y)))."""

    def __init__(self, width: int, config: Config):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + F.dropout(self.dense(y), self.dropout, self.training))


class EncoderBlock(nn.Module):
    """One encoder layer, post-norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config),
                                        "output": AddAndNorm(config.hidden_size, config)})
        self.intermediate = nn.ModuleDict({
            "dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = AddAndNorm(config.intermediate_size, config)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(self.act(self.intermediate["dense"](x)), x)


class Blocks(nn.Module):
    """Holds the name `layer`."""

    def __init__(self, config: Config):
        super().__init__()
        self.layer = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_hidden_layers))


class Encoder(nn.Module):
    """Everything below the head; holds the names `embeddings` and `encoder.layer`."""

    def __init__(self, config: Config):
        super().__init__()
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.encoder = Blocks(config)

    def enter(self, input_ids: Tensor, attention_mask: Tensor | None = None
              ) -> tuple[Tensor, tuple[Tensor | None]]:
        """The hidden state (b, t, d) before the first block, and the mask (b, 1, 1, t) of all."""
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        return self.embeddings(input_ids, attention_mask), (mask,)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (b, t, d) of input_ids (b, t), padded on the right."""
        x, context = self.enter(input_ids, attention_mask)
        return run_blocks(self, self.encoder.layer, x, context)


class ClassificationHead(nn.Module):
    """out_proj(tanh(dense(x))), with dropout before each."""

    def __init__(self, config: Config):
        super().__init__()
        given = config.classifier_dropout
        self.dropout = config.hidden_dropout_prob if given is None else given
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, len(config.labels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x.to(self.dense.weight.dtype), self.dropout, self.training)
        x = torch.tanh(self.dense(x))
        return self.out_proj(F.dropout(x, self.dropout, self.training))


class Roberta(nn.Module):
    """Classifier of texts and pairs; `model(input_ids, attention_mask=None)` gives scores
    (b, labels). With a single label it predicts a number.
    """

    fingerprint: str | None = None  # of the checkpoint whose weights it has
    whole = ("classifier",)  # what trains in full beside adapters, since it starts from nothing

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.roberta = Encoder(config)
        self.classifier = ClassificationHead(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.logits(self.roberta(input_ids, attention_mask)[:, 0])

    @property
    def body(self) -> Encoder:
        """Everything below the head."""
        return self.roberta

    @property
    def blocks(self) -> nn.ModuleList:
        return self.roberta.encoder.layer

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (b, labels) of the first tokens' hidden states (b, d)."""
        return self.classifier(hidden)

    def loss(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
             ) -> tuple[Tensor, int]:
        """(summed loss, number of sequences): cross entropy in nats of labels (b,), classes; with
        a single label the squared error of labels (b,), numbers."""
        predicting, target = self.labelled(input_ids, labels, attention_mask)
        return self.nll(predicting, target), len(target)

    def nll(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The summed loss of `target` (b,) for the first tokens' hidden states (b, d)."""
        scores = at_least_fp32(self.logits(hidden))
        if scores.shape[1] == 1:
            return F.mse_loss(scores[:, 0], target.to(scores.dtype), reduction="sum")
        return F.cross_entropy(scores, target, reduction="sum")

    def draw(self, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels (b,) from the model's own distribution: of its classes, or the normal one whose
        -log is the squared error, which has the variance 1/2."""
        scores = at_least_fp32(self.logits(hidden))
        if scores.shape[1] == 1:
            return torch.normal(scores[:, 0], 0.5**0.5, generator=generator)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)

    def labelled(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
                 ) -> tuple[Tensor, Tensor]:
        """Hidden states (b, d) of the first tokens, from which the head predicts, and labels.

        ValueError for a batch padded on the left, where the first is padding.
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("an encoder takes batches padded on the right")
        return self.roberta(input_ids, attention_mask)[:, 0], labels


def new_head(config: Config, seed: int) -> dict[str, Tensor]:
    """A head that knows nothing, by the names of its parameters: weights from N(0, 0.02²), as in
    transformers, and biases 0."""
    draw = torch.Generator().manual_seed(seed)
    head: dict[str, Tensor] = {}
    for name, m in (("dense", config.hidden_size), ("out_proj", len(config.labels))):
        weight = torch.empty(m, config.hidden_size).normal_(0, 0.02, generator=draw)
        head |= {f"classifier.{name}.weight": weight, f"classifier.{name}.bias": torch.zeros(m)}
    return head


# --------------------------------------------------------------------------- either kind of model

Model = CausalLM | Roberta


def empty(config: Config) -> Model:
    """The model on the meta device: every name and shape, no memory."""
    with torch.device("meta"):
        return (Roberta if FAMILIES[config.model_type].encoder else CausalLM)(config)


def embedding(model: Model) -> Tensor:
    """The word embedding (V, d), whose device and dtype are the model's."""
    return next(model.parameters())


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that train in full beside adapters: RoBERTa's head; none in a decoder."""
    whole = getattr(model, "whole", ())
    return {n: p for n, p in model.named_parameters() if n.split(".")[0] in whole}


def place(name: str) -> str:
    """A layer's name within its block: mlp.up_proj; the whole name of one outside the blocks."""
    return re.sub(r"^(?:.*\.)?layers?\.\d+\.", "", name)


def linear_names(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Names of the linear layers that `targets` mean, in the model's order.

    A target is a layer's name within its block or the last part of it: q_proj, output.dense.
    Layers that train in full take no adapter. Raises ValueError for a target that is none.
    """
    targets, whole = list(targets), getattr(model, "whole", ())
    named = {n: {place(n), n.rsplit(".", 1)[-1]} for n, m in model.named_modules()
             if isinstance(m, (nn.Linear, LoRALinear)) and n.split(".")[0] not in whole}
    missing = [t for t in targets if not any(t in called for called in named.values())]
    if missing:
        leaves = sorted({place(n) if n.endswith(".dense") else n.rsplit(".", 1)[-1]
                         for n in named} - {"lm_head"})
        raise ValueError(f"no linear layer is called {', '.join(missing)}; there are: "
                         + ", ".join(leaves))
    return [n for n, called in named.items() if not called.isdisjoint(targets)]


def linear_shapes(model: nn.Module, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(m, n) of every linear layer of linear_names."""
    weights = {n: model.get_submodule(n).get_parameter("weight")
               for n in linear_names(model, targets)}
    return {n: (W.shape[0], W.shape[1]) for n, W in weights.items()}


# ------------------------------------------------------------------------------------- adapters


class Start(NamedTuple):
    """Where the adapter of one layer W (m, n) starts, and what is taken out of W for it.

    The layer becomes y = W_res x + scaling * B diag(d) A x with W_res = W - scaling * B0 A0.
    """

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    A0: Tensor | None = None  # None: nothing is taken out
    B0: Tensor | None = None
    d: Tensor | None = None  # (r,); None: ones, which do not train


class Adapted(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling * dropout(x) Aᵀ Bᵀ, where W and the bias are frozen.

    For the backward pass it keeps x, which layers that read it share, dropout's mask in bytes, and
    z (r a token), not the dropped x and a mask of floats for each layer, and it adds the update in
    place. A and B act in the dtype of y, as under autocast. With the same seed what is dropped is
    what F.dropout drops, on the CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                scaling: float, dropout: float) -> Tensor:
        y = F.linear(x, weight, bias)
        A, B, rows = A.to(y.dtype), B.to(y.dtype), x.reshape(-1, x.shape[-1]).to(y.dtype)
        mask = None
        if dropout:
            mask = torch.empty_like(rows, dtype=torch.uint8).bernoulli_(1 - dropout)
        ctx.scaling = scaling / (1 - dropout)
        z = (rows if mask is None else rows * mask.to(y.dtype)) @ A.T
        y.view(-1, len(weight)).addmm_(z, B.T, alpha=ctx.scaling)
        ctx.save_for_backward(rows, weight, A, B, mask, z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, mask, z = ctx.saved_tensors
        dy, dx, dA, dB = gradient.reshape(-1, len(weight)), None, None, None
        kept = 1.0 if mask is None else mask.to(x.dtype)
        dz = ctx.scaling * (dy @ B)
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.to(dy.dtype)).add_((dz @ A).mul_(kept))
            dx = dx.view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[3]:
            dA = dz.T @ (x * kept)
        if ctx.needs_input_grad[4]:
            dB = ctx.scaling * (dy.T @ z)
        return dx, None, None, dA, dB, None, None


class LoRALinear(nn.Module):
    """y = W_res x + scaling * B A dropout(x) (+ bias)                                    Eq. 1

    weight (m, n) is frozen, in the model's dtype; A (r, n) and B (m, r) train, in fp32 even on a
    bf16 base, where AdamW's steps would round away; so does KaSA's d (r,), which stands between
    them. With `exact=(A0, B0)` the weight is W itself and what was taken out of it is subtracted in
    the forward pass instead: y = W x + scaling * (B A - B0 A0) dropout(x), where dropout acts on
    the update alone, so that the layer starts as W whatever is dropped.
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0,
                 dropout: float = 0.0, bias: Tensor | None = None,
                 exact: tuple[Tensor, Tensor] | None = None, d: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.A = nn.Parameter(A.detach().clone(memory_format=torch.contiguous_format))
        self.B = nn.Parameter(B.detach().clone(memory_format=torch.contiguous_format))
        self.d = None if d is None else nn.Parameter(d.detach().clone())
        self.scaling, self.dropout = scaling, dropout
        self.register_buffer("A0", None if exact is None else exact[0].detach().clone())
        self.register_buffer("B0", None if exact is None else exact[1].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.shape[-1] >= WIDE:
            return Adapted.apply(x, self.weight, self.bias, *self.update_factors(), self.scaling,
                                 self.dropout * self.training)
        y = F.linear(x, self.weight, self.bias)
        xa = F.dropout(x, self.dropout, self.training).to(self.A.dtype)
        z = F.linear(xa, self.A)
        update = F.linear(z if self.d is None else z * self.d, self.B)
        if self.A0 is not None and self.B0 is not None:
            update = update - F.linear(F.linear(xa, self.A0), self.B0)
        if update.dtype == y.dtype:
            return torch.add(y, update, alpha=self.scaling)
        return y + (self.scaling * update).to(y.dtype)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update, B diag(d) A - B0 A0 in one product."""
        A, B = self.A, self.B if self.d is None else self.B * self.d
        if self.A0 is None or self.B0 is None:
            return A, B
        return torch.cat((A, self.A0)), torch.cat((B, -self.B0), dim=1)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one matrix (m, n) that acts as this layer, in the adapter's dtype (fp32)."""
        W = self.weight.to(self.A.dtype)
        if self.A0 is not None and self.B0 is not None:
            W = W - self.scaling * (self.B0 @ self.A0)
        B = self.B if self.d is None else self.B * self.d
        return W + self.scaling * (B @ self.A)


@torch.no_grad()
def attach(model: nn.Module, adapters: Mapping[str, Start | tuple[Tensor, Tensor]],
           scaling: float | Mapping[str, float] = 1.0, dropout: float = 0.0,
           residual: str = "split") -> dict[str, float]:
    """Put an adapter {name: Start} on each named nn.Linear; a pair (A, B) is both the adapter and
    what is taken out of W, so that the model's function is unchanged. `scaling` may be one for all
    layers or of each by name.

    residual="split" stores W_res = W - scaling * B0 A0 in W's dtype (the paper), "exact" keeps W
    (see LoRALinear). All other parameters are frozen, but for a classification head, which trains
    in full, in fp32. Returns for each layer the part of what was taken out that rounding W_res
    lost: ||W_res + scaling * B0 A0 - W|| / ||scaling * B0 A0||, 0 where nothing was. In bf16 a
    split-off bottom direction can be smaller than W's last bit, so this is printed for every run.
    """
    model.requires_grad_(False)
    for p in whole_parameters(model).values():
        p.data = at_least_fp32(p.data)  # as A and B: AdamW's steps would round away in bf16
        p.requires_grad_(True)
    lost = {}
    for name, given in adapters.items():
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is a {type(linear).__name__}, not an nn.Linear without "
                             "adapter; merge() first")
        W, s = linear.weight, scaling[name] if isinstance(scaling, Mapping) else scaling
        start = given if isinstance(given, Start) else Start(*given, *given)
        A, B = start.A.to(W.device), start.B.to(W.device)
        weight, exact, lost[name] = W, None, 0.0
        if start.A0 is not None and start.B0 is not None:
            A0, B0 = start.A0.to(W.device), start.B0.to(W.device)
            out = s * (B0 @ A0)
            if residual == "exact":
                exact = A0, B0
            else:
                weight = (W.to(out.dtype) - out).to(W.dtype)
                size = out.norm().item()
                kept = weight.to(out.dtype) + out
                lost[name] = (kept - W.to(kept.dtype)).norm().item() / size if size else 0.0
        parent, _, leaf = name.rpartition(".")
        adapted = LoRALinear(weight, A, B, s, dropout, linear.bias, exact,
                             None if start.d is None else start.d.to(W.device))
        setattr(model.get_submodule(parent), leaf, adapted.train(linear.training))
    return lost


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def put_linear(model: nn.Module, name: str, weight: Tensor) -> None:
    """Replace the named LoRALinear by an nn.Linear of this weight (m, n) and the same bias."""
    layer, (m, n) = model.get_submodule(name), weight.shape
    assert isinstance(layer, LoRALinear)
    linear = nn.Linear(n, m, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, linear)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace every LoRALinear by the one nn.Linear that acts as it does (rounded once)."""
    for name, layer in adapted_layers(model).items():
        put_linear(model, name, layer.merged_weight().to(layer.weight.dtype))


def compile_parts(model: nn.Module) -> None:
    """Have torch.compile fuse what stands between the attentions: norms, and the gated MLP with its
    adapters. For any number of sequences and tokens at once; attention, whose masks and caches
    change from call to call, stays as it is, and has fused kernels of its own."""
    parts = [m for m in model.modules() if isinstance(m, RMSNorm | MLP | AddAndNorm)]
    for m in parts:
        m.compile(dynamic=True)
    # Each rank of an adapter is compiled anew; beyond the limit torch goes back to the plain way.
    torch._dynamo.config.recompile_limit = 8 + len(parts)


def is_compiled(model: nn.Module) -> bool:
    """Whether compile_parts was here."""
    return any(m._compiled_call_impl is not None for m in model.modules())


# ------------------------------------------------------------------------------------- decoding


def on_cpu_in_fp32(linears: Iterable[nn.Linear | LoRALinear]) -> bool:
    """Whether all of them have plain weights of fp32 on the CPU, and are WIDE."""
    return all(m.weight.dtype == torch.float32 and m.weight.device.type == "cpu"
               and type(m.weight) is nn.Parameter and m.weight.shape[1] >= WIDE for m in linears)


def linears_of(model: nn.Module) -> list[nn.Linear | LoRALinear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | LoRALinear)]


def products(model: nn.Module) -> AbstractContextManager:
    """Inside, the model's products are oneDNN's, where that is faster (see onednn.py): not on a
    GPU, in bf16, in layers below WIDE, or compiled ones."""
    quick = onednn.is_faster() and on_cpu_in_fp32(linears_of(model)) and not is_compiled(model)
    return onednn.Products() if quick else nullcontext()


def packable(model: nn.Module) -> list[nn.Linear | LoRALinear]:
    """The layers that `packed` packs: all linear ones. None on a GPU, in bf16, in layers below
    WIDE, of weights above PACKED, compiled, and where torch has no oneDNN for this CPU."""
    linears = linears_of(model)
    few = sum(m.weight.nbytes for m in linears) <= PACKED and not is_compiled(model)
    return linears if few and on_cpu_in_fp32(linears) and onednn.is_known() else []


def packed_size(model: nn.Module) -> int:
    """Bytes of the copy that `packed` makes."""
    return sum(m.weight.nbytes for m in packable(model))


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers multiply by a copy of their weights (an adapted layer's: merged) in the
    order in which oneDNN's kernels read them.

    With few rows a product is as long as the reading of its weights, which BLAS brings into such an
    order anew for each: 32 rows on SmolLM2 take 0.6 of the time, 8 rows 0.4. The sums are taken in
    another order, so that the last bits differ. No gradients.
    """
    linears = packable(model)
    try:
        for m in linears:
            W = m.merged_weight() if isinstance(m, LoRALinear) else m.weight.detach()
            weight, bias = onednn.reordered(W), m.bias
            m.forward = partial(onednn.linear, weight=weight, bias=bias)  # type: ignore[method-assign]
        yield
    finally:
        for m in linears:
            vars(m).pop("forward", None)  # the class's own again


def next_tokens(model: CausalLM, rows: Sequence[Sequence[int]], cache: KVCache) -> list[int]:
    """The likeliest next token behind each row, which goes on in the cache's slot of its place."""
    lengths = torch.tensor([len(row) for row in rows])
    longest, device = int(lengths.max()), cache.store.device
    ids = torch.tensor([[*row] + [0] * (longest - len(row)) for row in rows], device=device)
    hidden = model.model(ids, None, cache)
    cache.lengths += lengths  # what comes next overwrites the padding's keys
    last = hidden[torch.arange(len(rows), device=device), lengths.to(device) - 1]
    return model.logits(last).argmax(-1).tolist()


def continuations(model: CausalLM, prompts: Sequence[Sequence[int]], limits: Sequence[int],
                  eos_ids: set[int], stop: Callable[[list[int]], bool] | None, slots: int,
                  ) -> Iterator[tuple[int, list[int]]]:
    """(index, new token ids) of each prompt of limit > 0, as soon as it has come to its end."""
    waiting = sorted((i for i, n in enumerate(limits) if n), key=lambda i: len(prompts[i]))
    capacity = max((len(prompts[i]) + limits[i] for i in waiting), default=0)
    cache = KVCache.allocate(model.config, slots, capacity, like=embedding(model))
    together = max(1, slots // 8)  # prompts begin a few at a time, which costs less than singly
    new: dict[int, list[int]] = {i: [] for i in waiting}
    live: list[int] = []  # slot s continues prompt live[s]; the slots behind are free
    while waiting or live:
        first, begin = 0, min(together, len(waiting))
        if begin and len(live) + begin <= slots:
            first = len(live)
            live += [waiting.pop() for _ in range(begin)]
        rows = [new[i][-1:] or prompts[i] for i in live[first:]]
        tokens = next_tokens(model, rows, cache.part(first, len(live)))
        for slot in reversed(range(first, len(live))):  # the last slot moves where one falls free
            i, token = live[slot], tokens[slot - first]
            if token not in eos_ids:
                new[i].append(token)
                if not (stop and stop(new[i])) and len(new[i]) < limits[i]:
                    continue
            cache.move(len(live) - 1, slot)
            live[slot] = live[-1]
            live.pop()
            yield i, new.pop(i)


@torch.inference_mode()
def generate(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int],
             eos_ids: Iterable[int] = (), stop: Callable[[list[int]], bool] | None = None,
             batch_size: int | None = None,
             finished: Callable[[int, list[int]], None] | None = None) -> list[list[int]]:
    """Greedy continuation of each prompt: a list of new token ids, at most max_new_tokens (one
    number for all or one for each).

    A prompt is finished by a token of `eos_ids` (which is not returned) or when `stop(new_ids)` is
    true; `finished(index, new_ids)` is then called. At most batch_size (None: all) are in work, the
    longest first, so that memory trouble shows at once; the next take the place of the finished.
    Apart from ties in the last bit of a logit, each is what it would be alone. Raises ValueError
    for an empty prompt, and for an encoder, which continues nothing.
    """
    if not isinstance(model, CausalLM):
        raise ValueError(f"a {model.config.model_type} model does not generate text")
    if not all(prompts):
        raise ValueError("an empty prompt cannot be continued; give it at least a BOS token")
    n = len(prompts)
    limits = [max_new_tokens] * n if isinstance(max_new_tokens, int) else max_new_tokens
    new: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), packed(model) if packable(model) else products(model):
        for i, ids in continuations(model, prompts, limits, set(eos_ids), stop,
                                    min(batch_size or n, n)):
            new[i] = ids
            if finished:
                finished(i, ids)
    return new
