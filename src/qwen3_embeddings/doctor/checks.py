"""The checks. Each sends a few prompts to the engine and judges the raw rows that come back.

Most need no reference to compare with, because of what causal attention does. A token's state
depends on the tokens up to it only, and where all tokens so far are the same, so are their states,
at every layer: attention averages equal values. So "1" and "11111111" (digits are tokens of their
own here) get one vector if and only if nothing else is appended and pooled, and a run of end tokens
gets one vector, whatever its length, if and only if it is the end token that is appended.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from qwen3_embeddings import models
from qwen3_embeddings.doctor.report import Finding, Status
from qwen3_embeddings.engines.base import Engine, Prompt, Served
from qwen3_embeddings.engines.openai.client import ServerEngine
from qwen3_embeddings.errors import (
    Qwen3EmbeddingsError,
    ServerRefusedError,
    TextRefusedError,
    TextTooLongError,
)
from qwen3_embeddings.prompts import TASKS, instruct
from qwen3_embeddings.vectors import Vectors, check_dimensions, normalize, truncate

SAME = 2e-3
"""1 - cosine up to which two vectors count as one text's: the noise of bfloat16 stays below (at
most 1e-3 between two engines, tests/test_parity.py; 8e-5 against float32 on a GPU)."""

IDENTICAL = 1e-6
"""1 - cosine of two float32 vectors of the very same tokens, computed alone."""

QUANTISED = 5e-2
"""1 - cosine up to which a difference can be explained by quantised weights."""

LONG = 8192
"""Tokens of the longest text sent to see that a text within the context is read whole."""

REFUSALS = (TextTooLongError, TextRefusedError, ServerRefusedError)
"""What a server says that does not take a prompt."""

FEW = 256
"""Different numbers in all rows together that eight bits can hold; bfloat16 gives over 1000."""

PUBLISHED = {
    "0.6b": ((0.7645568, 0.1414251), (0.1354974, 0.5999550)),
    "4b": ((0.7534, 0.1147), (0.0320, 0.6258)),
    "8b": ((0.7493016, 0.0750648), (0.0879597, 0.6318400)),
}
"""Similarities of `PUBLISHED_QUERIES` to `PUBLISHED_DOCUMENTS`, from the model cards."""

PUBLISHED_QUERIES = ("What is the capital of China?", "Explain gravity")
PUBLISHED_DOCUMENTS = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical "
    "objects and is responsible for the movement of planets around the sun.",
)

TEXTS = (
    "import numpy as np\n\nprint(np.eye(3))\n",
    "import",
    "What is the capital of China?",
    "The capital of China is Beijing.",
    "\n",
    "  indented,\tand\nbroken ",
    "中国的首都是北京。",
    "ما هي عاصمة الصين؟",
    "🙂",
    "def f(x):\n    return {'a': [x, 2]}\n",
    "1234567890",
    "word " * 40,
    "many more words than the others have, " * 8,
)
"""What goes wrong elsewhere: "import" is NaN in float16, white space is stripped."""


class CannotTellError(Exception):
    """A check cannot tell; the message says why."""


@dataclass(frozen=True)
class Subject:
    """What is checked, and what the checks need of it.

    Attributes:
        engine: the engine.
        served: what it serves.
        model: the model's name as the user gave it.
        dimensions: a size the user wants, or None.
        instruction: the query instruction in use.
        reference: hub id or folder to compare with, or None.
    """

    engine: Engine
    served: Served
    model: str | None
    dimensions: int | None
    instruction: str
    reference: str | None

    async def rows(self, *prompts: Prompt, dimensions: int | None = None) -> Vectors:
        """Raw rows of one call; nothing is normalised here."""
        return await self.engine.embed(list(prompts), dimensions, False)

    async def distance(self, one: Prompt, other: Prompt) -> float:
        """1 - cosine of two prompts, each sent alone."""
        return distance(await self.rows(one), await self.rows(other))

    @property
    def published(self) -> str | None:
        """Size of the published model that is served by its name: "0.6b", "4b", "8b" or None."""
        names = f"{self.model} {self.served.model}"
        match = re.search(r"qwen3-embedding-(0\.6b|4b|8b)", names, re.IGNORECASE)
        return match[1].lower() if match else None

    @property
    def context(self) -> int:
        """The longest input in tokens, where nothing is said the family's."""
        return self.served.context or 32768


def distance(one: Vectors, other: Vectors) -> float:
    """The largest 1 - cosine of two matrices' rows, at least 0."""
    a, b = (normalize(rows).astype(np.float64) for rows in (one, other))
    return max(0.0, float((1 - (a * b).sum(axis=-1)).max()))


async def model(subject: Subject) -> Finding:
    """The size is the published one, and the native one is what comes unasked."""
    served, check = subject.served, "model"
    said = f"{served.model}, {served.dimensions} numbers, context {served.context or 'not told'}"
    size = subject.published
    known = models.MODELS[f"Qwen/Qwen3-Embedding-{size.upper()}"].dimensions if size else None
    if known is None or known == served.dimensions:
        told = "" if known else "; not a published name, so the size is taken as native"
        return Finding(check, "ok", said + told)
    try:
        await subject.rows("probe", dimensions=known)
    except Qwen3EmbeddingsError as error:
        return Finding(
            check,
            "failure",
            f"{said}; {known} is the native size of this name, and it cannot be had: {error}",
            "Another model than the name says: its vectors fit no index of the right one.",
            "Start the server with the published weights, or under their true name.",
        )
    return Finding(
        check,
        "warning",
        f"{said}; native is {known}, which this package asks for",
        "Clients that send no `dimensions` get the smaller size.",
        "Leave `dimensions` out of --pooler-config, unless that is meant.",
    )


async def context(subject: Subject) -> Finding:
    """A text within the context is read whole, and one over it is refused, not cut in silence."""
    limit = subject.context
    inside = max(2, min(limit - 8, LONG))
    try:
        fault = "" if await _reads_whole(subject, inside) else f"a text of {inside} tokens"
    except REFUSALS as error:
        if subject.served.context is None:
            return Finding("context", "ok", f"a text of {inside} tokens is refused")
        return Finding(
            "context",
            "warning",
            f"a text of {inside} tokens is refused, with a context of {limit}: {error}",
            "overflow='truncate' and 'mean' cut texts to the context told, and are refused too.",
            "Let the server take what its context promises (llama.cpp: --batch-size and "
            "--ubatch-size as large as --ctx-size).",
        )
    said = f"a text of {inside} tokens is read whole; "
    if not fault:
        try:
            if await _reads_whole(subject, limit + 8):
                said += f"texts of more than {limit} tokens are taken"
                return Finding("context", "ok", said)
            fault = f"a text over {limit} tokens"
        except REFUSALS:
            return Finding("context", "ok", said + f"one over {limit} is refused")
    return Finding(
        "context",
        "failure",
        f"{fault} is cut in silence",
        "What is cut off cannot be found, and overflow='error' does not notice.",
        "Switch the server's truncation off (TEI: no --auto-truncate; vLLM: no "
        "truncate_prompt_tokens); or split texts before they are sent.",
    )


async def _reads_whole(subject: Subject, tokens: int) -> bool:
    """Whether the first and the last eighth of a text both count.

    Less than an eighth moves the vector of a long text too little to be told from noise.
    """
    part = max(1, tokens // 8)
    rest = "1" * (tokens - part)  # a digit is a token
    whole = await subject.rows("1" * part + rest)
    ends = [await subject.rows(text) for text in ("2" * part + rest, rest + "2" * part)]
    return all(distance(whole, end) > IDENTICAL for end in ends)


async def finite(subject: Subject) -> Finding:
    """No NaN or infinity."""
    rows = await subject.rows(*TEXTS)
    bad = [TEXTS[i][:20] for i in np.flatnonzero(~np.isfinite(rows).all(axis=1))]
    if not bad:
        return Finding("finite", "ok", f"{len(TEXTS)} texts give finite numbers")
    return Finding(
        "finite",
        "failure",
        f"{len(bad)} of {len(TEXTS)} texts give NaN or infinity: {', '.join(map(repr, bad[:3]))}",
        "This package refuses such texts; other clients index them, and no search finds them.",
        "Run the model in --dtype bfloat16 or float32: float16 overflows. Else the weights are "
        "broken: download them again.",
    )


async def unit_length(subject: Subject) -> Finding:
    """Rows come normalised."""
    rows = await subject.rows(*TEXTS)
    with np.errstate(invalid="ignore"):  # garbage bytes may be signalling NaN
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    if np.abs(lengths - 1).max() < 1e-2:
        return Finding("unit length", "ok", "rows have length 1")
    return Finding(
        "unit length",
        "warning",
        f"rows have length {lengths.min():.3g} to {lengths.max():.3g}; normalised here",
        "Other clients of it rank by length, where their index uses the dot product.",
        "vLLM: no use_activation=false in --pooler-config; llama.cpp: --embd-normalize 2.",
    )


async def precision(subject: Subject) -> Finding:
    """Rows hold more than a few different numbers."""
    rows = await subject.rows(*TEXTS)
    different = len(np.unique(rows))
    said = f"{rows.size} numbers, {different} of them different"
    if different > min(FEW, rows.size // 4):
        return Finding("precision", "ok", said)
    return Finding(
        "precision",
        "warning",
        f"{said}: vectors are rounded, or hold signs only",
        "Texts close to each other cannot be ranked; do not mix these vectors with others.",
        "Have the server or the gateway return float32, not int8 or binary vectors.",
    )


async def repeatable(subject: Subject) -> Finding:
    """The same text gives the same vector at every call."""
    text = instruct(subject.instruction, TEXTS[2])
    first = await subject.rows(text)
    worst = max([distance(first, await subject.rows(text)) for _ in range(5)])
    if worst <= SAME:
        return Finding("repeatable", "ok", f"six calls differ by 1-cos = {worst:.1g} at most")
    return Finding(
        "repeatable",
        "failure",
        f"six calls with one text differ by 1-cos = {worst:.2g}",
        "Queries meet documents of other vectors: results change from call to call.",
        "Check that every replica behind the URL serves the same weights with the same flags.",
    )


async def batch(subject: Subject) -> Finding:
    """A text alone equals the same text in a batch."""
    together = await subject.rows(*TEXTS)
    alone = np.concatenate([await subject.rows(text) for text in TEXTS])
    worst = distance(together, alone)
    if worst <= SAME:
        return Finding("batch", "ok", f"alone and in a batch differ by 1-cos = {worst:.1g} at most")
    return Finding(
        "batch",
        "failure",
        f"alone and in a batch of {len(TEXTS)} texts differ by 1-cos = {worst:.2g}",
        "Documents come in batches and queries alone: equal texts do not match.",
        "The server mixes up rows, or pads without a mask. Send one text a request "
        "(batch_size=1), and report it to the server's authors.",
    )


async def end_token(subject: Subject) -> Finding:
    """The end token is appended, and none other (see the module's docstring)."""
    end = models.END_TOKEN
    nothing = await subject.distance("1", "1" * 8)
    other = await subject.distance(end, end * 8)
    effect = "Every vector is read from the wrong token: similar texts are not found."
    remedy = (
        "Serve the published tokenizer.json, whose post-processor appends <|endoftext|> and "
        "nothing else; for llama.cpp convert again (tokenizer.ggml.add_eos_token = true, "
        "tokenizer.ggml.eos_token_id that of <|endoftext|>)."
    )
    if nothing <= SAME:
        said = "'1' and '11111111' have one vector: no end token is appended, or it is not pooled"
        pooled = " If pooling fails too, mend that first."
        return Finding("end token", "failure", said, effect, remedy + pooled)
    if other <= SAME:
        return Finding("end token", "ok", f"{end} is appended, and nothing else")
    return Finding(
        "end token",
        "failure",
        f"a run of {end} changes with its length (1-cos = {other:.2g}): another token is appended, "
        f"something stands before every text, or {end} in a text is not read as the token",
        effect,
        remedy + " Take a prompt or prefix out of the server's settings.",
    )


async def pooling(subject: Subject) -> Finding:
    """The last token is pooled: not the first, and not the mean."""
    effect = "The vectors are of another kind than the model was trained for: ranking is poor."
    remedy = (
        """vLLM: --pooler-config '{"pooling_type": "LAST"}'; llama.cpp: --pooling last; """
        "sentence-transformers: pooling_mode_lasttoken in 1_Pooling/config.json."
    )
    if await subject.distance("1 apple pie", "1 zebra at night") <= SAME:
        said = "texts with the same first token have one vector: the first token is pooled (CLS)"
        return Finding("pooling", "failure", said, effect, remedy)
    one, other = 16, 17  # any two tokens of the vocabulary; these are byte-level "1" and "2"
    run = min(31, subject.context - 1)  # more would dilute the last token of trained weights too
    try:
        moved = await subject.distance([one], [one] * run + [other])
    except REFUSALS as error:
        raise CannotTellError(
            "not the first token; to tell the last from the mean takes token ids, which this "
            f"server refuses ({error}), or --reference"
        ) from error
    if moved > SAME:
        return Finding("pooling", "ok", "the last token decides")
    said = f"the last of {run + 1} tokens hardly counts (1-cos = {moved:.1g}): the mean is pooled"
    return Finding("pooling", "failure", said, effect, remedy)


async def unaltered(subject: Subject) -> Finding:
    """Instruction and text reach the model as they were sent."""
    task = subject.instruction or TASKS["web_search"].instruction
    query = instruct(task, "Explain gravity")
    pairs = {
        "the instruction is left out": (query, "Explain gravity"),
        "the instruction is replaced": (
            query,
            instruct(TASKS["code"].instruction + "!", "Explain gravity"),
        ),
        "newlines become spaces": (query, query.replace("\n", " ")),
        "newlines are dropped": (query, query.replace("\n", "")),
        "a space is put after 'Query:'": (query, query.replace("Query:", "Query: ")),
        "spaces are squeezed": ("a  b", "a b"),
        "blank lines are dropped": ("a\n\nb", "a\nb"),
        "tabs become spaces": ("a\tb", "a b"),
        "white space at the start is stripped": ("\n gravity", "gravity"),
        "white space at the end is stripped": ("gravity\n", "gravity"),
        "case is folded": ("Gravity", "gravity"),
        "accents are dropped": ("é", "e"),
        "wide letters become narrow (NFKC)": ("\uff21", "A"),
        "emoji are dropped": ("a🙂", "a"),
    }
    seen = [
        said
        for said, (one, other) in pairs.items()
        if await subject.distance(one, other) <= IDENTICAL
    ]
    if not seen:
        return Finding("unaltered", "ok", f"{len(pairs)} small changes each change the vector")
    return Finding(
        "unaltered",
        "failure",
        f"the text is altered before the model reads it: {'; '.join(seen)}",
        "Queries lose their instruction or its form, worth 1 to 5 % of retrieval quality; code "
        "and tables are not embedded as written.",
        "Switch such preprocessing off in the server or the gateway before it; serve the "
        "published tokenizer.json.",
    )


async def token_ids(subject: Subject) -> Finding:
    """A query's text and its token ids, end token included, give one vector."""
    query = instruct(subject.instruction, TEXTS[2])
    try:
        ids, end = await subject.engine.tokenize([query, models.END_TOKEN])
        apart = await subject.distance(query, ids)
    except (Qwen3EmbeddingsError, ValueError) as error:
        raise CannotTellError(f"no tokenizer, or token ids are refused: {error}") from error
    if apart <= SAME and end == end[:1] * 2 and ids[-1] == end[0]:
        return Finding("token ids", "ok", f"a query and its {len(ids)} token ids have one vector")
    last = ids[-1] if ids else None
    said = f"the last id of a query is {last}, and {models.END_TOKEN} is tokenized as {end}"
    if apart > SAME:
        said = f"a query and its token ids differ by 1-cos = {apart:.2g}; {said}"
    return Finding(
        "token ids",
        "failure",
        said,
        "overflow='truncate' and 'mean' work on these ids: over-long texts get wrong vectors.",
        "Serve model and tokenizer from one checkpoint, with the published tokenizer.json.",
    )


async def matryoshka(subject: Subject) -> Finding:
    """A smaller size is the first numbers of the native vector, renormalised."""
    native = subject.served.native
    if subject.dimensions is not None:
        check_dimensions(subject.dimensions, native)
    sizes = sorted({models.MIN_DIMENSIONS, subject.dimensions or 0} - {0, native})
    sizes = [size for size in sizes if size < native]
    if not sizes:
        raise CannotTellError(f"{native} is the smallest size there is")
    whole = await subject.rows(*TEXTS[:4], dimensions=native)
    apart = 0.0
    for size in sizes:
        small = await subject.rows(*TEXTS[:4], dimensions=size)
        apart = max(apart, distance(small[:, :size], truncate(whole, size)))
    named = " and ".join(map(str, sizes))
    if apart > SAME:
        return Finding(
            "matryoshka",
            "failure",
            f"size {named} is not the first numbers of {native} (1-cos = {apart:.2g})",
            "Vectors of a smaller size mean nothing, or do not fit those cut elsewhere.",
            "Leave dimensions out, cut with qwen3_embeddings.truncate; report it to the server.",
        )
    if not isinstance(subject.engine, ServerEngine) or subject.engine.cuts_itself:
        return Finding("matryoshka", "ok", f"size {named}: cut by the engine")
    return Finding(
        "matryoshka",
        "warning",
        f"size {named}: the server refuses or ignores `dimensions`; cut and renormalised here",
        "This package's vectors are right; other clients get no smaller size.",
        """vLLM: --hf-overrides '{"is_matryoshka": true}'. llama.cpp cannot: cut and renormalise """
        "in those clients.",
    )


async def similarities(subject: Subject) -> Finding:
    """A published model gives the similarities on its card."""
    if subject.published is None:
        raise CannotTellError(
            "not a published model by its name; --model Qwen/… says so where it is"
        )
    queries = [instruct(TASKS["web_search"].instruction, text) for text in PUBLISHED_QUERIES]
    one = normalize(await subject.rows(*queries))
    other = normalize(await subject.rows(*PUBLISHED_DOCUMENTS))
    apart = float(np.abs(one @ other.T - np.array(PUBLISHED[subject.published])).max())
    said = f"differ from the model card of {subject.published} by {apart:.2g} at most"
    # The card's own two engines differ by 0.0025; fp8 keeps cosine 0.995 to bf16.
    if apart <= 0.01:
        return Finding("similarities", "ok", said)
    status: Status = "warning" if apart <= 0.05 else "failure"
    return Finding(
        "similarities",
        status,
        said,
        "Quantised weights cost that much."
        if status == "warning"
        else "These are not the vectors of the published model, whatever the cause.",
        "Look at the findings above; else load the published weights in bfloat16.",
    )


async def reference(subject: Subject) -> Finding:
    """The vectors of sentence-transformers running the checkpoint here."""
    from qwen3_embeddings.engines.sentence_transformers import ReferenceEngine

    if subject.reference is None:
        raise CannotTellError("no --reference to compare with")
    texts: list[Prompt] = [*TEXTS, *(instruct(subject.instruction, text) for text in TEXTS)]
    yardstick = ReferenceEngine(subject.reference, dtype="float32")
    try:
        expected = await yardstick.embed(texts, None, False)
    finally:
        await yardstick.close()
    rows = await subject.rows(*texts)
    if rows.shape != expected.shape:
        apart, said = 2.0, f"{rows.shape[1]} numbers, {expected.shape[1]} in the reference"
    else:
        apart = distance(rows, expected)
        said = f"differs from {subject.reference} in float32 by 1-cos = {apart:.2g} at most"
    if apart <= SAME:
        return Finding("reference", "ok", said)
    quantised = apart <= QUANTISED
    return Finding(
        "reference",
        "warning" if quantised else "failure",
        said,
        "Quantised weights cost that much; do not mix these vectors with others in one index."
        if quantised
        else "Not that checkpoint's vectors, or quantised so far that texts rank otherwise.",
        "Look at the findings above; serve the same weights, unquantised or in more bits.",
    )
