"""Beam search, as transformers does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TOY, write_checkpoint

import tinygpt2
from tinygpt2 import InputError, Model

BACKENDS = ["numpy"] if tinygpt2.library_path() is None else ["c", "numpy"]
# Published by onnxruntime-genai for its test model, with 4 beams.
PUBLISHED = [
    ([0, 0, 0, 0, 0, 52, 195, 731, 321, 301, 734, 620], [131, 131, 131, 181, 638, 638, 638, 638]),
    ([41, 554, 74, 622, 206, 222, 75, 223, 221, 198, 224, 572], [292] * 8),
    ([0, 0, 0, 52, 328, 219, 328, 206, 288, 227, 896, 328], [328, *[669] * 7]),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_published_beams(data: Path, tmp_path: Path, backend: Any) -> None:
    tinygpt2.convert(data / "checkpoints" / "ort-genai-tiny-random", tmp_path / "m.tg2")
    with tinygpt2.load(tmp_path / "m.tg2", backend=backend) as model:
        prompts = [prompt for prompt, _ in PUBLISHED]
        answers = [answer for _, answer in PUBLISHED]
        alone = [model.generate_ids(p, num_beams=4, max_new_tokens=8) for p in prompts]
        assert alone == answers
        results = model.generate_batch(prompts, num_beams=4, max_new_tokens=8)
        assert [result.ids for result in results] == answers


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """A model here and in transformers, whose end-of-text is likely."""
    lib = pytest.importorskip("transformers", reason="needs the reference implementation")
    pytest.importorskip("torch", reason="needs the reference implementation")
    folder = tmp_path_factory.mktemp("beams")
    write_checkpoint(folder / "m", {**TOY, "vocab_size": 24, "eos_token_id": 7, "bos_token_id": 7},
                     tokenizer=False)  # fmt: skip
    tinygpt2.convert(folder / "m", folder / "m.tg2")
    return tinygpt2.load(folder / "m.tg2"), lib.GPT2LMHeadModel.from_pretrained(folder / "m").eval()


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_beams_of_transformers(pair: tuple[Model, Any], num_beams: int) -> None:
    import torch

    model, theirs = pair
    ended = 0
    for seed in range(12):
        prompt = [(7 * seed + i) % 24 for i in range(1 + seed % 5)]
        for count in (1, 4, 12):
            with torch.no_grad():
                expected = theirs.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt)),
                    num_beams=num_beams,
                    do_sample=False,
                    max_new_tokens=count,
                    num_return_sequences=num_beams,
                    pad_token_id=23,
                    use_cache=True,
                )
            found = model.generate_batch(
                [prompt], num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=count
            )
            for row, result in zip(expected.tolist(), found):
                new = row[len(prompt) :]
                ids = new[: new.index(7)] if 7 in new else new
                ended += 7 in new
                assert result.ids == ids[: len(result.ids)]
                assert set(ids[len(result.ids) :]) <= {23}  # padding
    assert ended > 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_beam_is_an_answer_like_others(backend: Any) -> None:
    with tinygpt2.toy(2, backend=backend) as model, model.session() as session:
        session.feed("ab")
        result = session.complete(num_beams=3, max_new_tokens=12)
        assert len(result.ids) == 12
        assert session.tokens == [*b"ab", *result.ids]
        assert result.text == model.decode(result.ids)
        rows = model.logits(session.tokens)
        assert result.logprobs is not None
        assert len(result.logprobs) == 12
        assert session.logits.tolist() == pytest.approx(rows[-1].tolist(), abs=1e-4)
        pieces = list(model.stream("ab", num_beams=3, max_new_tokens=12))
        assert "".join(pieces) == result.text
        greedy = model.complete("ab", temperature=0, max_new_tokens=12)
        assert greedy.logprobs is not None
        assert sum(result.logprobs) >= sum(greedy.logprobs) - 1e-6
        assert model.generate("ab", num_beams=3, max_new_tokens=0) == ""


def test_what_beams_refuse() -> None:
    with tinygpt2.toy() as model:
        for options in (
            {"temperature": 0.5},
            {"regex": "a"},
            {"stop": "a"},
            {"bad_words": ["a"]},
            {"allowed": [5]},
            {"logit_bias": {1: 1}},
            {"repetition_penalty": 2},
        ):
            with pytest.raises(InputError, match="option num_beams"):
                model.generate("a", num_beams=2, **options)
        for number in (0, 100_000, "2", 1.5):  # the second would take all memory for caches
            with pytest.raises(
                InputError, match="num_beams: expected a whole number from 1 to 256"
            ):
                model.generate("a", num_beams=number)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="num_return_sequences: expected at most num_beams"):
            model.generate_batch(["a"], num_beams=2, num_return_sequences=3)


def test_beams_at_the_end_of_the_context() -> None:
    with tinygpt2.toy() as model:
        result = model.complete("x" * 126, num_beams=2, max_new_tokens=50)
        assert (len(result.ids), result.finish_reason) == (3, "context")
        results = model.generate_batch(["x"], num_beams=3, num_return_sequences=3, max_new_tokens=0)
        assert [result.ids for result in results] == [[], [], []]
        results = model.generate_batch(["x"], num_beams=3, num_return_sequences=3)
        assert [r.timings.new_tokens for r in results] == [len(r.ids) for r in results]


@pytest.mark.parametrize(
    "more",
    [
        {"overflow": "error"},
        {"max_time": 1.0},
        {"top_k": 5},
        {"repetition_penalty": 1.3},
        {"logprobs": 2},
    ],
)
def test_what_else_beams_refuse(more: dict[str, Any]) -> None:
    """Each of these would be left out without a word."""
    with tinygpt2.toy() as model, pytest.raises(InputError, match="beams"):
        model.complete("x", num_beams=2, **more)


def test_beams_of_a_model_with_its_own_penalty(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", {**TOY, "repetition_penalty": 1.3})
    tinygpt2.convert(tmp_path / "c", tmp_path / "m.tg2")
    with tinygpt2.load(tmp_path / "m.tg2") as model:
        with pytest.raises(
            InputError, match=r"no repetition_penalty; .* pass repetition_penalty=1.0"
        ):
            model.generate_ids([1], num_beams=2)
        assert model.generate_ids([1], num_beams=2, repetition_penalty=1, max_new_tokens=3)
