"""A checkpoint to a folder that transformers opens."""

import json
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pgpo_lightning.callbacks.checkpoint import newest_checkpoint


def export(checkpoint: str, output: str, weights: Literal["student", "teacher"] = "student") -> None:
    """Write the trained model as a folder for ``AutoModelForCausalLM.from_pretrained``.

    Args:
        checkpoint: A checkpoint file, or the folder of a run, whose newest checkpoint is taken.
        output: The folder to write.
        weights: Whose weights: the student's, or those of a moving teacher.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it holds no such weights.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"Expected a checkpoint or the folder of a run, but {path} does not exist.")
    if path.is_dir() and (path / "checkpoints").is_dir():
        path = newest_checkpoint(path / "checkpoints")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if "pgpo_lightning" not in saved:
        raise ValueError(f"Expected a checkpoint of this program, but {path} is none.")
    prefix = "model." if weights == "student" else "teacher.model."
    state = {name.removeprefix(prefix): value for name, value in saved["state_dict"].items() if name.startswith(prefix)}
    if not state:
        raise ValueError(
            f"Expected the weights of a {weights} in {path}, but it has none: only a moving teacher is saved."
        )
    settings = json.loads(saved["pgpo_lightning"]["architecture"])
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=next(iter(state.values())).dtype)
    model.load_state_dict(state)
    tokenizer = AutoTokenizer.from_pretrained(saved["pgpo_lightning"]["tokenizer"])
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{weights} of {path} -> {output}")
