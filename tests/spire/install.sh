#!/bin/sh
# Builds the real peers of the suite `mesh_spire`, SPIRE's server and agent, from the Go module proxy:
#   tests/spire/install.sh DIRECTORY
# Needs Go 1.25.3 or newer and a C compiler (for SQLite). Two thousand packages: ten minutes or more on two cores, once.
set -eu
version=v1.13.3
into=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
go mod init culvert.test/spire
for program in spire-server spire-agent; do
    go get -tool "github.com/spiffe/spire/cmd/$program@$version"
done
go build -buildvcs=false -ldflags '-s -w' -o "$into/" tool
"$into/spire-server" --version
"$into/spire-agent" --version
