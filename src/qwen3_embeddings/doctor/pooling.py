"""Checks of which token's state becomes the vector. They need no reference.

The model attends causally: a token's state depends only on the tokens up to it. In a run of equal
tokens all states are equal at every layer, because attention averages equal values. Some pairs of
prompts must therefore have equal vectors, and others must not.

Each check compares two distances measured on the same model. A fixed limit would be wrong: random
weights of the 0.6B shape move 20 times less with the last token than trained ones do.
"""

from __future__ import annotations

from qwen3_embeddings.doctor.compare import FAR, angle
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import REFUSALS, CannotTellError, Subject
from qwen3_embeddings.errors import Qwen3EmbeddingsError
from qwen3_embeddings.models import END_TOKEN

TINY = 1e-12
"""Replaces a distance of zero in a ratio; less than the rounding of float32 rows."""

SHORT, RUNS = 31, (2047, 1023, 255)
"""Lengths of runs of equal tokens: the short one, and the long ones of which the first that the
engine accepts is used. In 31 tokens the effect of one more is already proportional to its share."""

LAST = 3.0
"""Growth of the last token's effect, from the short run to the long, that rules out the mean."""

MEAN = 1.5
"""Growth up to which the mean is pooled, if the long run has at least `SURE` tokens."""

SURE = 1023
"""Shorter runs cannot rule out that the last token is pooled but has little effect."""

_RUN, _OTHERS = 16, (17, 64, 220)
"""Token ids of the run and of its last token. Any ids do; these exist in every Qwen3 tokenizer."""


async def end_token(subject: Subject) -> Finding:
    """Check that the end token is appended, and no other token.

    Digits are tokens of their own. "1" and "11111111" have one vector only if no other token is
    appended and pooled. A run of end tokens has one vector, whatever its length, only if the token
    appended is the end token and nothing precedes the text.
    """
    appended = max(TINY, await subject.distance("1", "1" * 8))
    run = max(TINY, await subject.distance(END_TOKEN, END_TOKEN * 8))
    measured = appended / run
    if measured >= FAR:
        said = f"{END_TOKEN} is appended, and no other token"
        return Finding("end token", "ok", said, measured=measured)
    if await subject.distance("1", "2") / appended >= FAR:
        said = (
            "'1' and '11111111' have the same vector: no end token is appended, or another token "
            "than the last is pooled"
        )
        remedy = _END_REMEDY + " If the pooling check fails too, fix the pooling first."
        return Finding("end token", "failure", said, _END_EFFECT, remedy, measured)
    if measured > FAR / 10 or not await _is_special(subject):
        raise CannotTellError(
            f"a run of {END_TOKEN} changes with its length, perhaps because the server reads it as "
            "plain text. Pass --reference to compare with the checkpoint"
        )
    said = (
        f"the vector of a run of {END_TOKEN} changes with its length: another token is appended, "
        "or something precedes every text"
    )
    remedy = _END_REMEDY + " Remove any prompt or prefix from the server's settings."
    return Finding("end token", "failure", said, _END_EFFECT, remedy, measured)


_END_EFFECT = "Every vector is read from the wrong token, so search does not find similar texts."
_END_REMEDY = (
    "Serve the published tokenizer.json, whose post-processor appends <|endoftext|> and nothing "
    "else. For llama.cpp, convert the model again (tokenizer.ggml.add_eos_token = true, "
    "tokenizer.ggml.eos_token_id that of <|endoftext|>)."
)


async def _is_special(subject: Subject) -> bool:
    """Return whether the engine is known to read `END_TOKEN` in a text as one token."""
    try:
        [ids] = await subject.engine.tokenize([END_TOKEN * 8])
    except (Qwen3EmbeddingsError, ValueError):
        return False
    return len(ids) <= 10  # eight, and at most one more on either side


async def pooling(subject: Subject) -> Finding:
    """Check that the last token is pooled: not the first, and not the mean."""
    same = await subject.distance("1 apple pie", "1 zebra at night")
    other = await subject.distance("apple pie", "zebra at night")
    if same * FAR <= other:
        said = "texts with the same first token have the same vector: the first token is pooled"
        return _wrong_pooling(said, same / max(TINY, other))
    run, growth, noise = await _last_token_effect(subject)
    if growth >= LAST and growth >= 3 * noise:
        return Finding("pooling", "ok", "the last token is pooled", measured=growth)
    if noise < growth <= MEAN and run >= SURE:
        said = f"the last of {run + 1} tokens counts as one of {run + 1}: the mean is pooled"
        return _wrong_pooling(said, growth)
    raise CannotTellError(
        "the first token is not pooled. The last token has too little effect to tell it from the "
        "mean; if the context check fails, fix that first. Pass --reference to compare with the "
        "checkpoint"
    )


def _wrong_pooling(said: str, measured: float) -> Finding:
    effect = "The model was not trained for such vectors, so the ranking is poor."
    remedy = (
        """vLLM: --pooler-config '{"pooling_type": "LAST"}'; llama.cpp: --pooling last; """
        "sentence-transformers: pooling_mode_lasttoken in 1_Pooling/config.json."
    )
    return Finding("pooling", "failure", said, effect, remedy, measured)


async def _last_token_effect(subject: Subject) -> tuple[int, float, float]:
    """Measure how the last token's effect grows with the number of equal tokens before it.

    The effect of a token b after n tokens a is n times the angle between [a] * n and [a] * n + [b].
    All states of the run are equal, so in a mean b's state is one of n + 1, and the effect stays:
    the growth is 1 for any weights. Under last-token pooling the part of b's state that comes
    from b itself does not shrink, so the effect grows with n.

    Returns:
        The length of the long run; the largest growth over several tokens b; and the growth that
        rounding alone causes, which is that of the control b = a.

    Raises:
        CannotTellError: The engine refuses token ids, or runs of that length.
    """
    reason = f"the context has {subject.context} tokens"
    for run in RUNS:
        if run + 2 > subject.context:
            continue
        try:
            return run, *await _growth(subject, run)
        except REFUSALS as error:
            reason = str(error)
    raise CannotTellError(
        "the first token is not pooled. Telling the last token from the mean needs a run of "
        f"{RUNS[-1]} token ids, which cannot be sent ({reason}). Pass --reference to compare with "
        "the checkpoint"
    )


async def _growth(subject: Subject, run: int) -> tuple[float, float]:
    """Return the growth and its noise, as `_last_token_effect` defines them."""
    before = {length: await subject.rows([_RUN] * length) for length in (SHORT, run)}

    async def effect(length: int, other: int) -> float:
        after = await subject.rows([_RUN] * length + [other])
        return length * angle(before[length], after)

    control = await effect(run, _RUN)
    growths = []
    for other in _OTHERS:
        short = max(TINY, await effect(SHORT, other))
        growths.append((await effect(run, other) / short, control / short))
    return max(growths)
