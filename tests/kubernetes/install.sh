#!/bin/sh
# Builds the real peers of the suite `mesh_kubernetes`, Kubernetes' API server and etcd, from the Go module proxy, and takes the CRDs
# of the Gateway API from its module:
#   tests/kubernetes/install.sh DIRECTORY [node]
# With `node` also the rest of Kubernetes, for `mesh_cluster`, and the CRDs of Istio: a node has kubelet and kube-proxy, and what makes
# its pods is in controller manager and scheduler. containerd and what it needs are Debian's (`xtask/src/setup.rs`).
# Needs Go 1.26 or newer. Two thousand packages: seven minutes of CPU, once; twelve more for a node.
set -eu
kubernetes=1.36.1
gateway=v1.6.0
istio=v1.32.0
into=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
go mod init culvert.test/kubernetes
# Kubernetes names its own modules by folders of its repository; these are the same ones as they are published.
go mod download -json "k8s.io/kubernetes@v$kubernetes" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p' > path
for module in $(sed -n 's/^\t*\(k8s.io\/[a-z-]*\) => .\/staging.*/\1/p' "$(cat path)" | sort -u); do
    go mod edit -replace "$module=$module@v0.${kubernetes#1.}"
done
go mod edit -require "k8s.io/kubernetes@v$kubernetes"
mkdir kube-apiserver etcd
cat > kube-apiserver/main.go <<'END'
package main

import (
	"os"

	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() { os.Exit(cli.Run(app.NewAPIServerCommand())) }
END
cat > etcd/main.go <<'END'
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
END

version=k8s.io/component-base/version
go build -mod=mod -trimpath -buildvcs=false -ldflags "-s -w -X $version.gitVersion=v$kubernetes" -o "$into/" ./kube-apiserver ./etcd
mkdir -p "$into/gateway-api"
cp "$(go mod download -json "sigs.k8s.io/gateway-api@$gateway" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')"/config/crd/standard/*.networking.k8s.io_*s.yaml "$into/gateway-api/"
chmod u+w "$into/gateway-api/"*
if [ "${2:-}" = node ]; then
    for program in kubelet kube-proxy kube-controller-manager kube-scheduler; do
        go build -mod=mod -trimpath -buildvcs=false -ldflags "-s -w -X $version.gitVersion=v$kubernetes" -o "$into/" "k8s.io/kubernetes/cmd/$program"
    done
    mkdir -p "$into/istio-api"
    cp "$(go mod download -json "istio.io/api@$istio" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')/kubernetes/customresourcedefinitions.gen.yaml" "$into/istio-api/crds.yaml"
    chmod u+w "$into/istio-api/crds.yaml"
fi
"$into/kube-apiserver" --version
"$into/etcd" --version
