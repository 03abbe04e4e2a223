"""kill -9 at random moments: what was trained, scored and exported must come out as undisturbed.

    python tests/kill.py --kills 100

A child process trains the microcosm for a few steps, evaluates and exports it in every format. It
is killed in a phase drawn at random (calibration, training, writing a checkpoint, evaluation,
export), at a random moment of it. After every kill each file under its own name must be whole.
Then the same commands go on with what is there. At the end adapter, log, answers, scores and
exported files must have the bytes of a run that nobody killed. Prints how many kills hit which
phase; exit status 1 and what differs, where something does. Needs os.fork.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import checkpoint
import eval as evaluation
import export
import figures
import settings
import train

TRAINING = ["--method", "farss", "--steps", "5", "--save-every", "1", "--batch-size", "2",
            "--examples", "32", "--calibration-examples", "4", "--seed", "3", "--dropout", "0.1",
            "--micro-batch", "2", "--no-checkpointing"]  # not as memory has room
ASKED = ["--limit", "2", "--max-new-tokens", "4"]
PHASES = ("calibration", "training", "writing a checkpoint", "evaluation", "export")
EARLY, LATE = (0, 0, 1, 1, 2, 2, 3, 4), (3, 4)  # drawn from until training is done, and then
now, entered = mmap.mmap(-1, 1), mmap.mmap(-1, len(PHASES))  # what the child is doing, how often


def within(phase: int, function: Callable) -> Callable:
    """The function, which tells the parent that it runs; 0 is no phase."""
    def wrapped(*args, **kwargs):
        before, now[0] = now[0], phase + 1
        entered[phase] = min(255, entered[phase] + 1)
        try:
            return function(*args, **kwargs)
        finally:
            now[0] = before

    return wrapped


def work(run: Path) -> None:
    """What someone does who wants a run's results: the same commands until all is there."""
    train.initialise = within(0, train.initialise)
    train.train = within(1, train.train)
    train.save_checkpoint = within(2, train.save_checkpoint)
    figures.plotting = lambda: None  # pictures are drawn again by eval.py --plot
    done = settings.finished(run)
    try:  # of a finished run, too: it takes away what a kill left of its checkpoints
        train.main(["--resume", str(run)] if settings.is_run(run) else
                   [*TRAINING, "--out", str(run)])
    except checkpoint.UserError:
        if not done:
            raise
    within(3, evaluation.main)([str(run), *ASKED])
    for form in export.FORMATS:
        to = run.with_name(form)
        if not to.exists():
            within(4, export.main)([str(run), "--to", str(to), "--format", form])


def fork(run: Path, said: Path) -> int:
    """The child's process number; what it prints goes to a file."""
    now[0] = 0
    entered[:] = bytes(len(PHASES))
    child = os.fork()
    if child:
        return child
    code = 1
    with open(said, "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            work(run)
            code = 0
        except BaseException:  # whatever it was, the child must end here
            traceback.print_exc()
        out.flush()
    os._exit(code)


def ended(child: int) -> int | None:
    """How a child ended, None while it runs: 0, an exit status, or minus the signal's number."""
    process, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if process else None


def times(run: Path, said: Path) -> list[list[float]]:
    """Seconds of each time that each phase ran, undisturbed."""
    child, found, was = fork(run, said), [[] for _ in PHASES], 0
    began = time.perf_counter()
    while (code := ended(child)) is None:
        if now[0] != was:
            if was:
                found[was - 1].append(time.perf_counter() - began)
            was, began = now[0], time.perf_counter()
        time.sleep(2e-4)
    if code:
        sys.exit(f"the undisturbed run failed:\n{said.read_text()}")
    return found


def kill(run: Path, said: Path, phase: int, entry: int, after: float) -> int | None:
    """Run until the phase is entered that often, and so many seconds on; then kill -9. Returns
    what was hit, None where the child was done before. The run must not have failed."""
    child, killed = fork(run, said), False
    while (code := ended(child)) is None:
        if not killed and entered[phase] >= entry:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(2e-4)
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"a resumed run failed:\n{said.read_text()}")
    return now[0] if code else None


def whole_or_absent(folder: Path) -> None:
    """Every file that has its name can be read to the end."""
    for path in folder.rglob("*"):
        if any(part.endswith(".tmp") for part in path.parts):
            continue
        if path.name == "adapter.safetensors" or path.name == "init.safetensors":
            checkpoint.load_sealed(path, "adapter")
        elif path.name.startswith("step-"):
            checkpoint.load_sealed(path, "checkpoint")
        elif path.suffix == ".safetensors":
            checkpoint.load_tensors(path)
        elif path.suffix == ".json":
            checkpoint.read_json(path)
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line)


def result(folder: Path) -> dict[str, bytes]:
    """What must be equal, by file: all of it but times, memory and the folder's own name."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "run.json"):
        name, content = str(path.relative_to(folder)), path.read_bytes()
        if path.parent.name == "run" and path.suffix in (".json", ".jsonl"):
            content = json.dumps([timeless(json.loads(part)) for part in
                                  (content.splitlines() if path.suffix == ".jsonl" else
                                   [content])]).encode()
        found[name] = content.replace(str(folder).encode(), b"")
    return found


def first_difference(one: bytes, two: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), len(one))
    return f"{one[max(0, at - 40) : at + 40]!r} and {two[max(0, at - 40) : at + 40]!r}"


def timeless(value):
    """The same without what no two runs have alike."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items()
                if k not in ("seconds", "tokens_per_s", "memory_gb", "peak_memory_gb")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread, and a lock of this process's own: tqdm's is shared with
    tqdm.set_lock(threading.RLock())  # the children, and one that is killed may hold it for good
    draw, hits, runs = random.Random(args.seed), [0] * (len(PHASES) + 1), 0
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=args.kills, disable=None) as bar:
        root = Path(temporary).resolve()
        (root / "whole").mkdir()
        seconds = times(root / "whole" / "run", root / "said")
        expected, cut = result(root / "whole"), root / "cut"
        while sum(hits) < args.kills or cut.exists():  # the last one, too, is brought to its end
            cut.mkdir(exist_ok=True)
            phase = draw.choice(LATE if settings.finished(cut / "run") else EARLY)
            lasts = seconds[phase] if sum(hits) < args.kills and draw.random() < 0.8 else []
            entry = draw.randint(1, len(lasts)) if lasts else 256
            after = draw.uniform(0, 1.1 * lasts[entry - 1]) if lasts else 0.0
            hit = kill(cut / "run", root / "said", phase, entry, after)
            whole_or_absent(cut)
            if hit is not None:
                hits[hit] += 1
                bar.update()
                continue
            found = result(cut)
            unlike = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
            if unlike:
                sys.exit(f"after {sum(hits)} kills unlike the undisturbed run: {unlike}; "
                         + first_difference(*(x.get(unlike[0], b"") for x in (expected, found))))
            runs += 1
            shutil.rmtree(cut)
            if bar.disable or sum(hits) >= args.kills:  # a log has a line for each
                print(summary(hits, runs), flush=True)


def summary(hits: list[int], runs: int) -> str:
    return (f"{sum(hits)} kills over {runs} runs, each in the end equal to the undisturbed one: "
            + ", ".join(f"{count} in {name}" for name, count in zip(PHASES, hits[1:], strict=True))
            + f", {hits[0]} between them")


if __name__ == "__main__":
    main()
