#!/usr/bin/env python3
"""As much of the docker command as SageMaker's local mode needs. It runs the server itself.

A service of the compose file becomes a process: its environment and command as they are, the port
that is published in SAGEMAKER_BIND_TO_PORT, the volume of /opt/ml/model in SD_MODEL. What it was
given is written to LOCAL_MODE_LOG.
"""

import json
import os
import sys

import yaml

ANSWERS = {
    "compose version": "Docker Compose version v2.29.0",
    "info": "",
    "context inspect": '[{"Endpoints": {"docker": {"Host": "unix:///var/run/docker.sock"}}}]',
}


def up(path):
    """`docker compose -f PATH up`: stays as long as the server does."""
    with open(path, encoding="utf-8") as file:
        (service,) = yaml.safe_load(file)["services"].values()
    environment = dict(pair.split("=", 1) for pair in service["environment"])
    volumes = dict(reversed(volume.rsplit(":", 1)) for volume in service["volumes"])
    command = service["command"]
    words = command.split() if isinstance(command, str) else command
    (port,) = (published.split(":")[0] for published in service["ports"])
    with open(os.environ["LOCAL_MODE_LOG"], "a", encoding="utf-8") as log:
        json.dump({"environment": environment, "command": words}, log)
        log.write("\n")
    environment |= {"SAGEMAKER_BIND_TO_PORT": port, "SD_MODEL": volumes["/opt/ml/model"]}
    os.execve(os.environ["SD_SERVER"], ["sd-server", *words], environment)


def main():
    """Answers one command."""
    words = " ".join(sys.argv[1:])
    for command, answer in ANSWERS.items():
        if words.startswith(command):
            print(answer)
            return
    if sys.argv[1:3] == ["compose", "-f"] and "up" in sys.argv:
        up(sys.argv[3])
    if words.startswith("compose") and "down" in sys.argv:
        return
    sys.exit(f"docker {words}: not known here")


if __name__ == "__main__":
    main()
