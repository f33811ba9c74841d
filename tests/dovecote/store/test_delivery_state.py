"""SQL and Python know the same states of a delivery."""

import re

import pytest
from sqlalchemy import Engine, text

from dovecote.store.delivery_state import DeliveryState

pytestmark = pytest.mark.servers


def test_the_constraint_on_deliveries_knows_exactly_the_states_of_python(engine: Engine) -> None:
    with engine.connect() as connection:
        constraint = connection.scalar(
            text("select pg_get_constraintdef(oid) from pg_constraint where conname = 'deliveries_state_is_known'")
        )

    assert set(re.findall(r"'(\w+)'", str(constraint))) == {state.value for state in DeliveryState}
