"""What a pass of several rows costs beside a pass of one, and the memory of a second session.

    python tests/bench/rows.py --model /tmp/gpt2.tg2 [--threads 2] [--runs 9]

If the file is not there, it is written: GPT-2 124M's sizes with random weights, 498 MB. A pass
reads all weights once, however many rows it has. So while reading is the limit, n rows cost hardly
more than one. Rows are measured as n tokens of one text and as one token of each of n texts, after
32 tokens of context; all take turns in every round. The last column is the arithmetic, to be
compared with the peak that tests/bench/limits.py measures.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tinygpt2

ROWS = (1, 2, 4, 8, 12, 16)
CONTEXT = 32


GPT2 = tinygpt2.Config(
    vocab_size=50257,
    n_positions=1024,
    n_embd=768,
    n_layer=12,
    n_head=12,
    n_inner=3072,
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    tie_word_embeddings=True,
    bos_token_id=50256,
    eos_token_ids=(50256,),
    n_merges=None,
    n_token_bytes=0,
    added_tokens=(),
    tokens_before=(),
    tokens_after=(),
    add_prefix_space=False,
    pre_tokenizer="gpt2",
    generation={},
)


def random_weights(entries: dict[str, tinygpt2.Entry]) -> Iterator[bytes]:
    random = np.random.default_rng(0)
    for name, (_, shape) in entries.items():
        mean = float(name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")))
        weights = random.standard_normal(math.prod(shape), np.float32)
        yield (mean + np.float32(0.02) * weights).astype(np.float32).tobytes()


def write_gpt2(path: Path) -> None:
    entries = tinygpt2.layout(GPT2)
    metadata = tinygpt2.tg2_metadata(GPT2)
    tinygpt2.write_tensors(
        str(path), entries, random_weights(entries), metadata, tinygpt2.read_config
    )


def resident_memory() -> float:
    """The private memory of this process in MB (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines():
        if line.startswith("Private_Dirty"):
            return int(line.split()[1]) / 1000
    raise OSError("/proc/self/smaps_rollup has no line Private_Dirty")


def filled_cache(model: tinygpt2.Model, workspace: object) -> tinygpt2.Cache:
    cache = model.backend.new_cache()
    span = tinygpt2.Span(cache, list(range(CONTEXT)), 0, 1)
    model.backend.forward(workspace, [span])
    return cache


def passes(model: tinygpt2.Model, workspace: object) -> dict[str, Callable[[], object]]:
    """For each way to measure: a function that runs one pass. Repeating it overwrites its rows."""
    caches = [filled_cache(model, workspace) for _ in range(max(ROWS))]

    def one_text(n: int) -> Callable[[], object]:
        span = tinygpt2.Span(caches[0], list(range(n)), CONTEXT, n)
        return lambda: model.backend.forward(workspace, [span]).top(0, 1)

    def many_texts(n: int) -> Callable[[], object]:
        spans = [tinygpt2.Span(cache, [n], CONTEXT, 1) for cache in caches[:n]]
        return lambda: model.backend.forward(workspace, spans).top(0, 1)

    ways = {f"{n} of one text": one_text(n) for n in ROWS}
    return {**ways, **{f"{n} texts": many_texts(n) for n in ROWS[1:]}}


def measure(model: tinygpt2.Model, runs: int) -> None:
    with model.workspace() as workspace:
        ways = passes(model, workspace)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(runs + 1):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                if turn:  # the first warms up
                    times[name].append(time.perf_counter() - start)
    weights = sum(tensor.stop - tensor.start for tensor in model.file.tensors.values()) / 4
    print(f"{'rows':16} {'ms':>8} {'to one row':>11} {'GFLOP/s':>8}")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["1 of one text"])]
        middle = statistics.median(seconds)
        rate = 2 * weights * int(name.split()[0]) / middle / 1e9
        print(f"{name:16} {1e3 * middle:8.2f} {statistics.median(ratios):11.2f} {rate:8.0f}")


def measure_session(model: tinygpt2.Model) -> None:
    """Two sessions with the same text: what the second one adds beside its keys and values."""
    ids = list(range(CONTEXT))
    first = model.session()
    first.feed(ids)
    first.generate_ids(max_new_tokens=1)
    before = resident_memory()
    second = model.session()
    second.feed(ids)
    second.generate_ids(max_new_tokens=1)
    print(f"a second session of {len(second)} tokens: {resident_memory() - before:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    if not options.model.exists():
        write_gpt2(options.model)
    with tinygpt2.load(options.model, threads=options.threads) as model:
        print(model)
        measure(model, options.runs)
        measure_session(model)


if __name__ == "__main__":
    main()
