"""This application, as the library sees it: DOVECOTE_APP=workers.app:app."""

from pathlib import Path

from dovecote import Command, Dovecote

_CHECKOUT = Path(__file__).parents[1]

# As text: what of it a process does not need, it does not import.
app = Dovecote(
    routes="workers.routes:ROUTES",
    gateways="workers.gateways:gateways_for",
    commands={
        "ingest": Command("workers.commands.ingest:ingest", "Take in data from files."),
        "demo": Command(
            "workers.commands.demo:demo",
            "Write mixed events of the three slices and wait until every one is an effect, once.",
        ),
    },
    migrations=_CHECKOUT / "migrations",
    # To have more personal data removed in time: a function that removes a batch, and a name here.
    purges=("domain.verification:purge_expired",),
    procfile=_CHECKOUT / "Procfile",
)
