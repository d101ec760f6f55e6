//! CONNECT over HTTP/2: client, server, pool, headers and the relay. Never sees a certificate.
