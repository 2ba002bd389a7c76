"""The command line on real Science Q&A questions, with the real grader: training, evaluation and resume.

Needs the questions in the reference's format, in the folder that the environment variable PGPO_SCIKNOWEVAL names. The model is a
small Qwen3 with random weights and a tokenizer trained on the questions; a minute of supervised training teaches it to answer in
the asked format with some letter, so that about a quarter of its answers are right and there are demonstrations.
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pgpo_lightning.commands.main import main
from pgpo_lightning.data import SciKnowEval
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.helpers import grouped

DATA = os.environ.get("PGPO_SCIKNOWEVAL")
pytestmark = pytest.mark.skipif(not DATA or not Path(DATA).is_dir(), reason="PGPO_SCIKNOWEVAL names no folder")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = "<answer>{}</answer>"


def build_model(folder, questions, steps=120):
    """Tokenizer from the questions, random Qwen3, and the answer format."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    texts = [message["content"] for question in questions for message in question.messages()]
    core.train_from_iterator(
        [*texts, *[ANSWER.format(x) for x in "ABCD"] * 50],
        trainers.BpeTrainer(
            vocab_size=4096,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = random.Random(0)
    for _ in range(steps):
        rows = []
        for question in rng.sample(questions, 4):
            prompt = tokenizer.apply_chat_template(question.messages(), add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            answer = tokenizer(ANSWER.format(rng.choice("ABCD")))["input_ids"]
            rows.append(
                (prompt[-60:], [*answer, tokenizer.eos_token_id])
            )  # the end of the prompt is enough for the format
        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.tensor([[*p, *a, *[0] * (width - len(p) - len(a))] for p, a in rows])
        labels = torch.tensor([[*[-100] * len(p), *a, *[-100] * (width - len(p) - len(a))] for p, a in rows])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.mark.timeout(900)
def test_training_evaluation_and_resume(tmp_path):
    data = SciKnowEval("material", DATA)
    data.setup()
    build_model(tmp_path / "model", data.questions["train"])
    settings = {
        "trainer": {
            "accelerator": "cpu", "max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None,
            "enable_progress_bar": False, "default_root_dir": str(tmp_path / "run"),
        },
        "model": {
            "class_path": "SDPO",
            "init_args": grouped({
                "model": str(tmp_path / "model"),
                "verifier": "pgpo_lightning.rewards.MultipleChoice",
                "num_generations": 8, "max_prompt_length": 900, "max_reprompt_len": 1024, "max_response_length": 48,
                "eval_samples": 4, "include_environment_feedback": False,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
            }),
        },
        "multiplier": {"class_path": "InformationMultiplier", "init_args": {"sensitivity": 1.0}},
        "checkpoint": {"every_n_train_steps": 2},
        "data": {
            "class_path": "SciKnowEval",
            "init_args": {"domain": "material", "path": DATA, "batch_size": 8, "eval_batch_size": 16, "limit_val": 24},
        },
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(path), "--trainer.max_steps", "2"])
    main(["fit", "--config", str(path), "--ckpt_path", "last"])
    scalars = read_scalars(tmp_path / "run")
    print(
        {
            tag: list(scalars[tag].values())
            for tag in ("critic/score/mean", "information/mean", "val/avg@4", "timing_s/step")
        }
    )
    assert sorted(scalars["critic/score/mean"]) == [1, 2, 3, 4]
    assert sorted(scalars["val/avg@4"]) == [0, 2, 4]
    assert 0.05 < scalars["critic/score/mean"][1] < 0.6  # answers in the right format, letters by chance
    assert scalars["self_distillation/reprompt_sample_fraction"][1] > 0.2  # eight groups, each with a success or not
    assert scalars["rollout_corr/log_ratio_max"][4] < 1e-3
    answers = [
        json.loads(line) for line in (tmp_path / "run" / "validation" / "step=000004.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 24
    for answer in answers:
        assert answer["gold"] in "ABCD"
        for text, reward in zip(answer["responses"], answer["rewards"], strict=True):
            read = text.split("<answer>")[-1].split("</answer>")[0].strip()
            assert reward == float(read == answer["gold"])
