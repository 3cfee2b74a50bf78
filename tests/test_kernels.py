"""The operations of kernels.c one by one, on every instruction set that this machine has.

Each is compared with NumPy in float64, and bit for bit with the portable one. Outputs are filled
with NaN before, and all memory around them is watched: by guard values, and, in processes of their
own that may crash, by pages that nobody may touch.

A unit in the last place (ulp) is the distance between float32 numbers at the exact result. The
bounds of errors are a little above what was found, which their comments state; U is half an ulp
of 1, the most by which one rounding can change a number, relative to it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import faulthandler
import functools
import hashlib
import itertools
import math
import mmap
import signal
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pytest
from conftest import ROOT, TOY, run_python

import tinygpt2

if tinygpt2.library_path() is None:
    pytest.skip("needs the C kernels: `python build.py`", allow_module_level=True)

Put = Callable[[np.ndarray], np.ndarray]  # makes a copy that a kernel may use
Operation = Callable[["Kernels", Put], list[np.ndarray]]

SIZES = (1, 2, 3, 8, 15, 16, 17, 31, 64, 65, 768, 1000, 3072)
ROWS = (1, 2, 3, 4, 6, 7, 11, 12, 13, 24, 25)
PANELS = (1, 2, 3, 4, 5, 7)
INPUTS = (1, 2, 15, 64, 255, 256, 257, 1024, 1030)  # blocks are of 256 and 1024
ACTIVATIONS = ("gelu_new", "gelu", "relu")  # in the order of the table
LANES = 16
PROT_NONE = 0
U = 2.0**-24
NAN, INF = math.nan, math.inf
GUARD = np.float32(-7.25)  # no operation leaves it as it is


# The library

POINTER, SIZE, INT, FLOAT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
I32, DOUBLE = ctypes.c_int32, ctypes.c_double
DONE, MORE, BUSY, BAD_ARGUMENT, NOT_FINITE = range(5)
NO_TOKEN = -1


class Kernels(ctypes.Structure):
    """The table `tg_kernels`, as declared at the head of kernels.c."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("width", INT),
        (
            "product",
            ctypes.CFUNCTYPE(
                None, POINTER, SIZE, INT, POINTER, SIZE, INT, INT, POINTER, POINTER, SIZE
            ),
        ),
        ("layer_norm", ctypes.CFUNCTYPE(None, POINTER, POINTER, POINTER, FLOAT, INT, POINTER)),
        ("activate", ctypes.CFUNCTYPE(None, POINTER, INT) * 3),
        ("softmax", ctypes.CFUNCTYPE(None, POINTER, INT, FLOAT)),
        ("log_sum", ctypes.CFUNCTYPE(None, POINTER, INT, POINTER, POINTER)),
        ("exp", ctypes.CFUNCTYPE(None, POINTER, INT)),
        ("best", ctypes.CFUNCTYPE(INT, POINTER, INT)),
        ("log", ctypes.CFUNCTYPE(DOUBLE, DOUBLE)),
    )


class Config(ctypes.Structure):
    """`tg_config`."""

    _fields_ = (
        *((name, I32) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")),
        *((name, I32) for name in ("n_inner", "activation", "scale_attn_weights")),
        *((name, I32) for name in ("scale_attn_by_inverse_layer_idx", "tied")),
        ("layer_norm_epsilon", FLOAT),
    )


class Settings(ctypes.Structure):
    """`tg_options`."""

    _fields_ = (
        *((name, DOUBLE) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        ("seed", ctypes.c_uint64),
        ("position", ctypes.c_int64),
        *((name, POINTER) for name in ("bias", "bias_tokens", "seen", "allowed")),
        *((name, I32) for name in ("top_k", "n_bias", "n_seen")),
    )


def load_library() -> Any:
    library = ctypes.CDLL(tinygpt2.library_path() or "")
    library.tg_find_kernels.restype = ctypes.POINTER(Kernels)
    library.tg_find_kernels.argtypes = [ctypes.c_char_p]
    library.tg_model_new.restype = POINTER
    library.tg_model_new.argtypes = [POINTER, POINTER, POINTER, ctypes.c_char_p, INT]
    library.tg_pass_new.restype = POINTER
    for name in ("tg_model_free", "tg_pass_new", "tg_pass_free"):
        getattr(library, name).argtypes = [POINTER]
    library.tg_choose.argtypes = [POINTER] * 4
    library.tg_log_probability.argtypes = [POINTER, POINTER, I32, POINTER]
    library.tg_top.argtypes = [POINTER, POINTER, INT, POINTER, POINTER]
    return library


def find_tables() -> dict[str, Kernels]:
    """Those of the library whose instructions this machine has."""
    library = LIBRARY
    found = {n: library.tg_find_kernels(n.encode()) for n in ("portable", "neon", "avx2", "avx512")}
    return {name: table.contents for name, table in found.items() if table}


LIBRARY = load_library()
TABLES = find_tables()
on_every_isa = pytest.mark.parametrize("isa", TABLES)


def test_the_tables() -> None:
    assert "portable" in TABLES
    assert {name: table.name.decode() for name, table in TABLES.items()} == {n: n for n in TABLES}
    widths = {"portable": 1, "neon": 4, "avx2": 8, "avx512": 16}
    assert all(table.width == widths[name] for name, table in TABLES.items())


# Memory


def plain(values: np.ndarray) -> np.ndarray:
    return np.array(values, np.float32)


class Guarded:
    """Memory between guard values, to be looked at afterwards. Aligned to no more than a float."""

    MARGIN = 21

    def __init__(self) -> None:
        self.used: list[np.ndarray] = []

    def __call__(self, values: np.ndarray) -> np.ndarray:
        whole = np.full(len(values) + 2 * self.MARGIN, GUARD, np.float32)
        whole[self.MARGIN : -self.MARGIN] = values
        self.used.append(whole)
        return whole[self.MARGIN : -self.MARGIN]

    def check(self) -> None:
        for whole in self.used:
            assert is_guard(whole[: self.MARGIN])
            assert is_guard(whole[-self.MARGIN :])


class Fenced:
    """Memory that touches a page at its end, or at its begin, where every access is a crash."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.mprotect = ctypes.CDLL(None, use_errno=True).mprotect
        self.mprotect.argtypes = [POINTER, SIZE, INT]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        size, page = 4 * len(values), mmap.PAGESIZE
        inside = tinygpt2.round_up(size, page)
        memory = mmap.mmap(-1, page + inside + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (start, start + page + inside):
            assert self.mprotect(fence, page, PROT_NONE) == 0, ctypes.get_errno()
        offset = page + (inside - size if self.at_end else 0)
        array = np.frombuffer(memory, np.float32, len(values), offset)
        array[:] = values
        return array


def is_guard(values: np.ndarray) -> bool:
    return bool((values == GUARD).all())


def padded(values: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` floats, with NaN behind: what they are must not matter."""
    return np.append(values, np.full(count - len(values), NAN)).astype(np.float32)


def up(count: int) -> int:
    return tinygpt2.round_up(count, LANES)


def bits(values: np.ndarray) -> np.ndarray:
    """For comparisons with ==, in which every zero has its sign, and all NaN are one."""
    return np.where(np.isnan(values), np.float32(NAN), values).astype(np.float32).view(np.int32)


def spread(rows: np.ndarray, apart: int) -> np.ndarray:
    """Rows that lie `apart` floats from each other, with guard values between; none at the end."""
    out = np.full((len(rows), apart), GUARD, np.float32)
    out[:, : rows.shape[1]] = rows
    return out.ravel()[: (len(rows) - 1) * apart + rows.shape[1]]


# The operations, each as a function of the table, the memory and the arguments


def product(
    table: Kernels,
    put: Put,
    a: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    gap: int,
) -> list[np.ndarray]:
    """a [m, k] x w [panels, k, 16]; rows and panels have gaps between, of different sizes."""
    (m, k), (panels, _, _) = a.shape, w.shape
    lda, stride, width, ldc = k + gap, k * LANES + 3 * gap, panels * LANES, panels * LANES + 2 * gap
    rows, weights = put(spread(a, lda)), put(spread(w.reshape(panels, -1), stride))
    init = None if bias is None else put(bias)
    out = put(spread(np.full((m, width), NAN, np.float32), ldc))
    table.product(
        *(rows.ctypes.data, lda, m, weights.ctypes.data, stride, panels, k),
        *(None if init is None else init.ctypes.data, out.ctypes.data, ldc),
    )
    all_rows = np.append(out, np.full(ldc - width, GUARD)).reshape(m, ldc)
    assert is_guard(all_rows[:, width:])
    return [all_rows[:, :width]]


def layer_norm(
    table: Kernels,
    put: Put,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    epsilon: float = 1e-5,
) -> list[np.ndarray]:
    n = len(x)
    vectors = [put(x), *(put(padded(v, up(n))) for v in (weight, bias))]
    y = put(np.full(up(n), NAN, np.float32))
    places = [vector.ctypes.data for vector in vectors]
    table.layer_norm(*places, epsilon, n, y.ctypes.data)
    return [y[:n]]


def activate(table: Kernels, put: Put, name: str, x: np.ndarray) -> list[np.ndarray]:
    y = put(padded(x, up(len(x))))
    table.activate[ACTIVATIONS.index(name)](y.ctypes.data, len(x))
    return [y[: len(x)]]


def exp(table: Kernels, put: Put, x: np.ndarray) -> list[np.ndarray]:
    y = put(padded(x, up(len(x))))
    table.exp(y.ctypes.data, len(x))
    return [y[: len(x)]]


def softmax(table: Kernels, put: Put, x: np.ndarray, scale: float = 1.0) -> list[np.ndarray]:
    """The weights, with the zeros behind."""
    y = put(padded(x, up(len(x))))
    table.softmax(y.ctypes.data, len(x), scale)
    return [y]


def log_sum(table: Kernels, put: Put, x: np.ndarray) -> list[np.ndarray]:
    """The maximum and the sum."""
    values, out = put(x), put(np.full(2, NAN))
    table.log_sum(values.ctypes.data, len(x), out.ctypes.data, out.ctypes.data + 4)
    return [out]


def best(table: Kernels, put: Put, x: np.ndarray) -> list[np.ndarray]:
    values = put(x)
    return [np.array([table.best(values.ctypes.data, len(x))], np.float32)]


def normal(*shape: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def product_operands(k: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest a, w and bias with k inputs; smaller ones are parts of them."""
    a = normal(max(ROWS), k, seed=seed)
    w = normal(max(PANELS), k, LANES, seed=seed + 1)
    return a, w, normal(max(PANELS) * LANES, seed=seed + 2)


def product_cases(k: int) -> Iterator[tuple[str, int, int, bool, Operation]]:
    """Every number of rows and panels, with and without bias and gaps."""
    a, w, bias = product_operands(k)
    variants = ((0, True), (7, False), (7, True), (0, False))
    for m in ROWS:
        for panels in PANELS:
            for gap, with_bias in variants[: 4 if k < 500 else 2]:
                operation = functools.partial(
                    product,
                    a=a[:m],
                    w=w[:panels],
                    bias=bias[: panels * LANES] if with_bias else None,
                    gap=gap,
                )
                label = f"product m={m} panels={panels} k={k} gap={gap} bias={with_bias}"
                yield label, m, panels, with_bias, operation


def cases() -> Iterator[tuple[str, Operation]]:
    """Every operation at every size; products in a third of the cases, every m with every number
    of panels."""
    for k in INPUTS:
        for label, _, _, _, operation in itertools.islice(product_cases(k), 0, None, 3):
            yield label, operation
    for n in SIZES:
        x = normal(n, seed=n, scale=3)
        weight, bias = normal(n, seed=n + 1), normal(n, seed=n + 2)
        yield f"layer_norm n={n}", functools.partial(layer_norm, x=x, weight=weight, bias=bias)
        for name in ACTIVATIONS:
            yield f"{name} n={n}", functools.partial(activate, name=name, x=x)
        yield f"exp n={n}", functools.partial(exp, x=-np.abs(x))
        yield f"softmax n={n}", functools.partial(softmax, x=x, scale=0.7)
        yield f"log_sum n={n}", functools.partial(log_sum, x=x)
        yield f"best n={n}", functools.partial(best, x=x)
    for name in ACTIVATIONS:
        x = np.concatenate((DENSE, -DENSE, HUGE, -HUGE, TINY, -TINY))
        yield f"{name} everywhere", functools.partial(activate, name=name, x=x)
    yield "exp everywhere", functools.partial(exp, x=np.concatenate((EXPONENTS, -HUGE, -TINY)))


DENSE = np.linspace(0, 12, 200_001, dtype=np.float32)
HUGE = np.append(np.geomspace(12, 3.4e38, 1000), np.float32(3.4028235e38)).astype(np.float32)
TINY = np.append(np.geomspace(1e-45, 1e-3, 1000), 0).astype(np.float32)
EXPONENTS = np.concatenate((np.linspace(-87, 0, 400_001), -np.geomspace(1e-9, 87, 200_001))).astype(
    np.float32
)


# The same bits, and no access beyond


@on_every_isa
def test_same_bits_and_nothing_written_beyond(isa: str) -> None:
    """Of the portable code this sees what it writes; of the others, too, that the bits are its."""
    for label, operation in cases():
        memory = Guarded()
        results = operation(TABLES[isa], memory)
        memory.check()
        for got, expected in zip(results, operation(TABLES["portable"], plain)):
            assert (bits(got) == bits(expected)).all(), label


def touch_fences(isa: str) -> None:
    """Run every operation on memory at both fences. A crash leaves the name of the case behind."""
    faulthandler.enable()
    fences = [Fenced(at_end=True), Fenced(at_end=False)]
    for label, operation in cases():
        print(label, flush=True)
        expected = operation(TABLES[isa], plain)
        for fence in fences:
            for got, wanted in zip(operation(TABLES[isa], fence), expected):
                assert (bits(got) == bits(wanted)).all()
    print("done")


def read_too_much(isa: str) -> None:
    """Tell an operation one float more than there are."""
    x = Fenced(at_end=True)(normal(16, seed=0))
    TABLES[isa].best(x.ctypes.data, 17)


def in_another_process(function: Callable[[str], None], isa: str) -> Any:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_kernels as t; "
    return run_python(f"{code} t.{function.__name__}(sys.argv[2])", ROOT / "tests", isa)


@pytest.mark.slow
@on_every_isa
def test_nothing_is_read_beyond(isa: str) -> None:
    done = in_another_process(touch_fences, isa)
    last = (done.stdout.splitlines() or ["it did not start"])[-1]
    assert (done.returncode, last) == (0, "done"), done.stderr[-3000:]


def test_the_fence_would_show_it() -> None:
    done = in_another_process(read_too_much, "portable")
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)


# The product


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of float32 numbers, rounded once.

    In float64 the product is exact; the sum is rounded to odd: where it is not exact, its last bit
    is made 1, so that the second rounding, to float32, falls as that of the exact sum would
    (Boldo & Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    exact = a.astype(np.float64) * b
    total = exact + c
    change = total - exact
    lost = (exact - (total - change)) + (c - change)  # Knuth's two-sum: total + lost is exact
    even = total.view(np.int64) & 1 == 0
    away = np.where((lost > 0) == (total > 0), 1, -1)
    odd = total.view(np.int64) + np.where((lost != 0) & even, away, 0)
    return np.asarray(odd.view(np.float64).astype(np.float32))


def chain(a: np.ndarray, w: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What the product must be: for each output one chain of fused steps, in the inputs' order."""
    sums = np.tile(start.astype(np.float32), (len(a), 1)).reshape(len(a), len(w), LANES)
    for p in range(a.shape[1]):
        sums = fused(a[:, p, None, None], w[None, :, p], sums)
    return sums.reshape(len(a), -1)


def test_fused() -> None:
    """The emulation is the C library's fmaf, where roundings are close decisions too."""
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("needs the C library's fmaf")
    fmaf = ctypes.CDLL(name).fmaf
    fmaf.restype, fmaf.argtypes = FLOAT, [FLOAT] * 3
    random = np.random.default_rng(5)
    a, b = (1 + random.integers(0, 1 << 12, (2, 20_000)) * 2.0**-12).astype(np.float32)
    ties = random.integers(-4, 5, 20_000) * 2.0 ** random.integers(-60, 30, 20_000)
    for c in (normal(20_000, seed=6), ties.astype(np.float32), -a * b):
        expected = np.array([fmaf(*numbers) for numbers in zip(a, b, c)], np.float32)
        assert (bits(fused(a, b, c)) == bits(expected)).all()


@pytest.mark.parametrize("k", INPUTS)
@on_every_isa
def test_product(isa: str, k: int) -> None:
    """Bit for bit that chain, for every m and number of panels, which must not matter.

    The chain itself is as near to float64 as k + 1 roundings allow; each is by U of a sum that is
    never larger than that of the absolute values.
    """
    a, w, bias = product_operands(k)
    expected = {}
    for with_bias, start in ((True, bias), (False, np.zeros_like(bias))):
        expected[with_bias] = chain(a, w, start)
        matrix = w.transpose(1, 0, 2).reshape(k, -1).astype(np.float64)
        exact, size = a @ matrix + start, np.abs(a) @ np.abs(matrix) + np.abs(start)
        assert (np.abs(expected[with_bias] - exact) <= (k + 1) * U * size).all()
    for label, m, panels, with_bias, operation in product_cases(k):
        (got,) = operation(TABLES[isa], plain)
        assert (bits(got) == bits(expected[with_bias][:m, : panels * LANES])).all(), label


@on_every_isa
def test_product_goes_on_with_its_own_sums(isa: str) -> None:
    """With one row, the bias may be the output: cut in two, a chain gives the same bits."""
    for k, cut in ((2, 1), (257, 1), (257, 256), (768, 300)):
        a, w, bias = product_operands(k)
        panels = len(w)
        (expected,) = product(TABLES[isa], plain, a[:1], w, bias, 0)
        out = bias.copy()
        for start, stop in ((0, cut), (cut, k)):
            TABLES[isa].product(
                *(a[0, start:].ctypes.data, 0, 1, w[0, start:].ctypes.data, k * LANES, panels),
                *(stop - start, out.ctypes.data, out.ctypes.data, 0),
            )
        assert (bits(out) == bits(expected[0])).all()


@on_every_isa
def test_product_of_numbers_that_are_not_finite(isa: str) -> None:
    """They reach exactly the outputs that they belong to."""
    for bad in (NAN, INF, -INF):
        a, w, bias = product_operands(15)
        a[3, 7] = bad
        w[2, 5, 9] = bad
        (got,) = product(TABLES[isa], plain, a, w, bias, 0)
        hit = np.zeros(got.shape, bool)
        hit[3] = True
        hit[:, 2 * LANES + 9] = True
        assert (np.isfinite(got) == ~hit).all()


# Sums across lanes, and exp


def lane_sum(x: np.ndarray) -> np.float32:
    """In sixteen lanes, lane = index modulo 16, joined by those 8, 4, 2 and 1 apart."""
    lanes = np.zeros(LANES, np.float32)
    for row in np.append(x, np.zeros(-len(x) % LANES, np.float32)).reshape(-1, LANES):
        lanes = lanes + row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return np.float32(lanes[0])


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Errors in units of the distance between float32 numbers at the exact result."""
    distance = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 24, -149))
    return np.asarray(np.abs(got.astype(np.float64) - exact) / distance)


@on_every_isa
def test_exp(isa: str) -> None:
    """Found: 0.997 ulp, in four million numbers from -87 to 0."""
    (got,) = exp(TABLES[isa], plain, EXPONENTS)
    assert ulps(got, np.exp(EXPONENTS.astype(np.float64))).max() < 1.05
    for n in SIZES:
        x = -np.abs(normal(n, seed=n, scale=20))
        (got,) = exp(TABLES[isa], plain, x)
        assert ulps(got, np.exp(x.astype(np.float64))).max() < 1.05


@on_every_isa
def test_exp_at_the_ends(isa: str) -> None:
    """Below -87 it stays what it is there, so that no result is a denormal number."""
    (got,) = exp(TABLES[isa], plain, np.array([0, -0.0, -1e-45, -87, -87.1, -3e38, -INF, NAN]))
    assert (got[:3] == 1).all()
    assert (got[3:7] == got[3]).all()
    assert got[3] == pytest.approx(math.exp(-87), rel=2 * U)
    assert np.isnan(got[7])


def softmax_inputs() -> Iterator[tuple[np.ndarray, float]]:
    for n in SIZES:
        for scale in (1.0, 0.125, 0.7):
            yield normal(n, seed=n, scale=4 / scale), scale


@on_every_isa
def test_softmax(isa: str) -> None:
    """A score is rounded by up to U of it, which exp makes a relative error of the weight; found,
    in units of U: 2.6 + 1.36 (|score| + |maximum|), the sum's error and the division included."""
    for x, scale in softmax_inputs():
        (got,) = softmax(TABLES[isa], plain, x, scale)
        scores = x.astype(np.float64) * np.float32(scale)
        exact = np.exp(scores - scores.max())
        exact /= exact.sum()
        error = np.abs(got[: len(x)] / exact - 1)
        bound = 6 + len(x) / 16 + 2 * (np.abs(scores) + np.abs(scores.max()))
        assert (error <= bound * U).all()
        assert (got[len(x) :].view(np.int32) == 0).all()


@on_every_isa
def test_softmax_of_numbers_that_are_not_finite(isa: str) -> None:
    """What is not a number makes all weights so: no row of attention hides it."""
    for n in (1, 5, 16, 33):
        for place in {0, n // 2, n - 1}:
            x = normal(n, seed=n)
            for bad in (NAN, INF):
                x[place] = bad
                (weights,) = softmax(TABLES[isa], plain, x)
                assert np.isnan(weights[:n]).all()
            x[place] = -INF
            (weights,) = softmax(TABLES[isa], plain, x)
            assert np.isnan(weights[0]) if n == 1 else weights[place] < 2e-38


@on_every_isa
def test_softmax_of_huge_scores(isa: str) -> None:
    (weights,) = softmax(TABLES[isa], plain, np.array([1e38, -3e38, 1e38, 0], np.float32))
    assert weights[0] == weights[2] == 0.5
    assert (weights[[1, 3]] < 2e-38).all()


@on_every_isa
def test_log_sum(isa: str) -> None:
    """Every addition in a lane can round by U of the lane: n / 16 in all at worst. Found, in units
    of U: 3.3 up to n = 3072, and 93 for n = 50257."""
    for n in (*SIZES, 50257):
        for shift in (0.0, 1000.0, -1000.0):
            x = normal(n, seed=n, scale=5) + np.float32(shift)
            ((top, total),) = log_sum(TABLES[isa], plain, x)
            assert top == x.max()
            below = x - top  # float32, as there
            exact = np.exp(below.astype(np.float64)).sum()
            assert abs(total / exact - 1) < (4 + n / 400) * U
            filled = np.append(below, np.full(-n % LANES, -INF)).astype(np.float32)
            assert total == lane_sum(exp(TABLES[isa], plain, filled)[0])


# Layer norm


def exact_norm(x: np.ndarray, epsilon: float = 1e-5) -> tuple[np.ndarray, float]:
    """Before weight and bias, and how much it is magnified, in float64."""
    d = x.astype(np.float64) - x.astype(np.float64).mean()
    scale = 1 / math.sqrt(np.square(d).mean() + np.float32(epsilon))
    return d * scale, scale


@on_every_isa
def test_layer_norm(isa: str) -> None:
    """The deviation from the mean has the mean's own error, U of the largest x or so, and scale
    magnifies that. Found: 1.17 U of the sum of that term and the two of the result."""
    for n in SIZES[1:]:
        for mean in (0.0, 3.0, -50.0):
            x = normal(n, seed=n, scale=2) + np.float32(mean)
            weight, bias = normal(n, seed=n + 1), normal(n, seed=n + 2)
            (got,) = layer_norm(TABLES[isa], plain, x, weight, bias)
            normed, scale = exact_norm(x)
            terms = np.abs(weight) * (np.abs(normed) + np.abs(x).max() * scale) + np.abs(bias)
            assert (np.abs(got - (normed * weight + bias)) <= 1.5 * U * terms).all()


@on_every_isa
def test_layer_norm_without_a_deviation(isa: str) -> None:
    """One number, or all the same, of which the mean is exact: the bias is left."""
    for n in (1, 2, 8, 16, 64):
        bias = normal(n, seed=n)
        x = np.full(n, 3.25, np.float32)
        (got,) = layer_norm(TABLES[isa], plain, x, normal(n, seed=1), bias)
        assert (bits(got) == bits(bias)).all()


@on_every_isa
def test_layer_norm_of_numbers_that_are_not_finite(isa: str) -> None:
    for n in (1, 5, 16, 33):
        for bad in (NAN, INF, -INF):
            for place in {0, n // 2, n - 1}:
                x, ones = normal(n, seed=n), np.ones(n, np.float32)
                x[place] = bad
                (got,) = layer_norm(TABLES[isa], plain, x, ones, ones)
                assert np.isnan(got).all()


# Activations


def exact_activation(name: str, x: np.ndarray) -> np.ndarray:
    d = x.astype(np.float64)
    if name == "relu":
        return np.where(d > 0, d, 0)
    if name == "gelu":
        return np.asarray(d * np.vectorize(math.erfc, otypes=[float])(-d / math.sqrt(2)) / 2)
    with np.errstate(over="ignore"):
        return np.asarray(d / (1 + np.exp(-2 * inner(d))))


def inner(d: np.ndarray) -> np.ndarray:
    """What gelu_new takes the tanh of."""
    return math.sqrt(2 / math.pi) * (d + 0.044715 * d**3)


def check_activation(isa: str, name: str, x: np.ndarray, allowed: np.ndarray) -> None:
    """The error is within so many ulps, or within 1.7e-38 |x|: exp(-87), the least factor."""
    (got,) = activate(TABLES[isa], plain, name, x)
    exact = exact_activation(name, x)
    nothing = np.abs(got - exact) <= 1.7e-38 * np.abs(x.astype(np.float64))
    assert (nothing | (ulps(got, exact) <= allowed)).all()


@on_every_isa
def test_gelu(isa: str) -> None:
    """Found: 6.3 ulps, in ten times as many numbers."""
    for x in (DENSE, -DENSE, HUGE, -HUGE, TINY, -TINY, *(normal(n, seed=n) for n in SIZES)):
        check_activation(isa, "gelu", x, np.array(7.0))


@on_every_isa
def test_gelu_new(isa: str) -> None:
    """Found: 3.0 ulps above -1; below, exp makes the roundings of its argument, 2 |inner|, a
    relative error: 2.1 ulps for every 1 of it. Everywhere within 1.96 U of |x|.
    """
    for x in (DENSE, -DENSE, HUGE, -HUGE, TINY, -TINY, *(normal(n, seed=n) for n in SIZES)):
        argument = 2 * np.abs(inner(np.minimum(x.astype(np.float64), 0)))
        check_activation(isa, "gelu_new", x, 3.5 + 2.5 * argument)
        (got,) = activate(TABLES[isa], plain, "gelu_new", x)
        error = np.abs(got - exact_activation("gelu_new", x))
        assert (error <= np.maximum(2.2 * U * np.abs(x), 1.5e-45)).all()


@on_every_isa
def test_relu(isa: str) -> None:
    for x in (DENSE, -DENSE, HUGE, -HUGE, TINY, -TINY, *(normal(n, seed=n) for n in SIZES)):
        (got,) = activate(TABLES[isa], plain, "relu", x)
        assert (got == exact_activation("relu", x)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@on_every_isa
def test_activations_of_numbers_that_are_not_finite_and_of_zeros(isa: str, name: str) -> None:
    """NaN stays NaN, and no infinity becomes a number that hides it, but by relu's definition.
    Zeros stay zeros, with their signs, which are the same on every instruction set."""
    x = np.array([1, NAN, 2, INF, 3, -INF, 4, 0.0, 5, -0.0, 6], np.float32)
    (got,) = activate(TABLES[isa], plain, name, x)
    assert np.isnan(got[1])
    assert got[3] == INF
    assert got[5] == 0 if name == "relu" else not np.isfinite(got[5])
    assert (bits(got[[7, 9]]) == bits(x[[7, 9]])).all()
    (alone,) = activate(TABLES[isa], plain, name, x[::2].copy())
    assert (bits(got[::2]) == bits(alone)).all()


# The best token


@on_every_isa
def test_best(isa: str) -> None:
    """The first of the largest."""
    for n in (*SIZES, 50257):
        for seed in range(5):
            for x in (normal(n, seed=seed), -np.abs(normal(n, seed=seed)) - 1):
                assert best(TABLES[isa], plain, x)[0] == x.argmax()
            ties = np.random.default_rng(seed).integers(-2, 3, n).astype(np.float32)
            assert best(TABLES[isa], plain, ties)[0] == ties.argmax()
    for special in ([-0.0, 0.0], [0.0, -0.0], [-3.4e38, -3.3e38], [3.4e38, 3.4e38], [-1e-45, -1]):
        x = np.array(special, np.float32)
        assert best(TABLES[isa], plain, x)[0] == x.argmax()


@on_every_isa
def test_best_of_numbers_that_are_not_finite(isa: str) -> None:
    for n in (1, 2, 15, 16, 17, 65):
        for place in range(n):
            for bad in (NAN, INF, -INF):
                x = normal(n, seed=n)
                x[place] = bad
                assert best(TABLES[isa], plain, x)[0] == -1


# The logarithm


def exact_log(x: float) -> Decimal:
    with localcontext() as context:
        context.prec = 45
        return Decimal(x).ln()


def ulps_of_log(got: float, x: float) -> float:
    """The error in units of the distance between float64 numbers at the exact result."""
    exact = exact_log(x)
    return float(abs(Decimal(got) - exact) / Decimal(math.ulp(float(exact))))


def log_arguments() -> Iterator[float]:
    """Everywhere, near 1, near the change of the exponent, and as small as can be."""
    random = np.random.default_rng(1)
    yield from (math.ldexp(*pair) for pair in zip(random.uniform(0.5, 1, 400), range(-1073, 1023)))
    yield from np.exp(random.uniform(-40, 40, 1000)).tolist()
    yield from (1 + random.normal(0, 1e-3, 500)).tolist()
    yield from (1 + n * 2.0**-52 for n in range(1, 40))
    yield from (1 - n * 2.0**-53 for n in range(1, 40))
    yield from (math.sqrt(0.5) + n * 2.0**-53 for n in range(-20, 20))
    yield from (2.0**-53, 5e-324, 2.3e-308, 1.7976931348623157e308, 0.5, 2.0, math.e)


@on_every_isa
def test_log(isa: str) -> None:
    """Found: 0.77 ulp, in 36,000 numbers."""
    log = TABLES[isa].log
    assert max(ulps_of_log(log(x), x) for x in log_arguments()) < 0.9
    assert log(1.0) == 0
    assert all(log(x) == TABLES["portable"].log(x) for x in log_arguments())


@on_every_isa
def test_log_never_falls(isa: str) -> None:
    """A larger u must not have a smaller noise."""
    log = TABLES[isa].log
    for start in (2.0**-53, 0.1, 0.5, math.sqrt(0.5), 0.9, 1 - 2.0**-44):
        values = [log(start + n * math.ulp(start)) for n in range(-200, 200)]
        assert values == sorted(values)


# Choices and log-probabilities


class Chooser:
    """A pass of a model that has a vocabulary and no weights: nothing reads them here."""

    def __init__(self, vocab_size: int, isa: str) -> None:
        config = Config(vocab_size, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1e-5)
        offsets = (ctypes.c_int64 * 100)()
        self.vocab_size = vocab_size
        self.model = LIBRARY.tg_model_new(ctypes.byref(config), None, offsets, isa.encode(), 1)
        self.scratch = LIBRARY.tg_pass_new(self.model)
        assert self.scratch

    def __del__(self) -> None:
        LIBRARY.tg_pass_free(self.scratch)
        LIBRARY.tg_model_free(self.model)

    def choose(self, logits: np.ndarray, how: How) -> tuple[int, int]:
        """The status and the token."""
        token = I32(-7)
        options = how.structure()
        place = ctypes.addressof(options)
        status = LIBRARY.tg_choose(self.scratch, logits.ctypes.data, place, ctypes.addressof(token))
        return status, token.value

    def log_probability(self, logits: np.ndarray, token: int) -> tuple[int, float]:
        value = DOUBLE(math.nan)
        status = LIBRARY.tg_log_probability(
            self.scratch, logits.ctypes.data, token, ctypes.addressof(value)
        )
        return status, value.value

    def top(self, logits: np.ndarray, n: int) -> tuple[int, list[int], list[float]]:
        tokens, values = np.full(n, -7, np.int32), np.full(n, NAN)
        status = LIBRARY.tg_top(
            self.scratch, logits.ctypes.data, n, tokens.ctypes.data, values.ctypes.data
        )
        return status, tokens.tolist(), values.tolist()


class How(NamedTuple):
    """How to choose."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    bias: Optional[dict[int, float]] = None
    seen: Sequence[int] = ()
    seed: int = 0
    position: int = 0

    def structure(self) -> Settings:
        bias = self.bias or {}
        values = np.array(list(bias.values()), np.float64)
        tokens = np.array(list(bias), np.int32)
        seen = np.array(self.seen, np.int32)
        made = Settings(
            *(self.temperature, self.top_p, self.min_p, self.repetition_penalty),
            *(self.seed % 2**64, self.position),
            *(values.ctypes.data, tokens.ctypes.data, seen.ctypes.data, None),
            *(self.top_k, len(bias), len(seen)),
        )
        made.kept = (values, tokens, seen)
        return made


# The same in Python, step by step as the design says


GAMMA = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def mix(z: int) -> int:
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


@functools.cache
def noise(seed: int, position: int, size: int) -> np.ndarray:
    key = mix((mix((seed + GAMMA) & MASK) + (position + 1) * GAMMA) & MASK)
    hashes = [mix((key + (token + 1) * GAMMA) & MASK) for token in range(size)]
    u = [((h >> 12) + 0.5) * 2.0**-52 for h in hashes]
    return np.array([-math.log(-math.log(x)) for x in u])


def adjusted(logits: np.ndarray, how: How) -> np.ndarray:
    scores = logits.astype(np.float64)
    for token, bias in (how.bias or {}).items():
        scores[token] += bias
    for token in how.seen:
        s = scores[token]
        scores[token] = s * how.repetition_penalty if s < 0 else s / how.repetition_penalty
    return scores


def kept_tokens(scores: np.ndarray, how: How) -> np.ndarray:
    tokens = np.flatnonzero(scores > -INF)
    tokens = tokens[np.argsort(-scores[tokens], kind="stable")]
    if 0 < how.top_k < len(tokens):
        tokens = tokens[scores[tokens] >= scores[tokens][how.top_k - 1]]
    p = np.exp(scores[tokens])
    p /= p.sum()
    before = np.cumsum(p) - p
    if how.top_p < 1:
        tokens = tokens[: max(1, int((before < how.top_p).sum()))]
    kept: np.ndarray = tokens[p[: len(tokens)] >= how.min_p * p[0]]
    return kept


def keys_of(logits: np.ndarray, how: How) -> np.ndarray:
    """The key of each token; -infinity for those that are not kept."""
    scores = adjusted(logits, how)
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / how.temperature
    kept = kept_tokens(scores, how)
    keys = np.full(len(scores), -INF)
    keys[kept] = scores[kept] + noise(how.seed % 2**64, how.position, len(scores))[kept]
    return keys


NEAR = 1e-5  # a few thousand float32 weights, each within U, move no boundary further


def may_be_chosen(token: int, logits: np.ndarray, how: How) -> bool:
    """Whether a filter's boundary is so near that rounding may decide."""
    return any(
        keys_of(logits, how._replace(top_p=how.top_p * (1 + p), min_p=how.min_p * (1 + m))).argmax()
        == token
        for p, m in itertools.product((-NEAR, 0, NEAR), repeat=2)
    )


def settings(size: int) -> list[How]:
    """Every option of the choice, alone and with others."""
    last = size - 1
    bias = {last: 3.0, **({0: -INF, last // 2: -2.5} if size > 2 else {})}
    seen = range(0, size, 3)
    everything = How(0.9, 100, 0.95, 0.01)
    return [
        How(),
        *(How(temperature=t) for t in (1e-300, 0.01, 0.5, 20.0, 1e6)),
        *(How(top_k=k) for k in (1, 2, 3, 64, size - 1, size, size + 1)),
        *(How(top_p=p) for p in (0.0, 1e-9, 0.1, 0.5, 0.9, 0.999)),
        *(How(min_p=p) for p in (1e-6, 0.05, 0.5, 1.0)),
        *(How(repetition_penalty=p, seen=seen) for p in (0.3, 1.3, 10.0)),
        How(bias=bias),
        How(bias={0: 1e30}),
        How(bias={0: -1e30}),
        How(top_k=5, top_p=0.6, bias=bias),
        everything._replace(repetition_penalty=1.2, seen=seen),
        everything._replace(repetition_penalty=1.2, seen=seen, bias=bias),
    ]


def logits_of(size: int) -> Sequence[np.ndarray]:
    """With and without ties, flat and steep."""
    ties = np.random.default_rng(size).integers(-3, 4, size).astype(np.float32)
    flat, steep = normal(size, seed=size, scale=0.1), normal(size, seed=size, scale=60)
    return normal(size, seed=size, scale=3), ties, np.zeros(size, np.float32), flat, steep


@pytest.mark.parametrize("size", [1, 2, 3, 300, 4096])
@on_every_isa
@pytest.mark.slow
def test_choices_are_those_of_the_formulas(isa: str, size: int) -> None:
    chooser = Chooser(size, isa)
    drawn = decided = 0
    for i, logits in enumerate(logits_of(size)):
        for base in settings(size):
            for seed in (0, 1, 2, -1, 2**63, 2**64 - 1):
                how = base._replace(seed=seed, position=i)
                status, token = chooser.choose(logits, how)
                assert status == DONE
                drawn += 1
                if token != keys_of(logits, how).argmax():
                    decided += 1
                    assert may_be_chosen(token, logits, how), (i, how)
    assert decided <= 0.005 * drawn  # where top_p = 0.5 falls between equals


@on_every_isa
def test_choices_over_many_places(isa: str) -> None:
    """Every seed and position, of a large vocabulary, without a filter: exactly the largest key."""
    size = 2000
    chooser = Chooser(size, isa)
    for logits in logits_of(size)[:4]:
        for seed in range(5):
            for position in (0, 1, 2, 1023, 2**40):
                how = How(seed=seed, position=position)
                assert chooser.choose(logits, how) == (DONE, int(keys_of(logits, how).argmax()))


@on_every_isa
def test_temperatures_whose_inverse_is_infinite(isa: str) -> None:
    """Scores that differ by as little as the temperature are still drawn, in any order."""
    size = 300
    chooser = Chooser(size, isa)
    logits = np.zeros(size, np.float32)
    for temperature, position in itertools.product((1e-310, 5e-324), range(20)):
        for raised in (range(0, size, 2), range(size // 2), range(size // 2, size)):
            bias = dict.fromkeys(raised, temperature)
            how = How(temperature, bias=bias, position=position)
            assert chooser.choose(logits, how) == (DONE, int(keys_of(logits, how).argmax()))


@on_every_isa
def test_top_p_at_its_boundary(isa: str) -> None:
    """Of four equal tokens, the first two hold one half exactly: the third is not needed."""
    chooser = Chooser(4, isa)
    logits = np.zeros(4, np.float32)
    for top_p, expected in ((0.0, {0}), (0.25, {0}), (0.5, {0, 1}), (0.51, {0, 1, 2})):
        chosen = {chooser.choose(logits, How(top_p=top_p, seed=seed))[1] for seed in range(60)}
        assert chosen == expected


@on_every_isa
def test_the_best_token(isa: str) -> None:
    """Temperature 0: the largest score, and of equals the lower token."""
    for size in (1, 2, 300):
        chooser = Chooser(size, isa)
        last = size - 1
        for logits in logits_of(size):
            for how in (
                How(),
                How(bias={last: 3.0, 0: -2.0}) if size > 1 else How(bias={0: 1.0}),
                How(repetition_penalty=3.0, seen=range(0, size, 2)),
                How(repetition_penalty=0.2, seen=range(size)),
            ):
                expected = int(adjusted(logits, how).argmax())
                assert chooser.choose(logits, how._replace(temperature=0)) == (DONE, expected)


@on_every_isa
def test_a_bias_against_every_token(isa: str) -> None:
    chooser = Chooser(3, isa)
    logits = np.zeros(3, np.float32)
    for temperature in (0, 1):
        how = How(temperature=temperature, bias=dict.fromkeys(range(3), -INF))
        assert chooser.choose(logits, how) == (DONE, NO_TOKEN)
        but_one = how._replace(bias=dict.fromkeys((0, 2), -INF))
        assert chooser.choose(logits, but_one) == (DONE, 1)


@on_every_isa
def test_log_probabilities(isa: str) -> None:
    """The sum's error, some U, is that of its logarithm; all else is float64."""
    for size in (1, 2, 17, 300, 4096):
        chooser = Chooser(size, isa)
        for logits in logits_of(size):
            exact = logits.astype(np.float64) - logits.max()
            exact -= np.log(np.exp(exact).sum())
            for token in {0, size // 2, size - 1, int(logits.argmin()), int(logits.argmax())}:
                status, value = chooser.log_probability(logits, token)
                assert status == DONE
                assert value == pytest.approx(exact[token], rel=1e-7, abs=(4 + size / 100) * U)


@on_every_isa
def test_the_top(isa: str) -> None:
    for size in (1, 2, 17, 300, 4096):
        chooser = Chooser(size, isa)
        for logits in logits_of(size):
            order = np.argsort(-logits, kind="stable")
            for n in {1, min(size, 5), size}:
                status, tokens, values = chooser.top(logits, n)
                assert status == DONE
                assert tokens == order[:n].tolist()
                assert values[0] == chooser.log_probability(logits, tokens[0])[1]
                assert values[-1] == chooser.log_probability(logits, tokens[-1])[1]


@on_every_isa
def test_choices_from_logits_that_are_not_finite(isa: str) -> None:
    chooser = Chooser(40, isa)
    for bad in (NAN, -NAN, INF, -INF):
        for place in (0, 17, 39):
            logits = normal(40, seed=1)
            logits[place] = bad
            assert chooser.choose(logits, How(temperature=0))[0] == NOT_FINITE
            assert chooser.choose(logits, How(bias={place: -INF}))[0] == NOT_FINITE
            assert chooser.log_probability(logits, 3)[0] == NOT_FINITE
            assert chooser.top(logits, 3)[0] == NOT_FINITE


# Logits


@pytest.fixture(params=TABLES)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TINYGPT2_ISA", request.param)
    return str(request.param)


def load_c(path: Path) -> tinygpt2.Model:
    return tinygpt2.load(path, backend="c", threads=1)


def test_logits(isa: str, toy_path: Path) -> None:
    """More rows than a pass holds at a time, near to NumPy."""
    tokens = np.random.default_rng(2).integers(TOY["vocab_size"], size=60).tolist()
    with load_c(toy_path) as model, tinygpt2.load(toy_path, backend="numpy") as other:
        got, expected = np.asarray(model.logits(tokens)), np.asarray(other.logits(tokens))
    assert got.shape == (60, TOY["vocab_size"])
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


# Of the logits below; it may change with the default model, or as LOGITS of test_native.py may.
TALES_HASH = "7ca841f741bcb23d"


def test_logits_of_the_default_model(isa: str) -> None:
    """The same bits on every machine."""
    with load_c(ROOT / "vendor" / "tales.tg2") as model:
        logits = np.ascontiguousarray(model.logits(list(range(0, 1000, 40))), "<f4")
    assert hashlib.sha256(logits.tobytes()).hexdigest()[:16] == TALES_HASH
