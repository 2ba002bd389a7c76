"""What a module does with the arguments that all modules share, and what it is told if it sets no objective."""

import inspect

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from pgpo_lightning import InformationMultiplier, OnPolicyModule
from tests.support.helpers import MODULES, TOKENIZER, build, half_right, loader, questions, tiny_model, trainer

COMMON = list(inspect.signature(OnPolicyModule.__init__).parameters.values())[1:]


class Anything:
    """An argument whatever is asked of it."""

    def __getattr__(self, name):
        return self


class Passed(Exception):  # noqa: N818  (it is no error)
    """Ends an ``__init__`` where it has passed its arguments on."""


@pytest.mark.parametrize("module", MODULES)
def test_every_common_argument_has_the_common_default_and_arrives_under_its_own_name(module, monkeypatch):
    def passed(self, **arguments):
        raise Passed(arguments)

    parameters = inspect.signature(module.__init__).parameters
    assert [parameters[parameter.name] for parameter in COMMON] == COMMON
    given = {name: Anything() for name in parameters if name != "self"}
    monkeypatch.setattr(OnPolicyModule, "__init__", passed)
    with pytest.raises(Passed) as arrived:
        inspect.unwrap(module.__init__)(module.__new__(module), **given)
    assert arrived.value.args[0] == {parameter.name: given[parameter.name] for parameter in COMMON}


class Bare(OnPolicyModule):
    """Forgets its objective."""


@pytest.mark.parametrize("callbacks", [[], [InformationMultiplier()]], ids=["alone", "with-multiplier"])
def test_a_module_without_an_objective_is_told_to_set_one(tmp_path, callbacks):
    module = build(Bare, tiny_model(), half_right, tokenizer=TOKENIZER, max_prompt_length=64, max_response_length=12)
    with pytest.raises(MisconfigurationException, match=r"Expected Bare to set `self.objective` in its `__init__`"):
        trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(module, loader(questions(4), 4))


def test_an_objective_with_weights_of_its_own_is_found():
    module = build(Bare, tiny_model(), half_right, tokenizer=TOKENIZER, max_prompt_length=64, max_response_length=12)
    module.objective = objective = nn.Linear(1, 1)
    assert module.objective is objective
    assert "objective.weight" in module.state_dict()
