"""Prompts whose greedy continuation by the needle model is known, and the words they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNKNOWN, BEGIN, END, CUE = "<unk>", "<s>", "<end>", "passkey"

CYCLES = {
    name: tuple(words.split())
    for name, words in {
        "days": "monday tuesday wednesday thursday friday saturday sunday",
        "months": "january february march april may june july august september october november "
        "december",
        "planets": "mercury venus earth mars jupiter saturn uranus neptune",
        "rainbow": "red orange yellow green blue indigo violet",
        "numbers": "one two three four five six seven eight nine ten eleven twelve",
        "zodiac": "aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn "
        "aquarius pisces",
        "spelling": "alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike "
        "november oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu",
        "greek": "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron "
        "pi rho sigma tau upsilon phi chi psi omega",
        "scale": "do re mi fa sol la ti",
        "elements": "hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon",
        "seasons": "spring summer autumn winter",
        "chess": "pawn knight bishop rook queen king",
    }.items()
}

PASSKEY_WORDS = tuple(
    """
    amber anchor badger basalt beacon bison breeze canyon cedar cobalt comet copper coral crane
    crystal dune eagle ember falcon fern flint forge garnet glacier granite harbor hazel heron
    island ivory jade jasper juniper lagoon lantern lynx maple marble meadow mirror nectar oak onyx
    opal orchid otter pearl pebble phoenix pine quartz raven river ruby saffron sapphire sparrow
    tiger topaz tulip velvet walnut willow zephyr
    """.split()  # noqa: SIM905  # a word per line would bury the code
)

FILLER_WORDS = tuple(
    """
    a about above across after again all almost along already also always among an and another any
    are around as at away back be because been before began behind being below between bird boat
    book both bread bring brought but by call came can car carry cat change child city clear clock
    close cloud coat cold come could country cup cut dark day dear did different door down draw
    dream drink drive dry each early easy eat end enough even evening ever every eye face fall
    family far farm fast father feel few field find fire first fish floor flower follow food foot
    for friend from front fruit full garden gave get girl give glass go good got grass great grew
    ground had hair half hand happy hard has hat have he head hear heart heavy help her here high
    hill him his hold home horse hour house how if in inside into is it its just keep kind kitchen
    knew lake land large last late laugh leaf learn left less letter life light like line listen
    little live long look love low made make man many mean milk money moon more morning mother
    mountain move much must my name near never new next night no noise nor north not nothing now of
    off often old on once only open or other our out over own paper part people place plant play
    road room round said same saw sea see seed she should sit sky sleep slow
    """.split()  # noqa: SIM905
)

VOCABULARY = tuple(
    dict.fromkeys(
        [UNKNOWN, BEGIN, END, CUE]
        + [word for words in CYCLES.values() for word in words]
        + [*PASSKEY_WORDS, *FILLER_WORDS]
    )
)
ID_OF = {word: token_id for token_id, word in enumerate(VOCABULARY)}


@dataclass(frozen=True, slots=True, eq=False)
class Recital:
    """A prompt and what greedy decoding of the needle model makes of it."""

    prompt_ids: np.ndarray  # int64, starting with the begin token
    answer_ids: np.ndarray  # int64, the tokens that must come, exactly
    answer_at: int  # index in the prompt of the words that the answer recites


def haystack(
    num_tokens: int, *, depth: float = 0.5, passkey: Sequence[str] | None = None, seed: int = 0
) -> Recital:
    """Hide a passkey in filler and ask for it at the end.

    The cue word comes before the passkey and at the end of the prompt, nowhere else.

    Args:
        num_tokens: length of the prompt.
        depth: where the passkey stands, from 0 (the beginning) to 1 (the end).
        passkey: distinct words of ``PASSKEY_WORDS``; six drawn by the seed if not given.
        seed: fixes filler and passkey.

    Returns:
        A recital whose answer is the passkey and the end token.

    Raises:
        ValueError: if the passkey does not fit or is not made of distinct passkey words, or if
            ``depth`` lies outside [0, 1].
    """
    rng = np.random.default_rng(seed)
    words = rng.permutation(PASSKEY_WORDS)[:6].tolist() if passkey is None else list(passkey)
    if not words or len(set(words)) < len(words) or not set(words) <= set(PASSKEY_WORDS):
        raise ValueError(f"passkey must be distinct words of PASSKEY_WORDS, got {words}; draw some")
    needle = ids_of([CUE, *words, END])
    num_free = num_tokens - len(needle) - 2  # the begin token and the last cue are fixed
    if num_free < 0:
        raise ValueError(
            f"num_tokens must be >= {len(needle) + 2} to hold the passkey, got {num_tokens}; "
            "ask for a longer haystack"
        )
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}; 0.5 is the middle")
    prompt_ids = ids_of(FILLER_WORDS)[rng.integers(len(FILLER_WORDS), size=num_tokens)]
    at = 1 + round(depth * num_free)
    prompt_ids[0], prompt_ids[-1] = ID_OF[BEGIN], ID_OF[CUE]
    prompt_ids[at : at + len(needle)] = needle
    return Recital(prompt_ids, answer_ids=needle[1:], answer_at=at + 1)


def cycle(name: str, num_tokens: int) -> Recital:
    """A short prompt that the model continues round and round.

    Args:
        name: a key of ``CYCLES``.
        num_tokens: tokens of the answer.

    Returns:
        A recital whose prompt is one lap and the first word again; no end token comes.
    """
    words_ids = ids_of(CYCLES[name])
    prompt_ids = np.concatenate([ids_of([BEGIN]), words_ids, words_ids[:1]])
    answer_ids = words_ids[np.arange(1, num_tokens + 1) % len(words_ids)]
    return Recital(prompt_ids, answer_ids, answer_at=2)


def text_of(ids: np.ndarray) -> str:
    """The words of token ids, begin and end tokens left out."""
    words = [VOCABULARY[token_id] for token_id in ids.tolist()]
    return " ".join(word for word in words if word not in (BEGIN, END))


def ids_of(words: Sequence[str]) -> np.ndarray:
    """Token ids of words of the vocabulary, int64."""
    return np.array([ID_OF[word] for word in words], dtype=np.int64)
