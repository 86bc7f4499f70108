"""Draw the rows of one training run from all corpora.

All of WordNet and of the later corpora stays; the rest of the first is thinned out. Rows whose
column `next` is true are followed by a row of the same field: `train.py` joins such rows to
passages about general subjects, which free manuals lack.
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
    "dictionary": 200_000,
    "manual": 300_000,
    "question": 160_000,
    "prose_zh": 130_000,
    "question_zh": 70_000,
    "term": 150_000,
    "code": 110_000,
}
LONGEST = {"code": 1000, "prose": 600, "prose_zh": 300}
DICTIONARIES = ("gcide", "foldoc", "jargon", "devil", "elements")
LATIN = re.compile("[A-Za-z]")
Row = tuple[str, str, str, bool]  # text, teacher's text, kind, next


def wordnet_rows(root: Path, rng: random.Random) -> list[Row]:
    """Return the texts of every WordNet sense in the order of its files: neighbours are related."""
    rows: list[Row] = []
    for sense in src.wordnet_senses(root / "usr/share/wordnet"):
        named = rng.random() < 0.5
        gloss = f"{', '.join(sense.words)}: {sense.gloss}" if named else sense.gloss
        rows += [(text, "", "prose", True) for text in (gloss, *sense.examples)]
    return rows


def whole(folder: Path) -> list[Row]:
    """Return all texts of a corpus."""
    table = pq.read_table(folder / "texts.parquet").to_pydict()
    return [
        (text[: LONGEST.get(kind, 300)], other[:800], kind, kind.startswith("prose"))
        for text, other, kind in zip(
            *(table[c] for c in ("student", "teacher", "kind")), strict=True
        )
    ]


def group_of(text: str, kind: str, dictionary: set[str]) -> str | None:
    """Return under which name a row is counted; None for one to leave out."""
    if len(text) > LONGEST.get(kind, 300):
        return None
    if kind == "prose":
        known = text[:40] in dictionary or text.partition(": ")[2][:40] in dictionary
        return "dictionary" if known else "manual"
    if kind in {"prose_zh", "question_zh"} and len(LATIN.findall(text)) > 0.15 * len(text):
        return None
    return kind


def thinned(table: dict[str, list[str]], dictionary: set[str], rng: random.Random) -> list[Row]:
    """Return all translated terms and samples of the other kinds."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for text, other, kind in zip(*(table[c] for c in ("student", "teacher", "kind")), strict=True):
        if name := group_of(text, kind, dictionary):
            groups["translated" if name == "term" and other else name].append(
                (text, other, kind, False)
            )
    return [row for name, rows in groups.items() for row in drawn(rows, MOST.get(name), rng)]


def drawn(rows: list[Row], most: int | None, rng: random.Random) -> list[Row]:
    """Return at most so many rows, in their order."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[i] for i in sorted(rng.sample(range(len(rows)), most))]


def read_pairs(folder: Path, known: set[str]) -> list[dict[str, str]]:
    """Return the pairs whose query and wanted text were drawn; forget other unwanted texts."""
    pairs = pq.read_table(folder / "pairs.parquet").to_pylist()
    found = [p for p in pairs if p["query"] in known and p["positive"] in known]
    return [p if p["negative"] in known else p | {"negative": ""} for p in found]


def write(rows: list[Row], pairs: list[dict[str, str]], out: Path) -> None:
    """Write both tables."""
    out.mkdir(parents=True, exist_ok=True)
    columns = zip(*rows, strict=True)
    names = ("student", "teacher", "kind", "next")
    table = pa.table({n: list(c) for n, c in zip(names, columns, strict=True)})
    options = {"compression": "zstd", "compression_level": 12, "use_dictionary": ["kind"]}
    pq.write_table(table, out / "texts.parquet", row_group_size=1_000_000, **options)
    # a pair names its texts by row
    place = {row[0]: i for i, row in enumerate(rows)} | {"": -1}
    columns = {n: [place[p[n]] for p in pairs] for n in ("query", "positive", "negative")}
    table = pa.table({"task": [p["task"] for p in pairs]} | columns)
    pq.write_table(table, out / "pairs.parquet", compression="zstd")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("others", type=Path, nargs="+", help="corpora that stay whole")
    parser.add_argument("--root", type=Path, required=True, help="unpacked packages of the first")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    dictionary = {
        entry.text[:40]
        for name in DICTIONARIES
        for entry in src.dictd_entries(args.root / f"usr/share/dictd/{name}.dict.dz")
    }
    rows = wordnet_rows(args.root, rng)
    for folder in args.others:
        rows += whole(folder)
    rows += thinned(pq.read_table(args.corpus / "texts.parquet").to_pydict(), dictionary, rng)
    rows = list({row[:2]: row for row in rows}.values())
    known = {row[0] for row in rows}
    pairs = [p for folder in (args.corpus, *args.others) for p in read_pairs(folder, known)]
    write(rows, pairs, args.out)
    print(f"{len(rows)} texts, {len(pairs)} pairs")


if __name__ == "__main__":
    main()
