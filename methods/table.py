"""METHODS, what a run can be told to do: a new method is a row here and at most one function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import farss
from model import Start

from .starts import Svd, corda, kasa, kasa_penalty, lora, lora_null, milora, pissa


class Given(NamedTuple):
    """What a start may need besides W and r."""

    scaling: float
    generator: torch.Generator  # on the CPU
    svd: Svd = farss.svd
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
    "pissa": Method("the largest singular directions",
                    lambda W, r, x: pissa(W, r, x.scaling, x.svd)),
    "milora": Method("the smallest", lambda W, r, x: milora(W, r, x.scaling, x.svd)),
    "corda-kpm": Method("CorDA, knowledge-preserved",
                        lambda W, r, x: corda(W, r, x.C, True, x.scaling, x.svd),
                        needs="covariance"),
    "corda-ipm": Method("CorDA, instruction-previewed",
                        lambda W, r, x: corda(W, r, x.C, False, x.scaling, x.svd),
                        needs="covariance"),
    "lora-null": Method("LoRA-Null, version 1",
                        lambda W, r, x: lora_null(W, r, x.C, x.scaling, x.svd),
                        needs="covariance"),
    "lora-null-v2": Method("version 2, with A frozen",
                           lambda W, r, x: lora_null(W, r, x.C, x.scaling, x.svd),
                           needs="covariance", frozen=("A",)),
    "kasa": Method("A, B and a diagonal beside W without its smallest directions",
                   lambda W, r, x: kasa(W, r, x.scaling, x.generator, x.svd), splits=False,
                   diagonal=True, penalty=kasa_penalty),
    "full": Method("fine-tuning of every weight", trains="weights", splits=False),
}
