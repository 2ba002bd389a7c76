"""The resumable sampler for any number of questions, ranks and steps."""

from itertools import islice

from hypothesis import assume, given
from hypothesis import strategies as st

from pgpo_lightning.data.sampler import ResumableSampler

SIZES = {"size": st.integers(1, 60), "batch": st.integers(1, 5), "world": st.integers(1, 4), "seed": st.integers(0, 9)}


def endless(sampler):
    """Indices over as many epochs as one likes."""
    while True:
        yield from sampler


@given(**SIZES, epoch=st.integers(0, 50))
def test_an_epoch_is_a_permutation_that_ranks_share_out(size, batch, world, seed, epoch):
    assume(size >= batch * world)
    ranks = [ResumableSampler(size, batch, seed, rank, world).order(epoch) for rank in range(world)]
    given_out = [index for order in ranks for index in order]
    assert len(given_out) == len(set(given_out)) == size // (batch * world) * batch * world
    assert set(given_out) <= set(range(size))
    assert {len(order) for order in ranks} == {len(given_out) // world}


@given(**SIZES, epoch=st.integers(0, 50))
def test_the_questions_of_a_step_do_not_depend_on_the_number_of_ranks(size, batch, world, seed, epoch):
    assume(size >= batch * world)
    one = ResumableSampler(size, batch * world, seed).order(epoch)
    ranks = [ResumableSampler(size, batch, seed, rank, world).order(epoch) for rank in range(world)]
    for step in range(size // (batch * world)):
        own = [index for order in ranks for index in order[step * batch : (step + 1) * batch]]
        assert own == one[step * batch * world : (step + 1) * batch * world]


@given(**SIZES, rank=st.integers(0, 3), done=st.integers(0, 150))
def test_a_position_is_one_number(size, batch, world, seed, rank, done):
    """After any number of questions, over all epochs, a new sampler goes on exactly there."""
    assume(size >= batch * world and rank < world)
    whole = ResumableSampler(size, batch, seed, rank, world)
    before = list(islice(endless(whole), done))
    assert whole.consumed == done
    resumed = ResumableSampler(size, batch, seed, rank, world, consumed=done)
    after = list(islice(endless(resumed), 40))
    assert before + after == list(islice(endless(ResumableSampler(size, batch, seed, rank, world)), done + 40))


@given(**SIZES, epochs=st.integers(1, 3))
def test_every_epoch_gives_every_question_once_where_batches_divide_it(size, batch, world, seed, epochs):
    size = batch * world * (1 + size // 6)
    ranks = [ResumableSampler(size, batch, seed, rank, world) for rank in range(world)]
    for _ in range(epochs):
        assert sorted(index for sampler in ranks for index in sampler) == list(range(size))
