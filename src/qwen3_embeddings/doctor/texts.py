"""Checks that texts and token ids reach the model unchanged and complete."""

from __future__ import annotations

from qwen3_embeddings.doctor.compare import IDENTICAL, distance, graded
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import REFUSALS, TEXTS, CannotTellError, Subject
from qwen3_embeddings.engines.base import Prompt
from qwen3_embeddings.errors import Qwen3EmbeddingsError
from qwen3_embeddings.models import END_TOKEN
from qwen3_embeddings.prompts import TASKS, instruct

LONG = 8192
"""Tokens of the longest text that is sent to see whether texts within the context are cut."""


def _changes(instruction: str) -> dict[str, tuple[str, str]]:
    """Return pairs of texts that are equal only after the alteration named by the key."""
    task = instruction or TASKS["web_search"].instruction
    query = instruct(task, "Explain gravity")
    other_task = instruct(TASKS["code"].instruction + "!", "Explain gravity")
    return {
        "the instruction is left out": (query, "Explain gravity"),
        "the instruction is replaced": (query, other_task),
        "newlines become spaces": (query, query.replace("\n", " ")),
        "newlines are dropped": (query, query.replace("\n", "")),
        "a space is inserted after 'Query:'": (query, query.replace("Query:", "Query: ")),
        "repeated spaces are merged": ("a  b", "a b"),
        "blank lines are dropped": ("a\n\nb", "a\nb"),
        "tabs become spaces": ("a\tb", "a b"),
        "leading whitespace is stripped": ("\n gravity", "gravity"),
        "trailing whitespace is stripped": ("gravity\n", "gravity"),
        "case is folded": ("Gravity", "gravity"),
        "accents are dropped": ("é", "e"),
        "full-width letters become ASCII (NFKC)": ("\uff21", "A"),
        "emoji are dropped": ("a🙂", "a"),
    }


async def unaltered(subject: Subject) -> Finding:
    """Check that instruction and text reach the model as they were sent."""
    pairs = _changes(subject.instruction)
    apart = {said: await subject.distance(*pair) for said, pair in pairs.items()}
    smallest = min(apart.values())
    seen = [said for said, value in apart.items() if value <= IDENTICAL]
    if not seen:
        said = f"each of {len(pairs)} small changes to a text changes its vector"
        return Finding("unaltered", "ok", said, measured=smallest)
    return Finding(
        "unaltered",
        "failure",
        f"texts are altered before the model reads them: {'; '.join(seen)}",
        "Queries may lose their instruction or its format, which is worth 1 to 5 % of retrieval "
        "quality. Code and tables are not embedded as written.",
        "Turn off such preprocessing in the server, or in the gateway before it. Serve the "
        "published tokenizer.json.",
        smallest,
    )


async def token_ids(subject: Subject) -> Finding:
    """Check that a query and its token ids, end token included, have the same vector."""
    query = instruct(subject.instruction, TEXTS[2])
    try:
        ids, end = await subject.engine.tokenize([query, END_TOKEN])
        apart = await subject.distance(query, ids)
    except (Qwen3EmbeddingsError, ValueError) as error:
        raise CannotTellError(f"no tokenizer is available, or ids are refused: {error}") from error
    status = graded(apart)
    # A server may read the end token in a text as plain text; its ids then say nothing.
    appended = not ids or len(end) > 3 or (end == end[:1] * 2 and ids[-1] == end[0])
    if status == "ok" and appended:
        said = f"a query and its {len(ids)} token ids have the same vector"
        return Finding("token ids", "ok", said, measured=apart)
    last = ids[-1] if ids else None
    said = f"the last id of a query is {last}, and {END_TOKEN} has the ids {end}"
    if status != "ok":
        said = f"a query and its token ids differ by 1-cos = {apart:.2g}; {said}"
    return Finding(
        "token ids",
        status if appended else "failure",
        said,
        "overflow='truncate' and 'mean' send token ids, so over-long texts get wrong vectors.",
        "Serve model and tokenizer from one checkpoint, with the published tokenizer.json.",
        apart,
    )


async def context(subject: Subject) -> Finding:
    """Check that texts within the context are read whole and longer ones are refused."""
    limit = subject.context
    inside = max(2, min(limit - 8, LONG))
    try:
        smallest = await _effect_of_ends(subject, inside)
    except REFUSALS as error:
        return _refused(subject, inside, error)
    said = f"a text of {inside} tokens is read whole"
    if smallest <= IDENTICAL:
        return _cut(f"a text of {inside} tokens", smallest)
    try:
        beyond = await _effect_of_ends(subject, limit + 8)
    except REFUSALS:
        said += f"; one over {limit} is refused"
        return Finding("context", "ok", said, measured=smallest)
    if beyond <= IDENTICAL:
        return _cut(f"a text of more than {limit} tokens", beyond)
    said += f"; texts of more than {limit} tokens are accepted"
    return Finding("context", "ok", said, measured=smallest)


async def _effect_of_ends(subject: Subject, tokens: int) -> float:
    """Return the smaller effect, as 1 - cosine, of the first and the last eighth of a text.

    Less than an eighth would change the vector of a long text too little.
    """
    part = max(1, tokens // 8)
    rest = "1" * (tokens - part)  # a digit is a token
    whole = await subject.rows("1" * part + rest)
    changed: list[Prompt] = ["2" * part + rest, rest + "2" * part]
    return min([distance(whole, await subject.rows(text)) for text in changed])


def _refused(subject: Subject, tokens: int, error: Qwen3EmbeddingsError) -> Finding:
    if subject.served.context is None:
        return Finding("context", "ok", f"a text of {tokens} tokens is refused")
    return Finding(
        "context",
        "warning",
        f"a text of {tokens} tokens is refused, although the context is {subject.context}: {error}",
        "overflow='truncate' and 'mean' shorten texts to the stated context, and are refused too.",
        "Raise the server's limits to the context that it states (llama.cpp: --batch-size and "
        "--ubatch-size equal to --ctx-size).",
    )


def _cut(what: str, measured: float) -> Finding:
    return Finding(
        "context",
        "failure",
        f"{what} is truncated without an error",
        "Search does not find what was cut off, and overflow='error' does not notice it.",
        "Turn off the server's truncation (TEI: no --auto-truncate; vLLM: no "
        "truncate_prompt_tokens), or split texts before sending them.",
        measured,
    )
