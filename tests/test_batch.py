"""Many texts in one loop: each is what it is alone, and they share the readings of the weights."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import untimed

import tinygpt2
from tinygpt2 import ConstraintError, ContextError, InputError, Model, Result

BACKENDS = ["numpy"] if tinygpt2.library_path() is None else ["c", "numpy"]
END = 256  # of the toy


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, tales_path: Any) -> Iterator[Model]:
    with tinygpt2.toy(1, backend=request.param) as model:
        yield model


def assert_same(found: list[Result], expected: list[Result], model: Model) -> None:
    """In NumPy log-probabilities depend on how many rows share a product, by a rounding error."""
    if model.backend.name == "c":
        assert untimed(found) == untimed(expected)
        return
    assert [result[:4] for result in found] == [result[:4] for result in expected]
    for a, b in zip(found, expected):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        for best, other in zip(a.top_logprobs or [], b.top_logprobs or []):
            assert [token for token, _ in best] == [token for token, _ in other]


PROMPTS: list[Any] = ["", "a", "Hello ", [*b"xyz"], "b" * 100, "a", "\u20ac", "ends soon: a"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 100])
def test_each_text_is_what_it_is_alone(model: Model, batch_size: int) -> None:
    """Texts of different lengths, which end at different times and for different reasons."""
    seeds = list(range(len(PROMPTS)))
    options: dict[str, Any] = {"max_new_tokens": 60, "stop": ["ka"], "top_k": 0, "logprobs": 2}
    alone = [model.complete(p, seed=s, **options) for p, s in zip(PROMPTS, seeds)]
    together = model.generate_batch(PROMPTS, seed=seeds, batch_size=batch_size, **options)
    assert_same(together, alone, model)
    assert len({result.finish_reason for result in together}) > 1


def test_random_options(model: Model) -> None:
    chance = random.Random(3)
    for seed in range(10):
        options: dict[str, Any] = {
            "temperature": chance.choice([0, 0.7, 1.5]),
            "top_k": chance.choice([0, 5, 40]),
            "top_p": chance.choice([1, 0.8]),
            "repetition_penalty": chance.choice([1, 1.2]),
            "max_new_tokens": chance.randrange(30),
            "overflow": chance.choice(["stop", "shift"]),
            "keep": chance.randrange(5),
            "bad_words": chance.choice([None, ["a"], ["ka", "he"]]),
        }
        prompts = ["x" * chance.randrange(128) for _ in range(5)]
        alone = [model.complete(p, seed=seed, **options) for p in prompts]
        assert_same(model.generate_batch(prompts, seed=seed, **options), alone, model)


def test_the_next_text_starts_when_one_ends(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are as full as they can be: the long text does not hold the short ones up."""
    sizes: list[int] = []
    advance = tinygpt2.advance

    def watched(model: Model, answers: Any) -> None:
        sizes.append(len(answers))
        advance(model, answers)

    monkeypatch.setattr(tinygpt2, "advance", watched)
    if not tinygpt2.__file__.endswith(".py"):
        pytest.skip("compiled calls cannot be watched")
    counts = [20, 2, 2, 2, 2]
    answers = (
        model.begin("a", False, {"max_new_tokens": n, "logit_bias": {END: -np.inf}}, False, None)
        for n in counts
    )
    done = list(tinygpt2.run_all(enumerate(answers), 2))
    assert [number for number, _ in done] == [1, 2, 3, 4, 0]
    assert sizes.count(2) >= 8
    assert len(sizes) <= 25  # about as many passes as the longest text has tokens


def test_several_answers_to_one_prompt(model: Model) -> None:
    results = model.generate_batch(["a", "b"], seed=5, num_return_sequences=3, max_new_tokens=30)
    assert len(results) == 6
    assert results[0].text == model.generate("a", seed=5, max_new_tokens=30)
    assert results[3].text == model.generate("b", seed=5, max_new_tokens=30)
    assert len({result.text for result in results}) == 6
    assert results[1].seed == results[4].seed != 5
    for result in results:
        prompt = "a" if result in results[:3] else "b"
        assert result.text == model.generate(prompt, seed=result.seed, max_new_tokens=30)
    again = model.generate_batch(["a", "b"], seed=5, num_return_sequences=3, max_new_tokens=30)
    assert_same(again, results, model)


def test_seeds_of_a_batch(model: Model) -> None:
    one, two, three = model.generate_batch(["a", "a", "a"], seed=[1, np.int64(2), 1])
    assert (one.seed, two.seed, three.seed) == (1, 2, 1)
    assert one.text == three.text
    fresh = model.generate_batch(["a"] * 3)
    assert len({result.seed for result in fresh}) == 3
    wrong: list[Any] = [[1], [1, 2, 3, 4], "123", 1.5]
    for value in wrong:
        with pytest.raises(InputError, match="seed: expected"):
            model.generate_batch(["a"] * 3, seed=value)


def test_an_empty_batch(model: Model) -> None:
    assert model.generate_batch([]) == []


def test_wrong_arguments(model: Model) -> None:
    wrong: list[Any] = [0, -1, 1.5, "2", None, True]
    for value in wrong:
        for name in ("batch_size", "num_return_sequences"):
            arguments: dict[str, Any] = {name: value}
            with pytest.raises(InputError, match=f"{name}: expected a whole number from 1"):
                model.generate_batch(["a"], **arguments)
    with pytest.raises(InputError, match="temperature"):
        model.generate_batch(["a"], temperature=-1)
    with pytest.raises(InputError, match="did you mean max_new_tokens"):
        model.generate_batch(["a"], max_tokens=1)  # type: ignore[arg-type]
    with pytest.raises(ContextError):
        model.generate_batch(["a", "b" * 129], max_new_tokens=1)


def test_an_error_of_one_text_is_raised_and_leaves_the_others(model: Model) -> None:
    """It is raised when its result is asked for."""
    pytest.importorskip("regex", reason="expressions are matched by the package regex")
    values: dict[str, Any] = {
        "regex": "ab[0-9]",
        "logit_bias": dict.fromkeys(range(48, 58), -np.inf),
    }
    answers = iter(
        [
            model.begin("a", False, values, False, None),
            model.begin("a", False, {"max_new_tokens": 5, "seed": 1}, False, None),
        ]
    )
    done = dict(tinygpt2.run_all(enumerate(answers), 8))
    assert done[1].result().text == model.generate("a", max_new_tokens=5, seed=1)
    with pytest.raises(ConstraintError):
        done[0].result()


def test_caches_of_a_batch_are_freed_when_their_texts_end(model: Model) -> None:
    gc.collect()
    before = set(map(id, open_sessions(model)))
    most = [0]

    def count(ids: list[int]) -> range:
        most[0] = max(most[0], sum(id(s) not in before for s in open_sessions(model)))
        return range(257)

    model.generate_batch(["a"] * 12, batch_size=3, seed=1, max_new_tokens=2, allowed=count)
    assert 0 < most[0] <= 3 + 3  # those that have just ended, and their successors


def open_sessions(model: Model) -> list[tinygpt2.Session]:
    sessions = (o for o in gc.get_objects() if type(o) is tinygpt2.Session)
    return [session for session in sessions if session.model is model and not session.closed]


def test_errors_name_their_prompt(model: Model) -> None:
    wrong: list[Any] = ["abc", None, 5]
    for value in wrong:
        with pytest.raises(InputError, match="prompts: expected a list of texts"):
            model.generate_batch(value)
    bad: list[Any] = ["a", 5]
    with pytest.raises(InputError, match=r"prompts\[1\]: prompt: expected text"):
        model.generate_batch(bad, num_return_sequences=2)
    with pytest.raises(ContextError, match=r"prompts\[1\]: context: expected at most 128"):
        model.generate_batch(["a", "b" * 200])
    with pytest.raises(ConstraintError, match=r"prompts\[2\]: options allowed: no token") as caught:
        model.generate_batch(
            ["a", "b", "c"], allowed=lambda ids: [] if bytes(ids[:2]) == b"cx" else [ord("x")],
            max_new_tokens=5, num_return_sequences=2,
        )  # fmt: skip
    assert (caught.value.text, caught.value.ids) == ("x", [ord("x")])


def test_memory_of_a_batch_is_that_of_batch_size_texts(model: Model) -> None:
    """Prompts are begun when there is room for them, so that caches do not pile up."""
    begun: list[int] = []

    def answers() -> Iterator[tinygpt2.Answer]:
        for number in range(20):
            begun.append(number)
            yield model.begin("a", False, {"max_new_tokens": 2, "seed": number}, False, None)

    for n_done, _ in enumerate(tinygpt2.run_all(enumerate(answers()), 3), 1):
        assert len(begun) <= n_done + 3 + 3
    assert len(begun) == 20
