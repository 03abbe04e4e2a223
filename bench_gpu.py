"""Measure one GPU in parts, each a process of its own: what bench_gpu.sh starts.

    bash bench_gpu.sh --out DIR                            all parts, at most 540 seconds
    bash bench_gpu.sh --out DIR --parts 0,3 --limit 300    some of them
    bash bench_gpu.sh --out DIR --model FOLDER             part 7, too: a folder of SmolLM2-135M
    bash bench_gpu.sh --out DIR --wheels FOLDER            with its wheels (peft, liger-kernel)
    bash bench_gpu.sh --out DIR --device cpu --tiny        a rehearsal on a CPU

Nothing is downloaded or installed: wheels are unpacked into a temporary folder. A part that fails,
or takes longer than it may, costs itself alone, and what it had measured is kept. In DIR:
results.jsonl (a line for each part), log.txt (all that was printed) and table.txt, which is also
printed at the end, or when the limit or SIGTERM ends the run.
"""

import argparse
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

REPO = Path(__file__).resolve().parent


class Part(NamedTuple):
    """What is run, and the most seconds that it may take."""

    name: str
    function: str  # module.function, which yields measurements
    seconds: int


PARTS = [
    Part("ceilings", "bench_machine.ceilings", 40),
    Part("tests", "bench_real.gpu_tests", 120),
    Part("decompositions", "bench_machine.decompositions", 100),
    Part("start", "bench_start.some_blocks", 130),
    Part("training", "bench_run.training", 130),
    Part("generation", "bench_run.generation", 90),
    Part("whole start", "bench_start.all_blocks", 300),
    Part("real model", "bench_real.real_model", 160),
]
START, WHOLE, REAL = 3, 6, 7
TIMES = 4  # as many blocks has the whole model as the part START measures
SIGNALS = (signal.SIGTERM, signal.SIGINT)
BESIDE = ("transformers", "peft", "liger-kernel", "triton", "cupy-cuda12x", "cupy-cuda13x",
          "pytest", "pytest-xdist")  # whose versions are told
FEWEST = 5  # seconds below which no part begins

# What a first run is held against (docs/one-gpu.md), by part and the name of the measurement.
PREDICTED = {
    (4, "here, 8 at a time, even"): "8,500 to 12,000 tokens/s, 32 GB",
    (5, "here, not merged, 64 prompts"): "4,000 to 6,000 tokens/s",
    (5, "here, not merged, 1 prompt"): "110 tokens/s",
    (6, "FARSS, all 32 blocks"): "2 to 4.7 minutes, 33 GB",
}


class Stopped(Exception):
    """The run was told to stop."""


# ------------------------------------------------------------------------------ one part, inside


def about(device: str) -> dict[str, Any]:
    """What results depend on besides the code: versions, commit, device."""
    import torch

    from settings import provenance

    found: dict[str, Any] = provenance() | {"device": device, "cores": os.cpu_count()}
    found |= {name: version_of(name) for name in BESIDE}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "card_gb": round(card.total_memory / 1e9, 1),
                  "multiprocessors": card.multi_processor_count, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version()}
    return found


def version_of(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def measure(function: str, job: Any) -> Iterator[dict[str, Any]]:
    """Run a part: what begins, and what came out of it. What fails is said, and the next begins."""
    import torch

    module, name = function.split(".")
    yield {"about": about(job.device)}
    part = getattr(importlib.import_module(module), name)
    for what, work in part(job):
        yield {"begun": what}
        began = time.perf_counter()
        try:
            row = work()
        except ImportError as error:
            row = {"missing": error.name or str(error)}
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        yield {"what": what} | row | {"took": time.perf_counter() - began}
        del work
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def run_inside(number: int, rows: Path, args: argparse.Namespace) -> None:
    """The process of one part: each row is written as soon as it is there."""
    from checkpoint import UserError
    from measuring import FULL, TINY, Job

    folders = [args.data, REPO / "bench_data", args.model]
    job = Job(TINY if args.tiny else FULL, args.device, args.model,
              tuple(f for f in folders if f is not None))
    with open(rows, "a") as file:
        try:
            for row in measure(PARTS[number].function, job):
                file.write(json.dumps(row) + "\n")
                file.flush()
        except UserError as error:
            file.write(json.dumps({"left out": str(error)}) + "\n")


# ------------------------------------------------------------------------------- all parts, outside


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a part, of which the last may have been cut when it was killed."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def result(number: int, rows: list[dict[str, Any]], status: str, seconds: float,
           args: argparse.Namespace) -> dict[str, Any]:
    """One line of results.jsonl."""
    said = [row["left out"] for row in rows if "left out" in row]
    begun = [row["begun"] for row in rows if "begun" in row]
    done = [row for row in rows if "what" in row]
    return {"part": number, "name": PARTS[number].name,
            "status": f"left out: {said[0]}" if said else status, "seconds": round(seconds, 1),
            "unfinished": begun[len(done) :], "rows": done,
            "settings": {"device": args.device, "tiny": args.tiny, "limit": args.limit},
            "about": next((row["about"] for row in rows if "about" in row), {})}


def kill(process: subprocess.Popen) -> None:
    """End a part and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(number: int, seconds: float, args: argparse.Namespace, environment: dict[str, str]
             ) -> dict[str, Any]:
    """One part in a process of its own, for so many seconds at most."""
    rows, began = args.out / "running.jsonl", time.perf_counter()
    rows.unlink(missing_ok=True)
    with open(args.out / "log.txt", "a") as log:
        print(f"\n==== part {number}: {PARTS[number].name}", file=log, flush=True)
        process = subprocess.Popen(command(number, args), cwd=REPO, env=environment, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        status = "stopped"
        try:
            code = process.wait(seconds)
            status = "done" if code == 0 else f"failed: exit {code}, see log.txt"
        except subprocess.TimeoutExpired:
            status = f"out of time after {seconds:.0f} s"
        except Stopped:
            args.stopped = True
        finally:
            kill(process)
    found = result(number, read_rows(rows), status, time.perf_counter() - began, args)
    rows.unlink(missing_ok=True)
    return found


def command(number: int, args: argparse.Namespace) -> list[str]:
    """What runs a part."""
    given = [sys.executable, __file__, "--inside", str(number), "--out", str(args.out), "--device",
             args.device, *(["--tiny"] if args.tiny else [])]
    for flag in ("model", "data"):
        if path := getattr(args, flag):
            given += [f"--{flag}", str(path)]
    return given


def excuse(number: int, left: float, results: list[dict[str, Any]], args: argparse.Namespace
           ) -> str | None:
    """Why a part does not begin with so many seconds left; None: it does.

    The whole start takes as much longer than that of some blocks as it has more, and leaves a real
    model its time.
    """
    if number == REAL and not args.model:
        return "left out: needs --model FOLDER"
    need = float(FEWEST)
    if number == WHOLE:
        some = [row["took"] for found in results if found["part"] == START
                for row in found["rows"][:1] if "seconds" in row]
        need = max([FEWEST, *(TIMES * seconds for seconds in some)])
        need += PARTS[REAL].seconds if args.model and REAL in args.parts else 0
    if args.stopped:
        return "not begun: stopped"
    return f"not begun: {left:.0f} s left, {need:.0f} s needed" if left < need else None


def run_all(args: argparse.Namespace, environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The results of the parts, while time is left."""
    end = time.perf_counter() + args.limit
    results: list[dict[str, Any]] = []
    for number in args.parts:
        left = end - time.perf_counter()
        if why := excuse(number, left, results, args):
            found = result(number, [], why, 0, args)
        else:
            found = run_part(number, min(left, PARTS[number].seconds), args, environment)
        results.append(found)
        yield found


def shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else (
        f"{value:,.0f}" if isinstance(value, float | int) and not isinstance(value, bool)
        else str(value))


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each measurement, and beside it what was predicted of it."""
    for found in results:
        yield f"{found['part']}  {found['name']}: {found['status']}, {found['seconds']:.0f} s"
        for row in found["rows"]:
            values = ", ".join(f"{name} {shown(value)}" for name, value in row.items()
                               if name not in ("what", "took") and not isinstance(value, list))
            yield f"     {row['what']:36} {values}"
            key = found["part"], row["what"]
            if key in PREDICTED and not found["settings"]["tiny"]:
                yield f"     {'':36} predicted: {PREDICTED[key]}"
            for name, value in row.items():
                if isinstance(value, list):
                    yield from (f"       {name}: {item}" for item in value)
        yield from (f"     {what:36} not finished" for what in found["unfinished"])


def unpacked(folder: Path | None, into: Path) -> dict[str, str]:
    """The environment of the parts: wheels, which are archives, lie open where Python looks."""
    for wheel in sorted(folder.glob("*.whl")) if folder else []:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into / "wheels")
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join(
        [str(into / "wheels"), *([before] if before else [])]), "TMPDIR": str(into),
        "PYTHONUNBUFFERED": "1"}


def went_wrong(found: dict[str, Any]) -> bool:
    """Whether a part did not come to its end, or something in it failed."""
    return found["status"].startswith(("failed", "out of time")) or any(
        "error" in row or row.get("failed") for row in found["rows"])


def stop(*_: Any) -> NoReturn:
    """End the part that runs, once."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_gpu.sh", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = ", ".join(f"{i} {part.name}" for i, part in enumerate(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", default=",".join(map(str, range(len(PARTS)))),
                        help=f"of {numbers}; default: all")
    parser.add_argument("--limit", type=float, default=540, help="seconds; default %(default)s")
    parser.add_argument("--device", default="cuda", help="default %(default)s")
    parser.add_argument("--tiny", action="store_true", help="very little of everything")
    parser.add_argument("--model", type=Path, help="of part 7: a folder of SmolLM2-135M")
    parser.add_argument("--data", type=Path, help="of part 7: where gsm8k_train.jsonl and "
                        "nq_open_dev.jsonl are; default: bench_data here, or the model's folder")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to be used besides")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    known = [str(i) for i in range(len(PARTS))]
    if not set(args.parts.split(",")) <= set(known):
        parser.error(f"--parts {args.parts}: give numbers of {numbers}")
    args.parts = sorted({int(i) for i in args.parts.split(",")})
    for flag in ("model", "data", "wheels"):
        path = getattr(args, flag)
        if path and not path.is_dir():
            parser.error(f"--{flag} {path}: no such folder")
        setattr(args, flag, path and path.resolve())
    args.out, args.stopped = args.out.resolve(), False
    return args


def main(argv: list[str] | None = None) -> int:
    """0 where every part that was begun came to its end and nothing in it failed."""
    args = parsed(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.inside is not None:
        run_inside(args.inside, args.out / "running.jsonl", args)
        return 0
    results: list[dict[str, Any]] = []
    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for found in run_all(args, unpacked(args.wheels, Path(folder))):
                results.append(found)
                with open(args.out / "results.jsonl", "a") as file:
                    file.write(json.dumps(found) + "\n")
                print(f"part {found['part']}, {found['name']}: {found['status']}, "
                      f"{found['seconds']:.0f} s", flush=True)
    except Stopped:
        args.stopped = True
    lines = "\n".join(table(results))
    (args.out / "table.txt").write_text(lines + "\n")
    print(lines, flush=True)
    return 130 if args.stopped else int(any(map(went_wrong, results)))


if __name__ == "__main__":
    sys.exit(main())
