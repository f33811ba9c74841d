"""The relay of this application: `python -P -m workers.relay`."""

from dovecote.bootstrap import run_relay
from workers.app import app

if __name__ == "__main__":
    run_relay(app)
