use super::*;

const MINUTE: Duration = Duration::from_mins(1);

#[tokio::test(start_paused = true)]
async fn graceful_waits_for_the_guards() {
    let (drain, watch) = channel();
    let guard = watch.guard();
    assert!(!watch.is_draining());
    let task = tokio::spawn(async move {
        let seen = watch.draining().await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        drop(guard);
        seen.mode
    });
    drain.start(DrainMode::Graceful { deadline: MINUTE });
    let before = Instant::now();
    assert_eq!(drain.finished().await, Finished::Clean);
    assert_eq!(before.elapsed(), Duration::from_secs(5));
    assert_eq!(task.await.unwrap(), DrainMode::Graceful { deadline: MINUTE });
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_the_wait_and_counts_what_is_left() {
    let (drain, watch) = channel();
    let _held = (watch.guard(), watch.guard());
    drain.start(DrainMode::Graceful { deadline: MINUTE });
    let before = Instant::now();
    let (finished, ()) = tokio::join!(drain.finished(), watch.expired());
    assert_eq!(finished, Finished::Abandoned(2));
    assert_eq!(before.elapsed(), MINUTE);
}

#[tokio::test(start_paused = true)]
async fn a_second_start_can_only_be_stricter() {
    let (drain, watch) = channel();
    let _held = watch.guard();
    drain.start(DrainMode::Graceful { deadline: MINUTE });
    drain.start(DrainMode::Graceful { deadline: MINUTE * 2 });
    assert_eq!(watch.current().unwrap().mode, DrainMode::Graceful { deadline: MINUTE });
    let waiting = tokio::spawn({
        let watch = watch.clone();
        async move { watch.expired().await }
    });
    tokio::task::yield_now().await;
    let before = Instant::now();
    drain.start(DrainMode::Immediate);
    waiting.await.unwrap();
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert_eq!(drain.finished().await, Finished::Abandoned(1));
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_vanishes_drains_immediately() {
    let (drain, watch) = channel();
    drop(drain);
    assert_eq!(watch.draining().await.mode, DrainMode::Immediate);
    watch.expired().await;
    assert!(watch.is_draining());
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_left_after_a_graceful_start_keeps_its_deadline() {
    let (drain, watch) = channel();
    drain.start(DrainMode::Graceful { deadline: MINUTE });
    drop(drain);
    let before = Instant::now();
    watch.expired().await;
    assert_eq!(before.elapsed(), MINUTE);
}

#[tokio::test(start_paused = true)]
async fn finished_without_guards_is_immediate_and_waits_for_the_start() {
    let (drain, watch) = channel();
    let drain = Arc::new(drain);
    let waiter = tokio::spawn({
        let drain = Arc::clone(&drain);
        async move { drain.finished().await }
    });
    tokio::task::yield_now().await;
    assert!(!waiter.is_finished());
    drain.start(DrainMode::Graceful { deadline: MINUTE });
    assert_eq!(waiter.await.unwrap(), Finished::Clean);
    assert!(watch.is_draining());
}
