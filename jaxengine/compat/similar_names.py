"""What somebody may have meant who has misspelt a name. Standard library only."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?", or nothing if no known name is similar."""
    similar = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {similar[0]!r}?" if similar else ""
