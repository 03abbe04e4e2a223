"""FARSS: Fisher-optimised adaptive low rank and singular-vector selection, in the paper's order.

    for every linear layer W (m x n) in the decoder blocks, from a few task examples:
      Σ_h = E[h hᵀ]                 inputs of the layer, (n, n)                        Eq. 2, 24
      Σ_δ = E[δ δᵀ]                 gradients at its output, (m, m)                    Eq. 2, 24
      I   = Tr(Σ_δ W Σ_h Wᵀ) / mn   loss increase when W is scaled a little            Eq. 8
      W   = U Σ Vᵀ                                                                     Eq. 13
      s_i = σ_i² λ_i γ_i            λ_i = v_iᵀ Σ_h v_i,  γ_i = u_iᵀ Σ_δ u_i            Eq. 14-15
    shallow blocks:  r ∝ 1/I, clipped to [r_min, r_max];  the r lowest-scoring directions
                                                                                       Eq. 9-12, 17
    deep blocks:     r = R;                               the R highest-scoring        Eq. 16
      B = U' √(Σ'/scaling),  A = √(Σ'/scaling) V'ᵀ,       W_res = W - scaling · B A
    so that at the start of training                      W_res + scaling · B A == W

Glossary (name, symbol, equation)
    h, delta                 h, δ        input of a layer; loss gradient at its output      18, 19
    Sigma_h, Sigma_delta     Σ_h, Σ_δ    Kronecker factors of the Fisher                    2, 24
    U, S, Vh                 U, σ, Vᵀ    singular value decomposition of W                  13
    lam, gam                 λ, γ        Σ_h and Σ_δ along the singular directions          14, 31
    s                        s           score of a direction                               15, 35
    I                        I           Fisher importance of a layer                       8
    omega, r_raw, r          ω, r^raw, r inverse importance; rank before and after clipping 9-12
    R                        R           rank of the deep layers                            16
    shallow, deep            E, D        blocks below and from the boundary on              3.1
    scaling                  α/R         one constant for all layers of a run               A.2.1

Tensors in, tensors out: no files, flags, devices or printing here.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

EPSILON = 1e-12  # Eq. 9, relative to the sum of the importances
Batch = dict[str, Tensor]  # input_ids, attention_mask, labels, each (b, t)

# ------------------------------------------------ section 3.2: Kronecker factors of the Fisher


@dataclass
class FactorSums:
    """Running sums behind Σ_h and Σ_δ while `kfac_hooks` is open.

    Layers that read the same tensor (q, k, v; gate, up) share one Σ_h: `owner` names the layer
    that holds it. Read only; divide by `tokens` through `factors()`.
    """

    hh: dict[str, Tensor] = field(default_factory=dict)  # Σ_t h hᵀ   (n, n), by owner
    dd: dict[str, Tensor] = field(default_factory=dict)  # Σ_t δ δᵀ   (m, m), by layer
    first: dict[str, Tensor] = field(default_factory=dict)  # Σ ‖h‖² of first tokens, by owner
    owner: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    mask: Tensor | None = None  # (b, t) bool, the current batch's real tokens
    seen: tuple[Tensor, str] | None = None  # the last input and its owner

    def start(self, attention_mask: Tensor) -> None:
        """Announce the next batch: only positions where the mask is 1 will be counted."""
        self.mask, self.seen = attention_mask.bool(), None
        self.tokens += int(self.mask.sum())

    def add_input(self, name: str, h: Tensor) -> None:
        if self.seen is not None and self.seen[0] is h:
            self.owner[name] = self.seen[1]
            return
        self.seen, self.owner[name] = (h, name), name
        real = accumulator_dtype(h.detach()[self.mask])  # (tokens, n)
        add_outer(self.hh, name, real)
        start = self.mask.int().argmax(dim=1)  # first real token of each sequence
        first = h.detach()[torch.arange(len(h), device=h.device), start]
        self.first[name] = self.first.get(name, 0) + accumulator_dtype(first).pow(2).sum()

    def add_gradient(self, name: str, delta: Tensor) -> None:
        add_outer(self.dd, name, accumulator_dtype(delta[self.mask]))

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (Σ_h, Σ_δ)}, each sum divided by the number of real tokens."""
        mean_hh = {owner: hh / self.tokens for owner, hh in self.hh.items()}
        return {n: (mean_hh[self.owner[n]], self.dd[n] / self.tokens) for n in self.dd}

    def first_token_share(self) -> dict[str, float]:
        """Part of Tr Σ_h that stands at the first token (BOS), which can be most of it."""
        share = {n: (self.first[n] / hh.trace()).item() for n, hh in self.hh.items()}
        return {n: share[owner] for n, owner in self.owner.items()}


def accumulator_dtype(x: Tensor) -> Tensor:
    """fp32, or fp64 where it already is: sums of bf16 products would stop growing."""
    return x if x.dtype == torch.float64 else x.float()


def add_outer(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """sums[name] += Σ_t x_t x_tᵀ for rows (tokens, width)."""
    if name not in sums:
        sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
    sums[name].addmm_(rows.T, rows)


@contextmanager
def kfac_hooks(model: nn.Module, names: Iterable[str]) -> Iterator[FactorSums]:
    """Record h and δ of the named linear layers during forward and backward passes.

    All parameters are frozen meanwhile, so a backward pass computes no weight gradient, and the
    forward pass keeps no graph below the first named layer: that layer's output is made the
    leaf at which the graph begins. Hooks, requires_grad and train mode are always restored.
    """
    sums = FactorSums()
    wanted_grad = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # Returns None: a hook's value would replace the layer's output.
            sums.add_input(name, args[0])
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(lambda delta: sums.add_gradient(name, delta))

        return hook

    try:
        model.requires_grad_(False).eval()  # no dropout in the statistics
        for name in names:
            handles.append(model.get_submodule(name).register_forward_hook(watch(name)))
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in wanted_grad:
            parameter.requires_grad_(wanted)
        for module, training in modes:
            module.training = training


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Summed negative log-likelihood of a batch's labelled tokens, a scalar."""
    return model.loss(**batch)[0]


def collect(sums: FactorSums, model: nn.Module, batches: Iterable[Batch],
            loss: Callable[[nn.Module, Batch], Tensor] = summed_loss) -> None:
    """Run the forward and backward passes that the hooks of `kfac_hooks` listen to."""
    for batch in batches:
        sums.start(batch["attention_mask"])
        with torch.enable_grad():
            loss(model, batch).backward()
    if sums.tokens == 0:
        raise ValueError("no calibration token: the batches are empty or fully padded")
    sums.mask = sums.seen = None


def kfac_factors(model: nn.Module, batches: Iterable[Batch], names: Iterable[str],
                 loss: Callable[[nn.Module, Batch], Tensor] = summed_loss,
                 ) -> dict[str, tuple[Tensor, Tensor]]:
    """Eq. 2 and 24: F ≈ Σ_h ⊗ Σ_δ for every named layer.

    Σ_h (n, n) = (1/N) Σ_t h_t h_tᵀ and Σ_δ (m, m) = (1/N) Σ_t δ_t δ_tᵀ over the N real tokens of
    all batches, in fp32 (fp64 for an fp64 model). δ_t is the gradient of its own sequence's
    summed response loss, undivided, so the factors do not depend on how examples fall into
    batches. Prompt and BOS tokens count; padding, known by attention_mask and not by its id,
    does not. Labels are the data's: this is the *empirical* Fisher of Eq. 5, not the one under
    the model's own labels (see sampled_loss). Layers that share an input share Σ_h: never write
    into it. Raises ValueError when there is no token.

    Official code differs: δ of the batch-mean loss, padding counted, at most 16 sequences.
    """
    with kfac_hooks(model, names) as sums:
        collect(sums, model, batches, loss)
        return sums.factors()


def sampled_loss(generator: torch.Generator | None = None
                 ) -> Callable[[nn.Module, Batch], Tensor]:
    """Eq. 5 as written: a loss whose labels are drawn from the model, one draw per token.

    Its δ gives the Fisher under the model's own distribution, given the data's prefixes.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        hidden, _ = model.labelled(batch["input_ids"], batch["labels"])
        logits = accumulator_dtype(model.lm_head(hidden))
        p = logits.detach().softmax(-1)
        drawn = torch.multinomial(p, 1, generator=generator).squeeze(1)
        return nn.functional.cross_entropy(logits, drawn, reduction="sum")

    return loss


def quadratic_form(dW: Tensor, Sigma_h: Tensor, Sigma_delta: Tensor) -> Tensor:
    """Eq. 6 (twice) and 29: Q(ΔW) = vec(ΔW)ᵀ (Σ_h ⊗ Σ_δ) vec(ΔW) = Tr(Σ_δ ΔW Σ_h ΔWᵀ).

    dW (m, n); the loss rises by about Q/2 (Eq. 3). The Kronecker product is never formed.
    """
    return ((Sigma_delta @ dW) * (dW @ Sigma_h)).sum()


def fisher_importance(W: Tensor, Sigma_h: Tensor, Sigma_delta: Tensor) -> float:
    """Eq. 8: I = Tr(Σ_δ W Σ_h Wᵀ) / (m n), from Eq. 7's perturbation ΔW = s W.

    W (m, n), in any dtype; computed in the dtype of the factors. I >= 0, since both factors are
    positive semi-definite; a little less than 0 by rounding is 0.
    """
    m, n = W.shape
    value = quadratic_form(W.to(Sigma_h.dtype), Sigma_h, Sigma_delta).item() / (m * n)
    return 0.0 if value < 0 else value


# --------------------------------------------------- section 3.2: inverse rank allocation


def inverse_importance(I: dict[str, float]) -> dict[str, float]:  # noqa: E741
    """Eq. 9: ω_i = 1 / (I_i + ε), with I first divided by its sum over the shallow layers.

    A raw I is often below 1e-10, where an absolute ε would level all ranks; divided by the sum
    the ranks depend on ratios only. All I zero: all ω equal. ValueError for I < 0, NaN or inf.
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

    Literally the paper's: what clipping takes from the budget is not given back, so the ranks
    add up to less (or more) than r_avg · |E|. Raises ValueError unless 1 <= r_min <= r_avg <=
    r_max. Official code differs: an r_avg above r_max is lowered to r_max without a word.
    """
    if not 1 <= r_min <= r_avg <= r_max:
        raise ValueError(f"ranks need 1 <= r_min <= r_avg <= r_max, not r_min {r_min}, "
                         f"r_avg {r_avg}, r_max {r_max}")
    return {n: clip_rank(r, r_min, r_max) for n, r in raw_ranks(I, r_avg).items()}


# ------------------------------------------ section 3.3: task-aware singular directions


def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 13: W = U diag(S) Vh with k = min(m, n): U (m, k), S (k,) falling, Vh (k, n).

    In fp32 at least: bf16 has no SVD, and its 8 bits would mix the lowest directions.
    """
    return torch.linalg.svd(accumulator_dtype(W), full_matrices=False)


def lam_gam(U: Tensor, Vh: Tensor, Sigma_h: Tensor, Sigma_delta: Tensor
            ) -> tuple[Tensor, Tensor]:
    """Eq. 14 and 31: λ_i = v_iᵀ Σ_h v_i and γ_i = u_iᵀ Σ_δ u_i, both (k,) and >= 0.

    Rounding can leave a null direction of Σ a little below zero; it is set to 0.
    """
    lam = ((Vh @ Sigma_h.to(Vh.dtype)) * Vh).sum(dim=1)
    gam = ((Sigma_delta.to(U.dtype) @ U) * U).sum(dim=0)
    return lam.clamp(min=0), gam.clamp(min=0)


def direction_scores(S: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    """Eq. 15 and 35: s_i = σ_i² λ_i γ_i, (k,), in fp64, where the product cannot underflow."""
    return S.double() ** 2 * lam.double() * gam.double()


def direction_order(s: Tensor) -> Tensor:
    """The permutation π with s_π(1) >= ... >= s_π(k); equal scores stay in the order of σ."""
    return torch.sort(s, descending=True, stable=True).indices


def select_directions(order: Tensor, r: int, shallow: bool) -> Tensor:
    """Eq. 16 / 17: the first r of the order in a deep layer, the last r in a shallow one.

    Official code differs: the end is chosen by r < 128, so that at R = 32 deep layers get the
    lowest directions too.
    """
    return order[len(order) - r :] if shallow else order[:r]


def adapter_from_directions(U: Tensor, S: Tensor, Vh: Tensor, index: Tensor,
                            scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Eq. 16-17: A = √(Σ'/scaling) V'ᵀ (r, n) and B = U' √(Σ'/scaling) (m, r) for `index` (r,).

    scaling · B A is then exactly Σ_{i in index} σ_i u_i v_iᵀ. (The paper's √Σ'_[:, :R] means the
    R x R block, and its V'ᵀ_[:, :R] means (V'_[:, :R])ᵀ.)

    Official code differs: no division by scaling, while peft multiplies by α/r, so the residual
    keeps (1 - α/r) σ of each direction: -1.56 σ at r = 50, α = 128.
    """
    root = (S[index] / scaling).sqrt()
    return root[:, None] * Vh[index], U[:, index] * root


# --------------------------------------------------------------- the method, on a model


@dataclass
class Layer:
    """What FARSS decided for one linear layer."""

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    shallow: bool
    importance: float  # Eq. 8
    r_raw: float | None  # Eq. 11; None in deep layers
    first_token_share: float  # part of Tr Σ_h at the first token

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def block_index(name: str) -> int:
    """Depth of a layer by its name: 3 for model.layers.3.mlp.up_proj. ValueError if it has none."""
    found = re.search(r"(?:^|\.)layers?\.(\d+)\.", name)
    if not found:
        raise ValueError(f"{name} does not stand in a numbered block")
    return int(found[1])


def factor_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Upper bound on the fp32 bytes of all factors of the named layers (no sharing of Σ_h)."""
    shapes = [model.get_submodule(name).weight.shape for name in names]
    return sum(4 * (m * m + n * n) for m, n in shapes)


def group_blocks(model: nn.Module, names: list[str], memory: float) -> list[list[str]]:
    """Consecutive blocks whose factors fit into `memory` bytes together; at least one block."""
    groups: list[list[str]] = []
    used = 0
    for block in sorted({block_index(n) for n in names}):
        members = [n for n in names if block_index(n) == block]
        size = factor_bytes(model, members)
        if groups and used + size <= memory:
            groups[-1] += members
            used += size
        else:
            groups.append(members)
            used = size
    return groups


def quiet(items: Iterable, **_) -> Iterable:
    """The progress bar that shows nothing."""
    return items


@torch.no_grad()
def initialise(model: nn.Module, batches: list[Batch], names: list[str], *, shallow: int, R: int,
               r_avg: float, r_min: int, r_max: int, scaling: float = 1.0,
               loss: Callable[[nn.Module, Batch], Tensor] = summed_loss,
               memory: float = float("inf"), progress: Callable[..., Iterable] = quiet,
               ) -> dict[str, Layer]:
    """FARSS (section 3): the adapters of the named layers; the model is left as it was.

    Layers in blocks 0 .. shallow-1 get the ranks of Eq. 12 and their lowest-scoring directions,
    all others rank R and their highest; a rank is at most min(m, n). Factors exist for one
    group of blocks at a time, as many as fit into `memory` bytes, at the price of one more pass
    over the batches per group. `progress` wraps each loop as tqdm does. Adapters are returned on
    the CPU in fp32 (fp64 for an fp64 model). Raises ValueError for impossible ranks and for
    factors that are not finite.
    """
    allocate_ranks({}, r_avg, r_min, r_max)  # refuse impossible ranks before any work
    if R < 1:
        raise ValueError(f"R must be at least 1, not {R}")
    parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # the candidates' U, S, Vh, in order
    importance: dict[str, float] = {}
    first_share: dict[str, float] = {}
    groups = group_blocks(model, names, memory)
    for i, group in enumerate(groups):
        of = f" {i + 1}/{len(groups)}" if len(groups) > 1 else ""
        with kfac_hooks(model, group) as sums:
            collect(sums, model, progress(batches, desc=f"K-FAC factors{of}"), loss)
            factors, share = sums.factors(), sums.first_token_share()
        for name in progress(group, desc=f"SVD and scores{of}"):
            W, (Sigma_h, Sigma_delta) = model.get_submodule(name).weight, factors.pop(name)
            importance[name] = fisher_importance(W, Sigma_h, Sigma_delta)
            if not math.isfinite(importance[name]):
                raise ValueError(f"importance of {name} is {importance[name]}: the weight, an "
                                 "activation or a gradient is not finite")
            U, S, Vh = svd(W)
            s = direction_scores(S, *lam_gam(U, Vh, Sigma_h, Sigma_delta))
            is_shallow = block_index(name) < shallow
            limit = min(r_max if is_shallow else R, len(S))
            index = select_directions(direction_order(s), limit, is_shallow)
            parts[name] = U[:, index].cpu(), S[index].cpu(), Vh[index].cpu()
            first_share[name] = share[name]

    shallow_I = {n: importance[n] for n in names if block_index(n) < shallow}
    r_raw, ranks = raw_ranks(shallow_I, r_avg), allocate_ranks(shallow_I, r_avg, r_min, r_max)
    layers = {}
    for name in names:
        U, S, Vh = parts.pop(name)
        is_shallow = name in ranks
        r = min(ranks.get(name, R), len(S))
        index = select_directions(torch.arange(len(S)), r, is_shallow)
        A, B = adapter_from_directions(U, S, Vh, index, scaling)
        layers[name] = Layer(A, B, is_shallow, importance[name], r_raw.get(name),
                             first_share[name])
    return layers
