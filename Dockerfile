# One small image for every process of docker-compose.yml: the library as its wheel brings it, this application beside
# it, no compiler and no pip. It runs as nobody in particular on a read-only root.
#
# To renew the base: the newest patch of python:3.13-slim-trixie, in both lines. With its digest
# (`docker buildx imagetools inspect python:3.13.16-slim-trixie`) the tag cannot be moved under you either.
FROM python:3.13.16-slim-trixie AS build
WORKDIR /source
# The versions and hashes of the lock files, in a layer that stays until one of them changes.
COPY requirements requirements
RUN python -m venv /opt/dovecote && python -m venv /opt/build \
    && locked="--no-cache-dir --require-hashes --only-binary :all: --requirement requirements" \
    && /opt/dovecote/bin/pip install $locked/workers.txt \
    && /opt/build/bin/pip install $locked/build.txt
# The library, as its wheel.
COPY pyproject.toml README.md LICENSE ./
COPY dovecote dovecote
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/dovecote/bin/pip install --no-cache-dir --no-deps /wheels/dovecote-*.whl \
    && /opt/dovecote/bin/pip uninstall --yes pip
# The application, beside it.
COPY Procfile /opt/dovecote/app/
COPY domain /opt/dovecote/app/domain
COPY workers /opt/dovecote/app/workers
COPY migrations /opt/dovecote/app/migrations
RUN /opt/dovecote/bin/python -m compileall -q /opt/dovecote/app/domain /opt/dovecote/app/workers

FROM python:3.13.16-slim-trixie
# With a name: the audit log says who gave a command.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin dovecote
COPY --from=build /opt/dovecote /opt/dovecote
COPY containers/logins.py /opt/dovecote/logins.py
# A number, so that an orchestrator can see that it is not root's.
USER 10001:10001
# Not a directory with a .env in it: the options of a container come from its environment and its secrets.
WORKDIR /
# Nothing is imported from the directory where a process starts, and nothing is written beside the code.
ENV PATH=/opt/dovecote/bin:$PATH PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
ENV PYTHONPATH=/opt/dovecote/app DOVECOTE_APP=workers.app:app
CMD ["dovecote", "--help"]
