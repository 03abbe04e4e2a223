"""Matrix products by oneDNN, on a CPU whose BLAS is slower.

torch multiplies fp32 matrices by MKL, which on a CPU that is not Intel's leaves half of the width
of AVX-512 unused: 110 GFLOP/s a core where oneDNN, which torch has too, comes to 220 to 250 (AMD
EPYC, family 26). Sums are taken in another order, so that the last bits differ.

    linear, reordered    one product, and weights in the order that oneDNN's kernels read
    Products             within `with`, all products: of layers, of their gradients, of statistics
    is_faster            whether that pays here
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CPUINFO = Path("/proc/cpuinfo")
ROWS = 8  # fewer are multiplied as fast as the weights are read, whoever does it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, fp32, on a CPU; of x (..., n) and W (m, n), which may be `reordered`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def reordered(weight: Tensor) -> Tensor:
    """W (m, n) in the order of oneDNN's kernels, which spares each product the reordering."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def is_known() -> bool:
    """Whether this torch has oneDNN, and kernels of it for this CPU."""
    return (torch.backends.mkldnn.is_available()
            and "AVX" in torch.backends.cpu.get_cpu_capability())


@cache
def is_faster() -> bool:
    """Whether oneDNN's products are faster than torch's own: where these are MKL's, and the CPU has
    AVX-512 and is not Intel's."""
    maker = re.search(r"^vendor_id\s*: (\w+)", CPUINFO.read_text() if CPUINFO.exists() else "",
                      re.MULTILINE)
    return (is_known() and torch.backends.mkl.is_available() and maker is not None
            and maker[1] != "GenuineIntel"
            and torch.backends.cpu.get_cpu_capability().startswith("AVX512"))


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias of a (t, n) and b (n, m)."""
    weight = b.t()
    if not (weight.is_contiguous() or b.is_contiguous()):
        weight = weight.contiguous()  # else oneDNN takes a loop that is 100 times as slow
    return linear(a, weight, bias)


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether a b is a product for oneDNN: fp32, on the CPU, not a few rows, no tensor of a kind of
    its own."""
    return (a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
            and {type(a), type(b)} <= {Tensor, nn.Parameter} and len(a) >= ROWS)


def mm(a: Tensor, b: Tensor) -> Any:
    return product(a, b) if takes(a, b) else NotImplemented


def addmm(bias: Tensor, a: Tensor, b: Tensor, **scales: float) -> Any:
    """bias + a b of a bias (m,), which is how torch says a linear layer."""
    if scales or bias.ndim != 1 or not takes(a, b):
        return NotImplemented
    return product(a, b, bias)


def add_to(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1, **scales: float) -> Any:
    """total += alpha a b"""
    if scales or not takes(a, b):
        return NotImplemented
    return total.add_(product(a, b), alpha=alpha)


def layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """What torch takes a linear layer for in inference mode, without `mm` or `addmm`."""
    rows = x.reshape(-1, x.shape[-1])
    if not takes(rows, weight.t()):
        return NotImplemented
    return product(rows, weight.t(), bias).view(*x.shape[:-1], len(weight))


aten = torch.ops.aten
INSTEAD: dict[Any, Callable[..., Any]] = {
    aten.mm.default: mm, aten.addmm.default: addmm, aten.addmm_.default: add_to,
    aten.linear.default: layer}


class Products(TorchDispatchMode):
    """Within `with`, products of fp32 matrices on the CPU are oneDNN's, backward passes included,
    as this stands below autograd. Everything else goes its way, for some microseconds more."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's: no. Else every call goes through torch.compile's own module, which takes a
        second and 140 MB to import; compiled layers never get here (model.products)."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        instead = INSTEAD.get(func)
        done = instead(*args, **kwargs) if instead else NotImplemented
        return func(*args, **kwargs) if done is NotImplemented else done
