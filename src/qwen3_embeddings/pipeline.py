"""One call from checked texts to vectors: tokenize if needed, embed in chunks, collect the rows.

Everything here runs on the background loop, for synchronous and asynchronous callers alike.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from qwen3_embeddings import event_loop, long_texts
from qwen3_embeddings.engines.base import Engine, Prompt, Served, Usage, check_lengths
from qwen3_embeddings.errors import (
    ConfigurationError,
    Qwen3EmbeddingsError,
    ServerError,
    ServerRefusedError,
    ServerResponseError,
    TextError,
    TextRefusedError,
    TextsFailedError,
    TextTooLongError,
)
from qwen3_embeddings.prompts import instruct
from qwen3_embeddings.request import Output, Plan, Texts, positions_of, slices
from qwen3_embeddings.vectors import Vectors, check_dimensions


@dataclass(frozen=True)
class Policy:
    """The settings of an embedder that steer a call.

    Attributes:
        dimensions: size of the vectors; None for the native size.
        overflow: what to do with texts over the context (`long_texts.Overflow`).
        on_error: "stop" at the first text that fails, or "finish" the others first.
        batch_size: maximum number of texts passed to the engine at once; None for its own choice.
    """

    dimensions: int | None
    overflow: long_texts.Overflow
    on_error: str
    batch_size: int | None

    def keep(self, failures: list[TextError], error: TextError) -> None:
        """Raise an error about texts, or with ``on_error="finish"`` keep it for the end."""
        if self.on_error == "stop":
            raise error
        failures.append(error)


async def encode(
    engine: Engine, texts: Texts, policy: Policy, show_progress: bool, usage: Usage
) -> Vectors:
    """Embed the texts of one call, and add them to `usage`.

    Returns:
        float32 array (n, dimensions) of unit rows.

    Raises:
        Qwen3EmbeddingsError: any error of a call; `computed` holds the vectors that were finished.
    """
    try:
        served = await engine.start()
    except Qwen3EmbeddingsError as error:  # every call that waits for the start gets this error
        raise error.carrying(None) from error.__cause__
    size = served.native
    if policy.dimensions is not None:
        size = check_dimensions(policy.dimensions, served.native)
    if not texts.prompts:
        return np.empty((0, size), dtype=np.float32)
    _check_served(texts, served, policy)
    plan = await _plan(engine, texts, served.context, policy)
    # Pieces are averaged at full size, so that cutting and averaging commute.
    output = Output(plan, served.native if plan.split else size, texts.failures)
    total = len(texts.prompts)
    try:
        await _embed(engine, output, texts.urgent, policy, show_progress, usage)
    except Qwen3EmbeddingsError as error:
        raise error.carrying(output.texts(size, total)) from error.__cause__
    computed = output.texts(size, total)
    if output.failures:
        one = policy.on_error == "stop"
        failure = output.failures[0] if one else TextsFailedError.of(output.failures)
        raise failure.carrying(computed)
    return computed.vectors


def _check_served(texts: Texts, served: Served, policy: Policy) -> None:
    """Raise for texts for which this engine would return the vectors of other texts."""
    if served.context is None and policy.overflow != "error":
        raise ConfigurationError(
            f"overflow={policy.overflow!r} needs the context, and this server does not report "
            "its own. Use overflow='error' and split the texts, or a vLLM or llama.cpp server."
        )
    altered = [i for i, prompt in enumerate(texts.prompts) if prompt != prompt.strip()]
    if served.strips and altered:
        said = (
            "the server strips leading and trailing whitespace, so it would return the vector of "
            "a different text. Strip the text before embedding it, or use a server that "
            "preserves whitespace."
        )
        policy.keep(texts.failures, TextError(said, altered))


async def _plan(engine: Engine, texts: Texts, context: int | None, policy: Policy) -> Plan:
    """Apply the overflow policy and return what to embed of each text.

    Only texts that could be over the context are tokenized ahead of the engine.
    """
    prompts: list[Prompt] = list(texts.prompts)
    suspects = [i for i, n in enumerate(texts.lengths) if context and n > context]
    encodings: dict[int, list[int]] = {}
    if context and suspects:
        ids = await _tokenize(engine, texts, suspects, policy)
        encodings = {i: tokens for i, tokens in ids.items() if len(tokens) > context}
    if context and encodings:
        if policy.overflow == "mean":
            return await _split(engine, texts, encodings, context)
        if policy.overflow == "truncate":
            for i, tokens in encodings.items():
                prompts[i] = long_texts.cut(tokens, context)
        else:
            try:
                check_lengths([encodings.get(i, []) for i in range(len(prompts))], context)
            except TextTooLongError as error:
                policy.keep(texts.failures, error)
    failed = positions_of(texts.failures)
    owners = [i for i in range(len(prompts)) if i not in failed]
    return Plan([prompts[i] for i in owners], owners, [1.0] * len(owners))


async def _split(
    engine: Engine, texts: Texts, encodings: dict[int, list[int]], context: int
) -> Plan:
    """Return the plan of ``overflow="mean"``: pieces of the over-long texts, each instructed."""
    template = (await engine.tokenize([instruct(texts.instruction, "")], texts.urgent))[0][:-1]
    plan = Plan([], [], [], split=True)
    failed = positions_of(texts.failures)
    for i, prompt in enumerate(texts.prompts):
        if i in failed:
            continue
        pieces: list[Prompt] = [prompt]
        head = 0
        if i in encodings:
            head = long_texts.shared_head(encodings[i], template)
            pieces = list(long_texts.split(encodings[i], context, head))
        plan.prompts.extend(pieces)
        plan.owners.extend([i] * len(pieces))
        plan.weights.extend(float(max(len(piece) - head - 1, 1)) for piece in pieces)
    return plan


async def _tokenize(
    engine: Engine, texts: Texts, positions: list[int], policy: Policy
) -> dict[int, list[int]]:
    """Return token ids of some of the texts by position, without those that have none."""
    try:
        prompts = [texts.prompts[i] for i in positions]
        ids = await engine.tokenize(prompts, texts.urgent)
        return dict(zip(positions, ids, strict=True))
    except (ServerError, TextRefusedError) as error:
        if policy.overflow == "error":
            return {}  # the server itself refuses what is too long
        if isinstance(error, TextRefusedError):
            refused = {positions[i] for i in error.positions}
            policy.keep(texts.failures, error.at(refused))
            others = [i for i in positions if i not in refused]
            return await _tokenize(engine, texts, others, policy) if others else {}
        if not isinstance(error, (ServerResponseError, ServerRefusedError)):
            raise
        raise ConfigurationError(
            f"overflow={policy.overflow!r} needs the server's tokenizer, and this server has no "
            f"/tokenize ({error}). Use overflow='error' and split the texts, or a vLLM server."
        ) from error


async def _embed(
    engine: Engine,
    output: Output,
    urgent: bool,
    policy: Policy,
    show_progress: bool,
    usage: Usage,
) -> None:
    """Fill `output`, chunk by chunk, several chunks in flight."""
    prompts = output.plan.prompts
    free = asyncio.Semaphore(engine.chunks_in_flight)

    async def embed_chunk(chunk: slice) -> None:
        rows = output.left(range(chunk.start, chunk.stop))
        while rows:  # again while some have neither a vector nor an error
            try:
                async with free:
                    mine = [prompts[i] for i in rows]
                    answer = await engine.embed(mine, output.width, urgent, usage)
                output.put(rows, answer)
            except Qwen3EmbeddingsError as error:
                output.fail(rows, error)
            if output.failures and policy.on_error == "stop":
                raise output.failures[0]
            left = output.left(rows)
            advance(len(rows) - len(left))
            rows = left

    chunks = list(slices(prompts, policy.batch_size, engine))
    with _progress(len(prompts), show_progress) as advance:
        if len(chunks) == 1:  # most calls: a task of its own would cost as much as the rest
            return await embed_chunk(chunks[0])
        await event_loop.gather(map(embed_chunk, chunks))


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with a number of finished texts.

    Without a bar nothing is created: a hidden tqdm costs 0.1 ms.
    """
    if not shown:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Embedding", unit="text") as bar:
        yield bar.update
