use super::*;

fn full() -> Baggage<'static> {
    Baggage {
        cluster: "Kubernetes".into(),
        namespace: "default".into(),
        kind: WorkloadKind::Deployment,
        workload: "fortio-client".into(),
        service: "fortio".into(),
        version: "v1".into(),
        region: "us, west;1".into(),
        zone: "zürich %".into(),
    }
}

#[test]
fn baggage_is_written_as_istio_reads_it() {
    let value = full().encode().unwrap();
    assert_eq!(
        value.to_str().unwrap(),
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=fortio-client,service.name=fortio,\
         service.version=v1,cloud.region=us%2C%20west%3B1,cloud.availability_zone=z%C3%BCrich%20%25"
    );
    assert_eq!(Baggage::parse(value.as_bytes()), full());
}

#[test]
fn empty_fields_are_left_out() {
    assert_eq!(Baggage::default().encode(), None);
    let one = Baggage { kind: WorkloadKind::CronJob, workload: "tick".into(), ..Baggage::default() };
    assert_eq!(one.encode().unwrap(), "k8s.cronjob.name=tick");
}

#[test]
fn garbage_in_a_baggage_is_skipped_entry_by_entry() {
    let parsed = Baggage::parse(
        b"=,,;;,k8s.pod.name,service.name=%zz,service.version=%4,\xff\xfe=1, cloud.region = eu ;p=1,cloud.region=us,x=y",
    );
    assert_eq!(parsed, Baggage { region: "eu".into(), ..Baggage::default() });
    let long = format!("service.name={},service.version=1", "a".repeat(MAX_BAGGAGE));
    assert_eq!(Baggage::parse(long.as_bytes()).version, "");
    let huge = Baggage { workload: "x".repeat(9000).into(), version: "1".into(), ..Baggage::default() };
    assert_eq!(huge.encode().unwrap(), "service.version=1");
}

#[test]
fn forwarded_is_quoted_and_refuses_strange_hosts() {
    let v4 = "10.0.0.1:5000".parse().unwrap();
    let v6 = "[2001:db8::1]:5000".parse().unwrap();
    assert_eq!(
        forwarded(v4, Some("a.default.svc.cluster.local")).unwrap(),
        "for=\"10.0.0.1:5000\";host=a.default.svc.cluster.local"
    );
    assert_eq!(forwarded(v6, None).unwrap(), "for=\"[2001:db8::1]:5000\"");
    assert_eq!(forwarded(v4, Some("a\";evil=1")).unwrap(), "for=\"10.0.0.1:5000\"");
    let read = Forwarded::parse(b"For=\"[2001:db8::1]:5000\"; host=a.b, for=1.2.3.4");
    assert_eq!(read, Forwarded { client: Some(v6), host: Some("a.b") });
    assert_eq!(Forwarded::parse(b"for=unknown;;=;host="), Forwarded::default());
}

#[test]
fn connections_begin_traces_nobody_tells_of() {
    let [one, two] = [random_traceparent(), random_traceparent()].map(|v| TraceParent::parse(v.unwrap().as_bytes()).unwrap());
    assert!(one != two && one.flags == 0);
}

#[test]
fn no_input_panics() {
    // A cheap stand-in for the fuzz target: every prefix and every single-byte change of valid values.
    let seeds: [&[u8]; 3] = [
        b"k8s.cluster.name=a%20b,service.name=x;p=1",
        b"for=\"[2001:db8::1]:5000\";host=a.b",
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ];
    for seed in seeds {
        for at in 0..seed.len() {
            for byte in 0..=255u8 {
                let mut changed = seed.to_vec();
                changed[at] = byte;
                for input in [&changed[..], &changed[..at]] {
                    let _ = Baggage::parse(input).encode();
                    let _ = Forwarded::parse(input);
                    let _ = TraceParent::parse(input);
                }
            }
        }
    }
}
