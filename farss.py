"""FARSS: Fisher-Optimized Adaptive Low-Rank and Singular-Vector Selection, in the paper's order.

For every linear layer W (m x n) in the transformer blocks, from a few examples of the task:

    Σ_h = E[h hᵀ]                 second moment of the layer's inputs, (n, n)          Eq. 2, 24
    Σ_δ = E[δ δᵀ]                 second moment of its output gradients, (m, m)        Eq. 2, 24
    I   = Tr(Σ_δ W Σ_h Wᵀ) / mn   Fisher importance of the layer                       Eq. 8
    W   = U Σ Vᵀ                  singular value decomposition                         Eq. 13
    s_i = σ_i² λ_i γ_i            with λ_i = v_iᵀ Σ_h v_i and γ_i = u_iᵀ Σ_δ u_i       Eq. 14, 15

    shallow blocks:  r ∝ 1/I, clipped to [r_min, r_max];  the r lowest-scoring directions
                                                                                       Eq. 9-12, 17
    deep blocks:     r = R;                               the R highest-scoring ones   Eq. 16
      B = U' √(Σ'/scaling),  A = √(Σ'/scaling) V'ᵀ,       W_res = W - scaling · B A
    so that before the first training step                W_res + scaling · B A == W

Glossary (name in the code, symbol in the paper, equation)
    h, delta                 h, δ        input of a layer; loss gradient at its output       18, 19
    Sigma_h, Sigma_delta     Σ_h, Σ_δ    Kronecker factors of the Fisher information         2, 24
    U, S, Vh                 U, σ, Vᵀ    singular value decomposition of W                   13
    lam, gam                 λ, γ        Σ_h and Σ_δ along the singular directions           14, 31
    s                        s           score of a direction                                15, 35
    I                        I           Fisher importance of a layer                        8
    omega, r_raw, r          ω, r^raw, r inverse importance; rank before and after clipping  9-12
    R                        R           rank of the deep layers                             16
    scaling                  α/R         one constant for all layers of a run                A.2.1

Any PyTorch model will do whose linear layers stand in one list of blocks (`model.layers.3...`),
each of which hands its hidden state to the next. Every matrix that the paper names is formed here;
train.py runs this file for models narrower than 512, and for wider ones fast/, which is sooner.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-12  # Eq. 9, relative to the sum of the importances
IGNORE = -100  # label of a position that carries no loss, as in torch's cross_entropy
IN_BLOCK = r"(?:^|\.)\d+\."  # what tells the block in a layer's name: model.layers.3.mlp.up_proj
Batch = dict[str, Tensor]  # input_ids, attention_mask, labels, each (b, t), padded on the right
Factors = dict[str, tuple[Tensor, Tensor]]  # layer name: (Σ_h, Σ_δ)
Loss = Callable[[Any, Batch], Tensor]  # (model, batch) -> a sum, whose gradients are the δ


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it already is: bf16 carries 8 bits, too few to sum or divide."""
    return x if x.dtype == torch.float64 else x.float()

# ------------------------------------------------ section 3.2: Kronecker factors of the Fisher

@dataclass
class FactorSums:
    """Sums of h hᵀ and δ δᵀ over the real tokens, by layer, which the hooks of `kfac_hooks` fill.
    A batch's `counted` (b, t) says which are real, and where it has none its attention_mask."""

    hh: dict[str, Tensor] = field(default_factory=dict)  # Σ_t h hᵀ (n, n)
    dd: dict[str, Tensor] = field(default_factory=dict)  # Σ_t δ δᵀ (m, m)
    tokens: dict[str, int] = field(default_factory=dict)
    mask: Tensor | None = None  # (b, t) bool, of the current batch; None: every token is real

    def start(self, batch: Batch) -> None:
        """Announce the next batch, before its forward pass."""
        mask = batch.get("counted", batch.get("attention_mask"))
        self.mask = None if mask is None else mask.bool()

    def add_input(self, name: str, h: Tensor) -> None:
        """Eq. 18: h (b, t, n) is what the layer multiplies by W."""
        rows = self.real(h.detach())
        self.hh[name] = self.hh.get(name, 0) + rows.T @ rows
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)

    def add_gradient(self, name: str, delta: Tensor) -> None:
        """Eq. 19: δ = ∂L/∂y (b, t, m) is the gradient of the loss at the layer's output."""
        rows = self.real(delta)
        self.dd[name] = self.dd.get(name, 0) + rows.T @ rows

    def real(self, x: Tensor) -> Tensor:
        """The real tokens (tokens, width) of x, which comes as (b, t, width) or (b·t, width)."""
        rows = x.flatten(0, -2)
        return at_least_fp32(rows if self.mask is None else rows[self.mask.flatten()])

    def factors(self) -> Factors:
        """{layer: (Σ_h, Σ_δ)}, the means. Uses up the sums, so that no second copy exists."""
        if not any(self.tokens.values()):
            raise ValueError("no calibration token: the batches are empty or fully padded")
        return {name: (self.hh.pop(name).div_(self.tokens[name]),
                       self.dd.pop(name).div_(self.tokens[name])) for name in list(self.dd)}


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters, so that a backward pass computes no weight gradient, and switch
    dropout off; afterwards requires_grad and train mode are what they were."""
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter, wanted in requires_grad:
            parameter.requires_grad_(wanted)
        for module, training in modes:
            module.training = training


@contextmanager
def kfac_hooks(model: nn.Module, names: Iterable[str]) -> Iterator[FactorSums]:
    """Record h and δ of the named linear layers during forward and backward passes."""
    sums = FactorSums()
    def after_forward(name: str, module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        sums.add_input(name, args[0])
        if not y.requires_grad:  # nothing before it does: the graph begins here
            y.requires_grad_()
        y.register_hook(lambda delta: sums.add_gradient(name, delta))

    with calibrating(model), ExitStack() as hooks:
        for name in names:
            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_hook(partial(after_forward, name)).remove)
        yield sums


def logits_of(model: Any, batch: Batch) -> Tensor:
    """The model's scores (b, t, V) of a batch, in fp32 at least."""
    out = model(**{k: v for k, v in batch.items() if k not in ("labels", "counted")})
    return at_least_fp32(getattr(out, "logits", out))


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """The negative log-likelihood of the tokens whose label is not IGNORE, summed, a scalar."""
    if hasattr(model, "loss"):  # a model of this repository: forms only the logits that it needs
        return model.loss(batch["input_ids"], batch["labels"], batch.get("attention_mask"))[0]
    logits, labels = logits_of(model, batch)[:, :-1], batch["labels"][:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(),
                                       ignore_index=IGNORE, reduction="sum")


def sampled_loss(generator: torch.Generator | None = None) -> Loss:
    """Eq. 5 as written: summed_loss with labels drawn from the model's own distribution."""

    def loss(model: Any, batch: Batch) -> Tensor:
        if hasattr(model, "draw"):
            hidden, _ = model.labelled(batch["input_ids"], batch["labels"],
                                       batch.get("attention_mask"))
            return model.nll(hidden, model.draw(hidden.detach(), generator))
        asked = batch["labels"][:, 1:] != IGNORE
        log_p = logits_of(model, batch)[:, :-1][asked].log_softmax(-1)  # (tokens, V)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        return -log_p.gather(1, drawn).sum()

    return loss


def kfac_factors(model: nn.Module, batches: Iterable[Batch], names: Iterable[str],
                 loss: Loss = summed_loss) -> Factors:
    """Eq. 2, 24 and 25: F ≈ Σ_h ⊗ Σ_δ for every named layer.

    Σ_h (n, n) = (1/N) Σ_t h_t h_tᵀ and Σ_δ (m, m) = (1/N) Σ_t δ_t δ_tᵀ over the N real tokens of
    all batches, prompt and BOS included, in fp32 (fp64 for an fp64 model). δ_t is the gradient of
    its own sequence's summed loss, so the factors do not depend on how examples are batched. The
    labels are the data's: this is the *empirical* Fisher; `sampled_loss` gives that of Eq. 5.
    Official code differs: mean loss over batches of two, padding counted, at most 16 sequences.
    """
    with kfac_hooks(model, names) as sums, torch.enable_grad():
        for batch in batches:
            sums.start(batch)
            loss(model, batch).backward()
        return sums.factors()

# ------------------------------------------------------ the same factors, one block at a time

def block_index(name: str) -> int:
    """Depth of a layer: 3 for model.layers.3.mlp.up_proj. ValueError if it is in no block."""
    found = re.search(IN_BLOCK, name)
    if not found:
        raise ValueError(f"{name} does not stand in a numbered block")
    return int(found[0].strip("."))


def blocks_of(model: nn.Module, names: Iterable[str]) -> nn.ModuleList:
    """The one list of blocks that the named layers stand in: `model.layers` of a Llama."""
    lists = {re.split(IN_BLOCK, name, maxsplit=1)[0] for name in names}
    if len(lists) != 1:
        raise ValueError(f"layers of one list of blocks are needed, not of {sorted(lists)}")
    return model.get_submodule(lists.pop())  # type: ignore[return-value]


def block_by_block(model: nn.Module, batches: list[Batch], names: list[str],
                   listen: Callable[[nn.Module, list[str]], AbstractContextManager],
                   loss: Loss = summed_loss, keep_on: torch.device | str | None = None
                   ) -> Iterator[Any]:
    """Run all batches forward and backward through one block at a time, from the last to the first.

    As in activation checkpointing, the first forward pass keeps the input of every block, on the
    device `keep_on` (None: where it is), and its backward pass ends at the input of the last block.
    Then each block in turn runs forward again from its kept input, and backward from the gradient
    that the block above left there: its output must be what the next block takes. While a block
    runs, `listen(model, its named layers)` is open, as kfac_hooks; what it gave is yielded after.
    """
    depths, blocks = [block_index(name) for name in names], blocks_of(model, names)
    first, last = min(depths), len(blocks) - 1
    inside = [[n for n, d in zip(names, depths, strict=True) if d == i] for i in range(len(blocks))]
    kept: list[list[Any]] = [[] for _ in blocks]  # [block][batch]: its input and other arguments
    gradients: list[Any] = []  # [batch]: of the loss, at the output of the block that runs next

    def away(x: Any) -> Any:
        return x if x is None or keep_on is None else x.to(keep_on)

    def keep(i: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x, *rest = args or [kwargs["hidden_states"]]
        kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        x = x.detach().requires_grad_(i == last and i > first)
        if i >= first:
            # But for a key-value cache, which a block must not see when it runs again.
            again = {k: None if hasattr(v, "get_seq_length") else v for k, v in kwargs.items()}
            others = [None if hasattr(v, "get_seq_length") else v for v in rest]
            kept[i].append((x if i == last else away(x), x.device, others, again))
        return (x, *rest), kwargs

    with listen(model, inside[last]) as found, ExitStack() as hooks:
        for i, block in enumerate(blocks):
            hook = block.register_forward_pre_hook(partial(keep, i), with_kwargs=True)
            hooks.callback(hook.remove)
        for b, batch in enumerate(batches):
            found.start(batch)
            with torch.enable_grad():
                loss(model, batch).backward()
            if any(len(inputs) != b + 1 for inputs in kept[first:]):
                raise ValueError("a block did not run exactly once in a forward pass")
            gradients.append(away(kept[last][b][0].grad))
            kept[last][b] = None
    if inside[last]:  # no hook is left, and the model is as it was
        yield found
    for i in range(last - 1, first - 1, -1):
        with listen(model, inside[i]) as found:
            for b, batch in enumerate(batches):
                found.start(batch)
                (x, device, rest, kwargs), kept[i][b] = kept[i][b], None
                x = x.to(device).detach().requires_grad_(i > first)
                with torch.enable_grad():
                    y = blocks[i](x, *rest, **kwargs)
                    y = y[0] if isinstance(y, tuple) else y
                    y.backward(gradients[b].to(y.device))
                gradients[b] = away(x.grad)
        if inside[i]:
            yield found


def factors_by_block(model: nn.Module, batches: list[Batch], names: list[str],
                     loss: Loss = summed_loss, keep_on: torch.device | str | None = None
                     ) -> Iterator[Factors]:
    """The factors of kfac_factors, one block at a time, last block first: of a 7B model 2 GB
    instead of 70, if the caller pops and drops them before it asks for the next block's."""
    for sums in block_by_block(model, batches, names, kfac_hooks, loss, keep_on):
        yield sums.factors()


# ---------------------------------------------------- section 3.2: Fisher importance

def quadratic_form(dW: Tensor, Sigma_h: Tensor, Sigma_delta: Tensor) -> Tensor:
    """Eq. 6 and 27-29: Q(ΔW) = vec(ΔW)ᵀ (Σ_h ⊗ Σ_δ) vec(ΔW) = Tr(Σ_δ ΔW Σ_h ΔWᵀ).

    dW (m, n); the loss rises by about Q/2 (Eq. 3, 26). The Kronecker product is never formed.
    """
    return ((Sigma_delta @ dW) * (dW @ Sigma_h)).sum()


def fisher_importance(W: Tensor, Sigma_h: Tensor, Sigma_delta: Tensor) -> float:
    """Eq. 8: I = Tr(Σ_δ W Σ_h Wᵀ) / (m n), from Eq. 7's perturbation ΔW = s W.

    W (m, n) in any dtype, computed in that of the factors; never below 0.
    """
    value = quadratic_form(W.to(Sigma_h.dtype), Sigma_h, Sigma_delta).item() / W.numel()
    return 0.0 if value < 0 else value  # not max(): NaN stays NaN

# --------------------------------------------------- section 3.2: inverse rank allocation

def inverse_importance(I: dict[str, float]) -> dict[str, float]:  # noqa: E741
    """Eq. 9: ω_i = 1 / (I_i + ε), with I first divided by its sum over the shallow layers.

    A raw I is often below 1e-10, where an absolute ε would make all ranks equal. All I zero: all ω
    equal. ValueError for I < 0, NaN or infinite.
    """
    for name, value in I.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"importance of {name} is {value}; it must be finite and >= 0")
    total = sum(I.values())
    return {n: 1.0 / ((value / total if total else 1.0) + EPSILON) for n, value in I.items()}


def rank_budget(r_avg: float, layers: int) -> float:
    """Eq. 10: R_total = r_avg · |E|."""
    return r_avg * layers


def raw_ranks(I: dict[str, float], r_avg: float) -> dict[str, float]:  # noqa: E741
    """Eq. 11: r_i^raw = R_total ω_i / Σ_j ω_j; they add up to R_total."""
    omega = inverse_importance(I)
    share = rank_budget(r_avg, len(I)) / sum(omega.values()) if I else 0.0
    return {name: share * w for name, w in omega.items()}


def clip_rank(r_raw: float, r_min: int, r_max: int) -> int:
    """Eq. 12: r = clip(round(r^raw), r_min, r_max), halves to even."""
    return min(max(round(r_raw), r_min), r_max)


def allocate_ranks(I: dict[str, float], r_avg: float, r_min: int,  # noqa: E741
                   r_max: int) -> dict[str, int]:
    """Eq. 9-12: ranks of the shallow layers, small where the Fisher importance I is large.

    As in the paper, what clipping takes or adds is not made up for. Raises ValueError unless
    1 <= r_min <= r_avg <= r_max. Official code differs: it lowers r_avg to r_max silently.
    """
    if not 1 <= r_min <= r_avg <= r_max:
        raise ValueError(f"not 1 <= r_min <= r_avg <= r_max: r_min {r_min}, r_avg {r_avg}, "
                         f"r_max {r_max}")
    return {n: clip_rank(r, r_min, r_max) for n, r in raw_ranks(I, r_avg).items()}

# ------------------------------------------ section 3.3: task-aware singular directions

def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 13 and 30: W = U diag(S) Vh with k = min(m, n): U (m, k), S (k,) falling, Vh (k, n).

    In fp32 at least: bf16 has no SVD, and its 8 bits would mix up the lowest directions.
    """
    return torch.linalg.svd(at_least_fp32(W), full_matrices=False)


def lam_gam(U: Tensor, Vh: Tensor, Sigma_h: Tensor, Sigma_delta: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 14 and 31: λ_i = v_iᵀ Σ_h v_i and γ_i = u_iᵀ Σ_δ u_i, both (k,) and >= 0."""
    lam = ((Vh @ Sigma_h.to(Vh.dtype)) * Vh).sum(dim=1)
    gam = ((Sigma_delta.to(U.dtype) @ U) * U).sum(dim=0)
    return lam.clamp(min=0), gam.clamp(min=0)  # rounding can leave a zero a little below 0


def direction_scores(S: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    """Eq. 15 and 35: s_i = σ_i² λ_i γ_i, (k,), in fp64, where the product cannot underflow."""
    return S.double() ** 2 * lam.double() * gam.double()


def direction_order(s: Tensor) -> Tensor:
    """The permutation π with s_π(1) >= ... >= s_π(k); equal scores stay in the order of σ."""
    return torch.sort(s, descending=True, stable=True).indices


def select_directions(order: Tensor, r: int, lowest: bool) -> Tensor:
    """Eq. 16 / 17: the first r of the order in a deep layer, the last r in a shallow one.

    Official code differs: r < 128 decides, so that at R = 32 deep layers get the lowest, too.
    """
    return order[len(order) - r :] if lowest else order[:r]


def adapter_from_directions(U: Tensor, S: Tensor, Vh: Tensor, index: Tensor,
                            scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Eq. 16-17: A = √(Σ'/scaling) V'ᵀ (r, n) and B = U' √(Σ'/scaling) (m, r) for `index` (r,).

    scaling · B A is then exactly Σ σ_i u_i v_iᵀ over `index`. (The paper's √Σ'_[:, :R] is the R x R
    block; its V'ᵀ_[:, :R] is (V'_[:, :R])ᵀ.) Official code differs: no division by scaling, while
    peft multiplies by α/r, so that the residual keeps (1 - α/r) σ: -1.56 σ at r = 50, α = 128.
    """
    root = (S[index] / scaling).sqrt()
    return root[:, None] * Vh[index], U[:, index] * root

# --------------------------------------------------------------- the method, on a model

@dataclass(frozen=True)
class Budget:
    """Which rank a layer gets: blocks 0 .. shallow-1 share Eq. 10's budget, all others get R."""
    shallow: int  # so many blocks; the |E| of Eq. 10 are all their layers
    R: int
    r_avg: float
    r_min: int
    r_max: int
    end: str = "depth"  # which directions: by depth (Eq. 16, 17), or "low" or "high" everywhere

    def __post_init__(self) -> None:
        allocate_ranks({}, self.r_avg, self.r_min, self.r_max)
        if self.R < 1 or self.end not in ("depth", "low", "high"):
            raise ValueError(f"R must be >= 1, and end depth, low or high: {self.R}, {self.end}")

    def is_shallow(self, name: str) -> bool:
        return block_index(name) < self.shallow

    def lowest(self, name: str) -> bool:
        """Whether a layer starts from its lowest-scoring directions (Eq. 17), not the highest."""
        return {"depth": self.is_shallow(name), "low": True, "high": False}[self.end]

    def most(self, name: str) -> int:
        """The largest rank that a layer can get."""
        return self.r_max if self.is_shallow(name) else self.R


@dataclass
class Measurement:
    """A layer's importance, its scored directions, and as many candidates as its rank can need."""

    importance: float | None  # I, Eq. 8; None in deep layers, whose rank does not depend on it
    sigma: Tensor  # (min(m, n),): σ of all directions, falling
    s: Tensor  # (min(m, n),): their scores, Eq. 15
    index: Tensor  # (k,): the candidates among them, falling in score
    U: Tensor  # (m, k), of the candidates
    S: Tensor  # (k,)
    Vh: Tensor  # (k, n)


@dataclass
class Adapter:
    """The start of one layer's adapter; W_res is W - scaling · B A."""

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    scaling: float
    shallow: bool
    importance: float | None  # I, Eq. 8; None in deep layers
    r_raw: float | None  # Eq. 11; None in deep layers
    index: Tensor  # (r,): which of W's singular directions it holds


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers that stand in numbered blocks."""
    return [name for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and re.search(IN_BLOCK, name)]


@torch.no_grad()
def measure_layer(name: str, W: Tensor, Sigma_h: Tensor, Sigma_delta: Tensor, budget: Budget
                  ) -> Measurement:
    """Eq. 8 and 13-15 for one layer W (m, n). Its candidates go to the CPU.

    A shallow layer's rank is known only once all shallow layers have been measured; until then a
    layer keeps as many directions as it can possibly need, from the end that it will use.
    """
    if not all(x.isfinite().all() for x in (W, Sigma_h, Sigma_delta)):
        raise ValueError(f"{name}: its weight, an activation or a gradient is not finite")
    U, S, Vh = svd(W)
    s = direction_scores(S, *lam_gam(U, Vh, Sigma_h, Sigma_delta))
    importance = fisher_importance(W, Sigma_h, Sigma_delta) if budget.is_shallow(name) else None
    index = select_directions(direction_order(s), min(budget.most(name), len(s)),
                              budget.lowest(name))
    return Measurement(importance, S.cpu(), s.cpu(), index.cpu(),
                       U[:, index].cpu(), S[index].cpu(), Vh[index].cpu())


def measure(model: nn.Module, batches: list[Batch], names: list[str], budget: Budget,
            loss: Loss = summed_loss, keep_on: torch.device | str | None = None
            ) -> dict[str, Measurement]:
    """First step: the importance and the candidate directions of every named layer.

    The model stays as it is. Raises ValueError for weights, activations or gradients that are not
    finite, and if there is no calibration token.
    """
    for name in names:
        if not isinstance(model.get_submodule(name), nn.Linear):
            raise ValueError(f"{name} is no nn.Linear: it has an adapter; merge() it first")
    weights, found = {name: model.get_parameter(f"{name}.weight") for name in names}, {}
    for factors in factors_by_block(model, batches, names, loss, keep_on):
        for name in list(factors):
            found[name] = measure_layer(name, weights[name], *factors.pop(name), budget)
    return {name: found[name] for name in names}


def build_adapters(measured: dict[str, Measurement], budget: Budget, scaling: float = 1.0
                   ) -> dict[str, Adapter]:
    """Second step, with the same budget: ranks by Eq. 9-12, adapters by Eq. 16-17."""
    I = {n: x.importance for n, x in measured.items() if x.importance is not None}  # noqa: E741
    r_raw = raw_ranks(I, budget.r_avg)
    ranks = allocate_ranks(I, budget.r_avg, budget.r_min, budget.r_max)
    adapters = {}
    for name, x in measured.items():
        r = min(ranks.get(name, budget.R), len(x.S))
        chosen = select_directions(torch.arange(len(x.S)), r, budget.lowest(name))
        A, B = adapter_from_directions(x.U, x.S, x.Vh, chosen, scaling)
        adapters[name] = Adapter(A, B, scaling, name in ranks, x.importance, r_raw.get(name),
                                 x.index[chosen])
    return adapters


def initialise(model: nn.Module, batches: list[Batch], budget: Budget,
               names: list[str] | None = None, scaling: float = 1.0, loss: Loss = summed_loss
               ) -> dict[str, Adapter]:
    """Both steps: {layer: its Adapter}; names None: all linear layers of the blocks. The model is
    not changed: whoever attaches an adapter subtracts scaling · B A from W."""
    names = linear_layers(model) if names is None else names
    return build_adapters(measure(model, batches, names, budget, loss), budget, scaling)

# ------------------------------------------------- section 4.1: what is kept and what is learnt

def mean_ratio(scores: dict[str, float], reference: dict[str, float]) -> float:
    """Mean over the benchmarks of score / reference, NaN where a reference is 0. Raises ValueError
    unless both have the same benchmarks."""
    if not scores or scores.keys() != reference.keys():
        raise ValueError(f"scores of {sorted(scores)} cannot be compared with scores of "
                         f"{sorted(reference)}")
    ratios = [scores[b] / reference[b] if reference[b] else math.nan for b in scores]
    return sum(ratios) / len(ratios)


def knowledge_score(after: dict[str, float], before: dict[str, float]) -> float:
    """Eq. 36: K = mean over the world-knowledge benchmarks of score after / before fine-tuning."""
    return mean_ratio(after, before)


def task_score(tuned: dict[str, float], full: dict[str, float]) -> float:
    """Eq. 37: T = mean over the task benchmarks of score / score of full fine-tuning."""
    return mean_ratio(tuned, full)


def harmonic_mean(K: float, T: float) -> float:
    """Eq. 38: KT = 2 K T / (K + T); 0 if both are 0, NaN if either is undefined."""
    return 0.0 if K == T == 0 else 2 * K * T / (K + T)
