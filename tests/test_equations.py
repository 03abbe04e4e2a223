"""The paper's equations, one by one, on matrices small enough to form everything densely.

Each test computes the equation's right-hand side some other way (autograd, a Kronecker product
written out, finite differences, enumeration, by hand) and asks farss.py for the left. All fp64.
vec() is column-major throughout, as Eq. 21's vec(δ hᵀ) = h ⊗ δ requires.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian, jacobian

import farss
import model as M

torch.set_num_threads(1)  # tiny matrices: two threads cost more than they give

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
SHAPES = [(3, 5), (5, 3), (4, 4), (1, 4), (4, 1), (1, 1)]
shapes = pytest.mark.parametrize("m, n", SHAPES)
token_counts = pytest.mark.parametrize("T", [1, 2, 40])  # 1 and 2: rank-deficient Σ


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed + 100 * shape[0]))


def layer(m, n, T, seed=0):
    """W (m, n), tokens H (T, n) and D (T, m), and their factors Σ_h, Σ_δ."""
    W, H, D = random(m, n, seed=seed), random(T, n, seed=seed + 1), random(T, m, seed=seed + 2)
    H = H * torch.linspace(0.2, 2, n, dtype=torch.float64)  # unlike the identity
    D = D * torch.linspace(3, 0.5, m, dtype=torch.float64)
    return W, H, D, sum(torch.outer(h, h) for h in H) / T, sum(torch.outer(d, d) for d in D) / T


def vec(X):
    """Columns below one another."""
    return torch.from_numpy(X.detach().numpy().ravel(order="F").copy())


def dense_form(X, Sigma_h, Sigma_delta):
    """vec(X)ᵀ (Σ_h ⊗ Σ_δ) vec(X) with the (mn, mn) matrix written out by numpy."""
    return (vec(X) @ torch.from_numpy(np.kron(Sigma_h, Sigma_delta)) @ vec(X)).item()


class TokenNet(nn.Module):
    """Every token by itself, so that a gradient per token has a meaning: y = W h, tanh, softmax.

    The label of a token is its own label (nothing is shifted); M.IGNORE carries no loss.
    """

    def __init__(self, m=3, n=4, classes=5, vocab=6):
        super().__init__()
        self.table = nn.Parameter(random(vocab, n, seed=7))
        self.fc = nn.Linear(n, m, bias=False, dtype=torch.float64)
        self.lm_head = nn.Linear(m, classes, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.fc.weight.copy_(random(m, n, seed=8) / 2)
            self.lm_head.weight.copy_(2 * random(classes, m, seed=9))

    def labelled(self, input_ids, labels, attention_mask=None):
        keep = labels != M.IGNORE
        return self.fc(self.table[input_ids]).tanh()[keep], labels[keep]

    def loss(self, input_ids, labels, attention_mask=None):
        hidden, target = self.labelled(input_ids, labels)
        return self.nll(hidden, target), len(target)

    def nll(self, hidden, target):
        return F.cross_entropy(self.lm_head(hidden), target, reduction="sum")

    def draw(self, hidden, generator):
        return torch.multinomial(self.lm_head(hidden).softmax(-1), 1, generator=generator)[:, 0]


def batch(ids, labels):
    ids, labels = torch.tensor(ids), torch.tensor(labels)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def token_by_token(net, data):
    """(h, y, δ, G) of every token of the batch, by autograd."""
    out = []
    tokens = zip(data["input_ids"].flatten(), data["labels"].flatten(), strict=True)
    for token, label in tokens:
        h = net.table[token].detach()
        y = F.linear(h, net.fc.weight)
        loss = F.cross_entropy(net.lm_head(y.tanh()), label)
        delta, G = torch.autograd.grad(loss, (y, net.fc.weight))
        out.append((h, y.detach(), delta, G))
    return out


ONE = ([[2]], [[3]])
MANY = ([[0, 1, 2], [3, 4, 5]], [[0, 4, 1], [2, 2, 3]])


def factors(net, data, **options):
    return farss.kfac_factors(net, [data], ["fc"], **options)["fc"]


# ---------------------------------------------------------------------- section 2: the adapter


@pytest.mark.parametrize("scaling", [1.0, 2.56])
def test_eq01_adapted_weight(scaling):
    """W' = W + BA; the scaling α/r is the usual convention and 1 in the paper's equation."""
    W, A, B, x = random(4, 5), random(2, 5, seed=1), random(4, 2, seed=2), random(7, 5, seed=3)
    adapted = M.LoRALinear(W, A, B, scaling)
    W_new = W + scaling * sum(torch.outer(B[:, i], A[i]) for i in range(2))
    close(adapted(x).detach(), torch.stack([W_new @ h for h in x]))
    close(adapted.merged_weight(), W_new)
    assert torch.linalg.matrix_rank(adapted.merged_weight() - W) == 2
    close(M.LoRALinear(W, A, 0 * B, scaling)(x).detach(), x @ W.T)  # LoRA's start: ΔW = 0


# ------------------------------------------------- section 3.2 and A.1.1: Fisher and its factors


def test_eq02_factors_are_means_over_tokens():
    net, data = TokenNet(), batch(*MANY)
    Sigma_h, Sigma_delta = factors(net, data)
    seen = token_by_token(net, data)
    close(Sigma_h, sum(torch.outer(h, h) for h, _, _, _ in seen) / 6)
    close(Sigma_delta, sum(torch.outer(d, d) for _, _, d, _ in seen) / 6)


def test_eq02_is_exact_for_one_token_and_not_for_several():
    net = TokenNet()
    for data, exact in ((batch(*ONE), True), (batch(*MANY), False)):
        g = [vec(G) for _, _, _, G in token_by_token(net, data)]
        fisher = sum(torch.outer(x, x) for x in g) / len(g)
        assert torch.allclose(torch.kron(*factors(net, data)), fisher, rtol=1e-9) == exact


def kl_after(W, H, dW):
    """Mean over tokens of KL(p_W || p_W+dW): how the expected loss under own labels rises."""
    log_p, log_q = (H @ W.T).log_softmax(1), (H @ (W + dW).T).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().item()


def own_delta(W, h):
    """E over the model's own labels of δ δᵀ for softmax regression, by enumeration."""
    p = (W @ h).softmax(0)
    delta = p - torch.eye(len(p), dtype=torch.float64)  # row: the gradient for that label
    return sum(p[y] * torch.outer(delta[y], delta[y]) for y in range(len(p)))


@pytest.mark.parametrize("seed", range(3))
def test_eq03_loss_rises_by_half_the_quadratic_form(seed):
    """One token, labels from the model: K-FAC is exact, and so only ΔW³ is neglected."""
    W, h, dW = random(3, 4, seed=seed), random(4, seed=seed + 5), random(3, 4, seed=seed + 9)
    half = [farss.quadratic_form(e * dW, torch.outer(h, h), own_delta(W, h)).item() / 2
            for e in (1e-3, 5e-4)]
    rise = [kl_after(W, h[None], e * dW) for e in (1e-3, 5e-4)]
    assert rise == pytest.approx(half, rel=1e-2)
    # ... third order: halving ΔW divides what is missing by 8
    assert (rise[0] - half[0]) / (rise[1] - half[1]) == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("label", range(3))
def test_eq04_second_order_taylor_once_the_linear_term_is_taken_off(label):
    """Eq. 4 drops the linear term, which is not small. Softmax regression: the Hessian does not
    depend on the label, so H = h hᵀ ⊗ (diag p - p pᵀ) and quadratic_form must give it."""
    W, h, dW = random(3, 4, seed=3), random(4, seed=4), random(3, 4, seed=5)

    def loss(W):
        return F.cross_entropy(W @ h, torch.tensor(label))

    p = (W @ h).softmax(0)
    G = torch.autograd.functional.vjp(loss, W)[1]
    left = []
    for e in (1e-2, 5e-3):
        rise = (loss(W + e * dW) - loss(W)).item()
        linear = e * (G * dW).sum().item()
        second = farss.quadratic_form(e * dW, torch.outer(h, h), p.diag() - torch.outer(p, p))
        assert rise - linear == pytest.approx(second.item() / 2, rel=0.05)
        assert abs(rise) > 5 * second.item()  # what Eq. 4 as printed would have to explain
        left.append(rise - linear - second.item() / 2)
    assert left[0] / left[1] == pytest.approx(8, rel=0.1)
    H = hessian(lambda w: loss(w.view(4, 3).T), vec(W))  # vec⁻¹, column-major
    close(vec(dW) @ H @ vec(dW),
          farss.quadratic_form(dW, torch.outer(h, h), p.diag() - torch.outer(p, p)))


def three_fishers(net, ids):
    """(E[g gᵀ] under own labels, GGN, expected Hessian) of mean loss in vec(W), and E[δ δᵀ]."""
    m, n = net.fc.weight.shape
    w, C = vec(net.fc.weight), net.lm_head.weight.detach()
    own = ggn = hess = second_moment = 0
    for h in net.table.detach()[ids]:

        def logits(w, h=h):
            return C @ (w.view(n, m).T @ h).tanh()

        y = (net.fc.weight.detach() @ h).requires_grad_()
        p, J = logits(w).softmax(0), jacobian(logits, w)
        ggn = ggn + J.T @ (p.diag() - torch.outer(p, p)) @ J
        for label in range(len(p)):
            def nll(w, label=label, logits=logits):
                return -logits(w).log_softmax(0)[label]

            g = jacobian(nll, w)
            own = own + p[label] * torch.outer(g, g)
            hess = hess + p[label] * hessian(nll, w)
            delta, = torch.autograd.grad(F.cross_entropy(C @ y.tanh(), torch.tensor(label)), y)
            second_moment = second_moment + p[label] * torch.outer(delta, delta)
    return [x / len(ids) for x in (own, ggn, hess, second_moment)]


def test_eq05_own_label_fisher_is_ggn_and_expected_hessian():
    net = TokenNet(m=2, n=3, classes=3)
    own, ggn, hess, _ = three_fishers(net, [0, 3, 5])
    close(own, ggn)
    close(own, hess)
    # and for one token it is the Kronecker product that Eq. 3 uses
    own, _, _, second_moment = three_fishers(net, [3])
    h = net.table.detach()[3]
    close(own, torch.kron(torch.outer(h, h), second_moment))


def test_eq05_sampled_loss_estimates_it_and_the_empirical_fisher_does_not():
    """One token, repeated N times: Σ_δ must come within 5 standard errors of the enumeration."""
    net, N, token, label = TokenNet(m=2, n=3, classes=3), 20_000, 3, 1
    own, _, _, exact = three_fishers(net, [token])
    data = batch([[token] * N], [[label] * N])
    generator = torch.Generator().manual_seed(0)
    Sigma_h, sampled = factors(net, data, loss=farss.sampled_loss(generator))
    Sigma_h_empirical, empirical = factors(net, data)
    # δδᵀ for each label, to know how far N draws may fall from their mean
    p = net.lm_head((net.fc(net.table[token])).tanh()).softmax(0).detach()
    moments = torch.stack([factors(net, batch([[token]], [[y]]))[1] for y in range(3)])
    variance = (p[:, None, None] * moments**2).sum(0) - exact**2
    error = (variance / N).sqrt()
    assert ((sampled - exact).abs() <= 5 * error).all()
    assert ((empirical - exact).abs() > 20 * error).all()  # the data's label is not a draw
    close(Sigma_h, Sigma_h_empirical)  # inputs do not depend on labels
    assert (torch.kron(Sigma_h, sampled) - own).norm() < 0.05 * own.norm()


def test_eq05_sampled_labels_fall_where_the_data_have_labels():
    net, data = TokenNet(), batch(*MANY)
    data["labels"][0] = M.IGNORE
    second = {k: v[1:] for k, v in data.items()}
    both = factors(net, data, loss=farss.sampled_loss(torch.Generator().manual_seed(3)))
    alone = factors(net, second, loss=farss.sampled_loss(torch.Generator().manual_seed(3)))
    close(2 * both[1], alone[1])  # twice the tokens, the same gradients


@shapes
@token_counts
def test_eq06_trace_form_is_the_dense_kronecker_form(m, n, T):
    _, _, _, Sigma_h, Sigma_delta = layer(m, n, T)
    for seed in range(3):
        dW = random(m, n, seed=seed + 20)
        form = farss.quadratic_form(dW, Sigma_h, Sigma_delta).item()
        assert form == pytest.approx(dense_form(dW, Sigma_h, Sigma_delta), rel=1e-9, abs=1e-14)


def test_eq06_vec_order_matters():
    """With rows instead of columns below one another the identity fails, even if W is square."""
    _, _, _, Sigma_h, Sigma_delta = layer(4, 4, 40)
    dW = random(4, 4, seed=20)
    form = farss.quadratic_form(dW, Sigma_h, Sigma_delta).item()
    rows = dW.reshape(-1)
    assert abs(form - (rows @ torch.kron(Sigma_h, Sigma_delta) @ rows).item()) > 0.01 * form
    assert form == pytest.approx((rows @ torch.kron(Sigma_delta, Sigma_h) @ rows).item())


def test_eq07_scaling_the_weight_by_one_plus_s():
    """ΔL = ½ s² Tr(Σ_δ W Σ_h Wᵀ) = ½ s² m n I, here as the measured rise of the loss."""
    W, h, s = random(3, 4), random(4, seed=4), 1e-3
    Sigma_h, Sigma_delta = torch.outer(h, h), own_delta(W, h)
    trace = 12 * farss.fisher_importance(W, Sigma_h, Sigma_delta)
    assert kl_after(W, h[None], s * W) == pytest.approx(s**2 / 2 * trace, rel=1e-2)
    assert dense_form(s * W, Sigma_h, Sigma_delta) == pytest.approx(s**2 * trace)


@shapes
@token_counts
def test_eq08_importance_in_three_other_ways(m, n, T):
    W, H, _, Sigma_h, Sigma_delta = layer(m, n, T)
    importance = farss.fisher_importance(W, Sigma_h, Sigma_delta)
    assert importance == pytest.approx(dense_form(W, Sigma_h, Sigma_delta) / (m * n), rel=1e-9)
    # from the layer's outputs alone: Tr(Σ_δ Σ_y) / mn with y = W h
    Sigma_y = sum(torch.outer(W @ h, W @ h) for h in H) / T
    assert importance == pytest.approx((Sigma_delta @ Sigma_y).trace().item() / (m * n), rel=1e-9)
    # from the singular directions (Eq. 15), with the couplings that Eq. 32 ignores
    U, S, Vh = farss.svd(W)
    couplings = (S[:, None] * S) * (Vh @ Sigma_h @ Vh.T) * (U.T @ Sigma_delta @ U)
    assert importance == pytest.approx(couplings.sum().item() / (m * n), rel=1e-9)
    close(farss.direction_scores(S, *farss.lam_gam(U, Vh, Sigma_h, Sigma_delta)),
          couplings.diagonal())


def test_eq08_takes_a_weight_of_any_dtype():
    W, _, _, Sigma_h, Sigma_delta = layer(3, 5, 40)
    W = W.bfloat16()
    assert farss.fisher_importance(W, Sigma_h, Sigma_delta) == pytest.approx(
        dense_form(W.double(), Sigma_h, Sigma_delta) / 15, rel=1e-9)


# -------------------------------------------------------- section 3.2: inverse rank allocation


def test_eq09_inverse_importance_by_hand():
    # I / ΣI = 1/4, 1/4, 1/2, so ω = 4, 4, 2; whatever the unit of I
    for unit in (1e-30, 1.0, 1e6):
        omega = farss.inverse_importance({"a": 1 * unit, "b": 1 * unit, "c": 2 * unit})
        assert omega == pytest.approx({"a": 4, "b": 4, "c": 2}, rel=1e-9)


def test_eq09_epsilon_keeps_an_importance_of_zero_finite():
    omega = farss.inverse_importance({"a": 0.0, "b": 3.0, "c": 1.0})
    assert omega == pytest.approx({"a": 1 / farss.EPSILON, "b": 4 / 3, "c": 4})
    zero = farss.inverse_importance({"a": 0.0, "b": 0.0})  # ΣI = 0
    assert zero["a"] == zero["b"] and 0 < zero["a"] < math.inf
    assert farss.inverse_importance({}) == {}


@pytest.mark.parametrize("bad", [-1e-9, -1.0, math.nan, math.inf])
def test_eq09_refuses_an_impossible_importance_and_names_the_layer(bad):
    with pytest.raises(ValueError, match="up_proj"):
        farss.inverse_importance({"q_proj": 1.0, "up_proj": bad})
    with pytest.raises(ValueError, match="up_proj"):
        farss.allocate_ranks({"q_proj": 1.0, "up_proj": bad}, 4, 1, 8)


def test_eq10_budget():
    assert farss.rank_budget(50, 7 * 7) == 2450  # seven linears in each of Llama-2's seven blocks
    assert farss.rank_budget(2.5, 3) == 7.5


def test_eq11_raw_ranks_by_hand():
    # r_avg = 7: R_total = 21; I = 1, 2, 4 gives ω in the ratio 4 : 2 : 1 of 7 parts
    assert farss.raw_ranks({"a": 1.0, "b": 2.0, "c": 4.0}, 7) == pytest.approx(
        {"a": 12, "b": 6, "c": 3}, rel=1e-9)
    # ΣI = 0: nothing to tell the layers apart, everyone gets r_avg
    assert farss.raw_ranks({"a": 0.0, "b": 0.0}, 7) == pytest.approx({"a": 7, "b": 7})
    assert farss.raw_ranks({}, 7) == {}


importances = st.lists(st.floats(-30, 6).map(lambda x: 10.0**x), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(importances, st.integers(1, 64))
def test_eq11_spends_the_whole_budget_in_inverse_proportion(values, r_avg):
    importance = dict(enumerate(values))
    r_raw = farss.raw_ranks(importance, r_avg)
    assert sum(r_raw.values()) == pytest.approx(r_avg * len(values))
    epsilon = 1e-12 * sum(values)  # Eq. 9 literally, ε in units of ΣI
    constant = r_raw[0] * (values[0] + epsilon)
    for name, value in importance.items():
        assert r_raw[name] * (value + epsilon) == pytest.approx(constant)


@pytest.mark.parametrize("r_raw, r", [
    (2.5, 2), (3.5, 4), (2.51, 3), (2.49, 2),  # halves to even
    (0.4, 1), (0.5, 1), (-3.0, 1), (1.4, 1),  # r_min = 1
    (63.5, 64), (64.5, 64), (65.2, 64), (1e12, 64),  # r_max = 64
])
def test_eq12_round_then_clip(r_raw, r):
    assert farss.clip_rank(r_raw, 1, 64) == r
    assert isinstance(farss.clip_rank(r_raw, 1, 64), int)


def test_eq12_clipping_loses_and_gains_budget():
    importance = {"a": 1.0, "b": 2.0, "c": 4.0}  # raw 12, 6, 3 of 21
    assert farss.allocate_ranks(importance, 7, 1, 64) == {"a": 12, "b": 6, "c": 3}
    assert farss.allocate_ranks(importance, 7, 1, 10) == {"a": 10, "b": 6, "c": 3}  # 19 of 21
    assert farss.allocate_ranks(importance, 7, 5, 64) == {"a": 12, "b": 6, "c": 5}  # 23 of 21
    # r_avg = 8: raw 13.71, 6.86, 3.43 of 24; rounding alone keeps 14 + 7 + 3
    assert farss.allocate_ranks(importance, 8, 1, 64) == {"a": 14, "b": 7, "c": 3}
    assert farss.allocate_ranks({"a": 1.0}, 50, 1, 64) == {"a": 50}
    assert farss.allocate_ranks({}, 50, 1, 64) == {}


@pytest.mark.parametrize("c", [10.0**x for x in range(-30, 7, 4)])
def test_eq09_to_12_do_not_depend_on_the_unit_of_I(c):
    """Tiny I is the usual case: an absolute ε = 1e-12 would level all ranks there."""
    importance = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 40.0}
    scaled = {name: c * value for name, value in importance.items()}
    # ω in the ratio 40 : 20 : 10 : 1, raw 15.8, 7.9, 3.9, 0.4 of 28
    assert farss.allocate_ranks(scaled, 7, 1, 12) == {"a": 12, "b": 8, "c": 4, "d": 1}


def test_eq09_to_12_with_an_importance_of_zero():
    ranks = farss.allocate_ranks({"a": 0.0, "b": 1.0, "c": 1.0}, 4, 1, 8)
    assert ranks == {"a": 8, "b": 1, "c": 1}  # a takes the whole raw budget and is clipped
    assert farss.allocate_ranks({"a": 0.0, "b": 0.0}, 4, 1, 8) == {"a": 4, "b": 4}


@settings(max_examples=60, deadline=None)
@given(importances)
def test_eq09_to_12_never_give_more_rank_to_more_importance(values):
    ranks = farss.allocate_ranks(dict(enumerate(values)), 20, 2, 32)
    for i, a in enumerate(values):
        assert 2 <= ranks[i] <= 32
        assert all(ranks[i] >= ranks[j] for j, b in enumerate(values) if a < b)


@pytest.mark.parametrize("r_min, r_avg, r_max", [
    (1, 24, 16),  # Table 9's row as printed
    (1, 16, 12), (8, 4, 16), (0, 4, 8), (-1, 4, 8), (5, 5, 4), (1, math.nan, 8)])
def test_eq12_refuses_impossible_ranks(r_min, r_avg, r_max):
    with pytest.raises(ValueError, match="r_avg"):
        farss.allocate_ranks({"a": 1.0}, r_avg, r_min, r_max)
    with pytest.raises(ValueError, match="r_avg"):
        farss.allocate_ranks({}, r_avg, r_min, r_max)


# ------------------------------------------------ section 3.3: task-aware singular directions


@shapes
def test_eq13_singular_value_decomposition(m, n):
    W, k = random(m, n), min(m, n)
    U, S, Vh = farss.svd(W)
    assert (U.shape, S.shape, Vh.shape) == ((m, k), (k,), (k, n))
    assert U.dtype == S.dtype == Vh.dtype == torch.float64
    assert (S[:-1] >= S[1:]).all() and (S > 0).all()
    close(S**2, torch.linalg.eigvalsh(W @ W.T).flip(0)[:k])  # σ² are the Gram matrix's
    close(U.T @ U, torch.eye(k, dtype=torch.float64))
    close(Vh @ Vh.T, torch.eye(k, dtype=torch.float64))
    close(U @ S.diag() @ Vh, W)


def test_eq13_of_a_bf16_weight_is_taken_in_fp32():
    W = random(4, 6).bfloat16()
    U, S, Vh = farss.svd(W)
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    torch.testing.assert_close(U @ S.diag() @ Vh, W.float(), rtol=1e-5, atol=1e-5)


@shapes
@token_counts
def test_eq14_lambda_and_gamma_token_by_token(m, n, T):
    """λ_i is the mean of (v_iᵀ h)², γ_i that of (u_iᵀ δ)²; no Σ is needed for them."""
    W, H, D, Sigma_h, Sigma_delta = layer(m, n, T)
    U, _, Vh = farss.svd(W)
    lam, gam = farss.lam_gam(U, Vh, Sigma_h, Sigma_delta)
    close(lam, ((H @ Vh.T) ** 2).mean(0))
    close(gam, ((D @ U) ** 2).mean(0))


def test_eq14_is_never_negative():
    """One token in 24 dimensions: v_iᵀ Σ_h v_i rounds to both sides of 0 for v_i across h."""
    for seed in range(20):
        h, d = random(24, seed=seed), random(24, seed=seed + 50)
        Q = torch.linalg.qr(torch.stack([h, *random(23, 24, seed=seed)]).T)[0]  # first column ~ h
        P = torch.linalg.qr(torch.stack([d, *random(23, 24, seed=seed)]).T)[0]
        lam, gam = farss.lam_gam(P, Q.T, torch.outer(h, h), torch.outer(d, d))
        assert (lam >= 0).all() and (gam >= 0).all()
        assert lam[0] == pytest.approx((h @ h).item()) and lam[1:].max() < 1e-12 * lam[0]


def test_eq15_score_by_hand():
    # W = diag(3, 2, 1): u_i, v_i are the axes; Σ_h, Σ_δ have λ = 1, 2, 9 and γ = 1, 1, 2
    W = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).diag()
    Sigma_h = torch.tensor([[1, 0.5, 0], [0.5, 2, 0], [0, 0, 9]], dtype=torch.float64)
    Sigma_delta = torch.tensor([[1, 0, 0.3], [0, 1, 0], [0.3, 0, 2]], dtype=torch.float64)
    U, S, Vh = farss.svd(W)
    lam, gam = farss.lam_gam(U, Vh, Sigma_h, Sigma_delta)
    close(lam, torch.tensor([1.0, 2, 9], dtype=torch.float64))
    close(gam, torch.tensor([1.0, 1, 2], dtype=torch.float64))
    s = farss.direction_scores(S, lam, gam)
    close(s, torch.tensor([9.0, 8, 18], dtype=torch.float64))  # 9·1·1, 4·2·1, 1·9·2
    assert farss.direction_order(s).tolist() == [2, 0, 1]  # not the order of σ


def test_eq15_does_not_underflow_in_fp32():
    tiny = torch.tensor([2e-20, 1e-20])
    s = farss.direction_scores(tiny, tiny, tiny)  # about 1e-79, far below fp32's 1e-45
    assert (s > 0).all() and farss.direction_order(s).tolist() == [0, 1]


def test_eq15_order_falls_and_ties_follow_sigma():
    s = torch.tensor([1.0, 3, 2, 3, 0, 1, 0])
    assert farss.direction_order(s).tolist() == [1, 3, 2, 0, 5, 4, 6]
    # unseen directions, all exactly 0, and more of them than a sort handles by insertion
    assert farss.direction_order(torch.zeros(1000)).tolist() == list(range(1000))


def test_eq15_directions_no_token_has_seen_are_the_lowest():
    """One token: λ = 0 except along h, so the tie at 0 leaves the smallest σ at the bottom."""
    W = torch.tensor([5.0, 4.0, 3.0, 2.0], dtype=torch.float64).diag()
    Sigma_h = torch.zeros(4, 4, dtype=torch.float64)
    Sigma_h[2, 2] = 1  # h is the third axis
    U, S, Vh = farss.svd(W)
    s = farss.direction_scores(S, *farss.lam_gam(U, Vh, Sigma_h, torch.eye(4).double()))
    order = farss.direction_order(s)
    assert order.tolist() == [2, 0, 1, 3]
    assert farss.select_directions(order, 2, lowest=True).tolist() == [1, 3]


def test_eq16_and_17_choose_opposite_ends():
    order = torch.tensor([4, 2, 0, 1, 3])
    assert farss.select_directions(order, 2, lowest=False).tolist() == [4, 2]
    assert farss.select_directions(order, 2, lowest=True).tolist() == [1, 3]
    for r in (0, 5):
        for shallow in (False, True):
            assert farss.select_directions(order, r, shallow).tolist() == order[:r].tolist()
    # by depth, not by the size of the rank: the official r < 128 would mix these up
    assert farss.select_directions(torch.arange(300), 32, lowest=False).tolist() == [*range(32)]
    assert farss.select_directions(torch.arange(300), 200, lowest=True)[0] == 100


CASES = [(m, n, r) for m, n in SHAPES for r in {1, (min(m, n) + 1) // 2, min(m, n)}]


def chosen(m, n, r, shallow, T=40):
    W, _, _, Sigma_h, Sigma_delta = layer(m, n, T)
    U, S, Vh = farss.svd(W)
    s = farss.direction_scores(S, *farss.lam_gam(U, Vh, Sigma_h, Sigma_delta))
    index = farss.select_directions(farss.direction_order(s), r, shallow)
    return W, U, S, Vh, s, index


@pytest.mark.parametrize("shallow, equation", [(False, 16), (True, 17)])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("m, n, r", CASES)
def test_eq16_17_adapter(m, n, r, scaling, shallow, equation):
    W, U, S, Vh, s, index = chosen(m, n, r, shallow)
    A, B = farss.adapter_from_directions(U, S, Vh, index, scaling)
    assert A.shape == (r, n) and B.shape == (m, r)
    # the right end of the scores ...
    rest = [i for i in range(len(S)) if i not in index.tolist()]
    assert len(set(index.tolist())) == r
    for i in rest:
        assert (s[index] >= s[i]).all() if equation == 16 else (s[index] <= s[i]).all()
    # ... split evenly: BᵀB = AAᵀ = Σ'/scaling
    close(B.T @ B, (S[index] / scaling).diag())
    close(A @ A.T, (S[index] / scaling).diag())
    close(scaling * B @ A, sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in index))
    # the residual has nothing left in the chosen directions, and all of the others
    W_res = W - scaling * B @ A
    close(U[:, index].T @ W_res, torch.zeros(r, n, dtype=torch.float64))
    close(W_res @ Vh[index].T, torch.zeros(m, r, dtype=torch.float64))
    spectrum = torch.cat([S[rest], torch.zeros(r, dtype=torch.float64)])
    close(torch.linalg.svdvals(W_res), spectrum.sort(descending=True).values)


@shapes
def test_eq16_17_together_take_w_apart(m, n):
    """The R highest and the k - R lowest directions are all of them."""
    k = min(m, n)
    for R in range(k + 1):
        W, U, S, Vh, _, top = chosen(m, n, R, shallow=False)
        bottom = chosen(m, n, k - R, shallow=True)[-1]
        parts = (farss.adapter_from_directions(U, S, Vh, i) for i in (top, bottom))
        close(sum(B @ A for A, B in parts), W)


def test_eq17_official_code_leaves_minus_1_56_sigma_at_r_50():
    """Adapters without the division by scaling, under peft's α/r = 128/50 = 2.56."""
    W, U, S, Vh, _, index = chosen(60, 64, 50, shallow=True)
    A, B = farss.adapter_from_directions(U, S, Vh, index, scaling=1.0)
    left = U[:, index].T @ (W - 128 / 50 * B @ A) @ Vh[index].T
    close(left, (-1.56 * S[index]).diag())
    A, B = farss.adapter_from_directions(U, S, Vh, index, scaling=128 / 50)
    left = U[:, index].T @ (W - 128 / 50 * B @ A) @ Vh[index].T
    close(left, torch.zeros(50, 50, dtype=torch.float64))


# ---------------------------------------- A.1.1: the Kronecker-factored Fisher, step by step
#
# One token h with loss gradient δ: the factors are h hᵀ and δ δᵀ themselves.


def one_token():
    net, data = TokenNet(), batch(*ONE)
    return (net, *token_by_token(net, data)[0], *factors(net, data))


def test_eq18_h_is_the_input_of_the_layer():
    net, h, y, _, _, Sigma_h, _ = one_token()
    W = net.fc.weight.detach()
    close(y, W @ h)
    close(W @ Sigma_h @ W.T, torch.outer(y, y))
    close(Sigma_h, torch.outer(h, h))


def test_eq19_delta_is_the_gradient_at_the_output():
    """Here by central differences of the loss in y."""
    net, _, y, _, _, _, Sigma_delta = one_token()

    def loss(y):
        return F.cross_entropy(net.lm_head(y.tanh()), torch.tensor(ONE[1][0][0])).item()

    e = 1e-5 * torch.eye(len(y), dtype=torch.float64)
    delta = torch.tensor([(loss(y + d) - loss(y - d)) / 2e-5 for d in e], dtype=torch.float64)
    torch.testing.assert_close(Sigma_delta, torch.outer(delta, delta), rtol=1e-6, atol=1e-9)


def test_eq20_weight_gradient_is_delta_h():
    """G = δ hᵀ, so G Gᵀ = |h|² δ δᵀ and Gᵀ G = |δ|² h hᵀ, with G from autograd."""
    _, h, _, delta, G, Sigma_h, Sigma_delta = one_token()
    close(G, delta[:, None] * h)
    close(G @ G.T, Sigma_h.trace() * Sigma_delta)
    close(G.T @ G, Sigma_delta.trace() * Sigma_h)


def test_eq21_vec_of_the_gradient():
    """vec(δ hᵀ) = h ⊗ δ for columns below one another; rows would give δ ⊗ h."""
    _, h, _, delta, G, Sigma_h, Sigma_delta = one_token()
    g = vec(G)
    close(g, torch.kron(h, delta))
    close(torch.kron(Sigma_h, Sigma_delta), torch.outer(g, g))
    rows = G.reshape(-1)
    close(rows, torch.kron(delta, h))
    assert (torch.outer(rows, rows) - torch.outer(g, g)).norm() > 0.1 * (g @ g)


def each_token():
    """(vec(G) by autograd, Σ_h, Σ_δ of that token alone from farss) for the tokens of MANY."""
    net, data = TokenNet(), batch(*MANY)
    seen = token_by_token(net, data)
    ids, labels = data["input_ids"].flatten(), data["labels"].flatten()
    for (_, _, _, G), i, y in zip(seen, ids, labels, strict=True):
        yield vec(G), *factors(net, batch([[i]], [[y]]))


def test_eq22_and_23_mean_of_kronecker_products_is_the_fisher():
    tokens = list(each_token())
    fisher = sum(torch.outer(g, g) for g, _, _ in tokens) / len(tokens)  # Eq. 22
    close(sum(torch.kron(hh, dd) for _, hh, dd in tokens) / len(tokens), fisher)  # Eq. 23


def test_eq24_marginal_second_moments():
    """Of all tokens at once, against h and δ of each by autograd."""
    net, data = TokenNet(), batch(*MANY)
    seen = list(token_by_token(net, data))
    Sigma_h, Sigma_delta = factors(net, data)
    close(Sigma_h, sum(torch.outer(h, h) for h, _, _, _ in seen) / len(seen))
    close(Sigma_delta, sum(torch.outer(delta, delta) for _, _, delta, _ in seen) / len(seen))
    for Sigma in (Sigma_h, Sigma_delta):
        close(Sigma, Sigma.T)
        assert torch.linalg.eigvalsh(Sigma).min() > -1e-12


def test_eq25_is_exact_if_h_and_delta_are_independent():
    """Every h with every δ equally often: then E[hhᵀ ⊗ δδᵀ] = E[hhᵀ] ⊗ E[δδᵀ]. Not otherwise."""
    _, H, D, Sigma_h, Sigma_delta = layer(3, 4, 5)
    dW = random(3, 4, seed=30)
    form = farss.quadratic_form(dW, Sigma_h, Sigma_delta).item()
    independent = torch.stack([torch.stack([(d @ dW @ h) ** 2 for d in D]) for h in H])
    assert form == pytest.approx(independent.mean().item())
    correlated = independent.diagonal().mean().item()  # token t's h with token t's δ only
    assert abs(form - correlated) > 0.01 * form


# ----------------------------- A.1.2: from the factored Fisher to the score of one direction


def test_eq26_second_order_change_with_the_exact_fisher():
    """Several tokens, own labels: the loss rises by ½ vecᵀ F vec; K-FAC's Q is near, not equal."""
    W, H, dW = random(3, 4), random(6, 4, seed=1), 1e-3 * random(3, 4, seed=2)
    fisher = sum(torch.kron(torch.outer(h, h), own_delta(W, h)) for h in H) / 6
    exact = (vec(dW) @ fisher @ vec(dW)).item()
    assert kl_after(W, H, dW) == pytest.approx(exact / 2, rel=1e-2)
    by_token = [farss.quadratic_form(dW, torch.outer(h, h), own_delta(W, h)).item() for h in H]
    assert np.mean(by_token) == pytest.approx(exact)
    form = farss.quadratic_form(dW, H.T @ H / 6, sum(own_delta(W, h) for h in H) / 6).item()
    assert 0.01 < abs(form / exact - 1) < 1  # the price of Eq. 25


@shapes
def test_eq27_quadratic_form_by_its_definition(m, n):
    """Entry by entry: Σ over (i,j), (k,l) of ΔW_ij ΔW_kl Σ_h[j,l] Σ_δ[i,k]."""
    _, _, _, Sigma_h, Sigma_delta = layer(m, n, 40)
    dW = random(m, n, seed=21)
    by_entry = torch.einsum("ij,kl,jl,ik->", dW, dW, Sigma_h, Sigma_delta)
    close(farss.quadratic_form(dW, Sigma_h, Sigma_delta), by_entry)


@shapes
def test_eq28_trace_identity(m, n):
    """vec(X)ᵀ (C ⊗ A) vec(X) = Tr(A X C Xᵀ) for symmetric A and C, definite or not."""
    X, C, A = random(m, n, seed=3), random(n, n, seed=4), random(m, m, seed=5)
    C, A = C + C.T, A + A.T
    trace = farss.quadratic_form(X, C, A)
    close(trace, (A @ X @ C @ X.T).trace())
    assert trace.item() == pytest.approx(dense_form(X, C, A))


@shapes
@token_counts
def test_eq29_q_is_the_mean_square_of_delta_dw_h(m, n, T):
    """Q(ΔW) = mean over all pairs of tokens of (δᵀ ΔW h)²: no Σ, no trace, never negative."""
    _, H, D, Sigma_h, Sigma_delta = layer(m, n, T)
    dW = random(m, n, seed=22)
    close(farss.quadratic_form(dW, Sigma_h, Sigma_delta), ((D @ dW @ H.T) ** 2).mean())


@shapes
def test_eq30_sum_of_rank_one_terms(m, n):
    W = random(m, n)
    U, S, Vh = farss.svd(W)
    close(sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(min(m, n))), W)


def test_eq31_lambda_and_gamma_one_by_one():
    W, _, _, Sigma_h, Sigma_delta = layer(3, 5, 40)
    U, _, Vh = farss.svd(W)
    lam, gam = farss.lam_gam(U, Vh, Sigma_h, Sigma_delta)
    for i in range(3):
        assert lam[i].item() == pytest.approx((Vh[i] @ Sigma_h @ Vh[i]).item())
        assert gam[i].item() == pytest.approx((U[:, i] @ Sigma_delta @ U[:, i]).item())
    # all of γ (k = m directions span everything), only a part of λ (k < n)
    close(gam.sum(), Sigma_delta.trace())
    assert lam.sum() < Sigma_h.trace()


def rank_one(m, n, T):
    """The perturbations σ_i u_i v_iᵀ as farss builds them, with everything they come from."""
    W, _, _, Sigma_h, Sigma_delta = layer(m, n, T)
    U, S, Vh = farss.svd(W)
    pairs = [farss.adapter_from_directions(U, S, Vh, torch.tensor([i])) for i in range(len(S))]
    return [B @ A for A, B in pairs], U, S, Vh, Sigma_h, Sigma_delta


@shapes
def test_eq32_rank_one_perturbation(m, n):
    perturbations, U, S, Vh, _, _ = rank_one(m, n, 40)
    for i, dw in enumerate(perturbations):
        close(dw, S[i] * torch.outer(U[:, i], Vh[i]))
        assert torch.linalg.matrix_rank(dw) == 1
    close(sum(perturbations), random(m, n))


@shapes
@token_counts
def test_eq33_34_35_score_is_exactly_the_quadratic_form(m, n, T):
    """The paper writes ≈; given Eq. 25 nothing is neglected from Eq. 32 to Eq. 35."""
    perturbations, U, S, Vh, Sigma_h, Sigma_delta = rank_one(m, n, T)
    lam, gam = farss.lam_gam(U, Vh, Sigma_h, Sigma_delta)
    s = farss.direction_scores(S, lam, gam)
    for i, dw in enumerate(perturbations):
        uv = torch.outer(U[:, i], Vh[i])
        by_trace = S[i] ** 2 * (Sigma_delta @ uv @ Sigma_h @ uv.T).trace()
        close(farss.quadratic_form(dw, Sigma_h, Sigma_delta), by_trace)  # Eq. 33
        close(s[i], by_trace)  # Eq. 34
        assert s[i].item() == pytest.approx(dense_form(dw, Sigma_h, Sigma_delta),
                                            rel=1e-9, abs=1e-14)  # Eq. 35


# ============================================================ A.3: the scores K, T, KT (eval.py)

# Table 2a: TriviaQA, NQ-Open, WebQS, GSM8K, MATH; K, T as printed; KT as it follows from these.
# KT of LoRA, PiSSA, CorDA and FARSS (R = 153) is misprinted: 0.87, 0.80, 0.93, 0.98.
BASE = dict(triviaqa=52.51, nq_open=14.99, webqs=5.86)
FULL = dict(gsm8k=50.19, math=7.82)
TABLE_2A = {
    "LoRA": (48.11, 1.16, 7.14, 42.61, 5.72, 0.74, 0.79, 0.76),
    "PiSSA": (41.50, 2.52, 6.55, 52.78, 7.82, 0.69, 1.03, 0.83),
    "MiLoRA": (48.48, 4.18, 6.05, 39.58, 6.16, 0.74, 0.79, 0.76),
    "LoRA-Null": (49.15, 6.45, 6.35, 44.96, 7.06, 0.82, 0.90, 0.86),
    "CorDA": (44.03, 9.75, 5.61, 49.05, 7.68, 0.82, 0.98, 0.89),
    "KaSA": (51.10, 8.75, 6.99, 32.45, 4.40, 0.92, 0.60, 0.73),
    "FARSS": (49.07, 5.01, 8.37, 50.94, 8.20, 0.90, 1.03, 0.96),
    "FARSS R=153": (48.23, 4.27, 8.51, 51.63, 8.62, 0.89, 1.07, 0.97),
}


@pytest.mark.parametrize("row", TABLE_2A)
def test_eq36_37_38_give_table_2a(row):
    *knowledge, gsm8k, math_score, K, T, KT = TABLE_2A[row]
    after = dict(zip(BASE, knowledge, strict=True))
    computed_K = farss.knowledge_score(after, BASE)
    computed_T = farss.task_score(dict(gsm8k=gsm8k, math=math_score), FULL)
    assert round(computed_K, 2) == K
    assert round(computed_T, 2) == T
    assert round(farss.harmonic_mean(K, T), 2) == KT
    assert farss.harmonic_mean(computed_K, computed_T) == pytest.approx(KT, abs=0.01)


def test_eq36_by_hand():
    # FARSS: 49.07/52.51 + 5.01/14.99 + 8.37/5.86 = 0.934489 + 0.334223 + 1.428328 = 2.697040
    after = dict(webqs=8.37, nq_open=5.01, triviaqa=49.07)  # the order does not matter
    assert farss.knowledge_score(after, BASE) == pytest.approx(2.697040 / 3, abs=1e-6)
    # a mean of ratios, not the ratio of means: (0.5 + 3) / 2, not 35 / 20
    assert farss.knowledge_score(dict(a=5.0, b=30.0), dict(a=10.0, b=10.0)) == pytest.approx(1.75)
    assert farss.knowledge_score(dict(a=5.0, b=3.0), dict(a=10.0, b=1.0)) == pytest.approx(1.75)


def test_eq37_by_hand():
    # PiSSA: 52.78/50.19 = 1.051604 and 7.82/7.82 = 1
    assert farss.task_score(dict(gsm8k=52.78, math=7.82), FULL) == pytest.approx(1.025802, abs=1e-6)


def test_eq38_by_hand():
    assert farss.harmonic_mean(1.0, 0.5) == pytest.approx(2 / 3)  # 2 · 0.5 / 1.5
    assert farss.harmonic_mean(0.7, 0.7) == pytest.approx(0.7)
    assert farss.harmonic_mean(0.0, 1.0) == 0
    assert math.isnan(farss.harmonic_mean(math.nan, 1.0))


@pytest.mark.parametrize("score", [farss.knowledge_score, farss.task_score])
def test_eq36_37_undefined_and_incomparable(score):
    assert math.isnan(score(dict(a=1.0, b=1.0), dict(a=0.0, b=1.0)))
    assert score(dict(a=0.0, b=1.0), dict(a=1.0, b=1.0)) == 0.5  # only a reference of 0 is
    for mine, theirs in ((dict(a=1.0), dict(a=1.0, b=1.0)), (dict(a=1.0, b=1.0), dict(a=1.0)),
                         (dict(a=1.0), dict(b=1.0)), ({}, {})):
        with pytest.raises(ValueError):
            score(mine, theirs)
