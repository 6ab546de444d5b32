#!/usr/bin/env bash
# Makes a host of Amazon Linux 2023 one that runs sd-server; run by Packer as root, with the files of
# this folder and the binary in /tmp/sd-server. DRIVER=none leaves out what needs Amazon's packages.
set -euo pipefail

files=${FILES:-/tmp/sd-server}

if [ "${DRIVER:-nvidia}" = nvidia ]; then
    dnf install --assumeyes nvidia-release
    dnf install --assumeyes nvidia-driver-cuda amazon-cloudwatch-agent amazon-ssm-agent
    systemctl enable amazon-ssm-agent.service
fi

install --mode=0755 "$files/sd-server" /usr/local/bin/sd-server
install --mode=0644 "$files/sd-server.service" /etc/systemd/system/sd-server.service
install --mode=0644 -D "$files/amazon-cloudwatch-agent.json" \
    /opt/aws/amazon-cloudwatch-agent/etc/amazon-cloudwatch-agent.json

if [ "${DRIVER:-nvidia}" = nvidia ]; then
    systemctl enable amazon-cloudwatch-agent.service
fi
# sd-server.service is started by what knows the model: user data writes /etc/sd-server.env.
systemctl disable sd-server.service 2>/dev/null || true

# Nobody logs in by SSH.
systemctl disable sshd.service 2>/dev/null || true
rm -f /etc/ssh/ssh_host_*
