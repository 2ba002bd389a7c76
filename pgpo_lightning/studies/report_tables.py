"""The tables of a report."""

import math
from typing import Any

from pgpo_lightning.core.files import markdown_table
from pgpo_lightning.studies.analysis import DOSE_TOLERANCE
from pgpo_lightning.studies.conclusion import difference, level, needs_text, number
from pgpo_lightning.studies.measures import MEASURES


def arms(study: dict[str, Any]) -> str:
    """Return the table of the arms of a condition: scores, collapses, length, entropy and dose."""
    doses = ["dose"] if study["multipliers"] else []
    rows = []
    for arm in study["arms"]:
        scores = [level(arm[name]) for name in ("base", *MEASURES)]
        rest = [level(arm["length"], 1), level(arm["entropy"]), *(level(arm[name]) for name in doses)]
        rows.append([arm["arm"], str(arm["seeds"]), *scores, *rest])
    header = ["arm", "seeds", "base", "final", "best (biased upwards)", "area", "length", "entropy", *doses]
    return markdown_table(header, rows)


def collapses(study: dict[str, Any]) -> str:
    """Return the tables of collapsed runs: of arms, and of pairs of arms; empty if no run collapsed."""
    if not any(arm["collapsed"]["count"] for arm in study["arms"]):
        return "No run collapsed."
    rows = []
    for arm in study["arms"]:
        found = arm["collapsed"]
        share = f"{found['count']}/{arm['seeds']} [{found['low']:.2f}, {found['high']:.2f}]"
        step = "" if math.isnan(found["step"]) else f"{found['step']:g}"
        rows.append([arm["arm"], share, step, level(arm["final"]), level(found["living"])])
    by_arm = markdown_table(["arm", "collapsed", "at step", "mean of all runs", "mean of the runs that live"], rows)
    rows = []
    for row in study["collapse"]:
        if any(row["collapsed"]):
            shares = [f"{count}/{runs}" for count, runs in zip(row["collapsed"], row["runs"], strict=True)]
            test = f"{number(row['p'])} ({row['test']})"
            rows.append(
                [
                    f"{row['arm']} − {row['against']}",
                    *shares,
                    test,
                    difference(row["living"]),
                    str(row["living"]["seeds"]),
                ]
            )
    header = ["pair", "collapsed", "of the other", "p", "difference where both live", "seeds"]
    return "\n\n".join([by_arm, markdown_table(header, rows)]) if rows else by_arm


def comparisons(study: dict[str, Any]) -> str:
    """Return the table of all paired differences of a condition."""
    header = ["difference", "seeds", "final", "p", "Holm", "best", "p", "Holm", "area", "p", "Holm"]
    rows = []
    for row in study["comparisons"]:
        results = [row[name] for name in MEASURES]
        cells = [cell for each in results for cell in (difference(each), number(each["p"]), number(each["p_holm"]))]
        rows.append([f"{row['arm']} − {row['against']}", str(row["seeds"]), *cells])
    return markdown_table(header, rows)


def doses(study: dict[str, Any]) -> str:
    """Return the table of doses of information arms and their controls."""
    rows = []
    for row in study["doses"]:
        flag = "matched" if row["matched"] else f"**off by more than {100 * DOSE_TOLERANCE:g} %**"
        cells = [f"{row[name]:.4f}" for name in ("dose", "control_dose", "ratio", "farthest")]
        rows.append([row["arm"], row["control"], *cells, flag])
    return markdown_table(
        ["arm", "control", "dose", "control's dose", "ratio", "ratio of the most different seed", ""], rows
    )


def answers(decided: dict[str, Any]) -> str:
    """Return the table of the differences that answers are based on, and the answers."""
    rows = []
    for arm in decided["arms"]:
        pairs = [f"{arm['arm']} − {row['control']}" for row in arm["comparisons"]]
        rows += [
            [row["measure"], pair, *_cells(row), "", ""] for row, pair in zip(arm["comparisons"], pairs, strict=True)
        ]
        mean = f"**{arm['arm']} − mean of {', '.join(arm['averages'])}**"
        ends = [(number(row["p_equivalent"]), number(row["p_no"])) for row in arm["averaged"]]
        rows += [[row["measure"], mean, *_cells(row), *end] for row, end in zip(arm["averaged"], ends, strict=True)]
    one_sided = decided["arms"][0]["level"]
    width = f"[{100 * (1 - 2 * one_sided):.4g} % interval]" if one_sided else "difference (between two looks)"
    header = ["measure", "information minus control", "seeds", width, "p (yes)", "p (equivalent)", "p (no)"]
    lines = []
    for arm in decided["arms"]:
        line = f"- {arm['arm']}: **{arm['answer']}**, at the one-sided level {arm['level']:.3g}"
        line += f"; largest p of all comparisons {number(arm['p'])}"
        line += f"; missing: {', '.join(arm['missing'])}" if arm["missing"] else ""
        lines.append(line + (f"; needs {needed}" if (needed := needs_text(arm)) else "") + ".")
    return "\n\n".join([markdown_table(header, rows), "\n".join(lines)])


def _cells(row: dict[str, Any]) -> list[str]:
    return [str(row["seeds"]), difference(row), number(row["p"])]


def interactions(content: dict[str, Any]) -> str:
    """Return the table of the tests whether the difference depends on the condition."""
    rows = [
        [
            f"{row['arm']} − mean of {', '.join(row['controls'])}",
            f"{row['first']} minus {row['second']}",
            str(row["seeds"]),
            difference(row),
            number(row["p"]),
            number(row["p_holm"]),
        ]
        for row in content["interaction"]
    ]
    return markdown_table(["difference", "conditions", "seeds", "interaction", "p", "Holm"], rows)


def learnings(content: dict[str, Any]) -> str:
    """Return the table of what the baseline learns under each condition."""
    rows = [
        [
            row["study"],
            difference(row) if "value" in row else "no runs",
            "learns" if row["learns"] else "does not learn",
        ]
        for row in content["learning"]
    ]
    return markdown_table(["condition", f"{content['design']['baseline']}: final minus base", ""], rows)


def tuned(content: dict[str, Any]) -> str:
    """Return the tables of arms under their own best condition."""
    found = content["tuned"]
    rows = [
        [row["arm"], str(row["seeds"]), ", ".join(f"{name} ({n})" for name, n in row["chosen"].items()), level(row)]
        for row in found["arms"]
    ]
    by_arm = markdown_table(["arm", "seeds", "chosen condition (seeds)", found["measure"]], rows)
    rows = [
        [f"{row['arm']} − {row['against']}", str(row["seeds"]), difference(row), number(row["p"])]
        for row in found["comparisons"]
    ]
    return "\n\n".join([by_arm, markdown_table(["difference, tuned", "seeds", found["measure"], "p"], rows)])


def predictions(registration: dict[str, Any]) -> str:
    """Return the table of predictions and what was seen."""
    rows = []
    for row in registration["predictions"]:
        interval = row["interval"]
        predicted = f"{row['predicted']:+.3f}" + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")
        found = row["seen"]
        inside = "" if found is None or found["in_predicted"] is None else _yes(found["in_predicted"])
        cells = (
            ["no runs", "", "", ""]
            if found is None
            else [difference(found), _yes(found["sign"]), inside, _yes(found["in_seen"])]
        )
        rows.append(
            [row["condition"], f"{row['arm']} − {row['against']}", row["measure"], predicted, *cells, row["reason"]]
        )
    header = ["condition", "difference", "measure", "predicted", "seen", "sign", "seen is in the predicted interval"]
    return markdown_table([*header, "predicted is in the interval seen", "reason"], rows)


def _yes(fact: bool) -> str:
    return "yes" if fact else "**no**"
