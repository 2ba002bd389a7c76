"""Hidden states of a language model, and the head that turns them into logits."""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgpo_lightning.losses.fused import Head, Source
from pgpo_lightning.models.loading import evaluating
from pgpo_lightning.models.packing import Sequences, SharedSequences


def head(model: PreTrainedModel) -> Head:
    """Return a model's language-model head, with the soft cap or scale that some architectures put behind it."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    cap = next((value for name in caps if (value := getattr(config, name, None)) is not None), None)
    return Head(model.get_output_embeddings().weight, scale, cap)


def check_head(model: PreTrainedModel) -> None:
    """Make sure that :func:`head` on hidden states is what the model itself computes.

    Raises:
        MisconfigurationException: If this architecture does something else to its logits.
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
            theirs, ours = logits()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # kernels that know no fp32, as some of linear attention
            tolerance = 3e-2
            with torch.autocast(device.type, torch.bfloat16):
                theirs, ours = logits()
        apart = (ours - theirs).abs().max().item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise MisconfigurationException(
            f"Expected {name} to give its hidden states and then its logits as other causal language models do, but trying it "
            f"ended in {type(error).__name__}: {' '.join(str(error).split())}. This architecture is not supported."
        ) from error
    size = theirs[theirs.isfinite()].abs()  # minus infinity keeps tokens from being drawn
    if theirs.isnan().any() or not len(size):
        raise damaged(name)
    if not torch.allclose(ours, theirs, atol=tolerance * size.max().item() + 1e-6):
        raise MisconfigurationException(
            f"Expected the logits of {name} to be its output embedding applied to its last hidden state, "
            f"but they differ by {apart:.3g}. This architecture is not supported: "
            "`pgpo_lightning.models.lm_head.head` has to learn what it does to its logits."
        )


def damaged(name: str) -> MisconfigurationException:
    """Return what to raise where a model of that name gives NaN."""
    return MisconfigurationException(
        f"Expected finite logits from {name}, but NaN is among them: its weights are damaged, or `dtype` is too narrow. Set "
        "`dtype` to float32, or load the model anew."
    )


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of the model that gives hidden states."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    # Llama 4 and ModernBERT: what is found by that name is something else.
    if found is model or not isinstance(found, PreTrainedModel):
        inner = [part for part in model.children() if isinstance(part, PreTrainedModel)]
        found = inner[0] if len(inner) == 1 else found
    return found


def source(model: PreTrainedModel, sequences: Sequences | SharedSequences, weight: float = 1.0) -> Source:
    """Run the model over whole sequences and keep what predicts the response tokens.

    Args:
        model: Student or teacher.
        sequences: Prompts with responses.
        weight: Weight of this model's logits in a mixture.

    Returns:
        Hidden states ``(N, D)`` of the response positions with the head that belongs to them.
    """
    return Source(sequences.hidden_states(decoder(model), model.config), head(model), weight)
