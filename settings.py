"""Every setting of a run with its source in the paper, the command line, and the run's folder.

The defaults are the paper's; a row of PRESETS refines them for one model and task; flags have the
last word. `python train.py --help` lists all of them.
"""

import argparse
import io
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch

import checkpoint
import data
import farss
from checkpoint import ANYTHING, MICROCOSM, UserError
from methods import METHODS, Method, official
from model import (
    DECODER_TARGETS,
    ENCODER_TARGETS,
    FAMILIES,
    Config,
    Model,
    empty,
    linear_shapes,
    place,
)

NARROW = 512  # models narrower than this start by farss.py itself, wider ones by fast/
# A resumed run may change these: they decide rounding and the draws of dropout, nothing else.
MACHINE = ("device", "threads", "micro_batch", "checkpointing", "compile", "cudnn_attention",
           "shard", "save_every", "score_every", "score_limit")
CUDNN_ATTENTION = ("on CUDA, take cuDNN's attention where torch prefers it; cuDNN plans anew for "
                   "every new shape, and decoding has a new one at every token")
COMPILERS = ("g++", "clang++", "cl")  # of which torch.compile needs one on a CPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def setting(default: Any, text: str, source: str = "here") -> Any:
    """A field with its text for --help and where its default comes from: a section of the paper,
    the official code, a library, or here, where none of them says anything."""
    return field(default=default, metadata={"help": text, "source": source})


def named(rows: dict) -> str:
    """"a (about a), b (about b)", for the help of an option that names a row of a table."""
    return ", ".join(f"{name} ({row.about})" for name, row in rows.items())


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. The defaults are the paper's; rows of PRESETS refine them."""

    model: str = setting("microcosm", "short name, hub id, or folder of a Hugging Face checkpoint")
    task: str = setting(None, "what is trained on: " + named(data.TASKS) + "; default: the "
                              "model's own, else math")
    data: str = setting(None, "train on this instead: metamath, gsm8k, or a .json/.jsonl[.gz]/"
                              ".tsv/.parquet file with a question and an answer column (GLUE: "
                              "texts and label), or a folder with a train file")
    method: str = setting("farss", named(METHODS))
    # initialisation
    rank: int = setting(128, "R: rank of the deep layers, of all layers for lora", "A.2.1")
    alpha: float = setting(None, "the adapters are scaled by alpha / R, one constant for all "
                                 "layers; default R, so 1", "A.2.1")
    shallow: int = setting(None, "number of shallow blocks, counted from the first; auto: by a "
                                 "short trial of 1/8 to 1/4 of them (3.1); default: the paper's "
                                 "for its models, 7/32 of the blocks for others", "4.2")
    r_min: int = setting(1, "smallest rank of a shallow layer", "4.2")
    r_avg: float = setting(50.0, "mean rank asked for the shallow layers, before clipping", "4.2")
    r_max: int = setting(64, "largest rank of a shallow layer", "4.2")
    calibration: str = setting("task", "what a start is measured on, where it is: task (training "
                                       "examples), nq-open (its training questions as running "
                                       "text, CorDA's own), or a file of questions", "A.2.1")
    calibration_examples: int = setting(256, "how many examples, or pieces of the text", "A.2.1")
    fisher: str = setting("empirical", "labels behind the gradients: empirical (the data's, as "
                                       "the paper runs it) or sampled (the model's, as Eq. 5)")
    residual: str = setting("split", "split: store W - scaling B A (the paper); exact: keep W "
                                     "and subtract the initial adapter in the forward pass, with "
                                     "dropout on the difference alone", "3.3")
    freeze: str = setting(None, "train nothing in the first (shallow-third) or last (deep-third) "
                                "third of the blocks (Table 1)")
    match_params: str = setting(None, "choose the rank R for so many trainable numbers (320M) or "
                                      "as many as LoRA of a rank (lora:128) has, if every shallow "
                                      "rank were r_avg")
    official: bool = setting(False, "the official code's choices: alpha / r of each layer's own "
                                    "rank and no compensation for it, the lowest directions where "
                                    "r < 128, padding counted, gradients of the mean loss over "
                                    "calibration batches of two; and, unless given, 16 calibration "
                                    "examples, 10 warm-up steps, batches of 128")
    kasa_beta: float = setting(1e-4, "KaSA: weight of the diagonal's size in the loss",
                               "KaSA's code")
    kasa_gamma: float = setting(1e-3, "KaSA: weight of the distance of A and B from orthonormal",
                                "KaSA's code")
    form: str = setting(None, "plain: the start is computed by farss.py as it is printed; fast: by "
                              "fast/, with the same result; default plain for models narrower "
                              f"than {NARROW}, else fast")
    targets: str = setting(None, "linear layers to adapt, by name, or a set: " + "; ".join(
        f"{name} = {', '.join(layers)}" for name, layers in (DECODER_TARGETS
                                                              | ENCODER_TARGETS).items())
        + "; default: seven, of RoBERTa six", "A.2.1")
    # training
    lr: float = setting(2e-5, "peak learning rate of AdamW, falling linearly to 0", "A.2.1")
    batch_size: int = setting(16, "examples per step (the official scripts: 128)", "A.2.1")
    examples: int = setting(100_000, "training examples, drawn at random", "A.2.1")
    epochs: int = setting(1, "passes over the examples", "A.2.1")
    steps: int = setting(None, "stop after this many steps, the schedule fitted to them")
    max_length: int = setting(512, "tokens per sequence; the rest is cut", "official code")
    warmup: float = setting(0.03, "part of the steps with rising learning rate; from 1 on, their "
                                  "number", "A.2.1")
    weight_decay: float = setting(0.0, "decoupled weight decay", "A.2.1")
    dropout: float = setting(0.05, "dropout on the adapters' input", "A.2.1")
    clip: float = setting(1.0, "largest gradient norm", "transformers' default")
    seed: int = setting(0, "of the draw of examples, their order, LoRA's A, a new head, dropout")
    # machine
    dtype: str = setting(None, "float32 or bfloat16; default bfloat16, on CPU float32, which is "
                               "many times faster there", "A.2.1")
    device: str = setting(None, "cuda, mps or cpu (default: the first that is there)")
    threads: int = setting(None, "CPU threads (default: torch's choice); the last bits of sums "
                                 "depend on their number")
    micro_batch: int = setting(None, "examples per forward pass (default: as many as fit into "
                                     "memory); the gradient is that of the whole batch")
    checkpointing: bool = setting(None, "recompute activations in the backward pass (default: "
                                        "only if memory needs it)")
    compile: bool = setting(False, "fuse norms and MLPs by torch.compile: a minute at the start, "
                                   "for a GPU to be faster afterwards; a CPU needs a C++ compiler "
                                   "and seldom gains")
    cudnn_attention: bool = setting(False, CUDNN_ATTENTION)
    shard: bool = setting(False, "with several processes (torchrun): each keeps a part of every "
                                 "weight, and gathers a block's when it runs (FSDP2)")
    save_every: int = setting(200, "steps between checkpoints")
    score_every: int = setting(None, "also score the task's benchmarks every so many steps, on "
                                     "--score-limit questions each: what is forgotten on the way "
                                     "(eval.py --plot draws it)")
    score_limit: int = setting(50, "questions of each benchmark for --score-every")

    @property
    def how(self) -> Method:
        """The method's row of METHODS."""
        return METHODS[self.method]

    @property
    def scaling(self) -> float:
        """α / R, one constant for all layers."""
        return self.alpha / self.rank

    @property
    def target_names(self) -> list[str]:
        """Layers to adapt; until `settle` has seen the model, a decoder's seven."""
        named = self.targets or ",".join(DECODER_TARGETS["seven"])
        return [name.strip() for name in named.split(",")]

    @property
    def budget(self) -> farss.Budget:
        """The ranks and ends; ValueError for impossible ones."""
        own_end = self.how.end != Method.end  # a variant's, which --official leaves as it is
        kind = official.OfficialBudget if self.official and not own_end else farss.Budget
        return kind(self.shallow if self.how.adaptive else 0, self.rank, self.r_avg, self.r_min,
                    self.r_max, self.how.end)

    def is_frozen(self, name: str, blocks: int) -> bool:
        """Whether a parameter or layer stands in the third of the blocks that does not train."""
        third = range(*FROZEN[self.freeze](blocks)) if self.freeze else ()
        return place(name) != name and farss.block_index(name) in third

    def shapes(self, model: Model) -> dict[str, tuple[int, int]]:
        """(m, n) of the layers that get an adapter, by name."""
        return {n: shape for n, shape in linear_shapes(model, self.target_names).items()
                if not self.is_frozen(n, len(model.blocks))}

    def layers(self, model: Model) -> list[str]:
        """The layers that get an adapter."""
        return list(self.shapes(model))

    @property
    def master_dtype(self) -> torch.dtype:
        """Of the weights in memory: fp32 where they are trained, since AdamW's steps are below
        bf16's last bit."""
        return torch.float32 if self.how.trains == "weights" else DTYPES[self.dtype]


FORMS = ("plain", "fast")
AUTO = -1  # of shallow blocks: to be found by a trial


def number_of_blocks(text: str) -> int:
    """--shallow: a number, or auto."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"--shallow {text}: give a number of blocks, or auto")
    return AUTO if text == "auto" else int(text)


def candidates(blocks: int) -> range:
    """Section 3.1: boundaries between 1/8 and 1/4 of the blocks."""
    return range(max(1, round(blocks / 8)), max(1, round(blocks / 4)) + 1)


# Table 1: first and last block, of so many, that does not train.
FROZEN = {"shallow-third": lambda blocks: (0, round(blocks / 3)),
          "deep-third": lambda blocks: (blocks - round(blocks / 3), blocks)}
# What --official means for other settings, where they are not given.
OFFICIAL = dict(calibration_examples=16, warmup=10.0, batch_size=128)


class Preset(NamedTuple):
    """What differs from the defaults for one model and task, and what the paper prints there.

    A value that differs by method is a dict of them; a fraction as `shallow` is of the blocks.
    """

    settings: dict[str, Any]
    matched_rank: int | None = None  # R of the run that matches LoRA's parameters (Tables 2, 10)
    # FARSS's #Params in millions, at R = 128 and at the matched rank
    printed: tuple[int, int | None] | None = None
    source: str = "here"  # of these settings
    sources: Mapping[str, str] = MappingProxyType({})  # of those that have another
    base_results: Path | None = None  # stored scores before fine-tuning, for K
    full_results: Path | None = None  # and of full fine-tuning, for T
    grid: dict[str, tuple[float, ...]] | None = None  # learning rates of sweep.py, by method


def from_paper(shallow: int, matched_rank: int, printed: tuple[int, int], source: str = "A.6"
              ) -> Preset:
    return Preset(dict(shallow=shallow), matched_rank, printed, source)


GLUE = Preset(
    dict(shallow=0.5,  # six of RoBERTa-base's twelve blocks (4.2)
         lr=4e-4, batch_size=64, epochs=10, max_length=512,
         examples=400_000,  # all: MNLI, the largest, has 392,702
         dropout=0.0,  # of an adapter that holds top directions it drops part of W itself; and
                       # RoBERTa has its own dropout, in every block
         dtype="float32"),  # the lowest directions are below bf16's last bit, and it is small
    printed=(10, None), source="A.4.1", sources=dict(
        rank="A.4.1", shallow="4.2", targets="4.2", examples="here", dropout="here", dtype="here",
        alpha="here", warmup="here", weight_decay="here"))


def commonsense(shallow: int | None, r_avg: float, r_max: int, printed: tuple[int, None] | None,
                **kasa: float) -> Preset:
    """Table 9. It prints r_max 16 and 12 below r_avg 24 and 16, which cannot be; they are taken for
    each other here. No `shallow`: the default's."""
    row = dict(rank=32, alpha=64.0, r_min=1, r_avg=r_avg, r_max=r_max, targets="five", lr=3e-4,
               batch_size=16, warmup=100.0, epochs=3, dropout=0.05,
               examples=200_000)  # all: Commonsense170K has 170,420
    row |= kasa | ({} if shallow is None else {"shallow": shallow})
    return Preset(row, printed=printed, source="A.5, Table 9", sources=dict(
        kasa_beta="A.4.2", kasa_gamma="A.4.2", examples="here",
        **dict.fromkeys(("r_avg", "r_max"), "A.5, Table 9, its rows exchanged")))


# (model, task). A row for None holds for every model that has none of its own.
PRESETS: dict[tuple[str | None, str], Preset] = {
    ("llama2-7b", "math"): from_paper(7, 153, (271, 320), "4.2"),
    ("llama2-7b", "code"): from_paper(5, 144, (285, 320), "4.2"),
    ("llama2-7b", "instruction"): from_paper(5, 144, (285, 320), "4.2"),
    ("mistral-7b-v0.3", "math"): from_paper(5, 152, (300, 336)),
    ("mistral-7b-v0.3", "code"): from_paper(5, 152, (300, 336)),
    ("mistral-7b-v0.3", "instruction"): from_paper(7, 144, (300, 336)),
    ("llama3-8b", "math"): from_paper(9, 155, (276, 336)),
    ("llama3-8b", "code"): from_paper(9, 155, (276, 336)),
    ("llama2-13b", "math"): from_paper(11, 164, (400, 501)),
    ("llama2-13b", "code"): from_paper(11, 155, (421, 501)),
    ("llama2-13b", "instruction"): from_paper(11, 155, (400, 501), "A.6, for math and code"),
    ("gemma2-9b", "code"): from_paper(11, 155, (363, 432)),
    ("gemma2-9b", "instruction"): from_paper(11, 155, (363, 432)),
    ("llama2-7b", "commonsense"): commonsense(5, 16.0, 24, (50, None), kasa_beta=1e-2,
                                              kasa_gamma=1e-4),
    ("llama3-8b", "commonsense"): commonsense(7, 12.0, 16, (47, None), kasa_beta=1e-4,
                                              kasa_gamma=1e-3),
    (None, "commonsense"): commonsense(None, 16.0, 24, None),  # as Llama-2-7B's
    **{(None, f"glue:{name}"): GLUE for name in data.GLUE},
    # Not the paper's: the small default that needs no download.
    ("microcosm", "microcosm"): Preset(
        dict(shallow=3,  # 7/32 of 12 blocks, as Llama-2-7B's 7 of 32
             rank=16, r_avg=6.0, r_max=8,  # the paper's R : r_avg : r_max at a sixth of the width
             steps=200, max_length=64,  # one pass over the 3,200 rows; none has 64 tokens
             calibration_examples=128,  # 2,800 response tokens; half of the paper's examples
             dtype="float32",  # as it was pretrained, on any device
             threads=1,  # matrices this small take longer to share out than to multiply
             dropout=0.0,  # of an adapter that holds top directions it drops part of W itself
             # the best by K and task of microcosm/results.csv
             lr={"full": 8e-4, "farss": 2e-3, "farss-init": 4e-3, "farss-top": 1e-3,
                 "all-high": 2e-3, "lora": 4e-3, "pissa": 1e-3, "milora": 4e-3, "corda-kpm": 2e-3,
                 "corda-ipm": 1e-3, "lora-null": 4e-3, "lora-null-v2": 1.6e-2, "kasa": 8e-3}),
        source="microcosm/README.md",
        base_results=MICROCOSM / "base.json", full_results=MICROCOSM / "full.json",
        grid={"full": (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3),
              "farss": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
              **dict.fromkeys(("farss-top", "all-high", "pissa", "corda-ipm"),
                              (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
              **dict.fromkeys(("lora", "milora", "corda-kpm", "lora-null", "kasa", "farss-init"),
                              (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
              "lora-null-v2": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)}),
}


def preset(model: str, task: str) -> Preset:
    """The row of a model and task, or of the task alone; an empty one where there is none."""
    return PRESETS.get((model, task)) or PRESETS.get((None, task)) or Preset({})


# What makes two models the same one, whatever they are called.
SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling")


def known_as(model: str, config: Config) -> str:
    """The short name of a model that is in the table by its hub id or by the shape of its config
    (an open copy, a local folder); otherwise the name it has."""
    if model in checkpoint.MODELS:
        return model
    for name, (hub_id, listed) in checkpoint.MODELS.items():
        if hub_id == model or all(getattr(config, f) == getattr(listed, f) for f in SHAPE):
            return name
    return model


def chosen_model(flags: dict[str, Any]) -> tuple[str, Config, str, str]:
    """What the flags mean by model and task: (its name as given, Config, known name, task)."""
    model = flags.get("model", Settings.model)
    config = checkpoint.config_of(model)
    known = known_as(model, config)
    task = flags.get("task") or default_task(known)
    return model, for_task(config, task), known, task


def for_task(config: Config, task: str) -> Config:
    """The config with the classes of the task; UserError where the model cannot have it."""
    classes, encoder = data.TASKS[task].classes, FAMILIES[config.model_type].encoder
    if encoder != bool(classes):
        fit = [name for name, row in data.TASKS.items() if bool(row.classes) == encoder]
        raise UserError(f"{task} is no task for a {config.model_type} model; give --task, one of "
                        + ", ".join(fit))
    return replace(config, labels=classes) if encoder else config


def unused(s: Settings) -> set[str]:
    """Settings that a run of this method does not look at, or that say nothing about its result."""
    return {*MACHINE, "model", "task", "data", "method",
            *(() if s.how.adaptive else ("shallow", "r_min", "r_avg", "r_max")),
            *(() if s.how.needs == "fisher" else ("fisher",)),
            *(() if s.how.needs != "nothing" else ("calibration", "calibration_examples")),
            *(() if s.how.penalty else ("kasa_beta", "kasa_gamma")),
            *(() if s.how.splits or s.how.diagonal else ("residual", "form")),
            *(() if s.how.trains == "adapters" else ("rank", "alpha", "targets", "dropout")),
            *(("epochs",) if s.steps else ())}


def source_of(name: str, s: Settings, row: Preset, flags: dict[str, Any]) -> str:
    """Where the value of a setting comes from: who has the last word."""
    if name in flags:
        return "the command line"
    if s.official and name in OFFICIAL:
        return "the official code"
    if name in row.sources or name in row.settings:
        return row.sources.get(name, row.source)
    if name == "shallow":
        return "chosen here, 7/32 of the blocks"
    if name == "form":
        return f"chosen here, {'below' if s.form == 'plain' else 'from'} a width of {NARROW}"
    if name == "dtype" and s.dtype == "float32":
        return "here"
    return next(f.metadata["source"] for f in fields(Settings) if f.name == name)


def origins(s: Settings, config: Config, flags: dict[str, Any], run: Path | None = None
            ) -> list[str]:
    """Where a run's settings come from: one line for each source, the paper's sections first;
    all of them from the `run` that is repeated, but for the flags."""
    known = known_as(s.model, config)
    said: dict[str, list[str]] = {}
    for name, value in asdict(s).items():
        if value is None or value is False or name in unused(s):
            continue
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        if name == "shallow":
            number = "auto" if value == AUTO else value
            shown = f"{number} of {config.num_hidden_layers} blocks"
        source = (f"the run {run}" if run and name not in flags else
                  source_of(name, s, preset(known, s.task), flags))
        said.setdefault(source, []).append(f"{name.replace('_', ' ')} {shown}")
    titles = {source: f"the paper, {source}" if re.match(r"[A\d]\.?\d", source) else
              "chosen here" if source == "here" else source for source in said}
    seen = "" if known == s.model else f" ({known}, as the shape of its config says)"
    return [f"settings of {s.model}{seen}, {s.task}, {s.method}:", *(
        f"  {titles[source]}: " + ", ".join(said[source])
        for source in sorted(said, key=lambda x: (not titles[x].startswith("the paper"), x)))]


def use_threads(count: int | None) -> None:
    """Let torch use so many CPU threads; None leaves it as it is."""
    if count:
        torch.set_num_threads(count)


def use_device(device: str | torch.device | None, cudnn_attention: bool = False) -> None:
    """Have CUDA multiply fp32 matrices in fp32, and attend without cuDNN unless that is asked for;
    a line says so."""
    if torch.device(device or "cpu").type != "cuda":
        if cudnn_attention:
            print(f"note: --cudnn-attention has nothing to do on {device}")
        return
    if torch.get_float32_matmul_precision() != "highest":  # as some containers' environment has it
        torch.set_float32_matmul_precision("highest")
        print("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is not followed: fp32 products stay fp32, not TF32")
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
    print("cuDNN's attention is " + ("on: it plans anew for every new shape" if cudnn_attention else
          "off, as it plans anew for every new shape; --cudnn-attention takes it"))


def check_compiler(device: str | torch.device | None) -> None:
    """UserError unless what torch.compile needs for the device is there."""
    if str(device) == "cpu" and not (
            os.environ.get("CXX") or any(map(shutil.which, COMPILERS))):
        raise UserError("--compile: on a CPU torch.compile needs a C++ compiler, one of "
                        + ", ".join(COMPILERS) + ", or what CXX names")


def default_task(model: str) -> str:
    """The first task that a preset has for the model; math for all others."""
    return next((task for name, task in PRESETS if name == model and task in data.TASKS), "math")


# ------------------------------------------------------------------------------- command line


def say(kind: str, message: object) -> None:
    """Print one line on stderr."""
    print(f"{Path(sys.argv[0]).name}: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr, and out: 2 for bad input, 1 for a run that went wrong."""
    say("error", message)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line, and takes no abbreviations."""

    def __init__(self, description: str | None):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)")


PARSERS: dict[str, Callable[[str], Any]] = {"shallow": number_of_blocks}


def choices() -> dict[str, tuple[str, ...]]:
    """What a setting that names something may name."""
    return {"method": tuple(METHODS), "task": tuple(data.TASKS), "dtype": tuple(DTYPES),
            "fisher": ("empirical", "sampled"), "residual": ("split", "exact"),
            "freeze": tuple(FROZEN), "form": FORMS}


def training_arguments(description: str | None, argv: list[str] | None = None
                       ) -> argparse.Namespace:
    """The command line of train.py: a flag for every setting, and those of the run itself."""
    parser = Parser(description)
    starts = {"model": "what", "rank": "initialisation (sections 3.2 and 3.3)",
              "lr": "training", "dtype": "machine"}
    named = choices()
    for f in fields(Settings):
        if f.name in starts:
            group = parser.add_argument_group(starts[f.name])
        shown = f"{f.default:g}" if isinstance(f.default, float) else f.default
        source = f.metadata["source"]
        where = "" if source == "here" else f" ({source})"
        default = where if f.default is None else f"; default {shown}{where}"
        more: dict[str, Any] = (
            dict(action=argparse.BooleanOptionalAction) if f.type is bool else
            dict(type=PARSERS.get(f.name, f.type), choices=named.get(f.name),
                 metavar=None if f.name in named else f.name.upper()))
        if f.name == "form":
            either = group.add_mutually_exclusive_group()
            for form in FORMS:
                either.add_argument("--" + form, action="store_const", const=form, dest="form",
                                   help=f.metadata["help"] if form == FORMS[0] else "see --plain")
            continue
        group.add_argument("--" + f.name.replace("_", "-"), default=None,
                           help=f.metadata["help"] + default, **more)
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="folder of the run "
                       "(default runs/<model>-<task>-<method>-s<seed>)")
    group.add_argument("--resume", type=Path, metavar="RUN", help="continue a stopped run with "
                       "its own settings; of the others only " + ", ".join(MACHINE) + " may change")
    group.add_argument("--from-run", type=Path, metavar="RUN", help="a new run with all settings "
                       "of this one, its micro-batch and threads, too; other flags go on top. On "
                       "a CPU the same adapter to the bit")
    group.add_argument("--base", metavar="FOLDER", help="with --resume and --from-run: where the "
                       "base model is now, if not where it was")
    group.add_argument("--dry-run", action="store_true", help="print the plan and stop: "
                       "parameters, ranks, steps, memory; needs no weights")
    group.add_argument("--memory", type=float, metavar="GB", help="with --dry-run: of the card "
                       "that the plan is for (default: what is free on --device; without one, 80)")
    args = parser.parse_args(argv)
    if args.memory is not None and not (args.dry_run and 0 < args.memory < math.inf):
        parser.error("--memory goes with --dry-run, and is a number of GB above 0")
    other = [*sorted(set(given(args)) - set(MACHINE)),
             *(name for name in ("out", "dry_run", "from_run") if getattr(args, name))]
    if args.resume and other:
        parser.error(f"--{other[0].replace('_', '-')}: --resume takes its settings from the run; "
                     "give no other option but " + ", ".join(MACHINE))
    fixed = [name for name in ("model", "task", "official", "match_params")
             if args.from_run and getattr(args, name)]
    if fixed:
        parser.error(f"--{fixed[0].replace('_', '-')} decides other settings, which --from-run "
                     "takes from the run; start a run of its own with it")
    if args.base and not (args.resume or args.from_run):
        parser.error("--base goes with --resume and --from-run; a new run has --model")
    return args


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line."""
    return {f.name: getattr(args, f.name) for f in fields(Settings)
            if getattr(args, f.name) is not None}


def settle(args: argparse.Namespace) -> tuple[Settings, Config]:
    """The settings of a run: the defaults, the row for this model and task, then the flags; or
    those of --from-run, then the flags."""
    flags = given(args)
    if args.from_run:
        return settle_from(args.from_run, flags, args.base)
    model, config, known, task = chosen_model(flags)
    method = flags.get("method", Settings.method)
    row = {name: value for name, value in preset(known, task).settings.items()
           if name not in flags}
    row |= OFFICIAL if flags.get("official") else {}
    for name, value in row.items():
        if isinstance(value, dict):
            if method not in value:
                raise UserError(f"no --{name} is known for {method} on {model}; give one")
            row[name] = value[method]
    s = Settings(**(row | flags | {"task": task}))
    sets = FAMILIES[config.model_type].targets
    device = s.device if args.dry_run and not s.device else str(checkpoint.pick_device(s.device))
    s = replace(
        s, device=device, dtype=s.dtype or ("float32" if device == "cpu" else "bfloat16"),
        shallow=whole_blocks(7 / 32 if s.shallow is None else s.shallow, config),
        targets=",".join(sets.get(s.targets or next(iter(sets)), [s.targets])),
        form=s.form or usual_form(config), data=s.data or data.TASKS[s.task].source)
    check(s, config)
    if s.match_params:
        if "rank" in flags:
            raise UserError("--match-params chooses the rank; give no --rank")
        s = replace(s, rank=matched_rank(s, config))
    return replace(s, alpha=float(s.rank if s.alpha is None else s.alpha)), config


def settle_from(run: Path, flags: dict[str, Any], base: str | None
                ) -> tuple[Settings, Config]:
    """The settings of a run with flags on top; another rank keeps the scaling alpha / R."""
    s, recorded = read_run(run)
    config = for_task(checkpoint.read_config(base_of(run, s, recorded, base)), s.task)
    threads = recorded.get("threads", "")
    more: dict[str, Any] = {"threads": int(threads)} if str(threads).isdecimal() else {}
    if "shallow" in flags:
        more["shallow"] = whole_blocks(flags["shallow"], config)
    more["alpha"] = (s.alpha or s.rank) / s.rank * flags.get("rank", s.rank)
    s = replace(s, **(more | {k: v for k, v in flags.items() if k != "shallow"}))
    check(s, config)
    return s, config


def usual_form(config: Config) -> str:
    """What one reads is what runs, where that is quick enough."""
    return "plain" if config.hidden_size < NARROW else "fast"


def whole_blocks(shallow: float, config: Config) -> int:
    """A number of blocks, which a fraction is of all of them."""
    return round(shallow * config.num_hidden_layers) if isinstance(shallow, float) else shallow


def matched_rank(s: Settings, config: Config) -> int:
    """R for which the trainable numbers come nearest to s.match_params, the shallow ranks r_avg."""
    shapes = s.shapes(empty(config))
    sizes = {name: s.how.per_rank(m, n) for name, (m, n) in shapes.items()}
    found = re.fullmatch(r"lora:(\d+)|(\d+(?:\.\d+)?)([kM]?)", s.match_params)
    if not found:
        raise UserError(f"--match-params {s.match_params}: write 320M, 500k, or lora:128")
    wanted = (int(found[1]) * sum(m + n for m, n in shapes.values()) if found[1] else
              float(found[2]) * {"k": 1e3, "M": 1e6, "": 1}[found[3]])
    adaptive = {n for n in sizes if s.how.adaptive and s.budget.is_shallow(n)}
    left = wanted - s.r_avg * sum(sizes[n] for n in adaptive)
    deep = sum(size for n, size in sizes.items() if n not in adaptive)
    if not deep or round(left / deep) < 1:
        raise UserError(f"--match-params {s.match_params}: no rank R gives so few")
    return round(left / deep)


# What a setting must be; NaN is in no range.
POSITIVE = (lambda v: 0 < v < math.inf, "above 0")
RANGES = {
    "warmup": (lambda v: 0 <= v < 1 or v == round(v), "in [0, 1), or a whole number of steps"),
    "kasa_beta": (lambda v: 0 <= v < math.inf, "0 or a number above it"),
    "kasa_gamma": (lambda v: 0 <= v < math.inf, "0 or a number above it"),
    "dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "0 or a number above it"),
    "seed": (lambda v: 0 <= v < 2**32, "a whole number from 0 to 2^32 - 1"),
    "shallow": ANYTHING, "r_min": ANYTHING, "r_avg": ANYTHING, "r_max": ANYTHING,  # see below
}


def check(s: Settings, config: Config) -> None:
    """Refuse values that no run can have; UserError names the flag."""
    for f in fields(Settings):
        value = getattr(s, f.name)
        good, what = RANGES.get(f.name, POSITIVE if f.type in (int, float) else ANYTHING)
        if value is not None and not good(value):
            raise UserError(f"--{f.name.replace('_', '-')} must be {what}, not {value}")
    if s.shallow != AUTO and not 0 <= s.shallow <= config.num_hidden_layers:
        raise UserError(f"--shallow {s.shallow}: {s.model} has {config.num_hidden_layers} blocks")
    if FAMILIES[config.model_type].encoder and s.max_length > config.longest:
        raise UserError(f"--max-length {s.max_length}: {s.model} has positions for "
                        f"{config.longest} tokens")
    if s.score_every and data.TASKS[s.task].classes:
        raise UserError(f"--score-every: {s.task} is scored after every epoch as it is")
    if s.shard and (s.score_every or s.how.penalty or data.TASKS[s.task].classes):
        what = ("--score-every" if s.score_every else f"--method {s.method}" if s.how.penalty else
                f"--task {s.task}")
        raise UserError(f"--shard does not go with {what}, which looks at whole weights between "
                        "steps; leave it out")
    if s.compile:
        check_compiler(s.device)
    try:
        names = s.layers(empty(config))
        if s.how.adaptive:
            for name in names:
                s.budget.is_shallow(name)  # a layer outside the blocks has no depth
    except ValueError as error:
        raise UserError(str(error)) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch had no memory; on a CPU its words alone say so."""
    return (isinstance(error, torch.OutOfMemoryError)
            or "alloc" in "".join(str(error).splitlines()[:1]))


def run_main(main: Callable[[], None], with_less_memory: str = "") -> None:
    """Call a script's main: bad input ends as one line and exit 2, a full disk or exhausted
    memory (with what to try) as one line and exit 1, Ctrl-C as 130; a warning is one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that has no Σ shows a ? instead
            stream.reconfigure(errors="replace")
    warnings.showwarning = lambda message, *_, **__: say("warning", message)
    try:
        checkpoint.check_version("torch", torch.__version__)
        main()
    except UserError as error:
        fail(str(error))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise  # a bug
        line = str(error).splitlines()[0] if str(error) else ""
        fail(f"out of memory ({line})" + (with_less_memory and f"; {with_less_memory}"), code=1)
    except OSError as error:
        fail(str(error), code=1)
    except KeyboardInterrupt as error:
        fail(f"interrupted; {error}" if str(error) else "interrupted", code=130)


# ----------------------------------------------------------------------------- the run's folder


def provenance() -> dict[str, str]:
    """Versions and commit, for every file of results."""
    here = Path(__file__).resolve().parent
    git = partial(subprocess.run, cwd=here, capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip() or "unknown"
        dirty = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except OSError:
        commit, dirty = "unknown", ""
    versions = {name: version(name) for name in ("tokenizers", "safetensors")}
    return {"commit": commit + ("-modified" if dirty else ""), "torch": torch.__version__,
            "python": platform.python_version(), "threads": str(torch.get_num_threads())} | versions


def model_name(model: str) -> str:
    """A model's part in the name of a folder of results."""
    return Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")


def run_folder(s: Settings) -> Path:
    return Path("runs") / f"{model_name(s.model)}-{s.task.replace(':', '-')}-{s.method}-s{s.seed}"


def is_run(folder: str | Path) -> bool:
    """Whether train.py wrote this folder; a model's has a config.json instead."""
    return (Path(folder) / "run.json").exists()


def finished(run: Path) -> bool:
    """The result is there, and the checkpoints, which go last, are not."""
    result = (run / "adapter.safetensors").exists() or (run / "model" / "config.json").exists()
    return result and not (run / "checkpoint").exists()


def is_score(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)


def read_ranks(run: Path) -> dict[str, Any]:
    """ranks.json of a run; UserError for what train.py does not write."""
    path = run / "ranks.json"
    report = checkpoint.read_json(path)
    layers = report.get("layers")
    layers = layers if isinstance(layers, dict) else {}
    if not layers or type(report.get("shallow_blocks", 0)) is not int or not all(
            isinstance(x, dict) and type(x.get("r")) is int and 0 < x["r"] < 2**24
            and is_score(x.get("residual_rounding"))
            and re.search(r"(^|\.)layers?\.\d{1,4}\.", name) for name, x in layers.items()):
        raise UserError(f"{path}: not a ranks.json of train.py")
    return report


def write_run(run: Path, s: Settings, more: dict[str, Any]) -> None:
    """run.json: every setting, versions, commit, and `more`."""
    checkpoint.save_json(run / "run.json", {"settings": asdict(s)} | more | provenance())


def read_run(run: Path) -> tuple[Settings, dict[str, Any]]:
    """Settings and the whole run.json of a run folder."""
    if not is_run(run):
        raise UserError(f"{run}: " + ("has no run.json, so train.py did not write it"
                                      if run.is_dir() else "no such folder"))
    recorded = checkpoint.read_json(run / "run.json")
    stored, names = recorded.get("settings"), {f.name for f in fields(Settings)}
    if not isinstance(stored, dict) or not {"model", "method"} <= set(stored) <= names:
        raise UserError(f"{run / 'run.json'}: not written by this version of train.py")
    check_types(run / "run.json", recorded)
    stored.setdefault("form", "fast")  # what there was before it was a setting
    missing = sorted(names - set(stored))
    if missing:
        print(f"{run / 'run.json'}: of an older version; default taken for {', '.join(missing)}")
    return Settings(**stored), recorded


def check_types(path: Path, recorded: dict[str, Any]) -> None:
    """UserError naming what a run.json holds and train.py cannot have written."""
    stored = recorded["settings"]
    for f in fields(Settings):
        kinds = (int, float) if f.type is float else (f.type,)
        value = stored.get(f.name, f.default)
        good, what = RANGES.get(f.name, POSITIVE if f.type in (int, float) else ANYTHING)
        if not (value is None and f.default is None) and (
                type(value) not in kinds or not good(value)
                or value not in choices().get(f.name, (value,))):
            raise UserError(f"{path}: {f.name} {str(value)[:40]!r} cannot be"
                            + (f"; it is {what}" if what else ""))
    for name in ("base", "base_fingerprint", "data_sha256", "known_as", "commit", "torch"):
        if not isinstance(recorded.get(name), str | None):
            raise UserError(f"{path}: {name} {str(recorded[name])[:40]!r} is no text")


def base_of(run: Path, s: Settings, recorded: dict[str, Any], named: str | None = None) -> Path:
    """The folder of the base model of a run: where it was, or where `--base` says it is now.

    UserError if it is gone, or holds other weights than the run was started with.
    """
    was = recorded.get("base")  # None: of the hub, or shipped with this repository
    if was and not named and not Path(was).is_dir():
        raise UserError(f"{was}: the base model of {run} is no longer there; say with --base where "
                        "it is")
    folder = checkpoint.fetch(named or was or s.model)
    found = checkpoint.fingerprint(folder)
    if recorded.get("base_fingerprint", found) != found:
        raise UserError(f"{folder}: holds other weights ({found}) than {run} was started with "
                        f"({recorded['base_fingerprint']}); say with --base where those are")
    return folder


def check_new(run: Path) -> None:
    """Never write over another run."""
    if finished(run):
        raise UserError(f"{run} holds a finished run; choose another --out or --seed, or "
                        "remove it")
    if run.exists() and any(p.suffix != ".tmp" for p in run.iterdir()):
        raise UserError(f"{run} holds an unfinished run; go on with --resume {run}, or choose "
                        "another --out")
