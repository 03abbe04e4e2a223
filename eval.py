"""Score a model or a run on the paper's benchmarks; K, T and KT (Eq. 36-38).

    python eval.py runs/NAME                    a run of train.py, against its base model's results
    python eval.py microcosm                    the untouched model (a short name, hub id, folder)
    python eval.py ADAPTER --base MODEL         a LoRA of peft on its base model
    python eval.py --table runs/A runs/B        one table of finished results, nothing is run

Writes results.json, and eval/BENCHMARK.jsonl with every prompt, output and verdict, into the run's
folder, for an untouched model into runs/<model>-base.

The benchmarks (rows of benchmarks.py), by the group that they measure:
"""

import argparse
import csv
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import checkpoint
import data
import export
import figures
import model as M
from baselines import METHODS
from benchmarks import (
    BENCHMARKS,
    Benchmark,
    accuracy,
    column_accuracy,
    columns_of,
    kept,
    of_group,
    of_task,
)
from checkpoint import UserError
from settings import (
    DTYPES,
    Parser,
    Settings,
    base_of,
    default_task,
    finished,
    flat_scores,
    for_task,
    is_run,
    known_as,
    model_name,
    preset,
    provenance,
    read_results,
    read_run,
    run_main,
    use_threads,
)

PAPER_TABLES = Path(__file__).resolve().parent / "notebooks" / "tables"

# ----------------------------------------------------------------------------- Eq. 36-38 and Avg


def mean_ratio(scores: dict[str, float], reference: dict[str, float]) -> float:
    if scores.keys() != reference.keys() or not scores:
        raise UserError(f"scores of {sorted(scores)} cannot be compared with scores of "
                          f"{sorted(reference)}")
    if not all(reference.values()):
        return math.nan
    return sum(scores[b] / reference[b] for b in scores) / len(scores)


def knowledge_score(after: dict[str, float], before: dict[str, float]) -> float:
    """Eq. 36: K = mean over the world-knowledge benchmarks of score after / before fine-tuning.

    Undefined (NaN) where a score before is 0; UserError unless both have the same benchmarks.
    """
    return mean_ratio(after, before)


def task_score(tuned: dict[str, float], full: dict[str, float]) -> float:
    """Eq. 37: T = mean over the task benchmarks of score / score of full fine-tuning.

    Undefined (NaN) where full fine-tuning has 0; UserError unless both have the same benchmarks.
    """
    return mean_ratio(tuned, full)


def harmonic_mean(K: float, T: float) -> float:
    """Eq. 38: KT = 2 K T / (K + T); 0 if both are 0, NaN if either is undefined."""
    return 0.0 if K == T == 0 else 2 * K * T / (K + T)


def summary_metrics(scores: dict[str, float], before: dict[str, float], full: dict[str, float]
                    ) -> dict[str, float]:
    """Avg of all scores; K over the benchmarks of `before` (untouched), T over those of `full`
    (full fine-tuning), each where there are any, and KT where there is both."""
    found = {"Avg": sum(scores.values()) / len(scores)}
    if before:
        found["K"] = knowledge_score({b: scores[b] for b in before}, before)
    if full:
        found["T"] = task_score({b: scores[b] for b in full}, full)
    if before and full:
        found["KT"] = harmonic_mean(found["K"], found["T"])
    return found


# ------------------------------------------------------------------------------------ protocols


class Question(NamedTuple):
    """One question of a benchmark, as the model is asked it."""

    prompt: Any  # a text; a classifier's: its one or two texts
    gold: Any
    part: str | None = None  # of the benchmark


def questions(name: str, rows: list[data.Row]) -> list[Question]:
    """The rows of a benchmark as questions; UserError for a row that cannot be one."""
    row = BENCHMARKS[name]
    return [Question(row.prompt(r), row.gold(r), row.part(r) if row.part else None) for r in rows]


def cut(text: str, stops: Iterable[str]) -> str:
    """What stands before the first of the stop strings."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


@dataclass
class Evaluator:
    """A model with its tokenizer and the settings of an evaluation."""

    model: M.Model
    tokenizer: checkpoint.Tokenizer
    batch_size: int = 16
    max_new_tokens: int | None = None  # None: the benchmark's own
    bos: str = "harness"  # harness: the benchmark's rule; always; never
    scoring: str = "strict"  # or official: the official code's rule, where it has one
    execute: bool = False  # run programs that the model wrote, where that is the judge

    def ask(self, name: str, asked: list[Question]) -> list[dict]:
        """One record per question: prompt, gold, verdict, and what led to it."""
        return PROTOCOLS[BENCHMARKS[name].protocol](self, name, asked)

    def with_bos(self, row: Benchmark) -> bool:
        """Whether BOS goes in front: as the benchmark, the option and lm_eval's rule say."""
        if row.bos == "always" or self.bos == "always":
            return True
        return self.bos == "harness" and M.FAMILIES[self.model.config.model_type].harness_bos

    def completions(self, prompts: list[str], limit: int, stops: tuple[str, ...], bos: bool,
                    desc: str) -> list[str]:
        """Greedy completions, cut at the first stop string, in the order of the prompts."""
        ids = [self.tokenizer.encode(p, bos) for p in prompts]
        limit = self.max_new_tokens or limit
        most = max(map(len, ids), default=0) + limit
        if most > self.model.config.max_position_embeddings:
            print(f"note: {desc} may take {most} tokens, and the model was made for "
                  f"{self.model.config.max_position_embeddings}")
        tail = max(map(len, stops), default=0) + 8  # tokens; some are only part of a letter

        def stop(new: list[int]) -> bool:
            text = self.tokenizer.decode(new[-tail:])
            return any(s in text for s in stops)

        with tqdm(total=len(ids), desc=desc, leave=False, disable=None) as bar:
            new = M.generate(self.model, ids, limit, self.tokenizer.eos_ids,
                             stop if stops else None, self.batch_size, lambda *_: bar.update())
        return [cut(self.tokenizer.decode(tokens), stops) for tokens in new]

    def answer_loss(self, rows: list[data.Row], task: str) -> float | None:
        """Mean loss (nats per token) of the reference answers under the task's prompt.

        None where no answer fits into 512 tokens, and where the loss is not finite.
        """
        examples = [data.tokenise(self.tokenizer, *data.question_and_response(r), 512,
                                  data.TASKS[task].prompt) for r in rows]
        return mean_loss(self.model, [e for e in examples if e], "answer loss")

    def text_loss(self, text: str) -> float | None:
        """Mean loss (nats per token) of a text, read in pieces of 512 tokens: what a model that
        forgets loses first, without questions."""
        return mean_loss(self.model, data.pieces(text, self.tokenizer, 512), "text loss")


@torch.inference_mode()
def mean_loss(model: M.Model, examples: list[data.Example], desc: str = "loss") -> float | None:
    """Mean loss in nats per labelled token; None without any, and where it is not finite."""
    total, count = 0.0, 0
    with M.evaluating(model):
        for batch in tqdm(data.batches_by_length(examples, lambda e: len(e.ids), 8), desc=desc,
                          leave=False, disable=None):
            nll, n = model.loss(**data.collate(batch, M.embedding(model).device))
            total, count = total + nll.item(), count + n
    return total / count if count and math.isfinite(total) else None


def known_examples(task: str, tokenizer: checkpoint.Tokenizer, limit: int) -> list[data.Example]:
    """The first questions of each knowledge benchmark of the task, with the right answer as
    response."""
    examples = []
    for name in of_group(BENCHMARKS, data.TASKS[task].knowledge):
        for q in questions(name, data.read_rows(BENCHMARKS[name].source)[:limit]):
            asked = tokenizer.encode(q.prompt)
            examples.append(data.Example(tokenizer.encode(f"{q.prompt} {q.gold[0]}"), len(asked)))
    return [e for e in examples if len(e.ids) > e.prompt_length]


def complete(evaluator: Evaluator, name: str, asked: list[Question]) -> list[dict]:
    """Generate greedily, extract the answer, judge it."""
    row = BENCHMARKS[name]
    if row.prepare:
        row.prepare()
    judge = (evaluator.scoring == "official" and row.official) or row.judge
    outputs = evaluator.completions([q.prompt for q in asked], row.new_tokens, row.stops,
                                    evaluator.with_bos(row), name)
    records = []
    for q, output in zip(asked, outputs, strict=True):
        answer = row.extract(output) if row.extract else output
        records.append({"prompt": q.prompt, "output": output, "extracted": answer, "gold": q.gold,
                        "correct": None if row.program else judge(answer, q.gold)})
    if row.program and evaluator.execute:
        execute(row.program, records, name)
    return records


def execute(program: Callable[[str, dict], str], records: list[dict], desc: str) -> None:
    """Run what the model wrote, each program in a sandbox, and add the verdicts to the records."""
    import sandbox

    programs = [program(r["extracted"], r["gold"]) for r in records]
    try:
        outcomes = sandbox.run_all(programs, progress=lambda each: tqdm(
            each, desc=f"{desc}, tests", total=len(programs), leave=False, disable=None))
    except OSError as error:  # what the model wrote took longer than what is lost here
        print(f"{desc}: {error}")
        return
    for record, outcome in zip(records, outcomes, strict=True):
        record |= {"correct": outcome.passed, "why": outcome.why}


def check_sandbox() -> None:
    """UserError unless programs can be run here; says what this system cannot keep them from."""
    try:
        import sandbox
        notes = sandbox.run("").notes
    except (ImportError, OSError) as error:
        raise UserError(f"--allow-code-execution: {error}") from None
    for note in notes:
        print(f"note: {note}")


def samples(records: list[dict]) -> str:
    """The programs in EvalPlus' format: it puts its own text of the task before the completion."""
    return "".join(json.dumps({"task_id": r["gold"]["task_id"], "completion": r["extracted"]})
                   + "\n" for r in records)


@torch.inference_mode()
def greedy_match(evaluator: Evaluator, name: str, asked: list[Question]) -> list[dict]:
    """Right when every token of some gold answer is the model's first choice."""
    tokenizer, model = evaluator.tokenizer, evaluator.model
    bos = evaluator.with_bos(BENCHMARKS[name])
    records, pairs = [], []
    for i, q in enumerate(asked):
        records.append({"prompt": q.prompt, "gold": q.gold, "matched": []})
        length = len(tokenizer.encode(q.prompt, bos))
        for answer in q.gold:
            whole = tokenizer.encode(f"{q.prompt} {answer}", bos)
            pairs.append((i, answer, data.Example(whole, length)))
    batches = data.batches_by_length(pairs, lambda p: len(p[2].ids), 4 * evaluator.batch_size)
    for batch in tqdm(batches, desc=name, leave=False, disable=None):
        inputs = data.collate([p[2] for p in batch], M.embedding(model).device)
        hidden, target = model.labelled(inputs["input_ids"], inputs["labels"])
        hit = (model.logits(hidden).argmax(-1) == target).tolist()
        for i, answer, example in batch:
            n = len(example.ids) - example.prompt_length
            here, hit = hit[:n], hit[n:]
            if all(here):
                records[i]["matched"].append(answer)
    for record in records:
        record["correct"] = bool(record["matched"])
    return records


def part_scores(asked: list[Question], records: list[dict]) -> dict[str, float]:
    """Scores in % of the parts of a benchmark, where it has parts."""
    verdicts: dict[str, list[bool]] = {}
    for q, record in zip(asked, records, strict=True):
        if q.part:
            verdicts.setdefault(q.part, []).append(record["correct"])
    return {part: 100 * sum(v) / len(v) for part, v in verdicts.items()}


@torch.inference_mode()
def classify(evaluator: Evaluator, name: str, asked: list[Question]) -> list[dict]:
    """The class with the highest score; with a single class its score, which is a number."""
    model, tokenizer = evaluator.model, evaluator.tokenizer
    examples = []
    for q in asked:
        ids, _ = tokenizer.encode_texts(q.prompt, model.config.longest)
        examples.append(data.Example(ids, len(ids), 0))
    records: list[dict] = [{} for _ in asked]
    batches = data.batches_by_length(range(len(asked)), lambda i: len(examples[i].ids),
                                     4 * evaluator.batch_size)
    with M.evaluating(model):
        for batch in tqdm(batches, desc=name, leave=False, disable=None):
            inputs = data.collate([examples[i] for i in batch], M.embedding(model).device)
            scores = model(inputs["input_ids"], inputs["attention_mask"]).float()
            found = scores[:, 0] if scores.shape[1] == 1 else scores.argmax(-1)
            for i, predicted, row in zip(batch, found.tolist(), scores.tolist(), strict=True):
                records[i] = {"prompt": asked[i].prompt, "scores": row, "predicted": predicted,
                              "gold": asked[i].gold, "correct": predicted == asked[i].gold}
    return records


def validator(model: M.Model, tokenizer: checkpoint.Tokenizer, asked: dict[str, list[Question]]
              ) -> Callable[[], dict[str, float | None]]:
    """A function that scores the model, as it then is, on these questions of benchmarks."""
    evaluator = Evaluator(model, tokenizer)

    def scores() -> dict[str, float | None]:
        with M.evaluating(model):
            return {b: score_of(b, evaluator.ask(b, q)) for b, q in asked.items()}

    return scores


def column_scores(name: str, records: list[dict]) -> dict[str, float | None]:
    """The scores in % of a benchmark that has several, by column; None where nothing was judged."""
    scores = {c: column_accuracy(records, c) for c in BENCHMARKS[name].columns}
    return {c: None if math.isnan(score) else score for c, score in scores.items()}


def score_of(name: str, records: list[dict]) -> float | None:
    """The benchmark's metric in %; None, and a line that says so, where it is undefined."""
    score = BENCHMARKS[name].metric(records)
    if math.isfinite(score):
        return score
    print(f"{name}: all predictions or all labels are equal, so the correlation is undefined")
    return None


def epoch_scores(run: Path) -> list[dict[str, float | None]]:
    """What train.py found at the end of each epoch, where the task has a validation set."""
    return [line["validation"] for line in figures.read_log(run) if "validation" in line]


def best_and_last(epochs: list[dict[str, float | None]]) -> Iterable[str]:
    """GLUE papers differ in which epoch they report: both, and what the best is chosen on."""
    for b in epochs[0] if epochs else ():
        scores = [-math.inf if (score := e.get(b)) is None else score for e in epochs]
        best = max(scores)
        if math.isfinite(best):
            yield (f"{b}: last epoch {shown(epochs[-1].get(b))}, best epoch {best:.2f} (number "
                   f"{scores.index(best) + 1} of {len(scores)}, chosen on the set it is scored on)")


PROTOCOLS = {"complete": complete, "greedy_match": greedy_match, "classify": classify}

# --------------------------------------------------------------------------------------- results


@dataclass
class Target:
    """What is to be evaluated: a run of train.py, or (run None) a model, with peft's adapter or
    as it is."""

    folder: Path  # of the model's files
    run: Path | None
    settings: Settings | None
    about: dict  # for results.json
    adapter: Path | None = None  # a folder of peft's

    @property
    def home(self) -> Path:
        """Where its results go."""
        name = (f"{self.adapter.resolve().name}-peft" if self.adapter else
                f"{model_name(self.about['model'])}-base")
        return self.run or Path("runs") / name

    @property
    def is_bare(self) -> bool:
        """Whether it is a model before any training of ours."""
        return self.run is None and self.adapter is None


def find_target(target: str, base: str | None = None) -> Target:
    """A run folder, peft's of an adapter, or a model by folder, short name or hub id; nothing is
    loaded yet.

    `about` says what results may be compared: `base_fingerprint` of the model before any
    training, `weights` of what is evaluated.
    """
    run = Path(target)
    if not is_run(run) and export.is_peft(run):
        named = base or export.peft_config(run).get("base_model_name_or_path")
        if not isinstance(named, str):
            raise UserError(f"{run}: names no base model; say with --base which it is")
        bare = untouched(named)
        about = bare.about | {"method": "peft", "adapter": run.resolve().name,
                              "weights": hash_of_file(run / export.WEIGHTS)}
        return Target(bare.folder, None, None, about, run)
    if not is_run(run):
        return untouched(target)
    s, recorded = read_run(run)
    if not finished(run):
        raise UserError(f"{run} is not finished; go on with: python train.py --resume {run}")
    about = {k: getattr(s, k) for k in ("model", "method", "task", "seed")}
    about |= {"settings": asdict(s), "trained_with": {k: v for k, v in recorded.items()
                                                      if k != "settings"}}
    about |= {"base_fingerprint": recorded.get("base_fingerprint"),
              "known_as": recorded.get("known_as", s.model)}
    if s.how.trains == "weights":
        folder = run / "model"
        about["weights"] = checkpoint.fingerprint(folder)
    else:
        folder = base_of(run, s, recorded, base)
        about["weights"] = hash_of_file(run / "adapter.safetensors")
    return Target(folder, run, s, about)


def untouched(model: str) -> Target:
    """A model as it is, by folder, short name or hub id."""
    folder = checkpoint.fetch(model)
    found = checkpoint.fingerprint(folder)
    return Target(folder, None, None, {
        "model": model, "method": "base", "task": None, "seed": None,
        "known_as": known_as(model, checkpoint.read_config(folder)),
        "base_fingerprint": found, "weights": found})


def check_task(target: Target) -> None:
    """UserError unless the model can be asked what its task asks."""
    name = task_of(target.about)
    classes = data.TASKS[name].classes
    for_task(checkpoint.read_config(target.folder), name)
    if classes and target.is_bare and not checkpoint.has_head(target.folder, classes):
        raise UserError(f"{target.folder}: has no classification head for {', '.join(classes)}; "
                        f"train one: train.py --model {target.about['model']} --task {name}")


def load_target(target: Target, dtype: str | None, device: str | None) -> M.Model:
    """The model, a run's adapters on it; notes in `about` how many parameters were trained.

    Adapters are merged in fp32; in bf16 they stay apart, since rounding the merged weight can
    lose what training changed.
    """
    s, task = target.settings, data.TASKS[task_of(target.about)]
    name = dtype or (s.dtype if s else None)
    model = checkpoint.load(target.folder, DTYPES[name] if name else None, device,
                            task.classes or None, seed=None)  # a run brings its head
    if s and s.how.trains == "weights":
        target.about["trainable"] = sum(p.numel() for p in model.parameters())
    elif target.run:
        checkpoint.load_adapter(model, target.run / "adapter.safetensors")
        frozen = s.how.frozen if s else ()
        target.about["trainable"] = sum(p.numel() for n, p in model.named_parameters()
                                        if p.requires_grad and n.rpartition(".")[2] not in frozen)
    elif target.adapter:
        adapter = export.read_peft(model, target.adapter)
        checkpoint.put_adapter(model, adapter)
        target.about["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if M.adapted_layers(model) and M.embedding(model).dtype == torch.float32:
        M.merge(model)
    return model


def scores_in(results: dict, group: str | None = None) -> dict[str, float]:
    """{column: score} of all benchmarks, or of those of a group, NaN for an undefined one. Most
    have a single column, by their own name."""
    chosen = {b: r for b, r in results["benchmarks"].items()
              if group is None or BENCHMARKS[b].group == group}
    return {column: math.nan if score is None else score
            for column, score in flat_scores(chosen).items()}


def task_of(about: dict) -> str:
    """The task of a run; of an untouched model the one that it would be trained on."""
    return about["task"] or default_task(name_of(about))


def name_of(about: dict) -> str:
    """The model's name in the tables of settings and of the paper's scores."""
    return about.get("known_as", about["model"])


def hash_of_file(path: Path) -> str:
    """Tells one adapter from another."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; pickled adapters are not read") from None


def hash_of(asked: list[Question]) -> str:
    """Tells one set of questions from another."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def kept_benchmarks(out: Path, results: dict, again: list[str]) -> dict[str, dict]:
    """What an earlier evaluation of the same weights found on other benchmarks."""
    path = out / "results.json"
    if not path.exists():
        return {}
    old = read_results(path)
    if any(old.get(key) != results[key] for key in ("weights", "dtype", "method")):
        print(f"{path}: was of other weights or another dtype, and is replaced")
        return {}
    return {b: r for b, r in old["benchmarks"].items() if b in BENCHMARKS and b not in again}


def paper_tables() -> dict[str, list[dict[str, str]]]:
    """The paper's tables ("01", "02a", ...): their rows by column, as printed, "" where nothing
    is."""
    tables = {}
    for path in sorted(PAPER_TABLES.glob("table_*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            tables[path.stem.removeprefix("table_")] = list(csv.DictReader(file))
    return tables


def paper_references(model: str, task: str) -> tuple[dict[str, str], dict[str, str]] | None:
    """The rows of a model before and after full fine-tuning in the table that has both for the
    task; None without one."""
    for table in paper_tables().values():
        rows = {row.get("method"): row for row in table
                if (row.get("model"), row.get("task")) == (model, task)}
        if "origin" in rows and "Full fine-tuning" in rows:
            return rows["origin"], rows["Full fine-tuning"]
    return None


def paper_row(about: dict) -> tuple[dict[str, float], dict[str, float]]:
    """The paper's scores of a model before and after full fine-tuning; UserError without any."""
    rows = paper_references(name_of(about), task_of(about))
    if rows is None:
        raise UserError(f"the paper prints no scores of {about['model']} for {about['task']}; "
                          "give a results file")
    columns = [c for b in BENCHMARKS for c in columns_of(b)]
    before, full = ({c: float(row[c]) for c in columns if row.get(c)} for row in rows)
    return before, full


def reference(results: dict, source: str | Path, which: int, benchmarks: list[str]
              ) -> dict[str, float]:
    """Scores to divide by: the paper's (`which` 0: origin, 1: full), or those of a results file,
    which must come from the same questions under the same settings."""
    if source == "paper":
        row = paper_row(results)
        for b in benchmarks:
            mine = results["benchmarks"][b]
            unlike = [f"{key.replace('_', ' ')} {mine[key]}" for key, papers in
                      (("limit", None), ("max_new_tokens", None), ("bos", "harness"),
                       ("scoring", "official")) if mine.get(key) not in (None, papers)]
            if unlike:
                print(f"note: the paper's {b} was scored otherwise than here: {', '.join(unlike)}")
            if not row[which].keys() >= set(columns_of(b)):
                raise UserError(f"the paper prints no {b} of {results['model']}; give a results "
                                "file")
        return {c: row[which][c] for b in benchmarks for c in columns_of(b)}
    whole = read_results(source)
    check_comparable(results, whole, source, benchmarks)
    method = whole.get("method")
    if which and (method not in METHODS or METHODS[method].trains != "weights"):
        raise UserError(f"{source}: T divides by full fine-tuning, and this is {method}")
    return scores_in({"benchmarks": {b: whole["benchmarks"][b] for b in benchmarks}})


def check_comparable(mine: dict, other: dict, source: str | Path, benchmarks: list[str]
                     ) -> None:
    """UserError saying what differs, unless both are of one base model, the same questions and
    the same way to ask them. What a file does not record is not compared."""
    def refuse(what: str, key: str, here: dict, there: dict) -> None:
        if None not in (here.get(key), there.get(key)) and here[key] != there[key]:
            raise UserError(f"{source}: {what} has {key} {there[key]}, this one {here[key]}; the "
                            "two cannot be compared")

    refuse("its base model", "base_fingerprint", mine, other)
    refuse("it", "dtype", mine, other)
    for b in benchmarks:
        if b not in other["benchmarks"]:
            raise UserError(f"{source}: has no {b}")
        here, there = mine["benchmarks"][b], other["benchmarks"][b]
        for key in ("n", "questions", "scoring", "bos"):
            refuse(f"its {b}", key, here, there)
        if here.get("max_new_tokens") != there.get("max_new_tokens"):
            raise UserError(f"{source}: its {b} has max_new_tokens {there.get('max_new_tokens')}, "
                            f"this one {here.get('max_new_tokens')}; the two cannot be compared")


def summarise(results: dict, base: str | Path | None, full: str | Path | None
              ) -> dict[str, float | None]:
    """K, T, KT where their references are given, and Avg, for results.json."""
    scores, task_row = scores_in(results), data.TASKS[task_of(results)]
    known, task = (of_group(results["benchmarks"], group)
                   for group in (task_row.knowledge, task_row.group))
    before = reference(results, base, 0, known) if base and known else {}
    whole = reference(results, full, 1, task) if full and task else {}
    summary = summary_metrics(scores, before, whole)
    return {k: None if math.isnan(v) else v for k, v in summary.items()}


def mean_parts(results: dict) -> dict[str, float]:
    """Mean score of each part ("frequent", "rare") over the benchmarks that have it."""
    scores: dict[str, list[float]] = {}
    for b in results["benchmarks"].values():
        for part, score in b.get("parts", {}).items():
            scores.setdefault(part, []).append(score)
    return {part: sum(s) / len(s) for part, s in scores.items()}


def shown(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.2f}"


def table(runs: list[dict]) -> Iterable[str]:
    """One row per result; a score whose reference is 0 is "undefined"."""
    scores = [scores_in(r) for r in runs]
    names = list(dict.fromkeys(c for found in scores for c in found))
    apart = list(dict.fromkeys(part for r in runs for part in mean_parts(r)))
    has_loss = any("answer_loss" in b for r in runs for b in r["benchmarks"].values())
    columns = [*names, *apart, *(["answer loss"] if has_loss else []), "Avg", "K", "T", "KT"]
    width = {c: max(len(c), 9) + 2 for c in columns}
    yield f"{'method':10}{'trainable':>11}" + "".join(f"{c:>{width[c]}}" for c in columns)
    for r, found in zip(runs, scores, strict=True):
        cells = [shown(found[c]) if c in found else "-" for c in names]
        means = mean_parts(r)
        cells += [f"{means[part]:.2f}" if part in means else "-" for part in apart]
        if has_loss:
            loss = next((b["answer_loss"] for b in r["benchmarks"].values()
                         if "answer_loss" in b), None)
            cells.append("-" if loss is None else f"{loss:.4f}")
        cells += [shown(r["summary"][k]) if k in r["summary"] else "-"
                  for k in ("Avg", "K", "T", "KT")]
        count = f"{r['trainable'] / 1e6:.2f}M" if r.get("trainable") else "-"
        yield f"{r.get('method', '-'):10}{count:>11}" + "".join(
            f"{cell:>{width[c]}}" for c, cell in zip(columns, cells, strict=True))


# ------------------------------------------------------------------------------------------ main


def evaluation_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__ + "".join(f"    {name:14} {b.group}: {b.about}\n"
                                      for name, b in BENCHMARKS.items()))
    parser.add_argument("target", nargs="?", help="run folder, short name, hub id, model folder, "
                        "folder of peft's LoRA")
    parser.add_argument("--task", choices=tuple(data.TASKS), help="of an untouched model: whose "
                        "benchmarks, and for a classifier which classes (default: the model's)")
    parser.add_argument("--benchmarks", help="of " + ",".join(BENCHMARKS) + " (default: those of "
                        "the run's task)")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FILE", help="local files "
                        "or folders, for example --data gsm8k=test.jsonl (default: beside the "
                        "run's training data, else from the hub)")
    parser.add_argument("--limit", type=int, help="only the first questions of each benchmark")
    parser.add_argument("--batch-size", type=int, default=16, help="default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, help="instead of the protocol's own "
                        "(gsm8k 1024, math 2048, nq_open 256)")
    parser.add_argument("--bos", choices=("harness", "always", "never"), default="harness",
                        help="BOS before knowledge questions; harness: none, as lm_eval "
                        "(but on Gemma); default %(default)s")
    parser.add_argument("--scoring", choices=("strict", "official"), default="strict",
                        help="gsm8k: exact numbers, math: the same normal form; or the "
                        "official code's lenient rules; default %(default)s")
    parser.add_argument("--allow-code-execution", action="store_true", help="run the programs that "
                        "the model wrote (humaneval, mbpp), in sandbox.py, which is no security "
                        "boundary: for a model that you do not trust do it in a container or a VM")
    parser.add_argument("--base-results", metavar="paper|FILE|RUN", help="scores before fine-"
                        "tuning, for K (default: runs/<model>-base, else those of "
                        "settings.PRESETS)")
    parser.add_argument("--full-results", metavar="paper|FILE|RUN", help="scores of full fine-"
                        "tuning, for T (default: those of settings.PRESETS)")
    parser.add_argument("--base", metavar="FOLDER", help="where a run's base model is now, if not "
                        "where it was; the one of peft's LoRA")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: the run's; for a "
                        "model float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="also the mean loss of this "
                        "text, which the model knew before")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the run's)")
    parser.add_argument("--table", nargs="+", metavar="RUN", help="print a table of finished "
                        "results and stop")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="RUN", help="draw finished runs "
                        "(K against T, forgetting on the way, ranks, spectra, loss) and stop; "
                        "pictures of several runs go into --out")
    args = parser.parse_args(argv)
    if [args.target, args.table, args.plot].count(None) != 2:
        parser.error("give one run or model, --table RUN ... or --plot RUN ...")
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.benchmarks = args.benchmarks.split(",") if args.benchmarks else None
    unknown = [b for b in args.benchmarks or [] if b not in BENCHMARKS]
    if unknown:
        parser.error(f"--benchmarks {unknown[0]}: there are {', '.join(BENCHMARKS)}")
    args.data = dict(item.partition("=")[::2] for item in args.data)
    wrong = [n for n, file in args.data.items() if n not in BENCHMARKS or not file]
    if wrong:
        parser.error(f"--data {wrong[0]}: write NAME=FILE with NAME one of "
                     + ", ".join(BENCHMARKS))
    return args


def own_source(s: Settings | None, benchmark: str) -> str:
    """Where the questions are unless --data says otherwise: beside a run's own training data, if
    those were a folder with both."""
    row = BENCHMARKS[benchmark]
    own = (s is not None and Path(s.data).is_dir() and row.group == data.TASKS[s.task].group
           and data.stands_in(Path(s.data), row.source))
    return s.data if s is not None and own else row.source


def rows_of(benchmark: str, s: Settings | None, named: str | None = None) -> list[data.Row]:
    """The rows that a benchmark asks, from a file or folder that is named, else its own source."""
    return kept(benchmark, data.read_rows(named or own_source(s, benchmark),
                                          BENCHMARKS[benchmark].source))


def run_benchmark(evaluator: Evaluator, name: str, rows: list[data.Row], asked: list[Question]
                  ) -> tuple[dict[str, Any], list[dict]]:
    """(what results.json says of the benchmark, one record per question); prints it in a line."""
    began, row = time.perf_counter(), BENCHMARKS[name]
    records = evaluator.ask(name, asked)
    judged = records[0]["correct"] is not None
    found: dict[str, Any] = {"n": len(records)}
    if row.columns:
        found["scores"] = column_scores(name, records)
    else:
        found["score"] = score_of(name, records) if judged else None
    if judged and row.metric is accuracy and not row.columns:
        found["correct"] = sum(r["correct"] for r in records)
    if row.loss_under:
        found["answer_loss"] = evaluator.answer_loss(rows, row.loss_under)
    parts = part_scores(asked, records)
    found |= {"parts": parts} if parts else {}
    found["seconds"] = round(time.perf_counter() - began, 1)
    what = (", ".join(f"{c} {shown(v)}" for c, v in found["scores"].items())
            + f" over {found['n']}" if "scores" in found else
            f"{found['n']} programs, not executed: --allow-code-execution runs them, or give eval/"
            f"{name}-samples.jsonl to EvalPlus" if not judged else
            f"{found['correct']} of {found['n']} right" if "correct" in found else
            f"undefined over {found['n']}" if found["score"] is None else
            f"{row.about} {found['score']:.2f} over {found['n']}")
    print(f"{name:8} {what}"
          + (f", answer loss {found['answer_loss']:.4f}" if found.get("answer_loss") else "")
          + "".join(f", {part} {score:.1f} %" for part, score in parts.items())
          + f" ({found['seconds']:.0f} s)")
    return found, records


def plot(runs: list[Path], out: Path) -> Iterable[Path]:
    """Draw what finished runs have to show; yields each picture's path. UserError without any."""
    pyplot = figures.plotting()
    if pyplot is None:
        raise UserError(figures.MISSING)
    for run in runs:
        if not is_run(run):
            raise UserError(f"{run}: no run of train.py")
        yield from figures.draw_run(pyplot, run)
    rows = [row for run in runs if (row := tradeoff_row(run)) is not None]
    curves = {run.name: lines for run in runs
              if (lines := [line for line in figures.read_log(run) if "scores" in line])}
    if rows or curves:
        out.mkdir(parents=True, exist_ok=True)
    if rows:
        figures.draw_tradeoff(pyplot, rows, out / "tradeoff.png")
        yield out / "tradeoff.png"
    if curves:
        groups = {b: BENCHMARKS[b].group for lines in curves.values() for b in lines[0]["scores"]}
        figures.draw_curves(pyplot, curves, groups, out / "curves.png")
        yield out / "curves.png"


def tradeoff_row(run: Path) -> dict[str, Any] | None:
    """Method, lr, K and T of an evaluated run; None where it has no K or no T."""
    if not (run / "results.json").exists():
        return None
    results = read_results(run)
    K, T = (results["summary"].get(key) for key in ("K", "T"))
    return None if K is None or T is None else {
        "method": results["method"], "lr": results["settings"]["lr"], "K": K, "T": T}


def main(argv: list[str] | None = None) -> None:
    args = evaluation_arguments(argv)
    if args.table:
        print("\n".join(table([read_results(run) for run in args.table])))
        return
    if args.plot:
        for path in plot(args.plot, args.out or Path("runs") / "plots"):
            print(path)
        return
    target = find_target(args.target, args.base)
    about = target.about
    if args.task and target.run:
        raise UserError(f"--task goes with an untouched model; {target.run} has its own")
    about["task"] = args.task or about["task"]
    check_task(target)
    task = data.TASKS[task_of(about)]
    for b in args.benchmarks or ():  # a classifier has one task's classes, and generates nothing
        if (task.classes or BENCHMARKS[b].protocol == "classify") and (
                BENCHMARKS[b].group != task.group):
            raise UserError(f"--benchmarks {b}: {args.target} is for {task_of(about)}, whose are "
                            + ", ".join(of_task(task_of(about))))
    # A run is compared with its base model's results where they are.
    base, full = args.base_results, args.full_results
    if not target.is_bare:
        stored = preset(name_of(about), task_of(about))
        own = Path("runs") / f"{model_name(about['model'])}-base" / "results.json"
        base = base or next((p for p in (own, stored.base_results) if p and p.exists()), None)
        full = full or next((p for p in (stored.full_results,) if p and p.exists()), None)
    for source in (base, full):  # refuse what is not there before the long work
        if source == "paper":
            paper_row(about)
        elif source:
            read_results(source)
    text = data.read_text(args.text) if args.text else ""
    rows = {b: rows_of(b, target.settings, args.data.get(b))[: args.limit]
            for b in args.benchmarks or of_task(task_of(about))}
    if args.allow_code_execution and any(BENCHMARKS[b].program for b in rows):
        check_sandbox()
    asked = {b: questions(b, r) for b, r in rows.items()}
    use_threads(target.settings.threads if target.settings else
                preset(name_of(about), task_of(about)).settings.get("threads"))
    model = load_target(target, args.dtype, args.device)
    out = args.out or target.home
    tokenizer = checkpoint.Tokenizer(target.folder, model.config)
    evaluator = Evaluator(model, tokenizer, args.batch_size, args.max_new_tokens, args.bos,
                          args.scoring, args.allow_code_execution)
    results = about | {"benchmarks": {}, "dtype": str(M.embedding(model).dtype),
                       "batch_size": args.batch_size} | provenance()
    results["benchmarks"] = kept_benchmarks(out, results, list(rows))
    epochs = epoch_scores(target.run) if target.run else []
    results |= {"epochs": epochs} if epochs else {}
    for benchmark in rows:
        found, records = run_benchmark(evaluator, benchmark, rows[benchmark], asked[benchmark])
        settings = {"bos": args.bos, "max_new_tokens": args.max_new_tokens, "limit": args.limit,
                    "scoring": args.scoring if BENCHMARKS[benchmark].official else None,
                    "questions": hash_of(asked[benchmark])}
        results["benchmarks"][benchmark] = found | settings
        (out / "eval").mkdir(parents=True, exist_ok=True)
        with checkpoint.atomic(out / "eval" / f"{benchmark}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps({"id": i} | r) + "\n"
                                         for i, r in enumerate(records)))
        if BENCHMARKS[benchmark].program:
            with checkpoint.atomic(out / "eval" / f"{benchmark}-samples.jsonl") as temporary:
                temporary.write_text(samples(records))
        # After each, and without references: neither Ctrl-C nor one that does not fit costs it.
        results["summary"] = summarise(results, None, None)
        checkpoint.save_json(out / "results.json", results)
    for sentence in best_and_last(epochs):
        print(sentence)
    if args.text:
        loss = evaluator.text_loss(text)
        results["text"] = {"file": args.text.name, "loss": loss,
                           "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
        print(f"{args.text}: {loss} nats a token" if loss is None else
              f"{args.text}: {loss:.4f} nats a token")
        checkpoint.save_json(out / "results.json", results)
    try:
        results["summary"] = summarise(results, base, full)
        checkpoint.save_json(out / "results.json", results)
    except UserError as error:
        if args.base_results or args.full_results:
            raise
        print(f"no K and T: {error}")
    for name, group in (("K", data.TASKS[task_of(about)].knowledge),
                        ("T", data.TASKS[task_of(about)].group)):
        if name in results["summary"]:
            print(f"{name} is over " + ", ".join(of_group(results["benchmarks"], group)))
    print("\n".join(table([results])))


if __name__ == "__main__":
    run_main(main, "try a smaller --batch-size")
