"""Lines that protect where code, settings and connections come from, and what strangers can hold of a port."""

from tests.mutations.mutant import Mutant

START = "tests/security/test_start.py"
OWNERSHIP = "tests/security/test_ownership.py"
CONNECTIONS = "tests/security/test_connections.py"
HTTP = "tests/security/test_http.py"
SETTINGS = "tests/dovecote/settings/test_settings.py"
VARIABLES = "tests/dovecote/settings/test_variables.py"

OWNED = "dovecote/processes/ownership.py"
SERVING = "dovecote/exporter/http.py"

SETTINGS_AND_CONNECTIONS = (
    Mutant(
        "started by hand it imports from there",
        "dovecote/__init__.py",
        '    sys.path[:] = [entry for entry in sys.path if entry not in ("", ".")]\n',
        "",
        START,
    ),
    Mutant(
        "a supervised child imports from there",
        "dovecote/local/supervisor.py",
        ', "PYTHONSAFEPATH": "1"',
        "",
        "tests/dovecote/local/test_supervisor.py",
    ),
    Mutant(
        "a stranger's file decides",
        OWNED,
        "    if status.st_uid not in (0, os.geteuid()):\n",
        "    if False:\n",
        OWNERSHIP,
    ),
    Mutant("a file that all may write decides", OWNED, "if status.st_mode & stat.S_IWOTH:", "if False:", OWNERSHIP),
    Mutant("a file in a directory of all decides", OWNED, "        _require_directory(path.parent)\n", "", OWNERSHIP),
    Mutant(
        "a value and a file for one option",
        "dovecote/settings/variables.py",
        "if before and before.value and value and (before.is_file or given.is_file):",
        "if False:",
        VARIABLES,
    ),
    Mutant(
        "strangers may connect to a server of our own",
        "dovecote/migrations/schema.py",
        "'revoke connect, temporary on database %I from public'",
        "'revoke temporary on database %I from public'",
        "tests/dovecote/local/test_system.py",
    ),
    Mutant(
        "what others wrote in Redis ends who reads it",
        "workers/gateways/challenge_cache.py",
        "except (RedisError, UnicodeDecodeError) as error:",
        "except RedisError as error:",
        "tests/workers/gateways/test_gateways.py",
    ),
    Mutant(
        "a weak key is taken", "dovecote/settings/__init__.py", "if why := keys.weakness(given):", "if False:", SETTINGS
    ),
    Mutant(
        "one key for two purposes",
        "dovecote/settings/keys.py",
        "            if key in seen:\n",
        "            if False:\n",
        SETTINGS,
    ),
    Mutant(
        "consumers that need keys start without them",
        "dovecote/bootstrap.py",
        "if self._queues & (asked_for or self._queues):",
        "if False:",
        SETTINGS,
    ),
    Mutant(
        "options of the URL get lost",
        "dovecote/store/connections.py",
        "{given.pop('options', None) or ''} ",
        "{given.pop('options', None) and ''} ",
        CONNECTIONS,
    ),
    Mutant(
        "what has no variable gets lost",
        "dovecote/local/clients.py",
        "        carried |= _service_with(rest)\n",
        "        pass\n",
        CONNECTIONS,
    ),
    Mutant(
        "a password in a parameter is no secret",
        "dovecote/settings/urls.py",
        '    for pair in parts.query.replace(";", "&").split("&"):\n',
        "    for pair in ():\n",
        CONNECTIONS,
    ),
    Mutant(
        "Redis' password is told to a stranger",
        "dovecote/local/servers.py",
        "if not listens(pid, self._port):",
        "if False:",
        CONNECTIONS,
    ),
    Mutant(
        "TLS that anybody may answer is good enough",
        "dovecote/operations/doctor/encryption.py",
        'if mode in _VERIFIED or binding == "require":',
        "if True:",
        CONNECTIONS,
    ),
    Mutant("no end of connections", SERVING, "if len(self._connections) >= MAX_CONNECTIONS:", "if False:", HTTP),
    Mutant(
        "a byte now and then keeps a connection",
        SERVING,
        "if one.ends_at <= now]",
        "if False]",
        HTTP,
    ),
    Mutant(
        "health tells strangers what is wrong",
        "dovecote/exporter/health.py",
        'if detail and status == "up" else {}',
        "if detail else {}",
        HTTP,
    ),
    Mutant(
        "where metrics will be can be guessed",
        "dovecote/exporter/metrics.py",
        "key=hashlib.sha256(secret.encode()).digest()",
        'key=hashlib.sha256(b"").digest()',
        HTTP,
    ),
)
