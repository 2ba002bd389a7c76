"""Operations of a step by phase. A multiplication with an addition counts as two operations."""

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from pgpo_lightning.memory_planner.parameters import Count
from pgpo_lightning.memory_planner.workload import Layout


class Recomputed(NamedTuple):
    """The shares of a forward pass through the layers that the backward pass repeats: of products with matrices, of attention."""

    products: float = 0.0
    attention: float = 0.0


NOTHING = Recomputed()


@dataclass(frozen=True)
class Width:
    """The sizes that determine the operations of a forward pass.

    Attributes:
        matrices: Parameters of the layers' matrices that a token is multiplied with.
        attention: Layers times heads times their width.
        head: Parameters of the head, V D.
        last: Parameters of the layers' last matrices.
    """

    matrices: int
    attention: int
    head: int
    last: int = 0

    @classmethod
    def of(cls, config: PretrainedConfig, count: Count) -> "Width":
        """Return the sizes of a configuration."""
        text = config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        matrices = count.matrices + count.experts
        return cls(matrices, count.layers * text.num_attention_heads * width, count.head, count.last)


def forward(width: Width, layout: Layout) -> int:
    """Return the operations of the layers in one forward pass.

    Each padded token is multiplied with every matrix: 2 per parameter. Each pair of query and key takes 2 per number of a head
    for the product, and 2 for the sum of values. Pairs that a causal kernel skips are counted, as in
    ``torch.utils.flop_counter``. A causal kernel therefore needs up to half fewer operations in attention.
    """
    return 2 * width.matrices * layout.padded + 4 * width.attention * layout.pairs


def backward(width: Width, layout: Layout, again: Recomputed = NOTHING, trainable: float = 1.0) -> int:
    """Return the operations of a backward pass through the layers.

    Two products for each product of the forward pass: the gradients of inputs, and of weights if these are trained. Attention
    computes its scores again: five products where the forward pass has two. With checkpointing the forward pass is repeated,
    except a layer's last product: torch stops when it has what the backward pass needs. An adapter runs after that product.

    Args:
        width: Of the model.
        layout: Of the forward pass.
        again: What of the forward pass is repeated.
        trainable: Fraction of the matrices' parameters that are trained.
    """
    products = 2 * width.matrices * layout.padded * (1 + trainable)
    repeated = 2 * (width.matrices - (width.last if trainable == 1.0 else 0)) * layout.padded
    attention = (10 + 4 * again.attention) * width.attention * layout.pairs
    return round(products + again.products * repeated + attention)


def loss(width: Width, tokens: int, teachers: int, trains_head: bool = True) -> int:
    """Return the operations of the loss: a product with every head, and two for the gradients."""
    return 2 * width.head * tokens * (1 + teachers + 1 + trains_head)


def prefill(width: Width, prompts: list[int]) -> int:
    """Return the operations of running prompts once, padded to the longest, with logits of their last tokens."""
    layout = Layout(len(prompts), max(prompts), 0, 0, 0)
    return forward(width, layout) + 2 * width.head * len(prompts)


def decoding(width: Width, prompts: list[int], lengths: list[int]) -> int:
    """Return the operations of decoding all tokens but the first of every response.

    Responses that have ended are not counted. The engine keeps them until a quarter of the batch has ended.
    """
    longest = max(prompts)
    products = 2 * (width.matrices + width.head) * sum(n - 1 for n in lengths)
    pairs = sum(sum(range(longest + 1, longest + n)) for n in lengths)
    return products + 4 * width.attention * pairs
