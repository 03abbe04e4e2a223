"""A RoBERTa of random weights and a small set in GLUE's format, to try the path without the hub.

    python tests/random_roberta.py FOLDER

FOLDER/model is what a hub repository would hold: roberta-base's architecture with two blocks and a
vocabulary of 400, its weights as they are before pretraining, without a classification head.
FOLDER/SST-2 holds train.tsv and dev.tsv: reviews whose adjectives are all of one kind, so that a
model which learnt to read gets every one of them right.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
import model as M

ADJECTIVES = (("dull", "clumsy", "tedious", "shallow", "bland", "grating"),
              ("moving", "clever", "graceful", "vivid", "tender", "gripping"))
NOUNS = ("plot", "cast", "score", "camera work", "dialogue", "ending", "pacing", "villain")
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def reviews(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences and labels, 0 or 1; no word but the adjectives tells them apart."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        adjectives = [draw.choice(ADJECTIVES[i % 2]) for _ in range(draw.randint(1, 3))]
        nouns = draw.sample(NOUNS, len(adjectives))
        parts = [f"the {n} is {a}" for n, a in zip(nouns, adjectives, strict=True)]
        rows.append((" and ".join(parts), i % 2))
    return rows


def byte_level_bpe(texts: list[str], size: int) -> Tokenizer:
    """A tokenizer as RoBERTa's: byte-level BPE, <s> in front, </s> behind, </s></s> between."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def write(folder: Path, blocks: int = 2, seed: int = 0, **settings) -> None:
    """The model and the set; `settings` go into its config."""
    sets = {"train": reviews(384, seed), "dev": reviews(100, seed + 1)}
    tokenizer = byte_level_bpe([text for text, _ in sets["train"]], 400)
    config = replace(checkpoint.MODELS["roberta-base"][1], num_hidden_layers=blocks,
                     vocab_size=tokenizer.get_vocab_size(), **settings)
    torch.manual_seed(seed)
    model = M.Roberta(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "LayerNorm" not in name:
                p.zero_() if name.endswith("bias") else p.normal_(0, 0.02)
    checkpoint.save(model, folder / "model")
    body = {n: p for n, p in model.named_parameters() if not n.startswith("classifier")}
    checkpoint.save_tensors(folder / "model" / "model.safetensors", body, {"format": "pt"})
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "RobertaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
         "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
         "cls_token": "<s>", "sep_token": "</s>"}))
    (folder / "SST-2").mkdir(exist_ok=True)
    for name, rows in sets.items():
        text = "sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in rows)
        (folder / "SST-2" / f"{name}.tsv").write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
    print(f"wrote {sys.argv[1]}/model and {sys.argv[1]}/SST-2")
