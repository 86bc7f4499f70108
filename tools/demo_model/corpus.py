"""Build the training corpus: texts to distil from the teacher, and pairs for the contrast.

Two tables come out. `texts.parquet` has what the student reads, what the teacher reads instead
(empty: the same text) and the kind of text. `pairs.parquet` has a task, a query, the text the task
asks for and a text of the same subject that it does not ask for.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sources as src
import templates as forms

PER_PACKAGE = 22_000
Row = tuple[str, str, str]  # student text, teacher text, kind
Contrast = tuple[str, str, str, str]  # task, query, positive, negative
TOY = re.compile(r"[A-Za-z]")


def english_enough(text: str) -> bool:
    """Prose of a sensible length, mostly letters."""
    return 25 <= len(text) <= 2500 and len(TOY.findall(text)) / len(text) > 0.65


def shorter(text: str, most: int) -> str:
    """The first whole sentences of a text, up to so many characters."""
    if len(text) <= most:
        return text
    cut = max(text.rfind(". ", 0, most), text.rfind("。", 0, most))
    return text[: cut + 1] if cut > most // 3 else text[:most].rpartition(" ")[0] or text[:most]


def documentation(root: Path, rng: random.Random) -> list[src.Passage]:
    """Titled paragraphs of every English manual under the unpacked packages."""
    share = root / "usr/share"
    by_package: dict[str, list[Path]] = defaultdict(list)
    for base in ("doc", "help", "libreoffice/help/en-US", "games", "dasher", "sgml", "info"):
        for path in sorted((share / base).rglob("*")):
            if path.suffix in {".html", ".txt", ".page", ".docbook"} and path.is_file():
                name = str(path.relative_to(share))
                if re.search(r"/(?!(?:C|en|en-US)/)[a-z]{2}(?:[_-]\w+)?/|_source|genindex", name):
                    continue
                by_package["/".join(name.split("/")[:2])].append(path)
    passages = []
    for package, paths in sorted(by_package.items()):
        if re.search(r"zh|_fr|_FR|bengali|french", package):
            continue
        found: list[src.Passage] = []
        for path in src.sampled(paths, 1500, 1):
            read = src.text_passages if path.suffix == ".txt" else src.markup_passages
            found += [p for p in read(path) if english_enough(p.text) and len(p.text) > 60]
        passages += src.sampled(sorted(set(found)), PER_PACKAGE, 2)
    for path in sorted((share / "man").glob("man[1-8]/*.gz")):
        passages += manual_page(path)
    return passages


def manual_page(path: Path) -> list[src.Passage]:
    """Paragraphs of a manual page, with the roff requests taken out."""
    text = re.sub(
        r"\\f[A-Z]|\\-|\\&|\\\(\w\w", lambda m: "-" if m[0] == "\\-" else "", src.read_text(path)
    )
    name = path.name.split(".")[0]
    found = []
    for block in re.split(r"\n\.(?:PP|P|LP|SH|SS|TP|IP|Pp|Sh)\b.*\n", text):
        lines = [
            re.sub(r"^\.(?:B|I|BR|IR|RB|BI|RI|Nm|Xr|Fl|Ar)\s+", "", ln) for ln in block.split("\n")
        ]
        line = " ".join(ln for ln in lines if not ln.startswith((".", "'")))
        line = src.SPACE.sub(" ", line).strip()
        if english_enough(line) and len(line) > 60 and "\\" not in line:
            found.append(src.Passage(f"{name} manual", line))
    return found


def parallel(root: Path, descriptions: tuple[Path, Path]) -> list[src.Pair]:
    """English and Chinese: message catalogues, package descriptions, translated manuals."""
    pairs: list[src.Pair] = []
    for path in sorted(root.rglob("zh_CN/LC_MESSAGES/*.mo")):
        pairs += src.catalogue_pairs(path)
    english = src.control_passages(descriptions[0], "Description-en")
    chinese = src.control_passages(descriptions[1], "Description-zh_CN")
    for digest, passage in chinese.items():
        if digest in english and src.HAN.search(passage.title):
            pairs += [src.Pair(english[digest].title, passage.title)]
            left, right = english[digest].text.split("\n"), passage.text.split("\n")
            if len(left) == len(right):
                pairs += map(src.Pair, left, right)
    share = root / "usr/share"
    for base, left_name, right_name in (
        ("help", "/C/", "/zh_CN/"),
        ("libreoffice/help", "/en-US/", "/zh-CN/"),
        ("doc/debian-handbook", "/en-US/", "/zh-CN/"),
        ("gimp/2.0/help", "/en/", "/zh_CN/"),
        ("doc/linuxcnc", "/en/", "/zh_CN/"),
        ("doc/kicad/help", "/en/", "/zh/"),
    ):
        for path in sorted((share / base).rglob("*")):
            other = Path(str(path).replace(left_name, right_name))
            if other != path and path.suffix in {".html", ".page"} and other.is_file():
                pairs += src.page_pairs(path, other)
    for path in sorted((share / "debian-reference").glob("*.en.html")):
        other = path.with_name(path.name.replace(".en.", ".zh-cn."))
        if other.is_file():
            pairs += src.page_pairs(path, other)
    return sorted({p for p in pairs if src.HAN.search(p.chinese)})


def functions(folders: Iterable[Path]) -> list[src.Function]:
    """Documented functions of installed Python packages, each summary once."""
    found: dict[str, src.Function] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if "/tests/" in str(path) or "/test_" in str(path):
                continue
            for function in src.python_functions(path):
                if english_enough(function.summary) and 40 < len(function.code) < 4000:
                    found.setdefault(function.summary.lower()[:80], function)
    return src.sampled(list(found.values()), 90_000, 3)


def noun_questions(senses: list[src.Sense], rng: random.Random, most: int) -> Iterator[tuple]:
    """Sense, question, the same question otherwise (another form, a synonym)."""
    nouns = [s for s in senses if s.part == "noun" and not re.search(r"\d", s.words[0])]
    verbs = [s for s in senses if s.part == "verb"]
    for number in range(most):
        verb = number % 5 == 0
        sense, other = rng.choice(verbs if verb else nouns), rng.choice(nouns)
        group = rng.choice(forms.VERB_QUESTIONS if verb else forms.NOUN_QUESTIONS)
        if rng.random() < 0.3:
            group = (forms.VERB_QUESTIONS if verb else forms.NOUN_QUESTIONS)[int(verb)]
        one, two = rng.sample(group, 2)
        y = rng.choice(other.words)
        yield (
            sense,
            one.format(x=rng.choice(sense.words), y=y),
            two.format(x=rng.choice(sense.words), y=y),
        )


def lower_first(text: str) -> str:
    """A summary as the end of a question."""
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def chinese_rows(
    entries: list, lexicon: dict[str, str], rng: random.Random, most: int
) -> Iterator[Row]:
    """Dictionary words alone, in sentence forms and in loose lists, with their English."""
    clean = []
    for chinese, glosses in entries:
        glosses = [re.sub(r"\([^)]*\)", "", g).strip(" ;") for g in glosses]
        glosses = [g for g in glosses if g and len(g) < 60]
        if glosses and src.HAN.search(chinese):
            clean.append((chinese, glosses))
            yield chinese, "; ".join(glosses[:3]), "term"
    common = [(z, [e]) for e, z in lexicon.items() if len(z) > 1]
    for number in range(most):
        pool = common if number % 3 else clean
        (z, x), (w, y) = rng.choice(pool), rng.choice(pool)
        x, y = x[0].split(";")[0], y[0].split(";")[0]
        english, chinese = rng.choice(forms.BOTH)
        values = {"x": x, "y": y, "z": z, "w": w, "v": re.sub(r"^to ", "", x)}
        kind = "question_zh" if re.search(r"？|如何", chinese) else "prose_zh"
        yield chinese.format(**values), english.format(**values), kind
    for _ in range(most // 2):
        drawn = rng.sample(common, rng.randint(3, 9))
        yield (
            rng.choice(("，", "", "、", "的")).join(z for z, _ in drawn) + "。",
            " ".join(x[0] for _, x in drawn),
            "prose_zh",
        )


def build(args: argparse.Namespace) -> tuple[list[Row], list[Contrast]]:
    """All rows and contrasts."""
    rng = random.Random(args.seed)
    rows: list[Row] = []
    contrasts: list[Contrast] = []

    senses = list(src.wordnet_senses(args.root / "usr/share/wordnet"))
    for sense in senses:
        names = ", ".join(sense.words)
        rows += [(sense.gloss, "", "prose"), (names, "", "term")]
        rows.append((f"{names}: {sense.gloss}", "", "prose"))
        rows += [(example, "", "prose") for example in sense.examples]
        contrasts.append(("similar", sense.gloss, f"{sense.words[0]}: {sense.gloss}", ""))
    for sense, one, two in noun_questions(senses, rng, 260_000):
        rows += [(one, "", "question"), (two, "", "question")]
        gloss = f"{sense.words[0]}: {sense.gloss}" if rng.random() < 0.5 else sense.gloss
        contrasts.append(("web", one, gloss, two))
        contrasts.append(("duplicate", one, two, gloss))
    print("wordnet", len(rows), flush=True)

    for name in ("gcide", "foldoc", "jargon", "devil", "elements", "vera"):
        for entry in src.dictd_entries(args.root / f"usr/share/dictd/{name}.dict.dz"):
            if english_enough(entry.text):
                text = shorter(entry.text, 700)
                rows.append((text, "", "prose"))
                if rng.random() < 0.4:
                    rows.append((f"{entry.title}: {text}", "", "prose"))
                contrasts.append(("web", entry.title, text, f"What is {entry.title}?"))
    print("dictionaries", len(rows), flush=True)

    passages = documentation(args.root, rng)
    described = src.control_passages(args.descriptions, "Description-en")
    passages += [
        src.Passage(p.title, line)
        for p in described.values()
        for line in p.text.split("\n")[:3]
        if english_enough(line)
    ]
    rows += [(p.title, "", "term") for p in described.values()]
    for folder in args.root.glob("usr/share/games/fortunes"):
        for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.suffix):
            passages += [
                src.Passage("", src.SPACE.sub(" ", block).strip())
                for block in src.read_text(path).split("\n%\n")
            ]
    sentences: list[str] = []
    for title, text in passages:
        if not english_enough(text):
            continue
        rows.append((shorter(text, 700), "", "prose"))
        parts = [s for s in re.split(r"(?<=[.!?])\s+", text) if 25 < len(s) < 300]
        sentences += parts
        if len(parts) > 1:
            rows.append((rng.choice(parts), "", "prose"))
        if 5 < len(title) < 100 and rng.random() < 0.7:
            asked = rng.choice(forms.TITLE_QUESTIONS).format(x=title)
            rows += [(title, "", "term"), (asked, "", "question")]
            contrasts.append(("web", rng.choice((title, asked)), shorter(text, 600), asked))
    print("manuals", len(passages), len(rows), flush=True)

    for name, summary, details, code in functions(args.code):
        asked = rng.choice(forms.CODE_QUESTIONS).format(x=lower_first(summary))
        words = re.sub(r"_+|(?<=[a-z])(?=[A-Z])", " ", name).strip()
        cut = shorter(code.replace(". ", ".\u00a0"), 500).replace("\u00a0", " ")
        rows += [(cut, f"{words}: {summary}", "code"), (cut, "", "code"), (summary, "", "prose")]
        rows.append((asked, "", "question"))
        prose = shorter(f"{summary} {details}", 500)
        contrasts.append(
            ("code", rng.choice((summary, asked, words)), cut, rng.choice((prose, asked)))
        )
        contrasts.append(("web", asked, prose, cut))
        contrasts.append(
            ("duplicate", asked, f"how to {lower_first(summary)}", rng.choice((prose, cut)))
        )
    print("code", len(rows), flush=True)

    entries = list(src.cedict_entries(args.cedict))
    counted = (line.split() for line in args.jieba.read_text("utf-8").splitlines())
    frequency = {word: int(count) for word, count, *_ in counted}
    lexicon = src.english_chinese(entries, frequency)
    rows += chinese_rows(entries, lexicon, rng, 200_000)
    for english, chinese in parallel(args.root, (args.descriptions, args.descriptions_zh)):
        if len(english) < 1500:
            rows.append((shorter(chinese, 400), shorter(english, 1000), "prose_zh"))
            if len(chinese) > 5:
                contrasts.append(("bitext", english, chinese, ""))
                contrasts.append(("bitext", chinese, english, ""))
                contrasts.append(("web_zh", english, chinese, english))
    print("parallel", len(rows), flush=True)

    glosses = [(s.gloss, "prose_zh") for s in senses] + [
        (e, "prose_zh") for s in senses for e in s.examples
    ]
    loose = src.sampled(sorted(set(sentences)), 260_000, 4)
    questions = src.sampled(sorted({a for a, _, kind in rows if kind == "question"}), 90_000, 5)
    for text, kind in [
        *glosses,
        *((t, "prose_zh") for t in loose),
        *((q, "question_zh") for q in questions),
    ]:
        chinese = src.word_by_word(text, lexicon)
        if chinese:
            rows.append((chinese, text, kind))
            if kind == "prose_zh" and rng.random() < 0.3:
                contrasts.append(
                    rng.choice(
                        (
                            ("bitext", text, chinese, ""),
                            ("bitext", chinese, text, ""),
                            ("web_zh", text, chinese, text),
                        )
                    )
                )
    for sense in senses:
        x, z = sense.words[0], lexicon.get(sense.words[0].lower())
        gloss = src.word_by_word(sense.gloss, lexicon)
        if z and gloss:
            _, form = rng.choice(forms.BOTH[:2])
            contrasts.append(("web_zh", form.format(z=z), gloss, sense.gloss))
            contrasts.append(("web", f"What is {x}?", sense.gloss, gloss))
    print("word by word", len(rows), flush=True)
    return rows, contrasts


def write(rows: list[Row], contrasts: list[Contrast], out: Path, seed: int) -> None:
    """Drop repeats, shuffle, write both tables."""
    rows = list(dict.fromkeys(row for row in rows if row[0].strip()))
    contrasts = list(dict.fromkeys(c for c in contrasts if c[1] and c[2] and c[1] != c[2]))
    contrasts = src.sampled(contrasts, 900_000, seed)
    out.mkdir(parents=True, exist_ok=True)
    for name, table, columns in (
        ("texts", rows, ("student", "teacher", "kind")),
        ("pairs", contrasts, ("task", "query", "positive", "negative")),
    ):
        data = pa.table(
            {c: list(v) for c, v in zip(columns, zip(*table, strict=True), strict=True)}
        )
        pq.write_table(data, out / f"{name}.parquet", compression="zstd", compression_level=3)
        print(name, len(table), (out / f"{name}.parquet").stat().st_size >> 20, "MiB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder with the unpacked Debian packages")
    parser.add_argument("--descriptions", type=Path, required=True)
    parser.add_argument("--descriptions-zh", type=Path, required=True)
    parser.add_argument("--cedict", type=Path, required=True)
    parser.add_argument("--jieba", type=Path, required=True, help="jieba's dict.txt")
    parser.add_argument("--code", type=Path, nargs="+", required=True, help="Python packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    write(*build(args), args.out, args.seed)


if __name__ == "__main__":
    main()
