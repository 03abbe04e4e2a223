"""C of every layer, the covariance of its inputs, which CorDA and LoRA-Null start from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from farss import Batch, at_least_fp32, block_index, calibrating

Run = Callable[[Any, Batch], Any]  # (model, batch): a forward pass


class Outer(Protocol):
    """What OuterSum is here, and fast.OuterSum for half of the products."""

    total: Tensor | None

    def add(self, rows: Tensor) -> None: ...
    def value(self) -> Tensor: ...


class OuterSum:
    """Σ_t x_t x_tᵀ of rows x_t; in fp32, or fp64 if the rows are."""

    def __init__(self) -> None:
        self.total: Tensor | None = None  # (width, width)

    def add(self, rows: Tensor) -> None:
        """Add rows (tokens, width)."""
        rows = at_least_fp32(rows)
        self.total = rows.T @ rows if self.total is None else self.total.addmm_(rows.T, rows)

    def value(self) -> Tensor:
        """The sum (width, width)."""
        assert self.total is not None, "nothing was added"
        return self.total


class InputSums:
    """Sums behind C while `input_hooks` is open; layers that read the same tensor share theirs."""

    def __init__(self, outer: Callable[[], Outer]) -> None:
        self.outer = outer
        self.sums: dict[str, Outer] = {}  # by layer
        self.mask = torch.zeros(0)  # (b, t) bool: real tokens
        self.seen: tuple[Tensor, str] | None = None  # the last input, and the layer that read it

    def start(self, batch: Batch) -> None:
        """Announce the next batch, before its forward pass."""
        self.mask, self.seen = batch["attention_mask"].bool(), None

    def add(self, name: str, x: Tensor) -> None:
        """Add the inputs x (b, t, n) of one layer."""
        if self.seen is not None and self.seen[0] is x:
            self.sums[name] = self.sums[self.seen[1]]
            return
        self.seen = x, name
        total = self.sums.setdefault(name, self.outer())
        for tokens, real in zip(x.detach().unflatten(0, (len(self.mask), -1)).flatten(1, -2),
                                self.mask, strict=True):
            rows = at_least_fp32(tokens[real])
            total.add(rows / rows.max().abs())  # |max x| and not max |x|, as the official code


@contextmanager
def input_hooks(model: nn.Module, names: list[str], outer: Callable[[], Outer]
                ) -> Iterator[InputSums]:
    """Record the inputs of the named layers during forward passes."""
    found = InputSums(outer)
    with calibrating(model), ExitStack() as hooks:
        for name in names:
            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(
                lambda _, args, name=name: found.add(name, args[0])).remove)
        yield found


@torch.no_grad()
def covariances(model: nn.Module, batches: list[Batch], names: list[str], run: Run,
                at_once: int = 1_000_000, outer: Callable[[], Outer] = OuterSum,
                reduce: Callable[[Tensor], Tensor] = lambda x: x) -> Iterator[dict[str, Tensor]]:
    """Yield C (n, n) of every named layer, `at_once` blocks after the other.

    CorDA's and LoRA-Null's own: C = (1/N) Σ over the N sequences of xᵀx, x (tokens, n) a
    sequence's inputs divided by |max x|, in fp32. Every real token counts, prompt and BOS too. As
    no gradient is needed, so many blocks at once take one forward pass of the whole model, which is
    `run(model, batch)`. Layers that share an input share C. ValueError for one that is not finite,
    as where a sequence's largest input is 0. `reduce` sums over processes, where each has a part of
    the batches.

    Official code differs: it divides by 256, whatever the number of sequences.
    """
    sequences = int(reduce(torch.tensor(sum(len(batch["input_ids"]) for batch in batches))))
    depths = sorted({block_index(name) for name in names})
    for first in range(0, len(depths), at_once):
        inside = [n for n in names if block_index(n) in depths[first : first + at_once]]
        with input_hooks(model, inside, outer) as found:
            for batch in batches:
                found.start(batch)
                run(model, batch)
        done: dict[int, Tensor] = {}  # by the sum that layers share
        for name, total in found.sums.items():
            if id(total) not in done:
                assert total.total is not None
                total.total = reduce(total.total)
                done[id(total)] = C = total.value().div_(sequences)
                if not C.isfinite().all():  # damping would never end
                    raise ValueError(f"the covariance of {name}'s inputs is not finite")
        yield {name: done[id(total)] for name, total in found.sums.items()}
