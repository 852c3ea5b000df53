"""PromQL of the dashboard and the rules: which metrics and labels each expression relies on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

# What Grafana puts in, as something that parses.
_GRAFANA = {"$__rate_interval": "1m", "$instance": ".*"}
TARGET_LABELS = frozenset({"instance", "job"})


@dataclass(frozen=True)
class Query:
    """An expression and where it stands."""

    origin: str
    expression: str

    def tree(self) -> Any:
        """Its syntax tree.

        Raises:
            ValueError: it is not PromQL.
        """
        return promql.parse(self.plain)

    @property
    def plain(self) -> str:
        """The expression with Grafana's variables filled in."""
        text = self.expression
        for name, value in _GRAFANA.items():
            text = text.replace(name, value)
        return text


def dashboard_queries(file: Path) -> list[Query]:
    """The expressions of a dashboard's panels and annotations."""
    dashboard = json.loads(file.read_text(encoding="utf-8"))
    found = [
        Query(f"panel {panel['title']}", target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]
    notes = [Query(f"annotation {note['name']}", note["expr"]) for note in dashboard["annotations"]["list"]]
    return found + notes


def rule_queries(file: Path) -> list[Query]:
    """The expressions of a rule file, by the name that is recorded or the alert's."""
    groups = yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return [Query(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules]


def recorded_labels(name: str) -> frozenset[str]:
    """Labels of a recorded metric, which its name begins with: ``instance_route:metric:how``."""
    return frozenset(name.partition(":")[0].split("_"))


@dataclass(frozen=True)
class Use:
    """A metric in an expression, and the labels that are asked of it."""

    metric: str
    labels: frozenset[str]


def uses(node: Any, asked: frozenset[str] = frozenset()) -> Iterator[Use]:
    """The metrics of a tree; labels of ``by`` and ``on`` count for all that is below them."""
    if isinstance(node, promql.VectorSelector):
        assert node.name is not None, "a selector names its metric"
        matched = {matcher.name for matcher in node.matchers.matchers}
        yield Use(node.name, asked | matched)
    elif isinstance(node, promql.AggregateExpr):
        assert node.modifier is None or node.modifier.type == promql.AggModifierType.By
        yield from uses(node.expr, frozenset(node.modifier.labels if node.modifier else ()))
    elif isinstance(node, promql.BinaryExpr):
        matching = node.modifier.matching if node.modifier else None
        on = frozenset(matching.labels) if matching else frozenset()
        yield from uses(node.lhs, asked | on)
        yield from uses(node.rhs, asked | on)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from uses(argument, asked)
    elif isinstance(node, promql.MatrixSelector):
        yield from uses(node.vector_selector, asked)
    elif isinstance(node, (promql.ParenExpr, promql.UnaryExpr, promql.SubqueryExpr)):
        yield from uses(node.expr, asked)
    else:
        assert isinstance(node, (promql.NumberLiteral, promql.StringLiteral)), type(node)
