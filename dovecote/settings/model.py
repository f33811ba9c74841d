"""The only reader of the environment: every option, checked once at start and then passed on.

From the strongest to the weakest source: environment variables, the file `.env`, the running
`./dev up` system of DOVECOTE_HOME, the defaults below. A nested option is written
`DOVECOTE_<SECTION>__<NAME>`; the two servers also answer to DATABASE_URL and REDIS_URL. Each may be
given as NAME_FILE, the path of a file that holds the value.
"""

import base64
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import psycopg
import redis
from psycopg.conninfo import conninfo_to_dict
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from dovecote.privacy import KEY_BYTES, Keyring
from dovecote.processes.state_directory import StateDirectory
from dovecote.settings import keys
from dovecote.settings.urls import names_ports, secrets_in, without_passwords
from dovecote.settings.variables import ALIASES, PREFIX, SettingsError, chosen, dotenv

__all__ = [
    "PREFIX",
    "Settings",
    "SettingsError",
    "given_variables",
    "load_settings",
    "options",
    "secrets",
    "shown",
    "without_passwords",
]

_DATABASE_NUMBER = re.compile(r"/?|/[0-9]+")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Database(Section):
    url: SecretStr = Field(description="Postgres, as postgresql://user:password@host:port/database.")
    pool_size: int = Field(5, ge=1, le=500, description="Connections a process keeps; at least its threads.")
    connect_timeout_seconds: int = Field(5, ge=1, le=300, description="Longest wait for a new connection.")
    statement_timeout_ms: int = Field(
        30_000, ge=0, le=2_147_483_647, description="Longest a statement of a consumer may run; 0 is without end."
    )

    @field_validator("url")
    @classmethod
    def _is_postgres(cls, url: SecretStr) -> SecretStr:
        if not url.get_secret_value().startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
            raise ValueError("a URL that starts with postgresql://")
        plain = url.get_secret_value().replace("postgresql+psycopg://", "postgresql://", 1)
        try:
            given = conninfo_to_dict(plain)
        except (psycopg.Error, ValueError):
            raise ValueError("a URL that libpq can read") from None
        if not names_ports(str(given.get("port") or "")):  # libpq finds out when it connects
            raise ValueError("a URL that libpq can read, with numbers for ports")
        return SecretStr(plain)


class Redis(Section):
    url: SecretStr = Field(description="Redis or Valkey, as redis://:password@host:port/0; a database of its own.")
    namespace: str = Field("dovecote", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Prefix of every key.")
    cache_url: SecretStr | None = Field(
        None, description="Where challenges are cached; the broker's server, next database, if not given."
    )
    socket_timeout_seconds: float = Field(5.0, gt=0, le=300, description="Longest wait for an answer.")

    @field_validator("url", "cache_url")
    @classmethod
    def _is_redis(cls, url: SecretStr | None) -> SecretStr | None:
        if url and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("a URL that starts with redis:// or rediss://")
        if url and not _names_a_redis_database(url.get_secret_value()):
            raise ValueError("a URL with a number for the port and a number for the database")
        if url:
            try:
                pool: Any = redis.BlockingConnectionPool.from_url(url.get_secret_value())
                pool.make_connection()
            except (TypeError, ValueError):  # else at the first command, as a bug
                raise ValueError("a URL with parameters that redis-py knows") from None
        return url


def _names_a_redis_database(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # ValueError if it is no number
    except ValueError:
        return False
    # redis-py takes a name for database 0, without a word.
    return parts.scheme == "unix" or _DATABASE_NUMBER.fullmatch(parts.path) is not None


class Relay(Section):
    batch_size: int = Field(2_000, ge=1, le=50_000, description="Most events of one batch.")
    batch_bytes: int = Field(
        8_000_000,
        ge=100_000,
        le=1_000_000_000,
        description="Most bytes of one batch; the relay holds four times as much at most.",
    )
    publish_bytes: int = Field(
        8_000_000,
        ge=100_000,
        le=256_000_000,
        description="Most bytes of one call to Redis, which serves nobody else meanwhile; a larger message goes alone.",
    )
    gather_ms: float = Field(
        5.0,
        ge=0,
        le=1_000,
        description="Pause after a batch that was not full, in traffic: a steady stream then comes in bundles.",
    )
    poll_interval_seconds: float = Field(
        1.0,
        ge=0.05,
        le=60,
        description="Longest time without a look at the outbox when no wake-up comes.",
    )
    busy_poll_interval_ms: float = Field(
        10.0, ge=0.5, le=1_000, description="Longest pause between reads while a writer has not ended."
    )
    standby_interval_seconds: float = Field(0.5, ge=0.05, le=60, description="How often a standby tries to take over.")
    leader_timeout_seconds: float = Field(
        15.0,
        ge=3,
        le=3_600,
        description="A leader silent for so long is frozen, and a standby ends its session.",
    )
    queue_bytes: int = Field(
        268_435_456,
        ge=1_000_000,
        description="Most bytes of a queue in Redis; beyond, its handlers' events stay in the outbox for now.",
    )
    publish_after: Literal["commit", "standby"] = Field(
        "commit",
        description="When an event is published: once it is committed, or once a standby has flushed it.",
    )
    retry_lease_seconds: float = Field(
        60.0, ge=1, le=86_400, description="A retry sent but not heard of again is sent once more after this."
    )
    reconcile_after_seconds: float = Field(
        600.0,
        ge=1,
        le=604_800,
        description="After this an event that its queue has lost is sent again; not before its time limit.",
    )


class Consumers(Section):
    heartbeat_timeout_ms: int = Field(
        10_000,
        ge=1_000,
        le=86_400_000,
        description="A worker silent for so long is dead and its messages are requeued.",
    )
    poll_interval_ms: int = Field(
        1_000, ge=50, le=10_000, description="How long a worker blocks on an empty queue before it looks up."
    )
    outage_max_backoff_seconds: float = Field(
        1.0, gt=0, le=60, description="Longest pause between two tries while Postgres is away."
    )


class Retention(Section):
    keep_weeks: int = Field(
        0, ge=0, le=5_200, description="Whole weeks kept before this one; older ones are dropped. 0 drops none."
    )
    weeks_ahead: int = Field(4, ge=1, le=52, description="Weeks for which partitions are made ahead.")
    archive_path: Path | None = Field(
        None, description="Directory where a week is archived before it is dropped; without, it is only dropped."
    )


class Sms(Section):
    gateway: Literal["console"] = Field("console", description="Who sends text messages.")
    handset_path: Path | None = Field(
        None,
        description="File that stands for the phone's screen; the console gateway writes messages to it.",
    )
    failure_rate: float = Field(
        0.0, ge=0, le=1, description="Share of messages the console gateway refuses, to see retries."
    )


class Privacy(Section):
    hash_key: SecretStr | None = Field(None, description="32 bytes in base64: keys the hash of phone numbers.")
    encryption_keys: SecretStr | None = Field(
        None, description="id:base64 pairs, comma-separated, 32 bytes each; the first one encrypts."
    )
    code_key: SecretStr | None = Field(None, description="32 bytes in base64: codes are derived from it.")

    @field_validator("*")
    @classmethod
    def _fits_a_keyring(cls, secret: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        key = base64.b64encode(bytes(KEY_BYTES)).decode()
        others = {"hash_key": key, "encryption_keys": f"k:{key}", "code_key": key}
        assert info.field_name is not None
        if secret is not None:
            try:
                Keyring.parse(**{**others, info.field_name: secret.get_secret_value()})
            except ValueError as error:  # it names what is wrong and never shows the value
                raise ValueError(f"a well-formed one: {error}") from None
            for name, given in keys.named_keys("it", secret.get_secret_value()):
                if why := keys.weakness(given):
                    raise ValueError(f"a random one: {name} {why}; {keys.CURE}")
        return secret


class Telemetry(Section):
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level shown.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="console for people, json for machines; auto is console on a terminal."
    )
    otlp_endpoint: str | None = Field(None, description="OTLP/HTTP base URL for traces; none are sent without.")
    sample_ratio: float = Field(0.01, ge=0, le=1, description="Share of traces that start here and are kept.")
    http_port: int = Field(
        0, ge=0, le=65_535, description="Port of /metrics and /health of this process; 0 shows neither."
    )
    http_host: str = Field("127.0.0.1", min_length=1, description="Address on which they are shown.")


class Settings(BaseSettings):
    """Every option of a process."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="ignore", frozen=True, case_sensitive=False
    )

    database: Database
    redis: Redis
    relay: Relay = Relay()
    consumers: Consumers = Consumers()
    retention: Retention = Retention()
    sms: Sms = Sms()
    privacy: Privacy = Privacy()
    telemetry: Telemetry = Telemetry()

    def keyring(self) -> Keyring:
        """Return the keys for phone numbers and codes.

        Errors: SettingsError naming the variable that is missing.
        """
        values: dict[str, str] = {}
        for name in Privacy.model_fields:
            secret = getattr(self.privacy, name)
            if secret is None:
                field = Privacy.model_fields[name]
                raise SettingsError(f"{PREFIX}PRIVACY__{name.upper()} is missing: it wants {field.description}")
            values[name] = secret.get_secret_value()
        return Keyring.parse(**values)

    def keyring_if_given(self) -> Keyring | None:
        """Return the keys, None where there is not one of them: most processes need none.

        Errors: SettingsError where some are there and another is missing.
        """
        return self.keyring() if any(value is not None for _, value in self.privacy) else None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def load_settings(
    environ: Mapping[str, str] | None = None, directory: Path | None = None, *, needs_redis: bool = True
) -> Settings:
    """Read and check everything. Commands that only ask Postgres do not insist on a Redis.

    Errors: SettingsError with one sentence: the variable, what it got (never a secret), what it wants.
    """
    environ = dict(os.environ if environ is None else environ)
    variables = chosen([_running_system(environ), *_given(environ, directory)])
    _refuse_unknown_sections(variables)
    if not needs_redis:
        variables.setdefault("DOVECOTE_REDIS__URL", "redis://not-given.invalid")
    _refuse_unknown(variables)
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in variables.items()}
    try:
        settings = Settings(**source())
    except ValidationError as error:
        raise SettingsError(_sentence(error, variables)) from None
    given = {f"{PREFIX}PRIVACY__{name.upper()}": value for name, value in settings.privacy if value is not None}
    if same := keys.equal_keys({variable: value.get_secret_value() for variable, value in given.items()}):
        raise SettingsError(f"{same[0]} and {same[1]} are the same: each has to be a key of its own; {keys.CURE}.")
    return settings


def _refuse_unknown(variables: Mapping[str, str]) -> None:
    known = {option["long"] for option in options()}
    sections = {PREFIX + section.upper() for section in Settings.model_fields}
    for name in variables:
        if (name in sections or "__" in name) and name.upper() not in known:
            raise SettingsError(f"{name} is no option: see `dovecote settings` for those there are.")


def _refuse_unknown_sections(variables: Mapping[str, str]) -> None:
    for name in variables:
        section, nested, _ = name.removeprefix(PREFIX).partition("__")
        if nested and section.lower() not in Settings.model_fields:
            raise SettingsError(f"{name} is no option: see `dovecote settings` for those there are.")


def given_variables(environ: Mapping[str, str], directory: Path | None = None) -> dict[str, str]:
    """Return our variables from the environment and `.env`, under their long names.

    Errors: SettingsError, see `chosen` and `dotenv`.
    """
    return chosen(_given(environ, directory))


def _given(environ: Mapping[str, str], directory: Path | None) -> list[Mapping[str, str]]:
    return [dotenv((directory or Path.cwd()) / ".env"), environ]


def _running_system(environ: Mapping[str, str]) -> dict[str, str]:
    system = StateDirectory.locate(environ).running()
    return system.environment if system else {}


def _sentence(error: ValidationError, variables: Mapping[str, str]) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    variable = PREFIX + "__".join(part.upper() for part in path)
    short = next((short for short, long in ALIASES.items() if long == variable), variable)
    field = _field(path)
    if field is None and len(path) == 1 and first["type"] == "missing":
        short = {"database": "DATABASE_URL", "redis": "REDIS_URL"}[path[0]]
        field = _field([path[0], "url"])
    wanted = field.description.rstrip(".") if field and field.description else "one of the options"
    if first["type"] == "missing":
        return f"{short} is missing: it wants {wanted} (or start a system of your own with `dovecote up`)."
    secret = field is not None and "SecretStr" in str(field.annotation)
    given = str(variables.get(variable, first.get("input")))
    got = "a secret value that does not fit" if secret else repr(without_passwords(given))
    return f"{short} got {got}, but wants {_want(first['msg'])} ({wanted[0].lower()}{wanted[1:]})."


def _want(message: str) -> str:
    """Return what Pydantic's message asks for, as a noun."""
    for prefix in ("Value error, ", "Input should be ", "String should "):
        message = message.removeprefix(prefix)
    message = message.split(", unable to")[0].replace("match pattern", "a text that matches")
    return f"a value {message}" if message.startswith(("greater", "less")) else message


def _field(path: list[str]) -> FieldInfo | None:
    section = Settings.model_fields.get(path[0].lower())
    if section is None or len(path) < 2:
        return None
    model: Any = section.annotation
    found: FieldInfo | None = model.model_fields.get(path[1].lower())
    return found


Option = Annotated[dict[str, str], "section, name, variable, long (its nested name), default, unit, meaning"]


def options() -> Iterator[Option]:
    """Yield every option in the order of the sections, for `dovecote settings` and docs/reference/settings.md."""
    for section, info in Settings.model_fields.items():
        model: Any = info.annotation
        for name, field in model.model_fields.items():
            variable = f"{PREFIX}{section.upper()}__{name.upper()}"
            yield {
                "section": section,
                "name": name,
                "variable": {long: short for short, long in ALIASES.items()}.get(variable, variable),
                "long": variable,
                "default": _default(field),
                "unit": _unit(name, field),
                "meaning": field.description or "",
            }


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is None else str(field.default)


def _unit(name: str, field: FieldInfo) -> str:
    for suffix, unit in {
        "_seconds": "seconds",
        "_ms": "milliseconds",
        "_weeks": "weeks",
        "_ahead": "weeks",
        "_size": "count",
        "_bytes": "bytes",
        "_rate": "0 to 1",
    }.items():
        if name.endswith(suffix):
            return unit
    if name.endswith("_ratio"):
        return "0 to 1"
    choices = get_args(field.annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " | ".join(choices)
    if name.endswith("url") or name == "otlp_endpoint":
        return "URL"
    if name.endswith(("_key", "_keys")):
        return "base64"
    return "path" if name.endswith("_path") else "port" if name.endswith("_port") else "text"


def secrets(settings: Settings) -> Iterator[str]:
    """Yield every secret text in force: keys, and the passwords of URLs, as they are written and as they are sent."""
    for section in Settings.model_fields:
        for _, value in getattr(settings, section):
            if isinstance(value, str) and "://" in value:
                yield from secrets_in(value)
            if not isinstance(value, SecretStr):
                continue
            text = value.get_secret_value()
            if "://" in text:
                yield from secrets_in(text)
            else:
                for part in text.split(","):
                    yield from keys.spellings((part.partition(":")[2] or part).strip())


def shown(settings: Settings) -> dict[str, dict[str, str]]:
    """Return every value in force as text, secrets masked: safe to print and to log."""
    return {
        section: {name: without_passwords(str(value)) for name, value in getattr(settings, section)}
        for section in Settings.model_fields
    }
