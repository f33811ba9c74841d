"""Phone numbers are read strictly, hashed with a key, sealed, and shown with four digits."""

import base64
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovecote.errors import InvalidValue
from dovecote.privacy import CannotOpen, Keyring, masked, parse_phone

PHONE = "+4930901820"
KEY_1, KEY_2, HASH_KEY, CODE_KEY = (bytes([byte]) * 32 for byte in (1, 2, 3, 4))


def a_keyring(**changes: object) -> Keyring:
    known = Keyring(hash_key=HASH_KEY, encryption_keys={"k1": KEY_1}, current="k1", code_key=CODE_KEY)
    return replace(known, **changes)  # type: ignore[arg-type]


def in_base64(key: bytes) -> str:
    return base64.b64encode(key).decode()


# Keys -----------------------------------------------------------------------------------------


def test_the_first_key_is_the_one_that_seals() -> None:
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
    ring = a_keyring(encryption_keys=keys)

    keys["k2"] = KEY_2

    assert "k2" not in ring.encryption_keys


# Hashes ---------------------------------------------------------------------------------------


def test_the_hash_of_a_number_never_changes() -> None:
    # Stored hashes must be found again by every later version.
    known = "30a30e1b3f03ded38bc5557a0c60ad0260b46f99896528aa296eeaf1307d6195"

    assert a_keyring().phone_hash(PHONE) == known


def test_another_key_gives_another_hash() -> None:
    assert a_keyring().phone_hash(PHONE) != a_keyring(hash_key=KEY_2).phone_hash(PHONE)


# Sealing --------------------------------------------------------------------------------------


@given(text=st.text(), context=st.text(max_size=50))
def test_what_is_sealed_opens_again(text: str, context: str) -> None:
    keys = a_keyring()

    assert keys.open(keys.seal(text, context), context) == text


def test_the_same_text_is_sealed_differently_each_time() -> None:
    keys = a_keyring()

    assert keys.seal(PHONE, "here") != keys.seal(PHONE, "here")


def test_a_sealed_text_names_its_key_and_shows_nothing_else() -> None:
    sealed = a_keyring().seal(PHONE, "here")

    key_id, _, encoded = sealed.partition(":")
    assert key_id == "k1"
    assert PHONE.encode() not in base64.b64decode(encoded, validate=True)


def test_after_a_rotation_old_texts_open_and_new_ones_use_the_new_key() -> None:
    sealed = a_keyring().seal(PHONE, "here")

    rotated = a_keyring(encryption_keys={"k2": KEY_2, "k1": KEY_1}, current="k2")

    assert rotated.open(sealed, "here") == PHONE
    assert rotated.seal(PHONE, "here").startswith("k2:")


def test_a_text_does_not_open_in_another_context() -> None:
    keys = a_keyring()

    with pytest.raises(CannotOpen, match="another context"):
        keys.open(keys.seal(PHONE, "here"), "there")


def test_a_text_does_not_open_with_another_key_of_the_same_name() -> None:
    sealed = a_keyring().seal(PHONE, "here")

    with pytest.raises(CannotOpen, match="another key"):
        a_keyring(encryption_keys={"k1": KEY_2}).open(sealed, "here")


def test_a_text_of_an_unknown_key_says_which_key_is_missing() -> None:
    sealed = a_keyring(encryption_keys={"k0": KEY_2}, current="k0").seal(PHONE, "here")

    with pytest.raises(CannotOpen, match="names key 'k0'; encryption_keys holds k1"):
        a_keyring().open(sealed, "here")


@given(data=st.data())
def test_a_sealed_text_with_one_bit_changed_does_not_open(data: st.DataObject) -> None:
    keys = a_keyring()
    whole = bytearray(base64.b64decode(keys.seal(PHONE, "here").removeprefix("k1:")))
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8

    with pytest.raises(CannotOpen):
        keys.open(f"k1:{in_base64(bytes(whole))}", "here")


@given(garbage=st.text())
def test_what_was_never_sealed_does_not_open_and_is_not_shown(garbage: str) -> None:
    for text in (garbage, f"k1:{garbage}", PHONE):
        with pytest.raises(CannotOpen) as refusal:
            a_keyring().open(text, "here")
        assert PHONE not in str(refusal.value)


# Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["+4930901820", " +49 (0)30 90 18 20", "+49-30-901820", "+49 30/901820"])
def test_a_number_is_read_however_it_is_spaced(text: str) -> None:
    assert parse_phone(text) == PHONE


@pytest.mark.parametrize(
    "text",
    [
        "030901820",
        "004930901820",
        "tel:+4930901820",
        "+",
        "+49",
        "+999123456789",
        "+493090182012345678",
        "+4930901820 ext. 7",
        "+hello",
        "",
        "+" + "4" * 1_000,
    ],
)
def test_what_is_no_international_number_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidValue) as refusal:
        parse_phone(text)

    assert len(text) < 4 or text not in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert not any(character.isdigit() for character in str(refusal.value))


def test_a_masked_number_shows_four_digits() -> None:
    assert masked(PHONE) == "••••1820"


# Without the extra ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("phonenumbers", "parse_phone('+4930901820')"),
        ("cryptography", "KEYS.seal('text', 'here')"),
        ("cryptography", "KEYS.open('k1:text', 'here')"),
    ],
)
def test_without_the_extra_the_import_works_and_the_call_names_it(package: str, call: str) -> None:
    script = f"""
import sys
sys.modules[{package!r}] = None
import domain.verification
from dovecote.errors import MissingPackage
from dovecote.privacy import Keyring, parse_phone
key = bytes(32)
KEYS = Keyring(hash_key=key, encryption_keys={{"k1": key}}, current="k1", code_key=key)
assert KEYS.phone_hash("+4930901820")
try:
    {call}
except MissingPackage as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert package in told.stdout
    assert "pip install 'dovecote[privacy]'" in told.stdout


def test_importing_verification_loads_neither_package() -> None:
    script = (
        "import sys, domain.verification;"
        "assert not {'cryptography', 'phonenumbers'} & set(sys.modules), 'loaded at import'"
    )

    subprocess.run([sys.executable, "-c", script], check=True)
