"""Several sd-servers behind Envoy or HAProxy, with the configuration of deploy/envoy."""

import http.client
import os
import shutil
import sys
from pathlib import Path

import yaml

from processes import await_that, free_port, status

ENVOY = Path(__file__).resolve().parents[2] / "deploy" / "envoy"
KIND = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


class Fleet:
    """The replicas by name, and the proxy's port in `port`."""

    def __init__(self, processes, binary, directory, environment=None):
        self.processes, self.binary, self.directory = processes, binary, Path(directory)
        self.environment, self.addresses, self.port = environment or {}, {}, free_port()
        self.admin = free_port()

    def add(self, name, **environment):
        """Starts a replica under its address, which it keeps, and waits until it is ready."""
        address, port = self.addresses.setdefault(name, ("127.0.0.1", free_port()))
        settings = self.environment | environment
        url = self.processes.server(name, self.binary, address, port, **settings)
        self.processes.ready(name, url)
        return url

    def hosts(self, names):
        """Tells Envoy which replicas there are, as hosts.yaml says: by a file that is moved."""
        endpoints = [
            {"endpoint": {"address": {"socket_address": {"address": a, "port_value": p}}}}
            for a, p in (self.addresses[name] for name in names)
        ]
        found = yaml.safe_load((ENVOY / "hosts.yaml").read_text())
        assert [one["@type"] for one in found["resources"]] == [KIND]
        found["resources"][0]["endpoints"] = [{"lb_endpoints": endpoints}]
        fresh = self.directory / "hosts.new"
        fresh.write_text(yaml.safe_dump(found))
        os.replace(fresh, self.directory / "hosts.yaml")

    def envoy(self, names, config=None):
        """Starts Envoy; of the file only ports and the place of hosts.yaml are others."""
        self.hosts(names)
        text = config or (ENVOY / "envoy.yaml").read_text()
        changes = {
            "/etc/envoy/": f"{self.directory}/",
            "port_value: 9901": f"port_value: {self.admin}",
            "port_value: 8000": f"port_value: {self.port}",
        }
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = self.directory / "envoy.yaml"
        path.write_text(text)
        envoy = Path(sys.executable).with_name("envoy")
        command = [envoy, "-c", path, "--concurrency", "1", "-l", "warn", "--disable-hot-restart"]
        self.processes.start("envoy", command)
        self.await_proxy("envoy")

    def haproxy(self):
        """Starts HAProxy with the replicas `one` and `two`."""
        text = (ENVOY / "haproxy.cfg").read_text()
        for name, example in (("one", "10.0.0.11:8080"), ("two", "10.0.0.12:8080")):
            assert text.count(example) == 3
            text = text.replace(example, "{}:{}".format(*self.addresses[name]))
        text = text.replace("bind :8000", f"bind 127.0.0.1:{self.port}")
        text = text.replace("bind :8404", f"bind 127.0.0.1:{self.admin}")
        path = self.directory / "haproxy.cfg"
        path.write_text(text)
        program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
        self.processes.start("haproxy", [program, "-f", path])
        self.await_proxy("haproxy")

    def await_proxy(self, name):
        url = f"http://127.0.0.1:{self.port}/ping"
        await_that(lambda: status(url) == 200, 20, f"{name}:\n{self.processes.tail(name)}")

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=250)
