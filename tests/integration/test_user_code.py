"""What a user's own code hands in, from Python: batches, engines, multipliers; and one object in several runs."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import InformationMultiplier, StabilityMonitor, StepSizeMultiplier
from pgpo_lightning.core.types import Question
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, questions, tiny_model, trainer


class Altered(TransformersEngine):
    """An engine whose rollouts are changed before it returns them."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def generate(self, *args):
        return self.change(super().generate(*args))


def module(**settings):
    return build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2, **LIMITS | settings)


def emptied(rollouts):
    rollouts[0].response_ids, rollouts[0].log_probs = [], torch.zeros(0)
    return rollouts


def listed(rollouts):
    for rollout in rollouts:
        rollout.log_probs = rollout.log_probs.tolist()
    return rollouts


def too_many(rollouts):
    rollouts[1].log_probs = torch.cat([rollouts[1].log_probs, torch.zeros(1)])
    return rollouts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rollouts: rollouts[::2], "Altered.generate to return 2 rollouts for each of 2 questions"),
        (lambda rollouts: rollouts[::2] + rollouts[1::2], "those to one question next to each other"),
        (lambda rollouts: [rollout.text for rollout in rollouts], "Altered.generate to return a list of Rollout"),
        (lambda rollouts: None, "Altered.generate to return a list of Rollout, but got None"),
        (emptied, "responses of at least one token"),
        (listed, "`log_probs` as a tensor of shape .*, one number per token of the response, but got list"),
        (too_many, "`log_probs` as a tensor of shape"),
    ],
)
def test_rollouts_of_an_engine_are_checked(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, max_steps=1).fit(module(engine=Altered(change)), loader(questions(2)))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            [{"prompt": "1+1=", "answer": "2"}],
            r"list of pgpo_lightning.core.types.Question, but got dict .*collate_fn=list",
        ),
        ({"prompt": ["1+1="], "answer": ["2"]}, "list of pgpo_lightning.core.types.Question, but got dict"),
        ([Question("1+1=", "2"), Question("1+2=", "3")], r"same: \[0, 0\]. Set `index` of each"),
    ],
)
def test_batches_of_a_loader_are_checked(tmp_path, batch, said):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, max_steps=1).fit(module(), torch.utils.data.DataLoader([batch], batch_size=None))


@pytest.mark.parametrize("batch", [[{"prompt": "1+1="}], {"prompt": ["1+1="]}])
def test_held_out_batches_are_checked_too(tmp_path, batch):
    with pytest.raises(ValueError, match=r"Expected a batch to be a list of .*Question, but got dict"):
        trainer(tmp_path).validate(module(), torch.utils.data.DataLoader([batch], batch_size=None), verbose=False)


class Own(StepSizeMultiplier):
    def __init__(self, value):  # as many write it: without super().__init__()
        self.value = value

    def multiplier(self, statistics, step):
        return self.value


@pytest.mark.parametrize("value", [1.5, torch.tensor(1.5), torch.tensor([1.5]), np.float32(1.5)])
def test_a_multiplier_may_return_any_number(tmp_path, value):
    own, made = Own(value), module()
    trainer(tmp_path, max_steps=2, callbacks=[own]).fit(made, loader(questions(4)))
    assert own.history == [1.5, 1.5]
    assert all(type(rho) is float for rho in own.history)
    assert type(made.optimizers().param_groups[0]["lr"]) is float


@pytest.mark.parametrize("value", [None, torch.ones(2), "much"])
def test_what_is_no_number_is_refused(tmp_path, value):
    with pytest.raises(RuntimeError, match="Expected Own to return a number that is finite and at least 0, but got"):
        trainer(tmp_path, max_steps=1, callbacks=[Own(value)]).fit(module(), loader(questions(2)))


def test_a_new_run_begins_without_the_state_of_the_last_one(tmp_path):
    """One multiplier and one monitor for a loop over runs; a Trainer that goes on, and a resumed run, keep the state."""
    multiplier, monitor = InformationMultiplier(), StabilityMonitor()
    for run in range(2):
        made, given = module(), questions(4)
        going = trainer(tmp_path / str(run), max_steps=2, callbacks=[multiplier, monitor])
        going.fit(made, loader(given))
        assert len(multiplier.history) == 2
        assert set(monitor.curves["critic/score/mean"]) == {1, 2}
    going.save_checkpoint(tmp_path / "two.ckpt")
    going.fit_loop.epoch_loop.max_steps = 3
    going.fit(made, loader(given))
    assert len(multiplier.history) == 3
    again = trainer(tmp_path / "again", max_steps=4, callbacks=[multiplier, monitor])
    again.fit(module(), loader(given), ckpt_path=tmp_path / "two.ckpt")
    assert len(multiplier.history) == 4


def test_steps_without_signal_are_those_of_the_run(tmp_path):
    seen = []

    class Notes(StepSizeMultiplier):
        def multiplier(self, statistics, step):
            seen.append(step)
            return 1.0

    made = module()
    made.actor.verifier = lambda question, response: 0.0
    trainer(tmp_path / "nothing", max_steps=2).fit(made, loader(questions(4)))
    assert made.steps_without_signal == 2
    made.actor.verifier = lambda question, response: (0.0, "No.")
    trainer(tmp_path / "something", max_steps=2, callbacks=[Notes()]).fit(made, loader(questions(4)))
    assert seen == [0, 1]
    assert made.steps_without_signal == 0


def test_one_damaged_weight_is_told_apart_from_an_architecture(tmp_path):
    model = tiny_model()
    with torch.no_grad():  # met by none of the first tokens, which the check of the head looks at
        model.get_input_embeddings().weight[20:] = float("nan")
    with pytest.raises(MisconfigurationException, match="weights are damaged"):
        build(SDPO, model, half_right, tokenizer=TOKENIZER, **LIMITS).configure_model()
