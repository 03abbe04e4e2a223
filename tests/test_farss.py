"""farss.py on tiny models: the factors against two oracles, then the method from end to end."""

import gc
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvlinops import KFACLinearOperator
from tiny import GEMMA2, MISTRAL, retained, tiny_batch, tiny_llama
from torch import nn

import farss
import model as M

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-11)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [(5, 6), (3, 9), (7, 2), (4, 7)]  # prompt and response tokens: 43 in 48 places


def llama64(**settings):
    return tiny_llama(dtype=torch.float64, **(dict(num_hidden_layers=2) | settings))


def rows_of(data, rows):
    return {key: value[rows] for key, value in data.items()}


def same_factors(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        close(mine[name][0], theirs[name][0], msg=lambda m, n=name: f"Σ_h of {n}: {m}")
        close(mine[name][1], theirs[name][1], msg=lambda m, n=name: f"Σ_δ of {n}: {m}")


# ------------------------------------------------------------------------------- factors: oracles


def by_retain_grad(model, data, names):
    """{name: (Σ_h, Σ_δ)} the plain way: sequence by sequence, cut to its real tokens, so that no
    padding exists; h and δ of every token kept. Also the share of the first tokens in Tr Σ_h."""
    texts = [{"input_ids": ids[mask.bool()][None], "labels": labels[mask.bool()][None]}
             for ids, labels, mask in zip(*(data[k] for k in ("input_ids", "labels",
                                                              "attention_mask")), strict=True)]
    factors, share = {}, {}
    for name, (h, delta) in retained(model, texts, names).items():
        H, D = torch.cat(h), torch.cat(delta)
        close(D.T @ H, model.get_submodule(name).weight.grad)  # Σ_t δ hᵀ is the weight's gradient
        factors[name] = (torch.einsum("ti,tj->ij", H, H) / len(H),
                         torch.einsum("ti,tj->ij", D, D) / len(D))
        share[name] = (sum(x[0].pow(2).sum() for x in h) / H.pow(2).sum()).item()
    model.zero_grad(set_to_none=True)
    return factors, share


@pytest.mark.parametrize("setting", [{}, dict(attention_bias=True, mlp_bias=True),
                                     dict(tie_word_embeddings=True), MISTRAL, GEMMA2],
                         ids=["plain", "biases", "tied", "mistral", "gemma2"])
def test_factors_equal_an_explicit_loop_over_unpadded_sequences(setting):
    model, data = llama64(**setting), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    expected, share = by_retain_grad(llama64(**setting), data, names)
    same_factors(farss.kfac_factors(model, [data], names), expected)
    with farss.kfac_hooks(model, names) as sums:
        farss.collect(sums, model, [rows_of(data, [0, 2]), rows_of(data, [1, 3])])
        assert sums.tokens == 43
        assert sums.first_token_share() == pytest.approx(share)


class TwoLinear(nn.Module):
    """Two linear layers; what the second one sees mixes all earlier tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 5)
        self.fc1, self.fc2 = nn.Linear(5, 4, bias=False), nn.Linear(4, 6, bias=False)
        self.double()

    def forward(self, input_ids):
        x = self.fc1(self.embed(input_ids)).tanh().cumsum(1)
        return self.fc2(x).transpose(1, 2)  # (b, classes, t), as cross_entropy wants it

    def loss(self, input_ids, labels, attention_mask=None):
        return F.cross_entropy(self(input_ids), labels, reduction="sum"), labels.numel()


def test_factors_equal_curvlinops():
    """Every position carries loss, since curvlinops assumes that; in two batches of unlike size."""
    model, draw = TwoLinear(), torch.Generator().manual_seed(1)
    X, Y = (torch.randint(high, (6, 5), generator=draw) for high in (9, 6))
    pairs = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    oracle = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), [model.fc1.weight, model.fc2.weight], pairs,
        fisher_type="empirical", kfac_approx="expand", check_deterministic=False)
    oracle.compute_kronecker_factors()
    expected = {name: (oracle._input_covariances[name], oracle._gradient_covariances[name])
                for name in ("fc1", "fc2")}
    batches = [dict(input_ids=x, labels=y, attention_mask=torch.ones_like(x)) for x, y in pairs]
    same_factors(farss.kfac_factors(model, batches, ["fc1", "fc2"]), expected)


# ---------------------------------------------------------------------------- factors: invariances


def padded_to(data, length, pad=0):
    """The same sequences with padding up to `length`; every padding id becomes `pad`."""
    more = length - data["input_ids"].shape[1]
    fill = {"input_ids": pad, "labels": M.IGNORE, "attention_mask": 0}
    out = {key: F.pad(data[key], (0, more), value=value) for key, value in fill.items()}
    out["input_ids"] = out["input_ids"].where(out["attention_mask"].bool(), pad)
    return out


def trimmed(data, row):
    """One sequence without any padding."""
    real = data["attention_mask"][row].bool()
    return {key: value[[row]][:, real] for key, value in data.items()}


@pytest.mark.parametrize("batches", [
    lambda d: [rows_of(d, [i]) for i in range(4)],
    lambda d: [rows_of(d, [0]), rows_of(d, [1, 2, 3])],
    lambda d: [rows_of(d, [3, 1, 0, 2])],
    lambda d: [rows_of(d, [2, 3]), rows_of(d, [1, 0])],
    lambda d: [trimmed(d, i) for i in range(4)],
    lambda d: [padded_to(d, 20)],
    lambda d: [padded_to(d, 12, pad=257)],
    lambda d: [padded_to(rows_of(d, [0, 1]), 30, pad=13), padded_to(rows_of(d, [2, 3]), 12)],
], ids=["one by one", "uneven", "reordered", "both", "trimmed", "padding", "pad id", "all"])
def test_factors_do_not_depend_on_batches_order_or_padding(batches):
    model, data = llama64(), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    same_factors(farss.kfac_factors(model, batches(data), names),
                 farss.kfac_factors(model, [data], names))


def test_padding_is_known_by_the_mask_not_by_its_id():
    """EOS ends the text, may stand inside it, and is the pad id as well: the real ones count."""
    model, data, eos = llama64(), tiny_batch(ROWS), 257
    for i, (prompt, response) in enumerate(ROWS):
        data["input_ids"][i, [1, prompt + response - 1]] = eos
        data["labels"][i, prompt + response - 1] = eos
    names = M.linear_names(model, ["q_proj", "down_proj"])
    expected, _ = by_retain_grad(llama64(), data, names)
    same_factors(farss.kfac_factors(model, [padded_to(data, 15, pad=eos)], names), expected)


def test_layers_with_one_input_share_one_sigma_h():
    model, data = llama64(), tiny_batch(ROWS)
    factors = farss.kfac_factors(model, [data], M.linear_names(model, SEVEN))
    groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
              ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    owners = []
    for block in range(2):
        for group in groups:
            held = {id(factors[f"model.layers.{block}.{leaf}"][0]) for leaf in group}
            assert len(held) == 1
            owners += held
    assert len(set(owners)) == 8  # nothing else is shared
    assert len({id(delta) for _, delta in factors.values()}) == 14


def test_any_subset_in_any_order_gives_the_same_factors():
    model, data = llama64(), tiny_batch(ROWS)
    every = farss.kfac_factors(model, [data], M.linear_names(model, SEVEN))
    names = [f"model.layers.{n}" for n in ("1.mlp.up_proj", "1.self_attn.v_proj",
                                           "0.mlp.down_proj", "0.mlp.up_proj")]
    same_factors(farss.kfac_factors(model, [data], names), {n: every[n] for n in names})


@pytest.mark.parametrize("dtype, held", [(torch.bfloat16, torch.float32),
                                         (torch.float32, torch.float32),
                                         (torch.float64, torch.float64)])
def test_factors_are_summed_in_fp32_at_least(dtype, held):
    model, data = tiny_llama(dtype=dtype, num_hidden_layers=1), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    many = farss.kfac_factors(model, [data] * 20, names)  # a bf16 sum would have stopped growing
    once = farss.kfac_factors(model, [data], names)
    for name in names:
        for mine, theirs in zip(many[name], once[name], strict=True):
            assert mine.dtype == held
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.norm().item())


def test_gradient_checkpointing_does_not_count_twice():
    model, data = llama64(), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    expected = farss.kfac_factors(model, [data], names)
    model.model.gradient_checkpointing = True
    same_factors(farss.kfac_factors(model.train(), [data], names), expected)


# -------------------------------------------------------------------- factors: what is left behind


def state(model):
    """Everything that kfac_hooks promises to put back, and that no gradient was left."""
    hooks = [n for n, m in model.named_modules()
             if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    return (hooks, [p.requires_grad for p in model.parameters()],
            [n for n, p in model.named_parameters() if p.grad is not None],
            [m.training for m in model.modules()])


@pytest.mark.parametrize("training", [False, True])
def test_hooks_requires_grad_and_train_mode_are_restored(training):
    model, data = tiny_llama(num_hidden_layers=2).train(training), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before = state(model)
    weights = [p.clone() for p in model.parameters()]
    with farss.kfac_hooks(model, names) as sums:
        assert state(model)[0] == names and not any(state(model)[1] + state(model)[3])
        farss.collect(sums, model, [data])
        assert not state(model)[2]  # the backward pass computed no weight gradient
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), farss.kfac_hooks(model, names) as sums:
        sums.start(data["attention_mask"])
        model.loss(**data)
        raise KeyboardInterrupt
    assert state(model) == before
    with pytest.raises(AttributeError, match="no_proj"):
        farss.kfac_factors(model, [data], [names[0], "model.layers.0.mlp.no_proj"])
    assert state(model) == before
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        equal(parameter, weight)


def test_mixed_train_modes_are_restored():
    model = tiny_llama(num_hidden_layers=2).train()
    model.model.layers[0].eval()  # a frozen block, say
    before = state(model)
    farss.kfac_factors(model, [tiny_batch(ROWS)], M.linear_names(model, ["q_proj"]))
    assert state(model) == before


def test_no_graph_is_kept_below_the_first_named_layer():
    model, seen = tiny_llama(num_hidden_layers=3), []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    farss.kfac_factors(model, [tiny_batch(ROWS)], ["model.layers.1.mlp.up_proj"])
    assert seen == [False, True, True]


def empty_batch():
    return tiny_batch([(0, 0), (0, 0)], length=4)


@pytest.mark.parametrize("batches", [[], [empty_batch()]], ids=["none", "all padding"])
def test_no_calibration_token_is_an_error(batches):
    model = tiny_llama(num_hidden_layers=1)

    def blind(model, data):  # a loss that would not mind; Llama.loss refuses such a batch itself
        return model(data["input_ids"]).sum()

    with pytest.raises(ValueError, match="no calibration token"):
        farss.kfac_factors(model, batches, ["model.layers.0.mlp.up_proj"], blind)


def test_sampled_loss_is_deterministic_under_a_generator():
    model, data = llama64(), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    untouched = torch.get_rng_state()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return farss.kfac_factors(model, [data], names, farss.sampled_loss(generator))

    first, again, other = draw(0), draw(0), draw(1)
    equal(torch.get_rng_state(), untouched)
    labelled = farss.kfac_factors(model, [data], names)
    for name in names:
        equal(first[name], again[name])
        close(first[name][0], labelled[name][0])  # h does not depend on labels, δ does
        for different in (other, labelled):
            assert (first[name][1] - different[name][1]).norm() > 0.01 * first[name][1].norm()


# ------------------------------------------------------------------------------ names and grouping


def test_block_index():
    for name, block in [("model.layers.3.mlp.up_proj", 3), ("layers.0.mlp.up_proj", 0),
                        ("model.layers.12.self_attn.q_proj", 12),
                        ("roberta.encoder.layer.3.output.dense", 3)]:
        assert farss.block_index(name) == block
    for name in ("lm_head", "model.embed_tokens", "model.players.3.up_proj", "layers.up_proj.3"):
        with pytest.raises(ValueError, match=name):
            farss.block_index(name)


# ------------------------------------------------------------------- the sweep through the blocks


def by_sweep(model, batches, names, **options):
    """All that the sweep yields, in one dict each."""
    factors, share = {}, {}
    for some, part in farss.sweep(model, batches, names, **options):
        factors |= some
        share |= part
    return factors, share


def two_batches():
    """Unlike in number and length, one of them with more padding than it needs."""
    data = tiny_batch(ROWS)
    return [padded_to(rows_of(data, [0]), 13), rows_of(data, [1, 2, 3])]


@pytest.mark.parametrize("targets", [SEVEN, SEVEN[:4], ["down_proj"]],
                         ids=["seven", "attention", "down"])
@pytest.mark.parametrize("setting", [{}, dict(attention_bias=True, mlp_bias=True),
                                     dict(tie_word_embeddings=True),
                                     dict(num_attention_heads=3, num_key_value_heads=1,
                                          hidden_size=24), MISTRAL, GEMMA2],
                         ids=["plain", "biases", "tied", "three heads", "mistral", "gemma2"])
def test_sweep_gives_the_factors_of_the_whole_model(setting, targets):
    model = llama64(num_hidden_layers=3, **setting)
    names = M.linear_names(model, targets)
    factors, share = by_sweep(model, two_batches(), names)
    expected = farss.kfac_factors(model, two_batches(), names)
    assert factors.keys() == expected.keys()
    for name in names:
        for mine, theirs in zip(factors[name], expected[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
    with farss.kfac_hooks(model, names) as sums:
        farss.collect(sums, model, two_batches())
        assert share == pytest.approx(sums.first_token_share())


@pytest.mark.parametrize("way", ["own pass", "W X", "summed first"])
@pytest.mark.parametrize("setting", [{}, dict(attention_bias=True), MISTRAL, GEMMA2],
                         ids=["plain", "biases", "mistral", "gemma2"])
def test_sweep_along_directions_gives_the_factors_seen_from_there(setting, way, monkeypatch):
    """F and B against Σ_h, Σ_δ and W multiplied out; of every second layer, so that q, k, v and
    gate, up have one of each kind between them, and by turns F and B in stripes or their
    diagonals; summed first, they are whole, and in the basis of W's smaller side."""
    monkeypatch.setattr(farss, "STRIPE", 10)
    model = llama64(num_hidden_layers=3, intermediate_size=12, **setting)  # gate lies, down stands
    names = M.linear_names(model, SEVEN)
    weights = {n: model.get_submodule(n).weight.detach() for n in names}
    chosen = {n: farss.Directions.of(weights[n]).X for n in names[::2]}
    asked = []

    def along(block):
        asked.extend(block)
        return {name: farss.look_along(
            WithDtype(weights[name], torch.bfloat16) if way == "W X" else weights[name],
            chosen[name], squares(name), way == "summed first") for name in block if name in chosen}

    def squares(name):
        return list(chosen).index(name) % 2 == 1

    found, share = by_sweep(model, two_batches(), names, along=along)
    factors, expected_share = by_sweep(model, two_batches(), names)
    assert sorted(asked) == sorted(names) and share == pytest.approx(expected_share)
    for name in names:
        expected = Sigma_h, Sigma_delta = factors[name]
        if name in chosen:
            W, X = weights[name], chosen[name]
            m, n = W.shape
            if way == "summed first":
                X = torch.eye(len(X), dtype=X.dtype)
            across = W @ X if m >= n else W.T @ X
            expected = ((X.T @ Sigma_h @ X, across.T @ Sigma_delta @ across) if m >= n else
                        (across.T @ Sigma_h @ across, X.T @ Sigma_delta @ X))
            if way != "summed first":
                expected = [x.diagonal() if squares(name) else torch.cat(
                    [x[i:j, :j].flatten() for i, j in farss.stripes(len(x))]) for x in expected]
        for mine, theirs in zip(found[name], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)


def test_layers_that_read_the_same_share_what_is_summed_first():
    """q, k and v one sum, as in kfac_factors; of down, that lies, W h is its own."""
    model = llama64(num_key_value_heads=4)
    names = [n for n in M.linear_names(model, SEVEN) if farss.block_index(n) == 1]
    along = {n: farss.look_along(model.get_submodule(n).weight, torch.zeros(0), True, summed=True)
             for n in names}
    with farss.kfac_hooks(model, names, along) as sums:
        farss.collect(sums, model, two_batches())
        assert [n.rpartition(".")[2] for n in sums.forward] == [
            "q_proj", "o_proj", "gate_proj", "down_proj"]
        assert len(sums.backward) == len(sums.factors()) == 7


@pytest.mark.parametrize("k, tokens, cheaper", [
    (4096, 10_922, False), (4096, 10_923, True), (2048, 8192, False), (2048, 8193, True),
    (1024, 10**9, False)])
def test_tokens_are_summed_first_where_that_takes_fewer_products(k, tokens, cheaper):
    """10,922 2/3 = 4096³ / (4096² - 2560 · 4096); up to a width of 1024 there is one stripe."""
    name = "model.layers.1.mlp.up_proj"
    for end in farss.ENDS:
        deep, shallow = (farss.Budget(blocks, 128, 4, 4, 4, end) for blocks in (1, 2))
        assert farss.sums_first(deep, name, k, tokens) is (cheaper and end != "low")
        assert not farss.sums_first(shallow, name, k, tokens)


def test_tokens_of_all_processes_decide_what_is_summed_first(monkeypatch):
    seen = []
    monkeypatch.setattr(farss, "sums_first", lambda *args: seen.append(args[3]))
    model = llama64(num_hidden_layers=1)
    farss.measure(model, two_batches(), M.linear_names(model, SEVEN), farss.Budget(0, 2, 1, 1, 1),
                  reduce=lambda x: 3 * x)
    real = sum(int(batch["attention_mask"].sum()) for batch in two_batches())
    assert set(seen) == {3 * real}


def test_products_of_bf16_are_as_short_as_they_may_be(monkeypatch):
    """The setting while they run, that after, and what comes out beside fp64; where the CPU has no
    units for bf16 the setting changes nothing."""
    inner, seen, setting = farss.add_to_stripes, [], torch.get_float32_matmul_precision
    monkeypatch.setattr(farss, "add_to_stripes",
                        lambda *args: (seen.append(setting()), inner(*args)))
    before = setting()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        rows, sums = torch.randn(300, 70).to(dtype), {}
        farss.add_outer(sums, "x", rows)
        assert sums["x"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(sums["x"].double(), rows.double().T @ rows.double(), rtol=1e-5,
                                   atol=1e-4)
    assert seen == ["medium", "highest", "highest"] and setting() == before == "highest"
    monkeypatch.setattr(farss, "add_to_stripes", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        farss.add_outer({}, "x", torch.ones(1, 1, dtype=torch.bfloat16))
    assert setting() == before


class WithDtype(NamedTuple):
    """An fp64 weight that says it is bf16, so that look_along's other way can be exact."""

    W: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self):
        return self.W.shape

    def float(self):
        return self.W


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small, stripe", [(1, farss.STRIPE), (farss.SMALL, 20)],
                         ids=["one side", "both sides, in stripes"])
@pytest.mark.parametrize("first", [False, True], ids=["by token", "summed first"])
def test_measure_is_eq8_and_13_to_15_of_the_factors(monkeypatch, dtype, small, stripe, first):
    """Importance, scores and the candidates' U Σ Vᵀ against measure_layer on kfac_factors."""
    model = llama64(num_hidden_layers=3).to(dtype)
    names, batches = M.linear_names(model, SEVEN), two_batches()
    budget = farss.Budget(2, 3, 2, 1, 4)
    factors = farss.kfac_factors(model, batches, names)
    plain = {n: farss.measure_layer(n, model.get_submodule(n).weight.detach(), *factors[n], budget,
                                    0.0) for n in names}
    monkeypatch.setattr(farss, "SMALL", small)
    monkeypatch.setattr(farss, "STRIPE", stripe)
    monkeypatch.setattr(farss, "sums_first", lambda budget, name, *_: first and
                        not budget.is_shallow(name))
    tolerance = 1e-8 if dtype == torch.float64 else 2e-3
    if first and dtype == torch.bfloat16:  # the rounding of the model's own W h and Wᵀ δ
        tolerance = 5e-2
    for name, mine in farss.measure(model, batches, names, budget).items():
        theirs = plain[name]
        assert mine.S.dtype == (dtype if dtype == torch.float64 else torch.float32)
        top = theirs.s.max().item()  # scores of one layer go over many decades
        torch.testing.assert_close(mine.s, theirs.s, rtol=tolerance, atol=1e-6 * tolerance * top)
        if budget.is_shallow(name):
            assert mine.importance == pytest.approx(theirs.importance, rel=tolerance)
        else:
            assert mine.importance is None
        torch.testing.assert_close(mine.U * mine.S @ mine.Vh, theirs.U * theirs.S @ theirs.Vh,
                                   rtol=tolerance, atol=1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("width", [1, 4, 5, 12, 13])
def test_a_symmetric_sum_in_stripes_is_the_whole_sum(monkeypatch, width):
    monkeypatch.setattr(farss, "STRIPE", 4)
    rows, sums = torch.randn(2, 7, width, dtype=torch.float64), {}
    for part in rows:
        farss.add_outer(sums, "x", part)
    farss.mirror(sums["x"])
    close(sums["x"], torch.einsum("bti,btj->ij", rows, rows))


@pytest.mark.parametrize("width", [1, 4, 5, 12, 13])
def test_kept_stripes_give_the_trace_and_the_diagonals(monkeypatch, width):
    monkeypatch.setattr(farss, "STRIPE", 4)
    rows, sums, squares = torch.randn(2, 2, 7, width, dtype=torch.float64), {}, {}
    for name, parts in zip("FB", rows, strict=True):
        for part in parts:
            farss.add_moment(sums, name, part, squares=False)
            farss.add_moment(squares, name, part.clone(), squares=True)
    whole = torch.einsum("kbti,kbtj->kij", rows, rows)
    assert {len(x) for x in sums.values()} == {farss.size_of_stripes(width)}
    trace, F, B = farss.trace_and_diagonals(sums["F"], sums["B"], width)
    assert trace == pytest.approx((whole[0] @ whole[1]).trace().item(), rel=1e-12)
    for found, name, total in zip((F, B), "FB", whole, strict=True):
        close(found, total.diagonal())
        close(squares[name], total.diagonal())


def test_wide_layers_give_the_same_factors_in_stripes(monkeypatch):
    model = llama64()
    names = M.linear_names(model, SEVEN)
    expected = farss.kfac_factors(model, two_batches(), names)
    monkeypatch.setattr(farss, "STRIPE", 10)
    same_factors(farss.kfac_factors(model, two_batches(), names), expected)


@pytest.mark.parametrize("blocks", [[0], [1], [2], [0, 2]])
def test_sweep_over_some_blocks_only(blocks):
    model = llama64(num_hidden_layers=3)
    names = [n for n in M.linear_names(model, SEVEN) if farss.block_index(n) in blocks]
    same_factors(by_sweep(model, two_batches(), names)[0],
                 farss.kfac_factors(model, two_batches(), names))


def test_sweep_takes_other_losses_and_another_place_for_the_inputs():
    model = llama64()
    names = M.linear_names(model, SEVEN)

    def drawn():
        return farss.sampled_loss(torch.Generator().manual_seed(3))

    expected = farss.kfac_factors(model, two_batches(), names, drawn())
    same_factors(by_sweep(model, two_batches(), names, loss=drawn(), keep_on="cpu")[0], expected)


def test_kept_inputs_and_gradients_go_where_they_are_told(monkeypatch):
    """One move for what goes into each block, and one for each gradient handed down."""
    model, moved, move = tiny_llama(num_hidden_layers=3), [], torch.Tensor.to

    def watched(self, *args, **kwargs):
        moved.extend([self.shape] if args == ("cpu",) else [])
        return move(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    names = M.linear_names(model, SEVEN)
    by_sweep(model, two_batches(), names)
    assert not moved
    by_sweep(model, two_batches(), names, keep_on="cpu")
    assert len(moved) == 2 * 3 + 2 * 2 and {s[-1] for s in moved} == {32}


def test_a_second_look_at_the_factors_changes_nothing():
    model, data = llama64(), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    with farss.kfac_hooks(model, names) as sums:
        farss.collect(sums, model, [data])
        first = {n: [f.clone() for f in pair] for n, pair in sums.factors().items()}
        same_factors(sums.factors(), first)


def test_a_name_beyond_the_last_block_is_an_error():
    with pytest.raises(ValueError, match=r"layers\.7\..*has 4 blocks"):
        list(farss.sweep(tiny_llama(), two_batches(), ["model.layers.7.mlp.up_proj"]))


def test_sweep_runs_every_block_but_the_last_twice_forward_and_all_once_backward():
    model, counts = tiny_llama(num_hidden_layers=5), {}
    for i, block in enumerate(model.blocks):
        counts[i] = [0, 0]

        def forward(module, args, output, i=i):
            counts[i][0] += 1
            if output.requires_grad:
                output.register_hook(lambda _: counts[i].__setitem__(1, counts[i][1] + 1))

        block.register_forward_hook(forward)
    batches = [*two_batches(), *two_batches()]
    by_sweep(model, batches, M.linear_names(model, SEVEN))
    assert counts == {i: [(1 if i == 4 else 2) * len(batches), len(batches)] for i in range(5)}


def living(size):
    """How many tensors of at least `size` numbers are alive, counted by their storage."""
    gc.collect()  # what was made before gc.freeze() is not looked at
    return len({t.untyped_storage().data_ptr() for t in gc.get_objects()
                if issubclass(type(t), torch.Tensor) and t.numel() >= size})


def test_nothing_of_a_block_survives_its_turn():
    """A turn begins with the kept inputs of the blocks to come, one gradient a batch, no moment and
    the block's own U and V; within it there are in a shallow block F and B of its layers, in a deep
    one nothing of that size, and the inputs that are used up are gone."""
    blocks, batches = 6, two_batches() * 3
    model = tiny_llama(num_hidden_layers=blocks, intermediate_size=33)
    size = 16 * 16  # k and v have the smallest moments
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(living(size)))
    gc.freeze()
    farss.measure(model, batches, M.linear_names(model, SEVEN), farss.Budget(1, 2, 1, 1, 2))
    gc.unfreeze()
    turns = [seen[k : k + 6] for k in range(6 * (blocks - 1), len(seen), 6)]
    for below, turn in zip(range(blocks - 1, -1, -1), turns, strict=True):
        gradients = 6 if below < blocks - 1 else 0
        assert turn[0] == 6 * (below + 1) + gradients + 14
        held = 14 + (14 if below < 1 else 0)  # U and V of seven layers, F and B
        assert turn[-1] <= 6 * below + 6 + held + 4


@pytest.mark.parametrize("at", [1, 7, 12, 20, 30])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_anywhere_leaves_the_model_as_it_was(at, error):
    model, count = tiny_llama(num_hidden_layers=3).train(), [0]
    names = M.linear_names(model, SEVEN)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)

    def strike(*_):
        count[0] += 1
        if count[0] == at:
            raise error

    before = state(model)
    handles = [model.get_submodule(n).register_forward_pre_hook(strike) for n in names[::2]]
    budget = farss.Budget(**SETTINGS)
    with pytest.raises(error):
        farss.measure(model, two_batches(), names, budget)
    for handle in handles:
        handle.remove()
    assert state(model) == before
    after = farss.measure(model, two_batches(), names, budget)
    for name, x in farss.measure(tiny_llama(num_hidden_layers=3), two_batches(), names,
                                 budget).items():
        equal(after[name].S, x.S)


def test_the_sweep_leaves_the_model_as_it_was_between_two_blocks():
    model = tiny_llama(num_hidden_layers=3).train()
    before, seen = state(model), 0
    for _ in farss.sweep(model, two_batches(), M.linear_names(model, SEVEN)):
        assert state(model) == before
        seen += 1
    assert seen == 3


def test_progress_is_called_for_the_batches_and_the_blocks():
    model, calls = tiny_llama(num_hidden_layers=3), []

    def progress(items, desc):
        calls.append((desc, len(items)))
        return items

    farss.measure(model, two_batches(), M.linear_names(model, SEVEN), farss.Budget(**SETTINGS),
                  progress=progress)
    assert calls == [("forward", 2), ("K-FAC by block", 3)]


# --------------------------------------------------------------------------------- the whole method

SETTINGS = dict(shallow=1, R=12, r_avg=6, r_min=2, r_max=10)


def initialise(model, batches, names, scaling=1.0, loss=farss.summed_loss, **ranks):
    """Both steps: measure every layer, then decide ranks and build adapters."""
    budget = farss.Budget(**ranks)
    return farss.build_adapters(farss.measure(model, batches, names, budget, loss), budget,
                                scaling)


def written_out(model, data, names, shallow, R, r_avg, r_min, r_max):
    """{name: (rank, Σ σ u vᵀ over its directions, I)} in numpy, from the factors of the loop."""
    factors, _ = by_retain_grad(model, data, names)
    numbers = {n: [x.detach().numpy() for x in (model.get_submodule(n).weight, *factors[n])]
               for n in names}
    I = {n: np.trace(D @ W @ H @ W.T) / W.size for n, (W, H, D) in numbers.items()}  # noqa: E741
    inverse = {n: 1 / I[n] for n in names if int(n.split(".")[2]) < shallow}
    out = {}
    for name, (W, H, D) in numbers.items():
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        s = [S[i] ** 2 * (Vt[i] @ H @ Vt[i]) * (U[:, i] @ D @ U[:, i]) for i in range(len(S))]
        falling = sorted(range(len(S)), key=lambda i: -s[i])
        if name in inverse:
            share = inverse[name] / sum(inverse.values())
            r = int(np.clip(np.rint(r_avg * len(inverse) * share), r_min, r_max))
            picked = falling[::-1][:r]
        else:
            r, picked = R, falling[:R]
        out[name] = (min(r, len(S)), sum(S[i] * np.outer(U[:, i], Vt[i]) for i in picked), I[name])
    return out


@pytest.mark.parametrize("scaling", [1.0, 2.0])
@pytest.mark.parametrize("change", [
    {}, dict(shallow=0), dict(shallow=2), dict(r_min=1, r_avg=10, r_max=14),
    dict(R=8, r_min=8, r_avg=8, r_max=8),  # all ranks equal: depth alone decides which end
    dict(R=40, r_min=20, r_avg=20, r_max=40),  # above min(m, n) = 16 of k_proj, and 32 of the rest
], ids=["as is", "all deep", "all shallow", "wide", "equal ranks", "capped"])
def test_initialise_equals_the_paper_written_out(change, scaling):
    model, data, options = llama64(), tiny_batch(ROWS), SETTINGS | change
    names = M.linear_names(model, SEVEN)
    layers = initialise(model, [data], names, scaling=scaling, **options)
    expected = written_out(llama64(), data, names, **options)
    assert list(layers) == names
    for name, layer in layers.items():
        rank, product, importance = expected[name]
        assert layer.rank == rank == layer.A.shape[0] == layer.B.shape[1]
        close(scaling * layer.B @ layer.A, torch.from_numpy(product))
        close(layer.B.T @ layer.B, layer.A @ layer.A.T)  # √σ on either side
        assert layer.importance == (pytest.approx(importance) if layer.shallow else None)
        assert layer.shallow == (farss.block_index(name) < options["shallow"])
        assert (layer.r_raw is None) == (not layer.shallow)
    raw = [layer.r_raw for layer in layers.values() if layer.shallow]
    assert sum(raw) == pytest.approx(options["r_avg"] * len(raw))


def test_shallow_and_deep_take_opposite_ends():
    """The same rank 16 of 32 everywhere: a block moved from deep to shallow gets the other half."""
    model, data = llama64(), tiny_batch(ROWS)
    names = M.linear_names(model, ["q_proj", "up_proj", "down_proj"])
    same = dict(R=16, r_avg=16, r_min=16, r_max=16)
    deep, shallow = (initialise(model, [data], names, shallow=k, **same) for k in (0, 2))
    for name in names:
        halves = [layers[name].B @ layers[name].A for layers in (deep, shallow)]
        close(sum(halves), model.get_submodule(name).weight.detach())
        close(halves[0].T @ halves[1], torch.zeros_like(halves[0].T @ halves[1]))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("fails", [1, 2])  # of W itself, or of its lowest directions
def test_where_eigh_does_not_converge_an_svd_stands_in_and_a_warning_says_so(
        monkeypatch, shape, fails):
    monkeypatch.setattr(farss, "SMALL", 8)
    calls, eigh = [], torch.linalg.eigh

    def stuck(gram):
        calls.append(gram)
        if len(calls) == fails:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return eigh(gram)

    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    W = (U * torch.logspace(0, -4, 40, dtype=W.dtype)) @ Vh
    monkeypatch.setattr(torch.linalg, "eigh", stuck)
    with pytest.warns(UserWarning, match=r"^eigh did not converge .* \d+ x \d+ matrix: its SVD"):
        U, S, Vh = farss.svd(W)
    assert len(calls) == fails  # after the fallback nothing is left to decompose
    close(U * S @ Vh, W)
    for vectors in (U.T, Vh):
        close(vectors @ vectors.T, torch.eye(40, dtype=W.dtype))


def test_ranks_at_most_the_smaller_side():
    model = llama64()
    names = M.linear_names(model, SEVEN)
    layers = initialise(model, [tiny_batch(ROWS)], names, shallow=1, R=1000, r_avg=100,
                        r_min=100, r_max=100)
    for name, layer in layers.items():
        W = model.get_submodule(name).weight
        assert layer.rank == min(W.shape)
        close(layer.B @ layer.A, W.detach())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initialise_leaves_the_model_as_it_was(dtype, training):
    model = tiny_llama(num_hidden_layers=2, dtype=dtype).train(training)
    before = [p.clone() for p in model.parameters()], state(model)
    layers = initialise(model, [tiny_batch(ROWS)], M.linear_names(model, SEVEN), **SETTINGS)
    for parameter, weight in zip(model.parameters(), before[0], strict=True):
        equal(parameter, weight)
    assert state(model) == before[1]
    for layer in layers.values():
        assert layer.A.dtype == layer.B.dtype == torch.float32 and not layer.A.requires_grad
        assert layer.A.device.type == "cpu"


def attached(dtype, residual, scaling=2.0):
    """(logits before, logits after, adapted model, how much rounding W_res lost)."""
    model, data = tiny_llama(num_hidden_layers=2, dtype=dtype), tiny_batch(ROWS)
    with torch.no_grad():
        before = model(data["input_ids"])
        names = M.linear_names(model, SEVEN)
        layers = initialise(model, [data], names, scaling=scaling, **SETTINGS)
        lost = M.attach(model, {n: (x.A, x.B) for n, x in layers.items()}, scaling,
                        residual=residual)
        return before, model(data["input_ids"]), model, lost


@pytest.mark.parametrize("residual", ["split", "exact"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_attached_adapters_leave_the_logits(dtype, bound, residual):
    before, after, _, _ = attached(dtype, residual)
    if residual == "exact":
        bound = 0  # B A x - B0 A0 x is the same sum twice
    assert (after - before).abs().max() <= bound * before.abs().max()


def test_attached_adapters_in_bf16():
    """W_res is rounded to bf16, by half a unit in its last place at most (2⁻⁸ of an entry). To
    the logits that does no more than bf16 itself does to those of the same weights in fp32."""
    before, after, model, lost = attached(torch.bfloat16, "split")
    original = tiny_llama(num_hidden_layers=2, dtype=torch.bfloat16)
    for name, layer in M.adapted_layers(model).items():
        W = original.get_submodule(name).weight.float()
        error = layer.merged_weight() - W
        assert (error.abs() <= 2.0**-8 * layer.weight.abs().float() + 1e-6).all()
        assert lost[name] == pytest.approx((error.norm() / (2 * layer.B @ layer.A).norm()).item(),
                                           rel=1e-3)
    with torch.no_grad():
        exact = original.float()(tiny_batch(ROWS)["input_ids"])
    assert (after - exact).norm() <= 2 * (before - exact).norm()
    assert (after.float() - before.float()).norm() <= 2 * (before - exact).norm()


def test_exact_residual_changes_no_bit_in_bf16():
    before, after, model, lost = attached(torch.bfloat16, "exact")
    equal(after, before)
    assert set(lost.values()) == {0.0} and len(lost) == len(M.adapted_layers(model)) == 14


def test_order_of_the_names_does_not_matter():
    model, data = llama64(), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    plain = initialise(model, [data], names, **SETTINGS)
    for name, layer in initialise(model, [data], names[::-1], **SETTINGS).items():
        close(layer.B @ layer.A, plain[name].B @ plain[name].A)
        assert layer.rank == plain[name].rank


def test_initialise_with_the_sampled_fisher():
    model, data = llama64(), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    first, again, plain = (initialise(model, [data], names, **SETTINGS, **options)
                           for options in (*(dict(loss=farss.sampled_loss(
                               torch.Generator().manual_seed(5))) for _ in range(2)), {}))
    for name in names:
        equal(first[name].A, again[name].A)
    assert any(first[n].importance != plain[n].importance for n in names)


@pytest.mark.parametrize("change", [dict(r_avg=11), dict(r_min=7), dict(r_min=0),
                                    dict(r_avg=float("nan"))])
def test_impossible_ranks_are_refused_before_any_work(change):
    with pytest.raises(ValueError, match="r_avg"):
        farss.Budget(**(SETTINGS | change))


@pytest.mark.parametrize("R", [0, -1])
def test_impossible_deep_rank_is_refused(R):
    with pytest.raises(ValueError, match="R"):
        farss.Budget(**(SETTINGS | dict(R=R, shallow=0)))


def test_initialise_refuses_what_has_no_depth_and_no_data():
    model = tiny_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="lm_head"):
        initialise(model, [tiny_batch(ROWS)], ["lm_head"], **SETTINGS)
    with pytest.raises(ValueError, match="no calibration token"):
        initialise(model, [], M.linear_names(model, SEVEN), **SETTINGS)
    M.attach(model, {"model.layers.0.mlp.up_proj": (torch.zeros(1, 32), torch.zeros(80, 1))})
    with pytest.raises(ValueError, match=r"up_proj.*has an adapter"):  # W_res is not W
        initialise(model, [tiny_batch(ROWS)], M.linear_names(model, SEVEN), **SETTINGS)


@pytest.mark.parametrize("shallow", [
    0, 1])
def test_factors_that_are_not_finite_are_refused(shallow):
    """A weight that overflowed, in a shallow as in a deep layer."""
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    before = state(model)
    with pytest.raises(ValueError, match="layers"):
        initialise(model, [tiny_batch(ROWS)], M.linear_names(model, ["q_proj"]),
                   **(SETTINGS | dict(shallow=shallow)))
    assert state(model) == before


# ------------------------------------------------------------------------------------- LoRALinear


def lora(residual, bias=True, scaling=1.5, seed=0):
    """A layer at its start, W_res + scaling B A = W, in fp64; and W, bias."""
    torch.manual_seed(seed)
    W, A, B, b = (torch.randn(*shape).double() for shape in ((6, 5), (2, 5), (6, 2), (6,)))
    weight = W if residual == "exact" else W - scaling * B @ A
    exact = (A, B) if residual == "exact" else None
    return M.LoRALinear(weight, A, B, scaling, bias=b if bias else None, exact=exact), W, b * bias


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", ["split", "exact"])
def test_merged_weight_acts_as_the_layer(residual, bias):
    layer, W, b = lora(residual, bias)
    x = torch.randn(3, 4, 5).double()
    close(layer(x), x @ W.T + b)
    for parameter in (layer.A, layer.B):
        parameter += torch.randn_like(parameter)
    close(layer(x), x @ layer.merged_weight().T + b)
    assert (layer.merged_weight() - W).norm() > 1


@pytest.mark.parametrize("steps", [1, 5])
def test_split_and_exact_train_alike(steps):
    x, target = torch.randn(8, 5).double(), torch.randn(8, 6).double()
    functions = []
    for residual in ("split", "exact"):
        layer, W, _ = lora(residual)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        assert len(optimizer.param_groups[0]["params"]) == 2  # A and B alone
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(x) - target).pow(2).sum().backward()
            optimizer.step()
        functions.append(layer(x).detach())
        assert (layer.merged_weight() - W).norm() > 0.1
    close(*functions)
