use super::*;
use crate::fixture::{Req, ip};
use http::header::HeaderName;
use std::time::Duration;

/// Vectors from the reference implementation (Python's `xxhash`).
#[test]
fn xxh64_vectors() {
    for (text, want) in [
        ("", 0xEF46_DB37_51D8_E999),
        ("a", 0xD24E_C4F1_A98C_6E5B),
        ("abc", 0x44BC_2CF5_AD77_0999),
        ("foobar", 0xA2AA_05ED_9085_AAF9),
        ("The quick brown fox jumps over the lazy dog", 0x0B24_2D36_1FDA_71BC),
    ] {
        assert_eq!(xxh64(text.as_bytes(), 0), want, "{text}");
    }
    // Every way the tail can be long, without and with a seed.
    let bytes: Vec<u8> = (0..=255_u8).map(|i| i.wrapping_mul(7).wrapping_add(3)).collect();
    for (len, plain, seeded) in [
        (1, 0x1F25_C8D0_BC1F_4BB6, 0x79CF_94F5_ACE3_7FE1),
        (3, 0x31D2_363F_52E5_64C9, 0x96D2_A5E5_83DD_D738),
        (4, 0x9BB6_4B7D_66EE_9FDA, 0x4A86_2FBB_4B73_776E),
        (7, 0x9A7B_1499_59CE_60D8, 0xDDC5_CF71_D37A_6368),
        (8, 0xDAB9_9D95_C6F9_0092, 0xC6E7_5E2C_BD8E_07EE),
        (12, 0xD52E_4078_33AF_5133, 0x79B0_B158_FAB0_E5D6),
        (15, 0x1B47_CB82_43CC_8E32, 0x8120_A1ED_A8AC_77DA),
        (16, 0x4348_5023_2B78_7BE2, 0x17F3_87CE_3088_5DE5),
        (31, 0xA2AA_5F33_CC4A_6119, 0x3818_22F3_3376_D6B6),
        (32, 0x23C3_C17E_F790_FD97, 0x9ABD_3154_70AC_276A),
        (33, 0x50A7_CFC7_BA58_8784, 0x72CD_D326_2F46_7933),
        (36, 0xC0B5_2B0D_CC5E_3F7F, 0x97F1_12C7_24BD_7596),
        (40, 0xB620_306B_253D_76B6, 0x6968_E03B_E195_1FDA),
        (63, 0x5E3E_54B4_31C7_493C, 0x634D_A7D2_6597_9E61),
        (64, 0x0EB6_4B3E_F6EE_B01F, 0xBCB3_847D_7052_5180),
        (100, 0xA61F_8D4C_170F_E531, 0x86F5_49ED_E5AC_87E2),
        (256, 0x00CF_C520_7DD8_E201, 0x7444_DEE7_8E7E_31B7),
    ] {
        assert_eq!((xxh64(&bytes[..len], 0), xxh64(&bytes[..len], 2_654_435_761)), (plain, seeded), "{len}");
    }
}

fn hashed(text: &str) -> HashOutcome {
    HashOutcome::Hash(xxh64(text.as_bytes(), 0))
}
fn of(key: &HashKey, req: &Req) -> HashOutcome {
    request_hash(key, &req.facts(), ip("10.0.0.1"), 0xab)
}

#[test]
fn headers_addresses_and_queries() {
    let header = HashKey::Header(HeaderName::from_static("x-user"));
    let both = |a: &str, b: &str| Req::get("/").header("x-user", a).header("x-user", b);
    assert_eq!(of(&header, &Req::get("/").header("x-user", "me")), hashed("me"));
    assert_eq!(of(&header, &Req::get("/")), HashOutcome::Nothing);
    // Several values are one thing, in whatever order.
    assert_eq!(of(&header, &both("a", "b")), of(&header, &both("b", "a")));
    assert_eq!(of(&header, &both("a", "b")), HashOutcome::Hash(xxh64(b"b", xxh64(b"a", 0))));
    assert_ne!(of(&header, &both("a", "b")), of(&header, &both("a", "c")));

    assert_eq!(of(&HashKey::SourceIp, &Req::get("/")), hashed("10.0.0.1"));
    let mapped = request_hash(&HashKey::SourceIp, &Req::get("/").facts(), ip("::ffff:10.0.0.1"), 0);
    assert_eq!(mapped, hashed("10.0.0.1"));

    let query = HashKey::Query("u".into());
    assert_eq!(of(&query, &Req::get("/?a=1&u=me&u=you")), hashed("me"));
    assert_eq!(of(&query, &Req::get("/?u")), hashed(""));
    assert_eq!(of(&query, &Req::get("/?uu=1")), HashOutcome::Nothing);
    assert_eq!(of(&query, &Req::get("/")), HashOutcome::Nothing);
}

fn cookie_key(path: Option<&str>, ttl: Option<u64>) -> HashKey {
    HashKey::Cookie { name: "k".into(), path: path.map(Into::into), ttl: ttl.map(Duration::from_secs), attributes: "".into() }
}
#[test]
fn cookies_that_are_there() {
    let key = cookie_key(None, Some(60));
    for (lines, want) in [
        (vec!["k=v"], "v"),
        (vec!["a=1; k=v; b=2"], "v"),
        (vec!["a=1;k=v"], "v"),
        (vec!["k=\"v\""], "v"),
        (vec!["kk=x; k=v"], "v"),
        (vec!["a=1", "k=v"], "v"),
        (vec!["k=v; k=w"], "v"),
        (vec!["novalue; k=a=b"], "a=b"),
        (vec!["k=\""], "\""),
    ] {
        let req = lines.iter().fold(Req::get("/"), |req, line| req.header("cookie", line));
        assert_eq!(of(&key, &req), hashed(want), "{lines:?}");
    }
}
/// `Set-Cookie` as measured on Envoy 1.40.
#[test]
fn cookies_that_are_made() {
    for (path, ttl, want) in [
        (Some("/p"), 60, "k=\"00000000000000ab\"; Max-Age=60; Path=/p; HttpOnly"),
        (None, 0, "k=\"00000000000000ab\"; HttpOnly"),
        (Some(""), 0, "k=\"00000000000000ab\"; HttpOnly"),
    ] {
        for req in [Req::get("/"), Req::get("/").header("cookie", "k="), Req::get("/").header("cookie", "k=\"\"; kk=1")] {
            let HashOutcome::Cookie { hash, set_cookie } = of(&cookie_key(path, Some(ttl)), &req) else { panic!("no cookie") };
            assert_eq!(set_cookie, want);
            // The client that brings it back gets to the same place.
            let again = Req::get("/").header("cookie", set_cookie.split(';').next().expect("a pair"));
            assert_eq!(of(&cookie_key(path, Some(ttl)), &again), HashOutcome::Hash(hash));
        }
    }
    // Without a lifetime we make none.
    assert_eq!(of(&cookie_key(Some("/"), None), &Req::get("/")), HashOutcome::Nothing);
}
