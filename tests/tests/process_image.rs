//! `cargo xtask image`: the archive that comes out, read as a runtime reads it. (`mesh_cluster` runs it in one.)
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a suite")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mesh_tests::agent::{find_program, workspace_dir};
use mesh_tests::skip;
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAMS: [&str; 4] = ["ztunnel", "waypoint", "meshctl", "culvert-cni"];

/// Runs where there is what the image is made of.
fn skipped(name: &str) -> bool {
    let missing = ["nft", "strip", "ldd", "tar", "sha256sum"].into_iter().find_map(skip::command_missing);
    let roots = || (!Path::new("/usr/share/ca-certificates/mozilla").is_dir()).then(|| "no Debian's roots of trust".to_owned());
    let why = missing.or_else(roots);
    if let Some(why) = &why {
        skip::skipped(&format!("process_image::{name}"), why);
    }
    why.is_some()
}

/// An image of small programs in the place of ours, unpacked.
struct Image {
    dir: TempDir,
    manifest: Value,
    digest: String,
}

impl Image {
    fn make() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (programs, archive) = (dir.path().join("programs"), dir.path().join("image.tar"));
        fs::create_dir(&programs).unwrap();
        for name in PROGRAMS {
            fs::copy("/bin/true", programs.join(name)).unwrap();
        }
        let mut command = Command::new(find_program("xtask").unwrap());
        command.args(["image", "--tag", "culvert:test", "--programs"]).arg(&programs).arg("--output").arg(&archive);
        let out = command.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        unpack(&archive, &dir.path().join("image"));
        let index = read(&dir.path().join("image/index.json"));
        let digest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
        assert!(String::from_utf8(out.stdout).unwrap().contains(&digest));
        assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], "docker.io/library/culvert:test");
        let mut image = Self { dir, manifest: Value::Null, digest };
        image.manifest = read(&image.blob(&index["manifests"][0]));
        image
    }

    /// The file of a descriptor, which is what its digest and size say.
    fn blob(&self, descriptor: &Value) -> PathBuf {
        let hex = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
        let file = self.dir.path().join("image/blobs/sha256").join(hex);
        assert_eq!(descriptor["size"], fs::metadata(&file).unwrap().len());
        let out = Command::new("sha256sum").arg(&file).output().unwrap();
        assert!(String::from_utf8(out.stdout).unwrap().starts_with(hex));
        file
    }

    fn configuration(&self) -> Value {
        read(&self.blob(&self.manifest["config"]))
    }

    /// The tree that a container sees.
    fn root(&self) -> PathBuf {
        let root = self.dir.path().join("root");
        for layer in self.manifest["layers"].as_array().unwrap() {
            unpack(&self.blob(layer), &root);
        }
        root
    }
}

fn read(file: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

fn unpack(archive: &Path, into: &Path) {
    fs::create_dir_all(into).unwrap();
    let status = Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(into).status().unwrap();
    assert!(status.success());
}

#[test]
fn the_same_programs_make_the_same_image() {
    if skipped("the_same_programs_make_the_same_image") {
        return;
    }
    let (one, other) = (Image::make(), Image::make());
    assert_eq!(one.digest, other.digest);
    let layers: Vec<&Value> = one.manifest["layers"].as_array().unwrap().iter().map(|layer| &layer["digest"]).collect();
    assert_eq!(json!(layers), one.configuration()["rootfs"]["diff_ids"]);
    // What an older Docker reads names the same files.
    let docker = read(&one.dir.path().join("image/manifest.json"));
    assert_eq!(docker[0]["RepoTags"], json!(["culvert:test"]));
    for file in docker[0]["Layers"].as_array().unwrap().iter().chain([&docker[0]["Config"]]) {
        assert!(one.dir.path().join("image").join(file.as_str().unwrap()).is_file());
    }
}

/// In its own root nothing is found but what is in the image.
#[test]
fn everything_in_it_finds_its_libraries() {
    if skipped("everything_in_it_finds_its_libraries") {
        return;
    }
    if !nix::unistd::Uid::effective().is_root() {
        return skip::skipped("process_image::everything_in_it_finds_its_libraries", "chroot needs root");
    }
    let image = Image::make();
    let root = image.root();
    for program in PROGRAMS {
        let status = Command::new("chroot").arg(&root).arg(format!("/usr/local/bin/{program}")).status().unwrap();
        assert!(status.success(), "{program}");
    }
    let out = Command::new("chroot").arg(&root).args(["/usr/sbin/nft", "--version"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let roots = fs::read_to_string(root.join("etc/ssl/certs/ca-certificates.crt")).unwrap();
    assert!(roots.lines().filter(|line| *line == "-----BEGIN CERTIFICATE-----").count() > 50, "each begins on a line of its own");
    let passwd = fs::read_to_string(root.join("etc/passwd")).unwrap();
    assert!(passwd.contains("nonroot:x:65532:65532:"), "the user of the chart's waypoints");
}

/// What the chart's containers are started as, and by what.
#[test]
fn it_starts_as_the_chart_expects() {
    if skipped("it_starts_as_the_chart_expects") {
        return;
    }
    let image = Image::make();
    let config = &image.configuration()["config"];
    assert_eq!(config["Entrypoint"], json!(["/usr/local/bin/ztunnel"]));
    assert_eq!((&config["User"], &config["WorkingDir"]), (&json!("0:0"), &json!("/")));
    let environment = config["Env"].as_array().unwrap();
    assert!(environment.contains(&json!("SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt")), "{environment:?}");
    let path = environment.iter().filter_map(Value::as_str).find_map(|entry| entry.strip_prefix("PATH=")).unwrap();
    assert!(path.split(':').any(|folder| folder == "/usr/sbin"), "`nft` is found: {path}");
    let mut there: Vec<String> = fs::read_dir(image.root().join("usr/local/bin"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    there.sort_unstable();
    let mut programs = PROGRAMS.map(str::to_owned);
    programs.sort_unstable();
    assert_eq!(there, programs, "ours and nothing else");
}

/// Every file, folder and link below one, with what is in it.
fn tree(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let content = if path.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if path.is_dir() {
                folders.push(path.clone());
                Vec::new()
            } else {
                fs::read(&path).unwrap()
            };
            found.insert(path.strip_prefix(root).unwrap().to_owned(), content);
        }
    }
    found
}

/// Builders of images make of it what `cargo xtask image` makes.
#[test]
fn the_containerfile_makes_the_same() {
    if skipped("the_containerfile_makes_the_same") {
        return;
    }
    let image = Image::make();
    let root = image.dir.path().join("laid");
    let mut command = Command::new(find_program("xtask").unwrap());
    command.args(["image", "--programs"]).arg(image.dir.path().join("programs")).arg("--root").arg(&root);
    assert!(command.status().unwrap().success());
    assert!(tree(&root) == tree(&image.root()), "another tree");
    assert!(!command.status().unwrap().success(), "what is there already would be in the image");

    let file = fs::read_to_string(workspace_dir().join("Containerfile")).unwrap().replace("\\\n", " ");
    let (build, last) = file.split_once("\nFROM scratch\n").expect("from nothing");
    assert!(build.contains("\nRUN cargo xtask image --root /image\n") && last.contains("COPY --from=build /image /\n"));
    let of = |what: &str| last.lines().find_map(|line| line.strip_prefix(what)).unwrap().trim();
    let config = &image.configuration()["config"];
    assert_eq!(serde_json::from_str::<Value>(of("ENTRYPOINT")).unwrap(), config["Entrypoint"]);
    assert_eq!((of("USER"), of("WORKDIR")), (config["User"].as_str().unwrap(), config["WorkingDir"].as_str().unwrap()));
    assert_eq!(json!(of("ENV").split_whitespace().collect::<Vec<_>>()), config["Env"]);
}
