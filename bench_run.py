"""Training and generation of a whole random model beside transformers and peft: parts 4 and 5 of
bench_gpu.py.

    training      steps of 16 examples in micro-batches, even or padded, checkpointing or not; the
                  slowest kernels; transformers + peft, and the same with liger-kernel's Llama
    generation    64 prompts at once and one alone, the adapters merged or not; transformers'
                  generate; what is launched and waited for at each token

Both sides train LoRA of rank R with dropout 0.05 on all seven linear layers of a bf16 model, the
adapters in fp32; transformers' under autocast, as its Trainer has it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import data
import model as M
import train
from measuring import (
    LINEARS,
    Job,
    Measurement,
    finish,
    is_cuda,
    measured,
    padded_left,
    random_examples,
    random_model,
    random_peer,
)
from settings import DTYPES, Settings

DROPOUT = 0.05
SLOWEST = 12  # kernels that are listed


def adapted(job: Job) -> M.CausalLM:
    """The whole model with LoRA's adapters."""
    size = job.scale.size._replace(blocks=job.scale.blocks)
    model = random_model(size.config(), job.device, DTYPES[size.dtype])
    train.initialise(model, settings(job, 1), [])
    return model


def adapted_peer(job: Job) -> Any:
    """The same in transformers and peft."""
    import peft

    size = job.scale.size._replace(blocks=job.scale.blocks)
    base = random_peer(size.config(), job.device, DTYPES[size.dtype])
    return peft.get_peft_model(base, peft.LoraConfig(
        r=size.rank, lora_alpha=size.rank, lora_dropout=DROPOUT, target_modules=list(LINEARS)))


def settings(job: Job, micro_batch: int) -> Settings:
    size = job.scale.size
    return Settings(model="random blocks", method="lora", rank=size.rank, alpha=float(size.rank),
                    dropout=DROPOUT, device=job.device, dtype=size.dtype, micro_batch=micro_batch,
                    batch_size=job.scale.batch)


# ------------------------------------------------------------------------------ part 4: training


class Way(NamedTuple):
    """How a step is taken."""

    micro_batch: int
    padded: bool
    checkpointing: bool = False

    def __str__(self) -> str:
        return (f"{self.micro_batch} at a time, {'padded' if self.padded else 'even'}"
                + (", checkpointing" if self.checkpointing else ""))


def ways(job: Job) -> list[Way]:
    return [Way(micro, *how) for how in ((True,), (False,), (True, True))
            for micro in job.scale.micro_batches]


def batches(job: Job, padded: bool) -> list[list[data.Example]]:
    """Of one length, or of half of it to one and a half times it."""
    scale = job.scale
    count, length = scale.batch * (1 + scale.steps), scale.size.length
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.randint(length // 2, length * 3 // 2 + 1, (count,), generator=draw).tolist()
               if padded else [length] * count)
    examples = random_examples(scale.size.vocab, lengths)
    return [examples[i : i + scale.batch] for i in range(0, count, scale.batch)]


def adamw(model: nn.Module, job: Job) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0,
                             fused=is_cuda(job.device) or None), trained


def timed_steps(job: Job, step: Callable[[list[data.Example]], Any], padded: bool
                ) -> dict[str, float]:
    """Real tokens per second of all steps but the first, and the peak of these."""
    work = batches(job, padded)
    step(work[0])
    with measured(job.device) as took:
        for batch in work[1:]:
            step(batch)
    tokens = sum(len(e.ids) for batch in work[1:] for e in batch)
    return {"tokens/s": tokens / took["seconds"], "peak GB": took["peak"] / 1e9}


def step_here(job: Job, model: M.CausalLM, way: Way) -> Callable[[list[data.Example]], Any]:
    """A step of train.py."""
    model.body.gradient_checkpointing = way.checkpointing
    model.train()
    optimizer, trained = adamw(model, job)
    s = settings(job, way.micro_batch)
    return lambda batch: train.train_step(model, batch, s, optimizer, trained)


def train_here(job: Job, model: M.CausalLM, way: Way) -> dict[str, float]:
    return timed_steps(job, step_here(job, model, way), way.padded)


def train_there(job: Job, model: Any, way: Way) -> dict[str, float]:
    """The same steps on the mean loss of transformers' model."""
    optimizer, trained = adamw(model, job)
    model.train()
    if way.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()

    def step(batch: list[data.Example]) -> None:
        ordered = sorted(batch, key=lambda e: -len(e.ids))
        targets = sum(e.targets for e in batch)
        for i in range(0, len(ordered), way.micro_batch):
            part = ordered[i : i + way.micro_batch]
            with torch.autocast(torch.device(job.device).type, torch.bfloat16):
                loss = model(**data.collate(part, job.device)).loss
            (loss * sum(e.targets for e in part) / targets).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed_steps(job, step, way.padded)


def profiled(job: Job) -> profile:
    return profile(activities=[ProfilerActivity.CPU]
                   + [ProfilerActivity.CUDA] * is_cuda(job.device))


def slowest(job: Job, model: M.CausalLM, way: Way) -> dict[str, Any]:
    """The kernels of one step by their own time, on a CPU the operators."""
    step, work = step_here(job, model, way), batches(job, way.padded)
    step(work[0])
    with profiled(job) as seen:
        step(work[1])
        finish(job.device)
    kind = "cuda" if is_cuda(job.device) else "cpu"
    own = {e: e.self_device_time_total if kind == "cuda" else e.self_cpu_time_total
           for e in seen.key_averages() if e.device_type.name.lower() == kind
           and not getattr(e, "is_user_annotation", False)}
    total = sum(own.values())
    return {"ms": total / 1000, "kernel": [
        f"{100 * own[e] / total:5.1f} %  {own[e] / 1000:9.2f} ms  {e.count:6}  {e.key[:90]}"
        for e in sorted(own, key=lambda e: -own[e])[:SLOWEST]]}


def with_liger(job: Job, way: Way) -> dict[str, float]:
    """transformers' Llama with liger-kernel's in place of its norms, rotation, MLP and loss; from
    here on in this process."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return train_there(job, adapted_peer(job), way)


def training(job: Job) -> Iterator[Measurement]:
    """Part 4."""
    chosen = ways(job)
    model = adapted(job)
    for way in chosen:
        yield f"here, {way}", partial(train_here, job, model, way)
    yield f"here, one step, {chosen[0]}", partial(slowest, job, model, chosen[0])
    del model
    peer = cache(partial(adapted_peer, job))  # made when it is first asked for, if it can be

    def there(way: Way) -> dict[str, float]:
        return train_there(job, peer(), way)

    for way in chosen:
        yield f"transformers + peft, {way}", partial(there, way)
    peer.cache_clear()
    yield f"the same with liger, {chosen[0]}", partial(with_liger, job, chosen[0])


# ---------------------------------------------------------------------------- part 5: generation

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx",
            "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
Generate = Callable[[list[list[int]], int], Any]  # of prompts and a number of tokens


def prompts(job: Job, count: int) -> list[list[int]]:
    """Of random lengths."""
    draw, most = torch.Generator().manual_seed(0), job.scale.longest
    lengths = torch.randint(most // 8, most + 1, (count,), generator=draw).tolist()
    return [torch.randint(3, job.scale.size.vocab, (n,), generator=draw).tolist() for n in lengths]


def generator_here(model: M.CausalLM) -> Generate:
    return lambda work, new: M.generate(model, work, new, batch_size=len(work))


def generator_there(model: Any) -> Generate:
    model.generation_config.eos_token_id = None  # nothing but the number of tokens ends a sequence

    def generate(work: list[list[int]], new: int) -> None:
        batch = padded_left(work, str(model.device))
        out = model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                             pad_token_id=0)
        assert out.shape[1] == batch["input_ids"].shape[1] + new

    return generate


def speed(job: Job, generate: Generate, count: int) -> dict[str, float]:
    """New tokens per second of so many prompts at once."""
    work, new = prompts(job, count), job.scale.new
    generate(work, 2)
    with measured(job.device) as took:
        generate(work, new)
    return {"tokens/s": count * new / took["seconds"], "ms a step": 1000 * took["seconds"] / new,
            "peak GB": took["peak"] / 1e9}


def calls(job: Job, generate: Generate, new: int) -> Counter[str]:
    """How often each function of CUDA's and each operator of torch's was called for one prompt."""
    with profiled(job) as seen:
        generate(prompts(job, 1), new)
        finish(job.device)
    return Counter({e.key: e.count for e in seen.key_averages()})


def calls_a_token(job: Job, generate: Generate) -> dict[str, float]:
    """Of one prompt: what four more tokens call, divided by four. On a CPU nothing is launched."""
    generate(prompts(job, 1), 2)
    more = calls(job, generate, 6)
    more.subtract(calls(job, generate, 2))
    found = {"operators": sum(n for key, n in more.items() if key.startswith("aten::"))}
    if is_cuda(job.device):
        found |= {"launches": sum(more[key] for key in LAUNCHES),
                  "synchronisations": sum(more[key] for key in WAITS),
                  "copies": more["cudaMemcpyAsync"]}
    return {name: n / 4 for name, n in found.items()}


def generation(job: Job) -> Iterator[Measurement]:
    """Part 5."""
    def of(side: str, generate: Generate) -> Iterator[Measurement]:
        yield f"{side}, {job.scale.prompts} prompts", partial(speed, job, generate,
                                                              job.scale.prompts)
        yield f"{side}, 1 prompt", partial(speed, job, generate, 1)
        yield f"{side}, calls a token", partial(calls_a_token, job, generate)

    model = adapted(job)
    yield from of("here, not merged", generator_here(model))
    M.merge(model)
    yield from of("here, merged", generator_here(model))
    del model
    size = job.scale.size._replace(blocks=job.scale.blocks)
    peer = cache(lambda: generator_there(random_peer(size.config(), job.device,
                                                     DTYPES[size.dtype])))
    yield from of("transformers, merged", lambda work, new: peer()(work, new))
