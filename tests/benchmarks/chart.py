"""The comparison as a chart, where matplotlib is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.benchmarks.report import describe

COLOURS = {"encode": "#7f7f7f", "torch": "#d95f02", "openvino": "#1f78b4", "bfloat16": "#33a02c", "int8": "#6a3d9a"}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens a second of every contestant, grouped by corpus.

    Args:
        results: With a comparison.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    corpora = results["compare"]
    names = [row["name"] for row in next(iter(corpora.values()))["rows"]]
    width = 0.86 / len(names)
    figure = Figure(figsize=(max(9.0, 1.6 + 0.85 * len(names) * len(corpora)), 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        rows = [corpus["rows"][place] for corpus in corpora.values()]
        bars = axes.bar(
            [group + (place - (len(names) - 1) / 2) * width for group in range(len(corpora))],
            [row["tokens_per_second"] for row in rows],
            0.92 * width,
            label=name,
            **_look(name),
        )
        axes.bar_label(bars, [_times(row["times_encode"]) for row in rows], padding=2, fontsize=9)
    axes.set_xticks(range(len(corpora)), [_group(name, corpus) for name, corpus in corpora.items()])
    axes.set_xlabel("corpus")
    axes.set_ylabel("tokens a second, median of the rounds")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    title = "Whole jobs, files written, beside SentenceTransformer.encode (×: speed as a multiple of encode's)"
    axes.set_title(f"{title}\n{describe(results['machine'])}", fontsize=9.5, loc="left")
    figure.savefig(path, dpi=150)


def _look(name: str) -> dict[str, Any]:
    """One colour for each model, and stripes for what saves nothing."""
    colour = next(colour for key, colour in reversed(COLOURS.items()) if key in name)
    if name.startswith("bare"):
        return {"color": "white", "edgecolor": colour, "hatch": "///"}
    return {"color": colour, "edgecolor": colour}


def _times(value: float | None) -> str:
    return "" if value is None else f"×{value:.2f}"


def _group(name: str, corpus: dict[str, Any]) -> str:
    return f"{name}\n{corpus['n_texts']:,} texts, {corpus['tokens_of_a_text']['mean']} tokens each on average"
