//! `waypoint`: see the library.
fn main() {}
