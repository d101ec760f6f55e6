//! `tls` of a DestinationRule.
//!
//! Inside the mesh's tunnel ISTIO_MUTUAL and DISABLE mean the same: nothing more. What cannot be verified as asked is not
//! sent: a missing Secret trusts nobody.

use std::sync::Arc;

use mesh_model::l7::destination::{ClientCertificate, KeyPair, RevocationLists, Roots, UpstreamTls};

use super::super::istio::host_name;
use super::super::layer7::Join;
use super::super::pem::PemEntries;
use super::super::read::{self, Bad, Read};
use crate::yaml::Node;

/// The block as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TlsBlock {
    /// No TLS inside the tunnel.
    Off,
    /// All that is needed is here.
    Ready(Arc<UpstreamTls>),
    /// Certificates come from a Secret.
    Secret {
        /// What does not.
        tls: Arc<UpstreamTls>,
        /// Its name.
        name: Arc<str>,
        /// With our certificate.
        mutual: bool,
    },
}

pub(super) fn read<'p>(n: &'p Node<'p>) -> Read<'p, TlsBlock> {
    read::only(
        n,
        &[
            "mode",
            "clientCertificate",
            "privateKey",
            "caCertificates",
            "credentialName",
            "subjectAltNames",
            "sni",
            "insecureSkipVerify",
            "caCrl",
        ],
    )?;
    let mode = match n.get("mode") {
        // The zero value of the API.
        None => "DISABLE",
        Some(at) => match read::scalar(at)? {
            t @ ("DISABLE" | "SIMPLE" | "MUTUAL" | "ISTIO_MUTUAL") => t,
            t => return Err(Bad::value(at, format!("`{t}` is not a TLS mode"), "write DISABLE, SIMPLE, MUTUAL or ISTIO_MUTUAL")),
        },
    };
    let file = |key: &str| -> Read<'p, Option<&'p str>> { Ok(read::text(n, key)?.filter(|t| !t.is_empty())) };
    let (chain, key, ca) = (file("clientCertificate")?, file("privateKey")?, file("caCertificates")?);
    let credential = file("credentialName")?.map(|t| t.strip_prefix("kubernetes://").unwrap_or(t));
    if matches!(mode, "DISABLE" | "ISTIO_MUTUAL") {
        let written = ["clientCertificate", "privateKey", "caCertificates", "credentialName"];
        if let Some(at) = written.iter().find_map(|k| n.get(k)) {
            return Err(Bad::value(
                at,
                format!("certificates do not go with mode {mode}"),
                "remove it, or write SIMPLE or MUTUAL",
            ));
        }
        return Ok(TlsBlock::Off);
    }
    let mutual = mode == "MUTUAL";
    if let (Some(_), Some(at)) = (credential, ["clientCertificate", "privateKey", "caCertificates"].iter().find_map(|k| n.get(k)))
    {
        return Err(Bad::value(at, "files cannot go with `credentialName`", "keep one of them"));
    }
    let crl = file("caCrl")?;
    if let (Some(_), Some(_), Some(at)) = (credential, crl, n.get("caCrl")) {
        let fix = "remove it, and put the lists into the Secret, as `ca.crl`";
        return Err(Bad::value(at, "revocation lists of a file cannot go with `credentialName`", fix));
    }
    let mut sans = Vec::new();
    for s in read::list(n, "subjectAltNames")? {
        match read::scalar(s)? {
            "" => return Err(Bad::value(s, "a name is needed", "remove it")),
            t => sans.push(Arc::from(t)),
        }
    }
    let sni = n.get("sni").filter(|s| s.text() != Some("")).map(|s| host_name(s, false)).transpose()?;
    let mut tls = UpstreamTls {
        sni: sni.map(Arc::from),
        sans,
        roots: match ca {
            None | Some("system") => Roots::System,
            Some(path) => Roots::File(path.into()),
        },
        crl: crl.map(|path| RevocationLists::File(path.into())),
        client: None,
        skip_verify: read::flag(n, "insecureSkipVerify")?,
        alpn: Vec::new(),
    };
    if let Some(name) = credential {
        return Ok(TlsBlock::Secret { tls: Arc::new(tls), name: name.into(), mutual });
    }
    tls.client = match (mutual, chain, key) {
        (true, Some(chain), Some(key)) => Some(ClientCertificate::Files { chain: chain.into(), key: key.into() }),
        (true, None, _) => {
            return Err(Bad::missing(n, "clientCertificate", "mode MUTUAL needs a certificate (or `credentialName`)"));
        }
        (true, _, None) => return Err(Bad::missing(n, "privateKey", "mode MUTUAL needs the key of its certificate")),
        (false, None, None) => None,
        (false, ..) => {
            let at = n.get("clientCertificate").or(n.get("privateKey")).unwrap_or(n);
            return Err(Bad::value(at, "a certificate of ours does not go with mode SIMPLE", "write MUTUAL, or remove it"));
        }
    };
    Ok(TlsBlock::Ready(Arc::new(tls)))
}

/// With the Secret filled in; `None` for no TLS. The Secret is of the namespace of the rule.
pub(super) fn resolve(join: &mut Join<'_>, block: &TlsBlock, namespace: &str) -> Option<Arc<UpstreamTls>> {
    let (tls, name, mutual) = match block {
        TlsBlock::Off => return None,
        TlsBlock::Ready(tls) => return Some(Arc::clone(tls)),
        TlsBlock::Secret { tls, name, mutual } => (tls, name, *mutual),
    };
    let secret = join.find_secret(namespace, name);
    let mut tls = (**tls).clone();
    tls.roots = roots(secret, namespace, name, mutual);
    tls.crl = secret.and_then(PemEntries::lists).map(|lists| RevocationLists::Pem(Arc::clone(lists)));
    if mutual {
        tls.client = Some(client(secret, namespace, name));
    }
    Some(Arc::new(tls))
}
fn first<'s>(secret: &'s PemEntries, names: &[&str]) -> Option<&'s Arc<str>> {
    names.iter().find_map(|n| secret.get(n))
}
fn roots(secret: Option<&PemEntries>, namespace: &str, name: &str, mutual: bool) -> Roots {
    match secret {
        None => Roots::Missing(format!("the Secret {namespace}/{name} does not exist").into()),
        Some(s) => match first(s, &["ca.crt", "cacert"]) {
            Some(pem) => Roots::Pem(Arc::clone(pem)),
            // With a certificate of ours and nothing else, the system's authorities, as without `caCertificates`.
            None if mutual => Roots::System,
            None => Roots::Missing(format!("the Secret {namespace}/{name} has no entry ca.crt").into()),
        },
    }
}
fn client(secret: Option<&PemEntries>, namespace: &str, name: &str) -> ClientCertificate {
    let Some(s) = secret else {
        return ClientCertificate::Missing(format!("the Secret {namespace}/{name} does not exist").into());
    };
    match (first(s, &["tls.crt", "cert"]), first(s, &["tls.key", "key"])) {
        (Some(chain), Some(key)) => ClientCertificate::Pem(KeyPair { chain: Arc::clone(chain), key: Arc::clone(key) }),
        _ => ClientCertificate::Missing(format!("the Secret {namespace}/{name} has no entries tls.crt and tls.key").into()),
    }
}
