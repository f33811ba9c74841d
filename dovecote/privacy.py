"""Encryption of fields: the keys, and what they encrypt and decrypt.

Nothing here logs, and no error repeats a text or a key. `cryptography` comes with the extra `dovecote[privacy]` and is
imported when needed.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from dovecote.errors import DovecoteError, InvalidValue, MissingPackage

if TYPE_CHECKING:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
# What AES-GCM is specified for. Random nonces are safe for about 2**32 texts a key; rotate long before.
_NONCE_BYTES = 12
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")


class CannotDecrypt(DovecoteError):
    """An encrypted text was changed, belongs elsewhere, or its key is missing. Restore the key."""


@dataclass(frozen=True)
class Keyring:
    """The secrets of an application, 32 bytes each.

    hash_key         keys the hashes by which values such as phone numbers are found; it cannot be rotated without
                     asking for the values again
    encryption_keys  by id; `current` encrypts, the others only decrypt
    code_key         one-time codes are derived from it; rotating it invalidates the codes that are still open

    Errors: InvalidValue naming the key that is wrong, never showing it.
    """

    hash_key: bytes = field(repr=False)
    encryption_keys: Mapping[str, bytes] = field(repr=False)
    current: str
    code_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_length("hash_key", self.hash_key)
        _check_length("code_key", self.code_key)
        for key_id, key in self.encryption_keys.items():
            if not _KEY_ID.fullmatch(key_id):
                raise InvalidValue("encryption_keys: a key id is 1 to 32 letters, digits, - or _")
            _check_length(f"encryption_keys: key {key_id}", key)
        if self.current not in self.encryption_keys:
            raise InvalidValue("encryption_keys: the current key is not among them")
        object.__setattr__(self, "encryption_keys", MappingProxyType(dict(self.encryption_keys)))

    @classmethod
    def parse(cls, *, hash_key: str, encryption_keys: str, code_key: str) -> "Keyring":
        """Read keys as settings hold them: base64, and `id:base64,id:base64` with the current one first.

        Errors: InvalidValue naming the field, never showing the value.
        """
        by_id: dict[str, bytes] = {}
        for pair in encryption_keys.split(","):
            key_id, colon, encoded = pair.strip().partition(":")
            if not colon:
                raise InvalidValue("encryption_keys must be id:base64 pairs, separated by commas")
            if key_id in by_id:
                raise InvalidValue("encryption_keys: an id is given twice")
            by_id[key_id] = _decoded("encryption_keys", encoded)
        return cls(
            hash_key=_decoded("hash_key", hash_key),
            encryption_keys=by_id,
            current=next(iter(by_id)),
            code_key=_decoded("code_key", code_key),
        )

    def encrypt(self, text: str, context: str) -> str:
        """Return `<key id>:<base64 of nonce and ciphertext>`, which decrypts only with the same context.

        The context says where the text belongs, such as the id of its row: a text that is copied into another row does
        not decrypt there.
        """
        AESGCM, _ = _cryptography()  # noqa: N806 - a class
        nonce = os.urandom(_NONCE_BYTES)
        ciphertext = AESGCM(self.encryption_keys[self.current]).encrypt(nonce, text.encode(), context.encode())
        return f"{self.current}:{base64.b64encode(nonce + ciphertext).decode()}"

    def decrypt(self, encrypted: str, context: str) -> str:
        """Return what `encrypt` was given.

        Errors: CannotDecrypt for an unknown key id, another context, or a text that was changed.
        """
        AESGCM, InvalidTag = _cryptography()  # noqa: N806 - these are classes
        key_id, _, encoded = encrypted.partition(":")
        if key_id not in self.encryption_keys:
            # The id is shown only if it is one: a text that was never encrypted must not end up in a log.
            named = f"key {key_id!r}" if encoded and _KEY_ID.fullmatch(key_id) else "no key"
            raise CannotDecrypt(
                f"the encrypted text names {named}; encryption_keys holds {', '.join(self.encryption_keys)}"
            )
        try:
            whole = base64.b64decode(encoded, validate=True)
            nonce, ciphertext = whole[:_NONCE_BYTES], whole[_NONCE_BYTES:]
            return AESGCM(self.encryption_keys[key_id]).decrypt(nonce, ciphertext, context.encode()).decode()
        except (InvalidTag, ValueError):
            raise CannotDecrypt(
                f"the encrypted text names key {key_id!r} but cannot be decrypted with it: it was changed, belongs to "
                "another context, or the id now stands for another key"
            ) from None


def _check_length(name: str, key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise InvalidValue(f"{name} must be {KEY_BYTES} bytes, got {len(key)}")


def _decoded(name: str, encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidValue(f"{name} must be {KEY_BYTES} bytes in base64; this is not base64") from None


def _cryptography() -> "tuple[type[AESGCM], type[InvalidTag]]":
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise MissingPackage(
            "encryption of fields needs the package cryptography: pip install 'dovecote[privacy]'"
        ) from error
    return AESGCM, InvalidTag
