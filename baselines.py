"""The methods to compare, and the initialisations that the paper compares FARSS with.

Tensors in, tensors out. A start takes a weight W (m, n) and a rank r and returns A (r, n) and
B (m, r); FARSS's own, which needs more than W, is farss.py. A new method is one row of METHODS and
at most one function here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def lora(W: Tensor, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """LoRA (Hu et al., 2022), as its code and peft do it: A ~ U(-1/√n, 1/√n), B = 0.

    That is kaiming_uniform with a = √5; the LoRA paper itself says Gaussian. B = 0 leaves both
    the weight and the model's output exactly as they were.
    """
    m, n = W.shape
    A = torch.empty(r, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
    return A, torch.zeros(m, r)


@dataclass(frozen=True)
class Method:
    """What a method needs before training, what it trains, and with which ranks."""

    about: str  # for --help
    start: Callable[..., tuple[Tensor, Tensor]] | None = None  # (W, r, generator) -> A, B
    needs: str = "nothing"  # to start: nothing; fisher: Σ_h and Σ_δ of every layer
    adaptive: bool = False  # ranks: of Eq. 9-12 in the shallow blocks; else R everywhere
    trains: str = "adapters"  # or weights: every weight, without adapters
    penalty: Callable[[nn.Module], Tensor] | None = None  # added to the loss of every step


METHODS = {
    "farss": Method("the paper's method", needs="fisher", adaptive=True),
    "lora": Method("A random, B zero", lora),
    "full": Method("fine-tuning of every weight", trains="weights"),
}
