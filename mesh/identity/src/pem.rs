//! Certificates as text (RFC 7468) and base64 (RFC 4648 §4) for files and dumps. Encoding only; parsing is rustls-pki-types'.

use std::fmt::Write;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 with padding, on one line.
pub(crate) fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            if place <= group.len() {
                let index = (bits >> (18 - 6 * place)) & 0x3f;
                text.push(ALPHABET.get(index as usize).copied().unwrap_or(b'=').into());
            } else {
                text.push('=');
            }
        }
    }
    text
}

/// One certificate as PEM.
pub(crate) fn certificate(der: &[u8]) -> String {
    let body = base64(der);
    let mut text = String::with_capacity(body.len() + body.len() / 64 + 64);
    text.push_str("-----BEGIN CERTIFICATE-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        // I: base64 is ASCII, so every index is a character boundary.
        let (line, tail) = rest.split_at(rest.len().min(64));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
        rest = tail;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;

    #[test]
    fn base64_of_the_rfc() {
        for (plain, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn pem_reads_back() {
        for length in [1usize, 47, 48, 49, 500] {
            let der: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
            let back = CertificateDer::from_pem_slice(certificate(&der).as_bytes()).unwrap();
            assert_eq!(back.as_ref(), der);
        }
    }
}
