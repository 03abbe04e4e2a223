"""Products by oneDNN: torch's own products, in fp64, are the oracle."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from tiny import padded, tiny_llama

import farss
import fast
import model as M
import onednn
from fast import decompositions

pytestmark = pytest.mark.skipif(not onednn.is_known(), reason="no oneDNN for this CPU")
FORMS = {  # of a matrix (r, c): how it may lie in memory
    "plain": lambda r, c: torch.randn(r, c),
    "transposed": lambda r, c: torch.randn(c, r).t(),
    "part": lambda r, c: torch.randn(r, c + 5)[:, :c],
    "part, transposed": lambda r, c: torch.randn(c, r + 5)[:, :r].t(),
    "every other": lambda r, c: torch.randn(2 * r, 2 * c)[::2, ::2],
    "one row again and again": lambda r, c: torch.randn(1, c).expand(r, c),
}


@pytest.fixture
def calls(monkeypatch):
    """Each product of oneDNN's; its weight must lie densely, or it takes 100 times as long."""
    def checked(x, weight, bias=None):
        assert weight.is_contiguous() or weight.t().is_contiguous()
        return linear(x, weight, bias)

    linear = onednn.linear
    monkeypatch.setattr(onednn, "linear", seen := Mock(side_effect=checked))
    return seen


def weights(model):
    """Of the seven linear layers of each block."""
    return {n: model.get_parameter(f"{n}.weight")
            for n in M.linear_names(model, M.DECODER_TARGETS["seven"])}


def near(found, expected):
    """fp32's rounding over some sums."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_products_of_matrices_however_they_lie(first, second, calls):
    torch.manual_seed(0)
    for t, n, m in ((8, 1, 1), (17, 30, 9), (40, 64, 96)):
        a, b, total = FORMS[first](t, n), FORMS[second](n, m), torch.randn(t, m)
        bias, exact = torch.randn(m), a.double() @ b.double()
        before, out = total.double(), total.clone()
        calls.reset_mock()
        with onednn.Products():
            near(a @ b, exact)
            near(torch.addmm(bias, a, b), exact + bias)
            assert out.addmm_(a, b, alpha=-0.3) is out
            near(F.linear(a.view(1, *a.shape) if first == "plain" else a, b.t(), bias).view(t, m),
                 exact + bias)
        near(out, before - 0.3 * exact)
        assert calls.call_count == 4


def test_part_of_a_matrix_is_added_to(calls):
    """As add_outer does: a stripe of a larger sum."""
    rows, total = torch.randn(20, 12), torch.zeros(12, 12)
    with onednn.Products():
        total[4:12, :8].addmm_(rows[:, 4:12].T, rows[:, :8])
    near(total[4:12, :8], rows[:, 4:12].double().T @ rows[:, :8].double())
    assert calls.call_count == 1 and not total[:4].any() and not total[:, 8:].any()


def test_what_is_left_to_torch(calls):
    """Few rows, other dtypes, other sums: to the bit."""
    torch.manual_seed(0)
    a, b = torch.randn(16, 24), torch.randn(24, 12)
    for call in (lambda: a[:7] @ b, lambda: a.double() @ b.double(),
                 lambda: a.bfloat16() @ b.bfloat16(), lambda: torch.addmm(a[:, :12], a, b),
                 lambda: torch.addmm(b[0], a, b, beta=2), lambda: a[:, :12].clone().addmm_(
                     a, b, beta=0.5), lambda: torch.bmm(a[None], b[None]), lambda: a @ b[:, 0],
                 lambda: torch.linalg.svd(a).S, lambda: F.linear(a[:7], b.t())):
        expected = call()
        with onednn.Products():
            assert torch.equal(call(), expected)
        with torch.inference_mode(), onednn.Products():
            assert torch.equal(call(), expected)
    assert calls.call_count == 0


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_layer_in_every_mode(context, calls):
    x, W, bias = torch.randn(3, 5, 24), torch.nn.Parameter(torch.randn(12, 24)), torch.randn(12)
    exact = F.linear(x.double(), W.double(), bias.double())
    for given in (bias, None):
        with context(), onednn.Products():
            near(F.linear(x, W, given), exact - (0 if given is not None else bias.double()))
    assert calls.call_count == 2


@pytest.mark.parametrize("residual", ["split", "exact"])
def test_loss_and_gradients_of_a_model(residual, calls, monkeypatch):
    """Forward and backward, every linear layer and the head; the same bits each time."""
    monkeypatch.setattr(M, "WIDE", 32)
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    model = tiny_llama(num_hidden_layers=2)
    M.attach(model, {n: (torch.randn(3, W.shape[1]) / 9, torch.randn(W.shape[0], 3) / 9)
                     for n, W in weights(model).items()}, residual=residual)
    ids, mask = padded("right")
    labels = torch.where(mask.bool(), ids, M.IGNORE)

    def gradients(net, inside):
        net.zero_grad()
        with inside:
            loss = net.loss(ids, labels, mask)[0]
            loss.backward()
        return [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]

    once, again = (gradients(model, M.products(model)) for _ in range(2))
    assert calls.call_count >= 2 * (14 * 6 + 2)
    model.double()
    for x, y, exact in zip(once, again, gradients(model, M.products(model)), strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x.double(), exact, rtol=2e-3, atol=2e-3 * exact.abs().max())


def test_measurements_are_those_of_plain_products(calls, monkeypatch):
    """The sweep, its statistics included."""
    monkeypatch.setattr(decompositions, "SMALL", 16)
    model = tiny_llama(num_hidden_layers=2)
    ids, mask = padded("right")
    batch = {"input_ids": ids, "attention_mask": mask,
             "labels": torch.where(mask.bool(), ids, M.IGNORE)}
    names, budget = list(weights(model)), farss.Budget(1, 4, 2, 1, 4)
    plain = fast.measure(model, [batch], names, budget)
    with onednn.Products():
        found = fast.measure(model, [batch], names, budget)
    assert calls.call_count > 14 * 6
    for name, x in found.items():
        y = plain[name]
        torch.testing.assert_close(x.sigma, y.sigma, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.s.sort().values, y.s.sort().values, rtol=1e-2,
                                   atol=1e-4 * float(y.s.max()))
        if y.importance:
            assert x.importance == pytest.approx(y.importance, rel=1e-3)


@pytest.mark.parametrize("maker, level, mkl, expected", [
    ("AuthenticAMD", "AVX512", True, True), ("GenuineIntel", "AVX512", True, False),
    ("AuthenticAMD", "AVX2", True, False), ("AuthenticAMD", "AVX512", False, False),
    (None, "AVX512", True, False)])
def test_where_it_is_faster(maker, level, mkl, expected, monkeypatch, tmp_path):
    if maker:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\nfamily\t: 26\n")
    monkeypatch.setattr(onednn, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    onednn.is_faster.cache_clear()
    try:
        assert onednn.is_faster() is expected
    finally:
        onednn.is_faster.cache_clear()


def test_which_models(monkeypatch):
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    model = tiny_llama(num_hidden_layers=1)

    def quick(m):
        return isinstance(M.products(m), onednn.Products)

    assert not quick(model)
    monkeypatch.setattr(M, "WIDE", 32)
    assert quick(model)
    assert not quick(tiny_llama(num_hidden_layers=1).to(torch.bfloat16))
    assert not quick(tiny_llama(num_hidden_layers=1).to("meta"))
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    assert not quick(model)


def test_torch_compiles_own_module_is_not_imported():
    """It takes a second and 140 MB."""
    code = ("import sys, torch, onednn\nwith onednn.Products():\n    torch.ones(9, 9) @ "
            "torch.ones(9, 9)\nassert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=Path(onednn.__file__).parent, check=True)
