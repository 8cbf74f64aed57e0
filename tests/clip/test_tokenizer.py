from __future__ import annotations

from mode.clip.tokenizer import fit_words


def test_word_ids_by_hand() -> None:
    words = fit_words(["a red dog", "a blue dog"], vocabulary=100)
    assert words("A DOG!").input_ids == [2, 3, 4, 1, 7]
    assert words("").input_ids == [2, 7]


def test_rare_words_are_dropped_first() -> None:
    words = fit_words(["a a a b b c"], vocabulary=2)
    assert words("a b c").input_ids == [2, 3, 4, 1, 5]
