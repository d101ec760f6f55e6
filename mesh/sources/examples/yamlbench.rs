#![allow(missing_docs)]
fn main() {
    let mut s = String::new();
    for i in 0..25_000 {
        s.push_str(&format!("apiVersion: v1\nkind: Pod\nmetadata:\n  name: pod-{i}\n  namespace: ns-{}\n  uid: 00000000-0000-0000-0000-{i:012}\n  labels:\n    app: app-{}\n    pod-template-hash: abc{}\n    version: v1\n  ownerReferences:\n  - kind: ReplicaSet\n    name: app-{}-abc{}\n    controller: true\nspec:\n  serviceAccountName: sa\n  nodeName: node-{}\n  containers:\n  - name: main\n    ports:\n    - name: http\n      containerPort: 8080\nstatus:\n  phase: Running\n  podIP: 10.1.2.3\n  podIPs:\n  - ip: 10.1.2.3\n  conditions:\n  - type: Ready\n    status: \"True\"\n---\n", i % 100, i % 500, i % 500, i % 500, i % 500, i % 100));
    }
    let t = std::time::Instant::now();
    let docs = mesh_sources::yaml::documents(&s);
    println!("{} bytes, split {:?} {}", s.len(), t.elapsed(), docs.len());
    let t = std::time::Instant::now();
    let mut n = 0;
    for d in docs { n += mesh_sources::yaml::parse_whole(d).unwrap().get("kind").is_some() as usize; }
    println!("{n} {:?}", t.elapsed());
}
