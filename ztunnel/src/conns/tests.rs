use super::*;

fn facts(port: u16) -> Facts {
    Facts {
        direction: Direction::Inbound,
        src: SocketAddr::from(([10, 0, 0, 1], port)),
        original_dst: SocketAddr::from(([10, 0, 0, 2], 15008)),
        actual_dst: Mutex::new((SocketAddr::from(([10, 0, 0, 2], 80)), Carried::Hbone)),
        identity: None,
    }
}

#[test]
fn an_entry_lives_as_long_as_its_guard() {
    let conns = Arc::new(Conns::default());
    let guards: Vec<_> = (0..100).map(|p| conns.admit(facts(p))).collect();
    assert_eq!(conns.len(), 100);
    assert_eq!(conns.list().len(), 100);
    drop(guards);
    assert!(conns.is_empty());
}

#[test]
fn a_closed_table_cuts_what_comes_late() {
    let conns = Arc::new(Conns::default());
    let early = conns.admit(facts(1));
    conns.close(&Refusal::new(Reason::Revoked, "gone"));
    let late = conns.admit(facts(2));
    assert!(early.cut.why().is_some() && late.cut.why().is_some());
}

#[tokio::test]
async fn a_cut_reaches_a_waiter_before_and_after_it_waits() {
    let conns = Arc::new(Conns::default());
    let early = conns.admit(facts(1));
    early.cut.cut(Refusal::new(Reason::Revoked, "first"));
    early.cut.cut(Refusal::new(Reason::Internal, "second"));
    early.cut.wait().await;
    assert_eq!(early.cut.why().map(|r| r.reason), Some(Reason::Revoked), "the first reason wins");

    let late = conns.admit(facts(2));
    let live = Arc::clone(&late.live);
    let waiter = tokio::spawn(async move { live.cut.wait().await });
    tokio::task::yield_now().await;
    conns.cut_all(&Refusal::new(Reason::Draining, ""));
    waiter.await.unwrap();
}
