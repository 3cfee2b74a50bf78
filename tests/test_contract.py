"""What the kernels promise: the same bits everywhere, threads, forks, no leaks, clear errors.

Threads, processes, signals and broken libraries are real; weights and texts are drawn with fixed
seeds, so that bits can be compared with ==.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest
from conftest import (
    ROOT,
    SHAPES,
    TALES_CHECKSUM,
    TALES_PROMPT,
    TALES_SHA256,
    TOY,
    UNTIED,
    Result,
    in_threads,
    largest,
    random_weights,
    write_checkpoint,
)

import tinygpt2
from tinygpt2 import InputError, Model, Session, Span, StateError, TinyGPT2Error

HERE = Path(tinygpt2.__file__).parent
LIBRARY = tinygpt2.library_path()
NAMES = ("avx512", "avx2", "neon", "portable")
THREADS = (1, 2, 3, 4)
CHUNKS = (1, 2, 7, 64, 0)  # tokens in one pass; 0: all of them
COMBINATIONS = list(itertools.product(THREADS, CHUNKS))
SOME = COMBINATIONS[::3]  # every number of threads and every chunk, for what takes long
FEW = COMBINATIONS[::6]  # every number of threads once, each with another chunk
FASTEST = [(2, 7), (3, 0)]  # for the fast lane

needs_kernels = pytest.mark.skipif(
    LIBRARY is None, reason="needs the kernels: `python build.py` makes them"
)
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads /proc/self")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def instruction_sets() -> list[str]:
    """Those that can be used here, the fastest first."""
    if LIBRARY is None:
        return ["no kernels"]
    library = tinygpt2.Kernels(LIBRARY).library
    return [name for name in NAMES if library.tg_isa_name(name.encode())]


ISAS = instruction_sets()
every_isa = pytest.mark.parametrize("isa", ISAS)


@contextlib.contextmanager
def opened(path: Path, isa: str = ISAS[0], threads: int = 1, chunk: int = 0) -> Iterator[Model]:
    """A model that computes with these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYGPT2_ISA", isa)
        model = tinygpt2.load(path, backend="c", threads=threads)
    with model:
        model.backend.chunk = min(chunk or model.backend.chunk, model.backend.chunk)
        yield model


def fed(model: Model, ids: list[int]) -> Session:
    session = model.session()
    session.feed(ids)
    return session


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))


# The same bits


EXAMPLES: dict[str, dict[str, Any]] = {
    "head size 2": SHAPES[0].config(),
    "exact gelu": SHAPES[2].config(),
    "nothing fills a panel": SHAPES[3].config(),
    "tied": SHAPES[4].config(),
    "other scales": SHAPES[5].config(),
    "head size 1": {**SHAPES[0].config(), "n_embd": 2, "n_head": 2, "n_layer": 2, **UNTIED},
    "work for every thread": {
        **SHAPES[4].config(),
        **{"vocab_size": 1501, "n_embd": 72, "n_layer": 2, "n_head": 3, "n_inner": 301},
    },
}
CHECKPOINTS = ("mingpt-adder", "llm-viz-sort", "ort-genai-tiny-random", "lm-buddy-fake-gpt2")
TALES = "the default model"
FAST = ("nothing fills a panel", "tied")


def slow(values: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """Parameters of tests that are slow but for the fast ones."""
    fast = list(fast)
    return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]


class Example(NamedTuple):
    """A model, a text that it reads, and the logits after each token as one thread gets them."""

    name: str
    path: Path
    ids: list[int]
    logits: np.ndarray


@pytest.fixture(scope="module", params=slow([*EXAMPLES, *CHECKPOINTS, TALES], FAST))
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    name, folder = request.param, tmp_path_factory.mktemp("example")
    path = folder / "m.tg2"
    if name in EXAMPLES:
        tinygpt2.convert(write_checkpoint(folder, EXAMPLES[name], tokenizer=False), path)
    elif name in CHECKPOINTS:
        tinygpt2.convert(request.getfixturevalue("data") / "checkpoints" / name, path)
    else:
        path = request.getfixturevalue("tales_path")
    with opened(path) as model:
        length = min(81, model.config.n_positions)
        ids = np.random.default_rng(7).integers(model.config.vocab_size, size=length).tolist()
        return Example(name, path, ids, model.logits(ids))


Found = tuple[list[int], np.ndarray]  # after which tokens, and the logits there


def at_once(model: Model, ids: list[int]) -> Found:
    return list(range(len(ids))), model.logits(ids)


def in_two_parts(model: Model, ids: list[int]) -> Found:
    first = len(ids) * 2 // 5
    session = fed(model, ids[:first])
    before = session.logits
    session.feed(ids[first:])
    return [first - 1, len(ids) - 1], np.stack([before, session.logits])


def after_a_rewind(model: Model, ids: list[int]) -> Found:
    kept = len(ids) // 3
    session = fed(model, ids[:kept] + ids[kept:][::-1])
    session.rewind(len(ids) - kept)
    session.feed(ids[kept:])
    after = session.logits
    session.rewind(len(ids) - kept)
    return [len(ids) - 1, kept - 1], np.stack([after, session.logits])


def one_by_one(model: Model, ids: list[int]) -> Found:
    session = model.session()
    rows = []
    for token in ids:
        session.feed([token])
        rows.append(session.logits)
    return list(range(len(ids))), np.stack(rows)


def in_company(model: Model, ids: list[int]) -> Found:
    """In every pass with two other texts, one before it and one behind."""
    backend, workspace, rows = model.backend, model.backend.new_workspace(), []
    first, cache, last = [backend.new_cache() for _ in range(3)]
    size = min(backend.chunk, 30)
    for start in range(0, len(ids), size):
        tokens = ids[start : start + size]
        spans = [
            Span(first, ids[:1], 0, 1),
            Span(cache, tokens, start, len(tokens)),
            Span(last, ids[-3:], 0, 2),
        ]
        rows.append(backend.forward(workspace, spans).array()[1:-2])
    return list(range(len(ids))), np.concatenate(rows)


def from_a_saved_cache(model: Model, ids: list[int]) -> Found:
    """The keys and values of the first half are saved, loaded and copied."""
    backend, workspace, half = model.backend, model.backend.new_workspace(), len(ids) // 2
    cache, loaded = backend.new_cache(), backend.new_cache()
    backend.forward(workspace, [Span(cache, ids[:half], 0, 0)])
    cache.length = half
    keys, values, sums = cache.dump()
    assert loaded.restore(keys, values, half) == sums
    assert loaded.dump() == (keys, values, sums)
    entries = tinygpt2.snapshot_layout(model.config, half)
    assert [len(keys), len(values)] == [tinygpt2.byte_size(*entry) for entry in entries.values()]
    rows = backend.forward(workspace, [Span(loaded.fork(), ids[half:], half, len(ids) - half)])
    return list(range(half, len(ids))), rows.array()


WAYS: list[Callable[[Model, list[int]], Found]] = [
    at_once,
    in_two_parts,
    after_a_rewind,
    in_company,
    from_a_saved_cache,
]


def check_logits(example: Example, isa: str, combinations: Iterable[tuple[int, int]]) -> None:
    """Bit for bit, however many threads, in whatever chunks, cached or not, alone or not."""
    ids = example.ids[:20] if isa == "portable" and example.name == TALES else example.ids
    for threads, chunk in combinations:
        with opened(example.path, isa, threads, chunk) as model:
            for way in [*WAYS, one_by_one] if chunk == 1 else WAYS:
                positions, logits = way(model, ids)
                assert_same_bits(logits, example.logits[positions])


@needs_kernels
@every_isa
def test_logits(example: Example, isa: str) -> None:
    check_logits(example, isa, FASTEST)


@needs_kernels
@every_isa
@pytest.mark.slow
def test_logits_with_every_number_of_threads_and_chunk(example: Example, isa: str) -> None:
    is_large = example.logits.size > 1e5
    combinations = SOME if is_large else COMBINATIONS
    if isa == "portable":  # it is slow
        combinations = FEW if is_large else SOME
    check_logits(example, isa, combinations)


@needs_kernels
def test_logits_can_differ(example: Example) -> None:
    """The test above means something: another token anywhere before changes the bits.

    In a model of width 2, a layer norm leaves little more than a sign: there, fewer rows differ.
    """
    with opened(example.path) as model:
        ids = list(example.ids)
        ids[0] = (ids[0] + 1) % model.config.vocab_size
        changed = model.logits(ids).view(np.int32) != example.logits.view(np.int32)
    assert changed.any(axis=1).mean() > (0.5 if model.config.n_embd == 2 else 0.9)


# What every machine must give for the default model, beside the logits in conftest.py: the
# log-probabilities of the prompt's tokens, float64, and the text that follows it with this seed.
# A new default model needs new ones; a change of kernels.c never does: seeds keep their texts.
TALES_SCORES_SHA256 = "a07eb280ff0f18437c98d98e3e2d28fa050affe6196a62d250a406cd3ca837c7"
TALES_TEXT = (
    " So he set forth, and at last he came to a great forest, and he came into the wood, where he"
)


@needs_kernels
@every_isa
def test_what_the_default_model_gives_on_every_machine(tales_path: Path, isa: str) -> None:
    with opened(tales_path, isa, threads=2) as model:
        assert model.file.checksum() == TALES_CHECKSUM
        logits = model.logits(TALES_PROMPT).astype("<f4")
        assert hashlib.sha256(logits.tobytes()).hexdigest() == TALES_SHA256
        scores = np.array(model.score(TALES_PROMPT).logprobs, "<f8")
        assert hashlib.sha256(scores.tobytes()).hexdigest() == TALES_SCORES_SHA256
        assert model.generate(TALES_PROMPT, seed=1, max_new_tokens=24) == TALES_TEXT


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="names the C library of Linux")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="names their registers")
def test_rounding_that_the_caller_wants(tales_path: Path) -> None:
    """Upward, or small numbers flushed to zero: it is the caller's alone. The bits stay, of the
    workers too, and so does his mode."""
    script = """
import ctypes, sys
import numpy, tinygpt2
c = ctypes.CDLL("libm.so.6")
is_x86 = sys.argv[2] == "x86_64"
place, flush = (28, 0x8040) if is_x86 else (0, 1 << 24)  # in fenv_t: MXCSR, or FPCR
upward = 0x800 if is_x86 else 0x400000
model = tinygpt2.load(sys.argv[1], threads=2)
ids = list(range(5, 300))
def all_of_it():
    session = model.session()
    session.feed(ids[:30])
    result = session.complete(ids[30:50], seed=1, max_new_tokens=9, top_p=0.9, temperature=1.3)
    return model.logits(ids).tobytes(), model.score(ids).logprobs, result[:6]
def set_environment(change):
    environment = ctypes.create_string_buffer(64)
    assert c.fegetenv(environment) == 0
    word = ctypes.c_uint32.from_buffer(environment, place)
    word.value = change(word.value)
    assert c.fesetenv(environment) == 0
one, tiny = float("1"), float("1e-310")
def mode():
    return one + 1e-30 > one, tiny * one == 0
first = all_of_it()
print(*mode())
assert c.fesetround(upward) == 0
print(*mode(), all_of_it() == first, *mode())
assert c.fesetround(0) == 0
set_environment(lambda word: word | flush)
print(*mode(), all_of_it() == first, *mode())
set_environment(lambda word: word & ~flush)
print(*mode(), all_of_it() == first)
"""
    lines = check_script(script, tales_path, platform.machine()).splitlines()
    assert lines == [
        "False False",
        "True False True True False",
        "False True True False True",
        "False False True",
    ]


CHOICES: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_k": 0},
    {"top_k": 0, "top_p": 0.8},
    {"top_k": 0, "min_p": 0.1, "temperature": 1.5},
    {"top_k": 7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    {"top_k": 0, "repetition_penalty": 0.8, "logit_bias": {5: 2.0, 6: -math.inf}},
]


def sampled(model: Model, ids: list[int], chunk: int) -> list[list[int]]:
    """What follows with every set of options, in turn from a fresh session and a rewound one."""
    answers = []
    session = fed(model, ids[:3])
    for seed, options in enumerate(CHOICES):
        if seed % 2 or chunk == 1:
            answers.append(model.generate_ids(ids, seed=seed, max_new_tokens=8, **options))
        else:
            session.rewind(len(session.tokens) - 3)
            session.feed(ids[3:9])
            session.feed(ids[9:])
            answers.append(list(session.stream_ids(seed=seed, max_new_tokens=8, **options)))
    return answers


def check_sampled_texts(path: Path, combinations: list[tuple[int, int]]) -> None:
    """The same seed gives the same text, with every filter; another seed another text."""
    ids = np.random.default_rng(8).integers(250, size=20).tolist()
    with opened(path) as model:
        expected = sampled(model, ids, 1)
        other = [model.generate_ids(ids, seed=99, max_new_tokens=8, **c) for c in CHOICES]
    assert [a == b for a, b in zip(expected, other)] == [c.get("temperature") == 0 for c in CHOICES]
    for isa in ISAS:
        for threads, chunk in combinations[1:2] if isa == "portable" else combinations:
            with opened(path, isa, threads, chunk) as model:
                assert sampled(model, ids, chunk) == expected, (isa, threads, chunk)


@needs_kernels
def test_sampled_texts(toy_path: Path) -> None:
    check_sampled_texts(toy_path, FEW)


@needs_kernels
@pytest.mark.slow
def test_sampled_texts_of_the_default_model(tales_path: Path) -> None:
    check_sampled_texts(tales_path, SOME)


@needs_kernels
@every_isa
def test_texts_in_a_batch(toy_path: Path, isa: str) -> None:
    """Each of several texts that share every pass is the text alone. Some of their prompts take
    more passes than others."""
    lengths = (1, 30, 2, 13)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.1}
    prompts = [[(7 * i + n) % 250 for i in range(n)] for n in lengths]
    with opened(toy_path, isa, threads=2, chunk=17) as model:
        alone = [model.complete(p, seed=i, **options) for i, p in enumerate(prompts)]
        answers = [model.session().stream(p, seed=i, **options) for i, p in enumerate(prompts)]
        while any(answer.finish_reason is None for answer in answers):
            tinygpt2.advance(model, [a for a in answers if a.finish_reason is None])
        assert [a.ids for a in answers] == [result.ids for result in alone]
        assert [a.result().text for a in answers] == [result.text for result in alone]


def check_scores(example: Example, isa: str, combinations: list[tuple[int, int]]) -> None:
    """The log-probabilities too, of a text that takes two windows but in the default model."""
    with opened(example.path) as model:
        n_windows = 1 if example.name == TALES else 2
        ids = (example.ids * 5)[: model.config.n_positions * n_windows * 3 // 4]
        ids = ids[:40] if example.name == TALES else ids
        expected = model.score(ids).logprobs
    for threads, chunk in combinations:
        with opened(example.path, isa, threads, chunk) as model:
            assert model.score(ids).logprobs == expected


@needs_kernels
@every_isa
def test_scores(example: Example, isa: str) -> None:
    check_scores(example, isa, FASTEST[-1:])


@needs_kernels
@every_isa
@pytest.mark.slow
def test_scores_with_every_number_of_threads(example: Example, isa: str) -> None:
    check_scores(example, isa, FEW[-1:] if isa == "portable" and example.name == TALES else FEW)


# Against NumPy


@needs_kernels
def test_numpy_agrees(example: Example) -> None:
    """Logits within 1e-4 of the largest. So is the logarithm of the sum of their exponentials, from
    which a log-probability is their distance: it may be off by twice that."""
    with tinygpt2.load(example.path, backend="numpy") as model:
        tolerance = 1e-4 * largest(example.logits)
        assert largest(model.logits(example.ids) - example.logits) <= tolerance
        theirs = model.score(example.ids).logprobs
    with opened(example.path) as model:
        ours = model.score(example.ids).logprobs
    # The first token has a score where the model has a token to put before it.
    assert (ours[0] is None, theirs[0] is None) == (not model.start_tokens,) * 2
    assert None not in ours[1:] + theirs[1:]
    pairs = [(a, b) for a, b in zip(ours, theirs) if a is not None and b is not None]
    assert len(pairs) >= len(example.ids) - 1
    assert max(abs(a - b) for a, b in pairs) <= 2 * tolerance


@every_isa
@needs_kernels
def test_attention_to_huge_values(tmp_path: Path, isa: str) -> None:
    """Values near float32's limit, which all tokens share: their mean exists, their sum does not.

    Projection and head are scaled so that the logits are of usual sizes again.
    """
    config = {**TOY, "n_layer": 1}
    weights = random_weights(config)
    width = config["n_embd"]
    weights["h.0.attn.c_attn.bias"][2 * width :] = 1e38
    weights["h.0.attn.c_proj.weight"] *= np.float32(1e-38)
    source = write_checkpoint(tmp_path / "huge", config, weights)
    tinygpt2.convert(source, tmp_path / "huge.tg2")
    ids = list(range(20))
    with tinygpt2.load(tmp_path / "huge.tg2", backend="numpy") as model:
        expected = model.logits(ids)
    with opened(tmp_path / "huge.tg2", isa) as model:
        assert largest(model.logits(ids) - expected) <= 1e-4 * largest(expected)


@needs_kernels
def test_numpy_gives_the_same_greedy_text(tales_path: Path) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_new_tokens": 100}
    with tinygpt2.load(tales_path, backend="numpy") as model:
        expected = model.generate_ids(TALES_PROMPT, **greedy)
        logits = model.logits(model.encode(TALES_PROMPT) + expected)
        best = np.sort(logits[-len(expected) - 1 : -1], axis=-1)
        # Rounding cannot decide here: the best token is ahead by more than both may be off.
        assert (best[:, -1] - best[:, -2]).min() > 2e-4 * largest(logits)
    assert len(set(expected)) > 20
    with opened(tales_path) as model:
        assert model.generate_ids(TALES_PROMPT, **greedy) == expected


# Threads


class Gate:
    """Stops a thread in the middle of a forward pass: after the first part of pass number `stop`
    (from 1). It is `inside` then, until `go` is set. Scripts that run elsewhere use its source."""

    def __init__(self, model: tinygpt2.Model, stop: int = 1) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.passes, self.stop = 0, stop
        library = model.backend.library  # type: ignore[attr-defined]
        self.forward = library.tg_forward
        library.tg_forward = self

    def __call__(self, memory: object, spans: object, n_spans: int) -> object:
        status = self.forward(memory, spans, n_spans)
        self.passes += n_spans > 0
        if n_spans > 0 and self.passes == self.stop:
            self.inside.set()
            assert self.go.wait(60)
        return status


WITH_GATE = f"import threading, tinygpt2\n{inspect.getsource(Gate)}"


def answers_of(model: Model, number: int) -> Any:
    """A text, its fork, a batch and a score; of the last two less, as they take longer."""
    session = fed(model, [(7 * i + number) % 4000 for i in range(60)])
    ids = list(session.stream_ids(seed=number, max_new_tokens=20))
    forked = session.fork().generate_ids(seed=number, max_new_tokens=3)
    batch = model.generate_batch([[number], ids], seed=number, max_new_tokens=3)
    scores = model.score(ids[:5]).logprobs
    is_exact = model.backend.name == "c"
    logits = session.logits.tobytes() if is_exact else b""
    return ids, forked, [result.ids for result in batch], scores if is_exact else None, logits


def check_eight_threads(model: Model, is_over: Callable[[float, int], bool]) -> None:
    """Eight threads use a model until `is_over`, which gets the seconds and a thread's rounds.
    Each gets what it gets alone."""
    expected = [answers_of(model, number) for number in range(8)]
    assert len({repr(answers) for answers in expected}) == 8
    outcomes: list[list[bool]] = [[] for _ in range(8)]
    started = time.monotonic()

    def work(number: int) -> None:
        while not is_over(time.monotonic() - started, len(outcomes[number])):
            outcomes[number].append(answers_of(model, number) == expected[number])

    in_threads([functools.partial(work, number) for number in range(8)], 300)
    assert all(outcomes)
    assert all(is_right for rounds in outcomes for is_right in rounds)


@needs_kernels
@pytest.mark.parametrize("threads", slow([1, 3], [3]))
def test_many_threads_with_a_session_each(tales_path: Path, threads: int) -> None:
    """One uses the pool, the others work alone: nobody's answer depends on it."""
    with opened(tales_path, threads=threads, chunk=16) as model:
        check_eight_threads(model, lambda seconds, count: count == 1)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("backend", "duration"), [pytest.param("c", 60, marks=needs_kernels), ("numpy", 15)]
)
def test_eight_threads_for_a_minute(tales_path: Path, backend: Any, duration: float) -> None:
    """A quarter of one in NumPy, which has no threads of its own to confuse."""
    with tinygpt2.load(tales_path, backend=backend, threads=2) as model:
        check_eight_threads(model, lambda seconds, count: seconds > duration)


@needs_kernels
def test_two_threads_on_one_session(tales_path: Path) -> None:
    """Whoever comes second is told so, and changes nothing for the first."""
    with opened(tales_path, threads=2) as model:
        ids = [i % 256 for i in range(400)]
        expected = fed(model, ids).logits
        session, gate = model.session(), Gate(model)
        thread = threading.Thread(target=session.feed, args=[ids])
        thread.start()
        assert gate.inside.wait(60)
        uses: list[Callable[[], Any]] = [
            lambda: session.feed([1]),
            lambda: session.rewind(1),
            lambda: session.logits,
            lambda: session.generate(max_new_tokens=1),
            session.fork,
        ]
        for use in uses:
            with pytest.raises(StateError, match="in use by another thread"):
                use()
        gate.go.set()
        thread.join()
        assert session.tokens == ids
        assert_same_bits(session.logits, expected)


@needs_kernels
def test_two_threads_on_one_pass(tales_path: Path) -> None:
    """Below the session, C looks for itself: an error at worst."""
    with opened(tales_path, threads=2) as model:
        backend, ids = model.backend, list(range(200))
        expected = model.logits(ids)
        workspace: Any = backend.new_workspace()
        outcomes: set[str] = set()
        stop = time.monotonic() + 30

        def work() -> None:
            cache = backend.new_cache()
            while time.monotonic() < stop and "StateError" not in outcomes:
                try:
                    backend.forward(workspace, [Span(cache, ids, 0, 1)])
                except TinyGPT2Error as error:
                    outcomes.add(type(error).__name__)

        in_threads([work] * 4)
        assert "StateError" in outcomes
        after = backend.forward(workspace, [Span(backend.new_cache(), ids, 0, len(ids))])
        assert_same_bits(after.array(), expected)


@needs_kernels
@pytest.mark.parametrize("isa", slow(sorted({ISAS[0], ISAS[-1]}), [ISAS[0]]))
def test_other_threads_keep_running(big_path: Path, isa: str) -> None:
    """While C computes, and it does so for 20 milliseconds or so at a time, which is why an
    interrupt is noticed soon. Python itself never switches between threads here. So what another
    thread does, it does while C computes without Python's lock. Times are those of the processor.
    """
    script = """
import sys, threading, time
import tinygpt2
sys.setswitchinterval(1000)
ticks, is_done, used, moved = 0, threading.Event(), [], []
def tick():
    global ticks
    while not is_done.is_set():
        ticks += 1
        time.sleep(0.0005)
model = tinygpt2.load(sys.argv[1], backend="c", threads=1)
library = model.backend.library
forward = library.tg_forward
def measured(*arguments):
    before, start = ticks, time.thread_time()
    status = forward(*arguments)
    used.append(time.thread_time() - start)
    moved.append(ticks > before)
    return status
library.tg_forward = measured
thread = threading.Thread(target=tick)
thread.start()
session = model.session()
while len(used) < 9:
    session.rewind(len(session))
    session.feed([i % 256 for i in range(int(sys.argv[2]))])
is_done.set()
thread.join()
print(sum(moved) / len(moved), sorted(used)[len(used) // 2], max(used))
"""
    length = 8 if isa == "portable" else 100  # with 500, one step takes 0.1 s on a slow processor
    said = check_script(script, big_path, length, TINYGPT2_ISA=isa)
    moved, usually, longest = map(float, said.split())
    assert moved > 0.5
    assert usually < 0.04
    assert longest < 0.1


CLEAN = {name: text for name, text in os.environ.items() if not name.startswith("TINYGPT2_")}


def run(
    arguments: list[object], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, from where it imports."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**CLEAN, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )


def check_script(script: str, *arguments: object, **environment: str) -> str:
    """What it prints; it must end well and say nothing on standard error.

    Every warning is an error, but the one that Python 3.12 and later give when a process with
    threads forks.
    """
    flags = ["-X", "dev", "-W", "error", "-W", "ignore::DeprecationWarning"]
    done = run([*flags, "-c", script, *arguments], HERE, environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@needs_kernels
@needs_proc
def test_threads_are_started_by_the_first_work(tales_path: Path) -> None:
    script = """
import os, sys
count = lambda: len(os.listdir("/proc/self/task"))
counts = [count()]
import tinygpt2
counts.append(count())
model = tinygpt2.load(sys.argv[1], backend="c", threads=4)
counts.append(count())
session = model.session()
counts.append(count())
for _ in range(2):
    session.generate(max_new_tokens=2, seed=1)
    counts.append(count())
alone = tinygpt2.load(sys.argv[1], backend="c", threads=1)
alone.generate("a", max_new_tokens=2, seed=1)
print(*counts, count())
"""
    assert check_script(script, tales_path).split() == ["1", "1", "1", "1", "4", "4", "4"]


@needs_kernels
@needs_proc
def test_an_idle_process_uses_no_processor(tales_path: Path) -> None:
    script = """
import os, resource, sys, time
import tinygpt2
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
model = tinygpt2.load(sys.argv[1], backend="c", threads=4)
model.generate("Once", max_new_tokens=20, seed=1)
assert len(os.listdir("/proc/self/task")) == 4
time.sleep(0.05)
before = used()
time.sleep(0.5)
print(used() - before)
"""
    assert float(check_script(script, tales_path)) < 0.02


# What an answer to Ctrl-C takes is measured inside the process, from just before the signal is sent
# to when the call that was computing has returned. Where other programs wait for the processors
# too, the clock would measure them. So it is the time of the processors, the median of five.
CTRL_C = """
import os, signal, statistics, sys, threading, time
import tinygpt2
path, threads, count = sys.argv[1], *map(int, sys.argv[2:])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
model = tinygpt2.load(path, backend="c", threads=threads)
ids = [37 * i % 256 for i in range(model.config.n_positions)]
session = model.session()
used, sent = [], []

def interrupt(wait):
    time.sleep(wait)
    sent.append(time.process_time())
    os.kill(os.getpid(), signal.SIGINT)

for number in range(5):
    thread = threading.Thread(target=interrupt, args=[0.05 + 0.013 * number])
    session.rewind(len(session.tokens))
    try:
        thread.start()
        while True:
            session.feed(ids)
            session.rewind(len(ids))
    except KeyboardInterrupt:
        used.append((time.process_time() - sent[-1]) / threads)
    thread.join()
session.feed(ids[len(session.tokens):count])
session.rewind(len(session.tokens) - count)
fresh = model.session()
fresh.feed(ids[:count])
assert session.logits.tobytes() == fresh.logits.tobytes()
print(statistics.median(used))
"""


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("isa", "threads"), [(ISAS[0], 1), (ISAS[0], 2), (ISAS[-1], 1)])
def test_ctrl_c_stops_a_long_prompt(big_path: Path, isa: str, threads: int) -> None:
    """Within 100 ms; after that the session can go on, to the same logits."""
    count = 8 if isa == "portable" else 1024
    assert float(check_script(CTRL_C, big_path, threads, count, TINYGPT2_ISA=isa)) < 0.1


# Forks

# What every process of these tests computes: ids and logits. Processes that hang end by an alarm.
ANSWER = """
import os, signal, sys, threading, time
import numpy, tinygpt2
model = tinygpt2.load(sys.argv[1], backend="c", threads=2)
def answer(seed):
    session = model.session()
    session.feed([1, 2, 3, seed])
    ids = list(session.stream_ids(seed=seed, max_new_tokens=2))
    return ids, session.logits.tobytes()
def fork(work):
    child = os.fork()
    if child:
        return child
    signal.alarm(30)
    os._exit(0 if work() else 1)
expected = [answer(seed) for seed in range(4)]
"""


@needs_kernels
@needs_fork
@pytest.mark.slow
def test_200_forks_while_two_threads_generate(tales_path: Path) -> None:
    """Every child has a pool of its own, of one thread beside its only one."""
    script = f"""{ANSWER}
is_done, wrong, rounds = threading.Event(), [], [0, 0]
def work(number):
    while not is_done.is_set():
        if answer(number) != expected[number]:
            wrong.append(number)
        rounds[number] += 1
threads = [threading.Thread(target=work, args=[number]) for number in (0, 1)]
for thread in threads:
    thread.start()
def threads_here():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 2
codes = []
for number in range(200):
    child = fork(lambda: answer(number % 4) == expected[number % 4] and threads_here() == 2)
    codes.append(os.waitpid(child, 0)[1])
is_done.set()
for thread in threads:
    thread.join()
assert codes == [0] * 200, codes
assert not wrong and min(rounds) > 5, (wrong, rounds)
"""
    check_script(script, tales_path)


@needs_kernels
@needs_fork
def test_workers_forked_from_a_parent_that_has_generated(tales_path: Path) -> None:
    """As servers do that load once: four processes begin at the same moment."""
    script = f"""{ANSWER}
wait, go = os.pipe()
def work(writer):
    os.close(go)
    os.read(wait, 1)
    text = model.generate("Once upon a time", seed=5, max_new_tokens=20)
    return os.write(writer, text.encode())
pipes = [os.pipe() for _ in range(4)]
children = [fork(lambda: work(writer)) for _, writer in pipes]
os.close(go)
codes = [os.waitpid(child, 0)[1] for child in children]
texts = [os.read(reader, 9999).decode() for reader, _ in pipes]
assert codes == [0] * 4, codes
assert texts == [model.generate("Once upon a time", seed=5, max_new_tokens=20)] * 4, texts
"""
    check_script(script, tales_path)


@needs_kernels
@needs_fork
def test_a_fork_in_the_middle_of_a_forward_pass(big_path: Path) -> None:
    """Another thread forks: its child has neither the pool nor the thread that was computing. The
    first child is forked between two calls of C, the others somewhere in them."""
    script = f"""{WITH_GATE}{ANSWER}
ids = [i % 256 for i in range(400)]
fresh, session, codes = model.session(), model.session(), []
fresh.feed(ids)
def in_child():
    try:
        session.feed([1])  # whoever computes with it is not in this process
        return False
    except tinygpt2.StateError:
        return answer(2) == expected[2]
gate = Gate(model)
thread = threading.Thread(target=session.feed, args=[ids])
thread.start()
assert gate.inside.wait(60)
codes.append(os.waitpid(fork(in_child), 0)[1])
gate.go.set()
children = [fork(lambda: answer(2) == expected[2]) for _ in range(4)]
codes += [os.waitpid(child, 0)[1] for child in children]
thread.join()
assert codes == [0] * 5, codes
assert session.logits.tobytes() == fresh.logits.tobytes()
"""
    check_script(script, big_path)


@needs_kernels
@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(tmp_path: Path, tales_path: Path, method: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import multiprocessing, sys
import tinygpt2

def answer(path, seed):
    with tinygpt2.load(path, backend="c", threads=2) as model:
        return model.generate("Once upon a time", seed=seed, max_new_tokens=15)

if __name__ == "__main__":
    path, method = sys.argv[1:]
    work = [(path, seed) for seed in range(6)]
    expected = [answer(*item) for item in work]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.starmap(answer, work, 1) == expected
        pool.close()
        pool.join()
    print(len(set(expected)))
""",
        "utf-8",
    )
    arguments = ["-W", "ignore::DeprecationWarning", script, tales_path, method]
    done = run(arguments, HERE, {"PYTHONPATH": str(HERE)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "6\n", "")


# Nothing is left behind


def live(model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("regex", reason="expressions are matched by the package regex")
    command = ["-W", "error", ROOT / "tests" / "lives.py", model, *arguments]
    return run(command, HERE, {"PYTHONPATH": str(HERE)})


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "count"),
    [
        pytest.param("c", 900, marks=needs_kernels),
        pytest.param("c", 10_000, marks=[needs_kernels, pytest.mark.soak]),
        pytest.param("numpy", 3_000, marks=pytest.mark.soak),
    ],
)
def test_many_lives_leave_nothing_behind(toy_path: Path, backend: str, count: int) -> None:
    """Sessions, answers of every kind, forks, batches, models; closed, dropped or failed."""
    done = live(toy_path, backend, count)
    assert (done.returncode, done.stderr) == (0, "")


@needs_kernels
@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("leak", ["an object", "a cache", "a descriptor", "a thread"])
def test_a_leak_is_noticed(toy_path: Path, leak: str) -> None:
    done = live(toy_path, "c", 180, leak)
    assert done.returncode == 1
    assert " grow: " in done.stderr


@needs_kernels
@pytest.mark.slow
def test_any_order_of_closing_and_dropping(tales_path: Path) -> None:
    """What is closed says so; logits that are still looked at keep what they lie in."""
    script = """
import gc, itertools, sys
import tinygpt2
def check(call):
    try:
        call()
    except tinygpt2.StateError:
        return
    raise AssertionError("it is closed")
names = ["model", "session", "stream", "logits"]
rows = set()
for how, order in itertools.product(["close", "drop"], itertools.permutations(names)):
    model = tinygpt2.load(sys.argv[1], backend="c", threads=2)
    session = model.session()
    session.feed([1, 2, 3])
    stream = session.stream(seed=1)
    next(stream)
    backend, workspace = model.backend, model.backend.new_workspace()
    logits = backend.forward(workspace, [tinygpt2.Span(backend.new_cache(), [4, 5, 6], 0, 1)])
    things = {"model": model, "session": session, "stream": stream, "logits": logits}
    del model, session, stream, logits, backend, workspace
    for name in order:
        if name == "logits":
            rows.add(things.pop(name).array().tobytes())
        elif name == "stream":
            if how == "close" and order.index(name) > min(map(order.index, ["model", "session"])):
                check(lambda: next(things[name]))
            else:
                next(things[name])
            del things[name]
        elif how == "close":
            things[name].close()
            things[name].close()
            if name == "session":
                check(lambda: things[name].feed([1]))
            if name == "model":
                check(lambda: things[name].generate("a"))
        else:
            del things[name]
        gc.collect()
assert len(rows) == 1
"""
    check_script(script, tales_path)


@needs_kernels
@pytest.mark.parametrize("what", ["session", "model"])
def test_closed_by_another_thread_in_the_middle_of_a_forward_pass(
    tales_path: Path, what: str
) -> None:
    """A prompt of three passes ends after the one in which it is closed. The third is its last, so
    that one is not in vain."""
    script = f"""{WITH_GATE}
import gc, sys
path, what = sys.argv[1:]
outcomes = []
def work(session):
    try:
        session.feed([1] * 300)
        outcomes.append("fed")
    except tinygpt2.StateError:
        outcomes.append("closed")
for stop in (1, 2, 3):
    model = tinygpt2.load(path, backend="c", threads=2)
    model.backend.chunk = 100
    session, gate = model.session(), Gate(model, stop)
    thread = threading.Thread(target=work, args=[session])
    thread.start()
    assert gate.inside.wait(60)
    for _ in range(2):
        (session if what == "session" else model).close()
    try:
        session.feed([1])
        raise AssertionError("it is closed, or in use")
    except tinygpt2.StateError:
        pass
    if stop % 2:
        del model, session
        gc.collect()
    gate.go.set()
    thread.join()
    outcomes.append(gate.passes)
print(*outcomes)
"""
    assert check_script(script, tales_path, what) == "closed 1 closed 2 fed 3\n"


@needs_kernels
@pytest.mark.parametrize("computing", slow([False, True], [False]))
def test_the_end_of_the_process_is_quiet(big_path: Path, computing: bool) -> None:
    """With everything open, and with threads that nobody waits for in the middle of their work."""
    script = """
import sys, threading
import tinygpt2
model = tinygpt2.load(sys.argv[1], backend="c", threads=2)
session, other = model.session(), model.session()
session.feed([1, 2, 3])
stream = other.stream(seed=1)
next(stream)
started = [threading.Event() for _ in range(2)]
def work(event):
    own = model.session()
    while True:
        own.feed([1] * 300)
        own.rewind(300)
        event.set()
if sys.argv[2] == "True":
    for event in started:
        threading.Thread(target=work, args=[event], daemon=True).start()
    assert all(event.wait(60) for event in started)
"""
    check_script(script, big_path, computing)


# What goes wrong is said clearly


def run_command(arguments: list[object], folder: Path = HERE, **environment: str) -> Result:
    script = "import sys, tinygpt2; sys.exit(tinygpt2.main())"
    done = run(["-c", script, *arguments], folder, environment)
    return Result(done.returncode, done.stdout, done.stderr)


def check_error(result: Result, code: int, *parts: str) -> None:
    """One line on standard error, and nothing else."""
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("tinygpt2: error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


VARIABLES = [
    ("TINYGPT2_ISA", "wrong"),
    ("TINYGPT2_ISA", "AVX2"),
    ("TINYGPT2_ISA", "portable "),
    ("TINYGPT2_THREADS", "0"),
    ("TINYGPT2_THREADS", "x"),
    ("TINYGPT2_THREADS", "-1"),
    ("TINYGPT2_THREADS", "1.5"),
    ("TINYGPT2_THREADS", "257"),
    ("TINYGPT2_THREADS", "9999"),
]


@needs_kernels
@pytest.mark.parametrize("variable", slow(VARIABLES, VARIABLES[::4]), ids=ascii)
def test_a_wrong_variable(
    toy_path: Path, variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, value = variable
    expected = {"TINYGPT2_ISA": " or ".join(ISAS), "TINYGPT2_THREADS": "a whole number from 1 to"}
    texts = [f"{name}: expected {expected[name]}", f"found {value!r}"]
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        tinygpt2.load(toy_path)
    assert all(text in str(error.value) for text in texts)
    result = run_command(["--model", toy_path, "--prompt", "a"], HERE, **{name: value})
    check_error(result, 2, *texts)
    if name == "TINYGPT2_ISA":  # NumPy has no use for it
        with tinygpt2.load(toy_path, backend="numpy") as model:
            assert model.generate("a", seed=1, max_new_tokens=2)


@needs_kernels
def test_every_instruction_set_is_here_or_refused(
    toy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The portable one is everywhere."""
    assert ISAS[-1] == "portable"
    for name in NAMES:
        monkeypatch.setenv("TINYGPT2_ISA", name)
        if name in ISAS:
            with tinygpt2.load(toy_path) as model:
                assert getattr(model.backend, "isa", None) == name
        else:
            with pytest.raises(InputError, match=f"TINYGPT2_ISA: .*found '{name}'"):
                tinygpt2.load(toy_path)
    monkeypatch.setenv("TINYGPT2_ISA", "")
    with tinygpt2.load(toy_path) as model:
        assert getattr(model.backend, "isa", None) == ISAS[0]


@needs_kernels
def test_the_number_of_threads(toy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, or else the variable, or else what this process may use."""

    def threads_of(threads: int | None) -> Any:
        with tinygpt2.load(toy_path, threads=threads) as model:
            return getattr(model.backend, "threads", None)

    monkeypatch.setenv("TINYGPT2_THREADS", "7")
    assert (threads_of(5), threads_of(None), threads_of(256)) == (5, 7, 256)
    for unset in ("", None):
        monkeypatch.delenv("TINYGPT2_THREADS")
        if unset is not None:
            monkeypatch.setenv("TINYGPT2_THREADS", unset)
        assert threads_of(None) == tinygpt2.available_processors()


@pytest.mark.parametrize("threads", [0, -1, True, 257, 1.0, "2"], ids=ascii)
def test_wrong_threads(toy_path: Path, threads: Any) -> None:
    with pytest.raises(InputError, match="threads: expected None or a number from 1 to 256, found"):
        tinygpt2.load(toy_path, threads=threads)


@pytest.mark.parametrize("backend", ["cuda", "C", ""], ids=ascii)
def test_a_wrong_backend(toy_path: Path, backend: Any) -> None:
    with pytest.raises(InputError, match=r"backend: expected None or one of .*numpy.*, found"):
        tinygpt2.load(toy_path, backend=backend)


def test_a_backend_that_is_no_text(toy_path: Path) -> None:
    """The compiled module checks the type itself, and says so as Python's own functions do."""
    kind = InputError if tinygpt2.__file__.endswith(".py") else TypeError
    with pytest.raises(kind):
        tinygpt2.load(toy_path, backend=1)  # type: ignore[arg-type]


def other_architecture(library: bytes) -> bytes:
    """The same in the header of an ELF file, but for the machine that it is for."""
    arm, x86 = (183).to_bytes(2, "little"), (62).to_bytes(2, "little")
    return library[:18] + (x86 if library[18:20] == arm else arm) + library[20:]


def other_library() -> bytes:
    """One of Python's own: it can be loaded, and has none of our functions."""
    for name in ("_json", "_bisect", "_heapq", "zlib", "_struct", "_ctypes"):
        path = getattr(importlib.import_module(name), "__file__", None)
        if path and path.endswith(".so"):
            return Path(path).read_bytes()
    pytest.skip("all of this Python's modules are built in")


def wrong_library(kind: str) -> bytes:
    if kind == "another version":
        assert LIBRARY
        return Path(LIBRARY).read_bytes()
    if kind in ("another architecture", "cut off"):
        assert LIBRARY
        library = Path(LIBRARY).read_bytes()
        if library[:4] != b"\x7fELF":
            pytest.skip("about ELF files")
        return library[:-1000] if kind == "cut off" else other_architecture(library)
    if kind == "another library":
        return other_library()
    return b"" if kind == "empty" else b"kernels, as it were\n"


KINDS = ["another version", "another architecture", "another library", "cut off", "empty"]
KINDS += ["text", "folder", "pipe"]


@needs_kernels
@pytest.mark.parametrize("kind", slow(KINDS, ["another version", "cut off"]))
def test_a_wrong_library(tmp_path: Path, toy_path: Path, kind: str) -> None:
    """An error that names the file and what to do, whichever way it is asked for; not so NumPy."""
    source = (ROOT / "tinygpt2.py").read_text("utf-8")
    if kind == "another version":
        changed = source.replace(f'__version__ = "{tinygpt2.__version__}"', '__version__ = "9.8.7"')
        assert changed != source
        source = changed
    (tmp_path / "tinygpt2.py").write_text(source, "utf-8")
    library = tmp_path / tinygpt2.LIBRARY
    if kind == "folder":
        library.mkdir()
    elif kind == "pipe":
        os.mkfifo(library)
    else:
        library.write_bytes(wrong_library(kind))
    ask: list[object] = ["--model", toy_path, "--prompt", "a", "--seed", "1", "--max-tokens", "3"]
    said = [f"{library}: ", "python build.py", "delete the file", "'numpy'"]
    if kind == "another version":
        said.append(f"expected version 9.8.7, found {tinygpt2.__version__}")
    check_error(run_command(ask, tmp_path), 1, *said)
    check_error(run_command([*ask, "--backend", "c"], tmp_path), 1, *said)
    code, out, err = run_command([*ask, "--backend", "numpy"], tmp_path)
    assert (code, err) == (0, "")
    assert out


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="others have vectors, all of them")
@pytest.mark.slow
def test_a_processor_without_vectors_computes_in_numpy(tmp_path: Path, toy_path: Path) -> None:
    """Unless there is none, or one asks for C: the kernels in portable C are the slower ones."""
    for name in ("tinygpt2.py", "build.py", "kernels.c"):
        shutil.copy(ROOT / name, tmp_path)
    source = (tmp_path / "kernels.c").read_text("utf-8")
    changed = source.replace("int fma = (c & bit_FMA)", "int fma = 0 && (c & bit_FMA)")
    assert changed != source
    (tmp_path / "kernels.c").write_text(changed, "utf-8")
    subprocess.run([sys.executable, "build.py"], cwd=tmp_path, check=True, capture_output=True)
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[3]:
    sys.modules["numpy"] = None
import tinygpt2
print(*[tinygpt2.load(sys.argv[2], backend=b).backend.name for b in (None, "c")])
os.environ["TINYGPT2_ISA"] = "portable"
print(tinygpt2.load(sys.argv[2]).backend.name)
"""
    assert check_script(script, tmp_path, toy_path, "") == "numpy c\nc\n"
    assert check_script(script, tmp_path, toy_path, "without NumPy") == "c c\nc\n"


@pytest.mark.slow
def test_the_file_alone_computes_in_numpy(tmp_path: Path, toy_path: Path) -> None:
    shutil.copy(ROOT / "tinygpt2.py", tmp_path)
    script = """
import json, logging, sys
sys.path.insert(0, sys.argv[1])
import tinygpt2
logged = []
class Handler(logging.Handler):
    def emit(self, record):
        logged.append(record.getMessage())
logging.getLogger("tinygpt2").addHandler(Handler())
logging.getLogger("tinygpt2").setLevel("INFO")
tinygpt2.load(sys.argv[2], backend="numpy").close()
assert not logged
model = tinygpt2.load(sys.argv[2])
try:
    tinygpt2.load(sys.argv[2], backend="c")
except tinygpt2.TinyGPT2Error as error:
    text = type(error).__name__ + ": " + str(error)
print(json.dumps([tinygpt2.__file__, tinygpt2.library_path(), model.backend.name, text, logged]))
"""
    said = check_script(script, tmp_path, toy_path)
    file, path, backend, error, (logged,) = json.loads(said)
    assert logged.startswith("NumPy computes, and not the kernels: there is no ")
    assert (file, path, backend) == (str(tmp_path / "tinygpt2.py"), None, "numpy")
    assert error.startswith(f"TinyGPT2Error: backend c: no {tinygpt2.LIBRARY} beside {file}")
    assert "python build.py" in error
    ask: list[object] = ["--model", toy_path, "--prompt", "a", "--seed", "1", "--backend", "c"]
    check_error(run_command(ask, tmp_path), 1, "python build.py")


# How many processors


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")


def v1(folder: str, quota: int, period: int = 100000) -> dict[str, str]:
    base = f"cpu/{folder}/" if folder else "cpu/"
    return {f"{base}cpu.cfs_quota_us": f"{quota}\n", f"{base}cpu.cfs_period_us": f"{period}\n"}


V1_GROUPS = "12:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n3:cpuset:/other\n1:name=systemd:/y\n"
QUOTAS: dict[str, tuple[str, dict[str, str], list[tuple[int, int]]]] = {
    "no cgroups": ("", {}, []),
    "no files": ("0::/a\n", {}, []),
    "v2, root": ("0::/\n", {"cpu.max": "50000 100000\n"}, [(50000, 100000)]),
    "v2, unlimited": ("0::/a\n", {"a/cpu.max": "max 100000\n"}, []),
    "v2, nested": (
        "0::/a/b/c.scope\n",
        {
            "a/cpu.max": "300000 100000\n",
            "a/b/cpu.max": "max 100000\n",
            "a/b/c.scope/cpu.max": "150000 50000\n",
            "a/x/cpu.max": "1000 100000\n",
        },
        [(300000, 100000), (150000, 50000)],
    ),
    "v2, a colon in the name": ("0::/a:b\n", {"a:b/cpu.max": "1 2\n"}, [(1, 2)]),
    "v2, damaged": ("0::/a/b\n", {"a/cpu.max": "\n", "a/b/cpu.max": "many 0 x\n"}, []),
    "v2, no period": ("0::/\n", {"cpu.max": "50000 0\n"}, []),
    "v1": (V1_GROUPS, v1("docker/x", 250000), [(250000, 100000)]),
    "v1, unlimited": (V1_GROUPS, v1("docker/x", -1), []),
    "v1, nested": (
        V1_GROUPS,
        {**v1("", -1), **v1("docker", 700000, 200000), **v1("docker/x", 50000)},
        [(700000, 200000), (50000, 100000)],
    ),
    "v1, another controller's": (
        "3:cpuset:/a\n",
        {**v1("a", 50000), "cpuset/a/cpu.max": "1 2", "a/cpu.max": "1 2"},
        [],
    ),
    "both": (
        "1:cpu:/a\n0::/b\n",
        {**v1("a", 50000), "b/cpu.max": "7 8\n", "a/cpu.max": "1 2\n"},
        [(50000, 100000), (7, 8)],
    ),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_quotas(tmp_path: Path, name: str) -> None:
    groups, files, expected = QUOTAS[name]
    write_tree(tmp_path / "root", files)
    (tmp_path / "groups").write_text(groups, "utf-8")
    found = tinygpt2.cgroup_quotas(str(tmp_path / "groups"), str(tmp_path / "root"))
    assert list(found) == expected


def test_quotas_where_there_are_none(tmp_path: Path) -> None:
    assert list(tinygpt2.cgroup_quotas(str(tmp_path / "none"), str(tmp_path))) == []


def processors_in(root: Path) -> int:
    """How many there are, if the files of the control groups are looked for in a folder."""
    real = open

    def redirected(path: Any, *arguments: Any, **options: Any) -> Any:
        is_ours = str(path).startswith(("/proc/self/cgroup", "/sys/fs/cgroup/"))
        return real(f"{root}{path}" if is_ours else path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", redirected)
        return tinygpt2.available_processors()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity")
@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max", 999), ("1000", 1), ("99000", 1), ("100000", 1), ("100001", 2), ("99900000", 999)],
)
def test_processors_by_quota(tmp_path: Path, quota: str, expected: int) -> None:
    """A part of a processor counts as one; a process has never less than one."""
    write_tree(tmp_path / "proc/self", {"cgroup": "0::/a\n"})
    write_tree(tmp_path / "sys/fs/cgroup/a", {"cpu.max": f"{quota} 100000\n"})
    here = len(os.sched_getaffinity(0))
    assert processors_in(tmp_path) == min(here, expected)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_processors_by_affinity(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    counts = []
    try:
        for n in (1, len(before)):
            os.sched_setaffinity(0, sorted(before)[:n])
            counts.append(processors_in(tmp_path))
    finally:
        os.sched_setaffinity(0, before)
    assert counts == [1, len(before)]
