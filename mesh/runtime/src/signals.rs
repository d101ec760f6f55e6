//! The signals that end the process. Owns their handlers; what "end" means is decided by the caller (see [`crate::drain`]).
//!
//! The first SIGTERM or SIGINT resolves the future. A second SIGINT is an operator who does not want to wait: the process
//! exits at once. A second SIGTERM is ignored, because kubelet sends SIGKILL itself when its grace period is over.

use std::future::Future;
use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// Which signal asked for the shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// SIGTERM: kubelet or an init system.
    Terminate,
    /// SIGINT: a terminal.
    Interrupt,
}

/// Exit code after a second SIGINT: 128 + SIGINT, as a shell reports it.
const EXIT_INTERRUPTED: i32 = 130;

/// Installs the handlers now and returns a future of the first signal. Must be called inside a tokio runtime.
pub fn shutdown() -> io::Result<impl Future<Output = Shutdown> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {
                tokio::spawn(exit_on_interrupt(interrupt, 1));
                Shutdown::Terminate
            }
            _ = interrupt.recv() => {
                tokio::spawn(exit_on_interrupt(interrupt, 0));
                Shutdown::Interrupt
            }
        }
    })
}

async fn exit_on_interrupt(mut interrupt: tokio::signal::unix::Signal, spare: usize) {
    for _ in 0..=spare {
        if interrupt.recv().await.is_none() {
            return;
        }
    }
    std::process::exit(EXIT_INTERRUPTED);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_signal_resolves_the_future() {
        let seen = shutdown().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGTERM).unwrap();
        assert_eq!(seen.await, Shutdown::Terminate);
    }

    /// It ends the process, so a process of its own.
    #[test]
    fn a_second_interrupt_exits_at_once() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "signals::tests::child_is_interrupted_twice"])
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(EXIT_INTERRUPTED));
    }

    #[tokio::test]
    #[ignore = "run by a_second_interrupt_exits_at_once"]
    async fn child_is_interrupted_twice() {
        let interrupt = || nix::sys::signal::raise(nix::sys::signal::Signal::SIGINT).unwrap();
        let seen = shutdown().unwrap();
        interrupt();
        assert_eq!(seen.await, Shutdown::Interrupt);
        interrupt();
        tokio::time::sleep(std::time::Duration::from_secs(20)).await;
    }
}
