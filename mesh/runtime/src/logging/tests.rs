use std::io;
use std::sync::mpsc;

use parking_lot::Mutex;
use tracing::subscriber::with_default;

use super::*;

const LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().clone()).unwrap()
    }
}

fn options(format: Format, levels: &str) -> Options {
    Options { format, levels: Directives::parse(levels).unwrap(), own_crate: "mesh_runtime" }
}

/// The lines that `run` logs.
fn logged(format: Format, levels: &str, run: impl FnOnce(&Logging)) -> Vec<String> {
    let sink = Sink::default();
    let (logging, subscriber) = build(options(format, levels), Box::new(sink.clone())).unwrap();
    with_default(subscriber, || run(&logging));
    assert!(logging.writer.flush(LIMIT));
    sink.text().lines().map(str::to_owned).collect()
}

/// The part of a plain line after the time, which is checked for its shape.
fn after_time(line: &str) -> &str {
    let (time, rest) = line.split_once('\t').unwrap();
    assert_eq!(time.len(), "2026-01-02T03:04:05.123456Z".len(), "{time}");
    let format = time::format_description::well_known::Rfc3339;
    let parsed = time::OffsetDateTime::parse(time, &format).unwrap();
    assert!((time::OffsetDateTime::now_utc() - parsed).abs() < time::Duration::minutes(1));
    rest
}

#[test]
fn plain_lines_have_the_reference_shape() {
    let lines = logged(Format::Plain, "info", |_| {
        tracing::info!("hello");
        let span = tracing::info_span!("outbound", id = "ab", n = 3, late = tracing::field::Empty);
        let _in = span.enter();
        span.record("late", true);
        let addr: std::net::SocketAddr = "10.0.0.1:80".parse().unwrap();
        tracing::warn!(%addr, who = "me \"x\"\n", count = 4u64, "connection\tfailed\n2026");
        tracing::info!(target: "elsewhere", parent: None, only = 1);
        tracing::debug!("not seen");
    });
    let lines: Vec<&str> = lines.iter().map(|line| after_time(line)).collect();
    assert_eq!(
        lines,
        [
            "info\tlogging::tests\thello",
            "warn\tlogging::tests:outbound{id=\"ab\" n=3 late=true}\tconnection\\tfailed\\n2026\taddr=10.0.0.1:80 who=\"me \\\"x\\\"\\n\" count=4",
            "info\telsewhere\t\tonly=1",
        ]
    );
}

#[test]
fn json_lines_are_objects_with_flat_keys_and_spans_by_name() {
    let lines = logged(Format::Json, "info", |_| {
        let span = tracing::info_span!("inbound", id = "a\"b", peer = ?Some(1));
        let _in = span.enter();
        let bad = std::io::Error::other("no\nway");
        tracing::error!(src.addr = %"1.2.3.4:5", f = f64::INFINITY, ok = false, error = &bad as &dyn std::error::Error, "sorry \"you\"");
    });
    let value: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!(value["level"], "error");
    assert_eq!(value["scope"], "logging::tests");
    assert_eq!(value["message"], "sorry \"you\"");
    assert_eq!(value["src.addr"], "1.2.3.4:5");
    assert_eq!(value["f"], "inf");
    assert_eq!(value["ok"], false);
    assert_eq!(value["error"], "no\nway");
    assert_eq!(value["inbound"], serde_json::json!({"id": "a\"b", "peer": "Some(1)"}));
    assert!(lines[0].starts_with("{\"level\":\"error\",\"time\":\""), "{}", lines[0]);
}

fn access_fields(line: &mut Line) {
    line.raw("src.addr", "10.0.0.1:4")
        .str("src.workload", "shell-\u{1b}x")
        .opt_str("src.service", None)
        .opt_raw("dst.hbone_addr", None::<&str>)
        .quoted("src.identity", format_args!("spiffe://{}/ns/{}", "td", "a\"b"))
        .num("bytes_sent", 67);
}

#[test]
fn access_lines_come_from_one_field_list() {
    let lines = logged(Format::Plain, "info", |logging| {
        let mut line = logging.access.line(Level::INFO, "connection complete");
        access_fields(&mut line);
        logging.access.send(line);
    });
    assert_eq!(
        after_time(&lines[0]),
        "info\taccess\tconnection complete\tsrc.addr=10.0.0.1:4 src.workload=\"shell-\\u{1b}x\" \
         src.identity=\"spiffe://td/ns/a\\\"b\" bytes_sent=67"
    );
    let lines = logged(Format::Json, "info", |logging| {
        let mut line = logging.access.line(Level::INFO, "connection complete");
        access_fields(&mut line);
        logging.access.send(line);
    });
    let value: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!(value["scope"], "access");
    assert_eq!(value["src.workload"], "shell-\u{1b}x");
    assert_eq!(value["src.identity"], "spiffe://td/ns/a\"b");
    assert_eq!(value["bytes_sent"], 67);
    assert!(value.get("src.service").is_none());
}

#[test]
fn levels_follow_the_longest_scope() {
    let levels = Directives::parse("warn,xds=debug,xds::client=off, access=info").unwrap();
    assert_eq!(levels.level_of("xds::codec"), tracing::level_filters::LevelFilter::DEBUG);
    assert_eq!(levels.level_of("xds::client"), tracing::level_filters::LevelFilter::OFF);
    assert_eq!(levels.level_of("xdsx"), tracing::level_filters::LevelFilter::WARN);
    assert_eq!(levels.to_string(), "access=info,xds=debug,xds::client=off,warn");
    for bad in ["", ",", "inof", "a=loud", "=info", "a b=info", "info=", "a[x]=info"] {
        assert!(Directives::parse(bad).is_err(), "{bad:?}");
    }
}

fn ask(control: &LogControl, query: &str) -> (u16, String) {
    let response = control.answer(&crate::admin::parse_query(query));
    (response.status().as_u16(), String::from_utf8(response.body().to_vec()).unwrap())
}

#[test]
fn levels_change_while_running() {
    let lines = logged(Format::Plain, "info", |logging| {
        let control = &logging.control;
        assert_eq!(ask(control, ""), (200, "current log level is info\n".into()));
        assert!(logging.access.enabled(Level::INFO) && !logging.access.enabled(Level::DEBUG));
        tracing::debug!("one");
        // The scope as shown in the lines, not the full target.
        assert_eq!(ask(control, "level=logging=debug,access=off").1, "current log level is access=off,logging=debug,info\n");
        assert!(!logging.access.enabled(Level::ERROR));
        tracing::debug!("two");
        assert_eq!(ask(control, "level=warn").1, "current log level is access=off,logging=debug,warn\n");
        let (status, body) = ask(control, "level=noisy");
        assert_eq!(status, 400);
        assert!(body.starts_with("Invalid level provided: \"noisy\"\nusage: POST /logging"), "{body}");
        assert_eq!(ask(control, "reset&level=error").1, "current log level is error\n");
        tracing::warn!("three");
        assert_eq!(ask(control, "reset").1, "current log level is info\n");
        assert!(logging.access.enabled(Level::INFO));
        tracing::info!("four");
    });
    let messages: Vec<&str> = lines.iter().map(|line| line.rsplit('\t').next().unwrap()).collect();
    assert_eq!(messages, ["two", "four"]);
}

#[test]
fn the_environment_chooses_format_and_levels() {
    let options = Options::from_env(None, None, "ztunnel").unwrap();
    assert_eq!((options.format, options.levels.to_string()), (Format::Plain, "hickory_server=off,info".into()));
    let options = Options::from_env(Some("debug,a=off"), Some("JSON"), "ztunnel").unwrap();
    assert_eq!((options.format, options.levels.to_string()), (Format::Json, "a=off,debug".into()));
    assert!(Options::from_env(Some("loud"), None, "ztunnel").is_err());
}

/// An output that stands still until it is told to go on.
struct Stuck {
    entered: mpsc::Sender<()>,
    go: mpsc::Receiver<()>,
    sink: Sink,
    released: bool,
}

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.released {
            self.entered.send(()).unwrap();
            self.go.recv().unwrap();
            self.released = true;
        }
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_blocked_output_drops_lines_and_says_so() {
    let (entered, has_entered) = mpsc::channel();
    let (go, wait) = mpsc::channel();
    let sink = Sink::default();
    let out = Stuck { entered, go: wait, sink: sink.clone(), released: false };
    let writer = LogWriter::start(Box::new(out), Format::Plain).unwrap();
    writer.submit(b"first\n");
    has_entered.recv().unwrap();
    for _ in 0..MAX_LINES + 7 {
        writer.submit(b"x\n");
    }
    assert_eq!(writer.dropped(), 7);
    assert!(!writer.flush(Duration::from_millis(1)));
    go.send(()).unwrap();
    assert!(writer.flush(LIMIT));
    let text = sink.text();
    assert_eq!(text.matches("x\n").count(), MAX_LINES);
    assert_eq!(text.matches("dropped=7 total=7\n").count(), 1);
    writer.submit(b"after\n");
    assert!(writer.flush(LIMIT));
    assert!(sink.text().ends_with("after\n"));
}

#[test]
fn an_output_that_fails_is_counted_and_survived() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
    let writer = LogWriter::start(Box::new(Closed), Format::Json).unwrap();
    for count in 1..=3 {
        writer.submit(b"lost\n");
        assert!(writer.flush(LIMIT));
        assert_eq!(writer.dropped(), count);
    }
}

#[test]
fn the_last_clone_writes_everything_before_the_thread_ends() {
    struct Ending(Sink, mpsc::Sender<()>);
    impl Write for Ending {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Drop for Ending {
        fn drop(&mut self) {
            let _ = self.1.send(());
        }
    }
    let (ended, has_ended) = mpsc::channel();
    let sink = Sink::default();
    let writer = LogWriter::start(Box::new(Ending(sink.clone(), ended)), Format::Plain).unwrap();
    let clone = writer.clone();
    drop(writer);
    clone.submit(b"last\n");
    drop(clone);
    has_ended.recv_timeout(LIMIT).unwrap();
    assert_eq!(sink.text(), "last\n");
}
