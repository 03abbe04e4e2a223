"""Take a run elsewhere, to peft, transformers or vLLM; and read a peft adapter back.

    python export.py runs/NAME --to DIR --format peft        an ordinary LoRA for the untouched base
    python export.py runs/NAME --to DIR --format merged      one model, the adapter folded in
    python export.py runs/NAME --to DIR --format residual    W_res as a model, and the adapter as
                                                             it was trained in DIR/adapter
    python eval.py DIR --base MODEL                          a peft adapter, scored

Every method leaves W + s (B diag(d) A - B0 A0), where A0, B0 is what was taken out of W at the
start. Two products of rank r are one of rank 2r, [s B d, -s B0] [A; A0], and that is an ordinary
LoRA on the untouched W:

    format     ranks                  weights beside it       the run's outputs
    peft       2r; r where A0, B0     none, the base's own    as they are, but for the rounding of
               are none, or A is A0                           W_res where the run was in bfloat16
    merged     -                      the whole model         as they are, rounded once to --dtype
    residual   r                      the whole model         as they are

A full fine-tuning has no adapter and is exported as merged. Nothing is loaded as a whole: tensors
go from the base's files to the new ones one by one.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import checkpoint
import data
from checkpoint import MODELS, Adapter, Stored, UserError, read_json
from model import (
    FAMILIES,
    Config,
    LoRALinear,
    Start,
    adapted_layers,
    attach,
    empty,
    whole_parameters,
)
from results import flat_scores, read_results
from settings import (
    DTYPES,
    Parser,
    Settings,
    base_of,
    finished,
    for_task,
    read_ranks,
    read_run,
    run_main,
)

MARK = "farss-export.lock"  # in a folder that is being written
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # in front of every name in a file of peft

# ------------------------------------------------------------------------------- what is exported


@dataclass(frozen=True)
class Source:
    """A finished run, and the files that it stands on; checked, and nothing loaded but A and B."""

    run: Path
    settings: Settings
    recorded: dict[str, Any]  # run.json
    folder: Path  # of the base model; of a full fine-tuning its own model
    config: Config
    adapter: Adapter
    stored: dict[str, Stored]  # the folder's tensors

    @property
    def base_name(self) -> str:
        """The base as others find it: its hub id, else its folder."""
        place = MODELS.get(self.settings.model, (self.settings.model,))[0]
        in_folder = self.recorded.get("base") or isinstance(place, Path)
        return str(self.folder.resolve()) if in_folder else str(place)

    @property
    def base_title(self) -> str:
        """The same for a reader, who has no use for a path of another machine."""
        return Path(self.base_name).name if Path(self.base_name).is_dir() else self.base_name

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by name; a tied head counts once."""
        return {n: tuple(p.shape) for n, p in empty(self.config).named_parameters()}

    @property
    def was_rounded(self) -> bool:
        """Whether W_res is not exactly W minus what was taken out."""
        return (self.settings.dtype != "float32" and self.adapter.residual == "split"
                and any(x.A0 is not None for x in self.adapter.starts.values()))


def open_run(run: Path, base: str | None = None) -> Source:
    """Everything of a finished run that an export needs; UserError for anything wrong with it."""
    s, recorded = read_run(run)
    if not finished(run):
        raise UserError(f"{run} is not finished; go on with: python train.py --resume {run}")
    whole = s.how.trains == "weights"
    folder = run / "model" if whole else base_of(run, s, recorded, base)
    config = for_task(checkpoint.read_config(folder), s.task)
    model = empty(config)
    model.fingerprint = checkpoint.fingerprint(folder)
    adapter = (Adapter({}, {}, 1.0, s.residual) if whole else
               checkpoint.read_adapter(model, run / "adapter.safetensors"))
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    stored = checkpoint.stored_tensors(folder)
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    for name in adapter.whole:  # the run's own takes its place
        stored.pop(name, None)
        expected.pop(name)
    checkpoint.check_tensors(folder, stored, expected, FAMILIES[config.model_type].needless)
    return Source(run, s, recorded, folder, config, adapter, stored)


def adapted(source: Source, name: str, residual: str) -> tuple[LoRALinear, float]:
    """One layer of the run with its adapter on, and the part of what was taken out of W that
    rounding W_res lost: exactly as `attach` makes it for the run."""
    holder = nn.Module()
    weight = source_tensor(source, f"{name}.weight")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    holder.add_module("layer", linear)
    lost = attach(holder, {"layer": source.adapter.starts[name]}, source.adapter.scaling_of(name),
                  residual=residual)
    return adapted_layers(holder)["layer"], lost["layer"]


def source_tensor(source: Source, name: str) -> Tensor:
    """A tensor that the adapter leaves alone, in the dtype that the run had it in."""
    if name in source.adapter.whole:
        return source.adapter.whole[name]
    stored = {name: source.stored[name]}
    return checkpoint.read_tensors(stored, source.settings.master_dtype, "cpu")[name]


def layer_of(source: Source, tensor: str) -> str | None:
    """The adapted layer whose weight a tensor is, if it is one's."""
    name, _, leaf = tensor.rpartition(".")
    return name if leaf == "weight" and name in source.adapter.starts else None


# ----------------------------------------------------------------------------- a run as peft's LoRA


def update_factors(start: Start, scaling: float) -> tuple[Tensor, Tensor]:
    """(A', B') with B' A' = s (B diag(d) A - B0 A0), of as few rows as there is a way to."""
    B = start.B if start.d is None else start.B * start.d
    if start.A0 is None or start.B0 is None:
        return start.A, scaling * B
    if torch.equal(start.A, start.A0):  # LoRA-Null's version 2, whose A does not train
        return start.A, scaling * (B - start.B0)
    return torch.cat([start.A, start.A0]), torch.cat([scaling * B, -scaling * start.B0], dim=1)


def save_peft(source: Source, folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], base: str,
              dtype: torch.dtype) -> None:
    """adapter_config.json and adapter_model.safetensors of {layer: (A, B)} whose B A is all of the
    change: alpha = r everywhere, so that a reader who overlooks alpha_pattern scales by 1, too.

    r is the largest rank, for readers that make room for one rank. A classification head goes with
    it, as a module to save.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in pairs.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    tensors |= {PREFIX + name: t for name, t in source.adapter.whole.items()}
    checkpoint.save_tensors(folder / WEIGHTS, {n: t.to(dtype) for n, t in tensors.items()},
                            {"format": "pt"})
    r = max(len(A) for A, _ in pairs.values())
    others = {name: len(A) for name, (A, _) in pairs.items() if len(A) != r}
    encoder = FAMILIES[source.config.model_type].encoder
    checkpoint.save_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if encoder else "CAUSAL_LM",
        "base_model_name_or_path": base, "r": r, "lora_alpha": r, "rank_pattern": others,
        "alpha_pattern": others, "target_modules": list(pairs), "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "inference_mode": True,
        "modules_to_save": sorted({n.split(".")[0] for n in source.adapter.whole}) or None})


def write_peft(source: Source, folder: Path, final: Path, dtype: torch.dtype | None,
               shard_size: int) -> None:
    """An ordinary LoRA for the untouched base."""
    pairs = {name: update_factors(start, source.adapter.scaling_of(name))
             for name, start in source.adapter.starts.items()}
    save_peft(source, folder, pairs, source.base_name, dtype or torch.float32)
    if note := rounding_note(source):
        print(f"note: {note}")


def rounding_note(source: Source) -> str:
    """What a LoRA on the untouched W cannot hold; empty where that is nothing."""
    if not source.was_rounded:
        return ""
    layers = read_ranks(source.run)["layers"].values()
    lost = sorted(layer["residual_rounding"] for layer in layers if "residual_rounding" in layer)
    if not lost:
        raise UserError(f"{source.run / 'ranks.json'}: says nothing of residual_rounding")
    return (f"the run computed with W_res rounded to {source.settings.dtype}, which lost "
            f"{lost[len(lost) // 2]:.1e} of ‖scaling·B0 A0‖ in the median layer; on the untouched "
            "W nothing is lost, and outputs differ by as much. --format merged has the run's own")


# ------------------------------------------------------------------------------- a run as a model


def write_model(source: Source, folder: Path, tensor_of: Callable[[str], Tensor],
                dtype: torch.dtype, shard_size: int) -> None:
    """config.json, the weights in shards, and what stands beside the base's weights."""
    checkpoint.save_json(folder / "config.json", checkpoint.config_json(source.config) | {
        "torch_dtype": str(dtype).removeprefix("torch.")})
    checkpoint.copy_companions(source.folder, folder)
    shards = split_into_shards(source.shapes, dtype.itemsize, shard_size)
    names = (["model.safetensors"] if len(shards) == 1 else
             [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)])
    for file, shapes in zip(names, shards, strict=True):
        checkpoint.stream_tensors(folder / file, {n: (x, dtype) for n, x in shapes.items()},
                                  {"format": "pt"}, lambda n: tensor_of(n).to(dtype))
    if len(shards) > 1:
        total = sum(map(math.prod, source.shapes.values())) * dtype.itemsize
        checkpoint.save_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": total},
            "weight_map": {n: file for file, shapes in zip(names, shards, strict=True)
                           for n in shapes}})


def split_into_shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int
                      ) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, as many to a file as `limit` bytes hold; a larger one is alone."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = limit
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = shape
        room -= size
    return shards


def write_merged(source: Source, folder: Path, final: Path, dtype: torch.dtype | None,
                 shard_size: int) -> None:
    """The model with its adapter folded in: W_res + s B A in fp32, rounded once."""
    def tensor_of(name: str) -> Tensor:
        layer = layer_of(source, name)
        if layer is None:
            return source_tensor(source, name)
        return adapted(source, layer, source.adapter.residual)[0].merged_weight()

    write_model(source, folder, tensor_of, dtype or DTYPES[source.settings.dtype], shard_size)


def write_residual(source: Source, folder: Path, final: Path, dtype: torch.dtype | None,
                   shard_size: int) -> None:
    """W_res as a model, and the adapter as it was trained, of rank r, in a folder of its own:
    beside the weights transformers would take its adapter_config.json for the model's."""
    lost: list[float] = []

    def tensor_of(name: str) -> Tensor:
        layer = layer_of(source, name)
        if layer is None:
            return source_tensor(source, name)
        made, rounding = adapted(source, layer, "split")
        lost.append(rounding)
        return made.weight

    write_model(source, folder, tensor_of, dtype or DTYPES[source.settings.dtype], shard_size)
    pairs = {name: update_factors(start._replace(A0=None, B0=None),
                                  source.adapter.scaling_of(name))
             for name, start in source.adapter.starts.items()}
    save_peft(source, folder / "adapter", pairs, str(final.resolve()), torch.float32)
    if source.settings.dtype != "float32" and source.adapter.residual == "exact":
        print(f"note: the run kept W whole; rounding W_res to {source.settings.dtype} lost "
              f"{sorted(lost)[len(lost) // 2]:.1e} of ‖scaling·B0 A0‖ in the median layer")


class Format(NamedTuple):
    """A row of FORMATS."""

    write: Callable[[Source, Path, Path, torch.dtype | None, int], None]
    about: str
    needs_adapter: bool
    library: str  # that reads it
    loading: str  # how, for the model card


LOAD_MODEL = """import torch
from transformers import {auto}

model = {auto}.from_pretrained("{here}", dtype=torch.{dtype})
"""
LOAD_PEFT = """import torch
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}"{labels}, dtype=torch.{dtype})
model = PeftModel.from_pretrained(base, "{adapter}")
"""
FORMATS = {
    "peft": Format(write_peft, "an ordinary LoRA of up to twice the rank for the untouched base",
                   True, "peft", LOAD_PEFT + "model = model.merge_and_unload()  # if you like\n"),
    "merged": Format(write_merged, "one model with the adapter folded in, the form for vLLM",
                     False, "transformers", LOAD_MODEL),
    "residual": Format(write_residual, "W_res as a model, and the adapter as it was trained in its "
                       "folder adapter", True, "peft", LOAD_PEFT),
}

# ---------------------------------------------------------------------------------- the model card


def model_card(source: Source, form: str, final: Path) -> str:
    """README.md: base, method, settings, data, scores, licence, and how to load it."""
    s, how = source.settings, FORMATS[form]
    encoder = FAMILIES[source.config.model_type].encoder
    on_hub = source.base_title == source.base_name
    licence = licence_of(source.folder)
    base = source.base_name if how.write is write_peft else final.name
    labels = len(source.config.labels) if encoder and how.write is write_peft else 0
    front = {"base_model": source.base_title if on_hub else None, "library_name": how.library,
             "license": licence}
    loading = how.loading.format(
        auto=f"AutoModelFor{'SequenceClassification' if encoder else 'CausalLM'}",
        here=final.name, base=Path(base).name if Path(base).is_dir() else base,
        labels=f", num_labels={labels}" if labels else "", dtype=s.dtype,
        adapter=final.name + ("/adapter" if how.write is write_residual else ""))
    return "\n".join([
        "---", *(f"{k}: {v}" for k, v in front.items() if v), "tags: [farss, lora]", "---", "",
        f"# {source.run.resolve().name}", "",
        f"{source.base_title} after {s.task}, trained with `{s.method}` ({s.how.about}). "
        f"Exported as *{form}*: {how.about}.", "", "```python", loading + "```", "",
        *vllm_note(source, form), *scores(source), "## Settings", "",
        f"Base: {source.base_title}, fingerprint {source.recorded.get('base_fingerprint')}.  ",
        f"Data: {s.data}, sha256 {source.recorded.get('data_sha256')}.  ",
        f"Code: commit {source.recorded.get('commit')}, torch {source.recorded.get('torch')}.", "",
        "```json", json.dumps(shown_settings(s), indent=1), "```", "",
        *([f"Note: {note}.", ""] if how.write is write_peft and (note := rounding_note(source))
          else []),
        "## Licence", "",
        f"That of the base model{f' ({licence})' if licence else ''}, which goes with every copy "
        "of its weights and what is made of them. Training data: "
        + (data.SOURCES[s.data].licence if s.data in data.SOURCES else "under its own licence")
        + ".", ""])


def shown_settings(s: Settings) -> dict[str, Any]:
    """The settings that are set, without the paths of this machine."""
    return {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v
            for k, v in vars(s).items() if v is not None and v is not False}


def licence_of(folder: Path) -> str | None:
    """What the base's own card names, where it lies beside the weights."""
    card = folder / "README.md"
    checkpoint.check_file(card)
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license: *(\S+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def vllm_note(source: Source, form: str) -> list[str]:
    if FAMILIES[source.config.model_type].encoder:
        return []
    if FORMATS[form].write is write_merged:
        return ["vLLM: `vllm serve DIR`, with this folder as DIR.", ""]
    return ["vLLM: export with `--format merged`. Its LoRA takes ranks up to `--max-lora-rank`, 16 "
            "unless told otherwise, and one rank and alpha for all layers.", ""]


def scores(source: Source) -> list[str]:
    """What eval.py found of the run, if it did."""
    if not (source.run / "results.json").exists():
        return []
    results = read_results(source.run)
    cells = flat_scores(results["benchmarks"]) | results.get("summary", {})
    if not cells:
        return []
    return ["## Scores", "", "By eval.py, of the run itself (K, T, KT: Eq. 36-38 of the paper).",
            "", "| " + " | ".join(cells) + " |", "|" + "---|" * len(cells),
            "| " + " | ".join("undefined" if v is None else f"{v:.2f}" for v in cells.values())
            + " |", ""]


# ------------------------------------------------------------------------- a peft LoRA, read back

# Fields of adapter_config.json behind which stands more than B A, or another base than W.
PLAIN = ("use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices",
         "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config",
         "arrow_config", "monteclora_config", "velora_config", "megatron_config")
# Of init_lora_weights those that leave W as it is; peft repeats the others (PiSSA, ...) on loading.
LEAVES_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def is_peft(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (Path(folder) / CONFIG).is_file()


def peft_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA; UserError naming the field where it is more."""
    path = Path(folder) / CONFIG
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported; a plain "
                        "LoRA is")
    odd = [name for name in PLAIN if raw.get(name)]
    odd += ["bias"] if raw.get("bias", "none") != "none" else []
    odd += [] if raw.get("init_lora_weights") in LEAVES_BASE else ["init_lora_weights"]
    if odd:
        raise UserError(f"{path}: {odd[0]} {raw[odd[0]]!r} is not supported; a plain LoRA on "
                        "untouched weights is")
    return raw


def read_peft(model: nn.Module, folder: str | Path) -> Adapter:
    """An adapter of peft, checked against the base model that it is for.

    Only safetensors are read. Every tensor must be a layer's lora_A or lora_B, or of a
    classification head. Raises UserError for whatever a plain LoRA is not.
    """
    raw, path = peft_config(folder), Path(folder) / WEIGHTS
    if not path.exists() and path.with_suffix(".bin").exists():
        raise UserError(f"{path.with_suffix('.bin')}: pickled, which can run code when opened; "
                        "save it with save_pretrained(safe_serialization=True)")
    tensors, _ = checkpoint.load_tensors(path)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    whole = whole_parameters(model)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        name, _, end = key.removeprefix(PREFIX).rpartition(".lora_")
        if key.startswith(PREFIX) and name in linears and end in ("A.weight", "B.weight"):
            if not tensors[key].is_floating_point() or not tensors[key].isfinite().all():
                raise UserError(f"{path}: {key} holds what is no finite number")
            pairs.setdefault(name, {})[end[0]] = tensors[key].float()
        elif not key.startswith(PREFIX) or key.removeprefix(PREFIX) not in whole:
            raise UserError(f"{path}: {key} is no part of a plain LoRA of this model")
    for name, p in whole.items():
        if PREFIX + name not in tensors or tensors[PREFIX + name].shape != p.shape:
            raise UserError(f"{path}: has no {name} of shape {tuple(p.shape)}; another task?")
    if not pairs:
        raise UserError(f"{path}: adapts no layer")
    starts, scaling = {}, {}
    for name, pair in pairs.items():
        m, n = linears[name].weight.shape
        r, alpha = rank_and_alpha(raw, name, Path(folder) / CONFIG)
        if {part: tuple(t.shape) for part, t in pair.items()} != {"A": (r, n), "B": (m, r)}:
            raise UserError(f"{path}: {name} holds {[(k, *t.shape) for k, t in pair.items()]}, "
                            f"not A ({r}, {n}) and B ({m}, {r}); wrong base model?")
        starts[name] = Start(pair["A"], pair["B"])
        scaling[name] = alpha / (math.sqrt(r) if raw.get("use_rslora") else r)
    return Adapter(starts, {n: tensors[PREFIX + n].float() for n in whole}, scaling, "split")


def rank_and_alpha(raw: dict[str, Any], name: str, path: Path) -> tuple[int, float]:
    """A layer's rank and alpha: the first pattern that its name ends in, else the one for all."""
    def of(patterns: str, default: str) -> Any:
        given = raw.get(patterns) or {}
        if not isinstance(given, dict):
            raise UserError(f"{path}: {patterns} is not readable (no object)")
        hard = [k for k in given if len(k) > 1000 or re.search(r"\)[*+{]|([*+{].*){4}", k)]
        if hard:  # a name could be matched in more ways than there is time to try
            raise UserError(f"{path}: {patterns} {hard[0][:40]!r} is more than a layer's name")
        try:
            return next((v for key, v in given.items()
                         if re.fullmatch(rf"(.*\.)?({key})", name)), raw.get(default, 8))
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{path}: {patterns} is not readable ({error})") from None

    r, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise UserError(f"{path}: {name} has rank {r!r} and alpha {alpha!r}")
    return r, alpha


# ------------------------------------------------------------------------------------------- main


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it to write to, which becomes `folder` on success and vanishes on failure."""
    temporary = folder.with_name(folder.name + ".tmp")
    files, mark = temporary / "files", temporary / MARK
    with claim(temporary):
        try:
            if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                raise UserError(f"--to {folder}: is there already; name another, or remove it")
            shutil.rmtree(files, ignore_errors=True)  # of an export that was killed
            files.mkdir()
            yield files
            if folder.exists():
                folder.rmdir()
            os.replace(files, folder)
            checkpoint.sync_entries(folder.parent)
        finally:
            shutil.rmtree(files, ignore_errors=True)
            with suppress(OSError):  # where an open file cannot go, or something else was put there
                mark.unlink()
                temporary.rmdir()


@contextmanager
def claim(temporary: Path) -> Iterator[None]:
    """Within `with`, the folder `temporary`, new or what a killed export left, is this process's
    alone.

    The mark stands in it before anything else and is locked while its process lives; a kill frees
    the lock. UserError for a folder that holds anything but the mark and what an export writes
    beside it, and where another export has the lock.
    """
    try:
        temporary.mkdir(parents=True)
        left = False
    except FileExistsError:
        left = True
        found = {x.name for x in temporary.iterdir()} if temporary.is_dir() else {temporary.name}
        if temporary.is_symlink() or not found <= {MARK, "files"} or found == {"files"}:
            raise UserError(f"{temporary}: is in the way, and not what a killed export leaves; "
                            "remove or rename it") from None
    with open(temporary / MARK, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{temporary}: another export is writing there; wait for it, or name "
                            "another folder") from None
        except (ImportError, OSError):  # Windows, and disks of a network that know no locks
            if left:
                raise UserError(f"{temporary}: left by an export that was killed, or is still at "
                                "work; remove it") from None
        yield


def number_of_bytes(text: str) -> int:
    """5GB, 500MB, in powers of ten."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG])B", text)
    size = float(found[1]) * {"K": 1e3, "M": 1e6, "G": 1e9}[found[2]] if found else 0
    if size < 1:
        raise UserError(f"--shard-size {text}: write 5GB or 500MB")
    return int(size)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of train.py")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="new folder; it is "
                        "there when all of it is")
    parser.add_argument("--format", choices=tuple(FORMATS), required=True,
                        help="; ".join(f"{name}: {f.about}" for name, f in FORMATS.items()))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: the "
                        "run's); of a peft adapter (default float32: bfloat16 rounds B A and "
                        "B0 A0 each by itself, and most of the difference may be lost)")
    parser.add_argument("--base", metavar="FOLDER", help="where the base model is now, if not "
                        "where it was")
    parser.add_argument("--shard-size", default="5GB", help="largest file of weights; default "
                        "%(default)s")
    args = parser.parse_args(argv)
    form, size = FORMATS[args.format], number_of_bytes(args.shard_size)
    source = open_run(args.run, args.base)
    if form.needs_adapter and not source.adapter.starts:
        raise UserError(f"{args.run}: {source.settings.method} trained every weight, so there is "
                        "no adapter; export it with --format merged")
    with new_folder(args.to) as folder:
        form.write(source, folder, args.to, DTYPES[args.dtype] if args.dtype else None, size)
        card = model_card(source, args.format, args.to)
        checkpoint.save_text(folder / "README.md", card)
    written = sum(f.stat().st_size for f in args.to.rglob("*") if f.is_file())
    print(f"{args.to}: {form.about}, {written / 1e6:,.1f} MB; README.md there says how to load it")


if __name__ == "__main__":
    run_main(main)
