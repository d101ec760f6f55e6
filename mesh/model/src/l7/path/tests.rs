use super::*;
use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None as Off};
use proptest::prelude::*;

fn to(mode: PathNormalization, path: &str) -> Result<String, BadPath> {
    normalize(mode, path).map(Cow::into_owned)
}

/// Input, and what Envoy 1.40 makes of it with BASE, MERGE_SLASHES, DECODE_AND_MERGE_SLASHES. Measured, but for the last block.
const TABLE: &[(&str, &str, &str, &str)] = &[
    ("/", "/", "/", "/"),
    ("/a//b", "/a//b", "/a/b", "/a/b"),
    ("//a", "//a", "/a", "/a"),
    ("/a//", "/a//", "/a/", "/a/"),
    // Dot segments.
    ("/a/./b", "/a/b", "/a/b", "/a/b"),
    ("/a/../b", "/b", "/b", "/b"),
    ("/a/..", "/", "/", "/"),
    ("/..", "/", "/", "/"),
    ("/../..", "/", "/", "/"),
    ("/a/b/../../..", "/", "/", "/"),
    ("/a/.", "/a/", "/a/", "/a/"),
    ("/.", "/", "/", "/"),
    ("/./", "/", "/", "/"),
    ("/.a", "/.a", "/.a", "/.a"),
    ("/a.", "/a.", "/a.", "/a."),
    ("/a..", "/a..", "/a..", "/a.."),
    ("/..a/b", "/..a/b", "/..a/b", "/..a/b"),
    ("/...", "/...", "/...", "/..."),
    ("/a/.../b", "/a/.../b", "/a/.../b", "/a/.../b"),
    ("//../a", "/a", "/a", "/a"),
    ("/a//../b", "/a/b", "/a/b", "/a/b"),
    ("/a//..//b", "/a//b", "/a/b", "/a/b"),
    ("/a/b//../../c", "/a/c", "/a/c", "/a/c"),
    ("/a/.//b", "/a//b", "/a/b", "/a/b"),
    ("//..//a", "//a", "/a", "/a"),
    // Escaped dots.
    ("/%2e", "/", "/", "/"),
    ("/%2e%2e", "/", "/", "/"),
    ("/a/%2e%2e/b", "/b", "/b", "/b"),
    ("/a/%2E./b", "/b", "/b", "/b"),
    ("/a/.%2e/b", "/b", "/b", "/b"),
    ("/a/%2e/b", "/a/b", "/a/b", "/a/b"),
    ("/a/%2e%2ex", "/a/..x", "/a/..x", "/a/..x"),
    ("/a%2e", "/a.", "/a.", "/a."),
    ("/a/%2e%2e/", "/", "/", "/"),
    ("/a/b/%2e", "/a/b/", "/a/b/", "/a/b/"),
    ("/a//%2e%2e//b", "/a//b", "/a/b", "/a/b"),
    // Escaped twice stays escaped once less only where it is decoded, which is nowhere.
    ("/%252f", "/%252f", "/%252f", "/%252f"),
    ("/%252e%252e/a", "/%252e%252e/a", "/%252e%252e/a", "/%252e%252e/a"),
    // Escaped slashes.
    ("/a%2fb", "/a%2fb", "/a%2fb", "/a/b"),
    ("/a%2Fb", "/a%2Fb", "/a%2Fb", "/a/b"),
    ("/a/..%2fb", "/a/..%2fb", "/a/..%2fb", "/b"),
    ("/a%2f..%2fb", "/a%2f..%2fb", "/a%2f..%2fb", "/b"),
    ("/a%5cb", "/a%5cb", "/a%5cb", "/a/b"),
    ("/a%5C..%5cb", "/a%5C..%5cb", "/a%5C..%5cb", "/b"),
    ("/a/%2f/b", "/a/%2f/b", "/a/%2f/b", "/a/b"),
    ("/a%2f%2fb", "/a%2f%2fb", "/a%2f%2fb", "/a/b"),
    ("/%2f/a", "/%2f/a", "/%2f/a", "/a"),
    ("/%2f..", "/%2f..", "/%2f..", "/"),
    ("/x%2f..", "/x%2f..", "/x%2f..", "/"),
    ("/a%5c", "/a%5c", "/a%5c", "/a/"),
    // Backslashes.
    ("/a\\b", "/a/b", "/a/b", "/a/b"),
    ("/a\\..\\b", "/b", "/b", "/b"),
    ("/a/..\\b", "/b", "/b", "/b"),
    // Parameters of dot segments, and of others.
    ("/..;/a", "/a", "/a", "/a"),
    ("/a/..;/b", "/b", "/b", "/b"),
    ("/a/..;x=1/b", "/b", "/b", "/b"),
    ("/a/.;x/b", "/a/b", "/a/b", "/a/b"),
    ("/a/..;", "/", "/", "/"),
    ("/a/.;", "/a/", "/a/", "/a/"),
    ("/a/..;%2f/b", "/b", "/b", "/b"),
    ("/a/..;x\\b", "/", "/", "/"),
    ("/a/..;;/b", "/b", "/b", "/b"),
    ("/a;/..;/b", "/b", "/b", "/b"),
    ("/a/..;/..;/b", "/b", "/b", "/b"),
    ("/a/;/b", "/a/;/b", "/a/;/b", "/a/;/b"),
    ("/a/;../b", "/a/;../b", "/a/;../b", "/a/;../b"),
    ("/a;x=1/../b", "/b", "/b", "/b"),
    ("/a/...;/b", "/a/...;/b", "/a/...;/b", "/a/...;/b"),
    ("/a/.a;/b", "/a/.a;/b", "/a/.a;/b", "/a/.a;/b"),
    ("/a/..%3b/b", "/a/..%3b/b", "/a/..%3b/b", "/a/..%3b/b"),
    ("/a/..,/b", "/a/..,/b", "/a/..,/b", "/a/..,/b"),
    // Escapes of unreserved characters are undone, all others stay as they were written.
    ("/%41%7e%2d%5f%30", "/A~-_0", "/A~-_0", "/A~-_0"),
    ("/%21%24%2a%3b%3d%40", "/%21%24%2a%3b%3d%40", "/%21%24%2a%3b%3d%40", "/%21%24%2a%3b%3d%40"),
    ("/%20%25%7f%80%ff", "/%20%25%7f%80%ff", "/%20%25%7f%80%ff", "/%20%25%7f%80%ff"),
    ("/%e4%bd%a0", "/%e4%bd%a0", "/%e4%bd%a0", "/%e4%bd%a0"),
    // Not an escape, and not made one by what is decoded behind it.
    ("/%", "/%", "/%", "/%"),
    ("/%4", "/%4", "/%4", "/%4"),
    ("/%zz", "/%zz", "/%zz", "/%zz"),
    ("/%%41", "/%A", "/%A", "/%A"),
    ("/%%41g", "/%Ag", "/%Ag", "/%Ag"),
    ("/%%41b", "/%25Ab", "/%25Ab", "/%25Ab"),
    ("/%4%31", "/%2541", "/%2541", "/%2541"),
    ("/%%34%31", "/%2541", "/%2541", "/%2541"),
    ("/%%30%30", "/%2500", "/%2500", "/%2500"),
    ("/%a%41", "/%25aA", "/%25aA", "/%25aA"),
    ("/%%41%42", "/%25AB", "/%25AB", "/%25AB"),
    ("/%%%41", "/%%A", "/%%A", "/%%A"),
    ("/x%4%5ay", "/x%4Zy", "/x%4Zy", "/x%4Zy"),
    // Characters that belong escaped become so.
    (
        "/!\"$&'()*+,-.:;<=>@[]^_`{|}~",
        "/!%22$&'()*+,-.:;%3C=%3E@[]%5E_%60%7B%7C%7D~",
        "/!%22$&'()*+,-.:;%3C=%3E@[]%5E_%60%7B%7C%7D~",
        "/!%22$&'()*+,-.:;%3C=%3E@[]%5E_%60%7B%7C%7D~",
    ),
    // Where we differ. Envoy: `/a/..;/b`, `/a/..;y=../b`, `/a/..;/b`, which servers that know parameters take for `/b`.
    ("/a/%2e%2e;/b", "/b", "/b", "/b"),
    ("/a/.%2e;y=../b", "/b", "/b", "/b"),
    ("/a\\..;/b", "/b", "/b", "/b"),
    // Envoy merges these to `//`.
    ("//", "//", "/", "/"),
    ("///", "///", "/", "/"),
    ("/\\", "//", "/", "/"),
    ("/%5c%5c", "/%5c%5c", "/%5c%5c", "/"),
    ("/a/..//", "//", "/", "/"),
];

#[test]
fn modes() {
    for (path, base, merged, decoded) in TABLE {
        for (mode, want) in [(Off, path), (Base, base), (MergeSlashes, merged), (DecodeAndMergeSlashes, decoded)] {
            assert_eq!(to(mode, path).as_deref(), Ok(*want), "{mode:?} {path}");
        }
    }
}
#[test]
fn refused() {
    for mode in [Off, Base, MergeSlashes, DecodeAndMergeSlashes] {
        for (path, why) in [
            ("", BadPath::NotAbsolute),
            ("a", BadPath::NotAbsolute),
            ("*", BadPath::NotAbsolute),
            ("\\a", BadPath::NotAbsolute),
            ("%2fa", BadPath::NotAbsolute),
            ("/a#b", BadPath::Fragment),
            ("/#", BadPath::Fragment),
            ("/ä", BadPath::Unescaped),
            ("/a b", BadPath::Unescaped),
            ("/a\0b", BadPath::Unescaped),
            ("/\u{7f}", BadPath::Unescaped),
        ] {
            assert_eq!(to(mode, path), Err(why), "{mode:?} {path}");
        }
        // Without normalisation nobody looks into escapes.
        for path in ["/%00", "/a%00b"] {
            assert_eq!(to(mode, path).err(), (mode != Off).then_some(BadPath::Nul), "{mode:?} {path}");
        }
    }
}
#[test]
fn nothing_is_copied_that_is_normal() {
    for path in ["/", "/a/b.c/d", "/api/v1/users/~me/!$&'()*+,;=:@[]", "/a..b/.c"] {
        let borrowed = matches!(normalize(MergeSlashes, path), Ok(Cow::Borrowed(p)) if p == path);
        assert_eq!(borrowed, !path.contains("/."), "{path}");
    }
}

/// Segments a server could take for something else, and text.
fn any_path() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "/", "/", "\\", ".", "..", "%2e", "%2E", "%2f", "%5c", ";", "%3b", "%25", "%", "%4", "%41", "%00", "a", "1", "\"", "#",
        "ä", "?",
    ]);
    prop_oneof![
        3 => prop::collection::vec(piece, 0..12).prop_map(|p| format!("/{}", p.concat())),
        1 => any::<String>(),
    ]
}
proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]
    /// Never panics; what comes out is a path, is normal itself, and holds nothing that goes up.
    #[test]
    fn output_is_normal(path in any_path()) {
        for mode in [Base, MergeSlashes, DecodeAndMergeSlashes] {
            let Ok(once) = to(mode, &path) else { continue };
            prop_assert!(once.starts_with('/') && once.bytes().all(|b| b.is_ascii_graphic()), "{once:?}");
            prop_assert!(!once.contains('\\'), "{once:?}");
            for segment in once.split('/') {
                let name = segment.split(';').next().unwrap_or_default();
                prop_assert!(name != ".." && name != ".", "{mode:?} {path:?} -> {once:?}");
            }
            if mode != Base {
                prop_assert!(!once.contains("//"), "{once:?}");
            }
            if mode != DecodeAndMergeSlashes {
                prop_assert_eq!(to(mode, &once), Ok(once.clone()), "not idempotent: {:?}", path);
            }
        }
        prop_assert_eq!(to(Off, &path).unwrap_or_else(|_| path.clone()), path);
    }
}
