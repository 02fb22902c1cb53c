"""Names of single tokens in answers with log-probabilities."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

from mnemosyne.request import Logprobs


class TokenNames:
    """Bytes of tokens, asked for once each.

    Args:
        ask: gives the bytes of some ids, from a process that has the tokenizer.
    """

    def __init__(self, ask: Callable[[list[int]], Awaitable[list[bytes]]]) -> None:
        self._ask = ask
        self._known: dict[int, bytes] = {}

    async def learn(
        self,
        entries: Sequence[Logprobs],
        of_prompt: Sequence[Logprobs | None] | None = None,
        ids: Iterable[int] = (),
    ) -> None:
        """Get to know all tokens of some entries, and some more."""
        present = [entry for entry in (*entries, *(of_prompt or ())) if entry is not None]
        wanted = {*ids, *(entry.token_id for entry in present)}
        wanted.update(token_id for entry in present for token_id, _ in entry.top)
        unknown = sorted(wanted - self._known.keys())
        if unknown:
            self._known.update(zip(unknown, await self._ask(unknown), strict=True))

    def bytes(self, token_id: int) -> bytes:
        return self._known[token_id]

    def text(self, token_id: int) -> str:
        """A name that no other token has, unless the vocabulary holds one twice.

        Half a character is named by its bytes, as in OpenAI's own answers.
        """
        known = self._known[token_id]
        if not known:
            return f"token_id:{token_id}"
        try:
            return known.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)
