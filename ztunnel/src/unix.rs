//! Unix sockets between processes of one user on one node: one message is one packet, and nobody else may speak.
use anyhow::{Result, ensure};
use mesh_runtime::sockets::peer_user;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::os::fd::OwnedFd;
use std::path::Path;

/// A `SOCK_SEQPACKET` socket.
pub fn seqpacket() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// A socket of ours alone that waits at `path`, in the place of what an agent before us left.
pub fn listen_at(path: &Path) -> Result<OwnedFd> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let _ = std::fs::remove_file(&new);
    let socket = seqpacket()?;
    bind(&socket, &SocketAddrUnix::new(&new)?)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
    listen(&socket, 64)?;
    std::fs::rename(new, path)?;
    Ok(socket)
}

/// Refuses another user.
pub fn check_peer(socket: &OwnedFd) -> Result<()> {
    let (peer, own) = (peer_user(socket)?, rustix::process::geteuid().as_raw());
    ensure!(peer == own, "the other side runs as user {peer}, not as {own}");
    Ok(())
}
