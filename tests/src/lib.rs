//! Black-box suites and the harness that builds topologies.
