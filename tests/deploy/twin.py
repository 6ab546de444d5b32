"""What the templates of deploy/global say, as configurations of gdnsd and Envoy on this machine.

gdnsd is Route 53: latency by the client's network, failover by health. Envoy is the load balancers,
which end TLS and have the ocean's delay before them, and Global Accelerator's edges. Addresses,
weights, names, ports, order and health checks are read from the templates.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import cfn

GLOBAL = Path(__file__).resolve().parents[2] / "deploy" / "global"
DOMAIN = "sd.example.com"
REGIONS = ("eu-central-1", "sa-east-1")
# The ports of the load balancers here, since those below 1024 are not everybody's.
ABOVE = 20000
# How often gdnsd asks in the place of all of Route 53's checkers.
ASKED_S = 3
# One way and back between the regions, which is what the ocean takes.
OCEAN_S = 0.12


@dataclass
class Balancer:
    """A zone's load balancer with the one server behind it, at an address of this machine."""

    name: str
    address: str
    listener: dict
    group: dict
    outside: dict

    @property
    def port(self):
        return self.listener["Port"] + ABOVE

    @property
    def server(self):
        return f"http://{self.address}:{self.group['Port']}"


@dataclass
class Region:
    """A cell: the pair of its load balancers in the order of failover, and where its clients are."""

    name: str
    clients: str
    edge: str
    pair: list


def only(found, what):
    """The single one of a list."""
    if len(found) != 1:
        raise ValueError(f"{len(found)} in place of one: {what}")
    return found[0]


def same(found):
    """What all of a list are; gdnsd is given one kind of each check."""
    return json.loads(only(sorted({json.dumps(one, sort_keys=True) for one in found}), "checks"))


def of_type(resources, kind):
    return {name: r["Properties"] for name, r in resources.items() if r["Type"] == kind}


def alias(record, name):
    """The target of an alias record that evaluates the target's health."""
    target = record.get("AliasTarget") or {}
    if target.get("EvaluateTargetHealth") is not True:
        raise ValueError(f"{name}: the record evaluates no health, so nothing fails over")
    return target["DNSName"]


def region(number, name):
    """The cell of a region by its template; the number gives it addresses here."""
    cell = cfn.resources(
        GLOBAL / "cell.yaml", name, Domain=DOMAIN, ZoneId="Z1", ImageId="ami-1"
    )
    records = of_type(cell, "AWS::Route53::RecordSet").values()
    nearest = only([r for r in records if r.get("Region") == name], f"latency record of {name}")
    if nearest["Name"] != DOMAIN:
        raise ValueError(f"{nearest['Name']} is not the name that clients use")
    pair_name, pair = alias(nearest, "latency"), []
    for failover in ("PRIMARY", "SECONDARY"):
        record = only(
            [r for r in records if r["Name"] == pair_name and r.get("Failover") == failover],
            f"{failover} of {pair_name}",
        )
        balancer = alias(record, failover).removesuffix(".DNSName")
        listeners = of_type(cell, "AWS::ElasticLoadBalancingV2::Listener").values()
        listener = only([x for x in listeners if x["LoadBalancerArn"] == balancer], balancer)
        group = cell[listener["DefaultActions"][0]["TargetGroupArn"]]["Properties"]
        outside = cell[record["HealthCheckId"]]["Properties"]["HealthCheckConfig"]
        if outside["FullyQualifiedDomainName"] != f"{balancer}.DNSName":
            raise ValueError(f"{failover}: the check from outside is of another zone")
        address = f"127.0.1.{2 * number + len(pair) + 1}"
        pair.append(Balancer(f"{name}-{failover.lower()}", address, listener, group, outside))
    return Region(name, f"127.0.{number + 2}.0/24", f"127.0.{number + 2}.1", pair)


def regions():
    return [region(number, name) for number, name in enumerate(REGIONS)]


# --- Route 53 ---


def gdnsd(directory, places):
    """Writes gdnsd's directory: http_status is the target groups' checks and those from outside,
    simplefo the failover records, geoip the latency records."""
    balancers = [balancer for place in places for balancer in place.pair]
    group = same([balancer.group for balancer in balancers])
    outside = same([{**balancer.outside, "FullyQualifiedDomainName": ""} for balancer in balancers])
    # Checkers all over the world ask every RequestInterval, so that their answers come evenly spread.
    # A target is down when more than 82 % of them have failed, and up when more than 18 % have not.
    every, times = outside["RequestInterval"], outside["FailureThreshold"] - 1
    down, up = (math.ceil(every * (times + share) / ASKED_S) for share in (0.82, 0.18))
    pairs = "\n".join(
        f"    r{n} => {{ primary => {p.pair[0].address}, secondary => {p.pair[1].address} }}"
        for n, p in enumerate(places)
    )
    # The nearest first, then the others.
    order = {n: [n] + [m for m in range(len(places)) if m != n] for n in range(len(places))}
    nets = "\n".join(
        f"        {p.clients} => [{', '.join(f'r{m}' for m in order[n])}]"
        for n, p in enumerate(places)
    )
    names = ", ".join(f"r{n}" for n in range(len(places)))
    dcs = ", ".join(f"r{n} => %simplefo!r{n}" for n in range(len(places)))
    (directory / "zones").mkdir(parents=True)
    (directory / "config").write_text(f"""
options => {{ listen => 127.0.0.53:5301, run_dir => {directory}/run, state_dir => {directory}/state }}
service_types => {{ targets => {{
  plugin => http_status, port => {group["Port"]}, url_path => {group["HealthCheckPath"]}
  ok_codes => [ {group["Matcher"]["HttpCode"]} ]
  interval => {group["HealthCheckIntervalSeconds"]}, timeout => {group["HealthCheckTimeoutSeconds"]}
  up_thresh => {group["HealthyThresholdCount"]}, ok_thresh => {group["HealthyThresholdCount"]}
  down_thresh => {group["UnhealthyThresholdCount"]}
}}
outside => {{
  plugin => http_status, port => {group["Port"]}, url_path => {outside["ResourcePath"]}
  ok_codes => [ 200 ], interval => {ASKED_S}, timeout => 2
  up_thresh => {up}, ok_thresh => {up}, down_thresh => {down}
}} }}
plugins => {{
  simplefo => {{
    service_types => [ targets, outside ]
{pairs}
  }}
  geoip => {{
    maps => {{ m => {{ datacenters => [{names}], nets => {{
{nets}
    }} }} }}
    resources => {{ www => {{ map => m, service_types => [ targets, outside ], dcmap => {{ {dcs} }} }} }}
  }}
}}
""")
    # An alias of a load balancer has 60 s to live, wherever it is cached.
    (directory / "zones" / DOMAIN).write_text(
        "@ SOA ns1 hostmaster 1 7200 1800 259200 900\n@ NS ns1\nns1 A 127.0.0.53\n"
        "@ 60 DYNA geoip!www\n"
    )


# --- Envoy ---


def address_of(address, port):
    return {"socket_address": {"address": address, "port_value": port}}


def endpoint(address, port, weight=1):
    return {
        "endpoint": {"address": address_of(address, port)},
        "load_balancing_weight": weight,
    }


def typed(kind, **fields):
    return {"@type": f"type.googleapis.com/envoy.{kind}", **fields}


def tls_in(directory):
    files = {"certificate_chain": f"{directory}/tls.crt", "private_key": f"{directory}/tls.key"}
    chain = {name: {"filename": file} for name, file in files.items()}
    kind = "extensions.transport_sockets.tls.v3.DownstreamTlsContext"
    context = typed(kind, common_tls_context={"tls_certificates": [chain]})
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def tls_out(directory):
    validation = {"trusted_ca": {"filename": f"{directory}/tls.crt"}}
    kind = "extensions.transport_sockets.tls.v3.UpstreamTlsContext"
    context = typed(kind, sni=DOMAIN, common_tls_context={"validation_context": validation})
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def listener(directory, name, address, port, route, filters=()):
    """A TLS listener whose requests all go one route."""
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": typed("extensions.filters.http.router.v3.Router"),
    }
    manager = typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=name,
        http_filters=[*filters, router],
        route_config={
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": route}],
                }
            ]
        },
    )
    chain = {
        "filters": [
            {
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": manager,
            }
        ],
        "transport_socket": tls_in(directory),
    }
    return {"name": name, "address": address_of(address, port), "filter_chains": [chain]}


def health(group):
    """A target group's check as Envoy's."""
    return {
        "timeout": f"{group['HealthCheckTimeoutSeconds']}s",
        "interval": f"{group['HealthCheckIntervalSeconds']}s",
        "no_traffic_interval": f"{group['HealthCheckIntervalSeconds']}s",
        "unhealthy_threshold": group["UnhealthyThresholdCount"],
        "healthy_threshold": group["HealthyThresholdCount"],
        "http_health_check": {"path": group["HealthCheckPath"], "host": DOMAIN},
    }


def ocean(own):
    """The delay of a client that says it is of another region."""
    fault = typed(
        "extensions.filters.http.fault.v3.HTTPFault",
        delay={"fixed_delay": f"{OCEAN_S}s", "percentage": {"numerator": 100}},
        headers=[
            {"name": "x-client-region", "string_match": {"exact": own}, "invert_match": True},
            {"name": "x-client-region", "present_match": True},
        ],
    )
    return {"name": "envoy.filters.http.fault", "typed_config": fault}


def groups(places):
    """The accelerator's endpoint groups by region: pairs of a load balancer and its weight."""
    inputs = {}
    for ordinal, place in zip(("First", "Second"), places, strict=True):
        inputs[f"{ordinal}Region"] = place.name
        inputs[f"{ordinal}RegionFirst"] = place.pair[0].name
        inputs[f"{ordinal}RegionSecond"] = place.pair[1].name
    made = cfn.resources(GLOBAL / "accelerator.yaml", Domain=DOMAIN, ZoneId="Z1", **inputs)
    balancers = {balancer.name: balancer for place in places for balancer in place.pair}
    return {
        group["EndpointGroupRegion"]: [
            (balancers[one["EndpointId"]], one["Weight"]) for one in group["EndpointConfigurations"]
        ]
        for group in of_type(made, "AWS::GlobalAccelerator::EndpointGroup").values()
    }


def edge(directory, place, places):
    """The accelerator as clients of a region meet it: its own group first, then the others.

    The accelerator forwards connections and repeats nothing. Here a request that met a dead server
    is sent again by the edge, in the place of a client that would.
    """
    found = groups(places)
    order = sorted(found, key=lambda name: name != place.name)
    endpoints = [
        {"priority": k, "lb_endpoints": [endpoint(b.address, b.port, w) for b, w in found[name]]}
        for k, name in enumerate(order)
    ]
    return {
        "name": f"edge-{place.name}",
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        "transport_socket": tls_out(directory),
        "health_checks": [health(place.pair[0].group)],
        "load_assignment": {
            "cluster_name": f"edge-{place.name}",
            "endpoints": endpoints,
            # A group is used as long as one of its endpoints works.
            "policy": {"overprovisioning_factor": 100 * len(place.pair)},
        },
    }


def envoy(directory, places, admin):
    """Envoy's configuration: a listener for each load balancer and each edge."""
    listeners, clusters = [], []
    for place in places:
        for balancer in place.pair:
            name, server = balancer.name, endpoint(balancer.address, balancer.group["Port"])
            clusters.append(
                {
                    "name": name,
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "load_assignment": {
                        "cluster_name": name,
                        "endpoints": [{"lb_endpoints": [server]}],
                    },
                }
            )
            route, filters = {"cluster": name, "timeout": "0s"}, [ocean(place.name)]
            at = (balancer.address, balancer.port)
            listeners.append(listener(directory, name, *at, route, filters))
        clusters.append(edge(directory, place, places))
        retry = {
            "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
            "retriable_status_codes": [429, 503],
            "num_retries": 5,
            "host_selection_retry_max_attempts": 5,
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": typed(
                        "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                    ),
                }
            ],
            "retry_priority": {
                "name": "envoy.retry_priorities.previous_priorities",
                "typed_config": typed(
                    "extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                    update_frequency=2,
                ),
            },
        }
        route = {"cluster": f"edge-{place.name}", "timeout": "0s", "retry_policy": retry}
        port = place.pair[0].port
        listeners.append(listener(directory, f"edge-{place.name}", place.edge, port, route))
    return {
        "admin": {"address": address_of("127.0.0.1", admin)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }
