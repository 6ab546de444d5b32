# The image of a host: Amazon Linux 2023 with NVIDIA's driver, the CloudWatch agent and sd-server as a unit.
#
#     packer build -var binary=target/dist/sd-server deploy/aws/image
#
# Without a `packer` block, which versions before 1.7 do not know; newer ones want the plugin amazon
# (`packer plugins install github.com/hashicorp/amazon`).

variable "binary" {
  type        = string
  description = "The server, built with CUDA for the driver of the image (docker/README.md)."
}

variable "region" {
  type    = string
  default = "eu-central-1"
}

variable "instance_type" {
  type    = string
  default = "g4dn.xlarge"
}

variable "communicator" {
  type    = string
  default = "ssh"
}

variable "endpoint" {
  type        = string
  default     = ""
  description = "Another EC2 than Amazon's, for tests."
}

variable "source_ami" {
  type        = string
  default     = ""
  description = "Instead of the newest Amazon Linux 2023."
}

source "amazon-ebs" "host" {
  region              = var.region
  instance_type       = var.instance_type
  ami_name            = "sd-server-{{timestamp}}"
  encrypt_boot        = true
  communicator        = var.communicator
  ssh_username        = "ec2-user"
  source_ami          = var.source_ami
  custom_endpoint_ec2 = var.endpoint

  skip_region_validation      = var.endpoint != ""
  skip_metadata_api_check     = var.endpoint != ""
  ssh_clear_authorized_keys   = true
  associate_public_ip_address = true

  dynamic "source_ami_filter" {
    for_each = var.source_ami == "" ? ["newest"] : []
    content {
      filters = {
        name                = "al2023-ami-2023.*-x86_64"
        virtualization-type = "hvm"
      }
      owners      = ["amazon"]
      most_recent = true
    }
  }

  launch_block_device_mappings {
    device_name           = "/dev/xvda"
    volume_size           = 30
    volume_type           = "gp2"
    delete_on_termination = true
  }

  tags = {
    Name      = "sd-server"
    sd-server = "image"
  }
}

build {
  sources = ["source.amazon-ebs.host"]

  provisioner "shell" {
    inline = ["mkdir -p /tmp/sd-server"]
  }

  provisioner "file" {
    sources = [
      var.binary,
      "${path.root}/sd-server.service",
      "${path.root}/amazon-cloudwatch-agent.json",
    ]
    destination = "/tmp/sd-server/"
  }

  provisioner "shell" {
    script          = "${path.root}/install.sh"
    execute_command = "sudo env {{ .Vars }} bash {{ .Path }}"
  }
}
