"""bench.py: both sides of every row do the same work. Nothing here is timed."""

import json
import sys

import pytest
import torch
import transformers
from tiny import write_checkpoint, write_data

import bench
import checkpoint as C
import model as M

TINY = bench.Work(steps=1, prompts=6, new=20, blocks=1, questions=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny checkpoint, and the questions of the row evaluation."""
    monkeypatch.setenv("QUESTIONS", str(write_data(tmp_path / "data") / "nq.jsonl"))
    return str(write_checkpoint(tmp_path / "tiny", num_hidden_layers=1))


ON_ONE = [n for n in bench.ROWS if n != "loading"]


@pytest.mark.parametrize("name, dtype", [*((n, "float32") for n in ON_ONE),
                                         ("training", "bfloat16"), ("generation", "bfloat16")])
def test_both_sides_do_the_same_amount_in_their_dtype(name, dtype, folder, monkeypatch):
    load, seen = C.load, []
    monkeypatch.setattr(C, "load", lambda *where: seen.append(where) or load(*where))
    row, work = bench.ROWS[name], TINY._replace(dtype=dtype)
    done = [side(folder, work)() for side in (row.here, row.there)]
    assert done[0] == done[1] > 0
    assert set(seen) == {(folder, getattr(torch, dtype), "cpu")}


def test_models_and_batches_are_where_they_are_told(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(C, "load", lambda *where: seen.append(where))
    work = TINY._replace(device="meta", dtype="bfloat16")
    bench.ours(folder, work)
    assert seen == [(folder, torch.bfloat16, "meta")]
    model = bench.theirs(folder, work)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    for batch in (*bench.batches(64, 2, device="meta"), bench.padded_left([[1], [2, 3]], "meta")):
        assert {t.device.type for t in batch.values()} == {"meta"}


@pytest.mark.parametrize("name", [n for n in bench.ROWS if n != "loading"])
def test_every_row_asks_for_its_device(name, folder, monkeypatch):
    """For its models, and for the batches that it makes itself."""
    asked, load = [], C.load
    monkeypatch.setattr(C, "load", lambda path, dtype, device: asked.append(device) or load(
        path, dtype, "cpu"))
    monkeypatch.setattr(bench, "batches", lambda vocab, count, lengths=(128, 256), device="cpu",
                        inner=bench.batches: asked.append(device) or inner(vocab, count, lengths))
    monkeypatch.setattr(bench, "padded_left", lambda rows, device="cpu",
                        inner=bench.padded_left: asked.append(device) or inner(rows))
    for side in (bench.ROWS[name].here, bench.ROWS[name].there):
        side(folder, TINY._replace(device="cpu:0"))()
    assert set(asked) == {"cpu:0"}


def test_training_is_on_the_same_loss(folder, monkeypatch):
    """The first one, before anything was learnt; dropout falls on adapters that are 0 so far."""
    losses = []
    monkeypatch.setattr(bench, "training", lambda model, loss, work, *_: losses.append(
        [loss(batch).item() for batch in work]))
    bench.train_here(folder, TINY)
    bench.train_peft(folder, TINY)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    assert len(losses[0]) == 2


def test_generation_ends_each_sequence_at_its_number(folder, monkeypatch):
    """transformers goes on with a batch until its last sequence is finished."""
    seen = []
    generate = transformers.GenerationMixin.generate
    monkeypatch.setattr(transformers.GenerationMixin, "generate", lambda self, *a, **k: (
        seen.append(generate(self, *a, **k)), seen[-1])[1])
    bench.generate_transformers(folder, TINY)()
    work, limits = bench.prompts(258, TINY)
    order = sorted(range(6), key=lambda i: len(work[i]))
    ours = M.generate(C.load(folder, device="cpu"), work, limits, batch_size=3)
    for chosen, out in zip((order[:3], order[3:]), seen[1:], strict=True):
        length = max(len(work[i]) for i in chosen)
        assert out.shape[1] - length == max(limits[i] for i in chosen)
        for i, row in zip(chosen, out[:, length:].tolist(), strict=True):
            assert row[: limits[i]] == ours[i]


def test_the_random_checkpoint_is_whole_for_both(tmp_path, monkeypatch):
    small = M.Config(64, 32, 48, 5, 4, 2, 8, tie_word_embeddings=True)
    monkeypatch.setitem(C.MODELS, "llama3.2-1b", ("", small))
    bench.random_checkpoint(str(tmp_path), TINY._replace(blocks=5))
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # blocks 0-3, 4, and the rest
    ours = C.load(tmp_path, torch.float32, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert bench.millions(ours) == bench.millions(theirs)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=0, atol=0)


def test_device_and_dtype_reach_every_process(folder, monkeypatch, capsys):
    """And a process makes of them what it measures with."""
    told, made = [], []

    def fresh(*arguments, **_):
        told.append(arguments)
        return {"tokens/s": 1.0, "peak GB": 1.0, "bytes": 1.0, "seconds": 1.0}

    monkeypatch.setattr(bench, "fresh", fresh)
    monkeypatch.setattr(bench, "card", lambda device: device)
    monkeypatch.setattr(bench, "measure", lambda row, side, folder, w: made.append(w) or {})
    where = ["--device", "cuda:1", "--dtype", "bfloat16"]
    for what in ([folder, "--rows", "training", "--quick"], ["--blocks"],
                 ["--starts", "--methods", "lora"], [folder, "--measure", "training", "0"]):
        monkeypatch.setattr(sys, "argv", ["bench.py", *what, *where])
        bench.main()
    assert len(told) == 2 + 2 * len(bench.BLOCKS) + 2
    assert all("cuda:1" in " ".join(map(str, each)) for each in told)
    assert all("bfloat16" in " ".join(map(str, each)) for each in told if "--grown" not in each)
    assert (made[0].device, made[0].dtype) == ("cuda:1", "bfloat16")


def test_results_as_a_file(tmp_path, folder, monkeypatch, capsys):
    """The median of the ratios is not the ratio of the medians."""
    speeds = iter([2.0, 1.0, 9.0, 3.0, 4.0, 4.0])  # here and there in turn
    monkeypatch.setattr(bench, "fresh", lambda *_: {"tokens/s": next(speeds), "peak GB": 1.0})
    monkeypatch.setattr(sys, "argv", ["bench.py", folder, "--rows", "training", "--json",
                                      str(tmp_path / "out.json")])
    bench.main()
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"] == {"training": {"tokens/s": [4.0, 3.0, 2.0], "peak GB": [1.0] * 3}}
    assert {"commit", "torch", "transformers", "peft", "machine", "threads"} <= set(written)
    assert "4.00      3.00    2.00" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--rows", "evaluation"], ["--questions", "nowhere.jsonl",
                                                            "--rows", "evaluation"]])
def test_evaluation_wants_questions(more, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", folder, *more])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2 and "--questions FILE" in capsys.readouterr().err


def test_growth_is_measured_by_exponents(tmp_path, monkeypatch, capsys):
    """Of a start that costs 3 x² seconds and 5 √x bytes along each axis."""
    def fresh(flag, method, side, size, **environment):
        varied = [x / b for x, b in zip(json.loads(size).values(), bench.BASE, strict=True)
                  if x != b]
        x = next(iter(varied), 1)
        return {"seconds": 3 * x**2, "bytes": 5e9 * x**0.5}

    monkeypatch.setattr(bench, "fresh", fresh)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--growth", "--json", str(tmp_path / "g.json"),
                                      "--plot", str(tmp_path / "g.png")])
    bench.main()
    written, out = json.loads((tmp_path / "g.json").read_text()), capsys.readouterr().out
    assert set(written["growth"]) == set(bench.GROWTH)
    for values in written["growth"].values():
        axis = next(iter(values))
        assert bench.exponent(values[axis], values["seconds"]) == pytest.approx(2)
        assert bench.exponent(values[axis], values["GB added"]) == pytest.approx(0.5)
    assert out.count("     2.00\n") >= 4 and out.count("     0.50\n") >= 4
    assert (tmp_path / "g.png").stat().st_size > 10_000


def test_a_start_is_measured_where_it_is_told(monkeypatch):
    """Every part of a size reaches the model, its data and its rank."""
    seen = {}

    def initialise(model, s, examples):
        seen.update(blocks=len(model.blocks), width=model.config.hidden_size,
                    mlp=model.config.intermediate_size, sequences=len(examples), rank=s.rank,
                    dtype=s.dtype, length=len(examples[0].ids), device=s.device,
                    vocab=model.config.vocab_size, form=s.form)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    monkeypatch.setattr(bench.train, "initialise", initialise)
    size = bench.Size(128, 352, 3, 5, 7, dtype="bfloat16", length=9, vocab=99,
                      form="plain")
    bench.start_here("farss", size)
    assert seen | {"like": "llama2-7b"} == size._asdict()


def test_starts_as_a_file(tmp_path, monkeypatch, capsys):
    """All that was measured, here and in peft, and at which size."""
    monkeypatch.setattr(bench, "fresh", lambda flag, method, side, size: {
        "seconds": {"here": 1.0, "shallow": 2.0, "peft": 3.0}[side],
        "bytes": 1e9 * json.loads(size)["sequences"]})
    monkeypatch.setattr(bench, "decompositions", lambda width, mlp, device: {
        f"{width} x {mlp}": {"a": 1}})
    monkeypatch.setattr(sys, "argv", [
        "bench.py", "--starts", "--decompositions", "--methods", "farss", "pissa", "--sequences",
        "5", "--dtype", "bfloat16", "--width", "256", "--mlp", "688", "--json",
        str(tmp_path / "s.json")])
    bench.main()
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["starts"] == {
        "farss": {"here": {"seconds": 1, "bytes": 5e9}},
        "farss / shallow": {"here": {"seconds": 2, "bytes": 5e9}},
        "pissa": {"here": {"seconds": 1, "bytes": 5e9}, "peft": {"seconds": 3, "bytes": 5e9}}}
    assert written["decompositions"] == {"256 x 688": {"a": 1}}
    assert written["dtype"] == written["size"]["dtype"] == "bfloat16" and "commit" in written
    assert "3.0      5.00" in capsys.readouterr().out


def test_peft_is_asked_for_a_method_where_it_is_measured(monkeypatch):
    """An old peft has no KaSA, and all others can be measured beside it."""
    import peft

    monkeypatch.delattr(peft, "KasaConfig")
    assert bench.peft_start("lora") == {}
    assert bench.peft_start("pissa") == {"init_lora_weights": "pissa"}
    assert bench.peft_start("corda-kpm")["corda_config"].corda_method == "kpm"
    assert bench.peft_start("farss") is None
    with pytest.raises(AttributeError, match="KasaConfig"):
        bench.peft_start("kasa")


def test_a_start_is_measured_at_a_models_own_shapes():
    """One block of it, here and in transformers, of which peft's start is measured."""
    for like in ("gemma2-2b", "llama3.2-1b", "smollm2-135m"):
        size = bench.Size.of(like, None, None)
        shapes = {n: tuple(p.shape) for n, p in M.empty(size.config()).named_parameters()}
        whole = {n: tuple(p.shape) for n, p in M.empty(C.MODELS[like][1]).named_parameters()}
        assert {n: x for n, x in whole.items() if ".layers.0." in n} == {
            n: x for n, x in shapes.items() if ".layers." in n}
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**C.config_json(size.config())))
        assert shapes == {n: tuple(p.shape) for n, p in theirs.named_parameters()}
    other = bench.Size.of("llama2-7b", 256, 688)
    assert (other.config().hidden_size, other.config().intermediate_size) == (256, 688)
