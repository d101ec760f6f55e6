//! What a pod is made of and by whom, beyond what the mesh decides by: for authorities that know pods by it.
use std::sync::Arc;

/// As the Kubernetes API tells it of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Making {
    /// Whose it is.
    pub owners: Vec<Owner>,
    /// Containers of the pod that the kubelet tells of.
    pub containers: Vec<Container>,
    /// Those that run before them, or beside them for as long.
    pub init_containers: Vec<Container>,
}

/// One of a pod's owners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// `ReplicaSet`.
    pub kind: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its uid.
    pub uid: Arc<str>,
}

/// One of a pod's containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Its name in the pod.
    pub name: Arc<str>,
    /// Its image as the pod names it.
    pub image: Arc<str>,
    /// The image that it was, with its digest; empty before that is known.
    pub image_id: Arc<str>,
}
