//! The node agent: captures the TCP traffic of enrolled pods and carries it over HBONE.
