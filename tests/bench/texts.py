"""What sessions, batches, scores and choices cost: `python tests/bench/texts.py --model FILE`.

If the file is not there, it is written: GPT-2 124M's sizes with random weights, 498 MB. Each work
takes turns with the one beside it, which begins in every second round; a line gives the medians of
both, and the median, least and most of what is measured in a round. The machine's limits are
measured before each line (`limits.py`). Other jobs on the machine change all of it: look at the
load, which is printed first.

Expected before measuring, on 2 cores with AVX2 that read 20 GB/s:

- *batch of 8*: a pass of 8 rows took 1.8 times as long as one row (`rows.py`), so 4.4 x the tokens.
  With AVX-512 a pass of 8 rows takes 1.2 times as long. The keys and values of 8 texts of 256
  tokens are 151 MB beside 498 MB of weights, so the memory alone allows 6.4 x.
- *fork*: 1.0. Both write 74 MB into pages that the system has to provide first.
- *restoring*: 60 ms: the copy of a fork, and 10 ms to read and check the file.
- *scoring*: 0.69 x the tokens per second of a prompt, as the head, which a prompt needs for one row
  only, has 0.31 of the multiply-adds of a scored row. In multiply-adds per second 0.97.
- *choosing*: 0.5 ms of a step of 30 ms, 1.7 %. With flat logits, where the filters keep nearly all
  50,257 tokens, 5 ms, 17 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import limits
import numpy as np
import peers
import rows  # which adds the project's folder to the path
from programs import prompt

import tinygpt2

LENGTHS = (136, 168, 200, 232, 256, 296, 344, 416)  # 256 on average
NEW = 16
LONG, SCORED, CHOICES = 1000, 512, 16
STEP: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0}
FILTERS: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 0.95,
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "logit_bias": {token: (-np.inf, 1.5, -2.0)[token % 3] for token in range(0, 50257, 1000)},
    "bad_words": [[5], [6, 7]],
    "allowed": range(100, 50257),
}
Work = Callable[[], float]  # takes so many seconds


class Line(NamedTuple):
    """Two works, and what is measured in each round from the seconds that they took."""

    name: str
    ours: Work
    beside: str
    other: Work
    figure: Callable[[float, float], float]
    unit: str
    bound: str


def timed(work: Callable[[], object]) -> float:
    """Seconds until it returns; what it returns is dropped afterwards."""
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    del result
    return seconds


def fed(model: tinygpt2.Model, n: int) -> tinygpt2.Session:
    session = model.session()
    session.feed(prompt(n))
    return session


def batch(model: tinygpt2.Model) -> Iterator[Line]:
    """The seconds are those of decoding; the prompts are there."""
    sessions = [fed(model, n) for n in LENGTHS]
    found: dict[int, set[tuple[int, ...]]] = {number: set() for number in range(len(LENGTHS))}

    def decode(*numbers: int) -> float:
        answers = [
            sessions[i].begin((), False, {"max_new_tokens": NEW, "seed": i}, False, None)
            for i in numbers
        ]

        def run() -> None:
            while not all(answer.is_done() for answer in answers):
                tinygpt2.advance(model, answers)

        seconds = timed(run)
        for i, answer in zip(numbers, answers):
            sessions[i].rewind(NEW)
            found[i].add(tuple(answer.ids))
        if any(len(ids) > 1 for ids in found.values()):
            raise RuntimeError("a text in a batch is not what it is alone")
        return seconds

    yield Line(
        f"a batch of {len(LENGTHS)}, context 256, sampled",
        lambda: decode(*range(len(LENGTHS))),
        "one text of 256",
        lambda: decode(LENGTHS.index(256)),
        lambda ours, other: len(LENGTHS) * other / ours,
        "x tokens/s",
        ">= 5",
    )


def fork(model: tinygpt2.Model) -> Iterator[Line]:
    session = fed(model, LONG)
    shapes = tinygpt2.snapshot_layout(model.config, LONG).values()
    memory = bytearray(b"\1") * sum(tinygpt2.byte_size(*shape) for shape in shapes)
    yield Line(
        f"fork of {LONG} tokens",
        lambda: timed(session.fork),
        f"copy of {len(memory) / 1e6:.0f} MB",
        lambda: timed(lambda: bytes(memory)),
        lambda ours, other: ours / other,
        "x time",
        "<= 1.2",
    )


def restore(model: tinygpt2.Model) -> Iterator[Line]:
    session = fed(model, LONG)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.session"
        session.save(path)

        yield Line(
            f"load {LONG} tokens, then a step",
            lambda: timed(lambda: model.load_session(path).generate_ids([7], **STEP)),
            "a step",
            lambda: step(session),
            lambda ours, other: 1000 * (ours - other),
            "ms more",
            "<= 20",
        )


def score(model: tinygpt2.Model) -> Iterator[Line]:
    """A score has logits after every token, a prompt after its last one."""
    ids = prompt(SCORED)
    more = peers.operations(SCORED, 0, SCORED) / peers.operations(SCORED, 0, 1)
    for unit, factor, bound in (
        ("tokens", 1, f"{1 / more:.2f} if as fast"),
        ("FLOP", more, ">= 0.95"),
    ):
        yield Line(
            f"score of {SCORED} tokens",
            lambda: timed(lambda: model.score(ids)),
            "prompt",
            lambda: timed(lambda: fed(model, SCORED)),
            lambda ours, other, factor=factor: factor * other / ours,  # type: ignore[misc]
            f"x {unit}/s",
            bound,
        )


def step(session: tinygpt2.Session) -> float:
    """Seconds of computing one more token and choosing the next."""
    seconds = timed(lambda: session.generate_ids([7], **STEP))
    session.rewind(2)
    return seconds


def choices(session: tinygpt2.Session, kept: list[Any]) -> float:
    """Seconds of one of several choices, from rows of logits."""
    answer = session.begin((), False, {**FILTERS, "seed": 1}, False, None)
    with session.model.workspace() as workspace:
        each = [session.model.backend.kept(workspace, row) for row in kept]
        return timed(lambda: [answer._choose(logits, 0) for logits in each]) / len(kept)


def choose(model: tinygpt2.Model) -> Iterator[Line]:
    session = fed(model, 256)
    random = np.random.default_rng(0)
    for name, spread in (("logits as trained", 3.0), ("flat logits", 0.5)):
        noise = spread * random.standard_normal((CHOICES, model.config.vocab_size), np.float32)
        kept = [model.backend.row_of(memoryview(row).cast("B")) for row in noise]
        yield Line(
            f"a choice, all filters on, {name}",
            lambda kept=kept: choices(session, kept),  # type: ignore[misc]
            "a step",
            lambda: step(session),
            lambda ours, other: 100 * ours / other,
            "% of its time",
            "<= 2",
        )


WORKS = {work.__name__: work for work in (batch, fork, restore, score, choose)}


def measured(line: Line, runs: int) -> str:
    """A row of the table. The first round warms up."""
    pairs = []
    for turn in range(runs + 1):
        if turn % 2:
            ours = line.ours()
            pairs.append((ours, line.other()))
        else:
            other = line.other()
            pairs.append((line.ours(), other))
    milliseconds = (f"{1000 * statistics.median(side):.2f}" for side in zip(*pairs[1:]))
    figures = [line.figure(*pair) for pair in pairs[1:]]
    middle, least, most = statistics.median(figures), min(figures), max(figures)
    figure = f"{middle:.2f} ({least:.2f} to {most:.2f}) {line.unit}"
    ours_ms, other_ms = milliseconds
    cells = (line.name, ours_ms, line.beside, other_ms, figure, line.bound)
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--threads", type=int, default=2)
    add("--runs", type=int, default=9, help="rounds of everything, after one to warm up")
    add("--only", nargs="+", choices=[*WORKS], default=[*WORKS], metavar="NAME")
    options = parser.parse_args()
    if not options.model.exists():
        rows.write_gpt2(options.model)
    with (
        limits.compiled() as machine,
        tinygpt2.load(options.model, threads=options.threads) as model,
    ):
        load = " ".join(f"{figure:.2f}" for figure in os.getloadavg())
        print(f"{peers.machine_name()}; {model}; load {load}; medians of {options.runs}\n")
        print("| work | ms | beside it | ms | measured | bound |\n|---|---|---|---|---|---|")
        found = []
        for name in options.only:
            for line in WORKS[name](model):
                found.append(machine.now(options.threads, options.model))
                print(measured(line, options.runs), flush=True)
    print("\n" + "\n".join(f"- {text}" for text in limits.summary(found)))


if __name__ == "__main__":
    main()
