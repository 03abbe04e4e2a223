"""The files of an evaluation: answers kept question by question, records, results.json.

    eval/BENCHMARK.partial.jsonl   what was answered before an interruption, until all is done
    eval/BENCHMARK.jsonl           a line for each question: prompt, output, verdict
    results.json                   scores, and what decides which others they may be compared with

From records to scores, from scores to what K and T divide by (another results.json, or the paper's
own tables), and results as a table. No model is needed for any of it.
"""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoint
import data
import figures
from benchmarks import BENCHMARKS, Question, accuracy, column_accuracy, columns_of
from checkpoint import UserError
from methods import METHODS
from settings import default_task, is_score

PAPER_TABLES = Path(__file__).resolve().parent / "notebooks" / "tables"
Answers = dict[int, dict]  # by question: what the model said, {"output": text} and the like
Finished = Callable[[int, dict], None]  # is told of each answer as soon as it is there

# ------------------------------------------------------------------------------ answers, one by one


@contextmanager
def kept_answers(path: Path, settings: dict[str, Any], batch_size: int
                 ) -> Iterator[tuple[Answers, Finished, int]]:
    """(what was answered before an interruption, where to put each new answer, the batch size at
    first, on which the last bits of a classifier's scores depend).

    The first line of the file names what the outputs depend on; a file of other `settings` starts
    anew. An answer is a line that is written at once, so that a killed process loses at most the
    questions that it was at. A line that was not written to its end is cut off.
    """
    known, whole, size = read_answers(path, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(whole)

        def keep(i: int, said: dict) -> None:
            file.write(json.dumps({"id": i} | said).encode() + b"\n")
            file.flush()

        if not whole:
            size = batch_size
            file.write(json.dumps({"batch_size": size} | settings).encode() + b"\n")
            file.flush()
        yield known, keep, size


def read_answers(path: Path, settings: dict[str, Any]) -> tuple[Answers, int, int]:
    """The answers in the whole lines of such a file, how many bytes these are, and the batch size;
    none of other settings."""
    known: Answers = {}
    whole = size = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            said = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        if whole:
            known[said.pop("id")] = said
        else:
            size = said.pop("batch_size")
            if json.dumps(said) != json.dumps(settings):
                break
        whole += len(line)
    return known, whole, size


# --------------------------------------------------------------------------- records of a benchmark


def hash_of(asked: list[Question]) -> str:
    """Tells one set of questions from another."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def write_records(out: Path, name: str, records: list[dict]) -> None:
    """eval/BENCHMARK.jsonl, and for EvalPlus the programs."""
    with checkpoint.atomic(out / "eval" / f"{name}.jsonl") as temporary:
        temporary.write_text("".join(json.dumps({"id": i} | r) + "\n"
                                     for i, r in enumerate(records)))
    if BENCHMARKS[name].program:
        with checkpoint.atomic(out / "eval" / f"{name}-samples.jsonl") as temporary:
            temporary.write_text(samples(records))


def samples(records: list[dict]) -> str:
    """The programs in EvalPlus' format: it puts its own text of the task before the completion."""
    return "".join(json.dumps({"task_id": r["gold"]["task_id"], "completion": r["extracted"]})
                   + "\n" for r in records)


def read_records(run: Path, name: str, found: dict[str, Any], said: dict[str, type]
                 ) -> tuple[list[Question], list[dict]]:
    """The questions of eval/BENCHMARK.jsonl, and the records; `found` is what results.json says of
    them, `said` what its protocol keeps of an answer (eval.Protocol). UserError for a file that is
    incomplete, or of other questions."""
    path = run / "eval" / f"{name}.jsonl"
    rows = data.read_rows(str(path))
    if [row.fields.get("id") for row in rows] != list(range(found["n"])):
        raise UserError(f"{path}: holds {len(rows)} records, and not the {found['n']} of "
                        "results.json in their order; evaluate again")
    for row in rows:
        missing = {"prompt", "gold", "correct"} - row.fields.keys()
        if missing:
            raise UserError(f"{row.where}: no {min(missing)!r}, so this is no record of eval.py")
        for key, kind in said.items():
            row.get([key], kind, may_be_empty=True)
    asked = [Question(r.fields["prompt"], r.fields["gold"], r.fields.get("part")) for r in rows]
    if found.get("questions") not in (None, hash_of(asked)):
        raise UserError(f"{path}: holds other questions than results.json; evaluate again")
    return asked, [row.fields for row in rows]


# ------------------------------------------------------------------------------------- results.json

FROM_RECORDS = ("n", "score", "scores", "correct", "parts")  # in results.json


def verdicts(name: str, asked: list[Question], records: list[dict]) -> dict[str, Any]:
    """What results.json says of a benchmark that follows from its records."""
    row, found = BENCHMARKS[name], dict[str, Any](n=len(records))
    judged = records[0]["correct"] is not None
    if row.columns:
        found["scores"] = column_scores(name, records)
    else:
        found["score"] = score_of(name, records) if judged else None
    if judged and row.metric is accuracy and not row.columns:
        found["correct"] = sum(r["correct"] for r in records)
    parts = part_scores(asked, records)
    return found | ({"parts": parts} if parts else {})


def part_scores(asked: list[Question], records: list[dict]) -> dict[str, float]:
    """Scores in % of the parts of a benchmark, where it has parts."""
    verdicts: dict[str, list[bool]] = {}
    for q, record in zip(asked, records, strict=True):
        if q.part:
            verdicts.setdefault(q.part, []).append(record["correct"])
    return {part: 100 * sum(v) / len(v) for part, v in verdicts.items()}


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


def in_words(name: str, found: dict[str, Any]) -> str:
    """What results.json says of a benchmark, in a line."""
    what = (", ".join(f"{c} {shown(v)}" for c, v in found["scores"].items())
            + f" over {found['n']}" if "scores" in found else
            f"{found['correct']} of {found['n']} right" if "correct" in found else
            f"{found['n']} programs, not executed: --allow-code-execution runs them, or give eval/"
            f"{name}-samples.jsonl to EvalPlus" if BENCHMARKS[name].program else
            f"undefined over {found['n']}" if found["score"] is None else
            f"{BENCHMARKS[name].about} {found['score']:.2f} over {found['n']}")
    return (f"{name:8} {what}"
            + (f", answer loss {found['answer_loss']:.4f}" if found.get("answer_loss") else "")
            + (f", known loss {found['known_loss']:.4f}" if found.get("known_loss") else "")
            + "".join(f", {part} {score:.1f} %" for part, score in found.get("parts", {}).items()))


def read_results(path: str | Path) -> dict:
    """results.json of a run folder, or the file itself, which may be a link; UserError for what
    eval.py does not write."""
    path = Path(path)
    path = (path / "results.json" if path.is_dir() else
            path.resolve() if path.is_file() and path.is_symlink() else path)
    results = checkpoint.read_json(path)
    found = results.get("benchmarks")
    each = [found, results.get("summary", {}), *(found.values() if isinstance(found, dict) else ())]
    if not all(isinstance(x, dict) for x in each):
        raise UserError(f"{path}: not a results.json of eval.py")
    results.setdefault("summary", {})
    if not isinstance(results.get("method", ""), str) or not is_score(results.get("trainable")):
        raise UserError(f"{path}: method or trainable is not what eval.py writes")
    several = [{} if "score" in b else b.get("scores") for b in each[2:]]
    several += [b.get("parts", {}) for b in each[2:]]
    single = [b.get(key) for b in each[2:] for key in ("score", "answer_loss")]
    if not all(isinstance(x, dict) for x in several) or not all(
            is_score(v) for x in (each[1], *several) for v in x.values()) or not all(
            is_score(v) for v in single) or any(
            v is None for b in each[2:] for v in b.get("parts", {}).values()):
        raise UserError(f"{path}: holds a score that is no number")
    return results


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


def scores_in(results: dict, group: str | None = None) -> dict[str, float]:
    """{column: score} of all benchmarks, or of those of a group, NaN for an undefined one. Most
    have a single column, by their own name."""
    chosen = {b: r for b, r in results["benchmarks"].items()
              if group is None or BENCHMARKS[b].group == group}
    return {column: math.nan if score is None else score
            for column, score in flat_scores(chosen).items()}


def flat_scores(benchmarks: dict[str, dict]) -> dict[str, float | None]:
    """{column: score} of the benchmarks of a results.json. Most have a single column, by their own
    name; those with several `scores` one for each."""
    return {column: score for name, b in benchmarks.items()
            for column, score in ({name: b["score"]} if "score" in b else b["scores"]).items()}


def task_of(about: dict) -> str:
    """The task of a run; of an untouched model the one that it would be trained on."""
    return about["task"] or default_task(name_of(about))


def name_of(about: dict) -> str:
    """The model's name in the tables of settings and of the paper's scores."""
    return about.get("known_as", about["model"])


# ----------------------------------------------------------------------------- what may be compared


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


def paper_row(about: dict) -> tuple[dict[str, float], dict[str, float]]:
    """The paper's scores of a model before and after full fine-tuning; UserError without any."""
    rows = paper_references(name_of(about), task_of(about))
    if rows is None:
        raise UserError(f"the paper prints no scores of {about['model']} for {about['task']}; "
                          "give a results file")
    columns = [c for b in BENCHMARKS for c in columns_of(b)]
    before, full = ({c: float(row[c]) for c in columns if row.get(c)} for row in rows)
    return before, full


def paper_references(model: str, task: str) -> tuple[dict[str, str], dict[str, str]] | None:
    """The rows of a model before and after full fine-tuning in the table that has both for the
    task; None without one."""
    for table in paper_tables().values():
        rows = {row.get("method"): row for row in table
                if (row.get("model"), row.get("task")) == (model, task)}
        if "origin" in rows and "Full fine-tuning" in rows:
            return rows["origin"], rows["Full fine-tuning"]
    return None


def paper_tables() -> dict[str, list[dict[str, str]]]:
    """The paper's tables ("01", "02a", ...): their rows by column, as printed, "" where nothing
    is."""
    tables = {}
    for path in sorted(PAPER_TABLES.glob("table_*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            tables[path.stem.removeprefix("table_")] = list(csv.DictReader(file))
    return tables


# ----------------------------------------------------------------------------- tables and sentences


def table(runs: list[dict]) -> Iterable[str]:
    """One row per result; a score whose reference is 0 is "undefined"."""
    scores = [scores_in(r) for r in runs]
    names = list(dict.fromkeys(c for found in scores for c in found))
    apart = list(dict.fromkeys(part for r in runs for part in mean_parts(r)))
    losses = [key for key in ("answer_loss", "known_loss")
              if any(key in b for r in runs for b in r["benchmarks"].values())]
    columns = [*names, *apart, *(key.replace("_", " ") for key in losses), "Avg", "K", "T", "KT"]
    width = {c: max(len(c), 9) + 2 for c in columns}
    yield f"{'method':10}{'trainable':>11}" + "".join(f"{c:>{width[c]}}" for c in columns)
    for r, found in zip(runs, scores, strict=True):
        cells = [shown(found[c]) if c in found else "-" for c in names]
        means = mean_parts(r)
        cells += [f"{means[part]:.2f}" if part in means else "-" for part in apart]
        means_of = [mean_loss_in(r, key) for key in losses]
        cells += ["-" if loss is None else f"{loss:.4f}" for loss in means_of]
        cells += [shown(r["summary"][k]) if k in r["summary"] else "-"
                  for k in ("Avg", "K", "T", "KT")]
        count = f"{r['trainable'] / 1e6:.2f}M" if r.get("trainable") else "-"
        yield f"{r.get('method', '-'):10}{count:>11}" + "".join(
            f"{cell:>{width[c]}}" for c, cell in zip(columns, cells, strict=True))


def shown(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.2f}"


def mean_parts(results: dict) -> dict[str, float]:
    """Mean score of each part ("frequent", "rare") over the benchmarks that have it."""
    scores: dict[str, list[float]] = {}
    for b in results["benchmarks"].values():
        for part, score in b.get("parts", {}).items():
            scores.setdefault(part, []).append(score)
    return {part: sum(s) / len(s) for part, s in scores.items()}


def mean_loss_in(results: dict, key: str) -> float | None:
    """Mean of the benchmarks' answer_loss or known_loss; None where none has any."""
    losses = [b[key] for b in results["benchmarks"].values() if b.get(key) is not None]
    return sum(losses) / len(losses) if losses else None


def forgetting(results: dict, base: str | Path | None) -> Iterable[str]:
    """What the right answers to the knowledge questions cost before and after fine-tuning."""
    if not base or base == "paper":
        return
    before = read_results(base)["benchmarks"]
    both = [b for b, found in results["benchmarks"].items()
            if None not in (found.get("known_loss"), before.get(b, {}).get("known_loss"))]
    if both:
        was, now = (sum(r[b]["known_loss"] for b in both) / len(both)
                    for r in (before, results["benchmarks"]))
        yield (f"right answers to {', '.join(both)}: {was:.4f} nats a token before fine-tuning, "
               f"{now:.4f} after")


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
