use super::*;
use crate::addr::{Network, NetworkAddr};
use crate::fixture::*;
use crate::service::Visibility;

/// A mesh of every kind of name, asked by a pod of namespace `shop`.
fn answer(name: &str, v6: bool) -> Option<(Option<String>, Vec<String>)> {
    let mut web = service("shop", "web", "10.96.0.1", &[(80, 8080)]);
    web.vips.push(NetworkAddr { network: Network::default(), ip: ip("fd00::1") });
    web.vips.push(NetworkAddr { network: "far".into(), ip: ip("10.97.0.1") });
    let mut headless = service("shop", "db", "10.96.0.2", &[(80, 8080)]);
    headless.vips.clear();
    let mut hidden = service("other", "hidden", "10.96.0.3", &[(80, 80)]);
    hidden.visibility = Visibility::Namespace;
    let mut only4 = service("shop", "four", "10.96.0.4", &[(80, 80)]);
    only4.ip_families = IpFamilies::V4;
    let entry = |host: &str, vip: &str| {
        let mut s = service("shop", host, vip, &[(443, 443)]);
        s.key = crate::service::ServiceKey::new("shop", host);
        s
    };
    let mut unaddressed = entry("plain.example.com", "10.96.0.9");
    unaddressed.vips.clear();
    let snap = mesh(vec![
        web.into(),
        headless.into(),
        hidden.into(),
        only4.into(),
        unaddressed.into(),
        entry("api.example.com", "240.240.0.1").into(),
        entry("*.example.com", "240.240.0.2").into(),
        entry("*.eu.example.com", "240.240.0.3").into(),
        service("prod", "web", "10.96.0.5", &[(80, 80)]).into(),
        backs(pod("shop", "db-0", "10.0.0.5"), &key("shop", "db"), &[(80, 8080)]).into(),
        backs(pod("shop", "db-1", "10.0.0.6"), &key("shop", "db"), &[(80, 8080)]).into(),
    ]);
    let search: Vec<Box<str>> =
        ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp.test"].map(Into::into).into();
    let client = pod("shop", "client", "10.0.0.1");
    let found = find_name(&snap, &client, &search, name)?;
    let addresses = addresses_of(&snap, &client, found.service, v6, 0).iter().map(ToString::to_string).collect();
    Some((found.alias_of.map(Into::into), addresses))
}
fn is(name: &str, alias_of: Option<&str>, addresses: &[&str]) {
    let expected = (alias_of.map(Into::into), addresses.iter().map(ToString::to_string).collect());
    assert_eq!(answer(name, false), Some(expected), "{name}");
}

#[test]
fn services_are_found_under_all_their_names() {
    for name in ["web.shop.svc.cluster.local", "web.shop.svc", "web.shop", "web"] {
        is(name, None, &["10.96.0.1"]);
        assert_eq!(answer(name, true), Some((None, vec!["fd00::1".into()])));
    }
    is("web.prod", None, &["10.96.0.5"]);
    for name in ["", ".", "webb", "web.shop.svc.cluster", "a.web.shop.svc.cluster.local", "svc.cluster.local", "cluster.local"] {
        assert_eq!(answer(name, false), None, "{name}");
    }
}

#[test]
fn headless_services_are_their_endpoints() {
    is("db.shop.svc.cluster.local", None, &["10.0.0.5", "10.0.0.6"]);
    assert_eq!(answer("db", true), Some((None, vec![])));
}

#[test]
fn search_domains_are_taken_off_and_the_answer_is_an_alias() {
    is("api.example.com.shop.svc.cluster.local", Some("api.example.com"), &["240.240.0.1"]);
    is("api.example.com.corp.test", Some("api.example.com"), &["240.240.0.1"]);
    is("x.eu.example.com.corp.test", Some("x.eu.example.com"), &["240.240.0.3"]);
    assert_eq!(answer("api.example.com.corp.other", false), None);
}

#[test]
fn the_longest_wildcard_counts_after_names() {
    is("api.example.com", None, &["240.240.0.1"]);
    is("b.example.com", None, &["240.240.0.2"]);
    is("a.b.example.com", None, &["240.240.0.2"]);
    is("a.eu.example.com", None, &["240.240.0.3"]);
    assert_eq!(answer("example.com", false), None);
}

#[test]
fn what_has_no_address_or_is_hidden_is_left_to_others() {
    // The wildcard beside it is not meant.
    assert_eq!(answer("plain.example.com", false), None);
    assert_eq!(answer("hidden.other.svc.cluster.local", false), None);
    assert_eq!(answer("four", true), Some((None, vec![])));
}

#[test]
fn answers_are_rotated() {
    let db = key("shop", "db");
    let mut headless = service("shop", "db", "10.96.0.2", &[(80, 8080)]);
    headless.vips.clear();
    let snap = mesh(vec![
        headless.clone().into(),
        backs(pod("shop", "db-0", "10.0.0.5"), &db, &[(80, 8080)]).into(),
        backs(pod("shop", "db-1", "10.0.0.6"), &db, &[(80, 8080)]).into(),
    ]);
    let client = pod("shop", "client", "10.0.0.1");
    let first = |draw| addresses_of(&snap, &client, &headless, false, draw)[0].to_string();
    assert_eq!([first(0), first(1), first(2)], ["10.0.0.5", "10.0.0.6", "10.0.0.5"]);
}
