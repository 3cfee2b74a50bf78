"""The library in a program: asyncio, cancellation, closing and collecting in any order, silence.

Scripts run in a process of their own, where every warning is an error and nothing may be printed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import math
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import slow
from test_contract import check_script, needs_proc
from test_interface import is_source

import tinygpt2
from tinygpt2 import ConstraintError, Model, Session, StateError

pytest.importorskip("regex", reason="expressions are matched by the package regex")

BACKENDS = ["numpy"] if tinygpt2.library_path() is None else ["c", "numpy"]
ENDLESS: dict[str, Any] = {
    "max_new_tokens": 10**6,
    "overflow": "shift",
    "logit_bias": {256: -1e30},
    "seed": 1,
}


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with tinygpt2.toy(backend=request.param) as model:
        yield model


@pytest.fixture(scope="module")
def big(big_path: Path) -> Iterator[Model]:
    """A prompt that fills its context takes a large part of a second, or seconds."""
    with tinygpt2.load(big_path, threads=1) as model:
        yield model


LONG_PROMPT = [1, 2, 3, 4] * 256


def works(session: Session) -> None:
    """The session can be used, and its text is that of a fresh one."""
    tokens = session.tokens
    found = session.generate_ids([5], max_new_tokens=3, seed=1)
    assert found == session.model.generate_ids([*tokens, 5], max_new_tokens=3, seed=1)


def anext_of(stream: Any) -> Any:
    """`anext` came with Python 3.10."""
    return stream.__anext__()


class Failures:
    """What a loop has to say of tasks and futures whose errors nobody has seen."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.said.append(context)


def run_loop(main: Any) -> Any:
    """Run a coroutine function; nothing may be left that the loop complains about."""
    failures = Failures()

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(failures)
        result = await asyncio.wait_for(main(), 60)
        gc.collect()
        await asyncio.sleep(0)
        return result

    result = asyncio.run(watched())
    gc.collect()
    assert failures.said == []
    return result


# Streams of asyncio


async def text_of(stream: Any) -> str:
    return "".join([piece async for piece in stream])


def test_streams_side_by_side(model: Model) -> None:
    async def main() -> list[str]:
        streams = [model.astream("a", seed=n, max_new_tokens=20) for n in range(12)]
        return list(await asyncio.gather(*map(text_of, streams)))

    assert run_loop(main) == [model.generate("a", seed=n, max_new_tokens=20) for n in range(12)]


@pytest.mark.slow
def test_the_loop_goes_on_while_a_prompt_is_computed(big: Model) -> None:
    async def main() -> tuple[int, float]:
        task = asyncio.ensure_future(text_of(big.astream(LONG_PROMPT[:400], max_new_tokens=1)))
        ticks, longest = 0, 0.0
        while not task.done():
            begun = time.monotonic()
            await asyncio.sleep(0.001)
            ticks, longest = ticks + 1, max(longest, time.monotonic() - begun)
        return ticks, longest

    ticks, longest = run_loop(main)
    assert ticks > 10
    assert longest < 0.5


async def within(limit: Any, stream: Any) -> None:
    async with limit:
        async for _ in stream:
            pass


@pytest.mark.parametrize("how", ["cancel", "cancel twice", "wait_for", "timeout"])
def test_a_task_is_cancelled_inside_a_long_prompt(big: Model, how: str) -> None:
    """At once; and when the task has ended, nobody uses the session any more."""
    if how == "timeout" and sys.version_info < (3, 11):
        pytest.skip("asyncio.timeout came with Python 3.11")
    session = big.session()

    async def main() -> float:
        stream = session.astream(LONG_PROMPT[:-9], max_new_tokens=1)
        begun = time.monotonic()
        if how in ("cancel", "cancel twice"):
            task = asyncio.ensure_future(anext_of(stream))
            await asyncio.sleep(0.05)
            begun = time.monotonic()
            for _ in range(len(how.split())):
                task.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "wait_for":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext_of(stream), 0.05)
        else:
            limits: Any = asyncio
            with pytest.raises(TimeoutError):
                await within(limits.timeout(0.05), stream)
        took = time.monotonic() - begun
        session.rewind(len(session) - 4)
        works(session)
        assert await text_of(stream) == ""
        return took

    assert run_loop(main) < 0.5


def test_an_endless_stream_with_a_time_limit_again_and_again(model: Model) -> None:
    async def use(session: Session, pieces: list[str]) -> None:
        async for piece in session.astream("a", **ENDLESS):
            pieces.append(piece)

    async def main() -> None:
        pieces: list[str]
        for number in range(30):
            session, pieces = model.session(), []
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(use(session, pieces), number / 3000)
            found = model.decode(session.tokens[1:])
            assert session.finish_reason in ("cancelled", None)
            if session.position < 100:
                assert found.startswith("".join(pieces))
                works(session)

    run_loop(main)


def test_a_task_that_waits_for_a_thread_is_cancelled_at_once(model: Model) -> None:
    """All threads of the loop may be busy with other things, for long."""
    release = threading.Event()

    async def main() -> float:
        loop = asyncio.get_running_loop()
        executor = concurrent.futures.ThreadPoolExecutor(1)
        loop.set_default_executor(executor)
        busy = loop.run_in_executor(None, release.wait, 30)
        session = model.session()
        stream = session.astream("a", **ENDLESS)
        task = asyncio.ensure_future(anext_of(stream))
        await asyncio.sleep(0.02)
        begun = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        took = time.monotonic() - begun
        works(session)  # and the step that never began does nothing later
        tokens = session.tokens
        release.set()
        await busy
        await loop.run_in_executor(None, int)
        assert session.tokens == tokens
        works(session)
        return took

    try:
        assert run_loop(main) < 1
    finally:
        release.set()


def test_a_loop_is_left_and_the_stream_closed(model: Model) -> None:
    async def main() -> None:
        session = model.session()
        stream = session.astream("a", **ENDLESS)
        async for _ in stream:
            break
        await stream.aclose()
        await stream.aclose()
        assert await text_of(stream) == ""
        assert session.finish_reason == "cancelled"
        works(session)

    run_loop(main)


def test_aclosing(model: Model) -> None:
    """contextlib.aclosing, of Python 3.10, ends what is left early; the memory is free then."""
    sessions: list[Any] = []

    @contextlib.asynccontextmanager
    async def aclosing(stream: Any) -> AsyncIterator[Any]:
        try:
            yield stream
        finally:
            await stream.aclose()

    async def main() -> None:
        async with aclosing(model.astream("a", **ENDLESS)) as stream:
            sessions.append(stream.answer.session)
            async for _ in stream:
                break
        assert stream.answer.finish_reason == "cancelled"
        assert sessions[0].closed

    run_loop(main)


@is_source
def test_a_stream_that_is_left_is_collected(model: Model) -> None:
    """Without the garbage collector, as a plain stream is."""

    async def main() -> None:
        stream = model.astream("a", **ENDLESS)
        async for _ in stream:
            break
        watched = weakref.ref(stream.answer.session)
        del stream
        for _ in range(1000):
            await asyncio.sleep(0.001)  # the thread drops what it has done when it has told it
            if watched() is None:
                return
        raise AssertionError("it is still there")

    gc.disable()
    try:
        run_loop(main)
    finally:
        gc.enable()


def test_a_task_that_is_cancelled_elsewhere_leaves_its_session_usable(model: Model) -> None:
    async def main() -> None:
        session = model.session()

        async def use() -> None:
            async for _ in session.astream("a", **ENDLESS):
                await asyncio.sleep(10)

        task = asyncio.ensure_future(use())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        works(session)

    run_loop(main)


def test_errors_come_out_of_the_loop(model: Model) -> None:
    async def main() -> None:
        with pytest.raises(ConstraintError, match="no token can begin it"):
            async for _ in model.astream("a", allowed=[]):
                pass
        session = model.session()
        stream = session.astream("a", **ENDLESS)
        await anext_of(stream)
        session.feed("b")
        with pytest.raises(StateError, match="changed while a stream was open"):
            await anext_of(stream)
        with pytest.raises(ZeroDivisionError):
            await anext_of(session.astream(allowed=lambda ids: [1 // 0]))
        works(session)

    run_loop(main)


def test_an_error_after_a_cancellation_is_nobodys(model: Model) -> None:
    """The step fails while its task is being cancelled: that is no reason for a complaint."""
    inside, go = threading.Event(), threading.Event()

    def fail(ids: list[int]) -> NoReturn:
        inside.set()
        go.wait(30)
        raise ZeroDivisionError

    async def main() -> None:
        task = asyncio.ensure_future(anext_of(model.astream("a", allowed=fail)))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.01)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_loop(main)


def test_two_tasks_on_one_stream(model: Model) -> None:
    """Each gets pieces or a StateError."""

    async def read(stream: Any) -> None:
        with contextlib.suppress(StateError):
            async for _ in stream:
                pass

    async def main() -> None:
        for seed in range(10):
            stream = model.astream("a", seed=seed, max_new_tokens=8)
            await asyncio.gather(read(stream), read(stream))

    run_loop(main)


def test_a_stream_goes_on_in_another_loop(model: Model) -> None:
    stream = model.astream("a", seed=1, max_new_tokens=9)

    async def one() -> str:
        return str(await anext_of(stream))

    text = run_loop(one) + run_loop(lambda: text_of(stream))
    assert text == model.generate("a", seed=1, max_new_tokens=9)


LEFT_LOOPS = {
    "tasks that run run": """
async def main():
    for number in range(4):
        asyncio.ensure_future(use(number))
    await asyncio.sleep(0.1)
asyncio.run(main())
""",
    "a long prompt": """
async def main():
    asyncio.ensure_future(big.astream([1] * 1000, max_new_tokens=1).__anext__())
    await asyncio.sleep(0.05)
begun = time.monotonic()
asyncio.run(main())
assert time.monotonic() - begun < 1, time.monotonic() - begun
""",
    "Ctrl-C": """
async def main():
    threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
    await use(1)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
else:
    raise AssertionError
""",
    "streams that are left": """
async def main():
    global kept
    kept = [toy.astream("a", **endless) for _ in range(3)]
    for stream in kept:
        async for _ in stream:
            break
asyncio.run(main())
""",
    "a generator around it": """
async def pieces():
    async for piece in toy.astream("a", **endless):
        yield piece
async def main():
    global kept
    kept = pieces()
    async for _ in kept:
        break
asyncio.run(main())
""",
    "a task group that fails": """
async def fail():
    await asyncio.sleep(0.05)
    raise ZeroDivisionError
async def main():
    await asyncio.gather(use(1), use(2), fail())
try:
    asyncio.run(main())
except ZeroDivisionError:
    pass
""",
    "the model is closed": """
async def main():
    task = asyncio.ensure_future(use(1))
    await asyncio.sleep(0.05)
    toy.close()
    try:
        await task
    except tinygpt2.StateError:
        return
    raise AssertionError
asyncio.run(main())
""",
}


@pytest.mark.parametrize("name", [*slow(*LEFT_LOOPS)])
def test_loops_end_quietly(big_path: Path, name: str) -> None:
    script = f"""
import asyncio, logging, signal, sys, threading, time
import tinygpt2
slow = lambda record: not record.getMessage().startswith("Executing")  # the machine was busy
logging.getLogger("asyncio").addFilter(slow)
signal.signal(signal.SIGINT, signal.default_int_handler)
big, toy = tinygpt2.load(sys.argv[1], threads=1), tinygpt2.toy()
endless = {ENDLESS}
async def use(number):
    async for _ in toy.astream("a", **endless):
        pass
{LEFT_LOOPS[name]}
"""
    assert check_script(script, big_path) == ""


# Cancelled by another thread


@pytest.mark.parametrize("backend", [BACKENDS[0], *slow(*BACKENDS[1:])])
@pytest.mark.parametrize("what", ["stream", *slow("ids", "result")])
def test_another_thread_cancels_inside_a_long_prompt(
    big_path: Path, backend: Any, what: str
) -> None:
    """Within some 20 ms in C; in NumPy once a layer of one pass is computed."""
    with tinygpt2.load(big_path, backend=backend, threads=1) as model:
        session = model.session()
        stream = session.stream(LONG_PROMPT[:-9], max_new_tokens=4)
        cancelled: list[float] = []

        def cancel() -> None:
            cancelled.append(time.monotonic())
            stream.cancel()

        timer = threading.Timer(0.05, cancel)
        timer.start()
        if what == "stream":
            assert list(stream) == []
        elif what == "ids":
            assert list(stream.each_id()) == []
        else:
            assert stream.result().finish_reason == "cancelled"
        took = time.monotonic() - cancelled[0]
        assert took < (0.5 if backend == "c" else 1)
        assert (stream.finish_reason, session.finish_reason) == ("cancelled", "cancelled")
        assert session._open_cache().length < len(LONG_PROMPT) - 9
        session.rewind(len(session) - 2)
        works(session)
        timer.join()


def test_another_thread_cancels_while_an_expression_is_tried(gpt2: Model) -> None:
    """No token fits; to find that out each of 50,257 is tried, which takes a second."""
    data = [gpt2.need_tokenizer().token_bytes(token) for token in range(gpt2.config.vocab_size)]
    forbidden = {token: -math.inf for token, text in enumerate(data) if text.startswith(b"q")}
    stream = gpt2.stream("a", regex="q+", logit_bias=forbidden)
    timer = threading.Timer(0.05, stream.cancel)
    timer.start()
    begun = time.monotonic()
    assert list(stream) == []
    assert stream.finish_reason == "cancelled"
    assert time.monotonic() - begun < 0.5
    timer.join()


# Closed and collected in any order


THINGS = """
import asyncio, contextlib, gc, itertools, os, sys, tempfile
import tinygpt2
folder = tempfile.mkdtemp()
def made(backend):
    "Everything that the library hands out, in the middle of its life."
    model = tinygpt2.toy(backend=backend)
    session = model.session()
    session.feed("abc")
    stream = session.stream(seed=1, logprobs=2)
    next(stream)
    ids = model.stream_ids("a", seed=1)
    next(ids)
    path = os.path.join(folder, "a.session")
    session.save(path)
    loaded, used = model.load_session(path), model.load_session(path)
    used.feed("x")
    os.unlink(path)
    answers = (model.begin("a", False, {"seed": n}, False, None) for n in range(9))
    batch = tinygpt2.run_all(enumerate(answers), 3)
    next(batch)
    scores = model._scores(["abc", "b"], None, False, 2, None)
    next(scores)
    waiting = model.astream("a", seed=1)
    beams = model.stream("a", num_beams=2, max_new_tokens=3)
    next(beams)
    matching = model.stream("a", regex="[a-z]+", seed=1)
    next(matching)
    return {
        "model": model, "session": session, "stream": stream, "ids": ids, "loaded": loaded,
        "used": used, "fork": session.fork(), "batch": batch, "scores": scores,
        "waiting": waiting, "beams": beams, "matching": matching,
        "result": model.complete("a", max_new_tokens=3), "logits": session.logits,
    }
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_orders", [*slow(8), pytest.param(100, marks=pytest.mark.soak)])
def test_any_order_of_closing_and_dropping(backend: str, n_orders: int) -> None:
    """Random orders. What can be closed is closed or only dropped, twice or in its own callback."""
    script = f"""{THINGS}
import random
chance = random.Random(1)
for number in range({n_orders}):
    things = made({backend!r})
    names = list(things)
    chance.shuffle(names)
    cycle = [things]
    cycle.append(cycle)
    if number % 3 == 0:  # all at once, by the garbage collector
        things = None
        del cycle
    for name in names if things else ():
        thing = things.pop(name)
        if hasattr(thing, "close") and chance.random() < 0.5:
            thing.close()
            thing.close()
        if hasattr(thing, "cancel") and chance.random() < 0.3:
            thing.cancel()
        if name in ("stream", "ids", "beams", "matching") and chance.random() < 0.5:
            with contextlib.suppress(tinygpt2.StateError, StopIteration):
                next(thing)
        if chance.random() < 0.3:
            cycle.append(thing)
        del thing
        if chance.random() < 0.1:
            gc.collect()
    cycle = None
    gc.collect()
    gc.collect()  # Python 3.9 takes two for generators that are in the middle
    left = {{type(thing).__name__ for thing in gc.get_objects()}}
    assert not left & {{"Model", "Session", "Answer", "AsyncAnswer", "CCache", "Snapshot"}}, left
"""
    assert check_script(script) == ""


EXITS = {
    "nothing is closed": "",
    "an exception": "held = []\ntry:\n    things['session'].rewind(10**6)\n"
    "except tinygpt2.InputError as error:\n    held.append(error)",
    "a cycle": "things['self'] = things",
    "the model is closed": "things['model'].close()",
    "the sessions are closed": "[things[n].close() for n in ('session', 'loaded', 'used')]",
    "atexit": "import atexit\natexit.register(things['model'].close)\n"
    "atexit.register(lambda: list(things['stream']))",
    "finalizers": "import weakref\nowner = type('Owner', (), {})()\n"
    "for n in ('session', 'model'):\n    weakref.finalize(owner, things[n].close)",
    "an owner": "class Owner:\n    def __del__(self):\n        self.things['stream'].cancel()\n"
    "        list(self.things['stream'])\n"
    "        for n in ('model', 'session'):\n            self.things[n].close()\n"
    "owner = Owner()\nowner.things = things\nowner.self = owner",
    "a module": "import types\nm = sys.modules['zzz'] = types.ModuleType('zzz')\nm.t = things",
    "threads that nobody waits for": "import threading\n"
    "def work():\n    s = things['model'].session()\n    while True:\n"
    "        s.generate('a', max_new_tokens=20)\n        s.rewind(len(s))\n"
    "[threading.Thread(target=work, daemon=True).start() for _ in range(3)]\n"
    "import time\ntime.sleep(0.1)",
    "a thread that goes on": "import threading, time\n"
    "def work():\n    time.sleep(0.1)\n    assert things['model'].generate('a', seed=1)\n"
    "threading.Thread(target=work).start()",
    "a pool that goes on": "from concurrent.futures import ThreadPoolExecutor\n"
    "pool = ThreadPoolExecutor(2)\n"
    "[pool.submit(things['model'].generate, 'a') for _ in range(20)]",
    "a loop that was left": "loop = asyncio.new_event_loop()\n"
    "loop.run_until_complete(things['waiting'].__anext__())\n"
    "loop.close()",
    "sys.exit": "sys.exit()",
    "fork": "child = os.fork() if hasattr(os, 'fork') else 0\n"
    "if child:\n    assert os.waitpid(child, 0)[1] == 0\n"
    "else:\n    assert things['model'].generate('a', seed=1)",
}


@pytest.mark.parametrize("backend", slow(*BACKENDS))
@pytest.mark.parametrize("name", EXITS)
def test_the_end_of_the_interpreter_is_quiet(backend: str, name: str) -> None:
    script = f"{THINGS}\nthings = made({backend!r})\n{EXITS[name]}\n"
    assert check_script(script) == ""


@needs_proc
def test_a_map_goes_with_what_needs_it(toy_path: Path, tmp_path: Path) -> None:
    """A model's with the model, a saved session's when it has been copied, or closed."""

    def is_mapped(path: Path) -> bool:
        return str(path) in Path("/proc/self/maps").read_text("utf-8")

    copy = tmp_path / "copy.tg2"
    copy.write_bytes(toy_path.read_bytes())
    model = tinygpt2.load(copy)
    session = model.session()
    session.feed([1, 2, 3])
    saved = tmp_path / "a.session"
    session.save(saved)
    assert not is_mapped(saved)
    one, two = model.load_session(saved), model.load_session(saved)
    fork = one.fork()
    assert is_mapped(saved)
    one.feed([4])
    two.close()
    assert is_mapped(saved)
    del fork
    assert not is_mapped(saved)
    three = model.load_session(saved)
    del three
    assert not is_mapped(saved)
    session.close()
    one.close()
    model.close()
    assert not is_mapped(copy)


# Nothing is printed


@pytest.mark.slow
def test_the_library_is_silent(toy_path: Path, tmp_path: Path) -> None:
    """Every call, with good and bad arguments, without a handler of the log."""
    script = f"""{THINGS}
import pickle
for backend in {BACKENDS}:
    made(backend)
    for model in (tinygpt2.toy(backend=backend), tinygpt2.load(sys.argv[1], backend=backend)):
        repr(model), repr(model.session()), model.fingerprint, pickle.dumps(model)
        model.generate_batch(["a", "b"], max_new_tokens=9, num_return_sequences=2)
        model.score("The end", top=3), model.score_batch(["a", "b"]), model.rank("a", [" b", "c"])
        model.logits("abc"), model.decode([200, 201]), model.encode(chr(0xD800))
        model.generate("a", temperature=1e-300, top_p=0.5, min_p=0.1, repetition_penalty=1e6)
        model.generate("a", logit_bias={{5: 1e30, 6: -1e30}}, repetition_penalty=1e-6)
        model.generate("a", overflow="shift", max_new_tokens=300)
        for wrong in ({{"temperature": -1}}, {{"seed": "x"}}, {{"regex": "("}}, {{"keep": -1}}):
            with contextlib.suppress(tinygpt2.InputError):
                model.generate("a", **wrong)
for path in ("none", sys.argv[1] + "x", "."):
    with contextlib.suppress(tinygpt2.TinyGPT2Error):
        tinygpt2.load(path)
"""
    assert check_script(script, toy_path) == ""
