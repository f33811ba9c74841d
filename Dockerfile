# One small image for every process of docker-compose.yml. It holds what the wheel brings, no compiler, and runs
# as nobody in particular on a read-only root.
#
# To renew the base: the newest patch of python:3.13-slim-trixie, in both lines. With its digest
# (`docker buildx imagetools inspect python:3.13.16-slim-trixie`) the tag cannot be moved under you either.
FROM python:3.13.16-slim-trixie AS build
WORKDIR /source
COPY pyproject.toml README.md CHANGELOG.md LICENSE Procfile ./
COPY domain domain
COPY dovecote dovecote
COPY workers workers
COPY migrations migrations
RUN python -m venv /opt/dovecote \
    && pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && /opt/dovecote/bin/pip install --no-cache-dir "$(echo /wheels/dovecote-*.whl)[workers]" \
    && /opt/dovecote/bin/pip uninstall --yes pip

FROM python:3.13.16-slim-trixie
# With a name: the audit log tells who gave a command.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin dovecote
COPY --from=build /opt/dovecote /opt/dovecote
COPY containers/logins.py /opt/dovecote/logins.py
# A number, so that an orchestrator can see that it is not root's.
USER 10001:10001
# Not a directory with a .env in it: what a container is told comes from its environment and its secrets.
WORKDIR /
# Nothing is imported from the directory where a process starts, and nothing is written beside the code.
ENV PATH=/opt/dovecote/bin:$PATH PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
CMD ["dovecote", "--help"]
