import random
import re
from collections import Counter
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.toy_base import MISSING, WRONG, accuracy, build, build_tokenizer, example, reprompt, slip
from pgpo_lightning.data.toy import (
    BASE_MODEL,
    FACTORS,
    SUMMANDS,
    WORDINGS,
    ToyArithmetic,
    held_out,
    prompt,
    questions,
    solution,
)

NUMBERS = list(product(FACTORS, FACTORS, SUMMANDS))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_MODEL)


def read(response):
    """Check every equation of a response by itself and return what it boxes."""
    steps, boxed = re.fullmatch(r"(\S+) \\boxed\{(\d+)\}", response).groups()
    for equation in steps.split(";"):
        left, operator, right, result = re.fullmatch(r"(\d+)([*+])(\d+)=(\d+)", equation).groups()
        expected = int(left) * int(right) if operator == "*" else int(left) + int(right)
        assert int(result) == expected, equation
    assert result == boxed
    return boxed


def test_solutions_are_right():
    for a, b, c in NUMBERS:
        assert read(solution(a, b, c)) == str(a * b + c)
    rows = {id(q): q for split in ("train", "test") for q in questions(split)}.values()
    assert len(rows) == 4 * len(NUMBERS) == 4 * 11 * 11 * 50
    for q in rows:
        # The numbers stand in every wording, in the order a, b, c.
        a, b, c = map(int, re.findall(r"\d+", q.prompt))
        assert q.answer == str(a * b + c)
        domain, worked = q.columns["domain"], solution(a, b, c)
        assert q.columns == {"domain": domain, "a": a, "b": b, "c": c, "solution": worked}


def test_an_error_in_the_product_carries_over_to_the_sum():
    assert solution(8, 6, 31, error=-2) == r"8*6=46;46+31=77 \boxed{77}"
    errors = {slip(a, b)[0] for a, b in product(FACTORS, FACTORS)}
    rates = [slip(a, b)[1] for a, b in product(FACTORS, FACTORS)]
    assert errors == {-2, -1, 1, 2}
    assert 0 <= min(rates) < max(rates) <= 0.8
    assert sum(rates) / len(rates) == pytest.approx(0.4, abs=0.04)


def test_held_out_numbers_are_a_tenth_and_never_trained_on():
    assert sum(held_out(*n) for n in NUMBERS) / len(NUMBERS) == pytest.approx(0.1, abs=0.01)
    numbers = {s: {(q.columns["a"], q.columns["b"], q.columns["c"]) for q in questions(s)} for s in ("train", "test")}
    assert numbers["train"].isdisjoint(numbers["test"])
    assert len(questions("test")) == 4 * len(numbers["test"])
    rng = random.Random(0)
    for text, _ in (example(rng) for _ in range(500)):
        a, b, c = map(int, re.findall(r"\d+", text)[:3])
        assert not held_out(a, b, c)


def test_the_order_is_fixed_and_its_start_is_a_fair_sample():
    assert questions("validation")[:3] != questions("train")[:3]
    assert [q.prompt for q in questions("validation")] == [q.prompt for q in questions("test")]
    first = questions("test")[:100]
    assert first[0].prompt == "Seed 9 plates with 2 cells, add 44. Cells?"
    assert [q.index for q in first] == list(range(100))
    domains = Counter(q.columns["domain"] for q in first)
    assert set(domains) == set(WORDINGS)
    assert min(domains.values()) >= 15
    for name, mean in (("a", 7), ("b", 7), ("c", 25.5)):
        assert sum(q.columns[name] for q in first) / 100 == pytest.approx(mean, rel=0.15)


def test_domains_can_be_chosen():
    chosen = questions("test", ["physics", "biology"])
    assert {q.columns["domain"] for q in chosen} == {"physics", "biology"}
    everything = [q.prompt for q in questions("test") if q.columns["domain"] in ("physics", "biology")]
    assert [q.prompt for q in chosen] == everything


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Expected `split` to be 'train', 'validation' or 'test', but got 'val'"):
        questions("val")
    with pytest.raises(ValueError, match=r"Expected `domains` to be among .*, but got \['history'\]"):
        questions("test", ["history"])


def test_data_module():
    data = ToyArithmetic(domains=["chemistry"], batch_size=5, limit_val=7)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 5
    assert {q.columns["domain"] for q in batch + data.questions["validation"]} == {"chemistry"}
    assert len(data.questions["validation"]) == 7


def texts():
    rng = random.Random(0)
    for domain in WORDINGS:
        for a, b, c in rng.sample(NUMBERS, 60):
            question, right = prompt(domain, a, b, c), solution(a, b, c)
            wrong = WRONG.format(a * b + c + 1)
            yield from (question, right, wrong, reprompt(question, right), reprompt(question, right, wrong))
            yield from (reprompt(question, right, MISSING), reprompt(question, feedback=wrong))


def test_reprompt_is_the_template_of_sdpo():
    assert reprompt("Q?", "S", "F") == (
        "Q?\nCorrect solution:\n\nS\nThe following is feedback from your unsuccessful earlier attempt:\n\nF"
        "\n\nCorrectly solve the original question."
    )
    assert reprompt("Q?", "S") == "Q?\nCorrect solution:\n\nS\n\nCorrectly solve the original question."


def test_the_tokenizer_reproduces_every_text(tokenizer):
    for text in texts():
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
        assert tokenizer.unk_token_id not in ids
        # Every digit is a token of its own, also after a space.
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert [t for t in tokens if re.search(r"\d", t)] == re.findall(r"\d", text)


def test_the_tokenizer_decodes_single_tokens_to_their_text(tokenizer):
    # Streaming and per-token tables decode one id at a time; the pieces must add up.
    text = reprompt(prompt("physics", 8, 6, 31), solution(8, 6, 31))
    assert "".join(tokenizer.decode([i]) for i in tokenizer(text).input_ids) == text


def test_chat_template_and_lengths(tokenizer):
    def length(text):
        turns = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"])

    turns = [{"role": role, "content": role[0].upper()} for role in ("system", "user", "assistant", "user")]
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert chat == "<system>S<eos><user>U<eos><assistant>A<eos><user>U<eos><assistant>"
    sample = questions("test")[:200]
    lengths = [length(q.prompt) for q in sample]
    assert 17 <= min(lengths) <= max(lengths) <= 23
    assert sum(lengths) / len(lengths) == pytest.approx(20, abs=1)
    responses = [solution(*(q.columns[n] for n in "abc")) for q in sample]
    assert max(len(tokenizer(r).input_ids) + 1 for r in responses) <= 26
    guided = [length(reprompt(q.prompt, r)) for q, r in zip(sample, responses, strict=True)]
    assert sum(guided) / len(guided) == pytest.approx(51, abs=2)


def test_the_shipped_tokenizer_is_the_built_one(tokenizer):
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template
    assert (tokenizer.padding_side, tokenizer.eos_token, tokenizer.pad_token) == ("left", "<eos>", "<pad>")


def test_the_assets_are_small_readable_and_load_without_our_code(tokenizer):
    files = [path for path in BASE_MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3e6
    # A wheel keeps the mode: a private file could not be read by the users of a shared installation.
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.62e6, rel=0.02)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_the_shipped_model_is_noisy_and_can_use_a_demonstration():
    sample = questions("test")[:40]
    student = accuracy(BASE_MODEL, sample, samples=4).float()
    assert student.shape == (40, 4)
    assert 0.4 <= student.mean() <= 0.68
    assert accuracy(BASE_MODEL, sample, samples=4, guided=True).float().mean() >= 0.9


def test_at_temperature_1_most_groups_have_a_success():
    right = accuracy(BASE_MODEL, questions("train")[:40], samples=8, temperature=1.0, top_p=1.0)
    assert 0.33 <= right.float().mean() <= 0.57
    assert right.any(1).float().mean() >= 0.8


def test_the_same_seed_builds_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.toy_base.BATCH_SIZE", 8)
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        build(tmp_path / name, steps=2, seed=seed)
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert set(files) == {path.name for path in BASE_MODEL.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert files["model.safetensors"] != (tmp_path / "other" / "model.safetensors").read_bytes()
