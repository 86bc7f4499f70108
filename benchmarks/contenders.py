"""The contenders: one factory each, which returns the calls to time.

If the package of a contender is not installed, the table says so and the others are measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen3_embeddings.cli.bench import Query

Encode = Callable[[list[str]], Any]
BATCH = 64
"""Texts per request of other packages (defaults: 1,000 in langchain-openai, 10 in LlamaIndex)."""


@dataclass(frozen=True)
class Contender:
    """One method of getting vectors.

    Attributes:
        documents: embeds a list of texts.
        query: embeds one text. A blocking call runs in a thread, as the frameworks do it.
    """

    documents: Encode
    query: Query


def _in_thread(call: Callable[[str], Any]) -> Query:
    async def query(text: str) -> Any:
        return await asyncio.to_thread(call, text)

    return query


# In the process: model, dtype.


def llm_embed(model: str, dtype: str) -> Encode:
    """`LLM.embed` of vLLM as its documentation shows it."""
    from vllm import LLM

    engine = LLM(model, runner="pooling", convert="embed", dtype=dtype)
    return lambda texts: engine.embed(texts, use_tqdm=False)


def ours(model: str, dtype: str) -> Encode:
    """`Embedder.encode_document`."""
    from qwen3_embeddings import Embedder

    return Embedder(model, dtype=dtype).encode_document


def ours_torch(model: str, dtype: str) -> Encode:
    """`Embedder.encode_document` with the PyTorch engine."""
    from qwen3_embeddings import Embedder

    return Embedder(model, dtype=dtype, engine="torch").encode_document


def ours_langchain(model: str, dtype: str) -> Encode:
    """`Qwen3Embeddings.embed_documents`."""
    from langchain_qwen3_embeddings import Qwen3Embeddings

    return Qwen3Embeddings(model=model, dtype=dtype).embed_documents


def ours_llama_index(model: str, dtype: str) -> Encode:
    """`Qwen3Embedding.get_text_embedding_batch`."""
    from llama_index.embeddings.qwen3 import Qwen3Embedding

    return Qwen3Embedding(model_name=model, dtype=dtype).get_text_embedding_batch


def sentence_transformers(model: str, dtype: str) -> Encode:
    """`SentenceTransformer.encode`, batch 128."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, model_kwargs={"dtype": dtype})
    return lambda texts: encoder.encode(texts, batch_size=128, show_progress_bar=False)


def langchain_huggingface(model: str, dtype: str) -> Encode:
    """`HuggingFaceEmbeddings.embed_documents`, batch 128."""
    from langchain_huggingface import HuggingFaceEmbeddings

    return HuggingFaceEmbeddings(
        model_name=model,
        model_kwargs={"model_kwargs": {"dtype": dtype}},
        encode_kwargs={"batch_size": 128},
    ).embed_documents


def llama_index_huggingface(model: str, dtype: str) -> Encode:
    """`HuggingFaceEmbedding.get_text_embedding_batch`, batch 128."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    return HuggingFaceEmbedding(
        model_name=model, embed_batch_size=128, model_kwargs={"dtype": dtype}
    ).get_text_embedding_batch


IN_PROCESS: dict[str, Callable[[str, str], Encode]] = {
    "LLM.embed": llm_embed,
    "ours": ours,
    "ours, torch": ours_torch,
    "ours, LangChain": ours_langchain,
    "ours, LlamaIndex": ours_llama_index,
    "sentence-transformers": sentence_transformers,
    "langchain-huggingface": langchain_huggingface,
    "llama-index-huggingface": llama_index_huggingface,
}


# Through a server: base URL, model.


def our_client(url: str, model: str | None) -> Contender:
    """`Embedder`."""
    from qwen3_embeddings import Embedder

    embedder = Embedder(model, base_url=url)
    return Contender(embedder.encode_document, lambda text: embedder.aencode_query([text]))


def our_threads(url: str, model: str | None) -> Contender:
    """`Embedder` called from threads."""
    from qwen3_embeddings import Embedder

    embedder = Embedder(model, base_url=url)
    query = _in_thread(lambda text: embedder.encode_query([text]))
    return Contender(embedder.encode_document, query)


def our_langchain_client(url: str, model: str | None) -> Contender:
    """`Qwen3Embeddings`."""
    from langchain_qwen3_embeddings import Qwen3Embeddings

    embeddings = Qwen3Embeddings(model=model, base_url=url)
    return Contender(embeddings.embed_documents, embeddings.aembed_query)


def our_llama_index_client(url: str, model: str | None) -> Contender:
    """`Qwen3Embedding`."""
    from llama_index.embeddings.qwen3 import Qwen3Embedding

    embedding = Qwen3Embedding(model_name=model, api_base=url)
    return Contender(embedding.get_text_embedding_batch, embedding.aget_query_embedding)


def langchain_openai(url: str, model: str) -> Contender:
    """`OpenAIEmbeddings`, sending text instead of token ids of another model."""
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        base_url=url,
        api_key="none",
        model=model,
        chunk_size=BATCH,
        check_embedding_ctx_length=False,
    )
    return Contender(embeddings.embed_documents, embeddings.aembed_query)


def llama_index_openai_like(url: str, model: str) -> Contender:
    """`OpenAILikeEmbedding`."""
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embedding = OpenAILikeEmbedding(
        api_base=url, api_key="none", model_name=model, embed_batch_size=BATCH
    )
    return Contender(embedding.get_text_embedding_batch, embedding.aget_query_embedding)


def openai_client(url: str, model: str) -> Contender:
    """`openai`'s own client, one request after the other."""
    from openai import AsyncOpenAI, OpenAI

    client = OpenAI(base_url=url, api_key="none")
    other = AsyncOpenAI(base_url=url, api_key="none")

    def documents(texts: list[str]) -> Any:
        parts = (texts[i : i + BATCH] for i in range(0, len(texts), BATCH))
        answers = [client.embeddings.create(model=model, input=part) for part in parts]
        return [row.embedding for answer in answers for row in answer.data]

    async def query(text: str) -> Any:
        return (await other.embeddings.create(model=model, input=text)).data[0].embedding

    return Contender(documents, query)


THROUGH_SERVER: dict[str, Callable[[str, str], Contender]] = {
    "ours": our_client,
    "ours, threads": our_threads,
    "ours, LangChain": our_langchain_client,
    "ours, LlamaIndex": our_llama_index_client,
    "langchain-openai": langchain_openai,
    "llama-index openai-like": llama_index_openai_like,
    "openai": openai_client,
}
