"""A hybrid model in a whole run."""

import pytest
import torch

from pgpo_lightning.modules import SDPO
from tests.support.architectures import tiny
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, questions, trainer


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3_5_text", {}),
        ("qwen3_next", {"gradient_checkpointing": True}),
        pytest.param("mamba", {"teacher_regularization": "frozen"}, marks=pytest.mark.slow),
    ],
)
def test_a_hybrid_is_trained_and_evaluated(name, settings, tmp_path):
    model = tiny(name, vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gaps = []

    class Watching(SDPO):
        def log_dict(self, values, *args, **kwargs):
            gaps.extend(float(value) for key, value in values.items() if key == "rollout_corr/gap")
            super().log_dict(values, *args, **kwargs)

    module = build(Watching,
        model, half_right, tokenizer=TOKENIZER, num_generations=4, eval_samples=2, eval_top_p=0.8, eval_temperature=0.7,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), **(LIMITS | settings),
    )  # fmt: skip
    run = trainer(tmp_path, max_steps=2, val_check_interval=1)
    run.fit(module, loader(questions(4), 2), loader(questions(3), 3))
    assert run.global_step == 2
    assert len(gaps) == 2
    assert max(gaps) < 1e-4
    moved = [key for key, value in module.model.state_dict().items() if not torch.equal(value, before[key])]
    assert any("mixer" in key or "linear_attn" in key for key in moved)
    assert {packing.prompt_sharing for packing in module.learner.packings} == {"never"}
    assert "val/avg@2" in run.callback_metrics
