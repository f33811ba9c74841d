"""The application: its processes, routes, handlers and gateways. Everything that carries events is `dovecote`."""
