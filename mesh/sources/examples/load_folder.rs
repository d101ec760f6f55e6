//! Load time and memory of a large folder: 100 000 pods, 1 000 services, 10 000 policies.
//!
//! `cargo run --release -p mesh-sources --example load_folder [folder]` writes the folder unless one is given.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_precision_loss)]

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use mesh_sources::{Origin, Viewpoint};

// As the agent does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn write(dir: &std::path::Path) {
    for file in 0..10 {
        let mut s = String::new();
        for i in file * 10_000..(file + 1) * 10_000 {
            let (ns, app) = (i % 100, i % 1000);
            write!(s, "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: app-{app}-5d4f8c7b9-{i}\n  namespace: ns-{ns}\n  uid: 00000000-0000-0000-0000-{i:012}\n  labels:\n    app: app-{app}\n    pod-template-hash: 5d4f8c7b9\n    version: v1\n  ownerReferences:\n  - kind: ReplicaSet\n    name: app-{app}-5d4f8c7b9\n    controller: true\nspec:\n  serviceAccountName: sa-{app}\n  nodeName: node-{}\n  containers:\n  - name: main\n    ports:\n    - name: http\n      containerPort: 8080\nstatus:\n  phase: Running\n  podIP: 10.{}.{}.{}\n  conditions:\n  - type: Ready\n    status: \"True\"\n", i % 500, i >> 16, (i >> 8) & 255, i & 255).unwrap();
        }
        std::fs::write(dir.join(format!("pods-{file}.yaml")), s).unwrap();
    }
    let mut s = String::new();
    for n in 0..100 {
        write!(s, "---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: ns-{n}, labels: {{istio.io/dataplane-mode: ambient}}}}}}\n").unwrap();
    }
    for i in 0..1000 {
        write!(s, "---\napiVersion: v1\nkind: Service\nmetadata: {{name: app-{i}, namespace: ns-{}}}\nspec: {{clusterIP: 172.16.{}.{}, selector: {{app: app-{i}}}, ports: [{{name: http, port: 80, targetPort: http}}]}}\n", i % 100, i >> 8, i & 255).unwrap();
    }
    for i in 0..10_000 {
        write!(s, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p-{i}, namespace: ns-{}}}\nspec:\n  selector: {{matchLabels: {{app: app-{}}}}}\n  rules:\n  - from: [{{source: {{principals: [cluster.local/ns/ns-{}/sa/sa-{i}], namespaces: [ns-1]}}}}]\n    to: [{{operation: {{ports: ['8080']}}}}]\n", i % 100, i % 1000, i % 100).unwrap();
    }
    std::fs::write(dir.join("rest.yaml"), s).unwrap();
}

fn main() {
    let _ = mesh_runtime::allocator::refuse_huge_pages();
    let dir = tempfile::tempdir().unwrap();
    let root = std::env::args().nth(1).map_or_else(
        || {
            write(dir.path());
            dir.path().to_path_buf()
        },
        std::path::PathBuf::from,
    );
    let before = status("VmRSS");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let started = Instant::now();
        let (mesh, diagnostics) = mesh_sources::start(Origin::Folder(root.clone()), Viewpoint { node: "node-1".into(), ..Viewpoint::default() });
        mesh.synced().await;
        let took = started.elapsed();
        let snap = mesh.load_full();
        println!(
            "{} workloads, {} services, {} policies, {} problems in {took:?}; RSS {before} -> {} MiB (peak {})",
            snap.workloads().count(), snap.services().count(), snap.policies().count(), diagnostics.list().len(),
            status("VmRSS"), status("VmHWM"),
        );
        drop(snap);
        tokio::time::sleep(Duration::from_secs(1)).await;
        println!("a second later: RSS {} MiB", status("VmRSS"));
        if std::env::args().nth(1).is_none() {
            let file = root.join("pods-3.yaml");
            let text = std::fs::read_to_string(&file).unwrap().replacen("podIP: 10.0.", "podIP: 10.200.", 1);
            let mut versions = mesh.watch();
            versions.mark_unchanged();
            let started = Instant::now();
            std::fs::write(&file, text).unwrap();
            let seen = tokio::time::timeout(Duration::from_secs(30), versions.changed()).await.is_ok();
            println!("one pod of a 10 000 pod file edited: seen {seen} after {:?} (100 ms of it settling); RSS {} MiB", started.elapsed(), status("VmRSS"));
        }
    });
}
