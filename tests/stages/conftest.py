"""The small model of the training tests."""

from tests.training.conftest import vit  # noqa: F401
