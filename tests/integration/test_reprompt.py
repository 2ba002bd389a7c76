"""A reprompt template that fits no question ends a run before it samples."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from tests.support.helpers import loader, questions, tiny_sdpo, trainer


def test_a_template_without_room_for_a_question_is_refused_before_anything_is_sampled(tmp_path):
    module = tiny_sdpo(reprompt_template="{prompt}{solution}{feedback}" + " a" * 200)
    with pytest.raises(
        MisconfigurationException, match=r"takes 203 of `reprompt.max_reprompt_len`=160 tokens by itself"
    ):
        trainer(tmp_path, max_steps=1).fit(module, loader(questions(2)))
