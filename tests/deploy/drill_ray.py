"""deploy/ray: two replicas draw, a server is killed, and another takes its place.

    drill_ray.py BINARY        (in a Python with what ray.txt lists)
"""

import hashlib
import os
import sys
import time
from pathlib import Path
from signal import SIGKILL

BODY = {"prompt": "a red house by the sea", "steps": 2, "width": 64, "height": 64, "seed": 3}


def drill(binary):
    os.environ |= {"SD_SERVER": binary, "SD_MODEL": "demo", "SD_DEVICE": "cpu", "SD_THREADS": "1"}
    os.environ |= {"REPLICA_GPUS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    import httpx
    import psutil
    import ray
    from ray import serve

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "deploy" / "ray"))
    os.environ["PYTHONPATH"] = sys.path[0]
    import serve_sd

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    # Two from the start: autoscaling is Ray's own affair.
    deployment = serve_sd.StableDiffusion.options(num_replicas=2, autoscaling_config=None)
    serve.run(deployment.bind(binary))

    def draw():
        reply = httpx.post("http://127.0.0.1:8000/invocations", json=BODY, headers={"Accept": "image/png"}, timeout=60)
        return reply.status_code, hashlib.sha256(reply.content).hexdigest()

    def servers():
        return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"][:2] == [binary, "serve"]]

    first = [draw() for _ in range(8)]
    assert {status for status, _ in first} == {200} and len(set(first)) == 1, first
    assert len(servers()) == 2
    victim = servers()[0]
    victim.send_signal(SIGKILL)
    began = time.monotonic()
    while True:
        living = [p for p in servers() if p.pid != victim.pid and p.status() != psutil.STATUS_ZOMBIE]
        if len(living) == 2:
            break
        assert time.monotonic() - began < 120, "no replica has taken its place"
        time.sleep(0.5)
    replaced, wrong = time.monotonic() - began, 0
    # The new server loads its model first.
    while (lost := [one for one in (draw() for _ in range(8)) if one != first[0]]) and wrong < 30:
        wrong += 1
        time.sleep(1)
    print(f"ok    replaced after {replaced:.1f} s, and every request after {time.monotonic() - began:.1f} s answered with the same picture")
    serve.shutdown()
    ray.shutdown()
    return bool(lost)


if __name__ == "__main__":
    sys.exit(drill(sys.argv[1]))
