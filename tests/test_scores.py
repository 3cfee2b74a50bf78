"""Scores with ranks and alternatives, of many texts at once, and of endings of one prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygpt2
from tinygpt2 import ContextError, InputError, Model

BACKENDS = ["numpy"] if tinygpt2.library_path() is None else ["c", "numpy"]
TEXTS = ["The king", "a", "", "the wolf and the " * 7, "x", "one two three", "The king had"]


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, toy_path: Path) -> Iterator[Model]:
    with tinygpt2.load(toy_path, backend=request.param) as model:
        yield model


def logprobs_of(model: Model, ids: list[int]) -> np.ndarray:
    """log softmax of the logits after every token, float64 [len(ids), vocab_size]."""
    rows = model.logits(ids).astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def test_ranks_and_alternatives(model: Model) -> None:
    score = model.score("The king had", top=3)
    start = model.start_tokens
    rows = logprobs_of(model, [*start, *score.ids])[len(start) - 1 :]
    assert score.ranks is not None
    assert score.top_logprobs is not None
    for row, token, rank, best in zip(rows, score.ids, score.ranks, score.top_logprobs):
        assert rank == int((row > row[token]).sum())
        assert [t for t, _ in best] == np.argsort(-row, kind="stable")[:3].tolist()
        assert [value for _, value in best] == pytest.approx(sorted(row)[:-4:-1], abs=1e-4)
    plain = model.score("The king had")
    assert (plain.ranks, plain.top_logprobs) == (None, None)
    assert plain.logprobs == score.logprobs


def test_equal_logits_have_ranks_by_their_tokens() -> None:
    """The toy gives all bytes but letters and spaces the same logit."""
    for backend in BACKENDS:
        with tinygpt2.toy(backend=backend) as model:  # type: ignore[arg-type]
            first, second = (model.score("a" + c, top=1).ranks for c in "\x00\x01")
            assert first is not None
            assert second is not None
            assert second[1] == (first[1] or 0) + 1


def test_a_batch_of_scores_is_each_score(model: Model) -> None:
    """Short texts share passes; the long one takes several windows by itself."""
    texts: list[Any] = [*TEXTS, "a b c " * 100, [1, 2, 3], *TEXTS]
    together = model.score_batch(texts, top=2)
    alone = [model.score(text, top=2) for text in texts]
    assert [score.ids for score in together] == [score.ids for score in alone]
    assert [score.n_bytes for score in together] == [score.n_bytes for score in alone]
    if model.backend.name == "c":
        assert together == alone
    for a, b in zip(together, alone):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_scores_share_passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    forward = type(model.backend).forward

    def watched(self: Any, workspace: Any, spans: Any, *more: Any) -> Any:
        passes.append(len(spans))
        return forward(self, workspace, spans, *more)

    if not tinygpt2.__file__.endswith(".py"):
        pytest.skip("compiled calls cannot be watched")
    monkeypatch.setattr(type(model.backend), "forward", watched)
    model.score_batch(["ab"] * 32)
    assert passes == [16, 16]


def test_scores_after_contexts(model: Model) -> None:
    """Against the logits of context and text together. Nothing is put before a context."""
    contexts: list[Any] = ["The king", [5], "", [7] * 63, "the wolf and the " * 3, "a"]
    texts: list[Any] = [" had", "x", "The king", [3], [1, 2, 3], ""]
    scores = model.score_batch(texts, contexts=iter(contexts), top=1)
    for context, text, score in zip(contexts, texts, scores):
        before, ids = (model.tokens_of(prompt, False, False) for prompt in (context, text))
        first = max(1, len(before))
        tokens = [*before, *ids]
        rows: Any = logprobs_of(model, tokens)[first - 1 :] if ids else []
        expected = [row[token] for row, token in zip(rows, tokens[first:])]
        assert score.ids == ids
        assert score.logprobs[: not before] == [None][: not before]
        assert score.logprobs[not before :] == pytest.approx(expected, abs=1e-4)
        assert len(score.logprobs) == len(score.ranks or []) == len(ids)


def test_contexts_that_are_longer_than_the_window(model: Model) -> None:
    """A text that does not fit behind its context is read after half a window of it."""
    n = model.config.n_positions
    ids = [number % 250 for number in range(5 * n)]
    fits, cut = model.score_batch(
        [ids[n:][:1], ids[3 * n : 3 * n + 9]], contexts=[ids[:n], ids[: 3 * n]]
    )
    assert fits.logprobs == pytest.approx([logprobs_of(model, ids[:n])[-1, ids[n]]], abs=1e-4)
    window = ids[3 * n - n // 2 : 3 * n + 9]
    rows = logprobs_of(model, window)[n // 2 - 1 : -1]
    expected = [row[token] for row, token in zip(rows, window[n // 2 :])]
    assert cut.logprobs == pytest.approx(expected, abs=1e-4)
    (whole,) = model.score_batch([ids[1:]], contexts=[ids[:1]])
    assert len(whole.logprobs) == len(ids) - 1


ENDINGS = [" son", " daughter", "s", "", " king and a queen"]


def test_rank(model: Model) -> None:
    """Against one score for each whole text."""
    ranked = model.rank("The king had a", ENDINGS)
    assert [item.total for item in ranked] == sorted((i.total for i in ranked), reverse=True)
    assert sorted(item.number for item in ranked) == list(range(len(ENDINGS)))
    for item in ranked:
        assert item.ending == ENDINGS[item.number]
        whole = model.score("The king had a" + item.ending)
        n = len(whole.ids) - len(item.ids)
        assert whole.ids[n:] == item.ids
        assert item.logprobs == pytest.approx(whole.logprobs[n:], abs=1e-4)
        assert item.total == pytest.approx(math.fsum(item.logprobs))
    assert next(item for item in ranked if not item.ending).total == 0


def test_an_ending_that_changes_the_last_token_of_the_prompt(tales_path: Path) -> None:
    """All endings are scored from the same place, so they stand in the order of whole texts."""
    with tinygpt2.load(tales_path) as model:
        for prompt in ("The almo", "He was verw", "Once upon a tim", "the daught"):
            endings = ["st", ".", "er", "e", "y ", "s"]
            ranked = model.rank(prompt, endings)
            totals = {ending: model.score(prompt + ending).total for ending in endings}
            assert [item.ending for item in ranked] == sorted(endings, key=lambda e: -totals[e])
            gaps = [item.total - totals[item.ending] for item in ranked]
            assert gaps == pytest.approx([gaps[0]] * len(gaps), abs=1e-4)


def test_a_space_belongs_to_the_ending(model: Model) -> None:
    plain = model.rank("The king had a", [" son", " daughter"])
    moved = model.rank("The king had a ", ["son", "daughter"])
    assert [item.ids for item in plain] == [item.ids for item in moved]
    assert [item.total for item in plain] == pytest.approx([item.total for item in moved])


def test_rank_without_a_prompt(model: Model) -> None:
    ranked = model.rank("", ["The king", "the"])
    for item in ranked:
        assert item.total == pytest.approx(model.score(item.ending).total, abs=1e-4)
    assert model.rank("The", []) == []


def test_what_scores_refuse(model: Model) -> None:
    for top in (0, -1, 1.5, "2", True):
        with pytest.raises(InputError, match="top: expected a whole number from 1"):
            model.score("a", top=top)  # type: ignore[arg-type]
    wrong: list[Any] = [[], ["a"], ["a"] * 3, "ab"]
    for contexts in wrong:
        with pytest.raises(InputError, match="contexts: expected a list with one for each text, 2"):
            model.score_batch(["a", "b"], contexts=contexts)
    with pytest.raises(ContextError):
        model.rank("a", ["b " * 1000])
    with pytest.raises(InputError):
        model.rank("a", [5])  # type: ignore[list-item]
    alone: list[Any] = ["King", None, 5]
    for value in alone:
        with pytest.raises(InputError, match="prompts: expected a list of texts"):
            model.score_batch(value)
        with pytest.raises(InputError, match="endings: expected a list of texts"):
            model.rank("a", value)
