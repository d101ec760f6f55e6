//! Decisions and publishing at the sizes the design promises (10 000 endpoints, 10 000 policies, 100 000 workloads).
#![allow(clippy::expect_used, reason = "a measurement may stop at the first surprise")]
#[path = "common/mesh.rs"]
mod mesh;

use criterion::{Criterion, criterion_group, criterion_main};
use mesh::{Shared, policy, view};
use mesh_model::authz::authorize;
use mesh_model::conn::{InboundConn, OutboundConn};
use mesh_model::lb::redraw;
use mesh_model::plan::plan_outbound;
use mesh_model::policy::{Action, PolicyKey, Scope};
use mesh_model::workload::{Health, Workload};
use mesh_model::{Change, Snapshot, SpiffeId};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

fn sock(ip: [u8; 4], port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from(ip)), port)
}

fn plan(c: &mut Criterion) {
    let (shared, snap) = mesh::mesh(100_000, 2_000);
    let source = shared.workload(0);
    let mut draw = 0_u64;
    let mut one = |name: &str, dst: SocketAddr| {
        c.bench_function(name, |b| {
            b.iter(|| {
                draw = redraw(draw, 1);
                let conn = OutboundConn { source: &source, client: sock([10, 0, 0, 1], 4000).into(), dst: dst.into(), draw };
                black_box(plan_outbound(&snap, black_box(&conn)))
            });
        });
    };
    one("plan/service", sock([172, 16, 1, 7], 80));
    one("plan/workload", sock([10, 0, 9, 9], 8080));
    one("plan/passthrough", sock([1, 1, 1, 1], 443));
}

/// 10 000 policies × 10 rules that name others, then one that names the caller.
fn authorize_10k(c: &mut Criterion) {
    let shared = Shared::new(100);
    let caller: SpiffeId = "spiffe://cluster.local/ns/caller/sa/me".parse().expect("id");
    for (name, scope, action) in [
        ("namespace_allow", Scope::Namespace, Action::Allow),
        ("namespace_deny", Scope::Namespace, Action::Deny),
        ("global_allow", Scope::Global, Action::Allow),
        ("selector_allow", Scope::Selector, Action::Allow),
        ("selector_deny", Scope::Selector, Action::Deny),
    ] {
        let mut w: Workload = shared.workload(0);
        let namespace = w.namespace.to_string();
        let policies = (0..10_000).map(|i| Change::Policy(Arc::new(policy(i, &namespace, scope, action))));
        if scope == Scope::Selector {
            w.policies = (0..10_000).map(|i| PolicyKey::new(&namespace, &format!("policy-{i}"))).collect();
        }
        let uid = Arc::clone(&w.uid);
        let changes: Vec<Change> = policies.chain([Change::Workload(Arc::new(w))]).collect();
        let snap = Snapshot::empty(view()).apply(&changes);
        let w = snap.find_workload(&uid).expect("workload");
        let conn =
            InboundConn { client: sock([10, 0, 0, 9], 4000).into(), dst: sock([10, 0, 0, 1], 8080), identity: Some(&caller) };
        c.bench_function(&format!("authorize_10k/{name}"), |b| b.iter(|| black_box(authorize(&snap, w, black_box(&conn)))));
        let change = |i: u32| {
            let mut p = policy(5_000, &namespace, scope, action);
            p.origin =
                i.is_multiple_of(2).then(|| Arc::new(mesh_model::Origin { place: "a".into(), line: i, object: "b".into() }));
            [Change::Policy(Arc::new(p))]
        };
        let mut i = 0;
        c.bench_function(&format!("publish_10k_policies/{name}"), |b| {
            b.iter(|| {
                i += 1;
                black_box(snap.apply(&change(i)))
            });
        });
    }
}

fn pick_10k(c: &mut Criterion) {
    for n in [10, 1_000, 10_000] {
        let (shared, snap) = mesh::mesh(n, 1);
        let set = snap.endpoint_set(&shared.service(0).key).expect("set");
        let mut draw = 0_u64;
        c.bench_function(&format!("pick/{n}"), |b| {
            b.iter(|| {
                draw = redraw(draw, 1);
                black_box(set.pick(Some(80), black_box(draw)))
            });
        });
    }
}

/// One change against 100 000 workloads: the next version made and the one before dropped.
fn publish_100k(c: &mut Criterion) {
    for (name, services) in [("2000_services", 2_000), ("10_services_of_10k", 10)] {
        let (shared, snap) = mesh::mesh(100_000, services);
        let mut i = 0_usize;
        c.bench_function(&format!("publish_100k/{name}/workload"), |b| {
            let mut current = snap.clone();
            b.iter(|| {
                i += 1;
                let mut w = shared.workload((i * 7919) % 100_000);
                w.health = if (i / 100_000).is_multiple_of(2) { Health::Unhealthy } else { Health::Healthy };
                current = current.apply(&[Change::Workload(Arc::new(w))]);
            });
        });
        c.bench_function(&format!("publish_100k/{name}/service"), |b| {
            let mut current = snap.clone();
            b.iter(|| {
                i += 1;
                let mut s = shared.service(i % services);
                s.lb.scopes.truncate(i % 3);
                current = current.apply(&[Change::Service(Arc::new(s))]);
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(1)).warm_up_time(std::time::Duration::from_millis(300));
    targets = plan, authorize_10k, pick_10k, publish_100k
}
criterion_main!(benches);
