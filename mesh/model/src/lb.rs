//! Endpoint choice over sets precomputed at publish: a pick is O(1) whatever the size of the service.
