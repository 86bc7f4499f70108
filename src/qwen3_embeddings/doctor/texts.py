"""Checks that texts and token ids reach the model as they were sent, and whole."""

from __future__ import annotations

from qwen3_embeddings import models
from qwen3_embeddings.doctor.compare import IDENTICAL, SAME, distance
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import REFUSALS, TEXTS, CannotTellError, Subject
from qwen3_embeddings.errors import Qwen3EmbeddingsError
from qwen3_embeddings.prompts import TASKS, instruct

LONG = 8192
"""Tokens of the longest text sent to see that a text within the context is read whole."""


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
