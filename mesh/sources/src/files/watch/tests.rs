//! Which events count, and that those of a busy parent do not.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use notify::Event;
use notify::event::{AccessKind, CreateKind, EventKind, Flag, ModifyKind};

use super::*;

#[test]
fn events_beside_the_root_do_not_count() {
    let names = [PathBuf::from("/tmp/conf"), PathBuf::from("/real/conf")];
    let event = |kind: EventKind, paths: &[&str]| paths.iter().fold(Event::new(kind), |e, p| e.add_path((*p).into()));
    let changed = EventKind::Modify(ModifyKind::Any);
    for (e, want) in [
        (event(changed, &["/tmp/conf"]), true),
        (event(changed, &["/tmp/conf/sub/a.yaml"]), true),
        (event(EventKind::Create(CreateKind::File), &["/real/conf/..data"]), true),
        (event(changed, &["/tmp/other", "/tmp/conf"]), true),
        (event(changed, &[]), true),
        (event(EventKind::Other, &["/tmp"]).set_flag(Flag::Rescan), true),
        (event(changed, &["/tmp/other"]), false),
        (event(changed, &["/tmp/conf.swp"]), false),
        (event(changed, &["/tmp"]), false),
        (event(EventKind::Access(AccessKind::Any), &["/tmp/conf/a.yaml"]), false),
        (event(EventKind::Access(AccessKind::Close(AccessMode::Read)), &["/tmp/conf/a.yaml"]), false),
        (event(EventKind::Access(AccessKind::Close(AccessMode::Write)), &["/tmp/conf/a.yaml"]), true),
    ] {
        assert_eq!(concerns(&e, &names), want, "{e:?}");
    }
}

#[test]
fn a_link_is_known_by_all_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().canonicalize().unwrap();
    fs::create_dir(at.join("..one")).unwrap();
    fs::write(at.join("..one/x.yaml"), "").unwrap();
    symlink("..one", at.join("..data")).unwrap();
    symlink("..data/x.yaml", at.join("x.yaml")).unwrap();
    assert_eq!(names_of(&at.join("x.yaml")), [at.join("x.yaml"), at.join("..one/x.yaml"), at.join("..data")]);
    assert_eq!(names_of(&at.join("..one")), [at.join("..one")]);
    assert_eq!(names_of(&at.join("nowhere")), [at.join("nowhere")]);
}

/// Follows `root`, telling of each reading, until `work` is done.
fn following(root: &Path, work: impl FnOnce(&mpsc::Receiver<Instant>)) {
    let (tx, rx) = mpsc::channel();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| follow(root, || stop.load(Ordering::Relaxed), |_| tx.send(Instant::now()).ok().map(|()| Outcome::Read)));
        // Stops the thread however the work ends.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        rx.recv_timeout(Duration::from_secs(20)).expect("the first reading");
        work(&rx);
    });
}

#[test]
fn a_busy_parent_causes_no_reading_and_a_swapped_link_does() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    for (d, text) in [("one", "1"), ("two", "2")] {
        fs::create_dir(at.join(d)).unwrap();
        fs::write(at.join(d).join("a.yaml"), text).unwrap();
    }
    symlink("one", at.join("root")).unwrap();
    following(&at.join("root"), |rx| {
        for i in 0..50 {
            fs::write(at.join(format!("beside-{i}")), "x").unwrap();
        }
        // Less than the patrol; nothing tells that an event was *not* counted, but time.
        assert!(rx.recv_timeout(Duration::from_millis(700)).is_err(), "a reading for what is beside");
        let soon = PATROL.checked_sub(Duration::from_secs(2)).unwrap();
        symlink("two", at.join("next")).unwrap();
        fs::rename(at.join("next"), at.join("root")).unwrap();
        rx.recv_timeout(soon).expect("a reading for the swap");
        fs::write(at.join("two/a.yaml"), "3").unwrap();
        rx.recv_timeout(soon).expect("a reading for a change below the new target");
    });
}

#[test]
fn what_was_touched_is_named_unless_nobody_knows() {
    let touched = |paths: &[&str]| touched_by(Path::new("/conf"), &paths.iter().map(PathBuf::from).collect::<Vec<_>>());
    let names = |names: &[&str]| Touched::Names(names.iter().map(PathBuf::from).collect());
    assert_eq!(touched(&["/conf/a.yaml", "/conf/sub/b.yaml", "/conf/a.yaml"]), names(&["a.yaml", "sub/b.yaml"]));
    for unclear in [&["/conf"][..], &["/conf/a.yaml", "/real/a.yaml"], &["/conf/a.yaml", "/conf"], &[]] {
        assert_eq!(touched(unclear), Touched::All, "{unclear:?}");
    }
    // A burst names all of its files; lost events make it unclear.
    let (tx, rx) = mpsc::channel();
    let burst = |signs: &[&[&str]]| {
        for paths in signs {
            tx.send(Sign::Done(paths.iter().map(PathBuf::from).collect())).unwrap();
        }
        let now = Instant::now();
        wait(&rx, now + PATROL, now, &|| false)
    };
    assert_eq!(burst(&[&["a"], &["b", "c"]]), Some(Woken::Changed(vec!["a".into(), "b".into(), "c".into()])));
    assert_eq!(burst(&[&["a"], &[], &["b"]]), Some(Woken::Changed(vec![])));
    let now = Instant::now();
    assert_eq!(wait(&rx, now, now, &|| false), Some(Woken::Idle));
    // A look that is over is no change, and takes nothing from one.
    tx.send(Sign::Looked).unwrap();
    assert_eq!(wait(&rx, now + PATROL, now, &|| false), Some(Woken::Idle));
    for sign in [Sign::Done(vec!["a".into()]), Sign::Looked, Sign::Done(vec!["b".into()])] {
        tx.send(sign).unwrap();
    }
    assert_eq!(wait(&rx, now + PATROL, now, &|| false), Some(Woken::Changed(vec!["a".into(), "b".into()])));
}

#[test]
fn a_file_that_is_still_written_is_waited_for_and_a_whole_one_is_not() {
    let (tx, rx) = mpsc::channel();
    let at = |name: &str| vec![PathBuf::from(name)];
    let took = |signs: Vec<Sign>| {
        for sign in signs {
            tx.send(sign).unwrap();
        }
        let start = Instant::now();
        assert!(wait(&rx, start + PATROL, start, &|| false).is_some());
        start.elapsed()
    };
    assert!(took(vec![Sign::Writing(at("a")), Sign::Done(at("b"))]) >= WRITING, "`a` is not closed");
    assert!(took(vec![Sign::Writing(at("a")), Sign::Writing(at("b")), Sign::Done(at("a"))]) >= WRITING, "`b` is not closed");
    // A loaded machine may be late once, not five times.
    let whole = (0..5).map(|_| took(vec![Sign::Writing(at("a")), Sign::Done(at("a"))])).min();
    assert!(whole < Some(WRITING), "{whole:?}");
}

#[test]
fn a_file_written_in_two_goes_is_read_when_it_is_closed() {
    use std::io::Write as _;
    let dir = tempfile::tempdir().unwrap();
    following(dir.path(), |rx| {
        let mut file = fs::File::create(dir.path().join("a.yaml")).unwrap();
        file.write_all(b"one").unwrap();
        std::thread::sleep(SETTLE * 4);
        file.write_all(b"two").unwrap();
        assert!(rx.try_recv().is_err(), "read while it was written");
        drop(file);
        rx.recv_timeout(PATROL / 2).expect("a reading once it was closed");
    });
}

/// What nobody told of is looked for beside the thread that reads, which then goes on in pieces for as long as it is behind; a
/// change in between is read before the next piece.
#[test]
fn a_patrol_is_a_listing_and_a_change_does_not_wait_for_what_it_leaves() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), "1").unwrap();
    let stop = AtomicBool::new(false);
    let mut told = Vec::new();
    follow_every(
        Duration::from_millis(20),
        dir.path(),
        || stop.load(Ordering::Relaxed),
        |touched| {
            told.push(touched.clone());
            if told.len() == 2 {
                fs::write(dir.path().join("b.yaml"), "2").unwrap();
                std::thread::sleep(Duration::from_millis(100));
            }
            let piece = *touched == Touched::Names(BTreeSet::new());
            stop.store(piece || told.len() > 1000, Ordering::Relaxed);
            Some(if told.len() == 1 || piece { Outcome::Read } else { Outcome::Behind })
        },
    );
    let Touched::Listed(listing) = &told[1] else { panic!("{told:?}") };
    assert_eq!((&told[0], listing.files.len()), (&Touched::All, 1));
    assert_eq!(told[2], Touched::Names([PathBuf::from("b.yaml")].into()), "{told:?}");
    assert!(told.contains(&Touched::Names(BTreeSet::new())) && !told[1..].contains(&Touched::All), "{told:?}");
}
