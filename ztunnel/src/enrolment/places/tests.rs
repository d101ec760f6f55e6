use super::*;

const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";

#[test]
fn a_pod_is_known_by_its_cgroup_in_every_layout() {
    let with_underscores = UID.replace('-', "_");
    for (who, line) in [
        (
            "containerd, systemd",
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_U.slice/cri-containerd-77.scope",
        ),
        ("guaranteed", "0::/kubepods.slice/kubepods-podU_U.slice/cri-containerd-77.scope"),
        ("systemd in the pod", "0::/kubepods.slice/kubepods-podU_U.slice/cri-containerd-77.scope/init.scope"),
        ("containerd, cgroupfs", "0::/kubepods/besteffort/podU-U/77"),
        ("CRI-O, systemd", "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_U.slice/crio-77.scope"),
        ("CRI-O, crun", "0::/kubepods.slice/kubepods-podU_U.slice/crio-77.scope/container"),
        ("CRI-O's monitor", "0::/kubepods.slice/kubepods-podU_U.slice/crio-conmon-77.scope"),
        ("CRI-O, cgroupfs", "0::/kubepods/burstable/podU-U/crio-77"),
        (
            "a node in a container, systemd",
            "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podU_U.slice/cri-containerd-77.scope",
        ),
        ("a node in a container, cgroupfs", "0::/docker/88/kubelet/kubepods/burstable/podU-U/77"),
        ("the first version", "11:memory:/kubepods/besteffort/podU-U/77"),
        ("both versions", "9:name=systemd:/kubepods/besteffort/podU-U/77\n4:memory:/kubepods/besteffort/podU-U/77\n0::/"),
        (
            "the first version, systemd",
            "1:name=systemd:/system.slice/containerd.service/kubepods-besteffort-podU_U.slice:cri-containerd:77",
        ),
    ] {
        let line = line.replace("U_U", &with_underscores).replace("U-U", UID);
        assert_eq!(pod_of(&line, 0).as_deref(), Some(UID), "{who}: {line}");
    }
    for (why, line) in [
        ("outside kubepods anybody may name a cgroup", "0::/user.slice/podU-U"),
        ("no uid", "0::/kubepods/podsomething-else"),
        ("the slice of many pods", "0::/kubepods.slice/kubepods-burstable.slice"),
        ("of the machine", "0::/system.slice/containerd.service"),
    ] {
        assert_eq!(pod_of(&line.replace("U-U", UID), 0), None, "{why}");
    }
}

/// CRI-O runs a monitor of each container in the pod's cgroup, and in the machine's network namespace.
#[test]
fn a_runtimes_monitor_in_the_cgroup_is_not_the_pod() {
    let (dir, uid) = (tempfile::tempdir().unwrap(), Arc::<str>::from(UID));
    let slice = format!("0::/kubepods.slice/kubepods-pod{}.slice", UID.replace('-', "_"));
    let process = |pid: u32, cgroup: &str, netns: &str| {
        let of = dir.path().join(pid.to_string());
        fs::create_dir_all(of.join("ns")).unwrap();
        fs::write(of.join("cgroup"), cgroup).unwrap();
        fs::write(of.join("stat"), format!("{pid} (x) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {pid} 0 0")).unwrap();
        std::os::unix::fs::symlink(netns, of.join("ns/net")).unwrap();
    };
    // A namespace of another kind stands for the machine's.
    process(1, "0::/init.scope", "/proc/self/ns/uts");
    process(20, &format!("{slice}/crio-conmon-77.scope"), "/proc/self/ns/uts");
    let (mut places, pods) = (Places::new(dir.path().to_owned()), HashSet::from([Arc::clone(&uid)]));
    places.look(&pods);
    assert!(places.get(UID).is_none(), "only its monitor runs yet");
    process(21, &format!("{slice}/crio-77.scope"), "/proc/thread-self/ns/net");
    places.look(&pods);
    let found = places.get(UID).unwrap().id();
    assert_eq!(found, NetnsFd::current().unwrap().id());
}

/// As a container in `/kubepods/burstable/podX/Y` sees them.
#[test]
fn a_pod_is_known_from_within_a_cgroup_namespace() {
    let (dir, uid) = (tempfile::tempdir().unwrap(), UID);
    let process = |pid: u32, cgroup: String| {
        let of = dir.path().join(pid.to_string());
        fs::create_dir(&of).unwrap();
        fs::write(of.join("cgroup"), cgroup).unwrap();
        fs::write(of.join("stat"), format!("{pid} (x) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {pid} 0 0")).unwrap();
    };
    process(1, "0::/../../../../init.scope\n".into());
    process(2, format!("0::/../../pod{uid}/77\n"));
    process(3, format!("0::/../../../besteffort/pod{uid}/78\n"));
    process(4, format!("0::/../../../pod{uid}/79\n"));
    process(5, format!("0::/../../../../user.slice/pod{uid}\n"));
    // Under systemd, from `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice/Y.scope`.
    let slice = format!("pod{}.slice", uid.replace('-', "_"));
    process(6, format!("0::/../../kubepods-burstable-{slice}/crio-80.scope\n"));
    process(7, format!("0::/../../../kubepods-{slice}/cri-containerd-81.scope\n"));
    process(8, format!("0::/../../../kubepods-besteffort.slice/kubepods-besteffort-{slice}/crio-82.scope\n"));
    let found = processes_of(dir.path(), &HashSet::from([uid]));
    let pids: Vec<u32> = found[uid].iter().map(|process| process.pid).collect();
    assert_eq!(pids, [2, 3, 4, 6, 7, 8], "outside of the kubelet's anybody may name a cgroup");
}

#[test]
fn the_start_is_found_behind_any_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("7")).unwrap();
    fs::write(dir.path().join("7/stat"), "7 (a ) b) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0").unwrap();
    assert_eq!(start_of(dir.path(), 7), Some(4242));
}

#[test]
fn the_runtimes_word_counts_until_a_process_is_there() {
    let (dir, uid) = (tempfile::tempdir().unwrap(), Arc::<str>::from(UID));
    let pods = HashSet::from([Arc::clone(&uid)]);
    let mut places = Places::new(dir.path().to_owned());
    places.tell(&uid, NetnsFd::current().unwrap());
    places.look(&pods);
    assert!(places.get(UID).is_some());
    let process = dir.path().join("7");
    fs::create_dir_all(process.join("ns")).unwrap();
    fs::write(process.join("cgroup"), format!("0::/kubepods/burstable/pod{UID}/77")).unwrap();
    fs::write(process.join("stat"), "7 (pause) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0").unwrap();
    // A namespace of another kind stands for another network namespace: what the sandbox before left behind.
    std::os::unix::fs::symlink("/proc/self/ns/uts", process.join("ns/net")).unwrap();
    places.look(&pods);
    assert!(!places.is_current(UID) && places.get(UID).is_some(), "it is not the place that the runtime named");
    fs::remove_file(process.join("ns/net")).unwrap();
    std::os::unix::fs::symlink("/proc/thread-self/ns/net", process.join("ns/net")).unwrap();
    places.look(&pods);
    assert!(places.is_current(UID), "now it is known by its process");
    places.look(&HashSet::new());
    assert!(places.get(UID).is_none(), "a pod that is gone is forgotten");
}
