"""Hidden states of a language model, and the head that turns them into logits."""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgpo_lightning.losses.logits import Head, Source
from pgpo_lightning.models.loading import evaluating
from pgpo_lightning.models.packing import PackedSequences


def head(model: PreTrainedModel) -> Head:
    """Return a model's language-model head, with the scale or soft cap that some architectures apply to their logits."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    cap = next((value for name in caps if (value := getattr(config, name, None)) is not None), None)
    return Head(model.get_output_embeddings().weight, scale, cap)


def check_head(model: PreTrainedModel) -> None:
    """Check that :func:`head`, applied to hidden states, gives the model's own logits.

    Raises:
        MisconfigurationException: If they differ, so that this architecture is not supported, or if they contain NaN.
    """
    name, device = type(model).__name__, next(model.parameters()).device
    ids = torch.arange(min(4, model.config.get_text_config().vocab_size), device=device).unsqueeze(0)

    def logits() -> tuple[Tensor, Tensor]:
        with evaluating(model), torch.no_grad():
            hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
            return model(input_ids=ids, use_cache=False).logits.float(), head(model)(hidden).float()

    tolerance = 1e-3
    try:
        try:
            own, computed = logits()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # some kernels of linear attention have no fp32 version
            tolerance = 3e-2
            with torch.autocast(device.type, torch.bfloat16):
                own, computed = logits()
        difference = (computed - own).abs().max().item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise MisconfigurationException(
            f"Expected {name} to give its hidden states and then its logits as other causal language models do, but a trial "
            f"raised {type(error).__name__}: {' '.join(str(error).split())}. This architecture is not supported."
        ) from error
    size = own[own.isfinite()].abs()  # minus infinity masks tokens that must not be sampled
    if own.isnan().any() or not len(size):
        raise damaged(name)
    if not torch.allclose(computed, own, atol=tolerance * size.max().item() + 1e-6):
        raise MisconfigurationException(
            f"Expected the logits of {name} to be its output embedding applied to its last hidden state, "
            f"but they differ by {difference:.3g}. This architecture is not supported: "
            "`pgpo_lightning.models.lm_head.head` does not know what it does to its logits."
        )


def damaged(name: str) -> MisconfigurationException:
    """Return the error for a model whose logits contain NaN, given its name."""
    return MisconfigurationException(
        f"Expected finite logits from {name}, but NaN is among them: its weights are damaged, or `model_config.dtype` "
        f"is too narrow. Set "
        "`model_config.dtype` to float32, or load the model again."
    )


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the submodule that computes hidden states."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    # In Llama 4 and ModernBERT that name refers to something else.
    if found is model or not isinstance(found, PreTrainedModel):
        inner = [part for part in model.children() if isinstance(part, PreTrainedModel)]
        found = inner[0] if len(inner) == 1 else found
    return found


def source(model: PreTrainedModel, sequences: PackedSequences, weight: float = 1.0) -> Source:
    """Run the model on whole sequences, and return the hidden states that predict the response tokens.

    Args:
        model: Student or teacher.
        sequences: Prompts with responses.
        weight: Weight of this model's logits in a mixture.

    Returns:
        Hidden states ``(N, D)`` of the response positions, with the model's head.
    """
    return Source(sequences.hidden_states(decoder(model), model.config), head(model), weight)
