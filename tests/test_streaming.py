"""Tokens to text, piece by piece, with a model made to recite the tokens that a test chooses."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_weights, slow, write_checkpoint

import tinygpt2

Recite = Callable[[Sequence[int]], tinygpt2.Session]


def reciting_weights(tokens: Sequence[int], vocab_size: int) -> dict[str, np.ndarray]:
    """After token number p the best one is tokens[p]: position p is told by dimension p alone.

    Everything is zero but the position embedding, one dimension for each position, and the head,
    which gives each position's token a point for its dimension.
    """
    config = reciting_config(tokens, vocab_size)
    weights = {name: np.zeros_like(array) for name, array in random_weights(config).items()}
    weights["wpe.weight"] += np.eye(*weights["wpe.weight"].shape, dtype=np.float32)
    weights["ln_f.weight"] += 1
    weights["lm_head.weight"][tokens, range(len(tokens))] = 1
    return weights


def reciting_config(tokens: Sequence[int], vocab_size: int) -> dict[str, object]:
    size = len(tokens) + 1
    sizes = {"n_positions": size, "n_embd": size, "n_layer": 1, "n_head": 1, "n_inner": 1}
    return {"vocab_size": vocab_size, "tie_word_embeddings": False, **sizes}


@pytest.fixture
def recite(tmp_path: Path) -> Iterator[Recite]:
    """A function that makes a session, already fed one token, whose greedy answer is known."""
    models: list[tinygpt2.Model] = []

    def start(tokens: Sequence[int]) -> tinygpt2.Session:
        write_checkpoint(tmp_path, reciting_config(tokens, 300), reciting_weights(tokens, 300))
        tinygpt2.convert(tmp_path, tmp_path / "model.tg2")
        models.append(tinygpt2.load(tmp_path / "model.tg2"))
        session = models[-1].session()
        session.feed([0])
        return session

    yield start
    for model in models:
        model.close()


def byte_tokens(toy: tinygpt2.Model, text: bytes) -> list[int]:
    tokenizer = toy.need_tokenizer()
    return [tokenizer.byte_token(byte) for byte in text]


def events(session: tinygpt2.Session, count: int, stop: Sequence[str] = ()) -> list[str]:
    """The text that each token releases, and last what comes without a token."""
    answer = session.stream(temperature=0, max_new_tokens=count, stop=stop)
    return [piece for _, piece in iter(answer.step, None)]


@pytest.mark.parametrize(
    ("raw", "pieces"),
    [
        ("é".encode(), ["", "é", ""]),
        ("€a".encode(), ["", "", "€", "a", ""]),
        ("\U0001f600".encode(), ["", "", "", "\U0001f600", ""]),
        (b"a\0\x7f", ["a", "\0", "\x7f", ""]),
        (b"a\xe2\x82", ["a", "", "", "\ufffd"]),  # the answer ends inside a character
        (b"\xf0\x9f\x98", ["", "", "", "\ufffd"]),
        (b"\xe2\x82a", ["", "", "\ufffda", ""]),  # the character was never finished
        (b"\xc3\xc3\xa9", ["", "\ufffd", "é", ""]),
        (b"\xff\x80a", ["\ufffd", "\ufffd", "a", ""]),  # these can begin nothing
        (b"\xc0\xaf", ["\ufffd", "\ufffd", ""]),
        (b"\xf4\x90", ["", "\ufffd\ufffd", ""]),  # there is nothing above U+10FFFF
    ],
)
def test_unfinished_characters_are_held_back(
    recite: Recite, toy: tinygpt2.Model, raw: bytes, pieces: list[str]
) -> None:
    tokens = byte_tokens(toy, raw)
    session = recite(tokens)
    assert events(session, len(tokens)) == pieces
    assert "".join(pieces) == raw.decode("utf-8", "replace") == toy.decode(tokens)
    assert session.tokens == [0, *tokens]


@pytest.mark.parametrize("seed", [0, 1, *slow(2, 3, 4, 5)])
def test_stream_of_random_bytes_is_their_text(
    recite: Recite, toy: tinygpt2.Model, seed: int
) -> None:
    """Beginnings, continuations and impossible bytes, then any tokens, of several bytes too."""
    rng = random.Random(seed)
    parts = [b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xf0\x9f", b"\x98\x80", b"\xff", b"\xed\xa0"]
    tokens = [*byte_tokens(toy, b"".join(rng.choices(parts, k=60))), *rng.choices(range(264), k=60)]
    session = recite(tokens)
    pieces = list(session.stream(temperature=0, max_new_tokens=len(tokens)))
    assert "".join(pieces) == toy.decode(tokens)
    assert "" not in pieces
    assert session.tokens == [0, *tokens]


@pytest.mark.slow
def test_stream_of_gpt2_tokens_is_their_text(
    gpt2: tinygpt2.Model, gpt2_tokenizer_path: Path, tmp_path: Path
) -> None:
    rng = random.Random(1)
    tokenizer = gpt2.need_tokenizer()
    pieces_of_characters = [t for t in range(50256) if not tokenizer.token_bytes(t).isascii()]
    tokens = [*rng.choices(range(50256), k=20), *rng.choices(pieces_of_characters, k=60)]
    config, weights = reciting_config(tokens, 50257), reciting_weights(tokens, 50257)
    shutil.copytree(gpt2_tokenizer_path.parent, tmp_path, dirs_exist_ok=True)
    write_checkpoint(tmp_path, config, weights, tokenizer=False)
    tinygpt2.convert(tmp_path, tmp_path / "model.tg2")
    with tinygpt2.load(tmp_path / "model.tg2") as model:
        pieces = list(model.stream([0], temperature=0, max_new_tokens=len(tokens)))
    assert "".join(pieces) == gpt2.decode(tokens)
    assert "" not in pieces


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        (["lo w"], ["h", "e", "", "l", "", "", ""]),
        (["w", "lo x"], ["h", "e", "", "l", "", "", "lo "]),
        (["l"], ["h", "e", ""]),
        (["ll", "el"], ["h", "", ""]),
        (["world!"], [*"hello ", "", "", "", "", "", "world"]),  # the rest comes at the end
        (["x", "hellu"], ["", "", "", "", "hello", *" world", ""]),
        (["ell", "ello w"], ["h", "", "", ""]),
    ],
)
def test_stop_texts(
    recite: Recite, toy: tinygpt2.Model, stop: list[str], pieces: list[str]
) -> None:
    tokens = byte_tokens(toy, b"hello world")
    session = recite(tokens)
    found = events(session, len(tokens), stop)
    assert found == pieces
    stopped = len(pieces) <= len(tokens)
    assert session.finish_reason == ("stop" if stopped else "length")
    assert session.tokens == [0, *tokens[: len(pieces) if stopped else None]]


def test_stop_text_inside_a_token_and_across_characters(
    recite: Recite, toy: tinygpt2.Model
) -> None:
    the, e_acute = toy.encode(" the")[0], byte_tokens(toy, "é".encode())
    tokens = [the, *e_acute, the, *byte_tokens(toy, b"!")]
    assert events(recite(tokens), 5, ["é th"]) == [" the", "", "", ""]
    assert events(recite(tokens), 5, ["he"]) == [" t"]
    assert events(recite(tokens), 5, ["é t!"]) == [" the", "", "", "é the", "!", ""]


def test_unfinished_character_before_a_stop_text(recite: Recite, toy: tinygpt2.Model) -> None:
    tokens = byte_tokens(toy, b"\xe2\x82ab")
    assert events(recite(tokens), 4, ["ab"]) == ["", "", "\ufffd", ""]
    assert events(recite(tokens), 4, ["\ufffda"]) == ["", "", ""]
    assert events(recite(tokens[:3]), 3, ["ab"]) == ["", "", "\ufffd", "a"]


def test_stop_text_of_the_last_replacement_character(recite: Recite, toy: tinygpt2.Model) -> None:
    """What the end of the answer releases may complete a stop text like everything else."""
    tokens = byte_tokens(toy, b"a\xe2\x82")
    session = recite(tokens)
    assert events(session, 3, ["a\ufffd"]) == ["", "", "", ""]
    assert session.finish_reason == "stop"


def test_answer_is_its_pieces(recite: Recite, toy: tinygpt2.Model) -> None:
    tokens = byte_tokens(toy, b"one. two\xc3")
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": len(tokens)}
    assert recite(tokens).generate(**options) == "one. two\ufffd"
    assert recite(tokens).generate(**options, stop=". ") == "one"
    assert list(recite(tokens).stream_ids(**options)) == tokens
    assert list(recite(tokens).stream_ids(**options, stop=".")) == tokens[:4]
