"""Which phone numbers a code may be sent to: mobile ones, by an allow-list of types."""

from dovecote.errors import InvalidValue
from dovecote.privacy import parse_phone


class NotMobile(InvalidValue):
    """A code is sent to mobile phones only. Ask for another number."""

    def __init__(self) -> None:
        super().__init__(
            "a code is sent to mobile phones only: this number is of another kind, such as a landline, a premium-rate, "
            "toll-free, internet or satellite number"
        )


def mobile_number(text: str) -> str:
    """Return a number that a code may be sent to, as E.164.

    Mobile by the numbering plan of its region, or a type that the plan does not tell apart from landlines, as in the
    United States and Canada. Numbers of no region, which are satellite phones, networks and services, are refused:
    a text to them costs what it likes.
    Errors: NotMobile and InvalidValue, both without the number; MissingPackage without `dovecote[privacy]`.
    """
    e164 = parse_phone(text)
    import phonenumbers

    number = phonenumbers.parse(e164, None)
    region = phonenumbers.region_code_for_country_code(number.country_code or 0)
    kinds = phonenumbers.PhoneNumberType
    # An allow-list: a kind that a later `phonenumbers` tells apart is refused until somebody has thought about it.
    is_mobile = phonenumbers.number_type(number) in (kinds.MOBILE, kinds.FIXED_LINE_OR_MOBILE)
    if not is_mobile or region == phonenumbers.REGION_CODE_FOR_NON_GEO_ENTITY:
        raise NotMobile
    return e164
