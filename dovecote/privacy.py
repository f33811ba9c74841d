"""Phone numbers: read them, hash them, seal them, show four digits of them.

A number in the clear lives in memory only. What is stored is a keyed hash (to find it again) and a
sealed text (to send to it); nothing here logs, and no error repeats a number or a key.
`cryptography` and `phonenumbers` come with the extra `dovecote[privacy]` and are imported when needed.
"""

import base64
import binascii
import hashlib
import hmac
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


class CannotOpen(DovecoteError):
    """A sealed text was changed, belongs elsewhere, or its key is not at hand. A restored key opens it."""


@dataclass(frozen=True)
class Keyring:
    """The secrets of this domain, 32 bytes each.

    hash_key         keys the hash of phone numbers; it cannot be rotated without asking for them again
    encryption_keys  by id; `current` seals, the others only open what they once sealed
    code_key         codes are derived from it; rotating it voids the codes of the last five minutes

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

    def phone_hash(self, e164: str) -> str:
        """Return the keyed hash of a number as 64 hex digits.

        Keyed because there are few enough phone numbers to try them all against a plain hash.
        """
        return hmac.new(self.hash_key, e164.encode(), hashlib.sha256).hexdigest()

    def seal(self, text: str, context: str) -> str:
        """Return `<key id>:<base64 of nonce and ciphertext>`, which opens only with the same context.

        The context says where the text belongs, such as the id of its row, so that a sealed text
        copied into another row does not open there.
        """
        AESGCM, _ = _cryptography()  # noqa: N806 - a class
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(self.encryption_keys[self.current]).encrypt(nonce, text.encode(), context.encode())
        return f"{self.current}:{base64.b64encode(nonce + sealed).decode()}"

    def open(self, sealed: str, context: str) -> str:
        """Return what `seal` was given.

        Errors: CannotOpen for an unknown key id, another context, or a text that was changed.
        """
        AESGCM, InvalidTag = _cryptography()  # noqa: N806 - these are classes
        key_id, _, encoded = sealed.partition(":")
        if key_id not in self.encryption_keys:
            # The id is shown only if it is one: a text that was never sealed must not end up in a log.
            named = f"key {key_id!r}" if encoded and _KEY_ID.fullmatch(key_id) else "no key"
            raise CannotOpen(f"the sealed text names {named}; encryption_keys holds {', '.join(self.encryption_keys)}")
        try:
            whole = base64.b64decode(encoded, validate=True)
            nonce, ciphertext = whole[:_NONCE_BYTES], whole[_NONCE_BYTES:]
            return AESGCM(self.encryption_keys[key_id]).decrypt(nonce, ciphertext, context.encode()).decode()
        except (InvalidTag, ValueError):
            raise CannotOpen(
                f"the sealed text names key {key_id!r} but does not open with it: it was changed, belongs "
                "to another context, or the id now stands for another key"
            ) from None


def parse_phone(text: str) -> str:
    """Return a phone number as E.164: `+49 30 901820` becomes `+4930901820`.

    The number must exist by the numbering plans that `phonenumbers` ships: a mistyped one is refused
    before a message is paid for.
    Errors: InvalidValue, without the number, for anything but a valid number that starts with +.
    """
    try:
        import phonenumbers
    except ImportError as error:
        raise _missing("reading phone numbers", "phonenumbers") from error
    if not text.strip().startswith("+"):
        raise InvalidValue("a phone number must be in international format: + and the country code first")
    try:
        number = phonenumbers.parse(text.strip(), None)
    except phonenumbers.NumberParseException:
        raise InvalidValue("this is not a phone number: + and the country code first, then digits") from None
    if number.extension or not phonenumbers.is_valid_number(number):
        raise InvalidValue("this phone number is not in use in the country its code names")
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)


def masked(e164: str) -> str:
    """Return what people may see of a number: its last four digits."""
    return "••••" + e164[-4:]


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
        raise _missing("sealing and opening phone numbers", "cryptography") from error
    return AESGCM, InvalidTag


def _missing(what: str, package: str) -> MissingPackage:
    return MissingPackage(f"{what} needs the package {package}: pip install 'dovecote[privacy]'")
