"""What commands do on a GPU: the CUDA tests, and runs on a real model; parts 1 and 7 of
bench_gpu.py.

    gpu_tests     tests/test_cuda.py, several at a time
    real_model    FARSS, killed and resumed, and LoRA on GSM8K; logits and greedy answers beside
                  transformers; NQ-Open before and after
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import benchmarks
import checkpoint
import data
import model as M
from checkpoint import UserError
from measuring import Job, Measurement, is_cuda, padded_left

REPO = Path(__file__).resolve().parent
TOGETHER = 8  # processes of tests at most, each with a CUDA context of its own
TRAINED_ON, ASKED = "gsm8k_train.jsonl", "nq_open_dev.jsonl"
BENCHMARK = "nq_open"

# --------------------------------------------------------------------------------- part 1: tests


def pytest_command(job: Job) -> list[str]:
    """With pytest-xdist several at a time, where the device is a GPU."""
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-p", "no:cacheprovider",
               "-rfE", "--tb=short", "--device", job.device]
    if is_cuda(job.device) and find_spec("xdist"):
        command += ["-n", str(min(TOGETHER, os.cpu_count() or 1))]
    return command + (["-k", job.scale.tests] if job.scale.tests else [])


def run_tests(job: Job) -> dict[str, Any]:
    """How many passed, failed and were skipped, and the names of those that failed."""
    if not find_spec("pytest"):
        raise ImportError("pytest is not installed", name="pytest")
    command = pytest_command(job)
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(done.stdout, done.stderr)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}: "
                           + (done.stdout.strip().splitlines() or [""])[-1])
    return counted(done.stdout) | {"processes": command[command.index("-n") + 1]
                                   if "-n" in command else 1}


def counted(said: str) -> dict[str, Any]:
    """What pytest's summary says."""
    last = said.strip().splitlines()[-1]
    found: dict[str, Any] = {
        name: int((re.search(rf"(\d+) {word}", last) or [0, 0])[1])
        for name, word in (("passed", "passed"), ("failed", "(?:failed|error)"),
                           ("skipped", "skipped"))}
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)", said, re.MULTILINE)
    return found | ({"failure": failures} if failures else {})


def gpu_tests(job: Job) -> Iterator[Measurement]:
    """Part 1."""
    yield "tests/test_cuda.py", partial(run_tests, job)


# ---------------------------------------------------------------------------- part 7: a real model


def file_of(job: Job, name: str) -> Path:
    """Where a file of questions is; UserError where it is not."""
    for folder in job.data:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"no {name} in {' or '.join(map(str, job.data))}; give --data FOLDER")


def training_command(job: Job, method: str, run: Path) -> list[str]:
    scale = job.scale
    return [str(REPO / "train.py"), "--model", str(job.model), "--task", "math", "--data",
            str(file_of(job, TRAINED_ON)), "--method", method, "--steps", str(scale.run_steps),
            "--batch-size", str(scale.batch), "--device", job.device, "--out", str(run),
            "--save-every", str(max(1, scale.run_steps // 4))]


def log_of(run: Path) -> list[dict[str, Any]]:
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()
            if line.endswith("}")] if path.exists() else []


def run_until(command: list[str], run: Path, step: int | None) -> list[dict[str, Any]]:
    """Run train.py, to its end or until it has logged so many steps, then kill it: its log."""
    process = subprocess.Popen([sys.executable, *command], cwd=run.parent)
    while process.poll() is None:
        if step and len(log_of(run)) >= step:
            process.kill()
            process.wait()
            return log_of(run)
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"train.py ended with {process.returncode}; see log.txt")
    return log_of(run)


def train_run(job: Job, run: Path, method: str, killed: bool) -> dict[str, Any]:
    """A run's losses, its speed, and seconds with all starts. One that was killed is resumed: the
    steps behind its checkpoint are taken twice, and must come to the same losses."""
    began, steps, twice = time.perf_counter(), job.scale.run_steps, {}
    before = run_until(training_command(job, method, run), run, steps * 5 // 8 if killed else None)
    log = before
    if killed and len(before) < steps:
        log = run_until([str(REPO / "train.py"), "--resume", str(run)], run, None)
        twice = {"killed at": len(before), "loss differs by": max(
            abs(a["loss"] - b["loss"]) for a, b in zip(before, log, strict=False))}
    few = max(1, steps // 10)
    losses = [line["loss"] for line in log]
    return {"steps": len(log), "first loss": mean(losses[:few]), "last loss": mean(losses[-few:]),
            "tokens/s": median(line["tokens_per_s"] for line in log),
            "peak GB": max(line["memory_gb"] for line in log),
            "seconds": time.perf_counter() - began} | twice


def asked(job: Job) -> list[benchmarks.Question]:
    return benchmarks.questions(BENCHMARK, data.read_rows(str(file_of(job, ASKED))))


def both_models(job: Job, dtype: torch.dtype) -> tuple[Any, Any]:
    """The folder's model here and in transformers."""
    import transformers

    folder = str(job.model)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return checkpoint.load(folder, dtype, job.device), theirs.to(job.device).eval()


def encoded(job: Job, config: M.Config) -> list[list[int]]:
    """The first questions as tokens."""
    tokenizer = checkpoint.Tokenizer(Path(str(job.model)), config)
    return [tokenizer.encode(q.prompt) for q in asked(job)[: job.scale.answers]]


@torch.no_grad()
def logits(job: Job, dtype: torch.dtype) -> dict[str, float]:
    """Relative distance of the logits of some questions from transformers'."""
    ours, theirs = both_models(job, dtype)
    batch = padded_left(encoded(job, ours.config)[:8], job.device)
    real = batch["attention_mask"].bool()
    a = ours(batch["input_ids"], batch["attention_mask"])[real].float()
    b = theirs(**batch).logits[real].float()
    return {"distance": ((a - b).norm() / b.norm()).item()}


def answers(job: Job) -> dict[str, Any]:
    """How many greedy answers are transformers' to the token, in fp32."""
    ours, theirs = both_models(job, torch.float32)
    work, most = encoded(job, ours.config), job.scale.answer
    ends = set(ours.config.eos_token_ids)
    here = M.generate(ours, work, most, ends)
    batch = padded_left(work, job.device)
    with torch.no_grad():
        out = theirs.generate(**batch, max_new_tokens=most, do_sample=False, pad_token_id=0,
                              eos_token_id=list(ends))
    there = [until(row, ends) for row in out[:, batch["input_ids"].shape[1] :].tolist()]
    return {"equal": sum(a == b for a, b in zip(here, there, strict=True)), "of": len(work)}


def until(tokens: list[int], ends: set[int]) -> list[int]:
    """What stands before the first token of `ends`."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def evaluate(job: Job, target: Path) -> dict[str, Any]:
    """Score and seconds of eval.py on NQ-Open, of the model or of a run."""
    work = target.parent if target != job.model else Path(tempfile.gettempdir())
    began = time.perf_counter()
    subprocess.run([sys.executable, str(REPO / "eval.py"), str(target), "--benchmarks", BENCHMARK,
                    "--data", f"{BENCHMARK}={file_of(job, ASKED)}", "--limit",
                    str(job.scale.questions), "--device", job.device], cwd=work, check=True)
    folder = target if target != job.model else work / "runs" / f"{target.name}-base"
    found = json.loads((folder / "results.json").read_text())["benchmarks"][BENCHMARK]
    return {"score": found["score"], "questions": found["n"],
            "seconds": time.perf_counter() - began}


def real_model(job: Job) -> Iterator[Measurement]:
    """Part 7."""
    assert job.model is not None
    for name in (TRAINED_ON, ASKED):
        file_of(job, name)
    with tempfile.TemporaryDirectory() as folder:
        steps = f"{job.scale.run_steps} steps"
        farss, lora = Path(folder) / "farss", Path(folder) / "lora"
        yield f"FARSS, {steps}, killed, resumed", partial(train_run, job, farss, "farss", True)
        yield f"LoRA, {steps}", partial(train_run, job, lora, "lora", False)
        for dtype in (torch.float32, torch.bfloat16):
            yield f"logits, {str(dtype)[6:]}", partial(logits, job, dtype)
        yield "greedy answers", partial(answers, job)
        for target in (job.model, farss):
            yield f"NQ-Open, {'FARSS' if target == farss else 'untouched'}", partial(
                evaluate, job, target)
