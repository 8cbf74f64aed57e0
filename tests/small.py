"""A model that is built in moments, untrained."""

from __future__ import annotations

from mode.params import ModelParams

#: A ViT of one layer for images of 16 pixels; its words are learnt from the captions that it is built with.
VIT = ModelParams(
    config={
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    },
    tokenizer="words",
)
