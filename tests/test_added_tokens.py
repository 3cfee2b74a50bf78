"""Text to ids with added tokens: the same as the `tokenizers` library and transformers 5, from
every file that says something about a tokenizer, or a refusal that names it."""

from __future__ import annotations

import importlib
import json
import logging
import pickle
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import END, TOY, toy_tokenizer, write_checkpoint

import tinygpt2

FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
VOCAB, MERGES = toy_tokenizer()
GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast"}


def byte_level(prefix: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True}


def tokenizer_json(*added: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json with the tests' vocabulary. `model_...` are parts of its model."""
    model: dict[str, Any] = {
        "type": "BPE",
        "vocab": VOCAB,
        "merges": MERGES,
        "unk_token": None,
        "dropout": None,
    }
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
    model |= {name[6:]: value for name, value in parts.items() if name.startswith("model_")}
    defaults = {"truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    whole = {"pre_tokenizer": byte_level(), "decoder": byte_level(True), **defaults, **parts}
    rest = {name: value for name, value in whole.items() if not name.startswith("model_")}
    return {"version": "1.0", "added_tokens": list(added), "model": model, **rest}


def entry(text: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    """An added token without an id, with all its flags."""
    token: dict[str, Any] = {"content": text, **dict.fromkeys(FLAGS, False), "special": special}
    return {**token, "normalized": not special, **flags}


def numbered(token: int, text: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    return {"id": token, **entry(text, special, **flags)}


# ------------------------------------------------------------------------------------------------
# The search, with every flag, against the tokenizers library
# ------------------------------------------------------------------------------------------------

ALPHABET = "ab \t\n\u3000é_-语\u0300²Ⓐ‿\u200d\x1c"
PIECES = [*ALPHABET, "the", " the", "<a>", "<a", "aa", "aab", "abab", " a", "a ", "  "]


def random_text(chance: random.Random, pieces: list[str], longest: int) -> str:
    return "".join(chance.choices(pieces, k=chance.randint(1, longest)))


def random_tokens(chance: random.Random) -> list[tinygpt2.AddedToken]:
    """Tokens of all flags. Some are beginnings of others, some begin or end with white space."""
    texts = sorted({random_text(chance, PIECES, 3) for _ in range(chance.randint(1, 8))})
    chance.shuffle(texts)
    rare = chance.choice([0.1, 0.5])
    return [
        tinygpt2.AddedToken(
            text, VOCAB.get(text, 300 + i), *(chance.random() < rare for _ in FLAGS)
        )
        for i, text in enumerate(texts)
    ]


def library_tokenizer(
    tokens: list[tinygpt2.AddedToken], prefix: bool
) -> tuple[Any, dict[int, int]]:
    """The tests' vocabulary in the tokenizers library, and our ids of its added tokens."""
    tokenizers = pytest.importorskip("tokenizers", reason="compares with tokenizers")
    theirs = tokenizers.Tokenizer.from_str(
        json.dumps(tokenizer_json(pre_tokenizer=byte_level(prefix)))
    )
    for token in tokens:
        flags = {name: getattr(token, name) for name in FLAGS}
        theirs.add_tokens([tokenizers.AddedToken(token.text, **flags)])
    return theirs, {theirs.token_to_id(token.text): token.id for token in tokens}


def their_encoding(theirs: Any, ours: dict[int, int], text: str, special: bool) -> list[int] | None:
    theirs.encode_special_tokens = not special
    try:
        return [ours.get(i, i) for i in theirs.encode(text).ids]
    except BaseException as error:  # where a token begins in white space that another one took
        if type(error).__name__ != "PanicException":
            raise
        return None


def assert_same_search(toy: tinygpt2.Model, seed: int) -> int:
    """Compare some texts for random tokens; return how many could be compared."""
    chance, compared = random.Random(seed), 0
    tokens, prefix = random_tokens(chance), chance.random() < 0.3
    theirs, ids = library_tokenizer(tokens, prefix)
    config = toy.config._replace(added_tokens=tuple(tokens), add_prefix_space=prefix)
    tokenizer = tinygpt2.Tokenizer(toy.file, config)
    pieces = [*(token.text for token in tokens), *PIECES]
    for _ in range(8):
        text = random_text(chance, pieces, 12)
        for special in (False, True):
            expected = their_encoding(theirs, ids, text, special)
            if expected is not None:
                assert tokenizer.encode(text, special) == expected, (tokens, text, special)
                compared += 1
    return compared


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_random_tokens_and_texts(toy: tinygpt2.Model, first: int) -> None:
    compared = sum(assert_same_search(toy, seed) for seed in range(first, first + 50))
    assert compared > 700


@pytest.mark.slow
def test_many_random_tokens_and_texts(toy: tinygpt2.Model) -> None:
    for seed in range(1000, 1500):
        assert_same_search(toy, seed)


@pytest.mark.slow
def test_word_characters_are_those_of_the_library() -> None:
    """`single_word`: characters at the edges of our table's ranges, and others."""
    tokenizers = pytest.importorskip("tokenizers", reason="compares with tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    theirs.add_tokens([tokenizers.AddedToken("zz", single_word=True)])
    edges = [[span[0] - 1, span[0], span[-1], span[-1] + 1] for span in spans_of_words()]
    codes = {code for codes in edges for code in codes} | set(range(0x600))
    codes |= set(random.Random(0).sample(range(0x3000), 1000))
    codes |= set(random.Random(1).sample(range(0x10000, 0x20000), 1000))
    codes -= set(tinygpt2.code_points(tinygpt2.NEW_LETTERS))  # up to a newer version of Unicode
    added = tinygpt2.AddedTokens([tinygpt2.AddedToken("zz", 1, False, single_word=True)])
    for character in map(chr, sorted(codes)):
        for text in (f"zz{character}", f"{character}zz"):
            found = [token for _, token in added.split(text, False)]
            assert (1 in found) == (1 in theirs.encode(text).ids), ascii(text)


def spans_of_words() -> list[range]:
    return list(tinygpt2.spans(tinygpt2.WORD_PARTS))


# ------------------------------------------------------------------------------------------------
# What transformers reads from a folder
# ------------------------------------------------------------------------------------------------


def end_entry(**flags: bool) -> dict[str, Any]:
    return numbered(VOCAB[END], END, True, **flags)


def typed(text: str, **flags: bool) -> dict[str, Any]:
    """An added token as tokenizer_config.json has it in the place of a text."""
    return {"__type": "AddedToken", **entry(text, True, **flags)}


def template(*pieces: str, **ids: list[int]) -> dict[str, Any]:
    """A post-processor. "A" is the text."""
    single = [
        {"Sequence" if piece == "A" else "SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    specials = {
        name: {"id": name, "ids": numbers, "tokens": [END] * len(numbers)}
        for name, numbers in ids.items()
    }
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": specials,
    }


X, Y = numbered(265, "<x>", True), numbered(266, "<y>")
LISTED = {str(token.pop("id")): token for token in (end_entry(), numbered(266, "<x>", True))}
ROBERTA: dict[str, Any] = {"type": "RobertaProcessing", "sep": [END, 264], "cls": ["the", 258]}
ROBERTA |= {"trim_offsets": True, "add_prefix_space": False}
SEQUENCE = {
    "type": "Sequence",
    "processors": [byte_level(), template("E", "A", E=[264]), byte_level()],
}

# The files of a folder by their names, without ".json". Each has vocab.json and merges.txt too.
FOLDERS: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "both files": {"tokenizer": tokenizer_json(end_entry(), X, Y)},
    "another vocabulary": {
        "tokenizer": tokenizer_json(end_entry(), model_vocab={**VOCAB, "ab": 265}, model_merges=[]),
    },
    "holes in the ids": {
        "tokenizer": tokenizer_json(end_entry(), numbered(280, "<x>", True), numbered(290, "<y>")),
    },
    "holes, general class": {
        "tokenizer_config": GENERAL,
        "tokenizer": tokenizer_json(end_entry(), numbered(280, "<x>", True), numbered(290, "<y>")),
    },
    "an id of another token": {
        "tokenizer_config": GENERAL,
        "tokenizer": tokenizer_json(numbered(270, "the", True), end_entry(), numbered(258, "<y>")),
    },
    "two added tokens with one id": {
        "tokenizer": tokenizer_json(end_entry(), X, numbered(265, "<y>")),
    },
    "two added tokens with one id, general class": {
        "tokenizer_config": GENERAL,
        "tokenizer": tokenizer_json(end_entry(), X, numbered(265, "<y>"), numbered(265, "<z>")),
    },
    "one added token with two ids": {
        "tokenizer_config": GENERAL,
        "tokenizer": tokenizer_json(end_entry(), X, numbered(267, "<x>", True)),
    },
    "listed": {"tokenizer_config": {"added_tokens_decoder": LISTED}},
    "listed, beside others": {
        "tokenizer_config": {"added_tokens_decoder": LISTED},
        "tokenizer": tokenizer_json(end_entry(), numbered(265, "<y>")),
        "special_tokens_map": {"pad_token": "[PAD]", "additional_special_tokens": ["<u>"]},
        "added_tokens": {"<q>": 266},
    },
    "listed, general class": {
        "tokenizer_config": {**GENERAL, "added_tokens_decoder": LISTED},
        "tokenizer": tokenizer_json(end_entry(), numbered(265, "<y>")),
    },
    "listed with other flags": {
        "tokenizer_config": {
            **GENERAL,
            "added_tokens_decoder": {"265": entry("<y>", False, lstrip=True, rstrip=True)},
        },
        "tokenizer": tokenizer_json(end_entry(), numbered(265, "<y>")),
    },
    "space before": {"tokenizer_config": {"add_prefix_space": True}},
    "space before, two opinions": {
        "tokenizer_config": {"add_prefix_space": True},
        "tokenizer": tokenizer_json(end_entry()),
    },
    "space before, in tokenizer.json": {
        "tokenizer": tokenizer_json(end_entry(), pre_tokenizer=byte_level(True)),
    },
    "space before, general class": {
        "tokenizer_config": GENERAL,
        "tokenizer": tokenizer_json(end_entry(), Y, pre_tokenizer=byte_level(True)),
    },
    "begin token": {"tokenizer_config": {"add_bos_token": True}},
    "as the slow tokenizer of transformers 4 saved it": {
        "tokenizer_config": {
            "tokenizer_class": "GPT2Tokenizer",
            "pad_token": None,
            **{
                f"{role}_token": {"__type": "AddedToken", **entry(END, normalized=True)}
                for role in ("bos", "eos", "unk")
            },
        },
        "special_tokens_map": {
            **{f"{role}_token": entry(END, normalized=True) for role in ("bos", "eos", "unk")},
            "pad_token": END,
        },
    },
    "begin token that is text": {"tokenizer_config": {"add_bos_token": "false"}},
    "begin token of another name": {"tokenizer_config": {"add_bos_token": 1, "bos_token": "<s>"}},
    "end token": {
        "tokenizer_config": {"add_eos_token": True, "eos_token": typed("</s>", lstrip=True)}
    },
    "begin token that is null": {"tokenizer_config": {"add_bos_token": True, "bos_token": None}},
    "begin token beside tokenizer.json": {
        "tokenizer_config": {"add_bos_token": True, "add_eos_token": True},
        "tokenizer": tokenizer_json(end_entry()),
    },
    "template": {
        "tokenizer": tokenizer_json(end_entry(), post_processor=template("E", "A", E=[264]))
    },
    "template with two ids": {
        "tokenizer": tokenizer_json(
            end_entry(), post_processor=template("E", "A", "F", E=[264, 3], F=[258])
        ),
    },
    "template, general class": {
        "tokenizer_config": GENERAL,
        "tokenizer": tokenizer_json(X, post_processor=template("E", "A", "E", E=[265])),
    },
    "template of nothing": {"tokenizer": tokenizer_json(end_entry(), post_processor=template("A"))},
    "ByteLevel after": {"tokenizer": tokenizer_json(end_entry(), post_processor=byte_level())},
    "RobertaProcessing": {"tokenizer": tokenizer_json(end_entry(), post_processor=ROBERTA)},
    "BertProcessing": {
        "tokenizer": tokenizer_json(
            end_entry(),
            post_processor={"type": "BertProcessing", "sep": [END, 264], "cls": ["the", 258]},
        ),
    },
    "processors": {"tokenizer": tokenizer_json(end_entry(), post_processor=SEQUENCE)},
    "special map": {
        "special_tokens_map": {
            "bos_token": entry("<s>", lstrip=True),
            "pad_token": "[PAD]",
            "additional_special_tokens": ["<u>", "<v>"],
        }
    },
    "special map with the same text twice": {
        "special_tokens_map": {"bos_token": entry("<s>", True, lstrip=True), "cls_token": "<s>"}
    },
    "special map beside options": {
        "tokenizer_config": {"pad_token": "<w>", "additional_special_tokens": ["<x>"]},
        "special_tokens_map": {"pad_token": "[PAD]", "additional_special_tokens": ["<u>", "<v>"]},
    },
    "special map with new names": {
        "tokenizer_config": {"extra_special_tokens": ["<x>", typed("<y>", rstrip=True)]},
        "special_tokens_map": {"extra_special_tokens": ["<u>", "<x>"], "image_token": "<img>"},
    },
    "special map beside tokenizer.json": {
        "special_tokens_map": {"pad_token": "[PAD]", "eos_token": "<y>"},
        "tokenizer": tokenizer_json(end_entry(), X, Y),
    },
    "added tokens": {
        "added_tokens": {"<q>": 270, "<r>": 268, "<s>": 265},
        "tokenizer_config": {"bos_token": "<s>"},
    },
    "added tokens with a role": {
        "added_tokens": {"<q>": 270, "<s>": 265},
        "tokenizer_config": {"bos_token": typed("<s>"), "extra_special_tokens": ["<q>"]},
    },
    "added token of the vocabulary": {"added_tokens": {"the": 270}},
    "all roles": {
        "tokenizer_config": {
            "mask_token": typed("<m>", lstrip=True),
            "pad_token": "[PAD]",
            "unk_token": "<u>",
            "sep_token": END,
            "cls_token": None,
            "eos_token": "the",
        }
    },
    "new role, as an object": {
        "tokenizer_config": {
            "image_token": {"__type": "AddedToken", **entry("<img>", special=True)},
            "pad_token": "<pad>",
        }
    },
    "new role of the model's own": {
        "tokenizer_config": {"model_specific_special_tokens": {"z_token": "<z>"}}
    },
    "new roles": {
        "tokenizer_config": {"image_token": "<img>", "extra_special_tokens": {"foo_token": "<foo>"}}
    },
    "roles, general class": {
        "tokenizer_config": {**GENERAL, "pad_token": "[PAD]", "bos_token": "<s>"},
        "tokenizer": tokenizer_json(end_entry(), X, numbered(266, "<s>")),
    },
    "padding": {
        "tokenizer_config": GENERAL,
        "tokenizer": tokenizer_json(
            end_entry(),
            padding={
                **{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": 265, "pad_type_id": 0, "pad_token": "[PAD]"},
            },
        ),
    },
    "no roles": {"tokenizer_config": dict.fromkeys(("unk_token", "bos_token", "eos_token"))},
    "class in config.json": {
        "config": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "tokenizer": tokenizer_json(end_entry(), pre_tokenizer=byte_level(True)),
    },
    "class of slow tokenizers": {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast"}},
    "what the class ignores": {
        "tokenizer": tokenizer_json(
            end_entry(), Y, normalizer={"type": "Lowercase"}, model_unk_token="the"
        ),
    },
    "sequence of one": {
        "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"},
        "tokenizer": tokenizer_json(
            end_entry(), pre_tokenizer={"type": "Sequence", "pretokenizers": [byte_level()]}
        ),
    },
    "texts of letters for bytes": {
        "tokenizer": tokenizer_json(end_entry(), numbered(265, "é"), numbered(266, "Ġq q")),
    },
    "truncation": {
        "tokenizer_config": GENERAL,
        "tokenizer": tokenizer_json(
            end_entry(),
            truncation={
                **{"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
            },
        ),
    },
}
TEXTS = [
    "",
    "the a",
    f"the {END} a<x><y><z> <s> </s> the </s> <m> [PAD]<u><v><w> <q><r> é Ġq q",
    "THE the[PAD]<img><foo> <z>  <y>  the",
    END,
]


def write_folder(folder: Path, files: dict[str, Any]) -> Path:
    """A checkpoint whose tokenizer files have this content."""
    write_checkpoint(folder, {**TOY, **files.get("config", {})})
    for name, content in files.items():
        if name != "config":
            (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return folder


def converted(folder: Path, **options: Any) -> tinygpt2.Model:
    out = folder.parent / f"{folder.name}.tg2"
    tinygpt2.convert(folder, out, **options)
    return tinygpt2.load(out)


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers", reason="compares with transformers")
    module.logging.set_verbosity_error()
    return module


@pytest.mark.slow
@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_folder_as_transformers_reads_it(
    tmp_path: Path, transformers: Any, files: dict[str, Any]
) -> None:
    folder = write_folder(tmp_path / "m", files)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    with converted(folder) as model:
        added = {token.id: token for token in model.config.added_tokens}
        assert added.keys() == theirs.added_tokens_decoder.keys()
        for text in TEXTS:
            for special in (False, True):
                for ends in (False, True):
                    ids = theirs.encode(
                        text, split_special_tokens=not special, add_special_tokens=ends
                    )
                    assert model.encode(text, special, ends) == ids
                    assert model.decode(ids) == theirs.decode(ids)
        every = range(len(theirs))
        assert [model.decode([i]) for i in every] == [theirs.decode([i]) for i in every]
    assert tinygpt2.main(["info", str(folder.parent / "m.tg2"), "--verify"]) == 0


def random_changes(theirs: Any, chance: random.Random) -> None:
    """What people do to a tokenizer before they save it."""
    tokenizers = importlib.import_module("tokenizers")
    names = [f"<{letter}{i}>" for i in range(3) for letter in "abc"] + ["the", "ing", "é", "语"]
    chance.shuffle(names)

    def token() -> Any:
        flags = {name: chance.random() < 0.3 for name in FLAGS}
        return tokenizers.AddedToken(names.pop(), **flags)

    for _ in range(chance.randint(1, 4)):
        role = chance.choice(["pad_token", "bos_token", "mask_token", "eos_token"])
        change = chance.randint(0, 4)
        if change == 0:
            theirs.add_tokens([token(), names.pop()])
        elif change == 1:
            theirs.add_special_tokens({role: chance.choice([names.pop(), token()])})
        elif change == 2:
            theirs.add_special_tokens({"extra_special_tokens": [names.pop(), token()]})
        elif change == 3:
            theirs.add_tokens([names.pop()], special_tokens=True)
        else:
            theirs.add_bos_token = True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_folder_that_transformers_writes(tmp_path: Path, transformers: Any, seed: int) -> None:
    """After random changes: written, read again and perhaps written once more by transformers."""
    chance = random.Random(seed)
    options = {"add_prefix_space": chance.random() < 0.3, "add_bos_token": chance.random() < 0.3}
    folder = write_folder(tmp_path / "m", {"tokenizer_config": options})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for _ in range(chance.randint(1, 2)):
        random_changes(theirs, chance)
        theirs.save_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [token.content for token in theirs.added_tokens_decoder.values()]
    with converted(folder) as model:
        for _ in range(20):
            text = random_text(chance, [*texts, *PIECES], 8)
            for special in (False, True):
                ids = theirs.encode(text, split_special_tokens=not special)
                assert model.encode(text, special) == ids, text
                assert model.decode(ids) == theirs.decode(ids)


DEEPER = '{"type": "Sequence", "processors": ['
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "an object without its type": (
        {"tokenizer_config": {"bos_token": {"content": "<s>"}}},
        "tokenizer_config.json",
        "bos_token",
    ),
    "a number": ({"tokenizer_config": {"pad_token": 5}}, "tokenizer_config.json", "pad_token"),
    "an extra object": (
        {"tokenizer_config": {"extra_special_tokens": [entry("<s>")]}},
        "tokenizer_config.json",
        "extra_special_tokens",
    ),
    "extra text": (
        {"tokenizer_config": {"extra_special_tokens": "<s>"}},
        "tokenizer_config.json",
        "extra_special_tokens",
    ),
    "another class": (
        {"tokenizer_config": {"tokenizer_class": "BertTokenizer"}},
        "tokenizer_config.json",
        "tokenizer_class",
    ),
    "general class without tokenizer.json": (
        {"tokenizer_config": GENERAL},
        "tokenizer_config.json",
        "tokenizer_class",
    ),
    "own code": (
        {"tokenizer_config": {"auto_map": ["a", "b"]}},
        "tokenizer_config.json",
        "auto_map",
    ),
    "an id that is taken": (
        {"tokenizer": tokenizer_json(end_entry(), Y, model_vocab={**VOCAB, "ab": 266})},
        "tokenizer.json",
        "added token '<y>'",
    ),
    "two sets of flags": (
        {
            "tokenizer_config": {**GENERAL, "added_tokens_decoder": {"265": entry("<y>", True)}},
            "tokenizer": tokenizer_json(end_entry(), numbered(265, "<y>")),
        },
        "tokenizer.json",
        "added token '<y>'",
    ),
    "a flag that is a number": (
        {"tokenizer": tokenizer_json({**Y, "lstrip": 1})},
        "tokenizer.json",
        "added_tokens",
    ),
    "a template for pairs only": (
        {"tokenizer": tokenizer_json(end_entry(), post_processor=template("A", "A"))},
        "tokenizer.json",
        "post_processor",
    ),
    "two that add tokens": (
        {
            "tokenizer": tokenizer_json(
                end_entry(), post_processor={**SEQUENCE, "processors": [ROBERTA, ROBERTA]}
            )
        },
        "tokenizer.json",
        "post_processor",
    ),
    "another post-processor": (
        {"tokenizer": tokenizer_json(end_entry(), post_processor={"type": "Mean"})},
        "tokenizer.json",
        "post_processor",
    ),
    "processors without end": (
        {
            "tokenizer": tokenizer_json(
                end_entry(), post_processor=json.loads(300 * DEEPER + "{}" + 300 * "]}")
            )
        },
        "tokenizer.json",
        "post_processor",
    ),
    "listed as a list": (
        {"tokenizer_config": {"added_tokens_decoder": [["265", entry("<x>")]]}},
        "tokenizer_config.json",
        "added_tokens_decoder",
    ),
    "a decoder of another kind": (
        {
            "tokenizer_config": GENERAL,
            "tokenizer": tokenizer_json(end_entry(), decoder={"type": "WordPiece"}),
        },
        "tokenizer.json",
        "decoder",
    ),
    "a token of 257 characters": (
        {"tokenizer": tokenizer_json(end_entry(), numbered(265, "x" * 257))},
        "tokenizer.json",
        "config added_tokens",
    ),
    "an added token around texts that is lost": (
        {
            "config": {"vocab_size": 265},
            "tokenizer": tokenizer_json(end_entry(), X, post_processor=template("X", "A", X=[265])),
        },
        "tokenizer.json",
        "tokens around every text",
    ),
}


@pytest.mark.table
@pytest.mark.parametrize(("files", "name", "field"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(tmp_path: Path, files: dict[str, Any], name: str, field: str) -> None:
    folder = write_folder(tmp_path / "m", files)
    with pytest.raises(tinygpt2.FormatError) as caught:
        tinygpt2.convert(folder, tmp_path / "m.tg2")
    assert (caught.value.path, caught.value.field) == (f"{folder}/{name}", field)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# ------------------------------------------------------------------------------------------------
# What is said at conversion
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    with caplog.at_level(logging.WARNING, "tinygpt2"):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_added_tokens_beyond_the_embedding_are_dropped(
    tmp_path: Path, transformers: Any, notes: Any
) -> None:
    """A padding token is added, and the embedding never resized."""
    folder = write_folder(tmp_path / "m", {"config": {"vocab_size": 265}})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(folder)
    with converted(folder) as model:
        assert model.config.added_tokens == (tinygpt2.AddedToken(END, 264),)
        assert model.encode(f"the{END}", special=True) == theirs.encode(f"the{END}")
        assert 265 not in model.encode("the[PAD]", special=True)
    assert [note for note in notes() if "dropped 1 added tokens ('[PAD]')" in note]


def test_smaller_vocabulary_leaves_ids_without_text(tmp_path: Path) -> None:
    with converted(write_folder(tmp_path / "m", {})) as model:
        assert model.config.vocab_size == 300
        assert model.decode(range(265, 300)) == ""


def test_missing_tokenizer_is_said(tmp_path: Path, notes: Any) -> None:
    folder = write_checkpoint(tmp_path / "m", tokenizer=False)
    with converted(folder) as model:
        assert model.tokenizer is None
    (note,) = notes()
    assert "no tokenizer" in note
    assert "--tokenizer" in note


def test_ignored_parts_are_said(tmp_path: Path, notes: Any) -> None:
    files = {"tokenizer": tokenizer_json(end_entry(), normalizer={"type": "Lowercase"})}
    converted(write_folder(tmp_path / "m", files)).close()
    (note,) = notes()
    assert "normalizer" in note
    assert "ignored" in note


# ------------------------------------------------------------------------------------------------
# A tokenizer from elsewhere, and characters
# ------------------------------------------------------------------------------------------------


def test_tokenizer_of_another_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tokenizer=False)
    other = write_folder(tmp_path / "other", {"added_tokens": {"<q>": 265}})
    for source in (other, str(other)):
        with converted(folder, tokenizer=source) as model:
            assert model.encode("the<q>") == [258, 265]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(tokenizer_json(end_entry(), Y)), "utf-8")
    with converted(folder, tokenizer=path) as model:
        assert model.encode("the<y>") == [258, 265]


LETTERS = "\n !-.aeé\u0300語\U0001f600"
STOI = {letter: i for i, letter in enumerate(LETTERS)}
CHARACTER_LISTS: dict[str, object] = {
    "stoi": {"stoi": STOI},
    "stoi and the rest": {
        "stoi": STOI,
        "itos": {str(i): letter for letter, i in STOI.items()},
        "vocab_size": len(STOI),
    },
    "itos": {"itos": {str(i): letter for letter, i in STOI.items()}},
    "list": {"itos": list(LETTERS)},
    "plain": STOI,
}


@pytest.mark.parametrize("content", CHARACTER_LISTS.values(), ids=CHARACTER_LISTS)
def test_character_lists(tmp_path: Path, content: object) -> None:
    folder = write_checkpoint(tmp_path / "m", {"vocab_size": 64}, tokenizer=False)
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(content), "utf-8")
    with converted(folder, tokenizer=path) as model:
        text = "aé\u0300 語!\n\U0001f600"
        assert model.encode(text) == [STOI[letter] for letter in text]
        assert model.decode(model.encode(text)) == text
        assert model.encode("") == []
        assert model.score(text).n_bytes == len(text.encode())
        for odd, name in (("b", "U+0062"), ("語語\u3042", "U+3042"), ("\ud800", "U+FFFD")):
            with pytest.raises(tinygpt2.InputError, match=f"{re.escape(name)}.* is not in"):
                model.encode(odd)
    assert tinygpt2.main(["info", str(tmp_path / "m.tg2"), "--verify"]) == 0


BAD_LISTS: dict[str, tuple[object, str]] = {
    "words": ({"stoi": {"a": 0, "the": 1}}, "token 'the'"),
    "nothing": ({"stoi": {"": 0}}, "token ''"),
    "half a pair": ({"stoi": {"\ud800": 0}}, "token '\\ud800'"),
    "twice": ({"stoi": {"a": 0, "b": 0}}, "token 'b'"),
    "twice in itos": ({"itos": ["a", "a"]}, "itos"),
    "a text": ({"itos": "ab"}, "itos"),
    "two that disagree": ({"stoi": {"a": 0, "b": 1}, "itos": ["b", "a"]}, "itos"),
    "numbers": ({"itos": [1, 2]}, "itos"),
    "lists": ({"itos": [["a"], ["b"]]}, "itos"),
    "names": ({"itos": {"x": "a"}}, "itos"),
    "empty": ({}, "stoi"),
    "a list": ({"stoi": ["a"]}, "stoi"),
    "no ids": ({"a": "b"}, "token 'a'"),
    "an id beyond the embedding": ({"a": 300}, "vocabulary"),
    "WordPiece": ({"model": {"type": "WordPiece", "vocab": {}}}, "model type"),
}


@pytest.mark.table
@pytest.mark.parametrize(("content", "field"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_character_lists(tmp_path: Path, content: object, field: str) -> None:
    folder = write_checkpoint(tmp_path / "m", tokenizer=False)
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(tinygpt2.FormatError) as caught:
        tinygpt2.convert(folder, tmp_path / "m.tg2", tokenizer=path)
    assert (caught.value.path, caught.value.field) == (str(path), field)


def test_pickled_character_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nanoGPT's meta.pkl; the message has the Python that writes it as JSON."""
    folder = write_checkpoint(tmp_path / "m", {"vocab_size": 64}, tokenizer=False)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": STOI, "itos": LETTERS}))
    with pytest.raises(tinygpt2.FormatError, match="a pickle") as caught:
        tinygpt2.convert(folder, tmp_path / "m.tg2", tokenizer=tmp_path / "meta.pkl")
    code = caught.value.advice.split('python -c "')[1].rstrip('"')
    monkeypatch.chdir(tmp_path)
    exec(code)
    with converted(folder, tokenizer=tmp_path / "meta.json") as model:
        assert model.encode("語") == [STOI["語"]]


@pytest.mark.parametrize("name", ["nothing-here", "empty"])
def test_no_tokenizer_there(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "m", tokenizer=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(tinygpt2.FormatError, match="tokenizer"):
        tinygpt2.convert(folder, tmp_path / "m.tg2", tokenizer=tmp_path / name)


@pytest.mark.slow
def test_tokenizer_by_a_name(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--tokenizer gpt2` is a folder of that name, where there is one."""
    folder = write_checkpoint(tmp_path / "m", {"vocab_size": 50257, "n_embd": 4}, tokenizer=False)
    (tmp_path / "gpt2").symlink_to(data / "gpt2-vocab")
    monkeypatch.chdir(tmp_path)
    with converted(folder, tokenizer="gpt2") as model:
        assert model.encode("Hello world") == [15496, 995]


def test_tokenizer_on_the_command_line(tmp_path: Path, capsys: Any) -> None:
    folder = write_checkpoint(tmp_path / "m", {"vocab_size": 64}, tokenizer=False)
    (tmp_path / "meta.json").write_text(json.dumps(STOI), "utf-8")
    arguments = ["convert", folder, "-o", tmp_path / "m.tg2", "--tokenizer", tmp_path / "meta.json"]
    assert tinygpt2.main(list(map(str, arguments))) == 0
    with tinygpt2.load(tmp_path / "m.tg2") as model:
        assert model.encode("語") == [STOI["語"]]


# ------------------------------------------------------------------------------------------------
# The calls that take text
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def around_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts tokens around every text, and has one ordinary added token."""
    folder = tmp_path_factory.mktemp("around") / "m"
    ends = template("X", "A", "Z", X=[265, 3], Z=[7])
    files = {"tokenizer": tokenizer_json(end_entry(), X, Y, post_processor=ends)}
    converted(write_folder(folder, files)).close()
    return folder.parent / "m.tg2"


@pytest.fixture
def around(around_path: Path) -> Iterator[tinygpt2.Model]:
    with tinygpt2.load(around_path) as model:
        yield model


def test_encode(around: tinygpt2.Model) -> None:
    assert around.config.special_tokens == {END: 264, "<x>": 265}
    plain = around.encode("<x>", add_special_tokens=False)
    assert len(plain) == 3
    assert around.encode("the<y><x>") == [265, 3, 258, 266, *plain, 7]
    assert around.encode("the<y><x>", special=True) == [265, 3, 258, 266, 265, 7]
    assert around.encode("<x>", special=True, add_special_tokens=False) == [265]


def test_every_call_takes_special(around: tinygpt2.Model) -> None:
    text, ids = "the<x>", around.encode("the<x>", special=True)
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0}
    assert ids != around.encode(text)
    expected = around.generate_ids(ids, **options)
    assert around.generate_ids(text, special=True, **options) == expected
    assert list(around.stream_ids(text, special=True, **options)) == expected
    assert around.complete(text, special=True, **options).ids == expected
    answer = around.decode(expected)
    assert around.generate(text, special=True, **options) == answer
    assert "".join(around.stream(text, special=True, **options)) == answer
    np.testing.assert_array_equal(around.logits(text, special=True), around.logits(ids))
    with around.session() as session:
        session.feed(text, special=True)
        assert session.tokens == ids
        session.feed("<x>", special=True)
        assert session.tokens == [*ids, 265]
        session.generate_ids("<x>", special=True, max_new_tokens=0)
        assert session.tokens == [*ids, 265, 265]


def test_only_the_first_text_has_tokens_around_it(around: tinygpt2.Model) -> None:
    with around.session() as session:
        session.feed("the")
        session.feed("the")
        assert session.tokens == [265, 3, 258, 7, 258]
        session.rewind(5)
        session.feed("the")
        assert session.tokens == [265, 3, 258, 7]
    with around.session() as session:
        session.feed([5])
        session.feed("the")
        assert session.tokens == [5, 258]


@pytest.mark.parametrize(("prompt", "expected"), [((), [265, 3]), ("", [265, 3, 7])])
def test_empty_prompt(around: tinygpt2.Model, prompt: Any, expected: list[int]) -> None:
    with around.session() as session:
        session.generate_ids(prompt, max_new_tokens=0)
        assert session.tokens == expected
        session.generate_ids(prompt, max_new_tokens=0)
        assert session.tokens == expected


@pytest.mark.parametrize(
    ("bos", "eos", "expected"), [(5, 6, [5]), (None, 6, [6]), (5, None, [5]), (None, None, [])]
)
def test_start_of_an_empty_prompt(
    tmp_path: Path, bos: int | None, eos: int | None, expected: list[int]
) -> None:
    folder = write_checkpoint(tmp_path / "m", {"bos_token_id": bos, "eos_token_id": eos})
    with converted(folder) as model:
        assert model.start_tokens == expected
        score = model.score([3, 4])
        rows = model.logits([*expected, 3, 4])
        logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        assert score.logprobs[-1] == pytest.approx(logprobs[-2, 4], abs=1e-4)
        assert (score.logprobs[0] is None) == (not expected)
        with model.session() as session:
            if expected:
                session.generate_ids(max_new_tokens=0)
                assert session.tokens == expected
            else:
                with pytest.raises(tinygpt2.InputError, match="empty"):
                    session.generate_ids(max_new_tokens=0)


def test_score_follows_the_tokens_before(around: tinygpt2.Model) -> None:
    score = around.score("the<x>", special=True)
    assert score.ids == [258, 265]
    rows = around.logits([265, 3, 258, 265])
    logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    expected = [logprobs[1, 258], logprobs[2, 265]]
    assert score.logprobs == pytest.approx(expected, abs=1e-4)
    assert len(around.score("<x>").ids) == 3
    assert around.score([258, 265]) == score._replace(n_bytes=6)


@pytest.mark.parametrize("length", [1, 61, 62, 63, 64, 65, 200])
def test_score_of_long_texts(around: tinygpt2.Model, length: int) -> None:
    ids = [i % 200 for i in range(length)]
    score = around.score(ids)
    assert len(score.logprobs) == length
    first = around.score(ids[:60]).logprobs
    assert score.logprobs[: len(first)] == pytest.approx(first, abs=1e-4)


def test_special_on_the_command_line(around_path: Path, capsys: Any) -> None:
    place = ["--model", str(around_path)]
    options = ["--prompt", "the<x>", "--max-tokens", "1", "--temperature", "0", "--json", *place]
    counts = []
    for flags in ([], ["--special"]):
        assert tinygpt2.main([*options, *flags]) == 0
        counts.append(json.loads(capsys.readouterr().out)["figures"]["prompt_tokens"])
    assert counts == [7, 5]
    for flags, count in (([], 4), (["--special"], 2)):
        assert tinygpt2.main(["score", *place, "--prompt", "the<x>", "--json", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == count
