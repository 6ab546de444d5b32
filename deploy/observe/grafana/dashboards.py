#!/usr/bin/env python3
"""Writes dashboards/: one for operators, one for a request's life.

    deploy/observe/grafana/dashboards.py
"""

import json
from pathlib import Path

WIDTH = 24
DRAWS = 'route!~"/ping|/health/.*|/metrics"'
AT = 'job="sd",instance=~"$instance"'


def source(kind):
    return {"type": kind, "uid": kind}


def panel(title, what, *queries, unit="short", kind="timeseries", width=8, **more):
    """A panel of (expression, legend) pairs; `what` says how to read it."""
    targets = [
        {
            "refId": chr(ord("A") + k),
            "datasource": source("prometheus"),
            "expr": expression,
            "legendFormat": legend,
            "exemplar": kind == "timeseries",
        }
        for k, (expression, legend) in enumerate(queries)
    ]
    made = {
        "type": kind,
        "title": title,
        "description": what,
        "datasource": source("prometheus"),
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {},
    }
    return made | more | {"gridPos": {"w": width, "h": 8}}


def quantiles(metric, by=""):
    """p50 and p99 of a histogram, by a label where one is given."""
    names = f"le, {by}" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return [
        (
            f"histogram_quantile({q}, sum by ({names}) (rate({metric}_bucket{{{AT}}}[$__rate_interval])))",
            f"{legend}p{round(q * 100)}",
        )
        for q in (0.5, 0.99)
    ]


def found(title, what, kind, expression, width=WIDTH):
    """A panel of logs or of traces."""
    query = {"refId": "A", "datasource": source(kind)}
    if kind == "loki":
        query |= {"expr": expression, "queryType": "range"}
    else:
        query |= {"query": expression, "queryType": "traceql", "tableType": "traces"}
    return {
        "type": "logs" if kind == "loki" else "table",
        "title": title,
        "description": what,
        "datasource": source(kind),
        "targets": [query],
        "options": {},
        "gridPos": {"w": width, "h": 9},
    }


def dashboard(uid, title, panels, variables=()):
    x = y = tall = 0
    for number, one in enumerate(panels, 1):
        place = one["gridPos"]
        if x + place["w"] > WIDTH:
            x, y, tall = 0, y + tall, 0
        place |= {"x": x, "y": y}
        x, tall = x + place["w"], max(tall, place["h"])
        one["id"] = number
    instances = {
        "name": "instance",
        "type": "query",
        "datasource": source("prometheus"),
        "query": {"query": 'label_values(up{job="sd"}, instance)', "refId": "A"},
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }
    return {
        "uid": uid,
        "title": title,
        "tags": ["sd-server"],
        "schemaVersion": 41,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [instances, *variables]},
        "links": [
            {
                "title": "sd-server",
                "type": "dashboards",
                "tags": ["sd-server"],
                "keepTime": True,
                "includeVars": True,
            }
        ],
        "panels": panels,
    }


def operators():
    rate = "[$__rate_interval]"
    return [
        panel(
            "Up and ready",
            "Servers that answer, and those that can draw.",
            (f"sum(up{{{AT}}})", "up"),
            (f"sum(sd_ready{{{AT}}})", "ready"),
            kind="stat",
            width=4,
        ),
        panel(
            "Failed, of 0.5 % allowed",
            "Share of requests that the server failed.",
            ('sd:failed:ratio_rate1h{job="sd"}', "1 h"),
            unit="percentunit",
            kind="stat",
            width=4,
        ),
        panel(
            "Slower than 30 s, of 5 % allowed",
            "Share of requests.",
            ('sd:slow:ratio_rate1h{job="sd"}', "1 h"),
            unit="percentunit",
            kind="stat",
            width=4,
        ),
        panel(
            "Versions",
            "Servers by version.",
            (f"count by (version) (sd_build_info{{{AT}}})", "{{version}}"),
            kind="stat",
            width=4,
        ),
        panel(
            "Jobs",
            "Jobs that are held.",
            (f"sum by (state) (sd_jobs{{{AT}}})", "{{state}}"),
            kind="stat",
            width=8,
        ),
        panel(
            "Requests by outcome",
            "overloaded is refused for a full queue; deadline_exceeded took too long.",
            (f"sum by (outcome) (rate(sd_requests_total{{{AT},{DRAWS}}}{rate}))", "{{outcome}}"),
            unit="reqps",
        ),
        panel(
            "Time of a request",
            "Points are requests with a trace.",
            *quantiles("sd_request_duration_seconds", "route"),
            unit="s",
        ),
        panel(
            "Images",
            "By how they ended.",
            (f"sum by (outcome) (rate(sd_images_total{{{AT}}}{rate}))", "{{outcome}}"),
            unit="ops",
        ),
        panel(
            "Queue, in batches",
            "Above 1 some wait for a whole batch; above 4 another replica is due.",
            (f"sd_images_waiting{{{AT}}} / sd_images_capacity{{{AT}}}", "{{instance}} waiting"),
            (f"sd_images_running{{{AT}}} / sd_images_capacity{{{AT}}}", "{{instance}} running"),
        ),
        panel("Wait", "Time in the queue.", *quantiles("sd_queue_duration_seconds"), unit="s"),
        panel(
            "Rows per step",
            "Two a guided image. Near --max-batch-rows the device is used well.",
            (
                f"sum(rate(sd_batch_size_sum{{{AT}}}{rate})) / sum(rate(sd_batch_size_count{{{AT}}}{rate}))",
                "mean",
            ),
        ),
        panel(
            "Memory of GPUs",
            "In use, of the whole card.",
            (f"sd_gpu_memory_used_bytes{{{AT}}} / sd_gpu_memory_total_bytes{{{AT}}}", "{{instance}} {{gpu}}"),
            unit="percentunit",
        ),
        panel(
            "Use of GPUs",
            "Share of time in which something ran.",
            (f"sd_gpu_utilization_ratio{{{AT}}}", "{{instance}} {{gpu}}"),
            unit="percentunit",
        ),
        panel(
            "Power and temperature",
            "Watts, and degrees Celsius.",
            (f"sd_gpu_power_watts{{{AT}}}", "{{instance}} {{gpu}} W"),
            (f"sd_gpu_temperature_celsius{{{AT}}}", "{{instance}} {{gpu}} C"),
        ),
        panel(
            "Memory of hosts",
            "What the process has, and what is left.",
            (f"process_resident_memory_bytes{{{AT}}}", "{{instance}} resident"),
            (f"sd_host_memory_available_bytes{{{AT}}}", "{{instance}} available"),
            unit="bytes",
        ),
        panel(
            "Bodies in memory",
            "Of requests that arrive and of replies that are not read yet.",
            (f"sd_body_bytes_in_flight{{{AT}}}", "{{instance}}"),
            unit="bytes",
        ),
        panel(
            "What should stay at 0",
            "Steps repeated for want of memory; lines of the log that were lost.",
            (f"increase(sd_batch_oom_retries_total{{{AT}}}{rate})", "{{instance}} out of memory"),
            (f"increase(sd_log_lines_dropped_total{{{AT}}}{rate})", "{{instance}} lines lost"),
        ),
    ]


def life():
    lines = '{service_name="sd-server"}'
    return [
        panel(
            "Whole request",
            "Follow a point to its trace.",
            *quantiles("sd_request_duration_seconds"),
            unit="s",
            width=12,
        ),
        panel(
            "1. Wait in the queue",
            "Long: too few replicas, or one client has much.",
            *quantiles("sd_queue_duration_seconds"),
            unit="s",
            width=12,
        ),
        panel(
            "2. Stages",
            "A step is of all images that share it; decode is of one.",
            *quantiles("sd_stage_duration_seconds", "stage"),
            unit="s",
            width=12,
        ),
        panel(
            "3. An image, from its text to its pixels",
            "Steps, times the images that it shared them with.",
            *quantiles("sd_image_duration_seconds"),
            unit="s",
            width=12,
        ),
        found("Traces", "The slowest first.", "tempo", '{ resource.service.name = "sd-server" && duration > 1s }'),
        found("Lines of a request", "Set `id` above: it is in the reply's X-Request-Id.", "loki", f'{lines} | json | id="$id"'),
        found("What failed", "Each request that was not ok.", "loki", f'{lines} | json | outcome!="ok" | outcome!=""'),
    ]


def main():
    directory = Path(__file__).parent / "dashboards"
    given = {"name": "id", "type": "textbox", "label": "X-Request-Id", "query": "", "current": {"text": "", "value": ""}}
    for name, made in {
        "operators": dashboard("sd-operators", "sd-server: operators", operators()),
        "life": dashboard("sd-life", "sd-server: a request's life", life(), [given]),
    }.items():
        (directory / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
