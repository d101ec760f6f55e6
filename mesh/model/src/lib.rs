//! What the mesh knows and every decision made from it: pure, no I/O, no clock.
