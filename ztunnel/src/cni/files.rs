//! The plugin on the node: its program among the others', and a network configuration that ends with it.
//!
//! Runtimes take the first configuration of the folder by name. Ours is that one: the first of the others' with our plugin behind
//! theirs, made anew whenever theirs changes. Their files are left as they are, so that nobody's installer has to fight us for
//! them, and to uninstall is to remove one file. Every file is put in place whole. Upstream: `app`. Downstream: the container runtime.
use super::{Entry, PLUGIN};
use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Before anything that a network provider's installer writes.
const CONFLIST: &str = "00-culvert.conflist";
/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Where the files are, and what is in them.
#[derive(Debug)]
pub struct Files {
    /// The runtime's network configurations (`/etc/cni/net.d`).
    pub conf_dir: PathBuf,
    /// The runtime's plugins (`/opt/cni/bin`).
    pub bin_dir: PathBuf,
    /// What the configuration says of ours.
    pub entry: Entry,
    /// Whether they were removed for good. Held while they are changed.
    pub removed: Mutex<bool>,
}

/// By what a file that was put somewhere is known again.
type Stamp = (u64, u64, i64, i64);

impl Files {
    /// Puts the files where they belong and keeps them there, on a thread of its own, for as long as `wanted`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn keep(self: Arc<Self>, wanted: impl Fn() -> bool + Send + 'static) -> io::Result<()> {
        std::thread::Builder::new().name("cni-files".to_owned()).spawn(move || {
            let (mut program, mut told) = (None, None);
            while wanted() {
                let removed = self.removed.lock();
                if *removed {
                    return;
                }
                let outcome = self.put(&mut program).map_err(|error| format!("{error:#}"));
                drop(removed);
                if told.as_ref() != Some(&outcome) {
                    match &outcome {
                        Ok(()) => tracing::info!(folder = %self.conf_dir.display(), "pods wait until they are captured"),
                        Err(error) => {
                            tracing::error!(
                                error,
                                "the CNI plugin is not as it should be: pods may start before they are captured"
                            );
                        }
                    }
                    told = Some(outcome);
                }
                std::thread::sleep(LOOK);
            }
        })?;
        Ok(())
    }

    /// Removes them, and keeps them no longer; whether there was one.
    ///
    /// # Errors
    /// One is there and cannot be removed.
    pub fn remove(&self) -> io::Result<bool> {
        let mut removed = self.removed.lock();
        *removed = true;
        remove(&self.conf_dir, &self.bin_dir)
    }

    /// Makes the files what they should be; `program` is the stamp of the program that was put. First the program, which the
    /// configuration needs.
    fn put(&self, program: &mut Option<Stamp>) -> Result<()> {
        let to = self.bin_dir.join(PLUGIN);
        if program.is_none() || stamp(&to).ok() != *program {
            let from = std::env::current_exe()?.with_file_name(PLUGIN);
            let bytes = fs::read(&from).with_context(|| from.display().to_string())?;
            replace(&to, &bytes, 0o755).with_context(|| to.display().to_string())?;
            *program = Some(stamp(&to)?);
        }
        let dir = self.conf_dir.display();
        let names = fs::read_dir(&self.conf_dir).with_context(|| dir.to_string())?.flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let first = first(names).with_context(|| format!("{dir}: no network configuration is there to be chained to"))?;
        ensure!(*first > *CONFLIST, "{dir}: {first} comes before {CONFLIST}, which will not be used");
        let text = fs::read_to_string(self.conf_dir.join(&first)).with_context(|| first.clone())?;
        let chained = chain(&text, is_list(&first), &self.entry).with_context(|| first.clone())?;
        let ours = self.conf_dir.join(CONFLIST);
        if fs::read_to_string(&ours).is_ok_and(|there| there == chained) {
            return Ok(());
        }
        replace(&ours, chained.as_bytes(), 0o600).with_context(|| ours.display().to_string())?;
        tracing::info!(file = %ours.display(), behind = first, "the CNI plugin is chained");
        Ok(())
    }
}

/// Removes the files from these folders; whether there was one. The configuration goes first: it needs the program.
///
/// # Errors
/// One is there and cannot be removed.
pub fn remove(conf_dir: &Path, bin_dir: &Path) -> io::Result<bool> {
    let gone = |path: PathBuf| match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    };
    let configured = gone(conf_dir.join(CONFLIST))?;
    Ok(gone(bin_dir.join(PLUGIN))? || configured)
}

fn is_list(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|e| e == "conflist")
}

/// The configuration a runtime would take without ours.
fn first(names: impl Iterator<Item = String>) -> Option<String> {
    let is_one = |name: &String| Path::new(name).extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json");
    names.filter(|name| is_one(name) && name != CONFLIST).min()
}

/// A list of plugins, or one plugin, with ours behind it. The network keeps its name: others keep their state by it.
fn chain(text: &str, is_list: bool, entry: &Entry) -> Result<String> {
    let mut config: Map<String, Value> = serde_json::from_str(text)?;
    if !is_list {
        let of_list = |key: &str| config.get(key).cloned().map(|value| (key.to_owned(), value));
        let mut list: Map<String, Value> = ["cniVersion", "name"].into_iter().filter_map(of_list).collect();
        list.insert("plugins".into(), json!([config]));
        config = list;
    }
    let plugins = config.get_mut("plugins").and_then(Value::as_array_mut).context("it has no list of plugins")?;
    plugins.retain(|plugin| plugin["type"] != PLUGIN);
    ensure!(!plugins.is_empty(), "its list of plugins is empty");
    plugins.push(serde_json::to_value(entry)?);
    Ok(serde_json::to_string_pretty(&config)? + "\n")
}

/// A file with this content, in the place of what was there, at once.
fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    // No runtime takes a name like this for a configuration.
    let new = path.with_extension("culvert-new");
    let mut file = File::create(&new)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(new, path)
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let meta = fs::metadata(path)?;
    Ok((meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::Unreachable;

    fn entry() -> Entry {
        Entry {
            r#type: PLUGIN.into(),
            socket: "/run/culvert/n1.cni".into(),
            unreachable: Unreachable::Refuse,
            exclude_namespaces: vec!["kube-system".into()],
        }
    }
    const LIST: &str = r#"{ "cniVersion": "1.0.0", "name": "k8s-pod-network", "disableCheck": true,
        "plugins": [{ "type": "calico", "ipam": { "type": "calico-ipam" } }, { "type": "portmap" }] }"#;

    #[test]
    fn the_others_stay_and_ours_is_last_once() {
        let chained = chain(LIST, true, &entry()).unwrap();
        let value: Value = serde_json::from_str(&chained).unwrap();
        let before: Value = serde_json::from_str(LIST).unwrap();
        let plugins = value["plugins"].as_array().unwrap();
        assert_eq!(plugins[..2], before["plugins"].as_array().unwrap()[..]);
        assert_eq!((&value["name"], &value["disableCheck"]), (&before["name"], &before["disableCheck"]));
        assert_eq!(
            plugins[2],
            json!({
                "type": "culvert-cni", "socket": "/run/culvert/n1.cni", "unreachable": "refuse", "excludeNamespaces": ["kube-system"],
            })
        );
        assert_eq!(chain(&chained, true, &entry()).unwrap(), chained, "a second time changes nothing");
    }

    #[test]
    fn one_plugin_becomes_a_list() {
        let one = r#"{ "cniVersion": "0.4.0", "name": "mynet", "type": "bridge", "bridge": "br0" }"#;
        let value: Value = serde_json::from_str(&chain(one, false, &entry()).unwrap()).unwrap();
        assert_eq!((&value["cniVersion"], &value["name"]), (&json!("0.4.0"), &json!("mynet")));
        assert_eq!(value["plugins"][0]["bridge"], "br0");
        assert_eq!(value["plugins"][1]["type"], PLUGIN);
    }

    #[test]
    fn what_is_no_configuration_is_told() {
        for text in ["", "[]", "{}", r#"{ "plugins": {} }"#, r#"{ "plugins": [] }"#] {
            assert!(chain(text, true, &entry()).is_err(), "{text}");
        }
        let names = ["20-b.conflist", "readme", "10-a.conf", CONFLIST, ".10-a.tmp", "00-culvert.culvert-new"];
        assert_eq!(first(names.into_iter().map(str::to_owned)).as_deref(), Some("10-a.conf"));
        assert_eq!(first([CONFLIST.to_owned()].into_iter()), None, "ours alone is nothing to be chained to");
    }
}
