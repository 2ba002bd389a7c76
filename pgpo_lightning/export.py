"""A checkpoint to a folder that transformers opens."""

import json
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pgpo_lightning.callbacks.checkpoint import newest_checkpoint


def export(
    checkpoint: str, output: str, weights: Literal["student", "teacher"] = "student", tokenizer: str | None = None
) -> None:
    """Write the trained model as a folder for ``AutoModelForCausalLM.from_pretrained``.

    Args:
        checkpoint: A checkpoint file, or the folder of a run, whose newest checkpoint is taken.
        output: The folder to write.
        weights: Whose weights: the student's, or those of a moving teacher.
        tokenizer: Folder or Hub id; by default where the run had it from.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it holds no such weights.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"Expected a checkpoint or the folder of a run, but {path} does not exist.")
    if path.is_dir() and (path / "checkpoints").is_dir():
        path = newest_checkpoint(path / "checkpoints")
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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
    model.generation_config = GenerationConfig.from_dict(json.loads(saved["pgpo_lightning"]["generation"]))
    origin = tokenizer or saved["pgpo_lightning"]["tokenizer"]
    if not origin:
        raise ValueError("Expected `tokenizer`, because the run was given a tokenizer object that came from no folder.")
    AutoTokenizer.from_pretrained(origin).save_pretrained(output)
    model.save_pretrained(output)
    print(f"{weights} of {path} -> {output}")
