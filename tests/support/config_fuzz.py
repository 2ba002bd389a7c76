"""Mutants of the shipped configurations, through the real parser and constructors.

`python -m tests.support.config_fuzz 400` counts.
"""

import contextlib
import copy
import io
import math
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import yaml

from pgpo_lightning.commands.fit import PGPOCommand
from pgpo_lightning.training.rates import build_optimizer
from tests.support import CONFIGS

BASES = {
    "quickstart": [],
    "hapo": ["hapo.yaml"],
    "lora": ["lora.yaml"],
    "rlsd": ["ablations/rlsd.yaml"],
    "drift": ["ablations/drift.yaml"],
    "cepo": ["ablations/cepo.yaml"],
    "opd": ["ablations/opd.yaml"],
    "opsd": ["ablations/opsd.yaml"],
    "placebo": ["ablations/placebo-template.yaml"],
    "tgpo": ["ablations/tgpo.yaml"],
    "srpo": ["ablations/srpo.yaml"],
    "i-sdpo": ["ablations/i-sdpo.yaml"],
    "demopsd": ["ablations/demopsd.yaml"],
    "dw-sdpo": ["ablations/dw-sdpo.yaml"],
    "cgtr": ["ablations/cgtr.yaml"],
    "kl-adaptive": ["ablations/kl-adaptive.yaml"],
    "polyak": ["ablations/polyak.yaml"],
    "target-dose": ["ablations/target-dose.yaml"],
    "centred": ["ablations/centred.yaml"],
    "random": ["ablations/random.yaml"],
}
PARTS = ("model", "data", "multiplier", "checkpoint", "summary")
ODD = [math.nan, math.inf, -math.inf, -1, -0.5, 0, 1e30, 1e-30, 10**30, 1e9, 3.7, "", " ", "abc", "1e-3", "nan", "\u65e5\u672c",
       [], [1, 2], ["a"], {}, {"a": 1}, None, True, False, "../..", "null"]  # fmt: skip
REFUSED = "refused by name"
ACCEPTED = "accepted"
FAULTS = ("refused without the name", "traceback", "accepted nonsense")


class Mutant(NamedTuple):
    """A configuration with one thing wrong, or right in an odd way."""

    base: str
    where: tuple[str, ...]
    how: str
    config: dict[str, Any]


class Parser(PGPOCommand):
    """Has the parser of `pgpo fit`, and builds nothing by itself."""

    def instantiate_classes(self) -> None:
        """Leave it to the caller."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def _set_seed(self) -> None:
        """Nor draw."""


def fit_parser() -> Any:
    """Return the parser of the subcommand `fit`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Parser(["fit", "--config", str(CONFIGS / "quickstart.yaml")]).parser


def parsed(parser: Any, text: str) -> Any:
    """Return what the parser makes of a configuration."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return parser.parse_args(["fit", "--config", file.name])


def resolved(parser: Any) -> dict[str, dict[str, Any]]:
    """Return every base with all defaults written out."""
    found = {}
    for name, overlays in BASES.items():
        files = [CONFIGS / "quickstart.yaml", *(CONFIGS / overlay for overlay in overlays)]
        words = [word for file in files for word in ("--config", str(file))]
        config = parser.parse_args(["fit", *words])
        # Without the seeds, which are linked to the run's.
        full = yaml.safe_load(parser.dump(config, skip_link_targets=True))["fit"]
        found[name] = {key: value for key, value in full.items() if key in (*PARTS, "trainer", "seed_everything")}
    return found


def places(value: Any, *outer: str) -> Iterator[tuple[str, ...]]:
    """Yield the way to everything that can be changed."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*outer, key)
            yield from places(inner, *outer, key)


def mutants(bases: dict[str, dict[str, Any]], count: int, seed: int = 0) -> Iterator[Mutant]:
    """Yield mutants, the same for the same seed: every place is changed before any is changed again."""
    rng = random.Random(seed)
    ways = [(name, way) for name, config in bases.items() for part in PARTS for way in places(config.get(part), part)]
    # Those that every base has are mutated in one of them as often as those that only one has.
    by_way: dict[tuple[str, ...], list[str]] = {}
    for name, way in ways:
        by_way.setdefault(way, []).append(name)
    classes = sorted({_at(bases[name], way) for name, way in ways if way[-1] == "class_path"})
    made = 0
    while made < count:
        order = sorted(by_way)
        rng.shuffle(order)
        for way in order[: count - made]:
            name = rng.choice(by_way[way])
            config = copy.deepcopy(bases[name])
            holder = _at(config, way[:-1])
            kind = rng.random()
            if way[-1] == "class_path" and kind < 0.5:
                value = rng.choice(classes)
                holder[way[-1]], how = value, f"class {value}"
            elif kind < 0.85:
                value = rng.choice(ODD)
                holder[way[-1]], how = value, f"= {value!r:.40}"
            elif kind < 0.92:
                del holder[way[-1]]
                how = "deleted"
            else:
                holder[f"{way[-1]}x"], how = holder.pop(way[-1]), "renamed"
                way = (*way[:-1], f"{way[-1]}x")
            yield Mutant(name, way, how, config)
            made += 1


def outcome(parser: Any, mutant: Mutant) -> tuple[str, str]:
    """Return what came of a mutant, and what was said."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            config = parsed(parser, yaml.safe_dump(mutant.config, allow_unicode=True))
            made = parser.instantiate_classes(config)["fit"]
            _build_optimizer(made.model)
        except SystemExit:
            message = said.getvalue()
        except (ValueError, TypeError, OSError, ImportError) as error:
            message = f"{type(error).__name__}: {error}"
        except Exception as error:
            misconfigured = type(error).__name__ == "MisconfigurationException"
            if not misconfigured:
                return "traceback", f"{type(error).__name__}: {error}"
            message = str(error)
        else:
            odd = list(nonsense(made))
            return (FAULTS[2], ", ".join(odd)) if odd else (ACCEPTED, "")
    names = [part for part in mutant.where if part not in ("init_args", "class_path")]
    named = any(name.removesuffix("x") in message for name in names[-2:])
    return (REFUSED if named else FAULTS[0]), message


def nonsense(made: Any) -> Iterator[str]:
    """Yield the numbers of built objects that no run can mean: not finite, or beyond any size."""
    for part in PARTS:
        for holder in _objects(made.get(part)):
            for name, value in vars(holder).items():
                if isinstance(value, float) and not name.startswith("_"):
                    if not math.isfinite(value) or (value and not 1e-12 <= abs(value) <= 1e12):
                        yield f"{name} = {value}"
                elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**33:
                    yield f"{name} = {value}"


INNER = (
    "engine", "lora", "gate", "rules", "demonstrations", "training_sampling", "update", "mismatch", "reward",
    "student.config", "actor", "actor.verifier", "evaluator.config", "evaluator.sampling", "objective", "objective.config",
    "objective.divergence", "objective.token_weights", "objective.injection", "objective.distillation",
    "objective.policy_gradient", "objective.policy_gradient.config", "objective.teaching.builder",
    "objective.teaching.config", "objective.teaching.config.gate",
)  # fmt: skip
"""Where the parts of what is built are; it has some of them."""


def _objects(value: Any) -> Iterator[Any]:
    if value is None:
        return
    yield value
    for way in INNER:
        each = value
        for name in way.split("."):
            each = getattr(each, name, None)
        if hasattr(each, "__dict__"):
            yield each


def _build_optimizer(module: Any) -> None:
    """Build the optimizer as the module does, of one parameter."""
    build_optimizer(module.optimization.make_optimizer, [torch.nn.Parameter(torch.ones(2, 2))])


def _at(config: Any, way: tuple[str, ...]) -> Any:
    for key in way:
        config = config[key]
    return config


def main(count: int) -> None:
    """Print the counts, and every fault."""
    parser = fit_parser()
    counts: Counter[str] = Counter()
    for mutant in mutants(resolved(parser), count):
        kind, message = outcome(parser, mutant)
        counts[kind] += 1
        if kind in FAULTS or "-v" in sys.argv:
            print(
                f"{kind:26} {mutant.base}: {'.'.join(mutant.where)} {mutant.how}\n      {' '.join(message.split())[-200:]}"
            )
    print(dict(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]))
