"""Properties of the tokenizer and of what follows it in a stream, on texts that hypothesis makes.

The same examples each time: a failure here is a failure everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from conftest import END
from test_tokenizer import YOUNG, code_points

import tinygpt2

pytest.importorskip("hypothesis", reason="makes the texts")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

repeatable = settings(derandomize=True, deadline=None, max_examples=400)

TRICKY = [
    *(
        "'s",
        "'ll",
        "'ve",
        "'",
        "\u2019s",
        "a",
        "ab",
        "Zz",
        "1",
        "23",
        "_",
        "!",
        "...",
        "é",
        "e\u0301",
    ),
    *(" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u3000", "\u200b"),
    *("\ufeff", "\0", "½", "²", "Ⅷ", "٣", "日本", "한", "\U0001f600", "\U0001f468\u200d\U0001f469"),
    *(END, "<|", "|>", "\ufffd", "\u180e", "\u0378", "\U0010ffff"),
]
whole = st.characters(exclude_categories=["Cs"])
texts = st.lists(st.sampled_from(TRICKY) | whole, max_size=30).map("".join)
broken_texts = st.lists(st.sampled_from("a\ud800\udbff\udc00\udfff \ufeff") | st.characters()).map(
    "".join
)
long_words = (
    st.text("ab", max_size=300) | st.text("the ", max_size=300) | st.text("=-", max_size=99)
)
young = code_points(YOUNG)


def assume_known(text: str) -> None:
    """The references' Unicode is older than ours; test_tokenizer.py lists where that matters."""
    assume(young.isdisjoint(map(ord, text)))


@repeatable
@given(texts | broken_texts | long_words)
@pytest.mark.slow
def test_both_paths_cut_alike(text: str) -> None:
    regex = pytest.importorskip("regex", reason="compares with regex")
    words = list(tinygpt2.ShadowCutter().cut(text))
    assert words == regex.findall(tinygpt2.GPT2_WORDS, text)
    assert "".join(words) == text


@repeatable
@given(texts | long_words)
@pytest.mark.slow
def test_text_comes_back(gpt2: tinygpt2.Model, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode(gpt2.encode(text, special=True)) == text


@repeatable
@given(texts | broken_texts | long_words)
@pytest.mark.slow
def test_equals_tiktoken(gpt2: tinygpt2.Model, tiktoken_gpt2: Any, text: str) -> None:
    assume_known(text)
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)


@repeatable
@given(texts | long_words)
@pytest.mark.slow
def test_equals_transformers(gpt2: tinygpt2.Model, transformers_gpt2: Any, text: str) -> None:
    assume_known(text)
    assert gpt2.encode(text) == transformers_gpt2.encode(text, split_special_tokens=True)
    assert gpt2.encode(text, special=True) == transformers_gpt2.encode(text)


@repeatable
@given(st.lists(st.integers(0, 50256), max_size=60))
@pytest.mark.slow
def test_any_ids_decode_as_tiktoken_does(
    gpt2: tinygpt2.Model, tiktoken_gpt2: Any, ids: list[int]
) -> None:
    assert gpt2.decode(ids) == tiktoken_gpt2.decode(ids)


def let_through(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """What a stop filter must have let through once it has seen `text`, and whether it stops.

    The stop text that is complete first ends the text, the longest of several; so it does not
    matter how the text is cut into pieces. Before that, no more is held back than may begin one.
    """
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    beginnings = [stop[:size] for stop in stops for size in range(len(stop))]
    held = max((len(part) for part in beginnings if text.endswith(part)), default=0)
    return text[: len(text) - held], False


letters = st.text("ab", max_size=5)
some_stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


@settings(repeatable, max_examples=2000)
@given(st.lists(letters, max_size=8), some_stops)
@pytest.mark.slow
def test_text_is_held_back_only_while_it_may_begin_a_stop_text(
    pieces: list[str], stops: list[str]
) -> None:
    output = tinygpt2.TextOutput(stops)
    text = passed = ""
    for piece in pieces:
        text += piece
        passed += output.push(piece.encode())
        assert (passed, output.stopped) == let_through(text, stops)
        if output.stopped:
            return
    assert passed + output.finish() == text
