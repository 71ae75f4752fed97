"""Settings beside weights: JSON that others wrote, read as what may be anything."""

import json
import math
from pathlib import Path

FRACTIONS = {"norm_eps", "rms_norm_eps", "rope_theta", "ffn_dim_multiplier"}


def read(path: Path) -> dict:
    """A JSON object. Raises ValueError, with what was there instead."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return parse(text)
    except ValueError:
        raise ValueError(f"{path} is no JSON object; it begins {text[:40]!r}") from None


def parse(text: str | bytes) -> dict:
    """A JSON object. Raises ValueError for whatever else the text is."""
    try:
        content = json.loads(text)
    except RecursionError:
        content = None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def check_numbers(settings: dict, names: set[str], where: Path) -> None:
    """Raises ValueError if one of `names` has a value that no model can have there."""
    for name in sorted(names & settings.keys()):
        value = settings[name]
        if value is None or (name, value) == ("vocab_size", -1):  # which Meta's own files say
            continue
        kind = "number" if name in FRACTIONS else "whole number"
        is_one = not isinstance(value, bool) and isinstance(
            value, int | float if name in FRACTIONS else int
        )
        if not is_one or not 0 < value < math.inf:
            raise ValueError(f"{where}: {name} is {value!r}, which is no {kind} above 0")
