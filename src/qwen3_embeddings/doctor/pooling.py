"""The checks. Each sends a few prompts to the engine and judges the raw rows that come back.

Most need no reference to compare with, because of what causal attention does. A token's state
depends on the tokens up to it only, and where all tokens so far are the same, so are their states,
at every layer: attention averages equal values. So "1" and "11111111" (digits are tokens of their
own here) get one vector if and only if nothing else is appended and pooled, and a run of end tokens
gets one vector, whatever its length, if and only if it is the end token that is appended.
"""

from __future__ import annotations

from qwen3_embeddings import models
from qwen3_embeddings.doctor.compare import SAME
from qwen3_embeddings.doctor.report import Finding
from qwen3_embeddings.doctor.subject import REFUSALS, CannotTellError, Subject


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
