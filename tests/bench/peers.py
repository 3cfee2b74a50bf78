"""Compares tinygpt2 with other runtimes: `python tests/bench/peers.py --folder DIR`.

All run one random GPT-2 124M in float32; `programs.py` says how each is set up. Their files are
written into the folder, 3 GB. What is not installed (`pip install -r tests/bench/requirements.txt`)
or fails or computes other logits than plain NumPy is left out, and said.

Each program is a process of its own with its number of threads. They take turns: in every round
each runs once, in another order each time, and the others are stopped (SIGSTOP), so that no waiting
thread spins beside the one that works, and every program keeps its own way of waiting. A turn
begins with a short text that is not timed. The machine's limits (`limits.py`) are measured in each
round.

- *prompt*: tokens per second until the first new token is known; *decode*: of the greedy ones that
  follow.
- *one token*: a whole process, from its start to its end, 16 tokens in and one out, files in the
  page cache. For tinygpt2 that is its command line, for the others the shortest script.
- *private*: anonymous memory after the prompt of 1,000 tokens; 74 MB of it are keys and values.
  (`Private_Dirty` would also count pages of mapped files that were written a moment ago.)
- *limit*: reading all weights and the cache once at the measured bandwidth, or the multiply-adds at
  the measured peak, whichever takes longer.

Prints markdown; `--json` keeps every figure, `--chart` draws the medians.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import limits
import programs
from graphs import LAYERS, VOCAB, WIDTH
from limits import shown

ROOT = Path(__file__).resolve().parents[2]
US, REFERENCE = "tinygpt2", "plain NumPy"
MODULE, PYTHON = "python -m tinygpt2", "python alone"
LIMIT, MAPPED = "limit: memory", "limit: mapped file"
PROMPTS = {16: 32, 128: 0, 512: 32, 1000: 0}  # how many tokens are decoded after how many
COLD, PRIVATE = "one token, ms", "private, MB"  # of these, less is better
DECODES = {f"decode after {n}": n for n, count in PROMPTS.items() if count}
COLUMNS = [*DECODES, *(f"prompt of {n}" for n in PROMPTS), COLD, PRIVATE]
TOLERANCE = 1e-3  # of the largest logit; llama.cpp has its GELU in a half-precision table
Figures = dict[str, dict[str, list[float]]]  # column, program: one of each round


def command(role: str, name: str, folder: Path, threads: int) -> list[str]:
    """Imports programs.py as a module, so that it is compiled once and not in every process."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import programs; programs.main()"
    place = str(Path(programs.__file__).parent)
    return [sys.executable, "-c", code, place, role, name, str(folder), str(threads)]


def variables(threads: int) -> dict[str, str]:
    """The environment of every program: what has no option for its threads looks there."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules start compiled, as users' do
    return environment


def run(words: list[str], threads: int) -> None:
    done = subprocess.run(words, cwd=ROOT, env=variables(threads), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(reason(done.stderr, done.returncode))


def reason(errors: str, code: int) -> str:
    """Why a process ended: the last line of what it said, or its exit code (minus a signal)."""
    return next(filter(str.strip, reversed(errors.split("\n"))), f"ended with exit code {code}")


class Process:
    """A program that answers requests and is stopped whenever there is none."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open while it runs
        self.process = subprocess.Popen(
            command("serve", name, folder, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=variables(threads),
            text=True,
        )
        self.version = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(reason(self.errors.read(), self.process.wait()))
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def ask(self, method: str, ids: list[int], count: int = 0) -> Any:
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        print(json.dumps([method, ids, count]), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


BLOCKS = LAYERS * 12 * WIDTH * WIDTH  # the numbers in all matrices but the head


def least_seconds(n: int, past: float, bandwidth: float, peak: float) -> float:
    """What computing `n` tokens after `past` others takes at least, by GB/s and by GFLOP/s."""
    weights = BLOCKS + LAYERS * 13 * WIDTH + (VOCAB + 2) * WIDTH
    read = 4 * (weights + 2 * LAYERS * WIDTH * (past + n))
    return max(read / bandwidth, operations(n, past, 1) / peak) / 1e9


def operations(n: int, past: float, rows: int) -> float:
    """Multiplications and additions of `n` tokens after `past` others, with `rows` of logits."""
    pairs = n * (past + (n + 1) / 2)  # of a query with a key that it sees
    return 2 * (n * BLOCKS + 2 * LAYERS * WIDTH * pairs + rows * VOCAB * WIDTH)


class Comparison:
    """All that is measured with one number of threads."""

    def __init__(self, folder: Path, threads: int, machine: limits.Limits) -> None:
        self.folder, self.threads, self.machine = folder, threads, machine
        self.processes: dict[str, Process] = {}
        self.notes: dict[str, str] = {}  # of each program: its version, or why it is left out
        self.figures: Figures = {column: collections.defaultdict(list) for column in COLUMNS}
        self.limits: list[dict[str, float]] = []  # of each round

    def start(self, names: list[str], expected: list[float]) -> None:
        for name in names:
            try:
                run(command("write", name, self.folder, self.threads), self.threads)
                process = self.processes[name] = Process(name, self.folder, self.threads)
                logits = process.ask("logits", programs.prompt(16))
                self.notes[name] = f"{process.version}, {check(logits, expected)}"
            except RuntimeError as error:
                self.leave_out(name, error)

    def leave_out(self, name: str, error: Exception) -> None:
        self.notes[name] = f"left out: {error}"
        if name in self.processes:
            self.processes.pop(name).close()

    def measure(self, runs: int) -> None:
        for n, count in PROMPTS.items():
            for i in range(-1, runs):  # the first round is a warm-up
                progress(f"threads: {self.threads}, prompt of {n}, round {i + 1} of {runs}")
                figures = self.limit(n, count)
                for name in rotated([*self.processes], i):
                    try:
                        figures += self.turn(name, n, count)
                    except RuntimeError as error:
                        self.leave_out(name, error)
                for name, column, figure in figures if i >= 0 else []:
                    self.figures[column][name].append(figure)

    def turn(self, name: str, n: int, count: int) -> list[tuple[str, str, float]]:
        took = self.processes[name].ask("measure", programs.prompt(n), count)
        figures = [(name, f"prompt of {n}", n / took["prompt"])]
        if count:
            figures.append((name, f"decode after {n}", count / took["decode"]))
        if n == max(PROMPTS):
            figures.append((name, PRIVATE, took["private"]))
        return figures

    def limit(self, n: int, count: int) -> list[tuple[str, str, float]]:
        found = self.machine.now(self.threads, self.folder / programs.TinyGPT2.file)
        self.limits.append(found)
        peak = found["multiply-adds, GFLOP/s"]
        figures = []
        for name in (LIMIT, MAPPED):
            bandwidth = found[name.replace("limit: ", "") + ", GB/s"]
            figures.append((name, f"prompt of {n}", n / least_seconds(n, 0, bandwidth, peak)))
            if count:
                seconds = least_seconds(1, n + count / 2, bandwidth, peak)
                figures.append((name, f"decode after {n}", 1 / seconds))
        return figures

    def whole(self, names: list[str]) -> dict[str, list[str]]:
        """The commands that compute one token in a process of their own."""
        words = ["--model", str(self.folder / programs.TinyGPT2.file), "--threads"]
        words += [str(self.threads), "--max-tokens", "1", "--temperature", "0", "--ids"]
        words.append(" ".join(map(str, programs.prompt(16))))
        return {
            **{name: command("once", name, self.folder, self.threads) for name in names},
            US: [sys.executable, "tinygpt2.py", *words],
            MODULE: [sys.executable, "-m", "tinygpt2", *words],
            PYTHON: [sys.executable, "-c", "pass"],
        }

    def measure_whole(self, runs: int) -> None:
        commands = self.whole([*self.processes])
        self.close()  # what serves would hold memory
        for i in range(-1, runs):
            progress(f"threads: {self.threads}, whole process, round {i + 1} of {runs}")
            for name in rotated([*commands], i):
                started = time.perf_counter()
                try:
                    run(commands[name], self.threads)
                except RuntimeError as error:
                    del commands[name]
                    self.leave_out(name, error)
                    continue
                if i >= 0:
                    self.figures[COLD][name].append(1000 * (time.perf_counter() - started))

    def close(self) -> None:
        while self.processes:
            self.processes.popitem()[1].close()


def rotated(names: list[str], i: int) -> list[str]:
    return names[i % len(names) :] + names[: i % len(names)]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check(logits: list[float], expected: list[float]) -> str:
    """How far logits are from plain NumPy's; RuntimeError where that is too far."""
    difference = max(abs(a - b) for a, b in zip(logits, expected)) / max(map(abs, expected))
    if len(logits) != len(expected) or not difference <= TOLERANCE:
        raise RuntimeError(f"its logits differ from plain NumPy's by {difference:.1e}")
    return f"logits within {difference:.0e}"


def median(figures: list[float] | None) -> float:
    return statistics.median(figures) if figures else float("nan")


def best_other(figures: dict[str, list[float]], less: bool) -> str | None:
    others = {name: median(figures[name]) for name in figures if name in programs.PEERS}
    others.pop(US, None)
    return (min if less else max)(others, key=lambda name: others[name]) if others else None


def ratio(column: str, figures: dict[str, list[float]], name: str | None) -> str:
    """The median over the rounds of how much better we are than a program or a limit."""
    if name not in figures or US not in figures:
        return "-"
    ratios = [a / b for a, b in zip(figures[US], figures[name])]
    if column in (COLD, PRIVATE):
        ratios = [1 / x for x in ratios]
    return f"{median(ratios):.2f} x"


def table(comparison: Comparison) -> str:
    columns = comparison.figures
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    names.sort(key=lambda name: [US, *programs.PEERS, MODULE, PYTHON, LIMIT, MAPPED].index(name))
    rows = [[f"threads: {comparison.threads}", *columns], ["---"] * (len(columns) + 1)]
    for name in names:
        medians = (median(figures.get(name)) for figures in columns.values())
        rows.append([name, *map(shown, medians)])
    best = {c: best_other(figures, c in (COLD, PRIVATE)) for c, figures in columns.items()}
    rows.append(["**tinygpt2 to the best other**"])
    rows[-1] += [f"**{ratio(c, columns[c], best[c])}** {best[c] or ''}" for c in columns]
    for limit in (LIMIT, MAPPED):
        rows.append([f"tinygpt2 to the {limit}", *(ratio(c, columns[c], limit) for c in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def notes(comparison: Comparison) -> str:
    """What the machine could do, where its processors were, and which programs ran."""
    lines = limits.summary(comparison.limits)
    lines += [f"{name}: {note}" for name, note in comparison.notes.items()]
    return "\n".join(f"- {line}" for line in lines)


def draw(comparisons: list[Comparison], path: Path) -> None:
    """A panel for each column: a bar for each program, a dotted line for the limit."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plots = importlib.import_module("matplotlib.pyplot")
    width = len(COLUMNS) // 2
    n_rows = 2 * len(comparisons)
    figure, panels = plots.subplots(n_rows, width, squeeze=False, figsize=(4 * width, 3 * n_rows))
    columns = [(c.threads, *item) for c in comparisons for item in c.figures.items()]
    for panel, (threads, column, figures) in zip(panels.flat, columns):
        unit = "" if column in (COLD, PRIVATE) else ", tokens/s"
        panel.set_title(f"{column}{unit} (threads: {threads})", fontsize=10)
        draw_bars(panel, figures)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def draw_bars(panel: Any, figures: dict[str, list[float]]) -> None:
    names = [name for name in reversed(programs.PEERS) if name in figures]
    lengths = [median(figures[name]) for name in names]
    colours = ["tab:orange" if name == US else "tab:blue" for name in names]
    for bar, length in zip(panel.barh(names, lengths, color=colours), lengths):
        panel.text(0, bar.get_y() + bar.get_height() / 2, f" {shown(length)}", va="center")
    if LIMIT in figures:
        panel.axvline(median(figures[LIMIT]), color="black", linestyle=":")


def machine_name() -> str:
    """The processor by its own name where Linux tells it, and Python's version."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} processors, Python {platform.python_version()}"


def write_checkpoint(folder: Path) -> None:
    """The random weights that fallback.py uses, made in a process of their own."""
    if not (folder / "model.safetensors").exists():
        code = "import sys; sys.path[:0] = sys.argv[1:3]; import fallback"
        code += "; fallback.write_random(sys.argv[3])"
        places = map(str, (ROOT / "tests", Path(__file__).parent, folder))
        run([sys.executable, "-c", code, *places], 1)


def reference(folder: Path) -> list[float]:
    """Plain NumPy's logits after 16 tokens."""
    run(command("write", REFERENCE, folder, 1), 1)
    return programs.PlainNumPy(folder, 1).logits(programs.prompt(16))


def compare(options: argparse.Namespace) -> list[Comparison]:
    write_checkpoint(options.folder)
    expected = reference(options.folder)
    comparisons = []
    with limits.compiled() as machine:
        for threads in options.threads:
            comparison = Comparison(options.folder, threads, machine)
            comparisons.append(comparison)
            try:
                comparison.start(options.only, expected)
                comparison.measure(options.runs)
                comparison.measure_whole(options.runs)
            finally:
                comparison.close()
    return comparisons


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where the weights are kept")
    add("--runs", type=int, default=5, help="rounds of everything, after one to warm up")
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--only", nargs="+", choices=[*programs.PEERS], default=[*programs.PEERS], metavar="NAME")
    add("--json", type=Path, help="a file for all figures")
    add("--chart", type=Path, help="an image file; needs matplotlib")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    comparisons = compare(options)
    print(f"{machine_name()}; medians of {options.runs}; tokens per second if not said otherwise.")
    for comparison in comparisons:
        print(f"\n{table(comparison)}\n\n{notes(comparison)}")
    if options.json:
        kept = ("threads", "notes", "figures", "limits")
        raw = [{key: getattr(comparison, key) for key in kept} for comparison in comparisons]
        options.json.write_text(json.dumps({"machine": machine_name(), "comparisons": raw}))
    if options.chart:
        draw(comparisons, options.chart)


if __name__ == "__main__":
    main()
