"""Several processes on one task, one for each GPU: torchrun --nproc-per-node N train.py ...

    together      wraps a script's main: sets the processes up and takes them down
    rank, size, first, barrier, same, anywhere        who is who, and what all agree on
    shard, gather, each, deal                         lists dealt out, and put together again
    total, added, sum_gradients                       sums over the processes
    shard_model, own, everywhere, whole, part, unshard    weights dealt out (FSDP2), whole again

Tensors on the CPU go through gloo, those on a GPU through NCCL. Of one process alone (alone.py has
the same functions for that) everything here does nothing.
"""

import hashlib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from checkpoint import UserError

PATIENCE = timedelta(seconds=30)  # for the first process to fail, too, and say why
LOST = "[Cc]onnection (was )?(closed|reset)"  # what gloo and NCCL say of a process that is gone
LONGEST_WAIT = timedelta(hours=2)  # for the slowest process; torchrun notices a dead one at once

# ---------------------------------------------------------------------------------- who is who


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that prints, logs and saves."""
    return rank() == 0


def barrier() -> None:
    """Wait for all."""
    if size() > 1:
        added(0.0)  # on the CPU; NCCL's own barrier needs a device


def together(main: Callable[[], None]) -> Callable[[], None]:
    """`main`, run by all processes that torchrun started; by one alone as it is.

    Only the first prints. Another one has only to say why it failed, where the first did not fail,
    too. Raises UserError where the processes are not alike.
    """

    def start() -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            main()
            return
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {name} is not set: "
                                "start several processes with torchrun, one without WORLD_SIZE")
        has_gpu, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
        if has_gpu and local < torch.cuda.device_count():
            torch.cuda.set_device(local)  # so that "cuda" is this one
        store, number, count = next(rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", store=store,
                                rank=number, world_size=count, timeout=LONGEST_WAIT)
        streams, held = (sys.stdout, sys.stderr), io.StringIO()
        if not first():
            sys.stdout, sys.stderr = io.StringIO(), held  # no terminal: no progress bar either
        try:
            check_alike(describe())
            main()
            barrier()
        except BaseException as error:
            if number == 0:
                store.set("failed", "")
            said = number > 0 and comes(store, "failed")
            if not has_gpu:  # NCCL would wait for the others
                dist.destroy_process_group()
            if said:
                sys.exit(1)
            streams[1].write(held.getvalue())
            if isinstance(error, RuntimeError) and re.search(LOST, str(error)):
                raise UserError("another process has ended; see what it said") from None
            raise
        finally:
            sys.stdout, sys.stderr = streams
        dist.destroy_process_group()
        for stream in streams:
            stream.flush()
        os._exit(0)  # a thread of torch's that asks for an ending interpreter aborts the process

    return start


def comes(store: dist.Store, key: str) -> bool:
    """Whether another process sets the key before patience ends."""
    try:
        store.wait([key], PATIENCE)
    except dist.DistError:
        return False
    return True


def describe() -> dict[str, Any]:
    """What must be the same in all processes."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for file in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return {"code": digest.hexdigest()[:12], "torch": torch.__version__, "arguments": sys.argv[1:]}


def check_alike(mine: dict[str, Any]) -> None:
    """UserError unless all processes have the same code, torch and arguments."""
    everyones: list[Any] = [None] * size()
    dist.all_gather_object(everyones, mine)
    for number, other in enumerate(everyones):
        for what, value in other.items():
            if value != everyones[0][what]:
                raise UserError(f"process {number} has other {what} ({value}) than process 0 "
                                f"({everyones[0][what]}); start all with the same")


def check(device: str | None, batch_size: int | None = None) -> None:
    """UserError unless so many processes can share the work on this device (None: to be picked),
    and a batch."""
    if size() == 1:
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device}: with several processes give cuda, of which each takes "
                        "one of its own, or cpu")
    if device == "cuda" and local > torch.cuda.device_count():
        raise UserError(f"{local} processes on this machine, which has "
                        f"{torch.cuda.device_count()} GPUs: start as many (torchrun "
                        "--nproc-per-node), or give --device cpu")
    if batch_size is not None and batch_size < size():
        raise UserError(f"--batch-size {batch_size}: less than one example for each of {size()} "
                        "processes")


# ------------------------------------------------------------------------- what all agree on


def same(value: Any) -> Any:
    """The first process's value, for all."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def anywhere(flag: bool) -> bool:
    """Whether it is true in any process."""
    return added(float(flag)) > 0


def reseed(seed: int, step: int) -> None:
    """Give every process its own draws of dropout, a function of seed and step alone, so that a
    resumed run needs no other process's random state. With one process nothing is done."""
    if size() > 1:
        digest = hashlib.sha256(f"{seed} {step} {rank()}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7]))


# ----------------------------------------------------------------------------------- lists


def shard(items: Sequence, filler: Any = None) -> list:
    """Every size()-th of the items, this process's part of them. With a filler all have as many."""
    mine = list(items[rank() :: size()])
    if filler is not None and len(mine) < math.ceil(len(items) / size()):
        mine.append(filler)
    return mine


def gather(mine: list) -> list:
    """All items in their order, in every process, from what each made of its `shard`."""
    if size() == 1:
        return mine
    parts: list[list] = [[] for _ in range(size())]
    dist.all_gather_object(parts, mine)
    return [parts[i % size()][i // size()] for i in range(sum(map(len, parts)))]


def each(make: Callable[[Tensor], Any], tensors: list[Tensor]) -> list:
    """[make(x) for x in tensors], each process making its part; `make` gives a NamedTuple of
    tensors and None, which ends up where x is."""
    if size() == 1:
        return [make(x) for x in tensors]
    made = gather([moved(make(x), "cpu") for x in shard(tensors)])  # a GPU's number is its own
    return [moved(one, x.device) for one, x in zip(made, tensors, strict=True)]


def moved(parts: Any, device: torch.device | str) -> Any:
    """A NamedTuple of tensors and None on another device."""
    return parts._replace(**{k: t.to(device) for k, t in parts._asdict().items() if t is not None})


def deal(items: list) -> tuple[list, Callable[[Tensor], Tensor]]:
    """(this process's part of the items, how to sum over the processes what was made of it).

    Where there are fewer items than processes each has all of them, and its sum is the whole.
    """
    return (items, lambda x: x) if len(items) < size() else (shard(items), total)


# ------------------------------------------------------------------------------------ sums


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, written into it."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def added(x: float) -> float:
    """The sum of a number over all processes."""
    return x if size() == 1 else total(torch.tensor(x, dtype=torch.float64)).item()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all processes; those of a sharded model were, on their way."""
    if size() == 1:
        return
    for p in parameters:
        if not is_part(p):
            p.grad = total(torch.zeros_like(p) if p.grad is None else p.grad)


# ------------------------------------------------------------------- weights dealt out (FSDP2)


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], device: str) -> None:
    """Leave each process its part of every weight, on the device.

    A block's weights are gathered when it runs, forward and backward, and dropped again; those
    outside the blocks stay gathered from `model.loss` until its backward pass is over. Gradients
    are summed. All processes must call `model.loss` equally often. The model may be on the CPU: it
    goes to the device block by block.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (size(),))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # a sum, no mean
        module.set_force_sum_reduction_for_comms(True)  # gloo can do no other
    register_fsdp_forward_method(model, "loss")


def is_part(tensor: Tensor) -> bool:
    """Whether it is one process's part of a sharded tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes a second to import


def own(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if is_part(tensor) else tensor


def everywhere(tensor: Any) -> Tensor:
    """The whole tensor in every process; all must ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, of a sharded one in the first process and on the CPU; others, which must
    ask for it as well, get an empty one."""
    if not is_part(tensor):
        return tensor
    found = everywhere(tensor.detach())
    return found.cpu() if first() else found.new_empty(0)


def part(tensor: Tensor, like: Any) -> Tensor:
    """What this process keeps of a whole tensor that is sharded as `like`, on its device."""
    if not is_part(like):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None)  # every process has read it: none sends


@torch.no_grad()
def unshard(model: nn.Module) -> None:
    """Put whole weights in place of the parts, in the first process and on the CPU, to be saved."""
    if size() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    done: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stands twice
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a class that fully_shard put before the module's own
            module.__class__ = type(module).__mro__[2]
        for name, p in module.named_parameters(recurse=False):
            if is_part(p):
                if p not in done:
                    done[p] = nn.Parameter(whole(p), p.requires_grad)
                module.register_parameter(name, done[p])
