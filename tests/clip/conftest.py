"""The small models of the training tests, and the encoder of the embedding tests."""

from tests.embedding.conftest import bert  # noqa: F401
from tests.training.conftest import resnet, vit  # noqa: F401
