"""Score a model with mteb, each task under its own instruction.

    python examples/recipe_mteb.py [MODEL [TASK ...]]

Queries carry the instruction that mteb has for the task, and documents none. Tasks without roles,
such as STS and clustering, put it before every text. Texts over the context are truncated. The
published evaluation used its own instructions for some tasks and 8,192 tokens, so scores can differ
slightly.
"""

from __future__ import annotations

import sys
from typing import Any

import mteb
import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from qwen3_embeddings import Embedder


class Qwen3Encoder(AbsEncoder):
    """mteb's encoder protocol (mteb 2) over an embedder."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"local/{(embedder.model or 'server').rstrip('/').rpartition('/')[2]}",
             "similarity_fn_name": ScoringFunction.COSINE}
        )  # fmt: skip

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> np.ndarray:
        """Return one vector per text of the batches in `inputs`."""
        texts = [text for batch in inputs for text in batch["text"]]
        if prompt_type == PromptType.document:
            return self.embedder.encode_document(texts)
        instruction: Any = self.get_instruction(task_metadata, prompt_type)
        if isinstance(instruction, dict):  # one per role, and the task has none
            instruction = next(iter(instruction.values()))
        with self.embedder.with_task(query_instruction=instruction) as embedder:
            return embedder.encode_query(texts)


def main(model: str | None = None, *names: str) -> None:
    """Evaluate on the named tasks, whose data come from the Hugging Face hub."""
    tasks = mteb.get_tasks(tasks=list(names or ["NFCorpus"]))
    with Embedder(model, overflow="truncate") as embedder:
        for result in mteb.evaluate(Qwen3Encoder(embedder), tasks, cache=None):
            print(f"{result.task_name} {result.get_score():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
