"""What the tests share: where the test data is, small random checkpoints made on the spot, and
build.py with the compilers that are there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# The products of small models are small. With several threads OpenBLAS took 28 times as long for
# them on a shared machine. It reads this once, when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

import tinygpt2

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
DTYPES = {
    "<f4": "F32",
    "<f2": "F16",
    "<u2": "BF16",
    "<u4": "U32",
    "<i4": "I32",
    "<u8": "U64",
    "|u1": "U8",
    "|i1": "I8",
    "|b1": "BOOL",
}


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterable[None]:
    """What the tests write need not outlast a power cut, and a busy disk takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Path]:
    """An empty folder. pytest's own takes longer than most tests that use it: it numbers the
    folders, looks through them all for the next number, and keeps them."""
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        yield Path(folder)


class Late:
    """A library that is imported on first use, so that fast tests do not wait for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        library = pytest.importorskip(self.name, reason="compares with transformers")
        return getattr(library, attribute)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of test data; tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"needs the project's test data in {DATA}")
    return DATA


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """A writer of the tests' own, so that nothing is checked against itself. u2 is BF16."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, array in tensors.items():
        stop = offset + array.nbytes
        header[name] = {
            "dtype": DTYPES[array.dtype.newbyteorder("<").str],
            "shape": list(array.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """A reader of the tests' own: the metadata and the tensors, without a check."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    codes = {name: code for code, name in DTYPES.items()}
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        numbers = np.frombuffer(content[start + first : start + last], codes[entry["dtype"]])
        tensors[name] = numbers.reshape(entry["shape"])
    return metadata, tensors


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that imports the module from the same place."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    place = os.path.dirname(tinygpt2.__file__)
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)


def in_threads(work: Iterable[Callable[[], object]], seconds: float = 60) -> None:
    """Call these at the same time, each in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=item, daemon=True) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive()


def untimed(result: Any) -> Any:
    """A result, or several, without what they took, which differs from run to run."""
    return [untimed(r) for r in result] if type(result) is list else result._replace(timings=None)


def largest(array: np.ndarray) -> float:
    """The largest magnitude."""
    return float(np.abs(array).max())


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights with the hub's names and orientations, wide enough to tell tokens apart."""
    random = np.random.default_rng(seed)
    n_embd, vocab_size = config["n_embd"], config["vocab_size"]
    n_inner = config.get("n_inner") or 4 * n_embd

    def draw(*shape: int, scale: float = 0.2, mean: float = 0.0) -> np.ndarray:
        return (mean + scale * random.standard_normal(shape)).astype(np.float32)

    weights = {
        "wte.weight": draw(vocab_size, n_embd),
        "wpe.weight": draw(config["n_positions"], n_embd),
    }
    for i in range(config["n_layer"]):
        for name, shape in {
            "attn.c_attn": (n_embd, 3 * n_embd),
            "attn.c_proj": (n_embd, n_embd),
            "mlp.c_fc": (n_embd, n_inner),
            "mlp.c_proj": (n_inner, n_embd),
        }.items():
            weights[f"h.{i}.{name}.weight"] = draw(*shape)
            weights[f"h.{i}.{name}.bias"] = draw(shape[1])
        for name in ("ln_1", "ln_2"):
            weights[f"h.{i}.{name}.weight"] = draw(n_embd, mean=1.0)
            weights[f"h.{i}.{name}.bias"] = draw(n_embd)
    weights["ln_f.weight"], weights["ln_f.bias"] = draw(n_embd, mean=1.0), draw(n_embd)
    if not config.get("tie_word_embeddings", True):
        weights["lm_head.weight"] = draw(vocab_size, n_embd)
    return weights


class Shape(NamedTuple):
    """Sizes of a model; `seed` is one for which the best token of its greedy text is always ahead,
    see MARGIN in test_model.py."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    seed: int
    options: dict[str, Any]

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = dict(zip(self._fields[:6], self[:6]))
        return {**config, "bos_token_id": None, "eos_token_id": None, **self.options}


RELU = {"activation_function": "relu"}
GELU = {"activation_function": "gelu"}
UNTIED = {"tie_word_embeddings": False}
UNSCALED = {"scale_attn_weights": False}
BY_LAYER = {"scale_attn_by_inverse_layer_idx": True}
# Ten shapes: sizes that fill no panel, and every switch of the configuration on and off.
SHAPES = [
    Shape(3, 210, 2, 1, 1, 3, 0, {**RELU}),
    Shape(11, 212, 6, 2, 6, 7, 15, {}),
    Shape(257, 216, 20, 2, 4, 80, 1, {**GELU, **UNTIED}),
    Shape(100, 224, 33, 2, 3, 45, 3, {**UNTIED, **UNSCALED}),
    Shape(300, 256, 32, 3, 4, 128, 1, {**BY_LAYER}),
    Shape(257, 210, 48, 2, 3, 101, 23, {**RELU, **UNTIED, **UNSCALED, **BY_LAYER}),
    Shape(17, 230, 40, 3, 5, 1, 4, {**GELU, **UNSCALED}),
    Shape(64, 211, 16, 4, 2, 65, 4, {**UNTIED, **BY_LAYER}),
    Shape(1000, 300, 64, 1, 1, 255, 1, {**GELU, "layer_norm_epsilon": 1e-2}),
    Shape(31, 257, 35, 2, 7, 33, 1, {**RELU}),
]


TOY = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
END = "<|endoftext|>"


def toy_tokenizer(
    merges: Iterable[str] = ("t h", "h e", "th e", "Ġ the", "Ġ a", "i n", "in g", "Ã ©"),
) -> tuple[dict[str, int], list[str]]:
    """vocab.json and merges.txt of a tiny byte-level BPE: 256 bytes, a few merges, end-of-text."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    lines = list(merges)
    words = [*letters, *(line.replace(" ", "") for line in lines), END]
    return {word: i for i, word in enumerate(words)}, lines


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    tokenizer: bool = True,
    seed: int = 0,
) -> Path:
    """A checkpoint folder as transformers writes it: config.json, model.safetensors, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "gpt2",
        **TOY,
        "bos_token_id": 264,
        "eos_token_id": 264,
        **(config or {}),
    }
    weights = random_weights(config, seed) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    if tokenizer:
        vocab, lines = toy_tokenizer()
        (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tg2 file of a small random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("toy")
    out = folder / "toy.tg2"
    tinygpt2.convert(write_checkpoint(folder / "checkpoint"), out)
    return out


def model_of_logits(folder: Path, logits: np.ndarray) -> Path:
    """A .tg2 file that gives these logits, exactly, whatever the tokens are: its last layer norm
    makes (1, 0) of everything, and its head is (logits, 0)."""
    config = {"vocab_size": len(logits), "n_positions": 4, "n_embd": 2, "n_layer": 1, "n_head": 1}
    config |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
    weights = random_weights(config)
    weights["ln_f.weight"][:] = 0
    weights["ln_f.bias"][:] = [1, 0]
    weights["lm_head.weight"][:] = np.stack((logits, np.zeros_like(logits)), axis=1)
    source = write_checkpoint(folder / "m", config, weights, tokenizer=False)
    tinygpt2.convert(source, folder / "m.tg2")
    return folder / "m.tg2"


@pytest.fixture(scope="session")
def big_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that a processor has to work for, 19 million numbers."""
    folder = tmp_path_factory.mktemp("big")
    config = {"n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 1024}
    tinygpt2.convert(write_checkpoint(folder, config), folder / "big.tg2")
    return folder / "big.tg2"


# What every machine must give for the default model: its checksum, and the SHA-256 of the logits
# after each token of the prompt, little-endian. A new default model needs a new one; a change of
# kernels.c never does.
TALES_CHECKSUM = "aa0cf8a1"
TALES_PROMPT = (
    "Once upon a time there was a little fox who lived in the wood and was afraid of nothing."
)
TALES_SHA256 = "c122550ac5697e51afcb579675a0131057125af2df547f5e2f9aea17af7bcaca"


@pytest.fixture(scope="session")
def tales_path() -> Path:
    """The default model."""
    return ROOT / "vendor" / "tales.tg2"


@pytest.fixture(scope="session")
def toy(toy_path: Path) -> Iterable[tinygpt2.Model]:
    """That file, open for all tests."""
    with tinygpt2.load(toy_path) as model:
        yield model


@pytest.fixture(scope="session")
def gpt2_tokenizer_path(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tg2 file with GPT-2's vocabulary of 50,257 tokens, and hardly a model."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = {"vocab_size": 50257, "n_positions": 8, "n_embd": 2, "n_layer": 1, "n_head": 1}
    config |= {"bos_token_id": 50256, "eos_token_id": 50256}
    write_checkpoint(folder, config, tokenizer=False)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((data / "gpt2-vocab" / name).read_bytes())
    tinygpt2.convert(folder, folder / "gpt2.tg2")
    return folder / "gpt2.tg2"


@pytest.fixture(scope="session")
def gpt2(gpt2_tokenizer_path: Path) -> Iterable[tinygpt2.Model]:
    """That file, open."""
    with tinygpt2.load(gpt2_tokenizer_path) as model:
        yield model


@pytest.fixture(scope="session")
def tiktoken_gpt2(data: Path) -> Any:
    """tiktoken's GPT-2, built from the test data: nothing is downloaded."""
    tiktoken = pytest.importorskip("tiktoken", reason="compares with tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = data / "gpt2-vocab"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(folder / "merges.txt"), str(folder / "vocab.json")
        )
    pattern = importlib.import_module("tiktoken_ext.openai_public").r50k_pat_str
    return tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 50256}
    )


@pytest.fixture(scope="session")
def transformers_gpt2(data: Path) -> Any:
    """The tokenizer of transformers for GPT-2, from the test data."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    return transformers.GPT2TokenizerFast.from_pretrained(data / "gpt2-vocab")


# build.py, and running what it makes

VARIABLES = ("CC", "CFLAGS", "LDFLAGS", "TINYGPT2_PURE", "TINYGPT2_ISA")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in VARIABLES}


def load_build() -> Any:
    """By its path: `import build` might be another package of that name."""
    spec = importlib.util.spec_from_file_location("tinygpt2_build", ROOT / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(command: list[object], environ: Mapping[str, str], cwd: Path | None = None) -> Result:
    done = subprocess.run(
        list(map(str, command)),
        env={**ENVIRONMENT, **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def is_there(compiler: str) -> bool:
    if compiler == "ziglang":
        return importlib.util.find_spec("ziglang") is not None
    return shutil.which(compiler) is not None


def sanitizing_compiler(flag: str, folder: Path) -> str:
    """One that is there, with its library for that: clang's, if there, as they see more."""
    (folder / "empty.c").write_text("int main(void) { return 0; }\n", "utf-8")
    for compiler in filter(is_there, ("clang", "gcc")):
        if run([compiler, flag, "empty.c", "-o", "empty"], {}, folder).code == 0:
            return compiler
    pytest.skip(f"needs clang or gcc with the library of {flag}")


def needs(compiler: str) -> Any:
    return pytest.param(
        compiler, marks=pytest.mark.skipif(not is_there(compiler), reason=f"needs {compiler}")
    )


def slow(*values: Any) -> list[Any]:
    """Parameters of slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


needs_cc = pytest.mark.skipif(not is_there("cc"), reason="needs a C compiler called cc")


# The tiers of tests: pyproject.toml says what `slow` and `soak` mean


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A soak test counts as slow, so that `-m "not slow"` leaves it out. Of a table of many cases
    of one kind, every fifth is in the fast lane."""
    cases: dict[Any, int] = {}
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker("slow")
        if item.get_closest_marker("table"):
            function = getattr(item, "function", None)
            cases[function] = cases.get(function, -1) + 1
            if cases[function] % 5:
                item.add_marker("slow")
