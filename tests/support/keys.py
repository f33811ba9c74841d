"""Keys of tests: the same in each run, and as random as real ones, or settings would refuse them."""

import base64
import hashlib


def a_key(name: str) -> str:
    """Return 32 bytes in base64, others for each name."""
    return base64.b64encode(hashlib.sha256(name.encode()).digest()).decode()


#: What a process needs that has a route with `needs_keys`.
KEYS = {
    "DOVECOTE_PRIVACY__HASH_KEY": a_key("hash"),
    "DOVECOTE_PRIVACY__ENCRYPTION_KEYS": f"k1:{a_key('encryption')}",
    "DOVECOTE_PRIVACY__CODE_KEY": a_key("code"),
}
