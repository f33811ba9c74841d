"""`dovecote relay` whose routes cut bundles of another size: python -m benchmarks.rebundled SIZE"""

import sys
from dataclasses import replace

from dovecote.bootstrap import run_relay
from workers.app import app

if __name__ == "__main__":
    run_relay(app.with_routes([replace(route, bundle_size=int(sys.argv[1])) for route in app.routes]))
