//! Load time and memory of a large folder: 100 000 pods, 1 000 services, 10 000 policies.
//!
//! `cargo run --release -p mesh-sources --example load_folder [folder]` writes the folder unless one is given.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_precision_loss)]

use std::time::{Duration, Instant};

use mesh_sources::{Origin, Viewpoint};

#[path = "common/large.rs"]
mod large;
use large::{status, write};

// As the agent does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
        let (mesh, diagnostics) =
            mesh_sources::start(Origin::Folder(root.clone()), Viewpoint { node: "node-1".into(), ..Viewpoint::default() });
        mesh.synced().await;
        let took = started.elapsed();
        let snap = mesh.load_full();
        println!(
            "{} workloads, {} services, {} policies, {} problems in {took:?}; RSS {before} -> {} MiB (peak {})",
            snap.workloads().count(),
            snap.services().count(),
            snap.policies().count(),
            diagnostics.list().len(),
            status("VmRSS"),
            status("VmHWM"),
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
            println!(
                "one pod of a 10 000 pod file edited: seen {seen} after {:?} (100 ms of it settling); RSS {} MiB",
                started.elapsed(),
                status("VmRSS")
            );
        }
    });
}
