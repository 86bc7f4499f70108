"""Train the byte-level BPE tokenizer and write it in the published layout."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from instructions import TASKS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# the pattern of the published tokenizer
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HAN = re.compile("[\u4e00-\u9fff]+")
COMMON = 9_000  # words of the teacher's list
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


SHARES = {
    "prose": 0.42,
    "question": 0.08,
    "term": 0.12,
    "code": 0.08,
    "prose_zh": 0.24,
    "question_zh": 0.06,
}


def common_words(teacher: Path) -> list[str]:
    """Return the common words of general English from the teacher's list, most frequent first."""
    words = (teacher / "vocab.txt").read_text("utf-8").split()
    return [w for w in words if w.isascii() and w.isalpha() and len(w) > 2][:COMMON]


def lines(corpora: list[Path], count: int, seed: int, teacher: Path) -> Iterator[str]:
    """Yield a sample of the texts by kind, the instructions, and common words.

    The corpus is technical, so the common words of general English are repeated. The published
    pattern keeps a run of Chinese characters whole. Chinese text is cut into words here, so the
    entries of the vocabulary are words.
    """
    import jieba

    for rank, word in enumerate(common_words(teacher)):
        yield f" {word}" * (30 + 20_000 // (rank + 100))
    texts: list[tuple[str, str]] = []
    for corpus in corpora:
        table = pq.read_table(corpus / "texts.parquet", columns=["student", "kind"]).to_pydict()
        texts += zip(table["student"], table["kind"], strict=True)
    random.Random(seed).shuffle(texts)
    left = {kind: int(count * share) for kind, share in SHARES.items()}
    for text, kind in texts:
        if left[kind] > 0:
            left[kind] -= 1
            yield HAN.sub(lambda run: "\n".join(jieba.cut(run[0])), text[:400])
    for task in TASKS.values():
        for instruction in task.instructions:
            yield from [f"Instruct: {instruction}\nQuery:"] * 300


def train(corpora: list[Path], size: int, count: int, seed: int, teacher: Path) -> Tokenizer:
    """Train a tokenizer with so many entries, the special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL) - len(PLAIN),
        min_frequency=2,
        show_progress=False,
        max_token_length=24,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(lines(corpora, count, seed, teacher), trainer)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
            processors.TemplateProcessing(
                single="$A <|endoftext|>",
                pair="$A <|endoftext|> $B <|endoftext|>",
                special_tokens=[("<|endoftext|>", end)],
            ),
        ]
    )
    return tokenizer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpora", type=Path, nargs="+")
    parser.add_argument("--size", type=int, default=30_000)
    parser.add_argument("--lines", type=int, default=500_000)
    parser.add_argument("--teacher", type=Path, required=True, help="folder with its vocab.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(args.corpora, args.size, args.lines, args.seed, args.teacher)
    tokenizer.save(str(args.out / "tokenizer.json"))
    print(json.dumps({"tokens": tokenizer.get_vocab_size()}))


if __name__ == "__main__":
    main()
