"""Which results changed, to the bit: run before and after a change that should not change any.

    python tests/same_bits.py BEFORE.json                 writes it, where there is none
    python tests/same_bits.py AFTER.json --before BEFORE.json    and names what differs
    ... --smollm2 FOLDER --gsm8k FILE                     also 25 steps of a real model

Runs four methods on the microcosm (trained and scored), CorDA's start, a tiny RoBERTa and a tiny
Gemma 2, each by the documented commands, and hashes what they leave: the adapter or model file,
the answers, the scores and the settings. Commit, versions, folders and seconds are left out.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

MICROCOSM = {name: ["--method", name] for name in ("farss", "pissa", "kasa", "full")}
SHORT = ["--rank", "6", "--r-avg", "3", "--r-max", "5", "--calibration-examples", "8",
         "--batch-size", "4", "--lr", "1e-3", "--steps", "6"]
LEFT_OUT = {"seconds", "commit", "torch", "python", "threads", "tokenizers", "safetensors", "numpy",
            "base", "base_results", "full_results", "trained_with"}


def command(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=REPO, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}\n{done.stdout[-2000:]}")


def kept(value: object) -> object:
    """A JSON value without what may differ between two equal runs."""
    if isinstance(value, dict):
        return {k: kept(v) for k, v in value.items() if k not in LEFT_OUT}
    return value


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def hashes(run: Path) -> dict[str, str]:
    """{what: hash} of a run's folder."""
    found = {}
    for path in sorted([*run.glob("adapter.safetensors"), *run.glob("model/*.safetensors"),
                        *run.glob("eval/*.jsonl")]):
        found[str(path.relative_to(run))] = digest(path.read_bytes())
    for name in ("run.json", "results.json"):
        if (run / name).exists():
            content = kept(json.loads((run / name).read_text()))
            content = content["settings"] if name == "run.json" else content["benchmarks"]
            text = json.dumps(content, sort_keys=True).replace(str(run.parent), "")
            found[name] = digest(text.encode())
    return found


def all_runs(at: Path, smollm2: str | None, gsm8k: str | None, only: list[str]
             ) -> dict[str, dict[str, str]]:
    """{run: hashes}, each printed as it ends."""
    import random_roberta
    import tiny

    tiny.write_checkpoint(at / "models/gemma2", **tiny.KINDS["gemma2"])
    tiny.write_data(at / "data")
    random_roberta.write(at / "glue", hidden_size=96, intermediate_size=192, num_attention_heads=4,
                         num_key_value_heads=4, head_dim=24)
    todo = {f"microcosm-{name}": (flags, True) for name, flags in MICROCOSM.items()}
    todo["microcosm-corda"] = (["--method", "corda-kpm", "--steps", "10"], False)
    todo["gemma2"] = (["--model", at / "models/gemma2", "--data", at / "data/train.jsonl",
                       *SHORT], False)
    todo["roberta"] = (["--model", at / "glue/model", "--task", "glue:sst2", "--data",
                        at / "glue/SST-2", *SHORT], False)
    if smollm2:
        todo["smollm2"] = (["--model", smollm2, "--data", gsm8k, "--examples", "200", "--steps",
                            "25", "--batch-size", "4", "--calibration-examples", "16", "--rank",
                            "32", "--r-avg", "12", "--r-max", "16", "--max-length", "256",
                            "--threads", "1", "--micro-batch", "4"], False)
    found = {}
    for name, (flags, scored) in todo.items():
        if only and name not in only:
            continue
        command("train.py", *flags, "--out", at / name)
        if scored:
            command("eval.py", at / name)
        found[name] = hashes(at / name)
        print(name, json.dumps(found[name]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--smollm2", metavar="FOLDER")
    parser.add_argument("--gsm8k", metavar="FILE", help="of --smollm2: training questions")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = all_runs(Path(folder), args.smollm2, args.gsm8k, args.only)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.before:
        before = json.loads(args.before.read_text())
        unlike = [f"{run}: {what}" for run, now in found.items()
                  for what, value in before[run].items() if now.get(what) != value]
        print("\n".join(["differs:", *unlike]) if unlike else "the same to the bit")
        sys.exit(bool(unlike))


if __name__ == "__main__":
    main()
