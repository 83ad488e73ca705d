"""What of a configuration is nobody else's business: passwords and tokens of access."""

import re
from collections.abc import Mapping
from typing import Any

_NAMES = re.compile(
    r"(?i)(^|[^a-z0-9])(pass(word|wd|phrase)?|secret|credentials?|authorization|bearer"
    r"|token|(api|access|private|secret)[_-]?key|apikey)($|[^a-z0-9])"
)
"""`stop_token_ids` has such a word in it too: only what is text can be a secret."""


def without_secrets(values: Any) -> Any:
    """Nested settings without those whose name says that they are secret."""
    if isinstance(values, Mapping):
        return {
            name: without_secrets(value)
            for name, value in values.items()
            if not (isinstance(value, str) and _NAMES.search(str(name)))
        }
    return values
