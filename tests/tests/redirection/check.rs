//! `ztunnel check`, with all rights and with none.
use std::process::{Command, Output};

use anyhow::ensure;
use mesh_tests::agent::find_binary;

use crate::zds::Zds;

pub(crate) fn check_says_what_is_allowed(zds: &mut Zds) -> anyhow::Result<()> {
    let netns = zds.node_netns();
    let run = |command: &mut Command| -> anyhow::Result<(Output, String)> {
        let pins = netns.pins();
        let out = netns.output(command.env("CULVERT_BPF_DIR", &pins))?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        Ok((out, text))
    };
    let binary = find_binary()?;
    let (out, text) = run(Command::new(&binary).args(["check", "--node", "checked"]))?;
    ensure!(out.status.success(), "with all rights: {text}");
    for what in ["kernel", "capabilities", "pods", "ebpf", "bpffs", "nftables"] {
        ensure!(text.contains(&format!("yes  {what}")), "no {what} in:\n{text}");
    }
    ensure!(text.ends_with("pods are redirected by: ebpf\n"), "{text}");
    ensure!(!netns.pins().join("checked").exists(), "the look left something behind");

    let mut without = Command::new("setpriv");
    without.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(&binary).args(["check", "--node", "checked"]);
    let (out, text) = run(&mut without)?;
    ensure!(out.status.code() == Some(1), "without rights: {:?} {text}", out.status);
    for what in ["capabilities", "pods", "ebpf", "nftables"] {
        ensure!(text.contains(&format!("NO   {what}")), "{what} is there without rights:\n{text}");
    }
    ensure!(text.contains("NET_ADMIN") && text.contains("SYS_ADMIN"), "what is missing is not named: {text}");
    Ok(())
}
