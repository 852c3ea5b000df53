"""Prometheus' files, checked by its own tool; the dashboard; every query against the real ``/metrics``."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import Counter, Histogram
from prometheus_client.parser import text_string_to_metric_families

from deploy.checks.replicas import free_port
from service.telemetry.metrics import Metrics

queries = pytest.importorskip("deploy.checks.queries", reason="promql-parser is not installed")

DASHBOARD = "dashboard.json"
RULES = "rules.yml"
GRID_COLUMNS = 24
FOREIGN = {"up": {"job", "instance"}}  # made by Prometheus itself


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    return found


@pytest.fixture(scope="module")
def dashboard(monitoring: Path) -> Any:
    return json.loads((monitoring / DASHBOARD).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found_queries(monitoring: Path) -> list[Any]:
    return [*queries.dashboard_queries(monitoring / DASHBOARD), *queries.rule_queries(monitoring / RULES)]


@pytest.fixture(scope="module")
def series(service: str, monitoring: Path) -> dict[str, set[str]]:
    """Every series that a scrape and the rules give, with its labels."""
    labels: dict[str, set[str]] = {name: set(known) for name, known in FOREIGN.items()}
    for family in text_string_to_metric_families(httpx.get(f"{service}/metrics").text):
        labels.setdefault(family.name, set())  # named by its TYPE line, though it has no sample yet
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for metric in vars(Metrics()).values():
        if not hasattr(metric, "_labelnames"):
            continue
        suffixes = {Counter: ("_total", "_created"), Histogram: ("_bucket", "_sum", "_count", "_created")}
        assert metric._name in labels, f"{metric._name} is not exposed"
        for suffix in suffixes.get(type(metric), ("",)):
            known = labels.setdefault(metric._name + suffix, set())
            known.update(metric._labelnames, ("le",) if suffix == "_bucket" else ())
    for rule in queries.rule_queries(monitoring / RULES):
        if ":" in rule.origin:
            labels[rule.origin] = set(queries.recorded_labels(rule.origin))
    return labels


def test_prometheus_accepts_its_configuration(
    promtool: str, compose: Path, monitoring: Path, tmp_path: Path
) -> None:
    mounts = {"prometheus.yml": compose, "no-key": compose, "rules.yml": monitoring}
    for name, folder in mounts.items():
        shutil.copy2(folder / name, tmp_path)
    (tmp_path / "no-key").rename(tmp_path / "scrape-key")  # as the compose file mounts it
    run(promtool, "check", "config", str(tmp_path / "prometheus.yml"))


def test_the_rules_do_what_their_tests_say(promtool: str, monitoring: Path) -> None:
    run(promtool, "check", "rules", str(monitoring / RULES))
    run(promtool, "test", "rules", str(monitoring / "rules_test.yml"))


def test_every_alert_has_a_test_and_says_what_it_means(monitoring: Path) -> None:
    groups = yaml.safe_load((monitoring / RULES).read_text(encoding="utf-8"))["groups"]
    alerts = {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((monitoring / "rules_test.yml").read_text(encoding="utf-8"))["tests"]
    raised = {
        case["alertname"]
        for test in tests
        for case in test.get("alert_rule_test", [])
        if case.get("exp_alerts")
    }
    assert raised == alerts.keys()
    for alert in alerts.values():
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert set(alert["annotations"]) == {"summary", "description"}


def test_the_real_metrics_are_well_formed(promtool: str, service: str) -> None:
    run(promtool, "check", "metrics", text=httpx.get(f"{service}/metrics").text, may_advise=True)


def test_every_query_asks_for_what_exists(found_queries: list[Any], series: dict[str, set[str]]) -> None:
    assert len(found_queries) > 50
    for query in found_queries:
        found = list(queries.uses(query.tree()))
        assert found, query.origin
        for use in found:
            assert use.metric in series, f"{query.origin}: no metric {use.metric}"
            unknown = use.labels - series[use.metric] - queries.TARGET_LABELS
            assert not unknown, f"{query.origin}: {use.metric} has no label {sorted(unknown)}"


def test_every_metric_of_the_service_is_shown(found_queries: list[Any]) -> None:
    shown = {use.metric for query in found_queries for use in queries.uses(query.tree())}
    for metric in vars(Metrics()).values():
        if hasattr(metric, "_labelnames"):
            assert any(name.startswith(metric._name) for name in shown), metric._name


def test_quantiles_are_taken_of_rates_by_bucket(found_queries: list[Any]) -> None:
    for query in found_queries:
        if "histogram_quantile" in query.plain:
            assert "rate(" in query.plain, query.origin
            labels = {label for use in queries.uses(query.tree()) for label in use.labels}
            assert "le" in labels, query.origin


def test_recorded_names_say_their_labels(monitoring: Path) -> None:
    for rule in queries.rule_queries(monitoring / RULES):
        if ":" in rule.origin:
            kept = {label for use in queries.uses(rule.tree()) for label in use.labels}
            assert queries.recorded_labels(rule.origin) <= kept | {"instance"}, rule.origin


def test_panels(dashboard: Any) -> None:
    cells: set[tuple[int, int]] = set()
    identities = [panel["id"] for panel in dashboard["panels"]]
    assert len(identities) == len(set(identities))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= GRID_COLUMNS, panel["title"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & own, f"{panel['title']} overlaps another panel"
        cells |= own
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["interval"] == "5s", panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
            for target in panel["targets"]:
                assert 'instance=~"$instance"' in target["expr"], panel["title"]
                assert "[$__rate_interval]" in target["expr"] or "rate(" not in target["expr"], panel["title"]


def test_provisioning_fits_together(compose: Path, dashboard: Any) -> None:
    folder = compose / "grafana"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards/drorae.yaml").read_text())["providers"]
    scrape = yaml.safe_load((compose / "prometheus.yml").read_text())["global"]["scrape_interval"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    mounts = (compose / "compose.yaml").read_text(encoding="utf-8")
    assert variables["datasource"]["current"]["value"] == source["uid"]
    assert variables["instance"]["definition"] == "label_values(drorae_ready, instance)"
    assert source["jsonData"]["timeInterval"] == scrape == "5s"
    assert f"../monitoring/dashboard.json:{provider['options']['path']}/drorae.json:ro" in mounts
    assert "./grafana:/etc/grafana/provisioning:ro" in mounts


def test_the_dashboard_is_formatted(monitoring: Path, dashboard: Any) -> None:
    text = (monitoring / DASHBOARD).read_text(encoding="utf-8")
    assert text == json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.slow
def test_a_real_prometheus_evaluates_everything(
    service: str,
    monitoring: Path,
    photo: bytes,
    found_queries: list[Any],
    wait: Any,
    answered: Any,
    tmp_path: Path,
) -> None:
    """Scrape a real replica under the committed rules, then ask every query as Grafana would."""
    with prometheus(monitoring, tmp_path, service.removeprefix("http://")) as url:
        wait("prometheus", lambda: answered(f"{url}/-/ready"))

        def ask(expression: str) -> list[Any]:
            answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}).json()
            assert answer["status"] == "success", answer
            return list(answer["data"]["result"])

        def has_rates() -> bool:
            assert httpx.post(f"{service}/reconstruct", content=photo, timeout=30).status_code == 200
            return bool(ask("rate(drorae_request_seconds_count[1m]) > 0"))

        wait("rates", has_rates)
        rules = httpx.get(f"{url}/api/v1/rules").json()["data"]["groups"]
        wait("rules", lambda: bool(ask("instance:drorae_requests:rate5m")))
        results = {query.origin: ask(query.plain) for query in found_queries}
        assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
    silent = {origin for origin, result in results.items() if origin.startswith("panel") and not result}
    assert not silent & {
        "panel Requests",
        "panel Latency",
        "panel Ready",
        "panel Replicas ready",
        "panel p99",
    }


@contextmanager
def prometheus(monitoring: Path, folder: Path, target: str) -> Iterator[str]:
    """Prometheus on a free port, with the committed rules and one target; gives its address."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    scrape = {"job_name": "drorae", "scrape_interval": "500ms", "static_configs": [{"targets": [target]}]}
    configuration = {
        "global": {"evaluation_interval": "500ms"},
        "rule_files": [str(monitoring / RULES)],
        "scrape_configs": [scrape],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def run(*command: str, text: str | None = None, may_advise: bool = False) -> None:
    """Run a tool that must be content; with ``may_advise``, 3 is advice on style, which it may give."""
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert result.returncode in ((0, 3) if may_advise else (0,)), result.stdout + result.stderr
