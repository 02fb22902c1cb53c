"""Text to token ids and back, by the tokenizer.json of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from mnemosyne.files import is_there, printable, read_bytes, shown
from mnemosyne.serve.chat import ChatTemplate, Message, special_tokens
from mnemosyne.serve.long_text import PIECE, encode_by_pieces

REPLACEMENT = "\ufffd"  # shown by decoding for half a character
SPACE = "\u2581"  # how vocabularies of SentencePiece write it
MAX_AT_ONCE = 4 * PIECE  # characters; longer texts are encoded by pieces
NUM_SAMPLED = 256  # characters that reveal the tokens put around a text
MAX_BYTES = 128 << 20  # of tokenizer.json; the largest published ones hold 35 MB


def _bytes_by_character() -> dict[str, int]:
    """The alphabet of byte-level vocabularies, in which every byte is a letter that can be seen.

    Source: Radford et al. 2019 (GPT-2).
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    spelt = {chr(byte): byte for byte in seen}
    return spelt | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _bytes_by_character()


class Tokenizer:
    """The tokenizer of a checkpoint and its chat templates.

    Args:
        backend: the tokenizer proper; its truncation and padding are turned off.
        chat: None if the checkpoint has no chat template.
    """

    def __init__(self, backend: tokenizers.Tokenizer, chat: ChatTemplate | None = None) -> None:
        # Many files carry a truncation left over from training; prompts must stay whole.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat = chat
        self.folder: Path | None = None  # it was read from
        self.end_id: int | None = None  # of the token that ends a text, where a file names it
        self.special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )

    @classmethod
    def from_dir(cls, path: Path | str) -> Tokenizer | None:
        """Read tokenizer.json and the chat template of a Hugging Face directory.

        Returns:
            None if there is no tokenizer.json; the model then takes token ids only.

        Raises:
            ValueError: if a file is there but cannot be read.
        """
        file = Path(path) / "tokenizer.json"
        if not is_there(file):
            return None
        data = read_bytes(file, MAX_BYTES)
        rule = f"{printable(file)} must be a tokenizer of the tokenizers library"
        with _foreign(rule, "download it again or upgrade the library"):
            made = cls(tokenizers.Tokenizer.from_buffer(data))
        made._chat = ChatTemplate.from_dir(path)
        made.folder = Path(path)
        end = special_tokens(path).get("eos_token")
        made.end_id = None if end is None else made._backend.token_to_id(end)
        return made

    def save(self, folder: Path) -> None:
        """Write the files that ``from_dir`` reads, for another process."""
        (folder / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")
        if self._chat is not None:
            self._chat.save(folder)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        """Text to token ids.

        Args:
            text: valid Unicode.
            add_special_tokens: put the tokens around it that the model expects, such as a begin
                token. What a text begins with already, as chat templates write it, is not put
                before it once more.

        Returns:
            int64 ids.

        Raises:
            ValueError: if the text holds half a surrogate pair, or what this tokenizer has no
                token for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt must be valid Unicode, got {error}; replace lone surrogates"
            ) from error
        rule = f"prompt must be text that the model's tokenizer can encode, not {shown(text)}"
        with _foreign(rule, "change the text or send token ids"):
            body = encode_by_pieces(self._backend, text) if len(text) > MAX_AT_ONCE else None
            # a batch of one: unlike `encode`, it lets other threads run
            (encoded,) = self._backend.encode_batch_fast(
                [text if body is None else text[:NUM_SAMPLED]],
                add_special_tokens=add_special_tokens,
            )
        ids = np.array(encoded.ids, dtype=np.int64)
        is_added = encoded.special_tokens_mask
        if body is not None:  # tokens put around a part of it are put around all of it
            inner = np.flatnonzero(np.array(is_added) == 0)
            ids = np.concatenate([ids[: inner[0]], body, ids[inner[-1] + 1 :]])
        return ids[_num_doubled(ids, is_added) :]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """Token ids to text; ids that are no tokens (padding of the vocabulary) give none.

        Text is not cleaned up afterwards: a space before a full stop stays.
        """
        listed = ids.tolist() if isinstance(ids, np.ndarray) else ids
        with _foreign("token ids must be such that the tokenizer decodes", "replace its file"):
            return self._backend.decode(listed, skip_special_tokens=skip_special_tokens)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token alone stands for, half a character perhaps; b"" if it is none."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        text = self._backend.decode([token_id], skip_special_tokens=False)
        if REPLACEMENT not in text:
            # a decoder takes the space of the first word away
            return (" " + text if token.startswith(SPACE) and text[:1] != " " else text).encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        is_spelt = all(character in BYTE_OF for character in token)
        return bytes(BYTE_OF[c] for c in token) if is_spelt else text.encode()

    def is_text(self, token_id: int, *, skip_special_tokens: bool = True) -> bool:
        """Return whether a token has any part in the decoded text."""
        if skip_special_tokens and token_id in self.special_ids:
            return False
        return self._backend.id_to_token(token_id) is not None

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages to prompt text; see ``ChatTemplate.render``.

        Raises:
            ValueError: if the checkpoint has no chat template, or it refuses the messages.
        """
        if self._chat is None:
            raise ValueError(
                "chat_template must be in tokenizer_config.json or chat_template.jinja, got "
                "neither; send a plain prompt or add the file"
            )
        return self._chat.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )


@contextmanager
def _foreign(rule: str, remedy: str) -> Iterator[None]:
    """Make a ValueError of any error of the library: any Exception, and panics, which are none."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{rule}, got an error: {printable(error)}; {remedy}") from error


def _num_doubled(ids: np.ndarray, is_added: Sequence[int]) -> int:
    """The number of tokens put before a text that begins with just these.

    Args:
        ids: of all tokens.
        is_added: of each, 1 if it was put there, 0 if it stands in the text.
    """
    num_added = is_added.index(0) if 0 in is_added else 0
    return num_added if np.array_equal(ids[:num_added], ids[num_added : 2 * num_added]) else 0
