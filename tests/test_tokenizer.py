"""The tokenizer against `regex`, tiktoken and transformers, on both of its paths.

What it does with a text depends on the class of each character alone: letter, number, white space
or other. So two things are shown for all texts: that every code point has the class which `regex`
gives it, and that all short texts over some members of each class are cut as GPT-2 cuts them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import END, ROOT, write_checkpoint
from test_cli import Argument, call, interpreters, run

import tinygpt2

Words = Callable[[str], Iterable[str]]
Encode = Callable[[str], Sequence[int]]

# How OpenAI's encoder.py writes it.
WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"  # and white space:
    r"|\s+(?!\S)|\s+"
)
SURROGATES = range(0xD800, 0xE000)
CODE_POINTS = [c for c in range(sys.maxunicode + 1) if c not in SURROGATES]

# Letters and numbers of Unicode 17 and 18, which `regex` 2026.11.15 knows, and which are unassigned
# in the Unicode 16 of tiktoken 0.14.0 and tokenizers 0.23.3. Only here may the ids differ.
VERSIONS = {"regex": "2026.11.15", "tiktoken": "0.14.0", "tokenizers": "0.23.3"}
YOUNG = """
558 58b-58c 88f c5c cdc 208f 209d-209f a7ce-a7cf a7d2 a7d4 a7dd a7e2 a7f1 ab6c-ab6d 107bb-107bf
10940-10959 10ec5-10ec7 10ed9-10eee 11b0a 11db0-11ddb 11de0-11de9 11df1 1246f 12475-1247f
12550-12686 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18cd6-18cda 18d09-18d20 18d80-18df2
18e00-19191 191a0-191d2 1b123-1b128 1b168 1d6a6 1df1f-1df24 1df2b-1df81 1df90-1df96 1dfcd-1dfff
1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2b81e
2cea2-2cead 323b0-33479 3d000-3fc3f
"""


def code_points(ranges: str) -> set[int]:
    pairs = [item.split("-") for item in ranges.split()]
    return {c for pair in pairs for c in range(int(pair[0], 16), int(pair[-1], 16) + 1)}


def check_differences(found: set[int], known: set[int], *packages: str) -> None:
    """With the versions noted exactly the known ones; with others, none that is old in Unicode."""
    if all(version(package) == VERSIONS[package] for package in packages):
        assert found == known
    else:
        category = unicodedata.ucd_3_2_0.category
        assert {hex(c) for c in found if category(chr(c)) != "Cn"} == set()


def differing(
    ours: Callable[[str], Iterable[Any]],
    theirs: Callable[[str], Iterable[Any]],
    template: str,
    points: Iterable[int],
) -> set[int]:
    """The code points c with which the template gives something else; many go in one text."""
    points = list(points)
    found: set[int] = set()
    for start in range(0, len(points), 1024):
        block = points[start : start + 1024]
        texts = [template.format(c=chr(c)) for c in block]
        if list(ours("".join(texts))) != list(theirs("".join(texts))):
            unequal = {c for c, text in zip(block, texts) if list(ours(text)) != list(theirs(text))}
            found |= unequal or set(block)
    return found


@pytest.fixture(scope="module")
def regex_words() -> Words:
    regex = pytest.importorskip("regex", reason="compares with regex")
    words: Words = regex.compile(WORDS).findall
    return words


@pytest.fixture(params=["regex", "standard library"])
def words(request: pytest.FixtureRequest) -> Words:
    """Both ways of cutting text into words."""
    if request.param == "standard library":
        return tinygpt2.ShadowCutter().cut
    pytest.importorskip("regex", reason="this path needs regex")
    return tinygpt2.word_cutter()


@pytest.fixture
def tokenizer(gpt2: tinygpt2.Model, words: Words) -> Iterator[tinygpt2.Tokenizer]:
    """GPT-2's tokenizer on both paths."""
    tokenizer = gpt2.need_tokenizer()
    tokenizer.cut = words
    tokenizer.cache.clear()
    yield tokenizer
    tokenizer.cut = None


# ------------------------------------------------------------------------------------------------
# Real texts
# ------------------------------------------------------------------------------------------------


def test_texts_of_other_projects(tokenizer: tinygpt2.Tokenizer, data: Path) -> None:
    vectors = json.loads((data / "tokenizer" / "gpt2-bpe-vectors.json").read_text("utf-8"))
    assert len(vectors) == 57
    for vector in vectors:
        assert tokenizer.encode(vector["text"], vector["special"]) == vector["ids"], vector
        assert tokenizer.decode(vector["ids"]) == vector["text"]


@pytest.mark.slow
def test_tiny_shakespeare(tokenizer: tinygpt2.Tokenizer, data: Path) -> None:
    text = (data / "corpus" / "tinyshakespeare.txt").read_text("utf-8")
    ids = tokenizer.encode(text)
    assert len(ids) == 338_025
    assert tokenizer.decode(ids) == text


def corpus(data: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((data / "corpus").glob("*.txt")):
        yield path.name, path.read_text("utf-8")


@pytest.mark.slow
def test_corpus(gpt2: tinygpt2.Model, tiktoken_gpt2: Any, data: Path) -> None:
    """On the path that may go wrong; what follows shows that it cuts texts as `regex` does."""
    tokenizer = gpt2.need_tokenizer()
    tokenizer.cut = tinygpt2.ShadowCutter().cut
    equal = {
        name: tokenizer.encode(text) == tiktoken_gpt2.encode_ordinary(text)
        for name, text in corpus(data)
    }
    assert len(equal) == 43
    assert [name for name in equal if not equal[name]] == []
    tokenizer.cut = None


# ------------------------------------------------------------------------------------------------
# Every code point
# ------------------------------------------------------------------------------------------------

CONTEXTS = [
    "{c}",
    "a{c}b",
    " {c}",
    "1{c}2",
    "{c}{c}",
    "'s{c}",
    "{c}'ll",
    "  {c} ",
    "\n{c}",
    "{c}\r\n\t",
]
PROBE = "a{c}1{c}!\n"


def test_probe_tells_every_class(regex_words: Words) -> None:
    """Not a test of the tokenizer: the next ones say something only if this holds."""
    cuts = {tuple(map(len, regex_words(PROBE.format(c=c)))) for c in ["x", "7", "\u2003", "!"]}
    assert len(cuts) == 4


@pytest.fixture(scope="module")
def probes(regex_words: Words) -> dict[range, str]:
    """For each 256 code points a text that is cut right only if their classes are right.

    It has a probe for each. But if a text of them all is one word, they are of one class, and then
    this word and a probe of one of them are enough.
    """
    texts = {}
    for first in range(0, sys.maxunicode + 1, 256):
        block = range(first, first + 256)
        text = "".join(map(chr, block))
        if regex_words(text) == [text]:
            texts[block] = text + "\n" + PROBE.format(c=text[0])
        else:
            texts[block] = "".join(PROBE.format(c=c) for c in text)
    return texts


def misjudged(words: Words, regex_words: Words, probes: dict[range, str]) -> set[int]:
    """The code points that are of another class than `regex` has it."""
    found: set[int] = set()
    for block, text in probes.items():
        if list(words(text)) != regex_words(text):
            found |= differing(words, regex_words, PROBE, block) or set(block)
    return found


def test_every_code_point_has_its_class(regex_words: Words, probes: dict[range, str]) -> None:
    found = misjudged(tinygpt2.ShadowCutter().cut, regex_words, probes)
    check_differences(found, set(), "regex")


@pytest.mark.slow
def test_classes_in_transformers(
    transformers_gpt2: Any, regex_words: Words, probes: dict[range, str]
) -> None:
    """Where they are ours the ids can differ in the merges alone; some texts below show those."""
    cut = transformers_gpt2.backend_tokenizer.pre_tokenizer.pre_tokenize_str

    def words(text: str) -> list[str]:
        return [text[start:stop] for _, (start, stop) in cut(text)]

    probes = {block: text for block, text in probes.items() if block[0] not in SURROGATES}
    found = misjudged(words, regex_words, probes)
    check_differences(found, code_points(YOUNG), "regex", "tokenizers")


CUT_AGAIN = """
import json, sys, tinygpt2
cut = tinygpt2.ShadowCutter().cut
with open(sys.argv[1], encoding="utf-8") as file:
    texts = json.load(file)
print([first for first, text, sizes in texts if [len(word) for word in cut(text)] != sizes])
"""


@pytest.mark.parametrize("python", interpreters())
@pytest.mark.slow
def test_classes_in_every_python(
    regex_words: Words, probes: dict[range, str], tmp_path: Path, python: str
) -> None:
    """Each knows another version of Unicode."""
    texts = [
        (block[0], text, [len(word) for word in regex_words(text)])
        for block, text in probes.items()
    ]
    (tmp_path / "texts.json").write_text(json.dumps(texts), "utf-8")
    command = [python, "-c", CUT_AGAIN, str(tmp_path / "texts.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_short_texts_are_cut_as_gpt2_does(words: Words, regex_words: Words) -> None:
    """All of up to five signs: of contractions, of each class, the odd ones of Python's `re`."""
    for size in range(6):
        for signs in product("'svl1 \n!_", repeat=size):
            text = "".join(signs)
            assert list(words(text)) == regex_words(text)


def edges(regex_words: Words) -> list[int]:
    """All early code points, and the first and last of every run of one class."""
    regex = pytest.importorskip("regex")
    text = "".join(map(chr, CODE_POINTS))
    found = set(range(0x3000))
    for match in regex.finditer(r"\p{L}+|\p{N}+|\s+|[^\s\p{L}\p{N}]+", text):
        found |= {ord(match[0][0]), ord(match[0][-1])}
    return sorted(found)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.slow
def test_contexts(
    tokenizer: tinygpt2.Tokenizer, tiktoken_gpt2: Any, regex_words: Words, context: str
) -> None:
    """Many code points, each in a text of its own: cut as by `regex`, and the ids of tiktoken."""
    young = code_points(YOUNG)
    for c in edges(regex_words):
        text = context.format(c=chr(c))
        assert list(tokenizer.cut(text)) == regex_words(text)  # type: ignore[misc]
        if c not in young:
            assert tokenizer.encode(text) == tiktoken_gpt2.encode_ordinary(text)


def test_white_space_and_control_characters(words: Words, regex_words: Words) -> None:
    """Every two of them, between letters."""
    odd = [chr(c) for c in range(0x3001) if unicodedata.category(chr(c))[0] in "ZC"]
    odd = [*odd[:80], *(c for c in odd[80:] if regex_words(f"{c}!") != [f"{c}!"])]
    assert len(odd) > 90
    for pair in product([*odd, "\ufeff", "\u200b", "_"], repeat=2):
        text = "x".join(["", "".join(pair), " ".join(pair), ""])
        assert list(words(text)) == regex_words(text)


@pytest.mark.soak
def test_ids_of_every_code_point(gpt2: tinygpt2.Model, tiktoken_gpt2: Any) -> None:
    """Before 'll, which is one token after a letter or a number, and two after anything else.

    Then a letter or a number is a word alone; so the rest of what is assigned is added alone.
    """
    regex = pytest.importorskip("regex", reason="else the classes are those of tinygpt2's tables")
    assigned = [c for c in CODE_POINTS if regex.match(r"[^\p{Cn}\p{Co}\p{L}\p{N}]", chr(c))]
    found = differing(gpt2.encode, tiktoken_gpt2.encode_ordinary, "{c}'ll\n", CODE_POINTS)
    found |= differing(gpt2.encode, tiktoken_gpt2.encode_ordinary, "{c}\n", assigned)
    check_differences(found, code_points(YOUNG), "regex", "tiktoken")


def test_without_regex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "regex", None)
    assert list(tinygpt2.word_cutter()("It's  12_a")) == ["It", "'s", " ", " 12", "_", "a"]


# ------------------------------------------------------------------------------------------------
# What is not plain text
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("a\ud800", "a\ufffd"),
        ("\udfffa", "\ufffda"),
        ("\ud800\ud800", "\ufffd\ufffd"),
        ("a\udc00\ud800", "a\ufffd\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ud83d\ud83d\ude00\ude00", "\ufffd\U0001f600\ufffd"),
        ("\ufeff\ud800\ufeff", "\ufeff\ufffd\ufeff"),
    ],
)
def test_surrogates(tokenizer: tinygpt2.Tokenizer, text: str, mended: str) -> None:
    """What tiktoken makes of them (checked against it in test_tokenizer_properties.py)."""
    assert tokenizer.encode(text) == tokenizer.encode(mended)
    assert tokenizer.decode(tokenizer.encode(text)) == mended


def test_zero_bytes(tokenizer: tinygpt2.Tokenizer) -> None:
    assert tokenizer.encode("a\0\0b") == [64, 188, 188, 65]
    assert tokenizer.decode([64, 188, 188, 65]) == "a\0\0b"


@pytest.mark.parametrize("by", ["argument", "standard input"])
@pytest.mark.parametrize("raw", [b"a\xffb", b"\x80", b"the\xc3", b"\xed\xa0\x80"])
def test_bytes_that_are_not_utf8(toy: tinygpt2.Model, raw: bytes, by: str) -> None:
    """If asked to, the command line makes U+FFFD of each, however the text arrives."""
    prompt, piped = (raw, b"") if by == "argument" else (b"-", raw)
    asked: list[Argument] = ["score", "--json", "--errors", "replace", "--model", toy.path]
    result = call(*asked, "--prompt", prompt, stdin=piped)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["ids"] == toy.encode(raw.decode("utf-8", "replace"))


@pytest.mark.parametrize("by", ["argument", "standard input"])
@pytest.mark.slow
def test_a_process_given_bytes_that_are_not_utf8(toy: tinygpt2.Model, by: str) -> None:
    """Here the system hands them over, and Python makes its strings and streams of them."""
    raw = b"a\xffb \x80 the\xc3 \xed\xa0\x80"
    prompt, piped = (raw, b"") if by == "argument" else (b"-", raw)
    asked: list[Argument] = ["score", "--json", "--errors", "replace", "--model", toy.path]
    result = run(*asked, "--prompt", prompt, stdin=piped, environ={"PYTHONUTF8": "1"})
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["ids"] == toy.encode(raw.decode("utf-8", "replace"))


def test_every_byte_has_a_token(gpt2: tinygpt2.Model, tiktoken_gpt2: Any) -> None:
    tokenizer = gpt2.need_tokenizer()
    ids = [tokenizer.byte_token(byte) for byte in range(256)]
    assert ids == [tiktoken_gpt2.encode_single_token(bytes([byte])) for byte in range(256)]
    assert gpt2.decode(ids) == bytes(range(256)).decode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------
# Special tokens and the space before a text
# ------------------------------------------------------------------------------------------------

AROUND_END = ["", END, f"a{END}", f"{END}{END} b", f" {END}\n", f"a{END[:-1]}{END} 's", "<|end"]


@pytest.mark.parametrize("text", AROUND_END)
def test_end_of_text(
    tokenizer: tinygpt2.Tokenizer, tiktoken_gpt2: Any, transformers_gpt2: Any, text: str
) -> None:
    plain = tokenizer.encode(text)
    assert 50256 not in plain
    assert plain == tiktoken_gpt2.encode_ordinary(text)
    assert plain == transformers_gpt2.encode(text, split_special_tokens=True)
    special = tokenizer.encode(text, special=True)
    assert special.count(50256) == text.count(END)
    assert special == tiktoken_gpt2.encode(text, allowed_special="all")
    assert special == transformers_gpt2.encode(text)


def toy_with(folder: Path, **options: Any) -> tinygpt2.Model:
    """A toy model whose tokenizer_config.json says this."""
    write_checkpoint(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(options), "utf-8")
    tinygpt2.convert(folder, folder / "toy.tg2")
    return tinygpt2.load(folder / "toy.tg2")


def test_longest_special_token_first(tmp_path: Path) -> None:
    names = {264: END, 265: "<a", 266: "<a><b>", 267: "<a>", 268: "[.*", 269: "é "}
    flags = {"special": True, "normalized": False}
    added = {str(token): {"content": name, **flags} for token, name in names.items()}
    with toy_with(tmp_path, added_tokens_decoder=added) as model:
        the = model.encode("the")
        assert model.encode("<a><b>the<a>the<athe", special=True) == [
            *(266, *the, 267),
            *(*the, 265, *the),
        ]
        assert model.encode(f"[.*[x{END}é ", special=True) == [
            *(268, *model.encode("[x")),
            *(264, 269),
        ]
        everything = "".join(names.values())
        assert set(model.encode(everything)).isdisjoint(names)
        assert model.decode(list(names)) == everything


@pytest.mark.parametrize("text", ["", " ", "the", " the", "\nthe", "the the", END, f"{END}the"])
@pytest.mark.parametrize("special", [False, True])
def test_space_before_a_text(tmp_path: Path, data: Path, text: str, special: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    with toy_with(tmp_path, add_prefix_space=True) as model:
        theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
        assert theirs.add_prefix_space
        ids = theirs.encode(text, split_special_tokens=not special)
        assert model.encode(text, special=special) == ids


def test_space_before_every_part_of_a_text(tmp_path: Path) -> None:
    with toy_with(tmp_path, add_prefix_space=True) as model:
        assert model.encode("") == []
        assert model.decode(model.encode("the")) == " the"
        assert model.decode(model.encode(" the")) == " the"
        assert model.decode(model.encode("\nthe")) == " \nthe"
        assert model.encode(f"the{END}the", special=True) == [259, 264, 259]


# ------------------------------------------------------------------------------------------------
# Cost
# ------------------------------------------------------------------------------------------------


def counting_tokenizer(model: tinygpt2.Model) -> Any:
    """Counts the look-ups, the one thing that is done for each pair of neighbours."""
    if not tinygpt2.__file__.endswith(".py"):
        pytest.skip("counts calls inside the module, which a compiled one does not show")

    class Counting(tinygpt2.Tokenizer):
        count = 0

        def find_merge(self, left: int, right: int) -> int:
            self.count += 1
            return super().find_merge(left, right)

    return Counting(model.file, model.config)


LONG_WORDS = {
    "one letter": "a",
    "spaces": " ",
    "signs": "=",
    "letters": "thequickbrownfoxjumpsoverthelazydog",
    "three bytes": "語",
}


@pytest.mark.parametrize("unit", LONG_WORDS.values(), ids=LONG_WORDS)
def test_long_word_takes_few_look_ups(gpt2: tinygpt2.Model, unit: str) -> None:
    """Each merge removes one token and makes two new pairs at most."""
    word = (unit * 2000)[:2000]
    tokenizer = counting_tokenizer(gpt2)
    ids = tokenizer.encode(word)
    assert tokenizer.count <= 3 * len(word.encode())
    assert tokenizer.decode(ids) == word


@pytest.mark.parametrize("unit", LONG_WORDS.values(), ids=LONG_WORDS)
def test_long_word_equals_tiktoken(gpt2: tinygpt2.Model, tiktoken_gpt2: Any, unit: str) -> None:
    word = (unit * 30_000)[:30_000]
    assert gpt2.encode(word) == tiktoken_gpt2.encode_ordinary(word)


def processor_time(tokenizer: tinygpt2.Tokenizer, text: str) -> float:
    """The least of three, so that other work on the machine matters little."""
    times = []
    for _ in range(3):
        start = time.process_time()
        tokenizer.encode(text)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "'", "1 "])
@pytest.mark.slow
def test_time_grows_with_the_length(tokenizer: tinygpt2.Tokenizer, unit: str) -> None:
    """Eight times the text; quadratic time would make it 64."""
    short = processor_time(tokenizer, unit * 4096)
    assert processor_time(tokenizer, unit * 32768) < 24 * short


def test_nothing_is_built_when_a_file_is_opened(gpt2_tokenizer_path: Path) -> None:
    with tinygpt2.load(gpt2_tokenizer_path):  # so that what Python itself keeps is there
        pass
    tracemalloc.start()
    try:
        with tinygpt2.load(gpt2_tokenizer_path) as model:
            kept, _ = tracemalloc.get_traced_memory()
            tokenizer = model.need_tokenizer()
            values = [getattr(tokenizer, name) for name in dir(tokenizer) if name[0] != "_"]
            kinds = [type(value) for value in values if not callable(value)]
            tables = [value for value in values if isinstance(value, dict)]
            added = model.config.added_tokens
    finally:
        tracemalloc.stop()
    assert kept < 100_000  # bytes, for 50,257 tokens and 50,000 merges
    assert not any(tables)
    assert added == (tinygpt2.AddedToken(END, 50256),)
    assert set(kinds) <= {memoryview, int, bool, dict, tuple, type(None), tinygpt2.AddedTokens}
    assert kinds.count(memoryview) == 6


def test_remembered_words_are_bounded(toy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinygpt2, "MAX_CACHE", 10)
    text = " ".join(map(str, range(100))) + " " + "the" * 100
    with tinygpt2.load(toy_path) as model:
        tokenizer = model.need_tokenizer()
        first = tokenizer.encode(text)
        assert 0 < len(tokenizer.cache) <= 10
        assert max(map(len, tokenizer.cache)) <= tinygpt2.MAX_CACHED_WORD
        assert tokenizer.encode(text) == first
        assert tokenizer.decode(first) == text
