#!/bin/sh
# Builds istiod-fed (main.go), istioctl-ztunnel (istioctl/main.go) and Istio's istioctl into a folder, from the modules go.sum names.
# Needs Go; downloads some 250 MB of sources the first time and takes minutes. Does nothing where the same sources are built already.
set -eu
to=$1
cd "$(dirname "$0")"
command -v go >/dev/null || { echo "Go is not installed"; exit 1; }
mkdir -p "$to"
build() {
    sources=$(cat ${3:+"$3"} go.mod go.sum | sha256sum)
    if [ -x "$to/$1" ] && [ "$(cat "$to/$1.sources" 2>/dev/null)" = "$sources" ]; then
        return
    fi
    CGO_ENABLED=0 go build -mod=readonly -trimpath -ldflags='-s -w' -o "$to/$1" "$2"
    echo "$sources" > "$to/$1.sources"
}
build istiod-fed . main.go
build istioctl-ztunnel ./istioctl istioctl/main.go
build istioctl istio.io/istio/istioctl/cmd/istioctl
