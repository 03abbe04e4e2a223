"""What the start of a method costs, on random blocks, beside peft's: seconds and memory.

    start_here       a method's start as train.py makes it
    start_in_peft    the same in peft, where it has the method
    some_blocks      part 3 of bench_gpu.py: FARSS on some of the blocks, by part
    all_blocks       part 6: on all of them
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import farss
import model as M
import train
from fast import start as fast_start
from fast.decompositions import Directions
from measuring import (
    LINEARS,
    Job,
    Measurement,
    Size,
    Stopwatch,
    in_gb,
    measured,
    random_model,
    random_peer,
)
from settings import DTYPES, Settings

# FARSS's start by part, and the functions that are timed for each; the rest are the passes.
TIMED: dict[str, list[tuple[Any, str]]] = {
    "decompositions": [(Directions, "of")],
    "moments": [(fast_start.Moments, "add_forward"), (fast_start.Moments, "add_backward")],
    "candidates": [(fast_start, "candidates"), (farss, "build_adapters")],
    "attach": [(M, "attach")],
}


def start_here(method: str, size: Size, shallow: int = 0) -> dict[str, float]:
    """Seconds and bytes that a method's start takes, with so many shallow blocks."""
    model = random_model(size.config(), size.device, DTYPES[size.dtype])
    s = Settings(model="random blocks", method=method, shallow=shallow, rank=size.rank,
                 alpha=float(size.rank), device=size.device, dtype=size.dtype, form=size.form,
                 max_length=size.length, calibration_examples=size.sequences)
    with measured(size.device) as took:
        train.initialise(model, s, size.examples())
    return took


def start_by_part(size: Size, shallow: int) -> dict[str, float]:
    """The same of FARSS, and its seconds by part."""
    watch = Stopwatch(size.device)
    with watch.watching(TIMED):
        took = start_here("farss", size, shallow)
    parts = watch.seconds()
    return in_gb(took) | {"passes": took["seconds"] - sum(parts.values())} | parts


def peft_start(method: str) -> dict[str, Any] | None:
    """How peft is told of a method; None where it has it not."""
    import peft
    from peft.tuners.lora.config import CordaConfig

    def corda(kind: Any) -> dict[str, Any]:
        return {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method=kind)}

    known: dict[str, Callable[[], dict[str, Any]]] = {  # asked for only where it is measured
        "lora": dict, "pissa": lambda: {"init_lora_weights": "pissa"},
        "kasa": lambda: {"kasa_config": peft.KasaConfig()},
        "corda-kpm": partial(corda, "kpm"), "corda-ipm": partial(corda, "ipm")}
    return known[method]() if method in known else None


def start_in_peft(method: str, size: Size) -> dict[str, float]:
    """The same as start_here, in peft, which reads a sequence at a time."""
    import peft
    from peft.tuners.lora.corda import preprocess_corda

    model = random_peer(size.config(), size.device, DTYPES[size.dtype])
    config = peft.LoraConfig(r=size.rank, lora_alpha=size.rank, target_modules=list(LINEARS),
                             **(peft_start(method) or {}))

    @torch.no_grad()
    def run_model():
        for e in size.examples():
            model(torch.tensor([e.ids], device=size.device))

    with measured(size.device) as took:
        if config.corda_config is not None:
            preprocess_corda(model, config, run_model=run_model)
        peft.get_peft_model(model, config)
    return took


# ------------------------------------------------------------------------ parts of bench_gpu.py


def shown(start: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """A start's seconds and memory, as a table shows them."""
    return in_gb(start(*args))


def sized(job: Job, blocks: int) -> tuple[Size, int]:
    """So many blocks, and how many of them are shallow: the paper's 7 of 32."""
    return job.scale.size._replace(blocks=blocks, device=job.device), round(7 / 32 * blocks)


def some_blocks(job: Job) -> Iterator[Measurement]:
    """Part 3: FARSS's start by part, and one block beside peft's PiSSA and CorDA."""
    size, shallow = sized(job, job.scale.some_blocks)
    name = f"FARSS, {size.blocks} of {job.scale.blocks} blocks"
    yield name, partial(start_by_part, size, shallow)
    one, _ = sized(job, 1)
    yield "FARSS, one deep block", partial(shown, start_here, "farss", one)
    yield "peft: PiSSA, one block", partial(shown, start_in_peft, "pissa", one)
    yield "peft: CorDA-KPM, one block", partial(shown, start_in_peft, "corda-kpm", one)


def all_blocks(job: Job) -> Iterator[Measurement]:
    """Part 6: the start of the whole model."""
    size, shallow = sized(job, job.scale.blocks)
    yield f"FARSS, all {size.blocks} blocks", partial(shown, start_here, "farss", size, shallow)
