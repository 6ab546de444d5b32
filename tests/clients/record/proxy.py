"""A proxy that writes down what passes: what a client sent, and the status that it got."""

import base64
import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What the client itself decides on.
KEPT = ("authorization", "content-type", "accept")

# What the clients read of the answers, as JSON pointers; `*` stands for every element.
READS = {
    "GET /sdapi/v1/options": ["/sd_model_checkpoint"],
    "GET /sdapi/v1/sd-models": ["/*/title", "/*/model_name"],
    "GET /sdapi/v1/samplers": ["/*/name"],
    "GET /sdapi/v1/schedulers": ["/*/name"],
    "GET /sdapi/v1/upscalers": ["/*/name"],
    "GET /sdapi/v1/latent-upscale-modes": ["/*/name"],
    "GET /sdapi/v1/sd-vae": ["/*/model_name"],
    "GET /sdapi/v1/progress": ["/progress", "/state/job_count"],
    "POST /sdapi/v1/txt2img": ["/images/*", "/info"],
    "POST /v1/images/generations": ["/data/*/b64_json"],
    "POST /v1/images/edits": ["/data/*/b64_json"],
}


@contextmanager
def recording(upstream):
    """Yields the address of a proxy before `upstream` and the list that it fills."""
    exchanges = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def pass_on(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            exchange = {"method": self.command, "path": self.path}
            exchange["headers"] = {name: headers[name] for name in KEPT if name in headers}
            if headers.get("content-type") == "application/json":
                exchange["json"] = json.loads(body)
            elif body:
                exchange["base64"] = base64.b64encode(body).decode()
            # In the order in which they were asked, whichever is answered first.
            exchanges.append(exchange)
            asked = urllib.request.Request(
                upstream + self.path, body or None, exchange["headers"], method=self.command
            )
            try:
                with urllib.request.urlopen(asked) as answer:
                    status, media_type, answer = answer.status, answer.headers["content-type"], answer.read()
            except urllib.error.HTTPError as error:
                status, media_type, answer = error.code, error.headers["content-type"], error.read()
            exchange["status"] = status
            if status == 200:
                exchange["reads"] = READS.get(f"{self.command} {self.path}", [])
            self.send_response(status)
            self.send_header("content-type", media_type)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = pass_on

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}", exchanges
    proxy.shutdown()


def write(path, client, source, exchanges):
    """The fixture: who sent this, by which of its files, and one exchange a line."""
    lines = ",\n".join("    " + json.dumps(exchange) for exchange in exchanges)
    head = f'  "client": {json.dumps(client)},\n  "source": {json.dumps(source)}'
    path.write_text(f'{{\n{head},\n  "exchanges": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
