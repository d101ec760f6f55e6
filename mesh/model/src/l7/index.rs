//! The index of a route table: which of its HTTP rules a request can match at all, without asking every rule.
//!
//! Owns: files of rule numbers by what a rule requires exactly (path, path prefix, authority, one header). Each rule is filed
//! once, under the requirement it shares with the fewest others; a rule that requires none of these stands in `rest`.
//! Refuses: deciding. A file only proposes, [`crate::l7::select::matches`] has the word, and of all rules that match the
//! one declared first wins, so that the answer is that of the linear scan for every table and request (property test).
use crate::l7::route::{HttpMatch, HttpRule, PathMatch, RequestFacts};
use crate::l7::select::{matches, text};
use crate::l7::text::StringMatch;
use hashbrown::HashMap;
use http::header::{COOKIE, HeaderName};
use std::fmt;
use std::sync::Arc;

/// Tables up to this size are scanned: the index would cost more than it saves.
const SCANNED: usize = 8;

/// Index of one list of HTTP rules; empty until [`crate::l7::RouteTable::indexed`] has built it.
///
/// Derived from the rules beside it: all indexes are equal to each other, so that tables compare by what they say.
#[derive(Clone, Default)]
pub struct RouteIndex(Option<Box<Files>>);
impl PartialEq for RouteIndex {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for RouteIndex {}
impl fmt::Debug for RouteIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RouteIndex")
    }
}

type Text = Arc<str>;
/// A part of [`Files::numbers`].
type Span = (u32, u32);
type ByText = HashMap<Text, Span, foldhash::fast::FixedState>;

#[derive(Clone, Default)]
struct Files {
    /// How many rules were filed: a table that was changed afterwards is not answered from an index of something else.
    rules: usize,
    /// Rule numbers of all files, one file after the other, each ascending.
    numbers: Box<[u32]>,
    exact: ByText,
    /// By lower-case path.
    exact_any_case: ByText,
    prefix: Prefixes,
    prefix_any_case: Prefixes,
    authority: ByText,
    headers: Vec<(HeaderName, ByText)>,
    rest: Span,
}

/// What a rule requires exactly, as a name of a file.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Filed {
    Exact(Text),
    ExactAnyCase(Text),
    Prefix(Text),
    PrefixAnyCase(Text),
    Authority(Text),
    Header(HeaderName, Text),
}

/// Hands out what a request must have for the rule to match: any of these is a place to look for the rule.
fn requirements(m: &HttpMatch, out: &mut impl FnMut(Filed)) {
    let lower = |text: &str| Text::from(text.to_ascii_lowercase());
    let mut prefix = |p: &Text, whole: &str, any_case: bool| match whole {
        // Every path has these: no requirement.
        "" | "/" => {}
        _ if any_case => out(Filed::PrefixAnyCase(lower(whole))),
        _ if whole.len() == p.len() => out(Filed::Prefix(Arc::clone(p))),
        _ => out(Filed::Prefix(whole.into())),
    };
    match (&m.path, m.ignore_case) {
        (Some(PathMatch::TextPrefix(p)), any_case) => prefix(p, p, any_case),
        // A trailing slash means nothing here, and `/a` is a match of `/a/`.
        (Some(PathMatch::SegmentPrefix(p)), any_case) => prefix(p, p.strip_suffix('/').unwrap_or(p), any_case),
        (Some(PathMatch::Exact(p)), false) => out(Filed::Exact(Arc::clone(p))),
        (Some(PathMatch::Exact(p)), true) => out(Filed::ExactAnyCase(lower(p))),
        (Some(PathMatch::Regex(_)) | None, _) => {}
    }
    if let Some(grpc) = &m.grpc {
        match (&grpc.service, &grpc.method) {
            (Some(StringMatch::Exact(s)), Some(StringMatch::Exact(m))) => out(Filed::Exact(format!("/{s}/{m}").into())),
            (Some(StringMatch::Exact(s)), _) => out(Filed::Prefix(format!("/{s}/").into())),
            _ => {}
        }
    }
    if let Some(StringMatch::Exact(a)) = &m.authority {
        out(Filed::Authority(Arc::clone(a)));
    }
    for (name, what) in &m.headers {
        match what {
            // Several lines of cookies are one more text, which no line has.
            StringMatch::Exact(value) if *name != COOKIE => out(Filed::Header(name.clone(), Arc::clone(value))),
            _ => {}
        }
    }
}

impl RouteIndex {
    /// Files the rules. O(rules), done when a table is made.
    pub fn build(rules: &[HttpRule]) -> Self {
        if rules.len() <= SCANNED || u32::try_from(rules.len()).is_err() {
            return Self(None);
        }
        // Every requirement gets a number, and how many rules have it.
        let mut names: HashMap<Filed, usize, foldhash::fast::FixedState> = HashMap::default();
        names.reserve(rules.len());
        let mut sharing: Vec<u32> = Vec::with_capacity(rules.len());
        let (mut wanted, mut ends) = (Vec::with_capacity(rules.len()), Vec::with_capacity(rules.len()));
        for rule in rules {
            requirements(&rule.matches, &mut |requirement| {
                let file = *names.entry(requirement).or_insert(sharing.len());
                match sharing.get_mut(file) {
                    Some(n) => *n += 1,
                    None => sharing.push(1),
                }
                wanted.push(file);
            });
            ends.push(wanted.len());
        }
        // One file more, for the rules that require nothing.
        let rest = sharing.len();
        let mut start = 0;
        let chosen: Vec<usize> = ends
            .into_iter()
            .map(|end| {
                let of_rule = wanted.get(start..end).unwrap_or_default();
                start = end;
                of_rule.iter().copied().min_by_key(|file| sharing.get(*file)).unwrap_or(rest)
            })
            .collect();
        Self(Some(Box::new(Files::of(names, &chosen, rest))))
    }
    /// Whether this is the index of a table with as many rules (or the table needs none).
    pub fn is_for(&self, rules: &[HttpRule]) -> bool {
        match &self.0 {
            Some(files) => files.rules == rules.len(),
            None => rules.len() <= SCANNED,
        }
    }
    /// The number of the first rule that `counts` and matches.
    pub fn find(&self, rules: &[HttpRule], req: &RequestFacts<'_>, counts: impl Fn(u32) -> bool) -> Option<usize> {
        match &self.0 {
            Some(files) if files.rules == rules.len() => files.find(rules, req, counts),
            _ => (0..).zip(rules).position(|(number, r)| counts(number) && matches(&r.matches, req)),
        }
    }
}

impl Files {
    /// From the numbered names of the files, and the file chosen for each rule (`rest`: none of them).
    fn of(names: HashMap<Filed, usize, foldhash::fast::FixedState>, chosen: &[usize], rest: usize) -> Self {
        // Where each file's rules end, then (as they are put in from behind) where they begin.
        let mut at = vec![0_u32; rest + 1];
        for file in chosen {
            if let Some(n) = at.get_mut(*file) {
                *n += 1;
            }
        }
        let mut end = 0;
        for n in &mut at {
            end += *n;
            *n = end;
        }
        let ends = at.clone();
        let mut numbers = vec![0_u32; chosen.len()];
        for (rule, file) in chosen.iter().enumerate().rev() {
            let Some(start) = at.get_mut(*file) else { continue };
            *start -= 1;
            if let Some(number) = numbers.get_mut(*start as usize) {
                *number = rule as u32;
            }
        }
        let span = |file: usize| (at.get(file).copied().unwrap_or(0), ends.get(file).copied().unwrap_or(0));

        let mut out = Self { rules: chosen.len(), numbers: numbers.into(), rest: span(rest), ..Self::default() };
        let (mut prefix, mut prefix_any_case) = (Vec::new(), Vec::new());
        for (name, file) in names {
            let span = span(file);
            if span.0 == span.1 {
                continue;
            }
            match name {
                Filed::Exact(p) => _ = out.exact.insert(p, span),
                Filed::ExactAnyCase(p) => _ = out.exact_any_case.insert(p, span),
                Filed::Prefix(p) => prefix.push((p, span)),
                Filed::PrefixAnyCase(p) => prefix_any_case.push((p, span)),
                Filed::Authority(a) => _ = out.authority.insert(a, span),
                Filed::Header(name, value) => match out.headers.iter_mut().find(|(n, _)| *n == name) {
                    Some((_, by_value)) => _ = by_value.insert(value, span),
                    None => out.headers.push((name, std::iter::once((value, span)).collect())),
                },
            }
        }
        out.prefix = Prefixes::of(prefix);
        out.prefix_any_case = Prefixes::of(prefix_any_case);
        out
    }
    fn find(&self, rules: &[HttpRule], req: &RequestFacts<'_>, counts: impl Fn(u32) -> bool) -> Option<usize> {
        let mut best = u32::MAX;
        let mut ask = |span: Span| {
            let file = self.numbers.get(span.0 as usize..span.1 as usize).unwrap_or_default();
            // Ascending: once past the best there is nothing better in this file.
            for number in file.iter().copied().take_while(|n| *n < best) {
                if rules.get(number as usize).is_some_and(|r| matches(&r.matches, req)) && counts(number) {
                    best = number;
                    return;
                }
            }
        };
        self.exact.get(req.path).copied().map(&mut ask);
        self.prefix.each(req.path, &mut ask);
        if !self.exact_any_case.is_empty() || !self.prefix_any_case.0.is_empty() {
            let lower = req.path.to_ascii_lowercase();
            self.exact_any_case.get(&*lower).copied().map(&mut ask);
            self.prefix_any_case.each(&lower, &mut ask);
        }
        self.authority.get(req.authority).copied().map(&mut ask);
        for (name, by_value) in &self.headers {
            for value in req.headers.get_all(name) {
                by_value.get(&*text(value)).copied().map(&mut ask);
            }
        }
        // Last, because here are the patterns: only those declared before the best are run.
        ask(self.rest);
        usize::try_from(best).ok().filter(|n| *n < self.rules)
    }
}

/// Text prefixes, sorted. All those a text begins with are the ancestors of the last one not greater than it: whatever
/// lies between a prefix of the text and the text in this order begins with that prefix too.
#[derive(Clone, Default)]
struct Prefixes(Box<[Prefix]>);
#[derive(Clone)]
struct Prefix {
    text: Text,
    span: Span,
    /// The longest other one that this one begins with.
    parent: Option<u32>,
}
impl Prefixes {
    fn of(mut all: Vec<(Text, Span)>) -> Self {
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let mut out: Vec<Prefix> = Vec::with_capacity(all.len());
        let mut open: Vec<(u32, Text)> = Vec::new();
        for (at, (text, span)) in (0_u32..).zip(all) {
            while open.last().is_some_and(|(_, p)| !text.starts_with(&**p)) {
                open.pop();
            }
            out.push(Prefix { text: Arc::clone(&text), span, parent: open.last().map(|(at, _)| *at) });
            open.push((at, text));
        }
        Self(out.into())
    }
    /// Hands out the file of each prefix of `text`, longest first.
    fn each(&self, text: &str, ask: &mut impl FnMut(Span)) {
        let after = self.0.partition_point(|p| *p.text <= *text);
        let mut at = after.checked_sub(1);
        while let Some(prefix) = at.and_then(|at| self.0.get(at)) {
            if text.starts_with(&*prefix.text) {
                ask(prefix.span);
            }
            at = prefix.parent.map(|p| p as usize);
        }
    }
}
