"""The paper's ablations in small: FARSS and others on the microcosm, one setting changed at a time.

    python microcosm/ablations.py --jobs 2      writes ablations.csv and curves.json here

Each variant runs at its method's own learning rate (settings.PRESETS) over three seeds; T divides
by full.json. What stands in the two files with the same flags, and what is finished in
runs/ablations, is not run again. A new ablation is a row of VARIANTS.
"""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import checkpoint  # noqa: E402
import farss  # noqa: E402
import figures  # noqa: E402
import sweep  # noqa: E402
from settings import PRESETS, Parser, run_main  # noqa: E402

OUT = Path("runs") / "ablations"
SEEDS = (0, 1, 2)
PRESET = PRESETS["microcosm", "microcosm"]
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
    *(Variant("dropout 0.05", f"{method}, lr {lr:g}",
              f"--method {method} --dropout 0.05 --lr {lr:g}")
      for method in ("farss", "pissa", "lora") for lr in (PRESET.grid or {})[method]
      if lr != PRESET.settings["lr"][method]),
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


def flags_of(variant: Variant) -> str:
    """Its flags as ablations.csv has them."""
    return variant.flags.replace(f"{HERE}/", "microcosm/")


def read_csv() -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of ablations.csv by variant, flags and seed."""
    path = HERE / "ablations.csv"
    rows = csv.DictReader(path.read_text().splitlines() if path.exists() else [])
    return {(r["shows"], r["variant"], r["flags"], r["seed"]): r for r in rows}


def key(variant: Variant, seed: int) -> tuple[str, ...]:
    return variant.shows, variant.name, flags_of(variant), str(seed)


def write_csv(stored: dict[tuple[str, ...], dict], jobs: dict[tuple[str, ...], sweep.Job]) -> None:
    """ablations.csv: one line a run, of those that were stored and those that are done."""
    base, full = (checkpoint.read_json(HERE / f"{name}.json") for name in ("base", "full"))
    whole = {"word_problems": full["benchmarks"]["word_problems"]["score"]}
    rows = dict(stored)
    for name, job in jobs.items():
        if job.done():
            row = sweep.row_of(job, base)
            row["T"] = farss.task_score({b: row[b] for b in whole}, whole)
            row["KT"] = farss.harmonic_mean(row["K"], row["T"])
            rows[name] = dict(zip(("shows", "variant", "flags", "seed"), name, strict=True)) | {
                c: round(row[c], 4) if isinstance(row[c], float) and c != "lr" else row[c]
                for c in ("method", "lr", *COLUMNS)}
    with checkpoint.atomic(HERE / "ablations.csv") as temporary, \
            open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, ("shows", "variant", "flags", "method", "lr", "seed",
                                       *COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for seed in SEEDS for v in VARIANTS
                         if (name := key(v, seed)) in rows)


def read_curves() -> dict[str, list[dict]]:
    """curves.json: the scores on the way, by method."""
    path = HERE / "curves.json"
    return checkpoint.read_json(path) if path.exists() else {}


def write_curves(stored: dict[str, list[dict]], jobs: list[sweep.Job]) -> None:
    """curves.json of those that were stored and those that are done."""
    checkpoint.save_json(HERE / "curves.json", stored | {
        job.settings.method: [{"step": line["step"], "scores": line["scores"]}
                              for line in figures.read_log(job.run) if "scores" in line]
        for job in jobs if job.done()})


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default 1")
    args = parser.parse_args()
    stored = read_csv()
    jobs = {name: sweep.make_job(folder(v), [*v.flags.split(), "--seed", str(seed)])
            for seed in SEEDS for v in VARIANTS if (name := key(v, seed)) not in stored}
    drawn = read_curves()
    curves = [sweep.make_job(OUT / "curves", ["--method", m, "--score-every", str(EVERY),
                                              "--score-limit", "150"])
              for m in FOLLOWED if m not in drawn]
    for _ in sweep.run_all([*curves, *jobs.values()], args.jobs):
        write_curves(drawn, curves)
        write_csv(stored, jobs)
    write_csv(stored, jobs)  # also of runs that were finished before


if __name__ == "__main__":
    run_main(main)
