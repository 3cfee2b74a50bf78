"""Section 7, text: sessions, generation, stop texts, scores, and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TOY, in_threads, random_weights, slow, toy_tokenizer, write_checkpoint

import tinygpt2
from tinygpt2 import ContextError, InputError, Model, Session, StateError

INF = math.inf
ROOM = TOY["n_positions"]
VOCAB, _ = toy_tokenizer()
END = VOCAB["<|endoftext|>"]
ENDLESS: dict[str, Any] = {"seed": 1, "logit_bias": {END: -INF}}  # ends for other reasons only


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """The same numbers in products of other shapes are summed in another order.

    The toy's logits are about 10, float32 keeps 7 digits, and thousands of additions lose a part.
    """
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def make_model(folder: Path, config: dict[str, Any], tokenizer: bool = True) -> Model:
    tinygpt2.convert(write_checkpoint(folder, config, tokenizer=tokenizer), folder / "m.tg2")
    return tinygpt2.load(folder / "m.tg2")


def fed(model: Model, prompt: Any) -> Session:
    session = model.session()
    session.feed(prompt)
    return session


def always(word: str) -> dict[int, float]:
    """A logit_bias with which a token of the toy vocabulary follows itself for ever."""
    return {VOCAB[word]: 1e9}


# What is fed and forgotten


@pytest.mark.parametrize(
    "parts",
    [
        ["The thing", " in the bag"],
        [[1, 2, 3], [4], [5, 6]],
        ["T", [1, 2], "", "he", []],
        [np.arange(20), np.array([7, 8], np.uint16), (1, 2)],
        [[9] * (ROOM - 1), [8]],
    ],
    ids=str,
)
def test_logits_are_those_of_all_tokens_at_once(toy: Model, parts: list[Any]) -> None:
    session, tokens = toy.session(), []
    for part in parts:
        session.feed(part)
        tokens += toy.encode(part) if isinstance(part, str) else [int(token) for token in part]
        assert session.tokens == tokens
        assert all(type(token) is int for token in session.tokens)
        assert_close(session.logits, toy.logits(tokens)[-1])


def test_logits_differ_after_other_tokens(toy: Model) -> None:
    """The check above could not fail if the logits hardly depended on the tokens."""
    first, second = fed(toy, [1, 2, 3]).logits, fed(toy, [2, 1, 3]).logits
    assert np.abs(first - second).max() > 0.1


def test_what_a_session_hands_out_is_a_copy(toy: Model) -> None:
    session = fed(toy, [1, 2])
    logits = session.logits
    session.tokens.append(3)
    session.logits[:] = 0
    assert session.tokens == [1, 2]
    assert (session.logits == logits).all()


@pytest.mark.parametrize("n", [0, 1, 3, 7, 8])
def test_rewind_then_feed_is_a_fresh_session(toy: Model, n: int) -> None:
    session = fed(toy, list(range(8)))
    session.rewind(n)
    assert session.tokens == list(range(8 - n))
    if n < 8:
        assert_close(session.logits, toy.logits(range(8 - n))[-1])
    session.feed([50, 51])
    expected = [*range(8 - n), 50, 51]
    assert session.tokens == expected
    assert_close(session.logits, toy.logits(expected)[-1])
    answer = session.generate(max_new_tokens=8, seed=1)
    assert answer == toy.generate(expected, max_new_tokens=8, seed=1)


@pytest.mark.parametrize("n", [4, -1, 1.0, True, "1", None])
def test_a_wrong_rewind_changes_nothing(toy: Model, n: Any) -> None:
    session = fed(toy, [1, 2, 3])
    with pytest.raises(InputError, match="rewind: expected 0 to 3 tokens, found "):
        session.rewind(n)
    assert session.tokens == [1, 2, 3]


def test_an_empty_session_has_no_logits(toy: Model) -> None:
    session = toy.session()
    session.feed("")
    assert session.tokens == []
    with pytest.raises(StateError, match="empty"):
        _ = session.logits
    session.feed([1])
    session.rewind(1)
    with pytest.raises(StateError, match="empty"):
        _ = session.logits


WRONG_IDS: list[Any] = [
    [-1],
    [TOY["vocab_size"]],
    [1 << 70],
    [1.0],
    [True],
    ["1"],
    [None],
    [[1]],
    np.array([1.0]),
    np.array([True]),
    np.array([[1, 2]]),
    np.array([-1]),
]


@pytest.mark.table
@pytest.mark.parametrize("ids", WRONG_IDS, ids=ascii)
@pytest.mark.parametrize("use", ["feed", "generate", "stream", "logits", "score", "decode"])
def test_wrong_ids_are_refused_with_their_position(toy: Model, ids: Any, use: str) -> None:
    session = fed(toy, [1])
    call = session.feed if use == "feed" else getattr(toy, use)
    with pytest.raises(InputError, match=r"token ids: expected .*299, found .* at position 0"):
        call(ids)
    assert session.tokens == [1]


@pytest.mark.table
@pytest.mark.parametrize("prompt", [None, 5, 1.5, b"text", bytearray(b"text")], ids=ascii)
@pytest.mark.parametrize("use", ["generate", "logits", "score"])
def test_what_is_neither_text_nor_ids_is_refused(toy: Model, prompt: Any, use: str) -> None:
    with pytest.raises(InputError, match="prompt: expected text or token ids, found"):
        getattr(toy, use)(prompt)


# Generation


@pytest.mark.parametrize("prompt", ["The thing", [5, 6, 7], np.arange(5), ""], ids=ascii)
def test_every_way_to_generate_gives_the_same(toy: Model, prompt: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "seed": 3, "logit_bias": {END: -INF}}
    text = toy.generate(prompt, **options)
    ids = toy.generate_ids(prompt, **options)
    assert len(ids) == 10
    assert text == toy.decode(ids)
    assert text == "".join(toy.stream(prompt, **options))
    assert text == fed(toy, prompt).generate(**options)
    assert text == "".join(fed(toy, prompt).stream(**options))
    assert ids == list(fed(toy, prompt).stream_ids(**options))
    given = toy.encode(prompt) if isinstance(prompt, str) else list(prompt)
    assert text == toy.generate(given, **options)


def test_the_answer_is_part_of_the_session(toy: Model) -> None:
    session = fed(toy, [1, 2])
    ids = list(session.stream_ids(max_new_tokens=10, seed=1))
    assert session.tokens == [1, 2, *ids]
    assert_close(session.logits, toy.logits(session.tokens)[-1])


def test_generate_goes_on_from_where_it_stands(toy: Model) -> None:
    session = fed(toy, "The")
    parts = [session.generate(max_new_tokens=n, temperature=0) for n in (7, 0, 8)]
    assert parts[1] == ""
    whole = fed(toy, "The")
    whole.generate(max_new_tokens=15, temperature=0)
    assert session.tokens == whole.tokens


def test_stream_gives_each_piece_as_soon_as_its_token_is_chosen(toy: Model) -> None:
    session = fed(toy, [1])
    stream = session.stream(max_new_tokens=10, logit_bias=always("the"))
    assert session.tokens == [1]
    for count in (1, 2, 3):
        assert next(stream) == "the"
        assert len(session.tokens) == 1 + count


def test_no_piece_is_empty_or_ends_inside_a_character(toy: Model) -> None:
    """Two tokens are the two bytes of é; any mixture of them must come out as if decoded whole."""
    letters = [VOCAB["Ã"], VOCAB["©"], VOCAB["a"]]
    bias = {token: -INF for token in range(TOY["vocab_size"]) if token not in letters}
    options: dict[str, Any] = {"temperature": 1000, "logit_bias": bias, "max_new_tokens": 30}
    for seed in range(3):
        ids = toy.generate_ids("a", seed=seed, **options)
        pieces = list(toy.stream("a", seed=seed, **options))
        assert {"a", "é"} <= set(pieces)
        assert "" not in pieces
        assert "".join(pieces) == toy.decode(ids)


def test_a_character_that_is_not_finished_is_marked(toy: Model) -> None:
    assert toy.generate([1], max_new_tokens=1, logit_bias=always("Ã")) == "\ufffd"
    assert toy.generate([1], max_new_tokens=2, logit_bias=always("Ã©")) == "éé"


def test_an_empty_prompt_starts_from_end_of_text(toy: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10, "seed": 1}
    assert toy.generate_ids("", **options) == toy.generate_ids([END], **options)
    session = toy.session()
    session.generate(**options)
    assert session.tokens[0] == END


@pytest.mark.parametrize(("bos", "eos", "start"), [(7, None, 7), (7, 8, 7), (None, 8, 8)])
def test_what_an_empty_prompt_starts_from(
    tmp_path: Path, bos: int | None, eos: int | None, start: int
) -> None:
    with make_model(tmp_path, {"bos_token_id": bos, "eos_token_id": eos}) as model:
        options: dict[str, Any] = {"max_new_tokens": 10, "seed": 1}
        assert model.generate_ids([], **options) == model.generate_ids([start], **options)


def test_an_empty_prompt_needs_an_end_of_text(tmp_path: Path) -> None:
    with make_model(tmp_path, {"bos_token_id": None, "eos_token_id": None}) as model:
        with pytest.raises(InputError, match="empty, and the model has no end-of-text"):
            model.generate("")
        assert len(model.generate_ids("a", max_new_tokens=5)) == 5


def test_a_model_without_a_tokenizer_runs_on_ids(tmp_path: Path) -> None:
    with make_model(tmp_path, {}, tokenizer=False) as model:
        ids = model.generate_ids([1, 2], max_new_tokens=5, seed=1)
        assert len(ids) == 5
        session = fed(model, [1, 2])
        assert list(session.stream_ids(max_new_tokens=5, seed=1)) == ids
        assert model.score([1, 2, 3]).n_bytes is None
        calls: list[Callable[[], object]] = [
            lambda: model.generate("a"),
            lambda: model.generate([1]),
            lambda: session.generate(),
            lambda: model.generate_ids([1], stop="a"),
            lambda: session.feed("a"),
            lambda: model.encode("a"),
            lambda: model.decode([1]),
            lambda: model.score("a"),
        ]
        for call in calls:
            with pytest.raises(InputError, match="no tokenizer inside"):
                call()


# How an answer ends


def test_it_ends_at_max_new_tokens(toy: Model) -> None:
    session = fed(toy, [1])
    assert len(list(session.stream_ids(max_new_tokens=5, **ENDLESS))) == 5
    assert session.finish_reason == "length"
    assert session.generate(max_new_tokens=0) == ""
    assert session.finish_reason == "length"
    assert len(session.tokens) == 6


def test_it_ends_at_end_of_text_which_is_not_part_of_the_answer(toy: Model) -> None:
    session = fed(toy, "The")
    before = session.tokens
    assert session.generate(logit_bias={END: 1e9}) == ""
    assert session.finish_reason == "end"
    assert session.tokens == before
    assert toy.generate_ids("The", logit_bias={END: 1e9}) == []
    assert session.generate(max_new_tokens=5, **ENDLESS) != ""
    assert session.finish_reason == "length"


@pytest.mark.parametrize("n", [1, 5, ROOM - 1, ROOM])
def test_it_ends_when_the_context_is_full(toy: Model, n: int) -> None:
    """The token after the last position is predicted too: that costs no position."""
    session = fed(toy, [1] * n)
    ids = list(session.stream_ids(temperature=0, max_new_tokens=1000, logit_bias={END: -INF}))
    assert session.finish_reason == "context"
    assert session.tokens == [1] * n + ids
    assert len(session.tokens) == ROOM + 1
    last = toy.logits(session.tokens[:-1])[-1]
    last[END] = -INF
    assert ids[-1] == last.argmax()


def test_a_full_session_refuses_more_and_can_be_rewound(toy: Model) -> None:
    session = fed(toy, [1] * ROOM)
    answer = session.generate(seed=1)
    with pytest.raises(ContextError, match=rf"at most {ROOM} tokens.*, found 1 after {ROOM + 1};"):
        session.feed([1])
    session.feed([])
    with pytest.raises(ContextError, match="nothing can follow the last position"):
        _ = session.logits
    assert session.generate() == ""
    assert session.finish_reason == "context"
    session.rewind(1)
    assert_close(session.logits, toy.logits([1] * ROOM)[-1])
    assert session.generate(seed=1) == answer


def test_max_new_tokens_that_just_fit_are_a_length(toy: Model) -> None:
    session = fed(toy, [1] * 10)
    list(session.stream_ids(max_new_tokens=ROOM + 1 - 10, **ENDLESS))
    assert (session.finish_reason, len(session.tokens)) == ("length", ROOM + 1)


@pytest.mark.parametrize("use", ["generate", "logits", "feed"])
def test_a_prompt_longer_than_the_context_is_an_error_with_the_numbers(
    toy: Model, use: str
) -> None:
    session = fed(toy, [1, 2])
    call = session.feed if use == "feed" else getattr(toy, use)
    there = " after 2" if use == "feed" else ""
    message = rf"at most {ROOM} tokens, the positions of the model, found {ROOM + 1}{there};"
    with pytest.raises(ContextError, match=message):
        call([1] * (ROOM + 1))
    assert session.tokens == [1, 2]


# Stop texts


def ascii_text(model: Model, seed: int, **options: Any) -> tuple[Session, str]:
    """An answer of visible ASCII, in which a stop text can be looked for."""
    words = (word for word in VOCAB if not all("!" <= letter <= "~" for letter in word))
    bias = {VOCAB[word]: -INF for word in words}
    session = fed(model, "a")
    bias.update(dict.fromkeys(range(len(VOCAB), TOY["vocab_size"]), -INF))
    return session, session.generate(seed=seed, logit_bias=bias, max_new_tokens=40, **options)


@pytest.mark.parametrize("seed", [0, *slow(1, 2, 3)])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_answer_is_what_comes_before_the_stop_text(toy: Model, seed: int, size: int) -> None:
    _, text = ascii_text(toy, seed)
    for start in range(0, len(text) - size, 9):
        stop = text[start : start + size]
        session, answer = ascii_text(toy, seed, stop=stop)
        assert answer == text[: text.index(stop)]
        assert session.finish_reason == "stop"
        assert toy.decode(session.tokens[1:]).startswith(answer + stop)


def test_a_stop_text_that_does_not_come_changes_nothing(toy: Model) -> None:
    _, text = ascii_text(toy, 4)
    session, answer = ascii_text(toy, 4, stop=[text + "!", text[-3:] + "?", "é"])
    assert answer == text
    assert session.finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        ("t", []),
        ("e", ["th"]),
        ("heth", ["t"]),
        ("ethet", ["th"]),
        (["x", "et"], ["th"]),
        (["thx", "the"], []),
        ("thex", ["the", "the", "the", "the"]),
    ],
    ids=ascii,
)
def test_stop_texts_across_tokens(toy: Model, stop: Any, pieces: list[str]) -> None:
    found = toy.stream([1], max_new_tokens=4, logit_bias=always("the"), stop=stop)
    assert "".join(found) == "".join(pieces)


def test_a_stop_text_is_held_back_only_while_it_is_possible(toy: Model) -> None:
    session = fed(toy, [1])
    stream = session.stream(max_new_tokens=4, logit_bias=always("the"), stop="hex")
    assert [next(stream), next(stream)] == ["t", "het"]
    assert "".join(stream) == "hethethe"[:8]
    assert session.finish_reason == "length"


def test_a_stop_text_of_a_broken_character_is_found_at_the_end(toy: Model) -> None:
    session = fed(toy, [1])
    assert session.generate(max_new_tokens=1, stop="\ufffd", logit_bias=always("Ã")) == ""
    assert session.finish_reason == "stop"


# Closing


def uses_of(session: Session, model: Model) -> dict[str, Callable[[], object]]:
    return {
        "feed": lambda: session.feed([1]),
        "feed text": lambda: session.feed("a"),
        "logits": lambda: session.logits,
        "rewind": lambda: session.rewind(0),
        "generate": lambda: session.generate(),
        "stream_ids": lambda: list(session.stream_ids()),
        "model.session": model.session,
        "model.generate": lambda: model.generate("a"),
        "model.generate_ids": lambda: model.generate_ids([1]),
        "model.stream": lambda: model.stream("a"),
        "model.logits": lambda: model.logits([1]),
        "model.score": lambda: model.score([1]),
        "model.encode": lambda: model.encode("a"),
        "model.decode": lambda: model.decode([1]),
    }


def test_a_closed_session_says_so(toy: Model) -> None:
    session = fed(toy, [1])
    stream = session.stream(**ENDLESS)
    next(stream)
    session.close()
    session.close()
    for name, use in uses_of(session, toy).items():
        if not name.startswith("model."):
            with pytest.raises(StateError, match="closed"):
                use()
    with pytest.raises(StateError, match="closed"):
        next(stream)
    assert toy.generate("a", **ENDLESS) != ""


def test_a_closed_model_says_so_and_its_sessions_too(toy_path: Path) -> None:
    model = tinygpt2.load(toy_path)
    session = fed(model, [1])
    streams = [session.stream(**ENDLESS), model.stream("a", **ENDLESS)]
    for stream in streams:
        next(stream)
    model.close()
    model.close()
    for use in uses_of(session, model).values():
        with pytest.raises(StateError, match="closed"):
            use()
    for stream in streams:
        with pytest.raises(StateError, match="closed"):
            next(stream)
    session.close()


def test_with_closes(toy_path: Path) -> None:
    with tinygpt2.load(toy_path) as model, model.session() as session:
        session.feed([1])
    with pytest.raises(StateError):
        model.session()
    with pytest.raises(StateError):
        _ = session.logits


def test_a_stream_that_is_left_leaves_the_session_usable(toy: Model) -> None:
    session = fed(toy, "The")
    stream = session.stream_ids(seed=1)
    ids = [next(stream), next(stream)]
    del stream
    session.feed([5])
    assert session.tokens == [*toy.encode("The"), *ids, 5]
    assert_close(session.logits, toy.logits(session.tokens)[-1])


def rewind_and_feed(session: Session) -> None:
    session.rewind(1)
    session.feed([1])


CHANGES: dict[str, Callable[[Session], object]] = {
    "feed": lambda session: session.feed([1]),
    "rewind": lambda session: session.rewind(1),
    "rewind and feed": rewind_and_feed,
    "generate": lambda session: session.generate(max_new_tokens=1, **ENDLESS),
    "another stream": lambda session: next(session.stream_ids(**ENDLESS)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stream_notices_that_its_session_was_changed(toy: Model, change: str) -> None:
    session = fed(toy, "The")
    stream = session.stream_ids(**ENDLESS)
    next(stream)
    CHANGES[change](session)
    tokens = session.tokens
    with pytest.raises(StateError, match="changed while a stream was open"):
        next(stream)
    assert session.tokens == tokens


def test_reading_a_session_does_not_disturb_its_stream(toy: Model) -> None:
    session = fed(toy, "The")
    ids = []
    for token in session.stream_ids(seed=1, max_new_tokens=8):
        _ = session.logits, session.tokens
        session.rewind(0)
        ids.append(token)
    assert ids == toy.generate_ids("The", seed=1, max_new_tokens=8)


# Anything, at any moment


class AtLine:
    """Does something as the n-th line of tinygpt2.py runs: a Ctrl-C, or another thread's call."""

    def __init__(self, n: int, action: Callable[[], None]) -> None:
        self.n = n
        self.action = action

    @property
    def done(self) -> bool:
        return self.n <= 0

    def __enter__(self) -> AtLine:
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        code = frame.f_code
        # Python itself reports and drops an exception that is raised inside `__del__`.
        if code.co_filename != tinygpt2.__file__ or code.co_name == "__del__":
            return None
        if event == "line":
            self.n -= 1
            if self.n == 0:
                self.action()
        return self.trace


def each_line(action: Callable[[], None], prepare: Callable[[], None]) -> Iterator[AtLine]:
    """The same again and again, with `action` one line later each time, up to the last line."""
    if not tinygpt2.__file__.endswith(".py"):
        pytest.skip("a compiled module has no lines")
    for n in itertools.count(1):
        prepare()
        at_line = AtLine(n, action)
        yield at_line
        if not at_line.done:
            assert n > 5, "the trace saw nothing"
            return


def interrupt() -> None:
    raise KeyboardInterrupt


def rewind_and_look(session: Session) -> None:
    session.rewind(1)
    _ = session.logits


OPERATIONS: dict[str, Callable[[Session], object]] = {
    "feed": lambda session: session.feed([7, 8, 9]),
    "rewind": lambda session: session.rewind(2),
    "logits": rewind_and_look,
    "generate": lambda session: session.generate(max_new_tokens=2, seed=1),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.slow
def test_an_interrupt_anywhere_leaves_the_session_whole(toy: Model, operation: str) -> None:
    sessions: list[Session] = []
    expected: dict[tuple[int, ...], np.ndarray] = {}  # the model's logits after some tokens
    start = [1, 2, 3, 4]

    def check(session: Session) -> None:
        tokens = tuple(session.tokens)
        if tokens not in expected:
            expected[tokens] = toy.logits(tokens)[-1]
        assert_close(session.logits, expected[tokens])

    for at_line in each_line(interrupt, lambda: sessions.append(fed(toy, start))):
        session = sessions.pop()
        with contextlib.suppress(KeyboardInterrupt), at_line:
            OPERATIONS[operation](session)
        check(session)
        session.rewind(len(session.tokens) - 2)
        session.feed([7, 8, 9])
        assert session.tokens == [1, 2, 7, 8, 9]
        check(session)


@pytest.mark.parametrize("what", ["session", "model"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.slow
def test_closing_at_any_moment_is_at_worst_a_state_error(
    toy_path: Path, what: str, operation: str
) -> None:
    opened: dict[str, Any] = {}

    def prepare() -> None:
        opened["model"] = tinygpt2.load(toy_path)
        opened["session"] = fed(opened["model"], "The")

    for at_line in each_line(lambda: opened[what].close(), prepare):
        with contextlib.suppress(StateError), at_line:
            OPERATIONS[operation](opened["session"])
        opened["model"].close()


def feed_and_rewind_for_ever(session: Session, ids: list[int]) -> None:
    while True:
        session.feed(ids)
        session.rewind(len(ids))


def test_ctrl_c_stops_a_long_prompt(tmp_path: Path) -> None:
    with make_model(tmp_path, {"n_positions": 1024}) as model:
        session, ids = model.session(), [i % 256 for i in range(1024)]
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(KeyboardInterrupt):
                feed_and_rewind_for_ever(session, ids)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        session.rewind(len(session.tokens))
        session.feed(ids)
        assert_close(session.logits, model.logits(ids)[-1])


# Threads and processes


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
@pytest.mark.slow
def test_eight_threads_with_sessions_of_their_own(toy_path: Path) -> None:
    def answer(model: Model, seed: int) -> str:
        session = fed(model, f"thread {seed} é")
        return session.generate(seed=seed, max_new_tokens=30) + model.generate("a", seed=seed)

    with tinygpt2.load(toy_path) as model:
        expected = [answer(model, seed) for seed in range(8)]
    found = [""] * 8

    def work(model: Model, seed: int) -> None:
        found[seed] = answer(model, seed)

    with tinygpt2.load(toy_path) as model:  # another, whose caches are empty
        in_threads(functools.partial(work, model, seed) for seed in range(8))
    assert found == expected
    assert len(set(found)) == 8


def test_a_second_thread_is_refused_while_the_first_has_its_turn(toy: Model) -> None:
    session = fed(toy, [1, 2])
    outcomes: list[object] = []

    def work() -> None:
        try:
            session.feed([3])
            outcomes.append(None)
        except StateError as error:
            outcomes.append(str(error))

    with tinygpt2.Turn(session):
        in_threads([work])
    in_threads([work])
    assert outcomes == ["session: in use by another thread; give each thread its own", None]
    assert session.tokens == [1, 2, 3]


@pytest.mark.usefixtures("switching")
def test_two_threads_on_one_session_leave_it_whole(tmp_path: Path) -> None:
    """Whoever comes second gets an error, and the session holds what was fed without one."""
    with make_model(tmp_path, {"n_positions": 1024}) as model:
        session = model.session()
        outcomes: list[type | None] = []

        def work(token: int) -> None:
            for _ in range(15):
                try:
                    session.feed([token] * 16)
                    outcomes.append(None)
                except tinygpt2.TinyGPT2Error as error:
                    outcomes.append(type(error))

        in_threads([lambda: work(1), lambda: work(2)])
        assert set(outcomes) <= {None, StateError}
        assert len(session.tokens) == 16 * outcomes.count(None)
        blocks = [session.tokens[i : i + 16] for i in range(0, len(session.tokens), 16)]
        assert all(len(set(block)) == 1 for block in blocks)
        assert_close(session.logits, model.logits(session.tokens)[-1])


def run_python(script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", script],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.slow
def test_a_forked_child_computes_the_same(tmp_path: Path) -> None:
    """After the parent has computed, so that its matrix library has started its threads."""
    config = {"n_embd": 256, "n_positions": 256}
    make_model(tmp_path, config).close()
    script = f"""
import os, sys, tinygpt2
model = tinygpt2.load({str(tmp_path / "m.tg2")!r})
session = model.session()
session.feed([i % 256 for i in range(200)])
children = []
for _ in range(3):
    if not os.fork():
        text = session.generate(seed=1, max_new_tokens=20)
        again = model.generate([i % 256 for i in range(200)], seed=1, max_new_tokens=20)
        os._exit(0 if text == again else 1)
text = session.generate(seed=1, max_new_tokens=20)
again = model.generate([i % 256 for i in range(200)], seed=1, max_new_tokens=20)
assert text == again
assert [os.wait()[1] for _ in range(3)] == [0, 0, 0]
"""
    done = run_python(script, "-W", "ignore::DeprecationWarning")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_any_order_of_collection_is_quiet(toy_path: Path) -> None:
    """Nothing is closed here, and nothing may be printed: not even a ResourceWarning."""
    script = f"""
import gc, itertools, tinygpt2
tinygpt2.load({str(toy_path)!r}, threads=1).generate("a", max_new_tokens=1)
gc.collect()
gc.freeze()  # what is loaded now need not be looked through again each time
options = {{"seed": 1, "logit_bias": {{ {END}: float("-inf")}}}}
for order in itertools.permutations(["model", "session", "stream", "other"]):
    things = {{"model": tinygpt2.load({str(toy_path)!r})}}
    things["session"] = things["model"].session()
    things["session"].feed("The")
    things["stream"] = things["session"].stream(**options)
    things["other"] = things["model"].stream("a", **options)
    next(things["stream"]), next(things["other"])
    for name in order:
        del things[name]
        gc.collect()
model = tinygpt2.load({str(toy_path)!r})
stream = model.stream("a", **options)
next(stream)
"""
    done = run_python(script, "-X", "dev", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_does_nothing() -> None:
    script = """
import os, sys
before = set(sys.modules)
files = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0
import tinygpt2
loaded = set(sys.modules) - before
heavy = {"numpy", "logging", "argparse", "urllib", "http", "hashlib", "regex", "ctypes", "asyncio"}
import threading
assert not loaded & heavy, loaded & heavy
assert threading.active_count() == 1
assert not files or len(os.listdir("/dev/fd")) == files
"""
    done = run_python(script, "-X", "dev", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Scores

# Against float64. A log-probability of about -10 made of float32 logits that are right to 1e-6 or
# so each, and of their float32 exponentials; windows sum in another order beside that.
SCORES: dict[str, Any] = {"rel": 0.0, "abs": 2e-5}


def logprob(model: Model, before: list[int], token: int) -> float:
    """By the definition, in float64."""
    logits = model.logits(before)[-1].astype(np.float64)
    return float(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))


def test_scores_are_log_softmax_of_the_logits(toy: Model) -> None:
    score = toy.score("The thing in the bag é")
    assert score.ids == toy.encode("The thing in the bag é")
    tokens = [END, *score.ids]
    expected = [logprob(toy, tokens[:i], tokens[i]) for i in range(1, len(tokens))]
    assert score.logprobs == pytest.approx(expected, **SCORES)
    assert score.n_bytes == len("The thing in the bag é".encode())
    assert toy.score(score.ids) == score


def test_perplexity_and_bits_per_byte(toy: Model) -> None:
    score = toy.score("The thing")
    values = [value for value in score.logprobs if value is not None]
    assert len(values) == len(score.ids)
    assert score.total == pytest.approx(sum(values), rel=1e-12)
    assert score.perplexity == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-12)
    assert score.bits_per_byte == pytest.approx(-sum(values) / math.log(2) / 9, rel=1e-12)


@pytest.mark.parametrize(
    ("logprobs", "n_bytes", "perplexity", "bits_per_byte"),
    [
        ([], 0, math.nan, math.nan),
        ([None], 1, math.nan, 0.0),
        ([None, math.log(0.25)], 2, 4.0, 1.0),
        ([-math.log(2), -math.log(8)], 1, 4.0, 4.0),
        ([-math.log(2)], None, 2.0, math.nan),
        ([-1000.0, -1000.0], 1, INF, 2000 / math.log(2)),
    ],
)
def test_figures_of_a_score(
    logprobs: list[float | None], n_bytes: int | None, perplexity: float, bits_per_byte: float
) -> None:
    score = tinygpt2.Score([1] * len(logprobs), logprobs, n_bytes)
    assert score.perplexity == pytest.approx(perplexity, rel=1e-12, nan_ok=True)
    assert score.bits_per_byte == pytest.approx(bits_per_byte, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_text_has_an_empty_score(toy: Model, prompt: Any) -> None:
    score = toy.score(prompt)
    assert (score.ids, score.logprobs, score.n_bytes) == ([], [], 0)
    assert math.isnan(score.perplexity)
    assert math.isnan(score.bits_per_byte)


def test_without_end_of_text_the_first_token_has_no_score(tmp_path: Path) -> None:
    with make_model(tmp_path, {"bos_token_id": None, "eos_token_id": None}) as model:
        ids = [5, 6, 7]
        score = model.score(ids)
        assert score.logprobs[0] is None
        expected = [logprob(model, ids[:i], ids[i]) for i in (1, 2)]
        assert score.logprobs[1:] == pytest.approx(expected, **SCORES)
        assert score.perplexity == pytest.approx(math.exp(-sum(expected) / 2), rel=1e-4)
        assert model.score([5]).logprobs == [None]
        assert model.score([]).logprobs == []


@pytest.mark.parametrize("length", [1, 15, 16, 17, 18, 24, 25, 26, 33, 90])
@pytest.mark.parametrize("room", [16, 15])
@pytest.mark.slow
def test_a_long_text_is_scored_in_windows(tmp_path: Path, length: int, room: int) -> None:
    """Each token once, from a window that begins at least half a context before it."""
    with make_model(tmp_path, {"n_positions": room}) as model:
        ids = np.random.default_rng(length).integers(0, 256, length).tolist()
        tokens = [END, *ids]
        step = room + 1 - room // 2  # what a window adds to those before it
        expected = []
        for i in range(1, len(tokens)):
            begin = 0 if i <= room else step * ((i - room - 1) // step + 1)
            assert room // 2 <= i - begin <= room or not begin
            expected.append(logprob(model, tokens[begin:i], tokens[i]))
        assert model.score(ids).logprobs == pytest.approx(expected, **SCORES)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_tiny_contexts_can_be_scored(tmp_path: Path, room: int) -> None:
    with make_model(tmp_path, {"n_positions": room}) as model:
        score = model.score(list(range(20)))
        assert len(score.logprobs) == 20
        if room == 1:  # each token sees only the one before it
            tokens = [END, *range(20)]
            expected = [logprob(model, [a], b) for a, b in zip(tokens, tokens[1:])]
            assert score.logprobs == pytest.approx(expected, **SCORES)


def test_memory_does_not_grow_with_the_text(toy: Model) -> None:
    def peak(n: int) -> int:
        ids = [i % 256 for i in range(n)]
        tracemalloc.start()
        toy.score(ids)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(300), peak(900)
    # All the logits of the 600 tokens more would be 0.7 MB; the scores are 60 bytes a token.
    assert many - few < 200 * 600


def test_progress_is_told_up_to_the_end(toy: Model) -> None:
    told: list[tuple[str, int, int]] = []
    toy.score([1] * 150, lambda *step: told.append(step))
    assert [step[2] for step in told] == [150] * len(told)
    done = [step[1] for step in told]
    assert done == sorted(set(done))
    assert done[-1] == 150


@pytest.mark.slow
def test_the_loss_is_that_of_transformers(toy: Model) -> None:
    torch = pytest.importorskip("torch", reason="needs the reference implementation")
    lib = pytest.importorskip("transformers", reason="needs the reference implementation")
    config = lib.GPT2Config(**TOY, bos_token_id=END, eos_token_id=END)
    reference = lib.GPT2LMHeadModel(config).eval()
    weights = {f"transformer.{name}": array for name, array in random_weights(TOY).items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    reference.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    score = toy.score("The thing in the bag")
    ids = torch.tensor([[END, *score.ids]])
    with torch.no_grad():
        loss = reference(input_ids=ids, labels=ids).loss.item()
    # Both are float32 forward passes, each right to about 1e-6 of logits that are about 10.
    assert -score.total / len(score.ids) == pytest.approx(loss, abs=2e-5)
    assert score.perplexity == pytest.approx(math.exp(loss), rel=2e-5)
