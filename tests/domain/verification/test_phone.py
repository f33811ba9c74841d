"""Phone numbers are parsed strictly, hashed with a key, and shown with four digits."""

import subprocess
import sys
from dataclasses import replace

import pytest

from domain.verification.phone import masked_phone, parse_phone, phone_hash
from dovecote.errors import InvalidValue
from dovecote.privacy import Keyring

PHONE = "+4930901820"
KEYS = Keyring(
    hash_key=bytes([3]) * 32, encryption_keys={"k1": bytes([1]) * 32}, current="k1", code_key=bytes([4]) * 32
)


# Hashes ---------------------------------------------------------------------------------------


def test_the_hash_of_a_number_never_changes() -> None:
    # Stored hashes must be found again by every later version.
    known = "30a30e1b3f03ded38bc5557a0c60ad0260b46f99896528aa296eeaf1307d6195"

    assert phone_hash(KEYS, PHONE) == known


def test_another_key_gives_another_hash() -> None:
    assert phone_hash(KEYS, PHONE) != phone_hash(replace(KEYS, hash_key=bytes([2]) * 32), PHONE)


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
    assert masked_phone(PHONE) == "••••1820"


# Without the extra ----------------------------------------------------------------------------


def test_without_the_extra_the_import_works_and_the_call_names_it() -> None:
    script = """
import sys
sys.modules["phonenumbers"] = None
import domain.verification
from domain.verification.phone import parse_phone
from dovecote.errors import MissingPackage
try:
    parse_phone("+4930901820")
except MissingPackage as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert "phonenumbers: pip install 'dovecote[privacy]'" in ran.stdout
