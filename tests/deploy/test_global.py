"""deploy/global: moto makes the records and load balancers, and they are as the drill takes them."""

import re

import boto3
import pytest
from moto.elbv2.models import ELBv2Backend

import twin

STACKS = twin.GLOBAL


def parameters(**given):
    return [{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()]


def outputs(region, stack):
    client = boto3.client("cloudformation", region_name=region)
    found = client.describe_stacks(StackName=stack)["Stacks"][0]
    return {output["OutputKey"]: output["OutputValue"] for output in found["Outputs"]}


@pytest.fixture(scope="module")
def networks():
    """moto's CloudFormation takes every load balancer for one of HTTP."""
    made = ELBv2Backend.create_load_balancer

    def create(self, *given, **named):
        return made(self, *given, **{"loadbalancer_type": "network", **named})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ELBv2Backend, "create_load_balancer", create)
        yield


@pytest.fixture(scope="module")
def zone(aws, networks):
    """The zone with both cells' records; moto makes no certificates, so they are given one."""
    client = boto3.client("cloudformation", region_name=twin.REGIONS[0])
    template = (STACKS / "zone.yaml").read_text()
    client.create_stack(
        StackName="zone", TemplateBody=template, Parameters=parameters(Domain=twin.DOMAIN)
    )
    zone = outputs(twin.REGIONS[0], "zone")["ZoneId"]
    for region in twin.REGIONS:
        image = boto3.client("ec2", region_name=region).describe_images()["Images"][0]["ImageId"]
        acm = boto3.client("acm", region_name=region)
        certificate = acm.request_certificate(DomainName=twin.DOMAIN)["CertificateArn"]
        template = (STACKS / "cell.yaml").read_text()
        assert "!Ref Certificate" in template
        boto3.client("cloudformation", region_name=region).create_stack(
            StackName="cell",
            TemplateBody=template.replace("!Ref Certificate", certificate),
            Parameters=parameters(Domain=twin.DOMAIN, ZoneId=zone, ImageId=image),
            Capabilities=["CAPABILITY_IAM"],
        )
    return zone


def records(zone):
    found = boto3.client("route53").list_resource_record_sets(HostedZoneId=zone)
    return [r for r in found["ResourceRecordSets"] if r["Type"] == "A"]


def test_clients_are_sent_to_the_nearest_region_that_works(zone):
    nearest = [r for r in records(zone) if r["Name"].rstrip(".") == twin.DOMAIN]
    assert {r["Region"] for r in nearest} == set(twin.REGIONS)
    for record in nearest:
        assert record["AliasTarget"]["DNSName"].rstrip(".") == f"{record['Region']}.{twin.DOMAIN}"
        assert record["AliasTarget"]["EvaluateTargetHealth"] is True


@pytest.mark.parametrize("region", twin.REGIONS)
def test_a_region_is_a_pair_of_balancers(zone, region):
    pair = [r for r in records(zone) if r["Name"].rstrip(".") == f"{region}.{twin.DOMAIN}"]
    assert {r["Failover"] for r in pair} == {"PRIMARY", "SECONDARY"}
    client = boto3.client("elbv2", region_name=region)
    balancers = client.describe_load_balancers()["LoadBalancers"]
    assert {r["AliasTarget"]["DNSName"] for r in pair} == {b["DNSName"] for b in balancers}
    assert all(len(b["AvailabilityZones"]) == 1 for b in balancers)
    for record in pair:
        found = boto3.client("route53").get_health_check(HealthCheckId=record["HealthCheckId"])
        config = found["HealthCheck"]["HealthCheckConfig"]
        assert config["ResourcePath"] == "/ping" and config["Type"] == "HTTPS"
        assert config["FullyQualifiedDomainName"] == record["AliasTarget"]["DNSName"]
    zones = {b["AvailabilityZones"][0].get("SubnetId") for b in balancers}
    assert len(zones) == 2
    for group in client.describe_target_groups()["TargetGroups"]:
        assert group["HealthCheckPath"] == "/ping" and group["HealthCheckProtocol"] == "HTTP"
        assert group["HealthCheckIntervalSeconds"] * group["UnhealthyThresholdCount"] <= 10


@pytest.mark.parametrize("region", twin.REGIONS)
def test_each_zone_has_a_server_of_its_own(zone, region):
    groups = boto3.client("autoscaling", region_name=region).describe_auto_scaling_groups()
    found = groups["AutoScalingGroups"]
    assert len(found) == 2
    assert len({g["VPCZoneIdentifier"] for g in found}) == 2
    assert len({tuple(g["TargetGroupARNs"]) for g in found}) == 2


def test_the_accelerator_prefers_the_first_zone_as_far_as_it_can():
    places = twin.regions()
    found = twin.groups(places)
    assert set(found) == set(twin.REGIONS)
    for place in places:
        assert found[place.name] == [(place.pair[0], 255), (place.pair[1], 1)]


def test_a_record_without_health_is_no_failover(tmp_path, monkeypatch):
    """What the drill's twins refuse to be made from."""
    text = (STACKS / "cell.yaml").read_text()
    head, nearest = text.split("  Nearest:\n")
    broken = head + "  Nearest:\n" + nearest.replace("EvaluateTargetHealth: true", "EvaluateTargetHealth: false", 1)
    (tmp_path / "cell.yaml").write_text(broken)
    monkeypatch.setattr(twin, "GLOBAL", tmp_path)
    with pytest.raises(ValueError, match="evaluates no health"):
        twin.regions()


def test_checks_come_from_the_template(tmp_path):
    twin.gdnsd(tmp_path / "dns", twin.regions())
    text = (tmp_path / "dns" / "config").read_text()
    assert re.search(r"interval => 5, timeout => 3\s+up_thresh => 2", text)
