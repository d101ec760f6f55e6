//! What both proxies do around their own work: log, run a control thread, show the admin pages every process has.
//!
//! Owns nothing that lasts. Upstream: each binary's `app`. Downstream: `logging`, `admin`, `drain`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::Value;
use tokio::sync::Notify;

use crate::admin::{HttpServer, json, text};
use crate::drain::Drain;
use crate::logging::{self, BadLevel, Logging, LoggingError};
use crate::profile;
use crate::threads;

/// How long the end of the process waits for blocking jobs, and again for the last lines of the log.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Why a process did not come up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The environment asks for levels that do not exist.
    #[error("RUST_LOG")]
    Levels(#[source] BadLevel),
    /// The log cannot be set up.
    #[error(transparent)]
    Logging(#[from] LoggingError),
    /// The operating system refuses the control thread's runtime.
    #[error("control runtime")]
    Runtime(#[source] io::Error),
}

/// Runs `serve` on this thread, the control thread, with the log as `RUST_LOG` and `LOG_FORMAT` want it. `own_crate`: whose
/// lines are the process's own.
///
/// # Errors
/// Those of `serve`, and [`StartError`].
pub fn run<E: From<StartError>>(own_crate: &'static str, serve: impl AsyncFnOnce(&Logging) -> Result<(), E>) -> Result<(), E> {
    let variable = |name| std::env::var(name).ok();
    run_with(variable("RUST_LOG").as_deref(), variable("LOG_FORMAT").as_deref(), own_crate, serve)
}

/// [`run`], with what `RUST_LOG` and `LOG_FORMAT` would say given by the caller.
///
/// # Errors
/// Those of `serve`, and [`StartError`].
pub fn run_with<E: From<StartError>>(
    levels: Option<&str>,
    format: Option<&str>,
    own_crate: &'static str,
    serve: impl AsyncFnOnce(&Logging) -> Result<(), E>,
) -> Result<(), E> {
    let (logging, runtime) = start(levels, format, own_crate)?;
    let outcome = runtime.block_on(serve(&logging));
    runtime.shutdown_timeout(LAST_WORDS);
    logging.writer.flush(LAST_WORDS);
    outcome
}

fn start(
    levels: Option<&str>,
    format: Option<&str>,
    own_crate: &'static str,
) -> Result<(Logging, tokio::runtime::Runtime), StartError> {
    let options = logging::Options::from_env(levels, format, own_crate).map_err(StartError::Levels)?;
    let logging = logging::init(options)?;
    logging.log_panics();
    let runtime = threads::control_runtime().map_err(StartError::Runtime)?;
    Ok((logging, runtime))
}

/// Adds what every admin server has: `GET /version`, `POST /quitquitquit` (which notifies `quit`), `POST /logging`, profiles and, at
/// `/`, the list of all paths. Call it after the process's own routes are in.
#[must_use]
pub fn admin_routes(server: HttpServer, version: Value, logging: &Logging, quit: Arc<Notify>) -> HttpServer {
    let server = server.route(Method::GET, "/version", move |_| json(&version)).route(Method::POST, "/quitquitquit", move |_| {
        quit.notify_one();
        text(StatusCode::OK, "shutting down\n")
    });
    let server = profile::routes(logging.control.route(server));
    let mut index = server.paths().collect::<Vec<_>>().join("\n");
    index.push('\n');
    server.route(Method::GET, "/", move |_| text(StatusCode::OK, index.clone()))
}

/// Serves until the drain's deadline: these faces stay up during the drain, an operator wants to see it.
///
/// # Errors
/// `addr` cannot be bound.
pub fn listen(server: &HttpServer, addr: SocketAddr, drain: &Drain) -> io::Result<()> {
    let bound = server.bind(addr)?;
    let watch = drain.watch();
    tokio::spawn(async move {
        if let Err(error) = bound.serve(async move { watch.expired().await }).await {
            tracing::error!(%error, %addr, "server failed");
        }
    });
    Ok(())
}
