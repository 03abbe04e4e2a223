"""The methods that the paper compares FARSS with, each a short function beside its formula.

    lora         A random, B = 0                                         W stays
    pissa        the r largest singular directions of W                  W_res = W - s B A
    milora       the r smallest                                          W_res = W - s B A
    corda        directions of W C, C the covariance of the layer's
                 inputs: the r largest (ipm) or smallest (kpm)           W_res = W - s B A
    lora_null    W where the inputs hardly go: W N Nᵀ, N the r smallest
                 eigenvectors of C                                       W_res = W - W N Nᵀ
    kasa         A random, B = 0, and a diagonal d between them          W_res = W without its r
                                                                         smallest directions

Tensors in, tensors out. Each takes W (m, n), a rank r <= min(m, n) and the scaling s = α/R, and
returns a Start, whose s B A is what the method says whatever s is; FARSS's own is farss.py. The
table METHODS is what a run can be told to do: a new method is a row there and at most one function.

    covariance_sweep    C of every layer of a model, block by block, without gradients
    kasa_penalty        what KaSA adds to the loss
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from farss import (
    Reduce,
    adapter_from_directions,
    add_outer,
    mirror,
    names_by_block,
    quiet,
    select_directions,
    svd,
)
from model import LoRALinear, Start, at_least_fp32, evaluating

# ----------------------------------------------------------------- starts that need W alone


def lora(W: Tensor, r: int, generator: torch.Generator | None = None) -> Start:
    """LoRA (Hu et al., 2022), as its code and peft do it: A ~ U(-1/√n, 1/√n), B = 0.

    That is kaiming_uniform with a = √5; the LoRA paper itself says Gaussian. B = 0 leaves both
    the weight and the model's output exactly as they were.
    """
    m, n = W.shape
    A = torch.empty(r, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
    return Start(A, torch.zeros(m, r))


def split(A: Tensor, B: Tensor) -> Start:
    """An adapter that is taken out of W, so that W_res + s B A = W."""
    return Start(A, B, A, B)


def from_end(U: Tensor, S: Tensor, Vh: Tensor, r: int, lowest: bool, scaling: float) -> Start:
    """The r lowest or highest directions of a decomposition whose S falls, taken out of W."""
    index = select_directions(torch.arange(len(S)), r, lowest)
    return split(*adapter_from_directions(U, S, Vh, index, scaling))


def pissa(W: Tensor, r: int, scaling: float = 1.0) -> Start:
    """PiSSA (Meng et al., 2024): A = √(Σ/s) Vᵀ, B = U √(Σ/s) of the r largest directions of W.

    Official code differs: it asks for dropout 0, and usually takes a randomised SVD
    (pissa_niter_16); here the exact one.
    """
    return from_end(*svd(W), r, False, scaling)


def milora(W: Tensor, r: int, scaling: float = 1.0) -> Start:
    """MiLoRA (Wang et al., 2024): the same of the r smallest directions of W.

    Official code differs: it sets α = r, whatever was asked for.
    """
    return from_end(*svd(W), r, True, scaling)


def kasa(W: Tensor, r: int, scaling: float = 1.0, generator: torch.Generator | None = None
         ) -> Start:
    """KaSA (Wang et al., 2025): ΔW = s B diag(d) A beside W without its r smallest directions.

    A as LoRA's, B = 0, d ~ N(0, 1), all three train; what is taken out of W is not given back, so
    the model is another one from the first step on.

    Official code differs: it keeps n - r directions instead of min(m, n) - r, and so drops none
    where m <= n - r, as in Llama-2's down_proj. Here as in the paper and in peft.
    """
    small = milora(W, r, scaling)
    A, B, *_ = lora(W, r, generator)
    return Start(A, B, small.A0, small.B0, torch.empty(r).normal_(generator=generator))


def kasa_penalty(model: nn.Module, beta: float, gamma: float) -> Tensor:
    """KaSA's part of the loss: the mean over layers of β Σ d² + γ (‖BᵀB - I‖ + ‖A Aᵀ - I‖).

    Official code differs: its Gram matrices are AᵀA and B Bᵀ, whose distance² from I is the same
    but for the constants n - r and m - r, so that γ acts more weakly. Its mean over the layers,
    for which its β and γ were chosen, is kept; peft takes the sum.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    total = torch.zeros((), device=layers[0].A.device)
    for layer in layers:
        assert layer.d is not None, "KaSA's layers have a diagonal"
        eye = torch.eye(len(layer.d), device=layer.d.device)
        grams = layer.B.T @ layer.B, layer.A @ layer.A.T
        total = total + beta * layer.d.pow(2).sum() + gamma * sum(
            torch.linalg.matrix_norm(gram - eye) for gram in grams)
    return total / len(layers)


# ------------------------------------------------- starts that need the covariance of the inputs

DAMPING, DAMPING_ERROR = 0.01, 0.05  # CorDA's


def damped(C: Tensor) -> tuple[Tensor, Tensor]:
    """CorDA's invertible C' = C + d mean(diag C) I, and its inverse.

    d begins at 0.01 and doubles until ‖C' C'⁻¹ - I‖ < 0.05. In fp32, as the official code, where
    it may double for wide layers; in fp64 it hardly would.
    """
    d, eye = DAMPING, torch.eye(len(C), dtype=C.dtype, device=C.device)
    while True:
        C1 = C + d * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(C1)
        if torch.linalg.matrix_norm(C1 @ inverse - eye) < DAMPING_ERROR:
            return C1, inverse
        d *= 2


def corda(W: Tensor, r: int, C: Tensor, lowest: bool, scaling: float = 1.0) -> Start:
    """CorDA (Yang et al., 2024): W C' = U Σ Vᵀ, A = √(Σ/s) Vᵀ C'⁻¹ and B = U √(Σ/s) of the r
    lowest directions (knowledge-preserved, KPM) or the r highest (instruction-previewed, IPM).

    C (n, n) as from covariance_sweep, whose scale does not change B A, but decides how much of it
    is in A and how much in B.
    """
    C1, inverse = damped(at_least_fp32(C))
    U, S, Vh = svd(at_least_fp32(W) @ C1)
    return from_end(U, S, Vh @ inverse, r, lowest, scaling)


def lora_null(W: Tensor, r: int, C: Tensor, scaling: float = 1.0) -> Start:
    """LoRA-Null (Tang et al., 2025): W N Nᵀ = U Σ Vᵀ, A = √(Σ/s) Vᵀ and B = U √(Σ/s).

    N (n, r) are the eigenvectors of C with the r smallest eigenvalues: directions in which the
    inputs behind C hardly go. As C has squared X's condition number, they are computed in fp64.
    Version 1 trains A and B, version 2 only B.

    Official code differs: C is summed in fp16, where such directions drown. It has no scaling.
    """
    N = torch.linalg.eigh(C.double()).eigenvectors[:, :r].to(at_least_fp32(W).dtype)
    U, S, Vh = svd(at_least_fp32(W) @ N)  # so that W N Nᵀ = U Σ (Vᵀ Nᵀ), without an n x n product
    return from_end(U, S, Vh @ N.T, r, False, scaling)


# ------------------------------------------------------------ the covariance of a layer's inputs


@dataclass
class CovarianceSums:
    """Sums behind C while `input_hooks` is open; layers that read the same tensor share theirs."""

    sums: dict[str, Tensor] = field(default_factory=dict)  # Σ xᵀx by layer
    shared: set[str] = field(default_factory=set)  # layers whose sum is that of another
    mask: Tensor = field(default_factory=lambda: torch.zeros(0))  # (b, t) bool: real tokens
    seen: tuple[Tensor, str] | None = None  # the last input, and the first layer that read it

    def start(self, attention_mask: Tensor) -> None:
        """Announce the next batch: only positions where the mask is 1 will be counted."""
        self.mask, self.seen = attention_mask.bool(), None

    def add(self, name: str, x: Tensor) -> None:
        """x (b, t, n) of one layer and batch."""
        if self.seen is not None and self.seen[0] is x:
            self.sums[name] = self.sums[self.seen[1]]
            self.shared.add(name)
            return
        self.seen = x, name
        for tokens, real in zip(x.detach(), self.mask, strict=True):
            rows = at_least_fp32(tokens[real])
            rows = rows / rows.max().abs()  # |max x| and not max |x|, as the official code
            add_outer(self.sums, name, rows)


@contextmanager
def input_hooks(model: nn.Module, names: Iterable[str]) -> Iterator[CovarianceSums]:
    """Record the inputs of the named layers during forward passes."""
    found = CovarianceSums()
    handles = []
    try:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: found.add(name, args[0])))
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def covariance_sweep(model: Any, batches: list[dict[str, Tensor]], names: Iterable[str],
                     progress: Callable[..., Iterable] = quiet, reduce: Reduce = lambda x: x
                     ) -> Iterator[dict[str, Tensor]]:
    """C (n, n) of every named layer, one block after the other, in the memory of one block.

    CorDA's and LoRA-Null's own: C = (1/N) Σ over the N sequences of xᵀx, x (tokens, n) a
    sequence's inputs divided by |max x|, in fp32. Every real token counts, prompt and BOS too. A
    forward pass only, block by block: all batches through one block, then through the next. Yields
    {name: C} of each block that has named layers; layers that share an input share C. ValueError
    for one that is not finite, as where a sequence's largest input is 0. `reduce` sums over
    processes, where each has a part of the batches.

    Official code differs: it divides by 256, whatever the number of sequences.
    """
    by_block = names_by_block(names)
    sequences = int(reduce(torch.tensor(sum(len(batch["input_ids"]) for batch in batches))))
    entered = [model.enter(batch) for batch in batches]
    inputs, contexts = [x for x, _ in entered], [context for _, context in entered]
    with evaluating(model):
        for i in progress(range(max(by_block, default=-1) + 1), desc="covariance by block"):
            with input_hooks(model, by_block.get(i, [])) as found:
                for b, batch in enumerate(batches):
                    found.start(batch["attention_mask"])
                    inputs[b] = model.blocks[i](inputs[b], *contexts[b])
            own = {name: C for name, C in found.sums.items() if name not in found.shared}
            for name, C in own.items():
                mirror(reduce(C))
                C /= sequences
                if not C.isfinite().all():  # damping would never end
                    raise ValueError(f"the covariance of {name}'s inputs is not finite")
            if found.sums:
                yield found.sums


# ------------------------------------------------------------------------------- the methods


class Given(NamedTuple):
    """What a start may need besides W and r."""

    scaling: float
    generator: torch.Generator  # on the CPU
    C: Tensor | None = None  # for methods that need the covariance


@dataclass(frozen=True)
class Method:
    """What a method needs before training, where it starts, what it trains, with which ranks."""

    about: str  # for --help
    start: Callable[[Tensor, int, Any], Start] | None = None  # (W, r, Given); FARSS has its own
    needs: str = "nothing"  # nothing; covariance: C of every layer; fisher: Σ_h and Σ_δ
    splits: bool = True  # the adapter starts as a part of W, which is taken out of it
    adaptive: bool = False  # ranks: of Eq. 9-12 in the shallow blocks; else R everywhere
    end: str = "depth"  # of FARSS's order: by depth (Eq. 16, 17); low or high everywhere
    trains: str = "adapters"  # or weights: every weight, without adapters
    frozen: tuple[str, ...] = ()  # of A and B: what does not train
    diagonal: bool = False  # whether a d (r,) trains between B and A
    penalty: Callable[[nn.Module, float, float], Tensor] | None = None  # (model, β, γ): to the loss

    def per_rank(self, m: int, n: int) -> int:
        """Trainable numbers of a layer (m, n) for each of its ranks."""
        return n * ("A" not in self.frozen) + m * ("B" not in self.frozen) + self.diagonal


METHODS = {
    "farss": Method("the paper's method", needs="fisher", adaptive=True),
    "farss-init": Method("its initialisation only: rank R and the lowest-scoring directions "
                         "everywhere", needs="fisher", end="low"),
    "farss-top": Method("the same with the highest-scoring (Fig. 3)", needs="fisher", end="high"),
    "all-high": Method("FARSS with the highest-scoring directions in shallow blocks, too (Table 6)",
                       needs="fisher", adaptive=True, end="high"),
    "lora": Method("A random, B zero", lambda W, r, x: lora(W, r, x.generator), splits=False),
    "pissa": Method("the largest singular directions", lambda W, r, x: pissa(W, r, x.scaling)),
    "milora": Method("the smallest", lambda W, r, x: milora(W, r, x.scaling)),
    "corda-kpm": Method("CorDA, knowledge-preserved",
                        lambda W, r, x: corda(W, r, x.C, True, x.scaling), needs="covariance"),
    "corda-ipm": Method("CorDA, instruction-previewed",
                        lambda W, r, x: corda(W, r, x.C, False, x.scaling), needs="covariance"),
    "lora-null": Method("LoRA-Null, version 1", lambda W, r, x: lora_null(W, r, x.C, x.scaling),
                        needs="covariance"),
    "lora-null-v2": Method("version 2, with A frozen",
                           lambda W, r, x: lora_null(W, r, x.C, x.scaling), needs="covariance",
                           frozen=("A",)),
    "kasa": Method("A, B and a diagonal beside W without its smallest directions",
                   lambda W, r, x: kasa(W, r, x.scaling, x.generator), splits=False,
                   diagonal=True, penalty=kasa_penalty),
    "full": Method("fine-tuning of every weight", trains="weights", splits=False),
}
