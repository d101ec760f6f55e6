use super::*;
use crate::fixture::Req;
use crate::l7::text::Pattern;

fn at(path: PathMatch) -> HttpMatch {
    HttpMatch { path: Some(path), ..HttpMatch::default() }
}
fn text(p: &str) -> HttpMatch {
    at(PathMatch::TextPrefix(p.into()))
}
fn segments(p: &str) -> HttpMatch {
    at(PathMatch::SegmentPrefix(p.into()))
}
fn exact(p: &str) -> HttpMatch {
    at(PathMatch::Exact(p.into()))
}
fn pattern(p: &str) -> HttpMatch {
    at(PathMatch::Regex(Pattern::parse(p).expect("a pattern")))
}

/// VirtualService `rewrite.uri`; measured on Envoy 1.40.
#[test]
fn text_prefixes() {
    for (m, new, old, want) in [
        (text("/pre"), "/new", "/pre", "/new"),
        (text("/pre"), "/new", "/pre/", "/new/"),
        (text("/pre"), "/new", "/preb", "/newb"),
        (text("/pre/"), "/z/", "/pre/b", "/z/b"),
        (text("/pre/"), "/", "/pre/b", "/b"),
        // The slash a VirtualService famously doubles.
        (text("/pre"), "/", "/pre/b", "//b"),
        (text("/"), "/root", "/other", "/rootother"),
        (text("/"), "/root", "/", "/root"),
        // No path in the match is the prefix `/`.
        (HttpMatch::default(), "/root", "/other", "/rootother"),
        // Not matched by prefix: the whole path.
        (pattern("/re/.*"), "/all", "/re/x", "/all"),
        (exact("/exact"), "/all", "/exact", "/all"),
        (segments("/seg"), "/xyz", "/seg/a", "/xyz/a"),
        (HttpMatch { ignore_case: true, ..text("/cASE") }, "/new", "/CaSEs/x", "/news/x"),
        // Always a path.
        (text("/ns"), "new", "/ns/a", "/new/a"),
        (text("/ns"), "", "/ns", "/"),
    ] {
        let rewrite = PathRewrite::TextPrefix(new.into());
        assert_eq!(path(&rewrite, &m, old).as_deref(), Some(want), "{m:?} {new} {old}");
    }
}

/// The table of the Gateway API's `ReplacePrefixMatch`, and what it leaves open.
#[test]
fn segment_prefixes() {
    for (old, prefix, new, want) in [
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
        ("/foo", "/foo", "/xyz/", "/xyz"),
        ("/foo/bar", "/", "/xyz", "/xyz/foo/bar"),
        ("/foo/bar", "/foo/bar", "/a/b/c", "/a/b/c"),
    ] {
        let rewrite = PathRewrite::SegmentPrefix(new.into());
        assert_eq!(path(&rewrite, &segments(prefix), old).as_deref(), Some(want), "{old} {prefix} {new}");
    }
    let all = PathRewrite::SegmentPrefix("/xyz".into());
    assert_eq!(path(&all, &exact("/a/b"), "/a/b").as_deref(), Some("/xyz"));
    assert_eq!(path(&all, &HttpMatch::default(), "/a/b").as_deref(), Some("/xyz/a/b"));
}

/// `uriRegexRewrite` and `ReplaceFullPath`; the first measured on Envoy 1.40 (RE2's GlobalReplace).
#[test]
fn patterns_and_whole_paths() {
    for (search, replacement, old, want) in [
        ("a+", "-${0}-", "/rraab", "/rr-aa-b"),
        ("a*", "-", "/rraab", "/-/-r-r-b-"),
        ("x*", "-", "/rsab", "/-/-r-s-a-b-"),
        (r"^/rx/(\w+)/(\w+)", "/${2}/${1}", "/rx/one/two/three", "/two/one/three"),
        ("^/none", "/x", "/other", "/other"),
        ("^/all$", "", "/all", "/"),
    ] {
        let rewrite =
            PathRewrite::Regex { pattern: Pattern::parse_search(search).expect("a pattern"), replacement: replacement.into() };
        assert_eq!(path(&rewrite, &HttpMatch::default(), old).as_deref(), Some(want), "{search} {replacement} {old}");
    }
    assert_eq!(path(&PathRewrite::Full("/one".into()), &text("/a"), "/a/b").as_deref(), Some("/one"));
    // What is not there is not replaced (a path that was rewritten since it matched).
    assert_eq!(path(&PathRewrite::TextPrefix("/n".into()), &text("/a"), "/bcd"), None);
    assert_eq!(path(&PathRewrite::SegmentPrefix("/n".into()), &segments("/a"), "/b/c"), None);
    assert_eq!(path(&PathRewrite::TextPrefix("/n".into()), &text("/longer/than"), "/x"), None);
    assert_eq!(path(&PathRewrite::TextPrefix("/n".into()), &text("/ab"), "/äx"), None);
}

fn plain() -> Redirect {
    Redirect { status: 301, scheme: None, authority: None, port: RedirectPort::Unset, path: None, strip_query: false }
}
fn to(scheme: Option<&str>, authority: Option<&str>, port: RedirectPort, path: Option<PathRewrite>) -> Redirect {
    Redirect { scheme: scheme.map(Into::into), authority: authority.map(Into::into), port, path, ..plain() }
}
fn full(p: &str) -> PathRewrite {
    PathRewrite::Full(p.into())
}

/// Measured on Envoy 1.40, with what istiod makes of the objects on top (default ports left out).
#[test]
fn locations() {
    use RedirectPort::{FromRequest, Number, ProtocolDefault, Unset};
    let any = HttpMatch::default();
    for (redirect, m, host, target, want) in [
        (to(Some("https"), None, Unset, None), &any, "h.com", "/s?a=b", "https://h.com/s?a=b"),
        (to(Some("https"), None, Unset, None), &any, "h.com:80", "/s", "https://h.com/s"),
        (to(Some("https"), None, Unset, None), &any, "h.com:8080", "/s", "https://h.com:8080/s"),
        (to(Some("https"), None, Unset, None), &any, "[::1]:80", "/s", "https://[::1]/s"),
        (to(Some("https"), None, Unset, None), &any, "[::1]", "/s", "https://[::1]/s"),
        (to(Some("http"), None, Unset, None), &any, "h.com:80", "/s", "http://h.com:80/s"),
        (to(Some("https"), None, Unset, None), &any, "h.com:443", "/s", "https://h.com:443/s"),
        (to(None, Some("n.com"), Unset, None), &any, "h.com:8080", "/h?x", "http://n.com/h?x"),
        (to(None, Some("n.com:81"), Unset, None), &any, "h.com", "/h", "http://n.com:81/h"),
        (to(None, Some("[::1]:81"), Unset, None), &any, "h.com", "/h", "http://[::1]:81/h"),
        (to(None, None, Number(8443), None), &any, "h.com", "/p", "http://h.com:8443/p"),
        (to(None, None, Number(8443), None), &any, "h.com:1", "/p", "http://h.com:8443/p"),
        (to(None, None, Number(8443), None), &any, "[::1]:1", "/p", "http://[::1]:8443/p"),
        // Envoy would write both ports.
        (to(None, Some("n.com:81"), Number(8443), None), &any, "h.com", "/p", "http://n.com:8443/p"),
        (to(None, None, Number(80), None), &any, "h.com:8080", "/p", "http://h.com/p"),
        (to(None, None, Number(443), None), &any, "h.com", "/p", "http://h.com:443/p"),
        (to(Some("https"), None, Number(443), None), &any, "h.com", "/p", "https://h.com/p"),
        (to(Some("https"), None, Number(80), None), &any, "h.com", "/p", "https://h.com:80/p"),
        (to(Some("https"), None, ProtocolDefault, None), &any, "h.com:8080", "/p", "https://h.com/p"),
        (to(Some("https"), Some("n.com:81"), ProtocolDefault, None), &any, "h.com", "/p", "https://n.com/p"),
        (to(None, None, FromRequest, None), &any, "h.com:1", "/p", "http://h.com/p"),
        (to(Some("https"), Some("n.com"), FromRequest, None), &any, "h.com", "/p", "https://n.com:80/p"),
        (to(None, None, Unset, Some(full("/new"))), &any, "h.com:8080", "/p?q=1", "http://h.com:8080/new?q=1"),
        (to(None, None, Unset, Some(full("/new?x=y"))), &any, "h.com", "/p?q=1", "http://h.com/new?x=y"),
        (to(None, None, Unset, Some(full("new"))), &any, "h.com", "/p", "http://h.com/new"),
        (
            Redirect { strip_query: true, ..to(None, None, Unset, Some(full("/new"))) },
            &any,
            "h.com",
            "/p?q=1",
            "http://h.com/new",
        ),
        (plain(), &any, "h.com", "/s?", "http://h.com/s?"),
        (plain(), &any, "h.com", "//evil.com/x", "http://h.com//evil.com/x"),
        (
            to(None, Some("n.com"), Unset, Some(PathRewrite::TextPrefix("/z/".into()))),
            &text("/pre/"),
            "h.com",
            "/pre/b?z=1",
            "http://n.com/z/b?z=1",
        ),
        (
            to(None, None, Unset, Some(PathRewrite::SegmentPrefix("/".into()))),
            &segments("/sre"),
            "h.com",
            "/sre/a?b",
            "http://h.com/a?b",
        ),
        (
            to(None, None, Unset, Some(PathRewrite::TextPrefix("/all".into()))),
            &pattern("/re/.*"),
            "h.com",
            "/re/x?y",
            "http://h.com/all?y",
        ),
    ] {
        assert_eq!(redirect_location(&redirect, m, &Req::get(target).host(host).facts()), want, "{redirect:?} {host}");
    }
    // The port of the listener or service, when it is not the default.
    let mut req = Req::get("/p").host("h.com");
    req.port = 8080;
    assert_eq!(redirect_location(&to(None, None, FromRequest, None), &any, &req.facts()), "http://h.com:8080/p");
    req.scheme = "https";
    assert_eq!(redirect_location(&plain(), &any, &req.facts()), "https://h.com/p");
}
