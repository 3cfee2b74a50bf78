"""Sessions of one model under random operations, each compared with a fresh run.

`Lives` holds several sessions. Every operation is done twice: with a session, and with its twin, a
new session that gets the same tokens and computes them anew. Both must have the same outcome, be it
a value or an error, and the same state afterwards: in C to the bit. What feeds, rewinds and new
texts make of the tokens is also followed in plain lists.

The same examples each time: a failure here is a failure everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from conftest import slow

import tinygpt2
from tinygpt2 import InputError, Model, Session, StateError, TinyGPT2Error

pytest.importorskip("hypothesis", reason="draws the operations")
pytest.importorskip("regex", reason="expressions are matched by the package regex")
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

HAS_KERNELS = tinygpt2.library_path() is not None
MODELS = ["numpy, the toy", *(["c, the toy", "c, random weights"] if HAS_KERNELS else [])]
N_TOKENS = 257  # tokens that every model here has


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, toy_path: Path) -> Iterator[Model]:
    """The last bits of NumPy depend on how a text was cut into passes. So its texts are compared
    with the toy, whose gaps between logits are wide."""
    backend, kind = request.param.split(", ")
    opened = tinygpt2.toy(3, backend=backend) if kind == "the toy" else tinygpt2.load(toy_path)
    with opened as model:
        yield model


tokens = st.one_of(st.sampled_from(b"aeiou kntrs"), st.integers(0, N_TOKENS - 1))
some_ids = st.lists(tokens, max_size=12)
many_ids = st.integers(13, 130).map(lambda n: [97 + i % 7 for i in range(n)])
prompts = st.one_of(some_ids, some_ids, st.text("ae kt\u20ac", max_size=8), many_ids)
FREE: dict[str, Any] = {
    "temperature": st.sampled_from([0, 0.7, 1.5]),
    "top_k": st.sampled_from([0, 1, 5]),
    "top_p": st.sampled_from([0.5, 0.9, 1]),
    "min_p": st.sampled_from([0, 0.1]),
    "repetition_penalty": st.sampled_from([0.8, 1.3]),
    "stop": st.sampled_from(["a", ["ka", "e"], ["the", "in"], "\ufffd"]),
    "logit_bias": st.dictionaries(tokens, st.sampled_from([-np.inf, -3, 2.5, 30]), max_size=4),
    "stop_token_ids": st.lists(tokens, max_size=3),
    "bad_words": st.lists(st.one_of(st.text("aek", min_size=1, max_size=3)), max_size=3),
    "allowed": st.sampled_from(
        [range(97, 123), [101], [], lambda ids: [ids[-1], 98], lambda ids: range(len(ids) % 3)]
    ),
    "regex": st.sampled_from(["[a-m]{3,5}", r"(?:ka|ne|\d)*", ".*t", "[\u00e0-\u00fc]x?", "q"]),
    "max_time": st.sampled_from([0, 1e9]),
}
seeds = st.integers(-2, 5)
short = st.fixed_dictionaries({"seed": seeds, "max_new_tokens": st.integers(0, 6)}, optional=FREE)
long = st.fixed_dictionaries(
    {
        "seed": seeds,
        "max_new_tokens": st.sampled_from([90, 150]),
        "overflow": st.sampled_from(["shift", "shift", "stop", "error"]),
        "keep": st.sampled_from([0, 1, 7, 70]),
        "logit_bias": st.just({256: -np.inf, 264: -np.inf}),  # the end tokens
    },
    optional={name: FREE[name] for name in ("temperature", "bad_words", "repetition_penalty")},
)
beams = st.fixed_dictionaries(
    {"seed": st.just(1), "num_beams": st.integers(2, 4), "max_new_tokens": st.integers(0, 6)},
    optional={"stop_token_ids": FREE["stop_token_ids"], "top_k": FREE["top_k"]},
)
answers = st.one_of(short, short, long)
options = st.one_of(answers, answers, answers, beams)


def alternatives(values: dict[str, Any], n: int) -> int:
    """How many to record; beams record none."""
    return 0 if "num_beams" in values else n


def whole(session: Any, prompt: Any, values: dict[str, Any], n: int) -> Any:
    result = session.complete(prompt, logprobs=alternatives(values, n), **values)
    return result.text, result.ids, result.finish_reason, result.logprobs, result.top_logprobs


def in_steps(session: Any, prompt: Any, values: dict[str, Any], n: int) -> Any:
    """Steps of a stream that is dropped before its end, perhaps, or cancelled."""
    stream = session.stream(prompt, logprobs=alternatives(values, 2), **values)
    pieces = list(itertools.islice(stream, n))
    if n % 2:
        stream.cancel()
        pieces += stream
    return pieces, stream.ids, stream.finish_reason, stream.logprobs, stream.top_logprobs


def awaited(session: Any, prompt: Any, values: dict[str, Any], n: int) -> Any:
    async def main() -> Any:
        stream = session.astream(prompt, **values)
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == 4 + n:
                await stream.aclose()
        return pieces, stream.answer.ids, stream.answer.finish_reason

    return asyncio.run(main())


WAYS: dict[str, Callable[..., Any]] = {
    "complete": whole,
    "generate": lambda session, prompt, values, _: session.generate(prompt, **values),
    "generate_ids": lambda session, prompt, values, _: session.generate_ids(prompt, **values),
    "stream_ids": lambda session, prompt, values, n: list(
        itertools.islice(session.stream_ids(prompt, **values), n)
    ),
    "stream": in_steps,
    "astream": awaited,
}


def outcome(action: Callable[[], Any]) -> Any:
    """What a call returns, or its error, with the answer so far."""
    try:
        return action()
    except TinyGPT2Error as error:
        return type(error), str(error), getattr(error, "text", None), getattr(error, "ids", None)


def twin_of(session: Session) -> Session:
    """A new session with the same text, of which nothing is computed."""
    twin = session.model.session()
    twin._tokens, twin._dropped = session.tokens, session.position - len(session)
    twin.finish_reason, twin.seed = session.finish_reason, session.seed
    return twin


def logits_of(session: Session) -> Any:
    return outcome(lambda: session.logits)


def assert_same(found: Any, expected: Any, is_exact: bool) -> None:
    """Equal; numbers that NumPy has computed may differ by rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, (list, tuple)) and not is_exact:
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_same(one, other, is_exact)
    elif isinstance(expected, np.ndarray) and is_exact:
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, (float, np.ndarray)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    else:
        assert found == expected


class Lives(RuleBasedStateMachine):
    model: Model

    def __init__(self) -> None:
        super().__init__()
        self.sessions: list[Session] = []
        self.used: Session | None = None  # by the last operation
        self.folder = tempfile.TemporaryDirectory()
        self.is_exact = self.model.backend.name == "c"
        self.n_files = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    def pick(self, number: int) -> Session:
        self.used = self.sessions[number % len(self.sessions)]
        return self.used

    def add(self, session: Session) -> None:
        """A few are enough; the oldest is dropped without being closed."""
        self.sessions = [*self.sessions[-3:], session]
        self.used = session

    def check(self, found: Any, expected: Any) -> None:
        assert_same(found, expected, self.is_exact)

    def check_both(self, session: Session, action: Callable[[Session], Any]) -> Any:
        """Do it with the session and with a twin; the outcome of both."""
        twin = twin_of(session)
        found, expected = outcome(lambda: action(session)), outcome(lambda: action(twin))
        self.check(found, expected)
        self.check(self.state_of(session), self.state_of(twin))
        return found

    def state_of(self, session: Session) -> Any:
        return session.tokens, session.position, session.finish_reason, session.seed

    @initialize()
    def begin(self) -> None:
        self.add(self.model.session())
        self.sessions[0].feed([97, 98, 99, 100])

    @invariant()
    def logits_are_those_of_a_fresh_run(self) -> None:
        """A copy is looked at, since to look at a session can mend it."""
        if self.used is not None:
            self.check(logits_of(self.used.fork()), logits_of(twin_of(self.used)))
            self.used = None

    @rule(number=st.integers(0, 3))
    def look(self, number: int) -> None:
        self.check_both(self.pick(number), lambda session: session.logits)

    @rule(number=st.integers(0, 3), prompt=prompts)
    def feed(self, number: int, prompt: Any) -> None:
        session = self.pick(number)
        before = session.tokens
        ids = self.model.encode(prompt) if isinstance(prompt, str) else prompt
        fits = not ids or len(before) + len(ids) <= self.model.config.n_positions
        found = self.check_both(session, lambda session: session.feed(prompt))
        assert (found is None) == fits
        assert session.tokens == (before + ids if fits else before)

    @rule(number=st.integers(0, 3), n=st.integers(-1, 40))
    def rewind(self, number: int, n: int) -> None:
        session = self.pick(number)
        before = session.tokens
        found = self.check_both(session, lambda session: session.rewind(n))
        is_right = 0 <= n <= len(before)
        assert (found is None) == is_right
        assert session.tokens == (before[: len(before) - n] if is_right else before)

    @rule(number=st.integers(0, 3), kept=st.integers(0, 130), prompt=prompts)
    def replace(self, number: int, kept: int, prompt: Any) -> None:
        session = self.pick(number)
        before = session.tokens
        ids = prompt if isinstance(prompt, str) else [*before[:kept], *prompt]
        new = self.model.encode(ids) if isinstance(ids, str) else ids
        found = self.check_both(session, lambda session: session.replace(ids))
        if len(new) > self.model.config.n_positions:
            assert found[0] is tinygpt2.ContextError
            assert session.tokens == before
        else:
            assert found == tinygpt2.shared_length(before, new)
            assert (session.tokens, session.position) == (new, len(new))

    @rule(number=st.integers(0, 3))
    def fork(self, number: int) -> None:
        session = self.pick(number)
        fork = session.fork()
        self.check(self.state_of(fork), self.state_of(session))
        self.add(fork)

    @rule(number=st.integers(0, 3))
    def save_and_load(self, number: int) -> None:
        session = self.pick(number)
        self.n_files += 1
        path = Path(self.folder.name) / f"{self.n_files}.session"
        session.save(path)
        loaded = self.model.load_session(path)
        self.check(self.state_of(loaded), self.state_of(session))
        self.add(loaded)

    @rule(
        number=st.integers(0, 3),
        prompt=st.one_of(st.just([]), prompts),
        values=options,
        way=st.sampled_from(sorted(WAYS)),
        n=st.integers(0, 5),
    )
    def answer(self, number: int, prompt: Any, values: dict[str, Any], way: str, n: int) -> None:
        session = self.pick(number)
        before = session.tokens
        found = self.check_both(session, lambda session: WAYS[way](session, prompt, values, n))
        if type(found) is tuple and found[0] is InputError:  # it is raised before anything is done
            assert session.tokens == before

    @rule(number=st.integers(0, 3), values=answers, n=st.integers(0, 40))
    def answer_in_two_parts(self, number: int, values: dict[str, Any], n: int) -> None:
        """Together they are the whole answer; a stop text or an expression would begin anew."""
        session = self.pick(number)
        values = {k: v for k, v in values.items() if k not in ("stop", "regex", "max_new_tokens")}
        twin = twin_of(session)
        expected = outcome(lambda: whole(twin, [], {**values, "max_new_tokens": n + 5}, 0))
        found = outcome(lambda: whole(session, [], {**values, "max_new_tokens": n}, 0))
        if found[2] == "length" and not isinstance(expected[0], type):
            rest = whole(session, [], {**values, "max_new_tokens": 5}, 0)
            assert (found[1] + rest[1], rest[2]) == (expected[1], expected[2])
            self.check(self.state_of(session), self.state_of(twin))

    @rule(numbers=st.lists(st.integers(0, 3), min_size=2, max_size=3), values=answers)
    def streams_side_by_side(self, numbers: list[int], values: dict[str, Any]) -> None:
        """They take turns, and each is what it is alone."""
        sessions = [*{id(s): s for s in map(self.pick, numbers)}.values()]
        twins = [twin_of(session) for session in sessions]
        alone = [outcome(lambda s=twin: whole(s, [], values, 1)) for twin in twins]  # type: ignore[misc]
        streams = [outcome(lambda s=session: s.stream([], **values)) for session in sessions]  # type: ignore[misc]
        for _ in range(160):
            for i, stream in enumerate(streams):
                if isinstance(stream, tinygpt2.Answer) and outcome(stream.step) is None:
                    streams[i] = "".join(stream._pieces), stream.ids, stream.finish_reason
        for session, twin, found, expected in zip(sessions, twins, streams, alone):
            if type(found) is tuple and expected[2] != "time":
                self.check(found[:3], expected[:3])
            self.check(self.state_of(session), self.state_of(twin))

    @rule(number=st.integers(0, 3), prompt=some_ids)
    def change_under_a_stream(self, number: int, prompt: list[int]) -> None:
        """The stream says so, and takes nothing from the session."""
        session = self.pick(number)
        stream = outcome(lambda: session.stream(max_new_tokens=9))
        if isinstance(stream, tinygpt2.Answer):
            next(stream, None)
            tokens, is_over = session.tokens, stream.finish_reason is not None
            outcome(lambda: session.replace([*tokens[:3], 5, *prompt]))
            tokens = session.tokens
            with contextlib.nullcontext() if is_over else pytest.raises(StateError):
                list(stream)
            assert session.tokens == tokens

    @rule(
        texts=st.lists(prompts, max_size=3),
        numbers=st.lists(st.integers(0, 3), max_size=3),
        values=options,
        batch_size=st.integers(1, 4),
    )
    def batch(
        self, texts: list[Any], numbers: list[int], values: dict[str, Any], batch_size: int
    ) -> None:
        everything = [*texts, *(self.pick(number).tokens for number in numbers)]
        model = self.model
        alone = [outcome(lambda p=p: whole(model, p, values, 1)) for p in everything]  # type: ignore[misc]
        found = outcome(
            lambda: [
                (r.text, r.ids, r.finish_reason, r.logprobs, r.top_logprobs)
                for r in model.generate_batch(
                    everything,
                    batch_size=batch_size,
                    logprobs=alternatives(values, 1),
                    **values,
                )
            ]
        )
        errors = [
            (expected[0], f"prompts[{number}]: {expected[1]}", *expected[2:])
            for number, expected in enumerate(alone)
            if isinstance(expected[0], type)
        ]
        if errors:
            assert found in errors
        else:
            self.check(found, alone)

    @rule(number=st.integers(0, 3), values=answers)
    def close(self, number: int, values: dict[str, Any]) -> None:
        session = self.pick(number)
        self.used = None
        stream = outcome(lambda: session.stream(**values))
        session.close()
        for use in (session.fork, lambda: session.feed([1]), lambda: session.generate(**values)):
            assert outcome(use)[0] in (StateError, InputError)
        if isinstance(stream, tinygpt2.Answer):
            assert outcome(lambda: next(stream))[0] is StateError
        self.sessions = [s for s in self.sessions if s is not session]
        self.add(self.model.session())


@pytest.mark.parametrize("n_examples", [4, *slow(25), pytest.param(80, marks=pytest.mark.soak)])
def test_random_lives_end_as_fresh_runs(model: Model, n_examples: int) -> None:
    lives = type("Lives", (Lives,), {"model": model})
    repeatable = settings(
        derandomize=True, deadline=None, max_examples=n_examples, stateful_step_count=25
    )
    run_state_machine_as_test(lives, settings=repeatable)
