"""The report of a comparison as Markdown."""

import math
from typing import Any

from pgpo_lightning.core.files import markdown_table
from pgpo_lightning.discovery.outcomes import AXES
from pgpo_lightning.discovery.pass_rates import PassRate


def markdown(content: dict[str, Any], rates: list[PassRate], picture: str) -> str:
    """Return the report.

    Args:
        content: From :func:`pgpo_lightning.discovery.analysis.analyse`.
        rates: Of the questions, where they were measured.
        picture: File of the picture.
    """
    runs = sum(method["runs"] for method in content["methods"])
    complete = sum(method["complete"] for method in content["methods"])
    parts = [
        "# Discovery",
        f"{len(content['questions'])} questions, {len(content['seeds'])} seeds, {len(content['methods'])} methods, at most "
        f"{content['budget']} attempts per run. {complete} of {runs} runs with attempts have ended.",
        "## discovery@k",
        _discovery(content),
        f"![discovery]({picture})",
        "## Cost to the first success",
        _costs(content),
        *_comparisons(content),
        *_predictions(content),
        "## By question",
        _by_question(content, rates),
        "## How to read it",
        HOW,
    ]
    return "\n\n".join(parts) + "\n"


HOW = """\
- **discovery@k**: probability of a success within k generations, the Kaplan-Meier estimate. A run that ended without a success is
  censored: it counts as not solved up to there. In brackets: 95 % interval of a bootstrap over questions and seeds at once.
- **mean**: restricted mean, of the cost until the first success or until the horizon, whichever is less. It is a lower bound of
  the mean cost. The horizon is the budget; in tokens and seconds it is the largest cost that every method has reached.
- **ratio**: of the restricted means. Below 1 the method is faster than the baseline.
- **p**: log-rank test against the baseline, stratified by question, corrected for the number of methods (Holm). Runs of one
  question and seed begin with the same draws, so the test is approximate; the bootstrap keeps such pairs together.
- **tokens**: through the model: prompts and responses of attempts, and what student and teacher read for updates.
- **seconds**: wall-clock, and therefore only comparable if the machine was equally busy."""


def _discovery(content: dict[str, Any]) -> str:
    at = list(content["methods"][0]["discovery_at"])
    picked = [k for k in at if int(k) in (1, 16, 64, 256, 1024) or int(k) == content["budget"]]
    rows = [
        [method["name"], f"{method['found']}/{method['runs']}", *(_share(method["discovery_at"][k]) for k in picked)]
        for method in content["methods"]
    ]
    return markdown_table(["method", "found/runs", *(f"@{k}" for k in picked)], rows, "l" + "r" * (len(picked) + 1))


def _costs(content: dict[str, Any]) -> str:
    header = ["method"]
    for axis in AXES:
        header += [f"{axis}: mean up to {content['horizons'][axis]:,.4g}", "median"]
    rows = []
    for method in content["methods"]:
        row = [method["name"]]
        for axis in AXES:
            row += [_amount(method[axis]["mean"]), _median(method[axis]["median"])]
        rows.append(row)
    return markdown_table(header, rows, "l" + "r" * (len(header) - 1))


def _comparisons(content: dict[str, Any]) -> list[str]:
    if not content["comparisons"]:
        return []
    header = ["method", f"difference of discovery@{content['budget']}"]
    for axis in AXES:
        header += [f"ratio of mean {axis}", "p"]
    rows = []
    for row in content["comparisons"]:
        cells = [row["method"], _signed(row["generations"]["difference"])]
        for axis in AXES:
            p = row[axis]["p_holm"]
            cells += [_share(row[axis]["ratio"]), "-" if math.isnan(p) else f"{p:.3g}"]
        rows.append(cells)
    return [f"## Against {content['baseline']}", markdown_table(header, rows, "l" + "r" * (len(header) - 1))]


def _predictions(content: dict[str, Any]) -> list[str]:
    if not content["predictions"]:
        return []
    rows = []
    for row in content["predictions"]:
        seen = row["seen"]
        low, high = row["interval"]
        cells = [f"{row['method']} - {row['against']}", f"@{row['at']}", f"{low:+.2f} to {high:+.2f}"]
        cells += ["not seen", "-"] if seen is None else [_signed(seen), "yes" if row["inside"] else "no"]
        rows.append([*cells, row["reason"]])
    header = ["difference", "k", "predicted", "seen", "inside", "reason"]
    return ["## Predictions", markdown_table(header, rows, "lrrrll")]


def _by_question(content: dict[str, Any], rates: list[PassRate]) -> str:
    names = [method["name"] for method in content["methods"]]
    known = {rate.index: f"{rate.rate:.4f} ({rate.successes}/{rate.samples})" for rate in rates}
    rows = [
        [str(row["question"]), known.get(row["question"], "-"), *(f"{row[n]['found']}/{row[n]['runs']}" for n in names)]
        for row in content["by_question"]
    ]
    return markdown_table(["question", "base success rate", *names], rows, "rr" + "r" * len(names))


def _share(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _signed(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"


def _amount(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:,.4g} [{estimate['low']:,.4g}, {estimate['high']:,.4g}]"


def _median(value: float) -> str:
    return "not reached" if value == float("inf") else f"{value:,.4g}"
