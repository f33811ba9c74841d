"""Mutants of what operators are shown."""

from tests.mutations.mutant import Mutant

METRICS = "tests/dovecote/exporter/test_metrics.py"
VALUES = "tests/dovecote/exporter/test_metric_values.py"
COLLECTOR = "tests/dovecote/exporter/test_collector.py"
HEALTH = "tests/dovecote/exporter/test_health.py"
SERVING = "tests/dovecote/exporter/test_http.py"

WATCHING = (
    # Watching -----------------------------------------------------------------------------------
    Mutant(
        "a bundle that ended is in flight",
        "dovecote/exporter/metrics.py",
        "            del self._began[thread]\n",
        "            pass\n",
        f"{METRICS}::test_idle_and_stuck_are_distinguished",
    ),
    Mutant(
        "a lively thread hides one that is silent",
        "dovecote/exporter/metrics.py",
        "min(list(self._fetched.values()))",
        "max(list(self._fetched.values()))",
        f"{METRICS}::test_one_fetching_thread_that_is_silent_makes_the_worker_s_heartbeat_old",
    ),
    Mutant(
        "a value on a bound is counted above it",
        "dovecote/exporter/metrics.py",
        "bisect_right(ordered, bound, below)",
        "bisect_right(ordered, bound - 1e-9, below)",
        f"{METRICS}::test_many_values_at_once_are_counted_as_one_after_the_other",
    ),
    Mutant(
        "a worker that is gone is alive",
        "dovecote/exporter/metrics.py",
        "        if started_at(pid) is None:\n",
        "        if False:\n",
        f"{METRICS}::test_a_worker_that_is_gone_has_done_its_work_and_has_no_heartbeat",
    ),
    Mutant(
        "a replay is an effect of now",
        "dovecote/exporter/metrics.py",
        "        if not again:",
        "        if True:",
        f"{METRICS}::test_time_from_commit_to_effect_is_that_of_each_event_and_of_no_replay",
    ),
    Mutant(
        "effects are not counted",
        "dovecote/consumer/consumer.py",
        "        self.instrumentation.acted(bundle.route.handler, outcome.acted, again=bundle.replay is not None)\n",
        "",
        f"{VALUES}::test_failures_retries_and_what_waits_behind_them_are_counted",
    ),
    Mutant(
        "calls of an ordinary handler are one",
        "dovecote/consumer/time_limits.py",
        "        self.call_times.append(self.began_at)\n",
        "        self.call_times[:] = self.call_times[:1] or [self.began_at]\n",
        f"{VALUES}::test_an_ordinary_handler_is_called_once_an_event",
    ),
    Mutant(
        "wake-ups are not counted",
        "dovecote/relay/wakeup.py",
        "                self._instrumentation.rang()\n",
        "                pass\n",
        "tests/dovecote/relay/test_wakeup.py::test_a_wake_up_is_heard_and_counted",
    ),
    Mutant(
        "waiting for Redis looks like leading",
        "dovecote/relay/leader.py",
        '                self._instrumentation.alive("waiting_for_redis")\n',
        "",
        f"{VALUES}::test_a_relay_reports_for_which_server_it_waits",
    ),
    Mutant(
        "a server that is away fails the scrape",
        "dovecote/exporter/collector.py",
        "        except redis.RedisError:\n",
        "        except ZeroDivisionError:\n",
        f"{COLLECTOR}::test_a_server_that_is_away_is_a_number_and_no_failure",
    ),
    Mutant(
        "every scrape asks Postgres",
        "dovecote/exporter/collector.py",
        "time.monotonic() - self._found_at >= _KEPT_SECONDS",
        "True",
        f"{COLLECTOR}::test_several_scrapers_ask_postgres_once",
    ),
    Mutant(
        "a check that hangs is begun again",
        "dovecote/exporter/health.py",
        "if not is_asking and time",
        "if time",
        f"{HEALTH}::test_a_check_that_hangs_is_not_begun_again",
    ),
    Mutant(
        "health forgets since when",
        "dovecote/exporter/health.py",
        "            is_news = status != self._status\n",
        "            is_news = True\n",
        f"{HEALTH}::test_a_redis_that_stops_is_named_and_so_is_its_return",
    ),
    Mutant(
        "a taken port is given up",
        "dovecote/exporter/http.py",
        "            continue\n",
        "            return\n",
        f"{SERVING}::test_when_the_process_that_serves_dies_another_one_takes_the_port",
    ),
)
