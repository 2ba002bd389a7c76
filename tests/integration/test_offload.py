"""A teacher on the host in whole steps: the ordinary teacher to the last bit, with one copy on the device at a time."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from pgpo_lightning.models.packing import Sequences
from tests.support.helpers import TOKENIZER, accumulate, random_rows, tiny_model
from tests.support.offload import OWN, module


def steps(kind, offload, tied, autocast):
    made = module(kind, offload, tied, num_iterations=2)
    made.manual_backward = lambda loss: loss.backward()
    made._synchronised = lambda last: torch.enable_grad()
    made.log = lambda *_: None
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    losses, same = [], random_rows(4)
    for rows in (same, same, random_rows(4, 1)):  # the second pass has the teacher's hidden states already
        made.teacher.observe(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(accumulate(made, rows))
        optimizer.step()
        optimizer.zero_grad()
        made.learner.move_teacher()
    return losses, torch.cat([p.detach().flatten() for p in (*made.model.parameters(), *made.teacher.parameters())])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", OWN)
def test_it_is_the_ordinary_teacher_to_the_last_bit(kind, autocast, tied):
    losses, weights = steps(kind, False, tied, autocast)
    ours, our_weights = steps(kind, True, tied, autocast)
    assert losses == ours
    assert len(set(losses)) == 3
    student, teacher = our_weights.view(2, -1)
    assert (teacher != torch.cat([p.flatten() for p in tiny_model(tie_word_embeddings=tied).parameters()])).any() == (
        kind in ("ema", "restart", "gated")
    )
    assert (student != teacher).any()
    assert torch.equal(weights, our_weights)


@pytest.fixture
def autocast_on_meta(monkeypatch, request):
    """Lets the device without data, which the tests take for a GPU, have autocast or not."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: request.param)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())
    # Asks for data: whether several sequences share a row, told by their positions.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *args: None)
    return request.param


@pytest.mark.parametrize("autocast_on_meta", [False, True], indirect=True)
@pytest.mark.parametrize("kind", OWN)
def test_the_device_holds_one_copy_in_the_type_of_the_products_and_only_for_the_pass(kind, autocast_on_meta):
    made = module(kind, True, tied=False)
    made.to("meta")
    pairs = [(row.reprompt_ids, row.rollout.response_ids) for row in random_rows(2)]
    sequences = Sequences.pack(pairs, TOKENIZER.pad_token_id, torch.device("meta"))
    assert {p.device.type for p in made.model.parameters()} == {"meta"}
    assert {p.device.type for p in made.teacher.parameters()} == {"cpu"}
    model = made.teacher.model
    sources = made.teacher.sources(made.model, sequences)
    assert {s.hidden.device.type for s in sources} == {s.head.weight.device.type for s in sources} == {"meta"}
    copies = list(made.teacher.device_copy.copies.values())
    assert all(copy.device.type == "meta" for copy in copies)
    whole = sum(p.nbytes for p in model.parameters())
    narrow = 2 * sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not model.model.embed_tokens.weight)
    buffers = sum(b.nbytes for b in model.buffers())
    assert sum(copy.nbytes for copy in copies) == whole - narrow * autocast_on_meta + buffers
    alive = [weakref.ref(copy) for copy in copies]
    del copies, sources
    made.teacher.release()
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert {p.device.type for p in made.teacher.parameters()} == {"cpu"}
