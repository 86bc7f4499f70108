"""Train the demonstration checkpoint: tokenizer, Qwen3 model, distillation and contrast.

The student reads the published query template for queries and bare text for documents. Its targets
are the teacher's vectors, turned so that the first numbers say most (Matryoshka), and after four
numbers that say what kind of text it is, or what kind the task asks for.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

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
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3Model, TrainerCallback
from vocabulary import load_tokenizer

BEGIN = time.monotonic()
SIZE = 256
DIMS = (256, 128, 64, 32)
BUCKETS = (
    100,
    300,
    600,
)  # characters: texts of like length share a batch; longer ones are left out


def teacher_vectors(
    texts: list[str], folder: str, device: str, workers: int = 0, seconds: float = 0
) -> Tensor:
    """The teacher's unit vectors, half precision; workers cut the texts into tokens.

    Texts not reached within the seconds, if any are given, keep a vector of zeros.
    """
    begin = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    parts: list[list[int]] = []
    start = 0
    while start < len(order):
        count = max(64, min(16384, 1_000_000 // (len(texts[order[start]]) + 8)))
        parts.append(order[start : start + count])
        start += count
    random.Random(0).shuffle(parts)

    def tokens(part: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        batch = tokenizer(
            [texts[i] for i in part],
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="np",
            return_token_type_ids=False,
        )
        lengths = batch["attention_mask"].sum(1).astype(np.int32)
        return np.array(part), batch["input_ids"].astype(np.int32), lengths

    loader = DataLoader(parts, batch_size=None, collate_fn=tokens, num_workers=workers)
    model = AutoModel.from_pretrained(
        folder, dtype=torch.float16 if device == "cuda" else torch.float32
    )
    model = model.to(device).eval()
    out = torch.zeros(len(texts), model.config.hidden_size, dtype=torch.float16, device=device)
    for part, ids, lengths in loader:
        tokens_in = torch.from_numpy(ids).to(device).long()
        spots = torch.arange(ids.shape[1], device=device)
        mask = (spots < torch.from_numpy(lengths).to(device)[:, None]).long()
        with torch.inference_mode():
            states = model(input_ids=tokens_in, attention_mask=mask).last_hidden_state
            mask = mask.unsqueeze(-1)
            mean = (states * mask).sum(1, dtype=torch.float32) / mask.sum(1)
        out[torch.from_numpy(part).to(device)] = F.normalize(mean, dim=-1).to(out.dtype)
        if seconds and time.monotonic() - begin > seconds:
            break
    return out


def turn(vectors: Tensor, size: int) -> Tensor:
    """The first principal directions of the vectors, not centred, so that cosines stay."""
    sample = vectors[:: max(1, len(vectors) // 400_000)].float()
    _, basis = torch.linalg.eigh(sample.T @ sample)
    return basis.flip(1)[:, :size]


class Distil(nn.Module):
    """Cosine to the target at this size, and the batch's similarities to the target's."""

    def __init__(self, model: SentenceTransformer, targets: Tensor, kinds: Tensor) -> None:
        super().__init__()
        self.model = model
        self.targets, self.kinds = targets, kinds

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Labels are row of the teacher's table times the number of kinds, plus the kind."""
        vectors = self.model(features[0])["sentence_embedding"].float()
        labels = labels.view(-1).to(self.targets.device)
        kind = self.kinds[labels % len(self.kinds)] * KIND_WEIGHT
        full = F.normalize(
            torch.cat([kind, self.targets[labels // len(self.kinds)].float()], 1), dim=-1
        )
        part = F.normalize(full[:, : vectors.shape[1]], dim=-1)
        cosine = 1 - (vectors * part).sum(-1).mean()
        own = torch.eye(len(full), device=full.device, dtype=torch.bool)[:2048, :2048]
        wanted = (full[:2048] @ full[:2048].T / 0.05).masked_fill(own, -30.0).softmax(-1)
        given = (vectors[:2048] @ vectors[:2048].T / 0.05).masked_fill(own, -30.0).log_softmax(-1)
        relation = F.kl_div(given, wanted, reduction="batchmean")
        return cosine + 0.5 * relation


class Weighted(nn.Module):
    """A loss times a constant."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss, weighted."""
        return self.weight * self.loss(features, labels)


def new_model(tokenizer_folder: Path, layers: int, intermediate: int) -> SentenceTransformer:
    """A fresh Qwen3 of the demonstration's shape in sentence-transformers' clothes."""
    tokenizer = load_tokenizer(tokenizer_folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=SIZE,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000},
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    folder = tokenizer_folder / f"fresh-{layers}"
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    body = Transformer(str(folder), max_seq_length=192, model_kwargs={"dtype": torch.float32})
    return SentenceTransformer(modules=[body, Pooling(SIZE, pooling_mode="lasttoken"), Normalize()])


def warm_start(
    model: SentenceTransformer, rows: list, teacher: str, basis: Tensor, device: str
) -> None:
    """Begin as an average of words: tokens as the teacher knows them, attention that is even.

    An English token starts with the teacher's vector of its letters, a Chinese one with that of its
    English in the dictionary rows. Half of the numbers are averaged by the first layer, the other
    half by the second (two key-value heads hold half of them), with queries near zero. Frequent
    tokens count less: their length goes into the fourth number, which is not averaged.
    """
    tokenizer, body = model.tokenizer, model[0].auto_model
    known = {student: other for student, other, kind in rows if kind == "term" and other}
    words = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
    texts = {
        i: known.get(w, w if w.isascii() and w.isalpha() and len(w) > 1 else "")
        for i, w in enumerate(words)
    }
    texts = {i: text for i, text in texts.items() if text}
    vectors = teacher_vectors(list(texts.values()), teacher, device).float() @ basis
    vectors = F.pad(F.normalize(vectors - vectors.mean(0), dim=-1), (4, 0))
    with torch.no_grad():
        table = body.get_input_embeddings().weight
        table.mul_(0.1)
        counts = torch.bincount(
            torch.tensor(
                [
                    t
                    for ids in tokenizer([s[:200] for s, _, _ in rows[:40_000]])["input_ids"]
                    for t in ids
                ]
            ),
            minlength=len(words),
        ).to(table)
        share = 3e-3 / (3e-3 + counts / counts.sum())
        table[list(texts)] = vectors.to(table) * share[list(texts), None] * 0.32
        table[:, 3] = 0.32 * (1 - share**2).sqrt()
        half = SIZE // 2
        for number, layer in enumerate(body.layers):
            layer.self_attn.q_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
            layer.self_attn.o_proj.weight.mul_(0.05)
            if number < 2:
                part = torch.eye(half, device=table.device)
                value, out = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
                value.zero_()
                value[:, number * half : (number + 1) * half] = part
                value[:, :4] = 0
                for head in range(4):
                    rows_of = slice(
                        number * half + (head // 2) * 64, number * half + (head // 2 + 1) * 64
                    )
                    out[rows_of, head * 64 : (head + 1) * 64] += 0.02 * part[:64, :64]


def distil_sets(rows: list, index: dict[str, int], rng: random.Random) -> dict[str, Dataset]:
    """The texts as documents and, some, as queries of a drawn task, in sets by length."""
    names = list(TASKS)
    weights = [TASKS[name].share for name in names]
    kinds = list(KINDS)
    found: dict[int, list[tuple[str, int]]] = {limit: [] for limit in BUCKETS}
    for student, teacher, kind in rows:
        row = index[teacher or student]
        put = [(student, DOCUMENT_KINDS[kind])]
        if rng.random() < (0.15 if kind == "code" or len(student) > 300 else 0.5):
            task = TASKS[rng.choices(names, weights)[0]]
            put.append((with_instruction(rng.choice(task.instructions), student), task.kind))
        for text, target in put:
            limit = next((limit for limit in BUCKETS if len(text) <= limit), None)
            if limit:
                found[limit].append((text, row * len(kinds) + kinds.index(target)))
    return {
        f"distil-{limit}": Dataset.from_dict(
            {"text": [t for t, _ in items], "label": [n for _, n in items]}
        )
        for limit, items in found.items()
        if items
    }


def brief(text: str) -> str:
    """The beginning of a text, about a hundred tokens at most."""
    return text[:300] if text.isascii() else text[:110]


def contrast_sets(rows: list, rng: random.Random) -> dict[str, Dataset]:
    """The pairs, with the task's instruction on the query (symmetric: on both)."""
    found: dict[str, list[list[str]]] = {}
    for name, query, positive, negative in rows:
        task = TASKS[name]
        instruction = rng.choice(task.instructions)
        query, positive, negative = brief(query), brief(positive), brief(negative)
        texts = [with_instruction(instruction, query), positive]
        if task.symmetric:
            texts[1] = with_instruction(instruction, positive)
        if negative:
            texts.append(negative)
        size = "short" if max(map(len, texts)) <= 200 else "long"
        found.setdefault(f"pairs-{len(texts)}-{size}", []).append(texts)
    columns = ("query", "positive", "negative")
    return {
        name: Dataset.from_dict(
            {c: list(v) for c, v in zip(columns, zip(*items, strict=True), strict=False)}
        )
        for name, items in found.items()
    }


def held_out(
    model: SentenceTransformer, texts: list[str], labels: list[int], loss: Distil
) -> dict[str, float]:
    """Mean cosine to the target on texts that were kept back, by size."""
    vectors = model.encode(texts, batch_size=512, convert_to_tensor=True).float()
    n, labels = len(loss.kinds), torch.tensor(labels, device=vectors.device)
    full = torch.cat([loss.kinds[labels % n] * KIND_WEIGHT, loss.targets[labels // n].float()], 1)
    return {
        f"cosine_{d}": F.cosine_similarity(vectors[:, :d], full[:, :d]).mean().item() for d in DIMS
    }


def ranking(model: SentenceTransformer, pairs: list) -> dict[str, float]:
    """Share of kept-back pairs whose positive comes first among all positives and negatives."""
    scores = {}
    for name in sorted({p[0] for p in pairs}):
        part = [p for p in pairs if p[0] == name][:1000]
        task = TASKS[name]
        queries = [with_instruction(task.instructions[0], q) for _, q, _, _ in part]
        documents = [positive[:400] for _, _, positive, _ in part]
        if task.symmetric:
            documents = [with_instruction(task.instructions[0], text) for text in documents]
        documents += [negative[:400] for *_, negative in part if negative]
        left = model.encode(queries, batch_size=512, convert_to_tensor=True).float()
        right = model.encode(documents, batch_size=512, convert_to_tensor=True).float()
        for d in (256, 64):
            near = F.normalize(left[:, :d], dim=-1) @ F.normalize(right[:, :d], dim=-1).T
            first = near.argmax(1) == torch.arange(len(part), device=near.device)
            scores[f"first_{name}_{d}"] = first.float().mean().item()
    return scores


def save(model: SentenceTransformer, folder: Path) -> None:
    """Write the checkpoint as the published ones are: bf16, Qwen3ForCausalLM, rope_theta."""
    model.tokenizer.padding_side = "left"
    model.to(torch.bfloat16).save(str(folder), create_model_card=False)
    for name, size in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        path = folder / name
        settings = json.loads(path.read_text())
        if size in settings:
            path.write_text(json.dumps(settings | {size: 4096}, indent=2) + "\n")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = ["Qwen3ForCausalLM"]
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--teacher", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="teacher vectors kept here between runs")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=640)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--steps", type=int, default=-1, help="instead of epochs")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--contrast", type=float, default=0.3, help="weight; 0 leaves it out")
    parser.add_argument(
        "--minutes", type=float, default=0, help="instead of steps: end so long after the start"
    )
    parser.add_argument(
        "--teacher-seconds", type=float, default=0, help="leave out texts not embedded by then"
    )
    parser.add_argument(
        "--spare", type=Path, help="folder for checkpoints on the way, as tar files"
    )
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--limit", type=int, default=0, help="rows, for a trial run")
    parser.add_argument("--batch", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=5)
    train(parser.parse_args())


def load_teacher(args: argparse.Namespace, device: str) -> tuple[list, dict[str, int], Tensor]:
    """Rows, where each teacher text stands, and the teacher's vectors (from the cache if there)."""
    table = pq.read_table(args.corpus / "texts.parquet").to_pydict()
    rows = list(zip(table["student"], table["teacher"], table["kind"], strict=True))
    random.Random(args.seed).shuffle(rows)
    rows = rows[: args.limit or None]
    texts = list(dict.fromkeys(t or s for s, t, _ in rows))
    if args.cache and args.cache.is_file():
        vectors = torch.from_numpy(np.load(args.cache)).to(device)
    else:
        vectors = teacher_vectors(texts, args.teacher, device, args.workers, args.teacher_seconds)
        if args.cache:
            np.save(args.cache, vectors.cpu().numpy())
    there = (vectors[:, :8] != 0).any(1)
    texts = [text for text, found in zip(texts, there.tolist(), strict=True) if found]
    index = {text: i for i, text in enumerate(texts)}
    return [row for row in rows if (row[1] or row[0]) in index], index, vectors[there]


def train(args: argparse.Namespace) -> None:
    """The whole training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    rng = random.Random(args.seed)
    rows, index, vectors = load_teacher(args, device)
    print("teacher", len(rows), "rows", tuple(vectors.shape), flush=True)
    if args.out.name == "none":
        return
    basis = turn(vectors, SIZE - 4)
    targets = torch.cat([part.float() @ basis for part in vectors.split(200_000)]).half()
    kinds = torch.tensor(list(KINDS.values()), dtype=torch.float32, device=device)
    kept, rows = rows[:2000], rows[2000:]
    model = new_model(args.tokenizer, args.layers, args.intermediate).to(device)
    warm_start(model, rows, args.teacher, basis, device)
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)

    distil = Distil(model, targets, kinds)
    sets = distil_sets(rows, index, rng)
    losses: dict[str, nn.Module] = dict.fromkeys(sets, MatryoshkaLoss(model, distil, DIMS))
    table = pq.read_table(args.corpus / "pairs.parquet").to_pydict()
    pairs = list(zip(*(table[c] for c in ("task", "query", "positive", "negative")), strict=True))
    rng.shuffle(pairs)
    pairs = pairs[: args.limit or None]
    kept_pairs, pairs = pairs[:6000], pairs[6000:]
    if args.contrast:
        contrast = Weighted(
            MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=25.0), DIMS),
            args.contrast,
        )
        for name, dataset in contrast_sets(pairs, rng).items():
            sets[name], losses[name] = dataset, contrast
    for name in sets:
        print(name, len(sets[name]), flush=True)
    print(f"ready after {time.monotonic() - BEGIN:.0f} s", flush=True)
    log = fit(model, sets, losses, args)
    names = list(KINDS)
    labels = [index[t or s] * len(names) + names.index(DOCUMENT_KINDS[k]) for s, t, k in kept]
    save(model, args.out)
    model.to(torch.float32).eval()
    final = held_out(model, [s for s, _, _ in kept], labels, distil) | ranking(model, kept_pairs)
    shape = {
        "arguments": {
            k: str(v)
            for k, v in vars(args).items()
            if k not in {"corpus", "teacher", "tokenizer", "out", "cache", "spare"}
        }
    }
    (args.out / "training.json").write_text(
        json.dumps(shape | {"log": log, "kept_back": final}) + "\n"
    )
    print(json.dumps(final, indent=1), flush=True)


def spare_copy(model: SentenceTransformer, out: Path, folder: Path) -> None:
    """Write the checkpoint as it is now into the folder's model.tar, and go on as before."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    save(model, out)
    model.to(torch.float32)
    model.load_state_dict(state)
    model.tokenizer.padding_side = "right"
    part = folder / "model.part"
    with tarfile.open(part, "w") as tar:
        tar.add(out, "out", filter=lambda info: None if "/run" in info.name else info)
    part.rename(folder / "model.tar")


class Schedule(TrainerCallback):
    """Warm-up and cosine over the steps, or over so many minutes and then the end."""

    def __init__(self, peak: float, minutes: float, spare: Callable[[], None]) -> None:
        self.peak, self.seconds, self.start = peak, 60 * minutes, 0.0
        self.spare, self.marks = spare, [0.4, 0.6, 0.75, 0.85, 0.93]

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock; what the preparation took is gone."""
        self.start = time.monotonic()
        self.seconds -= (self.start - BEGIN) * (self.seconds > 0)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Set the learning rate of the step to come."""
        done = (
            (time.monotonic() - self.start) / self.seconds
            if self.seconds
            else state.global_step / state.max_steps
        )
        rate = min(done / 0.03, 0.5 + 0.5 * math.cos(math.pi * min(1.0, (done - 0.03) / 0.97)))
        for group in optimizer.param_groups:
            group["lr"] = self.peak * max(rate, 1e-3)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Give up at once when the gradients are no numbers."""
        if not math.isfinite(float((logs or {}).get("grad_norm", 0.0))):
            raise FloatingPointError(
                f"gradient norm {logs['grad_norm']} at step {state.global_step}"
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Compare the clock."""
        if not self.seconds:
            return
        done = (time.monotonic() - self.start) / self.seconds
        if self.marks and done > self.marks[0]:
            self.marks.pop(0)
            self.spare()
        if done > 1:
            control.should_training_stop = True


def fit(
    model: SentenceTransformer,
    sets: dict[str, Dataset],
    losses: dict[str, nn.Module],
    args: argparse.Namespace,
) -> list[dict]:
    """Run sentence-transformers' trainer over all sets, each batch from one of them."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(args.out / "run"),
        num_train_epochs=args.epochs,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available(),
        dataloader_num_workers=args.workers,
        dataloader_drop_last=True,
        dataloader_persistent_workers=args.workers > 0,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        disable_tqdm=True,
    )
    # Padding on the left leaves positions that attend to nothing, a suspect for the not-a-number
    # gradients that bf16 training on a GPU gave; under a causal mask the right has none.
    model.tokenizer.padding_side = "right"
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=sets,
        loss=losses,
        callbacks=[
            Schedule(
                args.lr,
                args.minutes,
                lambda: spare_copy(model, args.out, args.spare) if args.spare else None,
            )
        ],
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
