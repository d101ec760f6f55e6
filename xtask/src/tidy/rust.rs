//! As much Rust as the checks need: source without comments, literals and test modules, and its words.

/// The source with comments and the inside of string and character literals blanked; lines stay where they are.
pub fn without_comments_and_literals(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    let get = |i: usize| chars.get(i).copied().unwrap_or('\0');
    while at < chars.len() {
        let end = match (get(at), get(at + 1)) {
            ('/', '/') => (at..chars.len()).find(|&i| get(i) == '\n').unwrap_or(chars.len()),
            ('/', '*') => end_of_block_comment(&chars, at),
            ('"', _) => end_of_string(&chars, at + 1),
            ('r', '"' | '#') if !is_word(if at == 0 { '\0' } else { get(at - 1) }) => end_of_raw_string(&chars, at).unwrap_or(at),
            ('\'', '\\') => (at + 3..chars.len()).find(|&i| get(i) == '\'').map_or(chars.len(), |i| i + 1),
            ('\'', _) if get(at + 2) == '\'' => at + 3,
            _ => at,
        };
        if end == at {
            out.push(get(at));
            at += 1;
        } else {
            out.extend((at..end).map(|i| if get(i) == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let mut depth = 0_usize;
    let mut at = start;
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => {
                depth += 1;
                at += 2;
            }
            ('*', '/') => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    chars.len()
}

fn end_of_string(chars: &[char], start: usize) -> usize {
    let mut at = start;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

/// `r"…"`, `r#"…"#`; none if this `r` opens no literal (a raw identifier).
fn end_of_raw_string(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars.get(start + 1..)?.iter().take_while(|&&c| c == '#').count();
    let open = start + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let closes =
        |i: usize| chars[i] == '"' && chars.get(i + 1..i + 1 + hashes).is_some_and(|tail| tail.iter().all(|&c| c == '#'));
    Some((open + 1..chars.len()).find(|&i| closes(i)).map_or(chars.len(), |i| i + 1 + hashes))
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// One word or sign with the line it stands on (from 1). `::` is one sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token<'a> {
    pub text: &'a str,
    pub line: usize,
}

/// The words and signs of blanked source.
pub fn tokens(code: &str) -> Vec<Token<'_>> {
    let mut found = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line;
        while let Some(first) = rest.chars().next() {
            let length = if is_word(first) {
                rest.find(|c| !is_word(c)).unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            let (text, tail) = rest.split_at(length);
            if !first.is_whitespace() {
                found.push(Token { text, line: number + 1 });
            }
            rest = tail;
        }
    }
    found
}

/// The tokens without what is compiled for tests only: `#[cfg(test)] mod …` with its body.
pub fn without_test_modules<'a>(tokens: &[Token<'a>]) -> Vec<Token<'a>> {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::with_capacity(tokens.len());
    let mut at = 0;
    while at < tokens.len() {
        let marked =
            tokens.get(at..at + MARK.len()).is_some_and(|head| head.iter().zip(MARK).all(|(token, mark)| token.text == mark));
        if marked {
            at = end_of_item(tokens, at + MARK.len());
        } else {
            kept.push(tokens[at]);
            at += 1;
        }
    }
    kept
}

/// Past the item that starts here: its closing brace or its semicolon.
fn end_of_item(tokens: &[Token<'_>], start: usize) -> usize {
    let mut depth = 0_usize;
    for (offset, token) in tokens.iter().enumerate().skip(start) {
        match token.text {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 && token.text == "}" {
                    return offset + 1;
                }
            }
            ";" if depth == 0 => return offset + 1,
            _ => {}
        }
    }
    tokens.len()
}

/// Where each function starts and ends: name, first line, last line.
pub fn functions<'a>(tokens: &[Token<'a>]) -> Vec<(&'a str, usize, usize)> {
    tokens
        .windows(2)
        .enumerate()
        .filter(|(_, pair)| pair[0].text == "fn" && pair[1].text.starts_with(|c: char| c.is_alphabetic() || c == '_'))
        .filter_map(|(at, pair)| {
            let last = tokens.get(end_of_item(tokens, at).checked_sub(1)?)?;
            Some((pair[1].text, pair[0].line, last.line))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_in_place() {
        let source = "a // crate::x\n\"crate::y \\\" z\" b 'c' '\\'' &'a str r#\"crate::\"q\"# r#type /* x /* y */ z */ d";
        let code = without_comments_and_literals(source);
        assert_eq!(code.chars().count(), source.chars().count());
        let words: Vec<&str> = code.split_whitespace().collect();
        assert_eq!(words, ["a", "b", "&'a", "str", "r#type", "d"]);
    }

    #[test]
    fn tokens_know_their_line() {
        let found = tokens("use a::b;\n  c!");
        let shown: Vec<(&str, usize)> = found.iter().map(|token| (token.text, token.line)).collect();
        assert_eq!(shown, [("use", 1), ("a", 1), ("::", 1), ("b", 1), (";", 1), ("c", 2), ("!", 2)]);
    }

    #[test]
    fn test_modules_are_cut_out() {
        let all = tokens("a; #[cfg(test)] mod tests { use crate::x; fn f() { g([1; 2]) } } b; #[cfg(test)] mod tests; c");
        let kept: Vec<&str> = without_test_modules(&all).iter().map(|token| token.text).collect();
        assert_eq!(kept, ["a", ";", "b", ";", "c"]);
    }

    #[test]
    fn functions_have_lengths() {
        let code = "fn a() {\n  if x { y }\n}\ntrait T {\n  fn b(&self) -> [u8; 4];\n  fn c() {}\n}\nlet f: fn(u8) = g;";
        assert_eq!(functions(&tokens(code)), [("a", 1, 3), ("b", 5, 5), ("c", 6, 6)]);
    }
}
