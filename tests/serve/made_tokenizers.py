"""Small tokenizers of the kinds that real checkpoints have, made in memory."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer

TEXTS = [
    "the cat sat on the mat",
    "naïve café, €5 or 10 €",
    "日本語のテキスト",
    "👩‍👩‍👧 and 👍🏽 🎉🎉",
]
BEGIN, END = "<s>", "</s>"


def byte_level_bpe(texts: list[str] | None = None, vocab_size: int = 340) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: every byte a token, merges across characters."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def byte_fallback_bpe() -> Tokenizer:
    """As Llama 2 and Mistral have it: a mark for spaces, bytes for what has no token."""
    pieces = ["▁", "a", "b", "c", "▁a", "▁b", "ab", "é"]
    vocab = {"<unk>": 0, BEGIN: 1, END: 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: 259 + index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", BEGIN, END)])
    return tokenizer


def words() -> Tokenizer:
    """Word-level, no decoder: words are joined by spaces."""
    vocab = {word: token_id for token_id, word in enumerate(["<unk>", "one", "two", "three"])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def metaspace_bpe() -> Tokenizer:
    """As newer files of SentencePiece models have it: a mark for spaces, none at a text's start."""
    tokenizer = byte_fallback_bpe()
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    return tokenizer
