//! Who we are and who we believe: SVIDs, rotation, TLS configurations, SPIFFE verification.
