"""A look at the pages of a process, as Prometheus and an orchestrator take it."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from dovecote.exporter.metrics import as_text, merged_registry
from tests.support.processes import eventually


class Answer(NamedTuple):
    status: int
    body: str

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.body)
        return report


def get(port: int, path: str) -> Answer | None:
    """Return what is answered; None while nobody is there, or if they end within the answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return Answer(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode())
    except (OSError, http.client.HTTPException):
        return None


class Numbers:
    """The samples of a scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """Return the one sample with this name and these labels."""
        return self._samples[name, frozenset(labels.items())]

    def by(self, label: str, name: str) -> dict[str, float]:
        """Return the samples with this name, by this label of theirs."""
        return {dict(of)[label]: value for (known, of), value in self._samples.items() if known == name}

    def catalogue(self) -> dict[str, tuple[str, set[str]]]:
        """Return type and labels of each metric."""
        found = {}
        for family in self.families:
            labels: set[str] = set().union(*(sample.labels for sample in family.samples)) - {"le"}
            found[family.name + ("_total" if family.type == "counter" else "")] = (family.type, labels)
        return found


def numbers_in(registry: CollectorRegistry) -> Numbers:
    return Numbers(as_text(registry).decode())


def of_all(directory: Path) -> Numbers:
    """Return the metrics of all workers that share this directory."""
    return numbers_in(merged_registry(directory))


def scrape(port: int) -> Numbers:
    answer = get(port, "/metrics")
    assert answer, f"nobody answers on port {port}"
    assert answer.status == 200, answer.body
    return Numbers(answer.body)


def scrape_until(port: int, condition: Callable[[Numbers], object], what: str) -> Numbers:
    """Return the first scrape that fulfils the condition; what a relay has collected may be some seconds old."""

    def look() -> Numbers | None:
        numbers = scrape(port)
        return numbers if condition(numbers) else None

    found = eventually(look, 15, what)
    assert found
    return found


def status_of(dependencies: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {name: each["status"] for name, each in dependencies.items()}
