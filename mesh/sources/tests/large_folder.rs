//! What a large mesh may cost: 100 000 pods, 1 000 services and 10 000 policies from a folder.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use mesh_sources::{Origin, Viewpoint};

#[path = "../examples/common/large.rs"]
mod large;

// As the agent does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Time until everything is published, on two free cores.
const LOAD: Duration = Duration::from_secs(3);
/// Resident memory once it is, in MiB.
const RESIDENT: u64 = 200;

/// `cargo test --release -p mesh-sources --test large_folder -- --ignored`, on a machine that does nothing else.
#[tokio::test]
#[ignore = "a measurement: release build and an idle machine"]
async fn a_large_folder_loads_in_time_and_stays_small() {
    let _ = mesh_runtime::allocator::refuse_huge_pages();
    let dir = tempfile::tempdir().unwrap();
    large::write(dir.path());
    mesh_runtime::allocator::return_free_pages();
    let started = Instant::now();
    let (mesh, _) = mesh_sources::start(
        Origin::Folder(dir.path().to_path_buf()),
        Viewpoint { node: "node-1".into(), ..Viewpoint::default() },
    );
    mesh.synced().await;
    let (took, resident) = (started.elapsed(), large::status("VmRSS"));
    assert_eq!(mesh.load().workloads().count(), 100_000);
    assert!(took <= LOAD && resident <= RESIDENT, "{took:?} and {resident} MiB; wanted {LOAD:?} and {RESIDENT} MiB");
}
