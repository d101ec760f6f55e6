#!/bin/sh
# A node of a cluster: `node.sh DIR CLUSTER PEERS NODE IP PODS ALL`, started in a network namespace of its own, whose bridge `br0` is the
# pods'. Makes folders, cgroups, processes and BPF pins of its own, runs containerd, kubelet and kube-proxy until it is killed, and
# imports what is in CLUSTER/images. CLUSTER/admin.kubeconfig is the administrator's, PEERS has the programs of Kubernetes, PODS
# are the addresses of its pods, ALL those of every node's. Everything it writes is below DIR, and in cgroups of DIR's name.
set -eu
dir=$1 cluster=$2 peers=$3 node=$4 ip=$5 net=$6 all=$7
if [ "$$" != 1 ]; then
    groups=/sys/fs/cgroup/*/
    [ ! -f /sys/fs/cgroup/cgroup.controllers ] || groups=/sys/fs/cgroup/
    for group in $groups; do
        own=$group$(basename "$dir")
        mkdir -p "$own"
        for file in cpuset.cpus cpuset.mems; do
            # Of the first version; a group there begins without any.
            [ ! -f "$group$file" ] || cat "$group$file" > "$own/$file"
        done
        echo $$ > "$own/cgroup.procs"
    done
    exec unshare --mount --pid --cgroup --fork --kill-child "$0" "$@"
fi
mount --make-rprivate /
mount -t proc proc /proc
umount -l /sys
mount -t sysfs sysfs /sys
# What is at a fixed place on a node is an overlay here; the machine's own stays as it is.
for at in etc opt var; do
    mkdir -p "$dir/over/$at" "$dir/work/$at"
    mount -t overlay overlay -o "lowerdir=/$at,upperdir=$dir/over/$at,workdir=$dir/work/$at" "/$at"
done
mount -t tmpfs run /run
mount -t bpf bpf /sys/fs/bpf
if grep -q "^0::" /proc/self/cgroup && [ "$(wc -l < /proc/self/cgroup)" = 1 ]; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # A group with processes of its own gives its children no controllers.
    mkdir -p /sys/fs/cgroup/node
    echo 1 > /sys/fs/cgroup/node/cgroup.procs
    sed 's/[a-z_]*/+&/g' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control
else
    mount -t tmpfs cgroup /sys/fs/cgroup
    # Every hierarchy that the machine has, by the names of its controllers.
    while IFS=: read -r _ name _; do
        if [ -n "$name" ]; then
            mkdir "/sys/fs/cgroup/$name"
            mount -t cgroup -o "$(echo "$name" | sed 's/^name=/none,name=/')" cgroup "/sys/fs/cgroup/$name"
        fi
    done < /proc/self/cgroup
fi
# As systemd leaves a node: what is mounted later shows in containers that ask for it.
mount --make-rshared /
mkdir -p /opt/cni/bin /etc/cni/net.d /var/lib/kubelet
cp /usr/lib/cni/* /opt/cni/bin/
cat > /etc/cni/net.d/10-node.conflist <<END
{ "cniVersion": "1.0.0", "name": "node", "plugins": [
  { "type": "bridge", "bridge": "br0", "isGateway": true, "hairpinMode": true,
    "ipam": { "type": "host-local", "ranges": [[{ "subnet": "$net" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
  { "type": "portmap", "capabilities": { "portMappings": true } } ] }
END
cat > "$dir/containerd.toml" <<END
version = 2
root = "$dir/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "culvert.test/busybox:1"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
END
containerd --config "$dir/containerd.toml" > "$dir/containerd.log" 2>&1 &
until ctr -a /run/containerd/containerd.sock version > /dev/null 2>&1; do sleep 0.1; done
for image in "$cluster"/images/*.tar; do
    ctr -a /run/containerd/containerd.sock -n k8s.io images import "$image" >> "$dir/images.log" 2>&1
done
cat > "$dir/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
authentication: { anonymous: { enabled: true }, webhook: { enabled: false } }
authorization: { mode: AlwaysAllow }
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
resolvConf: $dir/resolv.conf
evictionHard: { memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1% }
imageGCHighThresholdPercent: 100
localStorageCapacityIsolation: false
makeIPTablesUtilChains: false
END
echo "nameserver 192.0.2.53" > "$dir/resolv.conf"
"$peers/kubelet" --config "$dir/kubelet.yaml" --kubeconfig "$cluster/admin.kubeconfig" --hostname-override="$node" --node-ip="$ip" \
    > "$dir/kubelet.log" 2>&1 &
"$peers/kube-proxy" --proxy-mode=nftables --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0s \
    --conntrack-tcp-timeout-close-wait=0s --kubeconfig "$cluster/admin.kubeconfig" --hostname-override="$node" --cluster-cidr="$all" \
    > "$dir/kube-proxy.log" 2>&1 &
touch "$dir/up"
wait
