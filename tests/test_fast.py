"""fast/'s own parts: sums in stripes, decompositions by Gram matrices, moments along directions."""

import gc
from functools import partial
from typing import NamedTuple

import pytest
import torch
from test_farss import (
    ROWS,
    SETTINGS,
    listen,
    living,
    llama64,
    model_after_an_error,
    rows_of,
    two_batches,
)
from tiny import GEMMA2, MISTRAL, tiny_batch, tiny_llama

import farss
import model as M
from fast import decompositions, measure, memory, start, sums
from fast.decompositions import Directions
from fast.start import Way, moment_hooks

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-11)
SEVEN = M.DECODER_TARGETS["seven"]

# ----------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("width", [1, 4, 5, 12, 13])
def test_a_symmetric_sum_in_stripes_is_the_whole_sum(monkeypatch, width):
    monkeypatch.setattr(sums, "STRIPE", 4)
    rows, total = torch.randn(2, 7, width, dtype=torch.float64), sums.OuterSum()
    for part in rows:
        total.add(part)
    close(total.value(), torch.einsum("bti,btj->ij", rows, rows))


@pytest.mark.parametrize("width", [1, 4, 5, 12, 13])
def test_kept_stripes_give_the_trace_and_the_diagonals(monkeypatch, width):
    monkeypatch.setattr(sums, "STRIPE", 4)
    rows, kept, squares = torch.randn(2, 2, 7, width, dtype=torch.float64), {}, {}
    for name, parts in zip("FB", rows, strict=True):
        for part in parts:
            sums.add_moment(kept, name, part.clone(), squares=False)
            sums.add_moment(squares, name, part.clone(), squares=True)
    whole = torch.einsum("kbti,kbtj->kij", rows, rows)
    assert {len(x) for x in kept.values()} == {sums.size_of_stripes(width)}
    trace, F, B = sums.trace_and_diagonals(kept["F"], kept["B"], width)
    assert trace == pytest.approx((whole[0] @ whole[1]).trace().item(), rel=1e-12)
    for found, name, total in zip((F, B), "FB", whole, strict=True):
        close(found, total.diagonal())
        close(squares[name], total.diagonal())


def test_products_of_bf16_are_as_short_as_they_may_be(monkeypatch):
    """The setting while they run, that after, and what comes out beside fp64; where the CPU has no
    units for bf16 the setting changes nothing."""
    inner, seen, setting = sums.add_to_stripes, [], torch.get_float32_matmul_precision
    monkeypatch.setattr(sums, "add_to_stripes",
                        lambda *args: (seen.append(setting()), inner(*args)))
    before = setting()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        rows, total = torch.randn(300, 70).to(dtype), sums.OuterSum()
        total.add(rows)
        assert total.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(total.value().double(), rows.double().T @ rows.double(),
                                   rtol=1e-5, atol=1e-4)
    assert seen == ["medium", "highest", "highest"] and setting() == before == "highest"
    monkeypatch.setattr(sums, "add_to_stripes", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sums.OuterSum().add(torch.ones(1, 1, dtype=torch.bfloat16))
    assert setting() == before


# ------------------------------------------------------------------------------- decompositions


@pytest.mark.parametrize("m, n", [(3, 5), (5, 3), (4, 4), (1, 4), (4, 1), (1, 1)])
def test_svd_by_gram_matrices(monkeypatch, m, n):
    monkeypatch.setattr(decompositions, "SMALL", 1)
    W, k = torch.randn(m, n, dtype=torch.float64), min(m, n)
    U, S, Vh = decompositions.svd(W)
    assert (U.shape, S.shape, Vh.shape) == ((m, k), (k,), (k, n))
    close(S, torch.linalg.svdvals(W))
    close(U.T @ U, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)
    close(Vh @ Vh.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)
    close(U @ S.diag() @ Vh, W)


@pytest.mark.parametrize("m, n", [(40, 40), (40, 90), (90, 40)])
def test_svd_by_gram_matrices_is_as_accurate_at_the_bottom(monkeypatch, m, n):
    """σ down to 1e-6 σ_1 and ten of 0, in fp32, where σ² would be lost: the smaller side is
    orthonormal, and W takes each of its directions to σ, those of other directions apart."""
    monkeypatch.setattr(decompositions, "SMALL", 4)
    U, _, Vh = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    sigma = torch.logspace(0, -6, 40, dtype=torch.float64) * (torch.arange(40) < 30)
    W = (U * sigma @ Vh).float()
    U, S, Vh = decompositions.svd(W)
    X = Vh if m >= n else U.T
    torch.testing.assert_close(X @ X.T, torch.eye(40), rtol=0, atol=3e-6)
    torch.testing.assert_close(S.double(), sigma, rtol=0, atol=1e-6)
    torch.testing.assert_close(U * S @ Vh, W, rtol=0, atol=2e-6)
    for Q in (U.T @ U, Vh @ Vh.T):  # the other side, by the equation, to σ_1 / σ_i roundings
        off = (Q - torch.eye(40)).abs() * torch.minimum(S, S[:, None])
        assert off[:30, :30].max() < 1e-6 and Q.isfinite().all()


def test_svd_by_gram_matrices_of_nothing_is_nothing(monkeypatch):
    monkeypatch.setattr(decompositions, "SMALL", 1)
    U, S, Vh = decompositions.svd(torch.zeros(5, 3))
    assert not S.any() and not U.any() and torch.equal(Vh @ Vh.T, torch.eye(3))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("fails", [1, 2])  # of W itself, or of its lowest directions
def test_where_eigh_does_not_converge_an_svd_stands_in_and_a_warning_says_so(
        monkeypatch, shape, fails):
    monkeypatch.setattr(decompositions, "SMALL", 8)
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
        U, S, Vh = decompositions.svd(W)
    assert len(calls) == fails  # after the fallback nothing is left to decompose
    close(U * S @ Vh, W)
    for vectors in (U.T, Vh):
        close(vectors @ vectors.T, torch.eye(40, dtype=W.dtype))


# ------------------------------------------------------------------- moments along directions


class WithDtype(NamedTuple):
    """An fp64 weight that says it is bf16, so that Way's other way can be exact."""

    W: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self):
        return self.W.shape

    def float(self):
        return self.W


@pytest.mark.parametrize("way", ["own pass", "W X", "summed first"])
@pytest.mark.parametrize("setting", [{}, dict(attention_bias=True), MISTRAL, GEMMA2],
                         ids=["plain", "biases", "mistral", "gemma2"])
def test_moments_are_the_factors_seen_along_the_directions(setting, way, monkeypatch):
    """F and B against Σ_h, Σ_δ and W multiplied out, by turns in stripes or their diagonals;
    summed first, they are whole, and in the basis of W's smaller side."""
    monkeypatch.setattr(sums, "STRIPE", 10)
    model = llama64(num_hidden_layers=3, intermediate_size=12, **setting)  # gate lies, down stands
    names, first = M.linear_names(model, SEVEN), way == "summed first"
    weights = {n: model.get_submodule(n).weight.detach() for n in names}
    ways = {n: Way.along(WithDtype(W, torch.bfloat16) if way == "W X" else W, Directions.of(W).X,
                         i % 2 == 1, first) for i, (n, W) in enumerate(weights.items())}
    factors = farss.kfac_factors(model, two_batches(), names)
    with moment_hooks(model, ways) as moments:
        listen(moments, model, two_batches())
    moments.means(lambda x: x)
    for name, W in weights.items():
        (m, n), (Sigma_h, Sigma_delta), X = W.shape, factors[name], Directions.of(W).X
        if first:
            X = torch.eye(len(X), dtype=X.dtype)
            found = [moments.whole_forward[moments.owner[name]].value(),
                     moments.whole_backward[name].value()]
        else:
            found = [moments.forward[name], moments.backward[name]]
        across = W @ X if m >= n else W.T @ X
        expected = ((X.T @ Sigma_h @ X, across.T @ Sigma_delta @ across) if m >= n else
                    (across.T @ Sigma_h @ across, X.T @ Sigma_delta @ X))
        if not first:
            expected = [x.diagonal() if ways[name].squares else torch.cat(
                [x[i:j, :j].flatten() for i, j in sums.stripes(len(x))]) for x in expected]
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)


def test_layers_that_read_the_same_share_what_is_summed_first():
    """q, k and v one sum; of down, which lies, W h is its own."""
    model = llama64(num_key_value_heads=4)
    names = [n for n in M.linear_names(model, SEVEN) if farss.block_index(n) == 1]
    ways = {n: Way.along(model.get_submodule(n).weight, torch.zeros(0), True, True) for n in names}
    with moment_hooks(model, ways) as moments:
        listen(moments, model, two_batches())
        assert [n.rpartition(".")[2] for n in moments.whole_forward] == [
            "q_proj", "o_proj", "gate_proj", "down_proj"]
        assert len(moments.whole_backward) == len(moments.owner) == 7


@pytest.mark.parametrize("k, tokens, cheaper", [
    (4096, 10_922, False), (4096, 10_923, True), (2048, 8192, False), (2048, 8193, True),
    (1024, 10**9, False)])
def test_tokens_are_summed_first_where_that_takes_fewer_products(k, tokens, cheaper):
    """10,922 2/3 = 4096³ / (4096² - 2560 · 4096); up to a width of 1024 there is one stripe."""
    name = "model.layers.1.mlp.up_proj"
    for end in ("depth", "low", "high"):
        deep, shallow = (farss.Budget(blocks, 128, 4, 4, 4, end) for blocks in (1, 2))
        assert start.sums_first(deep, name, k, tokens) is (cheaper and end != "low")
        assert not start.sums_first(shallow, name, k, tokens)


def test_tokens_of_all_processes_decide_what_is_summed_first(monkeypatch):
    seen = []
    monkeypatch.setattr(start, "sums_first", lambda *args: seen.append(args[3]))
    model = llama64(num_hidden_layers=1)
    measure(model, two_batches(), M.linear_names(model, SEVEN), farss.Budget(0, 2, 1, 1, 1),
            reduce=lambda x: 3 * x)
    real = sum(int(batch["attention_mask"].sum()) for batch in two_batches())
    assert set(seen) == {3 * real}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small, stripe", [(1, sums.STRIPE), (decompositions.SMALL, 20)],
                         ids=["one side", "both sides, in stripes"])
@pytest.mark.parametrize("first", [False, True], ids=["by token", "summed first"])
def test_measure_is_eq8_and_13_to_15_of_the_factors(monkeypatch, dtype, small, stripe, first):
    """Importance, scores and the candidates' U Σ Vᵀ against measure_layer on kfac_factors."""
    model = llama64(num_hidden_layers=3).to(dtype)
    names, batches = M.linear_names(model, SEVEN), two_batches()
    budget = farss.Budget(2, 3, 2, 1, 4)
    factors = farss.kfac_factors(model, batches, names)
    plain = {n: farss.measure_layer(n, model.get_submodule(n).weight.detach(), *factors[n], budget)
             for n in names}
    monkeypatch.setattr(decompositions, "SMALL", small)
    monkeypatch.setattr(sums, "STRIPE", stripe)
    monkeypatch.setattr(start, "sums_first", lambda budget, name, *_: first and
                        not budget.is_shallow(name))
    tolerance = 1e-8 if dtype == torch.float64 else 2e-3
    if first and dtype == torch.bfloat16:  # the rounding of the model's own W h and Wᵀ δ
        tolerance = 5e-2
    for name, mine in measure(model, batches, names, budget).items():
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


def test_nothing_of_a_block_survives_its_turn():
    """A turn of the walk begins with the kept inputs of the blocks to come, one gradient a batch,
    no moment and the block's own U and V; in a shallow block F and B of its layers come to it."""
    blocks, batches = 6, two_batches() * 3
    model = tiny_llama(num_hidden_layers=blocks, intermediate_size=33)
    size = 16 * 16  # k and v have the smallest moments
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(living(size)))
    gc.freeze()
    measure(model, batches, M.linear_names(model, SEVEN), farss.Budget(1, 2, 1, 1, 2))
    gc.unfreeze()
    turns = [seen[k : k + 6] for k in range(6 * blocks, len(seen), 6)]
    assert len(turns) == blocks - 1
    for below, turn in zip(range(blocks - 2, -1, -1), turns, strict=True):
        assert turn[0] <= 6 * (below + 1) + 6 + 14 + 2
        held = 14 + (14 if below < 1 else 0)  # U and V of seven layers, F and B
        assert turn[-1] <= 6 * below + 6 + held + 4


@pytest.mark.parametrize("at", [1, 7, 12, 20])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_anywhere_leaves_the_model_as_it_was_here_too(at, error):
    model_after_an_error(measure, at, error)


def test_what_cannot_be_measured_is_refused():
    model = tiny_llama(num_hidden_layers=1)
    names, budget = M.linear_names(model, SEVEN), farss.Budget(**SETTINGS)
    with pytest.raises(ValueError, match="no calibration token"):
        measure(model, [], names, budget)
    with pytest.raises(ValueError, match="lm_head"):
        measure(model, [tiny_batch(ROWS)], ["lm_head"], budget)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="down_proj is not finite"):
        measure(model, [tiny_batch(ROWS)], names, budget)
    with pytest.raises(ValueError, match="a score of"):  # activations overflow behind it
        measure(model, [tiny_batch(ROWS)], ["model.layers.0.self_attn.q_proj"], budget)
    M.attach(model, {"model.layers.0.mlp.up_proj": (torch.zeros(1, 32), torch.zeros(80, 1))})
    with pytest.raises(ValueError, match=r"up_proj.*has an adapter"):
        measure(model, [rows_of(tiny_batch(ROWS), [0])], names, budget)


def test_memory_counts_what_is_held():
    """block_sums against the bytes of the moments and directions of a real block."""
    shapes = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.mlp.up_proj": (80, 32)}
    budget = farss.Budget(1, 4, 2, 1, 4)
    deep, shallow = (memory.block_sums(shapes, budget, kind, 100, 4) for kind in (False, True))
    assert deep["moments of a block"] == 0
    assert shallow["moments of a block"] == 4 * 2 * sum(sums.size_of_stripes(32) for _ in shapes)
    directions = sum(x.numel() for m, n in shapes.values()
                     for x in Directions.of(torch.randn(m, n))[1:])
    assert deep["directions of a block"] == shallow["directions of a block"] == 4 * directions
