"""Folders with models that are teachers of the tiny model."""

from tests.support.helpers import TOKENIZER, tiny_model

LARGER = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3}


def saved(folder, seed=1, tokenizer=TOKENIZER, **settings):
    """Save a model with random weights and its tokenizer, and return the folder."""
    tiny_model(seed, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
