"""Readers: each turns one kind of file into plain records (titled passages, pairs, functions)."""

from __future__ import annotations

import ast
import gettext
import gzip
import html
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Passage(NamedTuple):
    """A paragraph and the heading it stands under."""

    title: str
    text: str


class Pair(NamedTuple):
    """The same words in English and in Chinese."""

    english: str
    chinese: str


class Function(NamedTuple):
    """A Python function: what its docstring says and its code without the docstring."""

    name: str
    summary: str
    details: str
    code: str


class Sense(NamedTuple):
    """A WordNet sense: its synonyms, its gloss and the examples of its use."""

    part: str
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]


BLOCK = re.compile(r"<(h[1-5]|title|p|dd|para)\b[^>]*>(.*?)</\1>", re.S | re.I)
TAG = re.compile(r"<[^>]+>")
SPACE = re.compile(r"\s+")
HAN = re.compile(r"[\u4e00-\u9fff]")
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "title"}


def plain(markup: str) -> str:
    """Markup to one line of text."""
    return SPACE.sub(" ", html.unescape(TAG.sub("", markup))).replace("\u00b6", "").strip()


def read_text(path: Path) -> str:
    """A file's text, unpacked when it is gzipped; '' when it is not UTF-8."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "replace")


def markup_blocks(text: str) -> list[tuple[str, str]]:
    """The headings and paragraphs of an HTML, Mallard or DocBook page, in order."""
    text = re.sub(r"<(script|style|pre)\b.*?</\1>", " ", text, flags=re.S | re.I)
    return [(m[1].lower(), plain(m[2])) for m in BLOCK.finditer(text)]


def markup_passages(path: Path) -> Iterator[Passage]:
    """Every paragraph of a page with the headings above it."""
    page = heading = ""
    for tag, text in markup_blocks(read_text(path)):
        if tag in HEADINGS:
            heading = re.sub(r"^[\d.]+\s+", "", text)
            page = page or heading
        else:
            yield Passage(heading if heading == page else f"{page}: {heading}"[:120], text)


def text_passages(path: Path) -> Iterator[Passage]:
    """Every paragraph of a plain text with the short line before it as its title."""
    title = ""
    for block in re.split(r"\n\s*\n", read_text(path)):
        line = SPACE.sub(" ", block).strip()
        if len(line) < 60:
            title = line.strip("=-~*# ")
        elif not re.search(r"[|{}<>\\]{2}|\.\.\.\.|----|====|::$", line):
            yield Passage(title, line)


def control_passages(path: Path, field: str) -> dict[str, Passage]:
    """A package index's descriptions by their digest: the short line and the paragraphs."""
    found = {}
    for stanza in path.read_text("utf-8").split("\n\n"):
        digest = re.search(r"^Description-md5: (\w+)", stanza, re.M)
        body = re.search(rf"^{field}: (.*?)(?=^\S|\Z)", stanza, re.M | re.S)
        if digest and body:
            short, _, rest = body[1].partition("\n")
            paragraphs = re.sub(r"\n \.\n", "\n\n", rest)
            joint = "" if HAN.search(short) else " "
            lines = ["\n" if not p.strip() else p.strip() for p in paragraphs.split("\n")]
            text = re.sub(r"\s*\n\s*", "\n", joint.join(lines)).strip()
            found[digest[1]] = Passage(short.strip(), text)
    return found


def catalogue_pairs(path: Path) -> Iterator[Pair]:
    """The messages of a compiled gettext catalogue, without shortcut marks and placeholders."""
    with path.open("rb") as file:
        catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    for key, value in catalogue.items():
        key = key[0] if isinstance(key, tuple) else key
        english = plain(key.rpartition("\x04")[2])
        chinese = plain(value)
        english = re.sub(r"[_&](?=\w)", "", english)
        chinese = re.sub(r"\(_?&?\w\)|[_&](?=\w)", "", chinese)
        if HAN.search(chinese) and english and not re.search(r"%\d*\$?[a-z]{2}|\{\{", english):
            yield Pair(english, chinese)


def page_pairs(english: Path, chinese: Path) -> Iterator[Pair]:
    """Paragraphs of a page and of its translation, when both have the same blocks in order."""
    left, right = markup_blocks(read_text(english)), markup_blocks(read_text(chinese))
    if [tag for tag, _ in left] == [tag for tag, _ in right]:
        for (_, a), (_, b) in zip(left, right, strict=True):
            if HAN.search(b) and not HAN.search(a):
                yield Pair(a, b)


def cedict_entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    """CC-CEDICT: simplified headword and its English glosses."""
    for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines():
        match = re.match(r"(\S+) (\S+) \[[^]]*\] /(.*)/", line)
        if match:
            glosses = [g for g in match[3].split("/") if not re.match(r"CL:|variant of|old ", g)]
            glosses = [re.sub(r"\[[^]]*\]|\S+\|(?=\S)", "", g).strip() for g in glosses]
            if glosses and not any("surname" in g for g in glosses[:1]):
                yield match[2], glosses


def dictd_entries(path: Path) -> Iterator[Passage]:
    """The entries of a dictd file: headword and each numbered sense."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    for entry in re.split(r"\n\n?(?=\S)", text):
        head, _, body = entry.partition("\n")
        word = re.match(r"[A-Z]?[\w' -]+", head)
        if not word or "00-database" in head:
            continue
        body = re.sub(r"\[[^\]]*\]|--\s?[A-Z][\w. ]+", "", body)
        for sense in re.split(r"\n\s+(?:\d+\.|\([a-z]\))\s|\n\s*\n", body):
            sense = SPACE.sub(" ", re.sub(r"^\s*\d+\.\s|[{}]", "", sense)).strip()
            yield Passage(word[0].strip(), sense)


def wordnet_senses(folder: Path) -> Iterator[Sense]:
    """Every synset of WordNet's data files."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            if line.startswith("  "):
                continue
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            words = [
                w.replace("_", " ").split("(")[0]
                for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            ]
            examples = tuple(re.findall(r'"([^"]{8,})"', gloss))
            gloss = re.sub(r'[;,]?\s*"[^"]*"?', "", gloss).strip(" ;")
            yield Sense(part, tuple(words), gloss, examples)


def python_functions(path: Path) -> Iterator[Function]:
    """The documented functions of one Python file."""
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node)
        if not text or node.name.startswith("test"):
            continue
        first, _, rest = text.partition("\n\n")
        first, details = SPACE.sub(" ", first).strip(), SPACE.sub(" ", rest.partition("\n\n")[0])
        lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
        start, end = node.body[0].lineno - node.lineno, (node.body[0].end_lineno or 0) - node.lineno
        kept = lines[:start] + lines[end + 1 :]
        indent = len(lines[0]) - len(lines[0].lstrip())
        code = "\n".join(line[indent:] for line in kept)
        yield Function(node.name, first, details.strip(), code)


def english_chinese(
    entries: Iterable[tuple[str, list[str]]], frequency: dict[str, int]
) -> dict[str, str]:
    """English word to the most frequent Chinese word one of whose glosses it is."""
    candidates: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for chinese, glosses in entries:
        for place, gloss in enumerate(glosses):
            for part in gloss.split(";"):
                word = re.sub(r"\([^)]*\)", "", part).strip().lower()
                word = re.sub(r"^(to|a|an|the|be) ", "", word)
                if 0 < len(word) < 30 and word.count(" ") < 3 and HAN.search(chinese):
                    weight = frequency.get(chinese, 0) / (1 + place)
                    candidates[word].append((weight, chinese))
    return {word: max(found)[1] for word, found in candidates.items()}


DROPPED = {"the", "a", "an", "to", "do", "does", "did", "been", "it", "its"}


def root_forms(word: str) -> list[str]:
    """A word and what it may be an inflection of."""
    forms = [word]
    for ending, put in (("ies", "y"), ("es", ""), ("s", ""), ("ied", "y"), ("ed", ""), ("ed", "e")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            forms.append(word[: -len(ending)] + put)
    if word.endswith("ing") and len(word) > 5:
        forms += [word[:-3], word[:-3] + "e", word[:-4]]
    return forms


def word_by_word(text: str, lexicon: dict[str, str]) -> str | None:
    """English text in Chinese words, two-word terms first; None when too few are known."""
    tokens = re.findall(r"[A-Za-z']+|\d+|[.,;:?!()]", text)
    out, known, place, total = [], 0, 0, 0
    marks = {".": "。", ",": "，", ";": "；", ":": "：", "?": "？", "!": "！", "(": "（", ")": "）"}
    while place < len(tokens):
        token = tokens[place]
        two = " ".join(tokens[place : place + 2]).lower()
        place += 1
        if token in marks or token.isdigit():
            out.append(marks.get(token, token))
            continue
        if token.lower() in DROPPED:
            continue
        total += 1
        found = lexicon.get(two)
        if found and place < len(tokens):
            place += 1
        else:
            found = next((lexicon[f] for f in root_forms(token.lower()) if f in lexicon), None)
        known += found is not None
        out.append(found or f" {token} ")
    text = SPACE.sub(" ", "".join(out)).strip()
    return text if total and known / total >= 0.75 else None


def sampled(items: list, most: int, seed: int) -> list:
    """At most so many of the items, drawn with the seed."""
    return items if len(items) <= most else random.Random(seed).sample(items, most)
