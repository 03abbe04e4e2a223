"""This project beside its peers: the same model, batch and settings, in one run.

    python bench.py FOLDER              FOLDER holds a Llama checkpoint (see README)
    python bench.py FOLDER --rows training --quick        a first look: little work, one round
    python bench.py FOLDER --questions FILE --json FILE   all rows; the results as a file, too
    python bench.py --blocks            peak memory of the sweep as blocks are added; no FOLDER
    python bench.py --starts            the start of every method, beside peft's; no FOLDER
    python bench.py --decompositions    three ways to Eq. 13; no FOLDER
    python bench.py --growth            how FARSS's start grows with the model's size; no FOLDER

Every measurement is a process of its own, the two sides taking turns, so that their ratio holds
when the machine's speed drifts and peak memory is each side's own. Reported: the median over
the rounds, and the median of the ratios round by round. CPU seconds are those of all threads: with
OMP_NUM_THREADS=1 they hardly depend on what else the machine does. Needs requirements-dev.txt.
All run on --device, a GPU waited for where a clock is read, in --dtype: bf16 beside peft under
autocast. One GPU as a whole is measured by bench_gpu.sh (docs/one-gpu.md).

    training        beside transformers + peft: LoRA r = 32 on all seven linears, dropout 0.05,
                    AdamW, batch 8 of 128 to 256 tokens, loss on the last half of each: real
                    tokens per second, after one step
    even training   the same, every sequence of 192 tokens: no padding to leave out
    generation      beside transformers: 64 prompts of 16 to 128 tokens, 32 at a time, greedy, each
                    to end after 8 to 128 new tokens. There the two batches are of similar prompts,
                    and a criterion marks a sequence as finished at its number, as EOS would
    loading         beside transformers' from_pretrained: bf16 shards with random weights of
                    Llama-3.2-1B's shape, written to a temporary folder (2.5 GB), as fp32:
                    millions of weights per second, files in the system's cache
    evaluation      beside transformers' generate with the same stops, 16 at a time: questions per
                    second of --questions, a file in NQ-Open's format, at most 64 new tokens each
    starts          seconds and memory added until the adapters are attached, on one random block
                    of Llama-2-7B's shapes (--like for another model's, --width and --mlp for
                    smaller ones), its singular values falling, R = 128, 16 sequences of 256 tokens
                    (--sequences); the block is a deep one, "/ shallow" the other kind; peft's,
                    where it has the method, a sequence at a time
    growth          the same of FARSS on small random models, and the exponent p of what fits best,
                    seconds = c x^p and GB = c x^p
    decompositions  seconds of torch's SVD, of fast.svd and of the fp64 eigendecomposition of the
                    smaller Gram matrix, one random W of either shape, in fp32
    initialisation  beside FARSS on factors of the whole model at once (kfac_factors), which need
                    the memory of all blocks: 16 sequences of 128 to 256 tokens, R = 32
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import benchmarks
import checkpoint
import data
import eval as evaluation
import farss
import fast
import figures
import model as M
import train
from bench_start import peft_start, start_here, start_in_peft
from fast.decompositions import smaller_side
from measuring import (
    LINEARS,
    POWER,
    Size,
    falling,
    is_cuda,
    measured,
    padded_left,
    seconds_of,
)
from methods import METHODS
from settings import DTYPES, Settings, provenance

BUDGET = farss.Budget(shallow=7, R=32, r_avg=12, r_min=1, r_max=16)


class Work(NamedTuple):
    """How much of it a measurement does."""

    steps: int = 3  # of training, after one
    prompts: int = 64  # of generation, half of them at a time
    new: int = 128  # tokens at most
    blocks: int = 16  # of the model that is loaded
    questions: int = 128
    device: str = "cpu"
    dtype: str = "float32"


QUICK, EVEN = Work(1, 16, 32, 2, 16), (192, 192)
BF16 = "bfloat16"
Timed = Callable[[], float]  # what is measured; returns how much it did, in the row's unit


def ours(folder: str, w: Work) -> Any:
    return checkpoint.load(folder, DTYPES[w.dtype], w.device)


def theirs(folder: str, w: Work) -> Any:
    """transformers' model of the folder."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[w.dtype])
    return model.to(w.device).eval()


def batches(vocab: int, count: int, lengths: tuple[int, int] = (128, 256), device: str = "cpu"
            ) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)

    def batch():
        sizes = torch.randint(lengths[0], lengths[1] + 1, (8,), generator=draw).tolist()
        return data.collate([data.Example(torch.randint(3, vocab, (n,), generator=draw).tolist(),
                                          n // 2) for n in sizes], device)

    return [batch() for _ in range(count)]


def tokens(work: list) -> int:
    return sum(int(b["attention_mask"].sum()) for b in work)


# --------------------------------------------------------------------------------------- training


def training(model: Any, loss: Callable[[dict], torch.Tensor], work: list[dict],
             products: Callable[[Any], AbstractContextManager] = nullcontext) -> Timed:
    """Steps on `loss(batch)`, the mean over the labelled tokens; in real tokens."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0,
                                  fused=trained[0].is_cuda or None)

    def step(batch):
        with products(model):
            loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def steps():
        for batch in work[1:]:
            step(batch)
        return tokens(work[1:])

    step(work[0])
    return steps


def train_here(folder: str, w: Work, lengths: tuple[int, int] = (128, 256)) -> Timed:
    model = ours(folder, w)
    train.initialise(model, Settings(model=folder, method="lora", rank=32, alpha=32.0), [])

    def loss(batch):
        total, n = model.loss(**batch)
        return total / n

    return training(model, loss, batches(model.config.vocab_size, 1 + w.steps, lengths, w.device),
                    M.products)


def train_peft(folder: str, w: Work, lengths: tuple[int, int] = (128, 256)) -> Timed:
    import peft

    base = theirs(folder, w)
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=32, lora_alpha=32, lora_dropout=0.05, target_modules=list(LINEARS)))
    return training(model, lambda batch: model(**batch).loss,
                    batches(base.config.vocab_size, 1 + w.steps, lengths, w.device),
                    lambda _: torch.autocast(torch.device(w.device).type, torch.bfloat16,
                                             enabled=w.dtype == BF16))


# ------------------------------------------------------------------------------------- generation


def prompts(vocab: int, w: Work) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens each is to be continued by."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 129, (w.prompts,), generator=draw).tolist()
    limits = torch.randint(8, w.new + 1, (w.prompts,), generator=draw).tolist()
    return [torch.randint(3, vocab, (n,), generator=draw).tolist() for n in lengths], limits


def generate_here(folder: str, w: Work) -> Timed:
    model = ours(folder, w)
    work, limits = prompts(model.config.vocab_size, w)
    M.generate(model, work[:2], 2)
    return lambda: sum(map(len, M.generate(model, work, limits, batch_size=w.prompts // 2)))


def generate_transformers(folder: str, w: Work) -> Timed:
    model = theirs(folder, w)
    model.generation_config.eos_token_id = None  # what ends a sequence is its limit alone
    work, limits = prompts(model.config.vocab_size, w)

    def generate(chosen: list[int], most: int) -> None:
        batch = padded_left([work[i] for i in chosen], w.device)
        ends = torch.tensor([limits[i] for i in chosen], device=w.device)
        length = batch["input_ids"].shape[1]
        out = model.generate(
            **batch, max_new_tokens=most, do_sample=False, pad_token_id=0,
            stopping_criteria=[lambda ids, scores, **_: ids.shape[1] - length >= ends])
        assert out.shape[1] - length == min(most, int(ends.max()))

    def both():
        order = sorted(range(len(work)), key=lambda i: len(work[i]))
        for half in (order[: len(order) // 2], order[len(order) // 2 :]):
            generate(half, w.new)
        return sum(limits)

    generate([0, 1], 2)
    return both


# ---------------------------------------------------------------------------------------- loading


def random_checkpoint(folder: str, w: Work) -> None:
    """Shards of four blocks each of a random Llama-3.2-1B, in bf16."""
    config = replace(checkpoint.MODELS["llama3.2-1b"][1], num_hidden_layers=w.blocks)
    names: dict[str, list[str]] = {}
    shapes = {n: p.shape for n, p in M.empty(config).named_parameters()}
    for name in shapes:
        block = farss.block_index(name) // 4 if ".layers." in name else "rest"
        names.setdefault(f"model-{block}.safetensors", []).append(name)
    for file, held in names.items():
        tensors = {n: torch.empty(shapes[n], dtype=torch.bfloat16).uniform_(-0.05, 0.05)
                   for n in held}
        checkpoint.save_tensors(Path(folder) / file, tensors, {"format": "pt"})
    checkpoint.save_json(Path(folder) / "config.json", checkpoint.config_json(config)
                         | {"torch_dtype": "bfloat16"})
    checkpoint.save_json(Path(folder) / "model.safetensors.index.json", {
        "metadata": {}, "weight_map": {n: file for file, held in names.items() for n in held}})


def millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def load_here(folder: str, w: Work) -> Timed:
    return lambda: millions(ours(folder, w))


def load_transformers(folder: str, w: Work) -> Timed:
    return lambda: millions(theirs(folder, w))


# ------------------------------------------------------------------------------------- evaluation

BENCHMARK, ANSWER = "nq_open", 64  # new tokens at most


def questions(w: Work) -> list[benchmarks.Question]:
    """Those of the file that main puts into the environment."""
    return benchmarks.questions(BENCHMARK, data.read_rows(os.environ["QUESTIONS"]))[: w.questions]


def evaluate_here(folder: str, w: Work) -> Timed:
    model, asked = ours(folder, w), questions(w)
    tokenizer = checkpoint.Tokenizer(Path(folder), model.config)
    evaluator = evaluation.Evaluator(model, tokenizer, max_new_tokens=ANSWER)
    evaluator.ask(BENCHMARK, asked[:1])
    return lambda: len(evaluator.ask(BENCHMARK, asked))


def evaluate_transformers(folder: str, w: Work) -> Timed:
    import transformers

    model = theirs(folder, w)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked, row = questions(w), benchmarks.BENCHMARKS[BENCHMARK]

    def ask(some: list[benchmarks.Question]) -> int:
        texts = sorted(((q.prompt, q.gold) for q in some), key=lambda text: -len(text[0]))
        for i in range(0, len(texts), 16):
            part = texts[i : i + 16]
            batch = padded_left([tokenizer(t, add_special_tokens=False).input_ids
                                 for t, _ in part], w.device)
            out = model.generate(**batch, max_new_tokens=ANSWER, do_sample=False, pad_token_id=0,
                                 stop_strings=list(row.stops), tokenizer=tokenizer)
            said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
            for text, (_, gold) in zip(said, part, strict=True):
                row.judge(evaluation.cut(text, row.stops), gold)
        return len(texts)

    ask(asked[:1])
    return lambda: ask(asked)


# --------------------------------------------------------------------------------- initialisation


def initialise_by_sweep(folder: str, w: Work) -> Timed:
    model = ours(folder, w)
    work = batches(model.config.vocab_size, 2, device=w.device)

    def start():
        found = fast.measure(model, work, M.linear_names(model, LINEARS), BUDGET)
        farss.build_adapters(found, BUDGET)
        return tokens(work)

    return start


def initialise_whole(folder: str, w: Work) -> Timed:
    """The same adapters from kfac_factors: one pass, the factors of all blocks at once."""
    model = ours(folder, w)
    work = batches(model.config.vocab_size, 2, device=w.device)
    names = M.linear_names(model, LINEARS)

    @torch.no_grad()
    def start():
        factors = farss.kfac_factors(model, work, names)
        weights = {n: model.get_parameter(f"{n}.weight") for n in names}
        found = {n: farss.measure_layer(n, W, *factors[n], BUDGET)
                 for n, W in weights.items()}
        farss.build_adapters(found, BUDGET)
        return tokens(work)

    return start


BLOCKS = (4, 8, 16, 32)
# Freed memory goes back to the system at once; else the peak would tell of malloc's free lists.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
NARROW: dict[str, Any] = dict(
    vocab_size=64, hidden_size=64, intermediate_size=2048, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, max_position_embeddings=512)


def grown(blocks: int, whole: bool, device: str) -> float:
    """Bytes that the factors add, on a random model of `blocks` narrow blocks.

    Kept inputs and candidates, which must grow with the blocks, are a hundredth of the factors.
    """
    model = M.CausalLM(M.Config(num_hidden_layers=blocks, **NARROW)).eval().to(device)
    work, names = batches(64, 1, device=device), M.linear_names(model, LINEARS)
    budget = farss.Budget(1, 2, 1, 1, 2)
    fast.measure(model, work, names[-7:-6], budget)  # what torch itself takes at first use
    with measured(device) as took:
        if whole:
            farss.kfac_factors(model, work, names)
        else:
            fast.measure(model, work, names, budget)
    return took["bytes"]


# ----------------------------------------------------------------------- the start of every method

def start(method: str, side: str, size: Size, **environment: str) -> dict[str, float]:
    return fresh("--start", method, side, json.dumps(size._asdict()), **environment)


def starts(size: Size, methods: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Prints and returns {method: {here, peft: {seconds, bytes}}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'method':16}{'seconds':>9}{'GB added':>10}{'peft: seconds':>15}{'GB added':>10}")
    for method in methods:
        kinds = {method: "here", f"{method} / shallow": "shallow"}
        for name, side in list(kinds.items())[: 1 + METHODS[method].adaptive]:
            found[name] = {"here": (here := start(method, side, size))}
            line = f"{name:16}{here['seconds']:>9.1f}{here['bytes'] / 1e9:>10.2f}"
            if peft_start(method) is not None:
                found[name]["peft"] = there = start(method, "peft", size)
                line += f"{there['seconds']:>15.1f}{there['bytes'] / 1e9:>10.2f}"
            print(line, flush=True)
    return found


BASE = Size(1024, 2816, 1, 16, 64)
GROWTH: dict[str, list[Size]] = {
    "width": [BASE._replace(width=w, mlp=w * 11 // 4) for w in (512, 1024, 2048)],
    "blocks": [BASE._replace(blocks=n) for n in (1, 2, 4, 8)],
    "sequences": [BASE._replace(sequences=n) for n in (16, 32, 64, 128)],
    "rank": [BASE._replace(rank=n) for n in (16, 64, 256)],
}


def exponent(x: list[float], y: list[float]) -> float:
    """p of the y = c x^p that fits best: the slope of log y over log x."""
    return statistics.linear_regression(list(map(math.log, x)), list(map(math.log, y))).slope


def growth(axes: list[str], device: str = "cpu") -> dict[str, dict[str, list[float]]]:
    """How FARSS's start, of deep blocks, grows: prints and returns {axis: {what: values}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for axis in axes:
        along = [getattr(size, axis) for size in GROWTH[axis]]
        took = [start("farss", "here", size._replace(device=device), **EXACT)
                for size in GROWTH[axis]]
        found[axis] = {axis: along, "seconds": [t["seconds"] for t in took],
                       "GB added": [t["bytes"] / 1e9 for t in took]}
        print(f"{axis:12}" + "".join(f"{value:>9}" for value in along) + f"{'exponent':>11}")
        for what in ("seconds", "GB added"):
            values = found[axis][what]
            print(f"  {what:10}" + "".join(f"{v:>9.2f}" for v in values)
                  + f"{exponent(along, values):>11.2f}", flush=True)
    return found


def draw_growth(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Seconds and memory along each axis, both scales logarithmic."""
    pyplot = figures.plotting()
    if pyplot is None:
        sys.exit(f"bench.py: {figures.MISSING}")
    figure, axes = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3), squeeze=False)
    for ax, (axis, values) in zip(axes[0], found.items(), strict=True):
        for what, style in zip(("seconds", "GB added"), figures.styles(2), strict=True):
            p = exponent(values[axis], values[what])
            ax.loglog(values[axis], values[what], label=f"{what}, exponent {p:.2f}", **style)
        ax.set_xticks(values[axis], [str(v) for v in values[axis]])
        ax.minorticks_off()
        ax.set(xlabel=axis)
        ax.legend(fontsize=7)
    figure.tight_layout()
    figures.save(pyplot, figure, path)


def gram_svd(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The SVD from W Wᵀ = U Σ² Uᵀ in fp64, m <= n: Vᵀ = Σ⁻¹ Uᵀ W. Its small σ carry an error of
    about 1e-16 σ_1² / σ, so that it does not serve for the lowest directions of every W."""
    W = W.double()
    square, U = torch.linalg.eigh(W @ W.T)
    S = square.flip(0).clamp(min=0).sqrt()
    U = U.flip(1)
    return U.float(), S.float(), ((U / S).T @ W).float()


WAYS: dict[str, Callable[[torch.Tensor], Any]] = {
    "torch.linalg.svd": lambda W: torch.linalg.svd(W, full_matrices=False),
    "fast.svd": fast.svd, "smaller side": smaller_side, "fp64 Gram": gram_svd}


def decompositions(width: int, mlp: int, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Prints and returns {shape: {way: seconds}}, in fp32, of falling singular values."""
    found: dict[str, dict[str, float]] = {}
    print(f"{'shape':>14}" + "".join(f"{name:>18}" for name in WAYS))
    for m, n in ((width, width), (width, mlp)):
        W = falling(m, n, POWER, device)
        took = found[f"{m} x {n}"] = {name: seconds_of(partial(way, W), device)
                                      for name, way in WAYS.items()}
        print(f"{f'{m} x {n}':>14}" + "".join(f"{t:>16.1f} s" for t in took.values()), flush=True)
    return found


# --------------------------------------------------------------------------------------- measuring


class Row(NamedTuple):
    here: Callable[[str, Work], Timed]
    there: Callable[[str, Work], Timed]
    peer: str
    unit: str = "tokens"


ROWS = {
    "training": Row(train_here, train_peft, "transformers + peft"),
    "even training": Row(partial(train_here, lengths=EVEN), partial(train_peft, lengths=EVEN),
                         "transformers + peft"),
    "generation": Row(generate_here, generate_transformers, "transformers"),
    "loading": Row(load_here, load_transformers, "transformers", "M weights"),
    "evaluation": Row(evaluate_here, evaluate_transformers, "transformers", "questions"),
    "initialisation": Row(initialise_by_sweep, initialise_whole, "all factors at once"),
}


def measure(row: Row, side: int, folder: str, w: Work) -> dict[str, float]:
    """One side of a row, in this process."""
    work = (row.there if side else row.here)(folder, w)
    cpu = time.process_time()
    with measured(w.device) as took:
        done = work()
    return {f"{row.unit}/s": done / took["seconds"], "CPU s": time.process_time() - cpu,
            "peak GB": took["peak"] / 1e9}


def fresh(*arguments: str, **environment: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True,
                          env=os.environ | environment)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        sys.exit(f"bench.py: {' '.join(arguments)}: {line}")
    return json.loads(done.stdout.splitlines()[-1])


def beside_peers(folder: str, rows: list[str], rounds: int, more: list[str]
                 ) -> dict[str, dict[str, list[float]]]:
    """Prints and returns {row: {what: [here, peer, ratio]}}."""
    results: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        runs = [[fresh(folder, "--measure", row, str(side), *more) for side in (0, 1)]
                for _ in range(rounds)]
        results[row] = {what: [*(statistics.median(r[side][what] for r in runs) for side in (0, 1)),
                               statistics.median(r[0][what] / r[1][what] for r in runs)]
                        for what in runs[0][0]}
        for what, (here, there, ratio) in results[row].items():
            print(f"{row + ', ' + what:28}{here:>10.2f}{there:>10.2f}{ratio:>8.2f}  "
                  f"peer: {ROWS[row].peer}", flush=True)
    return results


def machine(device: str, dtype: str) -> dict[str, Any]:
    """What a result depends on besides the code."""
    peers = {name: version(name) for name in ("transformers", "peft")}
    return provenance() | peers | {
        "machine": platform.platform(), "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "device": card(device), "dtype": dtype}


def card(device: str) -> str:
    """The device's name."""
    return torch.cuda.get_device_name(device) if is_cuda(device) else device


def along_blocks(device: str) -> None:
    print(f"{'blocks':>8}{'sweep, MB added':>18}{'all factors at once':>22}")
    for blocks in BLOCKS:
        added = [fresh("--grown", str(blocks), str(whole), "--device", device, **EXACT)["bytes"]
                 for whole in (0, 1)]
        print(f"{blocks:>8}{added[0] / 1e6:>18.0f}{added[1] / 1e6:>22.0f}", flush=True)


def bench_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a Llama checkpoint in Hugging Face form")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS),
                        help="default: all, evaluation only with --questions")
    parser.add_argument("--questions", type=Path, help="of evaluation: .jsonl in NQ-Open's format")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    parser.add_argument("--quick", action="store_true", help="little work and one round")
    parser.add_argument("--blocks", action="store_true", help="memory against number of blocks")
    parser.add_argument("--starts", action="store_true", help="the start of every method")
    parser.add_argument("--methods", nargs="+", help="of --starts; default: all",
                        choices=(adapted := [m for m, r in METHODS.items()
                                             if r.trains == "adapters"]), default=adapted)
    parser.add_argument("--decompositions", action="store_true", help="three ways to Eq. 13")
    parser.add_argument("--growth", nargs="*", choices=tuple(GROWTH), metavar="AXIS",
                        help=f"the start of FARSS along {', '.join(GROWTH)}, or some of them")
    parser.add_argument("--plot", type=Path, help="of --growth: a picture, .png or .svg")
    parser.add_argument("--like", choices=tuple(checkpoint.MODELS), default="llama2-7b",
                        metavar="MODEL", help="of --starts and --decompositions: whose shapes; "
                        "default %(default)s")
    parser.add_argument("--width", type=int, help="another width, with Llama's heads")
    parser.add_argument("--mlp", type=int, help="another width of the MLP")
    parser.add_argument("--sequences", type=int, default=Size().sequences,
                        help="of --starts: of 256 tokens each; default %(default)s")
    parser.add_argument("--plain", action="store_true", help="of --starts: by farss.py as it is "
                        "printed, not by fast/")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=Size().dtype,
                        help="of the weights; default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--grown", nargs=2, type=int, help=argparse.SUPPRESS)
    return parser


def rows_beside_peers(args: argparse.Namespace, work: Work) -> None:
    """The rows of a model folder, printed and, with --json, saved."""
    rows = args.rows or [row for row in ROWS if args.questions or row != "evaluation"]
    if "evaluation" in rows and not (args.questions and args.questions.is_file()):
        bench_parser().error("evaluation asks the questions of a file: --questions FILE")
    rounds, more = (1, ["--quick"]) if args.quick else (args.rounds, [])
    more += ["--device", args.device, "--dtype", args.dtype]
    print(f"{args.dtype} on {card(args.device)}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, median of {rounds} rounds")
    print(f"{'':28}{'here':>10}{'peer':>10}{'ratio':>8}")
    if args.questions:
        os.environ["QUESTIONS"] = str(args.questions)
    results: dict[str, Any] = {}
    for row in rows:
        with tempfile.TemporaryDirectory() if row == "loading" else nullcontext(
                args.folder) as folder:
            if row == "loading":
                random_checkpoint(folder, work)
            results |= beside_peers(folder, [row], rounds, more)
    if args.json:
        checkpoint.save_json(args.json, machine(args.device, args.dtype) | {
            "folder": args.folder, "rounds": rounds, "work": work._asdict(), "rows": results})


def main() -> None:
    parser = bench_parser()
    args = parser.parse_args()
    work = (QUICK if args.quick else Work())._replace(device=args.device, dtype=args.dtype)
    if args.measure:
        row, side = args.measure
        print(json.dumps(measure(ROWS[row], int(side), args.folder, work)))
    elif args.grown:
        print(json.dumps({"bytes": grown(args.grown[0], bool(args.grown[1]), args.device)}))
    elif args.start:
        method, side, described = args.start
        size = Size(**json.loads(described))
        print(json.dumps(start_in_peft(method, size) if side == "peft" else
                         start_here(method, size, int(side == "shallow"))))
    elif args.growth is not None:
        print(f"fp32, {torch.get_num_threads()} threads, torch {torch.__version__}, at {BASE}")
        found = growth(args.growth or list(GROWTH), args.device)
        if args.json:
            checkpoint.save_json(args.json, machine(args.device, BASE.dtype)
                                 | {"base": BASE._asdict(), "growth": found})
        if args.plot:
            draw_growth(found, args.plot)
    elif args.starts or args.decompositions:
        size = Size.of(args.like, args.width, args.mlp, sequences=args.sequences, dtype=args.dtype,
                       form="plain" if args.plain else "fast",
                       device=args.device)
        print(f"{size.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, one "
              f"block of width {size.width}, MLP {size.mlp}, like {size.like}, {size.sequences} "
              "sequences")
        results: dict[str, Any] = {"size": size._asdict()}
        if args.decompositions:
            results["decompositions"] = decompositions(size.width, size.mlp, args.device)
        if args.starts:
            results["starts"] = starts(size, args.methods)
        if args.json:
            checkpoint.save_json(args.json, machine(args.device, args.dtype) | results)
    elif args.blocks:
        along_blocks(args.device)
    elif not args.folder or not os.path.exists(os.path.join(args.folder, "config.json")):
        parser.error(f"{args.folder or 'FOLDER'}: no config.json there")
    else:
        rows_beside_peers(args, work)


if __name__ == "__main__":
    main()
