"""Section 10, the command line.

`run` starts a process, as a user does. That takes 0.1 to 0.2 s, so what does not depend on the
process itself (its streams, its signals, its end) is tested by `call`, in this process.
"""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO, Union

import pytest
from conftest import (
    ROOT,
    TOY,
    random_weights,
    read_safetensors,
    run_python,
    slow,
    toy_tokenizer,
    write_checkpoint,
)

import tinygpt2
from tinygpt2 import Model

SCRIPT = ROOT / "tinygpt2.py"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
ENVIRONMENT.update({"OPENBLAS_NUM_THREADS": "1", "TERM": "dumb"})
COMMANDS = ("convert", "download", "score", "info", "bench")
TIMEOUT = 30
Argument = Union[str, bytes, Path]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def command(*arguments: Argument) -> list[Argument]:
    return [sys.executable, SCRIPT, *arguments]


def run_command(
    line: list[Argument],
    stdin: bytes = b"",
    environ: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Result:
    done = subprocess.run(
        line,
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT,
        cwd=cwd,
        env={**ENVIRONMENT, **(environ or {})},
        check=False,
    )
    return Result(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))


def run(
    *arguments: Argument, stdin: bytes = b"", environ: Mapping[str, str] | None = None
) -> Result:
    return run_command(command(*arguments), stdin, environ)


def call(*arguments: Argument, stdin: bytes = b"") -> Result:
    """Run a command in this process, with streams of its own. An exception would come out here."""
    out = io.BytesIO()
    stdout = io.TextIOWrapper(out)
    result = call_into(stdout, arguments, stdin)
    stdout.flush()
    return result._replace(out=out.getvalue().decode("utf-8"))


def call_into(stdout: TextIO, arguments: Iterable[Argument], stdin: bytes = b"") -> Result:
    """The same with a given standard output."""
    err = io.BytesIO()
    stderr = io.TextIOWrapper(err)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        code = tinygpt2.main(list(map(os.fsdecode, arguments)))
    stderr.flush()
    return Result(code, "", err.getvalue().decode("utf-8"))


def check_failure(result: Result, code: int, *words: str) -> None:
    """One line says what is wrong; argparse shows the usage before it."""
    *usage, message = result.err.splitlines()
    assert message.startswith("tinygpt2")
    assert ": error: " in message
    assert not usage or usage[0].startswith("usage: tinygpt2")
    assert "Traceback" not in result.err
    for word in words:
        assert word.replace("-", "_") in message.replace("-", "_")
    assert (result.code, result.out) == (code, "")


@pytest.fixture(scope="module")
def speaker_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says nothing but ASCII letters, and can go on for long."""
    config = {**TOY, "n_positions": 8192}
    weights = random_weights(config)
    words = toy_tokenizer()[0].items()
    letters = [token for word, token in words if word.isascii() and word.isalpha()]
    weights["wte.weight"][:, 0] = 0
    weights["wte.weight"][letters, 0] = 1
    weights["ln_f.bias"][0] = 50  # is added to the logits of the letters
    folder = tmp_path_factory.mktemp("speaker")
    tinygpt2.convert(write_checkpoint(folder, config, weights), folder / "speaker.tg2")
    return folder / "speaker.tg2"


@pytest.fixture
def speaker(speaker_path: Path) -> Iterator[Model]:
    with tinygpt2.load(speaker_path) as model:
        yield model


# The answer

FILTERS = ["--top-k=0", "--top-p=0.9", "--min-p=0.01", "--repetition-penalty=1.5"]


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--seed", "1"], {"seed": 1}),
        (["--temperature", "0", "--max-tokens", "9"], {"temperature": 0, "max_new_tokens": 9}),
        (
            [*FILTERS, "--seed=-2", "--max-tokens=9"],
            {
                "top_k": 0,
                "top_p": 0.9,
                "min_p": 0.01,
                "repetition_penalty": 1.5,
                "seed": -2,
                "max_new_tokens": 9,
            },
        ),
        (["--max-tokens", "0"], {"max_new_tokens": 0}),
        (
            ["--backend", "numpy", "--threads", "1", "--seed", "3", "--max-tokens", "9"],
            {"seed": 3, "max_new_tokens": 9},
        ),
    ],
    ids=str,
)
def test_prompt_prints_the_answer_of_generate(
    toy: Model, toy_path: Path, flags: list[str], options: dict[str, Any]
) -> None:
    result = call("--model", toy_path, "--prompt", "The thing", *flags)
    assert result.out == toy.generate("The thing", **options) + "\n"
    assert result.code == 0


def test_a_process_prints_the_answer_too(toy: Model, toy_path: Path) -> None:
    flags = ["--seed=1", "--max-tokens=9"]
    result = run("--model", toy_path, "--prompt", "-", *flags, stdin="\ufeffThé thing\n".encode())
    expected = toy.generate("Thé thing", seed=1, max_new_tokens=9)
    assert result == (0, expected + "\n", "")


UTF_16, UTF_32 = (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF32_LE, "utf-32-le")
MARKS = [
    (codecs.BOM_UTF8, "utf-8"),
    UTF_16,
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    UTF_32,
    (codecs.BOM_UTF32_BE, "utf-32-be"),
]


@pytest.mark.table
@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        (b"The thing", "The thing"),
        (b"The thing\n", "The thing"),
        (b"The thing\r\n", "The thing"),
        (b"The\r\nthing\r", "The\r\nthing\r"),
        (b"\nThe thing\n\n", "\nThe thing\n"),
        ("é \U0001f600".encode(), "é \U0001f600"),
        (b"The\0thing\0", "The\0thing\0"),
        ("The \ufeff\ufffd".encode(), "The \ufeff\ufffd"),
        ("\ufeff\ufeffThe".encode(), "\ufeffThe"),
        (b"", ""),
        *((mark + "é \U0001f600\r\n".encode(code), "é \U0001f600") for mark, code in MARKS),
        *((mark, "") for mark, _ in MARKS),
    ],
    ids=ascii,
)
def test_prompt_from_standard_input(toy: Model, toy_path: Path, given: bytes, prompt: str) -> None:
    result = call("--model", toy_path, "--prompt", "-", "--seed=1", "--max-tokens=9", stdin=given)
    assert result == (0, toy.generate(prompt, seed=1, max_new_tokens=9) + "\n", "")


NOT_TEXT = [  # the bytes, what is read in place of the wrong ones, and what the error says
    (b"caf\xe9 noir", "caf\ufffd noir", ["UTF-8", "byte 0xe9 at offset 3"]),
    (b"The \xff\xc3", "The \ufffd\ufffd", ["UTF-8", "byte 0xff at offset 4"]),
    (b"caf\xc3", "caf\ufffd", ["UTF-8", "byte 0xc3 at offset 3"]),
    (b"\xef\xbb\xbfa\x80", "a\ufffd", ["UTF-8", "byte 0x80 at offset 4"]),
    (b"a\xed\xa0\x80", "a\ufffd\ufffd\ufffd", ["UTF-8", "byte 0xed at offset 1"]),
]
NOT_TEXT_IN_A_FILE = [
    (UTF_16[0] + b"a\0b", "a\ufffd", ["UTF-16-LE", "byte 0x62 at offset 4"]),
    (UTF_16[0] + b"a\0\0\xdcb\0", "a\ufffdb", ["UTF-16-LE", "byte 0x00 at offset 4"]),
    (UTF_32[0] + b"a\0\0\0\0\0\xff\0", "a\ufffd", ["UTF-32-LE", "byte 0x00 at offset 8"]),
    ("The".encode("utf-16-le"), "T\0h\0e\0", ["null byte", "UTF-16 without a byte order mark"]),
    ("The".encode("utf-16-be"), "\0T\0h\0e", ["null byte", "UTF-16 without a byte order mark"]),
]


@pytest.mark.table
@pytest.mark.parametrize(("given", "replaced", "words"), NOT_TEXT + NOT_TEXT_IN_A_FILE, ids=ascii)
def test_bytes_that_are_no_text(
    toy: Model, toy_path: Path, given: bytes, replaced: str, words: list[str]
) -> None:
    flags = ["--prompt", "-", "--errors", "replace"]
    for command in ([], ["score"]):
        result = call(*command, "--model", toy_path, *flags[:2], stdin=given)
        check_failure(result, 2, "standard input: expected UTF-", *words, "`--errors replace`")
    result = call("--model", toy_path, *flags, "--seed=1", "--max-tokens=9", stdin=given)
    assert result == (0, toy.generate(replaced, seed=1, max_new_tokens=9) + "\n", "")
    for line in (["score", *flags], [*flags, "score"]):
        result = call(*line, "--model", toy_path, "--json", stdin=given)
        assert (result.code, json.loads(result.out)["ids"]) == (0, toy.encode(replaced))


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("é".encode(), "é"),
        ("\ufeffThe".encode(), "The"),
        (b"", ""),
        (b"--seed", "--seed"),
        (b"- a list", "- a list"),
    ],
    ids=ascii,
)
def test_prompt_from_strange_arguments(
    toy: Model, toy_path: Path, given: bytes, prompt: str
) -> None:
    result = call("--model", toy_path, b"--prompt=" + given, "--seed", "1", "--max-tokens", "9")
    assert result == (0, toy.generate(prompt, seed=1, max_new_tokens=9) + "\n", "")


@pytest.mark.parametrize(
    ("given", "replaced", "words"),
    [*NOT_TEXT, (UTF_16[0] + b"The", "\ufffd\ufffdThe", ["UTF-8", "byte 0xff at offset 0"])],
    ids=ascii,
)
def test_arguments_that_are_no_text(
    toy: Model, toy_path: Path, given: bytes, replaced: str, words: list[str]
) -> None:
    """The second half of a surrogate pair alone is what Python makes of a byte."""
    prompt = b"--prompt=" + given
    check_failure(call("--model", toy_path, prompt), 2, "--prompt: expected UTF-8", *words)
    check_failure(call("score", "--model", toy_path, prompt), 2, "--prompt: expected", *words)
    stop = b"--stop=" + given
    check_failure(call("--model", toy_path, "--prompt=a", stop), 2, "--stop: expected", *words)
    flags = ["--errors=replace", "--seed=1", "--max-tokens=9"]
    result = call("--model", toy_path, prompt, *flags)
    assert result == (0, toy.generate(replaced, seed=1, max_new_tokens=9) + "\n", "")


def test_half_a_surrogate_pair_as_an_argument(
    toy: Model, toy_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows allows it."""
    line = ["--model", str(toy_path), "--prompt", "a\ud83d", "--max-tokens=0"]
    assert tinygpt2.main(line) == 2
    assert "byte 0xed at offset 1" in capsys.readouterr().err
    assert tinygpt2.main([*line, "--errors", "replace"]) == 0


@pytest.mark.parametrize(
    ("given", "stdin"),
    [
        ("5 6 7", b""),
        ("5,6, 7", b""),
        ("\ufeff5 6 7", b""),
        ("-", b"5 6\n7\n"),
        *(("-", mark + "5,6\r\n7".encode(code)) for mark, code in MARKS),
    ],
    ids=ascii,
)
def test_ids_print_ids(toy: Model, toy_path: Path, given: str, stdin: bytes) -> None:
    flags = ["--seed", "1", "--max-tokens", "9"]
    result = call("--model", toy_path, "--ids", given, *flags, stdin=stdin)
    expected = toy.generate_ids([5, 6, 7], seed=1, max_new_tokens=9)
    assert [int(part) for part in result.out.split()] == expected
    assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)


def test_ids_print_text_if_asked(toy: Model, toy_path: Path) -> None:
    result = call("--model", toy_path, "--ids=5 6", "--text", "--seed=1", "--max-tokens=9")
    assert result == (0, toy.generate([5, 6], seed=1, max_new_tokens=9) + "\n", "")


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    tinygpt2.convert(write_checkpoint(tmp_path, tokenizer=False), tmp_path / "m.tg2")
    flags = ["--max-tokens", "4", "--temperature", "0"]
    result = call("--model", tmp_path / "m.tg2", "--ids", "5 6", *flags)
    with tinygpt2.load(tmp_path / "m.tg2") as model:
        expected = model.generate_ids([5, 6], max_new_tokens=4, temperature=0)
    assert len(expected) == 4
    assert [int(word) for word in result.out.split()] == expected
    assert (result.code, result.err) == (0, "")
    check_failure(call("--model", tmp_path / "m.tg2", "--prompt", "a"), 2, "no tokenizer", "--ids")


def test_stop_texts(speaker: Model, speaker_path: Path) -> None:
    whole = speaker.generate("The", seed=1, max_new_tokens=30)
    stops = [whole[9:12], whole[5:8]]
    flags = ["--prompt", "The", "--seed", "1", "--stop", stops[0], "--stop", stops[1]]
    result = call("--model", speaker_path, *flags)
    assert result == (0, whole[: min(map(whole.index, stops))] + "\n", "")


def test_json_is_one_object(toy: Model, toy_path: Path) -> None:
    result = call("--model", toy_path, "--prompt=The", "--seed=3", "--max-tokens=9", "--json")
    found = json.loads(result.out)
    figures = found.pop("figures")
    assert found == {
        "text": toy.generate("The", seed=3, max_new_tokens=9),
        "ids": toy.generate_ids("The", seed=3, max_new_tokens=9),
        "finish_reason": "length",
        "seed": 3,
    }
    assert figures["prompt_tokens"] == len(toy.encode("The"))
    assert figures["new_tokens"] == 9
    assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)


def test_json_of_ids_without_a_seed(toy: Model, toy_path: Path) -> None:
    found = json.loads(call("--model", toy_path, "--ids=5 6", "--max-tokens=9", "--json").out)
    assert found["text"] is None
    assert found["ids"] == toy.generate_ids([5, 6], max_new_tokens=9, seed=found["seed"])


def test_stats_go_to_standard_error(toy: Model, toy_path: Path) -> None:
    result = call("--model", toy_path, "--prompt=The", "--seed=1", "--max-tokens=9", "--stats")
    assert (result.code, result.out) == (0, toy.generate("The", seed=1, max_new_tokens=9) + "\n")
    names = [line.partition(":")[0] for line in result.err.splitlines()]
    assert names == [
        "prompt_tokens",
        "new_tokens",
        "seconds_to_first_token",
        "tokens_per_second",
        "peak_memory_mb",
        "backend",
    ]


def test_figures_of_an_answer(toy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on a quarter of a second at each look, of which each token has one."""
    clock = itertools.count(100.0, 0.25)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    flags = ["--prompt=The", "--seed=3", "--max-tokens=9"]
    figures = json.loads(call("--model", toy_path, *flags, "--json").out)["figures"]
    peak = figures.pop("peak_memory_mb")
    assert figures == {
        "prompt_tokens": 2,
        "new_tokens": 9,
        "seconds_to_first_token": 0.25,
        "tokens_per_second": 4.0,
    }
    assert peak == pytest.approx(tinygpt2.peak_memory(), rel=0.1)
    shown = dict(
        line.split(": ") for line in call("--model", toy_path, *flags, "--stats").err.splitlines()
    )
    assert shown["tokens_per_second"] == "4.0"
    assert shown["peak_memory_mb"] == str(tinygpt2.peak_memory())


def test_figures_of_speed() -> None:
    """The first token waits for the prompt; the speed is that of the tokens after it."""
    figures = tinygpt2.speed(7, [10.0, 12.0, 12.25, 12.5, 13.0])
    assert figures["seconds_to_first_token"] == 2.0
    assert figures["tokens_per_second"] == 3.0
    none, one = tinygpt2.speed(7, [10.0]), tinygpt2.speed(7, [10.0, 10.5])
    assert (none["new_tokens"], none["seconds_to_first_token"]) == (0, None)
    assert (one["new_tokens"], one["seconds_to_first_token"]) == (1, 0.5)
    assert none["tokens_per_second"] is one["tokens_per_second"] is None


@pytest.mark.slow
def test_peak_memory() -> None:
    """It is that of the process: it grows with what is used, and the parent's does not count."""
    if tinygpt2.peak_memory() is None:
        pytest.skip("this system does not tell")
    ours = b"\1" * 300_000_000
    code = "import tinygpt2; print(tinygpt2.peak_memory()); block = b'\\1' * 200_000_000"
    done = run_python(f"{code}; print(tinygpt2.peak_memory())")
    before, after = map(float, done.stdout.split())
    assert 1 < before < len(ours) / 2e6
    assert 200 < after < before + 210


def test_a_full_context_is_noted(toy: Model, toy_path: Path) -> None:
    seeds = range(100)
    lengths = (len(toy.generate_ids([1], seed=seed)) for seed in seeds)
    seed = next(seed for seed, length in zip(seeds, lengths) if length == TOY["n_positions"])
    result = call("--model", toy_path, "--ids", "1", "--seed", str(seed))
    assert len(result.out.split()) == TOY["n_positions"]
    assert result.code == 0
    assert result.err == "tinygpt2: stopped: all 64 positions of the context are used\n"


@pytest.mark.parametrize(
    "environ",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_output_is_utf_8_in_every_locale(
    toy: Model, toy_path: Path, environ: dict[str, str]
) -> None:
    answer = toy.generate("é", seed=1, max_new_tokens=40)
    assert not answer.isascii()
    flags: list[Argument] = ["--prompt", "é".encode(), "--seed", "1", "--max-tokens", "40"]
    result = run("--model", toy_path, *flags, environ=environ)
    assert result == (0, answer + "\n", "")


# Wrong usage: 2, and what is wrong


@pytest.mark.table
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--max-tokens", value) for value in ("x", "-1", "1.5", "")),
        *(("--temperature", value) for value in ("x", "-1", "nan", "inf")),
        *(("--top-k", value) for value in ("x", "-1", "1.5")),
        *(("--top-p", value) for value in ("x", "0", "1.1")),
        *(("--min-p", value) for value in ("x", "-0.1", "1.1")),
        *(("--repetition-penalty", value) for value in ("x", "0", "nan")),
        *(("--seed", value) for value in ("x", "1.5")),
        ("--stop", ""),
        *(("--threads", value) for value in ("x", "0", "-1")),
        ("--backend", "cuda"),
    ],
)
def test_a_wrong_value_is_named(toy_path: Path, flag: str, value: str) -> None:
    check_failure(call("--model", toy_path, "--prompt", "a", f"{flag}={value}"), 2, flag[2:])


@pytest.mark.table
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--ids", "1 x"], "whole numbers"),
        (["--ids", "1 300"], "position 1"),
        (["--ids=-1"], "position 0"),
        (["--ids", "1.0"], "whole numbers"),
        (["--prompt", "a", "--ids", "1"], "not allowed with"),
        (["--prompt"], "--prompt"),
        (["--prompt", "a" * 65], "at most 64 tokens"),
        (["--ids", "7 " * 65, "--text"], "at most 64 tokens"),
        (["--ids", "9" * 5000], "whole numbers"),
        (["--ids", "\udce9"], "whole numbers"),
        (["--prompt", "a", "--top-k=-1"], "--top-k: expected a whole number from 0"),
        (["--prompt", "a", "--max-tokens=-1"], "--max-tokens: expected a whole number from 0"),
        (["--prompt", "a", "--threads=257"], "threads: expected"),
        (["--frobnicate"], "--frobnicate"),
        ([], "no prompt"),
    ],
    ids=ascii,
)
def test_wrong_usage(toy_path: Path, arguments: list[str], word: str) -> None:
    check_failure(call("--model", toy_path, *arguments), 2, word)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["frobnicate"], "argument COMMAND"),
        (["convert"], "source"),
        (["convert", "somewhere"], "--out"),
        (["download"], "name"),
        (["score"], "no text"),
        (["score", "--ids", "x"], "whole numbers"),
        (["info", "--frobnicate"], "--frobnicate"),
        (["bench", "--runs", "x"], "--runs"),
        (["bench", "--runs", "0"], "--runs: expected a number from 1, found 0"),
        (["bench", "--max-tokens", "-1"], "--max-tokens: expected a number from 1, found -1"),
    ],
    ids=ascii,
)
def test_wrong_usage_of_commands(toy_path: Path, arguments: list[str], word: str) -> None:
    model: list[Argument] = ["--model", toy_path] if arguments[0] in ("score", "bench") else []
    check_failure(call(*arguments, *model), 2, word)


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=str)
def test_help(arguments: list[str]) -> None:
    result = call(*arguments, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(" ".join(["usage: tinygpt2", *arguments, "["]))
    names = COMMANDS if not arguments else ()
    assert all(name in result.out for name in names)


def test_version() -> None:
    assert call("--version") == (0, f"tinygpt2 {tinygpt2.__version__}\n", "")


# Failures: 1, and why


def damaged(toy_path: Path, folder: Path, how: str) -> Path:
    data = toy_path.read_bytes()
    contents = {
        "empty": b"",
        "short": data[:5],
        "no header": b"\xff" * 100,
        "cut": data[:-100],
        "longer": data + b"\0",
        "other bytes": data[:100] + b"\0" + data[101:],
    }
    path = folder / "damaged.tg2"
    path.write_bytes(contents[how])
    return path


@pytest.mark.parametrize("how", ["empty", "short", "no header", "cut", "longer", "other bytes"])
def test_a_damaged_model_file(toy_path: Path, tmp_path: Path, how: str) -> None:
    path = damaged(toy_path, tmp_path, how)
    result = call("--model", path, "--prompt", "a")
    check_failure(result, 1, str(path), "expected", "found")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--prompt", "a"], ["score", "--prompt", "a"], ["info"], ["info", "--verify"], ["bench"]],
    ids=str,
)
def test_a_model_file_that_is_not_there(tmp_path: Path, arguments: list[str]) -> None:
    for path in (tmp_path / "missing.tg2", tmp_path, Path(os.devnull), tmp_path / ("n" * 300)):
        check_failure(call(*arguments, "--model", path), 1, str(path))


@pytest.mark.skipif(tinygpt2.library_path() is None, reason="NumPy reads neither variable")
@pytest.mark.parametrize("name", ["TINYGPT2_THREADS", "TINYGPT2_ISA"])
def test_a_wrong_variable_is_named(
    toy_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "x")
    for arguments in (["--prompt", "a"], ["score", "--prompt", "a"], ["bench"]):
        check_failure(call("--model", toy_path, *arguments), 2, f"{name}: expected")


def test_a_checkpoint_is_not_a_model_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    result = call("--model", folder / "model.safetensors", "--prompt", "a")
    check_failure(result, 1, "convert")


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    weights = random_weights(TOY)
    weights["ln_f.weight"][:] = 3e38
    tinygpt2.convert(write_checkpoint(tmp_path, weights=weights), tmp_path / "m.tg2")
    result = call("--model", tmp_path / "m.tg2", "--prompt", "a")
    check_failure(result, 1, "NaN or infinite")
    assert result.err.count("\n") == 1


def test_without_the_default_model_it_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path)
    line: list[Argument] = [sys.executable, "tinygpt2.py"]
    result = run_command([*line, "--prompt", "a"], cwd=tmp_path)
    check_failure(result, 1, "default model", "tales.tg2", "name a .tg2 file")
    if tinygpt2.library_path():
        shutil.copy(tinygpt2.library_path() or "", tmp_path)
        result = run_command([*line, "info", "--system"], cwd=tmp_path)
        assert (result.code, result.err) == (0, "")
        assert "not checked: no default model; name a .tg2 file" in result.out


@pytest.mark.slow
def test_the_converter_raises_errors_of_the_running_module(tmp_path: Path) -> None:
    """That module is called __main__ here: a second one would have other classes of errors."""
    line = command("download", "../up", "-o", "x")
    check_failure(run_command(line, cwd=tmp_path), 2, "model name: expected")


def test_the_default_model() -> None:
    if not (ROOT / "vendor" / "tales.tg2").exists():
        pytest.skip("needs the default model in vendor/")
    with tinygpt2.load() as model:
        expected = model.generate("Once upon a time", seed=1, max_new_tokens=9)
    result = call("--prompt", "Once upon a time", "--seed", "1", "--max-tokens", "9")
    assert result == (0, expected + "\n", "")


WITHOUT_NUMPY = """
import runpy, sys
sys.modules["numpy"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_numpy(*arguments: Argument) -> Result:
    return run_command([sys.executable, "-c", WITHOUT_NUMPY, SCRIPT, *arguments])


def test_without_numpy_it_says_what_to_install(toy_path: Path) -> None:
    result = run_without_numpy("--model", toy_path, "--prompt", "a", "--backend", "numpy")
    check_failure(result, 1, "pip install numpy")


@pytest.mark.slow
def test_without_numpy_only_some_commands_work(toy_path: Path, tmp_path: Path) -> None:
    result = run_without_numpy("convert", tmp_path, "-o", tmp_path / "x")
    check_failure(result, 1, "pip install numpy")
    assert run_without_numpy("info", "--verify", "--model", toy_path).code == 0


@pytest.mark.skipif(tinygpt2.library_path() is None, reason="needs the kernels")
@pytest.mark.parametrize("options", [(), ("--temperature", "0"), ("--top-k", "0", "--json")])
def test_the_kernels_need_no_numpy(toy_path: Path, options: tuple[str, ...]) -> None:
    asked: list[Argument] = ["--model", toy_path, "--prompt", "a", "--seed", "1", *options]
    with_numpy, without = call(*asked), run_without_numpy(*asked)
    assert (without.code, without.err) == (0, with_numpy.err)
    if "--json" not in options:  # its figures differ
        assert without.out == with_numpy.out


@pytest.mark.skipif(tinygpt2.library_path() is None, reason="needs the kernels")
def test_score_needs_no_numpy(toy_path: Path) -> None:
    asked: list[Argument] = ["score", "--model", toy_path, "--prompt", "abc"]
    assert run_without_numpy(*asked) == call(*asked)


# Streams that are closed, full or cut off


ANSWERS = [
    ["--prompt", "a", "--seed", "1", "--max-tokens", "9"],
    ["--prompt", "a", "--seed", "1", "--max-tokens", "9", "--json"],
    ["score", "--prompt", "a"],
    ["info"],
    ["--help"],
    ["--version"],
]
PROCESSES = [ANSWERS[0], ["--help"]]  # they show what happens when Python itself ends


def with_model(arguments: list[str], toy_path: Path) -> list[str]:
    needs_none = arguments[0] in ("--help", "--version")
    return arguments if needs_none else [*arguments, "--model", str(toy_path)]


def run_into(target: int, arguments: list[str]) -> Result:
    """Run a command whose standard output is an open file."""
    done = subprocess.run(
        command(*arguments),
        stdout=target,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT,
        env=ENVIRONMENT,
        check=False,
    )
    return Result(done.returncode, "", done.stderr.decode())


def test_an_answer_that_nobody_reads_is_no_error(toy_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in ANSWERS:
        with open(os.dup(writer), "w") as out:
            assert call_into(out, with_model(arguments, toy_path)) == (0, "", "")
    os.close(writer)


@pytest.mark.parametrize("arguments", PROCESSES, ids=str)
@pytest.mark.slow
def test_a_process_whose_answer_nobody_reads(toy_path: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert run_into(writer, with_model(arguments, toy_path)) == (0, "", "")
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error(toy_path: Path) -> None:
    for arguments in ANSWERS:
        with open("/dev/full", "w") as full:
            result = call_into(full, with_model(arguments, toy_path))
        check_failure(result, 1, "No space left")
        assert result.err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", PROCESSES, ids=str)
@pytest.mark.slow
def test_a_process_that_writes_to_a_full_disk(toy_path: Path, arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = run_into(full.fileno(), with_model(arguments, toy_path))
    check_failure(result, 1, "No space left")
    assert result.err.count("\n") == 1


def start(*arguments: Argument) -> subprocess.Popen[bytes]:
    """A process that can be interrupted, even where these tests themselves ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command(*arguments),
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )
    finally:
        signal.signal(signal.SIGINT, before)


# What Python has in place of a stream that was closed before it started is None.
CLOSED = {"<&-": "stdin", ">&-": "stdout", "2>&-": "stderr"}


def call_without(stream: str, *arguments: Argument) -> Result:
    """Run a command in this process, without one of the streams."""
    out, err = io.BytesIO(), io.BytesIO()
    streams = {
        "stdin": io.TextIOWrapper(io.BytesIO()),
        "stdout": io.TextIOWrapper(out),
        "stderr": io.TextIOWrapper(err),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in streams.items():
            patch.setattr(sys, name, None if name == stream else value)
        code = tinygpt2.main(list(map(os.fsdecode, arguments)))
        if stream == "stderr":
            sys.stderr.close()  # main has opened one that leads nowhere
    for value in streams.values():
        value.flush()
    return Result(code, out.getvalue().decode("utf-8"), err.getvalue().decode("utf-8"))


LONG = ["--prompt", "The", "--max-tokens", "8000", "--seed", "1"]


@pytest.mark.slow
def test_a_reader_who_leaves_half_way_ends_it_quietly(speaker_path: Path) -> None:
    with start("--model", speaker_path, *LONG) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(TIMEOUT) == 0


def test_ctrl_c_ends_it_quietly(speaker_path: Path) -> None:
    with start("--model", speaker_path, *LONG) as process:
        assert process.stdout
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
    assert len(out) < 4000  # of 8000 tokens: the first ones came while others were computed
    assert (process.returncode, err) == (130, b"")


@pytest.mark.parametrize(
    ("redirection", "arguments", "code", "error"),
    [
        ("<&-", ["--prompt", "-"], 2, "standard input"),
        ("<&-", [], 2, "no prompt"),
        ("<&-", ["--prompt", "a"], 0, ""),
        (">&-", ["--prompt", "a"], 1, "standard output"),
        ("2>&-", ["--prompt", "a"], 0, ""),
        ("2>&-", ["--prompt", "a", "--top-k=-1"], 2, ""),
        ("2>&-", ["score", "--prompt", "a"], 0, ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["called", *slow("as a process")])
def test_closed_streams(
    toy_path: Path, redirection: str, arguments: list[str], code: int, error: str, how: str
) -> None:
    short = [] if arguments[:1] == ["score"] else ["--seed", "1", "--max-tokens", "9"]
    if how == "called":
        result = call_without(CLOSED[redirection], *arguments, *short, "--model", toy_path)
    else:
        line = command(*arguments, *short, "--model", toy_path)
        result = run_command(["sh", "-c", f'exec "$@" {redirection}', "sh", *line])
    if error:
        check_failure(result, code, error)
    else:
        assert (result.code, result.err) == (code, "")
        assert bool(result.out) == (code == 0)  # an error message never goes to standard output


def test_a_process_with_a_closed_output_says_so(toy_path: Path) -> None:
    """It is Python that makes None of a closed stream."""
    line = command("--prompt", "a", "--model", toy_path)
    check_failure(run_command(["sh", "-c", 'exec "$@" >&-', "sh", *line]), 1, "standard output")


# Other ways to start it


def test_python_m(toy: Model, toy_path: Path) -> None:
    flags: list[Argument] = ["--prompt", "The", "--seed", "1", "--max-tokens", "9"]
    result = run_command([sys.executable, "-m", "tinygpt2", "--model", toy_path, *flags])
    assert result == (0, toy.generate("The", seed=1, max_new_tokens=9) + "\n", "")


def interpreters() -> list[str]:
    """TINYGPT2_PYTHONS names them; otherwise this one and those of pyenv."""
    named = os.environ.get("TINYGPT2_PYTHONS")
    if named:
        return named.split(os.pathsep)
    versions = os.path.expanduser("~/.pyenv/versions")
    found = [path for v in ("3.9", "3.1?") for path in glob.glob(f"{versions}/{v}.*/bin/python")]
    this = f"/{sys.version_info.major}.{sys.version_info.minor}."
    return [sys.executable, *sorted(path for path in found if this not in path)]


@pytest.mark.parametrize("python", interpreters())
@pytest.mark.slow
def test_the_file_alone_runs(python: str, toy: Model, toy_path: Path, tmp_path: Path) -> None:
    """Copied with a model into an empty folder, in every Python that is there."""
    has_numpy = subprocess.run([python, "-c", "import numpy"], capture_output=True, check=False)
    if has_numpy.returncode:
        pytest.skip(f"{python} has no NumPy")
    shutil.copy(SCRIPT, tmp_path)
    shutil.copy(toy_path, tmp_path / "toy.tg2")
    run_alone: list[Argument] = [python, "-W", "error", "tinygpt2.py", "--model", "toy.tg2"]
    flags: list[Argument] = ["--prompt", "The é", "--seed", "1", "--max-tokens", "20"]
    result = run_command([*run_alone, *flags], cwd=tmp_path)
    # Other versions of NumPy sum in another order; a choice that hangs on the last bit is unlikely.
    assert result == (0, toy.generate("The é", seed=1, max_new_tokens=20) + "\n", "")
    wrong = run_command([*run_alone, "--prompt", "a", "--top-k=x"], cwd=tmp_path)
    check_failure(wrong, 2, "--top-k")
    write_checkpoint(tmp_path / "checkpoint")
    convert: list[Argument] = [python, "-W", "error", "tinygpt2.py", "convert", "checkpoint"]
    download: list[Argument] = [python, "-W", "error", "tinygpt2.py", "download", "gpt2"]
    for line in ([*convert, "-o", "again.tg2"], download):
        alone = run_command(line, cwd=tmp_path)
        check_failure(alone, 1, "vendor/convert.py", "copy the project's vendor/convert.py there")
    (tmp_path / "vendor").mkdir()
    shutil.copy(ROOT / "vendor" / "convert.py", tmp_path / "vendor")
    assert run_command([*convert, "-o", "again.tg2"], cwd=tmp_path) == (0, "", "")
    assert (tmp_path / "again.tg2").read_bytes() == toy_path.read_bytes()


# The other commands


def test_options_count_before_a_command_too(toy_path: Path) -> None:
    before = call("--model", toy_path, "score", "--prompt", "The")
    assert before == call("score", "--model", toy_path, "--prompt", "The")
    assert before.code == 0


def test_convert(toy_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tg2"
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    assert call("convert", checkpoint, "-o", out) == (0, "", "")
    assert out.read_bytes() == toy_path.read_bytes()
    (checkpoint / "merges.txt").unlink()
    check_failure(call("convert", checkpoint, "-o", out), 1, "vocab.json", "merges.txt")
    check_failure(call("convert", tmp_path / "missing", "-o", out), 1, "missing")
    missing = tmp_path / "missing" / "out.tg2"
    check_failure(call("convert", toy_path.parent / "checkpoint", "-o", missing), 1, str(missing))
    assert out.read_bytes() == toy_path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out.tg2"]


def test_info(toy_path: Path) -> None:
    result = call("info", "--model", toy_path)
    lines = [line.split() for line in result.out.splitlines()]
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        assert [name, str(TOY[name])] in lines
    weights = [array for array in read_safetensors(toy_path)[1].values() if array.dtype == "<f4"]
    count = f"{sum(array.size for array in weights):,}"
    assert ["weights", count, "float32,", "padding", "included"] in lines
    tensors = [line[0] for line in lines[lines.index([]) + 2 :]]
    assert tensors[:3] == ["wte.weight", "wpe.weight", "h.0.ln_1.weight"]
    assert (result.code, result.err) == (0, "")


def test_info_verify(toy_path: Path, tmp_path: Path) -> None:
    result = call("info", "--verify", "--model", toy_path)
    assert result.code == 0
    assert result.err.startswith("verified: ")
    data = bytearray(toy_path.read_bytes())
    data[len(data) // 2] ^= 1  # a weight that is only a little different
    path = tmp_path / "m.tg2"
    path.write_bytes(data)
    assert call("info", "--model", path).code == 0
    check_failure(call("info", "--verify", "--model", path), 1, str(path), "CRC-32")


def test_score(toy: Model, toy_path: Path) -> None:
    score = toy.score("The thing é")
    expected = {
        "tokens": len(score.ids),
        "logprob": score.total,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    result = call("score", "--model", toy_path, "--prompt", "The thing é")
    found = dict(line.split(": ") for line in result.out.splitlines())
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    assert (result.code, result.err) == (0, "")
    given = "The thing é\n".encode()
    result = call("score", "--model", toy_path, "--prompt", "-", "--json", stdin=given)
    found = json.loads(result.out)
    assert found.pop("ids") == score.ids
    assert found.pop("logprobs") == pytest.approx(score.logprobs)
    assert found == pytest.approx(expected)


def test_score_of_nothing(toy_path: Path) -> None:
    found = json.loads(call("score", "--model", toy_path, "--prompt", "", "--json").out)
    assert (found["tokens"], found["perplexity"]) == (0, None)


def test_bench(toy_path: Path) -> None:
    result = call("bench", "--model", toy_path, "--max-tokens", "2", "--runs", "1")
    assert (result.code, result.err) == (0, "")
    prompt, decoding = result.out.splitlines()
    assert prompt.startswith("prompt of 62 tokens: ")
    assert decoding.startswith("decoding after it: ")


def test_figures_of_bench(
    toy: Model, toy_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three runs by a clock: prompts of 62 tokens in 1, 2, 31 s, then two tokens in 1, 4, 8 s."""
    clock = iter([0.0, 1.0, 2.0, 2.0, 4.0, 8.0, 8.0, 39.0, 47.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert tinygpt2.main(["bench", "--model", str(toy_path), "--max-tokens=2", "--runs=3"]) == 0
    name = toy.backend.name
    assert capsys.readouterr().out.splitlines() == [
        f"prompt of 62 tokens: 31.0 tokens/s ({name})",
        f"decoding after it: 0.5 tokens/s ({name})",
    ]


def test_wrong_kernels_are_noticed(toy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """info --system compares C with NumPy; here NumPy is made a little wrong."""
    if tinygpt2.library_path() is None:
        pytest.skip("needs the C kernels: `python build.py`")
    if not tinygpt2.__file__.endswith(".py"):
        pytest.skip("the functions of a compiled module cannot be replaced")
    with tinygpt2.load(toy_path, backend="c") as model:
        assert tinygpt2.compare_backends(model).startswith("right: ")
        exact = tinygpt2.gelu_new
        monkeypatch.setattr(tinygpt2, "gelu_new", lambda x: exact(x) + 0.001)
        with pytest.raises(
            tinygpt2.TinyGPT2Error, match=r"kernels: off by .* of the largest logit"
        ):
            tinygpt2.compare_backends(model)


@pytest.mark.parametrize(("error", "is_right"), [(0.0, True), (9e-5, True), (1.1e-4, False)])
def test_the_comparison_allows_what_float32_explains(
    toy_path: Path, error: float, is_right: bool
) -> None:
    """A stand-in for a model in C, with a known error in one logit."""
    if not tinygpt2.__file__.endswith(".py"):
        pytest.skip("a compiled module takes nothing that stands in for a model")

    def logits(ids: list[int]) -> Any:
        rows = reference.logits(ids)
        rows[-1, -1] += error * abs(rows).max()
        return rows

    with tinygpt2.load(toy_path, backend="numpy") as reference:
        wrong: Any = SimpleNamespace(path=toy_path, config=reference.config, logits=logits)
        if is_right:
            assert tinygpt2.compare_backends(wrong).startswith("right: ")
        else:
            with pytest.raises(tinygpt2.TinyGPT2Error, match="kernels: off by 1e-04"):
                tinygpt2.compare_backends(wrong)


def test_info_system(toy_path: Path, tmp_path: Path) -> None:
    """It names what computes, and compares it with NumPy on the model that is named."""
    result = call("info", "--system", "--model", toy_path)
    facts = dict(line.split("  ", 1) for line in result.out.splitlines())
    assert (result.code, result.err) == (0, "")
    assert facts["tinygpt2"].strip().startswith(f"{tinygpt2.__version__}, ")
    if tinygpt2.library_path() is None:
        assert "`python build.py` makes" in facts["kernels"]
    else:
        assert facts["kernels"].strip() == tinygpt2.library_path()
        assert facts["c against numpy"].strip().startswith("right: ")
        missing = str(tmp_path / "missing.tg2")
        check_failure(call("info", "--system", missing), 1, missing)


# At a terminal


class Terminal:
    """The command line at a terminal of its own."""

    def __init__(self, *arguments: Argument, environ: Mapping[str, str] | None = None) -> None:
        spawn = (
            "import os, pty, signal, sys\n"
            "signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job may ignore it\n"
            "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", spawn, *command(*arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**ENVIRONMENT, **(environ or {})},
        )
        assert self.process.stdin
        assert self.process.stdout
        self.keyboard, self.screen = self.process.stdin, self.process.stdout
        self.unread = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.keyboard.close()
        self.screen.close()

    def type(self, text: str) -> None:
        self.keyboard.write(text.encode("utf-8", "surrogateescape"))
        self.keyboard.flush()

    def until(self, text: str) -> str:
        """Read what is shown up to `text`; what comes before it."""
        while text.encode() not in self.unread:
            self.read()
        before, _, self.unread = self.unread.partition(text.encode())
        return before.decode("utf-8", "replace").replace("\r\n", "\n")

    def read(self) -> None:
        readable = select.select([self.screen], [], [], TIMEOUT)[0]
        block = os.read(self.screen.fileno(), 1 << 16) if readable else b""
        assert block, f"nothing more came after {self.unread!r}"
        self.unread += block

    def leave(self) -> tuple[int, str]:
        """The exit code, and what was shown at the end."""
        rest, _ = self.process.communicate(timeout=10)
        return self.process.returncode, (self.unread + rest).decode("utf-8", "replace")


CTRL_C, CTRL_D = "\x03", "\x04"
needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


@needs_pty
def test_a_conversation(speaker: Model, speaker_path: Path) -> None:
    options: dict[str, Any] = {"seed": 1, "max_new_tokens": 8}
    with Terminal("--model", speaker_path, "--seed", "1", "--max-tokens", "8") as terminal:
        assert "Ctrl-C stops an answer, Ctrl-D leaves" in terminal.until("> ")
        with speaker.session() as session:
            session.feed("The")
            for typed in ("The", "", ""):  # an empty line continues
                terminal.type(typed + "\n")
                assert terminal.until("> ") == f"{typed}\n{session.generate(**options)}\n"
        terminal.type("Other\n")  # and a prompt starts anew
        assert terminal.until("> ") == f"Other\n{speaker.generate('Other', **options)}\n"
        terminal.type(CTRL_D)
        code, rest = terminal.leave()
        assert (code, rest.strip("\r\n\b ^D")) == (0, "")


@needs_pty
@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_it_asks_again(speaker_path: Path) -> None:
    with Terminal("--model", speaker_path, "--seed", "1", "--max-tokens", "8000") as terminal:
        terminal.until("> ")
        terminal.type("The\n")
        terminal.until("The\r\n")
        terminal.read()  # the first letters of the answer
        terminal.type(CTRL_C)
        assert len(terminal.until("> ")) < 8000
        time.sleep(0.3)  # Python misses a signal just before readline waits for the first key
        terminal.type(CTRL_C)  # at the prompt: it asks again
        terminal.until("> ")
        terminal.type(CTRL_D)
        code, rest = terminal.leave()
        assert code == 0
        assert "Traceback" not in rest


@needs_pty
@pytest.mark.slow
def test_an_error_at_the_terminal_is_told_and_it_asks_again(toy_path: Path) -> None:
    with Terminal("--model", toy_path) as terminal:
        terminal.until("> ")
        terminal.type("a" * 65 + "\n")
        assert "error: context: expected at most 64 tokens" in terminal.until("> ")
        terminal.type(CTRL_D)
        assert terminal.leave()[0] == 0


@needs_pty
@pytest.mark.slow
def test_options_that_are_texts_at_the_terminal(speaker: Model, speaker_path: Path) -> None:
    flags = ["--bad-word", "th", "--stop", "zz", "--seed", "1", "--max-tokens", "8"]
    with Terminal("--model", speaker_path, *flags) as terminal:
        terminal.until("> ")
        terminal.type("The\n")
        answer = speaker.generate("The", bad_words=["th"], seed=1, max_new_tokens=8)
        assert terminal.until("> ").endswith(f"\n{answer}\n")
        terminal.type(CTRL_D)
        assert terminal.leave()[0] == 0


NO_COERCION = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@needs_pty
@pytest.mark.parametrize(
    ("environ", "has_readline"),
    [
        ({"LC_ALL": "C.UTF-8"}, False),
        pytest.param({"LC_ALL": "C", **NO_COERCION}, False, marks=pytest.mark.slow),
        pytest.param({"LC_ALL": "C", **NO_COERCION}, True, marks=pytest.mark.slow),
        pytest.param({"PYTHONIOENCODING": "ascii"}, True, marks=pytest.mark.slow),
        pytest.param({"PYTHONIOENCODING": "latin-1"}, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_terminal_is_utf_8_in_every_locale(
    speaker: Model, speaker_path: Path, tmp_path: Path, environ: dict[str, str], has_readline: bool
) -> None:
    """Other bytes are an error, and it asks again. Backspace takes one byte, without readline."""
    if not has_readline:
        hide = "import sys; sys.modules['readline'] = None\n"
        (tmp_path / "sitecustomize.py").write_text(hide, "utf-8")
        environ = {**environ, "PYTHONPATH": str(tmp_path)}
    options: dict[str, Any] = {"seed": 1, "max_new_tokens": 8}
    answer = speaker.generate("café", **options)
    assert answer != speaker.generate("caf", **options)
    flags = ["--seed", "1", "--max-tokens", "8"]
    with Terminal("--model", speaker_path, *flags, environ=environ) as terminal:
        terminal.until("> ")
        terminal.type("café\n")
        assert terminal.until("> ").endswith(f"\n{answer}\n")
        wrong = {"caf\udce9 noir\n": "byte 0xe9 at offset 3", "café\x7f\n": "byte 0xc3 at offset 3"}
        for typed, message in wrong.items() if not has_readline else ():  # it handles keys itself
            terminal.type(typed)
            error = f"error: prompt: expected UTF-8, found the {message}; "
            assert error in terminal.until("> ")
        terminal.type("café\n")
        assert terminal.until("> ").endswith(f"\n{answer}\n")
        terminal.type(CTRL_D)
        assert terminal.leave()[0] == 0


@needs_pty
@pytest.mark.slow
def test_a_wrong_option_at_the_terminal_is_told_before_it_asks(toy_path: Path) -> None:
    with Terminal("--model", toy_path, "--top-k=-1") as terminal:
        terminal.type(CTRL_D)
        code, shown = terminal.leave()
        assert code == 2
        assert "top_k" in shown.replace("-", "_")


@needs_pty
@pytest.mark.slow
def test_long_work_shows_its_progress_at_a_terminal(toy_path: Path) -> None:
    with Terminal("score", "--model", toy_path, "--prompt", "a" * 300) as terminal:
        assert "scoring [" in terminal.until("100%")
        code, rest = terminal.leave()
        assert code == 0
        assert "perplexity: " in rest


@needs_pty
@pytest.mark.slow
def test_ctrl_c_ends_long_work_quietly(toy_path: Path) -> None:
    with Terminal("score", "--model", toy_path, "--prompt", "a b" * 40_000) as terminal:
        terminal.until("scoring [")
        terminal.type(CTRL_C)
        code, rest = terminal.leave()
        assert code == 130
        assert "Traceback" not in rest
        assert "perplexity" not in rest
