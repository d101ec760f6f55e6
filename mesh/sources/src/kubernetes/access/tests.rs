use super::*;

const FILE: &str = "
apiVersion: v1
kind: Config
current-context: there
clusters:
- { name: other, cluster: { server: 'https://other' } }
- name: here
  cluster: { server: 'https://[fd00::1]:6443/prefix/', certificate-authority: ca.pem, tls-server-name: kubernetes }
contexts:
- { name: there, context: { cluster: here, user: me } }
users:
- name: me
  user: { token: secret, client-certificate-data: Q0VSVA==, client-key-data: S0VZ }
";

#[test]
fn a_kubeconfig_says_where_and_who() {
    let server = from_kubeconfig(FILE, Path::new("/etc/kube")).unwrap();
    assert_eq!(server.authority(), "[fd00::1]:6443");
    assert_eq!((server.prefix.as_str(), server.tls, server.name.as_deref()), ("/prefix", true, Some("kubernetes")));
    assert_eq!(server.roots, Some(Text::File("/etc/kube/ca.pem".into())));
    assert_eq!(server.token, Some(Text::Here("secret".into())));
    assert_eq!(server.certificate, Some((Text::Here("CERT".into()), Text::Here("KEY".into()))));
    assert!(!format!("{server:?}").contains("secret"), "a token is not shown");
}

#[test]
fn what_is_not_done_is_refused_and_not_left_out() {
    for (from, to, why) in [
        ("token: secret", "exec: { command: aws }", "exec"),
        ("tls-server-name: kubernetes", "insecure-skip-tls-verify: true", "insecure-skip-tls-verify"),
        ("'https://[fd00::1]:6443/prefix/'", "'ftp://here'", "neither http nor https"),
        ("current-context: there", "current-context: elsewhere", "no `elsewhere` among contexts"),
        ("Q0VSVA==", "???", "client-certificate-data"),
    ] {
        let error = from_kubeconfig(&FILE.replace(from, to), Path::new("")).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_pod_knows_its_server_by_its_environment() {
    let set = |name: &str| Some(if name.ends_with("HOST") { "10.96.0.1" } else { "443" }.to_owned());
    let server = in_cluster(set).unwrap();
    assert_eq!((server.authority().as_str(), server.tls), ("10.96.0.1:443", true));
    assert!(in_cluster(|_| None).unwrap_err().contains("not in a pod"));
}
