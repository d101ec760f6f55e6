use super::*;

#[test]
fn worker_count_follows_the_setting() {
    assert_eq!(worker_count(None, 2), Ok(2));
    assert_eq!(worker_count(Some(""), 16), Ok(4));
    assert_eq!(worker_count(None, 17), Ok(5));
    assert_eq!(worker_count(Some("0"), 12), Ok(12));
    assert_eq!(worker_count(Some("3"), 12), Ok(3));
    assert_eq!(worker_count(Some("50%"), 5), Ok(3));
    assert_eq!(worker_count(Some("0%"), 5), Ok(1));
    assert_eq!(worker_count(Some("99999999"), 5), Ok(MOST_WORKERS));
    assert!(worker_count(Some("-1"), 5).is_err());
    assert!(worker_count(Some("many"), 5).is_err());
}

#[test]
fn home_is_left_only_for_a_clear_difference() {
    assert!(!clearly_fewer(0, 4));
    assert!(clearly_fewer(0, 5));
    assert!(!clearly_fewer(75, 100));
    assert!(clearly_fewer(74, 100));
    assert!(!clearly_fewer(10, 3));
}

#[tokio::test]
async fn tasks_run_on_the_thread_they_were_given_to() {
    let threads = DataThreads::start(2).unwrap();
    assert_eq!(current(), None);
    for worker in threads.workers() {
        let (index, name) = worker.spawn(async { (current(), std::thread::current().name().map(str::to_owned)) }).await.unwrap();
        assert_eq!(index, Some(worker.index()));
        assert_eq!(name, Some(format!("data-{}", worker.index())));
    }
    assert!(threads.stop(Duration::from_secs(5)).await);
}

#[tokio::test]
async fn futures_that_are_not_send_run_on_a_data_thread() {
    let threads = DataThreads::start(1).unwrap();
    let (tx, rx) = oneshot::channel();
    threads.workers()[0].spawn_local(move || async move {
        let local = std::rc::Rc::new(7);
        let inner = std::rc::Rc::clone(&local);
        let seen = tokio::task::spawn_local(async move { *inner }).await.unwrap();
        let _ = tx.send((*local, seen, current()));
    });
    assert_eq!(rx.await.unwrap(), (7, 7, Some(0)));
}

#[tokio::test]
async fn pick_stays_local_until_another_thread_is_clearly_idler() {
    let threads = DataThreads::start(3).unwrap();
    let mut guards: Vec<_> = (0..4).map(|_| threads.workers()[1].admit()).collect();
    assert_eq!(threads.pick(Some(1)).index(), 1);
    guards.push(threads.workers()[1].admit());
    assert_eq!(threads.workers()[1].live(), 5);
    assert_eq!(threads.pick(Some(1)).index(), 0);
    assert_eq!(threads.pick(Some(99)).index(), 0);
    assert_eq!(threads.pick(None).index(), 0);
    guards.clear();
    assert_eq!(threads.workers()[1].live(), 0);
    assert_eq!(threads.pick(Some(1)).index(), 1);
}

#[tokio::test]
async fn stop_drops_what_is_left_on_its_own_thread() {
    struct Noted(Option<oneshot::Sender<Option<usize>>>);
    impl Drop for Noted {
        fn drop(&mut self) {
            if let Some(tx) = self.0.take() {
                let _ = tx.send(current());
            }
        }
    }
    let threads = DataThreads::start(1).unwrap();
    let (tx, rx) = oneshot::channel();
    let noted = Noted(Some(tx));
    threads.workers()[0].spawn(async move {
        let _noted = noted;
        std::future::pending::<()>().await;
    });
    assert!(threads.stop(Duration::from_secs(5)).await);
    assert_eq!(rx.await.unwrap(), Some(0));
}
