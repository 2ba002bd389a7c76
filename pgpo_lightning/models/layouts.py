"""In which layouts a model is run: decided once, after it is loaded, by the trials of :mod:`soundness`."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel

from pgpo_lightning.models.packing import Packing
from pgpo_lightning.models.soundness import concatenates, shares_prompts


def packings(model: PreTrainedModel, longest: int, padding_free: bool | None) -> tuple[Packing, Packing]:
    """Return the layouts in which a model computes the same: in training, and as its own teacher in evaluation mode.

    Args:
        model: Student.
        longest: Maximum tokens of prompt and response together in this run.
        padding_free: Whether sequences are concatenated. Null: where attention computes each by itself (flash attention) and the
            model allows it.

    Raises:
        MisconfigurationException: If they should be concatenated and the model does not allow it.
    """
    free = padding_free
    if padding_free or (padding_free is None and str(model.config._attn_implementation).startswith("flash_attention")):
        reason = concatenates(model, longest)
        if reason and padding_free:
            raise MisconfigurationException(
                f"Expected sequences of {type(model).__name__} to have the same log-probabilities alone and in one row, but "
                f"{reason}. Set `update.padding_free` to false."
            )
        free = not reason
    shares = shares_prompts(model, longest)
    shares_untrained = shares or shares_prompts(model, longest, trained=False)
    student, teacher = (Packing("if-cheaper" if each else "never", bool(free)) for each in (shares, shares_untrained))
    return student, teacher
