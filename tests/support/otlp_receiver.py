"""A collector for tests: takes OTLP over HTTP and writes each span as a line of JSON.

`python -m tests.support.otlp_receiver FILE` prints the port it listens on, on loopback only.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

FILE = Path(sys.argv[1])


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
        with FILE.open("a") as file:
            for of_process in request.resource_spans:
                resource = _values(of_process.resource.attributes)
                for of_scope in of_process.scope_spans:
                    for span in of_scope.spans:
                        file.write(json.dumps(_as_json(span, resource, self.path)) + "\n")
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.end_headers()
        self.wfile.write(ExportTraceServiceResponse().SerializeToString())

    def log_message(self, *_: object) -> None:
        """Keep still."""


def _as_json(span: Any, resource: dict[str, Any], path: str) -> dict[str, Any]:
    return {
        "path": path,
        "name": span.name,
        "kind": span.kind,
        "trace_id": span.trace_id.hex(),
        "span_id": span.span_id.hex(),
        "parent_id": span.parent_span_id.hex(),
        "status": span.status.code,
        "attributes": _values(span.attributes),
        "events": [{"name": event.name, **_values(event.attributes)} for event in span.events],
        "links": [link.span_id.hex() for link in span.links],
        "resource": resource,
    }


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
