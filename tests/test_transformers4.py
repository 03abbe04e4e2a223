"""What checkpoint.py writes, read by transformers 4, and the other way round.

The environment has transformers 5, so the older one lies in a folder of its own and runs in a
process of its own; skipped where that folder is missing.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import KINDS, padded, tiny_llama

import checkpoint as C
import model as M

TRANSFORMERS4 = Path(__file__).resolve().parent.parent / ".venv" / "transformers4"
pytestmark = pytest.mark.skipif(not TRANSFORMERS4.exists(), reason=(
    f"pip install --no-deps --target {TRANSFORMERS4} transformers==4.57.6 "
    "huggingface_hub==0.36.0 tokenizers==0.22.1"))
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)

# Of every folder named: config.json as this version writes it, and, if there are weights, logits.
READER = """
import pathlib, sys, torch, transformers
from safetensors.torch import load_file, save_file
assert transformers.__version__.startswith("4."), transformers.__version__
for folder in map(pathlib.Path, sys.argv[1:]):
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(folder / "back")
    if (folder / "model.safetensors").exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(**load_file(folder / "batch.safetensors")).logits
        save_file({"logits": logits}, folder / "logits.safetensors")
"""
DECODERS = [name for name, (_, config) in C.MODELS.items()
            if not M.FAMILIES[config.model_type].encoder]


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A folder that holds one for each of KINDS and DECODERS, each with what became of it."""
    root = tmp_path_factory.mktemp("transformers4")
    ids, mask = padded("left")
    for kind, settings in KINDS.items():
        C.save(tiny_llama(num_hidden_layers=2, **settings), root / kind)
        save_file({"input_ids": ids, "attention_mask": mask}, root / kind / "batch.safetensors")
    for name in DECODERS:
        (root / name).mkdir()
        C.save_json(root / name / "config.json", C.config_json(C.MODELS[name][1]))
    done = subprocess.run(
        [sys.executable, "-c", READER, *(root / n for n in (*KINDS, *DECODERS))],
        env=os.environ | {"PYTHONPATH": str(TRANSFORMERS4), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "must be an integer" not in done.stderr
    return root


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits(read, kind):
    ids, mask = padded("left")
    real = mask.bool()
    close(C.load(read / kind, device="cpu")(ids, mask)[real],
          load_file(read / kind / "logits.safetensors")["logits"][real])


@pytest.mark.parametrize("name", [*KINDS, *DECODERS])
def test_config_and_back(read, name):
    """rope_theta at the top is what transformers 4 read; what it copies unread stands below."""
    ours, raw = C.read_config(read / name), C.read_json(read / name / "back" / "config.json")
    assert raw["rope_theta"] == ours.rope_theta and raw["rope_scaling"] == ours.rope_scaling
    assert C.read_config(read / name / "back") == ours
    del raw["rope_parameters"]
    C.save_json(read / name / "back" / "config.json", raw)
    assert C.read_config(read / name / "back") == ours
