"""sd-server under Ray Serve: each replica starts the binary and passes requests on.

    serve run serve_sd:app      (in this folder; README.md)
"""

import asyncio
import os
import socket
import subprocess

import httpx
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "upgrade"}


@serve.deployment(
    ray_actor_options={"num_gpus": float(os.environ.get("REPLICA_GPUS", "1"))},
    max_ongoing_requests=16,
    health_check_period_s=2,
    health_check_timeout_s=5,
    graceful_shutdown_timeout_s=35,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8},
)
class StableDiffusion:
    """A replica: the server as a child on a port of its own."""

    async def __init__(self, binary="sd-server"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "SD_HOST": "127.0.0.1", "SD_PORT": str(port)}
        self.server = subprocess.Popen([binary, "serve"], env=environment)
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=480)
        while True:
            if self.server.poll() is not None:
                raise RuntimeError(f"{binary} ended with {self.server.returncode}")
            try:
                if (await self.client.get("/ping")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)

    async def __call__(self, request: Request):
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP}
        path = httpx.URL(path=request.url.path, query=request.url.query.encode())
        sent = self.client.build_request(request.method, path, headers=headers, content=await request.body())
        reply = await self.client.send(sent, stream=True)
        headers = {k: v for k, v in reply.headers.items() if k.lower() not in HOP}
        return StreamingResponse(reply.aiter_raw(), reply.status_code, headers, background=_Closing(reply))

    def check_health(self):
        if self.server.poll() is not None:
            raise RuntimeError(f"the server ended with {self.server.returncode}")

    def __del__(self):
        if hasattr(self, "server"):
            self.server.terminate()
            self.server.wait(30)


class _Closing:
    """Closes the server's reply when the client has it, or has gone."""

    def __init__(self, reply):
        self.reply = reply

    async def __call__(self):
        await self.reply.aclose()


app = StableDiffusion.bind(os.environ.get("SD_SERVER", "sd-server"))
