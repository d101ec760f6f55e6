//! Log lines of the process: `tracing` events and access-log lines, plain or JSON, through one writer thread.
//!
//! Owns format, levels and the writer. It refuses to let a log consumer slow the mesh down: when the pipe is blocked lines
//! are dropped and counted, the data threads never wait. Upstream: `RUST_LOG`, `LOG_FORMAT`, `POST /logging`. Access-log lines do
//! not pass through `tracing`; the caller builds them with [`Line`] when [`AccessLog::enabled`].

mod directives;
mod layer;
mod line;
mod writer;

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Method, StatusCode};
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;

use crate::admin::{HttpServer, Response, text};

pub use directives::{BadLevel, Directives};
pub use line::{Format, JsonText, Line, Visible, push_json, push_second};
pub use writer::{LogWriter, MAX_LINES};

/// Scope of access-log lines.
pub const ACCESS: &str = "access";

/// How to log.
#[derive(Debug)]
pub struct Options {
    /// Plain or JSON.
    pub format: Format,
    /// Levels at start and after a reset.
    pub levels: Directives,
    /// Name of the binary's crate, which scopes leave out: `ztunnel::proxy` is logged as `proxy`.
    pub own_crate: &'static str,
}

impl Options {
    /// Options from the values of `RUST_LOG` and `LOG_FORMAT`. Without `RUST_LOG`: `hickory_server=off,info`.
    pub fn from_env(rust_log: Option<&str>, log_format: Option<&str>, own_crate: &'static str) -> Result<Self, BadLevel> {
        let levels = match rust_log.map(str::trim) {
            None | Some("") => Directives::parse("hickory_server=off,info")?,
            Some(text) => Directives::default().with(text)?,
        };
        let format = if log_format.is_some_and(|format| format.trim().eq_ignore_ascii_case("json")) {
            Format::Json
        } else {
            Format::Plain
        };
        Ok(Self { format, levels, own_crate })
    }
}

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// No writer thread.
    #[error("cannot start the log thread: {0}")]
    Thread(#[from] std::io::Error),
    /// Somebody was first.
    #[error("logging is already set up: {0}")]
    AlreadySet(#[from] tracing::subscriber::SetGlobalDefaultError),
}

/// Sets up logging for the whole process, to standard output.
pub fn init(options: Options) -> Result<Logging, LoggingError> {
    let (logging, subscriber) = build(options, Box::new(std::io::stdout()))?;
    tracing::subscriber::set_global_default(subscriber)?;
    Ok(logging)
}

/// Logging to `out` without installing it: the subscriber for `tracing::subscriber::with_default`, and the handles.
pub fn build(
    options: Options,
    out: Box<dyn Write + Send>,
) -> std::io::Result<(Logging, impl tracing::Subscriber + Send + Sync + 'static)> {
    let Options { format, levels, own_crate } = options;
    let writer = LogWriter::start(out, format)?;
    let (filter, reload) = reload::Layer::new(levels.targets(own_crate));
    let access = AccessLog { writer: writer.clone(), format, most: Arc::new(AtomicU8::new(0)) };
    access.follow(&levels);
    let subscriber = tracing_subscriber::registry().with(filter).with(layer::LineLayer::new(writer.clone(), format, own_crate));
    let initial = Arc::new(levels);
    let control = LogControl {
        inner: Arc::new(Control {
            reload,
            current: ArcSwap::from(Arc::clone(&initial)),
            change: parking_lot::Mutex::new(()),
            initial,
            own_crate,
            access: access.clone(),
        }),
    };
    Ok((Logging { control, access, writer }, subscriber))
}

/// The handles of a running log.
#[derive(Clone, Debug)]
pub struct Logging {
    /// Levels.
    pub control: LogControl,
    /// Access log.
    pub access: AccessLog,
    /// The thread behind both.
    pub writer: LogWriter,
}

impl Logging {
    /// Makes a panic a log line, written out before the unwinding goes on.
    pub fn log_panics(&self) {
        let writer = self.writer.clone();
        let format = self.access.format;
        std::panic::set_hook(Box::new(move |info| {
            let mut line = Line::new(format, Level::ERROR, "panic", &info.to_string());
            line.raw("thread", std::thread::current().name().unwrap_or("unnamed"));
            writer.send(line);
            writer.flush(Duration::from_millis(500));
        }));
    }
}

/// Changes levels while the process runs. Cheap to clone.
#[derive(Clone)]
pub struct LogControl {
    inner: Arc<Control>,
}

impl std::fmt::Debug for LogControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogControl").field("levels", &self.levels().to_string()).finish()
    }
}

struct Control {
    reload: reload::Handle<Targets, tracing_subscriber::Registry>,
    current: ArcSwap<Directives>,
    /// Held while the levels change, so that two changes do not undo each other.
    change: parking_lot::Mutex<()>,
    initial: Arc<Directives>,
    own_crate: &'static str,
    access: AccessLog,
}

impl LogControl {
    /// Levels in force.
    pub fn levels(&self) -> Arc<Directives> {
        self.inner.current.load_full()
    }

    /// Lays directives (`info`, `mod=debug,other=off`) over the levels in force, or over the initial ones after `reset`.
    pub fn change(&self, reset: bool, directives: Option<&str>) -> Result<(), BadLevel> {
        let inner = &*self.inner;
        let _one_at_a_time = inner.change.lock();
        let base = if reset { Arc::clone(&inner.initial) } else { self.levels() };
        let next = match directives {
            Some(text) => base.with(text)?,
            None => (*base).clone(),
        };
        // Fails only when the subscriber is gone; then there is nobody to tell.
        let _ = inner.reload.reload(next.targets(inner.own_crate));
        inner.access.follow(&next);
        inner.current.store(Arc::new(next));
        Ok(())
    }

    /// The answer to `POST /logging` with this query: none lists, `level=…` changes, `reset` restores.
    pub fn answer(&self, query: &BTreeMap<String, String>) -> Response {
        let reset = query.contains_key("reset");
        let level = query.get("level").map(String::as_str);
        if (reset || level.is_some())
            && let Err(error) = self.change(reset, level)
        {
            return text(StatusCode::BAD_REQUEST, format!("{error}\n{USAGE}"));
        }
        text(StatusCode::OK, format!("current log level is {}\n", self.levels()))
    }

    /// Adds `POST /logging` to a server.
    #[must_use]
    pub fn route(&self, server: HttpServer) -> HttpServer {
        let control = self.clone();
        server.route(Method::POST, "/logging", move |request| control.answer(&request.query))
    }
}

const USAGE: &str = "usage: POST /logging\t\t\t\tlist current levels\n\
    usage: POST /logging?level=<level>\t\tchange the global level\n\
    usage: POST /logging?level={mod1=level1,mod2=level2}\tchange levels of modules\n\
    usage: POST /logging?reset\t\t\treset all levels\n\
    levels: error, warn, info, debug, trace, off\n";

/// Writes access-log lines. Cheap to clone; each data thread keeps one.
#[derive(Clone, Debug)]
pub struct AccessLog {
    writer: LogWriter,
    format: Format,
    /// The most verbose level of scope `access` that is on, see [`verbosity`].
    most: Arc<AtomicU8>,
}

impl AccessLog {
    /// Whether lines of this level are wanted: one relaxed load. Ask before collecting fields.
    pub fn enabled(&self, level: Level) -> bool {
        verbosity(level) <= self.most.load(Ordering::Relaxed)
    }

    /// Begins a line in the right format, with time, level, scope `access` and message.
    pub fn line(&self, level: Level, message: &str) -> Line {
        Line::new(self.format, level, ACCESS, message)
    }

    /// Hands a finished line to the writer thread. Never blocks.
    pub fn send(&self, line: Line) {
        self.writer.send(line);
    }

    /// Hands over bytes that already are one or more complete lines, newline included.
    pub fn send_bytes(&self, lines: &[u8]) {
        self.writer.submit(lines);
    }

    /// Format of the lines.
    pub fn format(&self) -> Format {
        self.format
    }

    fn follow(&self, levels: &Directives) {
        let most = levels.level_of(ACCESS).into_level().map_or(0, verbosity);
        self.most.store(most, Ordering::Relaxed);
    }
}

/// 1 (error) to 5 (trace).
fn verbosity(level: Level) -> u8 {
    match level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    }
}

#[cfg(test)]
mod tests;
