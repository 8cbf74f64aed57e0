"""The small models of the training tests."""

from tests.training.conftest import resnet, vit  # noqa: F401
