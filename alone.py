"""What fast/distributed.py offers, for one process: what a run on one GPU or CPU needs of it.

train.py and eval.py take fast/distributed.py in its place where torchrun has started several
processes; there each function says what it does.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from checkpoint import UserError


def rank() -> int:
    return 0


def size() -> int:
    return 1


def first() -> bool:
    return True


def barrier() -> None:
    """Nobody is to be waited for."""


def together(main: Callable[[], None]) -> Callable[[], None]:
    return main


def check(device: str | None, batch_size: int | None = None) -> None:
    """One process can have any device and any batch."""


def same(value: Any) -> Any:
    return value


def anywhere(flag: bool) -> bool:
    return flag


def reseed(seed: int, step: int) -> None:
    """torch's own random state goes on, and is in the checkpoints."""


def shard(items: Sequence, filler: Any = None) -> list:
    return list(items)


def gather(mine: list) -> list:
    return mine


def each(make: Callable[[Tensor], Any], tensors: list[Tensor]) -> list:
    return [make(x) for x in tensors]


def deal(items: list) -> tuple[list, Callable[[Tensor], Tensor]]:
    return items, lambda x: x


def added(x: float) -> float:
    return x


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """They are whole."""


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], device: str) -> None:
    raise UserError("--shard deals weights out to several processes: start them with torchrun")


def own(tensor: Any) -> Tensor:
    return tensor


def everywhere(tensor: Any) -> Tensor:
    return tensor


def whole(tensor: Tensor) -> Tensor:
    return tensor


def part(tensor: Tensor, like: Any) -> Tensor:
    return tensor.to(like.device)


def unshard(model: nn.Module) -> None:
    """Nothing was sharded."""
