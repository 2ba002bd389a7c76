"""A run with several kinds of contexts, and the multiplier that knows which one is read."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import OracleMultiplier
from pgpo_lightning.commands.main import main
from pgpo_lightning.modules import GRPO, SDPO
from pgpo_lightning.monitoring.run_record import RunRecord
from tests.support.helpers import LIMITS, TOKENIZER, build, config, half_right, loader, tiny_model, trainer

NO_EVALUATION = ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
ORACLE = ["--multiplier", "OracleMultiplier", "--multiplier.multipliers", "{sibling: 1.5, wrong: 0.5}"]


def curves(folder, *args, steps=8):
    contexts = ["--model.reprompt.contexts", "{kinds: [sibling, wrong], block: 2}"]
    main(["fit", "--config", config(folder, steps), *NO_EVALUATION, *contexts, *args])
    return RunRecord.load(folder)


def test_the_oracle_knows_the_kind_of_every_step(tmp_path):
    record = curves(tmp_path / "run", *ORACLE)
    steps, sibling = record.curves["context/sibling"]
    assert steps == list(range(1, 9))
    assert sum(sibling) == 4
    assert sibling[::2] == sibling[1::2], "blocks of two"
    assert record.curves["context/wrong"][1] == [1.0 - value for value in sibling]
    assert record.rho == [1.5 if value else 0.5 for value in sibling]


def test_a_resumed_run_goes_on_with_the_same_kinds(tmp_path):
    whole = curves(tmp_path / "whole", *ORACLE)
    curves(tmp_path / "part", *ORACLE, steps=3)
    resumed = curves(tmp_path / "part", *ORACLE, "--ckpt_path", "last")
    for tag in ("context/sibling", "critic/score/mean", "lr/multiplier"):
        assert resumed.curves[tag] == whole.curves[tag], tag
    assert resumed.rho == whole.rho


def test_kinds_cannot_change_on_resume(tmp_path):
    curves(tmp_path / "run", steps=3)
    with pytest.raises(MisconfigurationException, match=r"reprompt\.contexts"):
        curves(tmp_path / "run", "--ckpt_path", "last", "--model.reprompt.contexts.block", "1")


@pytest.mark.parametrize(("module_class", "got"), [(SDPO, "none"), (GRPO, "none")])
def test_an_oracle_needs_the_kinds_of_the_run(tmp_path, module_class, got):
    limits = {k: v for k, v in LIMITS.items() if module_class is SDPO or k != "max_reprompt_len"}
    module = build(module_class, tiny_model(), half_right, tokenizer=TOKENIZER, **limits)
    t = trainer(tmp_path, callbacks=[OracleMultiplier({"sibling": 1.0})], max_steps=1)
    with pytest.raises(MisconfigurationException, match=rf"kinds of `reprompt.contexts` \({got}\), but got sibling"):
        t.fit(module, loader(range(2), 1))
