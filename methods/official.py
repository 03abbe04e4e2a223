"""What the authors' own code does otherwise than the paper: behind `--official`.

    OfficialBudget     the end is chosen by r < 128, not by the depth of the layer
    batch_mean_loss    δ of the mean loss over a batch, not of each sequence's sum
    pad_and_count      batches padded to the full length, and the padding counted
    layer_scaling      α / r of each layer's own rank; that no start makes up for it is the caller's
"""

from typing import Any

from torch import Tensor, nn

import farss
from farss import IGNORE, Batch
from model import Start

CALIBRATION_BATCH = 2  # examples


class OfficialBudget(farss.Budget):
    """A Budget in which a small rank means the lowest directions, in deep blocks too."""

    def lowest(self, name: str) -> bool:
        return self.most(name) < 128


def batch_mean_loss(model: Any, batch: Batch) -> Tensor:
    """The mean loss over a batch's labelled tokens, a scalar.

    Its δ weigh a batch by the inverse square of the number of those tokens, so that Σ_δ depends on
    how examples fall into batches.
    """
    total, labelled = model.loss(batch["input_ids"], batch["labels"], batch["attention_mask"])
    return total / labelled


def pad_and_count(batch: Batch, length: int) -> Batch:
    """The batch padded to `length` tokens, all of them real by the mask."""
    missing = length - batch["input_ids"].shape[1]
    ids, labels = nn.functional.pad(batch["input_ids"], (0, missing)), batch["labels"]
    if labels.ndim == 2:  # a classifier has one a sequence
        labels = nn.functional.pad(labels, (0, missing), value=IGNORE)
    return {"input_ids": ids, "labels": labels, "attention_mask": ids.new_ones(ids.shape)}


def layer_scaling(alpha: float, starts: dict[str, Start]) -> dict[str, float]:
    """α / r of each layer."""
    return {name: alpha / len(start.A) for name, start in starts.items()}
