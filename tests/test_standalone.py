"""The command that `python build.py --standalone` makes: it prints byte for byte what the Python
program prints, and whatever is wrong with a file, one line that says so."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_file
from conftest import ENVIRONMENT, build, needs, sanitizing_compiler, write_checkpoint
from test_file import SMALL, pack, pack_aligned, unpack, write_changed, write_config

import tinygpt2
from tinygpt2 import Model

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the command is for POSIX"),
    pytest.mark.skipif(
        tinygpt2.library_path() is None,
        reason="compares with the kernels in Python: `python build.py` makes them",
    ),
]
ISAS = ("avx512", "avx2", "neon", "portable")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g1"]
# What the program holds when it ends is no leak. Memory that cannot be had is its own affair.
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}


class Result(NamedTuple):
    code: int  # -11 after a segmentation fault, 1 or so after a sanitizer's report
    out: bytes
    err: str


class Command:
    """The program. What it is called with may be anything that has a text."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def line(self, *arguments: object) -> list[str]:
        return [str(self.path), *map(str, arguments)]

    def __call__(self, *arguments: object, **environ: str) -> Result:
        done = subprocess.run(
            self.line(*arguments),
            env={**ENVIRONMENT, **SANITIZER_OPTIONS, "TINYGPT2_THREADS": "1", **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        return Result(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))

    def generate(self, path: Path, ids: list[int], *arguments: object, **environ: str) -> Result:
        return self(path, "--ids", " ".join(map(str, ids)), *arguments, **environ)

    def error(self, code: int, *arguments: object, **environ: str) -> str:
        """The one line that it says where it refuses."""
        result = self(*arguments, **environ)
        assert (result.code, result.out) == (code, b""), result
        assert result.err.startswith("tinygpt2: error: ")
        assert result.err.endswith("\n")
        message = result.err[len("tinygpt2: error: ") : -1]
        assert message.isprintable()
        assert len(message) < 1500
        return message


def make(folder: Path, flags: Sequence[str] = (), compiler: str = "") -> Command:
    """Compile it, without what the user has in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CC", "CFLAGS", "LDFLAGS"):
            patch.delenv(name, raising=False)
        if compiler:
            patch.setenv("CC", compiler)
        try:
            found = build.find_compiler()
        except build.BuildError:
            pytest.skip("needs a C compiler")
        return Command(build.build_kernels(found, folder, flags, standalone=True))


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return make(tmp_path_factory.mktemp("standalone"))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The same with every access to memory and all arithmetic watched."""
    folder = tmp_path_factory.mktemp("sanitized")
    return make(folder, SANITIZE, sanitizing_compiler(SANITIZE[0], folder))


@pytest.fixture(params=["plain", "sanitized"])
def either(request: pytest.FixtureRequest) -> Command:
    found: Command = request.getfixturevalue("command" if request.param == "plain" else "sanitized")
    return found


@pytest.mark.parametrize("compiler", [needs("gcc"), needs("clang")])
def test_no_warnings(tmp_path: Path, capfd: pytest.CaptureFixture[str], compiler: str) -> None:
    make(tmp_path, ["-Wall", "-Wextra"], compiler)
    assert capfd.readouterr() == ("", "")


# The same output


def expected(model: Model, ids: Sequence[int], text: bool, options: Mapping[str, Any]) -> Result:
    """What the Python program prints, from the functions that it is made of."""
    with model.session() as session:
        events = session.events(text, dict(options))
        session.feed(ids)
        if text:
            out = "".join(piece for _, piece in events)
        else:
            out = "".join(f"{token} " for token, _ in events if token is not None)
        err = ""
        if session.finish_reason == "context":
            room = model.config.n_positions
            err = f"tinygpt2: stopped: all {room} positions of the context are used\n"
        return Result(0, f"{out}\n".encode(), err)


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    flags = [(tinygpt2.flag_of(name), str(value)) for name, value in options.items()]
    return [part for flag in flags for part in flag]


def check_same(command: Command, model: Model, path: Path, ids: list[int], **options: Any) -> None:
    """As ids, and where there are texts, as text."""
    arguments = arguments_of(options)
    found = command.generate(path, ids, *arguments, "--print-ids")
    assert found == expected(model, ids, False, options), options
    if model.tokenizer:
        found = command.generate(path, ids, *arguments)
        assert found == expected(model, ids, True, options), options


NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
SHAPES: dict[str, tuple[bool, dict[str, Any]]] = {  # whether with a tokenizer, and the changes
    "toy": (True, {}),
    "small": (True, SMALL),
    "untied, exact GELU": (
        False,
        {"vocab_size": 257, "n_embd": 33, "n_head": 3, "n_inner": 45, "n_layer": 3}
        | {"activation_function": "gelu", "tie_word_embeddings": False, **NO_ENDS},
    ),
    "ReLU, other scales": (
        True,
        {"activation_function": "relu", "scale_attn_weights": False, "n_inner": 17}
        | {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 9.999999747378752e-06},
    ),
    "hardly a model": (
        False,
        {"vocab_size": 3, "n_embd": 2, "n_head": 1, "n_layer": 1, "n_positions": 5, "n_inner": 3}
        | NO_ENDS,
    ),
    "head size 1": (False, {"vocab_size": 16, "n_embd": 4, "n_positions": 90, **NO_ENDS}),
}
CHECKPOINTS = ("mingpt-adder", "llm-viz-sort", "ort-genai-tiny-random", "lm-buddy-fake-gpt2")
TALES = "the default model"


class Example(NamedTuple):
    path: Path
    model: Model


@pytest.fixture(scope="module", params=[*SHAPES, *CHECKPOINTS, TALES])
def example(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Example]:
    name, folder = request.param, tmp_path_factory.mktemp("example")
    path = folder / "a model.tg2"
    if name in SHAPES:
        tokenizer, changes = SHAPES[name]
        tinygpt2.convert(write_checkpoint(folder, changes, tokenizer=tokenizer), path)
    elif name in CHECKPOINTS:
        tinygpt2.convert(request.getfixturevalue("data") / "checkpoints" / name, path)
    else:
        path = Path(tinygpt2.default_model())
    with tinygpt2.load(path, backend="c", threads=1) as model:
        yield Example(path, model)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "seed": 3, "top_k": 2, "max_new_tokens": 20},
    {"seed": 1},
    {"seed": -1, "max_new_tokens": 20},
    {"seed": 2**64 - 1, "max_new_tokens": 20},
    {"seed": 10**30 + 7, "temperature": 2.5, "top_k": 0, "max_new_tokens": 30},
    {"seed": -(10**25), "temperature": 1e6, "top_k": 10**12, "max_new_tokens": 30},
    {"seed": 5, "temperature": 1e-300, "top_k": 1, "max_new_tokens": 5},
    {"seed": 6, "temperature": 0.01, "max_new_tokens": 1},
    {"seed": 7, "max_new_tokens": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output(command: Command, example: Example, options: dict[str, Any]) -> None:
    size, room = example.model.config.vocab_size, example.model.config.n_positions
    for length in (1, room // 2):
        ids = np.random.default_rng(length).integers(size, size=length).tolist()
        if room > 100:
            options = {"max_new_tokens": 60, **options}
        check_same(command, example.model, example.path, ids, **options)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_and_number_of_threads(
    command: Command, isa: str, example: Example
) -> None:
    """A prompt longer than a chunk of the portable kernels."""
    library = tinygpt2.load_library(tinygpt2.library_path() or "")
    size, room = example.model.config.vocab_size, example.model.config.n_positions
    ids = (
        np.random.default_rng(0)
        .integers(size, size=min(100 if isa == "portable" else 300, room - 1))
        .tolist()
    )
    line = ("--max-tokens", 9, "--seed", 4, "--print-ids")
    if library.tg_isa_name(isa.encode()) is None:
        message = command.error(2, example.path, "--ids", "1", TINYGPT2_ISA=isa)
        assert message.startswith("TINYGPT2_ISA: ")
        return
    answer = expected(example.model, ids, False, {"max_new_tokens": 9, "seed": 4})
    for threads in (1, 2, 3):
        found = command.generate(example.path, ids, *line, "--threads", threads, TINYGPT2_ISA=isa)
        assert found == answer
    found = command.generate(example.path, ids, *line, TINYGPT2_ISA=isa, TINYGPT2_THREADS="2")
    assert found == answer


def test_the_python_program_itself(
    command: Command, toy_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """What `expected` stands for, and the defaults of both."""
    for line in (
        ["--ids", "72, 101 108,108\t111\n", "--seed", "11"],
        ["--ids", "5", "--seed", "12", "--temperature", ".9e0", "--top-k", "7", "--threads", "2"],
        ["--ids", "5", "--temperature", "0", "--max-tokens", "300"],
        ["--ids", "1 300"],
        ["--ids", "1 two"],
        ["--ids", "7 " * 65],
        ["--ids", "7", "--temperature", "-1"],
        ["--ids", "7", "--top-k", "1.5"],
    ):
        code = tinygpt2.main(["--model", str(toy_path), *line])
        out, err = capfdbinary.readouterr()
        found = command(toy_path, *line, "--print-ids")
        assert (found.code, found.out) == (code, out), line
        assert bool(found.err) == bool(err), line
        assert code == 0 or found.err.startswith("tinygpt2: error: ")


def test_default_number_of_tokens(command: Command) -> None:
    path = tinygpt2.default_model()
    with tinygpt2.load(path, backend="c", threads=1) as model:
        check_same(command, model, Path(path), [17, 4], seed=8)
        assert len(command(path, "--ids", "17 4", "--seed", 8, "--print-ids").out.split()) == 200


def test_without_a_seed_every_answer_is_another(command: Command, toy_path: Path) -> None:
    answers = {command.generate(toy_path, [1], "--print-ids").out for _ in range(5)}
    assert len(answers) == 5


@pytest.mark.parametrize("ids", ["", " ", ",\n"])
@pytest.mark.parametrize(
    "ends", [(264, 264), (3, None), (None, 264), (5, 264), (None, None)], ids=str
)
def test_empty_prompt(
    command: Command, tmp_path: Path, ends: tuple[int | None, int | None], ids: str
) -> None:
    """It starts from end-of-text; (bos_token_id, eos_token_id)."""
    path = tmp_path / "m.tg2"
    config = dict(zip(("bos_token_id", "eos_token_id"), ends))
    tinygpt2.convert(write_checkpoint(tmp_path, config), path)
    if ends == (None, None):
        assert command.error(2, path, "--ids", ids).startswith("--ids: ")
        return
    with tinygpt2.load(path, backend="c", threads=1) as model:
        answer = expected(model, [], True, {"seed": 2})
    assert command(path, "--ids", ids, "--seed", 2) == answer


@pytest.mark.parametrize("after", [0, 1, 5])
def test_end_of_text(command: Command, toy_path: Path, tmp_path: Path, after: int) -> None:
    """A model that says it after some tokens: it is not printed, and nothing follows."""
    with tinygpt2.load(toy_path, backend="c", threads=1) as model:
        ids = model.generate_ids([9, 8, 7], seed=3)
    position = ids.index(ids[after])
    path = tmp_path / "m.tg2"
    write_config(toy_path, path, "eos_token_id", ids[after])
    found = command.generate(path, [9, 8, 7], "--seed", 3, "--print-ids")
    assert found == Result(0, "".join(f"{i} " for i in ids[:position]).encode() + b"\n", "")
    with tinygpt2.load(path, backend="c", threads=1) as model:
        check_same(command, model, path, [9, 8, 7], seed=3)


@pytest.mark.parametrize("length", [62, 63, 64])
@pytest.mark.parametrize("most", [0, 1, 2, 3, 4, 200])
def test_full_context(command: Command, toy: Model, toy_path: Path, length: int, most: int) -> None:
    ids = [(11 * i) % 300 for i in range(length)]
    check_same(command, toy, toy_path, ids, max_new_tokens=most, seed=1)
    found = command.generate(toy_path, ids, "--max-tokens", most, "--seed", 1, "--print-ids")
    assert len(found.out.split()) == min(most, 65 - length)
    assert (found.err != "") == (most > 65 - length)


def test_text_appears_token_by_token(command: Command) -> None:
    line = command.line(tinygpt2.default_model(), "--ids", 7, "--seed", 1, "--max-tokens", 150)
    with subprocess.Popen(line, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1 << 16)
        rest = process.stdout.read()
    assert first
    assert len(rest) > len(first)


# Text that is not UTF-8

LEADS = [0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4]
NEVER = [0xC0, 0xC1, 0xF5, 0xFE, 0xFF]
TAILS = [0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF]
PIECES = [
    *(bytes([byte]) for byte in (*LEADS, *TAILS, *NEVER, 0, 10, 0x41, 0x7F)),
    *(bytes([lead, tail]) for lead in (0xC3, 0xE0, 0xED, 0xF0, 0xF4) for tail in TAILS),
    *(b"", b"\x80\x80", b"\xbf\xbf\xbf", b"\xf0\x9f\x98", b"\x80A", b"A\xe2\x82", "é€😀".encode()),
]


def write_vocabulary(source: Path, path: Path, words: list[bytes]) -> None:
    """A copy of a file with other words for its tokens, and no merges."""
    with tinygpt2.load(source) as model:
        config = model.config._replace(
            n_token_bytes=sum(map(len, words)), n_merges=0, special_tokens={}
        )
    header, data = unpack(source)
    weights = data[: header["vocab.bytes"]["data_offsets"][0]]
    offsets = [sum(map(len, words[:i])) for i in range(len(words) + 1)]
    tables = {
        "vocab.bytes": b"".join(words),
        "vocab.offsets": struct.pack(f"<{len(offsets)}I", *offsets),
        "vocab.byte_ids": b"\xff" * 1024,
    }
    padded = [table + bytes(-len(table) % 64) for table in tables.values()]
    path.write_bytes(tinygpt2.tg2_header(config, 0) + weights + b"".join(padded))


def test_text_that_is_not_utf8(command: Command, toy_path: Path, tmp_path: Path) -> None:
    """Tokens that are parts of characters, and what looks like such: prompts end inside of one, and
    so do answers. Only after half of a surrogate, which no text has, Python differs from itself:
    it keeps ED A0 back as if more could follow, and then both bytes of a prompt are an answer's."""
    path = tmp_path / "m.tg2"
    words = [PIECES[i % len(PIECES)] for i in range(300)]
    write_vocabulary(toy_path, path, words)
    texts = set()
    with tinygpt2.load(path, backend="c", threads=1) as model:
        for seed in range(80):
            ids = [(7 * seed + i) % 300 for i in range(seed % 6)] or [4]
            if model.decode(ids[-4:])[-2:] == "\ufffd\ufffd" and words[ids[-1]][:1] == b"\xed":
                ids.append(0)
            options = {"seed": seed, "temperature": 1.5, "top_k": 0, "max_new_tokens": seed % 50}
            answer = expected(model, ids, True, options)
            assert command.generate(path, ids, *arguments_of(options)) == answer
            texts.add(answer.out.decode())
    assert len(texts) > 70
    for text in ("é€😀", "\0", "\x7f", "\ufffd\ufffd", "A\ufffd", "\ufffdA", "\ud7ff"):
        assert any(text in answer for answer in texts), ascii(text)


# Wrong usage


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["{}"],
        ["--ids", "1"],
        ["{}", "--ids"],
        ["{}", "{}", "--ids", "1"],
        ["{}", "--ids", "1", "--no-such-option"],
        ["{}", "--ids", "1", "--no-such-option", "1"],
        ["{}", "--ids", "1", "-x"],
        ["{}", "--ids", "1", ""],
        ["", "--ids", "1", "{}"],
        ["{}", "--idss", "1"],
        ["{}", "--id", "1"],
        ["{}", "--ids=1"],
        ["{}", "--ids", "1", "2"],
        *(
            ["{}", "--ids", "1", f"--{name}", *value]
            for name in ("max-tokens", "temperature", "top-k", "seed", "threads")
            for value in (
                *(
                    [],
                    [""],
                    ["x"],
                    ["1x"],
                    ["-"],
                    ["--5"],
                    ["5-"],
                    ["1 2"],
                    ["nan"],
                    ["inf"],
                    ["--ids"],
                ),
                *([["-1"]] if name != "seed" else []),
                *([["1.5"], ["1e3"], ["0x10"]] if name != "temperature" else []),
            )
        ),
        ["{}", "--ids", "1", "--temperature", "1000001"],
        ["{}", "--ids", "1", "--temperature", "1e999"],
        ["{}", "--ids", "1", "--threads", "0"],
        ["{}", "--ids", "1", "--threads", "257"],
    ],
    ids=" ".join,
)
def test_wrong_usage(either: Command, toy_path: Path, line: list[str]) -> None:
    message = either.error(2, *(part.format(toy_path) for part in line))
    assert "--ids" in message
    assert "expected " in message
    assert "found " in message


@pytest.mark.parametrize(
    "ids",
    [
        *(
            "300",
            "-1",
            "1 2 300",
            "1 -2",
            "x",
            "1x",
            "1 2x 3",
            "1.0",
            "1-2",
            "0x1",
            "1;2",
            "-",
            "1 é",
        ),
        *("4294967297", "18446744073709551616", "9" * 1000, "--seed", "7 " * 65, "7 " * 999),
    ],
)
def test_ids_that_are_not_ids(either: Command, toy_path: Path, ids: str) -> None:
    message = either.error(2, toy_path, "--ids", ids, "--print-ids")
    assert message.startswith("--ids: expected at most 64 numbers below 300, found ")


@pytest.mark.parametrize("value", ["0", "-1", "x", "257", "2x"])
def test_wrong_number_of_threads_in_the_environment(
    either: Command, toy_path: Path, value: str
) -> None:
    """One on the command line goes before it."""
    message = either.error(2, toy_path, "--ids", "1", TINYGPT2_THREADS=value)
    assert message == f"TINYGPT2_THREADS: expected 1 to 256, found {value}"
    assert either(toy_path, "--ids", "1", "--threads", "1", TINYGPT2_THREADS=value).code == 0


def test_empty_variables_are_none(command: Command, toy_path: Path) -> None:
    found = command(toy_path, "--ids", "1", "--seed", "1", TINYGPT2_THREADS="", TINYGPT2_ISA="")
    assert found == command(toy_path, "--ids", "1", "--seed", "1")
    message = command.error(2, toy_path, "--ids", "1", TINYGPT2_ISA="avx1024")
    assert message.startswith("TINYGPT2_ISA: expected ")


def test_no_tokenizer(either: Command, tmp_path: Path) -> None:
    path = tmp_path / "m.tg2"
    tinygpt2.convert(write_checkpoint(tmp_path, tokenizer=False), path)
    assert str(path) in either.error(2, path, "--ids", "1")
    assert either(path, "--ids", "1", "--print-ids").code == 0


# Bad files


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tg2 file of the smallest model with a tokenizer and an untied head."""
    folder = tmp_path_factory.mktemp("small")
    tinygpt2.convert(write_checkpoint(folder / "checkpoint", SMALL), folder / "small.tg2")
    return folder / "small.tg2"


def refused(command: Command, path: Path) -> str:
    """What it says about a file that it must refuse."""
    message = command.error(1, path, "--ids", "1 2")
    assert message.startswith(f"{path}: ")
    return message


def survived(command: Command, path: Path) -> bool:
    """Whether a file that may be good or bad is taken; ids, as the tokenizer may be gone."""
    result = command(path, "--ids", "1 2", "--max-tokens", "5", "--print-ids")
    assert result.code in (0, 1), result
    assert result.code == 0 or result.err.startswith(f"tinygpt2: error: {path}: "), result
    return result.code == 0


@pytest.mark.parametrize("kind", ["none", "directory", "fifo", "empty", "device", "below a file"])
def test_not_a_file(either: Command, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.tg2"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in ("empty", "below a file"):
        path.touch()
    elif kind == "device":
        path = Path("/dev/zero")
    message = refused(either, path / "file" if kind == "below a file" else path)
    assert ("No such file or directory" in message) == (kind == "none")


@pytest.mark.parametrize("name", [*test_file.BAD_FILES])
def test_bad_safetensors(either: Command, tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.tg2"
    path.write_bytes(test_file.BAD_FILES[name][0])
    refused(either, path)


def test_no_memory(command: Command, tmp_path: Path) -> None:
    """For a million positions, of a file that takes no space on the disk."""
    path = tmp_path / "m.tg2"
    tinygpt2.convert(write_checkpoint(tmp_path, SHAPES["hardly a model"][1], tokenizer=False), path)
    with tinygpt2.load(path) as model:
        config = model.config._replace(n_positions=10**6)
    path.write_bytes(tinygpt2.tg2_header(config, 0))
    sizes = [tinygpt2.byte_size(*entry) for entry in tinygpt2.layout(config).values()]
    os.truncate(path, path.stat().st_size + sum(sizes))
    line = command.line(path, "--ids", "1", "--print-ids", "--max-tokens", 3, "--temperature", 0)
    assert subprocess.run(line, capture_output=True, timeout=60).stdout == b"0 0 0 \n"
    limited = ["sh", "-c", 'ulimit -v 200000 && exec "$@"', "sh", *line]
    done = subprocess.run(limited, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"tinygpt2: error: out of memory\n"


@pytest.mark.parametrize("shift", [8, 16, 32, 56])
def test_misaligned(either: Command, small_path: Path, tmp_path: Path, shift: int) -> None:
    path = tmp_path / "bad.tg2"
    path.write_bytes(pack_aligned(*unpack(small_path), shift))
    refused(either, path)


@pytest.mark.parametrize(
    "change",
    [
        test_file.without_a_tensor,
        test_file.renamed,
        test_file.another_shape,
        test_file.another_dtype,
        test_file.narrow_offsets,
        test_file.with_another_layer,
    ],
)
def test_wrong_tensors(
    either: Command,
    small_path: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any], bytes], bytes],
) -> None:
    path = tmp_path / "bad.tg2"
    header, data = unpack(small_path)
    data = change(header, data)
    path.write_bytes(pack_aligned(header, data))
    if change is test_file.with_another_layer:  # behind all that is used
        assert survived(either, path)
    else:
        assert "header: expected ,'" in refused(either, path)


def bad_offsets(size: int) -> list[list[Any]]:
    """Where a tensor of that size may not be, counted from where it is."""
    wrong: list[Any] = [
        *([64, 64 + size], [0, size - 64], [0, size + 64], [size, 0], [-64, size - 64]),
        *([at, at + size] for at in (1, 10**9, 2**63, 2**64, 2**64 - 64)),
        *([0], [0, size, size], ["0", str(size)], [0.5, size], [None, size]),
    ]
    return [*wrong, [], None]


@pytest.mark.parametrize(
    "name", ["wte.weight", "h.0.attn.c_attn.bias", "vocab.bytes", "vocab.offsets"]
)
def test_wrong_offsets(either: Command, small_path: Path, tmp_path: Path, name: str) -> None:
    """Outside of the file, over another tensor, misaligned, or no offsets."""
    path = tmp_path / "bad.tg2"
    header, data = unpack(small_path)
    start, stop = header[name]["data_offsets"]
    for change in bad_offsets(stop - start):
        header[name]["data_offsets"] = change and [
            at + start if isinstance(at, int) else at for at in change
        ]
        path.write_bytes(pack_aligned(header, data))
        assert f"'{name}'" in refused(either, path)


def test_truncated_anywhere(either: Command, small_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.tg2"
    shutil.copy(small_path, path)
    header, data = unpack(small_path)
    size = path.stat().st_size
    start = size - len(data)
    needed = start + header["vocab.offsets"]["data_offsets"][1]
    borders = [start + value["data_offsets"][1] for key, value in header.items() if "." in key]
    lengths = {*range(size, start, -997), *range(start, 0, -41), *range(17), *borders, needed}
    lengths |= {length - 1 for length in borders}
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        assert length >= needed or refused(either, path)
        assert length < needed or survived(either, path)


@pytest.mark.parametrize(
    "length", [0, 1, 48, 56, 2**24 - 8, 2**24 + 56, 10**8, 2**63 - 8, 2**64 - 8, 2**64 - 1]
)
def test_length_of_the_header(
    either: Command, small_path: Path, tmp_path: Path, length: int
) -> None:
    """In the small file, and in one that is long enough for some, with zeros, which are blanks."""
    path = tmp_path / "bad.tg2"
    path.write_bytes(struct.pack("<Q", length) + small_path.read_bytes()[8:])
    assert "header" in refused(either, path)
    os.truncate(path, 2 * 10**8)
    assert survived(either, path) == (length == 2**24 - 8)


USED = {
    *("activation_function", "layer_norm_epsilon", "bos_token_id", "eos_token_id", "n_token_bytes"),
    *test_file.COUNTS,
    *test_file.SWITCHES[:3],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, value, _ in test_file.BAD_CONFIG]
)
def test_bad_config(
    either: Command, small_path: Path, tmp_path: Path, name: str, value: object
) -> None:
    """What it does not use it need not notice."""
    path = tmp_path / "bad.tg2"
    write_config(small_path, path, name, value)
    if name in USED and value != 290:  # more bytes than tokens have, and room for them
        assert ": expected " in refused(either, path)
    else:
        survived(either, path)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, value, _ in test_file.BAD_METADATA]
)
def test_bad_metadata(
    either: Command, small_path: Path, tmp_path: Path, name: str, value: object
) -> None:
    path = tmp_path / "bad.tg2"
    write_changed(
        small_path, path, lambda h: test_file.set_or_delete(h["__metadata__"], name, value)
    )
    assert "header: expected format tinygpt2 1 " in refused(either, path)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"a":' * 10**5, '"', "\\", "\\" * 10**6, '{"' + "x" * 10**6, "%s%n"],
    ids=lambda text: text[:6],
)
def test_strange_texts_as_header(
    either: Command, small_path: Path, tmp_path: Path, text: str
) -> None:
    """By themselves, and after every part of a good header that a quotation mark ends."""
    path = tmp_path / "bad.tg2"
    content = small_path.read_bytes()
    header = content[8 : len(content) - len(unpack(small_path)[1])]
    places = [i for i, byte in enumerate(header) if byte == ord('"')][::97]
    for place in (0, *places):
        start = header[:place] + text.encode()
        path.write_bytes(pack(start + b" " * (-(8 + len(start)) % 64), content))
        refused(either, path)


def test_values_nested_or_unended(either: Command, small_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.tg2"
    header, data = unpack(small_path)
    config = header["__metadata__"]["config"]
    for name in sorted(USED):
        before, after = config.split(f'"{name}": ')
        for value in ("", '"', "{", "[" * 10**5, "9" * 10**5, "NaN", "1e999", "-", "tru", "\\"):
            changed = f'{before}"{name}": {value}{after[after.index(",") :]}'
            header["__metadata__"]["config"] = changed
            path.write_bytes(pack_aligned(header, data))
            if value in ("-", "tru"):  # as far as it goes it might be one
                survived(either, path)
            else:
                assert "header: expected " in refused(either, path)


@pytest.mark.parametrize(
    ("index", "value"),
    [(0, 1), (7, 5), (7, 10**9), (269, 0), (270, 0), (270, 2**32 - 1), (3, 2**31)],
)
def test_offsets_of_tokens(
    either: Command, small_path: Path, tmp_path: Path, index: int, value: int
) -> None:
    path = tmp_path / "bad.tg2"
    test_file.patch(small_path, path, "vocab.offsets", index, value)
    assert (index, value) == (0, 1) or "vocab.offsets: expected " in refused(either, path)
    assert (index, value) != (0, 1) or survived(either, path)  # the first byte is no token's


def test_weights_that_are_not_finite(either: Command, small_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.tg2"
    header, data = unpack(small_path)
    weights = header["vocab.bytes"]["data_offsets"][0]
    path.write_bytes(pack_aligned(header, b"\xff" * weights + data[weights:]))
    assert "NaN or infinite logits" in refused(either, path)


EDITS = [
    b"\0",
    b"\xff" * 4,
    b"9",
    b"-1",
    b'"',
    b"'",
    b"\\",
    b"{",
    b"}",
    b"[]",
    b",",
    b" ",
    b"%n",
    b"e",
]


def test_random_damage_to_headers(either: Command, small_path: Path, tmp_path: Path) -> None:
    """500 of them, each with up to three changes, most of them in the configuration."""
    path = tmp_path / "damaged.tg2"
    content = small_path.read_bytes()
    data = unpack(small_path)[1]
    start = len(content) - len(data)
    choose = random.Random(1)
    taken = 0
    for _ in range(500):
        changed = bytearray(content[:start])
        for _ in range(choose.randint(1, 3)):
            at = choose.randrange(8, choose.choice([900, 900, start]))
            new = choose.choice([*EDITS, choose.randbytes(choose.randint(1, 8))])
            changed[at : at + choose.choice([0, len(new), choose.randint(0, 99)])] = new
        if choose.random() < 0.9:  # the length says so, or not
            changed[start:] = b""
            changed[:8] = struct.pack("<Q", len(changed) - 8)
        path.write_bytes(bytes(changed) + data)
        taken += survived(either, path)
    assert taken < 100
