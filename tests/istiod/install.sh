#!/bin/sh
# Builds istiod-fed (main.go) into a folder, from the modules go.sum names. Needs Go; downloads some 200 MB of sources the first
# time and takes minutes. Does nothing where the same sources are built already.
set -eu
to=$1
cd "$(dirname "$0")"
command -v go >/dev/null || { echo "Go is not installed"; exit 1; }
mkdir -p "$to"
sources=$(cat main.go go.mod go.sum | sha256sum)
if [ -x "$to/istiod-fed" ] && [ "$(cat "$to/istiod-fed.sources" 2>/dev/null)" = "$sources" ]; then
    exit 0
fi
CGO_ENABLED=0 go build -mod=readonly -trimpath -ldflags='-s -w' -o "$to/istiod-fed" .
echo "$sources" > "$to/istiod-fed.sources"
