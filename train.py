"""Fine-tune a language model with FARSS, LoRA, or in full.

    python train.py                                             the demo: FARSS and LoRA on the
                                                                microcosm, scored, in one table
    python train.py --method farss                              one run on the microcosm
    python train.py --model llama2-7b --task math               the paper's run (one large GPU)
    python train.py --model llama2-7b --task math --dry-run     its plan; no weights needed
    python train.py --model roberta-base --task glue:sst2       GLUE, scored after every epoch
    python train.py --model FOLDER --task math --data FILE      any model, any questions/answers
    python train.py --resume runs/NAME                          go on where a run was stopped
    python train.py --from-run runs/NAME --seed 1               the same settings once more
    torchrun --nproc-per-node 8 train.py --model ...            the same on 8 GPUs

A straight script: settings, plan, data, model, initialisation, training loop, save. The result
is a folder runs/<model>-<task>-<method>-s<seed> with run.json, ranks.json, log.jsonl and
adapter.safetensors (for --method full: a model folder), to be read by `python eval.py`.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import data
import eval as evaluation
import farss
import figures
import model as M
import plan
from benchmarks import BENCHMARKS, of_group, of_task, questions
from checkpoint import UserError
from methods import Given, OuterSum, covariances, official, split
from results import best_and_last, epoch_scores
from settings import (
    AUTO,
    DTYPES,
    MACHINE,
    Settings,
    base_of,
    candidates,
    check,
    check_new,
    fail,
    finished,
    for_task,
    given,
    is_run,
    known_as,
    origins,
    read_run,
    run_folder,
    run_main,
    settle,
    training_arguments,
    use_device,
    use_threads,
    write_run,
)

if os.environ.get("WORLD_SIZE", "1") == "1":
    import alone as parallel
else:  # torchrun has started several processes
    from fast import distributed as parallel  # type: ignore[no-redef]

FUSED = ("cuda",)  # where AdamW is one kernel: on a CPU it gains nothing
Initial = dict[str, tuple[Tensor, Tensor]]  # layer: A0, B0, taken out of W
Starts = dict[str, M.Start]
Scores = dict[str, float | None]  # of benchmarks, %

# ------------------------------------------------------------------------------- initialisation


@torch.no_grad()  # else the graph of every SVD would keep all of its U and V
def initialise(model: M.Model, s: Settings, examples: list[data.Example]) -> tuple[Initial, dict]:
    """Attach the method's adapters, or free all weights where it trains those.

    `examples` are those of the calibration. Returns ({name: (A0, B0)} that were taken out of W,
    what ranks.json says); of FARSS this has "spectra" besides, {name: (σ, s, taken)}.
    """
    if s.how.trains == "weights":
        model.requires_grad_(True)
        freeze(model, s)
        return {}, {}
    with M.products(model):
        starts, report = STARTS[s.how.needs](model, s, examples)
    starts = {name: parallel.same(start) for name, start in starts.items()}  # to the bit
    scaling = official.layer_scaling(s.alpha, starts) if s.official else s.scaling
    lost = M.attach(model, starts, scaling, s.dropout, s.residual)
    freeze(model, s)
    for name, layer in report["layers"].items():
        layer["residual_rounding"] = lost[name]
    return {n: (x.A0, x.B0) for n, x in starts.items()
            if x.A0 is not None and x.B0 is not None}, report


def freeze(model: M.Model, s: Settings) -> None:
    """Let nothing train that the method or --freeze (Table 1) keeps as it is."""
    for layer in M.adapted_layers(model).values():
        for part in s.how.frozen:
            getattr(layer, part).requires_grad_(False)
    for name, p in model.named_parameters():
        if s.is_frozen(name, len(model.blocks)):
            p.requires_grad_(False)


def fast_form(s: Settings) -> Any:
    """The package fast where the start takes it, else None: then it is not needed at all."""
    if s.form != "fast":
        return None
    import fast

    return fast


def start_inputs(s: Settings) -> Given:
    """What the starts of methods/ take; with --official nothing makes up for the scaling."""
    fast = fast_form(s)
    return Given(1.0 if s.official else s.scaling, torch.Generator().manual_seed(s.seed),
                 fast.svd if fast else farss.svd)


@contextmanager
def block_bar(model: M.Model, desc: str, total: int) -> Iterator[None]:
    """A progress bar that counts how often a block of the model runs."""
    with tqdm(total=total, desc=desc, leave=False, disable=None) as bar, ExitStack() as hooks:
        for block in model.blocks:
            hooks.callback(block.register_forward_hook(lambda *_: bar.update() and None).remove)
        yield


def start_of(s: Settings, W: Tensor, what: Given) -> M.Start:
    """The method's start of one layer, on the CPU."""
    assert s.how.start is not None, f"METHODS[{s.method!r}] must have a start"
    start = s.how.start(W, min(s.rank, *W.shape), what)
    return start._replace(**{k: t.cpu() for k, t in start._asdict().items() if t is not None})


def start_alone(model: M.Model, s: Settings, examples: list[data.Example]) -> tuple[Starts, dict]:
    """Adapters of a method that needs the weights only, and what ranks.json says of them."""
    what, starts = start_inputs(s), {}
    for name in tqdm(s.layers(model), desc=s.method, leave=False, disable=None, delay=2):
        W = model.get_parameter(f"{name}.weight").to(s.device or "cpu")
        starts[name] = start_of(s, W, what)
    return starts, {"layers": {n: {"r": len(x.A)} for n, x in starts.items()}}


def calibration_batches(s: Settings, examples: list[data.Example]) -> list[dict[str, Tensor]]:
    """A draw of the examples; with --official by twos, padded to the full length, and padding
    counted."""
    picked = [examples[i] for i in data.draw(len(examples), s.calibration_examples, s.seed + 1)]
    batches = [data.collate(b, s.device or "cpu") for b in data.batches_by_length(
        picked, lambda e: len(e.ids), calibration_batch(s, examples))]
    return [official.pad_and_count(b, s.max_length) for b in batches] if s.official else batches


def calibration_batch(s: Settings, examples: list[data.Example]) -> int:
    longest = max((len(e.ids) for e in examples), default=1)
    return official.CALIBRATION_BATCH if s.official else plan.calibration_batch(longest)


def kept_inputs(s: Settings, config: M.Config, batches: list[dict[str, Tensor]]) -> int:
    """Bytes of what goes into each block, for these batches."""
    return plan.kept_inputs(s, config, sum(b["input_ids"].numel() for b in batches))


def calibration_loss(s: Settings) -> farss.Loss:
    """Whose gradients the δ are: by --fisher and --official."""
    if s.fisher == "sampled":
        seed = s.seed + 1_000_003 * parallel.rank()  # each process draws labels of its own
        return farss.sampled_loss(torch.Generator(s.device or "cpu").manual_seed(seed))
    return official.batch_mean_loss if s.official else farss.summed_loss


def counting_first_tokens(loss: farss.Loss, names: list[str], found: dict[str, Tensor]
                          ) -> farss.Loss:
    """The loss, which adds to found[layer] what its forward passes show of Tr Σ_h besides:
    (Σ ‖h‖² of the first tokens, BOS if there is one; of all real tokens)."""

    def counting(model: Any, batch: farss.Batch) -> Tensor:
        real = batch["attention_mask"].bool()

        def add(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            size = M.at_least_fp32(args[0].detach()).pow(2).sum(-1)  # (b, t)
            found[name] = found.get(name, 0) + torch.stack([size[:, 0].sum(), size[real].sum()])

        with ExitStack() as hooks:
            for name in names:
                layer = model.get_submodule(name)
                hooks.callback(layer.register_forward_pre_hook(partial(add, name)).remove)
            return loss(model, batch)

    return counting


def calibration_set(s: Settings, examples: list[data.Example], tokenizer: checkpoint.Tokenizer
                    ) -> list[data.Example]:
    """What --calibration names: the training examples, or pieces of a running text."""
    if s.how.needs == "nothing" or s.calibration == "task":
        return examples
    if data.TASKS[s.task].classes:
        raise UserError("--calibration: a classifier has no loss on running text; leave it at task")
    return data.running_text(data.read_rows(s.calibration), tokenizer, s.calibration_examples,
                             s.max_length, s.seed)


def start_from_covariance(model: M.Model, s: Settings, examples: list[data.Example]
                          ) -> tuple[Starts, dict]:
    """Adapters of a method that needs the covariance of every layer's inputs."""
    what, found, fast = start_inputs(s), {}, fast_form(s)
    batches, reduce = parallel.deal(calibration_batches(s, examples))
    at_once = plan.blocks_at_once(s, model.config, 0, plan.device_memory(s.device))
    passes = -(-len(model.blocks) // at_once)
    try:
        with block_bar(model, "covariance", passes * len(model.blocks) * len(batches)):
            for Cs in covariances(model, batches, s.layers(model), run_body, at_once,
                                  fast.OuterSum if fast else OuterSum, reduce):
                for name, C in Cs.items():
                    W = model.get_parameter(f"{name}.weight")
                    found[name] = start_of(s, W, what._replace(C=C))
    except ValueError as error:
        raise UserError(f"{s.model}: {error}") from None
    starts = {name: found[name] for name in s.layers(model)}
    return starts, {"layers": {n: {"r": len(x.A)} for n, x in starts.items()}}


def run_body(model: M.Model, batch: farss.Batch) -> None:
    """All blocks forward; no head, whose output a covariance does not need."""
    mask = batch["attention_mask"] if model.config.labels else None  # padding is on the right
    model.body(batch["input_ids"], mask)


def start_from_fisher(model: M.Model, s: Settings, examples: list[data.Example]
                      ) -> tuple[Starts, dict]:
    """FARSS's adapters, and what ranks.json says of them."""
    batches, fast = calibration_batches(s, examples), fast_form(s)
    first: dict[str, Tensor] = {}
    kept = kept_inputs(s, model.config, batches)
    keep_on = plan.inputs_on(s, model.config, kept, fast=fast)
    if keep_on and s.device != keep_on:
        print(f"{s.device} has no room for {kept / 1e9:.1f} GB of block inputs: kept on the CPU")
    measure: Any = farss.measure
    if fast:  # farss.py knows of one process alone: there, each measures on all batches
        batches, reduce = parallel.deal(batches)
        measure = partial(fast.measure, reduce=reduce, each=parallel.each)
    names = s.layers(model)
    loss = counting_first_tokens(calibration_loss(s), names, first)
    depths = [farss.block_index(name) for name in names]
    runs = len(model.blocks) + len(model.blocks) - 1 - min(depths)
    try:
        with block_bar(model, "K-FAC by block", runs * len(batches)):
            measured = measure(model, batches, names, s.budget, loss, keep_on)
    except ValueError as error:  # a checkpoint or activations that are not finite
        raise UserError(f"{s.model}: {error}") from None
    adapters = farss.build_adapters(measured, s.budget, start_inputs(s).scaling)
    if fast:
        first = {name: reduce(sizes) for name, sizes in first.items()}
    return ({n: split(x.A, x.B) for n, x in adapters.items()},
            fisher_report(s, measured, adapters, first))


def fisher_report(s: Settings, measured: dict[str, farss.Measurement],
                  adapters: dict[str, farss.Adapter], first: dict[str, Tensor]) -> dict:
    """What ranks.json says of FARSS's adapters; and "spectra", {layer: (σ, s, taken)}."""
    shallow = [x for x in adapters.values() if x.shallow]
    spectra = {}
    for name, x in measured.items():
        taken = torch.zeros_like(x.sigma)
        taken[adapters[name].index] = 1
        spectra[name] = torch.stack([x.sigma.float(), x.s.float(), taken.float()])
    return {
        "shallow_blocks": s.budget.shallow,
        "shallow_rank_asked": farss.rank_budget(s.r_avg, len(shallow)),  # Eq. 10
        "shallow_rank_obtained": sum(len(x.A) for x in shallow),
        "layers": {n: {"I": x.importance, "r_raw": x.r_raw, "r": len(x.A), "shallow": x.shallow,
                       "first_token_share": (first[n][0] / first[n][1]).item()}
                   for n, x in adapters.items()},
        "spectra": spectra,
    }


# By what a method needs.
STARTS = {"nothing": start_alone, "covariance": start_from_covariance, "fisher": start_from_fisher}


def show_start(s: Settings, report: dict) -> None:
    """What the start found, in up to three lines."""
    layers = report["layers"].values()
    count = sum(x.get("shallow", False) for x in layers)
    if count:
        obtained = report["shallow_rank_obtained"]
        print(f"shallow ranks: asked {report['shallow_rank_asked']:g} in all ({s.r_avg:g} a "
              f"layer), obtained {obtained} ({obtained / count:.1f} a layer) after clipping to "
              f"[{s.r_min}, {s.r_max}]")
    share = sorted(x["first_token_share"] for x in layers if "first_token_share" in x)
    if share:
        print(f"first token (BOS, if there is one): up to {share[-1]:.0%} of Tr Σ_h, "
              f"median {share[len(share) // 2]:.0%}")
    lost = sorted(x["residual_rounding"] for x in layers)
    if s.how.splits:
        print(f"‖W_res + scaling·BA - W‖ / ‖scaling·BA‖ in {s.dtype}: median "
              f"{lost[len(lost) // 2]:.1e}, worst {lost[-1]:.1e}")


# ------------------------------------------------------------------------------------- training


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: linear up over the warm-up steps, then linear to 0.

    transformers' get_linear_schedule_with_warmup, in which the first of the warm-up steps has
    learning rate 0.
    """
    rising = plan.warmup_steps(steps, warmup)
    return step / rising if step < rising else (steps - step) / max(1, steps - rising)


def save_checkpoint(path: Path, step: int, trained: dict[str, nn.Parameter],
                    optimizer: torch.optim.Optimizer, belongs: dict[str, Any]) -> None:
    """All that the next step depends on: parameters, AdamW's moments, step, random states; and
    what it `belongs` to."""
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for name, p in trained.items():
        tensors[f"p/{name}"] = parallel.whole(p)
        if p in optimizer.state:
            tensors |= {f"{k}/{name}": parallel.whole(optimizer.state[p][k])
                        for k in ("exp_avg", "exp_avg_sq")}
    if parallel.first():
        checkpoint.save_sealed(path, tensors, "checkpoint", belongs | {"step": step})


def load_checkpoint(path: Path, trained: dict[str, nn.Parameter],
                    optimizer: torch.optim.Optimizer, belongs: dict[str, Any]) -> int:
    """Undo save_checkpoint; returns the number of steps done.

    Raises DamagedError, and UserError naming what differs where it belongs to something else.
    """
    tensors, about = checkpoint.load_sealed(path, "checkpoint")
    unlike = [f"{name} {about['settings'][name]}, not {value}"
              for name, value in belongs["settings"].items()
              if about["settings"].get(name, value) != value]
    if unlike:
        raise UserError(f"{path}: was made with {'; '.join(unlike)} as run.json has it now")
    shapes = {k[2:]: t.shape for k, t in tensors.items() if k.startswith("p/")}
    if about["start"] != belongs["start"] or shapes != {n: p.shape for n, p in trained.items()}:
        raise UserError(f"{path}: goes on from another start than the one in {path.parent}; "
                        "remove the run, and start it again")
    step = about["step"]
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(parallel.part(tensors[f"p/{name}"], p))
            if f"exp_avg/{name}" in tensors:
                at = p.device if optimizer.defaults["fused"] else "cpu"
                optimizer.state[p] = {"step": torch.tensor(float(step), device=at)} | {
                    k: parallel.part(tensors[f"{k}/{name}"], p) for k in ("exp_avg", "exp_avg_sq")}
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    return step


def without_loss(example: data.Example) -> data.Example:
    """For a process that has no example left, but must run the model as often as the others."""
    return example._replace(prompt_length=len(example.ids))


def train_step(model: M.Model, batch: list[data.Example], s: Settings,
               optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]
               ) -> tuple[float, float, int]:
    """One AdamW step on the mean loss of the batch's response tokens and the method's penalty:
    (loss, gradient norm, tokens). The mean is over the whole batch, so micro-batches do not
    change it, nor do several processes, each of which takes a part of it."""
    ordered = sorted(batch, key=lambda e: -len(e.ids))
    mine = parallel.shard(ordered, without_loss(ordered[-1]) if s.shard else None)
    parts = [data.collate(mine[i : i + s.micro_batch], s.device)
             for i in range(0, len(mine), s.micro_batch)]
    targets = sum(e.targets for e in batch)
    total = 0.0
    with M.products(model):
        for part in parts:
            with torch.autocast(torch.device(s.device).type, torch.bfloat16,
                                enabled=plan.is_mixed(s)):
                loss = model.loss(**part)[0] / targets
            loss.backward()
            total += loss.item()
    parallel.sum_gradients(trained)
    total = parallel.added(total)
    if s.how.penalty:  # the same in every process, and once in the sum
        penalty = s.how.penalty(model, s.kasa_beta, s.kasa_gamma)
        penalty.backward()
        total += penalty.item()
    norm = parallel.everywhere(nn.utils.clip_grad_norm_(trained, s.clip)).item()
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm, sum(len(e.ids) for e in batch)


def resume(run: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
           belongs: dict[str, Any]) -> int:
    """Load the newest sound checkpoint; returns the number of steps done. One that is damaged is
    said, and goes."""
    while path := parallel.same(newest_checkpoint(run)):
        try:
            return load_checkpoint(path, trained, optimizer, belongs)
        except checkpoint.DamagedError as error:
            parallel.barrier()  # all have seen it
            path.unlink(missing_ok=True)
            before = newest_checkpoint(run)
            print(f"{error}; going on from {before.name if before else 'the first step'}")
    return 0


def train(model: M.Model, s: Settings, chosen: data.TrainingSet, run: Path,
          validate: Callable[[], Scores] | None = None,
          score: Callable[[], Scores] | None = None) -> bool:
    """The loop; True when all steps are done, False when it was asked to stop (and saved).

    `validate`, where it is given, scores the model at the end of every epoch, `score` every
    s.score_every steps; both for log.jsonl.

    Continues from the newest checkpoint in run/checkpoint. Ctrl-C or SIGTERM finish the step
    and save. A loss, gradient or weight that is not finite ends the run and leaves the checkpoint.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(s, trained.values())
    per_epoch = math.ceil(len(chosen.examples) / s.batch_size)
    steps = s.steps or s.epochs * per_epoch
    model.body.gradient_checkpointing = s.checkpointing
    model.train()
    torch.manual_seed(s.seed)
    belongs = {"start": start_of_run(run), "settings": {
        k: v for k, v in asdict(s).items() if k not in MACHINE}}
    start = resume(run, trained, optimizer, belongs)
    log, lengths = log_up_to(run, start), [len(e.ids) for e in chosen.examples]
    asked_to_stop: list[bool] = []
    epoch, batches = -1, []
    with tqdm(total=steps, initial=start, desc=f"{s.method}", disable=None) as bar, \
            open(log if parallel.first() else os.devnull, "a") as out, \
            on_signal(partial(asked_to_stop.append, True)):  # so that a step is never cut in two
        for step in range(start, steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                batches = data.epoch_batches(lengths, s.batch_size, s.seed, epoch)
            picked = batches[step % per_epoch]
            rows = [chosen.rows[i] for i in picked]
            line = logged_step(model, [chosen.examples[i] for i in picked], s, optimizer, trained,
                               (step, steps))
            if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
                diverged(run, s, line, "", rows)
            last, stopping = step + 1 == steps, parallel.anywhere(bool(asked_to_stop))
            if validate and (last or step + 1 == (epoch + 1) * per_epoch):
                line["validation"] = validate()
            if score and (last or (step + 1) % s.score_every == 0):
                line["scores"] = score()
            out.write(json.dumps(line) + "\n")
            out.flush()
            bar.update()
            bar.set_postfix_str("loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, {memory_gb:.1f} GB"
                                .format_map(line))
            saving = stopping or ((step + 1) % s.save_every == 0 and not last)
            if (saving or last) and parallel.anywhere(not all_finite(trained.values())):
                diverged(run, s, line, "weights that are not finite after ", rows)
            if saving:
                if parallel.first():
                    os.fsync(out.fileno())  # no step may be in a checkpoint and not in the log
                keep_checkpoint(run, step + 1, trained, optimizer, belongs)
            if stopping:
                parallel.barrier()  # until it is saved
                return last
        if parallel.first():
            os.fsync(out.fileno())
    return True


def adamw(s: Settings, trained: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay,
                             fused=torch.device(s.device).type in FUSED or None)


def log_up_to(run: Path, step: int) -> Path:
    """log.jsonl without what came after the checkpoint."""
    log = run / "log.jsonl"
    if parallel.first():
        done = log.read_text().splitlines()[:step] if log.exists() else []
        with checkpoint.atomic(log) as temporary:
            temporary.write_text("".join(line + "\n" for line in done))
    return log


def logged_step(model: M.Model, batch: list[data.Example], s: Settings,
                optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter],
                place: tuple[int, int]) -> dict[str, Any]:
    """The step at `place` (step, of so many) of the schedule: its line of log.jsonl."""
    step, steps = place
    lr = s.lr * schedule(step, steps, s.warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr
    began = time.perf_counter()
    parallel.reseed(s.seed, step)
    loss, norm, tokens = train_step(model, batch, s, optimizer, list(trained.values()))
    return {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens,
            "tokens_per_s": round(tokens / (time.perf_counter() - began), 1),
            "memory_gb": round(plan.memory_used(s.device) / 1e9, 3)}


def keep_checkpoint(run: Path, step: int, trained: dict[str, nn.Parameter],
                    optimizer: torch.optim.Optimizer, belongs: dict[str, Any]) -> None:
    """Save a checkpoint, and keep the one before it, too."""
    path = run / "checkpoint" / f"step-{step:06d}.safetensors"
    save_checkpoint(path, step, trained, optimizer, belongs)
    if parallel.first():
        for old in sorted(path.parent.glob("step-*.safetensors"))[:-2]:
            old.unlink()


def start_of_run(run: Path) -> str | None:
    """The seal of the start that a run's checkpoints go on from; None where W itself trains."""
    path = run / "checkpoint" / "init.safetensors"
    return checkpoint.load_sealed(path, "adapter")[1].get("sha256") if path.exists() else None


def all_finite(trained: Iterable[nn.Parameter]) -> bool:
    """Whether all numbers are, of a sharded weight this process's own."""
    return all(bool(parallel.own(p).isfinite().all()) for p in trained)


def diverged(run: Path, s: Settings, line: dict[str, Any], what: str, rows: list[int]) -> NoReturn:
    """Say what happened, on which rows, and what is left; nothing of it is saved."""
    kept = newest_checkpoint(run)
    fail(f"step {line['step']}: {what}loss {line['loss']}, gradient norm {line['grad_norm']}, "
         f"on rows {', '.join(map(str, sorted(rows)))} of {s.data} (counted from 1); "
         "nothing of this step was saved. "
         + (f"Last checkpoint: {kept}" if kept else "No checkpoint yet"), code=1)


def drop_damaged(start_file: Path) -> None:
    """Remove a start that is damaged: it is computed again, and must come out the same where
    checkpoints go on from it."""
    if start_file.exists():
        try:
            checkpoint.load_sealed(start_file, "adapter")
        except checkpoint.DamagedError as error:
            print(f"{error}; the start is computed again")
            start_file.unlink()


def newest_checkpoint(run: Path) -> Path | None:
    found = sorted((run / "checkpoint").glob("step-*.safetensors"))
    return found[-1] if found else None


@contextmanager
def on_signal(act: Callable[[], object]) -> Iterator[None]:
    """Within `with`, Ctrl-C and SIGTERM call `act`, and afterwards do what they did before."""
    before = {n: signal.signal(n, lambda *_: act()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def left_of(run: Path | None) -> str:
    """What an interrupted command leaves of its run, and which command goes on."""
    if run is None or not is_run(run):
        return "nothing was kept; the same command starts again"
    if finished(run):
        return f"{run} is finished; evaluate it with: python eval.py {run}"
    start = run / "checkpoint" / "init.safetensors"
    kept = newest_checkpoint(run) or (start if start.exists() else None)
    return (f"{kept} is kept" if kept else "only the settings are kept, and no start") + (
        f"; go on with: python train.py --resume {run}")


# ------------------------------------------------------------------------------------------- run


TRIAL_STEPS = 20


def find_boundary(folder: Path, s: Settings, examples: list[data.Example],
                  calibration: list[data.Example], tokenizer: checkpoint.Tokenizer
                  ) -> tuple[int, list[dict]]:
    """Section 3.1's search for the number of shallow blocks: (it, what each candidate came to).

    The paper says "between 1/8 and 1/4 of the blocks" and no more. Here each candidate is trained
    for TRIAL_STEPS steps. K is then exp(-rise of the loss on the answers of the task's knowledge
    questions), T the fall of the loss on 32 examples that were held out, relative to the best
    candidate's; the highest harmonic mean of both is taken.
    """
    held_out, rest = examples[:32], examples[32:] or examples
    known = evaluation.known_examples(s.task, tokenizer, 64)
    tried: list[dict] = []
    before: list[float | None] = []  # of the base model, the same for every candidate
    for shallow in tqdm(candidates(checkpoint.read_config(folder).num_hidden_layers),
                        desc="boundary", disable=None):
        trial = replace(s, shallow=shallow, steps=TRIAL_STEPS, shard=False)
        model = checkpoint.load(folder, s.master_dtype, s.device)
        before = before or [evaluation.mean_loss(model, e) for e in (known, held_out)]
        initialise(model, trial, calibration)
        run_trial(model, trial, rest)
        after = [evaluation.mean_loss(model, e) for e in (known, held_out)]
        falls = [x - y for x, y in zip(before, after, strict=True)
                 if x is not None and y is not None]
        if len(falls) < 2:
            raise UserError("--shallow auto: a loss is not finite, or there is nothing to ask; "
                            "give a number")
        tried.append({"shallow": shallow, "K": math.exp(min(0.0, falls[0])), "fall": falls[1]})
        del model  # before the next is loaded: memory may have room for one alone
    best = max(x["fall"] for x in tried)
    for x in tried:
        x["T"] = x["fall"] / best if best > 0 else 0.0
        x["KT"] = farss.harmonic_mean(x["K"], max(0.0, x["T"]))
        print(f"boundary {x['shallow']}: K {x['K']:.3f}, T {x['T']:.3f}, KT {x['KT']:.3f}")
    return max(tried, key=lambda x: x["KT"])["shallow"], tried


def run_trial(model: M.Model, s: Settings, examples: list[data.Example]) -> None:
    """The first s.steps steps of an epoch, the schedule fitted to them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(s, trained)
    batches = data.epoch_batches([len(e.ids) for e in examples], s.batch_size, s.seed, 0)
    model.train()
    torch.manual_seed(s.seed)
    for step in range(s.steps):
        for group in optimizer.param_groups:
            group["lr"] = s.lr * schedule(step, s.steps, s.warmup)
        batch = [examples[i] for i in batches[step % len(batches)]]
        parallel.reseed(s.seed, step)
        train_step(model, batch, s, optimizer, trained)


def started_with(run: Path | None, s: Settings, chosen: data.TrainingSet) -> None:
    """UserError unless the rows are those of a run that is resumed, or repeated with the same
    draw of the same data."""
    if run is None:
        return
    was, recorded = read_run(run)
    drawn = [(x.data, x.examples, x.seed, x.task) for x in (s, was)]
    if drawn[0] == drawn[1] and recorded.get("data_sha256") != chosen.sha256:
        raise UserError(f"{s.data}: not the data that {run} was started with")


def main(argv: list[str] | None = None) -> None:
    args = training_arguments(__doc__, argv)
    begun: list[Path] = []

    def interrupt() -> None:
        raise KeyboardInterrupt(left_of(begun[0] if begun else None))

    with on_signal(interrupt):
        one_run(args, begun)


class Asked(NamedTuple):
    """What the arguments ask for, before anything is loaded."""

    s: Settings
    config: M.Config
    run: Path
    folder: Path  # of the base model
    rows: list[data.Row]
    recorded: bool  # whether run.json is there already
    local: bool = False  # whether the base is a folder of the user's


def resumed(args: argparse.Namespace) -> Asked:
    """A stopped run, with its own settings."""
    run = args.resume
    s, recorded = read_run(run)
    if finished(run):
        shutil.rmtree(run / "checkpoint.tmp", ignore_errors=True)  # killed while they went
        raise UserError(f"{run} is finished; evaluate it with python eval.py {run}")
    s = replace(s, **given(args))
    folder = base_of(run, s, recorded, args.base)
    config = for_task(checkpoint.read_config(folder), s.task)
    rows = data.read_rows(s.data, data.TASKS[s.task].source)
    check(s, config)
    return Asked(s, config, run, folder, rows, True)


def new_run(args: argparse.Namespace, begun: list[Path]) -> Asked | None:
    """A new run; None where its plan alone was asked for, which is printed."""
    s, config = settle(args)
    run = args.out or run_folder(s)
    if not args.dry_run:  # before the data are read
        check_new(run)
        begun.append(run)
    rows = (data.read_rows(s.data, data.TASKS[s.task].source)
            if not args.dry_run or data.is_local(s.data) else [])
    planned = plan.make(s, config, args.memory and args.memory * 1e9, len(rows), fast_form(s))
    print("\n".join(origins(s, config, given(args), args.from_run)))
    if args.dry_run:
        plan.show(s, config, planned, known_as(s.model, config))
        return None
    if warning := plan.dropout_note(s):
        print(f"dropout {warning}")
    if form := plan.form_note(s, planned):
        print(f"start by {form}")
    s = replace(s, micro_batch=planned.micro_batch, checkpointing=planned.checkpointing)
    again = read_run(args.from_run)[1] if args.from_run else {}
    folder = (base_of(args.from_run, s, again, args.base) if args.from_run else
              checkpoint.fetch(s.model))
    local = checkpoint.is_folder(s.model) or args.base or again.get("base")
    return Asked(s, config, run, folder, rows, False, bool(local))


def one_run(args: argparse.Namespace, begun: list[Path]) -> None:
    """From the arguments to the finished run, and its plan alone with --dry-run. The run's folder
    goes into `begun` as soon as something may be left in it."""
    if args.resume:
        begun.append(args.resume)
    asked = resumed(args) if args.resume else new_run(args, begun)
    if asked is None:
        return
    s, config, run, folder, rows, recorded, local = asked
    parallel.check(s.device, s.batch_size)
    s = parallel.same(s)  # the micro-batch, too, which each may have chosen by its own memory
    if s.shard and parallel.size() == 1:
        print("note: one process keeps all weights; --shard has nothing to do")
        s = replace(s, shard=False)
    use_threads(s.threads)
    use_device(s.device, s.cudnn_attention)
    tokenizer = checkpoint.Tokenizer(folder, config)
    task = data.TASKS[s.task]
    chosen = data.training_set(rows, tokenizer, s.examples, s.max_length, s.seed, task)
    show_data(s, config, chosen, rows)
    validation = {  # a wrong label of it, too, is found before anything is written
        b: questions(b, evaluation.rows_of(b, s))
        for b in (of_group(BENCHMARKS, task.group) if task.classes else [])}
    scored = {b: questions(b, evaluation.rows_of(b, s)[: s.score_limit])
              for b in (of_task(s.task) if s.score_every else [])}
    start_file = run / "checkpoint" / "init.safetensors"
    if parallel.first():
        drop_damaged(start_file)
    has_start = parallel.same(start_file.exists())
    calibration = [] if has_start else calibration_set(s, chosen.examples, tokenizer)
    if s.how.needs != "nothing" and 0 < len(calibration) < s.calibration_examples:
        print(f"note: calibration on {len(calibration)} examples, not {s.calibration_examples}")
    started_with(args.resume or args.from_run, s, chosen)
    boundary: list[dict] = []
    if s.shallow == AUTO:
        shallow, boundary = find_boundary(folder, s, chosen.examples, calibration, tokenizer)
        s = replace(s, shallow=shallow)
    parameters = sum(p.numel() for p in M.empty(config).parameters())
    if s.how.needs == "fisher" and not has_start:  # said before anything is loaded or written
        batches, _ = parallel.deal(calibration_batches(s, calibration))
        plan.inputs_on(s, config, kept_inputs(s, config, batches),
                       plan.element_size(s) * parameters, fast_form(s))
    # Nothing runs on the whole model where it has a start, or needs no calibration.
    whole_on = "cpu" if s.shard and (has_start or s.how.needs == "nothing") else s.device
    model = checkpoint.load(folder, s.master_dtype, whole_on, task.classes or None, s.seed)
    parallel.barrier()  # all have seen the folder as it was
    if not recorded and parallel.first():  # run.json first: with it alone a run can be resumed
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.sync_entries(run.parent)
        write_run(run, s, {
            "data_sha256": chosen.sha256, "rows": len(rows),
            "calibration_batch": calibration_batch(s, calibration),
            "from_run": str(args.from_run) if args.from_run else None,
            "dropped_rows": chosen.dropped, "cut_rows": chosen.cut,
            "known_as": known_as(s.model, config), **({"boundary": boundary} if boundary else {}),
            "base": str(folder.resolve()) if local else None,
            "base_fingerprint": model.fingerprint})
    if parallel.first():
        (run / "checkpoint").mkdir(exist_ok=True)
    initial = start_of_training(model, s, run, None if has_start else calibration)
    if s.shard:
        parallel.shard_model(model, model.blocks, s.device)
    if s.compile:
        M.compile_parts(model)
    validate = evaluation.validator(model, tokenizer, validation) if validation else None
    score = evaluation.validator(model, tokenizer, scored) if scored else None
    if not train(model, s, chosen, run, validate, score):
        print(f"stopped; go on with: python train.py --resume {run}")
        sys.exit(130)
    parallel.unshard(model)
    if parallel.first():
        save_result(model, s, run, folder, initial)


def show_data(s: Settings, config: M.Config, chosen: data.TrainingSet, rows: list[data.Row]
              ) -> None:
    """What is trained on, in a line or two."""
    print(f"data: {len(chosen.examples):,} of {len(rows):,} rows of {s.data} "
          f"({' + '.join(data.columns(rows[0], data.TASKS[s.task]))})"
          + (f"; {chosen.dropped} dropped, no response within {s.max_length} tokens"
             if chosen.dropped else "")
          + (f"; {chosen.cut} cut after {s.max_length} tokens, so without their end"
             if chosen.cut else ""))
    if max(len(e.ids) for e in chosen.examples) > config.max_position_embeddings:
        print(f"note: {s.model} was made for {config.max_position_embeddings} tokens, and some "
              "examples are longer")


def start_of_training(model: M.Model, s: Settings, run: Path,
                      calibration: list[data.Example] | None) -> Initial:
    """Attach the adapters: those of the run's start file, where `calibration` is None, else new
    ones, which are written there. {layer: (A0, B0)} of what was taken out of W."""
    start_file, began = run / "checkpoint" / "init.safetensors", time.perf_counter()
    plan.forget_peak(s.device)
    if calibration is None:
        initial = checkpoint.load_adapter(model, start_file, s.dropout)
        freeze(model, s)
        print(f"initialisation read from {start_file}")
    else:
        initial, report = initialise(model, s, calibration)
        if report and parallel.first():
            report["seconds"] = round(time.perf_counter() - began, 1)
            if spectra := report.pop("spectra", None):
                checkpoint.save_tensors(run / "spectra.safetensors", spectra, {})
            report["peak_memory_gb"] = round(plan.memory_used(s.device) / 1e9, 2)
            checkpoint.save_json(run / "ranks.json", report)
            checkpoint.save_adapter(start_file, model, initial, s.residual)
            show_start(s, report)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in M.empty(model.config).parameters())
    print(f"trainable: {count / 1e6:,.2f}M of {whole / 1e6:,.1f}M; initialised in "
          f"{time.perf_counter() - began:.1f} s and {plan.memory_used(s.device) / 1e9:.1f} GB; "
          f"--micro-batch {s.micro_batch}"
          + (" (as memory had room; it decides the draws of dropout)" if s.dropout else ""))
    plan.forget_peak(s.device)  # the log's is that of training
    return initial


def save_result(model: M.Model, s: Settings, run: Path, folder: Path, initial: Initial) -> None:
    """Write the adapter, or the model where all weights were trained, and draw the run."""
    if s.how.trains == "weights":
        checkpoint.save(model.to(DTYPES[s.dtype]), run / "model")
        checkpoint.copy_companions(folder, run / "model")
    else:
        checkpoint.save_adapter(run / "adapter.safetensors", model, initial, s.residual)
    # At once, so that a kill never leaves part of it, from which a resumed run would go on.
    shutil.rmtree((run / "checkpoint").replace(run / "checkpoint.tmp"))
    for sentence in best_and_last(epoch_scores(run)):
        print(sentence)
    if pyplot := figures.plotting():
        print("pictures: " + ", ".join(path.name for path in figures.draw_run(pyplot, run)))
    else:
        print(figures.MISSING)
    print(f"done: {run}; evaluate it with: python eval.py {run}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_main(parallel.together(main), "go on with --resume RUN --micro-batch 1 "
                 "--checkpointing, or take a smaller --max-length")
    else:
        import demo

        run_main(demo.main)
