"""Measures the NumPy fallback on a random GPT-2 124M: `python tests/bench/fallback.py`.

Three programs in one process, taking turns, so that a machine whose speed drifts slows all alike:
tinygpt2, a plain NumPy forward pass with a KV cache (row-major weights, written here), and
transformers if it is installed. Prints the median speed of each and the median of the ratios.
The weights and the converted file, 1 GB together, are kept in a folder that `--folder` names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402

import tinygpt2  # noqa: E402

CONFIG = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
Array = Any
Step = Callable[[list[int]], object]


class PlainNumpy:
    """GPT-2 as one would write it in NumPy: row-major weights, a KV cache, nothing clever."""

    def __init__(self, weights: dict[str, Array], n_head: int) -> None:
        self.w, self.n_head = weights, n_head
        self.n_layer = sum(name.endswith("ln_1.weight") for name in weights)
        self.keys: list[Array] = [None] * self.n_layer
        self.values: list[Array] = [None] * self.n_layer
        self.length = 0

    def norm(self, x: Array, name: str) -> Array:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return weight * (x - mean) / np.sqrt(variance + 1e-5) + bias

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, x: Array, i: int) -> Array:
        qkv = self.linear(x, f"h.{i}.attn.c_attn").reshape(len(x), 3, self.n_head, -1)
        q, k, v = qkv.transpose(1, 2, 0, 3)  # each [n_head, T, head_size]
        if self.length:
            k = np.concatenate([self.keys[i], k], axis=1)
            v = np.concatenate([self.values[i], v], axis=1)
        self.keys[i], self.values[i] = k, v
        scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(q.shape[-1]))
        if len(x) > 1:
            hidden = np.tri(len(x), k.shape[1], self.length, dtype=bool)
            scores = np.where(hidden, scores, np.float32(-1e10))
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = (p / p.sum(-1, keepdims=True)) @ v
        return self.linear(y.transpose(1, 0, 2).reshape(len(x), -1), f"h.{i}.attn.c_proj")

    def mlp(self, x: Array, i: int) -> Array:
        x = self.linear(x, f"h.{i}.mlp.c_fc")
        x = 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x * x * x)))
        return self.linear(x, f"h.{i}.mlp.c_proj")

    def feed(self, tokens: list[int]) -> Array:
        positions = slice(self.length, self.length + len(tokens))
        x = self.w["wte.weight"][tokens] + self.w["wpe.weight"][positions]
        for i in range(self.n_layer):
            x = x + self.attention(self.norm(x, f"h.{i}.ln_1"), i)
            x = x + self.mlp(self.norm(x, f"h.{i}.ln_2"), i)
        self.length += len(tokens)
        return self.norm(x[-1:], "ln_f") @ self.w["wte.weight"].T


def transformers_model(folder: Path) -> Any:
    """GPT2LMHeadModel from the same weights, or None where transformers is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.set_grad_enabled(False)
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(folder, use_safetensors=True)
    return model.eval()


def transformers_step(model: Any) -> Step:
    import torch

    state: dict[str, Any] = {"cache": None}

    def step(tokens: list[int]) -> object:
        ids = torch.tensor([tokens])
        out = model(ids, past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
        state["cache"] = out.past_key_values
        return out.logits

    return step


def speeds(step: Step, n_prompt: int, n_new: int) -> tuple[float, float]:
    """Tokens per second of one prompt, and of decoding after it."""
    started = time.perf_counter()
    step([7 * i % 50257 for i in range(n_prompt)])
    fed = time.perf_counter()
    for i in range(n_new):
        step([11 * i % 50257])
    return n_prompt / (fed - started), n_new / (time.perf_counter() - fed)


def compare(programs: dict[str, Callable[[], Step]], n_prompt: int, n_new: int, runs: int) -> None:
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(runs + 1):  # the first is a warm-up
        for name, make in programs.items():
            results[name].append(speeds(make(), n_prompt, n_new))
    print(f"\nprompt of {n_prompt} tokens, then {n_new} decoded; median of {runs}")
    ours = results["tinygpt2"][1:]
    for name, rows in results.items():
        rows = rows[1:]
        prompt, decode = (statistics.median(row[i] for row in rows) for i in (0, 1))
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(ours, rows)) for i in (0, 1)]
        print(
            f"{name:13} prompt {prompt:7.1f} tokens/s   decode {decode:6.1f} tokens/s"
            f"   tinygpt2 is {ratios[0]:.2f} x and {ratios[1]:.2f} x"
        )


def write_random(folder: str) -> None:
    weights = conftest.random_weights(CONFIG)
    small = {name: w * np.float32(0.1) for name, w in weights.items()}
    conftest.write_checkpoint(Path(folder), CONFIG, small, tokenizer=False)


def run_small(code: str, *arguments: str) -> None:
    """Run code in a process of its own: a child's peak memory begins with its parent's."""
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, str(ROOT), here, *arguments], check=True)


def make_files(folder: Path) -> None:
    """The random checkpoint, and its conversion, timed."""
    path = "import sys, time; sys.path[:0] = sys.argv[1:3]\n"
    if not (folder / "model.safetensors").exists():
        run_small(path + "import fallback; fallback.write_random(sys.argv[3])", str(folder))
    run_small(
        path + "import tinygpt2; start = time.perf_counter()\n"
        "tinygpt2.convert(sys.argv[3], sys.argv[3] + '/gpt2.tg2')\n"
        "seconds, peak = time.perf_counter() - start, tinygpt2.peak_memory()\n"
        "print(f'convert: {seconds:.1f} s, peak memory with the mapped files {peak:.0f} MB')",
        str(folder),
    )


def time_opening(path: Path, runs: int) -> None:
    tinygpt2.import_numpy()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        tinygpt2.load(path).close()
        times.append(time.perf_counter() - started)
    print(f"open: {statistics.median(times) * 1000:.1f} ms, median of {runs}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the weights are kept")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    make_files(options.folder)
    time_opening(options.folder / "gpt2.tg2", 2 * options.runs + 1)
    with contextlib.closing(tinygpt2.TensorFile(options.folder / "model.safetensors")) as file:
        weights = {name: file.array(name).copy() for name in file.tensors}
    model = tinygpt2.load(options.folder / "gpt2.tg2")
    programs: dict[str, Callable[[], Step]] = {
        "tinygpt2": lambda: model.session().feed,
        "plain NumPy": lambda: PlainNumpy(weights, CONFIG["n_head"]).feed,
    }
    reference = transformers_model(options.folder)
    if reference is not None:
        programs["transformers"] = lambda: transformers_step(reference)
    print(json.dumps({"python": sys.version.split()[0], "numpy": np.__version__}))
    for n_prompt in (16, 128, 512):
        compare(programs, n_prompt, 16, options.runs)


if __name__ == "__main__":
    main()
