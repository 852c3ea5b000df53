"""schemathesis against the running service: every request of the OpenAPI document is answered as it says."""

import logging
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.harness.service import launch
from benchmarks.probes.checks import Check, Findings, Options

logger = logging.getLogger(__name__)

MAX_EXAMPLES, QUICK_EXAMPLES = 100, 10
TIMEOUT_S = 1800.0
EXCLUDED_CHECKS = ("positive_data_acceptance",)
"""No schema can say that bytes are an image, so most bodies that the schema allows are rightly refused."""
_SUMMARY = re.compile(r"(\d+) (?:generated|test cases)")


def run_schemathesis(options: Options) -> list[Check]:
    """The scenario: every check but `EXCLUDED_CHECKS`; no rows where schemathesis is not installed."""
    found = options.schemathesis or shutil.which("schemathesis")
    if found is None or not Path(found).exists():
        logger.warning("skipped schemathesis: it is not in PATH; name its executable with --schemathesis")
        return []
    findings = Findings("schemathesis")
    with launch({"log_level": "error", **options.settings}) as service:
        command = [
            str(found),
            "run",
            f"{service.url}/openapi.json",
            "--checks=all",
            *(f"--exclude-checks={name}" for name in EXCLUDED_CHECKS),
            f"--max-examples={QUICK_EXAMPLES if options.quick else MAX_EXAMPLES}",
            f"--seed={options.seed}",
            "--no-color",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            logger.warning("%s\n%s", done.stdout, done.stderr)
        cases = _SUMMARY.search(done.stdout)
        findings.exactly("exit status", done.returncode, 0)
        if cases:
            findings.report("requests", int(cases[1]))
        findings.exactly("ready afterwards", service.answers("/readyz"), 1)
    return findings.checks
