"""farss.py by itself, in an empty folder, on models of transformers as they come."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FAMILIES = {
    "Llama": dict(num_key_value_heads=2), "Qwen3": dict(num_key_value_heads=2, head_dim=8),
    "Phi3": dict(num_key_value_heads=2, pad_token_id=0), "GPTNeoX": {}}
# In fp64, on a batch that is padded on the right; caches are on, as by default.
SCRIPT = """
import sys, torch, transformers, farss
family, settings = sys.argv[1], eval(sys.argv[2])
assert not hasattr(transformers, "farss") and farss.__file__.endswith("alone/farss.py")
config = getattr(transformers, family + "Config")(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, max_position_embeddings=64, **settings)
torch.manual_seed(0)
model = getattr(transformers, family + "ForCausalLM")(config).double()
assert config.use_cache
ids, mask = torch.randint(64, (3, 11)), torch.ones(3, 11, dtype=torch.long)
mask[1, 8:] = mask[2, 5:] = 0
labels = ids.where(mask.bool() & (torch.arange(11) > 3), torch.tensor(-100))
batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
batches, names = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}], \\
    farss.linear_layers(model)
assert len(names) == 3 * {"Llama": 7, "Qwen3": 7, "Phi3": 4, "GPTNeoX": 4}[family]
state = [(p.requires_grad, p.grad) for p in model.parameters()], model.training
expected = farss.kfac_factors(model, [batch], names)
found = {n: f for block in farss.factors_by_block(model, batches, names) for n, f in block.items()}
assert found.keys() == expected.keys()
for name, pair in found.items():
    for mine, theirs in zip(pair, expected[name]):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-16)
losses = [farss.sampled_loss(torch.Generator().manual_seed(1)) for _ in range(2)]
drawn = [farss.kfac_factors(model, [batch], names, losses[0])[names[0]][1], next(iter(
    farss.factors_by_block(model, [batch], names[:1], losses[1])))[names[0]][1]]
torch.testing.assert_close(*drawn, rtol=1e-9, atol=1e-16)
assert (drawn[0] - expected[names[0]][1]).norm() > 0.01 * drawn[0].norm()
budget = farss.Budget(shallow=1, R=6, r_avg=3, r_min=1, r_max=5)
with torch.no_grad():
    before = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    for name, x in farss.initialise(model, batches, budget, scaling=2.0).items():
        W = model.get_parameter(name + ".weight")
        assert len(x.A) == (min(6, *W.shape) if not x.shallow else len(x.A)) and x.scaling == 2
        W.copy_(W - 2 * x.B @ x.A + x.scaling * x.B @ x.A)
    after = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
torch.testing.assert_close(after, before)
assert state == ([(p.requires_grad, p.grad) for p in model.parameters()], model.training)
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_farss_alone_on_a_model_of_transformers(tmp_path, family):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(REPO / "farss.py", alone)
    (alone / "check.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "check.py", family, repr(FAMILIES[family])], cwd=alone,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
