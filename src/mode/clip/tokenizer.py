"""A vocabulary of whole words learnt from the captions, for small models that need no 49,408-piece BPE."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<bos>", "<eos>"


def fit_words(captions: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Learn a word-level tokenizer: lower case, split at white space and punctuation.

    Ids are `<pad>` 0, `<unk>` 1, `<bos>` 2, then the words, most frequent first (ties in the order of the alphabet),
    and `<eos>` last: open_clip's text tower takes the features at the highest id of a text (`text_global_pool`,
    "argmax"), so `<eos>` must be above every word.

    Args:
        captions: texts, read once.
        vocabulary: words kept, at most, besides the four special tokens.

    Returns:
        A tokenizer whose `save_pretrained(folder)` writes the files that `open_clip.get_tokenizer("local-dir:...")`
        reads.

    Example:
        >>> words = fit_words(["a red dog", "a blue dog"], vocabulary=100)
        >>> words("A DOG!").input_ids  # <bos> a dog <unk> <eos>
        [2, 3, 4, 1, 7]
    """
    special = [PAD, UNKNOWN, BEGIN]
    words = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary + 3, special_tokens=special, show_progress=False)
    words.train_from_iterator(captions, trainer)
    ids = words.get_vocab()
    ids[END] = len(ids)
    words.model = models.WordLevel(ids, unk_token=UNKNOWN)
    words.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, ids[BEGIN]), (END, ids[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END
    )
