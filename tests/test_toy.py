"""Section 10, the toy: a model in memory for the tests of other programs."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

import tinygpt2

BACKENDS = ["numpy"] if tinygpt2.library_path() is None else ["c", "numpy"]
# SHA-256 of the texts below, from both backends. Programs rely on them: they must never change.
TEXTS_HASH = "e0b071910dc7cb6fb182889def63e634f4644231e7bc5310e09f2ee7c5e729be"


def texts(model: tinygpt2.Model) -> list[str]:
    prompts = ["", "Hello ", '{"name": "', "caf\u00e9 \u20ac\U0001f600\n"]
    greedy = [model.generate(prompt, temperature=0, max_new_tokens=40) for prompt in prompts]
    return greedy + [model.generate("a", seed=seed, max_new_tokens=60) for seed in range(10)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_are_the_same_everywhere(backend: str) -> None:
    digest = hashlib.sha256()
    for seed in (0, 1, -5, 1 << 70):
        with tinygpt2.toy(seed, backend=backend) as model:  # type: ignore[arg-type]
            for text in texts(model):
                digest.update(text.encode() + b"\0")
    assert digest.hexdigest() == TEXTS_HASH


def test_texts_are_words_of_ascii_letters() -> None:
    with tinygpt2.toy() as model:
        text = " ".join(texts(model))
        assert text.isascii()
        assert text.replace(" ", "").isalpha()
        assert len(set(text.split())) > 30
        ends = [model.complete("a", seed=seed).finish_reason for seed in range(20)]
    assert {*ends} == {"end", "context"}


@pytest.mark.parametrize("seed", range(3))
def test_gaps_between_the_best_logits_are_wide(seed: int) -> None:
    """Wide against the error of float32, which is about 1e-5 for logits of this size."""
    ids = np.random.default_rng(seed).integers(0, 257, 128)
    with tinygpt2.toy(seed) as model:
        letters = model.encode(model.generate("", seed=1)) + list(b"aeiou bcdfghjklmnprstvwyz")
        for tokens in (ids, letters[:128]):
            best = np.sort(model.logits(tokens), axis=1)
            assert (best[:, -1] - best[:, -2]).min() > 0.1


def test_every_text_can_be_encoded() -> None:
    with tinygpt2.toy() as model:
        text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000), 0x1F600]))
        assert model.encode(text) == list(text.encode())
        assert model.decode(model.encode(text)) == text
        assert model.score("Once upon a time").perplexity > 1


def test_it_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tinygpt2.toy(seed=7) as model:
        assert "toy(7)" in repr(model)
        assert model.file.checksum() == model.file.metadata["crc32"]
        tinygpt2.read_config(model.file)
    assert not list(tmp_path.iterdir())


def test_seeds_give_different_models() -> None:
    greedy = set()
    for seed in range(10):
        with tinygpt2.toy(seed) as model:
            greedy.add(model.generate("a", temperature=0, max_new_tokens=20))
    assert len(greedy) == 10


@pytest.mark.parametrize("seed", [None, 1.0, "1", True])
def test_wrong_seed(seed: object) -> None:
    with pytest.raises(tinygpt2.InputError, match="seed: expected a whole number, found"):
        tinygpt2.toy(seed)  # type: ignore[arg-type]


def test_a_toy_travels_as_its_seed() -> None:
    with tinygpt2.toy(5, threads=1) as model:
        again = pickle.loads(pickle.dumps(model))
        assert again.fingerprint == model.fingerprint
        assert again.generate("a", seed=1) == model.generate("a", seed=1)
        assert copy.copy(model) is model
