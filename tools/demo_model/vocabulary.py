"""Train the byte-level BPE tokenizer and write it in the published layout."""

from __future__ import annotations

import argparse
import json
import random
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
from transformers import PreTrainedTokenizerFast

WORD = r"\p{Latin}+|\p{Han}+|\p{N}|[^\s\p{Latin}\p{Han}\p{N}]+"
# in the bytes' letters: a space before anything but a Latin letter (a-z, U+00C0 to U+017F)
NO_SPACE = "^\u0120(?![a-z\u00c3-\u00c5])"
WORDS = 9_000  # of the teacher's
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


def lines(corpus: Path, count: int, seed: int, teacher: Path) -> Iterator[str]:
    """A sample of the students' texts, by kind, the instructions, and the teacher's own words.

    The corpus is technical; the teacher's list has the common words of general English first.
    """
    common = (teacher / "vocab.txt").read_text("utf-8").split()
    common = [w for w in common if w.isascii() and w.isalpha() and len(w) > 2][:WORDS]
    for rank, word in enumerate(common):
        yield " ".join([word] * (400 + 200_000 // (rank + 100)))
    table = pq.read_table(corpus / "texts.parquet", columns=["student", "kind"]).to_pydict()
    texts = list(zip(table["student"], table["kind"], strict=True))
    rng = random.Random(seed)
    rng.shuffle(texts)
    shares = {
        "prose": 0.3,
        "question": 0.05,
        "term": 0.18,
        "code": 0.03,
        "prose_zh": 0.16,
        "question_zh": 0.04,
    }
    left = {kind: int(count * share) for kind, share in shares.items()}
    for text, kind in texts:
        if left[kind] > 0:
            left[kind] -= 1
            yield text[:500]
    for task in TASKS.values():
        for instruction in task.instructions:
            yield from [f"Instruct: {instruction}\nQuery:"] * 200


def one_form_of_a_word() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """Lower case, with one space before every Latin word and nowhere else.

    So few entries hold many words: a word looks the same at the beginning of a text, after a
    bracket and after `Query:`. The teacher reads lower case too.
    """
    normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
        ]
    )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(Regex(NO_SPACE), "removed"),
        ]
    )
    return normalizer, splitter


def train(corpus: Path, size: int, count: int, seed: int, teacher: Path) -> Tokenizer:
    """A tokenizer with so many base tokens and the special ones behind them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = one_form_of_a_word()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        max_token_length=24,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(lines(corpus, count, seed, teacher), trainer)
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


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer with the published roles: pad is the end token, padding on the left."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[t for t in SPECIAL if t != "<|endoftext|>"],
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--size", type=int, default=16_384)
    parser.add_argument("--lines", type=int, default=700_000)
    parser.add_argument("--teacher", type=Path, required=True, help="folder with its vocab.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(args.corpus, args.size, args.lines, args.seed, args.teacher)
    tokenizer.save(str(args.out / "tokenizer.json"))
    print(json.dumps({"tokens": tokenizer.get_vocab_size()}))


if __name__ == "__main__":
    main()
