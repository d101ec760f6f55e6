#!/bin/sh
# Builds the real peer of the suite `e2e_consul`, Consul, from the Go module proxy:
#   tests/consul/install.sh DIRECTORY
# Needs Go 1.25 or newer. More than two thousand packages: ten minutes or more on two cores, once. The version is the last that is under the MPL
# and whose modules can be had; what it was written with is brought to what today's Go takes.
set -eu
version=v1.14.11
into=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
go mod init culvert.test/consul
go get -tool "github.com/hashicorp/consul@$version"
go get golang.org/x/sys@latest golang.org/x/net@latest golang.org/x/tools@latest
go build -buildvcs=false -ldflags '-s -w' -o "$into/" tool
"$into/consul" version
