"""Sessions, answers and batches that come and go, and must leave nothing behind.

Run by test_contract.py: `python lives.py MODEL.tg2 BACKEND COUNT [LEAK]` lives COUNT lives, in six
rounds, and compares what the process has after each round: memory, descriptors, threads, mapped
files. Then it does the same with a tenth of the lives, and Python's own memory is traced. LEAK is
what every life leaves behind on purpose; then the program must fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import statistics
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import tinygpt2
from tinygpt2 import Model, Session

ROUNDS = 6  # of which the first fills what is kept on purpose, as the words that are known
GROWTH = {  # in most rounds less than this
    "descriptors": 1,
    "threads": 1,
    "tasks": 1,
    "maps": 1,
    "blocks": 50,
    "traced bytes": 10_000,
    "resident bytes": 100_000,
}
PROMPTS: list[Any] = ["", "a", "Hello ", [*b"ka ke"], "é\u20ac", [*b"tu"] * 8]
BEGUN: dict[str, Any] = {"max_new_tokens": 20, "logit_bias": {256: -1e9}}  # does not end by itself
Life = Callable[[Model, int, Path], object]


@contextlib.contextmanager
def refused(kind: type[Exception]) -> Iterator[None]:
    """What happens inside must be this error."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"expected {kind.__name__}")


def fed(model: Model, number: int) -> Session:
    session = model.session()
    session.feed(PROMPTS[number % 5 + 1])
    return session


def every_way_to_answer(model: Model, number: int, folder: Path) -> None:
    prompt = PROMPTS[number % 6]
    options: dict[str, Any] = {"seed": number, "max_new_tokens": 2}
    model.generate(prompt, stop=["ka", "e"], **options)
    model.complete(prompt, logprobs=2, top_p=0.9, **options)
    list(model.stream_ids(prompt, temperature=0, **options))


def a_stream_that_is_left(model: Model, number: int, folder: Path) -> None:
    next(model.stream("a", seed=number, **BEGUN))
    next(fed(model, number).stream_ids(seed=number, **BEGUN))


def a_stream_that_is_cancelled(model: Model, number: int, folder: Path) -> None:
    stream = model.stream("a", seed=number, **BEGUN)
    next(stream)
    canceller = threading.Thread(target=stream.cancel)
    canceller.start()
    canceller.join()
    list(stream)
    assert stream.finish_reason == "cancelled"


def a_stream_of_a_closed_session(model: Model, number: int, folder: Path) -> None:
    session = fed(model, number)
    stream = session.stream(seed=number, **BEGUN)
    next(stream)
    session.close()
    with refused(tinygpt2.StateError):
        next(stream)


def forks(model: Model, number: int, folder: Path) -> None:
    with fed(model, number) as session:
        fork = session.fork()
        fork.generate_ids(max_new_tokens=2, seed=number)
        fork.fork().generate_ids(max_new_tokens=1, seed=number)
        session.rewind(1)
        session.replace("ka")
        session.generate(max_new_tokens=2, seed=number)


def a_saved_session(model: Model, number: int, folder: Path) -> None:
    path = folder / "a.session"
    fed(model, number).save(path)
    with model.load_session(path) as loaded:
        loaded.generate_ids(max_new_tokens=2, seed=number)
    model.load_session(path).fork().feed("a")
    _ = model.load_session(path).logits
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with refused(tinygpt2.FormatError):
        model.load_session(path)
    place = len(content) - 2048  # of the keys and values, or of the logits
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with refused(tinygpt2.FormatError):
        model.load_session(path).feed("a")


def a_batch(model: Model, number: int, folder: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, "batch_size": 3, "num_return_sequences": 2}
    model.generate_batch(PROMPTS, seed=number, **options)


def beams(model: Model, number: int, folder: Path) -> None:
    model.generate("a", num_beams=3, max_new_tokens=2)
    model.generate_batch(["a", "ka"], num_beams=2, num_return_sequences=2, max_new_tokens=2)


def an_expression(model: Model, number: int, folder: Path) -> None:
    pattern = ("[a-z]{3}", "(ka|te)+", "t.u?")[number % 3]
    model.generate("a", regex=pattern, seed=number, max_new_tokens=3)


def a_dead_end(model: Model, number: int, folder: Path) -> None:
    session = fed(model, number)
    with refused(tinygpt2.ConstraintError):
        session.generate(allowed=lambda ids: [107] if len(ids) < 50 else [], bad_words=["kk"])
    session.generate(bad_words=["a", "ka"], allowed=range(97, 123), max_new_tokens=2)
    with refused(tinygpt2.ConstraintError):
        model.generate_batch(["a", "b"], regex="x", allowed=[121])


def scores(model: Model, number: int, folder: Path) -> None:
    model.score("ka " * 45, top=1)
    model.score_batch(["a", "kaka"])
    model.rank("ka", [" ke", "ku"])


def a_shift(model: Model, number: int, folder: Path) -> None:
    session = model.session()
    session.feed([97] * 127)
    session.generate_ids(overflow="shift", keep=2, seed=number, max_new_tokens=4)


async def taken(model: Model, number: int) -> None:
    async for _ in model.astream("a", seed=number, max_new_tokens=2):
        pass
    async for _ in model.astream("a", seed=number, **BEGUN):
        break


async def take_and_cancel(model: Model, number: int) -> None:
    await taken(model, number)
    task = asyncio.ensure_future(taken(model, number))
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def tasks(model: Model, number: int, folder: Path) -> None:
    asyncio.run(take_and_cancel(model, number))


def wrong_calls(model: Model, number: int, folder: Path) -> None:
    session = fed(model, number)
    with refused(tinygpt2.InputError):
        session.generate("a", temperature=-1)
    with refused(tinygpt2.ContextError):
        session.feed([1] * 500)
    with refused(tinygpt2.FormatError):
        model.load_session(folder)
    with refused(tinygpt2.TinyGPT2Error):
        session.save(folder / "none" / "a.session")
    session.close()
    with refused(tinygpt2.StateError):
        session.feed("a")


def another_model(model: Model, number: int, folder: Path) -> None:
    other = tinygpt2.load(sys.argv[1], backend=model.backend.name, threads=2)  # type: ignore[arg-type]
    session = other.session()
    session.generate("a", seed=number, max_new_tokens=2)
    other.score("The thing")
    if number % 2:
        other.close()


LIVES: tuple[Life, ...] = (
    every_way_to_answer,
    a_stream_that_is_left,
    a_stream_that_is_cancelled,
    a_stream_of_a_closed_session,
    forks,
    a_saved_session,
    a_batch,
    beams,
    an_expression,
    a_dead_end,
    scores,
    a_shift,
    tasks,
    wrong_calls,
    another_model,
)

left: list[object] = []
LEAKS: dict[str, Callable[[Model], object]] = {
    "nothing": lambda model: None,
    "an object": lambda model: left.append([bytes(100) for _ in range(10)]),
    "a cache": lambda model: left.append(model.backend.new_cache()),
    "a descriptor": lambda model: left.append(os.open(os.devnull, os.O_RDONLY)),
    "a thread": lambda model: threading.Thread(target=threading.Event().wait, daemon=True).start(),
    "a map": lambda model: left.append(tinygpt2.map_file(sys.argv[1])),
}


def state(folder: Path) -> dict[str, int]:
    """What the process has."""
    gc.collect()
    memory = Path("/proc/self/statm").read_text("ascii").split()[1]
    maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),  # threads, those of C included
        "maps": sum(str(folder) in line or sys.argv[1] in line for line in maps),
        "blocks": sys.getallocatedblocks(),
        "traced bytes": tracemalloc.get_traced_memory()[0],
        "resident bytes": int(memory) * os.sysconf("SC_PAGESIZE"),
    }


def check(states: list[dict[str, int]]) -> None:
    """A round may leave more than the one before it, but not most of them, as with a leak."""
    for name, most in GROWTH.items():
        figures = [each[name] for each in states[1:]]
        growth = statistics.median(b - a for a, b in zip(figures, figures[1:]))
        print(f"{name}: {growth:.0f} more in a round")
        if growth >= most:
            sys.exit(f"{name} grow: {figures}")


def main() -> None:
    backend, count, leak = sys.argv[2], int(sys.argv[3]), (*sys.argv[4:], "nothing")[0]
    os.fsync = lambda fd: None  # what is written need not outlast a power cut
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as place, tinygpt2.toy(backend=backend) as model:  # type: ignore[arg-type]
        for lives in (count // ROUNDS, count // ROUNDS // 10):
            states = []
            for _ in range(ROUNDS):
                for number in itertools.islice(numbers, lives):
                    LIVES[number % len(LIVES)](model, number, Path(place))
                    LEAKS[leak](model)
                states.append(state(Path(place)))
            check(states)
            tracemalloc.start()  # which makes all of it three times as slow


if __name__ == "__main__":
    main()
