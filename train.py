"""Fine-tune a language model with FARSS, LoRA, or in full.

    python train.py --model llama2-7b --task math               the paper's run (one large GPU)
    python train.py --model llama2-7b --task math --dry-run     its plan; no weights needed
    python train.py --model FOLDER --task math --data FILE      any Llama, any questions/answers
    python train.py --resume runs/NAME                          go on where a run was stopped

A straight script: settings, plan, data, model, initialisation, training loop, save. The result
is a folder runs/<model>-<task>-<method>-s<seed> with config.json, ranks.json, log.jsonl and
adapter.safetensors (for --method full: a model folder), to be read by `python eval.py`.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

import baselines
import data
import farss
import model as M

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = ("farss", "lora", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. The defaults are the paper's; rows of PAPER refine them."""

    model: str = setting(None, "short name, hub id, or folder of a Hugging Face checkpoint")
    task: str = setting("math", "what is trained on: math (MetaMathQA)")
    data: str = setting(None, "train on this instead: metamath, gsm8k, or a .json/.jsonl[.gz]/"
                              ".parquet file with a question and an answer column")
    method: str = setting("farss", "farss, lora, or full (fine-tuning of every weight)")
    # initialisation
    rank: int = setting(128, "R: rank of the deep layers, of all layers for lora (A.2.1: 128)")
    alpha: float = setting(None, "the adapters are scaled by alpha / R, one constant for all "
                                 "layers (A.2.1: alpha = R, so 1)")
    shallow: int = setting(None, "number of shallow blocks, counted from the first (4.2; 7/32 of "
                                 "the blocks for models that the paper has not)")
    r_min: int = setting(1, "smallest rank of a shallow layer (4.2)")
    r_avg: float = setting(50, "mean rank asked for the shallow layers, before clipping (4.2)")
    r_max: int = setting(64, "largest rank of a shallow layer (4.2)")
    calibration: int = setting(256, "training examples for the K-FAC factors (A.2.1)")
    fisher: str = setting("empirical", "labels behind the gradients: empirical (the data's, as "
                                       "the paper runs it) or sampled (the model's, as Eq. 5)")
    residual: str = setting("split", "split: store W - scaling B A (the paper); exact: keep W "
                                     "and subtract the initial adapter in the forward pass")
    targets: str = setting(",".join(LINEARS), "linear layers to adapt (A.2.1: all seven)")
    # training (A.2.1)
    lr: float = setting(2e-5, "peak learning rate of AdamW, falling linearly to 0 (A.2.1)")
    batch_size: int = setting(16, "examples per step (A.2.1; the official scripts: 128)")
    examples: int = setting(100_000, "training examples, drawn at random (A.2.1)")
    epochs: int = setting(1, "passes over the examples (A.2.1)")
    steps: int = setting(None, "stop after this many steps, the schedule fitted to them")
    max_length: int = setting(512, "tokens per sequence; the rest is cut (official code)")
    warmup: float = setting(0.03, "part of the steps with rising learning rate (A.2.1)")
    weight_decay: float = setting(0.0, "decoupled weight decay (A.2.1: none)")
    dropout: float = setting(0.05, "dropout on the adapters' input (A.2.1)")
    clip: float = setting(1.0, "largest gradient norm (transformers' default; the paper is "
                               "silent)")
    seed: int = setting(0, "of the draw of examples, their order, LoRA's A, and dropout")
    # machine
    dtype: str = setting(None, "float32 or bfloat16 (A.2.1: bfloat16; on CPU float32, which is "
                               "many times faster there)")
    device: str = setting(None, "cuda, mps or cpu (default: the first that is there)")
    micro_batch: int = setting(None, "examples per forward pass (default: as many as fit into "
                                     "memory); the gradient is that of the whole batch")
    checkpointing: bool = setting(None, "recompute activations in the backward pass (default: "
                                        "only if memory needs it)")
    save_every: int = setting(200, "steps between checkpoints")


# Settings of the paper by (model, task), and what it prints: shallow blocks (4.2, A.6), the R that
# matches LoRA's parameters (Tables 2, 10), FARSS's #Params in millions at R = 128.
PAPER = {
    ("llama2-7b", "math"): dict(shallow=7, matched=153, params=271),
    ("mistral-7b-v0.3", "math"): dict(shallow=5, matched=152, params=300),
    ("llama3-8b", "math"): dict(shallow=9, matched=155, params=276),
    ("llama2-13b", "math"): dict(shallow=11, matched=164, params=400),
    # Not in the paper: the small model for readers without a large GPU; 7/32 of 30 blocks.
    ("smollm2-135m", "math"): dict(shallow=7),
    ("smollm2-135m-instruct", "math"): dict(shallow=7),
}


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr, and out: 2 for bad input, 1 for a run that went wrong."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    starts = {"model": "what", "rank": "initialisation (sections 3.2 and 3.3)",
              "lr": "training", "dtype": "machine"}
    kinds = {f.name: f.type for f in fields(Settings)}
    choices = {"method": METHODS, "task": tuple(data.TASKS), "dtype": tuple(DTYPES),
               "fisher": ("empirical", "sampled"), "residual": ("split", "exact")}
    for f in fields(Settings):
        if f.name in starts:
            group = parser.add_argument_group(starts[f.name])
        default = "" if f.default is None else f"; default {f.default}"
        more = (dict(action=argparse.BooleanOptionalAction) if f.name == "checkpointing" else
                dict(type=kinds[f.name], choices=choices.get(f.name),
                     metavar=None if f.name in choices else f.name.upper()))
        group.add_argument("--" + f.name.replace("_", "-"), default=None,
                           help=f.metadata["help"] + default, **more)
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="folder of the run "
                       "(default runs/<model>-<task>-<method>-s<seed>)")
    group.add_argument("--resume", type=Path, metavar="RUN", help="continue a stopped run with "
                       "its own settings; takes no other option")
    group.add_argument("--dry-run", action="store_true", help="print the plan and stop: "
                       "parameters, ranks, steps, memory; needs no weights")
    args = parser.parse_args(argv)
    given = [f.name for f in fields(Settings) if getattr(args, f.name) is not None]
    if args.resume and (given or args.out or args.dry_run):
        parser.error("--resume takes its settings from the run; give no other option")
    if not args.resume and args.model is None:
        parser.error("--model is missing, for example --model llama2-7b, or a folder")
    return args


def settle(args: argparse.Namespace) -> tuple[Settings, M.Config]:
    """The settings of a run: the paper's, its row for this model and task, then the flags."""
    row = PAPER.get((args.model, args.task or "math"), {})
    given = {f.name: getattr(args, f.name) for f in fields(Settings)
             if getattr(args, f.name) is not None}
    config = M.config_of(args.model)
    blocks = config.num_hidden_layers
    s = Settings(**given)
    filled = dict(
        shallow=given.get("shallow", row.get("shallow", round(blocks * 7 / 32))),
        alpha=float(given.get("alpha", s.rank)),
        data=s.data or data.TASKS[s.task],
        device=str(M.pick_device(s.device)) if not args.dry_run or s.device else s.device,
    )
    on_cpu = filled["device"] == "cpu"
    filled["dtype"] = s.dtype or ("float32" if on_cpu else "bfloat16")
    s = replace(s, **filled)
    for name in ("rank", "alpha", "calibration", "lr", "batch_size", "examples", "epochs",
                 "max_length", "clip", "save_every", "steps", "micro_batch"):
        if getattr(s, name) is not None and not getattr(s, name) > 0:
            raise M.UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(s, name)}")
    for name in ("warmup", "dropout"):
        if not 0 <= getattr(s, name) < 1:
            raise M.UserError(f"--{name} must be in [0, 1), not {getattr(s, name)}")
    if not 0 <= s.shallow <= blocks:
        raise M.UserError(f"--shallow {s.shallow}: {s.model} has {blocks} blocks")
    if s.method == "farss":
        try:
            farss.allocate_ranks({}, s.r_avg, s.r_min, s.r_max)
        except ValueError as error:
            raise M.UserError(error) from None
    M.linear_names(M.empty(config), s.targets.split(","))  # refuses unknown targets
    return s, config


# ------------------------------------------------------------------------------------------- plan


def ranks_at_average(s: Settings, shapes: dict[str, tuple[int, int]],
                     shallow_rank: float) -> dict[str, float]:
    """Rank of each layer if every shallow one had `shallow_rank`; min(m, n) is the most."""
    return {name: min(shallow_rank if s.method == "farss" and farss.block_index(name) < s.shallow
                      else s.rank, *shape) for name, shape in shapes.items()}


def adapter_parameters(shapes: dict[str, tuple[int, int]], ranks: dict[str, float]) -> float:
    """Σ r (m + n)."""
    return sum(ranks[name] * (m + n) for name, (m, n) in shapes.items())


def training_memory(s: Settings, config: M.Config, parameters: int, trainable: float,
                    micro_batch: int, checkpointing: bool) -> float:
    """Estimated peak bytes of training: weights, AdamW, activations, one chunk of logits.

    Per token a block keeps about 10 d + 2 kv + 4 f numbers (norms, q, k, v, rotated q and k,
    attention's output; gate, up, SiLU and product), d the width, kv and f those of keys and MLP,
    and each adapted layer's input once more in fp32 (with its dropout mask). Checkpointing keeps
    only d a block, and the full amount for one block at a time.
    """
    element = torch.finfo(DTYPES[s.dtype]).bits // 8
    d, f = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    inputs = {n: f if n == "down_proj" else d for n in LINEARS}
    block = element * (10 * d + 2 * kv + 4 * f)
    if s.method != "full":
        block += 5 * sum(inputs[t] for t in s.targets.split(",") if t in inputs)
    tokens = micro_batch * s.max_length
    blocks = config.num_hidden_layers
    kept = blocks * element * d + block if checkpointing else blocks * block
    state = 16 * trainable + (0 if s.method == "full" else element * parameters)
    return state + tokens * kept + 3 * 2**28


def initialisation_memory(s: Settings, config: M.Config, parameters: int) -> tuple[float, float]:
    """Estimated bytes of FARSS's start: (model + activations of one sequence, a block's factors).

    Factors are kept for as many blocks at a time as the free memory allows, at least one.
    """
    activations = training_memory(s, config, 0, 0, 1, False)
    element = torch.finfo(DTYPES[s.dtype]).bits // 8
    skeleton = M.empty(config)
    first = [n for n in M.linear_names(skeleton, s.targets.split(","))
             if farss.block_index(n) == 0]
    return element * parameters + activations, farss.factor_bytes(skeleton, first)


def choose_micro_batch(s: Settings, config: M.Config, parameters: int, trainable: float,
                       memory: float) -> Settings:
    """Fill micro_batch and checkpointing: the largest 2^i part of the batch that fits."""
    sizes = [s.batch_size >> i for i in range(s.batch_size.bit_length())]
    sizes = [s.micro_batch] if s.micro_batch else sizes
    checks = [False, True] if s.checkpointing is None else [s.checkpointing]
    for checkpointing in checks:
        for size in sizes:
            need = training_memory(s, config, parameters, trainable, size, checkpointing)
            if need <= 0.9 * memory:
                return replace(s, micro_batch=size, checkpointing=checkpointing)
    return replace(s, micro_batch=sizes[-1], checkpointing=checks[-1])


def device_memory(device: str | None) -> float:
    """Free bytes on the device; without one (a plan), the paper's 80 GB GPU."""
    if device is None:
        return 80e9
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8e9  # macOS does not say


def show_plan(s: Settings, config: M.Config) -> None:
    """--dry-run: all that can be known without weights and data."""
    skeleton = M.empty(config)
    parameters = sum(p.numel() for p in skeleton.parameters())
    names = M.linear_names(skeleton, s.targets.split(","))
    shapes = {n: tuple(skeleton.get_submodule(n).weight.shape) for n in names}
    million = "{:,.1f}M".format
    print(f"plan: {s.model}, {s.task}, {s.method}")
    print(f"model         {config.num_hidden_layers} blocks, {million(parameters / 1e6)} "
          f"parameters, {s.dtype}")
    if s.method == "full":
        trainable = parameters
        print(f"trainable     all {million(parameters / 1e6)}, fp32 master weights")
    else:
        average = s.r_avg if s.method == "farss" else s.rank
        trainable = adapter_parameters(shapes, ranks_at_average(s, shapes, average))
        if s.method == "farss":
            print(f"shallow       {s.shallow} of {config.num_hidden_layers} blocks, "
                  f"r (r_min, r_avg, r_max) = ({s.r_min}, {s.r_avg:g}, {s.r_max}), lowest-scoring "
                  "directions")
            print(f"deep          {config.num_hidden_layers - s.shallow} blocks, R = {s.rank}, "
                  "highest-scoring directions")
        print(f"scaling       alpha / R = {s.alpha:g} / {s.rank} = {s.alpha / s.rank:g}")
        print(f"\n{'layers':22}{'count':>6}{'shape':>16}{'rank':>12}{'trainable':>12}")
        for line in rank_table(s, shapes):
            print(line)
        if s.method == "farss":
            low, high = (adapter_parameters(shapes, ranks_at_average(s, shapes, r))
                         for r in (s.r_min, s.r_max))
            paper = PAPER.get((s.model, s.task), {}).get("params")
            printed = f"; the paper prints {paper}M" if paper and s.rank == 128 else ""
            print(f"trainable     {million(trainable / 1e6)} if every shallow rank were r_avg; "
                  f"the data decide, between {million(low / 1e6)} and {million(high / 1e6)}"
                  f"{printed}")
            lora = s.rank * sum(m + n for m, n in shapes.values())
            print(f"              LoRA of rank {s.rank}: {million(lora / 1e6)}")
        else:
            print(f"trainable     {million(trainable / 1e6)}")
    steps = s.steps or s.epochs * math.ceil(s.examples / s.batch_size)
    print(f"\nsteps         {steps:,} of {s.batch_size} examples"
          + (f" ({s.epochs} epoch of {s.examples:,})" if not s.steps else "")
          + f", {math.ceil(s.warmup * steps)} of them warm-up to lr {s.lr:g}")
    memory = device_memory(s.device)
    chosen = choose_micro_batch(s, config, parameters, trainable, memory)
    need = training_memory(chosen, config, parameters, trainable, chosen.micro_batch,
                           chosen.checkpointing)
    has = f"{memory / 1e9:.0f} GB" + (" (an 80 GB GPU; no --device given)" if s.device is None
                                      else f" free on {s.device}")
    print(f"memory        training about {need / 1e9:.1f} GB with micro-batch "
          f"{chosen.micro_batch}" + (", checkpointing" if chosen.checkpointing else "")
          + f", of {has}")
    if s.method == "farss":
        base, factors = initialisation_memory(s, config, parameters)
        print(f"              initialisation about {base / 1e9:.1f} GB + {factors / 1e9:.1f} GB "
              f"of factors a block; {s.calibration} calibration examples")
    if need > memory:
        print("              THIS DOES NOT FIT"
              + (": AdamW needs 16 bytes for every weight" if s.method == "full" else
                 "; try a smaller --max-length or --targets"))


def rank_table(s: Settings, shapes: dict[str, tuple[int, int]]) -> Iterator[str]:
    """One line per kind of layer, shallow and deep apart."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in shapes:
        is_shallow = s.method == "farss" and farss.block_index(name) < s.shallow
        depth = "shallow" if is_shallow else "deep" if s.method == "farss" else "all"
        groups.setdefault((depth, name.rsplit(".", 1)[1]), []).append(name)
    for (depth, leaf), names in sorted(groups.items(), key=lambda g: -len(g[0][0])):
        m, n = shapes[names[0]]
        low, high = ((min(s.r_min, m, n), min(s.r_max, m, n)) if depth == "shallow"
                     else (min(s.rank, m, n),) * 2)
        count = [len(names) * r * (m + n) / 1e6 for r in (low, high)]
        rank = f"{low}" if low == high else f"{low}..{high}"
        size = f"{count[0]:.1f}M" if low == high else f"{count[0]:.1f}..{count[1]:.1f}M"
        yield f"{depth + ' ' + leaf:22}{len(names):>6}{f'{m} x {n}':>16}{rank:>12}{size:>12}"


# ------------------------------------------------------------------------------- initialisation


def initialise(model: M.Llama, s: Settings, calibration: list[data.Example]
               ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict]:
    """Attach the method's adapters; returns ({name: (A0, B0)} taken out of W, ranks.json)."""
    names = M.linear_names(model, s.targets.split(","))
    scaling = s.alpha / s.rank
    if s.method == "lora":
        draw = torch.Generator().manual_seed(s.seed)
        start = {n: baselines.lora(w, min(s.rank, *w.shape), draw) for n in names
                 for w in [model.get_submodule(n).weight]}
        M.attach(model, start, scaling, s.dropout, s.residual)
        return {}, {"layers": {n: {"r": A.shape[0]} for n, (A, _) in start.items()}}
    free, config = device_memory(s.device), model.config
    size = next(b for b in (8, 4, 2, 1)
                if b == 1 or training_memory(s, config, 0, 0, b, False) < free / 3)
    batches = [data.collate(b, s.device) for b in
               data.batches_by_length(calibration, lambda e: len(e.ids), size)]
    draw = torch.Generator(s.device).manual_seed(s.seed)
    loss = farss.sampled_loss(draw) if s.fisher == "sampled" else farss.summed_loss
    try:
        layers = farss.initialise(
            model, batches, names, shallow=s.shallow, R=s.rank, r_avg=s.r_avg, r_min=s.r_min,
            r_max=s.r_max, scaling=scaling, loss=loss, memory=free / 2,
            progress=partial(tqdm, leave=False, disable=None))
    except ValueError as error:  # a checkpoint or activations that are not finite
        raise M.UserError(f"{s.model}: {error}") from None
    initial = {n: (layer.A, layer.B) for n, layer in layers.items()}
    lost = M.attach(model, initial, scaling, s.dropout, s.residual)
    shallow = [layer for layer in layers.values() if layer.shallow]
    report = {
        "shallow_blocks": s.shallow,
        "shallow_rank_asked": s.r_avg * len(shallow),  # Eq. 10
        "shallow_rank_obtained": sum(layer.rank for layer in shallow),
        "layers": {n: {"I": layer.importance, "r_raw": layer.r_raw, "r": layer.rank,
                       "shallow": layer.shallow, "first_token_share": layer.first_token_share,
                       "residual_rounding": lost[n]} for n, layer in layers.items()},
    }
    return initial, report


def show_ranks(s: Settings, report: dict) -> None:
    layers = report["layers"]
    if s.method == "farss":
        asked, obtained = report["shallow_rank_asked"], report["shallow_rank_obtained"]
        count = sum(x["shallow"] for x in layers.values())
        if count:
            print(f"shallow ranks: asked {asked:g} in all ({s.r_avg:g} a layer), obtained "
                  f"{obtained} ({obtained / count:.1f} a layer) after clipping to "
                  f"[{s.r_min}, {s.r_max}]")
        share = [x["first_token_share"] for x in layers.values()]
        print(f"first token (BOS, if there is one): up to {max(share):.0%} of Tr Σ_h, "
              f"median {sorted(share)[len(share) // 2]:.0%}")
        lost = sorted(x["residual_rounding"] for x in layers.values())
        print(f"‖W_res + scaling·BA - W‖ / ‖scaling·BA‖ in {s.dtype}: median "
              f"{lost[len(lost) // 2]:.1e}, worst {lost[-1]:.1e}")


# ------------------------------------------------------------------------------------- training


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: linear up over ceil(warmup * steps), then linear to 0.

    transformers' get_linear_schedule_with_warmup, in which the first of the warm-up steps has
    learning rate 0.
    """
    rising = math.ceil(warmup * steps)
    return step / rising if step < rising else (steps - step) / max(1, steps - rising)


def memory_used(device: str) -> float:
    """Peak bytes so far: of the GPU's allocator, otherwise of the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save_checkpoint(path: Path, step: int, trained: dict[str, nn.Parameter],
                    optimizer: torch.optim.Optimizer) -> None:
    """All that the next step depends on: parameters, AdamW's moments, step, random states."""
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for name, p in trained.items():
        tensors[f"p/{name}"] = p
        if p in optimizer.state:
            tensors |= {f"{k}/{name}": optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}
    M.save_tensors(path, tensors, {"step": str(step)})


def load_checkpoint(path: Path, trained: dict[str, nn.Parameter],
                    optimizer: torch.optim.Optimizer) -> int:
    """Undo save_checkpoint; returns the number of steps done."""
    tensors, meta = M.load_tensors(path)
    if {k[2:] for k in tensors if k.startswith("p/")} != set(trained):
        raise M.UserError(f"{path}: does not hold this run's parameters")
    step = int(meta["step"])
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[f"p/{name}"])
            if f"exp_avg/{name}" in tensors:
                optimizer.state[p] = {"step": torch.tensor(float(step))} | {
                    k: tensors[f"{k}/{name}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    return step


def train_step(model: M.Llama, batch: list[data.Example], s: Settings,
               optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]
               ) -> tuple[float, float, int]:
    """One AdamW step on the mean loss of the batch's response tokens: (loss, gradient norm,
    tokens). The mean is over the whole batch, so micro-batches do not change it."""
    ordered = sorted(batch, key=lambda e: -len(e.ids))
    parts = [data.collate(ordered[i : i + s.micro_batch], s.device)
             for i in range(0, len(ordered), s.micro_batch)]
    targets = sum(int((p["labels"][:, 1:] != M.IGNORE).sum()) for p in parts)
    total = 0.0
    mixed = s.method == "full" and s.dtype == "bfloat16"  # fp32 master weights, bf16 products
    for part in parts:
        with torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=mixed):
            loss = model.loss(**part)[0] / targets
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(trained, s.clip).item()
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm, sum(len(e.ids) for e in batch)


def train(model: M.Llama, s: Settings, examples: list[data.Example], run: Path) -> bool:
    """The loop; True when all steps are done, False when it was asked to stop (and saved).

    Continues from the newest checkpoint in run/checkpoint. Ctrl-C or SIGTERM finish the step
    and save. A loss or gradient that is not finite ends the run and leaves the checkpoint.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=s.lr, weight_decay=s.weight_decay)
    per_epoch = math.ceil(len(examples) / s.batch_size)
    steps = s.steps or s.epochs * per_epoch
    model.model.gradient_checkpointing = s.checkpointing
    model.train()
    torch.manual_seed(s.seed)
    saved = newest_checkpoint(run)
    start = load_checkpoint(saved, trained, optimizer) if saved else 0
    log = run / "log.jsonl"
    done = log.read_text().splitlines()[:start] if log.exists() else []
    with M.atomic(log) as temporary:  # forget what came after the checkpoint
        temporary.write_text("".join(line + "\n" for line in done))

    lengths, stop = [len(e.ids) for e in examples], StopRequest()
    epoch, batches = -1, []
    with tqdm(total=steps, initial=start, desc=f"{s.method}", disable=None) as bar, \
            open(log, "a") as out, stop:
        for step in range(start, steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                batches = data.epoch_batches(lengths, s.batch_size, s.seed, epoch)
            lr = s.lr * schedule(step, steps, s.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            began = time.perf_counter()
            batch = [examples[i] for i in batches[step % per_epoch]]
            loss, norm, tokens = train_step(model, batch, s, optimizer, list(trained.values()))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                kept = newest_checkpoint(run)
                fail(f"step {step + 1}: loss {loss}, gradient norm {norm}, on examples "
                     f"{batches[step % per_epoch]}; nothing was updated. "
                     + (f"Last checkpoint: {kept}" if kept else "No checkpoint yet"), code=1)
            speed = tokens / (time.perf_counter() - began)
            memory = memory_used(s.device) / 1e9
            json.dump({"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm,
                       "tokens": tokens, "tokens_per_s": round(speed, 1),
                       "memory_gb": round(memory, 3)}, out)
            out.write("\n")
            out.flush()
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, {memory:.1f} GB")
            if stop.asked or ((step + 1) % s.save_every == 0 and step + 1 < steps):
                path = run / "checkpoint" / f"step-{step + 1:06d}.safetensors"
                save_checkpoint(path, step + 1, trained, optimizer)
                for old in sorted(path.parent.glob("step-*.safetensors"))[:-2]:
                    old.unlink()
            if stop.asked:
                return step + 1 == steps
    return True


def newest_checkpoint(run: Path) -> Path | None:
    found = sorted((run / "checkpoint").glob("step-*.safetensors"))
    return found[-1] if found else None


class StopRequest:
    """Within `with`, Ctrl-C and SIGTERM only set `asked`, so that a step is never cut in two."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        def handler(number, frame):
            self.asked = True

        self.before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- run


def provenance() -> dict[str, str]:
    """Versions and commit, for every file of results."""
    here = Path(__file__).resolve().parent
    git = partial(subprocess.run, cwd=here, capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip() or "unknown"
        dirty = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except OSError:
        commit, dirty = "unknown", ""
    return {"commit": commit + ("-modified" if dirty else ""), "torch": torch.__version__,
            "python": platform.python_version(), "threads": str(torch.get_num_threads())}


def model_name(model: str) -> str:
    """A model's part in the name of a folder of results."""
    return Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")


def run_folder(s: Settings) -> Path:
    return Path("runs") / f"{model_name(s.model)}-{s.task}-{s.method}-s{s.seed}"


def finished(run: Path) -> bool:
    """The result is there, and the checkpoints, which go last, are not."""
    result = (run / "adapter.safetensors").exists() or (run / "model" / "config.json").exists()
    return result and not (run / "checkpoint").exists()


def read_run(run: Path) -> tuple[Settings, dict]:
    """Settings and the whole config.json of a run folder."""
    config = M.read_json(run / "config.json")
    names = {f.name for f in fields(Settings)}
    settings = config.get("settings")
    if not isinstance(settings, dict) or set(settings) != names:
        raise M.UserError(f"{run / 'config.json'}: not written by this version of train.py")
    return Settings(**settings), config


def check_new(run: Path) -> None:
    """Never write over another run."""
    if finished(run):
        raise M.UserError(f"{run} holds a finished run; choose another --out or --seed, or "
                          "remove it")
    if run.exists() and any(run.iterdir()):
        raise M.UserError(f"{run} holds an unfinished run; go on with --resume {run}, or choose "
                          "another --out")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.resume:
        run = args.resume
        s, recorded = read_run(run)
        if finished(run):
            raise M.UserError(f"{run} is finished; evaluate it with python eval.py {run}")
        config = M.config_of(s.model)
    else:
        s, config = settle(args)
        run = args.out or run_folder(s)
        if args.dry_run:
            show_plan(s, config)
            return
        check_new(run)
        recorded = None

    rows = data.read_rows(s.data)
    folder = M.fetch(s.model)
    tokenizer = M.Tokenizer(folder, config)
    chosen = data.training_set(rows, tokenizer, s.examples, s.max_length, s.seed)
    print(f"data: {len(chosen.examples):,} of {len(rows):,} rows of {s.data}"
          + (f"; {chosen.dropped} dropped, no response within {s.max_length} tokens"
             if chosen.dropped else ""))
    if recorded and recorded["data_sha256"] != chosen.sha256:
        raise M.UserError(f"{s.data}: not the data that {run} was started with")
    dtype = torch.float32 if s.method == "full" else DTYPES[s.dtype]
    model = M.load(folder, dtype, s.device)

    names = [] if s.method == "full" else M.linear_names(model, s.targets.split(","))
    shapes = {n: tuple(model.get_submodule(n).weight.shape) for n in names}
    parameters = sum(p.numel() for p in model.parameters())
    if recorded is None:
        most = (parameters if s.method == "full" else
                adapter_parameters(shapes, ranks_at_average(s, shapes, s.r_max)))
        s = choose_micro_batch(s, config, parameters, most, device_memory(s.device)
                               + (4 if dtype == torch.float32 else 2) * parameters)
        (run / "checkpoint").mkdir(parents=True, exist_ok=True)
        M.save_json(run / "config.json", {"settings": asdict(s), "data_sha256": chosen.sha256,
                                          "dropped_rows": chosen.dropped} | provenance())

    started = time.perf_counter()
    start_file, initial = run / "checkpoint" / "init.safetensors", {}
    if s.method == "full":
        model.requires_grad_(True)
    elif start_file.exists():
        initial = M.load_adapter(model, start_file, s.dropout)
        print(f"initialisation read from {start_file}")
    else:
        picked = data.draw(len(chosen.examples), s.calibration, s.seed + 1)
        initial, report = initialise(model, s, [chosen.examples[i] for i in picked])
        report["seconds"] = round(time.perf_counter() - started, 1)
        report["peak_memory_gb"] = round(memory_used(s.device) / 1e9, 2)
        M.save_json(run / "ranks.json", report)
        M.save_adapter(start_file, model, initial, s.residual)
        show_ranks(s, report)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trainable: {count / 1e6:,.2f}M of {parameters / 1e6:,.1f}M; initialised in "
          f"{time.perf_counter() - started:.1f} s; micro-batch {s.micro_batch}")

    if not train(model, s, chosen.examples, run):
        print(f"stopped; go on with: python train.py --resume {run}")
        sys.exit(130)
    if s.method == "full":
        M.save(model.to(DTYPES[s.dtype]), run / "model")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            if (folder / file).exists():
                shutil.copy(folder / file, run / "model" / file)
    else:
        M.save_adapter(run / "adapter.safetensors", model, initial, s.residual)
    shutil.rmtree(run / "checkpoint")
    print(f"done: {run}; evaluate it with: python eval.py {run}")


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main: bad input ends as one line and exit 2, a full disk or an
    exhausted GPU as one line and exit 1, Ctrl-C as 130."""
    try:
        main()
    except M.UserError as error:
        fail(str(error))
    except torch.OutOfMemoryError as error:
        fail(f"out of GPU memory ({str(error).splitlines()[0]}); try --micro-batch 1 "
             "--checkpointing or a smaller --max-length", code=1)
    except OSError as error:
        fail(str(error), code=1)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


if __name__ == "__main__":
    run_main(main)
