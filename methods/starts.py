"""Where the adapters of the other methods start, each a short function beside its formula.

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
returns a Start, whose s B A is what the method says whatever s is. `svd` is farss.svd or another
with its signature.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import farss
from farss import adapter_from_directions, at_least_fp32, select_directions
from model import LoRALinear, Start

Svd = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

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


def pissa(W: Tensor, r: int, scaling: float = 1.0, svd: Svd = farss.svd) -> Start:
    """PiSSA (Meng et al., 2024): A = √(Σ/s) Vᵀ, B = U √(Σ/s) of the r largest directions of W.

    Official code differs: it asks for dropout 0, and usually takes a randomised SVD
    (pissa_niter_16); here the exact one.
    """
    return from_end(*svd(W), r, False, scaling)


def milora(W: Tensor, r: int, scaling: float = 1.0, svd: Svd = farss.svd) -> Start:
    """MiLoRA (Wang et al., 2024): the same of the r smallest directions of W.

    Official code differs: it sets α = r, whatever was asked for.
    """
    return from_end(*svd(W), r, True, scaling)


def kasa(W: Tensor, r: int, scaling: float = 1.0, generator: torch.Generator | None = None,
         svd: Svd = farss.svd) -> Start:
    """KaSA (Wang et al., 2025): ΔW = s B diag(d) A beside W without its r smallest directions.

    A as LoRA's, B = 0, d ~ N(0, 1), all three train. The removed directions are not restored, so
    the model's function changes before the first step.

    Official code differs: it keeps n - r directions instead of min(m, n) - r, and so drops none
    where m <= n - r, as in Llama-2's down_proj. Here as in the paper and in peft.
    """
    small = milora(W, r, scaling, svd)
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


def corda(W: Tensor, r: int, C: Tensor, lowest: bool, scaling: float = 1.0, svd: Svd = farss.svd
          ) -> Start:
    """CorDA (Yang et al., 2024): W C' = U Σ Vᵀ, A = √(Σ/s) Vᵀ C'⁻¹ and B = U √(Σ/s) of the r
    lowest directions (knowledge-preserved, KPM) or the r highest (instruction-previewed, IPM).

    C (n, n) as from covariances, whose scale does not change B A, but decides how much of it is in
    A and how much in B.
    """
    C1, inverse = damped(at_least_fp32(C))
    U, S, Vh = svd(at_least_fp32(W) @ C1)
    return from_end(U, S, Vh @ inverse, r, lowest, scaling)


def lora_null(W: Tensor, r: int, C: Tensor, scaling: float = 1.0, svd: Svd = farss.svd) -> Start:
    """LoRA-Null (Tang et al., 2025): W N Nᵀ = U Σ Vᵀ, A = √(Σ/s) Vᵀ and B = U √(Σ/s).

    N (n, r) are the eigenvectors of C with the r smallest eigenvalues: directions in which the
    inputs behind C hardly go. As C has squared X's condition number, they are computed in fp64.
    Version 1 trains A and B, version 2 only B.

    Official code differs: C is summed in fp16, where such directions drown. It has no scaling.
    """
    N = torch.linalg.eigh(C.double()).eigenvectors[:, :r].to(at_least_fp32(W).dtype)
    U, S, Vh = svd(at_least_fp32(W) @ N)  # so that W N Nᵀ = U Σ (Vᵀ Nᵀ), without an n x n product
    return from_end(U, S, Vh @ N.T, r, False, scaling)
