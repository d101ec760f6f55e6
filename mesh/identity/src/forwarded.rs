//! A client's certificate as the value of `x-forwarded-client-cert`, for whoever is behind a gateway that verified it.
//!
//! The form is Envoy's as istiod sets gateways up: hash, certificate, subject (RFC 2253), URI and DNS names. Values that would end
//! an element of the list are percent-encoded, which Envoy leaves to whoever signs certificates.
use crate::pem;
use crate::verify::{VerifyError, parse};
use aws_lc_rs::digest::{SHA256, digest};
use std::fmt::Write as _;
use x509_parser::extensions::GeneralName;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

/// What is told of the certificate `der`, which is taken for verified.
///
/// # Errors
/// It cannot be read.
pub fn forwarded(der: &[u8]) -> Result<String, VerifyError> {
    let certificate = parse(der)?;
    let names = certificate.subject_alternative_name().map_err(|error| VerifyError::Unreadable(error.to_string()))?;
    let names = || names.iter().flat_map(|names| &names.value.general_names);
    let uri = names().find_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None });
    let mut text = String::from("Hash=");
    for byte in digest(&SHA256, der).as_ref() {
        // Writing to a string cannot fail, here and below.
        let _ = write!(text, "{byte:02x}");
    }
    let _ = write!(text, ";Cert=\"{}\"", encoded(&pem::certificate(der), "+/=\n "));
    let _ = write!(text, ";Subject=\"{}\"", subject(certificate.subject()));
    let _ = write!(text, ";URI={}", encoded(uri.unwrap_or_default(), SEPARATORS));
    for name in names() {
        if let GeneralName::DNSName(dns) = name {
            let _ = write!(text, ";DNS={}", encoded(dns, SEPARATORS));
        }
    }
    Ok(text)
}

const SEPARATORS: &str = ",;=\"\\ ";

/// With these characters, and what no header may hold, percent-encoded.
fn encoded(text: &str, special: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if (b' '..0x7f).contains(&byte) && !special.as_bytes().contains(&byte) {
            out.push(byte.into());
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// A name by RFC 2253: the last part first.
fn subject(name: &X509Name<'_>) -> String {
    let parts: Vec<String> = name.iter().map(|part| part.iter().map(attribute).collect::<Vec<_>>().join("+")).collect();
    parts.into_iter().rev().collect::<Vec<_>>().join(",")
}
fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let kind = attribute.attr_type();
    let kind = oid2abbrev(kind, oid_registry()).map_or_else(|_| kind.to_id_string(), str::to_owned);
    let Ok(value) = attribute.as_str() else {
        return attribute.as_slice().iter().fold(format!("{kind}=#"), |mut out, byte| {
            let _ = write!(out, "{byte:02X}");
            out
        });
    };
    let last = value.len().saturating_sub(1);
    let mut out = format!("{kind}=");
    for (n, byte) in value.bytes().enumerate() {
        let at_the_edge = n == 0 && byte == b'#' || (n == 0 || n == last) && byte == b' ';
        if !(b' '..0x7f).contains(&byte) {
            let _ = write!(out, "\\{byte:02X}");
            continue;
        }
        if at_the_edge || b",+\"\\<>;".contains(&byte) {
            out.push('\\');
        }
        out.push(byte.into());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn certificate(subject: &[(DnType, &str)], names: Vec<SanType>) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in subject {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params.subject_alt_names = names;
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn all_of_it_is_told() {
        let names = vec![
            SanType::URI("spiffe://a.b/ns/c/sa/d".try_into().unwrap()),
            SanType::DnsName("one.example".try_into().unwrap()),
            SanType::DnsName("two.example".try_into().unwrap()),
        ];
        let der = certificate(&[(DnType::OrganizationName, "Shop, \"the\" one"), (DnType::CommonName, " ann ")], names);
        let text = forwarded(&der).unwrap();
        let rest = text.strip_prefix("Hash=").unwrap();
        let (hash, rest) = rest.split_at(64);
        assert!(hash.bytes().all(|b| b.is_ascii_hexdigit()), "{text}");
        let rest = rest.strip_prefix(";Cert=\"-----BEGIN%20CERTIFICATE-----%0A").unwrap();
        let (cert, rest) = rest.split_once("-----END%20CERTIFICATE-----%0A\"").unwrap();
        assert!(cert.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'%'), "{cert}");
        assert_eq!(
            rest,
            r#";Subject="CN=\ ann\ ,O=Shop\, \"the\" one";URI=spiffe://a.b/ns/c/sa/d;DNS=one.example;DNS=two.example"#
        );
    }
    #[test]
    fn nothing_in_it_makes_another_element() {
        let names = vec![SanType::URI("x:a;By=b,Hash=\"c\"".try_into().unwrap())];
        let der = certificate(&[(DnType::CommonName, "a\u{e9}\n\";URI=b")], names);
        let text = forwarded(&der).unwrap();
        let (_, rest) = text.split_once(";Subject=").unwrap();
        assert_eq!(rest, r#""CN=a\C3\A9\0A\"\;URI=b";URI=x:a%3BBy%3Db%2CHash%3D%22c%22"#);
        assert!(forwarded(b"no certificate").is_err());
        let bare = forwarded(&certificate(&[], vec![])).unwrap();
        assert!(bare.ends_with(r#";Subject="";URI="#), "{bare}");
    }
}
