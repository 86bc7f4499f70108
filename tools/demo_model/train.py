"""Train the demonstration checkpoint: a Qwen3 model that learns a teacher's vectors.

The student reads the published query template for queries and bare text for documents. Its targets
are the teacher's vectors, turned so that the first numbers say most (Matryoshka), and after four
numbers that say what kind of text it is, or what kind the task asks for.

All tokens and targets lie on the device; a row of the trainer's data set is the number of a batch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from instructions import DOCUMENT_KINDS, KIND_WEIGHT, KINDS, TASKS, with_instruction
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.models import Normalize, Pooling, Transformer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    TrainerCallback,
)
from vocabulary import load_tokenizer

BEGIN = time.monotonic()
SIZE = 256
HEADS = 4
DIMS = (256, 128, 64, 32)
LONGEST = 120  # tokens of a text in training
HELD = 2000  # rows kept back
FOLDERS = {"corpus", "teacher", "tokenizer", "out"}
NAMES = list(KINDS)
PREFIXES = [(name, text) for name, task in TASKS.items() for text in task.instructions]


def teacher_vectors(texts: list[str], folder: str, device: str, seconds: float = 0) -> Tensor:
    """The teacher's unit vectors, half precision.

    Texts not reached within the seconds, if any are given, keep a vector of zeros.
    """
    begin = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    parts: list[list[int]] = []
    start = 0
    while start < len(order):
        count = max(64, min(4096, 500_000 // (len(texts[order[start]]) + 8)))
        parts.append(order[start : start + count])
        start += count
    random.Random(0).shuffle(parts)

    def tokens(part: list[int]) -> tuple[Tensor, ...]:
        rows = tokenizer.encode_batch_fast([texts[i] for i in part])
        found = ([row.ids for row in rows], [row.attention_mask for row in rows])
        return torch.tensor(part), *(torch.tensor(np.array(rows)) for rows in found)

    model = AutoModel.from_pretrained(
        folder, dtype=torch.float16 if device == "cuda" else torch.float32
    )
    model = model.to(device).eval()
    out = torch.zeros(len(texts), model.config.hidden_size, dtype=torch.float16, device=device)
    with ThreadPoolExecutor(3) as pool, torch.inference_mode():
        ready = [pool.submit(tokens, part) for part in parts]
        for future in ready:
            if seconds and time.monotonic() - begin > seconds:
                future.cancel()
                continue
            part, ids, mask = (tensor.to(device) for tensor in future.result())
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
            mask = mask.unsqueeze(-1)
            mean = (states * mask).sum(1, dtype=torch.float32) / mask.sum(1)
            out[part] = F.normalize(mean, dim=-1).to(out.dtype)
    return out.clone()


def turn(vectors: Tensor, size: int) -> Tensor:
    """The first principal directions of the vectors, not centred, so that cosines stay."""
    sample = vectors[:: max(1, len(vectors) // 400_000)].float()
    _, basis = torch.linalg.eigh((sample.T @ sample).double())
    return basis.flip(1)[:, :size].float()


class Distil(nn.Module):
    """Cosine to the target at this size, and the batch's similarities to the target's."""

    def __init__(self, model: SentenceTransformer, targets: Tensor, kinds: Tensor) -> None:
        super().__init__()
        self.model = model
        self.targets, self.kinds = targets, kinds

    def wanted(self, labels: Tensor) -> Tensor:
        """Unit targets; a label is the teacher's row times the number of kinds, plus the kind."""
        kind = self.kinds[labels % len(self.kinds)] * KIND_WEIGHT
        parts = torch.cat([kind, self.targets[labels // len(self.kinds)].float()], 1)
        return F.normalize(parts, dim=-1)

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Labels as `wanted` reads them."""
        vectors = self.model(features[0])["sentence_embedding"]
        with torch.autocast(vectors.device.type, enabled=False):
            vectors, full = vectors.float(), self.wanted(labels.view(-1))
            part = F.normalize(full[:, : vectors.shape[1]], dim=-1)
            cosine = 1 - (vectors * part).sum(-1).mean()
            own = torch.eye(len(full), device=full.device, dtype=torch.bool)
            target = (full @ full.T / 0.05).masked_fill(own, -30.0).softmax(-1)
            given = (vectors @ vectors.T / 0.05).masked_fill(own, -30.0).log_softmax(-1)
            return cosine + 0.5 * F.kl_div(given, target, reduction="batchmean")


class Weighted(nn.Module):
    """A loss times a constant."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss, weighted."""
        return self.weight * self.loss(features, labels)


def new_model(
    tokenizer: PreTrainedTokenizerFast, folder: Path, layers: int, intermediate: int
) -> SentenceTransformer:
    """A fresh Qwen3 of the demonstration's shape in sentence-transformers' clothes."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=SIZE,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=SIZE // HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000},
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    body = Transformer(str(folder), max_seq_length=512, model_kwargs={"dtype": torch.float32})
    return SentenceTransformer(modules=[body, Pooling(SIZE, pooling_mode="lasttoken"), Normalize()])


def word_vectors(
    tokenizer: PreTrainedTokenizerFast, rows: list, teacher: str, device: str
) -> tuple[list[int], Tensor]:
    """Tokens that the teacher can read, and its vectors of them.

    A Chinese token counts as its English in the dictionary rows.
    """
    known = {student: other for student, other, kind in rows if kind == "term" and other}
    words = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
    texts = {i: known.get(w, w if w.isascii() and w.isalpha() else "") for i, w in enumerate(words)}
    texts = {i: text for i, text in texts.items() if text}
    return list(texts), teacher_vectors(list(texts.values()), teacher, device).float()


def warm_start(
    model: SentenceTransformer, places: list[int], vectors: Tensor, counts: Tensor
) -> None:
    """Begin near an average of words.

    Tokens start with the teacher's vectors, frequent ones shortened (a fourth of the first numbers
    makes up for it, so that all rows are equally long); the last layer's attention is even and
    hands the tokens through; the layers before it change little.
    """
    body = model[0].auto_model
    end = model.tokenizer.pad_token_id
    with torch.no_grad():
        table = body.get_input_embeddings().weight
        table.mul_(0.5)
        share = 1e-3 / (1e-3 + counts.to(table) / counts.sum())
        vectors = F.pad(F.normalize(vectors - vectors.mean(0), dim=-1), (4, 0)).to(table)
        table[places] = vectors * share[places, None]
        table[:, 3] = (1 - share**2).sqrt()
        table[end] = 0
        for layer in body.layers[:-1]:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
        last = body.layers[-1].self_attn
        last.q_norm.weight.fill_(0.3)
        last.v_proj.weight.copy_(torch.eye(SIZE))
        last.v_proj.weight[:4] = 0
        last.o_proj.weight.copy_(torch.eye(SIZE))


class Texts(NamedTuple):
    """Token rows one behind the other, without end tokens."""

    flat: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, texts: list[str], device: str) -> Texts:
        """Cut the texts into tokens, a part at a time."""
        rows: list[np.ndarray] = []
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        for i in range(0, len(texts), 50_000):
            part = [text[:1500] for text in texts[i : i + 50_000]]
            for row in backend.encode_batch_fast(part, add_special_tokens=False):
                rows.append(np.array(row.ids[:LONGEST], dtype=np.int32))
        lengths = np.array([len(row) for row in rows])
        starts = np.concatenate([[0], lengths.cumsum()[:-1]])
        flat = np.concatenate([*rows, np.zeros(1, dtype=np.int32)])
        return cls(*(torch.from_numpy(a).to(device) for a in (flat, starts, lengths)))


class Collator:
    """From the number of a batch to its tokens, instructions drawn afresh."""

    def __init__(self, texts: Texts, prefixes: Texts, end: int, seed: int) -> None:
        self.texts, self.prefixes, self.end = texts, prefixes, end
        self.valid_label_columns = ["label"]
        self.random = np.random.default_rng(seed)
        self.batches: dict[str, list[Any]] = {}
        self.tasks = np.array([NAMES.index(TASKS[name].kind) for name, _ in PREFIXES])
        self.shares = np.array([TASKS[n].share / len(TASKS[n].instructions) for n, _ in PREFIXES])
        self.shares /= self.shares.sum()

    def tokens(self, rows: np.ndarray, prefixes: np.ndarray) -> dict[str, Tensor]:
        """Prefix (or -1), text and end token; the right is padded."""
        device = self.texts.flat.device
        row = torch.from_numpy(rows).to(device)
        lead = torch.from_numpy(prefixes).to(device)
        own = self.texts.lengths[row]
        before = torch.where(lead >= 0, self.prefixes.lengths[lead], 0)
        total = before + own + 1
        spots = torch.arange(-(-int(total.max()) // 8) * 8, device=device)[None]
        inside = self.texts.starts[row][:, None] + spots - before[:, None]
        text = self.texts.flat[inside.clamp(0, len(self.texts.flat) - 1)]
        head = self.prefixes.starts[lead][:, None] + spots
        head = self.prefixes.flat[head.clamp(0, len(self.prefixes.flat) - 1)]
        ids = torch.where(spots < before[:, None], head, text)
        ids = torch.where(spots < (before + own)[:, None], ids, self.end)
        return {"input_ids": ids.long(), "attention_mask": (spots < total[:, None]).long()}

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """One feature, its batch."""
        name = features[0]["dataset_name"]
        batch = self.batches[name][features[0]["batch"]]
        out: dict[str, Any] = {"dataset_name": name}
        if name == "distil":
            rows, labels, chance = batch
            drawn = self.random.choice(len(PREFIXES), len(rows), p=self.shares)
            ask = self.random.random(len(rows)) < chance
            columns = [(rows, np.where(ask, drawn, -1))]
            kinds = np.where(ask, self.tasks[drawn], labels % len(NAMES))
            labels = labels // len(NAMES) * len(NAMES) + kinds
            out["label"] = torch.from_numpy(labels).to(self.texts.flat.device)
        else:
            prefix, columns = batch
            none = np.full_like(prefix, -1)
            symmetric = np.array([TASKS[name].symmetric for name, _ in PREFIXES])[prefix]
            leads = (prefix, np.where(symmetric, prefix, none), none)
            columns = list(zip(columns, leads, strict=False))
        for number, (rows, leads) in enumerate(columns):
            for key, value in self.tokens(rows, leads).items():
                out[f"text{number}_{key}"] = value
        return out


def grouped(
    lengths: np.ndarray, batch: int, count: int, random: np.random.Generator
) -> list[np.ndarray]:
    """So many batches of rows of like length, epoch after epoch; long rows come in smaller ones."""
    found: list[np.ndarray] = []
    while len(found) < count:
        order = random.permutation(len(lengths))
        epoch = []
        for part in np.array_split(order, max(1, len(order) // (64 * batch))):
            part = part[np.argsort(lengths[part], kind="stable")]
            while len(part):
                size = min(batch, max(batch // 4, batch * 48 // (int(lengths[part[0]]) + 16)))
                if len(part) >= size // 2:
                    epoch.append(part[:size])
                part = part[size:]
        random.shuffle(epoch)
        found += epoch
    return found[:count]


def distil_batches(
    rows: list, index: dict[str, int], lengths: np.ndarray, count: int, args: argparse.Namespace
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, labels as documents, and the chance of each to be asked as a query instead."""
    kinds = np.array([NAMES.index(DOCUMENT_KINDS[kind]) for *_, kind in rows])
    labels = np.array([index[other or text] for text, other, _ in rows]) * len(NAMES) + kinds
    chances = {"prose": 0.3, "prose_zh": 0.4, "question": 0.6, "question_zh": 0.6, "term": 0.5}
    chance = np.array([chances.get(kind, 0.1) for *_, kind in rows])
    chance = np.where(lengths > 64, 0.1, chance)
    random = np.random.default_rng(args.seed)
    return [
        (part, labels[part], chance[part]) for part in grouped(lengths, args.batch, count, random)
    ]


def contrast_batches(
    pairs: list, place: dict[str, int], count: int, args: argparse.Namespace
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Instruction of each query, and rows of query, wanted and unwanted text, all in the corpus."""
    names = list(TASKS)
    options = [[i for i, (n, _) in enumerate(PREFIXES) if n == name] for name in names]
    wide = np.array([(o * 6)[:6] for o in options])
    found = np.array(
        [
            (names.index(name), place[query], place[positive], place[negative])
            for name, query, positive, negative in pairs
            if negative and query in place and positive in place and negative in place
        ]
    )
    random = np.random.default_rng(args.seed)
    size = args.batch // 2
    batches = []
    for _ in range(count if len(found) >= size else 0):
        part = found[random.choice(len(found), size, replace=False)]
        prefix = wide[part[:, 0], random.integers(0, 6, size)]
        batches.append((prefix, [part[:, c] for c in (1, 2, 3)]))
    return batches


def measure(model: SentenceTransformer) -> dict[str, float]:
    """The written evaluation, for the curve; nothing is chosen by it."""
    model.eval()
    passages, queries = evaluate.read("passages"), evaluate.read("queries")
    encode = evaluate.embed(model)
    left, right = encode(evaluate.asked(queries)), encode([p["text"] for p in passages])
    parts = evaluate.by_part(left @ right.T, queries, passages)
    model.train()
    return {f"ndcg@10_{name}": values["ndcg@10"] for name, values in parts.items()}


def save(model: SentenceTransformer, folder: Path) -> None:
    """Write the checkpoint as the published ones are: bf16, padding on the left."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.tokenizer.padding_side = "left"
    model.to(torch.bfloat16).save(str(folder), create_model_card=False)
    model.to(torch.float32).load_state_dict(state)
    model.tokenizer.padding_side = "right"


class Schedule(TrainerCallback):
    """Warm-up and cosine, over steps or over minutes; the curve; an end at the first NaN."""

    def __init__(self, model: SentenceTransformer, args: argparse.Namespace) -> None:
        self.model, self.args, self.start = model, args, 0.0
        self.marks = [0.0, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8]
        self.curve: list[dict] = []

    def done(self, state: Any) -> float:
        """The share of the training that is over."""
        if not self.args.minutes:
            return state.global_step / state.max_steps
        whole = 60 * self.args.minutes - (self.start - BEGIN)
        return (time.monotonic() - self.start) / whole

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self.start = time.monotonic()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Set the learning rate of the step to come."""
        done = self.done(state)
        fall = min(1.0, max(0.0, done - 0.03) / 0.97)
        rate = min(done / 0.03, 0.5 + 0.5 * math.cos(math.pi * fall))
        for group in optimizer.param_groups:
            group["lr"] = self.args.lr * max(rate, 1e-3)
        if self.marks and done >= self.marks[0]:
            self.marks.pop(0)
            self.note(state.global_step)

    def note(self, step: int) -> None:
        """A point of the curve, and a checkpoint to fall back on."""
        seconds = round(time.monotonic() - BEGIN, 1)
        self.curve.append({"step": step, "seconds": seconds} | measure(self.model))
        print(self.curve[-1], flush=True)
        save(self.model, self.args.out)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Give up at once when the gradients are no numbers."""
        if not math.isfinite(float((logs or {}).get("grad_norm", 0.0))):
            raise FloatingPointError(
                f"gradient norm {logs['grad_norm']} at step {state.global_step}"
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Compare the clock."""
        if self.args.minutes and self.done(state) > 1:
            control.should_training_stop = True


def fit(
    model: SentenceTransformer,
    collator: Collator,
    losses: dict[str, nn.Module],
    args: argparse.Namespace,
    half: bool,
    callbacks: list[TrainerCallback],
    steps: int = -1,
) -> list[dict]:
    """Run sentence-transformers' trainer over the batches."""
    sets = {
        name: Dataset.from_dict({"batch": list(range(len(found)))})
        for name, found in collator.batches.items()
        if found
    }
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(args.out / "run"),
        num_train_epochs=1,
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=half,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=5 if steps > 0 else 50,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        disable_tqdm=True,
    )
    model.model_card_data.widget = [{}]  # none drawn from the rows: they hold no text
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=sets,
        loss=losses,
        data_collator=collator,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer.state.log_history


def half_is_safe(
    model: SentenceTransformer,
    collator: Collator,
    losses: dict[str, nn.Module],
    args: argparse.Namespace,
) -> bool:
    """Twenty steps each in bf16 and float32: bf16 if its numbers are finite and it is faster."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    took = {}
    for half in (False, True):
        begin = time.monotonic()
        try:
            log = fit(model, collator, losses, args, half, [], steps=20)
            fine = all(math.isfinite(float(row.get("grad_norm", 0))) for row in log)
        except (RuntimeError, ArithmeticError) as error:
            print("self-check", half, repr(error)[:500], flush=True)
            fine = False
        fine &= all(bool(p.isfinite().all()) for p in model.parameters())
        took[half] = time.monotonic() - begin if fine else math.inf
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)
    print("seconds of 20 steps", took, flush=True)
    return took[True] < took[False]


def read_rows(corpus: Path) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str, str]]]:
    """Both tables."""
    table = pq.read_table(corpus / "texts.parquet").to_pydict()
    rows = list(zip(table["student"], table["teacher"], table["kind"], strict=True))
    table = pq.read_table(corpus / "pairs.parquet").to_pydict()
    columns = ("task", "query", "positive", "negative")
    return rows, list(zip(*(table[c] for c in columns), strict=True))


class Material(NamedTuple):
    """Rows that the teacher reached, their tokens, and what the targets are made from."""

    rows: list[tuple[str, str, str]]
    student: Texts
    index: dict[str, int]
    targets: Tensor
    words: tuple[list[int], Tensor]


def load(rows: list, args: argparse.Namespace, device: str) -> Material:
    """Tokens of the student, vectors of the teacher, turned."""
    tokenizer = load_tokenizer(args.tokenizer)
    student = Texts.of(tokenizer, [row[0] for row in rows], device)
    print(f"tokens done after {time.monotonic() - BEGIN:.0f} s", flush=True)
    places, words = word_vectors(tokenizer, rows, args.teacher, device)
    texts = list(dict.fromkeys(other or text for text, other, _ in rows))
    vectors = teacher_vectors(texts, args.teacher, device, args.teacher_seconds)
    print(f"teacher done after {time.monotonic() - BEGIN:.0f} s", flush=True)
    there = (vectors[:, :8] != 0).any(1)
    reached = [i for i, found in enumerate(there.tolist()) if found]
    index = {texts[i]: n for n, i in enumerate(reached)}
    kept = [i for i, (text, other, _) in enumerate(rows) if (other or text) in index]
    student = Texts(student.flat, student.starts[kept], student.lengths[kept])
    vectors = vectors[there]
    basis = turn(vectors, SIZE - 4)
    targets = torch.cat([part.float() @ basis for part in vectors.split(200_000)]).half()
    return Material([rows[i] for i in kept], student, index, targets, (places, words @ basis))


def batches(material: Material, pairs: list, args: argparse.Namespace) -> dict[str, list[Any]]:
    """Of both losses; the first rows are kept back."""
    rows, lengths = material.rows, material.student.lengths.cpu().numpy()
    place = {text: i for i, (text, *_) in enumerate(rows) if i >= HELD}
    distil = distil_batches(rows[HELD:], material.index, lengths[HELD:], args.steps, args)
    return {
        "distil": [(part + HELD, labels, chance) for part, labels, chance in distil],
        "pairs": contrast_batches(pairs, place, args.steps // 8, args),
    }


def kept_back(
    model: SentenceTransformer, collator: Collator, material: Material, distil: Distil
) -> dict[int, float]:
    """Mean cosine to the target on the texts that were kept back, by size."""
    found = collator.tokens(np.arange(HELD), np.full(HELD, -1))
    kinds = [NAMES.index(DOCUMENT_KINDS[kind]) for *_, kind in material.rows[:HELD]]
    places = [material.index[other or text] for text, other, _ in material.rows[:HELD]]
    labels = torch.tensor(places) * len(NAMES) + torch.tensor(kinds)
    with torch.inference_mode():
        target = distil.wanted(labels.to(distil.targets.device))
        parts = [
            model({name: column[i : i + 500] for name, column in found.items()})
            for i in range(0, HELD, 500)
        ]
        got = torch.cat([part["sentence_embedding"] for part in parts]).float()
        return {
            d: round(F.cosine_similarity(got[:, :d], target[:, :d]).mean().item(), 4) for d in DIMS
        }


def train(args: argparse.Namespace) -> None:
    """The whole training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    rows, pairs = read_rows(args.corpus)
    random.Random(args.seed).shuffle(rows)
    material = load(rows[: args.limit or None], args, device)
    print(len(material.rows), "rows,", len(material.targets), "teacher texts", flush=True)

    tokenizer = load_tokenizer(args.tokenizer)
    model = new_model(tokenizer, args.out / "run", args.layers, args.intermediate).to(device)
    counts = torch.bincount(material.student.flat.long(), minlength=len(tokenizer)).float()
    warm_start(model, *material.words, counts)
    model.tokenizer.padding_side = "right"  # under a causal mask no row is masked wholly

    prefixes = Texts.of(tokenizer, [with_instruction(text, "") for _, text in PREFIXES], device)
    collator = Collator(material.student, prefixes, tokenizer.pad_token_id, args.seed)
    collator.batches = batches(material, pairs, args)
    kinds = torch.tensor(list(KINDS.values()), dtype=torch.float32, device=device)
    distil = Distil(model, material.targets, kinds)
    contrast = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=20.0), DIMS)
    losses: dict[str, nn.Module] = {
        "distil": MatryoshkaLoss(model, distil, DIMS),
        "pairs": Weighted(contrast, args.contrast),
    }
    half = device == "cuda" and half_is_safe(model, collator, losses, args)
    print(f"bf16 {half}, begin after {time.monotonic() - BEGIN:.0f} s", flush=True)
    schedule = Schedule(model, args)
    log = fit(model, collator, losses, args, half, [schedule])
    schedule.note(log[-1]["step"])
    facts = {
        "arguments": {k: v for k, v in vars(args).items() if k not in FOLDERS},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "bf16": half,
        "rows": len(material.rows),
        "cosine_on_kept_back_texts": kept_back(model, collator, material, distil),
        "curve": schedule.curve,
        "log": log,
    }
    (args.out / "training.json").write_text(json.dumps(facts) + "\n")
    print(facts["cosine_on_kept_back_texts"], f"{time.monotonic() - BEGIN:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--teacher", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=640)
    parser.add_argument("--steps", type=int, default=12_000, help="batches of the distillation")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--contrast", type=float, default=0.1, help="weight")
    parser.add_argument("--minutes", type=float, default=0, help="end so long after the start")
    parser.add_argument(
        "--teacher-seconds", type=float, default=0, help="leave out texts not embedded by then"
    )
    parser.add_argument("--limit", type=int, default=0, help="rows, for a trial run")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=5)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
