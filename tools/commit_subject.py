"""Check the subject of a commit, as the hook does: ``area: imperative``, at most 72 characters.

python tools/commit_subject.py .git/COMMIT_EDITMSG
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MAX_CHARACTERS = 72
SUBJECT = re.compile(r"[\w./-]+(?:,? [\w./-]+)*: (?P<first>[\w'-]+)")
MADE_BY_GIT = ("Merge ", "Revert ", "fixup! ", "squash! ", "amend! ")
# Words that end like a participle or a third person and are imperatives all the same.
IMPERATIVES = frozenset(
    """access address bring discuss embed exceed express feed focus guess need pass press process
    proceed reuse seed speed spring string succeed suppress""".split()  # noqa: SIM905
)
NO_VERBS = frozenset(
    """a all an and any are as at both by each every for from if in is it its less more most new no
    not of on one or some than that the their there this three to two was what when where whether
    which who whose with""".split()  # noqa: SIM905
)


def main() -> int:
    """Check the file that Git names; 1 if its subject breaks a rule."""
    message = Path(sys.argv[1]).read_text(encoding="utf-8")
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    why_not = why_refused(lines[0] if lines else "")
    if why_not is not None:
        print(f"the subject {why_not}", file=sys.stderr)
    return 0 if why_not is None else 1


def why_refused(subject: str) -> str | None:
    """Return the rule that a subject breaks, None if it breaks none.

    Only what is plain to see is refused: a first word that is no verb, or one in another form.
    """
    if subject.startswith(MADE_BY_GIT):
        return None
    if len(subject) > MAX_CHARACTERS:
        return f"must have at most {MAX_CHARACTERS} characters, got {len(subject)}; say why below"
    found = SUBJECT.match(subject)
    if found is None:
        return f"must read 'area: imperative', got {subject!r}; begin with the room it is about"
    if subject.endswith("."):
        return "must end without a full stop, got one; leave it out"
    first = found["first"].lower()
    is_other_form = re.search(r"(?:[^s]s|ed|ing)$", first) is not None
    if first in NO_VERBS or (is_other_form and first not in IMPERATIVES):
        return (
            f"must begin with an imperative after the area, got {first!r}; write 'add', not 'adds'"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
