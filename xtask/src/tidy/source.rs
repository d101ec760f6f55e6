//! What each Rust file must have (a head that says what the module is for) and must not have (unsafe code outside the few
//! places for it, clocks and I/O in the pure core, unfinished ends), and how long files and functions are.

use super::is_test_file;
use super::rust::{Token, functions, tokens, without_comments_and_literals, without_test_modules};
use std::path::Path;

/// Where `unsafe` may stand: socket options, the allocator's own interface, profiling, and what talks to the kernel's BPF side.
const UNSAFE_MAY_BE_IN: &[&str] =
    &["mesh/runtime/src/sockets", "mesh/runtime/src/allocator.rs", "mesh/runtime/src/profile/", "ebpf/"];
/// Crates whose root cannot forbid it for that reason.
const UNSAFE_CRATES: &[&str] = &["mesh-runtime", "ebpf-common", "ebpf-loader"];
/// Names the pure core may not use.
const NOT_IN_MODEL: &[&str] = &["Instant", "SystemTime", "TcpStream", "TcpListener", "UdpSocket"];
const NOT_IN_MODEL_FROM_STD: &[&str] = &["env", "fs", "io", "process", "thread"];
const UNFINISHED: &[&str] = &["todo", "unimplemented", "dbg"];

/// Files longer than this are reported.
const LONG_FILE: usize = 500;
/// Functions longer than this are reported.
const LONG_FUNCTION: usize = 100;

/// Every fault of one file.
pub fn check(package: &str, name: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let path = Path::new(name);
    let code = without_comments_and_literals(text);
    let all = tokens(&code);
    let product = without_test_modules(&all);

    if !is_test_file(path)
        && !text.lines().take_while(|line| line.trim().is_empty() || line.starts_with("//")).any(|line| line.starts_with("//!"))
    {
        faults.push(format!("{name}: has no `//!` head (what it owns, what it refuses, who is upstream and downstream)"));
    }
    let is_root = path.file_name().is_some_and(|file| file == "lib.rs" || file == "main.rs")
        || path.parent().is_some_and(|folder| folder.ends_with("src/bin"));
    if is_root && !UNSAFE_CRATES.contains(&package) && !has_sequence(&all, &["forbid", "(", "unsafe_code", ")"]) {
        faults.push(format!("{name}: lacks #![forbid(unsafe_code)]"));
    }
    if !UNSAFE_MAY_BE_IN.iter().any(|place| name.starts_with(place)) {
        faults
            .extend(all.iter().filter(|token| token.text == "unsafe").map(|token| format!("{name}:{}: unsafe code", token.line)));
    }
    for pair in all.windows(2).filter(|pair| pair[1].text == "!" && UNFINISHED.contains(&pair[0].text)) {
        faults.push(format!("{name}:{}: {}! must not be committed", pair[0].line, pair[0].text));
    }
    if package == "mesh-model" && !is_test_file(path) {
        faults.extend(
            impurities(&product).into_iter().map(|token| format!("{name}:{}: `{}` in the pure model", token.line, token.text)),
        );
    }
    faults
}

fn has_sequence(all: &[Token<'_>], words: &[&str]) -> bool {
    all.windows(words.len()).any(|window| window.iter().zip(words).all(|(token, word)| token.text == *word))
}

fn impurities<'a>(product: &[Token<'a>]) -> Vec<Token<'a>> {
    let named = product.iter().filter(|token| NOT_IN_MODEL.contains(&token.text)).copied();
    let from_std = product
        .windows(3)
        .filter(|window| window[0].text == "std" && window[1].text == "::" && NOT_IN_MODEL_FROM_STD.contains(&window[2].text))
        .map(|window| window[2]);
    named.chain(from_std).collect()
}

/// How long files and functions are.
#[derive(Default)]
pub struct Sizes {
    files: Vec<(usize, String)>,
    functions: Vec<(usize, String)>,
    lines: usize,
    test_lines: usize,
}

impl Sizes {
    /// Measures one file.
    pub fn add(&mut self, name: &str, text: &str) {
        let lines = text.lines().count();
        if is_test_file(Path::new(name)) {
            self.test_lines += lines;
            return;
        }
        self.lines += lines;
        if lines > LONG_FILE {
            self.files.push((lines, name.to_owned()));
        }
        let code = without_comments_and_literals(text);
        for (function, first, last) in functions(&without_test_modules(&tokens(&code))) {
            if last - first >= LONG_FUNCTION {
                self.functions.push((last - first + 1, format!("{name}:{first} {function}")));
            }
        }
    }

    /// Prints the longest: a look worth taking, not a fault.
    pub fn report(mut self) {
        println!("{} lines in src folders, {} more in files of tests", self.lines, self.test_lines);
        for (kind, list) in [("file", &mut self.files), ("function", &mut self.functions)] {
            list.sort_by(|a, b| b.cmp(a));
            for (lines, name) in list.iter().take(10) {
                println!("note: long {kind}, {lines} lines: {name}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_order() {
        let text = "//! What it is.\n#![forbid(unsafe_code)]\n// unsafe in words, todo!() too\nfn f() {}\n";
        assert_eq!(check("mesh-hbone", "mesh/hbone/src/lib.rs", text), Vec::<String>::new());
    }

    #[test]
    fn faults_of_a_file() {
        let text = "mod x;\nfn f() { unsafe { g() } }\nfn h() { todo!() }\n";
        assert_eq!(
            check("mesh-hbone", "mesh/hbone/src/lib.rs", text),
            [
                "mesh/hbone/src/lib.rs: has no `//!` head (what it owns, what it refuses, who is upstream and downstream)",
                "mesh/hbone/src/lib.rs: lacks #![forbid(unsafe_code)]",
                "mesh/hbone/src/lib.rs:2: unsafe code",
                "mesh/hbone/src/lib.rs:3: todo! must not be committed",
            ]
        );
    }

    #[test]
    fn the_model_has_no_clock_and_no_io() {
        let text = "//! Head.\nuse std::time::Instant;\nuse std::fs;\n#[cfg(test)]\nmod tests { use std::fs; }\n";
        assert_eq!(
            check("mesh-model", "mesh/model/src/plan.rs", text),
            ["mesh/model/src/plan.rs:2: `Instant` in the pure model", "mesh/model/src/plan.rs:3: `fs` in the pure model"]
        );
        assert_eq!(check("mesh-model", "mesh/model/src/plan/tests.rs", text), Vec::<String>::new());
    }

    #[test]
    fn unsafe_has_its_places() {
        let text = "//! Head.\nfn f() { unsafe { g() } }\n";
        assert_eq!(check("mesh-runtime", "mesh/runtime/src/sockets/query.rs", text), Vec::<String>::new());
        assert_eq!(check("mesh-runtime", "mesh/runtime/src/drain.rs", text).len(), 1);
    }
}
