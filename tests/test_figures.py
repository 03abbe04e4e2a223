"""figures.py: what stands in a picture is what stands in the files; equal input, equal picture."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as E
import figures
import results as R
import train

pytest.importorskip("matplotlib")
REPO = Path(__file__).resolve().parent.parent
QUICK = ["--steps", "4", "--calibration-examples", "8", "--dropout", "0.1"]
SCORED = ["--score-every", "3", "--score-limit", "10"]


class Recorded:
    """pyplot, but figures stay open, so that a test can look at them."""

    def __init__(self):
        self.pyplot, self.figures = figures.plotting(), []

    def subplots(self, *args, **kwargs):
        figure, axes = self.pyplot.subplots(*args, **kwargs)
        self.figures.append(figure)
        return figure, axes

    def close(self, figure):
        pass

    def __getattr__(self, name):
        return getattr(self.pyplot, name)


@pytest.fixture
def recorded():
    it = Recorded()
    yield it
    for figure in it.figures:
        it.pyplot.close(figure)


def test_the_methods_picture_is_the_one_in_the_repository(tmp_path):
    """SVG with text as text: drawn again it is the same, to the byte."""
    figures.draw_method(figures.plotting(), tmp_path / "method.svg")
    assert (tmp_path / "method.svg").read_bytes() == figures.METHOD.read_bytes()
    assert "method.svg" in (REPO / "README.md").read_text()


def test_grid_of_blocks_and_modules():
    layers = {"model.layers.0.self_attn.q_proj": 1.0, "model.layers.10.self_attn.q_proj": 2.0,
              "model.layers.10.mlp.up_proj": 3.0}
    modules, blocks, values = figures.grid_of(layers)
    assert (modules, blocks) == (["q_proj", "up_proj"], [0, 10])
    assert values[0] == [1.0, 2.0] and values[1][0] != values[1][0] and values[1][1] == 3.0
    encoder = {f"roberta.encoder.layer.3.{rest}": 1.0 for rest in (
        "attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")}
    assert figures.grid_of(encoder)[:2] == (["query", "attention.output.dense",
                                             "intermediate.dense", "output.dense"], [3])


def test_no_two_methods_look_alike_in_grey():
    looks = [tuple(style.values()) for style in figures.styles(13)]
    assert len(set(looks)) == 13


def test_the_map_of_ranks_writes_each_rank(recorded, tmp_path):
    report = {"shallow_blocks": 1, "layers": {
        f"model.layers.{i}.mlp.{m}_proj": {"r": 10 * i + j}
        for i in range(3) for j, m in enumerate(("up", "down"), 1)}}
    figures.draw_ranks(recorded, report, tmp_path / "ranks.png")
    axes = recorded.figures[0].axes[0]
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {
        ((i, j - 1), str(10 * i + j)) for i in range(3) for j in (1, 2)}
    assert [line.get_xdata()[0] for line in axes.lines] == [0.5]  # after the only shallow block


def test_tradeoff_has_the_means_and_spreads(recorded, tmp_path):
    rows = [{"method": m, "lr": lr, "K": K, "T": T} for m, lr, K, T in (
        ("a", 2e-3, 0.4, 0.8), ("a", 2e-3, 0.6, 0.9), ("a", 1e-3, 0.9, 0.1), ("b", 1e-3, 1, 1))]
    figures.draw_tradeoff(recorded, rows, tmp_path / "x.png")
    lines = [c.lines[0] for c in recorded.figures[0].axes[0].containers]
    assert [list(zip(*line.get_data(), strict=True)) for line in lines] == [
        [(0.1, 0.9), (pytest.approx(0.85), pytest.approx(0.5))], [(1, 1)]]


def test_loss_is_drawn_with_its_running_mean(recorded, tmp_path):
    log = [{"step": i + 1, "loss": float(i % 7)} for i in range(30)]
    figures.draw_loss(recorded, log, tmp_path / "loss.png")
    each, mean = recorded.figures[0].axes[0].lines
    assert list(each.get_ydata()) == [x["loss"] for x in log]
    assert mean.get_ydata()[0] == 0.0
    assert mean.get_ydata()[-1] == pytest.approx(sum(x["loss"] for x in log[10:]) / 20)


def test_spectra_of_up_to_four_blocks(recorded, tmp_path):
    spectra = {f"model.layers.{i}.mlp.{m}_proj": torch.tensor(
        [[3.0, 2.0, 1.0], [9.0, 4.0 + i, 1.0], [1.0, 0.0, 0.0]]) for i in range(9)
        for m in ("up", "down")}
    figures.draw_spectra(recorded, spectra, tmp_path / "x.png")
    axes = recorded.figures[0].axes
    assert [ax.get_title() for ax in axes] == [f"model.layers.{i}.mlp.up_proj"
                                               for i in (0, 3, 5, 8)]
    left, taken = axes[1].lines
    assert list(taken.get_data()[1]) == [9.0] and list(left.get_data()[1]) == [7.0, 1.0]
    figures.draw_spectra(recorded, spectra, tmp_path / "x.png", "down_proj")
    assert recorded.figures[1].axes[0].get_title() == "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """FARSS on the microcosm, the second time scored on the way."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("plain", []), ("scored", SCORED)):
        train.main([*QUICK, *more, "--out", str(folder / name)])
    return folder


def test_scoring_on_the_way_changes_nothing(runs):
    """Not the draws of dropout either; and the last scores are those of eval.py."""
    plain, scored = (load_file(runs / name / "adapter.safetensors") for name in ("plain", "scored"))
    assert plain.keys() == scored.keys() and all(plain[k].equal(scored[k]) for k in plain)
    log = figures.read_log(runs / "scored")
    assert [line["step"] for line in log if "scores" in line] == [3, 4]
    assert not any("scores" in line for line in figures.read_log(runs / "plain"))
    E.main([str(runs / "scored"), "--limit", "10"])
    results = R.read_results(runs / "scored")["benchmarks"]
    assert log[-1]["scores"] == {b: r["score"] for b, r in results.items()}


def test_spectra_agree_with_the_adapters(runs):
    """σ of what was taken are those of A0 and B0; as many as the rank; scores fall in s = σ²λγ."""
    spectra = load_file(runs / "plain" / "spectra.safetensors")
    adapter = load_file(runs / "plain" / "adapter.safetensors")
    ranks = json.loads((runs / "plain" / "ranks.json").read_text())["layers"]
    assert spectra.keys() == ranks.keys()
    for name, (sigma, s, taken) in spectra.items():
        norms = adapter[f"{name}.A0"].norm(dim=1) * adapter[f"{name}.B0"].norm(dim=0)
        torch.testing.assert_close(norms.sort().values, sigma[taken == 1].sort().values)
        assert taken.sum() == ranks[name]["r"]
        left = s[taken == 0]
        if ranks[name]["shallow"]:
            assert s[taken == 1].max() <= left.min()
        else:
            assert s[taken == 1].min() >= left.max()


def test_plot_draws_what_is_there(runs, tmp_path, capsys):
    E.main([str(runs / "scored")])
    capsys.readouterr()
    E.main(["--plot", str(runs / "plain"), str(runs / "scored"), "--out", str(tmp_path)])
    drawn = [Path(line) for line in capsys.readouterr().out.split()]
    of_runs = [runs / name / f"{what}.png" for name in ("plain", "scored")
               for what in ("loss", "ranks", "spectra")]
    assert drawn == [*of_runs, tmp_path / "tradeoff.png", tmp_path / "curves.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_run_without_spectra_and_without_results(tmp_path, capsys):
    train.main([*QUICK, "--method", "lora", "--out", str(tmp_path / "lora")])
    said = capsys.readouterr().out
    assert "pictures: loss.png, ranks.png\n" in said
    assert not (tmp_path / "lora" / "spectra.safetensors").exists()
    E.main(["--plot", str(tmp_path / "lora"), "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_without_matplotlib_it_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "plotting", lambda: None)
    train.main([*QUICK, "--method", "lora", "--out", str(tmp_path / "lora")])
    assert capsys.readouterr().out.count("pip install matplotlib") == 1
    with pytest.raises(E.UserError, match="pip install matplotlib"):
        E.main(["--plot", str(tmp_path / "lora")])


def test_what_cannot_be_plotted(tmp_path):
    with pytest.raises(E.UserError, match="no run"):
        E.main(["--plot", str(tmp_path)])
    with pytest.raises(E.UserError, match="scored after every epoch"):
        train.main(["--model", "roberta-base", "--task", "glue:rte", "--dry-run",
                    "--score-every", "5"])
    save_file({"x": torch.zeros(1)}, tmp_path / "spectra.safetensors")  # a folder is no run by it
    with pytest.raises(E.UserError, match="no run"):
        E.main(["--plot", str(tmp_path)])
