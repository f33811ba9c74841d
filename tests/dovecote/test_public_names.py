"""`from dovecote import ...` gives every public name, whatever was imported before."""

import subprocess
import sys

import pytest

import dovecote

FUNCTION = "assert unit_of_work.__name__ == 'unit_of_work' and callable(unit_of_work), unit_of_work"
ORDERS = {
    "the name alone": "from dovecote import unit_of_work",
    "after its module": "import dovecote.unit_of_work; from dovecote import unit_of_work",
    "after what is in its module": "from dovecote.unit_of_work import UnitOfWork; from dovecote import unit_of_work",
    "before and after its module": "from dovecote import unit_of_work as _; import dovecote.unit_of_work\n"
    "from dovecote import unit_of_work",
    "after a module that imports it": "import dovecote.store.connections; from dovecote import unit_of_work",
}


@pytest.mark.parametrize("statements", ORDERS.values(), ids=list(ORDERS))
def test_unit_of_work_is_the_function_in_any_order_of_imports(statements: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", f"{statements}\n{FUNCTION}"],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_is_there_and_listed() -> None:
    assert set(dovecote.__all__) <= set(dir(dovecote))
    assert all(getattr(dovecote, name).__name__ == name for name in dovecote.__all__)


def test_no_other_name_is_made_up() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unit_of_play'"):
        dovecote.unit_of_play  # type: ignore[attr-defined]  # noqa: B018 - that it is not there is the point
