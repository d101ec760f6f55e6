use std::fmt::Write as _;

use super::*;

fn one(text: &str) -> Result<Node<'_>, YamlError> {
    let docs = documents(text);
    assert_eq!(docs.len(), 1, "{text:?}");
    parse_whole(docs[0])
}

#[test]
fn documents_keep_their_lines() {
    let text = "# head\n---\na: 1\n---   # next\n\n# c\nb:\n  c: 2\n...\n---\n--- {d: 3}\n";
    let docs = documents(text);
    let lines: Vec<u32> = docs.iter().map(|d| d.line).collect();
    assert_eq!(lines, [3, 5, 11]);
    let b = parse_whole(docs[1]).unwrap();
    assert_eq!(b.get("b").unwrap().get("c").unwrap().line, 8);
    assert_eq!(parse_whole(docs[2]).unwrap().get("d").unwrap().line, 11);
    assert_eq!(documents("").len(), 0);
    assert_eq!(documents("\u{feff}a: 1").len(), 1);
    assert_eq!(documents("a: |\n  ---\n  x\n").len(), 1);
}

#[test]
fn scalars_keep_their_text_and_tags() {
    let n = one("a: 1.10\nb: '~'\nc: ~\nd: !Prefix \"x\"\ne: 0x1F\n").unwrap();
    assert_eq!(n.get("a").unwrap().text(), Some("1.10"));
    assert_eq!(n.get("b").unwrap().text(), Some("~"));
    assert!(n.get("c").is_none());
    assert_eq!(n.get("d").unwrap().tag.as_deref(), Some("Prefix"));
    assert_eq!(n.get("e").unwrap().text(), Some("0x1F"));
}

#[test]
fn json_is_yaml() {
    let n = one("{\"kind\":\"Pod\",\"x\":[1,2],\n\t\"y\":null}").unwrap();
    assert_eq!(n.get("kind").unwrap().text(), Some("Pod"));
    assert!(n.get("y").is_none());
}

#[test]
fn duplicate_keys_and_bombs_are_refused_with_their_line() {
    let e = one("a: 1\nb: 2\na: 3\n").unwrap_err();
    assert_eq!((e.line, e.message.as_str()), (3, "the key `a` is written twice"));
    let keys: Vec<String> = (0..40).map(|i| format!("k{i}: 1\n")).collect();
    let many = keys.concat() + "k3: 1\n";
    assert_eq!(one(&many).unwrap_err().line, 41);
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..9 {
        let refs = vec![format!("*a{}", i - 1); 9].join(", ");
        writeln!(bomb, "a{i}: &a{i} [{refs}]").unwrap();
    }
    assert!(one(&bomb).unwrap_err().message.contains("aliases expand"));
    let deep = "[".repeat(10_000);
    assert!(one(&deep).is_err());
    assert!(one("? [a]\n: b\n").unwrap_err().message.contains("key must be text"));
    assert!(one("a: *nope\n").is_err());
}

#[test]
fn merge_keys_fill_in_and_lose_to_what_is_written() {
    let n = one("base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  y: 3\n").unwrap();
    let u = n.get("use").unwrap();
    assert_eq!((u.get("x").unwrap().text(), u.get("y").unwrap().text()), (Some("1"), Some("3")));
}

#[test]
fn items_are_streamed() {
    let text = "apiVersion: v1\nitems:\n- a: 1\n- a: 2\nkind: List\n";
    let mut lines = Vec::new();
    let root = parse(documents(text)[0], &mut |n| lines.push(n.line)).unwrap();
    assert_eq!(lines, [3, 4]);
    assert_eq!(root.get("kind").unwrap().text(), Some("List"));
}

#[test]
fn syntax_errors_have_lines_of_the_file() {
    let docs = documents("a: 1\n---\nb: [1, 2\nc: 3\n");
    let e = parse_whole(docs[1]).unwrap_err();
    assert!(e.line >= 3, "{e}");
}
