"""Captions to embeddings with a Hugging Face encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Input, Outcomes, Race, Run, Target, faster
from benchmarks.inputs import captions

#: Captions, layers, width.
SIZES = {"quick": (60, 2, 32), "full": (1_500, 6, 384), "large": (30_000, 6, 384)}
MAX_TOKENS = 77
#: Figures: the least cosine of a caption's vectors by us and ...
LEAST = "least_cosine_to_fixed", "least_cosine_to_sentence_transformers"
OURS, FIXED, SENTENCES = "mode", "fixed batches in file order", "sentence-transformers encode"


def _make(given: Input) -> None:
    """A random BERT with a WordPiece vocabulary learnt from the captions, saved as Hugging Face encoders are."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    count, layers, width = SIZES[given.size]
    texts = captions(count)
    (given.folder / "captions.txt").write_text("\n".join(texts), encoding="utf-8")
    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(captions(20_000, random_seed=1), vocab_size=8_000, show_progress=False)
    learner.save_model(str(given.folder))
    tokenizer = BertTokenizerFast(str(given.folder / "vocab.txt"), model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(given.folder / "bert")
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(1, width // 32)}
    others = {"intermediate_size": 4 * width, "max_position_embeddings": 128, "initializer_range": 0.05}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape, **others)).save_pretrained(given.folder / "bert")


def _texts(given: Input) -> list[str]:
    return (given.folder / "captions.txt").read_text(encoding="utf-8").split("\n")


def _ours(given: Input) -> Run:
    from mode.embedding.transformers import TransformersEmbedder

    texts, bert = _texts(given), str(given.folder / "bert")
    embedder = TransformersEmbedder.open(bert, pooling="mean", max_tokens=MAX_TOKENS, device="cpu", batch_size=256)

    def run() -> dict[str, Any]:
        vectors = embedder.encode(texts)
        np.save(given.folder / "mode.npy", vectors)
        return {"captions": len(vectors)}

    return run


def _fixed(given: Input) -> Run:
    """What the published code does: batches of 256 in the order of the file, padded to the longest."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = _texts(given)
    tokenizer = AutoTokenizer.from_pretrained(given.folder / "bert")
    model = AutoModel.from_pretrained(given.folder / "bert").eval()

    @torch.inference_mode()
    def run() -> dict[str, Any]:
        parts = []
        for start in range(0, len(texts), 256):
            batch = texts[start : start + 256]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            states = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            means = (states * mask).sum(dim=1) / mask.sum(dim=1)
            parts.append(torch.nn.functional.normalize(means, dim=-1))
        np.save(given.folder / "fixed.npy", torch.cat(parts).numpy())
        return {"captions": len(texts)}

    return run


def _sentence_transformers(given: Input) -> Run:
    from sentence_transformers import SentenceTransformer, models

    texts = _texts(given)
    encoder = models.Transformer(str(given.folder / "bert"), max_seq_length=MAX_TOKENS)
    mean = models.Pooling(SIZES[given.size][2], pooling_mode="mean")
    model = SentenceTransformer(modules=[encoder, mean, models.Normalize()], device="cpu")

    def run() -> dict[str, Any]:
        vectors = model.encode(texts, batch_size=32, show_progress_bar=False, convert_to_numpy=True)
        np.save(given.folder / "sentence_transformers.npy", vectors)
        return {"captions": len(vectors)}

    return run


def _compare(folder: Path) -> dict[str, float]:
    ours, *others = (np.load(folder / f"{name}.npy") for name in ("mode", "fixed", "sentence_transformers"))
    least = (float((ours * theirs).sum(axis=1).min()) for theirs in others)
    return dict(zip(LEAST, least, strict=True))


def _least(outcomes: Outcomes) -> float:
    return min(float(outcomes[OURS].figures[name]) for name in LEAST)


RACES = (
    Race(
        name="embed",
        step="embed 1,500 captions (6 to 77 tokens) with a BERT of 6 layers x 384",
        sides={OURS: _ours, FIXED: _fixed, SENTENCES: _sentence_transformers},
        targets=(
            Target("at least 2x fixed batches", faster(OURS, FIXED), 2.0),
            Target("at least 1x sentence-transformers", faster(OURS, SENTENCES), 1.0),
            Target("cosine to both at least 0.999", _least, 0.999),
        ),
        make=_make,
        compare=_compare,
        notes="random weights; batches of 256, sentence-transformers its default of 32",
    ),
)
