//! A sharded copy-on-write map: cloning shares all shards, a write copies one.
