"""The paper's ablations in small: FARSS and others on the microcosm, one setting changed at a time.

    python microcosm/ablations.py --jobs 2      writes ablations.csv and curves.json here

Each variant runs at its method's own learning rate (settings.PRESETS) over three seeds; T divides
by full.json. What is finished (in runs/ablations) is not run again. A new ablation is a row of
VARIANTS.
"""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import checkpoint  # noqa: E402
import eval as evaluation  # noqa: E402
import figures  # noqa: E402
import sweep  # noqa: E402
from settings import Parser, run_main  # noqa: E402

OUT = Path("runs") / "ablations"
SEEDS = (0, 1, 2)
COLUMNS = ("K", "T", "KT", "word_problems", "city", "job", "year", "frequent", "rare", "trainable",
           "shallow_rank_obtained", "commit")


class Variant(NamedTuple):
    shows: str  # what of the paper it is the small form of
    name: str
    flags: str  # for train.py


def fixed(r: int) -> Variant:
    return Variant("Figure 4", f"r = {r}", f"--r-min {r} --r-avg {r} --r-max {r}")


def triple(low: int, mean: float, high: int) -> Variant:
    return Variant("Table 8", f"({low}, {mean:g}, {high})",
                   f"--r-min {low} --r-avg {mean} --r-max {high}")


VARIANTS = [
    *(Variant("Figure 5", f"N = {n}", f"--shallow {n}") for n in (0, 2, 4, 6)),
    *map(fixed, (1, 4, 16)),
    *(Variant("Table 5", f"{n} examples", f"--calibration-examples {n}") for n in (8, 32, 256)),
    *(triple(*r) for r in ((1, 4, 8), (4, 6, 8), (1, 12, 16))),
    *(Variant("Table 1", f"LoRA, {part} frozen", f"--method lora --freeze {part}")
      for part in ("shallow-third", "deep-third")),
    *(Variant("dropout 0.05", method, f"--method {method} --dropout 0.05")
      for method in ("farss", "pissa", "lora")),
    Variant("dropout 0.05", "farss, on the difference", "--dropout 0.05 --residual exact"),
    *(Variant("calibrated on knowledge", method,
              f"--method {method} --calibration {HERE / 'city.jsonl'}")
      for method in ("corda-kpm", "lora-null")),
    Variant("R = 32", "farss", "--rank 32 --r-avg 12 --r-max 16"),
    Variant("R = 32", "lora", "--method lora --rank 32"),
]
FOLLOWED = ("full", "lora", "pissa", "farss")  # scored on the way, for curves.json
EVERY = 10


def folder(variant: Variant) -> Path:
    """Where a variant's runs are: its name, with nothing that a file system might refuse."""
    letters = f"{variant.shows} {variant.name}".lower()
    return OUT / "-".join("".join(c if c.isalnum() else " " for c in letters).split())


def write_csv(done: list[tuple[Variant, sweep.Job]]) -> None:
    """ablations.csv: one line a run."""
    base, full = (checkpoint.read_json(HERE / f"{name}.json") for name in ("base", "full"))
    whole = {"word_problems": full["benchmarks"]["word_problems"]["score"]}
    with checkpoint.atomic(HERE / "ablations.csv") as temporary, \
            open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("shows", "variant", "flags", "method", "lr", "seed", *COLUMNS))
        for variant, job in done:
            row = sweep.row_of(job, base)
            row["T"] = evaluation.task_score({b: row[b] for b in whole}, whole)
            row["KT"] = evaluation.harmonic_mean(row["K"], row["T"])
            flags = variant.flags.replace(f"{HERE}/", "microcosm/")
            writer.writerow((variant.shows, variant.name, flags, row["method"], row["lr"],
                             row["seed"], *(round(row[c], 4) if isinstance(row[c], float)
                                            else row[c] for c in COLUMNS)))


def write_curves(jobs: list[sweep.Job]) -> None:
    """curves.json: the scores on the way, by method."""
    checkpoint.save_json(HERE / "curves.json", {
        job.settings.method: [{"step": line["step"], "scores": line["scores"]}
                              for line in figures.read_log(job.run) if "scores" in line]
        for job in jobs})


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default 1")
    args = parser.parse_args()
    jobs = [(v, sweep.make_job(folder(v), [*v.flags.split(), "--seed", str(seed)]))
            for seed in SEEDS for v in VARIANTS]
    curves = [sweep.make_job(OUT / "curves", ["--method", m, "--score-every", str(EVERY),
                                              "--score-limit", "150"]) for m in FOLLOWED]
    for _ in sweep.run_all([*curves, *(job for _, job in jobs)], args.jobs):
        write_curves([job for job in curves if job.done()])
        write_csv([(v, job) for v, job in jobs if job.done()])
    write_curves(curves)
    write_csv(jobs)


if __name__ == "__main__":
    run_main(main)
