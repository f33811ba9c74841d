"""This application, as the library sees it: DOVECOTE_APP=workers.app:app."""

from pathlib import Path

from domain import verification
from dovecote.route import Dovecote
from workers.gateways import gateways_for
from workers.routes import ROUTES

_CHECKOUT = Path(__file__).parents[1]

app = Dovecote(
    routes=ROUTES,
    gateways=gateways_for,
    commands=("workers.commands.ingest", "workers.commands.demo"),
    migrations=_CHECKOUT / "migrations",
    # To have more personal data removed in time: a function that removes a batch, and a name here.
    purges=(verification.purge_expired,),
    procfile=_CHECKOUT / "Procfile",
)
