"""Which slices keep personal data for a time. To add one: a function that removes a batch, and a line here."""

from domain import verification
from dovecote.operations.purging import Purge

#: The leading relay runs them once an hour, and so does `dovecote maintain`.
PURGES: tuple[Purge, ...] = (verification.purge_expired,)
