//! How a Culvert process runs: threads, sockets, drain, readiness, admin, metrics, logs, settings.
