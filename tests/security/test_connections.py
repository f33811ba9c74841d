"""Attack: a word about TLS gets lost between DATABASE_URL and a connection; somebody on the way is the server then."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from psycopg.conninfo import conninfo_to_dict

from dovecote.broker.redis_client import connect_redis
from dovecote.local.clients import libpq_variables
from dovecote.local.servers import Postgres, Redis
from dovecote.operations.doctor import encryption
from dovecote.operations.doctor.finding import Subject
from dovecote.operations.doctor.postgres import session
from dovecote.processes.children import ServerUser, listens, runs_as
from dovecote.settings import SettingsError, load_settings, secrets, shown
from dovecote.settings.urls import without_passwords
from dovecote.store.connections import SESSION_SETTINGS, connect, connection_parameters
from tests.conftest import settings_for
from tests.support import commands
from tests.support.processes import a_place_for_servers

ROOT = Path(__file__).parents[2]

URLS = {
    "TLS": "postgresql://u:pw@db.example:5432/d?sslmode=verify-full&sslrootcert=/etc/ca.pem&sslcert=/c&sslkey=/k"
    "&sslpassword=k3y&sslcrl=/crl&sslsni=1&ssl_min_protocol_version=TLSv1.3&sslnegotiation=direct",
    "authentication": "postgresql://u@db/d?channel_binding=require&require_auth=scram-sha-256&passfile=/p&requirepeer=pg"
    "&gssencmode=require&krbsrvname=pg",
    "several hosts": "postgresql://u:pw@one:1,two:2/d?target_session_attrs=read-write&load_balance_hosts=random",
    "several as words": "postgresql:///d?host=one,two&port=1,2&hostaddr=10.0.0.1,10.0.0.2&user=u",
    "a socket": "postgresql://u@%2Frun%2Fpostgresql/d",
    "a socket as a word": "postgresql:///d?host=/run/postgresql&user=u",
    "IPv6": "postgresql://u:pw@[2001:db8::1]:5/d",
    "percent": "postgresql://a%40b:p%25w%2F%3F%23@db/d%20d?application_name=a%26b",
    "password as a word": "postgresql://db.example/d?user=u&password=querysecret1",
    "time": "postgresql://u@db/d?connect_timeout=77&keepalives=0&keepalives_idle=9&tcp_user_timeout=5",
    "options": "postgresql://u@db/d?options=-csearch_path%3Dx%20-c%20work_mem%3D64kB",
    "replication": "postgresql://u@db/d?fallback_application_name=f&replication=database",
}


def read(url: str) -> dict[str, str]:
    return {keyword: str(value) for keyword, value in conninfo_to_dict(url).items()}


def assert_all_is_there(url: str, given: Mapping[str, object]) -> None:
    """All that libpq reads in the URL; `options` may say more than that, and the encoding is ours."""
    for keyword, value in read(url).items():
        if keyword == "options":
            assert value in str(given["options"])
        else:
            assert str(given[keyword]) == value


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_our_own_connections_are_given_every_word(url: str) -> None:
    given = connection_parameters(url, SESSION_SETTINGS, connect_timeout=5, application_name="ours", keepalives_idle=5)

    assert_all_is_there(url, given)
    assert given["client_encoding"] == "utf8"
    assert "-c timezone=UTC" in str(given["options"])
    assert str(given["options"]).startswith(str(read(url).get("options", "-c")))


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_settings_take_it_and_an_engine_connects_with_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def noted(*_: object, **parameters: Any) -> None:
        seen.append(parameters)
        raise psycopg.OperationalError("noted")

    monkeypatch.setattr(psycopg.Connection, "connect", noted)
    settings = load_settings({"DOVECOTE_HOME": str(tmp_path), "DATABASE_URL": url, "REDIS_URL": "redis://r"}, tmp_path)

    with pytest.raises(Exception, match="noted"):
        connect(settings.database.url.get_secret_value()).connect()

    assert_all_is_there(url, seen[0])


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_exec_hands_every_word_on(url: str, tmp_path: Path) -> None:
    program = (
        "import os, json; service = os.environ.get('PGSERVICEFILE'); "
        "print(json.dumps([dict(os.environ), open(service).read() if service else '']))"
    )
    done = commands.run_text(
        ["exec", sys.executable, "-c", program],
        {
            "PATH": os.environ["PATH"],
            "DOVECOTE_APP": "workers.app:app",
            "PYTHONPATH": str(ROOT),
            "DOVECOTE_HOME": str(tmp_path),
            "DATABASE_URL": url,
            "REDIS_URL": "redis://r/0",
        },
        tmp_path,
    )
    environment, service = json.loads(done.stdout)
    names = {option.keyword.decode(): (option.envvar or b"").decode() for option in psycopg.pq.Conninfo.get_defaults()}
    in_service = dict(line.split("=", 1) for line in service.splitlines()[1:])
    found = {name: environment[variable] for name, variable in names.items() if variable in environment}

    assert_all_is_there(url, {**found, **in_service})
    assert set(in_service) == {name for name in read(url) if not names[name]}
    assert environment["PGOPTIONS"].startswith("-c search_path=dovecote,public")


@pytest.mark.parametrize(
    ("url", "environ"),
    [
        ("postgresql://u@db/d?service=s&sslmode=verify-full", {}),
        ("postgresql://u@db/d", {"PGSERVICE": "another"}),
        ("postgresql://u@db/d?sslpassword=a%0Ab", {}),
    ],
)
def test_what_exec_cannot_hand_on_is_refused(url: str, environ: Mapping[str, str]) -> None:
    with pytest.raises(SettingsError, match="psql would"):
        libpq_variables(url, environ)


def test_a_service_alone_is_handed_on() -> None:
    assert libpq_variables("postgresql:///?service=s", {})["PGSERVICE"] == "s"


SECRETS = {
    "postgresql://db/d?user=u&password=one%2Fsecret": {"one/secret", "one%2Fsecret"},
    "postgresql://u:two%40secret@db/d?sslpassword=three3": {"two@secret", "two%40secret", "three3"},
    "redis://r/0?password=four4": {"four4"},
    "rediss://u:five5@r/0?ssl_password=six6": {"five5", "six6"},
    "http://tokentoken@collector:4318": {"tokentoken"},
    "https://u:p@ss@collector": {"p@ss"},
    "https://collector/v1?api_key=seven7": {"seven7"},
}


@pytest.mark.parametrize(("url", "hidden"), SECRETS.items())
def test_a_secret_is_known_and_not_shown_wherever_a_url_has_it(url: str, hidden: set[str], tmp_path: Path) -> None:
    variables = {"DATABASE_URL": "postgresql://db/d", "REDIS_URL": "redis://r"}
    name = {"p": "DATABASE_URL", "r": "REDIS_URL", "h": "DOVECOTE_TELEMETRY__OTLP_ENDPOINT"}[url[0]]
    settings = load_settings({"DOVECOTE_HOME": str(tmp_path), **variables, name: url}, tmp_path)

    assert set(secrets(settings)) == hidden
    for text in (str(shown(settings)), without_passwords(f"cannot connect to {url}, or so")):
        assert not [secret for secret in hidden if secret in text]


def test_a_parameter_that_redis_does_not_know_is_refused_at_the_start(tmp_path: Path) -> None:
    variables = {"DATABASE_URL": "postgresql://db/d", "REDIS_URL": "redis://:s3cretword@r/0?ssl_cert_reqs=none"}

    with pytest.raises(SettingsError, match="parameters that redis-py knows") as refusal:
        load_settings({"DOVECOTE_HOME": str(tmp_path), **variables}, tmp_path)

    assert "s3cretword" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    ["unix:///run/redis.sock?db=2&password=p", "rediss://u:p@r:1/2?ssl_ca_certs=/ca&ssl_check_hostname=True"],
)
def test_redis_is_connected_to_as_its_url_says(url: str) -> None:
    connection: Any = connect_redis(url, 1.0).connection_pool.make_connection()

    assert (connection.db, connection.password) == (2, "p")
    assert getattr(connection, "path", "") == ("/run/redis.sock" if url.startswith("unix") else "")


# The port of a server of ours --------------------------------------------------------------------


def test_an_impostor_on_redis_s_port_never_gets_the_password(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        impostor.settimeout(0.2)
        redis = Redis(tmp_path)
        redis._password, redis._port = "a password", impostor.getsockname()[1]

        with subprocess.Popen(["/bin/sleep", "60"], **runs_as(ServerUser.chosen())) as server:
            assert redis._answers(server.pid) is None  # started, and slower
            server.kill()
        with pytest.raises(TimeoutError):
            impostor.accept()
        assert listens(os.getpid(), redis._port)
        assert not listens(2**22 + 1, redis._port), "a process that has ended"


def test_our_own_postgres_is_asked_for_scram_only(tmp_path: Path) -> None:
    said = []
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def ask_for_the_password() -> None:
            stream, _ = impostor.accept()
            said.append(stream.recv(1_000))
            if said[-1][4:8] == b"\x04\xd2\x16\x2f":  # an SSLRequest: no
                stream.sendall(b"N")
                said.append(stream.recv(1_000))
            stream.sendall(b"R\0\0\0\x08\0\0\0\x03")  # in cleartext, please
            said.append(stream.recv(1_000))

        asking = threading.Thread(target=ask_for_the_password, daemon=True)
        asking.start()
        port = impostor.getsockname()[1]
        url = f"postgresql://dovecote:{quote('our password')}@127.0.0.1:{port}/dovecote?require_auth=scram-sha-256"
        with pytest.raises(psycopg.OperationalError, match="authentication method requirement"):
            psycopg.connect(**connection_parameters(f"{url}&gssencmode=disable", SESSION_SETTINGS))
        asking.join(10)

    assert b"our password" not in b"".join(said)


# What doctor finds -------------------------------------------------------------------------------

DEBIAN = {"DOVECOTE_POSTGRES_BIN": "/usr/lib/postgresql/15/bin"}


def our_address() -> str:
    """An address of this machine that is not the loopback; a datagram that is never sent finds it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but the loopback")
        address: str = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no address but the loopback")
    return address


def self_signed(address: str, place: Path) -> tuple[Path, Path]:
    """Write a certificate for the address, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = place / "server.crt", place / "server.key"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key_file.write_bytes(key.private_bytes(*pem))
    key_file.chmod(0o600)
    if user := ServerUser.chosen():
        os.chown(key_file, user.uid, user.gid)
    return cert_file, key_file


@pytest.fixture(scope="module")
def with_tls() -> Iterator[tuple[str, Path]]:
    """A URL without parameters, of a Postgres that listens beyond the loopback, and the file of its CA."""
    if not Path(DEBIAN["DOVECOTE_POSTGRES_BIN"]).exists():
        pytest.skip("the wheel's Postgres has no TLS, and Debian's is not installed")
    address = our_address()
    with a_place_for_servers() as place:
        certificate, key = self_signed(address, place)
        files = {"ssl_cert_file": str(certificate), "ssl_key_file": str(key)}
        settings = {"fsync": "off", "ssl": "on", "listen_addresses": "*", **files}
        postgres = Postgres(place / "postgres", settings, environ={**os.environ, **DEBIAN})
        try:
            server = postgres.start()
            with (server.data / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {address}/32 scram-sha-256\n")
            with psycopg.connect(server.url, autocommit=True) as connection:
                connection.execute("select pg_reload_conf()")
            yield server.url.replace("127.0.0.1", address), certificate
        finally:
            postgres.stop()


TLS = {
    "sslmode=disable": ("warning", "not encrypted"),
    "sslmode=prefer": ("warning", "TLS, but sslmode=prefer"),
    "sslmode=require": ("warning", "TLS, but sslmode=require"),
    "sslmode=require&channel_binding=require": ("ok", "channel_binding=require"),
    "sslmode=verify-full&sslrootcert=CA": ("ok", "TLS, sslmode=verify-full"),
}


@pytest.mark.parametrize(("words", "finding"), TLS.items())
def test_doctor_says_what_the_session_is_and_how_to_mend_it(
    with_tls: tuple[str, Path], words: str, finding: tuple[str, str], tmp_path: Path
) -> None:
    url, authority = with_tls
    url = f"{url}?{words.replace('CA', quote(str(authority)))}"
    subject = Subject(settings_for(url, "redis://r/0", tmp_path), (), time.time)
    with session(subject) as connection:  # as doctor opens it: its rows have names
        found = encryption.postgres(connection)

    assert (found.check, found.level) == ("postgres.encrypted", finding[0])
    assert finding[1] in found.found
    assert ("verify-full" in found.advice) == (found.level == "warning")


def test_psql_by_exec_refuses_a_server_that_another_authority_vouches_for(
    with_tls: tuple[str, Path], tmp_path: Path
) -> None:
    url, right = with_tls
    wrong, _ = self_signed("192.0.2.1", tmp_path)
    psql = f"{DEBIAN['DOVECOTE_POSTGRES_BIN']}/psql"

    def asked(authority: Path) -> subprocess.CompletedProcess[str]:
        variables = {
            "PATH": os.environ["PATH"],
            "DOVECOTE_APP": "workers.app:app",
            "PYTHONPATH": str(ROOT),
            "DOVECOTE_HOME": str(tmp_path),
            "DATABASE_URL": f"{url}?sslmode=verify-full&sslrootcert={quote(str(authority))}&keepalives=1",
            "REDIS_URL": "redis://r/0",
        }
        return commands.run_text(["exec", psql, "-Atc", "select 6 * 7"], variables, tmp_path)

    assert asked(right).stdout == "42\n"
    refused = asked(wrong)
    assert refused.returncode == 2
    assert "certificate verify failed" in refused.stderr


REDIS = {
    "redis://:p@127.0.0.1:1/0": "ok",
    "redis://localhost": "ok",
    "unix:///run/redis.sock": "ok",
    "rediss://r.example": "ok",
    "redis://192.0.2.1": "warning",
    "rediss://r.example?ssl_cert_reqs=none": "warning",
    "rediss://r.example?ssl_cert_reqs=optional": "warning",
    "rediss://r.example?ssl_check_hostname=False": "warning",
}


@pytest.mark.parametrize(("url", "level"), REDIS.items())
def test_doctor_judges_redis_by_its_url(url: str, level: str) -> None:
    found = encryption.redis({"REDIS_URL": connect_redis("unix:///x", 1.0), "OTHER": connect_redis(url, 1.0)})

    assert (found.check, found.level) == ("redis.encrypted", level)
    assert found.found.startswith("OTHER: ") == (level == "warning")
