"""Settings of a study merge as layers: later ones win, and nothing else is lost, added or changed."""

import copy

from hypothesis import given
from hypothesis import strategies as st

from pgpo_lightning.studies.spec import contradiction, leaves, merged, nested

NAMES = st.sampled_from(["model", "lr", "data", "init_args"])
VALUES = st.integers(0, 2) | st.sampled_from(["a", "b"]) | st.none() | st.lists(st.integers(0, 1), max_size=2)
SETTINGS = st.recursive(
    st.dictionaries(NAMES, VALUES, max_size=3),
    lambda inner: st.dictionaries(NAMES, VALUES | inner, max_size=3),
    max_leaves=8,
)


@given(first=SETTINGS, second=SETTINGS)
def test_a_later_layer_wins_and_an_earlier_one_keeps_the_rest(first, second):
    before = copy.deepcopy((first, second))
    result = dict(leaves(merged(first, second)))
    assert (first, second) == before
    later = dict(leaves(second))
    for key, value in later.items():
        # A mapping without keys overrides no mapping.
        assert value == {} or result[key] == value
    kept = {key: value for key, value in leaves(first) if not _touched(key, later)}
    assert {key: result[key] for key in kept} == kept
    assert set(result) <= {*dict(leaves(first)), *later}


def _touched(key, later):
    """Whether a key, one above it or one below it is set later."""
    return any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in later)


@given(first=SETTINGS, second=SETTINGS, third=SETTINGS)
def test_layers_can_be_merged_in_pairs(first, second, third):
    assert merged(merged(first, second), third) == merged(first, second, third)
    assert merged(first, {}) == merged({}, first) == merged(first, first) == first


@given(first=SETTINGS, second=SETTINGS)
def test_layers_contradict_each_other_where_their_order_matters(first, second):
    both = contradiction(first, second)
    assert (both is None) == (merged(first, second) == merged(second, first))
    assert (both is None) == (contradiction(second, first) is None)


@given(settings=SETTINGS)
def test_keys_with_dots_are_the_nested_settings(settings):
    """Every leaf by its dotted key gives the settings back."""
    assert nested("settings", dict(leaves(settings))) == settings
    assert nested("settings", settings) == settings
