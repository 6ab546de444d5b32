"""All templates of deploy/: linted, and what no linter knows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cfn
from conftest import DEPLOY

TEMPLATES = sorted(
    path
    for path in DEPLOY.rglob("*.yaml")
    if path.read_text().startswith("AWSTemplateFormatVersion")
)
# Actions that AWS lets be limited to no resource.
UNBOUNDED = {
    "ecr:GetAuthorizationToken",
    "ec2:DescribeVolumes",
    "ec2:DescribeTags",
    "cloudwatch:PutMetricData",
}


def resources(path, kind):
    """The properties of all resources of a kind in a template."""
    for resource in cfn.load(path)["Resources"].values():
        if resource["Type"] == kind:
            yield resource["Properties"]


def statements(path):
    """Every statement of every role's own policies."""
    for kind in ("AWS::IAM::Role", "AWS::IAM::ManagedPolicy", "AWS::IAM::Policy"):
        for holder in resources(path, kind):
            policies = holder.get("Policies", [{"PolicyDocument": holder.get("PolicyDocument")}])
            if isinstance(policies, dict):
                policies = policies["Fn::If"][1]
            for policy in policies:
                for statement in (policy["PolicyDocument"] or {}).get("Statement", []):
                    yield statement["Fn::If"][1] if "Fn::If" in statement else statement


def test_there_are_templates():
    assert {"cell", "zone", "accelerator"} <= {path.stem for path in TEMPLATES}


def test_cfn_lint_is_content():
    lint = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run([lint, *TEMPLATES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_roles_may_do_little(path):
    for statement in statements(path):
        actions = statement["Action"]
        actions = [actions] if isinstance(actions, str) else actions
        assert not any("*" in action for action in actions), statement
        if statement["Resource"] == "*" and "Condition" not in statement:
            assert set(actions) <= UNBOUNDED, statement


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_trust_is_exact(path):
    """ForAllValues is true where the key is absent: who trusts by it trusts everybody."""
    for role in resources(path, "AWS::IAM::Role"):
        for statement in role["AssumeRolePolicyDocument"]["Statement"]:
            assert not any("ForAll" in name for name in statement.get("Condition", {})), statement


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_instances_have_no_ssh_and_no_old_metadata(path):
    for group in resources(path, "AWS::EC2::SecurityGroup"):
        for rule in group.get("SecurityGroupIngress", []):
            assert rule["FromPort"] == rule["ToPort"] != 22
    for launch in resources(path, "AWS::EC2::LaunchTemplate"):
        data = launch["LaunchTemplateData"]
        assert "KeyName" not in data
        assert data["MetadataOptions"]["HttpTokens"] == "required"
        for device in data["BlockDeviceMappings"]:
            assert device["Ebs"]["Encrypted"] is True


def test_the_environment_is_the_servers(binary):
    """Every variable that anything below deploy/ sets is one that the server reads."""
    command = [binary, "serve", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"env: (SD_\w+)", text)) | {"SD_SERVER", "SD_PORT"}
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix not in {".json", ".txt", ".md"}:
            found = set(re.findall(r"\bSD_[A-Z_]*[A-Z]\b", path.read_text()))
            assert found <= known, path


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_stack_leaves_nothing(path):
    """moto cannot delete stacks of networks, so it is the templates that are looked at."""
    for name, resource in cfn.load(path)["Resources"].items():
        assert resource.get("DeletionPolicy", "Delete") == "Delete", name
