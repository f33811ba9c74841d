"""A value may lie in a file: `DATABASE_URL_FILE=/run/secrets/database_url` stands for DATABASE_URL."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from dovecote.settings import Settings, SettingsError, load_settings, options
from dovecote.settings.variables import without_options

SECRET = "hunter2secret"
DATABASE, REDIS = f"postgresql://me:{SECRET}@db:5432/mine", f"redis://:{SECRET}@cache:6379/3"


def load(tmp_path: Path, variables: Mapping[str, str]) -> Settings:
    return load_settings({"DOVECOTE_HOME": str(tmp_path), **variables}, directory=tmp_path)


def secret_file(directory: Path, content: str | bytes, mode: int = 0o444) -> str:
    path = directory / f"secret{len(list(directory.iterdir()))}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return str(path)


def test_every_option_may_lie_in_a_file(tmp_path: Path) -> None:
    values = {"url": DATABASE, "broker": REDIS, "host": "::1", "number": "7"}
    files = {name: secret_file(tmp_path, f"{value}\n") for name, value in values.items()}

    settings = load(
        tmp_path,
        {
            "DATABASE_URL_FILE": files["url"],
            "DOVECOTE_REDIS__URL_FILE": files["broker"],
            "DOVECOTE_TELEMETRY__HTTP_HOST_FILE": files["host"],
            "DOVECOTE_RELAY__BATCH_SIZE_FILE": files["number"],
        },
    )

    assert settings.database.url.get_secret_value() == DATABASE
    assert settings.redis.url.get_secret_value() == REDIS
    assert (settings.telemetry.http_host, settings.relay.batch_size) == ("::1", 7)
    assert not any(option["long"].endswith("_FILE") for option in options()), "the ending is taken"


@pytest.mark.parametrize("content", [DATABASE, f"{DATABASE}\n", f"{DATABASE}\r\n"])
def test_a_line_end_is_no_part_of_the_value(tmp_path: Path, content: str) -> None:
    settings = load(tmp_path, {"DATABASE_URL_FILE": secret_file(tmp_path, content), "REDIS_URL": REDIS})

    assert settings.database.url.get_secret_value() == DATABASE


@pytest.mark.parametrize("value", ["DATABASE_URL", "DOVECOTE_DATABASE__URL"])
@pytest.mark.parametrize("file", ["DATABASE_URL_FILE", "DOVECOTE_DATABASE__URL_FILE"])
def test_a_value_and_a_file_are_one_too_many(tmp_path: Path, value: str, file: str) -> None:
    variables = {value: DATABASE, file: secret_file(tmp_path, DATABASE), "REDIS_URL": REDIS}

    for given in (variables, dict(reversed(variables.items()))):
        with pytest.raises(SettingsError, match=r"are both given: keep one of them\.$") as refusal:
            load(tmp_path, given)
        assert value in str(refusal.value)
        assert file in str(refusal.value)
        assert SECRET not in str(refusal.value)


def test_what_compose_passes_on_as_empty_counts_as_not_given(tmp_path: Path) -> None:
    url = secret_file(tmp_path, DATABASE)
    empty = {"DATABASE_URL": "", "REDIS_URL_FILE": "", "DOVECOTE_REDIS__CACHE_URL_FILE": "", "REDIS_URL": REDIS}

    settings = load(tmp_path, {**empty, "DATABASE_URL_FILE": url})

    assert settings.database.url.get_secret_value() == DATABASE
    assert settings.redis.cache_url is None


def test_a_stronger_source_wins_and_the_weaker_one_s_file_is_not_even_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DATABASE_URL_FILE=/nowhere\nREDIS_URL=redis://weak\n", encoding="utf-8")

    settings = load(tmp_path, {"DATABASE_URL": DATABASE, "REDIS_URL_FILE": secret_file(tmp_path, REDIS)})

    assert settings.database.url.get_secret_value() == DATABASE
    assert settings.redis.url.get_secret_value() == REDIS


BAD = {
    "missing": ("/nowhere/at/all", "cannot be read: No such file or directory"),
    "a directory": ("/", "Is a directory"),
    "a device": ("/dev/zero", "is no regular file"),
    "no path": ("/a\0b", "this is no path"),
}


@pytest.mark.parametrize(("path", "why"), BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path, path: str, why: str) -> None:
    with pytest.raises(SettingsError, match=r"^DATABASE_URL_FILE names ") as refusal:
        load(tmp_path, {"DATABASE_URL_FILE": path, "REDIS_URL": REDIS})

    assert why in str(refusal.value)
    assert str(refusal.value).endswith(".")


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        ("", 0o444, "is empty"),
        ("\n", 0o444, "is empty"),
        (b"\xff\xfe", 0o444, "is no UTF-8 text"),
        ("x" * 70_000, 0o444, "is larger than 65536 bytes"),
        (DATABASE, 0o666, "everybody may write"),
    ],
)
def test_a_file_that_holds_no_value_is_a_sentence(tmp_path: Path, content: str | bytes, mode: int, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        load(tmp_path, {"DATABASE_URL_FILE": secret_file(tmp_path, content, mode), "REDIS_URL": REDIS})


def test_a_pipe_does_not_hold_up_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(SettingsError, match="is no regular file"):
        load(tmp_path, {"DATABASE_URL_FILE": str(tmp_path / "pipe"), "REDIS_URL": REDIS})


def test_a_wrong_value_in_a_file_is_not_shown(tmp_path: Path) -> None:
    file = secret_file(tmp_path, f"mysql://me:{SECRET}@db/mine")

    with pytest.raises(SettingsError, match="DATABASE_URL got a secret value") as refusal:
        load(tmp_path, {"DATABASE_URL_FILE": file, "REDIS_URL": REDIS})

    assert SECRET not in str(refusal.value)


def test_a_child_gets_no_file_beside_the_value() -> None:
    kept = {"PATH": "/bin", "DOVECOTE_HOME": "/h", "DATABASE_URLS": "x", "DOVECOTE_POSTGRES_BIN": "/p"}
    ours = dict.fromkeys(
        ("DATABASE_URL", "DATABASE_URL_FILE", "REDIS_URL_FILE", "DOVECOTE_PRIVACY__HASH_KEY_FILE"), "x"
    )

    assert without_options({**kept, **ours}) == kept
