"""What an answer may be: constraints, ends, time, the context, and stopping it from outside."""

from __future__ import annotations

import asyncio
import pickle
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import TOY

import tinygpt2
from tinygpt2 import ConstraintError, ContextError, InputError, Model

BACKENDS = ["numpy"] if tinygpt2.library_path() is None else ["c", "numpy"]
ROOM = 128  # positions of the toy
END = 256
regex = pytest.importorskip("regex", reason="expressions are matched by the package regex")


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """Its tokens are bytes."""
    with tinygpt2.toy(backend=request.param) as model:
        yield model


# Expressions


EXPRESSIONS = [
    r"[0-9]{4}",
    r"(?:yes|no|perhaps)",
    r'\{"name": "[a-z]{1,9}", "age": [1-9][0-9]?\}',
    r"[a-z]+ [a-z]+ [a-z]+\.",
    r"\d\d:\d\d",
    r"(?i:abc|xyz)+!",
    r"[à-ü]{2}x",
    r"€[0-9]+",
    r"[\u4e00-\u9fff]{3}",
    r"(?P<word>[ab]+)-(?P=word)",
    r"x{3}|y{5}|",
    r".{5}",
    r"\w+@\w+\.com",
]


@pytest.mark.table
@pytest.mark.parametrize("pattern", EXPRESSIONS)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_matches_the_expression(model: Model, pattern: str, temperature: float) -> None:
    for seed in range(3):
        result = model.complete(
            "a", regex=pattern, seed=seed, temperature=temperature, max_new_tokens=60
        )
        text = result.text or ""
        whole = regex.fullmatch(pattern, text, partial=result.finish_reason == "length")
        assert whole, (pattern, text)
        assert result.finish_reason in ("end", "length")


def test_both_backends_choose_the_same_by_an_expression() -> None:
    if BACKENDS == ["numpy"]:
        pytest.skip("needs the C kernels")
    with tinygpt2.toy(3) as c, tinygpt2.toy(3, backend="numpy") as slow:
        for pattern in EXPRESSIONS:
            answers = [
                m.complete("a", regex=pattern, seed=7, max_new_tokens=30).ids for m in (c, slow)
            ]
            assert answers[0] == answers[1], pattern


def test_the_first_token_that_fits_is_taken_in_the_order_of_the_choice(model: Model) -> None:
    """By a brute force over all tokens at each step."""
    pattern = r"[b-y]{8}"
    for seed in range(5):
        found = model.complete("ab", regex=pattern, seed=seed).ids
        expected: list[int] = []
        with model.session() as session, model.workspace() as workspace:
            session.feed("ab")
            for _ in range(8):
                row = model.backend.kept(workspace, session._compute_all(workspace))
                sampler = tinygpt2.Sampler(tinygpt2.Options(seed=seed), session.tokens)
                for token in row.order(0, sampler, len(session), 257):
                    text = bytes([*expected, token]).decode("latin-1") if token < 256 else "!"
                    if regex.fullmatch(pattern, text, partial=True):
                        break
                expected.append(token)
                session.feed([token])
        assert found == expected


def test_the_end_comes_only_at_a_full_match(model: Model) -> None:
    for seed in range(10):
        result = model.complete("a", regex=r"(?:[a-z]{3})+", seed=seed, max_new_tokens=100)
        if result.finish_reason == "end":
            assert len(result.ids) % 3 == 0


def test_an_expression_ends_an_answer_without_an_end_token(model: Model) -> None:
    """No token can follow a full match, and end-of-text is forbidden."""
    result = model.complete("a", regex="[0-9]{3}", seed=1, logit_bias={END: -np.inf})
    assert (len(result.ids), result.finish_reason) == (3, "end")


def test_a_corner_is_an_error_with_the_answer_so_far(model: Model) -> None:
    forbidden = dict.fromkeys(range(ord("0"), ord("9") + 1), -np.inf)
    session = model.session()
    session.feed("a")
    message = "options regex, logit_bias: no token can follow 'ab'"
    with pytest.raises(ConstraintError, match=message) as caught:
        session.generate(regex="ab[0-9]", seed=1, logit_bias=forbidden)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.text, error.ids, str(error)) == ("ab", [*b"ab"], str(caught.value))
    assert session.tokens == [*b"aab"]
    assert session.generate(regex="ab", seed=1) == "ab"  # the session goes on


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        *((p, "look-around") for p in ("a(?=c)b", "a(?!c)b", "(?<=a)b", "(?<!a)b", "(?>a|ab)c")),
        *((p, "look-around") for p in ("(?R)?a", "(a(?1)?b)", "(?&n)", "(?(1)a|b)", "(*FAIL)")),
        *((p, "look-around") for p in ("(?r)ab", "(?b)ab", "(?e)ab", "(?p)a|ab", "(?x)a+ +a")),
        *((p, "word boundary") for p in (r"x\bx", r"\Ba", r"a\m", r"\Ka", r"\X")),
        *((p, "possessive") for p in ("a++a", "a*+a", "a?+a", "a{2}+a", "[ab]++")),
        *((p, "fuzzy") for p in ("(?:ab){e<=1}", "(?:ab){i}", "(?:ab){1s+1d<3}")),
    ],
)
def test_expressions_that_cannot_be_tested_token_by_token(
    model: Model, pattern: str, name: str
) -> None:
    with pytest.raises(InputError, match=name):
        model.generate("a", regex=pattern)


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "[z-a]", r"\p{Nonsense}"])
def test_expressions_that_are_none(model: Model, pattern: str) -> None:
    with pytest.raises(InputError, match="option regex: "):
        model.generate("a", regex=pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"caf\351",
        r"f\xe9",
        r"(?#\b is not here)ab",
        "(?|a|b)c",
        r"\(\?=a\)",
        r"[(?=]+",
        r"\+\+",
        r"[*+]{2}",
        r"a\\b",
        r"\{e\}",
        r"[\]\b]+",
    ],
)
def test_escapes_and_sets_are_taken_as_they_are(model: Model, pattern: str) -> None:
    text = model.generate("a", regex=pattern, seed=1, max_new_tokens=20)
    assert regex.fullmatch(pattern, text, partial=True)


def test_a_slow_expression(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinygpt2, "REGEX_TIMEOUT", 0.05)
    with pytest.raises(ConstraintError, match=r"option regex: one test took over 0\.05") as caught:
        model.generate("a", regex="(?:a|aa)+$b", allowed=[ord("a")], max_new_tokens=100)
    assert caught.value.text == "a" * len(caught.value.ids) != ""
    monkeypatch.undo()
    begun = time.monotonic()
    result = model.complete("a", regex="[[:alpha:]]{3}[[:digit:]]{3}", max_time=0.3)
    assert result.finish_reason in ("time", "end")
    assert time.monotonic() - begun < 3


def test_bytes_that_become_characters() -> None:
    """Each first part of a character is tested for all characters that it can become."""
    expression = tinygpt2.Expression("[à-ü]+")
    assert expression.accepts("é".encode()[:1])
    assert not expression.accepts(b"\xe2")
    assert not expression.accepts(b"\xff")
    assert not expression.accepts(b"")
    expression.push("é".encode()[:1])
    assert not expression.is_complete()
    assert [chr(0xC0 | b & 0x3F) for b in range(128, 256) if expression.accepts(bytes([b]))] == [
        *map(chr, range(0xE0, 0xFD))
    ]


@pytest.mark.table
@pytest.mark.parametrize(
    "start", [b"\xc3", b"\xe0", b"\xed", b"\xef\xbf", b"\xf0\x9f", b"\xf4\x8f"]
)
def test_the_characters_of_some_first_bytes(start: bytes) -> None:
    everything = map(chr, [*range(0xD800), *range(0xE000, 0x110000)])
    expected = [c for c in everything if c.encode().startswith(start)]
    assert tinygpt2.characters_from(start) == "".join(expected)


@pytest.mark.parametrize(
    "pattern", [*EXPRESSIONS, r"(?i)straße", r"[^\W\d]x", r"\p{Greek}+", "[k-s]"]
)
def test_one_character_of_each_kind_stands_for_all(pattern: str) -> None:
    """After some beginnings of matches, against all characters of each first byte."""
    chance = random.Random(2)
    expression = tinygpt2.Expression(pattern)
    texts = ["", "1", "a", "ab-", "é", "€", "a@", "12:", "s"]
    for text in texts:
        if expression.match(text, True):
            expression.text = text
            for first in (0xC3, 0xC5, 0xCE, 0xE2, 0xE4):
                everything = tinygpt2.characters_from(bytes([first]))
                some = chance.sample(everything, min(64, len(everything)))
                if first < 0xE0:
                    some = list(everything)
                fits = any(expression.match(text + c, True) for c in some)
                assert expression.accepts(bytes([first])) >= fits
                if first < 0xE0:
                    assert expression.accepts(bytes([first])) == fits


# Sets and bad words


def test_allowed_tokens(model: Model) -> None:
    ids = model.generate_ids("a", allowed=[*b"xyz"], seed=1, max_new_tokens=30)
    assert set(ids) <= {*b"xyz"}
    assert len(ids) == 30
    everything = model.generate_ids("a", allowed=range(257), seed=1, max_new_tokens=30)
    assert everything == model.generate_ids("a", seed=1, max_new_tokens=30)
    wrong: list[Any] = [5, "ab", [257], [-1], [1.0], object()]
    for value in wrong:
        with pytest.raises(InputError, match="option allowed: expected tokens"):
            model.generate("a", allowed=value)
    with pytest.raises(ConstraintError, match="options allowed: no token can begin it"):
        model.generate("a", allowed=[])


def test_a_function_of_the_ids_so_far(model: Model) -> None:
    seen: list[list[int]] = []

    def next_letter(ids: list[int]) -> list[int]:
        seen.append(ids)
        return [ids[-1] + 1]

    assert model.generate("a", allowed=next_letter, max_new_tokens=4) == "bcde"
    assert seen == [[*b"a"], [*b"ab"], [*b"abc"], [*b"abcd"]]
    with pytest.raises(ConstraintError, match="no token can follow 'xx'") as caught:
        model.generate("a", allowed=lambda ids: [ord("x")] if len(ids) < 3 else [], temperature=0)
    assert caught.value.text == "xx"
    with pytest.raises(InputError, match="option allowed: expected tokens below 257, found"):
        model.generate("a", allowed=lambda ids: [300])
    with pytest.raises(ZeroDivisionError):
        model.generate("a", allowed=lambda ids: [1 // 0])


def test_allowed_tokens_like_transformers(toy: Model, toy_path: Any) -> None:
    """The mask comes before the filters: the best of the allowed tokens are filtered."""
    ids = toy.generate_ids([1], allowed=[5, 6, 7], top_k=1, seed=1, max_new_tokens=5)
    greedy = toy.generate_ids([1], allowed=[5, 6, 7], temperature=0, max_new_tokens=5)
    assert ids == greedy


def test_bad_words_are_never_completed(model: Model) -> None:
    plain = model.generate("a", seed=3, max_new_tokens=100)
    assert "a" in plain
    words = [plain[10:12], plain[20:23], plain[5]]
    text = model.generate("a", seed=3, max_new_tokens=100, bad_words=words)
    for word in words:
        assert word not in text
    ids = [[*b"xy"], [*b"z"]]
    assert "z" not in model.generate("a", seed=4, max_new_tokens=100, bad_words=ids)
    wrong: list[Any] = [5, [5], [[]], [""], [[300]], {"a": 1}]
    for value in wrong:
        with pytest.raises(InputError, match="option bad_words: expected texts"):
            model.generate("a", bad_words=value)


def test_bad_words_like_transformers(toy: Model) -> None:
    torch = pytest.importorskip("torch", reason="needs the reference implementation")
    lib = pytest.importorskip("transformers", reason="needs the reference implementation")
    chance = random.Random(1)
    words = [[chance.randrange(8) for _ in range(chance.randrange(1, 4))] for _ in range(6)]
    processor = lib.NoBadWordsLogitsProcessor(words, eos_token_id=0)
    options = tinygpt2.Options(bad_words=tuple(map(tuple, words)))
    for _ in range(200):
        text = [chance.randrange(8) for _ in range(chance.randrange(1, 9))]
        session = toy.session()
        session._tokens = list(text)
        size = toy.config.vocab_size
        theirs = processor(torch.tensor([text]), torch.zeros(1, size))[0]
        mask = tinygpt2.allowed_mask(options, None, session)
        assert mask is not None
        assert [*mask] == [int(value == 0) for value in theirs]


# Ends


def test_stop_tokens_end_an_answer(model: Model) -> None:
    ids = model.generate_ids("a", seed=3, max_new_tokens=50)
    stop = ids[20]
    session = model.session()
    found = session.generate_ids("a", seed=3, max_new_tokens=50, stop_token_ids=[stop, 7])
    assert found == ids[: ids.index(stop)]
    assert session.finish_reason == "stop"
    with pytest.raises(InputError, match="option stop_token_ids: expected tokens below 257"):
        model.generate("a", stop_token_ids=[257])


def test_max_time(model: Model) -> None:
    forbidden = {END: -np.inf}
    begun = time.monotonic()
    result = model.complete("a", max_time=0.05, overflow="shift", max_new_tokens=10**6, seed=1,
                            logit_bias=forbidden)  # fmt: skip
    assert result.finish_reason == "time"
    assert time.monotonic() - begun < 5
    assert result.timings.seconds >= 0.04
    assert model.complete("a", max_time=0).ids == []
    for wrong in (-1, "1", True):
        with pytest.raises(InputError, match="option max_time"):
            model.generate("a", max_time=wrong)  # type: ignore[arg-type]


# Results


def test_alternatives_of_each_token(model: Model) -> None:
    result = model.complete("ab", seed=1, max_new_tokens=6, logprobs=3)
    assert result.logprobs is not None
    assert result.top_logprobs is not None
    for i, (token, logprob, best) in enumerate(
        zip(result.ids, result.logprobs, result.top_logprobs)
    ):
        row = model.logits([*b"ab", *result.ids[:i]])[-1].astype(np.float64)
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert logprob == pytest.approx(expected[token], abs=1e-4)  # float32 logits up to 20
        assert [token for token, _ in best] == np.argsort(-expected, kind="stable")[:3].tolist()
        assert [value for _, value in best] == pytest.approx(sorted(expected)[:-4:-1], abs=1e-4)
    plain = model.complete("ab", seed=1, max_new_tokens=6)
    assert (plain.logprobs, plain.top_logprobs) == (result.logprobs, None)


def test_a_stream_carries_log_probabilities(model: Model) -> None:
    stream = model.stream("ab", seed=1, max_new_tokens=6, logprobs=2)
    assert stream.logprobs == []
    seen = []
    for _ in stream:
        assert stream.logprobs is not None
        seen.append((len(stream.logprobs), len(stream.top_logprobs)))
    assert seen[-1] == (6, 6)
    whole = model.complete("ab", seed=1, max_new_tokens=6, logprobs=2)
    assert (stream.logprobs, stream.top_logprobs) == (whole.logprobs, whole.top_logprobs)
    assert model.stream("ab", max_new_tokens=2).result().logprobs is None
    for wrong in (-1, 1.5, "2", True):
        with pytest.raises(InputError, match="logprobs: expected None or a whole number"):
            model.complete("a", logprobs=wrong)  # type: ignore[arg-type]


def test_timings(model: Model) -> None:
    timings = model.complete("abc", seed=1, max_new_tokens=5).timings
    assert (timings.prompt_tokens, timings.new_tokens) == (3, 5)
    assert timings.seconds_to_first_token is not None
    assert 0 < timings.seconds_to_first_token <= timings.seconds
    assert model.complete("abc", max_new_tokens=0).timings.seconds_to_first_token is None


# The context


LONG: dict[str, Any] = {"max_new_tokens": 3 * ROOM, "seed": 5, "logit_bias": {END: -np.inf}}


def test_overflow(model: Model) -> None:
    assert model.complete("a", **LONG).finish_reason == "context"
    assert len(model.complete("a", **LONG).ids) == ROOM
    session = model.session()
    with pytest.raises(ContextError, match="all 128 positions are used"):
        session.generate_ids("a", overflow="error", **LONG)
    assert len(session) == ROOM + 1
    with pytest.raises(InputError, match="option overflow: expected one of"):
        model.generate("a", overflow="ignore")  # type: ignore[arg-type]


@pytest.mark.table
@pytest.mark.parametrize("keep", [10, 0, 1, ROOM - 1])
def test_a_shift_drops_the_oldest_half_behind_the_beginning(model: Model, keep: int) -> None:
    """And the rest is computed anew, as a session does that is told to do so by hand."""
    session = model.session()
    found = session.generate_ids("ab", overflow="shift", keep=keep, **LONG)
    assert len(found) == 3 * ROOM
    text, dropped = [*b"ab"], 0
    ids: list[int] = []
    with model.workspace() as workspace:
        while len(ids) < 3 * ROOM:
            if len(text) > ROOM:
                n = (len(text) - keep + 1) // 2
                text, dropped = text[:keep] + text[keep + n :], dropped + n
            fresh = model.session()
            fresh.feed(text)
            row = model.backend.kept(workspace, fresh._compute_all(workspace))
            options = tinygpt2.Options(seed=5, logit_bias={END: -np.inf})
            ids.append(row.choose(0, tinygpt2.Sampler(options, text), len(text) + dropped))
            text.append(ids[-1])
    assert found == ids
    assert session.tokens == text
    assert session.position == 3 * ROOM + 2


def test_a_penalty_forgets_what_a_shift_dropped(model: Model) -> None:
    """So that 150 and then 50 tokens are 200."""
    options = {**LONG, "overflow": "shift", "repetition_penalty": 1.5}
    whole = model.generate_ids("ab", **{**options, "max_new_tokens": 200})
    with model.session() as session:
        first = session.generate_ids("ab", **{**options, "max_new_tokens": 150})
        assert first + session.generate_ids(**{**options, "max_new_tokens": 50}) == whole


def test_a_shift_that_keeps_everything(model: Model) -> None:
    with pytest.raises(InputError, match="option keep: expected below 128"):
        model.generate("a", overflow="shift", keep=ROOM)


def test_a_shifted_text_goes_on_after_fork_save_and_rewind(model: Model, tmp_path: Any) -> None:
    session = model.session()
    session.generate_ids("ab", overflow="shift", **{**LONG, "max_new_tokens": ROOM + 40})
    session.save(tmp_path / "a.session")
    others = [session.fork(), model.load_session(tmp_path / "a.session")]
    more = {**LONG, "max_new_tokens": 5}
    expected = session.generate_ids(**more)
    for other in others:
        assert other.position == session.position - 5
        assert other.generate_ids(**more) == expected
    session.rewind(5)
    assert session.generate_ids(**more) == expected


@pytest.mark.parametrize("n", [ROOM - 5, ROOM + 1, ROOM + 9])
def test_tokens_that_a_shift_has_dropped_count_as_not_seen(model: Model, n: int) -> None:
    """Neither for this answer nor for one that goes on from here: two parts are the whole."""
    likes = {ord("a"): 10, ord("#"): 27}  # a seen "a" is worth 5, "#" 7, a seen "#" 3.5
    options = {**LONG, "overflow": "shift", "repetition_penalty": 2, "logit_bias": likes}
    options.update(allowed=[*b"a#"], temperature=0)
    whole, parts = model.session(), model.session()
    ids = whole.generate_ids("#b", **options)
    assert ids.index(ord("#")) == ROOM - 1  # the first token behind the shift
    first = parts.generate_ids("#b", **{**options, "max_new_tokens": n})
    rest = parts.generate_ids(**{**options, "max_new_tokens": len(ids) - n})
    assert first + rest == ids
    assert parts.tokens == whole.tokens


# Stopping it from outside


def test_cancel(model: Model) -> None:
    session = model.session()
    stream = session.stream("a", **LONG)
    next(stream)
    stream.cancel()
    assert list(stream) == []
    assert (stream.finish_reason, session.finish_reason) == ("cancelled", "cancelled")
    assert session.generate("b", max_new_tokens=2, seed=1)


def test_cancel_from_another_thread_inside_a_long_prompt(toy: Model) -> None:
    session = toy.session()
    stream = session.stream([1] * TOY["n_positions"], max_new_tokens=1)
    asked: list[int] = []
    forward = toy.backend.forward

    class Slow:
        """The backend, whose pass waits for the other thread."""

        def __getattr__(self, name: str) -> Any:
            return getattr(toy.backend, name)

        def forward(self, workspace: Any, spans: Any, goes_on: Any) -> Any:
            def cancelled_on_the_way() -> bool:
                asked.append(1)
                thread = threading.Thread(target=stream.cancel)
                thread.start()
                thread.join()
                return bool(goes_on())

            if not cancelled_on_the_way():
                raise tinygpt2.CancelError
            return forward(workspace, spans)

    with toy.workspace() as workspace:
        rows = tinygpt2.compute(toy.backend, workspace, [])
    assert rows == []
    slow: Any = Slow()
    with toy.workspace() as workspace, pytest.raises(tinygpt2.CancelError):
        tinygpt2.compute(slow, workspace, [session], stream.goes_on)
    assert asked == [1]
    assert session._open_cache().length == 0
    assert list(stream) == []
    assert stream.finish_reason == "cancelled"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_asks_whether_it_goes_on(toy_path: Any, backend: Any) -> None:
    """In NumPy at every layer. C asks when it comes back, every 20 ms."""
    with tinygpt2.load(toy_path, backend=backend) as model, model.session() as session:
        if backend == "c":
            pytest.skip("a pass of the toy is over before C comes back")
        stream = session.stream([1, 2], max_new_tokens=1)
        answers = iter([True, False])
        with model.workspace() as workspace, pytest.raises(tinygpt2.CancelError):
            tinygpt2.compute(model.backend, workspace, [session], lambda: next(answers))
        del stream


def test_async(model: Model) -> None:
    async def main() -> list[str]:
        one = model.astream("a", seed=1, max_new_tokens=20)
        two = model.astream("b", seed=2, max_new_tokens=20)
        pieces = ["", ""]
        async for piece in one:
            pieces[0] += piece
            pieces[1] += await two.__anext__() if len(pieces[1]) < 5 else ""
        async for piece in two:
            pieces[1] += piece
        return pieces

    expected = [model.generate(p, seed=s, max_new_tokens=20) for p, s in (("a", 1), ("b", 2))]
    assert asyncio.run(main()) == expected


def test_a_cancelled_task_cancels_its_answer(model: Model) -> None:
    async def main() -> tinygpt2.Answer:
        stream = model.astream("a", overflow="shift", **{**LONG, "max_new_tokens": 10**6})

        async def use() -> None:
            async for _ in stream:
                pass

        task = asyncio.ensure_future(use())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return stream.answer

    answer = asyncio.run(main())
    assert list(answer) == []
    assert answer.finish_reason == "cancelled"


def test_wrong_arguments_of_astream_raise_at_once(model: Model) -> None:
    with pytest.raises(InputError, match="top_k"):
        model.astream("a", top_k=-1)
