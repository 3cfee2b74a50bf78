"""Measures what the machine can do at most: `python tests/bench/limits.py [--file FILE]`.

The bandwidth of reading memory and of reading a mapped file that lies in the page cache, the
float32 multiply-add peak, and how long a cache line travels between two processors. Virtual
machines move: the same two processors are sometimes near each other and sometimes far, and the
speed of two threads changes with it, so figures of two threads compare only within one state. Needs
a C compiler; `limits.c` says how each figure is taken. Prints markdown.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.c")


class Limits:
    """The compiled program; each method runs it once, for a second at most."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def run(self, *arguments: object) -> float:
        command = [str(self.program), *map(str, arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout)

    def read(self, threads: int, file: Path | None = None) -> float:
        """GB/s of reading 500 MB of memory, or the mapped file."""
        return self.run("read", threads, *([file] if file else []))

    def peak(self, threads: int) -> float:
        """GFLOP/s of multiply-adds on registers; one counts as two operations."""
        return self.run("peak", threads)

    def latency(self) -> float:
        """Nanoseconds until the other processor sees what one wrote."""
        return self.run("latency")

    def now(self, threads: int, file: Path) -> dict[str, float]:
        """All of them, by name."""
        return {
            "multiply-adds, GFLOP/s": self.peak(threads),
            "ping-pong, ns": self.latency(),
            "memory, GB/s": self.read(threads),
            "mapped file, GB/s": self.read(threads, file),
        }


@contextlib.contextmanager
def compiled() -> Iterator[Limits]:
    """The program in a temporary folder; OSError or CalledProcessError without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        subprocess.run(["cc", "-O3", "-pthread", str(SOURCE), "-o", str(program)], check=True)
        yield Limits(program)


def state(nanoseconds: float) -> str:
    """Which placement of the two processors a latency tells: the two known ones leave a gap."""
    if nanoseconds <= 80:
        return "near"
    return "far" if 150 <= nanoseconds <= 320 else "other"


def summary(rounds: list[dict[str, float]]) -> list[str]:
    """What the machine could do in the rounds of a measurement, and where its processors were."""
    states = collections.Counter(state(found["ping-pong, ns"]) for found in rounds)
    lines = [", ".join(f"{name} in {n} rounds" for name, n in states.most_common())]
    for name in rounds[0] if rounds else ():
        figures = [found[name] for found in rounds]
        spread = f"{shown(min(figures))} to {shown(max(figures))}"
        lines.append(f"{name}: median {shown(statistics.median(figures))} ({spread})")
    return lines


def shown(figure: float) -> str:
    if figure != figure:  # not measured
        return "-"
    return f"{figure:.1f}" if figure < 100 else f"{figure:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, help="a weight file to read as well")
    options = parser.parse_args()
    with compiled() as limits:
        latency = limits.latency()
        print(f"ping-pong {latency:.0f} ns: {state(latency)}\n")
        print("| threads | memory GB/s | mapped file GB/s | multiply-add GFLOP/s |")
        print("|---|---|---|---|")
        for threads in (1, 2):
            mapped = f"{limits.read(threads, options.file):.1f}" if options.file else "-"
            memory, peak = limits.read(threads), limits.peak(threads)
            print(f"| {threads} | {memory:.1f} | {mapped} | {peak:.0f} |")


if __name__ == "__main__":
    main()
