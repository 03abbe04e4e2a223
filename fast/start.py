"""FARSS's measurements without Σ_h and Σ_δ: same results as farss.measure, sooner.

Each layer W (m, n) is decomposed before its block runs, and what each token brings forward and
backward is measured along the singular vectors X (k, k) of W's smaller side:

    m >= n, X = V:    F = E[x xᵀ] of x = Vᵀ h,          B of Vᵀ Wᵀ δ = Σ Uᵀ δ
    m <  n, X = U:    F of Uᵀ W h = Σ Vᵀ h,             B of Uᵀ δ

Either way s_i = F_ii B_ii (Eq. 15) and I = Tr(F B) / mn (Eq. 8): nothing is wider than k, and of a
deep layer, whose rank does not depend on I, only the diagonals are summed. Blocks are visited by
farss.block_by_block, and Eq. 9-12 and 15-17 are farss.py's.

    measure, initialise    with the signatures of farss.py's
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import farss
from farss import Adapter, Batch, Budget, Loss, Measurement, at_least_fp32, summed_loss

from .decompositions import Directions
from .sums import OuterSum, add_moment, size_of_stripes, trace_and_diagonals

Reduce = Callable[[Tensor], Tensor]  # turns a sum over this process's batches into that over all
Each = Callable[[Callable[[Tensor], Directions], list[Tensor]], list[Directions]]


class Way(NamedTuple):
    """How the tokens of a layer are measured.

    The W h or Wᵀ δ of the model's own pass serves, unless it is rounded to fewer bits than fp32, in
    which the lowest directions would drown; then W X stands in for X.
    """

    at: str  # input: h and Wᵀ δ; output: W h and δ; both: h and δ
    forward: Tensor | None  # what h or W h is multiplied by; None: whole moments are summed
    backward: Tensor | None  # what δ or Wᵀ δ is multiplied by
    squares: bool  # only the diagonals of F and B are needed

    @classmethod
    def along(cls, W: Tensor, X: Tensor, squares: bool, sums_first: bool = False) -> "Way":
        """Choose how a layer W (m, n) is measured along X: at its input, at its output, at both; or
        (sums_first) by whole second moments (k, k), which are seen along X at the end."""
        tall = W.shape[0] >= W.shape[1]
        at = "input" if tall else "output"
        if sums_first:
            return cls(at, None, None, squares)
        if W.dtype in (torch.float32, torch.float64):
            return cls(at, X, X, squares)
        W = at_least_fp32(W)
        return cls("both", X, W @ X, squares) if tall else cls("both", W.T @ X, X, squares)


@dataclass
class Moments:
    """F and B of the layers in `ways`, as sums over the real tokens; moment_hooks adds to them.

    What is summed whole is shared by layers that read the same tensor (q, k, v; gate, up): `owner`
    names the layer that holds the sum.
    """

    ways: dict[str, Way]
    forward: dict[str, Tensor] = field(default_factory=dict)  # diagonals, or add_moment's stripes
    backward: dict[str, Tensor] = field(default_factory=dict)
    whole_forward: dict[str, OuterSum] = field(default_factory=dict)  # of ways without X
    whole_backward: dict[str, OuterSum] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    mask: Tensor = field(default_factory=lambda: torch.zeros(0))  # (b, t) bool: real tokens
    seen: tuple[Tensor, str] | None = None  # the last input and its owner

    def start(self, batch: Batch) -> None:
        """Announce the next batch, before its forward pass."""
        self.mask = batch.get("counted", batch["attention_mask"]).bool().flatten()
        self.tokens += int(self.mask.sum())
        self.seen = None

    def real(self, x: Tensor) -> Tensor:
        """The real tokens (tokens, width) of x (b, t, width) or (b·t, width)."""
        return x.flatten(0, -2)[self.mask]

    def add_forward(self, name: str, h: Tensor, Wh: Tensor | None) -> None:
        """Add the tokens' h, or W h of a layer that is measured at its output."""
        way = self.ways[name]
        if way.forward is not None:
            rows = self.real((h if Wh is None else Wh).detach())
            add_moment(self.forward, name, at_least_fp32(rows) @ way.forward, way.squares)
            return
        if Wh is None and self.seen is not None and self.seen[0].is_set_to(h):
            self.owner[name] = self.seen[1]
            return
        self.owner[name] = name
        if Wh is None:
            self.seen = h, name
        rows = self.real((h if Wh is None else Wh).detach())
        self.whole_forward.setdefault(name, OuterSum()).add(rows)

    def add_backward(self, name: str, delta: Tensor) -> None:
        """Add the tokens' δ, or Wᵀ δ of a layer that is measured at its input."""
        way, rows = self.ways[name], self.real(delta)
        if way.backward is None:
            self.whole_backward.setdefault(name, OuterSum()).add(rows)
        else:
            add_moment(self.backward, name, at_least_fp32(rows) @ way.backward, way.squares)

    def means(self, reduce: Reduce) -> None:
        """Sum over all processes and divide by the number of real tokens, in place.

        Raises ValueError if there was no token.
        """
        tokens = int(reduce(torch.tensor(self.tokens)))
        if tokens == 0:
            raise ValueError("no calibration token: the batches are empty or fully padded")
        for sums in (self.forward, self.backward):
            for name in sums:
                sums[name] = reduce(sums[name]).div_(tokens)
        for wholes in (self.whole_forward, self.whole_backward):
            for whole in wholes.values():
                assert whole.total is not None
                whole.total = reduce(whole.total).div_(tokens)


@contextmanager
def moment_hooks(model: nn.Module, ways: dict[str, Way]) -> Iterator[Moments]:
    """Record F and B of the layers in `ways` during forward and backward passes."""
    moments = Moments(ways)

    def listen(name: str, x: Tensor) -> None:
        if not x.requires_grad:
            x.requires_grad_()
        x.register_hook(lambda gradient: moments.add_backward(name, gradient))

    def watch(name: str, layer: nn.Module, at: str) -> Iterable[Any]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].view_as(args[0])  # so that its gradient is this layer's Wᵀ δ alone
            listen(name, x)
            return (x,)

        def after(module: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            Wh = None
            if at == "output":
                Wh = y if module.bias is None else y - module.bias
            moments.add_forward(name, args[0], Wh)
            if at != "input":
                listen(name, y)

        if at == "input":
            yield layer.register_forward_pre_hook(before)
        yield layer.register_forward_hook(after)

    with farss.calibrating(model), ExitStack() as hooks:
        for name, way in ways.items():
            for hook in watch(name, model.get_submodule(name), way.at):
                hooks.callback(hook.remove)
        yield moments


def sums_first(budget: Budget, name: str, k: int, tokens: int) -> bool:
    """Whether a layer's moments G (k, k) are summed and then seen along X (k, k), as Xᵀ G X: k²/2
    products a token in stripes and k³ at the end, not the k² of each token along X.

    Only in deep layers that take their highest directions, which no rounding drowns: not that of G,
    nor that of the model's own W h and Wᵀ δ. The lowest scores of such a layer are approximate.
    The fp32 products of one layer in one process are counted, whatever is shared or is fast, so
    that neither the device nor the number of processes changes a result.
    """
    highest = not (budget.is_shallow(name) or budget.lowest(name))
    return highest and tokens * size_of_stripes(k) + k**3 < tokens * k**2


def one_by_one(make: Callable[[Tensor], Directions], weights: list[Tensor]) -> list[Directions]:
    return [make(W) for W in weights]


@torch.no_grad()
def measure(model: nn.Module, batches: list[Batch], names: list[str], budget: Budget,
            loss: Loss = summed_loss, keep_on: torch.device | str | None = None,
            reduce: Reduce = lambda x: x, each: Each = one_by_one) -> dict[str, Measurement]:
    """farss.measure's, from F and B. A batch must hold an attention_mask.

    Where several processes have a part of the batches each, `reduce` sums over them, and `each` has
    a block's layers decomposed by all of them.
    """
    weights = {name: checked_weight(model, name) for name in names}
    found: dict[str, Measurement] = {}
    decomposed: dict[str, Directions] = {}  # layers of the block that runs
    tokens = int(reduce(torch.tensor(sum(
        int(batch.get("counted", batch["attention_mask"]).sum()) for batch in batches))))
    summed = {n for n, W in weights.items() if sums_first(budget, n, min(W.shape), tokens)}

    def listen(model: nn.Module, block: list[str]) -> Any:
        made = each(Directions.of, [weights[name] for name in block])
        decomposed.update(zip(block, made, strict=True))
        return moment_hooks(model, {
            name: Way.along(weights[name], decomposed[name].X, not budget.is_shallow(name),
                            name in summed) for name in block})

    for moments in farss.block_by_block(model, batches, names, listen, loss, keep_on):
        moments.means(reduce)
        for name in list(moments.ways):
            found[name] = candidates(name, weights[name], decomposed.pop(name), moments, budget)
        moments.ways.clear()  # all of it goes before the next block is decomposed
        moments.whole_forward.clear()
    return {name: found[name] for name in names}


def checked_weight(model: nn.Module, name: str) -> Tensor:
    """The weight (m, n) of an nn.Linear. ValueError for another layer, or one not finite."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is no plain nn.Linear: it has an adapter; merge() it first")
    if not layer.weight.isfinite().all():
        raise ValueError(f"the weight of {name} is not finite")
    return layer.weight


def candidates(name: str, W: Tensor, directions: Directions, moments: Moments, budget: Budget
               ) -> Measurement:
    """Compute Eq. 8, 14 and 15 of one layer from its F and B, which are dropped."""
    importance, X = None, directions.X
    if moments.ways[name].forward is None:
        whole = moments.whole_forward[moments.owner[name]].value()
        F, B = farss.lam_gam(X, X.T, whole, moments.whole_backward.pop(name).value())
    else:
        F, B = moments.forward.pop(name), moments.backward.pop(name)
        if budget.is_shallow(name):
            trace, F, B = trace_and_diagonals(F, B, len(X))
            importance = trace / W.numel()
    one = torch.ones_like(directions.S)  # F or B holds σ² already
    s = farss.direction_scores(one, F, B)
    if not s.isfinite().all():
        raise ValueError(f"a score of {name} is not finite: an activation or a gradient is not")
    index = farss.select_directions(farss.direction_order(s), min(budget.most(name), len(s)),
                                    budget.lowest(name))
    U, S, Vh = directions.take(W, index)
    return Measurement(importance, directions.S.cpu(), s.cpu(), index.cpu(), U.cpu(), S.cpu(),
                       Vh.cpu())


def initialise(model: nn.Module, batches: list[Batch], budget: Budget,
               names: list[str] | None = None, scaling: float = 1.0, loss: Loss = summed_loss
               ) -> dict[str, Adapter]:
    """farss.initialise's."""
    names = farss.linear_layers(model) if names is None else names
    return farss.build_adapters(measure(model, batches, names, budget, loss), budget, scaling)
