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

On a model: `measure` sweeps through the blocks and leaves of each layer its importance and its
candidate directions; `build_adapters` then decides the ranks and cuts the adapters. The plain way
to the same is `kfac_factors` and `measure_layer`: Eq. 2, 8 and 13-15 as they are written. `sweep`
needs the memory of one block, and `measure` forms no factor either: it decomposes each W first and
looks at the tokens along its directions (`Along`).

Tensors in, tensors out: no files, flags or printing here.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model import at_least_fp32, evaluating

EPSILON = 1e-12  # Eq. 9, relative to the sum of the importances
STRIPE = 1024  # rows of a symmetric sum that are added to at once
SMALL = 1024  # below so many singular values torch's own SVD is as fast as any detour
EXACT = 1 / 32  # of σ_1: down to there one Gram matrix gives directions as exact as an SVD's
Batch = dict[str, Tensor]  # input_ids, attention_mask, labels, each (b, t), padded on the right
Factors = dict[str, tuple[Tensor, Tensor]]  # layer: (Σ_h, Σ_δ), or F and B of Along
Loss = Callable[[Any, Batch], Tensor]  # of a model and a batch; a scalar
Reduce = Callable[[Tensor], Tensor]  # a sum over batches, made that of all processes

# ------------------------------------------------ section 3.2: Kronecker factors of the Fisher


class Along(NamedTuple):
    """What is wanted of a layer W (m, n) in place of its factors: F and B, the second moments of
    what each token brings forward and backward, in the basis X (k, k) of W's smaller side.

        m >= n, X = V:    F = E[x xᵀ] of x = Vᵀ h,          B of Vᵀ Wᵀ δ = Σ Uᵀ δ
        m <  n, X = U:    F of Uᵀ W h = Σ Vᵀ h,             B of Uᵀ δ

    Either way s_i = F_ii B_ii (Eq. 15) and I = Tr(F B) / mn (Eq. 8): nothing is wider than k. The
    W h or Wᵀ δ of the model's own pass serves, unless it is rounded to fewer bits than fp32, in
    which the lowest directions would drown; then W X stands in (look_along).

    None in place of both matrices: the moments are summed in the basis in which they come, (k, k),
    and `measure` turns them into X's once, at the end.
    """

    forward: Tensor | None  # what h, or W h at the output, is multiplied by from the right
    backward: Tensor | None  # what δ, or Wᵀ δ at the input, is
    at: str  # input: h and Wᵀ δ; output: W h and δ; both: h and δ
    squares: bool  # only the diagonals of F and B are wanted


@dataclass
class FactorSums:
    """Running sums behind Σ_h and Σ_δ while `kfac_hooks` is open, or F and B of layers in `along`.

    Layers that read the same tensor (q, k, v; gate, up) share one Σ_h: `owner` names the layer
    that holds it. `factors()`, once at the end, makes means of the sums.
    """

    along: dict[str, Along] = field(default_factory=dict)
    forward: dict[str, Tensor] = field(default_factory=dict)  # Σ_t h hᵀ (n, n) or F, by owner
    backward: dict[str, Tensor] = field(default_factory=dict)  # Σ_t δ δᵀ (m, m) or B, by layer;
    # F and B are their diagonals, or add_moment's stripes, or whole where they are not in X's basis
    norm: dict[str, Tensor] = field(default_factory=dict)  # Σ ‖h‖², by owner
    first: dict[str, Tensor] = field(default_factory=dict)  # the same of first tokens
    owner: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    mask: Tensor = field(default_factory=lambda: torch.zeros(0))  # (b, t) bool: real tokens
    seen: tuple[Tensor, str] | None = None  # the last input and its owner

    def start(self, attention_mask: Tensor) -> None:
        """Announce the next batch: only positions where the mask is 1 will be counted."""
        self.mask, self.seen = attention_mask.bool(), None
        self.tokens += int(self.mask.sum())

    def add_input(self, name: str, h: Tensor, Wh: Tensor | None = None) -> None:
        """Eq. 18: h (b, t, n), what the layer multiplies by W; Wh (b, t, m) of those in `along`
        that are looked at there."""
        X = self.along[name].forward if name in self.along else None
        shares = X is None and Wh is None  # the sum of h itself
        if shares and self.seen is not None and self.seen[0].is_set_to(h):
            self.owner[name] = self.seen[1]
            return
        self.owner[name] = name
        if shares:
            self.seen = h, name
        h = h.detach()
        rows = h[self.mask]  # (tokens, n)
        real = at_least_fp32(rows)
        start = self.mask.int().argmax(dim=1)  # first real token of each sequence
        first = h[torch.arange(len(h), device=h.device), start]
        self.first[name] = self.first.get(name, 0) + at_least_fp32(first).pow(2).sum()
        self.norm[name] = self.norm.get(name, 0) + real.flatten().dot(real.flatten())
        self.add(self.forward, name, rows if Wh is None else Wh.detach()[self.mask], X)

    def add_gradient(self, name: str, delta: Tensor) -> None:
        """Eq. 19: δ = ∂L/∂y (b, t, m), the gradient at the layer's output; or Wᵀ δ (b, t, n)."""
        X = self.along[name].backward if name in self.along else None
        self.add(self.backward, name, delta[self.mask], X)

    def add(self, sums: dict[str, Tensor], name: str, rows: Tensor, X: Tensor | None) -> None:
        """The moments of rows (tokens, width): whole, or what is wanted of those of rows X."""
        if X is None:
            add_outer(sums, name, rows)
        else:
            add_moment(sums, name, at_least_fp32(rows) @ X, self.along[name].squares)

    def reduce(self, total: Reduce) -> None:
        """Make each sum that over all processes, each of which has seen other batches."""
        for sums in (self.forward, self.backward, self.norm, self.first):
            for name, each in sums.items():
                sums[name] = total(each)
        self.tokens = int(total(torch.tensor(self.tokens)))

    def factors(self) -> Factors:
        """{name: (Σ_h, Σ_δ) or, of a layer in `along`, (F, B)}: the sums divided, in place, by the
        number of real tokens.

        Raises ValueError when there was none.
        """
        if self.tokens == 0:
            raise ValueError("no calibration token: the batches are empty or fully padded")
        for total in (*self.forward.values(), *self.backward.values()):
            total /= self.tokens  # in place: a second copy would double the memory
            if total.ndim == 2:
                mirror(total)
        self.tokens = 1  # they are means now, and stay so in a second call
        return {n: (self.forward[self.owner[n]], self.backward[n]) for n in self.backward}

    def first_token_share(self) -> dict[str, float]:
        """Part of Tr Σ_h that stands at the first token (BOS), which can be most of it."""
        share = {n: (self.first[n] / total).item() for n, total in self.norm.items()}
        return {n: share[owner] for n, owner in self.owner.items()}


def add_outer(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """sums[name] += Σ_t x_t x_tᵀ for rows (tokens, width), right of its diagonal not yet: mirror.

    In stripes of STRIPE rows that end at the diagonal, as the sum is symmetric; in wide layers
    nearly half of the products are saved. The sum is fp32 where rows are of fewer bits; these are
    multiplied as fast as the device can multiply bf16.
    """
    width, wide = rows.shape[1], at_least_fp32(rows)
    if name not in sums:
        sums[name] = wide.new_zeros(width, width)
    with short_factors(rows.dtype):
        add_to_stripes([sums[name][i:j, :j] for i, j in stripes(width)], wide)


@contextmanager
def short_factors(dtype: torch.dtype) -> Iterator[None]:
    """Within, fp32 products may go through units that read bf16 or TF32 and sum in fp32 (tensor
    cores, AMX) if the numbers were bf16 before: these lose nothing there."""
    if dtype != torch.bfloat16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # TF32 on CUDA, bf16 on a CPU that has it
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_to_stripes(total: list[Tensor], rows: Tensor) -> None:
    """The products themselves; stripe (j - i, j) of rows i to j - 1."""
    for stripe, (i, j) in zip(total, stripes(rows.shape[1]), strict=True):
        stripe.addmm_(rows[:, i:j].T, rows[:, :j])


def stripes(width: int) -> list[tuple[int, int]]:
    """(i, j): rows i to j - 1, of which the columns up to j are summed."""
    return [(i, min(i + STRIPE, width)) for i in range(0, width, STRIPE)]


def size_of_stripes(width: int) -> int:
    """Numbers in all of them."""
    return sum((j - i) * j for i, j in stripes(width))


def mirror(total: Tensor) -> None:
    """Copy what stands left of the stripes of add_outer to the right of the diagonal, in place."""
    for i, j in stripes(len(total)):
        total[:i, i:j] = total[i:j, :i].T


def add_moment(sums: dict[str, Tensor], name: str, rows: Tensor, squares: bool) -> None:
    """add_outer, of which the diagonal alone is kept, or the stripes alone, one behind the other;
    uses up `rows`."""
    width = rows.shape[1]
    if squares:
        sums[name] = sums.get(name, 0) + rows.pow_(2).sum(dim=0)
        return
    if name not in sums:
        sums[name] = rows.new_zeros(size_of_stripes(width))
    add_to_stripes(as_stripes(sums[name], width), rows)


def as_stripes(total: Tensor, width: int) -> list[Tensor]:
    """Views (j - i, j) of the stripes that add_moment kept."""
    parts = total.split([(j - i) * j for i, j in stripes(width)])
    return [part.view(-1, j) for part, (_, j) in zip(parts, stripes(width), strict=True)]


def trace_and_diagonals(F: Tensor, B: Tensor, width: int) -> tuple[float, Tensor, Tensor]:
    """Tr(F B) and the diagonals (width,) of symmetric F and B that add_moment kept."""
    trace, diagonals = 0.0, []
    for f, b in zip(as_stripes(F, width), as_stripes(B, width), strict=True):
        f_square, b_square = f[:, -len(f) :], b[:, -len(b) :]  # on the diagonal; the rest is also
        trace += 2 * (f * b).sum().item() - (f_square * b_square).sum().item()  # right of it
        diagonals.append((f_square.diagonal(), b_square.diagonal()))
    f_all, b_all = (torch.cat(parts) for parts in zip(*diagonals, strict=True))
    return trace, f_all, b_all


@contextmanager
def kfac_hooks(model: nn.Module, names: Iterable[str],
               along: dict[str, Along] | None = None) -> Iterator[FactorSums]:
    """Record h and δ of the named linear layers during forward and backward passes, of those in
    `along` what Along says.

    All parameters are frozen meanwhile, so a backward pass computes no weight gradient, and the
    forward pass keeps no graph below the first named layer: that layer's output is made the
    leaf at which the graph begins. Hooks, requires_grad and train mode are always restored.
    """
    sums = FactorSums(along or {})
    wanted_grad = [(p, p.requires_grad) for p in model.parameters()]
    handles = []

    def watch(name: str, layer: nn.Module) -> None:
        at = sums.along[name].at if name in sums.along else "both"

        def listen(x: Tensor) -> None:
            if not x.requires_grad:
                x.requires_grad_()
            x.register_hook(lambda gradient: sums.add_gradient(name, gradient))

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].view_as(args[0])  # so that its gradient is this layer's Wᵀ δ alone
            listen(x)
            return (x,)

        def after(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            # Returns None: a hook's value would replace the layer's output.
            Wh = None
            if at == "output":
                Wh = output if module.bias is None else output - module.bias
            sums.add_input(name, args[0], Wh)
            if at != "input":
                listen(output)

        if at == "input":
            handles.append(layer.register_forward_pre_hook(before))
        handles.append(layer.register_forward_hook(after))

    try:
        model.requires_grad_(False)
        for name in names:
            watch(name, model.get_submodule(name))
        with evaluating(model):  # no dropout in the statistics
            yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in wanted_grad:
            parameter.requires_grad_(wanted)
        sums.mask, sums.seen = torch.zeros(0), None


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Summed negative log-likelihood of a batch's labelled tokens, a scalar.

    A batch may hold `hidden` besides, the output of the last block, from which to go on.
    """
    return model.loss(**batch)[0]


def batch_mean_loss(model: Any, batch: Batch) -> Tensor:
    """The official code's: the mean over a batch's labelled tokens, a scalar.

    Its δ weigh a batch by the inverse square of those tokens, so that Σ_δ depends on how examples
    fall into batches.
    """
    total, labelled = model.loss(**batch)
    return total / labelled


def collect(sums: FactorSums, model: nn.Module, batches: Iterable[Batch],
            loss: Loss = summed_loss) -> None:
    """Run the forward and backward passes that the hooks of `kfac_hooks` listen to."""
    for batch in batches:
        sums.start(batch["attention_mask"])
        with torch.enable_grad():
            loss(model, batch).backward()


def kfac_factors(model: nn.Module, batches: Iterable[Batch], names: Iterable[str],
                 loss: Loss = summed_loss) -> Factors:
    """Eq. 2, 24 and 25: F ≈ Σ_h ⊗ Σ_δ for every named layer.

    Σ_h (n, n) = (1/N) Σ_t h_t h_tᵀ and Σ_δ (m, m) = (1/N) Σ_t δ_t δ_tᵀ over the N real tokens of
    all batches, in fp32 (fp64 for an fp64 model). δ_t is the gradient of its own sequence's
    summed response loss, undivided, so the factors do not depend on how examples fall into
    batches. Prompt and BOS tokens count; padding, known by attention_mask and not by its id,
    does not. Labels are the data's: this is the *empirical* Fisher of Eq. 5, not the one under
    the model's own labels (see sampled_loss). Layers that share an input share Σ_h: never write
    into it. Raises ValueError when there is no token.

    Official code differs: δ of the mean loss over batches of two (batch_mean_loss), padding
    counted, at most 16 sequences.
    """
    with kfac_hooks(model, names) as sums:
        collect(sums, model, batches, loss)
        return sums.factors()


def sampled_loss(generator: torch.Generator | None = None) -> Loss:
    """Eq. 5 as written: a loss whose labels are drawn from the model, one draw per token.

    Its δ gives the Fisher under the model's own distribution, given the data's prefixes.
    """

    def loss(model: Any, batch: Batch) -> Tensor:
        predicting, _ = model.labelled(**batch)
        with torch.no_grad():
            drawn = model.draw(predicting, generator)
        return model.nll(predicting, drawn)

    return loss


# --------------------------------------- the same factors, one block at a time


def block_index(name: str) -> int:
    """Depth of a layer by its name: 3 for model.layers.3.mlp.up_proj. ValueError if it has none."""
    found = re.search(r"(?:^|\.)layers?\.(\d+)\.", name)
    if not found:
        raise ValueError(f"{name} does not stand in a numbered block")
    return int(found[1])


def names_by_block(names: Iterable[str]) -> dict[int, list[str]]:
    """The names of layers by their block; ValueError for one that stands in none."""
    by_block: dict[int, list[str]] = {}
    for name in names:
        by_block.setdefault(block_index(name), []).append(name)
    return by_block


def quiet(items: Iterable, **_: Any) -> Iterable:
    """The progress bar that shows nothing."""
    return items


def sweep(model: Any, batches: list[Batch], names: Iterable[str], loss: Loss = summed_loss,
          keep_on: torch.device | str | None = None, progress: Callable[..., Iterable] = quiet,
          along: Callable[[list[str]], dict[str, Along]] = lambda names: {},
          reduce: Reduce = lambda x: x) -> Iterator[tuple[Factors, dict[str, float]]]:
    """kfac_factors block by block, from the last to the first, in the memory of one block.

    As activation checkpointing does it: a forward pass without a graph keeps what goes into each
    block, on the device `keep_on` (None: where it is). Then each block in turn, for all batches,
    runs alone from its kept input and backward from the gradient that the block above handed
    down. Two forward passes (the last block: one) and one backward in all, whatever the number of
    blocks. `along`, asked of a block's layers before it runs, says of which of them what is wanted
    in place of their factors. `reduce` sums over processes, where each has a part of the batches;
    they must want the same.

    Yields for each block ({name: (Σ_h, Σ_δ) or (F, B)}, {name: share of the first tokens in
    Tr Σ_h}); what the caller pops from the first dict and drops is freed before the next block
    begins. Between two blocks the model is as it was. `model` offers `enter`, `blocks` and
    `loss(..., hidden=)` (see model.CausalLM). Raises ValueError when there is no token or a name
    stands in no block.
    """
    by_block = names_by_block(names)
    if max(by_block, default=0) >= len(model.blocks):
        raise ValueError(f"{by_block[max(by_block)][0]}: the model has {len(model.blocks)} blocks")
    lowest = min(by_block, default=len(model.blocks))
    inputs, contexts = block_inputs(model, progress(batches, desc="forward"), lowest, keep_on)
    gradients: list[Any] = [None] * len(batches)
    for i in progress(range(len(model.blocks) - 1, lowest - 1, -1), desc="K-FAC by block"):
        # Not kept in a name here: that would hold the factors while the next block runs.
        yield run_block(model, i, by_block.get(i, []), batches, contexts, inputs.pop(), gradients,
                        loss, i == lowest, keep_on, along, reduce)


@torch.no_grad()
def block_inputs(model: Any, batches: Iterable[Batch], lowest: int,
                 keep_on: torch.device | str | None
                 ) -> tuple[list[list[Tensor]], list[tuple]]:
    """What goes into each block from `lowest` on, [block - lowest][batch], and the contexts."""
    inputs: list[list[Tensor]] = [[] for _ in model.blocks[lowest:]]
    contexts = []
    with evaluating(model):
        for batch in batches:
            x, context = model.enter(batch)
            contexts.append(context)
            for i in range(len(model.blocks)):
                if i > 0:  # so that the last block, whose output nobody needs, does not run
                    x = model.blocks[i - 1](x, *context)
                if i >= lowest:
                    inputs[i - lowest].append(x if keep_on is None else x.to(keep_on))
    return inputs, contexts


def run_block(model: Any, i: int, names: list[str], batches: list[Batch], contexts: list[tuple],
              inputs: list[Tensor], gradients: list[Any], loss: Loss, lowest: bool,
              keep_on: torch.device | str | None, along: Callable[[list[str]], dict[str, Along]],
              reduce: Reduce) -> tuple[Factors, dict[str, float]]:
    """Block i forward and backward on all batches, with hooks on its named layers: what sweep
    yields.

    Uses up `inputs`. `gradients` [batch] holds those at the block's output (but for the last
    block, whose come from the loss) and is left with those at its input, which nobody needs below
    the lowest block.
    """
    last = i == len(model.blocks) - 1
    with kfac_hooks(model, names, along(names)) as sums:
        for b, batch in enumerate(batches):
            sums.start(batch["attention_mask"])
            device = batch["input_ids"].device
            x = inputs.pop(0).to(device).detach().requires_grad_(not lowest)
            with torch.enable_grad():
                y = model.blocks[i](x, *contexts[b])
                if last:
                    loss(model, batch | {"hidden": y}).backward()
                else:
                    y.backward(gradients[b].to(device))
            below = x.grad
            gradients[b] = below if below is None or keep_on is None else below.to(keep_on)
    sums.reduce(reduce)
    return sums.factors(), sums.first_token_share()


# ---------------------------------------------------- section 3.2: Fisher importance


def quadratic_form(dW: Tensor, Sigma_h: Tensor, Sigma_delta: Tensor) -> Tensor:
    """Eq. 6 (twice) and 27-29: Q(ΔW) = vec(ΔW)ᵀ (Σ_h ⊗ Σ_δ) vec(ΔW) = Tr(Σ_δ ΔW Σ_h ΔWᵀ).

    dW (m, n); the loss rises by about Q/2 (Eq. 3, 26). The Kronecker product is never formed.
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
    """Eq. 13 and 30: W = U diag(S) Vh with k = min(m, n): U (m, k), S (k,) falling, Vh (k, n).

    In fp32 at least: bf16 has no SVD, and its 8 bits would mix the lowest directions. A large W
    goes by way of smaller_side; u_i = W v_i / σ_i is then exact to σ_1 / σ_i units of rounding.
    """
    W = at_least_fp32(W)
    if min(W.shape) < SMALL:
        return torch.linalg.svd(W, full_matrices=False)
    S, X = smaller_side(W)
    return both_sides(W, S, X, across(W, X, S))


def both_sides(W: Tensor, S: Tensor, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of directions of W, from X on its smaller side and Y on the other."""
    return (Y, S, X.T) if W.shape[0] >= W.shape[1] else (X, S, Y.T)


def smaller_side(W: Tensor) -> tuple[Tensor, Tensor]:
    """σ (k,), falling, and the singular vectors X (k, k) of W's smaller side, V where m >= n, in
    half the time of an SVD or less.

    From the Gram matrix WᵀW = V Σ² Vᵀ. Its rounding, ε σ_1², is ε σ_1² / σ_i to direction i: to
    those with σ_i >= σ_1 / 32 no more than an SVD's own. The rest, W on the complement of these,
    whose σ_1 is smaller, goes the same way again, and a small rest to torch's SVD; so does, with a
    warning, a W whose Gram matrix torch cannot decompose.
    """
    m, n = W.shape
    if m < n:
        return smaller_side(W.T)
    if n < SMALL:
        _, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return S, Vh.T
    gram: dict[str, Tensor] = {}
    add_outer(gram, "", W)
    try:
        square, V = torch.linalg.eigh(gram.pop(""))  # reads left of the diagonal alone
    except torch.linalg.LinAlgError:
        warnings.warn(f"eigh did not converge on the Gram matrix of a {m} x {n} matrix: its SVD is "
                      "taken instead, which takes longer", stacklevel=2)
        _, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return S, Vh.T
    S, V = square.clamp(min=0).sqrt().flip(0), V.flip(1)
    top = int((S / S[0] >= EXACT).sum()) if S[0] > 0 else n
    if top == n:
        return S, V
    low = V[:, top:].contiguous()
    S_low, X_low = smaller_side(W @ low)
    return torch.cat([S[:top], S_low]), torch.cat([V[:, :top], low @ X_low], dim=1)


def across(W: Tensor, X: Tensor, S: Tensor) -> Tensor:
    """The other side (max(m, n), r) of directions X (k, r) of the smaller side: u_i = W v_i / σ_i,
    or v_i = Wᵀ u_i / σ_i; 0 where σ_i is."""
    W = at_least_fp32(W)
    Y = (W if W.shape[0] >= W.shape[1] else W.T) @ X
    return Y / torch.where(S > 0, S, 1)


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


# Which end of the order a layer takes, lowest or not, from its depth and its rank.
ENDS: dict[str, Callable[[bool, int], bool]] = {
    "depth": lambda shallow, r: shallow,  # Eq. 16 and 17
    "low": lambda shallow, r: True,
    "high": lambda shallow, r: False,
    "rank": lambda shallow, r: r < 128,  # the official code's
}


@dataclass(frozen=True)
class Budget:
    """Which rank a layer gets: blocks 0 .. shallow-1 share Eq. 10's budget, all others get R.

    Raises ValueError for ranks that cannot be.
    """

    shallow: int  # |E|, in blocks
    R: int
    r_avg: float
    r_min: int
    r_max: int
    end: str = "depth"  # of ENDS

    def __post_init__(self) -> None:
        allocate_ranks({}, self.r_avg, self.r_min, self.r_max)
        if self.R < 1:
            raise ValueError(f"R must be at least 1, not {self.R}")

    def is_shallow(self, name: str) -> bool:
        return block_index(name) < self.shallow

    def lowest(self, name: str) -> bool:
        """Whether a layer starts from its lowest-scoring directions (Eq. 17), not the highest."""
        return ENDS[self.end](self.is_shallow(name), self.most(name))

    def most(self, name: str) -> int:
        """The largest rank that the layer can get."""
        return self.r_max if self.is_shallow(name) else self.R


@dataclass
class Measurement:
    """What the sweep leaves of one linear layer W (m, n): k candidates, falling in score."""

    importance: float | None  # I, Eq. 8; None in deep layers, whose rank does not depend on it
    U: Tensor  # (m, k)
    S: Tensor  # (k,)
    Vh: Tensor  # (k, n)
    first_token_share: float  # part of Tr Σ_h at the first token
    sigma: Tensor  # σ of all min(m, n) directions, falling
    s: Tensor  # and their scores, fp64; the lowest not exact where tokens are summed first
    index: Tensor  # (k,): which of them the candidates are


@dataclass
class Adapter:
    """What FARSS decided for one linear layer."""

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    shallow: bool
    importance: float | None  # I, Eq. 8; None in deep layers
    r_raw: float | None  # Eq. 11; None in deep layers
    first_token_share: float
    spectrum: Tensor  # (3, min(m, n)): σ falling, s, and 1 where the direction was taken; fp32

    @property
    def rank(self) -> int:
        return self.A.shape[0]


class Directions(NamedTuple):
    """Eq. 13 of a layer W (m, n): of a large one its smaller side alone."""

    S: Tensor  # (k,), falling
    X: Tensor  # (k, k), V where m >= n, else U
    Y: Tensor | None = None  # (max(m, n), k), the other side; None: across(W, X, S), where needed

    @classmethod
    def of(cls, W: Tensor) -> "Directions":
        if min(W.shape) >= SMALL:
            return cls(*smaller_side(at_least_fp32(W)))
        return cls.from_svd(*svd(W))

    @classmethod
    def from_svd(cls, U: Tensor, S: Tensor, Vh: Tensor) -> "Directions":
        return cls(S, Vh.T, U) if len(U) >= Vh.shape[1] else cls(S, U, Vh.T)

    def take(self, W: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, r), S (r,) and Vh (r, n) of the directions `index`."""
        S, X = self.S[index], self.X[:, index]
        return both_sides(W, S, X, across(W, X, S) if self.Y is None else self.Y[:, index])


Each = Callable[[Callable[[Tensor], Directions], list[Tensor]], list[Directions]]


def one_by_one(make: Callable[[Tensor], Directions], weights: list[Tensor]) -> list[Directions]:
    return [make(W) for W in weights]


def look_along(W: Tensor, X: Tensor, squares: bool, summed: bool = False) -> Along:
    """How to look at the tokens of a layer W along the directions X of its smaller side, or
    `summed` first (sums_first)."""
    tall = W.shape[0] >= W.shape[1]
    at = "input" if tall else "output"
    if summed:
        return Along(None, None, at, squares)
    if W.dtype in (torch.float32, torch.float64):
        return Along(X, X, at, squares)
    W = at_least_fp32(W)
    return Along(X, W @ X, "both", squares) if tall else Along(W.T @ X, X, "both", squares)


def sums_first(budget: Budget, name: str, k: int, tokens: int) -> bool:
    """Whether the moments G (k, k) of a layer's tokens are summed and then seen along X (k, k), as
    Xᵀ G X: k²/2 products a token in stripes and k³ at the end, not the k² of each token along X.

    Of a deep layer alone, as it takes its highest directions, which no rounding drowns: not that of
    G, nor that of the model's own W h and Wᵀ δ. The lowest scores of such a layer are not exact.
    Counted are the fp32 products of one layer in one process, whatever can be shared or is fast, so
    that neither the device nor the number of processes changes a result.
    """
    highest = not (budget.is_shallow(name) or budget.lowest(name))
    return highest and tokens * size_of_stripes(k) + k**3 < tokens * k**2


@torch.no_grad()
def measure(model: Any, batches: list[Batch], names: list[str], budget: Budget,
            loss: Loss = summed_loss, keep_on: torch.device | str | None = None,
            progress: Callable[..., Iterable] = quiet, reduce: Reduce = lambda x: x,
            each: Each = one_by_one) -> dict[str, Measurement]:
    """First step: every layer's scored directions and, of a shallow one, its importance.

    Each layer is decomposed before its block runs, and the tokens are seen along its directions;
    of a deep layer only squares are summed, as its rank does not depend on I, and of many tokens
    the moments are seen along them (sums_first). A shallow layer's rank depends on the I of all
    shallow layers, known only after the last of them. Until then a layer keeps as many candidates
    as its rank can possibly need, from the end that its depth decides. The model stays as it is.
    Candidates are on the CPU, in fp32 (fp64 for an fp64 model). Raises ValueError for weights,
    activations or gradients that are not finite and for a layer that has an adapter already.
    `keep_on`, `progress` (which wraps loops as tqdm does) and `reduce` are those of `sweep`; `each`
    has the layers of a block decomposed, by several processes where there are some.
    """
    for name in names:
        if not isinstance(model.get_submodule(name), nn.Linear):
            raise ValueError(f"{name} is no plain nn.Linear: it has an adapter; merge() it first")
    found: dict[str, Measurement] = {}
    decomposed: dict[str, Directions] = {}  # layers of the present block
    tokens = int(reduce(torch.tensor(sum(int(b["attention_mask"].sum()) for b in batches))))
    summed = {n for n in names
              if sums_first(budget, n, min(model.get_submodule(n).weight.shape), tokens)}

    def along(block: list[str]) -> dict[str, Along]:
        weights = {name: model.get_submodule(name).weight for name in block}
        for name, W in weights.items():
            if not W.isfinite().all():
                raise ValueError(f"the weight of {name} is not finite")
        decomposed.update(zip(block, each(Directions.of, list(weights.values())), strict=True))
        return {name: look_along(W, decomposed[name].X, not budget.is_shallow(name),
                                 name in summed) for name, W in weights.items()}

    for moments, share in sweep(model, batches, names, loss, keep_on, progress, along, reduce):
        for name in list(moments):
            W, (F, B) = model.get_submodule(name).weight, moments.pop(name)
            importance = None
            if budget.is_shallow(name):
                trace, F, B = trace_and_diagonals(F, B, min(W.shape))
                importance = trace / W.numel()
            elif name in summed:
                X = decomposed[name].X
                F, B = lam_gam(X, X.T, F, B)
            found[name] = candidates(name, W, decomposed.pop(name), F.double() * B.double(),
                                     budget, share[name], importance)
    return {name: found[name] for name in names}


def measure_layer(name: str, W: Tensor, Sigma_h: Tensor, Sigma_delta: Tensor, budget: Budget,
                  first_token_share: float) -> Measurement:
    """The same for one layer from its factors, as Eq. 8 and 13-15 say it."""
    U, S, Vh = svd(W)
    s = direction_scores(S, *lam_gam(U, Vh, Sigma_h, Sigma_delta))
    return candidates(name, W, Directions.from_svd(U, S, Vh), s, budget, first_token_share,
                      fisher_importance(W, Sigma_h, Sigma_delta))


def candidates(name: str, W: Tensor, directions: Directions, s: Tensor, budget: Budget,
               first_token_share: float, importance: float | None) -> Measurement:
    """The directions by score (Eq. 15-17), as many as the layer's rank can possibly need."""
    if not (s.isfinite().all() and math.isfinite(importance or 0)):
        raise ValueError(f"a score of {name} is not finite: an activation or a gradient is not")
    index = select_directions(direction_order(s), min(budget.most(name), len(s)),
                              budget.lowest(name))
    U, S, Vh = directions.take(W, index)
    return Measurement(importance, U.cpu(), S.cpu(), Vh.cpu(), first_token_share,
                       directions.S.cpu(), s.cpu(), index.cpu())


def build_adapters(measured: dict[str, Measurement], budget: Budget, scaling: float = 1.0
                   ) -> dict[str, Adapter]:
    """Second step: ranks by Eq. 9-12, adapters by Eq. 16-17.

    Layers in the shallow blocks get their lowest-scoring directions, all others their highest, or
    what `budget.end` says; a rank is at most min(m, n).
    """
    shallow = {n: x.importance for n, x in measured.items()
               if budget.is_shallow(n) and x.importance is not None}
    r_raw = raw_ranks(shallow, budget.r_avg)
    ranks = allocate_ranks(shallow, budget.r_avg, budget.r_min, budget.r_max)
    adapters = {}
    for name, x in measured.items():
        r = min(ranks.get(name, budget.R), len(x.S))
        index = select_directions(torch.arange(len(x.S)), r, budget.lowest(name))
        A, B = adapter_from_directions(x.U, x.S, x.Vh, index, scaling)
        taken = torch.zeros_like(x.sigma)
        taken[x.index[index]] = 1
        spectrum = torch.stack([x.sigma.float(), x.s.float(), taken.float()])
        adapters[name] = Adapter(A, B, name in ranks, x.importance, r_raw.get(name),
                                 x.first_token_share, spectrum)
    return adapters
