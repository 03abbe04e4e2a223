"""Plain equals fast: farss.py's start and that of fast/, on every family, end, dtype and shape.

The upper half needs no fast/ (a test deletes it in a copy); the lower half compares.
"""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import GEMMA2, MISTRAL, tiny_batch, tiny_llama, tiny_roberta, tiny_texts, wide_llama

import farss
import model as M

REPO = Path(__file__).resolve().parent.parent
SEVEN = M.DECODER_TARGETS["seven"]
BUDGET = dict(shallow=2, R=3, r_avg=2, r_min=1, r_max=4)
FAMILIES = {
    "llama": {}, "biases": dict(attention_bias=True, mlp_bias=True),
    "tied": dict(tie_word_embeddings=True), "mistral": MISTRAL, "gemma2": GEMMA2,
    "grouped queries": dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=24),
    "gate lies": dict(intermediate_size=12),  # m < n in gate and up, m > n in down
}


def two_batches():
    """Unlike in number and length, and with more padding than they need."""
    return [tiny_batch([(5, 6)], seed=1, length=13), tiny_batch([(3, 9), (7, 2), (1, 4)], seed=2)]


def of_decoder(dtype=torch.float64, **settings):
    model = tiny_llama(dtype=dtype, **(dict(num_hidden_layers=3) | settings))
    return model, two_batches(), M.linear_names(model, SEVEN)


# ------------------------------------------------------------------------------ without fast/


@pytest.mark.parametrize("end", ["depth", "low", "high"])
def test_plain_leaves_the_function_as_it_was(end):
    model, batches, names = of_decoder()
    adapters = farss.initialise(model, batches, farss.Budget(**BUDGET, end=end), names, scaling=2.0)
    with torch.no_grad():
        before = model(batches[1]["input_ids"])
        M.attach(model, {n: (x.A, x.B) for n, x in adapters.items()}, 2.0)
        torch.testing.assert_close(model(batches[1]["input_ids"]), before, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def without_fast(tmp_path_factory):
    """A copy of the repository whose fast/ is deleted."""
    copy = tmp_path_factory.mktemp("without") / "copy"
    shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".*", "runs", "fast", "notebooks"))
    assert not (copy / "fast").exists()
    return copy


def test_without_fast_the_equations_hold(without_fast):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_equations.py",
         "tests/test_plain.py::test_plain_leaves_the_function_as_it_was"], cwd=without_fast,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_without_fast_a_run_on_the_microcosm_is_the_same(without_fast, tmp_path):
    """The start of FARSS comes out to the bit as it does here, and trains and is scored alike."""
    copy, adapters, answers = without_fast, [], []
    for root in (copy, REPO):
        out = tmp_path / f"run{len(adapters)}"
        done = subprocess.run(
            [sys.executable, root / "train.py", "--method", "farss", "--steps", "2", "--out", out],
            cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "start by farss.py" in done.stdout
        adapters.append((out / "adapter.safetensors").read_bytes())
        done = subprocess.run([sys.executable, root / "eval.py", out], cwd=root,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append([file.read_bytes() for file in sorted((out / "eval").iterdir())])
    assert adapters[0] == adapters[1] and answers[0] == answers[1]


# Runs a command of the repository, and writes which functions of farss.py it called.
TRACER = """
import json, os, runpy, sys
root, out, script, *arguments = sys.argv[1:]
sys.argv, called = [script, *arguments], set()
sys.path.insert(0, root)

def watch(frame, event, arg):
    if event == "call" and frame.f_code.co_filename == os.path.join(root, "farss.py"):
        called.add(frame.f_code.co_qualname)

sys.setprofile(watch)
try:
    runpy.run_path(os.path.join(root, script), run_name="__main__")
finally:
    sys.setprofile(None)
    json.dump(sorted(called), open(out, "w"))
"""
TREE = ast.parse((REPO / "farss.py").read_text())
NUMBERED = {  # functions of farss.py whose docstring begins with a number of the paper
    f"{above}{node.name}" for above, body in (
        ("", TREE.body),
        *((f"{x.name}.", x.body) for x in TREE.body if isinstance(x, ast.ClassDef)))
    for node in body if isinstance(node, ast.FunctionDef)
    and (ast.get_docstring(node) or "").startswith("Eq.")}
SCORES = {"knowledge_score", "task_score", "harmonic_mean"}  # Eq. 36-38, which eval.py calls
ORACLE = {"kfac_factors", "sampled_loss"}  # of the whole model; Eq. 5 as written


def called(tmp_path, *command):
    out = tmp_path / "called.json"
    done = subprocess.run([sys.executable, "-c", TRACER, str(REPO), str(out), *map(str, command)],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(out.read_text()))


def test_what_one_reads_is_what_runs(tmp_path):
    """`python train.py --method farss` calls every function that carries an equation."""
    assert len(NUMBERED) == 20
    command = ["train.py", "--method", "farss", "--steps", "2", "--calibration-examples", "8"]
    plain = called(tmp_path, *command, "--out", tmp_path / "run")
    assert NUMBERED - plain == SCORES | ORACLE
    sampled = called(tmp_path, *command, "--fisher", "sampled", "--out", tmp_path / "sampled")
    assert NUMBERED - sampled == SCORES | ORACLE - {"sampled_loss"}
    assert called(tmp_path, "eval.py", tmp_path / "run") >= SCORES


def test_with_fast_all_is_called_but_what_it_replaces_by_name(tmp_path):
    """Of a narrow model fast/ takes farss.svd, too, as its own way would be no faster."""
    import fast

    found = called(tmp_path, "train.py", "--method", "farss", "--steps", "2", "--fast",
                   "--calibration-examples", "8", "--out", tmp_path / "run")
    named = set(", ".join(fast.REPLACES).split(", "))
    assert named <= {"kfac_hooks", "factors_by_block", *NUMBERED} and not named - {"svd"} & found
    inside = {"FactorSums.add_input", "FactorSums.add_gradient"}  # of kfac_hooks
    assert NUMBERED - found == (named & NUMBERED) - {"svd"} | inside | SCORES | ORACLE | {
        "measure_layer"}


# ---------------------------------------------------------------------------- plain beside fast


def compare(model, batches, names, budget, tolerance, **options):
    """Every number of every layer, equation by equation: σ, s, I, then ranks and B A."""
    from fast import measure

    plain, fast = (f(model, batches, names, budget, **options) for f in (farss.measure, measure))
    assert list(plain) == list(fast) == names
    for name in names:
        mine, theirs = fast[name], plain[name]
        torch.testing.assert_close(mine.sigma, theirs.sigma, rtol=1e-5, atol=1e-6)  # Eq. 13
        top = theirs.s.max().item()  # scores of one layer go over many decades
        torch.testing.assert_close(mine.s, theirs.s, rtol=tolerance, atol=1e-6 * tolerance * top)
        if budget.is_shallow(name):  # Eq. 8
            assert mine.importance == pytest.approx(theirs.importance, rel=tolerance)
        else:
            assert mine.importance is theirs.importance is None
        assert mine.S.dtype == theirs.S.dtype and mine.U.device.type == "cpu"
    starts = [farss.build_adapters(x, budget, 2.0) for x in (plain, fast)]
    for name in names:
        a, b = (x[name] for x in starts)
        assert a.A.shape == b.A.shape and a.scaling == b.scaling == 2.0
        if set(a.index.tolist()) == set(b.index.tolist()):  # scores that all but tie may change
            torch.testing.assert_close(b.B @ b.A, a.B @ a.A, rtol=1e-4, atol=1e-5)
    same = sum(set(starts[0][n].index.tolist()) == set(starts[1][n].index.tolist()) for n in names)
    return same / len(names)


@pytest.mark.parametrize("end", ["depth", "low", "high"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-3),
                                              (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_start(family, dtype, tolerance, end):
    model, batches, names = of_decoder(dtype, **FAMILIES[family])
    same = compare(model, batches, names, farss.Budget(**BUDGET, end=end), tolerance)
    assert same == 1 if dtype == torch.float64 else same > 0.9


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_start_of_an_encoder(dtype, tolerance):
    model = tiny_roberta(dtype=dtype)
    names = M.linear_names(model, M.ENCODER_TARGETS["six"])
    compare(model, [tiny_texts(), tiny_texts((7, 3), seed=1)], names, farss.Budget(1, 3, 2, 1, 4),
            tolerance)


@pytest.mark.parametrize("size", [
    pytest.param(dict(hidden_size=1088, intermediate_size=1152, num_attention_heads=8,
                      num_key_value_heads=8, head_dim=136), marks=pytest.mark.rehearsed,
                 id="wide enough"),
    pytest.param(dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                      num_key_value_heads=32, head_dim=128), id="llama2-7b")])
@pytest.mark.parametrize("shallow", [0, 1])
def test_one_block_of_falling_spectrum(device, size, shallow):
    """A block of Llama-2-7B's widths, equation by equation; on a CPU it takes minutes, so that by
    itself only a narrower one runs there (`--device cpu` takes both)."""
    from fast import measure

    model = wide_llama(num_hidden_layers=1, **size).to(device)
    batch = {k: v.to(device) for k, v in tiny_batch([(60, 80), (3, 40), (90, 60)]).items()}
    names, budget = M.linear_names(model, SEVEN), farss.Budget(shallow, 128, 50, 1, 64)
    plain, fast = (f(model, [batch], names, budget) for f in (farss.measure, measure))
    for name in names:
        mine, theirs = fast[name], plain[name]
        k = len(mine.sigma)  # σ_1 / σ_k, of which each rounding of σ_1 takes a part
        torch.testing.assert_close(mine.sigma, theirs.sigma, rtol=2e-6 * k, atol=0)  # Eq. 13
        assert mine.importance == (pytest.approx(theirs.importance, rel=1e-3) if shallow else None)
        # Eq. 14 and 15, of neighbours together: those whose σ is all but the same may be turned
        bins = [x.s.double().unfold(0, 8, 8).sum(1) for x in (mine, theirs)]
        torch.testing.assert_close(*bins, rtol=5e-2, atol=1e-6 * theirs.s.max().item())
        # Eq. 16: nearly all the same. Eq. 17: of the lowest, whose σ are near equals, others may be
        # taken; in either case they score as much
        same = len(set(mine.index.tolist()) & set(theirs.index.tolist()))
        assert shallow or same > 0.8 * len(mine.index)
        chosen = [theirs.s[x.index].sum().item() for x in (mine, theirs)]
        assert chosen[0] == pytest.approx(chosen[1], rel=0.1)
    starts = [farss.build_adapters(x, budget) for x in (plain, fast)]
    assert [len(x.A) for x in starts[0].values()] == [len(x.A) for x in starts[1].values()]
    for name in names:
        W, (a, b) = model.get_parameter(f"{name}.weight").cpu(), (x[name] for x in starts)
        for x in (a, b):  # B A is a part of W: W has as much less of it as it has of its own
            BA = x.B @ x.A
            apart = (W - BA).pow(2).sum() + BA.pow(2).sum()
            assert apart.item() == pytest.approx(W.pow(2).sum().item(), rel=1e-5)
        if not shallow:
            assert (a.B @ a.A - b.B @ b.A).norm() <= 0.05 * (a.B @ a.A).norm()


@pytest.mark.parametrize("targets", [SEVEN[:4], ["down_proj"], ["v_proj", "up_proj"]])
def test_start_of_some_layers(targets):
    model, batches, _ = of_decoder()
    names = M.linear_names(model, targets)
    assert compare(model, batches, names, farss.Budget(**BUDGET), 1e-8) == 1
    inside = [n for n in names if farss.block_index(n) == 1]
    assert compare(model, batches, inside[::-1], farss.Budget(**BUDGET), 1e-8) == 1


def test_start_on_labels_of_the_model_and_inputs_kept_apart():
    model, batches, names = of_decoder()
    losses = [farss.sampled_loss(torch.Generator().manual_seed(3)) for _ in range(2)]
    from fast import measure

    budget = farss.Budget(**BUDGET)
    plain = farss.measure(model, batches, names, budget, losses[0], keep_on="cpu")
    for name, x in measure(model, batches, names, budget, losses[1], keep_on="cpu").items():
        torch.testing.assert_close(x.s, plain[name].s, rtol=1e-8, atol=1e-20)


class Net(torch.nn.Module):
    """One block of one linear layer (m, n), whatever m and n are, with or without a bias."""

    def __init__(self, m, n, bias):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(9, n)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict(
            {"fc": torch.nn.Linear(n, m, bias)})])
        self.layers[0].forward = lambda x: self.layers[0]["fc"](x).tanh()
        self.head = torch.nn.Linear(m, 5)
        self.double()

    def forward(self, input_ids, attention_mask):
        return self.head(self.layers[0](self.table(input_ids)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m, n", [(6, 4), (4, 6), (4, 4), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("tokens", [2, 11])  # fewer than min(m, n): Σ has no full rank
def test_start_of_awkward_shapes(m, n, tokens, bias):
    model, names = Net(m, n, bias), ["layers.0.fc"]
    batch = tiny_batch([(1, tokens - 1)], vocab=5)
    for shallow in (0, 1):
        budget = farss.Budget(shallow, R=min(m, n), r_avg=1, r_min=1, r_max=min(m, n))
        compare(model, [batch], names, budget, 1e-8)


def test_counted_stands_above_the_attention_mask():
    """Both forms count the tokens that `counted` says, whatever the model may attend to."""
    from fast import measure

    model, (_, batch), names = of_decoder()
    more = batch | {"counted": torch.ones_like(batch["attention_mask"])}
    less = batch | {"counted": batch["attention_mask"] * (batch["labels"] == M.IGNORE)}
    budget, found = farss.Budget(**BUDGET), {}
    for which, data in (("mask", batch), ("more", more), ("less", less)):
        compare(model, [data], names, budget, 1e-8)
        found[which] = measure(model, [data], names, budget)[names[0]].s
    for which in ("more", "less"):
        assert (found[which] - found["mask"]).norm() > 0.01 * found["mask"].norm()


def test_svd_of_either_form_gives_the_same_starts(monkeypatch):
    """Every start that takes svd= comes out alike with fast's, by Gram matrices."""
    import fast
    from fast import decompositions
    from methods import METHODS, Given

    monkeypatch.setattr(decompositions, "SMALL", 4)
    torch.manual_seed(0)
    C = torch.randn(50, 20).double()
    for shape in ((30, 20), (20, 20), (12, 20)):
        W, C1 = torch.randn(*shape).double(), C.T @ C
        for name, row in METHODS.items():
            if row.start is None:
                continue
            starts = [row.start(W, 5, Given(2.0, torch.Generator().manual_seed(1), svd, C1))
                      for svd in (farss.svd, fast.svd)]
            products = [x.B @ x.A if x.B0 is None else x.B0 @ x.A0 for x in starts]
            torch.testing.assert_close(*products, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("width", [1, 5, 13])
def test_outer_sums(monkeypatch, width):
    import fast
    import methods
    from fast import sums

    monkeypatch.setattr(sums, "STRIPE", 4)
    found = []
    for kind in (methods.OuterSum, fast.OuterSum):
        total = kind()
        for seed in range(3):
            total.add(torch.randn(7, width, generator=torch.Generator().manual_seed(seed)).double())
        found.append(total.value())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
