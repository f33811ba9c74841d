"""`dovecote relay` whose routes cut bundles of another size: python -m benchmarks.rebundled SIZE"""

import signal
import sys
from dataclasses import replace

from workers import telemetry
from workers.bootstrap import relay_for, settings_or_exit
from workers.routes import ROUTES


def main(bundle_size: int) -> None:
    """Relay until SIGTERM."""
    settings = settings_or_exit()
    telemetry.configure(settings.telemetry, "relay")
    relay = relay_for(settings, [replace(route, bundle_size=bundle_size) for route in ROUTES])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: relay.stop())
    relay.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
