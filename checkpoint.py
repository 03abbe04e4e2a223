"""Files in and out: checkpoints, adapters, the hub, the tokenizer; every name and shape checked.

    load         Hugging Face safetensors -> model, from a folder, a short name or a hub id
    save         model -> a folder that transformers loads
    read_config  config.json -> Config, absent fields filled in as transformers does
    fetch        the folder of a checkpoint, downloaded if need be
    Tokenizer    tokenizer.json, with the BOS rule made explicit
    save_adapter, load_adapter    A, B and the A0, B0 that were taken out of W
    unload       takes the adapters off again: W, bit for bit
    atomic       a file is written whole or not at all
    save_sealed, load_sealed    tensors with a hash, so that a flipped bit is found

`python checkpoint.py --list` prints the short names and families that are supported.

Only safetensors are read, never a pickle; no code of a checkpoint runs. Bad input is a UserError
of one line that names the file.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor, nn
from tqdm import tqdm

from model import (
    ACTIVATIONS,
    FAMILIES,
    CausalLM,
    Config,
    Count,
    Model,
    Probability,
    Start,
    adapted_layers,
    attach,
    embedding,
    empty,
    new_head,
    put_linear,
    whole_parameters,
)


class UserError(ValueError):
    """Bad input that the user can mend: the scripts print it as one line and exit with 2."""


class AbsentError(UserError):
    """A file of the hub that is not there."""


class DamagedError(UserError):
    """A file of tensors that was cut short or changed since it was written."""


LEAST = {"torch": "2.11", "huggingface_hub": "1.33"}  # as pyproject.toml has them


def check_version(package: str, installed: str) -> None:
    """UserError if the installed version of a package of LEAST is older than that."""
    found, least = ([int(n) for n in re.findall(r"\d+", text)[:2]]
                    for text in (installed, LEAST[package]))
    if found < least:
        raise UserError(f"{package} {installed} is too old; install {LEAST[package]} or newer: "
                        f"pip install '{package}>={LEAST[package]}'")


# ----------------------------------------------------------------------- names of checkpoints

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192.0,
}
LLAMA3_TOKENS: dict[str, Any] = {"bos_token_id": 128000, "eos_token_ids": (128001,)}
SMOLLM2_TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_ids": (0,)}

GEMMA2: dict[str, Any] = {
    "model_type": "gemma2", "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "max_position_embeddings": 8192, "bos_token_id": 2,
    "eos_token_ids": (1,), "pad_token_id": 0, "sliding_window": 4096,
    "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}
ROBERTA: dict[str, Any] = {
    "model_type": "roberta", "hidden_act": "gelu", "max_position_embeddings": 514,
    "bos_token_id": 0, "eos_token_ids": (2,), "pad_token_id": 1, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "labels": ("LABEL_0", "LABEL_1"),
}

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
MICROCOSM = Path(__file__).resolve().parent / "microcosm"

# short name: (hub id, or folder here; settings), so that a plan needs no download.
#         V, d, MLP width, blocks, heads, key-value heads, head width
MODELS: dict[str, tuple[str | Path, Config]] = {
    "microcosm": (MICROCOSM, Config(285, 96, 256, 12, 4, 4, 24, max_position_embeddings=256)),
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", Config(32000, 4096, 11008, 32, 32, 32, 128)),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", Config(32000, 5120, 13824, 40, 40, 40, 128)),
    "llama3-8b": (
        "meta-llama/Meta-Llama-3-8B",
        Config(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5, **LLAMA3_TOKENS,
               max_position_embeddings=8192),
    ),
    "llama3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        Config(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5, **LLAMA3_TOKENS,
               rope_scaling=LLAMA3_ROPE | {"factor": 8.0}, max_position_embeddings=131072),
    ),
    "llama3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        Config(128256, 2048, 8192, 16, 32, 8, 64, rope_theta=5e5, **LLAMA3_TOKENS,
               rope_scaling=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True,
               max_position_embeddings=131072),
    ),
    "llama3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        Config(128256, 3072, 8192, 28, 24, 8, 128, rope_theta=5e5, **LLAMA3_TOKENS,
               rope_scaling=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True,
               max_position_embeddings=131072),
    ),
    "mistral-7b-v0.1": (
        "mistralai/Mistral-7B-v0.1",
        Config(32000, 4096, 14336, 32, 32, 8, 128, model_type="mistral", sliding_window=4096,
               max_position_embeddings=32768),
    ),
    "mistral-7b-v0.3": (
        "mistralai/Mistral-7B-v0.3",
        Config(32768, 4096, 14336, 32, 32, 8, 128, rope_theta=1e6, model_type="mistral",
               max_position_embeddings=32768),
    ),
    "gemma2-2b": ("google/gemma-2-2b", Config(256000, 2304, 9216, 26, 8, 4, 256, **GEMMA2)),
    "gemma2-9b": ("google/gemma-2-9b", Config(256000, 3584, 14336, 42, 16, 8, 256, **GEMMA2)),
    "roberta-base": ("FacebookAI/roberta-base",
                     Config(50265, 768, 3072, 12, 12, 12, 64, **ROBERTA)),
    "roberta-large": ("FacebookAI/roberta-large",
                      Config(50265, 1024, 4096, 24, 16, 16, 64, **ROBERTA)),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        Config(49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, **SMOLLM2_TOKENS,
               tie_word_embeddings=True, max_position_embeddings=8192),
    ),
    "smollm2-135m-instruct": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Config(49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, bos_token_id=1, eos_token_ids=(2,),
               tie_word_embeddings=True, max_position_embeddings=8192),
    ),
    "smollm2-360m": (
        "HuggingFaceTB/SmolLM2-360M",
        Config(49152, 960, 2560, 32, 15, 5, 64, rope_theta=1e5, **SMOLLM2_TOKENS,
               tie_word_embeddings=True, max_position_embeddings=8192),
    ),
    "smollm2-1.7b": (
        "HuggingFaceTB/SmolLM2-1.7B",
        Config(49152, 2048, 8192, 24, 32, 32, 64, rope_theta=130000.0, **SMOLLM2_TOKENS,
               tie_word_embeddings=True, max_position_embeddings=8192),
    ),
}


def config_of(name_or_path: str | Path) -> Config:
    """The Config of a short name without any download, otherwise of the fetched config.json."""
    text = str(name_or_path)
    if text in MODELS and not is_folder(text):
        return MODELS[text][1]
    if not Path(text).is_dir() and is_hub_id(text):
        return read_config(hub_download(text, "config.json").parent)
    return read_config(fetch(text))


def is_folder(text: str) -> bool:
    """Whether a model's name means a folder here; a short name does if a checkpoint is in it."""
    return Path(text).is_dir() and (text not in MODELS or (Path(text) / "config.json").exists())


def is_hub_id(text: str) -> bool:
    """Whether a text that is no folder can be the id of a hub repository, owner/name.

    runs/typo is none where there is a folder runs.
    """
    looks = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.git)", text)
    return looks is not None and not Path(text).parent.is_dir()


def fetch(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: a folder as it is, a short name of MODELS or a hub id by
    download (config, tokenizer, and only those weight files that the index names).

    Raises UserError saying what to do when it cannot be had.
    """
    text = str(name_or_path)
    if is_folder(text):
        return Path(text)
    place = MODELS[text][0] if text in MODELS else text
    if isinstance(place, Path):
        return place
    if text not in MODELS and not is_hub_id(text):
        raise UserError(f"--model {text}: no such folder, and not one of the short names "
                        + ", ".join(MODELS) + "; a hub id has the form owner/name")
    config = hub_download(place, "config.json")
    hub_download(place, "tokenizer.json")
    hub_optional(place, "tokenizer_config.json")
    index = hub_optional(place, "model.safetensors.index.json")
    for shard in weight_files(index.parent) if index else ["model.safetensors"]:
        hub_download(place, shard)
    return config.parent


def hub_download(repo: str, filename: str, repo_type: str = "model") -> Path:
    """One file of a hub repository, from the cache or the network.

    Raises UserError saying what to do, AbsentError if the repository or the cache has no such file.
    """
    from huggingface_hub import __version__, errors, hf_hub_download
    from huggingface_hub.utils import logging

    check_version("huggingface_hub", __version__)
    logging.set_verbosity_error()  # its retries; the error below says it once
    where = f"{repo}/{filename}"
    try:
        return Path(hf_hub_download(repo, filename, repo_type=repo_type))
    except errors.GatedRepoError:
        raise UserError(
            f"{where}: the repository is gated. Accept its licence on huggingface.co/{repo} and "
            "run `hf auth login`, or pass --model an open copy's id or a local folder") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{where}: no such repository on the hub (or it is private: run "
                        "`hf auth login`); a local folder works too") from None
    except errors.RemoteEntryNotFoundError:
        raise AbsentError(f"{where}: the repository has no such file; only checkpoints with "
                          "config.json, tokenizer.json and *.safetensors can be read. Of one that "
                          "has pickles alone (*.bin) transformers' save_pretrained makes a folder "
                          "to pass instead") from None
    except (OSError, errors.HfHubHTTPError) as error:
        line = str(error).strip().split("\n")[0]
        offline = isinstance(error, errors.LocalEntryNotFoundError)
        raise (AbsentError if offline else UserError)(
            f"{where}: could not be downloaded ({line}). Without the hub, pass a local file or "
            "folder instead") from None


def hub_optional(repo: str, filename: str) -> Path | None:
    """The same for a file that a checkpoint may lack: None then, and where the hub is away (the
    files that are needed speak for themselves)."""
    try:
        return hub_download(repo, filename)
    except AbsentError:
        return None


# --------------------------------------------------------------------------------- config.json


Check = tuple[Callable[[Any], bool], str]


def or_null(check: Check) -> Check:
    good, what = check
    return lambda v: v is None or good(v), f"{what} or null"


# What a field of Config must be, by its type.
CHECKS: dict[Any, Check] = {
    int: (lambda v: type(v) is int and 0 < v < 2**31, "a positive whole number below 2^31"),
    float: (lambda v: type(v) in (int, float) and 0 < v < 1e30, "a positive number"),
    bool: (lambda v: type(v) is bool, "true or false"),
    int | None: or_null((lambda v: type(v) is int and 0 <= v < 2**31, "a token id")),
    Probability: (lambda v: type(v) in (int, float) and 0 <= v < 1, "a number in [0, 1)"),
    tuple[int, ...]: (lambda v: all(type(t) is int and t >= 0 for t in v),
                      "a token id or a list of them"),
}
CHECKS |= {float | None: or_null(CHECKS[float]), Count: or_null(CHECKS[int]),
           Probability | None: or_null(CHECKS[Probability])}
ANYTHING: Check = (lambda v: True, "")
MOST_BLOCKS, WIDEST = 1000, 2**24
# Fields that other fields decide where the file leaves them out; those stand before them in Config.
DERIVED = {
    "num_key_value_heads": lambda value: value["num_attention_heads"],
    "head_dim": lambda value: value["hidden_size"] // value["num_attention_heads"],
}
# What every config.json must say; all other fields have a default in their family, or are not read.
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads")


def read_config(folder: str | Path) -> Config:
    """Config from `folder`/config.json, as written before transformers 5 (rope_theta beside
    rope_scaling) or since (both inside rope_parameters).

    Absent fields have the defaults of their family, and so has null where that is the family's
    way to say "none". Raises UserError naming the file and the field for anything missing, wrong
    or unsupported.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in tuple(FAMILIES):  # a tuple, since a wrong file may hold a list here
        raise UserError(f"{path}: model_type {kind!r} is not supported; supported: "
                        + ", ".join(FAMILIES))
    defaults = FAMILIES[kind].defaults
    said = {k: raw[k] for k in (*REQUIRED, *defaults) if k in raw}
    value: dict[str, Any] = {f.name: None if f.default is MISSING else f.default
                             for f in fields(Config)}
    silent = {k for k, v in said.items() if v is None and
              (defaults.get(k) is None or defaults[k] is False)}  # not 0, which is a token id
    value |= defaults | {k: v for k, v in said.items() if k not in silent}
    value["model_type"] = kind
    value["hidden_act"] = value.get("hidden_activation", value["hidden_act"])  # Gemma's name
    if value["hidden_act"] not in tuple(ACTIVATIONS):
        raise UserError(f"{path}: hidden_act {value['hidden_act']!r} is not supported; supported: "
                        + ", ".join(ACTIVATIONS))
    for name, supported in FAMILIES[kind].fixed.items():
        if raw.get(name) not in supported:
            raise UserError(f"{path}: {name} {raw[name]!r} is not supported; supported: "
                            + ", ".join(str(v) for v in supported if v is not None))
    value |= rope_fields(raw, value, path) if "rope_theta" in defaults else {}
    eos = value["eos_token_id"]
    value["eos_token_ids"] = tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if FAMILIES[kind].encoder:
        value["labels"] = label_names(raw, path)

    for field in fields(Config):
        name = field.name
        if name in DERIVED and value[name] is None:
            value[name] = DERIVED[name](value)
        good, what = CHECKS.get(field.type, ANYTHING)
        if not good(value[name]):
            shown = "eos_token_id" if name == "eos_token_ids" else name
            raise UserError(f"{path}: {shown} must be {what}, not {value[name]!r}")
    check_sizes(value, said, path)
    check_layer_types(raw, value, path)
    for field in fields(Config):
        if type(value[field.name]) is int and field.type not in (int, int | None, Count):
            value[field.name] = float(value[field.name])
    return Config(**{f.name: value[f.name] for f in fields(Config)})


def check_sizes(value: dict, said: dict, path: Path) -> None:
    """UserError for sizes that no model has, or that do not fit each other."""
    defaults = FAMILIES[value["model_type"]].defaults
    heads, kv_heads = value["num_attention_heads"], value["num_key_value_heads"]
    sizes = {name: value[name] for name in REQUIRED} | {"heads x width": heads * value["head_dim"]}
    for name, size in sizes.items():  # no model is near, and more cannot even be laid out
        if size > (MOST_BLOCKS if name == "num_hidden_layers" else WIDEST):
            raise UserError(f"{path}: {name} {size} is more than any model has")
    if heads % kv_heads or (said.get("head_dim") is None and defaults.get("head_dim") is None
                            and value["hidden_size"] % heads):
        raise UserError(f"{path}: {heads} attention heads fit neither {kv_heads} key-value heads "
                        f"nor hidden_size {value['hidden_size']}")
    if value["head_dim"] % 2 and "rope_theta" in defaults:
        raise UserError(f"{path}: head_dim must be even, for rotary pairs, not "
                        f"{value['head_dim']}")


def check_layer_types(raw: dict, value: dict, path: Path) -> None:
    """Newer files list for every block whether it has the window: as its family says, or
    UserError."""
    kinds, every = raw.get("layer_types"), FAMILIES[value["model_type"]].window_every
    windowed = ["sliding_attention" if i % every == 0 else "full_attention"
                for i in range(value["num_hidden_layers"])]
    if kinds is not None and value["sliding_window"] and kinds != windowed:
        raise UserError(f"{path}: layer_types {str(kinds)[:60]} is not supported; supported: "
                        f"{str(windowed[:4])[:-1]}, ...")


def label_names(raw: dict, path: Path) -> tuple[str, ...]:
    """The classes of a classifier's config.json, in order; where it is silent, two by number."""
    names = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(2)}
    inside = isinstance(names, dict) and all(
        str(i) in names and isinstance(names[str(i)], str) for i in range(len(names)))
    if not inside:
        raise UserError(f"{path}: id2label must name the classes 0, 1, ..., not {names!r}")
    return tuple(names[str(i)] for i in range(len(names)))


def rope_fields(raw: dict, value: dict, path: Path) -> dict[str, Any]:
    """rope_theta and rope_scaling of either generation of config.json."""
    which = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(which) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: {which} must be an object, not {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{path}: rope type {rope_type!r} is not supported; "
                        "supported: default, llama3")
    theta = rope.get("rope_theta", value["rope_theta"])
    if "rope_theta" in raw and theta != raw["rope_theta"]:
        raise UserError(f"{path}: rope_theta is {raw['rope_theta']!r}, and in {which} {theta!r}")
    if rope_type == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    good, what = CHECKS[float]
    scaling: dict[str, Any] = {key: rope.get(key) for key in ("factor", *LLAMA3_ROPE)
                               if key != "rope_type"}
    for key, number in scaling.items():
        if not good(number):
            raise UserError(f"{path}: {which}.{key} must be {what}, not {number!r}")
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "llama3"} | {
        key: float(number) for key, number in scaling.items()}}


# ------------------------------------------------------------------------------- the weights


def weight_files(folder: str | Path) -> list[str]:
    """Names of the safetensors files of a checkpoint folder, in the index's order.

    One model.safetensors goes before an index, as in transformers, whose save_pretrained leaves
    the index of an earlier save lying about.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map")
        for name in weight_map.values():
            inside = isinstance(name, str) and Path(name).name == name and "\\" not in name
            if not inside or name in ("", ".", "..") or len(name) > 255:
                raise UserError(f"{index}: shard {name!r} points outside the folder")
        return list(dict.fromkeys(weight_map.values()))
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise UserError(f"{folder}: holds only pickled weights, which can run code when opened; "
                        "convert it with save_pretrained(safe_serialization=True)")
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def fingerprint(folder: str | Path) -> str:
    """A hash that tells the weights of one checkpoint folder from those of another.

    Over names, shapes, dtypes and values, of tensors of more than 2^16 numbers only the first,
    middle and last rows, so that a 7B model takes a moment. Sharding makes no difference.
    """
    parts = {}
    for file in weight_files(folder):
        path = Path(folder) / file
        check_file(path)
        try:
            with safe_open(path, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118
                    piece = shard.get_slice(name)
                    shape = piece.get_shape()
                    rows = shape[0] if shape else 0
                    starts = [0] if math.prod(shape) <= 2**16 else [0, rows // 2, rows - 1]
                    values = [piece[i : i + 1] if len(starts) > 1 else shard.get_tensor(name)
                              for i in starts]
                    digest = hashlib.sha256(f"{name} {shape} {piece.get_dtype()}".encode())
                    for value in values:
                        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
                    parts[name] = digest.hexdigest()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or incomplete ({error}); fetch it again") from None
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()[:16]


class Stored(NamedTuple):
    """Where a tensor of a checkpoint lies."""

    path: Path
    shape: tuple[int, ...]


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """All tensors of a checkpoint folder by name, from the headers of its files alone."""
    stored: dict[str, Stored] = {}
    for file in weight_files(folder):
        path = Path(folder) / file
        if not path.exists():
            raise UserError(f"{path}: named by the index, but not there")
        check_file(path)
        try:
            with safe_open(path, "pt") as shard:
                shapes = {n: tuple(shard.get_slice(n).get_shape()) for n in shard.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or incomplete ({error}); fetch it again") from None
        for name, shape in shapes.items():
            if name in stored:
                raise UserError(f"{path}: {name} also stands in {stored[name].path.name}")
            stored[name] = Stored(path, shape)
    return stored


def check_tensors(folder: str | Path, stored: dict[str, Stored],
                  expected: dict[str, tuple[int, ...]], needless: dict[str, str]) -> None:
    """UserError naming file and tensor unless exactly the expected ones are there, and those that
    are needless, by pattern: for each pattern a line says so."""
    ignored: dict[str, list[str]] = {}
    for name, (path, shape) in stored.items():
        pattern = next((p for p in needless if re.fullmatch(p, name)), None)
        if name in expected and shape != expected[name]:
            raise UserError(f"{path}: {name} has shape {shape}, config.json implies "
                            f"{expected[name]}")
        if name not in expected and pattern is None:
            raise UserError(f"{path}: unexpected tensor {name}")
        if name not in expected and pattern is not None:
            ignored.setdefault(pattern, []).append(name)
    missing = sorted(set(expected) - set(stored))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: tensor {missing[0]}{more} is missing")
    for pattern, names in ignored.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{stored[names[0]].path.name}: ignoring {names[0]}{more} ({needless[pattern]})")


def check_tied(stored: dict[str, Stored]) -> None:
    """A tied head that was stored a second time must be the embedding."""
    head, table = stored.pop("lm_head.weight", None), "model.embed_tokens.weight"
    if head is None or table not in stored:
        return
    with safe_open(head.path, "pt") as one, safe_open(stored[table].path, "pt") as two:
        if not torch.equal(one.get_tensor("lm_head.weight"), two.get_tensor(table)):
            raise UserError(f"{head.path}: lm_head.weight is not the embedding, though config.json "
                            "says tie_word_embeddings")


def read_tensors(stored: dict[str, Stored], dtype: torch.dtype, device: str | torch.device
                 ) -> dict[str, Tensor]:
    """Those tensors, file by file, converted one at a time on the way in.

    Raises UserError for one that is not of floats, or has a value that is not finite or that
    `dtype` cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    total = sum(math.prod(s.shape) for s in stored.values())
    bar = tqdm(total=total, unit="p", unit_scale=True, desc="loading", leave=False,
               disable=None, delay=2)
    for path in dict.fromkeys(s.path for s in stored.values()):
        with safe_open(path, "pt") as shard:
            for name in [n for n, s in stored.items() if s.path == path]:
                tensor = shard.get_tensor(name)
                if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                    raise UserError(f"{path}: {name} is {tensor.dtype}; quantised checkpoints are "
                                    "not supported, use the fp16/bf16/fp32 one")
                # copy=True: never keep a view of the file, which may change under us.
                tensors[name] = tensor.to(device=device, dtype=dtype, copy=True)
                check_finite(path, name, tensor, tensors[name])
                bar.update(tensor.numel())
    bar.close()
    return tensors


def check_finite(path: Path, name: str, before: Tensor, after: Tensor) -> None:
    """UserError if a tensor holds a number that is not finite, or one that became so by
    conversion."""
    if not after.numel() or all(bool(x.isfinite()) for x in after.aminmax()):  # NaN is either
        return
    if not before.isfinite().all():
        raise UserError(f"{path}: {name} holds a number that is not finite")
    else:
        raise UserError(f"{path}: {name} holds {before.abs().max().item():.3g}, more than "
                        f"{after.dtype} can; load it as float32")


def pick_device(device: str | None = None) -> torch.device:
    """The named device, by default cuda, then mps, then cpu; UserError if it is not there."""
    if device is None:
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).split("\n")[0]
        raise UserError(f"--device {device}: not usable here ({line})") from None
    return torch.device(device)


def free_memory(device: str | torch.device) -> float:
    """Bytes that are free on a device now, on a GPU with those that torch holds for later use."""
    if str(device).startswith("cuda"):
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = 8e9  # macOS does not say
    if MEMINFO.exists():  # not MemFree: what only caches files counts as free
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free = 1024.0 * int(lines["MemAvailable"].split()[0])
    most, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if most.exists() and most.read_text().strip() != "max":  # a container's limit
        free = min(free, float(most.read_text()) - float(used.read_text()))
    return free


def check_memory(folder: Path, parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """UserError saying what would do, unless the weights have room on the device."""
    need, free = parameters * dtype.itemsize, free_memory(device)
    if need <= free:
        return
    half = 2 * parameters
    raise UserError(
        f"{folder}: {parameters / 1e6:,.0f}M weights take {need / 1e9:.1f} GB as "
        f"{str(dtype).removeprefix('torch.')}, and {device} has {free / 1e9:.1f} GB free; "
        + (f"as bfloat16 (--dtype bfloat16) they take {half / 1e9:.1f} GB"
           if half <= free else "take a smaller model or another --device"))


def head_order(stored: dict[str, Stored], own: tuple[str, ...], labels: tuple[str, ...]
               ) -> list[int] | None:
    """Which row of a stored classification head is which of the wanted `labels`.

    `own` are the names in its config.json: the same in any order and case, or as many that say
    nothing ("LABEL_0"). None where the checkpoint has no head, or one of other classes.
    """
    if "classifier.out_proj.weight" not in stored or len(own) != len(labels):
        return None
    named, wanted = ([name.lower() for name in names] for names in (own, labels))
    if own != labels and sorted(named) == sorted(set(wanted)):
        return [named.index(name) for name in wanted]
    nameless = named == [f"label_{i}" for i in range(len(own))]
    return list(range(len(own))) if own == labels or nameless else None


def has_head(folder: str | Path, labels: tuple[str, ...]) -> bool:
    """Whether a checkpoint folder holds a classification head for these labels."""
    return head_order(stored_tensors(folder), read_config(folder).labels, labels) is not None


def load(name_or_path: str | Path, dtype: torch.dtype | None = None,
         device: str | torch.device | None = None, labels: tuple[str, ...] | None = None,
         seed: int | None = 0) -> Model:
    """A pretrained model from a folder, a hub id or a short name, in eval mode.

    dtype None is fp32 on CPU, where bf16 products are many times slower, and bf16 elsewhere.
    Peak memory is the model plus one tensor. A RoBERTa gets a head for `labels` (None: those of
    its config.json): the stored one where it is of these, else a new one, drawn with `seed`, which
    a line says (seed None: load_adapter will bring one, and no line). Raises UserError for anything
    wrong with the files, and where memory will not do.
    """
    device = pick_device(None if device is None else str(device))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    folder = fetch(name_or_path)
    companions(folder)  # a link is refused now, not when a finished training copies them
    config = own = read_config(folder)
    if labels is not None and FAMILIES[config.model_type].encoder:
        config = replace(config, labels=tuple(labels))
    model = empty(config)
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}  # a tied head counts once
    stored, found = stored_tensors(folder), fingerprint(folder)
    if config.tie_word_embeddings:
        check_tied(stored)
    head, rows = whole_parameters(model), head_order(stored, own.labels, config.labels)
    if head and rows is None:
        for name in head:
            stored.pop(name, None)
            expected.pop(name)
    check_tensors(folder, stored, expected, FAMILIES[config.model_type].needless)
    wanted = {name: place for name, place in stored.items() if name in expected}
    check_memory(folder, sum(math.prod(s.shape) for s in wanted.values()), dtype, device)
    tensors = read_tensors(wanted, dtype, device)
    if head and rows is None:
        if seed is not None:
            print(f"{folder}: has no head for {', '.join(config.labels)}; a new one, of seed "
                  f"{seed}")
        tensors |= {n: t.to(device, dtype) for n, t in new_head(config, seed or 0).items()}
    elif head and rows is not None:
        for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
            tensors[name] = tensors[name][rows]
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True, strict=True)
    if isinstance(model, CausalLM) and config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.fingerprint = found
    return model.requires_grad_(False).eval()


def config_json(config: Config) -> dict[str, Any]:
    """What `read_config` undoes, in words that transformers 4 and 5 both understand: rope_theta
    stands at the top, as 4 reads it, and in rope_parameters, as 5 writes it."""
    family = FAMILIES[config.model_type]
    raw = {k: v for k, v in asdict(config).items() if k in (*REQUIRED, *family.defaults)}
    raw |= {"model_type": config.model_type, "architectures": [family.architecture],
            "eos_token_id": list(config.eos_token_ids)}
    if "query_pre_attn_scalar" in raw and not raw["query_pre_attn_scalar"]:
        raw["query_pre_attn_scalar"] = config.head_dim
    if "hidden_activation" in family.defaults:
        raw |= {"hidden_act": config.hidden_act, "hidden_activation": config.hidden_act}
    if config.rope_scaling:  # transformers wants its one whole number written as such
        whole = "original_max_position_embeddings"
        raw["rope_scaling"] = config.rope_scaling | {whole: int(config.rope_scaling[whole])}
    if "rope_theta" in family.defaults:
        raw["rope_parameters"] = (raw["rope_scaling"] or {"rope_type": "default"}) | {
            "rope_theta": config.rope_theta}
    if config.labels:
        raw["id2label"] = {str(i): name for i, name in enumerate(config.labels)}
        raw["label2id"] = {name: i for i, name in enumerate(config.labels)}
    if len(config.labels) == 1:
        raw["problem_type"] = "regression"
    return raw


@torch.no_grad()
def save(model: Model, folder: str | Path) -> None:
    """Write config.json and model.safetensors as Hugging Face does (a tied head is not stored)."""
    if adapted_layers(model):
        raise ValueError("merge() the adapters before saving the model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(embedding(model).dtype).removeprefix("torch.")
    save_json(folder / "config.json", config_json(model.config) | {"torch_dtype": dtype})
    save_tensors(folder / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})


# ------------------------------------------------------------------------------- the adapter


def save_adapter(path: str | Path, model: nn.Module, initial: dict[str, tuple[Tensor, Tensor]],
                 residual: str) -> None:
    """A, B (and KaSA's d) of every adapted layer, the A0, B0 that were taken out of W at the
    start, and the classification head where there is one.

    `initial` {name: (A0, B0)} is empty for methods that leave W as it is.
    """
    tensors: dict[str, Tensor] = dict(whole_parameters(model))
    for name, layer in adapted_layers(model).items():
        tensors |= {f"{name}.A": layer.A, f"{name}.B": layer.B}
        tensors |= {} if layer.d is None else {f"{name}.d": layer.d}
        if name in initial:
            tensors |= {f"{name}.A0": initial[name][0], f"{name}.B0": initial[name][1]}
    scalings = {n: layer.scaling for n, layer in adapted_layers(model).items()}
    alike = len(set(scalings.values())) == 1
    scaling = next(iter(scalings.values())) if alike else scalings
    base = getattr(model, "fingerprint", None)
    save_sealed(path, tensors, "adapter", {"scaling": scaling, "residual": residual}
                | ({"base": base} if base else {}))


class Adapter(NamedTuple):
    """What an adapter file holds."""

    starts: dict[str, Start]  # of every adapted layer A, B, d as trained, and A0, B0
    whole: dict[str, Tensor]  # parameters that trained in full: a classification head
    scaling: float | dict[str, float]  # one for all layers, or of each by name
    residual: str  # split or exact

    def scaling_of(self, name: str) -> float:
        return self.scaling[name] if isinstance(self.scaling, dict) else self.scaling


def read_adapter(model: nn.Module, path: str | Path) -> Adapter:
    """A saved adapter, checked against the untouched base model, which may be on the meta device.

    Raises UserError if the file is damaged, does not fit the model, or was made for other weights.
    """
    tensors, how = load_sealed(path, "adapter")
    names = [key[:-2] for key in tensors if key.endswith(".A")]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    left = set(tensors) - set(whole_parameters(model))
    for name in names:
        if name not in linears or f"{name}.B" not in tensors:
            raise UserError(f"{path}: adapts {name}, which the base model does not have")
        (m, n), r = linears[name].weight.shape, len(tensors[f"{name}.A"])
        fits = {"A": (r, n), "B": (m, r), "d": (r,)}
        parts = {key: tensors.get(f"{name}.{key}") for key in ("A", "B", "d", "A0", "B0")}
        found = {key: tuple(t.shape) for key, t in parts.items() if t is not None}
        r0 = found.get("A0", (r,))[0]
        fits |= {"A0": (r0, n), "B0": (m, r0)}
        if ("A0" in found) != ("B0" in found) or any(found[k] != fits[k] for k in found):
            raise UserError(f"{path}: {name} has {found}, which does not fit the base model's "
                            f"{m} x {n}; wrong base model?")
        left -= {f"{name}.{key}" for key in found}
    if not names:
        raise UserError(f"{path}: adapts no layer")
    if left:
        raise UserError(f"{path}: holds {min(left)}, which is no part of an adapter")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds what is no finite number")
    scaling = how.get("scaling")
    each = [scaling.get(n) for n in names] if isinstance(scaling, dict) else [scaling]
    good, _ = CHECKS[float]
    if how.get("residual") not in ("split", "exact") or not all(good(x) for x in each):
        raise UserError(f"{path}: scaling {str(scaling)[:40]}, residual {how.get('residual')!r} "
                        "cannot be")
    check_same_base(model, how.get("base"), path)
    for name, p in whole_parameters(model).items():
        if name not in tensors or tensors[name].shape != p.shape:
            raise UserError(f"{path}: has no {name} of shape {tuple(p.shape)}; another task?")
    starts = {n: Start(tensors[f"{n}.A"], tensors[f"{n}.B"], tensors.get(f"{n}.A0"),
                       tensors.get(f"{n}.B0"), tensors.get(f"{n}.d")) for n in names}
    return Adapter(starts, {n: tensors[n] for n in whole_parameters(model)}, how["scaling"],
                   how["residual"])


def check_same_base(model: nn.Module, other: str | None, where: str | Path) -> None:
    """UserError unless a model has the weights of that fingerprint, where both are known."""
    mine = getattr(model, "fingerprint", None)
    if mine and other and mine != other:
        raise UserError(f"{where}: is of the base model {other}, and this one is {mine}; the two "
                        "have other weights")


def put_adapter(model: nn.Module, adapter: Adapter, dropout: float = 0.0) -> None:
    """Put an adapter that was read on the untouched base model that it was checked against."""
    attach(model, adapter.starts, adapter.scaling, dropout, adapter.residual)
    with torch.no_grad():
        for name, p in whole_parameters(model).items():
            p.copy_(adapter.whole[name])


def load_adapter(model: nn.Module, path: str | Path, dropout: float = 0.0
                 ) -> dict[str, tuple[Tensor, Tensor]]:
    """Put a saved adapter on an untouched base model; returns `initial` as save_adapter takes it.

    W_res is computed from W, A0 and B0 just as at the start of training, so it has the same bits.
    Raises UserError if the file is damaged or does not fit the model.
    """
    adapter = read_adapter(model, path)
    put_adapter(model, adapter, dropout)
    return {n: (x.A0, x.B0) for n, x in adapter.starts.items()
            if x.A0 is not None and x.B0 is not None}


@torch.no_grad()
def unload(model: nn.Module, folder: str | Path) -> None:
    """Take the adapters off: every adapted layer is an nn.Linear with W again, bit for bit.

    W is read once more from the base's `folder`, as `load` read it; a layer with residual="exact"
    still has it. A classification head that was trained stays. Afterwards `load_adapter` puts the
    same or another adapter on. Raises UserError, and changes nothing, if the folder lacks a weight
    or holds other weights than those that the adapter was put on.
    """
    layers, stored = adapted_layers(model), stored_tensors(folder)
    for name, layer in layers.items():
        found = stored.get(f"{name}.weight")
        if found is None or found.shape != tuple(layer.weight.shape):
            raise UserError(f"{folder}: has no {name}.weight of shape "
                            f"{tuple(layer.weight.shape)}; wrong base model?")
    check_same_base(model, fingerprint(folder), folder)
    for name, layer in layers.items():
        weight = f"{name}.weight"
        put_linear(model, name, layer.weight if layer.A0 is not None else read_tensors(
            {weight: stored[weight]}, layer.weight.dtype, layer.weight.device)[weight])


# ---------------------------------------------------------------------- files, whole or not


def check_file(path: Path) -> None:
    """UserError for a pipe or device, which may never end, and for a link out of the folder that
    the file lies in, which could make any file of this machine part of a result.

    The folder itself may be a link. Of links out of it only those of the hub's cache are followed:
    models--OWNER--NAME/snapshots/REVISION/FILE leads to models--OWNER--NAME/blobs/HASH.
    """
    if not path.exists():
        return
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: a pipe or device, not a file")
    folder, real = (Path(os.path.realpath(p)) for p in (path.parent, path))
    cached = any(above.name.startswith("models--") and real.parent == above / "blobs"
                 and folder.is_relative_to(above / "snapshots") for above in folder.parents)
    if not real.is_relative_to(folder) and not cached:
        raise UserError(f"{path}: a link that leads out of its folder, to {real}; copy that file "
                        "here, or name the folder where it lies")


def read_json(path: str | Path) -> dict:
    """The object in a JSON file; UserError when it is missing, broken or not an object."""
    try:
        check_file(Path(path))
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # 5,000 digits, a depth of 100,000
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def companions(folder: Path) -> list[Path]:
    """What stands beside the weights of a checkpoint: tokenizer, chat template, generation
    config. UserError for a link out of the folder."""
    found = [file for pattern in ("tokenizer*", "special_tokens_map.json", "added_tokens.json",
                                  "vocab.*", "merges.txt", "chat_template*",
                                  "generation_config.json")
             for file in folder.glob(pattern) if file.is_file()]
    for file in found:
        check_file(file)
    return found


def copy_companions(source: Path, target: Path) -> None:
    """The companions, and the pad id of its config.json."""
    for file in companions(source):
        with atomic(target / file.name) as temporary:
            shutil.copyfile(file, temporary)
    pad = read_json(source / "config.json").get("pad_token_id")
    if pad is not None:
        save_json(target / "config.json", read_json(target / "config.json") | {
            "pad_token_id": pad})


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` on success and vanishes on failure, so
    that neither a killed process nor a power cut leaves half a file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a link in a folder from elsewhere must not be written to
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_entries(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_entries(folder: str | Path) -> None:
    """Have the names of a folder's files on the disk, too, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_text(path: str | Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: str | Path, value: dict) -> None:
    save_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file, byte for byte as safetensors' own save_file writes it.

    Not by save_file: it writes under a random name first, which a kill leaves behind for good, and
    several entries of metadata in random order.
    """
    stream_tensors(path, {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}, metadata,
                   lambda name: tensors[name])


def seal(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """A hash of every byte of tensors on the CPU, and of what is said about them."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_sealed(path: str | Path, tensors: dict[str, Tensor], kind: str, about: dict[str, Any]
                ) -> str:
    """save_tensors with `about` and a seal, by which load_sealed finds a byte that has changed.
    Returns the seal."""
    flat = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    sealed = seal(flat, about)
    save_tensors(path, flat, {kind: json.dumps(about | {"sha256": sealed})})
    return sealed


def load_sealed(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Undo save_sealed; `about` still has its seal, as "sha256".

    Raises DamagedError where that does not fit, UserError for a file of another kind. A file of
    an older version has no seal and is taken as it is.
    """
    tensors, meta = load_tensors(path)
    if kind not in meta:
        raise UserError(f"{path}: not {kind} data written by train.py")
    try:
        about = json.loads(meta[kind])
        plain = {key: value for key, value in about.items() if key != "sha256"}
    except (ValueError, RecursionError, AttributeError):
        raise DamagedError(f"{path}: damaged (what it says of itself is not readable)") from None
    if "sha256" in about and about["sha256"] != seal(tensors, plain):
        raise DamagedError(f"{path}: damaged (its bytes are not those that were written)")
    return tensors, about


# In safetensors' order, in which the widest numbers come first, so that all are aligned.
STORED_DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32",
                 torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
                 torch.uint8: "U8", torch.bool: "BOOL"}


def stream_tensors(path: str | Path, layout: dict[str, tuple[tuple[int, ...], torch.dtype]],
                   metadata: dict[str, str], tensor_of: Callable[[str], Tensor]) -> None:
    """One safetensors file of which a single tensor at a time is in memory.

    The format is a header, which says where each tensor lies, and their bytes: the header follows
    from shapes and dtypes alone, the `layout`. `tensor_of` gives the tensor of a name, on any
    device.
    """
    order = list(STORED_DTYPES)
    names = sorted(layout, key=lambda name: (order.index(layout[name][1]), name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        shape, dtype = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": STORED_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            # not numpy's tofile, which lets a full disk pass unseen
            file.write(raw_bytes(tensor_of(name), *layout[name]))


def raw_bytes(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The bytes of a tensor, as numpy's array of them; it must be what the header says."""
    assert tuple(tensor.shape) == shape and tensor.dtype == dtype
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata."""
    check_file(Path(path))
    try:
        with safe_open(path, "pt") as file:
            # clone: never keep a view of the file, which may change under us.
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path}: damaged or incomplete ({error})") from None


# ------------------------------------------------------------------------------ the tokenizer


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever tokenizers raises, a UserError: bare Exceptions, and panics, which are none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({error})") from None


class Tokenizer:
    """tokenizer.json of a checkpoint, with the BOS rule made explicit.

    BOS is whatever tokenizer.json's own post-processor puts in front of a text: <s> for Llama
    and Mistral, nothing for SmolLM2. EOS is tokenizer_config.json's eos_token where it is given.
    """

    def __init__(self, folder: str | Path, config: Config):
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{path}: no such file; sentencepiece-only checkpoints need a "
                            "tokenizer.json (transformers' AutoTokenizer writes one)")
        check_file(path)
        with one_line(f"{path}: not a readable tokenizer"):
            self.hf = HFTokenizer.from_file(str(path))
            self.hf.no_truncation()
            self.hf.no_padding()
            # An added special token may lie above the embedding, as Llama 2's first <pad> did:
            # plain text does not give it.
            special = {i for i, t in self.hf.get_added_tokens_decoder().items() if t.special}
            vocabulary = set(self.hf.get_vocab().values())
            plain, whole = (self.hf.encode("a", add_special_tokens=special).ids
                            for special in (False, True))
        self.rows = config.vocab_size
        self.check_rows(path, vocabulary - special)
        # What stands before the text, [bos] or []; some templates add EOS behind it, too.
        prefix = next((whole[:i] for i in range(len(whole) + 1)
                       if whole[i : i + len(plain)] == plain), None)
        if prefix is None or not plain:
            raise UserError(f"{path}: its post-processor changes the text")
        self.prefix = prefix
        if FAMILIES[config.model_type].encoder and not self.prefix:
            raise UserError(f"{path}: its post-processor puts no token in front of a text, and a "
                            f"{config.model_type} reads the class off that one")
        self.eos_ids = tuple(config.eos_token_ids)
        named = Path(folder) / "tokenizer_config.json"
        eos = read_json(named).get("eos_token") if named.exists() else None
        eos = eos.get("content") if isinstance(eos, dict) else eos
        eos_id = None
        if isinstance(eos, str) and eos.encode("utf-8", "replace").decode() == eos:
            eos_id = self.hf.token_to_id(eos)
        if eos is not None and eos_id is None:
            raise UserError(f"{named}: eos_token {eos!r} is not a token of tokenizer.json")
        if eos_id is None and not self.eos_ids:
            raise UserError(f"{named}: names no eos_token, nor does config.json")
        self.eos_id = self.eos_ids[0] if eos_id is None else eos_id
        self.eos_ids = tuple(dict.fromkeys((self.eos_id, *self.eos_ids)))
        self.check_rows(path, {self.eos_id, *self.prefix})

    def check_rows(self, path: Path, ids: set[int]) -> None:
        """UserError unless the embedding has a row for each of the ids."""
        if max(ids, default=-1) >= self.rows:
            raise UserError(f"{path}: holds token id {max(ids)}, but the embedding has only "
                            f"{self.rows} rows; tokenizer and model do not match")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = self.hf.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= self.rows:
            raise UserError(f"a text holds {self.hf.id_to_token(max(ids))!r}, for which the "
                            f"embedding has no row: {text[:60]!r}")
        return self.prefix + ids if bos else ids

    def encode_texts(self, texts: Sequence[str], max_length: int) -> tuple[list[int], bool]:
        """One text or a pair as an encoder reads it, `<s> a </s>` or `<s> a </s></s> b </s>`, and
        whether it was cut: one token after another off the longer text, as transformers does.

        UserError where max_length has no room for the marks alone: tokenizers would cut nothing.
        """
        marks = self.hf.num_special_tokens_to_add(len(texts) > 1)
        if max_length < marks:
            raise UserError(f"--max-length {max_length}: a text or pair needs {marks} tokens for "
                            "its marks alone")
        self.hf.enable_truncation(max_length)
        encoding = self.hf.encode(texts[0], texts[1] if len(texts) > 1 else None)
        self.hf.no_truncation()
        return encoding.ids, bool(encoding.overflowing)

    def decode(self, ids: Sequence[int]) -> str:
        return self.hf.decode(list(ids), skip_special_tokens=True)


# ------------------------------------------------------------------------------- what is supported


def what_is_supported() -> Iterator[str]:
    """The short names, with sizes computed from their configs, and the families behind them."""
    yield f"{'short name':24}{'hub id':38}{'model_type':12}{'parameters':>11}{'blocks':>8}"
    for name, (place, config) in MODELS.items():
        size = sum(p.numel() for p in empty(config).parameters()) / 1e6
        where = "(in this repository)" if isinstance(place, Path) else place
        yield (f"{name:24}{where:38}{config.model_type:12}{size:>10,.1f}M"
               f"{config.num_hidden_layers:>8}")
    yield ("\nBesides these any hub id or folder whose config.json has the model_type "
           + ", ".join(FAMILIES))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true",
                        help="print what is supported and how large it is (so does no option)")
    parser.parse_args()
    print("\n".join(what_is_supported()))
