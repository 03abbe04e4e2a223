"""Every reader of a file against files that are not what they should be.

    python tests/fuzz.py --cases 10000

Each case takes a good file, damages it (bytes flipped, cut, doubled; values of a wrong type, absurd
sizes, NaN, lone surrogates, deep nesting, duplicate keys, names that leave the folder, links, a
folder or a pipe in its place), and reads it as the scripts do. A reader may either load it, and
then everything in it is finite and of the right shape, and equal to what was written where the file
carries a seal, and no link of a model's or a run's folder led out of it; or raise a UserError,
which is one line. Anything else (another exception, a dead process, more than a few seconds or a
gigabyte) is a fault, printed with the number of the case, which --only repeats. Exit status 1 if
there was one. Needs os.fork.
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from tiny import tiny_llama, write_checkpoint
from tqdm import tqdm

import benchmarks
import checkpoint
import data
import export
import figures
import model as M
import results as R
import settings
import train
from checkpoint import UserError

HERE = Path(__file__).resolve().parent
DIED = "the process died or hung"
SECONDS, MEMORY = 5, 2**30  # of the processor, of one case
SMALL = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2,
             num_key_value_heads=1)
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 10**400, 0.5, -0.0, 1e308, math.nan,
    math.inf, "", "x", "0", "\ud800", "ﬁ\u202e\x00", "../../etc/passwd", "/etc/passwd", "x" * 20000,
    [], [[]], [None], [-1], {}, {"": {}}, {"a": None}, [1, "a", {}], "model.layers.0", "(a+)+$",
    "(.*)*.*.*.*.*x", "[", "\\", "split", "float32", "nan", {"content": 7}, {"rope_type": "llama3"}]

# ----------------------------------------------------------------------- what is read, and how


def finite(tensors: dict) -> None:
    assert all(bool(t.isfinite().all()) for t in tensors.values()), "a number that is not finite"


def read_model(folder: Path) -> None:
    config = checkpoint.read_config(folder)
    shapes = {n: p.shape for n, p in M.empty(config).named_parameters()}
    model = checkpoint.load(folder, torch.float32, "cpu")
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    finite(dict(model.named_parameters()))


def read_tokenizer(folder: Path) -> None:
    config = checkpoint.read_config(folder)
    tokenizer = checkpoint.Tokenizer(folder, config)
    ids = tokenizer.encode("héllo 12\n")
    assert all(0 <= i < config.vocab_size for i in [*ids, *tokenizer.eos_ids])


def base() -> M.CausalLM:
    return M.empty(checkpoint.read_config(WORLD / "model"))


def read_adapter(folder: Path) -> None:
    adapter = checkpoint.read_adapter(base(), folder / "adapter.safetensors")
    good = checkpoint.read_adapter(base(), WORLD / "run" / "adapter.safetensors")
    for name, start in adapter.starts.items():  # it is sealed: a flipped bit is found
        assert all(a is b or torch.equal(a, b)
                   for a, b in zip(start, good.starts[name], strict=True)), "not what was written"
        assert adapter.scaling_of(name) == good.scaling_of(name)


def read_step(folder: Path) -> None:
    checkpoint.load_sealed(folder / "step-000001.safetensors", "checkpoint")


def read_peft(folder: Path) -> None:
    adapter = export.read_peft(base(), folder)
    for start in adapter.starts.values():
        finite({"A": start.A, "B": start.B})


def read_run(folder: Path) -> None:
    s, recorded = settings.read_run(folder)
    with contextlib.suppress(FileNotFoundError):
        settings.base_of(folder, s, recorded)
    settings.check(s, checkpoint.MODELS["llama2-7b"][1])
    json.dumps(settings.asdict(s), allow_nan=False)


def read_scores(folder: Path) -> None:
    results = R.read_results(folder)
    "\n".join(R.table([results]))
    assert all(x is None or math.isfinite(x) for x in R.flat_scores(
        results["benchmarks"]).values())


def read_ranks(folder: Path) -> None:
    layers = settings.read_ranks(folder)["layers"]
    figures.grid_of({n: x["r"] for n, x in layers.items()})


def read_log(folder: Path) -> None:
    for line in figures.read_log(folder):
        assert math.isfinite(line["loss"]) and math.isfinite(line["step"])
    list(R.best_and_last(R.epoch_scores(folder)))


def read_training_data(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        task = data.TASKS["glue:mrpc" if name.endswith(".tsv") else "math"]
        rows = data.read_rows(str(folder / name))
        if task.classes:
            assert [[*data.texts_of(row, task), data.label_of(row, task.classes)] for row in rows]
        else:
            chosen = data.training_set(rows, TOKENIZER, 4, 512, 0, task)
            assert all(0 <= i < 258 for e in chosen.examples for i in e.ids)
    return read


def read_questions(name: str) -> Callable[[Path], None]:
    """As eval.py asks a benchmark; the judge, too, must take any gold answer that passed."""
    def read(folder: Path) -> None:
        rows = benchmarks.kept(name, data.read_rows(str(folder / "rows.jsonl")))
        asked, b = benchmarks.questions(name, rows), benchmarks.BENCHMARKS[name]
        R.hash_of(asked)
        for q in asked:
            if isinstance(q.prompt, list):
                assert 0 < len(TOKENIZER.encode_texts(q.prompt, 64)[0]) <= 64
            else:
                assert len(TOKENIZER.encode(q.prompt)) > 1
            if b.program:
                assert isinstance(b.program("return 4", q.gold), str)
            elif not b.prepare:  # that judge is another project's code
                for judge in filter(None, (b.judge, b.official)):
                    judge("4", q.gold)
    return read


# reader: (its good folder, the file to damage, how it is read)
READERS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "config.json": ("model", "config.json", read_model),
    "model.safetensors": ("model", "model.safetensors", read_model),
    "the index": ("sharded", "model.safetensors.index.json", read_model),
    "a shard": ("sharded", "model-00002-of-00002.safetensors", read_model),
    "tokenizer.json": ("model", "tokenizer.json", read_tokenizer),
    "tokenizer_config.json": ("model", "tokenizer_config.json", read_tokenizer),
    "adapter.safetensors": ("run", "adapter.safetensors", read_adapter),
    "a checkpoint": ("run", "step-000001.safetensors", read_step),
    "peft's adapter_config.json": ("peft", "adapter_config.json", read_peft),
    "peft's adapter": ("peft", "adapter_model.safetensors", read_peft),
    "run.json": ("run", "run.json", read_run),
    "results.json": ("run", "results.json", read_scores),
    "ranks.json": ("run", "ranks.json", read_ranks),
    "log.jsonl": ("run", "log.jsonl", read_log),
    **{name: ("data", name, read_training_data(name))
       for name in ("train.jsonl", "train.json", "train.tsv", "turns.jsonl", "train.jsonl.gz",
                    *(["train.parquet"] if find_spec("pyarrow") else []))},
    **{f"questions of {name}": (f"questions-{name}", "rows.jsonl", read_questions(name))
       for name in benchmarks.BENCHMARKS},
}


READER = list(READERS)
# Data, which the user names, may lie behind any link.
FROM_USER = [name for name, (place, *_) in READERS.items() if place.split("-")[0] in (
    "data", "questions")]


def make_world(root: Path) -> None:
    """A good folder of each kind."""
    folder = write_checkpoint(root / "model", **SMALL)
    shutil.copytree(folder, root / "sharded")
    whole, _ = checkpoint.load_tensors(folder / "model.safetensors")
    (root / "sharded" / "model.safetensors").unlink()
    names, weight_map = sorted(whole), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({n: whole[n] for n in part}, root / "sharded" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    checkpoint.save_json(root / "sharded" / "model.safetensors.index.json",
                         {"metadata": {}, "weight_map": weight_map})
    run, s = root / "run", settings.Settings(
        model=str(folder), task="math", data="d.jsonl", method="farss", rank=2, alpha=2.0,
        shallow=1, r_avg=1.0, r_max=2, dtype="float32", device="cpu")
    run.mkdir()
    settings.write_run(run, s, {"base": str(folder), "data_sha256": "0",
                                "base_fingerprint": checkpoint.fingerprint(folder)})
    model = tiny_llama(**SMALL)
    names = settings.Settings(targets="q_proj,down_proj").layers(model)
    starts = {n: M.Start(*[torch.randn(2, w.shape[1]), torch.randn(w.shape[0], 2)] * 2)
              for n in names for w in [model.get_parameter(f"{n}.weight")]}
    M.attach(model, starts)
    checkpoint.save_adapter(run / "adapter.safetensors", model,
                            {n: (x.A0, x.B0) for n, x in starts.items()}, "split")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    train.save_checkpoint(run / "step-000001.safetensors", 1, trained,
                          torch.optim.AdamW(trained.values()), {"start": None, "settings": {}})
    checkpoint.save_json(run / "ranks.json", {"shallow_blocks": 1, "layers": {
        n: {"r": 2, "I": 0.5, "shallow": True, "residual_rounding": 1e-8} for n in names}})
    (run / "log.jsonl").write_text("".join(json.dumps(
        {"step": i, "loss": 1.5, "validation": {"rte": 50.0}}) + "\n" for i in range(1, 4)))
    checkpoint.save_json(run / "results.json", {
        "method": "farss", "trainable": 7, "summary": {"Avg": 1.0, "K": None}, "benchmarks": {
            "gsm8k": {"score": 1.0, "answer_loss": 2.0, "n": 3, "parts": {"rare": 1.0}},
            "ifeval": {"scores": {"P.S. acc": None, "P.L. acc": 3.0}, "n": 2}}})
    source = export.open_run(run)
    export.save_peft(source, root / "peft", {n: (x.A, x.B) for n, x in starts.items()}, "base",
                     torch.float32)
    checkpoint.save_json(root / "peft" / export.CONFIG, checkpoint.read_json(
        root / "peft" / export.CONFIG) | {"rank_pattern": dict.fromkeys(names, 2),
                                          "alpha_pattern": {r"^.*q_proj": 2.0}})
    rows = [{"query": f"{i}+1?", "input": "", "response": f"<<{i}>>{i + 1}\n#### {i + 1}"}
            for i in range(3)]
    (root / "data").mkdir()
    text = {"train.json": json.dumps(rows),
            "train.jsonl": "".join(json.dumps(r) + "\n" for r in rows),
            "turns.jsonl": json.dumps({"conversation": [{"human": "a", "assistant": "b"}]}) + "\n",
            "train.tsv": "Quality\t#1 String\t#2 String\n1\ta\tb\n0\tc\t\"d\n"}
    for name, content in text.items():
        (root / "data" / name).write_text(content)
    packed = gzip.compress(text["train.jsonl"].encode(), mtime=0)
    (root / "data" / "train.jsonl.gz").write_bytes(packed)
    if "train.parquet" in READERS:
        save_parquet(root / "data" / "train.parquet", rows)
    from test_benchmarks import ROWS

    for name in [n.rpartition(" ")[2] for n in READERS if n.startswith("questions")]:
        (root / f"questions-{name}").mkdir()
        (root / f"questions-{name}" / "rows.jsonl").write_text((json.dumps(ROWS[name]) + "\n") * 2)


def save_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# -------------------------------------------------------------------------------- how it is damaged


def flip(draw: random.Random, path: Path) -> None:
    """Bytes, most often in the first 2,000, where a header is."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 8))):
        i = draw.randrange(len(content) if draw.random() < 0.5 else min(2000, len(content)))
        content[i] = draw.choice((content[i] ^ 1 << draw.randrange(8), draw.randrange(256), 0, 255))
    path.write_bytes(content)


def cut(draw: random.Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.choice((0, 1, 7, 8, 9, len(content) - 1,
                                           draw.randrange(len(content))))])


def insert(draw: random.Random, path: Path) -> None:
    """Some of it twice, or bytes that are no text."""
    content, i = path.read_bytes(), draw.randrange(path.stat().st_size)
    more = draw.choice((content[: i + 1], b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n\n", b"NaN,",
                        b"[" * 200000, b'{"a":' * 5000, b"9" * 6000, b'"\\ud800"'))
    path.write_bytes(content[:i] + more + content[i:])


def replace(draw: random.Random, path: Path) -> None:
    path.write_bytes(draw.choice((b"", b"null", b"[]", b"{}", b"7", b'"x"', b"[{}]", b"[" * 100000,
                                  b'{"a":' * 100000, b"9" * 5000, b"NaN", b"\x80", b"\x00" * 64)))


def become(draw: random.Random, path: Path) -> None:
    """Something else than a file, or a link, which leads out of the folder, nowhere, or in a
    circle."""
    kept = path.with_name("elsewhere")
    path.rename(kept)
    kind = draw.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path.with_name("nowhere"))
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        outside = path.parent.parent / "outside"
        kept.rename(outside)
        path.symlink_to(outside)  # the good file
    elif kind == 4:
        path.symlink_to("/dev/zero" if draw.random() < 0.5 else "/dev/null")
    else:
        os.mkfifo(path)


def places(value: Any, above: tuple = ()) -> list[tuple]:
    """The way to every value in a JSON document."""
    found = [above] if above else []
    items = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    for key, inner in items:
        found += places(inner, (*above, key))
    return found


def change(draw: random.Random, value: Any) -> Any:
    """A JSON document with something missing, doubled, renamed, or odd in its place."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        ways = places(value)
        if not ways:
            return value
        *way, last = draw.choice(ways)
        holder = value
        for key in way:
            holder = holder[key]
        kind = draw.randrange(8)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(("x", "\ud800", "", "ﬁ", "model.layers.9.x", "(a*)*"))] = (
                holder.pop(last))
        elif kind == 2 and type(holder[last]) in (int, float):
            with contextlib.suppress(OverflowError):  # 0.1 of a number with 400 digits
                holder[last] = draw.choice((-1, 2, 10**6, 0.1, -0.5)) * holder[last]
        else:
            holder[last] = copy.deepcopy(draw.choice(ODD))
    return value


def dumped(draw: random.Random, value: Any) -> str:
    """As JSON; sometimes with a key twice."""
    text = json.dumps(value)
    if draw.random() < 0.1 and text.startswith('{"'):
        text = f'{{{text[1:-1]}, {text[1:-1]}}}'
    return text


def change_json(draw: random.Random, path: Path) -> None:
    """The document, one line of several, or the header of a file of tensors."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = dumped(draw, change(draw, json.loads(content[8 : 8 + size]))).encode()
        header += b" " * (-len(header) % 8)
        claimed = draw.choice((len(header),) * 6 + (2**63 - 1, 99_000_000, len(header) + 8))
        path.write_bytes(claimed.to_bytes(8, "little") + header + content[8 + size :])
    elif path.suffix in (".jsonl", ".gz"):
        packed = path.suffix == ".gz"
        lines = (gzip.decompress(content) if packed else content).decode().splitlines()
        i = draw.randrange(len(lines))
        lines[i] = dumped(draw, change(draw, json.loads(lines[i])))
        text = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(text, mtime=0) if packed else text)
    elif path.suffix == ".parquet":
        rows = [row.fields for row in data.read_file(path)]
        with contextlib.suppress(Exception):
            save_parquet(path, change(draw, rows))  # its columns do not take every value
    elif path.suffix == ".json":
        path.write_text(dumped(draw, change(draw, json.loads(content))))
    else:
        cells = content.decode().split("\t")
        cells[draw.randrange(len(cells))] = draw.choice(("", "\n", '"', "-1", "1e400", "\x00"))
        path.write_text("\t".join(cells))


def spoil_tensor(draw: random.Random, path: Path) -> None:
    """A number that is none, or a tensor of another name, shape or kind."""
    tensors, meta = checkpoint.load_tensors(path)
    name = draw.choice(sorted(tensors))
    t = tensors[name].clone()
    kind = draw.randrange(5)
    if kind == 0 and t.is_floating_point() and t.numel():
        t.view(-1)[draw.randrange(t.numel())] = draw.choice((math.nan, math.inf, -math.inf))
    elif kind == 1:
        t = t.reshape(draw.choice(((-1,), (1, -1), (-1, 1, 1))))
    elif kind == 2:
        t = t.to(draw.choice((torch.int64, torch.bool, torch.float64, torch.float16, torch.uint8)))
    elif kind == 3:
        t = torch.zeros(draw.choice(((), (0,), (0, 5), (2, 3), (3,))))
    else:
        del tensors[name]
        name = draw.choice(("x", "", "model.layers.0.self_attn.q_proj.C", name + ".A", "ﬁ\x00"))
    save_file(tensors | {name: t}, path, meta)


def damage(draw: random.Random, path: Path) -> None:
    ways = [flip, flip, cut, insert, replace, become, *[change_json] * 6]
    if path.suffix == ".safetensors":
        ways += [spoil_tensor] * 4
    draw.choice(ways)(draw, path)


# ------------------------------------------------------------------------------------------ the run


def one_case(seed: int, number: int, scratch: Path) -> tuple[str, str]:
    """(reader, outcome): "loaded", "refused", or the fault."""
    draw = random.Random(f"{seed}-{number}")
    name = READER[number % len(READER)]
    place, file, read = READERS[name]
    folder = scratch / "case"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(WORLD / place, folder)
    damage(draw, folder / file)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)  # it waits for something
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            read(folder)
        link = folder / file
        if link.exists() and name not in FROM_USER and not link.resolve().is_relative_to(
                folder.resolve()):
            return name, "followed a link out of the folder"
        return name, "loaded"
    except UserError as error:
        line = " ".join(str(error).split())
        return name, "refused" if line else "a UserError that says nothing"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__)
                if HERE.parent == Path(f.filename).parent] or [last]
        return name, (f"{type(error).__name__} {str(error)[:150]!r} in {ours[-1].name}, "
                      f"{Path(ours[-1].filename).name}:{ours[-1].lineno}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


class TooLong(KeyboardInterrupt):
    """Which no reader takes for an error of the file."""


def too_long(*_: Any) -> None:
    raise TooLong(f"more than {SECONDS} s")


def worker(seed: int, numbers: list[int], scratch: Path, out: int) -> None:
    """Cases in a process that has a limit of memory; one line of JSON each."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, too_long)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # the panics of tokenizers
    for number in numbers:
        os.write(out, json.dumps([number, READER[number % len(READER)], DIED]).encode() + b"\n")
        os.write(out, json.dumps([number, *one_case(seed, number, scratch)]).encode() + b"\n")


def run(seed: int, numbers: list[int], scratch: Path) -> dict[int, tuple[str, str]]:
    """Outcomes by number; what a dead process had left to do goes to the next."""
    outcomes: dict[int, tuple[str, str]] = {}
    with tqdm(total=len(numbers), disable=None) as bar:
        while left := [n for n in numbers if n not in outcomes]:
            source, out = os.pipe()
            child = os.fork()
            if not child:
                os.close(source)
                with contextlib.suppress(BaseException):
                    worker(seed, left, scratch, out)
                os._exit(0)
            os.close(out)
            rest = b""
            while select.select([source], [], [], 8 * SECONDS)[0] and (
                    more := os.read(source, 2**16)):
                *lines, rest = (rest + more).split(b"\n")
                for number, name, outcome in map(json.loads, lines):
                    if outcome not in ("loaded", "refused", DIED):
                        print(f"case {number}: {name}: {outcome}", flush=True)
                    outcomes[number] = (name, outcome)
                bar.n = len(outcomes)
                bar.refresh()
            os.close(source)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)  # it hangs where no alarm is heard, or is done
            os.waitpid(child, 0)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--only", type=int, metavar="CASE", help="this one alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    numbers = list(range(args.cases)) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory() as temporary:
        global WORLD, TOKENIZER
        WORLD = Path(temporary) / "world"
        with contextlib.redirect_stdout(io.StringIO()):
            make_world(WORLD)
        TOKENIZER = checkpoint.Tokenizer(WORLD / "model", checkpoint.read_config(WORLD / "model"))
        for place, _, read in READERS.values():  # what is not damaged loads
            read(WORLD / place)
        outcomes = run(args.seed, numbers, Path(temporary) / "scratch")
    table: dict[str, Counter] = {name: Counter() for name in READERS}
    faults = []
    for number, (name, outcome) in sorted(outcomes.items()):
        known = outcome in ("loaded", "refused")
        table.setdefault(name, Counter())[outcome if known else "faults"] += 1
        if not known:
            faults.append(f"case {number}: {name}: {outcome}")
    for name, found in table.items():
        print(f"{name:32}" + "".join(f"{found[k]:>7} {k}" for k in ("loaded", "refused", "faults")))
    total = sum((found for found in table.values()), Counter())
    print(f"{len(outcomes)} cases: {total['refused']} refused in one line, {total['loaded']} "
          f"loaded, {len(faults)} faults")
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
