"""Every option, from every source, right and wrong; and no secret ever shown."""

import base64
import hashlib
import io
import json
import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from dovecote.processes.state_directory import StateDirectory
from dovecote.settings import Settings, SettingsError, load_settings, options, shown
from dovecote.settings.keys import weakness
from dovecote.telemetry.configure import configure
from tests.support import commands
from tests.support.keys import a_key

ROOT = Path(__file__).parents[3]

KEY, OTHER_KEY, THIRD_KEY = (a_key(name) for name in ("one", "other", "third"))
SECRET = "hunter2secret"
WELL = {"DATABASE_URL": f"postgresql://me:{SECRET}@db:5432/mine", "REDIS_URL": f"redis://:{SECRET}@cache:6379/3"}


def load(tmp_path: Path, variables: Mapping[str, str] = WELL) -> Settings:
    """Load from these variables and the `.env` in tmp_path, which is also the home."""
    return load_settings({"DOVECOTE_HOME": str(tmp_path), **variables}, directory=tmp_path)


def dovecote(tmp_path: Path, *arguments: str, variables: Mapping[str, str] = WELL) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "DOVECOTE_APP": "workers.app:app",
        "PYTHONPATH": str(ROOT),
        "DOVECOTE_HOME": str(tmp_path),
        **variables,
    }
    return commands.run_text([*arguments], environment, tmp_path)


# Where a value comes from ------------------------------------------------------------------------


def test_without_a_word_the_default_holds(tmp_path: Path) -> None:
    assert load(tmp_path).relay.batch_size == 2_000


def test_the_environment_beats_the_env_file_beats_the_running_system_beats_the_default(tmp_path: Path) -> None:
    name = "DOVECOTE_RELAY__BATCH_SIZE"
    home = StateDirectory(tmp_path)

    home.announce({name: "3"})
    from_system = load(tmp_path).relay.batch_size
    (tmp_path / ".env").write_text(f"{name}=4\n")
    from_file = load(tmp_path).relay.batch_size
    from_environment = load(tmp_path, {**WELL, name: "5"}).relay.batch_size
    home.withdraw()
    (tmp_path / ".env").unlink()

    assert (from_system, from_file, from_environment) == (3, 4, 5)
    assert load(tmp_path).relay.batch_size == 2_000


def test_a_running_system_gives_both_servers(tmp_path: Path) -> None:
    StateDirectory(tmp_path).announce(WELL)

    settings = load(tmp_path, {})

    assert settings.database.url.get_secret_value() == WELL["DATABASE_URL"]
    assert settings.redis.url.get_secret_value() == WELL["REDIS_URL"]


def test_a_system_that_died_gives_nothing(tmp_path: Path) -> None:
    gone = {"pid": 2**22 + 1, "started": 1, "environment": WELL}
    (tmp_path / "system.json").write_text(json.dumps(gone))

    with pytest.raises(SettingsError, match="DATABASE_URL is missing"):
        load(tmp_path, {})


def test_the_long_name_of_a_server_beats_the_short_one(tmp_path: Path) -> None:
    settings = load(tmp_path, {**WELL, "DOVECOTE_REDIS__URL": "redis://other:1/0"})

    assert settings.redis.url.get_secret_value() == "redis://other:1/0"


def test_an_empty_server_url_counts_as_not_given(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="DATABASE_URL is missing"):
        load(tmp_path, {**WELL, "DATABASE_URL": ""})


def test_commands_that_only_ask_postgres_need_no_redis(tmp_path: Path) -> None:
    variables = {"DOVECOTE_HOME": str(tmp_path), "DATABASE_URL": WELL["DATABASE_URL"]}

    assert load_settings(variables, tmp_path, needs_redis=False).database.pool_size == 5


def test_strangers_variables_are_none_of_our_business(tmp_path: Path) -> None:
    assert load(tmp_path, {**WELL, "PATH": "/bin", "DOVECOTE_VENV": "/x", "DOVECOTE_TEST_EMBEDDED": "1"})


# What is wrong ends the process with one sentence -------------------------------------------------

WRONG = {
    "not a whole number": ("DOVECOTE_RELAY__BATCH_SIZE", "many", "valid integer"),
    "too small": ("DOVECOTE_RELAY__BATCH_SIZE", "0", "greater than or equal to 1"),
    "too large": ("DOVECOTE_RELAY__BATCH_SIZE", "50001", "less than or equal to 50000"),
    "not a number": ("DOVECOTE_RELAY__POLL_INTERVAL_SECONDS", "soon", "valid number"),
    "no end": ("DOVECOTE_RELAY__RETRY_LEASE_SECONDS", "inf", "less than or equal to 86400"),
    "no number at all": ("DOVECOTE_SMS__FAILURE_RATE", "nan", "less than or equal to 1"),
    "none of the choices": ("DOVECOTE_TELEMETRY__LOG_LEVEL", "chatty", "'debug', 'info', 'warning' or 'error'"),
    "a word with a space": ("DOVECOTE_REDIS__NAMESPACE", "two words", "a text that matches"),
    "another database": ("DATABASE_URL", f"mysql://me:{SECRET}@db/mine", "starts with postgresql://"),
    "a port that is none": ("DATABASE_URL", f"postgresql://me:{SECRET}@db:port/mine", "libpq can read"),
    "an unknown parameter": ("DATABASE_URL", f"postgresql://me:{SECRET}@db/mine?nosuch=1", "libpq can read"),
    "another broker": ("REDIS_URL", f"amqp://me:{SECRET}@mq", "starts with redis://"),
    "a redis port that is none": ("REDIS_URL", f"redis://:{SECRET}@cache:port/0", "a number for the port"),
    "a redis database with a name": ("REDIS_URL", f"redis://:{SECRET}@cache:6379/mine", "number for the database"),
    "another cache": ("DOVECOTE_REDIS__CACHE_URL", f"memcached://{SECRET}", "starts with redis://"),
    "a key that is not base64": ("DOVECOTE_PRIVACY__HASH_KEY", f"{SECRET}!", "this is not base64"),
    "a short key": ("DOVECOTE_PRIVACY__CODE_KEY", base64.b64encode(SECRET.encode()).decode(), "32 bytes, got 13"),
    "an empty key": ("DOVECOTE_PRIVACY__CODE_KEY", "", "32 bytes, got 0"),
    "a key without its id": ("DOVECOTE_PRIVACY__ENCRYPTION_KEYS", KEY, "id:base64 pairs"),
    "a key id twice": ("DOVECOTE_PRIVACY__ENCRYPTION_KEYS", f"k:{KEY},k:{KEY}", "an id is given twice"),
    "a misspelt option": ("DOVECOTE_RELAY__BACTH_SIZE", SECRET, "is no option"),
    "a misspelt section": ("DOVECOTE_RELYA__BATCH_SIZE", SECRET, "is no option"),
    "a whole section": ("DOVECOTE_RELAY", f'{{"batch_size": "{SECRET}"}}', "is no option"),
}


@pytest.mark.parametrize(("name", "value", "wants"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_one_sentence_with_name_and_wish_and_without_the_secret(
    tmp_path: Path, name: str, value: str, wants: str
) -> None:
    with pytest.raises(SettingsError) as refusal:
        load(tmp_path, {**WELL, name: value})

    sentence = str(refusal.value)
    assert sentence.startswith(f"{name} ")
    assert wants in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    if "_URL" in name or "PRIVACY" in name or "no option" in sentence:
        assert not value or value not in sentence
        assert SECRET not in sentence
        assert KEY not in sentence
    else:
        assert repr(value) in sentence


@pytest.mark.parametrize("missing", ["DATABASE_URL", "REDIS_URL"])
def test_a_missing_server_is_one_sentence_that_says_what_to_do(tmp_path: Path, missing: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        load(tmp_path, {name: url for name, url in WELL.items() if name != missing})

    assert str(refusal.value).startswith(f"{missing} is missing: it wants ")
    assert "`dovecote up`" in str(refusal.value)


@pytest.mark.parametrize("missing", ["HASH_KEY", "ENCRYPTION_KEYS", "CODE_KEY"])
def test_a_missing_key_is_named_when_it_is_needed(tmp_path: Path, missing: str) -> None:
    keys = {"HASH_KEY": KEY, "ENCRYPTION_KEYS": f"k1:{OTHER_KEY}", "CODE_KEY": THIRD_KEY}
    del keys[missing]

    settings = load(tmp_path, {**WELL, **{f"DOVECOTE_PRIVACY__{name}": key for name, key in keys.items()}})

    with pytest.raises(SettingsError, match=f"DOVECOTE_PRIVACY__{missing} is missing") as refusal:
        settings.keyring()
    assert KEY not in str(refusal.value)


def test_an_env_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"DOVECOTE_RELAY__BATCH_SIZE=\xff\xfe\n")

    with pytest.raises(SettingsError, match=r"\.env cannot be read"):
        load(tmp_path)


def test_a_wrong_value_ends_the_command_with_exit_code_2_and_nothing_else(tmp_path: Path) -> None:
    done = dovecote(tmp_path, "status", variables={**WELL, "DOVECOTE_RELAY__BATCH_SIZE": "many"})

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "dovecote: DOVECOTE_RELAY__BATCH_SIZE got 'many', but wants a valid integer (most events of one batch).\n"
    )


def of_dramatiq(*queues: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Dramatiq's workers without a server until they give up, or ask Redis for messages."""
    command = ["dramatiq", "dovecote.bootstrap:consumers", "--path", "--processes", "1", "--threads", "1"]
    command += ["--worker-shutdown-timeout", "100"]
    started = subprocess.Popen(
        [*command, *(["--queues", *queues] if queues else [])],
        env={"PATH": os.environ["PATH"], "DOVECOTE_APP": "workers.app:app", "PYTHONPATH": str(ROOT), **variables},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert started.stdout is not None
    said = ""
    for line in started.stdout:
        said += line
        if "Consumer encountered a connection error" in line:  # it looks for messages
            started.terminate()
    return subprocess.CompletedProcess(started.args, started.wait(), said)


NO_SERVERS = {"DATABASE_URL": "postgresql://x@127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1/0"}


def test_consumers_that_need_keys_end_without_them_with_exit_code_2_and_one_sentence(tmp_path: Path) -> None:
    done = of_dramatiq("pricing", "verification", DOVECOTE_HOME=str(tmp_path), **NO_SERVERS)

    assert done.returncode == 2
    assert "dovecote: DOVECOTE_PRIVACY__HASH_KEY is missing: it wants 32 bytes in base64" in done.stdout
    assert "Traceback" not in done.stdout


def test_consumers_that_need_no_keys_start_without_them(tmp_path: Path) -> None:
    done = of_dramatiq("pricing", "billing", DOVECOTE_HOME=str(tmp_path), **NO_SERVERS)

    assert "Consumer encountered a connection error" in done.stdout
    assert "PRIVACY" not in done.stdout


WEAK = {
    "zeros": (bytes(32), "is one byte repeated"),
    "ones": (b"\xff" * 32, "is one byte repeated"),
    "a word again and again": (b"0123\x00\xff\x80\x01" * 4, "repeats itself after 8 bytes"),
    "a key half as long, twice": (hashlib.sha256(b"half").digest()[:16] * 2, "repeats itself after 16 bytes"),
    "a text": (b"changeme changeme please, do it!", "is a text"),
    "hexadecimal digits": (hashlib.sha256(b"hex").hexdigest()[:32].encode(), "is a text"),
    "a text with a line end": (b"a password of thirty-one bytes!\n", "is a text"),
    "counting": (bytes(range(32)), "is a pattern"),
    "counting by threes": (bytes(range(0, 96, 3)), "is a pattern"),
    "a short secret and zeros": (hashlib.sha256(b"short").digest()[:10] + bytes(22), "is a pattern"),
}


@pytest.mark.parametrize("name", ["HASH_KEY", "CODE_KEY", "ENCRYPTION_KEYS"])
@pytest.mark.parametrize(("key", "why"), WEAK.values(), ids=WEAK)
def test_a_weak_key_is_refused_and_not_shown(tmp_path: Path, name: str, key: bytes, why: str) -> None:
    text = base64.b64encode(key).decode()
    value = f"k1:{KEY}, k0:{text}" if name == "ENCRYPTION_KEYS" else text

    with pytest.raises(SettingsError, match=f"^DOVECOTE_PRIVACY__{name} .*{why}.*openssl rand -base64 32") as refusal:
        load(tmp_path, {**WELL, f"DOVECOTE_PRIVACY__{name}": value})

    assert text not in str(refusal.value)
    assert KEY not in str(refusal.value)
    if name == "ENCRYPTION_KEYS":
        assert "key k0" in str(refusal.value)


EQUAL = {
    "two options": {"HASH_KEY": KEY, "CODE_KEY": KEY},
    "one of several": {"CODE_KEY": KEY, "ENCRYPTION_KEYS": f"k2:{OTHER_KEY},k1:{KEY}"},
    "two of one option": {"ENCRYPTION_KEYS": f"k2:{KEY},k1:{KEY}"},
}


@pytest.mark.parametrize("keys", EQUAL.values(), ids=EQUAL)
def test_one_key_for_two_purposes_is_refused_with_both_names(tmp_path: Path, keys: Mapping[str, str]) -> None:
    with pytest.raises(SettingsError, match="are the same") as refusal:
        load(tmp_path, {**WELL, **{f"DOVECOTE_PRIVACY__{name}": value for name, value in keys.items()}})

    assert all(name in str(refusal.value) for name in keys)
    assert KEY not in str(refusal.value)


@given(st.binary(min_size=32, max_size=32).map(lambda seed: hashlib.sha256(seed).digest()))
def test_no_random_key_is_called_weak(key: bytes) -> None:
    assert weakness(key) is None


# No secret is shown ------------------------------------------------------------------------------

SECRETIVE = {
    **WELL,
    "DOVECOTE_REDIS__CACHE_URL": f"redis://:{SECRET}@cache/4",
    "DOVECOTE_PRIVACY__HASH_KEY": KEY,
    "DOVECOTE_PRIVACY__ENCRYPTION_KEYS": f"k1:{OTHER_KEY}",
    "DOVECOTE_PRIVACY__CODE_KEY": THIRD_KEY,
    "DOVECOTE_TELEMETRY__OTLP_ENDPOINT": f"https://me:{SECRET}@collector:4318",
}


def assert_no_secret_in(text: str) -> None:
    assert text
    assert SECRET not in text
    assert not [key for key in (KEY, OTHER_KEY, THIRD_KEY) if key in text]


@pytest.mark.parametrize("arguments", [["--in-force"], ["--in-force", "--json"], ["--json"], ["--markdown"], []])
def test_no_printout_of_the_settings_holds_a_secret(tmp_path: Path, arguments: list[str]) -> None:
    done = dovecote(tmp_path, "settings", *arguments, variables=SECRETIVE)

    assert done.returncode == 0
    assert_no_secret_in(done.stdout)
    assert done.stderr == ""


def test_the_values_in_force_are_shown_with_secrets_masked(tmp_path: Path) -> None:
    done = dovecote(tmp_path, "settings", "--in-force", "--json", variables=SECRETIVE)

    values = json.loads(done.stdout)
    assert values["relay"]["batch_size"] == "2000"
    assert values["database"]["url"] == "**********"
    assert values["privacy"] == dict.fromkeys(("hash_key", "encryption_keys", "code_key"), "**********")
    assert values["telemetry"]["otlp_endpoint"] == "https://me:***@collector:4318"


def test_neither_repr_nor_a_log_shows_a_secret(tmp_path: Path) -> None:
    settings = load(tmp_path, SECRETIVE)
    log = io.StringIO()
    before = logging.getLogger().handlers[:]

    configure(settings.telemetry, "test")
    try:
        for handler in logging.getLogger().handlers:
            assert isinstance(handler, logging.StreamHandler)
            handler.setStream(log)
        structlog.get_logger().warning("seen", database=settings.database, urls=[WELL["DATABASE_URL"]], key=settings)
        logging.getLogger("a.library").warning("cannot connect to %s", WELL["REDIS_URL"])
    finally:
        logging.getLogger().handlers[:] = before
        structlog.reset_defaults()

    assert "cannot connect to redis://:***@cache" in log.getvalue()
    assert_no_secret_in(log.getvalue())
    assert_no_secret_in(str(shown(settings)))
    assert_no_secret_in(repr(settings.database) + repr(settings.redis) + repr(settings.privacy))


# Every option is documented ----------------------------------------------------------------------


def test_every_option_has_a_meaning_and_a_unit() -> None:
    for option in options():
        assert option["meaning"].endswith("."), option["variable"]
        assert option["unit"], option["variable"]


def test_the_env_example_lists_every_option_and_sets_none() -> None:
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    named = [line.removeprefix("#").partition("=")[0].strip() for line in lines if "=" in line]

    for_compose = {"COMPOSE_FILE"}
    assert [name for name in named if name not in for_compose] == [option["variable"] for option in options()]
    assert all(not line or line.startswith("#") for line in lines)


def test_the_env_example_shows_the_defaults() -> None:
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    shown_values = dict(line.removeprefix("#").strip().split("=", 1) for line in lines if "=" in line)

    for option in options():
        if option["default"] not in ("required", ""):
            assert shown_values[option["variable"]] == option["default"]
