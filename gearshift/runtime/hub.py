"""Whether the Hugging Face hub can be reached. Its library asks a hub that cannot be reached again
and again, which takes minutes.
"""

from __future__ import annotations

import time
from functools import lru_cache

from huggingface_hub import constants, get_session

_PATIENCE = 5.0
"""Seconds that the hub has to answer."""
_KNOWN = 60.0
"""Seconds for which an answer counts."""


def hub_is_reachable() -> bool:
    """Whether the hub answers; False where HF_HUB_OFFLINE forbids to ask it."""
    return not constants.HF_HUB_OFFLINE and _asked(constants.ENDPOINT, time.monotonic() // _KNOWN)


@lru_cache(1)
def _asked(endpoint: str, period: float) -> bool:
    try:
        get_session().head(endpoint, timeout=_PATIENCE)
    except Exception:  # the library's HTTP client has its own errors
        return False
    return True
