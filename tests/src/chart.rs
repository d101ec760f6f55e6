//! The Helm chart without Helm: the part of its template language that the chart keeps to, so that what it renders can be
//! checked on any machine. Understood are `{{ PATH }}`, `{{ PATH | quote }}`, `toYaml PATH | nindent N`, `if PATH` and
//! `if eq PATH "TEXT"` with `else`, and `range PATH`, where a path starts at `.Values`, `.Release`, `$` or the element of a range. Anything else is an error.
use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// Values with one waypoint and Istio's CA.
pub const ISTIO_CA: &str = "caAddress: https://istiod.istio-system.svc:15012
gateways: [ { name: wp, namespace: shop, serviceAccount: wp, replicas: 1 } ]";
/// The same with SPIRE.
pub const SPIRE: &str = "spire: { enabled: true }
gateways: [ { name: wp, namespace: shop, serviceAccount: wp, replicas: 1 } ]";

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// Renders a chart as `helm template culvert CHART -n NAMESPACE -f VALUES` does, with one `# Source:` line per template.
pub fn render(chart: &Path, values: &Path, namespace: &str) -> anyhow::Result<String> {
    render_with(chart, &read(values)?, namespace)
}

/// The same with the text of a file of values.
pub fn render_with(chart: &Path, values: &str, namespace: &str) -> anyhow::Result<String> {
    let mut merged: Value = serde_saphyr::from_str(&read(&chart.join("values.yaml"))?)?;
    overlay(&mut merged, serde_saphyr::from_str(values)?);
    let root = json!({ "Values": merged, "Release": { "Namespace": namespace, "Name": "culvert" } });
    let mut names: Vec<_> = fs::read_dir(chart.join("templates"))?.flatten().map(|entry| entry.path()).collect();
    // Helm sorts by kinds; what counts is that namespaces are there before what is in them.
    names.sort_by_key(|path| (!path.ends_with("namespaces.yaml"), path.clone()));
    let mut out = String::new();
    for path in names {
        let pieces = pieces(&read(&path)?).with_context(|| path.display().to_string())?;
        let mut text = String::new();
        let end = run(&pieces, 0, &root, &root, true, &mut text).with_context(|| path.display().to_string())?;
        ensure!(end == pieces.len(), "{}: an `end` too many", path.display());
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        writeln!(out, "---\n# Source: culvert/templates/{name}\n{}", text.trim())?;
    }
    Ok(out)
}

/// A TrafficPolicy that says everything it can.
pub fn whole_policy() -> Value {
    let bucket = json!({ "maxTokens": 5, "tokensPerFill": 5, "fillInterval": "1m" });
    json!({
        "apiVersion": "culvert.dev/v1alpha1", "kind": "TrafficPolicy", "metadata": { "name": "p", "namespace": "zamaz" },
        "spec": {
            "targetRefs": [{ "group": "", "kind": "Service", "name": "s", "namespace": "zamaz" }],
            "rateLimits": [{
                "name": "all", "tokenBucket": bucket, "phase": "AfterAuthorization", "rateLimitHeaders": false,
                "match": { "methods": ["GET"], "paths": ["/a/*"], "headers": { "x-plan": "free" } },
                "key": [
                    { "sourceIP": { "ipv4Prefix": 24, "ipv6Prefix": 48 } }, { "header": "x-tenant" }, { "path": {} },
                    { "authority": {} }, { "claim": "realm.tenant" },
                ],
                "response": { "status": 503, "headers": { "x-limited": "true" } },
            }],
            "responseHeaders": { "set": { "x-a": "b" }, "add": { "x-c": "d" }, "remove": ["x-e"] },
            "cacheControl": [{ "paths": ["/static/*"], "value": "max-age=60" }],
            "cors": {
                "allowOrigin": ["https://a.b"], "allowOrigins": [{ "exact": "https://c.d" }], "allowMethods": ["GET"],
                "allowHeaders": ["x-a"], "exposeHeaders": ["x-b"], "maxAge": "24h", "allowCredentials": true,
                "unmatchedPreflights": "IGNORE",
            },
            "compression": {
                "codings": ["gzip", "br"], "minBytes": 1000, "contentTypes": ["text/html"], "keepStrongETag": true,
                "hideAcceptEncoding": true,
            },
            "buffer": { "maxRequestBytes": 1_048_576 },
        },
    })
}

/// Maps are merged, everything else is replaced.
fn overlay(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                overlay(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

#[derive(Debug)]
enum Piece {
    Text(String),
    Action(String),
}

fn pieces(template: &str) -> anyhow::Result<Vec<Piece>> {
    let mut out = Vec::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let (action, after) = after.split_once("}}").context("`{{` without `}}`")?;
        let (before, action) = match action.strip_prefix('-') {
            Some(action) => (before.trim_end(), action),
            None => (before, action),
        };
        ensure!(!action.ends_with('-'), "`-}}}}` is not understood");
        out.push(Piece::Text(before.to_owned()));
        out.push(Piece::Action(action.trim().to_owned()));
        rest = after;
    }
    out.push(Piece::Text(rest.to_owned()));
    Ok(out)
}

/// Runs from `at` to the `end` or `else` of its block, which is returned; `live` is false in a branch not taken.
fn run(pieces: &[Piece], mut at: usize, root: &Value, dot: &Value, live: bool, out: &mut String) -> anyhow::Result<usize> {
    while at < pieces.len() {
        let action = match &pieces[at] {
            Piece::Text(text) => {
                if live {
                    out.push_str(text);
                }
                at += 1;
                continue;
            }
            Piece::Action(action) => action.as_str(),
        };
        at += 1;
        if action == "end" || action == "else" {
            return Ok(at - 1);
        }
        if let Some(path) = action.strip_prefix("if ") {
            let holds = live && holds(path, root, dot)?;
            at = run(pieces, at, root, dot, holds, out)?;
            if matches!(pieces.get(at), Some(Piece::Action(a)) if a == "else") {
                at = run(pieces, at + 1, root, dot, live && !holds, out)?;
            }
            at = expect_end(pieces, at)?;
        } else if let Some(path) = action.strip_prefix("range ") {
            let items = if live { find(path, root, dot)? } else { Value::Null };
            let mut end = run(pieces, at, root, dot, false, out)?;
            for item in items.as_array().into_iter().flatten() {
                end = run(pieces, at, root, item, true, out)?;
            }
            at = expect_end(pieces, end)?;
        } else if live {
            out.push_str(&insert(action, root, dot)?);
        }
    }
    Ok(at)
}

fn expect_end(pieces: &[Piece], at: usize) -> anyhow::Result<usize> {
    match pieces.get(at) {
        Some(Piece::Action(action)) if action == "end" => Ok(at + 1),
        _ => bail!("a block without `end`"),
    }
}

fn holds(condition: &str, root: &Value, dot: &Value) -> anyhow::Result<bool> {
    let Some(rest) = condition.strip_prefix("eq ") else { return Ok(is_true(&find(condition, root, dot)?)) };
    let (path, text) = rest.split_once(' ').with_context(|| format!("`{condition}` is not understood"))?;
    let text: String = serde_json::from_str(text.trim()).with_context(|| format!("`{condition}` is not understood"))?;
    Ok(find(path, root, dot)? == json!(text))
}

fn is_true(value: &Value) -> bool {
    !matches!(value, Value::Null | Value::Bool(false)) && *value != json!("") && *value != json!(0) && *value != json!([])
}

fn find(path: &str, root: &Value, dot: &Value) -> anyhow::Result<Value> {
    let path = path.trim();
    let (mut value, path) = match path.strip_prefix("$.") {
        Some(path) => (root, path),
        None => (dot, path.strip_prefix('.').with_context(|| format!("`{path}` is not understood"))?),
    };
    for key in path.split('.') {
        ensure!(key.bytes().all(|b| b.is_ascii_alphanumeric()), "`{path}` is not understood");
        value = &value[key];
    }
    Ok(value.clone())
}

fn insert(action: &str, root: &Value, dot: &Value) -> anyhow::Result<String> {
    let scalar = |value: Value| match value {
        Value::String(text) => Ok(text),
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        _ => bail!("`{action}` has no value"),
    };
    if let Some(rest) = action.strip_prefix("toYaml ") {
        let (path, indent) = rest.split_once("| nindent ").with_context(|| format!("`{action}` is not understood"))?;
        let Value::Object(map) = find(path, root, dot)? else { bail!("`{path}` is not a map") };
        let mut lines = String::new();
        to_yaml(&map, indent.trim().parse()?, &mut lines)?;
        return Ok(lines);
    }
    match action.split_once('|') {
        Some((path, "  quote" | " quote")) => Ok(format!("{:?}", scalar(find(path, root, dot)?)?)),
        Some(_) => bail!("`{action}` is not understood"),
        None => scalar(find(action, root, dot)?),
    }
}

fn to_yaml(map: &Map<String, Value>, indent: usize, out: &mut String) -> anyhow::Result<()> {
    for (key, value) in map {
        write!(out, "\n{:indent$}{key}:", "")?;
        match value {
            Value::Object(inner) => to_yaml(inner, indent + 2, out)?,
            Value::String(text) => write!(out, " {text}")?,
            Value::Number(_) | Value::Bool(_) => write!(out, " {value}")?,
            _ => bail!("`{key}` is not understood"),
        }
    }
    Ok(())
}
