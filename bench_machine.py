"""What the machine itself can do: parts 0 and 2 of bench_gpu.py.

    ceilings          products of square matrices, copies, and what attention's first call costs
    decompositions    ways to the singular vectors of W's smaller side: seconds and errors
"""

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.decompositions import smaller_side
from measuring import POWER, STD, Job, Measurement, falling, finish, is_cuda, seconds_of

# ------------------------------------------------------------------------------ part 0: ceilings

PRODUCTS = {"bf16": (torch.bfloat16, "highest"), "TF32": (torch.float32, "high"),
            "fp32": (torch.float32, "highest")}
REPEATS = 20


def product(job: Job, dtype: torch.dtype, precision: str) -> dict[str, float]:
    """TFLOP/s of one large product after another."""
    n = job.scale.product
    a, b = (torch.randn(n, n, device=job.device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        c = a @ b
        took = seconds_of(lambda: [torch.mm(a, b, out=c) for _ in range(REPEATS)], job.device)
    finally:
        torch.set_float32_matmul_precision(before)
    return {"TFLOP/s": REPEATS * 2 * n**3 / took / 1e12}


def copy(job: Job, source: str, target: str) -> dict[str, float]:
    """GB/s; within one memory bytes count twice, read and written."""
    size = job.scale.copied if source == target else job.scale.copied // 4
    x = torch.zeros(size, dtype=torch.uint8, device=source)
    y = torch.empty_like(x, device=target)
    y.copy_(x)
    took = seconds_of(lambda: y.copy_(x), job.device)
    return {"GB/s": len(x) * (1 + (source == target)) / took / 1e9}


def queries(job: Job, length: int, decoding: bool) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """q, k and v of Llama-2-7B's heads: of a few prompts, or of the next token of many."""
    config = job.scale.size.config()
    b, t = (job.scale.prompts, 1) if decoding else (8, length)
    shape = b, config.num_attention_heads, length, config.head_dim
    q, k, v = (torch.randn(shape, device=job.device).bfloat16() for _ in range(3))
    mask = torch.ones(b, 1, t, length, dtype=torch.bool, device=job.device)
    return (q[:, :, :t], k, v), {"attn_mask": mask} if decoding else {"is_causal": True}


def first_and_second(job: Job, cudnn: bool, decoding: bool) -> dict[str, float]:
    """Milliseconds of attention's first call at a length, and of the second: medians, and the
    longest first one."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    found: list[tuple[float, float]] = []
    try:
        for length in range(101, 101 + job.scale.lengths):
            (q, k, v), how = queries(job, length, decoding)
            call = partial(F.scaled_dot_product_attention, q, k, v, **how)
            found.append((seconds_of(call, job.device), seconds_of(call, job.device)))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    firsts, seconds = zip(*found[1:], strict=True)  # the first of all loads the kernels
    return {"first ms": 1000 * statistics.median(firsts),
            "second ms": 1000 * statistics.median(seconds), "longest first ms": 1000 * max(firsts)}


def ceilings(job: Job) -> Iterator[Measurement]:
    """Part 0."""
    for name, (dtype, precision) in PRODUCTS.items():
        yield f"{name} product", partial(product, job, dtype, precision)
    yield "copy within the memory", partial(copy, job, job.device, job.device)
    if is_cuda(job.device):
        yield "copy to the CPU", partial(copy, job, job.device, "cpu")
        yield "copy from the CPU", partial(copy, job, "cpu", job.device)
    for decoding in (False, True):
        for cudnn in (False, True):
            yield (f"attention, {'a token' if decoding else 'prompts'}, cuDNN "
                   f"{'on' if cudnn else 'off'}"), partial(first_and_second, job, cudnn, decoding)


# ------------------------------------------------------------------------ part 2: decompositions

Side = tuple[Tensor, Tensor]  # σ, falling, and the singular vectors X (k, k) of the smaller side


def by_eigh(W: Tensor, eigh: Callable[[Tensor], Side] = torch.linalg.eigh) -> Side:
    """From the Gram matrix of W (m, n), m >= n, once."""
    square, X = eigh(W.T @ W)
    return square.clamp(min=0).sqrt().flip(0), X.flip(1)


def by_eigh_fp64(W: Tensor) -> Side:
    return by_eigh(W.double())


def cupy_eigh(gram: Tensor) -> Side:
    """cupy's, which takes another of cuSOLVER's ways."""
    import cupy

    square, X = cupy.linalg.eigh(cupy.from_dlpack(gram))
    cupy.cuda.get_current_stream().synchronize()
    return torch.from_dlpack(square), torch.from_dlpack(X)


def by_cupy(W: Tensor) -> Side:
    return by_eigh(W, cupy_eigh)


def by_svd(W: Tensor, driver: str | None = None) -> Side:
    _, S, Vh = torch.linalg.svd(W, full_matrices=False, driver=driver)
    return S, Vh.T


def on_cpu(W: Tensor) -> Side:
    S, X = smaller_side(W.cpu())
    return S.to(W.device), X.to(W.device)


def errors(W: Tensor, S: Tensor, X: Tensor) -> dict[str, float]:
    """How far X is from orthonormal and WᵀW X from X Σ², relative norms; and the largest relative
    error of a σ_i as the length of W x_i, which tells of the lowest directions. In fp64."""
    W, S, X = W.double(), S.double(), X.double()
    eye = torch.eye(len(S), dtype=X.dtype, device=X.device)
    Y = W @ X
    lengths = Y.norm(dim=0)
    return {"orthogonality": ((X.T @ X - eye).norm() / eye.norm()).item(),
            "residual": ((W.T @ Y - X * S**2).norm() / (S**2).norm()).item(),
            "worst sigma": ((S - lengths).abs() / lengths).max().item()}


def decompose(job: Job, make: Callable[[], Tensor], way: Callable[[Tensor], Side]
              ) -> dict[str, float]:
    """Seconds of a way and its errors, on a matrix (m, n), m >= n."""
    W = make()
    found: list[Side] = []
    took = seconds_of(lambda: found.append(way(W)), job.device)
    return {"seconds": took} | errors(W, *found[0])


def qr(job: Job, make: Callable[[], Tensor]) -> dict[str, float]:
    """Seconds of W = Q R, and how far Q is from orthonormal."""
    W, found = make(), []
    took = seconds_of(lambda: found.append(torch.linalg.qr(W).Q), job.device)
    Q = found[0].double()
    eye = torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)
    return {"seconds": took, "orthogonality": ((Q.T @ Q - eye).norm() / eye.norm()).item()}


def in_streams(job: Job, make: Callable[[], Tensor], count: int) -> dict[str, float]:
    """Seconds of four eigendecompositions, so many at a time, each thread with its own stream."""
    W = make()
    grams = [W.T @ W for _ in range(4)]
    finish(job.device)

    def some(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) if is_cuda(job.device) else nullcontext():
            for gram in grams[first::count]:
                torch.linalg.eigh(gram)

    def all_of_them() -> None:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(some, range(count)))

    return {"seconds": seconds_of(all_of_them, job.device)}


WAYS: dict[str, Callable[[Tensor], Side]] = {
    "smaller side": smaller_side, "eigh": by_eigh, "eigh in fp64": by_eigh_fp64,
    "cupy's eigh": by_cupy}
SVDS: dict[str, str | None] = {f"svd by {name}": name for name in ("gesvdj", "gesvda", "gesvd")}


def make_falling(job: Job, m: int, n: int) -> Tensor:
    return falling(m, n, POWER, job.device)


def make_gaussian(job: Job, m: int, n: int) -> Tensor:
    return STD * torch.randn(m, n, device=job.device)


def decompositions(job: Job) -> Iterator[Measurement]:
    """Part 2, the slowest ways last."""
    torch.linalg.eigh(torch.eye(64, device=job.device))  # loads the library
    named = {f"{kind} {m} x {n}": partial(make, job, m, n)
             for kind, make in (("falling", make_falling), ("Gaussian", make_gaussian))
             for m, n in job.scale.shapes}
    for name, make in named.items():
        for way, function in WAYS.items():
            yield f"{way}, {name}", partial(decompose, job, make, function)
    square, tall = list(named)[:2]
    for name in (square, tall):
        yield f"QR, {name}", partial(qr, job, named[name])
    for count in (1, 2, 4):
        yield f"four eigh, {count} at a time, {square}", partial(in_streams, job, named[square],
                                                               count)
    if is_cuda(job.device):
        yield f"smaller side on the CPU, {square}", partial(decompose, job, named[square], on_cpu)
    for name in (square, tall):
        for way, driver in (SVDS if is_cuda(job.device) else {"svd": None}).items():
            yield f"{way}, {name}", partial(decompose, job, named[name],
                                            partial(by_svd, driver=driver))
