"""Word counts: the same as scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from mode.embedding.words import Vocabulary


@settings(max_examples=60)
@given(st.lists(st.text("abCDé ü19_-.,'\t", max_size=30), min_size=1, max_size=12))
def test_counts_equal_scikit_learns(captions):
    vocabulary = Vocabulary.learn(captions, captions_at_least=1)
    theirs = CountVectorizer(stop_words="english")
    try:
        expected = theirs.fit_transform(captions).toarray()
    except ValueError:  # it refuses an empty vocabulary
        assert vocabulary.words == []
        assert vocabulary.count(captions).shape == (len(captions), 0)
        return
    assert vocabulary.words == theirs.get_feature_names_out().tolist()
    assert np.array_equal(vocabulary.count(captions).toarray(), expected)


def test_words_by_hand():
    captions = ["The DOG, the dog & a cat.", "dog-house", "x of the", ""]
    assert Vocabulary.learn(captions, captions_at_least=1).words == ["cat", "dog", "house"]
    assert Vocabulary.learn(captions).words == ["dog"]
    assert Vocabulary.learn(captions, captions_at_least=9).words == ["cat", "dog", "house"]
    assert Vocabulary.learn(captions, most=1, captions_at_least=1).words == ["dog"]
    counts = Vocabulary(["dog", "unseen", "cat"]).count(captions).toarray()
    assert counts.tolist() == [[2, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("captions", [[], [""], ["!!!", " "]])
def test_nothing_to_learn(captions):
    vocabulary = Vocabulary.learn(captions)
    assert len(vocabulary) == 0
    assert vocabulary.count(captions).shape == (len(captions), 0)
