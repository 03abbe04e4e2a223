"""FARSS and LoRA on the microcosm, side by side: `python train.py` without arguments runs this.

Two runs of 200 steps, one a core where there are two; then what each learnt and what it forgot,
beside the untouched model and full fine-tuning (both stored in microcosm/). Finished runs are kept
in runs/demo and not run again.
"""

import os
from pathlib import Path
from typing import Any

import checkpoint
import eval as evaluation
import figures
import sweep
from results import mean_parts, read_results, table
from settings import Settings, default_task, preset

COMPARED = ("lora", "farss")
OUT = Path("runs") / "demo"


def row(results: dict) -> dict[str, float]:
    """What the demo speaks of, in %: the task, and what is known of frequent and rare people."""
    return {"word problems": results["benchmarks"]["word_problems"]["score"],
            **mean_parts(results)}


def sentences(base: dict, runs: dict[str, dict], stored: list[dict[str, str]]) -> list[str]:
    """What was seen, and what one seed cannot say."""
    before = row(base)
    seen = "; ".join(
        f"{name} solves {row(r)['word problems']:.0f} % of them and still knows "
        f"{row(r)['frequent']:.0f} % of the facts about frequent people and {row(r)['rare']:.0f} % "
        f"about rare ones (K {r['summary']['K']:.2f}, T {r['summary']['T']:.2f}, KT "
        f"{r['summary']['KT']:.2f})" for name, r in runs.items())
    said = [f"Before fine-tuning the model knows {before['frequent']:.0f} % of the facts about "
            f"frequent people and {before['rare']:.0f} % of those about rare ones, and solves "
            f"{before['word problems']:.0f} % of the word problems.",
            f"After it, {seen}."]
    spread = "; ".join(
        f"{name} K {spell(stored, name, r['settings']['lr'], 'K')}, "
        f"T {spell(stored, name, r['settings']['lr'], 'T')}" for name, r in runs.items())
    said.append(f"This is one seed at one learning rate; over the seeds of microcosm/results.csv "
                f"it is {spread}, and other rates trade K against T (microcosm/results.png).")
    return said


def spell(stored: list[dict[str, str]], method: str, lr: float, column: str) -> str:
    """Mean ± standard deviation over the stored seeds of a method at a learning rate."""
    values = [float(r[column]) for r in stored if r["method"] == method and float(r["lr"]) == lr]
    return sweep.mean_and_spread(values, 2) if len(values) > 1 else "not measured"


def draw_scores(pyplot: Any, results: list[dict], path: Path) -> None:
    """Bars: task and knowledge, before and after."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    names = list(row(results[0]))
    shades: list[Any] = ["0.85", "0.6", "0.35", "0.1"]
    for i, r in enumerate(results):
        axes.bar([x + 0.2 * i for x in range(len(names))], list(row(r).values()), 0.18,
                 label={"base": "before", "full": "full fine-tuning"}.get(r["method"], r["method"]),
                 color=shades[i], edgecolor="black", linewidth=0.5)
    axes.set_xticks([x + 0.3 for x in range(len(names))],
                    ["task:\nword problems", "facts about\nfrequent people",
                     "facts about\nrare people"])
    axes.set_ylabel("right answers, %")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.15))
    figures.save(pyplot, figure, path)


def main(flags: list[str] | None = None, out: Path = OUT) -> None:
    """Run what is missing, then table, picture and three sentences; `flags` go to train.py."""
    model = Settings.model
    stored = preset(model, default_task(model))
    assert stored.base_results and stored.full_results
    jobs = [sweep.make_job(out, [*(flags or []), "--method", m]) for m in COMPARED]
    print(f"{' and '.join(COMPARED)} on the {model}, {jobs[0].steps} steps each; kept in {out}")
    for _ in sweep.run_all(jobs, min(len(jobs), os.cpu_count() or 1)):
        pass
    base, full = (checkpoint.read_json(p) for p in (stored.base_results, stored.full_results))
    runs = {job.settings.method: read_results(job.run) for job in jobs}
    for r in runs.values():  # whatever other results of the base lie about
        r["summary"] = evaluation.summarise(r, stored.base_results, stored.full_results)
    everything = [base, full, *runs.values()]
    print("\n".join(table(everything)))
    pyplot, file = figures.plotting(), out / "demo.png"
    if pyplot is None:
        print(figures.MISSING)
    else:
        draw_scores(pyplot, everything, file)
        print(f"picture: {file}")
    print()
    for sentence in sentences(base, runs, sweep.read_csv(stored.full_results.parent)):
        print(sentence)
