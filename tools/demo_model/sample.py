"""Draw the rows that a training run of minutes can use from the whole corpus.

All of WordNet stays, the rest is thinned out, and English passages about general subjects, which
free manuals lack, are made by joining WordNet's neighbours: senses that stand beside each other in
its files are of one field.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sources as src

MOST = {
    "dictionary": 170_000,
    "manual": 260_000,
    "question": 170_000,
    "prose_zh": 190_000,
    "question_zh": 50_000,
    "term": 170_000,
    "code": 70_000,
}
JOINED = 190_000
DICTIONARIES = ("gcide", "foldoc", "jargon", "devil", "elements")
LATIN = re.compile("[A-Za-z]")


def neighbours(root: Path, rng: random.Random) -> tuple[list[list[str]], set[str]]:
    """Each WordNet sense's texts, in the order of its files, and all of them as a set."""
    senses = list(src.wordnet_senses(root / "usr/share/wordnet"))
    groups = []
    for sense in senses:
        gloss = f"{', '.join(sense.words)}: {sense.gloss}" if rng.random() < 0.5 else sense.gloss
        groups.append([gloss, *sense.examples])
    texts = {text for group in groups for text in group} | {sense.gloss for sense in senses}
    return groups, texts


def group_of(text: str, kind: str, wordnet: set[str], dictionary: set[str]) -> str | None:
    """Under which name a row is counted; None for one to leave out."""
    if len(text) > (1200 if kind == "code" else 620):
        return None
    if kind == "prose":
        if text in wordnet:
            return "wordnet"
        known = text[:40] in dictionary or text.partition(": ")[2][:40] in dictionary
        return "dictionary" if known else "manual"
    if kind in {"prose_zh", "question_zh"} and len(LATIN.findall(text)) > 0.15 * len(text):
        return None
    return kind


def choose(
    table: dict[str, list[str]], wordnet: set[str], dictionary: set[str], rng: random.Random
) -> list[int]:
    """Rows of the table: all of WordNet, all Chinese terms, samples of the rest."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, (text, kind) in enumerate(zip(table["student"], table["kind"], strict=True)):
        if name := group_of(text, kind, wordnet, dictionary):
            groups[name].append(row)
    chosen = []
    for name, rows in groups.items():
        if name == "term":
            chosen += [row for row in rows if table["teacher"][row]]
            rows = [row for row in rows if not table["teacher"][row]]
        chosen += rng.sample(rows, min(MOST.get(name, len(rows)), len(rows)))
    return sorted(chosen)


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".?!" else ".")


def passages(groups: list[list[str]], known: set[str], rng: random.Random) -> list[str]:
    """Two to five texts of neighbours, now and then with one from anywhere."""
    found: list[str] = []
    while len(found) < JOINED:
        first = rng.randrange(len(groups) - 8)
        near = groups[first : first + rng.choice((1, 1, 2, 3, 6))]
        texts = [text for group in near for text in group if text in known]
        if rng.random() < 0.3:
            texts += [text for text in rng.choice(groups) if text in known]
        if len(texts) >= 2:
            count = min(len(texts), rng.choice((2, 2, 3, 3, 4, 5)))
            found.append(" ".join(map(sentence, rng.sample(texts, count))))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("root", type=Path, help="where the packages were unpacked")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    groups, wordnet = neighbours(args.root, rng)
    dictionary = {
        entry.text[:40]
        for name in DICTIONARIES
        for entry in src.dictd_entries(args.root / f"usr/share/dictd/{name}.dict.dz")
    }
    table = pq.read_table(args.corpus / "texts.parquet").to_pydict()
    chosen = choose(table, wordnet, dictionary, rng)
    rows = {name: [column[row] for row in chosen] for name, column in table.items()}
    known = set(rows["student"])
    joined = passages(groups, known, rng)
    rows["student"] += joined
    rows["teacher"] += [""] * len(joined)
    rows["kind"] += ["prose"] * len(joined)
    pairs = pq.read_table(args.corpus / "pairs.parquet").to_pylist()
    pairs = [
        pair
        for pair in pairs
        if pair["negative"] and known >= {pair["query"], pair["positive"], pair["negative"]}
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), args.out / "texts.parquet", compression="zstd")
    pq.write_table(pa.Table.from_pylist(pairs), args.out / "pairs.parquet", compression="zstd")
    print(f"{len(rows['student'])} texts, {len(pairs)} pairs")


if __name__ == "__main__":
    main()
