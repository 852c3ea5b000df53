"""Suggestions for names that nobody knows: most likely typing errors."""

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """End of an error's sentence: ``; did you mean 'x'?``, or nothing where no known name is near.

    Args:
        name: as it was written. Of a dotted name the last part decides, wherever it stands: a field in the
            wrong section is found in the right one.
        known: names, dotted where ``name`` may be.
    """
    names = sorted(known)
    leaf = name.rpartition(".")[2]
    moved = [other for other in names if other.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(name, moved or names, n=1, cutoff=0.0 if moved else 0.6)
    if not near:  # a long section must not hide that the field is misspelt
        leaves = {other.rpartition(".")[2]: other for other in reversed(names)}
        near = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]
    return f"; did you mean {near[0]!r}?" if near else ""
