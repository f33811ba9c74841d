"""Every table of the application, in one import: for Alembic, and for tests that compare models and schema."""

from domain.billing.history import billing_history
from domain.billing.repository import memberships
from domain.pricing.repository import latest_prices, price_quotes
from domain.verification.repository import challenges, verification_quotas, verified_phones
from dovecote.migrations.tables import metadata

__all__ = [
    "billing_history",
    "challenges",
    "latest_prices",
    "memberships",
    "metadata",
    "price_quotes",
    "verification_quotas",
    "verified_phones",
]
