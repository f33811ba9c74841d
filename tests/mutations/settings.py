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
        f"{START}::test_ours_are_not_imported_from_there_although_python_searches_there_first[dramatiq]",
    ),
    Mutant(
        "a supervised child imports from there",
        "dovecote/local/supervisor.py",
        ', "PYTHONSAFEPATH": "1"',
        "",
        "tests/dovecote/local/test_supervisor.py::test_a_child_imports_nothing_from_where_we_stand",
    ),
    Mutant(
        "a stranger's file decides",
        OWNED,
        "    if status.st_uid not in (0, os.geteuid()):\n",
        "    if False:\n",
        f"{OWNERSHIP}::test_an_env_file_that_others_decide_about_is_refused_in_words",
    ),
    Mutant(
        "a file that all may write decides",
        OWNED,
        "if status.st_mode & stat.S_IWOTH:",
        "if False:",
        f"{OWNERSHIP}::test_a_home_that_others_may_write_or_move_is_refused",
    ),
    Mutant(
        "a file in a directory of all decides",
        OWNED,
        "        _require_directory(path.parent)\n",
        "",
        f"{OWNERSHIP}::test_an_env_file_that_others_decide_about_is_refused_in_words",
    ),
    Mutant(
        "a value and a file for one option",
        "dovecote/settings/variables.py",
        "if before and before.value and value and (before.is_file or given.is_file):",
        "if False:",
        f"{VARIABLES}::test_a_value_and_a_file_are_one_too_many",
    ),
    Mutant(
        "strangers may connect to a server of our own",
        "dovecote/migrations/schema.py",
        "'revoke connect, temporary on database %I from public'",
        "'revoke temporary on database %I from public'",
        "tests/dovecote/local/test_system.py::test_a_server_of_our_own_lets_nobody_into_the_database_without_a_role_of_o"
        "u"
        "r"
        "s",
    ),
    Mutant(
        "what others wrote in Redis ends who reads it",
        "workers/gateways/challenge_cache.py",
        "except (RedisError, UnicodeDecodeError) as error:",
        "except RedisError as error:",
        "tests/workers/gateways/test_gateways.py::TestWithRedis::test_what_others_have_written_is_no_number_and_no_erro"
        "r",
    ),
    Mutant(
        "a weak key is taken",
        "dovecote/settings/model.py",
        "if why := keys.weakness(given):",
        "if False:",
        f"{SETTINGS}::test_a_weak_key_is_refused_and_not_shown",
    ),
    Mutant(
        "one key for two purposes",
        "dovecote/settings/keys.py",
        "            if key in seen:\n",
        "            if False:\n",
        f"{SETTINGS}::test_one_key_for_two_purposes_is_refused_with_both_names",
    ),
    Mutant(
        "consumers that need keys start without them",
        "dovecote/bootstrap.py",
        "if self._queues & (asked_for or self._queues):",
        "if False:",
        f"{SETTINGS}::test_consumers_that_need_keys_end_without_them_with_exit_code_2_and_one_sentence",
    ),
    Mutant(
        "options of the URL get lost",
        "dovecote/store/connections.py",
        "{given.pop('options', None) or ''} ",
        "{given.pop('options', None) and ''} ",
        f"{CONNECTIONS}::test_our_own_connections_are_given_every_word",
    ),
    Mutant(
        "what has no variable gets lost",
        "dovecote/local/clients.py",
        "        carried |= _service_with(rest)\n",
        "        pass\n",
        f"{CONNECTIONS}::test_what_exec_cannot_hand_on_is_refused",
    ),
    Mutant(
        "a password in a parameter is no secret",
        "dovecote/settings/urls.py",
        '    for pair in parts.query.replace(";", "&").split("&"):\n',
        "    for pair in ():\n",
        f"{CONNECTIONS}::test_a_secret_is_known_and_not_shown_wherever_a_url_has_it",
    ),
    Mutant(
        "Redis' password is sent to a stranger",
        "dovecote/local/servers.py",
        "if not listens(pid, self._port):",
        "if False:",
        f"{CONNECTIONS}::test_an_impostor_on_redis_s_port_never_gets_the_password",
    ),
    Mutant(
        "TLS that anybody may answer is good enough",
        "dovecote/operations/doctor/encryption.py",
        'if mode in _VERIFIED or binding == "require":',
        "if True:",
        f"{CONNECTIONS}::test_doctor_says_what_the_session_is_and_how_to_mend_it[sslmode=prefer-finding1]",
    ),
    Mutant(
        "no end of connections",
        SERVING,
        "if len(self._connections) >= MAX_CONNECTIONS:",
        "if False:",
        f"{HTTP}::test_hundreds_who_dawdle_take_no_thread_and_a_scrape_is_answered",
    ),
    Mutant(
        "a byte now and then keeps a connection",
        SERVING,
        "if one.ends_at <= now]",
        "if False]",
        f"{HTTP}::test_a_byte_now_and_then_does_not_keep_a_connection",
    ),
    Mutant(
        "health shows strangers what is wrong",
        "dovecote/exporter/health.py",
        'if detail and status == "up" else {}',
        "if detail else {}",
        f"{HTTP}::test_health_shows_strangers_no_server_login_or_error",
    ),
    Mutant(
        "where metrics will be can be guessed",
        "dovecote/exporter/metrics.py",
        "key=hashlib.sha256(secret.encode()).digest()",
        'key=hashlib.sha256(b"").digest()',
        f"{HTTP}::test_nobody_can_guess_where_metrics_will_be",
    ),
)
