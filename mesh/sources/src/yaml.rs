//! YAML (and so JSON) text → trees that know their lines.
//!
//! Owns: splitting a file into documents, parsing one document under fixed limits, duplicate-key refusal, anchors and
//! merge keys. Refuses: non-text keys, more nodes or alias copies than any real object has, nesting beyond the
//! parser's limit. Scalars keep their text, so that `1.10` as a label stays `1.10`.
//!
//! A tree instead of derived structs, because a policy that is wrong in one field must still tell which workloads it
//! was meant for, and because every complaint carries file, line and field path. Upstream: [`crate::files`],
//! [`crate::local_xds`]. Downstream: [`crate::translate`].

use std::borrow::Cow;

use granit_parser::{Event, Parser, ScalarStyle};

type HashMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;
type HashSet<K> = std::collections::HashSet<K, foldhash::fast::RandomState>;

/// Nodes one object may have. An object of the API server is at most 1.5 MiB of JSON.
const MAX_NODES: usize = 2_000_000;
/// Nodes that may come into being by aliases and merges in one document ("billion laughs").
const MAX_ALIAS_NODES: usize = 100_000;

/// One node and the line (1-based) it starts on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node<'i> {
    /// Line in the file.
    pub line: u32,
    /// Application tag without its `!`, such as `Prefix` in `!Prefix "x"`.
    pub tag: Option<Box<str>>,
    /// The content.
    pub value: Value<'i>,
}

/// Content of a [`Node`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value<'i> {
    /// Absent: empty, `~` or `null`.
    Null,
    /// A scalar, as written; `quoted` when it can only be text.
    Scalar {
        /// The text.
        text: Cow<'i, str>,
        /// Quoted or block style.
        quoted: bool,
    },
    /// A sequence.
    Seq(Vec<Node<'i>>),
    /// A mapping in written order; keys are unique.
    Map(Vec<Entry<'i>>),
}

/// One entry of a mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<'i> {
    /// Key.
    pub key: Cow<'i, str>,
    /// Line of the key.
    pub line: u32,
    /// Value.
    pub node: Node<'i>,
}

impl<'i> Node<'i> {
    /// The value of `key`, when this is a mapping that has it and it is not null.
    pub fn get(&self, key: &str) -> Option<&Node<'i>> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|e| e.key == key).map(|e| &e.node).filter(|n| n.value != Value::Null),
            _ => None,
        }
    }
    /// The text, when this is a scalar.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }
    /// What this is, for messages.
    pub fn describe(&self) -> &'static str {
        match &self.value {
            Value::Null => "nothing",
            Value::Scalar { .. } => "a scalar",
            Value::Seq(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
    fn count(&self) -> usize {
        1 + match &self.value {
            Value::Null | Value::Scalar { .. } => 0,
            Value::Seq(items) => items.iter().map(Node::count).sum(),
            Value::Map(entries) => entries.iter().map(|e| e.node.count()).sum(),
        }
    }
}

/// Why a text is not usable YAML.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct YamlError {
    /// Line in the file, 1-based.
    pub line: u32,
    /// What is wrong there.
    pub message: String,
}

/// One document of a stream: its text and the line its text starts on (1-based).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'i> {
    /// Text without the `---` line itself (unless content follows the marker on that line).
    pub text: &'i str,
    /// First line of `text` in the file.
    pub line: u32,
}

/// Cuts a stream at its `---` lines, so that a syntax error stays inside its own document.
///
/// YAML forbids a line starting with `---` at column 0 anywhere inside a document, block scalars included, so a cut by
/// lines is exact. Documents of only blanks and comments are left out.
pub fn documents(text: &str) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut out = Vec::new();
    let (mut start, mut start_line, mut pos, mut line, mut blank) = (0usize, 1u32, 0usize, 1u32, true);
    let mut push = |from: usize, to: usize, at: u32, blank: bool| {
        if !blank && let Some(text) = text.get(from..to) {
            out.push(Document { text, line: at });
        }
    };
    for raw in text.split_inclusive('\n') {
        let l = raw.trim_end_matches(['\n', '\r']);
        let marker = l.strip_prefix("---").filter(|r| r.is_empty() || r.starts_with([' ', '\t']));
        if let Some(rest) = marker {
            push(start, pos, start_line, blank);
            let rest = rest.trim_start();
            if rest.is_empty() || rest.starts_with('#') {
                (start, start_line, blank) = (pos + raw.len(), line + 1, true);
            } else {
                // Content on the marker's own line: the marker stays part of the text.
                (start, start_line, blank) = (pos, line, false);
            }
        } else if l == "..." {
            push(start, pos, start_line, blank);
            (start, start_line, blank) = (pos + raw.len(), line + 1, true);
        } else if blank {
            let t = l.trim_start();
            blank = t.is_empty() || t.starts_with('#');
        }
        pos += raw.len();
        line = line.saturating_add(1);
    }
    push(start, pos, start_line, blank);
    out
}

/// Parses one document. The elements of a top-level `items` list are handed to `item` one by one, as they are read,
/// and left out of the returned root, so that `kubectl get pods -A -o yaml` never stands in memory as one tree.
pub fn parse<'i>(doc: Document<'i>, item: &mut dyn FnMut(Node<'i>)) -> Result<Node<'i>, YamlError> {
    Loader { base: doc.line, stack: Vec::new(), anchors: HashMap::default(), nodes: 0, alias_nodes: 0, root: None, item }
        .run(doc.text)
}

/// Parses one document into one tree, `items` included.
pub fn parse_whole(doc: Document<'_>) -> Result<Node<'_>, YamlError> {
    let mut items = Vec::new();
    let mut root = parse(doc, &mut |n| items.push(n))?;
    if !items.is_empty()
        && let Value::Map(entries) = &mut root.value
        && let Some(e) = entries.iter_mut().find(|e| e.key == "items")
    {
        e.node.value = Value::Seq(items);
    }
    Ok(root)
}

struct Frame<'i> {
    node: Node<'i>,
    key: Option<(Cow<'i, str>, u32)>,
    /// Keys seen, once the mapping is too large for a linear look.
    seen: Option<HashSet<Cow<'i, str>>>,
    /// Entries brought by `<<`; what is written wins over them.
    merged: Vec<Entry<'i>>,
    anchor: usize,
}

struct Loader<'i, 's> {
    base: u32,
    stack: Vec<Frame<'i>>,
    anchors: HashMap<usize, Node<'i>>,
    nodes: usize,
    alias_nodes: usize,
    root: Option<Node<'i>>,
    item: &'s mut dyn FnMut(Node<'i>),
}

impl<'i> Loader<'i, '_> {
    fn run(mut self, text: &'i str) -> Result<Node<'i>, YamlError> {
        let mut options = granit_parser::Options::default();
        options.set_emit_comments(false);
        let base = self.base;
        for event in Parser::new_from_str_with_options(text, options) {
            let (event, span) = event.map_err(|e| YamlError { line: at(base, e.marker().line()), message: e.info() })?;
            let line = at(base, span.start.line());
            match event {
                Event::Scalar(text, style, anchor, tag) => {
                    let quoted = style != ScalarStyle::Plain;
                    let value = if !quoted && tag.is_none() && matches!(&*text, "" | "~" | "null" | "Null" | "NULL") {
                        Value::Null
                    } else {
                        Value::Scalar { text, quoted }
                    };
                    let node = Node { line, tag: own_tag(tag.as_deref()), value };
                    self.remember(anchor, &node)?;
                    self.push(node)?;
                }
                Event::SequenceStart(_, anchor, tag) => {
                    self.open(line, own_tag(tag.as_deref()), Value::Seq(Vec::new()), anchor)?;
                }
                Event::MappingStart(_, anchor, tag) => {
                    self.open(line, own_tag(tag.as_deref()), Value::Map(Vec::new()), anchor)?;
                }
                Event::SequenceEnd | Event::MappingEnd => {
                    if let Some(mut frame) = self.stack.pop() {
                        if let Value::Map(entries) = &mut frame.node.value {
                            for e in frame.merged {
                                if !entries.iter().any(|have| have.key == e.key) {
                                    entries.push(e);
                                }
                            }
                        }
                        self.remember(frame.anchor, &frame.node)?;
                        self.push(frame.node)?;
                    }
                }
                Event::Alias(id) => {
                    let Some(node) = self.anchors.get(&id).cloned() else {
                        return Err(YamlError { line, message: "an alias inside its own anchor".into() });
                    };
                    self.charge_alias(node.count(), line)?;
                    self.push(node)?;
                }
                _ => {}
            }
        }
        Ok(self.root.unwrap_or(Node { line: base, tag: None, value: Value::Null }))
    }

    fn charge_alias(&mut self, n: usize, line: u32) -> Result<(), YamlError> {
        self.alias_nodes += n;
        if self.alias_nodes > MAX_ALIAS_NODES {
            return Err(YamlError { line, message: format!("aliases expand to more than {MAX_ALIAS_NODES} nodes") });
        }
        Ok(())
    }

    fn remember(&mut self, anchor: usize, node: &Node<'i>) -> Result<(), YamlError> {
        if anchor != 0 {
            self.charge_alias(node.count(), node.line)?;
            self.anchors.insert(anchor, node.clone());
        }
        Ok(())
    }

    fn open(&mut self, line: u32, tag: Option<Box<str>>, value: Value<'i>, anchor: usize) -> Result<(), YamlError> {
        if let Some(f) = self.stack.last()
            && matches!(f.node.value, Value::Map(_))
            && f.key.is_none()
        {
            return Err(YamlError { line, message: "a key must be text, not a list or mapping".into() });
        }
        self.stack.push(Frame { node: Node { line, tag, value }, key: None, seen: None, merged: Vec::new(), anchor });
        Ok(())
    }

    fn push(&mut self, node: Node<'i>) -> Result<(), YamlError> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(YamlError { line: node.line, message: format!("more than {MAX_NODES} nodes in one object") });
        }
        let depth = self.stack.len();
        let in_items = depth == 2 && self.stack.first().and_then(|f| f.key.as_ref()).is_some_and(|(k, _)| k == "items");
        let Some(top) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut top.node.value {
            Value::Seq(_) if in_items => {
                self.nodes = 0;
                (self.item)(node);
            }
            Value::Seq(items) => items.push(node),
            Value::Map(entries) => match top.key.take() {
                None => {
                    let line = node.line;
                    let key = match node.value {
                        Value::Scalar { text, .. } => text,
                        Value::Null => Cow::Borrowed("null"),
                        _ => return Err(YamlError { line, message: "a key must be text".into() }),
                    };
                    let twice = match &mut top.seen {
                        Some(seen) => !seen.insert(key.clone()),
                        None if entries.len() >= 16 => {
                            let mut seen: HashSet<_> = entries.iter().map(|e| e.key.clone()).collect();
                            let twice = !seen.insert(key.clone());
                            top.seen = Some(seen);
                            twice
                        }
                        None => entries.iter().any(|e| e.key == key),
                    };
                    if twice {
                        return Err(YamlError { line, message: format!("the key `{key}` is written twice") });
                    }
                    top.key = Some((key, line));
                }
                Some((key, line)) if key == "<<" => {
                    let sources = match node.value {
                        Value::Seq(list) => list,
                        _ => vec![node],
                    };
                    for source in sources {
                        let Value::Map(more) = source.value else {
                            return Err(YamlError { line, message: "`<<` needs a mapping".into() });
                        };
                        top.merged.extend(more);
                    }
                }
                Some((key, line)) => entries.push(Entry { key, line, node }),
            },
            Value::Null | Value::Scalar { .. } => {}
        }
        Ok(())
    }
}

fn at(base: u32, line: usize) -> u32 {
    base.saturating_add(u32::try_from(line.saturating_sub(1)).unwrap_or(u32::MAX))
}

fn own_tag(tag: Option<&granit_parser::Tag>) -> Option<Box<str>> {
    tag.filter(|t| t.handle() == "!" && !t.suffix().is_empty()).map(|t| t.suffix().into())
}

#[cfg(test)]
mod tests;
