"""Answer a question from retrieved passages with a LangChain chain (LCEL).

    python examples/langchain_rag.py [MODEL]

The chat model is a stand-in that repeats the first passage of its prompt. Replace it with your
own, for example `ChatOpenAI`.
"""

from __future__ import annotations

import sys

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_qwen3_embeddings import Qwen3Embeddings

PASSAGES = [
    "Bread dough rises because yeast turns sugar into carbon dioxide.",
    "The Moon causes the tides: its gravity pulls the oceans towards it.",
    "Bees tell each other where flowers are by dancing.",
]
PROMPT = ChatPromptTemplate.from_template(
    "Answer from these passages only:\n{context}\n\nQuestion: {question}"
)


def join(documents: list[Document]) -> str:
    """Return the passages, one per line."""
    return "\n".join(document.page_content for document in documents)


def fake_chat_model(prompt: PromptValue) -> str:
    """Return the first passage of the prompt."""
    return prompt.to_string().splitlines()[1]


def main(model: str | None = None) -> None:
    """Index the passages, build the chain and print its answer."""
    with Qwen3Embeddings(model=model, task="question_answering") as embeddings:
        store = InMemoryVectorStore.from_texts(PASSAGES, embeddings)
        retriever = store.as_retriever(search_kwargs={"k": 2})
        chain = (
            {"context": retriever | join, "question": RunnablePassthrough()}
            | PROMPT
            | RunnableLambda(fake_chat_model)
            | StrOutputParser()
        )
        print(chain.invoke("How do bees find food that another bee has found?"))


if __name__ == "__main__":
    main(*sys.argv[1:])
