"""What many tests share: a tiny random Qwen3 with the toy's tokenizer, a few questions, and a quiet trainer."""

import dataclasses
import inspect
import random
from pathlib import Path

import lightning as L
import torch
import yaml
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from pgpo_lightning import modules
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.data.toy import ToyArithmetic
from pgpo_lightning.models.loading import resolve_model
from pgpo_lightning.modules import SDPO, OnPolicyModule
from pgpo_lightning.modules.moved import MOVED
from pgpo_lightning.training.objective import Preparation

TOKENIZER = AutoTokenizer.from_pretrained(resolve_model("toy"))
MODULES = [getattr(modules, name) for name in modules.__all__ if name != OnPolicyModule.__name__]
"""Every shipped module, so that a new one is tested with the others."""

LIMITS = {"max_prompt_length": 64, "max_reprompt_len": 160, "max_response_length": 12}
GRPO_LIMITS = {name: value for name, value in LIMITS.items() if name != "max_reprompt_len"}


def tiny_model(seed=0, **settings):
    """A Qwen3 of 2 layers with random weights; predictions far from uniform, so that entropies differ."""
    config = Qwen3Config(
        **{
            "vocab_size": len(TOKENIZER),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 64,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "eos_token_id": TOKENIZER.eos_token_id,
            "pad_token_id": TOKENIZER.pad_token_id,
        }
        | settings
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def half_right(question, response):
    """A verdict that depends on the response alone, right about half the time."""
    return float(sum(map(ord, response)) % 2)


def grouped(settings):
    """Arguments of a module from settings by their names alone, whichever group they stand in."""
    arguments = {}
    for name, value in settings.items():
        group, _, field = MOVED.get(name, name).rpartition(".")
        if group:
            arguments.setdefault(group, {})[field] = value
        else:
            arguments[field] = value
    return arguments


def build(cls, *args, **settings):
    """A module of this class from settings by their names alone."""
    parameters = {}
    for each in reversed(cls.__mro__):
        if "__init__" in vars(each):
            parameters |= inspect.signature(each.__init__).parameters
    arguments = {name: settings.pop(name) for name in [*settings] if name in parameters}
    for name, value in grouped(settings).items():
        group = parameters[name].default if isinstance(value, dict) and name in parameters else None
        arguments[name] = dataclasses.replace(group, **value) if dataclasses.is_dataclass(group) else value
    return cls(*args, **arguments)


def tiny_sdpo(seed=0, **settings):
    """An SDPO module around :func:`tiny_model`, ready to run without a trainer."""
    model = settings.pop("model", None) or tiny_model(seed)
    module = build(SDPO, model, settings.pop("verifier", half_right), tokenizer=TOKENIZER, **(LIMITS | settings))
    module.configure_model()
    return module


def prepare(module, samples, rng):
    """What the objective of a module makes of samples, outside of a training step."""
    return module.objective.prepare(samples, Preparation(rng, module.steps, module.learner, module.seed))


def accumulate(module, samples):
    """The loss of an optimizer step, whose gradients and statistics are then where a training step leaves them."""
    step = module.learner.accumulate(samples)
    module.step_statistics = step.statistics
    module.scalars |= step.scalars
    return step.loss


def questions(n=4):
    """The first questions of the toy task."""
    return ToyArithmetic(limit_val=n).load("validation")[:n]


def random_rows(n, seed=0, with_reprompt=True, longest=12):
    """Rows with random token ids, for everything that comes after sampling."""
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(5, len(TOKENIZER)) for _ in range(rng.randint(low, high))]  # noqa: E731
    rows = []
    for i in range(n):
        response = ids(1, longest)
        log_probs = -3.5 - torch.rand(len(response), generator=torch.Generator().manual_seed(seed * 1000 + i))
        rollout = Rollout(Question("?", "1", index=i // 2), ids(3, 20), response, log_probs, "text", True)
        rows.append(Sample(rollout, Verdict(float(i % 2)), ids(10, 40) if with_reprompt else None))
    return rows


def loader(items, batch_size=2):
    """A data loader over anything, in order."""
    return DataLoader(items, batch_size=batch_size, collate_fn=list)


def trainer(folder, **settings):
    """A CPU trainer without logger, progress bar and checkpoints."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return L.Trainer(
        **({"accelerator": "cpu", "default_root_dir": folder, "num_sanity_val_steps": 0} | quiet | settings)
    )


def config(folder, steps=6, **changes):
    """A real run of a few seconds: the toy model, epochs of 3 steps, validation every 2, checkpoints every step, no picture."""
    model = {
        "model": "toy",
        "verifier": "pgpo_lightning.rewards.BoxedAnswer",
        "num_generations": 4,
        "max_prompt_length": 64,
        "max_reprompt_len": 160,
        "max_response_length": 24,
        "eval_samples": 2,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        "scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}},
    }
    settings = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": changes.pop("module", "SDPO"), "init_args": grouped(model | changes.pop("model", {}))},
        "data": {
            "class_path": "ToyArithmetic",
            "init_args": {"batch_size": 4, "eval_batch_size": 8, "limit_train": 13, "limit_val": 8},
        },
        "multiplier": {"class_path": "RandomMultiplier", "init_args": {"low": 0.5, "high": 1.5}},
        "checkpoint": {"every_n_train_steps": 1, "keep": None},
        "summary": {"picture": False},  # drawing takes as long as three steps
    }
    path = Path(folder).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings | changes))
    return str(path)
