"""The tokenizer of a checkpoint, loaded without an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_embeddings import checkpoint
from qwen3_embeddings.errors import MissingDependencyError, UnknownModelError
from qwen3_embeddings.models import END_TOKEN

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(model: str, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model, and check that it appends the end token.

    A folder or a model in the Hugging Face cache needs no network.

    Args:
        model: hub id or folder.
        revision: branch, tag or commit on the hub.

    Returns:
        A tokenizer that neither pads nor truncates.

    Raises:
        UnknownModelError: there is no such model, its ``tokenizer.json`` is missing or broken, or
            the tokenizer does not append the end token.
        MissingDependencyError: tokenizers is not installed.

    Example:
        >>> load_tokenizer("Qwen/Qwen3-Embedding-0.6B").encode("Hello").ids
        [9707, 151643]
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"tokenizers cannot be imported ({error}). Run pip install tokenizers."
        ) from error
    path = checkpoint.find_file(model, "tokenizer.json", revision)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers has no class of its own for it
        raise UnknownModelError(
            f"{path} is not a tokenizer ({error}). Download it again."
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check_end_token(model, tokenizer)
    return tokenizer


def _check_end_token(model: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a").ids
    if not ids or ids[-1] != tokenizer.token_to_id(END_TOKEN):
        raise UnknownModelError(
            f"the tokenizer of {model!r} does not append {END_TOKEN}, whose hidden state is the "
            "embedding: every vector would be wrong. Restore the post-processor of the published "
            "tokenizer.json."
        )
