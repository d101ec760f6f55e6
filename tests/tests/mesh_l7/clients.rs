//! Clients of a gateway that show certificates of their own.
use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use mesh_tests::tls::OwnCert;
use mesh_tests::wait;

use crate::mesh::{Got, Mesh, curl};

const LISTENER: &str = "    hostname: web.example\n    tls: { mode: Terminate, certificateRefs: [ { name: web-tls } ] }\n";

/// The base with something else for the listener `https`, and for all of the Gateway `gw`.
fn base(mesh: &Mesh, listener: &str, gateway: &str) -> anyhow::Result<String> {
    let was = fs::read_to_string(mesh.dir.path().join("00-base.yaml"))?;
    let new = was.replace(
        LISTENER,
        &format!(
            "    hostname: web.example\n    tls: {{ mode: Terminate, certificateRefs: [ {{ name: web-tls }} ]{listener} }}\n"
        ),
    );
    ensure!(new != was || listener.is_empty(), "the listener is written otherwise");
    let class = "  gatewayClassName: istio\n";
    ensure!(new.contains(class), "the Gateway is written otherwise");
    Ok(new.replace(class, &format!("{class}{gateway}")))
}

/// An object with authorities of clients.
fn authorities(kind: &str, name: &str, of: &OwnCert) -> String {
    let (data, pem) = (if kind == "Secret" { "stringData" } else { "data" }, of.cert.trim_end().replace('\n', "\n    "));
    format!("apiVersion: v1\nkind: {kind}\nmetadata: {{ name: {name}, namespace: t }}\n{data}:\n  ca.crt: |\n    {pem}\n")
}

/// A call to the gateway, with this certificate.
fn call(mesh: &Mesh, files: &Path, shown: Option<&OwnCert>, more: &[&str]) -> anyhow::Result<Got> {
    let resolve = format!("web.example:443:{}", mesh.pod("gw").v4);
    let (cert, key) = (files.join("client.crt").display().to_string(), files.join("client.key").display().to_string());
    let mut args =
        vec!["-k", "--resolve", &resolve, "-H", "x-forwarded-client-cert: Subject=\"CN=me\"", "https://web.example/shop/a"];
    if let Some(own) = shown {
        fs::write(&cert, &own.cert)?;
        fs::write(&key, &own.key)?;
        args.extend(["--cert", &cert, "--key", &key]);
    }
    args.extend(more);
    curl(mesh.topology.host("outside"), &args)
}

/// What the endpoint was told of the client.
fn told(got: &Got) -> anyhow::Result<Option<String>> {
    ensure!(got.status == 200, "{got:?}");
    Ok(got.echo()?["headers"]["x-forwarded-client-cert"].as_str().map(str::to_owned))
}

pub(crate) fn the_gateway_asks_clients_for_certificates(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh: &Mesh = mesh;
    let files = tempfile::tempdir()?;
    let (ann, bob) = (OwnCert::of(&["ann.example"])?, OwnCert::of(&["bob.example"])?);
    let call = |shown: Option<&OwnCert>, more: &[&str]| call(mesh, files.path(), shown, more);
    let option = |mode: &str| base(mesh, &format!(", options: {{ gateway.istio.io/tls-terminate-mode: {mode} }}"), "");
    ensure!(told(&call(Some(&ann), &[])?)?.is_none(), "nobody asked for it");
    {
        let _gateway = mesh.instead("00-base.yaml", &option("MUTUAL")?)?;
        let refused = call(Some(&ann), &[]).err().context("nobody says who issues certificates, and somebody is served")?;
        ensure!(format!("{refused:#}").contains("curl"), "{refused:#}");
        let _authorities = mesh.objects("clients", &authorities("Secret", "web-tls-cacert", &ann))?;
        wait::until_true("the listener again", || call(Some(&ann), &[]).is_ok())?;
        for version in ["--http1.1", "--http2"] {
            let header = told(&call(Some(&ann), &[version])?)?.context("nothing is told")?;
            ensure!(header.starts_with("Hash=") && header.ends_with(";URI=;DNS=ann.example"), "{header}");
            ensure!(header.contains(";Subject=\"CN=rcgen self signed cert\"") && !header.contains("CN=me"), "{header}");
            ensure!(call(None, &[version]).is_err(), "without one");
            ensure!(call(Some(&bob), &[version]).is_err(), "of somebody else");
        }
        // TLS 1.2, where the certificate comes before the end of the handshake.
        ensure!(call(Some(&ann), &["--tls-max", "1.2"])?.status == 200);
        ensure!(call(None, &["--tls-max", "1.2"]).is_err());
    }
    {
        let _gateway = mesh.instead("00-base.yaml", &option("OPTIONAL_MUTUAL")?)?;
        let _authorities = mesh.objects("clients", &authorities("Secret", "web-tls-cacert", &ann))?;
        wait::until_true("the listener again", || call(None, &[]).is_ok())?;
        ensure!(told(&call(None, &[])?)?.is_none(), "what the client says itself is not passed on");
        ensure!(told(&call(Some(&ann), &[])?)?.is_some_and(|header| header.contains("DNS=ann.example")));
        ensure!(call(Some(&bob), &[]).is_err(), "of somebody else");
    }
    // For the whole Gateway, and another authority in the place of the first.
    let frontend =
        "  tls: { frontend: { default: { validation: { caCertificateRefs: [ { kind: ConfigMap, name: clients } ] } } } }\n";
    let _gateway = mesh.instead("00-base.yaml", &base(mesh, "", frontend)?)?;
    for (good, bad) in [(&ann, &bob), (&bob, &ann)] {
        let _authorities = mesh.objects("clients", &authorities("ConfigMap", "clients", good))?;
        wait::until_true("the authority", || call(Some(good), &[]).is_ok_and(|got| got.status == 200))?;
        ensure!(call(Some(bad), &[]).is_err() && call(None, &[]).is_err());
    }
    Ok(())
}
