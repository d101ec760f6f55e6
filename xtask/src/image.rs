//! `cargo xtask image`: the container image of agent and waypoint as an OCI archive, without an engine and without a base image.
//!
//! Owns what is in the image. What is not ours is Debian's, from this machine: `nft`, the roots of trust and the libraries that the
//! programs are linked with. The same programs on the same machine give the same digest.

use crate::metadata::Metadata;
use crate::setup;
use crate::shell;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Ours. The last one runs on the node, with whatever libraries are there: with none.
const PROGRAMS: [&str; 4] = ["ztunnel", "waypoint", "meshctl", PLUGIN];
const PLUGIN: &str = "culvert-cni";
/// Debian's own roots, not the store of this machine: that may have more, of its operator.
const ROOTS: &str = "/usr/share/ca-certificates/mozilla";
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const FILES: [(&str, &str); 3] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n\
         nonroot:x:65532:65532:nonroot:/:/sbin/nologin\n",
    ),
    ("etc/group", "root:x:0:\nnobody:x:65534:\nnonroot:x:65532:\n"),
    ("etc/nsswitch.conf", "hosts: files dns\n"),
];

/// `cargo xtask image`.
pub fn run(args: &[String]) -> Result<()> {
    setup::ensure(setup::IMAGE)?;
    let options = Options::parse(args)?;
    let target = || Metadata::load().map(|metadata| metadata.target);
    let programs = if let Some(folder) = options.programs {
        folder
    } else {
        build()?;
        target()?.join("dist")
    };
    if let Some(root) = options.root {
        fs::create_dir_all(&root)?;
        ensure!(fs::read_dir(&root)?.next().is_none(), "{} is not empty", root.display());
        return lay(&programs, &root, &root);
    }
    let output = if let Some(file) = options.output { file } else { target()?.join("image.tar") };
    let parts = output.with_extension("parts");
    remove(&parts)?;
    let digest = assemble(&programs, &options.tag, &parts, &output);
    remove(&parts)?;
    println!("{}: {} sha256:{}", output.display(), options.tag, digest?);
    Ok(())
}

#[derive(Debug)]
struct Options {
    programs: Option<PathBuf>,
    output: Option<PathBuf>,
    root: Option<PathBuf>,
    tag: String,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options =
            Self { programs: None, output: None, root: None, tag: concat!("culvert:", env!("CARGO_PKG_VERSION")).to_owned() };
        let mut args = args.iter();
        while let Some(flag) = args.next() {
            let value = args.next().with_context(|| format!("{flag} needs a value (see `cargo xtask help`)"))?;
            match flag.as_str() {
                "--programs" => options.programs = Some(value.into()),
                "--output" => options.output = Some(value.into()),
                "--root" => options.root = Some(value.into()),
                "--tag" => value.clone_into(&mut options.tag),
                _ => bail!("unknown flag {flag} (see `cargo xtask help`)"),
            }
        }
        Ok(options)
    }
}

fn build() -> Result<()> {
    let cargo = |what: &str| {
        let mut cargo = shell::cargo();
        cargo.args([what, "--locked", "--profile", "dist", "-p", "ztunnel"]);
        cargo
    };
    shell::run(cargo("build").args(["-p", "waypoint", "-p", "meshctl"]))?;
    shell::run(cargo("rustc").args(["--bin", PLUGIN, "--", "-C", "target-feature=+crt-static"]))
}

/// Makes the archive of two layers, what is Debian's and what is ours, and gives the digest of its manifest.
fn assemble(programs: &Path, tag: &str, parts: &Path, output: &Path) -> Result<String> {
    let (base, ours, archive) = (parts.join("base"), parts.join("ours"), parts.join("archive"));
    let blobs = archive.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    lay(programs, &base, &ours)?;
    let layers = [layer(&base, &blobs)?, layer(&ours, &blobs)?];
    let (manifest, docker) = describe(tag, &layers, &blobs)?;
    let name = full_name(tag);
    let version = name.rsplit_once(':').map_or("latest", |(_, version)| version);
    let mut entry = manifest.descriptor("application/vnd.oci.image.manifest.v1+json");
    entry["annotations"] = json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": version });
    fs::write(archive.join("index.json"), json!({ "schemaVersion": 2, "manifests": [entry] }).to_string())?;
    fs::write(archive.join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string())?;
    // An index of the older kind, for `docker load` before version 25.
    fs::write(archive.join("manifest.json"), json!([docker]).to_string())?;
    tar(&archive, output)?;
    Ok(manifest.sha256)
}

/// Lays what is in the image into two folders: what is Debian's, and what is ours.
fn lay(programs: &Path, base: &Path, ours: &Path) -> Result<()> {
    let bin = ours.join("usr/local/bin");
    fs::create_dir_all(&bin)?;
    let nft = shell::find_program("nft").context("`nft` is not installed")?;
    let mut linked: BTreeSet<PathBuf> = libraries(&nft)?;
    for name in PROGRAMS {
        let program = programs.join(name);
        let needed = libraries(&program)?;
        if name == PLUGIN && !needed.is_empty() {
            eprintln!("note: {} needs libraries, which a node has to have", program.display());
        }
        linked.extend(needed);
        // Names of functions stay, for stacks; lines go, which are three quarters of the file.
        shell::run_quietly(Command::new("strip").args(["--strip-debug", "-o"]).arg(bin.join(name)).arg(&program))?;
    }
    lay_base(base, &nft, &linked)
}

/// Everything that is not ours.
fn lay_base(base: &Path, nft: &Path, linked: &BTreeSet<PathBuf>) -> Result<()> {
    for folder in ["etc/ssl/certs", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "root", "dev", "proc", "sys", "run"] {
        fs::create_dir_all(base.join(folder))?;
    }
    for folder in ["bin", "sbin", "lib", "lib64"] {
        symlink(Path::new("usr").join(folder), base.join(folder))?;
    }
    for (name, text) in FILES {
        fs::write(base.join(name), text)?;
    }
    let mut roots: Vec<PathBuf> = fs::read_dir(ROOTS).context(ROOTS)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    roots.sort();
    let bundle: String = roots.iter().map(fs::read_to_string).collect::<std::io::Result<_>>()?;
    fs::write(base.join("etc/ssl/certs/ca-certificates.crt"), bundle)?;
    fs::copy(nft, base.join("usr/sbin/nft"))?;
    for library in linked {
        // Where a machine has its libraries below `/usr`, `/lib` only points there.
        let inner = library.strip_prefix("/usr").or_else(|_| library.strip_prefix("/"))?;
        let place = base.join("usr").join(inner);
        fs::create_dir_all(place.parent().context("a library without a folder")?)?;
        fs::copy(library, &place).with_context(|| library.display().to_string())?;
    }
    Ok(())
}

/// Configuration and manifest as blobs: the manifest, and what the older kind of index says.
fn describe(tag: &str, layers: &[Blob], blobs: &Path) -> Result<(Blob, Value)> {
    let architecture = match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let diffs: Vec<String> = layers.iter().map(Blob::digest).collect();
    let configuration = json!({
        "architecture": architecture, "os": "linux", "created": "1970-01-01T00:00:00Z",
        "config": {
            "User": "0:0", "WorkingDir": "/", "Entrypoint": ["/usr/local/bin/ztunnel"],
            "Env": [format!("PATH={SEARCH_PATH}"), "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"],
        },
        "rootfs": { "type": "layers", "diff_ids": diffs },
        "history": [{ "created_by": "Debian's libraries, nft and roots of trust" }, { "created_by": "Culvert" }],
    });
    let configuration = Blob::of(configuration.to_string().as_bytes(), blobs)?;
    let of_layer = |blob: &Blob| blob.descriptor("application/vnd.oci.image.layer.v1.tar");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": configuration.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": layers.iter().map(of_layer).collect::<Vec<_>>(),
    });
    let path = |blob: &Blob| format!("blobs/sha256/{}", blob.sha256);
    let paths: Vec<String> = layers.iter().map(path).collect();
    let docker = json!({ "Config": path(&configuration), "RepoTags": [tag], "Layers": paths });
    Ok((Blob::of(manifest.to_string().as_bytes(), blobs)?, docker))
}

/// A file named by its digest.
struct Blob {
    sha256: String,
    size: u64,
}

impl Blob {
    fn of(content: &[u8], blobs: &Path) -> Result<Self> {
        let file = blobs.join("new");
        fs::write(&file, content)?;
        Self::named(&file, blobs)
    }

    fn named(file: &Path, blobs: &Path) -> Result<Self> {
        let told = shell::output(Command::new("sha256sum").arg(file))?;
        let sha256 = told.split_whitespace().next().context("sha256sum said nothing")?.to_owned();
        let size = fs::metadata(file)?.len();
        fs::rename(file, blobs.join(&sha256))?;
        Ok(Self { sha256, size })
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.sha256)
    }

    fn descriptor(&self, kind: &str) -> Value {
        json!({ "mediaType": kind, "digest": self.digest(), "size": self.size })
    }
}

/// Not compressed: a registry's client does that, and `diff_ids` are the digests then.
fn layer(folder: &Path, blobs: &Path) -> Result<Blob> {
    let file = blobs.join("new");
    tar(folder, &file)?;
    Blob::named(&file, blobs)
}

/// An archive that says nothing of when, where and by whom it was made.
fn tar(folder: &Path, file: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sort=name", "--format=ustar", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.args(["--mode=u=rwX,go=rX", "--file"]).arg(file).arg("--directory").arg(folder);
    for entry in fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect::<Result<BTreeSet<_>>>()? {
        tar.arg(entry);
    }
    shell::run_quietly(&mut tar)
}

/// What a program is linked with on this machine; nothing if it is static.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    if !program.is_file() {
        bail!("{} is not there", program.display());
    }
    let output = Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("cannot start ldd")?;
    let told = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && !complaint.contains("not a dynamic executable") {
        bail!("ldd {}: {}", program.display(), complaint.trim());
    }
    linked(&told).with_context(|| program.display().to_string())
}

/// Reads what `ldd` printed.
fn linked(told: &str) -> Result<BTreeSet<PathBuf>> {
    if let Some(line) = told.lines().find(|line| line.contains("not found")) {
        bail!("{}", line.trim());
    }
    Ok(told.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// The name as containerd writes it: `culvert:0.1.0` is of Docker's registry.
fn full_name(tag: &str) -> String {
    match tag.split_once('/') {
        None => format!("docker.io/library/{tag}"),
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => tag.to_owned(),
        Some(_) => format!("docker.io/{tag}"),
    }
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_whole() {
        for (tag, full) in [
            ("culvert:1", "docker.io/library/culvert:1"),
            ("me/culvert:1", "docker.io/me/culvert:1"),
            ("registry.example/me/culvert:1", "registry.example/me/culvert:1"),
            ("localhost/culvert:1", "localhost/culvert:1"),
            ("host:5000/culvert:1", "host:5000/culvert:1"),
        ] {
            assert_eq!(full_name(tag), full);
        }
    }

    #[test]
    fn libraries_are_read() {
        let told = "\tlinux-vdso.so.1 (0x7f)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7f)\n\t/lib64/ld.so.2 (0x7f)\n";
        assert_eq!(linked(told).unwrap(), ["/lib/x/libc.so.6", "/lib64/ld.so.2"].map(PathBuf::from).into());
        assert!(linked("\tstatically linked\n").unwrap().is_empty());
        assert!(linked("\tlibgone.so => not found\n").unwrap_err().to_string().contains("libgone"));
    }
}
