use super::*;
use mesh_model::workload::Workload;

fn change(i: usize) -> Change {
    Change::Workload(Arc::new(Workload::new(&format!("c//Pod/ns/{i}"), &i.to_string(), "ns")))
}

#[tokio::test]
async fn coalesces_publishes_and_syncs() {
    let (mesh, publisher, mut sinks) = channel(Viewpoint::default(), 2);
    let run = tokio::spawn(publisher.run());
    let mut versions = mesh.watch();
    assert!(!mesh.is_synced());
    sinks[0].send(vec![change(1)]).await.unwrap();
    sinks[0].send(vec![change(2)]).await.unwrap();
    versions.changed().await.unwrap();
    let first = mesh.load_full();
    assert_eq!((first.version(), first.workloads().count()), (1, 2));
    assert!(!mesh.is_synced(), "the second source has said nothing yet");
    sinks[1].send(Vec::new()).await.unwrap();
    mesh.synced().await;
    sinks[1].send((0..=LARGE).map(change).collect()).await.unwrap();
    versions.changed().await.unwrap();
    while mesh.load().workloads().count() <= LARGE {
        versions.changed().await.unwrap();
    }
    assert_eq!(first.workloads().count(), 2, "a version never changes");
    drop(sinks);
    run.await.unwrap();
}

#[tokio::test]
async fn an_empty_source_is_in_sync_too() {
    let (mesh, publisher, mut sinks) = channel(Viewpoint::default(), 1);
    tokio::spawn(publisher.run());
    sinks[0].send(Vec::new()).await.unwrap();
    mesh.synced().await;
    assert_eq!(Mesh::fixed(Snapshot::empty(Viewpoint::default())).load().version(), 0);
}

#[tokio::test(start_paused = true)]
async fn only_many_changes_close_together_wait() {
    let (mesh, publisher, mut sinks) = channel(Viewpoint::default(), 1);
    tokio::spawn(publisher.run());
    let mut versions = mesh.watch();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let start = Instant::now();
    // The clock of a runtime counts whole milliseconds.
    for (i, least) in [0, 0, 0, 10, 20, 30].into_iter().enumerate() {
        sinks[0].send(vec![change(i)]).await.unwrap();
        versions.changed().await.unwrap();
        let (took, least) = (start.elapsed(), Duration::from_millis(least));
        assert!(took >= least && took <= least + Duration::from_millis(5), "change {i}: {took:?}");
    }
}
