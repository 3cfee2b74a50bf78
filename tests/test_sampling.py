"""Section 6, the choice: the filters, the chance by place, the options that are checked."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOY, random_weights, toy_tokenizer, write_checkpoint

import tinygpt2
from tinygpt2 import Options, Sampler

has_kernels = tinygpt2.library_path() is not None
needs_kernels = pytest.mark.skipif(not has_kernels, reason="needs the C kernels")
is_compiled = not tinygpt2.__file__.endswith(".py")  # by mypyc, which checks some types itself
VOCAB = 60
INF = math.inf
END = toy_tokenizer()[0]["<|endoftext|>"]
# Both sides compute in float64; what is left are sums in another order.
TOLERANCE = 1e-12


def random_logits(seed: int, size: int = VOCAB) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def kept(logits: Iterable[float], seen: Iterable[int] = (), **options: Any) -> dict[int, float]:
    """The tokens that may be drawn, with their probabilities."""
    checked = Options(**options)
    scores = tinygpt2.adjust(np.asarray(logits, np.float32), Sampler(checked, seen))
    with np.errstate(over="ignore"):  # as choose_token has it, for temperatures near 0
        scores = (scores - scores.max()) / checked.temperature
    tokens = tinygpt2.filter_tokens(scores, checked)
    probabilities = tinygpt2.softmax(scores[tokens])
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
@pytest.mark.slow  # importing transformers takes seconds
def test_each_filter_is_that_of_transformers(name: str, value: float) -> None:
    for seed in range(5):
        check_against_transformers(seed, [1, 5, 33, 5], **{**NEUTRAL, name: value})


@pytest.mark.slow
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


def test_of_equal_tokens_the_lowest_id_wins() -> None:
    assert list(kept([1, 2, 1, 2], **PLAIN)) == [0, 1, 2, 3]
    greedy = Sampler(Options(temperature=0), ())
    assert tinygpt2.choose_token(np.array([1, 2, 1, 2], np.float32), greedy, 0) == 1


def test_repetition_penalty_moves_both_signs_down() -> None:
    scores = tinygpt2.adjust(
        np.array([2, -2, 2, -2], np.float32), Sampler(Options(repetition_penalty=4.0), {0, 1})
    )
    assert scores.tolist() == [0.5, -8, 2, -2]


def test_adjust_leaves_the_logits_alone() -> None:
    logits = random_logits(0)
    options = Options(repetition_penalty=2.0, logit_bias={3: 1.0})
    tinygpt2.adjust(logits, Sampler(options, {1, 2}))
    assert (logits == random_logits(0)).all()


def test_a_bias_that_rules_out_every_token_is_an_error(toy: tinygpt2.Model) -> None:
    everything = dict.fromkeys(range(TOY["vocab_size"]), -INF)
    with pytest.raises(tinygpt2.ConstraintError, match=r"logit_bias: no token can begin it"):
        toy.generate("a", logit_bias=everything)
    del everything[77]
    assert toy.generate_ids("a", logit_bias=everything, max_new_tokens=3) == [77] * 3


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_token_that_is_ruled_out_is_never_chosen(toy: tinygpt2.Model, temperature: float) -> None:
    free = toy.generate_ids("a", temperature=temperature, top_k=0, seed=3, max_new_tokens=20)
    bias = dict.fromkeys(free, -INF)
    other = toy.generate_ids(
        "a", temperature=temperature, top_k=0, seed=3, max_new_tokens=20, logit_bias=bias
    )
    assert other
    assert not set(other) & set(free)


# Chance by place

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The published generator's next number: https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64"""
    z = (state + GAMMA) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def uniform(seed: int, position: int, token: int) -> float:
    """u as the README promises it: numbers of the generator, counted by position and by token."""
    key = splitmix64(splitmix64(seed & MASK) + position * GAMMA)
    return ((splitmix64(key + token * GAMMA) >> 12) + 0.5) * 2.0**-52


def test_the_mixing_is_that_of_the_published_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567 + i * GAMMA) for i in range(3)] == published
    assert [tinygpt2.mix((1234567 + i * GAMMA) & MASK) for i in (1, 2, 3)] == published


PLACES = [(0, 0), (1, 7), (-1, 0), (1 << 64, 3), (-(1 << 200), 1023), (MASK, 1 << 30)]


@pytest.mark.parametrize(("seed", "position"), PLACES)
def test_the_noise_is_a_hash_of_seed_position_and_token(seed: int, position: int) -> None:
    """These numbers are a promise: with others, every seed would give another text."""
    tokens = np.array([0, 1, 2, 300, 50256, (1 << 24) - 1])
    expected = [-math.log(-math.log(uniform(seed, position, int(token)))) for token in tokens]
    found = tinygpt2.gumbel_noise(seed, position, tokens)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_noise_of_three_places_for_ever() -> None:
    found = [uniform(1, 0, 0), uniform(1, 5, 262), uniform(2, 5, 262)]
    assert [f"{u:.15f}" for u in found] == THREE_PLACES


THREE_PLACES = ["0.693512139010229", "0.458935748961169", "0.698041578939975"]


def unshift(z: int, shift: int) -> int:
    """The x of which z is x ^ x >> shift."""
    x = z
    for _ in range(64 // shift):
        x = z ^ x >> shift
    return x


def unmix(z: int) -> int:
    """The inverse of the mixing: so every hash can be had, by the right seed."""
    z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    return unshift(z, 30)


def seed_with(hashed: int, position: int, token: int) -> int:
    """The seed by which a token's hash at a position is this."""
    key = (unmix(hashed) - (token + 1) * GAMMA) & MASK
    return (unmix((unmix(key) - (position + 1) * GAMMA) & MASK) - GAMMA) & MASK


Choose = Callable[[np.ndarray, Sampler, int], int]


@pytest.fixture(params=["numpy", pytest.param("c", marks=needs_kernels)])
def choose(request: pytest.FixtureRequest, toy_path: Path) -> Iterator[Choose]:
    """Chooses by logits of up to 300 tokens, each a float32. For C the rest of the row is low."""
    if request.param == "numpy":
        yield tinygpt2.choose_token
        return
    with tinygpt2.load(toy_path, backend="c") as model, model.workspace() as workspace:

        def choose_in_c(logits: np.ndarray, sampler: Sampler, position: int) -> int:
            row = kept_row(logits, model.config.vocab_size)
            return model.backend.kept(workspace, row).choose(0, sampler, position)

        yield choose_in_c


def kept_row(logits: np.ndarray, size: int) -> Any:
    """Logits as a kept row of C. Tokens behind them are lower than the draw can lift."""
    row = np.full(size, -1e30, np.float32)
    row[: len(logits)] = logits
    return (ctypes.c_float * size)(*row.tolist())


@pytest.mark.parametrize(
    ("hashed", "u"), [(0, 2.0**-53), (MASK, 1 - 2.0**-53), (1 << 63, 0.5 + 2.0**-53)]
)
def test_u_is_never_0_or_1(hashed: int, u: float, choose: Choose) -> None:
    """At both ends of the hash. Token 3 has that u at position 9. By a bias that makes up for its
    noise, or for all but a billionth of it, it wins or loses against token 0."""
    seed = seed_with(hashed, 9, 3)
    assert uniform(seed, 9, 3) == pytest.approx(u, abs=0)
    expected = -math.log(-math.log(u))
    other, found = tinygpt2.gumbel_noise(seed, 9, np.array([0, 3])).tolist()
    assert found == pytest.approx(expected, rel=1e-14)
    for change, token in ((1e-9, 3), (-1e-9, 0)):
        biases = {1: -INF, 2: -INF, 3: other - expected + change}
        sampler = Sampler(Options(seed=seed, temperature=1.0, top_k=2, logit_bias=biases), ())
        assert choose(np.zeros(4, np.float32), sampler, 9) == token


def equal_keys() -> Iterator[tuple[int, int, int, float]]:
    """Seeds, two tokens and a bias of the second with which the keys of both are equal in NumPy."""
    for seed in range(600):
        first, second = 1 + seed % 7, 8 + seed % 11
        if seed % 2:
            first, second = second, first
        a, b = tinygpt2.gumbel_noise(seed, 0, np.array([first, second])).tolist()
        if a < b and (a - b) + b == a:
            yield seed, first, second, a - b


@pytest.mark.parametrize("top_p", [1.0, 0.99999999])
def test_of_equal_keys_the_lower_token_wins(top_p: float, choose: Choose) -> None:
    """In C a logarithm may differ by its last bit from NumPy's. Then keys are equal less often,
    and the rule shows in fewer of the draws, but still in most."""
    wins = []
    for seed, first, second, bias in equal_keys():
        biases = {**dict.fromkeys(range(20), -INF), first: 0.0, second: bias}
        options = Options(seed=seed, temperature=1.0, top_k=2, top_p=top_p, logit_bias=biases)
        wins.append(choose(np.zeros(20, np.float32), Sampler(options, ()), 0) == min(first, second))
    assert len(wins) > 100
    assert all(wins) if choose is tinygpt2.choose_token else sum(wins) > 0.8 * len(wins)


def noise(places: Iterable[tuple[int, int]], tokens: np.ndarray) -> np.ndarray:
    """u of every token at every (seed, position). [places, tokens]"""
    rows = [tinygpt2.gumbel_noise(seed, position, tokens) for seed, position in places]
    result: np.ndarray = np.exp(-np.exp(-np.array(rows)))
    return result


NEIGHBOURS = {
    "positions": [(5, position) for position in range(400)],
    "seeds": [(seed, 5) for seed in range(400)],
    "far seeds": [(seed << 32, 5) for seed in range(400)],
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbouring_places_are_independent(name: str) -> None:
    """Uniform, and without a correlation between neighbours in either direction.

    A correlation of n independent pairs is normal with the deviation 1 / sqrt(n): five of them are
    exceeded once in two million. The chi-squared of 63 degrees exceeds 130 once in two million.
    """
    u = noise(NEIGHBOURS[name], np.arange(250))
    counts = np.bincount((64 * u).astype(int).ravel(), minlength=64)
    assert chi_square(counts.tolist(), [1 / 64] * 64) < 130
    pairs = [(u[1:], u[:-1]), (u[2:], u[:-2]), (u[:, 1:], u[:, :-1]), (u[1:, 1:], u[:-1, :-1])]
    for first, second in pairs:
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(first.size)
        squares = np.bincount(
            (8 * first).astype(int).ravel() * 8 + (8 * second).astype(int).ravel(), minlength=64
        )
        assert chi_square(squares.tolist(), [1 / 64] * 64) < 130


def chi_square(counts: Iterable[int], probabilities: Iterable[float]) -> float:
    counts = list(counts)
    expected = [sum(counts) * p for p in probabilities]
    return sum((count - e) ** 2 / e for count, e in zip(counts, expected))


def exceeded(x: float, degrees: int) -> float:
    """How probable it is that a chi-squared of these degrees of freedom is above x."""
    h = x / 2
    if degrees % 2:
        result, terms = math.erfc(math.sqrt(h)), [i + 0.5 for i in range(degrees // 2)]
    else:
        result, terms = math.exp(-h), [i + 1.0 for i in range(degrees // 2 - 1)]
    return result + sum(math.exp(-h + t * math.log(h) - math.lgamma(t + 1)) for t in terms if h)


@pytest.mark.parametrize(
    ("x", "degrees", "expected"),
    [(3.841459, 1, 0.05), (5.991465, 2, 0.05), (16.81189, 6, 0.01), (22.10767, 13, 0.0538)],
)
def test_exceeded(x: float, degrees: int, expected: float) -> None:
    """Numbers of printed tables."""
    assert exceeded(x, degrees) == pytest.approx(expected, abs=2e-4)


def random_setting(number: int) -> tuple[np.ndarray, set[int], dict[str, Any]]:
    """Logits, tokens seen and options, from the number."""
    random = np.random.default_rng(number)
    size = int(random.integers(2, 40))
    logits = (random.uniform(0.3, 4) * random.standard_normal(size)).astype(np.float32)
    if number % 4 == 3:
        logits = np.round(logits)  # ties
    seen = set(random.integers(size, size=3).tolist())
    options: dict[str, Any] = {"temperature": float(random.uniform(0.4, 3)), "top_k": 0}
    if number % 2:
        options["top_k"] = int(random.integers(1, size + 1))
    if number % 3 == 0:
        options["top_p"] = float(random.uniform(0.3, 1))
    if number % 5 == 0:
        options["min_p"] = float(random.uniform(0, 0.3))
    if number % 7 == 0:
        options["logit_bias"] = {0: float(random.normal())}
    if number % 3 == 1:
        options["repetition_penalty"] = float(random.uniform(0.5, 2))
    return logits, seen, options


def draws(logits: np.ndarray, sampler: Sampler, n: int) -> list[int]:
    """By NumPy, one at each of n positions."""
    scores = tinygpt2.adjust(logits, sampler)
    scores = (scores - scores.max()) / sampler.options.temperature
    tokens = tinygpt2.filter_tokens(scores, sampler.options)
    keys = [tinygpt2.gumbel_noise(sampler.seed, position, tokens) for position in range(n)]
    chosen: list[int] = tokens[(scores[tokens] + np.array(keys)).argmax(axis=1)].tolist()
    for position in (0, n - 1):  # that is what choose_token does
        assert tinygpt2.choose_token(logits, sampler, position) == chosen[position]
    return chosen


def draws_in_c(logits: np.ndarray, sampler: Sampler, n: int, model: tinygpt2.Model) -> list[int]:
    """The same by the kernels, whose logits may be any row of the model's size."""
    row = kept_row(logits, model.config.vocab_size)
    options = sampler.options._replace(top_k=sampler.options.top_k or len(logits))
    with model.workspace() as workspace:
        kept = model.backend.kept(workspace, row)
        in_c = Sampler(options, sampler.seen)
        return [kept.choose(0, in_c, position) for position in range(n)]


N_DRAWS, N_SETTINGS = 2000, 200
# Of 200 settings, one by a fair draw would be less probable than this only once in a thousand
# (Bonferroni). The seed is fixed: the test that passes once passes always.
LEAST = 1e-3 / N_SETTINGS


def check_frequencies(numbers: Iterable[int], model: tinygpt2.Model | None) -> None:
    """Chi-squared of each setting. Tokens that are too rare for it count as one."""
    for number in numbers:
        logits, seen, options = random_setting(number)
        expected = kept(logits, seen, **options)
        sampler = Sampler(Options(seed=9, **options), seen)
        chosen = draws(logits, sampler, N_DRAWS)
        assert set(chosen) <= set(expected)
        if model is not None:  # C draws the same, so that its frequencies are these
            assert draws_in_c(logits, sampler, N_DRAWS, model) == chosen, number
        often = {token: p for token, p in expected.items() if p * N_DRAWS >= 5}
        parts, counts = [*often.values()], [chosen.count(token) for token in often]
        rest = 1 - sum(parts)
        if rest * N_DRAWS >= 5:
            parts, counts = [*parts, rest], [*counts, N_DRAWS - sum(counts)]
        if len(parts) > 1:
            found = chi_square(counts, [p / sum(parts) for p in parts])
            assert exceeded(found, len(parts) - 1) > LEAST, (number, found, len(parts))


def some_settings(toy: tinygpt2.Model, numbers: range) -> None:
    check_frequencies(numbers, toy if toy.backend.name == "c" else None)


def test_tokens_are_drawn_as_often_as_they_are_probable(toy: tinygpt2.Model) -> None:
    some_settings(toy, range(3))


@pytest.mark.slow
def test_tokens_are_drawn_as_often_with_200_settings(toy: tinygpt2.Model) -> None:
    some_settings(toy, range(N_SETTINGS))


def test_the_frequencies_can_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees a draw with half the noise."""
    whole = tinygpt2.gumbel_noise
    monkeypatch.setattr(tinygpt2, "gumbel_noise", lambda *place: whole(*place) / 2)
    with pytest.raises(AssertionError):
        check_frequencies(range(12), None)


@pytest.fixture(params=["numpy", pytest.param("c", marks=needs_kernels)])
def model(request: pytest.FixtureRequest, toy_path: Path) -> Iterator[tinygpt2.Model]:
    """The toy, by each of the backends."""
    with tinygpt2.load(toy_path, backend=request.param) as model:
        yield model


def test_five_and_five_more_are_ten(model: tinygpt2.Model) -> None:
    options: dict[str, Any] = {"seed": 3, "logit_bias": {END: -INF}}
    with model.session() as session:
        parts = [
            session.generate_ids("The" if i == 0 else (), max_new_tokens=5, **options)
            for i in (0, 1)
        ]
    assert parts[0] + parts[1] == model.generate_ids("The", max_new_tokens=10, **options)


def test_a_forked_or_rewound_text_goes_on_as_it_would_have(model: tinygpt2.Model) -> None:
    options: dict[str, Any] = {"seed": 3, "logit_bias": {END: -INF}, "repetition_penalty": 1.1}
    expected = model.generate_ids("The", max_new_tokens=12, **options)
    with model.session() as session:
        assert session.generate_ids("The", max_new_tokens=5, **options) == expected[:5]
        fork = session.fork()
        for text in (session, fork):
            assert text.generate_ids(max_new_tokens=7, **options) == expected[5:]
        fork.rewind(9)
        assert fork.generate_ids(max_new_tokens=9, **options) == expected[3:]
        assert session.tokens == fork.tokens


@pytest.mark.parametrize(
    ("seed", "same"), [(-1, MASK), (1 << 64, 0), (-(1 << 200) + 5, 5), (7 - (1 << 64), 7)]
)
def test_seeds_count_modulo_2_to_the_64(model: tinygpt2.Model, seed: int, same: int) -> None:
    texts = [model.generate_ids("a", seed=s, max_new_tokens=8) for s in (seed, same, same ^ 1)]
    assert texts[0] == texts[1] != texts[2]


@needs_kernels
def test_both_backends_write_the_same_texts(toy_path: Path) -> None:
    """Their logits differ by 1e-6 of the largest; a draw by place seldom sees that."""
    options: dict[str, Any] = {"max_new_tokens": 20, "top_k": 0, "temperature": 1.0}
    with tinygpt2.load(toy_path, backend="c") as c, tinygpt2.load(toy_path, backend="numpy") as n:
        same = [
            c.generate_ids("a", seed=s, **options) == n.generate_ids("a", seed=s, **options)
            for s in range(20)
        ]
    assert sum(same) >= 19


def texts_of_seeds(model: tinygpt2.Model, prompt: list[int], seeds: range) -> list[tinygpt2.Answer]:
    """An answer of 100 tokens for each of the seeds, all at once."""
    answers = [model.session().stream(prompt, seed=s, max_new_tokens=100) for s in seeds]
    while any(answer.finish_reason is None for answer in answers):
        tinygpt2.advance(model, [a for a in answers if a.finish_reason is None])
    return answers


def choices_along(model: tinygpt2.Model, prompt: list[int], answer: tinygpt2.Answer) -> list[int]:
    """What NumPy chooses after the prompt and after each token of an answer, and the end of it,
    computed in one pass: generating would give the same as long as the choices agree."""
    n_choices = len(answer.ids) + (answer.finish_reason == "end")
    ids = [*prompt, *answer.ids][: len(prompt) + n_choices - 1]
    span = tinygpt2.Span(model.backend.new_cache(), ids, 0, n_choices)
    logits = model.backend.forward(model.backend.new_workspace(), [span])
    sampler = Sampler(Options(seed=answer.seed), ())  # without a penalty nothing needs to be seen
    return [logits.choose(i, sampler, len(prompt) + i) for i in range(n_choices)]


def different_seeds(n_seeds: int) -> list[int]:
    """The seeds whose texts of the default model differ between the backends."""
    different = []
    with tinygpt2.load(backend="c") as c, tinygpt2.load(backend="numpy") as n:
        prompt = c.encode("Once upon a time")
        for first in range(0, n_seeds, 20):
            for answer in texts_of_seeds(c, prompt, range(first, first + 20)):
                ended = answer.finish_reason == "end"
                expected = [*answer.ids, *(c.config.eos_token_ids[:1] if ended else ())]
                if choices_along(n, prompt, answer) != expected:
                    different.append(answer.seed)
    return different


@needs_kernels
@pytest.mark.slow
def test_100_texts_of_100_tokens_are_the_same_in_both_backends() -> None:
    assert len(different_seeds(100)) <= 1


@needs_kernels
@pytest.mark.soak
def test_990_of_1000_texts_of_100_tokens_are_the_same_in_both_backends() -> None:
    different = different_seeds(1000)
    print(f"different: {different}")
    assert len(different) <= 10


def test_a_seed_is_a_text(toy: tinygpt2.Model) -> None:
    texts = [toy.generate("The", seed=seed, max_new_tokens=10) for seed in (1, 1, 2, -1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_without_a_seed_each_answer_is_another_and_names_its_seed(toy: tinygpt2.Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "logit_bias": {END: -INF}}
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
def test_damaged_weights_are_one_clear_error(
    tmp_path: Path, name: str, index: Any, value: float, position: int
) -> None:
    """And no warning of NumPy's beside it: warnings are errors in these tests."""
    path = damaged_file(tmp_path, name, index, value)
    with tinygpt2.load(path) as model:
        session = model.session()
        for _ in range(position):  # one by one, so that the position is certain
            session.feed([1])
        uses: list[tuple[Callable[[], object], str]] = [
            (lambda: session.feed([1]), f"position {position}\\b"),
            (lambda: model.generate([1] * 5), r"position \d"),
            (lambda: model.score([1] * 5), r"position \d"),
            (lambda: model.logits([1] * 5), r"position \d"),
        ]
        for use, match in uses:
            with pytest.raises(tinygpt2.NumericError, match=match) as caught:
                use()
            assert str(path) in str(caught.value)


# The options

WRONG: list[tuple[str, Any]] = [
    *(("max_new_tokens", value) for value in (-1, 1.5, "3", True, math.nan)),
    *(("temperature", value) for value in (-0.1, math.nan, INF, "1", True, 1j, np.zeros(1))),
    *(("top_k", value) for value in (-1, 2.0, "3", False, np.float32(2))),
    *(("top_p", value) for value in (0, -0.5, 1.01, math.nan, "1", True)),
    *(("min_p", value) for value in (-0.1, 1.01, math.nan, "0", False)),
    *(("repetition_penalty", value) for value in (0, -1, math.nan, INF, "1", True)),
    *(("seed", value) for value in (1.0, "1", b"1", [1])),
    *(("stop", value) for value in ("", ["a", ""], [1], 5, b"a", [b"a"], [None])),
    ("logit_bias", {300: 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {1.0: 1.0}),
    ("logit_bias", {True: 1.0}),
    *(("logit_bias", {1: value}) for value in (INF, -(10**400), math.nan, "1", None, True)),
    *(("logit_bias", value) for value in ([1, 2], 5, "a", [(1, 2.0)])),
]


@pytest.mark.table
@pytest.mark.parametrize(("name", "value"), WRONG, ids=ascii)
def test_a_wrong_option_is_named(toy: tinygpt2.Model, name: str, value: Any) -> None:
    if name == "logit_bias" and not isinstance(value, dict) and is_compiled:
        with pytest.raises(TypeError):  # as Python's own functions do
            toy.stream("a", **{name: value})
        return
    with pytest.raises(tinygpt2.InputError, match=f"option {name}: expected .*, found "):
        toy.stream("a", **{name: value})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "did you mean temperature"),
        ("max_tokens", "did you mean max_new_tokens"),
        ("max_length", "did you mean max_new_tokens"),
        ("topk", "did you mean top_k"),
        ("xyz", "known are max_new_tokens, temperature, top_k, .*, logit_bias"),
    ],
)
def test_an_unknown_option_gets_a_hint(toy: tinygpt2.Model, name: str, meant: str) -> None:
    with pytest.raises(tinygpt2.InputError, match=f"option {name}: there is no such.*{meant}"):
        toy.generate("a", **{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("temperature", 1e7), ("repetition_penalty", 1e-7)])
def test_the_message_names_the_limits(toy: tinygpt2.Model, name: str, value: Any) -> None:
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
        dict.fromkeys(Options._fields),  # None stands for the default
        {"max_new_tokens": np.int64(2), "top_k": np.uint8(3), "seed": np.int32(-4)},
        {"temperature": np.float32(0.5), "top_p": np.float64(0.5), "min_p": np.float16(0.5)},
        {"logit_bias": {np.int64(5): np.float32(1)}},
        {"seed": 1 << 100},
        {"logit_bias": {}},
        {"logit_bias": {0: -INF, 299: 1e30, 5: -1}},
    ],
    ids=ascii,
)
def test_right_options_are_taken(toy: tinygpt2.Model, options: dict[str, Any]) -> None:
    toy.generate("a", **{"max_new_tokens": 2, **options})


def test_defaults_are_those_of_options(toy: tinygpt2.Model) -> None:
    # Their meaning is documented: 200 tokens at most, temperature 0.8, top_k 40.
    assert Options()[:5] == (200, 0.8, 40, 1.0, 0.0)
    written = Options(seed=5)._asdict()
    assert toy.generate("a", seed=5) == toy.generate("a", **written)


def test_a_huge_bias_with_a_penalty_is_no_warning(choose: Choose) -> None:
    """Other programs turn warnings into errors, as these tests do."""
    logits = np.zeros(4, np.float32)
    for bias, penalty in ((-1e308, 1e6), (-1.7e308, 1e-6)):
        biases = {1: bias}
        options = Options(seed=1, logit_bias=biases, repetition_penalty=penalty, top_k=2)
        assert choose(logits, Sampler(options, [1, 2]), 0) in range(4)


# Tokens that are ruled out, and the order of the choice


Case = tuple[np.ndarray, Sampler, int]


def random_case(seed: int) -> Case:
    """Logits, a sampler and a position, with every option set in some of the cases."""
    chance = np.random.default_rng(seed)
    logits = (3 * chance.standard_normal(VOCAB)).astype(np.float32)
    options = Options(
        temperature=float(chance.choice([0, 0.3, 1, 2])),
        top_k=int(chance.choice([0, 1, 5, 20])),
        top_p=float(chance.choice([1, 0.9, 0.5])),
        min_p=float(chance.choice([0, 0.05])),
        repetition_penalty=float(chance.choice([1, 1.5])),
        logit_bias={3: -INF, 4: 1.5} if seed % 3 else None,
        seed=seed,
    )
    sampler = Sampler(options, chance.integers(0, VOCAB, 5).tolist())
    if seed % 2:
        sampler.allowed = bytes(chance.integers(0, 2, VOCAB).tolist()) + b"\1" * 240
    return logits, sampler, int(chance.integers(0, 1000))


def all_allowed(sampler: Sampler) -> set[int]:
    allowed = sampler.allowed or b"\1" * VOCAB
    biases = sampler.options.logit_bias or {}
    return {token for token in range(VOCAB) if allowed[token] and biases.get(token) != -INF}


@pytest.mark.parametrize("seed", range(60))
def test_a_token_that_is_not_allowed_is_never_chosen(seed: int, choose: Choose) -> None:
    """And the choice is the one that a bias of -infinity for the same tokens gives."""
    logits, sampler, position = random_case(2 * seed + 1)
    sampler.allowed = (sampler.allowed or b"")[:VOCAB].ljust(300, b"\0")
    if choose is tinygpt2.choose_token:
        sampler.allowed = sampler.allowed[:VOCAB]
    token = choose(logits, sampler, position)
    assert token in all_allowed(sampler)
    banned = {t: -INF for t in range(VOCAB) if t not in all_allowed(sampler)}
    biases = {**(sampler.options.logit_bias or {}), **banned}
    biased = Sampler(sampler.options._replace(logit_bias=biases), sampler.seen)
    assert choose(logits, biased, position) == token


@pytest.fixture(params=["numpy", pytest.param("c", marks=needs_kernels)])
def order(request: pytest.FixtureRequest, toy_path: Path) -> Iterator[Callable[..., list[int]]]:
    """The first n tokens in the order of the choice, for a case."""
    with tinygpt2.load(toy_path, backend=request.param) as model, model.workspace() as workspace:

        def order_of(case: Case, n: int) -> list[int]:
            logits, sampler, position = case
            row: Any = np.pad(logits, (0, 240), constant_values=np.float32(-1e30))
            if request.param == "c":
                row = kept_row(logits, model.config.vocab_size)
            return model.backend.kept(workspace, row).order(0, sampler, position, n)

        yield order_of


@pytest.mark.parametrize("seed", range(60))
def test_the_order_of_the_choice(seed: int, order: Callable[..., list[int]]) -> None:
    """What the filters keep, each time chosen when the better ones are gone; the rest by score."""
    case = logits, sampler, position = random_case(seed)
    found = [token for token in order(case, 300) if token < VOCAB]
    scores = tinygpt2.adjust(logits, unlimited(sampler))
    allowed = all_allowed(sampler)
    assert sorted(found) == sorted(allowed)
    options, kept_tokens = sampler.options, set(found)
    if options.temperature:
        relative = (scores - max(scores[t] for t in allowed)) / options.temperature
        relative[[t for t in range(VOCAB) if t not in allowed]] = -INF
        kept_tokens = set(tinygpt2.filter_tokens(relative, options).tolist())
    expected: list[int] = []
    while len(expected) < len(kept_tokens):
        left = [t for t in sorted(kept_tokens) if t not in expected]
        only = {t: -INF for t in range(VOCAB) if t not in left}
        plain = options._replace(top_k=0, top_p=1.0, min_p=0.0, logit_bias=only)
        choice = Sampler(plain._replace(repetition_penalty=1.0), ())
        expected.append(tinygpt2.choose_token(scores.astype(np.float32), choice, position))
    n = len(expected)
    assert found[:n] == expected
    assert found[n:] == sorted(allowed - kept_tokens, key=lambda t: (-scores[t], t))
    for count in (1, 2, max(1, n), n + 1):
        assert [token for token in order(case, count) if token < VOCAB] == found[:count]


def unlimited(sampler: Sampler) -> Sampler:
    return Sampler(sampler.options, sampler.seen)
