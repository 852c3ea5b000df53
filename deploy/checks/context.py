"""The build context: which files of the source tree a ``.dockerignore`` lets through."""

import fnmatch
import os
import shutil
from pathlib import Path


class BuildContext:
    """Files under a root that its ``.dockerignore`` does not exclude; the last pattern that matches decides.

    Args:
        root: of the source tree.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
        self._patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    def includes(self, path: str) -> bool:
        """Whether a file, named relative to the root, goes to the builder."""
        included = True
        for pattern in self._patterns:
            negated = pattern.startswith("!")
            if _matches(path, pattern.removeprefix("!")):
                included = negated
        return included

    def files(self, prefix: str = "") -> list[str]:
        """Every file that goes to the builder, relative to the root, below a folder or the file itself."""
        start = self.root / prefix
        if start.is_file():
            return [prefix] if self.includes(prefix) else []
        found = []
        for folder, folders, names in os.walk(start):
            folders[:] = sorted(name for name in folders if not name.startswith(".git"))
            relative = Path(folder).relative_to(self.root)
            found += [path for name in sorted(names) if self.includes(path := str(relative / name))]
        return found

    def copy_to(self, folder: Path) -> None:
        """Copy the files, so that a build leaves nothing in the source tree."""
        for name in self.files():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.root / name, folder / name)


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern names the file or a folder that it is in; ``**/`` stands for any folders, or none."""
    parts = path.split("/")
    prefixes = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
    return any(
        prefix.count("/") == pattern.count("/") and fnmatch.fnmatchcase(prefix, pattern)
        for prefix in prefixes
    )
