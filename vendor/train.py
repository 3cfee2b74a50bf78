"""Train the model that tinygpt2 carries: a small GPT-2 that tells fairy tales.

    python -m pip install torch numpy tokenizers safetensors
    python vendor/train.py --corpus ../shared/data/corpus --out /tmp/tales
    python tinygpt2.py convert /tmp/tales/export -o vendor/tales.tg2

The first command after the installation cleans the books, trains a byte-level vocabulary,
trains the network for `--minutes` by the clock, and writes under `--out`: the cleaned books
(clean/), the vocabulary, checkpoint.pt, and export/ with the files that transformers would
write for a GPT-2, the held-out bits per byte and samples beside them. Started again with the
same arguments it resumes from its checkpoint. The schedule follows elapsed training time and
not a count of steps, so that it ends when it said it would, whatever the machine. It runs on
the processor, in bfloat16 where that multiplies bfloat16 itself and in float32 elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

END = "<|endoftext|>"
HELD_OUT = ("peter-pan", "lang-green")


# --- The books -----------------------------------------------------------------------------


class Book(NamedTuple):
    """Where a book's stories begin, in its own words, and what comes after the last one."""

    start: str
    stop: str = ""


BOOKS = {
    "aesops-fables": Book("A hungry Fox saw some fine bunches", "ILLUSTRATIONS"),
    "alice-in-wonderland": Book("Alice was beginning to get very tired"),
    "andersens-fairy-tales": Book("Many years ago, there was an Emperor"),
    "anne-of-green-gables": Book("MRS. Rachel Lynde lived just where"),
    "back-of-the-north-wind": Book("I HAVE been asked to tell you"),
    "black-beauty": Book("The first place that I can well remember"),
    "five-children-and-it": Book("The house was three miles from the station"),
    "grimm-household-tales": Book("In old times when wishing still helped one"),
    "grimms-fairy-tales": Book(
        "A certain king had a beautiful garden", "The Brothers Grimm, Jacob"
    ),
    "jacobs-celtic-fairy-tales": Book("Connla of the Fiery Hair was son", "MAN OR WOMAN"),
    "jacobs-english-fairy-tales": Book("Once upon a time there was a woman", "OYEZ-OYEZ-OYEZ"),
    "jacobs-indian-fairy-tales": Book("The Bodhisatta was at one time", "Notes and References"),
    "jungle-book": Book("It was seven o"),
    "land-of-oz": Book("In the Country of the Gillikins"),
    "lang-blue": Book("Once upon a time in a certain country"),
    "lang-brown": Book("Once upon a time a great king of the East"),
    "lang-crimson": Book("There was once a king"),
    "lang-green": Book("Once upon a time there lived a King who was immensely rich"),
    "lang-grey": Book("There was once upon a time a king", "End of The Grey Fairy Book"),
    "lang-lilac": Book("In the land of Erin there dwelt"),
    "lang-orange": Book("Once upon a time, at the town of Senna"),
    "lang-pink": Book("Once upon a time there lived a cat of marvellous"),
    "lang-red": Book("ONCE upon a time there lived in the village"),
    "lang-violet": Book("Long, long ago there stood in the midst"),
    "lang-yellow": Book("A cat had made acquaintance with a mouse"),
    "little-women": Book("\"Christmas won't be Christmas"),
    "ozaki-japanese-fairy-tales": Book("Long, long ago there lived, in Japan"),
    "ozma-of-oz": Book("The wind blew hard and joggled"),
    "peter-pan": Book("All children, except one, grow up"),
    "peter-rabbit": Book("Once upon a time there were four little Rabbits"),
    "princess-and-the-goblin": Book("There was once a little princess"),
    "raggedy-ann-stories": Book("One day the dolls were left all to themselves"),
    "railway-children": Book("They were not railway children to begin with"),
    "second-jungle-book": Book("The Law of the Jungle--which is by far"),
    "secret-garden": Book("When Mary Lennox was sent"),
    "through-the-looking-glass": Book("One thing was certain, that the WHITE"),
    "treasure-island": Book("SQUIRE TRELAWNEY, Dr. Livesey"),
    "velveteen-rabbit": Book("There were other things in the stocking"),
    "wilde-happy-prince": Book("HIGH above the city", "Printed by"),
    "wind-in-the-willows": Book("The Mole had been working very hard"),
    "wizard-of-oz": Book("Dorothy lived in the midst"),
    "wonderful-adventures-of-nils": Book("Once there was a boy", "TABLE OF PRONUNCIATION"),
}

NOTE = re.compile(r"\[[^\[\]]{0,600}\]|\{[^{}]*\}|\(\d+\)|[_|\[\]]|\*(?=\w)|(?<=\w)\*")
NUMERAL = r"[IVXLC]+"
CHAPTER = re.compile(
    r"(?:chapter|part|book|legend|stave)\s+[\divxlc]+\b|\d+\.?\s|[ivxlc]+\.?\s", re.I
)
RULE = re.compile(r"[\W\d_]*")
FOOTNOTE = re.compile(r"\n[ \t]*\n[ \t]*(?:\(\d+\)|\*|\[?footnote)[^\n]*(?:\n.+)*", re.I)
CREDIT = re.compile(r"\(?(?:from|translated|adapted|taken|see|contes|grimm|ibid)\b", re.I)
DATE = re.compile(
    r"(?:(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, )?"
    r"(?:March|April|May|June|July) [\w -]+\.?"
)
SMALL = re.compile(
    "a|an|and|as|at|aus|by|de|der|des|du|for|from|her|his|how|in|it|la|le|of|on|or|that|the|to|"
    "und|was|went|who|with",
    re.I,
)
# Words of abuse for peoples, as pieces of patterns: a paragraph with one is left out, and a
# story with many is left out whole.
SLUR = re.compile(
    r"\b(?:n[i]gg[ea]r|negr(?:o|ess)|dark(?:ie|y\b)|blackamoor|pi[ck]+ann?in|red-?skin|squaw|"
    r"half-breed|injun|kaff?ir|hottentot|china[m][ae]n|jap(?:s|\b)|jew(?:s|ess|ish|\b))\w*",
    re.I,
)


def plain(text: str) -> str:
    """Fold letters to ASCII, dashes to `--`, and take out notes and marks of emphasis."""
    text = text.replace("\u2014", "--").replace("\u2013", "-").replace("`", "\u2018")
    for ligature, letters in {"æ": "ae", "Æ": "Ae", "œ": "oe", "ß": "ss"}.items():
        text = text.replace(ligature, letters)
    text = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    text = re.sub(r" ?\.( \.)+", "...", NOTE.sub("", text))
    text = re.sub(r"(?<=\w) - (?=\w)", "--", re.sub(r"(?<=[a-z]-) (?=[A-Z])", "", text))
    return re.sub(r"\s*--+(?!\s*\n\s*\n)[ \t]*\n?[ \t]*", "--", text)


def curly(text: str) -> str:
    """Give straight quotation marks a direction, as printers do."""
    text = re.sub(r"(?:(?<=^)|(?<=[\s(-]))(['\"]+)(?=\S)", open_marks, text)
    text = re.sub(r"\u2018(?=(?:tis|twas|twere|twill|twould|em|un)\b)", "\u2019", text, flags=re.I)
    return text.replace("'", "\u2019").replace('"', "\u201d")


def open_marks(match: re.Match[str]) -> str:
    """Return the opening forms of straight quotation marks."""
    return match[1].replace("'", "\u2018").replace('"', "\u201c")


def american(paragraph: str) -> str:
    """Turn speech in single curly quotes into speech in double ones, and the reverse within."""
    first, *speeches = paragraph.translate({0x201C: "'", 0x201D: "'"}).split("\u2018")
    return first + "".join('"' + close_speech(speech) for speech in speeches)


def close_speech(speech: str) -> str:
    """Turn into `"` the one apostrophe that closes a speech: best one after punctuation."""
    after_stop = re.search(r"(?<=[^\w\s])\u2019(?!\w)", speech)
    after_word = list(re.finditer(r"(?<=\w)\u2019(?!\w)", speech))
    found = after_stop or (after_word[-1] if after_word else None)
    return speech[: found.start()] + '"' + speech[found.end() :] if found else speech


def straight(text: str) -> str:
    """Write every quotation mark as ASCII does."""
    return text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})


def unwrap(block: str, width: int) -> str:
    """Join the lines of a paragraph; keep the lines of a verse, which are all short."""
    lines = [" ".join(line.split()) for line in block.strip().split("\n")]
    verse = len(lines) > 1 and max(map(len, lines[:-1])) < 0.8 * width
    return ("\n" if verse else " ").join(lines)


def calm(paragraph: str) -> str:
    """Write words that stand in capitals for emphasis, or to open a chapter, in small letters."""

    def small(match: re.Match[str]) -> str:
        before = match.string[: match.start()].rstrip()[-1:]
        inside = before.isalnum() or before in (",", ";", ":")
        return match[0].lower() if inside else match[0].capitalize()

    return re.sub(rf"(?!{NUMERAL}\b)\b[A-Z]{{2,}}(?:'[A-Z]+)?\b", small, paragraph)


def is_heading(paragraph: str) -> bool:
    """Whether a paragraph is a title, a chapter's number, a date or a story's source."""
    if len(paragraph) > 120:
        return False
    if DATE.fullmatch(paragraph) or re.fullmatch(r"[^a-z]*[A-Z][^a-z]{8,}", paragraph):
        return True
    if paragraph[0] in "\"'":
        return False
    if len(paragraph) < 70 and (CHAPTER.match(paragraph) or CREDIT.match(paragraph)):
        return True
    words = paragraph.rstrip(".").split()
    titled = all(re.search(r"[A-Z\d]", word) or SMALL.fullmatch(word) for word in words)
    return titled and not re.search(r"[,!?;:\"]$|\n", paragraph)


def stories(name: str, text: str) -> list[list[str]]:
    """Cut a book into stories (or chapters), each a list of clean paragraphs."""
    book = BOOKS[name]
    text = plain(FOOTNOTE.sub("\n", text))
    text = text[text.index(book.start) :]
    text = text[: text.rindex(book.stop)] if book.stop else text
    width = int(np.percentile([len(line) for line in text.split("\n") if line], 90))
    single = text.count(" '") + text.count("\u2018") > text.count("\u201c") + text.count('"') / 2
    result: list[list[str]] = [[]]
    for block in re.split(r"\n[ \t]*\n", text):
        paragraph = curly(unwrap(block, width)) if block.strip() else ""
        paragraph = straight(american(paragraph) if single else paragraph).strip()
        paragraph = re.sub(r"^\d+ (?=[a-z])", "", paragraph)
        if RULE.fullmatch(paragraph):
            continue
        if is_heading(paragraph):
            result.append([])
        elif result[-1] and paragraph[0].islower() and re.search(r"[\w,]$", result[-1][-1]):
            result[-1][-1] += " " + calm(paragraph)
        elif paragraph.isascii():
            result[-1].append(calm(paragraph))
    return [story for story in result if decent(story)]


def decent(story: list[str]) -> bool:
    """Take passages with slurs or open quotes out of a story, and say whether one is left."""
    bad = [paragraph for paragraph in story if SLUR.search(paragraph)]
    torn = [
        paragraph
        for paragraph, following in zip(story, [*story[1:], ""], strict=False)
        if paragraph.count('"') % 2 and following[:1] != '"'
    ]
    story[:] = [paragraph for paragraph in story if paragraph not in bad + torn]
    return len(bad) < 4 + len(story) // 20 and sum(map(len, story)) > 300


def clean(corpus: Path, out: Path) -> None:
    """Write each cleaned book as out/clean/NAME.txt, its stories parted by end-of-text."""
    (out / "clean").mkdir(parents=True, exist_ok=True)
    for name in BOOKS:
        found = stories(name, (corpus / f"{name}.txt").read_text(encoding="utf-8"))
        text = END.join("\n\n".join(story) + "\n" for story in found)
        (out / "clean" / f"{name}.txt").write_text(text, encoding="utf-8")


def documents(out: Path, names: tuple[str, ...] | list[str]) -> list[str]:
    """Read the cleaned stories of some books."""
    texts = ((out / "clean" / f"{name}.txt").read_text(encoding="utf-8") for name in names)
    return [story for text in texts for story in text.split(END)]


# --- The vocabulary ------------------------------------------------------------------------


def make_vocabulary(out: Path, size: int) -> Tokenizer:
    """Learn byte-level BPE from the training books and write vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents(out, training_books()), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    export = out / "export"
    export.mkdir(parents=True, exist_ok=True)
    vocabulary = {**model["vocab"], END: size - 1}
    (export / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (export / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    tokenizer = open_vocabulary(export)
    tokenizer.save(str(export / "tokenizer.json"))
    return tokenizer


def open_vocabulary(export: Path) -> Tokenizer:
    """Read the vocabulary from vocab.json and merges.txt."""
    files = str(export / "vocab.json"), str(export / "merges.txt")
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def training_books() -> list[str]:
    """Name the books that are not held out."""
    return [name for name in BOOKS if name not in HELD_OUT]


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Encode texts as one run of ids, each text after an end-of-text, one more at the end."""
    end = tokenizer.token_to_id(END)
    ids = [end]
    for encoding in tokenizer.encode_batch(texts):
        ids += [*encoding.ids, end]
    return torch.tensor(ids)


# --- The network: GPT-2, its parts under the names that checkpoints use ---------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2, named as in config.json."""

    vocab_size: int = 4096
    n_positions: int = 512
    n_embd: int = 240
    n_layer: int = 4
    n_head: int = 5


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Let each position read from those before it."""
        rows, length, width = x.shape
        heads = self.c_attn(x).view(rows, length, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], is_causal=True
        )
        found: Tensor = self.c_proj(mixed.transpose(1, 2).reshape(rows, length, width))
        return found


class Feed(nn.Module):
    """The two-layer network that each position goes through alone."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, bend, narrow."""
        found: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return found


class Block(nn.Module):
    """One layer of the network."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.n_embd)
        self.mlp = Feed(shape)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add to the stream what attention and then the feed-forward part find."""
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """GPT-2 with its output matrix tied to its token embedding."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.n_positions, shape.n_embd)
        self.h = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                depth = math.sqrt(2 * shape.n_layer) if "c_proj" in name else 1
                nn.init.normal_(weight, std=0.02 / depth)
            elif "ln_" not in name:
                nn.init.zeros_(weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the token after each position."""
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return functional.linear(self.ln_f(x), self.wte.weight)


# --- Training ------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: for the matrices inside the blocks.

    Keller Jordan's method: five rounds of a Newton-Schulz iteration push the singular values
    of the momentum towards one. It needs far fewer tokens here than Adam.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix by one orthogonal step."""
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(momentum, group["momentum"]))
                scale = math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
                matrix.mul_(1 - group["lr"] * group["decay"])
                matrix.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return roughly the nearest matrix with orthonormal rows or columns."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def optimizers(model: GPT2, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Give the blocks' matrices to Muon, and embeddings, gains and biases to AdamW."""
    matrices = [w for w in model.h.parameters() if w.ndim == 2]
    vectors = [w for w in model.parameters() if w.ndim == 1]
    groups = [
        {"params": [model.wte.weight, model.wpe.weight], "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=options.adam_rate, betas=(0.9, 0.95), fused=True)
    return [Muon(matrices, options.muon_rate, 0.02), adam]


def batches(ids: Tensor, tokens: int, length: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of windows for ever: each epoch all of the text, cut afresh, shuffled.

    One window in sixteen, and at least one in a batch, starts where a story does, as a
    reader's prompt will.
    """
    random = np.random.default_rng(seed)
    ends = np.flatnonzero(ids.numpy() == ids[0].item())
    ends = ends[ends < len(ids) - length - 1]
    rows = tokens // length
    opening = math.ceil(rows / 16)
    while True:
        starts = np.arange(random.integers(length), len(ids) - length - 1, length)
        random.shuffle(starts)
        for first in range(0, len(starts) - rows + 1, rows):
            chosen = starts[first : first + rows]
            chosen[:opening] = random.choice(ends, opening)
            yield torch.stack([ids[start : start + length + 1] for start in chosen])


def rate(progress: float) -> float:
    """Give the learning rate's factor at a share of the time: warm-up, then half a cosine."""
    return min(1.0, (progress + 1e-3) / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))


def loss_of(model: GPT2, batch: Tensor) -> Tensor:
    """Return the mean loss, in nats, of a batch's tokens after each window's first."""
    logits = model(batch[:, :-1]).float()
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where it does not, float32 is faster."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@dataclass
class Progress:
    """How far a training has come."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0


class Training:
    """A model on its way, with its optimizers, clock and checkpoint file."""

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options, self.out = options, out
        self.shape = Shape(
            options.vocabulary, options.context, options.width, options.layers, options.heads
        )
        self.model = GPT2(self.shape, options.dropout)
        self.optimizers = optimizers(self.model, options)
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.at = Progress()
        self.half = has_bfloat16()
        self.loss = torch.compile(loss_of, dynamic=False) if options.compile else loss_of
        if (out / "checkpoint.pt").exists():
            self.load()

    def load(self) -> None:
        """Take up the training where its checkpoint left it."""
        saved = torch.load(self.out / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.at = Progress(**saved["at"])

    def save(self) -> None:
        """Write the checkpoint, and the model as it now is to export/."""
        saved = {
            "model": self.model.state_dict(),
            "at": asdict(self.at),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(saved, self.out / "checkpoint.new")
        (self.out / "checkpoint.new").replace(self.out / "checkpoint.pt")
        write_export(self.model, self.shape, self.out / "export")

    def progress(self) -> float:
        """Return the share of the training time that is over."""
        return self.at.seconds / (60 * float(self.options.minutes))

    def run(self, ids: Tensor) -> None:
        """Train until the time is over: short windows first, whole contexts for the rest."""
        for length, until in (
            (self.options.context // 2, self.options.short),
            (self.options.context, 1.0),
        ):
            source = batches(ids, self.options.batch, length, self.options.seed + self.at.steps)
            self.run_until(until, source)

    def run_until(self, until: float, source: Iterator[Tensor]) -> None:
        """Step, report and save until a share of the time is over."""
        mean, saved, last = 0.0, self.at.seconds, time.monotonic()
        while self.progress() < until:
            loss = self.step(next(source))
            now = time.monotonic()
            self.at.seconds, last = self.at.seconds + now - last, now
            mean = loss if not mean else 0.95 * mean + 0.05 * loss
            if self.at.steps % 20 == 0:
                speed = self.at.tokens / self.at.seconds
                print(
                    f"{self.at.seconds / 60:6.1f} min  step {self.at.steps}  loss {mean:.3f}  "
                    f"{self.at.tokens / 1e6:.2f} M tokens  {speed:.0f} tokens/s",
                    flush=True,
                )
            if self.at.seconds > saved + 300:
                self.save()
                saved = self.at.seconds
        self.save()

    def step(self, batch: Tensor) -> float:
        """Make one step of both optimizers on one batch and return its loss."""
        factor = rate(self.progress())
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = self.loss(self.model, batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.at.steps += 1
        self.at.tokens += batch[:, 1:].numel()
        return loss.item()


# --- What comes out ------------------------------------------------------------------------


def write_export(model: GPT2, shape: Shape, export: Path) -> None:
    """Write config.json and model.safetensors as transformers does (matrices transposed)."""
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **asdict(shape),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": shape.vocab_size - 1,
        "eos_token_id": shape.vocab_size - 1,
        "tie_word_embeddings": True,
    }
    tensors = {
        f"transformer.{name}": (w.T if name.startswith("h.") and w.ndim == 2 else w).contiguous()
        for name, w in model.state_dict().items()
    }
    save_file(tensors, export / "model.safetensors", {"format": "pt"})
    (export / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def bits_per_byte(model: GPT2, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Measure bits per UTF-8 byte with windows of a whole context, moved on by half of it.

    Every token is counted once, with at least half a context before it but at the very start.
    The bits of the end-of-text marks between stories count; bytes they have none.
    """
    ids, context = encode(tokenizer, texts), model.wpe.num_embeddings
    nats, done = 0.0, 0
    for start in range(0, len(ids) - 1, context // 2):
        window = ids[start : start + context + 1]
        logits = model(window[None, :-1])[0]
        losses = functional.cross_entropy(logits, window[1:], reduction="none")
        nats += float(losses[done - start :].double().sum())
        done = start + len(window) - 1
        if done == len(ids) - 1:
            break
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.no_grad()
def continue_text(model: GPT2, tokenizer: Tokenizer, prompt: str, heat: float, seed: int) -> str:
    """Write on from a prompt, by the best token or by drawing among the best forty."""
    end, context = model.wte.num_embeddings - 1, model.wpe.num_embeddings
    ids = [end, *tokenizer.encode(prompt).ids]
    random = torch.Generator().manual_seed(seed)
    for _ in range(160):
        best = model(torch.tensor([ids[-context:]]))[0, -1].topk(40)
        odds = (best.values / heat).softmax(0) if heat else torch.eye(40)[0]
        ids.append(int(best.indices[torch.multinomial(odds, 1, generator=random)]))
        if ids[-1] == end:
            break
    return str(tokenizer.decode(ids))


def write_report(training: Training, tokenizer: Tokenizer) -> None:
    """Write the held-out bits per byte and some samples beside the export."""
    model, lines = training.model.eval(), [json.dumps(asdict(training.at))]
    for names in [*([name] for name in HELD_OUT), list(HELD_OUT)]:
        value = bits_per_byte(model, tokenizer, documents(training.out, names))
        lines.append(f"{' + '.join(names)}: {value:.4f} bits per byte")
    for prompt in ("Once upon a time", "The wolf said", "There was once a poor fisherman", ""):
        for heat, seed in ((0.0, 0), (0.8, 1), (0.8, 2)):
            text = continue_text(model, tokenizer, prompt, heat, seed)
            lines.append(f"\n--- {prompt!r}, temperature {heat}, seed {seed}\n{text}")
    (training.out / "export" / "report.txt").write_text("\n".join(lines) + "\n", "utf-8")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the books")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=114, help="training time")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=240)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--short", type=float, default=0.7, help="share of the time with half contexts"
    )
    parser.add_argument("--batch", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs g++)")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Clean, learn the vocabulary, train, export, evaluate."""
    options = parse_options()
    if not (options.out / "export" / "merges.txt").exists():
        clean(options.corpus, options.out)
        make_vocabulary(options.out, options.vocabulary)
    tokenizer = open_vocabulary(options.out / "export")
    training = Training(options.out, options)
    training.run(encode(tokenizer, documents(options.out, training_books())))
    write_report(training, tokenizer)


if __name__ == "__main__":
    main()
