"""measuring.py: random models as hard as real ones, and what a clock and a memory say."""

import time
from types import SimpleNamespace

import pytest
import torch

import measuring as X
import model as M
import plan


@pytest.mark.parametrize("m, n", [(96, 96), (90, 161), (301, 64)])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_singular_values_fall_by_the_power_law(m, n, power):
    W = X.falling(m, n, power, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.svdvals(W.double())
    law = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power
    torch.testing.assert_close(S / S[0], law, rtol=1e-5, atol=1e-6)
    assert W.pow(2).mean().sqrt().item() == pytest.approx(X.STD, rel=1e-5)


def test_singular_vectors_lie_along_no_coordinate():
    """Nor are they the same twice."""
    W, other = (X.falling(128, 96, 0.5, generator=torch.Generator().manual_seed(i))
                for i in range(2))
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    assert U.abs().max() < 0.6 and Vh.abs().max() < 0.6
    assert abs((W * other).sum() / W.norm() / other.norm()) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_models_have_their_dtype_and_falling_weights(dtype):
    """All linear layers of the blocks; torch's default dtype stays."""
    config = X.Size(64, 96, 2).config()
    ours, theirs = X.random_model(config, "cpu", dtype), X.random_peer(config, "cpu", dtype)
    weights = {name: p for name, p in ours.named_parameters() if p.ndim == 2 and ".layers." in name}
    assert len(weights) == 2 * len(X.LINEARS)
    for model in (ours, theirs):
        assert {p.dtype for p in model.parameters()} == {dtype}
        for name in weights:
            S = torch.linalg.svdvals(model.get_parameter(name).detach().float())
            assert S[0] / S[15] == pytest.approx(16**X.POWER, rel=1e-2), name
    assert torch.get_default_dtype() == torch.float32


def test_a_model_has_its_dtype_from_the_first(monkeypatch):
    """Not by a detour."""
    def made(config):
        model = inner(config)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        return model

    inner = M.CausalLM
    monkeypatch.setattr(M, "CausalLM", made)
    X.random_model(X.Size(64, 96).config(), "cpu", torch.bfloat16)


def test_a_model_is_made_on_its_device():
    with X.made_on("meta", torch.bfloat16):
        layer = torch.nn.Linear(2, 2)
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16


def test_a_gpu_is_waited_for_and_its_peak_begins_anew(monkeypatch):
    """Before and after, and the peak of before does not count."""
    said = []
    memory = iter([5.0, 9.0])
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: said.append(name))
    monkeypatch.setattr(plan, "memory_used", lambda device: next(memory))
    with X.measured("cuda") as took:
        said.append("work")
    assert said == ["synchronize", "reset_peak_memory_stats", "work", "synchronize"]
    assert took["bytes"] == 4 and took["peak"] == 9 and took["seconds"] >= 0


def test_seconds_by_part_of_functions_timed_from_outside(monkeypatch):
    """Methods and functions, their values passed on; afterwards they are what they were."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def sleep(seconds):
        clock[0] += seconds

    class Layer:
        size = 3

        def add(self, x):
            sleep(2)
            return self.size + x

        @classmethod
        def of(cls, x):
            return cls.size * x

    module = SimpleNamespace(work=lambda: sleep(1))
    before = dict(vars(Layer)), module.work
    watch = X.Stopwatch("cpu")
    with watch.watching({"adding": [(Layer, "add"), (Layer, "of")], "work": [(module, "work")]}):
        assert (Layer().add(1), Layer.of(2)) == (4, 6)
        module.work()
        module.work()
    found = watch.seconds()
    assert (dict(vars(Layer)), module.work) == before
    assert found == {"adding": 2, "work": 2}
    with pytest.raises(KeyError, match="gone"), watch.watching({"x": [(module, "gone")]}):
        pass


def test_events_time_a_gpu(monkeypatch):
    """In its stream, in milliseconds, and nothing waits before the end."""
    class Event:
        clock = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.clock += 250
            self.at = Event.clock

        def elapsed_time(self, other):
            return other.at - self.at

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append(True))
    module, watch = SimpleNamespace(work=lambda: None), X.Stopwatch("cuda")
    with watch.watching({"work": [(module, "work")]}):
        module.work()
        module.work()
        assert not waited
    assert watch.seconds() == {"work": 0.5} and waited


def test_padding_is_on_the_left():
    batch = X.padded_left([[7], [5, 6]])
    assert batch["input_ids"].tolist() == [[0, 7], [5, 6]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
