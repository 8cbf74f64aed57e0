"""Images and texts to unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from mode.clip.model import Clip
from mode.errors import ModeError


def encode_texts(
    clip: Clip, texts: Sequence[str], *, batch_size: int, device: torch.device | str, name: str = "model"
) -> Tensor:
    """Texts to unit vectors, float32 [texts, d] on `device`.

    Args:
        clip: in evaluation mode, on `device`.
        texts: any number of them.
        batch_size: texts in one forward pass.
        device: of the model.
        name: of the model, in messages.
    """
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    vectors = [unit_vectors(clip.model.encode_text, clip.tokenizer(list(batch)).to(device), name) for batch in batches]
    return torch.cat(vectors) if vectors else torch.empty(0, clip.dimensions, device=device)


def encode_prompts(
    clip: Clip, prompts: Sequence[Sequence[str]], *, batch_size: int, device: torch.device | str, name: str = "model"
) -> Tensor:
    """One unit vector per class: the mean of the unit vectors of its prompts, normalised again (as open_clip does it).

    Args:
        clip, batch_size, device, name: as of `encode_texts`.
        prompts: those of each of L classes, at least one each; they are encoded in batches across classes.

    Returns:
        float32 [L, d] on `device`.
    """
    sums = torch.zeros(len(prompts), clip.dimensions, device=device)
    texts = ((number, text) for number, group in enumerate(prompts) for text in group)
    while batch := list(islice(texts, batch_size)):
        vectors = encode_texts(clip, [text for _, text in batch], batch_size=batch_size, device=device, name=name)
        sums.index_add_(0, torch.tensor([number for number, _ in batch], device=device), vectors)
    return F.normalize(sums, dim=-1)


def unit_vectors(encode: Callable[[Tensor], Any], batch: Tensor, name: str) -> Tensor:
    """What a tower makes of a batch, scaled to length 1: float32 [batch, d].

    Raises:
        ModeError: a vector of the model called `name` is NaN or infinite.
    """
    with torch.inference_mode():
        vectors = F.normalize(encode(batch).float(), dim=-1)
    if not bool(torch.isfinite(vectors).all()):
        raise ModeError(f"model '{name}' gives NaN or infinite vectors", "its training failed: train it again")
    return vectors


def takes_short_texts(model: open_clip.CLIP) -> bool:
    """Whether `encode_text` gives the same features without the padding after a text's last token.

    So it is in open_clip's standard text tower: a token sees only those before it, and the features are taken at the
    last one, so that what follows costs time and changes nothing.
    """
    return type(model) is open_clip.CLIP and model.attn_mask is not None and model.text_pool_type in ("argmax", "eos")


def without_padding(tokens: Tensor) -> Tensor:
    """Cut token ids [b, context] after the last `<eos>`, which has the highest id of each text."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1] if len(tokens) else tokens


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Features [b, d], not normalised, of texts as they are or cut by `without_padding`.

    open_clip's `encode_text` takes texts of full length only; for those the two are equal.
    """
    if not takes_short_texts(model):
        features: Tensor = model.encode_text(tokens)
        return features
    length, dtype = tokens.shape[1], model.transformer.get_cast_dtype()
    hidden = model.token_embedding(tokens).to(dtype) + model.positional_embedding[:length].to(dtype)
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    features = text_global_pool(model.ln_final(hidden), tokens, model.text_pool_type, model.text_eos_id)
    if isinstance(model.text_projection, nn.Linear):
        features = model.text_projection(features)
    elif model.text_projection is not None:
        features = features @ model.text_projection
    return features
