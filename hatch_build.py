"""README.md for a package index, which has neither our pictures nor our other pages."""

import pathlib
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class IndexReadme(MetadataHookInterface):
    """The hook that pyproject.toml configures."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README without what would be a broken link there."""
        text = (pathlib.Path(self.root) / "README.md").read_text(encoding="utf-8")
        for rule in self.config["substitutions"]:
            text = re.sub(rule["pattern"], rule["replacement"], text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
