//! Loads, attaches and fills the redirection programs of one pod.
