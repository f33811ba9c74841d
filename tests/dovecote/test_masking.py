"""Secrets and phone numbers are taken out of what people read; the rest stays."""

import json

import pytest

from dovecote import masking
from dovecote.masking import masked, never_show

NUMBER = "4915112345678"


@pytest.mark.parametrize(
    "text",
    [
        "call +4915112345678",
        "call +49 151 1234 5678 now",
        "call +49 (151) 1234-5678",
        "call +49.151.1234.5678",
        "call +49\u00a0151\u00a012345678",
        "https://sms.example/send?to=%2B4915112345678&text=hi",
        "call 004915112345678",
        '{"phone": "4915112345678"}',
        '"{\\"phone_number\\": \\"4915112345678\\"}"',
        "msisdn=4915112345678",
        "KeyError: '+4915112345678'",
        "b'+4915112345678'",
    ],
)
def test_phone_numbers_are_masked(text: str) -> None:
    digits = "".join(letter for letter in masked(text) if letter.isdigit())

    assert "1234" not in digits
    assert "151" not in digits


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://dovecote:S3cr3tvalue@db/x is away",
        "connection to host=db password=S3cr3tvalue failed",
        "Authorization: Bearer S3cr3tvalue.abc",
        "{'Authorization': 'Basic S3cr3tvalue=='}",
        '{"api_key": "S3cr3tvalue"}',
        json.dumps({"body": json.dumps({"api_key": "S3cr3tvalue"})}),
        "API-KEY=S3cr3tvalue&x=1",
        "client_secret: S3cr3tvalue",
        "access_token='S3cr3tvalue'",
        "AUTH_TOKEN=S3cr3tvalue",
        "hash_key=S3cr3tvalue",
        "key eyJhbGciOiJI.S3cr3tvalue.abc",
        "sk_live_S3cr3tvalue0",
        "-----BEGIN PRIVATE KEY-----\nS3cr3tvalue\n-----END PRIVATE KEY-----",
        "DETAIL:  Key (phone_hash, id)=(S3cr3tvalue, 5) already exists.",
        "DETAIL:  Failing row contains (1, S3cr3tvalue, (x)).",
    ],
)
def test_secrets_are_masked(text: str) -> None:
    assert "S3cr3tvalue" not in masked(text)


def test_a_code_in_our_own_words_is_masked() -> None:
    assert "481516" not in masked("provider refused 'Your code is 481516. It works once'")


@pytest.mark.parametrize(
    "text",
    [
        "event 01997c2e-5b1a-7c3d-8e4f-0123456789ab at position 123456789012",
        "2026-11-20T12:00:00.123456+00:00 waited 1.5 s",
        'File "/srv/dovecote/workers/consume.py", line 152, in _act',
        "SQLSTATE 40001, exit code 137, status code: 404",
        "UnknownEvent: event x has the unknown type 'pricing.price_quoted.v99'",
        'relation "dovecote.outbox" does not exist',
        "price 1.234,50 EUR + 12 %",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_what_a_process_knows_to_be_secret_is_masked_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_known", set())

    never_show(["correct-horse-battery", "short"])

    assert masked("xcorrect-horse-batteryx and short") == "x***x and short"
