"""Griffe extension: read the docstring section `Example:` as `Examples:`, the name Griffe knows."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSection(griffe.Extension):
    """Rename the section in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in the docstring of one object."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
