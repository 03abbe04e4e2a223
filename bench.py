"""This project beside transformers + peft: the same model, batch and settings, in one run.

    python bench.py FOLDER              FOLDER holds a Llama checkpoint (see README)

Every measurement is a process of its own, the two sides taking turns, so that their ratio holds
when the machine's speed drifts and peak memory is each side's own. Reported: the median over
the rounds, and the median of the ratios round by round. Needs requirements-dev.txt.

    training     LoRA r = 32 on all seven linears, dropout 0.05, AdamW, batch 8 of 128 to 256
                 tokens, loss on the last half of each: real tokens per second, after one step
    generation   16 prompts of 32 to 64 tokens, 64 new tokens each, greedy: new tokens per second
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

STEPS, NEW = 3, 64


def prompts(vocab: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.linspace(32, 64, 16).long().tolist()
    return [torch.randint(3, vocab, (n,), generator=draw).tolist() for n in lengths]


def batches(vocab: int) -> list[dict[str, torch.Tensor]]:
    import data

    draw = torch.Generator().manual_seed(0)

    def batch():
        lengths = torch.randint(128, 257, (8,), generator=draw).tolist()
        return data.collate([data.Example(torch.randint(3, vocab, (n,), generator=draw).tolist(),
                                          n // 2) for n in lengths])

    return [batch() for _ in range(1 + STEPS)]


def timed(step, work: list) -> float:
    """Seconds for all but the first item of `work`."""
    step(work[0])
    began = time.perf_counter()
    for item in work[1:]:
        step(item)
    return time.perf_counter() - began


def tokens(work: list) -> int:
    return sum(int(b["attention_mask"].sum()) for b in work[1:])


def training_speed(model: torch.nn.Module, loss) -> float:
    """Real tokens per second of steps on `loss(batch)`, the mean over the labelled tokens."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(batch):
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    work = batches(model.config.vocab_size)
    return tokens(work) / timed(step, work)


def train_here(folder: str) -> float:
    import model as M
    import train

    model = M.load(folder, torch.float32, "cpu")
    train.initialise(model, train.Settings(model=folder, method="lora", rank=32, alpha=32.0), [])

    def loss(batch):
        total, n = model.loss(**batch)
        return total / n

    return training_speed(model, loss)


def train_peft(folder: str) -> float:
    import peft
    import transformers

    import train

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=32, lora_alpha=32, lora_dropout=0.05, target_modules=list(train.LINEARS)))
    return training_speed(model, lambda batch: model(**batch).loss)


def generate_here(folder: str) -> float:
    import model as M

    model = M.load(folder, torch.float32, "cpu")
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


ROWS = {"training": (train_here, train_peft), "generation": (generate_here, generate_transformers)}


def measure(row: str, side: int, folder: str) -> dict[str, float]:
    """One measurement in a fresh process."""
    done = subprocess.run([sys.executable, __file__, folder, "--measure", row, str(side)],
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench.py: {row}, side {side}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a Llama checkpoint in Hugging Face form")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        import train

        speed = ROWS[args.measure[0]][int(args.measure[1])](args.folder)
        print(json.dumps({"tokens/s": speed, "peak GB": train.memory_used("cpu") / 1e9}))
        return
    if not os.path.exists(os.path.join(args.folder, "config.json")):
        parser.error(f"{args.folder}: no config.json there")
    print(f"fp32, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"median of {args.rounds} rounds")
    print(f"{'':24}{'here':>10}{'transformers + peft':>22}{'ratio':>8}")
    for row in args.rows:
        rounds = [[measure(row, side, args.folder) for side in (0, 1)]
                  for _ in range(args.rounds)]
        for what in ("tokens/s", "peak GB"):
            here, there = (statistics.median(r[side][what] for r in rounds) for side in (0, 1))
            ratio = statistics.median(r[0][what] / r[1][what] for r in rounds)
            print(f"{row + ', ' + what:24}{here:>10.2f}{there:>22.2f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
