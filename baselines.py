"""The initialisations that the paper compares FARSS with: tensors in, tensors out.

Every function returns A (r, n) and B (m, r) for a weight W (m, n), as farss.py does for FARSS.
"""

import torch
from torch import Tensor


def lora(W: Tensor, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """LoRA (Hu et al., 2022), as its code and peft do it: A ~ U(-1/√n, 1/√n), B = 0.

    That is kaiming_uniform with a = √5; the LoRA paper itself says Gaussian. B = 0 leaves both
    the weight and the model's output exactly as they were.
    """
    m, n = W.shape
    A = torch.empty(r, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
    return A, torch.zeros(m, r)
