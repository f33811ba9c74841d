# One small image for every process of docker-compose.yml. It holds the wheel and no compiler, and runs as nobody
# in particular.
FROM python:3.13-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/dovecote-*.whl)[workers]" \
    && useradd --system --uid 10001 --no-create-home --home-dir /nonexistent dovecote
USER dovecote
# Not a directory with a .env in it: what a container is told comes from its environment.
WORKDIR /
ENV PYTHONUNBUFFERED=1
CMD ["dovecote", "--help"]
