"""The order of the training questions: complete, different per epoch, and exact after every cut."""

import itertools
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from pgpo_lightning.data import ResumableSampler
from tests.support.orders import Numbers


def stream(count: int, **kwargs) -> list[int]:
    """The first indices of a sampler, over as many epochs as it takes."""
    sampler = ResumableSampler(**kwargs)
    return list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(sampler)), count))


def test_every_epoch_is_another_permutation():
    epochs = [tuple(stream(60, size=12, batch_size=3, seed=5)[start : start + 12]) for start in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len(set(epochs)) == 5


def test_order_depends_on_seed_and_epoch_separately():
    first, second = (ResumableSampler(size=50, batch_size=5, seed=seed) for seed in (0, 1))
    assert first.order(0) != second.order(0)
    assert first.order(1) != second.order(0)  # seed + epoch would make these two equal
    assert first.order(1) == ResumableSampler(size=50, batch_size=5, seed=0).order(1)


def test_incomplete_last_batch_is_dropped():
    sampler = ResumableSampler(size=11, batch_size=2, world_size=2)
    assert len(sampler) == 4
    assert len(set(sampler)) == 4
    assert sampler.consumed == 4


@pytest.mark.parametrize("cut", range(31))
def test_continues_at_every_cut(cut):
    arguments = {"size": 11, "batch_size": 2, "seed": 7, "rank": 1, "world_size": 2}  # 4 indices in each epoch
    assert stream(31 - cut, consumed=cut, **arguments) == stream(31, **arguments)[cut:]


def test_counts_what_was_handed_out():
    sampler = ResumableSampler(size=10, batch_size=2)
    loader = iter(DataLoader(list(range(10)), batch_size=2, sampler=sampler, collate_fn=list, drop_last=True))
    assert sampler.consumed == 0
    taken = next(loader) + next(loader)
    assert sampler.consumed == 4
    assert taken == sampler.order(0)[:4]


def test_position_is_read_at_the_first_index():
    sampler = ResumableSampler(size=10, batch_size=2)
    iterator = iter(sampler)
    sampler.consumed = 12
    assert next(iterator) == sampler.order(1)[2]


def test_a_loop_that_stops_early_goes_on_in_its_next_epoch():
    sampler = ResumableSampler(size=9, batch_size=3)
    seen = [index for _ in range(3) for index in itertools.islice(sampler, 6)]
    assert seen == sampler.order(0) + sampler.order(1)


@pytest.mark.parametrize("consumed", [0, 3, 12])
def test_two_ranks_share_the_batches_of_one(consumed):
    ranks = [stream(30, size=14, batch_size=3, seed=2, rank=r, world_size=2, consumed=consumed) for r in (0, 1)]
    one = stream(60, size=14, batch_size=6, seed=2, consumed=2 * consumed)
    together = [ranks[r][step : step + 3] for step in range(0, 30, 3) for r in (0, 1)]
    assert list(itertools.chain.from_iterable(together)) == one


def test_set_epoch_changes_nothing():
    sampler, other = (ResumableSampler(size=10, batch_size=2) for _ in range(2))
    sampler.set_epoch(3)
    assert list(sampler) == list(other)


def test_too_few_questions():
    with pytest.raises(ValueError, match=r"at least one batch of questions, 8 \(batch_size 4 x 2 processes\).*got 7"):
        ResumableSampler(size=7, batch_size=4, world_size=2)


# --- the position in a checkpoint ---


def fresh(trainer: SimpleNamespace | None = None, **kwargs) -> Numbers:
    data = Numbers(**({"train": 20, "batch_size": 4} | kwargs))
    data.trainer = trainer
    data.setup("fit")
    return data


def test_position_is_restored_before_and_after_the_loader_is_built():
    whole, used, before, after = (fresh() for _ in range(4))
    loader = whole.train_dataloader()
    order = [*loader, *loader]  # two epochs
    batches = iter(used.train_dataloader())
    for _ in range(3):
        next(batches)
    state = used.state_dict()
    assert state == {"consumed": 12, "size": 20, "seed": 0, "batch_size": 4, "world_size": 1}
    before.load_state_dict(state)
    assert before.state_dict() == state
    loader = after.train_dataloader()
    after.load_state_dict(state)
    for resumed in (before.train_dataloader(), loader):
        assert list(resumed) == order[3:8]


def test_no_position_without_a_training_loader():
    assert fresh().state_dict() == {}


def test_position_with_more_devices():
    state = {"consumed": 12, "size": 20, "seed": 0, "batch_size": 4, "world_size": 1}
    expected = fresh()
    expected.load_state_dict(state)
    batch = next(iter(expected.train_dataloader()))
    halves = []
    for rank in (0, 1):
        data = fresh(SimpleNamespace(global_rank=rank, world_size=2, global_step=0), batch_size=2)
        data.trainer.state = SimpleNamespace(fn=TrainerFn.FITTING)
        data.load_state_dict(state)
        halves += next(iter(data.train_dataloader()))
    assert halves == batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 21}, "Expected 20 training questions as in the checkpoint, but got 21"),
        ({"limit_train": 8}, "Expected 20 training questions as in the checkpoint, but got 8"),
        ({"seed": 1}, "Expected 0 as data seed as in the checkpoint, but got 1"),
        ({"batch_size": 5}, "Expected 4 questions per step as in the checkpoint, but got 5"),
    ],
)
def test_position_in_other_data(changes, message):
    state = {"consumed": 12, "size": 20, "seed": 0, "batch_size": 4, "world_size": 1}
    data = fresh(**changes)
    data.load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()
    data = fresh(**changes)
    data.train_dataloader()
    with pytest.raises(ValueError, match=message):
        data.load_state_dict(state)
