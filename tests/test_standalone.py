"""The command that `python build.py --standalone` makes from vendor/tinygpt2.c: it prints byte for
byte what the Python command prints, and says in one line what is wrong with a file."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, build, needs, sanitizing_compiler, write_checkpoint

import tinygpt2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the command is for POSIX"),
    pytest.mark.skipif(
        tinygpt2.library_path() is None,
        reason="compares with the kernels in Python: `python build.py` makes them",
    ),
]
FAST = ["-O1"]  # the kernels compile ten times as fast, and give the same bits
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]
# A run that is refused ends without freeing, and 2 GB of zeros may be asked for and not given.
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}


class Result(NamedTuple):
    code: int  # -11 after a segmentation fault, 1 or so after a sanitizer's report
    out: bytes
    err: str


class Command:
    """The program."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def line(self, *arguments: object) -> list[str]:
        return [str(self.path), *map(str, arguments)]

    def __call__(self, *arguments: object, stdin: bytes = b"", **environ: str) -> Result:
        done = subprocess.run(
            self.line(*arguments),
            env={**ENVIRONMENT, **SANITIZER_OPTIONS, "TINYGPT2_THREADS": "1", **environ},
            input=stdin,
            capture_output=True,
            timeout=60,
        )
        return Result(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))

    def error(self, code: int, *arguments: object, **environ: str) -> str:
        """The one line that it prints when it refuses."""
        result = self(*arguments, stdin=b"", **environ)
        assert (result.code, result.out) == (code, b""), (arguments, result)
        assert result.err.startswith("tinygpt2: error: "), result
        assert result.err.endswith("\n"), result
        message = result.err[len("tinygpt2: error: ") : -1]
        assert message.isprintable(), result
        assert len(message) < 1000, result
        return message

    def accepts(self, path: Path) -> bool:
        """Whether it accepts a file. If not, it must name the file, a field, and what is wrong."""
        result = self("--model", path, "--ids", "", "--max-tokens", 0)
        if result.code == 2:  # nothing to start from: the file is good
            assert result.err.startswith("tinygpt2: error: prompt: it is empty"), result
        elif result.code:
            message = self.error(1, "--model", path, "--ids", "", "--max-tokens", 0)
            assert re.match(r": [^:]+: expected .+, found .+", message[len(str(path)) :]), message
        return result.code != 1


def make(folder: Path, flags: Sequence[str], compiler: str = "") -> Command:
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
    return make(tmp_path_factory.mktemp("standalone"), FAST)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The same with every access to memory and all arithmetic checked."""
    folder = tmp_path_factory.mktemp("sanitized")
    return make(folder, SANITIZE, sanitizing_compiler(SANITIZE[0], folder))


@pytest.fixture(params=["command", pytest.param("sanitized", marks=pytest.mark.slow)])
def either(request: pytest.FixtureRequest) -> Command:
    found: Command = request.getfixturevalue(request.param)
    return found


Python = Callable[..., Result]


@pytest.fixture
def python(capfdbinary: pytest.CaptureFixture[bytes]) -> Python:
    """The Python command with the C backend, in this process."""

    def run(*arguments: object) -> Result:
        code = tinygpt2.main(["--backend", "c", *map(str, arguments)])
        out, err = capfdbinary.readouterr()
        return Result(code, out, err.decode())

    return run


@pytest.mark.parametrize("compiler", [needs("gcc"), needs("clang")])
def test_no_warnings(tmp_path: Path, compiler: str) -> None:
    flags = ["-std=c11", "-O1", "-pthread", "-Wall", "-Wextra", '-DTG_VERSION="1"', "-c"]
    source = str(ROOT / "vendor" / "tinygpt2.c")
    line = [compiler, *flags, source, "-o", str(tmp_path / "out.o")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Files


def unpack(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a good file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def seal(head: bytes) -> bytes:
    """The length and the header with the checksum of its own that version 2 has."""
    found = re.search(rb'"header_crc32":"(.{8})"', head)
    if not found:
        return head
    start, stop = found.span(1)
    crc = zlib.crc32(head[:start] + b"00000000" + head[stop:])
    return head[:start] + b"%08x" % crc + head[stop:]


def pack(header: object, data: bytes = b"", multiple: int = 64, shift: int = 0) -> bytes:
    """A file of a header, which may be bytes, and data. The data starts at a multiple of 64."""
    if isinstance(header, bytes):
        text = header
    else:
        text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((shift - 8 - len(text)) % multiple)
    return seal(struct.pack("<Q", len(text)) + text) + data


def to_version_1(header: dict[str, Any]) -> dict[str, Any]:
    """The header of version 1 with the same content."""
    metadata = dict(header["__metadata__"], format_version="1")
    del metadata["header_crc32"]
    config = json.loads(metadata["config"])
    config["eos_token_id"] = next(iter(config.pop("eos_token_ids")), None)
    config["special_tokens"] = {token["text"]: token["id"] for token in config.pop("added_tokens")}
    for name in ("tokens_before", "tokens_after", "generation"):
        del config[name]
    metadata["config"] = json.dumps(config)
    return {**header, "__metadata__": metadata}


def with_config(source: Path, changes: dict[str, Any]) -> bytes:
    """A file with other values in its configuration."""
    header, data = unpack(source)
    metadata = header["__metadata__"]
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **changes})
    return pack(header, data)


class Example(NamedTuple):
    path: Path
    n_positions: int
    vocab_size: int
    has_tokenizer: bool


NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
MODELS: dict[str, tuple[bool, dict[str, Any]]] = {  # whether with a tokenizer, and its config
    "toy": (True, {}),
    "every size odd, untied, exact GELU": (
        True,
        {"vocab_size": 273, "n_embd": 33, "n_head": 3, "n_inner": 45, "n_layer": 3}
        | {"activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "ReLU, other scales": (
        True,
        {"activation_function": "relu", "scale_attn_weights": False, "n_inner": 17}
        | {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 9.999999747378752e-06},
    ),
    "a context of more than one pass": (
        False,
        {"vocab_size": 16, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 700, **NO_ENDS},
    ),
    "hardly a model": (
        False,
        {"vocab_size": 3, "n_embd": 2, "n_head": 1, "n_layer": 1, "n_positions": 5, "n_inner": 3}
        | NO_ENDS,
    ),
}


def example_of(path: Path) -> Example:
    with tinygpt2.load(path) as model:
        config = model.config
    return Example(path, config.n_positions, config.vocab_size, config.n_merges is not None)


@pytest.fixture(scope="module", params=MODELS)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    folder = tmp_path_factory.mktemp("example")
    tokenizer, changes = MODELS[request.param]
    path = folder / "a model.tg2"
    tinygpt2.convert(write_checkpoint(folder, changes, tokenizer=tokenizer), path)
    return example_of(path)


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of version 2 with few bytes, every size odd, a tokenizer and an untied head."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": 270, "n_positions": 9, "n_embd": 6, "n_layer": 1, "n_head": 2}
    changes = {**sizes, "n_inner": 19, "tie_word_embeddings": False}
    tinygpt2.convert(write_checkpoint(folder, changes), folder / "small.tg2")
    return folder / "small.tg2"


# The same output as the Python command

OPTIONS = [
    "--temperature 0",
    "--seed 1",
    "--seed -1 --max-tokens 20 --temperature 1.5",
    "--seed 1000000000000000000000000000007 --temperature 2.5 --top-k 0 --max-tokens 30",
    "--seed 18446744073709551615 --temperature 1e6 --top-k 1000000000000 --max-tokens 30",
    "--seed 5 --temperature 1e-300 --top-k 1 --max-tokens 5",
    "--seed 6 --top-p .5 --max-tokens 30",
    "--seed 7 --min-p 0.2 --top-k 0 --max-tokens 30",
    "--seed 8 --repetition-penalty 1.7 --temperature 0 --max-tokens 60",
    "--seed=9 --repetition-penalty=0.5 --top-p 0.95 --min-p 1e-3 --temperature .9e0",
    "--max-tokens 0",
]


def check_same(command: Command, python: Python, example: Example, ids: Any, options: str) -> None:
    """As ids, and where there are texts, as text."""
    line = ["--model", example.path, "--ids", " ".join(map(str, ids)), *options.split()]
    assert command(*line) == python(*line), line
    if example.has_tokenizer:
        assert command(*line, "--text") == python(*line, "--text"), line


def test_output(command: Command, python: Python, example: Example) -> None:
    """With prompts of different lengths, and the defaults of both."""
    for i, options in enumerate(OPTIONS):
        for length in {1, min(i * 7 + 2, example.n_positions)}:
            ids = np.random.default_rng(i).integers(example.vocab_size, size=length)
            check_same(command, python, example, ids, options)


def test_output_of_the_default_model(command: Command, python: Python) -> None:
    """Its file is of version 1."""
    example = example_of(Path(tinygpt2.default_model()))
    check_same(command, python, example, range(40), "--seed 3 --max-tokens 20")
    check_same(command, python, example, [17], f"{OPTIONS[-2]} --max-tokens 10")


def test_every_instruction_set_and_number_of_threads(
    command: Command, python: Python, example: Example
) -> None:
    """A prompt of more than one pass, where the model has the positions for it."""
    length = min(600, example.n_positions)
    ids = np.random.default_rng(0).integers(example.vocab_size, size=length)
    line = ["--model", example.path, "--ids", ",".join(map(str, ids)), "--seed", 4]
    line += ["--max-tokens", 5]
    answer = python(*line)
    used = []
    for isa in ("avx512", "avx2", "neon", "portable"):
        result = command(*line, TINYGPT2_ISA=isa)
        if result.code == 2:
            continue
        used.append(isa)
        assert result == answer
        assert command(*line, "--threads", 3, TINYGPT2_ISA=isa, TINYGPT2_THREADS="no") == answer
        assert command(*line, TINYGPT2_ISA=isa, TINYGPT2_THREADS="2") == answer
    expected = f"TINYGPT2_ISA: expected {' or '.join(used)}, found 'avx1024'"
    assert command.error(2, *line, TINYGPT2_ISA="avx1024") == expected
    assert command(*line, TINYGPT2_ISA="", TINYGPT2_THREADS="") == answer


def test_end_tokens_and_empty_prompts(
    command: Command, python: Python, toy_path: Path, tmp_path: Path
) -> None:
    """An end token is not printed, and nothing follows it. An empty prompt starts from the tokens
    before every text, or from the begin token, or from the first of the end tokens."""
    path = tmp_path / "m.tg2"
    header, data = unpack(toy_path)
    config = json.loads(header["__metadata__"]["config"])
    config |= {"eos_token_ids": []}
    header["__metadata__"]["config"] = json.dumps(config)
    path.write_bytes(pack(header, data))
    prompt = ["--ids", "9 8 7", "--seed", "3"]
    ids = list(map(int, command("--model", path, *prompt).out.split()))
    unlike = list(dict.fromkeys(ids))
    found, expected = [], []
    for version, before, bos, ends in (
        (2, [], None, unlike[:1]),
        (2, [], 264, unlike[5:6]),
        (2, [], None, [unlike[12], unlike[7], unlike[9]]),
        (2, [], 5, [264, unlike[10]]),
        (2, [8, 7, 8], 5, [264]),
        (2, [6] * 64, None, []),
        (2, [264], 5, [264]),
        (2, [], None, []),
        (1, [], None, unlike[8:9]),
        (1, [], 3, []),
        (1, [], 3, [264]),
        (1, [], None, []),
    ):
        config |= {"tokens_before": before, "bos_token_id": bos, "eos_token_ids": ends}
        header["__metadata__"]["config"] = json.dumps(config)
        path.write_bytes(pack(header if version == 2 else to_version_1(header), data))
        for line in (prompt, ["--ids", ""], ["--ids", " ,\n"], ["--ids", "\ufeff9 8"]):
            for kind in ([], ["--text"]):
                arguments = ["--model", path, *line, "--seed", "3", *kind]
                assert command(*arguments) == python(*arguments), (version, config, line)
        start = before or [token for token in (bos, *ends[:1]) if token is not None][:1]
        if start:
            ours = command("--model", path, "--ids", "", "--seed", 1)
            line = ["--ids", " ".join(map(str, start)), "--seed", "1"]
            assert ours == command("--model", path, *line), (version, config)
        found.append(len(command("--model", path, *prompt).out.split()))
        expected.append(min([len(ids), *(ids.index(end) for end in ends if end in ids)]))
    assert found == expected


def test_full_context(command: Command, python: Python, toy_path: Path) -> None:
    """The last position predicts one more token, and then the command says that it is full."""
    for length in (62, 63, 64):
        ids = " ".join(str(11 * i % 300) for i in range(length))
        for most in (0, 1, 2, 3, 4, 200):
            line = ["--model", toy_path, "--ids", ids, "--max-tokens", most, "--seed", 1]
            found = command(*line)
            assert found == python(*line)
            assert len(found.out.split()) == min(most, 65 - length)
            assert (found.err != "") == (most > 65 - length)


# A model's own options, those of the command line, and those that do the same to a model without
# any. The prompt has three tokens.
OWN_OPTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2, "top_k": 5}, "", "--temperature 2 --top-k 5"),
    ({"temperature": 0.3}, "--top-k 3", "--temperature 0.3 --top-k 3"),
    ({"top_k": 0, "temperature": 9.0e-1}, "--temperature 2", "--temperature 2 --top-k 0"),
    ({"top_p": 0.2, "max_new_tokens": 9}, "", "--top-p 0.2 --max-tokens 9"),
    ({"top_k": 10**30, "min_p": 0.5}, "", "--top-k 300 --min-p 0.5"),
    ({"min_p": 1, "repetition_penalty": 2}, "--min-p 0", "--repetition-penalty 2"),
    ({"temperature": 0, "repetition_penalty": 1.5}, "--repetition-penalty 1", "--temperature 0"),
    ({"max_length": 8}, "", "--max-tokens 5"),
    ({"max_length": 4}, "", "--max-tokens 1"),
    ({"max_length": 8}, "--max-tokens 9", "--max-tokens 9"),
    ({"max_length": 3, "max_new_tokens": 6}, "", "--max-tokens 6"),
    ({"max_length": 3, "max_new_tokens": 0}, "--max-tokens 2", "--max-tokens 2"),
    ({"max_length": 10**30, "temperature": 5}, "", "--temperature 5 --max-tokens 1000"),
]


def test_options_that_a_model_brings(
    command: Command, python: Python, toy_path: Path, tmp_path: Path
) -> None:
    """An option that is given comes first, then the model's own, then the program's."""
    path, plain = tmp_path / "own.tg2", tmp_path / "plain.tg2"
    plain.write_bytes(with_config(toy_path, {"eos_token_ids": []}))
    line = ["--ids", "9 8 7", "--seed", 3]
    for own, given, same in OWN_OPTIONS:
        path.write_bytes(with_config(plain, {"generation": own}))
        answer = command("--model", path, *line, *given.split())
        assert answer == python("--model", path, *line, *given.split()), own
        assert answer == command("--model", plain, *line, *same.split()), own
        assert answer != command("--model", plain, *line, *given.split()) or given, own


def test_max_length_that_a_model_brings(
    command: Command, python: Python, toy_path: Path, tmp_path: Path
) -> None:
    """It counts the prompt, or the tokens that an empty one starts from. A prompt that is too long
    is an error with the words of Python."""
    path = tmp_path / "m.tg2"
    for ids, start, n_new in (("", [], 2), ("", [5, 6], 1), ("5", [5, 6], 2), ("5 6", [7], 1)):
        changes = {"tokens_before": start, "generation": {"max_length": 3}}
        path.write_bytes(with_config(toy_path, changes))
        line = ["--model", path, "--ids", ids, "--seed", 1]
        assert command(*line) == python(*line)
        assert len(command(*line).out.split()) == n_new
    for ids in ("5 6 7", "5 6 7 8", "5 " * 99):
        message = command.error(2, "--model", path, "--ids", ids)
        assert message.startswith("max_length: the model's own limit is 3 tokens")
        assert python("--model", path, "--ids", ids).err == f"tinygpt2: error: {message}\n"
    for limit, start in ((0, []), (1, []), (0, [5]), (2, [5, 6]), (2, [5, 6, 7])):
        changes = {"tokens_before": start, "generation": {"max_length": limit}}
        path.write_bytes(with_config(toy_path, changes))
        message = command.error(2, "--model", path, "--ids", "")
        assert python("--model", path, "--ids", "").err == f"tinygpt2: error: {message}\n"


LEADS = [0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4]
NEVER = [0xC0, 0xC1, 0xF5, 0xFE, 0xFF]
TAILS = [0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF]
PIECES = [
    *(bytes([byte]) for byte in (*LEADS, *TAILS, *NEVER, 0, 10, 0x41, 0x7F)),
    *(bytes([lead, tail]) for lead in (0xC3, 0xE0, 0xED, 0xF0, 0xF4) for tail in TAILS),
    *(b"", b"\x80\x80", b"\xbf\xbf\xbf", b"\xf0\x9f\x98", b"\x80A", b"A\xe2\x82", "é€😀".encode()),
]


def with_vocabulary(source: Path, words: list[bytes]) -> bytes:
    """A file with other bytes for its tokens, and no merges."""
    header, data = unpack(source)
    weights = data[: header["vocab.bytes"]["data_offsets"][0]]
    offsets = [sum(map(len, words[:i])) for i in range(len(words) + 1)]
    config = json.loads(header["__metadata__"]["config"])
    config |= {"n_token_bytes": offsets[-1], "n_merges": 0, "added_tokens": []}
    header["__metadata__"]["config"] = json.dumps(config)
    place = len(weights)
    for name, size, table in (
        ("vocab.bytes", 1, b"".join(words)),
        ("vocab.offsets", 4, struct.pack(f"<{len(offsets)}I", *offsets)),
        ("vocab.byte_ids", 4, b"\xff" * 1024),
        ("merges.pairs", 8, b""),
        ("merges.ranks", 4, b""),
        ("merges.results", 4, b""),
    ):
        padded = table + bytes(-len(table) % 64)
        header[name] |= {"shape": [len(padded) // size]}
        header[name] |= {"data_offsets": [place, place + len(padded)]}
        place += len(padded)
        weights += padded
    return pack(header, weights)


def test_text_that_is_not_utf8(
    command: Command, python: Python, toy_path: Path, tmp_path: Path
) -> None:
    """Tokens that are parts of characters, and what looks like such: prompts end inside a
    character, and so do answers. Only after half of a surrogate at the end of a prompt Python
    differs from itself: it keeps ED A0 back as if more could follow, and prints both bytes."""
    path = tmp_path / "m.tg2"
    words = [PIECES[i % len(PIECES)] for i in range(300)]
    path.write_bytes(with_vocabulary(toy_path, words))
    texts = set()
    cut_off = [words.index(word) for word in (b"\xf0", b"\x9f", b"\x80", b"")]
    for seed in range(80):
        ids = [(7 * seed + i) % 300 for i in range(seed % 6)] or cut_off
        text = b"".join(words[i] for i in ids[-4:]).decode("utf-8", "replace")
        if text[-2:] == "\ufffd\ufffd" and words[ids[-1]][:1] == b"\xed":
            ids.append(0)
        line = ["--model", path, "--ids", " ".join(map(str, ids)), "--text", "--seed", seed]
        line += ["--temperature", 1.5, "--top-k", 0, "--max-tokens", seed % 50]
        answer = python(*line)
        assert command(*line) == answer, line
        texts.add(answer.out.decode())
    assert len(texts) > 70
    for text in ("é€😀", "\0", "\x7f", "\ufffd\ufffd", "A\ufffd", "\ufffdA", "\ud7ff"):
        assert any(text in answer for answer in texts), ascii(text)


# Input, output, signals


def test_ids_from_standard_input(command: Command, python: Python, toy_path: Path) -> None:
    line = ["--model", toy_path, "--seed", 1, "--ids"]
    answer = python(*line, "72 101 108")
    for text in (b"72 101 108", b"72,101,+108\n", b"\t72\r\n\v101\f0108 \r\n"):
        assert command(*line, "-", stdin=text) == answer
    ids = b"5 " * 30_000  # more than a pipe holds
    assert "context: expected at most 64 tokens" in command(*line, "-", stdin=ids).err
    assert "expected whole numbers, found" in command(*line, "-", stdin=b"1 2\0 3").err
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *command.line(*line, "-")]
    done = subprocess.run(closed, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"tinygpt2: error: standard input is closed\n"


@contextlib.contextmanager
def long_answer(command: Command, interrupt: Any = signal.SIG_DFL) -> Iterator[Any]:
    """The command in the middle of a long answer, of which the beginning has been read. `interrupt`
    is what SIGINT does where the command is started."""
    line = command.line("--model", tinygpt2.default_model(), "--text", "--seed", 1)
    with subprocess.Popen(
        [*line, "--ids", "7", "--max-tokens", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt),
    ) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1 << 16)
        assert process.poll() is None, "its output must appear token by token"
        yield process
        process.kill()


def test_interrupt(command: Command) -> None:
    with long_answer(command) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"")
    with long_answer(command, signal.SIG_IGN) as process:  # as a shell does for `command &`
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.endswith(b"\n")


def test_closed_pipe(command: Command) -> None:
    """A reader that has enough is no error, as in Python."""
    with long_answer(command) as process:
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""


def test_output_that_cannot_be_written(command: Command, toy_path: Path) -> None:
    for target, reason in ((">/dev/full", "No space left"), (">&-", "Bad file descriptor")):
        for arguments in (["--model", toy_path, "--ids", "1"], ["--help"]):
            line = ["sh", "-c", f'exec "$@" {target}', "sh", *command.line(*arguments)]
            done = subprocess.run(line, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith(f"tinygpt2: error: standard output: {reason}")
            assert done.stderr.count("\n") == 1


# Options


def test_help_version_and_fresh_seeds(command: Command, python: Python, toy_path: Path) -> None:
    assert command("--version") == (0, f"tinygpt2 {tinygpt2.__version__}\n".encode(), "")
    code, out, err = command("--ids", "1", "--help", "--no-such-option")
    assert (code, err) == (0, "")
    theirs = set(re.findall(r"--[a-z-]+", python("--help").out.decode()))
    ours = set(re.findall(r"--[a-z-]+", out.decode()))
    assert ours <= theirs
    assert {"--model", "--ids", "--text", "--seed", "--repetition-penalty"} <= ours
    for flag in ours - {"--help", "--version", "--text"}:
        assert command.error(2, flag) == f"argument {flag}: expected one argument"
    assert len({command("--model", toy_path, "--ids", "1").out for _ in range(5)}) == 5


NOT_A_COUNT = ["", "x", "1x", "-", "--5", "5-", "1 2", "nan", "1.5", "1e3", "0x10"]
NOT_A_NUMBER = ["", "x", "1x", "-", "1 2", "nan", "inf", "0x1", "1e999", "-1"]
WRONG_VALUES = {  # what the Python command says, too, where argparse lets the value through
    "--max-tokens": ([*NOT_A_COUNT, "-1"], "a whole number from 0"),
    "--top-k": ([*NOT_A_COUNT, "-1"], "a whole number from 0 (0: all tokens)"),
    "--seed": (NOT_A_COUNT, "a whole number"),
    "--threads": ([*NOT_A_COUNT, "-1", "0", "257"], "a number from 1 to 256"),
    "--temperature": ([*NOT_A_NUMBER, "1000001"], "a number from 0 to 1e6"),
    "--top-p": ([*NOT_A_NUMBER, "0", "1.001"], "above 0, at most 1"),
    "--min-p": ([*NOT_A_NUMBER, "1.001"], "a number from 0 to 1"),
    "--repetition-penalty": ([*NOT_A_NUMBER, "0", "1e7"], "a number from 1e-6 to 1e6"),
}
WRONG_LINES = {  # {} is the path of a model
    "": "no model: pass --model FILE.tg2",
    "--ids 1": "no model: pass --model FILE.tg2",
    "--model {}": 'no prompt: pass --ids "15496 995", or --ids - to read standard input',
    "--model {} --ids": "argument --ids: expected one argument",
    "--ids --model {}": "argument --ids: expected one argument",
    "--seed --ids 1": "argument --seed: expected one argument",
    "{}": "unrecognized argument: '{}' (--help lists the options)",
    "--model {} --ids 1 2": "unrecognized argument: '2' (--help lists the options)",
    "--idss 1": "unrecognized argument: '--idss' (--help lists the options)",
    "--no-such=1": "unrecognized argument: '--no-such=1' (--help lists the options)",
    "--text=1": "unrecognized argument: '--text=1' (--help lists the options)",
    "-x": "unrecognized argument: '-x' (--help lists the options)",
}


def test_wrong_usage(either: Command, python: Python, toy_path: Path) -> None:
    for line, expected in WRONG_LINES.items():
        arguments = [part.format(toy_path) for part in line.split()]
        assert either.error(2, *arguments) == expected.format(toy_path)
        assert not line.startswith("--model") or python(*arguments).code == 2, line
    for flag, (values, expected) in WRONG_VALUES.items():
        for value in values:
            words = ["--model", toy_path, "--ids", "1", f"{flag}={value}"]
            found = f"{flag}: expected {expected}, found '{value}'"
            assert either.error(2, *words) == found
            theirs = python(*words)
            assert theirs.code == 2, words
            assert "argument --" in theirs.err or expected in theirs.err, (theirs, found)
    for value in ("0", "-1", "x", "257", "2x", "+2"):
        message = either.error(2, "--model", toy_path, "--ids", "1", TINYGPT2_THREADS=value)
        expected = f"TINYGPT2_THREADS: expected a whole number from 1 to 256, found '{value}'"
        assert message == expected


def test_ids_that_are_not_ids(either: Command, python: Python, toy_path: Path) -> None:
    """With the words of the Python command."""
    bad = ["x", "1x", "1 2x 3", "1.0", "1-2", "0x1", "1;2", "+", "é", "300", "-1", "1 2 300"]
    for ids in (*bad, "1 -2", "4294967297", "18446744073709551616", "9" * 99, "7 " * 65):
        line = ["--model", toy_path, "--ids", ids]
        ours, theirs = either.error(2, *line), python(*line).err
        same = re.sub(r"found .*|;.*", "", theirs[len("tinygpt2: error: ") : -1])
        assert ours.startswith(same), theirs
        assert re.sub(r"found .*|;.*", "", ours) == same
    expected = "token ids: expected whole numbers from 0 to 299, found 300 at position 2"
    assert either.error(2, "--model", toy_path, "--ids", "1 2 300") == expected


def test_no_tokenizer(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "m.tg2"
    tinygpt2.convert(write_checkpoint(tmp_path, tokenizer=False), path)
    message = command.error(2, "--model", path, "--ids", "1", "--text")
    assert message.startswith(f"{path}: no tokenizer inside")
    assert command("--model", path, "--ids", "1").code == 0


# Bad files


def python_accepts(path: Path) -> tuple[bool, str]:
    """Whether the Python module accepts a file, and what it says if not."""
    try:
        tinygpt2.load(path, backend="c").close()
    except tinygpt2.FormatError as error:
        return False, str(error)
    return True, ""


# What the command does not use it does not check: how texts are encoded.
UNUSED = ("tensor vocab.byte_ids", "tensor merges.", "appears twice")


def check_as_python(command: Command, path: Path, content: bytes) -> bool:
    """Whether a file is accepted, which must be what the Python module says."""
    path.write_bytes(content)
    accepted = command.accepts(path)
    theirs, message = python_accepts(path)
    assert accepted == theirs or (accepted and any(word in message for word in UNUSED)), message
    return accepted


def test_not_a_file(either: Command, python: Python, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    names = ("none", "directory", "fifo", "empty", "/dev/zero", "empty/file", "with\nnewline", "")
    for name in names:
        line = ["--model", tmp_path / name if name else "", "--ids", "1"]
        message = either.error(1, *line)
        theirs = python(*line).err.replace("\\n", "\\x0a").replace("'", "")
        assert theirs.startswith(f"tinygpt2: error: {message} ")


BAD_HEADERS = [
    *("", " ", "[]", "null", "17", '"{}"', "{}{}", "{}\0", "{", '{"', "}", '{"a"', '{"a":', "\\"),
    *('{"a":1,}', "{,}", '{"a" 1}', "{'a':1}", "{1:1}", '{"a":NaN}', '{"a":Infinity}', "\ufeff{}"),
    *('{"a":{},"a":{}}', '{"__metadata__":{},"__metadata__":{}}', "[" * 200_000, '{"a":' * 200_000),
    *("%s%n%n%n", '{"\\', '{"\\u', '{"\\u12', '{"\\u123g":1}', '{"\\x":1}', '{"\n":1}', '{"\t'),
    *(f'{{"__metadata__":{value}}}' for value in ("null", "[]", '{"a":1}', '{"a":{}}', "{", "{]")),
    *(
        f'{{"__metadata__":{{"a":"b"{value}}}}}'
        for value in (",", ',"c"', ',"c":1', "]", ',"c":"d')
    ),
    *(
        f'{{"a":{value}}}'
        for value in ("null", "[4]", "{}", "{", '"', "[", "-", "tru", "9" * 10**5)
    ),
]
# In place of the parts of "dtype":"F32","shape":[16],"data_offsets":[START,STOP]
BAD_PARTS = {
    '"F32"': ["null", "8", '["F32"]', '"f32"', '"F32\\u0000"', '""', '"F32', "{}", '"\\u001b[2J"'],
    "[16]": [
        *("null", "16", '"16"', '{"0":16}', "[-16]", "[true]", "[16.0]", '["16"]', "[[16]]", "[]"),
        *("[16,]", "[,16]", "[016]", "[+16]", "[16", "[15]", "[17]", "[4,4]", "[16,0]", "[16e0]"),
        *("[18446744073709551632]", "[4294967296,4294967296]", "[1,1,1,1,1,16]", "[16,1]"),
        "[" + "1," * 10**5 + "16]",
    ],
    "[START,STOP]": [
        *("null", "START", "{}", "[]", "[START]", "[START,STOP,STOP]", "[-64,0]", "[false,STOP]"),
        *('["START","STOP"]', "[STOP,START]", "[START,STOP", "[START;STOP]", "[STOP,STOP]"),
        *("[START.0,STOP.0]", "[START,null]", "[1,65]", "[0,64]", "[START,1STOP]", "[0START,STOP]"),
        *("[18446744073709551616,18446744073709551680]", "[9223372036854775807,STOP]"),
    ],
    '"dtype":"F32",': [
        '"dtype":"F32" ',
        "",
        '"dtype":"F32","dtype":"F32",',
        '"dtype":"F32","stride":1,',
        ",",
        "{",
    ],
    '"shape":[16],': ["", '"shape":[16],"shape":[16],', '"Shape":[16],', '"shape":[16];'],
}
BAD_CONTENTS = [
    *(b"\0", b"\x02\0\0\0\0\0\0", b"\x03\0\0\0\0\0\0\0{}", b"\xff" * 8 + b"{}", bytes(8)),
    *(struct.pack("<Q", length) + bytes(64) for length in (57, 10**8, 10**8 + 1, 2**63 - 8)),
    *(pack(text, b"1234") for text in (b'{"\xff":1}', b'{"\xc3"}', b'{"\xed\xa0\x80":1}')),
    pack("{}".encode("utf-16"), b"1234"),
]
SWITCHES = [
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
    *("tie_word_embeddings", "add_prefix_space"),
]


def added(text: str = '"x"', token: str = "3", flag: str = "false") -> str:
    """An added token of a configuration, as JSON."""
    flags = f'"special":{flag},"lstrip":true,"rstrip":false,"single_word":true,"normalized":false'
    return f'{{"text":{text},"id":{token},{flags}}}'


def quoted(text: str) -> str:
    return f'"{text}"'


ADDED = added()
HALVES, PAIR = (r'"\ud83d"', r'"\ude00"'), r'"\ud83d\ude00"'  # halves of a surrogate pair
LONG_TEXTS = [quoted(character * 256) for character in ("x", "é", r"\u00e9", "\U0001f600", r"\n")]
TWICE = ((map(quoted, "xyyz"), "1345"), (map(quoted, "xyza"), "1341"))  # a text, an id
BAD_ADDED = [
    *("1", "[]", "null", "{}", '{"x":1}', f"{ADDED},", f"{ADDED} {ADDED}", f"{ADDED},{ADDED}"),
    *(ADDED.replace(part, "") for part in ('"text":"x",', '"id":3,', ',"normalized":false')),
    *(ADDED.replace("special", name) for name in ("", "Special", "rstrip", "id", "content")),
    *(ADDED.replace("{", "{" + more) for more in ('"id":3,', '"x":1,', '"rstrip":false,')),
    *(added(quoted(text)) for text in ("", "x" * 257, r"\u00e9" * 257, "\U0001f600" * 257)),
    *(added(text) for text in ("null", "5", '["x"]', "x", '{"x":1}')),
    *(added(token=token) for token in ("-1", "270", "4294967299", "3.0", "true", '"3"', "null")),
    *(added(flag=flag) for flag in ("null", "1", '"true"', "[]", "tru")),
    *(",".join(map(added, texts, ids)) for texts, ids in TWICE),
]
BAD_LISTS = [
    *("null", "1", "{}", '"1"', "[270]", "[-1]", "[1.0]", '["1"]', "[1,]", "[1", "[true]", "[[1]]"),
    *("[null]", "[4294967296]", "[3,3,3,3,3,3,3,3,3,3]"),
]
BAD_VALUES: dict[str, list[str]] = {  # of the configuration, as JSON
    **{
        name: ["null", "0", "-1", "1.0", "true", '"8"', "[8]", "2147483648", "1" + "0" * 400, "01"]
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
    },
    **{name: ["null", "0", "1", '"true"', "[]", "tru", "truefalse"] for name in SWITCHES},
    "activation_function": ["null", '"swish"', '"GELU"', '""', "1", '["gelu"]', '"gelu\\u0000"'],
    "layer_norm_epsilon": [
        "null",
        "-1e-9",
        "1.0",
        "1",
        "0",
        "1e300",
        '"1e-5"',
        "NaN",
        "1e999",
        "1e",
    ],
    "bos_token_id": ["-1", "270", "4294967296", "1.0", "true", '"1"', "[1]"],
    "eos_token_ids": ["null", "1", "[270]", "[-1]", "[1,1]", "[1.0]", '["1"]', "[1,]", "[1", "{}"],
    "added_tokens": ["null", "{}", "1", "[", *(f"[{tokens}]" for tokens in BAD_ADDED)],
    "tokens_before": BAD_LISTS,
    "tokens_after": BAD_LISTS,
    "n_merges": ["-1", "1.0", "true", '"8"', "2147483648", "0", "null", "9"],
    "n_token_bytes": ["null", "-1", "1.0", "false", "2147483648", "1", "1000000"],
    "pre_tokenizer": ["null", '"gpt4"', '""', "2", '["gpt2"]'],
    "generation": [
        *("null", "[]", "true", "{", '{"seed":1}', '{"":1}', '{"top_k":1,}', '{"top_k"}'),
        *('{"top_k":1,"top_k":1}', '{"top_k":1 "top_p":1}', '{"TOP_K":1}', '{"max_tokens":1}'),
        *(
            f'{{"{name}":{value}}}'
            for name in ("top_k", "max_new_tokens", "max_length")
            for value in ("-1", "1.0", "1e2", "true", '"1"', "null", "[1]", "{}", "+1", "01", "1_0")
        ),
        *(
            f'{{"{name}":{value}}}'
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
            for value in ("-1e-9", "1e7", "NaN", "Infinity", "1e999", "true", '"1"', "null", "[]")
        ),
        *('{"temperature":1000000.1}', '{"temperature":0x10}', '{"temperature":1.}'),
        *('{"top_p":0}', '{"top_p":-0.0}', '{"top_p":1e-999}', '{"top_p":1.0001}', '{"top_p":.5}'),
        *('{"min_p":1.0001}', '{"min_p":1e}', '{"repetition_penalty":0}'),
        *('{"repetition_penalty":9e-7}', f'{{"temperature":1{"0" * 400}}}'),
    ],
}
GOOD_VALUES: dict[str, list[str]] = {
    "added_tokens": [
        f"[ {ADDED} ]",
        *(f"[{added(text, '269', 'true')}]" for text in LONG_TEXTS),
        f"[{added(HALVES[0])},{added(HALVES[1], '0')},{added(PAIR, '1')}]",
        f"[{','.join(added(quoted('x' * n), str(n)) for n in range(1, 257))}]",
    ],
    "tokens_before": ["[]", "[0]", "[269,0,0,0,0,0,0,0,269]"],
    "tokens_after": ["[ ]", "[269]", "[1,1,1,1,1,1,1,1,1]"],
    "pre_tokenizer": ['"characters"', r'"gpt\u0032"'],
    "generation": [
        '{"temperature":1000000,"top_k":0,"top_p":1,"min_p":1.0}',
        '{ "max_length" : -0 , "max_new_tokens" : 0, "repetition_penalty" : 0.000001 }',
        f'{{"top_k":1{"0" * 400},"top_p":4.9E-324,"temperature":-0.0,"min_p":1e-999}}',
    ],
}
BAD_OLD_VALUES = {
    "special_tokens": [
        *(
            "null",
            "[]",
            '{"":1}',
            '{"x":270}',
            '{"x":-1}',
            '{"x":"1"}',
            '{"x":1,}',
            '{"x":1,"x":2}',
        ),
        *('{"x":1,"y":2,"z":1}', f'{{"{"x" * 257}":1}}'),
    ],
    "eos_token_id": ["-1", "270", "[1]", "true"],
}
BAD_SIZES = [  # good by themselves, but not the sizes of the tensors
    *(("vocab_size", "271"), ("vocab_size", "273"), ("n_positions", "10"), ("n_embd", "8")),
    *(("n_layer", "2"), ("n_layer", "4096"), ("n_inner", "20"), ("n_inner", "33"), ("n_head", "4")),
    *(("tie_word_embeddings", "true"), ("n_token_bytes", "290"), ("n_head", "12")),
]


def with_text(header: dict[str, Any], config: str) -> dict[str, Any]:
    """The header with another text of the configuration."""
    return {**header, "__metadata__": {**header["__metadata__"], "config": config}}


def with_value(header: dict[str, Any], name: str, value: str) -> str:
    """The text of the configuration with another value, as JSON, of one name."""
    text: str = header["__metadata__"]["config"]
    before = json.dumps({name: json.loads(text)[name]})[1:-1]
    assert text.count(before) == 1
    return text.replace(before, f'"{name}": {value}')


def bad_configs(header: dict[str, Any]) -> Iterator[str]:
    """Texts in place of the configuration."""
    text = header["__metadata__"]["config"]
    values = json.loads(text)
    yield from (
        "",
        "[]",
        "{",
        "{}",
        "\ud800",
        '{"a":"\\ud800"}',
        "[" * 100_000,
        text + "}",
        text[:-1],
    )
    yield text.replace("{", '{"n_ctx": 9, ', 1)
    yield text.replace("{", '{"vocab_size": 270, ', 1)
    yield text.replace("eos_token_ids", "eos_token_id")
    for name in values:
        yield json.dumps({key: value for key, value in values.items() if key != name})
    for name, bad in (*BAD_VALUES.items(), *((name, [value]) for name, value in BAD_SIZES)):
        for value in bad:
            yield with_value(header, name, value)


def bad_old_configs(header: dict[str, Any]) -> Iterator[str]:
    """The same for a header of version 1."""
    text = header["__metadata__"]["config"]
    for name in ("eos_token_ids", "added_tokens", "tokens_before", "tokens_after", "generation"):
        yield text.replace("{", f'{{"{name}": {"{}" if name == "generation" else "[]"}, ', 1)
    for name, values in BAD_OLD_VALUES.items():
        yield text.replace(name, f"{name}s")
        for value in values:
            yield with_value(header, name, value)


def bad_tensors(header: dict[str, Any], data: bytes) -> Iterator[bytes]:
    """Files in which something is wrong with the tensors."""
    for name in ("wte.weight", "h.0.attn.c_attn.bias", "vocab.bytes", "merges.results"):
        good: dict[str, Any] = header[name]
        start, stop = good["data_offsets"]
        changes: list[dict[str, Any]] = [
            *({"dtype": "I32"}, {"dtype": "F64"}, {"shape": [1, *good["shape"]]}, {"shape": []}),
            *({"data_offsets": [start + at, stop + at]} for at in (1, 64, -64, 2**62)),
            *({"data_offsets": at} for at in ([start, start], [stop, start], [start, stop + 64])),
        ]
        for change in changes:
            yield pack({**header, name: {**good, **change}}, data)
        rest = {key: value for key, value in header.items() if key != name}
        yield pack(rest, data)
        yield pack({**rest, f"{name} ": good}, data)
        yield pack({**rest, f"{name}\0": good}, data)
    start, stop = header["ln_f.weight"]["data_offsets"][0], header["ln_f.bias"]["data_offsets"][1]
    for border in (start, stop):  # one has all bytes of both, the other none
        borders = {"ln_f.weight": [start, border], "ln_f.bias": [border, stop]}
        moved = {name: {**header[name], "data_offsets": at} for name, at in borders.items()}
        yield pack({**header, **moved}, data)
    end = len(data)
    yield pack({**header, "extra": {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}}, data)
    yield pack(header, data + bytes(64))
    start, stop = header["merges.results"]["data_offsets"]
    moved = {
        "merges.results": {**header["merges.results"], "data_offsets": [start + 64, stop + 64]}
    }
    yield pack({**header, **moved}, data[:start] + bytes(64) + data[start:])
    for shift in (1, 4, 8, 32):
        yield pack(header, data, shift=shift)
    offsets = header["vocab.offsets"]["data_offsets"][0]
    for index, value in ((0, 1), (7, 5), (7, 10**9), (269, 0), (270, 0), (270, 2**32 - 1)):
        place = offsets + 4 * index
        yield pack(header, data[:place] + struct.pack("<I", value) + data[place + 4 :])


def bad_parts(header: dict[str, Any]) -> Iterator[str]:
    """Texts of a header that is good but for one part of one tensor's entry."""
    text = json.dumps(header, separators=(",", ":"))
    start, stop = header["ln_f.bias"]["data_offsets"]
    good = '"ln_f.bias":{"dtype":"F32","shape":[16],"data_offsets":[START,STOP]}'
    for part, changes in BAD_PARTS.items():
        for change in changes:
            changed = good.replace(part, change)
            numbered = [t.replace("START", str(start)) for t in (good, changed)]
            before, after = (t.replace("STOP", str(stop)) for t in numbered)
            assert text.count(before) == 1
            yield text.replace(before, after)


def bad_metadata(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    metadata = header["__metadata__"]
    bad: dict[str, list[Optional[str]]] = {
        "format": [None, "", "gguf", "tinygpt2\0"],
        "format_version": [None, "", "3", "2.0", "1"],
        "config": [None],
        "header_crc32": [None, "", "0000000", "000000000"],
    }
    for name, values in bad.items():
        for value in values:
            rest = {key: text for key, text in metadata.items() if key != name}
            changed = rest if value is None else {**rest, name: value}
            yield {**header, "__metadata__": changed}
    old = to_version_1(header)
    yield {**old, "__metadata__": {**old["__metadata__"], "header_crc32": "00000000"}}


def test_hostile_headers(either: Command, small_path: Path, tmp_path: Path) -> None:
    """The command refuses what the Python module refuses."""
    path = tmp_path / "bad.tg2"
    for content in (*BAD_CONTENTS, *(pack(text.encode(), b"1234", 1) for text in BAD_HEADERS)):
        assert not check_as_python(either, path, content), content[:200]
        message = either.error(1, "--model", path, "--ids", "1")
        assert "__metadata__ format:" not in message, "the text itself must be refused"
    header, data = unpack(small_path)
    for byte in (b"\n", b"\0", b"\x1f", b"\xff", b"\xc3", b"\xed\xa0\x80"):  # in an unused text
        changed_text = pack(header)[8:].replace(b'"crc32":"', b'"crc32":"' + byte).rstrip()
        assert not check_as_python(either, path, pack(changed_text, data)), byte
    for text in bad_parts(header):
        assert not check_as_python(either, path, pack(text.encode(), data)), text[-300:]
    for changed in bad_metadata(header):
        assert not check_as_python(either, path, pack(changed, data)), changed["__metadata__"]
    for content in bad_tensors(header, data):
        assert not check_as_python(either, path, content), unpack(path)
    for text in bad_configs(header):
        assert not check_as_python(either, path, pack(with_text(header, text), data)), text[:999]
    header = to_version_1(header)
    for text in bad_old_configs(header):
        assert not check_as_python(either, path, pack(with_text(header, text), data)), text[:999]


def test_good_values(either: Command, small_path: Path, tmp_path: Path) -> None:
    """Those at the ends of their ranges, and in all spellings of JSON."""
    header, data = unpack(small_path)
    for name, values in GOOD_VALUES.items():
        for value in values:
            changed = with_text(header, with_value(header, name, value))
            assert check_as_python(either, tmp_path / "good.tg2", pack(changed, data)), value


def test_unusual_but_good_headers(either: Command, small_path: Path, tmp_path: Path) -> None:
    """Names in another order, blanks, escapes, other metadata: all that JSON allows."""
    path = tmp_path / "good.tg2"
    header, data = unpack(small_path)
    version_1 = to_version_1(header)
    metadata = version_1["__metadata__"]
    config = json.loads(metadata["config"])
    backwards = {key: version_1[key] for key in reversed(version_1)}
    entries = {key: dict(reversed(value.items())) for key, value in backwards.items()}
    escaped = "".join(f"\\u{ord(c):04X}" if c.isalpha() else c for c in json.dumps(version_1))
    escaped = re.sub(r"\\\\u006E", r"\\n", escaped)
    other = {**metadata, "\U0001f600\ud800": '\\"\b\f\n\r\t/\x7f\u2028', "é": "", "config ": "{}"}
    spread = json.dumps(dict(reversed(config.items())), indent="\t")
    for text in (
        json.dumps(header, separators=(",", ":"), ensure_ascii=False),
        json.dumps(version_1, indent="\r\n\t "),
        json.dumps(backwards),
        json.dumps(entries),
        escaped,
        json.dumps({**version_1, "__metadata__": other}),
        json.dumps(with_text(version_1, spread)),
        json.dumps(version_1).replace("1e-05", "10.00E-6"),
    ):
        assert check_as_python(either, path, pack(text.encode(), data)), text[:999]
        line = ["--ids", "1 2", "--seed", 1, "--text"]
        assert either("--model", path, *line) == either("--model", small_path, *line)


def test_what_it_says_about_files(command: Command, small_path: Path, tmp_path: Path) -> None:
    """Each message names the file, the field, what was expected, and what was found."""
    path = tmp_path / "bad.tg2"
    header, data = unpack(small_path)
    config = header["__metadata__"]["config"]
    changes: list[tuple[Callable[[], bytes], str]] = [
        (lambda: b"\0", "header length: expected 8 bytes, found a file of 1 bytes"),
        (
            lambda: pack({**header, "\x7f" * 99: {}}, data),
            "tensor '" + "\\x7f" * 60 + "'... (99 bytes): expected dtype, ",
        ),
        (
            lambda: pack({**header, "ln_f.bias": {}}, data),
            "tensor 'ln_f.bias': expected dtype, shape and data_offsets, each once, found less",
        ),
        (
            lambda: pack({**header, "wte.weight": {**header["wte.weight"], "dtype": "I32"}}, data),
            "tensor wte.weight: expected F32 [17, 6, 16], found 'I32' [17, 6, 16]",
        ),
        (
            lambda: pack(header, data[:-64]),
            f"file size: expected {small_path.stat().st_size} bytes, as the header says, "
            f"found {small_path.stat().st_size - 64} bytes",
        ),
        (
            lambda: pack(header, data, shift=8),
            "tensor wte.weight: expected a start on 64 bytes, found byte ",
        ),
    ]
    for old, new, expected in (
        ('"n_head": 2', '"n_head": 4', "config n_head: expected a divisor of n_embd, found 4"),
        (
            '"n_layer": 1,',
            '"n_layer": "1",',
            "config n_layer: expected a whole number from 1 to 4096, found '\"1\"'",
        ),
        (
            '"n_layer": 1,',
            '"n_layer": 2,',
            "tensor h.1.ln_1.weight: expected F32 [16], found no such tensor",
        ),
        ('"n_head": 2, ', "", "config: expected exactly the known names, found missing n_head"),
    ):
        assert old in config
        content = pack(with_text(header, config.replace(old, new)), data)
        changes.append((lambda content=content: content, expected))  # type: ignore[misc]
    for write, expected in changes:
        path.write_bytes(write())
        message = command.error(1, "--model", path, "--ids", "1")
        assert message.startswith(f"{path}: {expected}")


def test_weights_that_are_not_finite(either: Command, small_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.tg2"
    header, data = unpack(small_path)
    weights = header["vocab.bytes"]["data_offsets"][0]
    path.write_bytes(pack(header, b"\xff" * weights + data[weights:]))
    message = either.error(1, "--model", path, "--ids", "1 2")
    assert message.startswith(f"{path}: NaN or infinite logits by position 1: ")


def test_cut_off_anywhere(either: Command, small_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.tg2"
    content = small_path.read_bytes()
    start = len(content) - len(unpack(small_path)[1])
    path.write_bytes(content)
    for length in sorted({*range(18), *range(0, start, 67), *range(start, len(content), 1999)})[
        ::-1
    ]:
        os.truncate(path, length)
        assert not either.accepts(path), length


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_every_change_of_a_header_is_found(
    command: Command, small_path: Path, tmp_path: Path
) -> None:
    """Its checksum covers it, and its length. Version 1 has none, and survives some changes."""
    path = tmp_path / "changed.tg2"
    content = small_path.read_bytes()
    start = len(content) - len(unpack(small_path)[1])
    checksum = content.index(b'"header_crc32":"')
    for place in (*range(9), *range(9, start, 23), *range(checksum, checksum + 26), start - 1):
        path.write_bytes(flipped(content, place, place % 8))
        assert not command.accepts(path), place


@pytest.mark.parametrize(
    "runs", [300, pytest.param(10_000, marks=pytest.mark.soak)], ids=["few", "many"]
)
def test_random_damage(
    request: pytest.FixtureRequest, small_path: Path, tmp_path: Path, runs: int
) -> None:
    """Headers with up to three changes, most of them in the configuration, of a right checksum.
    The many are read by the program that the sanitizers watch."""
    command: Command = request.getfixturevalue("command" if runs < 1000 else "sanitized")
    edits = [b"\0", b"\xff" * 4, b"9", b"-1", b'"', b"'", b"\\", b"{", b"}", b"[]", b",", b" "]
    choose = random.Random(runs)
    own = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "max_length": 7}
    path = tmp_path / "damaged.tg2"
    path.write_bytes(with_config(small_path, {"tokens_before": [264, 3], "generation": own}))
    header, data = unpack(path)
    contents = [pack(header, data), pack(to_version_1(header), data)]
    accepted = 0
    for run in range(runs):
        content = contents[run % 2]
        start = len(content) - len(data)
        text = bytearray(content[8:start])
        for _ in range(choose.randint(1, 3)):
            place = choose.randrange(choose.choice([1000, 1000, start - 8]))
            new = choose.choice([*edits, choose.randbytes(choose.randint(1, 8))])
            text[place : place + choose.choice([0, len(new), choose.randint(0, 99)])] = new
        accepted += check_as_python(command, path, pack(bytes(text), data))
    assert 0 < accepted < runs / 2


def test_memory_is_bounded(command: Command, tmp_path: Path) -> None:
    """Files that take no space on the disk, but claim a lot, in 300 MB of address space."""
    path = tmp_path / "m.tg2"
    limited = ["sh", "-c", 'ulimit -v 300000 && exec "$@"', "sh"]
    line = [*limited, *command.line("--model", path, "--ids", "1", "--max-tokens", 3)]

    path.write_bytes(struct.pack("<Q", 10**8))
    os.truncate(path, 10**8 + 9)  # a header of zeros
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert ": header: expected JSON in UTF-8 with '{' here, found " in done.stderr
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 10**8 + 1))
    expected = f"{path}: header length: expected at most 100000000, found 100000001"
    assert command.error(1, "--model", path, "--ids", "1") == expected

    tinygpt2.convert(write_checkpoint(tmp_path, MODELS["hardly a model"][1], tokenizer=False), path)
    header, _ = unpack(path)
    config = json.loads(header["__metadata__"]["config"])
    header["__metadata__"]["config"] = json.dumps({**config, "n_positions": 3_000_000})
    header["wpe.weight"]["shape"][0] = 3_000_000
    place = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 4 * int(np.prod(entry["shape"]))
            entry["data_offsets"] = [place, place + size]
            place += size
    path.write_bytes(pack(header))
    os.truncate(path, path.stat().st_size + place)
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tinygpt2: error: out of memory\n"
    assert command("--model", path, "--ids", "1", "--temperature", 0, "--max-tokens", 3).code == 0
