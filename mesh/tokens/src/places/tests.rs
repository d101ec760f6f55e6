//! Where tokens are found.
use super::*;

fn found(place: &TokenPlace, target: &str, headers: &[(&'static str, &'static str)]) -> Vec<String> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, HeaderValue::from_static(value));
    }
    let query = target.split_once('?').map_or("", |(_, query)| query);
    at(place, &map, query).map(str::to_owned).collect()
}

#[test]
fn tokens_are_found_where_the_rule_says_and_nowhere_else() {
    let usual = TokenPlace::usual();
    let (bearer, param) = (&usual[0], &usual[1]);
    for (headers, want) in [
        (&[("authorization", "Bearer a.b.c")][..], &["a.b.c"][..]),
        (&[("authorization", "Bearer   a.b.c ")], &["a.b.c"]),
        (&[("authorization", "Bearer a"), ("authorization", "Bearer b")], &["a", "b"]),
        (&[("authorization", "Basic a"), ("authorization", "Bearer b")], &["b"]),
        (&[("authorization", "Bearer ")], &[""]),
        (&[("authorization", "Bearer")], &[]),
        (&[("authorization", "bearer a")], &[]),
        (&[("authorization", "a.b.c")], &[]),
        (&[("x-authorization", "Bearer a")], &[]),
    ] {
        assert_eq!(found(bearer, "/", headers), want, "{headers:?}");
    }
    for (target, want) in [
        ("/?access_token=a.b.c", &["a.b.c"][..]),
        ("/?x=1&access_token=a&access_token=b&y", &["a", "b"]),
        ("/?access_token=", &[""]),
        ("/?access_token", &[]),
        ("/?xaccess_token=a&access_tokenx=b", &[]),
        ("/access_token=a", &[]),
    ] {
        assert_eq!(found(param, target, &[]), want, "{target}");
    }
    let cookie = TokenPlace::Cookie("t".into());
    for (headers, want) in [
        (&[("cookie", "a=b; t=x.y.z; c=d")][..], &["x.y.z"][..]),
        (&[("cookie", "t=x"), ("cookie", "tt=z;t=y")], &["x", "y"]),
        (&[("cookie", "xt=a; t=")], &[""]),
        (&[("cookie", "t=\"x.y.z\"")], &["x.y.z"]),
    ] {
        assert_eq!(found(&cookie, "/", headers), want, "{headers:?}");
    }
    let whole = TokenPlace::Header(http::HeaderName::from_static("x-token"), "".into());
    assert_eq!(found(&whole, "/", &[("x-token", " a.b.c ")]), ["a.b.c"]);
}
