"""Score a model or a run on the paper's benchmarks; K, T and KT (Eq. 36-38).

    python eval.py runs/NAME                    a run of train.py, against its base model's results
    python eval.py microcosm                    the untouched model (a short name, hub id, folder)
    python eval.py ADAPTER --base MODEL         a LoRA of peft on its base model
    python eval.py --rescore runs/NAME          judge the outputs that were kept again, no model
    python eval.py --table runs/A runs/B        one table of finished results, nothing is run

Writes results.json, and eval/BENCHMARK.jsonl with every prompt, output and verdict, into the run's
folder, for an untouched model into runs/<model>-base. What was answered before an interruption is
kept, and the same command goes on behind it.

The benchmarks (rows of benchmarks.py), by the group that they measure:
"""

import argparse
import hashlib
import math
import os
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
import plan
from benchmarks import (
    BENCHMARKS,
    SUITES,
    Benchmark,
    Question,
    kept,
    of_group,
    of_task,
    questions,
)
from checkpoint import UserError
from farss import harmonic_mean, knowledge_score, task_score
from results import (
    FROM_RECORDS,
    Answers,
    Finished,
    best_and_last,
    epoch_scores,
    forgetting,
    hash_of,
    in_words,
    kept_answers,
    kept_benchmarks,
    name_of,
    paper_row,
    read_records,
    read_results,
    reference,
    score_of,
    scores_in,
    table,
    task_of,
    verdicts,
    write_records,
)
from settings import (
    CUDNN_ATTENTION,
    DTYPES,
    Parser,
    Settings,
    base_of,
    check_compiler,
    finished,
    for_task,
    is_out_of_memory,
    is_run,
    known_as,
    model_name,
    preset,
    provenance,
    read_run,
    run_main,
    use_device,
    use_threads,
)

if os.environ.get("WORLD_SIZE", "1") == "1":
    import alone as parallel
else:  # torchrun has started several processes
    from fast import distributed as parallel  # type: ignore[no-redef]

# --------------------------------------------------------------------------- K, T, KT and Avg


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


# ------------------------------------------------------------------------------------ protocols


def cut(text: str, stops: Iterable[str]) -> str:
    """What stands before the first of the stop strings."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


KNOWLEDGE = {task.knowledge for task in data.TASKS.values()} - {""}  # groups of benchmarks
MOST = 64  # questions at a time: half the time of 16 on the microcosm, and 128 save a seventh more


def nobody(i: int, said: dict) -> None:
    """Need not be told."""


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

    def ask(self, name: str, asked: list[Question], known: Answers | None = None,
            finished: Finished = nobody) -> list[dict]:
        """One record per question: prompt, gold, verdict, and what led to it.

        What is `known` is not asked; each new answer is given to `finished` as soon as it is there.
        Several processes ask a shard of the questions each, in which `known` and `finished` count
        theirs; all have all records.
        """
        prepare = BENCHMARKS[name].prepare
        if prepare:
            prepare()
        said = parallel.gather(self.answers(name, parallel.shard(asked), known or {}, finished))
        return parallel.same(judged(name, asked, said, self.scoring, self.execute)
                             if parallel.first() else [])

    def answers(self, name: str, asked: list[Question], known: Answers, finished: Finished
                ) -> list[dict]:
        """What the model says to each question, in their order. Where the memory does not do for a
        batch, the rest is asked in batches of half the size."""
        found = dict(known)

        def keep(i: int, said: dict) -> None:
            found[i] = said
            finished(i, said)

        answer = PROTOCOLS[BENCHMARKS[name].protocol].answer
        while True:
            try:
                found |= answer(self, name, asked, dict(found), keep)
                return [found[i] for i in range(len(asked))]
            except RuntimeError as error:
                if self.batch_size == 1 or not is_out_of_memory(error):
                    raise
            self.batch_size //= 2  # here the error no longer holds what filled the memory
            print(f"{name}: out of memory; {self.batch_size} at a time from here on")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def room(self, name: str, asked: list[Question]) -> int:
        """How many questions at a time the free memory has room for, at most MOST."""
        device, row = M.embedding(self.model).device, BENCHMARKS[name]
        each = PROTOCOLS[row.protocol].memory(self, row, asked)
        free = plan.device_memory(str(device)) - M.packed_size(self.model)
        return max(1, min(MOST, int(0.8 * free / each)))

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return M.embedding(self.model).element_size()

    def longest(self, texts: list[str]) -> int:
        """Tokens of the longest, which is one of the eight with the most letters."""
        return max(len(self.tokenizer.encode(t)) for t in sorted(texts, key=len)[-8:])

    def with_bos(self, row: Benchmark) -> bool:
        """Whether BOS goes in front: as the benchmark, the option and lm_eval's rule say."""
        if row.bos == "always" or self.bos == "always":
            return True
        return self.bos == "harness" and M.FAMILIES[self.model.config.model_type].harness_bos

    def completions(self, prompts: list[str], limit: int, stops: tuple[str, ...], bos: bool,
                    desc: str, finished: Callable[[int, str], None] | None = None) -> list[str]:
        """Greedy completions, cut at the first stop string, in the order of the prompts.

        As soon as one has come to its end, `finished(index, completion)` is called.
        """
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

        def text_of(tokens: list[int]) -> str:
            return cut(self.tokenizer.decode(tokens), stops)

        def done(i: int, tokens: list[int]) -> None:
            bar.update()
            if finished:
                finished(i, text_of(tokens))

        with tqdm(total=len(ids), desc=desc, leave=False, disable=None) as bar:
            new = M.generate(self.model, ids, limit, self.tokenizer.eos_ids,
                             stop if stops else None, self.batch_size, done)
        return [text_of(tokens) for tokens in new]

    def answer_loss(self, rows: list[data.Row], task: str) -> float | None:
        """Mean loss (nats per token) of the reference answers under the task's prompt.

        None where no answer fits into 512 tokens, and where the loss is not finite.
        """
        examples = [data.tokenise(self.tokenizer, *data.question_and_response(r), 512,
                                  data.TASKS[task].prompt) for r in rows]
        return mean_loss(self.model, [e for e in examples if e], "answer loss")

    def known_loss(self, name: str, asked: list[Question]) -> float | None:
        """Mean loss (nats per token) of the first right answer of each question: what was known is
        forgotten here before a greedy answer changes."""
        return mean_loss(self.model, answer_examples(
            self.tokenizer, asked, self.with_bos(BENCHMARKS[name])), "loss of right answers")

    def text_loss(self, text: str) -> float | None:
        """Mean loss (nats per token) of a text, read in pieces of 512 tokens: what a model that
        forgets loses first, without questions."""
        return mean_loss(self.model, data.pieces(text, self.tokenizer, 512), "text loss")


@torch.inference_mode()
def mean_loss(model: M.Model, examples: list[data.Example], desc: str = "loss") -> float | None:
    """Mean loss in nats per labelled token; None without any, and where it is not finite."""
    found = []
    with M.evaluating(model), M.products(model):
        for batch in tqdm(parallel.shard(data.batches_by_length(examples, lambda e: len(e.ids), 8)),
                          desc=desc, leave=False, disable=None):
            loss, labelled = model.loss(**data.collate(batch, M.embedding(model).device))
            found.append((loss.item(), labelled))
    total, count = 0.0, 0
    for nll, n in parallel.gather(found):  # in their order, whoever made them
        total, count = total + nll, count + n
    return total / count if count and math.isfinite(total) else None


def answer_examples(tokenizer: checkpoint.Tokenizer, asked: list[Question], bos: bool = True
                    ) -> list[data.Example]:
    """Each question with its first right answer as response."""
    examples = [data.Example(tokenizer.encode(f"{q.prompt} {q.gold[0]}", bos),
                             len(tokenizer.encode(q.prompt, bos))) for q in asked]
    return [e for e in examples if e.targets > 0]


def known_examples(task: str, tokenizer: checkpoint.Tokenizer, limit: int) -> list[data.Example]:
    """The first questions of each knowledge benchmark of the task, with the right answer as
    response."""
    return [e for name in of_group(BENCHMARKS, data.TASKS[task].knowledge)
            for e in answer_examples(tokenizer, questions(
                name, data.read_rows(BENCHMARKS[name].source)[:limit]))]


def judged(name: str, asked: list[Question], said: list[dict], scoring: str, run: bool
           ) -> list[dict]:
    """One record per question, from what the model said; no model is needed. `run`: also the
    programs that it wrote."""
    row = BENCHMARKS[name]
    judge = PROTOCOLS[row.protocol].judge
    records = [judge(row, q, what, scoring) | ({"part": q.part} if q.part else {})
               for q, what in zip(asked, said, strict=True)]
    if row.program and run:
        execute(row.program, records, name)
    return records


def complete(evaluator: Evaluator, name: str, asked: list[Question], known: Answers,
             finished: Finished) -> Answers:
    """Generate greedily."""
    row, rest = BENCHMARKS[name], [i for i in range(len(asked)) if i not in known]
    outputs = evaluator.completions([asked[i].prompt for i in rest], row.new_tokens, row.stops,
                                    evaluator.with_bos(row), name,
                                    lambda j, text: finished(rest[j], {"output": text}))
    return {i: {"output": output} for i, output in zip(rest, outputs, strict=True)}


def judge_output(row: Benchmark, q: Question, said: dict, scoring: str) -> dict:
    """Extract the answer from what was generated, and judge it."""
    judge = (scoring == "official" and row.official) or row.judge
    answer = row.extract(said["output"]) if row.extract else said["output"]
    return {"prompt": q.prompt, "output": said["output"], "extracted": answer, "gold": q.gold,
            "correct": None if row.program else judge(answer, q.gold)}


def generation_memory(evaluator: Evaluator, row: Benchmark, asked: list[Question]) -> float:
    """Bytes for each question in work."""
    prompt = evaluator.longest([q.prompt for q in asked])
    new = evaluator.max_new_tokens or row.new_tokens
    return plan.question_memory(evaluator.model.config, evaluator.itemsize, prompt / 8, 1,
                                prompt + new)  # an eighth of the prompts at a time


def execute(program: Callable[[str, dict], str], records: list[dict], desc: str) -> None:
    """Run what the model wrote, each program in a sandbox, and add the verdicts to the records."""
    import sandbox

    programs = [program(r["extracted"], r["gold"]) for r in records]
    try:
        jobs = max(1, (os.cpu_count() or 1) // parallel.size())
        outcomes = sandbox.run_all(programs, jobs=jobs, progress=lambda each: tqdm(
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


@torch.inference_mode()
def greedy_match(evaluator: Evaluator, name: str, asked: list[Question], known: Answers,
                 finished: Finished) -> Answers:
    """Which gold answers have every token as the model's first choice."""
    tokenizer, model = evaluator.tokenizer, evaluator.model
    bos = evaluator.with_bos(BENCHMARKS[name])
    pairs, left = [], {}
    said: Answers = {i: {"matched": []} for i in range(len(asked)) if i not in known}
    for i in said:
        prompt, golds = asked[i].prompt, asked[i].gold
        left[i], length = len(golds), len(tokenizer.encode(prompt, bos))
        pairs += [(i, answer, data.Example(tokenizer.encode(f"{prompt} {answer}", bos), length))
                  for answer in golds]
    batches = data.batches_by_length(pairs, lambda p: len(p[2].ids), 4 * evaluator.batch_size)
    with M.products(model):
        for batch in tqdm(batches, desc=name, leave=False, disable=None):
            inputs = data.collate([p[2] for p in batch], M.embedding(model).device)
            hidden, target = model.labelled(inputs["input_ids"], inputs["labels"])
            hit = (model.logits(hidden).argmax(-1) == target).tolist()
            for i, answer, example in batch:
                n = len(example.ids) - example.prompt_length
                here, hit = hit[:n], hit[n:]
                if all(here):
                    said[i]["matched"].append(answer)
                left[i] -= 1
                if not left[i]:
                    finished(i, said[i])
    return said


def judge_matches(row: Benchmark, q: Question, said: dict, scoring: str) -> dict:
    """Right when some gold answer matched."""
    return {"prompt": q.prompt, "gold": q.gold, "matched": said["matched"],
            "correct": bool(said["matched"])}


def matching_memory(evaluator: Evaluator, row: Benchmark, asked: list[Question]) -> float:
    """Bytes for each question in work: four answers."""
    tokens = evaluator.longest([f"{q.prompt} {max(q.gold, key=len)}" for q in asked])
    answer = evaluator.longest([max(q.gold, key=len) for q in asked])
    return 4 * plan.question_memory(evaluator.model.config, evaluator.itemsize, tokens, answer)


@torch.inference_mode()
def classify(evaluator: Evaluator, name: str, asked: list[Question], known: Answers,
             finished: Finished) -> Answers:
    """The scores of the classes. A batch of which anything is unknown is scored as a whole, so that
    an interruption changes no bit."""
    model, tokenizer = evaluator.model, evaluator.tokenizer
    examples = []
    for q in asked:
        ids, _ = tokenizer.encode_texts(q.prompt, model.config.longest)
        examples.append(data.Example(ids, len(ids), 0))
    said: Answers = {}
    batches = [batch for batch in data.batches_by_length(
        range(len(asked)), lambda i: len(examples[i].ids), 4 * evaluator.batch_size)
        if not known.keys() >= set(batch)]
    with M.evaluating(model), M.products(model):
        for batch in tqdm(batches, desc=name, leave=False, disable=None):
            inputs = data.collate([examples[i] for i in batch], M.embedding(model).device)
            scores = model(inputs["input_ids"], inputs["attention_mask"]).float()
            for i, row in zip(batch, scores.tolist(), strict=True):
                said[i] = {"scores": row}
                finished(i, said[i])
    return said


def judge_class(row: Benchmark, q: Question, said: dict, scoring: str) -> dict:
    """The class with the highest score; of a single class its score, which is a number."""
    scores = said["scores"]
    predicted = scores[0] if len(scores) == 1 else scores.index(max(scores))
    return {"prompt": q.prompt, "scores": scores, "predicted": predicted, "gold": q.gold,
            "correct": predicted == q.gold}


def class_memory(evaluator: Evaluator, row: Benchmark, asked: list[Question]) -> float:
    """Bytes for each question in work: four are one batch."""
    config = evaluator.model.config
    tokens = min(config.longest, evaluator.longest([" ".join(q.prompt) for q in asked]))
    return 4 * plan.question_memory(config, evaluator.itemsize, tokens, 0)


def validator(model: M.Model, tokenizer: checkpoint.Tokenizer, asked: dict[str, list[Question]]
              ) -> Callable[[], dict[str, float | None]]:
    """A function that scores the model, as it then is, on these questions of benchmarks."""
    evaluator = Evaluator(model, tokenizer)

    def scores() -> dict[str, float | None]:
        with M.evaluating(model):
            return {b: score_of(b, evaluator.ask(b, q)) for b, q in asked.items()}

    return scores


class Protocol(NamedTuple):
    """How a model is asked, and what becomes of what it says."""

    answer: Callable[[Evaluator, str, list[Question], Answers, Finished], Answers]
    judge: Callable[[Benchmark, Question, dict, str], dict]  # what it said and --scoring: a record
    memory: Callable[[Evaluator, Benchmark, list[Question]], float]  # bytes for each question
    said: dict[str, type]  # what it says, as it stands in a record


PROTOCOLS = {
    "complete": Protocol(complete, judge_output, generation_memory, {"output": str}),
    "greedy_match": Protocol(greedy_match, judge_matches, matching_memory, {"matched": list}),
    "classify": Protocol(classify, judge_class, class_memory, {"scores": list}),
}

# -------------------------------------------------------------------------------- what is evaluated


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


def hash_of_file(path: Path) -> str:
    """Tells one adapter from another."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; pickled adapters are not read") from None


# ------------------------------------------------------------------------------------------ main


OF_THE_MODEL = ("task", "data", "limit", "batch_size", "max_new_tokens", "bos", "base", "dtype",
                "device", "text")  # options that --rescore has no use for


def batch_size(text: str) -> int | None:
    """--batch-size: a number, or None for auto."""
    if text == "auto":
        return None
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError("must be auto or at least 1")


def evaluation_parser() -> Parser:
    parser = Parser(__doc__ + "".join(f"    {name:14} {b.group}: {b.about}\n"
                                      for name, b in BENCHMARKS.items()))
    parser.add_argument("target", nargs="?", help="run folder, short name, hub id, model folder, "
                        "folder of peft's LoRA")
    parser.add_argument("--task", choices=tuple(data.TASKS), help="of an untouched model: whose "
                        "benchmarks, and for a classifier which classes (default: the model's)")
    parser.add_argument("--benchmarks", help="of " + ",".join(BENCHMARKS) + " (default: those of "
                        "the run's task)")
    parser.add_argument("--suite", help="the benchmarks of groups, of " + ", ".join(SUITES))
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FILE", help="local files "
                        "or folders, for example --data gsm8k=test.jsonl (default: beside the "
                        "run's training data, else from the hub)")
    parser.add_argument("--limit", type=int, help="only the first questions of each benchmark")
    parser.add_argument("--batch-size", type=batch_size, metavar="N|auto", help="questions at a "
                        "time, halved when memory runs out; they change no answer (default auto: "
                        f"what the free memory has room for, at most {MOST})")
    parser.add_argument("--max-new-tokens", type=int, help="instead of the protocol's own "
                        "(gsm8k 1024, math 2048, nq_open 256)")
    parser.add_argument("--bos", choices=("harness", "always", "never"), default="harness",
                        help="BOS before knowledge questions; harness: none, as lm_eval "
                        "(but on Gemma); default %(default)s")
    parser.add_argument("--scoring", choices=("strict", "official"),
                        help="gsm8k: exact numbers, math: the same normal form; or the "
                        "official code's lenient rules (default strict; with --rescore as before)")
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
    parser.add_argument("--compile", action="store_true", help="fuse norms and MLPs by "
                        "torch.compile: a minute at the start, for a GPU to be faster afterwards")
    parser.add_argument("--cudnn-attention", action="store_true", help=CUDNN_ATTENTION)
    parser.add_argument("--text", type=Path, metavar="FILE", help="also the mean loss of this "
                        "text, which the model knew before")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the run's)")
    parser.add_argument("--rescore", type=Path, metavar="RUN", help="judge the kept outputs of an "
                        "evaluated run again, without the model; with --out the old verdicts stay")
    parser.add_argument("--table", nargs="+", metavar="RUN", help="print a table of finished "
                        "results and stop")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="RUN", help="draw finished runs "
                        "(K against T, forgetting on the way, ranks, spectra, loss) and stop; "
                        "pictures of several runs go into --out")
    return parser


def evaluation_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of eval.py, checked as far as that goes without files."""
    parser = evaluation_parser()
    args = parser.parse_args(argv)
    if [args.target, args.rescore, args.table, args.plot].count(None) != 3:
        parser.error("give one run or model, --rescore RUN, --table RUN ... or --plot RUN ...")
    for name in ("limit", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in OF_THE_MODEL if args.rescore else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} asks the model, and --rescore does not")
    suites = args.suite.split(",") if args.suite else []
    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown:
        parser.error(f"--suite {unknown[0]}: there are {', '.join(SUITES)}")
    args.benchmarks = args.benchmarks.split(",") if args.benchmarks else []
    args.benchmarks += [b for suite in suites for b in SUITES[suite] if b not in args.benchmarks]
    unknown = [b for b in args.benchmarks if b not in BENCHMARKS]
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


def run_benchmark(evaluator: Evaluator, name: str, rows: list[data.Row], asked: list[Question],
                  known: Answers | None = None, finished: Finished = nobody
                  ) -> tuple[dict[str, Any], list[dict]]:
    """(what results.json says of the benchmark, one record per question); prints it in a line."""
    began, row = time.perf_counter(), BENCHMARKS[name]
    records = evaluator.ask(name, asked, known, finished)
    found = verdicts(name, asked, records)
    if row.loss_under:
        found["answer_loss"] = evaluator.answer_loss(rows, row.loss_under)
    if row.group in KNOWLEDGE:
        found["known_loss"] = evaluator.known_loss(name, asked)
    found["seconds"] = round(time.perf_counter() - began, 1)
    found["batch_size"] = evaluator.batch_size
    print(f"{in_words(name, found)} ({found['seconds']:.0f} s, {evaluator.batch_size} at a time)")
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
    if args.rescore:
        rescore(args)
        return
    if args.plot:
        for path in plot(args.plot, args.out or Path("runs") / "plots"):
            print(path)
        return
    parallel.check(args.device)
    target = find_target(args.target, args.base)
    about = target.about
    if args.task and target.run:
        raise UserError(f"--task goes with an untouched model; {target.run} has its own")
    about["task"] = args.task or about["task"]
    check_task(target)
    task = data.TASKS[task_of(about)]
    for b in args.benchmarks:  # a classifier has one task's classes, and generates nothing
        if (task.classes or BENCHMARKS[b].protocol == "classify") and (
                BENCHMARKS[b].group != task.group):
            raise UserError(f"--benchmarks {b}: {args.target} is for {task_of(about)}, whose are "
                            + ", ".join(of_task(task_of(about))))
    base, full = references(args, about)
    text = data.read_text(args.text) if args.text else ""
    rows = {b: rows_of(b, target.settings, args.data.get(b))[: args.limit]
            for b in args.benchmarks or of_task(task_of(about))}
    if args.allow_code_execution and any(BENCHMARKS[b].program for b in rows):
        check_sandbox()
    asked = {b: questions(b, r) for b, r in rows.items()}
    use_threads(target.settings.threads if target.settings else
                preset(name_of(about), task_of(about)).settings.get("threads"))
    use_device(checkpoint.pick_device(args.device), args.cudnn_attention)
    model = load_target(target, args.dtype, args.device)
    if args.compile:
        check_compiler(M.embedding(model).device)
        M.compile_parts(model)
    out = args.out or target.home
    tokenizer = checkpoint.Tokenizer(target.folder, model.config)
    scoring = args.scoring or "strict"
    evaluator = Evaluator(model, tokenizer, 1, args.max_new_tokens, args.bos, scoring,
                          args.allow_code_execution)
    results = about | {"benchmarks": {}, "dtype": str(M.embedding(model).dtype),
                       "compiled": args.compile, "cudnn_attention": args.cudnn_attention,
                       "batch_size": args.batch_size or "auto"} | provenance()
    results["benchmarks"] = kept_benchmarks(out, results, list(rows))
    epochs = epoch_scores(target.run) if target.run else []
    results |= {"epochs": epochs} if epochs else {}
    apart = f"-{parallel.rank()}-of-{parallel.size()}" if parallel.size() > 1 else ""
    partial = {b: out / "eval" / f"{b}{apart}.partial.jsonl" for b in rows}
    parallel.barrier()  # all have read the results of before
    for benchmark in rows:
        here = asked[benchmark]
        settings = {"bos": args.bos, "max_new_tokens": args.max_new_tokens, "limit": args.limit,
                    "scoring": scoring if BENCHMARKS[benchmark].official else None,
                    "questions": hash_of(here)}
        evaluator.batch_size = args.batch_size or evaluator.room(benchmark, here)
        with kept_answers(partial[benchmark], outputs_depend_on(
                target, evaluator, benchmark, settings["questions"]), evaluator.batch_size
                ) as (known, finished, size):
            if known:
                print(f"{benchmark}: {len(known)} of {len(parallel.shard(here))} answered before")
                evaluator.batch_size = args.batch_size or size
            found, records = run_benchmark(evaluator, benchmark, rows[benchmark], here, known,
                                           finished)
        results["benchmarks"][benchmark] = found | settings
        # After each, and without references: neither Ctrl-C nor one that does not fit costs it.
        results["summary"] = summarise(results, None, None)
        if parallel.first():
            write_records(out, benchmark, records)
            checkpoint.save_json(out / "results.json", results)
    for path in partial.values():  # until all is done, for an interrupted command asks them all
        path.unlink()
    for sentence in best_and_last(epochs):
        print(sentence)
    loss = evaluator.text_loss(text) if args.text else None
    if not parallel.first():
        return
    if args.text:
        results["text"] = {"file": args.text.name, "loss": loss,
                           "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
        print(f"{args.text}: {loss} nats a token" if loss is None else
              f"{args.text}: {loss:.4f} nats a token")
        checkpoint.save_json(out / "results.json", results)
    conclude(args, out, results, base, full)


def conclude(args: argparse.Namespace, out: Path, results: dict, base: str | Path | None,
             full: str | Path | None) -> None:
    """K, T and KT into results.json, and the table."""
    try:
        results["summary"] = summarise(results, base, full)
        checkpoint.save_json(out / "results.json", results)
        for sentence in forgetting(results, base):
            print(sentence)
    except UserError as error:
        if args.base_results or args.full_results:
            raise
        print(f"no K and T: {error}")
    for name, group in (("K", data.TASKS[task_of(results)].knowledge),
                        ("T", data.TASKS[task_of(results)].group)):
        if name in results["summary"]:
            print(f"{name} is over " + ", ".join(of_group(results["benchmarks"], group)))
    print("\n".join(table([results])))


def references(args: argparse.Namespace, about: dict
               ) -> tuple[str | Path | None, str | Path | None]:
    """Where the scores before fine-tuning and those of full fine-tuning are: as named; else of
    what was trained its base model's results and the stored ones. UserError for what is not there.
    """
    base, full = args.base_results, args.full_results
    if about["method"] != "base":
        stored = preset(name_of(about), task_of(about))
        own = Path("runs") / f"{model_name(about['model'])}-base" / "results.json"
        base = base or next((p for p in (own, stored.base_results) if p and p.exists()), None)
        full = full or next((p for p in (stored.full_results,) if p and p.exists()), None)
    for source in (base, full):  # refuse what is not there before the long work
        if source == "paper":
            paper_row(about)
        elif source:
            read_results(source)
    return base, full


def outputs_depend_on(target: Target, evaluator: Evaluator, name: str, asked: str) -> dict:
    """What a kept answer must agree with to be of use; not the size of the batches, since no answer
    depends on it, nor the judge."""
    row, model = BENCHMARKS[name], evaluator.model
    adapter = target.adapter and export.peft_config(target.adapter)
    return {
        "benchmark": name, "questions": asked,
        **{key: target.about[key] for key in ("base_fingerprint", "weights", "method")},
        "settings": target.about.get("settings"), "peft": adapter,
        "tokenizer": hash_of_file(target.folder / "tokenizer.json"),
        "dtype": str(M.embedding(model).dtype), "device": M.embedding(model).device.type,
        "torch": torch.__version__, "bos": evaluator.with_bos(row), "stops": list(row.stops),
        "max_new_tokens": evaluator.max_new_tokens or row.new_tokens}


def rescore(args: argparse.Namespace) -> None:
    """--rescore: verdicts, scores and summary anew from the kept records. Where an answer cannot be
    judged now (programs that are not to be run, checkers that are not installed) its verdict stays.
    """
    results = read_results(args.rescore)
    names = args.benchmarks or list(results["benchmarks"])
    missing = [b for b in names if b not in results["benchmarks"] or b not in BENCHMARKS]
    if missing:
        raise UserError(f"{args.rescore}: its results.json has no {missing[0]}")
    base, full = references(args, results)
    stored = {b: read_records(args.rescore, b, results["benchmarks"][b],
                              PROTOCOLS[BENCHMARKS[b].protocol].said) for b in names}
    if args.allow_code_execution and any(BENCHMARKS[b].program for b in names):
        check_sandbox()
    out = args.out or args.rescore
    (out / "eval").mkdir(parents=True, exist_ok=True)
    results["rescored"] = provenance()["commit"]
    for name, (asked, before) in stored.items():
        found, rule = results["benchmarks"][name], None
        if BENCHMARKS[name].official:
            rule = args.scoring or found.get("scoring") or "strict"
        records = judged(name, asked, before, rule or "strict", args.allow_code_execution)
        for record, old in zip(records, before, strict=True):
            if record["correct"] is None and record["extracted"] == old.get("extracted"):
                record |= {key: old[key] for key in ("correct", "why") if key in old}
        changed = sum(a["correct"] != b["correct"] for a, b in zip(records, before, strict=True))
        rest = {k: v for k, v in found.items() if k not in FROM_RECORDS}
        results["benchmarks"][name] = verdicts(name, asked, records) | rest | {"scoring": rule}
        print(f"{in_words(name, results['benchmarks'][name])}; verdicts changed: {changed}")
        write_records(out, name, records)
        results["summary"] = summarise(results, None, None)
        checkpoint.save_json(out / "results.json", results)
    conclude(args, out, results, base, full)


if __name__ == "__main__":
    run_main(parallel.together(main), "try a smaller --batch-size")
