use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    name: String,
    #[serde(with = "duration")]
    drain: Duration,
    #[serde(with = "optional_duration")]
    idle: Option<Duration>,
    pool: Pool,
    section: Option<Pool>,
    hosts: Vec<String>,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Pool {
    streams: u32,
    share: f64,
    on: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: "default".into(),
            drain: Duration::from_secs(5),
            idle: None,
            pool: Pool { streams: 100, share: 0.5, on: false },
            section: None,
            hosts: vec!["a".into()],
        }
    }
}

const KEYS: &[EnvKey] = &[
    EnvKey { name: "DRAIN", path: "drain", kind: Kind::Duration },
    EnvKey { name: "IDLE", path: "idle", kind: Kind::Duration },
    EnvKey { name: "STREAMS", path: "pool.streams", kind: Kind::Integer },
    EnvKey { name: "ON", path: "pool.on", kind: Kind::Bool },
    EnvKey { name: "SECTION_STREAMS", path: "section.streams", kind: Kind::Integer },
    EnvKey { name: "HOSTS", path: "hosts", kind: Kind::List },
    EnvKey { name: "NAME", path: "name", kind: Kind::Text },
];

fn env<'a>(vars: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
    move |name| vars.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
}

fn overlay() -> Overlay<Settings> {
    Overlay::new().unwrap()
}

#[test]
fn later_layers_win() {
    let overlay = overlay()
        .file("s.yaml", &json!({"name": "file", "drain": 7, "pool": {"streams": 10, "share": 0.25}}))
        .unwrap()
        .env(KEYS, env(&[("STREAMS", "20"), ("ON", "Yes"), ("HOSTS", "x, y,"), ("IDLE", "1h30m"), ("NAME", "")]))
        .unwrap()
        .flag("--streams", "pool.streams", Kind::Integer, "30")
        .unwrap();
    assert_eq!(overlay.origins()["name"], "file s.yaml");
    assert_eq!(overlay.origins()["pool.streams"], "flag --streams");
    assert_eq!(overlay.origins()["idle"], "environment variable IDLE");
    let settings = overlay.finish().unwrap();
    assert_eq!(
        settings,
        Settings {
            name: "file".into(),
            drain: Duration::from_secs(7),
            idle: Some(Duration::from_mins(90)),
            pool: Pool { streams: 30, share: 0.25, on: true },
            section: None,
            hosts: vec!["x".into(), "y".into()],
        }
    );
}

#[test]
fn an_absent_section_appears_when_it_is_set() {
    let settings = overlay().env(KEYS, env(&[("SECTION_STREAMS", "3")])).unwrap().finish().unwrap();
    assert_eq!(settings.section.unwrap().streams, 3);
}

#[test]
fn nothing_set_is_the_defaults() {
    let settings = overlay().file("empty", &Value::Null).unwrap().file("pool", &json!({"pool": {}})).unwrap();
    assert_eq!(settings.env(KEYS, |_| None).unwrap().finish().unwrap(), Settings::default());
}

fn message<T>(result: Result<T, SettingsError>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn errors_name_the_source_and_the_key() {
    assert_eq!(
        message(overlay().env(KEYS, env(&[("STREAMS", "many")]))),
        r#"environment variable STREAMS: setting "pool.streams": "many" is not a whole number"#
    );
    let wrong = message(overlay().env(KEYS, env(&[("STREAMS", "-1")])));
    assert!(wrong.starts_with(r#"environment variable STREAMS: setting "pool.streams": invalid value"#), "{wrong}");
    let wrong = message(overlay().file("s.yaml", &json!({"name": "x", "pool": {"share": "half"}})));
    assert!(wrong.starts_with(r#"file s.yaml: setting "pool.share": invalid type"#), "{wrong}");
    let wrong = message(overlay().file("s.yaml", &json!({"pool": {"steams": 1}})));
    assert!(wrong.starts_with(r#"file s.yaml: setting "pool.steams": unknown field `steams`"#), "{wrong}");
    let wrong = message(overlay().file("s.yaml", &json!({"name": {"x": 1}})));
    assert!(wrong.starts_with(r#"file s.yaml: setting "name.x": "#), "{wrong}");
    let wrong = message(overlay().flag("--drain", "drain", Kind::Duration, "soon"));
    assert!(wrong.starts_with(r#"flag --drain: setting "drain": "soon" is not a duration"#), "{wrong}");
    assert_eq!(message(overlay().file("s.yaml", &json!([1]))), r#"file s.yaml: setting "": expected a map of settings"#);
}

#[test]
fn kinds_read_what_they_say() {
    assert_eq!(read(Kind::Integer, " 18446744073709551615 "), Ok(json!(u64::MAX)));
    assert_eq!(read(Kind::Integer, "-3"), Ok(json!(-3)));
    assert_eq!(read(Kind::Float, "0.5"), Ok(json!(0.5)));
    assert!(read(Kind::Float, "NaN").is_err());
    assert!(read(Kind::Bool, "maybe").is_err());
    assert_eq!(read(Kind::List, ""), Ok(json!([])));
    assert_eq!(read(Kind::Json, r#"{"a":[1]}"#), Ok(json!({"a": [1]})));
    assert!(read(Kind::Json, "{").is_err());
}

#[test]
fn durations_are_read_as_people_write_them() {
    for (text, millis) in [
        ("5m", 300_000),
        ("100ms", 100),
        ("1h30m", 5_400_000),
        ("1h 30m", 5_400_000),
        ("1.5s", 1500),
        ("30", 30_000),
        ("0", 0),
        ("2d", 172_800_000),
    ] {
        assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
    }
    assert_eq!(parse_duration("7us5ns"), Ok(Duration::from_nanos(7005)));
    for text in ["", "m", "-5s", "1h30", "5 parsecs", "1..5s", ".5s", "99999999999999999999s", "1e3s", "5m,"] {
        assert!(parse_duration(text).is_err(), "{text}");
    }
}

#[test]
fn durations_survive_the_round_trip() {
    for nanos in [0, 1, 999, 1_000_001, 5_400_000_000_000, u64::MAX] {
        let duration = Duration::from_nanos(nanos);
        assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
    }
    assert_eq!(format_duration(Duration::from_mins(90)), "1h30m");
    assert_eq!(format_duration(Duration::from_millis(100)), "100ms");
}
