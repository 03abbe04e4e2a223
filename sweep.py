"""Many runs, one table: methods x learning rates x seeds, each a run of train.py and eval.py.

    python sweep.py --jobs 2                          the microcosm: every method over its grid
    python sweep.py --model FOLDER --lrs 1e-4 2e-4 --seeds 0 1 -- --data FILE --steps 500
    python sweep.py --jobs 2 --results microcosm      the stored results of this repository again

What is finished is not run again and what was stopped goes on, so after Ctrl-C the same command
continues. Everything behind -- goes to train.py. Writes into the folder of results, after each
run: results.csv (one line a run), base.json and full.json (what K and T divide by); at the end
results.txt (mean ± standard deviation over the seeds) and results.png (K against T).

T divides by full fine-tuning at its own best learning rate, averaged over the seeds: the rate at
which the harmonic mean of K and the task's score is highest.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

import checkpoint
import data
import eval as evaluation
import farss
import figures
import plan
from benchmarks import of_task
from checkpoint import UserError
from methods import METHODS
from results import mean_parts, read_results, scores_in
from settings import (
    Parser,
    Settings,
    finished,
    is_run,
    model_name,
    preset,
    provenance,
    read_run,
    run_main,
    settle,
    training_arguments,
    usual_form,
)

HERE = Path(__file__).resolve().parent
REFERENCE = "full"  # the method that T divides by (Eq. 37)


@dataclass(frozen=True)
class Job:
    """One run: its folder, its flags for train.py, and the settings that these mean."""

    run: Path
    flags: list[str]
    settings: Settings
    steps: int

    def done(self) -> bool:
        """Trained, and scored on every benchmark: eval.py writes results.json after each."""
        if not finished(self.run) or not (self.run / "results.json").exists():
            return False
        scored = read_results(self.run)["benchmarks"]
        return set(of_task(self.settings.task)) <= set(scored)

    def commands(self) -> list[list[str]]:
        """What is still to be run of it: train.py, unless that is done, then eval.py."""
        train = ["train.py", *(["--resume", str(self.run)] if is_run(self.run) else
                               [*self.flags, "--out", str(self.run)])]
        return [*([] if finished(self.run) else [train]), ["eval.py", str(self.run)]]

    def steps_done(self) -> int:
        log = self.run / "log.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0


def make_job(out: Path, flags: list[str]) -> Job:
    """UserError for flags that train.py would refuse, or a folder that holds another run."""
    s, config = settle(training_arguments(None, flags))
    run = out / f"{s.method}-lr{s.lr:g}-s{s.seed}"
    if is_run(run):
        machine = dict.fromkeys(("micro_batch", "checkpointing", "device", "dtype"))
        mine, there = (asdict(x) | machine for x in (s, read_run(run)[0]))
        unlike = [name for name in mine if mine[name] != there[name]]
        if unlike:
            raise UserError(f"{run}: was run with another {', '.join(unlike)}; choose another "
                            "--out, or remove it")
    return Job(run, flags, s, plan.make(s, config).steps)


# --------------------------------------------------------------------------------------- running


def start(job: Job, command: list[str], threads: int) -> subprocess.Popen:
    """A command of the job in a new process, its output in a file beside the run's folder."""
    job.run.parent.mkdir(parents=True, exist_ok=True)
    script, *arguments = command
    with open(f"{job.run}.log", "a") as log:
        return subprocess.Popen([sys.executable, str(HERE / script), *arguments], stdout=log,
                                stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def run_all(jobs: list[Job], parallel: int) -> Iterable[Job]:
    """Run what is not done, `parallel` at a time; yields each job that it ran when it is done.

    Raises UserError with the last line of a run that failed. However it ends, the runs that are
    under way are told to save and stop, and are waited for.
    """
    to_do = [job for job in jobs if not job.done()]
    waiting = list(to_do)
    running: dict[subprocess.Popen, tuple[Job, list[list[str]]]] = {}  # and what is to follow
    threads = max(1, (os.cpu_count() or 1) // parallel)
    bar = tqdm(total=sum(job.steps for job in to_do), desc="runs", unit="step", disable=None)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` is reached
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                first, *rest = job.commands()
                running[start(job, first, threads)] = job, rest
            time.sleep(0.2)
            bar.update(sum(job.steps_done() for job in to_do) - bar.n)
            bar.set_postfix_str(", ".join(job.run.name for job, _ in running.values()))
            for process in [p for p in running if p.poll() is not None]:
                job, rest = running.pop(process)
                if process.returncode:
                    lines = Path(f"{job.run}.log").read_text().strip().splitlines() or [""]
                    raise UserError(f"{job.run} ended with {process.returncode}: {lines[-1]}")
                if rest:
                    running[start(job, rest[0], threads)] = job, rest[1:]
                else:
                    yield job
    finally:
        bar.close()
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------- results


def base_results(model: str, task: str, out: Path) -> dict:
    """Scores of the untouched model, evaluated once."""
    if not (out / "base" / "results.json").exists():
        done = subprocess.run([sys.executable, str(HERE / "eval.py"), model, "--benchmarks",
                               ",".join(of_task(task)), "--out", str(out / "base")])
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
    return read_results(out / "base")


def mean_score(results: dict, group: str) -> float:
    """Mean score in % of the benchmarks of a group."""
    return fmean(scores_in(results, group).values())


def row_of(job: Job, base: dict) -> dict[str, Any]:
    """What results.csv says of one run, but for T, which needs all of them."""
    s, results = job.settings, read_results(job.run)
    ranks = job.run / "ranks.json"
    report = checkpoint.read_json(ranks) if ranks.exists() else {}
    log = figures.read_log(job.run)
    scores = scores_in(results)
    known = scores_in(results, data.TASKS[s.task].knowledge)
    before = {c: scores_in(base)[c] for c in known}
    return {
        "method": s.method, "lr": s.lr, "seed": s.seed, **scores, **mean_parts(results),
        "K": farss.knowledge_score(known, before),
        "task_score": mean_score(results, data.TASKS[s.task].group),
        "trainable": results["trainable"],
        "shallow_rank_asked": report.get("shallow_rank_asked", ""),
        "shallow_rank_obtained": report.get("shallow_rank_obtained", ""),
        "last_loss": fmean(line["loss"] for line in log[-10:]),
        "init_seconds": report.get("seconds", 0.0),
        "train_seconds": round(sum(line["tokens"] / line["tokens_per_s"] for line in log), 1),
        "memory_gb": max(line["memory_gb"] for line in log),
        "commit": results["commit"],
        "start_form": s.form, "layers_form": usual_form(checkpoint.config_of(s.model)),
    }


def best_rate(rows: list[dict], method: str) -> float | None:
    """The learning rate with the highest harmonic mean of K and the task's score."""
    means = {lr: farss.harmonic_mean(fmean(r["K"] for r in group),
                                          fmean(r["task_score"] for r in group) / 100)
             for (name, lr), group in figures.by_setting(rows).items() if name == method}
    return max(means, key=lambda lr: means[lr]) if means else None


def full_results(jobs: list[Job], lr: float) -> dict:
    """Full fine-tuning at this rate, its scores averaged over the seeds, as a results.json."""
    runs = [read_results(job.run) for job in jobs
            if job.settings.method == REFERENCE and job.settings.lr == lr]
    first = runs[0]
    benchmarks = {
        name: b
        | ({"score": fmean(r["benchmarks"][name]["score"] for r in runs)} if "score" in b else {})
        | {several: {part: fmean(r["benchmarks"][name][several][part] for r in runs)
                     for part in b[several]} for several in ("scores", "parts") if several in b}
        for name, b in first["benchmarks"].items()}
    for b in benchmarks.values():
        for of_one_run in ("correct", "seconds", "answer_loss"):
            b.pop(of_one_run, None)
    return {key: first[key] for key in ("model", "method", "task", "trainable", "dtype",
                                        "base_fingerprint", "settings")} | {
        "seeds": [r["seed"] for r in runs], "benchmarks": benchmarks} | provenance()


def write_results(folder: Path, jobs: list[Job], base: dict) -> list[dict]:
    """results.csv, base.json, full.json of what is done; returns the rows, T and KT included."""
    done = [job for job in jobs if job.done()]
    rows = [row_of(job, base) for job in done]
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_json(folder / "base.json", base)
    lr = best_rate(rows, REFERENCE)
    if lr is not None:
        full = full_results(done, lr)
        full["summary"] = evaluation.summarise(full, folder / "base.json", None)
        checkpoint.save_json(folder / "full.json", full)
        whole = scores_in(full, data.TASKS[full["task"]].group)
        for row in rows:
            row["T"] = farss.task_score({name: row[name] for name in whole}, whole)
            row["KT"] = farss.harmonic_mean(row["K"], row["T"])
    if rows:
        with checkpoint.atomic(folder / "results.csv") as temporary, \
                open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: round(v, 4) if isinstance(v, float) and k != "lr" else v
                                 for k, v in row.items()})
    return rows


def read_csv(folder: Path) -> list[dict[str, str]]:
    """results.csv of a folder of results; nothing where there is none."""
    path = folder / "results.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def mean_and_spread(values: list[float], digits: int) -> str:
    """"0.85 ± 0.03", mean and standard deviation; of one value the value."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def check_results(folder: Path, jobs: list[Job]) -> None:
    """Never let results of other runs go: UserError if results.csv has some."""
    mine = {(job.settings.method, job.settings.lr, job.settings.seed) for job in jobs}
    for r in read_csv(folder):
        if (r["method"], float(r["lr"]), int(r["seed"])) not in mine:
            raise UserError(f"{folder / 'results.csv'} holds {r['method']} at {r['lr']}, which "
                            "this command does not run; choose another --results")


def table(rows: list[dict]) -> list[str]:
    """One line per method and learning rate, mean ± standard deviation over the seeds."""
    plain = {"method", "lr", "seed", "commit", "start_form", "layers_form", "task_score",
             "shallow_rank_asked", "trainable", "shallow_rank_obtained", "last_loss",
             "init_seconds", "train_seconds", "memory_gb"}
    columns = [c for c in rows[0] if c not in plain]
    width = {c: max(len(c), 13) + 2 for c in columns}
    lines = [f"{'method':8}{'lr':>8}{'seeds':>7}{'trainable':>11}{'init s':>8}{'train s':>9}"
             f"{'GB':>6}" + "".join(f"{c:>{width[c]}}" for c in columns)]
    for (method, lr), group in figures.by_setting(rows).items():
        def mean(column: str, group: list[dict] = group) -> float:
            return fmean(row[column] for row in group)

        cells = [mean_and_spread([r[c] for r in group], 3 if c in ("K", "T", "KT") else 1)
                 .rjust(width[c]) for c in columns]
        lines.append(f"{method:8}{lr:>8g}{len(group):>7}{mean('trainable') / 1e6:>10.2f}M"
                     f"{mean('init_seconds'):>8.1f}{mean('train_seconds'):>9.0f}"
                     f"{mean('memory_gb'):>6.1f}" + "".join(cells))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=Settings.model, help="default %(default)s")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=tuple(METHODS),
                        help="default: all")
    parser.add_argument("--lrs", nargs="+", type=float, help="learning rates of every method "
                        "(default: the model's grid, see settings.PRESETS)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, the cores shared "
                        "among them; default 1")
    parser.add_argument("--out", type=Path, help="folder of the runs (default "
                        "runs/sweep-<model>-<task>)")
    parser.add_argument("--results", type=Path, help="folder of the results (default: --out)")
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="behind --: for train.py")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    common = ["--model", args.model, *args.flags]
    s, _ = settle(training_arguments(None, common))
    if not data.TASKS[s.task].knowledge:
        parser.error(f"--task {s.task}: a sweep weighs T against K, and this task has no K; "
                     "run train.py for each rate and seed")
    grid = preset(s.model, s.task).grid or {}
    out = args.out or Path("runs") / f"sweep-{model_name(args.model)}-{s.task}"
    without = [m for m in args.methods if not args.lrs and m not in grid]
    if without:
        parser.error(f"no learning rates are known for {', '.join(without)} on {args.model}; "
                     "give --lrs")
    every = [make_job(out, [*common, "--method", m, "--lr", f"{lr:g}", "--seed", str(seed)])
             for m in args.methods for lr, seed in product(args.lrs or grid[m], args.seeds)]
    jobs = list({job.run: job for job in every}.values())  # a rate given twice is one run
    results = args.results or out
    check_results(results, jobs)
    base = base_results(s.model, s.task, out)
    for _ in run_all(jobs, args.jobs):
        write_results(results, jobs, base)
    rows = write_results(results, jobs, base)
    text = "\n".join(table(rows)) + "\n"
    checkpoint.save_text(results / "results.txt", text)
    print(text, end="")
    pyplot = figures.plotting()
    if pyplot is None:
        print(figures.MISSING)
    elif "T" in rows[0]:
        figures.draw_tradeoff(pyplot, rows, results / "results.png")
    else:
        print(f"no T and no results.png: they need runs of the method {REFERENCE}")


if __name__ == "__main__":
    run_main(main)
