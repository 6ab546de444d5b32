"""An AWS account for tests, a fixture: moto on a port of this machine, made more like the real one."""

import os
from urllib.request import Request, urlopen

import boto3
import pytest
from moto.cloudformation.models import CloudFormationBackend
from moto.cloudformation.responses import CloudFormationResponse
from moto.server import ThreadedMotoServer

ACCOUNT = "123456789012"
REGION = "us-east-1"


def _execute_change_set(self, change_set_name, stack_name=None):
    """moto fills stacks made by change set without imports, conditions, outputs and exports, and
    `aws cloudformation deploy` makes all of its stacks so."""
    change_set = self.describe_change_set(change_set_name)
    stack = change_set.stack
    kept = {} if change_set.change_set_type == "CREATE" else stack.parameters
    # moto hands over the template's text, and parameters by name.
    parameters = {**kept, **{k: str(v) for k, v in change_set.parameters.items()}}
    if change_set.change_set_type == "CREATE":
        stack.template, stack.parameters = change_set.template, parameters
        stack._parse_template()
        stack.cross_stack_resources = self.exports
        stack.resource_map = stack._create_resource_map()
        stack.output_map = stack._create_output_map()
        stack.create_resources()
    # moto would update resources that have not changed, and cannot update a nameless bucket.
    elif not (stack.has_template(change_set.template) and stack.has_parameters(parameters)):
        stack.update(change_set.template, parameters=parameters, tags=change_set.tags)
        stack.resource_map.cross_stack_resources = self.exports
    stack.parameters = {k: str(v) for k, v in stack.resource_map.resolved_parameters.items()}
    for export in stack.exports:
        self.exports[export.name] = export
    change_set.execution_status = "EXECUTE_COMPLETE"
    stack.status = f"{change_set.change_set_type}_COMPLETE"


@pytest.fixture(scope="module")
def aws():
    """The address of an account that is empty at the beginning of each module: moto, started, to which the environment
    makes boto3 and the aws command line talk."""
    CloudFormationBackend.execute_change_set = _execute_change_set
    # AWS makes a failed change set of an update without changes, where moto refuses the call.
    CloudFormationResponse._validate_different_update = lambda *_: None
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    boto3.setup_default_session()
    # All of moto's servers in one process share their state.
    reset = Request(f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
    urlopen(reset, timeout=10).close()
    try:
        yield environment["AWS_ENDPOINT_URL"]
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
