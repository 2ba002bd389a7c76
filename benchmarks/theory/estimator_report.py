"""The words of :mod:`benchmarks.theory.estimator`."""

from typing import Any

from pgpo_lightning.core.files import markdown_table

NOTES = """\
Values are nats per token (I over a response is a mean over its tokens). **entropy-difference** is Eq. 8 of PGPO, **kl** is
KL(teacher||student), **log-ratio** is log T(y) - log S(y) of the sampled tokens. In square brackets: 95 % intervals, on the toy
over questions. **Error / spread**: a standard error (root of its mean square) over the standard deviation of the estimate over
batches; 1 is calibrated, below 1 overconfident. *Over sequences* assumes independence; *over questions*, as logged, does not.
**Covered**: batches within 1.96 errors of the bank's mean."""

NAMES = ("entropy-difference", "kl", "log-ratio")


def markdown(content: dict[str, Any]) -> str:
    """Return the report.

    Args:
        content: From :func:`benchmarks.theory.estimator.estimator`.
    """
    toy, length = content["toy"], content["length"]
    parts = ["# Estimators of information", NOTES, "# A source with known mutual information"]
    parts += [
        f"## Students and feedback, {length} tokens: exact",
        "`I(Y;F)`: of the responses that the teachers write, which Eq. 8 is meant to be; *sampled*: of responses and feedback as "
        "they are drawn. Feedback is drawn from what the response says of it (own), or independently of it (sibling).",
        markdown_table(
            ["feedback", "student", "I(Y;F)", "sampled", *NAMES],
            [
                [
                    row["pairing"],
                    row["student"],
                    *(f"{row[key]:.4f}" for key in ("truth", "information", "entropy_difference", "kl", "log_ratio")),
                ]
                for row in content["students"]
            ],
        ),
        "## Response length: simulated, calibrated student, own feedback",
        "In brackets: standard deviation of one sequence.",
        markdown_table(
            ["tokens", "I(Y;F) / tokens", *NAMES],
            [
                [str(row["length"]), f"{row['truth']:.4f}"]
                + [f"{_interval(row[name])} ({row[name]['deviation']:.3f})" for name in NAMES]
                for row in content["source_lengths"]
            ],
        ),
        f"## Sequences per batch: the same, {length} tokens, independent sequences",
        markdown_table(
            ["estimator", "sequences", "spread", "error over sequences / spread"],
            [
                [
                    row["estimator"],
                    str(row["sequences"]),
                    f"{row['spread']:.4f}",
                    f"{row['calibration']:.2f}",
                ]
                for row in content["source_batches"]
            ],
        ),
        "## Precision of the logits and top-k: the same",
        "The estimate, and its change from fp32 with the full vocabulary, paired by sequence.",
        _views(content["source_views"]),
        "# The toy model's own rollouts",
        f"{toy['sequences']} rollouts with a teacher, of {toy['questions']} questions with {content['siblings']} rollouts each. "
        "*Design effect*: variance of the mean over that of independent sequences.",
        markdown_table(
            ["estimator", "mean", "sd of a rollout", "design effect"],
            [
                [
                    row["estimator"],
                    _interval(row),
                    f"{row['deviation']:.4f}",
                    _interval(row["design_effect"], ".2f"),
                ]
                for row in toy["estimators"]
            ],
        ),
        "## Batches of whole questions",
        markdown_table(
            [
                "estimator",
                "questions",
                "sequences",
                "spread of I",
                "error over sequences / spread",
                "covered",
                "error over questions / spread",
                "covered",
            ],
            [
                [
                    row["estimator"],
                    str(row["questions"]),
                    f"{row['sequences']:.0f}",
                    f"{row['spread']:.4f}",
                    f"{row['calibration']:.2f}",
                    f"{100 * row['coverage']:.1f} %",
                    f"{row['clustered']:.2f}",
                    f"{100 * row['clustered_coverage']:.1f} %",
                ]
                for row in content["toy_batches"]
            ],
        ),
        "## Questions against siblings, entropy-difference",
        "About the same number of sequences in every row.",
        markdown_table(
            ["questions", "siblings", "sequences", "spread of I", "error over sequences / spread"],
            [
                [
                    str(row["questions"]),
                    str(row["siblings"]),
                    f"{row['sequences']:.0f}",
                    f"{row['spread']:.4f}",
                    f"{row['calibration']:.2f}",
                ]
                for row in content["toy_siblings"]
            ],
        ),
        "## The first tokens of a response",
        "In brackets: standard deviation of one rollout.",
        markdown_table(
            ["tokens at most", "mean tokens", *NAMES],
            [
                [str(row["length"]), f"{row['mean_length']:.1f}"]
                + [f"{_interval(row[name])} ({row[name]['deviation']:.3f})" for name in NAMES]
                for row in content["toy_lengths"]
            ],
        ),
        "## Precision of the logits and top-k",
        "The estimate, and its change from fp32 with the full vocabulary, paired by rollout.",
        _views(content["toy_views"]),
        "## The multiplier",
        f"rho = clip(exp(alpha I), {content['bounds'][0]:g}, {content['bounds'][1]:g}). *Bias*: mean of rho over batches of 32 "
        "questions minus rho of the bank's mean, in brackets that of a normal I. *Sequences*: until the relative spread is below "
        f"{100 * content['spread']:g} %, from alpha times the spread of I; *then*: the relative spread drawn at that size.",
        markdown_table(
            ["estimator", "alpha", "rho", "bias", "relative spread at 32 questions", "sequences", "then"],
            [
                [
                    row["estimator"],
                    f"{row['sensitivity']:g}",
                    f"{row['rho']:.4f}",
                    f"{row['bias']:+.5f} ± {1.96 * row['bias_error']:.5f} ({row['bias_normal']:+.5f})",
                    f"{100 * row['relative']:.2f} %",
                    "at a bound" if row["needed"] is None else f"{row['needed']:.0f}",
                    f"{100 * row['there']:.2f} %",
                ]
                for row in content["multiplier"]
            ],
        ),
        "![bias, spread and calibration](estimator.png)",
        f"**{summary(content)}**",
    ]
    return "\n\n".join(parts) + "\n"


def summary(content: dict[str, Any]) -> str:
    """Return the answer in one sentence."""
    (first, *_) = content["toy"]["estimators"]
    least = min(content["toy_batches"], key=lambda row: (row["estimator"] != "entropy-difference", -row["questions"]))
    needed = ", ".join(
        f"{row['needed']:.0f} at alpha {row['sensitivity']:g}"
        for row in content["multiplier"]
        if row["estimator"] == "entropy-difference" and row["needed"] is not None
    )
    told = (
        f"On the toy I = {_interval(first)} nats per token; at {least['questions']} questions a standard error over sequences is "
        f"{least['calibration']:.2f} of the true spread, over questions {least['clustered']:.2f} "
        f"(design effect {_interval(first['design_effect'], '.2f')})"
    )
    spread = f"{100 * content['spread']:g} %"
    return (
        f"{told}; a relative spread of rho below {spread} takes this many sequences: {needed}."
        if needed
        else f"{told}."
    )


def _views(rows: list[dict[str, Any]]) -> str:
    def cell(told: dict[str, Any]) -> str:
        change = told["change"]
        if change["low"] == change["high"] == 0:
            return f"{told['value']:.4f}"
        return f"{told['value']:.4f}, {_interval(change, '+.5f')}"

    return markdown_table(["seen", *NAMES], [[row["view"], *(cell(row[name]) for name in NAMES)] for row in rows])


def _interval(told: dict[str, float], form: str = ".4f") -> str:
    return f"{told['value']:{form}} [{told['low']:{form}}, {told['high']:{form}}]"
