"""The whole path on a GPU, in fp32 and in bf16, beside the CPU in fp64.

A first run on new hardware: `python -m pytest tests/test_cuda.py`, with `-n 4` in a fraction of the
time. Where there is no GPU the CPU takes its place: in the cases marked `rehearsed`, and with
`--device cpu` in all.

Weights are bf16 numbers, so that only the arithmetic differs. How far it may be off was measured
with the CPU in the GPU's place, and stands beside the bounds of fp32 and bf16. Those of fp32 are
ten times that or more, as another device sums in another order, and nearly all below what products
in TF32 cost; those of bf16 at least three times, as partial sums, too, may be rounded. Singular
vectors and choices between near equals are up to rounding, and never compared. What they come to
is: in sums that no rotation changes, or as the reference sees what was chosen.
"""

import copy
import json
import os
import signal
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from tiny import KINDS, tiny_batch, tiny_llama, wide_llama, write_checkpoint, write_data
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint as C
import data
import eval as E
import farss
import fast
import figures
import model as M
import settings as S
import train
from fast import start
from methods import METHODS, covariances

rehearsed = pytest.mark.rehearsed  # cheap, so that a CPU runs it among all other tests
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SQUARE_TALL_FLAT = ("q_proj", "up_proj", "down_proj")
ROWS = [(60, 80), (3, 40), (1, 1), (7, 2)]  # longer than a tile of 128, and mostly padding
PROMPTS = [[256, *range(5, 5 + n)] for n in (3, 60, 1, 9, 17)]
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def within(fp32: float, bf16: float):
    """In either dtype, within the bound of each."""
    return pytest.mark.parametrize("dtype, bound", [(torch.float32, fp32), (torch.bfloat16, bf16)],
                                   ids=["fp32", "bf16"])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    expected = expected.cpu().double()
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


@cache
def wide():
    """Made once in a process; who changes it takes a copy."""
    return wide_llama(dtype=torch.bfloat16)


MODELS = {kind: partial(tiny_llama, **KINDS[kind]) for kind in KINDS} | {
    "wide": wide, "wide, four-to-one heads": partial(wide_llama, num_key_value_heads=2)}


def on_both(model, device, dtype):
    """Copies with weights rounded to bf16: on the CPU in fp64, and on the device in dtype."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    return copy.deepcopy(rounded).double(), rounded.to(device, dtype)


def adapted_on_both(model, device, dtype):
    """The same with adapters that have every part: what was taken out, a diagonal, an update."""
    draw = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=draw) * shape[-1] ** -0.5

    starts = {name: M.Start(random(8, n), random(m, 8), random(8, n), random(m, 8), 1 + random(8))
              for name, (m, n) in M.linear_shapes(model, SEVEN).items()}
    cpu, gpu = on_both(model, device, dtype)
    for each, precision in ((cpu, torch.float64), (gpu, torch.float32)):
        M.attach(each, {name: M.Start(*(x.to(precision) for x in start))
                        for name, start in starts.items()}, 0.5, residual="exact")
    return cpu, gpu


def there(batch, model):
    return {key: value.to(M.embedding(model).device) for key, value in batch.items()}


# ------------------------------------------------------------------------- forward and backward


@torch.no_grad()
@within(2e-5, 0.2)  # measured: 1.9e-6, 0.044
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=rehearsed) if kind in KINDS else kind
                                  for kind in MODELS])
def test_logits(device, kind, dtype, bound):
    """Padded on the left, which takes a mask, and without one."""
    cpu, gpu = on_both(MODELS[kind](), device, dtype)
    batch = tiny_batch(ROWS)
    ids, padded = batch["input_ids"], batch["attention_mask"].flip(1)
    for mask in (None, padded):
        found = gpu(ids.to(device), None if mask is None else mask.to(device))
        assert distance(found, cpu(ids, mask)) <= bound


def gradients(model, seed=0):
    """The loss and its gradients, by parameter, of a batch that is padded on the right."""
    model.train().zero_grad()
    torch.manual_seed(seed)
    loss = model.loss(**there(tiny_batch(ROWS), model))[0]
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()
                                      if p.requires_grad}


@rehearsed
@within(5e-5, 0.2)  # 5.1e-6, 0.054
def test_gradients_of_a_wide_model(device, dtype, bound):
    """Through adapted layers as one function, without padding, by fused attention, and with blocks
    kept or computed again."""
    cpu, gpu = adapted_on_both(wide(), device, dtype)
    expected = gradients(cpu)
    assert len(expected) == 1 + 3 * 14 and gpu.skips_padding(tiny_batch(ROWS)["attention_mask"])
    for gpu.body.gradient_checkpointing in (False, True):
        with sdpa_kernel(FUSED):
            found = gradients(gpu)
        assert {n: far for n in expected if (far := distance(found[n], expected[n])) > bound} == {}


@rehearsed
@within(1e-4, 0.05)  # 0: but a GPU may add up what it does at once in any order
def test_both_passes_drop_the_same(device, dtype, bound):
    """A block that is computed again drops what it did. And a layer, which is linear in x whatever
    it drops, has <dx, x> = <dy, y>."""
    _, gpu = adapted_on_both(wide(), device, dtype)
    for layer in M.adapted_layers(gpu).values():
        layer.dropout = 0.5
    kept, other = gradients(gpu), gradients(gpu, seed=1)
    gpu.body.gradient_checkpointing = True
    for name, gradient in gradients(gpu).items():
        assert distance(gradient, kept[name]) <= bound
        assert distance(other[name], kept[name]) > bound or name == "loss"
    x = torch.randn(200, 1088, device=device, dtype=dtype, requires_grad=True)
    y = gpu.get_submodule("model.layers.0.mlp.up_proj")(x)
    y.backward(y.detach())
    assert distance((x.grad.double() * x).sum(), y.detach().double().pow(2).sum()) <= bound / 10


@torch.no_grad()
@within(2e-5, 0.2)  # 2.0e-6, 0.058
@pytest.mark.parametrize("kind", ["two-to-one heads", "mistral with a window", "gemma2", "wide"])
def test_greedy_tokens(device, kind, dtype, bound):
    """With adapters, and with them merged; more prompts than slots. By the reference each token is
    the likeliest, or behind it by no more than two logits may be off."""
    cpu, gpu = adapted_on_both(MODELS[kind](), device, dtype)
    ids = tiny_batch(ROWS)["input_ids"]
    expected = cpu(ids)
    for _ in range(2):
        off = distance(gpu(ids.to(device)), expected)
        assert off <= bound
        for prompt, new in zip(PROMPTS, M.generate(gpu, PROMPTS, 12, batch_size=3), strict=True):
            logits = cpu(torch.tensor([[*prompt, *new]]))[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
            behind = (logits.amax(1) - chosen) / logits.std(1)
            assert behind.max() <= 10 * off  # in each of the two 5 times what is usual
        M.merge(gpu)
    assert not M.adapted_layers(gpu)


# ------------------------------------------------------------------------ statistics and starts


@rehearsed
def test_moments_of_bf16_by_tensor_cores_are_those_of_fp64(device):
    """Products of bf16 numbers are exact in TF32, and their sums fp32."""
    rows, total = torch.randn(700, 2100, dtype=torch.bfloat16, device=device), fast.OuterSum()
    for part in rows.split(100):
        total.add(part)
    expected = rows.double().T @ rows.double()
    assert distance(total.value(), expected) <= 1e-5


@rehearsed
@pytest.mark.parametrize("keep_on", [None, "cpu"])
@within(1e-4, 0.4)  # 6e-6, 0.13
def test_factors_by_block(device, dtype, bound, keep_on):
    cpu, gpu = on_both(tiny_llama(), device, dtype)
    batch, names = tiny_batch(ROWS), M.linear_names(cpu, SEVEN)
    expected = farss.kfac_factors(cpu, [batch], names)
    for factors in farss.factors_by_block(gpu, [there(batch, gpu)], names, keep_on=keep_on):
        for name, pair in factors.items():
            for mine, theirs in zip(pair, expected[name], strict=True):
                assert distance(mine, theirs) <= bound, name


@rehearsed
@pytest.mark.parametrize("m, n", [(1088, 1088), (1152, 1088), (1088, 1152)])
def test_wide_decompositions(device, m, n):
    """Below σ_1 / 32 a second one is needed: one alone gets the smallest σ wrong by a hundredth."""
    W = next(p.detach() for p in wide().parameters() if p.shape == (m, n))
    U, S, Vh = (x.cpu().double() for x in fast.svd(W.to(device)))
    W = W.double()
    near, far = (Vh.T, U) if m >= n else (U, Vh.T)
    sigma = torch.linalg.eigvalsh(W.T @ W if m >= n else W @ W.T).flip(0).sqrt()
    assert ((S - sigma) / sigma).abs().max() <= 4e-3  # 1.7e-4
    assert distance(U * S @ Vh, W) <= 1e-5
    for side, bound in ((near, 5e-5), (far, 5e-3)):  # 2e-6, and σ_1 / σ_k units of rounding: 4e-4
        assert (side.T @ side - torch.eye(1088)).abs().max() <= bound


BUDGET = farss.Budget(shallow=1, R=8, r_avg=6, r_min=1, r_max=12)


@cache
def scored_by_reference(kind):
    """The names of some layers, their factors, and what FARSS finds of them, in fp64."""
    cpu, _ = on_both(MODELS[kind](), "cpu", torch.float32)
    batch, names = tiny_batch(ROWS), M.linear_names(cpu, SQUARE_TALL_FLAT)
    return (names, farss.kfac_factors(cpu, [batch], names),
            farss.measure(cpu, [batch], names, BUDGET))


@pytest.mark.parametrize("form, first", [(farss, False), (fast, False), (fast, True)],
                         ids=["plain", "fast", "fast, summed first"])
@pytest.mark.parametrize("kind", [pytest.param("two-to-one heads", marks=rehearsed), "wide"])
@within(2e-4, 0.3)  # 1.4e-5, 0.077
def test_scores(monkeypatch, device, kind, dtype, bound, form, first):
    """Importance, all scores together, and of each candidate what the factors give it; among near
    equals the choice is free, and costs little."""
    names, factors, expected = scored_by_reference(kind)
    monkeypatch.setattr(start, "sums_first", lambda budget, name, *_: (
        first and not budget.is_shallow(name)))
    _, gpu = on_both(MODELS[kind](), device, dtype)
    for name, x in form.measure(gpu, [there(tiny_batch(ROWS), gpu)], names, BUDGET).items():
        if BUDGET.is_shallow(name):
            assert x.importance == pytest.approx(expected[name].importance, rel=bound)
        assert distance(x.s, expected[name].s) <= bound
        own = farss.direction_scores(x.S, *farss.lam_gam(x.U.double(), x.Vh.double(),
                                                         *factors[name]))
        assert ((x.s[x.index] - own) / own).abs().max() <= bound + 2e-3  # 3e-4 where σ is least
        best = expected[name].s[expected[name].index].sum().item()
        assert own.sum().item() == pytest.approx(best, rel=max(0.15, bound))


def taken_from_wide(device, dtype, method):
    """(W - P, P, A0) in fp64 by layer, P what the method's start takes out, and the examples behind
    it in batches."""
    cpu, gpu = on_both(wide(), device, dtype)
    draw = torch.Generator().manual_seed(5)
    examples = [data.Example(torch.randint(256, (n,), generator=draw).tolist(), n // 2)
                for n in (140, 40, 20, 90)]
    s = S.Settings(device=device, method=method, form="fast", rank=8, alpha=4.0,
                   calibration_examples=4, targets=",".join(SQUARE_TALL_FLAT))
    found = {}
    for name, taken in train.initialise(gpu, s, examples)[0].items():
        A0, B0 = (x.cpu().double() for x in taken)
        P = s.scaling * (B0 @ A0)
        found[name] = cpu.get_parameter(f"{name}.weight") - P, P, A0
    return found, train.calibration_batches(replace(s, device="cpu"), examples)


@within(1e-5, 1e-5)  # 9e-7 in both
@pytest.mark.parametrize("method, part", [("pissa", slice(8)), ("kasa", slice(-8, None))])
def test_wide_splits(device, method, part, dtype, bound):
    """W on a space of its own, of the largest or the smallest directions; in bf16, too, since W is
    the same."""
    for rest, P, _ in taken_from_wide(device, dtype, method)[0].values():
        W = rest + P
        apart = min((P @ rest.T).norm(), (P.T @ rest).norm())  # as exact as W's smaller side is
        assert apart <= bound * P.norm() * W.norm()
        gram = W.T @ W if len(W) >= W.shape[1] else W @ W.T
        sigma = torch.linalg.eigvalsh(gram).flip(0).sqrt()
        assert distance(P.norm(), sigma[part].norm()) <= bound


@within(1e-9, 1e-5)  # 1.2e-11, 5.5e-7
def test_wide_lora_null(device, dtype, bound):
    """W N Nᵀ where no input goes: fewer tokens than the layer is wide leave room for that."""
    found, batches = taken_from_wide(device, dtype, "lora-null")
    cpu, _ = on_both(wide(), "cpu", dtype)
    for block in covariances(cpu, batches, list(found), train.run_body):
        for name, covariance in block.items():
            rest, P, A0 = found[name]
            N = torch.linalg.qr(A0.T)[0]
            assert distance(P, (rest + P) @ N @ N.T) <= 1e-5
            assert (N.T @ covariance @ N).trace() <= bound * covariance.trace()


# -------------------------------------------------------------------------------- the whole path

SMALL = ["--model", "m", "--data", "d/train.jsonl", "--rank", "6", "--r-avg", "3", "--r-max", "5",
         "--dropout", "0", "--calibration-examples", "8", "--batch-size", "4", "--lr", "1e-3",
         "--steps", "6"]
SMALLER = ["--checkpointing", "--targets", ",".join(SQUARE_TALL_FLAT)]


def write_uneven_data(folder):
    """Eight rows of such lengths that training leaves padding out."""
    file = write_data(folder) / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()[:8]]
    file.write_text("".join(json.dumps(row | {"question": row["question"] + " and" * 11 * i}) + "\n"
                            for i, row in enumerate(rows)))


def train_stopped_and_resumed(argv, run):
    """Stopped in the third of its steps."""
    inner, count = train.train_step, [0]

    def counted(*args):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", counted)
        with pytest.raises(SystemExit):
            train.main([*argv, "--out", run])
    train.main(["--resume", run])


def losses_of(run, device):
    """Of all steps, and of the answers when the finished run is evaluated."""
    asked = {"gsm8k": "d/test.jsonl", "nq_open": "d/nq.jsonl", "webqs": "d/webqs.json"}
    E.main([run, "--device", device, "--max-new-tokens", "4", "--benchmarks", ",".join(asked),
            "--data", *(f"{name}={file}" for name, file in asked.items())])
    found = C.read_json(f"{run}/results.json")["benchmarks"]
    assert found.keys() == asked.keys()
    steps = [json.loads(line)["loss"] for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [*steps, found["gsm8k"]["answer_loss"], found["nq_open"]["known_loss"],
            found["webqs"]["known_loss"]]


@within(1e-4, 0.05)  # 6e-7, with decompositions in fp64, and 0.013
@pytest.mark.parametrize("kind, method", [
    *(pytest.param("two-to-one heads", method, marks=rehearsed) if method == "farss" else
      ("two-to-one heads", method) for method in METHODS),
    *(("wide", method) for method in ("farss", "pissa", "lora-null", "kasa"))])
def test_train_resume_evaluate(tmp_path, monkeypatch, device, kind, method, dtype, bound):
    """A run that is stopped in the middle and resumed has the losses of an undisturbed one on the
    CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "plotting", lambda: None)  # they take longer than all else
    write_checkpoint("m", model=MODELS[kind]())
    argv = [*SMALL, "--method", method]
    if kind == "wide":
        write_uneven_data("d")
        argv += SMALLER
    else:
        write_data("d")
    train.main([*argv, "--device", "cpu", "--out", "cpu"])
    train_stopped_and_resumed(
        [*argv, "--device", device, "--dtype", str(dtype).removeprefix("torch.")], "gpu")
    if (kind, method) == ("wide", "lora-null"):
        bound = 0.05  # more directions without any input than it takes: which, rounding decides
    assert losses_of("gpu", device) == pytest.approx(losses_of("cpu", "cpu"), rel=bound)
