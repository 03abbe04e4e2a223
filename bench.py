"""This project beside its peers: the same model, batch and settings, in one run.

    python bench.py FOLDER              FOLDER holds a Llama checkpoint (see README)
    python bench.py FOLDER --rows initialisation
    python bench.py --blocks            peak memory of the sweep as blocks are added; no FOLDER
    python bench.py --starts            the start of every method, beside peft's; no FOLDER
    python bench.py --decompositions    three ways to Eq. 13; no FOLDER

Every measurement is a process of its own, the two sides taking turns, so that their ratio holds
when the machine's speed drifts and peak memory is each side's own. Reported: the median over
the rounds, and the median of the ratios round by round. Needs requirements-dev.txt.

    training        beside transformers + peft: LoRA r = 32 on all seven linears, dropout 0.05,
                    AdamW, batch 8 of 128 to 256 tokens, loss on the last half of each: real
                    tokens per second, after one step
    generation      beside transformers: 16 prompts of 32 to 64 tokens, 64 new tokens each, greedy
    starts          seconds and memory added until the adapters are attached, on one random block
                    of Llama-2-7B's shapes (--width and --mlp for smaller ones), R = 128, 16
                    sequences of 256 tokens; the block is a deep one, "/ shallow" the other kind;
                    peft's, where it has the method, a sequence at a time
    decompositions  seconds of torch's SVD, of farss.svd and of the fp64 eigendecomposition of the
                    smaller Gram matrix, one random W of either shape
    initialisation  beside FARSS on factors of the whole model at once (kfac_factors), which need
                    the memory of all blocks: 16 sequences of 128 to 256 tokens, R = 32
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import checkpoint
import data
import farss
import model as M
import plan
import train
from baselines import METHODS
from settings import Settings

STEPS, NEW = 3, 64
LINEARS = M.DECODER_TARGETS["seven"]
BUDGET = farss.Budget(shallow=7, R=32, r_avg=12, r_min=1, r_max=16)


def prompts(vocab: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.linspace(32, 64, 16).long().tolist()
    return [torch.randint(3, vocab, (n,), generator=draw).tolist() for n in lengths]


def batches(vocab: int, count: int = 1 + STEPS) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)

    def batch():
        lengths = torch.randint(128, 257, (8,), generator=draw).tolist()
        return data.collate([data.Example(torch.randint(3, vocab, (n,), generator=draw).tolist(),
                                          n // 2) for n in lengths])

    return [batch() for _ in range(count)]


def tokens(work: list) -> int:
    return sum(int(b["attention_mask"].sum()) for b in work)


# --------------------------------------------------------------------------------------- training


def training_speed(model: Any, loss: Callable[[dict], torch.Tensor]) -> float:
    """Real tokens per second of steps on `loss(batch)`, the mean over the labelled tokens."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(batch):
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    first, *work = batches(model.config.vocab_size)
    step(first)
    began = time.perf_counter()
    for batch in work:
        step(batch)
    return tokens(work) / (time.perf_counter() - began)


def train_here(folder: str) -> float:
    model = checkpoint.load(folder, torch.float32, "cpu")
    train.initialise(model, Settings(model=folder, method="lora", rank=32, alpha=32.0), [])

    def loss(batch):
        total, n = model.loss(**batch)
        return total / n

    return training_speed(model, loss)


def train_peft(folder: str) -> float:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=32, lora_alpha=32, lora_dropout=0.05, target_modules=list(LINEARS)))
    return training_speed(model, lambda batch: model(**batch).loss)


# ------------------------------------------------------------------------------------- generation


def generate_here(folder: str) -> float:
    model = checkpoint.load(folder, torch.float32, "cpu")
    work = prompts(model.config.vocab_size)
    M.generate(model, work, 2)
    began = time.perf_counter()
    out = M.generate(model, work, NEW)
    return sum(map(len, out)) / (time.perf_counter() - began)


def generate_transformers(folder: str) -> float:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    work = prompts(model.config.vocab_size)
    longest = max(map(len, work))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in work])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in work])
    settings = dict(attention_mask=mask, do_sample=False, pad_token_id=0)
    model.generate(ids, max_new_tokens=2, min_new_tokens=2, **settings)
    began = time.perf_counter()
    out = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, **settings)
    return out[:, longest:].numel() / (time.perf_counter() - began)


# --------------------------------------------------------------------------------- initialisation


def initialise_by_sweep(folder: str) -> float:
    model = checkpoint.load(folder, torch.float32, "cpu")
    work = batches(model.config.vocab_size, 2)
    began = time.perf_counter()
    measured = farss.measure(model, work, M.linear_names(model, LINEARS), BUDGET)
    farss.build_adapters(measured, BUDGET)
    return tokens(work) / (time.perf_counter() - began)


@torch.no_grad()
def initialise_whole(folder: str) -> float:
    """The same adapters from kfac_factors: one pass, the factors of all blocks at once."""
    model = checkpoint.load(folder, torch.float32, "cpu")
    work, names = batches(model.config.vocab_size, 2), M.linear_names(model, LINEARS)
    began = time.perf_counter()
    factors = farss.kfac_factors(model, work, names)
    weights = {n: model.get_parameter(f"{n}.weight") for n in names}
    measured = {n: farss.measure_layer(n, W, *factors[n], BUDGET, 0.0) for n, W in weights.items()}
    farss.build_adapters(measured, BUDGET)
    return tokens(work) / (time.perf_counter() - began)


BLOCKS = (4, 8, 16, 32)
NARROW: dict[str, Any] = dict(
    vocab_size=64, hidden_size=64, intermediate_size=2048, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, max_position_embeddings=512)


def grown(blocks: int, whole: bool) -> float:
    """Bytes that the factors add to the process, on a random model of `blocks` narrow blocks.

    Kept inputs and candidates, which must grow with the blocks, are a hundredth of the factors.
    """
    model = M.CausalLM(M.Config(num_hidden_layers=blocks, **NARROW)).eval()
    work, names = batches(64, 1), M.linear_names(model, LINEARS)
    budget = farss.Budget(1, 2, 1, 1, 2)
    farss.measure(model, work, names[-7:-6], budget)  # what torch itself takes at first use
    before = plan.memory_used("cpu")
    if whole:
        farss.kfac_factors(model, work, names)
        return plan.memory_used("cpu") - before
    farss.measure(model, work, names, budget)
    return plan.memory_used("cpu") - before


# ----------------------------------------------------------------------- the start of every method

SEQUENCES, LENGTH, RANK = 16, 256, 128


def one_block(width: int, mlp: int) -> M.Config:
    heads = max(1, width // 128)
    return M.Config(512, width, mlp, 1, heads, heads, width // heads)


def sequences() -> list[data.Example]:
    draw = torch.Generator().manual_seed(0)
    return [data.Example(torch.randint(3, 512, (LENGTH,), generator=draw).tolist(), LENGTH // 2)
            for _ in range(SEQUENCES)]


def start_here(method: str, width: int, mlp: int, shallow: bool = False) -> dict[str, float]:
    """Seconds and bytes that a method's start takes."""
    torch.manual_seed(0)
    model = M.CausalLM(one_block(width, mlp)).eval()
    s = Settings(model="a random block", method=method, shallow=int(shallow), rank=RANK,
                 alpha=float(RANK), device="cpu", dtype="float32", calibration_examples=SEQUENCES)
    before, began = plan.memory_used("cpu"), time.perf_counter()
    train.initialise(model, s, sequences())
    return {"seconds": time.perf_counter() - began, "bytes": plan.memory_used("cpu") - before}


def peft_start(method: str) -> dict[str, Any] | None:
    """How peft is told of a method; None where it has it not."""
    import peft
    from peft.tuners.lora.config import CordaConfig

    known: dict[str, dict[str, Any]] = {
        "lora": {}, "pissa": {"init_lora_weights": "pissa"},
        "kasa": {"kasa_config": peft.KasaConfig()}}
    for name in ("kpm", "ipm"):
        known[f"corda-{name}"] = {"init_lora_weights": "corda",
                                  "corda_config": CordaConfig(corda_method=name)}
    return known.get(method)


def start_in_peft(method: str, width: int, mlp: int) -> dict[str, float]:
    import peft
    import transformers
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **{k: v for k, v in checkpoint.config_json(one_block(width, mlp)).items()
           if k not in ("architectures", "model_type")})).eval()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS),
                             **(peft_start(method) or {}))

    @torch.no_grad()
    def run_model():
        for e in sequences():
            model(torch.tensor([e.ids]))

    before, began = plan.memory_used("cpu"), time.perf_counter()
    if config.corda_config is not None:
        preprocess_corda(model, config, run_model=run_model)
    peft.get_peft_model(model, config)
    return {"seconds": time.perf_counter() - began, "bytes": plan.memory_used("cpu") - before}


def starts(width: int, mlp: int, methods: list[str]) -> None:
    print(f"{'method':16}{'seconds':>9}{'GB added':>10}{'peft: seconds':>15}{'GB added':>10}")
    size = (str(width), str(mlp))
    for method in methods:
        kinds = {method: "here", f"{method} / shallow": "shallow"}
        for name, side in list(kinds.items())[: 1 + METHODS[method].adaptive]:
            here = fresh("--start", method, side, *size)
            line = f"{name:16}{here['seconds']:>9.1f}{here['bytes'] / 1e9:>10.2f}"
            if peft_start(method) is not None:
                there = fresh("--start", method, "peft", *size)
                line += f"{there['seconds']:>15.1f}{there['bytes'] / 1e9:>10.2f}"
            print(line, flush=True)


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
    "farss.svd": farss.svd, "smaller side": farss.smaller_side, "fp64 Gram": gram_svd}


def decompositions(width: int, mlp: int) -> None:
    print(f"{'shape':>14}" + "".join(f"{name:>18}" for name in WAYS))
    for m, n in ((width, width), (width, mlp)):
        W = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
        took = []
        for way in WAYS.values():
            began = time.perf_counter()
            way(W)
            took.append(time.perf_counter() - began)
        print(f"{f'{m} x {n}':>14}" + "".join(f"{t:>16.1f} s" for t in took), flush=True)


# --------------------------------------------------------------------------------------- measuring

# row: (this project, its peer, the peer's name)
ROWS: dict[str, tuple[Callable[[str], float], Callable[[str], float], str]] = {
    "training": (train_here, train_peft, "transformers + peft"),
    "generation": (generate_here, generate_transformers, "transformers"),
    "initialisation": (initialise_by_sweep, initialise_whole, "all factors at once"),
}


def fresh(*arguments: str, **environment: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True,
                          env=os.environ | environment)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        sys.exit(f"bench.py: {' '.join(arguments)}: {line}")
    return json.loads(done.stdout.splitlines()[-1])


def beside_peers(folder: str, rows: list[str], rounds: int) -> None:
    print(f"{'':26}{'here':>10}{'peer':>10}{'ratio':>8}")
    for row in rows:
        runs = [[fresh(folder, "--measure", row, str(side)) for side in (0, 1)]
                for _ in range(rounds)]
        for what in ("tokens/s", "peak GB"):
            here, there = (statistics.median(r[side][what] for r in runs) for side in (0, 1))
            ratio = statistics.median(r[0][what] / r[1][what] for r in runs)
            print(f"{row + ', ' + what:26}{here:>10.2f}{there:>10.2f}{ratio:>8.2f}  "
                  f"peer: {ROWS[row][2]}", flush=True)


def along_blocks() -> None:
    print(f"{'blocks':>8}{'sweep, MB added':>18}{'all factors at once':>22}")
    # Freed memory goes back to the system at once; else the peak would tell of malloc's free lists.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for blocks in BLOCKS:
        added = [fresh("--grown", str(blocks), str(whole), **exact)["bytes"] for whole in (0, 1)]
        print(f"{blocks:>8}{added[0] / 1e6:>18.0f}{added[1] / 1e6:>22.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="a Llama checkpoint in Hugging Face form")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--blocks", action="store_true", help="memory against number of blocks")
    parser.add_argument("--starts", action="store_true", help="the start of every method")
    parser.add_argument("--methods", nargs="+", help="of --starts; default: all",
                        choices=(adapted := [m for m, r in METHODS.items()
                                             if r.trains == "adapters"]), default=adapted)
    parser.add_argument("--decompositions", action="store_true", help="three ways to Eq. 13")
    parser.add_argument("--width", type=int, default=4096, help="of --starts; default %(default)s")
    parser.add_argument("--mlp", type=int, default=11008, help="of --starts; default %(default)s")
    parser.add_argument("--start", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--grown", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        here, there, _ = ROWS[args.measure[0]]
        speed = (there if int(args.measure[1]) else here)(args.folder)
        print(json.dumps({"tokens/s": speed, "peak GB": plan.memory_used("cpu") / 1e9}))
    elif args.grown:
        print(json.dumps({"bytes": grown(args.grown[0], bool(args.grown[1]))}))
    elif args.start:
        method, side, width, mlp = args.start
        size = int(width), int(mlp)
        print(json.dumps(start_in_peft(method, *size) if side == "peft" else
                         start_here(method, *size, side == "shallow")))
    elif args.starts or args.decompositions:
        print(f"fp32, {torch.get_num_threads()} threads, torch {torch.__version__}, one block of "
              f"width {args.width}, MLP {args.mlp}")
        if args.decompositions:
            decompositions(args.width, args.mlp)
        if args.starts:
            starts(args.width, args.mlp, args.methods)
    elif args.blocks:
        along_blocks()
    elif not args.folder or not os.path.exists(os.path.join(args.folder, "config.json")):
        parser.error(f"{args.folder or 'FOLDER'}: no config.json there")
    else:
        print(f"fp32, {torch.get_num_threads()} threads, torch {torch.__version__}, "
              f"median of {args.rounds} rounds")
        beside_peers(args.folder, args.rows, args.rounds)


if __name__ == "__main__":
    main()
