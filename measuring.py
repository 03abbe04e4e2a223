"""What measurements share: sizes, clocks, peak memory, and random models as hard as real ones.

    FULL, TINY       how much a part of bench_gpu.py does: on a GPU, and in a rehearsal on a CPU
    measured         seconds and memory of what runs inside, the device's own work included
    Stopwatch        seconds by part of a call whose functions are timed from outside
    falling          a random matrix whose singular values fall by a power law
    random_model     a random model, made on its device in its dtype, of such matrices

Of weights drawn independently most singular values lie within a small factor of the largest. Those
of trained models fall, and fast.smaller_side decomposes most directions twice: with plain random
weights a start would look faster than it is.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import checkpoint
import data
import model as M
import plan

LINEARS = M.DECODER_TARGETS["seven"]
POWER = 0.5  # σ_i ∝ i^-POWER: of 4096 the last is σ_1 / 64. SmolLM2-135M's layers: 0.17 to 1.16
STD = 0.02  # root mean square of a weight, as Llama's configuration has it


class Size(NamedTuple):
    """Of a random model, what it is calibrated on and R."""

    width: int = 4096
    mlp: int = 11008
    blocks: int = 1
    sequences: int = 16
    rank: int = 128
    like: str = "llama2-7b"  # of checkpoint.MODELS: whose heads, family and, by default, widths
    dtype: str = "float32"  # of the weights
    length: int = 256  # tokens of each sequence
    vocab: int = 512
    device: str = "cpu"
    form: str = "fast"  # of the start: by fast/ or plain

    @classmethod
    def of(cls, like: str, width: int | None, mlp: int | None, **others: Any) -> "Size":
        config = checkpoint.MODELS[like][1]
        return cls(width or config.hidden_size, mlp or config.intermediate_size, like=like,
                   **others)

    def config(self) -> M.Config:
        whole = checkpoint.MODELS[self.like][1]
        if (self.width, self.mlp) == (whole.hidden_size, whole.intermediate_size):
            return replace(whole, vocab_size=self.vocab, num_hidden_layers=self.blocks)
        heads = max(1, self.width // 128)
        return M.Config(self.vocab, self.width, self.mlp, self.blocks, heads, heads,
                        self.width // heads)

    def examples(self) -> list[data.Example]:
        return random_examples(self.vocab, [self.length] * self.sequences)


def random_examples(vocab: int, lengths: list[int]) -> list[data.Example]:
    """So many random tokens each, of which the second half is the response."""
    draw = torch.Generator().manual_seed(0)
    return [data.Example(torch.randint(3, vocab, (n,), generator=draw).tolist(), n // 2)
            for n in lengths]


LLAMA = Size(sequences=256, length=250, rank=128, dtype="bfloat16", vocab=32000)


@dataclass(frozen=True)
class Scale:
    """How much the parts of bench_gpu.py do."""

    product: int = 8192  # width of the square matrices that are multiplied
    copied: int = 2**32  # bytes
    lengths: int = 20  # of sequences that attention has not seen before
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (11008, 4096))  # to be decomposed
    size: Size = LLAMA
    blocks: int = 32
    some_blocks: int = 8
    batch: int = 16  # examples of a training step
    micro_batches: tuple[int, ...] = (8, 16)
    steps: int = 3  # that are timed, after one
    prompts: int = 64
    longest: int = 128  # tokens of the longest of them; the shortest has an eighth
    new: int = 128  # tokens of each continuation
    tests: str = ""  # of tests/test_cuda.py: pytest's -k
    run_steps: int = 200  # of a run on a real model
    answers: int = 50  # that are compared with transformers'
    answer: int = 64  # tokens of each at most
    questions: int = 500


FULL = Scale()
TINY = Scale(product=128, copied=2**20, lengths=3, shapes=((96, 96), (160, 96)),
             size=Size(64, 96, 1, 4, 4, dtype="bfloat16", length=12, vocab=128), blocks=2,
             some_blocks=1, batch=4, micro_batches=(2, 4), steps=1, prompts=4, new=3, longest=8,
             tests="test_moments", run_steps=8, answers=3, answer=4, questions=4)


class Job(NamedTuple):
    """What a part of bench_gpu.py is told."""

    scale: Scale
    device: str
    model: Path | None = None  # folder of a real checkpoint
    data: tuple[Path, ...] = ()  # folders that may hold the questions


Measurement = tuple[str, Callable[[], dict[str, Any]]]  # its name, and what makes its numbers

# ------------------------------------------------------------------------------- time and memory


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def finish(device: str) -> None:
    """Wait for what a GPU was given to do; a CPU has done it."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


@contextmanager
def measured(device: str) -> Iterator[dict[str, float]]:
    """Fills the dict at the end: seconds; bytes, the peak above what was there before; and peak,
    all of it. Of a GPU the peak is that of the tensors made inside; of a CPU that of the process
    so far, as the system counts it."""
    found: dict[str, float] = {}
    finish(device)
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
    before, began = plan.memory_used(device), time.perf_counter()
    yield found
    finish(device)
    found["seconds"] = time.perf_counter() - began
    found["peak"] = plan.memory_used(device)
    found["bytes"] = found["peak"] - before


def in_gb(took: dict[str, float]) -> dict[str, float]:
    """What was `measured`, as a table shows it."""
    return {"seconds": took["seconds"], "peak GB": took["peak"] / 1e9,
            "added GB": took["bytes"] / 1e9}


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Seconds that one call takes."""
    with measured(device) as took:
        work()
    return took["seconds"]


class Stopwatch:
    """Seconds by label of functions that are timed from outside while `watching`.

    On a GPU by events in its stream, so that nothing waits; no timed function may call another.
    """

    def __init__(self, device: str):
        self.on_gpu = is_cuda(device)
        self.marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark(self) -> Any:
        """A moment: a CUDA event, or seconds."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, label: str, function: Callable) -> Callable:
        """The function, whose seconds count for the label."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self.marks[label].append((began, self.mark()))

        return call

    @contextmanager
    def watching(self, table: dict[str, list[tuple[Any, str]]]) -> Iterator[None]:
        """Inside, the functions {label: [(module or class, name), ...]} are timed."""
        before = [(owner, name, vars(owner)[name]) for named in table.values()
                  for owner, name in named]
        try:
            for label, named in table.items():
                for owner, name in named:
                    setattr(owner, name, self.timed(label, getattr(owner, name)))
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def seconds(self) -> dict[str, float]:
        """By label; to be asked when all is done."""
        if not self.on_gpu:
            return {n: sum(end - began for began, end in pairs) for n, pairs in self.marks.items()}
        torch.cuda.synchronize()
        return {n: sum(began.elapsed_time(end) for began, end in pairs) / 1000
                for n, pairs in self.marks.items()}


# ---------------------------------------------------------------------------------- random models


def mixed(W: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """W (m, n) Q of an orthogonal Q (n, n) that is none in particular: twice random signs and the
    discrete Hartley transform, which takes n log n steps a row and no n x n matrix."""
    n = W.shape[1]
    for _ in range(2):
        signs = torch.randint(0, 2, (n,), generator=generator, device=W.device) * 2 - 1
        half = torch.fft.rfft(W * signs)  # the rest of the spectrum is conjugate to it
        rest = (half.real + half.imag)[:, 1 : (n + 1) // 2].flip(1)
        W = torch.cat((half.real - half.imag, rest), dim=1) / n**0.5
    return W


def falling(m: int, n: int, power: float, device: str = "cpu",
            generator: torch.Generator | None = None) -> Tensor:
    """A random W (m, n), fp32, whose singular values fall as i^-power, its root mean square STD."""
    k = min(m, n)
    sigma = torch.arange(1, k + 1, device=device, dtype=torch.float32) ** -power
    W = torch.zeros(m, n, device=device)
    W.diagonal().copy_(sigma * (STD * (m * n) ** 0.5 / sigma.norm()))
    return mixed(mixed(W, generator).T, generator).T.contiguous()


@torch.no_grad()
def let_fall(model: nn.Module, power: float = POWER) -> None:
    """Give the linear layers of a model's blocks weights of falling singular values, in place."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and ".layers." in name:
            W = layer.weight
            W.copy_(falling(W.shape[0], W.shape[1], power, str(W.device)))


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, models are made on the device in this dtype: the peak of a detour by fp32, or by the
    CPU, would hide some of what is measured."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_model(config: M.Config, device: str, dtype: torch.dtype) -> M.CausalLM:
    """The same each time on the same device."""
    torch.manual_seed(0)
    with made_on(device, dtype):
        model = M.CausalLM(config).eval()
    let_fall(model)
    return model


def random_peer(config: M.Config, device: str, dtype: torch.dtype) -> Any:
    """transformers' model of the same shapes."""
    import transformers

    torch.manual_seed(0)
    described = transformers.AutoConfig.for_model(**checkpoint.config_json(config))
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(described, dtype=dtype).eval()
    let_fall(model)
    return model


def padded_left(rows: list[list[int]], device: str = "cpu") -> dict[str, Tensor]:
    """A batch as transformers' generate takes it."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device)}
