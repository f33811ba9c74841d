"""Phone numbers: parse them, hash them, show four digits of them, and decide which of them a code may be sent to.

A number in the clear lives in memory only; nothing here logs, and no error repeats a number. `phonenumbers` comes with
the extra `dovecote[privacy]` and is imported when needed.
"""

import hashlib
import hmac

from dovecote.errors import InvalidValue, MissingPackage
from dovecote.privacy import Keyring


class NotMobile(InvalidValue):
    """A code is sent to mobile phones only. Ask for another number."""

    def __init__(self) -> None:
        super().__init__(
            "a code is sent to mobile phones only: this number is of another kind, such as a landline, a premium-rate, "
            "toll-free, internet or satellite number"
        )


def parse_phone(text: str) -> str:
    """Return a phone number as E.164: `+49 30 901820` becomes `+4930901820`.

    The number must exist by the numbering plans that `phonenumbers` ships: a mistyped one is refused
    before a message is paid for.
    Errors: InvalidValue, without the number, for anything but a valid number that starts with +.
    """
    try:
        import phonenumbers
    except ImportError as error:
        raise MissingPackage(
            "parsing phone numbers needs the package phonenumbers: pip install 'dovecote[privacy]'"
        ) from error
    if not text.strip().startswith("+"):
        raise InvalidValue("a phone number must be in international format: + and the country code first")
    try:
        number = phonenumbers.parse(text.strip(), None)
    except phonenumbers.NumberParseException:
        raise InvalidValue("this is not a phone number: + and the country code first, then digits") from None
    if number.extension or not phonenumbers.is_valid_number(number):
        raise InvalidValue("this phone number is not in use in the country its code names")
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)


def mobile_number(text: str) -> str:
    """Return a number that a code may be sent to, as E.164.

    Mobile by the numbering plan of its region, or a type that the plan does not distinguish from landlines, as in the
    United States and Canada. Numbers of no region, which are satellite phones, networks and services, are refused:
    the price of a text to them has no limit.
    Errors: NotMobile and InvalidValue, both without the number; MissingPackage without `dovecote[privacy]`.
    """
    e164 = parse_phone(text)
    import phonenumbers

    number = phonenumbers.parse(e164, None)
    region = phonenumbers.region_code_for_country_code(number.country_code or 0)
    kinds = phonenumbers.PhoneNumberType
    # An allow-list: a type that a later `phonenumbers` adds is refused until somebody has decided about it.
    is_mobile = phonenumbers.number_type(number) in (kinds.MOBILE, kinds.FIXED_LINE_OR_MOBILE)
    if not is_mobile or region == phonenumbers.REGION_CODE_FOR_NON_GEO_ENTITY:
        raise NotMobile
    return e164


def phone_hash(keys: Keyring, e164: str) -> str:
    """Return the keyed hash of a number as 64 hex digits.

    Keyed because there are few enough phone numbers to try them all against a plain hash.
    """
    return hmac.new(keys.hash_key, e164.encode(), hashlib.sha256).hexdigest()


def masked_phone(e164: str) -> str:
    """Return what people may see of a number: its last four digits."""
    return "••••" + e164[-4:]
