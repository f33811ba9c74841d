"""Fields are encrypted with a key that is named, for one place, and no key or text is ever shown."""

import base64
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovecote.errors import InvalidValue
from dovecote.privacy import CannotDecrypt, Keyring

TEXT = "+4930901820"
KEY_1, KEY_2, HASH_KEY, CODE_KEY = (bytes([byte]) * 32 for byte in (1, 2, 3, 4))


def a_keyring(**changes: object) -> Keyring:
    known = Keyring(hash_key=HASH_KEY, encryption_keys={"k1": KEY_1}, current="k1", code_key=CODE_KEY)
    return replace(known, **changes)  # type: ignore[arg-type]


def in_base64(key: bytes) -> str:
    return base64.b64encode(key).decode()


# Keys -----------------------------------------------------------------------------------------


def test_the_first_key_is_the_one_that_encrypts() -> None:
    keys = Keyring.parse(
        hash_key=in_base64(HASH_KEY),
        encryption_keys=f"new:{in_base64(KEY_2)}, old:{in_base64(KEY_1)}",
        code_key=in_base64(CODE_KEY),
    )

    assert keys.current == "new"
    assert keys.encryption_keys == {"new": KEY_2, "old": KEY_1}
    assert (keys.hash_key, keys.code_key) == (HASH_KEY, CODE_KEY)


@pytest.mark.parametrize("name", ["hash_key", "code_key", "encryption_keys"])
@pytest.mark.parametrize(
    "secret",
    ["c2hvcnQtc2VjcmV0", "not base64 at all!", "ünicode-secret"],
    ids=["short", "not base64", "not ASCII"],
)
def test_a_malformed_key_is_refused_by_name_and_not_shown(name: str, secret: str) -> None:
    good = {"hash_key": in_base64(HASH_KEY), "encryption_keys": f"k1:{in_base64(KEY_1)}"}
    texts = {**good, "code_key": in_base64(CODE_KEY), name: f"k1:{secret}" if "encr" in name else secret}

    with pytest.raises(InvalidValue, match=name) as refusal:
        Keyring.parse(**texts)

    assert "32 bytes" in str(refusal.value)
    assert secret not in str(refusal.value)
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize(
    "pairs",
    ["", "no-colon-secret", ":{key}", "a b:{key}", "k1:{key},k1:{key}", "k1:{key},"],
    ids=["nothing", "no id", "empty id", "id with a space", "an id twice", "a comma too many"],
)
def test_malformed_pairs_of_keys_are_refused_and_not_shown(pairs: str) -> None:
    with pytest.raises(InvalidValue, match="encryption_keys") as refusal:
        Keyring.parse(
            hash_key=in_base64(HASH_KEY),
            encryption_keys=pairs.format(key=in_base64(KEY_1)),
            code_key=in_base64(CODE_KEY),
        )

    assert in_base64(KEY_1) not in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_the_current_key_must_be_one_of_the_keys() -> None:
    with pytest.raises(InvalidValue, match="current key"):
        a_keyring(current="k2")


def test_a_keyring_shows_no_key() -> None:
    shown = repr(a_keyring()) + str(a_keyring())

    assert shown == "Keyring(current='k1')" * 2


def test_the_keys_of_a_keyring_cannot_be_changed() -> None:
    keys = {"k1": KEY_1}
    keyring = a_keyring(encryption_keys=keys)

    keys["k2"] = KEY_2

    assert "k2" not in keyring.encryption_keys


# Encryption-----------------------------------------------------------------------------------


@given(text=st.text(), context=st.text(max_size=50))
def test_what_is_encrypted_is_decrypted_again(text: str, context: str) -> None:
    keys = a_keyring()

    assert keys.decrypt(keys.encrypt(text, context), context) == text


def test_the_same_text_is_encrypted_differently_each_time() -> None:
    keys = a_keyring()

    assert keys.encrypt(TEXT, "here") != keys.encrypt(TEXT, "here")


def test_an_encrypted_text_names_its_key_and_shows_nothing_else() -> None:
    encrypted = a_keyring().encrypt(TEXT, "here")

    key_id, _, encoded = encrypted.partition(":")
    assert key_id == "k1"
    assert TEXT.encode() not in base64.b64decode(encoded, validate=True)


def test_after_a_rotation_old_texts_are_decrypted_and_new_ones_use_the_new_key() -> None:
    encrypted = a_keyring().encrypt(TEXT, "here")

    rotated = a_keyring(encryption_keys={"k2": KEY_2, "k1": KEY_1}, current="k2")

    assert rotated.decrypt(encrypted, "here") == TEXT
    assert rotated.encrypt(TEXT, "here").startswith("k2:")


def test_a_text_is_not_decrypted_in_another_context() -> None:
    keys = a_keyring()

    with pytest.raises(CannotDecrypt, match="another context"):
        keys.decrypt(keys.encrypt(TEXT, "here"), "there")


def test_a_text_is_not_decrypted_with_another_key_of_the_same_name() -> None:
    encrypted = a_keyring().encrypt(TEXT, "here")

    with pytest.raises(CannotDecrypt, match="another key"):
        a_keyring(encryption_keys={"k1": KEY_2}).decrypt(encrypted, "here")


def test_a_text_of_an_unknown_key_says_which_key_is_missing() -> None:
    encrypted = a_keyring(encryption_keys={"k0": KEY_2}, current="k0").encrypt(TEXT, "here")

    with pytest.raises(CannotDecrypt, match="names key 'k0'; encryption_keys holds k1"):
        a_keyring().decrypt(encrypted, "here")


@given(data=st.data())
def test_a_text_with_one_bit_changed_is_not_decrypted(data: st.DataObject) -> None:
    keys = a_keyring()
    whole = bytearray(base64.b64decode(keys.encrypt(TEXT, "here").removeprefix("k1:")))
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8

    with pytest.raises(CannotDecrypt):
        keys.decrypt(f"k1:{in_base64(bytes(whole))}", "here")


@given(garbage=st.text())
def test_what_was_never_encrypted_is_not_decrypted_and_is_not_shown(garbage: str) -> None:
    for text in (garbage, f"k1:{garbage}", TEXT):
        with pytest.raises(CannotDecrypt) as refusal:
            a_keyring().decrypt(text, "here")
        assert TEXT not in str(refusal.value)


# Without the extra ----------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["encrypt('text', 'here')", "decrypt('k1:text', 'here')"])
def test_without_the_extra_the_import_works_and_the_call_names_it(call: str) -> None:
    script = f"""
import sys
sys.modules["cryptography"] = None
from dovecote import Keyring
from dovecote.errors import MissingPackage
key = bytes(32)
keys = Keyring(hash_key=key, encryption_keys={{"k1": key}}, current="k1", code_key=key)
try:
    keys.{call}
except MissingPackage as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert "cryptography: pip install 'dovecote[privacy]'" in ran.stdout


@pytest.mark.parametrize("module", ["dovecote", "domain.verification"])
def test_importing_loads_neither_cryptography_nor_numbering_plans(module: str) -> None:
    script = (
        f"import sys, {module};assert not {{'cryptography', 'phonenumbers'}} & set(sys.modules), 'loaded at import'"
    )

    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_relay_of_this_application_loads_no_numbering_plans() -> None:
    script = "import sys, workers.relay; assert 'phonenumbers' not in sys.modules, 'loaded at import'"

    subprocess.run([sys.executable, "-c", script], check=True)
