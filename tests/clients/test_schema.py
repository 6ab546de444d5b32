"""Schemathesis before `/openapi.json`: whatever is sent, nothing is answered with a fault of ours."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from server import serving

# What is drawn must be small: the machine is to be tried with words, not with work.
LIMITS = ["--max-steps", "2", "--max-pixels", "4096", "--max-images", "2"]
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
EXAMPLES = 40


@pytest.fixture(scope="module")
def described(binary, tmp_path_factory):
    """The description of a server that draws small pictures only."""
    with serving(binary, tmp_path_factory.mktemp("log") / "small.log", *LIMITS) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_nothing_is_a_fault_of_ours(described):
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) > 30
    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
                  suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def try_it(case):
            case.call_and_validate(checks=CHECKS, timeout=60)

        try_it()
