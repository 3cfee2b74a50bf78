"""The command line's --batch: lines in, lines out, in order, resumed after any end of the process.

`call` runs the command in this process, `start` as a process that can be killed.
"""

from __future__ import annotations

import codecs
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import slow, write_checkpoint
from test_cli import (
    TIMEOUT,
    Argument,
    Result,
    Terminal,
    call,
    check_failure,
    command,
    needs_pty,
    run_command,
    start,
)

import tinygpt2
from tinygpt2 import Model

pytest.importorskip("regex", reason="expressions are matched by the package regex")

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs the signals and links of POSIX")


class Batch:
    """A folder with the two files of a batch."""

    def __init__(self, folder: Path, model_path: Path) -> None:
        self.source, self.out = folder / "in.jsonl", folder / "out.jsonl"
        self.arguments: list[Argument] = [
            *("--model", model_path, "--batch", self.source, "--out", self.out)
        ]

    def write(self, lines: Iterable[object]) -> None:
        """Each line as JSON; texts and bytes as they are."""
        texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
        data = [text if isinstance(text, bytes) else text.encode() for text in texts]
        self.source.write_bytes(b"".join(line + b"\n" for line in data))

    def run(self, *arguments: Argument) -> Result:
        return call(*self.arguments, *arguments)

    def start(self, *arguments: Argument) -> subprocess.Popen[bytes]:
        return start(*self.arguments, *arguments)

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_bytes().splitlines()]


@pytest.fixture
def batch(tmp_path: Path, toy_path: Path) -> Batch:
    return Batch(tmp_path, toy_path)


# Answers


def test_each_line_gets_its_answer(batch: Batch, toy: Model) -> None:
    """In order, although texts that are begun later end earlier; the line's own options count."""
    lines: list[dict[str, Any]] = [
        {"prompt": "The", "max_new_tokens": 40},
        {"ids": [5, 6, 7], "seed": 9},
        {"prompt": ""},
        {"prompt": "\u20ac \ud800", "temperature": 0},
        {"prompt": "a", "max_new_tokens": 0},
        {"prompt": "a", "stop": ["e", "th"], "top_k": None, "num_beams": 1},
        {"prompt": "a", "bad_words": ["the"], "allowed": [*range(97, 123)], "min_p": 0.01},
        {"prompt": "a", "logit_bias": {"97": -1e30, "98": 3}, "stop_token_ids": [100]},
        {"prompt": "a" * 60, "overflow": "shift", "keep": 3, "max_new_tokens": 30},
        {"prompt": "b", "regex": "[a-m]{3}", "repetition_penalty": 1.2, "top_p": 0.9},
    ] * 2
    batch.write(lines)
    flags = ["--seed", "1", "--max-tokens", "8", "--top-k", "30"]
    assert batch.run(*flags) == (0, "", "")
    found = batch.answers()
    assert [answer.pop("line") for answer in found] == list(range(1, 1 + len(lines)))
    assert len({answer.pop("input") for answer in found}) == len(lines)
    for line, answer in zip(lines, found):
        values = {"seed": 1, "max_new_tokens": 8, "top_k": 30, **line}
        prompt = values.pop("prompt", None)
        prompt = values.pop("ids") if prompt is None else prompt
        biases = values.get("logit_bias", {})
        values["logit_bias"] = {int(token): bias for token, bias in biases.items()}
        result = toy.complete(prompt, **values)
        expected = {"text": result.text, "ids": result.ids}
        assert answer == {**expected, "finish_reason": result.finish_reason, "seed": values["seed"]}


def test_without_a_seed_each_line_tells_the_seed_that_it_drew(batch: Batch, toy: Model) -> None:
    batch.write([{"prompt": "a"}] * 4)
    assert batch.run("--max-tokens", "9") == (0, "", "")
    found = batch.answers()
    assert len({answer["seed"] for answer in found}) == 4
    for answer in found:
        assert answer["text"] == toy.generate("a", max_new_tokens=9, seed=answer["seed"])


def test_texts_are_what_they_are_alone_at_any_batch_size(batch: Batch) -> None:
    batch.write({"prompt": "ab" * n, "max_new_tokens": 30 - n} for n in range(20))
    contents = set()
    for size in ("1", "3", "100"):
        assert batch.run("--seed", "1", "--batch-size", size) == (0, "", "")
        contents.add(batch.out.read_bytes())
        batch.out.unlink()
    assert len(contents) == 1


def test_a_model_without_a_tokenizer(batch: Batch, tmp_path: Path) -> None:
    tinygpt2.convert(write_checkpoint(tmp_path / "c", tokenizer=False), tmp_path / "m.tg2")
    batch.write([{"ids": [1]}, {"prompt": "a"}])
    result = call("--model", tmp_path / "m.tg2", *batch.arguments[2:], "--max-tokens", "3")
    assert result.code == 0
    first, second = batch.answers()
    assert (first["text"], len(first["ids"])) == (None, 3)
    assert "no tokenizer inside" in second["error"]


# Forms of the file


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_are_read_by_their_mark(
    batch: Batch, toy: Model, mark: bytes, encoding: str, end: str
) -> None:
    """Blank lines are counted. A line ends nowhere but at its line feed."""
    lines = ["", '{"prompt": "\u20ac\u2028\u0085x"}', " \t", "", '{"prompt":\r"b"}']
    batch.source.write_bytes(mark + end.join(lines).encode(encoding))  # without a last line end
    assert batch.run("--seed", "1", "--max-tokens", "5") == (0, "", "")
    assert [(answer["line"], answer["text"]) for answer in batch.answers()] == [
        (2, toy.generate("\u20ac\u2028\u0085x", seed=1, max_new_tokens=5)),
        (5, toy.generate("b", seed=1, max_new_tokens=5)),
    ]


def test_bytes_that_are_no_text(batch: Batch, toy: Model) -> None:
    batch.write([b'{"prompt": "a\xe9"}', {"prompt": "b"}])
    assert batch.run("--max-tokens", "2").code == 0
    assert "JSON in UTF-8" in batch.answers()[0]["error"]
    batch.out.unlink()
    assert batch.run("--max-tokens", "2", "--seed", "1", "--errors", "replace") == (0, "", "")
    assert batch.answers()[0]["text"] == toy.generate("a\ufffd", seed=1, max_new_tokens=2)


def test_utf_16_that_is_damaged(batch: Batch) -> None:
    lines = '{"prompt": "a"}\n{"prompt": "\ud800"}\n'
    data = codecs.BOM_UTF16_LE + lines.encode("utf-16-le", "surrogatepass")
    batch.source.write_bytes(data)
    assert batch.run("--max-tokens", "2").code == 0
    assert ["error" in answer for answer in batch.answers()] == [False, True]
    batch.out.unlink()
    batch.source.write_bytes(data[:-1])
    check_failure(batch.run("--max-tokens", "2"), 1, str(batch.source), "utf-16-le", "truncated")
    assert not batch.out.exists()


def test_utf_16_without_a_mark_is_named(batch: Batch) -> None:
    batch.source.write_bytes('{"prompt": "a"}\n'.encode("utf-16-le"))
    check_failure(batch.run(), 2, str(batch.source), "UTF-16 without a byte order mark")
    assert not batch.out.exists()


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n", codecs.BOM_UTF8])
def test_a_file_without_prompts(batch: Batch, content: bytes) -> None:
    batch.source.write_bytes(content)
    assert batch.run() == (0, "", "")
    assert batch.out.read_bytes() == b""


# Lines that are wrong

NESTED = "[" * 100_000
BAD_LINES: list[tuple[object, str]] = [
    ("no JSON", "expected JSON"),
    ("{", "expected JSON"),
    ('{"prompt": "a"} {"prompt": "b"}', "expected JSON"),
    ("[1, 2]", "expected a JSON object"),
    ('"prompt"', "expected a JSON object"),
    ("17", "expected a JSON object"),
    ("null", "expected a JSON object"),
    (NESTED, "expected JSON"),
    ('{"prompt": ' + NESTED, "expected JSON"),
    ('{"prompt": "a", "temperature": NaN}', "NaN, which is not JSON"),
    ('{"prompt": "a", "temperature": -Infinity}', "Infinity, which is not JSON"),
    ('{"prompt": "a", "prompt": "b"}', "a name that appears twice"),
    ('{"prompt": "a", "seed": 1' + "0" * 5000 + "e}", "expected JSON"),
    ({}, 'expected either "prompt" or "ids"'),
    ({"seed": 1}, 'expected either "prompt" or "ids"'),
    ({"prompt": "a", "ids": [1]}, 'expected either "prompt" or "ids"'),
    ({"prompt": None}, 'expected a text as "prompt"'),
    ({"prompt": ["a"]}, 'expected a text as "prompt"'),
    ({"prompt": 5}, 'expected a text as "prompt"'),
    ({"ids": "1 2"}, 'a list of tokens as "ids"'),
    ({"ids": {}}, 'a list of tokens as "ids"'),
    ({"ids": None}, 'a list of tokens as "ids"'),
    ({"ids": 7}, 'a list of tokens as "ids"'),
    ({"ids": [1, -1]}, "found -1 at position 1"),
    ({"ids": [300 + 1000]}, "token ids"),
    ({"ids": [1.0]}, "token ids"),
    ({"ids": [True]}, "token ids"),
    ({"ids": [[1]]}, "token ids"),
    ({"ids": [10**40]}, "token ids"),
    ({"prompt": "a", "max_tokens": 5}, "did you mean max_new_tokens"),
    ({"prompt": "a", "Seed": 5}, "unknown name 'Seed'"),
    ({"prompt": "a", "": 5}, "unknown name ''"),
    ({"prompt": "a", "special": True}, "unknown name 'special'"),
    ({"prompt": "a", "\ud800\n": 5}, "unknown name"),
    ({"prompt": "a", "x" * 100_000: 5}, "unknown name"),
    ({"prompt": "a", "seed": "1"}, "option seed"),
    ({"prompt": "a", "temperature": -1}, "option temperature"),
    ({"prompt": "a", "temperature": True}, "option temperature"),
    ('{"prompt": "a", "temperature": 1e999}', "option temperature"),
    ({"prompt": "a", "top_k": 1.5}, "option top_k"),
    ({"prompt": "a", "top_p": 0}, "option top_p"),
    ({"prompt": "a", "stop": [""]}, "option stop"),
    ({"prompt": "a", "stop": 5}, "option stop"),
    ({"prompt": "a", "logit_bias": [1]}, "option logit_bias"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "option logit_bias"),
    ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "option logit_bias"),
    ({"prompt": "a", "logit_bias": {"-1": 1}}, "option logit_bias"),
    ({"prompt": "a", "allowed": "abc"}, "option allowed"),
    ({"prompt": "a", "bad_words": [""]}, "option bad_words"),
    ({"prompt": "a", "regex": "("}, "option regex"),
    ({"prompt": "a", "regex": r"a\b"}, "word boundary"),
    ({"prompt": "a", "regex": 5}, "option regex"),
    ({"prompt": "a", "overflow": "wrap"}, "option overflow"),
    ({"prompt": "a", "overflow": "shift", "keep": 64}, "option keep"),
    ({"prompt": "a", "num_beams": 0}, "option num_beams"),
    ({"prompt": "a", "num_beams": 2, "temperature": 1}, "option num_beams"),
    ({"prompt": "a" * 65}, "expected at most 64 tokens"),
    ({"ids": [1] * 1000}, "found 1000"),
]
GOOD: dict[str, Any] = {"prompt": "a", "max_new_tokens": 2, "seed": 1}


def test_lines_that_are_wrong_are_named_and_skipped(batch: Batch, toy: Model) -> None:
    """Between good ones, which are answered."""
    lines = [line for bad, _ in BAD_LINES for line in (bad, GOOD)]
    batch.write(lines)
    result = batch.run()
    assert (result.code, result.out) == (0, "")
    *messages, last = result.err.splitlines()
    assert last == f"tinygpt2: {len(BAD_LINES)} lines were wrong and skipped"
    found = batch.answers()
    assert [answer["line"] for answer in found] == [*range(1, len(lines) + 1)]
    for i, (bad, words) in enumerate(BAD_LINES):
        answer, good = found[2 * i : 2 * i + 2]
        assert words in answer["error"], bad
        assert set(answer) == {"line", "error", "input"}
        place = f"tinygpt2: error: {batch.source}: line {2 * i + 1}: "
        assert messages[i] == place + answer["error"]
        assert good["text"] == toy.generate(**GOOD)


def test_a_very_deep_expression(batch: Batch) -> None:
    """The package regex gives up on it in its own way."""
    batch.write([{"prompt": "a", "regex": "(" * 20_000 + "a" + ")" * 20_000}, GOOD])
    assert batch.run().code == 0
    assert ["error" in answer for answer in batch.answers()] == [True, False]


@pytest.mark.table
@pytest.mark.parametrize(("bad", "words"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_is_wrong_ends_it_if_asked(batch: Batch, bad: object, words: str) -> None:
    batch.write([GOOD, bad, GOOD])
    check_failure(batch.run("--bad-lines", "stop", "--batch-size", "1"), 1, "line 2: ", words)
    assert [answer["line"] for answer in batch.answers()] == [1]
    batch.out.unlink()
    check_failure(batch.run("--bad-lines", "stop"), 1, "line 2: ", words)
    assert [answer["line"] for answer in batch.answers()] == [1]  # begun at the same time
    batch.write([GOOD, GOOD, GOOD])
    result = batch.run("--bad-lines", "stop")
    assert (result.code, len(batch.answers())) == (0, 3)


def test_answers_that_fail_are_named_and_skipped(
    batch: Batch, toy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the beginning, but while they are made; the others go on."""
    monkeypatch.setattr(tinygpt2, "REGEX_TIMEOUT", 0.05)
    likes_a = {str(toy.encode("a")[0]): 99}
    lines: list[dict[str, Any]] = [
        {**GOOD, "max_new_tokens": 20},
        {"prompt": "a", "regex": "x[0-9]", "bad_words": [*"0123456789"]},
        {"prompt": "a", "overflow": "error", "max_new_tokens": 99, "logit_bias": {"264": -1e30}},
        {"prompt": "a", "allowed": []},
        {"prompt": "a", "regex": "(?:(?:a|aa)+)+b", "logit_bias": likes_a},
        {**GOOD, "max_new_tokens": 20},
    ]
    batch.write(lines)
    result = batch.run("--seed", "1")
    assert result.code == 0
    found = batch.answers()
    assert [answer["line"] for answer in found] == [1, 2, 3, 4, 5, 6]
    assert "no token can follow 'x'" in found[1]["error"]
    assert "all 64 positions are used" in found[2]["error"]
    assert "no token can begin it" in found[3]["error"]
    assert "one test took over" in found[4]["error"]
    good = toy.generate("a", seed=1, max_new_tokens=20)
    assert (found[0]["text"], found[5]["text"]) == (good, good)
    batch.out.unlink()
    stopped = batch.run("--seed", "1", "--bad-lines", "stop")
    check_failure(stopped, 1, "line 4: ")  # the first that is known


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top-k=-1"], "--top-k"),
        (["--regex=("], "--regex"),
        (["--overflow=shift", "--keep=64"], "--keep"),
        (["--num-beams=2", "--stop=a"], "--num-beams"),
        (["--bad-word="], "--bad-word:"),
        (["--batch-size=0"], "--batch-size"),
        (["--json"], "--json"),
        (["--stats"], "--stats"),
        (["--text"], "--text"),
        (["--prompt=a"], "--prompt"),
        (["--ids=1"], "--ids"),
    ],
    ids=str,
)
def test_options_that_are_wrong_for_every_line_are_fatal(
    batch: Batch, flags: list[str], words: str
) -> None:
    batch.write([{"prompt": "a"}])
    check_failure(batch.run(*flags), 2, words)
    assert not batch.out.exists()


def test_options_of_the_command_that_are_texts(batch: Batch, toy: Model) -> None:
    batch.write([{"prompt": "a"}])
    flags = ["--bad-word", "the", "--stop", "in", "--seed", "1", "--max-tokens", "9"]
    assert batch.run(*flags) == (0, "", "")
    expected = toy.generate("a", bad_words=["the"], stop=["in"], seed=1, max_new_tokens=9)
    assert batch.answers()[0]["text"] == expected


@pytest.mark.parametrize("flag", ["--batch", "--out"])
def test_one_file_alone(batch: Batch, flag: str) -> None:
    batch.write([{"prompt": "a"}])
    check_failure(call("--model", batch.arguments[1], flag, batch.source), 2, "--batch", "--out")
    assert batch.source.read_bytes() == b'{"prompt": "a"}\n'


# Files that are refused


def test_a_missing_file(batch: Batch, tmp_path: Path) -> None:
    check_failure(batch.run(), 1, str(batch.source), "No such file")
    assert not batch.out.exists()
    batch.write([GOOD])
    batch.arguments[-1] = tmp_path / "none" / "out.jsonl"
    check_failure(batch.run(), 1, str(batch.arguments[-1]), "No such file")


@pytest.mark.parametrize("which", [3, 5])
@pytest.mark.parametrize(
    "kind", ["directory", pytest.param("fifo", marks=posix), pytest.param("device", marks=posix)]
)
def test_what_is_no_regular_file(batch: Batch, tmp_path: Path, which: int, kind: str) -> None:
    """A run could not go on with them; and the file that is read is read twice."""
    batch.write([GOOD])
    path = tmp_path / "other"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path(os.devnull)
    batch.arguments[which] = path
    flag, found = "--batch" if which == 3 else "--out", "a directory" if kind == "directory" else ""
    check_failure(batch.run(), 2, f"{flag}: expected a regular file", found or "a device, pipe")


@pytest.mark.parametrize("which", [3, 5])
def test_a_dash_is_no_file(
    batch: Batch, tmp_path: Path, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch.write([GOOD])
    batch.arguments[which] = "-"
    monkeypatch.chdir(tmp_path)
    check_failure(batch.run(), 2, "expected a regular file, found -")
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize(
    "how", ["same", "relative", *(pytest.param(k, marks=posix) for k in ("hard", "symbolic"))]
)
@pytest.mark.parametrize("end", ["\n", ""])
def test_the_same_file_twice(batch: Batch, tmp_path: Path, how: str, end: str) -> None:
    """Without its last line end it could be taken for a line that a kill has cut off."""
    content = '{"prompt": "a"}' + end
    batch.source.write_text(content, "utf-8")
    other = tmp_path / "other"
    if how == "hard":
        os.link(batch.source, other)
    elif how == "symbolic":
        other.symlink_to(batch.source)
    same = {"same": batch.source, "relative": tmp_path / "." / ".." / tmp_path.name / "in.jsonl"}
    batch.arguments[-1] = same.get(how, other)
    check_failure(batch.run(), 2, "--out: it is the file of --batch")
    assert batch.source.read_text("utf-8") == content


OTHERS: dict[str, bytes] = {
    "a note": b"do not lose me",
    "a note with a line": b"do not lose me\n",
    "a list": b"[1, 2, 3]\n",
    "objects": b'{"prompt": "a"}\n{"prompt": "b"}\n',
    "an object without a line end": b'{"prompt": "a"}',
    "a number as text": b'{"line": "1", "text": "a"}\n',
    "true": b'{"line": true, "text": "a"}\n',
    "a fraction": b'{"line": 1.0}\n',
    "zero": b'{"line": 0}\n',
    "falling": b'{"line": 2}\n{"line": 1}\n',
    "twice": b'{"line": 1}\n{"line": 1}\n',
    "more lines than the input": b'{"line": 1}\n{"line": 4}\n',
    "a huge number": b'{"line": 1' + b"0" * 30 + b"}\n",
    "a mark": codecs.BOM_UTF8 + b'{"line": 1}\n',
    "zeros": bytes(1000),
    "one binary line": bytes(range(256)) * 4 + b"\n",
    "a blank line": b'\n{"line": 1}\n',
    "numbered lines of others": b'{"line": 1, "text": "a"}\n{"line": 2, "text": "b"}',
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_left_alone(batch: Batch, name: str) -> None:
    batch.write([GOOD] * 3)
    batch.out.write_bytes(OTHERS[name])
    check_failure(batch.run(), 1, str(batch.out), "name another --out")
    assert batch.out.read_bytes() == OTHERS[name]


def test_a_model_file_is_left_alone(batch: Batch, toy_path: Path, tmp_path: Path) -> None:
    batch.write([GOOD] * 3)
    content = toy_path.read_bytes()
    batch.out.write_bytes(content)
    check_failure(batch.run(), 1, "name another --out")
    assert batch.out.read_bytes() == content


@pytest.mark.parametrize("which", ["--batch", "--out"])
def test_lines_without_an_end(batch: Batch, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of one huge line is not read into memory: it is no file of lines."""
    if not tinygpt2.__file__.endswith(".py"):
        pytest.skip("the constants of a compiled module cannot be replaced")
    monkeypatch.setattr(tinygpt2, "MAX_LINE", 1000)
    batch.write([GOOD] * 3)
    if which == "--batch":
        batch.write([GOOD, {"prompt": "a" * 1000}])
    else:
        assert batch.run().code == 0
        with open(batch.out, "ab") as file:
            file.write(b"a" * 2000)
    before = batch.out.read_bytes() if which == "--out" else b""
    name = batch.source if which == "--batch" else batch.out
    check_failure(batch.run(), 1, str(name), "1000")
    assert (batch.out.read_bytes() if batch.out.exists() else b"") == before


@posix
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_without_permission(batch: Batch) -> None:
    batch.write([GOOD])
    batch.out.write_bytes(b"")
    batch.out.chmod(0o444)
    check_failure(batch.run(), 1, str(batch.out), "Permission denied")


# Going on after an end


MANY: list[object] = [
    {"prompt": "ab" * (n % 9), "max_new_tokens": 5 + 7 * n % 40} if n % 7 != 3 else "wrong"
    for n in range(20)
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, toy_path: Path) -> bytes:
    """The output of an unbroken run of MANY."""
    batch = Batch(tmp_path_factory.mktemp("unbroken"), toy_path)
    batch.write(MANY)
    assert batch.run("--seed", "1").code == 0
    return batch.out.read_bytes()


def places(content: bytes) -> list[int]:
    """Where a file may be cut: at its ends, around its line ends, and inside lines."""
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    some = {0, 1, 5, 9, 10, *ends[:3], *(e - 1 for e in ends[:4]), *(e + 3 for e in ends[2:6])}
    return sorted({*some, len(content) - 1, len(content)})


def test_it_goes_on_wherever_its_output_was_cut(batch: Batch, unbroken: bytes) -> None:
    batch.write(MANY)
    for place in places(unbroken):
        batch.out.write_bytes(unbroken[:place])
        result = batch.run("--seed", "1")
        assert result.code == 0
        assert batch.out.read_bytes() == unbroken
        done = unbroken[:place].count(b"\n")
        note = f"{batch.out}: the answers up to line {done} are of an earlier run"
        assert (note in result.err) == (done > 0)


def test_what_follows_the_last_whole_line_goes(batch: Batch, unbroken: bytes) -> None:
    """Whatever it is: after a crash of the system there may be zeros."""
    batch.write(MANY)
    first = unbroken[: unbroken.index(b"\n") + 1]
    for rest in (b"\0" * 5000, b"\xff", b"{", first[:-1]):
        batch.out.write_bytes(first + rest)
        assert batch.run("--seed", "1").code == 0
        assert batch.out.read_bytes() == unbroken


def test_a_finished_run_changes_nothing(batch: Batch, unbroken: bytes) -> None:
    batch.write(MANY)
    batch.out.write_bytes(unbroken)
    os.utime(batch.out, (1, 1))
    assert batch.run("--seed", "1").code == 0
    assert batch.out.read_bytes() == unbroken
    assert batch.out.stat().st_mtime == 1


def test_answers_to_another_input_or_with_other_options(batch: Batch, unbroken: bytes) -> None:
    """Half of the answers would be wrong, and nobody would notice."""
    begun = b"".join(unbroken.splitlines(keepends=True)[:9])
    other_lines = [{"prompt": "b"}, *MANY[1:]]
    for lines, flags in ((other_lines, ["1"]), (MANY, ["2"]), (MANY, ["1", "--special"])):
        batch.write(lines)
        batch.out.write_bytes(begun)
        check_failure(batch.run("--seed", *flags), 1, "line 9", "with these options, checksum")
        assert batch.out.read_bytes() == begun
    batch.write([*MANY[:9], {"prompt": "b"}, *MANY[10:]])  # a line that has no answer yet
    assert batch.run("--seed", "1").code == 0


def test_lines_that_were_added_are_answered(batch: Batch, unbroken: bytes) -> None:
    batch.write(MANY[:11])
    assert batch.run("--seed", "1").code == 0
    batch.write(MANY)
    assert batch.run("--seed", "1").code == 0
    assert batch.out.read_bytes() == unbroken


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_do_not_make_another_input(batch: Batch, unbroken: bytes, end: str) -> None:
    """An editor may have added the last one, or changed them all."""
    batch.write(MANY[:11])
    batch.source.write_bytes(batch.source.read_bytes().rstrip(b"\n"))
    assert batch.run("--seed", "1").code == 0
    batch.write(MANY)
    batch.source.write_bytes(batch.source.read_bytes().replace(b"\n", end.encode()))
    assert batch.run("--seed", "1").code == 0
    assert batch.out.read_bytes() == unbroken


def test_fewer_lines_than_answers_is_another_input(batch: Batch, unbroken: bytes) -> None:
    batch.write(MANY[:10])
    batch.out.write_bytes(unbroken)
    check_failure(batch.run("--seed", "1"), 1, "at most 10", "name another --out")
    assert batch.out.read_bytes() == unbroken


def wait_for(condition: Any) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


KILLED: list[object] = [
    {"prompt": "ab" * (n % 9), "max_new_tokens": 40, "overflow": "shift"} for n in range(150)
]


@posix
@pytest.mark.parametrize("number", slow("SIGTERM", "SIGINT", "SIGHUP"))
def test_a_signal_ends_it_and_it_goes_on(batch: Batch, number: str) -> None:
    """Quietly, with whole lines only; another run makes of them what an unbroken one makes."""
    batch.write(KILLED)
    with batch.start("--seed", "1") as process:
        wait_for(lambda: n_lines(batch.out) > 5)
        process.send_signal(getattr(signal, number))
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, err) == (128 + getattr(signal, number), b"", b"")
    kept = batch.out.read_bytes()
    assert 5 < kept.count(b"\n") < 150
    assert kept.endswith(b"\n")
    assert batch.run("--seed", "1").code == 0
    resumed = batch.out.read_bytes()
    batch.out.unlink()
    assert batch.run("--seed", "1").code == 0
    assert batch.out.read_bytes() == resumed
    assert resumed.startswith(kept)


def kill_behind(batch: Batch, n: int) -> int:
    """Kill a run once its output has more than n lines; the exit code, 0 if it was over before."""
    with batch.start("--seed", "1") as process:
        wait_for(lambda: n_lines(batch.out) > n or process.poll() is not None)
        process.kill()
        process.communicate()
        return process.returncode


@posix
@pytest.mark.slow
def test_it_goes_on_after_any_number_of_kills(batch: Batch) -> None:
    batch.write(KILLED)
    n_kills = 0
    while True:
        before = n_lines(batch.out)
        if kill_behind(batch, before + 40) == 0:
            break
        n_kills += 1
        assert n_lines(batch.out) > before
    assert n_kills >= 2
    killed = batch.out.read_bytes()
    batch.out.unlink()
    assert batch.run("--seed", "1").code == 0
    assert killed == batch.out.read_bytes()


@posix
@pytest.mark.slow
def test_a_full_disk_is_an_error_and_it_goes_on(batch: Batch, unbroken: bytes) -> None:
    """A file may not grow over 1024 bytes here, as on a disk without space."""
    batch.write(MANY)
    line = command(*batch.arguments, "--seed", "1")
    result = run_command(["sh", "-c", 'ulimit -f 2; exec "$@"', "sh", *line])
    *_, message = result.err.splitlines()
    assert result.code == 1
    assert "error: " in message
    assert "large" in message
    assert "Traceback" not in result.err
    kept = batch.out.read_bytes()
    assert unbroken.startswith(kept)
    assert batch.run("--seed", "1").code == 0
    assert batch.out.read_bytes() == unbroken


@posix
@pytest.mark.slow
def test_a_second_process_is_refused_while_the_first_writes(batch: Batch) -> None:
    batch.write(KILLED)
    with batch.start("--seed", "1") as process:
        wait_for(lambda: n_lines(batch.out) > 2)
        process.send_signal(signal.SIGSTOP)
        try:
            content = batch.out.read_bytes()
            check_failure(batch.run("--seed", "1"), 1, str(batch.out), "another process")
            assert batch.out.read_bytes() == content
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.communicate()


def test_a_file_system_without_locks_is_no_obstacle(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where Python has no fcntl."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    batch.write([GOOD])
    assert batch.run() == (0, "", "")
    assert len(batch.answers()) == 1


# What is shown


@needs_pty
@pytest.mark.slow
def test_progress_is_shown_at_a_terminal(batch: Batch) -> None:
    """A bar that grows, and the errors on lines of their own."""
    batch.write([*MANY, "wrong", ""])
    with Terminal(*batch.arguments, "--seed", "1") as terminal:
        shown = terminal.until("100%")
        code, rest = terminal.leave()
    assert code == 0
    assert "lines were wrong and skipped" in rest
    assert rest.count("100%") == 0
    bars = [part for part in shown.split("\r") if part.startswith("answers [")]
    counts = [bar.count("#") for bar in bars]
    assert counts == sorted(counts)
    errors = [line for line in shown.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(errors) == len([line for line in MANY if line == "wrong"]) + 1
    assert all(error.startswith("tinygpt2: error: ") for error in errors)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(batch: Batch) -> None:
    """Neither with lines that are wrong nor with those that are answered."""
    script = (
        "import sys, tinygpt2\n"
        "code = tinygpt2.main(sys.argv[1:])\n"
        "print(code, tinygpt2.peak_memory())"
    )
    peaks = []
    for n in (100, 12_000):
        good = [{"prompt": "a", "max_new_tokens": 1}] * (n // 10)
        batch.write([*['{"wrong": 1}'] * n, *good])
        line: list[Argument] = [sys.executable, "-c", script, *batch.arguments]
        folder = Path(tinygpt2.__file__).parent
        code, peak = run_command(line, cwd=folder).out.split()
        assert code == "0"
        assert n_lines(batch.out) == n + n // 10
        peaks.append(float(peak))
        batch.out.unlink()
    assert peaks[1] - peaks[0] < 1
