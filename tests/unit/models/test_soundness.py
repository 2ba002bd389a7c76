"""A model gives in every layout, and while it is sampled, what it gives in a plain pass; or it is refused at start-up."""

import random
from collections import defaultdict

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.types import Question
from pgpo_lightning.models.decoding import WAYS, Way
from pgpo_lightning.models.lm_head import check_head, source
from pgpo_lightning.models.packing import Packing, Sequences
from pgpo_lightning.models.soundness import check_padding, concatenates, shares_prompts, way_to_sample
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.architectures import NAMES, tiny
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, tiny_model

CPU = torch.device("cpu")
HYBRIDS = ["qwen3_5_text", "qwen3_next", "lfm2", "bamba", "jamba", "mamba", "falcon_h1", "minimax"]
ORDINARY = ["qwen3", "llama4_text", "gpt_neo", "deepseek_v3"]  # all others: make test-slow


def own(model, prompt, response):
    """Log-probabilities of response tokens by the model's own logits, of one unpadded pass without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]


def trained(model, pairs, packing):
    """Log-probabilities as training takes them."""
    packed = Sequences.pack(pairs, 0, CPU, packing)
    with torch.no_grad():
        made = source(model, packed)
        log_p = made.head(made.hidden).log_softmax(-1)
    return log_p[torch.arange(len(log_p)), packed.targets].split(packed.lengths.tolist())


def pairs_of(*lengths, seed=0, vocabulary=96):
    rng = random.Random(seed)
    prompts = {length: [rng.randrange(5, vocabulary) for _ in range(length)] for length, _ in lengths}
    return [(prompts[p], [rng.randrange(5, vocabulary) for _ in range(r)]) for p, r in lengths]


def sampled(model, lengths=(9, 4, 9, 17, 2), n=3, max_tokens=10):
    """Rollouts of unequal prompts, of which many end early: one token in six is an end."""
    model.generation_config.eos_token_id = list(range(5, model.config.vocab_size, 6))
    rng = random.Random(1)
    prompts = [[rng.randrange(5, model.config.vocab_size) for _ in range(length)] for length in lengths]
    asked = [Question("?", "1", index=i) for i in range(len(prompts))]
    with seeded("test", 0):
        rollouts = TransformersEngine().generate(model, TOKENIZER, asked, prompts, n, Sampling(max_tokens))
    assert [r.prompt_ids for r in rollouts] == [prompt for prompt in prompts for _ in range(n)]
    assert [r.question for r in rollouts] == [question for question in asked for _ in range(n)]
    return rollouts


def compare(model, tolerance=2e-4):
    """Return how much the log-probabilities of the product differ at most from the model's own, by layout (nats)."""
    pairs = pairs_of((40, 9), (3, 12), (40, 5), (19, 1), (7, 8), (40, 9))
    right = [own(model, *pair) for pair in pairs]
    found = {"padded": trained(model, pairs, Packing())}
    if shares_prompts(model):
        found["shared"] = trained(model, pairs, Packing("always"))
    if not concatenates(model):
        found["concatenated"] = trained(model, pairs, Packing(padding_free=True))
    gaps = {
        name: max((a - b).abs().max().item() for a, b in zip(made, right, strict=True)) for name, made in found.items()
    }
    rollouts = sampled(model)
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 2  # some have left long before others
    gaps["sampler"] = max((r.log_probs - own(model, r.prompt_ids, r.response_ids)).abs().max().item() for r in rollouts)
    wrong = {name: gap for name, gap in gaps.items() if not gap <= tolerance}
    assert not wrong, f"{type(model).__name__}: {wrong}"
    return gaps


@pytest.mark.parametrize("name", [*HYBRIDS, *ORDINARY])
def test_training_and_sampling_give_the_log_probabilities_of_the_model(name):
    model = tiny(name)
    check_head(model)
    check_padding(model, 64)
    compare(model)
    if name in HYBRIDS:
        assert not shares_prompts(model)


@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba"])
def test_padding_and_prompts_longer_than_what_a_kernel_takes_at_once(name):
    """64 tokens in linear attention, `chunk_size` in Mamba; 150 of padding stand before the shortest prompt."""
    model = tiny(name, **({"mamba_chunk_size": 64} if name == "bamba" else {}))
    pairs = pairs_of((150, 9), (3, 12), (64, 5), (65, 80))
    right = [own(model, *pair) for pair in pairs]
    for made, expected in zip(trained(model, pairs, Packing()), right, strict=True):
        torch.testing.assert_close(made, expected, rtol=0, atol=2e-4)
    assert way_to_sample(model, 300) == Way(cache=True, padding=True, shared=True)
    for rollout in sampled(model, lengths=(150, 3, 64, 70), n=2):
        expected = own(model, rollout.prompt_ids, rollout.response_ids)
        torch.testing.assert_close(rollout.log_probs, expected, rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_architecture_of_transformers_is_silently_wrong():
    """Of every causal model that can be built tiny: equal to the model's own logits, or refused in one line that names it."""
    outcomes = defaultdict(list)
    for name in NAMES:
        try:
            model = tiny(name)
        except Exception as error:
            outcomes["cannot be built"].append(f"{name} ({type(error).__name__})")
            continue
        try:
            check_head(model)
            check_padding(model, 64)
            way = way_to_sample(model, 64)
        except MisconfigurationException as error:
            named = type(model).__name__ in str(error) and "\n" not in str(error)
            outcomes["refused" if named else "wrong"].append(name)
            continue
        try:
            gaps = compare(model)
        except Exception as error:
            outcomes["wrong"].append(f"{name}: {type(error).__name__} {error}")
            continue
        kind = f"by way {WAYS.index(way) + 1}"
        outcomes[f"equal, sampled {kind} of {len(WAYS)}{', prompts shared' if 'shared' in gaps else ''}"].append(name)
    for outcome, names in sorted(outcomes.items()):
        print(f"{len(names)} {outcome}: {', '.join(names)}")
    assert not outcomes["wrong"]
    assert sum(len(names) for outcome, names in outcomes.items() if outcome.startswith("equal")) > 140


@pytest.mark.parametrize("window", [16, 256])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_local_attention_that_counts_places_in_the_cache_shares_nothing(window, scale):
    model = tiny("gpt_neo", scale=scale, window_size=window, max_position_embeddings=600)
    assert not shares_prompts(model)
    if scale == 4.0:  # what it would have been
        pairs = pairs_of((window + 140, 40), (window // 2, 40))
        gaps = [
            (a - own(model, *pair)).abs().max()
            for a, pair in zip(trained(model, pairs, Packing("always")), pairs, strict=True)
        ]
        assert max(gaps) > 0.1
    if window == 256:  # no sequence of a run that is shorter than its window meets it
        assert shares_prompts(model, 255)


def test_a_window_that_is_too_long_to_try_shares_nothing():
    model = tiny("gpt_neo", window_size=5000, max_position_embeddings=6000)
    assert not shares_prompts(model, 6000)
    assert shares_prompts(model, 4000)
    with pytest.warns(UserWarning, match=r"GPTNeoForCausalLM may behave differently beyond 5000 tokens"):
        check_padding(model, 6000)


@pytest.mark.parametrize("training", [False, True])
def test_both_the_students_mode_and_the_teachers_are_tried(training):
    model = tiny_model().train()
    assert shares_prompts(model)

    def after_a_prompt(module, _, inputs, output):
        if module.training == training and inputs.get("position_ids") is not None:
            output.last_hidden_state = output.last_hidden_state * torch.linspace(
                1, 2, output.last_hidden_state.size(-1)
            )
        return output

    model.model.register_forward_hook(after_a_prompt, with_kwargs=True)
    assert not shares_prompts(model)
    model.eval()  # who evaluates only does not care
    assert shares_prompts(model) == training


def test_dropout_does_not_keep_prompts_from_being_shared():
    assert shares_prompts(tiny_model(attention_dropout=0.5).train())


def test_trying_changes_nothing():
    model = tiny("qwen3_next").to(torch.bfloat16).train()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()}
    types = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    torch.manual_seed(3)
    before, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    check_padding(model, 64)
    shares_prompts(model)
    way_to_sample(model, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_float32_matmul_precision() == precision
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())} == types
    assert model.training


@pytest.mark.parametrize("surroundings", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
def test_trying_does_not_depend_on_what_surrounds_it(surroundings):
    model = tiny("qwen3").to(torch.bfloat16)
    with surroundings:
        check_padding(model, 64)
        assert shares_prompts(model)
        assert way_to_sample(model, 64) == WAYS[0]
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()  # weights can be trained
    model = tiny("gpt_neo", window_size=16)
    with surroundings:
        assert not shares_prompts(model)


@pytest.mark.parametrize("trial", [check_padding, way_to_sample])
def test_what_depends_on_the_length_of_the_batch_is_refused_beyond_that_length(trial):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = tiny(
        "phi3", sliding_window=None, original_max_position_embeddings=32,
        rope_parameters=rope | {"original_max_position_embeddings": 32},
    )  # fmt: skip
    trial(model, 32)
    with pytest.raises(
        MisconfigurationException, match=r"Phi3ForCausalLM.* beyond 32 tokens of prompt and response .lower"
    ):
        trial(model, 64)


@pytest.mark.parametrize("name", ["xlnet", "cpmant"])
def test_what_looks_ahead_is_refused_in_one_line(name):
    model = tiny(name)
    with pytest.raises(MisconfigurationException) as error:
        check_padding(model, 64)
    assert type(model).__name__ in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_sampled_is_refused_in_one_line():
    model = tiny_model()
    calls = []

    def forgetful(_, args, output):  # as if something outside of the cache went from call to call
        calls.append(1)
        output.logits = output.logits * (1 + 0.1 * (len(calls) % 7))
        return output

    model.register_forward_hook(forgetful)
    with pytest.raises(
        MisconfigurationException, match=r"Qwen3ForCausalLM .* differ by .* cannot be sampled with Transf"
    ):
        way_to_sample(model, 64)


def test_memory_that_runs_out_is_not_taken_for_a_fault():
    model = tiny_model()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(full)
    for trial in (check_head, lambda model: check_padding(model, 64), lambda model: way_to_sample(model, 64)):
        with pytest.raises(torch.OutOfMemoryError):
            trial(model)


def test_kernels_that_know_no_fp32_are_tried_under_autocast():
    model = tiny_model(tie_word_embeddings=False)

    def narrow_only(_, __, output):
        assert output.dtype == torch.bfloat16, "does not support float32"

    model.model.layers[0].self_attn.q_proj.register_forward_hook(narrow_only)
    check_head(model)
    check_padding(model, 64)
    assert way_to_sample(model, 64) == WAYS[0]
    assert shares_prompts(model)


def test_ways_are_tried_from_the_fastest():
    first = Way(cache=True, padding=True, shared=True, refills=True)
    assert way_to_sample(tiny("qwen3"), 64) == first
    assert way_to_sample(tiny("gemma3_text"), 64) == first  # windows
    assert way_to_sample(tiny("qwen3_5_text"), 64) == Way(cache=True, padding=True, shared=True)  # a recurrent state
    assert way_to_sample(tiny("deepseek_v3"), 64) == Way(cache=True, padding=True, own_mask=True)  # keys are compressed
    assert way_to_sample(tiny("bloom"), 64) == Way(cache=True, padding=True)  # positions come from the mask
    assert way_to_sample(tiny("mamba"), 64) == Way(cache=True, padding=False)
    assert way_to_sample(tiny("minimax"), 64) == Way(cache=False, padding=True)


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_sample_alike(way, monkeypatch):
    """Where all are right, which one is taken changes nothing but what is drawn from the generator."""
    model = tiny("qwen3")
    monkeypatch.setattr("pgpo_lightning.rollout.transformers_engine.way_to_sample", lambda *_: way)
    for rollout in sampled(model, max_tokens=14):
        torch.testing.assert_close(
            rollout.log_probs, own(model, rollout.prompt_ids, rollout.response_ids), rtol=0, atol=1e-5
        )


def test_a_run_refuses_what_it_cannot_be_right_about():
    module = build(SDPO, tiny("xlnet", vocab_size=len(TOKENIZER)), half_right, tokenizer=TOKENIZER, **LIMITS)
    with pytest.raises(MisconfigurationException, match="with XLNetLMHeadModel they differ"):
        module.configure_model()


def test_more_kept_tokens_than_there_are_is_refused():
    module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, distillation_topk=len(TOKENIZER) + 1, **LIMITS)
    with pytest.raises(
        MisconfigurationException,
        match=f"`divergence.distillation_topk` to be at most the {len(TOKENIZER)} tokens .* null",
    ):
        module.configure_model()
    build(
        SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, distillation_topk=len(TOKENIZER), **LIMITS
    ).configure_model()
