"""Build a third corpus: general English, with questions about it.

The tables have the columns of `corpus.py`'s. Rows stay in the order of their source, because
`train.py` joins neighbouring rows to longer passages.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sources as src
import templates as forms
from corpus import Contrast, Row, english_enough, shorter, write
from vocabulary import common_words

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'“(])")
CITATION = re.compile(r"\s*\((?:[A-Z][^()]{0,80}\d{4}[a-z]?|see [^()]{0,60}|\[link\])\)")
STOP = frozenset(
    word
    for words in (
        "a an the of to in on at by for from with and or but as is are was were be been being",
        "it its this that these those which who whom their his her they them he she we you i our",
        "your not have has had do does did can could will would may might must should there than",
        "then so such also into about over more most some any all each other",
    )
    for word in words.split(" ")
)
PASSAGE = 450
Found = tuple[list[Row], list[Contrast]]


def tidy(text: str) -> str:
    """Return one line without citations and without marks of split tokens."""
    text = src.SPACE.sub(" ", CITATION.sub("", text)).replace("()", "").strip()
    return re.sub(r"\s+([.,;:?!)])", r"\1", text.replace("''", '"').replace("( ", "("))


def sentences(text: str) -> list[str]:
    """Return the sentences of a text."""
    return [part.strip() for part in SENTENCE.split(text) if part.strip()]


def passages(parts: list[str], rng: random.Random) -> Iterator[list[str]]:
    """Cut sentences into runs of one to five that have at most PASSAGE characters."""
    run: list[str] = []
    most = rng.choice((2, 3, 4, 5))
    for part in parts:
        if run and (len(run) >= most or sum(map(len, run)) + len(part) > PASSAGE):
            yield run
            run, most = [], rng.choice((1, 2, 3, 4, 5))
        run.append(part)
    if run:
        yield run


def keywords(sentence: str, rng: random.Random) -> str:
    """Return a search for the sentence: three to seven of its content words, in order."""
    words = [w for w in re.findall(r"[\w'-]+", sentence) if w.lower() not in STOP]
    count = min(len(words), rng.randint(3, 7))
    kept = sorted(rng.sample(range(len(words)), count))
    return " ".join(words[i] for i in kept).lower()


def asked(sentence: str, rng: random.Random) -> str:
    """Return a question that the sentence answers or confirms."""
    body = sentence.rstrip(".!? ")
    first = body.split()[0] if body.split() else ""
    if first.lower() in STOP:
        body = body[:1].lower() + body[1:]
    return rng.choice(forms.SENTENCE_QUESTIONS).format(x=body)


def described(title: str, text: str, rng: random.Random) -> Found:
    """Return the sentences and passages of a text, searches for them, and the pairs."""
    rows: list[Row] = []
    contrasts: list[Contrast] = []
    for run in passages([s for s in sentences(tidy(text)) if len(s) < PASSAGE], rng):
        passage = " ".join(run)
        if not english_enough(passage):
            continue
        rows.append((passage, "", "prose"))
        one = rng.choice(run)
        rest = " ".join(s for s in run if s is not one)
        if len(run) > 1:
            rows += [(s, "", "prose") for s in run if english_enough(s)]
        if len(rest) > 40 and english_enough(one):
            rows.append((rest, "", "prose"))
            contrasts.append(("web", one, rest, ""))
        if len(one.split()) > 4:
            search = keywords(one, rng)
            rows.append((search, "", "term"))
            contrasts.append(("web", search, passage, ""))
        if 25 < len(one) < 140:
            question = asked(one, rng)
            rows.append((question, "", "question"))
            contrasts.append(("web", question, passage, ""))
        if title and rng.random() < 0.5:
            question = rng.choice(forms.TITLE_QUESTIONS).format(x=title)
            rows += [(title, "", "term"), (question, "", "question")]
            contrasts.append(("web", rng.choice((title, question)), passage, question))
    return rows, contrasts


def defined(term: str, meaning: str, rng: random.Random) -> Found:
    """Return a term, its meaning, questions about the term, and the pairs."""
    one, two = (form.format(x=term) for form in rng.sample(forms.NOUN_QUESTIONS[0], 2))
    named = f"{term}: {meaning}"
    rows: list[Row] = [(meaning, "", "prose"), (named, "", "prose"), (term, "", "term")]
    rows += [(one, "", "question"), (two, "", "question")]
    wanted = rng.choice((meaning, named))
    return rows, [
        ("web", one, wanted, two),
        ("web", term, meaning, two),
        ("duplicate", one, two, wanted),
        ("similar", meaning, named, ""),
    ]


def answered(question: str, answer: str) -> Found:
    """Return a question and its answer, and the pair."""
    rows: list[Row] = [(question, "", "question"), (answer, "", "prose")]
    return rows, [("web", question, answer, "")]


def together(parts: Iterable[Found]) -> Found:
    """Return all rows and all pairs."""
    rows: list[Row] = []
    contrasts: list[Contrast] = []
    for more, pairs in parts:
        rows += more
        contrasts += pairs
    return rows, contrasts


def textbook(path: Path, rng: random.Random) -> Iterator[Found]:
    """Yield what a chapter in CNXML says: paragraphs, aims, terms, exercises with solutions."""
    text = re.sub(r"<(m:math|equation|metadata)\b.*?</\1>", " ", src.read_text(path), flags=re.S)
    text = re.sub(r"<(table|media|cite|link|note class=\"reference\")\b[^>]*/>", "", text)
    problem = re.compile(
        r"<problem\b[^>]*>(.*?)</problem>\s*<solution\b[^>]*>(.*?)</solution>", re.S
    )
    for question, answer in problem.findall(text):
        question, answer = tidy(src.plain(question)), tidy(src.plain(answer))
        if english_enough(question) and english_enough(answer) and len(answer) > 40:
            yield answered(question[:300], shorter(answer, PASSAGE))
    meaning = re.compile(r"<term\b[^>]*>([^<]*)</term>:?\s*<meaning\b[^>]*>(.*?)</meaning>", re.S)
    for term, body in meaning.findall(text):
        body = tidy(src.plain(body))
        if english_enough(body) and len(term) < 60:
            yield defined(term.strip(), body[:PASSAGE], rng)
    body = re.sub(r"<(exercise|definition|table|glossary)\b.*?</\1>", " ", text, flags=re.S)
    page = heading = ""
    for tag, block in re.findall(r"<(title|para|item|caption)\b[^>]*>(.*?)</\1>", body, re.S):
        block = src.plain(block)
        if tag == "title":
            heading = tidy(block)[:100]
            page = page or heading
        elif english_enough(block):
            yield described(rng.choice((heading, f"{page}: {heading}", heading)), block, rng)


def almanac(path: Path, rng: random.Random) -> Iterator[Found]:
    """Yield the fields of a country in the World Factbook that have prose."""

    def leaves(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield tidy(src.plain(value.replace("<br>", " ")))
        elif isinstance(value, dict):
            for part in value.values():
                yield from leaves(part)

    data = json.loads(path.read_text("utf-8"))
    names = list(leaves(data.get("Government", {}).get("Country name", {})))
    name = names[1] if len(names) > 1 else ""
    if not name or name == "none":
        name = next(iter(names), "") or path.stem
    for fields in data.values():
        for field, value in fields.items():
            text = "; ".join(part for part in leaves(value) if part)
            if english_enough(text) and len(text) > 40:
                field = field.split(" - ")[0].lower()
                said = text if name in text or ". " in text else f"{name}, {field}: {text}"
                yield described(f"{field} of {name}", said, rng)


def trivia(path: Path) -> Iterator[Found]:
    """Yield the questions of OpenTriviaQA. The wanted text is the question with its answer."""
    for block in path.read_text("utf-8", "replace").split("#Q ")[1:]:
        question, _, rest = block.partition("\n^ ")
        question, answer = tidy(question), tidy(rest.split("\n")[0])
        if not 20 < len(question) < 250 or not english_enough(question):
            continue
        if answer.lower() in {"true", "false"}:
            yield [(question, "", "prose")], []
            continue
        said = f"{question} {answer}"
        yield [(question, "", "question"), (said, "", "prose")], [("web", question, said, "")]


def questions(paths: Iterable[Path]) -> list[Row]:
    """Return the questions of tables and of JSON lines."""
    found: list[str] = []
    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            text = json.loads(line)["question"] if line.startswith("{") else line.split("\t")[0]
            found.append(tidy(text))
    return [(text, "", "question") for text in dict.fromkeys(found) if 12 < len(text) < 200]


def splits(path: Path) -> Iterator[Found]:
    """Yield the sentences of WikiSplit, each with its two parts."""
    for line in path.read_text("utf-8").splitlines():
        whole, _, parts = line.partition("\t")
        whole, halves = tidy(whole), [tidy(p) for p in parts.split("<::::>")]
        if english_enough(whole) and all(map(english_enough, halves)):
            rows: list[Row] = [(text, "", "prose") for text in (whole, *halves, " ".join(halves))]
            yield rows, [("similar", whole, rows[-1][0], "")]


def parallel_questions(folder: Path) -> Iterator[Found]:
    """Yield passages and questions of XQuAD in English and Chinese."""
    tables = [
        json.loads((folder / f"xquad.{code}.json").read_text("utf-8"))["data"]
        for code in ("en", "zh")
    ]
    for left, right in zip(*tables, strict=True):
        for english, chinese in zip(left["paragraphs"], right["paragraphs"], strict=True):
            both = [
                (english["context"], chinese["context"], ""),
                *(
                    (a["question"], b["question"], "question")
                    for a, b in zip(english["qas"], chinese["qas"], strict=True)
                ),
            ]
            a, b = shorter(both[0][0], 500), shorter(both[0][1], 220)
            for one, two, kind in both[1:]:
                rows: list[Row] = [(one, "", kind), (two, one, f"{kind}_zh")]
                yield (
                    rows,
                    [("web", one, a, two), ("web_zh", two, b, one), ("bitext", one, two, "")],
                )
            yield [(a, "", "prose"), (b, a, "prose_zh")], []


def encyclopaedic(root: Path, rng: random.Random) -> Iterator[Found]:
    """Yield named texts from Wikipedia in the tables of QED, QuoteSum, GAP and AltEntities."""
    for line in (root / "qed/dev.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        question, text = tidy(entry["question_text"]), tidy(entry["paragraph_text"])
        yield answered(question, shorter(text, PASSAGE))
        yield described(entry["title_text"], text, rng)
    for line in (root / "quotesum/dev.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        for n in range(1, 9):
            if text := entry.get(f"source{n}"):
                yield answered(entry["question"], shorter(tidy(text), PASSAGE))
                yield described(entry[f"title{n}"], text, rng)
    for path in sorted(root.glob("gap/*.tsv")):
        for line in path.read_text("utf-8").splitlines()[1:]:
            fields = line.split("\t")
            yield described(fields[-1].rpartition("/")[2].replace("_", " "), fields[1], rng)
    known: set[str] = set()
    for path in sorted(root.glob("alt/*.json")):
        for entry in json.loads(path.read_text("utf-8")):
            for choice in entry["choices"]:
                if choice["name"] not in known:
                    known.add(choice["name"])
                    yield described(choice["name"], choice["description"].removesuffix(" ..."), rng)


def disfluent(path: Path) -> Iterator[Found]:
    """Yield the questions of Disfl-QA, each fluent and disfluent."""
    for entry in json.loads(path.read_text("utf-8")).values():
        one, two = tidy(entry["original"]), tidy(entry["disfluent"])
        yield [(one, "", "question"), (two, one, "question")], [("duplicate", one, two, "")]


def recipes(path: Path, rng: random.Random) -> Iterator[Found]:
    """Yield the remarks and steps of a recipe in Markdown."""
    _, head, body = [*path.read_text("utf-8").split("---", 2), "", ""][:3]
    title = re.search(r"^title: *(.+)$", head, re.M)
    name = title[1].strip("\"' ") if title else path.stem.replace("-", " ")
    body = re.sub(r"!\[[^]]*\]\([^)]*\)|\[([^]]*)\]\([^)]*\)|[*_`#]", r"\1", body)
    lines = [re.sub(r"^\s*(?:\d+\.|-)\s*", "", line).strip() for line in body.split("\n")]
    steps = [line if line[-1] in ".!?" else line + "." for line in lines if len(line) > 25]
    parts = [line for line in lines if 3 < len(line) <= 40]
    if parts:
        yield described(f"ingredients of {name}", f"{name}: {', '.join(parts[:12])}.", rng)
    yield described(f"how to cook {name}", " ".join(steps), rng)


def everyday(root: Path, common: set[str], rng: random.Random, most: int) -> Iterator[Found]:
    """Yield questions about the senses of common nouns and verbs, with the glosses."""
    senses = [s for s in src.wordnet_senses(root) if s.part in {"noun", "verb"}]
    known = [s for s in senses if any(w in common for w in s.words)]
    nouns = sorted({w for s in known if s.part == "noun" for w in s.words if w in common})
    for _ in range(most):
        sense = rng.choice(known)
        group = rng.choice(forms.NOUN_QUESTIONS if sense.part == "noun" else forms.VERB_QUESTIONS)
        x = rng.choice([w for w in sense.words if w in common])
        y = rng.choice(nouns)
        one, two = (form.format(x=x, y=y) for form in rng.sample(group, 2))
        rows: list[Row] = [(one, "", "question"), (two, "", "question")]
        rows.append((f"{sense.words[0]}: {sense.gloss}", "", "prose"))
        yield rows, [("web", one, rows[-1][0], two), ("duplicate", one, two, rows[-1][0])]


def build(args: argparse.Namespace) -> Found:
    """Read every source."""
    rng = random.Random(args.seed)
    root = args.folder
    parts: dict[str, Iterable[Found]] = {
        "textbooks": (
            f for path in sorted(root.glob("openstax/*/*.cnxml")) for f in textbook(path, rng)
        ),
        "almanac": (
            f for path in sorted(root.glob("factbook/*/*.json")) for f in almanac(path, rng)
        ),
        "trivia": (f for path in sorted(root.glob("trivia/categories/*")) for f in trivia(path)),
        "questions": [
            (questions([*root.glob("nq/nq_open/*.jsonl"), *root.glob("wellformed/*.tsv")]), [])
        ],
        "splits": (f for path in sorted(root.glob("wikisplit/*.tsv")) for f in splits(path)),
        "encyclopaedic": encyclopaedic(root, rng),
        "disfluent": (f for path in sorted(root.glob("disfl/*.json")) for f in disfluent(path)),
        "recipes": (
            f for path in sorted(root.glob("recipes/content/*.md")) for f in recipes(path, rng)
        ),
        "stars": (
            described(passage.title, passage.text, rng)
            for path in sorted(args.root.parent.glob("*/usr/share/stellarium/**/*.en.utf8"))
            for passage in src.markup_passages(path)
        ),
        "parallel": parallel_questions(root / "xquad"),
        "everyday": everyday(
            args.root / "usr/share/wordnet", set(common_words(args.teacher)), rng, 150_000
        ),
    }
    found = []
    for name, part in parts.items():
        rows, contrasts = together(part)
        found.append((rows, contrasts))
        print(name, len(rows), "rows", len(contrasts), "pairs", flush=True)
    return together(found)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with one folder for each source")
    parser.add_argument("--root", type=Path, required=True, help="unpacked Debian packages")
    parser.add_argument("--teacher", type=Path, required=True, help="folder with its vocab.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    write(*build(args), args.out, args.seed)


if __name__ == "__main__":
    main()
