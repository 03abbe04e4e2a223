"""farss.py on tiny models: the factors against two oracles, then the method from end to end."""

import gc
from functools import partial

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


def listen(sums, model, batches):
    """The forward and backward passes that the hooks of `kfac_hooks` listen to."""
    for batch in batches:
        sums.start(batch)
        model.loss(**batch)[0].backward()


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
    padding exists; h and δ of every token kept."""
    texts = [{"input_ids": ids[mask.bool()][None], "labels": labels[mask.bool()][None]}
             for ids, labels, mask in zip(*(data[k] for k in ("input_ids", "labels",
                                                              "attention_mask")), strict=True)]
    factors = {}
    for name, (h, delta) in retained(model, texts, names).items():
        H, D = torch.cat(h), torch.cat(delta)
        close(D.T @ H, model.get_submodule(name).weight.grad)  # Σ_t δ hᵀ is the weight's gradient
        factors[name] = (torch.einsum("ti,tj->ij", H, H) / len(H),
                         torch.einsum("ti,tj->ij", D, D) / len(D))
    model.zero_grad(set_to_none=True)
    return factors


@pytest.mark.parametrize("setting", [{}, dict(attention_bias=True, mlp_bias=True),
                                     dict(tie_word_embeddings=True), MISTRAL, GEMMA2],
                         ids=["plain", "biases", "tied", "mistral", "gemma2"])
def test_factors_equal_an_explicit_loop_over_unpadded_sequences(setting):
    model, data = llama64(**setting), tiny_batch(ROWS)
    names = M.linear_names(model, SEVEN)
    expected = by_retain_grad(llama64(**setting), data, names)
    same_factors(farss.kfac_factors(model, [data], names), expected)
    with farss.kfac_hooks(model, names) as sums:
        listen(sums, model, [rows_of(data, [0, 2]), rows_of(data, [1, 3])])
        assert set(sums.tokens.values()) == {43}


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
    expected = by_retain_grad(llama64(), data, names)
    same_factors(farss.kfac_factors(model, [padded_to(data, 15, pad=eos)], names), expected)


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
        listen(sums, model, [data])
        assert not state(model)[2]  # the backward pass computed no weight gradient
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), farss.kfac_hooks(model, names) as sums:
        sums.start(data)
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
                        ("roberta.encoder.layer.3.output.dense", 3), ("transformer.h.7.mlp.fc", 7),
                        ("model.layers.2.mlp.experts.5.up_proj", 2)]:
        assert farss.block_index(name) == block
    for name in ("lm_head", "model.embed_tokens", "model.layers3.up_proj", "layers.up_proj.3"):
        with pytest.raises(ValueError, match=name):
            farss.block_index(name)


# -------------------------------------------------------------------------------- block by block


def by_block(model, batches, names, **options):
    """All that factors_by_block yields, in one dict."""
    found = {}
    for some in farss.factors_by_block(model, batches, names, **options):
        assert not found.keys() & some.keys()
        found |= some
    return found


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
def test_block_by_block_gives_the_factors_of_the_whole_model(setting, targets):
    model = llama64(num_hidden_layers=3, **setting)
    names = M.linear_names(model, targets)
    factors = by_block(model, two_batches(), names)
    expected = farss.kfac_factors(model, two_batches(), names)
    assert factors.keys() == expected.keys()
    for name in names:
        for mine, theirs in zip(factors[name], expected[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("blocks", [[0], [1], [2], [0, 2]])
def test_some_blocks_only(blocks):
    model = llama64(num_hidden_layers=3)
    names = [n for n in M.linear_names(model, SEVEN) if farss.block_index(n) in blocks]
    same_factors(by_block(model, two_batches(), names),
                 farss.kfac_factors(model, two_batches(), names))


def test_block_by_block_takes_other_losses_and_another_place_for_the_inputs():
    model = llama64()
    names = M.linear_names(model, SEVEN)

    def drawn():
        return farss.sampled_loss(torch.Generator().manual_seed(3))

    expected = farss.kfac_factors(model, two_batches(), names, drawn())
    same_factors(by_block(model, two_batches(), names, loss=drawn(), keep_on="cpu"), expected)


def test_kept_inputs_and_gradients_go_where_they_are_told(monkeypatch):
    """One move for what goes into each block but the last, and one for each gradient."""
    model, moved, move = tiny_llama(num_hidden_layers=3), [], torch.Tensor.to

    def watched(self, *args, **kwargs):
        moved.extend([self.shape] if args == ("cpu",) else [])
        return move(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    names = M.linear_names(model, SEVEN)
    by_block(model, two_batches(), names)
    assert not moved
    by_block(model, two_batches(), names, keep_on="cpu")
    assert len(moved) == 2 * 2 + 2 * 2 and {s[-1] for s in moved} == {32}


def test_a_name_beyond_the_last_block_is_an_error():
    with pytest.raises(AttributeError, match="7"):
        farss.measure(tiny_llama(), two_batches(), ["model.layers.7.mlp.up_proj"],
                      farss.Budget(**SETTINGS))


def test_every_block_but_the_last_runs_twice_forward_and_all_once_backward():
    model, counts = tiny_llama(num_hidden_layers=5), {}
    for i, block in enumerate(model.blocks):
        counts[i] = [0, 0]

        def forward(module, args, output, i=i):
            counts[i][0] += 1
            if output.requires_grad:
                output.register_hook(lambda _: counts[i].__setitem__(1, counts[i][1] + 1))

        block.register_forward_hook(forward)
    batches = [*two_batches(), *two_batches()]
    by_block(model, batches, M.linear_names(model, SEVEN))
    assert counts == {i: [(1 if i == 4 else 2) * len(batches), len(batches)] for i in range(5)}


def living(size):
    """How many tensors of at least `size` numbers are alive, counted by their storage."""
    gc.collect()  # what was made before gc.freeze() is not looked at
    return len({t.untyped_storage().data_ptr() for t in gc.get_objects()
                if issubclass(type(t), torch.Tensor) and t.numel() >= size})


def model_after_an_error(measure, at, error):
    """A model with which `measure` has failed in its `at`-th call of a layer, found as it was."""
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
    with pytest.raises(error):
        measure(model, two_batches(), names, farss.Budget(**SETTINGS))
    for handle in handles:
        handle.remove()
    assert state(model) == before
    return model


@pytest.mark.parametrize("at", [1, 7, 12, 20, 30])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_anywhere_leaves_the_model_as_it_was(at, error):
    model, budget = model_after_an_error(farss.measure, at, error), farss.Budget(**SETTINGS)
    names = M.linear_names(model, SEVEN)
    after = farss.measure(model, two_batches(), names, budget)
    for name, x in farss.measure(tiny_llama(num_hidden_layers=3), two_batches(), names,
                                 budget).items():
        equal(after[name].S, x.S)


def test_the_model_is_as_it_was_between_two_blocks():
    model = tiny_llama(num_hidden_layers=3).train()
    before, seen = state(model), 0
    for _ in farss.factors_by_block(model, two_batches(), M.linear_names(model, SEVEN)):
        assert state(model) == before
        seen += 1
    assert seen == 3


# --------------------------------------------------------------------------------- the whole method

SETTINGS = dict(shallow=1, R=12, r_avg=6, r_min=2, r_max=10)


def initialise(model, batches, names, scaling=1.0, loss=farss.summed_loss, **ranks):
    """Both steps: measure every layer, then decide ranks and build adapters."""
    budget = farss.Budget(**ranks)
    return farss.build_adapters(farss.measure(model, batches, names, budget, loss), budget,
                                scaling)


def written_out(model, data, names, shallow, R, r_avg, r_min, r_max):
    """{name: (rank, Σ σ u vᵀ over its directions, I)} in numpy, from the factors of the loop."""
    factors = by_retain_grad(model, data, names)
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
        assert rank == layer.A.shape[0] == layer.B.shape[1] == len(layer.index)
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


def test_ranks_at_most_the_smaller_side():
    model = llama64()
    names = M.linear_names(model, SEVEN)
    layers = initialise(model, [tiny_batch(ROWS)], names, shallow=1, R=1000, r_avg=100,
                        r_min=100, r_max=100)
    for name, layer in layers.items():
        W = model.get_submodule(name).weight
        assert len(layer.A) == min(W.shape)
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
        assert layer.A.shape == plain[name].A.shape


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
