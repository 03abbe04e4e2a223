"""methods/: every method against its formula in numpy, against peft, and the covariance."""

from functools import partial

import numpy as np
import pytest
import torch
from test_train import examples, settings
from tiny import (
    GEMMA2,
    MISTRAL,
    oracle,
    tiny_batch,
    tiny_llama,
    tiny_roberta,
    tiny_texts,
)
from torch import nn

import checkpoint as C
import data
import fast
import methods as B
import model as M
import train
from fast import sums
from methods import starts

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
near = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)  # fp32 beside fp64
# (m, n, r): wide, tall, square in full, a single number, all of the smaller side
SHAPES = [(5, 9, 2), (9, 5, 2), (6, 6, 6), (1, 1, 1), (4, 7, 4)]
SPLITS = [name for name, row in B.METHODS.items() if row.start and row.splits]
every_shape = pytest.mark.parametrize("m, n, r", SHAPES)
every_scaling = pytest.mark.parametrize("scaling", [1.0, 2.5])


def weight(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def covariance(n, tokens=None, seed=1):
    """XᵀX of so many random tokens, of which fewer than n leave it without full rank."""
    X = weight(tokens or 3 * n, n, seed) * torch.linspace(0.5, 2, n)
    return X.T @ X / len(X)


def start(method, W, r, scaling=1.0, C=None, seed=0):
    """The method's start as a run gets it, from its row of METHODS."""
    what = B.Given(scaling, torch.Generator().manual_seed(seed), C=C)
    return B.METHODS[method].start(W, r, what)


def in64(*tensors):
    return [t.double().numpy() for t in tensors]


def parts(method, m, n, r, scaling, C=None):
    """W, A, B, what is taken out, and what is left, in fp64 numpy."""
    W = weight(m, n)
    x = start(method, W, r, scaling, covariance(n) if C is None else C)
    assert x.A.shape == (r, n) and x.B.shape == (m, r)
    W, A, B_, A0, B0 = in64(W, x.A, x.B, x.A0, x.B0)
    return W, A, B_, scaling * B0 @ A0, W - scaling * B0 @ A0


def thin(W):
    return np.linalg.svd(W, full_matrices=False)


def diagonal_of(matrix, values):
    near(matrix, np.diag(values), atol=2e-4 * max(1, values.max()))


# ------------------------------------------------------------------------------ the formulas


@every_shape
@every_scaling
@pytest.mark.parametrize("method", SPLITS)
def test_what_is_taken_out_of_w_is_the_adapter_itself(method, m, n, r, scaling):
    """W_res + s B A = W, here for a covariance without full rank, and no diagonal."""
    x = start(method, weight(m, n), r, scaling, covariance(n, tokens=max(1, n // 2)))
    assert torch.equal(x.A, x.A0) and torch.equal(x.B, x.B0) and x.d is None
    assert x.A.shape == (r, n) and x.B.shape == (m, r) and x.A.isfinite().all()


@every_shape
def test_lora_is_uniform_beside_zero(m, n, r):
    x = start("lora", weight(m, n), r)
    assert x.A.shape == (r, n) and x.B.shape == (m, r) and not x.B.any()
    assert x.A.abs().max() <= n**-0.5 and x[2:] == (None, None, None)


def test_loras_a_has_the_spread_of_kaiming_and_depends_on_the_seed_alone():
    """nn.init's own kaiming_uniform with a = √5, by its extremes and spread."""
    theirs = torch.empty(64, 256)
    nn.init.kaiming_uniform_(theirs, a=5**0.5)
    mine, again, other = (start("lora", weight(64, 256), 64, seed=s).A for s in (0, 0, 1))
    assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
    assert mine.max().item() == pytest.approx(theirs.max().item(), rel=0.01)
    assert mine.min().item() == pytest.approx(-mine.max().item(), rel=0.01)
    assert torch.equal(mine, again) and not torch.equal(mine, other)


@every_shape
@every_scaling
def test_pissa_is_the_largest_directions(m, n, r, scaling):
    W, A, B_, out, left = parts("pissa", m, n, r, scaling)
    U, S, Vh = thin(W)
    near(out, U[:, :r] * S[:r] @ Vh[:r])
    near(np.linalg.norm(left, 2), S[r] if r < len(S) else 0)
    diagonal_of(scaling * A @ A.T, S[:r])
    diagonal_of(scaling * B_.T @ B_, S[:r])
    near(A @ left.T, 0)
    near(B_.T @ left, 0)


@every_shape
@every_scaling
def test_milora_is_the_smallest_directions(m, n, r, scaling):
    W, A, B_, out, left = parts("milora", m, n, r, scaling)
    U, S, Vh = thin(W)
    near(out, U[:, -r:] * S[-r:] @ Vh[-r:])
    assert np.linalg.matrix_rank(left, tol=1e-4) == len(S) - r
    near(np.linalg.norm(out, 2), S[-r])
    diagonal_of(scaling * A @ A.T, S[-r:])
    diagonal_of(scaling * B_.T @ B_, S[-r:])
    near(A @ left.T, 0)
    near(left.T @ B_, 0)


@every_shape
@every_scaling
@pytest.mark.parametrize("tokens", [30, 3])
@pytest.mark.parametrize("method", ["corda-kpm", "corda-ipm"])
def test_corda_is_the_ends_of_w_times_the_damped_covariance(method, m, n, r, scaling, tokens):
    """Eckart-Young: IPM's s B A C' is the best rank-r approximation of W C', KPM's W_res C' the
    best of rank k - r; the Gram matrices are the singular values, with A seen through C'."""
    Cov = covariance(n, tokens)
    W, A, B_, out, left = parts(method, m, n, r, scaling, Cov)
    C1 = Cov.double().numpy()
    C1 = C1 + 0.01 * np.trace(C1) / n * np.eye(n)
    U, S, Vh = thin(W @ C1)
    chosen = slice(0, r) if method == "corda-ipm" else slice(len(S) - r, None)
    near(out @ C1, U[:, chosen] * S[chosen] @ Vh[chosen], atol=1e-3)
    near(left @ C1, W @ C1 - U[:, chosen] * S[chosen] @ Vh[chosen], atol=1e-3)
    diagonal_of(scaling * B_.T @ B_, S[chosen])
    diagonal_of(scaling * (A @ C1) @ (A @ C1).T, S[chosen])


@every_shape
@pytest.mark.parametrize("corda, plain", [("corda-ipm", "pissa"), ("corda-kpm", "milora")])
def test_corda_on_white_inputs_is_pissa_or_milora(corda, plain, m, n, r):
    """C = I: the same B A; of its size damping moves 1.01^±1/2 from A to B."""
    W = weight(m, n)
    one, two = start(corda, W, r, 2.0, torch.eye(n)), start(plain, W, r, 2.0)
    near(*in64(one.B @ one.A, two.B @ two.A))
    near(one.A.norm(), two.A.norm() * 1.01**-0.5)
    near(one.B.norm(), two.B.norm() * 1.01**0.5)


@pytest.mark.parametrize("method", ["corda-kpm", "corda-ipm"])
def test_the_scale_of_the_covariance_moves_the_balance_of_corda_alone(method):
    W, Cov = weight(8, 12), covariance(12)
    one = start(method, W, 3, 1.0, Cov)
    for c in (100.0, 1e-4):
        two = start(method, W, 3, 1.0, c * Cov)
        near(*in64(one.B @ one.A, two.B @ two.A))
        near(two.A.norm(), one.A.norm() * c**-0.5, rtol=1e-3)
        near(two.B.norm(), one.B.norm() * c**0.5, rtol=1e-3)


def test_damping_begins_at_a_hundredth_and_doubles_until_the_inverse_is_one(monkeypatch):
    """With a bound that the first d misses here; CorDA's own only thousands of inputs miss."""
    Cov, eye = covariance(64, 5), torch.eye(64)

    def size(d):
        return Cov + d * Cov.diagonal().mean() * eye

    def error(d):
        return torch.linalg.matrix_norm(size(d) @ torch.linalg.inv(size(d)) - eye).item()

    assert (starts.DAMPING, starts.DAMPING_ERROR) == (0.01, 0.05)
    for bound, doubled in ((0.05, False), (1.01 * error(0.08), True)):
        monkeypatch.setattr(starts, "DAMPING_ERROR", bound)
        first = next(d for d in (0.01 * 2**i for i in range(20)) if error(d) < bound)
        C1, inverse = B.damped(Cov)
        assert (first > 0.01) == doubled
        near(C1, size(first), rtol=1e-6, atol=1e-6)
        near(C1 @ inverse, eye, atol=1e-3)


def inputs_with_null_space(n, free, seed=3):
    """X (50, n) that leaves out `free` directions, and these (n, free)."""
    Q = torch.linalg.qr(weight(n, n, seed)).Q
    X = weight(50, n - free, seed + 1) * torch.linspace(1, 2, n - free) @ Q[:, free:].T
    return X, Q[:, :free]


@every_scaling
@pytest.mark.parametrize("m, n, free", [(5, 9, 2), (9, 5, 2), (6, 12, 6)])
def test_lora_null_takes_out_w_where_no_input_goes(m, n, free, scaling):
    X, N = inputs_with_null_space(n, free)
    W, A, B_, out, left = parts("lora-null", m, n, free, scaling, X.T @ X / 50)
    X, N = in64(X, N)
    near(out, W @ N @ N.T)
    near(left @ N, 0)
    near(A @ N @ N.T, A)
    assert np.linalg.norm(A @ X.T) < 1e-5 * np.linalg.norm(A) * np.linalg.norm(X)
    S = thin(W @ N)[1]
    diagonal_of(scaling * A @ A.T, S)
    diagonal_of(scaling * B_.T @ B_, S)


@every_shape
def test_lora_null_goes_on_to_the_weakest_inputs(m, n, r):
    """A rank beyond the null space, of one direction here: the next smallest eigenvectors."""
    Cov = covariance(n, tokens=max(1, n - 1))
    W, _, _, out, _ = parts("lora-null", m, n, r, 1.0, Cov)
    N = np.linalg.eigh(Cov.double().numpy())[1][:, :r]
    near(out, W @ N @ N.T)


def test_the_null_space_is_found_in_fp64():
    """Inputs of 1 and 1e-4: squared they lie 1e-8 apart, where fp32 mixes them."""
    Q = torch.linalg.qr(weight(8, 8).double()).Q
    sizes = torch.tensor([1.0] * 4 + [1e-4] * 2 + [1e-5] * 2).double()
    x = start("lora-null", weight(6, 8).double(), 2, 1.0, (Q * sizes**2) @ Q.T)
    near(x.A @ Q[:, :6], 0, atol=1e-5)


def test_of_lora_null_v2_only_b_trains_and_no_b_changes_what_it_was_measured_on():
    """A is frozen, with A x = 0 for every calibration token, so any B leaves the logits there;
    and in version 1 A gets a gradient."""
    calibration = [data.Example([256, 5, 6, 7, 8], 2), data.Example([256, 9, 9, 11], 3)]
    ids = torch.tensor([[256, 5, 6, 7, 8]])
    model = tiny_llama(num_hidden_layers=2)
    before = model(ids).detach()
    train.initialise(model, settings(method="lora-null-v2", alpha=8.0), calibration)
    model.loss(ids, ids)[0].backward()
    for layer in M.adapted_layers(model).values():
        assert not layer.A.requires_grad and layer.A.grad is None and layer.B.grad is not None
        layer.B.data.normal_()
    torch.testing.assert_close(model(ids), before, rtol=1e-3, atol=1e-3)
    assert (model(ids + 1) - tiny_llama(num_hidden_layers=2)(ids + 1)).abs().max() > 0.1
    model = tiny_llama(num_hidden_layers=2)
    train.initialise(model, settings(method="lora-null"), calibration)
    assert all(x.A.requires_grad and x.B.requires_grad for x in M.adapted_layers(model).values())


# --------------------------------------------------------------------------------------- KaSA


@every_shape
@every_scaling
def test_kasa_leaves_w_without_its_smallest_directions(m, n, r, scaling):
    W, A, B_, out, left = parts("kasa", m, n, r, scaling)
    U, S, Vh = thin(W)
    near(left, (U * S)[:, :-r] @ Vh[:-r])
    assert np.linalg.matrix_rank(left, tol=1e-4) == len(S) - r
    near(np.linalg.norm(out, 2), S[-r])
    assert not B_.any() and np.abs(A).max() <= n**-0.5


def test_kasas_diagonal_is_normal_and_its_layer_with_ones_is_loras():
    W = weight(300, 300)
    x, again = start("kasa", W, 256), start("kasa", W, 256)
    assert x.d.std().item() == pytest.approx(1, abs=0.15) and abs(x.d.mean()) < 0.25
    assert torch.equal(x.d, again.d) and torch.equal(x.A, again.A)
    up, inputs = weight(300, 256, 5), weight(7, 300, 6)
    world = W - x.B0 @ x.A0
    kasa = M.LoRALinear(world, x.A, up, 0.5, d=torch.ones(256))
    lora = M.LoRALinear(world, x.A, up, 0.5)
    assert torch.equal(kasa(inputs), lora(inputs))
    assert torch.equal(kasa.merged_weight(), lora.merged_weight())


def kasa_layers(zero=False):
    """Two layers of unlike shape and rank, in one module."""
    draw = torch.Generator().manual_seed(4)
    return nn.ModuleList(M.LoRALinear(
        torch.zeros(m, n), torch.randn(r, n, generator=draw),
        torch.randn(m, r, generator=draw) * (not zero), d=torch.randn(r, generator=draw))
        for m, n, r in ((5, 7, 2), (4, 3, 3)))


def test_kasas_penalty_by_hand():
    layers, by_hand = kasa_layers(), 0.0
    for layer in layers:
        A, up, d = in64(layer.A.detach(), layer.B.detach(), layer.d.detach())
        distance = sum(np.sqrt(((G - np.eye(len(d))) ** 2).sum()) for G in (up.T @ up, A @ A.T))
        by_hand += (0.3 * (d * d).sum() + 0.07 * distance) / 2
        wide = np.sqrt(((A.T @ A - np.eye(A.shape[1])) ** 2).sum())  # the official code's
        near(wide**2, ((A @ A.T - np.eye(len(d))) ** 2).sum() + A.shape[1] - len(d))
    assert B.kasa_penalty(layers, 0.3, 0.07).item() == pytest.approx(by_hand, rel=1e-5)


def test_kasas_penalty_has_a_gradient_where_b_is_zero():
    layers = kasa_layers(zero=True)
    B.kasa_penalty(layers, 0.3, 0.07).backward()
    for layer in layers:
        assert not layer.B.grad.any() and layer.A.grad.isfinite().all() and layer.A.grad.any()
        torch.testing.assert_close(layer.d.grad, 0.3 * layer.d.detach())  # 2 β d, by 2 layers


# --------------------------------------------------------------------------------------- peft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    C.save(tiny_llama(1, num_hidden_layers=1), folder)
    return folder


def pefts(folder, preprocess=lambda model, config: None, **more):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0,
                             target_modules=list(M.DECODER_TARGETS["seven"]), **more)
    model = oracle(folder)
    preprocess(model, config)
    return peft.get_peft_model(model, config)


def ours(method, **more):
    model = tiny_llama(1, num_hidden_layers=1)
    s = settings(method=method, alpha=8.0, **more)
    train.initialise(model, s, examples())
    return model, s


def pairs(model, theirs):
    """Our and peft's layer, one after the other."""
    for name, layer in M.adapted_layers(model).items():
        yield layer, theirs.get_submodule(f"base_model.model.{name}")


def product(other):
    """scaling * B diag(d) A of peft's layer."""
    down, up = other.lora_A.default.weight, other.lora_B.default.weight
    d = other.lora_diag["default"] if "default" in getattr(other, "lora_diag", {}) else None
    return other.scaling["default"] * (up if d is None else up * d) @ down


def same(model, theirs, rtol=1e-3):
    """Base weights, updates and logits; signs of singular directions are free."""
    ids = torch.arange(40)[None]
    for layer, other in pairs(model, theirs):
        update = layer.merged_weight() - layer.weight
        for mine, his in ((layer.weight, other.base_layer.weight), (update, product(other))):
            assert (mine - his).norm() <= rtol * max(his.norm(), 1e-3)
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=rtol, atol=10 * rtol)


def copy_over(model, theirs):
    with torch.no_grad():
        for layer, other in pairs(model, theirs):
            other.lora_A.default.weight.copy_(layer.A)
            if layer.d is not None:
                other.lora_diag["default"].copy_(layer.d)


def step_both(model, s, theirs, penalty=lambda: 0.0):
    """Two steps of SGD each, since where B = 0 nothing else moves in the first."""
    mine, his = ([p for p in x.parameters() if p.requires_grad] for x in (model, theirs))
    before = [p.detach().clone() for p in mine]
    batch = data.collate(sorted(examples(), key=lambda e: -len(e.ids)))
    for _ in range(2):
        train.train_step(model, examples(), s, torch.optim.SGD(mine, lr=1.0), mine)
        (theirs(**batch).loss + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(his, s.clip)
        torch.optim.SGD(his, lr=1.0).step()
        theirs.zero_grad()
    assert all((p - q).abs().max() > 1e-4 for p, q in zip(mine, before, strict=True))


def test_lora_is_pefts(folder):
    model, s = ours("lora")
    theirs = pefts(folder)
    copy_over(model, theirs)
    same(model, theirs)
    step_both(model, s, theirs)
    same(model, theirs)


def test_pissa_is_pefts(folder):
    model, s = ours("pissa")
    theirs = pefts(folder, init_lora_weights="pissa")
    same(model, theirs)
    step_both(model, s, theirs)
    same(model, theirs)


def covariances(model, **options):
    return swept(model, calibration(), M.linear_names(model, M.DECODER_TARGETS["seven"]), **options)


def test_covariances_in_stripes_are_the_same(monkeypatch):
    model = tiny_llama(1, num_hidden_layers=1)
    expected = covariances(model)
    monkeypatch.setattr(sums, "STRIPE", 10)
    for name, found in covariances(model, outer=fast.OuterSum).items():
        torch.testing.assert_close(found, expected[name])
        assert found.equal(found.T)


def calibration():
    return [data.collate(examples()[:4]), data.collate(examples()[4:])]


@pytest.mark.parametrize("method", ["kpm", "ipm"])
@pytest.mark.parametrize("measured", ["by peft", "here"])
def test_corda_is_pefts(folder, tmp_path, method, measured):
    """Once on our covariance, once from peft's own pass over the same sequences, one at a time;
    what it measured is then compared, too."""
    pytest.importorskip("attr")  # which peft's CorDA asks for without saying so
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, s = ours(f"corda-{method}")
    mine, file = covariances(tiny_llama(1, num_hidden_layers=1)), tmp_path / "x" / "covariance"
    run = None
    if measured == "here":
        file.parent.mkdir()
        torch.save(mine, file)

    def preprocess(theirs, config):
        nonlocal run
        if measured == "by peft":
            def run():
                for e in examples():
                    theirs(torch.tensor([e.ids]))
        preprocess_corda(theirs, config, run_model=run)

    theirs = pefts(folder, preprocess, init_lora_weights="corda", corda_config=CordaConfig(
        corda_method=method, covariance_file=str(file)))
    his = torch.load(file)
    assert his.keys() == mine.keys()
    for name in his:
        torch.testing.assert_close(mine[name], his[name], rtol=1e-4, atol=1e-4)
    same(model, theirs, 3e-3)
    step_both(model, s, theirs)
    same(model, theirs, 3e-3)


def test_kasa_is_pefts(folder):
    """peft keeps min(m, n) - r directions as we do, and sums over layers what we average."""
    from peft import KasaConfig

    model, s = ours("kasa", kasa_beta=0.3, kasa_gamma=0.2)
    theirs = pefts(folder, kasa_config=KasaConfig(beta=0.3 / 7, gamma=0.2 / 7))
    copy_over(model, theirs)
    same(model, theirs)
    penalty = theirs.base_model._get_kasa_loss
    assert B.kasa_penalty(model, 0.3, 0.2).item() == pytest.approx(penalty().item(), rel=1e-5)
    step_both(model, s, theirs, penalty)
    same(model, theirs)
    for layer, other in pairs(model, theirs):
        torch.testing.assert_close(layer.d, other.lora_diag["default"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("m, n, r", SHAPES[:2])
@pytest.mark.parametrize("kept", [False, True])
def test_milora_by_two_of_pefts_methods(m, n, r, kept):
    """peft has no MiLoRA; PiSSA of the other k - r directions leaves MiLoRA's s B A as its base,
    and KaSA's base is MiLoRA's W_res."""
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(n, m, bias=False))
    W = plain[0].weight.detach().clone()
    more = (dict(r=r, kasa_config=peft.KasaConfig()) if kept else
            dict(r=min(m, n) - r, init_lora_weights="pissa"))
    theirs = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["0"], **more))
    x = start("milora", W, r, 2.0)
    out = 2.0 * x.B @ x.A
    near(*in64(W - out if kept else out, theirs.base_model.model[0].base_layer.weight.detach()),
         atol=1e-5)


# ----------------------------------------------------------------------------- the covariance


LLAMA = dict(num_hidden_layers=3, dtype=torch.float64)
MODELS = {
    "llama": lambda: tiny_llama(**LLAMA),
    "mistral": lambda: tiny_llama(**MISTRAL, **LLAMA),
    "gemma2": lambda: tiny_llama(**GEMMA2, **LLAMA),
    "roberta": lambda: tiny_roberta(dtype=torch.float64),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def measured_on(kind):
    """(model, batches padded to unlike lengths, names of its usual linear layers)."""
    model = MODELS[kind]()
    batches = ([tiny_texts((20, 9, 2), seed=1), tiny_texts((5, 13), seed=2)] if kind == "roberta"
               else [tiny_batch([(9, 6), (3, 9), (2, 1)], 1), tiny_batch([(4, 7), (1, 3)], 2)])
    targets = next(iter(M.FAMILIES[model.config.model_type].targets.values()))
    return model, batches, M.linear_names(model, targets)


def in_groups(model, batches, names, **options):
    return B.covariances(model, batches, names, train.run_body, **options)


def swept(model, batches, names, **options):
    return {n: x for found in in_groups(model, batches, names, **options)
            for n, x in found.items()}


@torch.no_grad()
def by_loop(model, batches, names):
    """C one sequence at a time, cut to its real tokens, through the whole model."""
    sums, count = dict.fromkeys(names, 0.0), 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen, count = {}, count + 1
            handles = [model.get_submodule(n).register_forward_hook(
                lambda _, args, out, n=n, seen=seen: seen.update({n: args[0][0]})) for n in names]
            model(ids[mask.bool()][None])
            for handle in handles:
                handle.remove()
            for n, x in seen.items():
                x = x / abs(max(x.flatten().tolist()))  # which is not always the largest |x|
                sums[n] = sums[n] + torch.einsum("ti,tj->ij", x, x)
    return {n: total / count for n, total in sums.items()}


@every_model
def test_the_covariance_is_a_loop_over_unpadded_sequences(kind):
    model, batches, names = measured_on(kind)
    mine, theirs = swept(model, batches, names), by_loop(model, batches, names)
    assert mine.keys() == theirs.keys() == set(names)
    for name in names:
        close(mine[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}")


@every_model
def test_what_stands_in_the_padding_does_not_count(kind):
    model, batches, names = measured_on(kind)
    mine = swept(model, batches, names[:3])
    others = [b | {"input_ids": b["input_ids"].where(b["attention_mask"].bool(), 77)}
              for b in batches]
    assert any((b["input_ids"] != o["input_ids"]).any()
               for b, o in zip(batches, others, strict=True))
    for name, x in swept(model, others, names[:3]).items():
        close(mine[name], x)


@every_model
def test_layers_that_read_the_same_share_one_covariance(kind):
    model, batches, names = measured_on(kind)
    found = next(in_groups(model, batches, names, at_once=1))
    held = {}
    for name, x in found.items():
        held.setdefault(x.data_ptr(), []).append(name.rpartition(".")[2])
    assert list(held.values()) == (
        [["query", "key", "value"], ["dense"], ["dense"], ["dense"]] if kind == "roberta" else
        [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]])


@every_model
@pytest.mark.parametrize("at_once", [1, 2, 3, 99])
def test_so_many_blocks_take_one_forward_pass(kind, at_once):
    model, batches, names = measured_on(kind)
    passes = -(-len(model.blocks) // at_once)
    whole = swept(model, batches, names)
    count = [0] * len(model.blocks)

    def add(i):
        count[i] += 1

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: add(i))
    groups = list(in_groups(model, batches, names, at_once=at_once))
    assert [n for found in groups for n in found] == list(whole)  # each once
    assert len(groups) == passes and count == [passes * len(batches)] * len(model.blocks)
    for found in groups:
        for name, x in found.items():
            close(x, whole[name])


def as_it_is(model):
    return [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks))
            for m in model.modules()], [p.requires_grad for p in model.parameters()]


@every_model
@pytest.mark.parametrize("end", ["whole", "left early", "broken"])
def test_the_sweep_leaves_the_model_as_it_was(kind, end):
    """Whether it ends, is given up between two blocks, or a block fails; dropout is off in it."""
    model, batches, names = measured_on(kind)
    model.train()
    model.blocks[1].eval()
    before, modes = as_it_is(model), []
    run = in_groups(model, batches, names, at_once=1)
    handle = model.blocks[0].register_forward_hook(lambda m, *_: modes.append(m.training))
    next(run)
    handle.remove()
    if end == "left early":
        run.close()
    else:
        def fail(*_):
            if end == "broken":
                raise RuntimeError("here")

        handle = model.blocks[1].register_forward_hook(fail)
        if end == "broken":
            with pytest.raises(RuntimeError, match="here"):
                list(run)
        else:
            list(run)
        handle.remove()
    assert as_it_is(model) == before and modes == [False] * len(batches)


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_inputs_without_a_covariance_are_refused_by_name(value):
    """A largest input of 0, by which nothing can be divided, and one that is not finite."""
    model = tiny_llama(num_hidden_layers=1)
    before = as_it_is(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(value)
    names = M.linear_names(model, M.DECODER_TARGETS["seven"])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.._proj's inputs is not finite"):
        swept(model, [tiny_batch([(3, 4)])], names)
    assert as_it_is(model) == before
    with pytest.raises(C.UserError, match=r"^tiny: the covariance of"):
        train.initialise(model, settings(method="corda-kpm"), examples())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_covariances_are_summed_in_fp32(dtype):
    """A sum of many in bf16 would have stopped growing."""
    model, batch = tiny_llama(num_hidden_layers=1, dtype=dtype), tiny_batch([(9, 6), (3, 9)])
    names = M.linear_names(model, ["o_proj"])
    once, many = (swept(model, [batch] * k, names)[names[0]] for k in (1, 300))
    assert many.dtype == torch.float32
    torch.testing.assert_close(once, many, rtol=1e-4, atol=1e-5)
