"""What monitoring/ ships is valid, tested, and asks for nothing that is not there."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dovecote.local.supervisor import parse_procfile
from tests.support import commands
from tests.support.metrics_catalogue import catalogue, sample_names
from tests.support.promtool import PROMTOOL, needs_promtool

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "monitoring"
ALERTS = (MONITORING / "alerts.yml").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


@needs_promtool
@pytest.mark.parametrize(
    "words",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")],
    ids=" ".join,
)
def test_promtool_accepts_it(words: tuple[str, ...]) -> None:
    done = subprocess.run([PROMTOOL, *words], cwd=MONITORING, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    alerts = re.findall(r"- alert: (\w+)", ALERTS)
    tests = (MONITORING / "alerts.test.yml").read_text(encoding="utf-8")

    assert len(alerts) >= 13
    assert [alert for alert in alerts if f'alertname="{alert}"' not in tests] == []


def test_every_alert_has_a_summary_and_ends_with_a_command_that_exists() -> None:
    rules = ALERTS.split("- alert: ")[1:]

    for rule in rules:
        assert re.search(r'^ +summary: "[^"]+"$', rule, re.MULTILINE), rule
        assert re.search(r'^ +description: "[^"]+: dovecote [a-z -]+"$', rule, re.MULTILINE), rule
    for command in sorted(set(re.findall(r': dovecote ([a-z -]+)"', ALERTS))):
        done = commands.run([*command.split(), "--help"], os.environ, ROOT)
        assert done.returncode == 0, command


def dashboard() -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads((MONITORING / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    return dashboard


def queries() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def test_dashboard_and_alerts_use_metrics_that_exist() -> None:
    asked = " ".join([*queries(), *re.findall(r"expr: (.+?)(?:for:|labels:)", ALERTS, re.DOTALL)])

    names = set(re.findall(r"\bdovecote_\w+", asked))
    assert len(names) > 20
    assert sorted(names - sample_names()) == []


def test_the_dashboard_shows_every_metric() -> None:
    shown = " ".join(queries())

    assert [name for name in catalogue() if name not in shown] == []


def test_panels_have_a_title_and_their_own_place() -> None:
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_prometheus_scrapes_every_process_of_the_compose_file() -> None:
    (port,) = re.findall(r"DOVECOTE_TELEMETRY__HTTP_PORT: (\d+)", COMPOSE)
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    (scrape,) = config["scrape_configs"]

    # By DNS: a name stands for every container of its service.
    assert "static_configs" not in scrape
    (found,) = scrape["dns_sd_configs"]
    assert found["type"] == "A"
    assert found["port"] == int(port)
    assert found["names"] == list(parse_procfile((ROOT / "Procfile").read_text(encoding="utf-8")))


def test_every_file_that_the_compose_file_mounts_is_there() -> None:
    mounted = re.findall(r"- \./(\S+?):/", COMPOSE)

    assert len(mounted) == 6
    assert [name for name in mounted if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("service", ["prometheus", "grafana"])
def test_monitoring_starts_only_when_it_is_asked_for(service: str) -> None:
    assert yaml.safe_load(COMPOSE)["services"][service]["profiles"] == ["monitoring"]
