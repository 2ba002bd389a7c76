"""No mutant of a shipped configuration ends in a traceback, in nonsense that is accepted, or in a refusal without its field."""

from collections import Counter

import pytest

from tests.support import config_fuzz


@pytest.fixture(scope="module")
def parser():
    return config_fuzz.fit_parser()


@pytest.fixture(scope="module")
def bases(parser):
    return config_fuzz.resolved(parser)


@pytest.mark.parametrize("count", [50, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_mutants_of_the_shipped_configurations_are_refused_by_name_or_sound(parser, bases, count):
    counts: Counter[str] = Counter()
    faults = []
    for mutant in config_fuzz.mutants(bases, count, seed=count):
        kind, message = config_fuzz.outcome(parser, mutant)
        counts[kind] += 1
        if kind in config_fuzz.FAULTS:
            faults.append((kind, mutant.base, ".".join(mutant.where), mutant.how, message[-300:]))
    assert not faults
    assert counts[config_fuzz.REFUSED] > count / 2
    assert counts[config_fuzz.ACCEPTED] > 0  # or the mutants would be too crude to tell anything


def test_the_shipped_configurations_themselves_are_accepted(parser, bases):
    for name, config in bases.items():
        mutant = config_fuzz.Mutant(name, ("nothing",), "", config)
        assert config_fuzz.outcome(parser, mutant) == (config_fuzz.ACCEPTED, "")
