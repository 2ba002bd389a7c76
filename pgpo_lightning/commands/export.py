"""The command ``pgpo export``: write a checkpoint as a model folder for transformers."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jsonargparse
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from pgpo_lightning.checkpoints.finding import PATTERN, best_checkpoint, newest_checkpoint
from pgpo_lightning.checkpoints.sharded import INDEX, read_shards
from pgpo_lightning.checkpoints.single_file import read_file
from pgpo_lightning.commands.hub import check_access, upload
from pgpo_lightning.commands.mistakes import brief
from pgpo_lightning.commands.model_card import model_card
from pgpo_lightning.core.errors import as_user_error
from pgpo_lightning.models.loading import resolve_model
from pgpo_lightning.models.lora import merged, write_adapter


def export(
    checkpoint: str,
    output: str,
    weights: Literal["student", "teacher"] = "student",
    tokenizer: str | None = None,
    lora: Literal["merged", "adapter"] | None = None,
    base: str | None = None,
    which: Literal["last", "best"] | None = None,
    push: str | None = None,
    private: bool | None = None,
) -> None:
    """Write a trained model as a folder for ``AutoModelForCausalLM.from_pretrained``.

    Args:
        checkpoint: A checkpoint (a file or a folder of shards), or the folder of a run, whose newest checkpoint is used.
        output: The folder to write.
        weights: The student's weights, or those of a moving teacher.
        tokenizer: Folder, Hub id or ``toy``; by default the tokenizer of the run.
        lora: For a run with `lora`: ``merged`` (default) adds the adapter to the base model's weights; ``adapter`` writes the
            adapter alone, for ``peft.PeftModel.from_pretrained``.
        base: Folder or Hub id of the base model that the adapter is merged into; by default the base model of the run.
        which: Of the folder of a run, the last checkpoint (default) or the best one of its ``ModelCheckpoint``.
        push: Upload the folder to this repository of the Hugging Face Hub, ``owner/name``, which is created if it does not exist.
            By default nothing leaves the machine. The model card holds the configuration: look at it before.
        private: Whether a repository that `push` creates is private; by default as your account says.

    Raises:
        DamagedCheckpointError: If the checkpoint is not complete.
        FileNotFoundError: If there is no checkpoint.
        MisconfigurationException: If the base model is not the one that the adapter was trained on.
        ValueError: If the checkpoint has no such weights, if a setting would have no effect, or if the Hub refuses the upload.
    """
    path = _find(Path(checkpoint), which)
    if push is not None:
        check_access(push)
    elif private is not None:
        raise ValueError(f"Expected no `private` without `push`, where it has no effect, but got {private}.")
    prefix = "model." if weights == "student" else "teacher.model."
    if path.is_dir():
        saved = read_shards(path, lambda name: name.startswith(f"state_dict.{prefix}"))
    else:
        saved = read_file(path, mmap=True)
    if "pgpo_lightning" not in saved:
        raise ValueError(f"Expected a checkpoint of this program, but {path} was written by another program.")
    tensors = saved.get("state_dict", {}).items()
    state = {name.removeprefix(prefix): value for name, value in tensors if name.startswith(prefix)}
    if not state:
        raise ValueError(
            f"Expected the weights of a {weights} in {path}, but it has none: only a moving teacher is saved."
        )
    about = saved["pgpo_lightning"]
    if about.get("lora") is None and (lora or base):
        name, value = ("lora", lora) if lora else ("base", base)
        raise ValueError(f"Expected no `{name}` with a checkpoint of whole weights, but got {value}.")
    if lora == "adapter" and base:
        raise ValueError(f"Expected no `base` with `lora` adapter, where it has no effect, but got {base}.")
    origin = tokenizer or about["tokenizer"]
    if not origin:
        raise ValueError("Expected `tokenizer`, because the run was given a tokenizer object that came from no folder.")
    with as_user_error(f"the tokenizer of `{origin}`"):
        AutoTokenizer.from_pretrained(resolve_model(origin)).save_pretrained(output)
    if lora == "adapter":
        write_adapter(output, state, about["lora"])
    else:
        model = _whole(state, about) if about.get("lora") is None else _merged(state, about["lora"], base)
        model.generation_config = GenerationConfig.from_dict(json.loads(about["generation"]))
        model.save_pretrained(output)
    card = model_card(saved, path, weights, adapter=lora == "adapter")
    (Path(output) / "README.md").write_text(card, encoding="utf-8")
    print(f"{weights} of {path} -> {output}")
    if push is not None:
        print(f"{output} -> {upload(output, push, private)}")


def _find(path: Path, which: Literal["last", "best"] | None) -> Path:
    """Return the checkpoint that is meant.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If `which` chooses among nothing.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected a checkpoint or the folder of a run, but {path} does not exist.")
    if path.is_file() or (path / INDEX).is_file():
        if which is not None:
            raise ValueError(f"Expected no `which` with one checkpoint, where it has no effect, but got {which}.")
        return path
    inner = path / "checkpoints"
    if not any(inner.glob(PATTERN)):
        raise FileNotFoundError(f"Expected a checkpoint or the folder of a run, but {path} has no checkpoint.")
    return best_checkpoint(inner) if which == "best" else newest_checkpoint(inner, resume=False)


def _whole(state: dict[str, Tensor], about: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(**json.loads(about["architecture"]))
    model = AutoModelForCausalLM.from_config(config, dtype=next(iter(state.values())).dtype)
    model.load_state_dict(state)
    return model


def _merged(state: dict[str, Tensor], identity: dict[str, Any], base: str | None) -> PreTrainedModel:
    with TemporaryDirectory() as folder:
        write_adapter(folder, state, identity)
        return merged(folder, identity, base)


def main(args: list[str]) -> None:
    """Run ``pgpo export``.

    Args:
        args: Without the program's name and `export`.
    """
    parser = jsonargparse.ArgumentParser(prog="pgpo export", description=(export.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(export, as_group=False, as_positional=True)
    export(**brief(parser, ["export", *args]).parse_args(args).as_dict())
