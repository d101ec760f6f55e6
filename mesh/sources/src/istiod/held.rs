//! Which changes wait for a policy. Pure.

use std::collections::HashSet;

use mesh_model::Change;
use mesh_model::policy::PolicyKey;
use mesh_model::workload::WorkloadUid;

/// What a change is about, as far as it can wait.
#[derive(PartialEq, Eq, Hash)]
enum About {
    Workload(WorkloadUid),
    Policy(PolicyKey),
}

/// What may be handed over, and what is held back: workloads that name a policy that `waits`, and the removal of one. What a later
/// change is about too is dropped; all else keeps its order.
pub(super) fn split(changes: Vec<Change>, waits: impl Fn(&PolicyKey) -> bool) -> (Vec<Change>, Vec<Change>) {
    let (mut free, mut held, mut later) = (Vec::with_capacity(changes.len()), Vec::new(), HashSet::new());
    for change in changes.into_iter().rev() {
        let (about, is_held) = match &change {
            Change::Workload(w) => (About::Workload(w.uid.clone()), w.policies.iter().any(&waits)),
            Change::WorkloadGone(uid) => (About::Workload(uid.clone()), false),
            Change::Policy(p) => (About::Policy(p.key.clone()), false),
            Change::PolicyGone(key) => (About::Policy(key.clone()), waits(key)),
            _ => {
                free.push(change);
                continue;
            }
        };
        // What was held may wait no longer only because it was taken back: its policy still is not there.
        if later.insert(about) {
            if is_held { held.push(change) } else { free.push(change) }
        }
    }
    free.reverse();
    held.reverse();
    (free, held)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_model::workload::Workload;

    use super::*;

    fn workload(uid: &str, policy: &str) -> Change {
        let policies = [PolicyKey::new("ns", policy)].into();
        Change::Workload(Arc::new(Workload { policies, ..Workload::new(uid, uid, "ns") }))
    }
    fn told(changes: &[Change]) -> Vec<String> {
        let one = |change: &Change| match change {
            Change::Workload(w) => format!("+{} {}", w.uid, w.policies[0].name),
            Change::WorkloadGone(uid) => format!("-{uid}"),
            Change::PolicyGone(key) => format!("-{}", key.name),
            other => format!("{other:?}"),
        };
        changes.iter().map(one).collect()
    }

    #[test]
    fn what_waits_is_held_until_a_later_change_takes_its_place() {
        let gone = |policy: &str| Change::PolicyGone(PolicyKey::new("ns", policy));
        let tables: [(Vec<Change>, &[&str], &[&str]); 5] = [
            (vec![workload("a", "late"), workload("b", "here")], &["+b here"], &["+a late"]),
            (vec![gone("here"), gone("late"), workload("a", "late")], &["-here"], &["-late", "+a late"]),
            (vec![workload("a", "late"), Change::WorkloadGone("a".into())], &["-a"], &[]),
            (vec![workload("a", "late"), workload("a", "here")], &["+a here"], &[]),
            (vec![workload("a", "here"), workload("a", "late")], &[], &["+a late"]),
        ];
        for (changes, free, held) in tables {
            let (now, later) = split(changes, |key| &*key.name == "late");
            assert_eq!(
                (told(&now), told(&later)),
                (free.iter().map(ToString::to_string).collect(), held.iter().map(ToString::to_string).collect())
            );
        }
    }
}
