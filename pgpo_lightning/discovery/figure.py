"""The picture of a comparison: discovery against generations, tokens and seconds."""

from typing import IO, Any

from matplotlib.figure import Figure

from pgpo_lightning.discovery.outcomes import AXES


def draw_discovery(content: dict[str, Any], file: IO[bytes]) -> None:
    """Draw one panel per axis, with 95 % intervals over questions and seeds.

    Args:
        content: From :func:`pgpo_lightning.discovery.analysis.analyse`.
        file: Where the PNG goes.
    """
    figure = Figure(figsize=(4.6 * len(AXES), 4.2), layout="constrained")
    axes = figure.subplots(1, len(AXES), sharey=True)
    for place, name in zip(axes, AXES, strict=True):
        for i, method in enumerate(content["methods"]):
            curve = method[name]["curve"]
            style = {"color": f"C{i % 10}", "linestyle": "--" if method["name"] == content["baseline"] else "-"}
            place.step(curve["at"], curve["value"], where="post", linewidth=1.4, label=method["name"], **style)
            place.fill_between(curve["at"], curve["low"], curve["high"], step="post", color=style["color"], alpha=0.08)
        place.set_xlabel(name, fontsize=9)
        place.tick_params(labelsize=8)
        place.grid(alpha=0.3)
        place.set_ylim(0, 1)
    axes[0].set_ylabel("share of runs with a success", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), fontsize=8)
    figure.savefig(file, dpi=110)
