"""Pictures of what runs left, drawn where matplotlib is installed; and of the method itself.

    python eval.py --plot RUN ...     K against T of all, what was forgotten on the way (runs with
                                      --score-every), each run's ranks, spectra and loss
    python figures.py                 draws the README's picture of the method again

Everything is told apart by shape, line style or brightness too, for who prints in grey.
"""

import math
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import checkpoint
import data
from checkpoint import UserError
from farss import block_index
from settings import is_score, read_ranks

METHOD = Path(__file__).resolve().parent / "method.svg"
MISSING = "no pictures: pip install matplotlib"
MARKERS, LINES = "osD^v*P", ("-", "--", ":", "-.")


def plotting() -> Any:
    """matplotlib.pyplot, which needs no screen; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(pyplot: Any, figure: Any, path: Path) -> None:
    """Equal input, equal file."""
    kind = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with (pyplot.rc_context({"svg.hashsalt": "farss", "svg.fonttype": "none"}),
          checkpoint.atomic(path) as temporary):
        figure.savefig(temporary, dpi=110, metadata=kind, format=path.suffix[1:])
    pyplot.close(figure)


def styles(count: int) -> list[dict[str, Any]]:
    """As many ways to draw a line that differ without colour."""
    pairs = zip(cycle(MARKERS), cycle(LINES), strict=False)
    return [{"marker": m, "linestyle": line} for m, line in islice(pairs, count)]


# ----------------------------------------------------------------------------------- several runs


def by_setting(rows: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """{(method, lr): the rows of its seeds}."""
    groups: dict[tuple[str, float], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["lr"]), []).append(row)
    return groups


def draw_tradeoff(pyplot: Any, rows: list[dict], path: Path) -> None:
    """K against T (Eq. 36, 37), each method a path over its learning rates.

    A row has method, lr, K and T; rows of one method and rate are its seeds.
    """
    figure, axes = pyplot.subplots(figsize=(8.4, 5.6), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method, style in zip(methods, styles(len(methods)), strict=True):
        groups = {lr: g for (name, lr), g in by_setting(rows).items() if name == method}
        points = [[[row[c] for row in groups[lr]] for lr in sorted(groups)] for c in ("T", "K")]
        T, K = ([fmean(values) for values in axis] for axis in points)
        spread = [[stdev(v) if len(v) > 1 else 0.0 for v in axis] for axis in points]
        axes.errorbar(T, K, xerr=spread[0], yerr=spread[1], label=method, capsize=2,
                      elinewidth=0.6, **style)
        for lr, x, y in zip(sorted(groups), T, K, strict=True):
            axes.annotate(f"{lr:g}", (x, y), textcoords="offset points", xytext=(5, -9),
                          fontsize=6)
    axes.set(xlabel="T: task score / that of full fine-tuning (Eq. 37)",
             ylabel="K: knowledge kept (Eq. 36)",
             title="each point a learning rate, bars ± 1 sd over the seeds")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # it would hide points inside
    save(pyplot, figure, path)


def draw_curves(pyplot: Any, curves: dict[str, list[dict]], groups: dict[str, str],
                path: Path) -> None:
    """Scores in % during training, one panel a group of benchmarks: the mean over the group.

    `curves` {run: log lines that have "scores"}, `groups` {benchmark: its panel}.
    """
    panels = list(dict.fromkeys(groups.values()))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4),
                                   layout="constrained", squeeze=False)
    for panel, ax in zip(panels, axes[0], strict=True):
        for (name, lines), style in zip(curves.items(), styles(len(curves)), strict=True):
            scored = [[v for b, v in line["scores"].items() if groups.get(b) == panel
                       and v is not None] for line in lines]
            mean = [fmean(values) if values else math.nan for values in scored]
            ax.plot([line["step"] for line in lines], mean, label=name, markersize=4, **style)
        ax.set(xlabel="optimiser step", ylabel="mean score, %", title=panel)
        ax.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7)
    save(pyplot, figure, path)


# ---------------------------------------------------------------------------------------- one run


def read_log(run: Path) -> list[dict]:
    """log.jsonl, one dict a step; nothing where there is none."""
    path = run / "log.jsonl"
    checkpoint.check_file(path)
    lines = []
    for i, line in enumerate(data.read_file(path), 1) if path.exists() else ():
        numbers = [line.fields.get(key) for key in ("step", "loss")]
        several = [line.fields.get(key, {}) for key in ("validation", "scores")]
        if None in numbers or not all(is_score(x) for x in numbers) or not all(
                isinstance(x, dict) and all(map(is_score, x.values())) for x in several):
            raise UserError(f"{path}:{i}: no line of train.py's")
        lines.append(line.fields)
    return lines


def draw_run(pyplot: Any, run: Path) -> Iterator[Path]:
    """loss.png, ranks.png and spectra.png beside what they show; yields each path."""
    if log := read_log(run):
        draw_loss(pyplot, log, run / "loss.png")
        yield run / "loss.png"
    if (run / "ranks.json").exists():
        draw_ranks(pyplot, read_ranks(run), run / "ranks.png")
        yield run / "ranks.png"
    if (run / "spectra.safetensors").exists():
        spectra = checkpoint.load_tensors(run / "spectra.safetensors")[0]
        draw_spectra(pyplot, spectra, run / "spectra.png")
        yield run / "spectra.png"


def draw_loss(pyplot: Any, log: list[dict], path: Path) -> None:
    """The training loss (nats a response token) of each step, and its mean over 20 steps."""
    figure, ax = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
    steps, loss = [line["step"] for line in log], [line["loss"] for line in log]
    ax.plot(steps, loss, color="0.75", linewidth=0.8, label="each step")
    ax.plot(steps, [fmean(loss[max(0, i - 19) : i + 1]) for i in range(len(loss))], "k-",
            label="mean of the last 20")
    ax.set(xlabel="optimiser step", ylabel="loss, nats a response token")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save(pyplot, figure, path)


def grid_of(layers: dict[str, float]) -> tuple[list[str], list[int], list[list[float]]]:
    """(modules, blocks, values [module][block]) of {layer name: value}, NaN where none is.

    The module is what follows the block's number: q_proj of model.layers.3.self_attn.q_proj;
    RoBERTa's keep what tells them apart (output.dense).
    """
    places: dict[tuple[str, int], float] = {}
    for name, value in layers.items():
        block = block_index(name)
        rest = name.partition(f".{block}.")[2]
        module = rest if rest.endswith("dense") else rest.rpartition(".")[2]
        places[module, block] = value
    modules = list(dict.fromkeys(module for module, _ in places))
    blocks = sorted({block for _, block in places})
    return modules, blocks, [[places.get((m, b), float("nan")) for b in blocks] for m in modules]


def draw_ranks(pyplot: Any, report: dict, path: Path) -> None:
    """ranks.json as a map, blocks from left to right, modules from top to bottom."""
    modules, blocks, ranks = grid_of({n: x["r"] for n, x in report["layers"].items()})
    figure, ax = pyplot.subplots(figsize=(1.8 + 0.42 * len(blocks), 1.1 + 0.34 * len(modules)),
                                 layout="constrained")
    most = max(layer["r"] for layer in report["layers"].values())
    image = ax.imshow(ranks, cmap="Greys", aspect="auto", vmin=0, vmax=1.5 * most)
    for i, row in enumerate(ranks):
        for j, r in enumerate(row):
            if r == r:
                ax.text(j, i, f"{r:.0f}", ha="center", va="center", fontsize=7)
    shallow = report.get("shallow_blocks", 0)
    if shallow in blocks and shallow > blocks[0]:
        ax.axvline(blocks.index(shallow) - 0.5, color="black", linestyle="--", linewidth=1)
    ax.set_xticks(range(len(blocks)), blocks)
    ax.set_yticks(range(len(modules)), modules)
    ax.set(xlabel="block" + (" (dashed: the boundary between shallow and deep)"
                             if shallow else ""))
    figure.colorbar(image, label="rank r", pad=0.01)
    save(pyplot, figure, path)


def draw_spectra(pyplot: Any, spectra: dict[str, Any], path: Path, module: str | None = None
                 ) -> None:
    """Scores s_i (Eq. 15) against σ_i for one module in up to four blocks, taken ones marked.

    `spectra` {layer name: (σ, s, taken)} as in spectra.safetensors; the module is the first that
    the blocks have, unless one is named.
    """
    module = module or grid_of(dict.fromkeys(spectra, 0.0))[0][0]
    names = sorted((n for n in spectra if n.endswith(module)), key=block_index)  # not by letters
    names = [names[round(i * (len(names) - 1) / 3)] for i in range(4)] if len(names) > 4 else names
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(1, len(names), figsize=(3.1 * len(names), 3.1),
                                   layout="constrained", squeeze=False)
    for name, ax in zip(names, axes[0], strict=True):
        sigma, s, taken = spectra[name].tolist()
        for which, marker, label in ((0.0, ".", "left in W"), (1.0, "D", "taken into the adapter")):
            points = [(x, y) for x, y, t in zip(sigma, s, taken, strict=True) if t == which]
            ax.plot([x for x, _ in points], [y for _, y in points], marker, label=label,
                    markersize=4, color="black" if which else "0.6", linestyle="none")
        ax.set(xscale="log", yscale="log", xlabel="singular value σ", title=name)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.title.set_fontsize(7)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("score s = σ² λ γ")
    axes[0][0].legend(fontsize=7)
    save(pyplot, figure, path)


# ------------------------------------------------------------------------------------ the method


def draw_method(pyplot: Any, path: Path = METHOD) -> None:
    """Σ of a layer, scores of its directions, two ends, adapters: the README's picture."""
    figure, axes = pyplot.subplots(1, 4, figsize=(12, 3.2), layout="constrained",
                                   width_ratios=(1.0, 1.15, 1.15, 1.3))
    for ax, title in zip(axes, ("1  measure", "2  score directions (deep, shallow)",
                                "3  give ranks", "4  start the adapters"), strict=True):
        ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    draw_factors(axes[0])
    draw_ends(axes[1])
    draw_budget(axes[2])
    draw_split(axes[3])
    save(pyplot, figure, path)


def box(ax: Any, x: float, y: float, width: float, height: float, text: str, fill: str = "white"
        ) -> None:
    """A labelled rectangle from its lower left corner."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor="black"))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def draw_factors(ax: Any) -> None:
    ax.set(xlim=(0, 10), ylim=(0, 10))
    box(ax, 3.6, 5.6, 2.8, 2.2, "W", "0.9")
    arrow = dict(arrowstyle="->", lw=1.2)
    ax.annotate("", (3.5, 7.1), (1.2, 7.1), arrowprops=arrow)
    ax.annotate("", (8.8, 7.1), (6.5, 7.1), arrowprops=arrow)
    ax.annotate("", (6.5, 6.1), (8.8, 6.1), arrowprops=arrow | dict(linestyle="--"))
    ax.text(1.9, 7.5, "h", fontsize=10, style="italic")
    ax.text(7.4, 5.0, "δ = ∂L/∂y", fontsize=9)
    ax.text(5, 3.1, "Σ_h = E[h hᵀ]    Σ_δ = E[δ δᵀ]", ha="center", fontsize=9)
    ax.text(5, 1.6, "I = Tr(Σ_δ W Σ_h Wᵀ) / mn", ha="center", fontsize=9)
    ax.text(5, 0.2, "from a few task examples", ha="center", fontsize=8, color="0.35")


def draw_ends(ax: Any) -> None:
    """The same falling scores twice: a deep layer takes the first, a shallow one the last."""
    scores = [0.82**i for i in range(14)]
    for offset, chosen, label in ((1.15, range(5), "deep: the R highest"),
                                  (0.0, range(11, 14), "shallow: the r lowest")):
        for i, s in enumerate(scores):
            ax.bar(i, 0.06 + 0.72 * s, 0.8, bottom=offset, edgecolor="black", linewidth=0.6,
                   color="0.25" if i in chosen else "white")
        ax.text(13.6, offset + 0.62, label, ha="right", fontsize=9)
    ax.text(6.5, -0.2, "s = σ² λ γ, falling", ha="center", fontsize=9)
    ax.set(ylim=(-0.3, 2.1))


def draw_budget(ax: Any) -> None:
    """Small, uneven ranks in the shallow blocks; R in the deep ones."""
    for i, r in enumerate((0.12, 0.3, 0.5, *([1.0] * 7))):
        ax.bar(i, r, 0.8, color="0.25" if i > 2 else "0.7", edgecolor="black",
               hatch="" if i > 2 else "///")
    ax.axvline(2.5, color="black", linestyle="--", linewidth=1)
    ax.text(0.95, 0.62, "r ∝ 1 / I\nin [r_min,\nr_max]", ha="center", fontsize=8)
    ax.text(6, 1.05, "r = R", ha="center", fontsize=9)
    ax.text(1, -0.11, "shallow", ha="center", fontsize=9)
    ax.text(6, -0.11, "deep blocks", ha="center", fontsize=9)
    ax.set(ylim=(-0.2, 1.2))


def draw_split(ax: Any) -> None:
    ax.set(xlim=(0, 12), ylim=(0, 10))
    box(ax, 0.2, 3.6, 2.8, 3.6, "W", "0.9")
    ax.text(3.7, 5.2, "=", ha="center", fontsize=14)
    box(ax, 4.4, 3.6, 2.8, 3.6, "W_res")
    ax.text(7.9, 5.2, "+", ha="center", fontsize=14)
    box(ax, 8.5, 3.6, 0.9, 3.6, "B", "0.55")
    box(ax, 9.6, 6.3, 2.3, 0.9, "A", "0.55")
    ax.text(1.6, 2.5, "pretrained", ha="center", fontsize=8)
    ax.text(5.8, 2.5, "frozen", ha="center", fontsize=8)
    ax.text(10.2, 2.5, "trains", ha="center", fontsize=8)
    ax.text(6, 0.6, "B = U' √Σ',  A = √Σ' V'ᵀ: the function is unchanged", ha="center", fontsize=9)


if __name__ == "__main__":
    if (drawing := plotting()) is None:
        raise SystemExit(MISSING)
    draw_method(drawing)
