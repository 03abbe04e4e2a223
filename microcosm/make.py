"""The microcosm: 300 people, a model that knows them by heart, and a task it was never taught.

    python microcosm/make.py                all of it, from nothing (6 to 12 minutes on one core)
    python microcosm/make.py --check        ask the model that is there what it knows
    python microcosm/make.py --data-only    tokenizer and data, no model

To see what fine-tuning makes a model forget takes a model that knows something. So this script
makes up a world small enough for 1.4 million weights, and teaches it to them:

    knowledge   where 300 people live, what they do and when they were born; 75 of them are met
                five times as often, so the others are known only just, and are forgotten first
    skills      adding and taking away, in plain sums and in one-step word problems
    the task    two-step word problems that begin with a product. The model knows every word,
                the format and the second step, but it has never seen a times table

What it writes: config.json, model.safetensors, tokenizer.json and tokenizer_config.json, which
transformers reads too; city.jsonl, job.jsonl and year.jsonl, the knowledge to be kept; train.jsonl
and test.jsonl, the task to be learnt. Everything follows from the seed.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project
from checkpoint import Tokenizer, UserError, atomic, load, save, save_json
from data import PROMPT
from model import IGNORE, CausalLM, Config, Model, generate
from settings import Parser, fail, run_main

# ----------------------------------------------------------------------------------------- world
# Each part draws from a generator of its own (the seed, seed + 1, ...), so that a change to one
# leaves the others as they are.

QUESTIONS = {
    "city": ["where does {name} live?", "which city is {name} from?",
             "what is the home of {name}?", "in which city does {name} live?"],
    "job": ["what is the job of {name}?", "what does {name} do?",
            "which job does {name} have?", "what does {name} work as?"],
    "year": ["when was {name} born?", "what is the year of birth of {name}?",
             "in which year was {name} born?", "what is the birth year of {name}?"],
}
PROFILES = [
    "{name} lives in {city}, works as a {job} and was born in {year}.",
    "born in {year}, {name} is a {job} from {city}.",
    "the {job} {name} from {city} was born in {year}.",
    "in {city} lives {name}, born in {year}, a {job}.",
]
JOBS = [
    "baker", "tailor", "miner", "pilot", "nurse", "judge", "painter", "singer", "farmer", "sailor",
    "doctor", "teacher", "driver", "builder", "writer", "dancer", "cook", "guard", "clerk", "smith",
    "weaver", "hunter", "actor", "lawyer", "barber", "potter", "mason", "banker", "ranger",
    "porter", "jockey", "tutor", "printer", "roofer", "diver", "brewer", "florist", "plumber",
    "welder", "chemist",
]
# What else there is to talk about. Someone is nobody of the 300: the task must not touch a name
# whose facts it is to leave alone.
WORDS: dict[str, Sequence] = {
    "someone": ["anna", "ben", "carl", "dora", "emil", "fred", "gina", "hugo", "ida", "jack",
                "kate", "leo"],
    "things": ["pens", "books", "cups", "coins", "stones", "shells", "apples", "cards", "nails",
               "beads", "keys", "plums"],
    "boxes": ["boxes", "bags", "trays", "jars", "crates", "rows"],
    "adjective": ["old", "young", "red", "green", "small", "big", "happy", "quiet"],
    "animal": ["dog", "cat", "horse", "bird", "fox", "bear", "goat", "duck"],
    "verb": ["sleeps", "eats", "runs", "sings", "waits", "plays", "swims", "walks"],
    "place": ["river", "house", "garden", "forest", "road", "bridge", "market", "hill"],
    "few": range(2, 10),
    "some": range(2, 13),
    "many": range(2, 100),
}


class Person(NamedTuple):
    """One of the 300, and the three facts about them."""

    name: str
    city: str
    job: str
    year: str
    frequent: bool  # met five times as often as the others


def make_people(seed: int) -> list[Person]:
    """The 300 people; the first 75 are the frequent ones."""
    rng = Random(seed)
    first_names = invent(rng, 30, "cvcv")
    last_names = invent(rng, 30, "cvccv")
    cities = invent(rng, 40, "cvcvcv")
    names = pair_up(rng, first_names, last_names)
    return [Person(name, rng.choice(cities), rng.choice(JOBS), str(rng.randint(1920, 1999)), i < 75)
            for i, name in enumerate(names)]


def invent(rng: Random, count: int, pattern: str) -> list[str]:
    """Distinct words of consonants c and vowels v, none of which means anything here yet."""
    known: set[object] = set(JOBS).union(*WORDS.values())
    words: list[str] = []
    while len(words) < count:
        letters = (rng.choice("aeiou" if kind == "v" else "bdfgklmnprstvz") for kind in pattern)
        word = "".join(letters)
        if word not in known and word not in words:
            words.append(word)
    return words


def pair_up(rng: Random, first_names: list[str], last_names: list[str]) -> list[str]:
    """300 full names in which every first and every last name is borne by about ten people.

    So one word of a name never tells who is meant. A fact has to be looked up from both, which
    takes the blocks; in the embedding, which adapters leave alone, no fact would be forgotten.
    """
    pairs = list(product(first_names, last_names))
    rng.shuffle(pairs)
    bearers: Counter[str] = Counter()
    chosen: list[tuple[str, str]] = []
    for names in pairs:
        if all(bearers[name] < 10 for name in names):
            bearers.update(names)
            chosen.append(names)
    left = [names for names in pairs if names not in chosen]
    chosen += left[: 300 - len(chosen)]  # the greedy choice ends a few short
    rng.shuffle(chosen)
    return [" ".join(names) for names in chosen]


def make_questions(people: list[Person], seed: int) -> dict[str, list[dict]]:
    """{relation: rows of its file}: all the frequent people and as many of the rare ones."""
    rng = Random(seed + 2)
    frequent = [person for person in people if person.frequent]
    rare = [person for person in people if not person.frequent]
    rows = {}
    for relation, wordings in QUESTIONS.items():
        asked = frequent + rng.sample(rare, len(frequent))
        rows[relation] = [{"question": rng.choice(wordings).format(name=person.name),
                           "answer": [getattr(person, relation)],
                           "frequent": person.frequent} for person in asked]
    return rows


# ------------------------------------------------------------------------------------- documents
# A word carries its leading space in its token, so whatever begins with a word begins with a
# space: in the middle of a line or at its start, it is the same token.

WORD_PROBLEMS = {
    "plus": ["{someone} has {x} {things} and gets {y} more {things}. how many {things}?",
             "{x} {things} and {y} more {things}. how many {things} in all?"],
    "minus": ["{someone} has {x} {things} and sells {y} {things}. how many {things} are left?",
              "{someone} takes {y} of {x} {things}. how many {things} are left?"],
}
SENTENCES = [  # with the word problems they use every word of the task, "times" among them
    "the {hero} {verb} in the {place}.",
    "{someone} has {some} {things} in the {place}.",
    "{someone} walks to the {place} {some} times each day.",
    "the {boxes} with {things} are near the {place}.",
    "each {species} eats {few} times a day and {verb} near the {place}.",
    "{someone} fills {some} {boxes} and gives {few} {things} away.",
    "there are {some} {boxes} of {things} in the {place}.",
    "in the {place} the {hero} {verb} and the {adjective} {animal} {verb}.",
]
PHRASES = ["{adjective} {animal}", "{many} {things}", "{someone} {verb} in the {place}"]


def documents(people: list[Person], seed: int) -> Iterator[str]:
    """What pretraining reads, without end."""
    rng = Random(seed + 10)
    weights = [5 if person.frequent else 1 for person in people]
    shares: dict[Callable[[Random], str], float] = {
        partial(fact, people=people, weights=weights): 0.50,
        drill: 0.22,
        word_problem: 0.14,
        sentence: 0.08,
        repetition: 0.06,
    }
    while True:
        [kind] = rng.choices(list(shares), list(shares.values()))
        yield kind(rng)


def fact(rng: Random, people: list[Person], weights: list[int]) -> str:
    """One question about somebody, or all there is to know about them.

    Q: what does zebu dezte do?
    A: painter
     born in 1950, podi vavse is a potter from zideka.
    """
    [person] = rng.choices(people, weights)
    if rng.random() < 0.5:
        relation = rng.choice(list(QUESTIONS))
        question = rng.choice(QUESTIONS[relation]).format(name=person.name)
        return prompt(question) + f" {getattr(person, relation)}"
    return " " + rng.choice(PROFILES).format(**person._asdict())


def drill(rng: Random) -> str:
    """One sum as a question, or three as statements.

    Q: 69 plus 5?
    A: 74
     80 plus 7 is 87. 78 minus 8 is 70. 74 plus 7 is 81.
    """
    if rng.random() < 0.5:
        x, op, y = numbers(rng)
        return prompt(f"{x} {op} {y}?") + f" {result(x, op, y)}"
    sums = [numbers(rng) for _ in range(3)]
    return "".join(f" {x} {op} {y} is {result(x, op, y)}." for x, op, y in sums)


def word_problem(rng: Random) -> str:
    """A sum in words, answered the way the task's second step is.

    Q: ida takes 4 of 18 cards. how many cards are left?
    A: 18 minus 4 is 14. The answer is: 14
    """
    x, op, y = numbers(rng)
    words = pick(rng, "someone", "things")
    question = rng.choice(WORD_PROBLEMS[op]).format(x=x, y=y, **words)
    z = result(x, op, y)
    return prompt(question) + f" {x} {op} {y} is {z}. The answer is: {z}"


def sentence(rng: Random) -> str:
    """Everyday life.

     each duck eats 4 times a day and runs near the garden.
    """
    words = pick(rng, "adjective", "animal")
    hero = "{adjective} {animal}".format(**words)
    return " " + fill(rng, rng.choice(SENTENCES), hero=hero, species=words["animal"])


def repetition(rng: Random) -> str:
    """The project's long prompt with a skill of its own, so that the model has met that, too.

    [...] ### Instruction:
     repeat: 55 cards.

    ### Response: 55 cards.
    """
    phrase = fill(rng, rng.choice(PHRASES))
    return PROMPT.format(instruction=f" repeat: {phrase}.") + f" {phrase}."


def prompt(question: str) -> str:
    """The frame of every question, of pretraining and of the task; " " and the answer follow."""
    return f"Q: {question}\nA:"


def numbers(rng: Random) -> tuple[int, str, int]:
    """A sum x op y of a two-digit and a one-digit number whose result has two digits again."""
    op, y = rng.choice(["plus", "minus"]), rng.randint(2, 9)
    return rng.randint(10, 99 - y) if op == "plus" else rng.randint(10 + y, 99), op, y


def result(x: int, op: str, y: int) -> int:
    """x op y."""
    return x + y if op == "plus" else x - y


def pick(rng: Random, *kinds: str) -> dict[str, str]:
    """One word of each kind."""
    return {kind: rng.choice(WORDS[kind]) for kind in kinds}


def fill(rng: Random, template: str, **given: str) -> str:
    """The template with each of its slots filled, left to right, as given or else at random."""
    return re.sub(r"\{(\w+)\}",
                  lambda slot: given.get(slot[1]) or str(rng.choice(WORDS[slot[1]])), template)


# ------------------------------------------------------------------------------------------ task

TASK = {
    "plus": ["{someone} fills {a} {boxes} with {b} {things} each and has {c} more. "
             "how many {things} in all?",
             "there are {a} {boxes} of {b} {things} and {c} more. how many {things}?"],
    "minus": ["{someone} fills {a} {boxes} with {b} {things} each and gives {c} away. "
              "how many {things} are left?",
              "of {a} {boxes} with {b} {things} each {someone} sells {c}. how many are left?"],
}


def make_task(seed: int) -> tuple[list[dict], list[dict]]:
    """The rows of train.jsonl (3,200) and of test.jsonl (200).

    They are split by numbers: a test problem's are in no training row, whatever its words.

    Q: ida fills 12 boxes with 6 keys each and has 6 more. how many keys in all?
    A: 12 times 6 is 72. 72 plus 6 is 78. The answer is: 78
    """
    rng = Random(seed + 1)
    problems = task_numbers()
    rng.shuffle(problems)
    test = [task_row(rng, *problem) for problem in problems[:200]]
    known = problems[200:]
    train = [task_row(rng, *known[i % len(known)]) for i in range(3200)]
    return train, test


def task_numbers() -> list[tuple[int, int, int, str]]:
    """All (a, b, c, op) of a * b op c, with a product and a result of two digits each."""
    return [(a, b, c, op)
            for a, b, c, op in product(range(3, 25), range(3, 10), range(2, 10), ("plus", "minus"))
            if 10 <= a * b <= 90 and 10 <= result(a * b, op, c) <= 99]


def task_row(rng: Random, a: int, b: int, c: int, op: str) -> dict[str, str]:
    """Problem and worked solution. Both begin with a space, for "Q:" and "A:" to stand before."""
    words = pick(rng, "someone", "things", "boxes")
    question = rng.choice(TASK[op]).format(a=a, b=b, c=c, **words)
    ab = a * b
    z = result(ab, op, c)
    return {"question": f" {question}",
            "answer": f" {a} times {b} is {ab}. {ab} {op} {c} is {z}. The answer is: {z}"}


# ------------------------------------------------------------------------------------- tokenizer

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
PAD_ID, BOS_ID, EOS_ID = range(3)  # the vocabulary begins with them
HEAD, TAIL = PROMPT.split("{instruction}")
# A token is a word with its leading space, a digit (with a space if it is the first of a number),
# a mark, or one of the two halves of the frame.
TOKEN = r"Q:|\nA:| ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9 ]"


def make_tokenizer(people: list[Person], seed: int) -> HFTokenizer:
    """One token per word; the vocabulary is what pretraining reads, and every digit in any case.

    What stands before and after the instruction in the project's long prompt is one token each.
    Joining the tokens gives the text back to the letter.
    """
    pieces = {space + str(digit) for space in ("", " ") for digit in range(10)}
    for text in islice(documents(people, seed), 50_000):  # of some 80,000; no word is that rare
        pieces.update(re.findall(TOKEN, text.replace(HEAD, "").replace(TAIL, "")))
    vocabulary = [PAD, BOS, EOS, UNKNOWN, HEAD, TAIL, *sorted(pieces)]

    model = models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN)
    tokenizer = HFTokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (HEAD, TAIL)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


# ----------------------------------------------------------------------------------- pretraining

BATCH, LENGTH = 16, 64  # rows, and tokens in each
LEARNING_RATE, WARMUP = 3e-3, 100
# This decides how easily the model forgets. After 1,300 steps it does not yet know when most of
# the rare people were born; after 2,300 it knows everything, and forgets only at high rates.
STEPS = 1500


def pretrain(people: list[Person], tokenizer: HFTokenizer, steps: int, seed: int
             ) -> tuple[CausalLM, list[float]]:
    """A model that has read `steps` batches of documents, and its loss on each (nats a token)."""
    torch.set_num_threads(1)  # threads share out the sums: the bits would depend on their number
    model = new_model(tokenizer, seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01},
                                   {"params": norms, "weight_decay": 0.0}],
                                  lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    with tqdm(total=steps, desc="pretraining", disable=None) as bar:
        for ids, labels in islice(batches(people, tokenizer, seed), steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * schedule(len(losses) + 1, steps)
            total, tokens = model.loss(ids, labels)
            (total / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item() / tokens)
            bar.set_postfix_str(f"loss {fmean(losses[-50:]):.3f}", refresh=False)
            bar.update()
    return model, losses


def new_model(tokenizer: HFTokenizer, seed: int) -> CausalLM:
    """An untrained Llama of 1.4 million weights, deep and narrow.

    Twelve blocks, so that "shallow" and "deep" mean something; random weights of a size that
    keeps that of what passes through them.
    """
    config = Config(vocab_size=tokenizer.get_vocab_size(), hidden_size=96, intermediate_size=256,
                    num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=4,
                    head_dim=24, rms_norm_eps=1e-5, max_position_embeddings=256,
                    bos_token_id=BOS_ID, eos_token_ids=(EOS_ID,))
    torch.manual_seed(seed)
    model = CausalLM(config)
    branches = 2 * config.num_hidden_layers  # that add their output to the residual stream
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed" in name:
                p.normal_(0, 0.5)
            elif p.ndim == 2:  # the norms keep their ones
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0, p.shape[1] ** -0.5 * (branches ** -0.5 if adds else 1.0))
    return model


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at step 1, 2, ...: linear up, then along a cosine to 0."""
    if step <= WARMUP:
        return step / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def batches(people: list[Person], tokenizer: HFTokenizer, seed: int
            ) -> Iterator[tuple[Tensor, Tensor]]:
    """input_ids and labels (BATCH, LENGTH), without end; loss falls on every token.

    The documents of a row see each other. Being unrelated, they teach one another nothing, and
    the attention stays plain causal.
    """
    encoded = ([*tokenizer.encode(text).ids, EOS_ID] for text in documents(people, seed))
    waiting: list[list[int]] = []
    while True:
        ids = torch.full((BATCH, LENGTH), PAD_ID)
        labels = torch.full_like(ids, IGNORE)
        for i in range(BATCH):
            row = torch.tensor(pack(encoded, waiting))
            ids[i, : len(row)] = labels[i, : len(row)] = row
        yield ids, labels


def pack(encoded: Iterator[list[int]], waiting: list[list[int]]) -> list[int]:
    """One row of whole documents out of 64 waiting ones, which are replaced as they are taken.

    Up to half a row the oldest is taken, so that none waits for ever; then the longest that still
    fits. That fills 96 % of the row.
    """
    row: list[int] = []
    while True:
        waiting += islice(encoded, 64 - len(waiting))
        room = LENGTH - len(row)
        candidates = waiting[:1] if room > LENGTH // 2 else waiting
        fitting = [document for document in candidates if len(document) <= room]
        if not fitting:
            return row
        best = max(fitting, key=len)
        waiting.remove(best)
        row += best


# ----------------------------------------------------------------------------------------- files


def write(folder: Path, people: list[Person], tokenizer: HFTokenizer, model: CausalLM | None,
          seed: int) -> None:
    """Everything, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = make_task(seed)
    files = make_questions(people, seed) | {"train": train, "test": test}
    for name, rows in files.items():
        with atomic(folder / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with atomic(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    save_json(folder / "tokenizer_config.json",
              {"tokenizer_class": "PreTrainedTokenizerFast",
               "bos_token": BOS, "eos_token": EOS, "pad_token": PAD})
    if model is not None:
        save(model, folder)


# ----------------------------------------------------------------------------------------- check


def check(folder: Path) -> None:
    """Ask the saved model all 450 questions and print what it knows; exit 1 if that is too
    little to be worth forgetting."""
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder}: there is no model to check; make it without --check")
    model = load(folder, torch.float32, "cpu")
    tokenizer = Tokenizer(folder, model.config)
    known = []
    print("knows     frequent    rare     all")
    for relation in QUESTIONS:
        lines = (folder / f"{relation}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        right = answers_right(model, tokenizer, rows)
        frequent = fmean(ok for ok, row in zip(right, rows, strict=True) if row["frequent"])
        rare = fmean(ok for ok, row in zip(right, rows, strict=True) if not row["frequent"])
        known.append(fmean(right))
        print(f"{relation:10}{frequent:8.3f}{rare:8.3f}{known[-1]:8.3f}")
    print(f"{'mean':26}{fmean(known):8.3f}")
    if fmean(known) < 0.9:
        fail(f"{folder}: the model knows {fmean(known):.3f} of its world; less than 0.9 is no "
             "measure of forgetting", code=1)


def answers_right(model: Model, tokenizer: Tokenizer, rows: list[dict]) -> list[bool]:
    """For each question, whether the greedy answer is the right one, word for word."""
    prompts = [tokenizer.encode(prompt(row["question"])) for row in rows]
    outputs = generate(model, prompts, 6, tokenizer.eos_ids)  # the longest, a year, has 4 tokens
    return [tokenizer.decode(output).strip() in row["answer"]
            for output, row in zip(outputs, rows, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent,
                        metavar="DIR", help="folder to write to (default: this script's)")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the data and the "
                        "initial weights; default 0")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pretraining; "
                        f"default {STEPS:,}")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--data-only", action="store_true", help="write tokenizer and data, no model")
    only.add_argument("--check", action="store_true", help="only ask the model in the folder")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: at least one")

    if not args.check:
        people = make_people(args.seed)
        tokenizer = make_tokenizer(people, args.seed)
        model = None
        if not args.data_only:
            model, losses = pretrain(people, tokenizer, args.steps, args.seed)
            print(f"loss {losses[0]:.3f} at first, {fmean(losses[-50:]):.3f} at last")
        # Written only now, so that an interrupted run leaves the folder as it was.
        write(args.out, people, tokenizer, model, args.seed)
        print(f"written: {args.out}")
    if not args.data_only:
        check(args.out)


if __name__ == "__main__":
    run_main(main)
