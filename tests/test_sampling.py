"""Section 6, the choice: the filters, the random numbers, the options that are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOY, random_weights, toy_tokenizer, write_checkpoint

import tinygpt2
from tinygpt2 import Options, SplitMix64

tinygpt2.import_numpy()  # the functions of section 6 use it, and no model is loaded here

VOCAB = 60
INF = math.inf
END = toy_tokenizer()[0]["<|endoftext|>"]
# Both sides compute in float64; what is left are sums in another order.
TOLERANCE = 1e-12


def random_logits(seed: int, size: int = VOCAB) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def kept(logits: Iterable[float], seen: Iterable[int] = (), **options: Any) -> dict[int, float]:
    """The tokens that may be drawn, with their probabilities."""
    scores = tinygpt2.adjust(np.asarray(logits, np.float32), set(seen), Options(**options))
    tokens, probabilities = tinygpt2.candidates(scores, Options(**options))
    return {int(t): float(p) for t, p in zip(tokens, probabilities) if p > 0}


# The filters against the transformers library


def transformers_kept(
    logits: np.ndarray,
    seen: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> dict[int, float]:
    """The same by transformers' processors, in the order in which its `generate` calls them."""
    torch = pytest.importorskip("torch", reason="needs the reference implementation")
    lib = pytest.importorskip("transformers", reason="needs the reference implementation")
    processors = [lib.RepetitionPenaltyLogitsProcessor(repetition_penalty)] if seen else []
    processors.append(lib.TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(lib.TopKLogitsWarper(top_k))
    processors += [lib.TopPLogitsWarper(top_p), lib.MinPLogitsWarper(min_p)]
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    for processor in processors:
        scores = processor(torch.tensor([seen]), scores)
    probabilities = torch.softmax(scores[0], -1).tolist()
    return {token: p for token, p in enumerate(probabilities) if p > 0}


def check_against_transformers(seed: int, seen: list[int], **options: Any) -> None:
    logits = random_logits(seed)
    expected = transformers_kept(logits, seen, **options)
    found = kept(logits, seen, **options)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (0.01, 0.3, 2.5, 100.0)),
        *(("top_k", value) for value in (1, 2, 17, VOCAB - 1, VOCAB, VOCAB + 1, 10**9)),
        *(("top_p", value) for value in (1e-9, 0.1, 0.5, 0.99, 1.0)),
        *(("min_p", value) for value in (1e-6, 0.05, 0.5, 1.0)),
        *(("repetition_penalty", value) for value in (0.5, 1.01, 1.3, 10.0)),
    ],
)
def test_each_filter_is_that_of_transformers(name: str, value: float) -> None:
    for seed in range(5):
        check_against_transformers(seed, [1, 5, 33, 5], **{**NEUTRAL, name: value})


def test_filters_together_are_those_of_transformers() -> None:
    hypothesis = pytest.importorskip("hypothesis", reason="draws the settings")
    st = hypothesis.strategies

    settings = hypothesis.given(
        seed=st.integers(0, 1000),
        seen=st.lists(st.integers(0, VOCAB - 1), max_size=VOCAB),
        temperature=st.floats(0.05, 20),
        top_k=st.integers(0, VOCAB + 5),
        top_p=st.floats(0.01, 0.999),
        min_p=st.floats(0, 0.999),
        repetition_penalty=st.floats(0.2, 5),
    )
    same_every_time = hypothesis.settings(max_examples=150, derandomize=True, deadline=None)
    same_every_time(settings(check_against_transformers))()


# The filters by their definitions

DECIMAL = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]  # logits with these probabilities
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 4}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"top_k": 5}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"top_p": 0.69}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.71}, {1: 4 / 9, 3: 3 / 9, 2: 2 / 9}),
        ({"top_p": 1e-300}, {1: 1.0}),
        ({"min_p": 0.45}, {1: 4 / 9, 3: 3 / 9, 2: 2 / 9}),
        ({"min_p": 0.55}, {1: 4 / 7, 3: 3 / 7}),
        ({"min_p": 1.0}, {1: 1.0}),
        ({"temperature": 0.5}, {0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30}),
        ({"temperature": 1e6}, dict.fromkeys(range(4), 0.25)),
        ({"temperature": 1e-4}, {1: 1.0}),  # exp(-2877) is 0
        ({"temperature": 5e-324}, {1: 1.0}),
        ({"logit_bias": {1: -INF}}, {0: 1 / 6, 2: 2 / 6, 3: 3 / 6}),
        ({"logit_bias": {0: math.log(3)}}, {0: 3 / 12, 1: 4 / 12, 2: 2 / 12, 3: 3 / 12}),
        ({"logit_bias": {0: -INF, 1: -INF, 3: -INF}}, {2: 1.0}),
        ({"logit_bias": {1: -INF}, "top_k": 3, "top_p": 0.4}, {3: 1.0}),
        # top_k first: 0.4 and 0.3 become 4/7 and 3/7, and the first alone is enough for top_p.
        ({"top_k": 2, "top_p": 0.5}, {1: 1.0}),
    ],
)
def test_kept_by_definition(options: dict[str, Any], expected: dict[int, float]) -> None:
    # The logits are float32, so the probabilities are right to 1e-7; 1e6 flattens to 1e-6.
    assert kept(DECIMAL, **{**PLAIN, **options}) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ties_at_the_threshold_of_top_k_all_stay(top_k: int) -> None:
    assert kept([0, 2, 2, 1, 2], temperature=1.0, top_k=top_k) == {1: 1 / 3, 2: 1 / 3, 4: 1 / 3}


def test_equal_tokens_come_in_the_order_of_their_ids() -> None:
    assert list(kept([1, 2, 1, 2], **PLAIN)) == [1, 3, 0, 2]
    assert tinygpt2.choose(np.array([1.0, 2, 1, 2]), Options(temperature=0), 0.0) == 1


def test_repetition_penalty_moves_both_signs_down() -> None:
    scores = tinygpt2.adjust(
        np.array([2, -2, 2, -2], np.float32), {0, 1}, Options(repetition_penalty=4.0)
    )
    assert scores.tolist() == [0.5, -8, 2, -2]


def test_adjust_leaves_the_logits_alone() -> None:
    logits = random_logits(0)
    tinygpt2.adjust(logits, {1, 2}, Options(repetition_penalty=2.0, logit_bias={3: 1.0}))
    assert (logits == random_logits(0)).all()


def test_a_bias_that_rules_out_every_token_is_an_error(toy: tinygpt2.Model) -> None:
    everything = dict.fromkeys(range(TOY["vocab_size"]), -INF)
    with pytest.raises(tinygpt2.InputError, match=r"logit_bias.*every token"):
        toy.generate("a", logit_bias=everything)
    del everything[77]
    assert toy.generate_ids("a", logit_bias=everything, max_new_tokens=3) == [77] * 3


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_token_that_is_ruled_out_is_never_chosen(toy: tinygpt2.Model, temperature: float) -> None:
    free = toy.generate_ids("a", temperature=temperature, top_k=0, seed=3, max_new_tokens=50)
    bias = dict.fromkeys(free, -INF)
    other = toy.generate_ids(
        "a", temperature=temperature, top_k=0, seed=3, max_new_tokens=50, logit_bias=bias
    )
    assert other
    assert not set(other) & set(free)


# The random numbers and the draw


def test_splitmix64_is_the_published_one() -> None:
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    integers = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    random = SplitMix64(1234567)
    assert [random.uniform() for _ in integers] == [(x >> 11) * 2.0**-53 for x in integers]


@pytest.mark.parametrize("seed", [0, 1, -1, 1 << 64, (1 << 64) - 1, -(1 << 200)])
def test_splitmix64_takes_every_whole_number(seed: int) -> None:
    random = SplitMix64(seed)
    assert all(0 <= random.uniform() < 1 for _ in range(100))
    assert SplitMix64(seed).uniform() == SplitMix64(seed % (1 << 64)).uniform()


# 99.9 % of fair draws stay below these, by degrees of freedom.
CHI_SQUARE_LIMITS = {5: 20.5, 63: 104.0}


def chi_square(counts: Iterable[int], probabilities: Iterable[float]) -> float:
    counts = list(counts)
    expected = [sum(counts) * p for p in probabilities]
    return sum((count - e) ** 2 / e for count, e in zip(counts, expected))


def test_uniform_is_uniform() -> None:
    random = SplitMix64(7)
    bins = [int(64 * random.uniform()) for _ in range(100_000)]
    counts = np.bincount(bins, minlength=64).tolist()
    assert chi_square(counts, [1 / 64] * 64) < CHI_SQUARE_LIMITS[63]


@pytest.mark.parametrize("options", [{"top_k": 6}, {"top_p": 0.9, "temperature": 3.0}])
def test_tokens_are_drawn_as_often_as_they_are_probable(options: dict[str, Any]) -> None:
    logits, checked = random_logits(4, 9), Options(**{**PLAIN, **options})
    expected = kept(logits, **checked._asdict())
    assert len(expected) == 6
    scores, random = tinygpt2.adjust(logits, set(), checked), SplitMix64(7)
    counts = [0] * 9
    for _ in range(10_000):
        counts[tinygpt2.choose(scores, checked, random.uniform())] += 1
    assert {token for token, count in enumerate(counts) if count} == set(expected)
    found = chi_square((counts[token] for token in expected), expected.values())
    assert found < CHI_SQUARE_LIMITS[5]


@pytest.mark.parametrize(
    ("number", "token"),
    # Probabilities 0.4, 0.3, 0.2, 0.1 of tokens 1, 3, 2, 0; at both ends of what `uniform` gives.
    [(0.0, 1), (0.39, 1), (0.41, 3), (0.69, 3), (0.71, 2), (0.91, 0), (1 - 2.0**-53, 0)],
)
def test_draw_walks_from_the_most_probable_token(number: float, token: int) -> None:
    scores = np.array([*DECIMAL, -INF])  # the last one is never chosen
    assert tinygpt2.choose(scores, Options(**PLAIN), number) == token


def test_draw_gives_each_of_two_equals_its_half() -> None:
    """`uniform` never returns 1, so the first one's half is up to 0.5, which is excluded."""
    below = 0.5 - 2.0**-53
    scores = np.zeros(2)
    chosen = [tinygpt2.choose(scores, Options(**PLAIN), u) for u in (0.0, below, 0.5)]
    assert chosen == [0, 0, 1]


def test_a_seed_is_a_text(toy: tinygpt2.Model) -> None:
    texts = [toy.generate("The", seed=seed, max_new_tokens=30) for seed in (1, 1, 2, -1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_without_a_seed_each_answer_is_another_and_names_its_seed(toy: tinygpt2.Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "logit_bias": {END: -INF}}
    answers = {}
    for _ in range(3):
        with toy.session() as session:
            session.feed("The")
            text = session.generate(**options)
            assert session.seed is not None
            answers[session.seed] = text
    assert len(set(answers.values())) == 3
    for seed, text in answers.items():
        assert toy.generate("The", seed=seed, **options) == text


def test_greedy_is_the_best_token_whatever_the_seed(toy: tinygpt2.Model) -> None:
    answers = [
        toy.generate_ids("The", temperature=0, seed=seed, max_new_tokens=20) for seed in (1, 2)
    ]
    assert answers[0] == answers[1]
    prompt = toy.encode("The")
    best = toy.logits(prompt + answers[0])[len(prompt) - 1 : -1].argmax(axis=-1)
    assert answers[0] == best.tolist()


def test_a_temperature_near_zero_is_greedy(toy: tinygpt2.Model) -> None:
    greedy = toy.generate_ids("The", temperature=0, max_new_tokens=20)
    for temperature in (1e-4, 1e-310):
        assert toy.generate_ids("The", temperature=temperature, max_new_tokens=20) == greedy


# Damaged weights


def damaged_file(folder: Path, name: str, index: Any, value: float) -> Path:
    weights = random_weights(TOY)
    weights[name][index] = value
    tinygpt2.convert(write_checkpoint(folder, weights=weights), folder / "damaged.tg2")
    return folder / "damaged.tg2"


@pytest.mark.parametrize(
    ("name", "index", "value", "position"),
    [
        ("wpe.weight", 3, math.nan, 3),
        ("wpe.weight", (2, 5), INF, 2),
        ("wte.weight", (40, 0), -INF, 0),  # by the tied head: every position's logit of token 40
        ("ln_f.weight", slice(None), 1e38, 0),  # finite, but the logits overflow
        ("h.1.mlp.c_fc.weight", slice(None), 3e38, 0),
    ],
)
@pytest.mark.parametrize("use", ["feed", "generate", "score", "logits"])
def test_damaged_weights_are_one_clear_error(
    tmp_path: Path, name: str, index: Any, value: float, position: int, use: str
) -> None:
    """And no warning of NumPy's beside it: warnings are errors in these tests."""
    path = damaged_file(tmp_path, name, index, value)
    with tinygpt2.load(path) as model:
        session = model.session()
        if use == "feed":  # one by one, so that the position is certain
            for _ in range(position):
                session.feed([1])
            match = f"position {position}\\b"
        else:
            match = r"position \d"
        calls: dict[str, Callable[[], object]] = {
            "feed": lambda: session.feed([1]),
            "generate": lambda: model.generate([1] * 5),
            "score": lambda: model.score([1] * 5),
            "logits": lambda: model.logits([1] * 5),
        }
        with pytest.raises(tinygpt2.NumericError, match=match) as caught:
            calls[use]()
    assert str(path) in str(caught.value)


# The options

WRONG: list[tuple[str, Any]] = [
    *(("max_new_tokens", value) for value in (-1, 1.5, "3", None, True, math.nan)),
    *(("temperature", value) for value in (-0.1, math.nan, INF, "1", None, True, 1j)),
    *(("top_k", value) for value in (-1, 2.0, "3", None, False)),
    *(("top_p", value) for value in (0, -0.5, 1.01, math.nan, "1", None, True)),
    *(("min_p", value) for value in (-0.1, 1.01, math.nan, "0", None, False)),
    *(("repetition_penalty", value) for value in (0, -1, math.nan, INF, "1", None, True)),
    *(("seed", value) for value in (1.0, "1", b"1", [1])),
    *(("stop", value) for value in ("", ["a", ""], [1], 5, None, b"a", [b"a"], [None])),
    ("logit_bias", {300: 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {1.0: 1.0}),
    ("logit_bias", {True: 1.0}),
    *(("logit_bias", {1: value}) for value in (INF, math.nan, "1", None, True)),
    *(("logit_bias", value) for value in ([1, 2], 5, "a", [(1, 2.0)])),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=ascii)
def test_a_wrong_option_is_named(toy: tinygpt2.Model, name: str, value: Any) -> None:
    with pytest.raises(tinygpt2.InputError, match=f"option {name}: expected .*, found "):
        toy.stream("a", **{name: value})


def test_an_unknown_option_is_named_with_the_known_ones(toy: tinygpt2.Model) -> None:
    with pytest.raises(tinygpt2.InputError, match=r"option temprature: .*temperature, top_k"):
        toy.generate("a", temprature=1.0)


@pytest.mark.parametrize(("name", "value"), [("temperature", 1e7), ("repetition_penalty", 1e-7)])
def test_the_message_names_the_limits(toy: tinygpt2.Model, name: str, value: float) -> None:
    """A number that the message calls right must not be refused."""
    with pytest.raises(tinygpt2.InputError, match=rf"{name}: expected .*\d.* to .*\d.*, found"):
        toy.generate("a", **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1},  # int for float
        {"stop": "a"},
        {"stop": ["a", "b"]},
        {"stop": ()},
        {"seed": None, "logit_bias": None},
        {"seed": 1 << 100},
        {"logit_bias": {}},
        {"logit_bias": {0: -INF, 299: 1e30, 5: -1}},
    ],
    ids=ascii,
)
def test_right_options_are_taken(toy: tinygpt2.Model, options: dict[str, Any]) -> None:
    toy.generate("a", max_new_tokens=2, **options)


def test_defaults_are_those_of_options(toy: tinygpt2.Model) -> None:
    # Their meaning is documented: 200 tokens at most, temperature 0.8, top_k 40.
    assert Options()[:5] == (200, 0.8, 40, 1.0, 0.0)
    written = Options(seed=5)._asdict()
    assert toy.generate("a", seed=5) == toy.generate("a", **written)
